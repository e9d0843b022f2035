"""The program ``course``. Each command imports what it needs, so that `course --help` starts at once."""

import argparse
import contextlib
import errno
import os
import shutil
import sys
from pathlib import Path

from course_lib import CourseError

OK, FAILED, WRONG = 0, 1, 2
# What the course puts into its cache; a folder named by COURSE_CACHE may hold more.
CACHE = ("smollm2-*", "making-*", "fetch.lock", "adapters", "samples")


# --- commands --------------------------------------------------------------------------------------------------------


def run(args):
    from course_lib import runner

    return runner.run(args.lessons, args.profile, args.seed, args.out, args.resume, args.timeout)


def results(args):
    from course_lib import results

    found = results.read(args.dir or results.latest())
    print(results.scoreboard(found))
    problems = results.problems(found)
    print("\n" + ("\n".join(problems) or "every band is met"))
    return FAILED if problems else OK


def report(args):
    from course_lib import report, results

    print(report.build(Path(args.dir or results.latest()).absolute()))


def data(args):
    import importlib.util

    from course_lib import profiles

    path = profiles.ROOT / "data" / "build.py"
    if not path.exists():
        raise CourseError(f"{path} is missing: data can be built in a checkout of the course only.")
    spec = importlib.util.spec_from_file_location("course_data_build", path)
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    if args.write:
        build.write()
        return OK
    return _verdict(build.check(), "data", "course data --write")


def index(args):
    from course_lib import index

    if args.write:
        print("\n".join(index.index_write()) or "index: nothing to change")
        return OK
    return _verdict(index.index_check(), "index", "course index --write")


def check(args):
    from course_lib import gates

    code = _verdict(gates.static_gates(), "notebooks", "what each line says")
    return max(code, index(argparse.Namespace(write=False)), data(argparse.Namespace(write=False)))


def fetch(args):
    from course_lib import models

    print(models.fetch(progress=True))


def refresh(args):
    from course_lib import gates, profiles

    return gates.refresh([profiles.lesson(name)["id"] for name in args.lessons], args.out)


def reference(args):
    import importlib

    from course_lib import profiles, reference

    chosen = [profiles.lesson(name) for name in args.lessons] or profiles.lessons()
    for table in chosen:
        if module := table.get("reference"):  # what it measures is more than a recipe by itself
            seeds = reference.SEEDS if args.seed is None else (int(args.seed),)
            importlib.import_module(f"course_lib.{module}").make_reference(seeds)
        elif args.lessons or table.get("introduces"):
            reference.run(table["id"], args.seed)


def drift(args):
    from course_lib import drift

    return drift.main(args.run, args.tests)


def memory(args):
    """The bytes planner: a table of shapes by method, or the parts of one shape."""
    import dataclasses

    from course_lib import memory

    names = ("rank", "batch", "length", "optimizer", "checkpointing")
    options = {name: getattr(args, name) for name in names}
    methods = [args.method] if args.method else list(memory.METHODS)
    limit = memory.GPUS[args.gpu] / 1e9
    if args.model is None:
        print(f"GB while training, on {args.gpu} ({limit:.1f} GB); a star does not fit\n")
        print(f"{'model':<14}{'billions':>9}" + "".join(f"{method:>9}" for method in methods))
        for row in memory.table(args.gpu, methods=methods, **options):
            cells = (f"{row[method]:8.1f}" + (" " if row[f"{method} fits"] else "*") for method in methods)
            print(f"{row['model']:<14}{row['billions']:9.2f}" + "".join(cells))
    else:
        shape = memory.shape(args.model)
        plans = [memory.plan(shape, method, **options) for method in methods]
        print(f"{shape.name}, {shape.parameters / 1e9:.2f} billion parameters; GB while training\n")
        print(f"{'':<14}" + "".join(f"{method:>9}" for method in methods))
        for part in (field.name for field in dataclasses.fields(memory.Plan)):
            print(f"{part:<14}" + "".join(f"{getattr(p, part) / 1e9:9.2f}" for p in plans))
        print(f"{'total':<14}" + "".join(f"{p.total / 1e9:9.2f}" for p in plans))
        fits = "".join(f"{'yes' if p.total <= memory.GPUS[args.gpu] else 'no':>9}" for p in plans)
        print(f"{f'fits {args.gpu}':<14}{fits}   ({limit:.1f} GB)")
    print("\n" + memory.assumptions(**options))


