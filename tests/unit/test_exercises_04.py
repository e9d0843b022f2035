import math

import pytest

from course_lib import exercises

WIDTH, KV, INNER, BLOCKS = 2048, 512, 8192, 24
SHAPES = {
    "q_proj": (WIDTH, WIDTH),
    "k_proj": (WIDTH, KV),
    "v_proj": (WIDTH, KV),
    "o_proj": (WIDTH, WIDTH),
    "gate_proj": (WIDTH, INNER),
    "up_proj": (WIDTH, INNER),
    "down_proj": (INNER, WIDTH),
}
INTERVALS = {"a": "better", "b": "cannot tell", "c": "no large difference", "d": "worse"}


def untouched(*_, **__):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("exercise", "dots"), [("04.1", untouched), ("04.2", untouched), ("04.3", dict.fromkeys(INTERVALS, ...))]
)
def test_untouched_says_what_is_expected(said, exercise, dots):
    assert said(exercise, dots) == f"{exercise}  to do: {exercises.CHECKS[exercise][0]}"


# --- 04.1 ------------------------------------------------------------------------------------------------------------


def solution(targets, r, dora=False):
    return BLOCKS * sum(r * sum(SHAPES[t]) + dora * SHAPES[t][1] for t in targets)


def spelled_out(targets, r, dora=False):
    total = 0
    for _ in range(BLOCKS):
        for t in targets:
            d_in, d_out = SHAPES[t]
            total += r * d_in + d_out * r
            if dora:
                total += d_out
    return total


@pytest.mark.parametrize("answer", [solution, spelled_out])
def test_right_counts(said, answer):
    assert said("04.1", answer).startswith("04.1  right: ")


def test_the_solution_is_what_peft_counts():
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": BLOCKS, "vocab_size": 128}
    for dora in (False, True):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads))
        model = get_peft_model(model, LoraConfig(r=16, target_modules=list(SHAPES), use_dora=dora))
        assert model.get_nb_trainable_parameters()[0] == solution(SHAPES, 16, dora)


def wide_keys(targets, r, dora=False):
    full = SHAPES | {"k_proj": (WIDTH, WIDTH), "v_proj": (WIDTH, WIDTH)}
    return BLOCKS * sum(r * sum(full[t]) + dora * full[t][1] for t in targets)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda targets, r, dora=False: solution(targets, r, dora) // BLOCKS, "one block"),
        (wide_keys, "width of 512"),
        (lambda targets, r, dora=False: solution(targets, r), "lengths are missing"),
        (
            lambda targets, r, dora=False: BLOCKS * sum(r * sum(SHAPES[t]) + dora * SHAPES[t][0] for t in targets),
            "one output",
        ),
        (lambda targets, r, dora=False: BLOCKS * sum(r * math.prod(SHAPES[t]) for t in targets), "added"),
        (lambda targets, r, dora=False: BLOCKS * sum(math.prod(SHAPES[t]) for t in targets), "frozen matrix"),
        (lambda targets, r, dora=False: 7, "7 is not the count"),
        (lambda targets, r, dora=False: None, "None is not the count"),
        (lambda targets, r: 0, "could not use your answer"),
        (1234, "could not use your answer"),
    ],
)
def test_wrong_counts(said, answer, hint):
    found = said("04.1", answer)
    assert found.startswith("04.1  not yet: ") and hint in found


# --- 04.2 ------------------------------------------------------------------------------------------------------------


def cross(W, A, B):
    return ((W @ A.T) * B).sum(dim=1)


def square(A, B):
    return ((B @ (A @ A.T)) * B).sum(dim=1)


def thin(W, A, B, s):
    return (W.norm(dim=1) ** 2 + 2 * s * cross(W, A, B) + s**2 * square(A, B)).sqrt()


def row_by_row(W, A, B, s):
    return [(w + s * (b @ A)).norm() for w, b in zip(W, B, strict=True)]


def einsum(W, A, B, s):
    import torch

    middle = torch.einsum("oi,ri,or->o", W, A, B)
    last = torch.einsum("or,rq,oq->o", B, A @ A.T, B)
    return torch.sqrt(torch.linalg.vector_norm(W, dim=1).square() + 2 * s * middle + s * s * last)


@pytest.mark.parametrize("answer", [thin, row_by_row])
def test_right_lengths(said, answer):
    assert said("04.2", answer).startswith("04.2  right: ")


def test_right_values_by_einsum_are_never_called_wrong(said):
    assert "the values are others" not in said("04.2", einsum)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda W, A, B, s: (W + s * B @ A).norm(dim=1), "as large as W"),
        (
            lambda W, A, B, s: ((W * W).sum(1) + 2 * s * cross(W, A, B) + s**2 * square(A, B)).sqrt(),
            "as large as W",
        ),
        (lambda W, A, B, s: thin(W, A, B, s) ** 2, "root"),
        (lambda W, A, B, s: (W.norm(dim=1) ** 2 + s**2 * square(A, B)).sqrt(), "in the middle is missing"),
        (
            lambda W, A, B, s: (W.norm(dim=1) ** 2 + s * cross(W, A, B) + s**2 * square(A, B)).sqrt(),
            "counts twice",
        ),
        (
            lambda W, A, B, s: (W.norm(dim=1) ** 2 + 2 * s * cross(W, A, B) + s * square(A, B)).sqrt(),
            "squared in the last",
        ),
        (lambda W, A, B, s: W.norm(dim=1), "W alone"),
        (lambda W, A, B, s: W.norm(dim=0), "a row has one length"),
        (lambda W, A, B, s: A @ W, "could not use your answer"),
        (lambda W, A, B, s: W[:, 0], "the values are others"),
    ],
)
def test_wrong_lengths(said, answer, hint):
    found = said("04.2", answer)
    assert found.startswith("04.2  not yet: ") and hint in found


# --- 04.3 ------------------------------------------------------------------------------------------------------------


def test_right_readings(said):
    assert said("04.3", INTERVALS).startswith("04.3  right: ")
    assert said("04.3", INTERVALS | {"c": " No  large difference"}).startswith("04.3  right: ")


def test_half_read_is_named(said):
    assert said("04.3", dict.fromkeys(INTERVALS, ...) | {"a": "better"}) == (
        "04.3  to do: b, c, d still to be filled in."
    )


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"a": "cannot tell"}, "a (zero is outside"),
        ({"b": "better"}, "b (zero is inside"),
        ({"b": "no large difference"}, "far from it"),
        ({"c": "cannot tell"}, "nearer than two points"),
        ({"d": "better"}, "which side"),
        ({"d": None}, "which side"),
    ],
)
def test_wrong_readings(said, change, hint):
    found = said("04.3", INTERVALS | change)
    assert found.startswith("04.3  not yet: ") and hint in found
