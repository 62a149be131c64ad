"""The image recipe: the splits of the digits, what invert and rotate do, and where the weights come from."""

import json
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from lightning_peft.recipes import DigitsData, ImageClassifier

VIT = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 12, "depth": 2, "num_heads": 3}


def vit(**overrides):
    torch.manual_seed(0)
    return ImageClassifier(**{"model_name": "vit_tiny_patch16_224", "num_classes": 7, "model_kwargs": VIT} | overrides)


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
    data = DigitsData(**arguments)
    data.setup()
    return data


def images_of(data):
    """The images of all three splits as a sorted list of bytes, which no shuffling can change."""
    return sorted(image.numpy().tobytes() for split in data.splits.values() for image in split.tensors[0])


def write(path, module, **metadata):
    save_file(module.model.state_dict(), path, metadata)
    return str(path)


# --- digits ---


def test_splits_share_no_image_and_lose_none():
    data = ready(digits=(1, 4, 9))
    labels = load_digits().target
    assert len(set(images_of(data))) == len(images_of(data)) == np.isin(labels, (1, 4, 9)).sum()
    sizes = {name: len(split) for name, split in data.splits.items()}
    assert sizes["val"] == sizes["test"] == round(0.15 * sum(sizes.values()))


def test_splits_hold_equal_shares_of_each_class():
    data = ready()
    total = np.bincount(load_digits().target)
    for split in data.splits.values():
        share = len(split) / total.sum()
        counts = np.bincount(split.tensors[1], minlength=10)
        assert np.abs(counts - share * total).max() < 1.5  # rounding, once for each of the two cuts


def test_halves_share_no_image_and_make_up_the_whole():
    first, second, both = (images_of(ready(half=half)) for half in ("first", "second", "all"))
    assert not set(first) & set(second)
    assert sorted(first + second) == both


def test_labels_are_the_digits_themselves():
    data = ready(digits=(3, 8))
    assert {label for split in data.splits.values() for label in split.tensors[1].tolist()} == {3, 8}


@pytest.mark.parametrize("rotate", [-90, 0, 90, 180, 270])
@pytest.mark.parametrize("invert", [False, True])
def test_invert_and_rotate_do_what_numpy_does(invert, rotate):
    pixels = load_digits().images
    ink = np.rot90(16 - pixels if invert else pixels, rotate // 90, (1, 2)) / 16
    expected = ((ink - 0.305) / 0.376).astype(np.float32)
    got = np.stack([np.frombuffer(image, np.float32) for image in images_of(ready(invert=invert, rotate=rotate))])
    order, order_got = np.lexsort(expected.reshape(-1, 64).T), np.lexsort(got.T)
    np.testing.assert_allclose(got[order_got], expected.reshape(-1, 64)[order], atol=1e-6)


def test_upright_images_are_normalised():
    images = torch.cat([split.tensors[0] for split in ready().splits.values()])
    assert images.shape == (1797, 1, 8, 8)
    assert images.mean().abs() < 0.01
    assert abs(images.std() - 1) < 0.01


def test_same_seed_same_batches():
    one, same, other = ([images for images, _ in ready(seed=seed).train_dataloader()] for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])


def test_training_images_are_shuffled_anew_in_each_epoch_and_others_keep_their_order():
    data = ready(digits=(0, 1), half="first", batch_size=1000)
    train, val = data.train_dataloader(), data.val_dataloader()
    (first, _), (second, _) = next(iter(train)), next(iter(train))
    assert not torch.equal(first, second)
    assert torch.equal(next(iter(val))[0], data.splits["val"].tensors[0])
    data.seed += 1
    assert not torch.equal(first, next(iter(data.train_dataloader()))[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"digits": (1, 10)}, r"from 0 to 9, got \(1, 10\)"),
        ({"digits": (1, 1)}, r"different numbers.*got \(1, 1\)"),
        ({"digits": ()}, r"got \(\)"),
        ({"half": "third"}, "one of 'first', 'second', 'all', got 'third'"),
        ({"rotate": 45}, "multiple of 90 degrees, got 45"),
        ({"val_fraction": 0.5}, r"a number in \(0, 0\.5\), got 0\.5"),
        ({"val_fraction": 0.0}, r"a number in \(0, 0\.5\), got 0\.0"),
    ],
)
def test_wrong_digits_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DigitsData(**arguments)


# --- classifier ---


def test_loss_falls_and_the_learning_rate_ends_at_zero():
    module, data = vit(num_classes=3, lr=1e-2), ready(digits=(0, 1, 2))
    run = trainer(max_epochs=5)
    before = run.validate(module, data, verbose=False)[0]
    run.fit(module, data)
    assert run.callback_metrics["val_loss"] < 0.7 * before["val_loss"]
    assert run.callback_metrics["val_acc"] > before["val_acc"]
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    assert set(run.callback_metrics) == {"train_loss", "val_loss", "val_acc"}


