"""LoRA files go both ways between diffusers and here; its own classes load them, and make the same pictures."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_peft import (
    SALT,
    SSF,
    BitFit,
    DoRA,
    LinearProbe,
    LoKr,
    LoRA,
    PiSSA,
    inject,
    load_adapter,
    save_adapter,
)
from lightning_peft.engine import METHODS, AdapterError, AdapterFileError, adapters_of
from lightning_peft.interop import read_adapter
from tests.methods.backbones import BACKBONES, assert_unchanged, backbone, call, kept, moved, snapshot, suited, tiny
from tests.pipelines import Parts, picture, pipeline, seeded, unet, vae

WEIGHTS = "pytorch_lora_weights.safetensors"
# both add the same products to the same layers in float32, in another order
CLOSE = {"rtol": 0, "atol": 1e-5}

pytestmark = [
    # schedulers ask for the settings of their released checkpoints
    pytest.mark.filterwarnings("ignore:.*scheduler:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


METHODS_HERE = [
    LoRA(r=2, alpha=6.0, target_modules=("to_q", "to_v")),
    LoRA(
        r=3,
        alpha=5.0,
        use_rslora=True,
        target_modules=("to_q", "proj_in", "conv1", "conv_in", "conv"),
        rank_pattern={"conv1": 2},
        alpha_pattern={"proj_in": 9.0},
    ),
    DoRA(r=2, alpha=3.0, target_modules=("to_k", "conv1", "proj_out"), rank_pattern={"proj_out": 1}),
    PiSSA(r=2, alpha=3.0, rank_pattern={"to_v": 1}),
]
each_method = pytest.mark.parametrize("method", METHODS_HERE, ids=["lora", "patterns", "dora", "pissa"])


def adapted(method: Any) -> Any:
    return moved(inject(unet(), method))


def output(model: Any) -> Tensor:
    text = torch.linspace(-1, 1, 4 * 5 * 6).reshape(4, 5, 6)
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return model(noise, torch.tensor([3, 5, 3, 5]), encoder_hidden_states=text).sample


@each_method
def test_a_pipeline_makes_the_same_pictures(method: Any, tmp_path: Path) -> None:
    ours, theirs = pipeline(), pipeline()
    before = picture(theirs)
    moved(inject(ours.unet, method))
    save_adapter(ours.unet, tmp_path, format="diffusers")
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]
    theirs.load_lora_weights(str(tmp_path))
    assert not torch.allclose(picture(ours), before, atol=1e-3)
    torch.testing.assert_close(picture(theirs), picture(ours), **CLOSE)


@each_method
@pytest.mark.parametrize("as_state_dict", [False, True], ids=["file", "tensors alone"])
def test_a_model_of_diffusers_loads_it(method: Any, as_state_dict: bool, tmp_path: Path) -> None:
    model, theirs = adapted(method), unet()
    save_adapter(model, tmp_path, format="diffusers")
    source = load_file(tmp_path / WEIGHTS) if as_state_dict else str(tmp_path)
    theirs.load_lora_adapter(source, prefix="unet", weight_name=WEIGHTS, use_safetensors=True)
    torch.testing.assert_close(output(theirs), output(model), **CLOSE)


@each_method
def test_we_read_it_back(method: Any, tmp_path: Path) -> None:
    model = adapted(method)
    save_adapter(model, tmp_path, format="diffusers")
    loaded = load_adapter(unet(), tmp_path)
    torch.testing.assert_close(output(loaded), output(model), **CLOSE)
    assert_unchanged(load_adapter(loaded, tmp_path), snapshot(loaded))
    facts, _, _ = read_adapter(tmp_path)
    assert facts is not None
    assert facts["method"] == ("dora" if isinstance(method, DoRA) else "lora")


THEIRS = [
    LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "conv1"], rank_pattern={"conv1": 3}, use_rslora=True),
    LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "proj_in"], alpha_pattern={"to_q": 5}),
    LoraConfig(r=2, lora_alpha=3, target_modules=["to_k", "conv1"], use_dora=True),
]


def theirs_moved(config: Any) -> Any:
    model = unet()
    model.add_adapter(config)
    return moved(model)


@pytest.mark.parametrize("config", THEIRS, ids=["rslora", "alpha", "dora"])
def test_we_read_what_a_model_of_diffusers_saves(config: Any, tmp_path: Path) -> None:
    model = theirs_moved(config)
    model.save_lora_adapter(str(tmp_path))
    torch.testing.assert_close(output(load_adapter(unet(), tmp_path)), output(model), **CLOSE)


@pytest.mark.parametrize("with_metadata", [True, False])
def test_we_read_what_a_pipeline_of_diffusers_saves(with_metadata: bool, tmp_path: Path) -> None:
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    # without metadata both take the scaling for one
    alpha = 6 if with_metadata else 2
    model = theirs_moved(LoraConfig(r=2, lora_alpha=alpha, target_modules=["to_q", "conv1"]))
    facts = _collate_lora_metadata({"unet": model}) if with_metadata else {}
    diffusers.StableDiffusionPipeline.save_lora_weights(str(tmp_path), get_peft_model_state_dict(model), **facts)
    for target in (unet(), Parts(pipeline())):
        loaded = load_adapter(target, tmp_path)
        torch.testing.assert_close(output(getattr(loaded, "unet", loaded)), output(model), **CLOSE)


@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_parts_of_a_pipeline_are_told_apart(method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers asks for a newer HF PEFT than is there; what it does with it is the same
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    ours, theirs = pipeline(), pipeline()
    inner = (r"unet\..*(to_q|conv1)", r"text_encoder\..*(q_proj|fc1)")
    parts = moved(inject(Parts(ours), method(r=2, alpha=6.0, target_modules=inner, rank_pattern={"fc1": 1})))
    save_adapter(parts, tmp_path, format="diffusers")
    assert {key.partition(".")[0] for key in load_file(tmp_path / WEIGHTS)} == {"unet", "text_encoder"}
    theirs.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(picture(theirs), picture(ours), **CLOSE)
    again = pipeline()
    load_adapter(Parts(again), tmp_path)
    torch.testing.assert_close(picture(again), picture(ours), **CLOSE)
    before = snapshot(model := unet())
    with pytest.raises(AdapterFileError, match=r"adapts text_encoder; .* here: unet\. Load it into the model"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_transformer_is_written_under_its_name(name: str, tmp_path: Path) -> None:
    build, call = BACKBONES[name]
    model = moved(inject(seeded(lambda: build().double()), LoRA(r=5, clip_rank=True, alpha=3.0)))
    assert len({len(adapter.lora_A) for path, _, adapter in adapters_of(model) if path.endswith("proj_out")}) < 3
    save_adapter(model, tmp_path, format="diffusers")
    theirs = seeded(lambda: build().double())
    theirs.load_lora_adapter(str(tmp_path), prefix="transformer", weight_name=WEIGHTS, use_safetensors=True)
    torch.testing.assert_close(call(theirs), call(model), **CLOSE)
    torch.testing.assert_close(
        call(load_adapter(seeded(lambda: build().double()), tmp_path)), call(model), rtol=1e-6, atol=1e-7
    )


def test_a_name_that_ends_another_keeps_its_own_rank(tmp_path: Path) -> None:
    build, call = BACKBONES["flux"]

    def flux() -> Any:
        return seeded(lambda: build().double())

    method = LoRA(r=4, target_modules=r".*proj_out", rank_pattern={r"^proj_out": 2}, alpha_pattern={r"^proj_out": 5.0})
    model = moved(inject(flux(), method))
    assert [len(adapter.lora_A) for _, _, adapter in adapters_of(model)] == [4, 4, 2]
    for options in ({}, {"as_lora": True}, {"format": "diffusers"}):
        folder = save_adapter(model, tmp_path / str(len(options) + 7 * ("format" in options)), **options)
        torch.testing.assert_close(call(load_adapter(flux(), folder)), call(model), rtol=1e-6, atol=1e-7)
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(flux(), str(tmp_path / "0")).base_model.model.eval()
    torch.testing.assert_close(call(theirs), call(model), **CLOSE)
    theirs = flux()
    theirs.load_lora_adapter(str(folder), prefix="transformer", weight_name=WEIGHTS, use_safetensors=True)
    torch.testing.assert_close(call(theirs), call(model), **CLOSE)


def test_a_file_for_one_of_two_names_goes_to_that_one(tmp_path: Path) -> None:
    model = moved(inject(backbone("flux"), LoRA(r=2, target_modules=r"^proj_out")))
    save_adapter(model, tmp_path, format="diffusers")
    loaded = load_adapter(backbone("flux"), tmp_path)
    assert [path for path, _, _ in adapters_of(loaded)] == ["proj_out"]
    torch.testing.assert_close(call("flux", loaded), call("flux", model), **CLOSE)


def test_metadata_is_what_diffusers_makes_of_its_settings(tmp_path: Path) -> None:
    save_adapter(adapted(METHODS_HERE[1]), tmp_path, format="diffusers")
    with safe_open(tmp_path / WEIGHTS, framework="pt") as opened:
        metadata = json.loads(opened.metadata()["lora_adapter_metadata"])
        shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    settings = {key.removeprefix("unet."): value for key, value in metadata.items() if key.startswith("unet.")}
    assert len(settings) == len(metadata)
    config = LoraConfig(**settings)
    assert config.lora_alpha == config.r
    assert shapes["unet.down_blocks.0.resnets.0.conv1.lora_A.weight"] == (2, 8, 3, 3)
    assert shapes["unet.down_blocks.0.resnets.0.conv1.lora_B.weight"] == (8, 2, 1, 1)


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS.keys())
@pytest.mark.filterwarnings("ignore:.* is written in our own format:UserWarning")
def test_every_method_is_written_right_or_refused(cls: Any, tmp_path: Path) -> None:
    method = suited(cls, "sd3")
    if isinstance(method, AdapterError):
        return
    model = moved(inject(backbone("sd3"), method))
    refusal = None
    try:
        save_adapter(model, tmp_path / "new", format="diffusers")
    except AdapterFileError as error:
        refusal = str(error)
    if refusal is not None:
        assert re.search(r"\. (Save|.*save|.*merge)", refusal), "what happened, and what to do"
        assert not (tmp_path / "new").exists()
        return
    theirs = backbone("sd3")
    if cls.changes_base:  # diffusers does not know that form: the same values in full
        packed = dict(kept(backbone("sd3"), method).named_parameters())
        theirs.load_state_dict({key: packed[key] + 0 for key in packed}, strict=False)
    theirs.load_lora_adapter(str(tmp_path / "new"), prefix="transformer", weight_name=WEIGHTS, use_safetensors=True)
    torch.testing.assert_close(call("sd3", theirs), call("sd3", model), **CLOSE)


@pytest.mark.parametrize("method", [DoRA(r=2), LoKr(r=2), SALT(r=2)], ids=["dora", "lokr", "salt"])
def test_a_rank_makes_lora_of_any_change_of_weights(method: Any, tmp_path: Path) -> None:
    model = moved(inject(unet(), dataclasses.replace(method, target_modules=("to_q", "to_v"))))
    exact = save_adapter(model, tmp_path / "exact", format="diffusers", as_lora=100)
    theirs = unet()
    theirs.load_lora_adapter(str(exact), prefix="unet", weight_name=WEIGHTS, use_safetensors=True)
    torch.testing.assert_close(output(theirs), output(model), **CLOSE)
    with pytest.warns(UserWarning, match="as_lora=1 leaves out"):
        near = save_adapter(model, tmp_path / "near", format="diffusers", as_lora=1)
    loaded, theirs = load_adapter(unet(), near), unet()
    assert {len(adapter.lora_A) for _, _, adapter in adapters_of(loaded)} == {1}
    theirs.load_lora_adapter(str(near), prefix="unet", weight_name=WEIGHTS, use_safetensors=True)
    torch.testing.assert_close(output(theirs), output(loaded), **CLOSE)
    assert not torch.allclose(output(loaded), output(model), atol=1e-3)


class Bare(nn.Module):
    """No component of a pipeline."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(4, 4)


