"""The page and the pictures of results are complete, honest, and contain only what the records contain."""

import base64
import re
import sys
from html.parser import HTMLParser

import pytest
from made_records import generate, kernels, spread, train, write

from mm1.bench import comparison, report
from mm1.bench.pictures import pictures
from mm1.bench.record import RESULTS
from mm1.errors import UserError

pytest.importorskip("matplotlib")

CEILINGS = {"copy": 1e10, "gemm": {"fp32": 1e11}}


class Page(HTMLParser):
    """Parse a page into text and tables with rows of cells, and fail on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.tables, self.classes = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert tag == "img" or self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
        if self.open and self.open[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return " ".join(self.words)


def page(tmp_path, *files):
    report.report(files or [tmp_path], tmp_path / "out" / "report.html")
    return (tmp_path / "out" / "report.html").read_text()


def charts(text):
    """Return the source of each chart of a page."""
    return [base64.b64decode(data).decode() for data in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", text)]


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Return a page with every section, of three files and two machines."""
    tmp_path = tmp_path_factory.mktemp("everything")
    rows = [kernels(case=f"coarse T={t}", shape={"tokens": t}, ours=1e-5 * t) for t in (16, 64, 256)]
    rows += [train(), *(generate(batch) for batch in (1, 8, 64))]
    write(tmp_path / "1.json", rows, ceilings=CEILINGS)
    write(tmp_path / "2.json", [kernels(ours=1e-3)], date="2026-01-03", commit="fedcba", ceilings=CEILINGS)
    write(tmp_path / "3.json", rows, date="2026-01-04", machine="other", ceilings=CEILINGS)
    return page(tmp_path)


def test_page_is_one_whole_file_that_asks_no_network(everything):
    text = everything
    tags = Page(text).tags
    assert not re.search(r"https?:|url\(|@import", text)
    assert not any(tag in ("script", "link", "iframe") for tag, _ in tags)
    assert all(attrs["src"].startswith("data:image/") and attrs["alt"] for tag, attrs in tags if tag == "img")
    assert not any(re.search(r"href=.https?:|url\(https?:|<image", chart) for chart in charts(text))
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tags
    links, ids = ([a[name] for _, a in tags if name in a] for name in ("href", "id"))
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert len(ids) == len(set(ids))


def test_each_section_is_there_only_with_its_rows(everything, tmp_path):
    sections = ("Against the fastest peer", "Roofline", "Training", "With size", "Over commits")
    assert all(section in Page(everything).text for section in sections)
    for rows, there in (([kernels()], sections[:1]), ([train()], sections[2:3]), ([generate()], sections[:1])):
        text = Page(page(tmp_path, write(tmp_path / "one" / "x.json", rows))).text
        assert [section for section in sections if section in text] == list(there)


def test_roofline_has_the_ceilings_of_its_run(tmp_path):
    text = page(tmp_path, write(tmp_path / "x.json", [kernels(ours=1e-3)], ceilings=CEILINGS))
    chart = charts(text)[-1]
    for rate in ("fp32 products 100 GFLOP/s", "memory 10.0 GB/s"):
        assert rate in chart
        assert rate in Page(text).text
    assert ["moe_mlp", "coarse T=16 · forward · fp32", "20.0", "7.00 GFLOP/s"] in Page(text).tables[-1]


def test_table_holds_the_rows_numbers(tmp_path):
    row = kernels(peers={"torch": 2.5, "dense": 0.75}, failed={"megablocks": "not installed"})
    row["variants"]["mm1"] |= {"share": 0.4567, "host": 21.04e-6}
    text = page(tmp_path, write(tmp_path / "x.json", [row]))
    head, *rows = Page(text).tables[-1]
    assert head == ["case", "way", "mm1 is", "µs", "spread", "of the roofline", "ratio", "its spread", "noise",
                    "launch, µs", "error, ppm"]  # fmt: skip
    name = "coarse T=16 · forward"
    assert rows == [
        [name, "mm1", "", "1230", "1220 … 1260", "45.7 %", "", "", "2.00 %", "21.0", "1.00"],
        [name, "torch", "▲ 2.50× faster", "3080", "3050 … 3140", "", "2.50", "2.48 … 2.55", "", "", ""],
        [name, "dense", "0.750×", "923", "914 … 942", "", "0.750", "0.742 … 0.765", "", "", ""],
    ]
    assert "megablocks: not installed" in Page(text).text


