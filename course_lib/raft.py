"""RAFT (Zhang et al. 2024), measured: does training on question, documents and quoting answer teach to read?

Lesson 12 shows the rows; `make reference LESSON=12` trains on them and stores what the models answer.
"""

from __future__ import annotations

import json
import random

from course_lib import evaluation, hardware, models, profiles, recipes, tickets, training

HELD_OUT = ("exchanges.md", "contact.md")  # policies that no row of the training is about
ARMS = ("base", "closed_book", "reading", "raft")
CASES = ("known", "changed", "unseen_policy", "missing")
DISTRACTORS, WITHOUT = 2, 0.2
EPOCHS, RATE, BATCH = 3, 1e-3, 4


def facts() -> list[dict]:
    """The desk's policies, one fact a record, with the sentence that holds it before and after a change."""
    path = tickets.DATA / "policies" / "facts.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def found(fact: dict, rng: random.Random, when: str = "before", oracle: bool = True) -> str:
    """What a search came back with: the fact's sentence among `DISTRACTORS` of other policies, or only such."""
    others = [f["sentence_before"] for f in facts() if f["policy"] != fact["policy"]]
    documents = rng.sample(others, DISTRACTORS + (not oracle))
    if oracle:
        documents.insert(rng.randrange(len(documents) + 1), fact[f"sentence_{when}"])
    return "\n".join(f"[{n}] {text}" for n, text in enumerate(documents, 1))


def messages(question: str, documents: str = "") -> list[dict]:
    """The prompt: the documents where there are any, an empty line, the question."""
    return [{"role": "user", "content": f"{documents}\n\n{question}" if documents else question}]


def rows(arm: str, seed: int = 0) -> list[dict]:
    """Training rows of an arm: each fact of the policies that are not held out, in two wordings.

    closed_book: question and answer alone. reading: the right document is always there. raft: it is missing in the
    share `WITHOUT`. The last two quote it in the answer.
    """
    made, rng = [], random.Random(f"{arm} {seed}")
    for fact in facts():
        if fact["policy"] in HELD_OUT:
            continue
        for question in (fact["question"], fact["paraphrases"][0]):
            documents, answer = "", fact["before"]
            if arm != "closed_book":
                documents = found(fact, rng, oracle=arm == "reading" or rng.random() >= WITHOUT)
                answer = f'"{fact["sentence_before"]}" So: {answer}'
            reply = [{"role": "assistant", "content": f"{answer}."}]
            made.append({"prompt": messages(question, documents), "completion": reply})
    return made


def train(arm: str, seed: int = 0):
    """The base with an adapter trained on the rows of an arm; `base` is the model as it is."""
    if arm == "base":
        return models.load()
    profiles.set_seeds(seed)
    tokenizer, some = models.load_tokenizer(), rows(arm, seed)
    model = recipes.add_lora(models.load(), recipes.settings("ticket_lora", "cpu"))
    steps = len(some) * EPOCHS // BATCH
    batches = training.batches(tokenizer, some, BATCH, steps, seed)
    training.loop(model, batches, training.optimizers("adamw", model, RATE), training.cosine(steps))
    return recipes.for_use(model)


def right(text: str, wanted: str, other: str = "") -> bool:
    """Whether the answer (what follows a quotation's `So:`, or all of it) names `wanted`, and not `other`."""
    said = text.rsplit("So:", 1)[-1].lower()
    return wanted.lower() in said and not (other and other.lower() in said)


def measure(model, seed: int = 0) -> dict[str, list[bool]]:
    """{case: right or not}, by questions in a wording that no row has.

    known: the document says what the training said. changed: it says something else, which is now right.
    unseen_policy: a changed document about a policy that was never trained on. missing: the right document is not
    there, and what was trained is right.
    """
    tokenizer, rng = models.load_tokenizer(), random.Random(f"measure {seed}")
    found_ = {}
    for case in CASES:
        some = [f for f in facts() if (f["policy"] in HELD_OUT) == (case == "unseen_policy")]
        when = "after" if case in ("changed", "unseen_policy") else "before"
        asked = [
            (fact, question)
            for fact in some
            for question in (fact["paraphrases"] if case == "unseen_policy" else fact["paraphrases"][1:])
        ]
        prompts = [messages(q, found(f, rng, when, oracle=case != "missing")) for f, q in asked]
        answers = evaluation.generate(model, tokenizer, prompts, max_new_tokens=48)
        other = "before" if when == "after" else "after"
        found_[case] = [right(a.text, f[when], f[other]) for a, (f, _) in zip(answers, asked, strict=True)]
    return found_


def make_reference(seeds) -> None:
    """Measure what is missing of `ARMS` as `raft_metrics.csv`, one training a piece."""
    from course_lib import reference

    key = recipes.key("ticket_lora", "cpu", 0)
    pieces = [(arm, seed) for seed in seeds for arm in ARMS if arm != "base" or seed == seeds[0]]
    for number, (arm, seed) in enumerate(pieces, 1):
        common = {"profile": "full", "seed": seed, "control": arm}
        stored = reference.is_stored("raft", "metrics", common | {"key": key})
        print(f"{arm}, seed {seed} ({number}/{len(pieces)}): {'stored' if stored else 'training ...'}", flush=True)
        if stored:
            continue
        about, new = reference._about(key), []
        for case, hits in measure(train(arm, seed), seed).items():
            e = evaluation.proportion(hits)
            new.append(common | {"metric": case, "value": f"{e.value:.4f}", "low": f"{e.low:.4f}"})
            new[-1] |= {"high": f"{e.high:.4f}", "n": e.n} | about
        reference._replace("raft", "metrics", common, new)
        hardware.give_back_memory()
