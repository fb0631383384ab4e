"""Small tokenizer.json files of every kind."""

from pathlib import Path

from small import FOLDER
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from mm1.engine.data.text_tokenizer import SPECIAL, TextTokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", "a", "b", "▁a", "ab", "ba", "\n", "é", "漢", "i", "m", "g", "e", "<", ">"]
WORDS = ["the", "cat", "sat", "on", "mat", "a", "dog", "and", "what", "is", "this", "picture", "of", "an", "image"]
LLAMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def saved(made: Tokenizer, folder: Path, special=SPECIAL) -> TextTokenizer:
    made.add_special_tokens(list(special))
    made.save(str(folder / "tokenizer.json"))
    return TextTokenizer(folder / "tokenizer.json")


def byte_fallback(folder: Path) -> TextTokenizer:
    """Like Llama's: pieces with "▁", characters in bytes, a leading space that is stripped."""
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", *SPECIAL, *BYTES, *PIECES])}
    made = Tokenizer(
        models.BPE(vocabulary, [("a", "b"), ("b", "a"), ("▁", "a")], byte_fallback=True, unk_token="<unk>")
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = LLAMA
    return saved(made, folder)


def byte_level(folder: Path) -> TextTokenizer:
    return TextTokenizer(FOLDER / "tokenizer.json")


def unigram(folder: Path) -> TextTokenizer:
    """As trainers make it: the control tokens stand in the vocabulary, and score better than any piece."""
    words = [f"▁{word}" for word in WORDS]
    pieces = [*words, *sorted({character for word in words for character in word})]
    scores = [(token, 0.0) for token in (*SPECIAL, "<unk>")] + [(piece, -2.0 - i / 9) for i, piece in enumerate(pieces)]
    made = Tokenizer(models.Unigram(scores, len(SPECIAL)))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return saved(made, folder, [*SPECIAL, "<unk>"])


def unigram_bytes(folder: Path) -> TextTokenizer:
    """Like T5's, with byte fallback."""
    scores = [(piece, -float(i)) for i, piece in enumerate(["<unk>", *SPECIAL, *PIECES, *BYTES])]
    made = Tokenizer(models.Unigram(scores, 0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return saved(made, folder)


def word_level(folder: Path) -> TextTokenizer:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return saved(made, folder, [*SPECIAL, "<unk>"])


def word_pieces(folder: Path) -> TextTokenizer:
    pieces = ["<unk>", *SPECIAL, "a", "b", "##a", "##b", ".", "don", "'t", "##.", "<", "##image", "##>", "漢"]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    return saved(made, folder)


KINDS = [byte_fallback, byte_level, unigram, unigram_bytes, word_level, word_pieces]
