"""Translate OpenAI's /v1/chat/completions: requests into prompts and settings, and texts into replies.

The model continues a document, so the messages of a chat are joined into one. The template "conversation" is the layout
of training on conversations (LLaVA's): a user's turn is "USER: … ASSISTANT:" with its images in their places, an
assistant's turn is " …" and end-of-text, a system's or developer's message is its text and a newline. The template
"none", an extension of OpenAI's API, joins texts and images in order and adds nothing; few-shot prompts need it, such
as "quiz\\n", image, "question: … answer:". The default depends on whether the model was trained on conversations.

Settings have Sampling's defaults (greedy), except max_tokens: by default a text may fill the context. top_k, min_p and
repetition_penalty are extensions. An unsupported parameter is refused unless its value changes nothing.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from mm1.engine.data.document import joined_texts
from mm1.engine.data.record import Answer
from mm1.engine.infer.request import Request
from mm1.engine.infer.sampling import TOP_LOGPROBS
from mm1.engine.serve import replies
from mm1.engine.serve.fields import WrongField, json_object, members, number, one_of, settings, text_of, typed
from mm1.engine.serve.replies import Parsed, Picture, finish_of, usage

TEMPLATES = ("conversation", "none")
OWN = ("messages", "logprobs", "top_logprobs", "template")
ROLES = ("system", "developer", "user", "assistant")
# Fields with these values in a message of an earlier answer are ignored.
IGNORED = {"tool_calls": [], "annotations": []}
PARTS = {"text": ("text",), "refusal": ("refusal",), "image_url": ("url", "detail"),
         "file": ("file_id", "file_data", "filename")}  # fmt: skip
DETAILS = ("auto", "low", "high", "original")


def parse(body: bytes, template: str = "conversation") -> Parsed:
    """Parse a request. template: the default of the field template. Raises UserError."""
    fields = json_object(body)
    logprobs = typed("logprobs", fields.get("logprobs", False), bool)
    top = number("top_logprobs", fields.get("top_logprobs", 0), int, 0, TOP_LOGPROBS)
    if top and not logprobs:
        raise WrongField("top_logprobs", "is set, but logprobs is not")
    common = settings(fields, OWN, {"top_logprobs": top})
    if common.has_max_tokens and common.sampling.max_tokens == 0:
        raise WrongField("max_tokens", "is 0, expected at least 1")
    parts = tuple(_prompt(fields.get("messages"), fields.get("template", template)))
    return Parsed([parts], common, common.count, top if logprobs else None)


def _prompt(messages: Any, template: Any) -> list[str | Picture]:
    """Join the messages into the parts of one document. Raises WrongField."""
    one_of("template", template, TEMPLATES)
    turns = [_turn(f"messages[{i}]", message) for i, message in enumerate(typed("messages", messages, list))]
    if not turns:
        raise WrongField("messages", "is empty")
    if template == "none":
        return joined_texts(part for _, parts in turns for part in parts)
    if turns[-1][0] != "user":
        problem = f"is {turns[-1][0]}, expected user as the last one (or template 'none')"
        raise WrongField(f"messages[{len(turns) - 1}].role", problem)
    prompt: list[str | Picture] = []
    for i, (role, parts) in enumerate(turns):
        parts = _stripped(joined_texts(parts))
        if role == "user":
            prompt += ["USER: ", *parts, " ASSISTANT:"]
        elif role in ("system", "developer"):
            prompt += [*parts, "\n"]
        elif any(isinstance(part, Picture) for part in parts):
            raise WrongField(
                f"messages[{i}].content", "has an image, expected text from an assistant (or template 'none')"
            )
        else:
            prompt.append(Answer(f" {''.join(map(str, parts))}"))
    return joined_texts(prompt)


def _turn(where: str, message: Any) -> tuple[str, list[str | Picture]]:
    """Return the role and the parts of a message; an assistant's may have no content. where: its path, for errors."""
    message = typed(where, message, dict)
    message = {key: value for key, value in message.items() if value is not None and value != IGNORED.get(key)}
    role = one_of(f"{where}.role", message.get("role"), ROLES)
    message = members(where, message, ("role", "content", "name", *(["refusal"] if role == "assistant" else [])))
    text_of(f"{where}.name", message.get("name", ""))
    content = message.get("content", [] if role == "assistant" else None)
    if isinstance(content, str):
        parts: list[str | Picture] = [text_of(f"{where}.content", content)]
    else:
        entries = typed(f"{where}.content", content, list)
        parts = [_part(f"{where}.content[{i}]", entry) for i, entry in enumerate(entries)]
    if "refusal" in message:
        parts.append(text_of(f"{where}.refusal", message["refusal"]))
    return role, parts


