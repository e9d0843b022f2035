"""Stored references: what a recipe does with several seeds and with training switched off.

`make reference` measures them piece by piece (one training each, resumable) and writes `data/reference/*.csv`; nothing
else does. Lessons draw the reader's curve over them, and the bands in `course.toml` follow from them by `band`.
"""

from __future__ import annotations

import csv
import datetime
import io
import math

from course_lib import CourseError, evaluation, hardware, models, profiles, recipes, tickets
from course_lib.results import write_text

FOLDER = tickets.DATA / "reference"
SEEDS = (0, 1, 2)
CONTROL = "learning_rate_0"
PROFILES = ("cpu", "ci")
PROVENANCE = ("date", "cpu", "features", "dtype", "torch", "transformers", "trl", "peft", "key")


def path(recipe: str, kind: str):
    """`data/reference/<recipe>_<kind>.csv`; kind is `curves` (loss by step) or `metrics`."""
    return FOLDER / f"{recipe}_{kind}.csv"


def read(recipe: str, kind: str) -> list[dict]:
    """The stored rows, all values as text; none where nothing is stored yet."""
    try:
        with open(path(recipe, kind), newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


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
    if any(table["id"].startswith("02") for table in chosen):
        from course_lib import data_effects

        data_effects.make_reference(seeds)
    elif not names:
        raise CourseError(f"lesson {lesson} introduces no recipe: it has no reference to measure.")
    for name in names:
        pieces = [
            (p, s, control) for p in PROFILES for s in seeds for control in ("", CONTROL) if not control or s == 0
        ]
        for number, (profile, s, control) in enumerate(pieces, 1):
            what = f"{name}, profile {profile}, seed {s}{', ' + control if control else ''} ({number}/{len(pieces)})"
            key = recipes.key(name, profile, s)
            if any((r["profile"], r["seed"], r["control"], r["key"]) == (profile, str(s), control, key)
                   for r in read(name, "metrics")):  # fmt: skip
                print(f"{what}: stored")
                continue
            print(f"{what}: training ...", flush=True)
            _piece(name, profile, s, control, key)
    return 0


def _piece(name: str, profile: str, seed: int, control: str, key: str) -> None:
    model, trainer = recipes.prepare(name, profile, seed, **({"learning_rate": 0.0} if control else {}))
    trainer.train()
    if not control:
        recipes.keep(model, name, profile, seed, {"losses": recipes.losses(trainer)})
    measured = ticket_metrics(model, models.load_tokenizer(), 150 if profile == "cpu" else 24)
    found, versions = hardware.describe(), hardware.versions()
    about = {"date": datetime.date.today().isoformat(), "key": key} | {
        name: found.get(name, versions.get(name)) for name in PROVENANCE if name not in ("date", "key")
    }
    common = {"profile": profile, "seed": seed, "control": control}
    curve = [common | {"step": step, "loss": f"{loss:.4f}"} for step, loss in recipes.losses(trainer)]
    metrics = [common | {"metric": m, "value": f"{v:.4f}", "n": n} for m, (v, n) in measured.items()]
    for kind, rows in (("curves", curve), ("metrics", metrics)):
        _replace(name, kind, common, [row | about for row in rows])


def ticket_metrics(model, tokenizer, n: int) -> dict[str, tuple[float, int]]:
    """{metric: (value, n)} of a model tuned on tickets: exact match with the date tool and the checks,
    valid records, loss on the right record."""
    records = tickets.load("test", n)
    answers = evaluation.generate(model, tokenizer, [tickets.messages(r) for r in records], max_new_tokens=100)
    found = [tickets.parse(a.text).ticket for a in answers]
    dated = [f and tickets.resolve(f, r["received"]) for r, f in zip(records, found, strict=True)]
    checked = [f and tickets.with_checks(f, r["text"]) for r, f in zip(records, dated, strict=True)]
    exact = [tickets.exact(r["ticket"], f) for r, f in zip(records, checked, strict=True)]
    pairs = [(tickets.messages(r), tickets.to_json(tickets.in_words(r))) for r in records]
    nll = evaluation.completion_nll(model, tokenizer, pairs)
    valid = sum(f is not None for f in found) / n
    return {"exact_match": (sum(exact) / n, n), "valid_json": (valid, n), "completion_nll": (float(nll.mean()), n)}


def _replace(recipe: str, kind: str, common: dict, rows: list[dict]) -> None:
    """Rows of one piece in place of what was stored for it, in a stable order."""
    same = {k: str(v) for k, v in common.items()}
    kept = [row for row in read(recipe, kind) if any(row[k] != v for k, v in same.items())]
    everything = kept + [{k: str(v) for k, v in row.items()} for row in rows]
    everything.sort(
        key=lambda r: (r["profile"], int(r["seed"]), r["control"], int(r.get("step", 0)), r.get("metric", ""))
    )
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(everything)
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_text(path(recipe, kind), text.getvalue())
