from math import log, log2

import pytest

from course_lib import exercises, guards

REPORTS = {
    "a": "require_end_token",
    "b": "require_current",
    "c": "require_disjoint",
    "d": "require_base",
    "e": "require_bare",
    "f": "require_same_start",
}


def untouched(*given):
    raise NotImplementedError


def balance(labels, most=0.8):
    usual = max(set(labels), key=labels.count)
    share = labels.count(usual) / len(labels)
    if share > most:
        raise guards.GuardError(f"{share:.0%} of the labels are {usual!r}: collect others, or weight them.")


def exposure_of(planted_loss, other_losses):
    rank = 1 + sum(loss < planted_loss for loss in other_losses)
    return log2(len(other_losses) + 1) - log2(rank)


@pytest.mark.parametrize(
    ("exercise", "dots"), [("10.1", dict.fromkeys(REPORTS, ...)), ("10.2", untouched), ("10.3", untouched)]
)
def test_untouched_says_what_is_expected(said, exercise, dots):
    assert said(exercise, dots) == f"{exercise}  to do: {exercises.CHECKS[exercise][0]}"


@pytest.mark.parametrize("change", [{}, {"a": "guards.require_end_token"}, {"b": "current"}, {"d": "require_base()"}])
def test_right_guards(said, change):
    assert said("10.1", REPORTS | change).startswith("10.1  right: ")
    assert all(hasattr(guards, name) for name in REPORTS.values())


def test_half_named(said):
    assert said("10.1", REPORTS | {"c": ...}) == "10.1  to do: c still to be filled in."


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"c": "require_held_out"}, "c (the questions leaked"),
        ({"a": "require_left_padding"}, "a (what were the rows"),
        ({"d": "require_tenant"}, "d (something beneath"),
        ({"f": None}, "f (two models"),
    ],
)
def test_wrong_guards(said, change, hint):
    found = said("10.1", REPORTS | change)
    assert found.startswith("10.1  not yet: ") and hint in found


def with_counter(labels, most=0.8):
    from collections import Counter

    label, n = Counter(labels).most_common(1)[0]
    if n > most * len(labels):
        raise guards.GuardError(f"too many {label}")


@pytest.mark.parametrize("answer", [balance, with_counter])
def test_right_balance(said, answer):
    assert said("10.2", answer).startswith("10.2  right: ")


def raising(error, when=lambda share: share > 0.8, words=True):
    def guard(labels, most=0.8):
        usual = max(set(labels), key=labels.count)
        if when(labels.count(usual) / len(labels)):
            raise error(f"too many {usual}" if words else "too many")

    return guard


def first_label(labels, most=0.8):
    if labels.count(labels[0]) / len(labels) > most or labels[0] == "refund" and most < 0.5:
        raise guards.GuardError(f"too many {labels[0]}")


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda labels, most=0.8: None, "stays silent"),
        (raising(ValueError), "a ValueError came instead"),
        (raising(guards.GuardError, words=False), "does not name the label"),
        (raising(guards.GuardError, when=lambda share: True), "must be silent there"),
        (raising(guards.GuardError, when=lambda share: share >= 0.8), "exactly the share that is allowed"),
        (raising(guards.GuardError), "no notice of `most`"),
        (first_label, "looks at the first label"),
    ],
)
def test_wrong_balance(said, answer, hint):
    found = said("10.2", answer)
    assert found.startswith("10.2  not yet: ") and hint in found


def with_sort(planted, others):
    import numpy as np

    return np.log2((len(others) + 1) / (1 + (np.array(others) < planted).sum()))


@pytest.mark.parametrize("answer", [exposure_of, with_sort])
def test_right_exposure(said, answer):
    assert said("10.3", answer).startswith("10.3  right: ")


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda p, o: log2(len(o)) - log2(1 + sum(x < p for x in o)), "counts among all codes"),
        (lambda p, o: log2(len(o) + 1) - log2(1 + sum(x <= p for x in o)), "does not stand before"),
        (lambda p, o: exposure_of(p, o) * log(2), "those are nats"),
        (lambda p, o: -exposure_of(p, o), "the sign"),
        (lambda p, o: 0.0, "the values are others"),
        (0.5, "could not use your answer"),
    ],
)
def test_wrong_exposure(said, answer, hint):
    found = said("10.3", answer)
    assert found.startswith("10.3  not yet: ") and hint in found
