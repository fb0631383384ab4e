"""Define the settings of a run, and read them from TOML files and the command line."""

import dataclasses
import glob
import json
import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from mm1.engine.data.config import Data, Source
from mm1.engine.models.mm1_config import DIGITS, MM1Config
from mm1.engine.models.registry import RegisteredConfigs, config_class, default_recipe, named
from mm1.engine.settings import assign, build, check, dotted, hints, may_change, parse_value, require_names, required
from mm1.engine.train.config import Parallel, Train
from mm1.errors import UserError, require


@dataclass(frozen=True)
class Run:
    """Hold the settings of a training run: the model's, of any registered kind, and those of data and training."""

    model: Annotated[MM1Config, RegisteredConfigs()]
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    parallel: Parallel = field(default_factory=Parallel)

    def __post_init__(self):
        check(self, "")


# The demo's data, which the package contains, and its recipe.
DIGITS_FOLDER = Path(__file__).parent / "data" / "digits"
DIGITS_RUN = Run(
    DIGITS,
    Data(
        sources=(
            Source("captions", (str(DIGITS_FOLDER / "train-captions.tar.gz"),), 42),
            Source("interleaved", (str(DIGITS_FOLDER / "train-interleaved.jsonl.gz"),), 28),
            Source("interleaved", (str(DIGITS_FOLDER / "train-notations.jsonl.gz"),), 25),
            Source("text", (str(DIGITS_FOLDER / "text.txt"),), 5),
        ),
        tokenizer=str(DIGITS_FOLDER / "tokenizer.json"),
        tokens=768, images=32, patches=400, documents=32,
    ),
    # The law's rate for so few parameters is 2.6e-3. Compiling takes longer than it saves in so short a run.
    Train(steps=1800, accumulate=1, compile=False, save_every=100, peak_lr=1.5e-3),
)  # fmt: skip


# A recipe's changes to the defaults, which are MM1's pre-training: 4096 tokens and up to 16 images a sequence, 512
# sequences a step, the law's learning rate, nothing frozen (section 4). Fine-tuning (section 5): 10k steps of 256
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
    # AIM's pre-training: 4096 images a step; its warm-up is 2.5 % of the steps (section 4).
    "aim": {
        "data": {"images": 64},
        "train": {"steps": 500_000, "accumulate": 64, "weight_decay": 0.05, "final_lr": 0.0},
    },
    "aim-clipart": {  # minutes on a CPU
        "data": {"images": 64},
        "train": {"steps": 1500, "accumulate": 1, "weight_decay": 0.05, "final_lr": 0.0, "compile": False,
                  "save_every": 100},
    },
}  # fmt: skip


