import base64
import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm1.engine.data import tar
from mm1.engine.data.paths import expand
from mm1.engine.data.record import Answer, Media
from mm1.engine.data.references import read_image
from mm1.engine.data.sources import Captions, Conversations, Interleaved, TextSource, open_source
from mm1.errors import Unreadable, UserError

PNG = b"\x89PNG any bytes: sources do not look inside images"
ROOT = Path(__file__).parents[1]
image = partial(Media, "image")
LONG = "folder/" * 30 + "x" * 120


def write_tar(path, members, **options):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_lines(path, documents):
    data = "\n".join(json.dumps(document) for document in documents).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def pairs(n):
    return [(f"{i:05d}.{end}", f"{end} {i} ".encode() * i + b"!") for i in range(n) for end in ("jpg", "txt")]


def reason(source, i=0):
    with pytest.raises(Unreadable) as caught:
        source[i]
    assert "\n" not in caught.value.reason
    assert caught.value.shard
    return caught.value.reason


def document_error(tmp_path, *documents):
    return reason(Interleaved(write_lines(tmp_path / "bad.jsonl", documents)))


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_captions_read_what_tarfile_reads(tmp_path, name):
    path = write_tar(tmp_path / name, pairs(50))
    source = Captions([path])
    with tarfile.open(path) as tar:
        truth = [file.read() for file in map(tar.extractfile, tar) if file]
    records = [source[i] for i in range(50)]
    assert [part for r in records for part in r.parts] == [
        image(t) if i % 2 == 0 else t.decode().strip() for i, t in enumerate(truth)
    ]
    assert (records[7].key, records[7].shard, source.damage) == ("00007", str(path), ())
    with pytest.raises(IndexError):
        source[50]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_non_ascii_names_are_found_in_every_tar_format(tmp_path, format):
    keys = ["folder/" * 15 + "a" * 60, "./plain"] if format == tarfile.USTAR_FORMAT else [LONG, "é/日本"]
    path = write_tar(tmp_path / "a.tar", [(k + e, b"x") for k in keys for e in (".PNG", ".txt")], format=format)
    assert [record.key for record in Captions(path)] == [key.removeprefix("./") for key in keys]


def test_folders_links_and_other_members_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in [("a", tarfile.DIRTYPE), ("a/b.png", tarfile.SYMTYPE), ("c.cls", tarfile.REGTYPE)]:
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
        for name, data in [("d.seg.png", b"no"), ("d.txt", b"a dog"), ("._d.png", b"no"), ("d.png", PNG)]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert [record.parts for record in Captions(tmp_path / "a.tar")] == [(image(PNG), "a dog")]


def test_a_name_used_twice_is_two_samples(tmp_path):
    members = [(f"a.{end}", data) for data in (b"1", b"2") for end in ("png", "txt")]
    assert [r.parts for r in Captions(write_tar(tmp_path / "a.tar", members))] == [
        (image(b"1"), "1"),
        (image(b"2"), "2"),
    ]


@pytest.mark.parametrize("field", ["caption", "text"])
def test_captions_come_from_json_where_there_is_no_txt(tmp_path, field):
    meta = json.dumps({field: "from json", "width": 3}).encode()
    members = [("a.png", PNG), ("a.json", meta), ("b.png", PNG), ("b.json", meta), ("b.txt", b"from txt")]
    captions = [r.parts[1] for r in Captions(write_tar(tmp_path / "a.tar", members))]
    assert captions == ["from json", "from txt"]


@pytest.mark.parametrize(
    "members, why",
    [
        ([("a.png", PNG)], "image without a caption"),
        ([("a.txt", b"a cat")], "caption without an image"),
        ([("a.png", PNG), ("a.txt", b" \n")], "empty caption"),
        ([("a.png", PNG), ("a.txt", b"\xff\xfe")], "not UTF-8"),
        ([("a.png", PNG), ("a.json", b"{'caption'")], "malformed JSON"),
        ([("a.png", PNG), ("a.json", b"[" * 100_000)], "malformed JSON"),
        ([("a.png", PNG), ("a.json", b'{"url": "x"}')], "image without a caption"),
        ([("a.png", PNG), ("a.json", b'{"text": 3}')], "of type int"),
        ([("a.png", PNG), ("a.json", b'{"text": "\\ud83d"}')], "not valid Unicode"),
    ],
)
def test_a_broken_sample_says_why_and_spares_the_next(tmp_path, members, why):
    source = Captions(write_tar(tmp_path / "a.tar", [*members, ("b.png", PNG), ("b.txt", b"a cat")]))
    assert why in reason(source)
    with pytest.raises(Unreadable, match=r"a\.tar: a: ") as caught:
        source[0]
    assert caught.value.key == "a"
    assert source[1].parts == (image(PNG), "a cat")


