"""Builds everything under `data/` from `data/source/` with a fixed seed, byte for byte.

    course data --check     rebuild in memory and compare
    course data --write     write the files

Nothing here depends on the machine, the Python version or the time. How each file is made, and the house rules that
its answers follow, is in `data/README.md`.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import os
import random
import tomllib
from collections import Counter
from datetime import date, timedelta
from pathlib import Path

from course_lib import manifest
from course_lib import tickets as desk

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "source"
SEED = 20260105
SIZES = {"train": 2000, "dev": 200, "test": 300}
COPIED = ("general", "safety", "policies", "lm_eval")
COPIED_FILES = ("feedback_comments.jsonl", "odd_messages.jsonl", "ladder.csv", "gaps.csv", "mistakes.csv", "claims.csv")

WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
# How often a ticket of this intent carries a due date where its wording has no place for one.
DUE_RATE = {
    "buy": 0.35,
    "track": 0.35,
    "change": 0.3,
    "invoice": 0.3,
    "exchange": 0.25,
    "missing": 0.25,
    "damaged": 0.25,
}


def _ordinal(n: int) -> str:
    return f"{n}{'th' if 10 <= n % 100 <= 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"


def _order(rng) -> str:
    return f"K-{rng.randrange(1000, 10000)}"


def _past_day(rng, received: date) -> str:
    day = received - timedelta(days=rng.randrange(8, 60))
    return rng.choice(
        [
            f"last {day:%A}",
            f"on {day.day} {day:%B}",
            f"in {day:%B}",
            f"on the {_ordinal(day.day)}",
            "two weeks ago",
            "a while ago",
        ]
    )


def _day_phrase(rng, received: date) -> str:
    """A day as customers name it, for a slot that follows "by"."""
    day = received + timedelta(days=rng.randrange(3, 45))
    return rng.choice(
        [f"{day:%A}", f"{day:%A}", f"next {day:%A}", f"next {day:%A}", f"this {day:%A}"]
        + ["tomorrow", "the day after tomorrow", "the end of the month"]
        + [
            f"{day.day} {day:%B}",
            f"{day:%B} {_ordinal(day.day)}",
            f"the {_ordinal(day.day)} of {day:%B}",
            day.isoformat(),
        ]
        + [f"the {_ordinal(day.day)}"] * 2
    )


def _span_phrase(rng) -> str:
    days = rng.randrange(2, 13)
    return rng.choice(
        [f"in {WORDS[days]} days", f"within {WORDS[days]} days", f"in {days} days", f"within {days} days"]
        + ["within a week", "in two weeks", "within two weeks", "in three weeks"]
    )


def _quantity(rng, intent: str) -> int:
    roll = rng.random()
    if roll < 0.45:
        return 1
    if roll < 0.85:
        return rng.randrange(2, 6)
    if intent in ("buy", "change", "missing", "damaged"):
        return rng.randrange(6, 41)
    return rng.randrange(2, 11)


def _counted(rng, one: str, many: str, n: int, definite: bool) -> str:
    word = WORDS[n] if n < len(WORDS) else str(n)
    if definite:
        if n == 1:
            return rng.choice([f"the {one}", f"the {one}", f"my {one}"])
        forms = [f"the {word} {many}", f"my {word} {many}", f"the {n} {many}", f"all {word} {many}"]
        return rng.choice(forms + ([f"both {many}"] * 2 if n == 2 else []))
    if n == 1:
        article = "an" if one[0] in "aeiou" else "a"
        return rng.choice([f"{article} {one}", f"{article} {one}", f"one {one}", f"1 {one}"])
    forms = [f"{word} {many}", f"{word} {many}", f"{n} {many}", f"{n} x {one}"]
    special = {2: "a pair of", 6: "half a dozen", 12: "a dozen"}
    return rng.choice(forms + ([f"{special[n]} {many}"] * 2 if n in special else []))


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _ticket(rng, bank: dict, intent: str, number: str) -> dict:
    received = date(2026, 1, 5) + timedelta(days=rng.randrange(176))
    request = rng.choice(bank["requests"][intent])
    items, due, order = [], None, None
    slots = {"order": _order(rng), "other_order": _order(rng), "past_day": _past_day(rng, received)}

    if "{items}" in request or "{the_items}" in request:
        kinds = 1 + (rng.random() < 0.32) + (rng.random() < 0.12)
        chosen = rng.sample(bank["products"], kinds)
        items = [{"product": one, "quantity": _quantity(rng, intent)} for one, _ in chosen]
        definite = "{the_items}" in request
        slots["the_items" if definite else "items"] = _join(
            [
                _counted(rng, one, many, item["quantity"], definite)
                for (one, many), item in zip(chosen, items, strict=True)
            ]
        )
    named = {item["product"] for item in items}
    other = rng.choice([one for one, _ in bank["products"] if one not in named])
    slots["other_item"] = f"{'an' if other[0] in 'aeiou' else 'a'} {other}"

    before, after = [], []
    if "{order}" in request:
        order = slots["order"]
    elif intent not in desk.NO_ORDER and rng.random() < 0.5:
        order = slots["order"]
        (before if rng.random() < 0.3 else after).append(rng.choice(bank["order_sentences"]))

    if "{due}" not in request and "{span}" not in request and rng.random() < DUE_RATE.get(intent, 0.12):
        after.append(rng.choice(bank["due_sentences"]))
    wording = " ".join([request, *after])
    if "{due}" in wording:
        due = slots["due"] = _day_phrase(rng, received)
    elif "{span}" in wording:
        due = slots["span"] = _span_phrase(rng)

    asked = rng.random() < 0.06
    if asked:
        after.append(rng.choice(bank["human_sentences"]))
    elif rng.random() < 0.1:
        after.append(rng.choice(bank["near_human"]))
    rng.shuffle(after)
    if rng.random() < 0.3:
        before.insert(0, rng.choice(bank["contexts"]))
    elif rng.random() < 0.3:
        after.append(rng.choice(bank["asides"]))

    parts = [*before, request, *after]
    if rng.random() < 0.6:
        parts.insert(0, rng.choice(bank["greetings"]))
    text = " ".join(parts)
    if rng.random() < 0.6:
        text += rng.choice(["\n", " "]) + rng.choice(bank["closings"]).replace("{name}", rng.choice(bank["names"]))
    ticket = {
        "intent": intent,
        "items": items,
        "order_id": order,
        "due_date": desk.resolve_date(due, received.isoformat()) if due else None,
        "needs_human": desk.needs_human(intent, order, asked),
    }
    ticket["priority"] = desk.priority(intent, items, ticket["due_date"], ticket["needs_human"])
    return {
        "id": number,
        "received": received.isoformat(),
        "text": text.format(**slots),
        "due_phrase": due,
        "ticket": ticket,
    }


def split(name: str) -> list[dict]:
    """The generated records of one split. Each run of ten has every intent once, so that any first part is balanced."""
    bank = tomllib.loads((SOURCE / f"wordings_{name}.toml").read_text(encoding="utf-8"))
    rng = random.Random(f"{SEED} {name}")
    records, seen = [], set()
    while len(records) < SIZES[name]:
        intents = list(desk.INTENTS)
        rng.shuffle(intents)
        for intent in intents:
            while True:
                record = _ticket(rng, bank, intent, f"{name}-{len(records) + 1:04d}")
                if record["text"] not in seen:
                    break
            seen.add(record["text"])
            records.append(record)
    return records


def _lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _side_files():
    spec = importlib.util.spec_from_file_location("side_files", HERE / "side_files.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build() -> dict[str, bytes]:
    """Every generated file: path under `data/` -> contents."""
    splits = {name: split(name) for name in SIZES}
    files = {f"tickets/{name}.jsonl": _lines(rows) for name, rows in splits.items()}
    files["tickets/hard.jsonl"] = (SOURCE / "hard.jsonl").read_bytes()
    files |= {name: (SOURCE / name).read_bytes() for name in COPIED_FILES}
    for folder in COPIED:
        for path in sorted((SOURCE / folder).glob("[!.]*")):  # not what a desktop leaves there
            files[f"{folder}/{path.name}"] = path.read_bytes()
    for name in ("facts", "arithmetic"):
        files[f"lm_eval/{name}.jsonl"] = _choices(files[f"general/{name}.jsonl"], random.Random(f"{SEED} {name}"))
    side = _side_files()
    bank = {name: tomllib.loads((SOURCE / f"{name}.toml").read_text(encoding="utf-8")) for name in ("replies", "pii")}
    files["annotations.csv"] = side.annotations(splits["train"], random.Random(f"{SEED} annotations"))
    files |= side.raw_log(splits["train"], splits["test"], random.Random(f"{SEED} raw log"), bank["pii"])
    files["replies/drafts.jsonl"] = side.replies(splits["train"], random.Random(f"{SEED} replies"), bank["replies"])
    files["manifest.json"] = _manifest(files, splits["train"])
    return files


def _choices(lines: bytes, rng) -> bytes:
    """Questions as lm-eval reads them: `choices` in random order, and the place of the right one as `label`. Whoever
    takes the first of several equally likely answers gains nothing."""
    found = []
    for record in map(json.loads, lines.splitlines()):
        choices = rng.sample([record["answer"], *record["wrong"]], 1 + len(record["wrong"]))
        place = choices.index(record["answer"])
        found.append({"id": record["id"], "question": record["question"], "choices": choices, "label": place})
    return _lines(found)


def _manifest(files: dict[str, bytes], train: list[dict]) -> bytes:
    """manifest.json: the facts of `source/manifest.toml` with the counts, shares and hashes of what was built."""
    about = tomllib.loads((SOURCE / "manifest.toml").read_text(encoding="utf-8"))
    no_reasons = tomllib.loads((SOURCE / "wordings_train.toml").read_text(encoding="utf-8"))["near_human"]
    for part in about["components"]:
        rows = [record for record in train if manifest.component(record, no_reasons) == part["name"]]
        part |= {"count": len(rows), "share": round(len(rows) / len(train), 4), "sha256": manifest.digest(rows)}
    for part in [*about["beside"], *about["held_out"], *about["excluded"]]:
        contents = files[part["file"]]
        part |= {"count": contents.count(b"\n"), "sha256": hashlib.sha256(contents).hexdigest()}
    kinds = Counter(row["kind"] for row in csv.DictReader(io.StringIO(files["raw_log_key.csv"].decode())))
    log = about["excluded"][0]
    for step in log["steps"]:
        step["count"] = sum(kinds[kind] for kind in step.pop("kinds"))
    log["left"] = log["count"] - sum(step["count"] for step in log["steps"] if step["does"] == "removes")
    return (json.dumps(about, indent=1, ensure_ascii=False) + "\n").encode()


def check() -> list[str]:
    """What differs between the files on disk and a fresh build: one line each, empty when all is well."""
    problems = []
    for name, contents in build().items():
        path = HERE / name
        if not path.exists():
            problems.append(f"data/{name} is missing: run `course data --write`")
        elif path.read_bytes() != contents:
            problems.append(f"data/{name} differs from a fresh build: edit data/source/ and run `course data --write`")
    return problems


def write() -> list[str]:
    """Writes what differs, each file under a temporary name first; returns the names."""
    written = []
    for name, contents in build().items():
        path = HERE / name
        if path.exists() and path.read_bytes() == contents:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        temporary.write_bytes(contents)
        os.replace(temporary, path)
        written.append(name)
    return written
