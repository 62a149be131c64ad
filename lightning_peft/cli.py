"""The command ``lightning-peft``: Lightning's own command line, with tools for adapter files beside it."""

import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from lightning_peft import AdapterError, list_methods, load_adapter
from lightning_peft import merge as merge_adapters
from lightning_peft.callbacks.table import collapsed, show
from lightning_peft.engine import AdapterFileError, adapter_state
from lightning_peft.interop import read_adapter
from lightning_peft.interop.files import method_from

_EPILOG = """Besides: 'lightning-peft merge' folds an adapter into its base, 'lightning-peft inspect' shows what is
in an adapter file, 'lightning-peft methods' lists all methods."""


def main(args: list[str] | None = None) -> None:
    """Run ``lightning-peft`` with these arguments, or those of the process."""
    arguments = sys.argv[1:] if args is None else args
    tools: dict[str, Any] = {"merge": merge, "inspect": inspect, "methods": methods}
    try:
        if arguments and arguments[0] in tools:
            from jsonargparse import auto_cli

            auto_cli(tools, args=arguments, prog="lightning-peft")
        else:
            lightning_cli(args)
    except Exception as error:
        # the parser wraps what a constructor raises in errors of its own, many lines long
        while error is not None and not isinstance(error, AdapterError):
            error = error.__cause__ or error.__context__  # type: ignore[assignment]
        if error is None:
            raise
        sys.exit(f"lightning-peft: {error}")


def lightning_cli(args: list[str] | None = None, **kwargs: Any) -> Any:
    """Lightning's command line with our classes known by their short names: ``--model=ImageClassifier`` and so on."""
    # Lightning calls jsonargparse in ways that newer versions deprecate; its user cannot mend that
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    try:
        from lightning.pytorch.cli import LightningCLI
    except ImportError as error:  # pragma: no cover - depends on what is installed
        raise AdapterError('the command line needs jsonargparse: pip install "lightning_peft[cli]".') from error
    import lightning_peft.recipes  # noqa: F401  (makes the recipes known)

    parser = {"prog": "lightning-peft", "epilog": _EPILOG, "description": "Fine-tune with adapters."}
    return LightningCLI(args=args, save_config_kwargs={"overwrite": True}, parser_kwargs=parser, **kwargs)


def merge(base: str, adapter: str, output: str) -> None:
    """Fold an adapter into the weights of its base and write the result.

    Args:
        base: the YAML that the adapter was trained with; its ``model`` part builds the base.
        adapter: the adapter folder.
        output: a ``.safetensors`` file for the weights under the names of the base model; for a transformers or
            diffusers model a folder, written by its ``save_pretrained``. Of several models in one module the one that
            the adapter changes is written.
    """
    module = load_adapter(lightning_cli(["--config", base], run=False).model, adapter)
    changed = {key.partition(".")[0] for key in adapter_state(module)}
    merge_adapters(module, keep_base=False)
    inner = [child for name, child in module.named_children() if name in changed]
    model = inner[0] if len(inner) == 1 else module
    if Path(output).suffix == ".safetensors":
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.detach().contiguous().clone() for key, value in model.state_dict().items()}, output)
    elif hasattr(model, "save_pretrained"):
        model.save_pretrained(output)
    else:
        raise AdapterError(f"merge: {type(model).__name__} is written to a .safetensors file, got {output!r}.")
    print(f"merged {adapter} into {type(model).__name__}: {output}")


def inspect(file: str) -> None:
    """Show what is in an adapter: its method, its base, its tensors.

    Args:
        file: an adapter folder, its ``.safetensors`` file, or a Lightning checkpoint.
    """
    if Path(file).suffix == ".ckpt":
        facts, tensors = _read_checkpoint(Path(file))
    else:
        ours, config, tensors = read_adapter(file)
        facts = config if ours is None else {**ours, "method": method_from(ours), "arguments": None, "layout": None}
    described = Table(title=str(file), title_justify="left", show_header=False)
    for key, value in facts.items():
        if value not in (None, (), [], {}, ""):
            described.add_row(key, str(value))
    show(described)
    groups: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    for key, tensor in tensors.items():
        groups[collapsed(key), f"{' x '.join(map(str, tensor.shape))} {str(tensor.dtype)[6:]}"].append(tensor)
    table = Table(show_footer=True)
    table.add_column("Tensors", footer="all")
    table.add_column("Count", justify="right", footer=str(len(tensors)))
    table.add_column("Shape")
    table.add_column("Numbers", justify="right", footer=f"{sum(t.numel() for t in tensors.values()):,}")
    table.add_column("Bytes", justify="right", footer=f"{sum(t.nbytes for t in tensors.values()):,}")
    for (where, shape), group in groups.items():
        numbers, size = sum(t.numel() for t in group), sum(t.nbytes for t in group)
        table.add_row(where, str(len(group)), shape, f"{numbers:,}", f"{size:,}")
    show(table)


def methods() -> None:
    """List all methods."""
    table = Table(title="Methods", title_justify="left")
    for column in ("Name", "Class", "Family", "Paper", "Merges", "Meant for"):
        table.add_column(column)
    for row in list_methods():
        merges = "yes" if row.mergeable else "no"
        table.add_row(row.name, row.cls.__name__, row.family, row.paper, merges, ", ".join(row.modalities))
    show(table)


def _read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise AdapterFileError(f"there is no file {path}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise AdapterFileError(f"{path} is torn, or holds more than tensors and plain values ({error}).") from None
    facts = checkpoint.get("peft", {"adapters": "none: this is an ordinary checkpoint"})
    return facts, checkpoint["state_dict"]
