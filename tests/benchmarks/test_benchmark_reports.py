# SPDX-License-Identifier: Apache-2.0
"""The figures of a benchmark survive their file, and the page shows them between its markers and nowhere else."""

import json

import pytest

from benchmarks import run_all
from benchmarks.common import Goal, Report, Table, markdown_table, number
from benchmarks.scaling import exponent
from benchmarks.time_to_reward import curve, reached


def make_report() -> Report:
    goals = [
        Goal("share", 0.1, "at most", 0.125),
        Goal("times", 2.9, "at least", 3.0),
        Goal("later", None, "at most", 1),
    ]
    return Report("toy", "Toy", "What it is.", "a machine", {"n": 1}, [Table("T", [{"a": 1, "b": "x"}])], goals)


def test_a_goal_is_met_missed_or_not_run():
    assert [g.met for g in make_report().goals] == [True, False, None]


def test_a_report_survives_its_file(tmp_path):
    report = make_report()
    report.save(tmp_path / "toy.json")
    assert Report.load(tmp_path / "toy.json") == report
    assert [g["met"] for g in json.loads((tmp_path / "toy.json").read_text())["goals"]] == [True, False, None]


def test_tables_hold_every_column_of_every_row():
    text = markdown_table([{"a": 1234567, "b": "x"}, {"a": 0.012345, "c": None}])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert lines[0] == ["a", "b", "c"]
    assert lines[2:] == [["1,234,567", "x", ""], ["0.0123", "", "–"]]
    assert len({len(line) for line in text.splitlines()}) == 1


@pytest.mark.parametrize(
    ("value", "shown"), [(0.12345, "0.123"), (12.345, "12.35"), (1234.5, "1,234"), (7, "7"), (0.0, "0"), (True, "True")]
)
def test_numbers_have_three_or_four_digits(value, shown):
    assert number(value) == shown


def marked(*names: str) -> str:
    """A page with old figures of each script between its markers."""
    parts = [f"{run_all.BEGIN.format(name)}\nold figures of {name}\n{run_all.END.format(name)}" for name in names]
    return "\n".join(["before", *parts, "after", ""])


def test_the_page_keeps_what_is_around_the_markers(tmp_path, monkeypatch):
    page = tmp_path / "benchmarks.md"
    page.write_text(marked("imports", "generation", "scaling"))
    monkeypatch.setattr(run_all, "PAGES", {page: ("imports", "generation", "scaling")})
    monkeypatch.setattr(run_all, "ROOT", tmp_path)
    monkeypatch.setattr(run_all, "title_of", lambda name: "Another form.")
    make_report().save(tmp_path / "imports.json")
    other = {"hardware": "a machine", "rows": [{"form": "plain", "MiB": 3}], "ratio": 2.5}
    (tmp_path / "generation.json").write_text(json.dumps(other))
    run_all.write_pages(tmp_path)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old figures of imports" not in text
    assert "## Toy" in text
    assert "| plain |" in text
    assert "old figures of scaling" in text  # did not run here: its last figures stay
    once = page.read_text()
    run_all.write_pages(tmp_path)
    assert page.read_text() == once


def test_a_page_without_markers_is_refused(tmp_path, monkeypatch):
    page = tmp_path / "benchmarks.md"
    page.write_text("no markers")
    monkeypatch.setattr(run_all, "PAGES", {page: ("imports",)})
    make_report().save(tmp_path / "imports.json")
    with pytest.raises(SystemExit, match="between them"):
        run_all.write_pages(tmp_path)
    assert page.read_text() == "no markers"


def test_other_pages_get_the_tables_alone(tmp_path, monkeypatch):
    page = tmp_path / "samplers.md"
    page.write_text(marked("toy", "not measured"))
    monkeypatch.setattr(run_all, "PAGES", {page: ("toy", "not measured")})
    monkeypatch.setattr(run_all, "ROOT", tmp_path)
    make_report().save(tmp_path / "toy.json")
    run_all.write_pages(tmp_path)
    text = page.read_text()
    assert "Measured on: a machine." in text
    assert "**T**" in text
    assert "old figures of toy" not in text
    assert "at most" not in text  # goals stay on the page of benchmarks


def test_the_pages_of_the_documentation_have_the_markers_of_their_scripts():
    for page, names in run_all.PAGES.items():
        text = page.read_text()
        for name in names:
            assert 0 <= text.index(run_all.BEGIN.format(name)) < text.index(run_all.END.format(name))


def test_the_exponent_is_the_power():
    assert exponent([1, 2, 4], [3.0, 3.0 * 2**1.5, 3.0 * 4**1.5]) == pytest.approx(1.5)


def test_time_to_reward_reads_the_first_evaluation_that_reaches_the_target():
    from benchmarks.peer.spec import Outcome

    steps = [{"seconds": 2.0, "tokens": 10.0}] * 3
    evaluations = [{"step": s, "at": 2.0 * s, "pass@1": p} for s, p in ((0, 0.3), (1, 0.92), (2, 0.8), (3, 0.95))]
    outcome = Outcome({}, steps, evaluations)
    found = reached(outcome, 0.9)
    assert (found["seconds"], found["steps"], found["generated tokens"]) == (2.0, 1, 30)
    assert reached(outcome, 0.99)["seconds"] is None
    assert curve({"a": outcome})[1] == {"step": 1, "a: seconds": 2.0, "a: pass@1": 0.92}
