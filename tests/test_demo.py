"""The pieces of the demo: its runs are valid commands, its check reloads what they wrote, its picture is a picture."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOP = Path(__file__).parent.parent

pytestmark = pytest.mark.filterwarnings("ignore")  # the demo silences the hints of others for its reader


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, run from a folder like the top of the repository, its runs cut short."""
    spec = importlib.util.spec_from_file_location("demo", TOP / "tutorials" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "tutorials").symlink_to(TOP / "tutorials")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    whole = module.arguments
    short = ["--trainer.limit_train_batches=2", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]
    monkeypatch.setattr(module, "arguments", lambda name: [*whole(name), *short])
    return module


def test_each_run_writes_an_adapter_that_a_fresh_base_scores_the_same_with(
    demo: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: dict[str, dict[str, Any]] = {name: demo.adapt(name) for name in demo.METHODS}
    assert 0 <= rows["linear probe"]["before"] < 0.5
    assert rows["linear probe"]["trainable"] < rows["LoRA"]["trainable"] < rows["full fine-tuning"]["trainable"]
    assert rows["full fine-tuning"]["trainable"] == rows["full fine-tuning"]["total"]
    capsys.readouterr()
    demo.check()
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again == {name: row["after"] for name, row in rows.items()}
    demo.picture(rows, Path("picture.png"))
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")
