import pytest

from course_lib import exercises


def untouched(ids, prompt_length, length):
    raise NotImplementedError


def right(ids, prompt_length, length):
    return [-100] * prompt_length + ids[prompt_length:length] + [-100] * (len(ids) - length)


DOTS = {
    "03.1": untouched,
    "03.2": ...,
    "03.3": {"ends": ..., "kept": ...},
    "03.4": {"a": ..., "b": ..., "c": ..., "d": ...},
}
RIGHT = {
    "03.1": right,
    "03.2": 0.44,
    "03.3": {"ends": 400, "kept": 400},
    "03.4": {"a": "weights frozen", "b": "rate too high", "c": "too many epochs", "d": "healthy"},
}


@pytest.mark.parametrize("exercise", RIGHT)
def test_untouched_says_what_is_expected(said, exercise):
    assert said(exercise, DOTS[exercise]) == f"{exercise}  to do: {exercises.CHECKS[exercise][0]}"


@pytest.mark.parametrize("exercise", RIGHT)
def test_the_solution_is_right(said, exercise):
    assert said(exercise, RIGHT[exercise]).startswith(f"{exercise}  right: ")


@pytest.mark.parametrize("exercise", ["03.3", "03.4"])
def test_half_done_is_named_and_not_wrong(said, exercise):
    first, *others = RIGHT[exercise]
    half = DOTS[exercise] | {first: RIGHT[exercise][first]}
    assert said(exercise, half) == f"{exercise}  to do: {', '.join(others)} still to be filled in."


def test_labels_may_be_a_tensor_or_an_array(said):
    import numpy as np
    import torch

    for kind in (np.array, torch.tensor, tuple):
        assert "03.1  right" in said("03.1", lambda *row, kind=kind: kind(right(*row)))


def pad_hidden(ids, prompt_length, length):
    return [-100 if t < prompt_length or i == 2 else i for t, i in enumerate(ids)]


def shifted(ids, prompt_length, length):
    return [*right(ids, prompt_length, length)[1:], -100]


def padding_judged(ids, prompt_length, length):
    return [-100] * prompt_length + ids[prompt_length:]


def prompt_judged(ids, prompt_length, length):
    return ids[:length] + [-100] * (len(ids) - length)


def cut(ids, prompt_length, length):
    return right(ids, prompt_length, length)[prompt_length:]


@pytest.mark.parametrize(
    ("function", "hint"),
    [
        (pad_hidden, "the end of the answer is hidden"),
        (shifted, "shifted by one"),
        (lambda *row: right(*row)[1:], "shifted by one"),
        (padding_judged, "padding is judged"),
        (prompt_judged, "the prompt is judged"),
        (cut, "labels, not"),
        (lambda ids, prompt_length, length: ids, "padding is judged"),
        (lambda ids: ids, "could not use your answer"),
        (lambda *row: None, "could not use your answer"),
    ],
)
def test_wrong_labels(said, function, hint):
    answer = said("03.1", function)
    assert answer.startswith("03.1  not yet: ") and hint in answer


def test_any_rounding_of_the_right_loss_is_right(said):
    for value in (0.44, 44 / 100, "0.44", 0.4400001):
        assert "03.2  right" in said("03.2", value)


@pytest.mark.parametrize(
    ("value", "hint"), [(0.725, "mean of the four means"), (44, "sum over all"), (2.9, "sum of the means"), (0.5, "")]
)
def test_wrong_losses(said, value, hint):
    answer = said("03.2", value)
    assert answer.startswith("03.2  not yet: ") and hint in answer


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"ends": 8}, "these are evaluations"),
        ({"ends": 300}, "starts again"),
        ({"ends": 450}, "without the threshold"),
        ({"kept": 250}, "lowest loss so far"),
        ({"kept": 450}, "never made"),
        ({"ends": "400"}, "count again"),
    ],
)
def test_wrong_stops(said, change, hint):
    answer = said("03.3", RIGHT["03.3"] | change)
    assert answer.startswith("03.3  not yet: ") and hint in answer


def test_the_callback_of_transformers_stops_where_the_exercise_says():
    from types import SimpleNamespace

    from transformers import EarlyStoppingCallback, TrainerControl, TrainerState

    told, state, control = EarlyStoppingCallback(3, 0.02), TrainerState(), TrainerControl()
    args = SimpleNamespace(metric_for_best_model="loss", greater_is_better=False)
    for n, loss in enumerate([1.10, 0.80, 0.70, 0.69, 0.66, 0.65, 0.645, 0.64, 0.60], 1):
        told.on_evaluate(args, state, control, metrics={"eval_loss": loss})
        if state.best_metric is None or loss < state.best_metric:
            state.best_metric, best = loss, n
        if control.should_training_stop:
            break
    assert {"ends": 50 * n, "kept": 50 * best} == RIGHT["03.3"]


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"a": "healthy"}, "a (is the held-out"),
        ({"b": "weights frozen"}, "b (what happened"),
        ({"c": "healthy"}, "c (compare"),
        ({"d": "too many epochs"}, "d (do both"),
        ({"d": "fine"}, "'fine' is none of the four"),
    ],
)
def test_wrong_diagnoses(said, change, hint):
    answer = said("03.4", RIGHT["03.4"] | change)
    assert answer.startswith("03.4  not yet: ") and hint in answer


def test_spelling_of_a_diagnosis_is_no_trap(said):
    assert "03.4  right" in said("03.4", RIGHT["03.4"] | {"a": " Weights  FROZEN "})
