"""Settings of training, and of how processes share it."""

from dataclasses import dataclass
from typing import Annotated

from mm1.engine.settings import Count, CountOrZero, OneOf, Positive, PositiveOrZero, Range, check, expect

Beta = Annotated[float, Range(least=0, below=1)]
Seed = Annotated[int, Range(least=0, most=2**32 - 1)]  # what the loader's shuffle takes


@dataclass(frozen=True)
class Train:
    steps: Count = 200_000
    accumulate: Count = 512  # sequences a step
    peak_lr: Positive | None = None  # None: MM1's law from the parameter count
    final_lr: Annotated[float, Range(least=0, most=1)] = 0.1  # of the peak
    warmup: CountOrZero | None = None  # steps; None: 3 % of all, at most 2000 (`warmup_steps`)
    weight_decay: PositiveOrZero = 0.1  # times the step's learning rate
    betas: tuple[Beta, Beta] = (0.9, 0.95)  # not published; usual for decoders
    eps: Positive = 1e-8
    clip: Positive = 1.0
    compile: bool = True
    recompile: Annotated[str, OneOf("error", "warn")] = "error"  # what compiling again after the first steps is
    recompute: Annotated[str, OneOf("none", "blocks", "selective")] = "none"  # in backward instead of keeping it
    # Products of the decoder's wide linears, by torchao.
    float8: Annotated[str, OneOf("none", "tensorwise", "rowwise")] = "none"
    dtype: Annotated[str, OneOf("auto", "bf16", "fp32")] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    seed: Seed = 0
    init: str = ""  # checkpoint folder whose weights the run begins with, such as `mm1 convert` makes
    save_every: Count = 1_000
    keep: Count = 2  # checkpoints
    # Failed saves in a row, each of which is tried again after save_every steps, before the run stops.
    save_retries: CountOrZero = 3
    skips: CountOrZero = 10  # steps in a row whose loss is not finite, which are left out; one more, and it rewinds
    rewinds: CountOrZero = 2  # to the last checkpoint, before the run stops
    # Seconds without a step, after which all stacks are printed; 0: never.
    hang: Annotated[float, Range(least=0, most=1e7)] = 1800.0
    log_every: Count = 1
    tensorboard: bool = False

    def __post_init__(self):
        check(self, "train")
        if self.warmup:
            expect(self.warmup < self.steps, "train.warmup", self.warmup, f"less than train.steps = {self.steps}")

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up: 3 % of all unless `warmup` says otherwise, at most MM1's 2000, at least 1 of several.

        The paper gives the 2000 for its 200k steps; 3 % is what LLaVA takes for shorter runs.
        """
        if self.warmup is not None:
            return self.warmup
        return min(max(1, min(2_000, self.steps * 3 // 100)), self.steps - 1)


@dataclass(frozen=True)
class Parallel:
    """How the processes that torchrun starts share the work. Those left over by replicate × tensor shard the model."""

    replicate: Count = 1  # copies of the sharded model
    tensor: Count = 1  # processes that share heads, MLP width and experts of each layer, and see the same tokens
    expert: Count = 1  # of those that shard the model, processes that share the experts, to which tokens travel
    capacity: Positive | None = None  # of an even share of a sequence's slots, what an expert takes; None drops nothing

    def __post_init__(self):
        check(self, "parallel")
