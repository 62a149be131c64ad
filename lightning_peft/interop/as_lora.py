"""Any low-rank change of weights as plain LoRA, which every server of adapters can load."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_peft.adapters.low_rank import LowRank, dense
from lightning_peft.engine import Adapter, AdapterFileError, Target
from lightning_peft.engine.state import METHOD_STATE
from lightning_peft.interop.hf_peft import own_values
from lightning_peft.methods import LoRA

Found = list[tuple[str, nn.Module, Adapter]]


@torch.no_grad()
def as_lora(found: Found, state: Mapping[str, Tensor]) -> tuple[LoRA, Found, dict[str, Tensor]]:
    """Method, adapters and state of the plain LoRA that computes what the adapters ``found`` do.

    Its rank is the number of directions in the change: twice that of a method that starts at a part of the weight. The
    scaling is in the factors.

    Args:
        found: (module name, module, adapter) of all.
        state: what is saved of them; what else was trained (heads, biases) goes along.

    Raises:
        AdapterFileError: one of them is no low-rank product, or its own weight is trained as well.
    """
    in_place = [key for key in state if ".adapters" not in key and not key.startswith(METHOD_STATE)]
    modules = {key.rpartition(".")[0] for key in in_place}
    both = sorted(modules & {path for path, _, _ in found})
    if both:
        raise AdapterFileError(
            f"the weight of {both[0]!r} is trained beside its adapter, so the result is no change of low rank and "
            "cannot be saved as LoRA. Save the weights of the model."
        )
    if not found:
        raise AdapterFileError(
            "nothing but weights of the base was trained, so there is no adapter that could be saved as LoRA. Save it "
            "as it is, or save the weights of the model."
        )
    plain: Found = []
    ranks: dict[str, int] = {}
    new = {key: value for key, value in state.items() if not key.startswith(METHOD_STATE)}
    for path, module, adapter in found:
        if not isinstance(adapter, LowRank) or type(adapter).merged is not LowRank.merged:
            raise AdapterFileError(
                f"{type(adapter).__name__} on {path!r} is no low-rank product, so it cannot be saved as LoRA. Save it "
                "as it is, or merge(model) and save the weights."
            )
        down, up = adapter.whole_factors()
        rank = min(len(down), up.shape[0], down[0].numel())
        if rank < len(down):  # more factors than directions
            U, values, Vh = torch.linalg.svd(dense(down, up).flatten(1), full_matrices=False)
            down, up = Vh[:rank].unflatten(1, down.shape[1:]), (U * values)[:, :rank]
        lora = adapter.plain_class(Target(path, module, adapter.site, path), rank, scaling=1.0)
        lora.site = adapter.site
        lora.lora_A.copy_(down)
        lora.lora_B.copy_(up)
        plain.append((path, module, lora))
        ranks[path] = rank
        prefix = f"{path}.{adapter.site.key('adapters')}."
        new = {key: value for key, value in new.items() if not key.startswith(prefix)}
        new |= {prefix + key: value.detach() for key, value in lora.state_dict().items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    method = LoRA(
        r=r,
        alpha=None,
        target_modules=tuple(ranks),
        rank_pattern=own_values(ranks, r),
        modules_to_save=tuple(sorted(modules)),
    )
    return method, plain, new
