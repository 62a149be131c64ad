"""The text recipe: which bytes a window holds, what is predicted from what, and how values are averaged."""

import inspect
import json
import sys
import sysconfig
from pathlib import Path

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from torch.nn import functional as F

from lightning_peft.recipes import CausalLM, SourceCodeData, SourceFunctionsData

STDLIB = Path(sysconfig.get_paths()["stdlib"])
LLAMA = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
}


def llama(**overrides):
    torch.manual_seed(0)
    return CausalLM(**{"config": LLAMA} | overrides)


def trainer(**overrides):
    return L.Trainer(
        **{
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        | overrides
    )


def ready(**arguments):
    data = SourceCodeData(**{"seq_len": 32, "package": "json", "max_bytes": 9000} | arguments)
    data.setup()
    return data


def windows_of(data):
    return [bytes(row["input_ids"].tolist()) for split in data.splits.values() for row in split]


# --- source code ---


def test_windows_are_the_bytes_of_the_files_each_once():
    source = b"".join(path.read_bytes() for path in sorted((STDLIB / "json").rglob("*.py")))[:9000]
    expected = [source[start : start + 32] for start in range(0, 9000 - 31, 32)]
    assert sorted(windows_of(ready())) == sorted(expected)


def test_splits_have_the_asked_sizes():
    sizes = {name: len(split) for name, split in ready(val_fraction=0.2).splits.items()}
    assert sizes == {"val": 56, "test": 56, "train": 169}  # of 281 windows


def test_model_predicts_the_next_byte_of_the_file():
    batch = next(iter(ready().val_dataloader()))
    module = llama()
    window = windows_of(ready())[0]
    assert bytes(batch["input_ids"][0].tolist()) == window
    output = module(**batch)
    following = torch.tensor([list(bytes(row.tolist())[1:]) for row in batch["input_ids"]])
    assert following[0].tolist() == list(window[1:])
    # the answer at position t is byte t + 1, and the last position has none
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), following.flatten())
    torch.testing.assert_close(output.loss, expected)


def test_later_bytes_do_not_change_earlier_answers():
    module, ids = llama().eval(), torch.arange(20).unsqueeze(0)
    changed = ids.clone()
    changed[0, 13:] = 99
    before, after = module(input_ids=ids).logits, module(input_ids=changed).logits
    torch.testing.assert_close(before[:, :13], after[:, :13])
    assert not torch.allclose(before[:, 13], after[:, 13])


def test_same_seed_same_batches():
    one, same, other = ([batch["input_ids"] for batch in ready(seed=seed).train_dataloader()] for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])


def test_a_module_of_one_file_can_be_chosen():
    assert SourceCodeData(package="argparse").files == [STDLIB / "argparse.py"]


def test_all_modules_come_in_the_order_of_their_names():
    names = [path.name for path in SourceCodeData().files]
    assert names == sorted(names)
    assert {"ast.py", "typing.py"} <= set(names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"package": "emial"}, "'emial' has no Python source.*Nearest names: email"),
        ({"package": "torch"}, "'torch' has no Python source"),
        ({"package": "_csv"}, "'_csv' has no Python source"),
        ({"seq_len": 1}, "seq_len must be an integer >= 2, got 1"),
        ({"val_fraction": 0.7}, r"a number in \(0, 0\.5\), got 0\.7"),
        ({"max_bytes": 100}, r"3 windows of 32 bytes are too few.*max_bytes \(now 100\)"),
    ],
)
def test_wrong_source_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ready(**arguments)


# --- functions ---


def functions_of(**arguments):
    data = SourceFunctionsData(**{"package": "json", "max_length": 20_000} | arguments)
    data.setup()
    return {name: [bytes(row["input_ids"].tolist()) for row in split] for name, split in data.splits.items()}


def test_samples_are_functions_and_methods_each_once():
    samples = sum(functions_of().values(), [])
    known = [json.dumps, json.decoder.py_scanstring, json.JSONEncoder.default, json.encoder._make_iterencode]
    assert all(inspect.getsource(function).encode() in samples for function in known)
    assert len(set(samples)) == len(samples)
    assert not [sample for sample in samples if sample.lstrip().startswith(b"def _iterencode_list(")]  # it is inside


