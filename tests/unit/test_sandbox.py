"""What a candidate tries and how the sandbox answers. Each candidate runs in a process of its own."""

import os
import sys
import time
from pathlib import Path

import pytest

from course_lib import sandbox

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the sandbox needs POSIX limits")
linux = pytest.mark.skipif(sys.platform != "linux", reason="macOS has no limit on address space")


def run(body, *calls, **limits):
    code = "def f(x=None):\n" + "\n".join("    " + line for line in body.splitlines())
    return sandbox.call(code, "f", [list(call) for call in calls] or [[]], sandbox.Limits(**limits))


def test_good_code_answers_every_call():
    outcome = run("import math\nprint('chatter')\nreturn math.floor(x) + 1", (2.5,), (7,))
    assert (outcome.status, outcome.values) == ("ok", [3, 8])


def test_dates_travel_both_ways():
    outcome = sandbox.call("def f(day):\n    return day + timedelta(days=7)", "f", [[{"date": "2026-03-11"}]])
    assert outcome.values == ["2026-03-18"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("while True: pass", "cpu"),
        ("return 10 ** 10 ** 8", "cpu"),  # one long step, in which no Python code runs
        ("import time\ntime.sleep(60)", "time"),
        ("raise ValueError('no')", "error"),
        ("return missing", "error"),
        ("return {1, 2}", "error"),
        ("return open('/etc/passwd').read()", "refused"),
        ("open('x', 'w').write('x' * 10)", "refused"),
        ("import os\nos.remove('/tmp/nothing')", "refused"),
        ("import os\nos.system('true')", "refused"),
        ("import os\nos.fork()", "refused"),
        ("import os\nos.kill(os.getppid(), 9)", "refused"),
        ("import socket", "refused"),
        ("import subprocess", "refused"),
        ("import ctypes", "refused"),
        ("import os\nos._exit(0)", "exit"),
        ("import sys\nsys.exit(0)", "error"),
        ("import os\nos.write(1, b'{\"values\": [1, 2]}')\nos._exit(0)", "exit"),
        ("import os\nwhile True: os.write(1, b'x' * 4096)", "exit"),
        ("return f(x)", "error"),
    ],
)
def test_candidates_that_misbehave(body, status):
    outcome = run(body, wall_seconds=4 if status == "time" else 20)
    # On a busy machine the clock may run out before the CPU time does.
    assert outcome.status == status or (status, outcome.status) == ("cpu", "time"), outcome


@linux
def test_memory_is_limited():
    assert run("return len(bytearray(2_000_000_000))").status == "memory"


def test_code_that_is_no_python():
    outcome = sandbox.call("def f(:", "f", [[]])
    assert outcome.status == "error" and outcome.detail.startswith("SyntaxError")
    assert sandbox.call("g = 1", "f", [[]]).status == "error"
    assert sandbox.call("f = 1", "f", [[]]).status == "error"


def test_it_does_not_see_this_process(monkeypatch):
    monkeypatch.setenv("COURSE_SECRET", "hidden")
    assert run("import os\nreturn dict(os.environ).get('COURSE_SECRET')").values == [None]
    assert run("import sys\nreturn [p for p in sys.path if 'site-packages' in p]").values == [[]]
    assert run("import torch").status == "refused"


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run("return 1")
    run("while True: pass")
    assert not list(Path(tmp_path).iterdir())


def test_a_sleeper_is_ended_in_time():
    start = time.monotonic()
    assert run("import time\ntime.sleep(60)", wall_seconds=1).status == "time"
    assert time.monotonic() - start < 20
