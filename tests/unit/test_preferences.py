import copy
import math
import types

import pytest
import torch

from course_lib import CourseError, cli, models, preferences, profiles, recipes, reference, replies

SETTINGS = {
    "start": "reply_sft", "task": "preferences", "loss": "sigmoid", "beta": 0.1, "kind": "all", "per_ticket": 1,
    "simpo_gamma": 0.5, "sample_skip": 0, "sample_tickets": 6, "sample_replies": 3, "held_out": 2, "pairs": 4,
    "learning_rate": 1e-2, "batch_size": 2, "schedule": "constant", "warmup": 0, "beta2": 0.95, "epochs": 1,
}  # fmt: skip


def settings(**changes):
    return types.SimpleNamespace(**SETTINGS | {"profile": "cpu"} | changes)


def row(i):
    side = {"chosen": f"yes, order {i}.", "rejected": f"no no {i}"}
    made = {name: [{"role": "assistant", "content": text}] for name, text in side.items()}
    return {"prompt": [{"role": "user", "content": f"Where is {i}?"}]} | made


ROWS = [row(i) for i in range(4)]


@pytest.fixture
def adapted(tiny_model):
    """The tiny model with an adapter that says something already, as after a first training."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


def sequence_logps(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    taken = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return (taken * batch["completion_mask"][:, 1:]).sum(1)


def test_losses_by_hand_equal_trl(adapted, tiny_tokenizer):
    made = preferences.trainer(adapted, tiny_tokenizer, ROWS[:2], settings(), 0, precompute_ref_log_probs=False)
    batch = made.data_collator([made.train_dataset[i] for i in range(2)])
    with torch.no_grad():
        assert made.compute_loss(adapted, batch).item() == pytest.approx(math.log(2), abs=1e-6)
        for name, parameter in adapted.named_parameters():
            if ".default." in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
        (c, r), lengths = sequence_logps(adapted, batch).chunk(2), batch["completion_mask"].sum(1).chunk(2)
        adapted.set_adapter("ref")
        rc, rr = sequence_logps(adapted, batch).chunk(2)
        adapted.set_adapter("default")
        margin = (c - rc) - (r - rr)
        assert margin.abs().max() > 0.1
        sigmoid = -torch.nn.functional.logsigmoid(0.1 * margin).mean()
        ipo = (((c - rc) / lengths[0] - (r - rr) / lengths[1] - 5) ** 2).mean()
        assert made.compute_loss(adapted, batch).item() == pytest.approx(sigmoid.item(), rel=1e-5)
        made.loss_types = ["ipo"]
        assert made.compute_loss(adapted, batch).item() == pytest.approx(ipo.item(), rel=1e-5)


def test_sums_are_not_in_bfloat16(adapted, tiny_tokenizer):
    model = adapted.to(torch.bfloat16)
    for name, parameter in model.named_parameters():  # as in a recipe: TRL's copy of the adapter is in float32 too
        if "lora_" in name:
            parameter.data = parameter.data.float()
    made = preferences.trainer(model, tiny_tokenizer, ROWS[:2], settings(), 0, precompute_ref_log_probs=False)
    batch = made.data_collator([made.train_dataset[i] for i in range(2)])
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert model(**given).logits.dtype == torch.float32
        assert made.compute_loss(model, batch).item() == pytest.approx(math.log(2), abs=1e-3)
        assert preferences.for_use(model)(**given).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid+sft", "ipo", "simpo", "orpo"])
def test_each_loss_trains_the_adapter_alone(adapted, tiny_tokenizer, loss):
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    made = preferences.trainer(adapted, tiny_tokenizer, ROWS, settings(loss=loss), 0)
    made.train()
    log = preferences.history(made, "loss", "rewards/margins")
    assert log["step"] == [1, 2] and len(log["rewards/margins"]) == 2 and all(map(math.isfinite, log["loss"]))
    if loss == "sigmoid":
        assert log["loss"][0] == pytest.approx(math.log(2), abs=1e-3)
    model = preferences.for_use(made.model)
    assert list(model.peft_config) == ["default"] and not model.training
    after = dict(model.named_parameters())
    assert set(after) == set(before)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("lora_" in name for name in moved)


def test_a_batch_of_one_and_a_prompt_that_is_too_long(adapted, tiny_tokenizer):
    long = copy.deepcopy(ROWS[0])
    long["prompt"][0]["content"] = "x" * 600
    made = preferences.trainer(adapted, tiny_tokenizer, [ROWS[0], long], settings(batch_size=1), 0)
    assert len(made.train_dataset) == 1  # TRL leaves it out, since no token of the reply would be left
    made.train()
    assert made.state.global_step == 1


# --- what is learnt from ---------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    table = {"reply_dpo": SETTINGS | {"sizes": {"ci": {"stored": True}}}, "ticket_lora": {}, "reply_sft": {}}
    monkeypatch.setattr(profiles, "index", lambda: {"recipes": table})
    monkeypatch.setattr(replies, "SAMPLES", tmp_path / "sampled.jsonl")
    monkeypatch.setattr(preferences, "key", lambda *_: "key")
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    return table


def test_pairs_of_a_recipe_and_those_held_out(place):
    s = preferences.settings("reply_dpo", "ci")
    assert s.profile == "ci"
    drawn = preferences.samples(s)  # nothing is stored: the four writers'
    assert len(drawn) == 6 and all(len(x["replies"]) == 3 for x in drawn)
    seen, unseen = (preferences.pair_rows(s, held_out=x) for x in (False, True))
    assert seen and all(list(pair) == ["prompt", "chosen", "rejected"] for pair in seen + unseen)
    assert not {str(p["prompt"]) for p in seen} & {str(p["prompt"]) for p in unseen}
    s.shuffled_labels, s.pairs = True, None
    turned = preferences.pair_rows(s)
    assert [sorted((str(p["chosen"]), str(p["rejected"]))) for p in turned[: len(seen)]] == [
        sorted((str(p["chosen"]), str(p["rejected"]))) for p in seen
    ]


def test_stored_samples_are_read(place):
    s = preferences.settings("reply_dpo", "ci")
    stored = replies.drawn(preferences.sample_records(s), 2, seed=9)
    preferences.keep_samples(stored, s, path=replies.SAMPLES)
    assert preferences.samples(s) == stored
    about = replies.read_samples(replies.SAMPLES)[1]
    assert {"recipe", "profile", "seed", "temperature", "dtype", "key", "versions"} <= set(about)


def test_samples_come_from_the_cache(place, monkeypatch):
    s = preferences.settings("reply_dpo", "cpu")
    kept = replies.drawn(preferences.sample_records(s), 2)
    preferences.keep_samples(kept, s)
    monkeypatch.setattr(preferences, "load", None)
    assert preferences.samples(s) == kept


def test_nothing_to_prefer_is_said(place, monkeypatch):
    s = preferences.settings("reply_dpo", "ci")
    bad = [{"ticket_id": r["id"], "replies": ["Thanks.", ""]} for r in preferences.sample_records(s)]
    monkeypatch.setattr(preferences, "samples", lambda *_: bad)
    with pytest.raises(CourseError, match="nothing to prefer"):
        preferences.pair_rows(s)


def test_a_recipe_without_a_start_is_refused(place):
    with pytest.raises(CourseError, match="starts from the base"):
        preferences.settings("ticket_lora", "ci")


def test_demonstrations_have_a_share_of_tickets(place):
    rows = preferences.demonstration_rows(settings(train=17, tickets_share=0.15))
    asked = [row["prompt"][0]["content"] for row in rows]
    assert asked.count(replies.SYSTEM) == 17 and len(rows) == 20


def test_an_adapter_is_trained_once(place, monkeypatch):
    trained = []

    def prepare(name, profile, seed):
        trained.append(name)
        return None, types.SimpleNamespace(train=lambda: None, state=types.SimpleNamespace(log_history=[]))

    def keep(model, name, profile, seed, about):
        folder = preferences.cached(name, profile, seed)
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").touch()

    monkeypatch.setattr(preferences, "prepare", prepare)
    monkeypatch.setattr(preferences, "for_use", lambda model: model)
    monkeypatch.setattr(preferences, "keep", keep)
    assert preferences.adapter("reply_dpo", "ci") == preferences.adapter("reply_dpo", "ci")
    assert trained == ["reply_dpo"]


def test_a_recipe_from_the_base_is_left_to_recipes(place, monkeypatch):
    monkeypatch.setattr(recipes, "adapter", lambda *given: given)
    assert preferences.adapter("ticket_lora", "ci", 1) == ("ticket_lora", "ci", 1)


# --- references ------------------------------------------------------------------------------------------------------


def test_each_piece_of_the_reference_is_measured_once(tmp_path, monkeypatch, capsys):
    table = {"a": SETTINGS | {"task": "replies"}, "b": SETTINGS | {"sweeps": {"beta": [0.1, 1.0], "loss": ["ipo"]}}}
    monkeypatch.setattr(profiles, "index", lambda: {"recipes": table})
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    monkeypatch.setattr(preferences, "key", lambda *_: "key")
    measured, stored = [], []

    def piece(name, seed, control, knob, setting):
        measured.append((name, seed, control, knob, setting))
        common = {"profile": "cpu", "seed": seed, "control": control, "knob": knob}
        common["piece"] = "" if setting is None else setting
        reference._replace(name, "sweeps", common, [common | {"metric": "m", "value": "1", "key": "key"}])

    monkeypatch.setattr(preferences, "_piece", piece)
    monkeypatch.setattr(preferences, "store_samples", lambda s: stored.append(s.profile))
    for _ in range(2):
        preferences.make_reference((0, 1), ("a", "b"))
    assert measured == [
        ("a", 0, "", "", None), ("a", 1, "", "", None), ("b", 0, "", "", None), ("b", 1, "", "", None),
        ("b", 0, "learning_rate_0", "", None), ("b", 0, "shuffled_labels", "", None),
        ("b", 0, "", "beta", 0.1), ("b", 0, "", "beta", 1.0), ("b", 0, "", "loss", "ipo"),
    ]  # fmt: skip
    assert set(stored) == {"cpu"} and "stored" in capsys.readouterr().out


def test_a_lesson_names_the_module_that_measures_its_recipes(monkeypatch):
    table = {"id": "06_x", "introduces": ["b"], "reference": "preferences"}
    monkeypatch.setattr(profiles, "lesson", lambda name: table)
    monkeypatch.setattr(profiles, "index", lambda: {"recipes": {"b": SETTINGS}})
    asked = []
    monkeypatch.setattr(preferences, "make_reference", asked.append)
    assert not cli.main(["reference", "06", "--seed", "1"]) and asked == [(1,)]


# --- measuring -------------------------------------------------------------------------------------------------------


def test_wins_count_ties_half():
    record = replies.load("test", 1)[0]
    good = replies.examples([record], careful=True)[0]["completion"][0]["content"]
    assert preferences.wins([record] * 3, [good, "x", "x"], ["x", "x", good]) == [1, 0.5, 0]


def test_completion_logps_are_sums(tiny_model, tiny_tokenizer):
    model = tiny_model()
    found = preferences.completion_logps(model, tiny_tokenizer, ROWS[:2], "chosen")
    for pair, value in zip(ROWS[:2], found, strict=True):
        head = tiny_tokenizer.apply_chat_template(pair["prompt"], tokenize=False, add_generation_prompt=True)
        text = head + pair["chosen"][0]["content"] + tiny_tokenizer.eos_token
        ids = tiny_tokenizer(text, return_tensors="pt")["input_ids"]
        start = len(tiny_tokenizer(head)["input_ids"])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        assert value == pytest.approx(logps[start - 1 :].sum().item(), rel=1e-4)


def test_a_preference_loss_trains_in_float32(monkeypatch, adapted):
    adapted = adapted.to(torch.bfloat16)
    monkeypatch.setattr(models, "load", lambda adapter: adapted)
    monkeypatch.setattr(models, "base_path", lambda: "base")
    model = preferences.continued("folder", exact=True)
    trained = {p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {torch.float32} and model.peft_config["default"].base_model_name_or_path == "base"


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float16), ("cuda", torch.float32)])
def test_on_a_gpu_an_adapter_goes_on_in_float32(monkeypatch, adapted, device, dtype):
    """A loss scaler refuses gradients in float16, a T4's dtype; on a CPU mixed dtypes only cost time."""
    adapted = adapted.to(torch.float16)
    monkeypatch.setattr(models, "load", lambda adapter: adapted)
    monkeypatch.setattr(models, "base_path", lambda: "base")
    monkeypatch.setattr(preferences.hardware, "device", lambda: device)
    model = preferences.continued("folder")
    assert {p.dtype for name, p in model.named_parameters() if p.requires_grad} == {dtype}


