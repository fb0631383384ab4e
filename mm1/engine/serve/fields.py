"""Fields of the JSON that clients send: read by type and range, refused by name."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mm1.engine.infer.grammar import Grammar
from mm1.engine.infer.sampling import TOP_LOGPROBS, Sampling
from mm1.engine.serve.body import loads
from mm1.errors import UserError

LONGEST = 1 << 24  # tokens: beyond any context
BIASES = 1024  # tokens that logit_bias can name
WHOLE = {"max_tokens": (0, LONGEST), "max_completion_tokens": (0, LONGEST), "top_k": (0, LONGEST), "n": (1, 16),
         "seed": (-(1 << 63), (1 << 63) - 17)}  # fmt: skip
# A penalty near zero makes logits infinite, and what is drawn of them undefined.
REAL = {"temperature": (0, 100), "top_p": (1e-6, 1), "min_p": (0, 1), "repetition_penalty": (0.1, 10),
        "frequency_penalty": (-2, 2), "presence_penalty": (-2, 2)}  # fmt: skip
# Values of parameters without support here that ask for nothing.
NEUTRAL = {"tools": ([],), "tool_choice": ("none",), "functions": ([],), "function_call": ("none",),
           "parallel_tool_calls": (True, False), "modalities": (["text"],), "verbosity": ("medium",),
           "suffix": ("",)}  # fmt: skip
# They concern OpenAI's accounts, storage and caches, and change no text: any value is taken.
WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
                  "prompt_cache_options", "prompt_cache_retention"}  # fmt: skip
COMMON = {*WHOLE, *REAL, "model", "stop", "stream", "stream_options", "logprobs", "logit_bias", "response_format"}


class WrongField(UserError):
    """A field of a request cannot be followed. param: its name."""

    def __init__(self, param: str | None, message: str):
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Settings:
    """What the fields have in common that ask for a text, whatever its form.

    sampling: of the first choice, without a grammar. count: choices. bounded: whether max_tokens was given. schema: the
    JSON schema that the text has to follow, as text. usage: whether a stream tells it.
    """

    sampling: Sampling
    count: int = 1
    bounded: bool = True
    schema: str | None = None
    model: str | None = None
    stream: bool = False
    usage: bool = False

    def samplings(self, choices: int, room: int, grammar: Grammar | None) -> list[Sampling]:
        """Return those of so many choices, of which the i-th draws with seed + i. room: tokens that fit at most."""
        first = replace(self.sampling, grammar=grammar)
        if not self.bounded:
            first = replace(first, max_tokens=max(room, 1))
        seeds = [None if first.seed is None else first.seed + i for i in range(choices)]
        return [replace(first, seed=seed) for seed in seeds]


def settings(asked: dict[str, Any], known: Collection[str], defaults: Mapping[str, Any]) -> Settings:
    """Read all fields but the form's own, `known`. defaults: of Sampling.

    Raises WrongField for one that is of a wrong type or value, or is not supported and asks for something.
    """
    for name in sorted(asked.keys() - COMMON - set(known) - WITHOUT_EFFECT):
        if asked[name] not in NEUTRAL.get(name, ()):
            raise WrongField(name, f"{name[:60]} is not supported")
    numbers = {name: number(name, asked[name], int, *bounds) for name, bounds in WHOLE.items() if name in asked}
    numbers |= {name: number(name, asked[name], float, *bounds) for name, bounds in REAL.items() if name in asked}
    count = numbers.pop("n", 1)
    if "max_completion_tokens" in numbers:
        most = numbers.pop("max_completion_tokens")
        if numbers.setdefault("max_tokens", most) != most:
            message = f"max_completion_tokens is {most}, but max_tokens is {numbers['max_tokens']}"
            raise WrongField("max_completion_tokens", message)
    stop = asked.get("stop", [])
    stop = [stop] if isinstance(stop, str) else typed("stop", stop, list)
    if len(stop) > 16 or not all(isinstance(s, str) and 0 < len(s) <= 256 for s in stop):
        raise WrongField("stop", "stop is a string of 1 to 256 characters, or a list of at most 16 of them")
    stream = typed("stream", asked.get("stream", False), bool)
    options = members("stream_options", asked.get("stream_options", {}), ("include_usage", "include_obfuscation"))
    if "stream_options" in asked and not stream:
        raise WrongField("stream_options", "stream_options is given without stream")
    for name, value in options.items():
        typed(f"stream_options.{name}", value, bool)
    bias = _biases(asked.get("logit_bias", {}))
    return Settings(
        Sampling(**{**defaults, **numbers}, stop=stop, logit_bias=bias), count, "max_tokens" in numbers,
        _schema(asked.get("response_format", {"type": "text"})),
        typed("model", asked["model"], str) if "model" in asked else None,
        stream, options.get("include_usage", False),
    )  # fmt: skip


def _biases(value: Any) -> dict[int, float]:
    """Read logit_bias: token ids as strings, -100 to 100."""
    bias = typed("logit_bias", value, dict)
    if len(bias) > BIASES:
        raise WrongField("logit_bias", f"logit_bias names {len(bias)} tokens, expected at most {BIASES}")
    # "05" beside "5" would be the same token twice.
    if wrong := [token for token in bias if not re.fullmatch(r"0|[1-9]\d{0,8}", token, re.ASCII)]:
        raise WrongField("logit_bias", f"logit_bias has {wrong[0][:60]!r}, expected the id of a token")
    return {int(token): number(f"logit_bias.{token}", add, float, -100, 100) for token, add in bias.items()}


def _schema(value: Any) -> str | None:
    """Read response_format: the JSON schema that it stands for, None for any text."""
    form = members("response_format", value, ("type", "json_schema"))
    kind = form.get("type")
    if kind == "json_schema":
        where, kinds = "response_format.json_schema", {"name": str, "description": str, "strict": bool}
        given = members(where, form.get("json_schema"), (*kinds, "schema"))
        for name in given.keys() & kinds.keys():
            typed(f"{where}.{name}", given[name], kinds[name])
        return json.dumps(typed(f"{where}.schema", given.get("schema"), dict))
    if kind not in ("text", "json_object") or "json_schema" in form:
        found = f"response_format.type is {str(kind)[:60]!r}"
        raise WrongField("response_format", f"{found}, expected text, json_object, or json_schema and a json_schema")
    return '{"type": "object"}' if kind == "json_object" else None


def top_logprobs(name: str, value: Any) -> int:
    """Read how many of the likeliest tokens are wanted beside each."""
    return number(name, value, int, 0, TOP_LOGPROBS)


def members(name: str, value: Any, known: Collection[str]) -> dict[str, Any]:
    """Return the entries of an object, without null ones. Raises WrongField for a key that is not known."""
    entries = {key: entry for key, entry in typed(name, value, dict).items() if entry is not None}
    if unknown := entries.keys() - set(known):
        raise WrongField(name, f"{min(unknown)[:60]!r} of {name} is not supported")
    return entries


def typed(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise WrongField(name, f"{name} is of type {type(value).__name__}, expected {kind.__name__}")
    return value


def number(name: str, value: Any, kind: type, least: float, most: float) -> Any:
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise WrongField(name, f"{name} is of type {type(value).__name__}, expected {kind.__name__}")
    if not least <= value <= most:
        raise WrongField(name, f"{name} is {str(value)[:60]}, expected {least} to {most}")
    return value


def text_of(name: str, value: Any) -> str:
    text = typed(name, value, str)
    try:
        text.isascii() or text.encode()  # a long URL need not be copied
    except UnicodeEncodeError:  # JSON can hold half a surrogate pair
        raise WrongField(name, f"{name} is not valid Unicode") from None
    return text


def json_object(body: bytes) -> dict[str, Any]:
    """Return the object of a request without its null entries. Raises UserError."""
    value = loads(body)
    if not isinstance(value, dict):
        raise UserError(f"the request is of type {type(value).__name__}, expected dict")
    return {key: entry for key, entry in value.items() if entry is not None}
