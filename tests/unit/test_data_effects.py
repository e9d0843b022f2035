"""The changes that lesson 02 makes to training data: how many rows they touch, and nothing else."""

import random

import numpy as np
import pytest

from course_lib import data_effects, recipes, tickets

RECORDS = tickets.load("train", 40)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_noise_changes_that_share_of_intents(share):
    noisy = data_effects.with_noise(RECORDS, share, random.Random(3))
    changed = [i for i, (a, b) in enumerate(zip(RECORDS, noisy, strict=True)) if a != b]
    assert len(changed) == round(share * 40)
    for i in changed:
        a, b = RECORDS[i]["ticket"], noisy[i]["ticket"]
        assert a["intent"] != b["intent"] and {f: a[f] for f in ("items", "order_id")} == {
            f: b[f] for f in ("items", "order_id")
        }
        assert b["priority"] == tickets.priority(b["intent"], b["items"], b["due_date"], b["needs_human"])
    assert tickets.load("train", 40) == RECORDS


def test_general_rows_take_the_place_of_tickets():
    rows = recipes.examples(RECORDS)
    mixed = data_effects.with_general(rows, 0.25, random.Random(3))
    assert len(mixed) == 40 and sum(row not in rows for row in mixed) == 10
    assert all(list(row) == ["prompt", "completion"] for row in mixed)
    assert sorted(map(str, data_effects.with_general(rows, 0, random.Random(3)))) == sorted(map(str, rows))


def test_masks_take_the_least_expected_tokens(tiny_model, tiny_tokenizer):
    model, rows = tiny_model(), recipes.examples([r for r in RECORDS if len(r["text"]) < 120][:3])
    whole = data_effects.with_mask(rows, 0.0, model, tiny_tokenizer)
    half = data_effects.with_mask(rows, 0.5, model, tiny_tokenizer)
    for a, b, row in zip(whole, half, rows, strict=True):
        head, tail = data_effects.tokens(tiny_tokenizer, row)
        loss = data_effects.token_losses(model, head, tail)
        assert a["input_ids"] == b["input_ids"] == head + tail
        assert a["labels"] == [-100] * len(head) + tail
        kept = np.array(b["labels"][len(head) :]) != -100
        assert loss[kept].max() <= loss[~kept].min()
    counts = [sum(label != -100 for row in rows for label in row["labels"]) for rows in (whole, half)]
    assert counts[1] == pytest.approx(counts[0] / 2, abs=2)


def test_an_unknown_sweep_is_named(monkeypatch, tiny_model, tiny_tokenizer):
    monkeypatch.setattr(data_effects.models, "load_tokenizer", lambda: tiny_tokenizer)
    monkeypatch.setattr(data_effects.models, "load", tiny_model)
    with pytest.raises(ValueError, match="label_noise, masked_tokens, general_share"):
        data_effects.train("colour", 0.1, 2, "ci", 0)


def test_the_reference_measures_what_is_missing(monkeypatch, tmp_path):
    from course_lib import reference

    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    monkeypatch.setattr(data_effects, "SWEEPS", {"label_noise": (0.0, 0.4)})
    trained = []
    monkeypatch.setattr(data_effects, "train", lambda *args: trained.append(args))
    monkeypatch.setattr(data_effects, "measure", lambda model: {"ticket_nll": np.array([0.1, 0.3])})
    data_effects.make_reference((0, 1))
    data_effects.make_reference((0, 1))
    rows = reference.read("data_effects", "metrics")
    assert len(trained) == len(rows) == 4
    assert {(r["share"], r["seed"], r["value"], r["n"]) for r in rows} == {
        (share, seed, "0.2000", "2") for share in ("0.0", "0.4") for seed in "01"
    }
    assert set(reference.PROVENANCE) <= set(rows[0])
