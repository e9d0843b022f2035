"""The report is built from whatever a run left, opens without a network, and escapes what it shows."""

import base64
import json
import re
from urllib.parse import unquote

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course_lib import CourseError, profiles, report

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><circle r="4"/></svg>'
EVIL = "<script>alert(1)</script>"
METRICS = {
    "lora_exact_match": {"value": 0.8133, "low": 0.76, "high": 0.85, "n": 300, "band": [0.6, 0.97], "in_band": True},
    "few_shot_exact_match": {"value": 0.31, "low": 0.25, "high": 0.37, "n": 300, "band": [0, 0.25], "in_band": False},
    "lora_tokens_per_s": {"value": 12352.4, "band": None},
    "loss_change": {"value": -1.5, "low": -2, "high": -1, "band": [-3, -0.5], "in_band": True},
    "stop_rung": {"value": "lora", "band": ["lora", "grammar"], "in_band": True},
    "cost_per_success": {"value": None, "n": 0, "band": None},
    "equals_peft": {"value": True, "band": [1, 1], "in_band": True},
    EVIL: {"value": EVIL, "band": None},
}
LESSONS = [
    {"id": "00_start_here", "title": "Start here", "claim": "It runs.", "minutes": {"cpu": 2}},
    {"id": "01_decision_ladder", "title": "The <ladder>", "claim": "Stop early.", "minutes": {"cpu": 8}}
    | {"metrics": {"lora_exact_match": "exact match of the LoRA rung & more"}},
]


