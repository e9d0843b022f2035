"""Checks of claims by arithmetic, formulas, simulations and the course's stored results. See `claims` for the rule.

The defaults of a check are what the claim says, the control is a claim that it must judge otherwise. Shapes of models
come from `memory.SHAPES`, bits of weights from the formulas that lesson 05 compares with bitsandbytes.
"""

from __future__ import annotations

import json
import math

import numpy as np

from course_lib import memory, profiles, reference
from course_lib.claims import Finding, near, register

# --- arithmetic and cost ---------------------------------------------------------------------------------------------


@register("14.C69", tokens=383.8e6)
def break_even(tokens=23.1e6, fixed=(3000, 1200, 1500), teacher=15.0, student=0.15):
    """Tokens at which what was paid once is saved; prices in dollars per million tokens."""
    found = sum(fixed) / (teacher - student) * 1e6
    saved = tokens / 1e6 * (teacher - student)
    evidence = f"{sum(fixed):,} / ({teacher:g} - {student:g}) = {found / 1e6:.1f}M tokens; {tokens / 1e6:.1f}M save "
    return Finding({"at the table's own prices": near(tokens, found)}, f"{evidence}${saved:,.0f}")


@register("14.C55", dollars=0.027)
def price_of_a_prompt(dollars=0.12, tokens=1800, price=15.0):
    found = tokens * price / 1e6
    evidence = f"{tokens:,} tokens at ${price:g} per million are ${found:.3f}; ${dollars} would be "
    return Finding({"at that price": near(dollars, found)}, f"{evidence}${dollars / tokens * 1e6:.1f} per million")


@register("14.C71", dollars=300)
def labelling(dollars=3000, tokens=200e6, price=15.0):
    found = tokens / 1e6 * price
    return Finding({"at that price": near(dollars, found)}, f"{tokens / 1e6:.0f}M x ${price:g} = ${found:,.0f}")


@register("14.C72", dollars=384)
def gpu_hours(dollars=1200, gpus=8, hours=16, prices=(2, 4)):
    low, high = (gpus * hours * p for p in prices)
    evidence = f"{gpus * hours} GPU-hours are ${low} to ${high}; ${dollars:,} are ${dollars / gpus / hours:.2f} an hour"
    return Finding({"within the prices": low <= dollars <= high}, evidence)


@register("14.C73", after=0.9825)
def small_decay(before=0.984, after=0.972):
    rise = (1 - after) / (1 - before) - 1
    fall = 1 - after / before
    cases = {"right answers fall by less than 2 %": fall < 0.02, "errors rise by less than 10 %": rise < 0.1}
    return Finding(cases, f"right answers fall by {fall:.1%}, errors rise by {rise:.0%}")


@register("14.C75", fixed=0)
def cheaper_by(times=100, teacher=15.0, student=0.15, fixed=5700, volume=1e9):
    whole = teacher / (student + fixed / (volume / 1e6))
    cases = {"price of a token": near(times, teacher / student), "with what was paid once": near(times, whole)}
    return Finding(
        cases, f"{teacher / student:.0f} times by price; {whole:.1f} times with ${fixed:,} spread over 1B tokens"
    )


@register("14.C67", dollars_per_hour=0.0)
def dedicated_gpu(price=0.15, dollars_per_hour=1.0, volumes=(10e6, 1e9, 10e9)):
    """A student that is served on a rented GPU costs the same whether it is asked or not. One dollar an hour and 730
    hours a month are assumed."""
    month = 730 * dollars_per_hour
    real = {v: month / (v / 1e6) for v in volumes}
    cases = {f"{v / 1e6:,.0f}M tokens a month": cost <= price for v, cost in real.items()}
    prices = ", ".join(f"${cost:,.2f} at {v / 1e6:,.0f}M tokens a month" for v, cost in real.items())
    return Finding(cases, f"one GPU all month, per million tokens: {prices}; the formula has ${price}")


@register("14.C59", rollback=100)
def service_level(promised=85, slack=15, rollback=120):
    return Finding({"the two rules agree": promised + slack == rollback}, f"{promised} + {slack} = {promised + slack}")


@register("14.B96", qlora=(144, 18), dpo=(64, 8))
def same_hardware(full=(384, 48), lora=(128, 16), qlora=(72, 18), dpo=(32, 8)):
    """(dollars, hours) of each row of a table that compares methods by cost."""
    price = {n: d / h for n, (d, h) in {"full": full, "LoRA": lora, "QLoRA": qlora, "DPO": dpo}.items()}
    cases = {f"{name} is paid as full": near(p, price["full"]) for name, p in price.items() if name != "full"}
    return Finding(cases, "dollars an hour: " + ", ".join(f"{name} {p:.0f}" for name, p in price.items()))


@register("14.B130", training=5.33, storage=401)
def qlora_savings(training=10, storage=100, full=384, qlora=72):
    shape = memory.SHAPES["Llama-2-7B"]
    thin = adapter_size(shape, 16, ("q_proj", "v_proj"))
    cost, size = full / qlora, 2 * shape.parameters / (4 * thin)
    cases = {"training": near(training, cost), "storage": near(storage, size)}
    return Finding(cases, f"training {full} / {qlora} = {cost:.1f} times, storage {size:.0f} times (rank 16)")


@register("14.D29", requests=100)
def pays_for_itself(once=400, each=0.002, requests=1e6):
    daily = each * requests
    evidence = f"${daily:,.2f} a day; the ${once} are passed after {once / daily:,.1f} days"
    return Finding({"the serving cost passes the training cost within a day": daily > once}, evidence)


@register("14.A15", tokens=(40e6, 40e6), speeds=(2000, 2000))
def price_of_a_run(dollars=(10, 50), tokens=(1e6, 1e9), speeds=(1000, 5000), prices=(2, 4)):
    """tokens, tokens a second and dollars an hour: the ends of what a reader may assume."""
    low = tokens[0] / speeds[1] / 3600 * prices[0]
    high = tokens[1] / speeds[0] / 3600 * prices[1]
    cases = {"least": low >= dollars[0], "most": high <= dollars[1]}
    given = f"{tokens[0] / 1e6:,.0f}M to {tokens[1] / 1e6:,.0f}M tokens at {speeds[0]:,} to {speeds[1]:,} a second"
    return Finding(cases, f"{given}: ${low:,.2f} to ${high:,.0f}", spread=high / low)


@register("14.C12", lighter=(("LoRA or QLoRA", "Full fine-tuning"), ("No adaptation", "Prompt revision")))
def ladder_order(lighter=(("Full fine-tuning", "LoRA or QLoRA"), ("Distillation", "No adaptation"))):
    """lighter: (what is said to come first, what after it), by the costs of the course's own ladder."""
    import csv

    from course_lib import profiles

    levels = ("none", "very low", "low", "moderate", "high", "very high")
    with open(profiles.ROOT / "data" / "ladder.csv", newline="", encoding="utf-8") as file:
        cost = {row["rung"]: (int(row["order"]), row["cost"]) for row in csv.DictReader(file)}
    cases = {f"{a} before {b}": levels.index(cost[a][1]) <= levels.index(cost[b][1]) for a, b in lighter}
    words = [f"{name}: {cost[name][1]} (rung {cost[name][0]})" for pair in lighter for name in pair]
    return Finding(cases, "cost of " + "; ".join(words))


