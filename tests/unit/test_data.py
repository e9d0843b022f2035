"""The data as committed: every record keeps the schema and the house rules, the splits share nothing, and `data/` is
what `data/build.py` makes of `data/source/`."""

import csv
import importlib.util
import json
import re
import shutil
import tomllib
from collections import Counter
from datetime import date
from pathlib import Path

import pytest

from course_lib import cli, tickets

DATA = Path(__file__).parents[2] / "data"
SIZES = {"train": 2000, "dev": 200, "test": 300, "hard": 120}
GENERATED = ("train", "dev", "test")
RECORDS = {split: tickets.load(split) for split in SIZES}
EVERY = [record for records in RECORDS.values() for record in records]
BANKS = {
    split: tomllib.loads((DATA / "source" / f"wordings_{split}.toml").read_text(encoding="utf-8"))
    for split in GENERATED
}
LISTS = ("greetings", "closings", "contexts", "asides", "order_sentences", "due_sentences", "human_sentences")
LISTS += ("near_human",)


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def table(name: str) -> list[dict]:
    with open(DATA / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- each record -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SIZES)
def test_sizes_and_ids(split):
    ids = [record["id"] for record in RECORDS[split]]
    width = 3 if split == "hard" else 4
    assert ids == [f"{split}-{n:0{width}}" for n in range(1, SIZES[split] + 1)]


def test_the_schema():
    for record in EVERY:
        assert list(record) == ["id", "received", "text", "due_phrase", "ticket"], record["id"]
        assert date(2026, 1, 5) <= date.fromisoformat(record["received"]) <= date(2026, 6, 30), record["id"]
        assert tickets.parse(tickets.to_json(record["ticket"])).ticket == record["ticket"], record["id"]
        assert list(record["ticket"]) == list(tickets.FIELDS), record["id"]
        # What a model with the date tool writes must pass the schema too, and come out as the record.
        words = tickets.parse(tickets.to_json(tickets.in_words(record))).ticket
        assert tickets.exact(record["ticket"], tickets.resolve(words, record["received"])), record["id"]


def test_rule_1_every_product_stands_in_the_text():
    plural = {one: many for bank in BANKS.values() for one, many in bank["products"]}
    for record in EVERY:
        text = record["text"].lower()
        names = [item["product"] for item in record["ticket"]["items"]]
        assert len(set(names)) == len(names), record["id"]
        for name in names:
            assert name == name.strip().lower()
            found = rf"\b({re.escape(name)}(e?s)?|{re.escape(plural.get(name, name))})\b"
            assert re.search(found, text), (record["id"], name)


NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def counted(one: str, many: str, n: int) -> str:
    """A pattern for the ways to name `n` of a product."""
    if n == 1:
        return rf"\b(a|an|one|1|the|my) {one}\b"
    words = [str(n), *NUMBERS[n : n + 1], *{2: ["both", "a pair of"], 6: ["half a dozen"], 12: ["a dozen"]}.get(n, [])]
    return rf"\b(({'|'.join(words)}) {many}|{n} x {one})\b"


@pytest.mark.parametrize("split", GENERATED)
def test_rule_1_quantities_and_their_order(split):
    plural = dict(BANKS[split]["products"])
    for record in RECORDS[split]:
        at = []
        for item in record["ticket"]["items"]:
            one = item["product"]
            found = re.search(counted(one, plural[one], item["quantity"]), record["text"])
            assert found, (record["id"], item)
            at.append(found.start())
        assert at == sorted(at), record["id"]


def test_rule_2_the_order_stands_in_the_text():
    for record in EVERY:
        order = record["ticket"]["order_id"]
        # Free-form customers also type "k-4821".
        text = record["text"].upper() if record["id"].startswith("hard") else record["text"]
        assert order is None or (re.fullmatch(r"K-\d{4}", order) and order in text), record["id"]
        if record["ticket"]["intent"] in ("buy", "question"):
            assert order is None, record["id"]


