"""Text classification: any encoder of transformers, and the documentation of the standard library to read."""

import ast
import random
import sysconfig
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft.recipes._shared import SplitData, adamw_cosine, from_transformers, located, require

# part of the library -> its modules and packages; one that this Python does not have is left out
PARTS = {
    "networking": "http urllib ftplib nntplib socketserver imaplib poplib smtplib socket ssl xmlrpc wsgiref ipaddress",
    "concurrency": "asyncio multiprocessing threading queue sched subprocess concurrent selectors",
    "files": "tarfile pathlib shutil filecmp os stat gzip bz2 lzma zipfile tempfile fileinput ntpath linecache glob",
    "numbers": "_pydecimal random fractions heapq numbers zoneinfo statistics datetime _pydatetime calendar _strptime",
    "formats": "email configparser plistlib csv json html tomllib base64 xml mailbox mimetypes",
    "testing": "unittest pdb pstats trace traceback timeit tracemalloc warnings profile doctest bdb logging",
    "language": "importlib inspect pkgutil code codeop pyclbr typing ast dis symtable types abc runpy tokenize",
    "windows": "tkinter turtle turtledemo idlelib curses",
}
SPLITS = "train", "val", "test"
TURNS = "train", "test", "train", "train", "test", "val", "train"  # whose file is the next in size


class TextClassifier(L.LightningModule):
    """Any encoder of transformers with a new linear head on the mean of its last hidden states.

    Batches hold ``input_ids`` and ``attention_mask`` (B, T), and ``labels`` (B,). Logs ``train_loss``, ``val_loss``,
    ``val_acc`` and ``test_acc``, each averaged over the texts of an epoch.

    Args:
        num_classes: width of the head.
        pretrained: a folder or a hub name to load weights and configuration from; ``"package:NAME/FOLDER"`` is a
            folder that an installed package ships.
        config: a configuration for a model with random weights; ``model_type`` names the architecture.
        lr: highest learning rate of AdamW; it falls along a cosine to zero.
        weight_decay: decoupled weight decay of AdamW.

    Raises:
        ValueError: not exactly one of ``pretrained`` and ``config`` is given, ``model_type`` is missing, or the package
            is not installed.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = from_transformers(
            "TextClassifier", "AutoModel", pretrained=pretrained, config=config, example="bert"
        )
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None  # it would have no gradient: the mean takes its place
        self.head = nn.Linear(self.encoder.config.hidden_size, num_classes)
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (B, T, D)
        mask = attention_mask[..., None].to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1))  # (B, num_classes)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch["input_ids"], batch["attention_mask"]), batch["labels"])
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self(batch["input_ids"], batch["attention_mask"])
        self.val_acc(logits, batch["labels"])
        self.log("val_loss", F.cross_entropy(logits, batch["labels"]), batch_size=len(logits))
        self.log("val_acc", self.val_acc, prog_bar=True)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.test_acc(self(batch["input_ids"], batch["attention_mask"]), batch["labels"])
        self.log("test_acc", self.test_acc)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Chances of the classes, (B, num_classes)."""
        return self(batch["input_ids"], batch["attention_mask"]).softmax(-1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return adamw_cosine(self, lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"])


class DocstringsData(SplitData):
    """First paragraphs of docstrings of the standard library; what is asked for is the part they come from.

    There are eight parts, `classes`, with equally many texts each. No file is in two splits. The text is that of the
    running Python, so numbers differ a little between versions. Batches are padded to their longest text.

    Args:
        tokenizer: folder or hub name of the tokenizer, as in `TextClassifier`.
        per_class: texts of each class to train, to validate and to test with.
        max_length: tokens of a text; the end of a longer one is left out.
        batch_size: texts per step.
        seed: decides the order of the training texts.
        num_workers: processes that load batches.

    Raises:
        ValueError: an argument is outside its range, or the package of the tokenizer is not installed.
    """

    classes = tuple(PARTS)

    def __init__(
        self,
        *,
        tokenizer: str,
        per_class: tuple[int, int, int] = (60, 40, 50),
        max_length: int = 64,
        batch_size: int = 16,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        if min(per_class) < 1 or max_length < 3:
            raise ValueError(
                f"DocstringsData: per_class must be three numbers >= 1, and max_length >= 3, got {per_class} and "
                f"{max_length}. Two tokens begin and end each text."
            )
        self.tokenizer, self.per_class, self.max_length = tokenizer, per_class, max_length
        self.texts: dict[str, list[tuple[str, int]]] = {}

    def setup(self, stage: str | None = None) -> None:
        if self.texts:
            return  # read before: each run of a trainer asks for it
        self.texts = self._texts()
        self.splits = {}
        for split, texts in self.texts.items():
            rows = self._tokens([text for text, _ in texts])
            samples: Any = [(row, label) for row, (_, label) in zip(rows, texts, strict=True)]
            self.splits[split] = samples

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        """A batch of texts of your own: ``input_ids`` and ``attention_mask`` (B, T)."""
        batch = self.collate_fn([(row, 0) for row in self._tokens(texts)])
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def _tokens(self, texts: list[str]) -> list[Tensor]:
        tokenizer = require("transformers", extra="text").AutoTokenizer.from_pretrained(located(self.tokenizer))
        return [torch.tensor(row) for row in tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]]

    def _texts(self) -> dict[str, list[tuple[str, int]]]:
        """Split -> (text, class); the files of a class take turns, from the one with most texts on."""
        chosen: dict[str, list[tuple[str, int]]] = {split: [] for split in SPLITS}
        for label, modules in enumerate(PARTS.values()):
            seen: set[str] = set()
            found: dict[str, list[str]] = {split: [] for split in SPLITS}
            files = [_docstrings(file) for name in modules.split() for file in _source_files(name)]
            for i, file in enumerate(sorted(files, key=len, reverse=True)):
                new = sorted(file - seen)
                found[TURNS[i % len(TURNS)]] += random.Random(i).sample(new, min(len(new), 25))
                seen |= file
            for split, number in zip(SPLITS, self.per_class, strict=True):
                texts = random.Random(label).sample(found[split], min(number, len(found[split])))
                chosen[split] += [(text, label) for text in texts]
        return chosen

    @staticmethod
    def collate_fn(samples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        """Pad to the longest."""
        rows = [row for row, _ in samples]
        return {
            "input_ids": pad_sequence(rows, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            "labels": torch.tensor([label for _, label in samples]),
        }


def _docstrings(file: Path) -> set[str]:
    """The first paragraph of each docstring in a file, but for very short ones."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, documented)]
    texts = {" ".join((ast.get_docstring(node) or "").split("\n\n")[0].split()) for node in nodes}
    return {text for text in texts if len(text) >= 30}


def _source_files(module: str) -> list[Path]:
    """The source of a module or package of the standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [*root.glob(f"{module}.py"), *sorted(root.glob(f"{module}/**/*.py"))]
    return [file for file in files if not {"test", "tests", "idle_test"} & set(file.relative_to(root).parts)]
