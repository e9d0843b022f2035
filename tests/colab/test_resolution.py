"""pip, asked about Colab's own list of packages, leaves PyTorch, numpy and pandas alone and puts the pins beside them.

The packages of the list are claims without dependencies or files (`freeze.txt`). So this does not see whether another
package of Colab's minds what is replaced, nor whether anything runs there, and it asks with this Python: Colab's own is
in the head of the list.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from course_lib import colab

FREEZE = dict(
    line.split("==") for line in (Path(__file__).parent / "freeze.txt").read_text().splitlines() if line[0] != "#"
)


@pytest.fixture(scope="module")
def runtime(new_environment):
    """Colab's packages, as claims."""
    made = new_environment()
    for name, version in FREEZE.items():
        made.claim(name, version)
    return made


@pytest.fixture(scope="module")
def kept(runtime, tmp_path_factory):
    """The constraints that an installation there would write."""
    code = "import runpy, sys; sys.stdout.write(runpy.run_path(sys.argv[1])['constraints']())"
    command = [runtime.python, "-c", code, colab.__file__]
    path = tmp_path_factory.mktemp("constraints") / "kept.txt"
    path.write_text(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return path


def resolve(runtime, report, *arguments):
    """{name: version} of what pip would install there."""
    command = [sys.executable, "-m", "pip", "--python", runtime.python, "install", "--quiet", "--dry-run"]
    done = subprocess.run(
        [*command, "--report", report, *arguments],
        capture_output=True, text=True, env=os.environ | {"PIP_NO_INPUT": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [entry["metadata"] for entry in json.loads(report.read_text(encoding="utf-8"))["install"]]
    return {canonicalize_name(entry["name"]): entry["version"] for entry in found}


def test_constraints_are_of_the_kept_packages_alone(kept):
    lines = kept.read_text().splitlines()
    assert lines == [f"{name}=={FREEZE[name]}" for name in colab.KEPT]


@pytest.mark.network
@pytest.mark.slow
def test_torch_numpy_and_pandas_stay(runtime, kept, index, tmp_path):
    extras = colab.extras()
    arguments = ["--constraint", kept, "--editable", f"{colab.ROOT}[colab]", *extras["unsloth-needs"]]
    found = resolve(runtime, tmp_path / "report.json", *arguments)
    assert not set(colab.KEPT) & set(found)
    assert not [name for name in found if name.startswith(("nvidia-", "cuda-"))], "CUDA libraries would be fetched"
    for need in map(Requirement, extras["colab"]):
        assert need.specifier.contains(found[canonicalize_name(need.name)]), need
    # A replaced package that the kernel has loaded would need a restart: the first cell looks at these.
    replaced = set(found) & {canonicalize_name(name) for name in FREEZE}
    assert replaced <= set(colab.STACK), f"name {sorted(replaced - set(colab.STACK))} in STACK of course_lib/colab.py"


@pytest.mark.network
@pytest.mark.slow
def test_unsloths_release_is_there(runtime, index, tmp_path):
    pins = [Requirement(text) for text in colab.extras()["unsloth"]]
    found = resolve(runtime, tmp_path / "report.json", "--no-deps", *map(str, pins))
    assert set(found) == {canonicalize_name(pin.name) for pin in pins}
