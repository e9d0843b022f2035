"""Two more runs of GRPO: sums from reasoning-gym, and replies rewarded by the rubric of lesson 06.

Lesson 09 runs them in profile `full`; `make reference LESSON=09` stores the rewards of their steps and what the model
does on held-out prompts before and after.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

from course_lib import evaluation, hardware, models, preferences, replies, routing

RUNS = {"puzzles": 40, "rubric": 20}  # steps
HELD_OUT = {"puzzles": 40, "rubric": 60}  # prompts


def one_number(text: str, wanted: str) -> float:
    """1 where an answer holds exactly one number, and that is the right one."""
    return float(re.findall(r"-?\d+", text[:200]) == [wanted])


def rubric_share(text: str, ticket_id: str) -> float:
    """The share of the rubric's criteria that a reply keeps."""
    return replies.score(replies.record(ticket_id), text) / len(replies.CRITERIA)


def sums(seed: int = 0) -> tuple[list[dict], list[dict]]:
    """(rows to train on, held-out rows): sums and differences of two numbers below ten, each question once."""
    import reasoning_gym

    data = reasoning_gym.create_dataset("chain_sum", size=2000, seed=seed, min_terms=2, max_terms=2, max_digits=1)
    answers = {item["question"]: item["answer"] for item in data}
    rows = [
        {"prompt": [{"role": "user", "content": f"{question} Give the number alone."}], "team": answer}
        for question, answer in answers.items()
    ]
    return rows[HELD_OUT["puzzles"] :], rows[: HELD_OUT["puzzles"]]


def prepare(run: str, steps: int, seed: int = 0):
    """(model, trainer) of a run: the recipe of lesson 09 with other prompts, another reward, longer answers. The sums
    start from the base, the replies from lesson 06's first adapter."""
    recipe = {k: v for k, v in vars(routing.settings("route_grpo", "cpu")).items() if k != "start"}
    if run == "puzzles":
        s = SimpleNamespace(**recipe | {"prompts": 8, "steps": steps, "new_tokens": 16})
        rows, _ = sums(seed)
        rows = (rows * (1 + s.prompts * steps // len(rows)))[: s.prompts * steps]
        return routing.prepare_with(s, seed, rows, routing.Reward(one_number))
    s = SimpleNamespace(**recipe | {"prompts": 4, "steps": steps, "new_tokens": 96})
    rows = [{"prompt": replies.messages(r), "team": r["id"]} for r in replies.load("train", 4 * steps, skip=700)]
    model = preferences.continued(preferences.adapter("reply_sft", "cpu", seed), exact=True)
    return model, routing.trainer(model, models.load_tokenizer(), rows, routing.Reward(rubric_share), s, seed)


def measure(run: str, model, seed: int = 0) -> dict[str, evaluation.Estimate]:
    """What a model does on held-out prompts. Sums: share of drawn answers that are right. Replies: share of the
    criteria that are kept, share of replies that keep all, share that stand at no earlier ticket, words."""
    if run == "puzzles":
        return {"right": _right(model, [], seed)}
    tokenizer = models.load_tokenizer()
    records = replies.load("test", HELD_OUT["rubric"])
    texts = replies.answers(model, tokenizer, records, seed)
    return {
        "rubric_share": evaluation.mean([rubric_share(t, r["id"]) for r, t in zip(records, texts, strict=True)]),
        "rubric_pass": evaluation.proportion([replies.passes(r, t) for r, t in zip(records, texts, strict=True)]),
        "distinct": evaluation.proportion([text not in texts[:i] for i, text in enumerate(texts)]),
        "words": evaluation.mean([len(t.split()) for t in texts]),
    }


def _right(model, solved: list[dict], seed: int) -> evaluation.Estimate:
    """Share of right ones among eight drawn answers to each held-out sum, asked after the `solved` ones."""
    _, held_out = sums(seed)
    before = [m for row in solved for m in (*row["prompt"], {"role": "assistant", "content": row["team"]})]
    prompts = [[*before, *row["prompt"]] for row in held_out]
    drawn = routing.sample(model, models.load_tokenizer(), prompts, 8, seed, new_tokens=16)
    hits = ([one_number(t, row["team"]) for t in texts] for texts, row in zip(drawn, held_out, strict=True))
    return evaluation.mean([sum(some) / 8 for some in hits])


def prompted(seed: int = 0) -> dict[str, evaluation.Estimate]:
    """What the base does with the held-out sums after three and after eight solved ones in the prompt; and how often
    the training's most frequent answer is right."""
    rows, held_out = sums(seed)
    answers = [row["team"] for row in rows]
    usual, base = max(sorted(set(answers)), key=answers.count), models.load()
    found = {f"{n} solved sums in the prompt": _right(base, rows[:n], seed) for n in (3, 8)}
    return found | {"the most frequent answer": evaluation.mean([float(row["team"] == usual) for row in held_out])}


def train(run: str, steps: int, seed: int = 0):
    """(model, rewards of its steps, what `measure` found before, and after)."""
    model, made = prepare(run, steps, seed)
    before = measure(run, model.eval(), seed)
    made.train()
    rewards = [entry["reward"] for entry in made.state.log_history if "reward" in entry]
    model = routing.for_use(model)
    return model, rewards, before, measure(run, model, seed)


def make_reference(seeds) -> None:
    """Measure what is missing of lesson 09's recipes, then of the two runs and of the prompts, for the first seed."""
    from course_lib import reference

    routing.make_reference(seeds)
    seed = seeds[0]
    key = routing.key("route_grpo", "cpu", seed)
    for run, steps in (RUNS | {"prompted": 0}).items():
        common = {"profile": "full", "seed": seed, "control": run}
        stored = reference.is_stored("grpo_runs", "metrics", common | {"key": key})
        print(f"{run}: {'stored' if stored else 'measuring ...'}", flush=True)
        if stored:
            continue
        about = reference._about(key)
        if steps:
            _, rewards, before, after = train(run, steps, seed)
            curve = [common | {"step": n, "reward": f"{x:.4f}"} | about for n, x in enumerate(rewards, 1)]
            reference._replace("grpo_runs", "curves", common, curve)
            found = {"before": before, "after": after}
        else:
            found = {moment: {"right": e} for moment, e in prompted(seed).items()}
        rows = [
            common | {"moment": moment, "metric": metric, "value": f"{e.value:.4f}"}
            | {"low": f"{e.low:.4f}", "high": f"{e.high:.4f}", "n": e.n} | about
            for moment, metrics in found.items() for metric, e in metrics.items()
        ]  # fmt: skip
        reference._replace("grpo_runs", "metrics", common, rows)
        hardware.give_back_memory()
