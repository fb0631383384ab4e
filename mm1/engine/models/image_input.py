"""Describe how a model takes images, for the data package and inference."""

from typing import NamedTuple


class ImageInput(NamedTuple):
    """Describe images as a model takes them, and the tokens of each."""

    patch: int  # side in pixels
    mode: str  # "squash" to size², or "native": own aspect ratio, at most `patches` patches
    size: int  # pixels of a side
    patches: int
    parts: int  # k: k × k parts of the image are added to the whole one
    slots: int  # tokens of one view of an image; 0: the model takes no images


TEXT_ONLY = ImageInput(patch=1, mode="native", size=1, patches=1, parts=1, slots=0)  # of a model without images
