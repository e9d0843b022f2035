"""The manifest of the course's training data: what it consists of, where each part came from, and a hash of each.

`data/manifest.json` is written by `data/build.py`; `load` returns it once every part on disk is what it says.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib

from course_lib import CourseError, tickets

PATH = tickets.DATA / "manifest.json"


def reasons_that_are_none() -> list[str]:
    """The sentences that sound like a reason for a person and are none, as `data/source/` lists them."""
    return tomllib.loads((tickets.DATA / "source" / "wordings_train.toml").read_text(encoding="utf-8"))["near_human"]


def component(record: dict, no_reasons: list[str]) -> str:
    """Which part of the framework a ticket belongs to.

    `abstention`: a person has to decide. `contrast`: it holds what looks like something that it is not, another order's
    number or one of `no_reasons`. `positive`: everything else.
    """
    if record["ticket"]["needs_human"]:
        return "abstention"
    others = set(re.findall(r"\b[A-Z]-\d{4}\b", record["text"])) - {record["ticket"]["order_id"]}
    if others or any(sentence in record["text"] for sentence in no_reasons):
        return "contrast"
    return "positive"


def digest(rows: list[dict]) -> str:
    """sha256 over the rows as their file has them: one JSON object a line."""
    return hashlib.sha256("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()).hexdigest()


def records(name: str | None = None) -> list[dict]:
    """The training tickets of one component, in the file's order; of all where no name is given."""
    no_reasons = reasons_that_are_none()
    return [r for r in tickets.load("train") if name is None or component(r, no_reasons) == name]


def load() -> dict:
    """The manifest, after every hash in it was compared with what is on disk.

    Raises CourseError that names the part which differs.
    """
    try:
        manifest = json.loads(PATH.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CourseError(f"{PATH.name} cannot be read ({error}): run `course data --write`.") from None
    for part in manifest["components"]:
        if digest(records(part["name"])) != part["sha256"]:
            raise CourseError(_differs(f"component {part['name']} of {part['file']}"))
    for part in [*manifest["beside"], *manifest["held_out"], *manifest["excluded"]]:
        path = tickets.DATA / part["file"]
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != part["sha256"]:
            raise CourseError(_differs(part["file"]))
    return manifest


def _differs(what: str) -> str:
    return (
        f"the training data is not what its manifest says: {what} differs. Restore it with git, or, if you changed "
        "data/source/ on purpose, run `course data --write` and train again."
    )
