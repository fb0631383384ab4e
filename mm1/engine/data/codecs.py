"""The codecs of media: for each kind the one that turns encoded bytes into the views that a model takes.

To add a medium, write a class with the members of Codec in a file of its own, and add a line to CODECS.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from mm1.engine.data.record import View

if TYPE_CHECKING:
    import numpy as np

    from mm1.engine.models.spec import ModelConfig


class Codec(Protocol):
    """Decodes one kind of media with the settings of a model. It can be pickled: loader processes have copies."""

    kind: ClassVar[str]  # as in Media and View; errors call a medium by it
    empty: ClassVar[View]  # a view without values, which has the kind, channels and dtype of all others

    @property
    def patch(self) -> int:
        """Return the divisor of both sides of every view."""
        ...

    @property
    def count(self) -> int:
        """Return the largest number of views of one medium."""
        ...

    @property
    def longest(self) -> int:
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


def _image(config: "ModelConfig") -> Codec:
    from mm1.engine.data.images import ImagePolicy  # imports PIL

    images = config.images
    return ImagePolicy(images.patch, images.mode, images.size, images.patches, images.parts)


CODECS: "dict[str, Callable[[ModelConfig], Codec]]" = {"image": _image}


def codec_of(config: "ModelConfig", kind: str = "image") -> Codec:
    """Return the codec of a kind of media with a model's settings."""
    return CODECS[kind](config)
