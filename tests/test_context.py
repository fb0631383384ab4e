"""How long a prompt may be: what a checkpoint was trained on goes with it, and longer prompts are refused."""

import asyncio
import dataclasses
import io
import json
import re
import sys

import numpy as np
import pytest
import transformers
from PIL import Image
from small import IMAGE, small_mm1, small_run

import mm1
from mm1.cli import main
from mm1.engine.convert.assemble import assemble
from mm1.engine.convert.weights import from_hf
from mm1.engine.data.document import Document
from mm1.engine.data.record import View
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.engine.evaluation.evaluate import evaluate
from mm1.engine.evaluation.samples import Sample
from mm1.engine.infer.asynchronous import AsyncEngine
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.generate import generate, score, several
from mm1.engine.infer.prompts import encode_prompts
from mm1.engine.infer.sampling import Sampling
from mm1.engine.models.mm1_config import DIGITS
from mm1.engine.run_config import to_dict
from mm1.engine.train import checkpoint
from mm1.engine.train.trainer import train
from mm1.errors import UserError

CONTEXT = 80
LONG = "one two three four five six seven eight nine ten\n" * 9  # more tokens
HUGE = "word " * 70_000


@pytest.fixture(scope="module")
def model():
    model = small_mm1(seed=1).eval()
    model.config = dataclasses.replace(model.config, context=CONTEXT)
    return model


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    train(small_run(steps=1), out)
    return out


def prompt_of(tokens):
    return Document(np.array([1] + [5] * (tokens - 1), np.int32), (), "prompt")


async def asynchronous(engine, parts):
    async with AsyncEngine(engine) as running:
        await running.generate(parts)


def context_of(folder):
    return mm1.load(folder).config.context


def test_a_run_writes_its_length_and_export_convert_and_init_keep_it(run_folder, tmp_path):
    trained = small_run().data.tokens
    assert context_of(run_folder) == Engine(mm1.load(run_folder)).context == trained
    checkpoint.export(run_folder, tmp_path / "exported")
    assert context_of(tmp_path / "exported") == trained
    assert context_of(assemble(tmp_path / "image", source=run_folder, image_size=32)) == trained
    assert context_of(assemble(tmp_path / "experts", source=tmp_path / "exported", image_size=24)) == trained


@pytest.mark.parametrize("tokens, expected", [(120, 160), (200, 200)])
def test_a_run_on_shorter_documents_forgets_no_longer_ones(run_folder, tokens, expected, tmp_path):
    run = small_run(steps=1, init=str(run_folder))
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, tokens=tokens))
    assert train(run, tmp_path / "out").config.context == expected
    assert context_of(tmp_path / "out") == expected
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=2, init=str(tmp_path / "gone")))
    assert train(run, tmp_path / "out", resume=True).config.context == expected


def test_a_config_of_before_has_the_length_of_its_run_and_a_named_size_none(run_folder, tmp_path):
    config = json.loads((run_folder / "checkpoint" / "config.json").read_text())
    del config["model"]["context"]
    model = mm1.load(run_folder)
    texts = {"config.json": json.dumps(config), "tokenizer.json": model.tokenizer.text}
    checkpoint.write(tmp_path / "old", {"model.safetensors": dict(model.state_dict())}, texts)
    assert context_of(tmp_path / "old") == 160
    texts["config.json"] = json.dumps({"model": config["model"]})
    checkpoint.write(tmp_path / "bare", {"model.safetensors": dict(model.state_dict())}, texts)
    assert context_of(tmp_path / "bare") is None
    assert mm1.load("digits").config.context is None
    assert to_dict(DIGITS)["context"] is None


@pytest.mark.parametrize("context, expected", [(None, 64), (48, 48), (4096, 64)])
def test_a_converted_model_has_that_of_its_decoder(context, expected):
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    decoder = (theirs.config, theirs.state_dict())
    model = from_hf(vision=DIGITS.vision, decoder=decoder, image_tokens=4, context=context)
    assert model.config.context == expected
    assert from_hf(vision=DIGITS.vision, decoder=DIGITS.decoder, context=context).config.context == context


def test_a_longer_prompt_is_refused_with_both_numbers_by_all_that_take_one(model):
    engine = Engine(model)
    assert engine.context == CONTEXT
    tokens = len(encode_prompts(small_mm1(), [[LONG]])[0].tokens)
    ways = {
        "submit": lambda: engine.submit([LONG]),
        "document": lambda: engine.submit(prompt_of(tokens)),
        "generate": lambda: generate(model, [["one"], [LONG]]),
        "score": lambda: score(model, [[LONG]], [["one"]]),
        "several": lambda: several(engine, [LONG], 2, Sampling()),
        "asynchronous": lambda: asyncio.run(asynchronous(engine, [LONG])),
    }
    for way in ways.values():
        with pytest.raises(UserError, match=f"the prompt has {tokens} tokens, the model was trained on at most 80"):
            way()
    assert not engine.waiting