def test_rule_3_the_date_follows_from_the_words():
    for record in EVERY:
        words, day = record["due_phrase"], record["ticket"]["due_date"]
        assert (words is None) == (day is None), record["id"]
        if words is not None:
            assert re.search(rf"\b{re.escape(words)}\b", record["text"]), record["id"]
            assert tickets.resolve_date(words, record["received"]) == day, record["id"]
            assert not re.match(r"(by|on|for|until|before)\b", words), record["id"]
            assert day >= record["received"], record["id"]


def number_missing(record: dict) -> bool:
    """Rule 4, first half, in the words of the card: about an order that exists already, and its number is not there."""
    return record["ticket"]["intent"] not in ("buy", "question") and record["ticket"]["order_id"] is None


def test_rule_4_an_order_without_its_number_needs_a_person():
    for record in EVERY:
        assert record["ticket"]["needs_human"] or not number_missing(record), record["id"]


@pytest.mark.parametrize("split", GENERATED)
def test_rule_4_by_the_sentences(split):
    bank = BANKS[split]
    for record in RECORDS[split]:
        reasons = [sentence for sentence in bank["human_sentences"] if sentence in record["text"]]
        assert len(reasons) <= 1, record["id"]
        if not number_missing(record):
            assert bool(reasons) == record["ticket"]["needs_human"], record["id"]
        if reasons:
            assert not any(sentence in record["text"] for sentence in bank["near_human"]), record["id"]


@pytest.mark.parametrize("split", SIZES)
def test_rule_4_every_case_occurs(split):
    found = Counter((number_missing(record), record["ticket"]["needs_human"]) for record in RECORDS[split])
    assert set(found) == {(True, True), (False, True), (False, False)} and min(found.values()) >= 8


def test_rule_5_priority():
    for record in EVERY:
        ticket = record["ticket"]
        args = [ticket[field] for field in ("intent", "items", "due_date", "needs_human")]
        assert ticket["priority"] == tickets.priority(*args), record["id"]


SLOT = re.compile(r"\{(\w+)\}")


def pattern(wording: str) -> re.Pattern:
    """What the wording looks like with its slots filled in."""
    return re.compile(".+?".join(re.escape(part) for part in re.split(r"\{\w+\}", wording)))


@pytest.mark.parametrize("split", GENERATED)
def test_the_intent_is_that_of_the_request(split):
    requests = {
        intent: [pattern(wording) for wording in wordings] for intent, wordings in BANKS[split]["requests"].items()
    }
    for record in RECORDS[split]:
        assert any(p.search(record["text"]) for p in requests[record["ticket"]["intent"]]), record["id"]


def test_texts_are_clean():
    for record in EVERY:
        text = record["text"]
        assert text == text.strip() and "{" not in text and "}" not in text, record["id"]
        assert "  " not in text and len(text) <= 800, record["id"]


def test_no_text_twice():
    def plain(text):
        return " ".join(re.findall(r"\w+", text.lower()))

    seen = {}
    for record in EVERY:
        first = seen.setdefault(plain(record["text"]), record)
        # Stated apart, because it must hold even if a text were allowed to come twice.
        assert first["ticket"] == record["ticket"], (first["id"], record["id"])
        assert first is record, (first["id"], record["id"])


# --- balance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", GENERATED)
def test_every_intent_is_a_tenth_of_any_first_part(split):
    intents = [record["ticket"]["intent"] for record in RECORDS[split]]
    for start in range(0, len(intents), 10):
        assert sorted(intents[start : start + 10]) == sorted(tickets.INTENTS)


