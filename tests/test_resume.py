"""A run that was stopped or killed and goes on ends with the same bits as one that nobody disturbed."""

import collections
import dataclasses
import functools
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import resume_runs
import torch
from small import FOLDER, At, small_model, small_run

from mm1.engine.data import feed
from mm1.engine.data.config import Source
from mm1.engine.data.streams import make_streams
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.engine.run_config import DIGITS_RUN, Run, to_dict
from mm1.engine.train import checkpoint
from mm1.engine.train.config import Parallel
from mm1.engine.train.display import Display
from mm1.engine.train.trainer import Trainer

TIMES = ("seconds", "data_seconds")
BAD = 7  # unreadable records in `tiny`


@pytest.fixture(autouse=True)
def _one_thread():
    """As in the processes that are started: the bits depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def changed(run: Run, **data) -> Run:
    return dataclasses.replace(run, data=dataclasses.replace(run.data, **data))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """30 texts and 24 captions, 7 of them unreadable, and a shard that breaks off: an epoch is two or three steps."""
    folder = tmp_path_factory.mktemp("tiny")
    lines = [json.dumps({"text": text}) for text in (FOLDER / "text.txt").read_text().splitlines()[:30]]
    for at, broken in {3: '{"text": ', 11: '{"text": ""}', 17: "[]", 29: '{"text": 5}'}.items():
        lines[at] = broken
    (folder / "text.jsonl").write_text("\n".join(lines))
    with tarfile.open(FOLDER / "test-captions.tar.gz") as whole, tarfile.open(folder / "captions.tar", "w") as small:
        for number, member in enumerate(itertools.islice(whole, 48)):
            content = whole.extractfile(member).read()
            content = b"broken" if number in (6, 20, 40) else content  # .png and .txt by turns
            member.size = len(content)
            small.addfile(member, io.BytesIO(content))
    whole = (folder / "captions.tar").read_bytes()
    (folder / "short.tar").write_bytes(whole[: len(whole) // 8 // 512 * 512 + 100])
    captions = (str(folder / "captions.tar"), str(folder / "short.tar"))
    return Source("captions", captions, 45), Source("text", (str(folder / "text.jsonl"),), 20)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def left_by(folder: Path) -> dict:
    """All that a run left which is not a time; the quarantine sorted, as streams write by turns."""
    newest = checkpoint.latest(folder)
    checkpoint.check(newest)
    assert not list(folder.glob(".step-*"))
    files = (folder / "quarantine").glob("*")
    quarantine = [f"{path.name} {json.dumps(line, sort_keys=True)}" for path in files for line in lines_of(path)]
    metrics = [{k: v for k, v in line.items() if k not in TIMES} for line in lines_of(folder / "metrics.jsonl")]
    return {
        "link": (folder / "checkpoint").resolve().name,
        "state": checkpoint.read_json(newest, "state.json"),
        "metrics": metrics,
        "quarantine": sorted(quarantine),
        "tensors": tensors_of(newest),
    }


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / checkpoint.SHARDS).is_dir():
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        dcp_to_torch_save(folder / checkpoint.SHARDS, folder.parent / "whole.pt")
        return torch.load(folder.parent / "whole.pt")
    files = ("model.safetensors", "optimizer.safetensors")
    return {name: x for file in files for name, x in checkpoint.read_tensors(folder, file).items()}


def assert_same(found: dict, truth: dict) -> None:
    assert set(found["tensors"]) == set(truth["tensors"])
    for name, value in truth["tensors"].items():
        assert torch.equal(found["tensors"][name], value), name
    for part in truth:
        if part != "tensors":
            assert found[part] == truth[part], part


def quiet(folder: Path, run: Run) -> Display:
    return Display(folder, run.train, out=io.StringIO())


def go_on(run: Run, folder: Path, stop: int | None = None, number: int = signal.SIGTERM) -> dict:
    """Resumed, or begun, to its end; or until a signal that comes amid step `stop`, whose state is given then."""
    signalled = At(begins={stop: lambda: os.kill(os.getpid(), number)})
    trainer = Trainer(run, folder, quiet(folder, run), True, observers=[signalled], backend="eager")
    if stop is None:
        trainer.fit()
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
        assert checkpoint.latest(folder).name == f"step-{stop:08d}"
    return checkpoint.read_json(checkpoint.latest(folder), "state.json")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a run leaves that nobody stops, made once for each run."""

    @functools.cache
    def truth(run: Run) -> dict:
        folder = tmp_path_factory.mktemp("truth")
        go_on(run, folder)
        return left_by(folder)

    return truth


