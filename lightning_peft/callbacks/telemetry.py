"""What the layers of an adapted model do while they train: numbers for any logger, and a picture of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from lightning_peft.adapters.low_rank import LowRank
from lightning_peft.engine import AdapterError, TargetError, adapters_of
from lightning_peft.engine.record import record_of
from lightning_peft.engine.targets import is_below
from lightning_peft.parts.blocks import find_blocks

PREFIX = "peft"
# name in the log -> title in the picture
QUANTITIES = {
    "delta_norm": "norm of the change",
    "update_share": "share of the change",
    "grad_norm": "norm of the gradient",
    "trains": "trains (1) or is frozen (0)",
    "effective_rank": "effective rank of the change",
}


class Telemetry:
    """Measures the layers of a model: its blocks, and modules outside of them.

    Parameters that are trained in place without a copy of the base are compared with a copy in main memory that is
    made here, when training starts.

    Args:
        root: the module that was given to `inject`.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        try:
            self.blocks = find_blocks(root)
        except TargetError:
            self.blocks = []
        self.before: dict[str, Tensor] = {}
        for injection in record_of(root).injections.values():
            for name, base in injection.in_place.items():
                self.before[name] = root.get_parameter(name).detach().to("cpu", copy=True) if base is None else base

    def layer_of(self, module: str) -> str:
        """The block that ``module`` is in, or else itself."""
        return next((block for block in self.blocks if is_below(module, block)), module)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """``"delta_norm/<layer>"`` and so on -> value, of each layer with something that may train."""
        squares: dict[str, dict[str, float]] = {quantity: {} for quantity in ("delta_norm", "grad_norm")}
        trains: dict[str, float] = {}
        ranks: dict[str, list[float]] = {}
        for layer, delta in self._deltas():
            squares["delta_norm"][layer] = squares["delta_norm"].get(layer, 0.0) + delta.float().square().sum().item()
        for layer, parameter in self._parameters():
            trains[layer] = max(trains.get(layer, 0.0), float(parameter.requires_grad))
            grad = 0.0 if parameter.grad is None else parameter.grad.float().square().sum().item()
            squares["grad_norm"][layer] = squares["grad_norm"].get(layer, 0.0) + grad
        for path, _, adapter in adapters_of(self.root):
            if isinstance(adapter, LowRank):
                ranks.setdefault(self.layer_of(path), []).append(effective_rank(adapter))
        total = sum(squares["delta_norm"].values()) or 1.0
        found = {f"{what}/{layer}": value**0.5 for what, of in squares.items() for layer, value in of.items()}
        found |= {f"update_share/{layer}": value / total for layer, value in squares["delta_norm"].items()}
        found |= {f"trains/{layer}": value for layer, value in trains.items()}
        return found | {f"effective_rank/{layer}": sum(values) / len(values) for layer, values in ranks.items()}

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for path, _, adapter in adapters_of(self.root):
            for parameter in adapter.parameters():
                yield self.layer_of(path), parameter
        for name in self.before:
            yield self.layer_of(name.rpartition(".")[0]), self.root.get_parameter(name)

    def _deltas(self) -> Iterator[tuple[str, Tensor]]:
        for path, module, adapter in adapters_of(self.root):
            if adapter.changes_weights:
                weight, bias = adapter.site.get(module)
                new_weight, new_bias = adapter.merged(weight, bias)
                yield self.layer_of(path), new_weight - weight
                if new_bias is not None:
                    yield self.layer_of(path), new_bias if bias is None else new_bias - bias
        for name, base in self.before.items():
            parameter = self.root.get_parameter(name)
            yield self.layer_of(name.rpartition(".")[0]), parameter - base.to(parameter.device)


@torch.no_grad()
def effective_rank(adapter: LowRank) -> float:
    """Exponential of the entropy of the singular values of a low-rank change, as shares; 0 while the change is zero.

    Between 1 and its rank: how many directions the change really uses (Roy and Vetterli, 2007).
    """
    # the singular values of B A are those of R_B R_A^T, of size r x r
    down, up = adapter.whole_factors()
    R_B = torch.linalg.qr(up.float()).R
    R_A = torch.linalg.qr(down.float().flatten(1).T).R
    small = R_B @ R_A.T
    if not small.isfinite().all():  # a run that diverges still shows where
        return float("nan")
    values = torch.linalg.svdvals(small)
    if values[0] <= 1e-6 * R_B.norm() * R_A.norm():  # what is left where two equal products are taken off each other
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


class TelemetryPicture(L.Callback):
    """Draws what ``PEFT(telemetry=True)`` logs, layer by layer over the steps, when ``fit`` ends.

    Args:
        path: the picture to write; the ending says the format. Needs matplotlib.

    Raises:
        AdapterError: nothing was logged: there is no ``PEFT(telemetry=True)``.
    """

    def __init__(self, path: str = "peft_telemetry.png") -> None:
        self.path = path
        self.steps: list[int] = []
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Gather what was logged with this step."""
        logged = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith(f"{PREFIX}/")}
        if logged and (not self.rows or logged != self.rows[-1]):
            self.steps.append(trainer.global_step)
            self.rows.append(logged)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw."""
        if not self.rows:
            raise AdapterError(
                "TelemetryPicture: there is nothing to draw. Let PEFT log it: PEFT(method, telemetry=True)."
            )
        self._draw()

    @rank_zero_only
    def _draw(self) -> None:
        from matplotlib.figure import Figure

        keys = [key.split("/", 2)[1:] for key in self.rows[-1]]
        quantities = [quantity for quantity in QUANTITIES if any(what == quantity for what, _ in keys)]
        layers = list(dict.fromkeys(layer for _, layer in keys))
        height = 1.5 + 0.22 * len(layers)
        figure = Figure(figsize=(4.2 * len(quantities), height), layout="constrained")
        for i, (axes, quantity) in enumerate(
            zip(figure.subplots(1, len(quantities), squeeze=False)[0], quantities, strict=True)
        ):
            values = [[row.get(f"{PREFIX}/{quantity}/{layer}", torch.nan) for row in self.rows] for layer in layers]
            image = axes.imshow(values, aspect="auto", interpolation="nearest")
            axes.set_title(QUANTITIES[quantity], fontsize=10)
            axes.set_xlabel("optimizer step")
            marks = sorted({0, len(self.steps) // 2, len(self.steps) - 1})
            axes.set_xticks(marks, [str(self.steps[m]) for m in marks])
            axes.set_yticks(range(len(layers)), layers if i == 0 else [], fontsize=8)
            figure.colorbar(image, ax=axes)
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.path, dpi=120)