def gate(args):
    """The ten stages of lesson 11 on an adapter: exit code 0 where it may ship, 1 where it is refused."""
    from course_lib import profiles, release, results

    folder = release.require_adapter(args.adapter)
    if args.seal:
        print(f"sealed: {release.seal(folder)}")
        return OK
    profile = profiles.choose(args.profile)
    report = release.gate(folder, profile, stop=not args.all)
    out = Path(args.out or results.default_dir(profile) / "gate").absolute()
    if report.skipped:
        print(f"not run: {', '.join(report.skipped)}")
    if report.passed:
        print(f"\n{report.adapter} may ship; registered: {release.register(report, folder, out)}")
        return OK
    print(f"\n{report.adapter} is refused ({'; '.join(report.reasons)}); report: {report.write(out / report.adapter)}")
    return FAILED


def bench(args):
    from course_lib import bench

    return bench.main()


def lab(args):
    from course_lib import profiles, runner

    work = Path(args.dir or profiles.ROOT / "work").absolute()
    new = working_copy(profiles.ROOT / "notebooks", work)
    trust([work / name for name in new if name.endswith(".ipynb")])
    new += glossary_copy(profiles.ROOT / "GLOSSARY.md", work)
    for name in new:
        print(f"copied {name}")
    print(f"Your working copy is {work}. Nothing overwrites it; delete a file there to get the course's version again.")
    print("JupyterLab's address follows (it also opens by itself); stop it with Ctrl-C.", flush=True)
    # The kernelspec of this environment comes first, so that "Python 3" means this Python whatever else is installed.
    paths = [str(Path(sys.prefix) / "share" / "jupyter"), os.environ.get("JUPYTER_PATH")]
    environment = os.environ | runner.kernel_environment() | {"JUPYTER_PATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={work}", *args.extra]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # a container of one's own; Jupyter refuses otherwise
    if os.name == "nt":
        import subprocess

        return subprocess.call(command, env=environment)
    os.execve(command[0], command, environment)


def working_copy(source, work):
    """Copy what ``work`` does not have yet; returns the new names. What is there stays as the learner left it."""
    new = []
    try:
        for path in sorted(source.rglob("*")):
            name = path.relative_to(source)
            if path.is_file() and path.name != "course.toml" and not any(part[0] in "._" for part in name.parts):
                if not (work / name).exists():
                    (work / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, work / name)
                    new.append(str(name))
    except OSError as error:
        cure = "Choose another place: course lab --dir DIR."
        raise CourseError(f"Cannot write {work} ({error.strerror}). {cure}") from error
    return new


def glossary_copy(source, work):
    """The glossary beside the working copies, with its links made to fit; written once, like they are."""
    from course_lib.results import write_text

    target = work / source.name
    if target.exists() or not source.exists():
        return []
    write_text(target, source.read_text(encoding="utf-8").replace("](notebooks/", "]("))
    return [source.name]


def trust(notebooks):
    """Sign the course's own notebooks: JupyterLab hides the stored drawings (SVG) of one that it does not trust."""
    import sqlite3

    import nbformat
    from nbformat.sign import NotebookNotary

    try:
        notary = NotebookNotary()
        for path in notebooks:
            notary.sign(nbformat.read(path, as_version=4))
    except (OSError, ValueError, sqlite3.Error) as error:  # a home that cannot be written, a damaged notebook
        print(f"note: the notebooks could not be signed ({error}); their drawings appear once their cells have run")


