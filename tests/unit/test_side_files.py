"""The files beside the tickets, on made-up tickets: they do not wait for the real ones."""

import csv
import importlib.util
import io
import ipaddress
import json
import random
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from course_lib.tickets import needs_human

DATA = Path(__file__).parents[2] / "data"
spec = importlib.util.spec_from_file_location("side_files", DATA / "side_files.py")
side = importlib.util.module_from_spec(spec)
spec.loader.exec_module(side)

PII = tomllib.loads((DATA / "source" / "pii.toml").read_text(encoding="utf-8"))
BANK = tomllib.loads((DATA / "source" / "replies.toml").read_text(encoding="utf-8"))
INTENTS = ["buy", "track", "cancel", "change", "return", "exchange", "damaged", "missing", "invoice", "question"]
PRODUCTS = ["desk lamp", "kettle", "stainless steel water bottle", "cast iron frying pan", "desk", "bath mat"]


def make_tickets(split: str, count: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    words = [
        f"{a}{b}{c}" for a in ("lo", "mi", "ra", split[:2]) for b in ("ten", "dor", "vis", "gul") for c in "aeiouy"
    ]
    tickets = []
    for n in range(count):
        text = "Hello, I would like this parcel" if n % 3 else "Hi,"
        for _ in range(1 + rng.randrange(5)):
            text += " " + " ".join(rng.choice(words) for _ in range(5 + rng.randrange(6))).capitalize() + "."
        intent = INTENTS[n % len(INTENTS)]
        items = [{"product": rng.choice(PRODUCTS), "quantity": 1 + rng.randrange(6)} for _ in range(rng.randrange(4))]
        order = f"K-{rng.randrange(1000, 10000)}" if intent not in ("buy", "question") and rng.random() < 0.6 else None
        human = needs_human(intent, order, rng.random() < 0.15)
        ticket = {"intent": intent, "items": items, "order_id": order, "due_date": None, "needs_human": human}
        tickets.append(
            {
                "id": f"{split}-{n:04d}",
                "received": "2026-03-09",
                "text": text + "\nAda",
                "ticket": ticket | {"priority": "high"},
            }
        )
    return tickets


TRAIN, TEST = make_tickets("train", 1500, 1), make_tickets("test", 300, 2)


def table(content: bytes) -> list[dict]:
    return list(csv.DictReader(io.StringIO(content.decode())))


@pytest.fixture(scope="module")
def log():
    files = side.raw_log(TRAIN, TEST, random.Random(7), PII)
    return files, files["raw_log.jsonl"].split(b"\n")[:-1], table(files["raw_log_key.csv"])


def text_of(lines: list[bytes], row: dict) -> str:
    return json.loads(lines[int(row["line_number"]) - 1])["text"]


def test_the_same_seed_gives_the_same_bytes():
    for make in (
        lambda seed: side.annotations(TRAIN, random.Random(seed)),
        lambda seed: side.raw_log(TRAIN, TEST, random.Random(seed), PII),
        lambda seed: side.replies(TRAIN, random.Random(seed), BANK),
    ):
        assert make(3) == make(3)
        assert make(3) != make(4)


def test_the_tickets_are_left_as_they_are():
    before = json.dumps([TRAIN, TEST])
    side.annotations(TRAIN, random.Random(5))
    side.raw_log(TRAIN, TEST, random.Random(5), PII)
    side.replies(TRAIN, random.Random(5), BANK)
    assert json.dumps([TRAIN, TEST]) == before


def fleiss_kappa(ratings: list[list[str]]) -> float:
    """Fleiss 1971; `ratings` has one list of labels an item."""
    raters = len(ratings[0])
    counts = [Counter(item) for item in ratings]
    observed = sum(sum(c * (c - 1) for c in item.values()) for item in counts) / (len(ratings) * raters * (raters - 1))
    totals = Counter(label for item in ratings for label in item)
    expected = sum((n / (len(ratings) * raters)) ** 2 for n in totals.values())
    return (observed - expected) / (1 - expected)


@pytest.mark.parametrize("seed", range(5))
def test_annotations(seed):
    rows = table(side.annotations(TRAIN, random.Random(seed)))
    assert list(rows[0]) == ["ticket_id", "rater", "intent", "needs_human"]
    by_ticket = {}
    for row in rows:
        by_ticket.setdefault(row["ticket_id"], {})[row["rater"]] = row
    assert len(by_ticket) == 160 and all(list(raters) == ["a", "b", "c"] for raters in by_ticket.values())

    truth = {t["id"]: t["ticket"] for t in TRAIN}
    right = {r: sum(v[r]["intent"] == truth[k]["intent"] for k, v in by_ticket.items()) / 160 for r in "abc"}
    assert right["a"] == pytest.approx(0.93, abs=0.01) and right["b"] == pytest.approx(0.93, abs=0.01)
    assert right["c"] == pytest.approx(0.55, abs=0.01)
    for row in rows:
        if row["rater"] != "c" and row["intent"] != truth[row["ticket_id"]]["intent"]:
            assert row["intent"] == side.NEIGHBOURS[truth[row["ticket_id"]]["intent"]]
        assert row["needs_human"] in ("true", "false")
    assert fleiss_kappa([[v[r]["intent"] for r in "abc"] for v in by_ticket.values()]) < 0.70
    assert fleiss_kappa([[v[r]["intent"] for r in "ab"] for v in by_ticket.values()]) > 0.80


def test_log_counts(log):
    _, lines, key = log
    kinds = Counter(row["kind"] for row in key)
    assert len(lines) == 745 + 90 + 40 + 25
    assert (kinds["duplicate"], kinds["leak"], kinds["broken"], kinds["decoy"]) == (90, 40, 25, 30)
    personal = [row["line_number"] for row in key if row["kind"] in side.PII_KINDS]
    assert len(set(personal)) == 160 and 185 <= len(personal) <= 220
    assert all(kinds[kind] >= 25 for kind in side.PII_KINDS)
    assert set(kinds) == {*side.PII_KINDS, "decoy", "duplicate", "leak", "broken"}


def test_every_string_of_the_key_is_in_its_line(log):
    _, lines, key = log
    for row in key:
        if row["kind"] in (*side.PII_KINDS, "decoy"):
            assert row["detail"] in text_of(lines, row), row


def test_lines_outside_of_the_key_hold_nothing_planted(log):
    _, lines, key = log
    planted = {int(row["line_number"]) for row in key}
    known = {t["text"] for t in TRAIN}
    for n, line in enumerate(lines, 1):
        if n not in planted:
            record = json.loads(line)
            assert list(record) == ["id", "received", "channel", "text"] and record["text"] in known
            assert record["id"] == f"log-{n:04d}"


def test_duplicates_follow_their_original_and_resemble_it(log):
    _, lines, key = log
    similarity = []
    for row in key:
        if row["kind"] == "duplicate":
            number = int(row["detail"].removeprefix("log-"))
            assert number < int(row["line_number"])
            original = json.loads(lines[number - 1])
            assert original["id"] == row["detail"] and original["text"] != text_of(lines, row)
            a, b = (set(side.word_shingles(text)) for text in (original["text"], text_of(lines, row)))
            if len(original["text"].split()) >= side.LONG:
                similarity.append(len(a & b) / len(a | b))
    assert len(similarity) >= 60
    assert sum(s >= 0.85 for s in similarity) / len(similarity) > 0.75


def test_no_near_duplicates_but_those_of_the_key(log):
    _, lines, key = log
    skip = {int(row["line_number"]) for row in key if row["kind"] in ("duplicate", "broken")}
    shingles = [set(side.word_shingles(json.loads(line)["text"])) for n, line in enumerate(lines, 1) if n not in skip]
    assert not any(
        len(a & b) / len(a | b) >= 0.85 for n, a in enumerate(shingles) for b in shingles[:n] if not a.isdisjoint(b)
    )


def test_leaks_are_test_tickets(log):
    _, lines, key = log
    test = {t["id"]: t["text"] for t in TEST}
    leaks = [(row["detail"], text_of(lines, row)) for row in key if row["kind"] == "leak"]
    assert len({ticket for ticket, _ in leaks}) == 40
    assert sum(test[ticket] == text for ticket, text in leaks) == 20
    train_texts = {t["text"] for t in TRAIN}
    assert not any(text in train_texts for _, text in leaks)


def flaw(line: bytes) -> str | None:
    if not line.strip():
        return "empty_line"
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return "bad_utf8"
    except json.JSONDecodeError:
        return "truncated"
    if isinstance(record, str):
        return "double_encoded" if isinstance(json.loads(record), dict) else "?"
    if set(record) != {"id", "received", "channel", "text"}:
        return "missing_field"
    if not all(isinstance(value, str) for value in record.values()):
        return "wrong_type"
    return "oversized" if len(line) > 100_000 else None


def test_broken_lines_are_broken_as_the_key_says(log):
    _, lines, key = log
    said = {int(row["line_number"]): row["detail"] for row in key if row["kind"] == "broken"}
    found = {n: flaw(line) for n, line in enumerate(lines, 1) if flaw(line)}
    assert found == said
    assert Counter(said.values()) == side.BROKEN


def luhn(digits: str) -> bool:
    doubled = [int(d) * (2 if n % 2 else 1) for n, d in enumerate(reversed(digits))]
    return sum(n - 9 if n > 9 else n for n in doubled) % 10 == 0


def iban_valid(iban: str) -> bool:
    compact = iban.replace(" ", "")
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def test_personal_data_is_valid_and_belongs_to_nobody(log):
    files, _, key = log
    values = {kind: [row["detail"] for row in key if row["kind"] == kind] for kind in side.PII_KINDS}
    assert all(re.fullmatch(r"[\w.+-]+@(\w+\.)?example\.(com|org)", v) for v in values["email"])
    fiction = r"(1?\d{3}55501\d\d|(44|0)(207946|113496|161496)0\d{3}|(44|0)7700900\d{3}|01632960\d{3})"
    assert all(re.fullmatch(fiction, re.sub(r"\D", "", v)) for v in values["phone"])
    assert all(luhn(re.sub(r"\D", "", v)) for v in values["card"])
    sizes = {"GB": 22, "NL": 18, "IE": 22, "DE": 22}
    assert all(iban_valid(v) and len(v.replace(" ", "")) == sizes[v[:2]] for v in values["iban"])
    nets = [ipaddress.ip_network(n) for n in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24")]
    assert all(any(ipaddress.ip_address(v) in net for net in nets) for v in values["ip"])
    listed = files["deny_list.txt"].decode().splitlines()
    assert listed == PII["deny_list"] and {v.lower() for v in values["name"]} <= {name.lower() for name in listed}


def test_iban_of_a_published_example():
    assert side.make_iban("GB", "NWBK60161331926819") == "GB29NWBK60161331926819"
    assert side.make_iban("DE", "370400440532013000") == "DE89370400440532013000"


def test_decoys_are_not_what_they_look_like():
    for sentence, value in PII["decoys"]["strings"]:
        assert "{value}" in sentence
        digits = re.sub(r"\D", "", value)
        if re.match(r"[A-Z]{2}\d\d[A-Z]{4}", value):
            assert not iban_valid(value)
        elif len(digits) >= 13:
            assert not luhn(digits), value
        if value.count(".") == 3:
            with pytest.raises(ValueError):
                ipaddress.ip_address(value)


def test_too_few_tickets_that_differ():
    with pytest.raises(ValueError, match="differ from each other"):
        side.raw_log(TRAIN[:50] * 20, TEST, random.Random(0), PII)


def drafts():
    tickets = {t["id"]: t["ticket"] for t in TRAIN}
    records = [json.loads(line) for line in side.replies(TRAIN, random.Random(7), BANK).decode().splitlines()]
    return [(tickets[r["ticket_id"]], r) for r in records]


def has(text: str, marks: list[str]) -> bool:
    return any(mark in text.lower() for mark in marks)


def promises(text: str) -> bool:
    return any(re.search(rf"\b{re.escape(mark)}\b", text.lower()) for mark in BANK["promise_marks"])


def test_drafts_keep_the_rubric():
    pairs = drafts()
    assert len(pairs) == 600 and len({r["ticket_id"] for _, r in pairs}) == len({r["id"] for _, r in pairs}) == 600
    for ticket, record in pairs:
        assert list(record) == ["id", "ticket_id", "reply"]
        reply = record["reply"]
        body = reply.removesuffix(BANK["sign_off"])
        assert body != reply and "{" not in reply
        assert len(reply.split()) <= 40
        named = [ticket["order_id"]] if ticket["order_id"] else []
        assert has(body, [name.lower() for name in named + [item["product"] for item in ticket["items"]]])
        taken = [intent for intent, spec in BANK["intents"].items() if has(body, spec["marks"])]
        assert taken == [ticket["intent"]]
        due = ticket["intent"] in ("damaged", "missing")
        assert has(body, BANK["apology_marks"]) == due
        assert not promises(body)
        assert not re.search(r"\d", body.replace(ticket["order_id"] or "\0", ""))


def test_drafts_vary():
    replies = [record["reply"] for _, record in drafts()]
    assert len(set(replies)) > 550
    for intent, spec in BANK["intents"].items():
        used = {
            a for ticket, r in drafts() if ticket["intent"] == intent for a in spec["actions"] if a[:12] in r["reply"]
        }
        assert len(used) >= 6


def test_reply_bank():
    assert sorted(BANK["intents"]) == sorted(INTENTS)
    assert len({spec["action"] for spec in BANK["intents"].values()}) == len(INTENTS)
    common = BANK["openings"] + BANK["apologies"] + BANK["closings"]
    for intent, spec in BANK["intents"].items():
        assert len(spec["actions"]) >= 6 and 2 <= len(spec["marks"]) <= 4
        assert "{products}" in spec["product_ref"]
        for mark in spec["marks"]:
            assert any(mark in action for action in spec["actions"]), mark
            others = [
                a for other, s in BANK["intents"].items() if other != intent for a in [*s["actions"], s["product_ref"]]
            ]
            assert not any(mark in text.lower() for text in others + common), mark
        for action in spec["actions"]:
            assert action.count("{ref}") == 1 and has(action, spec["marks"]), action
            assert not promises(action) and not has(action, BANK["apology_marks"])
            assert not re.search(r"\bdesk\b", action)
    assert all(has(text, BANK["apology_marks"]) for text in BANK["apologies"])
    assert not any(has(text, BANK["apology_marks"]) for text in BANK["openings"])
    assert not any(promises(text) for text in common)
    assert all(text.endswith(BANK["sign_off"]) for text in BANK["closings"])
    assert not any("desk" in text for text in BANK["openings"] + BANK["apologies"])
