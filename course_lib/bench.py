"""`course bench`: how fast the course's settings are beside the libraries' defaults, each side in a process of its own.

Training: the recipe `ticket_lora` against TRL's `SFTTrainer` with its default configuration (gradient checkpointing,
bfloat16 autocast over float32 weights) in a process without the course's variables. Equal on both sides: tickets and
their order, batch size, steps, learning rate and its schedule, rank, seed. Generation: the course's batches against
transformers' `generate`, one ticket after the other, in the same dtype.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from course_lib import CourseError, evaluation, hardware, models, profiles, recipes, results, tickets

SEED = 0
SIZES = {"steps": 40, "dev": 40, "prompts": 32, "new_tokens": 48}
for word in os.environ.get("COURSE_BENCH", "").split():  # such as "steps=2 prompts=2", for tests
    SIZES[word.split("=")[0]] = int(word.split("=")[1])
PROMISES = {  # the first side over the second
    "training speed": ("train_course", "train_defaults", "tokens_per_s", "at least", 1.5),
    "dev loss": ("train_course", "train_defaults", "dev_loss", "at most", 1.02),
    "generation speed": ("generate_course", "generate_plain", "tokens_per_s", "at least", 6.0),
}


# --- the sides: each returns what it measured ------------------------------------------------------------------------


def load() -> dict:
    """Seconds for model and tokenizer: the first time in this process, library imports included, and once more."""
    means = "fresh process"
    if hasattr(os, "posix_fadvise"):  # Linux: anybody may ask it to forget its copy of a file
        means = "fresh process, weights dropped from the page cache"
        for path in models.base_path().iterdir():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    cold, warm = (_speed(lambda: (models.load(), len(models.load_tokenizer()))[1]) for _ in range(2))
    return {"cold_s": cold["seconds"], "warm_s": warm["seconds"], "cold_means": means, "peak_mb": warm["peak_mb"]}


def train_course() -> dict:
    s, tokenizer, rows = _training()
    model, equal = recipes.add_lora(models.load(), s), {"train_sampling_strategy": "sequential"}
    return _train(recipes.sft_trainer(model, tokenizer, rows, s, SEED, max_steps=SIZES["steps"], **equal), tokenizer)


def train_defaults() -> dict:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    s, tokenizer, rows = _training()
    config = SFTConfig(
        output_dir=tempfile.gettempdir(), per_device_train_batch_size=s.batch_size, max_steps=SIZES["steps"], seed=SEED,
        learning_rate=s.learning_rate, lr_scheduler_type=s.schedule, warmup_steps=s.warmup,
        train_sampling_strategy="sequential", save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=hardware.device() == "cpu",  # the default refuses to start without a GPU
    )  # fmt: skip
    lora = LoraConfig(r=s.rank, lora_alpha=s.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    data = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    trainer = SFTTrainer(model=str(models.base_path()), args=config, peft_config=lora, **data)
    trainer.remove_callback(PrinterCallback)
    return _train(trainer, tokenizer)


def _training():
    profiles.set_seeds(SEED)
    s = recipes.settings("ticket_lora", "cpu")
    return s, models.load_tokenizer(), recipes.examples(tickets.load("train", SIZES["steps"] * s.batch_size))


def _train(trainer, tokenizer) -> dict:
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % 10 == 0:
                print(f"step {state.global_step}/{state.max_steps}", flush=True)

    trainer.add_callback(Steps())
    tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)  # as read, without padding
    found = _speed(lambda: (trainer.train(), tokens)[1])  # with the peak of training alone
    print("loss on dev", flush=True)
    rows = recipes.examples(tickets.load("dev", SIZES["dev"]))
    pairs = [(row["prompt"], row["completion"][0]["content"]) for row in rows]
    return found | {"dev_loss": float(evaluation.completion_nll(trainer.model, tokenizer, pairs).mean())}


def generate_course() -> dict:
    model, tokenizer, n = models.load(), models.load_tokenizer(), SIZES["new_tokens"]
    return _generate(lambda some: [a.tokens for a in evaluation.generate(model, tokenizer, some, max_new_tokens=n)])


def generate_plain() -> dict:
    from transformers import AutoModelForCausalLM

    tokenizer = models.load_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(models.base_path(), dtype=hardware.dtype())
    model.to(hardware.device()).eval()

    def answer(prompt):
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids.to(model.device), max_new_tokens=SIZES["new_tokens"], do_sample=False)
        return out.shape[1] - ids["input_ids"].shape[1]

    return _generate(lambda some: [answer(prompt) for prompt in some])


def _generate(answer) -> dict:
    """answer: prompts to the numbers of new tokens."""
    prompts = [tickets.messages(record) for record in tickets.load("dev", SIZES["prompts"])]
    answer(prompts[:2])  # the first use of the kernels is not counted
    return _speed(lambda: sum(answer(prompts)))


def _speed(work) -> dict:
    """work: a function that returns how many tokens it went through."""
    start = time.perf_counter()
    tokens = work()
    seconds = time.perf_counter() - start
    return {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds, "peak_mb": hardware.peak_rss_mb()}


# --- the comparison --------------------------------------------------------------------------------------------------

SIDES = {f.__name__: f for f in (load, train_defaults, train_course, generate_plain, generate_course)}


def _run(name: str, log: Path) -> dict:
    """What one side measured, in a fresh process; its own words go into `log`."""
    print(f"[{list(SIDES).index(name) + 1}/{len(SIDES)}] {name.replace('_', ', ')} ...", flush=True)
    ours, environment = hardware.kernel_environment(), dict(os.environ)
    if name in ("train_defaults", "generate_plain"):
        for variable in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "OMP_NUM_THREADS"):  # what moves speed
            ours.pop(variable)
            environment.pop(variable, None)
    code = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")]
    environment |= ours | {"PYTHONPATH": os.pathsep.join(filter(None, code))}
    command, found = [sys.executable, "-m", "course_lib.bench", name], None
    with open(log, "w", encoding="utf-8") as errors:
        side = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            for line in side.stdout:
                if line.startswith("RESULT "):
                    found = json.loads(line.removeprefix("RESULT "))
                elif line.startswith(("step ", "loss ")):
                    print(f"      {line.rstrip()}", flush=True)
        except BaseException:
            side.kill()
            raise
        code = side.wait()
    if found is None:
        raise CourseError(f"the side {name} ended with exit code {code} and no result: see {log}")
    return found


def compare(sides: dict) -> dict:
    """Each promise with its ratio and whether it is kept. Raises CourseError where the trainings read other tokens."""
    ours, theirs = (sides[name]["tokens"] for name in ("train_course", "train_defaults"))
    if ours != theirs:
        raise CourseError(f"the two trainings did not read the same: {ours} and {theirs} tokens")
    found = {}
    for name, (one, other, key, word, limit) in PROMISES.items():
        value = sides[one][key] / sides[other][key]
        kept = value >= limit if word == "at least" else value <= limit
        found[name] = {"value": value, "promise": f"{word} {limit}", "kept": kept}
    return found


def main() -> int:
    """Measure all sides, print a table, write `<runs>/bench/bench.json`. 1 where a promise is not kept, else 0."""
    folder = results.base_dir() / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    if models.damaged():  # in a process of its own: a conversion would count as this one's memory
        subprocess.run([sys.executable, "-m", "course_lib", "fetch"], check=True)
    sides = {name: _run(name, folder / f"{name}.log") for name in SIDES}
    found = {"sizes": SIZES, "hardware": hardware.describe(), "versions": hardware.versions(), "sides": sides}
    found["ratios"] = compare(sides)
    results.write_json(folder / "bench.json", found)
    columns = {"tokens_per_s": ".1f", "seconds": ".1f", "dev_loss": ".4f", "peak_mb": ".0f"}
    print("\n" + " " * 18 + "".join(f"{key:>14}" for key in columns))
    for name, side in sides.items():
        cells = [format(side[key], how) if key in side else "" for key, how in columns.items()]
        print(f"{name.replace('_', ', '):<18}" + "".join(f"{cell:>14}" for cell in cells))
    print("load: cold {cold_s:.2f} s ({cold_means}), warm {warm_s:.2f} s".format(**sides["load"]))
    for name, ratio in found["ratios"].items():
        print(f"{name}: {ratio['value']:.2f}, promised {ratio['promise']}: {'kept' if ratio['kept'] else 'NOT KEPT'}")
    print(f"written: {folder / 'bench.json'}")
    return 0 if all(ratio["kept"] for ratio in found["ratios"].values()) else 1


if __name__ == "__main__":
    print("RESULT " + json.dumps(SIDES[sys.argv[1]]()), flush=True)
