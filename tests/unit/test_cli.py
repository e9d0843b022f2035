import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import course_lib
from course_lib import CourseError, cli, profiles, results

REPOSITORY = Path(course_lib.__file__).parent.parent
METRIC = {"value": 0.3, "low": 0.2, "high": 0.4, "n": 9, "band": [0.5, 1.0], "in_band": False}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A course of two lessons without notebooks, in a folder with a space."""
    root = tmp_path / "a course"
    (root / "notebooks").mkdir(parents=True)
    minutes = "{ci = 1, cpu = 6, t4 = 3}"
    lessons = [f'[[lesson]]\nminutes = {minutes}\nid = "{x}"\n' for x in ("00_start_here", "01_ladder")]
    (root / "notebooks" / "course.toml").write_text("[course]\ntitle = 'x'\n" + "\n".join(lessons))
    monkeypatch.setattr(profiles, "ROOT", root)
    monkeypatch.delenv("COURSE_OUT", raising=False)
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    profiles.index.cache_clear()
    yield root
    profiles.index.cache_clear()


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a stand-in in a module's place."""

    def put(name, **functions):
        module = types.SimpleNamespace(**functions)
        monkeypatch.setitem(sys.modules, f"course_lib.{name}", module)
        monkeypatch.setattr(course_lib, name, module, raising=False)

    return put


def store(folder, **metrics):
    entry = {"status": "passed", "metrics": metrics}
    results.write_json(folder / "results.json", {"profile": folder.name, "lessons": {"01_ladder": entry}})


