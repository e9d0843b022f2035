"""The files beside the tickets: annotations.csv, raw_log.jsonl with its key, and replies/drafts.jsonl.

Pure functions from tickets and a `random.Random` to file contents. The same tickets and seed give the same bytes on
every platform and on Python 3.11 to 3.13: choices go through the generator alone, and nothing iterates over a set.
"""

import csv
import io
import json
import re
from collections import Counter

RATERS = ("a", "b", "c")
ANNOTATED = 160
# What a careful rater mixes up: intents whose messages read alike.
NEIGHBOURS = {
    "return": "exchange",
    "exchange": "return",
    "missing": "track",
    "track": "missing",
    "change": "cancel",
    "cancel": "change",
    "question": "buy",
    "buy": "question",
}
CAREFUL_ERRORS = 0.07  # of a's and b's intents
CARELESS_ERRORS = 0.45  # of c's
CARELESS_FRESH = 20  # tickets that c still reads with care; afterwards the class most seen in them is c's easy way out
FLAG_ERRORS = 0.03  # of a's and b's needs_human

DISTINCT = 745  # lines that are neither copies nor broken
WITH_PII = 160
SECOND_PII = 0.25  # of the lines with personal data have two kinds
WITH_DECOY = 30
DUPLICATES = 90
LEAKS = 40
BROKEN = {
    "bad_utf8": 4,
    "double_encoded": 4,
    "oversized": 1,
    "missing_field": 5,
    "wrong_type": 5,
    "truncated": 3,
    "empty_line": 3,
}
OVERSIZED_BYTES = 100_000
# Two train tickets with a Jaccard similarity from here on do not both enter the log; the key has every near-duplicate.
TOO_SIMILAR = 0.7
LONG = 20  # words from which a copy with a light edit stays above 0.85 as a rule
PII_KINDS = ("email", "phone", "card", "iban", "ip", "name")
CHANNELS = ("email", "form", "chat")

DRAFTS = 600
FROM_PRODUCT_FIRST = ("buy", "question")  # there is no order yet that the desk could name


def annotations(tickets: list[dict], rng) -> bytes:
    """annotations.csv: `ticket_id,rater,intent,needs_human`, 160 tickets, three **simulated** raters.

    Raters a and b err on 7 % of the intents, each on a draw of their own, and mix up neighbouring intents only. Rater c
    is right on 55 %: after the first 20 tickets c often falls back to the intent that was most frequent among them, and
    overlooks there that a person is needed.
    """
    sample = [tickets[i] for i in sorted(rng.sample(range(len(tickets)), ANNOTATED))]
    rng.shuffle(sample)  # the order in which the raters see them
    truth = [t["ticket"]["intent"] for t in sample]
    flags = [t["ticket"]["needs_human"] for t in sample]
    intents = sorted(dict.fromkeys(truth))

    answers = {}
    for rater in RATERS[:2]:
        confusable = [i for i, intent in enumerate(truth) if intent in NEIGHBOURS]
        wrong = rng.sample(confusable, min(round(CAREFUL_ERRORS * ANNOTATED), len(confusable)))
        slips = rng.sample(range(ANNOTATED), round(FLAG_ERRORS * ANNOTATED))
        answers[rater] = [
            (NEIGHBOURS[truth[i]] if i in wrong else truth[i], flags[i] != (i in slips)) for i in range(ANNOTATED)
        ]

    counts = Counter(truth[:CARELESS_FRESH])
    easy = max(intents, key=lambda intent: counts[intent])  # at a tie the first of the alphabet
    tired = [i for i in range(CARELESS_FRESH, ANNOTATED) if truth[i] != easy]
    wrong = rng.sample(tired, min(round(CARELESS_ERRORS * ANNOTATED), len(tired)))
    answers["c"] = []
    for i in range(ANNOTATED):
        intent, flag = truth[i], flags[i]
        if i in wrong:
            others = [other for other in intents if other not in (truth[i], easy)]
            intent = easy if rng.random() < 0.7 or not others else rng.choice(others)
            flag = False
        answers["c"].append((intent, flag))

    rows = [
        [ticket["id"], rater, answers[rater][i][0], "true" if answers[rater][i][1] else "false"]
        for i, ticket in enumerate(sample)
        for rater in RATERS
    ]
    return _csv(["ticket_id", "rater", "intent", "needs_human"], rows)


