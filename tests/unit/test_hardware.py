import json
import os
import subprocess
import sys

import pytest
import torch

from course_lib import CourseError, hardware


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with bfloat16 units and no GPU, whatever this one is; nothing asked for in the environment."""
    for name in ("COURSE_DEVICE", "COURSE_DTYPE", "ATEN_CPU_CAPABILITY", "COLAB_GPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    forget()
    yield monkeypatch
    forget()


def forget():
    hardware.device.cache_clear()
    hardware.dtype.cache_clear()


def gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)  # as it says on a T4, by emulation


# --- device and dtype ------------------------------------------------------------------------------------------------


def test_a_processor_with_bfloat16_uses_it():
    assert (hardware.device(), hardware.dtype()) == ("cpu", torch.bfloat16)


def test_an_older_processor_uses_float32(machine):
    machine.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert hardware.dtype() == torch.float32
    machine.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    forget()
    assert hardware.dtype() == torch.bfloat16


@pytest.mark.parametrize("value", ["avx2", "AVX2", "default"])
def test_pytorch_held_to_an_older_processor_counts_as_one(machine, value):
    machine.setenv("ATEN_CPU_CAPABILITY", value)
    assert not hardware.cpu_has_bf16()
    assert hardware.dtype() == torch.float32


def test_pytorch_held_to_avx512_keeps_bfloat16(machine):
    machine.setenv("ATEN_CPU_CAPABILITY", "avx512")
    assert hardware.dtype() == torch.bfloat16


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_gpu_by_its_capability_and_not_by_emulation(machine, capability, dtype):
    gpu(machine, capability)
    assert (hardware.device(), hardware.dtype()) == ("cuda", dtype)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_dtype_that_is_asked_for(machine, name):
    machine.setenv("COURSE_DTYPE", name)
    assert hardware.dtype() == getattr(torch, name)


@pytest.mark.parametrize("name", ["cpu", "mps", "cuda"])
def test_a_device_that_is_asked_for(machine, name):
    machine.setenv("COURSE_DEVICE", name)
    assert hardware.device() == name


@pytest.mark.parametrize(
    ("variable", "value", "function"),
    [("COURSE_DTYPE", "bf16", "dtype"), ("COURSE_DTYPE", "int8", "dtype"), ("COURSE_DEVICE", "gpu", "device")],
)
def test_a_wrong_value_is_named_with_the_valid_ones(machine, variable, value, function):
    machine.setenv(variable, value)
    valid = "float32, bfloat16, float16" if function == "dtype" else "cpu, cuda or mps"
    with pytest.raises((ValueError, CourseError), match=f"{variable}='{value}': choose .*{valid}"):
        getattr(hardware, function)()


# --- a kernel's environment ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("colab", "found"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_colab_says_whether_there_is_a_gpu(machine, colab, found):
    machine.setattr(hardware.os.path, "exists", lambda path: False)
    if colab is not None:
        machine.setenv("COLAB_GPU", colab)
    assert hardware.has_nvidia() is found


def test_kernel_environment_keeps_what_the_user_has_set(machine):
    machine.setattr(hardware, "has_nvidia", lambda: False)
    for name in hardware.kernel_environment():
        machine.delenv(name, raising=False)
    fresh = hardware.kernel_environment()
    assert fresh["HF_HUB_OFFLINE"] == "1" and fresh["OMP_NUM_THREADS"] == str(hardware.cores())
    assert int(fresh["MALLOC_MMAP_THRESHOLD_"]) == int(fresh["MALLOC_TRIM_THRESHOLD_"]) > 2**30
    assert all(isinstance(value, str) for value in fresh.values())
    machine.setenv("OMP_NUM_THREADS", "1")
    machine.setenv("HF_HUB_OFFLINE", "0")
    assert hardware.kernel_environment() == fresh | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"}


def test_with_a_gpu_the_hub_stays_reachable(machine):
    machine.setattr(hardware, "has_nvidia", lambda: True)
    machine.delenv("HF_HUB_OFFLINE", raising=False)
    assert "HF_HUB_OFFLINE" not in hardware.kernel_environment()


def test_the_environment_is_made_without_torch():
    code = "import sys, course_lib.hardware as h; h.kernel_environment(); assert 'torch' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


# --- trainer arguments -----------------------------------------------------------------------------------------------

EXPLICIT = ("use_cpu", "bf16", "fp16", "gradient_checkpointing")


@pytest.mark.parametrize("name", ["SFTConfig", "DPOConfig", "KTOConfig", "GRPOConfig"])
def test_every_trl_config_takes_the_arguments(tmp_path, name):
    import trl

    wanted = hardware.trainer_arguments()
    config = getattr(trl, name)(output_dir=str(tmp_path), **wanted)
    assert set(EXPLICIT) <= set(wanted)
    assert {key: getattr(config, key) for key in EXPLICIT} == {
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
    }
    assert config.report_to in ("none", []) and not config.dataloader_pin_memory


@pytest.mark.parametrize(("capability", "bf16"), [((7, 5), False), ((8, 0), True)])
def test_a_gpu_below_capability_8_never_gets_bfloat16(machine, capability, bf16):
    gpu(machine, capability)
    found = hardware.trainer_arguments()
    assert (found["use_cpu"], found["bf16"], found["fp16"]) == (False, bf16, not bf16)


def test_mixed_precision_follows_the_dtype_that_was_asked_for(machine):
    gpu(machine, (9, 0))
    machine.setenv("COURSE_DTYPE", "float16")
    assert (hardware.trainer_arguments()["bf16"], hardware.trainer_arguments()["fp16"]) == (False, True)


# --- what it says about the machine ----------------------------------------------------------------------------------


def test_describe_and_versions_can_be_stored():
    about, versions = hardware.describe(), hardware.versions()
    assert json.loads(json.dumps(about)) == about
    assert about["cores"] >= 1 and about["ram_gb"] > 0 and (about["device"], about["dtype"]) == ("cpu", "bfloat16")
    assert {"python", "torch", "transformers", "trl", "peft"} <= set(versions)
    assert hardware.peak_rss_mb() > 10


def test_speed_is_measured_and_means_nothing_on_a_gpu(monkeypatch):
    monkeypatch.setenv("COURSE_DEVICE", "cpu")
    assert 0 < hardware.speed() < 1000
    monkeypatch.setenv("COURSE_DEVICE", "cuda")
    forget()
    assert hardware.speed() is None


def test_what_imports_made_is_not_looked_through_again():
    code = """
import gc, transformers.models.llama.modeling_llama
from course_lib import hardware
before = len(gc.get_objects())
hardware.spare_imports()
print(before, len(gc.get_objects()), gc.get_freeze_count())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after, frozen = map(int, done.stdout.split())
    assert before > 100_000 and after < before / 10 and frozen > 100_000


MEMORY = """
import psutil, torch
from course_lib import hardware
used = lambda: psutil.Process().memory_info().rss >> 20
blocks = [torch.ones(1 << 16) for _ in range(2000)]  # 500 MB in pieces
last = torch.ones(1 << 16)  # behind them: shortening the heap would not help
start = used()
del blocks
kept = used()
hardware.give_back_memory()
little = used()
hardware._MUCH_MB = 400
hardware.give_back_memory()
print(start - kept, start - little, start - used())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_that_was_kept_is_given_back():
    environment = os.environ | hardware.kernel_environment()
    done = subprocess.run([sys.executable, "-c", MEMORY], env=environment, capture_output=True, text=True, check=True)
    kept, little, given = map(int, done.stdout.split())
    assert kept < 100 and given > 300
    assert little < 100  # where little is in use, faulting pages in again costs more than they are worth
