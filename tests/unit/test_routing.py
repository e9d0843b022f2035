import math
import os
import threading
import time
import types

import numpy as np
import pytest
import torch

from course_lib import CourseError, evaluation, models, preferences, recipes, reference, routing, tickets

SETTINGS = {
    "task": "route_grpo", "loss": "dapo", "scale": "group", "rank": 2, "alpha": 4, "longest": None, "skip": 0,
    "prompts": 2, "completions": 4, "new_tokens": 4, "temperature": 1.0, "steps": 2, "learning_rate": 1e-2,
    "batch_size": 8, "schedule": "constant", "warmup": 0, "beta2": 0.95, "epochs": 1, "profile": "cpu", "train": 5,
}  # fmt: skip


def settings(**changes):
    return types.SimpleNamespace(**SETTINGS | changes)


ROWS = [{"prompt": [{"role": "user", "content": f"Where is {i}?"}], "team": routing.NAMES[i % 5]} for i in range(4)]


# --- tickets and prompts ---------------------------------------------------------------------------------------------


def test_every_intent_has_one_team():
    intents = [intent for team in routing.TEAMS.values() for intent in team]
    assert sorted(intents) == sorted(tickets.INTENTS)


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_load_is_balanced_at_every_step(split):
    found = [routing.team(r) for r in routing.load(split, 50)]
    assert found == list(routing.NAMES) * 10


def test_load_skips_and_shortens():
    every = routing.load("train", 30, longest=120)
    assert [r["id"] for r in routing.load("train", 10, skip=20, longest=120)] == [r["id"] for r in every[20:]]
    assert max(len(r["text"]) for r in every) <= 120 < max(len(r["text"]) for r in routing.load("train", 30))
    with pytest.raises(CourseError, match="have at most 10 characters; 5 were asked for"):
        routing.load("train", 5, longest=10)


def test_the_prompt_does_not_name_the_teams():
    assert not any(name in routing.messages({"text": ""})[0]["content"] for name in routing.NAMES)


def test_shuffled_labels_are_never_right():
    right, wrong = (routing.rows(settings(shuffled_labels=on)) for on in (False, True))
    assert all(a["prompt"] == b["prompt"] and a["team"] != b["team"] for a, b in zip(right, wrong, strict=True))
    cold = routing.rows(settings(task="route_sft", shuffled_labels=True))
    assert [row["completion"][0]["content"] for row in cold] == [*routing.NAMES[1:], routing.NAMES[0]]


# --- verifiers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["orders", " orders", "orders\n"])
def test_the_right_word_is_rewarded(text):
    assert routing.right_team(text, "orders") == 1.0 and routing.right_team(text, "shop") == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "Orders", "orders.", "orders orders", " ".join(routing.NAMES), "not orders", "I cannot say orders",
        "оrders", "orders\u200b", "orders\u00a0", "ｏrders", "orders" + " " * 1000, "orders" * 100_000, '"orders"',
        "order", "rders", "__import__('os')", "orders...", "\x00orders",
    ],
)  # fmt: skip
def test_anything_else_is_not(text):
    assert routing.right_team(text, "orders") == 0.0


def test_the_record_verifier_withstands_what_is_no_record():
    gold = {
        "intent": "buy",
        "items": [],
        "order_id": None,
        "due_date": None,
        "needs_human": False,
        "priority": "normal",
    }
    right = tickets.to_json(gold)
    assert routing.right_record(right, gold) == 1.0
    reward = routing.Reward(routing.right_record)
    bad = [
        "",
        "[" * 3000,
        '{"a":' * 700,
        right + right,
        f"I cannot. {right}",
        right.replace('"buy"', '"buy", "intent": "buy"'),
    ]
    assert [reward.score(text, gold) for text in [*bad, right[:-1], right * 1000, "NaN"]] == [0.0] * 9
    assert reward.errors == []  # the parser answers for itself


def test_a_verifier_that_raises_is_reported_and_counts_nothing():
    def broken(text, gold):
        return 1 / len(text)

    reward = routing.Reward(broken)
    assert reward.score("x", None) == 1.0 and reward.score("", None) == 0.0
    assert reward.errors == [{"kind": "ZeroDivisionError", "detail": "division by zero", "text": ""}]


