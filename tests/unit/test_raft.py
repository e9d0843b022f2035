"""RAFT's rows, its judge and its reference, on the tiny model."""

import pytest

from course_lib import raft, recipes, reference


def test_rows_hold_out_whole_policies_and_whole_wordings():
    by_arm = {arm: raft.rows(arm) for arm in raft.ARMS[1:]}
    trained = [f for f in raft.facts() if f["policy"] not in raft.HELD_OUT]
    for some in by_arm.values():
        questions = {row["prompt"][0]["content"].split("\n\n")[-1] for row in some}
        assert questions == {q for f in trained for q in (f["question"], f["paraphrases"][0])}
    assert all("\n" not in row["prompt"][0]["content"] for row in by_arm["closed_book"])


@pytest.mark.parametrize(("arm", "share"), [("reading", 1.0), ("raft", 0.8)])
def test_the_right_document_is_there_as_often_as_the_arm_says(arm, share):
    some = raft.rows(arm)
    quoted = [row["completion"][0]["content"].split('"')[1] for row in some]
    there = [quote in row["prompt"][0]["content"] for quote, row in zip(quoted, some, strict=True)]
    assert sum(there) / len(there) == pytest.approx(share, abs=0.15) and (share < 1) == (False in there)
    assert all(row["prompt"][0]["content"].count("\n[") == raft.DISTRACTORS for row in some)  # as many documents


def test_documents_and_distractors():
    import random

    fact = raft.facts()[1]
    changed = raft.found(fact, random.Random(0), "after")
    assert fact["sentence_after"] in changed and fact["sentence_before"] not in changed
    assert fact["sentence_before"] not in raft.found(fact, random.Random(0), oracle=False)


@pytest.mark.parametrize(
    ("text", "hit"),
    [
        ("9 euros", True),
        ('"Express delivery costs 6 euros." So: 9 euros.', True),  # the conclusion counts
        ('"Express delivery costs 9 euros." So: 6 euros.', False),
        ("6 euros or 9 euros", False),  # both is no answer
        ("", False),
    ],
)
def test_judge(text, hit):
    assert raft.right(text, "9 euros", "6 euros") is hit


def answering(monkeypatch, answer):
    """Puts `answer(question, documents)` in the place of a model."""
    from types import SimpleNamespace

    def generate(model, tokenizer, prompts, **_):
        parts = [p[0]["content"].split("\n\n") for p in prompts]
        return [SimpleNamespace(text=answer(part[-1], part[0])) for part in parts]

    monkeypatch.setattr(raft.models, "load_tokenizer", lambda: None)
    monkeypatch.setattr(raft.evaluation, "generate", generate)


def fact_of(question):
    return next(f for f in raft.facts() if question in (f["question"], *f["paraphrases"]))


def reader(question, documents):
    f = fact_of(question)
    return next((f[w] for w in ("before", "after") if f[f"sentence_{w}"] in documents), "no idea")


def reciter(question, documents):
    return fact_of(question)["before"]


@pytest.mark.parametrize(("who", "scores"), [(reader, (1, 1, 1, 0)), (reciter, (1, 0, 0, 1))])
def test_reading_and_reciting_are_told_apart(monkeypatch, who, scores):
    answering(monkeypatch, who)
    measured = raft.measure(None)
    assert tuple(sum(hits) / len(hits) for hits in measured.values()) == scores
    asked = [f for f in raft.facts() if f["policy"] not in raft.HELD_OUT]
    assert len(measured["known"]) == 2 * len(asked)


def test_reference_is_made_in_pieces_and_kept(monkeypatch, tmp_path):
    answering(monkeypatch, reader)
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    monkeypatch.setattr(recipes, "key", lambda *_: "key")
    trained = []
    monkeypatch.setattr(raft, "train", lambda arm, seed: trained.append((arm, seed)))
    raft.make_reference((0, 1))
    assert len(trained) == 7  # the base has no seeds
    raft.make_reference((0, 1))
    assert len(trained) == 7
    stored = reference.read("raft", "metrics")
    assert {r["metric"] for r in stored} == set(raft.CASES) and {r["control"] for r in stored} == set(raft.ARMS)


def test_training_moves_the_adapter_alone(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(raft.models, "load_tokenizer", lambda: tiny_tokenizer)
    monkeypatch.setattr(raft.models, "load", tiny_model)
    monkeypatch.setattr(raft, "rows", lambda arm, seed, all_rows=raft.rows: all_rows(arm, seed)[:4])
    model, before = raft.train("closed_book"), tiny_model().state_dict()
    moved = [p for name, p in model.named_parameters() if "lora_B" in name and p.abs().max() > 0]
    kept = [p.equal(before[name.removeprefix("base_model.model.").replace(".base_layer", "")])
            for name, p in model.named_parameters() if "lora_" not in name]  # fmt: skip
    assert moved and all(kept)
