import numpy as np
import pytest
import torch

from course_lib import exercises, replies

logsigmoid = torch.nn.functional.logsigmoid
HOLES = (  # as in the lesson
    "You have my word that this ends well.",
    "Expect a replacement in the post.",
    "It costs you nothing.",
    "The driver dropped it.",
    "You can count on a new one.",
)


def said(capsys, exercise, answer):
    exercises.check(exercise, answer)
    return capsys.readouterr().out.strip()


def untouched(*_, **__):
    raise NotImplementedError


@pytest.mark.parametrize(("exercise", "dots"), [("06.1", untouched), ("06.2", untouched), ("06.3", ...)])
def test_untouched_says_what_is_expected(capsys, exercise, dots):
    assert said(capsys, exercise, dots) == f"{exercise}  to do: {exercises.CHECKS[exercise][0]}"


# --- 06.1 ------------------------------------------------------------------------------------------------------------


def loss(c, r, rc, rr, beta, eps):
    margin = beta * ((c - rc) - (r - rr))
    return (-(1 - eps) * logsigmoid(margin) - eps * logsigmoid(-margin)).mean()


def by_softplus(c, r, rc, rr, beta, eps):
    margin = beta * (c - r - rc + rr)
    flipped = torch.nn.functional.softplus(margin)
    return float(((1 - eps) * torch.nn.functional.softplus(-margin) + eps * flipped).mean())


@pytest.mark.parametrize("answer", [loss, by_softplus])
def test_right_losses(capsys, answer):
    assert said(capsys, "06.1", answer).startswith("06.1  right: ")


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda c, r, rc, rr, b, e: loss(r, c, rr, rc, b, e), "mixed up"),
        (lambda c, r, rc, rr, b, e: loss(c, r, 0, 0, b, e), "reference is missing"),
        (lambda c, r, rc, rr, b, e: loss(c, r, rc, rr, 1, e), "beta is missing"),
        (lambda c, r, rc, rr, b, e: loss(c, r, rc, rr, b, 0), "smoothing is missing"),
        (lambda c, r, rc, rr, b, e: loss(c, r, rc, rr, b, 1 - e), "mixed up|wrong way round"),
        (lambda c, r, rc, rr, b, e: -loss(c, r, rc, rr, b, e), "sign of the whole"),
        (lambda c, r, rc, rr, b, e: loss(c, r, rc, rr, b, e) * len(c), "not the sum"),
        (lambda c, r, rc, rr, b, e: c - r, "one number"),
        (
            lambda c, r, rc, rr, b, e: -(1 - e) * torch.log(torch.sigmoid(b * (c - rc - r + rr))).mean(),
            "finite|instead",
        ),
        (lambda c, r, rc, rr, b, e: 0.5, "instead of"),
        (lambda c: c, "could not use"),
    ],
)
def test_wrong_losses(capsys, answer, hint):
    import re

    text = said(capsys, "06.1", answer)
    assert text.startswith("06.1  not yet: ") and re.search(hint, text), text


# --- 06.2 ------------------------------------------------------------------------------------------------------------


def policy(log_ref, reward, beta):
    scores = np.asarray(log_ref) + np.asarray(reward) / beta
    scores = scores - scores.max()
    return scores - np.log(np.exp(scores).sum())


def with_torch(log_ref, reward, beta):
    return (torch.tensor(log_ref) + torch.tensor(reward) / beta).log_softmax(0)


@pytest.mark.parametrize("answer", [policy, with_torch])
def test_right_policies(capsys, answer):
    assert said(capsys, "06.2", answer).startswith("06.2  right: ")


def naive(log_ref, reward, beta):
    weights = np.exp(log_ref) * np.exp(reward / beta)
    return np.log(weights / weights.sum())


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda f, r, b: np.exp(policy(f, r, b)), "logarithms are wanted"),
        (lambda f, r, b: f + r / b, "normalise"),
        (lambda f, r, b: policy(0 * f, r, b), "reference is missing"),
        (lambda f, r, b: policy(f, r, 1 / b), "divided by beta"),
        (lambda f, r, b: policy(np.exp(f), r, b), "logarithm already"),
        (lambda f, r, b: 0 * f, "others"),
        (lambda f, r, b: 0.0, "one log-probability for each"),
        (naive, "finite"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_wrong_policies(capsys, answer, hint):
    text = said(capsys, "06.2", answer)
    assert text.startswith("06.2  not yet: ") and hint in text, text


# --- 06.3 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "marks",
    [
        ["my word", "expect a", "costs you nothing", "dropped", "count on"],
        ("You have my", "Expect", "nothing", "the driver", "can count on"),
    ],
)
def test_right_marks(capsys, marks):
    assert said(capsys, "06.3", marks).startswith("06.3  right: ")


@pytest.mark.parametrize(
    ("marks", "hint"),
    [
        (["my word"], "4 still slip through"),
        ("my word", "4 still slip through"),
        (["you", "it", "a", "the", "expect"], "honest drafts"),
        (["you have my word that"], "more than three words"),
        ([""], "none of them empty"),
        ([3], "none of them empty"),
        (7, "could not use"),
    ],
)
def test_wrong_marks(capsys, marks, hint):
    text = said(capsys, "06.3", marks)
    assert text.startswith("06.3  not yet: ") and hint in text, text


def test_the_holes_are_holes():
    record = next(r for r in replies.load("train") if r["ticket"]["intent"] == "damaged")
    name = record["ticket"]["order_id"] or record["ticket"]["items"][0]["product"]
    for hole in HOLES:
        text = f"We are sorry about this. We are opening a damage report for {name}. {hole}\nThe ticket desk"
        assert replies.passes(record, text), hole
