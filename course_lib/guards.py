"""Checks that turn a silent failure into an error. Each error says what was found and what to do."""

from __future__ import annotations

from course_lib import CourseError


class GuardError(CourseError):
    """Something that would have gone wrong without an error."""


# --- weights in four bits --------------------------------------------------------------------------------------------


def keep_unpacked(model) -> int:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU; returns the number of layers that were told so.

    On a processor with AVX512-BF16, bitsandbytes 0.50 rewrites the weights of a 4-bit layer at its first forward pass
    in eval mode, for a product that is quick and has no backward pass. Whoever trains afterwards loses the gradient
    that should flow through the layer, without an error. `models.load` calls this for every model.
    """
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def repacked(model) -> list[str]:
    """Names of the layers whose 4-bit weights were repacked."""
    layers = ((name, m) for name, m in model.named_modules() if hasattr(m, "support_avx512bf16_for_cpu"))
    states = ((name, getattr(layer.weight, "quant_state", None)) for name, layer in layers)
    return [name for name, state in states if getattr(state, "packing_format_for_cpu", False)]


def require_unpacked(model) -> None:
    """GuardError where a layer's 4-bit weights were repacked, so that training would lose gradients."""
    if found := repacked(model):
        raise GuardError(
            f"{len(found)} layers hold 4-bit weights that were repacked for inference (the first is {found[0]}): no "
            "gradient passes through them. Load the model again and call guards.keep_unpacked(model) before the first "
            "forward pass, or use models.load(four_bit=True), which does."
        )


def require_gradients(model) -> None:
    """GuardError where, after a backward pass, a trainable weight has no gradient, or one that is not finite."""
    import torch

    trained = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise GuardError("nothing is trainable: every weight is frozen. Was the adapter loaded with is_trainable=True?")
    if missing := [name for name, grad in trained if grad is None]:
        raise GuardError(
            f"{len(missing)} of {len(trained)} trainable weights got no gradient (the first is {missing[0]}): what "
            "lies between them and the loss does not pass it on."
        )
    if broken := [name for name, grad in trained if not torch.isfinite(grad).all()]:
        raise GuardError(f"the gradient of {broken[0]} is not finite: lower the learning rate, or leave float16.")


def require_full_weights(model) -> None:
    """GuardError where a layer holds 4-bit weights: an adapter that is merged into them is rounded to four bits."""
    found = [name for name, p in model.named_parameters() if getattr(p, "quant_state", None) is not None]
    if found:
        raise GuardError(
            f"{len(found)} weights are held in four bits (the first is {found[0]}). Merging into them would round the "
            "adapter to four bits too: load the base in 16 bits, or dequantise it, and merge into that."
        )


# --- data: before a step is taken -----------------------------------------------------------------------------------


def _plain_words(text: str) -> list[str]:
    import re

    return re.findall(r"\w+", text.lower())


def _runs_of_words(text: str, words: int) -> set[tuple[str, ...]]:
    """All runs of `words` words; of a shorter text, the whole."""
    found = _plain_words(text)
    return {tuple(found[i : i + words]) for i in range(max(1, len(found) - words + 1))} if found else set()


def require_agreement(first, second, least: float = 0.7) -> None:
    """GuardError where two raters' labels of the same items agree less than Cohen's kappa of `least`."""
    from sklearn.metrics import cohen_kappa_score

    first, second = list(first), list(second)
    kappa = 1.0 if first == second else float(cohen_kappa_score(first, second))
    if kappa < least:
        raise GuardError(
            f"two raters agree with kappa {kappa:.2f}, at least {least} is wanted: a model trained on these labels "
            "learns the disagreement. Mend the guideline, leave the careless rater out, and label again."
        )


def require_disjoint(trained, tested, words: int = 8) -> None:
    """GuardError where a tested text shares a run of `words` words with a training text, or is one, if shorter."""
    known = set().union(*(_runs_of_words(text, words) for text in trained))
    if leaked := [text for text in tested if _runs_of_words(text, words) & known]:
        raise GuardError(
            f"{len(leaked)} of {len(tested)} test texts stand in the training data (the first is {leaked[0][:60]!r}): "
            "their score says what was memorised. Take them out of the training data, or out of the test."
        )


def require_held_out(trained, tested) -> None:
    """GuardError where an id is among what was trained on and among what is tested."""
    if both := sorted(set(trained) & set(tested)):
        raise GuardError(
            f"{len(both)} of {len(set(tested))} tested items were trained on (the first is {both[0]}): this is no "
            "score on new items. Test on a split that no training has read."
        )


