"""Runs a script in two processes on the CPU, and brings back what each of them found."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_peft import AdapterError

TOP = Path(__file__).parents[2]


def launched(script: str, folder: Path, processes: int = 2) -> list[dict[str, Any]]:
    """The facts of each rank; ``script`` lies beside this file and calls `finish` at its end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "PYTHONPATH": str(TOP), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment.pop("PL_GLOBAL_SEED", None)  # Lightning leaves it there, and whoever starts now would take it up
    run = subprocess.Popen(
        [*command, str(Path(__file__).with_name(script)), str(folder)],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = run.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        run.terminate()  # it ends those that wait for each other; killing it would leave them behind
        run.communicate()
        raise
    if run.returncode:
        raise RuntimeError(f"{script} failed:\n{output}")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


def finish(facts: dict[str, Any]) -> None:
    """Write what this rank found, and end: threads that send must be gone before the interpreter is."""
    torch.save(facts, Path(sys.argv[1]) / f"rank{os.environ['RANK']}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    """Of this process."""
    return int(os.environ["RANK"])


def made(*callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    """A quiet Trainer on two CPU processes."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    defaults = {"max_epochs": 1, "devices": 2, "enable_checkpointing": False, "default_root_dir": sys.argv[1], **quiet}
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **kwargs})


def error_of(function: Callable[[], Any]) -> str:
    """The text of the AdapterError that ``function`` raises; empty if it raises none. Ranks go on together."""
    text = ""
    try:
        function()
    except AdapterError as error:
        text = str(error)
    if dist.is_initialized():
        dist.barrier()
    return text


def values(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of what is in the state of ``module`` now."""
    return {key: value.detach().clone() for key, value in module.state_dict().items()}
