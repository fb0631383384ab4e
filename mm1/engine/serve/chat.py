"""Translate OpenAI's /v1/chat/completions: requests into prompts and settings, and texts into replies.

Checkpoints continue interleaved documents, so a chat's messages are joined into one document. The template
"conversation" is the form of training on conversations (LLaVA's): a user's turn is "USER: … ASSISTANT:" with its images
in their places, an assistant's turn is " …" and end-of-text, a system's or developer's message is its text and a
newline. The template "none", an extension, joins texts and images in order and adds nothing; it serves few-shot prompts
such as "quiz\\n", image, "question: … answer:". The default depends on whether the model was trained on conversations.

The defaults of settings are Sampling's (greedy), except max_tokens: as many as the context holds. top_k, min_p and
repetition_penalty are extensions. An unsupported parameter is refused unless its value changes nothing.
"""

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

from mm1.engine.data.document import Document, joined_texts
from mm1.engine.data.record import Answer
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.engine.infer.cache import PAGE
from mm1.engine.infer.grammar import Grammar
from mm1.engine.infer.request import Request
from mm1.engine.infer.sampling import Sampling
from mm1.engine.serve.fields import Settings, WrongField, json_object, members, settings, text_of, top_logprobs, typed

ENTRY_BYTES = 64  # typical size of a token's log-probability in JSON
TEMPLATES = ("conversation", "none")
OWN = ("messages", "logprobs", "top_logprobs", "template")
ROLES = ("system", "developer", "user", "assistant")
# Fields with these values in a message of an earlier answer are ignored.
IGNORED = {"tool_calls": [], "annotations": []}
PARTS = {"text": ("text",), "refusal": ("refusal",), "image_url": ("url", "detail"),
         "file": ("file_id", "file_data", "filename")}  # fmt: skip
DETAILS = ("auto", "low", "high", "original")


class Picture(NamedTuple):
    """Names an image of a request by a data: or http URL or the id of an uploaded file."""

    url: str


class Job(NamedTuple):
    """Holds the Engine's input for one choice. scored: how many tokens at the prompt's end get log-probabilities."""

    document: Document
    sampling: Sampling
    scored: int = 0


@dataclass(frozen=True)
class ChatRequest:
    """Holds a parsed request. logprobs: whether the reply has the tokens' log-probabilities."""

    parts: tuple[str | Picture, ...]
    settings: Settings
    logprobs: bool = False

    @property
    def prompts(self) -> list[tuple[str | Picture, ...] | Document]:
        """Return the one prompt."""
        return [self.parts]

    @property
    def texts(self) -> int:
        """Return how many texts the Engine has to generate."""
        return self.settings.count

    def jobs(self, documents: Sequence[Document], context: int, grammar: Grammar | None) -> list[Job]:
        """Return a job for each choice. documents: the encoded prompt; context: limit of prompt and text in tokens."""
        [document] = documents
        room = context - len(document.tokens)
        return [Job(document, sampling) for sampling in self.settings.samplings(self.settings.count, room, grammar)]

    def reply(self, model: str, tokenizer: TextTokenizer) -> "Reply":
        """Return the reply to fill, under the model's name."""
        top = self.settings.sampling.top_logprobs
        return Reply(model, tokenizer, logprobs=self.logprobs, top=top, usage=self.settings.usage)


def parse(body: bytes, template: str = "conversation") -> ChatRequest:
    """Parse a request. template: the one of requests that name none. Raises UserError."""
    fields = json_object(body)
    logprobs = typed("logprobs", fields.get("logprobs", False), bool)
    top = top_logprobs("top_logprobs", fields.get("top_logprobs", 0))
    if top and not logprobs:
        raise WrongField("top_logprobs", "top_logprobs is given without logprobs")
    common = settings(fields, OWN, {"top_logprobs": top})
    if common.has_max_tokens and common.sampling.max_tokens == 0:
        raise WrongField("max_tokens", "max_tokens is 0, expected at least 1")
    parts = tuple(_prompt(fields.get("messages"), fields.get("template", template)))
    return ChatRequest(parts, common, logprobs)


