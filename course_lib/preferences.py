"""Recipes that begin where another ended: replies learnt from demonstrations, then from preferences.

Their settings stand in `notebooks/course.toml` beside the others. `start` is the recipe whose adapter is trained
further; `task` is `replies` (demonstrations, with a share of tickets among them) or `preferences` (pairs of replies,
sampled from the start and ranked by the rubric; with the loss `kto` thumbs on single replies, see `feedback`).
`adapter` and `load` answer as those of `recipes` do.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

from course_lib import CourseError, evaluation, hardware, models, profiles, recipes, replies, tickets

BANK = tickets.DATA / "source" / "replies.toml"


def settings(name: str, profile: str) -> SimpleNamespace:
    """The settings of a recipe in a profile, which it remembers: it starts from the adapter of the same profile."""
    found = recipes.settings(name, profile)
    if not hasattr(found, "start"):
        raise CourseError(f"recipe {name} starts from the base and not from another recipe: see recipes.adapter.")
    found.profile = profile
    return found


# --- what is learnt from ---------------------------------------------------------------------------------------------


def demonstration_rows(s: SimpleNamespace) -> list[dict]:
    """Replies of the desk's four writers, with a share of ticket records among them, so that the first task stays."""
    records = replies.load("train", s.train)
    beside = round(len(records) * s.tickets_share / (1 - s.tickets_share))
    return replies.examples(records) + recipes.examples(tickets.load("train", beside))


def pair_rows(s: SimpleNamespace, seed: int = 0, held_out: bool = False) -> list[dict]:
    """The pairs of a recipe as TRL wants them: prompt, chosen, rejected; with `held_out` those of the last sampled
    tickets, which are never trained on.

    With `shuffled_labels`, a control of `make reference`, a coin says which of the two is the better one.
    """
    found = samples(s, seed)
    found = found[-s.held_out :] if held_out else found[: -s.held_out]
    made = replies.pairs(found, s.kind, s.per_ticket, None if held_out else s.pairs)
    if not made:
        raise CourseError(
            "no ticket has both a reply that keeps the rubric and one that breaks it: there is nothing to prefer. "
            "Sample more replies to a ticket, or train the model that they are sampled from for longer."
        )
    coin = random.Random(f"{seed} coin")
    for pair in made:
        if getattr(s, "shuffled_labels", False) and coin.random() < 0.5:
            pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
    return [{part: pair[part] for part in ("prompt", "chosen", "rejected")} for pair in made]


def sample_records(s: SimpleNamespace) -> list[dict]:
    """The train tickets that are sampled from, past those whose demonstrations the start has seen."""
    return replies.load("train", s.sample_tickets, skip=s.sample_skip)


def samples(s: SimpleNamespace, seed: int = 0) -> list[dict]:
    """Replies sampled from a recipe's start: from the cache, or drawn now.

    Where the recipe says `stored`, those of `data/replies`; as long as there are none, replies of the desk's four
    writers take their place.
    """
    if getattr(s, "stored", False):
        if replies.SAMPLES.exists():
            return replies.read_samples()[0][: s.sample_tickets]
        return replies.drawn(sample_records(s), s.sample_replies, seed)
    path = samples_path(s, seed)
    if not path.exists():
        print(f"Replies of {s.start} are not in the cache for profile {s.profile}, seed {seed}: they are sampled now.")
        model, tokenizer = load(s.start, s.profile, seed), models.load_tokenizer()
        keep_samples(replies.sample(model, tokenizer, sample_records(s), s.sample_replies, seed), s, seed)
    return replies.read_samples(path)[0]


def samples_path(s: SimpleNamespace, seed: int = 0) -> Path:
    """Where the cache keeps the replies that were sampled from the start of a recipe."""
    size = f"{s.sample_skip}-{s.sample_tickets}x{s.sample_replies}"
    name = f"{s.start}-{s.profile}-{seed}-{size}-{key(s.start, s.profile, seed)}.jsonl"
    return models.cache_dir() / "samples" / name


