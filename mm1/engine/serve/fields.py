"""Check the type and range of fields in JSON requests, with errors that name the field."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mm1.engine.infer.grammar import Grammar
from mm1.engine.infer.sampling import Sampling
from mm1.engine.serve.body import loads
from mm1.errors import UserError

MAX_TOKENS = 1 << 24  # more than any context has
MAX_BIASES = 1024  # tokens in logit_bias
# These ranges lie within those of Sampling: extreme values that a local user may try are refused from clients.
WHOLE = {"max_tokens": (0, MAX_TOKENS), "max_completion_tokens": (0, MAX_TOKENS), "top_k": (0, MAX_TOKENS),
         "n": (1, 16), "seed": (-(1 << 63), (1 << 63) - 17)}  # fmt: skip
# A penalty near zero would make logits infinite, and sampling from them undefined.
REAL = {"temperature": (0, 100), "top_p": (1e-6, 1), "min_p": (0, 1), "repetition_penalty": (0.1, 10),
        "frequency_penalty": (-2, 2), "presence_penalty": (-2, 2)}  # fmt: skip
# Values of unsupported parameters that have no effect.
NEUTRAL = {"tools": ([],), "tool_choice": ("none",), "functions": ([],), "function_call": ("none",),
           "parallel_tool_calls": (True, False), "modalities": (["text"],), "verbosity": ("medium",),
           "suffix": ("",)}  # fmt: skip
# Parameters of OpenAI's accounts, storage and caches that change no text: any value is accepted.
WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
                  "prompt_cache_options", "prompt_cache_retention"}  # fmt: skip
JSON = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number",
        type(None): "null"}  # fmt: skip
COMMON = {*WHOLE, *REAL, "model", "stop", "stream", "stream_options", "logprobs", "logit_bias", "response_format"}


class WrongField(UserError):
    """Report a wrong field of a request. param: the path of the field; problem: the rest of the message."""

    def __init__(self, param: str, problem: str):
        super().__init__(f"{param[:60]} {problem}")
        self.param = param


@dataclass(frozen=True)
class Settings:
    """Hold the settings that chat and completion requests have in common.

    sampling: of the first choice, without a grammar; count: choices; has_max_tokens: whether the request limits the
    text; schema: the JSON schema that the text must follow, as text; usage: whether a stream ends with token counts.
    """

    sampling: Sampling
    count: int = 1
    has_max_tokens: bool = True
    schema: str | None = None
    model: str | None = None
    stream: bool = False
    usage: bool = False

    def samplings(self, choices: int, room: int, grammar: Grammar | None) -> list[Sampling]:
        """Return the settings of each choice; choice i has seed + i. room: tokens that fit in the context."""
        first = replace(self.sampling, grammar=grammar)
        if not self.has_max_tokens:
            first = replace(first, max_tokens=max(room, 1))
        return [replace(first, seed=None if first.seed is None else first.seed + i) for i in range(choices)]


def settings(fields: dict[str, Any], own: Collection[str], defaults: Mapping[str, Any]) -> Settings:
    """Read the common fields of a request. own: names of its other fields; defaults: for Sampling.

    Raises WrongField for a wrong type or value, and for an unsupported field whose value would have an effect.
    """
    for name in sorted(fields.keys() - COMMON - set(own) - WITHOUT_EFFECT):
        if fields[name] not in NEUTRAL.get(name, ()):
            raise WrongField(name, "is not supported")
    numbers = {name: number(name, fields[name], int, *bounds) for name, bounds in WHOLE.items() if name in fields}
    numbers |= {name: number(name, fields[name], float, *bounds) for name, bounds in REAL.items() if name in fields}
    count = numbers.pop("n", 1)
    if "max_completion_tokens" in numbers:
        limit = numbers.pop("max_completion_tokens")
        if numbers.setdefault("max_tokens", limit) != limit:
            raise WrongField("max_completion_tokens", f"is {limit}, but max_tokens is {numbers['max_tokens']}")
    stop = fields.get("stop", [])
    stop = [stop] if isinstance(stop, str) else typed("stop", stop, list)
    if len(stop) > 16 or not all(isinstance(s, str) and 0 < len(s) <= 256 for s in stop):
        raise WrongField("stop", "is not a string of 1 to 256 characters, nor a list of at most 16 of them")
    stream = typed("stream", fields.get("stream", False), bool)
    options = members("stream_options", fields.get("stream_options", {}), ("include_usage", "include_obfuscation"))
    if "stream_options" in fields and not stream:
        raise WrongField("stream_options", "is set, but stream is not")
    for name, value in options.items():
        typed(f"stream_options.{name}", value, bool)
    bias = _biases(fields.get("logit_bias", {}))
    return Settings(
        Sampling(**{**defaults, **numbers}, stop=stop, logit_bias=bias), count, "max_tokens" in numbers,
        _schema(fields.get("response_format", {"type": "text"})),
        typed("model", fields["model"], str) if "model" in fields else None,
        stream, options.get("include_usage", False),
    )  # fmt: skip


def _biases(value: Any) -> dict[int, float]:
    """Read logit_bias: token ids as strings, with numbers from -100 to 100."""
    bias = typed("logit_bias", value, dict)
    if len(bias) > MAX_BIASES:
        raise WrongField("logit_bias", f"has {len(bias)} tokens, expected at most {MAX_BIASES}")
    # "05" and "5" would be the same token.
    if wrong := [token for token in bias if not re.fullmatch(r"0|[1-9]\d{0,8}", token, re.ASCII)]:
        raise WrongField("logit_bias", f"has {wrong[0][:60]!r}, expected the id of a token")
    return {int(token): number(f"logit_bias.{token}", value, float, -100, 100) for token, value in bias.items()}


def _schema(value: Any) -> str | None:
    """Return the JSON schema that response_format asks for, None for any text."""
    form = members("response_format", value, ("type", "json_schema"))
    kind = one_of("response_format.type", form.get("type"), ("text", "json_object", "json_schema"))
    if (kind == "json_schema") != ("json_schema" in form):
        raise WrongField(
            "response_format", f"has type {kind}, expected json_schema if and only if there is a json_schema"
        )
    if kind != "json_schema":
        return '{"type": "object"}' if kind == "json_object" else None
    where, kinds = "response_format.json_schema", {"name": str, "description": str, "strict": bool}
    entries = members(where, form["json_schema"], (*kinds, "schema"))
    for name in entries.keys() & kinds.keys():
        typed(f"{where}.{name}", entries[name], kinds[name])
    return json.dumps(typed(f"{where}.schema", entries.get("schema"), dict))


def members(name: str, value: Any, supported: Collection[str]) -> dict[str, Any]:
    """Return the entries of an object that are not null. Raises WrongField for a key that is not supported."""
    entries = {key: entry for key, entry in typed(name, value, dict).items() if entry is not None}
    if unknown := entries.keys() - set(supported):
        raise WrongField(name, f"has the entry {min(unknown)[:60]!r}, which is not supported")
    return entries


def typed(name: str, value: Any, kind: type) -> Any:
    """Return the value of a field. Raises WrongField if it is of another type."""
    if not isinstance(value, kind):
        raise WrongField(name, f"is of type {JSON[type(value)]}, expected {JSON[kind]}")
    return value


def one_of(name: str, value: Any, choices: Collection[str]) -> str:
    """Return the value of a field. Raises WrongField unless it is one of these texts."""
    if not isinstance(value, str) or value not in choices:
        raise WrongField(name, f"is {str(value)[:60]!r}, expected one of {', '.join(choices)}")
    return value


def number(name: str, value: Any, kind: type, minimum: float, maximum: float) -> Any:
    """Return the value of a field, an int or a float from minimum to maximum. Raises WrongField otherwise."""
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise WrongField(name, f"is of type {JSON[type(value)]}, expected {JSON[kind]}")
    if not minimum <= value <= maximum:
        raise WrongField(name, f"is {str(value)[:60]}, expected {minimum} to {maximum}")
    return value


def text_of(name: str, value: Any) -> str:
    """Return the text of a field. Raises WrongField for another type, and for text that UTF-8 cannot encode."""
    text = typed(name, value, str)
    try:
        text.isascii() or text.encode()  # isascii saves the copy of a long URL
    except UnicodeEncodeError:  # JSON can hold half a surrogate pair
        raise WrongField(name, "is not valid Unicode") from None
    return text


def json_object(body: bytes) -> dict[str, Any]:
    """Parse a request's JSON object, and omit entries that are null. Raises UserError."""
    value = loads(body)
    if not isinstance(value, dict):
        raise UserError(f"the request is of type {JSON[type(value)]}, expected {JSON[dict]}")
    return {key: entry for key, entry in value.items() if entry is not None}
