import re

import pytest

from course_lib import exercises

EXPECTED = 0.11**2 + 0.89**2
KAPPA = (0.9 - EXPECTED) / (1 - EXPECTED)


def word_runs(text, n):
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def by_runs(n, least):
    def leaks(text, test_item):
        item = word_runs(test_item, n)
        return len(item & word_runs(text, n)) >= least * len(item)

    return leaks


def unwritten(text, test_item):
    raise NotImplementedError


DOTS = {
    "02.1": dict.fromkeys(("observed", "expected", "kappa", "passes"), ...),
    "02.2": unwritten,
    "02.3": {"examples": ..., "tokens": ...},
}
RIGHT = {
    "02.1": {"observed": 0.9, "expected": EXPECTED, "kappa": KAPPA, "passes": False},
    "02.2": by_runs(4, 0.5),
    "02.3": {"examples": 100, "tokens": 200},
}


@pytest.mark.parametrize("exercise", RIGHT)
def test_untouched_says_what_is_expected(said, exercise):
    assert said(exercise, DOTS[exercise]) == f"{exercise}  to do: {exercises.CHECKS[exercise][0]}"


@pytest.mark.parametrize("exercise", RIGHT)
def test_the_solution_is_right(said, exercise):
    assert said(exercise, RIGHT[exercise]).startswith(f"{exercise}  right: ")


@pytest.mark.parametrize("exercise", ["02.1", "02.3"])
def test_half_done_is_named_and_not_wrong(said, exercise):
    first, *others = RIGHT[exercise]
    half = DOTS[exercise] | {first: RIGHT[exercise][first]}
    assert said(exercise, half) == f"{exercise}  to do: {', '.join(others)} still to be filled in."


def test_rounded_numbers_are_right(said):
    rounded = {"observed": 0.90, "expected": 0.80, "kappa": 0.489, "passes": False}
    assert "right" in said("02.1", rounded)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"expected": 0.5}, "not a coin"),
        ({"expected": 0.06**2 + 0.84**2}, "own share"),
        ({"expected": 0.0121}, "also say no"),
        ({"kappa": 0.8}, "coin"),
        ({"kappa": 0.9 - EXPECTED}, "divided"),
        ({"observed": 90}, "as a share"),
        ({"observed": 0.84}, "agreement on yes"),
        ({"kappa": -0.3}, "look again at kappa"),
        ({"passes": True}, "at least 0.70"),
        ({"passes": "no"}, "True or False"),
    ],
)
def test_wrong_agreements(said, change, hint):
    answer = said("02.1", RIGHT["02.1"] | change)
    assert answer.startswith("02.1  not yet: ") and hint in answer


@pytest.mark.parametrize(
    "leaks",
    [
        by_runs(3, 0.5),
        by_runs(5, 0.4),
        by_runs(2, 0.6),
        lambda text, item: len(word_runs(item, 3) & word_runs(text, 3)) / len(word_runs(item, 3)) > 0.55,
    ],
)
def test_other_right_searches_pass(said, leaks):
    assert "right" in said("02.2", leaks)


@pytest.mark.parametrize(
    ("leaks", "hint"),
    [
        (lambda text, item: text == item, "case and punctuation"),
        (lambda text, item: item.lower() in text.lower(), "case and punctuation"),
        (lambda text, item: True, "no leak"),
        (lambda text, item: False, "a leak"),
        (by_runs(3, 0.05), "stock phrase"),
        (lambda text, item: bool(word_runs(item, 3) & word_runs(text, 3)), "stock phrase"),
        (
            lambda text, item: (
                len(word_runs(item, 3) & word_runs(text, 3)) / len(word_runs(item, 3) | word_runs(text, 3)) >= 0.5
            ),
            "inside a longer text",
        ),
        (lambda text, item: len(word_runs(item, 1) & word_runs(text, 1)) >= 5, "stock phrase"),
    ],
)
def test_searches_that_miss(said, leaks, hint):
    answer = said("02.2", leaks)
    assert answer.startswith("02.2  not yet: ") and hint in answer


def test_a_result_instead_of_a_function(said):
    assert "a function of a text" in said("02.2", True)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"examples": 95}, "part of the whole"),
        ({"tokens": 190}, "part of the whole"),
        ({"tokens": 100}, "half the tokens"),
        ({"tokens": 50}, "shorter one"),
        ({"tokens": 13000}, "how many texts"),
        ({"examples": "100"}, "look again at examples"),
        ({"examples": 20, "tokens": 7}, "look again at examples, tokens"),
    ],
)
def test_wrong_doses(said, change, hint):
    answer = said("02.3", RIGHT["02.3"] | change)
    assert answer.startswith("02.3  not yet: ") and hint in answer


@pytest.mark.parametrize("exercise", ["02.1", "02.3"])
def test_other_names_are_refused_with_the_right_ones(said, exercise):
    assert ", ".join(RIGHT[exercise]) in said(exercise, {"x": 1})
