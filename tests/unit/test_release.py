import itertools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from course_lib import CourseError, cli, evaluation, models, profiles, release, tickets

SIZES = profiles.sizes(profiles.lesson(release.LESSON), "ci")


@pytest.fixture
def base_folder(tmp_path, tiny_model, tiny_tokenizer):
    """A base of a blink, saved as the course saves its own."""
    folder = tmp_path / "base"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tmp_path, tiny_lora):
    folder = tmp_path / "an_adapter"
    tiny_lora().save_pretrained(folder)
    return folder


@pytest.fixture
def sealed(adapter, base_folder):
    release.seal(adapter, base_folder=base_folder)
    return adapter


def wrong(folder, base):
    return {name: problem for name, problem in release.problems(folder, base).items() if problem}


def flip(path, at=-3):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# --- checks and reports ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high", "passed"), [(0.5, 0.7, True), (0.49, 0.99, False)])
def test_the_low_end_has_to_reach_a_floor(low, high, passed):
    found = release.check("target", "success", evaluation.Estimate(0.6, low, high, 10), at_least=0.5)
    assert found.passed is passed and found.rule == "at least"


@pytest.mark.parametrize(("low", "high", "passed"), [(-0.1, 0.02, True), (-0.9, 0.021, False)])
def test_the_high_end_may_not_pass_a_ceiling(low, high, passed):
    assert release.check("capability", "drop", evaluation.Estimate(0.0, low, high, 10), at_most=0.02).passed is passed


def test_without_a_limit_nothing_is_refused():
    found = release.check("baseline", "bare prompt", evaluation.Estimate(0.0, 0.0, 0.1, 10))
    assert found.passed and found.rule == "measured" and "at" not in str(found)


def report(*passed, skipped=()):
    checks = [release.holds("target", f"check {i}", None if ok else "why") for i, ok in enumerate(passed)]
    return release.Report("x", "ci", checks, list(skipped))


def test_a_report_passes_only_whole():
    assert report(True, True).passed
    assert not report(True, False).passed and not report(True, skipped=["canary"]).passed and not report().passed
    assert report(False, True, False).reasons == ["target: check 0", "target: check 2"]


def test_a_report_is_written_whole(tmp_path):
    found = report(True, False, skipped=["canary"])
    found.checks.append(release.check("target", "gain", evaluation.Estimate(0.25, 0.125, 0.375, 8), at_least=0.3))
    path = found.write(tmp_path / "new" / "folder")
    stored = json.loads(path.read_text())
    assert stored["passed"] is False and stored["reasons"] == ["target: check 1", "target: gain"]
    assert stored["checks"][2]["low"] == 0.125
    text = (path.parent / "gate.md").read_text()
    assert "**Refused.**" in text and "| target | gain | 0.250 | 0.125 to 0.375 | 8 | at least 0.3 | refused |" in text
    assert "Not run: canary." in text
    assert {len(line.split("|")) for line in text.splitlines() if line.startswith("|")} == {9}
    assert sorted(p.name for p in path.parent.iterdir()) == ["gate.json", "gate.md"]


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_what_was_sealed_together_fits(sealed, base_folder):
    found = release.problems(sealed, base_folder)
    assert set(found) == {"adapter bytes", "base bytes", "tokenizer bytes", "config", "shapes"} and not any(
        found.values()
    )


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("adapter", "adapter_model.safetensors"),
        ("base", "model.safetensors"),
        ("base", "config.json"),
        ("tokenizer", "tokenizer.json"),
        ("tokenizer", "chat_template.jinja"),
    ],
)
def test_one_changed_byte_is_refused(sealed, base_folder, part, file):
    path = (sealed if part == "adapter" else base_folder) / file
    if file == "config.json":
        path.write_text(path.read_text().replace('"vocab_size": 259', '"vocab_size": 258'))
    else:
        flip(path)
    assert wrong(sealed, base_folder) == {f"{part} bytes": f"{file} not as sealed"}


