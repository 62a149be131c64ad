"""Sequence packing: several documents in one row, none of which sees another, in place of padding.

A row of a packed batch holds as many documents as fit. Positions restart at each, attention stays inside each, and no
document has to predict the first token of the next. So logits, loss and gradients are those of the documents alone.
"""

import copy
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

Attention = Literal["mask", "positions", "varlen"]
Split = Literal["train", "val", "test"]

# what a Trainer may call on a datamodule
_HOOKS = [*(n for n in vars(DataHooks) if not n.startswith("_")), "on_exception", "state_dict", "load_state_dict"]


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Best-fit-decreasing bins: the longest first, each where it leaves the least space.

    Takes ``n log n`` steps for ``n`` lengths: bins are found by their free space. There are never more than
    11/9 of the fewest possible bins, plus one. Equal arguments give equal bins.

    Args:
        lengths: tokens of each sequence.
        max_length: tokens that a bin holds.

    Returns:
        The indices in each bin.

    Raises:
        ValueError: a sequence is empty or longer than ``max_length``.

    >>> pack([4, 9, 1, 7], max_length=12)
    [[1], [3, 0, 2]]
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= max_length:
            raise ValueError(
                f"pack: sequence {index} of {len(lengths)} has {length} tokens, expected 1 to max_length={max_length}. "
                "Cut or leave out such sequences in the dataset, or raise max_length."
            )
    bins: list[list[int]] = []
    with_space: dict[int, list[list[int]]] = {}  # free space -> the bins that have it
    spaces: list[int] = []  # the keys, sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(spaces, lengths[index])
        if place == len(spaces):
            bins.append([])
            space, chosen = max_length, bins[-1]
        else:
            space = spaces[place]
            chosen = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[place]
        chosen.append(index)
        space -= lengths[index]
        if space not in with_space:
            with_space[space] = []
            insort(spaces, space)
        with_space[space].append(chosen)
    return bins


