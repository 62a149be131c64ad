"""Packing: bins, batches, models that see each document alone, and a Trainer whose numbers do not change by it."""

import json
import pickle
from collections import Counter
from functools import cache
from itertools import combinations
from math import ceil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, StackDataset

from lightning_peft import PEFT, LoRA, inject
from lightning_peft.recipes import CausalLM, PackedData, PackingCollate, SourceFunctionsData, pack

PAD = 999  # outside of every vocabulary here
SOURCE = Path(json.__file__).with_name("decoder.py").read_bytes()
LENGTHS = [37, 5, 23, 11, 41, 2, 19, 1, 29]
EXACT = {"rtol": 0, "atol": 0}


def text(lengths: list[int] = LENGTHS) -> list[Tensor]:
    """Documents of these lengths, one behind the other in a file of the standard library, as bytes."""
    return list(torch.tensor(list(SOURCE[: sum(lengths)])).split(lengths))


def documents(batch: dict[str, Any]) -> list[tuple[int, slice]]:
    """Row and place of each document of a packed batch, padding left out; told by where positions restart."""
    found = []
    for row, (ids, positions) in enumerate(zip(batch["input_ids"], batch["position_ids"].tolist(), strict=True)):
        starts = [i for i, position in enumerate(positions) if position == 0]
        places = [slice(*ends) for ends in zip(starts, [*starts[1:], len(positions)], strict=True)]
        found += [(row, place) for place in places if not ids[place].eq(PAD).all()]
    return found


def contents(batch: dict[str, Any]) -> Counter[tuple[int, ...]]:
    """The documents of a packed batch."""
    return Counter(tuple(batch["input_ids"][row, place].tolist()) for row, place in documents(batch))


# --- bins ---

sizes = st.integers(1, 40).flatmap(
    lambda longest: st.tuples(st.lists(st.integers(1, longest), max_size=60), st.just(longest))
)


@given(sizes)
def test_each_sequence_is_in_one_bin_and_no_bin_holds_too_much(sizes: tuple[list[int], int]) -> None:
    lengths, max_length = sizes
    bins = pack(lengths, max_length)
    assert sorted(i for one in bins for i in one) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in one) <= max_length for one in bins)
    assert pack(lengths, max_length) == bins


@given(st.lists(st.lists(st.integers(1, 29), max_size=6), min_size=1, max_size=20))
def test_bins_are_few_where_the_fewest_are_known(cuts: list[list[int]]) -> None:
    # full rows of 30 cut in pieces: they fit into as many bins as there were rows, and into no fewer
    edges = [sorted({0, 30, *inner}) for inner in cuts]
    lengths = [end - start for row in edges for start, end in zip(row, row[1:], strict=False)]
    assert len(cuts) <= len(pack(lengths, 30)) <= 11 / 9 * len(cuts) + 1


def fewest(lengths: list[int], max_length: int) -> int:
    """Bins that are needed, by trying everything."""

    @cache
    def needed(left: frozenset[int]) -> int:
        if not left:
            return 0
        first, *others = sorted(left)
        fitting = (
            {first, *more}
            for n in range(len(others) + 1)
            for more in combinations(others, n)
            if lengths[first] + sum(lengths[i] for i in more) <= max_length
        )
        return 1 + min(needed(left - one) for one in fitting)

    return needed(frozenset(range(len(lengths))))


@given(st.lists(st.integers(1, 20), max_size=7))
def test_bins_are_few_beside_all_that_can_be_tried(lengths: list[int]) -> None:
    best = fewest(lengths, 20)
    assert ceil(sum(lengths) / 20) <= best <= len(pack(lengths, 20)) <= 11 / 9 * best + 1


def test_a_sequence_goes_where_it_leaves_the_least_space() -> None:
    # 4 fits behind 7 alone; then 1 fits behind both, and 7 + 4 + 1 is full
    assert pack([1, 4, 7, 9], 12) == [[3], [2, 1, 0]]


