"""The tables of the README and of docs/benchmarks.md show what the records hold."""

import re

import pytest
from made_records import generate, kernels, train, write

from mm1.bench import readme
from mm1.bench.comparison import gather
from mm1.bench.readme import PAGES, ROOT, tables
from mm1.errors import UserError

NUMBER = r"\**[\d.,]+(?:| ?%|×.*)\**"


def rows_of(text):
    """Return the cells of the lines of tables, without heads and rules."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    rules = {i for i, cells in enumerate(lines) if set("".join(cells)) <= set("-: ")}
    return [cells for i, cells in enumerate(lines) if i not in rules and i + 1 not in rules]


def table(marker, results):
    return tables(f"<!-- table: {marker} -->\n<!-- end -->\n", results)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_are_those_of_the_records(page):
    assert readme.current(page) == page.read_text(), "run python -m mm1.bench.readme"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_table_of_numbers_was_made_by_hand(page):
    by_hand = rows_of(readme.TABLE.sub("", page.read_text()))
    assert not [cells for cells in by_hand if any(re.fullmatch(NUMBER, cell) for cell in cells[1:])]


def test_table_of_kernels(tmp_path):
    path = write(tmp_path / "x.json", [
        kernels(peers={"torch": 2.5, "dense": 0.75}),
        kernels(what="forward+backward", ours=0.0123, peers={"torch": 2.0, "timm": 0.8}, failed={"liger": "no GPU"}),
        kernels(case="fine T=16", ours=1.2, peers={"timm": 0.99}),
    ])  # fmt: skip
    text = table("kernels box moe_mlp", gather([path]))
    assert "| | | mm1 is | mm1 | torch | timm | dense |" in text
    assert rows_of(text) == [
        ["coarse T=16", "forward", "2.50× faster", "1.23", "3.08", "", "0.923"],
        ["coarse T=16", "forward+backward", "**slower: 0.800×**", "12.3", "24.6", "9.84", ""],
        ["fine T=16", "forward", "0.990×, within noise", "1200", "", "1190", ""],
    ]
    flat = " ".join(text.split())
    assert "**mm1 is slower than the fastest peer in 1 of 3 rows.**" in flat
    assert "A Box, fp32, medians of 9 rounds in turns, 2026-01-02, commit 0123456789 (`" in flat
    assert "Not measured: liger: no GPU." in flat
    assert path.samefile(ROOT / re.search(r"\(`(.*?)`\)", flat)[1])


def test_tables_of_training_and_generation(tmp_path):
    results = gather([write(tmp_path / "x.json", [train(), generate()])])
    assert rows_of(table("train box mm1-1b", results)) == [
        ["plain", "all eager", "800", "5120", "12.5 %", "15.0 %"],
        ["packed", "documents end to end", "500", "8190", "20.0 %", "24.0 %"],
        ["transformers", "the same model there", "900", "4550", "", ""],
    ]
    assert rows_of(table("generate box mm1-1b", results)) == [
        ["4-shot batch=8", "decode", "1.50× faster", "32.0", "48.0", "250", "7.63 %"]
    ]


def test_summary_has_a_line_for_each_op_with_its_range_of_ratios(tmp_path):
    write(tmp_path / "1.json", [kernels(op="route", peers={"torch": 0.5}), train(), generate(batch=1, ratio=1.005)],
          "2026-01-01", machine="other", device="Another")  # fmt: skip
    write(tmp_path / "2.json", [
        kernels(peers={"torch": 2.5, "timm": 2.0}), kernels(what="forward+backward", peers={"torch": 0.8}),
        kernels(case="fine", peers={"torch": 1.01}), kernels(case="alone", peers={"dense": 0.5}),
    ])  # fmt: skip
    text = table("summary all all", gather([tmp_path]))
    assert rows_of(text) == [
        ["`route`", "0.500×", "", "", "1", "A"],
        ["`moe_mlp`", "0.800× … 2.00×", "1", "1", "1", "B"],
        ["training step, mm1-1b", "1.80×", "1", "", "", "A"],  # 0.9 s of transformers, 0.5 s of the fastest rung
        ["decode, mm1-1b", "1.00×", "", "1", "", "A"],
    ]
    assert "A is Another; B is A Box." in " ".join(text.split())


def test_only_tables_change_and_once(tmp_path):
    results = gather([write(tmp_path / "x.json", [kernels()])])
    text = "before\n\n<!-- table: kernels box moe_mlp -->\n| 1 | 9.99 |\n<!-- end -->\n\nafter\n"
    once = tables(text, results)
    assert once.startswith("before\n\n<!-- table: kernels box moe_mlp -->\n")
    assert once.endswith("<!-- end -->\n\nafter\n")
    assert "9.99" not in once
    assert tables(once, results) == once


def test_number_that_no_record_holds_is_noticed(tmp_path):
    records = [write(tmp_path / "results" / "x.json", [kernels()])]
    file = tmp_path / "README.md"
    file.write_text("<!-- table: kernels box moe_mlp -->\n<!-- end -->\n")
    readme.rewrite([file], records)
    assert readme.current(file, records) == file.read_text()
    file.write_text(file.read_text().replace("1.23", "1.13"))
    assert readme.current(file, records) != file.read_text()


def test_newest_record_with_such_rows_is_taken_and_a_pattern_narrows(tmp_path):
    write(tmp_path / "1.json", [kernels(op="route", ours=5e-3)], "2026-01-01")
    write(tmp_path / "2.json", [kernels(ours=3e-3), kernels(case="fine T=64", ours=4e-3)], "2026-01-02")
    write(tmp_path / "3.json", [kernels(ours=9e-3)], "2026-01-03", machine="other")
    results = gather([tmp_path])
    assert [cells[3] for cells in rows_of(table("kernels box route", results))] == ["5.00"]
    assert [cells[3] for cells in rows_of(table("kernels box moe_mlp", results))] == ["3.00", "4.00"]
    assert [cells[3] for cells in rows_of(table("kernels box moe_mlp T=64|fine", results))] == ["4.00"]


@pytest.mark.parametrize("text, why", [
    ("<!-- table: kernels box attention -->\n<!-- end -->", "no record has rows of kernels box attention"),
    ("<!-- table: kernels box moe_mlp T=9 -->\n<!-- end -->", "no record has rows of kernels box moe_mlp T=9"),
    ("<!-- table: kernels box moe_mlp -->\n", "is not"),
    ("<!-- table: kernels box -->\n<!-- end -->", "is not"),
    ("<!-- table: kernels box moe_mlp -->\n<!-- table: kernels box moe_mlp -->\n<!-- end -->", "is not"),
])  # fmt: skip
def test_tables_that_cannot_be_given_are_one_clear_line(tmp_path, text, why):
    with pytest.raises(UserError, match=why) as error:
        tables(text, gather([write(tmp_path / "x.json", [kernels()])]))
    assert len(str(error.value).splitlines()) == 1
