"""Time and memory of a call, on a GPU by its own clock, on the CPU (tiny sizes) by a simple timer."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Run = Callable[[], object]

LONG_S = 0.05  # calls of this length are timed three times each, not for a tenth of a second
SHORT_S = 50e-6  # what cannot take less than this is launched from a graph, or gaps between launches would be timed


def seconds(run: Run, device: torch.device) -> float:
    """Median time of one call, with an empty L2 cache before each."""
    if device.type == "cpu":
        return statistics.median(_on_cpu(run) for _ in range(3))
    once = _on_gpu(run)
    if once > LONG_S:
        return statistics.median(_on_gpu(run) for _ in range(3))
    from triton.testing import do_bench

    return do_bench(run, warmup=25, rep=100, return_mode="median") / 1e3


def graphed_seconds(runs: Sequence[Run]) -> float:
    """Time of one of ``runs``, launched together from a graph; each must have inputs of its own, see `rotation`."""
    from triton.testing import do_bench_cudagraph

    torch.cuda.synchronize()  # the graph is captured on a stream of its own
    return do_bench_cudagraph(lambda: [run() for run in runs], rep=20, return_mode="median") / 1e3 / len(runs)


def rotation(nbytes: int, device: torch.device) -> int:
    """How many sets of inputs of so many bytes leave nothing of a set in the L2 cache until it is used again."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(4, -(-2 * cache // max(nbytes, 1))), 64)


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """The most memory of a call, beyond what there was before; None on the CPU, which does not count."""
    if device.type == "cpu":
        run()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _on_cpu(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _on_gpu(run: Run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