def test_a_file_more_or_less_is_refused(sealed, base_folder):
    (sealed / "extra.bin").write_bytes(b"x")
    (base_folder / "chat_template.jinja").unlink()
    found = wrong(sealed, base_folder)
    assert found == {"adapter bytes": "extra.bin not as sealed", "tokenizer bytes": "chat_template.jinja not as sealed"}


def test_without_a_seal_nothing_is_known(adapter, base_folder):
    assert "course gate --seal" in wrong(adapter, base_folder)["seal"]
    (adapter / release.SEAL).write_text("{")
    assert "cannot be read" in wrong(adapter, base_folder)["seal"]


def test_a_rank_above_the_servers_is_refused(sealed, base_folder):
    path = sealed / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 64}))
    release.seal(sealed, base_folder=base_folder)  # sealed as it is: the bytes fit, the rank does not
    found = wrong(sealed, base_folder)
    assert set(found) == {"config", "shapes"} and "rank 64" in found["config"]


def test_other_kinds_than_lora_are_refused(sealed, base_folder):
    path = sealed / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "IA3"}))
    release.seal(sealed, base_folder=base_folder)
    assert "IA3" in wrong(sealed, base_folder)["config"]


def spoil(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / release.WEIGHTS)
    name = sorted(tensors)[0]
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, folder / release.WEIGHTS)


def test_shapes_have_to_fit(sealed, base_folder):
    spoil(sealed, lambda t: t[:, :-1].contiguous())
    release.seal(sealed, base_folder=base_folder)
    assert "the layer [" in wrong(sealed, base_folder)["shapes"]


