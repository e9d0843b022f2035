"""The reply task: drafting an answer to a ticket, and the rubric that a program checks.

A reply names the order or the product, takes the one action that the intent calls for, apologises when that is due and
not otherwise, states nothing that the ticket does not back, promises nothing, has at most 40 words and signs off. The
word lists are in `data/source/replies.toml`. A program sees marks, not meaning: `data/README.md` says what it misses.

A sample is `{"ticket_id", "replies"}`: several replies to one ticket. Pairs and thumbs are made from samples.
"""

from __future__ import annotations

import difflib
import json
import random
import re
import tomllib
from functools import cache
from pathlib import Path

from course_lib import CourseError, tickets

SYSTEM = "Draft a short reply to the customer."
CRITERIA = ("names", "action", "apology", "true", "no_promise", "short", "signs_off")
MAX_CHARS = 330  # words glued together would pass a count of words
NEW_TOKENS = 96  # a good reply has about 45
TEMPERATURE = 0.7  # of drawn replies: low enough for a small model to stay with what it knows, high enough to differ
STOCK = 2  # phrases for each action, apology and habit in the demonstrations: the desk's people have stock ones
SAMPLES = tickets.DATA / "replies" / "sampled.jsonl"


@cache
def bank() -> dict:
    """`data/source/replies.toml`: sentences, marks and habits."""
    return tomllib.loads((tickets.DATA / "source" / "replies.toml").read_text(encoding="utf-8"))


@cache
def catalogue() -> tuple[str, ...]:
    """Every product of the shop, the longest names first."""
    banks = [tomllib.loads(p.read_text(encoding="utf-8")) for p in (tickets.DATA / "source").glob("wordings_*.toml")]
    return tuple(sorted({name for b in banks for name, _ in b["products"]}, key=lambda name: (-len(name), name)))


@cache
def _pattern(kind: str) -> re.Pattern:
    """One regular expression for a list of the bank: a search for each mark takes ten times as long."""
    if kind == "products":
        return re.compile(rf"\b({'|'.join(map(re.escape, catalogue()))})(?:s|es)?\b")
    marks = bank()[kind]
    return re.compile(rf"\b(?:{'|'.join(marks if kind == 'fact_marks' else map(re.escape, marks))})\b")


# --- tickets and prompts ---------------------------------------------------------------------------------------------


def load(split: str, n: int | None = None, skip: int = 0) -> list[dict]:
    """The tickets of a split that name an order or a product, `n` of them after the first `skip`.

    The others have nothing that a reply could name.
    """
    usable = [r for r in tickets.load(split) if r["ticket"]["order_id"] or r["ticket"]["items"]]
    return usable[skip : None if n is None else skip + n]


@cache
def _by_id() -> dict[str, dict]:
    return {r["id"]: r for split in ("train", "dev", "test", "hard") for r in tickets.load(split)}


def record(ticket_id: str) -> dict:
    """The ticket with that id; CourseError where there is none."""
    try:
        return _by_id()[ticket_id]
    except KeyError:
        raise CourseError(f"no ticket {ticket_id!r} in data/tickets: the sample is of other data.") from None


def messages(record: dict) -> list[dict]:
    """The prompt of a reply: a short instruction and the ticket's record, as lesson 01's model writes it."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": tickets.to_json(record["ticket"])}]


# --- the rubric ------------------------------------------------------------------------------------------------------

_UNDONE = re.compile(  # in the sentence of an action: it is not taken, or only talked about
    r"\b(not|no|never|cannot|unable|neither|nor|refuse|decline|unless|if|would|could|might|may|should|instead)\b|n't\b|\?"
)
_UNSORRY = re.compile(
    r"\b(not|no|never|nothing|without|need|should be|must|why)\b(?:\W+\w+){0,3}?\W+(sorry|apolog\w+|regret\w*)|"
    r"n't(?:\W+\w+){0,3}?\W+(sorry|apolog\w+|regret\w*)"
)
_CODE = re.compile(r"\b[a-z]\s?[-–]?\s?\d{3,}\b")


def apology_due(record: dict) -> bool:
    """An apology is due for goods that arrived damaged or not at all."""
    return record["ticket"]["intent"] in bank()["apology_intents"]


def rubric(record: dict, text: str) -> dict[str, bool]:
    """Whether the reply keeps each criterion of `CRITERIA`. Never raises, whatever the text is."""
    ticket, known = record["ticket"], bank()
    text = (text or "").replace("’", "'").replace("‑", "-").strip()
    sign_off = known["sign_off"]
    signed = text.endswith(sign_off) and text.count(sign_off) == 1
    body = " ".join((text.removesuffix(sign_off) if signed else text).lower().split())
    sentences = re.split(r"(?<=[.!?])\s+", body)
    return {
        "names": bool(_named(ticket, body)),
        "action": _actions(sentences) == [ticket["intent"]] and not _actions(sentences, undone=True),
        "apology": _apologises(body) == apology_due(record),
        "true": not _unbacked(record, body),
        "no_promise": not _pattern("promise_marks").search(body),
        "short": len(re.split(r"[\s/_–—]+", text)) <= known["max_words"] and len(text) <= MAX_CHARS,
        "signs_off": signed,
    }


def passes(record: dict, text: str) -> bool:
    """All criteria kept."""
    return all(rubric(record, text).values())


def score(record: dict, text: str) -> int:
    """How many criteria are kept, 0 to 7."""
    return sum(rubric(record, text).values())


def _named(ticket: dict, body: str) -> list[str]:
    """The order's number and the products of the ticket that occur in the reply, a plural included."""
    names = [ticket["order_id"]] if ticket["order_id"] else []
    names += [item["product"] for item in ticket["items"]]
    return [n for n in names if re.search(rf"\b{re.escape(n.lower())}(s|es)?\b", body)]