@given(sizes, st.randoms())
def test_the_order_of_samples_does_not_change_which_lengths_meet(sizes: tuple[list[int], int], random: Any) -> None:
    lengths, max_length = sizes
    shuffled = random.sample(lengths, len(lengths))
    one, other = (
        [sorted(order[i] for i in chosen) for chosen in pack(order, max_length)] for order in (lengths, shuffled)
    )
    assert one == other


@pytest.mark.parametrize("wrong", [13, 0])
def test_a_sequence_that_does_not_fit_is_named(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"sequence 2 of 3 has {wrong} tokens, expected 1 to max_length=12.*Cut"):
        pack([12, 1, wrong], 12)


# --- batches ---

batches = st.lists(
    st.lists(st.tuples(st.integers(0, 50), st.integers(-100, 50)), min_size=1, max_size=13), min_size=1, max_size=12
)


@given(batches, st.sampled_from(["mask", "positions", "varlen"]))
def test_a_batch_holds_each_document_once_with_its_labels_and_positions(
    samples: list[list[tuple[int, int]]], attention: Any
) -> None:
    collate = PackingCollate(13, pad_token_id=PAD, ignore_index=-7, attention=attention)
    batch = collate([{"input_ids": [i for i, _ in one], "labels": [j for _, j in one]} for one in samples])
    found = []
    for row, place in documents(batch):
        ids, labels, positions = (batch[key][row, place].tolist() for key in ("input_ids", "labels", "position_ids"))
        assert positions == list(range(len(ids)))
        assert labels[0] == -7
        found.append([*zip(ids, labels, strict=True)][1:] + [(ids[0], 0)])
    assert sorted(found) == sorted(one[1:] + [(one[0][0], 0)] for one in samples)
    padding = batch["input_ids"] == PAD
    assert batch["labels"][padding].eq(-7).all()
    total = sum(map(len, samples))
    assert batch["input_ids"].numel() - padding.sum() == total
    rows = len(pack([len(one) for one in samples], 13))
    expected = (1, total) if attention == "varlen" else (rows, 13)
    for key in ("input_ids", "labels", "position_ids"):
        assert batch[key].shape == expected
        assert batch[key].dtype == torch.int64
        assert batch[key].is_contiguous()


def test_the_mask_lets_a_token_see_its_document_up_to_itself() -> None:
    batch = PackingCollate(17, pad_token_id=PAD)(text([7, 11, 3, 4]))
    mask, positions = batch["attention_mask"], batch["position_ids"].tolist()
    assert mask.shape == (2, 1, 17, 17)
    assert mask.dtype == torch.float32
    for row in range(2):
        for i in range(17):
            seen = [j for j in range(17) if mask[row, 0, i, j] == 0]
            assert seen == list(range(i - positions[row][i], i + 1))
    assert mask[mask != 0].eq(torch.finfo(torch.float32).min).all()


def test_varlen_gives_the_ends_of_documents_in_one_row() -> None:
    batch = PackingCollate(41, attention="varlen")(text())
    assert torch.equal(batch["input_ids"], torch.tensor([list(SOURCE[: sum(LENGTHS)])]))
    expected = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    for key in ("cu_seq_lens_q", "cu_seq_lens_k"):
        torch.testing.assert_close(batch[key], expected, **EXACT)
    assert batch["max_length_q"] == batch["max_length_k"] == 41
    assert "attention_mask" not in batch


@pytest.mark.parametrize(
    "kind", [torch.tensor, list, lambda ids: torch.tensor(ids).numpy(), lambda ids: {"input_ids": ids}]
)
def test_samples_may_be_tensors_lists_arrays_or_mappings(kind: Any) -> None:
    batch = PackingCollate(8, pad_token_id=PAD)([kind([5, 6, 7]), kind([]), kind([8])])
    assert contents(batch) == Counter([(5, 6, 7), (8,)])


def test_padding_that_a_sample_brings_is_taken_away() -> None:
    left = {"input_ids": [0, 0, 5, 6], "labels": [-100, -100, 1, 2], "attention_mask": [0, 0, 1, 1]}
    right = {"input_ids": [7, 8, 9, 0], "attention_mask": [1, 1, 1, 0]}
    batch = PackingCollate(5)([left, right])
    assert batch["input_ids"].tolist() == [[7, 8, 9, 5, 6]]
    assert batch["labels"].tolist() == [[-100, 8, 9, -100, 2]]


