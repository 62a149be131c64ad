"""The stream of tokens in a model: the part that they go through, and the layers that see all of them."""

from typing import NamedTuple

from torch import nn

from lightning_peft.engine import Target, TargetError
from lightning_peft.engine.errors import nearest
from lightning_peft.engine.limits import Patterns
from lightning_peft.engine.slots import base_class
from lightning_peft.engine.targets import ALL_LAYERS, ALL_LINEAR, is_below
from lightning_peft.parts.blocks import find_blocks, stages_of
from lightning_peft.parts.condition import TEXT, takes
from lightning_peft.parts.layout import width_of
from lightning_peft.parts.taps import looks_at_all
from lightning_peft.parts.tokens import text_parts


class TokenStream(NamedTuple):
    """A part of a model whose layers see (batch, n, features) of the same n tokens.

    Args:
        path: of the part.
        width: features of a token behind its last block.
        last: path of the block that answers them; empty where the part itself does.
        layers: paths of the blocks, before them of the layer that embeds the ids, if there is one.
    """

    path: str
    width: int
    last: str
    layers: list[str]

    def inside(self, targets: list[Target], patterns: Patterns, who: str) -> list[Target]:
        """Those of ``targets``, which ``patterns`` selected, that see the tokens. "All" means those.

        Raises:
            TargetError: there are none, or a pattern names one that need not see them.
        """
        inside = [t for t in targets if any(is_below(t.owner, layer) for layer in self.layers)]
        outside = [t.name for t in targets if t not in inside]
        if outside and (not inside or patterns not in (ALL_LINEAR, ALL_LAYERS)):
            raise TargetError(
                f"{who}: {outside[0]!r} is not in {self.layers[-1]!r} or its like, so it need not see every token. "
                "Leave it out (exclude_modules), or use LoRA."
            )
        return inside


def token_stream(model: nn.Module, who: str, module: str | None = None) -> TokenStream:
    """The part of ``model`` that embeds a text; or the model, if it is one stack of blocks that see tokens alone.

    Args:
        model: where to look.
        who: how errors name the caller.
        module: path of the part, where several embed text.

    Raises:
        TargetError: there is none, or there are several.
    """
    parts = text_parts(model)
    if module is not None and module not in parts:
        raise TargetError(
            f"{who}: module {module!r} embeds no text.{nearest(module, parts)} Those that do: "
            f"{', '.join(map(repr, parts)) or 'none'}."
        )
    if parts:
        path = next(iter(parts)) if module is None else module
        if len(parts) > 1 and module is None:
            raise TargetError(
                f"{who}: {len(parts)} parts embed text ({', '.join(parts)}). Name one, such as module={path!r}."
            )
        embedding = parts[path].get_input_embeddings()
        (name,) = [name for name, m in parts[path].named_modules() if m is embedding]
        layers = [name, *find_blocks(parts[path], None, who)]
        return TokenStream(path, embedding.embedding_dim, "", [f"{path}.{layer}".lstrip(".") for layer in layers])
    blocks = find_blocks(model, None, who)
    modules = [model.get_submodule(name) for name in blocks]
    if len(stages_of(blocks)) > 1 or not all(looks_at_all(m) and not takes(m, TEXT) for m in modules):
        raise TargetError(
            f"{who}: {base_class(model).__name__} neither embeds a text nor is one stack of blocks that see tokens "
            "(batch, n, width) and nothing else, one by one. Use a method that treats all tokens alike, such as LoRA."
        )
    return TokenStream("", width_of(modules[-1], blocks[-1], who), blocks[-1], blocks)
