"""The running case: records of the ticket desk, the house rules, the date tool, the parser and the scorer.

The rules are written for people in `data/README.md`; this module is the same rules for the machine.
"""

from __future__ import annotations

import calendar
import json
import re
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

DATA = Path(__file__).resolve().parent.parent / "data"

Intent = Literal["buy", "track", "cancel", "change", "return", "exchange", "damaged", "missing", "invoice", "question"]
Priority = Literal["low", "normal", "high", "urgent"]
INTENTS: tuple[str, ...] = get_args(Intent)
PRIORITIES: tuple[str, ...] = get_args(Priority)
FIELDS = ("intent", "items", "order_id", "due_date", "needs_human", "priority")

# House rule 5: the level a ticket starts from. Everything that is not named starts at "normal".
START_LEVEL = {"question": 0, "invoice": 0, "damaged": 2, "missing": 2}
BULK = 10
NO_ORDER = ("buy", "question")  # intents that are not about an order which exists already
MAX_ANSWER_CHARS = 4000  # a record has about 200 characters; beyond this an answer is babble and is not parsed


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Item(_Strict):
    product: Annotated[str, Field(min_length=1, max_length=60)]
    quantity: Annotated[int, Field(ge=1, le=999)]


class Ticket(_Strict):
    """A record as the desk keeps it. `due_date` may still hold the customer's own words ("next Friday"):
    `resolve` turns those into an ISO date."""

    intent: Intent
    items: Annotated[list[Item], Field(max_length=8)]
    order_id: Annotated[str, Field(pattern=r"^[A-Z]-[0-9]{4}$")] | None
    due_date: Annotated[str, Field(min_length=1, max_length=40)] | None
    needs_human: bool
    priority: Priority


def needs_human(intent: str, order_id: str | None, asked: bool) -> bool:
    """House rule 4. A matter of an order whose number is missing has to be looked up by a person; so has whatever the
    customer `asked` a person for, threatens with, or got hurt by."""
    return asked or (order_id is None and intent not in NO_ORDER)


def priority(intent: str, items: list[dict], due_date: str | None, needs_human: bool) -> str:
    """House rule 5. A due date and a bulk order raise the level by one step each; a ticket that needs a person
    is at least "high"."""
    level = START_LEVEL.get(intent, 1)
    level += due_date is not None
    level += sum(item["quantity"] for item in items) >= BULK
    if needs_human:
        level = max(level, PRIORITIES.index("high"))
    return PRIORITIES[min(level, len(PRIORITIES) - 1)]


# --- the date tool ---------------------------------------------------------------------------------------------------

_WEEKDAYS = {name.lower(): i for i, name in enumerate(calendar.day_name)}
_MONTHS = {name.lower(): i for i, name in enumerate(calendar.month_name) if name}
_NUMBERS = {
    w: i for i, w in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())
} | {"a": 1, "an": 1, "fourteen": 14, "fifteen": 15, "twenty": 20, "thirty": 30}
_LEADS = re.compile(r"^(?:by|on|for|until|till|before|no later than|at the latest|latest|the latest)\s+")


def _number(word: str) -> int:
    if word.isdigit():
        return int(word)
    if word in _NUMBERS:
        return _NUMBERS[word]
    raise ValueError(f"not a number: {word!r}")


def resolve_date(phrase: str, received: str) -> str:
    """The day that `phrase` means for a message of the day `received` (both as text, the result in ISO form).

    The meanings are house rule 3; weeks start on Monday. Raises ValueError, naming the phrase, for anything else.
    """
    day = date.fromisoformat(received)
    text = _LEADS.sub("", " ".join(phrase.lower().replace(",", " ").split()).rstrip(".!"))
    try:
        if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
            return date.fromisoformat(text).isoformat()
        if text in ("today", "tomorrow", "the day after tomorrow"):
            return (day + timedelta(days=("today", "tomorrow", "the day after tomorrow").index(text))).isoformat()
        if text == "the end of the month":
            return day.replace(day=calendar.monthrange(day.year, day.month)[1]).isoformat()
        if m := re.fullmatch(r"(?:in|within)?\s*(?:the next\s+)?(\w+)[ -](day|week)s?(?:'? time)?", text):
            return (day + timedelta(days=_number(m[1]) * (7 if m[2] == "week" else 1))).isoformat()
        if m := re.fullmatch(r"(?:(this|next|coming|the coming)\s+)?([a-z]+day)", text):
            ahead = (_WEEKDAYS[m[2]] - day.weekday()) % 7 or 7  # the first such day after `received`
            if m[1] == "next":
                ahead = 7 - day.weekday() + _WEEKDAYS[m[2]]  # the one in the week that starts next Monday
            return (day + timedelta(days=ahead)).isoformat()
        if m := re.fullmatch(r"(?:the )?(\d{1,2})(?:st|nd|rd|th)", text):
            month = day.replace(day=1)
            for _ in range(13):
                last = calendar.monthrange(month.year, month.month)[1]
                if int(m[1]) <= last and month.replace(day=int(m[1])) > day:
                    return month.replace(day=int(m[1])).isoformat()
                month = (month + timedelta(days=32)).replace(day=1)
        m = re.fullmatch(r"(?:the )?(\d{1,2})(?:st|nd|rd|th)?(?: of)? ([a-z]+)", text)
        n = re.fullmatch(r"([a-z]+) (?:the )?(\d{1,2})(?:st|nd|rd|th)?", text)
        if m or n:
            number, month_name = (m[1], m[2]) if m else (n[2], n[1])
            for year in range(day.year, day.year + 9):  # far enough for 29 February
                if int(number) > calendar.monthrange(year, _MONTHS[month_name])[1]:
                    continue
                found = date(year, _MONTHS[month_name], int(number))
                if found > day:
                    return found.isoformat()
    except (KeyError, ValueError, OverflowError):
        pass
    raise ValueError(f"the date tool does not know {phrase!r}: see house rule 3 in data/README.md")