@pytest.mark.parametrize("split", SIZES)
def test_no_field_is_decided_by_its_majority(split):
    records = [record["ticket"] for record in RECORDS[split]]

    def share(holds):
        return sum(map(holds, records)) / len(records)

    # Hard names fewer order numbers and more other reasons for a person, and with them its priorities rise.
    person, level_at_most = (0.50, 0.65) if split == "hard" else (0.35, 0.55)
    assert 0.15 < share(lambda t: t["needs_human"]) < person
    assert 0.25 < share(lambda t: t["due_date"] is not None) < 0.45
    assert 0.45 < share(lambda t: t["order_id"] is not None) < 0.70
    assert 0.15 < share(lambda t: not t["items"]) < 0.55
    assert share(lambda t: len(t["items"]) > 1) > 0.15
    assert share(lambda t: sum(item["quantity"] for item in t["items"]) >= 10) > 0.04
    for level in tickets.PRIORITIES:
        assert 0.05 < share(lambda t, level=level: t["priority"] == level) < level_at_most
    others = sum(
        bool(set(re.findall(r"\bK-\d{4}\b", r["text"].upper())) - {r["ticket"]["order_id"]}) for r in RECORDS[split]
    )
    assert others / len(records) > 0.05


def test_hard_has_its_spread():
    hard = RECORDS["hard"]
    assert len(hard) >= 100
    intents = Counter(record["ticket"]["intent"] for record in hard)
    assert set(intents) == set(tickets.INTENTS) and min(intents.values()) >= 10 and max(intents.values()) <= 15
    products = [item["product"] for record in hard for item in record["ticket"]["items"]]
    assert len(set(products)) > 0.9 * len(products)
    phrases = [record["due_phrase"].lower() for record in hard if record["due_phrase"]]
    kinds = {
        "weekday": r"(this )?[a-z]+day$",
        "next weekday": r"next \w+day",
        "day of the month": r"the \d",
        "day and month": r"\d+ [a-z]+|[a-z]+ \d+",
        "ISO": r"\d{4}-",
        "span": r"(in|within) ",
        "end of the month": r"the end",
    }
    for kind, form in kinds.items():
        assert any(re.match(form, phrase) for phrase in phrases), kind
    assert sum(record["text"].isupper() for record in hard) >= 2
    lower = [record for record in hard if record["text"][0].islower()]
    assert len(lower) >= 15
    lengths = sorted(len(record["text"].split()) for record in hard)
    assert lengths[0] <= 10 and lengths[-1] >= 70


def test_hard_is_not_made_of_the_wordings():
    wordings = [
        pattern(wording)
        for bank in BANKS.values()
        for name in ("contexts", "asides", "human_sentences", "near_human")
        for wording in bank[name]
        if len(wording.split()) > 5
    ]
    assert not [r["id"] for r in RECORDS["hard"] if any(p.search(r["text"]) for p in wordings)]


# --- the splits share nothing ----------------------------------------------------------------------------------------

PAIRS = [("train", "dev"), ("train", "test"), ("dev", "test")]


def masked(wording: str) -> str:
    """Without capitals and punctuation; every slot is the same."""
    return " ".join(re.findall(r"\w+", SLOT.sub("_", wording).lower()))


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_no_shared_products_or_names(a, b):
    products = [{word for pair in BANKS[split]["products"] for word in pair} for split in (a, b)]
    assert products[0].isdisjoint(products[1])
    assert set(BANKS[a]["names"]).isdisjoint(BANKS[b]["names"])
    used = [{item["product"] for r in RECORDS[split] for item in r["ticket"]["items"]} for split in (a, b)]
    assert used[0].isdisjoint(used[1])
    # Not in passing either, as in "a kettle that I had from you earlier".
    foreign = re.compile(rf"\b({'|'.join(map(re.escape, products[0] | set(BANKS[a]['names'])))})\b")
    own = re.compile(rf"\b({'|'.join(map(re.escape, sorted(products[1], key=len, reverse=True)))})\b")
    assert not [r["id"] for r in RECORDS[b] if foreign.search(own.sub("_", r["text"]))]


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_no_shared_wordings(a, b):
    for name in LISTS:
        shared = {masked(w) for w in BANKS[a][name]} & {masked(w) for w in BANKS[b][name]}
        assert not shared, (name, shared)
    requests = [{masked(w) for ws in BANKS[split]["requests"].values() for w in ws} for split in (a, b)]
    assert requests[0].isdisjoint(requests[1])


