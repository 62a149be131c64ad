"""The command line on adapter files: ``convert`` and ``merge``, with bases that ``from_pretrained`` reads."""

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_peft import (
    AdaptFormer,
    DoRA,
    FullFineTuning,
    LoHa,
    LoRA,
    PaCA,
    PiSSA,
    QLoRA,
    inject,
    load_adapter,
    merge,
    save_adapter,
)
from lightning_peft.cli import main
from lightning_peft.engine import adapters_of
from lightning_peft.interop import read_adapter
from tests.methods.backbones import moved
from tests.pipelines import picture, pipeline, seeded

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

pytestmark = [
    # schedulers of diffusers, and transformers, ask for what is on its way out
    pytest.mark.filterwarnings("ignore:.*scheduler:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3
    )
    return seeded(lambda: transformers.LlamaForCausalLM(config))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def base() -> Any:
    """A fresh base, which is in the folder ``base`` as well."""
    llama().save_pretrained("base")
    return llama()


IDS = torch.arange(12).view(2, 6)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def hf(folder: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(llama(), folder).eval()


NUMBER = r"(\d\.\de[+-]\d\d|0\.0e\+00)"


def said(capsys: pytest.CaptureFixture[str]) -> tuple[int, float, float]:
    """(layers, largest difference, effect of the adapter) of the last line."""
    line = capsys.readouterr().out.splitlines()[-1]
    match = re.match(
        rf"(\d+) layers on random inputs: largest difference {NUMBER} .* changes up to {NUMBER} of it", line
    )
    assert match is not None, line
    return int(match[1]), float(match[2]), float(match[3])


@pytest.mark.parametrize("to", ["peft", "lightning_peft"])
@pytest.mark.parametrize(
    "method",
    [LoRA(r=2, rank_pattern={"q_proj": 3}), DoRA(r=2, modules_to_save="lm_head"), PiSSA(r=2)],
    ids=["lora", "dora", "pissa"],
)
def test_convert_changes_the_format_and_nothing_else(
    method: Any, to: str, base: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = moved(inject(base, method))
    save_adapter(model, "source")
    main(["convert", "source", "out/there", "--to", to, "--base", "base"])
    layers, difference, effect = said(capsys)
    assert layers == len(adapters_of(model)) + (method.modules_to_save == "lm_head")
    assert difference < 1e-5  # two ways of the same sums in float32
    assert effect > 0.01
    torch.testing.assert_close(logits(load_adapter(llama(), "out/there")), logits(model), rtol=1e-4, atol=1e-5)
    facts, config, tensors = read_adapter("out/there")
    assert facts is not None
    if to == "peft":
        assert config["peft_type"] == "LORA"
        torch.testing.assert_close(logits(hf("out/there")), logits(model), rtol=1e-4, atol=1e-5)
    else:
        assert "layout" not in facts
        assert facts["method"] == method.name
        assert "model.layers.0.self_attn.q_proj.adapters.lora_A" in tensors
    assert [path.name for path in Path("out").iterdir()] == ["there"]


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=3, use_rslora=True, target_modules=["q_proj", "up_proj"]),
        peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
    ],
    ids=["lora", "oft"],
)
def test_a_file_of_hf_peft_becomes_one_of_ours_and_the_reverse(
    config: Any, base: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = moved(peft.get_peft_model(base, config)).eval()
    theirs.base_model.model.name_or_path = "base"
    theirs.save_pretrained("theirs")
    main(["convert", "theirs", "ours", "--to", "lightning_peft", "--base", "base"])
    assert said(capsys)[1] == 0
    main(["convert", "ours", "again", "--base", "base"])
    assert said(capsys)[1] == 0
    one, other = (load_file(f"{name}/adapter_model.safetensors") for name in ("theirs", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    torch.testing.assert_close(logits(load_adapter(llama(), "ours")), logits(theirs), rtol=1e-4, atol=1e-5)


def test_the_base_is_the_one_that_the_adapter_names(base: Any, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = transformers.LlamaForCausalLM.from_pretrained("base")
    save_adapter(moved(inject(loaded, LoRA(r=2))), "source")
    assert read_adapter("source")[1]["base_model_name_or_path"] == "base"
    main(["convert", "source", "out", "--to", "lightning_peft"])
    assert said(capsys)[1] == 0


@pytest.mark.parametrize("method", [DoRA(r=2), LoHa(r=2), PaCA(r=4)], ids=["dora", "loha", "paca"])
def test_a_rank_makes_lora_and_the_line_says_how_near(
    method: Any, base: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = moved(inject(base, method))
    save_adapter(model, "source")
    main(["convert", "source", "exact", "--r", "20", "--base", "base"])
    assert said(capsys)[1] < 1e-5
    torch.testing.assert_close(logits(hf("exact")), logits(model), rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="as_lora=1 leaves out"):
        main(["convert", "source", "near", "--r", "1", "--base", "base"])
    _, difference, effect = said(capsys)
    assert 1e-3 < difference <= effect


def test_lora_is_extracted_from_a_model_that_was_fully_fine_tuned(
    base: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = moved(inject(base, FullFineTuning()))
    with torch.no_grad():  # this one has not changed, and needs no LoRA
        model.model.layers[1].mlp.up_proj.weight.copy_(llama().model.layers[1].mlp.up_proj.weight)
    save_adapter(model, "source")
    main(["convert", "source", "lora", "--r", "20", "--base", "base"])
    layers, difference, effect = said(capsys)
    assert (layers, difference < 1e-5) == (16, True)  # seven in each of two blocks, the embedding, the head
    assert effect > 0.1
    assert len(adapters_of(load_adapter(llama(), "lora"))) == 15
    torch.testing.assert_close(logits(load_adapter(llama(), "lora")), logits(model), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(hf("lora")), logits(model), rtol=1e-4, atol=1e-5)


def test_a_pipeline_is_a_base_too(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = pipeline()
    pipe.save_pretrained("pipe")
    moved(inject(pipe.unet, LoRA(r=2, target_modules=("to_q", "to_v"))))
    save_adapter(pipe.unet, "source", format="diffusers")
    main(["convert", "source", "ours", "--to", "lightning_peft", "--base", "pipe"])
    assert said(capsys)[1] == 0
    main(["convert", "ours", "back", "--to", "diffusers", "--base", "pipe"])
    assert said(capsys)[1] == 0
    theirs = pipeline()
    theirs.load_lora_weights("back")
    torch.testing.assert_close(picture(theirs), picture(pipe), rtol=0, atol=1e-5)
    main(["merge", "pipe", "source", "merged"])
    assert said(capsys)[1] < 1e-5
    theirs = pipeline()
    theirs.unet = diffusers.UNet2DConditionModel.from_pretrained("merged")
    torch.testing.assert_close(picture(theirs), picture(pipe), rtol=0, atol=1e-5)
    main(["convert", "source", "one", "--base", "pipe/unet"])
    assert said(capsys)[1] == 0


def test_adapters_that_are_no_change_of_weights_are_compared_by_their_tensors(
    base: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter(moved(inject(base, AdaptFormer(r=2))), "source")
    main(["convert", "source", "out", "--to", "lightning_peft", "--base", "base"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == (
        "10 adapters are no change of weights: their tensors are compared, not what they do; "
        "8 tensors: largest difference 0.0e+00."
    )


@pytest.mark.parametrize("method", [LoRA(r=2), DoRA(r=2), QLoRA(r=2)], ids=["lora", "dora", "qlora"])
def test_merge_takes_a_folder_as_its_base(method: Any, base: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = moved(inject(base, method))
    save_adapter(model, "source")
    main(["merge", "base", "source", "merged"])
    layers, difference, effect = said(capsys)
    assert (layers, difference < 1e-5 < effect) == (14, True)
    merged = transformers.LlamaForCausalLM.from_pretrained("merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
    main(["merge", "base", "source", "merged.safetensors"])
    plain = llama()
    plain.load_state_dict(load_file("merged.safetensors"))
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*MergeError")
def test_the_line_shows_a_merge_that_went_wrong(
    base: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: nn.Module, **options: Any) -> nn.Module:
        merge(model, **options)
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(2)
        return model

    monkeypatch.setattr("lightning_peft.cli.merge_adapters", wrong)
    save_adapter(moved(inject(base, LoRA(r=2))), "source")
    main(["merge", "base", "source", "merged"])
    assert "difference 1.0e+00 of the output (model.layers.1.mlp.up_proj)" in capsys.readouterr().out


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["convert", "source", "source", "--base", "base"], "'source' is, or holds, or is a part of what is read"),
        (["convert", "source", "source/../base", "--base", "base"], "is, or holds, or is a part of what is read"),
        (["convert", "source", "full", "--base", "base"], "'full' is there already. Name a folder that does not exist"),
        (["convert", "source", "file.txt", "--base", "base"], "'file.txt' is there already"),
        (["merge", "base", "source", "full"], "'full' is there already"),
        (["merge", "base", "source", "base"], "is, or holds, or is a part of what is read"),
        (["merge", "base", "source", "base/model.safetensors"], "is a part of what is read"),
        (["convert", "source", "out"], "names no base that is here .* Give it with --base"),
        (
            ["convert", "source", "out", "--base", "nowhere"],
            "is neither a YAML file nor a folder that from_pretrained",
        ),
        (["convert", "source", "out", "--base", "odd"], "names no model of transformers .'Module'.. Give a YAML"),
        (["convert", "nowhere", "out", "--base", "base"], "there is no adapter_model.safetensors in nowhere"),
        (["convert", "source", "out", "--base", "other"], "trained on the same model with other weights"),
        (["convert", "source", "out", "--to", "diffusers", "--base", "base"], "in no part of LlamaForCausalLM"),
        (
            ["convert", "dora", "out", "--to", "peft", "--base", "base", "--r", "-1"],
            "as_lora must be True, False or an integer >= 1",
        ),
        (["convert", "paca", "out", "--base", "base"], "as_lora=r .--r on the command line. .* as_lora=3 is exact"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_changed(args: list[str], message: str, base: Any) -> None:
    moved(llama()).save_pretrained("other")
    Path("odd").mkdir()
    Path("odd/config.json").write_text('{"architectures": ["Module"]}')
    save_adapter(moved(inject(llama(), PaCA(r=3))), "paca")
    save_adapter(moved(inject(llama(), DoRA(r=2))), "dora")
    save_adapter(moved(inject(base, LoRA(r=2))), "source")
    shutil.copytree("source", "full")
    Path("file.txt").touch()
    before = files()
    with pytest.raises(SystemExit, match=message):
        main(args)
    assert files() == before
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "command", [["convert", "source", "out", "--base", "base"], ["merge", "base", "source", "out"]]
)
def test_what_is_interrupted_leaves_nothing(command: list[str], base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(moved(inject(base, LoRA(r=2))), "source")
    before = files()

    def torn(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_peft.cli.os.replace", torn)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert files() == before
    assert sorted(path.name for path in Path().iterdir()) == ["base", "source"]


def test_a_merged_file_is_replaced_in_one_step(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(moved(inject(base, LoRA(r=2))), "source")
    save_file({"x": torch.zeros(1)}, "merged.safetensors")
    before = files()

    def torn(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk on fire")

    monkeypatch.setattr("lightning_peft.cli.save_file", torn)
    with pytest.raises(OSError, match="disk on fire"):
        main(["merge", "base", "source", "merged.safetensors"])
    assert files() == before
