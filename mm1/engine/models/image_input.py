"""Describe how a model takes images, for the data package and inference."""

from typing import NamedTuple


class ImageInput(NamedTuple):
    """Describes images as a model takes them, and the tokens that stand for one."""

    patch: int  # side in pixels
    mode: str  # "squash" to size², or "native": own aspect ratio, at most `patches` patches
    size: int  # pixels of a side
    patches: int
    parts: int  # k: besides the whole image k × k parts of it
    slots: int  # tokens of one view of an image; 0: the model takes no images

    @property
    def longest(self) -> int:
        """Return the patches of the largest view."""
        return self.patches if self.mode == "native" else (self.size // self.patch) ** 2


NO_IMAGES = ImageInput(patch=1, mode="native", size=1, patches=1, parts=1, slots=0)  # of a model of text alone
