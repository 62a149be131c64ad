"""The command line: every example configuration runs, and the tools read what training wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lightning_peft import DoRA, LoRA, load_adapter
from lightning_peft.cli import lightning_cli, main

TOP = Path(__file__).parent.parent
CONFIGS = sorted((TOP / "tutorials" / "configs").glob("*.yaml"))
SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*args parameter is intended"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
]


@pytest.fixture(autouse=True)
def at_the_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples name files from the top of the repository; what they write goes elsewhere."""
    (tmp_path / "tutorials").symlink_to(TOP / "tutorials")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])


def configs_of(path: Path) -> list[str]:
    """An example that is put on top of another is run with it."""
    below = [] if "model" in yaml.safe_load(path.read_text()) else ["--config", "tutorials/configs/digits.yaml"]
    return [*below, "--config", f"tutorials/configs/{path.name}"]


def fit(*args: str) -> Any:
    return lightning_cli(["fit", *args, *SHORT, *QUIET])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_example_configuration_trains_and_round_trips(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = fit(*configs_of(path))
    assert cli.trainer.global_step == 2
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", *configs_of(path), "--print_config"])
    (tmp_path / "printed.yaml").write_text(printed := capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "printed.yaml", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(printed)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (
            ["--trainer.callbacks.method=DoRA", "--trainer.callbacks.method.r=3"],
            "DoRA(modules_to_save='output-head', r=3)",
        ),
        (["--trainer.callbacks.method=lightning_peft.SSF"], "SSF()"),
        (["--trainer.callbacks.method=lora"], "LoRA()"),
    ],
    ids=["short name with an argument", "class path", "registry name"],
)
def test_a_method_is_chosen_on_the_command_line(args: list[str], expected: str) -> None:
    cli = lightning_cli(["--config", "tutorials/configs/digits.yaml", *args], run=False)
    (method,) = cli.trainer.callbacks[0].methods.values()
    assert repr(method) == expected


def test_help_explains_the_arguments_of_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--trainer.callbacks.help=PEFT"])
    assert "adapter folder to start from" in " ".join(capsys.readouterr().out.split())


def test_the_tools_show_merge_and_reload_what_fit_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli = fit("--config", "tutorials/configs/digits.yaml", "--trainer.callbacks.save_to=adapter")
    x = torch.randn(3, 1, 8, 8)
    expected = cli.model.eval()(x)

    main(["inspect", "adapter"])
    shown = capsys.readouterr().out
    assert "lora" in shown
    assert "blocks.*.attn.qkv.lora_A.weight" in shown

    main(["merge", "tutorials/configs/digits.yaml", "adapter", "out/merged.safetensors"])
    plain = lightning_cli(["--config", "tutorials/configs/digits.yaml"], run=False).model
    plain.model.load_state_dict(load_file("out/merged.safetensors"), strict=True)
    torch.testing.assert_close(plain.eval()(x), expected, rtol=1e-4, atol=1e-5)  # merged in float32

    again = lightning_cli(["--config", "tutorials/configs/digits.yaml"], run=False).model
    assert torch.equal(load_adapter(again, "adapter").eval()(x), expected)

    cli.trainer.save_checkpoint("run.ckpt")
    capsys.readouterr()
    main(["inspect", "run.ckpt"])
    assert "model.blocks.*.attn.qkv.adapters.default.lora_A" in capsys.readouterr().out


def test_a_transformers_model_is_merged_into_a_folder_that_it_loads_from(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    cli = fit("--config", "tutorials/configs/source_code.yaml", "--trainer.callbacks.save_to=adapter")
    assert json.loads(Path("adapter/adapter_config.json").read_text())["use_dora"] is True
    main(["merge", "tutorials/configs/source_code.yaml", "adapter", "merged"])
    merged = transformers.AutoModelForCausalLM.from_pretrained("merged")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = cli.model.eval()(input_ids=tokens).logits
        torch.testing.assert_close(merged.eval()(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_methods_lists_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    main(["methods"])
    shown = capsys.readouterr().out
    assert LoRA.__name__ in shown
    assert DoRA.paper in shown


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["inspect", "nowhere"], "there is no adapter_model.safetensors"),
        (["inspect", "nowhere.ckpt"], "there is no file"),
        (["inspect", "bad.ckpt"], "is damaged"),
    ],
)
def test_what_cannot_be_read_is_said_without_a_traceback(args: list[str], message: str, tmp_path: Path) -> None:
    Path("bad.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(SystemExit, match=message):
        main(args)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("method.r=0", "lightning-peft: LoRA: r must be an integer >= 1, got 0."),
        ("method.target_modules=qvk", "lightning-peft: LoRA: .*'qvk' matched none .* Did you mean 'qkv'"),
        ("method=LroA", "lightning-peft: unknown method 'LroA'. Did you mean 'lora'"),
        ("init_from=nowhere", "lightning-peft: there is no adapter_model.safetensors in nowhere"),
    ],
)
def test_a_wrong_argument_is_said_in_one_line(option: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message) as caught:
        main(["fit", "--config", "tutorials/configs/digits.yaml", f"--trainer.callbacks.{option}", *SHORT, *QUIET])
    assert "\n" not in str(caught.value)


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises((SystemExit, ValueError)) as caught:
        main(["fit", "--config", "tutorials/configs/digits.yaml", "--model.checkpoint=nowhere.safetensors"])
    assert "lightning-peft:" not in str(caught.value)


def test_the_command_is_installed() -> None:
    command = Path(sys.executable).parent / "lightning-peft"
    run = subprocess.run([command, "--help"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})
    assert run.returncode == 0
    assert "merge" in run.stdout
    assert "fit" in run.stdout