@pytest.mark.parametrize("command", ["--help", "run --help", "results", "index --help"])
def test_starts_without_heavy_imports(root, command):
    store(root / "runs" / "cpu")
    code = """
import sys
from course_lib.cli import main
try:
    main(sys.argv[1:])
finally:
    heavy = {"torch", "transformers", "papermill", "numpy", "psutil"} & set(sys.modules)
    assert not heavy, heavy
"""
    environment = os.environ | {
        "COURSE_ROOT": str(root),
        "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split()], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_command_has_help_with_examples(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    commands = re.findall(r"(?m)^    (\w+)", capsys.readouterr().out)
    assert {"doctor", "run", "results", "report", "data", "index", "fetch", "lab", "check", "clean"} <= set(commands)
    for command in commands:
        with pytest.raises(SystemExit) as end:
            cli.main([command, "--help"])
        assert end.value.code == 0 and f"examples:\n  course {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", ["", "rum", "run --bad", "index", "data --check --write", "run --timeout 0", "run --seed x"]
)
def test_wrong_usage(line, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(line.split())
    assert end.value.code == 2 and "usage: course" in capsys.readouterr().err


def test_run_passes_its_options_on(root, stand_in):
    calls = []
    stand_in("runner", run=lambda *options: calls.append(options) or 1)
    assert cli.main("run 01 00 --profile ci --seed 2 --out x --resume --timeout 1.5".split()) == 1
    assert calls == [(["01", "00"], "ci", 2, "x", True, 1.5)]
    assert cli.main(["run"]) == 1 and calls[1] == ([], "auto", 0, None, False, None)


def test_faults_are_told_without_a_traceback(root, stand_in, capsys):
    def fault(*_):
        raise CourseError("no lesson '99'; there are 00, 01")

    stand_in("runner", run=fault)
    assert cli.main(["run", "99"]) == 2
    assert capsys.readouterr().err == "course run: no lesson '99'; there are 00, 01\n"
    stand_in("runner", run=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["run"]) == 130


def test_a_full_disk_is_told_without_a_traceback(root, stand_in, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "/somewhere")

    stand_in("runner", run=full)
    assert cli.main(["run"]) == 2
    assert "No space left on device (/somewhere). Make room" in capsys.readouterr().err


def test_results(root, capsys, monkeypatch):
    assert cli.main(["results"]) == 2
    assert "course run" in capsys.readouterr().err
    store(root / "runs" / "ci", exact=METRIC)
    store(root / "runs" / "cpu", exact=METRIC | {"value": 0.75, "in_band": True})
    os.utime(root / "runs" / "ci" / "results.json", (1, 1))
    assert cli.main(["results"]) == 0
    said = capsys.readouterr().out
    assert "0.75   [0.2, 0.4]  n=9  band 0.5 to 1  in" in said and "every band is met" in said
    assert cli.main(["results", str(root / "runs" / "ci")]) == 1
    assert "exact = 0.3 is out of its band 0.5 to 1" in capsys.readouterr().out
    (root / "runs" / "ci" / "results.json").write_text("{")
    assert cli.main(["results", str(root / "runs" / "ci")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    monkeypatch.setenv("COURSE_OUT", str(root / "elsewhere"))
    assert cli.main(["results"]) == 2


def test_report_of_the_newest_run(root, stand_in, capsys):
    store(root / "runs" / "cpu")
    stand_in("report", build=lambda out: out / "report" / "index.html")
    assert cli.main(["report"]) == 0
    assert capsys.readouterr().out.strip() == str(root / "runs" / "cpu" / "report" / "index.html")


def test_data_index_and_check(root, stand_in, capsys):
    assert cli.main(["data", "--check"]) == 2
    (root / "data").mkdir()
    build = root / "data" / "build.py"
    build.write_text(
        "from pathlib import Path\ndef check(): return []\ndef write(): Path(__file__).with_name('x').touch()\n"
    )
    assert cli.main(["data", "--check"]) == 0
    assert cli.main(["data", "--write"]) == 0 and (root / "data" / "x").exists()

    stand_in("index", index_check=lambda: ["README.md: old"], index_write=lambda: ["README.md"])
    stand_in("gates", static_gates=lambda: [])
    capsys.readouterr()
    assert cli.main(["index", "--write"]) == 0
    assert cli.main(["index", "--check"]) == 1
    assert cli.main(["check"]) == 1
    said = capsys.readouterr().out
    assert "index: README.md: old" in said and "notebooks: good" in said and "data: good" in said
    stand_in("index", index_check=list)
    assert cli.main(["check"]) == 0


def test_commands_that_only_pass_on(root, stand_in, capsys):
    calls = []
    stand_in("models", fetch=lambda progress: "the path")
    stand_in("gates", refresh=lambda *options: calls.append(options))
    stand_in("reference", run=lambda *options: calls.append(options))
    stand_in("bench", main=lambda: 0)
    with open(root / "notebooks" / "course.toml", "a") as file:
        file.write('introduces = ["a"]\n')  # of the last lesson
    profiles.index.cache_clear()
    assert cli.main(["fetch"]) == 0 and "the path" in capsys.readouterr().out
    assert cli.main(["refresh", "1"]) == 0
    assert cli.main(["reference", "--seed", "2"]) == 0
    assert cli.main(["bench"]) == 0
    assert cli.main(["reference", "1"]) == 0
    assert calls == [(["01_ladder"], None), ("01_ladder", 2), ("01_ladder", None)]


def test_memory(root, capsys):
    assert cli.main(["memory"]) == 0
    table = capsys.readouterr().out
    for name in ("Qwen2.5-0.5B", "Qwen2.5-14B"):
        assert re.search(rf"^{re.escape(name)} ", table, re.M)
    assert "on t4" in table and "Assumed: batch 1, 512 tokens" in table and "*" in table
    assert cli.main(["memory", "--model", "8B", "--method", "qlora", "--gpu", "l4", "--no-checkpointing"]) == 0
    parts = capsys.readouterr().out
    assert "Llama-3.1-8B, 8.03 billion" in parts and "fits l4" in parts and "checkpointing off" in parts
    assert "lora " not in parts.split("Assumed")[0].replace("qlora", "")
    assert cli.main(["memory", "--model", "GPT-9"]) == 2
    assert "no shape 'GPT-9'. The known shapes are SmolLM2-135M" in capsys.readouterr().err
    assert cli.main(["memory", "--rank", "0"]) == 2


def test_lab_keeps_a_learners_files(root, stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    stand_in("runner", kernel_environment=lambda: {"MALLOC_TRIM_THRESHOLD_": "1"})
    started = []
    monkeypatch.setattr(os, "execve", lambda *call: started.append(call))
    notebooks, work = root / "notebooks", root / "work"
    (notebooks / "00_start_here.ipynb").write_text("first")
    (notebooks / "figures").mkdir()
    (notebooks / "figures" / "a.svg").write_text("<svg/>")
    (notebooks / ".ipynb_checkpoints").mkdir()
    (notebooks / ".ipynb_checkpoints" / "x.ipynb").write_text("")
    assert cli.main(["lab", "--no-browser", "--port", "9000"]) == 0
    assert sorted(p.name for p in work.rglob("*")) == ["00_start_here.ipynb", "a.svg", "figures"]

    (work / "00_start_here.ipynb").write_text("my answer")
    (notebooks / "00_start_here.ipynb").write_text("second")
    (notebooks / "01_ladder.ipynb").write_text("new")
    capsys.readouterr()
    assert cli.main(["lab"]) == 0
    assert (work / "00_start_here.ipynb").read_text() == "my answer"
    assert (work / "01_ladder.ipynb").read_text() == "new"
    said = capsys.readouterr().out
    assert "copied 01_ladder.ipynb" in said and "copied 00" not in said and str(work) in said

    program, command, environment = started[0]
    assert program == sys.executable and command[1:3] == ["-m", "jupyterlab"]
    assert f"--ServerApp.root_dir={work}" in command and command[4:7] == ["--no-browser", "--port", "9000"]
    assert environment["MALLOC_TRIM_THRESHOLD_"] == "1"
    assert environment["JUPYTER_PATH"].split(os.pathsep)[0] == str(Path(sys.prefix) / "share" / "jupyter")

    (root / "file").write_text("")
    assert cli.main(["lab", "--dir", str(root / "file")]) == 2
    assert "--dir DIR" in capsys.readouterr().err


def test_lab_signs_its_copies_and_brings_the_glossary(root, stand_in, tmp_path, monkeypatch):
    import nbformat
    from nbformat.sign import NotebookNotary

    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    stand_in("runner", kernel_environment=lambda: {})
    monkeypatch.setattr(os, "execve", lambda *call: None)
    cell = nbformat.v4.new_code_cell("x", outputs=[nbformat.v4.new_output("display_data", {"image/svg+xml": "<svg/>"})])
    course, work = root / "notebooks" / "00_start_here.ipynb", root / "work"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), course)
    (root / "GLOSSARY.md").write_text("| token | [00](notebooks/00_start_here.ipynb) |")
    assert cli.main(["lab"]) == 0
    copy = nbformat.read(work / course.name, as_version=4)
    assert NotebookNotary().check_signature(copy)
    copy.cells[0].outputs[0].data["image/svg+xml"] = "<svg>mine</svg>"
    assert not NotebookNotary().check_signature(copy)
    assert (work / "GLOSSARY.md").read_text() == "| token | [00](00_start_here.ipynb) |"

    (work / "GLOSSARY.md").write_text("my notes")
    nbformat.write(copy, work / course.name)
    assert cli.main(["lab"]) == 0
    assert (work / "GLOSSARY.md").read_text() == "my notes"
    assert not NotebookNotary().check_signature(copy)  # what a learner changed is not signed for them


def test_clean_removes_runs_and_nothing_else(root, tmp_path, stand_in, capsys, monkeypatch):
    runs, cache = root / "runs", tmp_path / "cache"
    store(runs / "ci")
    (runs / "ci" / "adapters").mkdir()
    (runs / "ci" / "adapters" / "weights").write_bytes(b"0" * 3 * 2**20)
    store(runs / "mine")
    outside = tmp_path / "outside"
    store(outside)
    (runs / "link").symlink_to(outside)
    (runs / "ci" / "link").symlink_to(outside)
    (runs / "notes").mkdir()
    (runs / "notes" / "a.txt").write_text("kept")
    (root / "work").mkdir()
    (root / "work" / "00_start_here.ipynb").write_text("my answer")
    for name in ("smollm2-135m-instruct-q4_1-v1", "other"):
        (cache / name).mkdir(parents=True)
    (cache / "fetch.lock").write_text("")
    stand_in("models", cache_dir=lambda: cache)

    assert cli.main(["clean"]) == 0
    said = capsys.readouterr().out
    assert f"removed {runs / 'ci'} (3.0 MB)" in said and f"left alone: {runs / 'link'} is a link" in said
    assert sorted(p.name for p in runs.iterdir()) == ["link", "notes"]
    assert (outside / "results.json").exists() and (root / "work" / "00_start_here.ipynb").exists()
    assert sorted(p.name for p in cache.iterdir()) == ["fetch.lock", "other", "smollm2-135m-instruct-q4_1-v1"]

    assert cli.main(["clean", "--cache"]) == 0
    assert [p.name for p in cache.iterdir()] == ["other"]
    (runs / "link").unlink()
    assert cli.main(["clean"]) == 0 and "nothing to remove" in capsys.readouterr().out

    monkeypatch.setenv("COURSE_OUT", str(tmp_path / "out"))
    store(tmp_path / "out" / "cpu")
    (tmp_path / "out" / "full").mkdir()
    assert cli.main(["clean"]) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["full"]


def test_clean_leaves_a_running_lesson_alone(root, capsys):
    store(root / "runs" / "ci")
    code = "import sys; from pathlib import Path; from course_lib import runner\n"
    code += "with runner.locked(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", code, str(root / "runs" / "ci")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment | {"COURSE_ROOT": str(root)}, **pipes) as other:
        assert other.stdout.readline() == b"locked\n"
        assert cli.main(["clean"]) == 2
        assert f"process {other.pid}" in capsys.readouterr().err
        other.stdin.close()
    assert (root / "runs" / "ci" / "results.json").exists()
    assert cli.main(["clean"]) == 0


ABOUT = {"cpu": "Some CPU", "cores": 2, "features": "avx2 amx", "device": "cpu", "dtype": "bfloat16"}
GPU = {"gpu": "Tesla T4", "gpu_memory_gb": 15, "gpu_capability": "7.5", "gpu_real_bf16": False}


def doctor(stand_in, cache, damage=None, about=ABOUT, speed=1.0):
    stand_in("hardware", describe=lambda: about, speed=lambda: speed)
    stand_in("models", cache_dir=lambda: cache, base_path=lambda: cache / "base", damaged=lambda thorough=False: damage)
    return cli.main(["doctor"])


def test_doctor(root, tmp_path, stand_in, capsys, monkeypatch):
    monkeypatch.setenv("COURSE_PROFILE", "cpu")
    (root / "requirements.txt").write_text("pytest>=1\nnbformat==0.1\n")
    assert doctor(stand_in, tmp_path) == 0
    said = capsys.readouterr().out
    for part in (
        "1 of 2 as pinned; other: nbformat",
        "(pinned ==0.1)",
        "Some CPU, 2 cores, avx2 amx",
        "bfloat16 on cpu",
    ):
        assert part in said
    for part in (
        "none that PyTorch can use",
        "verified",
        "GB free",
        "01_ladder",
        "cpu 6",
        "default profile here is cpu",
    ):
        assert part in said
    assert said.rstrip().endswith("ready") and len(said.splitlines()) < 40

    assert doctor(stand_in, tmp_path, speed=0.5) == 0
    said = capsys.readouterr().out
    assert "0.50 of the reference machine" in said and "cpu 12.0  t4 3.0" in said

    assert doctor(stand_in, tmp_path, speed=3.0) == 0  # products alone are quick there
    said = capsys.readouterr().out
    assert "3.00 of the reference machine" in said and "cpu 6.0  t4 3.0" in said

    assert doctor(stand_in, tmp_path, about=ABOUT | GPU, speed=None) == 0
    said = capsys.readouterr().out
    assert "Tesla T4, 15 GB, capability 7.5: bf16 only emulated" in said and "lesson, on a T4" in said


def test_doctor_names_what_blocks(root, tmp_path, stand_in, capsys, monkeypatch):
    monkeypatch.setenv("COURSE_PROFILE", "cpu")
    assert doctor(stand_in, tmp_path, damage="not fetched yet") == 2
    assert "to do: base model: run: course fetch" in capsys.readouterr().out
    (root / "file").write_text("")
    monkeypatch.setenv("COURSE_OUT", str(root / "file"))
    assert doctor(stand_in, tmp_path) == 2
    assert "set COURSE_OUT to another folder" in capsys.readouterr().out
    (root / "requirements.txt").write_text("no-such-thing==1\n")
    assert doctor(stand_in, tmp_path) == 2
    assert "to do: missing: pip install -r requirements.txt" in capsys.readouterr().out


def test_python_m_course_lib(root):
    environment = os.environ | {
        "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}",
        "COURSE_ROOT": str(root),
    }
    store(root / "runs" / "cpu", exact=METRIC)
    command = [sys.executable, "-m", "course_lib", "results"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 1 and "OUT" in done.stdout and json.loads((root / "runs/cpu/results.json").read_text())
