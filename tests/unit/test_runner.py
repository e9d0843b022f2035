"""The runner on tiny notebooks without torch, in a course of its own whose folder has a space, an umlaut and braces."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import course_lib
from course_lib import CourseError, fingerprints, profiles, results, runner

REPOSITORY = Path(course_lib.__file__).parent.parent
PARAMETERS = new_code_cell('profile = "auto"\nseed = 0\nout_dir = None', metadata={"tags": ["parameters"]})
START = """import types
from pathlib import Path
from course_lib import results
results._environment = lambda: {"hardware": {"cpu": "a"}, "versions": {"python": "3"}}
results.begin(types.SimpleNamespace(
    id="%s", profile=profile, seed=seed, out_dir=Path(out_dir),
    bands={"exact": [0.5, 0.9]}, spec={"metrics": {"exact": "exact match"}}))"""
CPU = 'print("lesson speaks"); results.record("exact", 0.75, low=0.7, high=0.8, n=10); results.finish()'


class Course:
    """A course of lessons given as lists of code cells."""

    def __init__(self, root):
        self.root, self.ids = root, []
        (root / "notebooks").mkdir(parents=True)
        (root / "data" / "tickets").mkdir(parents=True)
        (root / "data" / "tickets" / "train.jsonl").write_text("{}\n")

    def add(self, name, *cells, prose="Prose."):
        nb = new_notebook(cells=[new_markdown_cell(prose), PARAMETERS, *map(new_code_cell, cells)])
        nbformat.write(nb, self.root / "notebooks" / f"{name}.ipynb")
        self.ids = [*dict.fromkeys([*self.ids, name])]
        lessons = [f'[[lesson]]\nid = "{x}"\ndata = ["tickets"]\n[lesson.minutes]\nci = 1\n' for x in self.ids]
        (self.root / "notebooks" / "course.toml").write_text("[course]\ntitle = 'x'\n" + "\n".join(lessons))
        profiles.index.cache_clear()

    def passing(self, name):
        self.add(name, START % name, CPU)

    def results(self, out):
        return json.loads((out / "results.json").read_text(encoding="utf-8"))


@pytest.fixture
def course(tmp_path, monkeypatch):
    root = tmp_path / "mein Kürs {x}"
    stand_ins = {
        "hardware": types.SimpleNamespace(kernel_environment=lambda: {"COURSE_TEST_VARIABLE": "set before"}),
        "report": types.SimpleNamespace(build=lambda out: out / "report" / "index.html"),
    }
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, f"course_lib.{name}", module)
        monkeypatch.setattr(course_lib, name, module, raising=False)
    monkeypatch.setenv("COURSE_ROOT", str(root))
    monkeypatch.setenv("COURSE_OUT", str(root / "runs"))
    monkeypatch.setattr(profiles, "ROOT", root)
    profiles.index.cache_clear()
    yield Course(root)
    profiles.index.cache_clear()


@pytest.fixture
def out(course):
    return course.root / "runs" / "ci"


def run(*lessons, **options):
    return runner.run(lessons, profile="ci", **options)


def left_over(out):
    return [path.name for path in out.rglob("*") if "part" in path.name or path.name == ".pid"]


def test_a_passing_lesson(course, out, capsys, monkeypatch, tmp_path):
    stray = tmp_path / "jupyter" / "kernels" / "python3"
    stray.mkdir(parents=True)
    (stray / "kernel.json").write_text('{"argv": ["/bin/false", "{connection_file}"], "display_name": "stray"}')
    monkeypatch.setenv("JUPYTER_PATH", str(stray.parent.parent))
    seen = "import sys, os, json; print(json.dumps([sys.executable, os.getcwd(), os.environ['COURSE_TEST_VARIABLE']]))"
    course.add("04_lora", START % "04_lora", f"print([profile, seed, out_dir])\n{seen}", CPU)
    assert run("04", seed=3) == 0

    data = course.results(out)
    assert data["profile"] == "ci" and data["hardware"] == {"cpu": "a"} and data["versions"] == {"python": "3"}
    entry = data["lessons"]["04_lora"]
    assert entry["status"] == "passed" and entry["seed"] == 3 and entry["seconds"] > 0 and entry["peak_rss_mb"] > 0
    assert entry["metrics"]["exact"]["in_band"] is True and entry["inputs"]
    lesson = profiles.lesson("04")
    assert entry["fingerprint"] == runner.outputs_fingerprint(fingerprints.read(lesson).cells, lesson)

    executed = nbformat.read(out / "notebooks" / "04_lora.ipynb", 4)
    # not the whole lesson once more
    assert executed.metadata.papermill.input_path == str(course.root / "notebooks" / "04_lora.ipynb")
    lines = next(cell.outputs[0].text.splitlines() for cell in executed.cells if "getcwd" in cell.source)
    assert lines[0] == str(["ci", 3, str(out)])
    assert json.loads(lines[1]) == [sys.executable, str(course.root / "notebooks"), "set before"]
    assert "lesson speaks" in (out / "logs" / "04_lora.log").read_text(encoding="utf-8")
    assert not left_over(out) and "COURSE_TEST_VARIABLE" not in os.environ

    said = capsys.readouterr().out
    assert re.search(r"04_lora  passed  \d+:\d\d of about 1 min  peak \d+ MB", said)
    assert "1 passed, 0 failed; 1 metrics, 0 out of band" in said
    assert f"report: {out / 'report' / 'index.html'}" in said


def test_failures_are_named_and_the_others_still_run(course, out, capsys):
    course.add("01_error", "x = 1", "print('before')\nraise ValueError('no ü')", "raise KeyError")
    course.add("02_killed", "import os\nos.kill(os.getpid(), 9)")
    course.add("03_exit", "import sys, os\nos.system('echo a child speaks')\nsys.exit()", "x = 1")
    course.add("04_memory", "raise MemoryError")
    course.add("05_band", START % "05_band", "results.record('exact', 0.1)\nresults.finish()")
    child = "subprocess.Popen(['sleep', '987'], start_new_session=True)"
    course.add("05_crash", f"import ctypes, subprocess, time\nchild = {child}", "time.sleep(2)\nctypes.string_at(0)")
    course.passing("06_good")
    assert run() == 1

    lessons = course.results(out)["lessons"]
    assert [entry["status"] for entry in lessons.values()] == ["failed"] * 6 + ["passed"]
    error = {name: entry.get("error") for name, entry in lessons.items()}
    assert error["01_error"] == {
        "cell": 4,
        "code": "print('before')",
        "type": "ValueError",
        "message": "no ü",
        "log": "logs/01_error.log",
    }
    assert error["02_killed"]["type"] == "KernelDied" and error["02_killed"]["cell"] == 3
    assert "SIGKILL" in error["02_killed"]["message"] and "--profile ci" in error["02_killed"]["message"]
    assert "exit" in error["03_exit"]["message"]
    assert error["04_memory"]["type"] == "MemoryError" and "out of memory" in error["04_memory"]["message"]
    assert error["05_band"]["type"] == "BandError" and "0.5 to 0.9" in error["05_band"]["message"]
    assert lessons["05_band"]["metrics"]["exact"]["in_band"] is False

    assert "SIGSEGV" in error["05_crash"]["message"]
    assert "Segmentation fault" in (out / "logs" / "05_crash.log").read_text(encoding="utf-8")
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "987"]]

    said = capsys.readouterr().out
    assert "FAILED in cell 4: ValueError" in said and str(out / "logs" / "01_error.log") in said
    assert "1 passed, 6 failed; 2 metrics, 1 out of band" in said
    assert "raise ValueError" in (out / "logs" / "01_error.log").read_text(encoding="utf-8")
    assert "a child speaks" in (out / "logs" / "03_exit.log").read_text(encoding="utf-8")
    executed = (out / "notebooks" / "01_error.ipynb").read_text(encoding="utf-8")
    assert "before" in executed and not left_over(out)
    assert "os.kill" in (out / "notebooks" / "02_killed.ipynb").read_text(encoding="utf-8")


def test_a_notebook_is_not_written_with_every_cell(course, out, monkeypatch):
    from papermill import engines

    written, write = [], engines.write_ipynb
    monkeypatch.setattr(engines, "write_ipynb", lambda nb, path: (written.append(path), write(nb, path)))
    course.add("04_lora", *(f"print({n})" for n in range(20)))
    assert run("04") == 0
    assert len(written) == 2  # at its start, too
    assert "19" in nbformat.read(out / "notebooks" / "04_lora.ipynb", 4).cells[-1].outputs[0].text


def test_time_out(course, out):
    course.add("01_slow", "x = 1", "import time\ntime.sleep(600)")
    assert run(timeout=0.05) == 1
    error = course.results(out)["lessons"]["01_slow"]["error"]
    assert error["type"] == "Timeout" and error["cell"] == 4 and "--timeout" in error["message"]


def test_resume_skips_what_has_not_changed(course, out, capsys):
    course.passing("01_a")
    course.passing("02_b")

    def skipped():
        assert run(resume=True) == 0
        return re.findall(r"(\S+)  passed before", capsys.readouterr().out)

    assert skipped() == []
    assert skipped() == ["01_a", "02_b"]
    course.add("01_a", START % "01_a", CPU, prose="Other prose.")
    course.add("02_b", START % "02_b", CPU, "x = 1")
    assert skipped() == ["01_a"]
    (out / "notebooks" / "01_a.ipynb").unlink()
    assert skipped() == ["02_b"]
    assert run("01", resume=True, seed=1) == 0 and "passed before" not in capsys.readouterr().out


def test_a_failed_lesson_is_run_again_and_loses_its_old_metrics(course, out):
    course.passing("01_a")
    assert run() == 0
    course.add("01_a", "raise ValueError")
    assert run() == 1
    assert course.results(out)["lessons"]["01_a"]["metrics"] == {}
    course.passing("01_a")
    assert run(resume=True) == 0


def test_unusable_places_and_names(course, out, monkeypatch):
    course.passing("01_a")
    with pytest.raises(CourseError, match="09"):
        run("09")
    (course.root / "file").write_text("")
    monkeypatch.setenv("COURSE_OUT", str(course.root / "file"))
    with pytest.raises(CourseError, match="--out DIR, or set COURSE_OUT"):
        run()
    (course.root / "notebooks" / "01_a.ipynb").write_text("{")
    with pytest.raises(CourseError, match="no readable notebook"):
        run()
    (course.root / "notebooks" / "01_a.ipynb").unlink()
    with pytest.raises(CourseError, match="has no notebook"):
        run()


def test_a_corrupt_results_json_is_put_aside(course, out, capsys):
    course.passing("01_a")
    out.mkdir(parents=True)
    (out / "results.json").write_text('{"lessons": ')
    assert run() == 0
    assert (out / "results.json.broken").read_text() == '{"lessons": '
    assert course.results(out)["lessons"]["01_a"]["status"] == "passed"
    assert "results.json.broken" in capsys.readouterr().err


def test_one_folder_holds_one_profile(course, out):
    course.passing("01_a")
    results.write_json(out / "results.json", {"profile": "cpu", "lessons": {}})
    with pytest.raises(CourseError, match="profile cpu, wanted ci"):
        run()


def test_a_report_that_fails_loses_nothing(course, out, capsys, monkeypatch):
    course.passing("01_a")
    monkeypatch.setattr(course_lib.report, "build", lambda out: 1 / 0)
    assert run() == 0
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert course.results(out)["lessons"]["01_a"]["status"] == "passed"


DRIVER = """
import sys, types
import course_lib
for name in ("hardware", "report"):
    module = types.ModuleType(name)
    module.kernel_environment, module.build = dict, str
    sys.modules["course_lib." + name] = module
    setattr(course_lib, name, module)
