"""Cells and tables that are generated from notebooks/course.toml, and how notebooks are read and written."""

import json
import os
import re
import subprocess
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from course_lib import CourseError, profiles, results

GENERATED = ("title", "bootstrap", "parameters", "preflight", "finish")
README_MARKS = ("<!-- lessons:start -->", "<!-- lessons:end -->")
SCORE_MARKS = ("<!-- scoreboard:start -->", "<!-- scoreboard:end -->")


def notebook_path(lesson):
    return profiles.ROOT / "notebooks" / f"{lesson['id']}.ipynb"


def read(path):
    """The notebook as it lies on disk, nothing added or repaired."""
    try:
        return nbformat.v4.reads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise CourseError(f"notebooks/{Path(path).name}: cannot be read ({error}); restore it with git.") from None


def write_atomically(path, text):
    """Write ``text`` and return the path relative to the checkout, or None where the file already says so."""
    path = Path(path)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return None
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    return str(path.relative_to(profiles.ROOT))


def tags(cell):
    return set(cell.metadata.get("tags", []))


def is_generated(cell):
    return bool(tags(cell) & set(GENERATED))


def at(lesson, number, text):
    return f"notebooks/{lesson['id']}.ipynb, cell {number}: {text}"


def set_metadata(nb):
    """Kernel and language as every notebook names them: without versions, so that a new Python changes nothing."""
    for key in ("papermill", "widgets"):
        nb.metadata.pop(key, None)
    nb.metadata.kernelspec = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    nb.metadata.language_info = {"file_extension": ".py", "name": "python", "pygments_lexer": "ipython3"}
    return nb


def _name(lesson):
    return f"{lesson['id'].split('_')[0]} {lesson['title']}"


def _repository():
    return profiles.index().get("course", {}).get("repository")


