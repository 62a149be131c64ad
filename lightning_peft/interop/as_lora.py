"""Changes of weights as plain LoRA, which every server of adapters can load: the same change, or the nearest of a rank.

The nearest in the Frobenius norm is the change without its smallest singular values (Eckart and Young, 1936).
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lightning_peft.adapters.low_rank import LowRank, dense, truncated
from lightning_peft.engine import Adapter, AdapterFileError, Site, Target
from lightning_peft.engine.method import METHOD_STATE
from lightning_peft.engine.slots import base_modules, base_parameters, in_codes, in_codes_because, plain_name
from lightning_peft.engine.targets import candidates
from lightning_peft.interop.hf_format import tied_names
from lightning_peft.methods import LoRA
from lightning_peft.parts.spectrum import leading_svd

Found = list[tuple[str, nn.Module, Adapter]]
Place = tuple[str, nn.Module, Site, Adapter | None]  # module name, module, site, what sits there
Base = Mapping[int, Tensor | None]  # id of a parameter that is trained in place -> its base value, None if not kept

# of larger weights the leading singular values are computed alone: in a fraction of the time, and as exact where the
# change has few directions
_LARGE = 1024
_SMALL_RANK = 64  # up to it, an error says which rank would be exact


class PlainLoRA(NamedTuple):
    """What is written: method, adapters, state; and the layer where it is furthest off, with the relative error."""

    method: LoRA
    found: Found
    state: dict[str, Tensor]
    worst: tuple[str, float]


@torch.no_grad()
def as_lora(
    model: nn.Module, found: Found, state: Mapping[str, Tensor], r: int | None = None, base: Base | None = None
) -> PlainLoRA:
    """The plain LoRA on the original base that computes what the adapters ``found`` do.

    Without ``r`` it is the same function, and its rank is the number of directions in the change: twice that of a
    method that starts at a part of the weight. With ``r`` it is the nearest change of that rank in each layer: filled
    up with zeros where fewer directions do, and of rank min(d_in, d_out) where that is less. Any change of weights will
    do then; and of a model without adapters, weights that were trained in place. The scaling is in the factors.

    Args:
        model: where the names in ``found`` and ``state`` begin.
        found: (module name, module, adapter) of all.
        state: what is saved of them; modules that were trained whole beside them (heads, norms) go along.
        r: the rank that is asked for.
        base: see `Base`.

    Raises:
        AdapterFileError: something was changed that LoRA cannot change, or ``r`` has to be given, or the base is not
            known any more.
    """
    base = base or {}
    parameters = {plain_name(name): p for name, p in model.named_parameters()}
    inside = tuple(adapter.site.prefix(path) for path, _, adapter in found)
    new = {key: v for key, v in state.items() if not key.startswith((METHOD_STATE, *inside))}
    trained = {id(parameters[key]): value for key, value in new.items() if key in parameters}
    places: list[Place] = [(path, module, adapter.site, adapter) for path, module, adapter in found]
    if not found and r is not None:
        here = [t for t in candidates(model) if t.site.kind in LoRA.adapter_types]
        here = [t for t in here if id(t.module._parameters[t.site.weight]) in trained]
        places = [(plain_name(t.owner), t.module, t.site, None) for t in here]
        replaced = {id(t.module._parameters[t.site.weight]) for t in here}
        new = {key: value for key, value in new.items() if id(parameters.get(key)) not in replaced}
    plain: Found = []
    ranks: dict[str, int] = {}
    worst = ("", 0.0)
    for path, module, site, adapter in tqdm(places, desc="LoRA", unit="layer", delay=2, leave=False):
        if _is_low_rank(adapter):
            down, up = adapter.whole_factors()
            rank = min(len(down) if r is None else r, up.shape[0], down[0].numel())
            down, up, error = truncated(down, up, rank)
        elif r is None:
            raise _no_low_rank(path, adapter, places, base)
        else:
            weight, delta = _change(path, module, site, adapter, trained, base)
            if adapter is None and not delta.any():
                continue
            rank = min(r, len(delta), delta[0].numel())
            down, up, error = _nearest(delta, rank)
        cls = LoRA.adapter_types[site.kind]
        lora = cls(Target(path, module, site, path), rank, scaling=1.0)
        lora.site = site
        more = rank - len(down)
        lora.lora_A.copy_(F.pad(down, (*[0] * 2 * (down.dim() - 1), 0, more)))  # type: ignore[operator]
        lora.lora_B.copy_(F.pad(up, (0, more)))  # type: ignore[operator]
        plain.append((path, module, lora))
        ranks[site.name(path)] = rank
        new |= {site.prefix(path) + key: value.detach() for key, value in lora.state_dict().items()}
        worst = max(worst, (path, float(error)), key=lambda pair: pair[1])
    if not plain:
        raise AdapterFileError(_NOTHING)
    whole = _whole_modules(parameters, new, {path for path, *_ in places}, base)
    return PlainLoRA(lora_of(ranks, whole, model), plain, new, worst)


_NOTHING = (
    "nothing but weights of the base was trained, so there is no adapter that could be saved as LoRA. Save it as it "
    "is, or save the weights of the model. (With as_lora=r, what has changed in the weights of linear, convolution and "
    "embedding layers becomes LoRA of rank r; here nothing of that kind has.)"
)


def _is_low_rank(adapter: Adapter | None) -> TypeGuard[LowRank]:
    return isinstance(adapter, LowRank) and adapter.adds_product


def _base_value(path: str, module: nn.Module, name: str, base: Base) -> Tensor:
    parameter = module._parameters[name]
    value = base.get(id(parameter), parameter)
    if value is None:
        raise AdapterFileError(
            f"the base value of {path!r} was not kept while it was trained in place, so its change is not known. Save "
            "the adapter as it is: 'lightning-peft convert ... --r' compares it with a base that it is given."
        )
    return value


def _change(
    path: str, module: nn.Module, site: Site, adapter: Adapter | None, trained: Mapping[int, Tensor], base: Base
) -> tuple[Tensor, Tensor]:
    """The base weight (d_out, d_in, ...) and its change, in float32 at least."""
    because = adapter.unmergeable_because() if adapter else None
    if because is None and site.kind not in LoRA.adapter_types:
        because = f"LoRA does not sit on {site.kind} layers."
    if because is None and in_codes(module, site):
        because = in_codes_because(module, site)
    if because is not None:
        raise AdapterFileError(
            f"{type(adapter).__name__} on {path!r} cannot be saved as LoRA: {because} Save it as it is."
        )
    before = _base_value(path, module, site.weight, base)
    exact = torch.promote_types(before.dtype, torch.float32)
    weight = (before.T if site.transposed else before).to(exact)
    if adapter is None:
        after = trained[id(module._parameters[site.weight])]
        return weight, (after.T if site.transposed else after).to(exact) - weight.to(after.device)
    has_bias = site.bias is not None and module._parameters[site.bias] is not None
    bias = _base_value(path, module, site.bias, base).to(exact) if has_bias else None  # type: ignore[arg-type]
    new, new_bias = adapter.merged(weight, bias)
    if new_bias is not None and (bias is None or not torch.equal(new_bias, bias)):
        raise AdapterFileError(
            f"{type(adapter).__name__} on {path!r} changes the bias as well, so it cannot be saved as LoRA. Save it as "
            "it is, or merge(model) and save the weights."
        )
    return weight, new - weight


def _nearest(delta: Tensor, r: int) -> tuple[Tensor, Tensor, float]:
    """Factors (r, d_in, ...) and (d_out, r) of the nearest change of rank ``r``, and its relative Frobenius error."""
    U, values, Vh = _leading(delta, r)
    down, up = Vh.unflatten(1, delta.shape[1:]), U * values
    size = delta.norm()
    return down, up, float((delta - dense(down, up)).norm() / size) if size else 0.0


def _leading(delta: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = delta.flatten(1)
    short = min(flat.shape)
    niter = 8 if short > _LARGE and 8 * r < short else None
    return leading_svd(flat, r, niter, torch.Generator().manual_seed(0))


def _no_low_rank(path: str, adapter: Adapter | None, places: list[Place], base: Base) -> AdapterFileError:
    """The error for a change that is no low-rank product; it says which rank would be exact, where that is small."""
    needed = 1
    for where, module, site, other in places:
        if _is_low_rank(other):
            needed = max(needed, len(other.whole_factors()[0]))
            continue
        weight, delta = _change(where, module, site, other, {}, base)
        values = _leading(delta, min(_SMALL_RANK + 1, len(delta), delta[0].numel()))[1]
        # what rounding leaves of the weight when it is taken off, and of the largest singular values in the others
        noise = 4 * torch.finfo(delta.dtype).eps * float(weight.norm() + delta.norm())
        needed = max(needed, int((values > noise).sum()))
    exact = f", and as_lora={needed} is exact here" if needed <= _SMALL_RANK else ""
    return AdapterFileError(
        f"{type(adapter).__name__} on {path!r} is no low-rank product, so it cannot be saved as LoRA as it is. "
        f"as_lora=r (--r on the command line) writes the nearest one of rank r{exact}. Or save it as it is."
    )


def _whole_modules(
    parameters: Mapping[str, nn.Parameter], state: dict[str, Tensor], adapted: set[str], base: Base
) -> tuple[str, ...]:
    """Modules that were trained whole; what has not changed beside an adapter leaves ``state``."""
    beside = [key for key in state if key in parameters]
    for key in beside:
        before = base.get(id(parameters[key]))
        if key.rpartition(".")[0] in adapted and before is not None and torch.equal(before.to(state[key]), state[key]):
            del state[key]
    modules = {key: key.rpartition(".")[0] for key in beside if key in state}
    for key, module in modules.items():
        if not module or any(name.startswith(f"{module}.") and name not in state for name in parameters):
            raise AdapterFileError(
                f"{key!r} was trained beside weights that become LoRA, or without the rest of its module, so it "
                "cannot be saved as LoRA. Save the adapter as it is, or save the weights of the model."
            )
    return tuple(sorted(set(modules.values())))


def lora_of(ranks: Mapping[str, int], whole: Collection[str], model: nn.Module) -> LoRA:
    """LoRA on the layers of ``model`` named in ``ranks``, with the scaling in its factors, and ``whole`` beside it.

    Of a tie both ends are named.
    """
    usual = Counter(ranks.values()).most_common(1)[0][0]
    own: dict[str, int] = {}
    for r in set(ranks.values()) - {usual}:
        own |= dict.fromkeys(_patterns([layer for layer in ranks if ranks[layer] == r], ranks), r)
    modules = {plain_name(path) for path, _ in base_modules(model)}
    both_ends = [{name.rpartition(".")[0] for name in names} for names in tied_names(model)]
    whole = sorted({*whole, *(end for ends in both_ends if ends & {*whole} for end in ends)})
    return LoRA(
        r=usual,
        alpha=None,
        target_modules=_patterns(ranks, modules | {target.name for target in candidates(model)}),
        rank_pattern=own,
        modules_to_save=_patterns(whole, modules | {plain_name(name) for name in base_parameters(model)}),
    )


def _patterns(names: Collection[str], everything: Collection[str]) -> tuple[str, ...]:
    """What selects ``names`` and nothing else of ``everything``: of each as few last parts as that takes.

    So it does the same where the model is inside of another, or is what was inside.
    """
    ending: dict[str, set[str]] = {}
    for name in everything:
        for tail in _tails(name):
            ending.setdefault(tail, set()).add(name)
    chosen = [next((t for t in _tails(n) if ending[t] <= set(names)), f"^{re.escape(n)}") for n in names]
    return tuple(dict.fromkeys(chosen))


def _tails(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