def clean(args):
    """Removes the folders of runs, and with --cache the cache of models and adapters; says how much each was."""
    from course_lib import profiles, results, runner

    targets = [results.base_dir() / name for name in profiles.PROFILES]
    own = profiles.ROOT / "runs"
    if own.is_dir() and not own.is_symlink():
        targets += [path for path in sorted(own.iterdir()) if path not in targets]
    targets = [path for path in targets if runner.is_run(path)]
    if args.cache:
        from course_lib import models

        targets += [path for name in CACHE for path in sorted(models.cache_dir().glob(name))]
    for path in targets:
        if path.is_symlink():
            print(f"left alone: {path} is a link")
        elif path.is_file():
            path.unlink()
        else:
            with runner.locked(path) if runner.is_run(path) else contextlib.nullcontext():  # not under a running lesson
                size = _bytes(path)
                shutil.rmtree(path)
            print(f"removed {path} ({size / 2**20:.1f} MB)")
    with contextlib.suppress(OSError):
        own.rmdir()  # where it is empty now
    if not targets:
        print("nothing to remove")


def _bytes(path):
    return sum(p.lstat().st_size for p in path.rglob("*") if p.is_file() or p.is_symlink())


def _verdict(problems, what, cure):
    for line in problems:
        print(f"{what}: {line}")
    print(f"{what}: {len(problems)} problems; cure: {cure}" if problems else f"{what}: good")
    return FAILED if problems else OK


# --- doctor ----------------------------------------------------------------------------------------------------------


def doctor(args):
    """One screen about this machine; exit code 2 where something keeps lessons from running."""
    from course_lib import fingerprints, hardware, models, profiles, results

    blocks = []

    def line(label, text, cure=None):
        print(f"{label:<12}{'!! ' if cure else ''}{text}")
        if cure:
            blocks.append(f"{label.strip()}: {cure}")

    version = ".".join(map(str, sys.version_info[:3]))
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    line("Python", f"{version}  {sys.executable}", None if supported else "install Python 3.11, 3.12 or 3.13")
    if _doctor_versions(line, fingerprints.pins(profiles.ROOT)):
        print("\nto do: " + "\nto do: ".join(blocks))  # without its packages, the rest of the screen cannot be drawn
        return WRONG
    about = hardware.describe()
    line("CPU", f"{about['cpu']}, {about['cores']} cores, {about['features'] or 'no AVX2'}")
    line("compute", f"{about['dtype']} on {about['device']}")
    line("GPU", _gpu(about))
    _doctor_memory(line, profiles.lessons())
    _doctor_disk(line, "cache", models.cache_dir(), "COURSE_CACHE")
    _doctor_disk(line, "output", results.base_dir(), "COURSE_OUT")
    path, damage = models.base_path(), models.damaged(thorough=True)
    state = damage or f"{_bytes(path) / 2**20:.0f} MB, verified"
    line("base model", f"{path}  {state}", "run: course fetch" if damage else None)
    speed = hardware.speed()
    where = f"as fast as this machine is now ({speed:.2f} of the reference machine's products)" if speed else "on a T4"
    # Where products are quicker, as with AMX, the rest of a step is not: such a machine needs the reference's minutes.
    speed = speed and min(speed, 1.0)
    print(f"\nexpected minutes per lesson, {where}; the default profile here is {profiles.choose('auto')}")
    for lesson in profiles.lessons():
        here = {name: 1 if name == "t4" else speed or 1 for name in lesson["minutes"]}  # a slow laptop slows no T4
        minutes = "  ".join(f"{name} {value / here[name]:.1f}" for name, value in lesson["minutes"].items())
        print(f"  {lesson['id']:<28}{minutes}")
    print("\n" + ("\n".join(f"to do: {text}" for text in blocks) or "ready"))
    return WRONG if blocks else OK