@pytest.mark.parametrize(
    "cut, whole, why",
    [
        (8 * 1024 + 300, 4, "broken header at byte 8192"),
        (8 * 1024 + 600, 4, "cut off at byte 8792, inside a member"),
        (8 * 1024, 4, "cut off at byte 8192: there is no end-of-archive mark"),
        (9 * 1024, 5, "cut off at byte 9216: there is no end-of-archive mark"),
    ],
)
def test_a_cut_tar_keeps_its_whole_members_and_reports_the_cut(tmp_path, cut, whole, why):
    data = write_tar(tmp_path / "a.tar", [(name, b"x" * 512) for name, _ in pairs(20)]).read_bytes()
    (tmp_path / "b.tar").write_bytes(data[:cut])
    source = Captions(["a.tar", "b.tar"], tmp_path)
    assert len(source) == 20 + whole
    assert source[20].parts == source[0].parts
    assert [shard for shard, _ in source.damage] == [str(tmp_path / "b.tar")]
    assert why in source.damage[0][1]


def test_a_broken_header_or_gzip_amid_a_tar_is_reported(tmp_path):
    data = bytearray(write_tar(tmp_path / "a.tar", [(name, b"x" * 512) for name, _ in pairs(20)]).read_bytes())
    data[8 * 1024 + 5] ^= 1
    (tmp_path / "b.tar").write_bytes(data)
    source = Captions(tmp_path / "b.tar")
    assert len(source) == 4
    assert "broken header at byte 8192" in source.damage[0][1]
    packed = write_tar(
        tmp_path / "c.tar.gz", [(f"{i}.{e}", os.urandom(999)) for i in range(50) for e in ("png", "txt")]
    )
    packed.write_bytes(packed.read_bytes()[:50_000])
    source = Captions(packed)
    assert 20 < len(source) < 30
    assert "gzip" in source.damage[0][1]


def test_interleaved_keeps_reading_order_for_every_form_of_image(tmp_path):
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "a.png").write_bytes(b"file")
    write_tar(tmp_path / "t.tar", [("x/1.png", b"old"), ("x/2.png", b"two"), ("x/1.png", b"new")])
    write_tar(tmp_path / "t.tar.gz", [("1.png", b"packed")])
    uri = "data:image/png;base64," + base64.b64encode(b"inline").decode()
    images = ["img/a.png", None, "t.tar/x/1.png", "t.tar/x/2.png", "t.tar.gz/1.png", uri, None, None, None]
    document = {"images": images, "texts": [None, "then", None, None, None, None, None, "", "end\n"]}
    parts = (image(b"file"), "then", *map(image, (b"new", b"two", b"packed", b"inline")), "end\n")
    (tmp_path / "one.json").write_text(json.dumps(document))
    (tmp_path / "list.json").write_text(json.dumps([document, document]))
    write_lines(tmp_path / "b.jsonl", [document])
    write_lines(tmp_path / "c.jsonl.gz", [document])
    source = Interleaved(["*.json", "*.jsonl*"], tmp_path)
    assert [record.parts for record in source] == [parts] * 5
    assert [record.key for record in source] == ["0", "1", "0", "1", "1"]


IMG2DATASET = """#!{python}
import os, sys
import pyarrow.parquet as pq
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
rows = pq.read_table(options["--url_list"]).to_pylist()
assert len(rows) == len({{row["url"] for row in rows}}) <= 3
folder = options["--output_folder"] + "/00000"
os.makedirs(folder)
for i, row in enumerate(rows):
    row |= {{"key": f"{{i:09}}", "status": "failed_to_download" if "gone" in row["url"] else "success"}}
    if row["status"] == "success":
        with open(f"{{folder}}/{{i:09}}.jpg", "w") as out:
            out.write("pixels of " + row["url"])
import pyarrow as pa
pq.write_table(pa.Table.from_pylist(rows), folder + ".parquet")
"""


