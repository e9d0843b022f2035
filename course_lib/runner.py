"""Runs lessons with papermill: progress, memory, failures with their cure, resume.

papermill, jupyter_client and psutil are imported where they are used, so that the program starts at once.
"""

import contextlib
import errno
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from course_lib import CourseError, profiles, results
from course_lib.fingerprints import fingerprint, outputs_fingerprint, read
from course_lib.index import notebook_path, tags

__all__ = ["fingerprint", "outputs_fingerprint", "run"]
INTERRUPTED = 130


# --- a run -----------------------------------------------------------------------------------------------------------


def run(lessons=(), profile="auto", seed=0, out=None, resume=False, timeout=None):
    """Run lessons one after the other; returns the exit code: 0 all passed, 1 some failed, 130 interrupted.

    lessons: numbers or ids, all where empty. timeout: minutes for one lesson (default: twelve times the expected).
    """
    profile = profiles.choose(profile)
    chosen = [profiles.lesson(name) for name in lessons] or profiles.lessons()
    inputs = {lesson["id"]: fingerprint(lesson, profile, seed) for lesson in chosen}
    out = Path(out).absolute() if out else results.default_dir(profile)
    with locked(out), _terminate_as_interrupt():
        known = _known(out, profile)
        for lesson in chosen:
            name = lesson["id"]
            if resume and _unchanged(out, known.get(name), name, inputs[name]):
                print(f"{name}  passed before with the same inputs: skipped")
                continue
            (out / "metrics" / f"{name}.json").unlink(missing_ok=True)
            results.assemble(out, lesson=name, profile=profile)  # what an earlier run said of it no longer holds
            code = outputs_fingerprint(read(lesson).cells, lesson)
            try:
                entry = _run_lesson(lesson, profile, seed, out, timeout)
            except KeyboardInterrupt:
                print(f"\nInterrupted in {name}. Its kernel is stopped; the lessons that had finished are in {out}.")
                print("Go on with: " + _command(lessons, profile, seed, out, timeout))
                return INTERRUPTED
            results.assemble(out, name, entry | {"seed": seed, "inputs": inputs[name], "fingerprint": code}, profile)
        return _close(out, [lesson["id"] for lesson in chosen])


def is_run(path):
    """Whether a folder was made by a run, or by a lesson in JupyterLab."""
    return any((path / name).exists() for name in (".lock", "results.json", "metrics"))


@contextlib.contextmanager
def locked(out):
    """One run at a time in a folder; makes the folder."""
    import filelock

    try:
        for part in ("", "notebooks", "logs", "metrics"):
            (out / part).mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(out / ".lock")
        lock.acquire(timeout=0)
    except filelock.Timeout:
        pid = (out / ".pid").read_text() if (out / ".pid").exists() else "unknown"
        cure = "Wait for it, or give this run another folder: --out DIR."
        raise CourseError(f"Another run (process {pid}) is using {out}. {cure}") from None
    except OSError as error:
        cure = "Choose a folder that you may write to: --out DIR, or set COURSE_OUT."
        raise CourseError(f"Cannot write to {out} ({error.strerror}). {cure}") from error
    try:
        (out / ".pid").write_text(str(os.getpid()))
        yield
    finally:
        (out / ".pid").unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def _terminate_as_interrupt():
    """SIGTERM ends a run as Ctrl-C does; once a run is being stopped, further signals do not disturb it."""

    def interrupt(number, frame):
        for each in handled:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    handled = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {each: signal.signal(each, interrupt) for each in handled}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _known(out, profile):
    """Lessons of an earlier run in this folder; an unreadable results.json is put aside and made anew."""
    path = out / "results.json"
    if not path.exists():
        return {}
    try:
        old = results.read(out)
    except CourseError as error:
        os.replace(path, out / "results.json.broken")
        print(f"{error} It is kept as results.json.broken, and a new one is made.", file=sys.stderr)
        return {}
    if old.get("profile") not in (None, profile):
        raise CourseError(f"{out} holds a run in profile {old['profile']}, wanted {profile}. Choose another --out DIR.")
    return old["lessons"]


def _unchanged(out, entry, name, inputs):
    same = entry and entry["status"] == "passed" and entry.get("inputs") == inputs
    return bool(same) and (out / "notebooks" / f"{name}.ipynb").exists()


def _command(lessons, profile, seed, out, timeout):
    words = ["course", "run", *lessons, "--profile", profile, "--resume"]
    for option, value in (("--seed", seed), ("--timeout", timeout), ("--out", out)):
        if value and value != results.default_dir(profile):
            words += [option, str(value)]
    return shlex.join(words)


