"""The ticket desk's parser, house rules, date tool and scorer."""

import calendar
import itertools
import json
from datetime import date, timedelta

import pytest

from course_lib import tickets
from course_lib.tickets import (
    Parsed,
    exact,
    field_matches,
    needs_human,
    parse,
    priority,
    resolve,
    resolve_date,
    to_json,
)

TICKET = {
    "intent": "buy",
    "items": [{"product": "desk lamp", "quantity": 2}, {"product": "kettle", "quantity": 1}],
    "order_id": "K-4821",
    "due_date": "next Friday",
    "needs_human": False,
    "priority": "high",
}
WHOLE = json.dumps(TICKET)
WEDNESDAY = "2026-03-11"


def error(text: str) -> str | None:
    parsed = parse(text)
    assert (parsed.ticket is None) == (parsed.error is not None)
    return parsed.error


def changed(**fields) -> str:
    return json.dumps(TICKET | fields)


# --- parse -----------------------------------------------------------------------------------------------------------


def test_a_record_is_taken_as_it_stands():
    assert parse(WHOLE) == Parsed(TICKET)
    assert parse(f"\n  {json.dumps(TICKET, indent=2)}\t\n").ticket == TICKET
    assert parse(changed(items=[], order_id=None, due_date=None)).ticket["items"] == []
    assert parse(json.dumps(dict(reversed(TICKET.items())))).ticket == TICKET  # the order of keys is free


@pytest.mark.parametrize("text", ["", " ", "\n\t \r\n", "\u00a0", "\x0b\x0c"])
def test_empty(text):
    assert error(text) == "empty"


@pytest.mark.parametrize(
    "text",
    [
        f"```json\n{WHOLE}\n```",
        f"```\n{WHOLE}\n```",
        f"Here is the record: {WHOLE}",
        f"{WHOLE} I hope this helps.",
        f"{WHOLE}.",
        f"{WHOLE}\n{WHOLE}",
        f"{WHOLE},",
        f"\ufeff{WHOLE}",
        f"\u00a0{WHOLE}",  # a blank, but not one that JSON knows
        WHOLE.replace('"', "'"),
        WHOLE.replace("false", "False"),
        WHOLE.replace("}]", "},]"),
        WHOLE + "\x00",
        "{",
        "{}{}",
        "// nothing",
    ],
)
def test_anything_around_or_beside_one_object_is_refused(text):
    assert error(text) == "json"


def test_cut_off_anywhere():
    assert all(error(WHOLE[:n]) == "json" for n in range(1, len(WHOLE)))


@pytest.mark.parametrize(
    "text",
    [
        WHOLE[:-1] + ', "intent": "track"}',
        WHOLE[:-1] + ', "intent": "buy"}',  # also with the same value
        WHOLE.replace('"quantity": 2', '"quantity": 2, "quantity": 3'),
        WHOLE.replace('"desk lamp"', '{"a": {"b": 1, "b": 2}}'),
        WHOLE.replace('"kettle"', r'"kettle", "produc\u0074": "vase"'),
        '[[{"a": 1, "a": 1}]]',
    ],
)
def test_duplicate_keys_at_any_depth(text):
    assert error(text) == "duplicate key"


def test_the_same_key_in_two_objects_is_no_duplicate():
    assert WHOLE.count('"product"') == 2 and parse(WHOLE).ticket


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_json_does_not_have(number):
    assert error(WHOLE.replace('"quantity": 2', f'"quantity": {number}')) == "json"
    assert error(number) == "json"


@pytest.mark.parametrize(
    "value",
    [0, -1, 1000, 10**3000, 2.0, 2.5, True, False, "2", "two", "", None, [2], {"n": 2}],
)
def test_quantity_is_a_whole_number_from_1_to_999(value):
    assert error(changed(items=[{"product": "kettle", "quantity": value}])) == "schema: items.0.quantity"