def raw_log(train: list[dict], test: list[dict], rng, pii: dict) -> dict[str, bytes]:
    """raw_log.jsonl, as a support system would export it, and raw_log_key.csv, which says what was planted where.

    The log has a record `id, received, channel, text` on each line, ended by a line feed, and lines that are no record.
    The key has rows `line_number,kind,detail`; lines count from 1. Kinds and their details:

    - `email`, `phone`, `card`, `iban`, `ip`, `name`: the exact string (a line may have two);
    - `decoy`: a string that only looks like personal data;
    - `duplicate`: the log id of the original, which stands further up;
    - `leak`: the id of the test ticket;
    - `broken`: the reason, one of `BROKEN`.

    deny_list.txt has the names to look for. ValueError where fewer than 770 train tickets differ from each other.
    """
    spare = sum(BROKEN.values())
    pool = _distinct(train, DISTINCT + spare, rng)
    plain, for_broken = pool[:DISTINCT], pool[DISTINCT:]

    # Each entry: the ticket that it comes from, its text, and its rows of the key as (kind, detail).
    entries = [{"from": t, "text": t["text"], "key": []} for t in plain]
    for n, entry in enumerate(entries[:WITH_PII]):
        kinds = [PII_KINDS[n % len(PII_KINDS)]]
        if rng.random() < SECOND_PII:
            kinds.append(rng.choice([kind for kind in PII_KINDS if kind not in kinds]))
        for kind in kinds:
            value = _personal(kind, rng, pii)
            sentence = rng.choice(pii["sentences"][kind]).replace("{value}", value)
            entry["text"] = _insert(entry["text"], sentence, rng)
            entry["key"].append((kind, value))
    for n, entry in enumerate(entries[WITH_PII : WITH_PII + WITH_DECOY]):
        sentence, value = pii["decoys"]["strings"][n % len(pii["decoys"]["strings"])]
        entry["text"] = _insert(entry["text"], sentence.replace("{value}", value), rng)
        entry["key"].append(("decoy", value))

    clean = entries[WITH_PII + WITH_DECOY :]
    long = [e for e in clean if len(e["text"].split()) >= LONG]
    short = [e for e in clean if len(e["text"].split()) < LONG]
    # Most copies are of long texts; a few of short ones, whose similarity a single word ruins.
    of_long = min(len(long), DUPLICATES - min(len(short), DUPLICATES // 10))
    for original in rng.sample(long, of_long) + rng.sample(short, DUPLICATES - of_long):
        entries.append(
            {"from": original["from"], "text": _light_edit(original["text"], rng), "key": [], "of": original}
        )
    for n, ticket in enumerate(rng.sample(test, LEAKS)):
        text = ticket["text"] if n % 2 else _light_edit(ticket["text"], rng)
        entries.append({"from": ticket, "text": text, "key": [("leak", ticket["id"])]})
    reasons = [reason for reason, count in BROKEN.items() for _ in range(count)]
    for reason, ticket in zip(reasons, for_broken, strict=True):
        entries.append({"from": ticket, "text": ticket["text"], "key": [("broken", reason)], "broken": reason})

    rng.shuffle(entries)
    # A copy comes after its original, as in a log it would.
    place = {id(entry): n for n, entry in enumerate(entries)}
    for n, copy in [(n, e) for n, e in enumerate(entries) if "of" in e]:
        original = place[id(copy["of"])]
        if n < original:
            entries[n], entries[original] = copy["of"], copy

    for n, entry in enumerate(entries, 1):
        entry["id"] = f"log-{n:04d}"
    lines, rows, nth = [], [], Counter()
    for n, entry in enumerate(entries, 1):
        record = {
            "id": entry["id"],
            "received": entry["from"]["received"],
            "channel": rng.choice(CHANNELS),
            "text": entry["text"],
        }
        reason = entry.get("broken")
        lines.append(_broken(record, reason, nth[reason], rng) if reason else _json(record).encode())
        nth[reason] += 1
        if "of" in entry:
            entry["key"].append(("duplicate", entry["of"]["id"]))
        rows += [[n, kind, detail] for kind, detail in entry["key"]]
    return {
        "raw_log.jsonl": b"\n".join(lines) + b"\n",
        "raw_log_key.csv": _csv(["line_number", "kind", "detail"], rows),
        "deny_list.txt": "".join(name + "\n" for name in pii["deny_list"]).encode(),
    }


def replies(train: list[dict], rng, bank: dict) -> bytes:
    """replies/drafts.jsonl: `id, ticket_id, reply`, a reference draft for 600 tickets that name an order or a product.

    `bank` is replies.toml. A draft names the order or the product, takes the one action of the ticket's intent,
    apologises when that is due, adds no fact, promises nothing, has at most `max_words` words and signs off.
    """
    usable = [t for t in train if t["ticket"]["order_id"] or t["ticket"]["items"]]
    chosen = [usable[i] for i in sorted(rng.sample(range(len(usable)), DRAFTS))]
    lines = []
    for n, ticket in enumerate(chosen, 1):
        reply = _draft(ticket["ticket"], rng, bank)
        lines.append(_json({"id": f"draft-{n:04d}", "ticket_id": ticket["id"], "reply": reply}))
    return ("\n".join(lines) + "\n").encode()


def _draft(ticket: dict, rng, bank: dict) -> str:
    intent = bank["intents"][ticket["intent"]]
    # Products stand before a noun ("your desk lamp order"), where one form serves any quantity. Two are enough to name.
    products = " and ".join(item["product"] for item in ticket["items"][:2])
    if not ticket["order_id"] or (products and ticket["intent"] in FROM_PRODUCT_FIRST):
        ref = intent["product_ref"].replace("{products}", products)
    else:
        ref = rng.choice(["order {order}", "order {order}", "your order {order}"]).replace(
            "{order}", ticket["order_id"]
        )
        if products and rng.random() < 0.3:
            ref += f" ({products})"

    body = [rng.choice(intent["actions"]).replace("{ref}", ref)]
    if ticket["intent"] in bank["apology_intents"]:
        body.insert(rng.randrange(2), rng.choice(bank["apologies"]))
    opening, closing = rng.choice(bank["openings"]), rng.choice(bank["closings"])
    with_opening = " ".join([opening, *body]) + "\n" + closing
    if rng.random() < 0.85 and len(with_opening.split()) <= bank["max_words"]:
        return with_opening
    return " ".join(body) + "\n" + closing


def word_shingles(text: str, n: int = 3) -> list[tuple[str, ...]]:
    """The distinct word n-grams in order of appearance, in lower case, without punctuation; a shorter text is one."""
    words = re.findall(r"\w+", text.lower())
    return list(dict.fromkeys(tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))))


