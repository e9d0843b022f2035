"""Every exercise's check takes the solution, and answers the common mistakes with what helps."""

import pytest

from course_lib import exercises

RECORD = {
    "intent": "buy",
    "items": [{"product": "bed sheet", "quantity": 12}],
    "order_id": None,
    "due_date": "2026-03-20",
    "needs_human": False,
    "priority": "urgent",
}
COUNTS = {"compact": 45, "blanks": 56, "indented": 71}
UNTOUCHED = {"00.1": dict.fromkeys(RECORD, ...), "00.2": dict.fromkeys(COUNTS, ...)}
SOLUTIONS = [("00.1", RECORD), ("00.1", RECORD | {"due_date": "next Friday"}), ("00.2", COUNTS)]
PILLOWS = [{"product": "pillow", "quantity": 2}, *RECORD["items"]]
MISTAKES = [
    ("00.1", RECORD | {"items": PILLOWS}, "at items"),
    ("00.1", RECORD | {"items": [{"product": "bed sheets", "quantity": 12}]}, "singular"),
    ("00.1", RECORD | {"order_id": "K-1180"}, "a new one has no number yet"),
    ("00.1", RECORD | {"due_date": "2026-03-13"}, "next Monday"),
    ("00.1", RECORD | {"needs_human": True}, "asks for nobody"),
    ("00.1", RECORD | {"needs_human": 0}, "a type is not (schema: needs_human)"),
    ("00.1", RECORD | {"priority": "high", "intent": "question"}, "one step for a due date"),
    ("00.1", {"intent": "buy"}, "exactly the fields"),
    ("00.1", "buy", "exactly the fields"),
    ("00.2", {"compact": 142, "blanks": 156, "indented": 196}, "characters"),
    ("00.2", COUNTS | {"compact": 56}, "at compact"),
    ("00.2", {"compact": 45}, "the names are"),
    ("00.2", 45, "could not use your answer"),
]


@pytest.mark.parametrize("exercise", UNTOUCHED)
def test_untouched_says_what_is_expected(said, exercise):
    assert said(exercise, UNTOUCHED[exercise]) == f"{exercise}  to do: {exercises.CHECKS[exercise][0]}"


def test_half_done_is_not_wrong(said):
    assert "to do: Some fields still hold dots." in said("00.1", UNTOUCHED["00.1"] | {"intent": "buy"})


@pytest.mark.parametrize(("exercise", "answer"), SOLUTIONS)
def test_solutions_are_right(said, exercise, answer):
    assert said(exercise, answer).startswith(f"{exercise}  right: ")


@pytest.mark.parametrize(("exercise", "answer", "hint"), MISTAKES)
def test_mistakes_are_met_with_what_helps(said, exercise, answer, hint):
    found = said(exercise, answer)
    assert found.startswith(f"{exercise}  not yet: ") and hint in found
