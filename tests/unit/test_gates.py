"""Every gate passes a good notebook, and names notebook, cell and cure of a bad one."""

import json
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course_lib import CourseError, gates, index, profiles, results, runner

FIRST = {
    "id": "01_decision_ladder",
    "title": "The decision ladder",
    "claim": "Most tasks need no training.",
    "question": "When is adapting a model the right tool?",
    "objectives": ["read a ladder", "say where to stop | and why"],
    "before": ["00_start_here", "some Python"],
    "recipes": ["ticket_lora"],
    "introduces": ["ticket_lora"],
    "minutes": {"ci": 1, "cpu": 8},
    "memory_gb": {"ci": 1.5, "cpu": 3},
    "bands": {"cpu": {"rung_lora_exact_match": [0.55, 0.95]}},
    "metrics": {"rung_lora_exact_match": "LoRA on test", "stop_rung": "where the rule stops"},
}
START = {"id": "00_start_here", "title": "Start here", "claim": "It runs.", "question": "What runs here?"}
SECOND = {**START, "id": "02_training_data", "title": "Training data", "recipes": ["ticket_lora"]}
EXERCISE = """### Exercise 01.{0}: read
Difficulty 1 of 3, importance 2 of 3, about 5 minutes.
<details><summary>Hint</summary>look</details>
<details><summary>Solution</summary>`0.77`</details>"""


