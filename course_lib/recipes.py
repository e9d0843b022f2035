"""Named training recipes, and `adapter(name)`: from the user's cache, or trained there with progress.

Settings stand in `notebooks/course.toml` under `[recipes.NAME]`. The lesson that introduces a recipe trains it in view
with the functions below; later lessons call `adapter`, or `load` for the model itself.

A recipe's `method` is `lora` (where it says none), `dora`, `qlora` (LoRA over a base in four bits), or `full`: all
weights, no adapter. Its `rehearsal` is the share of general examples among all its examples, its `base` a model other
than the course's.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from course_lib import CourseError, hardware, models, profiles, tickets

METHODS = ("lora", "dora", "qlora", "full")


def settings(name: str, profile: str) -> SimpleNamespace:
    """The settings of a recipe in a profile: what all profiles share, then what this one changes."""
    known = profiles.index().get("recipes", {})
    if name not in known:
        raise CourseError(f"no recipe {name!r}. The recipes are {', '.join(known)}.")
    table = {key: value for key, value in known[name].items() if not isinstance(value, dict)}
    per_profile = known[name].get("sizes", {})
    found = SimpleNamespace(**table | per_profile.get("cpu", {}) | per_profile.get(profile, {}))
    if method(found) not in METHODS:
        raise CourseError(f"recipe {name} has method {found.method!r}: choose one of {', '.join(METHODS)}.")
    return found


def method(s: SimpleNamespace) -> str:
    """`lora`, `dora`, `qlora` or `full`."""
    return getattr(s, "method", "lora")


def examples(records: list[dict]) -> list[dict]:
    """Tickets as prompt and completion, the form TRL computes its loss on: completion tokens only."""
    return [
        {
            "prompt": tickets.messages(record),
            "completion": [{"role": "assistant", "content": tickets.to_json(tickets.in_words(record))}],
        }
        for record in records
    ]


def rehearsal(n: int) -> list[dict]:
    """`n` general examples (`data/general/rehearsal.jsonl`) in the same form; from the first again where they end."""
    records = [json.loads(line) for line in _rehearsal_path().read_text(encoding="utf-8").splitlines()]
    return [
        {
            "prompt": [{"role": "user", "content": record["prompt"]}],
            "completion": [{"role": "assistant", "content": record["response"]}],
        }
        for record in itertools.islice(itertools.cycle(records), n)
    ]


def _rehearsal_path() -> Path:
    return tickets.DATA / "general" / "rehearsal.jsonl"


def training_rows(s: SimpleNamespace) -> list[dict]:
    """The examples of a recipe: its tickets, and as many general ones as make up its share of rehearsal."""
    rows, share = examples(tickets.load("train", s.train)), getattr(s, "rehearsal", 0)
    if getattr(s, "shuffled_labels", False):  # a control of `make reference`: each ticket with the next one's record
        records = [row["completion"] for row in rows]
        rows = [row | {"completion": c} for row, c in zip(rows, records[1:] + records[:1], strict=True)]
    return rows + rehearsal(round(len(rows) * share / (1 - share))) if share else rows


def add_lora(model, s: SimpleNamespace):
    """`model` with a fresh LoRA (or DoRA) adapter on all linear layers (the output layer excepted).

    The adapter is kept in the base's dtype on a CPU, where mixed dtypes cost a fifth of the speed; in float32 on CUDA
    below capability 8, whose float16 gradients need it.
    """
    if method(s) == "qlora" and models.four_bit_backend() == "unsloth":
        return models.add_unsloth_lora(model, s.rank, s.alpha)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=s.rank,
        lora_alpha=s.alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        use_dora=method(s) == "dora",
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=hardware.device() != "cpu")
    for name, parameter in model.named_parameters():
        if (
            "lora_magnitude_vector" in name
        ):  # near 4.5, where bfloat16 has a step of 0.03: Adam's of 0.002 is lost in it
            parameter.data = parameter.data.float()
    return model


def trl_arguments(s: SimpleNamespace, seed: int) -> dict:
    """What all of the course's TRL trainers are told: the recipe's settings, and what fits the hardware."""
    return hardware.trainer_arguments() | {
        "output_dir": os.path.join(tempfile.gettempdir(), "course-trainer"),
        "per_device_train_batch_size": s.batch_size,
        "num_train_epochs": s.epochs,
        "learning_rate": s.learning_rate,
        "lr_scheduler_type": s.schedule,
        "warmup_steps": s.warmup,
        "weight_decay": 0.0,
        "adam_beta2": s.beta2,
        "save_strategy": "no",
        "seed": seed,
    }


def sft_trainer(model, tokenizer, rows: list[dict], s: SimpleNamespace, seed: int, **changes):
    """TRL's SFTTrainer for `rows` (of `examples`), everything that its defaults would get wrong here said out loud."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    disable_progress_bar()
    profiles.set_seeds(seed)
    fitting = trl_arguments(s, seed) | {
        "max_length": None,
        "train_sampling_strategy": "group_by_length",
        "logging_steps": 5,
    }
    if method(s) == "full":  # the weights are float32: the multiplications may still be in bfloat16
        fitting["bf16"] = str(hardware.dtype()) == "torch.bfloat16"
    if method(s) == "qlora":
        fitting |= hardware.four_bit_arguments()
    config = SFTConfig(**fitting | changes)
    kept = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    # Over a base in four bits TRL turns adapters into bfloat16: too coarse here where they were float32, and fatal for
    # the float16 gradients of a T4, whose scaler has no code for bfloat16.
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.data = parameter.data.to(kept[name])
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_progress())
    return trainer


