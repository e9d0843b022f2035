"""Settings for every test, and for the notebooks that nbval runs (this file stands above both folders).

nbval starts its kernels with this process's environment, so what a kernel needs before it starts is set here.
Whatever the caller has set already wins.
"""

import os
import tempfile

import pytest

from course_lib.hardware import cores, kernel_environment

_TWO_LESSONS = 10e9  # bytes: what lessons of profile ci, two at a time, and their tests were seen to take at most
_out = None


def _own_cores(config):
    """Share the cores out among xdist's workers: two models with two threads each would wait for each other."""
    given = getattr(config, "workerinput", None)
    if given is None or not hasattr(os, "sched_setaffinity"):
        return
    everyones = sorted(os.sched_getaffinity(0))
    mine = everyones[int(given["workerid"].removeprefix("gw")) :: given["workercount"]] or everyones
    os.sched_setaffinity(0, mine)
    if os.environ.get("OMP_NUM_THREADS") == str(len(everyones)):  # the default, which the first process has set
        os.environ["OMP_NUM_THREADS"] = str(len(mine))


@pytest.hookimpl(optionalhook=True)  # xdist may be missing, as where only the tests of Colab run
def pytest_xdist_auto_num_workers(config):
    """Two where two lessons at once have room, else one file after another."""
    import psutil

    return 2 if cores() > 1 and psutil.virtual_memory().available > _TWO_LESSONS else 0


def pytest_configure(config):
    global _out
    _own_cores(config)
    os.environ.setdefault("COURSE_PROFILE", "ci")
    for name, value in kernel_environment().items():
        os.environ.setdefault(name, value)
    if "COURSE_OUT" not in os.environ:
        _out = tempfile.TemporaryDirectory(prefix="course-test-")
        os.environ["COURSE_OUT"] = _out.name


def pytest_collection_modifyitems(items):
    """What takes minutes first: at the end two workers have short files left to share."""
    items.sort(key=lambda item: item.path.parent.name == "unit")


def pytest_unconfigure(config):
    if _out is not None:
        os.environ.pop("COURSE_OUT", None)
        _out.cleanup()
