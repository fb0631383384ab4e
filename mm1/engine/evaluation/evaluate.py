"""Zero- and few-shot evaluation: prompts of shots and query through the Engine, predictions as they come, scores.

A folder holds `N-shot.jsonl`: its first line says with which settings, then one line for each sample. A second run with
the same settings does what is missing; of a line cut off by a crash nothing remains.
"""

import hashlib
import json
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mm1.engine.data.document import Document
from mm1.engine.data.images import ImagePolicy, read
from mm1.engine.data.record import DataError, at_least
from mm1.engine.evaluation import benchmarks
from mm1.engine.evaluation.benchmarks import Benchmark, Key, Sample
from mm1.engine.evaluation.cider import cider
from mm1.engine.evaluation.vqa import accuracy
from mm1.engine.fewshot import Piece, Retrieval, fingerprint, joined, piece
from mm1.engine.generate import Engine, Request, policy_of
from mm1.engine.model import MM1
from mm1.engine.sampling import Sampling

CHOICES = ("random", "fixed", "similar")
CACHED = 1 << 30  # bytes of shots' pixels
TEXT = 64  # tokens to an image that the cache has room for
SPARE = 64  # candidates beyond the shots, for those that cannot be read or are of the query's image
METRICS = {"cider": "CIDEr", "vqa": "accuracy"}


@dataclass(frozen=True)
class How:
    """How shots are chosen and shown.

    choose: at random for each query, the same for all, or those whose images are most like its own, one of each image.
    text_shots: zero-shot prompts begin with two shots without their images, as Flamingo's do and MM1's do not. high:
    only so many of a prompt's last images as the model was trained, the others without sub-images.
    """

    choose: str = "random"
    seed: int = 0
    text_shots: bool = False
    high: int | None = None

    def __post_init__(self):
        if self.choose not in CHOICES:
            raise DataError(f"choose is {self.choose!r}, expected one of {', '.join(CHOICES)}")
        at_least(0, high=self.high)


def samples_of(
    name: str, data: Sequence[Path], images: Path | None = None, split: str | None = None,
    shots_from: Sequence[Path] = (), limit: int | None = None, seed: int = 0,
) -> tuple[list[Sample], list[Sample]]:  # fmt: skip
    """What is evaluated, and what shots are drawn from. limit: at most so many, drawn with `seed`."""
    split = split or benchmarks.benchmark(name).split
    if not data:
        raise DataError("no data: expected the benchmark's folder, or its files")
    at_least(1, limit=limit)
    folder = images or (data[0] if data[0].is_dir() else data[0].parent)
    where = benchmarks.Images(folder)
    samples = benchmarks.read(name, benchmarks.find(name, data, split), where, split)
    pool = benchmarks.read_pool(name, data, shots_from, where, samples)
    if limit is not None and limit < len(samples):
        samples = [samples[i] for i in sorted(random.Random(seed).sample(range(len(samples)), limit))]
    return samples, pool