def require_current(trained: dict, now: dict) -> None:
    """GuardError where a trained answer is not today's. trained, now: question to value; others are skipped."""
    if old := [q for q, value in trained.items() if q in now and now[q] != value]:
        raise GuardError(
            f"{len(old)} trained facts are out of date (the first: {old[0]!r} was {trained[old[0]]!r} and is "
            f"{now[old[0]]!r}). Leave what changes out of the weights, and put it into the prompt when it is needed."
        )


_PRIVATE_PATTERNS = {
    "an email address": r"[\w.+-]+@[\w-]+\.[\w.]+",
    "a bank account": r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}\b",
    "a telephone or card number": r"(?<![\w-])\+?\d(?:[ ()-]?\d){8,18}(?![\w-])",
}


def require_redacted(texts) -> None:
    """GuardError where a training text holds an email address, a bank account, or a telephone or card number.

    Names and addresses are not found: lesson 02 has a pipeline that knows more kinds, and measures its recall.
    """
    import re

    for number, text in enumerate(texts):
        for kind, pattern in _PRIVATE_PATTERNS.items():
            if re.search(pattern, text):  # the error must not repeat what should be kept secret
                raise GuardError(
                    f"training text {number} holds {kind}: a model can be asked for it. Redact the training data "
                    "before the first step; afterwards only a new training removes it."
                )


def require_variety(texts, words: int = 4, least: float = 0.5) -> None:
    """GuardError where of the texts' openings (`words` words) fewer than a share of `least` are different."""
    openings = [tuple(_plain_words(text)[:words]) for text in texts]
    share, usual = len(set(openings)) / len(openings), max(openings, key=openings.count)
    if share < least:
        raise GuardError(
            f"{len(set(openings))} different openings among {len(openings)} texts ({share:.0%}, at least {least:.0%} "
            f"wanted); the usual one is {' '.join(usual)!r}. Take texts of more writers, or of more prompts."
        )


_NO_LOSS = -100  # the label that cross-entropy skips


def require_prompt_masked(labels, prompt_lengths) -> None:
    """GuardError where a prompt token carries a loss. labels: one list a row; prompt_lengths: tokens of each prompt."""
    judged = [sum(x != _NO_LOSS for x in list(row)[:n]) for row, n in zip(labels, prompt_lengths, strict=True)]
    if rows := [i for i, n in enumerate(judged) if n]:
        raise GuardError(
            f"{sum(judged)} prompt tokens in {len(rows)} rows carry a loss (the first is row {rows[0]}): the model "
            "learns to write what customers write. Give the trainer `prompt` and `completion`, or mask the prompt."
        )


def require_end_token(labels, end: int) -> None:
    """GuardError where a row's judged tokens do not end with the end token `end`. labels: one list of ids a row.

    One token may follow it: chat templates put a line break after the end of a turn.
    """
    judged = [[int(x) for x in row if x != _NO_LOSS] for row in labels]
    if empty := [i for i, ids in enumerate(judged) if not ids]:
        raise GuardError(
            f"{len(empty)} of {len(judged)} rows have no judged token at all (the first is row {empty[0]}): the prompt "
            "alone fills the length limit. Raise the limit, or leave these rows out."
        )
    if cut := [i for i, ids in enumerate(judged) if end not in ids[-2:]]:
        raise GuardError(
            f"{len(cut)} of {len(judged)} rows do not end with the end token {end} (the first is row {cut[0]}): the "
            "model is not taught to stop. Raise the length limit, and pad with a token that is not the end token."
        )


def require_plain_messages(messages, tokenizer) -> None:
    """GuardError where the content of a chat message holds control tokens of the tokenizer."""
    special = sorted(set(tokenizer.all_special_tokens))
    for message in messages:
        if found := [token for token in special if token in message["content"]]:
            raise GuardError(
                f"a message of the {message['role']} holds the control token {found[0]}: it was put through a chat "
                "template before, or somebody tries to speak for the system. Apply the template once, to plain text."
            )


def require_no_hidden_system(messages, tokenizer) -> None:
    """GuardError where the chat template adds a system prompt that no message has."""
    if any(message["role"] == "system" for message in messages):
        return
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    added = text[: text.index(messages[0]["content"])]
    if "system" in added:
        raise GuardError(
            f"the chat template adds {len(added.split())} words of its own: {added[:70]!r}. Give a system message, "
            "and the same one in training and in use."
        )


def require_off_grid(weight, block: int = 32, levels: int = 16) -> None:
    """GuardError where most blocks of `block` neighbours hold at most `levels` different values: 4-bit numbers already.

    weight: a matrix whose rows are a multiple of `block` long.
    """
    ordered = weight.detach().float().reshape(-1, block).sort(1).values
    different = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)
    share = (different <= levels).float().mean().item()
    if share > 0.5:
        raise GuardError(
            f"{share:.0%} of the blocks of {block} hold at most {levels} different values: these weights come from a "
            "4-bit file, and rounding them to four bits again costs next to nothing. Measure on other weights as well."
        )