from course_lib import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run(course, out, number):
    course.passing("01_a")
    course.add("02_long", "import os, time\nprint('pid', os.getpid(), flush=True)\ntime.sleep(600)")
    out = out.parent / "my run"
    command = [sys.executable, "-c", DRIVER, "run", "--profile", "ci", "--out", str(out)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        pid = wait_for(lambda: re.search(r"pid (\d+)", (out / "logs" / "02_long.log").read_text()), process)
        with pytest.raises(CourseError, match=rf"process {process.pid}\).*--out DIR"):
            run(out=out)
        process.send_signal(number)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "Traceback" not in said and "Interrupted in 02_long" in said
    assert f"course run --profile ci --resume --out '{out}'" in said
    assert not Path(f"/proc/{pid.group(1)}").exists()
    assert list(course.results(out)["lessons"]) == ["01_a"] and not left_over(out)
    course.passing("02_long")
    assert run(out=out, resume=True) == 0
    assert [entry["status"] for entry in course.results(out)["lessons"].values()] == ["passed", "passed"]


def environment():
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="needs unshare -rm for a small disk of its own",
)
def test_a_full_disk(course, tmp_path):
    course.passing("01_a")
    course.add("02_fills", "with open(out_dir + '/weights', 'wb') as file:\n    file.write(b'1' * 9_000_000)")
    disk = tmp_path / "small disk"
    disk.mkdir()
    (tmp_path / "driver.py").write_text(DRIVER)
    script = """
mount -t tmpfs -o size=1m tmpfs "$1" || exit 99
"$2" "$3" run --profile ci --out "$1"; echo "exit code $?"
cat "$1/results.json"
rm "$1/weights"
"$2" "$3" run 01 --profile ci --out "$1" --resume; echo "exit code $?"
"""
    command = ["unshare", "-rm", "sh", "-c", script, "sh", str(disk), sys.executable, str(tmp_path / "driver.py")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done.stderr
    assert "No space left on device" in done.stderr and "exit code 2" in done.stdout
    assert '"status": "passed"' in done.stdout and "01_a  passed before" in done.stdout
    assert done.stdout.rstrip().endswith("exit code 0")


def wait_for(what, process):
    for _ in range(1200):
        try:
            if found := what():
                return found
        except OSError:
            pass
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    raise AssertionError("nothing happened in two minutes")


# --- fingerprints ----------------------------------------------------------------------------------------------------


@pytest.fixture
def library(course, monkeypatch, tmp_path):
    """A library of three modules, of which the lesson imports `models`, and that one `hardware`."""
    library = tmp_path / "library"
    library.mkdir()
    (library / "__init__.py").write_text("")
    (library / "models.py").write_text("from course_lib import hardware\n\ndef load():\n    return hardware.x\n")
    (library / "hardware.py").write_text("x = 1\n")
    (library / "costs.py").write_text("x = 1\n")
    (library / "exercises.py").write_text("@register('04.1', 'a')\ndef f(x):\n    return x\n")
    monkeypatch.setattr(fingerprints, "LIBRARY", library)
    course.add("04_lora", "%matplotlib inline\nfrom course_lib.models import load", "from course_lib import check")
    return library


def now(course, **lesson):
    table = profiles.lesson("04") | lesson
    nb = nbformat.read(course.root / "notebooks" / "04_lora.ipynb", 4)
    return runner.outputs_fingerprint(nb.cells, table)


def test_what_changes_the_fingerprint_of_outputs(course, library):
    def changed(path, text):
        before = now(course)
        path.write_text(text)
        return now(course) != before

    assert changed(library / "hardware.py", "x = 2\n")
    assert not changed(library / "hardware.py", '"""Docstring."""\nx = 2  # a comment\n')
    assert not changed(library / "costs.py", "x = 2\n")
    assert not changed(library / "cli.py", "x = 2\n")
    assert changed(library / "exercises.py", "@register('04.1', 'b')\ndef f(x):\n    return x\n")
    other = "@register('04.1', 'b')\ndef f(x):\n    return x\n\n@register('05.1', 'c')\ndef g(x):\n    return x\n"
    assert not changed(library / "exercises.py", other)
    data = course.root / "data" / "tickets"
    assert changed(data / "train.jsonl", '{"a": 1}\n')
    assert not changed(data / "train.jsonl", '{"a": 1}\r\n')
    assert changed(data / "new.jsonl", "")
    assert now(course) != now(course, sizes={"cpu": {"train": 9}})
    assert now(course) != now(course, bands={"cpu": {"exact": [0, 1]}})
    assert now(course) == now(course, title="other", minutes={"ci": 3}, bands={"ci": {"exact": [0, 1]}})


def test_a_function_that_no_cell_reaches_does_not_count(course, library):
    models = "from course_lib import hardware\n\ndef load():\n    return {}(hardware.x)\n\ndef {}(x):\n    return {}\n"

    def of(*parts):
        (library / "models.py").write_text(models.format(*parts))
        return now(course)

    assert of("int", "other", 1) == of("int", "other", 2) == of("int", "another", 2)
    assert of("other", "other", 1) != of("other", "other", 2)
    assert of("int", "__getattr__", 1) != of("int", "__getattr__", 2)
    by_name = "def load():\n    return globals()['other']\n\ndef other():\n    return {}\n"
    (library / "models.py").write_text(by_name.format(1))
    before = now(course)
    (library / "models.py").write_text(by_name.format(2))
    assert now(course) != before


def test_a_file_of_data_counts_as_a_folder_does(course, library):
    path = course.root / "data" / "ladder.csv"
    path.write_text("a\n")
    before = now(course, data=["ladder.csv"])
    path.write_text("b\n")
    assert now(course, data=["ladder.csv"]) != before


def test_only_the_recipes_that_a_lesson_names_count(course, library, monkeypatch):
    found = []
    for rate in (1, 2):
        index = profiles.index() | {"recipes": {"mine": {"rate": 1}, "other": {"rate": rate}}}
        with monkeypatch.context() as patch:
            patch.setattr(profiles, "index", lambda index=index: index)
            found.append([now(course, recipes=["mine"]), now(course, introduces=["other"])])
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]


