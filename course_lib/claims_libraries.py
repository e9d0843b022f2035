"""Checks of claims by what the pinned libraries do. See `claims` for the rule.

Nothing here loads the course's model: shapes are built on PyTorch's meta device, which holds no weights, and behaviour
is tried on a random model of two blocks.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import tempfile
import warnings
from pathlib import Path

import torch

from course_lib import memory, reference
from course_lib.claims import Finding, near, register

SEVEN = memory.SHAPES["Llama-2-7B"]
QV, QKVO = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]


def tiny(seed: int = 0, **changes):
    """A Llama of two blocks with random weights in float32, the same for the same seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.2, "eos_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**sizes | {"pad_token_id": 0} | changes)).eval()


def lora(base, seed: int = 0, std: float = 0.2, **options):
    """`base` with a LoRA whose B is random, so that it does something."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": QV} | options))
        for name, p in model.named_parameters():
            if "lora_B" in name and std:
                torch.nn.init.normal_(p, std=std)
    return model.eval()


IDS = torch.arange(5, 17)[None]


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits


def gap(a, b) -> float:
    return float((a - b).detach().abs().max())


@functools.cache
def trainable(method: str, **options) -> int:
    """Trainable weights that PEFT gives a Llama-2-7B, on the meta device."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    s = SEVEN
    config = LlamaConfig(hidden_size=s.hidden, intermediate_size=s.inner, num_hidden_layers=s.blocks,
                         num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, vocab_size=s.vocab)  # fmt: skip
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    with torch.device("meta"):
        made = getattr(peft, method)(task_type="CAUSAL_LM", **options)
        model = peft.get_peft_model(LlamaForCausalLM(config), made)
    return model.get_nb_trainable_parameters()[0]


def flops(model, ids=IDS, backward: bool = False) -> int:
    """Floating-point operations of the matrix products of a pass, as PyTorch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        out = model(input_ids=ids, labels=ids, use_cache=False)
        if backward:
            out.loss.backward()
    return counter.get_total_flops()


def quiet() -> None:
    """No bars while models of a few kilobytes are saved and loaded."""
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging

    disable_progress_bar()
    logging.disable_progress_bar()


def refusal(call) -> str | None:
    """The first line of the error with which a call is refused, None where it is not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return None


def accepted(what: str, call, once=None) -> Finding:
    """The finding on a call that a claim shows as working."""
    found = refusal(call)
    return Finding({what: found is None}, found or f"{what}: accepted", once=once)


# --- memory and quantisation -----------------------------------------------------------------------------------------


def nf4_as_printed():
    """Midpoints of the quantiles i / 17 and (i + 1) / 17 of a Gaussian, divided by the largest."""
    from statistics import NormalDist

    q = [-math.inf if i == 0 else NormalDist().inv_cdf(i / 17) for i in range(17)]
    codes = [(a + b) / 2 for a, b in zip(q, q[1:], strict=False)]
    return [c / max(codes) for c in codes]


def nf4_as_built(offset=0.9677083):
    """Eight positive quantiles, zero, and seven negative ones, evenly spaced in probability up to `offset`."""
    from statistics import NormalDist

    positive = [NormalDist().inv_cdf(0.5 + (offset - 0.5) * i / 8) for i in range(1, 9)]
    negative = [-NormalDist().inv_cdf(0.5 + (offset - 0.5) * i / 7) for i in range(7, 0, -1)]
    return [c / max(positive) for c in [*negative, 0.0, *positive]]


@register("14.C22", formula=nf4_as_built)
def nf4_codes(formula=nf4_as_printed):
    """Which of bitsandbytes' sixteen codes a formula gives, wherever in its list they stand."""
    from bitsandbytes.functional import get_4bit_type

    table = get_4bit_type("nf4", device="cpu").tolist()
    codes = formula()
    cases = {f"code {is_:.4f}": any(abs(code - is_) < 1e-4 for code in codes) for is_ in table}
    given = [is_ for is_, found in zip(table, cases.values(), strict=True) if found]
    few = ": " + ", ".join(f"{is_:.0f}" for is_ in given) if len(given) < 4 else ""
    return Finding(cases, f"{len(given)} of 16 codes are bitsandbytes'{few}; the formula's first is {codes[0]:.3f}")


@register("14.C23", tolerance=5.0)
def nf4_equal_use(tolerance=0.2):
    """How often each code is used on Gaussian weights in blocks of 64: equal bins would be 1/16 each."""
    from bitsandbytes.functional import quantize_4bit

    w = torch.randn(1024, 256, generator=torch.Generator().manual_seed(0))
    packed, _ = quantize_4bit(w, blocksize=64, quant_type="nf4")
    used = torch.cat([packed.flatten() >> 4, packed.flatten() & 15]).long().bincount(minlength=16) / w.numel()
    cases = {f"code {i}": near(share, 1 / 16, tolerance) for i, share in enumerate(used.tolist())}
    return Finding(cases, f"shares from {used.min():.1%} to {used.max():.1%}; equal would be {1 / 16:.2%}")


