"""Dense prediction: methods inside a segmentation net over the features of a timm pyramid, on real pictures."""

import functools
import warnings
from typing import Any

import lightning as L
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import PEFT, SSF, VPT, AdaptFormer, HierarchicalSideTuning, SideTuning
from lightning_peft.engine import Method, TargetError, adapters_of

NETS: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": {
        "img_size": 64,
        "window_size": 4,
        "embed_dim": 12,
        "depths": (2, 2),
        "num_heads": (2, 2),
    },
    "convnext_atto": {"dims": (12, 24, 4, 4), "depths": (2, 2, 1, 1), "ls_init_value": 1.0},
}
STAGES = {"swin_tiny_patch4_window7_224": "layers", "convnext_atto": "stages"}


class Segmenter(L.LightningModule):
    """What is coin and what is not, from the features of two stages."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.backbone = timm.create_model(kind, features_only=True, in_chans=1, out_indices=(0, 1), **NETS[kind])
        self.last = "swin" in kind  # whose channels are on the last axis
        self.laterals = nn.ModuleList(nn.Conv2d(d, 8, 1) for d in (12, 24))
        self.decoder = nn.Conv2d(8, 2, 3, padding=1)
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        features = [f.movedim(-1, 1) if self.last else f for f in self.backbone(x)]
        sizes = [F.interpolate(lateral(f), x.shape[2:]) for lateral, f in zip(self.laterals, features, strict=True)]
        return self.decoder(F.relu(sum(sizes)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


@functools.cache
def coins() -> TensorDataset:
    """Twelve cuttings of a picture of coins, and which of their pixels belong to a coin."""
    data, filters = pytest.importorskip("skimage.data"), pytest.importorskip("skimage.filters")
    picture = data.coins()
    mask = torch.from_numpy(filters.gaussian(picture, 2) > filters.threshold_otsu(picture) / 255)
    image = torch.from_numpy(picture).float() / 255
    corners = [(y, x) for y in (20, 100, 180) for x in (20, 110, 200, 290)]
    cut = [[t[y : y + 64, x : x + 64] for y, x in corners] for t in (image, mask)]
    images, masks = (torch.stack(part) for part in cut)
    return TensorDataset((images[:, None] - image.mean()) / image.std(), masks.long())


def fitted(kind: str, method: Method, folder: Any) -> Segmenter:
    torch.manual_seed(0)
    module = Segmenter(kind)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    callback = PEFT(method, summary=False)
    options: dict[str, Any] = {**quiet, "accelerator": "cpu", "default_root_dir": folder}
    trainer = L.Trainer(max_epochs=8, callbacks=[callback], **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*got no gradient")
        trainer.fit(module, DataLoader(coins(), batch_size=4))
    return module


METHODS: dict[str, Any] = {
    "ssf": lambda stages: SSF(target_modules=r"backbone\..*", modules_to_save=()),
    "vpt": lambda stages: VPT(num_virtual_tokens=8),
    "adaptformer": lambda stages: AdaptFormer(r=8),
    "sidetuning": lambda stages: SideTuning(taps=stages, width=8, modules_to_save=()),
    "hierarchicalsidetuning": lambda stages: HierarchicalSideTuning(
        dims=(8, 16), num_heads=(2, 2), pyramid=True, modules_to_save=()
    ),
}


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("name", METHODS)
def test_a_pyramid_is_adapted_for_dense_prediction(name: str, kind: str, tmp_path: Any) -> None:
    """The head stays as it was drawn, so that the adapters alone have to find the coins."""
    method = METHODS[name](tuple(f"backbone.{STAGES[kind]}_{i}" for i in range(2)))
    if name == "vpt" and kind == "convnext_atto":  # prompts need attention
        with pytest.raises(TargetError, match="VPT: .* has convolutions over a grid"):
            fitted(kind, method, tmp_path)
        return
    module = fitted(kind, method, tmp_path)
    adapted = {path.split(".")[1] for path, _, a in adapters_of(module) if list(a.parameters())}
    assert adapted >= {f"{STAGES[kind]}_0", f"{STAGES[kind]}_1"}
    # prompts see no pixel: beside random weights they shift what all tokens share, and hardly more
    assert sum(module.losses[-3:]) < (1.0 if name == "vpt" else 0.85) * sum(module.losses[:3])
