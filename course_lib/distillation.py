"""A student cut from a teacher, and its training: on labels, on the teacher's texts, along its probabilities.

A batch is that of `training.collate`; `with_teacher` adds what the teacher thinks of it.
"""

from __future__ import annotations

import copy
import functools
import tempfile

from course_lib import CourseError, evaluation, hardware, models, profiles, recipes, tickets, training


def kept_layers(depth: int, of: int) -> list[int]:
    """The layers that a student of `depth` layers takes from a teacher that has `of`: evenly spaced, the first and the
    last among them."""
    if not 2 <= depth <= of:
        raise CourseError(f"a student of {depth} layers cannot be cut from {of}: give a number from 2 to {of}.")
    return [round(i * (of - 1) / (depth - 1)) for i in range(depth)]


def cut(teacher, keep: list[int]):
    """A student in float32 with the teacher's embedding, its layers `keep` in this order, and its last norm.

    The layers and the last norm are trainable; the embedding, which is the output layer too, stays as it is. An adapter
    of the teacher has to be merged into its weights before.
    """
    layers = teacher.model.layers
    kept = [copy.deepcopy(layers[i]) for i in keep]
    teacher.model.layers = None  # so that they are not copied with the rest
    try:
        student = copy.deepcopy(teacher)
    finally:
        teacher.model.layers = layers
    student.model.layers = type(layers)(kept)
    for place, layer in enumerate(kept):
        layer.self_attn.layer_idx = place  # in the cache of keys and values
    student.config.num_hidden_layers = len(kept)
    for parameter in student.parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad = True
    student.model.embed_tokens.weight.requires_grad = False
    return student.eval()


def told(records: list[dict], texts: list[str]) -> list[dict]:
    """Tickets with what a model wrote about them, as prompt and completion."""
    return [
        {"prompt": tickets.messages(r), "completion": [{"role": "assistant", "content": text}]}
        for r, text in zip(records, texts, strict=True)
    ]


def batches(tokenizer, rows: list[dict], size: int) -> list[dict]:
    """Every row once, in batches of `size` rows of about the same length: little padding is computed. The last batch
    may be smaller."""
    encoded = sorted(training.encode(tokenizer, rows), key=lambda pair: len(pair[0]))
    groups = [encoded[i : i + size] for i in range(0, len(encoded), size)]
    return [training.collate(group, tokenizer.pad_token_id) for group in groups]


def judged_logits(model, batch: dict):
    """(tokens, vocabulary), float32: logits at the places whose next token has a label. Only there is the output layer
    computed: with 49,152 rows it costs as much as eight layers."""
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    return model.lm_head(hidden[batch["labels"][:, 1:] != training.IGNORED]).float()


def judged_tokens(batch: dict):
    """(tokens,): the labels of these places."""
    following = batch["labels"][:, 1:]
    return following[following != training.IGNORED]


def divergence(student_logits, teacher_logits, beta: float = 0.0, temperature: float = 1.0):
    """Generalised Jensen-Shannon divergence in nats, the mean over tokens; logits are (tokens, vocabulary).

    beta 0: forward KL, KL(teacher to student); beta 1: reverse KL, KL(student to teacher); between: each against the
    mixture beta * teacher + (1 - beta) * student. Source: Agarwal et al. 2024 (2306.13649), equation 1. No factor
    temperature**2.
    """
    student, teacher = ((logits / temperature).log_softmax(-1) for logits in (student_logits, teacher_logits))
    if beta == 0:
        return (teacher.exp() * (teacher - student)).sum(-1).mean()
    if beta == 1:
        return (student.exp() * (student - teacher)).sum(-1).mean()
    mixture = (beta * teacher.exp() + (1 - beta) * student.exp()).clamp(min=1e-30).log()
    of_teacher = (teacher.exp() * (teacher - mixture)).sum(-1)
    of_student = (student.exp() * (student - mixture)).sum(-1)
    return (beta * of_teacher + (1 - beta) * of_student).mean()


def bucketed(logits, ids):
    """(tokens, k + 1): log-probabilities of the tokens `ids` (tokens, k), and of all others together."""
    import torch

    log_p = logits.log_softmax(-1).gather(1, ids)
    others = torch.log1p(-log_p.exp().sum(1, keepdim=True).clamp(max=1 - 1e-6))
    return torch.cat([log_p, others], 1)


