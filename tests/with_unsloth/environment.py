"""Makes the environment of `make test-unsloth`: a thin layer over the course's own, with unsloth on top.

Run by the Python of the course's environment: `python tests/with_unsloth/environment.py FOLDER`. unsloth's own list of
requirements is not resolved: it asks for a newer certifi than some indexes carry, and for CUDA packages that its CPU
back end does not need. What the layer lacks it finds in the course's environment, through one path file.
"""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from course_lib.colab import extras

# The releases of pyproject.toml, and what they import on a CPU beside the course's own libraries.
PINS = [*extras()["unsloth"], "protobuf==7.36.2", "sentencepiece==0.2.3"]


def main(folder):
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    stamp, key = folder / ".course-stamp", "\n".join([sys.executable, sys.version, *PINS])
    if stamp.exists() and stamp.read_text() == key:
        return 0
    print(f"Making {folder}: {' '.join(PINS)} ...", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    place = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    )
    # `addsitedir`, not the bare path: the course itself is installed there by a path file of its own.
    line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    Path(place.stdout.strip(), "zz_course.pth").write_text(line)
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", *PINS]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
        print(f"error: unsloth cannot be installed here: {reason}", file=sys.stderr)
        return 2
    stamp.write_text(key)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
