"""Sizes of the model and settings of a run, as frozen dataclasses, and the named ones.

The MM1 paper (arXiv 2403.09611) publishes the encoder's kind, the connector's kind and token count, the number and
placement of experts and the totals; widths and depths it does not. What is inferred says from what, on its line.
"""

import dataclasses
import json
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm1.engine.data.record import DataError


def _check(condition: bool, name: str, found: Any, expected: str) -> None:
    if not condition:
        raise DataError(f"setting {name} is {found!r}, expected {expected}")


def _positive(config: Any, where: str, *names: str) -> None:
    for name in names:
        _check(getattr(config, name) > 0, f"{where}.{name}", getattr(config, name), "a positive number")


@dataclass(frozen=True)
class Vision:
    """A ViT encoder on packed patches of images of any grid."""

    width: int
    layers: int
    heads: int
    ffn: int
    patch: int = 14
    table: tuple[int, int] = (24, 24)  # grid of the learned positions, resampled to every other grid
    activation: str = "quick_gelu"  # or "gelu"
    class_token: bool = True  # CLIP's: attends and is attended to, but is not passed on
    pre_norm: bool = True  # CLIP's LayerNorm between embedding and blocks
    patch_norm: bool = False  # AIM's bias and LayerNorm of patches, before the positions
    bias: bool = True  # of the blocks' linears
    interpolation: str = "bicubic"
    eps: float = 1e-5
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP's, as DFN5B's
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        _positive(self, "model.vision", "width", "layers", "heads", "ffn", "patch")
        _check(self.width % self.heads == 0, "model.vision.heads", self.heads, f"a divisor of the width {self.width}")
        known = ("quick_gelu", "gelu")
        _check(self.activation in known, "model.vision.activation", self.activation, f"one of {', '.join(known)}")


@dataclass(frozen=True)
class Connector:
    """Makes `tokens` tokens of an image, whatever its grid."""

    kind: str = "c-abstractor"  # or "attention", "average"
    tokens: int = 144
    hidden: int = 1024
    depth: int = 3  # blocks before the pool, and again after it
    readout_depth: int = 2
    position_grid: tuple[int, int] | None = (24, 24)
    output_norm: bool = True  # not Honeybee's; without it the loss of a fresh model stays on a plateau for long

    def __post_init__(self):
        _positive(self, "model.connector", "tokens", "hidden", "readout_depth")
        square = math.isqrt(self.tokens) ** 2 == self.tokens
        _check(square or self.kind == "attention", "model.connector.tokens", self.tokens, "a square number")
        known = ("c-abstractor", "attention", "average")
        _check(self.kind in known, "model.connector.kind", self.kind, f"one of {', '.join(known)}")


