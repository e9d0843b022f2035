"""Claims that articles make about fine-tuning, and the rule by which a check judges them.

`data/claims.csv` holds the claims in the course's own words, each with the verdict that a check must reach. The checks
are in `claims_numbers` (arithmetic, formulas, simulations, stored results) and `claims_libraries` (what the pinned
libraries do). A check gets what the claim says as arguments, works out what is so, and returns a `Finding`.
"""

from __future__ import annotations

import csv
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from course_lib import CourseError, profiles

AREAS = {
    "cost": "arithmetic and cost",
    "memory": "memory and quantisation",
    "lora": "LoRA and its family",
    "preferences": "preference losses",
    "grpo": "GRPO and optimizers",
    "training": "data and training",
    "serving": "serving",
    "statistics": "statistics of evaluation",
}
VERDICTS = ("correct", "imprecise", "wrong", "outdated", "unverifiable")
SLIPS = {
    "": "nothing is wrong",
    "case left out": "true in some of the cases that it covers",
    "number": "the number is not what its own inputs give",
    "baseline": "measured against something else than it says",
    "unit": "bits for bytes, tokens for requests, a count for a step",
    "mixed up": "what is said belongs to another method",
    "refused": "the library refuses the call, or does something else",
    "noise": "smaller than chance can make it",
    "input left out": "what decides the answer is not stated",
}
COLUMNS = ("id", "area", "source", "claim", "verdict", "slip", "fact", "reference", "check")
TOO_WIDE = 10.0  # times that an answer may change with what a claim leaves open


@dataclass(frozen=True)
class Finding:
    """What a check found.

    cases: each case that the claim covers, and whether it holds there. evidence: one sentence with the numbers.
    once: (distribution, last release in which a refused call is known to have worked). spread: how many times larger
    the largest answer is than the smallest, over the values of an input that the claim leaves open.
    """

    cases: dict[str, bool]
    evidence: str
    once: tuple[str, str] | None = None
    spread: float = 1.0

    def __post_init__(self):  # NumPy's truth values would not be JSON, nor the objects True and False
        object.__setattr__(self, "cases", {name: bool(holds) for name, holds in self.cases.items()})

    @property
    def verdict(self) -> str:
        """The rule of the whole table; nothing else decides a verdict."""
        if self.spread >= TOO_WIDE:
            return "unverifiable"
        if all(self.cases.values()):
            return "correct"
        if any(self.cases.values()):
            return "imprecise"
        return "outdated" if self.once and _newer(*self.once) else "wrong"


def _newer(distribution: str, release: str) -> bool:
    from packaging.version import Version

    return Version(importlib.metadata.version(distribution)) > Version(release)


def near(claimed: float, found: float, tolerance: float = 0.02) -> bool:
    """Whether a claimed number is the found one, to a share of it."""
    return abs(claimed - found) <= tolerance * abs(found)


# --- the register ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A function whose defaults are what the claim says, and the control: the arguments of a claim that it must judge
    otherwise."""

    function: Callable[..., Finding]
    control: dict


CHECKS: dict[str, Check] = {}


def register(number: str, **control):
    """Decorator of a check. number: the lesson and the claim's id, as in "14.C69".

    control: arguments that make the claim right; of a claim that is right, arguments that make it wrong. A check that
    judges its control as it judges the claim sees nothing, and `examine` says so.
    """

    def add(function):
        name = number.partition(".")[2]
        if name in CHECKS:
            raise ValueError(f"claim {name} has a check already: {CHECKS[name].function.__name__}")
        if not control:
            raise ValueError(f"claim {name}: a check without a control cannot be seen to fail")
        CHECKS[name] = Check(function, control)
        return function

    return add


def checks() -> dict[str, Check]:
    """Every check by its claim's id."""
    from course_lib import claims_libraries, claims_numbers  # noqa: F401 - they fill the register

    return CHECKS


# --- the table -------------------------------------------------------------------------------------------------------


def load(area: str | None = None) -> list[dict]:
    """Rows of `data/claims.csv`, those of one area or all, in the order of the file. CourseError for a row that the
    table cannot hold, or for an area that there is not."""
    if area is not None and area not in AREAS:
        raise CourseError(f"no area {area!r}: choose one of {', '.join(AREAS)}.")
    path = profiles.ROOT / "data" / "claims.csv"
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    seen = set()
    for row in rows:
        for column, known in (("area", AREAS), ("verdict", VERDICTS), ("slip", SLIPS)):
            if row[column] not in known:
                raise CourseError(f"claims.csv, {row['id']}: {column} {row[column]!r} is none of {', '.join(known)}.")
        if row["id"] in seen:
            raise CourseError(f"claims.csv: {row['id']} stands twice.")
        seen.add(row["id"])
    return [row for row in rows if area in (None, row["area"])]