@functools.cache
def relative_error(kind: str) -> float:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    w = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    back = dequantize_4bit(*quantize_4bit(w, blocksize=64, quant_type=kind))
    return float((back - w).norm() / w.norm())


@register("14.C17", kind="none")
def same_footprint(kind="nf4"):
    """QLoRA's adapter has LoRA's size; the weights beneath it are others."""
    error = 0.0 if kind == "none" else relative_error(kind)
    evidence = f"same adapter; the frozen weights differ by {error:.1%} (Gaussian weights, blocks of 64)"
    trained = memory.plan(SEVEN, "qlora").gradients == memory.plan(SEVEN, "lora").gradients
    return Finding({"as many trained weights": trained, "the weights beneath them": error < 0.01}, evidence)


@register("14.B77", bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
def qlora_by_default(**settings):
    from transformers import BitsAndBytesConfig

    c = BitsAndBytesConfig(load_in_4bit=True, **settings)
    kind, double = c.bnb_4bit_quant_type, c.bnb_4bit_use_double_quant
    errors = ", ".join(f"{k} {relative_error(k):.3f}" for k in ("fp4", "nf4"))
    evidence = f"type {kind}, double quantisation {double}; relative error {errors}"
    return Finding({"NF4": kind == "nf4", "double quantisation": double}, evidence)


@functools.cache
def merged_in_four_bits():
    """(what `.to(float16)` answers, error of a merge into 4-bit weights, error of the 4-bit base with the adapter
    beside it), errors of the logits against the float32 model with the adapter, relative."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from course_lib import guards

    quiet()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny().save_pretrained(folder)
        four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

        def load():
            base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four, device_map={"": "cpu"})
            guards.keep_unpacked(base)
            return lora(base, std=0.05)

        beside = logits(load())
        merged = load().merge_and_unload()
        said = refusal(lambda: merged.to(torch.float16))
        after = logits(merged)
        right = logits(lora(AutoModelForCausalLM.from_pretrained(folder), std=0.05).merge_and_unload())
    return said, *(float((x - right).norm() / right.norm()) for x in (after, beside))


@register("14.B40", route="16-bit base")
def merge_into_four_bits(route="4-bit base"):
    said, merged, beside = merged_in_four_bits()
    if route != "4-bit base":
        base = tiny()
        model = lora(copy.deepcopy(base), std=0.05)
        error = gap(logits(model), logits(copy.deepcopy(model).merge_and_unload()))
        return Finding({"merges": error < 1e-3}, f"difference {error:.0e}")
    cases = {"turns into float16": said is None, "adds no error": merged <= beside * 1.001}
    return Finding(cases, f"{said}; error of the logits {merged:.3f} merged, {beside:.3f} with the adapter beside")


@register("14.B03", dtype="float16")
def loads_as(dtype="float32"):
    from transformers import AutoModelForCausalLM

    quiet()
    with tempfile.TemporaryDirectory() as folder:
        tiny().half().save_pretrained(folder)
        found = str(AutoModelForCausalLM.from_pretrained(folder).dtype).removeprefix("torch.")
    return Finding({"a float16 checkpoint": found == dtype}, f"loaded as {found}", once=("transformers", "4.57"))


@register("14.B103", better="float16")
def wider_range(better="bfloat16"):
    largest = {name: torch.finfo(getattr(torch, name)).max for name in ("float16", "bfloat16", "float32")}
    other = {"bfloat16": "float16", "float16": "bfloat16"}[better]
    big = {name: torch.tensor(70_000.0).to(getattr(torch, name)).item() for name in ("float16", "bfloat16")}
    evidence = ", ".join(f"{name} up to {x:.3g}" for name, x in largest.items())
    cases = {"range": largest[better] > largest[other], "70,000 stays finite": math.isfinite(big[better])}
    return Finding(cases, f"{evidence}; 70,000 becomes {big['float16']} and {big['bfloat16']:.0f}")


@register("14.E12", sizes=(1.0,))
def bare_cast(sizes=(1e-3, 1.0, 1e3)):
    """Casting to float8_e4m3 without a scale, for values of three sizes."""
    x, errors = torch.randn(4096, generator=torch.Generator().manual_seed(0)), {}
    for size in sizes:
        back = (x * size).to(torch.float8_e4m3fn).float()
        errors[size] = float((back - x * size).norm() / (x * size).norm()) if back.isfinite().all() else math.inf
    scale = 448 / x.abs().max()  # 448 is the largest number of the format
    scaled = float(((x * scale).to(torch.float8_e4m3fn).float() / scale - x).norm() / x.norm())
    told = ", ".join(f"{e:.3g} at size {size:g}" for size, e in errors.items())
    cases = {f"size {size:g}": e < 2 * scaled for size, e in errors.items()}
    return Finding(cases, f"error {told}; {scaled:.3f} with a scale")


# --- LoRA and its family ---------------------------------------------------------------------------------------------


@register("14.B18", tolerance=0.05)
def dora_size(tolerance=0.0):
    plain, dora = (trainable("LoraConfig", r=16, target_modules=tuple(QV), use_dora=d) for d in (False, True))
    base, steps = tiny(), {}
    for name, use in (("LoRA", False), ("DoRA", True)):
        steps[name] = flops(lora(copy.deepcopy(base), use_dora=use, target_modules="all-linear").train())
    ratio = steps["DoRA"] / steps["LoRA"]
    cases = {"same number": dora <= plain * (1 + tolerance), "similar cost": tolerance > 0 or ratio < 1.05}
    return Finding(
        cases, f"{dora:,} against {plain:,} ({dora / plain - 1:+.1%}); operations of a pass: {ratio:.2f} times"
    )


@register("14.A07", merged=(True,))
def dora_inference(merged=(True, False)):
    base = tiny()
    plain, cost = flops(base), {}
    for merge in merged:
        model = lora(copy.deepcopy(base), use_dora=True, target_modules="all-linear")
        cost["merged" if merge else "unmerged"] = flops(model.merge_and_unload() if merge else model) / plain
    told = ", ".join(f"{name} {x:.2f} times" for name, x in cost.items())
    return Finding({name: near(1, x, 1e-9) for name, x in cost.items()}, f"operations of the base: {told}")


@register("14.B15", merged=False)
def lora_inference(merged=True):
    base = tiny()
    model = lora(copy.deepcopy(base), target_modules="all-linear")
    before, out = flops(base), logits(model)
    used = model.merge_and_unload() if merged else model
    error, ratio = gap(logits(used), out), flops(used) / before
    return Finding(
        {"no added operations": ratio == 1, "same answers": error < 1e-3},
        f"{ratio:.2f} times the base's operations, answers differ by {error:.0e}",
    )


@register("14.C05", ways=("merged",), swaps=False)
def swap_for_nothing(ways=("merged", "beside the weights"), swaps=True):
    base = tiny()
    model = lora(copy.deepcopy(base), target_modules="all-linear")
    added, can_swap, plain = {}, {}, flops(base)
    for way, used in (("beside the weights", lambda: model), ("merged", model.merge_and_unload)):
        added[way], can_swap[way] = flops(used()) / plain, hasattr(used(), "set_adapter")
    cases = {f"{way}: nothing added": added[way] == 1 for way in ways}
    cases |= {f"{way}: swapped at once": can_swap[way] for way in ways} if swaps else {}
    return Finding(cases, ", ".join(f"{way} {added[way]:.2f} times the operations" for way in ways))


@register("14.B07", down="A")
def which_is_down(down="B"):
    layer = lora(tiny()).base_model.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    first = {"A": a, "B": b}[down]
    evidence = f"A is {tuple(a.shape)}, B is {tuple(b.shape)}: A is applied first, and goes down to the rank"
    return Finding({f"{down} maps inputs to the rank": tuple(first.shape) == (4, 64)}, evidence)


@register("14.C07", alphas=(4,))
def scale_left_out(alphas=(4, 8)):
    """W + B A against what PEFT merges, at rank 4."""
    errors = {}
    for alpha in alphas:
        model = lora(tiny(), lora_alpha=alpha)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        by_hand = layer.base_layer.weight + layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        merged = model.merge_and_unload().model.layers[0].self_attn.q_proj.weight
        errors[alpha] = gap(by_hand, merged)
    told = ", ".join(f"alpha {a}: {e:.1e}" for a, e in errors.items())
    return Finding({f"alpha {a}, rank 4": e < 1e-5 for a, e in errors.items()}, f"largest difference, {told}")


@register("14.C03", zero="A")
def starts_as_the_base(zero="B"):
    base = tiny()
    model = lora(copy.deepcopy(base), std=0)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    part = {"A": layer.lora_A, "B": layer.lora_B}[zero]["default"].weight
    error = gap(logits(model), logits(base))
    cases = {f"{zero} is zero": not part.any().item(), "logits are the base's": error < 1e-6}
    return Finding(cases, f"largest entry of {zero} {part.abs().max():.3f}, logits differ by {error:.1e}")


@register("14.C21", inits=("gaussian",))
def starts_gaussian(inits=(True, "gaussian")):
    """Kurtosis of A: 3 for a Gaussian, 1.8 for a uniform distribution."""
    found = {}
    for init in inits:
        model = lora(tiny(hidden_size=512, num_attention_heads=8), std=0, r=64, init_lora_weights=init)
        a = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
        found["default" if init is True else init] = (((a - a.mean()) ** 4).mean() / a.var() ** 2).item()
    told = ", ".join(f"{name} {k:.2f}" for name, k in found.items())
    cases = {name: near(3, k, 0.1) for name, k in found.items()}
    return Finding(cases, f"kurtosis of A: {told}; 3 is Gaussian, 1.8 uniform")


@register("14.B17", by="optimizer")
def lora_plus(by="use_rslora"):
    """LoRA+ trains B at a higher rate than A."""
    from peft.optimizers import create_loraplus_optimizer

    model = lora(tiny(), r=16, lora_alpha=32, use_rslora=by == "use_rslora")
    scale = model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"]
    if by == "optimizer":
        made = create_loraplus_optimizer(model, torch.optim.AdamW, lr=2e-4, loraplus_lr_ratio=16)
    else:
        made = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    owner = {id(p): name for name, p in model.named_parameters()}
    rate = {"lora_A": set(), "lora_B": set()}
    for group in made.param_groups:
        for p in group["params"]:
            rate[next(part for part in rate if part in owner[id(p)])].add(group["lr"])
    told = " and ".join(f"{part[-1]} {min(rates):g}" for part, rates in rate.items())
    evidence = f"learning rates: {told}; scale of the update {scale:g}"
    return Finding({"B learns faster than A": min(rate["lora_B"]) > max(rate["lora_A"])}, evidence)


@register("14.D07", rescaled="factor")
def rank_stabilised(rescaled="rank"):
    found = {}
    for use in (False, True):
        layer = lora(tiny(), r=16, lora_alpha=32, use_rslora=use).base_model.model.model.layers[0].self_attn.q_proj
        found[use] = {"rank": layer.r["default"], "factor": layer.scaling["default"]}
    evidence = f"rank {found[False]['rank']} and {found[True]['rank']}, factor {found[False]['factor']:g} and "
    moved = found[True][rescaled] != found[False][rescaled]
    return Finding({f"the {rescaled} changes": moved}, f"{evidence}{found[True]['factor']:g}")


@register("14.B10", optimizers=("Adam",))
def effective_rate(optimizers=("Adam", "SGD"), alphas=(8, 16, 32, 64)):
    """Whether the first step's change of the weights grows as alpha / r."""
    found = {}
    for name in optimizers:
        sizes = []
        for alpha in alphas:
            model = lora(tiny(), std=0, r=8, lora_alpha=alpha).train()
            trained = [p for p in model.parameters() if p.requires_grad]
            make = torch.optim.Adam if name == "Adam" else torch.optim.SGD
            made = make(trained, lr=1e-3, **({"eps": 1e-12} if name == "Adam" else {}))
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
            made.step()
            layer = model.base_model.model.model.layers[0].self_attn.q_proj
            b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            sizes.append((layer.scaling["default"] * b @ a).norm().item())
        found[name] = [s / sizes[0] for s in sizes]
    told = "; ".join(f"{name} {', '.join(f'{x:.1f}' for x in sizes)}" for name, sizes in found.items())
    cases = {n: all(near(a / alphas[0], x) for a, x in zip(alphas, s, strict=True)) for n, s in found.items()}
    return Finding(cases, f"alpha 8, 16, 32, 64: {told}")


@register("14.B27", named=True)
def two_adapters(named=False):
    """Two adapters on one base: does the first model still answer as it did?"""
    from peft import PeftModel

    base = tiny()
    quiet()
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed, name in ((1, "a"), (2, "b")):
            lora(copy.deepcopy(base), seed=seed).save_pretrained(Path(place) / name)
        first = PeftModel.from_pretrained(base, Path(place) / "a", adapter_name="a" if named else "default").eval()
        before = logits(first)
        if named:
            first.load_adapter(Path(place) / "b", adapter_name="b")
            first.set_adapter("a")
        else:
            PeftModel.from_pretrained(base, Path(place) / "b")
        moved = gap(before, logits(first))
    return Finding(
        {"the first adapter still answers": moved < 1e-5}, f"the first adapter's logits moved by {moved:.2f}"
    )


@register("14.C08", kept=("the merged weights alone",))
def merged_for_good(kept=("the base or the adapter", "the merged weights alone")):
    model = lora(tiny())
    before = logits(model)
    model.merge_adapter()
    model.unmerge_adapter()
    error = gap(before, logits(model))
    left = sum("lora_" in name for name in model.merge_and_unload().state_dict())
    lasting = {"the base or the adapter": error > 1e-4, "the merged weights alone": left == 0}
    evidence = (
        f"merged and taken out again, the logits differ by {error:.1e}; a merged file holds {left} adapter tensors"
    )
    return Finding({f"kept: {k}": lasting[k] for k in kept}, evidence)


@register("14.B16", adapter=("off",))
def forgets(adapter=("off", "on")):
    """Off: is the base back? On: the course's short LoRA, rise of the loss on general items for three seeds."""
    base = tiny()
    model = lora(copy.deepcopy(base))
    with model.disable_adapter():
        error = gap(logits(model), logits(base))
    found = [float(r["value"]) for r in reference.read("ticket_lora_short", "metrics")
             if r["metric"] == "forgetting" and r["profile"] == "cpu" and not r["control"]]  # fmt: skip
    cases = {"off": error < 1e-6, "on": max(found) <= 0}
    told = ", ".join(f"{x:+.2f}" for x in found)
    evidence = f"off, the logits differ by {error:.0e}; on, the loss on general items rises by {told} nats"
    return Finding({f"adapter {name}": cases[name] for name in adapter}, evidence)


@register("14.B21", total_step=3000)
def adalora(**settings):
    from peft import AdaLoraConfig

    return accepted("AdaLoraConfig", lambda: AdaLoraConfig(target_r=8, **settings), once=("peft", "0.14"))


@register("14.B22", meaning="number of last steps without pruning")
def adalora_end(meaning="step at which pruning ends", tinit=200, tfinal=1000, total=3000):
    """PEFT's own schedule: from where on is every step one at which the last budget is kept?"""
    from peft import AdaLoraConfig, get_peft_model
    from peft.tuners.adalora.layer import RankAllocator

    schedule = {"tinit": tinit, "tfinal": tfinal, "total_step": total, "deltaT": 7}
    config = AdaLoraConfig(target_r=4, init_r=12, target_modules=QV, **schedule)
    allocator = RankAllocator(get_peft_model(tiny(), config), config, "default")
    kept = [allocator.budget_schedule(step)[1] for step in range(total)]
    end = max(step for step in range(total) if not kept[step])
    said = tfinal if meaning.startswith("step") else total - tfinal
    evidence = f"tfinal {tfinal} of {total} steps: pruning goes on until step {end}"
    return Finding({"pruning ends there": near(said, end, 0.01)}, evidence)


@register("14.E28", rank=12)
def adalora_size(rank=8):
    plain = trainable("LoraConfig", r=rank, target_modules=tuple(QKVO))
    pruned = trainable("AdaLoraConfig", init_r=12, target_r=8, total_step=1000, target_modules=tuple(QKVO))
    evidence = f"AdaLoRA {pruned:,}, allocated at its first rank; LoRA of rank {rank} {plain:,}"
    return Finding({"the same number": near(pruned, plain, 0.001)}, evidence)


@register("14.E14", names=("an initialisation of one's own",))
def own_code(names=("pissa", "olora")):
    """Does it take code of one's own? PiSSA must leave the model's answers as they were."""
    errors = {}
    for name in names:
        said = refusal(lambda name=name: lora(tiny(), std=0, init_lora_weights=name))
        errors[name] = said or f"error {gap(logits(lora(tiny(), std=0, init_lora_weights=name)), logits(tiny())):.0e}"
    told = "; ".join(f"{name}: {text}" for name, text in errors.items())
    once = ("peft", "0.10")
    return Finding({name: not text.startswith("error") for name, text in errors.items()}, told, once=once)


@register("14.B110", base="a list")
def hub_models_only(base="a network of one's own"):
    from peft import LoraConfig, get_peft_model

    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    start = net if base != "a list" else [net]
    said = refusal(lambda: get_peft_model(start, LoraConfig(r=2, target_modules=["0", "2"])))
    return Finding({"only the hub's models": said is not None}, said or "adapts two layers of torch.nn.Sequential")


@register("14.B23", families=("llama",))
def target_names(families=("llama", "gpt2")):
    from transformers import GPT2Config, GPT2LMHeadModel

    found = {}
    for name in families:
        with torch.device("meta"):
            base = tiny() if name == "llama" else GPT2LMHeadModel(GPT2Config(n_layer=1))
        last = {module.rpartition(".")[2] for module, _ in base.named_modules()}
        found[name] = {"q_proj", "v_proj", "down_proj"} <= last
    with torch.device("meta"):
        gpt = {n.rpartition(".")[2] for n, _ in GPT2LMHeadModel(GPT2Config(n_layer=1)).named_modules() if "c_" in n}
    return Finding(found, f"GPT-2 calls its layers {', '.join(sorted(gpt))}")


@functools.cache
def step_ratio() -> float:
    """Operations of a training step, full against LoRA: LoRA saves the gradients of the frozen weights, no more."""
    full = tiny(num_hidden_layers=8).train()
    thin = lora(tiny(num_hidden_layers=8), target_modules="all-linear", r=1).train()
    return flops(full, backward=True) / flops(thin, backward=True)


@register("14.B14", times=1.4)
def lora_speed(times=3.0):
    ratio = step_ratio()
    return Finding({"by operations": times <= ratio * 1.02}, f"full training takes {ratio:.2f} times LoRA's operations")


@register("14.C54", way="addition")
def one_adapter(way="ties", densities=(0.2, 0.5)):
    """Merging one adapter: how much of its update does TIES keep?"""
    model = lora(tiny())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    delta = layer.get_delta_weight("default").detach().clone()
    if way == "addition":
        plain = tiny().model.layers[0].self_attn.q_proj.weight
        merged = model.merge_and_unload().model.layers[0].self_attn.q_proj.weight
        error = float((merged - plain - delta).detach().norm() / delta.norm())
        return Finding({"the adapter's update": error < 1e-4}, f"W + s B A: {error:.0e}")
    from peft.utils.merge_utils import ties

    parts = {d: ties([delta], torch.ones(1), density=d) for d in densities}
    errors = {d: float((kept - delta).norm() / delta.norm()) for d, kept in parts.items()}
    told = ", ".join(f"{e:.0%} at density {d}" for d, e in errors.items())
    return Finding({f"density {d}": e < 1e-4 for d, e in errors.items()}, f"part of the update that is lost: {told}")


@register("14.D03", per="target matrix")
def one_pair(per="attention layer"):
    """Pairs of A and B for one, two and four target matrices, in a model of two layers."""
    found = {}
    for targets in (["q_proj"], QV, QKVO):
        pairs = sum("lora_A" in name for name, _ in lora(tiny(), target_modules=targets).named_parameters())
        found[len(targets)] = pairs
    cases = {f"{n} targets": pairs == 2 * (n if per == "target matrix" else 1) for n, pairs in found.items()}
    return Finding(cases, "two layers: " + ", ".join(f"{p} pairs for {n} target(s)" for n, p in found.items()))


@register("14.C01", ways=("full",))
def sft_is_full(ways=("full", "LoRA")):
    """The same loss on the same rows, whatever is trained."""
    base = tiny()
    found = {}
    for way in ways:
        model = copy.deepcopy(base) if way == "full" else lora(copy.deepcopy(base), std=0)
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss.item()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        share = trained / sum(p.numel() for p in base.parameters())
        found[way] = loss, share
    told = ", ".join(f"{way}: loss {loss:.4f}, {share:.1%} trained" for way, (loss, share) in found.items())
    return Finding({f"{way}: all weights": share == 1 for way, (_, share) in found.items()}, told)


# --- preference losses -----------------------------------------------------------------------------------------------


def has_trl(names) -> Finding:
    import trl

    found = {name: hasattr(trl, name) for name in names}
    told = ", ".join(f"{name} {'is' if there else 'is not'} in trl" for name, there in found.items())
    return Finding(found, told)


@register("14.B71", names=("DPOTrainer",))
def ipo_trainer(names=("IPOTrainer",)):
    return has_trl(names)


@register("14.B75", names=("KTOTrainer",))
def orpo_trainer(names=("ORPOTrainer",)):
    found = has_trl(names)
    return Finding(found.cases, found.evidence, once=("trl", "0.24"))


@register("14.B65", names=("GRPOTrainer", "RLOOTrainer"))
def ppo_trainer(names=("PPOTrainer", "PPOConfig", "AutoModelForCausalLMWithValueHead")):
    found = has_trl(names)
    return Finding(found.cases, found.evidence, once=("trl", "0.24"))


def config_takes(kind: str, names, once=None) -> Finding:
    import trl

    known = {f for f in inspect.signature(getattr(trl, kind)).parameters}
    cases = {name: name in known for name in names}
    told = ", ".join(f"{name} {'is' if there else 'is no'} argument" for name, there in cases.items())
    return Finding(cases, f"{kind}: {told}", once=once)


@register("14.B68", names=("max_length",))
def dpo_config(names=("max_prompt_length",)):
    return config_takes("DPOConfig", names, once=("trl", "0.24"))


@register("14.D11", names=("processing_class",))
def dpo_tokenizer(names=("tokenizer",)):
    return config_takes("DPOTrainer", names, once=("trl", "0.15"))


@register("14.B73", names=("train_dataset", "processing_class"))
def kto_weights(names=("desirable_weight", "undesirable_weight")):
    return config_takes("KTOTrainer", names)


@functools.cache
def kto_defaults() -> tuple[float, float]:
    from trl import KTOConfig

    with tempfile.TemporaryDirectory() as folder:
        c = KTOConfig(output_dir=folder, use_cpu=True, bf16=False)
    return c.desirable_weight, c.undesirable_weight


@register("14.C41", up=1.0, down=1.0)
def kto_default_weights(up=1.0, down=1.33):
    """Weights of thumbs up and down; the paper asks for up x n_up / (down x n_down) from 1 to 4/3."""
    defaults = kto_defaults()
    cases = {"TRL's default": (up, down) == defaults, "the rule, equal numbers": 1 <= up / down <= 4 / 3 + 1e-9}
    return Finding(cases, f"defaults {defaults[0]:g} and {defaults[1]:g}; {up:g} / {down:g} = {up / down:.2f}")


@register("14.A11", of="reference point")
def loss_averse(of="weights", human=2.25):
    from course_lib.claims_numbers import sigmoid

    up, down = kto_defaults()
    moved = abs(float(sigmoid(1.0 - 0.0) - sigmoid(1.0 - 0.5)))
    cases = {"value counts from a reference point": moved > 0}
    if of == "weights":
        cases["losses weigh more"] = down / up > 1
    return Finding(cases, f"loss weighs {down / up:g} times a gain by default; people {human} (Tversky and Kahneman)")


@register("14.B63", function="logsigmoid")
def log_of_sigmoid(function="log(sigmoid)", margins=(-1.0, -20.0, -200.0)):
    x = torch.tensor(margins)
    found = torch.nn.functional.logsigmoid(x) if function == "logsigmoid" else torch.log(torch.sigmoid(x))
    told = ", ".join(f"{m:g}: {value:.4g}" for m, value in zip(margins, found.tolist(), strict=True))
    return Finding({f"{m:g}": math.isfinite(v) for m, v in zip(margins, found.tolist(), strict=True)}, told)


@register("14.C18", methods=("GRPO", "RLOO"))
def needs_rollouts(methods=("DPO", "KTO", "GRPO")):
    """Whether the configuration says how many answers to draw."""
    import trl

    found = {m: "num_generations" in inspect.signature(getattr(trl, f"{m}Config")).parameters for m in methods}
    told = ", ".join(f"{m} {'draws answers' if yes else 'reads stored ones'}" for m, yes in found.items())
    return Finding(found, told)


@register("14.B107", how="policy to reference, mean over tokens")
def kl_penalty(how="F.kl_div(log policy, reference, 'batchmean')", lengths=(8, 32)):
    """KL from policy to reference, per token, for answers of two lengths."""
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, max(lengths), 50, generator=g) for _ in range(2))
    found = []
    for n in lengths:
        lp, lq = (t[:, :n].log_softmax(-1) for t in (p, q))
        right = float((lp.exp() * (lp - lq)).sum(-1).mean())
        if how.startswith("F.kl_div"):
            value = float(torch.nn.functional.kl_div(lp, lq.exp(), reduction="batchmean"))
        else:
            value = float(torch.nn.functional.kl_div(lq, lp.exp(), reduction="none").sum(-1).mean())
        found.append((value, right))
    cases = {f"{n} tokens": near(v, r, 1e-3) for n, (v, r) in zip(lengths, found, strict=True)}
    told = ", ".join(f"{v:.2f} at {n} tokens" for n, (v, _) in zip(lengths, found, strict=True))
    other = found[0][0] / lengths[0]
    return Finding(cases, f"{told}; KL(policy, reference) is {found[0][1]:.3f} a token, the other way {other:.3f}")