SHORT = {"steps": 8, "save_every": 4}


@pytest.mark.parametrize("stops", [(1,), (5,), (2, 4, 7)], ids=["at once", "later", "three times"])
def test_a_run_resumed_within_an_epoch_ends_with_the_same_bits(stops, undisturbed, tmp_path):
    """Weights, moments, random state, position of the data, all metrics and the list of bad records."""
    run = small_run(**SHORT)
    for stop in stops:
        state = go_on(run, tmp_path, stop)
        stream = state["data"]["streams"]["0"]
        assert state["step"] == stop
        assert len(stream["waiting"]) > 10  # documents of other batches
        assert stream["position"] < 600
    go_on(run, tmp_path)
    assert_same(left_by(tmp_path), undisturbed(run))


@pytest.mark.parametrize("stops", [(3,), (1, 2, 6)], ids=["once", "three times"])
def test_a_run_resumed_over_the_ends_of_epochs_ends_with_the_same_bits(stops, tiny, undisturbed, tmp_path):
    run = changed(small_run(**SHORT), sources=tiny)
    records, positions = 30 + 24 + 3, []
    for stop in (*stops, None):
        positions.append(go_on(run, tmp_path, stop)["data"]["streams"]["0"]["position"])
    assert records < positions[-2] < positions[-1] - records  # whole epochs before and after the last stop
    truth = undisturbed(run)
    assert truth["state"]["data"]["streams"]["0"]["skipped"] > 10
    assert_same(left_by(tmp_path), truth)


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_run_resumed_amid_the_turn_of_its_streams_ends_with_the_same_bits(stop, tiny, undisturbed, tmp_path):
    """Four packers, two micro-batches a step: an odd step ends between the second and the third."""
    run = changed(small_run(**SHORT), streams=4, sources=tiny, buffer=160)
    assert go_on(run, tmp_path, stop)["data"]["taken"] % 4 == 2 * (stop % 2)
    go_on(run, tmp_path)
    assert_same(left_by(tmp_path), undisturbed(run))


def test_a_run_with_worker_processes_resumed_ends_with_the_bits_of_one_without(tiny, undisturbed, tmp_path):
    run = changed(small_run(**SHORT), sources=tiny)
    go_on(changed(run, workers=2), tmp_path, 3)
    go_on(changed(run, workers=2), tmp_path)
    assert_same(left_by(tmp_path), undisturbed(run))


def test_batches_made_ahead_are_made_again(tiny, undisturbed, tmp_path, monkeypatch):
    """A thread had drawn more than the run took: on a GPU always, here by order."""
    run = changed(small_run(**SHORT), sources=tiny, streams=4, buffer=160)
    truth = undisturbed(run)
    monkeypatch.setitem(feed.AHEAD, "cpu", 3)
    for stop in (3, 6, None):
        go_on(run, tmp_path, stop)
    found = left_by(tmp_path)
    for drawn_ahead in (found, truth):  # may be listed already
        drawn_ahead["quarantine"] = sorted(set(found["quarantine"]) & set(truth["quarantine"]))
    assert_same(found, truth)


def test_a_mixture_of_experts_resumed_ends_with_the_same_bits(undisturbed, tmp_path):
    run = dataclasses.replace(small_run(**SHORT), model=small_model(experts=4))
    go_on(run, tmp_path, 3)
    go_on(run, tmp_path)
    assert_same(left_by(tmp_path), undisturbed(run))


def test_a_compiled_run_resumed_ends_with_the_same_bits(undisturbed, tmp_path):
    run = small_run(**SHORT, compile=True)
    torch.compiler.reset()
    go_on(run, tmp_path, 3)
    torch.compiler.reset()
    go_on(run, tmp_path)
    torch.compiler.reset()
    assert_same(left_by(tmp_path), undisturbed(run))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_saves_the_step_it_comes_in(number, tmp_path):
    run = small_run(**SHORT)
    before = signal.getsignal(number)
    assert go_on(run, tmp_path, 2, number)["step"] == 2
    assert len(lines_of(tmp_path / "metrics.jsonl")) == 2
    assert signal.getsignal(number) == before


