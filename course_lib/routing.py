"""Routing: one word that says which team takes a ticket, learnt from a few demonstrations and then from a verifier.

The settings of the recipes stand in `notebooks/course.toml` beside the others: `task` is `route_sft` (the cold start:
demonstrations) or `route_grpo` (TRL's GRPO on the verifier's verdicts); `start` is the recipe whose adapter is trained
further, none the base with a fresh one. `adapter` and `load` answer as those of `recipes` do.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import signal
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

from course_lib import CourseError, evaluation, hardware, models, profiles, recipes, tickets

# Which intents a team takes. Each name is one token of the course's model, without a space before it.
TEAMS = {
    "shop": ("buy", "question"),
    "orders": ("cancel", "change"),
    "delivery": ("track", "missing"),
    "returns": ("return", "exchange", "damaged"),
    "accounts": ("invoice",),
}
NAMES: tuple[str, ...] = tuple(TEAMS)
SYSTEM = "Which team?"
MAX_ANSWER_CHARS = 200  # an answer is one word; beyond this it is babble and is not looked at


# --- tickets and prompts ---------------------------------------------------------------------------------------------


def team(record: dict) -> str:
    """The team that takes a ticket, by its intent."""
    return next(name for name, intents in TEAMS.items() if record["ticket"]["intent"] in intents)


def load(split: str, n: int, skip: int = 0, longest: int | None = None) -> list[dict]:
    """`n` tickets of a split, past the first `skip`, as many of each team as of the others: one team after another.

    Within a team its intents take turns. longest: characters; longer messages are left out, since the time of a step
    grows with the prompt.
    """
    queues = {name: {intent: [] for intent in intents} for name, intents in TEAMS.items()}
    for record in tickets.load(split):
        if longest is None or len(record["text"]) <= longest:
            queues[team(record)][record["ticket"]["intent"]].append(record)
    turns = {
        name: [record for row in zip(*by_intent.values(), strict=False) for record in row]
        for name, by_intent in queues.items()
    }
    found = [record for row in zip(*turns.values(), strict=False) for record in row]
    if len(found) < skip + n:
        raise CourseError(
            f"split {split} has {len(found)} tickets that are balanced over the teams and have at most {longest} "
            f"characters; {skip + n} were asked for. Ask for fewer, or for longer ones."
        )
    return found[skip : skip + n]


def messages(record: dict, system: str = SYSTEM) -> list[dict]:
    """The prompt: two words and the message. The names of the teams are not in it."""
    return [{"role": "system", "content": system}, {"role": "user", "content": record["text"]}]


def examples(records: list[dict]) -> list[dict]:
    """Tickets with their team as prompt and completion, as `recipes.examples` makes them of the ticket task."""
    return [
        {"prompt": messages(record), "completion": [{"role": "assistant", "content": team(record)}]}
        for record in records
    ]


def prompts(records: list[dict]) -> list[dict]:
    """Rows for GRPO: the prompt, and the team, which the verifier gets and the model does not."""
    return [{"prompt": messages(record), "team": team(record)} for record in records]


# --- the verifier ----------------------------------------------------------------------------------------------------


def read(text: str) -> str | None:
    """The team that an answer names, or None: exactly its name, with white space around it at most.

    Nothing is searched for, repaired or executed, so an answer cannot name two teams or hide one in a sentence.
    """
    return word if len(text) <= MAX_ANSWER_CHARS and (word := text.strip(" \t\n")) in TEAMS else None


def right_team(text: str, gold: str) -> float:
    """The verifier of the routing task: 1 for the right team's name and nothing else, else 0."""
    return float(read(text) == gold)


def right_record(text: str, gold: dict) -> float:
    """A verifier for the ticket task: 1 for exactly one valid record under the schema that equals the gold one."""
    return float(tickets.exact(gold, tickets.parse(text).ticket))


class _TimeUp(BaseException):
    """Not an Exception, so that a verifier's own `except Exception` does not swallow it."""