# --- GRPO and optimizers ---------------------------------------------------------------------------------------------


@register("14.E36", names=("num_generations", "max_completion_length", "mask_truncated_completions"))
def grpo_config(names=("num_sample_generations", "response_length", "missing_eos_penalty")):
    return config_takes("GRPOConfig", names)


@register("14.E38", names=("args", "processing_class", "reward_funcs"))
def grpo_trainer(names=("config", "tokenizer", "reward_fn")):
    return config_takes("GRPOTrainer", names)


@register("14.E39", num_generations=4)
def grpo_batch(batch=4, **settings):
    from trl import GRPOConfig

    settings |= {"use_cpu": True, "bf16": False, "per_device_train_batch_size": batch}
    with tempfile.TemporaryDirectory() as folder:
        return accepted(f"a batch of {batch}", lambda: GRPOConfig(output_dir=folder, **settings))


@register("14.E37", iterations=1)
def iterations(iterations=1000):
    from trl import GRPOConfig

    with tempfile.TemporaryDirectory() as folder:
        c = GRPOConfig(output_dir=folder, use_cpu=True, bf16=False)
    evidence = f"num_iterations is {c.num_iterations} by default: updates for a batch of answers"
    return Finding({"the default": iterations == c.num_iterations}, evidence)


@register("14.E22", which="matrices")
def muon(which="all"):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    taken = [p for p in model.parameters() if which == "all" or p.ndim == 2]
    return accepted("torch.optim.Muon", lambda: torch.optim.Muon(taken, lr=1e-3))


