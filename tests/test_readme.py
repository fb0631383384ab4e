"""README's tables say what the records say."""

import re

import pytest
from made_records import generate, kernels, train, write

from mm1.bench import readme
from mm1.bench.comparison import gather
from mm1.bench.readme import ROOT, tables
from mm1.errors import UserError

README = ROOT / "README.md"
NUMBER = r"\**[\d.,]+(?:| ?%|×.*)\**"


def rows_of(text):
    """Cells of the lines of tables but heads and rules."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    rules = {i for i, cells in enumerate(lines) if set("".join(cells)) <= set("-: ")}
    return [cells for i, cells in enumerate(lines) if i not in rules and i + 1 not in rules]


def table(marker, results):
    return tables(f"<!-- table: {marker} -->\n<!-- end -->\n", results)


def test_readme_says_what_the_records_say():
    assert readme.current() == README.read_text(), "run python -m mm1.bench.readme"


def test_readme_has_no_table_of_numbers_by_hand():
    text = README.read_text()
    if "<!-- table:" not in text:
        pytest.skip("its tables are not generated yet")
    by_hand = rows_of(readme.TABLE.sub("", text))
    assert not [cells for cells in by_hand if any(re.fullmatch(NUMBER, cell) for cell in cells[1:])]


def test_table_of_kernels(tmp_path):
    path = write(tmp_path / "x.json", [
        kernels(peers={"torch": 2.5, "dense": 0.75}),
        kernels(what="forward+backward", ours=0.0123, peers={"torch": 2.0, "timm": 0.8}, failed={"liger": "no GPU"}),
        kernels(case="fine T=16", ours=1.2, peers={"timm": 0.99}),
    ])  # fmt: skip
    text = table("kernels box moe_mlp", gather([path]))
    assert "| | | mm1 | torch | timm | dense | mm1 is |" in text
    assert rows_of(text) == [
        ["coarse T=16", "forward", "1.23", "3.08", "", "0.923", "2.50× faster"],
        ["coarse T=16", "forward+backward", "12.3", "24.6", "9.84", "", "**slower: 0.800×**"],
        ["fine T=16", "forward", "1200", "", "1190", "", "0.990×, within noise"],
    ]
    flat = " ".join(text.split())
    assert "**mm1 is slower than the fastest peer in 1 of 3 rows.**" in flat
    assert "A Box, fp32, medians of 9 rounds in turns, 2026-01-02, commit 0123456789 ([record](" in flat
    assert "Not measured: liger: no GPU." in flat
    assert path.samefile(ROOT / re.search(r"\]\((.*?)\)", flat)[1])


def test_tables_of_training_and_generation(tmp_path):
    results = gather([write(tmp_path / "x.json", [train(), generate()])])
    assert rows_of(table("train box mm1-1b", results)) == [
        ["plain", "all eager", "800", "5120", "12.5 %", "15.0 %"],
        ["packed", "documents end to end", "500", "8190", "20.0 %", "24.0 %"],
        ["transformers", "the same model there", "900", "4550", "", ""],
    ]
    assert rows_of(table("generate box mm1-1b", results)) == [
        ["4-shot batch=8", "decode", "32.0", "48.0", "250", "7.63 %", "1.50× faster"]
    ]


def test_only_tables_change_and_once(tmp_path):
    results = gather([write(tmp_path / "x.json", [kernels()])])
    text = "before\n\n<!-- table: kernels box moe_mlp -->\n| 1 | 9.99 |\n<!-- end -->\n\nafter\n"
    once = tables(text, results)
    assert once.startswith("before\n\n<!-- table: kernels box moe_mlp -->\n")
    assert once.endswith("<!-- end -->\n\nafter\n")
    assert "9.99" not in once
    assert tables(once, results) == once


def test_number_that_no_record_holds_is_noticed(tmp_path, monkeypatch):
    write(tmp_path / "results" / "x.json", [kernels()])
    monkeypatch.setattr(readme, "gather", lambda _: gather([tmp_path / "results"]))
    file = tmp_path / "README.md"
    file.write_text("<!-- table: kernels box moe_mlp -->\n<!-- end -->\n")
    readme.rewrite(file)
    assert readme.current(file) == file.read_text()
    file.write_text(file.read_text().replace("1.23", "1.13"))
    assert readme.current(file) != file.read_text()


def test_newest_record_with_such_rows_is_taken_and_a_pattern_narrows(tmp_path):
    write(tmp_path / "1.json", [kernels(op="route", ours=5e-3)], "2026-01-01")
    write(tmp_path / "2.json", [kernels(ours=3e-3), kernels(case="fine T=64", ours=4e-3)], "2026-01-02")
    write(tmp_path / "3.json", [kernels(ours=9e-3)], "2026-01-03", machine="other")
    results = gather([tmp_path])
    assert [cells[2] for cells in rows_of(table("kernels box route", results))] == ["5.00"]
    assert [cells[2] for cells in rows_of(table("kernels box moe_mlp", results))] == ["3.00", "4.00"]
    assert [cells[2] for cells in rows_of(table("kernels box moe_mlp T=64|fine", results))] == ["4.00"]


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
