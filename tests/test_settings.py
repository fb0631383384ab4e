"""Settings are checked alike whoever sets them, explain themselves, and come from files, names and the command line."""

import dataclasses
import json
import math
import shutil
import tomllib
import types
import typing
from pathlib import Path

import pytest
from small import FOLDER, small_model, small_run

from mm1.engine import run_config
from mm1.engine.data import config as data_config
from mm1.engine.data.config import Data, Source
from mm1.engine.data.streams import make_streams
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.engine.layers import config as layers_config
from mm1.engine.layers.config import PixelHead
from mm1.engine.models import mm1_config
from mm1.engine.models.mm1 import MM1
from mm1.engine.models.mm1_config import DIGITS, MODELS
from mm1.engine.run_config import DIGITS_RUN, Run, changes, from_dict, load_run, to_dict
from mm1.engine.settings import help_texts, hints, item_table, tables_of, to_toml, toml_value
from mm1.engine.train import checkpoint, settings_page
from mm1.engine.train import config as train_config
from mm1.engine.train.config import Parallel, Train
from mm1.engine.train.display import Silent
from mm1.engine.train.trainer import Trainer
from mm1.errors import UserError

SOURCE = Source("text", ("a.txt",))
LEGAL = {
    "model.vision": DIGITS.vision, "model.connector": dataclasses.replace(DIGITS.connector, position_grid=(6, 6)),
    "model.decoder": DIGITS.decoder, "model.head": PixelHead(), "model": dataclasses.replace(DIGITS, context=768),
    "data.sources": SOURCE, "data": Data(sources=(SOURCE,)), "train": Train(peak_lr=1e-3, warmup=10),
    "parallel": Parallel(capacity=2.0),
}  # fmt: skip