@dataclass(frozen=True)
class Result:
    """A row of the table, what its check found, and what the check found of its control."""

    row: dict
    finding: Finding
    control: Finding

    @property
    def agrees(self) -> bool:
        """Whether the table says what the check found."""
        return self.row["verdict"] == self.finding.verdict

    @property
    def sees(self) -> bool:
        """Whether the check can be failed: its control gets another verdict, and the right one where there is one."""
        if self.finding.verdict in ("correct", "unverifiable"):
            return self.control.verdict != self.finding.verdict
        return self.control.verdict == "correct"


_found: dict[str, tuple[Finding, Finding]] = {}


def examine(rows: list[dict]) -> list[Result]:
    """Run the check of each row, once on the claim and once on its control. A check runs once in a process."""
    every = checks()
    if missing := [row["id"] for row in rows if row["id"] not in every]:
        raise CourseError(f"no check for {', '.join(missing)}: a claim without a check does not belong in the table.")
    for row in rows:
        check = every[row["id"]]
        if row["id"] not in _found:
            _found[row["id"]] = check.function(), check.function(**check.control)
    return [Result(row, *_found[row["id"]]) for row in rows]


def confirm(results: list[Result]) -> int:
    """The number of results, all of which agree with their checks; CourseError names each one that does not."""
    problems = [
        f"{r.row['id']}: the table says {r.row['verdict']}, the check found {r.finding.verdict} ({r.finding.evidence})"
        for r in results
        if not r.agrees
    ]
    problems += [
        f"{r.row['id']}: the check calls its control {r.control.verdict}, too: it cannot be failed"
        for r in results
        if not r.sees
    ]
    if problems:
        raise CourseError("; ".join(problems))
    return len(results)


# --- what a reader sees ----------------------------------------------------------------------------------------------


def choose(results: list[Result], **wanted) -> list[Result]:
    """The results whose rows have these values, as in `choose(results, area="memory", verdict="wrong")`; a list of
    values takes any of them, `text` any row in whose claim the text occurs. A list of ids also says the order."""
    known = {"area": AREAS, "verdict": VERDICTS, "slip": SLIPS, "id": checks()}
    for column, values in wanted.items():
        if column not in (*COLUMNS, "text"):
            raise CourseError(f"no column {column!r}: choose from {', '.join((*COLUMNS, 'text'))}.")
        for value in [values] if isinstance(values, str) else values:
            if column in known and value not in known[column]:
                raise CourseError(f"no {column} {value!r}: choose from {', '.join(known[column])}.")

    def fits(row, column, values):
        if column == "text":
            return values.lower() in row["claim"].lower()
        return row[column] == values if isinstance(values, str) else row[column] in values

    chosen = [r for r in results if all(fits(r.row, *pair) for pair in wanted.items())]
    asked = wanted.get("id", "")
    return chosen if isinstance(asked, str) else sorted(chosen, key=lambda r: list(asked).index(r.row["id"]))


def _plain(text: str) -> str:
    """Text for a cell of an HTML table. Between two bare dollar signs a notebook would set a formula."""
    return escape(text).replace("$", "<span>$</span>")


def show(results: list[Result], fold: bool = False, **wanted):
    """A table of claims, verdicts as the checks found them, corrected facts and evidence.

    wanted: as for `choose`. fold: closed until the reader opens it. No script in it, so that it reads the same in a
    notebook and in a report.
    """
    from IPython.display import HTML

    head = ("claim", "source", "it says", "verdict", "what is so", "what the check computed")
    style = "text-align:left;vertical-align:top"
    lines = ["<table><tr>", *(f'<th style="{style}">{name}</th>' for name in head), "</tr>"]
    chosen = choose(results, **wanted)
    for r in chosen:
        fact = f"{r.row['fact']} ({r.row['reference']})"
        cells = (r.row["id"], r.row["source"], r.row["claim"], r.finding.verdict, fact, r.finding.evidence)
        lines += ["<tr>", *(f'<td style="{style}">{_plain(cell)}</td>' for cell in cells), "</tr>"]
    table = "\n".join([*lines, "</table>"])
    return HTML(f"<details><summary>All {len(chosen)} claims</summary>\n{table}\n</details>" if fold else table)
