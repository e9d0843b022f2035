"""The table of claims against its checks: each verdict is a check's, each check can fail, each number was computed."""

import csv
import dataclasses
import inspect
import re

import pytest

from course_lib import CourseError, claims, fingerprints

ROWS = claims.load()
IDS = [row["id"] for row in ROWS]


@pytest.fixture(scope="module")
def results():
    return {result.row["id"]: result for result in claims.examine(ROWS)}


def test_the_table():
    assert tuple(ROWS[0]) == claims.COLUMNS
    assert len(set(IDS)) == len(ROWS) >= 80
    assert sum(row["verdict"] in ("wrong", "imprecise") for row in ROWS) >= 60
    assert {row["area"] for row in ROWS} == set(claims.AREAS) and {row["verdict"] for row in ROWS} == set(
        claims.VERDICTS
    )
    for row in ROWS:
        assert (row["slip"] == "") == (row["verdict"] == "correct"), row["id"]
        assert (row["slip"] == "input left out") == (row["verdict"] == "unverifiable"), row["id"]
        # "true in some of the cases" is no description of a claim that holds in none
        assert row["slip"] != "case left out" or row["verdict"] == "imprecise", row["id"]
        assert all(row[column] for column in claims.COLUMNS if column != "slip"), row["id"]
    assert len({row["claim"] for row in ROWS}) == len(ROWS)


def test_every_claim_has_its_check_and_no_check_is_left_over():
    assert set(claims.checks()) == set(IDS)
    for row in ROWS:
        assert claims.checks()[row["id"]].function.__name__ == row["check"], row["id"]


@pytest.mark.parametrize("name", IDS)
def test_verdict(results, name):
    assert claims.confirm([results[name]]) == 1


@pytest.mark.parametrize("name", IDS)
def test_a_wrong_verdict_is_refused(results, name):
    result = results[name]
    for other in set(claims.VERDICTS) - {result.finding.verdict}:
        changed = dataclasses.replace(result, row=result.row | {"verdict": other})
        with pytest.raises(CourseError, match=f"{name}: the table says {other}, the check found"):
            claims.confirm([changed])


def test_a_flipped_verdict_in_the_file_is_caught(tmp_path, monkeypatch):
    rows = [row | ({"verdict": "correct"} if row["id"] == "C69" else {}) for row in claims.load()]
    (tmp_path / "data").mkdir()
    with open(tmp_path / "data" / "claims.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, claims.COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setattr(claims.profiles, "ROOT", tmp_path)
    flipped = claims.load("cost")
    monkeypatch.undo()
    with pytest.raises(CourseError, match="C69: the table says correct, the check found wrong"):
        claims.confirm(claims.examine(flipped))


@pytest.mark.parametrize("name", IDS)
def test_no_check_is_a_constant(results, name):
    """The control's arguments alone change the verdict, so the verdict is computed from what the claim says."""
    check, result = claims.checks()[name], results[name]
    parameters = inspect.signature(check.function).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert open_ended or set(check.control) <= set(parameters)
    assert result.sees and result.finding.evidence and result.finding.cases
    assert all(isinstance(holds, bool) for f in (result.finding, result.control) for holds in f.cases.values())


def numbers(text: str) -> set[float]:
    text = re.sub(r"[A-Za-z]+-\d[\w-]*", "", text)  # names: Llama-2-7B, GPT-2
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    return {float(n) for n in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e[+-]?\d+)?", text)}


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_every_number_of_a_corrected_fact_was_computed(results, row):
    """Nothing in the table is from memory: a number of the fact stands in the evidence, or in the claim itself."""
    result = results[row["id"]]
    known = numbers(result.finding.evidence) | numbers(row["claim"])
    assert numbers(row["fact"]) <= known, (numbers(row["fact"]) - known, result.finding.evidence)


# --- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cases", "more", "verdict"),
    [
        ({"a": True, "b": True}, {}, "correct"),
        ({"a": True, "b": False}, {}, "imprecise"),
        ({"a": False, "b": False}, {}, "wrong"),
        ({"a": False}, {"once": ("peft", "0.14")}, "outdated"),
        ({"a": False}, {"once": ("peft", "999")}, "wrong"),
        ({"a": True}, {"once": ("peft", "0.14")}, "correct"),
        ({"a": True}, {"spread": 10.0}, "unverifiable"),
        ({"a": True}, {"spread": 9.9}, "correct"),
    ],
)
def test_the_rule(cases, more, verdict):
    assert claims.Finding(cases, "", **more).verdict == verdict