@dataclass(frozen=True)
class PackingCollate:
    """A ``collate_fn`` that packs samples into rows, for causal language models of transformers.

    A sample is a mapping with ``input_ids`` and, if they are others, ``labels``, or the tokens alone; tensors or
    lists. What an ``attention_mask`` in it says is padding is taken away. Samples without a token take no room.

    A batch holds ``input_ids``, ``labels`` and ``position_ids`` (rows, tokens), all int64. As many rows come out as
    are needed, each of ``max_length`` tokens. The first label of each document is ignored, as the model itself shifts
    labels by one; so is padding, which is kept apart like a document.

    What keeps the documents apart depends on how the model attends:

    - ``"mask"``: an ``attention_mask`` (rows, 1, tokens, tokens), 0 where a token looks and the lowest float elsewhere.
      For eager and SDPA attention; most models take it. It replaces their own mask: layers with a sliding window
      shorter than a document look past it. The mask of a long row is large (64 MB for 4096 tokens).
    - ``"positions"``: nothing but ``position_ids``, from which the model makes the mask that its attention needs,
      sliding windows included; ``use_cache`` is False, as transformers looks at them only then. For eager, SDPA and
      flex attention. Architectures that do not pass positions on to their mask mix the documents up, without an
      error: OPT, BLOOM, MPT and GPT-OSS in transformers 5.24.
    - ``"varlen"``: all documents in one row, one behind the other, without padding, with ``cu_seq_lens_q``,
      ``cu_seq_lens_k`` (int32), ``max_length_q`` and ``max_length_k``. For flash attention.

    Args:
        max_length: tokens of a row, and the most that a document may have.
        pad_token_id: fills a row up; any token will do, no document sees it.
        ignore_index: the label that is left out of the loss.
        attention: how documents are kept apart, see above.
        collate_fn: makes a batch of one sample first, to turn it into tokens, say. Each of its rows is a document.

    Raises:
        ValueError: ``attention`` is none of these, a document is longer than ``max_length``, all are empty, or a
            sample is not as above.

    >>> batch = PackingCollate(max_length=6)([[5, 6, 7], {"input_ids": [8, 9]}])
    >>> batch["input_ids"], batch["position_ids"], batch["labels"]
    (tensor([[5, 6, 7, 8, 9, 0]]), tensor([[0, 1, 2, 0, 1, 0]]), tensor([[-100, 6, 7, -100, 9, -100]]))
    """

    max_length: int
    pad_token_id: int = 0
    ignore_index: int = -100
    attention: Attention = "mask"
    collate_fn: Callable[[list[Any]], Any] | None = None

    def __post_init__(self) -> None:
        if self.attention not in get_args(Attention):
            raise ValueError(
                f"PackingCollate: attention must be one of {', '.join(map(repr, get_args(Attention)))}, got "
                f"{self.attention!r}."
            )

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        documents = [document for sample in samples for document in self._documents(sample) if document.shape[1]]
        if not documents:
            raise ValueError(f"PackingCollate: none of {len(samples)} samples has a token. Leave such samples out.")
        lengths = [document.shape[1] for document in documents]
        bins, width = pack(lengths, self.max_length), self.max_length
        if self.attention == "varlen":
            bins, width = [list(range(len(documents)))], sum(lengths)
        rows = [
            torch.cat([*(documents[i] for i in chosen), self._padding(width - sum(lengths[i] for i in chosen))], dim=1)
            for chosen in bins
        ]
        input_ids, labels, position_ids = torch.stack(rows, dim=1)  # each (rows, width)
        batch: dict[str, Any] = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
        if self.attention == "mask":
            return batch | {"attention_mask": _mask(position_ids)}
        batch["use_cache"] = False
        if self.attention == "varlen":
            starts = position_ids[0].eq(0).nonzero().flatten()
            ends = torch.cat([starts, torch.tensor([width])]).int()  # (documents + 1,)
            batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
            batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        return batch

    def _documents(self, sample: Any) -> Iterator[Tensor]:
        """Input ids, labels and positions of each document in a sample: (3, tokens)."""
        fields = sample if self.collate_fn is None else self.collate_fn([sample])
        fields = fields if isinstance(fields, Mapping) else {"input_ids": fields}
        if "input_ids" not in fields or not fields.keys() <= {"input_ids", "labels", "attention_mask"}:
            raise ValueError(
                f"PackingCollate: a sample has {sorted(map(str, fields))}, expected input_ids and at most labels and "
                "attention_mask beside it. Name them so in the dataset and leave the rest out, or give a collate_fn."
            )
        ids = _integers("input_ids", fields["input_ids"])
        labels = _integers("labels", fields.get("labels", ids))
        keep = _integers("attention_mask", fields.get("attention_mask", torch.ones_like(ids))).bool()
        if not ids.shape == labels.shape == keep.shape:
            raise ValueError(
                f"PackingCollate: a sample has {tuple(ids.shape)} input_ids, {tuple(labels.shape)} labels and an "
                f"attention_mask {tuple(keep.shape)}. Give each token one label; {self.ignore_index} is left out."
            )
        for row in zip(ids, labels, keep, strict=True):
            kept = row[0][row[2]], row[1][row[2]]
            document = torch.stack([*kept, torch.arange(len(kept[0]))])
            document[1, :1] = self.ignore_index
            yield document

    def _padding(self, tokens: int) -> Tensor:
        """A document (3, tokens) that nobody reads."""
        filler = torch.tensor([[self.pad_token_id], [self.ignore_index], [0]]).repeat(1, tokens)
        filler[2] = torch.arange(tokens)
        return filler