@pytest.mark.parametrize("split", GENERATED)
def test_the_bank(split):
    bank = BANKS[split]
    assert list(bank["requests"]) == list(tickets.INTENTS)
    wordings = [w for ws in bank["requests"].values() for w in ws] + [w for name in LISTS for w in bank[name]]
    assert len({masked(w) for w in wordings}) > 0.99 * len(wordings)
    for intent, requests in bank["requests"].items():
        assert len(requests) == {"train": 26, "dev": 5, "test": 10}[split]
        for wording in requests:
            slots = SLOT.findall(wording)
            assert len(set(slots)) == len(slots)
            assert set(slots) <= {"items", "the_items", "order", "due", "span", "other_item"}, wording
            assert not {"items", "the_items"} <= set(slots) and not {"due", "span"} <= set(slots), wording
            if intent in ("buy", "question"):
                assert "order" not in slots, wording
    for wording in bank["due_sentences"]:
        assert SLOT.findall(wording) in (["due"], ["span"]), wording
    assert all(SLOT.findall(wording) == ["order"] for wording in bank["order_sentences"])
    assert not any(SLOT.search(w) for name in ("greetings", "human_sentences", "near_human") for w in bank[name])
    assert all(set(SLOT.findall(w)) <= {"name"} for w in bank["closings"])
    for name in ("contexts", "asides"):
        assert all(set(SLOT.findall(w)) <= {"past_day", "other_order", "other_item"} for w in bank[name])
    assert len({one for one, _ in bank["products"]}) == len(bank["products"])
    assert len(set(bank["names"])) == len(bank["names"])


def six_word_runs(record: dict) -> set[str]:
    """The runs of six words in a message, slots masked: what a model could know of the wording from training."""
    text = record["text"]
    if record["due_phrase"]:
        text = text.replace(record["due_phrase"], " DUE ")
    months = "January|February|March|April|May|June|July|August|September|October|November|December"
    past = rf"\b(last \w+day|two weeks ago|a while ago|on \d+ ({months})|on the \d+\w\w|in ({months}))\b"
    text = re.sub(past, "PAST", re.sub(r"K-\d{4}", "ORDER", text))
    number = r"(a pair of|half a dozen|a dozen|(all|the|my) \w+|\w+ x|\w+) "
    text = re.sub(rf"\b({number})?({PRODUCTS})\b", "ITEM", text)
    text = re.sub(r"ITEM(, ITEM)* and ITEM", "ITEM", text)
    words = re.findall(r"[\w']+", re.sub(rf"\b({NAMES})\b", "NAME", text).lower())
    return {" ".join(words[n : n + 6]) for n in range(len(words) - 5)}


PRODUCTS = "|".join(
    sorted({re.escape(w) for bank in BANKS.values() for pair in bank["products"] for w in pair}, key=len, reverse=True)
)
NAMES = "|".join(re.escape(name) for bank in BANKS.values() for name in bank["names"])


# Stock phrases ("we no longer have any use for") and seams between two sentences.
@pytest.mark.parametrize(("split", "allowed"), [("dev", 5), ("test", 20), ("hard", 20)])
def test_hardly_a_run_of_six_words_of_another_split_occurs_in_train(split, allowed):
    train = set().union(*map(six_word_runs, RECORDS["train"]))
    runs = set().union(*map(six_word_runs, RECORDS[split]))
    assert len(runs) > 2000
    assert len(runs & train) <= allowed, sorted(runs & train)


def test_the_masks_of_that_count_work():
    record = {
        "text": "Hello, I would like both desk lamps, 3 x mug and a kettle by next Friday, order K-1234.\nMaria",
        "due_phrase": "next Friday",
    }
    assert "hello i would like item by" in six_word_runs(record)
    assert "item by due order order name" in six_word_runs(record)