def test_a_number_too_large_for_a_float():
    assert error(WHOLE.replace('"quantity": 2', '"quantity": 1e999')) == "schema: items.0.quantity"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("intent", "Buy"),
        ("intent", "buy "),
        ("intent", "order"),
        ("intent", None),
        ("intent", ["buy"]),
        ("items", None),
        ("items", {}),
        ("items", "kettle"),
        ("order_id", "4821"),
        ("order_id", "k-4821"),
        ("order_id", "K-482"),
        ("order_id", "K-48210"),
        ("order_id", "K-4821\n"),
        ("order_id", " K-4821"),
        ("order_id", "K-٤٨٢١"),  # digits, but not these
        ("order_id", ""),
        ("order_id", "null"),
        ("order_id", 4821),
        ("due_date", ""),
        ("due_date", "x" * 41),
        ("due_date", 20260311),
        ("due_date", False),
        ("needs_human", 0),
        ("needs_human", 1),
        ("needs_human", "false"),
        ("needs_human", None),
        ("priority", "High"),
        ("priority", 2),
        ("priority", None),
    ],
)
def test_a_field_outside_of_the_schema_is_named(field, value):
    assert error(changed(**{field: value})) == f"schema: {field}"


@pytest.mark.parametrize(
    ("item", "where"),
    [
        (None, "0"),
        ("kettle", "0"),
        ([], "0"),
        ({}, "0.product"),
        ({"product": "kettle"}, "0.quantity"),
        ({"quantity": 1}, "0.product"),
        ({"product": "", "quantity": 1}, "0.product"),
        ({"product": None, "quantity": 1}, "0.product"),
        ({"product": 7, "quantity": 1}, "0.product"),
        ({"product": "x" * 61, "quantity": 1}, "0.product"),
        ({"product": "kettle", "quantity": 1, "colour": "red"}, "0.colour"),
    ],
)
def test_items(item, where):
    assert error(changed(items=[item])) == f"schema: items.{where}"


def test_at_most_eight_items():
    item = {"product": "mug", "quantity": 1}
    assert parse(changed(items=[item] * 8)).ticket
    assert error(changed(items=[item] * 9)) == "schema: items"


@pytest.mark.parametrize("field", tickets.FIELDS)
def test_missing_fields(field):
    assert error(json.dumps({f: v for f, v in TICKET.items() if f != field})) == f"schema: {field}"


@pytest.mark.parametrize("key", ["note", "", "Intent", "due_phrase"])
def test_further_fields(key):
    assert error(changed(**{key: "x"})).startswith("schema")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f"[{WHOLE}]", "list"),
        ("[]", "list"),
        ("null", "NoneType"),
        ("true", "bool"),
        ("12", "int"),
        ('"buy"', "str"),
        (json.dumps(WHOLE), "str"),  # JSON in JSON
    ],
)
def test_json_that_is_no_object(text, kind):
    assert error(text) == f"schema: {kind}"


def test_babble_is_not_parsed():
    assert error("x" * 5000) == "too long"
    assert error(WHOLE + " " * 5000) == "too long"
    assert error("[" * 5000) == "too long"
    assert parse(WHOLE.ljust(tickets.MAX_ANSWER_CHARS)).ticket == TICKET


