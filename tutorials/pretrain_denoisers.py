"""Pre-train what the diffusion tutorials adapt: a DiT by flow matching, a UNet by diffusion, and a judge of pictures.

The denoisers see upright digits 0 to 6, the first half of the images, 16 x 16 pixels. Each is written to a folder
below ``checkpoints`` that diffusers' ``from_pretrained`` loads; the judge, a small classifier that has seen all digits
in all looks, to ``checkpoints/judge_digits.safetensors``. The same seed gives the same bytes on the same machine.
"""

import argparse
from pathlib import Path
from typing import Any

import judge
import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from pretrain_digits import jittered
from safetensors.torch import save_file

from lightning_peft.callbacks import SampleImages
from lightning_peft.recipes import Denoiser, DigitsData

FOLDER = Path(__file__).parent / "checkpoints"
DIGITS = tuple(range(7))
DENOISERS: dict[str, dict[str, Any]] = {
    "dit_digits": {
        "model": "DiTTransformer2DModel",
        "model_kwargs": {
            "sample_size": 16,
            "patch_size": 4,
            "in_channels": 1,
            "out_channels": 1,
            "num_layers": 6,
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "num_embeds_ada_norm": 10,
            "norm_num_groups": 1,
        },
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    },
    "unet_digits": {
        "model": "UNet2DConditionModel",
        "model_kwargs": {
            "sample_size": 16,
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": (16, 32, 48),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "attention_head_dim": 2,
            "cross_attention_dim": 16,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        },
        "scheduler": "DDPMScheduler",
    },
}


class JitteredDenoiser(Denoiser):
    """Sees every training image turned, moved and scaled a little."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        return (jittered(images, pixels=1), labels) if self.trainer.training else batch


def pretrain(name: str, epochs: int, seed: int) -> None:
    """Train one of the denoisers, and write its averaged weights."""
    L.seed_everything(seed)
    module = JitteredDenoiser(num_classes=10, lr=2e-3, **DENOISERS[name])
    data = DigitsData(digits=DIGITS, half="first", size=16, signed=True, val_fraction=0.1, seed=seed)
    samples = SampleImages({"labels": [digit for digit in DIGITS for _ in range(8)]}, every_n_epochs=50)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        deterministic=True,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        check_val_every_n_epoch=50,
        default_root_dir=f"runs/{name}",
        callbacks=[EMAWeightAveraging(decay=0.995), samples],
    )
    trainer.fit(module, data)
    loss = trainer.validate(module, data, verbose=False)[0]["val_loss"]
    module.model.save_pretrained(FOLDER / name)
    size = sum(file.stat().st_size for file in (FOLDER / name).iterdir())
    print(f"{name}: {size / 2**20:.2f} MB, squared error on unseen digits {loss:.4f}")


def train_judge(seed: int) -> None:
    """Train the judge on all digits in all looks, and write it."""
    L.seed_everything(seed)
    looks = [judge.pictures(look) for look in judge.LOOKS]
    order = torch.randperm(len(looks[0][1]))  # a digit is held out in all looks
    pixels, classes = (torch.stack([look[i][order] for look in looks]) for i in (0, 1))
    trained = judge.train(pixels[:, 300:].flatten(0, 1), classes[:, 300:].flatten())
    accuracy = (
        (trained.head(trained(pixels[:, :300].flatten(0, 1))).argmax(1) == classes[:, :300].flatten()).float().mean()
    )
    save_file(trained.state_dict(), judge.CHECKPOINT)
    print(f"{judge.CHECKPOINT.name}: accuracy on unseen pictures {accuracy:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=400)
    parser.add_argument("--only", choices=("judge", *DENOISERS), help="all by default")
    args = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    if args.only in (None, "judge"):
        train_judge(args.seed)
    for name in DENOISERS:
        if args.only in (None, name):
            pretrain(name, args.epochs, args.seed)


if __name__ == "__main__":
    main()
