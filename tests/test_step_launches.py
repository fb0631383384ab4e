"""Test what a training step launches for its documents and images: on tensors without values, so without a GPU."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import not_interpreted
from small import document, documents, packed, small_mm1, small_model
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from mm1.autotune.static import specialize
from mm1.bench import mix
from mm1.engine.data.batch import Batch, pack
from mm1.engine.data.document import Budget, Document
from mm1.engine.data.record import max_patches
from mm1.engine.models.mm1 import MM1
from mm1.engine.models.mm1_config import MODELS
from mm1.engine.train.config import Train
from mm1.engine.train.parallel import World
from mm1.engine.train.prepare import compile_blocks, compiled
from mm1.engine.train.state import TrainingState
from mm1.engine.train.step import run_micro_batches, sum_and_update
from mm1.kernels.dispatch import DEVICES, Launch, cdiv, recording
from mm1.kernels.tuning import pinned

pytestmark = not_interpreted
TOKENS, ROWS = 8192, 128  # ROWS: of a tile, in torch's kernels for these head widths and in ours
FULL = MODELS["mm1-1b"]
ONE_LAYER = replace(FULL, vision=replace(FULL.vision, layers=1), decoder=replace(FULL.decoder, layers=1))
MOST = max_patches(FULL.images)
BUDGET = Budget(TOKENS, 64, 64 * MOST, TOKENS // 16, MOST)


class Launches(TorchDispatchMode):
    """Record the launches of this project's kernels on an H200, and the programs of torch's forward attention."""

    def __init__(self):
        super().__init__()
        self.recorded: list[Launch] = []
        self.torchs: list[int] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if str(op) == "torch_attn._varlen_attn.default":
            q, cu_seqlens, longest = args[0], args[3], args[5]
            self.torchs.append((len(cu_seqlens) - 1) * cdiv(longest, ROWS) * q.shape[1])
        # Without values torch runs an op's fake; this runs its body. The head's reads targets on the host but on a GPU.
        if op.namespace == "mm1" and not op.name().startswith("mm1::linear_cross_entropy"):
            with recording(DEVICES["h200"]) as launches:
                OPDEFS[op.name()]._init_fn(*args, **(kwargs or {}))
            self.recorded += launches
        return op(*args, **(kwargs or {}))


def packed_into(budget: Budget, documents: Sequence[Document]) -> Batch:
    return pack(documents, budget, image_id=mix.IMAGE, patch=FULL.vision.patch, slots=FULL.connector.tokens)


@cache
def batch_of(documents: int) -> Batch:
    """Return a batch of 8192 tokens in 26 documents, packed in a budget for `documents` of them and 64 images."""
    return packed_into(replace(BUDGET, documents=documents), mix.documents(ONE_LAYER, TOKENS, seed=0))


def step_on(batch: Batch, backend: str = "triton") -> Launches:
    """Return the launches of forward and backward. backend: of attention."""
    with torch.device("meta"):
        model = MM1(ONE_LAYER).bfloat16()
    with Launches() as launches, pinned(attention=backend):
        model(batch.to("meta")).objective.backward()
    return launches


def tiles(batch: Batch) -> tuple[int, int]:
    """Return the tiles with rows of all heads, of encoder and decoder."""
    images, documents = [h * w for h, w in batch.media.grids.sizes], batch.cu_seqlens.diff().tolist()
    heads = FULL.vision.heads, FULL.decoder.heads
    return tuple(h * sum(cdiv(n, ROWS) for n in rows) for h, rows in zip(heads, (images, documents)))


def test_few_programs_of_attention_have_no_rows():
    launches = step_on(batch_of(documents=TOKENS // 16)).recorded
    vision, decoder = tiles(batch_of(documents=TOKENS // 16))
    grids = {name: [x.grid for x in launches if x.name == f"_{name}_kernel"] for name in ("forward", "dq", "dkv")}
    for first, second in (grids["forward"], grids["dq"][::-1], grids["dkv"][::-1]):
        assert vision <= first < 2 * vision
        assert decoder <= second < 2 * decoder


def test_torchs_attention_gets_the_documents_and_images_of_the_batch():
    batch = batch_of(documents=TOKENS // 16)
    lengths, images = batch.cu_seqlens.diff(), [h * w for h, w in batch.media.grids.sizes]
    assert step_on(batch, "varlen").torchs == [
        len(images) * cdiv(max(images), ROWS) * FULL.vision.heads,
        len(lengths) * cdiv(int(lengths.max()), ROWS) * FULL.decoder.heads,
    ]


def test_a_larger_budget_of_documents_launches_no_more():
    ours, theirs = (step_on(batch_of(documents)) for documents in (TOKENS // 16, 26))
    assert [launch.grid for launch in ours.recorded] == [launch.grid for launch in theirs.recorded]
    ours, theirs = (step_on(batch_of(documents), "varlen") for documents in (TOKENS // 16, 26))
    assert ours.torchs == theirs.torchs


def test_other_documents_and_images_compile_no_kernel_again():
    """Triton would compile a kernel again where a count is 1 or a multiple of 16 for the first time."""
    docs, budget = mix.documents(ONE_LAYER, 2048, seed=0), replace(BUDGET, tokens=2048)
    known: set[str] = set()
    for i, part in enumerate((docs, docs[:1], docs[1:2], docs[:3], docs[2:6], docs[1:8])):
        codes = {f"{x.name} {specialize(x)}" for x in step_on(packed_into(budget, part)).recorded}
        assert not i or codes <= known
        known |= codes


# Ops whose result or its size the host reads. lift_fresh makes a tensor of numbers of the host.
WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "lift_fresh"}


class NoWaiting(TorchDispatchMode):
    """Refuse what makes the host wait for a GPU: reading values, and copying from the host's pageable memory.

    Custom ops are not entered: on a GPU they are kernels.
    """

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name, kwargs = op.overloadpacket.__name__, kwargs or {}
        waits = name in WAITS
        waits |= name == "repeat_interleave" and kwargs.get("output_size") is None
        waits |= name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        waits |= name == "_to_copy" and kwargs.get("device", args[0].device) != args[0].device
        waits |= name == "copy_" and args[0].device != args[1].device
        assert not waits, f"{op} makes the host wait"
        return op(*args, **kwargs)


def step_of(model: MM1) -> Callable[[], None]:
    """Return a training step of two micro-batches, which are loaded already."""
    world, t = World(), Train(steps=4, compile=False)
    state = TrainingState(model, t, 1e-3, world, torch.bfloat16)
    batches = [packed(documents()) for _ in range(2)]

    def step() -> None:
        with state.copies:
            done = run_micro_batches(state, iter(batches), len(batches), torch.bfloat16, ())
        sum_and_update(state, done, t, 1e-3, (False, False, True))

    return step


@pytest.mark.parametrize("experts", [0, 4], ids=["dense", "mixture"])
def test_the_host_waits_for_nothing_in_a_step(experts):
    step = step_of(small_mm1(experts=experts))
    step()  # the first step makes constants
    with NoWaiting():
        step()


def test_the_host_copies_nothing_to_the_device_in_a_step():
    batch = batch_of(TOKENS // 16).to("meta")
    with torch.device("meta"):
        model = MM1(ONE_LAYER)
    with NoWaiting():
        model(batch).objective.backward()


@pytest.mark.parametrize("wait", [
    lambda x: x[0].item(), lambda x: x[x > 0], lambda x: x if x[0] else -x,
    lambda x: torch.tensor([1.0], device=x.device), lambda x: x.to("meta"), lambda x: x.nonzero(),
])  # fmt: skip
def test_a_wait_is_noticed(wait):
    with NoWaiting(), pytest.raises(AssertionError, match="makes the host wait"):
        wait(torch.ones(3))


def test_compiled_blocks_take_other_documents_and_images_without_compiling_again():
    budget = Budget(tokens=120, media=4, patches=100, documents=24, max_patches=36)
    torch.compiler.reset()
    model = MM1(small_model()).init_weights()
    other = MM1(small_model()).init_weights()
    compile_blocks(model, fullgraph=True, backend="aot_eager")
    cases = ([((2, 3), 5)], [(9,)] * 3, [((6, 6), 40), ((1, 1), 2), (12,)], [(1,)] * 24, [(2, (2, 2), 4, (4, 6), 7)])
    for i, parts in enumerate(cases):
        batch = packed([document(*part) for part in parts], budget)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            for m in (model, other):
                m(batch).objective.backward()
        for (name, p), truth in zip(model.named_parameters(), other.parameters()):
            torch.testing.assert_close(p.grad, truth.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["varlen", "triton"])
def test_the_attention_of_gpus_is_not_compiled_again_either(backend):
    docs, budget = mix.documents(ONE_LAYER, 2048, seed=0), replace(BUDGET, tokens=2048)
    torch.compiler.reset()
    with torch.device("meta"):
        model = MM1(ONE_LAYER).bfloat16()
    for block in (*model.vision.blocks, *model.decoder.blocks):
        block.replace_forward(compiled(block.forward, dynamic=False, fullgraph=True, backend="aot_eager"))
    for i, part in enumerate((docs, docs[:1], docs[1:2], docs[2:6])):
        batch = packed_into(budget, part).to("meta")
        with pinned(attention=backend), torch._dynamo.config.patch(error_on_recompile=i > 0):
            model(batch).objective.backward()
