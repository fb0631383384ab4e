"""OpenAI's chat form: what is asked, as parts of a prompt and how to continue it; and what is answered.

Checkpoints continue interleaved documents, so messages become one. As trained on conversations (LLaVA's form):
a user's turn is "USER: … ASSISTANT:" with its images in their places, an assistant's is " …" and end-of-text, a
system's is its text and a newline. With "template": "none", an extension, texts and images stand as they are, in
order, adjacent texts joined and nothing added: few-shot prompts, such as "quiz\\n", image, "question: … answer:".

Settings left out are Sampling's (greedy, 64 tokens). top_k and repetition_penalty are extensions. A parameter that is
not known is refused unless it changes nothing.
"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, NamedTuple

import numpy as np

from mm1.engine.data.document import Document, TextTokenizer
from mm1.engine.data.record import Answer, DataError
from mm1.engine.request import Request
from mm1.engine.sampling import Sampling
from mm1.engine.serve.body import loads

WHOLE = {"max_tokens": (1, 1 << 24), "max_completion_tokens": (1, 1 << 24), "top_k": (0, 1 << 24),
         "n": (1, 16), "seed": (-(1 << 63), (1 << 63) - 17)}  # fmt: skip
# A penalty near zero makes logits infinite, and what is drawn of them undefined.
REAL = {"temperature": (0, 100), "top_p": (1e-6, 1), "repetition_penalty": (0.1, 10)}
# Of what is not done here, what asks for nothing.
NEUTRAL = {"frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],),
           "tool_choice": ("none",), "functions": ([],), "modalities": (["text"],), "top_logprobs": (0,),
           "response_format": ({"type": "text"},)}  # fmt: skip
WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
KNOWN = {*WHOLE, *REAL, "model", "messages", "stop", "stream", "stream_options", "logprobs", "template"}
ROLES = ("system", "user", "assistant")


class Picture(NamedTuple):
    """A data: or http URL, or the id of an uploaded file."""

    url: str


@dataclass(frozen=True)
class Asked:
    parts: tuple[str | Picture, ...]
    samplings: tuple[Sampling, ...]  # one a choice
    model: str | None
    stream: bool
    usage: bool  # at a stream's end
    logprobs: bool


def parse(body: bytes) -> Asked:
    """Raises DataError."""
    asked = {key: value for key, value in _typed("the request", loads(body), dict).items() if value is not None}
    for name in asked.keys() - KNOWN - WITHOUT_EFFECT:
        if asked[name] not in NEUTRAL.get(name, ()):
            raise DataError(f"{name} is not supported")
    numbers = {name: _number(name, asked[name], int, *bounds) for name, bounds in WHOLE.items() if name in asked}
    numbers |= {name: _number(name, asked[name], float, *bounds) for name, bounds in REAL.items() if name in asked}
    count, seed = numbers.pop("n", 1), numbers.pop("seed", None)
    if "max_completion_tokens" in numbers:
        numbers["max_tokens"] = numbers.pop("max_completion_tokens")
    stop = asked.get("stop", [])
    stop = [stop] if isinstance(stop, str) else _typed("stop", stop, list)
    if len(stop) > 16 or not all(isinstance(s, str) and 0 < len(s) <= 256 for s in stop):
        raise DataError("stop is a string of 1 to 256 characters, or a list of at most 16 of them")
    stream_options = _typed("stream_options", asked.get("stream_options", {}), dict)
    return Asked(
        tuple(_laid_out(asked.get("messages"), asked.get("template", "conversation"))),
        tuple(
            Sampling(**numbers, stop=stop, seed=None if seed is None else seed + i) for i in range(count)
        ),
        _typed("model", asked["model"], str) if "model" in asked else None,
        _typed("stream", asked.get("stream", False), bool),
        _typed("stream_options.include_usage", stream_options.get("include_usage") or False, bool),
        _typed("logprobs", asked.get("logprobs", False), bool),
    )  # fmt: skip


def _typed(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise DataError(f"{name} is of type {type(value).__name__}, expected {kind.__name__}")
    return value


def _number(name: str, value: Any, kind: type, least: float, most: float) -> Any:
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise DataError(f"{name} is of type {type(value).__name__}, expected {kind.__name__}")
    if not least <= value <= most:
        raise DataError(f"{name} is {value}, expected {least} to {most}")
    return value


def _laid_out(messages: Any, template: Any) -> list[str | Picture]:
    if template not in ("conversation", "none"):
        raise DataError(f"template is {str(template)[:60]!r}, expected 'conversation' or 'none'")
    turns = [_turn(message) for message in _typed("messages", messages, list)]
    if not turns:
        raise DataError("messages is empty")
    if template == "none":
        return _joined([part for _, parts in turns for part in parts])
    if turns[-1][0] != "user":
        raise DataError(f"the last message is of role {turns[-1][0]}, expected user (or template 'none')")
    found: list[str | Picture] = []
    for role, parts in turns:
        parts = _stripped(_joined(parts))
        if role == "user":
            found += ["USER: ", *parts, " ASSISTANT:"]
        elif role == "system":
            found += [*parts, "\n"]
        elif any(isinstance(part, Picture) for part in parts):
            raise DataError("an assistant's message holds an image (which takes template 'none')")
        else:
            found.append(Answer(f" {''.join(map(str, parts))}"))
    return _joined(found)


def _turn(message: Any) -> tuple[str, list[str | Picture]]:
    message = {key: value for key, value in _typed("a message", message, dict).items() if value is not None}
    if unknown := message.keys() - {"role", "content", "name"}:
        raise DataError(f"{min(unknown)} of a message is not supported")
    if message.get("role") not in ROLES:
        raise DataError(f"role is {str(message.get('role'))[:60]!r}, expected {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    return message["role"], [_part(part) for part in _typed("content", content, list)]


def _part(part: Any) -> str | Picture:
    kind = _typed("a part of content", part, dict).get("type")
    if kind == "text":
        text = _typed("text", part.get("text"), str)
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can hold half a surrogate pair
            raise DataError("a text is not valid Unicode") from None
        return text
    if kind == "image_url":
        image = _typed("image_url", part.get("image_url"), dict)
        return Picture(_typed("image_url.url", image.get("url"), str))
    if kind == "file":
        file = _typed("file", part.get("file"), dict)
        return Picture(_typed("file.file_id", file.get("file_id"), str))
    raise DataError(f"a part of content is of type {str(kind)[:60]!r}, expected text, image_url or file")


def _joined(parts: Sequence[str | Picture]) -> list[str | Picture]:
    """Without empty texts; adjacent ones are one, as a document's are, but answers stay."""
    found: list[str | Picture] = []
    for plain, run in groupby((part for part in parts if part), lambda part: type(part) is str):
        run = list(run)
        found += ["".join(map(str, run))] if plain else run
    return found


