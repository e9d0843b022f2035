"""What this machine can do, and the settings that fit it: device, dtype, threads, memory, trainer arguments."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from functools import cache

from course_lib import CourseError

# glibc gives large blocks back to the kernel after every step and faults them in again in the next one. Told to keep
# them, training is a quarter faster. Both are read when a process starts: too late to set inside a running kernel.
_KEEP_PAGES = 4 << 30

# The machine on which the minutes in `course.toml` were taken, idle: two cores of an AMD EPYC with AVX512-BF16.
_REFERENCE_GFLOPS = 350

VERSIONED = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "tokenizers")
VERSIONED += ("llguidance", "numpy")


def cores() -> int:
    """Cores this process may use (a container's limit counts, not the host's)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def kernel_environment() -> dict[str, str]:
    """Variables that have to be set before a kernel starts. What the user has set already stays as it is."""
    wanted = {
        "MALLOC_MMAP_THRESHOLD_": str(_KEEP_PAGES),
        "MALLOC_TRIM_THRESHOLD_": str(_KEEP_PAGES),
        "OMP_NUM_THREADS": str(cores()),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm asks for ipywidgets, with a path of this machine
    }
    if not has_nvidia():  # with a GPU, profile t4 takes its model from the hub
        wanted["HF_HUB_OFFLINE"] = "1"
    return {key: os.environ.get(key, value) for key, value in wanted.items()}


def has_nvidia() -> bool:
    """An NVIDIA driver is loaded. Asked without importing torch, so that the command line starts quickly."""
    return os.path.exists("/proc/driver/nvidia/version") or os.environ.get("COLAB_GPU", "0") not in ("", "0")


@cache
def device() -> str:
    """`cuda` or `cpu`. Apple's MPS is used only where `COURSE_DEVICE=mps` asks for it."""
    import torch

    asked = os.environ.get("COURSE_DEVICE")
    if asked not in (None, "", "cpu", "cuda", "mps"):
        raise CourseError(f"COURSE_DEVICE={asked!r}: choose cpu, cuda or mps")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def cpu_has_bf16() -> bool:
    """The processor multiplies bfloat16 in hardware and PyTorch is allowed to use it.

    `ATEN_CPU_CAPABILITY=avx2` (or `default`) makes PyTorch behave as on an older processor; then the answer is False.
    """
    import torch

    if os.environ.get("ATEN_CPU_CAPABILITY", "").lower() in ("default", "avx2"):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def cuda_has_bf16() -> bool:
    """Real bfloat16 units, from compute capability 8. `torch.cuda.is_bf16_supported()` also counts emulation."""
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8


@cache
def dtype():
    """The dtype of the base weights: bfloat16 where the hardware has it, float16 on older CUDA, else float32.

    `COURSE_DTYPE` (float32, bfloat16, float16) overrides.
    """
    import torch

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if asked := os.environ.get("COURSE_DTYPE"):
        if asked not in names:
            raise CourseError(f"COURSE_DTYPE={asked!r}: choose one of {', '.join(names)}")
        return names[asked]
    if device() == "cuda":
        return torch.bfloat16 if cuda_has_bf16() else torch.float16
    return torch.bfloat16 if device() == "cpu" and cpu_has_bf16() else torch.float32


def trainer_arguments() -> dict:
    """Arguments that every TRL config of the course gets, all said out loud: TRL's own defaults are bf16 on and
    gradient checkpointing on, which is wrong on a T4 and slow on a CPU.

    On a CPU the weights themselves are in `dtype()`, so the trainer's mixed precision stays off.
    """
    cuda, half = device() == "cuda", str(dtype())
    return {
        "use_cpu": device() == "cpu",
        "bf16": cuda and half == "torch.bfloat16",
        "fp16": cuda and half == "torch.float16",
        "gradient_checkpointing": False,
        "dataloader_pin_memory": cuda,
        "report_to": "none",
        "disable_tqdm": True,
    }


def four_bit_arguments() -> dict:
    """What a trainer gets on top for a base in four bits. With CUDA: gradient checkpointing, and an optimizer whose
    8-bit state may move to the host's memory for a moment. A CPU has room, and no paging: nothing."""
    return {"gradient_checkpointing": True, "optim": "paged_adamw_8bit"} if device() == "cuda" else {}


def speed() -> float | None:
    """How quick this machine is now beside the reference machine: 1 is as quick, 0.5 takes twice as long.

    Measured on a matrix product of a training step, in `dtype()`, for a third of a second. None with a GPU: the minutes
    of profile `t4` are for one kind of GPU.
    """
    import time

    import torch

    if device() != "cpu":
        return None
    tokens, size, wide = 680, 576, 1536
    x, weight = torch.ones(tokens, size, dtype=dtype()), torch.ones(wide, size, dtype=dtype())
    torch.nn.functional.linear(x, weight)
    done, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < 0.3:
        torch.nn.functional.linear(x, weight)
        done += 1
    return done * 2 * tokens * size * wide / seconds / 1e9 / _REFERENCE_GFLOPS


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The features that decide speed here, of those that the processor has."""
    import torch

    asked = {"avx2": torch.cpu._is_avx2_supported, "avx512": torch.cpu._is_avx512_supported}
    asked |= {"avx512_bf16": torch.cpu._is_avx512_bf16_supported, "amx": torch.cpu._is_amx_tile_supported}
    return [name for name, has in asked.items() if has()]


def describe() -> dict:
    """The machine in short strings and numbers, as `results.json` keeps it."""
    import psutil
    import torch

    found = {
        "cpu": cpu_name(),
        "cores": cores(),
        "features": " ".join(cpu_features()),
        "ram_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "device": device(),
        "dtype": str(dtype()).removeprefix("torch."),
        "system": platform.system(),
    }
    if torch.cuda.is_available():
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "gpu_capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "gpu_memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
            "gpu_real_bf16": cuda_has_bf16(),
        }
    return found


def versions() -> dict[str, str]:
    """Python and the libraries that move results."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


_MUCH_MB = 3500


@cache
def spare_imports() -> None:
    """Once, before the first model is made: tell Python that what the imports made is no garbage. Looking through it
    takes a third of a second each time garbage is collected, which otherwise is before and after each short training.
    """
    import gc

    gc.collect()
    gc.freeze()


def give_back_memory() -> None:
    """Hand pages that nobody uses back to the system, where they are many. Within a training or a generation they are
    kept, which is quicker (`kernel_environment`); between two of them they would add up."""
    import ctypes
    import gc

    gc.collect()
    if rss_mb() < _MUCH_MB:
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # no glibc
        pass


def rss_mb() -> float:
    """Resident memory of this process now, in MB; its peak where the system tells no more."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:  # macOS, Windows
        return peak_rss_mb()


def peak_rss_mb() -> float:
    """Peak resident memory of this process so far, in MB (0 where the system does not tell)."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
