"""Compute grammar masks: which tokens may come next in a text that must be JSON of a schema.

llguidance (MIT, no dependencies) computes the masks from the bytes of each token, so any tokenizer works. Clients'
schemas are not trusted: some take the library unlimited time and memory (a multipleOf of eight digits takes
gigabytes). A schema is therefore tried first in a separate process, which is killed after SECONDS: this file, run as a
program with the schema as standard input.
"""

import json
import os
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mm1.engine.data.text_tokenizer import TextTokenizer

SECONDS, BYTES = 5, 2 << 30  # limits of time and memory for trying a schema
CACHED = 256  # schemas whose grammars or errors are cached
STEP_SECONDS = 0.1  # limit of CPU time for one mask
TRIAL_TOKENS = 64  # length of each text that a schema is tried with
LARGEST, DEEPEST = 1 << 16, 32  # limits of a schema's characters and of its nesting
PATTERN, REPEATS = 256, 200  # limits of a regular expression's characters and of the product of its counts
# White space between JSON's tokens is limited: a weak model could otherwise write nothing else up to max_tokens.
OPTIONS: Any = {"whitespace_pattern": r"[ \n\t]{0,8}"}
LIMITS = {"step_lexer_fuel": 100_000, "step_max_items": 20_000, "max_lexer_states": 50_000,
          "max_grammar_size": 200_000, "initial_lexer_fuel": 500_000, "verbose_errors": False}  # fmt: skip


class SchemaError(ValueError):
    """Report in one line why a schema cannot be used."""


class Grammar:
    """Hold the grammar of a schema's JSON texts, in the tokens of one tokenizer, and the state of one text in it."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def begin(self) -> "Grammar":
        """Return a copy for a new text. Only copies take tokens, so that requests can share a compiled grammar."""
        return Grammar(self._matcher.deep_copy())

    def allowed(self, vocabulary: int) -> np.ndarray:
        """Return bool [vocabulary]: the tokens that may come next, end-of-text where the text may end.

        Raises RuntimeError if llguidance fails.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, count=min(8 * len(bits), vocabulary), bitorder="little").astype(bool)
        self._check()
        return np.pad(mask, (0, vocabulary - len(mask)))

    def take(self, token: int) -> None:
        """Append a token to the text. Raises RuntimeError if the grammar does not allow it."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError(_line(self._matcher.get_error()))


class Grammars:
    """Compile and cache grammars for one tokenizer. The methods can be called from any thread."""

    def __init__(self, tokenizer: "TextTokenizer"):
        self.tokenizer = tokenizer
        self._cache: OrderedDict[str, Grammar | SchemaError] = OrderedDict()  # least recently used first
        self._lock = Lock()

    def cached(self, schema: str) -> Grammar | None:
        """Return the grammar of a schema that was compiled before. Raises SchemaError if that failed."""
        with self._lock:
            if entry := self._cache.get(schema):
                self._cache.move_to_end(schema)
        if isinstance(entry, SchemaError):
            raise SchemaError(str(entry))
        return entry

    def compile(self, schema: str) -> Grammar:
        """Return the grammar of a JSON schema, which can take seconds. Raises SchemaError.

        Errors are cached too, because trying a schema again can take as long.
        """
        if grammar := self.cached(schema):
            return grammar
        try:
            result = self._compile(schema)
        except SchemaError as error:
            result = SchemaError(str(error))  # a new one, because the cache would keep the traceback's frames alive
        with self._lock:
            self._cache[schema] = result
            while len(self._cache) > CACHED:
                self._cache.popitem(last=False)
        if isinstance(result, SchemaError):
            raise SchemaError(str(result))
        return result

    def _compile(self, schema: str) -> Grammar:
        if not find_spec("llguidance"):
            raise SchemaError("it needs llguidance: pip install llguidance")
        refuse_costly(schema)
        try_apart(schema)
        matcher = _matcher(_tokens_of(self.tokenizer), schema)
        if matcher.is_error():
            raise SchemaError(_line(matcher.get_error()))
        return Grammar(matcher)


class Tokens:
    """Adapt a tokenizer to llguidance: the bytes of each token, and the tokens of a text.

    tokens: bytes by id, empty for tokens without text; special: control tokens; eos: end-of-text; encode: the
    tokenizer's function from a text to ids.
    """

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int], eos: int, encode: Callable[[str], list[int]]):
        self.texts, self.encode = tokens, encode
        # The name of a control token begins with a byte that no UTF-8 text holds.
        self.tokens = [b"\xff[%d]" % i if i in special else token for i, token in enumerate(tokens)]
        self.special_token_ids, self.bos_token_id, self.eos_token_id = special, None, eos
        self.ids = {token: i for i, token in enumerate(tokens) if token}
        self.longest = max(map(len, self.ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """Return tokens of exactly this text: the tokenizer's, or the longest matches if the tokenizer adds a space."""
        ids = self.encode(text.decode("utf-8", "replace"))
        if b"".join(self.texts[i] for i in ids) == text:
            return ids
        ids = []
        while text:
            sizes = range(min(self.longest, len(text)), 0, -1)
            size = next((n for n in sizes if text[:n] in self.ids), 0)
            if not size:  # no token has the next byte
                break
            ids.append(self.ids[text[:size]])
            text = text[size:]
        return ids

    def build(self) -> Any:
        """Return llguidance's tokenizer."""
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(self), eos_token=self.eos_token_id, slices=[])