def test_a_prompt_and_its_answer_together_are_as_long_at_most(model):
    engine = Engine(model)
    engine.submit_answer(prompt_of(CONTEXT - 2), [5, 6])
    with pytest.raises(UserError, match="the prompt has 81 tokens, the model was trained on at most 80"):
        engine.submit_answer(prompt_of(CONTEXT - 1), [5, 6])
    engine.run()


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "seed": 0}, {"num_beams": 2}])
def test_a_text_ends_where_it_and_its_prompt_are_as_long(model, how):
    model = small_mm1(seed=1).eval()
    model.tokenizer.eos = -1  # so that nothing ends it before
    model.config = dataclasses.replace(model.config, context=CONTEXT)
    engine = Engine(model)
    for prompt, left in ((70, 10), (79, 1), (80, 1)):
        request = engine.submit(prompt_of(prompt), Sampling(max_tokens=10**9, **how))
        engine.run()
        assert (len(request.tokens), request.finish) == (left, "length")
    generate(model, [["one"]], max_tokens=10**12)  # whose cache would fit nowhere


def test_a_small_cache_bounds_the_prompt_too(model):
    assert Engine(model, tokens=64).context == 64
    assert Engine(small_mm1(), tokens=128).context == 128


@pytest.mark.parametrize("tokens", [64, 128])
def test_model_and_cache_bound_prompt_and_text_by_one_rule(tokens):
    """Of 64 tokens the cache, of 80 the model is the limit."""
    model = small_mm1(seed=1).eval()
    model.tokenizer.eos = -1
    model.config = dataclasses.replace(model.config, context=CONTEXT)
    engine = Engine(model, tokens=tokens)
    for prompt in (10, engine.context - 1, engine.context):
        request = engine.submit(prompt_of(prompt), Sampling(max_tokens=1000))
        engine.run()
        assert (len(request.tokens), request.finish) == (max(engine.context - prompt, 1), "length")
    told = "the cache holds at most 64" if tokens == 64 else "the model was trained on at most 80"
    with pytest.raises(UserError, match=f"the prompt has {engine.context + 1} tokens, {told}"):
        engine.submit(prompt_of(engine.context + 1), Sampling(max_tokens=1))


@pytest.mark.parametrize("trained", [True, False])
def test_a_text_that_cannot_fit_is_refused_without_being_encoded(trained, model, monkeypatch):
    if not trained:
        model = small_mm1()
    engine = Engine(model, tokens=1024)
    monkeypatch.setattr(TextTokenizer, "encode", lambda *_: pytest.fail("encoded"))
    for way in (engine.submit, lambda parts: asyncio.run(asynchronous(engine, parts))):
        with pytest.raises(
            UserError,
            match=r"the prompt has 350000 characters, expected at most \d+, the longest text of (80|1024) tokens",
        ):
            way([HUGE])
    if trained:
        with pytest.raises(UserError, match=r"350000 characters, expected at most \d+, the longest text of 80 tokens"):
            generate(model, [[Image.new("RGB", (24, 12)), HUGE]])
        with pytest.raises(UserError, match="350000 characters"):
            score(model, [[HUGE]], [["a"]])


def test_an_evaluation_goes_on_and_keeps_both_numbers(model, tmp_path):
    samples = [Sample(i, None, LONG if i == 1 else "how many?", ("A",), ("one", "two")) for i in range(3)]
    found = evaluate(model, "scienceqa", samples, [], tmp_path, shots=(0,), display=io.StringIO())
    [reason] = found["results"][0]["unreadable"].values()
    assert re.fullmatch(r"the prompt has \d+ tokens, the model was trained on at most 80", reason)


def test_mm1_generate_says_so_in_one_line(run_folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mm1", "generate", str(run_folder), "--prompt", LONG * 2])
    with pytest.raises(SystemExit, match="2"):
        main()
    error = capsys.readouterr().err
    assert "tokens, the model was trained on at most 160" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("tokens, images, message", [
    ([1, 5, IMAGE], 0, "the prompt has 1 image tokens, expected 0 for its 0 images"),
    ([1, 5, IMAGE], 1, "the prompt has 1 image tokens, expected 4 for its 1 images"),
    ([1, 384], 0, "the prompt has the token id 384, expected 0 to 383"),
    ([1, -1], 0, "the prompt has the token id -1, expected 0 to 383"),
    ([], 0, "the prompt has no tokens"),
])  # fmt: skip
def test_ids_that_are_no_prompt_are_refused_and_others_go_on(tokens, images, message, model):
    engine = Engine(model)
    good = engine.submit(["one"], Sampling(max_tokens=2))
    views = (View("image", np.zeros((8, 8, 3), np.uint8)),) * images
    with pytest.raises(UserError, match=message):
        engine.submit(Document(np.array(tokens, np.int32), views, "prompt"))
    engine.run()
    assert good.finish in ("stop", "length")


def test_tokens_for_the_repetition_penalty_are_those_of_prompt_and_text():
    model = small_mm1(seed=1).eval()
    model.tokenizer.eos = -1
    engine = Engine(model)
    request = engine.submit(["one two one"], Sampling(max_tokens=200, temperature=1.5, seed=1, repetition_penalty=1.3))
    while request.finish is None:
        engine.step()
        assert sorted(request.seen) == sorted({*request.document.tokens.tolist(), *request.tokens})
    assert len(request.tokens) == 200