@contextlib.contextmanager
def _time_limit(seconds: float):
    """Raise _TimeUp in this thread after `seconds`. Needs the main thread, where TRL calls rewards, and POSIX."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        raise CourseError(
            "a verifier's time limit needs the main thread of Linux or macOS: on Windows use WSL, or run this in Colab."
        )

    def stop(number, frame):
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Reward:
    """A verifier as TRL's trainer calls it: with a time limit, and with a report of what went wrong.

    verify: function (text, gold) of a number from 0 to 1. It must not execute what a model wrote. An answer on which it
    raises, takes longer than `seconds`, or returns anything else counts 0, and is kept in `errors` as
    {"kind", "detail", "text"}. column: where a row holds its gold answer.
    """

    def __init__(self, verify, seconds: float = 1.0, column: str = "team"):
        self.verify, self.seconds, self.column, self.errors = verify, seconds, column, []
        self.__name__ = getattr(verify, "__name__", "reward")

    def score(self, text: str, gold) -> float:
        """The reward of one answer, 0 to 1. Never raises because of the answer."""
        try:
            with _time_limit(self.seconds):
                value = self.verify(text, gold)
            if isinstance(value, bool | int | float) and math.isfinite(value) and 0 <= value <= 1:
                return float(value)
            kind, detail = "value", f"{value!r} is no number from 0 to 1"
        except _TimeUp:
            kind, detail = "time", f"over {self.seconds} s"
        except CourseError:
            raise
        except Exception as error:
            kind, detail = type(error).__name__, str(error)
        self.errors.append({"kind": kind, "detail": detail[:200], "text": text[:80]})
        return 0.0

    def __call__(self, completions, log_metric=None, **columns) -> list[float]:
        """What TRL wants: one reward for each completion (chat messages, or plain text)."""
        before = len(self.errors)
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        found = [self.score(text, gold) for text, gold in zip(texts, columns[self.column], strict=True)]
        if log_metric is not None:
            log_metric("verifier_errors", float(len(self.errors) - before))
        return found


# --- asking a model --------------------------------------------------------------------------------------------------


def _by_length(tokenizer, some: list[list[dict]], batch_size: int):
    """Batches of (places, token ids) of prompts, the longest first, so that little is padded."""
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in some]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        yield places, [ids[i] for i in places]


def _read_prompts(model, tokenizer, rows: list[list[int]]):
    """(cache, mask, logits after the last token) of prompts, padded on the left."""
    import torch
    from transformers import DynamicCache

    width = max(map(len, rows))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    cache = DynamicCache()
    return cache, mask, _logits(model, ids, mask, cache)


def _logits(model, ids, mask, cache):
    """Logits (float32) after the last of the new tokens `ids`; `mask` is that of all tokens so far."""
    places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    out = model.model(ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True)
    return model.lm_head(out.last_hidden_state[:, -1]).float()


@contextlib.contextmanager
def _asked(model):
    """While inside: eval mode, no gradients, the adapter merged; gives the model beneath the adapter."""
    import torch

    was_training = model.training
    model.eval()
    with torch.inference_mode(), evaluation.merged(model):
        yield model.get_base_model() if hasattr(model, "get_base_model") else model
    model.train(was_training)


def team_probabilities(model, tokenizer, some: list[list[dict]], batch_size: int = 25):
    """Probability of each team's name and then the end token, for each prompt: array (prompts, teams), NAMES' order.

    It is what sampling at temperature 1 gives exactly that answer with; the column of the right team is the expected
    reward. A row's rest, up to 1, goes to everything else that a model may write.
    """
    import numpy as np
    import torch

    words = [tokenizer(name, add_special_tokens=False)["input_ids"] for name in NAMES]
    found = np.zeros((len(some), len(NAMES)))
    with _asked(model) as base:
        for places, rows in _by_length(tokenizer, some, batch_size):
            cache, mask, first = _read_prompts(base, tokenizer, rows)
            n, wide = len(mask), max(map(len, words))
            cache.batch_repeat_interleave(len(NAMES))
            mask = mask.repeat_interleave(len(NAMES), 0)
            logp = first.log_softmax(-1).repeat_interleave(len(NAMES), 0)
            total = torch.zeros(len(mask), device=mask.device)
            tails = [word + [tokenizer.eos_token_id] for word in words]
            for place in range(wide + 1):
                ids = torch.tensor([t[min(place, len(t) - 1)] for t in tails] * n, device=mask.device)[:, None]
                counts = torch.tensor([place < len(t) for t in tails] * n, device=mask.device)
                total += logp.gather(1, ids)[:, 0] * counts
                if place < wide:
                    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                    logp = _logits(base, ids, mask, cache).log_softmax(-1)
            found[places] = total.view(n, len(NAMES)).exp().cpu().numpy()
    hardware.give_back_memory()
    return found


def expected_reward(model, tokenizer, records: list[dict]):
    """The probability of the right answer to each ticket, as an array: the mean reward of endless samples."""
    import numpy as np

    found = team_probabilities(model, tokenizer, [messages(r) for r in records])
    return found[np.arange(len(records)), [NAMES.index(team(r)) for r in records]]


def sample(
    model, tokenizer, some: list[list[dict]], n: int, seed: int = 0, temperature: float = 1.0, new_tokens: int = 4,
    batch_size: int = 25,
) -> list[list[str]]:  # fmt: skip
    """`n` answers to each prompt, drawn at `temperature`; each prompt is read once. Cut after `new_tokens`.

    An answer that was cut before its end token ends in "...", so that no verifier takes it for a whole one.
    """
    import torch

    found: list = [None] * len(some)
    draw = torch.Generator().manual_seed(seed)
    with _asked(model) as base:
        for places, rows in _by_length(tokenizer, some, batch_size):
            drawn = _drawn(base, tokenizer, rows, n, draw, temperature, new_tokens)
            for i, place in enumerate(places):
                found[place] = [_text(tokenizer, ids) for ids in drawn[i * n : i * n + n]]
    hardware.give_back_memory()
    return found


def _drawn(base, tokenizer, rows: list[list[int]], n: int, draw, temperature: float, new_tokens: int):
    """`new_tokens` ids of `n` answers to each prompt, one prompt after another; what follows an end token is noise."""
    import torch

    cache, mask, logits = _read_prompts(base, tokenizer, rows)
    cache.batch_repeat_interleave(n)
    mask, logits, new = mask.repeat_interleave(n, 0), logits.repeat_interleave(n, 0), []
    for place in range(new_tokens):
        sums = (logits / temperature).softmax(-1).cumsum(-1)
        at = torch.rand(len(sums), 1, generator=draw).to(sums.device) * sums[:, -1:]
        new.append(torch.searchsorted(sums, at, right=True).clamp(max=sums.shape[1] - 1))
        if place + 1 < new_tokens:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            logits = _logits(base, new[-1], mask, cache)
            if all(tokenizer.eos_token_id in row for row in torch.cat(new, 1).tolist()):
                break
    return torch.cat(new, 1).tolist()


def rollout(given: list[list[dict]], trainer) -> dict:
    """Answers for TRL's GRPOTrainer (its `rollout_func`), drawn as its own way of generating draws them; but each
    prompt is read once for its whole group, and the adapter is merged meanwhile."""
    import torch

    tokenizer, n = trainer.processing_class, trainer.num_generations
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in given]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    draw = torch.Generator().manual_seed(torch.initial_seed() % 2**31 + trainer.state.global_step)
    with _asked(trainer.accelerator.unwrap_model(trainer.model)) as base:
        options = (draw, trainer.temperature, trainer.args.max_completion_length)
        found = _drawn(base, tokenizer, ids[::n], n, *options)
    end = tokenizer.eos_token_id
    found = [row[: row.index(end) + 1] if end in row else row for row in found]
    return {"prompt_ids": ids, "completion_ids": found, "logprobs": None}


def _text(tokenizer, ids: list[int]) -> str:
    """Generated ids as text, up to the end token; "..." where there is none."""
    end = tokenizer.eos_token_id
    return tokenizer.decode(ids[: ids.index(end)]) if end in ids else tokenizer.decode(ids) + "..."


# --- training --------------------------------------------------------------------------------------------------------


def settings(name: str, profile: str) -> SimpleNamespace:
    """The settings of a recipe in a profile, which it remembers: it starts from the adapter of the same profile."""
    found = recipes.settings(name, profile)
    if getattr(found, "task", None) not in ("route_sft", "route_grpo"):
        raise CourseError(f"recipe {name} is no recipe of the routing task: route_sft and route_grpo are.")
    found.profile = profile
    return found


def cold_start_records(s: SimpleNamespace) -> list[dict]:
    """The tickets of the demonstrations."""
    return load("train", s.train, longest=s.longest)


def prompt_records(s: SimpleNamespace, seed: int = 0) -> list[dict]:
    """The tickets of GRPO, past those whose demonstrations the cold start has seen; one for each prompt of each step.

    With `order` "easy_first", each team's are put in the order of their expected reward at the start.
    """
    found = load("train", s.steps * s.prompts, skip=s.skip, longest=s.longest)
    if getattr(s, "order", "") == "easy_first":
        chance = expected_reward(start_model(s, seed), models.load_tokenizer(), found)
        by_team = {name: [] for name in NAMES}
        for i in sorted(range(len(found)), key=lambda i: -chance[i]):
            by_team[team(found[i])].append(found[i])
        found = [record for row in zip(*by_team.values(), strict=True) for record in row]
    return found


def rows(s: SimpleNamespace, seed: int = 0) -> list[dict]:
    """What a recipe learns from. With `shuffled_labels`, a control of `make reference`, each ticket has the team of the
    next one, which is never its own."""
    records = cold_start_records(s) if s.task == "route_sft" else prompt_records(s, seed)
    found, part = (examples(records), "completion") if s.task == "route_sft" else (prompts(records), "team")
    if getattr(s, "shuffled_labels", False):
        moved = [row[part] for row in found]
        found = [row | {part: value} for row, value in zip(found, moved[1:] + moved[:1], strict=True)]
    return found


@functools.cache
def _reading_once():
    from trl import GRPOTrainer

    class ReadingOnce(GRPOTrainer):
        """TRL's trainer, which reads each prompt once for its whole group, in the loss as well: the prompt is most of a
        row here. The numbers are TRL's own: `tests/unit/test_routing.py`."""

        def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, **rest):
            return shared_log_p(self, model, input_ids, attention_mask, logits_to_keep)

    return ReadingOnce


