"""Colab without Colab: an environment of its own that stands in for Colab's, and an index where one answers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from course_lib.colab import ROOT


class Environment:
    """A fresh virtual environment: it sees no package but those put into it."""

    def __init__(self, folder):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        command = [self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        self.site = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())

    def claim(self, name, version):
        """Make pip and importlib.metadata believe that a package is installed; it can not be imported."""
        folder = self.site / f"{re.sub(r'[-.]+', '_', name)}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (folder / "INSTALLER").write_text("pip\n")
        (folder / "RECORD").write_text("")


@pytest.fixture(scope="session")
def new_environment(tmp_path_factory):
    return lambda: Environment(tmp_path_factory.mktemp("colab") / "environment")


@pytest.fixture(scope="session")
def index():
    """Skips where no package index answers; under CI=true it fails instead."""
    pin = re.search(r"(?m)^trl==\S+", (ROOT / "requirements.txt").read_text(encoding="utf-8"))[0]
    probe = ["--dry-run", "--ignore-installed", "--no-deps", "--no-cache-dir", "--retries", "1", "--timeout", "15", pin]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", *probe],
        capture_output=True, text=True, env=os.environ | {"PIP_NO_INPUT": "1"},
    )  # fmt: skip
    if done.returncode:
        message = f"no package index answers: {(done.stderr.strip() or 'pip said nothing').splitlines()[-1]}"
        if os.environ.get("CI") == "true":
            pytest.fail(message + "; under CI=true this test may not be skipped")
        pytest.skip(message)