# --- memory and quantisation -----------------------------------------------------------------------------------------

SEVEN, THIRTEEN, SEVENTY = (memory.SHAPES[f"Llama-2-{size}"] for size in ("7B", "13B", "70B"))
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # a weight, its share of an 8-bit scale, and of the scale of scales


def adapter_size(shape: memory.Shape, rank: int, targets) -> int:
    """Weights of a LoRA: rank x (inputs + outputs) for each of the target matrices of each block."""
    return shape.blocks * sum(rank * sum(shape.matrices[name]) for name in targets)


def four_bit(shape: memory.Shape) -> float:
    """Bytes of the weights alone: linear layers in NF4 with double quantisation, the rest in 16 bits."""
    return shape.linear * NF4_BITS / 8 + 2 * shape.rest


@register("14.B01", gigabytes=(56, 28))
def loading(gigabytes=(28, 14)):
    found = [SEVEN.parameters * width / 1e9 for width in (4, 2)]
    cases = {f"{w} bits": near(said, is_, 0.05) for w, said, is_ in zip((32, 16), gigabytes, found, strict=True)}
    return Finding(cases, f"{SEVEN.parameters:,} weights: {found[0]:.2f} GB in 32 bits, {found[1]:.2f} GB in 16")


# Bytes for each trained weight: (weight, gradient, master copy, Adam's two moments).
RECIPES = {"mixed precision": (2, 2, 4, 8), "float32": (4, 4, 0, 8), "bfloat16 throughout": (2, 2, 0, 4)}


@register("14.B02", gigabytes=108, recipes=("mixed precision", "float32"))
def full_fine_tuning(gigabytes=56, recipes=tuple(RECIPES)):
    found = {name: SEVEN.parameters * sum(RECIPES[name]) / 1e9 for name in recipes}
    cases = {name: near(gigabytes, size, 0.06) for name, size in found.items()}
    return Finding(cases, "; ".join(f"{name} {size:.0f} GB" for name, size in found.items()) + ", before activations")


@register("14.X07", gigabytes=108, recipes=("mixed precision", "float32"))
def full_fine_tuning_again(gigabytes=28, recipes=tuple(RECIPES)):
    return full_fine_tuning(gigabytes, recipes)


@register("14.B36", gigabytes=(108, 208, 1104))
def weights_for_training(gigabytes=(28, 52, 280)):
    """A table that calls the size of the float32 weights the memory of full fine-tuning."""
    shapes = (SEVEN, THIRTEEN, SEVENTY)
    found = [s.parameters * sum(RECIPES["mixed precision"]) / 1e9 for s in shapes]
    cases = {s.name: near(said, is_, 0.05) for s, said, is_ in zip(shapes, gigabytes, found, strict=True)}
    alone = ", ".join(f"{4 * s.parameters / 1e9:.0f}" for s in shapes)
    return Finding(cases, f"{', '.join(f'{x:.0f}' for x in found)} GB; the weights alone in float32 are {alone} GB")


@register("14.B29", times=(3.7, 3.9))
def qlora_against_lora(times=(5, 6)):
    weights = 16 / NF4_BITS
    whole = memory.plan(SEVEN, "lora").total / memory.plan(SEVEN, "qlora").total
    cases = {"weights in four bits": times[0] <= weights <= times[1]}
    return Finding(
        cases, f"16 / {NF4_BITS:.3f} = {weights:.2f} times for a weight in four bits, {whole:.1f} for a whole run"
    )


@register("14.C06", times=8)
def up_to(times=4):
    found = 16 / NF4_BITS
    cases = {"the best case, weights in four bits": near(times, found, 0.05)}
    return Finding(cases, f"at best 16 / {NF4_BITS:.3f} = {found:.2f} times, for a weight in four bits")


@register("14.X08", times=(18, 20), cases=("full",))
def qlora_against(times=(5, 6), cases=("lora", "full")):
    small = four_bit(SEVEN)
    against = {
        "lora": ("LoRA's frozen weights", 2 * SEVEN.parameters / small),
        "full": (
            "full fine-tuning, run against run",
            memory.plan(SEVEN, "full").total / memory.plan(SEVEN, "qlora").total,
        ),
    }
    found = {against[name][0]: against[name][1] for name in cases}
    told = "; ".join(f"{ratio:.1f} times against {name}" for name, ratio in found.items())
    return Finding({name: times[0] <= ratio <= times[1] for name, ratio in found.items()}, told)


@register("14.B30", saved=0.373, unit="bits")
def double_quantisation(saved=0.37, unit="bytes"):
    before, after = 32 / 64, NF4_BITS - 4
    bits = before - after
    evidence = f"{before} bits for the scales become {after:.3f}: {bits:.3f} bits saved, or {bits / 8:.3f} bytes"
    return Finding({"per weight": near(saved, bits if unit == "bits" else bits / 8)}, evidence)


@register("14.C24", after=4)
def bits_of_a_scale(before=32, after=8.12, group=256):
    found = 8 + 32 / group
    return Finding(
        {"per scale": near(after, found, 0.005)}, f"8 + 32 / {group} = {found:.3f} bits a scale, was {before}"
    )


def seventy_runs() -> dict[str, float]:
    """GB that the planner of lesson 05 gives a QLoRA run of a 70B model, one row of 512 tokens, by optimizer."""
    names = {"adamw_8bit": "8-bit AdamW", "adamw": "AdamW"}
    return {name: memory.plan(SEVENTY, "qlora", optimizer=key).total / 1e9 for key, name in names.items()}


def told_of_seventy() -> str:
    runs = ", ".join(f"{gb:.1f} GB with {name}" for name, gb in seventy_runs().items())
    return f"one row of 512 tokens: {runs}; the frozen weights alone {four_bit(SEVENTY) / 1e9:.1f} GB"


@register("14.B34", gigabytes=48)
def seventy_billion(gigabytes=24):
    return Finding({name: gb <= gigabytes for name, gb in seventy_runs().items()}, told_of_seventy())


@register("14.D06", gigabytes=40)
def seventy_billion_fits(gigabytes=80):
    return seventy_billion(gigabytes)


@register("14.X02", fits={24: False, 48: True, 80: True})
def three_answers(fits=None):
    """Three answers of two documents: a 70B model trains by QLoRA in 24 GB; it needs 48; it fits in 80."""
    runs = seventy_runs().values()
    fits = fits or {24: True, 48: True, 80: True}
    cases = {f"{size} GB": said == (max(runs) <= size) for size, said in fits.items()}
    return Finding(cases, told_of_seventy())


@register("14.C20", master=True, widths=(2,))
def optimizer_state(times=6, master=False, widths=(2, 4)):
    """Adam's two moments in float32, with or without the master copy of the weights, over the weights themselves."""
    held = 8 + 4 * master
    cases = {f"{8 * w}-bit weights": near(times, held / w) for w in widths}
    told = ", ".join(f"{held / w:g} times {8 * w}-bit weights" for w in widths)
    return Finding(cases, f"moments {held} bytes a weight: {told}; with a master copy {12 / 2:g} times 16-bit weights")