def shared_log_p(made, model, ids, mask, written: int):
    """(log-probability, entropy, None) of each of the last `written` tokens of each row, as `made`, a GRPOTrainer,
    wants them: tensors (rows, written), at its temperature. Rows with the same prompt share one pass over it.
    """
    import torch
    from transformers import DynamicCache

    base = made.accelerator.unwrap_model(model).get_base_model()
    asked, group = ids[:, :-written].unique(dim=0, return_inverse=True)
    first = torch.stack([(group == i).nonzero()[0, 0] for i in range(len(asked))])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with made.accelerator.autocast():
        cache = DynamicCache()
        options = {"past_key_values": cache, "use_cache": True}
        seen = mask[first, :-written]
        hidden = base.model(asked, attention_mask=seen, position_ids=places[first, :-written], **options)
        hidden = hidden.last_hidden_state[group, -1:]
        if written > 1:
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[group], layer.values[group]
            rest = {"attention_mask": mask[:, :-1], "position_ids": places[:, -written:-1]} | options
            hidden = torch.cat([hidden, base.model(ids[:, -written:-1], **rest).last_hidden_state], 1)
        log_p = (base.lm_head(hidden).float() / made.temperature).log_softmax(-1)
    entropy = -(log_p.detach().exp() * log_p.detach()).sum(-1)
    return log_p.gather(2, ids[:, -written:, None])[..., 0], entropy, None


