"""Test decoders and products with weights of fewer bits: products are exact, rounding errors bounded."""

import sys
from functools import partial

import pytest
import torch
from conftest import DEVICE, INTERPRETED, TRITON, compiles, mostly_slow, needs_triton, not_interpreted, relative_error
from small import small_mm1
from torch import nn

from mm1.autotune import static
from mm1.engine.layers import quantize
from mm1.engine.layers.quantize import Experts8, Linear4, Linear8, quantized, rounded
from mm1.errors import UserError
from mm1.kernels.dispatch import DEVICES, recording
from mm1.kernels.moe import few_tokens, reference
from mm1.kernels.moe import quantized as products
from mm1.kernels.moe.quantized import linear_8, moe_mlp_8

pytest.importorskip("torchao")
pytestmark = pytest.mark.usefixtures("small_tiles")
FP16, FP32, BF16, INT8, FLOAT8 = torch.float16, torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn
# A CPU multiplies in bf16, Triton in the dtype of x; its interpreter multiplies bf16 incorrectly.
TOLERANCE = {FP32: 1e-6, FP16: 8e-4} if TRITON else {FP32: 4e-3}
TOLERANCE |= {} if INTERPRETED else {BF16: 6e-3}
NARROW = [INT8, FLOAT8] if TRITON else [INT8]


def narrow(*shape, dtype=INT8):
    """Return a random weight and its scale, which differs from row to row."""
    weight = torch.randint(-128, 128, shape).to(dtype) if dtype == INT8 else (50 * torch.randn(shape)).to(dtype)
    return weight.to(DEVICE), (torch.rand(shape[:-1]) / 100 + 1e-3).to(DEVICE)


def wide(weight, scale):
    return weight.double() * scale.double()[..., None]


