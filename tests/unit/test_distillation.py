import functools

import pytest
import torch

from course_lib import CourseError, distillation, training


@pytest.fixture
def rows():
    words = ["a", "bb ccc", "dd eee fff ggg", "h", "iii jjj", "k l"]
    return [
        {"prompt": [{"role": "user", "content": w}], "completion": [{"role": "assistant", "content": w[::-1]}]}
        for w in words
    ]


# --- cutting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "wanted"),
    [(10, [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]), (2, [0, 29]), (30, list(range(30)))],
)
def test_first_and_last_layer_are_kept(depth, wanted):
    assert distillation.kept_layers(depth, 30) == wanted


@pytest.mark.parametrize("depth", [1, 31])
def test_a_depth_that_cannot_be_cut_is_refused(depth):
    with pytest.raises(CourseError, match=f"{depth} layers cannot be cut from 30"):
        distillation.kept_layers(depth, 30)


def test_all_layers_kept_is_the_teacher(tiny_model):
    teacher = tiny_model()
    ids = torch.tensor([[5, 6, 7, 8]])
    copy = distillation.cut(teacher, [0, 1])
    with torch.no_grad():
        assert torch.equal(copy(ids).logits, teacher(ids).logits)


def test_a_cut_student_has_its_layers_and_shares_nothing(tiny_model, tiny_tokenizer):
    teacher = tiny_model(dtype=torch.bfloat16).requires_grad_(False)
    before = teacher.model.layers[1].mlp.up_proj.weight.clone()
    student = distillation.cut(teacher, [1])
    assert student.config.num_hidden_layers == len(student.model.layers) == 1
    assert teacher.config.num_hidden_layers == len(teacher.model.layers) == 2
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert torch.equal(student.model.layers[0].mlp.up_proj.weight, before.float())
    assert student.model.layers[0].self_attn.layer_idx == 0 and teacher.model.layers[1].self_attn.layer_idx == 1
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight.add_(1.0)
    assert torch.equal(teacher.model.layers[1].mlp.up_proj.weight, before)
    frozen = [name for name, p in student.named_parameters() if not p.requires_grad]
    assert frozen == ["model.embed_tokens.weight"] or "lm_head" in str(frozen)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_cut_student_writes(tiny_model, tiny_tokenizer):
    from course_lib import evaluation

    student = distillation.cut(tiny_model(), [1])
    prompts = [[{"role": "user", "content": text}] for text in ("abc", "de")]
    for prompt, answer in zip(
        prompts, evaluation.generate(student, tiny_tokenizer, prompts, max_new_tokens=4), strict=True
    ):
        text = tiny_tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids, new = tiny_tokenizer(text, add_special_tokens=False)["input_ids"], []
        while len(new) < 4 and tiny_tokenizer.eos_token_id not in new:
            with torch.no_grad():
                new.append(student(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax().item())
        new = [token for token in new if token != tiny_tokenizer.eos_token_id]
        assert answer.text == tiny_tokenizer.decode(new, skip_special_tokens=False)


def test_told_keeps_tickets_and_texts_together():
    found = distillation.told([{"text": "one"}, {"text": "two"}], ["1", "2"])
    assert [row["prompt"][1]["content"] for row in found] == ["one", "two"]
    assert [row["completion"] for row in found] == [[{"role": "assistant", "content": c}] for c in "12"]
    with pytest.raises(ValueError):
        distillation.told([{"text": "one"}], [])


# --- batches and losses ----------------------------------------------------------------------------------------------


def test_batches_hold_every_row_once_with_little_padding(tiny_tokenizer, rows):
    found = distillation.batches(tiny_tokenizer, rows, 4)
    assert [len(b["input_ids"]) for b in found] == [4, 2]
    lengths = [n for b in found for n in b["attention_mask"].sum(1).tolist()]
    assert sorted(lengths) == sorted(len(ids) for ids, _ in training.encode(tiny_tokenizer, rows))
    assert max(lengths[:4]) <= min(lengths[4:])


def test_label_loss_is_that_of_the_loop_by_hand(tiny_model, tiny_tokenizer, rows):
    model, batch = tiny_model(), distillation.batches(tiny_tokenizer, rows, 6)[0]
    with torch.no_grad():
        assert distillation.label_loss(model, batch).item() == pytest.approx(training.loss(model, batch).item(), 1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_equals_trl(beta, temperature):
    from trl.experimental.gkd import GKDTrainer

    student, teacher = torch.randn(2, 7, 50, generator=torch.manual_seed(0)) * 3
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=temperature)
    assert distillation.divergence(student, teacher, beta, temperature).item() == pytest.approx(theirs.item(), abs=1e-5)


def test_divergence_is_zero_where_both_agree_and_directions_differ():
    student, teacher = torch.randn(2, 5, 20, generator=torch.manual_seed(0))
    for beta in (0.0, 0.5, 1.0):
        assert distillation.divergence(teacher, teacher + 3, beta).item() == pytest.approx(0, abs=1e-6)
    forward, reverse = (distillation.divergence(student, teacher, beta).item() for beta in (0.0, 1.0))
    assert forward > 0 and reverse > 0 and abs(forward - reverse) > 1e-3


def test_buckets_sum_to_one_and_lose_nothing_when_all_are_kept():
    student, teacher = torch.randn(2, 5, 20, generator=torch.manual_seed(0)) * 2
    full = distillation.divergence(student, teacher).item()
    previous = 0.0
    for k in (1, 5, 19):
        ids = teacher.topk(k).indices
        ours, theirs = distillation.bucketed(student, ids), distillation.bucketed(teacher, ids)
        assert torch.allclose(theirs.exp().sum(1), torch.ones(5), atol=1e-5)
        part = distillation.divergence(ours, theirs).item()
        assert previous <= part <= full + 1e-5
        previous = part
    assert previous == pytest.approx(full, abs=1e-4)


def test_the_teachers_own_loss_is_zero(tiny_model, tiny_tokenizer, rows):
    teacher = tiny_model()
    batch = distillation.with_teacher(teacher, distillation.batches(tiny_tokenizer, rows, 3)[0], 8)
    assert batch["teacher_log_p"].shape == (len(distillation.judged_tokens(batch)), 9)
    with torch.no_grad(), training.autocast(teacher):  # as in training: both sides in one number format
        assert distillation.teacher_loss(teacher, batch).item() == pytest.approx(0, abs=1e-4)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [distillation.label_loss, distillation.teacher_loss])
