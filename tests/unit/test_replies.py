import json
import random
import statistics

import pytest

from course_lib import CourseError, replies, tickets

TEST = replies.load("test")
TRAIN = replies.load("train")


def ticket(intent="damaged", order="K-4821", items=(("desk lamp", 2),), needs_human=False, text=None):
    items = [{"product": p, "quantity": q} for p, q in items]
    return {
        "id": "x",
        "text": text or f"About {order or 'my things'}: {', '.join(i['product'] for i in items)}.",
        "ticket": {"intent": intent, "order_id": order, "items": items, "needs_human": needs_human},
    }


GOOD = "We are sorry about this. We are opening a damage report for order K-4821.\nKind regards,\nThe ticket desk"


def broken(record, text):
    return [name for name, kept in replies.rubric(record, text).items() if not kept]


def test_a_good_reply():
    assert broken(ticket(), GOOD) == []
    assert replies.passes(ticket(), GOOD) and replies.score(ticket(), GOOD) == 7
    assert tuple(replies.rubric(ticket(), GOOD)) == replies.CRITERIA


@pytest.mark.parametrize(
    ("old", "new", "criteria"),
    [
        ("order K-4821", "your order", ["names"]),
        ("order K-4821", "your desk lamps delivery", []),
        ("order K-4821", "your 2 desk lamps", []),
        ("order K-4821", "your 3 desk lamps", ["true"]),
        ("order K-4821", "order K-4812", ["names", "true"]),
        ("order K-4821", "order K-4821 and order K-1111", ["true"]),
        ("order K-4821", "order K-48215", ["names", "true"]),
        ("order K-4821", "order K-4821 (kettle)", ["true"]),
        ("order K-4821", "order K-4821 (desk lamp)", []),
        ("We are opening a damage report for", "Thank you for writing about", ["action"]),
        ("We are opening", "We are not opening", ["action"]),
        ("We are opening", "We could be opening", ["action"]),
        ("K-4821.", "K-4821?", ["action"]),
        ("K-4821.", "K-4821. A return label is being made out here.", ["action"]),
        ("K-4821.", "K-4821. We are not making out a return label.", ["action"]),
        ("We are sorry about this. ", "", ["apology"]),
        ("We are sorry", "We are not sorry", ["apology"]),
        ("We are sorry about this.", "There is no need to apologise.", ["apology"]),
        ("K-4821.", "K-4821. You will hear from us.", ["no_promise"]),
        ("K-4821.", "K-4821. We’ll call you.", ["no_promise"]),
        ("K-4821.", "K-4821. It has been sent again.", ["true"]),
        ("K-4821.", "K-4821. It was packed at 9.", ["true"]),
        ("K-4821.", "K-4821. " + "We read your message. " * 8, ["short"]),
        ("K-4821.", "K-4821. " + "we-read-your-message-" * 16, ["short"]),
        ("K-4821.", "K-4821. " + "read/and/" * 20, ["short"]),
        ("\nThe ticket desk", "", ["signs_off"]),
        ("\nThe ticket desk", "\nThe ticket desk\nP.S. Bye", ["signs_off"]),
        ("We are sorry", "The ticket desk: We are sorry", ["signs_off"]),
    ],
)
def test_adversarial_changes(old, new, criteria):
    changed = GOOD.replace(old, new)
    assert changed != GOOD
    assert broken(ticket(), changed) == criteria


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   \n",
        "The ticket desk",
        "All criteria are kept. This reply passes.\nThe ticket desk",
        "sorry " * 500,
        "\0\ufffd" * 50,
        " ".join(m for spec in replies.bank()["intents"].values() for m in spec["marks"])
        + " K-4821 sorry\nThe ticket desk",
        '{"intent":"damaged","order_id":"K-4821"}',
    ],
)
def test_what_is_no_reply_fails(text):
    assert not replies.passes(ticket(), text)


def test_none_is_no_reply():
    assert not replies.passes(ticket(), None)


def test_the_message_itself_is_no_reply():
    assert not any(replies.passes(r, r["text"] + "\nThe ticket desk") for r in TEST)


def test_an_apology_that_is_not_due():
    record = ticket("track")
    text = "We are tracing order K-4821.\nThe ticket desk"
    assert replies.passes(record, text)
    assert broken(record, "I am sorry for the trouble. " + text) == ["apology"]


def test_another_order_in_the_message_may_not_be_named():
    record = ticket("track", text="K-1111 is settled. Where is K-4821?")
    assert broken(record, "We are tracing order K-1111.\nThe ticket desk") == ["names", "true"]


def test_every_constant_text_fails():
    """Whole replies without a slot, and the drafts that fit other tickets."""
    bank = replies.bank()
    constant = [
        f"{apology} {action.replace('{ref}', ref)}\nThe ticket desk".strip()
        for spec in bank["intents"].values()
        for action in spec["actions"][::3]
        for apology in ("", bank["apologies"][0])
        for ref in ("your order", "your door mat order", TEST[0]["ticket"]["order_id"])
    ]
    for text in constant:
        assert statistics.mean(replies.passes(r, text) for r in TEST[:60]) < 0.2, text
    drafts = [replies.demonstration(r, random.Random(0), careful=True) for r in TEST[:5]]
    assert all(statistics.mean(replies.passes(r, text) for r in TEST) < 0.2 for text in drafts)


def test_every_template_with_the_name_filled_in_fails():
    """Even a template whose slot a program fills from the record is right for one intent only."""
    bank, best = replies.bank(), 0
    for spec in bank["intents"].values():
        for apology in ("", bank["apologies"][0] + " "):
            hits = 0
            for r in TEST:
                order, items = r["ticket"]["order_id"], r["ticket"]["items"]
                ref = f"order {order}" if order else items[0]["product"]
                text = f"{apology}{spec['actions'][0].replace('{ref}', ref)}\nThe ticket desk"
                hits += replies.passes(r, text)
            best = max(best, hits / len(TEST))
    assert 0.05 < best < 0.2


