"""Sizes of the model and settings of a run, as frozen dataclasses, and the named ones.

The MM1 paper (arXiv 2403.09611) publishes the encoder's kind, the connector's kind and token count, the number and
placement of experts and the totals; widths and depths it does not. What is inferred says from what, on its line.
"""

import dataclasses
import glob
import json
import math
import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from mm1.engine.data.record import DataError
from mm1.engine.data.sources import KINDS
from mm1.engine.settings import (
    Count,
    CountOrZero,
    OneOf,
    Positive,
    PositiveOrZero,
    Range,
    build,
    check,
    expect,
    parsed,
    put,
)

POOL_HEADS = 8  # of the attention connector
Beta = Annotated[float, Range(least=0, below=1)]
Seed = Annotated[int, Range(least=0, most=2**32 - 1)]  # what the loader's shuffle takes


@dataclass(frozen=True)
class Vision:
    """A ViT encoder on packed patches of images of any grid."""

    width: Count
    layers: Count
    heads: Count
    ffn: Count
    patch: Count = 14
    table: tuple[Count, Count] = (24, 24)  # grid of the learned positions, resampled to every other grid
    activation: Annotated[str, OneOf("quick_gelu", "gelu")] = "quick_gelu"
    class_token: bool = True  # CLIP's: attends and is attended to, but is not passed on
    pre_norm: bool = True  # CLIP's LayerNorm between embedding and blocks
    patch_norm: bool = False  # AIM's bias and LayerNorm of patches, before the positions
    # "sincos": AIM's, a formula of row and column at any grid, of which nothing is learned and `table` says nothing.
    positions: Annotated[str, OneOf("table", "sincos")] = "table"
    bias: bool = True  # of the blocks' linears
    interpolation: Annotated[str, OneOf("bilinear", "bicubic", "nearest")] = "bicubic"
    eps: Positive = 1e-5
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP's, as DFN5B's
    std: tuple[Positive, Positive, Positive] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        check(self, "model.vision")
        expect(self.width % self.heads == 0, "model.vision.heads", self.heads, f"a divisor of the width {self.width}")
        whole = self.positions == "table" or self.width % 4 == 0
        expect(whole, "model.vision.width", self.width, "a multiple of 4 where positions is sincos")


@dataclass(frozen=True)
class Connector:
    """Makes `tokens` tokens of an image, whatever its grid."""

    kind: Annotated[str, OneOf("c-abstractor", "attention", "average")] = "c-abstractor"
    tokens: Count = 144
    hidden: Count = 1024
    depth: CountOrZero = 3  # blocks before the pool, and again after it
    readout_depth: Count = 2
    position_grid: tuple[Count, Count] | None = (24, 24)
    output_norm: bool = True  # not Honeybee's; without it the loss of a fresh model stays on a plateau for long

    def __post_init__(self):
        check(self, "model.connector")
        square = math.isqrt(self.tokens) ** 2 == self.tokens
        expect(square or self.kind == "attention", "model.connector.tokens", self.tokens, "a square number")


@dataclass(frozen=True)
class Decoder:
    """A Llama-type decoder, every `moe_every`-th layer of which may be a mixture of experts."""

    vocabulary: Count
    width: Count
    layers: Count
    heads: Count
    kv_heads: Count
    ffn: Count
    head_width: Count = 128
    rope_theta: Positive = 500_000.0
    eps: Positive = 1e-5
    tied: bool = True
    qk_norm: bool = True
    experts: Annotated[int, Range(least=0, most=512)] = 0  # as many as the routing kernels take
    experts_per_token: Annotated[int, Range(least=0, most=16)] = 2
    moe_every: Count = 2  # layers moe_every - 1, 2·moe_every - 1, … are mixtures
    # "torch" (its grouped_mm) and "megablocks" (CUDA, bf16) are there for comparison.
    moe_backend: Annotated[str, OneOf("mm1", "torch", "megablocks")] = "mm1"
    load_balance: PositiveOrZero = 0.01
    z_loss: PositiveOrZero = 0.001

    def __post_init__(self):
        check(self, "model.decoder")
        heads = f"a divisor of the {self.heads} heads"
        expect(self.heads % self.kv_heads == 0, "model.decoder.kv_heads", self.kv_heads, heads)
        expect(self.head_width % 2 == 0, "model.decoder.head_width", self.head_width, "an even number")
        if self.experts:
            experts, layers = f"at most the {self.experts} experts, at least 1", f"at most the {self.layers} layers"
            enough = 1 <= self.experts_per_token <= self.experts
            expect(enough, "model.decoder.experts_per_token", self.experts_per_token, experts)
            expect(self.moe_every <= self.layers, "model.decoder.moe_every", self.moe_every, layers)


