import json
import random

import pytest

from course_lib import CourseError, own_data


def write(path, records):
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


WORDS = "blue card lost money abroad transfer pending refund cash top limit exchange rate charged twice".split()


def intents(n, classes, seed=0):
    rng = random.Random(seed)
    return [
        {"text": f"{' '.join(rng.choices(WORDS, k=7))} {rng.randrange(10**6)}?", "target": f"intent_{i % classes:02}"}
        for i in range(n)
    ]


def slots(n, seed=0):
    rng = random.Random(seed)
    found = []
    for _ in range(n):
        city, guests, vegan = rng.choice(["Rome", "Oslo", "Bern"]), rng.randrange(1, 9), rng.random() < 0.5
        text = f"A table for {guests} in {city}{', vegan' * vegan}, number {rng.randrange(10**6)}"
        target = {"intent": "book", "slots": {"place": {"city": city}, "guests": guests, "notes": ["vegan"] * vegan}}
        found.append({"text": text, "target": target})
    return found


# --- reading ---------------------------------------------------------------------------------------------------------

BROKEN = [
    ("{", "not JSON"),
    ("[1, 2]", "not a JSON object"),
    ('{"text": "a", "text": "b", "target": "x"}', "'text' stands twice"),
    ('{"text": "a", "target": {"n": NaN}}', "NaN"),
    ({"target": "x"}, "has no 'text'"),
    ({"text": "hello"}, "has no 'target'"),
    ({"text": 5, "target": "x"}, "its text is a number"),
    ({"text": "  ", "target": "x"}, "its text is empty"),
    ({"text": "hello", "target": None}, "its target is null"),
    ({"text": "hello", "target": True}, "its target is true or false"),
    ({"text": "hello", "target": 1.5}, "its target is a number"),
    ({"text": "hello", "target": ["x"]}, "its target is a list"),
    ({"text": "hello", "target": " "}, "its target is empty"),
    ({"text": "hello", "target": "a\nb"}, "more than one line"),
    ({"text": "hello", "target": {"intent": "x"}}, "an object in a file of labels"),
    ({"text": "hello", "target": "x", "split": "dev"}, "its split is 'dev'"),
    ({"text": "long " * 600, "target": "x"}, "too long: 601 tokens"),
    ("[" * 100000, "nested too deep"),
]


@pytest.mark.parametrize("line, reason", BROKEN, ids=[reason for _, reason in BROKEN])
def test_what_cannot_be_used_is_refused_by_its_line(tmp_path, line, reason):
    good = intents(40, 4)
    data = own_data.read(write(tmp_path / "d.jsonl", [*good[:20], line, *good[20:]]), lambda text: len(text.split()))
    (found,) = data.refused
    assert found[0] == 21 and reason in found[1]
    assert len(data.records) == 40 and data.records[20]["line"] == 22


def test_bytes_that_are_not_utf8_empty_lines_and_a_byte_order_mark(tmp_path):
    lines = [json.dumps(r).encode() for r in intents(40, 4)]
    (tmp_path / "d.jsonl").write_bytes(
        b"\xef\xbb\xbf" + b"\r\n".join([*lines[:3], b"", b'{"text": "\xff"}', *lines[3:]])
    )
    data = own_data.read(tmp_path / "d.jsonl")
    assert data.refused == [(5, "not UTF-8")] and len(data.records) == 40


def test_numbers_are_labels_and_other_fields_are_left_alone(tmp_path):
    records = [r | {"target": i % 3, "id": i} for i, r in enumerate(intents(40, 4))]
    data = own_data.read(write(tmp_path / "d.jsonl", records))
    assert data.kind == "label" and {r["target"] for r in data.records} == {"0", "1", "2"}
    assert set(data.records[0]) == {"line", "text", "target"}


def test_duplicates_and_contradictions(tmp_path):
    good = intents(40, 4)
    again = {"text": good[0]["text"].upper(), "target": good[0]["target"]}
    other = {"text": good[1]["text"], "target": "something else"}
    data = own_data.read(write(tmp_path / "d.jsonl", [*good, again, other]))
    assert data.duplicates == [(41, 1)] and "line 41 is line 1 again" in " ".join(data.said)
    assert [line for line, _ in data.refused] == [2, 42] and "line 42" in data.refused[0][1]
    assert len(data.records) == 39


