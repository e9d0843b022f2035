"""A lesson's file, alone in an empty folder, with Colab's environment variable: its first cell fetches the course.

The repository is a bare clone of this checkout as it lies there, what is not committed included. The Python has
an environment of its own: it does not see the course, but the other packages of this one.

In place of pip stands a program that writes down what it was asked for. So most of this needs no network and shows
nothing of what pip does: that is in `test_resolution.py`, and in the last test here, where pip itself puts in what is
missing. Not covered: Colab, its kernel and its pip, a GPU, and GitHub.
"""

import json
import os
import shutil
import subprocess
import sysconfig

import pytest

from course_lib import colab, profiles, tickets
from course_lib.index import notebook_path

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")

FAKE_PIP = """import json, os, sys
call = {"arguments": sys.argv[1:]}
if "--constraint" in sys.argv:
    call["constraints"] = open(sys.argv[sys.argv.index("--constraint") + 1]).read()
with open(os.environ["PIP_CALLS"], "a") as file:
    file.write(json.dumps(call) + "\\n")
if (wanted := os.environ.get("PIP_FAILS_AT")) and wanted in " ".join(sys.argv):
    sys.exit("WARNING: a warning\\nERROR: No matching distribution found for " + wanted)
exec(os.environ.get("PIP_DOES", ""))
"""
# What a learner's kernel does: the first cell, and here what was asked for after it.
KERNEL = """import json, sys
cells = json.load(open(sys.argv[1], encoding="utf-8"))["cells"]
cell = next("".join(cell["source"]) for cell in cells if "bootstrap" in cell["metadata"].get("tags", ()))
def run_first_cell():
    exec(compile(cell, "first cell", "exec"), {})
"""
USE = """run_first_cell()
import course_lib
from course_lib import profiles, tickets
lesson = profiles.lesson(sys.argv[2])
print(json.dumps({"library": course_lib.__file__, "root": str(profiles.ROOT), "lesson": lesson["id"],
                  "tickets": len(tickets.load("train")), "torch": "torch" in sys.modules}))
"""
ATTEMPT = """try:
    run_first_cell()
except ImportError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A bare git repository of the checkout's files; neither the checkout nor its own repository is touched."""
    bare = tmp_path_factory.mktemp("git") / "course.git"

    def git(*arguments):
        settings = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "core.autocrlf=false"]
        clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
        command = ["git", *settings, f"--git-dir={bare}", *arguments]
        subprocess.run(command, cwd=colab.ROOT, env=clean, check=True, capture_output=True)

    git("init", "--quiet", "--bare")
    work_tree = f"--work-tree={colab.ROOT}"
    git(work_tree, "add", "--all", ".")
    git(work_tree, "commit", "--quiet", "--no-verify", "--no-gpg-sign", "-m", "as it lies there")
    return bare


def without_course(environment):
    """Gives an environment the packages of this one, Colab's versions claimed for some, but not the course."""
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # A path file's lines are searched for packages, but not for path files: an editable install is not seen.
    (environment.site / "colab.pth").write_text("".join(f"{path}\n" for path in sorted(others)))
    for name, version in {"torch": "2.11.0+cu128", "numpy": "2.1.3", "pandas": "2.2.3"}.items():
        environment.claim(name, version)
    return environment


@pytest.fixture(scope="module")
def stand_in(new_environment):
    """Colab, with a program in place of pip that writes down its calls."""
    made = without_course(new_environment())
    fake = made.site / "pip"
    fake.mkdir()
    (fake / "__init__.py").write_text("")
    (fake / "__main__.py").write_text(FAKE_PIP)
    return made


