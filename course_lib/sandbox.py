"""Runs Python that a model wrote: in another process and under limits, never in this one.

Four layers: an isolated interpreter in a folder of its own with nothing of this process's environment; limits of the
kernel on CPU time, memory and file size; an audit hook that refuses files, processes, sockets and modules; and, where
the kernel lets an ordinary user have them, namespaces without a network and without other processes. They stop what a
small model writes by accident. Code of strangers who want to get out needs a virtual machine.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from course_lib import CourseError

ALLOWED = ("calendar", "collections", "datetime", "fractions", "functools", "itertools", "json", "math", "re", "string")

# What runs in the other process. The candidate's own prints go nowhere; only the last lines write the answer.
_RUNNER = """
import json, os, resource, sys
task = json.loads(sys.stdin.read())
modules = {name: __import__(name) for name in task["allowed"]}
date = modules["datetime"].date
date.today(), date(2026, 1, 5).strftime("%A"), modules["re"].compile("a")  # loads what these load at first use

def limit(kind, value):
    try:
        resource.setrlimit(kind, (value, value))
    except (ValueError, OSError):
        pass  # macOS has no limit on address space

for kind, value in task["limits"]:
    limit(getattr(resource, kind), value)
FORBIDDEN = ("open", "os.", "shutil.", "socket.", "subprocess.", "ctypes.", "mmap.", "fcntl.", "signal.", "gc.",
             "import", "pty.", "syslog.", "resource.", "sqlite3.", "sys.addaudithook", "sys._getframe", "cpython.")

def hook(event, arguments):
    if event.startswith(FORBIDDEN):
        raise PermissionError(event)

out = os.fdopen(os.dup(1), "w")
sys.stdout = sys.stderr = open(os.devnull, "w")
space = dict(modules, date=date, timedelta=modules["datetime"].timedelta)
dumps = json.dumps
sys.addaudithook(hook)
try:
    exec(compile(task["code"], "candidate", "exec"), space)
    values = [space[task["name"]](*(date.fromisoformat(a["date"]) if type(a) is dict else a for a in arguments))
              for arguments in task["calls"]]
    answer = {"values": [v.isoformat() if type(v) is date else v for v in values]}
    text = dumps(answer)
except BaseException as error:
    text = dumps({"error": type(error).__name__, "detail": str(error)[:200]})
out.write(text)
out.flush()
"""


@dataclass(frozen=True)
class Limits:
    cpu_seconds: int = 1
    wall_seconds: float = 20.0  # generous: on a busy machine a right answer takes seconds
    memory_mb: int = 256
    file_kb: int = 64


@dataclass(frozen=True)
class Outcome:
    """`status` is ok, error (it raised), refused (it reached for a file, a process, a socket, a module), memory,
    cpu, time, or exit (it ended without an answer). `values` are the results, one for each call."""

    status: str
    values: list | None = None
    detail: str = ""
    seconds: float = 0.0


@functools.cache
def namespaces() -> tuple[str, ...]:
    """The command that takes network and other processes away, or nothing where the kernel refuses it."""
    command = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
    if shutil.which("unshare") is None:
        return ()
    try:
        tried = subprocess.run([*command, "true"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return command if tried.returncode == 0 else ()


def call(code: str, name: str, calls: list[list], limits: Limits = Limits()) -> Outcome:  # noqa: B008 (immutable)
    """Define `code` in another process and call its function `name` once for each list of arguments in `calls`.

    Arguments and results are JSON values; a date travels as {"date": "2026-03-11"} and comes back as text. What is to
    be expected stays here, so the code cannot know it. Never raises because of the code.
    """
    if os.name != "posix":
        raise CourseError("the sandbox needs the limits of Linux or macOS: on Windows use WSL, or run this in Colab.")
    task = {
        "code": code,
        "name": name,
        "calls": calls,
        "allowed": ALLOWED,
        "limits": [
            ("RLIMIT_CPU", limits.cpu_seconds),
            ("RLIMIT_AS", limits.memory_mb << 20),
            ("RLIMIT_FSIZE", limits.file_kb << 10),
            ("RLIMIT_CORE", 0),
        ],
    }
    command = [*namespaces(), sys.executable, "-I", "-S", "-B", "-c", _RUNNER]
    start, used = time.monotonic(), _cpu_of_children()
    with tempfile.TemporaryDirectory(prefix="course-sandbox-") as folder, open(Path(folder) / "answer", "w+b") as out:
        process = subprocess.Popen(
            command, cwd=folder, env={}, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.DEVNULL,
            start_new_session=True, close_fds=True,
        )  # fmt: skip
        try:
            process.communicate(json.dumps(task).encode(), timeout=limits.wall_seconds)
            late = False
        except subprocess.TimeoutExpired:
            late = True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        seconds, used = time.monotonic() - start, _cpu_of_children() - used
        out.seek(0)
        text = out.read((limits.file_kb << 10) + 1)
    if late:
        return Outcome("time", detail=f"over {limits.wall_seconds} s", seconds=seconds)
    outcome = _read(text, len(calls), seconds)
    if outcome.status == "exit" and used >= 0.9 * limits.cpu_seconds:  # killed by the kernel, whatever the exit code
        return Outcome("cpu", detail=f"over {limits.cpu_seconds} s of CPU time", seconds=seconds)
    return outcome


def _cpu_of_children() -> float:
    import resource

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _read(text: bytes, count: int, seconds: float) -> Outcome:
    try:
        answer = json.loads(text)
        if "error" in answer:
            kinds = {"MemoryError": "memory", "PermissionError": "refused"}
            detail = f"{answer['error']}: {answer['detail']}"
            return Outcome(kinds.get(answer["error"], "error"), detail=detail, seconds=seconds)
        if isinstance(answer["values"], list) and len(answer["values"]) == count:
            return Outcome("ok", answer["values"], seconds=seconds)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    return Outcome("exit", detail="it ended without an answer", seconds=seconds)
