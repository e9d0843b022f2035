"""What only a CUDA device can show, under the memory of a T4. `make test` skips these tests where there is none.

Each measurement runs in a process of its own (`measure.py`), its memory capped at what a T4 leaves. The figures, with
the device's name, are kept in `runs/gpu/figures.json`.
"""

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from course_lib import memory, profiles, results

HERE = Path(__file__).parent
SHAPES = ("Qwen2.5-0.5B", "SmolLM2-1.7B", "Qwen2.5-3B", "Llama-3.1-8B")

CUDA = torch.cuda.is_available()
no_gpu = pytest.mark.skipif(not CUDA, reason="no CUDA device here: nothing about a GPU is verified")


def on_a_gpu(test):
    return pytest.mark.gpu(no_gpu(test))


@functools.cache
def measured(*what, backend="bitsandbytes"):
    """What `measure.py` found. float16, as on a T4, also where the device has bfloat16."""
    folder = profiles.ROOT / "runs" / "gpu"
    path = folder / f"{'-'.join(what)}-{backend}.json"
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"COURSE_DTYPE": "float16", "COURSE_DEVICE": "cuda", "COURSE_FOUR_BIT": backend}
    command = [sys.executable, str(HERE / "measure.py"), *what, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(path.read_text())
    figures = folder / "figures.json"
    known = json.loads(figures.read_text()) if figures.exists() else {}
    results.write_json(figures, known | {path.stem: found})
    path.unlink()
    return found


@on_a_gpu
def test_training_in_float16_has_no_nan_and_learns():
    found = measured("recipe")
    assert found["dtype"] == "torch.float16" and found["adapter_dtypes"] == ["torch.float32"]
    assert found["finite"] and all(map(math.isfinite, found["losses"]))
    assert sum(found["losses"][-10:]) / 10 < 0.6 * found["losses"][0]


@on_a_gpu
@pytest.mark.parametrize("name", SHAPES)
def test_the_planner_against_the_measured_peak(name):
    found = measured("shape", name)
    assert all(map(math.isfinite, found["losses"]))
    assert found["counted"] == pytest.approx(found["planned_counted"], rel=0.05)
    assert found["peak"] == pytest.approx(found["planned"], rel=0.25)  # activations are an estimate


@on_a_gpu
@pytest.mark.parametrize("name", SHAPES)
def test_what_the_planner_says_fits_a_t4_does(name):
    planned = memory.plan(memory.shape(name), "qlora")
    assert planned.total < memory.GPUS["t4"]
    assert measured("shape", name)["peak"] < memory.GPUS["t4"] - memory.RESERVED


@on_a_gpu
def test_unsloth_beside_plain_trl():
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("unsloth is not in this environment")
    plain, quick = (measured("recipe", backend=name) for name in ("bitsandbytes", "unsloth"))
    assert sum(quick["losses"][-10:]) == pytest.approx(sum(plain["losses"][-10:]), rel=0.1)
    assert quick["tokens_per_s"] > 0.8 * plain["tokens_per_s"]  # both figures are in runs/gpu/figures.json


def test_the_measurement_itself_runs_anywhere(tmp_path):
    """On a small shape and this machine's own device, so that it is not first tried on a GPU that somebody pays for."""
    path = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, str(HERE / "measure.py"), "shape", "SmolLM2-135M", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(path.read_text())
    width = 4 if CUDA or found["dtype"] == "torch.float32" else 2  # of an adapter's weight: `recipes.add_lora`
    base = 4 if found["dtype"] == "torch.float32" else 2
    planned = memory.plan(memory.shape("SmolLM2-135M"), "qlora", adapter_bytes=width, base_bytes=base)
    assert found["counted"] == pytest.approx(planned.counted, rel=0.05)
    assert all(loss == pytest.approx(math.log(49152), rel=0.05) for loss in found["losses"])  # weights without a word