def embedded() -> Any:
    return seeded(lambda: diffusers.UNet2DConditionModel(**{**unet().config, "num_class_embeds": 5}))


@pytest.mark.parametrize(
    ("build", "method", "message"),
    [
        (unet, SSF(target_modules="to_q", modules_to_save=()), "ScaleShift on .*to_q' changes the bias as well.*merge"),
        (unet, BitFit(modules_to_save=()), "nothing but weights of the base was trained.*save the weights"),
        (unet, LoRA(r=2, target_modules="to_q", modules_to_save="conv_out"), "'conv_out.weight' was trained .* beside"),
        (embedded, LoRA(r=2, target_modules="class_embedding"), "LoRA of an embedding .class_embedding.*exclude"),
        (Bare, LoRA(r=2), "'to_q' is in no part of Bare that pipelines .* Save in the default format"),
        (lambda: Parts(pipeline()), LoRA(r=2, target_modules=r"(vae|unet)\..*to_q"), "'vae.*here are: unet, text_enc"),
        (vae, LoRA(r=2, target_modules="to_q"), "in no part of AutoencoderKL"),
    ],
    ids=["ssf", "bitfit", "head", "embedding", "bare", "vae beside", "vae"],
)
def test_what_diffusers_has_no_place_for_is_refused(build: Any, method: Any, message: str, tmp_path: Path) -> None:
    model = moved(inject(build(), method))
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match=message):
        save_adapter(model, tmp_path / "new", format="diffusers")
    assert not (tmp_path / "new").exists()
    assert_unchanged(model, before)