@register("14.B05", kinds=("weights",))
def checkpoint(gigabytes=(10, 50), kinds=("weights", "to go on training")):
    size = {"weights": 2 * SEVEN.parameters / 1e9, "to go on training": 14 * SEVEN.parameters / 1e9}
    cases = {kind: gigabytes[0] <= size[kind] <= gigabytes[1] for kind in kinds}
    return Finding(cases, "; ".join(f"{kind} {size[kind]:.1f} GB" for kind in kinds))


@register("14.B115", base=13.5, adapter=33.6)
def served(base=7.0, adapter=50.0):
    """GB of a 7B model in 16 bits; MB of a LoRA of rank 16 on query and value, or on all linear layers."""
    weights = 2 * SEVEN.parameters / 1e9
    sizes = {f"{t}, {8 * w} bits": w * adapter_size(SEVEN, 16, names) / 1e6
             for t, names in (("q, v", ("q_proj", "v_proj")), ("all", SEVEN.matrices)) for w in (2, 4)}  # fmt: skip
    cases = {"base": near(base, weights, 0.1), "adapter": any(near(adapter, s, 0.1) for s in sizes.values())}
    told = ", ".join(f"{size:.1f} MB ({name})" for name, size in sizes.items())
    return Finding(cases, f"base {weights:.1f} GB; adapter {told}")


@register("14.B13", megabytes=33.6, widths=(4,))
def adapter_file(megabytes=10, widths=(2, 4)):
    n = adapter_size(SEVEN, 16, ("q_proj", "v_proj"))
    sizes = {w: w * n / 1e6 for w in widths}
    told = ", ".join(f"{size:.1f} MB in {8 * w} bits" for w, size in sizes.items())
    return Finding({f"{8 * w} bits": near(megabytes, s, 0.1) for w, s in sizes.items()}, f"{n:,} weights: {told}")


@register("14.B06", of="parameters")
def less_memory(times=(10, 100), of="memory"):
    """What a parameter-efficient method saves at most on a 7B model, against full fine-tuning."""
    full = memory.plan(SEVEN, "full").total
    found = {name: full / memory.plan(SEVEN, method).total for name, method in (("LoRA", "lora"), ("QLoRA", "qlora"))}
    fewer = SEVEN.parameters / adapter_size(SEVEN, 16, SEVEN.matrices)
    if of == "parameters":
        cases = {"q, k, v, o and MLP, rank 32": times[0] <= fewer / 2 <= times[1]}
    else:
        cases = {name: times[0] <= ratio <= times[1] for name, ratio in found.items()}
    told = ", ".join(f"{name} {ratio:.1f}" for name, ratio in found.items())
    return Finding(cases, f"memory of a run, times smaller: {told}; trained weights {fewer:.0f} times fewer")


@register("14.B43", tokens=(40,))
def prompt_tuning(percent=(0.001, 0.01), tokens=(8, 20, 100)):
    share = {n: 100 * n * SEVEN.hidden / SEVEN.parameters for n in tokens}
    cases = {f"{n} tokens": percent[0] <= s <= percent[1] for n, s in share.items()}
    return Finding(cases, ", ".join(f"{n} tokens {s:.4f} %" for n, s in share.items()) + " of a 7B model")


@register("14.B41", percent=(1, 5))
def prefix_tuning(percent=(0.01, 0.1), tokens=20):
    n = tokens * 2 * SEVEN.blocks * SEVEN.hidden
    share = 100 * n / SEVEN.parameters
    return Finding(
        {f"{tokens} tokens": percent[0] <= share <= percent[1]},
        f"{tokens} tokens: {n:,} weights, {share:.3f} % of a 7B model",
    )


# --- LoRA and its family ---------------------------------------------------------------------------------------------

# Mistral's and Qwen3's shapes are in their published configurations.
QWEN3 = memory.Shape("Qwen3-4B", 2560, 9728, 36, 32, 8, 151936, head_dim=128)
QV, QKVO = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")