def _integers(name: str, value: Any) -> Tensor:
    """As int64 (documents, tokens)."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"PackingCollate: {name} of a sample must be integers, got {type(value).__name__}.") from error
    if tensor.numel() and (tensor.is_floating_point() or tensor.dim() > 2):
        raise ValueError(
            f"PackingCollate: {name} of a sample must be integers (tokens,), got {tensor.dtype} {tuple(tensor.shape)}."
        )
    return torch.atleast_2d(tensor.long())


def _mask(position_ids: Tensor) -> Tensor:
    """What is added to the attention scores (rows, 1, tokens, tokens): 0 back to the start of a document."""
    document = position_ids.eq(0).cumsum(1)  # (rows, tokens)
    sees = document.unsqueeze(2).eq(document.unsqueeze(1)).tril()
    return torch.zeros(sees.shape).masked_fill_(~sees, torch.finfo(torch.float32).min).unsqueeze(1)


class PackedData(L.LightningDataModule):
    """Your own DataModule, whose training batches are packed by `PackingCollate`.

    ``trainer.fit(module, PackedData(data, max_length=2048))``. Dataset, sampler, workers and all hooks stay yours. A
    batch of B samples becomes as many rows as they need, so the number of rows varies from batch to batch; choose
    ``batch_size`` so that B average samples fill the rows that you want.

    One batch at a time is packed. A window of several batches would fill the last row better, but here each step sees
    the samples that it would see without packing: its loss, a mean over tokens, is the same, and so is the number of
    steps. A run that goes on in an epoch needs no other state, and distributed samplers work as they do anyway.

    A ``collate_fn`` of your loader is asked for one sample at a time, and the padding that its ``attention_mask``
    shows is taken away; so what it does to the labels, say, is done.

    Args:
        datamodule: whose loaders are packed.
        max_length: tokens of a row, and the most that a document may have.
        pad_token_id: fills a row up.
        ignore_index: the label that is left out of the loss.
        attention: how documents are kept apart: ``"mask"``, ``"positions"`` or ``"varlen"``; see `PackingCollate`.
        loaders: which of ``"train"``, ``"val"`` and ``"test"`` are packed.

    Raises:
        ValueError: ``attention`` is none of these, or ``loaders`` is empty or names one that ``datamodule`` lacks.
        TypeError: what is to be packed is not a ``DataLoader`` that makes batches, or a list or mapping of them.
    """

    def __init__(
        self,
        datamodule: L.LightningDataModule,
        *,
        max_length: int,
        pad_token_id: int = 0,
        ignore_index: int = -100,
        attention: Attention = "mask",
        loaders: Sequence[Split] = ("train",),
    ) -> None:
        self.datamodule = datamodule
        super().__init__()
        for flag in ("prepare_data_per_node", "allow_zero_length_dataloader_with_multiple_devices"):
            setattr(self, flag, getattr(datamodule, flag))
        self.collate = PackingCollate(max_length, pad_token_id, ignore_index, attention)
        defined = [split for split in get_args(Split) if is_overridden(f"{split}_dataloader", datamodule)]
        if not loaders or not set(loaders) <= set(defined):
            raise ValueError(
                f"PackedData: loaders must name some of {defined}, which {type(datamodule).__name__} defines, "
                f"got {loaders!r}."
            )
        # on the instance: Lightning asks which are overridden, and that must be those of the datamodule
        for hook in _HOOKS:
            setattr(self, hook, getattr(datamodule, hook))
        for hook in [f"{split}_dataloader" for split in loaders]:
            setattr(self, hook, partial(self._from, getattr(datamodule, hook)))

    @property
    def trainer(self) -> "L.Trainer | None":
        """That of the datamodule."""
        return self.datamodule.trainer

    @trainer.setter
    def trainer(self, trainer: "L.Trainer | None") -> None:
        self.datamodule.trainer = trainer

    def _from(self, make: Callable[[], Any]) -> Any:
        return self._packed(make())

    def _packed(self, loader: Any) -> Any:
        """A copy of the loader that packs; of each, where there are several."""
        if isinstance(loader, Mapping):
            return {name: self._packed(one) for name, one in loader.items()}
        if isinstance(loader, list | tuple):
            return [self._packed(one) for one in loader]
        if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
            raise TypeError(
                f"PackedData: {type(self.datamodule).__name__} gives a {type(loader).__name__} to pack, expected a "
                "DataLoader that makes batches of its samples, or a list or mapping of such. Give it a batch_size."
            )
        own = None if loader.collate_fn is default_collate else loader.collate_fn
        packing = copy.copy(loader)
        packing.collate_fn = replace(self.collate, collate_fn=own)
        return packing