def with_teacher(teacher, batch: dict, k: int) -> dict:
    """The batch with the teacher's `k` likeliest tokens at each judged place (`teacher_ids`) and their
    log-probabilities, those of all others together behind them (`teacher_log_p`)."""
    import torch

    with torch.no_grad(), training.autocast(teacher):
        logits = judged_logits(teacher, batch)
        ids = logits.topk(k, dim=-1).indices
        return batch | {"teacher_ids": ids, "teacher_log_p": bucketed(logits, ids)}


def label_loss(student, batch: dict):
    """Cross-entropy on the labels: what supervised fine-tuning minimises."""
    import torch

    logits = judged_logits(student, batch)
    return torch.nn.functional.cross_entropy(logits, judged_tokens(batch).to(logits.device))


def teacher_loss(student, batch: dict, beta: float = 0.0):
    """Divergence from the teacher's stored probabilities (`with_teacher`), at temperature 1."""
    return divergence(bucketed(judged_logits(student, batch), batch["teacher_ids"]), batch["teacher_log_p"], beta)


def messages_alone(tokenizer, prompts: list[list[dict]], size: int) -> list[dict]:
    """Chat messages without an answer, every one once, in batches of `size` of about the same length."""
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    encoded = sorted((tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts), key=len)
    groups = [encoded[i : i + size] for i in range(0, len(encoded), size)]
    return [training.collate([(ids, ids) for ids in group], tokenizer.pad_token_id) for group in groups]


def hidden_loss(teacher, keep: list[int], student, batch: dict):
    """Squared distance of the student's hidden states from those that the teacher has after the same layer, over the
    squared length of the teacher's; the mean over tokens and layers. No label is read. `keep` as `cut` got it."""
    import torch

    inputs = {name: batch[name].to(student.device) for name in ("input_ids", "attention_mask")}
    ask, real = {"use_cache": False, "output_hidden_states": True}, inputs["attention_mask"].bool()
    with torch.no_grad(), training.autocast(teacher):
        wanted = teacher.model(**inputs, **ask).hidden_states
    distances = []
    for place, theirs in zip(student.model(**inputs, **ask).hidden_states[1:], keep, strict=True):
        ours, goal = place[real].float(), wanted[theirs + 1][real].float()
        distances.append(((ours - goal) ** 2).sum(-1) / (goal**2).sum(-1))
    return torch.stack(distances).mean()


def train(student, batches: list[dict], loss, steps: int, learning_rate: float, seed: int = 0) -> list[float]:
    """Train on the batches, in random order, from the first again where they end; the loss by step.

    loss(student, batch): a scalar. AdamW, a tenth of the steps warm-up, then half a cosine; gradients clipped at 1.
    """
    import numpy as np
    import torch

    rng, order = np.random.default_rng(seed), []
    while len(order) < steps:
        order += rng.permutation(len(batches)).tolist()
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule, log = training.cosine(steps, 0.1), []
    student.train()
    for step, pick in enumerate(order[:steps]):
        optimizer.param_groups[0]["lr"] = learning_rate * schedule(step)
        with training.autocast(student):
            value = loss(student, batches[pick])
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.append(value.item())
    student.eval()
    hardware.give_back_memory()
    return log


def healed(teacher, tokenizer, prompts: list[list[dict]], depth: int, sizes, seed: int = 0):
    """A student of `depth` layers, trained on the prompts alone until its layers fit together again: `sizes` says
    `heal_steps`, `heal_rate` and `batch`."""
    keep = kept_layers(depth, teacher.config.num_hidden_layers)
    student = cut(teacher, keep)
    loss = functools.partial(hidden_loss, teacher, keep)
    train(student, messages_alone(tokenizer, prompts, sizes.batch), loss, sizes.heal_steps, sizes.heal_rate, seed)
    return student


