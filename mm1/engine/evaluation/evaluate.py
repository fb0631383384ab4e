"""Evaluate zero- and few-shot: run prompts of shots and query through the Engine, log predictions, and score them.

The output folder has a file for each number of shots and each seed that shots are drawn with, `4-shot-seed-0.jsonl`,
or `0-shot.jsonl` where no shots are drawn. Its first line has the settings, and each following line is a sample. A
second run with the same settings evaluates the missing samples; a line that a crash truncated is discarded.
"""

import hashlib
import json
import random
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from mm1.engine.evaluation import benchmarks
from mm1.engine.evaluation.benchmarks import Benchmark
from mm1.engine.evaluation.bootstrap import interval
from mm1.engine.evaluation.choices import LETTERS
from mm1.engine.evaluation.config import Decoding, ShotSettings
from mm1.engine.evaluation.features import fingerprint
from mm1.engine.evaluation.log import Counter, Log
from mm1.engine.evaluation.prompts import Asked, Prompts
from mm1.engine.evaluation.samples import Images, Key, Sample
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.request import Request
from mm1.engine.infer.sampling import Sampling
from mm1.engine.models.mm1 import MM1
from mm1.errors import UserError, at_least, require

TEXT = 64  # tokens of text for each image that the cache is sized for


def samples_of(
    name: str, data: Sequence[Path], images: Path | None = None, split: str | None = None,
    shots_from: Sequence[Path] = (), limit: int | None = None, seed: int = 0,
) -> tuple[list[Sample], list[Sample]]:  # fmt: skip
    """Return the samples to evaluate, and the samples that shots are drawn from.

    data: the benchmark's folder or files; images: the images' folder (default: the data's); split: None for the
    benchmark's default; shots_from: folder or files of the shots; limit: largest number of samples to evaluate, drawn
    by `seed`. Raises UserError.
    """
    split = split or benchmarks.benchmark(name).split
    if not data:
        raise UserError("no data: expected the benchmark's folder, or its files")
    at_least(1, limit=limit)
    folder = images or (data[0] if data[0].is_dir() else data[0].parent)
    index = Images(folder)
    samples = benchmarks.read(name, benchmarks.find(name, data, split), index, split)
    pool = benchmarks.read_pool(name, data, shots_from, index, samples)
    if limit is not None and limit < len(samples):
        samples = [samples[i] for i in sorted(random.Random(seed).sample(range(len(samples)), limit))]
    return samples, pool


class _Run(NamedTuple):
    """Identify one run: a number of shots, the seed that draws them, None without a draw, and its predictions."""

    shots: int
    seed: int | None
    log: Log