@pytest.mark.parametrize("value", [float("nan"), 2, -0.1, None, "1", [1.0]])
def test_a_value_that_is_no_reward_is_reported(value):
    reward = routing.Reward(lambda text, gold: value)
    assert reward.score("x", None) == 0.0 and reward.errors[0]["kind"] == "value"


@pytest.mark.parametrize("swallow", [False, True])
def test_a_verifier_that_takes_too_long_is_stopped(swallow):
    import re

    def slow(text, gold):
        try:
            return bool(re.fullmatch(r"(a+)+b", text))
        except Exception:
            return 1.0

    def busy(text, gold):
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                return 1.0

    reward = routing.Reward(busy if swallow else slow, seconds=0.2)
    start = time.monotonic()
    assert reward.score("a" * 40, None) == 0.0
    assert time.monotonic() - start < 5 and reward.errors[0]["kind"] == "time"
    assert reward.score("b", None) == 0.0 or swallow  # the next one is judged as ever


def test_puzzles_of_reasoning_gym_are_judged():
    if os.environ.get("CI") != "true":  # optional for a learner, required where the whole suite runs
        pytest.importorskip("reasoning_gym")
    import reasoning_gym

    data = reasoning_gym.create_dataset("chain_sum", size=3, seed=0, min_terms=2, max_terms=2, max_digits=1)
    reward = routing.Reward(lambda text, item: data.score_answer(text, item), seconds=20)
    for item in data:
        assert reward.score(item["answer"], item) == 1.0 and reward.score("", item) == 0.0
    assert reward.errors == []


def test_without_a_time_limit_nothing_is_judged():
    found = []

    def work():
        try:
            routing.Reward(routing.right_team).score("orders", "orders")
        except CourseError as error:
            found.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "main thread" in found[0]


def test_a_reward_as_trl_calls_it():
    logged = {}
    reward = routing.Reward(routing.right_team)
    said = [[{"role": "assistant", "content": text}] for text in ("shop", "orders")]
    assert reward(said, log_metric=logged.__setitem__, team=["shop", "shop"], prompts=None) == [1.0, 0.0]
    assert reward(["shop"], team=["shop"]) == [1.0] and logged == {"verifier_errors": 0.0}


# --- asking a model --------------------------------------------------------------------------------------------------


def test_team_probabilities_are_those_of_the_loss(tiny_lora, tiny_tokenizer):
    model = tiny_lora()
    some = [row["prompt"] for row in ROWS[:3]]
    found = routing.team_probabilities(model, tiny_tokenizer, some, batch_size=2)
    for i, prompt in enumerate(some):
        nll = evaluation.completion_nll(model, tiny_tokenizer, [(prompt, name) for name in routing.NAMES])
        lengths = [len(tiny_tokenizer(name, add_special_tokens=False)["input_ids"]) + 1 for name in routing.NAMES]
        np.testing.assert_allclose(np.log(found[i]), -nll * lengths, rtol=1e-4)


def test_expected_reward_is_the_right_column(tiny_model, tiny_tokenizer, monkeypatch):
    records = routing.load("dev", 5)
    monkeypatch.setattr(routing, "team_probabilities", lambda *_: np.arange(25).reshape(5, 5))
    assert routing.expected_reward(tiny_model(), tiny_tokenizer, records).tolist() == [0, 6, 12, 18, 24]


def test_sampling_is_generating(tiny_lora, tiny_tokenizer):
    model, some = tiny_lora(), [row["prompt"] for row in ROWS[:3]]
    cold = routing.sample(model, tiny_tokenizer, some, 2, temperature=1e-6, new_tokens=6, batch_size=2)
    greedy = evaluation.generate(model, tiny_tokenizer, some, max_new_tokens=6)
    for pair, answer in zip(cold, greedy, strict=True):
        assert pair == [answer.text + "..." * (not answer.finished)] * 2


def test_samples_have_the_models_probabilities(tiny_model, tiny_tokenizer):
    model, prompt = tiny_model(), ROWS[0]["prompt"]
    text = tiny_tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    ids = tiny_tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        p = model(ids).logits[0, -1].softmax(-1)
    drawn = routing.sample(model, tiny_tokenizer, [prompt], 4000, new_tokens=1)[0]
    texts = [routing._text(tiny_tokenizer, [i]) for i in range(len(p))]
    for best in p.topk(3).indices.tolist():  # several tokens may be read as the same text
        wanted = sum(p[i].item() for i, text in enumerate(texts) if text == texts[best])
        assert abs(np.mean([t == texts[best] for t in drawn]) - wanted) < 5 * math.sqrt(0.25 / 4000)
    assert routing.sample(model, tiny_tokenizer, [prompt], 8, 1) == routing.sample(
        model, tiny_tokenizer, [prompt], 8, 1
    )


