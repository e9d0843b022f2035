from types import SimpleNamespace

import pytest

from course_lib import feedback

S = SimpleNamespace(
    batch_size=4, epochs=1, learning_rate=1e-3, schedule="constant", warmup=0, beta2=0.95, beta=0.1, rank=4, alpha=8
)


def rows(n=8, ups=None, prompts=None):
    return [
        {
            "prompt": [{"role": "user", "content": f"question {i % (prompts or n)}"}],
            "completion": [{"role": "assistant", "content": f"answer {i}"}],
            "label": i % 2 == 0 if ups is None else i < ups,
        }
        for i in range(n)
    ]


def reply(row, text):
    return row | {"completion": [{"role": "assistant", "content": text}]}


# --- faults ----------------------------------------------------------------------------------------------------------


def test_sound_feedback_passes(tiny_tokenizer):
    feedback.check(rows(), tiny_tokenizer, 4, 512)
    feedback.check(rows(6), tiny_tokenizer, 4, 512)  # a last batch of two


@pytest.mark.parametrize(
    ("given", "batch_size", "said"),
    [
        ([], 4, "there is no feedback"),
        (rows(), 1, "a batch of 1 has no reply of another ticket"),
        (rows(8, ups=8), 4, "all 8 thumbs are up"),
        (rows(8, ups=0), 4, "all 8 thumbs are down"),
        (rows(9), 4, "9 rows in batches of 4 leave a last batch of one"),
        ([*rows(7), reply(rows(8)[7], " \n")], 4, "row 8: the reply is empty"),
        ([reply(rows()[0], "y" * 600), *rows()[1:]], 4, r"row 1: message and reply have \d+ tokens, the limit is 512"),
        ([rows()[0] | {"label": "False"}, *rows()[1:]], 4, "row 1: the label is 'False'"),
        ([rows()[0] | {"label": 1}, *rows()[1:]], 4, "row 1: the label is 1"),
    ],
)
def test_feedback_that_cannot_teach_is_refused(tiny_tokenizer, given, batch_size, said):
    with pytest.raises(feedback.FeedbackError, match=said):
        feedback.check(given, tiny_tokenizer, batch_size, 512)


def test_the_trainer_refuses_before_it_touches_the_model(tiny_lora, tiny_tokenizer):
    model = tiny_lora()
    for bad, batch_size in ((rows(8, ups=8), 4), (rows(), 1)):
        with pytest.raises(feedback.FeedbackError):
            feedback.trainer(model, tiny_tokenizer, bad, SimpleNamespace(**vars(S) | {"batch_size": batch_size}), 0)
    assert list(model.peft_config) == ["default"]


# --- fewer, wrong, lopsided -------------------------------------------------------------------------------------------


def labels(rows):
    return [row["label"] for row in rows]


def test_fewer_thumbs_keep_both_kinds():
    some = feedback.kept(rows(40, ups=30), 0.1, seed=0)
    assert labels(some).count(True) == 3 and labels(some).count(False) == 1
    assert some == feedback.kept(rows(40, ups=30), 0.1, seed=0)
    assert sorted(map(str, feedback.kept(rows(), 1.0, 0))) == sorted(map(str, rows()))
    assert labels(feedback.kept(rows(8, ups=8), 0.5, 0)) == [True] * 4


def test_wrong_thumbs_are_turned_and_nothing_else():
    wrong = feedback.turned(rows(40), 0.2, seed=0)
    assert sum(a != b for a, b in zip(labels(wrong), labels(rows(40)), strict=True)) == 8
    assert [r["completion"] for r in wrong] == [r["completion"] for r in rows(40)]
    assert feedback.turned(rows(), 0.0) == rows()


def test_nine_to_one_takes_what_the_sample_has(monkeypatch):
    from course_lib import replies

    good = [{"ticket_id": f"t{i}", "replies": [f"good {i}"]} for i in range(30)]
    bad = [{"ticket_id": f"u{i}", "replies": [f"bad {i}"]} for i in range(20)]
    monkeypatch.setattr(replies, "record", lambda name: {"id": name})
    monkeypatch.setattr(replies, "messages", lambda record: [{"role": "user", "content": record["id"]}])
    monkeypatch.setattr(replies, "passes", lambda record, text: text.startswith("good"))
    found = labels(feedback.nine_to_one(good + bad, complaints=2, seed=1))
    assert found.count(True) == 18 and found.count(False) == 2
    found = labels(feedback.nine_to_one(good + bad, complaints=10, seed=1))
    assert found.count(True) == 27 and found.count(False) == 3
    with pytest.raises(feedback.FeedbackError, match="0 thumbs up and 20 down"):
        feedback.nine_to_one(bad, 2)


# --- order -----------------------------------------------------------------------------------------------------------