def keep_samples(found: list[dict], s: SimpleNamespace, seed: int = 0, path: Path | None = None) -> Path:
    """Store sampled replies with their provenance: in the cache, for the lessons that come later, or at `path`."""
    path = path or samples_path(s, seed)
    about = {"recipe": s.start, "profile": s.profile, "seed": seed, "temperature": replies.TEMPERATURE}
    about |= {"dtype": str(hardware.dtype())}
    replies.write_samples(found, path, about | {"key": key(s.start, s.profile, seed), "versions": hardware.versions()})
    return path


# --- training --------------------------------------------------------------------------------------------------------


def continued(folder: Path, exact: bool = False):
    """The base with a trained adapter whose training goes on; `exact` keeps the adapter in float32: the steps of a
    preference loss are small beside its numbers, and half of them would be lost in bfloat16. On a GPU it always is,
    as in `recipes.add_lora`: a trainer in float16 refuses gradients in float16."""
    model = models.load(adapter=folder)
    model.set_adapter("default")  # loaded adapters are frozen
    for name, parameter in model.named_parameters():
        if (exact or hardware.device() != "cpu") and "lora_" in name:
            parameter.data = parameter.data.float()
    # Saved adapters name the base and not its place; PEFT looks there for its configuration when they are saved again.
    model.peft_config["default"].base_model_name_or_path = str(models.base_path())
    return model


