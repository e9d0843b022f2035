"""Settings for every test, and for the notebooks that nbval runs (this file stands above both folders).

nbval starts its kernels with this process's environment, so what a kernel needs before it starts is set here.
Whatever the caller has set already wins.
"""

import os
import tempfile

from course_lib.hardware import kernel_environment

_out = None


def pytest_configure(config):
    global _out
    os.environ.setdefault("COURSE_PROFILE", "ci")
    for name, value in kernel_environment().items():
        os.environ.setdefault(name, value)
    if "COURSE_OUT" not in os.environ:
        _out = tempfile.TemporaryDirectory(prefix="course-test-")
        os.environ["COURSE_OUT"] = _out.name


def pytest_unconfigure(config):
    if _out is not None:
        os.environ.pop("COURSE_OUT", None)
        _out.cleanup()
