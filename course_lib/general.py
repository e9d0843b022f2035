"""What an adapted model must not forget: facts, sums, prose and instructions that have nothing to do with tickets.

Every score is kept item by item, so that two models are compared on the same items (`evaluation.paired_difference`).
"""

from __future__ import annotations

import json

from course_lib import evaluation, tickets

KINDS = ("facts", "arithmetic", "prose", "instructions")
QUICK = KINDS[:3]  # scored by reading alone, without generating


def load(kind: str, n: int | None = None) -> list[dict]:
    """The first `n` records of `data/general/<kind>.jsonl`; of prose, the part that is kept for evaluation."""
    if kind not in KINDS:
        raise ValueError(f"no kind {kind!r} of general items: choose one of {', '.join(KINDS)}")
    text = (tickets.DATA / "general" / f"{kind}.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    return [record for record in records if record.get("split", "eval") == "eval"][:n]


def ask(question: str) -> list[dict]:
    """A general question as a chat, without a system prompt of its own."""
    return [{"role": "user", "content": question}]


def general_capability(model, tokenizer, n: int, kinds=QUICK):
    """A data frame with one row for each of `n` items a kind: `id`, `kind`, `nll`, `right`.

    nll: loss on the reference text in nats per token (the answer of a fact or sum in a chat, the words of prose).
    right: of a fact or sum, whether its answer has a lower loss than each of three wrong ones; of an instruction,
    whether a program finds it followed. Missing (NaN) where a kind has no such score.
    """
    import pandas as pd

    rows = []
    for kind in kinds:
        records = load(kind, n)
        nll = right = [float("nan")] * len(records)
        if kind == "prose":
            nll = evaluation.text_nll(model, tokenizer, [record["text"] for record in records])
        elif kind == "instructions":
            answers = evaluation.generate(model, tokenizer, [ask(r["prompt"]) for r in records], max_new_tokens=80)
            right = [follows(r["check"], a.text) for r, a in zip(records, answers, strict=True)]
        else:
            pairs = [(ask(r["question"]), text) for r in records for text in (r["answer"], *r["wrong"])]
            table = evaluation.completion_nll(model, tokenizer, pairs).reshape(len(records), -1)
            nll, right = table[:, 0], table[:, 0] < table[:, 1:].min(axis=1)
        rows += [
            {"id": record["id"], "kind": kind, "nll": float(loss), "right": float(hit)}
            for record, loss, hit in zip(records, nll, right, strict=True)
        ]
    return pd.DataFrame(rows)


def forgetting(before, after, seed: int = 0) -> evaluation.Estimate:
    """By how much the loss on held-out prose rose from one model to another, in nats per token, with its interval.

    before, after: what `general_capability` returned for the same items. Prose alone counts: the loss on a short answer
    falls wherever training makes answers short, whatever becomes of the knowledge behind them.
    """
    if list(before["id"]) != list(after["id"]):
        raise ValueError("forgetting compares two models on the same items: measure both with the same n and kinds")
    prose = (frame.loc[frame["kind"] == "prose", "nll"] for frame in (after, before))
    return evaluation.paired_difference(*prose, seed)


def follows(check: dict, text: str) -> bool:
    """Whether an answer does what a program can check of an instruction. White space around it does not count."""
    text, value = text.strip(), check["value"]
    if not text:
        return False
    if check["kind"] == "json_keys":
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return False
        return isinstance(found, dict) and set(found) == set(value)
    rules = {
        "starts_with": lambda: text.startswith(value),
        "ends_with": lambda: text.endswith(value),
        "contains_all": lambda: all(word.lower() in text.lower() for word in value),
        "not_contains": lambda: not any(word.lower() in text.lower() for word in value),
        "max_words": lambda: len(text.split()) <= value,
        "n_lines": lambda: len(text.splitlines()) == value,
        "uppercase": lambda: text.upper() == text and text.lower() != text,
    }
    return rules[check["kind"]]()
