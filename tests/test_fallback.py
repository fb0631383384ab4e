"""Where a Triton kernel does not work, its op warns once and computes the same in plain torch."""

import json
import subprocess
import sys
import warnings
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TRITON, needs_triton, not_interpreted
from every_op import every_op, values_and_gradients
from other_device import computed_elsewhere
from small import small_mm1
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mm1.engine.infer.cache import Cache
from mm1.engine.infer.decode import step_of
from mm1.engine.infer.graphs import Graphs
from mm1.engine.infer.sampling import GREEDY
from mm1.engine.layers.blocked import Head
from mm1.kernels import fallback
from mm1.kernels.abstractor import adaptive_pool
from mm1.kernels.attention import plain
from mm1.kernels.attention.flash import flash as flash_attention
from mm1.kernels.dispatch import launch
from mm1.kernels.fallback import guarded, plain_calls, plain_ops, remember, remembered, watching
from mm1.kernels.moe.quantized import linear_8, moe_mlp_8
from mm1.kernels.patches import Grids, patch_embed
from mm1.kernels.tuning import pinned


class Kernel:
    """Stand for a Triton kernel of which each launch does what `act` says."""

    def __init__(self, act):
        self.act, self.launches = act, 0

    def fn(self): ...  # whose name is the kernel's

    def __getitem__(self, grid):
        def run(**arguments):
            self.launches += 1
            self.act()

        return run


def failing(error):
    def act():
        raise error

    return Kernel(act)


OUT_OF_RESOURCES = RuntimeError("out of resource: shared memory, Required: 240000, Hardware limit: 101376")


@pytest.fixture(autouse=True)
def user(monkeypatch, tmp_path):
    """Give each test a user's settings and an empty cache."""
    monkeypatch.delenv("MM1_STRICT", raising=False)
    monkeypatch.setenv("MM1_CACHE", str(tmp_path))
    monkeypatch.setattr(fallback._State, "warned", set())
    fallback._update(failed=None)
    yield
    fallback._update(failed=None)


made = []


def doubling(kernel, backward=None):
    """Return a custom op of a new name, y = 2x, whose forward and backward launch the kernels."""

    def body_of(kernel, factor):
        def body(x: Tensor) -> Tensor:
            launch(kernel, 1, x_ptr=x)
            return factor * x

        return body

    made.append(f"toy{len(made)}")
    names = made[-1], f"{made[-1]}_backward"
    # The kernels' results are wrong on purpose, to tell them from those of plain torch.
    ops = [
        torch.library.custom_op(f"mm1_test::{name}", guarded(name, body_of(k, 3), lambda x: 2 * x), mutates_args=())
        for name, k in zip(names, (kernel, backward or kernel))
    ]
    for op in ops:
        op.register_fake(torch.empty_like)
    ops[0].register_autograd(lambda ctx, dy: ops[1](dy))
    return ops[0], names[0]


@contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_an_op_whose_kernel_fails_warns_once_and_is_right():
    kernel = failing(OUT_OF_RESOURCES)
    op, name = doubling(kernel)
    x = torch.tensor([1.0, 5.0], requires_grad=True)
    with pytest.warns(RuntimeWarning) as warned:
        y = op(x)
    (warning,) = {str(w.message) for w in warned}
    for part in (name, "float32", "fn", "out of resource: shared memory", "mm1 doctor --gpu", "MM1_STRICT=1"):
        assert part in warning
    assert "\n" not in warning
    assert y.tolist() == [2, 10]
    with pytest.warns(RuntimeWarning, match=f"{name}_backward"):
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == [2, 2]
    launches = kernel.launches
    with no_warning():
        assert op(x).tolist() == [2, 10]
    assert kernel.launches == launches  # the kernel is not compiled again
    with pytest.warns(RuntimeWarning, match="float64"):
        op(x.double())  # other dtypes have other machine code, and are tried


def test_forward_and_backward_fail_each_for_itself():
    x = torch.ones(1, requires_grad=True)
    with pytest.warns(RuntimeWarning):
        (y := doubling(failing(OUT_OF_RESOURCES), Kernel(lambda: None))[0](x)).backward()
    assert (y.item(), x.grad.item()) == (2, 3)


def test_compiled_code_falls_back():
    op, _ = doubling(failing(OUT_OF_RESOURCES))
    compiled = torch.compile(lambda x: op(x) + 1, backend="aot_eager", fullgraph=True)
    with pytest.warns(RuntimeWarning):
        assert compiled(torch.ones(3)).tolist() == [3, 3, 3]
    assert compiled(torch.ones(3)).tolist() == [3, 3, 3]


