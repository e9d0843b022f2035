import math

import pytest
from scipy.stats import binom

from course_lib import exercises

RULES = {"a": "looks at the value", "b": "no sample shows it", "c": "too coarse", "d": "never alarms"}


def untouched(*_):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("exercise", "dots"), [("11.1", untouched), ("11.2", dict.fromkeys(RULES, ...)), ("11.3", untouched)]
)
def test_untouched_says_what_is_expected(said, exercise, dots):
    assert said(exercise, dots) == f"{exercise}  to do: {exercises.CHECKS[exercise][0]}"


# --- 11.1 ------------------------------------------------------------------------------------------------------------


def smallest_test(limit, failures):
    n = failures + 1
    while binom.cdf(failures, n, limit) > 0.05:
        n += 1
    return n


def by_hand(limit, failures):
    def at_most(n):
        return sum(math.comb(n, k) * limit**k * (1 - limit) ** (n - k) for k in range(failures + 1))

    return next(float(n) for n in range(failures + 1, 10_000) if at_most(n) <= 0.05)


@pytest.mark.parametrize("answer", [smallest_test, by_hand])
def test_right_sizes(said, answer):
    assert said("11.1", answer).startswith("11.1  right: ")


def one_more_failure(limit, failures):
    n = failures + 1
    while binom.cdf(failures - 1, n, limit) > 0.05:
        n += 1
    return n


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda limit, failures: math.ceil(3 / limit), "rule of three"),
        (lambda limit, failures: smallest_test(limit, 0), "costs more tickets"),
        (lambda limit, failures: smallest_test(limit, failures) - 1, "too few"),
        (lambda limit, failures: smallest_test(limit, failures) + 1, "more than needed"),
        (lambda limit, failures: one_more_failure(limit, failures) if failures else smallest_test(limit, 0), "belongs"),
        (lambda limit, failures: math.log(0.05) / math.log(1 - limit), "a whole number"),
        (lambda limit, failures: 7, "7 instead of"),
    ],
)
def test_wrong_sizes(said, answer, hint):
    found = said("11.1", answer)
    assert found.startswith("11.1  not yet: ") and hint in found


# --- 11.2 ------------------------------------------------------------------------------------------------------------


def test_right_words(said):
    assert said("11.2", RULES).startswith("11.2  right: ")
    assert said("11.2", {name: f" {word.upper()}" for name, word in RULES.items()}).startswith("11.2  right: ")


def test_half_done_is_not_wrong(said):
    assert "to do: b, c, d still" in said("11.2", dict.fromkeys(RULES, ...) | {"a": RULES["a"]})


@pytest.mark.parametrize(
    ("name", "word", "hint"),
    [
        ("a", "too coarse", "51 of 100"),
        ("b", "looks at the value", "1,000"),
        ("c", "never alarms", "50 requests"),
        ("d", "too coarse", "fewer than 40"),
        ("d", "too strict", "none of the four"),
    ],
)
def test_wrong_words(said, name, word, hint):
    found = said("11.2", RULES | {name: word})
    assert found.startswith("11.2  not yet: ") and hint in found


# --- 11.3 ------------------------------------------------------------------------------------------------------------


def memorised(losses):
    places = [1 + sum(x < own for x in others) for own, others in losses]
    return len(losses) * min(places) / (len(losses[0][1]) + 1) < 0.05


def with_numpy(losses):
    import numpy as np

    places = [1 + (np.array(others) < own).sum() for own, others in losses]
    return np.bool_(min(places) < 0.05 * (len(losses[0][1]) + 1) / len(losses))


@pytest.mark.parametrize("answer", [memorised, with_numpy])
def test_right_ranks(said, answer):
    assert said("11.3", answer).startswith("11.3  right: ")


def places(losses):
    return [1 + sum(x < own for x in others) for own, others in losses]


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda losses: min(places(losses)) / 201 < 0.05, "place 4 of 201: 12 in 201"),
        (lambda losses: max(places(losses)) / 201 < 0.05, "one at place 1"),
        (lambda losses: min(places(losses)) == 1, "one canary at place 4"),
        (lambda losses: False, "one at place 1"),
        (lambda losses: len(losses) * min(201 - p for p in places(losses)) / 201 < 0.05, "wanted"),
        (lambda losses: None, "nothing came back"),
    ],
)
def test_wrong_ranks(said, answer, hint):
    found = said("11.3", answer)
    assert found.startswith("11.3  not yet: ") and hint in found


def test_the_solution_is_what_the_gate_computes():
    """Bonferroni's correction, as in `release.privacy`."""
    assert memorised([(0.5, [1.0] * 99)]) and not memorised([(0.5, [1.0] * 99)] * 5)