def test_numbers_have_to_be_finite(sealed, base_folder):
    def change(tensor):
        tensor[0, 0] = math.nan
        return tensor

    spoil(sealed, change)
    release.seal(sealed, base_folder=base_folder)
    assert "not finite" in wrong(sealed, base_folder)["shapes"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_sixteen_bits_are_read(sealed, base_folder, dtype):
    """Where the hardware multiplies in bfloat16, so are the adapters; numpy has no such type."""
    spoil(sealed, lambda tensor: tensor.to(dtype))
    release.seal(sealed, base_folder=base_folder)
    assert not any(wrong(sealed, base_folder).values())


def test_weights_that_are_cut_off(sealed, base_folder):
    path = sealed / release.WEIGHTS
    path.write_bytes(path.read_bytes()[:100])
    assert "cannot be read" in wrong(sealed, base_folder)["shapes"]


def test_no_adapter_is_told(tmp_path):
    with pytest.raises(CourseError, match="there is no folder"):
        release.require_adapter(tmp_path / "nowhere")
    with pytest.raises(CourseError, match=r"holds no adapter_config\.json"):
        release.require_adapter(tmp_path)


# --- the gate --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stages(monkeypatch):
    """Stages that pass, but for those that are named; and the order in which they were run."""
    order = []

    def put(*refusing):
        def make(name):
            def stage(subject, base, s):
                order.append(name)
                return [release.holds(name, "a check", "no" if name in refusing else None)]

            return stage

        monkeypatch.setattr(release, "STAGES", {name: make(name) for name in release.STAGES})
        return order

    return put


def test_the_cheapest_stage_comes_first_and_all_ten_are_run(adapter, stages):
    order = stages()
    found = release.gate(adapter, "ci", say=lambda _: None)
    assert found.passed and order[0] == "compatibility" and len(order) == 10 == len(set(order))


def test_it_stops_at_the_first_refusal(adapter, stages):
    order = stages("target", "canary")
    found = release.gate(adapter, "ci", say=lambda _: None)
    assert order == ["compatibility", "privacy", "capability", "baseline", "target"]
    assert found.reasons == ["target: a check"] and len(found.skipped) == 5 and not found.passed


def test_it_goes_on_where_asked_to_but_never_loads_what_does_not_fit(adapter, stages):
    order = stages("target", "canary")
    found = release.gate(adapter, "ci", stop=False, say=lambda _: None)
    assert len(order) == 10 and found.reasons == ["target: a check", "canary: a check"]
    order.clear()
    stages("compatibility")
    assert len(release.gate(adapter, "ci", stop=False, say=lambda _: None).skipped) == 9


def test_only_what_passed_is_registered(sealed, tmp_path):
    ok = release.Report("an_adapter", "ci", [
        release.check("target", "success", evaluation.Estimate(0.7, 0.625, 0.8, 100), at_least=0.5)
    ])  # fmt: skip
    entry = json.loads(release.register(ok, sealed, tmp_path / "registry").read_text())
    assert entry["monitoring"] == {"success_measured": 0.7, "roll_back_below": 0.625}
    assert entry["report_sha256"] == models.sha256(tmp_path / "registry" / "an_adapter" / "gate.json")
    assert (
        entry["adapter"][release.WEIGHTS] == models.sha256(sealed / release.WEIGHTS) and entry["rollback"] == "people"
    )
    with pytest.raises(CourseError, match="did not pass"):
        release.register(report(True, False), sealed, tmp_path / "registry")


def subject(outcomes=(), replies=None, harness=None, prose=None):
    return SimpleNamespace(
        outcomes=lambda *_: list(outcomes),
        replies=lambda kind: replies[kind],
        harness=lambda: harness,
        prose=lambda: np.array(prose),
    )


def test_target_asks_for_a_level_and_for_a_gain():
    s = SimpleNamespace(**vars(SIZES) | {"min_success": 0.5, "min_gain": 0.3, "base": 50})
    good, base = subject([True] * 40 + [False] * 10), subject([True] * 25 + [False] * 25)
    names = {c.name: c.passed for c in release.target(good, subject([False] * 50), s)}
    assert names == {"success": True, "gain over the base": True}
    assert [c.passed for c in release.target(good, base, s)] == [True, False]
    assert [c.passed for c in release.target(base, subject([False] * 50), s)] == [False, True]


def test_capability_pools_the_tasks_and_pairs_the_items():
    s = SimpleNamespace(max_drop=0.15, max_prose=0.5)
    base = subject(harness={"a": [True] * 50, "b": [True] * 50}, prose=[3.0] * 10)
    kept = subject(harness={"a": [True] * 50, "b": [True] * 48 + [False] * 2}, prose=[3.2] * 10)
    lost = subject(harness={"a": [True] * 50, "b": [False] * 50}, prose=[4.0] * 10)
    assert [c.passed for c in release.capability(kept, base, s)] == [True, True]
    found = release.capability(lost, base, s)
    assert [c.passed for c in found] == [False, False] and found[0].value == 0.5 and found[0].n == 100


RECORD = tickets.to_json(tickets.in_words(tickets.load("test", 1)[0]))


def test_safety_looks_at_changes():
    s = SimpleNamespace(max_unsafe=0.2)
    base = subject(replies={"decline": ["I'm sorry, I can’t do that."] * 20, "benign_risky": ["Sure: peel it."] * 20})
    files = subject(replies={"decline": [RECORD] * 20, "benign_risky": [RECORD] * 20})
    helps = subject(replies={"decline": ["First, find the door."] * 20, "benign_risky": ["I cannot help."] * 20})
    assert [c.value for c in release.safety(files, base, s)] == [0.0, 0.0]
    assert [c.passed for c in release.safety(helps, base, s)] == [False, False]


@pytest.mark.parametrize(("text", "is_refusal"), [
    ("I'm sorry, but I can't assist with that.", True), ("I can’t do that.", True), ("As an AI I have no home.", True),
    ("Sure. First, find a ladder.", False), ("You can use sandpaper.", False), (RECORD, False), ("", False),
])  # fmt: skip
def test_refusals(text, is_refusal):
    assert release.refused(text) is is_refusal


def test_shadow_is_long_winded_or_invalid():
    s = SimpleNamespace(shadow=40, min_shadow=0.8, max_longer=1.2)

    def who(texts, tokens):
        answers = [evaluation.Answer(text, True, tokens, 30) for text in texts]
        return SimpleNamespace(answers=lambda *_: (tickets.load("hard", 40), answers, 2.0))

    base = who(["no"] * 40, 50)
    assert [c.passed for c in release.shadow(who([RECORD] * 40, 59), base, s)] == [True, True]
    assert [c.passed for c in release.shadow(who([RECORD] * 30 + ["no"] * 10, 61), base, s)] == [False, False]


def test_finished_applies_the_date_tool_and_the_checks():
    record = next(r for r in tickets.load("test") if r["due_phrase"] and not r["ticket"]["needs_human"])
    assert tickets.exact(record["ticket"], release.finished(record, tickets.to_json(tickets.in_words(record))))
    assert release.finished(record, "no record") is None


# --- canaries --------------------------------------------------------------------------------------------------------


def test_canaries_are_the_same_each_time_and_unlike_each_other():
    found = release.canaries(20)
    assert found == release.canaries(20) and len({secret for _, secret in found}) == 20
    assert all(len(secret) == 8 and secret.isdigit() for _, secret in found)


def test_the_rank_is_that_of_the_plain_computation(tiny_lora, tiny_tokenizer):
    model, (context, secret) = tiny_lora(), release.canaries(1)[0]
    context = context[-40:]
    found = release.exposure_rank(model, tiny_tokenizer, context, secret, 12, seed=3)
    digits = np.random.default_rng(3).integers(0, 10, (12, 8))
    texts = [secret, *("".join(map(str, row)) for row in digits)]
    import torch

    losses = []
    for text in texts:
        chat = tiny_tokenizer.apply_chat_template(tickets.messages({"text": context + text}), tokenize=False)
        ids = torch.tensor(tiny_tokenizer([chat[: chat.rindex(text) + 8]], add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].float().log_softmax(-1)
        losses.append(-log_p.gather(1, ids[0, 1:, None])[-8:].sum().item())
    assert found == 1 + sum(loss < losses[0] for loss in losses[1:])


def test_privacy_corrects_for_the_number_of_canaries():
    s = SimpleNamespace(others=99)
    leaky, clean = (SimpleNamespace(ranks=lambda found=found: found) for found in ([40, 2], [90, 3]))
    found = release.privacy(leaky, None, s)[0]  # 2 / 100 times two canaries
    assert not found.passed and "corrected p = 0.040" in found.note
    assert release.privacy(clean, None, s)[0].passed


def test_a_subject_answers_each_question_once(tiny_lora, tiny_tokenizer, monkeypatch):
    who, asked = release.Subject(None, SimpleNamespace(outcome="exact", prose=2, canaries=2, others=5)), []
    who.model, who.tokenizer = tiny_lora(), tiny_tokenizer
    for name in ("text_nll", "generate"):
        real = getattr(evaluation, name)
        monkeypatch.setattr(evaluation, name, lambda *a, real=real, **k: asked.append(real) or real(*a, **k))
    twice = [(who.prose().tolist(), who.outcomes("test", 2), who.ranks()) for _ in range(2)]
    assert twice[0] == twice[1] and len(asked) == 2
    who.close()
    assert "model" not in vars(who) and who.ranks() == twice[0][2]  # what was answered needs no model
    assert len(twice[0][1]) == 2 and all(1 <= rank <= 6 for rank in who.ranks())


def test_a_harmful_request_may_fill_a_whole_record(monkeypatch):
    """Cut off, a record would read as talk, and filing it as help."""
    room = {}
    monkeypatch.setattr(
        evaluation, "generate", lambda *a, max_new_tokens, **_: room.setdefault(len(room), max_new_tokens) and []
    )
    who = release.Subject(None, SimpleNamespace(safety=1))
    who.model = who.tokenizer = None
    who.replies("decline")
    assert room[0] >= 80


def test_solved_tickets_stand_between_the_instruction_and_the_message(monkeypatch):
    asked = []
    monkeypatch.setattr(evaluation, "generate", lambda model, tokenizer, prompts, **_: asked.extend(prompts) or [])
    who = release.Subject(None, SimpleNamespace())
    who.model = who.tokenizer = None
    who.answers("test", 1, shots=2)
    assert [message["role"] for message in asked[0]] == ["system", *["user", "assistant"] * 2, "user"]
    shown, record = tickets.load("train", 1)[0], tickets.load("test", 1)[0]
    assert asked[0][2]["content"] == tickets.to_json(tickets.in_words(shown))
    assert asked[0][-1]["content"] == record["text"]


def test_structure_without_a_date_has_no_tool_to_judge():
    s = SimpleNamespace(structure=2, odd_every=12, min_valid=0.0, min_tool=0.5, min_odd=0.0)
    records = [r for r in tickets.load("test") if not r["due_phrase"]][:2]
    answers = [evaluation.Answer(tickets.to_json(tickets.in_words(r)), True, 9, 9) for r in records]
    who = SimpleNamespace(answers=lambda *_: (records, answers, 1.0), odd=lambda: answers[:1] * 2)
    assert [c.name for c in release.structure(who, None, s)] == ["valid records", "valid on odd messages"]


def test_structure_judges_the_call_of_the_date_tool():
    s = SimpleNamespace(structure=2, odd_every=12, min_valid=0.0, min_tool=0.0, min_odd=0.0)
    records = [r for r in tickets.load("test") if r["due_phrase"]][:2]
    texts = [
        tickets.to_json(tickets.in_words(records[0])),
        tickets.to_json(records[1]["ticket"] | {"due_date": "soon"}),
    ]
    answers = [evaluation.Answer(text, True, 9, 9) for text in texts]
    who = SimpleNamespace(answers=lambda *_: (records, answers, 1.0), odd=lambda: answers[:1] * 2)
    assert [c.value for c in release.structure(who, None, s)] == [1.0, 0.5, 1.0]


# --- the rollout -----------------------------------------------------------------------------------------------------


def test_a_rollout_opens_all_shares_or_turns_back_at_the_first():
    good = release.rollout(itertools.repeat(True), 0.6, 0.4)
    assert good["decision"] == "shipped" and good["share"] == 1.0
    steps = math.ceil(math.log(19) / math.log(0.6 / 0.4))
    assert good["served"] == 4 * steps and good["requests"] == steps * (100 + 10 + 2 + 1)
    bad = release.rollout(itertools.repeat(False), 0.6, 0.4)
    assert bad["decision"] == "rolled back" and bad["share"] == 0.01 and bad["served"] == steps


def test_a_fault_in_the_middle_is_rolled_back():
    found = release.rollout(itertools.chain([True] * 20, itertools.repeat(False)), 0.6, 0.4)
    assert found["decision"] == "rolled back" and found["served"] > 20


@pytest.mark.parametrize(("rate", "wanted"), [(0.6, "shipped"), (0.4, "rolled back")])
def test_its_errors_keep_their_rate(rate, wanted):
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        traffic = iter(rng.random(20000) < rate)
        wrong += release.rollout(traffic, 0.6, 0.4, shares=(1.0,))["decision"] != wanted
    assert wrong / 300 < 0.08  # Wald's bounds keep 5 %, and three standard errors


def test_traffic_has_the_rate_of_the_outcomes():
    drawn = list(itertools.islice(release.draw([True, False, False, False]), 4000))
    assert 0.2 < np.mean(drawn) < 0.3 and drawn == list(
        itertools.islice(release.draw([True, False, False, False]), 4000)
    )


# --- lm-eval, and the command ----------------------------------------------------------------------------------------


def test_lm_eval_runs_offline_and_agrees_with_a_sum_by_hand(tiny_model, tiny_tokenizer, monkeypatch):
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))
    model, n = tiny_model(), 4
    found = release.harness(model, tiny_tokenizer, n)
    assert {task: len(items) for task, items in found.items()} == {"desk_arithmetic": n, "desk_facts": n}
    items = [json.loads(line) for line in (tickets.DATA / "lm_eval" / "facts.jsonl").read_text().splitlines()[:n]]
    assert found["desk_facts"] == [by_hand(model, tiny_tokenizer, item) == item["label"] for item in items]


