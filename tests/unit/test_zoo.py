"""The short runs of lesson 04: every method starts as the base, trains only what it adds, and is measured with it."""

import pytest

from course_lib import models, reference, tickets, training, zoo

RECORD = {
    "id": "dev-1",
    "received": "2026-01-05",
    "text": "Two lamps by Friday.",
    "due_phrase": None,
    "ticket": {
        "intent": "buy",
        "items": [{"product": "lamp", "quantity": 2}],
        "order_id": None,
        "due_date": None,
        "needs_human": False,
        "priority": "high",
    },
}
FIRST = {zoo.settings(name).method: name for name in zoo.ZOO} | {"lora": "the recipe"}
IN_WEIGHTS = [method for method in FIRST if method not in ("prefix", "prompt")]


@pytest.fixture
def settings(monkeypatch):
    """Small enough for the tiny model, which has 64 inputs a layer."""
    monkeypatch.setattr(zoo, "CENTRE", zoo.CENTRE | {"rank": 4, "alpha": 8})
    return lambda method: zoo.settings(FIRST[method])


def logits(model):
    import torch

    with torch.no_grad():
        return model(input_ids=torch.arange(3, 23)[None], use_cache=False).logits


@pytest.mark.parametrize("method", IN_WEIGHTS)
def test_a_method_starts_as_the_base(tiny_model, settings, method):
    import torch

    base = logits(tiny_model())
    adapted = logits(zoo.adapt(tiny_model(), settings(method)).eval())
    assert torch.allclose(adapted, base, atol=1e-4 * base.abs().max().item())


@pytest.mark.parametrize("method", FIRST)
def test_only_what_is_added_is_trained(tiny_model, settings, method):
    base = tiny_model()
    known = {p.data_ptr() for p in base.parameters()}
    trained = [p for p in zoo.adapt(base, settings(method)).parameters() if p.requires_grad]
    assert trained and not known & {p.data_ptr() for p in trained}


@pytest.mark.parametrize("method", FIRST)
def test_a_short_run_moves_the_loss_of_every_method(tiny_model, tiny_tokenizer, settings, monkeypatch, method):
    """Also of prompts and prefixes, which live in no weight: the loss is taken through them."""
    monkeypatch.setattr(models, "load", lambda dtype=None: tiny_model())
    monkeypatch.setattr(models, "load_tokenizer", lambda: tiny_tokenizer)
    monkeypatch.setattr(tickets, "load", lambda split, n: [RECORD] * min(n, 8))
    found = zoo.short_run(FIRST[method], steps=2, measure_at=(1, 2), held_out=2)
    assert found["trainable"] > 0 and set(found["nll"]) == {1, 2}
    assert len(found["nll"][1]) == 2 and (found["nll"][1] != found["nll"][2]).all()


def test_the_loss_of_a_record_is_the_models_own(tiny_model, tiny_tokenizer):
    from course_lib import recipes

    longer = RECORD | {"text": RECORD["text"] * 3}
    found = zoo.held_out_nll(tiny_model(), tiny_tokenizer, [RECORD, longer])
    for record, nll in zip((RECORD, longer), found, strict=True):
        batch = training.collate(training.encode(tiny_tokenizer, recipes.examples([record])), 0)
        assert tiny_model()(**batch).loss.item() == pytest.approx(nll, rel=1e-4)


def test_an_unknown_method_is_refused():
    from types import SimpleNamespace

    with pytest.raises(ValueError, match="no method 'lroa'"):
        zoo.config(SimpleNamespace(method="lroa", alpha=8, targets="all-linear"))


def test_the_sweep_is_stored_piece_by_piece(tmp_path, monkeypatch, capsys):
    import numpy as np

    done = []

    def short_run(name, seed, measure_at):
        done.append((name, seed))
        return {"trainable": 5, "nll": {step: np.array([1.0, 2.0]) for step in measure_at}}

    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    monkeypatch.setattr(zoo, "short_run", short_run)
    reference.adapter_sweep([0, 1])
    assert len(done) == 2 * (len(zoo.KNOBS) + len(zoo.ZOO))
    rows = reference.read("adapter_sweep", "metrics")
    assert len(rows) == 2 * len(done) and {row["step"] for row in rows} == {str(zoo.EARLY), str(zoo.STEPS)}
    assert all(row[column] for row in rows for column in reference.PROVENANCE)
    reference.adapter_sweep([0, 1])
    assert len(done) == len(rows) / 2 and "stored" in capsys.readouterr().out
