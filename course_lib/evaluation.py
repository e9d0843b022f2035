"""Measuring: batched generation, scores with intervals, paired comparison, loss on completions."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from course_lib import hardware

# --- generation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a model wrote. `text` is without the end token; `finished` is False where the token limit cut it off."""

    text: str
    finished: bool
    tokens: int
    prompt_tokens: int


@contextlib.contextmanager
def merged(model):
    """While inside, the adapter of a PEFT model is folded into the weights: the same answers, fewer multiplications.

    Weights in four bits are dequantised first and put back afterwards: PEFT's own merge would round the sum to four
    bits again, and with it the adapter. That takes the memory of a model in 16 bits. Nothing is folded where there is
    no adapter, where it is disabled, or where it is a prompt.
    """
    config = getattr(model, "active_peft_config", None)
    layers = [] if config is None or config.is_prompt_learning else _adapted_layers(model)
    if not layers or any(layer.disable_adapters for layer in layers):
        yield model
    elif any(hasattr(layer.get_base_layer().weight, "quant_state") for layer in layers):
        with _merged_in_full(layers):
            yield model
    else:
        kept = [(layer.get_base_layer(), layer.get_base_layer().weight.data.clone()) for layer in layers]
        model.merge_adapter()
        try:
            yield model
        finally:
            # Subtracting the adapter again would leave rounding in bfloat16 weights: the originals are put back.
            model.unmerge_adapter()
            for base, weight in kept:
                base.weight.data.copy_(weight)


@contextlib.contextmanager
def _merged_in_full(layers):
    """`merged` for layers over weights in four bits: each gets a 16-bit base with its LoRA added, for a while."""
    import torch
    from bitsandbytes.functional import dequantize_4bit

    if any(getattr(layer, "lora_variant", True) for layer in layers):  # no plain LoRA: left beside, slower and as right
        yield
        return
    kept = [(layer, layer.base_layer) for layer in layers]
    try:
        with torch.no_grad():
            for layer, base in kept:
                full = torch.nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
                state = getattr(base.weight, "quant_state", None)
                weight = base.weight.data if state is None else dequantize_4bit(base.weight.data, state)
                delta = sum(layer.get_delta_weight(name) for name in layer.active_adapters)
                full.weight = torch.nn.Parameter((weight.float() + delta.float()).to(weight.dtype), requires_grad=False)
                full.bias = base.bias
                layer.base_layer = full
                layer.merged_adapters.extend(layer.active_adapters)
        yield
    finally:
        for layer, base in kept:
            layer.base_layer = base
            layer.merged_adapters.clear()


def _adapted_layers(model):
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


class _Progress:
    """One line, rewritten, for what takes longer than two seconds."""

    def __init__(self, label: str, total: int):
        self.label, self.total, self.start, self.shown = label, total, time.monotonic(), False

    def update(self, done: int) -> None:
        if time.monotonic() - self.start > 2 and sys.stderr.isatty():
            print(f"\r{self.label}: {done}/{self.total}", end="", file=sys.stderr, flush=True)
            self.shown = True

    def close(self) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _shared(rows: list[list[int]]) -> int:
    """Length of the prefix that all prompts share; every prompt keeps at least one token of its own."""
    first, last = min(rows), max(rows)
    limit = min(min(len(r) for r in rows) - 1, len(first), len(last))
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def _read(model, cache, rows: list[list[int]], shared: int, batch_size: int = 20) -> None:
    """Put all tokens but the last of each row into `cache`: the `shared` ones, padding, and what is left of the row.

    What is shared is read once. The rows, longest first, are read a few at a time, each padded to its neighbours'
    length alone: a third less work than all of them together, and less memory.
    """
    import torch
    from transformers import DynamicCache

    known = DynamicCache()
    if shared:
        model(input_ids=torch.tensor([rows[0][:shared]]), past_key_values=known, use_cache=True)
    parts = []
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        part = DynamicCache()
        for i, layer in enumerate(known.layers):
            part.update(*(t.expand(len(some), -1, -1, -1) for t in (layer.keys, layer.values)), i)
        ids, mask = _padded([row[:-1] for row in some], shared, 0)
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
        if ids.shape[1] > shared:
            model(ids[:, shared:], attention_mask=mask, position_ids=places, past_key_values=part, use_cache=True)
        parts.append(part)
    width = len(rows[0]) - 1
    for i in range(model.config.num_hidden_layers):
        both = []
        for kind in ("keys", "values"):
            found = [getattr(part.layers[i], kind) for part in parts]
            whole = found[0].new_zeros(len(rows), found[0].shape[1], width, found[0].shape[3])
            for n, t in enumerate(found):
                here = whole[n * batch_size : n * batch_size + len(t)]
                here[:, :, :shared] = t[:, :, :shared]
                here[:, :, width - (t.shape[2] - shared) :] = t[:, :, shared:]
            both.append(whole)
        cache.update(*both, i)
        for part in parts:
            part.layers[i] = None  # a gigabyte is not kept twice


