import random
import types

import numpy as np
import pytest

from course_lib import CourseError, evaluation, pipeline, reference, replies, routing, tickets


def settings(**changes):
    return types.SimpleNamespace(**{"longest": 120, "routed": 20, "replies": 10, "per_ticket": 2, "pairs": 4} | changes)


def text(row):
    return row["completion"][0]["content"]


def test_stages_follow_each_other():
    assert [pipeline.settings(name, "ci").start for name in pipeline.STAGES] == [None, *pipeline.STAGES[:-1]]
    with pytest.raises(CourseError, match="no stage 'desk_ppo'"):
        pipeline.settings("desk_ppo", "ci")


def test_a_stage_depends_on_those_before_it(monkeypatch):
    keys = {}
    for shift in ("", "x"):
        monkeypatch.setattr(pipeline.recipes, "key", lambda name, *_, s=shift: name + s * (name == "desk_rl"))
        keys[shift] = [pipeline.key(name, "ci", 0) for name in pipeline.STAGES]
    assert [a == b for a, b in zip(keys[""], keys["x"], strict=True)] == [True, False, False, False]
    assert len(set(keys[""])) == 4


@pytest.mark.parametrize(("a", "b"), [(3, 9), (9, 3), (0, 2), (5, 5)])
def test_rows_of_both_tasks_are_spread(a, b):
    rows = pipeline.mixed([f"a{i}" for i in range(a)], [f"b{i}" for i in range(b)])
    assert sorted(rows) == sorted([f"a{i}" for i in range(a)] + [f"b{i}" for i in range(b)])
    half = rows[: len(rows) // 2]
    assert abs(sum(r[0] == "a" for r in half) - a / 2) <= 1


def test_the_cold_start_shows_both_tasks():
    rows = pipeline.demonstrations(settings())
    routed = [row for row in rows if row["prompt"][0]["content"] == routing.SYSTEM]
    assert len(routed) == 20 and len(rows) == 30
    assert {text(row) for row in routed} == set(routing.NAMES)


@pytest.fixture
def drawn():
    right, wrong = routing.load("train", 2, longest=120)
    records = replies.load("train", 3)
    careful = [replies.demonstration(r, random.Random(i), careful=True) for i, r in enumerate(records)]
    return {
        "teams": [
            {"ticket_id": right["id"], "team": routing.team(right), "answers": ["no", routing.team(right)]},
            {"ticket_id": wrong["id"], "team": routing.team(wrong), "answers": ["no", "neither"]},
        ],
        "replies": [
            {"ticket_id": records[0]["id"], "replies": ["bad", careful[0]]},
            {"ticket_id": records[1]["id"], "replies": ["bad", "worse"]},
            {"ticket_id": records[2]["id"], "replies": [careful[2]]},
        ],
    }, careful


def test_what_verifier_and_rubric_keep(drawn):
    found, careful = drawn
    rows = pipeline.verified(found)
    assert sorted(map(text, rows)) == sorted([found["teams"][0]["team"], careful[0], careful[2]])
    for row in rows:
        assert row["prompt"][0]["content"] in (routing.SYSTEM, replies.SYSTEM)


def test_pairs_come_from_tickets_with_both_kinds(drawn):
    found, careful = drawn
    (pair,) = pipeline.pairs(found, settings())
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == (careful[0], "bad")
    with pytest.raises(CourseError, match="draw more replies"):
        pipeline.pairs(found | {"replies": found["replies"][1:]}, settings())


def test_macro_f1_is_the_known_one():
    records, rng = routing.load("test", 50), np.random.default_rng(0)
    for _ in range(20):
        named = [rng.choice([*routing.NAMES, None, "sales"]) for _ in records]
        ours = pipeline.macro_f1(records, named, repeats=50)
        theirs = evaluation.macro_f1([routing.team(r) for r in records], named, routing.NAMES)
        assert ours.value == pytest.approx(theirs) and ours.low <= ours.value <= ours.high and ours.n == 50
    perfect = pipeline.macro_f1(records, [routing.team(r) for r in records], repeats=50)
    assert (perfect.value, perfect.low, perfect.high) == (1, 1, 1)


def test_answers_that_name_a_team(monkeypatch):
    answers = [evaluation.Answer("shop", True, 2, 9), evaluation.Answer("shop", False, 4, 9)]
    answers += [evaluation.Answer("shop.", True, 3, 9), evaluation.Answer("  returns\n", True, 3, 9)]
    monkeypatch.setattr(evaluation, "generate", lambda *_, **__: answers)
    assert pipeline.teams(None, None, tickets.load("test", 4)) == ["shop", None, None, "returns"]


def test_what_is_stored_is_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    monkeypatch.setattr(pipeline, "key", lambda name, *_: f"key of {name}")
    monkeypatch.setattr(pipeline, "load", lambda name, profile, seed: (name, seed))
    asked = []
    monkeypatch.setattr(
        pipeline, "measure", lambda model, seed: asked.append(model) or {"routing_macro_f1": evaluation.mean([0.5, 1])}
    )
    pipeline.make_reference((0,))
    pipeline.make_reference((0, 1))
    assert asked == [(name, seed) for seed in (0, 1) for name in pipeline.STAGES]
    rows = reference.read("desk", "stages")
    assert len(rows) == 8 and {row["stage"] for row in rows} == set(pipeline.STAGES) and rows[0]["value"] == "0.7500"
    assert set(reference.PROVENANCE) <= set(rows[0])
