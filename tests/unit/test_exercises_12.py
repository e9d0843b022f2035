import math

import pytest

from course_lib import exercises

CODES = {"a": 200, "b": 429, "c": 422, "d": 401, "e": 503, "f": 503}


def untouched(*values):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("exercise", "dots"), [("12.1", dict.fromkeys(CODES, ...)), ("12.2", untouched), ("12.3", untouched)]
)
def test_untouched_says_what_is_expected(said, exercise, dots):
    assert said(exercise, dots) == f"{exercise}  to do: {exercises.CHECKS[exercise][0]}"


# --- 12.1 ------------------------------------------------------------------------------------------------------------


def test_right_codes(said):
    assert said("12.1", CODES).startswith("12.1  right: ")
    assert said("12.1", CODES | {"b": "429"}).startswith("12.1  right: ")


def test_half_filled_in(said):
    assert said("12.1", CODES | {"e": ...}) == "12.1  to do: e still to be filled in."


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"b": 503}, "b (the client did nothing wrong"),
        ({"c": 200}, "c (a field that is not taken"),
        ({"d": 200}, "d (without a key"),
        ({"e": 429}, "e (its time is over"),
        ({"f": 200}, "f (the fault is on the server's side"),
        ({"a": "ok"}, "could not use your answer"),
    ],
)
def test_wrong_codes(said, change, hint):
    found = said("12.1", CODES | change)
    assert found.startswith("12.1  not yet: ") and hint in found


# --- 12.2 ------------------------------------------------------------------------------------------------------------


def tail(n, rate, limit, numbers=None):
    numbers = range(limit) if numbers is None else numbers
    return sum(math.comb(n, j) * rate**j * (1 - rate) ** (n - j) for j in numbers)


def with_scipy(n, rate, limit):
    from scipy.stats import binom

    return binom.cdf(limit - 1, n, rate)


@pytest.mark.parametrize("answer", [tail, with_scipy])
def test_right_false_alarms(said, answer):
    assert said("12.2", answer).startswith("12.2  right: ")


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda n, r, k: tail(n, r, k + 1), "at the limit itself"),
        (lambda n, r, k: 1 - tail(n, r, k), "stays silent"),
        (lambda n, r, k: tail(n, 1 - r, k), "not of a wrong one"),
        (lambda n, r, k: tail(n, r, k, [k]), "exactly limit"),
        (lambda n, r, k: tail(n, r, k, [k - 1]), "one number of right answers"),
        (lambda n, r, k: 0.5, "add up the binomial"),
        (lambda n, r, k: None, "could not use your answer"),
    ],
)
def test_wrong_false_alarms(said, answer, hint):
    found = said("12.2", answer)
    assert found.startswith("12.2  not yet: ") and hint in found


# --- 12.3 ------------------------------------------------------------------------------------------------------------


def ceiling(ranks):
    return min(c for c in (8, 16, 32, 64, 128, 256) if c >= max(ranks))


def slots(ranks, per_rank):
    return len(ranks) * ceiling(ranks) * per_rank


def pages(ranks, per_rank, page):
    return sum(math.ceil(rank * per_rank / page) for rank in ranks) * page


def test_right_room(said):
    assert said("12.3", lambda r, per, page: (slots(r, per), pages(r, per, page))).startswith("12.3  right: ")


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda r, per, page: (len(r) * max(r) * per, pages(r, per, page)), "one of the listed ranks"),
        (lambda r, per, page: (sum(r) * per, pages(r, per, page)), "slots not yet"),
        (lambda r, per, page: (slots(r, per), math.ceil(sum(r) * per / page) * page), "a page of its own"),
        (lambda r, per, page: (slots(r, per), sum(r) * per), "pages are taken whole"),
        (lambda r, per, page: (slots(r, per), pages(r, per, page) // page), "in bytes"),
        (lambda r, per, page: (1, 1), "both differ"),
        (lambda r, per, page: 1, "could not use your answer"),
    ],
)
def test_wrong_room(said, answer, hint):
    found = said("12.3", answer)
    assert found.startswith("12.3  not yet: ") and hint in found