def _actions(sentences: list[str], undone: bool = False) -> list[str]:
    """The intents whose action is taken; with `undone`, those whose action is only denied, asked or supposed."""
    return [
        intent
        for intent, spec in bank()["intents"].items()
        if any(mark in s and bool(_UNDONE.search(s)) == undone for s in sentences for mark in spec["marks"])
    ]


def _apologises(body: str) -> bool:
    return any(mark in body for mark in bank()["apology_marks"]) and not _UNSORRY.search(body)


def _unbacked(record: dict, body: str) -> list[str]:
    """What the reply states and the ticket does not back: claims, another order, other products, other numbers."""
    ticket = record["ticket"]
    found = [m.group() for m in _pattern("fact_marks").finditer(body)]
    order = (ticket["order_id"] or "\0").lower()
    found += [code for code in _CODE.findall(body) if code != order]
    rest = body.replace(order, " ")
    quantities = {str(item["quantity"]) for item in ticket["items"]}
    found += [n for n in re.findall(r"\d+", _CODE.sub(" ", rest)) if n not in quantities]
    for item in sorted(ticket["items"], key=lambda item: -len(item["product"])):
        rest = rest.replace(item["product"].lower(), " ")
    message = record["text"].lower()
    return found + [m.group() for m in _pattern("products").finditer(rest) if m[1] not in message]


# --- demonstrations --------------------------------------------------------------------------------------------------


def demonstration(record: dict, rng: random.Random, careful: bool = False) -> str:
    """A reply as the desk's people wrote it: by one of four writers, with that writer's habits.

    About a quarter keep the rubric; more than half promise something. With `careful` the reply has no habit and keeps
    it always. `record` has to name an order or a product (`load` gives such).
    """
    known, ticket = bank(), record["ticket"]
    if not (ticket["order_id"] or ticket["items"]):
        raise ValueError(f"{record['id']} names neither an order nor a product: take tickets from replies.load")
    writers = known["writers"]
    number = rng.choices(range(len(writers)), [w["weight"] for w in writers])[0]
    has = {h: not careful and rng.random() < writers[number].get(h, 0) for h in _HABITS}
    body = [_action(ticket, rng, "your order" if has["no_name"] else None)]
    if apology_due(record) != has["wrong_apology"]:
        body.insert(0, rng.choice(known["apologies"][:STOCK]))
    if has["other_action"]:
        other = rng.choice([i for i in tickets.INTENTS if i != ticket["intent"]])
        body.append(_action(ticket | {"intent": other}, rng, "it"))
    body += [rng.choice(known["habits"][h + "s"][:STOCK]) for h in ("fact", "promise") if has[h]]
    opening, closing = known["openings"][number], known["closings"][number]  # each writer's own
    if has["chatter"]:
        opening += " " + rng.choice(known["habits"]["chatter"][:STOCK])
    closing = closing.split("\n")[0] if has["no_sign_off"] else closing
    full = " ".join([opening, *body]) + "\n" + closing
    if has["chatter"] or (writers[number]["name"] != "brisk" and len(full.split()) <= known["max_words"]):
        return full
    return " ".join(body) + "\n" + closing


_HABITS = ("no_name", "wrong_apology", "other_action", "fact", "promise", "chatter", "no_sign_off")


def _action(ticket: dict, rng: random.Random, ref: str | None = None) -> str:
    """A sentence that takes the action of the ticket's intent, with the order or the products named as `ref`."""
    spec = bank()["intents"][ticket["intent"]]
    products = " and ".join(item["product"] for item in ticket["items"][:2])
    if ref is None and (not ticket["order_id"] or (products and ticket["intent"] in tickets.NO_ORDER)):
        ref = spec["product_ref"].replace("{products}", products)
    elif ref is None:
        ref = rng.choice(["order ", "your order "]) + ticket["order_id"]
        ref += f" ({products})" if products and rng.random() < 0.3 else ""
    return rng.choice(spec["actions"][:STOCK]).replace("{ref}", ref)