def on_policy(student, teacher, tokenizer, prompts: list[list[dict]], steps: int, batch: int, rate: float, seed: int):
    """Train along texts that the student itself writes, by TRL's `DistillationTrainer`: reverse KL, as it is there by
    default. The student writes at every step, which takes most of the time."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    profiles.set_seeds(seed)
    config = DistillationConfig(
        **hardware.trainer_arguments(),
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        max_completion_length=80,
        save_strategy="no",
        seed=seed,
    )
    rows = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    trainer = DistillationTrainer(student, teacher, args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return recipes.for_use(student)


# --- references ------------------------------------------------------------------------------------------------------

DEPTH = 10
SWEEPS = {  # one setting at a time; the first of each is the lesson's
    "method": ("logit", "gold", "sequence", "continued", "on_policy", "learning_rate_0"),
    "depth": (5, 20),
    "beta": (0.5, 1.0),
    "temperature": (2.0, 4.0),
}
TICKETS = 120  # of test, that each piece answers


def make_reference(seeds) -> None:
    """Measure what is missing of `SWEEPS` in the sizes of profile `cpu`, one training a piece, as
    `student_sweeps.csv`; some minutes each, on-policy training the longest."""
    from course_lib import reference

    key = recipes.key("ticket_lora", "cpu", 0)
    pieces = [(seed, knob, setting) for seed in seeds for knob, values in SWEEPS.items() for setting in values]
    for number, (seed, knob, setting) in enumerate(pieces, 1):
        common = {"profile": "cpu", "seed": seed, "control": "", "knob": knob, "piece": setting}
        same = {column: str(x) for column, x in (common | {"key": key}).items()}
        stored = any(all(r[c] == x for c, x in same.items()) for r in reference.read("student", "sweeps"))
        what = f"{knob} {setting}, seed {seed} ({number}/{len(pieces)})"
        print(f"{what}: {'stored' if stored else 'training ...'}", flush=True)
        if stored:
            continue
        found, rows = reference.swept_metrics(_piece(seed, knob, setting), TICKETS), []
        for metric in ("completion_nll", "exact_match"):
            e = found[metric]
            rows.append(common | {"setting": setting, "metric": metric, "value": f"{e.value:.4f}"})
            rows[-1] |= {"low": f"{e.low:.4f}", "high": f"{e.high:.4f}", "n": e.n} | reference._about(key)
        reference._replace("student", "sweeps", common, rows)


@functools.cache
def _materials():
    """(teacher, tokenizer, sizes, gold batches, all batches with the teacher's probabilities, prompts), as the lesson
    makes them in profile `cpu`."""
    sizes = profiles.sizes(profiles.lesson("08"), "cpu")
    tokenizer = models.load_tokenizer()
    teacher = recipes.load("ticket_lora", "cpu").merge_and_unload().eval().requires_grad_(False)
    seen = recipes.settings("ticket_lora", "cpu").train
    gold, plain = tickets.load("train", sizes.gold), tickets.load("train", seen + sizes.unlabelled)[seen:]
    prompts = [tickets.messages(r) for r in plain]
    texts = [a.text for a in evaluation.generate(teacher, tokenizer, prompts, max_new_tokens=80)]
    fits = [(r, text) for r, text in zip(plain, texts, strict=True) if tickets.parse(text).ticket]
    rows = recipes.examples(gold)
    both = batches(tokenizer, rows + told(*zip(*fits, strict=True)), sizes.batch)
    both = [with_teacher(teacher, b, sizes.top) for b in both]
    return teacher, tokenizer, sizes, batches(tokenizer, rows, sizes.batch), both, prompts


def _piece(seed: int, knob: str, setting):
    teacher, tokenizer, sizes, gold, both, prompts = _materials()
    depth = setting if knob == "depth" else DEPTH
    student = healed(teacher, tokenizer, prompts, depth, sizes, seed)
    rate = 0.0 if setting == "learning_rate_0" else sizes.learning_rate
    given, loss = both, teacher_loss
    if setting in ("gold", "sequence"):
        given, loss = (gold if setting == "gold" else both), label_loss
    elif knob == "beta":
        loss = functools.partial(teacher_loss, beta=setting)
    elif knob == "temperature":
        loss = functools.partial(_softened, teacher, setting)
    train(student, given, loss, sizes.steps, rate, seed)
    if setting == "continued":  # beside on-policy training: as many more steps at its rate, along the teacher's texts
        train(student, given, loss, sizes.steps // 2, rate / 10, seed)
    if setting == "on_policy":  # from where logit KD ended
        return on_policy(student, teacher, tokenizer, prompts, sizes.steps // 2, sizes.batch, rate / 10, seed)
    return recipes.for_use(student)


def _softened(teacher, temperature: float, student, batch: dict):
    """Hinton's loss, with all of the teacher's logits, computed at every step."""
    import torch

    with torch.no_grad():
        logits = judged_logits(teacher, batch)
    return divergence(judged_logits(student, batch), logits, 0.0, temperature) * temperature**2