# --- training --------------------------------------------------------------------------------------------------------


def test_a_rollout_is_generating(tiny_lora, tiny_tokenizer):
    made = routing.trainer(tiny_lora(), tiny_tokenizer, ROWS, len, settings(temperature=1e-6, new_tokens=6), 0)
    some = [row["prompt"] for row in ROWS[:2]]
    found = routing.rollout([p for p in some for _ in range(4)], made)
    greedy = evaluation.generate(made.model, tiny_tokenizer, some, max_new_tokens=6)
    for i, answer in enumerate(greedy):
        for ids in found["completion_ids"][4 * i : 4 * i + 4]:
            assert len(ids) == answer.tokens and tiny_tokenizer.decode(ids).removesuffix("<|im_end|>") == answer.text
    assert found["prompt_ids"][0] == found["prompt_ids"][3] != found["prompt_ids"][4]
    hot = routing.trainer(tiny_lora(), tiny_tokenizer, ROWS, len, settings(), 0)
    drawn = routing.rollout([some[0]] * 4, hot)["completion_ids"]
    hot.state.global_step += 1
    assert len({tuple(ids) for ids in drawn}) > 1 and drawn != routing.rollout([some[0]] * 4, hot)["completion_ids"]


@pytest.fixture
def adapted(tiny_lora):
    model = tiny_lora()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name
    return model


def lora(model):
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora_" in name])


def test_the_trainer_takes_groups_in_the_order_of_the_rows(adapted, tiny_tokenizer):
    seen = []

    def verify(text, gold):
        seen.append(gold)
        return float(len(seen) % 2)

    made = routing.trainer(adapted, tiny_tokenizer, ROWS, routing.Reward(verify), settings(), 0)
    before = lora(adapted)
    made.train()
    assert seen == [row["team"] for row in ROWS for _ in range(4)]
    assert (lora(adapted) - before).abs().max() > 0
    log = [entry for entry in made.state.log_history if "reward" in entry]
    assert [entry["reward"] for entry in log] == [0.5, 0.5] and log[0]["verifier_errors"] == 0


def test_reading_a_prompt_once_changes_no_number(adapted, tiny_tokenizer):
    made = routing.trainer(
        adapted, tiny_tokenizer, ROWS, routing.Reward(lambda t, g: 1.0), settings(temperature=1.3), 0
    )
    rows = [ROWS[0] | {"prompt": [{"role": "user", "content": "Where is it, please?"}]}, *ROWS[1:3]]
    batch = made._generate_and_score_completions([row for row in (rows[1], rows[0]) for _ in range(4)])
    order = torch.tensor([3, 0, 7, 5, 1, 2, 6, 4])  # TRL mixes the rows
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)[order]
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)[order]
    mask[::3, -2:] = 0  # as after an end token
    assert mask[:, 0].min() == 0  # prompts of two lengths
    written, weights = batch["completion_ids"].shape[1], [p for p in adapted.parameters() if p.requires_grad]
    judged = mask[:, -written:]
    from trl import GRPOTrainer

    theirs = GRPOTrainer._get_per_token_logps_and_entropies(made, adapted, ids, mask, written, compute_entropy=True)
    ours = made._get_per_token_logps_and_entropies(adapted, ids, mask, written, compute_entropy=True)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a * judged, b * judged, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad((f[0] * judged).sum(), weights) for f in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_without_a_reward_nothing_moves(adapted, tiny_tokenizer):
    made = routing.trainer(adapted, tiny_tokenizer, ROWS, routing.Reward(lambda text, gold: 0.0), settings(), 0)
    before = lora(adapted)
    made.train()
    assert torch.equal(lora(adapted), before)