def remote_repository(folder):
    """`owner/name` of a checkout's remote `origin`; None where it has none, or not on GitHub: Colab opens no other."""
    if not (Path(folder) / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", folder, "remote", "get-url", "origin"], capture_output=True, text=True)
    except OSError:  # no git
        return None
    address = r"(?:https://|ssh://|)(?:[^@/]*@)?github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?"
    found = re.fullmatch(address, done.stdout.strip())
    return found[1] if found else None


def _fill_in_repository():
    """Where course.toml names no repository, put in the one that the checkout came from; returns the changed file."""
    if _repository() or not (found := remote_repository(profiles.ROOT)):
        return None
    path = profiles.ROOT / "notebooks" / "course.toml"
    text = path.read_text(encoding="utf-8")
    changed = write_atomically(path, re.sub(r'(?m)^repository = ""', f'repository = "{found}"', text, count=1))
    profiles.index.cache_clear()
    return changed


def _badge(lesson):
    if not (repository := _repository()):
        return ""
    url = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{lesson['id']}.ipynb"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url})"


def _per_profile(table, unit):
    return ", ".join(f"{name} {table[name]} {unit}" for name in profiles.PROFILES if name in (table or {}))


def _recipe(name, lesson):
    """A recipe as the header names it: trained here, or from the cache with its cold minutes and where it is taught."""
    if name in lesson.get("introduces", []):
        return f"`{name}` (trained here)"
    cold = _per_profile(profiles.index().get("recipes", {}).get(name, {}).get("minutes"), "min")
    home = next((x for x in profiles.lessons() if name in x.get("introduces", [])), None)
    text = f"`{name}` (from the cache; trained first if the cache lacks it{': ' + cold if cold else ''}"
    return text + (f"; taught in [{_name(home)}]({home['id']}.ipynb))" if home else ")")


def _title(lesson):
    known = {x["id"]: x for x in profiles.lessons()}
    before = [f"[{_name(known[b])}]({b}.ipynb)" if b in known else b for b in lesson.get("before", [])]
    recipes = [
        _recipe(name, lesson) for name in dict.fromkeys(lesson.get("recipes", []) + lesson.get("introduces", []))
    ]
    rows = [
        ("After it you can", "<br>".join(lesson.get("objectives", []))),
        ("Know before", "<br>".join(before) or "nothing"),
        ("Minutes, recipes cached", _per_profile(lesson.get("minutes"), "min")),
        ("Memory", _per_profile(lesson.get("memory_gb"), "GB")),
        ("Recipes", "<br>".join(recipes)),
    ]
    table = "\n".join(f"| {label} | {text.replace('|', chr(92) + '|')} |" for label, text in rows if text)
    parts = [f"# {_name(lesson)}", _badge(lesson), lesson["claim"], f"**Question.** {lesson['question']}"]
    return "\n\n".join(part for part in [*parts, f"| This lesson | |\n|---|---|\n{table}"] if part)


BOOTSTRAP = """# Where the course is installed, this cell does nothing. In Colab it fetches the course and installs it.
import importlib.util
import os
import runpy
import subprocess

if importlib.util.find_spec("course_lib") is None:
    if "COLAB_RELEASE_TAG" not in os.environ:
        cure = "in the course's folder run `make lab`, or `pip install -e .` in this kernel's environment"
        raise ImportError(f"The course's library is not installed here: {{cure}}.")
    repository = os.environ.get("COURSE_REPOSITORY") or "{url}"
    folder = os.path.abspath("course")
    if not os.path.exists(f"{{folder}}/course_lib"):
        command = ["git", "clone", "--quiet", "--depth=1", repository, folder]
        quiet = os.environ | {{"GIT_TERMINAL_PROMPT": "0"}}  # a wrong address is an error, not a question
        cloned = subprocess.run(command, env=quiet, capture_output=True, text=True)
        if cloned.returncode:
            cure = "Put `%env COURSE_REPOSITORY=https://...` with its address into a cell above, and run both."
            raise ImportError(f"Cannot fetch the course from {{repository!r}}: {{cloned.stderr.strip()}}. {{cure}}")
    runpy.run_path(f"{{folder}}/course_lib/colab.py")["install"]()"""


def generated_cells(lesson):
    """The cells that course.toml dictates: four at the head of the notebook, then the one that ends it."""
    url = f"https://github.com/{_repository()}" if _repository() else ""
    start = f'lesson = start("{lesson["id"]}", profile=profile, seed=seed, out_dir=out_dir)'
    sources = {
        "title": _title(lesson),
        "bootstrap": BOOTSTRAP.format(url=url),
        # beside the three that every lesson has: the names of a lesson's own, which are None unless given
        "parameters": 'profile = "auto"\nseed = 0\nout_dir = None'
        + "".join(f"\n{name} = None" for name in lesson.get("parameters", ())),
        "preflight": f"from course_lib import start\n\n{start}",
        "finish": "from course_lib import finish\n\nfinish()",
    }
    make = {True: new_markdown_cell, False: new_code_cell}
    return [make[tag == "title"](sources[tag], id=tag, metadata={"tags": [tag]}) for tag in GENERATED]


def lesson_table():
    """The README's table of lessons, between its two marks."""
    rows = ["| lesson | question | minutes (`cpu`) |", "|---|---|---|"]
    for x in profiles.lessons():
        minutes = x.get("minutes", {}).get("cpu", "")
        rows.append(f"| [{_name(x)}](notebooks/{x['id']}.ipynb) {_badge(x)} | {x['question']} | {minutes} |")
    rows = [row.replace("  |", " |") for row in rows]
    if not _repository():
        rows += ["", "No badges for Colab yet: they need the course's address on GitHub, see [Colab](#colab)."]
    return "\n".join([README_MARKS[0], *rows, README_MARKS[1]])


def scores(lesson):
    """{metric: (value, interval, n)}, texts of the table that a notebook's last stored output is."""
    outputs = read(notebook_path(lesson)).cells[-1].get("outputs") or [{}]
    text = "".join(outputs[-1].get("data", {}).get("text/plain", ""))
    row = r"(?m)^(\w+) +(\S+)(?: +(\[[^\]]+\]))?(?: +n=(\d+))?(?= |$)"
    return {name: (value, interval, n) for name, value, interval, n in re.findall(row, text) if name != "metric"}


def again(lesson):
    """{metric: "value interval"} of a run of the lesson on another processor: `data/reference/other_processor.json` is
    the `results.json` of that run. Nothing where code or data have changed since, or where the stored outputs come from
    that processor too."""
    path = profiles.ROOT / "data" / "reference" / "other_processor.json"
    run = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"lessons": {}}
    entry, nb = run["lessons"].get(lesson["id"]), read(notebook_path(lesson))
    if entry is None or entry.get("fingerprint") != nb.metadata.get("course", {}).get("fingerprint"):
        return {}
    printed = (o.get("text", "") for c in nb.cells if "preflight" in tags(c) for o in c.get("outputs", ()))
    if any(run["hardware"]["cpu"] in text for text in printed):
        return {}
    return {name: " ".join(results._cells(metric)[:2]).strip() for name, metric in entry["metrics"].items()}