def test_training_lowers_either_loss(tiny_model, tiny_tokenizer, rows, loss):
    teacher = tiny_model()
    batches = [distillation.with_teacher(teacher, b, 16) for b in distillation.batches(tiny_tokenizer, rows, 2)]
    student = distillation.cut(teacher, [0])
    log = distillation.train(student, batches, loss, 24, 3e-3)
    assert len(log) == 24 and sum(log[-6:]) < 0.8 * sum(log[:6])
    assert not student.training
    assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight)


def test_a_rate_of_zero_changes_nothing(tiny_model, tiny_tokenizer, rows):
    teacher = tiny_model()
    student = distillation.cut(teacher, [0])
    before = {name: p.clone() for name, p in student.named_parameters()}
    distillation.train(student, distillation.batches(tiny_tokenizer, rows, 3), distillation.label_loss, 3, 0.0)
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())


def test_one_step_on_policy_moves_the_student_and_not_the_teacher(tiny_model, tiny_tokenizer, rows):
    teacher = tiny_model().requires_grad_(False)
    student = distillation.cut(teacher, [0])
    before = student.model.layers[0].mlp.up_proj.weight.clone()
    kept = teacher.model.layers[0].mlp.up_proj.weight.clone()
    prompts = [row["prompt"] for row in rows[:4]]
    moved = distillation.on_policy(student, teacher, tiny_tokenizer, prompts, steps=1, batch=2, rate=1e-2, seed=0)
    assert not torch.equal(moved.model.layers[0].mlp.up_proj.weight, before)
    assert torch.equal(teacher.model.layers[0].mlp.up_proj.weight, kept)


# --- references ------------------------------------------------------------------------------------------------------


def test_reference_pieces_are_measured_once(monkeypatch, tmp_path, capsys):
    from course_lib import evaluation, reference

    asked = []
    measured = {"completion_nll": evaluation.mean([1.0, 2.0]), "exact_match": evaluation.proportion([True, False])}
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    monkeypatch.setattr(reference, "swept_metrics", lambda model, n: measured | {"forgetting": None})
    monkeypatch.setattr(distillation, "_piece", lambda *piece: asked.append(piece))
    distillation.make_reference((0,))
    assert len(asked) == sum(map(len, distillation.SWEEPS.values())) and (0, "depth", 5) in asked
    rows = reference.read("student", "sweeps")
    assert len(rows) == 2 * len(asked) and {r["metric"] for r in rows} == {"completion_nll", "exact_match"}
    assert all(row[column] for row in rows for column in ("date", "torch", "key", "value", "n"))
    distillation.make_reference((0,))
    assert len(asked) == sum(map(len, distillation.SWEEPS.values()))
    assert capsys.readouterr().out.count(": stored") == len(asked)


