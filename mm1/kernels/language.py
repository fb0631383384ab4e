"""Import Triton for all kernel files, which take `triton` and `tl` from here.

Triton 3.9 does not interpret masks that contain a scalar condition: set a bound to 0 instead, as in
offs < tl.where(valid, D, 0).

Triton has no wheels for macOS and Windows. A placeholder replaces it there, so that the kernel files can be imported
and their CPU implementations run; `dispatch.launch` raises an error that names the missing package.
"""

from typing import TYPE_CHECKING, Any


class _Placeholder:
    """Replace Triton's decorators, annotations and constants; attributes and calls return the placeholder."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's protocols, which it does not implement
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self


if TYPE_CHECKING:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.tools.tensor_descriptor import TensorDescriptor

    INSTALLED = INTERPRETED = False
else:
    try:
        import triton
        import triton.language as tl
        from triton.language.extra import libdevice
        from triton.tools.tensor_descriptor import TensorDescriptor

        INSTALLED = True
        # TRITON_INTERPRET=1: Triton source runs interpreted on CPU tensors, which tests it without a GPU.
        INTERPRETED = bool(triton.knobs.runtime.interpret)
    except ImportError:
        triton = tl = libdevice = TensorDescriptor = _Placeholder()
        INSTALLED = INTERPRETED = False

__all__ = ["INSTALLED", "INTERPRETED", "TensorDescriptor", "libdevice", "tl", "triton"]