def evaluate(
    model: MM1, name: str, samples: Sequence[Sample], pool: Sequence[Sample], out: Path, *,
    shots: Sequence[int] = (0, 4, 8), shot_settings: ShotSettings = ShotSettings(), seeds: Sequence[int] = (0,),
    decoding: Decoding = Decoding(), batch: int = 64, weights: str | None = None, display: TextIO | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return a report with scores from 0 to 100 (CIDEr · 100, or accuracy in percent) for each number of shots.

    name: of the benchmark; pool: samples that shots are drawn from; out: folder of the predictions; batch, weights:
    settings of Engine; display: where progress is shown (default: standard error). seeds: one evaluation for each seed
    of the draw; the score is their mean, and sd their sample standard deviation. The 95 % intervals come from
    resampling the questions. The interval of a mean over seeds uses the same questions for every seed, so it does not
    cover the variation between shots; sd does.

    A sample whose image cannot be read is listed and scored as an empty prediction. Samples without references are
    counted and left out; if no sample has references, a submission is written instead of scores. Raises UserError if
    `out` has predictions with other settings.
    """
    benchmark = benchmarks.benchmark(name)
    at_least(1, batch=batch)
    shots, seeds = sorted(set(shots)), list(dict.fromkeys(seeds))
    require(bool(shots) and shots[0] >= 0, "shots", shots, "numbers ≥ 0")
    require(bool(seeds), "seeds", seeds, "at least one")
    normalize = decoding.normalize or benchmark.normalize
    sampling = Sampling(
        benchmark.max_tokens, stop=benchmark.stop, num_beams=decoding.num_beams, length_penalty=decoding.length_penalty
    )
    unanswered = [sample for sample in samples if not sample.references]
    scored = len(unanswered) < len(samples)
    if scored:
        samples = [sample for sample in samples if sample.references]
    pool = [sample for sample in pool if sample.references]
    settings = {**vars(shot_settings), **vars(decoding), "normalize": normalize}
    common = {"benchmark": name, **settings, "model": fingerprint(model), "weights": weights,
              "samples": _digest(samples), "pool": _digest(pool)}  # fmt: skip
    prompts = Prompts(model, benchmark, pool, shot_settings, out / "features")
    runs = []
    for n in reversed(shots):  # the longest prompts first, because they determine the cache's size
        for seed in seeds if prompts.seeded(n) else [None]:
            file = f"{n}-shot" if seed is None else f"{n}-shot-seed-{seed}"
            runs.append(_Run(n, seed, Log(out / f"{file}.jsonl", {**common, "shots": n, "seed": seed})))
    engine: Engine | None = None
    for n, seed, log in runs:
        todo = sorted((s for s in samples if s.key not in log.rows), key=lambda s: str(s.image))
        if todo:
            prompts.check(n, todo)
            size = min(batch, len(samples))
            engine = engine or sized_engine(prompts, n, size, weights, sampling, [*samples, *pool])
            title = f"{name} {n}-shot" + (f" seed {seed}" if len(seeds) > 1 and seed is not None else "")
            with log, Counter(title, len(samples), len(log.rows), display) as progress:
                worker = _Worker(engine, benchmark, sampling, normalize, log, progress, size)
                worker.run(lambda sample, n=n, seed=seed or 0: prompts.ask(n, sample, seed), todo)
    results = []
    for n in shots:
        own = [run for run in runs if run.shots == n]
        results.append({"shots": n, **_summary(name, benchmark, samples, own, scored)})
    omitted = None
    if scored and unanswered:
        omitted = {"samples": len(unanswered), "of": len(unanswered) + len(samples), "such_as": unanswered[0].key}
    unreadable_shots = {str(path): why for path, why in prompts.unreadable.items()}
    return {"benchmark": name, "metric": benchmark.metric.name, **settings, "seeds": seeds,
            "results": results, "unanswered": omitted, "unreadable_shots": unreadable_shots}  # fmt: skip


def show(report: dict[str, Any]) -> str:
    """Return a report's table as text."""
    title = benchmarks.benchmark(report["benchmark"]).metric.title
    seeds = f"seed{'s' * (len(report['seeds']) > 1)} {' '.join(map(str, report['seeds']))}"
    beams = f", {report['num_beams']} beams, length penalty {report['length_penalty']:g}" * (report["num_beams"] > 1)
    lines = [f"{report['benchmark']}, shots {report['choose']}, {seeds}{beams}",
             f"  shots  {title:>9}  {'95 % interval':>17}  {'sd':>6}  samples"]  # fmt: skip
    for row in report["results"]:
        lines.append(_line(f"{row['shots']:>5}", row, row["sd"], row["samples"]))
        if row["unreadable"]:
            lines[-1] += f"  {len(row['unreadable'])} of them unreadable, counted as wrong"
        for one in row["seeds"]:
            file = f"  no answers to score by; submission: {one['submission']}" if one["submission"] else ""
            if len(row["seeds"]) > 1:
                lines.append(_line(f"seed {one['seed']}", one) + file)
            else:
                lines[-1] += file
        lines += [_line(f"  {name}", group, None, group["samples"]) for name, group in row["groups"].items()]
    if report["unanswered"]:
        count, total, key = report["unanswered"].values()
        lines.append(f"{count} of {total} samples have no references, such as {key!r}: left out")
    bad = {why for row in report["results"] for why in row["unreadable"].values()}
    lines += [f"unreadable: {why}" for why in sorted(bad)]
    lines += [f"no shot, because unreadable: {why}" for why in sorted(report["unreadable_shots"].values())]
    return "\n".join(lines)


def _line(name: str, row: dict[str, Any], sd: float | None = None, samples: int | str = "") -> str:
    score = "-" if row["score"] is None else f"{row['score']:.2f}"
    bounds = "" if row["interval"] is None else "{:.2f} – {:.2f}".format(*row["interval"])
    spread = "" if sd is None else f"{sd:.2f}"
    return f"  {name:<5}  {score:>9}  {bounds:>17}  {spread:>6}  {samples:>7}".rstrip()


def sized_engine(
    prompts: Prompts, n: int, batch: int, weights: str | None, sampling: Sampling = Sampling(max_tokens=10),
    samples: Sequence[Sample] = (),
) -> Engine:  # fmt: skip
    """Return an Engine whose cache is large enough for `batch` typical prompts of n shots, and for the longest one.

    A typical prompt has TEXT tokens of text for each image. batch: as in evaluate, but the cache holds at least four
    typical prompts.
    """
    slots, beams = prompts.model.config.images.slots, sampling.num_beams
    high = n + 1 if prompts.settings.high is None else min(n + 1, prompts.settings.high)  # images with sub-images
    images = high * prompts.high.max_views + (n + 1 - high) * prompts.low.max_views
    length = images * slots + (n + 1) * TEXT + beams * prompts.benchmark.max_tokens
    many = max((len(sample.images) for sample in samples), default=1)
    text = max((len("".join((sample.question, *sample.options)).encode()) for sample in samples), default=0)  # ≥ tokens
    longest = (n + 1) * (many * prompts.high.max_views * slots + TEXT + text) + beams * (sampling.max_tokens + 2 * TEXT)
    options = max((len(sample.options) for sample in samples), default=1)
    return Engine(
        prompts.model, tokens=max(max(batch, 4) * length, longest), batch=max(batch, options) * beams,
        queue=batch + options, weights=weights,
    )  # fmt: skip


@dataclass
class _Worker:
    """Run samples through an engine into a log: generate answers, or score a sample's options."""

    engine: Engine
    benchmark: Benchmark
    sampling: Sampling
    normalize: str
    log: Log
    progress: Counter
    batch: int

    def run(self, ask: Callable[[Sample], Asked | str], todo: Sequence[Sample]) -> None:
        """Evaluate all samples. Threads read and encode the next prompts while the engine runs.

        ask: returns a sample's prompt, or the reason why it cannot be made.
        """
        engine = self.engine
        encoding = deque[tuple[Sample, Future]]()
        running: list[tuple[list[Request], Sample, list[Key]]] = []
        remaining = iter(todo)
        threads = ThreadPoolExecutor(4 if engine.device.type == "cuda" else 1)  # on a CPU the engine uses all cores
        try:
            while True:
                count = max(2 * self.batch - len(encoding), 0)
                encoding += [(s, threads.submit(ask, s)) for s in islice(remaining, count)]
                if not (encoding or running):
                    return
                while encoding and len(engine.waiting) < self.batch and (encoding[0][1].done() or not running):
                    sample, future = encoding.popleft()
                    prompt = future.result()
                    try:
                        if isinstance(prompt, str):
                            raise UserError(prompt)
                        running.append((self._submit(prompt), sample, prompt.shots))
                    except UserError as error:  # its image is unreadable, or it is too long
                        self._add(sample, [], "", {"unreadable": str(error)})
                engine.step()
                complete = [r for r in running if all(request.finish for request in r[0])]
                running = [r for r in running if r not in complete]
                for requests, sample, keys in complete:
                    self._add(sample, keys, *self._answer(sample, requests))
        finally:
            for requests, *_ in running:
                for request in requests:
                    engine.cancel(request)
            threads.shutdown(cancel_futures=True)

    def _submit(self, prompt: Asked) -> list[Request]:
        """Submit a prompt once, or once for each of its continuations: all of them, or none."""
        if not prompt.continuations:
            return [self.engine.submit(prompt.document, self.sampling)]
        requests: list[Request] = []
        try:
            for tokens in prompt.continuations:
                requests.append(self.engine.submit_answer(prompt.document, tokens))
        except UserError:
            for request in requests:
                self.engine.cancel(request)
            raise
        return requests

    def _answer(self, sample: Sample, requests: Sequence[Request]) -> tuple[str, dict[str, Any]]:
        """Return the prediction, and further fields of its row."""
        if not sample.options:
            return self.benchmark.metric.clean(requests[0].text), {}
        sums, counts = ([f(request.logprobs) for request in requests] for f in (sum, len))
        values = [total / count for total, count in zip(sums, counts)] if self.normalize == "mean" else sums
        return LETTERS[int(np.argmax(values))], {"logprobs": sums, "tokens": counts}

    def _add(self, sample: Sample, keys: list[Key], prediction: str, extra: dict[str, Any]) -> None:
        row = {"key": sample.key, "shots": keys, "prediction": prediction, "references": sample.references}
        if self.benchmark.metric.alone and sample.references:
            (row["score"],) = self.benchmark.metric.scores([sample], [prediction])
        self.log.add(row | extra)
        self.progress.add()


def _summary(
    name: str, benchmark: Benchmark, samples: Sequence[Sample], runs: Sequence[_Run], scored: bool
) -> dict[str, Any]:
    """Return score, deviation and interval over all seeds, for each seed, and for each group over all seeds."""
    bad: dict[str, str] = {}
    each, scores = [], []
    for _, seed, log in runs:
        predictions = {sample.key: log.rows[sample.key]["prediction"] for sample in samples}
        one: dict[str, Any] = {"seed": seed, "score": None, "interval": None, "submission": None}
        if scored:
            scores.append(benchmark.scores(samples, predictions))
            one |= _mean(np.array(scores[-1]))
        else:
            file = log.path.with_name(f"{log.path.stem}-submission.json")
            file.write_text(json.dumps(benchmarks.submission(name, predictions)))
            one["submission"] = str(file)
        each.append(one)
        bad |= {str(s.key): log.rows[s.key]["unreadable"] for s in samples if "unreadable" in log.rows[s.key]}
    mean: dict[str, Any] = {"score": None, "interval": None}
    groups: dict[str, Any] = {}
    if scored:
        averages = np.mean(scores, axis=0)  # by sample, over the seeds
        mean = _mean(averages)
        for group in dict.fromkeys(group for sample in samples for group in sample.groups):
            members = [group in sample.groups for sample in samples]
            groups[group] = {**_mean(averages[members]), "samples": sum(members)}
    sd = float(np.std([one["score"] for one in each], ddof=1)) if scored and len(each) > 1 else None
    return {**mean, "sd": sd, "samples": len(samples), "groups": groups, "seeds": each, "unreadable": bad,
            "submission": each[0]["submission"]}  # fmt: skip


def _mean(scores: np.ndarray) -> dict[str, Any]:
    return {"score": float(scores.mean()), "interval": list(interval(scores))}


def _digest(samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.key, sample.question, sample.references, sample.options]).encode())
    return digest.hexdigest()[:16]
