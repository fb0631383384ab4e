"""`mm1 <command>`: each command is one function; the work is in the room it belongs to."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mm1.engine.data.tokenizer import tokenizer
from mm1.errors import UserError
from mm1.kernels.device import DEVICES
from mm1.kernels.tuning import TuneError

if TYPE_CHECKING:
    from mm1.bench.record import Record

app = tyro.extras.SubcommandApp()
Positional = tyro.conf.Positional
Many = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
Weights = Literal["int8", "int4", "float8"] | None


@app.command
def demo(out: Path = Path("runs/demo")) -> None:
    """Train a small MM1 on the shipped handwritten digits, then caption and answer about unseen ones."""
    from mm1.engine.demo.digits import demo

    demo(out)


@app.command
def train(
    run: Positional[str],
    out: Path | None = None,
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")] = (),
    resume: bool = False,
    accept_other_data: bool = False,
    profile: bool = False,
) -> None:
    """Train a named size or the run of a TOML file.

    SIGTERM, SIGUSR1 and Ctrl-C save and stop with status 143, or 130 for Ctrl-C.

    Args:
        run: a named size (digits, mm1-3b, …) or a .toml file.
        out: folder for checkpoints and metrics (default: runs/NAME).
        set: one setting, such as train.steps=100; may be repeated.
        resume: continue from the newest whole checkpoint in `out`, or start if there is none.
        accept_other_data: continue although data, seed, budgets or tokenizer are not those of the checkpoint.
        profile: write a trace and a table of parts of four steps to `out`/profile.
    """
    from mm1.engine.run_config import load_run
    from mm1.engine.train.trainer import train

    folder = out or Path("runs") / Path(run).stem
    train(load_run(run, set), folder, resume=resume, profile=profile, accept_other_data=accept_other_data)
    if profile and os.environ.get("RANK", "0") == "0":
        print((folder / "profile" / "table.txt").read_text())


@app.command
def replay(folder: Positional[Path], step: int) -> None:
    """Compute one step of a run again, and say whether its data, the hardware or a kernel makes it differ.

    A run of several processes is replayed under torchrun on as many, or on one within the rounding of its dtype. The
    last line of standard output is one JSON object.

    Args:
        folder: the run's folder.
        step: number of the step, as in metrics.jsonl.
    """
    from mm1.engine.train.replay import replay, show

    report = replay(folder, step)
    if os.environ.get("RANK", "0") == "0":
        print(show(report))
        print(json.dumps(report))


@app.command
def plan(
    run: Positional[str],
    gpus: int = 8,
    device: str = "h200",
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")] = (),
    share: float | None = None,
    network: float = 50.0,
    document: int = 1024,
    imbalance: float = 1.25,
    storage: float = 2.0,
    host_memory: float | None = None,
) -> None:
    """Estimate memory, time and checkpoints of a run on many GPUs, and print what the estimate assumes.

    Args:
        run: a named size (digits, mm1-3b, …) or a .toml file.
        gpus: number of GPUs; eight are one node.
        device: kind of GPU, such as h100, h200, b200 or mi300x.
        set: override one setting, such as parallel.tensor=8; may be repeated.
        share: share of the GPU's peak rate that its operations reach, 0 to 1 (default: 0.40 for dense models, 0.25 for
            mixtures of experts).
        network: GB/s that a GPU sends to other nodes.
        document: tokens of a typical document; attention inside longer ones takes more operations.
        imbalance: tokens that reach the fullest process sharing experts, over the mean (1: perfectly balanced).
        storage: GB/s that a node writes to and reads from the checkpoints' storage; the default is an NVMe drive or an
            NFS server.
        host_memory: GB of a node's host memory, with which the need is compared (default: only the need is printed).
    """
    from mm1.engine.run_config import load_run
    from mm1.engine.train import plan as estimate

    result = estimate.plan(
        load_run(run, set), gpus, device, share=share, network=network, document=document, imbalance=imbalance,
        storage=storage, host_memory=host_memory,
    )  # fmt: skip
    print(estimate.show(result))
    print(json.dumps(estimate.to_dict(result)))


@app.command
def convert(
    out: Positional[Path],
    vision: str | None = None,
    decoder: str | None = None,
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None,
    connector: Path | None = None,
    tokenizer: Path | None = None,
    image_tokens: int | None = None,
    image_size: int | None = None,
    context: int | None = None,
    experts: int = 0,
    moe_every: int = 2,
    experts_per_token: int = 2,
    seed: int = 0,
) -> None:
    """Make a checkpoint that training can begin with (train.init) of published weights, or of one of ours with experts.

    Args:
        out: folder to write.
        vision: a folder of a transformers CLIP, a .safetensors file with config.json beside it, or a named size.
        decoder: likewise of a Llama, Mistral, Mixtral or Qwen3.
        source: instead of both, a checkpoint of ours.
        connector: Honeybee's .safetensors (default: random weights).
        tokenizer: a tokenizer.json (default: the decoder's).
        image_tokens: tokens of an image (default: 144).
        image_size: pixels a side (default: the encoder's).
        context: tokens of the longest document, which a sliding window has to hold (default: max_position_embeddings).
        experts: copies of the dense MLP in every moe_every-th layer.
        moe_every: which layers become mixtures.
        experts_per_token: that a token goes to.
        seed: of whatever is random.
    """
    from mm1.engine.convert.assemble import assemble

    print(assemble(
        out, vision=vision, decoder=decoder, source=source, connector=connector, tokenizer=tokenizer,
        image_tokens=image_tokens, image_size=image_size, context=context, experts=experts, moe_every=moe_every,
        experts_per_token=experts_per_token, seed=seed,
    ))  # fmt: skip


app.command(tokenizer)


@app.command
def export(checkpoint: Positional[Path], out: Positional[Path]) -> None:
    """Write a checkpoint of one process or of many as one safetensors file, with config and tokenizer, to `out`."""
    from mm1.engine.train.checkpoint import export

    export(checkpoint, out)
    print(out)


@app.command
def generate(
    checkpoint: Positional[Path],
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    image: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    logit_bias: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TOKEN=BIAS")] = (),
    num_beams: int = 1,
    length_penalty: float = 1.0,
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    seed: int | None = None,
    weights: Weights = None,
) -> None:
    """Continue a prompt of interleaved images and text.

    Args:
        checkpoint: a checkpoint folder, or the folder of a run.
        prompt: text; `<image>` marks where the next image stands, images without a mark come first. May be repeated.
        image: an image file; may be repeated.
        max_tokens: longest continuation; it ends before where prompt and text are as long as what it was trained on.
        temperature: 0 is greedy.
        top_p: sample among the most probable tokens of this total.
        top_k: and among so many (0: all).
        min_p: sample only tokens of at least this times the likeliest one's probability, 0 to 1 (0: no limit).
        repetition_penalty: divide logits of tokens that are in prompt or text; 1 is none.
        frequency_penalty: subtract this from a token's logit for each time that it is in the text.
        presence_penalty: subtract this once from the logit of a token that is in the text.
        logit_bias: add a number to the logit of the token with this id, such as 5=-100; may be repeated.
        num_beams: texts that beam search keeps; 1 is none.
        length_penalty: of beams: the power of the length that a log-probability is divided by, from -10 to 10.
        stop: end before this string; may be repeated.
        seed: of the sampling.
        weights: round the decoder's to fewer bits.
    """
    from mm1.engine.data.images import read
    from mm1.engine.infer.generate import generate
    from mm1.engine.infer.prompts import interleave
    from mm1.engine.infer.sampling import read_biases
    from mm1.engine.train.checkpoint import load

    prompts = interleave(prompt or ("",), [read(path) for path in image])

    def show(number: int, piece: str) -> None:
        print(piece, end="", flush=True)

    model = load(checkpoint)
    for parts in prompts:
        generate(
            model, [parts], max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
            min_p=min_p, repetition_penalty=repetition_penalty, frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty, logit_bias=read_biases(logit_bias), num_beams=num_beams,
            length_penalty=length_penalty, stop=stop, seed=seed, weights=weights, on_text=show,
        )  # fmt: skip
        print()


@app.command
def serve(
    checkpoint: Positional[Path],
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    max_images: int = 32,
    max_pixels: int = 1 << 25,
    max_bytes: int = 1 << 25,
    batch: int = 64,
    queue: int = 256,
    tokens: int = 65_536,
    prefill: int | None = None,
    weights: Weights = None,
    allow_urls: bool = False,
) -> None:
    """Answer OpenAI's chat API, and show a page to try the model on.

    Args:
        checkpoint: a checkpoint folder, or the folder of a run.
        host: address to listen at; one that others can reach needs a key.
        port: 0 is any that is free.
        api_key_file: a file with the key that clients have to send (default: the variable MM1_API_KEY). A command
            line can be read by every user of the machine, so it holds no key.
        max_images: of one request.
        max_pixels: of one image.
        max_bytes: of one request.
        batch: requests at once.
        queue: requests that wait.
        tokens: of the cache.
        prefill: rows of prompts that are computed between two tokens of a running answer (default: 512 on a CPU, 8192
            on a GPU).
        weights: round the decoder's to fewer bits.
        allow_urls: fetch images from public http and https addresses, ports 80 and 443.
    """
    if not 0 <= port < 1 << 16:
        raise UserError(f"port is {port}, expected 0 to 65535")
    from mm1.engine.serve.app import serve
    from mm1.engine.serve.privacy import read_key

    api_key = read_key(api_key_file) if api_key_file else None
    engine = {"batch": batch, "queue": queue, "tokens": tokens, "prefill": prefill, "weights": weights}
    serve(
        checkpoint, host=host, port=port, api_key=api_key, engine=engine, max_images=max_images,
        max_pixels=max_pixels, max_bytes=max_bytes, allow_urls=allow_urls,
    )  # fmt: skip


@app.command
def eval(
    checkpoint: Positional[Path],
    benchmark: Positional[str],
    data: tuple[Path, ...],
    out: Path,
    images: Path | None = None,
    split: str | None = None,
    shots: tuple[int, ...] = (0, 4, 8),
    shots_from: tuple[Path, ...] = (),
    choose: Literal["random", "fixed", "similar"] = "random",
    seed: tuple[int, ...] = (0,),
    text_shots: bool = False,
    high: int | None = None,
    num_beams: int = 1,
    length_penalty: float = 0.0,
    normalize: Literal["sum", "mean"] | None = None,
    limit: int | None = None,
    batch: int = 64,
    weights: Weights = None,
) -> None:
    """Evaluate with a few shots: captions by CIDEr, questions by VQA accuracy, options by their log-probability.

    Goes on where it was. Scores have intervals of 95 %, by resampling the questions.

    The last line of standard output is one JSON object.

    Args:
        checkpoint: a checkpoint folder, or the folder of a run.
        benchmark: coco, nocaps, textcaps, vqav2, okvqa, textvqa, vizwiz, scienceqa, seed or mmmu.
        data: the benchmark's folder, or its files.
        out: folder of predictions, one line a sample.
        images: folder with the images somewhere below it (default: that of the data).
        split: which (default: test of coco and scienceqa, image of seed, validation of mmmu, val of others).
        shots: how many examples a prompt has; several numbers are done in turn.
        shots_from: folder or files to draw them from (default: the training split in `data`, or else the samples
            themselves, without those of the query's image).
        choose: random for each query, fixed for all, or by similarity of images.
        seed: of the drawing; several are done in turn, and their mean and standard deviation shown.
        text_shots: begin zero-shot prompts with two shots without images, as Flamingo does and MM1 does not.
        high: only so many of a prompt's last images with sub-images.
        num_beams: texts that beam search keeps (default 1: greedy; OpenFlamingo: 3).
        length_penalty: of beams: the power of the length that a log-probability is divided by (OpenFlamingo: 0,
            its first version -2).
        normalize: compare options by the sum or the mean of their tokens' log-probabilities (default: mean for seed,
            sum for others).
        limit: that many samples, drawn at random with the first seed.
        batch: prompts at once.
        weights: round the decoder's to fewer bits.
    """
    from mm1.engine.evaluation.evaluate import Decoding, How, evaluate, samples_of, show
    from mm1.engine.train.checkpoint import load

    how = How(choose, text_shots=text_shots, high=high)
    decoding = Decoding(num_beams, length_penalty, normalize=normalize)
    samples, pool = samples_of(benchmark, data, images, split, shots_from, limit, *seed[:1])
    model = load(checkpoint)
    found = evaluate(
        model, benchmark, samples, pool, out, shots=shots, how=how, seeds=seed, decoding=decoding, batch=batch,
        weights=weights,
    )  # fmt: skip
    print(show(found))
    print(json.dumps(found))


@dataclass
class Kernels:
    """Each op beside its peers: checked, timed in turns, and against what this machine can do at most."""

    ops: Positional[tuple[str, ...]] = ()  # such as moe_mlp (default all)
    shapes: Many = ()  # parts of the names of cases; may be repeated
    dtype: str | None = None  # bf16, fp16 or fp32
    peers: Many = ()  # by name; may be repeated (default all; on a CPU without those of torch.compile)
    budget: float | None = None  # seconds a row
    json: Path | None = None  # file of results, which is gone on with if it is there

    def run(self) -> bool:
        from mm1.bench import kernels

        def measure(record: "Record") -> bool:
            return kernels.measure(
                record, self.ops, shapes=self.shapes, dtype=self.dtype, peers=self.peers, budget=self.budget
            )

        return _measured(measure, self.json)


@dataclass
class Train:
    """The training step from plain to everything on, one change a row, with its ledger of operations."""

    models: Positional[tuple[str, ...]] = ()  # named sizes (default: some that suit the machine)
    rounds: int | None = None  # of turns (default: as many as half a minute a model allows)
    json: Path | None = None  # file of results, which is gone on with if it is there

    def run(self) -> bool:
        from mm1.bench import train

        return _measured(lambda record: train.measure(record, self.models, self.rounds), self.json)


@dataclass
class Generate:
    """Prefill, first token and decode of prompts with shots."""

    models: Positional[tuple[str, ...]] = ()  # named sizes (default: some that suit the machine)
    rounds: int | None = None  # of turns (default: as many as a second a row allows)
    json: Path | None = None  # file of results, which is gone on with if it is there

    def run(self) -> bool:
        from mm1.bench import generate

        return _measured(lambda record: generate.measure(record, self.models, self.rounds), self.json)


@dataclass
class Everything:
    """Tests of the kernels, then all of these, within a limit; goes on where it was, in the results of today."""

    seconds: float = 530.0  # in all
    json: Path | None = None  # file of results (default: in mm1/bench/results)

    def run(self) -> bool:
        from mm1.bench.record import Record
        from mm1.bench.run import run

        print(Record(run(self.json, self.seconds)).last_line())
        return True


@dataclass
class Report:
    """One self-contained page of results."""

    paths: Positional[tuple[Path, ...]] = ()  # files or folders of results (default: those of this project)
    out: Path = Path("report.html")

    def run(self) -> bool:
        from mm1.bench.report import report

        report(self.paths, self.out)
        print(self.out)
        return True


@dataclass
class Readme:
    """The README's tables of measurements, written anew from this project's results."""

    pictures: Path | None = None  # folder for pictures of them

    def run(self) -> bool:
        from mm1.bench.readme import rewrite

        rewrite()
        if self.pictures:
            from mm1.bench.pictures import pictures

            pictures([], self.pictures)
        return True


Benchmark = (
    Annotated[Kernels, tyro.conf.subcommand("kernels")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Everything, tyro.conf.subcommand("all")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Readme, tyro.conf.subcommand("readme")]
)


@app.command
def bench(what: Annotated[Benchmark, tyro.conf.arg(name="")]) -> None:
    """Measure. The last line of standard output is one JSON object."""
    sys.exit(0 if what.run() else 1)


def _measured(measure: "Callable[[Record], bool | None]", path: Path | None) -> bool:
    from mm1.bench.record import Record

    record = Record(path)
    right = measure(record) is not False
    print(record.last_line())
    return right


@app.command
def tune(
    kernels: Positional[tuple[str, ...]] = (),
    budget: float = 60.0,
    shape: str | None = None,
    static: bool = False,
    check: bool = False,
    device: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    out: Path | None = None,
    log: Path | None = None,
    processes: int = os.cpu_count() or 1,
) -> None:
    """Find the configurations that kernels run with. The last line of standard output is one JSON object.

    Measures on the GPU at hand and keeps what beats the default, in the user's cache; under torchrun for all ranks.

    Args:
        kernels: which (default all).
        budget: seconds of measuring.
        shape: one shape to measure at, such as "rows=8192 experts=64 k=2048 n=1408".
        static: predict for `device` without measuring: compile, look at the code, write tables.
        check: verify that every row of the tables compiles to sound code; without `device` for every GPU.
        device: a known GPU, such as h200; may be repeated.
        out: folder of tables to write, or to check (default: those of this package; measured rows: the user's cache).
        log: file of trials to append to and go on from (default: in the user's cache).
        processes: that compile at once.
    """
    if device and not (static or check):
        raise TuneError("--device goes with --static or --check; what is measured is the GPU at hand")
    if processes < 1:
        raise TuneError(f"{processes} processes, expected at least 1")
    from mm1.kernels.language import INSTALLED

    if not INSTALLED:
        raise TuneError("tuning compiles kernels with Triton, which is not installed: pip install triton")
    from mm1.autotune import predict
    from mm1.autotune.tables import TABLES
    from mm1.autotune.timing import device_named
    from mm1.autotune.tune import tune

    if check:
        faults = predict.check(kernels, [device_named(name) for name in device or DEVICES], out or TABLES, processes)
        print("\n".join([*faults, json.dumps({"faults": len(faults)})]))
        sys.exit(1 if faults else 0)
    if static:
        if out is None and not (TABLES.parents[2] / "pyproject.toml").is_file():
            raise TuneError("an installed package's tables are not written to: say where with --out")
        devices = [device_named(name) for name in device or (None,)]
        print(json.dumps([predict.predict(kernels, d, out or TABLES, processes) for d in devices]))
    else:
        print(json.dumps(tune(kernels, budget, shape=shape, folder=out, log=log, processes=processes)))


@app.command
def explain(kernel: Positional[str], shape: Positional[tuple[str, ...]], device: str | None = None) -> None:
    """Say which step of the look-up answers for a kernel and shape, and why. The last line is one JSON object.

    Args:
        kernel: such as grouped_gemm.
        shape: sizes, such as rows=8192 experts=64 k=2048 n=1408.
        device: a known GPU, such as h200 (default: the one at hand).
    """
    from mm1.autotune.explain import explain

    print(json.dumps(explain(kernel, " ".join(shape), device)))


@app.command
def doctor(json: bool = False) -> None:
    """Print GPU, driver, versions, back-ends and tables found, and what to do about what is missing.

    Args:
        json: end with one JSON object.
    """
    from mm1.autotune.doctor import doctor

    doctor(json)


def main() -> None:
    try:
        app.cli(prog="mm1", description="Train and run MM1-type multimodal models.")
    except (UserError, TuneError) as error:
        sys.exit(_say(error, 2))
    except KeyboardInterrupt as error:  # of a training run that saved, safety.Stopped
        sys.exit(_say(str(error) or "stopped", getattr(error, "status", 1)))
    except (OSError, FloatingPointError) as error:  # a full disk; a loss that is not finite
        sys.exit(_say(error, 1))


def _say(error: object, status: int) -> int:
    print(f"mm1: {' '.join(str(error).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