def _close(out, names):
    """Says how the run went and where to read on."""
    every = results.read(out)
    mine = every | {"lessons": {name: every["lessons"][name] for name in names}}
    failed = [name for name in names if mine["lessons"][name]["status"] == "failed"]
    metrics = [metric for entry in mine["lessons"].values() for metric in entry["metrics"].values()]
    outside = sum(metric.get("in_band") is False for metric in metrics)
    print(f"\n{len(names) - len(failed)} passed, {len(failed)} failed; {len(metrics)} metrics, {outside} out of band")
    for line in results.problems(mine):
        print("  " + line)
    for name in failed:
        print(f"  log of {name}: {out / mine['lessons'][name]['error']['log']}")
    try:
        from course_lib import report

        print(f"report: {report.build(out)}")
    except Exception as error:  # a report can be built again; results must not be lost for it
        print(f"The report could not be built ({type(error).__name__}: {error}). Try: course report", file=sys.stderr)
    return 1 if failed or outside else 0


# --- one lesson ------------------------------------------------------------------------------------------------------


class Watch(threading.Thread):
    """Draws the line of the running lesson and keeps its kernel's peak memory."""

    def __init__(self, name, cells, expected):
        super().__init__(daemon=True)
        self.lesson, self.cells, self.expected = name, cells, expected
        self.kernel, self.family, self.cell, self.peak, self.free = None, set(), 0, 0, math.inf
        self.started, self.over, self.tty = time.monotonic(), threading.Event(), sys.stdout.isatty()

    def run(self):
        drawn = -30.0 if self.tty else 0.0
        while not self.over.wait(0.5):
            self._measure()
            if self.tty or self.seconds - drawn >= 30:
                drawn = self.seconds
                self._print(f"cell {self.cell}/{self.cells}  {self._elapsed()}", last=False)

    def close(self, verdict):
        self.over.set()
        self.join()
        self._print(f"{verdict}  {self._elapsed()}  peak {self.peak / 2**20:.0f} MB", last=True)

    @property
    def seconds(self):
        return time.monotonic() - self.started

    def end_processes(self):
        """The kernel and all that it started, should they outlive the notebook."""
        import psutil

        self._measure()
        for process in self.family:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def returncode(self):
        return getattr(getattr(getattr(self.kernel, "provisioner", None), "process", None), "returncode", None)

    def _measure(self):
        import psutil

        pid, found = getattr(getattr(self.kernel, "provisioner", None), "pid", None), []
        with contextlib.suppress(psutil.Error):
            if pid:
                self.family |= {psutil.Process(pid), *psutil.Process(pid).children(recursive=True)}
        for process in self.family:
            with contextlib.suppress(psutil.Error):
                memory = process.memory_info()
                found.append((memory.rss, getattr(memory, "shared", 0)))  # shared: on Linux, the pages that are files'
        # A kernel and its children map the same libraries and weights: these pages are in memory once.
        used = sum(rss - shared for rss, shared in found) + max((shared for _, shared in found), default=0)
        self.peak, self.free = max(self.peak, used), min(self.free, psutil.virtual_memory().available)

    def _elapsed(self):
        expected = f" of about {self.expected:g} min" if self.expected else ""
        return f"{int(self.seconds) // 60}:{int(self.seconds) % 60:02d}{expected}"

    def _print(self, text, last):
        text = f"{self.lesson}  {text}"
        if self.tty:
            text = "\r" + text[: shutil.get_terminal_size().columns - 1] + "\x1b[K"
        print(text, end="" if self.tty and not last else "\n", flush=True)


def _run_lesson(lesson, profile, seed, out, timeout):
    """Execute one lesson; returns its entry of results.json without the metrics."""
    name, expected = lesson["id"], lesson.get("minutes", {}).get(profile)
    limit = 60 * (timeout or max(12 * (expected or 5), 10))
    path, source, log = notebook_path(lesson), read(lesson), Path("logs") / f"{name}.log"
    final, part = out / "notebooks" / f"{name}.ipynb", out / "notebooks" / f".{name}.part.ipynb"
    watch = Watch(name, len(source.cells), expected)
    entry, verdict = {"status": "passed"}, "passed"
    watch.start()
    try:
        with open(out / log, "w", encoding="utf-8", buffering=1) as file, _logging_to(file):
            try:
                _execute(path, part, {"profile": profile, "seed": seed, "out_dir": str(out)}, limit, watch, file)
            except Exception as error:
                kind, message = _explain(error, watch, limit)
                with contextlib.suppress(OSError):  # a full disk is the failure's cause here, and is reported as such
                    file.write(re.sub(r"\x1b\[[0-9;]*m", "", f"\n{error}\n{kind}: {message}\n"))
                code = source.cells[max(watch.cell - 1, 0)].source.strip().partition("\n")[0]
                fault = {"cell": watch.cell, "code": code, "type": kind, "message": message, "log": log.as_posix()}
                entry, verdict = {"status": "failed", "error": fault}, f"FAILED in cell {watch.cell}: {kind}"
        if part.exists():
            os.replace(part, final)
    except BaseException:
        verdict = "stopped"
        raise
    finally:
        part.unlink(missing_ok=True)
        watch.close(verdict)
    return entry | {"seconds": round(watch.seconds, 1), "peak_rss_mb": round(watch.peak / 2**20)}


