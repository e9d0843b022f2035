"""What the tests of this folder run, each in a process of its own, so that no peak holds the memory of another:

    python tests/gpu/measure.py recipe OUT.json     lesson 05's recipe on the course's model, in float16
    python tests/gpu/measure.py shape NAME OUT.json two QLoRA steps of a model of that shape, weights drawn at random

Random weights say nothing about what a model learns. Memory and speed depend on the shape alone.
"""

import json
import sys
import time
from types import SimpleNamespace

from course_lib import hardware, memory, models, recipes

CAP = memory.GPUS["t4"] - memory.RESERVED  # what a T4 leaves to tensors, in bytes
ROW, STEPS = 512, 4  # tokens; the first step allocates, the others are timed


def random_model(name: str, dtype, device: str):
    """A model of a known shape with its blocks in four bits, made block by block on the device."""
    import bitsandbytes as bnb
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    s = memory.shape(name)
    config = (Qwen2Config if s.bias else LlamaConfig)(
        vocab_size=s.vocab,
        hidden_size=s.hidden,
        intermediate_size=s.inner,
        num_hidden_layers=s.blocks,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        tie_word_embeddings=s.tied,
        max_position_embeddings=2048,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for part, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    sizes = linear.in_features, linear.out_features
                    small = bnb.nn.Linear4bit(
                        *sizes, linear.bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta"
                    )
                    weight = 0.02 * torch.randn(sizes[::-1], dtype=dtype)
                    small.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
                    if linear.bias is not None:
                        small.bias = torch.nn.Parameter(torch.zeros(sizes[1], dtype=dtype), requires_grad=False)
                    setattr(parent, part, small.to(device))
    for module in model.modules():
        for part, value in list(module.named_parameters(recurse=False)):
            if value.is_meta:
                drawn = torch.ones if value.dim() == 1 else lambda *a, **k: 0.02 * torch.randn(*a, **k)
                setattr(module, part, torch.nn.Parameter(drawn(value.shape, dtype=dtype, device=device), False))
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.is_loaded_in_4bit = True  # what `from_pretrained` would have said; PEFT asks for it
    return model


def shape(name: str) -> dict:
    """Peak and counted bytes of QLoRA steps at batch 1, beside the planner's; tokens a second."""
    import torch

    device = hardware.device()
    model = recipes.add_lora(
        random_model(name, hardware.dtype(), device), SimpleNamespace(rank=16, alpha=32, method="qlora")
    )
    settings = SimpleNamespace(
        batch_size=1, epochs=1, learning_rate=1e-4, schedule="constant", warmup=0, beta2=0.95, method="qlora"
    )
    rows = [{"input_ids": [(7 * i + n) % 40000 for i in range(ROW)]} for n in range(STEPS)]
    stamps = []

    from transformers import TrainerCallback

    class Stamp(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if device == "cuda":
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())

    trainer = recipes.sft_trainer(
        model, models.load_tokenizer(), rows, settings, 0, logging_steps=1, optim="adamw_torch"
    )
    trainer.add_callback(Stamp())
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    planned = memory.plan(memory.shape(name), "qlora", length=ROW, batch=1)
    return {
        "planned": planned.total - planned.reserved,
        "planned_counted": planned.counted,
        "counted": memory.held(model, trainer.optimizer.optimizer).counted,
        "peak": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "losses": [loss for _, loss in recipes.losses(trainer)],
        "tokens_per_s": ROW * (STEPS - 1) / (stamps[-1] - stamps[0]),
    }


def recipe() -> dict:
    """Lesson 05's training, forty steps, on the base that the course brings along."""
    import torch

    s = SimpleNamespace(**vars(recipes.settings("ticket_qlora", "cpu")) | {"train": 160})
    model, trainer = recipes.prepare_with(s, 0, logging_steps=1)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "losses": [loss for _, loss in recipes.losses(trainer)],
        "finite": all(bool(torch.isfinite(p).all()) for p in trained),
        "adapter_dtypes": sorted({str(p.dtype) for p in trained}),
        "peak": torch.cuda.max_memory_allocated() if hardware.device() == "cuda" else None,
        "tokens_per_s": tokens / seconds,
    }


if __name__ == "__main__":
    what, *names, out = sys.argv[1:]
    if models.four_bit_backend() == "unsloth" and what == "recipe":
        import unsloth  # noqa: F401  (before transformers, which it changes)
    import torch

    about = {"dtype": str(hardware.dtype())}
    if hardware.device() == "cuda":
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / whole))
        about["gpu"] = torch.cuda.get_device_name()
    found = {"shape": shape, "recipe": recipe}[what](*names)
    with open(out, "w") as file:
        json.dump(about | found, file, indent=1)