@register("14.B12", trainable=8_388_608)
def counted(trainable=4_194_304, rank=16, targets=QV):
    found = adapter_size(SEVEN, rank, targets)
    half = adapter_size(SEVEN, rank // 2, targets)
    evidence = f"2 x {SEVEN.blocks} x {rank} x (4096 + 4096) = {found:,}; rank {rank // 2} has {half:,}"
    return Finding({f"rank {rank}": trainable == found}, evidence)


@register("14.D05", trainable=13_631_488)
def counted_on_mistral(trainable=8.4e6, rank=16):
    shape = memory.SHAPES["Mistral-7B"]
    found = adapter_size(shape, rank, QKVO)
    share = 100 * found / (shape.parameters + found)
    return Finding({"q, k, v, o": near(trainable, found)}, f"{found:,} of {shape.parameters + found:,}, {share:.4f} %")


def vera_size(shape: memory.Shape, rank: int, targets) -> int:
    """VeRA trains a vector of the rank and one of the outputs for each matrix; its two random ones are shared."""
    return shape.blocks * sum(rank + shape.matrices[name][1] for name in targets)


@register("14.E03", fewer=97.0)
def vera_fewer(fewer=99, rank=16, vera_rank=256):
    lora, vera = adapter_size(QWEN3, rank, QKVO), vera_size(QWEN3, vera_rank, QKVO)
    found = 100 * (1 - vera / lora)
    evidence = f"LoRA {lora:,}, VeRA {vera:,} on the same four matrices: {lora / vera:.1f} times, {found:.1f} % fewer"
    return Finding({"same targets": near(fewer, found, 0.005)}, evidence)


@register("14.E04", millions=11.8)
def lora_on_qwen(millions=4.0, rank=16):
    found = {"q, v": QV, "q, k, v, o": QKVO, "all linear": tuple(QWEN3.matrices)}
    sizes = {name: adapter_size(QWEN3, rank, targets) / 1e6 for name, targets in found.items()}
    told = ", ".join(f"{name} {size:.1f}M" for name, size in sizes.items())
    return Finding({"q, k, v, o": near(millions, sizes["q, k, v, o"])}, f"rank {rank}: {told}")


def ia3_size(shape: memory.Shape) -> int:
    """IA3 scales the outputs of key and value and the inputs of the second layer of the MLP."""
    m = shape.matrices
    return shape.blocks * (m["k_proj"][1] + m["v_proj"][1] + m["down_proj"][0])


@register("14.E05", weights=4e6)
def ia3(weights=400_000, percent=0.01):
    n = ia3_size(QWEN3)
    share = 100 * n / QWEN3.parameters
    cases = {"weights": near(weights, n, 0.1), "share": near(percent, share, 0.1)}
    return Finding(cases, f"{n:,} weights, {share:.4f} %")


@register("14.E06", times=27.8)
def ia3_smaller(times=10, rank=16):
    found = adapter_size(QWEN3, rank, QKVO) / ia3_size(QWEN3)
    return Finding({"the LoRA of the same example": near(times, found)}, f"{found:.1f} times smaller")


@register("14.B48", ranks=(8, 16, 64))
def vera_ten_times(times=10, ranks=(2, 4, 8, 16, 64)):
    vera = vera_size(SEVEN, 256, QV)
    found = {r: adapter_size(SEVEN, r, QV) / vera for r in ranks}
    told = ", ".join(f"{ratio:.1f} times at rank {r}" for r, ratio in found.items())
    return Finding({f"LoRA of rank {r}": ratio >= times for r, ratio in found.items()}, f"fewer than LoRA: {told}")


@register("14.D04", settings=((16, QKVO),))
def share_of_lora(percent=(0.1, 1.0), settings=((8, QV), (16, QKVO), (64, tuple(SEVEN.matrices)))):
    share = {f"rank {r}, {len(t)} matrices": 100 * adapter_size(SEVEN, r, t) / SEVEN.parameters for r, t in settings}
    cases = {name: percent[0] <= s <= percent[1] for name, s in share.items()}
    return Finding(cases, "; ".join(f"{name}: {s:.3f} %" for name, s in share.items()))


@register("14.D27", update_ranks=(4, 8))
def rank_is_enough(rank=16, update_ranks=(4, 16, 256), size=256):
    """Whether a LoRA of `rank` can express nine tenths of an update of another rank. The best approximation of a matrix
    keeps its largest singular values (Eckart and Young 1936)."""
    rng, kept = np.random.default_rng(0), {}
    for r in update_ranks:
        values = np.linalg.svd(rng.normal(size=(size, r)) @ rng.normal(size=(r, size)), compute_uv=False) ** 2
        kept[r] = values[:rank].sum() / values.sum()
    told = ", ".join(f"{share:.0%} of an update of rank {r}" for r, share in kept.items())
    return Finding({f"update of rank {r}": share >= 0.9 for r, share in kept.items()}, f"rank {rank} expresses {told}")


# --- preference losses -----------------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, dtype=float)))


def softplus(x):
    return np.logaddexp(0.0, x)


# Loss of a pair from the log-probabilities of its two replies (good, bad) under policy and reference.
LOSSES = {
    "dpo": lambda good, bad, ref_w, ref_l, b=0.1: softplus(-b * ((good - ref_w) - (bad - ref_l))),
    "ipo": lambda good, bad, ref_w, ref_l, b=0.1: ((good - ref_w) - (bad - ref_l) - 1 / (2 * b)) ** 2,
    "simpo": lambda good, bad, ref_w, ref_l, b=2.0: softplus(-(b * (good - bad) - 0.5)),
}


@register("14.C10", minuend="ipo", subtrahend="ipo")
def quadratic_added(minuend="ipo", subtrahend="dpo"):
    """If IPO were DPO plus a quadratic, their difference would have no third derivative."""
    h, step = np.linspace(-4, 4, 9), 0.5
    third = [
        sum(c * LOSSES[name](h + k * step, 0, 0, 0) for k, c in ((-1.5, -1), (-0.5, 3), (0.5, -3), (1.5, 1))) / step**3
        for name in (minuend, subtrahend)
    ]
    largest = np.abs(third[0] - third[1]).max()
    own = np.abs(third[0]).max()
    evidence = f"third derivative of the difference up to {largest:.1e}, of IPO itself {own:.0e}"
    return Finding({"the difference is quadratic": bool(largest < 1e-6)}, evidence)


@register("14.C37", inside=False)
def ipo_target(inside=True, betas=(0.01, 0.1, 0.5)):
    """Where the loss is least; h is the difference of the log-ratios. The paper's loss is (h - 1 / (2 beta))**2."""
    grid, found = np.linspace(0, 6000, 600_001), {}
    for b in betas:
        found[b] = grid[np.argmin(((b if inside else 1) * grid - 1 / (2 * b)) ** 2)]
    cases = {f"beta {b}": near(1 / (2 * b), h) for b, h in found.items()}
    told = ", ".join(f"beta {b}: {h:g} instead of {1 / (2 * b):g}" for b, h in found.items())
    return Finding(cases, f"least at h = {told}")


@register("14.B70", loss="simpo")
def without_reference(loss="ipo"):
    moved = [LOSSES[loss](-20.0, -22.0, ref, -21.0) for ref in (-19.0, -20.0)]
    evidence = f"{loss.upper()} with a reference of -19 and -20: {moved[0]:.3f} and {moved[1]:.3f}"
    return Finding({"training needs no reference": near(moved[0], moved[1], 1e-9)}, evidence)


@register("14.A10", loss="dpo")
def simpo_without_reference(loss="simpo"):
    return without_reference(loss)


@register("14.B67", larger_means="further from the reference")
def leash(larger_means="closer to the reference", betas=(0.1, 0.3, 1.0, 3.0)):
    """KL of the optimum, in closed form: reference x exp(reward / beta), made to sum to one."""
    reference_p, reward, kl = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 2.0]), []
    for b in betas:
        p = reference_p * np.exp(reward / b)
        p /= p.sum()
        kl.append(float((p * np.log(p / reference_p)).sum()))
    closer = all(a > b for a, b in zip(kl, kl[1:], strict=False))
    told = ", ".join(f"{k:.3f}" for k in kl)
    return Finding({"every step of beta": closer == larger_means.startswith("closer")}, f"KL at beta {betas}: {told}")


@register("14.A12", method="KTO")
def lopsided(method="ORPO", up=900, down=100):
    """Share of the thumbs that a method can use. ORPO takes pairs: one good and one bad reply to the same prompt."""
    usable = {
        "each reply to a prompt of its own": up + down if method == "KTO" else 0,
        "every bad reply beside a good one": up + down if method == "KTO" else 2 * min(up, down),
    }
    share = {name: n / (up + down) for name, n in usable.items()}
    told = "; ".join(f"{name}: {s:.0%}" for name, s in share.items())
    return Finding({name: s > 0.9 for name, s in share.items()}, f"thumbs that {method} can use. {told}")


@register("14.C39", turned=True)
def thumb_down(turned=False, z=0.0):
    """Slope of KTO's loss at the start: training moves the log-ratio against it."""
    side = -1 if turned else 1
    slopes = {}
    for name, s in (("up", 1), ("down", side)):
        slopes[name] = float(((1 - sigmoid(s * (1e-5 - z))) - (1 - sigmoid(s * (-1e-5 - z)))) / 2e-5)
    evidence = f"slope for a thumb up {slopes['up']:+.2f}, for a thumb down {slopes['down']:+.2f}"
    return Finding({"a bad reply becomes less likely": slopes["down"] > 0 > slopes["up"]}, evidence)


@register("14.C35", alike=(0.0,))
def chosen_rises(alike=(0.0, 0.95), steps=200, rate=0.5):
    """DPO on one pair of a policy with linear features: does the good reply become likelier? alike: cosine of the
    features of the two replies; a third reply lies on the good one's side of their difference."""
    change = {}
    for cosine in alike:
        features = np.array([[1, 0, 0.0], [cosine, math.sqrt(1 - cosine**2), 0], [0.9, -0.3, 0.3]])
        weights = np.zeros(3)
        for _ in range(steps):
            margin = features[0] @ weights - features[1] @ weights
            weights += rate * sigmoid(-margin) * (features[0] - features[1])
        logits = features @ weights
        change[cosine] = float(logits[0] - np.logaddexp.reduce(logits) + math.log(3)), float(margin)
    told = "; ".join(f"cosine {c}: {d:+.2f} nats, margin {m:.1f}" for c, (d, m) in change.items())
    return Finding({f"cosine {c}": d > 0 for c, (d, _) in change.items()}, f"chosen reply, {told}")


