"""One assistant, two tasks, four stages: it routes a ticket in one word and drafts the reply to it.

The stages train one adapter further: `desk_sft` (demonstrations of both tasks), `desk_rl` (GRPO on the routing, whose
verifier knows the right team), `desk_rejection` (SFT on the model's own answers, as far as verifier and rubric keep
them) and `desk_dpo` (preference on the replies). Their settings stand in `notebooks/course.toml`; `adapter` and `load`
answer as those of `recipes` do.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from types import SimpleNamespace

from course_lib import CourseError, evaluation, models, preferences, profiles, recipes, replies, routing

STAGES = ("desk_sft", "desk_rl", "desk_rejection", "desk_dpo")
TITLES = ("cold-start SFT", "RL on the routing", "rejection-sampled SFT", "preference on the replies")


def settings(name: str, profile: str) -> SimpleNamespace:
    """The settings of a stage in a profile, which it remembers, and the stage that it starts from."""
    if name not in STAGES:
        raise CourseError(f"no stage {name!r}: the stages are {', '.join(STAGES)}.")
    found, number = recipes.settings(name, profile), STAGES.index(name)
    found.profile, found.start = profile, STAGES[number - 1] if number else None
    return found


# --- what is learnt from ---------------------------------------------------------------------------------------------


def mixed(routed: list[dict], drafted: list[dict]) -> list[dict]:
    """Rows of both tasks, spread through each other, so that no batch order favours the later one."""
    places = [(i / max(1, len(rows)), k, row) for k, rows in enumerate((routed, drafted)) for i, row in enumerate(rows)]
    return [row for _, _, row in sorted(places, key=lambda place: place[:2])]


def demonstrations(s: SimpleNamespace) -> list[dict]:
    """Stage 1: tickets with their team, and replies as the desk's writers wrote them; most break the rubric."""
    routed = routing.examples(routing.load("train", s.routed, longest=s.longest))
    return mixed(routed, replies.examples(replies.load("train", s.replies)))


def verified(drawn: dict) -> list[dict]:
    """Stage 3: of the drawn answers, for each ticket the first that verifier or rubric keeps; tickets without one are
    left out."""
    routed = [
        {
            "prompt": routing.messages(replies.record(entry["ticket_id"])),
            "completion": replies._assistant(entry["team"]),
        }
        for entry in drawn["teams"]
        if entry["team"] in entry["answers"]
    ]
    drafted = []
    for entry in drawn["replies"]:
        record = replies.record(entry["ticket_id"])
        if kept := [text for text in entry["replies"] if replies.passes(record, text)]:
            drafted.append({"prompt": replies.messages(record), "completion": replies._assistant(kept[0])})
    return mixed(routed, drafted)


def pairs(drawn: dict, s: SimpleNamespace) -> list[dict]:
    """Stage 4: a reply that keeps the rubric and one that breaks it, to the same ticket, from the same draw."""
    made = replies.pairs(drawn["replies"], per_ticket=s.per_ticket, limit=s.pairs)
    if not made:
        raise CourseError("no ticket has both a reply that keeps the rubric and one that breaks it: draw more replies.")
    return [{part: pair[part] for part in ("prompt", "chosen", "rejected")} for pair in made]


def draw(profile: str, seed: int = 0) -> dict:
    """What the model after stage 2 answers by lot, from the cache or drawn now: `teams`, entries of ticket_id, team
    (the right one) and answers, and `replies`, samples as `replies.sample` makes them.

    Where the recipe says `stored`, the replies are those of `data/replies/sampled.jsonl`, which a model of lesson 06
    wrote: a stage 2 of three steps writes none that keeps the rubric.
    """
    s = settings("desk_rejection", profile)
    path = models.cache_dir() / "samples" / f"desk-{profile}-{seed}-{key('desk_rejection', profile, seed)}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    from course_lib.results import write_json

    model, tokenizer = load(s.start, profile, seed), models.load_tokenizer()
    records = routing.load("train", s.routed, skip=s.skip_routed, longest=s.longest)
    answers = routing.sample(model, tokenizer, [routing.messages(r) for r in records], s.answers, seed)
    teams = [
        {"ticket_id": r["id"], "team": routing.team(r), "answers": a} for r, a in zip(records, answers, strict=True)
    ]
    if getattr(s, "stored", False):
        drafted = replies.read_samples()[0][: s.replies]
    else:
        drafted = replies.sample(model, tokenizer, replies.load("train", s.replies, skip=s.skip), s.drafts, seed)
    found = {"teams": teams, "replies": drafted}
    write_json(path, found)
    return found


