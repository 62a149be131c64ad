"""A LightningModule that builds its model where it is told to, and data that it can learn."""

from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft.engine import Method
from tests.methods.backbones import TinyBlocks, TinyConditioned


class Lit(L.LightningModule):
    """Two linear layers with a BatchNorm, dropout and a head; built in ``where``."""

    def __init__(self, where: str = "__init__", lr: float = 0.02) -> None:
        super().__init__()
        self.save_hyperparameters()
        self._build("__init__")

    def _build(self, where: str) -> None:
        if where == self.hparams["where"] and not hasattr(self, "net"):
            with torch.random.fork_rng():
                torch.manual_seed(1)  # the pre-trained weights: the same whenever it is built
                self.net = nn.ModuleDict(
                    {
                        "q_proj": nn.Linear(7, 11),
                        "v_proj": nn.Linear(11, 5, bias=False),
                        "norm": nn.BatchNorm1d(5),
                        "dropout": nn.Dropout(0.1),
                        "head": nn.Linear(5, 3),
                    }
                )

    def setup(self, stage: str) -> None:
        self._build("setup")

    def forward(self, x: Tensor) -> Tensor:
        net = self.net
        return net["head"](net["dropout"](net["norm"](net["v_proj"](torch.tanh(net["q_proj"](x))))))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])


class LitBlocks(Lit):
    """For methods on blocks: thirteen tokens are made of a sample, and the answers to them averaged."""

    net_class: ClassVar[type[nn.Module]] = TinyBlocks

    def _build(self, where: str) -> None:
        if where == self.hparams["where"] and not hasattr(self, "net"):
            with torch.random.fork_rng():
                torch.manual_seed(1)
                self.net = self.net_class()  # type: ignore[assignment]
            self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        scales = torch.linspace(0.5, 1.5, 13, dtype=x.dtype, device=x.device)
        return self.dropout(self.net(x[:, None] * scales[:, None])).mean(1)


class LitConditioned(LitBlocks):
    """The same for methods on a condition."""

    net_class = TinyConditioned


def lit_for(method: Method) -> type[Lit]:
    """The module that the examples of ``method`` are for."""
    return {"layers": Lit, "blocks": LitBlocks, "condition": LitConditioned}[method.acts_on]


class LitConfigured(Lit):
    """The same with ``configure_model`` overridden, whether or not it builds anything."""

    def configure_model(self) -> None:
        self._build("configure_model")


class LitInTwo(Lit):
    """The backbone in ``__init__``, the head in ``configure_model``."""

    def __init__(self, where: str = "__init__", lr: float = 0.02) -> None:
        super().__init__(where, lr)
        del self.net["head"]

    def configure_model(self) -> None:
        if "head" not in self.net:
            with torch.random.fork_rng():
                torch.manual_seed(2)
                self.net["late_proj"] = nn.Linear(5, 5)
                self.net["head"] = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        net = self.net
        return net["head"](net["late_proj"](net["v_proj"](torch.tanh(net["q_proj"](x)))))


def loader(n: int = 48) -> DataLoader:
    """Three classes that a linear map of the input tells apart; never shuffled, so that runs can be compared."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 7, generator=generator)
    return DataLoader(TensorDataset(x, (x @ torch.randn(7, 3, generator=generator)).argmax(1)), batch_size=8)


def trainer(folder: Any, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    """A quiet Trainer on the CPU."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    defaults = {"max_epochs": 2, "enable_checkpointing": False, "default_root_dir": folder, **quiet}
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **kwargs})


class StopAfterAnEpoch(L.Callback):
    """Ends a run before its time: how long it was to be stays known."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = True