@pytest.mark.parametrize("n", [100, 900, 1990])
@pytest.mark.parametrize(("left", "right"), [("[", "]"), ('{"a":', "}")])
def test_deep_nesting_is_an_answer_like_any_other(n, left, right):
    n = min(n, 3900 // len(left + right))
    assert error(left * n + "1" + right * n) in ("json", "schema: list", "schema: intent")
    assert error(left * n) == "json"
    assert error(changed(items=0).replace(": 0", ": " + left * n + "1" + right * n)) is not None


def test_unicode():
    for name in ("crêpe pan", "Übertopf", "茶碗", "mug 🫖"):
        for ascii_only in (True, False):
            text = json.dumps(TICKET | {"items": [{"product": name, "quantity": 1}]}, ensure_ascii=ascii_only)
            assert parse(text).ticket["items"][0]["product"] == name
    lone_surrogate = WHOLE.replace("kettle", r"\ud83e")
    assert error(lone_surrogate) == "schema: items.1.product"  # it could not be written to a file


# --- rule 5 ----------------------------------------------------------------------------------------------------------

START = dict.fromkeys(tickets.INTENTS, 1) | {"question": 0, "invoice": 0, "damaged": 2, "missing": 2}


def test_there_are_ten_intents():
    assert len(tickets.INTENTS) == len(set(tickets.INTENTS)) == 10


@pytest.mark.parametrize("intent", tickets.INTENTS)
def test_priority_in_every_combination(intent):
    for due, quantity, human in itertools.product((None, "2026-03-20"), (0, 1, 9, 10, 11), (False, True)):
        items = [{"product": "mug", "quantity": quantity}] if quantity else []
        level = START[intent] + (due is not None) + (quantity >= 10)
        level = min(3, max(level, 2) if human else level)
        assert priority(intent, items, due, human) == ("low", "normal", "high", "urgent")[level]


def test_quantities_add_up():
    def of(*quantities):
        return priority("buy", [{"product": "mug", "quantity": q} for q in quantities], None, False)

    assert (of(9), of(4, 5), of(4, 6), of(10), of(3, 3, 4)) == ("normal", "normal", "high", "high", "high")


def test_the_words_of_a_date_count_like_the_date():
    assert priority("buy", [], "next Friday", False) == priority("buy", [], "2026-03-20", False) == "high"


# --- rule 4 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("intent", tickets.INTENTS)
def test_needs_human_in_every_combination(intent):
    for order, asked in itertools.product((None, "K-4821"), (False, True)):
        missing = order is None and intent not in ("buy", "question")
        assert needs_human(intent, order, asked) is (missing or asked)


def test_a_missing_number_lifts_a_ticket_to_high():
    assert priority("invoice", [], None, needs_human("invoice", None, False)) == "high"
    assert priority("invoice", [], None, needs_human("invoice", "K-4821", False)) == "low"
    assert priority("question", [], None, needs_human("question", None, False)) == "low"


# --- rule 3 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phrase", "received", "day"),
    [
        ("today", WEDNESDAY, "2026-03-11"),
        ("tomorrow", WEDNESDAY, "2026-03-12"),
        ("the day after tomorrow", WEDNESDAY, "2026-03-13"),
        ("tomorrow", "2026-01-31", "2026-02-01"),
        ("tomorrow", "2026-12-31", "2027-01-01"),
        ("the day after tomorrow", "2028-02-28", "2028-03-01"),
        ("the day after tomorrow", "2026-02-27", "2026-03-01"),
        # the 14th
        ("the 14th", WEDNESDAY, "2026-03-14"),
        ("the 11th", WEDNESDAY, "2026-04-11"),
        ("the 10th", WEDNESDAY, "2026-04-10"),
        ("14th", WEDNESDAY, "2026-03-14"),
        ("the 1st", "2026-12-15", "2027-01-01"),
        ("the 31st", "2026-01-31", "2026-03-31"),  # February has none
        ("the 31st", "2026-03-31", "2026-05-31"),  # nor has April
        ("the 30th", "2026-01-31", "2026-03-30"),
        ("the 29th", "2026-01-30", "2026-03-29"),
        ("the 29th", "2028-01-30", "2028-02-29"),
        ("the 31st", "2026-12-31", "2027-01-31"),
        # a day with its month
        ("3 April", WEDNESDAY, "2026-04-03"),
        ("April 3rd", WEDNESDAY, "2026-04-03"),
        ("April 3", WEDNESDAY, "2026-04-03"),
        ("the 3rd of April", WEDNESDAY, "2026-04-03"),
        ("3rd April", WEDNESDAY, "2026-04-03"),
        ("april the 3rd", WEDNESDAY, "2026-04-03"),
        ("3 March", WEDNESDAY, "2027-03-03"),
        ("11 March", WEDNESDAY, "2027-03-11"),
        ("12 March", WEDNESDAY, "2026-03-12"),
        ("1 January", "2026-12-31", "2027-01-01"),
        ("31 December", "2026-12-31", "2027-12-31"),
        ("29 February", WEDNESDAY, "2028-02-29"),
        ("29 February", "2028-02-29", "2032-02-29"),
        ("29 February", "2096-03-01", "2104-02-29"),  # 2100 is no leap year
        ("2026-04-03", WEDNESDAY, "2026-04-03"),
        ("2025-04-03", WEDNESDAY, "2025-04-03"),  # as it stands
        # spans
        ("in ten days", WEDNESDAY, "2026-03-21"),
        ("within ten days", WEDNESDAY, "2026-03-21"),
        ("in 5 days", WEDNESDAY, "2026-03-16"),
        ("in one day", WEDNESDAY, "2026-03-12"),
        ("within a week", WEDNESDAY, "2026-03-18"),
        ("in two weeks", WEDNESDAY, "2026-03-25"),
        ("in three weeks", WEDNESDAY, "2026-04-01"),
        ("within the next 12 days", WEDNESDAY, "2026-03-23"),
        ("in two weeks' time", WEDNESDAY, "2026-03-25"),
        ("in 20 days", "2026-12-20", "2027-01-09"),
        ("in two days", "2028-02-27", "2028-02-29"),
        # the end of the month
        ("the end of the month", WEDNESDAY, "2026-03-31"),
        ("the end of the month", "2026-02-01", "2026-02-28"),
        ("the end of the month", "2028-02-01", "2028-02-29"),
        ("the end of the month", "2026-04-30", "2026-04-30"),
        ("the end of the month", "2026-12-05", "2026-12-31"),
    ],
)
def test_dates(phrase, received, day):
    assert resolve_date(phrase, received) == day


