"""`course drift`: which pins have newer releases, and whether the suite still passes with them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from course_lib import CourseError, fingerprints, profiles, results


def newest(names: list[str]) -> dict[str, str]:
    """{name: newest release that pip would install here} of those that are newer than what is installed.

    Raises CourseError with pip's last line where no index answers.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--upgrade"]
        command += ["--disable-pip-version-check", "--report", str(report), *names]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            last = ([line for line in done.stderr.splitlines() if "ERROR" in line] or [done.stderr.strip()])[-1]
            raise CourseError(
                f"pip could not ask for newer releases: {last[-300:]} A network that reaches PyPI is needed."
            )
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {_plain(entry["metadata"]["name"]): entry["metadata"]["version"] for entry in found}


def rows(pins: dict, found: dict[str, str], ranges: dict) -> list[list[str]]:
    """Package, pin, what is installed, newest release, whether pyproject.toml admits it; of pins that have moved."""
    table = []
    for name, (wanted, installed) in pins.items():
        pin, new = wanted.removeprefix("=="), found.get(_plain(name))
        if new is None or new.split("+")[0] == pin:
            continue
        allowed = ranges[_plain(name)].contains(new, prereleases=True) if _plain(name) in ranges else False
        table.append([name, pin, installed or "none", new, "yes" if allowed else "no"])
    return table


def _plain(name: str) -> str:
    from packaging.utils import canonicalize_name

    return canonicalize_name(name)


def _ranges() -> dict:
    from packaging.requirements import Requirement

    project = tomllib.loads((profiles.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [
        *project["dependencies"],
        *project["optional-dependencies"]["lab"],
        *project["optional-dependencies"]["dev"],
    ]
    return {_plain(need.name): need.specifier for need in map(Requirement, texts)}


def main(suite: bool = False, arguments: list[str] = ()) -> int:
    """Print what has moved; with `suite`, install the newest releases that pyproject.toml admits into an environment
    of their own and run the test suite there. 0 where the suite passes or was not asked for, 1 where it fails."""
    pins = fingerprints.pins(profiles.ROOT)
    print(f"Asking for newer releases of {len(pins)} packages ...", flush=True)
    moved = rows(pins, newest(list(pins)), _ranges())
    if moved:
        print(results.align([["package", "pinned", "installed", "newest", "in range"], *moved]))
    print(f"{len(moved)} of {len(pins)} pins have a newer release")
    return _suite(arguments) if suite else 0


def _suite(arguments) -> int:
    folder = Path(tempfile.mkdtemp(prefix="course-drift-"))
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    steps = [
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--upgrade", "--upgrade-strategy", "eager", "-e",
         f"{profiles.ROOT}[dev]"],
        [str(python), "-m", "course_lib", "fetch"],
        [str(python), "-m", "pytest", *arguments],
    ]  # fmt: skip
    try:
        for step in steps:
            print(f"$ {' '.join(step)}", flush=True)
            if code := subprocess.run(step, cwd=profiles.ROOT).returncode:
                print(f"course drift: this step ended with exit code {code}", file=sys.stderr)
                return 1
        return 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)
