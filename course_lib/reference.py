"""Stored references: what a recipe does with several seeds and with training switched off.

`make reference` measures them piece by piece (one training each, resumable) and writes `data/reference/*.csv`; nothing
else does. Lessons draw the reader's curve over them, and the bands in `course.toml` follow from them by `band`.

A recipe's `sweeps` in `course.toml` name settings of it that are tried one at a time, in profile `cpu`.
"""

from __future__ import annotations

import csv
import datetime
import functools
import io
import json
import math
from types import SimpleNamespace

from course_lib import CourseError, evaluation, general, hardware, models, profiles, recipes, tickets, training
from course_lib.results import write_text

FOLDER = tickets.DATA / "reference"
SEEDS = (0, 1, 2)
CONTROLS = ("learning_rate_0", "shuffled_labels")  # nothing is learnt; form is learnt, but not what a ticket says
PROFILES = ("cpu", "ci")
TICKETS = {"cpu": 120, "ci": 24}  # of test, that each piece answers
PROVENANCE = ("date", "cpu", "features", "dtype", "torch", "transformers", "trl", "peft", "key")


def path(recipe: str, kind: str):
    """`data/reference/<recipe>_<kind>.csv`; kind is `curves` (loss by step), `metrics` or `sweeps`."""
    return FOLDER / f"{recipe}_{kind}.csv"


