"""Count the floating-point operations of a training step from its sizes: useful ones, padding and recomputation.

The ledger counts products alone (matrices, convolutions, attention), two operations a multiplication; it leaves out
norms, activations, softmax, pooling, interpolation, sorting and the optimizer. Each layer returns its operations.

useful       operations that the documents, images and targets themselves need, once. Backward takes twice forward, but
             once for the patch embedding, as pixels have no gradient. A causal document of n tokens has n(n + 1)/2
             pairs, an image of p patches and a class token (p + 1)². The head counts rows with a target.
padding      operations on rows of the budgets without a token, patch or image, on rows of a head without a target, and
             on pairs that dense attention computes and then masks.
recompute    forward operations that run again: attention's scores, so that its backward takes 2.5 times its forward
             (Dao et al. 2022), and whole blocks that store only their input.

MFU = useful / (seconds · peak), HFU = all three / (seconds · peak), as defined by Chowdhery et al. 2022 (PaLM),
appendix B; but their 6N + 12LHQT per token counts all n² pairs of causal attention, also masked ones.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property

from mm1.engine.data.batch import Batch
from mm1.engine.layers.layer import BlockLayer, blocks_to_shard
from mm1.engine.layers.workload import Operations, Workload
from mm1.engine.models.registry import on_meta
from mm1.engine.models.spec import Model, ModelConfig


@cache
def blocks_of(c: ModelConfig) -> list[BlockLayer]:
    """Return the blocks of a model on the meta device; cached, because a search for a layout needs them often."""
    return blocks_to_shard(on_meta(c))


def workload(batch: Batch) -> Workload:
    """Return the sizes of a packed batch. Waits for the batch's device."""
    documents = [n for n in batch.cu_seqlens.diff().tolist() if n]
    grids = batch.media.grids
    return Workload(
        documents, grids.sizes or (), batch.target_count, len(batch.tokens), grids.images, grids.patches,
        computed_head_rows=len(batch.target_rows), prefixes=None if batch.prefix is None else batch.prefix.tolist(),
    )  # fmt: skip


@dataclass(frozen=True)
class Ledger:
    """Hold the operations of one step by part. forward and backward are useful; padding and recompute cover both.

    split: parts that a tensor group divides; it repeats all others. routed: parts of experts.
    """

    forward: Counter[str]
    backward: Counter[str]
    padding: Counter[str]
    recompute: Counter[str]
    split: frozenset[str] = frozenset()
    routed: frozenset[str] = frozenset()

    @cached_property
    def useful(self) -> int:
        """Return the useful operations of both passes."""
        return sum(self.forward.values()) + sum(self.backward.values())

    @cached_property
    def executed(self) -> int:
        """Return all operations, padding and recomputation included."""
        return self.useful + sum(self.padding.values()) + sum(self.recompute.values())

    def mfu(self, seconds: float, peak: float) -> float:
        """Return the share of `peak` (operations/s) that useful operations reached."""
        return self.useful / (seconds * peak)

    def hfu(self, seconds: float, peak: float) -> float:
        """Return the share of `peak` (operations/s) that all executed operations reached."""
        return self.executed / (seconds * peak)

    def totals(self) -> dict[str, int]:
        """Return the useful operations of forward and backward by part, and the three totals."""
        parts = {part: self.forward[part] + self.backward[part] for part in self.forward}
        padding, recompute = sum(self.padding.values()), sum(self.recompute.values())
        return {**parts, "useful": self.useful, "padding": padding, "recompute": recompute}


def ledger(c: ModelConfig, sizes: Workload | Batch, *, recompute: str = "none") -> Ledger:
    """Return the operations of a training step of a model.

    recompute: as train.recompute; only "blocks" runs matrix products again.
    """
    model, sizes = on_meta(c), workload(sizes) if isinstance(sizes, Batch) else sizes
    operations = _operations(model, sizes)
    split, routed = (frozenset(o.part for o in operations if getattr(o, flag)) for flag in ("split", "routed"))
    counted = Ledger(Counter(), Counter(), Counter(), Counter(), split, routed)
    for useful, executed in zip(_operations(model, sizes.useful), operations, strict=True):
        part, n = useful.part, useful.forward
        counted.forward[part] += n
        counted.backward[part] += useful.backward * n
        counted.padding[part] += (1 + useful.backward) * (executed.forward - n)
        if executed.attention:
            counted.recompute[part] += executed.forward // 2
    for block in blocks_of(c) if recompute == "blocks" else ():
        for executed in block.operations(sizes):
            counted.recompute[executed.part] += executed.forward
    return counted


def _operations(model: Model, sizes: Workload) -> list[Operations]:
    """Return the operations of the model and its blocks, part by part."""
    blocks = (block.operations(sizes) for block in blocks_of(model.config))
    return [*model.operations(sizes), *(operations for block in blocks for operations in block)]