def trainer(model, tokenizer, rows: list[dict], reward, s: SimpleNamespace, seed: int, **changes):
    """TRL's GRPOTrainer for rows of prompt and gold answer, everything that its defaults would get wrong here said
    out loud.

    reward: a `Reward`, or a list of them. A step asks `s.prompts` prompts, in the order of the rows, `s.completions`
    times each. No KL penalty, so no reference model; answers by `rollout`, not by vLLM, which needs a GPU.
    """
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from transformers import PrinterCallback
    from trl import GRPOConfig

    disable_progress_bar()
    profiles.set_seeds(seed)
    # The log-probabilities are taken in float32, as for pairs: `preferences.trainer`.
    model.float_logits = model.get_output_embeddings().register_forward_hook(lambda module, given, out: out.float())
    arguments = recipes.trl_arguments(s, seed) | {
        "per_device_train_batch_size": s.prompts * s.completions,
        "num_generations": s.completions,
        "max_completion_length": s.new_tokens,
        "max_steps": s.steps,
        "temperature": s.temperature,
        "loss_type": s.loss,
        "scale_rewards": s.scale,
        "beta": 0.0,
        "use_vllm": False,
        "shuffle_dataset": False,
        "logging_steps": 1,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*rollout_func.*")  # TRL calls that argument experimental
        made = _reading_once()(
            model=model,
            reward_funcs=reward,
            args=GRPOConfig(**arguments | changes),
            rollout_func=rollout,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    made.remove_callback(PrinterCallback)
    made.add_callback(recipes._progress())
    return made


def start_model(s: SimpleNamespace, seed: int = 0):
    """The model that a recipe trains: the base with a fresh adapter, or that of its `start`; GRPO's in float32, as a
    preference loss needs it (`preferences.continued`)."""
    from course_lib import preferences

    profiles.set_seeds(seed)
    exact = s.task == "route_grpo"
    start = getattr(s, "start", None)
    if start:
        return preferences.continued(adapter(start, s.profile, seed), exact=exact)
    model = recipes.add_lora(models.load(), s)
    for name, parameter in model.named_parameters():
        if exact and "lora_" in name:
            parameter.data = parameter.data.float()
    return model


def prepare(name: str, profile: str, seed: int = 0, given: list[dict] | None = None, reward=None, **changes):
    """(model, trainer) of a recipe, ready for `trainer.train()`; with `given` rows in place of the recipe's own."""
    return prepare_with(settings(name, profile), seed, given, reward, **changes)


def prepare_with(s: SimpleNamespace, seed: int = 0, given: list[dict] | None = None, reward=None, **changes):
    """`prepare` for settings that stand in no recipe: a copy with a change, as sweeps need it. reward: for GRPO, the
    verifier `right_team` where none is given."""
    tokenizer, given = models.load_tokenizer(), given or rows(s, seed)
    model = start_model(s, seed)
    if s.task == "route_sft":
        return model, recipes.sft_trainer(model, tokenizer, given, s, seed, **changes)
    return model, trainer(model, tokenizer, given, reward or Reward(right_team), s, seed, **changes)


def for_use(model):
    """A trained model as it is used, in eval mode and without what `trainer` hung on it."""
    if handle := getattr(model, "float_logits", None):
        handle.remove()
    return recipes.for_use(model)


# --- the cache -------------------------------------------------------------------------------------------------------


def key(name: str, profile: str, seed: int) -> str:
    """What the adapter depends on, as a short hash: what `recipes.key` counts, its start, and this module."""
    parts = [recipes.key(name, profile, seed), models.sha256(Path(__file__))]
    if start := getattr(settings(name, profile), "start", None):
        parts.append(key(start, profile, seed))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def cached(name: str, profile: str, seed: int = 0) -> Path:
    """Where the cache keeps (or would keep) this adapter."""
    return models.cache_dir() / "adapters" / f"{name}-{profile}-{seed}-{key(name, profile, seed)}"


def keep(model, name: str, profile: str, seed: int, about: dict | None = None) -> Path:
    """Save a freshly trained adapter into the cache, for the lessons that come later."""
    return recipes.save(model, cached(name, profile, seed), about)


def adapter(name: str, profile: str = "auto", seed: int = 0) -> Path:
    """The folder of what a recipe trained: from the cache, or trained now, with all that it starts from."""
    profile = profiles.choose(profile)
    folder = cached(name, profile, seed)
    if not (folder / "adapter_model.safetensors").exists():
        print(f"Recipe {name} is not in the cache for profile {profile}, seed {seed}: it is trained now.")
        model, made = prepare(name, profile, seed)
        made.train()
        keep(for_use(model), name, profile, seed, {"losses": recipes.losses(made)})
    return folder


def load_model(name: str, profile: str = "auto", seed: int = 0):
    """The model that a recipe trained, ready to be asked."""
    return models.load(adapter=adapter(name, profile, seed))


# --- references ------------------------------------------------------------------------------------------------------

CONTROLS = {"": {}, "learning_rate_0": {"learning_rate": 0.0}, "shuffled_labels": {"shuffled_labels": True}}
TICKETS = 150  # of test, that each piece is measured on


def measure(model, tokenizer, records: list[dict]) -> dict[str, evaluation.Estimate]:
    """What is kept of a model that routes: expected reward, share of likeliest answers that are right, macro-F1."""
    found = team_probabilities(model, tokenizer, [messages(r) for r in records])
    gold = [team(r) for r in records]
    answers = [NAMES[i] for i in found.argmax(1)]
    f1 = evaluation.macro_f1(gold, answers, NAMES)
    return {
        "expected_reward": evaluation.mean([row[NAMES.index(g)] for row, g in zip(found, gold, strict=True)]),
        "right": evaluation.proportion([a == g for a, g in zip(answers, gold, strict=True)]),
        "macro_f1": evaluation.Estimate(f1, float("nan"), float("nan"), len(gold)),
    }


def make_reference(seeds) -> None:
    """Measure what is missing of the two recipes in profile `cpu`, one training a piece: seeds, controls, sweeps."""
    from course_lib import reference

    for name in ("route_sft", "route_grpo"):
        table = profiles.index()["recipes"][name]
        pieces = [(seed, "", "", "") for seed in seeds]
        pieces += [(seeds[0], control, "", "") for control in CONTROLS if control]
        pieces += [(seeds[0], "", knob, x) for knob, values in table.get("sweeps", {}).items() for x in values]
        for number, (seed, control, knob, setting) in enumerate(pieces, 1):
            common = {"profile": "cpu", "seed": seed, "control": control, "knob": knob, "piece": setting}
            same = {c: str(v) for c, v in (common | {"key": key(name, "cpu", seed)}).items()}
            stored = any(all(r[c] == v for c, v in same.items()) for r in reference.read(name, "sweeps"))
            what = " ".join(str(part) for part in (name, "seed", seed, control, knob, setting) if part != "")
            print(f"{what} ({number}/{len(pieces)}): {'stored' if stored else 'training ...'}", flush=True)
            if not stored:
                _piece(name, seed, common)


def _piece(name: str, seed: int, common: dict) -> None:
    from course_lib import reference

    control, knob = common["control"], common["knob"]
    changes = CONTROLS[control] | ({knob: common["piece"]} if knob else {})
    if changes:
        model, made = prepare_with(SimpleNamespace(**vars(settings(name, "cpu")) | changes), seed)
        made.train()
        model = for_use(model)
    else:
        model = load_model(name, "cpu", seed)
    about, rows = reference._about(key(name, "cpu", seed)), []
    for metric, e in measure(model, models.load_tokenizer(), load("test", TICKETS)).items():
        ends = ["" if x != x else f"{x:.4f}" for x in (e.low, e.high)]
        rows.append(common | {"setting": common["piece"], "metric": metric, "value": f"{e.value:.4f}"})
        rows[-1] |= {"low": ends[0], "high": ends[1], "n": e.n} | about
    reference._replace(name, "sweeps", common, rows)
