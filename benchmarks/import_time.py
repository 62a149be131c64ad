"""What ``import lightning_peft`` costs beyond ``import torch, lightning``, beside what ``import peft`` costs."""

import statistics
import subprocess
import sys

from benchmarks.row import Row

_CODE = "import time, torch, lightning; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def _seconds(package: str) -> float:
    run = subprocess.run([sys.executable, "-c", _CODE.format(package)], capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def run() -> list[Row]:
    """Medians of five fresh processes each."""
    ours, theirs = zip(*((_seconds("lightning_peft"), _seconds("peft")) for _ in range(5)), strict=True)
    return [Row("import, beyond torch and lightning", statistics.median(ours), statistics.median(theirs), "s", "0.3 s")]