def read(recipe: str, kind: str) -> list[dict]:
    """The stored rows, all values as text; none where nothing is stored yet."""
    try:
        with open(path(recipe, kind), newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


def is_stored(recipe: str, kind: str, wanted: dict) -> bool:
    """Whether a row with these values is stored."""
    same = {column: str(value) for column, value in wanted.items()}
    return any(all(row[column] == value for column, value in same.items()) for row in read(recipe, kind))


def band(values: list[float], n: int) -> tuple[float, float]:
    """The band of a share measured on n items, from the values of the reference seeds: their range, widened on each
    side by what another draw of n items moves a share (1.96 standard errors) and by 0.05 for other hardware."""
    low, high = min(values), max(values)
    widen = [1.96 * math.sqrt(max(v * (1 - v), 0.05) / n) + 0.05 for v in (low, high)]
    return max(0.0, low - widen[0]), min(1.0, high + widen[1])


def run(lesson: str | None = None, seed: int | None = None) -> int:
    """Measure what is missing for the recipes that a lesson (None: every lesson) introduces, one piece after another.

    An interrupted call keeps the finished pieces; pieces of another recipe, data or stack are measured again.
    """
    seeds = SEEDS if seed is None else (int(seed),)
    chosen = profiles.lessons() if lesson is None else [profiles.lesson(lesson)]
    names = [name for table in chosen for name in table.get("introduces", [])]
    if not names:
        raise CourseError(f"lesson {lesson} introduces no recipe: it has no reference to measure.")
    for name in names:
        pieces = [(p, s, "") for p in PROFILES for s in seeds]
        pieces += [(p, 0, control) for control in CONTROLS for p in PROFILES if 0 in seeds]
        for number, (profile, s, control) in enumerate(pieces, 1):
            what = f"{name}, profile {profile}, seed {s}{', ' + control if control else ''} ({number}/{len(pieces)})"
            key = recipes.key(name, profile, s)
            if any((r["profile"], r["seed"], r["control"], r["key"]) == (profile, str(s), control, key)
                   for r in read(name, "metrics")):  # fmt: skip
                print(f"{what}: stored")
                continue
            print(f"{what}: training ...", flush=True)
            _piece(name, profile, s, control, key)
        for knob, settings in profiles.index()["recipes"][name].get("sweeps", {}).items():
            for setting in settings:
                what = f"{name}, {knob} {setting}, seed {seeds[0]}"
                key = recipes.key(name, "cpu", seeds[0])
                if any((r["knob"], r["piece"], r["seed"], r["key"]) == (knob, str(setting), str(seeds[0]), key)
                       for r in read(name, "sweeps")):  # fmt: skip
                    print(f"{what}: stored")
                    continue
                print(f"{what}: training ...", flush=True)
                _sweep_piece(name, seeds[0], knob, setting, key)
    if any(table["id"].startswith("04") for table in chosen):
        adapter_sweep(seeds)
    return 0


def _piece(name: str, profile: str, seed: int, control: str, key: str) -> None:
    folder = recipes.cached(name, profile, seed)
    if not control and (folder / "training.json").exists():  # a lesson trained it already
        model, losses = recipes.load(name, profile, seed), json.loads((folder / "training.json").read_text())["losses"]
    else:
        changes = {"learning_rate_0": {"learning_rate": 0.0}, "shuffled_labels": {"shuffled_labels": True}}
        s = SimpleNamespace(**vars(recipes.settings(name, profile)) | changes.get(control, {}))
        model, trainer = recipes.prepare_with(s, seed)
        trainer.train()
        model, losses = recipes.for_use(model), recipes.losses(trainer)
        if not control:
            recipes.keep(model, name, profile, seed, {"losses": losses})
    measured = ticket_metrics(model, models.load_tokenizer(), TICKETS[profile])
    forgot = _forgetting(model, profile)
    measured["forgetting"] = (forgot.value, forgot.n)
    common = {"profile": profile, "seed": seed, "control": control}
    curve = [common | {"step": step, "loss": f"{loss:.4f}"} for step, loss in losses]
    metrics = [common | {"metric": m, "value": f"{v:.4f}", "n": n} for m, (v, n) in measured.items()]
    for kind, rows in (("curves", curve), ("metrics", metrics)):
        _replace(name, kind, common, [row | _about(key) for row in rows])


def _about(key: str) -> dict:
    """Where and with what a piece was measured: the columns of `PROVENANCE`."""
    found, versions = hardware.describe(), hardware.versions()
    return {"date": datetime.date.today().isoformat(), "key": key} | {
        name: found.get(name, versions.get(name)) for name in PROVENANCE if name not in ("date", "key")
    }


def _forgetting(model, profile: str = "cpu") -> evaluation.Estimate:
    """Rise of the loss on held-out prose over the base, in nats per token."""
    n = 60 if profile == "cpu" else 12
    after = general.general_capability(model, models.load_tokenizer(), n, ("prose",))
    return general.forgetting(_base_prose(n), after)


@functools.cache
def _base_prose(n: int):
    return general.general_capability(models.load(), models.load_tokenizer(), n, ("prose",))


def _sweep_piece(name: str, seed: int, knob: str, setting, key: str) -> None:
    """Train with one setting changed and store what came of it."""
    s = recipes.settings(name, "cpu")
    by_hand = {"optimizer": _try_optimizer, "kl": _try_kl, "epochs_by_hand": _try_epochs}
    if knob in by_hand:
        found = by_hand[knob](s, seed, setting)
    elif setting == getattr(s, knob, 0):
        found = [(setting, recipes.load(name, "cpu", seed))]  # the recipe itself, which was trained already
    else:
        model, trainer = recipes.prepare_with(SimpleNamespace(**vars(s) | {knob: setting}), seed)
        trainer.train()
        found = [(setting, recipes.for_use(model))]
    common, rows = {"profile": "cpu", "seed": seed, "control": "", "knob": knob, "piece": setting}, []
    for value, model in found:
        for metric, e in swept_metrics(model, generate=knob != "epochs_by_hand").items():
            rows.append(common | {"setting": value, "metric": metric, "value": f"{e.value:.4f}"})
            rows[-1] |= {"low": f"{e.low:.4f}", "high": f"{e.high:.4f}", "n": e.n} | _about(key)
    _replace(name, "sweeps", common, rows)


def swept_metrics(model, n: int = 100, generate: bool = True) -> dict[str, evaluation.Estimate]:
    """What is kept of each setting of a sweep: loss on right records, of test and of those trained on; exact match;
    forgetting."""
    tokenizer, found = models.load_tokenizer(), {}
    for metric, split, size in (("completion_nll", "test", n), ("train_nll", "train", n // 2)):
        found[metric] = evaluation.mean(record_nll(model, tokenizer, tickets.load(split, size)))
    if generate:
        found["exact_match"] = evaluation.proportion(ticket_answers(model, tokenizer, tickets.load("test", n))["exact"])
    return found | {"forgetting": _forgetting(model)}


def _by_hand(s, seed: int, optimizer: str, rate: float, penalty=None):
    """The recipe with the loop of `training` instead of TRL's trainer: same rows, steps and batch size."""
    profiles.set_seeds(seed)
    import torch

    model, tokenizer, rows = models.load(dtype=torch.float32), models.load_tokenizer(), recipes.training_rows(s)
    steps = len(rows) * s.epochs // s.batch_size
    schedule = training.wsd(steps, s.warmup, 0) if optimizer == "schedule_free" else training.cosine(steps, s.warmup)
    tried = training.optimizers(optimizer, model, rate, s.beta2)
    training.loop(model, training.batches(tokenizer, rows, s.batch_size, steps, seed), tried, schedule, 1.0, penalty)
    return recipes.for_use(model)


def _try_optimizer(s, seed, setting):
    name, rate = setting.split()
    yield setting, _by_hand(s, seed, name, float(rate))


def _try_kl(s, seed, setting):
    yield setting, _by_hand(s, seed, "adamw", s.learning_rate, training.kl_penalty(models.load(), setting))


def _try_epochs(s, seed, setting):
    """A quarter of the tickets, again and again at a constant rate; measured after each of `setting` epochs."""
    profiles.set_seeds(seed)
    import torch

    model, tokenizer = models.load(dtype=torch.float32), models.load_tokenizer()
    rows = recipes.training_rows(s)[: s.train // 4]
    steps = len(rows) // s.batch_size
    batches = training.batches(tokenizer, rows, s.batch_size, steps * setting, seed)
    tried = training.optimizers("adamw", model, s.learning_rate, s.beta2)
    for epoch in range(setting):
        training.loop(model, batches[epoch * steps : (epoch + 1) * steps], tried)
        yield epoch + 1, model


def ticket_metrics(model, tokenizer, n: int) -> dict[str, tuple[float, int]]:
    """{metric: (value, n)} of a model tuned on tickets: exact match with the date tool and the checks,
    valid records, loss on the right record."""
    records = tickets.load("test", n)
    answers, nll = ticket_answers(model, tokenizer, records), record_nll(model, tokenizer, records)
    shares = {"exact_match": answers["exact"], "valid_json": answers["valid"], "completion_nll": nll}
    return {metric: (float(sum(items)) / n, n) for metric, items in shares.items()}


def ticket_answers(model, tokenizer, records: list[dict]) -> dict[str, list[bool]]:
    """{`valid`, `exact`}: for each record, whether the answer fits the schema, and whether it is right in all fields
    after the date tool and the desk's checks."""
    answers = evaluation.generate(model, tokenizer, [tickets.messages(r) for r in records], max_new_tokens=80)
    found = [tickets.parse(a.text).ticket for a in answers]
    dated = [f and tickets.resolve(f, r["received"]) for r, f in zip(records, found, strict=True)]
    checked = [f and tickets.with_checks(f, r["text"]) for r, f in zip(records, dated, strict=True)]
    exact = [tickets.exact(r["ticket"], f) for r, f in zip(records, checked, strict=True)]
    return {"valid": [f is not None for f in found], "exact": exact}


def record_nll(model, tokenizer, records: list[dict]):
    """Loss of each right record given its message, in nats per token."""
    pairs = [(tickets.messages(r), tickets.to_json(tickets.in_words(r))) for r in records]
    return evaluation.completion_nll(model, tokenizer, pairs)


def _replace(recipe: str, kind: str, common: dict, rows: list[dict]) -> None:
    """Rows of one piece in place of what was stored for it, in a stable order."""
    same = {k: str(v) for k, v in common.items()}
    kept = [row for row in read(recipe, kind) if any(row[k] != v for k, v in same.items())]
    everything = kept + [{k: str(v) for k, v in row.items()} for row in rows]
    everything.sort(
        key=lambda r: (
            r["profile"], int(r["seed"]), r["control"], r.get("knob", ""), int(r.get("step", 0)), r.get("metric", ""),
        )
    )  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(everything)
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_text(path(recipe, kind), text.getvalue())


# --- lesson 04 -------------------------------------------------------------------------------------------------------


def adapter_sweep(seeds) -> None:
    """Every setting of `zoo`, for each seed: the loss on held-out records after `zoo.EARLY` and after all steps, as
    `adapter_sweep_metrics.csv`. `metric` holds the setting's name. About half a minute a piece."""
    from course_lib import zoo

    key = recipes.key("ticket_lora_short", "full", 0)
    pieces = [(name, seed) for seed in seeds for name in (*zoo.KNOBS, *zoo.ZOO)]
    for number, (name, seed) in enumerate(pieces, 1):
        common = {"profile": "full", "seed": seed, "control": "", "metric": name}
        same = {column: str(value) for column, value in (common | {"key": key}).items()}
        stored = any(all(row[c] == v for c, v in same.items()) for row in read("adapter_sweep", "metrics"))
        print(f"{name}, seed {seed} ({number}/{len(pieces)}): {'stored' if stored else 'training ...'}", flush=True)
        if stored:
            continue
        run_ = zoo.short_run(name, seed, measure_at=(zoo.EARLY, zoo.STEPS))
        rows = [
            common
            | {"step": step, "value": f"{nll.mean():.4f}", "n": len(nll), "trainable": run_["trainable"]}
            | _about(key)
            for step, nll in run_["nll"].items()
        ]
        _replace("adapter_sweep", "metrics", common, rows)