@pytest.mark.parametrize("tag", ["injected-parameters", "bootstrap"])
def test_cells_that_change_no_output_do_not_count(course, library, tag):
    path = course.root / "notebooks" / "04_lora.ipynb"
    nb, before = nbformat.read(path, 4), now(course)
    nb.cells.insert(2, new_code_cell("seed = 5", metadata={"tags": [tag]}))
    nbformat.write(nb, path)
    assert now(course) == before


def test_a_run_also_depends_on_profile_seed_and_versions(course, library, monkeypatch):
    lesson = profiles.lesson("04")
    first = runner.fingerprint(lesson, "ci", 0)
    assert first == runner.fingerprint(lesson, "ci", 0)
    assert len({first, runner.fingerprint(lesson, "cpu", 0), runner.fingerprint(lesson, "ci", 1)}) == 3
    (course.root / "requirements.txt").write_text(
        "# pins\nnbformat==0.1  # old\nno-such-thing==1 ; python_version > '3'\n"
    )
    assert fingerprints.pins(course.root)["no-such-thing"] == ("==1", None)
    assert runner.fingerprint(lesson, "ci", 0) != first


def test_a_bare_import_of_the_library_reaches_every_module(course, library):
    course.add("04_lora", "import course_lib")
    before = now(course)
    (library / "costs.py").write_text("x = 5\n")
    assert now(course) != before