def _progress():
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        """One line that is rewritten: step, loss, time left."""

        def on_train_begin(self, args, state, control, **kwargs):
            self.start, self.line = time.monotonic(), _Line()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in (logs or {}):
                taken = time.monotonic() - self.start
                left = taken / state.global_step * (state.max_steps - state.global_step)
                ends = f"{left / 60:.1f} min left" if left > 1 else "done"
                self.line.show(f"step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.3f}  {ends}")

        def on_train_end(self, args, state, control, **kwargs):
            hardware.give_back_memory()
            self.line.show(f"step {state.global_step}/{state.max_steps}  done")

    return Progress()


class _Line:
    """In a notebook a display that is updated in place; on a terminal one rewritten line; else silent."""

    def __init__(self):
        self.handle = None
        try:
            shell = get_ipython()  # noqa: F821  (a name that only IPython defines)
            self.notebook = shell is not None and hasattr(shell, "kernel")
        except NameError:
            self.notebook = False

    def show(self, text: str) -> None:
        if self.notebook:
            from IPython.display import display

            data = {"text/plain": text}
            if self.handle is None:
                self.handle = display(data, raw=True, display_id=True)
            else:
                self.handle.update(data, raw=True)
        elif sys.stderr.isatty():
            end = "\n" if text.endswith("  done") else ""
            print(f"\r\033[K{text}", end=end, file=sys.stderr, flush=True)


