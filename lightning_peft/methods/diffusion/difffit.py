"""DiffFit: train biases, norms and class embeddings, and a scale behind every attention and feed-forward network.

Paper:    Xie et al., "DiffFit: Unlocking Transferability of Large Diffusion Models via Simple Parameter-Efficient
          Fine-Tuning", 2023, arXiv:2304.06648.
Formula:  h <- h + gamma * branch(h) for the attentions and feed-forward networks of each block; biases, the weights of
          norm layers and the table of classes train as they are
Shapes:   gamma (D,); table (K + 1, D) of K classes and "no class"
Init:     gamma = 1, all else as in the checkpoint; y starts as the base
Merge:    W <- gamma * W (rows) and b <- gamma * b in the last layer of the branch; E is added to each table
Deviates: where a model has several tables of classes of one size (DiT in diffusers has one in each block), they share
          one change E (K + 1, D), zero at the start, which lies in the first of them; the paper's model has one table.
          Norm layers are told by their type: the linear layers of adaptive ones stay frozen but for their biases.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.adapters.rescaling import Rescaling
from lightning_peft.engine import Adapter, Kind, Layer, Target, matches, register, select_modules, select_parameters
from lightning_peft.engine.limits import Patterns
from lightning_peft.engine.targets import candidates, is_below, select_targets
from lightning_peft.parts.sublayers import SublayerKind, SublayerMethod

# customary names
_TIME = r"(.*\.)?(t|time|timestep)_(embed\w*|mlp|proj)"
_CLASSES = r"(.*\.)?(y_embed\w*|label_emb\w*|class_embed\w*)(\..*)?"


class Table(Adapter):
    """A change of an embedding table, which others may share; it lies in the first, which has no ``first``."""

    def __init__(self, target: Target, first: "Table | None") -> None:
        super().__init__()
        if first is None:
            self.change = target.new_parameter(target.d_in, target.d_out)
        # in a tuple, or it would be a child, with its parameter
        self.first = () if first is None else (first,)

    @property
    def table(self) -> Tensor:
        """E (K + 1, D)."""
        return self.first[0].change if self.first else self.change

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """Zero."""
        if not self.first:
            self.change.zero_()

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """layer(x) + E[x]."""
        y = layer(x)
        return y + F.embedding(x, self.table).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The table with E added."""
        return weight + self.table.T, bias


@register("difffit")
@dataclass(frozen=True, kw_only=True)
class DiffFit(SublayerMethod):
    """Training of biases, norms, class embeddings and scales of branches; nothing of the embedding of time.

    Args:
        time_modules: patterns of what embeds the time step, and stays frozen; by default it goes by customary names.
        class_tables: patterns of the embedding tables of classes, which go by customary names too; () for none.
        target_modules: patterns of the layers to scale, in any model; by default the last of each attention and
            feed-forward network.
        layers_to_transform: indices of the blocks that get scales; all by default.
        train_norms: train the norm layers.
        blocks: see `ParallelAdapter`; so for the arguments that follow it.

    Raises:
        TargetError: there are no blocks, or none with such sub-layers; or a pattern matches nothing.

    >>> from torch import ones, tensor
    >>> from lightning_peft import inject
    >>> net = nn.ModuleDict({"time_embed": nn.Linear(2, 2), "out": nn.Linear(2, 2)})
    >>> y = net["out"](ones(1, 2))
    >>> net = inject(net, DiffFit(target_modules="out"))
    >>> [name for name, p in net.named_parameters() if p.requires_grad]
    ['out.bias', 'out.adapters.default.scale']
    >>> net["out"].adapters["default"].scale.data = tensor([2.0, 3.0])
    >>> torch.allclose(net["out"](ones(1, 2)), y * tensor([2.0, 3.0]))
    True
    """

    paper: ClassVar[str] = "arXiv:2304.06648"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": Rescaling, "conv": Rescaling, "embedding": Table}
    sublayers: ClassVar[tuple[SublayerKind, ...]] = ("attention", "feedforward")
    each_sublayer: ClassVar[bool] = False

    train_norms: bool = True
    time_modules: Patterns | None = None
    class_tables: Patterns | None = None

    def tables(self, model: nn.Module) -> list[Target]:
        """The embedding tables of classes, less those that are trained whole."""
        whole = select_modules(model, self.modules_to_save, who="DiffFit", parameters=True)
        found = [t for t in candidates(model) if t.site.kind == "embedding" and matches(_CLASSES, t.name)]
        if self.class_tables is not None:
            kinds: tuple[Kind, ...] = ("embedding",)
            found = select_targets(model, kinds, self.class_tables, who="DiffFit") if self.class_tables else []
        return [t for t in found if not any(is_below(t.name, name) for name in whole)]

    def targets(self, model: nn.Module) -> list[Target]:
        """The last layer of each branch, and tables of classes of which there are several."""
        ends = self.named(model) if self.target_modules else [s.projection for s in self.found(model)]
        return ends + (tables if len(tables := self.tables(model)) > 1 else [])

    def adapters(self, targets: list[Target]) -> list[Adapter]:
        """Scales; and changes of tables, one for all of the same size."""
        made: list[Adapter] = []
        first: dict[torch.Size, Table] = {}
        for target in targets:
            table = Table(target, first.get(target.shape)) if target.site.kind == "embedding" else None
            made.append(table or Rescaling(target))
            if table is not None:
                first.setdefault(target.shape, table)
        return made

    def trained_in_place(self, model: nn.Module) -> list[str]:
        """``modules_to_save``, the table of classes if there is one, norms and biases but those that embed the time."""
        named = None if self.time_modules is None else select_modules(model, self.time_modules, who="DiffFit")
        time = [name for name, _ in model.named_modules() if matches(_TIME, name)] if named is None else named
        tables = self.tables(model)
        whole = select_parameters(model, self.modules_to_save, who="DiffFit")
        whole += [f"{table.owner}.weight".lstrip(".") for table in tables if len(tables) == 1]
        biases = [name for name in select_parameters(model, "all-layers", who="DiffFit") if name.endswith("bias")]
        names = dict.fromkeys([*whole, *super().trained_in_place(model), *biases])
        return [name for name in names if name in whole or not any(is_below(name, module) for module in time)]

    def num_trainable(self, target: Target) -> int:
        """D of a scale, (K + 1) D of a change of tables."""
        return target.d_out * target.d_in if target.site.kind == "embedding" else target.d_out

    def total_trainable(self, targets: list[Target]) -> int:
        """The sum of it, where tables of one size count once."""
        tables = {t.shape: t for t in targets if t.site.kind == "embedding"}
        return super().total_trainable([t for t in targets if t.site.kind != "embedding" or tables[t.shape] is t])

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """In all blocks; and in one, with a head and without norms."""
        return cls(), cls(layers_to_transform=(1,), train_norms=False, modules_to_save="head")