# --- the files beside the tickets ------------------------------------------------------------------------------------


def test_annotations_are_of_train_tickets():
    known = {record["id"] for record in RECORDS["train"]}
    found = Counter(row["ticket_id"] for row in table("annotations.csv"))
    assert len(found) == 160 and set(found.values()) == {3} and set(found) <= known


def test_the_key_of_the_raw_log_fits_its_lines():
    lines = (DATA / "raw_log.jsonl").read_bytes().split(b"\n")[:-1]
    key = table("raw_log_key.csv")
    test = {record["id"]: record["text"] for record in RECORDS["test"]}
    leaks = 0
    for row in key:
        line = lines[int(row["line_number"]) - 1]
        if row["kind"] == "leak":
            leaks += json.loads(line)["text"] == test[row["detail"]]
        elif row["kind"] not in ("duplicate", "broken"):
            assert row["detail"] in json.loads(line)["text"], row
    assert len(lines) == 900 and leaks == 20


def test_drafts_are_of_train_tickets():
    known = {record["id"] for record in RECORDS["train"]}
    drafts = rows("replies/drafts.jsonl")
    assert len(drafts) == len({d["ticket_id"] for d in drafts}) == 600
    assert {d["ticket_id"] for d in drafts} <= known


def test_policies_state_their_facts():
    facts = rows("policies/facts.jsonl")
    for fact in facts:
        page = (DATA / "policies" / fact["policy"]).read_text(encoding="utf-8")
        assert fact["sentence_before"] in page and fact["sentence_after"] not in page, fact["id"]
        assert fact["before"] in fact["sentence_before"] and fact["after"] in fact["sentence_after"], fact["id"]
        assert fact["after"] not in fact["sentence_before"], fact["id"]
        assert len({fact["question"], *fact["paraphrases"]}) == 4, fact["id"]
    assert len({fact["id"] for fact in facts}) == len(facts) >= 20


def test_comments_are_balanced():
    comments = rows("feedback_comments.jsonl")
    assert Counter(c["label"] for c in comments) == {"positive": 130, "negative": 130}
    for split in ("example", "dev", "test"):
        labels = Counter(c["label"] for c in comments if c["split"] == split)
        assert labels["positive"] == labels["negative"], split
    assert len({c["text"].lower() for c in comments}) == len(comments)


def test_the_ladder_gets_no_cheaper_on_the_way_up():
    ladder = table("ladder.csv")
    assert [int(rung["order"]) for rung in ladder] == list(range(1, 16))
    costs = [["none", "very low", "low", "moderate", "high", "very high"].index(rung["cost"]) for rung in ladder]
    assert costs == sorted(costs)
    names = [rung["run_here"] for rung in ladder if not rung["run_here"].isdigit()]
    measured = "base prompt few_shot retry grammar validator retrieval date_tool routing larger_model lora"
    assert [name for name in names if name] == measured.split()


def test_gaps_name_rungs_and_mistakes_lessons():
    rungs = {rung["rung"] for rung in table("ladder.csv")}
    gaps, mistakes = table("gaps.csv"), table("mistakes.csv")
    assert len(gaps) == 9 and {gap["rung"] for gap in gaps} <= rungs
    assert len(mistakes) == 7 and all(re.fullmatch(r"\d\d", row["lesson"]) for row in mistakes)


@pytest.mark.parametrize("name", ["facts", "arithmetic"])
def test_questions_have_one_right_answer(name):
    for question in rows(f"general/{name}.jsonl"):
        assert len({question["answer"], *question["wrong"]}) == 4, question["id"]