class Process:
    """resume_runs.py, once or twice by torchrun, with pid files and run.json beside the folder."""

    def __init__(self, run: Run, folder: Path, processes: int = 1, *more: str):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder.with_name("run.json")
        path.write_text(json.dumps(to_dict(run)))
        torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
        command = [sys.executable, *(torchrun if processes > 1 else ()), resume_runs.__file__, str(path), str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.pids = [folder.with_name(f"pid-{rank}") for rank in range(processes)]
        for path in self.pids:
            path.unlink(missing_ok=True)
        with folder.with_name("stderr.txt").open("w") as errors:
            self.popen = subprocess.Popen([*command, *more], env=environment, stderr=errors)
        self.begun = {path.name for path in folder.glob("*step-*")}

    def wait_for(self, seen) -> None:
        deadline = time.monotonic() + 120
        while not seen():
            assert self.popen.poll() is None, f"ended before: {self.errors()}"
            assert time.monotonic() < deadline
            time.sleep(0.0005)

    def wait_for_lines(self, count: int) -> None:
        """More than there were when it was started."""
        path = self.folder / "metrics.jsonl"
        self.wait_for(lambda: path.exists() and path.read_bytes().count(b"\n") >= count)

    def wait_for_save(self, count: int) -> None:
        """Until it begins to write its count-th checkpoint."""
        found: set[str] = set()

        def seen() -> bool:
            found.update(path.name for path in self.folder.glob(".step-*.partial"))
            return len(found - self.begun) >= count

        self.wait_for(seen)

    def kill(self) -> None:
        """All of its processes: those of torchrun are in sessions of their own."""
        self.wait_for(lambda: all(path.exists() and path.read_text() for path in self.pids))
        pids = [int(path.read_text()) for path in self.pids]
        for pid in {self.popen.pid, *pids}:
            os.kill(pid, signal.SIGKILL)
        self.popen.wait()
        for pid in {*pids} - {self.popen.pid}:
            while Path(f"/proc/{pid}").exists():
                time.sleep(0.001)

    def finish(self) -> None:
        assert self.popen.wait(1200) == 0, self.errors()

    def errors(self) -> str:
        return self.folder.with_name("stderr.txt").read_text()[-2000:]


def test_sigusr1_saves_and_exits_and_the_run_goes_on_with_the_same_bits(tiny, undisturbed, tmp_path):
    run = changed(small_run(steps=20, save_every=50), sources=tiny)
    folder = tmp_path / "run"
    process = Process(run, folder)
    process.wait_for_lines(1)
    process.popen.send_signal(signal.SIGUSR1)
    assert process.popen.wait(60) == -signal.SIGINT or process.popen.returncode > 0
    assert "Stopped: stopped at step" in process.errors()
    reached = checkpoint.read_json(checkpoint.latest(folder), "state.json")["step"]
    assert 0 < reached == len(lines_of(folder / "metrics.jsonl")) < 20
    go_on(run, folder)
    assert_same(left_by(folder), undisturbed(run))


def where(folder: Path) -> str:
    """What a kill left."""
    steps = [line["step"] for line in lines_of(folder / "metrics.jsonl")]
    partial = [f"{p.name} with {sum(x.is_file() for x in p.rglob('*'))} files" for p in folder.glob(".step-*.partial")]
    newest = checkpoint.latest(folder)
    line = f"step {steps[-1] if steps else 0} done, {newest.name if newest else 'nothing'} saved"
    return line + (f", amid {', '.join(partial)}" if partial else "")


def killed(run: Run, folder: Path, processes: int, *, amid_a_save: bool, draw: random.Random) -> bool:
    """Begin or go on with a run and kill it at a moment that is drawn; whether a checkpoint is left half-written."""
    process = Process(run, folder, processes)
    if amid_a_save:
        process.wait_for_save(draw.randint(processes, 3))
        time.sleep(draw.uniform(0, 0.02))
    else:
        process.wait_for_lines(len(lines_of(folder / "metrics.jsonl")) + draw.randint(0, 4))
        time.sleep(draw.uniform(0, 0.1 * processes))
    process.kill()
    print(f"killed at {where(folder)}")
    return bool(list(folder.glob(".step-*.partial")))


@pytest.mark.slow
def test_killed_at_thirty_random_moments_a_run_ends_with_the_same_bits_and_loses_nothing(tiny, undisturbed, tmp_path):
    """Amid steps and saves and at any other time; each metric and each bad record is there once. Prints each moment."""
    run, folder, draw = changed(small_run(steps=150, save_every=2), sources=tiny), tmp_path / "run", random.Random(0)
    amid = sum(killed(run, folder, 1, amid_a_save=bool(kill % 2), draw=draw) for kill in range(30))
    print(f"{amid} of 30 amid a save")
    process = Process(run, folder)
    process.finish()
    found = left_by(folder)
    assert [line["step"] for line in found["metrics"]] == list(range(1, 151))
    assert len(found["quarantine"]) == BAD + 1  # and the damage of a shard
    assert_same(found, undisturbed(run))
    assert amid >= 3


@pytest.mark.slow
def test_killed_at_each_change_of_a_file_a_run_ends_with_the_same_bits_and_loses_nothing(tiny, undisturbed, tmp_path):
    """One run after another, resumed and killed at the first, second, … file it makes, renames, empties or deletes."""
    run, killed = changed(small_run(steps=6, save_every=2, keep=1), sources=tiny, buffer=160), tmp_path / "killed"

    def dies_amid_step_4():
        Trainer(run, killed, quiet(killed, run), True, observers=[At(begins={4: resume_runs.die})]).fit()

    assert not resume_runs.forked(dies_amid_step_4)
    process = Process(run, tmp_path / "runs" / "all", 1, str(killed))
    process.finish()
    notes = sorted((tmp_path / "runs" / "all").glob("*.txt"), key=lambda note: int(note.stem))
    assert len(notes) > 30
    wrong = []
    for note in notes:
        try:
            assert_same(left_by(note.with_suffix("")), undisturbed(run))
        except AssertionError as error:
            wrong.append(f"{note.read_text()}: {str(error).splitlines()[0]}")
    print(*(note.read_text() for note in notes), sep="\n")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_two_processes_killed_six_times_end_with_the_same_bits(tiny, tmp_path):
    """Sharded checkpoints are written beside the steps: kills fall amid that, too. Prints each moment."""
    run = changed(small_run(steps=60, save_every=3, accumulate=4), sources=tiny, streams=4, buffer=160)
    run, draw = dataclasses.replace(run, parallel=Parallel()), random.Random(0)
    Process(run, tmp_path / "truth" / "run", 2).finish()
    folder = tmp_path / "killed" / "run"
    for kill in range(6):
        killed(run, folder, 2, amid_a_save=bool(kill % 2), draw=draw)
    Process(run, folder, 2).finish()
    found = left_by(folder)
    assert [line["step"] for line in found["metrics"]] == list(range(1, 61))
    assert BAD < len(set(found["quarantine"])) == len(found["quarantine"]) <= 2 * BAD + 1  # of each process
    assert_same(found, left_by(tmp_path / "truth" / "run"))


def drawn(loader) -> collections.Counter:
    """Documents that wait, by their keys; of those that are cut the first batch has the head."""
    return collections.Counter(waiting.whole.key for waiting in loader.waiting if not waiting.start)


def heads(batch) -> list[str]:
    return [key for key in batch.keys if "@" not in key]


def assert_each_once_an_epoch(came: collections.Counter, sources, positions: int) -> None:
    """Of each source no document came more than once more than another, and none of all that were drawn is missing."""
    assert came.total() == positions
    for source in sources:
        keys = [f"{path}:" for path in source.paths]
        counts = [count for key, count in came.items() if key.startswith(tuple(keys))]
        assert max(counts) - min(counts) <= 1


def test_two_hundred_batches_of_the_demo_are_full_and_hold_each_document_once():
    run, batches, images = DIGITS_RUN.data, 200, 0
    loader = make_streams(DIGITS_RUN, TextTokenizer(run.tokenizer), None).loaders[0]
    came, tokens = collections.Counter(), 0
    for _ in range(batches):
        batch = next(loader)
        came.update(heads(batch))
        tokens += batch.used_tokens
        images += len(batch.media.grids.sizes)
    fill, image_fill = tokens / batches / run.tokens, images / batches / run.images
    print(f"{fill:.1%} of the tokens, {image_fill:.1%} of the images")
    assert fill >= 0.96  # captions and notations, of 22 tokens an image, exhaust the images first
    assert image_fill >= 0.97
    assert_each_once_an_epoch(came + drawn(loader), run.sources, loader.position)


@pytest.mark.parametrize("streams", [1, 4])
def test_no_document_is_lost_or_repeated_over_many_epochs(streams, tiny):
    """Nor more than once more than another, however many packers share the records."""
    run = changed(small_run(), sources=tiny, streams=streams, buffer=160)
    packers = make_streams(run, TextTokenizer(run.data.tokenizer), None)
    came = collections.Counter()
    for _ in range(60):
        came.update(heads(next(packers)))
    loaders, skipped = packers.loaders.values(), packers.skipped
    records = max(loader.drawn for loader in loaders)
    for loader in loaders:  # all up to the same position of the stream
        came += drawn(loader)
        for position in range(loader.position, loader.first + records * streams, streams):
            record = loader.mixture[position]
            came.update(document.key for document in record.documents)
            skipped += record.reason is not None
    assert min(came.values()) > 3
    assert_each_once_an_epoch(came, run.data.sources, records * streams - skipped)
