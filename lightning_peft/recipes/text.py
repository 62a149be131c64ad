"""Causal language modelling: any transformers model, and the standard library's own source to read."""

import ast
import difflib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import StackDataset
from torchmetrics.text import Perplexity

from lightning_peft.recipes._shared import SplitData, adamw_cosine, from_transformers

# the label that transformers leaves out of the loss
IGNORE = -100


class CausalLM(L.LightningModule):
    """Any causal language model of transformers, trained to predict the next token.

    Batches are what the model takes: ``input_ids`` and ``labels`` (B, T), and if there is padding, an
    ``attention_mask``. The model itself shifts the labels by one; those equal to -100 are left out.
    Logs ``train_loss``, ``val_loss``, ``val_perplexity``, ``test_loss`` and ``test_perplexity``, each averaged over
    the predicted tokens of an epoch.

    Args:
        pretrained: a folder or a hub name to load weights and configuration from; ``"package:NAME/FOLDER"`` is a
            folder that an installed package ships.
        config: a configuration for a model with random weights; ``model_type`` names the architecture.
        lr: highest learning rate of AdamW; it falls along a cosine to zero.
        weight_decay: decoupled weight decay of AdamW.

    Raises:
        ValueError: not exactly one of ``pretrained`` and ``config`` is given, or ``model_type`` is missing.
    """

    def __init__(
        self,
        *,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = from_transformers(
            "CausalLM", "AutoModelForCausalLM", pretrained=pretrained, config=config, example="llama"
        )
        self.val_perplexity = Perplexity(ignore_index=IGNORE)
        self.test_perplexity = Perplexity(ignore_index=IGNORE)

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self(**batch).loss
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=_predictions(batch))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_perplexity)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_perplexity)

    def _evaluate(self, batch: dict[str, Tensor], stage: str, perplexity: Perplexity) -> None:
        output = self(**batch)
        perplexity(output.logits[:, :-1].float(), batch["labels"][:, 1:])
        self.log(f"{stage}_loss", output.loss, batch_size=_predictions(batch))
        self.log(f"{stage}_perplexity", perplexity, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return adamw_cosine(self, lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"])


def _predictions(batch: dict[str, Tensor]) -> int:
    """Count the tokens that enter the loss: all but the first of each row, and none of the padding."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())


class SourceCodeData(SplitData):
    """Byte-level windows over the source of the Python standard library; the vocabulary is the 256 bytes.

    The files are read in the order of their names, cut into windows that do not overlap, and the windows are shared
    out at random. The text is that of the running Python, so numbers differ a little between versions.

    Args:
        seq_len: bytes per window.
        batch_size: windows per step.
        max_bytes: stop reading here.
        package: read only this module or package, such as ``"email"``; by default all single-file modules.
        val_fraction: share of the validation split; the test split takes as much again.
        seed: decides the split and the order of the training windows.
        num_workers: processes that load batches.

    Raises:
        ValueError: an argument is outside its range, or ``package`` has no Python source in the standard library.
    """

    def __init__(
        self,
        *,
        seq_len: int = 128,
        batch_size: int = 32,
        max_bytes: int = 1_000_000,
        package: str | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, val_fraction=val_fraction, seed=seed, num_workers=num_workers)
        if seq_len < 2:
            raise ValueError(
                f"SourceCodeData: seq_len must be an integer >= 2, got {seq_len!r}. One byte predicts nothing."
            )
        self.seq_len, self.max_bytes, self.package = seq_len, max_bytes, package
        self.files = _source_files(package)

    def setup(self, stage: str | None = None) -> None:
        source = b"".join(path.read_bytes() for path in self.files)[: self.max_bytes]
        total = len(source) // self.seq_len
        held_out = round(self.val_fraction * total)
        if not held_out:
            raise ValueError(
                f"SourceCodeData: {total} windows of {self.seq_len} bytes are too few for three splits. "
                f"Raise max_bytes (now {self.max_bytes}) or val_fraction, or lower seq_len."
            )
        windows = torch.frombuffer(bytearray(source), dtype=torch.uint8)[: total * self.seq_len].long()
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))
        shares = windows.view(total, self.seq_len)[order].split([held_out, held_out, total - 2 * held_out])
        names = "val", "test", "train"
        # the labels are the inputs: the model shifts them
        self.splits = {n: StackDataset(input_ids=rows, labels=rows) for n, rows in zip(names, shares, strict=True)}


class SourceFunctionsData(SplitData):
    """Functions and methods of the Python standard library, each a sample of its own length, as bytes.

    A function inside another is part of that one. Batches are padded to their longest sample: ``input_ids``,
    ``attention_mask`` and ``labels`` (B, T). `PackedData` around it packs them.

    Args:
        max_length: bytes of a sample; the end of a longer function is left out.
        batch_size: functions per step.
        package: read only this module or package, such as ``"email"``; by default all single-file modules.
        val_fraction: share of the validation split; the test split takes as much again.
        seed: decides the split and the order of the training samples.
        num_workers: processes that load batches.

    Raises:
        ValueError: an argument is outside its range, or ``package`` has no Python source in the standard library.
    """

    def __init__(
        self,
        *,
        max_length: int = 512,
        batch_size: int = 32,
        package: str | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, val_fraction=val_fraction, seed=seed, num_workers=num_workers)
        if max_length < 2:
            raise ValueError(
                f"SourceFunctionsData: max_length must be an integer >= 2, got {max_length!r}. One byte predicts "
                "nothing."
            )
        self.max_length, self.package = max_length, package
        self.files = _source_files(package)

    def setup(self, stage: str | None = None) -> None:
        sources = [source[: self.max_length] for path in self.files for source in _functions(path.read_bytes())]
        held_out = round(self.val_fraction * len(sources))
        if not held_out:
            raise ValueError(
                f"SourceFunctionsData: {len(sources)} functions are too few for three splits. "
                "Raise val_fraction, or choose another package."
            )
        samples = [torch.frombuffer(bytearray(source), dtype=torch.uint8).long() for source in sources]
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(self.seed))
        shares = order.split([held_out, held_out, len(samples) - 2 * held_out])
        names = "val", "test", "train"
        rows: Any = ([samples[i] for i in share] for share in shares)
        self.splits = {n: StackDataset(input_ids=row) for n, row in zip(names, rows, strict=True)}

    @staticmethod
    def collate_fn(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Pad to the longest."""
        rows = [sample["input_ids"] for sample in samples]
        masks = [torch.ones_like(row) for row in rows]
        return {
            "input_ids": pad_sequence(rows, batch_first=True),
            "attention_mask": pad_sequence(masks, batch_first=True),
            "labels": pad_sequence(rows, batch_first=True, padding_value=IGNORE),
        }


def _functions(source: bytes) -> Iterator[bytes]:
    lines = source.splitlines(keepends=True)
    nodes: list[ast.AST] = [ast.parse(source)]
    for node in nodes:  # it grows meanwhile
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield b"".join(lines[node.lineno - 1 : node.end_lineno])
        else:
            nodes += ast.iter_child_nodes(node)


def _source_files(package: str | None) -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    if package is None:
        return sorted(root.glob("*.py"))
    files = sorted([*root.glob(f"{package}.py"), *root.glob(f"{package}/**/*.py")])
    if package not in sys.stdlib_module_names or not files:
        near = difflib.get_close_matches(package, sys.stdlib_module_names)
        raise ValueError(
            f"package {package!r} has no Python source in the standard library. "
            f"Nearest names: {', '.join(near) or 'none'}. Give the name of a top-level module or package."
        )
    return files
