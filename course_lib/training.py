"""Training by hand, for experiments in which a trainer would hide what they are about. The recipes use TRL."""

from __future__ import annotations

import math

from course_lib import hardware

IGNORED = -100  # the label that cross-entropy skips


def encode(tokenizer, rows: list[dict]) -> list[tuple[list[int], list[int]]]:
    """(token ids, labels) of each row: {"prompt", "completion"} as chat messages, or {"text"}, plain.

    Labels are the ids where the loss looks, `IGNORED` elsewhere: it looks at the completion with its end token, or at
    all of a plain text.
    """
    found = []
    for row in rows:
        if "text" in row:
            ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
            found.append((ids, list(ids)))
            continue
        chat = row["prompt"] + row["completion"]
        head = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        given = len(tokenizer(head, add_special_tokens=False)["input_ids"])
        found.append((ids, [IGNORED] * given + ids[given:]))
    return found


def collate(pairs: list[tuple[list[int], list[int]]], pad: int) -> dict:
    """One batch as tensors (rows, longest): input_ids, attention_mask, labels; padded on the right."""
    import torch

    width = max(len(ids) for ids, _ in pairs)
    fill = [width - len(ids) for ids, _ in pairs]
    return {
        "input_ids": torch.tensor([ids + [pad] * n for (ids, _), n in zip(pairs, fill, strict=True)]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * n for (ids, _), n in zip(pairs, fill, strict=True)]),
        "labels": torch.tensor([labels + [IGNORED] * n for (_, labels), n in zip(pairs, fill, strict=True)]),
    }


def batches(tokenizer, rows: list[dict], size: int, steps: int, seed: int = 0) -> list[dict]:
    """`steps` batches of `size` rows, shuffled, from the first again (in another order) where the rows end."""
    import numpy as np

    encoded, rng, order = encode(tokenizer, rows), np.random.default_rng(seed), []
    while len(order) < size * steps:
        order += rng.permutation(len(encoded)).tolist()
    picks = [order[i * size : (i + 1) * size] for i in range(steps)]
    return [collate([encoded[i] for i in pick], tokenizer.pad_token_id) for pick in picks]


def loss(model, batch: dict):
    """Mean cross-entropy over the tokens that have a label: position t is judged by how it foretells token t + 1."""
    import torch

    batch = {name: values.to(model.device) for name, values in batch.items()}
    following = batch["labels"][:, 1:]
    keep = (following != IGNORED).any(0).nonzero()[:, 0]  # elsewhere 49,152 logits a position would be thrown away
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), following[:, keep].flatten(), ignore_index=IGNORED
    )


def autocast(model):
    """While inside, float32 weights are multiplied in bfloat16 where the hardware does that; else nothing changes."""
    import torch

    wanted = model.dtype == torch.float32 and hardware.dtype() == torch.bfloat16
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=wanted)


def loop(model, batches: list[dict], optimizers: list, schedule=None, clip: float | None = 1.0, penalty=None):
    """Train on each batch once; [(loss, norm of the gradient before clipping)] by step.

    schedule(step): factor on the optimizers' learning rates. penalty(model, batch): a term that is added to the loss.
    """
    import torch

    trained = [p for group in optimizers for g in group.param_groups for p in g["params"]]
    rates = [[g["lr"] for g in optimizer.param_groups] for optimizer in optimizers]
    log = []
    for switched in (model, *optimizers):  # schedule-free optimizers have two modes, as models have
        getattr(switched, "train", int)()
    for step, batch in enumerate(batches):
        for optimizer, initial in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, initial, strict=True):
                group["lr"] = rate * (schedule(step) if schedule else 1.0)
        with autocast(model):
            value = loss(model, batch)
            total = value + penalty(model, batch) if penalty else value
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, clip if clip else float("inf"))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        log.append((value.item(), norm.item()))
    for switched in (model, *optimizers):
        getattr(switched, "eval", int)()
    return log


OPTIMIZERS = ("adamw", "muon", "schedule_free", "prodigy", "soap")


def optimizers(name: str, model, learning_rate: float, beta2: float = 0.95) -> list:
    """The optimizer `name` for all trainable weights, as a list: Muon is for matrices inside the layers alone, so the
    embedding and the norms go to AdamW beside it. Prodigy finds its own rate, and takes `learning_rate` as no hint.

    AdamW and Muon are PyTorch's; the others are those of the package pytorch-optimizer.
    """
    import torch

    weights = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    every = [p for _, p in weights]
    betas = (0.9, beta2)
    if name == "adamw":
        return [torch.optim.AdamW(every, lr=learning_rate, betas=betas, weight_decay=0.0, fused=True)]
    if name == "muon":
        matrices = [p for name, p in weights if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
        inside = {id(p) for p in matrices}
        rest = [p for p in every if id(p) not in inside]
        # match_rms_adamw makes a step as large as AdamW's at the same learning rate (Liu et al. 2025, 2502.16982)
        muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(rest, lr=learning_rate, betas=betas, weight_decay=0.0, fused=True)]
    import pytorch_optimizer as more

    if name == "schedule_free":
        return [more.ScheduleFreeAdamW(every, lr=learning_rate, betas=betas)]
    if name == "prodigy":
        return [more.Prodigy(every, lr=1.0, betas=betas)]
    if name == "soap":
        return [more.SOAP(every, lr=learning_rate, betas=(0.9, beta2), weight_decay=0.0, max_precondition_dim=1024)]
    raise ValueError(f"no optimizer {name!r}: choose one of {', '.join(OPTIMIZERS)}")


def kl_penalty(reference, weight: float):
    """A penalty for `loop`: `weight` times the KL divergence of the model from a frozen reference, per judged token.

    It is KL(model to reference), the mean over tokens of sum p log(p / q): 0 where both say the same.
    """
    import torch

    def penalty(model, batch):
        batch = {name: values.to(model.device) for name, values in batch.items()}
        judged = batch["labels"][:, 1:] != IGNORED
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")} | {"use_cache": False}
        with torch.no_grad():
            q = reference(**inputs).logits[:, :-1][judged].float().log_softmax(-1)
        p = model(**inputs).logits[:, :-1][judged].float().log_softmax(-1)
        return weight * (p.exp() * (p - q)).sum(-1).mean()

    return penalty


def cosine(steps: int, warmup: float = 0.05):
    """Factor on the learning rate by step: up in a line, down in half a cosine. `warmup` is a share of all steps."""
    up = round(warmup * steps)
    return lambda step: step / up if step < up else (1 + math.cos(math.pi * (step - up) / max(1, steps - up))) / 2


def wsd(steps: int, warmup: float = 0.05, decay: float = 0.2):
    """Warm-up, stable, decay: up in a line, flat, down in a line at the very end. Shares of all steps."""
    up, down = round(warmup * steps), round(decay * steps)
    return lambda step: min(1.0, step / max(1, up), (steps - step) / max(1, down))
