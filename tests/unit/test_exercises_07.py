import pytest

from course_lib import exercises

DESKS = {"a": (1, 4 / 3), "b": (5, 20 / 3), "c": "cannot train"}
LOGS = {"a": "healthy", "b": "rows in order of their label", "c": "sign not turned", "d": "nothing learns"}


def said(capsys, exercise, answer):
    exercises.check(exercise, answer)
    return capsys.readouterr().out.strip()


def untouched(table):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("exercise", "dots"), [("07.1", untouched), ("07.2", dict.fromkeys(DESKS, ...)), ("07.3", dict.fromkeys(LOGS, ...))]
)
def test_untouched_says_what_is_expected(capsys, exercise, dots):
    assert said(capsys, exercise, dots) == f"{exercise}  to do: {exercises.CHECKS[exercise][0]}"


# --- 07.1 ------------------------------------------------------------------------------------------------------------


def mean(values):
    return sum(values) / len(values)


def rolled(table, step=-1):
    return [table[i][(i + step) % len(table)] for i in range(len(table))]


def with_numpy(table):
    import numpy as np

    table = np.array(table)
    return np.roll(table, 1, axis=1).diagonal().mean().clip(min=0)


def with_torch(table):
    import torch

    table = torch.tensor(table)
    rows = torch.arange(len(table))
    return table[rows, rows - 1].mean().clamp(min=0)


@pytest.mark.parametrize(
    "answer",
    [lambda table: max(0.0, sum(table[i][i - 1] for i in range(len(table))) / len(table)), with_numpy, with_torch],
)
def test_right_reference_points(capsys, answer):
    assert said(capsys, "07.1", answer).startswith("07.1  right: ")


def test_the_solution_is_what_the_library_pairs():
    from course_lib import feedback

    table = [[10 * i + j for j in range(4)] for i in range(4)]
    assert [table[i][j] for i, j in feedback.mismatched(list(range(4)))] == rolled(table)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda t: mean(rolled(t)), "clamp it"),
        (lambda t: mean([max(0, v) for v in rolled(t)]), "the clamp afterwards"),
        (lambda t: mean(rolled(t, 0)), "diagonal"),
        (lambda t: max(0, mean(rolled(t, 0))), "diagonal"),
        (lambda t: max(0, mean(rolled(t, 1))), "the other way"),
        (lambda t: max(0, mean([v for i, r in enumerate(t) for j, v in enumerate(r) if i != j])), "not all of them"),
        (lambda t: max(0, sum(rolled(t))), "take the mean"),
        (lambda t: 0.0, "the values are others"),
        (lambda t: None, "could not use your answer"),
        (0.5, "could not use your answer"),
    ],
)
def test_wrong_reference_points(capsys, answer, hint):
    found = said(capsys, "07.1", answer)
    assert found.startswith("07.1  not yet: ") and hint in found


# --- 07.2 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{}, {"a": [1, 1.33]}, {"b": (5.0, 6.67)}, {"c": " Cannot  train"}])
def test_right_weights(capsys, change):
    assert said(capsys, "07.2", DESKS | change).startswith("07.2  right: ")


def test_the_weights_keep_the_rule():
    for name, (ups, downs) in {"a": (300, 300), "b": (40, 200)}.items():
        assert [weight * ups / downs for weight in DESKS[name]] == pytest.approx([1, 4 / 3])


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"a": (0.75, 1)}, "a (that is the weight of a thumb down"),
        ({"b": (0.15, 0.2)}, "b (that is the weight of a thumb down"),
        ({"b": (0.2, 0.267)}, "the rarer thumb needs the larger weight"),
        ({"b": (3.75, 5)}, "not the lower one"),
        ({"a": (1, 1.5)}, "the later version's 3/2"),
        ({"b": (20 / 3, 5)}, "the least comes first"),
        ({"b": (2, 3)}, "put the counts into the rule"),
        ({"b": "cannot train"}, "both kinds of thumbs are there"),
        ({"c": (500, 600)}, "nobody says what a bad reply is"),
        ({"c": None}, "nobody says what a bad reply is"),
        ({"a": 1}, "could not use your answer"),
    ],
)
def test_wrong_weights(capsys, change, hint):
    found = said(capsys, "07.2", DESKS | change)
    assert found.startswith("07.2  not yet: ") and hint in found


# --- 07.3 ------------------------------------------------------------------------------------------------------------


def test_right_logs(capsys):
    assert said(capsys, "07.3", LOGS).startswith("07.3  right: ")
    assert said(capsys, "07.3", LOGS | {"d": "Nothing  learns"}).startswith("07.3  right: ")


def test_half_read_is_named(capsys):
    assert (
        said(capsys, "07.3", dict.fromkeys(LOGS, ...) | {"a": "healthy"})
        == "07.3  to do: b, c, d still to be filled in."
    )


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"a": "nothing learns"}, "a (both rewards"),
        ({"b": "sign not turned"}, "b (what kind of thumb"),
        ({"c": "healthy"}, "c (which way"),
        ({"d": "healthy"}, "d (does anything move"),
    ],
)
def test_wrong_logs(capsys, change, hint):
    found = said(capsys, "07.3", LOGS | change)
    assert found.startswith("07.3  not yet: ") and hint in found