@pytest.mark.parametrize(("knob", "setting"), [("method", "gold"), ("beta", 1.0), ("temperature", 2.0), ("depth", 2)])
def test_reference_pieces_train_what_they_say(monkeypatch, tiny_model, tiny_tokenizer, rows, knob, setting):
    from types import SimpleNamespace

    teacher = tiny_model().requires_grad_(False)
    sizes = SimpleNamespace(steps=2, batch=3, learning_rate=1e-3, heal_steps=1, heal_rate=2e-3)
    gold = distillation.batches(tiny_tokenizer, rows[:3], 3)
    both = [distillation.with_teacher(teacher, b, 8) for b in distillation.batches(tiny_tokenizer, rows, 3)]
    seen, train, materials = [], distillation.train, (teacher, tiny_tokenizer, sizes, gold, both, [rows[0]["prompt"]])
    monkeypatch.setattr(distillation, "_materials", lambda: materials)
    monkeypatch.setattr(distillation, "DEPTH", 2)
    monkeypatch.setattr(distillation, "train", lambda s, *args: seen.append(args) or train(s, *args))
    student = distillation._piece(0, knob, setting)
    assert student.config.num_hidden_layers == 2 and not student.training
    assert seen[0][2:4] == (1, 2e-3)  # the cut is healed first
    assert seen[1][0] is (gold if setting == "gold" else both) and seen[1][3] == 1e-3


# --- healing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(rows):
    return [row["prompt"] for row in rows]


def test_messages_alone_are_all_there_and_end_where_the_answer_begins(tiny_tokenizer, asked):
    found = distillation.messages_alone(tiny_tokenizer, asked, 4)
    assert [len(b["input_ids"]) for b in found] == [4, 2]
    rows = [row for b in found for row in zip(b["input_ids"], b["attention_mask"], strict=True)]
    mine = [ids[mask.bool()].tolist() for ids, mask in rows]
    heads = [tiny_tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in asked]
    assert sorted(mine) == sorted(tiny_tokenizer(h, add_special_tokens=False)["input_ids"] for h in heads)


def test_a_whole_copy_is_at_no_distance_and_a_cut_one_is(tiny_model, tiny_tokenizer, asked):
    teacher = tiny_model().requires_grad_(False)
    batch = distillation.messages_alone(tiny_tokenizer, asked, 4)[0]
    with training.autocast(teacher):  # as in training: both sides in one number format
        assert distillation.hidden_loss(teacher, [0, 1], distillation.cut(teacher, [0, 1]), batch).item() == 0
        assert distillation.hidden_loss(teacher, [1], distillation.cut(teacher, [1]), batch).item() > 0


def test_the_distance_is_that_of_the_formula_and_padding_does_not_count(tiny_model, tiny_tokenizer, asked):
    teacher, keep = tiny_model().requires_grad_(False), [0, 1]
    student = distillation.cut(teacher, keep)
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        batch = distillation.messages_alone(tiny_tokenizer, asked, 6)[0]
        assert not batch["attention_mask"].all()  # else padding is not tried
        tokens = []
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            ask = {"input_ids": ids[mask.bool()][None], "output_hidden_states": True}
            ours, goal = (model(**ask).hidden_states[1:] for model in (student, teacher))
            pairs = zip(ours, goal, strict=True)
            tokens.append(torch.stack([((a - b)[0] ** 2).sum(-1) / (b[0] ** 2).sum(-1) for a, b in pairs]).mean(0))
        found = distillation.hidden_loss(teacher, keep, student, batch)
    assert found.item() == pytest.approx(torch.cat(tokens).mean().item(), rel=1e-4)


def test_healing_brings_a_cut_student_nearer(tiny_model, tiny_tokenizer, asked):
    teacher, keep = tiny_model().requires_grad_(False), [1]
    student = distillation.cut(teacher, keep)
    loss = functools.partial(distillation.hidden_loss, teacher, keep)
    log = distillation.train(student, distillation.messages_alone(tiny_tokenizer, asked, 6), loss, 20, 1e-2)
    assert log[-1] < 0.8 * log[0]
