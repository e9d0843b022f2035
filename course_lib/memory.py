"""The bytes planner: what training a model holds in memory, from its shape alone.

Parameters, gradients, optimizer state and buffers are counted; activations and what a GPU keeps for itself are
estimated. `held` measures the counted part on a real model.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from course_lib import CourseError

BLOCK, GROUP = 64, 256  # weights that share a scale, and scales that share a scale of scales
METHODS = ("full", "lora", "qlora")
OPTIMIZERS = ("adamw", "adamw_8bit")
# What PyTorch reports as total memory, in bytes, and what CUDA and its libraries keep of it.
GPUS = {"t4": 15.8e9, "l4": 23.8e9, "a100": 42.4e9, "h100": 84.9e9}
RESERVED = 0.8e9
# TRL forms the logits of this many tokens at a time.
LOGITS_AT_ONCE = 256


@dataclass(frozen=True)
class Shape:
    """The sizes of a model of Llama's or Qwen2's kind. `bias`: on query, key and value."""

    name: str
    hidden: int
    inner: int
    blocks: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = True
    bias: bool = False
    head_dim: int | None = None

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear layer of a block."""
        head = self.head_dim or self.hidden // self.heads
        q, kv = self.heads * head, self.kv_heads * head
        attention = {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
        }
        up = (self.hidden, self.inner)
        return attention | {"gate_proj": up, "up_proj": up, "down_proj": (self.inner, self.hidden)}

    @property
    def linear(self) -> int:
        """Weights of all linear layers of the blocks: what is held in four bits."""
        return self.blocks * sum(d_in * d_out for d_in, d_out in self.matrices.values())

    @property
    def rest(self) -> int:
        """All others: embedding, output layer, norms, biases."""
        biases = sum(self.matrices[n][1] for n in ("q_proj", "k_proj", "v_proj")) if self.bias else 0
        return (
            self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden + self.blocks * (2 * self.hidden + biases)
        )

    @property
    def parameters(self) -> int:
        return self.linear + self.rest

    @property
    def tensors(self) -> list[int]:
        """Sizes of all weights one by one, norms and biases taken as vectors of the model's width."""
        embedding = [self.vocab * self.hidden] * (1 if self.tied else 2)
        vectors, left = divmod(self.rest - sum(embedding), self.hidden)
        matrices = [d_in * d_out for d_in, d_out in self.matrices.values()] * self.blocks
        return matrices + embedding + [self.hidden] * vectors + [left] * (left > 0)

    def adapter(self, rank: int) -> list[int]:
        """Weights of each thin matrix of a LoRA on all linear layers of the blocks."""
        return [rank * d for _ in range(self.blocks) for pair in self.matrices.values() for d in pair]


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("SmolLM2-135M", 576, 1536, 30, 9, 3, 49152),
        Shape("Qwen2.5-0.5B", 896, 4864, 24, 14, 2, 151936, bias=True),
        Shape("Qwen2.5-1.5B", 1536, 8960, 28, 12, 2, 151936, bias=True),
        Shape("SmolLM2-1.7B", 2048, 8192, 24, 32, 32, 49152),
        Shape("Qwen2.5-3B", 2048, 11008, 36, 16, 2, 151936, bias=True),
        Shape("Llama-2-7B", 4096, 11008, 32, 32, 32, 32000, tied=False),
        Shape("Mistral-7B", 4096, 14336, 32, 32, 8, 32000, tied=False),
        Shape("Qwen2.5-7B", 3584, 18944, 28, 28, 4, 152064, tied=False, bias=True),
        Shape("Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128256, tied=False),
        Shape("Llama-2-13B", 5120, 13824, 40, 40, 40, 32000, tied=False),
        Shape("Qwen2.5-14B", 5120, 13824, 48, 40, 8, 152064, tied=False, bias=True),
        Shape("Llama-2-70B", 8192, 28672, 80, 64, 8, 32000, tied=False),
    )
}
TABLE = ("Qwen2.5-0.5B", "SmolLM2-1.7B", "Qwen2.5-3B", "Qwen2.5-7B", "Llama-3.1-8B", "Qwen2.5-14B")