def test_unpaired_rows_are_mixed_once():
    pairs = [
        {"prompt": r["prompt"], "chosen": r["completion"], "rejected": reply(r, "no")["completion"]} for r in rows(16)
    ]
    thumbs = feedback.unpaired(pairs)
    assert len(thumbs) == 32 and sum(r["label"] for r in thumbs) == 16
    mixed = feedback.in_order(thumbs, 4, seed=0)
    assert sorted(map(str, mixed)) == sorted(map(str, thumbs))
    assert mixed == feedback.in_order(thumbs, 4, seed=0) != feedback.in_order(thumbs, 4, seed=1)
    assert 4 < sum(r["label"] for r in mixed[:16]) < 12  # not all thumbs up first


def test_no_reply_stands_beside_one_to_the_same_ticket():
    mixed = feedback.in_order(rows(24, prompts=12), 4, seed=0)
    for start in range(0, 24, 4):
        for kept, other in feedback.mismatched(mixed[start : start + 4]):
            assert kept["prompt"] != other["prompt"]


def test_a_last_batch_of_one_is_left_out():
    assert len(feedback.in_order(rows(9), 4, seed=0)) == 8
    assert len(feedback.in_order(rows(10), 4, seed=0)) == 10


def test_feedback_on_one_ticket_has_no_reference_point():
    with pytest.raises(feedback.FeedbackError, match="8 rows about 1 tickets"):
        feedback.in_order(rows(8, prompts=1), 4, seed=0)


# --- what the guards are for: TRL's trainer goes on -------------------------------------------------------------------


def test_trl_pairs_as_mismatched_says_and_a_last_batch_of_one_pairs_with_itself(tiny_lora, tiny_tokenizer, monkeypatch):
    import torch

    monkeypatch.setattr(feedback, "check", lambda *_: None)
    monkeypatch.setattr(feedback, "in_order", lambda rows, *_: rows)
    nine = rows(9)
    trainer = feedback.trainer(tiny_lora(), tiny_tokenizer, nine, S, 0, bf16=False)
    batches = list(trainer.get_train_dataloader())
    own, other = batches[-1]["input_ids"], batches[-1]["KL_input_ids"]
    assert len(own) == 1 and torch.equal(own, other)
    for (kept, given), ids in zip(feedback.mismatched(nine[:4]), batches[0]["KL_input_ids"], strict=True):
        text = tiny_tokenizer.decode(ids)
        assert kept["prompt"][0]["content"] in text and given["completion"][0]["content"] in text


def test_loss_by_hand_is_trls(tiny_lora, tiny_tokenizer):
    """The reference is the model as it came, the weights are applied, and one thumb alone in a batch is no fault."""
    import torch

    s = SimpleNamespace(**vars(S) | {"up_weight": 0.5, "down_weight": 2.0})
    model, reference = tiny_lora(), tiny_lora()
    trainer = feedback.trainer(model, tiny_tokenizer, rows(), s, 0, bf16=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter += 0.05
    batch = next(iter(trainer.get_train_dataloader()))

    def log_p(model, kind=""):
        ids, mask = batch[f"{kind}input_ids"], batch[f"{kind}completion_mask"][:, 1:]
        logits = model(input_ids=ids, attention_mask=batch[f"{kind}attention_mask"], use_cache=False).logits
        return (logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] * mask).sum(1)

    with torch.no_grad():
        ratio, other = (log_p(model, kind) - log_p(reference, kind) for kind in ("", "KL_"))
        up = batch["label"]
        side, weight = torch.where(up, 1.0, -1.0), torch.where(up, 0.5, 2.0)
        by_hand = (weight * (1 - torch.sigmoid(0.1 * side * (ratio - other.mean().clamp(min=0))))).mean()
        found = trainer.compute_loss(model.train(), batch)
    assert other.mean() > 0 and abs(found - by_hand) < 1e-5


def test_sums_over_a_reply_are_not_rounded_to_bfloat16(tiny_lora, tiny_tokenizer):
    """Weights in bfloat16, an adapter in float32, as the recipe has them."""
    import torch

    model = tiny_lora().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.float() if "lora_" in name else parameter.data
    trainer = feedback.trainer(model, tiny_tokenizer, rows(4), S, 0, logging_steps=1)
    trainer.train()
    first = trainer.state.log_history[0]
    assert abs(first["logps/chosen"]) > 64  # where the step of bfloat16 is a half, and a quarter in a mean of two
    assert abs(first["logps/chosen"] * 4 - round(first["logps/chosen"] * 4)) > 1e-3
    assert abs(first["rewards/chosen"]) < 1e-4 and abs(first["rewards/rejected"]) < 1e-4  # the reference is the start


# --- the recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["ci", "cpu", "full", "t4"])
def test_kto_gets_the_replies_that_dpo_gets(profile):
    from course_lib import preferences

    dpo, kto = (vars(preferences.settings(name, profile)) for name in ("reply_dpo", "reply_kto"))
    data = (
        "start",
        "task",
        "kind",
        "per_ticket",
        "pairs",
        "sample_skip",
        "sample_tickets",
        "sample_replies",
        "held_out",
        "stored",
    )
    assert {name: dpo.get(name) for name in data} == {name: kto.get(name) for name in data}


