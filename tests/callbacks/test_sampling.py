"""Pictures in training: which weights make them, when, and where they go."""

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import Logger
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_peft import PEFT, LinearProbe
from lightning_peft.callbacks import SampleImages, image_grid


class Painter(L.LightningModule):
    """Its pictures have the value of its one weight, which falls by a tenth in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(self.layer.weight, 1.0)
        self.asked: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def sample(self, count: int = 1) -> Tensor:
        self.asked.append(count)
        return self.layer.weight.detach() * torch.ones(count, 1, 48, 48)


class Silent(Logger):
    """A logger of numbers alone."""

    name, version = "silent", 0

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def fit(tmp_path: Path, *callbacks: L.Callback, module: Any = None, validate: bool = True, **options: Any) -> Any:
    data = DataLoader(torch.zeros(2, 1), batch_size=1)
    arguments = {"max_epochs": 3, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    arguments |= {"accelerator": "cpu", "enable_checkpointing": False, "default_root_dir": tmp_path}
    trainer = L.Trainer(callbacks=list(callbacks), **arguments | options)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*but have no `val_dataloader`")
        trainer.fit(module or Painter(), data, data if validate else None)
    return trainer


def values(folder: Path) -> dict[str, float]:
    """File -> what its middle says, from -1 to 1."""
    found = {}
    for file in sorted(folder.iterdir()):
        with Image.open(file) as picture:
            found[file.name] = np.asarray(picture)[25, 25, 0] / 127.5 - 1
    return found


@pytest.mark.parametrize("validate", [True, False])
def test_a_grid_is_written_after_each_epoch(tmp_path: Path, validate: bool) -> None:
    fit(tmp_path, SampleImages(), validate=validate)
    # two steps an epoch, a tenth each
    expected = {"epoch_0000.png": 0.8, "epoch_0001.png": 0.6, "epoch_0002.png": 0.4}
    assert values(tmp_path / "samples") == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_make_the_pictures(tmp_path: Path, first: bool) -> None:
    average, samples = EMAWeightAveraging(decay=0.5), SampleImages(folder=tmp_path / "here")
    peft = PEFT(LinearProbe(modules_to_save="layer"))
    fit(tmp_path, peft, *([average, samples] if first else [samples, average]), max_epochs=2)
    weight, mean, expected = 1.0, None, []
    for step in range(4):
        weight -= 0.1
        mean = weight if mean is None else 0.5 * mean + 0.5 * weight
        expected += [mean] if step % 2 else []
    assert list(values(tmp_path / "here").values()) == pytest.approx(expected, abs=0.01)


def test_how_often_and_with_what(tmp_path: Path) -> None:
    module = Painter()
    fit(tmp_path, SampleImages({"count": 5}, every_n_epochs=2, columns=3), module=module, max_epochs=4)
    assert module.asked == [5, 5]
    assert sorted(file.name for file in (tmp_path / "samples").iterdir()) == ["epoch_0001.png", "epoch_0003.png"]
    with Image.open(tmp_path / "samples" / "epoch_0001.png") as picture:
        assert picture.size == (150, 100)


def test_epochs_without_validation_have_none_in_a_run_that_validates(tmp_path: Path) -> None:
    module = Painter()
    fit(tmp_path, SampleImages(), module=module, max_epochs=4, check_val_every_n_epoch=2)
    assert sorted(file.name for file in (tmp_path / "samples").iterdir()) == ["epoch_0001.png", "epoch_0003.png"]


def test_loggers_that_take_pictures_get_them(tmp_path: Path) -> None:
    class Board(Silent):
        got: Any = None

        @property
        def experiment(self) -> Any:
            return self

        def add_image(self, name: str, picture: Any, step: int) -> None:
            self.got = name, picture, step

    class Page(Silent):
        got: Any = None

        def log_image(self, key: str, images: list[Any], step: int) -> None:
            self.got = key, images, step

    board, page = Board(), Page()
    fit(tmp_path, SampleImages(), max_epochs=1, logger=[board, page, Silent()])
    assert board.got[0] == page.got[0] == "samples"
    assert board.got[2] == page.got[2] == 2
    assert np.array_equal(np.asarray(page.got[1][0]), board.got[1].permute(1, 2, 0).numpy())


def test_a_module_that_makes_no_pictures_is_refused(tmp_path: Path) -> None:
    class Other(Painter):
        sample = None  # type: ignore[assignment]

    with pytest.raises(TypeError, match=r"Other has no method sample\(\).* Add one"):
        fit(tmp_path, SampleImages(), module=Other())

    class Flat(Painter):
        def sample(self) -> Tensor:  # type: ignore[override]
            return torch.zeros(3, 48, 48)

    with pytest.raises(ValueError, match=r"Flat\.sample\(\) answers with images .* got \(3, 48, 48\)"):
        fit(tmp_path, SampleImages(), module=Flat())


def test_the_grid_has_frames_rows_and_enlarged_pixels() -> None:
    images = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 1, 16, 24)
    grid = image_grid(images, columns=2)  # 24 wide: twice as large
    assert grid.shape == (3, 2 * (32 + 2), 2 * (48 + 2))
    assert [grid[0, 10, 10].item(), grid[0, 10, 60].item(), grid[0, 45, 10].item()] == [0, 128, 255]
    assert (grid[:, 34:, 50:] == 128).all()
    assert (grid[:, 0] == 128).all()
    colours = torch.tensor([-1.0, 0.2, 7.0]).view(1, 3, 1, 1).expand(1, 3, 48, 48)
    assert image_grid(colours)[:, 10, 10].tolist() == [0, 153, 255]