@register("14.E19", names=("SOAP",))
def optimizer_packages(names=("Muon",)):
    cases = {name: not hasattr(torch.optim, name) for name in names}
    told = ", ".join(f"{n} {'is not' if missing else 'is'} in torch.optim" for n, missing in cases.items())
    return Finding({f"{name} has to be installed": missing for name, missing in cases.items()}, told)


# --- data and training -----------------------------------------------------------------------------------------------


def arguments(**settings):
    from transformers import TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        return TrainingArguments(output_dir=folder, use_cpu=True, **settings)


@register("14.B88", warmup_steps=0.03)
def warmup(**settings):
    settings = settings or {"warmup_ratio": 0.03}
    what = f"TrainingArguments({', '.join(settings)})"
    return accepted(what, lambda: arguments(**settings), once=("transformers", "4.57"))


@register("14.B125", name="max_steps")
def sequence_length(name="max_seq_length"):
    return accepted(f"TrainingArguments({name})", lambda: arguments(**{name: 512}))


@register("14.B89", eval_strategy="steps", save_strategy="steps")
def best_model(**settings):
    what = "load_best_model_at_end"
    return accepted(what, lambda: arguments(load_best_model_at_end=True, **settings))


@register("14.B101", key=0)
def log_history(key="loss"):
    from transformers import TrainerState

    state = TrainerState(log_history=[{"loss": 2.0, "step": 1}, {"loss": 1.5, "step": 2}])
    return accepted("log_history", lambda: state.log_history[key])


