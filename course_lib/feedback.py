"""Thumbs up and down as KTO needs them: what a trainer does not check, the order of the rows, and TRL's trainer.

A row is {"prompt": chat messages, "completion": [the assistant's message], "label": True for a thumb up}.
"""

from __future__ import annotations

import itertools
import random

from course_lib import CourseError, profiles, replies


class FeedbackError(CourseError):
    """Feedback that would train without an error and teach nothing, or something else than was meant."""


def unpaired(pairs: list[dict]) -> list[dict]:
    """The rows of {"prompt", "chosen", "rejected"} pairs: a thumb up for the chosen reply, one down for the other."""
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]


def rows(s, seed: int = 0) -> list[dict]:
    """The thumbs of a recipe (`preferences.settings`): its pairs cut in two; or, with `complaints`, that many thumbs
    down and nine times as many up, drawn from all sampled replies. Of these the share `keep`, and of what is kept the
    share `noise` turned around.
    """
    from course_lib import preferences

    if wanted := getattr(s, "complaints", 0):
        found = nine_to_one(preferences.samples(s, seed)[: -s.held_out], wanted, seed)
    else:
        found = unpaired(preferences.pair_rows(s, seed))
    return turned(kept(found, getattr(s, "keep", 1.0), seed), getattr(s, "noise", 0.0), seed)