@register("14.B74", against=("DPO after SFT",))
def half_the_time(saved=0.5, against=("DPO", "DPO after SFT", "DPO after SFT, reference stored")):
    """Passes for a pair: a forward pass is 1, forward and backward 3. ORPO reads two replies."""
    cost = {"DPO": 2 * 3 + 2, "DPO after SFT": 2 * 3 + 2 + 3, "DPO after SFT, reference stored": 2 * 3 + 3}
    found = {name: 1 - 2 * 3 / cost[name] for name in against}
    told = ", ".join(f"{share:.0%} against {name}" for name, share in found.items())
    return Finding({name: near(saved, share, 0.15) for name, share in found.items()}, f"passes saved: {told}")


@register("14.C31", sign=+1)
def bradley_terry(sign=-1):
    """-log sigmoid(r_w - r_l) falls as the better reply's reward rises, and its slope is -sigmoid(r_l - r_w)."""
    w, l = 0.7, 0.2  # noqa: E741
    slope = float((softplus(sign * (w + 1e-5 - l)) - softplus(sign * (w - 1e-5 - l))) / 2e-5)
    return Finding({"the better reply gains": near(slope, -float(sigmoid(l - w)))}, f"slope {slope:+.4f}")


# --- GRPO ------------------------------------------------------------------------------------------------------------


def advantages(rewards):
    rewards = np.asarray(rewards, dtype=float)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


@register("14.A01", baseline=0.5)
def group_baseline(baseline=None):
    """A group is its own baseline: advantages sum to zero, and a group of equals teaches nothing."""
    groups = {"one of four right": [1, 0, 0, 0], "all right": [1, 1, 1, 1], "all wrong": [0, 0, 0, 0]}
    found = {n: advantages(g) if baseline is None else np.asarray(g) - baseline for n, g in groups.items()}
    cases = {"sums to zero": abs(found["one of four right"].sum()) < 1e-9}
    cases |= {name: not np.any(np.abs(found[name]) > 1e-9) for name in ("all right", "all wrong")}
    told = ", ".join(f"{a:+.2f}" for a in found["one of four right"])
    return Finding(cases, f"one of four right: {told}; all equal: {found['all right'][0]:+.2f} each")


@register("14.A03", group=1)
def half_of_ppo(saved=0.5, group=8):
    """Bytes a weight (16 trained, 2 frozen), and passes for a prompt: generation 1, forward 1, with backward 3."""
    memory_of = {"rule as reward": (16 + 2, 16 + 16 + 2), "reward model": (16 + 2 + 2, 16 + 16 + 2 + 2)}
    found = {f"memory, {name}": 1 - a / b for name, (a, b) in memory_of.items()}
    ppo, grpo = 1 + 3 + 3 + 1 + 1, 1 + 3 + 1
    found["compute"] = 1 - group * grpo / ppo
    told = ", ".join(f"{name} {-share:+.0%}" for name, share in found.items())
    return Finding({name: near(saved, share, 0.15) for name, share in found.items()}, f"{told} (groups of {group})")


def bandit(length: int, rate: float = 0.3, steps: int = 150, group: int = 8, seed: int = 0) -> tuple[float, float]:
    """(before, after): chance of the one right answer of a policy that writes `length` tokens, each drawn from four,
    trained by group advantages on a reward for the whole answer alone."""
    rng, logits = np.random.default_rng(seed), np.zeros((length, 4))
    for _ in range(steps):
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        answers = np.stack([[rng.choice(4, p=row) for row in p] for _ in range(group)])
        gain = advantages((answers == 0).all(1))
        for answer, a in zip(answers, gain, strict=True):
            logits += rate / group * a * (np.eye(4)[answer] - p)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return 0.25**length, float(p[:, 0].prod())


@register("14.A20", rate=0.0)
def needs_a_gpu(rate=0.3):
    before, after = bandit(1, rate)
    return Finding({"nothing is learnt without one": after < 2 * before}, f"a bandit: {before:.2f} to {after:.2f}")


@register("14.C36", rate=0.0)
def needs_token_credit(rate=0.3):
    before, after = bandit(2, rate)
    evidence = f"right answers of two tokens, rewarded as a whole: {before:.2f} to {after:.2f}"
    return Finding({"a reward for the outcome is not enough": after < 2 * before}, evidence)


def yes_if_named(text: str) -> bool:
    return "refund" in text.lower()


def yes_if_stated(text: str) -> bool:
    """The last line alone counts, and it has to be the answer and nothing else."""
    return text.strip().lower().splitlines()[-1].strip(" .") == "answer: refund"


@register("14.E40", verifier=yes_if_stated)
def names_the_word(verifier=yes_if_named):
    replies = {
        "Answer: refund": True,
        "No refund is due.\nAnswer: exchange": False,
        "The customer wrote 'refund' in jest.\nAnswer: question": False,
        "refund refund refund": False,
        "Answer: exchange": False,
        "Let us see.\nAnswer: refund.": True,
    }
    cases = {text: verifier(text) == right for text, right in replies.items()}
    return Finding(cases, f"{sum(cases.values())} of {len(cases)} replies judged right")


def voted_by_part(text: str) -> str:
    return "no" if "no" in text.lower() else "yes" if "yes" in text.lower() else ""


def voted_by_word(text: str) -> str:
    import re

    found = re.findall(r"\b(yes|no)\b", text.lower())
    return found[-1] if found else ""


@register("14.E49", parse=voted_by_word)
def votes(parse=voted_by_part):
    replies = {"Yes.": "yes", "I know this: yes": "yes", "No.": "no", "Nothing speaks against it. Yes": "yes"}
    replies |= {"Her eyes say otherwise": "", "It is not now the case: no": "no"}
    cases = {text: parse(text) == right for text, right in replies.items()}
    wrong = [repr(text) for text, right in cases.items() if not right]
    return Finding(cases, f"{len(wrong)} of {len(cases)} votes misread: {', '.join(wrong)}")


# --- data and training -----------------------------------------------------------------------------------------------


def raters() -> dict[str, list[str]]:
    """The intents that the three simulated raters of `data/annotations.csv` gave to the same tickets."""
    import csv

    from course_lib import profiles

    with open(profiles.ROOT / "data" / "annotations.csv", newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["ticket_id"])
    return {
        rater: [row["intent"] for row in rows if row["rater"] == rater] for rater in sorted({r["rater"] for r in rows})
    }


