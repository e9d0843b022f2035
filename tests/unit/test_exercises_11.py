import math

import numpy as np
import pytest
from scipy.stats import binom

from course_lib import evaluation, exercises

RULES = {"a": "looks at the value", "b": "no sample shows it", "c": "too coarse", "d": "never alarms"}


def untouched(*_):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("exercise", "dots"), [("11.1", untouched), ("11.2", dict.fromkeys(RULES, ...)), ("11.3", untouched)]
)
def test_untouched_says_what_is_expected(said, exercise, dots):
    assert said(exercise, dots) == f"{exercise}  to do: {exercises.CHECKS[exercise][0]}"


# --- 11.1 ------------------------------------------------------------------------------------------------------------


def failures_allowed(n, limit):
    allowed = None
    for failures in range(n):
        if binom.cdf(failures, n, limit) > 0.05:
            break
        allowed = failures
    return allowed


def by_hand(n, limit):
    at_most, k = (1 - limit) ** n, 0
    while at_most <= 0.05:
        k += 1
        at_most += math.comb(n, k) * limit**k * (1 - limit) ** (n - k)
    return float(k - 1) if k else None


def by_quantile(n, limit):
    """The quantile is the first number of failures that is too many."""
    k = binom.ppf(0.05, n, limit) - 1
    return np.int64(k) if k >= 0 else None


@pytest.mark.parametrize("answer", [failures_allowed, by_hand, by_quantile])
def test_right_numbers_of_failures(said, answer):
    assert said("11.1", answer).startswith("11.1  right: ")


def test_the_inverse_of_the_lesson():
    """A test of that size allows them, and one ticket fewer does not allow the last."""
    for n, failures in ((299, 0), (473, 1), (1049, 5)):  # the lesson's table
        assert failures_allowed(n, 0.01) == failures
        assert failures_allowed(n - 1, 0.01) == (failures - 1 if failures else None)


def wilson(n, limit):
    hits = [k for k in range(n) if evaluation.proportion([1] * k + [0] * (n - k)).high <= limit]
    return max(hits, default=None)


def below(n, limit, level=0.05, chance=binom.cdf):
    k = 0
    while chance(k, n, limit) <= level:
        k += 1
    return k - 1 if k else None


def instead_of_none(value):
    return lambda n, limit: value if failures_allowed(n, limit) is None else failures_allowed(n, limit)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda n, limit: int(n * limit + 1e-9), "compares the value"),
        (wilson, "this gate's rule"),
        (instead_of_none(0), "None is right"),
        (instead_of_none(-1), "None is right"),
        (lambda n, limit: 0 if (k := failures_allowed(n, limit)) is None else k + 1, "the one before it"),
        (lambda n, limit: None if (k := failures_allowed(n, limit)) is None else k + 1, "one failure too many"),
        (lambda n, limit: (k := failures_allowed(n, limit)) and k - 1, "belongs to it"),
        (lambda n, limit: below(n, limit, 0.025), "not one of forty"),
        (lambda n, limit: below(n, limit, chance=binom.pmf), "add them up"),
        (lambda n, limit: binom.ppf(0.95, n, limit), "Few must be rare"),
        (lambda n, limit: n * limit * 0.4321, "a whole number or None"),
        (lambda n, limit: True, "a whole number or None"),
        (lambda n, limit: None, "nothing came back"),
        (lambda n, limit: 7, "80 tickets, limit 10%: 7 came back; 3 is wanted"),
        (lambda n: 0, "could not use your answer"),
    ],
)
def test_wrong_numbers_of_failures(said, answer, hint):
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