def number_of(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# (dataclass, field, index in a tuple or None) of every number among the settings, as the values have it
NUMBERS = [
    (where, field.name, None if number_of(value) else i)
    for where, legal in LEGAL.items() for field in dataclasses.fields(legal)
    for value in [getattr(legal, field.name)]
    for i, item in enumerate(value if isinstance(value, tuple) else [value]) if number_of(item)
]  # fmt: skip
SIGNED = {("model.vision", "mean")}  # which may be negative
ZERO = {  # that mean something
    "model.vision.mean", "model.connector.depth", "model.head.blocks", "model.decoder.experts",
    "model.decoder.load_balance", "model.decoder.z_loss",
    "data.patches", "data.documents", "data.buffer", "data.workers", "data.streams",
    "train.final_lr", "train.warmup", "train.weight_decay", "train.betas", "train.seed", "train.skips",
    "train.rewinds", "train.hang", "train.save_retries",
}  # fmt: skip


def with_value(where, field, index, value):
    """Return the legal dataclass with a field, or one item of it, changed."""
    legal = LEGAL[where]
    if index is not None:
        items = list(getattr(legal, field))
        items[index] = value
        value = tuple(items)
    return dataclasses.replace(legal, **{field: value})


def test_every_class_of_settings_and_every_number_is_walked():
    classes = {
        cls for module in (run_config, mm1_config, layers_config, data_config, train_config)
        for cls in vars(module).values() if isinstance(cls, type) and cls.__module__ == module.__name__
    }  # fmt: skip
    assert {type(legal) for legal in LEGAL.values()} == classes - {Run}
    declared = 0
    for cls in {type(legal) for legal in LEGAL.values()}:
        for hint in typing.get_type_hints(cls).values():
            if typing.get_origin(hint) in (types.UnionType, typing.Union):
                hint = typing.get_args(hint)[0]
            items = typing.get_args(hint) if typing.get_origin(hint) is tuple else [hint]
            declared += sum(item in (int, float) for item in items)
    assert declared == len(NUMBERS)


@pytest.mark.parametrize("where, field, index", NUMBERS, ids=lambda x: str(x))
def test_nonsense_is_refused_with_the_settings_name(where, field, index):
    name = f"{where}.{field}" + ("" if index is None else f"[{index}]")
    legal = getattr(LEGAL[where], field) if index is None else getattr(LEGAL[where], field)[index]
    nonsense = [math.nan, math.inf, -math.inf, "3", "many", True, [1], {}]
    nonsense.append(1.5 if isinstance(legal, int) else 10**400)  # which no float can hold
    if (where, field) not in SIGNED:
        nonsense.append(-1)
    if f"{where}.{field}" not in ZERO:
        nonsense.append(0)
    for value in nonsense:
        with pytest.raises(UserError) as error:
            with_value(where, field, index, value)
        said = str(error.value)
        assert said.startswith(f"setting {name} is "), (value, said)
        assert ", expected " in said
        assert len(said) < 200


@pytest.mark.parametrize("name", sorted(ZERO))
def test_zero_is_taken_where_it_means_something(name):
    where, _, field = name.rpartition(".")
    index = 0 if isinstance(getattr(LEGAL[where], field), tuple) else None
    with_value(where, field, index, 0)


@pytest.mark.parametrize("settings, message", [
    ({"train": {"seed": 2**32}}, "setting train.seed is 4294967296, expected an integer ≥ 0 and ≤ 4294967295"),
    ({"train": {"betas": [0.9, 1.0]}}, "setting train.betas[1] is 1.0, expected a number ≥ 0 and < 1"),
    ({"train": {"betas": [0.9]}}, "setting train.betas is [0.9], expected a list of 2, each a number ≥ 0 and < 1"),
    ({"train": {"final_lr": 1.5}}, "setting train.final_lr is 1.5, expected a number ≥ 0 and ≤ 1"),
    ({"train": {"compile": "yes"}}, "setting train.compile is 'yes', expected true or false"),
    ({"train": {"dtype": "fp8"}}, "setting train.dtype is 'fp8', expected one of auto, bf16, fp32"),
    ({"train": {"init": 3}}, "setting train.init is 3, expected a string"),
    ({"train": 3}, "setting train is 3, expected a table of settings"),
    ({"train": {"warmup": 100, "steps": 100}}, "setting train.warmup is 100, expected less than train.steps = 100"),
    ({"parallel": {"capacity": 0}}, "setting parallel.capacity is 0, expected a number > 0"),
    ({"data": {"sources": [{"kind": "video", "paths": ["a"]}]}}, "setting data.sources[0].kind is 'video', expected one"
     " of captions, interleaved, text, conversations"),
    ({"data": {"sources": [{"kind": "text", "paths": ["a"]}, {"kind": "text", "paths": ["a"], "weight": 0}]}},
     "setting data.sources[1].weight is 0, expected a number > 0"),
    ({"data": {"sources": [{"kind": "text", "paths": "a"}]}}, "setting data.sources[0].paths is 'a', expected a list,"
     " each a string"),
    ({"data": {"sources": [{"kind": "text", "paths": []}]}}, "setting data.sources.paths is (), expected at least one"),
    ({"data": {"sources": [{"paths": ["a"]}]}}, "setting data.sources[0].kind is missing, expected one of captions"),
    ({"model": {"image_size": 3}}, "setting model.vision is missing, expected a table of settings"),
    ({"model": {"size": ["a"]}}, "setting model is {'size': ['a']}, expected a size's name or a [model] table"),
    ({"model": {"size": "digits", "connector": {"kind": "attention"}, "decoder": {"width": 99}}},
     "setting model.decoder.width is 99, expected a multiple of the attention connector's 8 heads"),
    ({"model": {"size": "digits", "decoder": {"moe_every": 5}}}, "setting model.decoder.moe_every is 5, expected at"
     " most the 4 layers"),
    ({"model": {"size": "digits", "decoder": {"experts_per_token": 0}}}, "setting model.decoder.experts_per_token is 0,"
     " expected at most the 4 experts, at least 1"),
    ({"model": {"size": "digits", "vision": {"interpolation": "lanczos"}}}, "setting model.vision.interpolation is"
     " 'lanczos', expected one of bilinear, bicubic, nearest"),
])  # fmt: skip
def test_what_a_setting_is_and_should_be_is_one_line(settings, message):
    with pytest.raises(UserError) as error:
        from_dict({"model": "digits"} | settings)
    assert str(error.value).startswith(message)
    assert len(str(error.value).splitlines()) == 1


def test_python_callers_are_checked_as_files_are():
    with pytest.raises(UserError, match=r"setting data.sources.weight is nan, expected a number > 0"):
        Source("text", ("a.txt",), math.nan)
    with pytest.raises(UserError, match=r"setting data.sources\[0\] is 'a.txt', expected a table of settings"):
        Data(sources=("a.txt",))
    with pytest.raises(UserError, match=r"setting model is None, expected a table of settings"):
        Run(None)
    assert connector_of([6, 6]) == connector_of((6, 6))  # and may be hashed
    assert isinstance(Source("text", ("a.txt",), 45).weight, float)


def connector_of(grid):
    connector = dataclasses.replace(DIGITS.connector, position_grid=grid)
    return hash(connector), connector


def test_a_run_is_the_same_after_json():
    for run in (DIGITS_RUN, small_run(), Run(DIGITS, parallel=Parallel(capacity=1.5)), load_run("mm1-7b-moe")):
        assert from_dict(json.loads(json.dumps(to_dict(run)))) == run


def test_a_run_is_the_same_after_toml(tmp_path):
    odd = Source("text", ('a "quoted" \\ name\n', "\x7f\x01é🙂", "{0..3}*?[ab]"), 0.1)
    runs = [DIGITS_RUN, small_run(), Run(DIGITS, Data((odd, SOURCE)), Train(betas=(0.0, 0.5), eps=1e-300, warmup=0))]
    for run in [*runs, *map(load_run, MODELS)]:
        run = load_run(toml(tmp_path, to_toml(to_dict(run))))  # in which all paths are absolute
        assert load_run(toml(tmp_path, to_toml(to_dict(run)))) == run
    assert from_dict(tomllib.loads(to_toml(to_dict(DIGITS_RUN)))) == DIGITS_RUN


def test_none_is_no_value_and_outweighs_a_recipe():
    assert load_run("mm1-3b", ["recipe=finetune", "train.peak_lr=none"]).train.peak_lr is None
    assert load_run("mm1-3b", ["model.connector.position_grid=none"]).model.connector.position_grid is None
    with pytest.raises(UserError, match=r"setting train.steps is 'none', expected an integer ≥ 1"):
        load_run("mm1-3b", ["train.steps=none"])


@pytest.mark.parametrize("key, meant", [
    ("train.peak_rl", "train.peak_lr"), ("train.Steps", "train.steps"), ("data.token", "data.tokens"),
    ("model.vision.head", "model.vision.heads"), ("parallel.tensors", "parallel.tensor"), ("trian.steps", "train"),
    ("recpie", "recipe"), ("modle", "model"),
])  # fmt: skip
def test_a_misspelt_setting_is_met_with_the_nearest(key, meant):
    with pytest.raises(UserError, match=rf"^unknown setting {key.split('.')[0]}.*, did you mean .*\b{meant}\b.*\?$"):
        load_run("digits", [f"{key}=1"])


def test_an_unknown_setting_unlike_any_is_met_with_all_beside_it():
    with pytest.raises(UserError, match=r"^unknown setting parallel.xyz, expected one of replicate, tensor, "):
        load_run("digits", ["parallel.xyz=1"])


# Help texts.


def classes_of_settings(cls=Run):
    tables = [(*tables_of(hint), item_table(hint)) for hint in hints(cls).values()]
    return [cls, *(inner for table in sum(tables, ()) if table for inner in classes_of_settings(table))]


@pytest.mark.parametrize("cls", classes_of_settings(), ids=lambda cls: cls.__name__)
def test_every_setting_has_a_help_text_that_names_each_special_value(cls):
    texts = help_texts(cls)
    for field, hint in hints(cls).items():
        if not tables_of(hint):
            text = texts[field]
            assert 10 < len(text) < 250, field
            assert text.endswith("."), field
            default = next(f.default for f in dataclasses.fields(cls) if f.name == field)
            special = {None: "none:", "": "empty:"}
            if default in special and not isinstance(default, tuple):
                assert special[default] in text, field


def test_a_help_text_is_the_string_below_its_field():
    assert help_texts(Train)["save_every"] == "Steps between two checkpoints."
    assert "images" not in help_texts(Run)


def test_the_page_of_settings_is_current():
    path = Path(__file__).parent.parent / "docs" / "settings.md"
    assert path.read_text() == settings_page.page(), f"run python -m mm1.engine.train.settings_page {path}"


def test_the_page_of_settings_has_a_row_for_each_with_its_range_and_default():
    page = settings_page.page()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    names = [row[0].strip("|*` ") for row in rows]
    plain = sum(not tables_of(hint) for cls in {*classes_of_settings()} for hint in hints(cls).values())
    assert len(names) == plain
    for section in page.split("\n## ")[1:]:  # kinds of models have settings of the same name
        mine = [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]
        assert len(set(mine)) == len(mine)
    for part, config in (("data", Data()), ("train", Train()), ("parallel", Parallel())):
        for field, value in to_dict(config).items():
            assert rows[names.index(f"{part}.{field}")][2] == f"`{toml_value(value)}`"
    assert rows[names.index("train.seed")][1:3] == ["an integer ≥ 0 and ≤ 4294967295", "`0`"]


# What may change when a run continues.


def test_changes_are_those_of_settings_that_have_to_stay():
    other = dataclasses.replace(
        DIGITS, image_patches=30, context=99, decoder=dataclasses.replace(DIGITS.decoder, z_loss=0.5, layers=5)
    )
    assert changes(DIGITS, other, "model") == {"model.decoder.layers": (4, 5)}
    assert changes(DIGITS, dataclasses.replace(DIGITS, image_mode="squash"), "model") == {}
    assert changes(DIGITS, DIGITS, "model") == {}


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_smallest_and_the_largest_seed_train(seed, tmp_path):
    trainer = Trainer(small_run(steps=2, seed=seed), tmp_path / "run", Silent(), False)
    trainer.fit()
    assert trainer.steps_done == 2


# The demo's settings belong to the demo.


def toml(folder: Path, text: str) -> str:
    (folder / "run.toml").write_text(text)
    return str(folder / "run.toml")


SOURCES = '[[data.sources]]\nkind = "text"\npaths = ["a.txt"]\n'


@pytest.mark.parametrize("model", ['model = "digits"', '[model]\nsize = "digits"',
                                   '[model]\nsize = "digits"\nimage_patches = 30'])  # fmt: skip
@pytest.mark.parametrize("rest", [f'[data]\ntokenizer = "t.json"\n{SOURCES}', SOURCES, "[train]\nseed = 1\n"])
def test_a_file_of_the_demos_size_has_the_defaults_and_nothing_of_the_demos(model, rest, tmp_path):
    run = load_run(toml(tmp_path, f"{model}\n{rest}"))
    plain = Data()
    for field in ("tokens", "images", "patches", "documents", "buffer", "workers", "streams"):
        assert getattr(run.data, field) == getattr(plain, field), field
    assert dataclasses.replace(run.train, seed=0) == Train()
    assert len(run.data.sources) == rest.count("[[data.sources]]")
    assert run.model.decoder == DIGITS.decoder


def test_the_bare_name_is_the_demo():
    assert load_run("digits") == DIGITS_RUN
    changed = load_run("digits", ["train.steps=100", "data.images=8", "model.image_patches=30"])
    assert changed.data == dataclasses.replace(DIGITS_RUN.data, images=8)
    assert changed.train == dataclasses.replace(DIGITS_RUN.train, steps=100)
    assert changed.model == dataclasses.replace(DIGITS, image_patches=30)
    assert DIGITS_RUN.train.warmup_steps == 54


def test_fine_tuning_warms_up_for_the_recipes_300_steps_and_less_in_a_short_run():
    assert load_run("mm1-3b", ["recipe=finetune"]).train.warmup_steps == 300
    assert load_run("mm1-3b", ["recipe=finetune", "train.steps=200"]).train.warmup_steps == 6


@pytest.mark.parametrize("parts", [1, 2])
def test_patches_below_those_of_one_image_are_an_error_at_the_start(parts):
    run = small_run()
    model = dataclasses.replace(run.model, image_mode="squash", image_size=24, image_parts=parts)
    needed = 36 * (1 if parts == 1 else 5)
    few, enough = (
        Run(model, dataclasses.replace(run.data, patches=n), run.train) for n in (needed - 1, needed)
    )  # fmt: skip
    tokenizer = TextTokenizer(run.data.tokenizer)
    make_streams(enough, tokenizer, None)
    message = f"setting data.patches is {needed - 1}, too few for one image, expected {needed} or more"
    with pytest.raises(UserError, match=message):
        make_streams(few, tokenizer, None)


# Paths.


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Return the folder of a run and its data, with characters of patterns in its name; work in another folder."""
    folder, other = tmp_path / "my [old] run*", tmp_path / "other"
    (folder / "text").mkdir(parents=True)
    other.mkdir()
    for name in ("shard-000.txt", "shard-001.txt", "b[1].txt"):
        shutil.copy(FOLDER / "text.txt", folder / "text" / name)
    shutil.copy(FOLDER / "tokenizer.json", folder)
    texts = {
        "config.json": json.dumps({"model": to_dict(small_model())}),
        "tokenizer.json": (FOLDER / "tokenizer.json").read_text(),
    }
    model = MM1(small_model()).init_weights()
    checkpoint.write(folder / "base", {"model.safetensors": dict(model.state_dict())}, texts)
    toml(
        folder,
        """
        [data]
        tokenizer = "tokenizer.json"
        tokens = 160
        images = 4
        [[data.sources]]
        kind = "text"
        paths = ["text/shard-{000..001}.txt"]
        [[data.sources]]
        kind = "text"
        paths = ["text/*.txt"]
        [train]
        init = "base"
        steps = 2
        accumulate = 1
        compile = false
    """,
    )
    monkeypatch.chdir(other)
    return folder


def test_paths_of_a_file_are_relative_to_the_file(elsewhere, tmp_path, monkeypatch):
    run = load_run("../my [old] run*/run.toml")
    paths = [run.data.tokenizer, run.train.init, *(path for source in run.data.sources for path in source.paths)]
    assert all(Path(path).is_absolute() for path in paths)
    assert run.model == small_model()
    Trainer(run, Path("out"), Silent(), False).fit()
    stored = from_dict(json.loads(Path("out/checkpoint/config.json").read_text()))
    monkeypatch.chdir("/")  # the paths in the checkpoint hold anywhere
    make_streams(stored, TextTokenizer(stored.data.tokenizer), None)
    Trainer(stored, tmp_path / "again", Silent(), False)


def test_paths_of_the_command_line_are_relative_to_the_working_directory(elsewhere):
    shutil.copy(FOLDER / "tokenizer.json", "mine.json")
    shutil.copy(FOLDER / "text.txt", "mine.txt")
    shutil.copytree(elsewhere / "base", "mine")
    source = 'data.sources=[{kind="text", paths=["*.txt"]}]'
    run = load_run(str(elsewhere / "run.toml"), ["data.tokenizer=mine.json", source, "train.init=mine"])
    here = Path.cwd()
    assert (run.data.tokenizer, run.train.init) == (str(here / "mine.json"), str(here / "mine"))
    assert run.data.sources == (Source("text", (str(here / "*.txt"),)),)
    Trainer(run, Path("out"), Silent(), False)


def test_a_home_directory_and_absolute_paths_stay_what_they_are(elsewhere, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    run = load_run(str(elsewhere / "run.toml"), ["data.tokenizer=~/t.json", "train.init=", "model=digits"])
    assert (run.data.tokenizer, run.train.init) == ("/home/me/t.json", "")
    assert load_run("digits").data == DIGITS_RUN.data
    with pytest.raises(UserError, match=r"setting data.tokenizer is 3, expected a string"):
        load_run(str(elsewhere / "run.toml"), ["data.tokenizer=3"])


def test_a_run_that_begins_with_a_checkpoint_takes_its_model_and_its_tokenizer(elsewhere):
    short = toml(elsewhere, '[model]\nimage_patches = 40\n[train]\ninit = "base"\n')
    run = load_run(short)
    assert run.model == dataclasses.replace(small_model(), image_patches=40)
    assert run.data.tokenizer == str(elsewhere / "base" / "tokenizer.json")
    shutil.rmtree(elsewhere / "base")
    with pytest.raises(UserError, match=r"setting train.init is '.*base', expected a checkpoint: "):
        load_run(short)
    assert from_dict(to_dict(run)) == run  # which says all that there is to say of the model


def test_a_checkpoint_of_an_older_version_still_loads(tmp_path):
    """Settings other than the model's are not read: runs of 100 steps were once stored with a warm-up of 2000."""
    old = {"model": to_dict(small_model()), "train": {"steps": 100, "warmup": 2000, "gone": 1}}
    texts = {"config.json": json.dumps(old), "tokenizer.json": (FOLDER / "tokenizer.json").read_text()}
    weights = dict(MM1(small_model()).init_weights().state_dict())
    checkpoint.write(tmp_path / "old", {"model.safetensors": weights}, texts)
    assert checkpoint.load(tmp_path / "old").config == small_model()