@dataclass(frozen=True)
class Decoder:
    """A Llama-type decoder, every `moe_every`-th layer of which may be a mixture of experts."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    head_width: int = 128
    rope_theta: float = 500_000.0
    eps: float = 1e-5
    tied: bool = True
    qk_norm: bool = True
    experts: int = 0
    experts_per_token: int = 2
    moe_every: int = 2  # layers moe_every - 1, 2·moe_every - 1, … are mixtures
    moe_backend: str = "mm1"  # or, for comparison, "torch" (its grouped_mm), "megablocks" (CUDA, bf16)
    load_balance: float = 0.01
    z_loss: float = 0.001

    def __post_init__(self):
        _positive(self, "model.decoder", "vocabulary", "width", "layers", "heads", "kv_heads", "ffn", "head_width")
        multiple = f"a divisor of the {self.heads} heads"
        _check(self.heads % self.kv_heads == 0, "model.decoder.kv_heads", self.kv_heads, multiple)
        _check(self.head_width % 2 == 0, "model.decoder.head_width", self.head_width, "an even number")
        _check(self.experts >= 0, "model.decoder.experts", self.experts, "0 or more")
        known = ("mm1", "torch", "megablocks")
        _check(self.moe_backend in known, "model.decoder.moe_backend", self.moe_backend, f"one of {', '.join(known)}")
        if self.experts:
            _positive(self, "model.decoder", "moe_every", "experts_per_token")
            most = f"at most the {self.experts} experts"
            few = self.experts_per_token <= self.experts
            _check(few, "model.decoder.experts_per_token", self.experts_per_token, most)


@dataclass(frozen=True)
class Model:
    vision: Vision
    connector: Connector
    decoder: Decoder
    image_mode: str = "squash"  # to image_size², or "native": own aspect ratio, at most image_patches
    image_size: int = 378
    image_patches: int = 729
    image_parts: int = 1  # k: besides the whole image k × k parts of it, each of image_size²; squash only

    def __post_init__(self):
        _positive(self, "model", "image_size", "image_patches", "image_parts")
        _check(self.image_parts == 1 or self.image_mode == "squash", "model.image_parts", self.image_parts,
               "1 where image_mode is native")  # fmt: skip
        _check(self.image_mode in ("squash", "native"), "model.image_mode", self.image_mode, "squash or native")
        whole = self.image_mode == "native" or self.image_size % self.vision.patch == 0
        _check(whole, "model.image_size", self.image_size, f"a multiple of the patch size {self.vision.patch}")


def is_moe(decoder: Decoder, layer: int) -> bool:
    return decoder.experts > 0 and (layer + 1) % decoder.moe_every == 0


@dataclass(frozen=True)
class Source:
    """One data set of a mixture. weight: its share of the tokens drawn, relative to the others."""

    # "captions" (WebDataset tars), "interleaved" (OBELICS-type json/jsonl/parquet), "text", or "conversations"
    # (LLaVA-type json/jsonl, of which answers alone are trained on)
    kind: str
    paths: tuple[str, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Data:
    """sources, and the static budgets of one packed sequence."""

    sources: tuple[Source, ...] = ()
    tokenizer: str = ""  # a tokenizer.json
    tokens: int = 4096
    images: int = 16
    patches: int = 0  # 0: images · patches of a full image
    documents: int = 0  # 0: tokens / 16, at least one
    buffer: int = 64  # documents the packer chooses from
    workers: int = 0  # loader processes; 0 decodes in threads of this one
    # Packers that the records are dealt to; a run goes on with any number of data-parallel processes that divides it.
    streams: int = 0  # 0: one, or four for each process that there is at the start
    max_bad: int = 100  # unreadable records in a row that stop the run

    def __post_init__(self):
        _positive(self, "data", "tokens", "images", "buffer", "max_bad")
        _check(self.streams >= 0, "data.streams", self.streams, "0 or more")


@dataclass(frozen=True)
class Train:
    steps: int = 200_000
    accumulate: int = 512  # sequences a step
    peak_lr: float | None = None  # None: MM1's law from the parameter count
    final_lr: float = 0.1  # of the peak
    warmup: int = 2_000
    weight_decay: float = 0.1  # times the peak learning rate
    betas: tuple[float, float] = (0.9, 0.95)  # not published; usual for decoders
    eps: float = 1e-8
    clip: float = 1.0
    compile: bool = True
    recompile: str = "error"  # what compiling again after the first steps is; or "warn"
    recompute: str = "none"  # in backward instead of keeping it: "none", "blocks" or "selective"
    float8: str = "none"  # products of the decoder's wide linears: "tensorwise" or "rowwise" scales, by torchao
    dtype: str = "auto"  # bf16 on a GPU, fp32 on a CPU
    seed: int = 0
    init: str = ""  # checkpoint folder whose weights the run begins with, such as `mm1 convert` makes
    save_every: int = 1_000
    keep: int = 2  # checkpoints
    skips: int = 10  # steps in a row whose loss is not finite, which are left out; one more, and the run rewinds
    rewinds: int = 2  # to the last checkpoint, before the run stops
    hang: float = 1800.0  # seconds without a step, after which all stacks are printed; 0: never
    log_every: int = 1
    tensorboard: bool = False

    def __post_init__(self):
        _positive(self, "train", "steps", "accumulate", "clip", "save_every", "keep", "log_every")
        _check(self.warmup >= 0, "train.warmup", self.warmup, "0 or more")
        for name in ("skips", "rewinds", "hang"):
            _check(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        _check(self.dtype in ("auto", "bf16", "fp32"), "train.dtype", self.dtype, "auto, bf16 or fp32")
        _check(self.recompile in ("error", "warn"), "train.recompile", self.recompile, "error or warn")
        recomputes = ("none", "blocks", "selective")
        _check(self.recompute in recomputes, "train.recompute", self.recompute, "none, blocks or selective")
        recipes = ("none", "tensorwise", "rowwise")
        _check(self.float8 in recipes, "train.float8", self.float8, "none, tensorwise or rowwise")


@dataclass(frozen=True)
class Parallel:
    """How the processes that torchrun starts share the work. Those left over by replicate × tensor shard the model."""

    replicate: int = 1  # copies of the sharded model
    tensor: int = 1  # processes that share heads, MLP width and experts of each layer, and see the same tokens
    expert: int = 1  # of those that shard the model, processes that share the experts, to which tokens travel
    capacity: float | None = None  # of an even share of a sequence's slots, what an expert takes; None drops nothing

    def __post_init__(self):
        _positive(self, "parallel", "replicate", "tensor", "expert")
        _check(self.capacity is None or self.capacity > 0, "parallel.capacity", self.capacity, "above 0")


@dataclass(frozen=True)
class Run:
    """Everything `mm1 train` needs."""

    model: Model
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    parallel: Parallel = field(default_factory=Parallel)


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
        tokens=768, images=32, patches=400, documents=32, buffer=128,
    ),
    # The law's rate for so few parameters is 2.6e-3. Compiling takes longer than it saves in so short a run.
    Train(steps=1200, accumulate=1, warmup=50, compile=False, save_every=100, peak_lr=1.5e-3),
)  # fmt: skip


# What a recipe changes of the defaults, which are MM1's pre-training: 4096 tokens and up to 16 images a sequence, 512
# sequences a step, the law's learning rate, nothing frozen (section 3.3). Fine-tuning (section 4.1): 10k steps of 256
# sequences of 2048 tokens, positions interpolated to 672 pixels, an image of 1344 as five of 144 tokens each. Its
# warm-up was not published: 3 % of the steps, as LLaVA's.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "pretrain": {},
    "finetune": {
        "model": {"image_mode": "squash", "image_size": 672, "image_patches": 2304, "image_parts": 2},
        "data": {"tokens": 2048, "images": 14},
        "train": {"steps": 10_000, "accumulate": 256, "peak_lr": 1e-5, "final_lr": 0.0, "warmup": 300},
    },
}


def named(name: str) -> Model:
    if name not in MODELS:
        raise DataError(f"unknown size {name!r}, and no such file or folder; known: {', '.join(MODELS)}")
    return MODELS[name]


def load_run(name_or_file: str, settings: list[str] | tuple[str, ...] = ()) -> Run:
    """A run from a named size or a TOML file (`model = "digits"` or a [model] table, `recipe`, [data],
    [[data.sources]], [train], [parallel]) and `key=value` settings ("train.steps=100").

    Raises DataError with one line for whatever is wrong.
    """
    if name_or_file.endswith(".toml"):
        try:
            table = tomllib.loads(Path(name_or_file).read_text())
        except FileNotFoundError:
            raise DataError(f"no such file: {name_or_file}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise DataError(f"{name_or_file}: {error}") from None
    else:
        table = {"model": name_or_file}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise DataError(f"setting {setting!r} is not key=value")
        _put(table, key.strip(), _value(value.strip()))
    return from_dict(table)


def from_dict(table: dict[str, Any]) -> Run:
    """The run of nested plain values, as `dataclasses.asdict` and TOML give them; "model" may be a size's name."""
    table = dict(table)
    model, recipe = table.pop("model", None), table.pop("recipe", "pretrain")
    _check(recipe in RECIPES, "recipe", recipe, f"one of {', '.join(RECIPES)}")
    base = None
    if isinstance(model, str):
        base = DIGITS_RUN if model == "digits" else Run(named(model))
    if isinstance(model, dict):
        model, size = dict(model), None
        if "size" in model:
            size = named(model.pop("size"))
        base = dataclasses.replace(
            DIGITS_RUN if size is DIGITS else Run(DIGITS), model=_build(Model, model, "model", size)
        )
    init = table.get("train", {}).get("init") if isinstance(table.get("train"), dict) else None
    if model is None and init:
        base = Run(_build(Model, _config_of(init)["model"], "model"))
    if base is None:
        raise DataError(f"setting model is {model!r}, expected a size's name or a [model] table")
    changes = {part: {**of} for part, of in RECIPES[recipe].items()}
    if isinstance(model, dict):
        changes.get("model", {}).update(model)  # what is said outweighs the recipe
    return _build(Run, table, "", _build(Run, changes, "", base))