def _part(where: str, part: Any) -> str | Picture:
    kind = one_of(f"{where}.type", typed(where, part, dict).get("type"), PARTS)
    part = members(where, part, ("type", kind, "prompt_cache_breakpoint"))
    where = f"{where}.{kind}"
    if kind in ("text", "refusal"):
        return text_of(where, part.get(kind))
    inner = members(where, part.get(kind), PARTS[kind])
    one_of(f"{where}.detail", inner.get("detail", "auto"), DETAILS)
    text_of(f"{where}.filename", inner.get("filename", ""))
    source = "url" if kind == "image_url" else "file_data" if "file_data" in inner else "file_id"
    return Picture(text_of(f"{where}.{source}", inner.get(source)))


def _stripped(parts: list[str | Picture]) -> list[str | Picture]:
    """Remove white space from the beginning and the end of a message."""
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return parts


class Reply(replies.Reply):
    """Build the response to a chat request."""

    ID: ClassVar = "chatcmpl"
    OBJECT: ClassVar = "chat.completion.chunk"

    def whole(self, requests: Sequence[Request]) -> dict[str, Any]:
        choices = [
            {"index": i, "message": {"role": "assistant", "content": request.text, "refusal": None},
             "finish_reason": finish_of(request), "logprobs": self.logprobs(request, Counter(), i)}
            for i, request in enumerate(requests)
        ]  # fmt: skip
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": usage(requests)}

    def begin(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        super().begin(requests)
        self.sent = Counter[int]()  # tokens of each text whose log-probabilities were sent
        return [self._chunk(i, {"role": "assistant", "content": ""}) for i in range(len(requests))]

    def piece(self, index: int, text: str) -> dict[str, Any]:
        return self._chunk(index, {"content": text}, None, self.logprobs(self.requests[index], self.sent, index))

    def end(self, index: int) -> dict[str, Any]:
        request = self.requests[index]
        return self._chunk(index, {}, finish_of(request), self.logprobs(request, self.sent, index))

    def _chunk(self, index: int, delta: dict[str, str], finish: str | None = None, logprobs: Any = None) -> dict:
        return self.chunk({"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs})

    def logprobs(self, request: Request, sent: Counter[int], index: int = 0) -> dict[str, Any] | None:
        """Return OpenAI's logprobs object of the tokens after the first sent[index], and count them in `sent`.

        None if the request asks for none. The bytes of all entries make the text.
        """
        if self.parsed.logprobs is None:
            return None
        content = [
            self._entry(token, logprob, piece) | {"top_logprobs": [self._entry(*pair) for pair in top]}
            for token, logprob, top, piece in zip(*self.tokens(request, sent[index]))
        ]
        sent[index] += len(content)
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float, piece: bytes | None = None) -> dict[str, Any]:
        """Return the entry of a token. piece: its bytes, by default those that it has inside a text."""
        piece = self.tokenizer.token_bytes(token) if piece is None else piece
        name = piece.decode("utf-8", "replace") or self.control_name(token)
        return {"token": name, "logprob": max(logprob, -9999.0), "bytes": list(piece)}  # JSON has no infinity
