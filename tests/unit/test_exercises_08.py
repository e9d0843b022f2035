import math

import pytest

from course_lib import exercises

BILLS = {"a": 2000, "b": 1_000_000, "c": "never"}
DESKS = {"a": "sequence KD", "b": "logit KD", "c": "gold labels", "d": "on-policy KD", "e": "no student"}


def untouched(student, teacher, T):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("exercise", "dots"),
    [("08.1", untouched), ("08.2", dict.fromkeys(BILLS, ...)), ("08.3", dict.fromkeys(DESKS, ...))],
)
def test_untouched_says_what_is_expected(said, exercise, dots):
    assert said(exercise, dots) == f"{exercise}  to do: {exercises.CHECKS[exercise][0]}"


# --- 08.1 ------------------------------------------------------------------------------------------------------------


def solution(student, teacher, T, factor=2, soften=(1, 1)):
    import torch

    s = torch.tensor(student, dtype=torch.float64).div(T if soften[0] else 1).log_softmax(0)
    t = torch.tensor(teacher, dtype=torch.float64).div(T if soften[1] else 1).log_softmax(0)
    return (t.exp() * (t - s)).sum().item() * T**factor


def in_float32(student, teacher, T):
    import torch
    from torch.nn.functional import kl_div

    s, t = (torch.tensor(x).div(T).log_softmax(0) for x in (student, teacher))
    return kl_div(s, t, reduction="sum", log_target=True) * T * T


def overflowing(student, teacher, T):
    import numpy as np

    with np.errstate(all="ignore"):
        s, t = (np.exp(np.array(x) / T) / np.exp(np.array(x) / T).sum() for x in (student, teacher))
        return float((t * np.log(t / s)).sum() * T**2)


@pytest.mark.parametrize("answer", [solution, in_float32])
def test_right_losses(said, answer):
    assert said("08.1", answer).startswith("08.1  right: ")


def test_the_solution_is_the_librarys_divergence():
    import torch

    from course_lib import distillation

    s, t, T = [0.5, 0.25, 2.0], [2.0, 1.5, -3.0], 2.0
    by_library = distillation.divergence(torch.tensor([s]), torch.tensor([t]), 0.0, T).item() * T**2
    assert math.isclose(solution(s, t, T), by_library, rel_tol=1e-5)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda s, t, T: solution(s, t, T, factor=0), "the gradient's size is missing"),
        (lambda s, t, T: solution(s, t, T, factor=1), "not with T"),
        (lambda s, t, T: solution(t, s, T), "the other direction: the teacher's"),
        (lambda s, t, T: solution(t, s, T, factor=0), "and the factor is missing"),
        (lambda s, t, T: solution(s, t, T, soften=(1, 0)), "the teacher is softened too"),
        (lambda s, t, T: solution(s, t, T, soften=(0, 1)), "the student is softened too"),
        (lambda s, t, T: -solution(s, t, T), "never negative"),
        (overflowing, "subtract the largest"),
        (lambda s, t, T: 0.0, "the values are others"),
        (0.5, "could not use your answer"),
    ],
)
def test_wrong_losses(said, answer, hint):
    found = said("08.1", answer)
    assert found.startswith("08.1  not yet: ") and hint in found


# --- 08.2 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{}, {"a": 2000.0}, {"c": " Never "}])
def test_right_bills(said, change):
    assert said("08.2", BILLS | change).startswith("08.2  right: ")


def test_the_bills_are_what_the_offers_say():
    assert 6000 / (3.20 - 0.20) == pytest.approx(BILLS["a"])
    assert 6000 / (3.20 - 0.20) * 1e6 / 2000 == pytest.approx(BILLS["b"])
    assert 200 * 3.20 < 720


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"a": 2e9}, "millions of tokens are asked for"),
        ({"a": 1875}, "the student costs something too"),
        ({"a": 1}, "what was paid once"),
        ({"a": "never"}, "there is such a volume"),
        ({"b": 2000}, "the answer to a"),
        ({"b": 2e9}, "those are tokens"),
        ({"c": 9.4}, "what does a month cost"),
        ({"c": None}, "what does a month cost"),
        ({"a": []}, "could not use your answer"),
    ],
)
def test_wrong_bills(said, change, hint):
    found = said("08.2", BILLS | change)
    assert found.startswith("08.2  not yet: ") and hint in found


# --- 08.3 ------------------------------------------------------------------------------------------------------------


def test_right_methods(said):
    assert said("08.3", DESKS).startswith("08.3  right: ")
    assert said("08.3", DESKS | {"b": "Logit  kd"}).startswith("08.3  right: ")


def test_half_done_is_named(said):
    assert said("08.3", dict.fromkeys(DESKS, ...) | {"a": "x"}) == "08.3  to do: b, c, d, e still to be filled in."


@pytest.mark.parametrize(
    ("name", "given", "hint"),
    [
        ("a", "logit KD", "what does this interface hand out"),
        ("b", "sequence KD", "what do the weights give"),
        ("c", "logit KD", "which of the two"),
        ("d", "logit KD", "whose texts"),
        ("e", "sequence KD", "what does the teacher's bill"),
    ],
)
def test_wrong_methods(said, name, given, hint):
    found = said("08.3", DESKS | {name: given})
    assert found.startswith("08.3  not yet: ") and f"{name} ({hint}" in found