@dataclass(frozen=True)
class Model:
    vision: Vision
    connector: Connector
    decoder: Decoder
    # To image_size², or "native": own aspect ratio, at most image_patches.
    image_mode: Annotated[str, OneOf("squash", "native")] = "squash"
    image_size: Count = 378
    image_patches: Count = 729
    image_parts: Count = 1  # k: besides the whole image k × k parts of it, each of image_size²; squash only
    # Tokens of the longest document that it was trained on, prompt and answer together; None: not known. A run writes
    # its data.tokens here, or what train.init was trained on if that is more.
    context: Count | None = None

    def __post_init__(self):
        check(self, "model")
        squash, patch = self.image_mode == "squash", self.vision.patch
        expect(self.image_parts == 1 or squash, "model.image_parts", self.image_parts, "1 where image_mode is native")
        whole = not squash or self.image_size % patch == 0
        expect(whole, "model.image_size", self.image_size, f"a multiple of the patch size {patch}")
        pooled, width = self.connector.kind == "attention", self.decoder.width
        expect(not pooled or width % POOL_HEADS == 0, "model.decoder.width", width,
               f"a multiple of the attention connector's {POOL_HEADS} heads")  # fmt: skip


def is_moe(decoder: Decoder, layer: int) -> bool:
    return decoder.experts > 0 and (layer + 1) % decoder.moe_every == 0


@dataclass(frozen=True)
class Source:
    """One data set of a mixture. weight: its share of the tokens drawn, relative to the others."""

    # "captions" (WebDataset tars), "interleaved" (OBELICS-type json/jsonl/parquet), "text", or "conversations"
    # (LLaVA-type json/jsonl, of which answers alone are trained on)
    kind: Annotated[str, OneOf(*KINDS)]
    paths: tuple[str, ...]
    weight: Positive = 1.0

    def __post_init__(self):
        check(self, "data.sources")
        expect(len(self.paths) > 0, "data.sources.paths", self.paths, "at least one file")


@dataclass(frozen=True)
class Data:
    """sources, and the static budgets of one packed sequence."""

    sources: tuple[Source, ...] = ()
    tokenizer: str = ""  # a tokenizer.json
    tokens: Count = 4096
    images: Count = 16
    patches: CountOrZero = 0  # 0: images · patches of a full image
    documents: CountOrZero = 0  # 0: tokens / 16, or as many as the source of the shortest ones needs
    buffer: CountOrZero = 0  # tokens of the documents that the packer chooses from, a sequence at least; 0: 4 · tokens
    workers: CountOrZero = 0  # loader processes; 0 decodes in threads of this one
    # Packers that the records are dealt to; a run goes on with any number of data-parallel processes that divides it.
    streams: CountOrZero = 0  # 0: one, or four for each process that there is at the start
    max_bad: Count = 100  # unreadable records in a row that stop the run

    def __post_init__(self):
        check(self, "data")


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


@dataclass(frozen=True)
class Run:
    """Everything `mm1 train` needs."""

    model: Model
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    parallel: Parallel = field(default_factory=Parallel)

    def __post_init__(self):
        check(self, "")


def peak_lr(parameters: int) -> float:
    """MM1's law, exp(-0.4214 ln N - 0.5535) for N non-embedding parameters of the decoder (paper, section 3.3)."""
    return math.exp(-0.4214 * math.log(parameters) - 0.5535)


VIT_L_336 = Vision(width=1024, layers=24, heads=16, ffn=4096, table=(24, 24))  # OpenAI CLIP ViT-L/14-336
VIT_H_378 = Vision(width=1280, layers=32, heads=16, ffn=5120, table=(27, 27))  # open_clip's ViT-H-14-378-quickgelu
# Honeybee's C-Abstractor, width and depth; the paper gives kind and token count.
ABSTRACTOR_144 = Connector(position_grid=(27, 27))

# Paper: 1.2B. Inferred: the 3B's proportions (head width 128, ffn/width 2.625) at 1.2 B non-embedding parameters.
D_1B = Decoder(vocabulary=49_152, width=2048, layers=24, heads=16, kv_heads=16, ffn=5376)
# Paper: 3B, of which 64B with 64 experts every 2nd layer. Inferred: width, layers, heads, ffn, vocabulary, theta and
# q/k norm from the AFM on-device config (huggingface/transformers#32515); kv_heads = heads because that gives the 2.9B
# and 64B the paper names.
D_3B = Decoder(vocabulary=49_152, width=3072, layers=26, heads=24, kv_heads=24, ffn=8064)
# Paper: 7B, of which 47B with 32 experts every 4th layer, which implies 5.2B parameters in the dense MLPs. Inferred
# from that: 32 × 4096 with ffn 13,312; grouped-query attention keeps the total at 7B.
D_7B = Decoder(vocabulary=49_152, width=4096, layers=32, heads=32, kv_heads=8, ffn=13_312)
# Paper: 30B. Inferred: the 7B's ffn/width 3.25 and grouped queries, scaled to 30 B.
D_30B = Decoder(vocabulary=49_152, width=7168, layers=48, heads=56, kv_heads=8, ffn=23_296)