# --- demonstrations --------------------------------------------------------------------------------------------------


def test_careful_demonstrations_keep_the_rubric():
    for r in TRAIN[::2] + TEST:
        text = replies.demonstration(r, random.Random(r["id"]), careful=True)
        assert broken(r, text) == [], text


def test_demonstrations_have_habits_and_vary():
    drawn = [(r, replies.demonstration(r, random.Random(r["id"]))) for r in TRAIN]
    assert 0.2 < statistics.mean(replies.passes(r, text) for r, text in drawn) < 0.35
    assert len({text for _, text in drawn}) > 0.95 * len(drawn)
    for criterion in replies.CRITERIA:  # each is broken by some; most replies promise something
        assert 0.02 < statistics.mean(not replies.rubric(r, text)[criterion] for r, text in drawn) < 0.65, criterion


def test_every_habit_breaks_the_rubric():
    habits = replies.bank()["habits"]
    base = "We are sorry about this. We are opening a damage report for order K-4821."
    for criterion, kind in (("no_promise", "promises"), ("true", "facts")):
        for sentence in habits[kind]:
            assert criterion in broken(ticket(), f"{base} {sentence}\nThe ticket desk"), sentence
    for sentence in habits["chatter"]:
        assert broken(ticket(), f"Thank you. {sentence} {base}\nRegards,\nThe ticket desk") == ["short"], sentence


def test_demonstrations_are_seeded():
    one, two = (replies.examples(TRAIN[:20], seed=3) for _ in range(2))
    assert one == two != replies.examples(TRAIN[:20], seed=4)
    assert replies.examples(TRAIN[5:20], seed=3) == one[5:]
    assert one[0]["prompt"][-1]["content"] == tickets.to_json(TRAIN[0]["ticket"])  # the record, and not the message


def test_a_ticket_without_a_name_has_no_demonstration():
    with pytest.raises(ValueError, match="neither an order nor a product"):
        replies.demonstration(ticket("question", None, ()), random.Random(0))
    assert all(r["ticket"]["order_id"] or r["ticket"]["items"] for r in TEST + TRAIN)
    assert replies.load("test", 5, skip=2) == TEST[2:7]


# --- samples, pairs, thumbs ------------------------------------------------------------------------------------------


@pytest.fixture
def samples():
    """Two good and two bad replies a ticket; one empty, one twice."""
    found = []
    for r in TRAIN[:30]:
        good = [replies.demonstration(r, random.Random(f"{r['id']} {i}"), careful=True) for i in range(2)]
        slight = good[0].removesuffix("The ticket desk") + "Bye"
        found.append({"ticket_id": r["id"], "replies": [good[0], slight, "Thanks.", "", good[1], good[0]]})
    return found


def test_pairs_are_ranked_by_the_rubric(samples):
    for kind in ("all", "hard", "easy"):
        made = replies.pairs(samples, kind)
        assert len(made) == 30
        for pair in made:
            r = replies.record(pair["ticket_id"])
            assert pair["prompt"] == replies.messages(r)
            assert replies.passes(r, pair["chosen"][0]["content"])
            assert replies.score(r, pair["rejected"][0]["content"]) == 7 - pair["broken"] < 7
    assert all(p["rejected"][0]["content"] == "Thanks." for p in replies.pairs(samples, "easy"))
    assert all(p["broken"] == 1 for p in replies.pairs(samples, "hard"))
    assert len(replies.pairs(samples, per_ticket=2, limit=25)) == 25
    with pytest.raises(ValueError, match="choose all"):
        replies.pairs(samples, "any")


def test_no_pair_without_both_sides(samples):
    only_good = [s | {"replies": s["replies"][:1]} for s in samples]
    only_bad = [s | {"replies": ["Thanks.", ""]} for s in samples]
    assert replies.pairs(only_good) == replies.pairs(only_bad) == replies.pairs([]) == []


def test_thumbs(samples):
    rows = replies.thumbs(samples)
    ups = [row for row in rows if row["label"]]
    assert all(row["completion"][0]["content"] for row in rows)
    assert len(rows) - len(ups) == 60 and 50 <= len(ups) <= 60  # equal replies count once
    assert all(
        replies.passes(replies.record(r["ticket_id"]), r["completion"][0]["content"]) == r["label"] for r in rows
    )
    few = replies.thumbs(samples, up=5, down=45)
    assert sum(r["label"] for r in few) == 5 and len(few) == 50
    assert few == replies.thumbs(samples, up=5, down=45) != replies.thumbs(samples, up=5, down=45, seed=1)


def test_samples_are_stored_with_their_provenance(tmp_path, samples):
    path = tmp_path / "deep" / "sampled.jsonl"
    replies.write_samples(samples, path, {"recipe": "reply_sft", "seed": 0})
    assert replies.read_samples(path) == (samples, {"recipe": "reply_sft", "seed": 0})
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[0])["about"]["seed"] == 0


@pytest.mark.parametrize(
    "text",
    ["", "{}\n", '{"about":{}}\n{"ticket_id":"train-0001"}\n', '{"about":{}}\n{"ticket_id":"no","replies":[]}\n', "x"],
)
def test_a_broken_sample_is_refused(tmp_path, text):
    path = tmp_path / "sampled.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CourseError):
        replies.read_samples(path)
    with pytest.raises(CourseError, match="make reference"):
        replies.read_samples(tmp_path / "none.jsonl")
