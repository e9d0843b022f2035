"""The manifest agrees with the data, names what was changed, and its components share nothing and leave nothing out."""

import json
import re
import shutil

import pytest

from course_lib import CourseError, fingerprints, manifest, profiles, tickets


def test_it_agrees_with_the_data():
    found = manifest.load()
    assert found["licence"] == "Apache-2.0"
    assert sum(part["count"] for part in found["components"]) == len(tickets.load("train"))
    assert sum(part["share"] for part in found["components"]) == pytest.approx(1, abs=2e-4)
    assert set(found["framework"]) == {part["name"] for part in found["components"]}


def test_components_are_a_partition():
    parts = [manifest.records(part["name"]) for part in manifest.load()["components"]]
    ids = [record["id"] for part in parts for record in part]
    assert sorted(ids) == [record["id"] for record in tickets.load("train")]
    assert len(manifest.records()) == len(ids)


def test_what_a_component_means():
    record = {"text": "Cancel K-1000, please.", "ticket": {"needs_human": False, "order_id": "K-1000"}}
    assert manifest.component(record, []) == "positive"
    assert manifest.component(record | {"text": "Cancel K-1000. Not K-2000."}, []) == "contrast"
    assert manifest.component(record | {"text": "Cancel K-1000. You may ring me."}, ["You may ring me."]) == "contrast"
    human = {"text": "Cancel it. Not K-2000.", "ticket": {"needs_human": True, "order_id": None}}
    assert manifest.component(human, []) == "abstention"


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("tickets/train.jsonl", "component positive"),
        ("tickets/test.jsonl", "tickets/test.jsonl"),
        ("general/rehearsal.jsonl", "general/rehearsal.jsonl"),
        ("raw_log.jsonl", "raw_log.jsonl"),
    ],
)
def test_a_changed_file_is_named(tmp_path, monkeypatch, file, named):
    shutil.copytree(tickets.DATA, tmp_path / "data", ignore=shutil.ignore_patterns("__pycache__"))
    lines = (tmp_path / "data" / file).read_bytes().split(b"\n")
    if file.endswith("train.jsonl"):
        every = [json.loads(line) for line in lines[:-1]]
        no_reasons = manifest.reasons_that_are_none()
        first = next(n for n, r in enumerate(every) if manifest.component(r, no_reasons) == "positive")
        lines[first] = lines[first].replace(b'"text": "', b'"text": "X')
    else:
        lines[0] += b" "
    (tmp_path / "data" / file).write_bytes(b"\n".join(lines))
    monkeypatch.setattr(tickets, "DATA", tmp_path / "data")
    monkeypatch.setattr(manifest, "PATH", tmp_path / "data" / "manifest.json")
    with pytest.raises(CourseError, match=named):
        manifest.load()


def test_a_manifest_that_is_no_json(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "PATH", tmp_path / "manifest.json")
    with pytest.raises(CourseError, match="course data --write"):
        manifest.load()
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(CourseError, match="course data --write"):
        manifest.load()


@pytest.mark.parametrize("number", ["03", "08", "13"])
def test_lessons_that_train_on_the_tickets_load_it_first(number):
    code = [c.source for c in fingerprints.read(profiles.lesson(number)).cells if c.cell_type == "code"]
    loads = next(n for n, source in enumerate(code) if re.search(r"(?m)^(for .* in )?manifest\.load\(\)", source))
    trains = next(
        n for n, source in enumerate(code) if re.search(r"\.train\(\)|tuned_on\(|teach\(|pipeline\.adapter", source)
    )
    assert loads < trains