def notebook():
    html = (
        f'<table><tr><td>cell</td></tr></table>{EVIL}<link href="https://x.example/a.css"><iframe src="//x"></iframe>'
    )
    return new_notebook(
        cells=[
            new_markdown_cell(
                "# Lesson\n[![badge](https://x.example/b.svg)](https://x.example) costs $\\frac{a_1}{b_2}$, see "
                "[01](01_decision_ladder.ipynb) and [09](09_none.ipynb). ![drawing](figures/a.svg) ![gone](no.svg)"
            ),
            new_code_cell("print(1)", outputs=[new_output("stream", name="stdout", text="a < b\n")]),
            new_code_cell("table", outputs=[new_output("display_data", data={"text/html": html, "text/plain": "t"})]),
            new_code_cell("plot", outputs=[new_output("display_data", data={"image/png": PNG})]),
            new_markdown_cell('**Figure 1.** Bars & "whiskers".'),
            new_code_cell("draw", outputs=[new_output("display_data", data={"image/svg+xml": SVG})]),
            new_code_cell(
                "js", outputs=[new_output("display_data", data={"application/javascript": "x()", "text/plain": "js"})]
            ),
        ]
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's folder, in a place whose name has a space, and the function that writes results.json into it."""
    (tmp_path / "notebooks" / "figures").mkdir(parents=True)
    (tmp_path / "notebooks" / "figures" / "a.svg").write_text(SVG)
    monkeypatch.setattr(profiles, "ROOT", tmp_path)
    monkeypatch.setattr(profiles, "index", lambda: {"course": {"title": "A course"}})
    monkeypatch.setattr(profiles, "lessons", lambda: LESSONS)
    out = tmp_path / "my runs"
    for folder in ("notebooks", "logs", "figures"):
        (out / folder).mkdir(parents=True)

    def write(lessons, **fields):
        about = {"profile": "cpu", "hardware": {"cpu": "2 cores", "x": EVIL}, "versions": {"torch": "2.13.0"}}
        (out / "results.json").write_text(json.dumps(about | {"lessons": lessons} | fields))
        return out

    return write


def entry(**fields):
    return {"status": "passed", "seconds": 211.4, "peak_rss_mb": 3120, "metrics": {}} | fields


def soup(path):
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def test_scoreboard_and_pages(run):
    out = run({"00_start_here": entry(metrics=METRICS), "01_decision_ladder": entry()})
    for lesson in LESSONS:
        (out / "notebooks" / f"{lesson['id']}.ipynb").write_text(nbformat.v4.writes(notebook()))
    path = report.build(out)
    assert path == out / "report" / "index.html"
    index = soup(path)
    text = " ".join(index.get_text(" ").split())
    assert "Profile cpu : 2 of 2 lessons passed, 4 of 5 banded metrics in band, 7.0 min in all." in text
    for piece in ("3.5 min", "8.0 min", "3.0 GB", "2 cores", "2.13.0", "The <ladder>", EVIL, "12,352", "0.6 to 0.97"):
        assert piece in text, piece
    rows = {
        row.td.get_text().partition("exact match of")[0]: row for row in index.select("h2 + p + .scroll tr") if row.td
    }
    assert "out of band" in rows["few_shot_exact_match"].get_text() and "in band" in rows["stop_rung"].get_text()
    assert "lora or grammar" in rows["stop_rung"].get_text() and "none" in rows["cost_per_success"].get_text()
    drawn = {name for name, row in rows.items() if row.svg}
    assert drawn == {"lora_exact_match", "few_shot_exact_match", "loss_change"}
    label = rows["lora_exact_match"].svg["aria-label"]
    assert label == "value 0.813, interval 0.76 to 0.85, band 0.6 to 0.97, in band"
    assert not index.select("script, iframe") and [link["href"] for link in index.select("link")] == ["style.css"]


def test_every_link_leads_somewhere_and_nothing_is_fetched(run):
    out = run({"00_start_here": entry(metrics=METRICS), "01_decision_ladder": entry()})
    for lesson in LESSONS:
        (out / "notebooks" / f"{lesson['id']}.ipynb").write_text(nbformat.v4.writes(notebook()))
    (out / "figures" / "01_decision_ladder").mkdir()
    (out / "figures" / "01_decision_ladder" / "rungs & costs.png").write_bytes(base64.b64decode(PNG))
    folder = report.build(out).parent
    assert sorted(p.name for p in (folder / "figures" / "00_start_here").iterdir()) == ["figure_1.png", "figure_2.svg"]
    assert sorted(p.name for p in folder.glob("*.html")) == [
        "00_start_here.html",
        "01_decision_ladder.html",
        "index.html",
    ]
    for path in folder.glob("*.html"):
        page = soup(path)
        assert page.select_one('meta[name="viewport"]') and not page.select("script, iframe, object, embed")
        for element in page.select("img, link[href]"):
            source = element.get("src") or element["href"]
            assert source.startswith("data:") or (folder / unquote(source)).is_file(), source
        for link in page.select("a[href]"):
            target = link["href"].split("#")[0]
            assert target.startswith("https://") or not target or (folder / unquote(target)).is_file(), target
    lesson = soup(folder / "00_start_here.html")
    assert "$\\frac{a_1}{b_2}$" in lesson.get_text() and "a < b" in lesson.get_text() and "09" in lesson.get_text()
    assert lesson.find("a", string="01")["href"] == "01_decision_ladder.html" and "alert" not in str(lesson)
    assert "http" not in re.sub(r"/\*.*?\*/", "", (folder / "style.css").read_text())


def test_a_failed_lesson_is_shown_first_with_its_cause(run):
    error = {"cell": 7, "code": "train()", "type": "KernelDied", "message": f"ended by SIGKILL {EVIL}", "log": "logs/x"}
    out = run({"00_start_here": entry(), "01_decision_ladder": entry(status="failed", error=error, seconds=None)})
    (out / "logs" / "01_decision_ladder.log").write_text("killed")
    (out / "notebooks" / "01_decision_ladder.ipynb").write_text('{"cells": [')
    index = soup(report.build(out))
    failure = index.select_one(".failure")
    assert failure.find_next("h2").get_text() == "Lessons"
    text = failure.get_text()
    assert "failed" in text and "cell 7" in text and f"KernelDied: ended by SIGKILL {EVIL}" in text
    assert (out / "report" / failure.find("a", string="Log of this lesson")["href"]).read_text() == "killed"
    assert not (out / "report" / "01_decision_ladder.html").exists()


@pytest.mark.parametrize(
    "lessons",
    [
        {},
        {"00_start_here": {"status": "passed", "metrics": {}}},
        {"77_unknown": {"status": "failed", "error": "words alone", "metrics": {"x": {}}}},
        {"00_start_here": {"status": "recorded", "metrics": {"x": {"value": 1, "band": [None, 2], "in_band": True}}}},
        {"00_start_here": {"status": "running", "metrics": {"x": {"value": 5, "low": 5, "high": 5, "band": [5, 5]}}}},
        {
            "00_start_here": {
                "status": "new",
                "metrics": {"x": {"value": float("nan"), "low": 0, "high": float("inf"), "band": [0, 1]}},
            }
        },
    ],
)
def test_odd_results_still_make_a_report(run, lessons):
    index = soup(report.build(run(lessons, hardware=None, versions={})))
    assert "lessons passed" in index.get_text() and "nan" not in " ".join(str(svg) for svg in index.select("svg"))


def test_a_new_report_replaces_the_old_one_only_when_complete(run, monkeypatch):
    out = run({"00_start_here": entry()})
    path = report.build(out)
    (path.parent / "stray.txt").write_text("old")
    report.build(out)
    assert not (path.parent / "stray.txt").exists()
    before = path.read_bytes()
    monkeypatch.setattr(report, "_index", lambda data, runs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.build(out)
    assert path.read_bytes() == before and not list(out.glob(".report-*"))


def test_faults_are_told(run, monkeypatch):
    out = run({"00_start_here": entry()})

    def full(**options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.tempfile, "mkdtemp", full)
    with pytest.raises(CourseError, match="No space left on device"):
        report.build(out)
    (out / "results.json").unlink()
    with pytest.raises(CourseError, match="results.json"):
        report.build(out)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.81333, "0.813"),
        (12352.4, "12,352"),
        (3, "3"),
        (0.00012, "0.00012"),
        (None, "none"),
        (True, "yes"),
        ("a<b", "a&lt;b"),
    ],
)
def test_values_as_text(value, text):
    assert report.show(value) == text