SUMS = (
    (r"(\d+) (?:\+|plus) (\d+)[?.]$", int.__add__),
    (r"(?:Add|sum of) (\d+) and (\d+)[?.]$", int.__add__),
    (r"(\d+) more than (\d+)\?$", int.__add__),
    (r"(\d+) (?:-|minus) (\d+)[?.]$", int.__sub__),
    (r"difference between (\d+) and (\d+)\?$", int.__sub__),
    (r"Subtract (\d+) from (\d+)\.$", lambda a, b: b - a),
    (r"(\d+) less than (\d+)\?$", lambda a, b: b - a),
    (r"(\d+) (?:x|times|multiplied by) (\d+)\?$", int.__mul__),
    (r"(?:Multiply|product of) (\d+) (?:by|and) (\d+)[?.]$", int.__mul__),
    (r"(\d+) divided by (\d+)\?$", int.__floordiv__),
)


def test_sums_are_right():
    told = 0
    for question in rows("general/arithmetic.jsonl"):
        asked = question["question"]
        for form, result in SUMS:
            if found := re.search(form, asked):
                assert question["answer"] == str(result(int(found[1]), int(found[2]))), question["id"]
                told += 1
    assert told > 40


@pytest.mark.parametrize("path", sorted(DATA.glob("general/*.jsonl")) + sorted(DATA.glob("safety/*.jsonl")))
def test_small_sets_have_no_record_twice(path):
    found = rows(path.relative_to(DATA))
    for column in {"id", "prompt", "question", "text"} & set(found[0]):
        assert len({record[column] for record in found}) == len(found), column


def test_nothing_general_is_about_tickets():
    for path in DATA.glob("general/*.jsonl"):
        text = path.read_text(encoding="utf-8").lower()
        assert not re.search(r"\bk-\d{4}\b|\border number\b|needs_human|order_id|\brefund|\binvoice", text), path.name


# --- the data card ---------------------------------------------------------------------------------------------------

CARD = (DATA / "README.md").read_text(encoding="utf-8")


def card_rows(heading: str) -> list[list[str]]:
    """The cells of the table whose head begins with `heading`, back-ticks removed."""
    found = re.search(rf"^\| {heading} .*\n\|[-|]+\n((?:\|.*\n)+)", CARD, re.M)
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


def test_the_card_counts_right():
    files = {row[0]: row for row in card_rows("file")}
    for name, row in files.items():
        path = DATA / name
        lines = path.read_bytes().count(b"\n") - (path.suffix == ".csv")
        assert int(row[1]) == lines, name
        assert float(row[2]) == pytest.approx(path.stat().st_size / 1000, abs=0.5), name
        if path.suffix == ".csv":
            assert re.findall(r"\w+", row[4]) == list(table(name)[0])
        elif path.suffix == ".jsonl" and not name.startswith(("tickets/", "raw_log")):
            assert re.findall(r"\w+", row[4]) == list(rows(name)[-1]), name  # the first line may be provenance
    built = {p.relative_to(DATA).as_posix() for p in DATA.rglob("*") if p.suffix in (".jsonl", ".csv", ".txt")}
    made_elsewhere = ("source/", "reference/")
    assert set(files) == {name for name in built if not name.startswith(made_elsewhere)}


def test_the_card_measures_right():
    measures = {
        "has an order_id": lambda r: r["ticket"]["order_id"] is not None,
        "has a due_date": lambda r: r["due_phrase"] is not None,
        "needs_human": lambda r: r["ticket"]["needs_human"],
        "needs_human, the order's number is missing": number_missing,
        "needs_human for another reason alone": lambda r: r["ticket"]["needs_human"] and not number_missing(r),
        "quantities add up to 10 or more": lambda r: sum(i["quantity"] for i in r["ticket"]["items"]) >= 10,
    }
    said = {row[0]: row[1:] for row in card_rows(r"\|")}
    for name, holds in measures.items():
        for cell, records in zip(said[name], RECORDS.values(), strict=True):
            percent = 100 * sum(map(holds, records)) / len(records)
            assert float(cell.removesuffix(" %")) == pytest.approx(percent, abs=0.5), (name, cell)
    levels = said["priority low / normal / high / urgent"]
    for cell, records in zip(levels, RECORDS.values(), strict=True):
        counts = Counter(record["ticket"]["priority"] for record in records)
        for percent, level in zip(cell.removesuffix(" %").split(" / "), tickets.PRIORITIES, strict=True):
            assert float(percent) == pytest.approx(100 * counts[level] / len(records), abs=0.5), (level, cell)


