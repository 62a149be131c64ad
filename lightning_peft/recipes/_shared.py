"""What the recipes share: optional imports, the optimizer policy, loaders over three splits."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset


def require(module: str, *, extra: str) -> ModuleType:
    """Import a library that only the extra ``extra`` installs, when it is first needed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{module} cannot be imported ({error}): pip install "lightning_peft[{extra}]"') from error


def located(name: str) -> str:
    """Where weights lie: ``"package:NAME/FOLDER"`` is a folder of an installed package, which is not imported."""
    if not name.startswith("package:"):
        return name
    package, _, folder = name.removeprefix("package:").partition("/")
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ValueError(f"{name!r}: there is no package {package!r} here. Install it, or give a folder or a hub name.")
    return str(Path(found.origin).parent / folder)


def from_transformers(
    who: str, auto: str, *, pretrained: str | None, config: dict[str, Any] | None, example: str
) -> Any:
    """A model of transformers in training mode, by its class ``auto``: pre-trained, or with random weights.

    Raises:
        ValueError: not exactly one of ``pretrained`` and ``config`` is given, ``config`` has no ``model_type``, or the
            package that ``pretrained`` names is not installed.
    """
    if (pretrained is None) == (config is None):
        raise ValueError(f"{who}: give either pretrained or config, got {pretrained!r} and {config}.")
    if config is not None and "model_type" not in config:
        raise ValueError(f"{who}: config needs a model_type such as {example!r}, got {sorted(config)}.")
    transformers = require("transformers", extra="text")
    factory = getattr(transformers, auto)
    if config is not None:
        return factory.from_config(transformers.AutoConfig.for_model(**config))
    return factory.from_pretrained(located(str(pretrained))).train()  # transformers loads for evaluation


def adamw_cosine(module: L.LightningModule, *, lr: float, weight_decay: float) -> OptimizerLRScheduler:
    """AdamW over the parameters that require grad; the rate falls along half a cosine to zero at the last step.

    Training without an end (neither ``max_epochs`` nor ``max_steps``) keeps the rate constant.
    """
    steps = module.trainer.estimated_stepping_batches
    optimizer = AdamW((p for p in module.parameters() if p.requires_grad), lr=lr, weight_decay=weight_decay)
    schedule = LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * min(step / steps, 1))) / 2)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class SplitData(L.LightningDataModule):
    """Loaders over ``splits["train"]``, ``["val"]`` and ``["test"]``, which the ``setup`` of a subclass fills in."""

    splits: dict[str, Dataset[Any]]
    collate_fn: Callable[[list[Any]], Any] | None = None  # torch's own

    def __init__(self, *, batch_size: int, val_fraction: float = 0.1, seed: int, num_workers: int) -> None:
        super().__init__()
        if not 0 < val_fraction < 0.5:
            raise ValueError(
                f"{type(self).__name__}: val_fraction must be a number in (0, 0.5), got {val_fraction!r}. "
                "The test split takes as much as the validation split, the rest is for training."
            )
        self.batch_size, self.val_fraction, self.seed, self.num_workers = batch_size, val_fraction, seed, num_workers

    def _loader(self, split: str) -> DataLoader[Any]:
        # a private generator: the order of the batches depends on the seed and on nothing drawn elsewhere
        return DataLoader(
            self.splits[split],
            batch_size=self.batch_size,
            shuffle=split == "train",
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")
