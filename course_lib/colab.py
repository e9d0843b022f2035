"""Installs the course over Colab's own packages. The first cell of every lesson runs this file from a clone.

Colab brings PyTorch for its driver, and has numpy and pandas built against each other: those stay, by constraints.
Nothing of the course is imported before it is installed, so that a failure leaves nothing half loaded.
"""

import importlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("torch", "torchvision", "torchaudio", "triton", "numpy", "pandas", "pillow")
# What is replaced on disk and cannot be replaced in a process that has loaded it.
STACK = ("transformers", "tokenizers", "datasets", "pyarrow", "peft", "accelerate", "torchao", "trl", "bitsandbytes")


def versions(names):
    """{name: version} of those that are installed; asked of their metadata, so that none is imported."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def constraints():
    """The kept packages, as lines that hold pip to the versions which are there."""
    return "".join(f"{name}=={version}\n" for name, version in versions(KEPT).items())


def extras():
    """{extra: its requirements} of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["optional-dependencies"]


def wants_unsloth():
    """There is a GPU, and `COURSE_FOUR_BIT` asks for unsloth.

    It is not added unasked. unsloth puts its own methods into the model classes of transformers, for the whole
    process; lesson 05 compares its model with a plain one of the same class, which then lacks what they look for
    (`Qwen2Attention.forward` in unsloth/models/qwen2.py, `apply_qkv` in llama.py).
    """
    gpu = os.path.exists("/proc/driver/nvidia/version") or os.environ.get("COLAB_GPU", "") not in ("", "0")
    return gpu and os.environ.get("COURSE_FOUR_BIT") == "unsloth"


def pip(arguments):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    done = subprocess.run([*command, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise ImportError(
            f"pip could not install the course: {' '.join(errors[:3])[:600]}\nRun this cell again; if that does not "
            "help, choose Runtime > Disconnect and delete runtime, connect anew, and Runtime > Run all."
        )


def add_unsloth(kept):
    """unsloth, and what it needs; a sentence where that failed, for lesson 05 does without it.

    It comes without its dependencies: asked for them, a resolver may step back to a release from 2025.
    """
    try:
        pip(["--constraint", str(kept), *extras()["unsloth-needs"]])
        pip(["--no-deps", *extras()["unsloth"]])
    except ImportError as error:
        os.environ["COURSE_FOUR_BIT"] = "bitsandbytes"
        return f" unsloth could not be added, lesson 05 takes bitsandbytes instead ({str(error).splitlines()[0]})."
    return ""


def install():
    """Install, make the library importable in this process, and say in one line what was done."""
    started, note = time.monotonic(), ""
    loaded = versions(name for name in STACK if name in sys.modules)
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "constraints.txt"
        kept.write_text(constraints())
        pip(["--constraint", str(kept), "--editable", f"{ROOT}[colab]"])
        if wants_unsloth():
            note = add_unsloth(kept)
    importlib.invalidate_caches()
    moved = [name for name, version in versions(loaded).items() if version != loaded[name]]
    if moved:
        raise ImportError(
            f"The course is installed, but {', '.join(moved)} had been imported before, in another version. "
            "Choose Runtime > Restart session, then Runtime > Run all."
        )
    sys.path.insert(0, str(ROOT))  # pip's entry for it is read by the next process, not by this one
    from course_lib import hardware

    os.environ.update(hardware.kernel_environment())
    if "HF_TOKEN" not in os.environ:  # or the hub's client opens a dialog for one that lies in Colab's vault
        os.environ.setdefault("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    now, stayed = (
        ", ".join(f"{name} {version}" for name, version in versions(names).items())
        for names in ((*STACK, "unsloth"), KEPT)
    )
    seconds = time.monotonic() - started
    print(f"Installed the course in {ROOT} with {now}, beside Colab's own {stayed}: {seconds:.0f} s.{note}")
