import json
import types

import pytest

from course_lib import CourseError, models, profiles, results


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    """A started lesson in a folder whose name has a space and an umlaut."""
    monkeypatch.setattr(results, "_environment", lambda: {"hardware": {"cpu": "a"}, "versions": {"torch": "2"}})
    lesson = types.SimpleNamespace(
        id="04_lora",
        profile="ci",
        seed=0,
        out_dir=tmp_path / "läufe a",
        bands={"exact": [0.5, 0.9], "stop_rung": ["lora", "few_shot"]},
        spec={"metrics": {"exact": "exact match", "stop_rung": "where to stop", "speed": "tokens/s"}},
    )
    results.begin(lesson)
    yield lesson
    results._lesson = None


def stored(lesson):
    return json.loads((lesson.out_dir / "metrics" / "04_lora.json").read_text(encoding="utf-8"))


def test_record_stores_and_prints(lesson, capsys):
    results.record("exact", 0.8125, low=0.76, high=0.85, n=300)
    results.record("speed", 3520.4)
    assert stored(lesson)["metrics"] == {
        "exact": {"value": 0.8125, "low": 0.76, "high": 0.85, "n": 300, "band": [0.5, 0.9], "in_band": True},
        "speed": {"value": 3520.4, "band": None},
    }
    assert stored(lesson)["profile"] == "ci" and stored(lesson)["hardware"] == {"cpu": "a"}
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == "exact 0.8125 [0.76, 0.85] n=300 band 0.5 to 0.9 in".split()
    assert second.split() == ["speed", "3520"]


def test_record_takes_numpy_bools_words_and_none(lesson):
    np = pytest.importorskip("numpy")
    results.record("exact", np.float32(0.75), n=np.int64(4))
    results.record("flag", np.bool_(True))
    results.record("stop_rung", "lora")
    results.record("cost", None, n=0)
    metrics = stored(lesson)["metrics"]
    assert metrics["exact"]["value"] == 0.75 and metrics["exact"]["n"] == 4
    assert metrics["flag"]["value"] is True
    assert metrics["stop_rung"]["in_band"] is True
    assert metrics["cost"] == {"value": None, "n": 0, "band": None}


def test_the_commit_of_a_model_of_the_hub_is_kept(lesson, monkeypatch):
    monkeypatch.setattr(models, "revisions", {"owner/model": "0123abc"})
    results.record("exact", 0.8)
    assert stored(lesson)["versions"] == {"torch": "2", "owner/model": "0123abc"}
    monkeypatch.setattr(models, "revisions", {})
    other = types.SimpleNamespace(**vars(lesson) | {"id": "05_other"})
    results.begin(other)
    results.record("exact", 0.8)  # a later lesson without such a model does not hide it
    assert results.assemble(lesson.out_dir)["versions"] == {"torch": "2", "owner/model": "0123abc"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1, 2], {"a": 1}])
def test_record_refuses(lesson, value):
    with pytest.raises(CourseError, match="'exact'"):
        results.record("exact", value)
    assert not (lesson.out_dir / "metrics").exists()


@pytest.mark.parametrize("interval", [{"low": 0.1}, {"low": 0.9, "high": 0.1}, {"low": float("nan"), "high": 1.0}])
def test_record_refuses_an_interval(lesson, interval):
    with pytest.raises(CourseError):
        results.record("exact", 0.5, **interval)


def test_record_before_start_and_unwritable_place(lesson, tmp_path):
    (tmp_path / "file").write_text("")
    lesson.out_dir = tmp_path / "file"
    with pytest.raises(CourseError, match="COURSE_OUT"):
        results.record("exact", 0.8)
    results._lesson = None
    with pytest.raises(CourseError, match="start"):
        results.record("exact", 0.8)


def test_begin_forgets_the_earlier_run(lesson):
    results.record("exact", 0.8)
    results.begin(lesson)
    assert not list((lesson.out_dir / "metrics").iterdir())
    results.record("speed", 1.0)
    assert list(stored(lesson)["metrics"]) == ["speed"]


def test_finish(lesson):
    results.record("exact", 0.95)
    results.record("stop_rung", "grammar")
    with pytest.raises(results.BandError) as error:
        results.finish()
    for part in (
        "speed was not recorded",
        "exact = 0.95",
        "0.5 to 0.9",
        "stop_rung = grammar",
        "lora or few_shot",
        "ci",
    ):
        assert part in str(error.value)
    results.record("exact", 0.9)
    results.record("stop_rung", "lora")
    results.record("speed", 1)
    table = results.finish()
    assert repr(table) == str(table) and len(table.splitlines()) == 4


def test_a_missing_value_is_in_no_band(lesson):
    results.record("exact", None, n=0)
    assert stored(lesson)["metrics"]["exact"]["in_band"] is False


def test_assemble_merges_metrics_and_status(lesson):
    results.record("exact", 0.2)
    data = results.assemble(lesson.out_dir, "03_sft", {"status": "passed", "seconds": 1.0}, profile="ci")
    assert data["profile"] == "ci" and data["versions"] == {"torch": "2"}
    assert list(data["lessons"]) == ["03_sft", "04_lora"]
    assert data["lessons"]["03_sft"] == {"status": "passed", "seconds": 1.0, "metrics": {}}
    assert data["lessons"]["04_lora"]["status"] == "recorded"
    assert data == results.read(lesson.out_dir)
    assert [p for p in results.problems(data)] == ["04_lora: exact = 0.2 is out of its band 0.5 to 0.9"]
    assert "03_sft" not in results.assemble(lesson.out_dir, "03_sft")["lessons"]


def test_read_without_results_json(lesson, tmp_path):
    results.record("exact", 0.8)
    assert "04_lora" in results.read(lesson.out_dir)["lessons"]
    with pytest.raises(CourseError, match="no results.json"):
        results.read(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"lessons": 3}', '{"lessons": {"01": 5}}', '{"lessons": {"01": {}}}'])
def test_a_corrupt_results_json_is_named(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(CourseError, match=r"results\.json cannot be read"):
        results.read(tmp_path)


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    results.write_json(path, {"a": "ü"})
    with pytest.raises(ValueError):
        results.write_json(path, {"a": float("nan")})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(CourseError, match="No space left"):
        results.write_json(path, {"a": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ü"}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_default_folders(monkeypatch, tmp_path):
    monkeypatch.delenv("COURSE_OUT", raising=False)
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    assert results.default_dir("ci") == profiles.ROOT / "runs" / "ci"
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    assert results.default_dir("ci").as_posix() == "/content/runs/ci"
    monkeypatch.setenv("COURSE_OUT", str(tmp_path))
    assert results.default_dir("ci") == tmp_path / "ci"


def test_scoreboard_is_aligned():
    metric = {"value": 0.3, "low": 0.2, "high": 0.4, "n": 9, "band": [0.5, 1.0], "in_band": False}
    data = {
        "lessons": {
            "00_a": {"status": "passed", "metrics": {"exact": metric, "speed": {"value": 12.0, "band": None}}},
            "01_b": {"status": "failed", "metrics": {}, "error": {"cell": 3, "type": "ValueError", "message": "bad"}},
        }
    }
    lines = results.scoreboard(data).splitlines()
    assert lines[1].index("0.3") == lines[2].index("12") == lines[0].index("value")
    assert lines[1].endswith("OUT") and "(failed)" in lines[3]
    assert results.problems(data)[1] == "01_b: failed in cell 3: ValueError: bad"