@register("14.C02", judged="all tokens")
def sum_over_answer(judged="tokens of the answer"):
    """Minus the sum of the log-probabilities of the answer's tokens, against the library's loss times their number."""
    model, prompt = tiny(), 5
    labels = IDS.clone()
    labels[:, :prompt] = -100
    loss = model(input_ids=IDS, labels=labels, use_cache=False).loss.item()
    log_p = logits(model)[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:, None])[..., 0]
    start = prompt - 1 if judged == "tokens of the answer" else 0
    by_hand, n = -log_p[:, start:].sum().item(), int((labels[:, 1:] != -100).sum())
    evidence = f"{by_hand:.3f} by hand, {loss:.4f} x {n} = {loss * n:.3f} by the library"
    return Finding({"one answer": near(by_hand, loss * n, 1e-4)}, evidence)


@register("14.B54", columns=("prompt", "completion"))
def answer_in_label(columns=("text", "label")):
    """Which words of a row TRL trains on, by the names of its columns."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from course_lib import models

    tokenizer = models.load_tokenizer()
    quiet()
    question, answer = "Which intent? The lamp is broken.", "damaged"
    data = Dataset.from_list([{columns[0]: question, columns[1]: answer}] * 2)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
        settings = SFTConfig(output_dir=folder, **plain)
        model = tiny(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
        trainer = SFTTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer)
        batch = next(iter(trainer.get_train_dataloader()))
    learnt = tokenizer.decode([t for t in batch["labels"][0].tolist() if t >= 0])
    return Finding({"the answer is learnt": answer in learnt and question not in learnt}, f"learnt: {learnt!r}")


# --- serving ---------------------------------------------------------------------------------------------------------


@register("14.C13", cached=(True,))
def longer_prompt(cached=(True, False)):
    """Operations for a prompt of 32 and of 128 tokens and one new one; cached: the prompt was read before."""
    model, cost = tiny(), {}
    for known in cached:
        counts = []
        for n in (32, 128):
            ids = torch.ones(1, n, dtype=torch.long)
            linear = flops(model, ids[:, :1] if known else ids)
            counts.append(linear)
        cost["read before" if known else "read anew"] = counts[1] / counts[0]
    told = ", ".join(f"{name} {x:.1f} times" for name, x in cost.items())
    return Finding({name: x < 1.1 for name, x in cost.items()}, f"128 tokens for 32: {told}")


@register("14.E13", attention="sdpa")
def chosen_attention(attention="flash_attention_3"):
    from transformers import AutoModelForCausalLM

    base = tiny()
    found = base.config._attn_implementation
    asked = {"attn_implementation": "flash_attention_3"}
    said = refusal(lambda: AutoModelForCausalLM.from_config(copy.deepcopy(base.config), **asked))
    evidence = f"the default is {found}; asked for by name: {(said or 'accepted')[:60]}"
    return Finding({"by itself": found == attention}, evidence)


@register("14.E48", start="the prompt's end")
def decoded(start="the beginning"):
    out = tiny().generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    taken = out[0] if start == "the beginning" else out[0, IDS.shape[1] :]
    has_prompt = taken[: IDS.shape[1]].tolist() == IDS[0].tolist()
    evidence = f"{len(out[0])} tokens come back, {IDS.shape[1]} of them are the prompt"
    return Finding({"the answer alone": not has_prompt}, evidence)


@register("14.B92", sampling=(True,))
def temperature(sampling=(True, False)):
    """Do two answers at temperature 2 differ from the greedy one?"""
    from transformers.utils import logging

    model, cases, level = tiny(), {}, logging.get_verbosity()
    logging.set_verbosity_error()  # its warning is what the claim overlooks
    with torch.random.fork_rng():
        torch.manual_seed(0)
        greedy = model.generate(input_ids=IDS, max_new_tokens=12, do_sample=False).tolist()
        for sample in sampling:
            given = {"do_sample": True} if sample else {}
            out = model.generate(input_ids=IDS, max_new_tokens=12, temperature=2.0, **given)
            cases["do_sample=True" if sample else "temperature alone"] = out.tolist() != greedy
    logging.set_verbosity(level)
    told = ", ".join(f"{name}: {'drawn' if drawn else 'greedy'}" for name, drawn in cases.items())
    return Finding(cases, told)
