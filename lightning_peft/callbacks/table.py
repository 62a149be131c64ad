"""The table of what was adapted, for people to read."""

import re
from collections import defaultdict
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_peft.engine import adapters_of
from lightning_peft.engine.record import record_of
from lightning_peft.engine.slots import base_class
from lightning_peft.engine.targets import unsupported


def trainable_share(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers in the parameters of ``model``."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def adapter_table(model: nn.Module, name: str = "default", fused: Mapping[str, int] | None = None) -> Table:
    """One row for each group of like layers: where, how many, what they are, what sits on them, what it trains.

    Layers that ``target_modules`` selects beside those that the method can adapt have rows too.
    Below it stands how many modules of which type are computed by our operations, ``fused``.
    """
    injection = record_of(model).injections[name]
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for path, module, adapter in adapters_of(model, name):
        shape = " x ".join(map(str, adapter.site.get(module)[0].shape))
        base = f"{base_class(module).__name__} {shape}"
        weight = "" if adapter.site.weight in ("weight", "") else f".{adapter.site.weight}"
        size = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
        where = collapsed(f"{path}.")[:-1] if adapter.site.kind == "module" else collapsed(path + weight)
        groups[where, base, type(adapter).__name__].append(size)
    owners: dict[str, list[str]] = defaultdict(list)
    for parameter in injection.in_place:
        owner, _, leaf = parameter.rpartition(".")
        owners[owner].append(leaf)
    for owner, leaves in owners.items():
        module = model.get_submodule(owner)
        size = sum(module.get_parameter(leaf).numel() for leaf in leaves)
        whole = leaves if len(leaves) < 4 else [f"{len(leaves)} parameters"]
        base = f"{base_class(module).__name__} {', '.join(whole)}"
        groups[collapsed(owner), base, "trained in place"].append(size)
    left = unsupported(model, tuple(injection.method.adapter_types), getattr(injection.method, "target_modules", ()))
    for path, module in left:
        groups[collapsed(path), base_class(module).__name__, "none fits"].append(0)
    trainable, total = trainable_share(model)
    remarks = ["Which of these train changes from step to step."] if injection.method.switches else []
    remarks += [f"Fused: {', '.join(f'{n} {kind}' for kind, n in fused.items())}."] if fused else []
    caption = " ".join(remarks) or None
    title = f"PEFT {name!r}: {injection.method}"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", show_footer=True)
    table.add_column("Layers", footer="all trainable parameters")
    table.add_column("Count", justify="right")
    table.add_column("Base")
    table.add_column("Adapter", footer=f"{100 * trainable / total:.2f} % of {total:,}")
    table.add_column("Trainable", justify="right", footer=f"{trainable:,}")
    for (where, base, what), sizes in groups.items():
        table.add_row(where, str(len(sizes)), base, what, f"{sum(sizes):,}")
    return table


def show(table: Table) -> None:
    """Print to the terminal; as wide as the table needs where there is none."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 120))
    console.print(table)


def collapsed(name: str) -> str:
    """``name`` with a star for each number, so that like layers look alike."""
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)