def test_labels_of_a_sample_stay_as_they_are() -> None:
    labels = torch.tensor([5, 6, 7])
    PackingCollate(4)([{"input_ids": [5, 6, 7], "labels": labels}])
    assert labels.tolist() == [5, 6, 7]


def tokenize(samples: list[str]) -> dict[str, Tensor]:
    """A ``collate_fn`` like many: it reads text, pads to a fixed length, and answers have labels alone."""
    ids = torch.zeros(len(samples), 9, dtype=torch.long)
    for row, sample in zip(ids, samples, strict=True):
        row[: len(sample)] = torch.tensor(list(sample.encode()))
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.where(ids > ord("="), -100)}


def test_a_collate_function_turns_each_sample_into_a_document() -> None:
    batch = PackingCollate(9, collate_fn=tokenize)(["1+2=c", "3=c"])
    assert bytes(batch["input_ids"][0].tolist()) == b"1+2=c3=c\0"
    assert batch["labels"].tolist() == [[-100] * 4 + [99] + [-100] * 2 + [99, -100]]


def test_a_collate_function_may_make_several_documents_of_a_sample() -> None:
    collate = PackingCollate(9, pad_token_id=PAD, collate_fn=lambda samples: torch.stack(samples).view(2, 4))
    assert contents(collate([torch.arange(8)])) == Counter([(0, 1, 2, 3), (4, 5, 6, 7)])


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([[1, 2], [1, 2, 3, 4]], "sequence 1 of 2 has 4 tokens, expected 1 to max_length=3"),
        ([[], []], "none of 2 samples has a token"),
        ([{"input_ids": [1], "idx": 0}], r"a sample has \['idx', 'input_ids'\], expected input_ids and at most labels"),
        ([{"tokens": [1]}], r"a sample has \['tokens'\]"),
        (["text"], "input_ids of a sample must be integers, got str"),
        ([[0.5]], r"input_ids of a sample must be integers \(tokens,\), got torch.float32 \(1,\)"),
        ([[[[1, 2]]]], r"got torch.int64 \(1, 1, 2\)"),
        ([{"input_ids": [1, 2], "labels": [1]}], r"\(1, 2\) input_ids, \(1, 1\) labels"),
    ],
)
@pytest.mark.parametrize("attention", ["mask", "varlen"])
def test_samples_that_cannot_be_packed_are_refused(samples: list[Any], message: str, attention: Any) -> None:
    with pytest.raises(ValueError, match=message):
        PackingCollate(3, attention=attention)(samples)


def test_an_unknown_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of 'mask', 'positions', 'varlen', got 'flash'"):
        PackingCollate(3, attention="flash")


# --- models ---

WIDE = {"vocab_size": 256, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
MODELS: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "mistral": {**WIDE, "num_key_value_heads": 3, "sliding_window": 5},
    "qwen2": {**WIDE, "num_key_value_heads": 1},
    "gpt2": {"vocab_size": 256, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 64},
}


def model(name: str, implementation: str = "sdpa", **overrides: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(name, **MODELS[name], **overrides)
    made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():  # transformers starts so small that tokens hardly look at each other
        for name, parameter in made.named_parameters():
            parameter.mul_(1 if "norm" in name or "ln_" in name else 5)
    return made


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *((name, attention) for name in ("llama", "qwen2", "gpt2") for attention in ("mask", "positions", "varlen")),
        ("mistral", "positions"),
        ("mistral", "varlen"),
    ],
)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_logits_are_those_of_each_document_alone(name: str, attention: Any, implementation: str) -> None:
    network, inputs = model(name, implementation), text()
    batch = PackingCollate(43, pad_token_id=PAD, attention=attention)(inputs)
    batch["input_ids"][batch["input_ids"] == PAD], pad = 7, batch["input_ids"] == PAD
    with torch.no_grad():
        packed = network(**batch).logits
        alone = {tuple(one.tolist()): network(input_ids=one[None]).logits[0] for one in inputs}
    batch["input_ids"][pad] = PAD
    places = documents(batch)
    assert len(places) == len(inputs)
    for row, place in places:
        expected = alone[tuple(batch["input_ids"][row, place].tolist())]
        torch.testing.assert_close(packed[row, place], expected, rtol=1e-5, atol=1e-5)  # sums in another order


