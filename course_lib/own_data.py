"""A reader's own task: a JSON Lines file of `text` and `target`, checked, split, learnt and scored.

A target is a label (a text, or a whole number, which is read as its digits) or a JSON object, nested as deep as it
likes; a file holds one kind. A record may say its `split`, `train` or `test`; where none does, `split` divides them.
Other fields are left alone. What cannot be used is refused by the number of its line, with the reason.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

from course_lib import CourseError

LEAST = 30  # usable records: with fewer, no split leaves a test that can tell anything
MAX_TOKENS = 512  # of text and target together
LIKENESS = 0.85  # Jaccard similarity from which two texts are near-copies, as in lesson 02
POOL = 4000  # records that are looked at for near-copies of the test; the rest of a larger file is left out
SYSTEM = {"label": "Answer with the label.", "json": "Answer with the JSON object."}


@dataclass
class Data:
    """Usable records (`line`, `text`, `target`, and `split` where given), `kind` (`label` or `json`), what was refused
    (line, reason), duplicates (line, line of the first), and `said`: sentences for the reader."""

    kind: str
    records: list[dict]
    refused: list[tuple[int, str]] = field(default_factory=list)
    duplicates: list[tuple[int, int]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


# --- reading ---------------------------------------------------------------------------------------------------------


def _no_duplicates(pairs):
    if len({key for key, _ in pairs}) < len(pairs):
        names = [key for key, _ in pairs]
        raise CourseError(f"the key {next(k for k in names if names.count(k) > 1)!r} stands twice")
    return dict(pairs)


def _no_constant(name):
    raise CourseError(f"{name} is no JSON value")


def _loads(text: str):
    """Strict JSON: no key twice, no NaN, nothing behind it."""
    return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)


def _record(line: bytes) -> dict:
    """One usable record of a line; CourseError with the reason."""
    try:
        value = _loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise CourseError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise CourseError(f"not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise CourseError("nested too deep") from None
    if not isinstance(value, dict):
        raise CourseError("not a JSON object with text and target")
    for name in ("text", "target"):
        if name not in value:
            raise CourseError(f"has no {name!r}")
    text, target = value["text"], value["target"]
    if not isinstance(text, str):
        raise CourseError(f"its text is {_name(text)}, not a text")
    if not text.strip():
        raise CourseError("its text is empty")
    if isinstance(target, int) and not isinstance(target, bool):
        target = str(target)
    if not isinstance(target, str | dict):
        raise CourseError(f"its target is {_name(target)}, neither a label nor an object")
    if not (target.strip() if isinstance(target, str) else target):
        raise CourseError("its target is empty")
    target = target.strip() if isinstance(target, str) else target
    if isinstance(target, str) and "\n" in target:
        raise CourseError("its label has more than one line")
    found = {"text": text.strip(), "target": target}
    if (part := value.get("split")) is not None:
        if part not in ("train", "test"):
            raise CourseError(f"its split is {part!r}, neither 'train' nor 'test'")
        found["split"] = part
    return found


def _name(value) -> str:
    names = {type(None): "null", bool: "true or false", list: "a list", dict: "an object", str: "a text"}
    return names.get(type(value), "a number")


def read(path, count=None) -> Data:
    """The usable records of a file. count: function from a text to its number of tokens, to refuse what is too long.

    Raises CourseError where there is no such file, where fewer than `LEAST` records can be used, or where all of them
    have the same target.
    """
    path = Path(path).expanduser()
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise CourseError(
            f"cannot read the dataset {str(path)!r} ({error.strerror}) from the folder {Path.cwd().name!r}. Give the "
            "path of a JSON Lines file: one object with text and target on each line."
        ) from None
    records, refused = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            made = _record(line)
            size = count(made["text"]) + count(as_text(made["target"])) if count else 0
            if size > MAX_TOKENS:
                raise CourseError(f"too long: {size} tokens, at most {MAX_TOKENS}")
            records.append({"line": number} | made)
        except CourseError as error:
            refused.append((number, str(error)))
    kinds = Counter(isinstance(r["target"], dict) for r in records)
    kind = "json" if kinds[True] > kinds[False] else "label"
    other = {"json": "a label in a file of objects", "label": "an object in a file of labels"}[kind]
    refused += [
        (r["line"], f"its target is {other}") for r in records if isinstance(r["target"], dict) != (kind == "json")
    ]
    records = [r for r in records if isinstance(r["target"], dict) == (kind == "json")]
    parts = Counter(r.get("split") for r in records)
    if len(parts) > 1 and None in parts:
        refused += [(r["line"], "has no split, and others have one") for r in records if "split" not in r]
        records = [r for r in records if "split" in r]
    records, duplicates, contradicting = _once(records)
    data = Data(kind, records, sorted(refused + contradicting), duplicates)
    _enough(data)
    return data


def _normal(text: str) -> str:
    """What two texts are compared by: words and numbers, without case and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def _once(records: list[dict]) -> tuple[list[dict], list, list]:
    """(records, duplicates, contradicting): of equal texts with one target the first stays (the test's before the
    others), of those with several targets none."""
    by_text = defaultdict(list)
    for r in records:
        by_text[_normal(r["text"])].append(r)
    kept, duplicates, contradicting = [], [], []
    for same in by_text.values():
        same.sort(key=lambda r: (r.get("split") != "test", r["line"]))
        first = same[0]
        others = {r["line"]: r for r in same if r["target"] != first["target"]}
        if others:
            numbers = sorted(r["line"] for r in same)
            for n in numbers:
                rest = ", ".join(str(m) for m in numbers if m != n)
                contradicting.append((n, f"its text stands on line {rest} too, with another target"))
            continue
        kept.append(first)
        duplicates += [(r["line"], first["line"]) for r in same[1:]]
    return sorted(kept, key=lambda r: r["line"]), sorted(duplicates), contradicting


