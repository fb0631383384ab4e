"""Triton for the files of kernels, which import `triton` and `tl` from here.

A condition that is a scalar is part of no mask: Triton 3.9 does not interpret that. It sets a bound to 0 instead,
offs < tl.where(taken, D, 0).

Triton has no wheels for macOS and Windows. There a placeholder takes its place, so that the files import and their CPU
paths run; `dispatch.launch` says what is missing.
"""

from typing import TYPE_CHECKING, Any


class _Placeholder:
    """Every attribute of it, and what a call of it returns, is the placeholder: decorators, annotations, constants."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols of Python, which it does not have
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
        # TRITON_INTERPRET=1: the Triton source itself runs on CPU tensors, which is how it is tested without a GPU.
        INTERPRETED = bool(triton.knobs.runtime.interpret)
    except ImportError:
        triton = tl = TensorDescriptor = _Placeholder()
        INSTALLED = INTERPRETED = False

__all__ = ["INSTALLED", "INTERPRETED", "TensorDescriptor", "tl", "triton"]