@pytest.fixture
def kernel(stand_in, repository, tmp_path):
    """kernel(lesson, code, **environment): the lesson's file alone in an empty folder; code after its first cell."""
    folder, calls = tmp_path / "content", tmp_path / "calls"
    folder.mkdir()

    def run(lesson, code=USE, **environment):
        path = notebook_path(lesson)
        shutil.copy(path, folder)
        known = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("COURSE_", "COLAB_", "HF_", "PYTHON"))
        }
        known |= {"COLAB_RELEASE_TAG": "release-colab-test", "COURSE_REPOSITORY": str(repository)}
        done = subprocess.run(
            [run.python, "-c", KERNEL + code, path.name, lesson["id"]],
            cwd=folder, env=known | {"PIP_CALLS": str(calls)} | environment,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        done.calls = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
        return done

    run.folder, run.python = folder, stand_in.python
    return run


FIRST = profiles.lessons()[0]


@pytest.mark.parametrize("lesson", profiles.lessons(), ids=lambda lesson: lesson["id"])
def test_a_lone_notebook_gets_the_course(kernel, lesson):
    done = kernel(lesson)
    assert done.returncode == 0, done.stderr
    said, found = done.stdout.splitlines()
    assert said.startswith("Installed the course in ") and "torch 2.11.0+cu128" in said
    course = kernel.folder / "course"
    assert json.loads(found) == {
        "library": str(course / "course_lib" / "__init__.py"),
        "root": str(course),
        "lesson": lesson["id"],
        "tickets": len(tickets.load("train")),
        "torch": False,
    }
    arguments = done.calls[0]["arguments"]
    assert arguments[0] == "install" and arguments[-2:] == ["--editable", f"{course}[colab]"]
    # torch of the claim, and whatever of the kept packages this environment has besides
    assert {"torch==2.11.0+cu128", "numpy==2.1.3", "pandas==2.2.3"} <= set(done.calls[0]["constraints"].split())


def test_a_second_call_does_nothing(kernel):
    done = kernel(FIRST, "run_first_cell()\n" + USE, COLAB_GPU="0")
    assert done.returncode == 0 and done.stdout.count("Installed") == 1
    assert [call for call in done.calls if "--editable" in call["arguments"]] == done.calls[:1]


def test_no_token_is_asked_for(kernel):
    """Left to itself, the hub's client opens a dialog for one in Colab's vault."""
    show = "run_first_cell()\nfrom huggingface_hub import constants\nprint(constants.HF_HUB_DISABLE_IMPLICIT_TOKEN)"
    assert kernel(FIRST, show).stdout.endswith("\nTrue\n")
    assert kernel(FIRST, show, HF_TOKEN="mine").stdout.endswith("\nFalse\n")


def test_who_asks_for_unsloth_on_a_gpu_gets_it_without_its_dependencies(kernel):
    done = kernel(FIRST, COLAB_GPU="1", COURSE_FOUR_BIT="unsloth")
    needs, unsloth = done.calls[1:]
    assert needs["constraints"] == done.calls[0]["constraints"]
    assert needs["arguments"][-len(colab.extras()["unsloth-needs"]) :] == colab.extras()["unsloth-needs"]
    assert unsloth["arguments"][-3:] == ["--no-deps", *colab.extras()["unsloth"]]


@pytest.mark.parametrize("asked", [{"COLAB_GPU": "1"}, {"COLAB_GPU": "0", "COURSE_FOUR_BIT": "unsloth"}])
def test_unsloth_is_added_neither_unasked_nor_without_a_gpu(kernel, asked):
    assert len(kernel(FIRST, **asked).calls) == 1


def test_a_course_without_unsloth_is_a_course(kernel):
    use = "run_first_cell()\nimport os\nprint(os.environ['COURSE_FOUR_BIT'])"
    done = kernel(FIRST, use, COLAB_GPU="1", COURSE_FOUR_BIT="unsloth", PIP_FAILS_AT=colab.extras()["unsloth"][0])
    assert done.returncode == 0 and done.stdout.endswith("\nbitsandbytes\n"), done.stderr
    assert "lesson 05 takes bitsandbytes instead (pip could not install" in done.stdout


def test_a_wrong_address_is_told_and_can_be_mended(kernel, repository):
    mended = ATTEMPT + f"import os\nos.environ['COURSE_REPOSITORY'] = {str(repository)!r}\n" + USE
    done = kernel(FIRST, mended, COURSE_REPOSITORY="nowhere.git")
    assert "Cannot fetch the course from 'nowhere.git': fatal: " in done.stdout
    assert "Put `%env COURSE_REPOSITORY=https://" in done.stdout
    assert done.returncode == 0 and "Installed the course" in done.stdout, done.stderr


def test_what_pip_says_is_told_and_the_cell_can_be_run_again(kernel):
    done = kernel(FIRST, ATTEMPT + "import os\ndel os.environ['PIP_FAILS_AT']\n" + USE, PIP_FAILS_AT="[colab]")
    assert (
        "pip could not install the course: ERROR: No matching distribution found for [colab]\nRun this" in done.stdout
    )
    assert "a warning" not in done.stdout
    assert done.returncode == 0 and "Installed the course" in done.stdout, done.stderr


def test_an_old_package_in_memory_asks_for_a_restart(kernel, stand_in):
    stand_in.claim("pyarrow", "18.1.0")
    old = stand_in.site / "pyarrow-18.1.0.dist-info"
    try:
        done = kernel(
            FIRST, "sys.modules['pyarrow'] = None\n" + USE, PIP_DOES=f"import shutil; shutil.rmtree({str(old)!r})"
        )
    finally:
        shutil.rmtree(old, ignore_errors=True)
    assert done.returncode and "pyarrow had been imported before" in done.stderr
    assert "Choose Runtime > Restart session" in done.stderr


def test_elsewhere_nothing_is_fetched(kernel):
    done = kernel(FIRST, "import os\ndel os.environ['COLAB_RELEASE_TAG']\n" + USE)
    assert done.returncode and "in the course's folder run `make lab`" in done.stderr
    assert not (kernel.folder / "course").exists() and not done.calls


@pytest.mark.network
@pytest.mark.slow
def test_pip_installs_it_and_a_new_kernel_finds_it(kernel, new_environment, index):
    kernel.python = without_course(new_environment()).python
    done = kernel(FIRST, COURSE_FOUR_BIT="bitsandbytes")  # with a GPU too, nothing of CUDA is fetched
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Installed the course")
    restarted = kernel(FIRST)
    assert restarted.returncode == 0, restarted.stderr
    assert restarted.stdout == done.stdout.splitlines(keepends=True)[-1]
