"""The supervised recipe as a script, for one process or many: `accelerate launch ... -m course_lib.launch`.

What is trained stands in files, so that one process and many get the same: `--rows`, JSON Lines of prompt and
completion, and `--settings`, a recipe as JSON (`batch_size` is that of all processes together). Rows are taken in the
order of the file. `run` starts it on this machine's processor.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from course_lib import CourseError


def train(rows: list[dict], s: SimpleNamespace, out: Path, model=None, tokenizer=None) -> dict:
    """Train a fresh adapter in float32; the main process writes it to `out/adapter`, and `out/run.json` with
    `processes` and `losses` [(step, loss of the whole batch, nats a token)]. model: a folder; None the course's."""
    import torch

    from course_lib import models, profiles, recipes
    from course_lib.results import write_json

    processes = int(os.environ.get("WORLD_SIZE", 1))
    share = SimpleNamespace(**vars(s) | {"batch_size": _share(s.batch_size, processes)})
    profiles.set_seeds(s.seed)  # every process begins with the same adapter
    adapted = recipes.add_lora(models.load(model, dtype=torch.float32), s)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    fixed = {"train_sampling_strategy": "sequential", "logging_steps": 1, "dataloader_drop_last": True, "bf16": False}
    fixed |= {"fp16": False, "ddp_find_unused_parameters": False}
    trainer = recipes.sft_trainer(adapted, models.load_tokenizer(tokenizer or model), rows, share, s.seed, **fixed)
    trainer.train()
    # What was told by the environment proves nothing: each process gives a one, and their sum comes back.
    counted = int(trainer.accelerator.reduce(torch.ones(1, device=trainer.accelerator.device)).item())
    found = {"processes": counted, "losses": recipes.losses(trainer)}
    if trainer.accelerator.is_main_process:
        recipes.save(trainer.accelerator.unwrap_model(trainer.model), out / "adapter")
        write_json(out / "run.json", found)
    return found


def _share(batch_size: int, processes: int) -> int:
    """What each process takes of a batch."""
    if batch_size % processes:
        raise CourseError(f"a batch of {batch_size} cannot be shared by {processes} processes: make it a multiple.")
    return batch_size // processes


def arguments(processes: int = 1, machines: int = 1, rank: int = 0, port: int = 0) -> list[str]:
    """What stands behind `accelerate launch` for processes on processors.

    Not `--cpu --num_processes 2`: without mpirun that starts one process and says nothing. `--multi_gpu` is what
    accelerate calls "through torchrun"; the variable ACCELERATE_USE_CPU keeps them off a GPU, with gloo between them.
    """
    if processes == 1:
        return ["--cpu", "--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    found = ["--multi_gpu", f"--num_processes={processes}", f"--num_machines={machines}", f"--machine_rank={rank}"]
    found += ["--main_process_ip=127.0.0.1", f"--main_process_port={port}"]
    return [*found, "--mixed_precision=no", "--dynamo_backend=no"]


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _give_back() -> None:
    """`hardware.give_back_memory`, however little this process holds: each that is started needs a model's worth."""
    import contextlib
    import ctypes

    from course_lib import hardware

    hardware.give_back_memory()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def run(
    rows: list[dict], settings: dict, out, processes: int = 1, machines: int = 1, model=None, seconds: float = 900
) -> dict:
    """Run the script under `accelerate launch` on this machine's processor and return what `out/run.json` says.

    With `machines` above one, each is a launch of its own, as on a cluster, but all of them here. Raises CourseError
    with the end of the log where a launch fails or takes longer than `seconds`.
    """
    from course_lib import hardware, profiles

    _share(settings["batch_size"], processes)
    _give_back()
    out = Path(out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    (out / "run.json").unlink(missing_ok=True)
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (out / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    script = ["-m", "course_lib.launch", f"--rows={out / 'rows.jsonl'}", f"--settings={out / 'settings.json'}"]
    script += [f"--out={out}"] + ([f"--model={model}"] if model else [])
    threads = str(max(1, hardware.cores() // processes))
    environment = os.environ | hardware.kernel_environment() | {"OMP_NUM_THREADS": threads, "GLOO_SOCKET_IFNAME": "lo"}
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        environment.pop(name, None)  # several models at once: these processes hand unused pages back, unlike a kernel
    environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "COURSE_DEVICE": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(profiles.ROOT), os.environ.get("PYTHONPATH", "")])
    if sys.platform != "linux":
        del environment["GLOO_SOCKET_IFNAME"]  # the loopback has another name there
    port, logs, started = free_port(), [], []
    try:
        for rank in range(machines):
            launch = [sys.executable, "-m", "accelerate.commands.launch", *arguments(processes, machines, rank, port)]
            logs.append(open(out / f"log{rank}.txt", "w", encoding="utf-8"))  # noqa: SIM115
            started.append(
                subprocess.Popen([*launch, *script], env=environment, stdout=logs[-1], stderr=subprocess.STDOUT)
            )
        codes = [process.wait(seconds) for process in started]
    except subprocess.TimeoutExpired:
        codes = [f"no end after {seconds:g} seconds"]
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
                process.wait()
        for log in logs:
            log.close()
    if any(codes) or not (out / "run.json").exists():
        log = (out / "log0.txt").read_text(encoding="utf-8", errors="replace")
        errors = re.findall(r"(?m)^(?:\[rank\d+\]: ?)?([\w.]*(?:Error|Exception): .*)$", log)
        said = errors[0] if errors else log[-500:]  # what comes later is torchrun's word on it
        raise CourseError(f"accelerate launch ended with {codes}: {said} The whole log is {out.name}/log0.txt.")
    return json.loads((out / "run.json").read_text(encoding="utf-8"))


def main(words=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("rows", "settings", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--model", default=None)
    given = parser.parse_args(words)
    rows = [json.loads(line) for line in given.rows.read_text(encoding="utf-8").splitlines()]
    train(rows, SimpleNamespace(**json.loads(given.settings.read_text())), given.out, given.model)


if __name__ == "__main__":
    main()
