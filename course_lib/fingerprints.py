"""What a lesson's outputs depend on, as short hashes: a change of one of these asks for another run."""

import ast
import hashlib
import importlib.metadata
import json
import re
from pathlib import Path

from course_lib import LAZY, CourseError, profiles
from course_lib.index import tags

LIBRARY = Path(__file__).parent
# Modules that cannot change what a lesson computes.
NO_EFFECT = {"__main__", "cli", "runner", "fingerprints", "report", "gates", "index", "bench", "colab"}


def fingerprint(lesson, profile, seed):
    """What a run of the lesson depends on: what `outputs_fingerprint` counts, profile, seed and installed versions."""
    return _hash(_inputs(read(lesson).cells, lesson, profile), profile, seed, pins(profiles.ROOT))


def outputs_fingerprint(cells, lesson):
    """What a lesson's committed outputs depend on: code cells, library, data, its tables in course.toml.

    Prose and the bootstrap cell do not count, nor do comments and docstrings of the library, nor modules that the
    lesson does not reach, nor recipes that it does not name.
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
    library = {name: _meaning(name, lesson["id"].split("_")[0]) for name in _reached(code)}
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


def _reached(code):
    """Modules of the library that the cells import, and those that these import in turn."""
    every = {path.stem for path in LIBRARY.glob("*.py")}
    found, left = set(), _imports("\n".join(re.sub(r"(?m)^\s*[%!].*$|^.*\?\s*$", "", source) for source in code), every)
    while left:
        name = left.pop()
        found.add(name)
        left |= _imports((LIBRARY / f"{name}.py").read_text(encoding="utf-8"), every) - found
    return sorted(found - NO_EFFECT)


def _imports(source, every):
    try:
        tree = ast.parse(source)
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


def _meaning(module, number):
    """A module without comments and docstrings, and without the checks of other lessons' exercises."""
    tree = ast.parse((LIBRARY / f"{module}.py").read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not _check_of_another(node, number)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                node.body = node.body[1:]
    return ast.unparse(tree)  # not ast.dump, which differs between versions of Python


def _check_of_another(node, number):
    for call in getattr(node, "decorator_list", ()):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "register":
            return not str(getattr(call.args[0], "value", number)).startswith(f"{number}.")
    return False


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
