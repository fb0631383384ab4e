"""What a run on one process survives: damaged checkpoints, full disks, foreign files, a second run, signals."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small import FOLDER, At, small_model, small_run
from test_train import Poison, Told, assert_same

from mm1.engine.data.config import Source
from mm1.engine.data.streams import make_streams
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.engine.run_config import to_dict
from mm1.engine.settings import to_toml
from mm1.engine.train import checkpoint, safety
from mm1.engine.train.display import Display
from mm1.engine.train.parallel import collective_timeout
from mm1.engine.train.step import Observer
from mm1.engine.train.trainer import Trainer, train
from mm1.errors import UserError

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "config.json", "tokenizer.json", checkpoint.MARKER)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def changed(run, part, **values):
    return dataclasses.replace(run, **{part: dataclasses.replace(getattr(run, part), **values)})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of 12 steps with checkpoints at steps 8 and 12."""
    folder = tmp_path_factory.mktemp("accidents") / "run"
    train(small_run(), folder)
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {"flipped": flip, "cut": lambda path: os.truncate(path, path.stat().st_size // 2), "missing": os.remove}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_resumed(damage, name, copy):
    DAMAGE[damage](copy / "step-00000012" / name)
    told = Told()
    trainer = Trainer(small_run(), copy, told, True)
    assert trainer.steps_done == 8
    assert not (copy / "step-00000012").exists()
    assert (copy / "damaged-step-00000012").is_dir()
    (warning,) = told.warnings
    assert "step-00000012" in warning
    assert "damaged-step-00000012" in warning
    assert [line["step"] for line in lines_of(copy)] == list(range(1, 9))
    assert (copy / "checkpoint").resolve() == (copy / "step-00000008").resolve()


def test_a_run_whose_checkpoints_are_all_damaged_says_so_and_starts_nothing(copy):
    for step in ("step-00000008", "step-00000012"):
        flip(copy / step / "model.safetensors")
    before = (copy / "metrics.jsonl").read_bytes()
    for _ in range(2):  # a scheduler may try again
        with pytest.raises(checkpoint.CheckpointError, match=r"no whole checkpoint; of the newest: .* is damaged"):
            Trainer(small_run(), copy, Told(), True)
    assert (copy / "metrics.jsonl").read_bytes() == before
    assert [path.name for path in checkpoint.numbered(copy)] == ["step-00000008", "step-00000012"]


def test_setting_aside_never_overwrites_what_was_set_aside_before(tmp_path):
    for _ in range(3):
        (tmp_path / "step-00000012").mkdir()
        checkpoint.set_aside(tmp_path / "step-00000012")
    names = ["damaged-step-00000012", "damaged-step-00000012-2", "damaged-step-00000012-3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_prune_deletes_nothing_but_what_the_program_writes(tmp_path):
    for step in (1, 2, 3, 100_000_000):
        checkpoint.write(tmp_path / f"step-{step:08d}", {}, {"config.json": "{}"})
    ours = (".step-00000004.partial", "step-00000009")  # as a kill leaves them
    theirs = ("step-by-step-notes", "step-12", "step-00000007.bak", ".step-notes.partial", "step-0000000x",
              "damaged-step-00000009")  # fmt: skip
    for name in (*ours, *theirs):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000010").write_text("a file")
    checkpoint.prune(tmp_path, 2)
    kept = {"step-00000003", "step-100000000", "step-00000010", *theirs}
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert checkpoint.latest(tmp_path).name == "step-100000000"


def test_a_checkpoint_is_readable_by_whom_the_umask_lets_read(finished):
    expected = 0o666 & ~os.umask(os.umask(0o022) or 0o022)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (finished / "checkpoint").resolve().iterdir()}
    assert set(modes.values()) == {modes["config.json"]} <= {expected, modes["config.json"]}
    assert modes["model.safetensors"] & 0o044


FOREIGN = {"torn": b'{"step": 12, "loss"', "binary": b"\xff\xfe\x00garbage}", "list": b"[1, 2]", "null": b"null",
           "no step": b'{"loss": 1.0}'}  # fmt: skip


@pytest.mark.parametrize("line", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_line_in_metrics_is_dropped_with_a_warning(line, copy):
    shutil.rmtree(copy / "step-00000012")
    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n" + line)
    told = Told()
    Trainer(small_run(), copy, told, True)
    assert [line["step"] for line in lines_of(copy)] == list(range(1, 9))
    assert any("metrics.jsonl" in warning for warning in told.warnings)


def test_a_second_run_in_the_same_folder_is_refused_with_host_and_process(tmp_path):
    code = (
        "import sys, pathlib\nfrom mm1.engine.train.safety import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    for resume in (False, True):
        with pytest.raises(UserError, match=rf"is in use by process {holder.pid} on .+"):
            train(small_run(), tmp_path, resume=resume, display=Told())
    holder.kill()
    holder.wait()
    with safety.locked(tmp_path):  # the kernel released it
        assert str(os.getpid()) in (tmp_path / safety.LOCK).read_text()


# Bad steps and what is saved.


def test_nothing_is_saved_while_steps_are_bad_and_the_good_checkpoint_stays(tmp_path):
    """The weights break in step 6; steps 7 to 12 are bad, of which 8 and 12 would be saved, and keep is 1."""
    trainer = Trainer(small_run(save_every=4, keep=1, skips=20, rewinds=0), tmp_path / "run", Told(), False)
    weight = trainer.model.decoder.norm.weight
    trainer.observers.append(At(ends={6: lambda: weight.data[0].fill_(float("inf"))}))
    with pytest.raises(FloatingPointError, match="step 12 left weights that are not finite"):
        trainer.fit()
    assert [path.name for path in checkpoint.numbered(tmp_path / "run")] == ["step-00000004"]
    checkpoint.check(tmp_path / "run" / "checkpoint")


@pytest.mark.parametrize("value", ["inf", "nan"])
@pytest.mark.parametrize("where", ["weight", "moment"])
def test_a_checkpoint_never_holds_a_value_that_is_not_finite(where, value, tmp_path):
    """The step that is to be saved breaks a value itself, with a loss that was still finite."""
    run = small_run(save_every=4, skips=1, rewinds=1)
    trainer = Trainer(run, tmp_path / "run", Told(), False)
    broken = []

    def breaks():
        if not broken:
            broken.append(True)
            parameter = trainer.state.local_parameters["decoder.norm.weight"]
            target = parameter.data if where == "weight" else trainer.state.optimizer.state[parameter]["exp_avg"]
            target[0] = float(value)

    trainer.observers.append(At(ends={8: breaks}))
    trainer.fit()
    assert trainer.steps_done == 12
    for folder in checkpoint.numbered(tmp_path / "run"):
        for file in ("model.safetensors", "optimizer.safetensors"):
            for name, tensor in checkpoint.read_tensors(folder, file).items():
                assert tensor.isfinite().all(), (folder.name, name)


def test_a_weight_that_no_loss_reads_and_is_not_finite_is_told_once(tmp_path):
    """The embedding of a token that the data do not contain breaks in step 2; a tied head would read it."""
    told = Told()
    run = dataclasses.replace(small_run(save_every=4, rewinds=0), model=small_model(tied=False, vocabulary=512))
    trainer = Trainer(run, tmp_path / "run", told, False)
    weight = trainer.state.local_parameters["decoder.embedding.weight"]
    trainer.observers.append(At(ends={2: lambda: weight.data[-1].fill_(float("nan"))}))
    with pytest.raises(FloatingPointError):
        trainer.fit()
    assert [text for text in told.warnings if "not finite" in text] == [
        "step 4: weights are not finite, so no checkpoint is written"]  # fmt: skip
    assert not checkpoint.numbered(tmp_path / "run")


def test_after_a_rewind_no_step_is_in_the_metrics_twice(tmp_path):
    run = small_run(skips=1, save_every=4)
    told = Display(tmp_path / "run", run.train, out=open(os.devnull, "w"))  # noqa: SIM115
    trainer = Trainer(run, tmp_path / "run", told, False)
    Poison(trainer, {6, 7})
    trainer.fit()
    steps = [line["step"] for line in lines_of(tmp_path / "run")]
    assert steps == list(range(1, 13))
    assert [line.get("rewinds") for line in lines_of(tmp_path / "run")] == [0] * 4 + [1] * 8


def test_a_checkpoint_behind_which_no_step_is_good_is_set_aside(tmp_path):
    """Finite weights can be broken too: the second rewind goes to the checkpoint before."""
    trainer = Trainer(small_run(skips=1, save_every=4, keep=3, steps=14), tmp_path / "run", Told(), False)
    Poison(trainer, {9, 10, 11, 12})
    trainer.fit()
    assert "restored step-00000004" in [w for w in trainer.display.warnings if "restored" in w][-1]
    assert (tmp_path / "run" / "damaged-step-00000008").is_dir()
    assert trainer.steps_done == 14


class FullDisk(Observer):
    """Limit the size of files in the saves after some steps: {step: bytes}."""

    def __init__(self, sizes: dict[int, int]):
        self.sizes, self.limits = sizes, resource.getrlimit(resource.RLIMIT_FSIZE)

    def step_begins(self, step):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)

    def step_ends(self, result):
        if result.step in self.sizes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.sizes[result.step], self.limits[1]))


@pytest.fixture
def full_disk():
    """Return FullDisk; afterwards files may have any size again."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield FullDisk
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_tried_again_and_the_last_good_checkpoint_stays(tmp_path, full_disk):
    """The saves at 8 and 12 fail, one amid the tensors and one amid the texts; 16 succeeds."""
    disk = full_disk({8: 20_000, 12: 200})
    trainer = Trainer(small_run(steps=16, save_every=4), tmp_path / "run", Told(), False, observers=[disk])
    trainer.fit()
    assert [path.name for path in checkpoint.numbered(tmp_path / "run")] == ["step-00000004", "step-00000016"]
    assert not list((tmp_path / "run").glob(".step-*"))
    first, second = trainer.display.warnings
    assert "step-00000008 was not written" in first
    assert "trying again after the next 4 steps" in second


def test_a_disk_that_stays_full_ends_the_run_after_the_retries(tmp_path, full_disk):
    run = small_run(steps=40, save_every=4, save_retries=2)
    disk = full_disk(dict.fromkeys((8, 12, 16), 20_000))
    trainer = Trainer(run, tmp_path / "run", Told(), False, observers=[disk])
    with pytest.raises(OSError, match=r"File too large.*3 saves in a row failed, .*step-00000004 is the newest"):
        trainer.fit()
    assert trainer.steps_done == 16
    checkpoint.check(tmp_path / "run" / "checkpoint")
    assert not list((tmp_path / "run").glob(".step-*"))


def test_a_last_step_that_is_bad_costs_nothing_of_the_run(tmp_path):
    """Its weights are those of the step before; the checkpoint before stays, should they be broken all the same."""
    trainer = Trainer(small_run(save_every=5, keep=1, rewinds=0), tmp_path / "run", Told(), False)
    Poison(trainer, {12})
    trainer.fit()
    assert [path.name for path in checkpoint.numbered(tmp_path / "run")] == ["step-00000010", "step-00000012"]
    assert any("the last 1 steps were left out" in warning for warning in trainer.display.warnings)


def test_an_old_checkpoint_that_cannot_be_deleted_is_no_failed_save(tmp_path, monkeypatch):
    def held(run, keep):
        raise OSError(16, "Device or resource busy", ".nfs0001")

    monkeypatch.setattr(checkpoint, "prune", held)
    trainer = Trainer(small_run(save_retries=0), tmp_path / "run", Told(), False)
    trainer.fit()
    assert len(checkpoint.numbered(tmp_path / "run")) == 3
    assert "an old checkpoint could not be deleted" in trainer.display.warnings[0]


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that exists and cannot be read")
def test_an_unreadable_file_of_a_checkpoint_is_damage(copy):
    (copy / "step-00000012" / "config.json").unlink()
    (copy / "step-00000012" / "config.json").symlink_to("/proc/self/mem")
    with pytest.raises(checkpoint.CheckpointError, match=r"is damaged: config\.json: Input/output error"):
        checkpoint.check(copy / "step-00000012")


# Continuing with other data or settings.


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name in "ab":
        (folder / f"{name}.txt").write_text("\n".join(f"{name} line {i} one two three" for i in range(200)))
    (folder / "few.txt").write_text("one line alone")
    return folder


def of_texts(texts: Path, *names: str, **data):
    sources = tuple(Source("text", (str(texts / f"{name}.txt"),), 1.0) for name in names)
    return changed(small_run(steps=8, save_every=4), "data", sources=sources, **data)


@pytest.fixture(scope="module")
def trained_on_a(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("identity") / "run"
    train(changed(of_texts(texts, "a"), "train", steps=4), folder)
    return folder


OTHERS = {
    "source": lambda texts: of_texts(texts, "b"),
    "added": lambda texts: of_texts(texts, "a", "b"),
    "seed": lambda texts: changed(of_texts(texts, "a"), "train", seed=7),
    "tokens": lambda texts: of_texts(texts, "a", tokens=192),
    "fewer": lambda texts: of_texts(texts, "few"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_run_does_not_continue_on_other_data_unless_told_to(what, texts, trained_on_a, tmp_path):
    folder = shutil.copytree(trained_on_a, tmp_path / "run", symlinks=True)
    run = OTHERS[what](texts)
    with pytest.raises(UserError, match=r"was trained on other data than this run's: .*--accept-other-data"):
        Trainer(run, folder, Told(), True)
    train(run, folder, resume=True, display=Told(), accept_other_data=True)
    assert checkpoint.latest(folder).name == "step-00000008"


def test_other_data_are_mixed_by_their_own_lengths(texts, tmp_path):
    """Not by those of the checkpoint, which are of other sources."""
    (tmp_path / "long.txt").write_text("\n".join("one two three " * 8 for _ in range(50)))
    short, long = texts / "a.txt", tmp_path / "long.txt"

    def run(*paths):
        return changed(small_run(), "data", sources=tuple(Source("text", (str(path),), 1.0) for path in paths))

    tokenizer = TextTokenizer(FOLDER / "tokenizer.json")
    names = ["data.sources[0].mean_length", "data.sources[1].mean_length"]
    first = make_streams(run(short, long), tokenizer, None).identity
    swapped = make_streams(run(long, short), tokenizer, None, before=first).identity
    assert [swapped[name] for name in names] == [first[name] for name in reversed(names)]
    same = make_streams(run(short, long), tokenizer, None, before=first | {names[0]: 5.0}).identity
    assert same[names[0]] == 5.0  # of the same data no new estimate is made


def test_a_checkpoint_without_an_identity_is_continued_only_when_told_to(texts, trained_on_a, tmp_path):
    folder = shutil.copytree(trained_on_a, tmp_path / "run", symlinks=True)
    state = checkpoint.read_json(folder / "step-00000004", "state.json")
    del state["identity"]
    shutil.rmtree(folder / "step-00000004")
    source = trained_on_a / "step-00000004"
    tensors = {name: checkpoint.read_tensors(source, name) for name in ("model.safetensors", "optimizer.safetensors")}
    texts_of = {name: (source / name).read_text() for name in ("config.json", "tokenizer.json")}
    checkpoint.write(folder / "step-00000004", tensors, texts_of | {"state.json": json.dumps(state)})
    with pytest.raises(UserError, match="the checkpoint does not record on which"):
        Trainer(of_texts(texts, "a"), folder, Told(), True)
    assert Trainer(of_texts(texts, "a"), folder, Told(), True, accept_other_data=True).steps_done == 4


def test_settings_that_do_not_change_the_data_may_change(texts, trained_on_a, tmp_path):
    folder = shutil.copytree(trained_on_a, tmp_path / "run", symlinks=True)
    moved = shutil.copytree(texts, tmp_path / "moved")
    run = of_texts(moved, "a")
    decoder = dataclasses.replace(run.model.decoder, load_balance=0.5, z_loss=0.0)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, decoder=decoder))
    run = changed(run, "train", save_every=2, peak_lr=1e-4, keep=1, log_every=2)
    trainer = Trainer(run, folder, Told(), True)
    trainer.fit()
    assert trainer.steps_done == 8


def test_another_model_is_refused_by_the_names_of_its_settings(texts, trained_on_a):
    run = of_texts(texts, "a")
    run = dataclasses.replace(run, model=small_model(ffn=48, qk_norm=False))
    with pytest.raises(
        UserError,
        match=r"model\.decoder\.ffn was 40, this run has 48; model\.decoder\.qk_norm was True, this run has False",
    ):
        Trainer(run, trained_on_a, Told(), True)


def other_tokenizer(folder: Path) -> Path:
    """As many tokens, two of which have changed their ids."""
    spec = json.loads((FOLDER / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    a, b = [token for token, number in vocabulary.items() if number in (100, 101)]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path = folder / "other.json"
    path.write_text(json.dumps(spec))
    return path


def test_weights_are_not_begun_with_under_another_tokenizer_unless_told_to(texts, trained_on_a, tmp_path):
    run = of_texts(texts, "a", tokenizer=str(other_tokenizer(tmp_path)))
    run = changed(run, "train", init=str(trained_on_a))
    with pytest.raises(UserError, match=r"has other token ids than .*tokenizer\.json.*data\.tokenizer"):
        Trainer(run, tmp_path / "refused", Told(), False)
    Trainer(run, tmp_path / "accepted", Told(), False, accept_other_data=True)
    with pytest.raises(UserError, match="was trained on other data"):
        Trainer(changed(run, "train", steps=8), trained_on_a, Told(), True)


def test_without_a_tokenizer_that_of_the_checkpoint_is_taken(texts, trained_on_a, tmp_path):
    folder = shutil.copytree(trained_on_a, tmp_path / "run", symlinks=True)
    assert len(Trainer(of_texts(texts, "a", tokenizer="gone/tokenizer.json"), folder, Told(), True).tokenizer) == 384
    begun = changed(of_texts(texts, "a", tokenizer=""), "train", init=str(trained_on_a))
    trainer = Trainer(begun, tmp_path / "begun", Told(), False)
    assert len(trainer.tokenizer) == 384
    weights = checkpoint.weights(checkpoint.latest(trained_on_a))
    assert_same(dict(trainer.model.named_parameters()), weights)


# Signals, to the command as users start it.


class Command:
    """A process of `mm1 train` with a small run, whose standard error goes to a file."""

    def __init__(self, folder: Path, steps: int = 4000, **train):
        folder.mkdir(parents=True)
        self.run, self.errors = folder / "run", folder / "stderr.txt"
        table = to_dict(small_run(steps=steps, save_every=1000, **train))
        table["data"]["streams"] = 0
        (folder / "run.toml").write_text(to_toml(table))
        command = [sys.executable, "-m", "mm1", "train", str(folder / "run.toml")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.popen = subprocess.Popen(
            [*command, "--out", str(self.run)], env=environment, stderr=self.errors.open("w"), start_new_session=True
        )

    def reach(self, step: int) -> "Command":
        path, deadline = self.run / "metrics.jsonl", time.monotonic() + 180
        while not (path.exists() and path.read_bytes().count(b"\n") >= step):
            assert self.popen.poll() is None, self.errors.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return self

    def end(self) -> int:
        return self.popen.wait(180)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)],
                         ids=["SIGTERM", "SIGUSR1", "Ctrl-C"])  # fmt: skip
def test_a_signal_saves_and_its_repeats_are_ignored(number, status, tmp_path):
    command = Command(tmp_path / "here").reach(3)
    for again in (number, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        command.popen.send_signal(again)
    assert command.end() == status, command.errors.read_text()
    newest = checkpoint.latest(command.run)
    checkpoint.check(newest)
    assert checkpoint.read_json(newest, "state.json")["step"] == len(lines_of(command.run)) >= 3
    last = command.errors.read_text().splitlines()[-1]
    assert last.startswith("mm1: stopped at step")
    assert f"--resume continues from {newest}" in last
    assert ("Ctrl-C again stops at once" in command.errors.read_text()) == (number == signal.SIGINT)


def test_a_second_ctrl_c_stops_at_once_without_saving(capfd):
    with safety.Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        assert stop.interrupted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_ctrl_c_of_another_process_is_not_this_ones_first(capfd):
    """Or the first one here would stop at once, amid the save."""
    with safety.Stop() as stop:
        stop.agreed = stop.any_interrupted = True
        signal.raise_signal(signal.SIGINT)
        assert stop.asked


def test_a_stop_amid_bad_steps_saves_nothing_and_says_where_the_run_continues(tmp_path):
    trainer = Trainer(small_run(save_every=4, skips=20), tmp_path / "run", Told(), False)
    Poison(trainer, set(range(6, 20)))
    trainer.observers.append(At(begins={7: lambda: os.kill(os.getpid(), signal.SIGTERM)}))
    with pytest.raises(safety.Stopped, match=r"stopped at step 7; --resume continues from .*step-00000004") as stopped:
        trainer.fit()
    assert stopped.value.status == 143


def test_a_stop_before_anything_could_be_saved_is_no_success(tmp_path):
    """Status 143 would tell a scheduler that the run can continue."""
    trainer = Trainer(small_run(skips=20), tmp_path / "run", Told(), False)
    Poison(trainer, set(range(1, 20)))
    trainer.observers.append(At(begins={2: lambda: os.kill(os.getpid(), signal.SIGTERM)}))
    with pytest.raises(safety.Stopped, match="stopped at step 2; nothing is saved") as stopped:
        trainer.fit()
    assert stopped.value.status == 1


def test_collectives_wait_longer_than_the_watchdog():
    """The stacks are printed before a collective fails."""
    assert all(collective_timeout(hang).total_seconds() > hang + 30 for hang in (1800.0, 10.0))
    assert collective_timeout(0.0).days > 1, "there is no watchdog"


def test_compiled_code_that_is_damaged_is_left_out_with_a_warning(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    assert safety.load_compiled(folder), "nothing is stored"
    (folder / safety.COMPILED).write_bytes(torch.randint(0, 256, (1000,), dtype=torch.uint8).numpy().tobytes())
    assert not safety.load_compiled(folder)
    told = Told()
    Trainer(small_run(compile=True), folder, told, backend="eager")
    assert told.warnings == [f"{folder / safety.COMPILED} is damaged: compiling again"]