def test_ops_that_run_in_plain_torch_are_counted():
    op, _ = doubling(failing(OUT_OF_RESOURCES))
    before = plain_calls()
    with pytest.warns(RuntimeWarning):
        op(torch.ones(1))
    op(torch.ones(1))
    doubling(Kernel(lambda: None))[0](torch.ones(1))
    assert plain_calls() == before + 2


@not_interpreted
def test_errors_of_tritons_compiler_are_recovered_from():
    triton = pytest.importorskip("triton")
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    source = "def kernel():\n    x = y\n"
    for error, line in (
        (CompilationError(source, None, "y is not defined"), "CompilationError: def kernel"),
        (CompilationError(source, compile(source, "", "exec", 1024).body[0].body[0], "y is unknown"), "y is unknown"),
        (OutOfResources(240000, 101376, "shared memory"), "Required: 240000"),
        (PTXASError("ptxas fatal: sm_100 is unknown"), "sm_100 is unknown"),
        (RuntimeError("Triton Error [CUDA]: no kernel image is available for execution"), "no kernel image"),
        (AssertionError("layout"), "layout"),
    ):
        with pytest.warns(RuntimeWarning, match=line):
            assert doubling(failing(error))[0](torch.ones(1)).item() == 2
    assert triton


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Triton Error [CUDA]: out of memory"), MemoryError()],
)
def test_too_little_memory_is_raised(error):
    with pytest.raises(type(error)):
        doubling(failing(error))[0](torch.ones(1))


def test_the_kernels_error_is_shown_where_plain_torch_refuses_the_input():
    def body(x: Tensor) -> Tensor:
        launch(failing(OUT_OF_RESOURCES), 1, x_ptr=x)
        return x

    def plain(x: Tensor) -> Tensor:
        raise fallback.Unsupported("toy: patches of image 0 is 3, expected 4")

    op = guarded("refused", body, plain)
    with pytest.warns(RuntimeWarning), pytest.raises(fallback.KernelError, match="shared memory"):
        op(torch.ones(1))
    with pytest.raises(ValueError, match="expected 4"):  # the warning has named the kernel's error
        op(torch.ones(1))


@not_interpreted
def test_images_that_are_cut_off_are_refused_in_one_line():
    few = [torch.tensor([number]) for number in (0, 3, 2, 2)]  # three patches of 2 × 2
    grids = Grids.of_tensors(*few, 4)
    weight = torch.zeros(8, 12)
    for call in (
        lambda: adaptive_pool(torch.zeros(4, 8), grids, (2, 2)),
        lambda: patch_embed(torch.zeros(16, 3), grids, weight, patch_size=2),
    ):
        with pytest.raises(ValueError, match="patches of image 0 is 3, expected 4"):
            call()


def test_errors_outside_of_launches_are_raised():
    def body(x: Tensor) -> Tensor:
        raise ValueError("a fault of the code")

    with pytest.raises(ValueError, match="a fault of the code"):
        guarded("toy", body, torch.clone)(torch.ones(1))


def test_a_gpu_that_fails_every_call_is_not_recovered_from(monkeypatch):
    def dead(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert fallback.recoverable(OUT_OF_RESOURCES, cuda)
    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    assert not fallback.recoverable(OUT_OF_RESOURCES, cuda)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: pytest.fail("would end the capture"))
    assert not fallback.recoverable(OUT_OF_RESOURCES, cuda)


def test_strict_raises_the_error_itself(monkeypatch):
    op, name = doubling(failing(OUT_OF_RESOURCES))
    remember("cpu", {(name, "float32"): "y by 3"})
    monkeypatch.setenv("MM1_STRICT", "1")
    with pytest.raises(RuntimeError) as raised:
        op(torch.ones(1))
    assert raised.value is OUT_OF_RESOURCES
    monkeypatch.setenv("MM1_STRICT", "0")
    with pytest.warns(RuntimeWarning):
        op(torch.ones(1))


def test_a_pinned_configuration_that_fails_is_an_error():
    op, _ = doubling(failing(OUT_OF_RESOURCES))
    with pinned(toy="a configuration"), pytest.raises(RuntimeError) as raised:
        op(torch.ones(1))
    assert raised.value is OUT_OF_RESOURCES


