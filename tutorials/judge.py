"""A judge of generated digits: a small classifier, its accuracy, and the Frechet distance between its features."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_peft.recipes import DigitsData

LOOKS: dict[str, dict[str, bool]] = {"upright": {}, "inverted": {"invert": True}, "thick": {"thick": True}}
CHECKPOINT = Path(__file__).parent / "checkpoints" / "judge_digits.safetensors"


class Judge(nn.Module):
    """Features (B, 32) of images (B, 1, 16, 16) from -1 to 1; a linear head tells the digit."""

    num_features = 32

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, self.num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.num_features, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)

    @classmethod
    def trained(cls) -> "Judge":
        """The one that ``pretrain_denoisers.py`` trained on real digits of all looks."""
        judge = cls()
        judge.load_state_dict(load_file(CHECKPOINT))
        return judge.eval().requires_grad_(False)


@torch.no_grad()
def quality(judge: Judge, images: Tensor, labels: Tensor, real: Tensor) -> tuple[float, float]:
    """(share of ``images`` in which the judge sees their label, Frechet distance of its features to ``real``)."""
    accuracy = (judge.head(judge(images)).argmax(1) == labels).float().mean().item()
    distance = FrechetInceptionDistance(feature=judge)
    distance.update(real, real=True)
    distance.update(images, real=False)
    return accuracy, distance.compute().item()


def pictures(look: str, half: Any = "all", digits: tuple[int, ...] = tuple(range(10))) -> tuple[Tensor, Tensor]:
    """All real images (N, 1, 16, 16) and labels (N,) of these digits in this look."""
    data = DigitsData(digits=digits, half=half, size=16, signed=True, **LOOKS[look])  # type: ignore[arg-type]
    data.setup()
    parts = [split.tensors for split in data.splits.values()]  # type: ignore[attr-defined]
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def train(images: Tensor, labels: Tensor, epochs: int = 30) -> Judge:
    """A judge that has learnt these pictures."""
    judge = Judge()
    optimizer = torch.optim.Adam(judge.parameters(), lr=2e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(judge.head(judge(images[index])), labels[index]).backward()
            optimizer.step()
    return judge.eval()