@pytest.mark.parametrize(
    "records, said",
    [
        (intents(29, 4), "too few: 29"),
        (["nonsense"] * 50, "line 1: not JSON"),
        ([r | {"target": "same"} for r in intents(50, 4)], "the same target, 'same'"),
        ([], "too few: 0"),
    ],
)
def test_what_cannot_be_learnt_from(tmp_path, records, said):
    with pytest.raises(CourseError, match=said):
        own_data.read(write(tmp_path / "d.jsonl", records))


def test_no_such_file(tmp_path):
    with pytest.raises(CourseError, match="nowhere.jsonl"):
        own_data.read(tmp_path / "nowhere.jsonl")


def test_what_is_thin_is_said(tmp_path):
    said = " ".join(own_data.read(write(tmp_path / "d.jsonl", intents(60, 20))).said)
    assert "Only 60 usable records" in said and "20 of 20 labels have fewer than 8" in said
    free = [r | {"target": r["text"]} for r in intents(60, 3)]
    assert "look like free texts" in " ".join(own_data.read(write(tmp_path / "d.jsonl", free)).said)


# --- splitting -------------------------------------------------------------------------------------------------------


def test_split_holds_out_a_quarter_at_most_and_nothing_twice(tmp_path):
    data = own_data.read(write(tmp_path / "d.jsonl", intents(400, 5)))
    train, test, said = own_data.split(data, 60)
    assert len(test) == 60 and len(train) == 340 and not said
    assert not {r["line"] for r in train} & {r["line"] for r in test}
    assert own_data.split(data, 60)[1] == test and own_data.split(data, 60, seed=1)[1] != test
    assert len(own_data.split(data, 300)[1]) == 100


def test_near_copies_of_the_test_are_left_out_of_training(tmp_path):
    records = intents(200, 4)
    data = own_data.read(write(tmp_path / "d.jsonl", records))
    held = {r["line"] for r in own_data.split(data, 40)[1]}
    line = min(held)
    copied = write(tmp_path / "e.jsonl", [*records, {**records[line - 1], "text": records[line - 1]["text"] + " ok"}])
    again = own_data.read(copied)
    found = own_data.leaks([again.records[-1]], data.records)
    assert found == {201: line}
    given = [r | {"split": "test" if r["line"] in held else "train"} for r in again.records]
    train, test, said = own_data.split(own_data.Data("label", given), 40)
    assert len(test) == 40 and 201 not in {r["line"] for r in train} and len(train) == 160
    assert "Leaked: 1 training records" in said[0] and f"line 201 resembles line {line}" in said[0]


def test_a_file_of_near_copies_is_said(tmp_path):
    records = [
        {"text": f"please tell me where the parcel with number {i} is now", "target": f"t{i % 2}"} for i in range(99)
    ]
    data = own_data.read(write(tmp_path / "d.jsonl", records))
    train, _, said = own_data.split(data, 24)
    assert len(train) == 75 and "practised on" in said[0]


def test_the_files_own_split_holds(tmp_path):
    records = [r | {"split": "test" if i % 4 == 0 else "train"} for i, r in enumerate(intents(200, 4))]
    data = own_data.read(write(tmp_path / "d.jsonl", [*records, {"text": "no split", "target": "intent_00"}]))
    assert data.refused == [(201, "has no split, and others have one")]
    train, test, said = own_data.split(data, 30)
    assert {r["split"] for r in test} == {"test"} and {r["split"] for r in train} == {"train"}
    assert len(test) == 30 and "30 of the 50 test records" in said[0]
    few = [r | {"split": "test" if i < 5 else "train"} for i, r in enumerate(intents(60, 4))]
    with pytest.raises(CourseError, match="'test' has 5"):
        own_data.split(own_data.read(write(tmp_path / "d.jsonl", few)), 30)