def _enough(data: Data) -> None:
    """CourseError where the data cannot be learnt from; else sentences about what is thin."""
    n, targets = len(data.records), Counter(as_text(r["target"]) for r in data.records)
    if n < LEAST:
        first = "; ".join(f"line {line}: {reason}" for line, reason in data.refused[:5])
        raise CourseError(
            f"too few: {n} usable records, at least {LEAST} are needed, some hundreds are better "
            f"({len(data.refused)} refused, {len(data.duplicates)} duplicates). {first}"
        )
    if len(targets) == 1:
        raise CourseError(f"all {n} records have the same target, {next(iter(targets))[:60]!r}: nothing can be learnt.")
    if data.duplicates:
        line, first = data.duplicates[0]
        data.said.append(
            f"{len(data.duplicates)} duplicates left out: an equal text with the same target stands before them "
            f"(line {line} is line {first} again)."
        )
    if n < 200:
        data.said.append(f"Only {n} usable records: too few for a firm answer, the interval below will be wide.")
    thin = [label for label, k in targets.items() if k < 8]
    if data.kind == "label" and thin:
        data.said.append(f"{len(thin)} of {len(targets)} labels have fewer than 8 records (such as {thin[0]!r}).")
    if data.kind == "label" and len(targets) > n / 2:
        data.said.append(f"{len(targets)} different labels in {n} records: these look like free texts, not labels.")


# --- splitting and subsampling ---------------------------------------------------------------------------------------


def spread(records: list[dict], n: int, seed: int = 0) -> list[dict]:
    """`n` records, as evenly over the targets as they allow: each target's turn comes round by round."""
    rng, by_target = random.Random(f"{seed} spread"), defaultdict(list)
    for r in records:
        by_target[as_text(r["target"])].append(r)
    groups = list(by_target.values())
    for group in groups:
        rng.shuffle(group)
    rng.shuffle(groups)
    turns = [r for turn in range(max(map(len, groups), default=0)) for g in groups if turn < len(g) for r in [g[turn]]]
    return turns[:n]


def drawn(records: list[dict], n: int, seed: int = 0) -> list[dict]:
    """`n` records by lot, so that frequent targets stay frequent: what a test needs to speak of the file."""
    found = list(records)
    random.Random(f"{seed} drawn").shuffle(found)
    return found[:n]