# --- training --------------------------------------------------------------------------------------------------------


def require_rates(rates, most: float = 0.1) -> None:
    """GuardError where more than a share of `most` of the steps has a learning rate of zero. rates: one a step."""
    zero = [i for i, rate in enumerate(rates) if not rate]
    if len(zero) > most * len(rates):
        raise GuardError(
            f"{len(zero)} of {len(rates)} steps have a learning rate of 0 (the first is step {zero[0]}): nothing is "
            "learnt in them. Shorten the warm-up, or train for more steps."
        )


def require_steps_land(weights, step: float, most: float = 0.1) -> None:
    """GuardError where a step of size `step` leaves more than a share of `most` of the weights as they were."""
    import torch

    still = torch.minimum((weights + step == weights).float(), (weights - step == weights).float()).mean().item()
    if still > most:
        dtype = str(weights.dtype).removeprefix("torch.")
        raise GuardError(
            f"a step of {step:g} changes nothing in {still:.0%} of these {dtype} weights: it is smaller than half the "
            "distance to the next number. Keep what is trained in float32."
        )


def require_same_start(policy, reference, most: float = 0.1) -> None:
    """GuardError where policy and reference differ before the first step: log-probabilities of the same texts."""
    gap = max(abs(float(a) - float(b)) for a, b in zip(policy, reference, strict=True))
    if gap > most:
        raise GuardError(
            f"before the first step the policy is {gap:.1f} nats away from its reference: it is another model. Name "
            "the model that training starts from as the reference, or let a frozen copy of its adapter be it."
        )


def require_messages(prompts) -> None:
    """GuardError where a prompt is a plain string: no chat template is applied to it."""
    if plain := [i for i, prompt in enumerate(prompts) if isinstance(prompt, str)]:
        raise GuardError(
            f"{len(plain)} of {len(prompts)} prompts are strings (the first is {prompts[plain[0]][:40]!r}): the "
            'trainer puts no chat template around them. Give lists of messages: [{"role": "user", "content": ...}].'
        )


def require_spread(groups, least: float = 0.2) -> None:
    """GuardError where fewer than a share of `least` of the groups hold different rewards. groups: lists of rewards."""
    spread = [len(set(rewards)) > 1 for rewards in groups]
    if sum(spread) < least * len(spread):
        raise GuardError(
            f"in {len(spread) - sum(spread)} of {len(spread)} groups all rewards are equal (first: {groups[0][0]}): "
            "their advantage is 0, and nothing is learnt. Mend the reward, or take tasks that are sometimes solved."
        )


def require_packing(position_ids, use_cache: bool) -> None:
    """GuardError where packed rows (positions that start again) are read with a cache: texts would see each other."""
    starts = [sum(int(x) == 0 for x in row) for row in position_ids]
    if use_cache and max(starts) > 1:
        raise GuardError(
            f"a row holds {max(starts)} packed texts and is read with use_cache=True: each text then sees the ones "
            "before it. Pass use_cache=False, or do not pack."
        )


