"""Image classification: any timm model, and scikit-learn's handwritten digits to try it on without a download."""

import json
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft.recipes._shared import SplitData, adamw_cosine, require


class ImageClassifier(L.LightningModule):
    """Any timm model by name, trained with cross entropy; batches are (images (B, C, H, W), labels (B,)).

    Logs ``train_loss``, ``val_loss``, ``val_acc`` and ``test_acc``, each averaged over the images of an epoch.

    Args:
        model_name: name in ``timm.list_models()``.
        num_classes: width of the head.
        model_kwargs: further arguments of ``timm.create_model``, such as ``img_size`` or ``in_chans``.
        pretrained: start from the weights that timm has online for this name.
        checkpoint: start from this ``.safetensors`` file; a head with another number of classes is replaced by a
            fresh one. The file is read again by ``load_from_checkpoint``.
        lr: highest learning rate of AdamW; it falls along a cosine to zero.
        weight_decay: decoupled weight decay of AdamW.

    Raises:
        FileNotFoundError: ``checkpoint`` does not exist.
        ValueError: ``checkpoint`` does not fit the model, or was given together with ``pretrained``.
    """

    def __init__(
        self,
        *,
        model_name: str,
        num_classes: int,
        model_kwargs: dict[str, Any] | None = None,
        pretrained: bool = False,
        checkpoint: str | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        kwargs = model_kwargs or {}
        if checkpoint is None:
            timm = require("timm", extra="vision")
            self.model = timm.create_model(model_name, pretrained=pretrained, num_classes=num_classes, **kwargs)
        elif pretrained:
            raise ValueError("ImageClassifier: pretrained and checkpoint are two sources of weights, give one of them.")
        else:
            self.model = _load(checkpoint, model_name, num_classes, kwargs)
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)  # (B, num_classes)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.val_acc(logits, labels)
        self.log("val_loss", F.cross_entropy(logits, labels), batch_size=len(labels))
        self.log("val_acc", self.val_acc, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.test_acc(self(images), labels)
        self.log("test_acc", self.test_acc)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return adamw_cosine(self, lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"])


def _load(checkpoint: str, model_name: str, num_classes: int, model_kwargs: dict[str, Any]) -> nn.Module:
    """Build the model of the file, load every tensor strictly, and only then give it a head of the wanted size."""
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(
            f"ImageClassifier: there is no file {checkpoint!r}. Relative paths start at {str(Path.cwd())!r}."
        )
    timm = require("timm", extra="vision")
    try:
        config = timm.get_pretrained_cfg(model_name) or timm.models.PretrainedCfg()
        head = config.classifier if isinstance(config.classifier, str) else next(iter(config.classifier or ()), None)
        with safe_open(checkpoint, "pt") as file:
            names = set(file.keys())
            shape = file.get_slice(f"{head}.weight").get_shape() if f"{head}.weight" in names else [0]
            trained = json.loads((file.metadata() or {}).get("model_kwargs", "{}"))
        source = {
            "file": checkpoint,
            "custom_load": False,
            "num_classes": shape[0],
            # timm sums or repeats the filters of the first layer when the model has another number of channels
            "input_size": (trained.get("in_chans", 3), *config.input_size[1:]),
        }
        model = timm.create_model(
            model_name, pretrained=True, pretrained_cfg_overlay=source, num_classes=shape[0], **model_kwargs
        )
    except (RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"ImageClassifier: {checkpoint!r} does not fit model_name={model_name!r} with model_kwargs={model_kwargs}. "
            f"Use the name and the arguments that it was trained with. {error}"
        ) from error
    if num_classes != shape[0]:
        model.reset_classifier(num_classes)
    return model


class DigitsData(SplitData):
    """scikit-learn's 1797 handwritten digits as normalised (1, 8, 8) images, split with equal shares of each class.

    The label is the digit itself, whichever ``digits`` are chosen.

    Args:
        digits: the classes to keep.
        half: which half of the images; the two halves share none, so that one can serve pre-training and the
            other adaptation.
        invert: exchange ink and paper.
        rotate: degrees counterclockwise, a multiple of 90.
        size: pixels along a side; other sizes than 8 are interpolated.
        thick: let the ink run over the next pixel on each side.
        signed: pixels from -1 (paper) to 1 (ink), in place of mean 0 and deviation 1.
        batch_size: images per step.
        val_fraction: share of the validation split; the test split takes as much again.
        seed: decides the split and the order of the training images.
        num_workers: processes that load batches.

    Raises:
        ValueError: an argument is outside the range above.
    """

    def __init__(
        self,
        *,
        digits: tuple[int, ...] = tuple(range(10)),
        half: Literal["first", "second", "all"] = "all",
        invert: bool = False,
        rotate: int = 0,
        size: int = 8,
        thick: bool = False,
        signed: bool = False,
        batch_size: int = 64,
        val_fraction: float = 0.15,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, val_fraction=val_fraction, seed=seed, num_workers=num_workers)
        if not digits or len(set(digits)) < len(digits) or not set(digits) <= set(range(10)):
            raise ValueError(f"DigitsData: digits must be different numbers from 0 to 9, got {digits!r}.")
        if half not in ("first", "second", "all"):
            raise ValueError(f"DigitsData: half must be one of 'first', 'second', 'all', got {half!r}.")
        if rotate % 90:
            raise ValueError(f"DigitsData: rotate must be a multiple of 90 degrees, got {rotate!r}.")
        self.digits, self.half, self.invert, self.rotate = tuple(digits), half, invert, rotate
        self.size, self.thick, self.signed = size, thick, signed

    def setup(self, stage: str | None = None) -> None:
        require("sklearn", extra="vision")
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        bunch = load_digits()
        middle = len(bunch.target) // 2
        keep = slice({"second": middle}.get(self.half, 0), {"first": middle}.get(self.half))
        pixels, labels = torch.from_numpy(bunch.images[keep]).float(), torch.from_numpy(bunch.target[keep]).long()
        chosen = torch.isin(labels, torch.tensor(self.digits))
        images, labels = self._looks(pixels[chosen] / 16), labels[chosen]

        held_out = round(self.val_fraction * len(labels))
        rest, test = train_test_split(
            torch.arange(len(labels)), test_size=held_out, stratify=labels, random_state=self.seed
        )
        train, val = train_test_split(rest, test_size=held_out, stratify=labels[rest], random_state=self.seed)
        self.splits = {
            name: TensorDataset(images[index], labels[index])
            for name, index in {"train": train, "val": val, "test": test}.items()
        }

    def _looks(self, ink: Tensor) -> Tensor:
        """Turn ink from 0 to 1 (N, 8, 8) into images (N, 1, size, size)."""
        ink = ink.unsqueeze(1)
        if self.size != 8:
            ink = F.interpolate(ink, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        ink = F.max_pool2d(ink, 3, stride=1, padding=1) if self.thick else ink
        ink = torch.rot90(1 - ink if self.invert else ink, self.rotate // 90, (-2, -1))
        # the mean and the deviation of upright ink on paper
        return 2 * ink - 1 if self.signed else (ink - 0.305) / 0.376