def _mm1(decoder: Decoder) -> Model:
    return Model(VIT_H_378, ABSTRACTOR_144, decoder)


DIGITS = Model(
    vision=Vision(
        width=96, layers=3, heads=3, ffn=256, patch=4, table=(6, 6), activation="gelu", class_token=False,
        pre_norm=False, interpolation="bilinear", mean=(0.34, 0.34, 0.34), std=(0.3, 0.3, 0.3),
    ),
    connector=Connector(tokens=16, hidden=96, depth=1, position_grid=None),
    decoder=Decoder(
        vocabulary=384, width=96, layers=4, heads=3, kv_heads=3, head_width=32, ffn=192, rope_theta=10_000.0,
        experts=4,
    ),
    image_mode="native", image_size=24, image_patches=24,
)  # fmt: skip

MODELS: dict[str, Model] = {
    "digits": DIGITS,
    "mm1-1b": _mm1(D_1B),
    "mm1-3b": _mm1(D_3B),
    "mm1-7b": _mm1(D_7B),
    "mm1-30b": _mm1(D_30B),
    "mm1-3b-moe": _mm1(dataclasses.replace(D_3B, experts=64, moe_every=2)),
    "mm1-7b-moe": _mm1(dataclasses.replace(D_7B, experts=32, moe_every=4)),
    # The paper's ablation base: ViT-L/14 at 336 px and the 1.2B decoder.
    "mm1-1b-vit-l-336": Model(
        VIT_L_336, Connector(position_grid=(24, 24)), D_1B, image_size=336, image_patches=576
    ),
}  # fmt: skip

# The demo's data, which is shipped, and its recipe.
DIGITS_FOLDER = Path(__file__).parent / "data" / "digits"
DIGITS_RUN = Run(
    DIGITS,
    Data(
        sources=(
            Source("captions", (str(DIGITS_FOLDER / "train-captions.tar.gz"),), 45),
            Source("interleaved", (str(DIGITS_FOLDER / "train-interleaved.jsonl.gz"),), 45),
            Source("text", (str(DIGITS_FOLDER / "text.txt"),), 10),
        ),
        tokenizer=str(DIGITS_FOLDER / "tokenizer.json"),
        tokens=768, images=32, patches=400, documents=32,
    ),
    # The law's rate for so few parameters is 2.6e-3. Compiling takes longer than it saves in so short a run.
    Train(steps=1200, accumulate=1, compile=False, save_every=100, peak_lr=1.5e-3),
)  # fmt: skip


# What a recipe changes of the defaults, which are MM1's pre-training: 4096 tokens and up to 16 images a sequence, 512
# sequences a step, the law's learning rate, nothing frozen (section 3.3). Fine-tuning (section 4.1): 10k steps of 256
# sequences of 2048 tokens, positions interpolated to 672 pixels, an image of 1344 as five of 144 tokens each. Its
# warm-up was not published: the default's 3 % are 300 steps.
RECIPES: dict[str, dict[str, Any]] = {
    "pretrain": {},
    "finetune": {
        "model": {"image_mode": "squash", "image_size": 672, "image_patches": 2304, "image_parts": 2},
        "data": {"tokens": 2048, "images": 14},
        "train": {"steps": 10_000, "accumulate": 256, "peak_lr": 1e-5, "final_lr": 0.0},
    },
    "digits": {"data": dataclasses.asdict(DIGITS_RUN.data), "train": dataclasses.asdict(DIGITS_RUN.train)},
}


def named(name: str) -> Model:
    if name not in MODELS:
        raise DataError(f"unknown size {name!r}, and no such file or folder; known: {', '.join(MODELS)}")
    return MODELS[name]