def test_pages_of_shared_files_count_once():
    def process(**megabytes):
        pages = types.SimpleNamespace(**{kind: size * 2**20 for kind, size in megabytes.items()})
        return types.SimpleNamespace(memory_info=lambda: pages)

    watch = runner.Watch("04_lora", 1, None)
    watch.family = [process(rss=3000, shared=1000), process(rss=2000, shared=900), process(rss=50)]
    watch._measure()
    assert watch.peak == (2000 + 1100 + 50 + 1000) * 2**20


@pytest.mark.parametrize(
    ("loads", "said", "spins"),
    [
        ([3.0, 12.0], {}, None),
        ([3.0, 97.0], {}, "1000"),
        ([97.0, 97.0], {"OMP_WAIT_POLICY": "active"}, None),
        ([97.0, 97.0], {"GOMP_SPINCOUNT": "7"}, None),  # it stays in the environment that the kernel inherits
    ],
)
def test_waiting_threads_sleep_early_where_the_cores_are_shared(monkeypatch, loads, said, spins):
    import psutil

    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: loads)
    monkeypatch.setattr(runner.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert runner.kernel_environment().get("GOMP_SPINCOUNT") == spins


def test_only_the_cores_of_this_process_are_looked_at(monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: [90.0, 5.0])
    monkeypatch.setattr(runner.os, "sched_getaffinity", lambda pid: {1}, raising=False)
    assert not runner.cores_are_shared()
    monkeypatch.setattr(runner.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert runner.cores_are_shared()