def resolve(ticket: dict, received: str) -> dict:
    """`ticket` with the customer's words for the date replaced by the ISO date; unknown words stay as they are."""
    if ticket["due_date"] is None:
        return ticket
    try:
        return ticket | {"due_date": resolve_date(ticket["due_date"], received)}
    except ValueError:
        return ticket


def with_checks(ticket: dict, text: str) -> dict:
    """`ticket` after the desk's checks: what the message cannot back is dropped, what house rules compute is computed.

    A product or an order id has to stand in the message. The rare reasons of rule 4 that only the text holds are lost.
    """
    text = text.lower()
    ticket = ticket | {"items": [item for item in ticket["items"] if item["product"].lower() in text]}
    if ticket["order_id"] and ticket["order_id"].lower() not in text:
        ticket["order_id"] = None
    ticket["needs_human"] = needs_human(ticket["intent"], ticket["order_id"], asked=False)
    ticket["priority"] = priority(ticket["intent"], ticket["items"], ticket["due_date"], ticket["needs_human"])
    return ticket


def in_words(record: dict) -> dict:
    """The gold ticket of `record` with the date in the customer's own words: what a model that works with the date
    tool is asked to write."""
    return record["ticket"] | {"due_date": record["due_phrase"]}


# --- parsing: nothing is repaired, nothing is guessed ----------------------------------------------------------------


@dataclass(frozen=True)
class Parsed:
    """`ticket` is the record or None; `error` says why there is none: empty, too long, json, duplicate key, schema."""

    ticket: dict | None
    error: str | None = None


def _no_duplicates(pairs):
    keys = [k for k, _ in pairs]
    if len(set(keys)) < len(keys):
        raise KeyError("duplicate key")
    return dict(pairs)


def _refuse(constant):
    raise ValueError(f"{constant} is not JSON")


def parse(text: str) -> Parsed:
    """Exactly one JSON object under the schema, with white space around it at most."""
    if not text or not text.strip():
        return Parsed(None, "empty")
    if len(text) > MAX_ANSWER_CHARS:
        return Parsed(None, "too long")
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_refuse)
    except KeyError:
        return Parsed(None, "duplicate key")
    except (ValueError, RecursionError):
        return Parsed(None, "json")
    try:
        return Parsed(Ticket.model_validate(value).model_dump())
    except ValidationError as error:
        where = ".".join(str(p) for p in error.errors()[0]["loc"]) or type(value).__name__
        return Parsed(None, f"schema: {where}")


def to_json(ticket: dict) -> str:
    """One line without spaces after separators: the form in which records are stored, prompted and trained."""
    return json.dumps({f: ticket[f] for f in FIELDS}, ensure_ascii=False, separators=(",", ":"))


# --- scoring ---------------------------------------------------------------------------------------------------------


def _comparable(field: str, value):
    if field == "items":
        return sorted((i["product"], i["quantity"]) for i in value)
    return value


def field_matches(gold: dict, answer: dict | None) -> dict[str, bool]:
    """Per field, whether `answer` has the gold value. The order of items is free; an item named twice counts twice."""
    return {f: answer is not None and _comparable(f, gold[f]) == _comparable(f, answer[f]) for f in FIELDS}


def exact(gold: dict, answer: dict | None) -> bool:
    """All fields right."""
    return all(field_matches(gold, answer).values())


# --- records and prompts ---------------------------------------------------------------------------------------------


@cache
def _read(path: Path) -> tuple[str, ...]:
    return tuple(path.read_text(encoding="utf-8").splitlines())


def load(split: str, n: int | None = None) -> list[dict]:
    """The records of `train`, `dev`, `test` or `hard`, the first `n` of them (the files are in random order)."""
    path = DATA / "tickets" / f"{split}.jsonl"
    if not path.exists():
        names = sorted(p.stem for p in path.parent.glob("*.jsonl"))
        raise ValueError(f"no split {split!r}: choose one of {names}")
    return [json.loads(line) for line in _read(path)[:n]]


SYSTEM = "Turn the message into a record."


def messages(record: dict, system: str = SYSTEM) -> list[dict]:
    """The prompt of a tuned model: a short instruction and the message. Rules and examples are in the weights."""
    return [{"role": "system", "content": system}, {"role": "user", "content": record["text"]}]
