import math

import pytest

from course_lib import exercises

DOTS = {
    "01.1": {"a": ..., "b": ..., "c": ...},
    "01.2": {"few_shot": ..., "larger_model": ..., "lora": ...},
    "01.3": ...,
}
RIGHT = {
    "01.1": {"a": "retrieval", "b": "grammar", "c": "lora"},
    "01.2": {"few_shot": None, "larger_model": 0.000625, "lora": 0.36 / 700},
    "01.3": "larger_model",
}


@pytest.mark.parametrize("exercise", RIGHT)
def test_untouched_says_what_is_expected(said, exercise):
    assert said(exercise, DOTS[exercise]) == f"{exercise}  to do: {exercises.CHECKS[exercise][0]}"


@pytest.mark.parametrize("exercise", RIGHT)
def test_the_solution_is_right(said, exercise):
    assert said(exercise, RIGHT[exercise]).startswith(f"{exercise}  right: ")


@pytest.mark.parametrize("exercise", ["01.1", "01.2"])
def test_half_done_is_named_and_not_wrong(said, exercise):
    first, *others = RIGHT[exercise]
    half = DOTS[exercise] | {first: RIGHT[exercise][first]}
    assert said(exercise, half) == f"{exercise}  to do: {', '.join(others)} still to be filled in."


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"a": "lora"}, "stale"),
        ({"a": "prompt"}, "every call"),
        ({"b": "retry"}, "twice"),
        ({"b": "lora"}, "content is right"),
        ({"b": "validator"}, "mends none"),
        ({"b": "few_shot"}, "never sure"),
        ({"c": "few_shot"}, "measured already"),
        ({"c": 3}, "measured already"),
    ],
)
def test_wrong_rungs(said, change, hint):
    answer = said("01.1", RIGHT["01.1"] | change)
    assert answer.startswith(f"01.1  not yet: look again at {list(change)[0]} (") and hint in answer


def test_spelling_of_a_rung_is_no_trap(said):
    assert "right" in said("01.1", {"a": " Retrieval", "b": "GRAMMAR", "c": "LoRA"})


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"few_shot": 0}, "no sum of money"),
        ({"few_shot": math.inf}, "no sum of money"),
        ({"few_shot": math.nan}, "no sum of money"),
        ({"larger_model": 0.0003}, "only right answers"),
        ({"lora": 0.00036}, "only right answers"),
        ({"lora": 0.06 / 700}, "training run"),
        ({"larger_model": 2.25}, "for an hour"),
        ({"lora": 216.3 / 700}, "for an hour"),
        ({"lora": None}, "look again at lora"),
        ({"larger_model": "cheap", "lora": 7}, "look again at larger_model, lora"),
    ],
)
def test_wrong_costs(said, change, hint):
    answer = said("01.2", RIGHT["01.2"] | change)
    assert answer.startswith("01.2  not yet: ") and hint in answer


@pytest.mark.parametrize(
    ("rung", "hint"),
    [
        ("prompt", "no answer was right"),
        ("few_shot", "lower end of its interval does not"),
        ("routing", "more than the limit"),
        ("lora", "the first that is good enough"),
        ("qlora", "not in the table"),
        (0.57, "not in the table"),
    ],
)
def test_wrong_stops(said, rung, hint):
    answer = said("01.3", rung)
    assert answer.startswith("01.3  not yet: ") and hint in answer


@pytest.mark.parametrize("exercise", ["01.1", "01.2"])
def test_other_names_are_refused_with_the_right_ones(said, exercise):
    answer = said(exercise, {"x": 1})
    assert "not yet: the check could not use your answer" in answer and ", ".join(RIGHT[exercise]) in answer


def test_the_rule_of_the_library_stops_where_the_exercise_says():
    from course_lib.costs import cost_per_success, stop_rung

    desk = [("prompt", 0.00, None), ("few_shot", 0.41, 0.002), ("routing", 0.53, 0.012), ("larger_model", 0.57, 0.004)]
    rungs = [{"name": name, "low": low, "cost_per_success": cost} for name, low, cost in desk]
    assert stop_rung(rungs, target=0.50, max_cost=0.010) == RIGHT["01.3"]
    runs = {"few_shot": (2400, 0, 0.36, 0.0), "larger_model": (3000, 480, 0.36, 0.0), "lora": (600, 700, 0.36, 0.30)}
    assert {name: cost_per_success(*run) for name, run in runs.items()} == pytest.approx(RIGHT["01.2"])
