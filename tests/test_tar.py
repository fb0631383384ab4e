"""Show that tars as people make them lose no member silently, and that no member leads out of the folder."""

import gzip
import io
import json
import os
import shutil
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm1.engine.data import samples, tar
from mm1.engine.data.record import Alternatives, Media
from mm1.engine.data.references import read_image
from mm1.engine.data.sources import Captions, Interleaved, open_source
from mm1.engine.data.tar import File, members
from mm1.errors import Unreadable, UserError

GNU_TAR = shutil.which("tar") and b"GNU tar" in subprocess.run(["tar", "--version"], capture_output=True).stdout


def packed(*entries, **options):
    """Return a tar of entries: (name, bytes), or TarInfos as they are."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", **options) as archive:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry)
                continue
            name, content = entry
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def pair(name, image=b"pixels"):
    return (f"{name}.png", image), (f"{name}.txt", name.encode())


def contents(record):
    return tuple(part.data if isinstance(part, Media) else part for part in record.parts)


def read(folder, data, name="a.tar"):
    """Return good records as {key: (image bytes, caption)}, the others as {key: reason}, and the source."""
    (folder / name).write_bytes(data)
    source = open_source("captions", name, folder)
    good, bad = {}, {}
    for i in range(len(source)):
        try:
            record = source[i]
            good[record.key] = contents(record)
        except Unreadable as error:
            bad[error.key] = error.reason
    return good, bad, source


def damage(source):
    return "; ".join(reason for _, reason in source.damage)


def test_names_with_dots_are_samples_of_their_own(tmp_path):
    names = ["plain", "photo.v1", "photo.v2", "shot 3.5x", "dir.d/x.y.z", ".../a"]
    good, bad, source = read(tmp_path, packed(*(member for name in names for member in pair(name))))
    assert good == {name: (b"pixels", name) for name in names}
    assert (bad, source.damage) == ({}, ())


def test_a_further_member_is_counted_and_spares_its_sample(tmp_path):
    data = packed(*pair("a"), ("a.mask.png", b"no"), ("a.cls", b"3"), ("._a.png", b"no"), special("d", tarfile.DIRTYPE))
    good, bad, source = read(tmp_path, data)
    assert (good, bad, source.damage) == ({"a": (b"pixels", "a")}, {}, ())
    for count in (
        "1 × .cls in addition to a sample (first: a.cls in ", "1 × a folder (first: d",
        "1 × .png in addition to a sample (first: a.mask.png in ",
        "1 × a name that begins with a dot (first: ._a.png in ",
    ):  # fmt: skip
        assert count in source.ignored


def test_a_dotted_image_alone_is_a_record_that_lacks_its_caption(tmp_path):
    good, bad, _ = read(tmp_path, packed(*pair("a"), ("b.v1.png", b"x")))
    assert list(good) == ["a"]
    assert "image without a caption" in bad["b.v1"]
    _, bad, _ = read(tmp_path, packed(("b.v1.png", b"x"), ("b.txt", b"b")))
    assert bad["b"].startswith(".v1.png is not read as an image")


@pytest.mark.parametrize("extension", ["heic", "HEIC", "svg", "jxl"])
def test_an_extension_that_is_not_read_is_the_reason(tmp_path, extension):
    name = f"b.{extension}"
    _, bad, _ = read(tmp_path, packed(*pair("a"), (name, b"x"), ("b.txt", b"b")))
    assert bad == {"b": f".{extension} is not read as an image, expected " + ", ".join(f".{e}" for e in samples.IMAGES)}
    _, bad, _ = read(tmp_path, packed(*pair("a"), ("b.png", b"x"), (f"b.caption.{extension}", b"b")))
    assert bad["b"].endswith(f"of the same name, found .caption.{extension}")


def test_members_of_no_sample_are_counted(tmp_path):
    (tmp_path / "a.tar").write_bytes(packed(("a.heic", b"x"), ("b.heic", b"x")))
    with pytest.raises(UserError, match=r"no records in .*2 × \.heic in no sample \(first: a\.heic\)"):
        Captions(tmp_path / "a.tar")
    _, _, source = read(tmp_path, packed(*pair("a"), ("README", b"x"), ("b.npy", b"x")))
    assert damage(source) == "skipped: 1 × . in no sample (first: README), 1 × .npy in no sample (first: b.npy)"


@pytest.mark.parametrize("name", ["b.jpg(1)", "b (copy).heic", "b.(a symbolic link)"])
def test_a_parenthesis_in_a_name_is_no_link(tmp_path, name):
    _, _, source = read(tmp_path, packed(*pair("a"), (name, b"x")))
    assert damage(source) == f"skipped: 1 × .{name.rpartition('.')[2]} in no sample (first: {name})"


@pytest.mark.parametrize("first", ["the link", "the member"])
def test_a_link_hides_no_member_of_its_name(tmp_path, first):
    members = [special("b.png", tarfile.SYMTYPE, "a.png"), ("b.heic", b"x"), ("b.npy", b"x")]
    _, _, source = read(tmp_path, packed(*pair("a"), *members[:: 1 if first == "the link" else -1]))
    for said in ("1 × a symbolic link (first: b.png)", "1 × .heic in no sample", "1 × .npy in no sample"):
        assert said in damage(source)
    _, bad, source = read(tmp_path, packed(*members, ("b.txt", b"b")))
    assert bad["b"].startswith(".png (a symbolic link), .heic, .npy is not read as an image")
    assert damage(source) == "skipped: 1 × a symbolic link (first: b.png)"
    assert "1 × .heic in addition to a sample (first: b.heic in " in source.ignored


def test_members_are_counted_whatever_their_keys(tmp_path):
    arrays = [(f"v1.0_{i:06}.npy", b"") for i in range(500)]
    _, _, source = read(tmp_path, packed(*pair("a"), *arrays))
    assert damage(source) == "skipped: 500 × .npy in no sample (first: v1.0_000000.npy)"
    _, bad, source = read(tmp_path, packed(*pair("a"), *arrays, ("v1.txt", b"a caption")))
    assert source.ignored.startswith("500 × .npy in addition to a sample (first: v1.0_000000.npy in ")
    assert bad["v1"].startswith(".0_000000.npy, .0_000001.npy, .0_000002.npy and 497 more is not read as an image")


@pytest.mark.parametrize("captions", [True, False])
def test_thousands_of_extensions_are_one_short_line(tmp_path, captions):
    members = [(f"{i}.x{i}", b"") for i in range(4000)] + [("y.cls", b""), ("z.cls", b"")]
    texts = [(f"{i}.txt", b"a caption") for i in range(4000)] if captions else []
    _, bad, source = read(tmp_path, packed(*pair("a"), *members, *texts))
    line = source.ignored if captions else damage(source)
    assert ("3992 members of 3992 further kinds" if captions else "3993 members of 3993 further kinds") in line
    assert "2 × .cls in no sample (first: y.cls)" in damage(source)
    assert len(line) < 2000
    assert all(bad[str(i)].startswith(f".x{i} is not read") for i in range(4000) if captions)


def test_of_two_images_under_one_key_the_first_is_read_and_the_second_reported(tmp_path):
    data = packed(("a.jpg", b"first"), ("a.png", b"second"), ("a.txt", b"a"), *pair("b"))
    good, bad, source = read(tmp_path, data)
    assert (good, bad) == ({"a": (b"first", "a"), "b": (b"pixels", "b")}, {})
    assert damage(source) == "skipped: 1 × a second image of a sample (first: a.png)"
    good, bad, source = read(tmp_path, packed(*pair("a"), ("a.webp", b"later")))
    assert (good, bad) == ({"a": (b"pixels", "a")}, {})
    assert "1 × an image or caption after a complete sample of the same name (first: a)" in damage(source)


def test_links_and_devices_are_counted_and_never_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    kinds = {"a symbolic link": tarfile.SYMTYPE, "a hard link": tarfile.LNKTYPE, "a pipe": tarfile.FIFOTYPE,
             "a character device": tarfile.CHRTYPE, "a block device": tarfile.BLKTYPE}  # fmt: skip
    entries = [special(f"{i}.png", kind, str(tmp_path / "secret.png")) for i, kind in enumerate(kinds.values())]
    texts = [(f"{i}.txt", b"text") for i in range(len(kinds))]
    good, bad, source = read(tmp_path, packed(*entries, *texts, *pair("z")))
    assert list(good) == ["z"]
    for i, words in enumerate(kinds):
        assert f"1 × {words} (first: {i}.png)" in damage(source)
        assert bad[str(i)].startswith(f".png ({words}) is not read as an image")
        with pytest.raises(Unreadable, match=f"is {words}, which is not followed"):
            read_image(f"a.tar/{i}.png", tmp_path)


def test_a_member_of_an_unknown_type_is_counted(tmp_path):
    data = bytearray(packed(*pair("a"), ("b.png", b"x"), ("b.txt", b"b")))
    at = data.index(b"b.png")
    data[at + 156] = ord("Q")
    data[at + 148 : at + 156] = b"%06o\0 " % (sum(data[at : at + 148]) + sum(data[at + 156 : at + 512]) + 8 * 32)
    _, bad, source = read(tmp_path, bytes(data))
    assert "1 × a member of the unknown type 'Q' (first: b.png)" in damage(source)
    assert list(bad) == ["b"]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_appended_archives_are_read_to_the_end(tmp_path, name, form):
    long = "x" * 150
    parts = [packed(*pair("a"), format=form), packed(*pair(long), format=form), packed(*pair("c"), format=form)]
    data = b"".join(gzip.compress(part) if name.endswith("gz") else part for part in parts)
    good, bad, source = read(tmp_path, data, name)
    assert list(good) == ["a", long, "c"]
    assert (bad, source.damage) == ({}, ())
    assert read_image(f"{name}/c.png", tmp_path) == b"pixels"


@pytest.mark.parametrize("zeros", [512, 1024, 512 * 255, (1 << 20) + 512])
def test_any_number_of_zeros_may_stand_between_archives(tmp_path, zeros):
    cut = [packed(*pair(name))[: 4 * 512] for name in "ab"]  # without an end
    good, _, source = read(tmp_path, cut[0] + bytes(zeros) + cut[1] + bytes(zeros) + bytes(100))
    assert (list(good), source.damage) == (["a", "b"], ())
    good, _, source = read(tmp_path, cut[0] + bytes(zeros) + cut[1])
    assert list(good) == ["a", "b"]
    assert "there is no end-of-archive mark" in damage(source)


def test_an_extended_header_of_many_records_is_read_once(tmp_path):
    """Copying the rest of the header for each record would take minutes."""
    records = b"6 a=b\n" * (1 << 18) + b"14 path=b.png\n"
    header = special("x", tarfile.XHDTYPE)
    header.size = len(records)
    data = header.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512)
    (tmp_path / "a.tar").write_bytes(data + packed(("a.png", b"pixels"), ("b.txt", b"b")))
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert archive.getnames() == ["b.png", "b.txt"]
    assert [member.name for member in members(File.at(tmp_path / "a.tar"), [])] == ["b.png", "b.txt"]


def test_junk_after_the_end_of_an_archive_is_reported(tmp_path):
    good, _, source = read(tmp_path, packed(*pair("a")) + b"junk" * 200)
    assert list(good) == ["a"]
    assert "broken header at byte 10240" in damage(source)


@pytest.mark.skipif(not GNU_TAR, reason="needs GNU tar")
@pytest.mark.parametrize("form", ["gnu", "pax 0.0", "pax 0.1", "pax 1.0"])
@pytest.mark.parametrize("holes", [1, 60], ids=["one hole", "a map of several blocks"])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_sparse_members_are_whole(tmp_path, form, holes, name):
    folder, block = tmp_path / "made", os.urandom(4096)
    folder.mkdir()
    image = b"".join(block + bytes(8192) for _ in range(holes)) + bytes(12345)
    with open(folder / "a.bmp", "wb") as file:  # tar asks the file system whether a file has holes
        for at in range(0, holes * 12288, 12288):
            file.seek(at)
            file.write(block)
        file.truncate(len(image))
    for base in ("a", "b"):
        (folder / f"{base}.txt").write_text(base)
    (folder / "b.png").write_bytes(b"pixels")
    kind, _, version = form.partition(" ")
    options = [
        f"--format={kind}",
        *([f"--sparse-version={version}"] if version else []),
        "--hole-detection=raw",
    ]  # raw: by reading
    names = ["a.bmp", "a.txt", "b.png", "b.txt"]
    subprocess.run(["tar", "-S", *options, "-cf", tmp_path / "made.tar", "-C", folder, *names], check=True)
    data = (tmp_path / "made.tar").read_bytes()
    assert any(member.sparse for member in members(File.at(tmp_path / "made.tar"), []))
    good, bad, source = read(tmp_path, gzip.compress(data) if name.endswith("gz") else data, name)
    assert good == {"a": (image, "a"), "b": (b"pixels", "b")}
    assert (bad, source.damage) == ({}, ())
    assert read_image(f"{name}/a.bmp", tmp_path) == image


def test_a_sparse_member_of_terabytes_is_refused_before_it_is_made(tmp_path):
    info = tarfile.TarInfo("a.bmp")
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": "a.bmp",
                        "GNU.sparse.size": str(1 << 42), "GNU.sparse.realsize": str(1 << 42),
                        "GNU.sparse.map": f"{(1 << 42) - 1},0"}  # fmt: skip
    _, bad, _ = read(tmp_path, packed(info, ("a.txt", b"a"), *pair("b"), format=tarfile.PAX_FORMAT))
    assert bad["a"] == (
        "a sparse member of the tar has 0 stored bytes of 4398046511104, expected at most 67108864 in holes"
    )


@pytest.mark.parametrize("holes, fits", [(1 << 16, True), ((1 << 16) + 1, False)])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_holes_are_bounded_and_what_is_stored_is_not(tmp_path, monkeypatch, name, holes, fits):
    """Otherwise a tar of a kilobyte would need a gibibyte each time it is read."""
    monkeypatch.setattr(tar, "MAX_HOLES", 1 << 16)
    info, stored = tarfile.TarInfo("a.bmp"), b"pixels" * 20_000
    info.size, size = len(stored), str(holes + len(stored))
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": "a.bmp",
                        "GNU.sparse.size": size, "GNU.sparse.realsize": size,
                        "GNU.sparse.map": f"{holes},{len(stored)}"}  # fmt: skip
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(stored))
    data = out.getvalue()[:-1024] + packed(("a.txt", b"a"))
    good, bad, _ = read(tmp_path, gzip.compress(data) if name.endswith("gz") else data, name)
    assert good == ({"a": (bytes(holes) + stored, "a")} if fits else {})
    assert list(bad) == ([] if fits else ["a"])


def test_members_are_read_where_the_system_has_no_pread(tmp_path, monkeypatch):
    """Windows has no pread, and its threads share the offset of a file."""
    names = [f"{i}" for i in range(64)]
    data = packed(*(member for name in names for member in pair(name, name.encode() * 500)))
    monkeypatch.delattr(os, "pread")
    good, _, source = read(tmp_path, data)
    assert good == {name: (name.encode() * 500, name) for name in names}
    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(source.__getitem__, list(range(64)) * 20))
    assert [contents(record) for record in records] == [good[name] for name in names] * 20


def test_members_are_those_of_tarfile(tmp_path):
    data = packed(*pair("a"), special("d", tarfile.DIRTYPE), special("l", tarfile.SYMTYPE, "a"), *pair("y" * 200))
    (tmp_path / "a.tar").write_bytes(data)
    with tarfile.open(tmp_path / "a.tar") as archive:
        truth = [(m.name, m.isreg()) for m in archive]
    names = [(m.name.rstrip("/"), not m.kind) for m in members(File.at(tmp_path / "a.tar"), [])]
    assert names == truth


@pytest.mark.parametrize("field", ["caption", "captions", "text"])
def test_several_captions_are_alternatives(tmp_path, field):
    meta = [["one", " two ", "", None], ["only"], [], [None], ["fine", 3]]
    entries = [(f"{i}.{end}", json.dumps({field: m}).encode() if end == "json" else b"x")
               for i, m in enumerate(meta) for end in ("png", "json")]  # fmt: skip
    good, bad, _ = read(tmp_path, packed(*entries))
    assert isinstance(good["0"][1], Alternatives)
    assert (good["0"][1], good["0"][1].texts) == ("one", ("one", "two"))
    assert good["1"] == (b"x", "only")
    assert {key: reason.split(",")[0] for key, reason in bad.items()} == {
        "2": "empty caption", "3": "empty caption", "4": "caption is of type int",
    }  # fmt: skip


@pytest.fixture
def data_folder(tmp_path):
    """Make a data folder next to a private one."""
    for name in ("data", "private"):
        (tmp_path / name).mkdir()
    (tmp_path / "private" / "secret.png").write_bytes(b"secret")
    (tmp_path / "private" / "secret.tar").write_bytes(packed(*pair("a")))
    (tmp_path / "data" / "real").mkdir()
    (tmp_path / "data" / "real" / "a.png").write_bytes(b"mine")
    return tmp_path / "data"


@pytest.mark.parametrize("link, target, name", [
    ("images", "../private", "images/secret.png"),
    ("a.png", "../private/secret.png", "a.png"),
    ("real/up", "..", "real/up/../private/secret.png"),
    ("up", "..", "up/private/secret.png"),
    ("a.tar", "../private/secret.tar", "a.tar/a.png"),
    ("tars", "../private", "tars/secret.tar/a.png"),
])  # fmt: skip
@pytest.mark.parametrize("absolute", [False, True])
def test_no_symbolic_link_leads_out_of_the_data_folder(data_folder, link, target, name, absolute):
    place = data_folder / link
    place.symlink_to(os.path.normpath(place.parent / target) if absolute else os.path.join(target))
    pq.write_table(pa.table({"texts": [[None, "x"]], "images": [[name, None]]}), data_folder / "d.parquet")
    (data_folder / "d.jsonl").write_text(json.dumps({"texts": [None, "x"], "images": [name, None]}))
    for path in ("d.parquet", "d.jsonl"):
        with pytest.raises(Unreadable, match=r"leads out of the shard's folder|not a path inside"):
            Interleaved(path, data_folder)[0]


def test_links_inside_the_folder_and_to_the_folder_are_followed(data_folder, tmp_path):
    (data_folder / "images").symlink_to("real")
    (tmp_path / "alias").symlink_to(data_folder)
    for folder in (data_folder, tmp_path / "alias"):
        assert read_image("images/a.png", folder) == b"mine"


def test_a_path_without_a_link_is_not_resolved(data_folder, tmp_path, monkeypatch):
    """Resolving takes longer than reading a small image."""
    (tmp_path / "alias").symlink_to(data_folder)
    (data_folder / "real" / "b.tar").write_bytes(packed(*pair("b")))

    def resolve(path):
        raise AssertionError(f"{path} is resolved")

    monkeypatch.setattr(Path, "resolve", resolve)
    for folder in (data_folder, tmp_path / "alias"):
        assert read_image("real/a.png", folder) == b"mine"
        assert read_image("real/b.tar/b.png", folder) == b"pixels"


def test_a_url_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"texts": [None, "x"], "images": ["https://a.b/c.png", None]}))
    with pytest.raises(
        Unreadable, match=r"never fetched: download the images and name their files, as docs/data\.md says"
    ):
        Interleaved("d.jsonl", tmp_path)[0]


def test_row_groups_too_large_for_arrow_are_read_in_parts(tmp_path, monkeypatch):
    texts = [[None, f"text {i}"] for i in range(50)]
    images = [[{"bytes": b"%d" % i, "path": None}, None] for i in range(50)]
    pq.write_table(pa.table({"texts": texts, "images": images}), tmp_path / "a.parquet", row_group_size=40)

    def refuse(*_arguments, **_options):
        raise pa.ArrowNotImplementedError("Nested data conversions not implemented for chunked array outputs")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", refuse)
    source = Interleaved(tmp_path / "a.parquet")
    assert [contents(source[i]) for i in (49, 0, 15, 16, 39, 40)] == [
        (b"%d" % i, f"text {i}") for i in (49, 0, 15, 16, 39, 40)
    ]
