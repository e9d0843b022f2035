"""Training by hand: what the loss looks at, batches, the loop, the optimizers."""

import math

import pytest

from course_lib import training

ROWS = [
    {"prompt": [{"role": "user", "content": "a long question"}], "completion": [{"role": "assistant", "content": "b"}]},
    {"text": "plain"},
]


def test_the_loss_looks_at_the_completion_and_its_end(tiny_tokenizer):
    (ids, labels), (text, all_of_it) = training.encode(tiny_tokenizer, ROWS)
    judged = [i for i, label in zip(ids, labels, strict=True) if label != training.IGNORED]
    assert tiny_tokenizer.decode(judged) == "b<|im_end|>\n" and ids[-len(judged) :] == judged
    assert text == all_of_it and tiny_tokenizer.decode(text) == "plain"


def test_padding_is_ignored(tiny_model, tiny_tokenizer):
    pairs, model = training.encode(tiny_tokenizer, ROWS), tiny_model()
    batch = training.collate(pairs, tiny_tokenizer.pad_token_id)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    alone = [training.loss(model, training.collate([pair], 0)).item() for pair in pairs]
    judged = [sum(label != training.IGNORED for label in labels[1:]) for _, labels in pairs]
    mean = sum(a * n for a, n in zip(alone, judged, strict=True)) / sum(judged)
    assert math.isclose(training.loss(model, batch).item(), mean, rel_tol=1e-5)


def test_batches_use_every_row_before_any_again(tiny_tokenizer):
    rows = [{"text": f"number {i}"} for i in range(5)]
    made = training.batches(tiny_tokenizer, rows, size=2, steps=5, seed=1)
    texts = [tiny_tokenizer.decode(ids) for batch in made for ids in batch["input_ids"]]
    assert len(made) == 5 and sorted(texts[:5]) == sorted(texts[5:]) == [row["text"] for row in rows]
    again = training.batches(tiny_tokenizer, rows, size=2, steps=5, seed=1)
    assert all((a["input_ids"] == b["input_ids"]).all() for a, b in zip(made, again, strict=True))


@pytest.mark.parametrize("name", training.OPTIMIZERS)
def test_every_optimizer_moves_all_weights_and_learns(name, tiny_model, tiny_tokenizer):
    import torch

    model = tiny_model()
    before = [p.detach().clone() for p in model.parameters()]
    batches = training.batches(tiny_tokenizer, ROWS[1:], size=1, steps=12)
    log = training.loop(model, batches, training.optimizers(name, model, 1e-2), clip=None)
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert log[-1][0] < log[0][0] and all(norm > 0 for _, norm in log) and not model.training


def test_an_optimizer_that_does_not_exist_is_refused(tiny_model):
    with pytest.raises(ValueError, match="no optimizer 'adam': choose one of adamw, muon"):
        training.optimizers("adam", tiny_model(), 1e-3)


def test_the_schedule_scales_the_rate(tiny_model, tiny_tokenizer):
    import torch

    model = tiny_model()
    before = [p.detach().clone() for p in model.parameters()]
    batches = training.batches(tiny_tokenizer, ROWS, size=1, steps=2)
    training.loop(model, batches, training.optimizers("adamw", model, 1e-2), schedule=lambda step: 0.0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_the_penalty_is_nought_at_the_reference_and_grows_away_from_it(tiny_model, tiny_tokenizer):
    import torch

    model, reference = tiny_model(), tiny_model()
    (batch,) = training.batches(tiny_tokenizer, ROWS, size=2, steps=1)
    penalty = training.kl_penalty(reference, 1.0)
    assert abs(penalty(model, batch).item()) < 1e-6
    with torch.no_grad():
        model.lm_head.weight.add_(0.05 * torch.randn_like(model.lm_head.weight))
    one, two = penalty(model, batch).item(), training.kl_penalty(reference, 2.0)(model, batch).item()
    assert one > 0 and math.isclose(two, 2 * one, rel_tol=1e-5)


@pytest.mark.parametrize("name", ["cosine", "warmup_stable_decay"])
def test_schedules_are_those_of_transformers(name):
    import torch
    from transformers import get_scheduler

    steps, up, down = 100, 5, 20
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    extra = {"scheduler_specific_kwargs": {"num_decay_steps": down, "decay_type": "linear"}} if name[0] == "w" else {}
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=up, num_training_steps=steps, **extra)
    factor = training.cosine(steps) if name == "cosine" else training.wsd(steps)
    for step in range(steps):
        assert math.isclose(scheduler.get_last_lr()[0], factor(step), abs_tol=1e-9), step
        optimizer.step()
        scheduler.step()
