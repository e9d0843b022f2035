from statistics import mean, pstdev, stdev

import pytest

HOLES = {
    "a": "shop orders delivery returns accounts",
    "b": "",
    "c": "anything but orders",
    "d": '{"team": "shop", "team": "orders"}',
}
LOGS = {"a": "healthy", "b": "needs a cold start", "c": "hacks its reward", "d": "collapsed to two classes"}


def untouched(rewards, size):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("exercise", "dots"), [("09.1", untouched), ("09.2", dict.fromkeys(HOLES, ...)), ("09.3", dict.fromkeys(LOGS, ...))]
)
def test_untouched_says_what_is_expected(said, exercise, dots):
    from course_lib import exercises

    assert said(exercise, dots) == f"{exercise}  to do: {exercises.CHECKS[exercise][0]}"


# --- 09.1 ------------------------------------------------------------------------------------------------------------


def grouped(formula):
    def answer(rewards, size):
        groups = [rewards[i : i + size] for i in range(0, len(rewards), size)]
        return [a for g in groups for a in formula(g, rewards)]

    return answer


def with_torch(rewards, size):
    import torch

    groups = torch.tensor(rewards, dtype=torch.float32).view(-1, size)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


@pytest.mark.parametrize("answer", [grouped(lambda g, r: [(x - mean(g)) / (stdev(g) + 1e-4) for x in g]), with_torch])
def test_right_advantages(said, answer):
    assert said("09.1", answer).startswith("09.1  right: ")


@pytest.mark.parametrize(
    ("formula", "hint"),
    [
        (lambda g, r: [(x - mean(g)) / (pstdev(g) + 1e-4) for x in g], "n - 1"),
        (lambda g, r: [(x - mean(g)) / (stdev(g) + 1e-8) for x in g], "small number"),
        (lambda g, r: [(x - mean(g)) / stdev(g) for x in g], "divides by zero"),
        (lambda g, r: [x - mean(g) for x in g], "is missing"),
        (lambda g, r: [(x - mean(r)) / (stdev(r) + 1e-4) for x in g], "its own mean"),
        (lambda g, r: [(x - mean(g)) / (stdev(r) + 1e-4) for x in g], "of all rewards"),
        (lambda g, r: [x / (stdev(g) + 1e-4) for x in g], "not taken off"),
        (lambda g, r: [0.0 for x in g], "the values are others"),
        (lambda g, r: [0.0], "the values are others"),
        (lambda g, r: [None], "could not use your answer"),
    ],
)
def test_wrong_advantages(said, formula, hint):
    found = said("09.1", grouped(formula))
    assert found.startswith("09.1  not yet: ") and hint in found


# --- 09.2 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{}, {"a": "not orders"}, {"b": "rder"}, {"c": "ORDERS"}, {"d": '{"team": "orders", "not": "orders"}'}]
)
def test_right_holes(said, change):
    assert said("09.2", HOLES | change).startswith("09.2  right: ")


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"a": "orders"}, "a (that answer is right"),
        ({"b": " orders\n"}, "b (that answer is right"),
        ({"c": "orders, or not"}, "c (the verifier gives no reward"),
        ({"c": ""}, "c (the verifier raises IndexError"),
        ({"d": '{"team": "orders"}'}, "d (that answer is right"),
        ({"d": "orders"}, "d (the verifier raises JSONDecodeError"),
        ({"d": 5}, "d (a string is wanted"),
    ],
)
def test_wrong_holes(said, change, hint):
    found = said("09.2", HOLES | change)
    assert found.startswith("09.2  not yet: ") and hint in found


# --- 09.3 ------------------------------------------------------------------------------------------------------------


def test_right_logs(said):
    assert said("09.3", LOGS | {"b": "Needs a  cold start"}).startswith("09.3  right: ")


def test_half_read_is_named(said):
    assert said("09.3", dict.fromkeys(LOGS, ...) | {"a": "healthy"}) == "09.3  to do: b, c, d still to be filled in."


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"a": "needs a cold start"}, "a (reward and honest score"),
        ({"b": "healthy"}, "b (which advantages"),
        ({"c": "healthy"}, "c (do reward"),
        ({"d": "hacks its reward"}, "d (what share"),
    ],
)
def test_wrong_logs(said, change, hint):
    found = said("09.3", LOGS | change)
    assert found.startswith("09.3  not yet: ") and hint in found