def _padded(rows: list[list[int]], shared: int, pad: int):
    """(ids, mask), tensors of (rows, longest): padding stands after the `shared` tokens, before the others."""
    import torch

    pads = [max(map(len, rows)) - len(row) for row in rows]
    ids = [row[:shared] + [pad] * n + row[shared:] for row, n in zip(rows, pads, strict=True)]
    mask = [[1] * shared + [0] * n + [1] * (len(row) - shared) for row, n in zip(rows, pads, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def _draw(temperature: float):
    """A logits processor that leaves one token of each row, drawn at `temperature`.

    It takes one random number a row, and finds the token at that height of the summed probabilities. PyTorch's
    `multinomial` takes one for each token of the vocabulary: a quarter of the time of a step.
    """
    import torch

    def leave_one(ids, scores):
        sums = torch.softmax(scores.float() / temperature, -1).cumsum(-1)
        at = torch.searchsorted(sums, torch.rand(len(sums), 1, device=sums.device) * sums[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, at.clamp(max=sums.shape[1] - 1), 0.0)

    return leave_one


def _thinning(write, cache, ids, mask, end: int, max_new_tokens: int) -> list[list[int]]:
    """New tokens of each row; what follows its first `end` is padding. Whenever a quarter of the rows has ended, the
    others go on without them: a batch is otherwise as slow as its longest answer, for every row."""
    import torch

    width, rows, found = ids.shape[1], list(range(len(ids))), {}

    def enough(ids, scores, **kwargs):
        ended = (ids[:, width:] == end).any(1)
        return torch.full_like(ended, bool(ended.float().mean() >= 0.25))

    while rows:
        left = width + max_new_tokens - ids.shape[1]
        ids = write(input_ids=ids, attention_mask=mask, max_new_tokens=left, stopping_criteria=[enough])
        mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1)
        over = (ids[:, width:] == end).any(1) | (ids.shape[1] == width + max_new_tokens)
        found |= {rows[i]: ids[i, width:].tolist() for i in over.nonzero()[:, 0]}
        rows = [rows[i] for i in (~over).nonzero()[:, 0]]
        ids, mask = ids[~over], mask[~over]
        for layer in cache.layers:
            layer.keys, layer.values, layer.batch_size = layer.keys[~over], layer.values[~over], len(rows)
    return [found[row] for row in sorted(found)]


def generate(
    model,
    tokenizer,
    prompts: Sequence[list[dict]],
    *,
    max_new_tokens: int = 96,
    batch_size: int = 60,
    processors=None,
    label: str = "generating",
    **sampling,
) -> list[Answer]:
    """Answers to chat prompts (lists of role/content), in the order given. Greedy unless `sampling` holds arguments of
    transformers' `generate`, such as `do_sample=True, temperature=0.7`.

    Prompts are sorted by length and padded on the left; generation stops at the end of turn, and on a CPU answers that
    have ended leave their batch; what all prompts share is read once; a PEFT adapter is merged meanwhile. `processors`:
    a function that gets the places in `prompts` of one batch and makes the list of logits processors for that batch.
    Source of the equality tests: `tests/unit/test_evaluation.py`.
    """
    import torch
    from transformers import StaticCache

    if not prompts:
        return []
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    limit = model.config.max_position_embeddings - max_new_tokens
    if (longest := max(map(len, rows))) > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the model's context of "
            f"{model.config.max_position_embeddings}: shorten the prompt"
        )
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    answers: list[Answer | None] = [None] * len(rows)
    progress = _Progress(label, len(rows))
    end = tokenizer.eos_token_id
    was_training = model.training
    model.eval()
    with torch.inference_mode(), merged(model):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        shared = _shared(rows) if base.device.type == "cpu" and len(rows) > 1 else 0
        shared = shared if shared >= 16 else 0
        pad = tokenizer.pad_token_id
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            some = [rows[i] for i in picked]
            ids, mask = (t.to(base.device) for t in _padded(some, shared, pad))
            width = ids.shape[1]
            extra = dict(sampling)
            if set(sampling) == {"do_sample", "temperature", "top_k"} and not sampling["top_k"]:
                extra = {"logits_processor": [_draw(sampling["temperature"])]}
            if processors is not None:
                extra["logits_processor"] = processors(picked) + extra.get("logits_processor", [])
            if base.device.type == "cpu":
                # Memory that is taken once: a cache that grows is copied whole for every new token, and each of its
                # lengths makes PyTorch prepare its matrix products anew. Half of a step is saved.
                cache = extra["past_key_values"] = StaticCache(base.config, max_cache_len=width + max_new_tokens)
                _read(base.model, cache, some, shared)
            write = functools.partial(
                base.generate, eos_token_id=end, pad_token_id=pad, **({"do_sample": False} | extra)
            )
            if base.device.type == "cpu" and processors is None:
                out = _thinning(write, cache, ids, mask, end, max_new_tokens)
            else:
                out = write(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens)[:, width:].tolist()
            for i, new in zip(picked, out, strict=True):
                finished = end in new
                if finished:
                    new = new[: new.index(end)]
                text = tokenizer.decode(new, skip_special_tokens=False)
                answers[i] = Answer(text, finished, len(new) + finished, len(rows[i]))
            progress.update(start + len(picked))
    progress.close()
    model.train(was_training)
    hardware.give_back_memory()
    return answers


# --- intervals and paired comparison ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n})"


_REPEATS = 4000


def proportion(hits: Sequence[bool]) -> Estimate:
    """Share of hits with Wilson's 95 % interval, which stays honest near 0 and 1 where the bootstrap's collapses."""
    n = len(hits)
    if n == 0:
        raise ValueError("no items: a proportion of nothing has no value")
    p, z = float(np.mean(hits)), 1.959964
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
    low, high = (0.0 if p == 0 else middle - half), (1.0 if p == 1 else middle + half)  # exact where rounding is not
    return Estimate(p, low, high, n)


def mean(values: Sequence[float], seed: int = 0) -> Estimate:
    """Mean with the percentile bootstrap's 95 % interval over items."""
    values = np.asarray(values, dtype=float)
    if values.size == 0:
        raise ValueError("no items: a mean of nothing has no value")
    picks = np.random.default_rng(seed).integers(0, values.size, (_REPEATS, values.size))
    low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high), int(values.size))


