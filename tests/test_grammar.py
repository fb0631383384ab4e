"""Texts follow their schema whatever the model would write, for every kind of tokenizer, and hurt nobody else."""

import json
import re

import numpy as np
import pytest
from service import CHAT, http_request, openai_client, plain_chat, refusal_of, run_alone, serving
from small import small_mm1
from test_generate import PROMPTS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

pytest.importorskip("llguidance", reason="serving is an extra")

from mm1.engine.data.text_tokenizer import SPECIAL, TextTokenizer
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.grammar import Grammars, SchemaError, refuse_costly
from mm1.engine.infer.sampling import Sampling

PERSON = {
    "type": "object", "additionalProperties": False, "required": ["name", "age", "tags"],
    "properties": {
        "name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bé", "c d"]}, "minItems": 1, "maxItems": 3},
    },
}  # fmt: skip


def fits(text):
    value = json.loads(text)
    assert set(value) == {"name", "age", "tags"}
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 12
    assert type(value["age"]) is int
    assert 0 <= value["age"] <= 150
    assert 1 <= len(value["tags"]) <= 3
    assert set(value["tags"]) <= {"a", "bé", "c d"}


@pytest.fixture(scope="module")
def model():
    return small_mm1(seed=5).eval()


@pytest.fixture(scope="module")
def grammars(model):
    return Grammars(model.tokenizer)


@pytest.fixture(scope="module")
def port(model):
    with serving(model) as (port, _):
        yield port


LINES = ["the cat sat on the mat", "a dog, a cat", "it is an image of 3 cats", '{"name": "é", "age": 12}'] * 40


def byte_fallback():
    vocabulary = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁the", "▁cat", "name", '"', "{", "}", ":", ","]
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, [], byte_fallback=True, unk_token=None))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])  # fmt: skip
    return made