def test_recipes_start_where_they_say(tiny_model, tiny_tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "load", lambda *a, **k: tiny_model())
    monkeypatch.setattr(models, "load_tokenizer", lambda *a: tiny_tokenizer)
    fresh, made = routing.prepare_with(settings(longest=90, steps=1, prompts=5))
    assert len(made.train_dataset) == 5 and made.train_dataset[0]["team"] == "shop"
    assert {p.dtype for name, p in fresh.named_parameters() if "lora_" in name} == {torch.float32}
    _, sft = routing.prepare_with(settings(task="route_sft", longest=90, batch_size=5))
    assert len(sft.train_dataset) == 5
    asked = []
    monkeypatch.setattr(routing, "adapter", lambda *a: asked.append(a) or tmp_path)
    monkeypatch.setattr(preferences, "continued", lambda folder, exact: (folder, exact))
    assert routing.start_model(settings(start="route_sft")) == (tmp_path, True)
    assert asked == [("route_sft", "cpu", 0)]


def test_settings_are_those_of_the_task():
    assert routing.settings("route_grpo", "ci").profile == "ci"
    with pytest.raises(CourseError, match="ticket_lora is no recipe of the routing task"):
        routing.settings("ticket_lora", "cpu")


def test_the_key_follows_the_start(monkeypatch):
    before = routing.key("route_grpo", "cpu", 0), routing.key("route_sft", "cpu", 0)
    real = recipes.key
    monkeypatch.setattr(recipes, "key", lambda name, *a: real(name, *a) + "x" * (name == "route_sft"))
    assert all(
        a != b for a, b in zip(before, [routing.key(n, "cpu", 0) for n in ("route_grpo", "route_sft")], strict=True)
    )


def test_a_cached_adapter_is_not_trained_again(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "cache_dir", lambda: tmp_path)
    folder = routing.cached("route_sft", "cpu", 0)
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").touch()
    monkeypatch.setattr(routing, "prepare", lambda *a: pytest.fail("trained"))
    assert routing.adapter("route_sft", "cpu") == folder


# --- references ------------------------------------------------------------------------------------------------------


def test_easy_first_keeps_the_teams_in_turn(monkeypatch):
    s = settings(longest=130, steps=3, prompts=5, order="easy_first")
    plain = routing.prompt_records(settings(longest=130, steps=3, prompts=5))
    monkeypatch.setattr(routing, "start_model", lambda *a: None)
    monkeypatch.setattr(models, "load_tokenizer", lambda *a: None)
    monkeypatch.setattr(routing, "expected_reward", lambda model, tokenizer, found: np.arange(len(found)))
    found = routing.prompt_records(s)
    assert [r["id"] for r in found] == [r["id"] for start in (10, 5, 0) for r in plain[start : start + 5]]


def test_measure(monkeypatch):
    records = routing.load("dev", 10)
    always_shop = np.tile([0.6, 0.1, 0.1, 0.1, 0.1], (10, 1))
    monkeypatch.setattr(routing, "team_probabilities", lambda *a: always_shop)
    found = routing.measure(None, None, records)
    assert found["expected_reward"].value == pytest.approx(0.2) and found["right"].value == 0.2
    assert found["macro_f1"].value == pytest.approx(2 * 0.2 / 1.2 / 5)


def test_reference_is_resumed(monkeypatch, tmp_path, capsys):
    trained = []
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    monkeypatch.setattr(routing, "load_model", lambda name, *a: trained.append((name, "")))
    made = types.SimpleNamespace(train=lambda: None)
    monkeypatch.setattr(routing, "prepare_with", lambda s, seed: trained.append(vars(s)) or (None, made))
    monkeypatch.setattr(routing, "for_use", lambda model: model)
    monkeypatch.setattr(models, "load_tokenizer", lambda *a: None)
    one = {"expected_reward": evaluation.Estimate(0.5, 0.4, 0.6, 9)}
    monkeypatch.setattr(routing, "measure", lambda *a: one)
    routing.make_reference([0])
    rows = reference.read("route_grpo", "sweeps")
    assert {(r["control"], r["knob"], r["piece"]) for r in rows} >= {
        ("", "", ""),
        ("learning_rate_0", "", ""),
        ("", "scale", "none"),
    }
    assert rows[0]["value"] == "0.5000" and len(reference.read("route_sft", "sweeps")) == 3
    assert any(s["learning_rate"] == 0.0 for s in trained if isinstance(s, dict))
    before = len(trained)
    routing.make_reference([0])
    assert len(trained) == before and "training" not in capsys.readouterr().out.split("(1/")[-1]