def fingerprint(cells, lesson):
    return str([cell.source for cell in cells if cell.cell_type == "code"])


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with README and notebooks/ for three lessons, of which the library believes that it is the checkout."""
    course = {"course": {"title": "Course", "repository": ""}, "recipes": {"ticket_lora": {"minutes": {"cpu": 6}}}}
    every = [START, FIRST, SECOND]
    monkeypatch.setattr(profiles, "ROOT", tmp_path)
    monkeypatch.setattr(profiles, "index", lambda: course)
    monkeypatch.setattr(profiles, "lessons", lambda: every)
    monkeypatch.setattr(profiles, "lesson", lambda name: next(x for x in every if x["id"].startswith(name)))
    monkeypatch.setattr(runner, "outputs_fingerprint", fingerprint)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "README.md").write_text("# Course\n\n<!-- lessons:start -->\n<!-- lessons:end -->\n\nend\n")
    return tmp_path


def said(text):
    return [new_output("stream", name="stdout", text=text)]


def good():
    """A notebook of lesson 01 that every gate accepts: cells 5 to 15 stand between the generated ones."""
    figure = [new_output("display_data", data={"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"})]
    middle = [
        new_markdown_cell("## Measure\nThe model answers every ticket."),
        new_code_cell('for rung in rungs:\n    record(f"rung_{rung}_exact_match", 0.6213)', outputs=said("0.6213\n")),
        new_markdown_cell("It solves 62 % of them, or 0.62 of all, which is 95 % interval talk."),
        new_code_cell('record("stop_rung", "lora")\nplt.show()', outputs=said("stop_rung lora\n") + figure),
        new_markdown_cell("**Figure 1. The rungs.** Look at the last bar."),
        new_markdown_cell("## What you should see\nThe same."),
        new_markdown_cell(EXERCISE.format(1)),
        new_code_cell('answer = ...\ncheck("01.1", answer)', outputs=said("expected: a number\n")),
        new_markdown_cell(EXERCISE.format(2)),
        new_code_cell('check("01.2", None)', outputs=said("expected: a word\n")),
        new_markdown_cell(
            "## Recap\nFive lines.\n\n## Where next\n[Lesson 02](02_training_data.ipynb), "
            "[the data](../README.md#course)\n\n## Sources\n- [a paper](https://example.org/2106.09685), 3.1 % there"
        ),
    ]
    cells = gates.generated_cells(FIRST)
    nb = new_notebook(cells=[*cells[:4], *middle, cells[4]])
    nb.cells[3].outputs = said("profile cpu\n")
    return gates.stamp(nb, FIRST)


def put(checkout, lesson, nb):
    path = checkout / "notebooks" / f"{lesson['id']}.ipynb"
    path.write_text(nbformat.v4.writes(nb))
    return path


def all_problems(nb, lesson=FIRST):
    return [problem for gate in gates.GATES for problem in gate(nb, lesson)]


def test_a_good_notebook_has_no_problem(checkout):
    assert all_problems(good()) == []


def change(number, **fields):
    def apply(nb):
        for key, value in fields.items():
            nb.cells[number - 1][key] = value

    return apply


def add_output(number, output):
    return lambda nb: nb.cells[number - 1].outputs.append(output)


def prose(text):
    return change(9, source="**Figure 1. The rungs.** " + text)


BAD = {
    "no id": (lambda nb: nb.cells[4].pop("id"), "cell 5: has no id"),
    "twice the same id": (change(6, id="title"), "cell 6: id 'title' is used twice"),
    "old format": (lambda nb: nb.update(nbformat_minor=4), "notebook format 4.4, wanted 4.5"),
    "not valid": (change(6, execution_count="one"), "not a valid notebook"),
    "title edited": (change(1, source="# Mine"), "cell 1: the title cell differs"),
    "finish gone": (lambda nb: nb.cells.pop(), "should be the generated finish cell"),
    "generated twice": (change(6, metadata=nbformat.from_dict({"tags": ["preflight"]})), "cell 6: has the tag"),
    "output missing": (change(6, outputs=[]), "cell 6: shows something"),
    "start without output": (change(4, outputs=[]), "cell 4: shows something"),
    "bare name": (change(10, cell_type="code", source="table", outputs=[], execution_count=6), "cell 10: shows"),
    "count": (change(8, execution_count=9), "cell 8: execution count 9, wanted 5"),
    "error": (add_output(8, new_output("error", ename="E", evalue="", traceback=[])), "cell 8: holds an error"),
    "empty cell": (change(12, source=" "), "cell 12: empty code cell"),
    "too large": (add_output(8, said("x" * 1_500_000)[0]), "at most 1.5 MB"),
    "widgets": (lambda nb: nb.metadata.update(widgets={}), "metadata.widgets"),
    "widget": (add_output(8, new_output("display_data", data={gates.WIDGET: {}})), "cell 8: carries a widget"),
    "timing": (change(8, metadata=nbformat.from_dict({"execution": {}})), "cell 8: carries execution"),
    "path": (add_output(8, said("in /home/ann/x")[0]), "cell 8: shows a path of one machine (/home/)"),
    "path in source": (change(5, source="see /tmp/x here"), "cell 5: shows a path"),
    "windows path": (add_output(8, said(r"C:\Users\ann")[0]), r"(C:\Users)"),
    "stamp": (add_output(8, said("2026-03-09T10:22:31")[0]), "cell 8: shows a time stamp"),
    "address": (add_output(8, said("<Axes at 0x7f12ab34cd>")[0]), "cell 8: shows an address"),
    "stale": (change(8, source="plt.draw()"), "stale: its cells"),
    "profile": (lambda nb: nb.metadata.course.update(outputs_of="ci"), "of profile 'ci', wanted 'cpu'"),
    "never stamped": (lambda nb: nb.metadata.pop("course"), "of profile None"),
    "long cell": (change(8, source="x = 1\n" * 41), "cell 8: 41 lines of code"),
    "no sentence": (change(5, source="## Measure"), "cell 6: code without a sentence"),
    "first cell": (lambda nb: nb.cells.pop(4), "cell 5: code without a sentence"),
    "no caption": (change(9, source="Look at it."), "cell 8: figure without a caption"),
    "drawing": (change(5, source="A picture:\n![a](figures/a.svg)"), "cell 5: figure without a caption"),
    "caption without a number": (change(9, source="**Figure.** Look."), "cell 9: caption '**Figure.** Look.', wanted"),
    "caption without a title": (change(9, source="**Figure 1.** Look."), "wanted **Figure 1. Title.**"),
    "wrong number": (change(9, source="**Figure 2. The rungs.** Look."), "wanted **Figure 1. Title.**"),
    "dead link": (change(5, source="See [there](13_gone.ipynb#part)."), "cell 5: links to 13_gone.ipynb#part"),
    "next lesson": (change(15, source="## Recap\n## Sources\n"), "'Where next' does not link the next lesson"),
    "no exercise": (change(11, source="### Task"), "1 exercises, wanted 2 to 4"),
    "no check beneath the section's heading": (
        lambda nb: (
            change(11, source="## Exercises\n\n" + EXERCISE.format(1))(nb),
            change(12, source="answer = 3")(nb),
        ),
        'cell 11: exercise 01.1 lacks check("01.1", ...)',
    ),
    "no check": (change(12, source="answer = 3"), 'cell 11: exercise 01.1 lacks check("01.1", ...)'),
    "no time box": (change(11, source=EXERCISE.format(1).replace("5 minutes", "soon")), "lacks a time box"),
    "no hint": (change(11, source=EXERCISE.format(1).replace("Hint", "Aside")), "lacks a hint in <details>"),
    "no recap": (change(10, source="## See"), "no heading 'What you should see'"),
    "metric": (change(8, source='record(name, "lora")'), "metric stop_rung of course.toml is not recorded"),
    "invented": (prose("It solves 0.63 of them."), "cell 9: 0.63 is in no output above it"),
    "invented percentage": (prose("It solves 71% of them."), "cell 9: 71% is in no output above it"),
    "number above its output": (change(5, source="We shall see 0.62."), "cell 5: 0.62 is in no output above it"),
    "other sentence's source": (prose("Others say 0.71 [source: a paper]. We see 0.72."), "cell 9: 0.72 is in no"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_notebook_is_named_with_its_cell(checkout, case):
    breaks, expected = BAD[case]
    nb = good()
    breaks(nb)
    found = [problem for problem in all_problems(nb) if expected in problem]
    assert found and found[0].startswith("notebooks/01_decision_ladder.ipynb"), all_problems(nb)


def test_a_band_needs_a_declared_metric(checkout):
    lesson = {**FIRST, "bands": {"ci": {"stop_rungs": [0, 1]}}}
    assert "course.toml has a band for stop_rungs (ci)" in gates.metrics(good(), lesson)[0]


def test_a_caption_belongs_to_one_figure(checkout):
    nb = good()
    nb.cells[9] = new_code_cell("plt.show()", outputs=nb.cells[7].outputs)  # right after the caption of cell 8
    assert "cell 10: figure without a caption" in gates.captions(nb, FIRST)[0]


PRINTED = "accuracy 0.6213 (n=300)\nshare 47.6 %\nloss -1.234\nlr 1.5e-3\n1,234.5 tokens\ncount 81"


@pytest.mark.parametrize(
    "text",
    [
        "It is 0.62, or 62 %, or 62.1 percent of 300.",
        "It is 0.621 (47.6 %, 0.476, about 48%).",
        "The loss is −1.23; it falls by 1.2 from there.",
        "A rate of 1.5e-3 gives 1234.5 or 1,234.5 tokens.",
        "From 0.476-0.621 and 0.476–0.62.",
        "Use `0.9`, $p < 0.05$, $$x = 0.1$$ or \\(0.3\\).",
        "```\nx = 0.123\n```",
        "Python 3.11, torch>=2.13, version 5.17.0, Apache-2.0, Qwen2.5-0.5B, a model of 1.5B weights, Figure 3.2.",
        "A 95 % interval and 95% paired interval; lesson 04.2; arXiv 2106.09685.",
        '<span style="width:33.3%">wide</span> and <!-- 12.5 % -->',
        "They report 71.5 % [source: their table 2].",
        "They report 71.5 %. [source: their table 2]",
        "They report [71.5 %](https://example.org).",
        "| who | share |\n|---|---|\n| they | 71.5 % |\n\n[source: their table]",
        "There are 81 of them on 2026-03-20.",
    ],
)
def test_numbers_that_are_measured_or_sourced(text):
    nb = new_notebook(cells=[new_code_cell("x", outputs=said(PRINTED)), new_markdown_cell(text)])
    assert gates.numbers(nb, FIRST) == []


@pytest.mark.parametrize(
    ("text", "claims"),
    [
        ("It is 0.6214.", ["0.6214"]),
        ("It is 81 %, with a loss of 1.24.", ["81 %", "1.24"]),
        ("- 0.11 here\n- 0.12 there [source: x]", ["0.11"]),
        ("They say 0.5. [source: x] We say 0.7.", ["0.7"]),
        ("| a | 0.11 |\n|---|---|\n| b | 0.62 |", ["0.11"]),
        ("It costs $5.25 more, that is 0.9 in all.", ["5.25", "0.9"]),
        ("Between 0.3-0.4.", ["0.3", "0.4"]),
    ],
)
def test_numbers_that_nothing_shows(text, claims):
    nb = new_notebook(cells=[new_code_cell("x", outputs=said(PRINTED)), new_markdown_cell(text)])
    found = gates.numbers(nb, FIRST)
    assert [problem.split(": ", 1)[1].split(" is in no")[0] for problem in found] == claims


LEDGER_CELL = 'for table in profiles.lessons():\n    print(table["id"], table["minutes"]["cpu"])'
ROWS = [
    "00 Start here                           0.7 min  $0.0012  ",
    "01 QLoRA on a T4                         13 min  $0.0217    8.1 min here",
    "02 Training data                          5 min  $0.0083  ",
]
ALL = "all                                    18.7 min  $0.03 at $0.10 an hour"


def said_by_ledger(checkout, rows, source=LEDGER_CELL):
    minutes = {"00": {"cpu": 0.7, "ci": 9}, "01": {"cpu": 13}, "02": {"cpu": 5}}
    profiles.lessons()[:] = [{**x, "minutes": minutes[x["id"][:2]]} for x in profiles.lessons()]
    nb = new_notebook(cells=[new_markdown_cell("What it cost."), new_code_cell(source, outputs=said("\n".join(rows)))])
    return gates.ledger(nb, SECOND)


def test_a_ledger_with_the_minutes_of_course_toml_is_silent(checkout):
    assert said_by_ledger(checkout, [*ROWS, ALL]) == []


def test_minutes_in_a_cell_that_does_not_read_course_toml_are_not_looked_at(checkout):
    assert said_by_ledger(checkout, ["01 a run of its own   99 min  $0.01"], "print(rows)") == []


@pytest.mark.parametrize(
    ("rows", "old"),
    [
        ([ROWS[0], ROWS[1].replace(" 13 min", "  8 min"), ROWS[2]], "01 (8 for 13)"),
        ([ROWS[0].replace("0.7", "  7"), ROWS[1], ROWS[2].replace("5 min", "6 min")], "00 (7 for 0.7), 02 (6 for 5)"),
        (ROWS[:2], "02 (nothing for 5)"),
        ([*ROWS, "03 Gone    4 min  $0.0067"], "03 (4 for nothing)"),
        ([ALL], "00 (nothing for 0.7), 01 (nothing for 13), 02 (nothing for 5)"),
    ],
)
def test_a_ledger_with_other_minutes_is_told_with_its_cure(checkout, rows, old):
    (problem,) = said_by_ledger(checkout, rows)
    assert problem.startswith(f"notebooks/02_training_data.ipynb, cell 2: its minutes of lessons {old}")
    assert problem.endswith("are not course.toml's; run `make refresh LESSON=02`")


def test_the_gate_finds_the_ledger_of_the_course():
    lesson = profiles.lesson("13")
    nb = index.read(index.notebook_path(lesson))
    cells = [cell for cell in nb.cells if cell.cell_type == "code" and '["minutes"]' in cell.source]
    rows = {n for cell in cells for text in gates.output_texts(cell) for n, _ in gates.LEDGER.findall(text)}
    assert rows == {other["id"][:2] for other in profiles.lessons()}


def test_a_lesson_may_have_parameters_of_its_own():
    cells = gates.generated_cells({**START, "parameters": ["dataset"]})
    assert cells[2].source == 'profile = "auto"\nseed = 0\nout_dir = None\ndataset = None'
    nb = new_notebook(cells=gates.generated_cells(START))
    problems = index.generated(nb, {**START, "parameters": ["dataset"]})
    assert any("the parameters cell differs" in text for text in problems)
    assert not index.generated(new_notebook(cells=cells), {**START, "parameters": ["dataset"]})


def test_generated_cells_say_what_course_toml_says(checkout, monkeypatch):
    title, bootstrap, parameters, preflight, finish = gates.generated_cells(FIRST)
    assert title.source.startswith("# 01 The decision ladder\n\nMost tasks") and "colab" not in title.source
    assert "[00 Start here](00_start_here.ipynb)<br>some Python" in title.source
    assert "ci 1 min, cpu 8 min" in title.source and "ci 1.5 GB" in title.source and "stop \\| and" in title.source
    assert "`ticket_lora` (trained here)" in title.source
    assert "cpu 6 min; taught in [01 The decision ladder]" in gates.generated_cells(SECOND)[0].source
    assert parameters.source == 'profile = "auto"\nseed = 0\nout_dir = None' and parameters.metadata.tags == [
        "parameters"
    ]
    assert bootstrap.source == gates.generated_cells(SECOND)[1].source
    assert '"01_decision_ladder", profile=profile' in preflight.source and finish.source.endswith("finish()")
    monkeypatch.setattr(profiles, "index", lambda: {"course": {"repository": "ann/course"}})
    assert "colab.research.google.com/github/ann/course/blob/main" in gates.generated_cells(FIRST)[0].source
    assert '"https://github.com/ann/course"' in gates.generated_cells(FIRST)[1].source
    monkeypatch.setattr(profiles, "index", lambda: {"course": {"repository": "a" * 20 + "/" + "b" * 20}})
    assert max(map(len, gates.generated_cells(FIRST)[1].source.splitlines())) <= 120  # the formatter's limit


def test_bootstrap_tells_what_to_do(checkout, monkeypatch):
    """Outside of Colab; what it does there is tested in tests/colab."""
    code = gates.generated_cells(FIRST)[1].source
    exec(code, {})  # the library is here: nothing happens
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="not installed here: in the course's folder run `make lab`"):
        exec(code, {})


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("https://github.com/ann/course.git", "ann/course"),
        ("https://github.com/ann/my.course", "ann/my.course"),
        ("https://ann:secret@github.com/ann/course/", "ann/course"),
        ("git@github.com:ann/course.git", "ann/course"),
        ("ssh://git@github.com/ann/course.git", "ann/course"),
        ("https://example.org/ann/course.git", None),
        ("https://notgithub.com/ann/course.git", None),
        ("../course.git", None),
        ("", None),
    ],
)
def test_repository_of_a_remote(tmp_path, monkeypatch, address, expected):
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr("subprocess.run", lambda *_, **__: SimpleNamespace(stdout=address + "\n"))
    assert index.remote_repository(tmp_path) == expected


def test_index_write_takes_the_address_from_the_remote(tmp_path, monkeypatch):
    toml = tmp_path / "notebooks" / "course.toml"
    toml.parent.mkdir()
    toml.write_text('[course]\nrepository = "" # "owner/name"\n')
    (tmp_path / "README.md").write_text("\n".join(index.README_MARKS))
    monkeypatch.setattr(profiles, "ROOT", tmp_path)
    profiles.index.cache_clear()
    try:
        assert index.index_write() == ["README.md"] and "No badges for Colab yet" in index.lesson_table()
        monkeypatch.setattr(index, "remote_repository", lambda folder: "ann/course")
        assert index.index_write() == ["notebooks/course.toml", "README.md"]
        assert toml.read_text() == '[course]\nrepository = "ann/course" # "owner/name"\n'
        assert "No badges" not in (tmp_path / "README.md").read_text()
        monkeypatch.setattr(index, "remote_repository", lambda folder: "bob/fork")
        assert index.index_write() == []  # what is set stays
    finally:
        profiles.index.cache_clear()


def test_index_write_makes_index_check_silent(checkout):
    nb = good()
    nb.cells[0].source, nb.cells[3].source = "# Old", "start()"
    nb.cells.insert(5, new_markdown_cell("kept"))
    path = put(checkout, FIRST, nb)
    problems = gates.index_check()
    for text in ("00_start_here.ipynb: cannot be read", "cell 1: the title cell", "cell 4: the preflight", "README.md"):
        assert any(text in problem for problem in problems), text
    assert gates.index_write() == [*(f"notebooks/{x['id']}.ipynb" for x in (START, FIRST, SECOND)), "README.md"]
    assert gates.index_check() == [] and gates.index_write() == []
    cells = index.read(path).cells
    assert [c.source for c in cells[4:7]] == [nb.cells[4].source, "kept", nb.cells[6].source]
    assert cells[3].outputs == nb.cells[3].outputs and len(cells) == len(nb.cells)
    readme = (checkout / "README.md").read_text()
    assert "| [01 The decision ladder](notebooks/01_decision_ladder.ipynb) | When is" in readme
    assert readme.startswith("# Course\n") and readme.endswith("\n\nend\n")


def test_the_readmes_scoreboard_is_what_the_notebooks_last_output_says(checkout):
    shown = "metric   value   interval       n    band\n"
    shown += "exact    0.5     [0.25, 0.75]   n=12  band 0 to 1  in\nspeed    True"
    nb = good()
    nb.cells[-1].outputs = [new_output("execute_result", {"text/plain": shown}, execution_count=9)]
    put(checkout, FIRST, nb)
    assert index.scores(FIRST) == {"exact": ("0.5", "[0.25, 0.75]", "12"), "speed": ("True", "", "")}
    lesson = FIRST | {"headline": {"exact": "records", "speed": "as quick", "gone": "never recorded"}}
    profiles.lessons()[:] = [lesson]
    assert index.score_table().splitlines()[3:-1] == [
        "| 01 | records | 0.5 [0.25, 0.75] | 12 | |",
        "| 01 | as quick | True | | |",
        "| 01 | never recorded | not run yet | | |",
    ]
    (checkout / "README.md").write_text("\n".join([*index.README_MARKS, *index.SCORE_MARKS]))
    assert any("a table is old" in problem for problem in gates.index_check())
    gates.index_write()
    assert gates.index_check() == [] and "| 01 | records |" in (checkout / "README.md").read_text()


def test_the_scoreboard_shows_another_processors_run_of_the_same_code(checkout):
    stored = good()
    stored.metadata.course["fingerprint"] = "the code's"
    put(checkout, FIRST, stored)
    profiles.lessons()[:] = [FIRST | {"headline": {"exact": "records"}}]
    metrics = {"exact": {"value": 0.4321987, "low": 0.25, "high": 0.75, "n": 12}}
    run = {"hardware": {"cpu": "Another"}, "lessons": {FIRST["id"]: {"fingerprint": "the code's", "metrics": metrics}}}
    path = checkout / "data" / "reference" / "other_processor.json"
    path.parent.mkdir(parents=True, exist_ok=True)

    def last_cell():
        path.write_text(json.dumps(run))
        return index.score_table().splitlines()[-2].removesuffix("|").split("|")[-1].strip()

    assert last_cell() == "0.4322 [0.25, 0.75]"
    run["lessons"][FIRST["id"]]["fingerprint"] = "before a change"
    assert last_cell() == ""
    run["lessons"][FIRST["id"]]["fingerprint"] = "the code's"
    preflight = next(c for c in stored.cells if "preflight" in c.metadata.get("tags", ()))
    preflight.outputs = [new_output("stream", text="Another, 2 cores, 23.5 GB | cpu bfloat16\n")]
    put(checkout, FIRST, stored)
    assert last_cell() == ""  # its outputs come from there themselves


def test_index_faults_are_told(checkout):
    gates.index_write()
    put(checkout, {"id": "99_stray"}, good())
    (checkout / "README.md").write_text("no marks")
    found = gates.index_check()
    assert any("99_stray.ipynb: not in notebooks/course.toml" in problem for problem in found)
    assert any("add the lines <!-- lessons:start -->" in problem for problem in found)
    with pytest.raises(CourseError, match="no place for the lesson table"):
        gates.index_write()


def test_static_gates_go_on_after_a_broken_file(checkout):
    put(checkout, FIRST, good())
    (checkout / "notebooks" / "00_start_here.ipynb").write_text("{")
    nb = good()
    del nb.cells[7]["id"], nb.cells[7]["source"]
    (checkout / "notebooks" / "02_training_data.ipynb").write_text(json.dumps(nb))
    found = gates.static_gates()
    assert "00_start_here.ipynb: cannot be read" in found[0]
    assert "02_training_data.ipynb, cell 8: has no id" in found[1] and len(found) == 2


def test_stamp_drops_what_is_of_one_run(checkout):
    nb = good()
    nb.metadata.update(
        papermill={}, widgets={}, accelerator="GPU", language_info={"name": "python", "version": "3.11.7"}
    )
    nb.cells.insert(3, new_code_cell("seed = 0", metadata={"tags": ["injected-parameters"]}))
    nb.cells[6].metadata.update(execution={}, papermill={}, tags=["mine"])
    nb.cells[6].execution_count = 17
    nb.cells[6].outputs = [
        new_output("stream", name="stdout", text="a\n"),
        new_output("stream", name="stdout", text="b\n"),
        new_output("stream", name="stderr", text="\r 50%|#### | 1/2 [00:01<00:01, 1.0it/s]\n"),
        new_output("stream", name="stderr", text="a warning\n"),
        new_output("display_data", data={gates.WIDGET: {}}),
        new_output("execute_result", data={"text/plain": "0.6213"}, execution_count=17),
    ]
    gates.stamp(nb, FIRST)
    assert all_problems(nb) == []
    cell = nb.cells[5]
    assert [out.get("text") for out in cell.outputs] == ["a\nb\n", "a warning\n", None]
    assert cell.outputs[2].execution_count == cell.execution_count == 4 and cell.metadata == {"tags": ["mine"]}
    assert nb.metadata.accelerator == "GPU" and "version" not in nb.metadata.language_info
    assert nb.metadata.course == {"outputs_of": "cpu", "fingerprint": fingerprint(nb.cells, FIRST)}


@pytest.fixture
def executed(checkout, monkeypatch):
    """Stands in for the runner: lessons "run" with new outputs, and with the status that the test puts in."""
    status = {}

    def run(lessons, profile, out):
        assert profile == "cpu"
        (out / "notebooks").mkdir(parents=True)
        for name in lessons:
            nb = index.read(checkout / "notebooks" / f"{name}.ipynb")
            nb.cells.insert(3, new_code_cell("seed = 0", metadata={"tags": ["injected-parameters"]}))
            nb.cells[6].outputs = said("0.6249\n")
            (out / "notebooks" / f"{name}.ipynb").write_text(nbformat.v4.writes(nb))
        entries = {name: {"status": "passed", "inputs": "now", "metrics": {}} | status for name in lessons}
        (out / "results.json").write_text(json.dumps({"lessons": entries}))
        return int(status.get("status") == "failed")

    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(runner, "fingerprint", lambda lesson, profile, seed: "now")
    monkeypatch.setattr(results, "base_dir", lambda: checkout / "runs")
    return status


def test_refresh_stores_outputs_and_keeps_the_cells(checkout, executed):
    nb = good()
    nb.cells[6].source += " And a late edit."
    path = put(checkout, FIRST, nb)
    assert gates.refresh(["01"]) == 0
    new = index.read(path)
    assert [c.source for c in new.cells] == [c.source for c in nb.cells]
    assert new.cells[5].outputs[0].text == "0.6249\n" and all_problems(new) == []


@pytest.mark.parametrize("status", [{"status": "failed"}, {"inputs": "before"}])
def test_refresh_leaves_the_notebook_of_a_lesson_that_failed_or_changed(checkout, executed, status, capsys):
    executed.update(status)
    path = put(checkout, FIRST, good())
    before = path.read_bytes()
    assert gates.refresh(["01"], out=checkout / "out") == int(status.get("status") == "failed")
    assert path.read_bytes() == before and "its notebook stays as it was" in capsys.readouterr().out
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]
