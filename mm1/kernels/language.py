"""Import Triton for all kernel files, which take `triton` and `tl` from here.

Triton 3.9 does not interpret masks that contain a scalar condition: set a bound to 0 instead, offs < tl.where(valid, D,
0).

Triton has no wheels for macOS and Windows. There a placeholder replaces it, so that the files can be imported and their
CPU paths run; `dispatch.launch` raises an error that says so.
"""

from typing import TYPE_CHECKING, Any


class _Placeholder:
    """Stands for decorators, annotations and constants: each attribute of it, and each result of a call, is itself."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols of Python, which it does not implement
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self


if TYPE_CHECKING:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    INSTALLED = INTERPRETED = False
else:
    try:
        import triton
        import triton.language as tl
        from triton.tools.tensor_descriptor import TensorDescriptor

        INSTALLED = True
        # TRITON_INTERPRET=1: Triton source runs interpreted on CPU tensors, which tests it without a GPU.
        INTERPRETED = bool(triton.knobs.runtime.interpret)
    except ImportError:
        triton = tl = TensorDescriptor = _Placeholder()
        INSTALLED = INTERPRETED = False

__all__ = ["INSTALLED", "INTERPRETED", "TensorDescriptor", "tl", "triton"]