def test_logged_values_are_averages_over_images_not_over_batches():
    # 95 images in batches of 64 leave a last batch of 31
    module, data, run = vit(), ready(digits=tuple(range(7)), half="first"), trainer()
    logged = run.validate(module, data, verbose=False)[0] | run.test(module, data, verbose=False)[0]
    module.eval()
    with torch.no_grad():
        for stage in ("test", "val"):
            images, labels = data.splits[stage].tensors
            accuracy = (module(images).argmax(1) == labels).float().mean().item()
            assert logged[f"{stage}_acc"] == pytest.approx(accuracy, rel=1e-6)
        loss = torch.nn.functional.cross_entropy(module(images), labels).item()
    assert logged["val_loss"] == pytest.approx(loss, rel=1e-5)


def test_frozen_parameters_stay_out_of_the_optimizer():
    module, run = vit(), trainer(max_steps=1, limit_val_batches=0)
    module.model.blocks.requires_grad_(False)
    run.fit(module, ready(digits=(0, 1, 2)))
    chosen = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert chosen == {id(p) for name, p in module.named_parameters() if "blocks" not in name}


@pytest.mark.parametrize("model_name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_checkpoint_gives_the_backbone_and_a_fresh_head_of_the_new_size(tmp_path, model_name):
    source = vit(model_name=model_name)
    file = write(tmp_path / "vit.safetensors", source, model_kwargs=json.dumps(VIT))
    with torch.random.fork_rng():
        adapted = vit(model_name=model_name, num_classes=10, checkpoint=file)
    saved, loaded = load_file(file), adapted.model.state_dict()
    assert saved.keys() == loaded.keys()
    for name, tensor in saved.items():
        if name.startswith("head"):
            assert loaded[name].shape == (10, *tensor.shape[1:])
        else:
            assert torch.equal(loaded[name], tensor), name


def test_checkpoint_with_the_same_classes_keeps_its_head(tmp_path):
    source = vit()
    torch.nn.init.normal_(source.model.head.weight)
    loaded = vit(checkpoint=write(tmp_path / "vit.safetensors", source)).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in source.model.state_dict().items())


def test_checkpoint_without_a_head_gives_the_backbone(tmp_path):
    source = vit()
    source.model.reset_classifier(0)
    adapted = vit(num_classes=5, checkpoint=write(tmp_path / "features.safetensors", source))
    assert adapted(torch.zeros(2, 1, 8, 8)).shape == (2, 5)
    assert torch.equal(adapted.model.pos_embed, source.model.pos_embed)


def test_colour_filters_are_summed_for_grey_images(tmp_path):
    source = vit(model_kwargs=VIT | {"in_chans": 3})
    adapted = vit(checkpoint=write(tmp_path / "colour.safetensors", source))
    summed = source.model.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(adapted.model.patch_embed.proj.weight, summed)


def test_hyperparameters_and_weights_survive_load_from_checkpoint(tmp_path):
    module = vit(lr=0.03, num_classes=4)
    data, run = ready(digits=(0, 1, 2, 3), half="first"), trainer(max_steps=2, limit_val_batches=0)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = ImageClassifier.load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu")
    assert dict(again.hparams) == dict(module.hparams)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


def test_missing_checkpoint_is_named():
    with pytest.raises(FileNotFoundError, match=r"no file 'nowhere\.safetensors'.*Relative paths start at"):
        vit(checkpoint="nowhere.safetensors")


def test_checkpoint_of_another_model_is_refused(tmp_path):
    file = write(tmp_path / "vit.safetensors", vit())
    with pytest.raises(ValueError, match=r"(?s)does not fit model_name='vit_tiny_patch16_224'.*blocks\.2"):
        vit(checkpoint=file, model_kwargs=VIT | {"depth": 3})
    with pytest.raises(ValueError, match="does not fit model_name='resnet10t'"):
        vit(checkpoint=file, model_name="resnet10t", model_kwargs={"in_chans": 1})


def test_file_that_is_no_safetensors_is_refused(tmp_path):
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"junk\.safetensors' does not fit"):
        vit(checkpoint=str(tmp_path / "junk.safetensors"))


def test_two_sources_of_weights_are_refused():
    with pytest.raises(ValueError, match="two sources of weights"):
        vit(checkpoint="some.safetensors", pretrained=True)


def test_missing_timm_gives_the_install_hint(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'pip install "lightning_peft\[vision\]"'):
        vit()


def test_tutorial_checkpoint_builds_from_its_own_metadata():
    file = Path(__file__).parents[2] / "tutorials" / "checkpoints" / "vit_digits.safetensors"
    with safe_open(file, "pt") as opened:
        facts = opened.metadata()
    classes = int(facts["num_classes"])
    module = ImageClassifier(
        model_name=facts["model_name"],
        model_kwargs=json.loads(facts["model_kwargs"]),
        num_classes=classes,
        checkpoint=str(file),
    )
    # the half that the weights have never seen
    data = ready(digits=tuple(range(classes)), half="second")
    assert trainer().test(module, data, verbose=False)[0]["test_acc"] > 0.93


def test_yaml_can_build_both():
    parser = ArgumentParser()
    parser.add_class_arguments(ImageClassifier, "model")
    parser.add_class_arguments(DigitsData, "data")
    model = {"model_name": "vit_tiny_patch16_224", "num_classes": 3, "model_kwargs": VIT}
    config = parser.parse_object({"model": model, "data": {"digits": [0, 2], "half": "first", "rotate": 90}})
    built = parser.instantiate(config)
    assert built.data.digits == (0, 2)
    assert built.model.hparams["model_kwargs"] == VIT