def _distinct(tickets: list[dict], count: int, rng) -> list[dict]:
    """`count` tickets in random order, no two of which are near-duplicates by their own wording."""
    chosen, sizes, holders = [], [], {}
    for ticket in rng.sample(tickets, len(tickets)):
        shingles = word_shingles(ticket["text"])
        shared = Counter(holder for shingle in shingles for holder in holders.get(shingle, ()))
        if any(both / (len(shingles) + sizes[holder] - both) >= TOO_SIMILAR for holder, both in shared.items()):
            continue
        for shingle in shingles:
            holders.setdefault(shingle, []).append(len(chosen))
        chosen.append(ticket)
        sizes.append(len(shingles))
        if len(chosen) == count:
            return chosen
    raise ValueError(
        f"the raw log needs {count} train tickets that differ from each other; found {len(chosen)} in {len(tickets)}"
    )


def _insert(text: str, sentence: str, rng) -> str:
    """`sentence` between two sentences of `text`, or behind the last."""
    gaps = [match.end() for match in re.finditer(r"[.!?](?= )", text)] + [len(text)]
    gap = rng.choice(gaps)
    return f"{text[:gap]} {sentence}{text[gap:]}"


REWORDED = {
    "would like": "want",
    "please": "kindly",
    "hello": "hi",
    "ordered": "bought",
    "received": "got",
    "arrived": "came",
    "parcel": "package",
    "need": "require",
    "cannot": "can't",
    "thank you": "thanks",
}
ADDED = ("Thanks!", "Many thanks.", "Thank you.", "Cheers", "Please reply.")