def _doctor_versions(line, pins):
    from packaging.specifiers import SpecifierSet

    missing = [name for name, (_, installed) in pins.items() if installed is None]
    other = [
        f"{name} {installed} (pinned {wanted})"
        for name, (wanted, installed) in pins.items()
        if installed and not SpecifierSet(wanted).contains(installed, prereleases=True)
    ]
    good = len(pins) - len(missing) - len(other)
    line("packages", f"{good} of {len(pins)} as pinned" + (f"; other: {', '.join(other)}" if other else ""))
    if missing:
        line("missing", ", ".join(missing), "pip install -r requirements.txt")
    return missing


def _doctor_memory(line, lessons):
    import psutil

    memory = psutil.virtual_memory()
    needed = max((lesson.get("memory_gb", {}).get("ci", 0) for lesson in lessons), default=0)
    free, short = memory.available / 2**30, memory.available / 2**30 < needed
    cure = f"{needed} GB are needed by the largest lesson in profile ci; close other programs" if short else None
    line("memory", f"{memory.total / 2**30:.1f} GB, {free:.1f} GB free", cure)


def _gpu(about):
    if "gpu" not in about:
        return "none that PyTorch can use: the lessons run on the CPU"
    bf16 = "real bf16" if about["gpu_real_bf16"] else "bf16 only emulated, so float16 is used"
    return f"{about['gpu']}, {about['gpu_memory_gb']} GB, capability {about['gpu_capability']}: {bf16}"


def _doctor_disk(line, label, path, variable):
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(there).free / 2**30
    cure = None
    if not os.access(there, os.W_OK) or not there.is_dir():
        cure = f"{there} cannot be written; set {variable} to another folder"
    elif free < 1:
        cure = f"make room, or set {variable} to another disk"
    line(label, f"{path}  {free:.1f} GB free", cure)


# --- the command line ------------------------------------------------------------------------------------------------


