"""Pictures while a generative model trains."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.interop.files import replacing

_VISIBLE = 48  # pixels along a side, below which pictures are enlarged


class SampleImages(L.Callback):
    """Writes a grid of generated pictures after training epochs, and hands it to the loggers that take pictures.

    The module has a method ``sample(**arguments)`` that answers with images (N, C, H, W) from -1 to 1, as
    `lightning_peft.recipes.Denoiser` has. It is asked during validation, where averaging callbacks such as
    ``EMAWeightAveraging`` have put their weights in; at the end of the epoch in runs without validation.

    Files are ``epoch_0000.png`` and so on; TensorBoard, Weights & Biases and others get the picture ``samples``.

    Args:
        arguments: of ``sample``; by default it is called without any.
        folder: where the files go; by default ``samples`` in the trainer's ``default_root_dir``.
        every_n_epochs: how often.
        columns: pictures in a row.

    Raises:
        TypeError: when training starts, the module has no method ``sample``.
        ValueError: ``sample`` answered with something else than images.
    """

    def __init__(
        self,
        arguments: dict[str, Any] | None = None,
        *,
        folder: str | Path | None = None,
        every_n_epochs: int = 1,
        columns: int = 8,
    ) -> None:
        self.arguments, self.folder = arguments or {}, folder
        self.every_n_epochs, self.columns = every_n_epochs, columns
        self._written = -1

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not callable(getattr(pl_module, "sample", None)):
            raise TypeError(
                f"SampleImages: {type(pl_module).__name__} has no method sample() that answers with images (N, C, H, W)"
                " from -1 to 1. Add one, or leave the callback out."
            )

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        # not when the validation epoch starts or ends: by then an averaging callback may not have put its weights in
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._write(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.enable_validation:
            self._write(trainer, pl_module)

    def _write(self, trainer: L.Trainer, module: Any) -> None:
        epoch = trainer.current_epoch
        if epoch == self._written or (epoch + 1) % self.every_n_epochs:
            return
        self._written = epoch
        images = module.sample(**self.arguments)  # on all ranks: the model may be sharded
        if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"SampleImages: {type(module).__name__}.sample() answers with images (N, 1 or 3, H, W), got "
                f"{tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__}."
            )
        if trainer.is_global_zero:
            pixels = image_grid(images, self.columns)
            folder = Path(self.folder or Path(trainer.default_root_dir) / "samples")
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / f"epoch_{epoch:04d}.png") as file:
                to_pil(pixels).save(file, format="png")
            for logger in trainer.loggers:
                _log(logger, pixels, trainer.global_step)


def image_grid(images: Tensor, columns: int = 8) -> Tensor:
    """(N, 1 or 3, H, W) from -1 to 1 as one picture (3, height, width) of bytes, small images enlarged."""
    zoom = max(1, -(-_VISIBLE // images.shape[-1]))
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = pixels.expand(-1, 3, -1, -1).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    pixels = F.pad(pixels, (1, 1, 1, 1), value=128)
    columns = min(columns, len(pixels))
    missing = -len(pixels) % columns
    pixels = torch.cat([pixels, pixels.new_full((missing, *pixels.shape[1:]), 128)])
    rows = [torch.cat(list(row), dim=2) for row in pixels.split(columns)]
    return torch.cat(rows, dim=1)


def to_pil(pixels: Tensor) -> Any:
    """(3, H, W) bytes as a picture of Pillow."""
    from PIL import Image

    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _log(logger: Any, pixels: Tensor, step: int) -> None:
    """To a logger that takes pictures; others get none."""
    if hasattr(logger, "log_image"):  # Weights & Biases and others
        logger.log_image(key="samples", images=[to_pil(pixels)], step=step)
    elif hasattr(getattr(logger, "experiment", None), "add_image"):  # TensorBoard
        logger.experiment.add_image("samples", pixels, step)
