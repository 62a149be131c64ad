"""GaLore: train all weights, but step in a low-rank subspace of their gradients.

Paper:    Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", 2024,
          arXiv:2403.03507.
Formula:  W <- (1 - lr * weight_decay) W - lr * scale * step(G P^T) P  for d_out >= d_in,  else  ... P step(P^T G);
          step is that of the user's optimizer, whose moments have the small shape;
          P: the first r singular vectors of the gradient G, taken anew every update_proj_gap steps
Shapes:   G, W (d_out, d_in); P (r, d_in) or (d_out, r)
Init:     the model as it is; y starts as the base
Merge:    nothing to do: the change is folded into W after each step, and no copy of the base is kept
Schedule: the full gradient G is made every update_proj_gap steps only; moments stay when P changes
Cost:     every `update_proj_gap` steps, whole gradients and a decomposition of each
Deviates from the paper: between two changes of P the gradient is made in its projected form at once.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import nn

from lightning_peft.adapters.projected import Projected, projected
from lightning_peft.engine import Adapter, Kind, Method, Target, Training, register, select_parameters, select_targets
from lightning_peft.engine.limits import Count, Patterns, Positive


@register("galore")
@dataclass(frozen=True, kw_only=True)
class GaLore(Method):
    """Training of all parameters, with the gradients and moments of the chosen layers projected to ``r`` directions.

    Weight decay acts on the whole of W and apart from the gradient, as in AdamW, whatever the optimizer.

    Args:
        r: directions for each layer; a layer that has fewer is not projected.
        update_proj_gap: optimizer steps until new directions are taken.
        scale: factor of the learning rate of projected layers.
        target_modules: patterns of the linear layers that are projected; everything else trains as usual.
        exclude_modules: patterns of layers that are not projected.

    Raises:
        AdapterError: an argument is out of range.
        TargetError: a pattern matches nothing.

    >>> from torch import nn
    >>> from lightning_peft import inject
    >>> model = inject(nn.Sequential(nn.Linear(8, 4)), GaLore(r=2))
    >>> [tuple(p.shape) for p in model[0].adapters.parameters()]  # where the optimizer keeps its moments
    [(2, 8)]
    """

    paper: ClassVar[str] = "arXiv:2403.03507"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": Projected}
    keeps_base: ClassVar[bool] = False
    switches: ClassVar[bool] = True

    r: Count = 128
    update_proj_gap: Count = 200
    scale: Positive = 1.0
    target_modules: Patterns = "all-linear"
    exclude_modules: Patterns = ()

    def targets(self, model: nn.Module) -> list[Target]:
        """The layers chosen by ``target_modules``."""
        who = type(self).__name__
        kinds = tuple(self.adapter_types)
        return select_targets(model, kinds, self.target_modules, exclude_modules=self.exclude_modules, who=who)

    def adapter(self, target: Target) -> Adapter:
        """Directions, and the coordinates along them."""
        return Projected(target, min(self.r, target.d_in, target.d_out))

    def trained_in_place(self, model: nn.Module) -> list[str]:
        """Every parameter of the base."""
        return select_parameters(model, "all-layers", who=type(self).__name__)

    def due(self, training: Training) -> bool:
        """Whether it is time for new directions, or was in a step whose gradients were not finite."""
        missed = any(adapter.missed and adapter.coordinates.requires_grad for _, adapter, _ in projected(training))
        return missed or training.step % self.update_proj_gap == 0

    def on_train_batch_start(self, training: Training) -> None:
        """Ask for the full gradients if new directions are due."""
        due = self.due(training)
        if training.is_new(due):
            for weight, _, _ in projected(training):
                weight.requires_grad_(due)

    def on_before_optimizer_step(self, training: Training) -> None:
        """Take new directions from the full gradients that are there."""
        for weight, adapter, transposed in projected(training):
            if weight.grad is not None:
                gradient = weight.grad.T if transposed else weight.grad
                adapter.missed = not gradient.isfinite().all()  # then the loss scaler passes over this step
                if not adapter.missed:
                    adapter.turn_to(gradient)
                weight.grad = None

    def on_after_optimizer_step(self, training: Training) -> None:
        """Fold the step into the weights."""
        groups = {id(p): g for o in training.optimizers for g in o.param_groups for p in g["params"]}
        for weight, adapter, transposed in projected(training):
            group = groups.get(id(weight), {})
            if adapter.coordinates.requires_grad:
                raw = weight.detach()
                raw.mul_(1 - float(group.get("lr", 0)) * group.get("weight_decay", 0))
                adapter.fold(raw.T if transposed else raw, self.scale)

    def num_trainable(self, target: Target) -> int:
        """r * max(d_in, d_out), beside the weights themselves."""
        return min(self.r, target.d_in, target.d_out) * max(target.d_in, target.d_out)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """New directions often, and seldom for one layer alone."""
        return cls(r=2, update_proj_gap=2), cls(r=1, update_proj_gap=3, scale=0.25, target_modules="v_proj")
