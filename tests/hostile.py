"""Make Triton's interpreter as hostile as a GPU may be, for every interpreted test.

A masked load without `other` gives NaN, or a large integer, where its mask is false.
A load or store outside of the launch's tensors, or at an address that is no multiple of its element's size, fails. So
does a race: an element that one program writes, and another program of the same launch reads or writes. Without races
the order of programs cannot matter.
"""

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

MANY = 1 << 30  # in Tensors.readers: several programs have read this element


class Tensors:
    """Hold the memory of one launch's tensors, and the programs that read and wrote each element, counted from 1.

    An element's programs are those of its first byte.
    """

    def __init__(self, name: str, arguments: list):
        spans = sorted(span for argument in arguments for span in spans_of(argument))
        self.name, merged = name, []
        for begin, end in spans:
            if merged and begin < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([begin, end])
        self.begins, self.ends = np.array(merged, np.int64).reshape(-1, 2).T
        sizes = self.ends - self.begins
        self.offsets = np.cumsum(sizes) - sizes  # of each span in the arrays below
        self.writers, self.readers = np.zeros((2, sizes.sum()), np.int32)

    def access(self, pointers: np.ndarray, mask: np.ndarray, itemsize: int, program: int, store: bool) -> None:
        """Check one load or store, and remember its program."""
        addresses = np.asarray(pointers).astype(np.int64)[np.broadcast_to(mask, np.shape(pointers)).astype(bool)]
        if not addresses.size:
            return
        what = f"{self.name}, program {program}: {'store' if store else 'load'}"
        span = np.searchsorted(self.begins, addresses, "right") - 1
        outside = (span < 0) | (addresses + itemsize > self.ends[span])
        assert not outside.any(), f"{what} of {outside.sum()} elements outside of all tensors"
        assert not (addresses % itemsize).any(), f"{what} is not aligned to {itemsize} bytes"
        at, own = addresses - self.begins[span] + self.offsets[span], program + 1
        writers = self.writers[at]
        assert not ((writers != 0) & (writers != own)).any(), f"{what} of an element that another program writes"
        readers = self.readers[at]
        others = (readers != 0) & (readers != own)
        if store:
            assert not others.any(), f"{what} to an element that another program reads"
            assert len(np.unique(at)) == len(at), f"{what} of two values to one address"
            self.writers[at] = own
        else:
            self.readers[at] = np.where(others, MANY, own)


def spans_of(argument: object) -> list[tuple[int, int]]:
    """Return first and last address of each tensor in an argument of a kernel."""
    if isinstance(argument, tuple):
        return [span for part in argument for span in spans_of(part)]
    tensor = getattr(argument, "base", argument)  # of a descriptor
    if not isinstance(tensor, torch.Tensor) or not tensor.numel():
        return []
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return [(tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size())]


def junk(pointers: TensorHandle) -> TensorHandle:
    """Return what a GPU may give for elements that a load's mask excludes: NaN, or a large integer."""
    dtype = interpreter._get_np_dtype(pointers.get_element_ty())
    values = np.zeros(np.shape(pointers.data), dtype)
    if dtype == np.bool_:
        values[...] = True
    elif pointers.get_element_ty().is_floating():
        values.view(np.uint8)[...] = 0xFF  # NaN, also of types that numpy holds as integers
    else:
        values[...] = np.iinfo(dtype).max // 3
    return TensorHandle(values, pointers.get_element_ty())


def install() -> None:
    """Replace methods of Triton's interpreter in this process."""
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    to_host = GridExecutor._init_args_hst

    def init_args(self, positional, named):
        hosts = to_host(self, positional, named)
        interpreter.interpreter_builder.tensors = Tensors(self.fn.__name__, [*hosts[0], *hosts[1].values()])
        return hosts

    def masked_load(self, ptrs, mask, other, *options, **named):
        if other is None and np.size(ptrs.data) > 1:  # a scalar load's other=0 reaches this method as None
            other = junk(ptrs)
        values = load(self, ptrs, mask, other, *options, **named)
        self.tensors.access(ptrs.data, mask.data, values.data.itemsize, self.grid_idx[0], store=False)
        return values

    def masked_store(self, ptrs, value, mask, *options):
        self.tensors.access(ptrs.data, mask.data, value.data.itemsize, self.grid_idx[0], store=True)
        return store(self, ptrs, value, mask, *options)

    GridExecutor._init_args_hst = init_args
    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = masked_load, masked_store