# --- training --------------------------------------------------------------------------------------------------------


def prepare(name: str, profile: str, seed: int = 0):
    """(model, trainer) of a stage, ready for `trainer.train()`."""
    s, tokenizer = settings(name, profile), models.load_tokenizer()
    if name == "desk_sft":
        profiles.set_seeds(seed)
        model = recipes.add_lora(models.load(), s)
        return model, recipes.sft_trainer(model, tokenizer, demonstrations(s), s, seed, logging_steps=1)
    if name == "desk_rl":
        model = preferences.continued(adapter(s.start, profile, seed), exact=True)
        records = routing.load("train", s.steps * s.prompts, skip=s.skip, longest=s.longest)
        reward = routing.Reward(routing.right_team)
        return model, routing.trainer(model, tokenizer, routing.prompts(records), reward, s, seed)
    drawn = draw(profile, seed)  # first: it needs a model of its own
    if name == "desk_rejection":
        model = preferences.continued(adapter(s.start, profile, seed))
        return model, recipes.sft_trainer(model, tokenizer, verified(drawn), s, seed, logging_steps=1)
    model = preferences.continued(adapter(s.start, profile, seed), exact=True)
    return model, preferences.trainer(model, tokenizer, pairs(drawn, s), s, seed)


# What of the routing task a stage depends on; the rest of that module may change without another training.
_ROUTING = {
    "desk_sft": (routing.team, routing.load, routing.messages),
    "desk_rl": (routing.read, routing.right_team, routing.Reward, routing.rollout, routing.trainer),
    "desk_rejection": (routing.sample,),
    "desk_dpo": (),
}


def key(name: str, profile: str, seed: int) -> str:
    """What an adapter depends on, as a short hash: what `recipes.key` counts, the stage before it, and how both tasks
    are written and judged."""
    s = settings(name, profile)
    parts = [recipes.key(name, profile, seed), models.sha256(preferences.BANK), models.sha256(Path(replies.__file__))]
    parts += [routing.TEAMS, routing.SYSTEM, *(inspect.getsource(part) for part in _ROUTING[name])]
    parts += [key(s.start, profile, seed)] if s.start else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def cached(name: str, profile: str, seed: int = 0) -> Path:
    """Where the cache keeps (or would keep) the adapter after a stage."""
    return models.cache_dir() / "adapters" / f"{name}-{profile}-{seed}-{key(name, profile, seed)}"


def adapter(name: str, profile: str = "auto", seed: int = 0) -> Path:
    """The folder of the adapter after a stage: from the cache, or trained now, with all stages before it.

    Its `training.json` holds what the trainer logged (`log`, `losses`) and `seconds`.
    """
    import time

    profile = profiles.choose(profile)
    folder = cached(name, profile, seed)
    if not (folder / "adapter_model.safetensors").exists():
        model, made = prepare(name, profile, seed)
        print(f"Stage {name} is not in the cache for profile {profile}, seed {seed}: it is trained now.")
        began = time.perf_counter()
        made.train()
        about = {"seconds": round(time.perf_counter() - began, 1), "log": _log(made), "losses": recipes.losses(made)}
        recipes.save(preferences.for_use(model), folder, about)  # without what the trainers of stages 2 and 4 hung on
    return folder