@pytest.mark.parametrize("rows", [0, 1, 9, 20, 70])
@pytest.mark.parametrize("shape", [(48, 32), (37, 45)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", NARROW, ids=str)
def test_a_product_is_that_of_the_wide_weight(rows, shape, dtype, kind, monkeypatch):
    monkeypatch.setattr(products, "CONVERTED", 300)  # some rows at once, not all
    weight, scale = narrow(*shape, dtype=kind)
    x = torch.randn(2 * shape[1], rows).to(DEVICE, dtype).T[:, ::2]
    y = linear_8(x, weight, scale)
    assert y.dtype == dtype
    assert relative_error(y, x.double() @ wide(weight, scale).T) < TOLERANCE[dtype]


def mixture(T, E, K, D=32, width=24, kind=INT8, dtype=FP32):
    index = torch.rand(T, E).topk(K).indices.int()
    inputs = torch.randn(T, D).to(DEVICE, dtype), index.to(DEVICE), (torch.rand(T, K) + 0.1).to(DEVICE)
    return *inputs, *narrow(E, 2 * width, D, dtype=kind), *narrow(E, D, width, dtype=kind)


MIXTURES = {
    "one token": (1, 6, 2),
    "more slots than experts": (9, 3, 2),
    "more than 16 an expert": (19, 2, 1),
    "a prompt": (70, 3, 2),
}


@pytest.mark.parametrize("sizes", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", NARROW, ids=str)
def test_a_mixture_is_that_of_the_wide_weights(sizes, dtype, kind):
    x, index, weight, gate_up, gate_up_scale, down, down_scale = mixture(*sizes, kind=kind, dtype=dtype)
    index[0, 0] = -1
    index[-1, -1] = sizes[1]  # of no expert
    y = moe_mlp_8(x, index, weight, gate_up, gate_up_scale, down, down_scale)
    truth = reference.moe_mlp(x.double(), index, weight, wide(gate_up, gate_up_scale), wide(down, down_scale))
    assert y.dtype == dtype
    assert relative_error(y, truth) < 3 * TOLERANCE[dtype]


@needs_triton
def test_few_tokens_read_narrow_weights_alone(monkeypatch):
    def refuse(*_):
        raise AssertionError("a weight was made wide")

    monkeypatch.setattr(products, "dequantized", refuse)
    x = torch.randn(65, 16).to(DEVICE)
    linear_8(x[1:], *narrow(16, 16))
    moe_mlp_8(*mixture(16, 2, 2))
    for call in (
        lambda: linear_8(x, *narrow(16, 16)),
        lambda: moe_mlp_8(*mixture(17, 2, 2)),
    ):
        with pytest.raises(AssertionError, match="made wide"):
            call()


def test_operators_keep_their_contracts():
    checks = ("test_schema", "test_faketensor")
    linear, moe = torch.ops.mm1.linear_8.default, torch.ops.mm1.moe_mlp_8.default
    torch.library.opcheck(linear, (torch.randn(3, 32).to(DEVICE), *narrow(16, 32)), test_utils=checks)
    torch.library.opcheck(moe, mixture(3, 4, 2), test_utils=checks)


@not_interpreted
def test_arguments_that_do_not_fit_are_told():
    x, weight, scale = torch.randn(3, 32), *(t.cpu() for t in narrow(16, 32))
    for inputs, message in (
        ((x[0], weight, scale), r"x is \(32,\), expected \[T, K\]"),
        ((x[:, 1:], weight, scale), r"weight is \(16, 32\), expected \(16, 31\), contiguous"),
        ((x, weight.float(), scale), "dtype of weight is torch.float32"),
        ((x, weight.to(FLOAT8), scale), "dtype of weight is torch.float8_e4m3fn"),
        ((x, weight, scale.double()), "scale of weight is torch.float64"),
        ((x, narrow(32, 16)[0].T, scale), r"weight is \(16, 32\), expected \(16, 32\), contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_8(*inputs)
    x, index, *rest = (t.cpu() for t in mixture(3, 4, 2))
    for inputs, message in (
        ((x[:, 1:], index, *rest), r"x is \(3, 31\), expected \[T, 32\]"),
        ((x, index[1:], *rest), r"index is \(2, 2\)"),
        ((x, index, rest[0][:, 1:], *rest[1:]), r"weight is \(3, 1\), expected \(3, 2\)"),
        ((x, index, rest[0], rest[1][:, 1:], *rest[2:]), r"gate_up is \(4, 47, 32\), expected \(4, 48, 32\)"),
        ((x, index, *rest[:3], rest[3], rest[4][:, 1:]), r"scale of down"),
    ):
        with pytest.raises(ValueError, match=message):
            moe_mlp_8(*inputs)


def call(name, kind):
    D, F, E, K = (4096, 14336, 8, 2) if "coarse" in name else (2048, 768, 128, 8)
    new = partial(torch.empty, device="meta", dtype=BF16)
    if "linear" in name:
        T, N, D = (1, 2048, 8192) if name == "a linear" else (64, 8192, 2048)
        return products._linear(new(T, D), new(N, D, dtype=kind), new(N, dtype=FP32))
    T = 1 if "coarse" in name else 16
    gate_up, down = (new(E, 2 * F, D, dtype=kind), new(E, 2 * F, dtype=FP32)), (new(E, D, F, dtype=kind), new(E, D))
    return products._moe(new(T, D), new(T, K, dtype=torch.int32), new(T, K, dtype=FP32), *gate_up, down[0],
                         down[1].float())  # fmt: skip


@compiles
@pytest.mark.parametrize("device", mostly_slow("h200", "a100", "b200", "rtx5090", "mi300x"))
@pytest.mark.parametrize("kind", [INT8, FLOAT8], ids=str)
def test_its_code_fits_every_gpu(kind, device):
    if kind == FLOAT8 and device == "a100":
        pytest.skip("has no float8, and is refused")
    with recording(DEVICES[device]) as launches:
        for name in ("coarse experts", "fine experts", "a linear", "a linear of many rows"):
            call(name, kind)
    launches = [launch for launch in launches if launch.kernel is few_tokens._few_kernel]
    assert len(launches) == 6
    for launch in launches:
        code = static.compile_launch(launch, DEVICES[device])
        assert code.spills == 0, code
        assert code.matrix, code
        assert code.shared <= DEVICES[device].shared, code
        assert bool(code.instructions["UTMALDG"]) == DEVICES[device].tma, code


# --- decoders ---


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(quantize, "MIN_NUMBERS", 1)


def decoder_of(**settings):
    """Return a decoder with widths that int4 supports and, in the down projection, one that it does not."""
    return small_mm1(seed=3, **settings).eval().decoder


def weight_of(module):
    """Return the rounded weight of a module, [..., N, K]."""
    if isinstance(module, Linear8):
        return wide(module.weight, module.scale)
    return module(torch.eye(module.weight.shape[1])).T


@torch.no_grad()
def widened(decoder, twin, head):
    """Copy the rounded weights into an ordinary decoder; return it and its head."""
    for own, other in zip(decoder.blocks.modules(), twin.blocks.modules()):
        if isinstance(other, Linear8 | Linear4):
            own.weight.copy_(weight_of(other))
        elif isinstance(other, Experts8):
            own.gate_up.copy_(wide(other.gate_up, other.gate_up_scale))
            own.down.copy_(wide(other.down, other.down_scale))
    weight = weight_of(head).float()
    return decoder, lambda x: x @ weight.T


@torch.no_grad()
def logits(decoder, head, ids, embedding):
    x, cu_seqlens = embedding(ids), torch.tensor([0, len(ids)], dtype=torch.int32)
    return head(decoder(x, torch.arange(len(ids)), cu_seqlens)[0])


# All experts are chosen, so that no choice depends on rounding.
KINDS = {
    "dense": {"experts": 0},
    "mixture": {"experts": 4, "experts_per_token": 4},
    "untied": {"experts": 0, "tied": False},
}
modules = [pytest.param(s, id=name) for name, s in KINDS.items()]


@not_interpreted
@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("settings", modules)
@pytest.mark.parametrize("how, error", [("int8", 0.05), ("int4", 0.35)])
def test_logits_are_those_of_the_rounded_weights(settings, how, error, rows):
    decoder, ids = decoder_of(**settings), torch.randint(4, 384, (rows,))
    twin, head = quantized(decoder, how)
    actual = logits(twin, head, ids, decoder.embedding)
    plain = logits(decoder, lambda x: x @ decoder.head_weight.T, ids, decoder.embedding)
    truth = logits(*widened(decoder_of(**settings), twin, head), ids, decoder.embedding)
    assert actual.dtype == torch.float32
    assert relative_error(actual, truth) < 1.2e-2  # products of bf16
    assert 3e-3 < relative_error(actual, plain) < error


@not_interpreted
@pytest.mark.parametrize("settings", modules)
def test_without_units_of_bf16_they_are_so_to_the_last_digits(settings, monkeypatch):
    monkeypatch.setattr(products, "FEW_ROWS_CPU", 0)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    decoder, ids = decoder_of(**settings), torch.randint(4, 384, (20,))
    twin, head = quantized(decoder, "int8")
    truth = logits(*widened(decoder_of(**settings), twin, head), ids, decoder.embedding)
    assert relative_error(logits(twin, head, ids, decoder.embedding), truth) < 1e-6


@not_interpreted
@pytest.mark.parametrize("how", ["int8", "int4"])
def test_every_weight_is_rounded_to_the_nearest(how):
    """An error is at most half a step: 1/255 of a row's range around zero for int8, 1/15 of 32 neighbours' for int4."""
    decoder = decoder_of(experts=0)
    twin, _ = quantized(decoder, how)
    for name, child in decoder.blocks.named_modules():
        if not isinstance(child, nn.Linear):
            continue
        new = twin.blocks.get_submodule(name)
        plain = child.weight.detach().double()
        if isinstance(new, Linear8):
            step = plain.abs().amax(1, keepdim=True) * 2 / 255
        else:
            assert how == "int4"
            groups = plain.unflatten(1, (-1, 32))
            step = (groups.amax(2) - groups.amin(2)).repeat_interleave(32, 1) / 15
        # A row's largest value may lose half a step; scales and zeros of int4 are bf16.
        assert ((weight_of(new) - plain).abs() <= step * (0.51 if isinstance(new, Linear8) else 0.6)).all(), name


@not_interpreted
@pytest.mark.parametrize("how", ["int8", "float8"])
def test_experts_are_rounded_one_by_one(how):
    weight = torch.randn(3, 8, 32) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    data, scale = rounded(weight, how)
    assert data.dtype == (INT8 if how == "int8" else FLOAT8)
    assert data.is_contiguous()
    assert scale.shape == (3, 8)
    step = weight.abs().amax(2, keepdim=True) * (1 / 255 if how == "int8" else 1 / 16)
    assert ((wide(data, scale) - weight).abs() <= 1.01 * step).all()


@not_interpreted
def test_int4_takes_what_divides_and_the_rest_is_int8():
    twin, head = quantized(decoder_of(experts=4), "int4")
    kinds = {name: type(m) for name, m in twin.blocks.named_modules() if isinstance(m, Linear4 | Linear8 | Experts8)}
    assert kinds == {
        "0.attention.qkv": Linear4, "0.attention.out": Linear4, "1.attention.qkv": Linear4, "1.attention.out": Linear4,
        "0.mlp.gate": Linear8, "0.mlp.up": Linear8, "0.mlp.down": Linear8, "1.mlp": Experts8,
    }  # fmt: skip
    assert type(head) is Linear8
    assert twin.blocks[0].attention.qkv(torch.randn(3, 32)).dtype == torch.float32
    assert [quantize._linear(torch.randn(16, width), "int4").weight.block_size for width in (128, 192, 96)] == [
        [1, 128], [1, 64], [1, 32],
    ]  # fmt: skip


@not_interpreted
@pytest.mark.parametrize("tied", [True, False])
def test_the_original_is_as_it_was_and_what_stays_is_shared(tied):
    decoder = decoder_of(experts=4, tied=tied)
    before = {name: x.clone() for name, x in decoder.state_dict().items()}
    twin, _ = quantized(decoder, "int8")
    after = decoder.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], x) for name, x in before.items())
    shared = {id(x) for x in decoder.parameters()}
    stays = {name for name, x in twin.named_parameters() if id(x) in shared}
    assert stays == {name for name, _ in twin.named_parameters()}
    assert stays == {name for name in before if "norm" in name or "router" in name or "embedding" in name}


@not_interpreted
def test_wide_weights_alone_are_rounded(monkeypatch):
    monkeypatch.setattr(quantize, "MIN_NUMBERS", 32 * 64)  # of qkv
    decoder = decoder_of(experts=0)
    decoder.blocks[1].attention.qkv.bias = nn.Parameter(torch.zeros(64))
    twin, _ = quantized(decoder, "int8")
    assert [name for name, m in twin.blocks.named_modules() if isinstance(m, Linear8)] == ["0.attention.qkv"]


@not_interpreted
def test_it_takes_less_memory():
    def memory(*modules):
        tensors = {id(x): x for m in modules for x in (*m.parameters(), *m.buffers())}.values()
        parts = [[getattr(x, n) for n in x.tensor_data_names] if hasattr(x, "tensor_data_names") else [x]
                 for x in tensors]  # fmt: skip
        return sum(x.nbytes for of in parts for x in of)

    decoder = decoder_of(experts=4, tied=False)
    kept = memory(decoder.embedding, decoder.norm)
    plain = memory(decoder) - kept
    eight, four = (memory(*quantized(decoder, how)) - kept for how in ("int8", "int4"))
    assert eight < 0.32 * plain  # in fp32; rows have 32 and 40 values; with norms and router
    assert four < eight


@not_interpreted
@pytest.mark.parametrize("settings", modules)
@pytest.mark.parametrize("how", ["int8", "int4"])
@torch.inference_mode()
def test_greedy_tokens_are_those_of_the_rounded_weights(settings, how):
    decoder = decoder_of(**settings)
    twin, head = quantized(decoder, how)
    truth = widened(decoder_of(**settings), twin, head)

    def written(decoder, head, embedding=decoder.embedding):
        ids = [1, 20, 30]
        for _ in range(12):
            ids.append(int(logits(decoder, head, torch.tensor(ids), embedding)[-1].argmax()))
        return ids

    assert written(twin, head) == written(*truth)


@not_interpreted
@pytest.mark.parametrize("settings", modules[:2])
@pytest.mark.parametrize("how", ["int8", "int4"])
def test_it_compiles_whole(settings, how):
    decoder, ids = decoder_of(**settings), torch.randint(4, 384, (6,))
    twin, head = quantized(decoder, how)
    truth = logits(twin, head, ids, decoder.embedding)
    torch.compiler.reset()
    whole = (torch.compile(m, fullgraph=True, backend="aot_eager") for m in (twin, head))
    assert relative_error(logits(*whole, ids, decoder.embedding), truth) < 5e-3


@not_interpreted
def test_what_it_cannot_do_is_one_line(monkeypatch):
    decoder = decoder_of(experts=4)
    with pytest.raises(UserError, match="weights are 'fp4', expected one of int8, int4, float8"):
        quantized(decoder, "fp4")
    with pytest.raises(UserError, match=r'"float8" need a GPU of compute capability 8\.9 or more, not cpu'):
        quantized(decoder, "float8")
    gpu = torch.device("cuda")
    for capability, refused in (((7, 5), ["int4", "float8"]), ((8, 6), ["float8"]), ((8, 9), []), ((12, 0), [])):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        for how in quantize.NEEDED:
            if how in refused:
                with pytest.raises(UserError, match=f'"{how}" need a GPU .* not one of {capability[0]}'):
                    quantize._check(gpu, how)
            else:
                quantize._check(gpu, how)
    for how in ("int8", "int4"):
        monkeypatch.setitem(sys.modules, "torchao.quantization", None)
        with pytest.raises(UserError, match=r"needs torchao: pip install"):
            quantized(decoder, how)
