"""The set-up files agree with each other: pins, ranges, conda environment, make targets, ignored files."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ["course", "test", "test-unsloth", "lab", "check", "refresh", "reference", "bench", "clean"]


def pins():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pinned_versions():
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins()}


def test_every_requirement_is_one_exact_pin():
    for pin in pins():
        operators = [specifier.operator for specifier in pin.specifier]
        assert operators == ["=="], f"{pin}: one exact pin expected"
        assert "*" not in str(pin.specifier), f"{pin}: a wildcard is no pin"
        assert pin.marker is None and not pin.extras, f"{pin}: plain pins only"
    names = [canonicalize_name(pin.name) for pin in pins()]
    assert len(names) == len(set(names)), "a package is pinned twice"


def test_ranges_admit_the_pins_and_name_the_same_packages():
    extras = project()["optional-dependencies"]
    ranges = [Requirement(text) for text in project()["dependencies"] + extras["lab"] + extras["dev"]]
    ranges = {canonicalize_name(need.name): need for need in ranges if need.name != project()["name"]}
    versions = pinned_versions()
    assert set(ranges) == set(versions), "pyproject.toml and requirements.txt must name the same packages"
    for name, version in versions.items():
        assert ranges[name].specifier.contains(version), f"{name}=={version} is outside of {ranges[name]}"
    assert not ranges["trl"].specifier.contains("1.15.0"), "trl 1.15.0 cannot compute a loss on a CPU"


def test_colab_extra_leaves_colabs_own_packages_alone():
    needs = {
        canonicalize_name(need.name): need for need in map(Requirement, project()["optional-dependencies"]["colab"])
    }
    assert not {"torch", "torchvision", "numpy", "pandas"} & set(needs)
    assert not needs["torchao"].specifier.contains("0.10.0")
    versions = pinned_versions()
    for name in set(needs) - {"torchao"}:
        assert str(needs[name].specifier) == f"=={versions[name]}", f"pinned: {versions[name]}"


def test_unsloth_extra_is_pinned_exactly():
    for need in map(Requirement, project()["optional-dependencies"]["unsloth"]):
        assert [specifier.operator for specifier in need.specifier] == ["=="], str(need)


def test_conda_environment_installs_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["name"] == project()["name"]
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["-r requirements.txt", "-e ."]
    python = next(
        entry for entry in environment["dependencies"] if isinstance(entry, str) and entry.startswith("python")
    )
    assert Requirement("python" + project()["requires-python"]).specifier.contains(python.partition("=")[2])


def test_program_and_licence():
    assert project()["scripts"] == {"course": "course_lib.cli:main"}
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
    assert project()["license"] == "Apache-2.0"


def make(*arguments, cwd=ROOT, **environment):
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    for name in ("VENV", "PYTHON", "PROFILE", "LESSON", "ARGS"):
        inherited.pop(name, None)
    return subprocess.run(
        ["make", *arguments], cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=60
    )


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
def test_make_lists_its_targets():
    shown = make()
    assert shown.returncode == 0, shown.stderr
    listed = re.findall(r"^  ([a-z-]+) +\S", shown.stdout, re.M)
    assert sorted(listed) == sorted([*TARGETS, "help"])


@needs_make
@pytest.mark.parametrize("target", TARGETS)
def test_make_has_the_target(target):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, re.M)
    assert re.search(rf"^\.PHONY:.*\b{target}\b", makefile, re.M), f"{target} must be phony"


@pytest.fixture
def checkout(tmp_path):
    """A folder with a space in its name that holds just what make needs."""
    folder = tmp_path / "a course"
    folder.mkdir()
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@needs_make
def test_make_names_an_unsupported_python(checkout):
    old = checkout / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = make("check", f"PYTHON={old}", cwd=checkout)
    assert done.returncode == 2
    assert "no Python 3.11, 3.12 or 3.13 found" in done.stderr and str(old) in done.stderr


@needs_make
def test_make_leaves_a_foreign_environment_alone(checkout):
    """A Python that is too old, in a folder that is no virtual environment, is not cleared away."""
    python = checkout / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    done = make("check", "VENV=env", cwd=checkout)
    assert done.returncode == 2
    assert "make VENV=" in done.stderr
    assert python.exists()


@needs_make
def test_a_set_up_that_broke_off_is_not_taken_for_done(checkout, monkeypatch):
    """The stamp of an environment whose Python is gone may not vouch for the one that is made in its place."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (checkout / "requirements.txt").write_text("no-such-package==0\n", encoding="utf-8")
    stamp = checkout / ".venv" / ".course-stamp"
    stamp.parent.mkdir()
    key = "{ cat requirements.txt pyproject.toml; pwd; } | cksum > .venv/.course-stamp"
    subprocess.run(key, shell=True, cwd=checkout, check=True)
    for _ in range(2):
        done = make("setup", cwd=checkout)
        assert done.returncode != 0 and "no-such-package" in done.stderr
        assert not stamp.exists()