@lru_cache(4)
def _tokens_of(tokenizer: "TextTokenizer") -> Any:
    special = [tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.image]
    ordinary = {*tokenizer.vocabulary.values()}.difference(special)
    texts = [tokenizer.token_bytes(i) if i in ordinary else b"" for i in range(len(tokenizer))]
    return Tokens(texts, special, tokenizer.eos, tokenizer.encode).build()


def _matcher(tokens: Any, schema: str) -> Any:
    from llguidance import LLMatcher, LLParserLimits

    try:
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=OPTIONS)
    except ValueError as error:
        raise SchemaError(_line(str(error))) from None
    return LLMatcher(tokens, grammar, log_level=0, limits=LLParserLimits(**LIMITS))


def refuse_costly(schema: str) -> None:
    """Raise SchemaError for a schema that is large or deep, or needs an automaton of many states."""
    if len(schema) > LARGEST:
        raise SchemaError(f"it has {len(schema)} characters, expected at most {LARGEST}")
    for depth, key, value in _walk(json.loads(schema), 1):
        if depth > DEEPEST:
            raise SchemaError(f"it is nested deeper than {DEEPEST}")
        if key == "x-guidance":
            raise SchemaError(f"{key} is not supported")
        if key == "multipleOf" and isinstance(value, int | float) and not 0.001 <= value <= 1000:
            raise SchemaError(f"multipleOf is {value}, expected 0.001 to 1000")
        patterns = list(value) if key == "patternProperties" and isinstance(value, dict) else []
        for pattern in [*patterns, *([value] if key == "pattern" and isinstance(value, str) else [])]:
            counts = [int(count[:9]) for count in re.findall(r"[{,]\s*(\d+)", pattern)]
            if len(pattern) > PATTERN or np.prod([max(count, 1) for count in counts], dtype=float) > REPEATS:
                raise SchemaError(
                    f"a pattern has {len(pattern)} characters and counts {counts[:4]}, expected at most {PATTERN} "
                    f"characters and counts whose product is at most {REPEATS}"
                )


def _walk(value: Any, depth: int) -> Iterable[tuple[int, Any, Any]]:
    """Yield (depth, key, value) of all entries of nested objects and lists, to the depth DEEPEST + 1."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield depth, key, inner
        if depth <= DEEPEST:
            yield from _walk(inner, depth + 1)


def try_apart(schema: str) -> None:
    """Run `_try` in another process. Raises SchemaError if it fails or takes too long."""
    # -P stops modules in this folder from hiding the standard library's; the process inherits no environment.
    command = [sys.executable, "-P", str(Path(__file__))]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        ended = subprocess.run(command, input=schema, capture_output=True, text=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        raise SchemaError("it is too costly to follow") from None
    if ended.returncode == 2:
        raise SchemaError(_line(ended.stdout))
    if ended.returncode:
        raise SchemaError("it is too costly to follow")


def _try(schema: str) -> None:
    """Write three texts of a schema with single bytes as tokens: always the first, the middle or the last legal byte.

    Raises SchemaError and RuntimeError.
    """
    import resource
    import time

    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    letters = Tokens([*(bytes([i]) for i in range(256)), b""], [256], 256, lambda text: list(text.encode()))
    grammar = Grammar(_matcher(letters.build(), schema))
    for share in (0.0, 0.5, 0.999):
        text = grammar.begin()
        for _ in range(TRIAL_TOKENS):
            text._check()
            begun = time.process_time()
            tokens = np.flatnonzero(text.allowed(257))
            if time.process_time() - begun > STEP_SECONDS:
                raise SchemaError("it is too costly to follow")
            token = int(tokens[int(share * len(tokens))])
            if token == 256:
                break
            text.take(token)


def _line(message: str) -> str:
    """Return the first line of the library's message, of bounded length."""
    return " ".join(message.partition("\n<")[0].split())[:200] or "it cannot be followed"


if __name__ == "__main__":
    try:
        _try(sys.stdin.read())
    except (SchemaError, RuntimeError) as error:
        print(error)
        sys.exit(2)