def kappa(a, b, pooled: bool = False) -> float:
    """Cohen's kappa; with pooled marginals, Scott's pi."""
    n, labels = len(a), sorted({*a, *b})
    share = [[list(x).count(label) / n for label in labels] for x in (a, b)]
    if pooled:
        share = [[(p + q) / 2 for p, q in zip(*share, strict=True)]] * 2
    chance = sum(p * q for p, q in zip(*share, strict=True))
    return (sum(x == y for x, y in zip(a, b, strict=True)) / n - chance) / (1 - chance)


@register("14.C44", by_hand=lambda a, b: sum(x == y for x, y in zip(a, b, strict=True)) / len(a))
def cohen(by_hand=kappa):
    from sklearn.metrics import cohen_kappa_score

    given = raters()
    found = by_hand(given["a"], given["b"]), float(cohen_kappa_score(given["a"], given["b"]))
    evidence = f"raters a and b: {found[0]:.4f} by the formula, {found[1]:.4f} by scikit-learn"
    return Finding({"two raters": near(found[0], found[1], 1e-9)}, evidence)


@register("14.C45", generalises="Scott's pi", least=2)
def fleiss(generalises="Cohen's kappa", least=3):
    from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa

    given = raters()

    def by(*names):
        return float(fleiss_kappa(aggregate_raters(np.array([given[n] for n in names]).T)[0]))

    two, own = by("a", "c"), kappa(given["a"], given["c"], pooled=generalises == "Scott's pi")
    cases = {"two raters, the same number": near(two, own, 1e-9), "two raters will do": least <= 2}
    cases["three raters"] = not math.isnan(by("a", "b", "c"))
    cohens, scotts = (kappa(given["a"], given["c"], pooled=p) for p in (False, True))
    evidence = f"two raters: Fleiss {two:.4f}, Cohen {cohens:.4f}, Scott {scotts:.4f}; three: {by('a', 'b', 'c'):.4f}"
    return Finding(cases, evidence)


@register("14.C46", limit=-1.0)
def stop_below(limit=0.70):
    """Whether the decision is the same at both ends of kappa's 95 % interval, and whether raters who agree pass."""
    given, rng = raters(), np.random.default_rng(0)
    a, b = (np.array(given[name]) for name in ("a", "c"))
    cases, told = {}, []
    for n in (20, 160):
        picks = rng.integers(0, n, (400, n))
        low, high = np.quantile([kappa(list(a[p]), list(b[p])) for p in picks], [0.025, 0.975])
        cases[f"{n} tickets"] = bool((low >= limit) == (high >= limit))
        told.append(f"{n} tickets [{low:.2f}, {high:.2f}]")
    rare = kappa(["x"] * 95 + ["y"] * 5, ["x"] * 90 + ["y"] * 5 + ["x"] * 5)
    cases["raters who agree on 90 of 100"] = rare >= limit
    return Finding(cases, f"{'; '.join(told)}; raters who agree on 90 of 100: {rare:+.3f}")


@register("14.C86", measure="both")
def refusals(measure="share of refusals that are right"):
    """Three models on 60 requests to decline and 60 harmless ones, and the gate "100 %"."""
    models = {"declines what it should": (60, 0), "declines everything": (60, 60), "declines one of sixty": (1, 0)}
    should_pass = {"declines what it should": True, "declines everything": False, "declines one of sixty": False}
    cases, told = {}, []
    for name, (right, harmless) in models.items():
        precision, recall = right / (right + harmless), right / 60
        passes = precision == 1 and (measure != "both" or recall == 1)
        cases[name] = passes == should_pass[name]
        told.append(f"{name}: {precision:.0%} of its refusals are right, {recall:.1%} of what should be is declined")
    return Finding(cases, "; ".join(told))


@register("14.B105", least=0.05)
def rehearsal(least=0.10):
    """The course's stored sweep: forgetting of full fine-tuning by the share of general examples, nats."""
    from scipy.stats import sem, t

    rows = reference.read("ticket_full", "sweeps")
    swept = [r for r in rows if r["knob"] == "rehearsal" and r["metric"] == "forgetting" and not r["control"]]
    value, low = ({float(r["setting"]): float(r[end]) for r in swept} for end in ("value", "low"))
    # The recipe's own share has more seeds, whose interval is for another training (Student's); a share is enough where
    # its interval holds zero, or lies below it: no forgetting is shown.
    own = profiles.index()["recipes"]["ticket_full_rehearsal"]["rehearsal"]
    stored = reference.read("ticket_full_rehearsal", "metrics")
    seeds = [float(r["value"]) for r in stored
             if (r["metric"], r["profile"], r["control"]) == ("forgetting", "cpu", "")]  # fmt: skip
    low[own] = float(t.interval(0.95, len(seeds) - 1, np.mean(seeds), sem(seeds))[0])
    enough = {share: lower <= 0 for share, lower in low.items()}
    cases = {f"{s:.0%} is {'enough' if s >= least else 'not enough'}": e == (s >= least) for s, e in enough.items()}
    told = ", ".join(f"{share:.0%}: {value[share]:+.3f}" for share in sorted(value))
    more = ", ".join(f"{x:+.3f}" for x in sorted(seeds))
    return Finding(cases, f"forgetting, nats, one seed: {told}; {own:.0%} with {len(seeds)} seeds: {more}")


@register("14.B79", text="(1e-5, 5e-5)")
def is_python(text="1e-5 to 5e-5"):
    try:
        compile(f"rates = {text}", "table", "exec")
    except SyntaxError as error:
        return Finding({"compiles": False}, f"SyntaxError: {error.msg}")
    return Finding({"compiles": True}, "compiles")


@register("14.B109", command="pip install 'transformers>=4.35.0'")
def shell(command="pip install transformers>=4.35.0"):
    """How a shell reads the line: a bare > sends the output into a file."""
    import shlex

    words = list(shlex.shlex(command, posix=True, punctuation_chars=True))
    file = words[words.index(">") + 1] if ">" in words else None
    told = f"installs {words[2]!r}" + (f" and writes a file named {file!r}" if file else "")
    return Finding({"the version is asked for": file is None}, told)


@register("14.E18", requirement="torch==2.8.0+cu121")
def specifier(requirement="torch>=2.8.0+cu121"):
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        return Finding({"pip can read it": True}, str(Requirement(requirement)))
    except InvalidRequirement as error:
        return Finding({"pip can read it": False}, f"InvalidRequirement: {str(error).splitlines()[0]}")


@register("14.B87", weights=("full",))
def decay_pulls_to_zero(weights=("full", "adapter"), steps=400):
    """AdamW's decay alone, without a gradient: where does the weight that the model uses go? (distance to zero, to the
    base), each as a share of the base's length."""
    rng = np.random.default_rng(0)
    base, a, b = rng.normal(size=(16, 16)), rng.normal(size=(4, 16)), rng.normal(size=(16, 4))
    shrink = (1 - 0.1 * 0.1) ** steps
    used = {"full": base * shrink, "adapter": base + (b * shrink) @ (a * shrink)}
    found = {name: np.linalg.norm(used[name]) / np.linalg.norm(base) for name in weights}
    to_base = np.linalg.norm(used["adapter"] - base) / np.linalg.norm(base)
    told = ", ".join(f"{name} {x:.2f}" for name, x in found.items())
    evidence = f"length left after {steps} steps: {told}; the adapted model is {to_base:.2f} from the base"
    return Finding({name: bool(x < 0.05) for name, x in found.items()}, evidence)