@pytest.mark.parametrize(
    ("claimed", "found", "same"), [(102, 100, True), (97, 100, False), (-100, 100, False), (0, 0, True)]
)
def test_near(claimed, found, same):
    assert claims.near(claimed, found) is same


def test_a_control_that_sees_nothing_is_named():
    finding = claims.Finding({"a": False}, "found")
    blind = claims.Result(ROWS[0] | {"verdict": "wrong"}, finding, finding)
    with pytest.raises(CourseError, match="calls its control wrong, too"):
        claims.confirm([blind])
    right = claims.Finding({"a": True}, "found")
    half = claims.Result(ROWS[0] | {"verdict": "wrong"}, finding, claims.Finding({"a": True, "b": False}, ""))
    assert not half.sees  # the control of a wrong claim has to come out correct
    assert claims.Result(ROWS[0], right, half.control).sees


def test_a_check_needs_a_control_and_a_name_of_its_own():
    with pytest.raises(ValueError, match="without a control"):
        claims.register("14.Z99")(len)
    claims.checks()
    with pytest.raises(ValueError, match="C69 has a check already"):
        claims.register("14.C69", tokens=1)(len)


# --- reading and showing ---------------------------------------------------------------------------------------------


def test_load_one_area():
    assert {row["area"] for row in claims.load("serving")} == {"serving"}
    with pytest.raises(CourseError, match="no area 'gpu': choose one of cost, memory"):
        claims.load("gpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "maybe"}, "verdict 'maybe' is none of"),
        ({"id": "C55"}, "C55 stands twice"),
        ({"slip": "x"}, "slip 'x'"),
    ],
)
def test_a_broken_table_is_named(tmp_path, monkeypatch, change, message):
    (tmp_path / "data").mkdir()
    with open(tmp_path / "data" / "claims.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, claims.COLUMNS)
        writer.writeheader()
        writer.writerows([ROWS[0] | change, *ROWS[1:]])
    monkeypatch.setattr(claims.profiles, "ROOT", tmp_path)
    with pytest.raises(CourseError, match=message):
        claims.load()


def test_a_claim_without_a_check_is_refused():
    with pytest.raises(CourseError, match="no check for Z1"):
        claims.examine([ROWS[0] | {"id": "Z1"}])


def test_choose(results):
    every = list(results.values())
    wrong = claims.choose(every, area="memory", verdict="wrong")
    assert wrong and all(r.row["area"] == "memory" and r.row["verdict"] == "wrong" for r in wrong)
    for ids in (["C69", "B30"], ["B30", "C69"]):  # in the order asked for: prose says "the first one"
        assert [r.row["id"] for r in claims.choose(every, id=ids)] == ids
    assert {r.row["id"] for r in claims.choose(every, text="adalora")} == {"B21", "B22", "E28"}
    assert claims.choose(every) == every
    for wanted, message in (({"verdict": "true"}, "no verdict 'true'"), ({"colour": "red"}, "no column 'colour'")):
        with pytest.raises(CourseError, match=message):
            claims.choose(every, **wanted)


def test_show_is_a_table_without_a_script(results):
    shown = claims.show(list(results.values()), area="cost").data
    assert shown.count("<tr>") == 1 + len(claims.load("cost")) and "<script" not in shown and "383.8M" in shown
    row = ROWS[0] | {"claim": "a < b <script>"}
    finding = claims.Finding({"a": True}, "1 < 2, $3 to $4")
    shown = claims.show([claims.Result(row, finding, finding)], fold=True).data
    assert (
        "a &lt; b &lt;script&gt;" in shown
        and "1 &lt; 2" in shown
        and "<span>$</span>3" in shown
        and "All 1 claims" in shown
    )


def test_a_changed_check_makes_the_lesson_stale():
    """Checks are registered under the lesson's number, so that its fingerprint counts every one of them."""
    cell = "from course_lib import claims\nclaims.examine(claims.load())"
    library = fingerprints._library([cell], "14")
    text = library["claims_numbers"] + library["claims_libraries"]
    assert all(f"def {row['check']}(" in text for row in ROWS)