def examples(records: list[dict], seed: int = 0, careful: bool = False) -> list[dict]:
    """Demonstrations as prompt and completion, one a ticket; each ticket has a draw of its own."""
    return [
        {"prompt": messages(r), "completion": _assistant(demonstration(r, random.Random(f"{seed} {r['id']}"), careful))}
        for r in records
    ]


def _assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


# --- samples, pairs, thumbs ------------------------------------------------------------------------------------------


def answers(
    model, tokenizer, records: list[dict], seed: int = 0, temperature: float = TEMPERATURE, **options
) -> list[str]:
    """One reply of the model to each ticket, drawn at `temperature`; 0 takes the likeliest token each time."""
    from course_lib import evaluation, profiles

    profiles.set_seeds(seed)
    drawing = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    prompts = [messages(r) for r in records]
    found = evaluation.generate(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS, **drawing | options)
    return [a.text for a in found]


def sample(model, tokenizer, records: list[dict], n: int = 4, seed: int = 0) -> list[dict]:
    """`n` replies to each ticket, drawn from the model itself: what on-policy preference data are made of."""
    drawn = answers(model, tokenizer, [r for r in records for _ in range(n)], seed, label="sampling")
    return [{"ticket_id": r["id"], "replies": drawn[i * n : (i + 1) * n]} for i, r in enumerate(records)]


def drawn(records: list[dict], n: int = 4, seed: int = 0) -> list[dict]:
    """Samples whose replies are the four writers' instead of a model's: off-policy, and quick."""
    return [
        {"ticket_id": r["id"], "replies": [demonstration(r, random.Random(f"{seed} {r['id']} {i}")) for i in range(n)]}
        for r in records
    ]


def pairs(samples: list[dict], kind: str = "all", per_ticket: int = 1, limit: int | None = None) -> list[dict]:
    """Prompt, chosen and rejected, from replies to the same ticket ranked by the rubric.

    Chosen keeps the whole rubric; a ticket without such a reply, or without one that breaks it, gives no pair.
    kind: `hard` takes the rejected reply that resembles the chosen one most, word by word, `easy` the one that does
    least, `all` the rejected ones as they were drawn. `broken` says how many criteria rejected breaks.
    """
    if kind not in ("all", "hard", "easy"):
        raise ValueError(f"kind {kind!r}: choose all, hard or easy")
    found = []
    for entry in samples:
        r = record(entry["ticket_id"])
        scores = {text: score(r, text) for text in entry["replies"] if text.strip()}  # equal replies count once
        good = [text for text, s in scores.items() if s == len(CRITERIA)]
        bad = [text for text, s in scores.items() if s < len(CRITERIA)]
        for chosen in good[: min(per_ticket, len(bad))]:
            if kind != "all":
                likeness = {t: difflib.SequenceMatcher(None, chosen.split(), t.split()).ratio() for t in bad}
                bad.sort(key=likeness.get, reverse=kind == "hard")
            rejected = bad.pop(0)
            pair = {"prompt": messages(r), "chosen": _assistant(chosen), "rejected": _assistant(rejected)}
            found.append(pair | {"ticket_id": r["id"], "broken": len(CRITERIA) - scores[rejected]})
    return found[:limit]


def thumbs(samples: list[dict], up: int | None = None, down: int | None = None, seed: int = 0) -> list[dict]:
    """Prompt, completion and label: each reply judged alone, a thumb up (True) where it keeps the rubric.

    up, down: how many of each at most, drawn with `seed`; None keeps all. Equal replies to a ticket count once.
    """
    rows = []
    for entry in samples:
        r = record(entry["ticket_id"])
        rows += [
            {"prompt": messages(r), "completion": _assistant(text), "label": passes(r, text), "ticket_id": r["id"]}
            for text in dict.fromkeys(entry["replies"])
            if text.strip()
        ]
    random.Random(f"{seed} thumbs").shuffle(rows)
    kept = {True: up, False: down}
    seen = {True: 0, False: 0}
    found = []
    for row in rows:
        seen[row["label"]] += 1
        if kept[row["label"]] is None or seen[row["label"]] <= kept[row["label"]]:
            found.append(row)
    return found


def write_samples(samples: list[dict], path: Path, about: dict) -> None:
    """Samples as JSON Lines; the first line is their provenance: who wrote them, how, when and with which versions."""
    from course_lib.results import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"about": about}, *samples]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines))


def read_samples(path: Path | None = None) -> tuple[list[dict], dict]:
    """(samples, provenance) as `write_samples` stored them, at `SAMPLES` where no path is given; CourseError that names
    the line where one is broken."""
    path = path or SAMPLES
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        about, samples = lines[0]["about"], lines[1:]
        for number, line in enumerate(samples, 2):
            if not isinstance(line.get("replies"), list) or not all(isinstance(t, str) for t in line["replies"]):
                raise ValueError(f"line {number} has no list of replies")
            record(line["ticket_id"])
    except FileNotFoundError:
        raise CourseError(f"no stored sample at {path.name}: run `make reference LESSON=06`.") from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise CourseError(f"{path.name} is no sample of replies ({error}): make it again.") from None
    return samples, about