@not_interpreted
@pytest.mark.filterwarnings("ignore:mm1 computes:RuntimeWarning")
@torch.inference_mode()
def test_a_decoding_step_with_ops_in_plain_torch_is_not_captured(monkeypatch):
    """They read sizes on the host; the step runs as it is, with the same results."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: stream)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: pytest.fail("captured"))
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    op, _ = doubling(failing(OUT_OF_RESOURCES))
    decoder = small_mm1().eval().decoder
    original = decoder.embedding.forward
    decoder.embedding.forward = lambda tokens: op(original(tokens)) / 2
    caches = [Cache(decoder.config, 9, torch.device("cpu"), torch.float32) for _ in range(2)]
    for cache in caches:
        cache.k.zero_()
        cache.v.zero_()
    graphs, truth = Graphs(decoder, Head(decoder), caches[0], 4), step_of(decoder, Head(decoder), caches[1])
    assert truth
    for tokens in ([9, 5, 7], [4, 9, 8]):
        arguments = tokens, [0] * 3, [np.array([page], np.int32) for page in (1, 2, 3)]
        logits, best, _ = graphs(*arguments, [GREEDY] * 3)
        expected, expected_best, _ = truth(*arguments)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        assert best == expected_best


# ---- What first contact found ----


def test_what_was_found_wrong_is_not_used_again():
    op, name = doubling(Kernel(lambda: None))
    assert op(torch.ones(1)).item() == 3
    remember("cpu", {(name, "float32"): "y by 0.3"})
    with pytest.warns(RuntimeWarning, match=f"{name}.*y by 0.3"):
        assert op(torch.ones(1)).item() == 2
    with no_warning():
        assert op(torch.ones(1)).item() == 2
        assert op(torch.ones(1).double()).item() == 3
    remember("cpu", {})
    assert op(torch.ones(1)).item() == 3


@pytest.mark.parametrize("field", ["gpu", "versions", "op", "dtypes"])
def test_another_gpu_version_source_or_op_is_not_affected(field):
    op, name = doubling(Kernel(lambda: None))
    remember("cpu", {(name, "float32"): "y by 0.3"})
    (row,) = json.loads(fallback.memory().read_text())
    fallback.memory().write_text(json.dumps([row | {field: row[field] + "0"}]))
    fallback._update(failed=None)
    with no_warning():
        assert op(torch.ones(1)).item() == 3


def test_versions_name_torch_triton_and_the_source():
    assert f"torch {torch.__version__}" in fallback.versions()
    assert "kernels " in fallback.versions()
    assert "triton" in fallback.versions() or not TRITON


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", '[{"gpu": "cpu"}]', "\0", "[[]]", "null"])
def test_a_damaged_file_is_ignored_and_replaced(text):
    op, name = doubling(Kernel(lambda: None))
    fallback.memory().write_text(text)
    with no_warning():
        assert op(torch.ones(1)).item() == 3
    remember("cpu", {(name, "float32"): "y by 0.3"})
    assert list(remembered()) == [("cpu", name, "float32")]


def test_a_folder_that_cannot_be_read_is_ignored(monkeypatch):
    monkeypatch.setenv("MM1_CACHE", "/dev/null")
    assert remembered() == {}


def test_an_op_of_integers_alone_says_so():
    op, name = doubling(failing(OUT_OF_RESOURCES))
    with pytest.warns(RuntimeWarning, match=rf"{name} \(integers\)"):
        op(torch.ones(1, dtype=torch.int32))


def test_a_run_without_time_for_all_checks_keeps_what_others_found():
    remember("A", {("route", "float32"): "y by 1", ("flash", "float32"): "y by 2"})
    remember("A", {("flash", "float32"): "y by 3"}, complete=False)
    assert remembered() == {("A", "route", "float32"): "y by 1", ("A", "flash", "float32"): "y by 3"}
    assert len(json.loads(fallback.memory().read_text())) == 2


def test_what_was_found_with_other_versions_is_kept_for_them(monkeypatch):
    monkeypatch.setattr(fallback, "versions", lambda: "old")
    remember("A", {("route", "float32"): "y by 1"})
    monkeypatch.setattr(fallback, "versions", lambda: "new")
    remember("A", {})
    assert remembered() == {}
    monkeypatch.setattr(fallback, "versions", lambda: "old")
    assert remembered() == {("A", "route", "float32"): "y by 1"}


def test_gpus_of_other_kinds_are_kept_in_the_file():
    remember("A", {("route", "float32"): "y by 1"})
    remember("B", {("route", "float32"): "y by 2"})
    remember("A", {("route", "bfloat16"): "y by 3"})
    assert remembered() == {("B", "route", "float32"): "y by 2", ("A", "route", "bfloat16"): "y by 3"}


@not_interpreted
def test_another_process_reads_it(tmp_path):
    remember("cpu", {("toy", "float32"): "y by 0.3"})
    code = (
        "import torch, warnings\nfrom mm1.kernels.fallback import guarded\nwarnings.simplefilter('error')\n"
        "try: guarded('toy', torch.clone, torch.neg)(torch.ones(1))\nexcept RuntimeWarning as w: print(w)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "y by 0.3" in result.stdout


# ---- The implementations in plain torch ----

CALLS = every_op()


def flash_call(q, k, v, cu_q, cu_k, used_k, prefix, causal):
    return flash_attention(q, k, v, cu_q, cu_k, used_k, prefix, causal)


class Ops(TorchDispatchMode):
    """Record the ops of this project that run in the block, with their arguments and results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
        result = func(*args, **(kwargs or {}))
        if func.namespace == "mm1":
            self.calls.append((func.overloadpacket.__name__, tuple(copies), result))
        return result