def _log(made) -> list[dict]:
    """The numbers of each logged step."""
    return [
        {k: float(v) for k, v in entry.items() if isinstance(v, int | float)}
        for entry in made.state.log_history
        if "loss" in entry
    ]


def load(name: str, profile: str = "auto", seed: int = 0):
    """The model after a stage, ready to be asked."""
    return models.load(adapter=adapter(name, profile, seed))


# --- measuring -------------------------------------------------------------------------------------------------------


def teams(model, tokenizer, records: list[dict]) -> list[str | None]:
    """The team that the model's likeliest answer names, for each ticket; None where it names none."""
    prompts = [routing.messages(r) for r in records]
    found = evaluation.generate(model, tokenizer, prompts, max_new_tokens=4, label="routing")
    return [routing.read(a.text) if a.finished else None for a in found]


def macro_f1(records: list[dict], named: list[str | None], seed: int = 0, repeats: int = 1000) -> evaluation.Estimate:
    """Macro-F1 over the teams, with the percentile bootstrap's 95 % interval over tickets."""
    import numpy as np

    gold = np.array([routing.NAMES.index(routing.team(r)) for r in records])
    ours = np.array([routing.NAMES.index(t) if t in routing.NAMES else len(routing.NAMES) for t in named])
    picks = np.random.default_rng(seed).integers(0, len(gold), (repeats, len(gold)))
    low, high = np.quantile([_f1(gold[p], ours[p]) for p in picks], [0.025, 0.975])
    return evaluation.Estimate(_f1(gold, ours), float(low), float(high), len(gold))


def _f1(gold, ours) -> float:
    """Mean of the teams' F1, as scikit-learn has it with zero_division=0; by hand, for a thousand draws."""
    import numpy as np

    size = len(routing.NAMES) + 1
    table = np.bincount(gold * size + ours, minlength=size * size).reshape(size, size)
    both, total = np.diag(table), table.sum(0) + table.sum(1)
    return float(np.mean(2 * both[:-1] / np.maximum(total[:-1], 1)))


# --- references ------------------------------------------------------------------------------------------------------

MESSAGES, TICKETS = 100, 120  # of test, that each stage routes and answers


def make_reference(seeds) -> None:
    """Measure every stage of profile `cpu` on both tasks, one stage and seed a piece, as far as it is not stored yet,
    as `data/reference/desk_stages.csv`."""
    from course_lib import reference

    pieces = [(seed, name) for seed in seeds for name in STAGES]
    for number, (seed, name) in enumerate(pieces, 1):
        common = {"profile": "cpu", "seed": seed, "control": "", "stage": name}
        wanted = {column: str(value) for column, value in (common | {"key": key(name, "cpu", seed)}).items()}
        stored = any(all(r[c] == v for c, v in wanted.items()) for r in reference.read("desk", "stages"))
        print(f"{name}, seed {seed} ({number}/{len(pieces)}): {'stored' if stored else 'training ...'}", flush=True)
        if not stored:
            about = reference._about(wanted["key"])
            rows = [
                common | {"metric": metric, "value": f"{e.value:.4f}", "low": f"{e.low:.4f}", "high": f"{e.high:.4f}"}
                | {"n": e.n} | about
                for metric, e in measure(load(name, "cpu", seed), seed).items()
            ]  # fmt: skip
            reference._replace("desk", "stages", common, rows)


def measure(model, seed: int = 0) -> dict[str, evaluation.Estimate]:
    """Macro-F1 of the routing and the share of replies that keep the rubric, on held-out tickets."""
    tokenizer = models.load_tokenizer()
    routed, answered = routing.load("test", MESSAGES), replies.load("test", TICKETS)
    written = replies.answers(model, tokenizer, answered, seed)
    passed = [replies.passes(r, text) for r, text in zip(answered, written, strict=True)]
    found = {"routing_macro_f1": macro_f1(routed, teams(model, tokenizer, routed), seed)}
    return found | {"reply_rubric_pass": evaluation.proportion(passed)}