def _light_edit(text: str, rng) -> str:
    """The same message sent twice: case, punctuation, spacing, a closing added, or one word changed or mistyped."""
    kinds = ["case", "punctuation", "punctuation", "spacing", "closing", "closing", "word"]
    edited = _edit_once(text, rng.choice(kinds), rng)
    if rng.random() < 0.3:
        edited = _edit_once(edited, rng.choice(kinds[:4]), rng)
    return edited if edited != text else f"{text} {rng.choice(ADDED)}"


def _edit_once(text: str, kind: str, rng) -> str:
    if kind == "case":
        return rng.choice([text.lower(), text.upper(), text[:1].lower() + text[1:]])
    if kind == "punctuation":
        return rng.choice(
            [text.replace(".", "!"), text.replace(",", ""), text.rstrip(".!?"), text.replace(". ", " - ")]
        )
    if kind == "spacing":
        return text.replace(" ", "  ") if rng.random() < 0.5 else text.replace("\n", " ") + "\n"
    if kind == "closing":
        return f"{text} {rng.choice(ADDED)}"
    known = [(old, new) for old, new in REWORDED.items() if re.search(rf"\b{old}\b", text)]
    if known and rng.random() < 0.6:
        old, new = rng.choice(known)
        return re.sub(rf"\b{old}\b", new, text, count=1)
    words = [match.start() for match in re.finditer(r"\b[A-Za-z]{5,}\b", text)]
    if not words:
        return text
    at = rng.choice(words) + 1 + rng.randrange(2)  # two letters inside the word change places
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def _personal(kind: str, rng, pii: dict) -> str:
    if kind == "email":
        return f"{rng.choice(pii['mail_users'])}@{rng.choice(pii['mail_domains'])}"
    if kind == "phone":
        return re.sub("#", lambda _: str(rng.randrange(10)), rng.choice(pii["phones"]))
    if kind == "card":
        return rng.choice(pii["cards"])
    if kind == "iban":
        country, bank, digits = rng.choice(pii["ibans"])
        iban = make_iban(country, bank + "".join(str(rng.randrange(10)) for _ in range(digits)))
        return " ".join(iban[i : i + 4] for i in range(0, len(iban), 4)) if rng.random() < 0.6 else iban
    if kind == "ip":
        return f"{rng.choice(pii['ip_ranges'])}.{rng.randrange(1, 255)}"
    name = rng.choice(pii["deny_list"])
    return name.lower() if rng.random() < 0.25 else name


def make_iban(country: str, account: str) -> str:
    """The IBAN of an account: check digits by ISO 7064 mod 97-10 (98 minus the remainder, letters as 10 to 35)."""
    number = int("".join(str(int(c, 36)) for c in account + country + "00"))
    return f"{country}{98 - number % 97:02d}{account}"


def _broken(record: dict, reason: str, nth: int, rng) -> bytes:
    """The line of a broken record; `nth` counts the records broken for the same reason, and varies how."""
    if reason == "empty_line":
        return b"" if nth % 2 == 0 else b"   "
    if reason == "bad_utf8":  # a Latin-1 export pasted into a UTF-8 one
        record["text"] += " Best wishes, Zoë"
        return _json(record).encode().replace("ë".encode(), b"\xeb")
    if reason == "double_encoded":
        return _json(_json(record)).encode()
    if reason == "oversized":  # an attachment pasted into the text
        alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
        record["text"] += " attachment: " + "".join(rng.choice(alphabet) for _ in range(OVERSIZED_BYTES))
    elif reason == "missing_field":
        del record[("text", "id", "received", "channel")[nth % 4]]
    elif reason == "wrong_type":
        field, value = (
            ("text", [record["text"]]),
            ("text", None),
            ("received", 1773014400),
            ("id", int(record["id"][4:])),
            ("channel", {"name": record["channel"]}),
        )[nth % 5]
        record[field] = value
    elif reason == "truncated":
        line = _json(record)
        return line[: len(line) * rng.randrange(40, 90) // 100].encode()
    return _json(record).encode()


def _json(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def _csv(header: list[str], rows: list[list]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue().encode()