def require_bare(model) -> None:
    """GuardError where a model has adapter layers already, so that wrapping it again would write over an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if found := [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]:
        raise GuardError(
            f"{len(found)} layers carry an adapter already (the first is {found[0]}): PeftModel.from_pretrained would "
            'write over it. Use model.load_adapter(folder, adapter_name="another"), then model.set_adapter.'
        )


# --- behaviour: before it ships --------------------------------------------------------------------------------------


def require_kept(before, after, most: float = 0.05, what: str = "held-out texts") -> None:
    """GuardError where the mean loss on the same items (nats per token) rose by more than `most`."""
    before, after = [float(x) for x in before], [float(x) for x in after]
    rise = sum(b - a for a, b in zip(before, after, strict=True)) / len(before)
    if rise > most:
        raise GuardError(
            f"the loss on {what} rose by {rise:.2f} nats per token, at most {most} is allowed: something was "
            "unlearnt. Mix such texts into the training, train for fewer steps, or at a lower rate."
        )


def require_share(hits, least: float, what: str) -> None:
    """GuardError where fewer than a share of `least` of the answers are as they must be (`what` says how)."""
    hits = [bool(hit) for hit in hits]
    share = sum(hits) / len(hits)
    if share < least:
        raise GuardError(
            f"{what}: {sum(hits)} of {len(hits)} ({share:.0%}, at least {least:.0%} wanted). Do not ship; put examples "
            "of it into the training data, and measure again."
        )


def require_lengths(usual, texts, most: float = 1.5) -> None:
    """GuardError where the median answer has over `most` times the words of the usual ones, or under 1 / `most`."""
    from statistics import median

    words = [median(len(text.split()) for text in some) for some in (usual, texts)]
    ratio = words[1] / max(words[0], 1)
    if not 1 / most <= ratio <= most:
        raise GuardError(
            f"the median answer has {words[1]:g} words where {words[0]:g} are usual: the model has learnt a length. "
            "Mix demonstrations of different lengths and forms."
        )


def require_not_verbatim(texts, trained, words: int = 8) -> None:
    """GuardError where a written text repeats `words` words in a row of a training text."""
    known = set().union(*(_runs_of_words(text, words) for text in trained if len(_plain_words(text)) >= words))
    if copied := [text for text in texts if len(_plain_words(text)) >= words and _runs_of_words(text, words) & known]:
        raise GuardError(
            f"{len(copied)} of {len(texts)} answers repeat {words} words in a row of a training text (the first begins "
            f"{copied[0][:40]!r}). Remove duplicates from the data, and train for fewer epochs."
        )


def require_secrets_kept(texts, secrets) -> None:
    """GuardError where a written text holds one of the secrets that were planted in, or must stay out of, the data."""
    out = [secret for secret in secrets if any(secret in text for text in texts)]
    if out:  # the error must not repeat them
        raise GuardError(
            f"{len(out)} of {len(secrets)} secrets can be asked for. Redact the training data, train again, and revoke "
            "what was a password or a code."
        )


def require_calibrated(confidence, right, most: float = 0.2) -> None:
    """GuardError where mean confidence (0 to 1) exceeds the share of right answers by more than `most`."""
    confidence, right = [float(x) for x in confidence], [bool(x) for x in right]
    sure, true = sum(confidence) / len(confidence), sum(right) / len(right)
    if sure - true > most:
        raise GuardError(
            f"mean confidence {sure:.2f}, but {true:.2f} of the answers are right: the model is sure of what is wrong. "
            "Check the labels that it was trained on, and do not use its probabilities to decide."
        )


def require_same_prompt(trained: str, served: str) -> None:
    """GuardError where the same message is not rendered in use as it was in training."""
    if trained != served:
        pairs = zip(trained, served, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(trained), len(served)))
        raise GuardError(
            f"training and use render a message differently from character {at} on: {trained[at : at + 24]!r} in "
            f"training, {served[at : at + 24]!r} in use. Use the tokenizer's chat template in both."
        )


# --- serving ---------------------------------------------------------------------------------------------------------


def require_left_padding(attention_mask) -> None:
    """GuardError where a batch that is to be continued is padded on the right. attention_mask: rows of 0 and 1."""
    if rows := [i for i, row in enumerate(attention_mask) if not int(row[-1])]:
        raise GuardError(
            f"{len(rows)} rows end with padding (the first is row {rows[0]}): the model would go on after the padding. "
            'Set tokenizer.padding_side = "left" before generating.'
        )


def require_tenant(model, tenant: str, cache_of: str | None = None) -> None:
    """GuardError where another adapter than the tenant's is active, or the cache was filled for another tenant."""
    active = list(model.active_adapters) if hasattr(model, "peft_config") else []
    if active != [tenant]:
        raise GuardError(
            f"a request of {tenant!r} meets the adapters {active}: it would get another tenant's answers. Choose the "
            "adapter for every request, and refuse one that has none."
        )
    if cache_of not in (None, tenant):
        raise GuardError(
            f"a request of {tenant!r} would go on from a cache that was filled for {cache_of!r}: keys and values carry "
            "the adapter that made them. Make the tenant a part of the cache's key."
        )


def weights_sha256(model) -> str:
    """sha256 over names, dtypes and bytes of a model's own weights; those of adapters do not count."""
    import hashlib

    import torch

    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if "lora_" not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            digest.update(f"{plain} {weight.dtype}".encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_base(model, sha256: str) -> None:
    """GuardError where the weights beneath an adapter are not those that it was trained on (`weights_sha256`)."""
    if (found := weights_sha256(model)) != sha256:
        raise GuardError(
            f"the base has sha256 {found[:12]}..., the adapter was trained on {sha256[:12]}...: shapes fit, numbers do "
            "not. Load the base that the adapter names, or train the adapter again on this one."
        )


def require_no_conflict(losses: dict, most: float = 0.5) -> None:
    """GuardError where adapters that were combined disturb each other.

    losses: name of an adapter to (loss alone, loss combined), on its own task in nats per token.
    """
    if worse := {name: round(float(b - a), 2) for name, (a, b) in losses.items() if b - a > most}:
        raise GuardError(
            f"combined, the loss rises by {worse}, at most {most} is allowed: the adapters pull the same weights in "
            "different directions. Serve them one at a time, or train one adapter on both tasks."
        )