def trainer(model, tokenizer, rows: list[dict], s: SimpleNamespace, seed: int, **changes):
    """TRL's trainer for a recipe's loss, for `rows` of prompt, chosen and rejected.

    loss: one of `DPOConfig.loss_type`, or several joined by "+" (`sigmoid+sft`); `simpo` and `orpo` have trainers of
    their own, which TRL calls experimental. `model` may have an adapter that is trained further: TRL then keeps a
    frozen copy of it, named "ref", as the reference. Its log-probabilities are computed once, before training.
    """
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from transformers import PrinterCallback

    disable_progress_bar()
    profiles.set_seeds(seed)
    # TRL adds a reply's log-probabilities up in the logits' dtype. In bfloat16 a sum of -60 has a step of a quarter.
    model.float_logits = model.get_output_embeddings().register_forward_hook(lambda module, given, out: out.float())
    arguments = recipes.trl_arguments(s, seed) | {
        "beta": s.beta,
        "max_length": 512,  # a prompt and a reply have about 120 tokens
        "logging_steps": 1,
    }
    if s.loss == "simpo":
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer

        arguments |= {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": s.simpo_gamma}
    elif s.loss == "orpo":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer
    else:
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Trainer

        arguments |= {"loss_type": s.loss.split("+"), "precompute_ref_log_probs": True}
    with _no_bars():
        data = Dataset.from_list(rows)
        made = Trainer(model=model, args=Config(**arguments | changes), train_dataset=data, processing_class=tokenizer)
    made.remove_callback(PrinterCallback)
    made.add_callback(recipes._progress())
    return made


class _no_bars:
    """While inside, TRL's bar over the reference's log-probabilities stays away."""

    def __enter__(self):
        self.before = os.environ.get("TQDM_DISABLE")
        os.environ["TQDM_DISABLE"] = "1"

    def __exit__(self, *_):
        if self.before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = self.before


def prepare(name: str, profile: str, seed: int = 0, rows: list[dict] | None = None, **changes):
    """(model, trainer) of a recipe, ready for `trainer.train()`; with `rows` in place of the recipe's own."""
    return prepare_with(settings(name, profile), seed, rows, **changes)


def prepare_with(s: SimpleNamespace, seed: int = 0, rows: list[dict] | None = None, **changes):
    """`prepare` for settings that stand in no recipe: a copy with a change, as sweeps need it."""
    tokenizer = models.load_tokenizer()
    if getattr(s, "loss", None) == "kto":
        from course_lib import feedback

        rows = rows or feedback.rows(s, seed)
        model = continued(adapter(s.start, s.profile, seed), exact=True)
        return model, feedback.trainer(model, tokenizer, rows, s, seed, **changes)
    if s.task == "preferences":
        rows = rows or pair_rows(s, seed)  # first: it may need a model of its own
        model = continued(adapter(s.start, s.profile, seed), exact=True)
        return model, trainer(model, tokenizer, rows, s, seed, **changes)
    model = continued(adapter(s.start, s.profile, seed))
    return model, recipes.sft_trainer(model, tokenizer, rows or demonstration_rows(s), s, seed, **changes)


def for_use(model):
    """A trained model as it is used, in eval mode and without what `trainer` and TRL hung on it."""
    if handle := getattr(model, "float_logits", None):
        handle.remove()
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
    return recipes.for_use(model)


def history(made, *names: str) -> dict[str, list[float]]:
    """{name: values by step} of what the trainer logged, such as `logps/chosen` or `rewards/margins`."""
    log = [entry for entry in made.state.log_history if "loss" in entry]
    return {name: [float(entry[name]) for entry in log if name in entry] for name in ("step", *names)}


# --- the cache -------------------------------------------------------------------------------------------------------


def _first(name: str) -> bool:
    """Whether a recipe starts from the base: then it is one of `recipes`."""
    return "start" not in profiles.index()["recipes"].get(name, {})


def key(name: str, profile: str, seed: int) -> str:
    """What the adapter depends on, as a short hash: what `recipes.key` counts, its start, how replies are
    written and judged, and samples."""
    parts = [recipes.key(name, profile, seed)]
    if not _first(name):
        s = settings(name, profile)
        parts += [key(s.start, profile, seed), models.sha256(BANK), models.sha256(Path(replies.__file__))]
        if getattr(s, "stored", False) and replies.SAMPLES.exists():
            parts.append(models.sha256(replies.SAMPLES))
    return parts[0] if len(parts) == 1 else hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def cached(name: str, profile: str, seed: int = 0) -> Path:
    """Where the cache keeps (or would keep) this adapter."""
    return models.cache_dir() / "adapters" / f"{name}-{profile}-{seed}-{key(name, profile, seed)}"


def keep(model, name: str, profile: str, seed: int, about: dict | None = None) -> Path:
    """Save a freshly trained adapter into the cache, for the lessons that come later."""
    return recipes.save(model, cached(name, profile, seed), about)


def adapter(name: str, profile: str = "auto", seed: int = 0) -> Path:
    """The folder of what a recipe trained: from the cache, or trained now, with all that it starts from."""
    profile = profiles.choose(profile)
    if _first(name):
        return recipes.adapter(name, profile, seed)
    folder = cached(name, profile, seed)
    if not (folder / "adapter_model.safetensors").exists():
        model, made = prepare(name, profile, seed)
        print(f"Recipe {name} is not in the cache for profile {profile}, seed {seed}: it is trained now.")
        made.train()
        keep(for_use(model), name, profile, seed, {"losses": recipes.losses(made)})
    return folder


def load(name: str, profile: str = "auto", seed: int = 0):
    """The model that a recipe trained, ready to be asked."""
    return models.load(adapter=adapter(name, profile, seed))


# --- measuring -------------------------------------------------------------------------------------------------------


def completion_logps(model, tokenizer, rows: list[dict], column: str):
    """Log-probability (nats) of each row's `chosen` (or another column) given its prompt, end token included."""
    import numpy as np

    texts = [row[column][0]["content"] for row in rows]
    nll = evaluation.completion_nll(model, tokenizer, [(r["prompt"], t) for r, t in zip(rows, texts, strict=True)])
    lengths = [len(tokenizer(t, add_special_tokens=False)["input_ids"]) + 1 for t in texts]
    return -nll * np.array(lengths)


def wins(records: list[dict], ours: list[str], theirs: list[str]) -> list[float]:
    """For each ticket 1 where our reply keeps more criteria than theirs, 0 where it keeps fewer, 0.5 at a tie."""
    scores = ((replies.score(r, a), replies.score(r, b)) for r, a, b in zip(records, ours, theirs, strict=True))
    return [0.5 + (a > b) / 2 - (a < b) / 2 for a, b in scores]


def measure(model, records: list[dict], seed: int = 0) -> dict[str, evaluation.Estimate]:
    """What is kept of a model that writes replies: pass rate, words, share of distinct replies, loss on right records
    of the ticket task."""
    from course_lib import reference

    tokenizer = models.load_tokenizer()
    found = replies.answers(model, tokenizer, records, seed)
    return {
        "rubric_pass": evaluation.proportion([replies.passes(r, t) for r, t in zip(records, found, strict=True)]),
        "words": evaluation.mean([len(t.split()) for t in found]),
        "distinct": evaluation.Estimate(len(set(found)) / len(found), float("nan"), float("nan"), len(found)),
        "ticket_nll": evaluation.mean(reference.record_nll(model, tokenizer, tickets.load("test", 40))),
    }


# --- references ------------------------------------------------------------------------------------------------------

CONTROLS = {"": {}, "learning_rate_0": {"learning_rate": 0.0}, "shuffled_labels": {"shuffled_labels": True}}
TICKETS = 120  # of test, that each piece answers


def make_reference(seeds, names=("reply_sft", "reply_dpo")) -> None:
    """Measure what is missing of these recipes in profile `cpu`, one training a piece: seeds, controls, sweeps; the
    replies sampled for the first seed become `data/replies/sampled.jsonl`."""
    from course_lib import reference

    for name in names:
        table = profiles.index()["recipes"][name]
        pieces = [(seed, "", "", None) for seed in seeds]
        if table["task"] == "preferences":
            if 0 in seeds:
                store_samples(settings(name, "cpu"))
            pieces += [(seeds[0], control, "", None) for control in CONTROLS if control]
            pieces += [(seeds[0], "", knob, x) for knob, values in table.get("sweeps", {}).items() for x in values]
        for number, (seed, control, knob, setting) in enumerate(pieces, 1):
            common = {"profile": "cpu", "seed": seed, "control": control, "knob": knob, "piece": setting}
            same = {c: str("" if v is None else v) for c, v in (common | {"key": key(name, "cpu", seed)}).items()}
            stored = any(all(r[c] == v for c, v in same.items()) for r in reference.read(name, "sweeps"))
            what = " ".join(
                str(part) for part in (name, "seed", seed, control, knob, setting) if part not in ("", None)
            )
            print(f"{what} ({number}/{len(pieces)}): {'stored' if stored else 'training ...'}", flush=True)
            if not stored:
                _piece(name, seed, control, knob, setting)


def store_samples(s: SimpleNamespace) -> None:
    """The replies of the first seed's start as the sample that profile `ci` reads."""
    samples(s)
    text = samples_path(s).read_text(encoding="utf-8")
    replies.SAMPLES.parent.mkdir(parents=True, exist_ok=True)
    replies.SAMPLES.write_text(text, encoding="utf-8")


def _piece(name: str, seed: int, control: str, knob: str, setting) -> None:
    from course_lib import reference

    s = SimpleNamespace(**vars(settings(name, "cpu")) | CONTROLS[control] | ({knob: setting} if knob else {}))
    if not (control or knob):
        model = load(name, "cpu", seed)
        curve = json.loads((cached(name, "cpu", seed) / "training.json").read_text())["losses"]
    else:
        model, made = prepare_with(s, seed)
        made.train()
        model, curve = for_use(model), recipes.losses(made)
    about = reference._about(key(name, "cpu", seed))
    common = {"profile": "cpu", "seed": seed, "control": control}
    if not knob:
        rows = [common | {"step": step, "loss": f"{loss:.4f}"} | about for step, loss in curve]
        reference._replace(name, "curves", common, rows)
    common |= {"knob": knob, "piece": "" if setting is None else setting}
    rows = []
    for metric, e in measure(model, replies.load("test", TICKETS)).items():
        ends = ["" if x != x else f"{x:.4f}" for x in (e.low, e.high)]
        rows.append(common | {"setting": common["piece"], "metric": metric, "value": f"{e.value:.4f}"})
        rows[-1] |= {"low": ends[0], "high": ends[1], "n": e.n} | about
    reference._replace(name, "sweeps", common, rows)