def close(actual, expected):
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        scale = float(b.detach().abs().max()) if b.is_floating_point() and b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * scale)


@not_interpreted
@pytest.mark.parametrize("op", CALLS)
def test_plain_ops_compute_on_the_device_of_their_tensors(op):
    """Their results are those of a CPU's implementation."""
    with Ops() as ops:
        values_and_gradients(CALLS[op])
    assert [name for name, *_ in ops.calls if name in fallback.PLAIN] or op == "attention"
    for name, arguments, result in ops.calls:
        if name in fallback.PLAIN:
            close(computed_elsewhere(fallback.PLAIN[name], arguments), result)


def segments(width=16):
    """Return arguments of flash: a segment with a prefix, one without keys, one with more queries than keys."""
    q, k, v = (torch.randn(n, heads, width) for n, heads in ((14, 4), (12, 2), (12, 2)))
    cu_q, cu_k, used = ([0, 5, 7, 13], [0, 6, 6, 11], [6, 0, 4])
    return q, k, v, *(torch.tensor(x, dtype=torch.int32) for x in (cu_q, cu_k, used)), None, False


@not_interpreted
@pytest.mark.parametrize("mask", ["full", "causal", "prefix"])
@pytest.mark.parametrize("part", [plain.PART, 60])
def test_plain_attention_of_a_gpu(mask, part, monkeypatch):
    from mm1.kernels.attention.masks import Causal, Full, Prefix
    from mm1.kernels.attention.reference import attention

    monkeypatch.setattr(plain, "PART", part)
    q, k, v, cu_q, cu_k, used, *_ = segments()
    prefix = torch.tensor([0, 3, 2], dtype=torch.int32) if mask == "prefix" else None
    arguments = cu_q, cu_k, used, prefix, mask != "full"
    y, lse = computed_elsewhere(plain.forward, (q, k, v, *arguments))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    masks = {"full": Full(), "causal": Causal(), "prefix": Prefix(prefix) if prefix is not None else None}
    truth = attention(q, k, v, cu_q, mask=masks[mask], cu_seqlens_k=cu_k, used_k=used)
    close(y, truth.detach())
    assert torch.equal((lse == float("inf")).all(0), (truth == 0).all(2).all(1))  # rows that see nothing
    dy = torch.randn_like(y)
    gradients = computed_elsewhere(plain.backward, (dy, *(x.detach() for x in (q, k, v)), y, lse, *arguments))
    close(gradients, torch.autograd.grad(truth, (q, k, v), dy))


