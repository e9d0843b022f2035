"""Files of a reader's own data as tests need them: 77 intents in short questions, and slots in nested objects."""

import json
import random
import re

THINGS = (
    ("card", "my card", "the debit card", "the plastic card"),
    ("transfer", "a transfer", "my bank transfer", "the money I sent"),
    ("cash", "a cash withdrawal", "the money from the machine", "my withdrawal"),
    ("top_up", "a top-up", "my top up", "the money I added"),
    ("direct_debit", "a direct debit", "my standing order", "the monthly debit"),
    ("pin", "my PIN", "the secret number", "my four digits"),
    ("identity", "my identity check", "the identity document", "the verification of my passport"),
    ("exchange", "a currency exchange", "the exchange rate", "changing euros"),
    ("refund", "a refund", "my money back from a shop", "the refund of a purchase"),
    ("phone", "my phone", "the mobile that the app is on", "my new phone"),
    ("account", "my account", "the savings account", "the account of my child"),
)
ACTIONS = (
    ("lost", "I cannot find {}, what now", "{} is gone", "where has {} gone, it is lost"),
    ("pending", "why is {} still pending", "{} is taking ages", "how long do I wait for {}"),
    ("declined", "{} was declined", "why did you refuse {}", "{} does not work, it says rejected"),
    ("fee", "what does {} cost", "is there a fee for {}", "I was charged extra for {}"),
    ("change", "how do I change {}", "I would like to replace {}", "can {} be changed to another one"),
    ("cancel", "please cancel {}", "I want to stop {}", "how can I get rid of {}"),
    ("country", "can I use {} abroad", "does {} work in another country", "I am travelling, what about {}"),
)
OPENINGS = ("", "Hello, ", "Hi, ", "Excuse me, ", "I have a question: ", "Quick one, ", "Sorry to bother you, ", "So, ")
ENDINGS = ("?", "", ", thanks", "?? please help", ", it is urgent", " since {}", " and I am from {}", ", my name is {}")
WORDS = (
    "Monday Tuesday Rome Oslo Bern Ann Joe Lima Kyoto Friday Leeds Cork Bath Ida Max Tom Eve Porto Ghent Turin".split()
)


def words(text):
    """What two texts are told apart by: their words and numbers, without case and punctuation."""
    return tuple(re.findall(r"\w+", text.casefold()))


def intents(n=10_000, seed=0):
    """`n` short questions of 77 intents, no two alike."""
    rng, found = random.Random(seed), {}
    while len(found) < n:
        thing, action = rng.choice(THINGS), rng.choice(ACTIONS)
        text = rng.choice(OPENINGS) + rng.choice(action[1:]).format(rng.choice(thing[1:])) + rng.choice(ENDINGS)
        text = text.format(rng.choice(WORDS)) + rng.choice(["", " " + rng.choice(WORDS), f" ({rng.randrange(100)})"])
        found[words(text)] = {"text": text, "target": f"{thing[0]}_{action[0]}"}
    return list(found.values())


def slots(n=2000, seed=0):
    """`n` orders with nested targets: lists, objects in objects, null."""
    rng, found = random.Random(seed), {}
    while len(found) < n:
        city, guests, hour = rng.choice(WORDS[2:4] + WORDS[7:9]), rng.randrange(1, 13), rng.randrange(12, 23)
        wishes = rng.sample(["window", "quiet", "garden", "high chair"], rng.choice([0, 0, 1, 2]))
        name = rng.choice(["Ann", "Joe", "Ida", "Max", "Tom", "Eve"]) if rng.random() < 0.7 else None
        text = f"{rng.choice(['Table', 'A table', 'Please book a table'])} for {guests} in {city} at {hour}:00"
        text += f", name {name}" if name else ""
        text += "".join(f", {wish} please" for wish in wishes) + rng.choice(
            ["", ".", " thanks", f" ref {rng.randrange(999)}"]
        )
        target = {"intent": "book", "slots": {"place": {"city": city}, "time": {"hour": hour}, "guests": guests}}
        target["slots"] |= {"name": name, "wishes": wishes}
        found[words(text)] = {"text": text, "target": target}
    return list(found.values())


def write(path, records, extra=()):
    """The records as JSON Lines, then `extra` lines as they are; returns the path."""
    lines = [json.dumps(r, ensure_ascii=False) for r in records] + list(extra)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