def test_long_functions_lose_their_end_and_splits_have_the_asked_sizes():
    whole, cut = functions_of(val_fraction=0.2), functions_of(val_fraction=0.2, max_length=200)
    assert {name: [row[:200] for row in rows] for name, rows in whole.items()} == cut
    assert len(whole["val"]) == len(whole["test"]) == round(0.2 * sum(map(len, whole.values())))


def test_functions_come_padded_to_the_longest_of_a_batch():
    data = SourceFunctionsData(package="json", batch_size=3, max_length=20_000)
    data.setup()
    batch = next(iter(data.val_dataloader()))
    rows = [row["input_ids"] for row in data.splits["val"]][:3]
    assert batch["input_ids"].shape[1] == max(map(len, rows))
    for i, row in enumerate(rows):
        assert torch.equal(batch["input_ids"][i][batch["attention_mask"][i].bool()], row)
        assert torch.equal(batch["labels"][i][: len(row)], row)
        assert batch["labels"][i][len(row) :].eq(-100).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"package": "jsno"}, "'jsno' has no Python source.*Nearest names: json"),
        ({"max_length": 1}, "max_length must be an integer >= 2, got 1"),
        ({"val_fraction": 0.01}, "functions are too few for three splits. Raise val_fraction"),
    ],
)
def test_wrong_function_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        functions_of(**arguments)


# --- language model ---


def test_loss_falls_in_a_few_steps():
    module, data, run = llama(lr=2e-2), ready(), trainer(max_epochs=2)
    before = run.validate(module, data, verbose=False)[0]
    run.fit(module, data)
    assert run.callback_metrics["val_loss"] < 0.8 * before["val_loss"]
    assert set(run.callback_metrics) == {"train_loss", "val_loss", "val_perplexity"}


def test_perplexity_and_loss_are_averages_over_tokens():
    # 28 windows in batches of 5 leave a last batch of 3
    module, data, run = llama(), ready(batch_size=5), trainer()
    logged = run.validate(module, data, verbose=False)[0] | run.test(module, data, verbose=False)[0]
    for stage in ("val", "test"):
        ids = torch.stack([row["input_ids"] for row in data.splits[stage]])
        loss = module(input_ids=ids, labels=ids).loss
        assert logged[f"{stage}_loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert logged[f"{stage}_perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)


def test_padding_counts_neither_in_the_loss_nor_in_its_weight():
    torch.manual_seed(1)
    ids = torch.randint(256, (5, 16))
    labels = ids.clone()
    labels[1, 4:] = -100
    rows = [{"input_ids": i, "labels": j} for i, j in zip(ids, labels, strict=True)]
    loader = torch.utils.data.DataLoader(rows, batch_size=2)
    logged = trainer().validate(module := llama(), loader, verbose=False)[0]
    loss = module(input_ids=ids, labels=labels).loss
    assert logged["val_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert logged["val_perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)


def test_pretrained_folder_gives_the_same_weights(tmp_path):
    source = llama()
    source.model.save_pretrained(tmp_path)
    loaded = CausalLM(pretrained=str(tmp_path))
    saved, got = source.model.state_dict(), loaded.model.state_dict()
    assert saved.keys() == got.keys()
    assert all(torch.equal(saved[name], got[name]) for name in saved)


def test_hyperparameters_and_weights_survive_load_from_checkpoint(tmp_path):
    module, run = llama(lr=0.03), trainer(max_steps=2, limit_val_batches=0)
    run.fit(module, ready())
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = CausalLM.load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu")
    assert dict(again.hparams) == dict(module.hparams)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": None}, "either pretrained or config, got None and None"),
        ({"pretrained": "somewhere"}, "either pretrained or config, got 'somewhere' and"),
        ({"config": {"hidden_size": 12}}, r"config needs a model_type.*got \['hidden_size'\]"),
    ],
)
def test_wrong_model_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        llama(**arguments)


def test_missing_transformers_gives_the_install_hint(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "lightning_peft\[text\]"'):
        llama()


def test_yaml_can_build_both():
    parser = ArgumentParser()
    parser.add_class_arguments(CausalLM, "model")
    parser.add_class_arguments(SourceCodeData, "data")
    config = parser.parse_object({"model": {"config": LLAMA, "lr": 0.1}, "data": {"package": "json"}})
    built = parser.instantiate(config)
    assert built.model.model.config.model_type == "llama"
    assert built.data.files == sorted((STDLIB / "json").rglob("*.py"))