# --- what is stored --------------------------------------------------------------------------------------------------


def stored(name):
    rows = reference.read(name, "sweeps")
    return rows or pytest.skip(f"nothing of {name} is stored yet: make reference")


@pytest.mark.parametrize("name", ["reply_sft", "reply_dpo", "reply_kto"])
def test_stored_references_say_where_they_come_from(name):
    for row in stored(name) + reference.read(name, "curves"):
        assert all(row[column] for column in reference.PROVENANCE), row
    settings = preferences.settings(name, "cpu")
    for row in stored(name):
        assert not row["knob"] or row["knob"] in profiles.index()["recipes"][name]["sweeps"]
        assert (
            not row["knob"] or str(getattr(settings, row["knob"], None)) != row["setting"]
        )  # the recipe's own is a seed


def test_with_verdicts_by_a_coin_nothing_is_won():
    def passes(name, control=""):
        rows = [r for r in stored(name) if r["metric"] == "rubric_pass" and r["control"] == control and not r["knob"]]
        found = {r["seed"]: float(r["value"]) for r in rows}
        return found or pytest.skip(f"no control {control!r} of {name} is stored yet")

    start, ours, coin = passes("reply_sft"), passes("reply_dpo"), passes("reply_dpo", "shuffled_labels")
    low = next(t for t in profiles.lessons() if t["id"] == "06_dpo")["bands"]["cpu"]["dpo_minus_sft"][0]
    # Each from the start of its own seed: the control is outside of the band.
    assert min(ours[seed] - start[seed] for seed in ours) > low > max(coin[seed] - start[seed] for seed in coin)


def test_the_stored_sample_says_where_it_comes_from():
    if not replies.SAMPLES.exists():
        pytest.skip("no sample is stored yet: make reference LESSON=06")
    samples, about = replies.read_samples()
    assert about["recipe"] == "reply_sft" and about["temperature"] == replies.TEMPERATURE and about["versions"]
    s = preferences.settings("reply_dpo", "cpu")
    assert [x["ticket_id"] for x in samples] == [r["id"] for r in preferences.sample_records(s)]
    assert all(len(x["replies"]) == s.sample_replies for x in samples)