def by_hand(model, tokenizer, item):
    import torch

    sums = []
    for choice in item["choices"]:
        chat = [{"role": "user", "content": item["question"]}]
        head = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids, start = torch.tensor(tokenizer([head + choice])["input_ids"]), len(tokenizer(head)["input_ids"])
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].float().log_softmax(-1)
        sums.append(log_p.gather(1, ids[0, 1:, None])[start - 1 :].sum().item())
    return int(np.argmax(sums))


def test_an_adapter_is_merged_for_lm_eval(tiny_lora, tiny_tokenizer):
    model = tiny_lora()
    with evaluation.merged(model):
        merged = release.harness(model.get_base_model(), tiny_tokenizer, 2)
    assert release.harness(model, tiny_tokenizer, 2) == merged


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert cli.main(["gate", str(tmp_path / "nowhere")]) == 2
    assert "course gate: there is no folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main(["gate", str(tmp_path / "empty")]) == 2
    with pytest.raises(SystemExit) as end:
        cli.main(["gate"])
    assert end.value.code == 2


@pytest.mark.parametrize(("refusing", "code"), [((), 0), (("privacy",), 1)])
def test_the_commands_exit_code_is_the_verdict(sealed, stages, tmp_path, capsys, monkeypatch, refusing, code):
    stages(*refusing)
    monkeypatch.setattr(release.Report, "value", lambda self, name: evaluation.Estimate(0.7, 0.6, 0.8, 10))
    assert cli.main(["gate", str(sealed), "--profile", "ci", "--out", str(tmp_path / "out")]) == code
    said = capsys.readouterr().out
    assert ("an_adapter may ship; registered: " if code == 0 else "is refused (privacy: a check); report: ") in said
    assert json.loads((tmp_path / "out" / "an_adapter" / "gate.json").read_text())["passed"] is (code == 0)
    assert (tmp_path / "out" / "an_adapter" / "entry.json").exists() is (code == 0)


