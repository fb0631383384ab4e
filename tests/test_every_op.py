"""Test the promises of every public op: devices, meta tensors, derivatives, no dependence on defaults."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, INTERPRETED, not_interpreted, relative_error
from every_op import every_op, results, values_and_gradients

ROOT = Path(__file__).parent.parent
OPS = list(every_op())


@not_interpreted
@pytest.mark.parametrize(
    "op, tensor", [(op, tensor) for op, call in every_op().items() for tensor in call.tensors if len(call.tensors) > 1]
)
def test_a_tensor_on_another_device_is_named(op, tensor):
    call = every_op()[op]
    name = tensor.replace("_", ".") if op == "conv_block" else tensor
    with pytest.raises(ValueError, match=rf"{op}: device of ({name} is meta, expected cpu|.* is cpu, expected meta)"):
        call(**{tensor: call.tensors[tensor].to("meta")})


@not_interpreted
@pytest.mark.parametrize("op", OPS)
def test_meta_tensors_give_shapes(op):
    call = every_op()[op]
    truth, actual = results(call()), results(call(**{name: x.to("meta") for name, x in call.tensors.items()}))
    assert [(y.shape, y.dtype) for y in actual] == [(y.shape, y.dtype) for y in truth]
    assert all(y.is_meta for y in actual)


TENSORS = [(op, name) for op, call in every_op().items() for name in call.tensors]
FORMS = {
    "last dimension not contiguous": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "every second": lambda x: torch.stack([x, x.flip(-1)], -1)[..., 0],
    "with an offset": lambda x: torch.cat([x[:1], x])[1:],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", OPS)
def test_tensors_may_have_any_strides(op, form):
    """The cache of paged_attention is the exception: a copy of it would cost more than the op."""
    call, cache = every_op()[op], ("k", "v") if op == "paged_attention" else ()
    strided = {name: x if name in cache or x.ndim == 0 else FORMS[form](x) for name, x in call.tensors.items()}
    for y, truth in zip(values_and_gradients(call._replace(tensors=strided)), values_and_gradients(call), strict=True):
        assert relative_error(y, truth) < 1e-6


OTHERS = (torch.int32, torch.complex64, torch.float8_e4m3fn, torch.bool)


@not_interpreted
@pytest.mark.parametrize("op, name", TENSORS)
def test_dtypes_that_are_not_computed_are_refused_by_name(op, name):
    call = every_op()[op]
    x, label = call.tensors[name], name.replace("_", ".") if op == "conv_block" else name
    for dtype in OTHERS if x.is_floating_point() else (torch.float32, torch.complex64, torch.bool):
        if (x.dtype == torch.uint8 and dtype == torch.float32) or x.dtype == dtype:
            continue
        with pytest.raises(ValueError, match=rf"{op}: (dtypes? of .*{label.split('_')[-1]}.* is|{label} is)"):
            call(**{name: x.to(dtype)})


@not_interpreted
@pytest.mark.parametrize("op", OPS)
def test_what_is_no_tensor_is_refused(op):
    call = every_op()[op]
    name = next(iter(call.tensors))
    with pytest.raises(TypeError, match=rf"{op}: {name}(\[0\])? is a ndarray, expected a tensor"):
        call(**{name: call.tensors[name].numpy()})


DIFFERENTIABLE = [(op, name) for op, call in every_op().items() for name in call.differentiable]
# The gradients of these are computed by ops that have gradients.
TWICE = {
    *(("grouped_gemm", name) for name in ("a", "b", "bias")),
    *(("grouped_gemm_dw", name) for name in ("a", "dy")),
    *(("embed_patches", name) for name in ("patches", "weight", "bias")),
}


@not_interpreted
@pytest.mark.parametrize("op, name", DIFFERENTIABLE)
def test_forward_mode_is_refused(op, name):
    call = every_op()[op]
    x = call.tensors[name]
    with pytest.raises(RuntimeError, match=f"{op}: .*has a tangent, but forward-mode derivatives are not computed"):
        torch.func.jvp(lambda x: results(call(**{name: x}))[0], (x,), (x,))


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="kernels of a GPU do not compute in fp64")
@pytest.mark.parametrize("op, name", DIFFERENTIABLE)
def test_in_fp64_gradients_are_those_of_finite_differences(op, name):
    call = every_op(torch.float64)[op]
    x = call.tensors[name].clone().requires_grad_()

    def outputs(x):
        return tuple(y for y in results(call(**{name: x})) if y.requires_grad)

    assert torch.autograd.gradcheck(outputs, (x,), fast_mode=True)
    if (op, name) in TWICE:
        assert torch.autograd.gradgradcheck(outputs, (x,), fast_mode=True)
        return
    (dx,) = torch.autograd.grad([y.square().sum() for y in outputs(x)], x, create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients are not computed"):
        dx.sum().backward()


STATES = """
import sys, torch
sys.path.insert(0, sys.argv[1])
state, out = sys.argv[2:]
if state == "without triton":
    sys.modules["triton"] = None
from every_op import every_op, values_and_gradients

def all_results():
    return [values_and_gradients(call) for call in every_op().values()]

if state == "other defaults":
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    with torch.inference_mode():
        for call in every_op().values():
            call()
    first = all_results()
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("cpu")
    torch.save(first, out + ".first")
torch.save(all_results(), out)
"""


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="of the CPU's own implementations")
def test_defaults_of_the_process_and_a_missing_triton_change_nothing(tmp_path):
    """No result may have the default dtype or device where the tensors have others, and no cache may keep them."""
    for state in ("as usual", "other defaults", "without triton"):
        command = [sys.executable, "-c", STATES, str(ROOT / "tests"), state, str(tmp_path / state)]
        subprocess.run(command, cwd=ROOT, check=True)
    truth = torch.load(tmp_path / "as usual")
    for name in ("other defaults.first", "other defaults", "without triton"):
        for op, actual, expected in zip(OPS, torch.load(tmp_path / name), truth, strict=True):
            for y, right in zip(actual, expected, strict=True):
                assert torch.equal(y, right), f"{op}, {name}"
