import math

import pytest

from course_lib import exercises, memory

SHAPE = memory.shape("Mistral-7B")
N = SHAPE.blocks * sum(32 * (d_in + d_out) for d_in, d_out in SHAPE.matrices.values())
FILE = {"weights": N, "MB in 16 bits": 2 * N / 1e6, "MB in 32 bits": 4 * N / 1e6, "verdict": "imprecise"}
RATE = {
    "limit in percent": 100 * (1 - 0.05 ** (1 / 300)),
    "trials needed": math.ceil(math.log(0.05) / math.log(1 - 0.001)),
}


def said(capsys, exercise, answer):
    exercises.check(exercise, answer)
    return capsys.readouterr().out.strip()


def untouched(claimed, accepted, drafted):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("exercise", "dots"), [("14.1", dict.fromkeys(FILE, ...)), ("14.2", dict.fromkeys(RATE, ...)), ("14.3", untouched)]
)
def test_untouched_says_what_is_expected(capsys, exercise, dots):
    assert said(capsys, exercise, dots) == f"{exercise}  to do: {exercises.CHECKS[exercise][0]}"


def test_half_done_is_named(capsys):
    assert said(capsys, "14.2", RATE | {"trials needed": ...}) == "14.2  to do: trials needed still to be filled in."


# --- 14.1 ------------------------------------------------------------------------------------------------------------


def test_the_count_is_the_planner_s():
    assert sum(SHAPE.adapter(32)) == N == 83_886_080


@pytest.mark.parametrize("change", [{}, {"MB in 16 bits": 168}, {"MB in 32 bits": 335.5}, {"verdict": " Imprecise"}])
def test_right_files(capsys, change):
    assert said(capsys, "14.1", FILE | change).startswith("14.1  right: ")


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"weights": N / 32}, "that is one block"),
        ({"weights": 32 * 32 * (4 * 8192 + 3 * 18432)}, "key and value of this model are narrower"),
        ({"weights": 32 * 32 * 26624}, "the MLP has three"),
        ({"weights": N / 2}, "is the rank 32?"),
        ({"weights": 7}, "rank x (inputs + outputs)"),
        ({"MB in 16 bits": 2 * N}, "in millions of bytes"),
        ({"MB in 16 bits": 2 * N / 2**20}, "a megabyte is a million bytes here"),
        ({"MB in 32 bits": 2 * N / 1e6}, "32 bits are 4"),
        ({"MB in 16 bits": 16 * N / 1e6}, "that is bits"),
        ({"MB in 16 bits": 7}, "weights times bytes a weight"),
        ({"verdict": "correct"}, "in how many of the two cases"),
        ({"verdict": "wrong"}, "in how many of the two cases"),
        ({"weights": "many"}, "could not use your answer"),
    ],
)
def test_wrong_files(capsys, change, hint):
    found = said(capsys, "14.1", FILE | change)
    assert found.startswith("14.1  not yet: ") and hint in found


# --- 14.2 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{}, {"limit in percent": 1.0}, {"limit in percent": 0.99}, {"trials needed": 3000}])
def test_right_rates(capsys, change):
    assert said(capsys, "14.2", RATE | change).startswith("14.2  right: ")


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"limit in percent": 0}, "nothing seen is not nothing there"),
        ({"limit in percent": 0.00994}, "in percent, please"),
        ({"limit in percent": 100 / 300}, "one over n"),
        ({"limit in percent": 5}, "to the power of 300"),
        ({"trials needed": 2994}, "round up"),
        ({"trials needed": 300}, "that is what was tried"),
        ({"trials needed": 1000}, "expect one failure"),
        ({"trials needed": 10_000}, "for n"),
    ],
)
def test_wrong_rates(capsys, change, hint):
    found = said(capsys, "14.2", RATE | change)
    assert found.startswith("14.2  not yet: ") and hint in found


# --- 14.3 ------------------------------------------------------------------------------------------------------------


def judge(found, tolerance=0.02):
    return lambda claimed, p, k: "correct" if abs(claimed - found(p, k)) <= tolerance * found(p, k) else "wrong"


def summed(p, k):
    return sum(p**i for i in range(k + 1))


def simulated(p, k, n=100_000):
    """Without the formula: how many drafts in a row are accepted."""
    import numpy as np

    return 1 + float(np.cumprod(np.random.default_rng(0).random((n, k)) < p, axis=1).sum(1).mean())


@pytest.mark.parametrize("found", [summed, lambda p, k: (1 - p ** (k + 1)) / (1 - p), simulated])
def test_right_judges(capsys, found):
    assert said(capsys, "14.3", judge(found)).startswith("14.3  right: ")


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda claimed, p, k: "wrong", "a check has to be able to fail"),
        (lambda claimed, p, k: "correct", "a check has to be able to fail"),
        (lambda claimed, p, k: True, 'the words are "correct" and "wrong"'),
        (judge(lambda p, k: summed(p, k) - 1), "the pass itself adds a token"),
        (judge(lambda p, k: summed(p, k - 1)), "count every draft"),
        (judge(lambda p, k: summed(p, k + 1)), "one term too many"),
        (judge(lambda p, k: p * k + 1), "a draft after a refused one is lost"),
        (judge(summed, 1e-9), "2 in 100 are allowed"),
        (judge(summed, 0.05), "2 in 100 are allowed"),
        (judge(lambda p, k: summed(p, k) * 1.02), "add up the chance"),
        (0.5, "could not use your answer"),
    ],
)
def test_wrong_judges(capsys, answer, hint):
    found = said(capsys, "14.3", answer)
    assert found.startswith("14.3  not yet: ") and hint in found