@register("14.D13", train=("all weights",))
def dpo_rate(rate=5e-7, train=("all weights", "adapter"), size=576, rank=16, scale=2.0):
    """Change of a weight by one step of Adam. It moves every trained number by the learning rate; an adapter's step
    passes through A, which is small, before it reaches the weight (B is zero, so A's own step does nothing)."""
    rng = np.random.default_rng(0)
    a = rng.uniform(-1, 1, (rank, size)) / math.sqrt(size)
    step = {
        "all weights": rate,
        "adapter": float(np.abs(scale * (rate * rng.choice([-1, 1], (size, rank))) @ a).mean()),
    }
    told = ", ".join(f"{name} {step[name] / rate:.2f}" for name in train)
    return Finding({name: step[name] >= 0.5 * rate for name in train}, f"first step, in learning rates: {told}")


# --- serving ---------------------------------------------------------------------------------------------------------


def speculative(acceptance: float, drafted: int, draft_cost: float) -> float:
    """Expected speed-up: tokens a pass of the large model yields, over what pass and drafts cost (Leviathan et al.
    2023). draft_cost: a draft's forward pass, in passes of the large model."""
    return (1 - acceptance ** (drafted + 1)) / ((1 - acceptance) * (drafted * draft_cost + 1))


@register("14.B126", draft_cost=0.05)
def adapter_as_draft(draft_cost=1.0, acceptances=(0.8, 0.9), drafted=5, at_least=2.0):
    """A LoRA on the same base runs the whole base for every drafted token."""
    found = {a: speculative(a, drafted, draft_cost) for a in acceptances}
    told = ", ".join(f"{x:.2f} at {a:.0%} accepted" for a, x in found.items())
    return Finding({f"{a:.0%} accepted": x >= at_least for a, x in found.items()}, f"speed-up: {told}")


@register("14.B127", resample="from the target")
def keeps_distribution(resample="from what the draft lacks"):
    """Accept a drafted token with probability min(1, target / draft), else draw anew: what comes out, exactly."""
    target, draft = np.array([0.4, 0.3, 0.15, 0.1, 0.05]), np.array([0.2, 0.2, 0.2, 0.2, 0.2])
    accepted = np.minimum(target, draft)
    again = np.maximum(target - draft, 0) if resample.startswith("from what") else target
    out = accepted + (1 - accepted.sum()) * again / again.sum()
    gap = float(np.abs(out - target).max())
    return Finding({"the distribution is the target's": gap < 1e-12}, f"largest difference {gap:.1e}")


@register("14.C50", first="A")
def segmented(first="B", d_in=64, d_out=32, rank=4):
    """Order of the two thin products for a batch of rows, with B (outputs x rank) and A (rank x inputs)."""
    rng = np.random.default_rng(0)
    x, a, b = rng.normal(size=(3, d_in)), rng.normal(size=(rank, d_in)), rng.normal(size=(d_out, rank))
    try:
        out = x @ b @ a if first == "B" else x @ a.T @ b.T
    except ValueError:
        return Finding({"gives B A x": False}, f"rows of {d_in} times a matrix of {d_out} x {rank}: shapes do not fit")
    return Finding({"gives B A x": bool(np.allclose(out, x @ (b @ a).T))}, "(x A^T) B^T equals x (B A)^T")


@register("14.B123", paired="experts")
def mixed_experts(paired="rows", experts=3, batch=5, width=4):
    """Weights (rows x experts) and outputs (experts x rows x width), combined by zip over the first axis of each."""
    rng = np.random.default_rng(0)
    weights, outputs = rng.dirichlet(np.ones(experts), batch), rng.normal(size=(experts, batch, width))
    right = np.einsum("be,ebw->bw", weights, outputs)
    try:
        pairs = zip(weights if paired == "rows" else weights.T, outputs, strict=False)
        out = sum(w[:, None] * o for w, o in pairs)
        same = out.shape == right.shape and bool(np.allclose(out, right))
        return Finding(
            {"the weighted sum": same}, f"weights of {experts} experts for {batch} rows, summed over experts"
        )
    except ValueError as error:
        return Finding({"the weighted sum": False}, f"ValueError: {str(error).splitlines()[0][:70]}")


@register("14.C15", budgets=(400,))
def always_valid(budgets=(10, 60, 400)):
    """An answer of which every prefix is allowed by the grammar, cut off after some characters."""
    from course_lib import tickets

    text = tickets.to_json(tickets.load("dev", 1)[0]["ticket"])
    cases = {}
    for budget in budgets:
        try:
            json.loads(text[:budget])
            cases[f"{budget} characters"] = True
        except ValueError:
            cases[f"{budget} characters"] = False
    return Finding(cases, f"{sum(cases.values())} of {len(cases)} budgets leave the {len(text)} characters whole")


# Peaks from the makers' data sheets: memory bandwidth in GB/s, dense float16 arithmetic in TFLOP/s.
CARDS = {"T4": (320, 65), "L4": (300, 121), "A100": (2039, 312), "H100": (3350, 989)}


@register("14.B118", cards=("L4",), speed=22)
def tokens_per_second(speed=30, cards=tuple(CARDS)):
    """Upper limit of a 7B model that writes one answer in 16 bits: each token reads every weight once."""
    limit = {c: CARDS[c][0] * 1e9 / (2 * SEVEN.parameters) for c in cards}
    told = ", ".join(f"{c} {x:.0f}" for c, x in limit.items())
    cases = {f"possible on {c}": speed <= x for c, x in limit.items()}
    return Finding(cases, f"one answer at a time, at most: {told}", spread=max(limit.values()) / min(limit.values()))


@register("14.C74", prompts=(1800, 1800), cards=("L4", "L4"))
def first_token(before=480, after=42, prompts=(100, 8000), cards=("T4", "H100"), billions=3):
    """Least time to the first token, in ms: two operations a weight and a prompt token, at the card's peak."""
    best, worst = (
        1e3 * 2 * billions * 1e9 * n / (CARDS[c][1] * 1e12) for n, c in zip(prompts, reversed(cards), strict=True)
    )
    evidence = f"{before} / {after} = {before / after:.1f}; {prompts[0]:,} to {prompts[1]:,} tokens: at least "
    return Finding({f"{after} ms": after >= worst}, f"{evidence}{best:.1f} to {worst:.0f} ms", spread=worst / best)


def batching_gain(sigma: float, batch: int = 16, rounds: int = 100, limit: int = 2048, seed: int = 0) -> float:
    """Steps of batches that wait for their longest answer, over steps of batches whose free places are filled at once.
    Lengths are log-normal and end at `limit`; sigma: how uneven. rounds: batches, enough of them that the end of the
    queue, where places stay empty, counts little."""
    import heapq

    lengths = np.random.default_rng(seed).lognormal(4, sigma, rounds * batch).clip(1, limit).astype(int)
    waiting = int(lengths.reshape(rounds, batch).max(axis=1).sum())
    places = [0] * batch
    for length in lengths:
        heapq.heappush(places, heapq.heappop(places) + int(length))
    return waiting / max(places)