def test_the_mask_hides_a_sliding_window_as_the_docstring_says() -> None:
    network, inputs = model("mistral"), text([11, 4])
    with torch.no_grad():
        packed = network(**PackingCollate(15)(inputs)).logits[0]
        alone = network(input_ids=inputs[0][None]).logits[0]
    torch.testing.assert_close(packed[:5], alone[:5], rtol=1e-5, atol=1e-5)
    assert (packed[5:11] - alone[5:]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("attention", ["mask", "positions", "varlen"])
def test_loss_and_gradients_are_those_of_the_documents_by_their_tokens(name: str, attention: Any) -> None:
    network, inputs = inject(model(name), LoRA(r=2)), text()
    trained = {key: value for key, value in network.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for value in trained.values():
            value.add_(0.1 * torch.randn_like(value))  # away from the start, where lora_A has no gradient
    packed = network(**PackingCollate(43, attention=attention)(inputs)).loss
    packed.backward()
    gradients = {key: value.grad.clone() for key, value in trained.items()}

    network.zero_grad()
    summed = [
        F.cross_entropy(network(input_ids=one[None]).logits[0, :-1], one[1:], reduction="sum")
        for one in inputs
        if len(one) > 1
    ]
    alone = sum(summed) / (sum(LENGTHS) - len(LENGTHS))
    alone.backward()
    # float32, sums in another order
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    for key, value in trained.items():
        assert value.grad.abs().max() > 1e-3
        torch.testing.assert_close(gradients[key], value.grad, rtol=1e-5, atol=1e-5)


def test_an_attention_that_knows_the_ends_alone_keeps_documents_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    modeling = pytest.importorskip("transformers.modeling_utils")

    def by_ends(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        assert attention_mask is None
        assert torch.equal(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"])
        ends = kwargs["cu_seq_lens_q"].tolist()
        assert max(b - a for a, b in zip(ends, ends[1:], strict=False)) == kwargs["max_length_q"]
        parts = [
            F.scaled_dot_product_attention(*(x[:, :, a:b] for x in (query, key, value)), is_causal=True)
            for a, b in zip(ends, ends[1:], strict=False)
        ]
        return torch.cat(parts, dim=2).transpose(1, 2), None

    monkeypatch.setitem(modeling.ALL_ATTENTION_FUNCTIONS._global_mapping, "by_ends", by_ends)
    network, inputs = model("llama", "by_ends"), text()
    with torch.no_grad():
        packed = network(**PackingCollate(41, attention="varlen")(inputs)).logits[0].split(LENGTHS)
        network.set_attn_implementation("eager")
        for ours, one in zip(packed, inputs, strict=True):
            torch.testing.assert_close(ours, network(input_ids=one[None]).logits[0], rtol=1e-5, atol=1e-5)


# --- loaders ---


def lines(shuffle: bool = True, **options: Any) -> DataLoader:
    """26 documents of 1 to 13 tokens, in batches of 4; all different."""
    rows = [torch.arange(20 * i, 20 * i + 1 + i % 13) for i in range(26)]
    options = {"batch_size": 4, "shuffle": shuffle, "collate_fn": list, **options}
    return DataLoader(StackDataset(input_ids=rows), generator=torch.Generator().manual_seed(5), **options)


class Data(L.LightningDataModule):
    """Whatever loaders it is given."""

    def __init__(self, train: Any, val: Any = None) -> None:
        super().__init__()
        self.train, self.val = train, val

    def train_dataloader(self) -> Any:
        return self.train

    def val_dataloader(self) -> Any:
        return self.val


def padded(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return SourceFunctionsData.collate_fn(samples)


@pytest.mark.parametrize("collate", [None, padded])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_packed_batch_holds_the_samples_of_the_users_batch(collate: Any, workers: int) -> None:
    made = lines(collate_fn=collate, num_workers=workers)
    packing = PackedData(Data(made), max_length=17, pad_token_id=PAD)
    two_epochs = [contents(batch) for _ in range(2) for batch in packing.train_dataloader()]
    reference = lines(num_workers=workers)
    expected = [Counter(tuple(s["input_ids"].tolist()) for s in batch) for _ in range(2) for batch in reference]
    assert two_epochs == expected
    assert expected[:7] != expected[7:]
    assert made.collate_fn is (collate or lines(collate_fn=None).collate_fn)  # the user's loader is left alone


def test_two_ranks_with_a_distributed_sampler_share_the_documents() -> None:
    found: Counter[tuple[int, ...]] = Counter()
    for rank in range(2):
        sampler = DistributedSampler(lines().dataset, num_replicas=2, rank=rank, seed=3)
        loader = PackedData(
            Data(lines(shuffle=False, sampler=sampler, collate_fn=None)), max_length=13, pad_token_id=PAD
        )
        for batch in loader.train_dataloader():
            found += contents(batch)
    assert found == Counter(tuple(row["input_ids"].tolist()) for row in lines().dataset)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([torch.arange(1, n) for n in range(2, 9)])


def test_a_stream_is_packed_too() -> None:
    packing = PackedData(Data(DataLoader(Stream(), batch_size=3)), max_length=8, pad_token_id=PAD)
    assert [len(documents(batch)) for batch in packing.train_dataloader()] == [3, 3, 1]


class Full(Data):
    """Overrides more."""

    def setup(self, stage: str) -> None:
        self.stage = stage

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return "transferred"


def test_hooks_are_those_of_the_datamodule_and_no_others() -> None:
    inner = Full(lines())
    inner.prepare_data_per_node, inner.allow_zero_length_dataloader_with_multiple_devices = False, True
    packing = PackedData(inner, max_length=13)
    packing.setup("fit")
    assert inner.stage == "fit"
    assert packing.on_after_batch_transfer(None, 0) == "transferred"
    assert packing.prepare_data_per_node is False
    assert packing.allow_zero_length_dataloader_with_multiple_devices is True
    packing.trainer = trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert inner.trainer is trainer is packing.trainer
    # with a state of its own, a run that goes on would not be brought back to its place
    hooks = ["setup", "on_after_batch_transfer", "state_dict", "test_dataloader", "transfer_batch_to_device"]
    assert [is_overridden(hook, packing) for hook in hooks] == [True, True, False, False, False]


def test_only_the_chosen_loaders_are_packed() -> None:
    val = {"a": lines(), "b": [lines()]}
    assert PackedData(Data(lines(), val), max_length=13).val_dataloader() is val
    packing = PackedData(Data(lines(), val), max_length=13, loaders=["val"], attention="varlen")
    assert type(packing.train_dataloader().collate_fn) is type
    made = packing.val_dataloader()
    for loader in (made["a"], made["b"][0]):
        assert loader.collate_fn == PackingCollate(13, attention="varlen", collate_fn=list)


@pytest.mark.parametrize(
    ("train", "arguments", "message"),
    [
        (lines(), {"attention": "flash"}, "attention must be one of"),
        (
            lines(),
            {"loaders": ["train", "test"]},
            r"some of \['train', 'val'\], which Data defines, got \['train', 'te",
        ),
        (lines(), {"loaders": []}, r"loaders must name some of .*got \[\]"),
        (lines(batch_size=None, shuffle=False), {}, "Data gives a DataLoader to pack.*Give it a batch_size"),
        ([[1, 2]], {}, "Data gives a int to pack, expected a DataLoader"),
    ],
)
def test_what_cannot_be_packed_is_refused(train: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        PackedData(Data(train), max_length=13, **arguments).train_dataloader()


def test_it_survives_pickling_as_its_own() -> None:
    packing = pickle.loads(pickle.dumps(PackedData(Data(lines(collate_fn=None)), max_length=13)))
    packing.trainer = trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert packing.train_dataloader.args[0].__self__ is packing.datamodule
    assert packing.datamodule.trainer is trainer
    assert len(list(packing.train_dataloader())) == 7


# --- in a Trainer ---

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
]


def functions() -> SourceFunctionsData:
    return SourceFunctionsData(package="argparse", max_length=61, batch_size=17)


def packed(**arguments: Any) -> PackedData:
    return PackedData(functions(), max_length=193, **arguments)


class Losses(L.Callback):
    """Of each training step, and what validation said."""

    def __init__(self) -> None:
        self.train: list[float] = []
        self.val: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.train.append(outputs["loss"].item())

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.val.append(trainer.callback_metrics["val_loss"].item())


def fitted(
    data: L.LightningDataModule, *callbacks: L.Callback, dropout: float = 0.0, ckpt_path: Any = None, **options: Any
) -> CausalLM:
    """A small Llama with LoRA, two epochs of the functions in ``argparse``."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    module = CausalLM(config={"model_type": "llama", **MODELS["llama"]}, lr=0.03)
    adapted = PEFT(LoRA(r=2, dropout=dropout, modules_to_save="output-head"), summary=False)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    saving = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    options = {"max_epochs": 2, "enable_checkpointing": saving, **quiet, **options}
    L.Trainer(callbacks=[adapted, *callbacks], **options).fit(module, data, ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("attention", ["mask", "positions", "varlen"])
def test_training_sees_the_losses_that_padding_gives(attention: Any) -> None:
    ours, padding = Losses(), Losses()
    fitted(packed(attention=attention, loaders=["train", "val"]), ours)
    fitted(functions(), padding)
    assert len(ours.train) == len(padding.train) > 10
    # float32, sums in another order, over all steps
    assert ours.train == pytest.approx(padding.train, rel=1e-4)
    assert ours.val == pytest.approx(padding.val, rel=1e-4)
    assert ours.val[-1] < 0.8 * ours.val[0]


def test_a_run_that_goes_on_in_an_epoch_ends_where_an_uninterrupted_one_ends(tmp_path: Path) -> None:
    each = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)
    through = fitted(packed(), each, Losses(), dropout=0.2).state_dict()
    other = fitted(packed(), dropout=0.2, max_epochs=1).state_dict()
    for step in (3, 9):  # in the first epoch, and in the second
        again = fitted(packed(), dropout=0.2, ckpt_path=tmp_path / f"step={step}.ckpt").state_dict()
        assert again.keys() == through.keys()
        assert [key for key, value in through.items() if not torch.equal(value, again[key])] == []
    assert not all(torch.equal(value, other[key]) for key, value in through.items())


def test_a_sampler_of_the_trainer_keeps_the_packing() -> None:
    # as under distributed strategies, the Trainer makes the loader anew
    seen: list[Any] = []

    class Seen(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch)

    with pytest.warns(UserWarning, match="requested to overfit but enabled train dataloader shuffling"):
        fitted(packed(), Seen(), overfit_batches=1, max_epochs=1, limit_val_batches=0)
    (batch,) = seen
    data = functions()
    data.setup()
    first = Counter(tuple(data.splits["train"][i]["input_ids"].tolist()) for i in range(17))
    assert batch["input_ids"].shape == (6, 193)
    assert first <= contents(batch)
    assert {token for padding in contents(batch) - first for token in padding} == {0}


def test_the_mask_serves_models_in_bfloat16() -> None:
    single, half = Losses(), Losses()
    fitted(packed(), single, max_steps=3, limit_val_batches=0)
    fitted(packed(), half, max_steps=3, limit_val_batches=0, precision="bf16-true")
    assert half.train == pytest.approx(single.train, rel=0.02)  # 8 bits


def test_yaml_can_build_it() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    inner = {"class_path": "SourceFunctionsData", "init_args": {"package": "json"}}
    arguments = {"datamodule": inner, "max_length": 512, "loaders": ["train", "val"], "attention": "positions"}
    built = parser.instantiate(parser.parse_object({"data": {"class_path": "PackedData", "init_args": arguments}})).data
    assert built.datamodule.package == "json"
    assert built.collate == PackingCollate(512, attention="positions")
