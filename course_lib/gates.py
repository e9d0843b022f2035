"""What every notebook must be: static gates, and how outputs are cleaned and stored.

A gate is a function ``gate(nb, lesson) -> list[str]``; each string names notebook, cell (counted from 1) and cure.
``nb`` is read without repair, so that a gate sees what lies on disk; ``lesson`` is the lesson's table of course.toml.
"""

import ast
import re
from pathlib import Path

import nbformat

from course_lib import CourseError, profiles, results, runner
from course_lib.index import (
    at,
    generated,
    generated_cells,
    index_check,
    index_write,
    is_generated,
    notebook_path,
    read,
    set_metadata,
    tags,
    write_atomically,
)

__all__ = ["GATES", "generated_cells", "index_check", "index_write", "refresh", "stamp", "static_gates"]
MAX_BYTES, MAX_LINES = 1_500_000, 40


def caption(cells, index):
    """The caption of the figure in ``cells[index]`` (counted from 0): the markdown cell after it, else before it."""
    for i in (index + 1, index - 1):
        taken = i < index and i > 0 and has_figure(cells[i - 1])  # then it is the caption of the figure before it
        if 0 <= i < len(cells) and cells[i].source.startswith("**Figure") and not taken:
            return cells[i].source
    return None


def has_figure(cell):
    return any({"image/png", "image/svg+xml"} & set(out.get("data", {})) for out in cell.get("outputs", []))


def output_texts(cell):
    """What a reader can read in a cell's outputs; tags of HTML tables are taken off."""
    for out in cell.get("outputs", []):
        if out.output_type == "stream":
            yield out.text
        data = out.get("data", {})
        yield from (data[kind] for kind in ("text/plain", "text/markdown") if kind in data)
        if "text/html" in data:
            yield re.sub(r"<style.*?</style>|<[^>]+>", " ", data["text/html"], flags=re.S)


def numbered(nb, kind):
    """(number, cell) of each cell of one type, numbers counted from 1 over all cells."""
    return [(i, cell) for i, cell in enumerate(nb.cells, 1) if cell.cell_type == kind]


def parse(source):
    """The syntax tree of a code cell; lines for IPython (%, !, ?) are left out. None where it is no Python."""
    try:
        return ast.parse(re.sub(r"(?m)^\s*[%!].*$|^.*\?\s*$", "", source))
    except SyntaxError:
        return None


def _called(node):
    return getattr(node.func, "id", getattr(node.func, "attr", None))


def calls(tree, name):
    """Every call of ``name(...)`` or ``something.name(...)`` that has a first argument."""
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Call) and node.args and _called(node) == name:
            yield node


def notebook_format(nb, lesson):
    where = f"notebooks/{lesson['id']}.ipynb"
    problems = []
    if (nb.get("nbformat"), nb.get("nbformat_minor")) != (4, 5):
        problems.append(f"{where}: notebook format {nb.get('nbformat')}.{nb.get('nbformat_minor')}, wanted 4.5")
    ids = [cell.get("id") for cell in nb.cells]
    problems += [at(lesson, i, "has no id; save it with JupyterLab") for i, x in enumerate(ids, 1) if not x]
    problems += [at(lesson, i, f"id {x!r} is used twice") for i, x in enumerate(ids, 1) if x and x in ids[: i - 1]]
    if not problems:
        try:
            nbformat.validate(nb)
        except nbformat.ValidationError as error:
            problems.append(f"{where}: not a valid notebook: {str(error).splitlines()[0]}")
    return problems


def _prints(tree):
    """Whether running the cell must show something: a bare print, display or like at its top level or in a loop."""
    shown = {"print", "display", "record", "check", "start", "show_source"}
    body = list(tree.body) if tree else []
    for node in body:
        if isinstance(node, ast.For | ast.With):
            body += node.body
        value = node.value if isinstance(node, ast.Expr | ast.Assign) else None
        if isinstance(value, ast.Call) and _called(value) in shown:
            return True
    last = tree.body[-1] if tree and tree.body else None
    return isinstance(last, ast.Expr) and isinstance(last.value, ast.Name | ast.Attribute)