@needs_make
def test_a_dry_run_makes_nothing(checkout):
    before = sorted(checkout.iterdir())
    done = make("-n", "course", cwd=checkout)
    assert done.returncode == 0 and "course_lib run" in done.stdout, done.stderr
    assert sorted(checkout.iterdir()) == before


@needs_make
def test_make_clean_needs_no_set_up(checkout):
    done = make("clean", cwd=checkout)
    assert done.returncode == 0 and "Nothing to clean" in done.stdout
    assert not (checkout / ".venv").exists()


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="not a git checkout")
@pytest.mark.parametrize(
    "path",
    [
        "runs/cpu/results.json",
        "work/00_start_here.ipynb",
        ".venv/pyvenv.cfg",
        "course_lib/__pycache__/cli.cpython-311.pyc",
        "notebooks/.ipynb_checkpoints/00_start_here-checkpoint.ipynb",
        ".pytest_cache/README.md",
        ".ruff_cache/CACHEDIR.TAG",
        "adaptation_course.egg-info/PKG-INFO",
    ],
)
def test_git_ignores_what_is_made(path):
    assert subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT).returncode == 0, f"{path} is not ignored"


def test_continuous_integration_runs_the_suite():
    run = ROOT / ".ci" / "run"
    assert "make test" in run.read_text(encoding="utf-8")
    if os.name == "posix":
        assert os.access(run, os.X_OK)
    for name in ("test", "weekly"):
        workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))
        assert "secrets." not in str(workflow) and workflow["permissions"] == {"contents": "read"}
    versions = re.findall(r'"(3\.\d+)"', (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
    assert versions == ["3.11", "3.12", "3.13"]


SHOWS_ITS_CORES = """
import os
from course_lib import hardware

def test_cores():
    print("cores", sorted(os.sched_getaffinity(0)), "threads", os.environ["OMP_NUM_THREADS"], hardware.cores())
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not bind a process to cores")
def test_workers_share_the_cores(tmp_path):
    shutil.copy(ROOT / "conftest.py", tmp_path)
    for name in ("test_a.py", "test_b.py"):
        (tmp_path / name).write_text(SHOWS_ITS_CORES, encoding="utf-8")
    run = [sys.executable, "-m", "pytest", "-rP", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadfile", "."]
    given = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS" and not k.startswith("PYTEST_")}
    given["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(run, cwd=tmp_path, env=given, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = set(re.findall(r"cores \[([\d, ]+)\] threads (\d+) (\d+)", ended.stdout))
    assert found, ended.stdout
    cores = sorted(os.sched_getaffinity(0))
    shares = [{int(core) for core in part.split(",")} for part, _, _ in found]
    assert all(int(threads) == int(seen) == len(part.split(",")) for part, threads, seen in found)
    if len(cores) > 1:
        assert len(shares) == 2 and not shares[0] & shares[1] and shares[0] | shares[1] == set(cores)


@pytest.mark.parametrize(("cores", "free", "workers"), [(2, 16e9, 2), (8, 64e9, 2), (1, 16e9, 0), (2, 7e9, 0)])
def test_two_files_at_a_time_need_two_cores_and_memory(monkeypatch, cores, free, workers):
    import runpy
    from types import SimpleNamespace

    import psutil

    settings = runpy.run_path(str(ROOT / "conftest.py"))["pytest_xdist_auto_num_workers"]
    monkeypatch.setitem(settings.__globals__, "cores", lambda: cores)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    assert settings(None) == workers
