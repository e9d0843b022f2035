"""What a lesson measured: metrics with their bands, and results.json with the scoreboard.

A run's folder holds ``metrics/<lesson>.json``, written by the lesson, and ``results.json``, assembled from them.
"""

import contextlib
import functools
import json
import math
import os
from pathlib import Path

from course_lib import CourseError

_lesson = None
_metrics = {}


class BandError(CourseError):
    """A lesson did not measure what it promises: a metric is missing or outside of its band."""


class Table(str):
    """Text that a notebook shows as it is, in fixed pitch, without quotes."""

    def __repr__(self):
        return str(self)


# --- within a lesson -------------------------------------------------------------------------------------------------


def begin(lesson):
    """Make ``lesson`` the one that `record` writes for, and forget what an earlier run of it in this folder recorded.

    lesson: has .id, .profile, .seed, .out_dir (Path), .bands ({metric: [low, high]}) and .spec (its course.toml table).
    """
    global _lesson
    _lesson = lesson
    _metrics.clear()
    with contextlib.suppress(OSError):  # where the folder cannot be used, the first record says so
        _metrics_path().unlink(missing_ok=True)


def record(name, value, low=None, high=None, n=None):
    """Record one metric of the lesson and print it with its band.

    value: a number, a bool, a word (such as the rung where to stop), or None where nothing succeeded (n is the count).
    low, high: 95 % interval; n: number of items. A later call with the same name replaces the earlier one.
    Raises CourseError for NaN, infinity and values that are no single number.
    """
    if _lesson is None:
        raise CourseError(f"record({name!r}, ...) before the lesson was started: run the cell with start(...) first.")
    value, low, high, n = (_plain(name, x) for x in (value, low, high, n))
    if (low is None) != (high is None) or (low is not None and low > high):
        raise CourseError(f"record({name!r}): the interval [{low}, {high}] needs both ends, the lower one first.")
    entry = {"value": value}
    if low is not None:
        entry |= {"low": low, "high": high}
    if n is not None:
        entry["n"] = n
    band = _lesson.bands.get(name)
    entry["band"] = band
    if band is not None:
        entry["in_band"] = _inside(value, band)
    _metrics[name] = entry
    _save()
    print("  ".join(part for part in (name, *_cells(entry)) if part))


def finish():
    """Last cell of a lesson: its metrics as a small table.

    Raises BandError naming every metric that course.toml declares and that was not recorded, and every one out of band.
    """
    if _lesson is None:
        raise CourseError("finish() before the lesson was started: run the notebook from its first cell.")
    wanted = dict.fromkeys([*_lesson.spec.get("metrics", {}), *_lesson.bands])
    problems = [f"{name} was not recorded" for name in wanted if name not in _metrics]
    problems += [_outside(name, entry) for name, entry in _metrics.items() if entry.get("in_band") is False]
    if problems:
        raise BandError(f"{_lesson.id}, profile {_lesson.profile}: " + "; ".join(problems) + ".")
    rows = [(name, *_cells(entry)) for name, entry in _metrics.items()]
    return Table(align([("metric", "value", "interval", "n", "band", ""), *rows]))


def _plain(name, x):
    """A Python number, bool, word or None from what numpy or torch returned."""
    if hasattr(x, "item") and getattr(x, "ndim", 0) == 0:
        x = x.item()
    if x is not None and not isinstance(x, bool | int | float | str):
        raise CourseError(f"record({name!r}): {x!r} is a {type(x).__name__}; one number, bool, word or None is wanted.")
    if isinstance(x, float) and not math.isfinite(x):
        raise CourseError(f"record({name!r}): the value is {x}. Find the division by zero or the empty set behind it.")
    return x


def _inside(value, band):
    """A number lies in [low, high]; a word is one of the band's words; nothing (None) is in no band."""
    if value is None or isinstance(value, str):
        return value in band
    return band[0] <= value <= band[1]


def _metrics_path():
    return Path(_lesson.out_dir) / "metrics" / f"{_lesson.id}.json"


@functools.cache
def _environment():
    from course_lib import hardware  # loads torch, which a lesson has loaded anyway

    return {"hardware": hardware.describe(), "versions": hardware.versions()}


def _save():
    from course_lib import models

    head = {"lesson": _lesson.id, "profile": _lesson.profile, "seed": _lesson.seed}
    about = _environment()
    about = about | {"versions": about["versions"] | models.revisions}
    write_json(_metrics_path(), head | about | {"metrics": _metrics})


# --- a run's folder --------------------------------------------------------------------------------------------------


def base_dir():
    """Where runs go by default: ``COURSE_OUT``, in Colab /content/runs, else ``runs`` in the checkout."""
    from course_lib import profiles

    place = "/content/runs" if "COLAB_RELEASE_TAG" in os.environ else profiles.ROOT / "runs"
    return Path(os.environ.get("COURSE_OUT") or place).absolute()


