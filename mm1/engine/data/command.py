"""Define the command `mm1 tokenizer`."""

from pathlib import Path
from typing import Annotated

import tyro

from mm1.errors import UserError

VOCABULARY = 32_000


def tokenizer(
    out: Path,
    files: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[FILES …]")] = (),
    /,
    vocabulary: int | None = None,
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None,
) -> None:
    """Make the tokenizer.json that a run needs: train one on text, or add the special tokens to an existing one.

    Args:
        out: file to write.
        files: data to train on, in any format that a run reads: text, captions, interleaved documents, conversations
            (default: none).
        vocabulary: tokens of a trained tokenizer; a small text may give fewer (default: 32000).
        source: a tokenizer.json to which <pad>, <bos>, <eos> and <image> are added, instead of FILES (default: none).
    """
    if out.exists():
        raise UserError(f"{out} exists already: choose another file")
    if bool(files) == (source is not None):
        raise UserError("expected either FILES to train on or --from an existing tokenizer.json")
    if source is not None and vocabulary is not None:
        raise UserError(f"--vocabulary is {vocabulary}, expected none with --from, which keeps its tokens")
    from tokenizers import Tokenizer

    from mm1.engine.data.tokenizer import byte_level_bpe, id_count, texts_of, vocabulary_size, with_special_tokens

    if source is None:
        text = byte_level_bpe(texts_of(files), VOCABULARY if vocabulary is None else vocabulary).to_str(pretty=True)
    else:
        text, _, _ = with_special_tokens(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n", encoding="utf-8")
    tokens = id_count(Tokenizer.from_str(text))
    size = vocabulary_size(tokens)
    print(f'{out} has {tokens} tokens: set data.tokenizer = "{out}" and model.decoder.vocabulary = {size}')
