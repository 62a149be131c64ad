"""Pre-train the small vision transformer that the tutorials adapt: upright digits 0 to 6, first half of the images.

Writes ``checkpoints/vit_digits.safetensors`` beside this file: float32 weights, and what is needed to build the model
again in the metadata. The same seed gives the same bytes on the same machine.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.recipes import DigitsData, ImageClassifier

MODEL_NAME = "vit_tiny_patch16_224"
MODEL_KWARGS = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
NUM_CLASSES = 7


class AugmentedClassifier(ImageClassifier):
    """Sees every training image turned, moved, scaled and covered with a little noise."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        return (augment(images), labels) if self.trainer.training else batch


def augment(images: Tensor) -> Tensor:
    """Move each image a little, and add noise."""
    images = jittered(images)
    return images + 0.3 * torch.randn_like(images)


def jittered(images: Tensor, pixels: float = 0.6) -> Tensor:
    """Turn each image by up to 10 degrees, scale it by up to 10%, move it by up to so many ``pixels``."""
    angle, size, x, y = torch.empty(4, len(images)).uniform_(-1, 1)
    angle, size = angle * math.radians(10), 1 + 0.1 * size
    reach = pixels * 2 / images.shape[-1]  # the coordinates of the grid run from -1 to 1
    rows = [size * angle.cos(), -size * angle.sin(), reach * x, size * angle.sin(), size * angle.cos(), reach * y]
    maps = torch.stack(rows, dim=1).view(-1, 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def save_sorted(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write a safetensors file whose metadata are sorted: the library writes them in an order that changes by run."""
    content = save(tensors, metadata)
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    # the format allows spaces at the end of the header; they keep the tensors aligned
    text = text.ljust(math.ceil(len(text) / 8) * 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "checkpoints" / "vit_digits.safetensors")
    args = parser.parse_args()

    L.seed_everything(args.seed)
    module = AugmentedClassifier(
        model_name=MODEL_NAME, model_kwargs=MODEL_KWARGS, num_classes=NUM_CLASSES, lr=args.lr, weight_decay=0.05
    )
    data = DigitsData(digits=tuple(range(NUM_CLASSES)), half="first", val_fraction=0.1, seed=args.seed)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        deterministic=True,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        check_val_every_n_epoch=args.epochs,
    )
    trainer.fit(module, data)
    accuracy = trainer.test(module, data, verbose=False)[0]["test_acc"]

    metadata = {
        "model_name": MODEL_NAME,
        "model_kwargs": json.dumps(MODEL_KWARGS),
        "num_classes": str(NUM_CLASSES),
        "accuracy": f"{accuracy:.4f}",
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_sorted(module.model.state_dict(), metadata, args.output)
    print(f"{args.output.name}: {args.output.stat().st_size / 2**20:.2f} MB, accuracy on unseen digits {accuracy:.1%}")


if __name__ == "__main__":
    main()