def default_dir(profile):
    """The folder of a run in this profile where no other is given."""
    return base_dir() / profile


def latest():
    """The folder of the newest run below `base_dir`."""
    found = sorted(base_dir().glob("*/results.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CourseError(f"No run found below {base_dir()}. Name a run's folder, or run the lessons: course run.")
    return found[-1].parent


def write_text(path, text):
    """Write through a temporary file, so that no reader and no interruption ever sees half of it."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        cure = "Make room there or choose another folder: --out DIR, or COURSE_OUT."
        raise CourseError(f"Cannot write {path}: {error.strerror}. {cure}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def write_json(path, data):
    """JSON, by `write_text`."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _load(path, table, *fields):
    """A JSON file whose ``table`` holds entries with these fields."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        for name, entry in data[table].items():
            if not all(field in entry for field in fields):
                raise ValueError(f"{table}/{name} lacks one of {', '.join(fields)}")
        return data
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CourseError(f"{path} cannot be read ({error}). Delete it and run again: course run --resume.") from error


def read(out_dir):
    """results.json of a run's folder; assembled where only metrics of single lessons are there."""
    out_dir = Path(out_dir)
    if (out_dir / "results.json").exists():
        return _load(out_dir / "results.json", "lessons", "status", "metrics")
    if any(out_dir.glob("metrics/*.json")):
        return assemble(out_dir)
    raise CourseError(f"{out_dir} holds no results.json. Name a run's folder, such as runs/cpu, or run: course run.")


def assemble(out_dir, lesson=None, status=None, profile=None):
    """Merge the lessons' metrics and their status into ``results.json`` and return it.

    status: what the runner knows of ``lesson`` (status, seconds, ...); it replaces what was known, None forgets it.
    A lesson that was run outside of the runner, in JupyterLab, has status "recorded".
    """
    out_dir = Path(out_dir)
    path = out_dir / "results.json"
    old = _load(path, "lessons", "status", "metrics") if path.exists() else {"lessons": {}}
    known = {key: dict(value, metrics={}) for key, value in old["lessons"].items() if key != lesson}
    if status:
        known[lesson] = dict(status, metrics={})
    about = {"profile": profile or old.get("profile")} | {key: old.get(key, {}) for key in ("hardware", "versions")}
    for file in sorted(out_dir.glob("metrics/[!.]*.json"), key=lambda path: path.stat().st_mtime):
        measured = _load(file, "metrics", "value")
        known.setdefault(file.stem, {"status": "recorded"})["metrics"] = measured["metrics"]
        older = about["versions"] or {}  # one lesson has used a model of the hub, another has not
        about |= {key: measured[key] for key in about if key in measured}
        about["versions"] = older | about["versions"]
    results = about | {"lessons": {key: known[key] for key in sorted(known)}}
    write_json(path, results)
    return results


# --- what a person reads ---------------------------------------------------------------------------------------------


def problems(results):
    """Failed lessons and metrics out of band, one line each."""
    found = []
    for lesson, entry in results["lessons"].items():
        if entry["status"] == "failed":
            error = entry.get("error", {})
            found.append(f"{lesson}: failed in cell {error.get('cell')}: {error.get('type')}: {error.get('message')}")
        for name, metric in entry["metrics"].items():
            if metric.get("in_band") is False:
                found.append(f"{lesson}: {_outside(name, metric)}")
    return found


def scoreboard(results):
    """Every metric of every lesson with interval and band, as aligned text."""
    rows = [("lesson", "metric", "value", "interval", "n", "band", "")]
    for lesson, entry in results["lessons"].items():
        if not entry["metrics"] or entry["status"] == "failed":
            rows.append((lesson, f"({entry['status']})", "", "", "", "", ""))
        rows += [(lesson, name, *_cells(metric)) for name, metric in entry["metrics"].items()]
    return align(rows)


def align(rows):
    """Rows of texts as columns of equal width, the first row as heading."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _cells(metric):
    """value, interval, n, band and verdict of a metric as texts."""
    interval = f"[{_number(metric['low'])}, {_number(metric['high'])}]" if "low" in metric else ""
    n = f"n={metric['n']}" if "n" in metric else ""
    band = f"band {_band(metric['band'])}" if metric.get("band") else ""
    return _number(metric["value"]), interval, n, band, {True: "in", False: "OUT"}.get(metric.get("in_band"), "")


def _outside(name, metric):
    return f"{name} = {_number(metric['value'])} is out of its band {_band(metric['band'])}"


def _number(x):
    if isinstance(x, float):
        return f"{x:.0f}" if abs(x) >= 1000 else f"{x:.4g}"
    return "none" if x is None else str(x)


def _band(band):
    return " or ".join(band) if isinstance(band[0], str) else f"{_number(band[0])} to {_number(band[1])}"
