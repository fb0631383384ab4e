"""What every public op promises: devices, shapes without data, the derivatives there are, no dependence on defaults."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, INTERPRETED
from every_op import every_op, results

ROOT = Path(__file__).parent.parent
OPS = list(every_op())


@pytest.mark.parametrize(
    "op, tensor", [(op, tensor) for op, call in every_op().items() for tensor in call.tensors if len(call.tensors) > 1]
)
def test_a_tensor_on_another_device_is_named(op, tensor):
    call = every_op()[op]
    name = tensor.replace("_", ".") if op == "conv_block" else tensor
    with pytest.raises(ValueError, match=rf"{op}: device of ({name} is meta, expected cpu|.* is cpu, expected meta)"):
        call(**{tensor: call.tensors[tensor].to("meta")})


@pytest.mark.parametrize("op", OPS)
def test_meta_tensors_give_shapes(op):
    call = every_op()[op]
    truth, found = results(call()), results(call(**{name: x.to("meta") for name, x in call.tensors.items()}))
    assert [(y.shape, y.dtype) for y in found] == [(y.shape, y.dtype) for y in truth]
    assert all(y.is_meta for y in found)


DIFFERENTIABLE = [(op, name) for op, call in every_op().items() for name in call.differentiable]
# Of these a gradient is made of ops that have gradients again.
TWICE = {
    *(("grouped_gemm", name) for name in ("a", "b", "bias")),
    *(("grouped_gemm_dw", name) for name in ("a", "dy")),
    *(("embed_patches", name) for name in ("patches", "weight", "bias")),
}


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


STRANGE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from every_op import every_op, values_and_gradients

if sys.argv[3] == "strange":
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    with torch.inference_mode():
        for call in every_op().values():
            call()
    first = [values_and_gradients(call) for call in every_op().values()]
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("cpu")
    torch.save(first, sys.argv[2] + ".first")
torch.save([values_and_gradients(call) for call in every_op().values()], sys.argv[2])
"""


def test_defaults_of_the_process_change_nothing_then_or_later(tmp_path):
    """A default dtype and device that are not the tensors': no result may take them, and no cache keep them."""
    for state in ("plain", "strange"):
        command = [sys.executable, "-c", STRANGE, str(ROOT / "tests"), str(tmp_path / state), state]
        subprocess.run(command, cwd=ROOT, check=True)
    plain, strange, first = (torch.load(tmp_path / name) for name in ("plain", "strange", "strange.first"))
    for op, *found in zip(OPS, plain, strange, first):
        for y, later, then in zip(*found, strict=True):
            assert torch.equal(y, then), f"{op} took a default"
            assert torch.equal(y, later), f"{op} kept a default"