def losses(trainer) -> list[tuple[int, float]]:
    """(step, training loss) as the trainer logged them."""
    return [(entry["step"], float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry]


# --- the cache -------------------------------------------------------------------------------------------------------


def key(name: str, profile: str, seed: int) -> str:
    """What the adapter depends on, as a short hash: settings, data, base, versions, dtype, seed."""
    parts = {
        "settings": vars(settings(name, profile)),
        "system": tickets.SYSTEM,
        "data": models.sha256(tickets.DATA / "tickets" / "train.jsonl"),
        "base": models.GGUF_SHA256,
        "versions": {k: v for k, v in hardware.versions().items() if k in ("torch", "transformers", "trl", "peft")},
        "dtype": str(hardware.dtype()),
        "seed": seed,
    }
    if method(settings(name, profile)) == "qlora":
        parts["four_bit"] = [models.four_bit_backend(), hardware.versions().get("bitsandbytes")]
    if getattr(settings(name, profile), "rehearsal", 0):
        parts["rehearsal"] = models.sha256(_rehearsal_path())
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def cached(name: str, profile: str, seed: int = 0) -> Path:
    """Where the cache keeps (or would keep) this adapter."""
    return models.cache_dir() / "adapters" / f"{name}-{profile}-{seed}-{key(name, profile, seed)}"


def save(model, folder: Path, about: dict | None = None) -> Path:
    """Save what was trained, under a temporary name first: an adapter in PEFT's own format, its base named without a
    path; a model without an adapter as transformers saves it."""
    from safetensors import SafetensorError

    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        model.save_pretrained(work, safe_serialization=True)
        if (work / "adapter_config.json").exists():
            config = json.loads((work / "adapter_config.json").read_text())
            name = config.get("base_model_name_or_path") or ""
            if name == str(models.base_path()) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):  # no name of the hub
                config["base_model_name_or_path"] = models.BASE_NAME
            (work / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
        (work / "README.md").unlink(missing_ok=True)  # a card with empty fields says less than none
        if about:
            (work / "training.json").write_text(json.dumps(about, indent=1))
        work.chmod(0o755)  # mkdtemp's folders are closed to everybody else
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    except (OSError, SafetensorError) as error:  # a full disk is the latter, in safetensors
        raise models.ModelError(
            f"cannot save the trained weights to {folder} ({getattr(error, 'strerror', None) or error}). "
            "Free some space, or set COURSE_OUT and COURSE_CACHE to folders on another disk."
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def keep(model, name: str, profile: str, seed: int, about: dict | None = None) -> Path:
    """Save freshly trained weights into the cache, for the lessons that come later."""
    return save(model, cached(name, profile, seed), about)


def adapter(name: str, profile: str = "auto", seed: int = 0) -> Path:
    """The folder of what a recipe trained: from the cache, or trained now, with progress.

    An adapter is loaded by `models.load(adapter=folder)`, a fully tuned model by `models.load(folder)`; `load` knows.
    """
    profile = profiles.choose(profile)
    folder = cached(name, profile, seed)
    if any((folder / file).exists() for file in ("adapter_model.safetensors", "model.safetensors")):
        return folder
    print(f"Recipe {name} is not in the cache for profile {profile}, seed {seed}: it is trained now.")
    model, trainer = prepare(name, profile, seed)
    trainer.train()
    return keep(for_use(model), name, profile, seed, {"losses": losses(trainer)})


def load(name: str, profile: str = "auto", seed: int = 0):
    """The model that a recipe trained, ready to be asked: the base with its adapter on top, or all weights its own."""
    profile = profiles.choose(profile)
    folder = adapter(name, profile, seed)
    s = settings(name, profile)
    if method(s) == "full":
        return models.load(folder)
    return models.load(base(s), adapter=folder, four_bit=method(s) == "qlora")


def base(s: SimpleNamespace) -> str | None:
    """The model that a recipe starts from, as `models.load` and `models.load_tokenizer` take it; None: the course's."""
    return getattr(s, "base", None)


def prepare(name: str, profile: str, seed: int = 0, **changes):
    """(model, trainer) of a recipe, ready for `trainer.train()`: the base with a fresh adapter, or as a whole."""
    return prepare_with(settings(name, profile), seed, **changes)


def prepare_with(s: SimpleNamespace, seed: int = 0, **changes):
    """`prepare` for settings that stand in no recipe: a copy with a change, as sweeps need it."""
    import torch

    profiles.set_seeds(seed)
    # A step of 1e-4 is lost in bfloat16, which has three digits: all weights are trained in float32.
    if method(s) == "full":
        model = models.load(base(s), dtype=torch.float32)
    else:
        model = add_lora(models.load(base(s), four_bit=method(s) == "qlora"), s)
    return model, sft_trainer(model, models.load_tokenizer(base(s)), training_rows(s), s, seed, **changes)


def for_use(model):
    """A model as it is used after training, in eval mode: a fully tuned one in the hardware's dtype and without the
    trainer's mixed precision around it; an adapter stays as it is.

    Parameters alone are rounded: `model.to(dtype)` would round the rotary frequencies too, which `models.load` keeps.
    """
    if hasattr(model, "peft_config"):
        return model.eval()
    from accelerate.utils import extract_model_from_parallel

    model = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(hardware.dtype())
        parameter.grad = None
    model.config.use_cache = True  # the trainer switches it off
    return model.eval()
