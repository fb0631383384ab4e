"""Which configuration an op runs with: the one pinned for it, or else its own default for shape and device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

C = TypeVar("C")
_pinned: dict[str, object] = {}


@contextmanager
def pinned(**configs: object) -> Iterator[None]:
    """Within the block, the named kernels run with these configurations: `pinned(grouped_gemm=Config(…))`."""
    before = dict(_pinned)
    _pinned.update(configs)
    try:
        yield
    finally:
        _pinned.clear()
        _pinned.update(before)


def config_for(kernel: str, default: Callable[[], C]) -> C:
    found = _pinned.get(kernel)
    return default() if found is None else found  # pyright: ignore[reportReturnType]