def split(data: Data, test: int, seed: int = 0) -> tuple[list[dict], list[dict], list[str]]:
    """(train, test, sentences). At most `test` records and a quarter of the file are tested on, drawn by lot; where the
    file says its own `split`, that one holds. Training records that are near-copies of a tested one are leaks: they
    are left out, unless that would take more than half of them.
    """
    said = []
    if any("split" in r for r in data.records):
        held = [r for r in data.records if r["split"] == "test"]
        pool = [r for r in data.records if r["split"] == "train"]
        for name, part in (("train", pool), ("test", held)):
            if len(part) < 10:
                raise CourseError(f"too few: the file's own split {name!r} has {len(part)} usable records, not ten.")
        if len(held) > test:
            said.append(f"Subsampled: {test} of the {len(held)} test records are asked, drawn by lot.")
            held = drawn(held, test, seed)
    else:
        held = drawn(data.records, min(test, len(data.records) // 4), seed)
        taken = {r["line"] for r in held}
        pool = [r for r in data.records if r["line"] not in taken]
    if len(pool) > POOL:
        said.append(f"Subsampled: {POOL} of the {len(pool)} training records are looked at.")
        pool = spread(pool, POOL, seed)
    found = leaks(pool, held)
    if len(found) > len(pool) / 2:
        said.append(
            f"Leaked: {len(found)} of {len(pool)} training records are near-copies of a tested one. All stay, since "
            "too few would be left: the score below is that of a test that was practised on."
        )
    elif found:
        line, of = next(iter(sorted(found.items())))
        said.append(
            f"Leaked: {len(found)} training records are near-copies of a tested one and are left out "
            f"(line {line} resembles line {of})."
        )
        pool = [r for r in pool if r["line"] not in found]
    return pool, held, said


def _shingles(text: str) -> set[str]:
    """Runs of four characters; of longer texts, of five words, so that their number stays small."""
    normal = _normal(text)
    words = normal.split()
    if len(normal) > 400:
        return {" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))}
    return {normal[i : i + 4] for i in range(max(1, len(normal) - 3))}


def leaks(train: list[dict], test: list[dict], likeness: float = LIKENESS) -> dict[int, int]:
    """{line of a training record: line of a test record that it is a near-copy of}. Candidates by MinHash, then the
    Jaccard similarity itself decides."""
    from datasketch import MinHash, MinHashLSH

    index, known = MinHashLSH(threshold=likeness - 0.1, num_perm=64), {}
    for r in test:
        known[r["line"]] = _shingles(r["text"])
        index.insert(r["line"], _minhash(MinHash(num_perm=64), known[r["line"]]))
    found = {}
    for r in train:
        mine = _shingles(r["text"])
        for line in sorted(index.query(_minhash(MinHash(num_perm=64), mine))):
            if len(mine & known[line]) >= likeness * len(mine | known[line]):
                found[r["line"]] = line
                break
    return found


def _minhash(made, shingles: set[str]):
    made.update_batch([s.encode() for s in sorted(shingles)])
    return made


def subsample(records: list[dict], count, budget: int, seed: int = 0) -> tuple[list[dict], int, list[str]]:
    """(records, epochs, sentences) that fit a budget of tokens: all of them one to four times, or a part, once, spread
    evenly over the targets."""
    sizes = [count(r["text"]) + count(as_text(r["target"])) + 24 for r in records]  # 24: what the chat format adds
    total = sum(sizes)
    if total <= budget:
        epochs = max(1, min(4, budget // total))
        return records, epochs, [f"All {len(records)} training records are used, {epochs} times."]
    n = max(10, int(len(records) * budget / total))
    kept = spread(records, n, seed)
    random.Random(f"{seed} order").shuffle(kept)
    said = f"Subsampled: {len(kept)} of {len(records)} training records, as evenly over the targets as they allow"
    return kept, 1, [said + ", so that the run keeps to its time."]


# --- the task --------------------------------------------------------------------------------------------------------


def as_text(target) -> str:
    """The answer that a model is asked for: the label, or the object as JSON on one line, its keys in their order."""
    return target if isinstance(target, str) else json.dumps(target, ensure_ascii=False, separators=(",", ":"))


def messages(record: dict, kind: str) -> list[dict]:
    """The prompt: a short instruction and the text."""
    return [{"role": "system", "content": SYSTEM[kind]}, {"role": "user", "content": record["text"]}]


def rows(records: list[dict], kind: str) -> list[dict]:
    """Prompt and completion, as the trainer takes them."""
    return [
        {"prompt": messages(r, kind), "completion": [{"role": "assistant", "content": as_text(r["target"])}]}
        for r in records
    ]


def majority(records: list[dict], kind: str) -> str:
    """The best answer that looks at no text: the most frequent label; of objects, at each place the most frequent
    value, where the place is filled in at least half of them."""
    if kind == "label":
        return Counter(r["target"] for r in records).most_common(1)[0][0]
    values = defaultdict(Counter)
    for r in records:
        for place, value in leaves(r["target"]).items():
            values[place][value] += 1
    common = {p: c.most_common(1)[0][0] for p, c in values.items() if c.total() >= len(records) / 2}
    made = _from_leaves(common)
    best = Counter(as_text(r["target"]) for r in records).most_common(1)[0][0]  # some object, seen most often

    def reached(text):
        return sum(score(r["target"], text, kind)["score"] for r in records)

    return max([best, as_text(made)], key=reached)


def leaves(value, place: tuple = ()) -> dict[tuple, str]:
    """{path: value as JSON} of everything in an object that is not itself an object or a list with something in it.

    `1` and `1.0` are the same number, and neither is `true`.
    """
    if isinstance(value, dict) and value:
        return {k: v for name, inner in value.items() for k, v in leaves(inner, (*place, name)).items()}
    if isinstance(value, list) and value:
        return {k: v for i, inner in enumerate(value) for k, v in leaves(inner, (*place, i)).items()}
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)
    return {place: json.dumps(value, ensure_ascii=False)}


def _from_leaves(found: dict[tuple, str]):
    """The object that has these leaves."""
    top: dict = {}
    for place, value in found.items():
        at = top
        for name in place[:-1]:
            inner = at.setdefault(name, {})
            at = inner if isinstance(inner, dict) else at.setdefault(f"{name} ", {})
        at[place[-1]] = json.loads(value)

    def lists(value):
        if not isinstance(value, dict):
            return value
        inner = {name: lists(v) for name, v in value.items()}
        if inner and all(isinstance(name, int) for name in inner):
            return [inner[name] for name in sorted(inner)]
        return {str(name): v for name, v in inner.items()}

    return lists(top)


def score(target, text: str, kind: str, labels=None) -> dict[str, float]:
    """`right` (all of it), `score` (of a label the same; of an object the F1 of its leaves) and `valid`, each 0 to 1.

    valid: one JSON object and nothing else; of labels, one of `labels` where those are given. Nothing is repaired.
    """
    if kind == "label":
        right = float(text.strip() == target)
        return {"right": right, "score": right, "valid": float(labels is None or text.strip() in labels)}
    answer = None
    with contextlib.suppress(ValueError, RecursionError, CourseError):
        answer = _loads(text)
    if not isinstance(answer, dict):
        return {"right": 0.0, "score": 0.0, "valid": 0.0}
    gold, ours = leaves(target), leaves(answer)
    both = sum(gold.get(place) == value for place, value in ours.items())
    return {"right": float(gold == ours), "score": 2 * both / (len(gold) + len(ours)), "valid": 1.0}


def longest(records: list[dict], count) -> int:
    """Tokens that an answer may have: a quarter more than the longest target, and some."""
    return int(max(count(as_text(r["target"])) for r in records) * 1.25) + 6


# --- in the notebook -------------------------------------------------------------------------------------------------

MARK = "# own data"  # the first line of the cells that run with a dataset
METRICS = "own_data_"  # what their metrics' names begin with


def switch(lesson, dataset):
    """With a dataset, let only those of the following cells run that begin with `MARK` (and the last one), and make the
    lesson one whose metrics are theirs; without, let all run. Returns the lesson."""
    from course_lib import results

    shell = _shell()
    if shell is not None:
        others = [f for f in shell.input_transformers_cleanup if f is not _marked_only]
        shell.input_transformers_cleanup[:] = others + [_marked_only] * bool(dataset)
    if not dataset:
        print("No dataset is given: all of the lesson runs, its part on own data with an example.")
        return lesson
    print(f"A dataset is given: only the cells that begin with `{MARK}` run, on {Path(dataset).name}.")
    spec = lesson.spec | {"metrics": {k: v for k, v in lesson.spec["metrics"].items() if k.startswith(METRICS)}}
    lesson = replace(lesson, spec=spec, bands={})
    results.begin(lesson)
    return lesson


ALWAYS = (MARK, "profile = ", "# Parameters", "from course_lib import start", "from course_lib import finish")


def _marked_only(lines: list[str]) -> list[str]:
    """A cell's lines as they are where it runs with a dataset, else one that says that it did not run."""
    text = "".join(lines).lstrip()
    return (
        lines if text.startswith(ALWAYS) or "own_data.switch(" in text else ['print("skipped: a dataset is given")\n']
    )


def _shell():
    try:
        return get_ipython()  # noqa: F821  (a name that only IPython defines)
    except NameError:
        return None