def test_the_recipe_of_obelics_makes_documents_of_one_file_after_the_other(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    recipe = page.partition("### OBELICS")[2].partition("```python\n")[2].partition("```")[0]
    (tmp_path / "obelics").mkdir()
    for i in range(2):
        table = {
            "texts": [[None, f"text {i}", None], ["alone"]],
            "images": [[f"http://a.b/{i}", None, f"http://a.b/gone{i}"], [None]],
        }
        pq.write_table(pa.table(table), tmp_path / "obelics" / f"train-{i}.parquet")
    program = tmp_path / "bin" / "img2dataset"
    program.parent.mkdir()
    program.write_text(IMG2DATASET.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    exec(recipe, {})
    for i in range(2):
        source = Interleaved(f"documents-train-{i}.jsonl", tmp_path)
        assert [r.parts for r in source] == [(image(f"pixels of http://a.b/{i}".encode()), f"text {i}"), ("alone",)]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_whose_names_have_the_same_hash_are_told_apart(tmp_path, monkeypatch, format):
    monkeypatch.setattr(tar, "hash", lambda name: 7, raising=False)
    names = ["a.png", "b.png", "folder/" * 15 + "c.png", *([] if format == tarfile.USTAR_FORMAT else [LONG, "é/日本"])]
    path = write_tar(tmp_path / "a.tar", [(name, name.encode()) for name in names] + [("a.png", b"new")], format=format)
    read = [read_image(f"a.tar/{name}", tmp_path) for name in names]
    assert read == [b"new", *(name.encode() for name in names[1:])]  # tar takes the last of a name
    for missing in ("d.png", "a", ""):
        with pytest.raises(Unreadable, match=f"no member {missing!r} in {path}"):
            tar.read_member(tar.File.at(path), missing)


def test_a_directory_of_members_takes_at_most_24_bytes_each(tmp_path):
    write_tar(tmp_path / "a.tar", pairs(500))
    *tables, _ = tar._directory(tar.File.at(tmp_path / "a.tar"))
    assert sum(table.nbytes for table in tables) <= 24 * 1000


def test_parquet_rows_are_found_across_row_groups(tmp_path):
    texts = [[None, f"text {i}"] for i in range(25)]
    images = [[{"bytes": b"%d" % i, "path": None}, {"bytes": None, "path": None}] for i in range(25)]
    pq.write_table(pa.table({"texts": texts, "images": images}), tmp_path / "a.parquet", row_group_size=10)
    source = Interleaved(tmp_path / "a.parquet")
    assert [source[i].parts for i in (24, 0, 10, 9)] == [(image(b"%d" % i), f"text {i}") for i in (24, 0, 10, 9)]
    pq.write_table(pa.table({"text": ["a", "", "c"]}), tmp_path / "t.parquet", row_group_size=2)
    source = TextSource(tmp_path / "t.parquet")
    assert (source[2].parts, source[2].key) == (("c",), "2")
    assert "empty text" in reason(source, 1)
    with pytest.raises(UserError, match="no column 'texts'"):
        Interleaved(tmp_path / "t.parquet")


def test_parquet_without_pyarrow_names_the_package(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install pyarrow"):
        TextSource(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "image, why",
    [
        ("https://example.com/a.png", "URL, which is never fetched"),
        ("../a.png", "not a path inside"),
        ("/etc/hostname", "not a path inside"),
        ("", "not a path inside"),
        ("missing.png", "no image 'missing.png'"),
        ("t.tar/missing.png", "no member 'missing.png'"),
        ("text.tar/a.png", "not a tar archive"),
        ("data:text/html;base64,AAAA", "expected data:image"),
        ("data:image/png;base64,A!", "base64"),
        (7, "of type int"),
    ],
)
def test_a_bad_image_reference_is_refused(tmp_path, image, why):
    write_tar(tmp_path / "t.tar", [("a.png", PNG)])
    (tmp_path / "text.tar").write_text("not a tar")
    assert why in document_error(tmp_path, {"texts": [None], "images": [image]})


def test_a_malformed_document_is_refused(tmp_path):
    assert "same position" in document_error(tmp_path, {"texts": ["a"], "images": ["a.png"]})
    assert "empty document" in document_error(tmp_path, {"texts": [None, " "], "images": [None, None]})
    for document in [{"texts": ["a"]}, {"texts": ["a"], "images": []}, ["a"], None]:
        assert "of the same length" in document_error(tmp_path, document)
    assert "of type int" in document_error(tmp_path, {"texts": [3], "images": [None]})
    (tmp_path / "b.jsonl").write_bytes(b'{"texts": [')
    assert "malformed JSON" in reason(Interleaved(tmp_path / "b.jsonl"))
    (tmp_path / "c.json").write_text("[{")
    with pytest.raises(UserError, match=r"no records in .*c.json \(.*malformed JSON"):
        Interleaved(tmp_path / "c.json")


def test_text_has_one_document_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufefffirst\r\n\r\n  \nné é".encode() + b"\n\xff\n")
    source = TextSource(tmp_path / "a.txt")
    assert [(source[i].parts, source[i].key) for i in (0, 1)] == [(("first",), "1"), (("né é",), "4")]
    assert (len(source), "not UTF-8" in reason(source, 2)) == (3, True)
    texts = [f"line {i}\n" * (i % 7 + 1) for i in range(500)]
    for name in ("b.jsonl", "b.jsonl.gz"):
        path = write_lines(tmp_path / name, [{"text": text} for text in texts])
        assert [record.parts[0] for record in TextSource(path)] == texts
    source = TextSource(write_lines(tmp_path / "c.jsonl", [{"text": ""}, {}, [3]]))
    assert ["empty text" in reason(source, 0), "empty text" in reason(source, 1)] == [True, True]
    assert "of type list" in reason(source, 2)


def test_a_source_survives_pickling_into_another_process(tmp_path):
    sources = [
        Captions(write_tar(tmp_path / "a.tar", pairs(9))),
        Captions(write_tar(tmp_path / "b.tar.gz", pairs(9))),
        TextSource(write_lines(tmp_path / "c.jsonl", [{"text": "x" * 10_000}] * 9)),
    ]
    truth = [source[8] for source in sources]  # with descriptors open and gz unpacked
    pickled = pickle.dumps(sources)
    assert len(pickled) < 5_000
    code = "import sys, pickle; print([s[8] for s in pickle.load(sys.stdin.buffer)])"
    out = subprocess.run([sys.executable, "-c", code], input=pickled, stdout=subprocess.PIPE, check=True, cwd=ROOT)
    assert out.stdout.decode().strip() == str(truth)


def test_a_shard_written_anew_is_read_anew(tmp_path):
    for i in (1, 2):
        path = write_tar(tmp_path / "a.tar", [("a.png", b"%d" % i), ("a.txt", b"cat")])
        os.utime(path, ns=(i, i))
        assert Captions(path)[0].parts[0] == image(b"%d" % i)


def test_expand_knows_ranges_and_globs(tmp_path):
    names = [f"s-{i:03d}.tar" for i in (8, 9, 10, 11)] + ["odd[1].tar"]
    for name in reversed(names):
        (tmp_path / name).touch()
    assert [p.name for p in expand("s-{008..011}.tar", tmp_path)] == names[:4]
    assert [p.name for p in expand(["odd[1].tar", str(tmp_path / "s-*.tar")], tmp_path)] == names[4:] + names[:4]


@pytest.mark.parametrize(
    "kind, path, why",
    [
        ("captions", "missing.tar", "no such file: .*missing.tar"),
        ("captions", "s-{00..03}.tar", "no such file: .*s-00.tar"),
        ("captions", "none-*.tar", r"no such file: .*none-\*.tar"),
        ("captions", ".", "is a directory"),
        ("captions", [], "the data has no paths"),
        ("captions", "text.tar", "text.tar is not a tar archive"),
        ("captions", "empty.tar", "empty.tar is empty, not a tar archive"),
        ("captions", "text.tar.gz", "text.tar.gz is not a gzip file"),
        ("text", "text.parquet", "text.parquet is not a parquet file"),
        ("text", "text.tar", "expected a file ending in .jsonl, .jsonl.gz, .txt, .parquet"),
        ("text", "empty.txt", "no records in .*empty.txt"),
        ("interleaved", "empty.txt", "expected a file ending in .json, "),
        ("video", "a.mp4", "the kind of data is 'video', expected one of captions, interleaved, text"),
    ],
)
def test_a_wrong_path_or_kind_is_one_clear_line(tmp_path, kind, path, why):
    for name in ("text.tar", "text.tar.gz", "text.parquet"):
        (tmp_path / name).write_text("plain text " * 100)
    for name in ("empty.tar", "empty.txt"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=why) as caught:
        open_source(kind, path, tmp_path)
    assert "\n" not in str(caught.value)


def turns(*texts):
    """Return texts as turns of human and gpt alternately."""
    return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]


def test_an_image_without_bytes_and_path_is_unreadable_at_a_position_without_text(tmp_path):
    empty = {"bytes": None, "path": None}  # data sets store a missing image in this form at the position of a text
    rows = [{"texts": ["a", "b"], "images": [empty, None]}, {"texts": ["a", None], "images": [None, empty]}]
    source = Interleaved(str(write_lines(tmp_path / "a.jsonl", rows)), tmp_path)
    assert source[0].parts == ("a", "b")
    with pytest.raises(Unreadable, match="an image with neither bytes nor a path"):
        source[1]


def test_images_of_a_conversation_are_read_although_image_is_null(tmp_path):
    (tmp_path / "a.png").write_bytes(b"file")
    turns = [{"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": "one"}]
    rows = [{"conversations": turns, "image": None, "images": ["a.png"]}]
    source = Conversations(str(write_lines(tmp_path / "a.jsonl", rows)), tmp_path)
    assert Media("image", b"file") in source[0].parts


def test_conversations_are_asked_and_answered(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(PNG + name.encode())
    talks = [
        {"id": "1", "image": "a.png", "conversations": turns("<image>\nWhat is it?", "A box. ", "Where?", "Here.")},
        {"conversations": turns("Hello", "Good day")},
        {"image": ["a.png", "b.png"], "conversations": turns("Is <image> like <image>?", "Yes")},
    ]
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    for source in (
        open_source("conversations", "talks.json", tmp_path),
        Conversations(write_lines(tmp_path / "talks.jsonl.gz", talks)),
    ):
        assert source[0].parts == (
            "USER: ", image(PNG + b"a.png"), "\nWhat is it? ASSISTANT:", " A box.", "USER: Where? ASSISTANT:", " Here.",
        )  # fmt: skip
        assert [isinstance(part, Answer) for part in source[0].parts] == [False, False, False, True, False, True]
        assert source[1].parts == ("USER: Hello ASSISTANT:", " Good day")
        assert source[2].parts == (
            "USER: Is ",
            image(PNG + b"a.png"),
            " like ",
            image(PNG + b"b.png"),
            "? ASSISTANT:",
            " Yes",
        )
    answers = pickle.loads(pickle.dumps(source[0])).parts
    assert isinstance(answers[3], Answer)


@pytest.mark.parametrize(
    "talk, why",
    [
        ([], "expected a list"),
        ({"conversations": []}, "expected a list"),
        ({"conversations": ["hello"]}, "of objects"),
        ({"conversations": turns("<image>", "a box")}, "has 0 images, expected 1, one for each <image>"),
        ({"conversations": turns("what?", "a box"), "image": "a.png"}, "has 1 images, expected 0"),
        ({"conversations": turns("what?")}, "the last turn is from 'human', expected 'gpt'"),
        ({"conversations": turns("what?", " ")}, "empty turn"),
        ({"conversations": turns("what?", 5)}, "turn is of type int"),
        ({"conversations": [{"from": "system", "value": "be kind"}, *turns("what?", "a box")]}, "from 'system'"),
        ({"conversations": turns("<image>", "a box"), "image": "../a.png"}, "not a path inside"),
    ],
)
def test_conversations_that_cannot_be_used_are_unreadable(tmp_path, talk, why):
    assert why in reason(Conversations(write_lines(tmp_path / "bad.jsonl", [talk])))
