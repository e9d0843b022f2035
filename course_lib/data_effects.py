"""What a flaw or an addition in the training data does: short trainings in which one share is changed.

Lesson 02 runs a few of these live; `make reference LESSON=02` measures all of `SWEEPS` and stores them.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np

from course_lib import evaluation, general, models, preferences, recipes, tickets

FIRST = 1000  # the recipe `ticket_lora` has seen the training tickets before this one
EVAL_TICKETS, EVAL_PROSE = 60, 30
SWEEPS = {
    "label_noise": (0.0, 0.1, 0.2, 0.4),  # share of records whose intent is wrong
    "masked_tokens": (0.0, 0.1, 0.2, 0.4),  # share of record tokens, the least expected ones, without a loss
    "general_share": (0.0, 0.05, 0.1, 0.25),  # share of examples that are general conversation
}
REFERENCE_TICKETS = 200


def with_noise(records: list[dict], share: float, rng: random.Random) -> list[dict]:
    """`records`, a `share` of them with another intent, and with the priority that follows from it."""
    records, wrong = list(records), rng.sample(range(len(records)), round(share * len(records)))
    for i in wrong:
        ticket = records[i]["ticket"]
        ticket = ticket | {"intent": rng.choice([name for name in tickets.INTENTS if name != ticket["intent"]])}
        fields = [ticket[name] for name in ("intent", "items", "due_date", "needs_human")]
        records[i] = records[i] | {"ticket": ticket | {"priority": tickets.priority(*fields)}}
    return records


def with_general(rows: list[dict], share: float, rng: random.Random) -> list[dict]:
    """As many rows as before, a `share` of them general conversation in place of tickets, shuffled."""
    others = recipes.rehearsal(round(share * len(rows)))
    mixed = [*others, *rows[: len(rows) - len(others)]]
    rng.shuffle(mixed)
    return mixed


def tokens(tokenizer, row: dict) -> tuple[list[int], list[int]]:
    """Tokens of the prompt and of the completion, end token included."""
    head = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    tail = tokenizer(row["completion"][0]["content"], add_special_tokens=False)["input_ids"]
    return tokenizer(head, add_special_tokens=False)["input_ids"], tail + [tokenizer.eos_token_id]


def token_losses(model, head: list[int], tail: list[int]) -> np.ndarray:
    """The loss of each token of `tail` after `head` and the tokens before it, in nats."""
    import torch

    ids = torch.tensor([head + tail], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, len(head) - 1 : -1].float()
        return torch.nn.functional.cross_entropy(logits, ids[0, len(head) :], reduction="none").cpu().numpy()


def with_mask(rows: list[dict], share: float, model, tokenizer) -> list[dict]:
    """`rows` as tokens and labels: the `share` of completion tokens that `model` expects least carry no loss."""
    parts = [tokens(tokenizer, row) for row in rows]
    losses = [token_losses(model, head, tail) for head, tail in parts]
    limit = np.quantile(np.concatenate(losses), 1 - share)
    return [
        {
            "input_ids": head + tail,
            "labels": [-100] * len(head) + [t if x <= limit else -100 for t, x in zip(tail, loss, strict=True)],
        }
        for (head, tail), loss in zip(parts, losses, strict=True)
    ]


def train(sweep: str, value: float, n: int, profile: str, seed: int):
    """The model after a short training on `n` tickets in which the share of `sweep` is `value`."""
    tokenizer, s = models.load_tokenizer(), recipes.settings("ticket_lora", profile)
    # Without a warm-up: of the few steps of a short run, its first would be taken at a learning rate of zero.
    s, rng = SimpleNamespace(**vars(s) | {"epochs": 1, "warmup": 0}), random.Random(f"{sweep} {seed}")
    records = tickets.load("train", FIRST + n)[FIRST:]
    if sweep == "label_noise":
        model = preferences.continued(recipes.adapter("ticket_lora", profile))
        rows = recipes.examples(with_noise(records, value, rng))
    else:
        rows, base = recipes.examples(records), models.load()
        if sweep == "masked_tokens":
            rows = with_mask(rows, value, base, tokenizer)
        elif sweep == "general_share":
            rows = with_general(rows, value, rng)
        else:
            raise ValueError(f"no sweep {sweep!r}: choose one of {', '.join(SWEEPS)}")
        model = recipes.add_lora(base, s)
    recipes.sft_trainer(model, tokenizer, rows, s, seed).train()
    return model.eval()


def measure(model, n_tickets: int = EVAL_TICKETS, n_prose: int = EVAL_PROSE) -> dict[str, np.ndarray]:
    """Loss in nats per token on right records of dev, and on prose that has nothing to do with tickets."""
    tokenizer = models.load_tokenizer()
    records = tickets.load("dev", n_tickets)
    right = [(tickets.messages(r), tickets.to_json(tickets.in_words(r))) for r in records]
    prose = [record["text"] for record in general.load("prose", n_prose)]
    ask = general.ask("Write a short text.")
    return {
        "ticket_nll": evaluation.completion_nll(model, tokenizer, right),
        "prose_nll": evaluation.completion_nll(model, tokenizer, [(ask, text) for text in prose]),
    }


def make_reference(seeds) -> None:
    """Measure every point of `SWEEPS` that is not stored yet, as `data_effects_metrics.csv`; about a minute each."""
    from course_lib import reference

    key = recipes.key("ticket_lora", "cpu", 0)
    about = reference._about(key)
    pieces = [(sweep, value, seed) for seed in seeds for sweep, values in SWEEPS.items() for value in values]
    for number, (sweep, value, seed) in enumerate(pieces, 1):
        common = {"profile": "cpu", "seed": seed, "control": "", "sweep": sweep, "share": value}
        wanted = {column: str(x) for column, x in (common | {"key": key}).items()}
        stored = any(all(r[c] == x for c, x in wanted.items()) for r in reference.read("data_effects", "metrics"))
        print(
            f"{sweep} {value}, seed {seed} ({number}/{len(pieces)}): {'stored' if stored else 'training'}", flush=True
        )
        if not stored:
            measured = measure(train(sweep, value, REFERENCE_TICKETS, "cpu", seed))
            rows = [
                common | {"metric": m, "value": f"{x.mean():.4f}", "n": len(x)} | about for m, x in measured.items()
            ]
            reference._replace("data_effects", "metrics", common, rows)