class LargestWide(TorchDispatchMode):
    """Record the number of elements of the largest fp32 tensor that an op in the block returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        wide = [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor) and t.dtype == torch.float32]
        self.elements = max(self.elements, *wide, 0)
        return result


def test_plain_attention_converts_and_repeats_the_rows_of_a_segment_at_a_time():
    segments, rows, heads, width = 16, 8, 8, 64
    cu = torch.arange(segments + 1, dtype=torch.int32) * rows
    q, k, v, dy = (torch.randn(segments * rows, n, width).bfloat16() for n in (heads, 1, 1, heads))
    arguments = cu, cu, None, None, True
    with LargestWide() as forward:
        y, lse = plain.forward(q, k, v, *arguments)
    assert forward.elements == rows * heads * width
    with LargestWide() as backward:
        plain.backward(dy, q, k, v, y, lse, *arguments)
    assert backward.elements == segments * rows * width  # dk and dv are sums over the heads of a group


def test_plain_paged_attention_gathers_the_pages_that_a_segment_has():
    lengths, page = [4 * 64, *[3] * 15], 4
    k, v = (torch.randn(4 * 64, page, 2, 16) for _ in range(2))
    tables = torch.arange(16 * 64, dtype=torch.int32).view(16, 64) % len(k)
    cu_q = torch.arange(17, dtype=torch.int32)
    with LargestWide() as seen:
        y = plain.paged(torch.randn(16, 2, 16), k, v, cu_q, tables, torch.tensor(lengths, dtype=torch.int32), 1)
    assert seen.elements == 4 * 64 * 2 * 16
    assert y.isfinite().all()


@pytest.mark.parametrize("lengths", [[], [0], [1], [5, 0, 8, 3]])
def test_plain_paged_attention_of_a_gpu(lengths):
    """Segments with fewer keys than new rows, without keys, and rows after the last segment, which are zeros."""
    cu_q = torch.tensor([0, 2, 3, 6, 8][: len(lengths) + 1], dtype=torch.int32)
    tables = torch.randperm(12).int().view(4, 3)[: len(lengths)]
    q, k, v = torch.randn(9, 4, 16), *(torch.randn(12, 4, 2, 16) for _ in range(2))
    y = computed_elsewhere(plain.paged, (q, k, v, cu_q, tables, torch.tensor(lengths, dtype=torch.int32), 3))
    for b, length in enumerate(lengths):
        for row in range(int(cu_q[b]), int(cu_q[b + 1])):
            count = max(length - int(cu_q[b + 1] - row) + 1, 0)  # of keys that it sees
            keys, values = (x[tables[b].long()].flatten(0, 1)[:count].double().repeat_interleave(2, 1) for x in (k, v))
            p = torch.einsum("hd,khd->hk", q[row].double(), keys).div(4).softmax(-1)
            torch.testing.assert_close(y[row], torch.einsum("hk,khd->hd", p, values).float(), rtol=1e-4, atol=1e-5)
    assert not y[int(cu_q[-1]) :].any()


@not_interpreted
def test_plain_paged_attention_ignores_entries_past_the_keys():
    call = CALLS["paged_attention"]
    lengths = torch.tensor([7, 3], dtype=torch.int32)
    tensors = call.tensors | {"lengths": lengths, "tables": torch.tensor([[3, 1, -7], [0, 1 << 20, 9]]).int()}
    y = plain.paged(*(tensors[name] for name in ("q", "k", "v", "cu_q", "tables", "lengths")), 2)
    close(y, call(lengths=lengths))


@not_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_ops_of_8_bit_weights(dtype):
    x, w, scale = torch.randn(5, 16).to(dtype), torch.randint(-128, 128, (8, 16), dtype=torch.int8), torch.rand(8)
    y = computed_elsewhere(fallback.PLAIN["linear_8"], (x, w, scale))
    torch.testing.assert_close(y, linear_8(x, w, scale), rtol=0.02, atol=1.0)
    index = torch.tensor([[0, 1], [1, -1], [2, 0]], dtype=torch.int32)
    up, down = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((2, 24, 16), (2, 16, 12)))
    scales = torch.rand(2, 24) / 500, torch.rand(2, 16) / 500
    arguments = x[:3], index, torch.rand(3, 2), up, scales[0], down, scales[1]
    y = computed_elsewhere(fallback.PLAIN["moe_mlp_8"], arguments)
    torch.testing.assert_close(y, moe_mlp_8(*arguments), rtol=0.05, atol=0.02)


@needs_triton
@pytest.mark.parametrize("op", [op for op in CALLS if op != "attention"])  # which takes another backend on a CPU
def test_kernels_and_plain_ops_give_each_other_their_saved_tensors(op):
    """Forward may run by kernels and backward in plain torch, or the reverse."""
    names = []
    with watching(lambda name, dtypes: names.append(name)):
        expected = values_and_gradients(CALLS[op])
    assert names
    before = plain_calls()
    backward = [name for name in names if name.endswith("backward") or "_dw" in name]
    for some in filter(None, ({*backward}, {*names} - {*backward})):
        with plain_ops(*some):
            close(values_and_gradients(CALLS[op]), expected)
    assert plain_calls() > before


@needs_triton
@pytest.mark.parametrize("names", [("flash",), ("flash_backward",), ("flash", "flash_backward")])
def test_flash_and_plain_attention_give_each_other_their_saved_tensors(names):
    q, k, v, *offsets = segments()
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def call():
        y = flash_attention(*leaves, *offsets)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.cos(y.detach()))]

    expected = call()
    with plain_ops(*names):
        close(call(), expected)


@needs_triton
def test_few_tokens_in_plain_torch():
    with torch.no_grad():
        expected = CALLS["moe_mlp"]()
        with plain_ops("moe_mlp_few"):
            close(CALLS["moe_mlp"](), expected)
