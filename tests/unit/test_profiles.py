import random

import pytest

from course_lib import CourseError, hardware, profiles, results

INDEX = """
[[lesson]]
id = "00_start_here"
[lesson.minutes]
ci = 0.5
[[lesson]]
id = "10_merging"
[lesson.sizes.cpu]
train = 300
steps = 8
[lesson.sizes.ci]
train = 16
[lesson.bands.ci]
exact = [0.1, 0.9]
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "course.toml").write_text(INDEX)
    monkeypatch.setattr(profiles, "ROOT", tmp_path)
    monkeypatch.delenv("COURSE_PROFILE", raising=False)
    profiles.index.cache_clear()
    yield tmp_path
    profiles.index.cache_clear()
    results._lesson = None


@pytest.mark.parametrize("name", ["10_merging", "10"])
def test_a_lesson_by_id_or_number(root, name):
    assert profiles.lesson(name)["id"] == "10_merging"
    assert profiles.lesson("0") == profiles.lesson("00") == profiles.lesson("00_start_here")


@pytest.mark.parametrize("name", ["1", "", "99", "10_merging.ipynb", "start"])
def test_an_unknown_lesson_names_the_valid_ones(root, name):
    with pytest.raises(CourseError) as error:
        profiles.lesson(name)
    assert repr(name) in str(error.value) and "00_start_here, 10_merging" in str(error.value)


def test_an_index_that_is_missing_or_broken(root):
    path = root / "notebooks" / "course.toml"
    path.write_text("[[lesson")
    with pytest.raises(CourseError, match="course.toml is not valid TOML"):
        profiles.index()
    path.unlink()
    with pytest.raises(CourseError, match="no index of lessons at .*COURSE_ROOT"):
        profiles.index()


def test_sizes_fall_back_to_cpu(root):
    spec = profiles.lesson("10")
    assert vars(profiles.sizes(spec, "ci")) == {"train": 16, "steps": 8}
    assert vars(profiles.sizes(spec, "t4")) == vars(profiles.sizes(spec, "cpu")) == {"train": 300, "steps": 8}
    assert vars(profiles.sizes(profiles.lesson("0"), "ci")) == {}


@pytest.mark.parametrize("profile", profiles.PROFILES)
def test_choose_takes_what_is_asked_for(root, monkeypatch, profile):
    assert profiles.choose(profile) == profile
    monkeypatch.setenv("COURSE_PROFILE", profile)
    assert profiles.choose() == profiles.choose("auto") == profile
    assert profiles.choose("ci") == "ci"  # what is said in the call comes before the environment


@pytest.mark.parametrize(("device", "profile"), [("cpu", "cpu"), ("cuda", "t4")])
def test_choose_by_hardware(root, monkeypatch, device, profile):
    monkeypatch.setattr(hardware, "device", lambda: device)
    assert profiles.choose() == profile
    monkeypatch.setenv("COURSE_PROFILE", "auto")
    assert profiles.choose() == profile


def test_choose_refuses_with_the_value_its_place_and_the_valid_ones(root, monkeypatch):
    with pytest.raises(CourseError, match=r"no profile 'fast'\. Choose auto, ci, cpu, full, t4"):
        profiles.choose("fast")
    monkeypatch.setenv("COURSE_PROFILE", "gpu")
    with pytest.raises(CourseError, match=r"no profile 'gpu' \(from COURSE_PROFILE\)\. Choose auto, ci"):
        profiles.choose()


def test_start(root, tmp_path, capsys):
    lesson = profiles.start("10", profile="ci", seed=3, out_dir=tmp_path / "out")
    assert (lesson.id, lesson.profile, lesson.seed, lesson.sizes.train) == ("10_merging", "ci", 3, 16)
    assert lesson.bands == {"exact": [0.1, 0.9]} and lesson.spec is profiles.lesson("10")
    (line,) = capsys.readouterr().out.splitlines()
    assert "profile ci, seed 3" in line and "torch " in line and "min on the reference" not in line
    results.record("exact", 0.5)
    assert (tmp_path / "out" / "metrics" / "10_merging.json").exists()
    assert lesson.folder("figures") == tmp_path / "out" / "figures" / "10_merging"
    profiles.start("0", profile="ci", out_dir=tmp_path / "out")
    assert "about 0.5 min on the reference machine" in capsys.readouterr().out


def test_start_sets_every_seed(root, tmp_path):
    import numpy as np
    import torch

    def draw(seed):
        profiles.start("0", profile="ci", seed=seed, out_dir=tmp_path)
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    first, again, other = draw(0), draw(0), draw(1)
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_a_folder_that_cannot_be_made_says_how_to_choose_another(root, tmp_path):
    (tmp_path / "file").write_text("in the way")
    lesson = profiles.start("0", profile="ci", out_dir=tmp_path / "out")
    object.__setattr__(lesson, "out_dir", tmp_path / "file")
    with pytest.raises(CourseError, match="cannot write to .*file.*--out.*COURSE_OUT.*out_dir"):
        lesson.folder("figures")