def test_formats_do_not_mix(tmp_path: Path) -> None:
    model = adapted(METHODS_HERE[0])
    for one, other in (("peft", "diffusers"), ("diffusers", "peft")):
        folder = save_adapter(model, tmp_path / one, format=one)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(AdapterFileError, match="holds an adapter in another format.*Name another folder"):
            save_adapter(model, folder, format=other)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        save_adapter(model, folder, format=one)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterFileError, match="holds an adapter in another format"):
        load_adapter(unet(), folder)
    with pytest.raises(
        AdapterError, match="format must be one of 'peft', 'diffusers', 'lightning_peft', got 'diffuser'"
    ):
        save_adapter(model, tmp_path / "new", format="diffuser")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {"unet.mid_block.to_q.alpha": torch.ones(())},
            "'mid_block.to_q.alpha' is of a form .*save_l",
        ),
        (lambda t: t | {"unet.up.lora_A.weight": torch.zeros(2, 3)}, "adapts 'up' of the unet, which UNet2DCond"),
        (lambda t: {f"transformer.{k[5:]}": v for k, v in t.items()}, "file adapts transformer; .* here: unet"),
        (lambda t: dict(list(t.items())[1:]), "does not fit"),
    ],
)
def test_a_foreign_file_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    save_adapter(adapted(METHODS_HERE[0]), tmp_path, format="diffusers")
    save_file(change(load_file(tmp_path / WEIGHTS)), tmp_path / WEIGHTS)
    model = unet()
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match=message):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_another_base_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted(METHODS_HERE[0]), tmp_path, format="diffusers")
    other = moved(unet())
    with pytest.raises(AdapterFileError, match=", unet was trained on the same model with other weights"):
        load_adapter(other, tmp_path)
    load_adapter(other, tmp_path, allow_other_base=True)


def test_a_copy_of_a_component_is_not_taken_for_it(tmp_path: Path) -> None:
    class WithCopy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.unet = unet(), unet()

    model = moved(inject(WithCopy(), LoRA(r=2, target_modules=r"unet\..*to_q")))
    save_adapter(model, tmp_path, format="diffusers")
    torch.testing.assert_close(output(load_adapter(unet(), tmp_path)), output(model.unet), **CLOSE)
    loaded = load_adapter(WithCopy(), tmp_path)
    assert adapters_of(loaded.teacher) == []


def test_only_trained_heads_are_no_lora(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="no adapter that could be saved as LoRA. Save it as it is"):
        save_adapter(inject(tiny(), LinearProbe()), tmp_path / "new", as_lora=True)
