"""Profiles and the index of lessons: sizes, budgets and bands as `notebooks/course.toml` has them."""

from __future__ import annotations

import os
import random
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

from course_lib import CourseError

ROOT = Path(os.environ.get("COURSE_ROOT") or Path(__file__).resolve().parent.parent)
PROFILES = ("ci", "cpu", "full", "t4")


@lru_cache(maxsize=1)
def index() -> dict:
    """`notebooks/course.toml`, parsed."""
    path = ROOT / "notebooks" / "course.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CourseError(
            f"there is no index of lessons at {path}. The library expects the course's folder around it: "
            "install it with `pip install -e .` in a clone, or set COURSE_ROOT to one."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise CourseError(f"{path} is not valid TOML: {error}") from None


def lessons() -> list[dict]:
    """The lessons' tables in order."""
    return index().get("lesson", [])


def lesson(name: str) -> dict:
    """The table of one lesson, by id ("01_decision_ladder") or number ("01", "1")."""
    for table in lessons():
        number = table["id"].split("_")[0]
        if name in (table["id"], number, number.lstrip("0") or "0"):
            return table
    raise CourseError(f"no lesson {name!r}. The lessons are {', '.join(table['id'] for table in lessons())}.")


def choose(profile: str = "auto") -> str:
    """The profile meant by `profile`: "auto" is `COURSE_PROFILE`, else `t4` with a CUDA device and `cpu` without."""
    asked = profile
    if profile == "auto":
        profile = os.environ.get("COURSE_PROFILE") or "auto"
    if profile == "auto":
        from course_lib import hardware

        return "t4" if hardware.device() == "cuda" else "cpu"
    if profile not in PROFILES:
        place = "" if asked == profile else " (from COURSE_PROFILE)"
        raise CourseError(f"no profile {profile!r}{place}. Choose auto, {', '.join(PROFILES)}.")
    return profile


@dataclass(frozen=True)
class Lesson:
    """A started lesson: what its cells read their sizes and places from."""

    id: str
    profile: str
    seed: int
    out_dir: Path
    sizes: SimpleNamespace
    bands: dict
    spec: dict

    def folder(self, name: str) -> Path:
        """`<out_dir>/<name>/<lesson id>`, made if need be; for figures and adapters."""
        path = self.out_dir / name / self.id
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CourseError(
                f"cannot write to {path} ({error.strerror}): pass another place with `--out`, COURSE_OUT or the "
                "parameter out_dir."
            ) from error
        return path


def sizes(spec: dict, profile: str) -> SimpleNamespace:
    """The sizes of one profile; what it does not say, it takes from `cpu`."""
    table = spec.get("sizes", {})
    return SimpleNamespace(**(table.get("cpu", {}) | table.get(profile, {})))


def set_seeds(seed: int) -> None:
    """Python, NumPy and torch. Before trl 1.15 an adapter's start depends on torch's, so lessons call this before they
    build a trainer."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def start(lesson_id: str, profile: str = "auto", seed: int = 0, out_dir: str | Path | None = None) -> Lesson:
    """Start a lesson: seeds, output folder, profile; prints one line on what it found.

    Raises CourseError for an unknown lesson or profile, naming the value and the valid ones.
    """
    import torch

    from course_lib import hardware, results

    spec = lesson(lesson_id)
    profile = choose(profile)
    set_seeds(seed)
    torch.set_num_threads(hardware.cores())
    out = Path(out_dir) if out_dir is not None else results.default_dir(profile)
    bands = spec.get("bands", {}).get(profile, {}) if seed == 0 or profile != "full" else {}
    started = Lesson(spec["id"], profile, seed, out, sizes(spec, profile), bands, spec)
    results.begin(started)
    found, versions = hardware.describe(), hardware.versions()
    minutes = spec.get("minutes", {}).get(profile)
    parts = [
        f"{found.get('gpu', found['cpu'])}, {found['cores']} cores, {found['ram_gb']} GB",
        f"{found['device']} {found['dtype']}",
        f"profile {profile}, seed {seed}",
        "  ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "trl", "peft") if name in versions),
        f"about {minutes} min on the reference machine" if minutes else "",
    ]
    print(" | ".join(part for part in parts if part))
    return started
