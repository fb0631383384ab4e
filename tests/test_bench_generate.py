"""The benchmark of generation has complete rows, counts correctly, and does not time wrong implementations."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from conftest import relative_error
from small import IMAGE, PATCH, SLOTS, logits_of, small_model

from mm1.bench import generate
from mm1.bench.generate import NEW, TEXT, Bench, Case, Scale, checked, measure, prompts
from mm1.bench.record import Record
from mm1.engine.data.batch import exact_budget, pack
from mm1.engine.data.record import View
from mm1.engine.infer.cache import PAGE
from mm1.errors import UserError

LIMITS = {"copy": 1e10, "gemm": {"fp32": 1e11}}
ONE, THREE = 1 + SLOTS + TEXT, 1 + 3 * (SLOTS + TEXT)  # tokens of a prompt of no shots, and of two


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def tiny(monkeypatch):
    """Replace all sizes by a tiny one, and the measured ceilings by constants."""
    monkeypatch.setitem(generate.MODELS, "tiny", small_model())
    monkeypatch.setattr(generate, "SHOTS", (0, 2))
    monkeypatch.setattr(generate, "CPU", Scale(("tiny",), (1, 2), decoded=THREE, prefilled=ONE, queries=3))
    monkeypatch.setattr(generate, "ceilings", lambda device: LIMITS)


def small_bench(**decoder) -> Bench:
    return Bench(small_model(**decoder), "cpu", "fp32", LIMITS)


def test_rows_have_their_fields_and_are_not_measured_twice(tiny, tmp_path, capsys):
    pytest.importorskip("transformers")
    measure(record := Record(tmp_path / "record.json"), rounds=2)
    one, two, three = "0-shot batch=1", "0-shot batch=2", "2-shot batch=1"
    assert [(row["what"], row["case"]) for row in record.rows] == [
        ("prefill", one), ("first token", one), ("decode", one), ("decode", two), ("decode", three),
        ("generate", one), ("generate", three), ("queries", "2-shot batch=3"),
    ]  # fmt: skip
    for row in record.rows:
        batch, new = row["shape"]["batch"], {"decode": 1, "generate": NEW}.get(row["what"])
        images = {"first token": 1, "queries": 3}.get(row["what"], 0)
        prompt = THREE if row["case"].startswith("2-shot") else ONE
        assert row["shape"] == {"batch": batch, "prompt": prompt, "images": images}
        assert (row["bench"], row["model"], row["dtype"], row["mode"]) == ("generate", "tiny", "fp32", "host")
        assert row["failed"] == {}
        own = {"decode": ["mm1 int8"], "queries": ["mm1 without shared pages"]}.get(row["what"], [])
        others = [
            *own,
            *{"decode": generate.CACHES, "first token": [], "queries": []}.get(row["what"], ["transformers"]),
        ]
        assert set(row["variants"]) == {"mm1", "mm1 again", *others}
        for name, v in row["variants"].items():
            assert v["n"] == len(v["samples"]) == 2
            assert v["tokens_per_s"] == pytest.approx(batch * (new or prompt) / v["median"], rel=1e-3)
            assert v["bandwidth_share"] == pytest.approx(row["bytes"] / v["median"] / LIMITS["copy"], rel=1e-3)
            assert v["share"] == pytest.approx(row["floor"] / v["median"], rel=1e-3)
            assert ("ratio" in v) == (name in others)
            assert name not in others or 0 <= v["error"] < (0.1 if name == "mm1 int8" else 1e-4)
    printed = capsys.readouterr().out
    assert printed.count("× mm1's") == 1 + 3 * 3 + 2 + 1
    measure(Record(tmp_path / "record.json"), rounds=2)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("sizes", [{}, {"experts": 0, "qk_norm": False, "tied": False}], ids=["mixture", "Llama"])
def test_a_step_is_a_full_pass_and_leaves_the_cache_as_it_was(sizes):
    pytest.importorskip("transformers")
    bench = small_bench(**sizes)
    documents = prompts(bench.config, 2, 2, images=False)
    prefill = bench.prefill(documents)[0]()
    longer = [dataclasses.replace(d, tokens=torch.tensor([*d.tokens, new], dtype=torch.int32).numpy())
              for d, new in zip(documents, prefill.argmax(-1))]  # fmt: skip
    batch = pack(longer, exact_budget(longer, PATCH), image_id=IMAGE, patch=PATCH, slots=SLOTS)
    logits = logits_of(bench.model, batch).unflatten(0, (2, -1))
    assert relative_error(prefill, logits[:, -2]) < 1e-5
    for name, way in bench.steps(documents).items():
        step = way()
        for _ in range(3):
            assert relative_error(step(), logits[:, -1]) < (0.1 if name == "mm1 int8" else 1e-4), name


def test_a_step_reads_weights_keys_and_values_once():
    bench = small_bench(experts=0)
    c, batch = bench.config.decoder, 2
    cost = bench.cost(prompts(bench.config, 2, batch, images=False), THREE, 1)
    matrices = 2 * c.width * (c.heads + c.kv_heads) * c.head_width + 3 * c.width * c.ffn
    norms = 2 * c.width + 2 * c.head_width
    weights = c.layers * (matrices + norms) + c.width + c.vocabulary * c.width + batch * c.width
    keys = batch * (THREE + 1) * c.layers * 2 * c.kv_heads * c.head_width
    assert cost.bytes == 4 * (weights + keys)
    pairs = batch * (THREE + 1) * c.layers
    products = batch * (c.layers * matrices + c.vocabulary * c.width)
    assert cost.flops == 2 * products + 4 * pairs * c.heads * c.head_width


def test_a_mixture_reads_the_experts_that_may_be_chosen():
    bench = small_bench()
    c = bench.config.decoder
    one, two, three = (bench.cost(prompts(bench.config, 0, batch, images=False), ONE, 1) for batch in (1, 2, 3))
    other = (ONE + 1) * c.layers * 2 * c.kv_heads * c.head_width + c.width
    assert two.bytes - one.bytes == 4 * (2 * 3 * c.width * c.ffn + other)
    assert three.bytes - two.bytes == 4 * other


def test_a_first_token_costs_the_encoder_too():
    bench = small_bench()
    with_images, without = (
        bench.cost(prompts(bench.config, 2, 1, images=images), 0, THREE) for images in (True, False)
    )
    parts = (bench.model.vision, bench.model.connector, bench.model.image_norm)
    numbers = sum(p.numel() for part in parts for p in part.parameters())
    assert with_images.bytes - without.bytes == 4 * numbers + 3 * 64 * PATCH**2 * 3
    assert with_images.flops > without.flops


def test_images_of_a_prompt_are_encoded():
    bench = small_bench()
    documents = prompts(bench.config, 2, 1, images=True)
    brighter = [dataclasses.replace(d, media=tuple(View(x.kind, 255 - x.values) for x in d.media)) for d in documents]
    logits, other = (bench.prefill(given)[0]() for given in (documents, brighter))
    assert relative_error(other, logits) > 1e-3


def test_first_tokens_are_the_same_whatever_is_known_and_each_query_is_new():
    bench = small_bench()
    documents = prompts(bench.config, 2, 2, images=True)
    ways = {name: way() for name, way in bench.first_tokens(documents).items()}
    assert list(ways) == ["mm1", "mm1 features known", "mm1 pages known"]
    queries = bench.queries(documents)
    seen = []
    for _ in range(3):
        of = next(queries)
        truth = bench.prefill(of)[0]().log_softmax(-1).amax(-1)
        for name, way in ways.items():
            assert relative_error(way(), truth) < 1e-4, name
        seen += [document.media[-1].values.tobytes() for document in of]
        assert all(np.array_equal(a.values, b.values) for a, b in zip(of[0].media[:-1], of[1].media[:-1]))
    assert len(set(seen)) == 6


def test_each_way_knows_what_it_says_and_no_more(monkeypatch):
    """A call after others like it encodes only new images, and computes only rows that no cache has."""
    engines, bench = [], small_bench()

    class Kept(generate.Engine):
        def __init__(self, *given, **settings):
            super().__init__(*given, **settings)
            engines.append(self)

    monkeypatch.setattr(generate, "Engine", Kept)

    def work(way):
        call = way()
        for _ in range(3):
            before = engines[-1].encoded, engines[-1].computed
            call()
        return engines[-1].encoded - before[0], engines[-1].computed - before[1]

    one = prompts(bench.config, 2, 1, images=True)
    assert work(bench.first_tokens(one)["mm1"]) == (3, THREE)
    assert work(bench.first_tokens(one)["mm1 features known"]) == (1, THREE)
    encoded, computed = work(bench.first_tokens(one)["mm1 pages known"])
    assert (encoded, computed <= ONE + PAGE) == (1, True)
    texts = prompts(bench.config, 2, 3, images=False)
    assert work(lambda: bench.generates(texts)["mm1"]()) == (0, 3 * THREE)
    many = prompts(bench.config, 2, 5, images=True)
    assert work(bench.answers(many)["mm1 without shared pages"]) == (7, 5 * THREE)
    encoded, computed = work(bench.answers(many)["mm1"])
    assert (encoded, computed <= THREE + 4 * (ONE + PAGE)) == (7, True)


def test_whole_texts_cost_their_prompt_and_a_step_for_each_token_but_the_last(tiny):
    measure(record := Record(), rounds=1)
    row = next(row for row in record.rows if row["what"] == "generate")
    bench, documents = small_bench(), prompts(small_model(), 0, 1, images=False)
    steps = [bench.cost(documents, ONE + i, 1).flops for i in range(NEW - 1)]
    assert row["flops"] == bench.cost(documents, 0, ONE).flops + sum(steps)


def test_a_baseline_that_differs_is_failed_with_its_reason(tiny, monkeypatch):
    pytest.importorskip("transformers")
    made = generate.transformers_decoder

    def wrong(decoder):
        model = made(decoder)
        model.model.layers[0].self_attn.q_norm.weight = torch.nn.Parameter(torch.full((8,), 1.01))
        return model

    monkeypatch.setattr(generate, "transformers_decoder", wrong)
    measure(record := Record(), rounds=1)
    for row in [row for row in record.rows if row["what"] != "generate"]:  # whose tokens may be the same
        peers = {"decode": set(generate.CACHES), "prefill": {"transformers"}}.get(row["what"], set())
        assert not any("transformers" in name for name in row["variants"])
        assert set(row["failed"]) == peers
        assert all(why.startswith("differs from mm1 by ") for why in row["failed"].values())


def test_a_baseline_that_is_not_installed_says_so(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    measure(record := Record(), rounds=1)
    assert record.rows[0]["failed"] == {"transformers": "not installed"}
    assert record.rows[2]["failed"] == dict.fromkeys(generate.CACHES, "not installed")


def test_nothing_is_compared_with_a_result_that_is_none():
    def broken():
        raise ValueError("no\nmore")

    ours, theirs = (lambda: torch.full((2,), float("nan"))), (lambda: torch.ones(2))
    for way in (broken, lambda: ours):
        found = checked({"mm1": way, "peer": lambda: theirs}, 1e-4)
        assert found.calls == {}
        assert set(found.failed) == {"mm1", "peer"}
    assert checked({"mm1": broken}, 1e-4).failed == {"mm1": "ValueError: no"}


def test_what_is_faster_than_a_gpu_can_be_is_failed():
    bench = small_bench()
    documents = prompts(bench.config, 0, 1, images=False)
    found = checked({"mm1": bench.steps(documents)["mm1"]}, 1e-4)
    bench.device, bench.limits = "cuda", {"copy": 1.0, "gemm": {"fp32": 1.0}}
    row, cost = {"dtype": "fp32", "mode": "stream"}, bench.cost(documents, ONE, 1)
    row = bench.timed(row, cost, 1, found, rounds=1, budget=0.0)
    assert row["variants"] == {}
    assert "counted or timed wrongly" in row["failed"]["mm1"]


def test_refuses_what_it_does_not_know(tiny):
    with pytest.raises(UserError, match="unknown size 'huge'"):
        measure(Record(), ["huge"])
    with pytest.raises(UserError, match="rounds is 0"):
        measure(Record(), rounds=0)
    assert Case("decode", 4, 8).key() == {"case": "4-shot batch=8", "what": "decode"}