def score_table():
    """The README's scoreboard: the metrics of each lesson's `headline`, as its stored outputs have them, and as another
    processor measured them."""
    rows = ["| lesson | measured | value, 95 % interval | n | on another processor |", "|---|---|---|---|---|"]
    for x in profiles.lessons():
        found, second = (scores(x), again(x)) if x.get("headline") else ({}, {})
        for name, words in x.get("headline", {}).items():
            value, interval, n = found.get(name, ("not run yet", "", ""))
            cells = (x["id"].split("_")[0], words, f"{value} {interval}".strip(), n, second.get(name, ""))
            rows.append(f"| {' | '.join(cells)} |")
    rows = [re.sub(r"\|  (?=\|)", "| ", row) for row in rows]
    return "\n".join([SCORE_MARKS[0], *rows, SCORE_MARKS[1]])


def _readme():
    """README.md's text and what it should be; CourseError where the marks of the lesson table are missing."""
    path = profiles.ROOT / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    wanted = text
    for marks, table in ((README_MARKS, lesson_table), (SCORE_MARKS, score_table)):
        head, start, rest = wanted.partition(marks[0])
        _, end, tail = rest.partition(marks[1])
        if start and end:
            wanted = head + table() + tail
        elif marks == README_MARKS:
            raise CourseError(f"README.md has no place for the lesson table: add the lines {' and '.join(marks)}.")
    return text, wanted


def index_check():
    """Differences between course.toml and what is generated from it; an empty list where there are none."""
    problems = []
    for lesson in profiles.lessons():
        try:
            problems += generated(read(notebook_path(lesson)), lesson)
        except CourseError as error:
            problems.append(str(error))
    known = {lesson["id"] for lesson in profiles.lessons()}
    for path in sorted((profiles.ROOT / "notebooks").glob("*.ipynb")):
        if path.stem not in known:
            problems.append(f"notebooks/{path.name}: not in notebooks/course.toml; add its [[lesson]]")
    try:
        text, wanted = _readme()
        problems += ["README.md: a table is old; run `course index --write`"] * (text != wanted)
    except CourseError as error:
        problems.append(str(error))
    return problems


def index_write():
    """Put the generated cells, the README's table and the badges' address in place; returns the files that changed.

    A notebook that does not exist yet begins as its generated cells. Outputs stay: the stale gate judges them.
    """
    changed = [_fill_in_repository()]
    for lesson in profiles.lessons():
        path = notebook_path(lesson)
        nb = read(path) if path.exists() else set_metadata(new_notebook())
        if path.exists() and not generated(nb, lesson):
            continue
        old = {tag: cell for cell in nb.cells for tag in tags(cell) & set(GENERATED)}
        new = generated_cells(lesson)
        for cell in new:
            have = old.get(cell.id)
            if have is not None and cell.cell_type == have.cell_type == "code":
                cell.outputs, cell.execution_count = have.outputs, have.execution_count
        nb.cells = [*new[:4], *(cell for cell in nb.cells if not is_generated(cell)), new[4]]
        changed.append(write_atomically(path, nbformat.v4.writes(nb) + "\n"))
    changed.append(write_atomically(profiles.ROOT / "README.md", _readme()[1]))
    return [path for path in changed if path]


def generated(nb, lesson):
    wanted, cure = generated_cells(lesson), "run `course index --write`"
    have = [*nb.cells[:4], *nb.cells[4:][-1:]]
    problems = []
    for i, want in enumerate(wanted):
        cell, number = (have[i] if i < len(have) else None), (i + 1 if i < 4 else len(nb.cells))
        if cell is None or want.metadata.tags[0] not in tags(cell) or cell.cell_type != want.cell_type:
            problems.append(at(lesson, number, f"should be the generated {want.id} cell; {cure}"))
        elif cell.source != want.source:
            problems.append(at(lesson, number, f"the {want.id} cell differs from notebooks/course.toml; {cure}"))
    for i, cell in enumerate(nb.cells[4:-1], 5):
        problems += [at(lesson, i, "has the tag of a generated cell out of its place; " + cure)] * is_generated(cell)
    return problems