def load_run(name_or_file: str, settings: list[str] | tuple[str, ...] = ()) -> Run:
    """Return the run of a named size or a TOML file, and of `key=value` settings on top ("train.steps=100").

    A file has `model = "mm1-3b"` or a [model] table, `recipe`, [data], [[data.sources]], [train], [parallel]. Paths in
    it are relative to its folder, those of `settings` to the working directory; in the run all are absolute. The name
    "digits" alone is the demo with its data and settings: recipe "digits".
    Raises DataError with one line for whatever is wrong.
    """
    table: dict[str, Any] = {"model": name_or_file}
    if name_or_file.endswith(".toml"):
        try:
            table = tomllib.loads(Path(name_or_file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"no such file: {name_or_file}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise DataError(f"{name_or_file}: {error}") from None
        _resolve_paths(table, Path(name_or_file).parent)
    elif name_or_file == "digits":
        table["recipe"] = "digits"
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise DataError(f"setting {setting!r} is not key=value")
        put(table, key.strip(), parsed(value.strip()))
    _resolve_paths(table, Path())
    return from_dict(table)


def from_dict(table: dict[str, Any]) -> Run:
    """Return the run of nested plain values, as `to_dict` and TOML give them.

    "model" is a size's name or a table, which may change what its "size" names. Without either, model and tokenizer are
    those of the checkpoint train.init.
    """
    table = dict(table)
    model, recipe = table.pop("model", None), table.pop("recipe", "pretrain")
    expect(isinstance(recipe, str) and recipe in RECIPES, "recipe", recipe, f"one of {', '.join(RECIPES)}")
    changes = dict(model) if isinstance(model, dict) else {}
    size = changes.pop("size", None) if isinstance(model, dict) else model
    train = table.get("train")
    init = train.get("init") if isinstance(train, dict) else None
    base = None
    if isinstance(size, str):
        base = Run(named(size))
    elif size is not None or not (changes or init):
        raise DataError(f"setting model is {model!r}, expected a size's name or a [model] table")
    elif isinstance(init, str) and init and not changes.keys() >= {"vision", "connector", "decoder"}:
        folder = Path(init)
        if not (folder / "config.json").is_file() and (folder / "checkpoint").is_dir():  # the folder of a run
            folder = folder / "checkpoint"
        base = Run(_model_of(folder), Data(tokenizer=str(folder / "tokenizer.json")))
    return build(Run, _over(RECIPES[recipe], {**table, "model": changes}), base=base)


def _over(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """Return two levels of settings in which those of `high` outweigh those of `low`."""
    both = {part: {**low[part], **high[part]} for part in low if isinstance(high.get(part), dict)}
    return {**low, **high, **both}


def stored_model(config: Any) -> Model:
    """Return the model of a checkpoint's config.json, whose other settings may be of an older version."""
    expect(isinstance(config, dict) and "model" in config, "model", None, "a table of a checkpoint's config.json")
    model, data = from_dict({"model": config["model"]}).model, config.get("data")
    trained = data.get("tokens") if isinstance(data, dict) else None  # of a run, also of an older version
    return dataclasses.replace(model, context=trained) if trained and not model.context else model


def saw_conversations(config: Any) -> bool:
    """Say whether the run of a checkpoint's config.json trained on conversations."""
    data = config.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    return any(isinstance(source, dict) and source.get("kind") == "conversations" for source in sources or ())


def _model_of(folder: Path) -> Model:
    try:
        return stored_model(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise DataError(f"setting train.init is {str(folder)!r}, expected a checkpoint: {error}") from None


def _resolve_paths(table: dict[str, Any], folder: Path) -> None:
    """Make the paths in a table of settings absolute, relative to `folder`. Values of a wrong type stay as they are."""
    for part, name in (("data", "tokenizer"), ("train", "init")):
        fields = table.get(part)
        if isinstance(fields, dict) and isinstance(path := fields.get(name), str) and path:
            fields[name] = str(folder.absolute() / os.path.expanduser(path))
    # Paths of sources may be patterns; characters of patterns in the folder's own name are escaped.
    escaped = Path(glob.escape(str(folder.absolute())))
    sources = table["data"].get("sources") if isinstance(table.get("data"), dict) else None
    for source in sources if isinstance(sources, list) else ():
        if isinstance(source, dict) and isinstance(paths := source.get("paths"), list):
            source["paths"] = [str(escaped / os.path.expanduser(p)) if isinstance(p, str) else p for p in paths]


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def changes(before: Any, now: Any, where: str) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two dataclasses of one kind differ, by their dotted names: (before, now)."""
    if not dataclasses.is_dataclass(now):
        return {} if before == now else {where: (before, now)}
    pairs = ((f"{where}.{f.name}", getattr(before, f.name), getattr(now, f.name)) for f in dataclasses.fields(now))
    return {name: values for part, a, b in pairs for name, values in changes(a, b, part).items()}
