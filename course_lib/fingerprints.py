"""What a lesson's outputs depend on, as short hashes: a change of one of these asks for another run."""

import ast
import hashlib
import importlib.metadata
import json
import re
from functools import lru_cache
from pathlib import Path

from course_lib import LAZY, CourseError, profiles
from course_lib.index import tags

LIBRARY = Path(__file__).parent
# Modules that cannot change what a lesson computes.
NO_EFFECT = {"__main__", "cli", "runner", "fingerprints", "report", "gates", "index", "bench", "colab", "drift"}


def fingerprint(lesson, profile, seed):
    """What a run of the lesson depends on: what `outputs_fingerprint` counts, profile, seed and installed versions."""
    return _hash(_inputs(read(lesson).cells, lesson, profile), profile, seed, pins(profiles.ROOT))


def outputs_fingerprint(cells, lesson):
    """What a lesson's committed outputs depend on: code cells, library, data, its tables in course.toml.

    Prose and the bootstrap cell do not count, nor do comments and docstrings of the library, nor functions and
    modules that the lesson does not reach, nor recipes that it does not name.
    """
    return _hash(_inputs(cells, lesson, "cpu"))


def _inputs(cells, lesson, profile):
    # Where the library is installed, the bootstrap cell does nothing.
    code = [c.source for c in cells if c.cell_type == "code" and not {"injected-parameters", "bootstrap"} & tags(c)]
    tables = {key: value for key, value in profiles.index().items() if key not in ("course", "lesson", "recipes")}
    used = {*lesson.get("recipes", ()), *lesson.get("introduces", ())}
    for name, recipe in profiles.index().get("recipes", {}).items():
        if name in used:
            settings = {key: value for key, value in recipe.items() if key not in ("minutes", "sweeps", "sizes")}
            tables[f"recipe {name}"] = settings | {"sizes": recipe.get("sizes", {}).get(profile)}
    of_lesson = [
        vars(profiles.sizes(lesson, profile)),
        lesson.get("bands", {}).get(profile),
        [*lesson.get("metrics", ())],
    ]
    library = _library(code, lesson["id"].split("_")[0])
    return [code, tables, of_lesson, library, _data(profiles.ROOT, lesson.get("data", []))]


def pins(root):
    """{distribution: (pinned requirement, installed version or None)} of requirements.txt, as far as markers apply."""
    from packaging.requirements import Requirement

    found, path = {}, root / "requirements.txt"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        line = line.partition("#")[0].strip()
        if line and not line.startswith("-"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                try:
                    installed = importlib.metadata.version(requirement.name)
                except importlib.metadata.PackageNotFoundError:
                    installed = None
                found[requirement.name] = (str(requirement.specifier), installed)
    return found


def _hash(*parts):
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def _library(code, number):
    """{module: its source as far as the cells reach it}: what they import and name, and what that imports and names.

    A name that occurs counts for every module that is reached, so that too much is taken rather than too little.
    """
    every = {path.stem for path in LIBRARY.glob("*.py")}
    cells = "\n".join(re.sub(r"(?m)^\s*[%!].*$|^.*\?\s*$", "", source) for source in code)
    modules, taken = _imports(cells, every), {}
    # `import course_lib`, or cells that cannot be read: all of it counts.
    words = None if modules == every else _words(ast.parse(cells))
    while True:
        left = [(m, n, node) for m in modules - NO_EFFECT for n, node in enumerate(_body(m, number))
                if (m, n) not in taken and (words is None or _named(node, words))]  # fmt: skip
        if not left:
            break
        for module, n, node in left:
            taken[module, n] = ast.unparse(node)  # not ast.dump, which differs between versions of Python
            modules |= _imports(node, every)
            words = words and words | _words(node)
    return {m: "\n".join(taken[key] for key in sorted(taken) if key[0] == m) for m in sorted(modules - NO_EFFECT)}


def _named(node, words):
    """Whether a top-level statement of a module counts: a definition or an import does where its name occurs."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name in words or node.name.startswith("__") or bool(_registered(node))
    if isinstance(node, ast.Import | ast.ImportFrom):
        own = "course_lib" in ast.unparse(node)
        return own or any((alias.asname or alias.name).split(".")[0] in words for alias in node.names)
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        return any(name in words for name in names)
    return True


def _words(tree):
    """Every name, attribute and text that is a name."""
    words = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            words.add(node.id)
        elif isinstance(node, ast.Attribute):
            words.add(node.attr)
        elif isinstance(node, ast.alias):
            words |= set(node.name.split("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            words.add(node.value)
    return words


def _imports(source, every):
    try:
        tree = ast.parse(source) if isinstance(source, str) else source
    except SyntaxError:
        return set(every)
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "course_lib." * bool(node.level) + (node.module or "")
            paths = [base.rstrip(".")] + [f"{base.rstrip('.')}.{alias.name}" for alias in node.names]
        else:
            continue
        for package, *rest in (path.split(".") for path in paths):
            if package == "course_lib":
                names |= {LAZY.get(rest[0], rest[0])} if rest else {"__init__"}
                if isinstance(node, ast.Import) and not rest:
                    return set(every)  # `import course_lib` may reach any of them
    return names & every


@lru_cache(maxsize=64)
def _statements(path, changed):
    """A module's statements without comments and docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                node.body = node.body[1:]
    return tree.body


def _body(module, number):
    """A module's statements without the checks of other lessons' exercises."""
    path = LIBRARY / f"{module}.py"
    found = _statements(path, path.stat().st_mtime_ns)
    return [node for node in found if (_registered(node) or number).split(".")[0] == number]


def _registered(node):
    """The exercise that a function checks, as "04.1"; None for all others."""
    for call in getattr(node, "decorator_list", ()):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "register":
            return str(getattr(call.args[0], "value", ""))
    return None


def _data(root, names):
    """{path: hash} of files, and of all files in folders, of data/."""
    files = {}
    for name in names:
        place = root / "data" / name
        for path in [place] if place.is_file() else sorted(place.rglob("*")):
            if path.is_file() and "/." not in path.as_posix() and "__pycache__" not in path.parts:
                content = path.read_bytes().replace(b"\r\n", b"\n")
                files[path.relative_to(root).as_posix()] = hashlib.sha256(content).hexdigest()
    return files


def read(lesson):
    import nbformat

    path = profiles.ROOT / "notebooks" / f"{lesson['id']}.ipynb"
    try:
        return nbformat.read(path, as_version=4)
    except FileNotFoundError:
        raise CourseError(f"Lesson {lesson['id']} has no notebook: {path} is missing. Restore it with git.") from None
    except Exception as error:
        raise CourseError(f"{path} is no readable notebook ({error}). Restore it with git.") from error