def parser():
    top = argparse.ArgumentParser(
        prog="course",
        description="Runs, checks and reports the lessons of the course.",
        epilog="exit codes: 0 ok; 1 a lesson or check failed; 2 wrong usage or environment; 130 interrupted",
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(function, text, *examples):
        epilog = "examples:\n" + "\n".join(f"  course {example}" for example in (examples or (function.__name__,)))
        kind = argparse.RawDescriptionHelpFormatter
        sub = commands.add_parser(function.__name__, help=text, description=text, epilog=epilog, formatter_class=kind)
        sub.set_defaults(function=function)
        return sub

    def check_or_write(sub):
        choice = sub.add_mutually_exclusive_group(required=True)
        choice.add_argument("--check", action="store_true", help="say what differs; exit code 1 if anything does")
        choice.add_argument("--write", action="store_true", help="write what differs")

    add(doctor, "say what this machine can run, and what is in the way")

    sub = add(run, "run lessons and write a report", "run", "run 01 --profile ci", 'run --out "my runs/today" --resume')
    sub.add_argument("lessons", nargs="*", metavar="LESSON", help="number or id, such as 01; all where none is named")
    sub.add_argument("--profile", default="auto", help="ci, cpu, full or t4 (default: what this machine suggests)")
    sub.add_argument("--seed", type=int, default=0, help="where random draws start (default: 0)")
    sub.add_argument("--out", metavar="DIR", help="folder of this run (default: runs/PROFILE, or COURSE_OUT/PROFILE)")
    sub.add_argument("--resume", action="store_true", help="skip lessons that passed and whose inputs have not changed")
    sub.add_argument("--timeout", type=_minutes, metavar="MINUTES", help="per lesson (default: 12 times the expected)")

    for function, text in (
        (results, "show each metric of a run and its band"),
        (report, "write a run's report/index.html"),
    ):
        sub = add(function, text, function.__name__, f"{function.__name__} runs/cpu")
        sub.add_argument("dir", nargs="?", metavar="DIR", help="folder of a run (default: the newest)")

    check_or_write(
        add(data, "rebuild data/ from data/source/, and compare or write it", "data --check", "data --write")
    )
    check_or_write(
        add(
            index,
            "compare or write what follows from course.toml: README tables, badges, headers",
            "index --check",
            "index --write",
        )
    )
    add(check, "run the static gates of the notebooks, and the checks of index and data")
    add(fetch, "fetch, verify and convert the base model, once")

    sub = add(lab, "open JupyterLab on a working copy of the notebooks", "lab", "lab --no-browser --port 9000")
    sub.add_argument("--dir", metavar="DIR", help="the working copy (default: work/); other options go to JupyterLab")

    sub = add(refresh, "run notebooks in profile cpu and store their outputs in place", "refresh", "refresh 01")
    sub.add_argument("lessons", nargs="*", metavar="LESSON", help="number or id; all where none is named")
    sub.add_argument("--out", metavar="DIR", help="folder of the runs (default: runs/cpu)")

    sub = add(reference, "make the stored reference data, piece by piece", "reference", "reference 01 --seed 2")
    sub.add_argument("lessons", nargs="*", metavar="LESSON", help="number or id; all where none is named")
    sub.add_argument("--seed", type=int, help="one seed (default: all)")

    sub = add(
        memory, "plan the bytes of a training run", "memory", "memory --gpu l4", "memory --model 8B --method qlora"
    )
    sub.add_argument("--model", metavar="NAME_OR_SHAPE", help="a known name, a size such as 14B, or a model's folder")
    sub.add_argument("--method", choices=("full", "lora", "qlora"), help="one method (default: all)")
    sub.add_argument("--gpu", choices=("t4", "l4", "a100", "h100"), default="t4", help="the card (default: t4)")
    for name, value, text in (
        ("rank", 16, "of the adapter"),
        ("batch", 1, "rows a step"),
        ("length", 512, "tokens a row"),
    ):
        sub.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"{text} (default: {value})")
    sub.add_argument("--optimizer", choices=("adamw", "adamw_8bit"), default="adamw", help="default: adamw")
    switch = argparse.BooleanOptionalAction
    sub.add_argument(
        "--checkpointing",
        action=switch,
        default=True,
        help="keep the input of each block only, and compute the rest again (default: on)",
    )

    sub = add(drift, "say which pins have newer releases", "drift", "drift --run", "drift --run -- tests/unit")
    sub.add_argument("--run", action="store_true", help="run the test suite with them, in an environment of its own")
    sub.add_argument("tests", nargs="*", metavar="TEST", help="with --run: what pytest runs (default: all)")
    sub = add(
        gate,
        "decide by ten stages whether an adapter may ship; exit code 1 where not",
        "gate runs/cpu/adapters/11_evaluation_gate/ticket_lora",
        "gate my_adapter --seal",
        "gate my_adapter --profile ci --all",
    )
    sub.add_argument("adapter", metavar="ADAPTER", help="folder of a PEFT adapter, sealed where it was trained")
    sub.add_argument("--profile", default="auto", help="sizes and limits: ci, cpu, full or t4 (default: cpu or t4)")
    sub.add_argument("--out", metavar="DIR", help="folder of the report (default: gate/ in the profile's runs)")
    sub.add_argument("--all", action="store_true", help="run every stage, also after a refusal")
    sub.add_argument("--seal", action="store_true", help="only write seal.json, the hashes of what belongs together")

    add(bench, "measure the course's speed against TRL's defaults")
    sub = add(clean, "remove the folders of runs, never your notebooks", "clean", "clean --cache")
    sub.add_argument("--cache", action="store_true", help="also the cache of models and adapters")
    return top


def _minutes(text):
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text} is no number of minutes above 0")
    return float(text)


def main(argv=None):
    top = parser()
    args, args.extra = top.parse_known_args(argv)
    if args.extra and args.command != "lab":
        top.error(f"unknown arguments: {' '.join(args.extra)} (see course {args.command} --help)")
    try:
        return args.function(args) or OK
    except CourseError as error:
        print(f"course {args.command}: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        where = f" ({error.filename})" if error.filename else ""
        cure = "Make room there, or choose other folders: --out or COURSE_OUT for runs, COURSE_CACHE for the cache."
        print(f"course {args.command}: {error.strerror}{where}. {cure}", file=sys.stderr)
        return WRONG