def _stripped(parts: list[str | Picture]) -> list[str | Picture]:
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return parts


def encode(tokenizer: TextTokenizer, slots: int, parts: Sequence[str | list[np.ndarray]]) -> Document:
    """Of texts and images' views, as DocumentEncoder does in training: bos, and eos behind each answer."""
    tokens, images = [tokenizer.bos], []
    for part in parts:
        if isinstance(part, str):
            tokens += tokenizer.encode(part)
            tokens += [tokenizer.eos] if isinstance(part, Answer) else []
        else:
            tokens += [tokenizer.image] * slots * len(part)
            images += part
    return Document(np.array(tokens, np.int32), tuple(images), "chat")


class Reply:
    """The parts of one completion, whole or in chunks, all with its id."""

    def __init__(self, model: str, tokenizer: TextTokenizer):
        self.tokenizer = tokenizer
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, requests: Sequence[Request], cached: int, logprobs: bool) -> dict[str, Any]:
        choices = [
            {"index": i, "message": {"role": "assistant", "content": request.text, "refusal": None},
             "finish_reason": request.finish, "logprobs": self.logprobs(request, 0) if logprobs else None}
            for i, request in enumerate(requests)
        ]  # fmt: skip
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": usage(requests, cached)}

    def chunk(self, index: int, delta: dict[str, str], finish: str | None = None, logprobs: Any = None) -> dict:
        choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice]}

    def last(self, requests: Sequence[Request], cached: int) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage(requests, cached)}

    def logprobs(self, request: Request, start: int) -> dict[str, Any]:
        """Return those of the tokens from start on, each with the bytes that it adds: joined they are the text's."""
        tokens, entries = request.tokens[start:], []
        pieces = self.tokenizer.pieces(tokens, any(map(self.tokenizer.has_text, islice(request.tokens, start))))
        for piece, logprob in zip(pieces, request.logprobs[start:]):
            text = piece.decode("utf-8", "replace")
            entries.append({"token": text, "logprob": max(logprob, -9999.0), "bytes": list(piece), "top_logprobs": []})
        return {"content": entries, "refusal": None}


def usage(requests: Sequence[Request], cached: int) -> dict[str, Any]:
    """cached: tokens of the prompt that were computed before."""
    prompt, made = len(requests[0].document.tokens), sum(len(request.tokens) for request in requests)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached}}  # fmt: skip