def load_run(name_or_file: str, settings: list[str] | tuple[str, ...] = ()) -> Run:
    """Return the run of a named size or a TOML file, changed by `key=value` settings ("train.steps=100").

    A file has `model = "mm1-3b"` or a [model] table, `recipe`, [data], [[data.sources]], [train], [parallel]. Paths in
    it are relative to its folder, paths in `settings` to the working directory; in the run all are absolute. The name
    of a size that is also a recipe's has that recipe; "digits" is the demo with its data and settings.
    Raises UserError with one line for an unreadable file and for an unknown, missing or illegal setting.
    """
    table: dict[str, Any] = {"model": name_or_file}
    if name_or_file.endswith(".toml"):
        try:
            table = tomllib.loads(Path(name_or_file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"no such file: {name_or_file}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise UserError(f"{name_or_file}: {error}") from None
        _resolve_paths(table, Path(name_or_file).parent)
    elif name_or_file in RECIPES:
        table["recipe"] = name_or_file
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"setting {setting!r} is not key=value, such as train.steps=100")
        assign(table, key.strip(), parse_value(value.strip()))
    _resolve_paths(table, Path())
    return from_dict(table)


def from_dict(table: dict[str, Any]) -> Run:
    """Return the run of nested plain values, the form of `to_dict` and of TOML files.

    "model" is a size's name, or a table, which may name a "size" and change it. Without either, model and tokenizer are
    those of the checkpoint train.init. Raises UserError for an unknown, missing or illegal setting.
    """
    table = dict(table)
    require_names(table, [*hints(Run), "recipe"])
    model, recipe = table.pop("model", None), table.pop("recipe", None)
    is_recipe = recipe is None or (isinstance(recipe, str) and recipe in RECIPES)
    require(is_recipe, "setting recipe", recipe, f"one of {', '.join(RECIPES)}")
    changes = dict(model) if isinstance(model, dict) else {}
    size = changes.pop("size", None) if isinstance(model, dict) else model
    train = table.get("train")
    init = train.get("init") if isinstance(train, dict) else None
    base, needed = None, required(config_class(changes.get("kind", MM1Config.kind)))
    if isinstance(size, str):
        base = Run(named(size))
    elif size is not None or not (changes or init):
        raise UserError(f"setting model is {model!r}, expected a size's name or a [model] table")
    elif isinstance(init, str) and init and not changes.keys() >= set(needed):
        folder = Path(init)
        if not (folder / "config.json").is_file() and (folder / "checkpoint").is_dir():  # the folder of a run
            folder = folder / "checkpoint"
        base = Run(_model_of(folder), Data(tokenizer=str(folder / "tokenizer.json")))
    kind = changes.get("kind", MM1Config.kind if base is None else base.model.kind)
    cls, recipe = config_class(kind), recipe or default_recipe(kind)
    images = {name: value for name, value in RECIPES[recipe].get("model", {}).items() if name in hints(cls)}
    table = _merged({**RECIPES[recipe], "model": images}, {**table, "model": changes})
    table["model"] = build(cls, table["model"], "model", None if base is None else base.model)
    return build(Run, table, base=base)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return two levels of settings: those of `base`, replaced by those of `changes`."""
    both = {part: {**base[part], **changes[part]} for part in base if isinstance(changes.get(part), dict)}
    return {**base, **changes, **both}


def stored_model(config: Any) -> Any:
    """Return the model settings in a checkpoint's config.json, whose other settings may be of an older version."""
    has_model = isinstance(config, dict) and "model" in config
    require(has_model, "setting model", None, "a table of a checkpoint's config.json")
    model, data = from_dict({"model": config["model"]}).model, config.get("data")
    tokens = data.get("tokens") if isinstance(data, dict) else None  # older versions did not store the context
    older = tokens and model.vocabulary and not model.context
    return dataclasses.replace(model, context=tokens) if older else model


def saw_conversations(config: Any) -> bool:
    """Return whether the run of a checkpoint's config.json trained on conversations."""
    data = config.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    return any(isinstance(source, dict) and source.get("kind") == "conversations" for source in sources or ())


def _model_of(folder: Path) -> Any:
    """Return the model settings in a checkpoint folder. Raises UserError if it is not a checkpoint."""
    try:
        return stored_model(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"setting train.init is {str(folder)!r}, expected a checkpoint: {error}") from None


def _resolve_paths(table: dict[str, Any], folder: Path) -> None:
    """Make the paths in a table of settings absolute, relative to `folder`. Values of a wrong type are not changed."""
    for part, name in (("data", "tokenizer"), ("train", "init")):
        fields = table.get(part)
        if isinstance(fields, dict) and isinstance(path := fields.get(name), str) and path:
            fields[name] = str(folder.absolute() / os.path.expanduser(path))
    # Paths of sources may be glob patterns; special characters in the folder's own name are escaped.
    escaped = Path(glob.escape(str(folder.absolute())))
    sources = table["data"].get("sources") if isinstance(table.get("data"), dict) else None
    for source in sources if isinstance(sources, list) else ():
        if isinstance(source, dict) and isinstance(paths := source.get("paths"), list):
            source["paths"] = [str(escaped / os.path.expanduser(p)) if isinstance(p, str) else p for p in paths]


def to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass of settings as nested plain values, which `from_dict` reads."""
    return dataclasses.asdict(config)


def changes(before: Any, after: Any, name: str) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ and may not change when a run continues: full name -> (old, new).

    before, after: two dataclasses of one class. name: their full name among the settings, such as "model". Fields that
    are marked MayChange are not compared.
    """
    differing: dict[str, tuple[Any, Any]] = {}
    for part, hint in hints(type(after)).items():
        full, old, new = dotted(name, part), getattr(before, part), getattr(after, part)
        if dataclasses.is_dataclass(new):
            differing |= changes(old, new, full)
        elif old != new and not may_change(hint):
            differing[full] = (old, new)
    return differing
