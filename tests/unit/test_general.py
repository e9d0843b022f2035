"""General capability: items, scores and the one number that is called forgetting."""

import math

import pytest

from course_lib import evaluation, general


def test_prose_is_the_part_kept_for_evaluation():
    assert len(general.load("prose")) == 60 and {r["split"] for r in general.load("prose")} == {"eval"}
    assert [r["id"] for r in general.load("facts", 2)] == ["facts-001", "facts-002"]
    with pytest.raises(ValueError, match="no kind 'poems'.*facts, arithmetic, prose, instructions"):
        general.load("poems")


@pytest.mark.parametrize(
    ("kind", "value", "yes", "no"),
    [
        ("starts_with", "In short", " In short, lava.", "Lava, in short"),
        ("ends_with", "Done.", "Sky, sea. Done.\n", "Done. Sky"),
        ("contains_all", ["first", "then"], "First dig, then wait.", "First dig."),
        ("not_contains", ["very"], "Elephants are large.", "Very large."),
        ("max_words", 3, "a shelf of", "a shelf of books"),
        ("n_lines", 2, "one\ntwo\n", "one\n\ntwo"),
        ("uppercase", True, "WET FLOOR!", "Wet FLOOR"),
        ("uppercase", True, "NO", "123"),
        ("json_keys", ["animal", "legs"], '{"legs": 4, "animal": "horse"}', '{"legs": 4}'),
        ("json_keys", ["animal"], '{"animal": 1}', "animal"),
        ("json_keys", ["animal"], '{"animal": 1}', "[" * 9999),
    ],
)
def test_instructions_are_checked_by_a_program(kind, value, yes, no):
    check = {"kind": kind, "value": value}
    assert general.follows(check, yes) and not general.follows(check, no)


@pytest.mark.parametrize("record", general.load("instructions"), ids=lambda r: r["id"])
def test_every_instruction_has_a_check_and_silence_follows_none(record):
    assert not general.follows(record["check"], "  \n")
    general.follows(record["check"], "Some answer.")


def test_each_item_has_its_score(tiny_model, tiny_tokenizer):
    model = tiny_model()
    frame = general.general_capability(model, tiny_tokenizer, 3, general.KINDS)
    assert list(frame["kind"]) == [kind for kind in general.KINDS for _ in range(3)]
    assert set(frame[frame["kind"] == "facts"]["right"]) <= {0.0, 1.0}
    assert frame[frame["kind"] == "prose"]["right"].isna().all()
    assert frame[frame["kind"] == "instructions"]["nll"].isna().all()
    record = general.load("facts", 1)[0]
    pair = (general.ask(record["question"]), record["answer"])
    (alone,) = evaluation.completion_nll(model, tiny_tokenizer, [pair])
    assert math.isclose(frame["nll"][0], alone, rel_tol=1e-5)


def test_forgetting_is_of_prose_and_paired(tiny_model, tiny_tokenizer):
    before = general.general_capability(tiny_model(), tiny_tokenizer, 4)
    after = before.copy()
    after["nll"] += [5.0] * 8 + [0.1, 0.2, 0.3, 0.4]
    found = general.forgetting(before, after)
    assert found.n == 4 and math.isclose(found.value, 0.25) and 0.1 < found.low < found.high < 0.4
    with pytest.raises(ValueError, match="same items"):
        general.forgetting(before.iloc[:3], after)


def test_the_loss_of_a_text_is_that_of_the_model(tiny_model, tiny_tokenizer):
    import torch

    model, texts = tiny_model(), ["one text", "another, somewhat longer text"]
    found = evaluation.text_nll(model, tiny_tokenizer, texts)
    for text, nll in zip(texts, found, strict=True):
        ids = torch.tensor([tiny_tokenizer(text)["input_ids"]])
        with torch.no_grad():
            assert math.isclose(model(ids, labels=ids).loss.item(), nll, rel_tol=1e-4)
    with pytest.raises(ValueError, match="fewer than two tokens"):
        evaluation.text_nll(model, tiny_tokenizer, ["a"])
