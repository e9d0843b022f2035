"""The runs of GRPO beside the routing: prompts, verifiers, what is measured and kept. On the tiny model."""

import pytest

from course_lib import evaluation, grpo_runs, replies, routing


@pytest.mark.parametrize(
    ("text", "reward"), [("7", 1), ("It is 7.", 1), ("-7", 0), ("7 or 8", 0), ("7 7", 0), ("", 0), ("seven", 0)]
)
def test_one_number_is_the_right_one_alone(text, reward):
    assert grpo_runs.one_number(text, "7") == reward
    assert grpo_runs.one_number("9" * 5000, "7") == 0


def test_held_out_sums_are_in_no_training():
    pytest.importorskip("reasoning_gym")
    rows, held_out = grpo_runs.sums()
    asked = [row["prompt"][0]["content"] for row in rows + held_out]
    assert len(asked) == len(set(asked)) and len(held_out) == grpo_runs.HELD_OUT["puzzles"] < len(rows)
    assert all(grpo_runs.one_number(row["team"], row["team"]) for row in rows)


def test_the_rubric_is_lesson_06s():
    record, empty = replies.load("test", 1)[0], ""
    kept = replies.score(record, empty) / len(replies.CRITERIA)
    assert grpo_runs.rubric_share(empty, record["id"]) == kept < 1


@pytest.mark.parametrize("run", ["puzzles", "rubric"])
def test_a_run_asks_other_prompts_and_starts_elsewhere(run, monkeypatch, tiny_model, tiny_tokenizer):
    if run == "puzzles":
        pytest.importorskip("reasoning_gym")
    found = {}

    def trainer(model, tokenizer, rows, reward, s, seed, **_):
        found.update(rows=rows, s=s, model=model)
        return "trainer"

    monkeypatch.setattr(routing, "trainer", trainer)
    for module in (routing, grpo_runs):
        monkeypatch.setattr(module.models, "load_tokenizer", lambda: tiny_tokenizer)
    monkeypatch.setattr(routing.models, "load", tiny_model)
    monkeypatch.setattr(grpo_runs.preferences, "adapter", lambda *_: "reply_sft's")
    monkeypatch.setattr(grpo_runs.preferences, "continued", lambda folder, exact: (folder, exact))
    grpo_runs.prepare(run, 25)
    assert len(found["rows"]) == 25 * found["s"].prompts and not hasattr(found["s"], "start")
    assert found["model"] == ("reply_sft's", True) if run == "rubric" else "lora" in repr(found["model"]).lower()


def test_reference_is_made_in_pieces_and_kept(monkeypatch, tmp_path):
    from course_lib import reference

    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    monkeypatch.setattr(routing, "make_reference", lambda seeds: None)
    monkeypatch.setattr(routing, "key", lambda *_: "key")
    trained, e = [], {"right": evaluation.Estimate(0.5, 0.4, 0.6, 40)}
    monkeypatch.setattr(grpo_runs, "train", lambda run, steps, seed: trained.append(run) or (None, [0, 1], e, e))
    monkeypatch.setattr(grpo_runs, "prompted", lambda seed: trained.append("prompted") or {"3 solved": e["right"]})
    for _ in range(2):
        grpo_runs.make_reference((0, 1))
    assert trained == ["puzzles", "rubric", "prompted"]
    rows = [r for r in reference.read("grpo_runs", "metrics") if r["control"] != "prompted"]
    assert [(r["control"], r["moment"]) for r in rows] == [
        (run, m) for run in grpo_runs.RUNS for m in ("before", "after")
    ]
    assert [r["reward"] for r in reference.read("grpo_runs", "curves")] == ["0.0000", "1.0000"] * 2
    for kind in ("metrics", "curves"):
        assert all(row[column] for row in reference.read("grpo_runs", kind) for column in reference.PROVENANCE)


def test_solved_sums_stand_before_the_question_and_a_constant_is_counted(monkeypatch, tiny_model, tiny_tokenizer):
    pytest.importorskip("reasoning_gym")
    asked = []

    def sample(model, tokenizer, prompts, n, seed, new_tokens):
        asked.append(prompts)
        return [["7"] * n for _ in prompts]

    monkeypatch.setattr(routing, "sample", sample)
    monkeypatch.setattr(grpo_runs.models, "load_tokenizer", lambda: tiny_tokenizer)
    monkeypatch.setattr(grpo_runs.models, "load", tiny_model)
    found = grpo_runs.prompted()
    _, held_out = grpo_runs.sums()
    sevens = sum(row["team"] == "7" for row in held_out) / len(held_out)
    assert [len(prompts[0]) for prompts in asked] == [7, 17]  # three and eight solved ones, then the question
    assert all(prompt[-1:] == row["prompt"] for prompt, row in zip(asked[0], held_out, strict=True))
    assert [e.value for e in found.values()][:2] == pytest.approx([sevens, sevens])
    assert list(found.values())[-1].value < 0.2
