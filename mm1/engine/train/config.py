"""Define the settings of training, and of its layout over processes."""

from dataclasses import dataclass
from typing import Annotated

from mm1.engine.settings import Count, CountOrZero, OneOf, Positive, PositiveOrZero, Range, check
from mm1.errors import require

Beta = Annotated[float, Range(minimum=0, below=1)]
Seed = Annotated[int, Range(minimum=0, maximum=2**32 - 1)]  # the range of numpy's seeds, which the loader needs


@dataclass(frozen=True)
class Train:
    """Configure optimizer, schedule, precision, checkpoints and logging."""

    steps: Count = 200_000
    """Optimizer steps of the run; MM1's pre-training has 200,000."""
    accumulate: Count = 512
    """Packed sequences of a step, over all processes; MM1's pre-training has 512."""
    peak_lr: Positive | None = None
    """Peak learning rate; none: MM1's law, exp(-0.4214 ln N - 0.5535) for N non-embedding parameters of the decoder;
    a mixture counts as its dense equivalent; AIM's is 1e-3."""
    final_lr: Annotated[float, Range(minimum=0, maximum=1)] = 0.1
    """Learning rate after the cosine schedule, as a fraction of the peak; MM1's is 0.1."""
    warmup: CountOrZero | None = None
    """Steps of linear warm-up, fewer than train.steps; none: 3 % of train.steps, at most MM1's 2000."""
    weight_decay: PositiveOrZero = 0.1
    """Weight decay of AdamW: each step shrinks matrices by this times the step's learning rate; MM1's is 0.1."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of AdamW's averages of gradient and squared gradient; MM1's are not published, these are usual for
    decoders."""
    eps: Positive = 1e-8
    """Number added to AdamW's denominator; torch's default."""
    clip: Positive = 1.0
    """Largest norm of the gradient; a longer gradient is scaled to it."""
    compile: bool = True
    """Compile the model's blocks with torch.compile; a run of a few minutes is faster without."""
    recompile: Annotated[str, OneOf("error", "warn")] = "error"
    """Reaction to a compilation after the first steps, which would slow the run: stop with an error, or warn."""
    recompute: Annotated[str, OneOf("none", "blocks", "selective")] = "none"
    """Activations to recompute in backward to save memory: none, those of whole blocks, or all but the results of
    matrix products, attention and experts ("selective")."""
    float8: Annotated[str, OneOf("none", "tensorwise", "rowwise")] = "none"
    """Scaling of float8 matrix products in linear layers of the decoder, or of AIM, by torchao; "none": no float8."""
    dtype: Annotated[str, OneOf("auto", "bf16", "fp32")] = "auto"
    """Precision of matrix products; "auto": bf16 on a GPU, fp32 on a CPU. Weights are kept in fp32."""
    seed: Seed = 0
    """Seed of the initial weights and of the order of the data."""
    init: str = ""
    """Checkpoint folder whose weights the run starts from, such as `mm1 convert` writes; an MM1 takes the image encoder
    of an AIM's checkpoint; empty: random weights."""
    save_every: Count = 1_000
    """Steps between two checkpoints."""
    keep: Count = 2
    """Checkpoints to keep on disk; older ones are deleted."""
    save_retries: CountOrZero = 3
    """Failed saves in a row before the run stops; each is tried again after train.save_every steps."""
    skips: CountOrZero = 10
    """Largest number of steps in a row whose loss or gradient is not finite, which change nothing; one more rewinds the
    run to its last checkpoint."""
    rewinds: CountOrZero = 2
    """Largest number of rewinds to a checkpoint before the run stops with an error."""
    hang: Annotated[float, Range(minimum=0, maximum=10_000_000)] = 1800.0
    """Seconds without a finished step after which the stacks of all threads are printed; 0: never."""
    log_every: Count = 1
    """Steps between two lines of metrics.jsonl, which also has the last step."""
    tensorboard: bool = False
    """Write TensorBoard events too, into the run's folder; needs the package tensorboard."""

    def __post_init__(self):
        check(self, "train")
        if self.warmup:
            require(self.warmup < self.steps, "setting train.warmup", self.warmup,
                    f"less than train.steps = {self.steps}")  # fmt: skip

    @property
    def warmup_steps(self) -> int:
        """Return the steps of the warm-up: `warmup`, or 3 % of all steps, between 1 and 2000; 0 in a run of one step.

        The 2000 are the MM1 paper's for its 200k steps; the 3 % are LLaVA's for shorter runs.
        """
        if self.warmup is not None:
            return self.warmup
        return min(max(1, min(2_000, self.steps * 3 // 100)), self.steps - 1)


@dataclass(frozen=True)
class Parallel:
    """Configure the layout of torchrun's processes: replicate × shard × tensor; shard follows from their number."""

    replicate: Count = 1
    """Copies of the sharded model, which only all-reduce gradients (HSDP)."""
    tensor: Count = 1
    """Processes that share heads, MLP width and experts of each layer and see the same tokens; best within a node."""
    expert: Count = 1
    """Processes, among those that shard the model, that divide the experts; tokens are sent to them (all-to-all)."""
    capacity: Positive | None = None
    """Largest number of tokens per expert, as a multiple of an even share of a sequence; further tokens are dropped,
    second choices first; none: nothing is dropped."""

    def __post_init__(self):
        check(self, "parallel")