def test_every_number_of_a_table_is_a_measured_one(tmp_path):
    rows = [train(), generate(), kernels(case="one")]
    numbers = set()

    def walk(value):
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(inner)
        if isinstance(value, int | float):
            numbers.update(f"{value * unit:.3g}" for unit in (1, 1e3, 1e6, 100, 1e-9))

    walk(rows)
    tables = Page(page(tmp_path, write(tmp_path / "x.json", rows))).tables
    cells = [cell for table in tables for row in table[1:] for cell in row if re.match(r"\d", cell)]
    shown = [n for cell in cells if "-shot" not in cell for n in re.findall(r"\d[\d.]*", cell)]
    assert len(shown) > 30
    assert {f"{float(n):.3g}" for n in shown} <= numbers


def test_names_are_escaped(tmp_path):
    row = kernels(case='<script>"a" & b', peers={"<i>peer": 2.0}, failed={"x": "<function f at 0x1>"})
    text = page(tmp_path, write(tmp_path / "x.json", [row], device="<b>GPU"))
    assert not {"script", "i", "function", "b"} & {tag for tag, _ in Page(text).tags}
    assert all(name in Page(text).text for name in ('<script>"a" & b', "<i>peer", "<function f at 0x1>", "<b>GPU"))


@pytest.mark.parametrize("ratio, noise, words, others", [
    (0.8, 0.02, ["▼ slower: 0.800×", "▼ slower in 1 of 1"], ["faster"]),
    (1.25, 0.02, ["▲ 1.25× faster", "slower in none of 1"], ["▼"]),
    (0.99, 0.02, ["≈ 0.990×, within noise", "slower in none of 1"], ["▼", "× faster"]),
    (0.99, 0.001, ["▼ slower: 0.990×"], ["within noise"]),
    (1.01, None, ["▲ 1.01× faster"], ["within noise"]),
])  # fmt: skip
def test_slower_is_said_as_plainly_as_faster(tmp_path, ratio, noise, words, others):
    text = page(tmp_path, write(tmp_path / "x.json", [kernels(peers={"torch": ratio, "timm": 9.0}, noise=noise)]))
    said = Page(text).text.replace(report.INTRO, "").replace("9.00× faster", "")
    assert all(word in said for word in words)
    assert not any(word in said for word in others)
    assert ('class="slower"' in text) == ("▼" in words[0])
    assert any(words[0] in chart for chart in charts(text))


def test_fastest_peer_is_neither_the_yardstick_nor_mm1_again():
    row = kernels(peers={"dense": 0.5, "torch": 1.5, "timm": 1.2})
    row["variants"]["mm1 again"]["ratio"] = spread(0.9)
    assert comparison.fastest(row) == ("timm", 1.2)
    assert comparison.fastest(kernels(peers={"dense": 0.5})) is None


def test_history_is_in_order_and_marks_what_changed_beyond_the_noise(tmp_path):
    write(tmp_path / "z.json", [kernels(ours=1e-3), kernels(case="b", ours=1e-3)], "2026-01-01", "aaa")
    write(tmp_path / "a.json", [kernels(ours=8e-4), kernels(case="b", ours=1.015e-3)], "2026-02-01", "bbb")
    write(tmp_path / "m.json", [kernels(ours=1.2e-3)], "2026-03-01", "ccc")
    found = Page(page(tmp_path))
    assert [row[1:4] + row[-1:] for row in found.tables[-1][1:]] == [
        ["coarse T=16 · forward · fp32", "2026-01-01", "aaa", ""],
        ["coarse T=16 · forward · fp32", "2026-02-01", "bbb", "▲ −20.0 % time, faster"],
        ["coarse T=16 · forward · fp32", "2026-03-01", "ccc", "▼ +50.0 % time, slower"],
        ["b · forward · fp32", "2026-01-01", "aaa", ""],
        ["b · forward · fp32", "2026-02-01", "bbb", "≈ +1.5 % time, within noise"],
    ]
    assert "▲ 1 faster" in found.text
    assert "▼ 1 slower" in found.text


def test_runs_whose_spreads_meet_have_not_changed(tmp_path):
    rows = [kernels(ours=1e-3, noise=0.01), kernels(ours=1.2e-3, noise=0.01)]
    rows[1]["variants"]["mm1"]["low"] = 0.99e-3
    for day, row in enumerate(rows, 1):
        write(tmp_path / f"{day}.json", [row], f"2026-01-0{day}")
    assert Page(page(tmp_path)).tables[-1][-1][-1] == "≈ +20.0 % time, within noise"