def _prompt(messages: Any, template: Any) -> list[str | Picture]:
    """Return the parts of the document that the messages are joined into. Raises WrongField."""
    if template not in TEMPLATES:
        raise WrongField("template", f"template is {str(template)[:60]!r}, expected 'conversation' or 'none'")
    turns = [_turn(f"messages[{i}]", message) for i, message in enumerate(typed("messages", messages, list))]
    if not turns:
        raise WrongField("messages", "messages is empty")
    if template == "none":
        return joined_texts(part for _, parts in turns for part in parts)
    if turns[-1][0] != "user":
        message = f"the last message is of role {turns[-1][0]}, expected user (or template 'none')"
        raise WrongField(f"messages[{len(turns) - 1}].role", message)
    prompt: list[str | Picture] = []
    for i, (role, parts) in enumerate(turns):
        parts = _stripped(joined_texts(parts))
        if role == "user":
            prompt += ["USER: ", *parts, " ASSISTANT:"]
        elif role in ("system", "developer"):
            prompt += [*parts, "\n"]
        elif any(isinstance(part, Picture) for part in parts):
            message = "an assistant's message holds an image (which takes template 'none')"
            raise WrongField(f"messages[{i}].content", message)
        else:
            prompt.append(Answer(f" {''.join(map(str, parts))}"))
    return joined_texts(prompt)


def _turn(where: str, message: Any) -> tuple[str, list[str | Picture]]:
    """Return the role and the parts of a message; an assistant's may have no content. where: its path, for errors."""
    message = typed(where, message, dict)
    message = {key: value for key, value in message.items() if value is not None and value != IGNORED.get(key)}
    role, supported = message.get("role"), {"role", "content", "name"}
    if role not in ROLES:
        raise WrongField(f"{where}.role", f"{where}.role is {str(role)[:60]!r}, expected {', '.join(ROLES)}")
    message = members(where, message, supported | {"refusal"} if role == "assistant" else supported)
    text_of(f"{where}.name", message.get("name", ""))
    content = message.get("content", [] if role == "assistant" else None)
    if isinstance(content, str):
        return role, [text_of(f"{where}.content", content), *_refusal(where, message)]
    parts = typed(f"{where}.content", content, list)
    parts = [_part(f"{where}.content[{i}]", part) for i, part in enumerate(parts)]
    return role, [*parts, *_refusal(where, message)]


def _refusal(where: str, message: dict[str, Any]) -> list[str]:
    return [text_of(f"{where}.refusal", message["refusal"])] if "refusal" in message else []


def _part(where: str, part: Any) -> str | Picture:
    kind = typed(where, part, dict).get("type")
    if not isinstance(kind, str) or kind not in PARTS:
        raise WrongField(f"{where}.type", f"{where}.type is {str(kind)[:60]!r}, expected {', '.join(PARTS)}")
    part = members(where, part, ("type", kind, "prompt_cache_breakpoint"))
    if kind in ("text", "refusal"):
        return text_of(f"{where}.{kind}", part.get(kind))
    where = f"{where}.{kind}"
    inner = members(where, part.get(kind), PARTS[kind])
    if inner.get("detail", "auto") not in DETAILS:
        detail = str(inner["detail"])[:60]
        raise WrongField(f"{where}.detail", f"{where}.detail is {detail!r}, expected {', '.join(DETAILS)}")
    text_of(f"{where}.filename", inner.get("filename", ""))
    source = "url" if kind == "image_url" else "file_data" if "file_data" in inner else "file_id"
    return Picture(text_of(f"{where}.{source}", inner.get(source)))


def _stripped(parts: list[str | Picture]) -> list[str | Picture]:
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return parts