def _config_of(folder: str) -> dict[str, Any]:
    try:
        return json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"setting train.init is {folder!r}, expected a checkpoint: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def _put(table: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        if isinstance(table.get(name), str):
            table[name] = {"size": table[name]}  # model = "digits" with model.decoder.… on top
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise DataError(f"setting {key!r}: {name} has no fields")
    table[last] = value


def _value(text: str) -> Any:
    """A TOML value, or the text itself where it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _build(cls: type, values: dict[str, Any], where: str, base: Any = None) -> Any:
    """A dataclass of nested dicts; fields not given come from `base`, or from the defaults."""
    hints = typing.get_type_hints(cls)
    unknown = set(values) - set(hints)
    if unknown:
        raise DataError(f"unknown setting {_join(where, min(unknown))}; known: {', '.join(hints)}")
    built = {
        name: _convert(hints[name], value, _join(where, name), getattr(base, name, None))
        for name, value in values.items()
    }
    if base is not None:
        return dataclasses.replace(base, **built)
    try:
        return cls(**built)
    except TypeError:
        missing = [f.name for f in dataclasses.fields(cls) if f.name not in built and f.default is dataclasses.MISSING]
        raise DataError(f"{where or cls.__name__} lacks {', '.join(missing)}") from None


def _convert(hint: Any, value: Any, where: str, base: Any = None) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _build(typing.cast(type, hint), value, where, base)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(next(arg for arg in args if arg is not type(None)), value, where, base)
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            return tuple(_convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value)))
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    name = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise DataError(f"setting {where} is {value!r}, expected {name}")


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
