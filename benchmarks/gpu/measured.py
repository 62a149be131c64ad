"""One case measured: every peer against what is right first, then twice against the clock, in a random order each time.

Whatever goes wrong with a peer, lack of memory included, becomes its line of the result, and the others go on.
"""

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from benchmarks.gpu.case import Built, Case, Line, Machine, Peer, Work, as_tuple, copied
from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.clock import SHORT_S, Run, graphed_seconds, peak_bytes, rotation, seconds
from benchmarks.row import saved_bytes


def blank(point: int, case: str = "", peer: str = "") -> Line:
    """A line of the result in which nothing is measured yet; times are in seconds."""
    unknown = ("forward_floor", "both_floor", "peak_bytes", "saved_bytes", "output_error", "grad_error", "grad_norm")
    return {
        **{"point": point, "case": case, "peer": peer, "forward": [], "both": [], "timers": {}, "tokens": 0},
        **dict.fromkeys(unknown),
        **{"remark": "", "skipped": "", "error": ""},
    }


@contextmanager
def guarded(line: Line) -> Iterator[None]:
    """What is raised inside becomes the ``error`` of the line; tensors that hang on the exception are let go."""
    try:
        yield
    except Exception as error:
        line["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def measured(point: int, case: Case, machine: Machine, ceilings: Ceilings | None, deadline: float) -> list[Line]:
    """A line for each peer. None begins after ``deadline`` (of ``time.monotonic``)."""
    trial = _Trial(case, machine, ceilings)
    lines = {peer.name: blank(point, case.name, peer.name) | trial.floors for peer in case.peers}
    ready: dict[str, Built] = {}
    for peer in random.sample(case.peers, len(case.peers)):
        line = lines[peer.name]
        line["tokens"] = case.tokens
        line["skipped"] = peer.skipped or ("out of time" if time.monotonic() > deadline else "")
        if not line["skipped"]:
            with guarded(line):
                built = peer.build(case.inputs)
                line |= trial.check(peer, built)
                ready[peer.name] = built
    for turn in range(2):
        for peer in random.sample(case.peers, len(case.peers)):
            if peer.name in ready and (turn == 0 or time.monotonic() < deadline):
                with guarded(lines[peer.name]):
                    trial.time(peer, ready[peer.name], lines[peer.name])
    return list(lines.values())


class _Trial:
    """A case, and what its peers are held against."""

    def __init__(self, case: Case, machine: Machine, ceilings: Ceilings | None) -> None:
        self.case, self.device = case, machine.device
        self.floors = {
            f"{part}_floor": ceilings.floor(work) if ceilings and work else None for part, work in _parts(case)
        }
        truth = case.truth(copied(case.inputs, machine.wide))
        with truth.within():
            outputs = as_tuple(truth.compute())
            # random, as data is; of a loss, one
            self.upstream = [torch.randn_like(o).to(machine.dtype) if o.dim() else torch.ones_like(o) for o in outputs]
            self.grads = self._grads(truth, outputs)
        self.outputs = [o.detach() for o in outputs]
        self.originals = copied(case.inputs)
        self.given = [u.clone() for u in self.upstream]

    def check(self, peer: Peer, built: Built) -> Line:
        """Errors, memory, and which inputs were overwritten."""
        with built.within():
            outputs = as_tuple(built.compute())
            grads = self._grads(built, outputs)
            found: Line = {}
            if grads:
                found["grad_norm"] = torch.stack([g.float().norm() for g in grads]).norm().item()
            if peer.checked:
                found["output_error"] = _error(outputs, self.outputs)
                found["grad_error"] = _error(grads, self.grads) if grads else None
            if overwritten := self._restore():
                found["remark"] = f"overwrites {', '.join(overwritten)}"
            del outputs, grads
            if built.step:
                built.step()  # the state of the optimizer is made once, in the first
            run = self._run("both", built) if self.case.both else self._run("forward", built)
            found["peak_bytes"] = peak_bytes(run, self.device)
            if self.case.counts_saved:
                self._restore()
                found["saved_bytes"] = saved_bytes(built.compute, [*self.case.inputs.values(), *built.leaves])
        self._restore()
        return found

    def time(self, peer: Peer, built: Built, line: Line) -> None:
        """One time of each part, added to the line."""
        for part, work in _parts(self.case):
            if work:
                found, line["timers"][part] = self._seconds(part, peer, built, line[f"{part}_floor"])
                line[part].append(found)
                self._restore()

    def _seconds(self, part: str, peer: Peer, built: Built, floor: float | None) -> tuple[float, str]:
        if self.device.type == "cuda" and floor is not None and floor < SHORT_S:
            n = rotation(sum(t.nbytes for t in self.case.inputs.values()), self.device)
            copies = [peer.build(copied(self.case.inputs)) for _ in range(n)]
            with ExitStack() as stack:
                for copy in copies:
                    stack.enter_context(copy.within())
                try:
                    return graphed_seconds([self._run(part, copy) for copy in copies]), "graph"
                except RuntimeError:  # what waits for the GPU cannot be captured
                    torch.cuda.synchronize(self.device)
        with built.within():
            return seconds(self._run(part, built), self.device), "events"

    def _run(self, part: str, built: Built) -> Run:
        if part == "forward":
            return built.compute
        return built.step or (lambda: self._grads(built, as_tuple(built.compute())))

    def _grads(self, built: Built, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        if not self.case.both:
            return ()
        upstream = [u.to(o.dtype) for u, o in zip(self.upstream, outputs, strict=True)]
        return torch.autograd.grad(outputs, built.leaves, upstream)

    @torch.no_grad()
    def _restore(self) -> list[str]:
        """Inputs and upstream gradients as they were; says which were not."""
        names = [*self.case.inputs, *(f"upstream gradient {i}" for i in range(len(self.given)))]
        now = [*self.case.inputs.values(), *self.upstream]
        before = [*self.originals.values(), *self.given]
        changed = [i for i, (a, b) in enumerate(zip(now, before, strict=True)) if not torch.equal(a, b)]
        for i in changed:
            now[i].copy_(before[i])
        return [names[i] for i in changed]


def _parts(case: Case) -> tuple[tuple[str, Work | None], ...]:
    return ("forward", case.forward), ("both", case.both)


def _error(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The largest relative error of a tensor, as a whole; NaN if there is any."""
    each = [(a.to(b.dtype) - b).norm() / b.norm() for a, b in zip(found, right, strict=True)]
    return torch.stack([e.double() for e in each]).max().item()
