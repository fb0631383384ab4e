"""Parse JSON requests within limits, and write long replies in pieces.

`json` holds the interpreter's lock during a call. Each call here has at most a few megabytes or a few thousand values,
so that the event loop and the engine continue while a thread does this work.
"""

import json
import re
import secrets
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from typing import Any, NoReturn

from mm1.errors import UserError

TEXT = 4 << 20  # limit of the bytes of a body without its long data: URLs
DEPTH = 64  # limit of nesting
VALUES = 1 << 18  # limit of brackets and commas: each parsed value takes a hundred bytes
DIGITS = 100  # limit of a number's digits; 64 bits have 20
LONG = 4096  # limit of the bytes of an image's data: URL that is parsed with the rest; a longer one is cut out
PIECE = 1 << 20  # bytes of a data: URL that one call decodes
STRING_PIECE = 1 << 16  # bytes of a string that one call searches for its end, 0.1 µs for each escape
SLICE = 64  # elements of a list that one call writes

BACKSLASH = ord("\\")
BRACKETS = b"[]{},"
OTHERS = bytes(set(range(256)) - set(BRACKETS))
# The head of an image's data: URL, after the quote. PHP escapes slashes.
IMAGE = re.compile(rb"data: *image(?:/|\\/|\\u002f)[\w.+-]+[^\"\\,]{0,200},", re.IGNORECASE)
INSIDE = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)  # the inside of a string
STEPS = [1 if code in b"[{" else -1 if code in b"]}" else 0 for code in range(256)]


class TooLarge(UserError):
    """Report a body that exceeds a limit of size."""


def loads(body: bytes) -> Any:
    """Parse UTF-8 JSON.

    Raises UserError for malformed JSON, nesting beyond DEPTH, duplicate keys, numbers of more than DIGITS digits, NaN
    and Infinity; TooLarge for more than TEXT bytes or VALUES values.
    """
    mark = secrets.token_hex(16)
    text, urls = _without_long_urls(body.removeprefix(b"\xef\xbb\xbf"), mark)

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members: dict[str, Any] = {}
        for key, value in pairs:
            if key in members:
                raise UserError(f"malformed JSON: the key {key[:60]!r} occurs twice in an object")
            if urls and isinstance(value, str) and value.startswith(mark):
                value = _unescaped(urls[int(value[len(mark) :])])
            members[key] = value
        return members

    try:
        return json.loads(
            text.decode(), object_pairs_hook=object_of, parse_constant=_refuse_constant,
            parse_int=partial(_number, int), parse_float=partial(_number, float),
        )  # fmt: skip
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError("malformed JSON: it is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"malformed JSON: {error}") from None


def _without_long_urls(body: bytes, mark: str) -> tuple[bytes, list[memoryview]]:
    """Return the body with `mark` and a number in place of each long data: URL of an object, and the URLs."""
    pieces: list[bytes] = []
    urls: list[memoryview] = []
    brackets: list[bytes] = []
    view, at, size, values = memoryview(body), 0, 0, 0  # size: bytes so far, without the URLs
    while at < len(body):
        start = body.find(b'"', at)
        start = len(body) if start < 0 else start
        is_url = start > 0 and body[at:start].rstrip().endswith(b":") and IMAGE.match(body, start + 1) is not None
        end = body.find(b'"', start + 1) + 1 if is_url else 0
        # An escaped quote or a letter beyond ASCII means that a text only begins like a URL.
        is_url = end - start > LONG and body[end - 2] != BACKSLASH and body[start:end].isascii()
        end = end if is_url else end_of_string(body, start)
        size += start - at if is_url else end - at
        if size > TEXT:
            raise TooLarge(f"the request has more than {TEXT} bytes without its data: URLs")
        between = body[at:start].translate(None, OTHERS)
        brackets.append(between)
        values += len(between)
        if values > VALUES:
            raise TooLarge(f"the request has more than {VALUES} values")
        if is_url:
            pieces.append(body[at:start] + f'"{mark}{len(urls)}"'.encode())
            urls.append(view[start + 1 : end - 1])
        else:
            pieces.append(body[at:end])
        at = end
    depth = max(accumulate(map(STEPS.__getitem__, b"".join(brackets)), initial=0))
    if depth > DEPTH:
        raise UserError(f"the request is nested {depth} deep, expected at most {DEPTH}")
    return b"".join(pieces), urls


def end_of_string(body: bytes, start: int) -> int:
    """Return the index after the string whose opening quote is at `start`, at most the length of the body."""
    at = start + 1
    while at < len(body):
        end = INSIDE.match(body, at, at + STRING_PIECE).end()  # type: ignore[union-attr]  it also matches the empty string
        if body[end : end + 1] == b'"':
            return end + 1
        if end == at:  # the body ends with a backslash
            break
        at = end
    return len(body)


def _unescaped(url: memoryview) -> str:
    """Return the text of the inside of a JSON string, decoded in pieces that do not cut an escape."""
    pieces, at = [], 0
    while at < len(url):
        piece = bytes(url[at : at + PIECE])
        if len(piece) == PIECE and (cut := piece.find(b"\\", PIECE - 6)) > 0:
            piece = piece[:cut]
        try:
            pieces.append(json.loads(b'"%b"' % piece) if b"\\" in piece else piece.decode("ascii"))
        except ValueError:
            raise UserError("malformed JSON: a data: URL has a wrong escape") from None
        at += len(piece)
    return "".join(pieces)


def _refuse_constant(name: str) -> NoReturn:
    raise UserError(f"malformed JSON: {name} is not a number of JSON")


def _number(kind: type, digits: str) -> Any:
    if len(digits) > DIGITS:
        raise UserError(f"the request has a number of {len(digits)} digits, expected at most {DIGITS}")
    return kind(digits)


def dumps(value: Any) -> bytes:
    """Return the JSON of json.dumps as bytes; long lists are written in slices."""
    return "".join(_pieces(value)).encode()


def _pieces(value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for i, (key, inner) in enumerate(value.items()):
            yield f"{', ' if i else '{'}{json.dumps(key)}: "
            yield from _pieces(inner)
        yield "}"
    elif isinstance(value, list) and len(value) > SLICE:
        for start in range(0, len(value), SLICE):
            yield (", " if start else "[") + json.dumps(value[start : start + SLICE])[1:-1]
        yield "]"
    elif isinstance(value, list) and value:
        for i, inner in enumerate(value):
            yield ", " if i else "["
            yield from _pieces(inner)
        yield "]"
    else:
        yield json.dumps(value)
