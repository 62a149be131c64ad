"""Diffusion and flow matching: any denoiser of diffusers, and pictures that packages ship to try it on."""

import inspect
from collections.abc import Sequence
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_peft.recipes._shared import SplitData, adamw_cosine, require

Scheduler = Literal["DDPMScheduler", "FlowMatchEulerDiscreteScheduler"]


class Denoiser(L.LightningModule):
    """A model of diffusers that learns to take noise off; batches are (images (B, C, H, W) from -1 to 1, labels (B,)).

    It is told the label as it takes conditions: as a class (UNet2DModel with ``num_class_embeds``,
    DiTTransformer2DModel), or as text of two tokens, a begin and the label, one-hot (UNet2DConditionModel,
    SD3Transformer2DModel). "No class", which guidance needs, is number ``num_classes``.

    Logs ``train_loss`` and ``val_loss``, the mean squared error; that of validation is for the same noise each time.

    Args:
        num_classes: labels are 0 to ``num_classes`` - 1.
        model: class name in diffusers, for a fresh model.
        model_kwargs: its arguments.
        pretrained: start from this folder or hub name, whichever class it is, in place of ``model``.
        scheduler: what noise is and what the model predicts: DDPMScheduler for diffusion,
            FlowMatchEulerDiscreteScheduler for flow matching.
        scheduler_kwargs: its arguments, such as ``prediction_type``.
        label_dropout: share of training images whose class is not told; models that drop labels by themselves (DiT)
            do it beside.
        sampling_steps: steps of `sample`; diffusion takes them by DDIM.
        guidance_scale: of `sample`; 1 is none.
        lr: highest learning rate of AdamW; it falls along a cosine to zero.
        weight_decay: decoupled weight decay of AdamW.

    Raises:
        ValueError: not one of ``model`` and ``pretrained`` is given, or the model is not known, takes no condition, or
            has no room for the classes.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        model: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        pretrained: str | None = None,
        scheduler: Scheduler = "DDPMScheduler",
        scheduler_kwargs: dict[str, Any] | None = None,
        label_dropout: float = 0.1,
        sampling_steps: int = 25,
        guidance_scale: float = 2.0,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if (model is None) == (pretrained is None):
            raise ValueError(f"Denoiser: give either model or pretrained, got {model!r} and {pretrained!r}.")
        diffusers = require("diffusers", extra="diffusion")
        if model is not None and not hasattr(diffusers, model):
            raise ValueError(
                f"Denoiser: diffusers has no class {model!r}. Take one such as UNet2DModel, or pretrained."
            )
        self.num_classes = num_classes
        self.model: Any = (
            diffusers.AutoModel.from_pretrained(pretrained)
            if model is None
            else getattr(diffusers, model)(**model_kwargs or {})
        )
        self.model.train()  # diffusers loads for evaluation, where DiT drops no labels
        self.scheduler: Any = getattr(diffusers, scheduler)(**scheduler_kwargs or {})
        # asked before anything is injected: an adapted model takes any argument
        self._conditions = _conditions(self.model, num_classes)

    def image_embeds(self, images: Tensor) -> Tensor | None:
        """Override it to show images (B, C, H, W) to the model beside the label, as (B, D); with ``IPAdapter``, say."""
        return None

    def forward(self, noisy: Tensor, timesteps: Tensor, labels: Tensor, embeds: Tensor | None = None) -> Tensor:
        """The prediction (B, C, H, W) for ``noisy`` at ``timesteps`` (B,); without a class no image is shown."""
        conditions: dict[str, Any] = {
            name: _one_hot(labels, *shape, noisy.dtype) for name, shape in self._conditions.items()
        }
        if embeds is not None:
            shown = (labels < self.num_classes).view(-1, 1) * embeds
            conditions["added_cond_kwargs"] = {"image_embeds": shown.to(noisy.dtype)}
        prediction = self.model(noisy, timestep=timesteps, **conditions).sample
        return prediction[:, : noisy.shape[1]]  # some predict their variance beside it

    def noised(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(noisy images, time steps (B,), what the model has to predict) for random noise and times."""
        device = images.device
        drawn: dict[str, Any] = {"generator": generator, "device": generator.device if generator else device}
        noise = torch.randn(images.shape, **drawn).to(images)
        steps = torch.randint(self.scheduler.config.num_train_timesteps, (len(images),), **drawn).cpu()
        if hasattr(self.scheduler, "sigmas"):  # flow matching
            sigmas = self.scheduler.sigmas[steps].to(device, images.dtype).view(-1, 1, 1, 1)
            noisy = sigmas * noise + (1 - sigmas) * images
            return noisy, self.scheduler.timesteps[steps].to(device), noise - images
        steps = steps.to(device)
        noisy = self.scheduler.add_noise(images, noise, steps)
        targets = {
            "epsilon": lambda: noise,
            "sample": lambda: images,
            "v_prediction": lambda: self.scheduler.get_velocity(images, noise, steps),
        }
        return noisy, steps, targets[self.scheduler.config.prediction_type]()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        dropped = torch.rand(len(labels), device=labels.device) < self.hparams["label_dropout"]
        noisy, timesteps, target = self.noised(images)
        labels = labels.masked_fill(dropped, self.num_classes)
        loss = F.mse_loss(self(noisy, timesteps, labels, self.image_embeds(images)), target)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        noisy, timesteps, target = self.noised(images, torch.Generator().manual_seed(batch_idx))
        loss = F.mse_loss(self(noisy, timesteps, labels, self.image_embeds(images)), target)
        self.log("val_loss", loss, prog_bar=True, batch_size=len(labels))

    @torch.no_grad()
    def sample(
        self, labels: Sequence[int] | Tensor | None = None, *, images: Tensor | None = None, seed: int = 0
    ) -> Tensor:
        """Pictures (B, C, H, W) from -1 to 1.

        Args:
            labels: their classes; eight of each by default.
            images: (B, C, H, W), shown to the model by `image_embeds`.
            seed: of the noise that they are made of.
        """
        given = [label for label in range(self.num_classes) for _ in range(8)] if labels is None else labels
        classes = torch.as_tensor(given, device=self.device)
        config, scale = self.model.config, self.hparams["guidance_scale"]
        shape = (len(classes), config.in_channels, config.sample_size, config.sample_size)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device, self.model.dtype)
        scheduler, embeds = self._sampler(), None if images is None else self.image_embeds(images.to(x))
        embeds = None if embeds is None else torch.cat([embeds, embeds])
        was_training = self.training
        self.eval()
        try:
            for t in scheduler.timesteps.to(self.device):
                both = torch.cat([torch.full_like(classes, self.num_classes), classes])
                without, with_class = self(torch.cat([x, x]), t.expand(len(both)), both, embeds).chunk(2)
                x = scheduler.step(without + scale * (with_class - without), t, x, return_dict=False)[0]
        finally:
            self.train(was_training)
        return x.clamp(-1, 1)

    def _sampler(self) -> Any:
        """A fresh scheduler for `sample`: that of training counts its own steps."""
        diffusers = require("diffusers", extra="diffusion")
        kind = type(self.scheduler) if hasattr(self.scheduler, "sigmas") else diffusers.DDIMScheduler
        scheduler = kind.from_config(self.scheduler.config)
        scheduler.set_timesteps(self.hparams["sampling_steps"])
        return scheduler

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return adamw_cosine(self, lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"])


def _conditions(model: nn.Module, num_classes: int) -> dict[str, tuple[int, int]]:
    """Argument of ``model`` that tells the label -> (tokens, width) of it; (0, 0) for the number itself.

    Raises:
        ValueError: it has no room for ``num_classes`` classes, "no class", and the begin of a text.
    """
    config: Any = model.config
    takes = inspect.signature(type(model).forward).parameters
    rooms: dict[str, tuple[int, int | None]] = {}
    if "encoder_hidden_states" in takes:
        width = getattr(config, "joint_attention_dim", None) or config.cross_attention_dim
        rooms["encoder_hidden_states"] = (2, width)
        if "pooled_projections" in takes:
            rooms["pooled_projections"] = (1, config.pooled_projection_dim)
    elif "class_labels" in takes:
        tables = {"num_embeds_ada_norm": 1, "num_class_embeds": 0}  # the first has a row more, for "no class"
        room = next((n + more for key, more in tables.items() if (n := getattr(config, key, None)) is not None), None)
        rooms["class_labels"] = (0, room)
    if not rooms:
        raise ValueError(f"Denoiser: {type(model).__name__} takes no condition: neither class_labels nor text.")
    for name, (tokens, room) in rooms.items():
        needed = num_classes + (2 if tokens else 1)
        if room is None or room < needed:
            raise ValueError(
                f"Denoiser: {type(model).__name__} has room for {room} different {name}, and {num_classes} classes "
                f"need {needed}. Build it larger: num_class_embeds, num_embeds_ada_norm, or the width of the text."
            )
    return {name: (tokens, room if tokens else 0) for name, (tokens, room) in rooms.items()}  # type: ignore[misc]


def _one_hot(labels: Tensor, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """The labels (B,) themselves, or as one vector (B, width), or behind a begin as two tokens (B, 2, width)."""
    if not tokens:
        return labels
    vectors = F.one_hot(torch.stack([torch.full_like(labels, width - 1), labels], dim=1), width).to(dtype)
    return vectors if tokens == 2 else vectors[:, 1]


# those in colour that are in the package itself; scikit-image downloads the others
Picture = Literal[
    "astronaut", "chelsea", "coffee", "colorwheel", "hubble_deep_field", "immunohistochemistry", "retina", "rocket"
]


class PicturesData(SplitData):
    """Square patches of pictures that scikit-image ships, as (3, size, size) images from -1 to 1; none overlap.

    The label is the index of the picture.

    Args:
        pictures: which ones, by their names in ``skimage.data``.
        size: pixels along a side of a patch.
        shrink: how many pixels of the picture along each side make one of a patch.
        batch_size: patches per step.
        val_fraction: share of the validation split; the test split takes as much again.
        seed: decides the split and the order of the training patches.
        num_workers: processes that load batches.

    Raises:
        ValueError: a picture is not known, or smaller than a patch.
    """

    def __init__(
        self,
        *,
        pictures: tuple[Picture, ...] = ("astronaut", "coffee", "chelsea", "rocket"),
        size: int = 32,
        shrink: int = 1,
        batch_size: int = 32,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, val_fraction=val_fraction, seed=seed, num_workers=num_workers)
        unknown = [name for name in pictures if name not in get_args(Picture)]
        if unknown or not pictures:
            raise ValueError(
                f"PicturesData: pictures must be of {', '.join(get_args(Picture))}, got {', '.join(unknown) or 'none'}."
            )
        self.pictures, self.size, self.shrink = tuple(pictures), size, shrink

    def setup(self, stage: str | None = None) -> None:
        data = require("skimage.data", extra="diffusion")
        cut = [self._patches(torch.from_numpy(getattr(data, name)()), name) for name in self.pictures]
        images = torch.cat(cut)
        labels = torch.cat([torch.full((len(patches),), label) for label, patches in enumerate(cut)])
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))
        held_out = round(self.val_fraction * len(labels))
        parts = order.split([held_out, held_out, len(labels) - 2 * held_out])
        self.splits = {
            name: TensorDataset(images[index], labels[index])
            for name, index in zip(("val", "test", "train"), parts, strict=True)
        }

    def _patches(self, picture: Tensor, name: str) -> Tensor:
        """(H, W, 3) bytes as (N, 3, size, size) from -1 to 1."""
        if min(picture.shape[:2]) < self.size * self.shrink:
            raise ValueError(
                f"PicturesData: {name} has {' x '.join(map(str, picture.shape[:2]))} pixels, fewer than a patch of "
                f"{self.size} x {self.shrink}. Take a smaller size, or shrink less."
            )
        pixels = F.avg_pool2d(picture.permute(2, 0, 1).float() / 127.5 - 1, self.shrink)
        patches = pixels.unfold(1, self.size, self.size).unfold(2, self.size, self.size).flatten(1, 2)
        return patches.transpose(0, 1)