def nine_to_one(samples: list[dict], complaints: int, seed: int = 0) -> list[dict]:
    """`complaints` thumbs down and nine times as many up, fewer of both where the sample has not so many."""
    labels = [row["label"] for row in replies.thumbs(samples)]
    complaints = min(complaints, labels.count(False), labels.count(True) // 9)
    if not complaints:
        raise FeedbackError(
            f"{labels.count(True)} thumbs up and {labels.count(False)} down do not give nine to one: sample more."
        )
    return replies.thumbs(samples, up=9 * complaints, down=complaints, seed=seed)


def kept(rows: list[dict], share: float, seed: int = 0) -> list[dict]:
    """A share of the thumbs, the same of both kinds, at least one of each."""
    rng, found = random.Random(f"{seed} kept"), []
    for label in (True, False):
        some = [row for row in rows if row["label"] is label]
        found += rng.sample(some, max(1, round(share * len(some)))) if some else []
    return found


def turned(rows: list[dict], share: float, seed: int = 0) -> list[dict]:
    """The thumbs with a share of them turned around, drawn at random: feedback with wrong labels in it."""
    wrong = set(random.Random(f"{seed} turned").sample(range(len(rows)), round(share * len(rows))))
    return [row | {"label": row["label"] is not (n in wrong)} for n, row in enumerate(rows)]


def check(rows: list[dict], tokenizer, batch_size: int, max_length: int) -> None:
    """Raise FeedbackError, naming the row, where TRL's trainer goes on or fails far from the cause: only one kind of
    thumb, an empty reply, a text longer than `max_length` tokens, a label that is no bool, a batch of one (also the
    last one).
    """
    if not rows:
        raise FeedbackError("there is no feedback: give at least one thumb up and one thumb down.")
    if batch_size < 2:
        raise FeedbackError(
            f"a batch of {batch_size} has no reply of another ticket, so no reference point: use at least 2 rows."
        )
    for n, row in enumerate(rows, 1):
        if not isinstance(row["label"], bool):
            raise FeedbackError(f"row {n}: the label is {row['label']!r}; True and False are wanted, nothing else.")
        if not row["completion"][0]["content"].strip():
            raise FeedbackError(f"row {n}: the reply is empty, so the thumb would be about falling silent. Drop it.")
        text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        if (length := len(tokenizer(text, add_special_tokens=False)["input_ids"])) > max_length:
            raise FeedbackError(
                f"row {n}: message and reply have {length} tokens, the limit is {max_length}. Drop the row or shorten "
                "it: a reply that is cut has no end to learn from."
            )
    ups = sum(row["label"] for row in rows)
    if ups in (0, len(rows)):
        kind = "up" if ups else "down"
        raise FeedbackError(f"all {len(rows)} thumbs are {kind}: nothing says what the other kind looks like.")
    if len(rows) % batch_size == 1:
        raise FeedbackError(
            f"{len(rows)} rows in batches of {batch_size} leave a last batch of one, which has no reference point: "
            "drop a row."
        )


def in_order(rows: list[dict], batch_size: int, seed: int) -> list[dict]:
    """The rows mixed once, for a trainer that never mixes them: within a batch no reply stands beside one to the same
    prompt. A last batch of one is left out.
    """
    rows = list(rows)
    rng = random.Random(seed)
    for _ in range(1000):
        rng.shuffle(rows)
        kept = rows[:-1] if len(rows) % batch_size == 1 else rows
        if all(a["prompt"] != b["prompt"] for batch in _batches(kept, batch_size) for a, b in mismatched(batch)):
            return kept
    raise FeedbackError(
        f"{len(rows)} rows about {len({str(row['prompt']) for row in rows})} tickets cannot be put in batches of "
        f"{batch_size} without a reply beside one to the same ticket: collect thumbs on more tickets."
    )


def mismatched(batch: list) -> list[tuple]:
    """(row whose prompt is kept, row whose reply it gets) as TRL pairs them in a batch: the replies move on by one."""
    return list(zip(batch, batch[-1:] + batch[:-1], strict=True))


def _batches(rows, size):
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def trainer(model, tokenizer, rows: list[dict], s, seed: int, **changes):
    """TRL's KTOTrainer for rows that `check` accepts, in the order of `in_order`. Its reference is the model as it
    comes: TRL keeps a frozen copy of its adapter.

    s: a recipe's settings. With fewer thumbs (`keep`) each is seen more often, so that the steps stay as many.
    """
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from transformers import PrinterCallback
    from trl import KTOConfig, KTOTrainer

    from course_lib import recipes

    rows = in_order(rows, s.batch_size, seed) if s.batch_size > 1 else rows
    check(rows, tokenizer, s.batch_size, model.config.max_position_embeddings)
    disable_progress_bar()
    profiles.set_seeds(seed)
    arguments = recipes.trl_arguments(s, seed) | {
        "num_train_epochs": s.epochs / getattr(s, "keep", 1.0),
        "beta": s.beta,
        "desirable_weight": getattr(s, "up_weight", 1.0),
        "undesirable_weight": getattr(s, "down_weight", 1.0),
        "max_length": None,
        "train_sampling_strategy": "sequential",
        "logging_steps": 2,
    }
    # TRL adds a reply's log-probabilities up in the logits' dtype, as for pairs: `preferences.trainer`.
    model.float_logits = model.get_output_embeddings().register_forward_hook(lambda module, given, out: out.float())
    config = KTOConfig(**arguments | changes)
    found = KTOTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    found.remove_callback(PrinterCallback)
    found.add_callback(recipes._progress())
    return found


# --- references ------------------------------------------------------------------------------------------------------

SWAPPED = (0.0, 0.2, 0.4)  # share of the pairs whose replies have changed places
LEARNERS = {"DPO": ("reply_dpo", {}), "KTO": ("reply_kto", {}), "SFT on the liked": ("reply_dpo", {"loss": "sft"})}
START = "the start"  # of all of them: the SFT model that wrote the replies


def swapped(pairs: list[dict], share: float, seed: int = 0) -> list[dict]:
    """The pairs, with the two replies of a share of them in each other's place: wrong labels, the same for whoever
    learns from the pairs and whoever learns from the thumbs that they are cut into."""
    wrong = set(random.Random(f"{seed} swapped").sample(range(len(pairs)), round(share * len(pairs))))
    turn = {"chosen": "rejected", "rejected": "chosen"}
    return [{part: pair[turn.get(part, part) if n in wrong else part] for part in pair} for n, pair in enumerate(pairs)]


def make_reference(seeds) -> None:
    """Measure what is missing of `reply_kto`: seeds, controls, and the sweeps of `course.toml`; and of all `LEARNERS`
    on the same pairs, some of them swapped."""
    from course_lib import preferences

    preferences.make_reference(seeds, ("reply_kto",))
    _learn_swapped(seeds)


def _learn_swapped(seeds) -> None:
    """Each learner on each share of swapped pairs, as `swapped_pairs_metrics.csv`; about a minute a piece. All start
    from the first seed's SFT model and its pairs: a seed says which pairs are swapped, and in what order they come.
    The column `passes` has a 1 for each ticket whose reply keeps the rubric, so that runs can be compared in pairs."""
    from course_lib import evaluation, models, preferences, reference

    pieces = [(START, 0.0, 0), *((name, share, seed) for seed in seeds for share in SWAPPED for name in LEARNERS)]
    records, tokenizer = replies.load("test", preferences.TICKETS), models.load_tokenizer()
    for number, (name, share, seed) in enumerate(pieces, 1):
        key = preferences.key("reply_sft" if name == START else LEARNERS[name][0], "cpu", 0)
        common = {"profile": "cpu", "seed": seed, "control": "", "learner": name, "share": share}
        stored = reference.is_stored("swapped_pairs", "metrics", common | {"key": key})
        what = f"{name}, {share:.0%} of the pairs swapped, seed {seed} ({number}/{len(pieces)})"
        print(f"{what}: {'stored' if stored else 'training ...'}", flush=True)
        if stored:
            continue
        model, steps = (preferences.load("reply_sft", "cpu"), 0) if name == START else _learnt(name, share, seed)
        found = replies.answers(model, tokenizer, records)
        passed = [replies.passes(r, text) for r, text in zip(records, found, strict=True)]
        e = evaluation.proportion(passed)
        row = common | {"metric": "rubric_pass", "value": f"{e.value:.4f}", "low": f"{e.low:.4f}"}
        row |= {"high": f"{e.high:.4f}", "n": e.n, "steps": steps, "passes": "".join("01"[ok] for ok in passed)}
        reference._replace("swapped_pairs", "metrics", common, [row | reference._about(key)])


def _learnt(name: str, share: float, seed: int):
    """(a learner's model after its pairs, some of them swapped; its steps)."""
    from course_lib import models, preferences

    recipe, changes = LEARNERS[name]
    s = preferences.settings(recipe, "cpu")
    s.__dict__.update(changes)
    rows = swapped(preferences.pair_rows(s), share, seed)
    model = preferences.continued(preferences.adapter(s.start, "cpu"), exact=True)
    learn = trainer if s.loss == "kto" else preferences.trainer
    made = learn(model, models.load_tokenizer(), unpaired(rows) if s.loss == "kto" else rows, s, seed)
    made.train()
    return preferences.for_use(model), made.state.global_step