MONDAY = date(2026, 3, 9)


@pytest.mark.parametrize("on", range(7))
@pytest.mark.parametrize("wanted", range(7))
def test_weekdays(on, wanted):
    received, name = (MONDAY + timedelta(days=on)).isoformat(), calendar.day_name[wanted]
    first = MONDAY + timedelta(days=wanted if wanted > on else wanted + 7)
    assert resolve_date(name, received) == resolve_date(f"this {name}", received) == first.isoformat()
    assert resolve_date(f"the coming {name}", received) == first.isoformat()
    assert resolve_date(f"next {name}", received) == (MONDAY + timedelta(days=7 + wanted)).isoformat()


def test_weekdays_across_the_end_of_a_year():
    assert resolve_date("Friday", "2026-12-31") == "2027-01-01"  # a Thursday
    assert resolve_date("next Friday", "2026-12-31") == "2027-01-08"


def test_every_number_word():
    words = "one two three four five six seven eight nine ten eleven twelve".split()
    for n, word in enumerate(words, 1):
        for written in (word, str(n)):
            assert resolve_date(f"in {written} days", WEDNESDAY) == f"2026-03-{11 + n:02d}"


def test_every_day_of_a_year_by_name():
    for n in range(1, 366):
        day = date(2026, 3, 11) + timedelta(days=n)
        for phrase in (f"{day.day} {calendar.month_name[day.month]}", f"{calendar.month_name[day.month]} {day.day}"):
            assert resolve_date(phrase, WEDNESDAY) == day.isoformat()


@pytest.mark.parametrize(
    "phrase",
    ["by Friday", "on Friday", "for Friday", "until Friday", "before Friday", "no later than Friday"]
    + ["FRIDAY", "friday", " Friday ", "Friday.", "Friday!", "by  this\nFriday", "the coming Friday", "in two days"],
)
def test_how_it_is_put_makes_no_difference(phrase):
    assert resolve_date(phrase, WEDNESDAY) == "2026-03-13"


@pytest.mark.parametrize(
    "phrase",
    ["", " ", "soon", "asap", "next week", "yesterday", "monday week", "in a fortnight", "a few days", "weekday"]
    + ["next day", "birthday", "Mayday", "the 0th", "the 32nd", "30 February", "31 April", "0 May", "3 Foo", "13"]
    + ["2026-02-30", "2026-13-01", "2026-3-4", "3/4/2026", "in days", "in many days", "in ² days", "in -1 days"]
    + ["in 99999999999999999999 days", "Friday or Saturday", "next Friday, please", "null", "None"],
)
def test_unknown_words_raise_and_are_named(phrase):
    with pytest.raises(ValueError) as raised:
        resolve_date(phrase, WEDNESDAY)
    assert repr(phrase) in str(raised.value)
    assert "data/README.md" in str(raised.value)