def test_the_recipe_trains_thumbs(monkeypatch, tiny_lora, tiny_tokenizer):
    from course_lib import models, preferences

    pairs = [
        {"prompt": r["prompt"], "chosen": r["completion"], "rejected": reply(r, "no")["completion"]} for r in rows()
    ]
    monkeypatch.setattr(models, "load_tokenizer", lambda: tiny_tokenizer)
    monkeypatch.setattr(preferences, "adapter", lambda *_: "a folder")
    monkeypatch.setattr(preferences, "continued", lambda folder, exact: tiny_lora())
    monkeypatch.setattr(preferences, "pair_rows", lambda s, seed: pairs)
    s = SimpleNamespace(**vars(S) | {"start": "x", "profile": "ci", "task": "preferences", "loss": "kto", "keep": 0.5})
    model, trainer = preferences.prepare_with(s, bf16=False, logging_steps=1)
    assert sorted(trainer.train_dataset["label"]) == [False] * 4 + [True] * 4
    trainer.train()
    assert trainer.state.max_steps == 4  # half of the thumbs, twice
    assert {"loss", "kl"} <= set(trainer.state.log_history[0])
    assert list(preferences.for_use(model).peft_config) == ["default"]


def test_nine_to_one_leaves_the_held_out_tickets_alone(monkeypatch):
    from course_lib import preferences

    seen = []
    monkeypatch.setattr(preferences, "samples", lambda s, seed: ["a", "b", "c"])
    monkeypatch.setattr(feedback, "nine_to_one", lambda samples, wanted, seed: seen.append((samples, wanted)) or rows())
    s = SimpleNamespace(complaints=5, held_out=1)
    assert len(feedback.rows(s)) == 8 and seen == [(["a", "b"], 5)]


# --- the same wrong pairs for several learners -----------------------------------------------------------------------


def pairs(n=10):
    return [
        {"prompt": r["prompt"], "chosen": reply(r, "good")["completion"], "rejected": reply(r, "bad")["completion"]}
        for r in rows(n)
    ]


def test_swapped_pairs_change_places_and_nothing_else():
    some = feedback.swapped(pairs(), 0.4, seed=1)
    turned = [a["chosen"] == b["rejected"] and a["rejected"] == b["chosen"] for a, b in zip(some, pairs(), strict=True)]
    assert sum(turned) == 4 and [p["prompt"] for p in some] == [p["prompt"] for p in pairs()]
    assert [p for p, t in zip(some, turned, strict=True) if not t] == [
        p for p, t in zip(pairs(), turned, strict=True) if not t
    ]
    assert feedback.swapped(pairs(), 0.0) == pairs()
    assert feedback.swapped(pairs(), 0.4, seed=2) != some


def test_all_learners_get_the_same_wrong_pairs_and_what_is_stored_is_not_trained_again(monkeypatch, tmp_path):
    from course_lib import models, preferences, reference, replies

    given = {"pairs": [], "thumbs": []}

    def made_for(kind):
        def make(model, tokenizer, found, s, seed):
            given[kind].append(found)
            return SimpleNamespace(train=lambda: None, state=SimpleNamespace(global_step=12))

        return make

    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    monkeypatch.setattr(models, "load_tokenizer", lambda: None)
    monkeypatch.setattr(replies, "load", lambda *_: [{"id": n} for n in range(4)])
    monkeypatch.setattr(replies, "answers", lambda model, tokenizer, records: ["fine", "no", "fine", "no"])
    monkeypatch.setattr(replies, "passes", lambda record, text: text == "fine")
    monkeypatch.setattr(preferences, "make_reference", lambda *_: None)
    monkeypatch.setattr(preferences, "load", lambda *_: None)
    monkeypatch.setattr(preferences, "key", lambda *_: "key")
    monkeypatch.setattr(preferences, "adapter", lambda *_: "a folder")
    monkeypatch.setattr(preferences, "continued", lambda folder, exact: None)
    monkeypatch.setattr(preferences, "for_use", lambda model: model)
    monkeypatch.setattr(preferences, "pair_rows", lambda s: pairs())
    monkeypatch.setattr(preferences, "trainer", made_for("pairs"))
    monkeypatch.setattr(feedback, "trainer", made_for("thumbs"))
    feedback.make_reference((0,))
    assert len(given["pairs"]) == 6 and len(given["thumbs"]) == 3  # DPO and SFT, KTO: three shares each
    assert given["thumbs"] == [feedback.unpaired(found) for found in given["pairs"][::2]]
    assert given["pairs"][::2] == given["pairs"][1::2] == [feedback.swapped(pairs(), x, 0) for x in (0.0, 0.2, 0.4)]
    stored = reference.read("swapped_pairs", "metrics")
    assert {(r["learner"], r["share"]) for r in stored} == {
        (feedback.START, "0.0"),
        *((name, str(share)) for name in feedback.LEARNERS for share in feedback.SWAPPED),
    }
    assert {(r["value"], r["passes"], r["n"]) for r in stored} == {("0.5000", "1010", "4")}
    feedback.make_reference((0,))
    assert len(given["pairs"]) == 6 and len(given["thumbs"]) == 3
