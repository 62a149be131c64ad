"""SaRA: train the entries of the weights that are so small that the model does without them.

Paper:    Hu et al., "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation",
          2024, arXiv:2409.06633.
Formula:  y = (W + D) x + b,  D zero but for M = {ij: |W_ij| < theta};
          loss + lowrank_weight * ||(W + D) . M||_*, the sum of the singular values of one weight, another each step
Shapes:   values of D (n,) and their places (n,) for each weight, n entries of it are below theta
Init:     D = 0; y starts as the base, bit for bit
Merge:    W <- W + D
Schedule: behind the share ``reselect`` of the run, entries that have grown to theta keep their values, and the others
          go on with their moments: M <- M and {ij: |W_ij + D_ij| < theta}
Cost:     W + D of one layer at a time, which the backward pass builds in pieces of n entries, as it does the gradient
Deviates from the authors' code: the change D trains beside the entries, with the same gradients; weight decay pulls
          them to where they started. No sign is lost, the penalty reaches what trains, files hold the places too.
"""

import random
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_peft.adapters.entries import Entries, EntriesConv
from lightning_peft.engine import Adapter, Kind, Target, TargetedMethod, TargetError, Training, register
from lightning_peft.engine.limits import NonNegative, Patterns, Positive, Share
from lightning_peft.engine.slots import CALL_IT, in_codes, in_codes_because, whole
from lightning_peft.parts.magnitudes import below_smallest

# of matrices that the penalty looks at: fewer rows, columns or entries have no rank to lower
_MIN_SIZE, _MIN_ENTRIES = 64, 100


@register("sara")
@dataclass(frozen=True, kw_only=True)
class SaRA(TargetedMethod):
    """Training of the smallest entries of all weights.

    Args:
        share: how much of all chosen weights together trains; theta is the largest of these entries.
        threshold: theta, in place of ``share``; the paper takes 2e-3 for Stable Diffusion 1.5.
        reselect: after which share of the run entries that have grown stop; None for never.
        lowrank_weight: weight of the penalty; the paper takes 5e-4. 0 switches it off.
        target_modules: by default all linear layers and convolutions but the head.
        exclude_modules: see `LoRA`; so for the arguments that follow it.

    Raises:
        AdapterError: an argument is out of range; or, when training starts, the length of the run is not known.
        TargetError: no weight has an entry below ``threshold``; weights have no values yet, or are quantised.

    >>> from torch import nn, ones, tensor, allclose
    >>> from lightning_peft import inject
    >>> base = nn.Sequential(nn.Linear(3, 2, bias=False))
    >>> base[0].weight.data = tensor([[1.0, -0.1, 2.0], [0.0, 3.0, -0.3]])
    >>> sara = inject(base, SaRA(threshold=0.2))[0].adapters["default"]
    >>> sara.values.data = tensor([10.0, 20.0])
    >>> base(ones(1, 3)).tolist()  # 1 - 0.1 + 10 + 2, and 0 + 20 + 3 - 0.3
    [[12.899999618530273, 22.700000762939453]]
    """

    paper: ClassVar[str] = "arXiv:2409.06633"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": Entries, "conv": EntriesConv}

    target_modules: Patterns = "all-layers"
    share: Share = 0.2
    threshold: Positive | None = None
    reselect: Share | None = 0.5
    lowrank_weight: NonNegative = 0.0

    def targets(self, model: nn.Module) -> list[Target]:
        """The chosen weights that have entries to train."""
        found, before = super().targets(model), 0
        for target in found:
            weight = target.site.get(target.module)[0]
            if weight.is_meta or in_codes(target.module, target.site):
                empty = "it has no values yet to choose from. Load the weights first."
                why = empty if weight.is_meta else f"{in_codes_because(target.module, target.site)} {CALL_IT}"
                raise TargetError(f"SaRA on {target.name!r}: {why}")
        while before != len(found):  # without weights that have none, theta is another
            before, places = len(found), self.chosen(found)
            found = [target for target, chosen in zip(found, places, strict=True) if len(chosen)]
        if not found:
            raise TargetError(f"SaRA: no entry is below threshold={self.threshold}. Raise it, or give a share instead.")
        return found

    def theta(self, weights: list[Tensor]) -> Tensor:
        """What the absolute values of trained entries are below, in float32."""
        return below_smallest(weights, self.share) if self.threshold is None else torch.tensor(self.threshold)

    def chosen(self, targets: list[Target]) -> list[Tensor]:
        """The places of the trained entries of each of ``targets``."""
        weights = [whole(target.site.get(target.module)[0]).detach() for target in targets]
        theta = self.theta(weights) if weights else torch.empty(())
        return [(w.float().abs() < theta.to(w.device)).flatten().nonzero().squeeze(1) for w in weights]

    def adapters(self, targets: list[Target]) -> list[Adapter]:
        """Changes of the entries below theta."""
        places = self.chosen(targets)
        return [self.adapter_types[t.site.kind](t, p) for t, p in zip(targets, places, strict=True)]

    def initial_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Whether the new choice was made."""
        return {} if self.reselect is None else {"reselected": torch.zeros(())}

    @torch.no_grad()
    def on_train_batch_start(self, training: Training) -> None:
        """Hold the entries that have grown, once."""
        due = self.reselect is not None and training.step >= int(self.reselect * training.run_length())
        if due and not training.state["reselected"]:
            training.state["reselected"].fill_(1)
            entries = _entries(training)
            theta = self.theta([weight for weight, _ in entries])
            for weight, adapter in entries:
                adapter.hold(adapter.current(weight).float().abs() >= theta.to(weight.device))

    def on_before_optimizer_step(self, training: Training) -> None:
        """Held entries have no gradient."""
        for _, _, adapter in training.adapters() if training.state.get("reselected") else ():
            adapter.before_step()

    def on_after_optimizer_step(self, training: Training) -> None:
        """Held entries keep their values."""
        for _, _, adapter in training.adapters():
            adapter.after_step()

    def penalties(self, training: Training) -> dict[str, Tensor]:
        """lowrank_weight * ||(W + D) . M||_* of one matrix, the same on all devices."""
        entries = _entries(training) if self.lowrank_weight else []
        entries = [(w, a) for w, a in entries if w.dim() == 2 and min(w.shape) > _MIN_SIZE]
        drawn = random.Random(training.step).choice(entries) if entries else None
        if drawn is None or (~drawn[1].held).sum() < _MIN_ENTRIES:
            return {}
        return {"lowrank": self.lowrank_weight * torch.linalg.matrix_norm(drawn[1].trained(drawn[0]), "nuc")}

    def num_trainable(self, target: Target) -> int:
        """n, with a theta of its own."""
        return self.total_trainable([target])

    def total_trainable(self, targets: list[Target]) -> int:
        """Entries below the common theta."""
        return sum(map(len, self.chosen(targets)))

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """A share, of which some are held later; and a threshold, beside a head."""
        return cls(share=0.5), cls(threshold=0.2, reselect=None, modules_to_save="head")


def _entries(training: Training) -> list[tuple[Tensor, Entries]]:
    return [(whole(a.site.get(module)[0]).detach(), a) for _, module, a in training.adapters()]
