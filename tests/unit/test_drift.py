"""`course drift`: what counts as newer, and what becomes of a suite that fails. pip and the suite are stand-ins."""

import json
import subprocess
from types import SimpleNamespace

import pytest
from packaging.specifiers import SpecifierSet

from course_lib import CourseError, cli, drift, fingerprints

PINS = {"numpy": ("==2.4.6", "2.4.6"), "lm_eval": ("==0.4.13", "0.4.13"), "torch": ("==2.13.0", "2.13.0+cpu")}
RANGES = {"numpy": SpecifierSet(">=2.1,<3"), "lm-eval": SpecifierSet("<0.5"), "torch": SpecifierSet("<3")}


def pip(newer, code=0, stderr=""):
    """A stand-in for subprocess.run that answers pip's question and notes every other command."""
    commands = []

    def run(command, **options):
        commands.append([str(part) for part in command])
        if "--report" in command:
            found = [{"metadata": {"name": name, "version": version}} for name, version in newer.items()]
            with open(command[command.index("--report") + 1], "w") as file:
                json.dump({"install": found}, file)
            return SimpleNamespace(returncode=code, stderr=stderr)
        return SimpleNamespace(returncode=7 if "pytest" in command and code is None else 0)

    run.commands = commands
    return run


def test_rows_name_what_has_moved_and_whether_it_is_in_range():
    found = {"numpy": "3.0.0", "lm-eval": "0.4.14", "torch": "2.13.0+cu128"}
    assert drift.rows(PINS, found, RANGES) == [
        ["numpy", "2.4.6", "2.4.6", "3.0.0", "no"],
        ["lm_eval", "0.4.13", "0.4.13", "0.4.14", "yes"],
    ]


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(fingerprints, "pins", lambda root: PINS)
    monkeypatch.setattr(subprocess, "run", pip({"numpy": "2.9.0"}))
    assert cli.main(["drift"]) == 0
    shown = capsys.readouterr().out
    assert "2.9.0" in shown and "1 of 3 pins have a newer release" in shown


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (None, 1)])
def test_the_suite_runs_in_an_environment_of_its_own(monkeypatch, code, expected):
    run = pip({}, code)
    monkeypatch.setattr(fingerprints, "pins", lambda root: PINS)
    monkeypatch.setattr(subprocess, "run", run)
    assert cli.main(["drift", "--run", "--", "tests/unit"]) == expected
    python = run.commands[-1][0]
    assert run.commands[-1] == [python, "-m", "pytest", "tests/unit"] and "course-drift-" in python


def test_no_network_is_told(monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", pip({}, 1, "ERROR: no index answers"))
    with pytest.raises(CourseError, match="no index answers.*PyPI"):
        drift.newest(["numpy"])
    assert cli.main(["drift"]) == 2
    assert "no index answers" in capsys.readouterr().err