def _execute(path, target, parameters, limit, watch, log):
    import papermill
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from papermill.engines import NBClientEngine, papermill_engines

    class Kernel(AsyncKernelManager):
        """Always this interpreter: without folders to search, no kernelspec of another environment is found."""

        def __init__(self, **options):
            super().__init__(**options, kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
            self.kernel_spec.env = kernel_environment()
            watch.kernel = self

        async def start_kernel(self, **options):
            return await super().start_kernel(**options, stdout=log, stderr=log)

    class Engine(NBClientEngine):
        """papermill's own saves the notebook twice a cell, ten seconds a lesson; this one at its start and end."""

        @classmethod
        def execute_managed_notebook(cls, nb_man, *arguments, **options):
            save = nb_man.save
            nb_man.save = lambda **changes: save(**changes) if nb_man.end_time else None
            return super().execute_managed_notebook(nb_man, *arguments, **options)

    def on_cell_start(cell, cell_index):
        if "injected-parameters" not in tags(cell):  # counted as in the lesson's own notebook
            watch.cell += 1
            log.write(f"--- cell {watch.cell}/{watch.cells}\n")

    # Paths, since papermill writes into the result's metadata what it was given; braces it takes for parameters.
    source, target = (str(each).replace("{", "{{").replace("}", "}}") for each in (path, target))
    papermill_engines.register("course", Engine)
    try:
        done = papermill.execute_notebook(
            source,
            target,
            parameters,
            engine_name="course",
            kernel_name="python3",
            language="python",
            cwd=profiles.ROOT / "notebooks",
            progress_bar=False,
            stdout_file=log,
            stderr_file=log,
            start_timeout=180,
            kernel_manager_class=Kernel,
            on_cell_start=on_cell_start,
            timeout_func=lambda cell: max(1, round(limit - watch.seconds)),
        )
    finally:
        watch.end_processes()
    if any(cell.cell_type == "code" and cell.source.strip() and not cell.execution_count for cell in done.cells):
        raise CourseError("the lesson left before its end: a cell called exit.")


def cores_are_shared():
    """Whether half of a core of this process, or more, is taken by others; looked at for a fifth of a second."""
    import psutil

    loads = psutil.cpu_percent(0.2, percpu=True)
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(loads))
    return any(loads[core] >= 50 for core in mine if core < len(loads))


def kernel_environment():
    """What must be set before a kernel starts; a checkout that is not installed is found by its kernel too."""
    from course_lib import hardware

    environment = {"PYTHONFAULTHANDLER": "1"} | hardware.kernel_environment()  # a crash leaves its place in the log
    # A thread of libgomp that waits for another spins first, which takes the core from the one that is waited for as
    # soon as anything else runs: two lessons on two cores took thirty times as long as one. To sleep early costs a
    # sixth where nothing else runs, so it is done only where something does. What the user has said stays as it is.
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ) and cores_are_shared():
        environment["GOMP_SPINCOUNT"] = "1000"  # libgomp's own is 300,000
    checkout = Path(__file__).parent.parent
    if (checkout / "pyproject.toml").exists():
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    return environment


@contextlib.contextmanager
def _logging_to(file):
    """papermill's and asyncio's own messages go to the lesson's log, not between the progress lines."""
    handler = logging.StreamHandler(file)
    loggers = [logging.getLogger(name) for name in ("papermill", "asyncio", "traitlets")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.addHandler(logging.NullHandler())


def _explain(error, watch, limit):
    """(type, message) of a failure: its cause and, where there is one, its cure."""
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    kind, message = getattr(error, "ename", type(error).__name__), str(getattr(error, "evalue", error))[:2000]
    memory = f"the kernel held up to {watch.peak / 2**20:.0f} MB, at the least {watch.free / 2**20:.0f} MB were free"
    cure = "Close other programs, or run a smaller profile: --profile ci."
    if isinstance(error, DeadKernelError):
        number = -(watch.returncode() or 0)
        if number == 9:
            message = f"the system ended the kernel (SIGKILL), as it does when memory is short: {memory}. {cure}"
        else:
            name = signal.Signals(number).name if number > 0 else "no signal"
            message = f"the kernel died ({name}; {memory}). The end of its log says where; --resume runs it again."
        return "KernelDied", message
    if isinstance(error, CellTimeoutError):
        cure = "Give it more with --timeout MINUTES, or a quieter machine."
        return "Timeout", f"not done after {limit / 60:g} minutes. {cure}"
    if kind in ("MemoryError", "OutOfMemoryError") or re.search(r"out of memory|can't allocate memory", message):
        return kind, f"out of memory: {message.strip() or 'no detail'}; {memory}. {cure}"
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in message:
        return kind, f"{message}. Make room, or choose another disk: --out DIR, COURSE_CACHE for the cache."
    return kind, message