def outputs(nb, lesson):
    problems, size, cure = [], len(nbformat.v4.writes(nb).encode()), "run `make refresh`"
    if size > MAX_BYTES:
        limit = f"at most {MAX_BYTES / 1e6} MB; save figures at a lower resolution"
        problems.append(f"notebooks/{lesson['id']}.ipynb: {size / 1e6:.2f} MB, {limit}")
    for count, (i, cell) in enumerate(numbered(nb, "code"), 1):
        if not cell.source.strip():
            problems.append(at(lesson, i, "empty code cell; delete it"))
        elif cell.execution_count != count:
            problems.append(at(lesson, i, f"execution count {cell.execution_count}, wanted {count}; {cure}"))
        elif not cell.outputs and not cell.source.rstrip().endswith(";") and _prints(parse(cell.source)):
            problems.append(at(lesson, i, f"shows something when it runs, but its output is missing; {cure}"))
        if any(out.output_type == "error" for out in cell.outputs):
            problems.append(at(lesson, i, "holds an error; an exhibit catches its error and prints it"))
    return problems


# A trace is (what it is, pattern). Data of images is not searched: base64 holds every short string in the end.
PLACES = r"(?<![\w.~])/(?:home|root|tmp|work|Users|mnt|builds)/|[A-Za-z]:\\+Users|site-packages"
TRACES = [
    ("a path of one machine", re.compile(PLACES)),
    ("a time stamp", re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d")),
    ("an address in memory", re.compile(r" at 0x[0-9a-f]{6,}")),
]
RUN_METADATA = ("execution", "papermill", "ExecuteTime", "scrolled", "collapsed", "trusted")
WIDGET = "application/vnd.jupyter.widget-view+json"


def traces(nb, lesson):
    where, cure = f"notebooks/{lesson['id']}.ipynb", "run `make refresh`"
    found = [f"{where}: metadata.{key} is of one run; {cure}" for key in ("widgets", "papermill") if key in nb.metadata]
    for i, cell in enumerate(nb.cells, 1):
        for kind, pattern in TRACES:
            source = "" if kind == "a time stamp" else cell.source
            hit = next((m for text in (source, *output_texts(cell)) if (m := pattern.search(text))), None)
            if hit:
                found.append(at(lesson, i, f"shows {kind} ({hit.group().strip()}); print a name or a duration instead"))
        left = [key for key in RUN_METADATA if key in cell.metadata] + sorted(tags(cell) & {"injected-parameters"})
        left += ["a widget"] * any(WIDGET in out.get("data", {}) for out in cell.get("outputs", []))
        if left:
            found.append(at(lesson, i, f"carries {', '.join(left)} of one run; {cure}"))
    return found


def stale(nb, lesson):
    course, where = nb.metadata.get("course", {}), f"notebooks/{lesson['id']}.ipynb"
    cure = f"run `make refresh` (LESSON={lesson['id'][:2]} for this one alone)"
    if course.get("outputs_of") != "cpu":
        return [f"{where}: its outputs are of profile {course.get('outputs_of')!r}, wanted 'cpu'; {cure}"]
    if course.get("fingerprint") != runner.outputs_fingerprint(nb.cells, lesson):
        return [f"{where}: stale: its cells, the library or its data changed after its outputs were made; {cure}"]
    return []


def shape(nb, lesson):
    problems = []
    for i, cell in numbered(nb, "code"):
        if is_generated(cell):
            continue
        lines = len(cell.source.splitlines())
        if lines > MAX_LINES:
            problems.append(at(lesson, i, f"{lines} lines of code, at most {MAX_LINES}; split it, one idea a cell"))
        before = nb.cells[i - 2]
        prose = re.sub(r"(?m)^#.*$|<[^>]+>", "", before.source) if before.cell_type == "markdown" else ""
        if is_generated(before) or not re.search(r"\w{2}", prose):
            problems.append(at(lesson, i, "code without a sentence before it; add one that says what the cell does"))
    return problems


def captions(nb, lesson):
    problems = []
    for i, cell in enumerate(nb.cells):
        drawing = cell.cell_type == "markdown" and re.search(r"!\[[^\]]*\]\((?!https?:)|<img|<svg", cell.source)
        if (drawing or has_figure(cell)) and not caption(nb.cells, i) and "**Figure" not in cell.source:
            cure = "put a markdown cell beneath it that begins with **Figure and says what to look at"
            problems.append(at(lesson, i + 1, f"figure without a caption; {cure}"))
    heads = [(i, cell.source) for i, cell in numbered(nb, "markdown") if cell.source.startswith("**Figure")]
    for count, (i, text) in enumerate(heads, 1):
        if not re.match(rf"\*\*Figure {count}\. [^*]+[.?]\*\* ", text):
            problems.append(
                at(lesson, i, f"caption {text[:24]!r}, wanted **Figure {count}. Title.** and where to look")
            )
    return problems


def links(nb, lesson):
    """A link leads to a lesson of the index, or to a file as seen from the notebook's folder."""
    folder, problems = notebook_path(lesson).parent, []
    lessons = {f"{other['id']}.ipynb" for other in profiles.lessons()}
    for i, cell in numbered(nb, "markdown"):
        if is_generated(cell):
            continue
        prose = re.sub(r"(?ms)^```.*?^```|`[^`\n]+`|\$[^$\n]+\$", " ", cell.source)
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            path = target.partition("#")[0]
            inside = path and path not in lessons and not re.match(r"[a-z]+:", target)
            if inside and not (folder / path).exists():
                problems.append(at(lesson, i, f"links to {target}, which does not exist; mend the link"))
    return problems


def where_next(nb, lesson):
    """The last section before the sources names the lesson that follows in the index, with a link."""
    ids = [other["id"] for other in profiles.lessons()]
    later = ids[ids.index(lesson["id"]) + 1 :][:1] if lesson["id"] in ids else []
    text = "\n".join(cell.source for _, cell in numbered(nb, "markdown")).partition("## Where next")[2]
    if later and f"]({later[0]}.ipynb)" not in text.partition("\n## ")[0]:
        cure = f"add a line with [...]({later[0]}.ipynb)"
        return [f"notebooks/{lesson['id']}.ipynb: 'Where next' does not link the next lesson; {cure}"]
    return []


def exercises(nb, lesson):
    """Two to four exercises; one reaches from a heading that names it (`### Exercise 04.2 ...`) to the next heading."""
    number, where = lesson["id"].split("_")[0], f"notebooks/{lesson['id']}.ipynb"
    zones, zone = {}, None
    for i, cell in enumerate(nb.cells, 1):
        if cell.cell_type == "markdown" and re.match(r"#{1,4}\s", cell.source):
            # The first exercise may stand beneath the section's heading, in one cell with it.
            name = re.search(rf"(?m)^#{{1,4}}\s.*?\b({number}\.\d+)\b", cell.source)
            zone = zones.setdefault(name.group(1), [i, "", set()]) if name else None
        if zone and cell.cell_type == "markdown":
            zone[1] += "\n" + cell.source.lower()
        if zone and cell.cell_type == "code":
            zone[2] |= {getattr(call.args[0], "value", None) for call in calls(parse(cell.source), "check")}
    problems = []
    if not 2 <= len(zones) <= 4:
        problems.append(f"{where}: {len(zones)} exercises, wanted 2 to 4, each beneath `### Exercise {number}.1 ...`")
    for name, (i, text, checked) in zones.items():
        details = " ".join(re.findall(r"<details[^>]*>.*?</details>", text, flags=re.S))
        parts = {
            f'check("{name}", ...)': name in checked,
            "its difficulty": "difficulty" in text,
            "its importance": "importance" in text,
            "a time box in minutes": re.search(r"\d\s*min", text),
            "a hint in <details>": "hint" in details,
            "a solution in <details>": "solution" in details,
        }
        problems += [at(lesson, i, f"exercise {name} lacks {part}") for part, there in parts.items() if not there]
    return problems


def headings(nb, lesson):
    text = "\n".join(cell.source for _, cell in numbered(nb, "markdown"))
    return [
        f"notebooks/{lesson['id']}.ipynb: no heading '{wanted}'; add the section"
        for wanted in ("What you should see", "Recap", "Sources")
        if not re.search(rf"(?mi)^#{{1,4}}\s.*{wanted}", text)
    ]


def metrics(nb, lesson):
    """Each metric of course.toml is recorded by a `record("name", ...)`; an f-string's fields match any word."""
    patterns = []
    for _, cell in numbered(nb, "code"):
        for call in calls(parse(cell.source), "record"):
            name = call.args[0]
            parts = name.values if isinstance(name, ast.JoinedStr) else [name]
            known = [re.escape(str(part.value)) if isinstance(part, ast.Constant) else r"\w+" for part in parts]
            patterns += ["".join(known)] * any(isinstance(part, ast.Constant) for part in parts)
    where, wanted = f"notebooks/{lesson['id']}.ipynb", lesson.get("metrics", {})
    problems = [
        f'{where}: metric {name} of course.toml is not recorded; add record("{name}", ...)'
        for name in wanted
        if not any(re.fullmatch(pattern, name) for pattern in patterns)
    ]
    banded = {name: profile for profile, bands in lesson.get("bands", {}).items() for name in bands}
    return problems + [
        f"{where}: course.toml has a band for {name} ({profile}), which is not in its [lesson.metrics]"
        for name, profile in banded.items()
        if name not in wanted
    ]


# Numbers in the prose

NOT_PROSE = re.compile(
    r"^(```|~~~).*?^\1|<style.*?</style>|<svg.*?</svg>|`+[^`]+`+|\$\$.*?\$\$|(?<!\\)\$(?!\s)[^$\n]+?(?<!\s)\$(?!\d)"
    r"|\\\(.*?\\\)|\\\[.*?\\\]|</?(?!https?:)[A-Za-z!][^<>]*>",
    re.S | re.M,
)
SOURCE = re.compile(r"\[source:|\]\(|https?://")
NAMES = re.compile(  # numbers that name something: versions, papers, numbered things, intervals by their level
    r"\d+\.\d+\.\d+\S*|\d{4}\.\d{4,5}|\b0\d\.\d+\b|9[059]\s?%[\s-](?:\w+ )?(?:interval|CI\b|confidence|band)"
    r"|(?i:\b(?:v|version|release|python|cuda|pytorch|torch|transformers|trl|peft|bitsandbytes|accelerate|datasets"
    r"|exercise|lesson|figure|section|table|chapter|pandas|numpy)\s*[<>=]*)\s*[1-9]\d*(?:\.\d+)+|\d\.\d+[BM]\b"
)
NUMBER = re.compile(r"(?<![\w.])(?<![\w.]-)(\d+(?:\.\d+(?:e[-+]?\d+)?)?)(\s?(?:%|percent\b|per cent\b))?")
PRINTED = re.compile(r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)(\s?%)?", re.I)


def sentences(markdown):
    """The prose of a markdown cell, sentence by sentence; rows of a table share a source that follows the table."""
    text = re.sub(r"\n\s*\n(?=\[source:)", "\n", NOT_PROSE.sub(" ", markdown))
    for block in re.split(r"\n\s*\n", text):
        if "[source:" in block and block.lstrip().startswith("|"):
            continue
        for item in re.split(r"\n(?=\s*(?:[-*+|>#]|\d+\.\s))", block):
            yield from re.split(r"(?<=[.!?\]])\s+(?=[A-Z*_(\"“]|\[(?!source))", " ".join(item.split()))


def unmeasured(sentence, printed):
    """Decimals and percentages of a sentence that none of the printed (value, is_percent, is_decimal) rounds to."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", NAMES.sub(" ", sentence))
    text = re.sub(r"(?<![\w.])(\d+(?:\.\d+)?)-(?=\d)", r"\1 – ", text)  # a range is two numbers, a dash no minus
    for match in NUMBER.finditer(text):
        number, percent = match.groups()
        if not percent and "." not in number:
            continue
        mantissa, _, exponent = number.partition("e")
        unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))  # of the last digit that is written
        claim, tolerance = float(number), unit / 2 * (1 + 1e-6)
        for value, is_percent, is_decimal in printed:
            if percent:  # 62 % is 62.1 %, or 62.1 in a table of percentages, or 0.621
                candidates = [value] * (is_percent or is_decimal) + [100 * value] * (is_decimal and not is_percent)
            else:  # 0.62 is 0.6213, or 62 %
                candidates = [value / 100 if is_percent else value, value]
            if any(abs(claim - candidate) <= tolerance for candidate in candidates):
                break
        else:
            yield match.group().strip()


def numbers(nb, lesson):
    """Each decimal and percentage of the prose stands in an output above it, or its sentence names a source."""
    problems, printed = [], set()
    for i, cell in enumerate(nb.cells, 1):
        for text in output_texts(cell):
            for number, percent in PRINTED.findall(re.sub(r"(?<=\d),(?=\d{3})", "", text)):
                printed.add((float(number), bool(percent), not number.isdigit()))
        if cell.cell_type == "markdown" and not is_generated(cell):
            for sentence in sentences(cell.source):
                for claim in () if SOURCE.search(sentence) else unmeasured(sentence, printed):
                    cure = "print it above, put it in a code span if it is a setting, or add [source: ...]"
                    problems.append(at(lesson, i, f"{claim} is in no output above it ({sentence[:60]!r}); {cure}"))
    return problems


LEDGER = re.compile(r"(?m)^(\d\d)\b.*?(\d[\d.]*) min +\$")  # a row of the ledger: lesson, its title, minutes, dollars


def ledger(nb, lesson):
    """A ledger that a cell prints from the minutes of course.toml says what stands there now.

    Minutes count in no fingerprint, so that a changed header makes no lesson stale; only what prints them does age.
    """
    planned = {other["id"][:2]: other.get("minutes", {}).get("cpu") for other in profiles.lessons()}
    problems = []
    for i, cell in numbered(nb, "code"):
        if '["minutes"]' not in cell.source:
            continue
        shown = dict(row for text in output_texts(cell) for row in LEDGER.findall(text))
        old = [
            f"{number} ({shown.get(number, 'nothing')} for {planned.get(number, 'nothing')})"
            for number in sorted(planned.keys() | shown.keys())
            if float(shown.get(number, "nan")) != planned.get(number)
        ]
        if old:
            cure = f"run `make refresh LESSON={lesson['id'][:2]}`"
            problems.append(at(lesson, i, f"its minutes of lessons {', '.join(old)} are not course.toml's; {cure}"))
    return problems


GATES = (
    notebook_format,
    generated,
    outputs,
    traces,
    stale,
    shape,
    captions,
    links,
    where_next,
    exercises,
    headings,
    metrics,
    numbers,
    ledger,
)


def static_gates():
    """Every problem of every notebook in the index."""
    problems = []
    for lesson in profiles.lessons():
        try:
            nb = read(notebook_path(lesson))
        except CourseError as error:
            problems.append(str(error))
            continue
        # The other gates may rely on a well-formed notebook.
        problems += notebook_format(nb, lesson) or [text for gate in GATES[1:] for text in gate(nb, lesson)]
    return problems


def _without_progress(text):
    lines = [line for line in re.split(r"[\r\n]", text) if not re.search(r"\d%\||it/s|s/it", line)]
    return "".join(line + "\n" for line in lines if line.replace("\x1b[A", "").strip())


def _clean_outputs(cell):
    """Drops progress bars, widgets and addresses in memory, joins what one stream said in pieces."""
    kept = []
    for out in cell.outputs:
        if out.get("name") == "stderr":
            out.text = _without_progress(out.text)
        if WIDGET in out.get("data", {}) or out.get("text") == "":
            continue
        if out.output_type == "stream" and kept and kept[-1].get("name") == out.name:
            kept[-1].text += out.text
            continue
        if out.output_type == "execute_result":
            out.execution_count = cell.execution_count
        data = out.get("data", {})
        if len(data) > 1 and "text/plain" in data:  # beside a table it is an object's name, with its address in memory
            data["text/plain"] = re.sub(r" at 0x[0-9a-f]+", "", data["text/plain"])
        kept.append(out)
    return kept


def stamp(nb, lesson):
    """Clean a freshly executed notebook in place and write down what its outputs were made from; returns it."""
    set_metadata(nb)
    nb.cells = [cell for cell in nb.cells if "injected-parameters" not in tags(cell)]
    for cell in nb.cells:
        for key in RUN_METADATA:
            cell.metadata.pop(key, None)
    for count, (_, cell) in enumerate(numbered(nb, "code"), 1):
        cell.execution_count = count
        cell.outputs = _clean_outputs(cell)
    nb.nbformat, nb.nbformat_minor = 4, 5
    nb.metadata.course = {"outputs_of": "cpu", "fingerprint": runner.outputs_fingerprint(nb.cells, lesson)}
    return nb


def refresh(lessons=(), out=None):
    """Run lessons (all where empty) in profile cpu and store the outputs of those that passed; returns the exit code.

    Only outputs are taken over, so prose that was edited while the lesson ran stays; a lesson that failed, or whose
    code or data changed meanwhile, leaves its notebook as it was.
    """
    chosen = [profiles.lesson(name) for name in lessons] or profiles.lessons()
    out = Path(out).absolute() if out else results.base_dir() / "cpu"
    code = runner.run([lesson["id"] for lesson in chosen], profile="cpu", out=out)
    entries = results.read(out)["lessons"]
    for lesson in chosen:
        name, entry = lesson["id"], entries.get(lesson["id"], {})
        if entry.get("status") != "passed":
            print(f"{name}  {entry.get('status', 'not run')}: its notebook stays as it was")
        elif entry.get("inputs") != runner.fingerprint(lesson, "cpu", 0):
            print(f"{name}  changed while it ran: its notebook stays as it was; run `make refresh` again")
        else:
            store(read(out / "notebooks" / f"{name}.ipynb"), lesson)
            print(f"{name}  outputs stored in notebooks/{name}.ipynb")
    return code


def store(executed, lesson):
    """Put an executed notebook's outputs, cleaned, into the lesson's own notebook."""
    nb = read(notebook_path(lesson))
    done = [cell for _, cell in numbered(executed, "code") if "injected-parameters" not in tags(cell)]
    for (_, cell), run in zip(numbered(nb, "code"), done, strict=True):
        cell.outputs = run.outputs
    write_atomically(notebook_path(lesson), nbformat.v4.writes(stamp(nb, lesson)) + "\n")