def test_ten_thousand_questions_are_subsampled(tmp_path):
    data = own_data.read(write(tmp_path / "d.jsonl", intents(10_000, 77)))
    train, test, said = own_data.split(data, 200)
    assert len(train) <= own_data.POOL and len(test) == 200 and "Subsampled" in said[0]
    kept, epochs, said = own_data.subsample(train, lambda text: len(text) // 4, 40_000)
    assert epochs == 1 and 700 < len(kept) < 1100 and "Subsampled" in said[0]
    assert len({r["target"] for r in kept}) == 77


def test_small_files_are_seen_more_often(tmp_path):
    data = own_data.read(write(tmp_path / "d.jsonl", intents(60, 3)))
    for budget, epochs in ((10**6, 4), (3000, 1)):
        kept, n, said = own_data.subsample(data.records, lambda text: len(text) // 4, budget)
        assert (len(kept), n) == (60, epochs) and f"{epochs} times" in said[0]


# --- targets ---------------------------------------------------------------------------------------------------------


def test_rows_and_the_form_of_targets():
    record = {"text": "Zürich?", "target": {"b": {"ü": [1, None]}, "a": True}}
    (row,) = own_data.rows([record], "json")
    assert row["completion"][0]["content"] == '{"b":{"ü":[1,null]},"a":true}'
    assert row["prompt"][1]["content"] == "Zürich?"


NESTED = {"intent": "book", "slots": {"n": 2, "names": ["a", "b"], "note": {}}}


@pytest.mark.parametrize(
    "text, right, score, valid",
    [
        ('{"intent":"book","slots":{"n":2,"names":["a","b"],"note":{}}}', 1, 1, 1),
        (' {"slots": {"note": {}, "names": ["a", "b"], "n": 2.0}, "intent": "book"}\n', 1, 1, 1),
        ('{"intent":"book","slots":{"n":3,"names":["a","b"],"note":{}}}', 0, 0.8, 1),
        ('{"intent":"book","slots":{"n":true,"names":["b","a"],"note":{}}}', 0, 0.4, 1),
        ('{"intent":"book"}', 0, 2 / 6, 1),
        ('{"intent":"book","intent":"book"}', 0, 0, 0),
        ('{"intent":"book"} and more', 0, 0, 0),
        ('{"n": NaN}', 0, 0, 0),
        ("[]", 0, 0, 0),
        ("", 0, 0, 0),
        ("[" * 100_000, 0, 0, 0),
    ],
)
def test_nested_targets_are_scored_leaf_by_leaf(text, right, score, valid):
    assert own_data.score(NESTED, text, "json") == pytest.approx({"right": right, "score": score, "valid": valid})


def test_labels_are_right_or_wrong():
    assert own_data.score("a b", " a b\n", "label", {"a b", "c"}) == {"right": 1, "score": 1, "valid": 1}
    assert own_data.score("a b", "a b.", "label", {"a b", "c"}) == {"right": 0, "score": 0, "valid": 0}
    assert own_data.score("a b", "c", "label", {"a b", "c"}) == {"right": 0, "score": 0, "valid": 1}


def test_majority_answers():
    assert own_data.majority([{"target": t} for t in ("a", "b", "b")], "label") == "b"
    records = slots(300)
    answer = own_data.majority(records, "json")
    made = json.loads(answer)
    assert made["intent"] == "book" and set(made["slots"]["place"]) == {"city"}
    mean = sum(own_data.score(r["target"], answer, "json")["score"] for r in records) / 300
    for r in records[:40]:  # no target of the file does better as a constant answer
        other = sum(own_data.score(q["target"], own_data.as_text(r["target"]), "json")["score"] for q in records) / 300
        assert other <= mean + 1e-9


def test_leaves_come_back():
    assert own_data._from_leaves(own_data.leaves(NESTED)) == NESTED


def test_an_answer_may_be_longer_than_the_longest_target():
    assert own_data.longest([{"target": "x" * 40}, {"target": "y"}], len) == 56


# --- in the notebook -------------------------------------------------------------------------------------------------


class Shell:
    def __init__(self):
        self.input_transformers_cleanup = []


@pytest.fixture
def lesson(tmp_path):
    from course_lib import profiles

    spec = {"metrics": {"stage1": "a", "own_data_lift": "b"}}
    return profiles.Lesson("13_capstone", "ci", 0, tmp_path, None, {"stage1": [0, 1]}, spec)


def test_with_a_dataset_only_marked_cells_run(lesson, monkeypatch, capsys):
    shell = Shell()
    monkeypatch.setattr(own_data, "_shell", lambda: shell)
    other = own_data.switch(lesson, "mine/file.jsonl")
    assert "on file.jsonl" in capsys.readouterr().out
    assert list(other.spec["metrics"]) == ["own_data_lift"] and other.bands == {}
    (transform,) = shell.input_transformers_cleanup
    for runs in ("# own data\nx = 1\n", 'profile = "auto"\n', "from course_lib import finish\n\nfinish()"):
        assert transform(runs.splitlines(True)) == runs.splitlines(True)
    assert transform(["train_for_hours()\n"]) == ['print("skipped: a dataset is given")\n']
    assert own_data.switch(lesson, "again.jsonl").spec == other.spec and len(shell.input_transformers_cleanup) == 1
    assert own_data.switch(lesson, None) is lesson and shell.input_transformers_cleanup == []
