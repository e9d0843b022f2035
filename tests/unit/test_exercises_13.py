import math

import pytest

from course_lib import exercises

CARD = {"a": "impossible", "b": "unsupported", "c": "unsupported", "d": "impossible", "e": "sound"}


def untouched(*_):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("exercise", "dots"), [("13.1", dict.fromkeys(CARD, ...)), ("13.2", untouched), ("13.3", untouched)]
)
def test_untouched_says_what_is_expected(said, exercise, dots):
    assert said(exercise, dots) == f"{exercise}  to do: {exercises.CHECKS[exercise][0]}"


# --- 13.1 ------------------------------------------------------------------------------------------------------------


def test_the_faults_of_the_card(said):
    assert said("13.1", CARD).startswith("13.1  right")
    assert said("13.1", {k: v.upper() for k, v in CARD.items()}).startswith("13.1  right")


@pytest.mark.parametrize(
    ("line", "word", "hint"),
    [
        ("a", "unsupported", "one problem of 164"),
        ("b", "sound", "leave room"),
        ("c", "sound", "standard error"),
        ("d", "sound", "add 85 and 15"),
        ("e", "unsupported", "what is missing"),
    ],
)
def test_a_wrong_line_gets_its_hint(said, line, word, hint):
    answer = said("13.1", CARD | {line: word})
    assert answer.startswith("13.1  not yet") and hint in answer


def test_half_an_answer(said):
    assert "b, c, d, e still to be filled in" in said("13.1", dict.fromkeys(CARD, ...) | {"a": "impossible"})


def test_what_the_lines_say_is_so():
    assert 1 / 164 > 2 * 0.002  # a: one problem is more than twice the step
    assert 1 - 0.05 ** (1 / 10_000) > 2.9e-4  # b: zero failures leave room
    assert 1.96 * math.sqrt(2 * 0.66 * 0.34 / 14_042) > 0.004  # c: unpaired, the difference is within its interval
    assert 85 + 15 != 120
    assert (429 / 500, 492 / 500) == (0.858, 0.984)  # e


# --- 13.2 ------------------------------------------------------------------------------------------------------------


def test_every_token_counts_once(said):
    def whole_batch(reports):
        return sum(loss * tokens for loss, tokens in reports) / sum(tokens for _, tokens in reports)

    assert said("13.2", whole_batch).startswith("13.2  right")


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda reports: sum(loss for loss, _ in reports) / len(reports), "mean of the means"),
        (lambda reports: sum(loss * n for loss, n in reports), "that is the sum"),
        (lambda reports: 0.0, "it should be"),
        (lambda reports: sum(loss * n for loss, n in reports) / len(reports), "it should be"),
    ],
)
def test_other_means(said, wrong, hint):
    answer = said("13.2", wrong)
    assert answer.startswith("13.2  not yet") and hint in answer


# --- 13.3 ------------------------------------------------------------------------------------------------------------


def by_formula(parameters, way, gigabytes):
    sharded = {"DDP": 0, "ZeRO-1": 12, "ZeRO-2": 14, "ZeRO-3": 16}[way] * parameters
    left = gigabytes * 1e9 - (16 * parameters - sharded)
    if left < 0 or (left == 0 and sharded):
        return None
    return max(1, math.ceil(sharded / left)) if sharded else 1


def by_trying(parameters, way, gigabytes):
    stays = {"DDP": 16, "ZeRO-1": 4, "ZeRO-2": 2, "ZeRO-3": 0}[way]
    for n in range(1, 2000):
        if stays * parameters + (16 - stays) * parameters / n <= gigabytes * 1e9:
            return n
    return None


@pytest.mark.parametrize("answer", [by_formula, by_trying])
def test_right_numbers_of_gpus(said, answer):
    assert said("13.3", answer).startswith("13.3  right")


def all_is_sharded(parameters, way, gigabytes):
    return math.ceil(16 * parameters / (gigabytes * 1e9))


def never_none(parameters, way, gigabytes):
    return by_formula(parameters, way, gigabytes) or 1000


@pytest.mark.parametrize(("wrong", "hint"), [(all_is_sharded, "stay on each GPU"), (never_none, "no number is enough")])
def test_wrong_numbers_of_gpus(said, wrong, hint):
    answer = said("13.3", wrong)
    assert answer.startswith("13.3  not yet") and hint in answer
