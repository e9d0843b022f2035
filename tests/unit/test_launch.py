"""The recipe as a script: the same losses from one process and from two, here with a model of a few kilobytes."""

import json
from types import SimpleNamespace

import pytest

from course_lib import CourseError, launch

SETTINGS = {
    "rank": 4, "alpha": 8, "learning_rate": 1e-2, "batch_size": 4, "schedule": "constant", "warmup": 0, "beta2": 0.95,
    "epochs": 1, "seed": 0,
}  # fmt: skip
ROWS = [
    {
        "prompt": [{"role": "user", "content": "say " + "x" * (3 * i)}],
        "completion": [{"role": "assistant", "content": "word " * (1 + i % 5)}],  # of unequal length, on purpose
    }
    for i in range(12)
]


@pytest.fixture
def folder(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model("sdpa").save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_one_process_equals_two(folder, tmp_path):
    one = launch.train(ROWS, SimpleNamespace(**SETTINGS), tmp_path / "one", folder)
    two = launch.run(ROWS, SETTINGS, tmp_path / "two", 2, model=folder, seconds=240)
    assert (one["processes"], two["processes"]) == (1, 2)  # else two launches of one process would be compared
    assert [step for step, _ in one["losses"]] == [step for step, _ in two["losses"]] == [1, 2, 3]
    for (_, a), (_, b) in zip(one["losses"], two["losses"], strict=True):
        assert a == pytest.approx(b, abs=1e-3)
    assert one["losses"][0][1] - one["losses"][-1][1] > 0.05  # and something was learnt
    assert (tmp_path / "two" / "adapter" / "adapter_model.safetensors").exists()


def test_a_batch_that_cannot_be_shared(tmp_path):
    with pytest.raises(CourseError, match="a batch of 3 cannot be shared by 2 processes"):
        launch.run(ROWS, SETTINGS | {"batch_size": 3}, tmp_path / "out", 2)


def test_an_old_result_is_never_taken_for_a_new_one(folder, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"processes": 1, "losses": []}))
    with pytest.raises(CourseError, match="no end after 0.2 seconds"):
        launch.run(ROWS, SETTINGS, tmp_path, model=folder, seconds=0.2)
    assert not (tmp_path / "run.json").exists()


def test_the_cause_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "arguments", lambda *_: ["--nonsense"])
    with pytest.raises(CourseError, match="error: .*nonsense"):
        launch.run(ROWS, SETTINGS, tmp_path, model=folder, seconds=60)


@pytest.mark.slow
def test_the_processes_are_counted_and_not_believed(folder, tmp_path, monkeypatch):
    # What one would write first. It starts one process, whatever it is asked for: the count has to show it.
    plain = ["--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    monkeypatch.setattr(launch, "arguments", lambda *_: plain)
    assert launch.run(ROWS[:4], SETTINGS, tmp_path, 2, model=folder, seconds=240)["processes"] == 1