def evaluate(
    model: MM1, name: str, samples: Sequence[Sample], pool: Sequence[Sample], out: Path, *,
    shots: Sequence[int] = (0, 4, 8), how: How = How(), batch: int = 64, weights: str | None = None,
    display: TextIO | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Scores of 0 to 100 (CIDEr · 100, or accuracy in percent) for each number of shots, drawn from `pool`.

    A sample whose image cannot be read is counted, listed, and scored as an empty prediction. Samples without
    references give a submission instead of a score. batch, weights: of Engine. Raises DataError if `out` holds
    predictions by other settings.
    """
    benchmark = benchmarks.benchmark(name)
    at_least(1, batch=batch)
    if not shots or min(shots) < 0:
        raise DataError(f"shots are {list(shots)}, expected numbers ≥ 0")
    unanswered = [sample for sample in samples if not sample.references]
    if unanswered and len(unanswered) < len(samples):
        raise DataError(f"{name}: {unanswered[0].key}: no references, which others have")
    pool = [sample for sample in pool if sample.references]
    common = {"benchmark": name, **vars(how), "model": fingerprint(model), "weights": weights,
              "samples": _digest(samples), "pool": _digest(pool)}  # fmt: skip
    logs = {n: Log(out / f"{n}-shot.jsonl", {**common, "shots": n}) for n in sorted(set(shots))}
    prompts = Prompts(model, benchmark, pool, how, out / "features.npz")
    engine: Engine | None = None
    results = []
    for n, log in sorted(logs.items(), reverse=True):  # the longest first: it says how large the cache has to be
        todo = sorted((s for s in samples if s.key not in log.rows), key=lambda s: str(s.image))
        if todo:
            prompts.check(n, todo)
            engine = engine or _engine(prompts, n, min(batch, len(samples)), weights)
            with log, _Progress(f"{name} {n}-shot", len(samples), len(log.rows), display or sys.stderr) as progress:
                _run(engine, benchmark, partial(prompts.document, n), todo, log, progress)
        results.append({"shots": n, **_summary(benchmark, samples, log)})
        if unanswered:
            predictions = {sample.key: log.rows[sample.key]["prediction"] for sample in samples}
            file = out / f"{n}-shot-submission.json"
            file.write_text(json.dumps(benchmarks.submission(name, predictions)))
            results[-1]["submission"] = str(file)
    shots_left_out = {str(path): why for path, why in prompts.unreadable.items()}
    return {"benchmark": name, "metric": benchmark.metric, **vars(how), "results": results[::-1],
            "unreadable_shots": shots_left_out}  # fmt: skip


def show(found: dict[str, Any]) -> str:
    """A table of the results."""
    metric = METRICS[found["metric"]]
    lines = [f"{found['benchmark']}, shots {found['choose']}, seed {found['seed']}", f"  shots  {metric:>9}  samples"]
    for row in found["results"]:
        score = "-" if row["score"] is None else f"{row['score']:.2f}"
        lines.append(f"  {row['shots']:>5}  {score:>9}  {row['samples']:>7}")
        if row["submission"]:
            lines[-1] += f"  no answers to score by; submission: {row['submission']}"
        if row["unreadable"]:
            lines[-1] += f"  {len(row['unreadable'])} of them unreadable, counted as wrong"
    bad = {why for row in found["results"] for why in row["unreadable"].values()}
    lines += [f"unreadable: {why}" for why in sorted(bad)]
    lines += [f"no shot, because unreadable: {why}" for why in sorted(found["unreadable_shots"].values())]
    return "\n".join(lines)


class Log:
    """Rows by key, in a file that grows as they come."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.rows = path, dict[Key, dict[str, Any]]()
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        try:
            first, *rows = [json.loads(line) for line in whole.splitlines()] or [{"settings": settings}]
            held = first["settings"]
            self.rows = {row["key"]: row for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not a file of predictions: {error}") from None
        other = [f"{k} {held.get(k)!r} instead of {v!r}" for k, v in settings.items() if held.get(k) != v]
        if other:
            raise DataError(f"{path} holds predictions by other settings, {', '.join(other)}: choose another folder")
        with path.open("r+b" if data else "wb") as file:
            file.truncate(len(whole))
            if not whole:
                file.write(_line({"settings": settings}))

    def __enter__(self):
        self.file = self.path.open("ab")
        return self

    def __exit__(self, *_):
        self.file.close()

    def add(self, row: dict[str, Any]) -> None:
        self.rows[row["key"]] = row
        self.file.write(_line(row))
        self.file.flush()


class Prompts:
    """Documents of shots and a query. What a shot comes to is kept: it is read, resized and encoded once."""

    def __init__(self, model: MM1, benchmark: Benchmark, pool: Sequence[Sample], how: How, features: Path):
        self.model, self.benchmark, self.pool, self.how, self.features = model, benchmark, pool, how, features
        self.high = policy_of(model)
        self.low = self.high if how.high is None else policy_of(model, parts=1)
        self.retrieval: Retrieval | None = None
        self.candidates: list[int] = []  # shots, by their number in it
        self.near: dict[Path, list[int]] = {}  # shots like an image, the most alike last
        self.unreadable: dict[Path, str] = {}  # shots
        most = CACHED // (_views(self.high) * self.high.longest * self.high.patch**2 * 3)
        self.piece = lru_cache(most)(self._piece)

    def check(self, n: int, samples: Sequence[Sample]) -> None:
        """Finds the shots that are like these samples, if they are to be. Raises DataError if there are not enough."""
        n = n or 2 * self.how.text_shots
        if n and len({sample.image for sample in self.pool}) <= n:
            raise DataError(f"{len(self.pool)} answered samples to draw shots from, expected over {n}")
        if not n or self.how.choose != "similar":
            return
        first = {sample.image: i for i, sample in reversed(list(enumerate(self.pool)))}
        shots, queries = [], []
        self.retrieval = self.retrieval or Retrieval(
            self.model, _readable(first, shots, self.unreadable), file=self.features
        )
        self.candidates = self.candidates or [first[path] for path in shots]
        near = self.retrieval.nearest(_readable((sample.image for sample in samples), queries, {}), n)
        self.near = {path: [self.candidates[i] for i in of] for path, of in zip(queries, near)}

    def document(self, n: int, sample: Sample) -> tuple[Document, list[Key]] | str:
        """And the keys of its shots; or why the query's image cannot be read."""
        try:
            image = read(sample.image)
        except DataError as error:
            return str(error)
        bare = n == 0 and self.how.text_shots
        n = 2 if bare else n
        pieces, keys = [], []
        for i in self._order(sample, n):
            if len(keys) == n:
                break
            last = self.how.high is None or n - len(keys) < self.how.high
            if self.pool[i].image != sample.image and (found := self.piece(i, bare, last)):
                pieces.append(found)
                keys.append(self.pool[i].key)
        if len(keys) < n:
            raise DataError(f"{sample.key}: {len(keys)} readable shots, expected {n}")
        last = self.how.high is None or self.how.high > 0
        query = piece(self.model, self.benchmark.query(sample, image), self.high if last else self.low)
        return joined(self.model, [*pieces, query]), keys

    def _order(self, sample: Sample, n: int) -> Sequence[int]:
        """Of shots, with spare ones behind."""
        if not n:
            return []
        if self.how.choose == "similar":
            return self.near[sample.image]
        draw = random.Random(self.how.seed if self.how.choose == "fixed" else f"{self.how.seed} {sample.key}")
        return draw.sample(range(len(self.pool)), min(len(self.pool), n + SPARE))

    def _piece(self, i: int, bare: bool, high: bool) -> Piece | None:
        sample = self.pool[i]
        try:
            shot = self.benchmark.shot(sample, read(sample.image))
        except DataError as error:
            self.unreadable[sample.image] = str(error)
            return None
        return piece(self.model, (shot.text if bare else shot).shown, self.high if high else self.low)


def _views(policy: ImagePolicy) -> int:
    """That an image becomes."""
    return 1 if policy.parts == 1 else 1 + policy.parts**2


def _readable(paths: Iterable[Path], found: list[Path], missed: dict[Path, str]) -> Iterator[Any]:
    """Images, each once, and where they are."""
    for path in dict.fromkeys(paths):
        try:
            image = read(path)
        except DataError as error:
            missed[path] = str(error)
            continue
        found.append(path)
        yield image


def _engine(prompts: Prompts, n: int, batch: int, weights: str | None) -> Engine:
    """With a cache for `batch` prompts, at least four, that have TEXT tokens to each image."""
    slots = prompts.model.config.connector.tokens
    most = n + 1 if prompts.how.high is None else min(n + 1, prompts.how.high)  # images with sub-images
    images = most * _views(prompts.high) + (n + 1 - most) * _views(prompts.low)
    length = images * slots + (n + 1) * TEXT + prompts.benchmark.max_tokens
    return Engine(prompts.model, tokens=max(batch, 4) * length, batch=batch, queue=batch, weights=weights)


def _run(
    engine: Engine, benchmark: Benchmark, document: Callable, todo: Sequence[Sample], log: Log, progress: "_Progress"
):
    """Threads read and encode the next prompts while the engine works."""
    sampling = Sampling(benchmark.max_tokens, stop=benchmark.stop)
    coming, running = deque[tuple[Sample, Future]](), list[tuple[Request, Sample, list[Key]]]()
    ahead, left = 2 * engine.batch, iter(todo)
    threads = ThreadPoolExecutor(4 if engine.device.type == "cuda" else 1)  # beside all cores they would hinder
    try:
        while True:
            while len(coming) < ahead and (sample := next(left, None)):
                coming.append((sample, threads.submit(document, sample)))
            if not (coming or running):
                return
            while coming and len(engine.waiting) < engine.queue and (coming[0][1].done() or not running):
                sample, future = coming.popleft()
                found = future.result()
                try:
                    if isinstance(found, str):
                        raise DataError(found)
                    running.append((engine.submit(found[0], sampling), sample, found[1]))
                except DataError as error:  # its image, or it is too long
                    log.add(_row(benchmark, sample, [], "") | {"unreadable": str(error)})
                    progress.add()
            engine.step()
            for request, sample, keys in [r for r in running if r[0].finish]:
                log.add(_row(benchmark, sample, keys, benchmark.answer(request.text)))
                progress.add()
            running = [r for r in running if not r[0].finish]
    finally:
        for request, *_ in running:
            engine.cancel(request)
        threads.shutdown(cancel_futures=True)


def _row(benchmark: Benchmark, sample: Sample, keys: list[Key], prediction: str) -> dict[str, Any]:
    row = {"key": sample.key, "shots": keys, "prediction": prediction, "references": sample.references}
    if benchmark.metric == "vqa" and sample.references:
        row["score"] = accuracy(prediction, sample.references)
    return row


def _summary(benchmark: Benchmark, samples: Sequence[Sample], log: Log) -> dict[str, Any]:
    rows = [log.rows[sample.key] for sample in samples]
    score = None
    if rows[0]["references"] and benchmark.metric == "vqa":
        score = 100 * sum(row["score"] for row in rows) / len(rows)
    elif rows[0]["references"]:
        texts, references = ({row["key"]: row[field] for row in rows} for field in ("prediction", "references"))
        score = 100 * cider(texts, references)[0]
    bad = {str(row["key"]): row["unreadable"] for row in rows if "unreadable" in row}
    return {"score": score, "samples": len(rows), "unreadable": bad, "submission": None}


def _digest(samples: Sequence[Sample]) -> str:
    found = hashlib.sha256()
    for sample in samples:
        found.update(json.dumps([sample.key, sample.question, sample.references]).encode())
    return found.hexdigest()[:16]


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


class _Progress:
    """A live bar on a terminal, a line every five seconds elsewhere."""

    def __init__(self, what: str, total: int, done: int, out: TextIO):
        self.what, self.total, self.done, self.begun_with = what, total, done, done
        self.console = Console(file=out)
        self.start = self.printed = time.monotonic()
        bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.live = Progress(*bar, console=self.console) if self.console.is_terminal else None

    def __enter__(self):
        if self.live:
            self.task = self.live.add_task(self.what, total=self.total, completed=self.done)
            self.live.start()
        return self

    def __exit__(self, *_):
        if self.live:
            self.live.stop()

    def add(self) -> None:
        self.done += 1
        if self.live:
            self.live.advance(self.task)
        elif time.monotonic() - self.printed > 5 or self.done == self.total:
            self.printed = time.monotonic()
            rate = (self.done - self.begun_with) / max(self.printed - self.start, 1e-9)
            left = (self.total - self.done) / rate
            line = f"{self.what} {self.done}/{self.total} {rate:.1f}/s left {left:.0f}s"
            print(line, file=self.console.file, flush=True)
