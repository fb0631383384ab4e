"""Define the codecs of media: for each kind, the one that turns encoded bytes into the views that a model takes.

To add a medium, write a class with the members of Codec in a file of its own, and add a line to CODECS.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, overload

from mm1.engine.data.record import View

if TYPE_CHECKING:
    import numpy as np

    from mm1.engine.data.images import ImagePolicy
    from mm1.engine.models.spec import ModelConfig


class Codec(Protocol):
    """Decode one kind of media with the settings of a model. A codec can be pickled: loader processes have copies."""

    kind: ClassVar[str]  # as in Media and View; error messages use it
    empty: ClassVar[View]  # a view without values, with the kind, channels and dtype of all others

    @property
    def patch(self) -> int:
        """Return the divisor of both sides of every view."""
        ...

    @property
    def max_views(self) -> int:
        """Return the largest number of views of one medium."""
        ...

    @property
    def max_patches(self) -> int:
        """Return the largest number of patches of one view."""
        ...

    def decode(self, data: bytes) -> Any:
        """Decode the bytes of a file. Raises Unreadable."""
        ...

    def check(self, medium: Any) -> Any:
        """Return a decoded medium of a user's prompt as decode returns it. Raises UserError for another type."""
        ...

    def views(self, medium: Any) -> "list[np.ndarray]":
        """Return the values of a decoded medium's views, [H, W, C] each."""
        ...


def _image(config: "ModelConfig") -> "ImagePolicy":
    from mm1.engine.data.images import ImagePolicy  # imports PIL

    images = config.images
    return ImagePolicy(images.patch, images.mode, images.size, images.patches, images.parts)


CODECS: "dict[str, Callable[[ModelConfig], Codec]]" = {"image": _image}


@overload
def codec_of(config: "ModelConfig", kind: Literal["image"] = "image") -> "ImagePolicy": ...
@overload
def codec_of(config: "ModelConfig", kind: str) -> Codec: ...
def codec_of(config, kind="image"):
    """Return the codec of a kind of media, a key of CODECS, with a model's settings."""
    return CODECS[kind](config)
