"""Ways to adapt a model with few parameters, each trained for the same few steps on the same tickets.

Lesson 04 runs some of them live and draws them over what `make reference` stored of all.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from course_lib import hardware, models, profiles, recipes, tickets, training

STEPS, EARLY = 30, 3  # of a whole run; how far profile `cpu` goes
BATCH, HELD_OUT = 4, 16
CENTRE = {"method": "lora", "rank": 16, "alpha": 32, "targets": "all-linear", "learning_rate": 2e-3}
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]

KNOBS = {  # one knob of the recipe is turned at a time; alpha follows the rank, so that alpha / r stays 2
    "the recipe": {},
    "learning rate 2e-4": {"learning_rate": 2e-4},
    "learning rate 6e-4": {"learning_rate": 6e-4},
    "learning rate 6e-3": {"learning_rate": 6e-3},
    "query and value only": {"targets": ["q_proj", "v_proj"]},
    "attention only": {"targets": ATTENTION},
    "MLP only": {"targets": MLP},
    "rank 1": {"rank": 1, "alpha": 2},
    "rank 4": {"rank": 4, "alpha": 8},
    "rank 64": {"rank": 64, "alpha": 128},
}
ZOO = {  # each method at two learning rates of its own: no method is judged by another one's
    f"{name}, learning rate {rate:g}": {"method": method, "learning_rate": rate}
    for name, method, rates in (
        ("DoRA", "dora", (6e-4, 2e-3)),
        ("AdaLoRA", "adalora", (2e-3, 6e-3)),
        ("VeRA", "vera", (6e-3, 3e-2)),
        ("IA3", "ia3", (6e-3, 3e-2)),
        ("bottleneck", "bottleneck", (6e-4, 2e-3)),
        ("prefix tuning", "prefix", (6e-3, 3e-2)),
        ("prompt tuning", "prompt", (3e-2, 3e-1)),
    )
    for rate in rates
}


def settings(name: str) -> SimpleNamespace:
    """What a run of `KNOBS` or `ZOO` is made with."""
    return SimpleNamespace(**CENTRE | (KNOBS | ZOO)[name])


def config(s: SimpleNamespace, steps: int = STEPS):
    """The PEFT configuration of a method. AdaLoRA has to know when its pruning starts and how long before the end it
    stops."""
    import peft

    lora = {"lora_alpha": s.alpha, "target_modules": s.targets, "task_type": "CAUSAL_LM"}
    match s.method:
        case "lora" | "dora":
            return peft.LoraConfig(r=s.rank, use_dora=s.method == "dora", **lora)
        case "adalora":
            schedule = {"total_step": steps, "tinit": steps // 6, "tfinal": steps // 3, "deltaT": 1}
            return peft.AdaLoraConfig(init_r=s.rank * 3 // 2, target_r=s.rank, **schedule, **lora)
        case "vera":
            return peft.VeraConfig(r=256, target_modules=s.targets, task_type="CAUSAL_LM")
        case "ia3":
            return peft.IA3Config(task_type="CAUSAL_LM")
        case "prefix":
            return peft.PrefixTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM")
        case "prompt":
            return peft.PromptTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM")
    raise ValueError(f"no method {s.method!r}")


def bottleneck(model, width: int = 64):
    """`model` with Houlsby's adapters, which PEFT does not have: after each attention and each MLP a small network
    whose output is added. Its last layer starts at zero, so that nothing changes at the start."""
    import torch
    from torch import nn

    class Adapter(nn.Module):
        def __init__(self, inner, size):
            super().__init__()
            self.inner, self.down, self.up = inner, nn.Linear(size, width), nn.Linear(width, size)
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

        def forward(self, *args, **kwargs):
            out = self.inner(*args, **kwargs)
            hidden = out[0] if isinstance(out, tuple) else out
            hidden = hidden + self.up(nn.functional.gelu(self.down(hidden.float()))).to(hidden.dtype)
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    model.requires_grad_(False)
    for layer in model.model.layers:
        with torch.device(model.device):
            layer.self_attn = Adapter(layer.self_attn, model.config.hidden_size)
            layer.mlp = Adapter(layer.mlp, model.config.hidden_size)
    return model


def adapt(model, s: SimpleNamespace, steps: int = STEPS):
    """`model` with the method's fresh parameters. They are in float32: a learnt scale begins at 1, where a step of
    bfloat16 is larger than one of training."""
    from peft import get_peft_model

    return bottleneck(model) if s.method == "bottleneck" else get_peft_model(model, config(s, steps))


def held_out_nll(model, tokenizer, records: list[dict]) -> np.ndarray:
    """Mean negative log-likelihood per token (nats) of each right record. Through the adapter's own forward pass:
    prompts and prefixes live there, and nowhere in the weights."""
    import torch

    was_training, found = model.training, []
    model.eval()
    for start in range(0, len(records), 8):
        pairs = training.encode(tokenizer, recipes.examples(records[start : start + 8]))
        data = {key: t.to(model.device) for key, t in training.collate(pairs, tokenizer.pad_token_id).items()}
        labels = data.pop("labels")
        with torch.no_grad():
            logits = model(**data, use_cache=False).logits[:, -labels.shape[1] :]  # after the virtual tokens, if any
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none"
        )
        found += (loss.sum(1) / (labels[:, 1:] != training.IGNORED).sum(1)).tolist()
    model.train(was_training)
    return np.array(found)


def short_run(name: str, seed: int = 0, steps: int = STEPS, measure_at: tuple[int, ...] = (STEPS,), held_out=HELD_OUT):
    """Train one setting for `steps` steps; the learning rate is constant, so that a shorter run is the beginning of a
    longer one. Returns {"trainable": parameters, "nll": {step: loss of each held-out record}}."""
    import torch

    s, tokenizer = settings(name), models.load_tokenizer()
    profiles.set_seeds(seed)
    # Without a trainer nothing scales the loss, as gradients in float16 would need it: on a GPU, float32.
    model = adapt(models.load(dtype=torch.float32 if hardware.device() == "cuda" else None), s)
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=s.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    dev, nll = tickets.load("dev", held_out), {}
    rows = recipes.examples(tickets.load("train", STEPS * BATCH))  # all of them, so that a short run sees the same
    for step, batch in enumerate(training.batches(tokenizer, rows, BATCH, steps, seed), 1):
        batch = {key: t.to(model.device) for key, t in batch.items()}
        model(**batch, use_cache=False).loss.backward()  # the model's own loss: AdaLoRA adds a term to it
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if s.method == "adalora":
            model.base_model.update_and_allocate(step)  # prunes; it reads the gradients, so it comes before they go
        optimizer.zero_grad()
        if step in measure_at:
            nll[step] = held_out_nll(model, tokenizer, dev)
    return {"trainable": sum(p.numel() for p in weights), "nll": nll}