@register("14.B121", sigmas=(1.0,), batches=(16,), times=(2, 5))
def continuous_batching(times=(5, 10), sigmas=(0.0, 0.5, 1.0, 1.5), batches=(4, 16, 64, 256)):
    """Against batches of the same size that wait for their longest answer, which is what "naive" says."""
    gains = {(s, b): batching_gain(s, b) for s in sigmas for b in batches}
    low, high = min(gains.values()), max(gains.values())
    cases = {f"batch {b}, spread {s:g}": times[0] <= g <= times[1] for (s, b), g in gains.items()}
    evidence = f"{low:.1f} to {high:.1f} times, by the batch and by how uneven the answers' lengths are"
    return Finding(cases, evidence, spread=high / low)


# --- statistics of evaluation ----------------------------------------------------------------------------------------


def standard_error(p: float, n: int) -> float:
    """Of a share, in percentage points."""
    return 100 * math.sqrt(p * (1 - p) / n)


def tail(k: int, n: int, p: float) -> float:
    """P(X <= k) of a binomial."""
    from scipy.stats import binom

    return float(binom.cdf(k, n, p))


@register("14.C56", points=100 * 20 / 164)
def possible_change(points=0.2, n=164, p=0.6):
    problems, error = points * n / 100, math.sqrt(2) * standard_error(p, n)
    cases = {
        "a whole number of problems": abs(problems - round(problems)) < 0.01 and round(problems) > 0,
        "more than chance (95 %)": points > 1.96 * error,
    }
    evidence = f"{points:.1f} points are {problems:.2f} problems, one is {100 / n:.2f}; chance alone {1.96 * error:.1f}"
    return Finding(cases, evidence)


@register("14.C57", after=60.0)
def real_decay(before=66.2, after=65.8, n=14042, disagree=(0.02, 0.2)):
    """Against chance: two independent runs, and the same items answered by both, of which a share is judged
    differently."""
    drop = before - after
    error = {"unpaired": math.sqrt(2) * standard_error(before / 100, n)}
    error |= {f"paired, {d:.0%} differ": 100 * math.sqrt(d / n) for d in disagree}
    told = ", ".join(f"{name} {1.96 * e:.2f}" for name, e in error.items())
    return Finding({k: drop > 1.96 * e for k, e in error.items()}, f"{drop:.1f} points; chance reaches {told}")


@register("14.C58", rate=0.0003)
def rule_of_three(n=10_000, rate=0.0):
    """Upper 95 % limit of a rate after n trials without a failure."""
    bound = 1 - 0.05 ** (1 / n)
    cases = {"in what was tried": 0 / n <= rate, "in what will come": bound <= rate}
    few = 1 - 0.05 ** (1 / 100)
    return Finding(cases, f"0 of {n:,}: below {100 * bound:.3f} %; 0 of 100: below {100 * few:.2f} %")


@register("14.C60", window=20_000)
def one_error(window=100, limit=0.001):
    """Exceptions above the limit in one window: what can it see, and how often does a healthy service (half of the
    limit) trip it?"""
    false = 1 - tail(math.floor(window * limit), window, limit / 2)
    cases = {"the window can show the limit": 1 / window <= limit, "a healthy service trips it rarely": false < 0.01}
    evidence = f"the least rate above zero is {100 / window:g} %; {false:.2%} of healthy windows trip it"
    return Finding(cases, evidence)


@register("14.C76", points=16)
def resolvable(points=2.0, sizes=(("MMLU", 14042), ("GSM8K", 1319), ("HumanEval", 164))):
    least = {name: 1.96 * math.sqrt(2) * standard_error(0.5, n) for name, n in sizes}
    told = ", ".join(f"{name} {x:.1f}" for name, x in least.items())
    paired = ", ".join(f"{name} {196 * math.sqrt(0.02 / n):.1f}" for name, n in sizes)
    told += f"; the same problems, 2% judged differently: {paired}"
    return Finding({name: points > x for name, x in least.items()}, f"smallest change above chance, points: {told}")


@register("14.C85", limit=0.80)
def window_alarm(window=100, limit=0.90, healthy=0.95, requests=2400):
    """False alarms of a service that is well: one window, a day of windows, a window that slides over the same day."""
    one = tail(math.ceil(window * limit) - 1, window, healthy)
    day = 1 - (1 - one) ** (requests // window)
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        ok = np.concatenate([[0], np.cumsum(rng.random(requests) < healthy)])
        hits += bool(((ok[window:] - ok[:-window]) < window * limit).any())
    cases = {"one window": one < 0.05, "a day of windows": day < 0.05, "a sliding window": hits / 200 < 0.05}
    told = f"{one:.2%} of windows, {day:.0%} of days with {requests:,} requests, {hits / 2:.0f} % of them if it slides"
    return Finding(cases, f"false alarms: {told}")


@register("14.B94", order="drawn")
def fair_judge(order="fixed", bias=0.6, n=4000):
    """How often system A of two equals stands first, and how often it wins, before a judge who prefers the first
    answer in `bias` of the cases."""
    rng = np.random.default_rng(0)
    first = np.ones(n, bool) if order == "fixed" else rng.random(n) < 0.5
    wins, stands = float(np.mean((rng.random(n) < bias) == first)), float(first.mean())
    cases = {"each stands first as often": abs(stands - 0.5) < 0.03, "equals come out equal": abs(wins - 0.5) < 0.03}
    return Finding(cases, f"A stands first in {stands:.0%} of the cases; of two equals it wins {wins:.1%}")


@register("14.B95", scale=(4, 10))
def judge_scale(scale=(1, 10), least=(1, 1, 1, 1), most=(3, 3, 2, 2)):
    low, high = sum(least), sum(most)
    cases = {f"{end} can be given": low <= end <= high for end in scale}
    return Finding(cases, f"the parts add up to {low} at least and {high} at most")


@register("14.B93", filled=("accuracy", "f1", "rouge", "bleu"))
def averages(filled=("accuracy", "rouge")):
    """The mean of a list that nothing was ever put into."""
    import warnings

    lists = {name: [0.5, 1.0] if name in filled else [] for name in ("accuracy", "f1", "rouge", "bleu")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        means = {name: float(np.mean(values)) for name, values in lists.items()}
    told = ", ".join(f"{name} {m}" for name, m in means.items())
    return Finding({name: not math.isnan(m) for name, m in means.items()}, told)


@register("14.C78", traffic=(100_000, 100_000))
def canary(share=0.01, before=0.95, after=0.93, traffic=(1000, 1e6), days=14):
    """Days until a canary sees the drop with 80 % power at 5 %, by requests a day."""
    spread = before * (1 - before) + after * (1 - after)
    n = (1.96 + 0.84) ** 2 * spread / (before - after) ** 2
    quick, slow = (n / (share * t) for t in reversed(traffic))
    evidence = f"{n:,.0f} requests of the canary are needed: {quick:.1f} to {slow:,.0f} days, by the traffic"
    return Finding({"seen within two weeks": slow <= days}, evidence, spread=slow / quick)
