"""Show that `mm1 tokenizer` makes the file that a run needs."""

import gzip
import json
import shutil
import sys
from pathlib import Path

import pytest
from small import FOLDER, small_run
from tokenizers import Tokenizer, models, pre_tokenizers

from mm1.cli import main
from mm1.engine.data.text_tokenizer import SPECIAL, TextTokenizer

TEXTS = ["the light of the lighthouse lights the night\n", "naïve 日本語 <image> \t end"]


def mm1(monkeypatch, capsys, *arguments):
    """Run a command; return its status and its output."""
    monkeypatch.setattr(sys, "argv", ["mm1", *map(str, arguments)])
    status = 0
    try:
        main()
    except SystemExit as ended:
        status = ended.code or 0
    said = capsys.readouterr()
    return status, said.out + said.err


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Write the same texts in every form that a run reads, and change to their folder."""
    monkeypatch.chdir(tmp_path)
    words = [f"{word} {word}" for word in ("lighthouse", "keeper", "harbour")] * 20
    (tmp_path / "a.txt").write_text("\n".join(words))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    documents = [{"texts": [text, None], "images": [None, "gone.png"]} for text in words[:4]]  # an image is missing
    documents += [{"texts": [text], "images": [None]} for text in words]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    turns = [{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": text}]} for text in words]
    (tmp_path / "d.json").write_text(json.dumps(turns))
    shutil.copy(FOLDER / "test-captions.tar.gz", tmp_path / "e.tar.gz")
    return tmp_path


@pytest.mark.parametrize("files, word", [("a.txt", "lighthouse"), ("b.jsonl", "lighthouse"), ("c.jsonl", "lighthouse"),
                                         ("d.json", "lighthouse"), ("e.tar.gz", "seven"),
                                         ("*.txt", "lighthouse")])  # fmt: skip
def test_a_tokenizer_is_trained_on_every_kind_of_data(files, word, folder, monkeypatch, capsys):
    status, said = mm1(monkeypatch, capsys, "tokenizer", "sub/tokenizer.json", files, "--vocabulary", 400)
    assert status == 0, said
    made = TextTokenizer(folder / "sub" / "tokenizer.json")
    assert (made.pad, made.bos, made.eos, made.image) == (0, 1, 2, 3)
    assert len(made) <= 400
    assert (
        f'set data.tokenizer = "sub/tokenizer.json" and model.decoder.vocabulary = {-(-len(made) // 64) * 64}' in said
    )
    assert ("4 records could not be read" in said) == (files == "c.jsonl")
    assert len(made.encode(f" {word}")) == 1
    for text in TEXTS:
        assert made.decode(made.encode(text)) == text
        assert made.image not in made.encode(text)


def test_several_files_are_read_and_the_vocabulary_has_the_size_asked_for(folder, monkeypatch, capsys):
    (folder / "long.txt").write_bytes(gzip.decompress((FOLDER / "train-interleaved.jsonl.gz").read_bytes()))
    status, said = mm1(monkeypatch, capsys, "tokenizer", "t.json", "long.txt", "a.txt", "--vocabulary", 500)
    assert status == 0, said
    assert len(TextTokenizer("t.json")) == 500
    assert "model.decoder.vocabulary = 512" in said


def test_an_existing_tokenizer_gets_the_special_tokens_and_keeps_its_ids(folder, monkeypatch, capsys):
    old = Tokenizer(models.WordLevel({"<unk>": 0, "light": 1, "house": 7}, "<unk>"))  # ids with a gap
    old.pre_tokenizer = pre_tokenizers.Whitespace()
    old.save("old.json")
    status, said = mm1(monkeypatch, capsys, "tokenizer", "new.json", "--from", "old.json")
    assert status == 0, said
    new = TextTokenizer("new.json")
    assert new.encode("light house") == [1, 7]
    specials = [Tokenizer.from_file("new.json").token_to_id(token) for token in SPECIAL]
    assert len(set(specials) | {0, 1, 7}) == 7
    assert len(new) == max(specials + [7]) + 1  # rows of the embedding, not names in the vocabulary


BAD = {
    "neither": ([], "expected either FILES to train on or --from an existing tokenizer.json"),
    "both": (["a.txt", "--from", "a.txt"], "expected either FILES to train on or --from"),
    "no file": (["none.txt"], "no such file: none.txt"),
    "of no kind": (["x.pdf"], "x.pdf: expected a file ending in .tar"),
    "no text": (["images.jsonl"], "images.jsonl has no text that can be read; as interleaved: expected lists"),
    "no room": (["a.txt", "--vocabulary", 200], "--vocabulary is 200, expected at least 260"),
    "not one": (["--from", "a.txt"], "a.txt: Expecting value"),
    "both sizes": (
        ["--from", "a.txt", "--vocabulary", 300],
        "--vocabulary is 300, expected none with --from",
    ),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_what_cannot_be_done_is_one_line_and_writes_nothing(arguments, message, folder, monkeypatch, capsys):
    (folder / "x.pdf").write_text("x")
    (folder / "images.jsonl").write_text('{"pictures": []}\n')
    status, said = mm1(monkeypatch, capsys, "tokenizer", "t.json", *arguments)
    assert status == 2
    assert message in said
    assert len(said.splitlines()) == 1, said
    assert not (folder / "t.json").exists()


def test_a_file_that_is_there_is_not_written_over(folder, monkeypatch, capsys):
    status, said = mm1(monkeypatch, capsys, "tokenizer", "a.txt", "b.jsonl")
    assert (status, said) == (2, "mm1: a.txt exists already: choose another file\n")


def test_a_run_says_which_vocabulary_its_tokenizer_needs_and_how_to_get_one(folder, monkeypatch, capsys):
    data = small_run().data
    source = f'data.sources=[{{kind="text", paths=["{data.sources[1].paths[0]}"]}}]'
    train = ["train", "digits", "--out", "out", "--set", "train.steps=1", "--set", "train.warmup=0", "--set", source]
    shutil.copy(Path(__file__).parent.parent / "README.md", "long.txt")
    mm1(monkeypatch, capsys, "tokenizer", "t.json", "long.txt", "--vocabulary", 420)
    status, said = mm1(monkeypatch, capsys, *train, "--set", "data.tokenizer=t.json")
    path, size = folder / "t.json", 420
    assert said == (f"mm1: the model's vocabulary is 384, but {path} has {size} tokens:"
                    " set the vocabulary, such as model.decoder.vocabulary, to 448\n")  # fmt: skip
    status, said = mm1(monkeypatch, capsys, *train, "--set", 'data.tokenizer=""')
    assert status == 2
    assert said == ("mm1: setting data.tokenizer is '', expected a file: make one by `mm1 tokenizer tokenizer.json"
                    " FILES`\n")  # fmt: skip
    status, said = mm1(
        monkeypatch, capsys, *train, "--set", "data.tokenizer=t.json", "--set", "model.decoder.vocabulary=448"
    )
    assert status == 0, said
