"""The command ``lightning-peft``: Lightning's own command line, with tools for adapter files beside it."""

import contextlib
import importlib
import json
import os
import secrets
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_peft import AdapterError, list_methods, load_adapter, save_adapter
from lightning_peft import merge as merge_adapters
from lightning_peft.callbacks.table import collapsed, show
from lightning_peft.engine import AdapterFileError, adapter_state
from lightning_peft.engine.record import record_of
from lightning_peft.interop import HFPEFT, read_adapter
from lightning_peft.interop.files import Format, method_from, replacing
from lightning_peft.interop.hf_peft import CONFIGS
from lightning_peft.interop.probes import Answers, answers, compared, named, outputs

_EPILOG = """Besides: 'lightning-peft merge' folds an adapter into its base, 'lightning-peft convert' writes it in
another format, 'lightning-peft inspect' shows what is in an adapter file, 'lightning-peft methods' lists all
methods."""


def main(args: list[str] | None = None) -> None:
    """Run ``lightning-peft`` with these arguments, or those of the process."""
    arguments = sys.argv[1:] if args is None else args
    tools: dict[str, Any] = {"merge": merge, "convert": convert, "inspect": inspect, "methods": methods}
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
    """Fold an adapter into the weights of its base and write the result; the adapted layers are compared with it.

    Args:
        base: the base: the YAML that the adapter was trained with, whose ``model`` part builds it; or a folder that
            ``from_pretrained`` of transformers (``config.json``) or diffusers (the same, or ``model_index.json`` of a
            pipeline) reads, from safetensors.
        adapter: the adapter folder.
        output: a ``.safetensors`` file for the weights under the names of the base model; for a transformers or
            diffusers model a new folder, written by its ``save_pretrained``. Of several models in one module the one
            that the adapter changes is written.
    """
    single = Path(output).suffix == ".safetensors"
    _check_output(output, (base, adapter), single)
    module = load_adapter(_base(base).eval(), adapter)
    changed = {key.partition(".")[0] for key in adapter_state(module)}
    before = answers(module)
    merge_adapters(module, keep_base=False)
    after = Answers(outputs(named(module, before.outputs)), before.beside, before.others)
    inner = [child for name, child in module.named_children() if name in changed]
    model = inner[0] if len(inner) == 1 and not hasattr(module, "save_pretrained") else module
    if single:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        weights = {key: value.detach().contiguous().clone() for key, value in model.state_dict().items()}
        with replacing(Path(output)) as file:
            save_file(weights, file)
    elif hasattr(model, "save_pretrained"):
        with _new_folder(output) as folder:
            model.save_pretrained(folder)
    else:
        raise AdapterError(
            f"merge: {type(model).__name__} is written to a .safetensors file, got {output!r}. Give a name that ends "
            "in it."
        )
    print(f"merged {adapter} into {type(model).__name__}: {output}")
    print(compared(before, after))


def convert(adapter: str, output: str, to: Format = "peft", base: str | None = None, r: int | None = None) -> None:
    """Write an adapter in another format; the adapted layers of both are compared.

    Args:
        adapter: the adapter folder, in any format that is read here.
        output: a new folder.
        to: the format: that of HF PEFT, the one file of diffusers, or our own names. What HF PEFT or diffusers do not
            know becomes plain LoRA, if it is of low rank.
        base: as for ``merge``; by default the folder that the adapter names as its base.
        r: write the nearest LoRA of this rank, for any change of weights.
    """
    _check_output(output, (base, adapter), single=False)
    base = base or _named_base(adapter)
    model = _base(base).eval()
    before_it = {name: p.detach().clone() for name, p in model.named_parameters()} if r else {}
    load_adapter(model, adapter)
    injection = record_of(model).injections["default"]
    # of what is trained without a copy of the base the base is here
    injection.in_place |= {name: before_it.get(name) for name, kept in injection.in_place.items() if kept is None}
    unknown_there = to == "peft" and type(injection.method) not in (*CONFIGS, HFPEFT)
    with _new_folder(output) as folder:
        save_adapter(model, folder, as_lora=unknown_there if r is None else r, format=to)
        facts, _, _ = read_adapter(folder)
        if (facts or {}).get("layout", "lightning_peft") != to:
            raise AdapterFileError(
                f"convert: HF PEFT has no place for the adapter in {adapter!r}, as the warning says. Use --to "
                "lightning_peft, or --r 8."
            )
        before = answers(model)
        del model, injection, before_it
        after = answers(load_adapter(_base(base).eval(), folder), at=before.outputs)
    print(f"converted {adapter} to {to}: {output}")
    print(compared(before, after))


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


def _base(base: str) -> Any:
    """The model that ``base`` stands for, see `merge`; the models of a pipeline under their names."""
    folder = Path(base)
    if folder.is_file():
        return lightning_cli(["--config", base], run=False).model
    config = next((folder / name for name in ("model_index.json", "config.json") if (folder / name).is_file()), None)
    if config is None:
        raise AdapterError(
            f"the base {base!r} is neither a YAML file nor a folder that from_pretrained of transformers or diffusers "
            "reads (with config.json or model_index.json). Give one of them."
        )
    stated = json.loads(config.read_text(encoding="utf-8"))
    library, name = ("diffusers", stated.get("_class_name"))
    if name is None:
        library, name = ("transformers", next(iter(stated.get("architectures") or ()), None))
    cls: Any = getattr(importlib.import_module(library), str(name), None)
    if not hasattr(cls, "from_pretrained"):
        raise AdapterError(f"{config} names no model of {library} ({name!r}). Give a YAML that builds the base.")
    loaded = cls.from_pretrained(base, use_safetensors=True)  # never a pickle
    if isinstance(loaded, nn.Module):
        return loaded
    return nn.ModuleDict({name: part for name, part in loaded.components.items() if isinstance(part, nn.Module)})


def _named_base(adapter: str) -> str:
    """The folder that an adapter names as its base."""
    _, config, _ = read_adapter(adapter)
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not Path(named).is_dir():
        raise AdapterError(
            f"convert: the adapter in {adapter!r} names no base that is here (it names {named!r}). Give it with "
            "--base: the YAML that it was trained with, or a folder that from_pretrained reads."
        )
    return named


def _check_output(output: str, inputs: tuple[str | None, ...], single: bool) -> None:
    """Raise an `AdapterError` if writing ``output`` would change what is there."""
    path = Path(output)
    for source in filter(None, inputs):
        here, there = path.resolve(), Path(source).resolve()
        if here == there or here in there.parents or (there in here.parents and here.exists()):
            raise AdapterError(
                f"{output!r} is, or holds, or is a part of what is read ({source!r}). Write to another place."
            )
    if not single and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise AdapterError(f"{output!r} is there already. Name a folder that does not exist, or delete it first.")


@contextlib.contextmanager
def _new_folder(output: str) -> Iterator[Path]:
    """A folder beside ``output`` that takes its name when the block ends well, and vanishes otherwise."""
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, path)  # in one step; an empty folder may be there
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise AdapterFileError(f"there is no file {path}. Give the path of a checkpoint, or of an adapter folder.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise AdapterFileError(f"{path} is damaged, or holds more than tensors and plain values ({error}).") from None
    facts = checkpoint.get("peft", {"adapters": "none: this is an ordinary checkpoint"})
    return facts, checkpoint["state_dict"]