class Reply:
    """Builds the response to one request, whole or in chunks with the same id.

    logprobs: whether it has the tokens' log-probabilities, with `top` alternatives each; usage: whether a stream ends
    with token counts.
    """

    def __init__(
        self, model: str, tokenizer: TextTokenizer, *, logprobs: bool = False, top: int = 0, usage: bool = False
    ):
        self.tokenizer, self.with_logprobs, self.top, self.with_usage = tokenizer, logprobs, top, usage
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self.sent: dict[int, int] = {}  # by choice, the number of tokens whose log-probabilities were sent

    def whole(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the response without streaming, from a finished request for each choice."""
        choices = [
            {"index": i, "message": {"role": "assistant", "content": request.text, "refusal": None},
             "finish_reason": finish_of(request), "logprobs": self.logprobs(request, 0) if self.with_logprobs else None}
            for i, request in enumerate(requests)
        ]  # fmt: skip
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": usage(requests)}

    def size(self, requests: Sequence[Request]) -> int:
        """Return about how many bytes of JSON the whole response has."""
        entries = sum(len(request.tokens) for request in requests) * (self.top + 1) if self.with_logprobs else 0
        return sum(len(request.text) for request in requests) + ENTRY_BYTES * entries

    def begin(self, index: int, request: Request) -> list[dict[str, Any]]:
        """Return the chunks before a choice's text."""
        return [self._chunk(index, {"role": "assistant", "content": ""})]

    def piece(self, index: int, request: Request, text: str) -> dict[str, Any]:
        """Return the chunk of a piece of a choice's text."""
        return self._chunk(index, {"content": text}, None, self._new_logprobs(index, request))

    def end(self, index: int, request: Request) -> dict[str, Any]:
        """Return the chunk that ends a choice."""
        return self._chunk(index, {}, finish_of(request), self._new_logprobs(index, request))

    def last(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the chunk with the usage of all choices."""
        return {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage(requests)}

    def _chunk(self, index: int, delta: dict[str, str], finish: str | None = None, logprobs: Any = None) -> dict:
        choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        more = {"usage": None} if self.with_usage else {}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice], **more}

    def _new_logprobs(self, index: int, request: Request) -> dict[str, Any] | None:
        """Return the log-probabilities of the tokens that are new since the last chunk of this choice."""
        if not self.with_logprobs:
            return None
        entries = self.logprobs(request, self.sent.get(index, 0))
        self.sent[index] = self.sent.get(index, 0) + len(entries["content"])
        return entries

    def logprobs(self, request: Request, start: int) -> dict[str, Any]:
        """Return OpenAI's logprobs object for the tokens from `start` on; the entries' bytes, joined, are the text."""
        tokens, logprobs, tops = tokens_from(request, start, self.top)
        content = [
            self._entry(token, logprob, piece) | {"top_logprobs": [self._entry(*pair) for pair in top]}
            for token, logprob, top, piece in zip(tokens, logprobs, tops, pieces_of(self.tokenizer, request, start))
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float, piece: bytes | None = None) -> dict[str, Any]:
        """Return the entry of a token. piece: its bytes, by default those that it adds inside a text."""
        piece = self.tokenizer.token_bytes(token) if piece is None else piece
        name = piece.decode("utf-8", "replace") or name_of(self.tokenizer, token)
        return {"token": name, "logprob": max(logprob, -9999.0), "bytes": list(piece)}


def tokens_from(request: Request, start: int, top: int) -> tuple[list[int], list[float], list[list[tuple[int, float]]]]:
    """Return the tokens from `start` on, their log-probabilities, and the likeliest alternatives of each.

    The lists may differ in length, because the engine's thread may be adding to them; their common length is valid.
    """
    tokens = request.tokens[start:]
    return tokens, request.logprobs[start:], request.top[start:] if top else [[] for _ in tokens]


def pieces_of(tokenizer: TextTokenizer, request: Request, start: int) -> Iterator[bytes]:
    """Yield the bytes that each token of a text adds to it, from token number `start` on."""
    continued = any(map(tokenizer.has_text, islice(request.tokens, start)))
    return iter(tokenizer.pieces(request.tokens[start:], continued))


def finish_of(request: Request) -> str:
    """Return OpenAI's finish_reason of a request. Raises RuntimeError for one that was cancelled or failed."""
    if request.finish in ("stop", "length"):
        return request.finish
    if request.finish == "scored":  # with max_tokens 0
        return "length"
    raise RuntimeError(f"a request has ended as {request.finish}")


def name_of(tokenizer: TextTokenizer, token: int) -> str:
    """Return the name of a token that adds no text, such as <eos>; "" if it has none."""
    return _names_of(tokenizer).get(token, "")


@lru_cache(4)
def _names_of(tokenizer: TextTokenizer) -> dict[int, str]:
    return {number: name for name, number in tokenizer.vocabulary.items()}


def usage(requests: Sequence[Request]) -> dict[str, Any]:
    """Return OpenAI's usage object; each prompt counts once. cached_tokens: prompt tokens found in the prefix cache."""
    firsts = {id(request.document): request for request in reversed(requests)}.values()
    prompt = sum(len(request.document.tokens) for request in firsts)
    generated = sum(len(request.tokens) for request in requests)
    cached = sum(request.shared * PAGE for request in firsts)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached}}  # fmt: skip