def unigram():
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    letters = [*'abcdefghijklmnopqrstuvwxyz0123456789é{}[]",: ']
    made.train_from_iterator([*LINES, *letters], trainers.UnigramTrainer(
        vocab_size=120, special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>", show_progress=False))  # fmt: skip
    return made


@pytest.mark.parametrize("make", [None, byte_fallback, unigram], ids=["byte-level", "byte-fallback", "unigram"])
def test_every_tokenizer_writes_what_the_schema_says(model, make, tmp_path):
    if make is None:
        served = model
    else:
        made = make()
        made.add_special_tokens(list(SPECIAL))
        made.save(str(tmp_path / "tokenizer.json"))
        served = small_mm1(seed=5).eval()
        served.tokenizer = TextTokenizer(tmp_path / "tokenizer.json")
        assert len(served.tokenizer) <= 384
    grammar = Grammars(served.tokenizer).compile(json.dumps(PERSON))
    engine = Engine(served, tokens=16_384)
    requests = [engine.submit(["one"], Sampling(max_tokens=300, temperature=t, seed=i, grammar=grammar))
                for i, t in enumerate((0.0, 0.7, 1.5, 1.5))]  # fmt: skip
    engine.run()
    for request in requests:
        assert request.finish == "stop", request.text
        fits(request.text)
    assert len({request.text for request in requests}) > 1


def test_others_in_the_batch_write_as_if_alone(model, grammars):
    engine = Engine(model, tokens=8192)
    options = [{"temperature": 0.8, "seed": 1}, {}, {"temperature": 1.0, "seed": 2, "frequency_penalty": 1.0}]
    object_of = grammars.compile('{"type": "object"}')
    person = grammars.compile(json.dumps(PERSON))
    mixed = [engine.submit(prompt, Sampling(max_tokens=40, grammar=grammar, **how)) for prompt in PROMPTS[:2]
             for how, grammar in zip(options * 2, [None, person, object_of, None, None, person])]  # fmt: skip
    engine.run()
    at = iter(mixed)
    for prompt in PROMPTS[:2]:
        for how, grammar in zip(options * 2, [None, person, object_of, None, None, person]):
            one = run_alone(model, prompt, 40, grammar=grammar, **how)
            assert next(at).tokens == one.tokens


def test_end_of_text_is_allowed_where_the_text_may_end_and_nowhere_else(model, grammars):
    eos, encode = model.tokenizer.eos, model.tokenizer.encode
    progress = grammars.compile('{"enum": ["on", "once"]}').begin()
    for i, token in enumerate(encode('"on"')):
        allowed = progress.allowed(384)
        assert not allowed[eos]
        assert allowed[token]
        if i == 0:
            assert not allowed[encode("x")[0]]
        progress.take(token)
    assert progress.allowed(384)[eos]
    assert np.flatnonzero(progress.allowed(400)).max() < 384
    cut = run_alone(model, ["one"], 3, grammar=grammars.compile(json.dumps(PERSON)))
    assert (cut.finish, len(cut.tokens)) == ("length", 3)


def test_a_grammar_that_fails_ends_its_own_request_alone(model, grammars):
    engine = Engine(model, tokens=2048)
    grammar = grammars.compile(json.dumps(PERSON))
    bad, good = engine.submit(["one"], Sampling(grammar=grammar)), engine.submit(["one"], Sampling(max_tokens=20))
    engine.step()
    with pytest.raises(RuntimeError):  # no grammar allows it, and then the library fails for good
        bad.grammar.take(model.tokenizer.image)
    with pytest.raises(RuntimeError):
        engine.run()
    engine.run()
    assert bad.finish == "failed"
    assert (good.finish, good.tokens) == ((truth := run_alone(model, ["one"], 20)).finish, truth.tokens)


ALL_OF_ANY = {"allOf": [{"anyOf": [{"type": "object", "properties": {f"p{i}{j}": {"type": "integer"}}}
                                   for j in range(3)]} for i in range(6)]}  # fmt: skip
DEEP = json.loads('{"items":' * 40 + "{}" + "}" * 40)
COSTLY = [
    ({"type": "integer", "multipleOf": 99999989}, "multipleOf is 99999989, expected 0.001 to 1000"),
    ({"type": "string", "pattern": "^((a{1000}){1000}){1000}$"}, "a pattern has 25 characters and counts"),
    ({"type": "string", "pattern": "a" * 300}, "a pattern has 300 characters"),
    ({"type": "object", "patternProperties": {"a{999}": {}}}, "a pattern has 6 characters and counts"),
    ({"type": "object", "x-guidance": {"whitespace_pattern": "(a{1000}){1000}"}}, "x-guidance is not supported"),
    (DEEP, "nested deeper than 32"),
    ({"enum": ["x" * 100] * 1000}, "expected at most 65536"),
]  # fmt: skip


@pytest.mark.parametrize("schema, message", COSTLY, ids=[message[:20] for _, message in COSTLY])
def test_a_schema_that_would_cost_much_is_refused_before_anything_is_computed(schema, message):
    with pytest.raises(SchemaError, match=re.escape(message)):
        refuse_costly(json.dumps(schema))


@pytest.mark.parametrize("schema, message", [
    ({"$ref": "http://example.com/x"}, "not present in a registry"), ({"$ref": "file:///etc/passwd"}, "not present"),
    ({"not": {"type": "object"}}, "Unimplemented keys"), ({"$ref": "#"}, "NoExtension"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "Unsatisfiable"), ({"type": "strange"}, None),
    (ALL_OF_ANY, None),
], ids=["url", "file", "not", "endless", "empty", "type", "product"])  # fmt: skip
def test_a_schema_that_cannot_be_followed_is_told_in_one_line(grammars, schema, message):
    with pytest.raises(SchemaError, match=message) as told:
        grammars.compile(json.dumps(schema))
    assert 0 < len(str(told.value)) < 250
    assert "\n" not in str(told.value)


def test_a_schema_that_takes_too_long_is_given_up(monkeypatch, grammars):
    monkeypatch.setattr("mm1.engine.infer.grammar.SECONDS", 0.01)
    with pytest.raises(SchemaError, match="too costly"):
        grammars.compile('{"type": "boolean"}')


def test_a_refused_schema_is_refused_again_without_a_try(monkeypatch, model):
    grammars = Grammars(model.tokenizer)
    with pytest.raises(SchemaError) as first:
        grammars.compile('{"not": {"type": "object"}}')
    monkeypatch.setattr("mm1.engine.infer.grammar.try_apart", lambda _: pytest.fail("it was tried again"))
    with pytest.raises(SchemaError) as second:
        grammars.compile('{"not": {"type": "object"}}')
    assert str(first.value) == str(second.value)


def test_the_last_used_grammars_are_kept(monkeypatch, model):
    monkeypatch.setattr("mm1.engine.infer.grammar.CACHED", 2)
    monkeypatch.setattr("mm1.engine.infer.grammar.try_apart", lambda _: None)
    grammars = Grammars(model.tokenizer)
    a, b, c = (json.dumps({"enum": [i]}) for i in range(3))
    first, second = grammars.compile(a), grammars.compile(b)
    assert grammars.cached(a) is first
    grammars.compile(c)
    assert grammars.cached(a) is grammars.compile(a) is first
    assert grammars.cached(b) is None
    assert grammars.compile(b) is not second


def test_without_the_library_a_schema_is_refused_with_the_way_to_get_it(monkeypatch, grammars):
    monkeypatch.setattr("mm1.engine.infer.grammar.find_spec", lambda name: None)
    with pytest.raises(SchemaError, match=r"needs llguidance: pip install llguidance"):
        grammars.compile('{"type": "null"}')


@pytest.mark.parametrize("stream", [False, True])
def test_response_format_gives_json(port, stream):
    formats = [{"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}},
               {"type": "json_schema", "json_schema": {"name": "b", "schema": {"type": "boolean"}}}]  # fmt: skip
    with openai_client(port) as client:
        for form, check in zip(formats, (fits, lambda text: type(json.loads(text)) is bool or pytest.fail(text))):
            found = client.chat.completions.create(
                model="small", messages=[{"role": "user", "content": "one"}], response_format=form, stream=stream,
                max_tokens=300, temperature=1.0, seed=3,
            )  # fmt: skip
            if stream:
                check("".join(c.delta.content or "" for chunk in found for c in chunk.choices))
            else:
                assert found.choices[0].finish_reason == "stop"
                check(found.choices[0].message.content)


def test_a_refused_schema_is_a_400_with_its_name(port):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://example.com"}}}
    status, _, answer = http_request(port, "POST", CHAT, plain_chat(["one"], response_format=form))
    error = json.loads(answer)["error"]
    assert (status, error["param"], error["code"]) == (400, "response_format", "invalid_json_schema")
    assert "response_format: the schema cannot be followed" in refusal_of(
        port, plain_chat(["one"], response_format=form)
    )
    found = http_request(
        port, "POST", CHAT, plain_chat(["one"], response_format={"type": "json_object"}, max_tokens=40)
    )
    assert json.loads(found[2])["choices"][0]["message"]["content"].lstrip().startswith("{")