def test_shown_is_the_newest_file_with_rows_of_the_op(tmp_path):
    write(tmp_path / "1.json", [kernels(op="old", ours=5e-3), kernels(ours=5e-3)], "2026-01-01")
    write(tmp_path / "2.json", [kernels(ours=3e-3)], "2026-01-02")
    kept = comparison.newest(comparison.gather([tmp_path]), "kernels")
    assert {op: rows[0]["variants"]["mm1"]["median"] for op, (_, rows) in kept.items()} == {
        "old": 5e-3,
        "moe_mlp": 3e-3,
    }


def test_sizes_are_a_line_where_nothing_else_differs(tmp_path):
    rows = [kernels(case=f"coarse T={t} zipf", shape={"tokens": t}) for t in (16, 64, 256)]
    rows += [kernels(case=f"coarse T={t}", shape={"tokens": t}) for t in (16, 64)]
    rows += [kernels(case=f"{e} experts T=8", shape={"tokens": 8, "experts": e}) for e in (8, 32, 128)]
    text = page(tmp_path, write(tmp_path / "x.json", rows))
    assert re.findall(r"<h4>moe_mlp: (.*?) ·", text) == ["coarse T=… zipf", "… experts T=8"]


def test_throttled_rows_and_rows_of_a_dead_process_are_said(tmp_path):
    dead = {"bench": "kernels", "op": "moe_mlp", "case": "T=9", "variants": {}, "failed": {"mm1": "the process died"}}
    text = Page(page(tmp_path, write(tmp_path / "x.json", [kernels(gpu={"throttled": True}), dead]))).text
    assert "coarse T=16 · forward · throttled" in text
    assert "1 of 2 rows" in text
    assert "mm1: the process died (T=9)" in text


WITH_ROW = '{"header": {}, "rows": [{"bench": "kernels", "variants": %s}]}'


@pytest.mark.parametrize("content", [
    "", "[1, 2]", '{"rows": []}', '{"header": {}, "rows": [{"op": 1}]}', '{"header": {"date": "1"}, "rows": [{"be',
    '{"header": {}, "rows": []}', WITH_ROW % '{"mm1": {"median": NaN, "low": 1, "high": 1}}', WITH_ROW % '{"mm1": 3}',
    WITH_ROW % "[3]", "\ud800", None,
])  # fmt: skip
def test_what_is_no_record_gives_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "bad.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError) as error:
        report.report([tmp_path / "bad.json"], tmp_path / "report.html")
    assert len(str(error.value).splitlines()) == 1
    assert "bad.json" in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_folders_without_records_are_an_error_and_older_files_are_left_out_aloud(tmp_path, capsys):
    with pytest.raises(UserError, match="no results in"):
        comparison.gather([tmp_path])
    (tmp_path / "experts.json").write_text('{"bench": "experts", "rows": []}')
    write(tmp_path / "x.json", [kernels()])
    assert [result.path.name for result in comparison.gather([tmp_path])] == ["x.json"]
    assert "experts.json has no header" in capsys.readouterr().err


@pytest.mark.slow
def test_this_packages_records_make_a_page(tmp_path):
    if not any('"header"' in path.read_text() for path in RESULTS.rglob("*.json")):
        pytest.skip("there are none")
    report.report([RESULTS], tmp_path / "report.html")
    assert Page((tmp_path / "report.html").read_text()).tables


def test_pictures_are_two_or_as_many_as_there_is_data_for(tmp_path):
    pytest.importorskip("matplotlib")
    both, one = tmp_path / "both" / "x.json", tmp_path / "one" / "x.json"
    write(both, [kernels(), kernels(case="b", peers={"torch": 0.7}), train()])
    assert [path.name for path in pictures([both], tmp_path)] == ["speedups.png", "ladder.png"]
    assert (tmp_path / "ladder.png").read_bytes()[:4] == b"\x89PNG"
    assert [path.name for path in pictures([write(one, [kernels()])], tmp_path)] == ["speedups.png"]


def test_pictures_without_matplotlib_name_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install matplotlib"):
        pictures([write(tmp_path / "x.json", [kernels()])], tmp_path)