def shape(name: str) -> Shape:
    """A known shape by name, without regard to case, by its size where that is unique ("14B"), or from the
    `config.json` of a folder. CourseError, with the list of known ones, for any other."""
    if name and (folder := Path(name)).is_dir():
        return _from_config(folder)
    wanted = name.lower().split("/")[-1].removesuffix("-instruct")
    found = [s for key, s in SHAPES.items() if wanted in (key.lower(), key.lower().rpartition("-")[2])]
    if len(found) == 1:
        return found[0]
    several = f"{name!r} may be {' or '.join(s.name for s in found)}." if found else f"no shape {name!r}."
    raise CourseError(f"{several} The known shapes are {', '.join(SHAPES)}; a folder with config.json will do, too.")


def _from_config(folder: Path) -> Shape:
    try:
        c = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return Shape(
            folder.name,
            c["hidden_size"],
            c["intermediate_size"],
            c["num_hidden_layers"],
            c["num_attention_heads"],
            c.get("num_key_value_heads") or c["num_attention_heads"],
            c["vocab_size"],
            c.get("tie_word_embeddings", False),
            c.get("attention_bias", False) or c.get("model_type") == "qwen2",
            c.get("head_dim"),
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CourseError(f"{folder}: its config.json says no shape that the planner knows ({error!r}).") from None


@dataclass(frozen=True)
class Plan:
    """Bytes of a training run. The first four are counted, the last three estimated."""

    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float = 0.0
    workspace: float = 0.0
    reserved: float = 0.0

    @property
    def counted(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.buffers

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def plan(
    s: Shape,
    method: str,
    rank: int = 16,
    batch: int = 1,
    length: int = 512,
    optimizer: str = "adamw",
    checkpointing: bool = True,
    base_bytes: int = 2,
    adapter_bytes: int = 4,
    double: bool = True,
) -> Plan:
    """What `method` holds in memory for a model of shape `s`.

    full: weights, gradients and both of Adam's moments in float32. lora: a frozen base of `base_bytes` a weight, and an
    adapter of `adapter_bytes`. qlora: the same with the linear layers of the blocks in four bits. batch and length (in
    tokens) matter for the activations alone.
    """
    for value, known in ((method, METHODS), (optimizer, OPTIMIZERS)):
        if value not in known:
            raise CourseError(f"{value!r} is not known here: choose one of {', '.join(known)}.")
    for name, value in (("rank", rank), ("batch", batch), ("length", length)):
        if value < 1:
            raise CourseError(f"{name} {value}: a whole number of at least 1 is wanted.")
    rotary = 2 * 4 * (s.head_dim or s.hidden // s.heads) // 2  # the frequencies are kept twice, in float32
    if method == "full":
        trained, width, frozen, tables = s.tensors, 4, 0, 0
    else:
        trained, width = s.adapter(rank), adapter_bytes
        frozen, tables = base_bytes * s.parameters, 0
    if method == "qlora":
        frozen, tables = s.linear / 2 + base_bytes * s.rest, quantisation_bytes(s, double)
    n = sum(trained)
    return Plan(
        parameters=frozen + width * n,
        gradients=width * n,
        optimizer=sum(_optimizer_bytes(size, optimizer, width) for size in trained),
        buffers=tables + rotary,
        activations=_activations(s, batch * length, checkpointing, base_bytes),
        workspace=base_bytes * max(a * b for a, b in s.matrices.values()) if method == "qlora" else 0.0,
        reserved=RESERVED,
    )


def quantisation_bytes(s: Shape, double: bool = True) -> float:
    """Bytes of scales and tables beside the 4-bit weights, as bitsandbytes holds them: for each matrix one scale a
    block, in float32 or (double) in 8 bits with a second scale for 256 of them, and the tables of codes."""
    total = 0
    for d_in, d_out in s.matrices.values():
        scales = -(-d_in * d_out // BLOCK)
        total += 16 * 4 + (scales + 4 * -(-scales // GROUP) + 256 * 4 + 4 if double else 4 * scales)
    return s.blocks * total


def _optimizer_bytes(n: int, optimizer: str, width: int) -> float:
    """Both moments of `n` weights. The 8-bit optimizer leaves small tensors in float32."""
    if optimizer == "adamw_8bit":
        return 2 * (n + 4 * -(-n // 256)) if n >= 4096 else 8 * n
    return 2 * width * n


def _activations(s: Shape, tokens: int, checkpointing: bool, width: int) -> float:
    """An estimate: what a block keeps for its backward pass, and the logits, which are float32 for the loss.

    With checkpointing only the input of each block is kept, and one block at a time is computed again.
    """
    head = s.head_dim or s.hidden // s.heads
    block = 8 * s.hidden + 2 * (s.heads + s.kv_heads) * head + 5 * s.inner
    kept = s.blocks * s.hidden + block if checkpointing else s.blocks * block
    return width * tokens * kept + 3 * 4 * min(tokens, LOGITS_AT_ONCE) * s.vocab


def held(model, optimizer=None) -> Plan:
    """The counted bytes as the tensors of a model and its optimizer have them, after a backward pass and a step.

    Storage that two names share counts once. Where the gradients were cleared, each counts as large as its weight.
    """
    import torch

    def size(tensors):
        found = {t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in tensors if t.numel()}
        return sum(found.values())

    parameters = list(model.parameters())
    states = [state for p in parameters if (state := getattr(p, "quant_state", None)) is not None]
    # as_dict names the same tensors in every release; the code of the 16 values is one object for all layers
    tables = [t for state in states for t in (state.absmax, state.code, state.offset) if torch.is_tensor(t)]
    tables += [t for state in states if state.nested for t in (state.state2.absmax, state.state2.code)]
    moments = []
    if optimizer is not None:
        entries = (value for entry in optimizer.state.values() for value in entry.values())
        moments = [t for t in entries if torch.is_tensor(t) and t.numel() > 1]
    return Plan(
        parameters=size(parameters),
        gradients=sum(p.numel() * p.element_size() for p in parameters if p.requires_grad),
        optimizer=size(moments),
        buffers=size([*model.buffers(), *tables]),
    )


# --- the program -----------------------------------------------------------------------------------------------------


def assumptions(batch: int, length: int, rank: int, optimizer: str, checkpointing: bool) -> str:
    """The sentence that belongs beneath every table of the planner."""
    return (
        f"Assumed: batch {batch}, {length} tokens a row, LoRA rank {rank} on all linear layers of the blocks, adapter "
        f"and its gradients in float32, {optimizer}, gradient checkpointing {'on' if checkpointing else 'off'}; frozen "
        "weights in 16 bits, for qlora the linear layers in NF4 with double quantisation; full fine-tuning in float32 "
        f"with mixed precision; {RESERVED / 1e9:.1f} GB for CUDA. Activations are an estimate."
    )


def table(gpu: str = "t4", names=TABLE, methods=METHODS, **options) -> list[dict]:
    """One row a shape: parameters in billions, and for each method the total in GB and whether it fits the GPU."""
    if gpu not in GPUS:
        raise CourseError(f"no GPU {gpu!r}: choose one of {', '.join(GPUS)}.")
    rows = []
    for name in names:
        s = shape(name)
        row = {"model": s.name, "billions": s.parameters / 1e9}
        for method in methods:
            total = plan(s, method, **options).total
            row |= {method: total / 1e9, f"{method} fits": total <= GPUS[gpu]}
        rows.append(row)
    return rows
