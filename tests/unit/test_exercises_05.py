import pytest

from course_lib import exercises, memory

CHANGES = {"a": "checkpointing", "b": "four bits", "c": "an adapter"}


def said(capsys, exercise, answer):
    exercises.check(exercise, answer)
    return capsys.readouterr().out.strip()


def untouched(*_, **__):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("exercise", "dots"), [("05.1", untouched), ("05.2", dict.fromkeys(CHANGES, ...)), ("05.3", untouched)]
)
def test_untouched_says_what_is_expected(capsys, exercise, dots):
    assert said(capsys, exercise, dots) == f"{exercise}  to do: {exercises.CHECKS[exercise][0]}"


# --- 05.1 ------------------------------------------------------------------------------------------------------------


def solution(block, group=None):
    scale = 32 if group is None else 8 + 32 / group
    return 4 + scale / block


def by_counting(block, group=None):
    weights = block * (group or 1)
    total = 4 * weights + (32 if group is None else 8 * group + 32)
    return total / weights


@pytest.mark.parametrize("answer", [solution, by_counting])
def test_right_bits(capsys, answer):
    assert said(capsys, "05.1", answer).startswith("05.1  right: ")


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda block, group=None: solution(block, group) / 8, "bytes"),
        (lambda block, group=None: solution(block, group) - 4, "four bits"),
        (lambda block, group=None: 4 + (32 if group is None else 8) / block, "second scale is missing"),
        (lambda block, group=None: solution(block) if group is None else 4 + 8 / block + 32 / group, "of scales"),
        (lambda block, group=None: 4 + (32 if group is None else 40) / block, "whole group"),
        (lambda block, group=None: 4 + 32 / block, "eight bits"),
        (lambda block, group=None: 4.7, "is not the count"),
        (lambda block: 4 + 32 / block, "could not use your answer"),
    ],
)
def test_wrong_bits(capsys, answer, hint):
    found = said(capsys, "05.1", answer)
    assert found.startswith("05.1  not yet: ") and hint in found


# --- 05.2 ------------------------------------------------------------------------------------------------------------

RUNS = {
    "a": ("Qwen2.5-3B", {"method": "lora", "batch": 8, "length": 1024, "checkpointing": False}),
    "b": ("Llama-3.1-8B", {"method": "lora", "batch": 1, "length": 512}),
    "c": ("SmolLM2-1.7B", {"method": "full", "batch": 1, "length": 512}),
}


@pytest.mark.parametrize("run", RUNS)
def test_one_change_alone_makes_it_fit(run):
    """The planner itself says so: the run does not fit, the right change makes it fit, and no other one does."""
    name, how = RUNS[run]
    limit, shape = memory.GPUS["t4"], memory.shape(name)
    assert memory.plan(shape, **how).total > limit
    changes = {
        "checkpointing": {"checkpointing": True},
        "8-bit optimizer": {"optimizer": "adamw_8bit"},
        "four bits": {"method": "qlora"} if how["method"] == "lora" else {},
        "an adapter": {"method": "lora"},
    }
    fitting = [change for change, new in changes.items() if memory.plan(shape, **how | new).total <= limit]
    assert fitting == [CHANGES[run]]


def test_right_changes(capsys):
    assert said(capsys, "05.2", CHANGES).startswith("05.2  right: ")


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"a": "four bits"}, "a (the frozen weights are not"),
        ({"b": "8-bit optimizer"}, "b (the frozen weights alone"),
        ({"c": "8-bit optimizer"}, "still too much"),
        ({"c": "four bits"}, "cannot be a code"),
        ({"a": "an adapter"}, "there already"),
        ({"a": "pray"}, "none of the four"),
    ],
)
def test_wrong_changes(capsys, change, hint):
    found = said(capsys, "05.2", CHANGES | change)
    assert found.startswith("05.2  not yet: ") and hint in found


# --- 05.3 ------------------------------------------------------------------------------------------------------------


def merged(packed, state, A, B, alpha, r):
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed, state).float() + alpha / r * (B.float() @ A.float())


def rounded_again(packed, state, A, B, alpha, r):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(*quantize_4bit(merged(packed, state, A, B, alpha, r), quant_type="nf4"))


def test_the_right_merge(capsys):
    assert said(capsys, "05.3", merged).startswith("05.3  right: ")


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (rounded_again, "four bits again"),
        (lambda packed, state, A, B, alpha, r: merged(packed, state, A, B, 1, 1), "alpha / r is missing"),
        (lambda packed, state, A, B, alpha, r: merged(packed, state, A, B, alpha, 1), "not alpha."),
        (lambda packed, state, A, B, alpha, r: merged(packed, state, A, B, r, alpha), "not r / alpha"),
        (lambda packed, state, A, B, alpha, r: merged(packed, state, A, B, 0, 1), "without the update"),
        (lambda packed, state, A, B, alpha, r: alpha / r * B @ A, "update alone"),
        (lambda packed, state, A, B, alpha, r: merged(packed, state, A, B, alpha, r).bfloat16(), "bfloat16"),
        (lambda packed, state, A, B, alpha, r: merged(packed, state, A, B, alpha, r).T, "yours is"),
        (lambda packed, state, A, B, alpha, r: packed + B @ A, "could not use your answer"),
    ],
)
def test_wrong_merges(capsys, answer, hint):
    found = said(capsys, "05.3", answer)
    assert found.startswith("05.3  not yet: ") and hint in found