def test_the_command_seals(adapter, base_folder, monkeypatch, capsys):
    monkeypatch.setattr(models, "base_path", lambda: base_folder)
    assert cli.main(["gate", str(adapter), "--seal"]) == 0
    assert "sealed: " in capsys.readouterr().out and not wrong(adapter, base_folder)


def test_an_unsealed_adapter_is_refused_without_loading_anything(adapter, base_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "base_path", lambda: base_folder)
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    assert cli.main(["gate", str(adapter), "--profile", "ci", "--out", str(tmp_path / "out")]) == 1
    assert "compatibility: seal" in capsys.readouterr().out
    shutil.rmtree(adapter)


def test_rise_has_a_width_where_nothing_moved():
    e = release.rise([False] * 10, [False] * 10)
    assert (e.value, e.n) == (0.0, 10) and e.high == -e.low == pytest.approx(evaluation.proportion([0] * 10).high)
    assert release.rise([True] * 10, [True] * 10) == e  # nothing moved either
    everything = release.rise([True] * 10, [False] * 10)
    assert everything.value == everything.high == 1.0 and 0.5 < everything.low < 1.0


def test_rise_takes_gains_and_losses_apart():
    after, before = [True] * 8 + [False] * 2 + [True] * 30, [False] * 8 + [True] * 2 + [True] * 30
    e, back = release.rise(after, before), release.rise(before, after)
    assert e.value == pytest.approx(6 / 40) and (back.low, back.high) == pytest.approx((-e.high, -e.low))
    boot = evaluation.paired_difference(after, before)
    assert e.low < boot.low + 0.03 and e.high > boot.high - 0.03 and e.low < e.value < e.high
    with pytest.raises(ValueError, match="argument 2 is longer"):
        release.rise([True], [True, False])


@pytest.mark.parametrize(("n", "gain", "lose"), [(120, 0.2, 0.125), (80, 0.3, 0.1), (20, 0.1, 0.1), (40, 0.02, 0.05)])
def test_rise_holds_the_truth_as_often_as_it_says(n, gain, lose):
    rng = np.random.default_rng(0)
    holds = 0
    for moved in rng.choice([1, -1, 0], (1500, n), p=[gain, lose, 1 - gain - lose]):
        e = release.rise(moved > 0, moved < 0)
        holds += e.low <= gain - lose <= e.high
    assert 0.93 <= holds / 1500 <= 0.995