def paired_difference(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Estimate:
    """Mean of `a - b` over the same items, with the paired bootstrap's 95 % interval."""
    if len(a) != len(b):
        raise ValueError(f"paired comparison needs the same items on both sides: {len(a)} against {len(b)}")
    return mean(np.asarray(a, dtype=float) - np.asarray(b, dtype=float), seed)


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Two-sided p-value of the exact McNemar test: do two systems that answered the same items differ?

    Only items on which they disagree count; under no difference each side wins a coin toss (McNemar 1947).
    """
    if len(a) != len(b):
        raise ValueError(f"paired comparison needs the same items on both sides: {len(a)} against {len(b)}")
    from scipy.stats import binomtest

    only_a = sum(bool(x) and not y for x, y in zip(a, b, strict=True))
    only_b = sum(bool(y) and not x for x, y in zip(a, b, strict=True))
    return 1.0 if only_a + only_b == 0 else float(binomtest(only_a, only_a + only_b).pvalue)


def macro_f1(gold: Sequence[str], answers: Sequence[str | None], classes: Sequence[str]) -> float:
    """Mean of the classes' F1. An answer outside of `classes` (or None) is wrong for every class."""
    from sklearn.metrics import f1_score

    known = [a if a in classes else "\0none" for a in answers]
    return float(f1_score(list(gold), known, labels=list(classes), average="macro", zero_division=0.0))


# --- loss on completions ---------------------------------------------------------------------------------------------


def completion_nll(model, tokenizer, pairs: Sequence[tuple[list[dict], str]], batch_size: int = 16) -> np.ndarray:
    """Mean negative log-likelihood per token (nats) of each completion given its prompt, end token included.

    pairs: (messages, completion). Perplexity is `exp` of it.
    """
    rows = []
    for prompt, completion in pairs:
        head = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        head = tokenizer(head, add_special_tokens=False)["input_ids"]
        tail = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append((head, tail))
    return _nll(model, tokenizer, rows, batch_size)


def text_nll(model, tokenizer, texts: Sequence[str], batch_size: int = 16) -> np.ndarray:
    """Mean negative log-likelihood per token (nats) of each plain text, without a chat around it; its first token is
    given."""
    rows = [(ids[:1], ids[1:]) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    if short := [text for text, (_, tail) in zip(texts, rows, strict=True) if not tail]:
        raise ValueError(f"a text of fewer than two tokens has no loss: {short[0]!r}")
    return _nll(model, tokenizer, rows, batch_size)


def _nll(model, tokenizer, rows: list[tuple[list[int], list[int]]], batch_size: int) -> np.ndarray:
    """Mean loss on the second part of each row of (given, judged) tokens."""
    import torch

    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
    found = np.zeros(len(rows))
    was_training = model.training
    model.eval()
    with torch.inference_mode(), merged(model):
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            width = max(len(rows[i][0]) + len(rows[i][1]) for i in picked)
            ids = torch.full((len(picked), width), tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for k, i in enumerate(picked):  # padded on the right: positions need no care
                row = rows[i][0] + rows[i][1]
                ids[k, : len(row)] = torch.tensor(row)
                mask[k, : len(row)] = 1
            ids, mask = ids.to(model.device), mask.to(model.device)
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            hidden = base.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            for k, i in enumerate(picked):
                head, tail = rows[i]
                span = slice(len(head) - 1, len(head) + len(tail) - 1)
                logits = base.lm_head(hidden[k, span]).float()
                target = torch.tensor(tail, device=logits.device)
                found[i] = torch.nn.functional.cross_entropy(logits, target).item()
    model.train(was_training)
    hardware.give_back_memory()
    return found