def test_resolve():
    assert resolve(TICKET, WEDNESDAY) == TICKET | {"due_date": "2026-03-20"}
    assert TICKET["due_date"] == "next Friday"  # the ticket itself is left alone
    for kept in (None, "some day", "2026-03-20", "2026-02-30"):
        assert resolve(TICKET | {"due_date": kept}, WEDNESDAY)["due_date"] == kept


def test_in_words_and_back():
    record = {"ticket": TICKET | {"due_date": "2026-03-20"}, "due_phrase": "next Friday"}
    assert tickets.in_words(record) == TICKET
    assert resolve(tickets.in_words(record), WEDNESDAY) == record["ticket"]
    nothing = {"ticket": TICKET | {"due_date": None}, "due_phrase": None}
    assert resolve(tickets.in_words(nothing), WEDNESDAY) == nothing["ticket"]


# --- scoring and writing ---------------------------------------------------------------------------------------------

OTHER = {
    "intent": "track",
    "items": [],
    "order_id": None,
    "due_date": "2026-03-20",
    "needs_human": True,
    "priority": "low",
}


def test_a_record_matches_itself():
    assert exact(TICKET, json.loads(WHOLE))
    assert field_matches(TICKET, TICKET) == dict.fromkeys(tickets.FIELDS, True)


@pytest.mark.parametrize("field", tickets.FIELDS)
def test_one_wrong_field(field):
    answer = TICKET | {field: OTHER[field]}
    assert field_matches(TICKET, answer) == {f: f != field for f in tickets.FIELDS}
    assert not exact(TICKET, answer)


def test_no_answer_matches_nothing():
    assert not any(field_matches(TICKET, None).values())
    assert not exact(TICKET, None)
    assert not exact(TICKET | {"order_id": None, "items": []}, None)


def test_the_order_of_items_is_free():
    assert exact(TICKET, TICKET | {"items": TICKET["items"][::-1]})


def test_duplicates_count():
    one, two, three = ({"product": "mug", "quantity": n} for n in (1, 2, 3))
    gold = TICKET | {"items": [one, two]}
    assert exact(gold, gold | {"items": [two, one]})
    for items in ([one], [two], [three], [one, two, two], [one, one, two], [one, one], []):
        assert not field_matches(gold, gold | {"items": items})["items"]
    assert not exact(TICKET | {"items": [two]}, TICKET | {"items": [one, one]})


def test_spelling_counts():
    for product in ("Desk lamp", "desk lamps", "desk  lamp", "lamp"):
        assert not exact(TICKET, TICKET | {"items": [{"product": product, "quantity": 2}, TICKET["items"][1]]})


def test_to_json_and_back():
    written = to_json(dict(reversed(TICKET.items())))
    assert written == WHOLE.replace(", ", ",").replace(": ", ":")
    assert parse(written) == Parsed(TICKET)
    assert to_json(parse(written).ticket) == written
    odd = TICKET | {"items": [{"product": 'the "Übertopf" \\ 20 cm\n', "quantity": 1}]}
    assert "Übertopf" in to_json(odd) and "\n" not in to_json(odd)
    assert parse(to_json(odd)).ticket == odd


# --- records and prompts ---------------------------------------------------------------------------------------------


def test_load():
    assert [r["id"] for r in tickets.load("test", 3)] == ["test-0001", "test-0002", "test-0003"]
    first = tickets.load("test", 1)
    first[0]["ticket"]["intent"] = "spoilt"
    assert tickets.load("test", 1)[0]["ticket"]["intent"] != "spoilt"  # each caller has its own
    assert tickets.load("dev", 0) == []


def test_load_names_the_splits():
    with pytest.raises(ValueError, match=r"'tset'.*'dev', 'hard', 'test', 'train'"):
        tickets.load("tset")


def test_messages():
    record = tickets.load("test", 1)[0]
    system, user = tickets.messages(record)
    assert system == {"role": "system", "content": tickets.SYSTEM}
    assert user == {"role": "user", "content": record["text"]}
    assert tickets.messages(record, "Other.")[0]["content"] == "Other."