def test_the_dates_of_the_card():
    found = card_rows("words")
    assert len(found) >= 15
    for words, _, day in found:
        assert tickets.resolve_date(words, "2026-03-11") == day, words


def test_the_example_of_the_card_is_a_record():
    example = json.loads(re.search(r"```json\n(.*?)```", CARD, re.S)[1])
    assert example == next(record for record in EVERY if record["id"] == example["id"])


def test_the_card_names_every_intent_and_field():
    assert [row[0] for row in card_rows("intent")] == list(tickets.INTENTS)
    assert {row[0].removeprefix("ticket.") for row in card_rows("field")} == {
        "id",
        "received",
        "text",
        "due_phrase",
        *tickets.FIELDS,
    }


# --- build and check -------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    """A copy of `data/` to spoil, and its own build.py."""
    shutil.copytree(DATA, tmp_path / "data", ignore=shutil.ignore_patterns("__pycache__"))
    spec = importlib.util.spec_from_file_location("build_of_a_copy", tmp_path / "data" / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return tmp_path / "data", build


def test_data_is_what_build_makes(capsys):
    assert cli.main(["data", "--check"]) == 0
    assert "differs" not in capsys.readouterr().out


def test_check_names_what_was_spoilt_and_write_mends_it(copy):
    folder, build = copy
    assert build.check() == []
    spoilt = folder / "tickets" / "dev.jsonl"
    spoilt.write_bytes(spoilt.read_bytes().replace(b'"needs_human": false', b'"needs_human": true ', 1))
    (folder / "policies" / "returns.md").unlink()
    problems = build.check()
    assert len(problems) == 2
    assert "data/tickets/dev.jsonl differs" in problems[0] and "course data --write" in problems[0]
    assert "data/policies/returns.md is missing" in problems[1]
    assert build.write() == ["tickets/dev.jsonl", "policies/returns.md"]
    assert build.check() == [] and build.write() == []
    assert spoilt.read_bytes() == (DATA / "tickets" / "dev.jsonl").read_bytes()
    assert not list(folder.rglob("*.part"))


@pytest.mark.parametrize("name", ["annotations.csv", "raw_log.jsonl", "tickets/hard.jsonl", "replies/drafts.jsonl"])
def test_one_byte_is_noticed(copy, name):
    folder, build = copy
    spoilt = bytearray((folder / name).read_bytes())
    spoilt[len(spoilt) // 2] ^= 1
    (folder / name).write_bytes(spoilt)
    assert [line.split()[0] for line in build.check()] == [f"data/{name}"]


def test_windows_line_ends_are_noticed(copy):
    folder, build = copy
    path = folder / "policies" / "facts.jsonl"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert [line.split()[0] for line in build.check()] == ["data/policies/facts.jsonl"]


def test_a_changed_source_is_noticed(copy):
    folder, build = copy
    source = folder / "source" / "wordings_dev.toml"
    text = source.read_text(encoding="utf-8")
    name = BANKS["dev"]["names"][0]
    source.write_text(text.replace(f'"{name}"', '"Xanthippe"'), encoding="utf-8")
    # The manifest holds a hash of every split, so it changes with them.
    assert [line.split()[0] for line in build.check()] == ["data/tickets/dev.jsonl", "data/manifest.json"]


def test_what_a_desktop_leaves_behind_is_no_data(copy):
    folder, build = copy
    (folder / "source" / "policies" / ".DS_Store").write_bytes(b"\0")
    assert build.check() == []
