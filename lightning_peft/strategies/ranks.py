"""What the processes of a run do together: check that they start alike, and average what they computed."""

import zlib
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_peft.engine import AdapterError, adapters_of
from lightning_peft.interop.files import adapted_root

_BITS = 16  # of the layout's hash, sent with every average

Facts = tuple[tuple[int, ...], str, bool, int | None]  # shape, dtype, trained, hash of the values


def check_same_start(module: nn.Module) -> None:
    """Compare parameters and buffers over all ranks: what trains or is injected whole, 128 values of each other.

    Raises:
        AdapterError: they differ; on all ranks, naming the tensors.
    """
    if dist.get_world_size() == 1:
        return
    injected = {id(t) for _, _, a in adapters_of(adapted_root(module)) for t in (*a.parameters(), *a.buffers())}
    here = {
        name: (tuple(t.shape), str(t.dtype), t.requires_grad, _hash(t, whole=t.requires_grad or id(t) in injected))
        for name, t in (*module.named_parameters(), *module.named_buffers())
        if not hasattr(t, "full_tensor")  # a shard is another one on each rank
    }
    there: list[dict[str, Facts]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(there, here)
    names = dict.fromkeys(name for facts in there for name in facts)
    different = {n: r for n in names for r, facts in enumerate(there) if facts.get(n) != there[0].get(n)}
    if different:
        shown = [f"{n} ({_difference(there[0].get(n), there[r].get(n))})" for n, r in different.items()][:3]
        raise AdapterError(
            f"the ranks do not start from the same model: rank {min(different.values())} differs from rank 0 in "
            f"{len(different)} of {len(names)} tensors: {', '.join(shown)}{', ...' if len(different) > 3 else ''}. "
            "Nothing is broadcast at the start, so each process has to load the same weights, with the same method, "
            "and draw the rest from the same seed: L.seed_everything(0) before the model is made."
        )


def _hash(t: Tensor, whole: bool) -> int | None:
    if t.is_meta:
        return None
    flat = t.detach().flatten()
    values = flat if whole or flat.numel() < 128 else torch.cat([flat[:64], flat[-64:]])
    return zlib.crc32(values.contiguous().view(torch.uint8).cpu().numpy().tobytes())


def _difference(one: Facts | None, other: Facts | None) -> str:
    if one is None or other is None:
        return "not on all of them"
    differing = [what for what, a, b in zip(("shape", "dtype", "trained", "values"), one, other, strict=True) if a != b]
    return differing[0] if differing else "values"


def average_gradients(parameters: Iterable[nn.Parameter], check: bool, others: Sequence[Tensor] = ()) -> None:
    """Replace the gradient of each parameter that requires one by its mean over all ranks.

    A gradient that is None on some ranks counts as zeros there; one that is None on all of them stays None. What says
    so travels with the gradients: one number for each parameter, and 16 for a hash of which parameters train.

    Args:
        parameters: the same, in the same order, on all ranks.
        check: compare which parameters train with the other ranks. That, like a gradient that is None, makes the host
            wait for the device.
        others: floating point tensors that are averaged in the same go.

    Raises:
        AdapterError: on another rank, other parameters train.
    """
    everything = list(parameters)
    layout = zlib.crc32(bytes(p.requires_grad for p in everything))
    trained = [p for p in everything if p.requires_grad]
    if not trained:
        return
    there = [p.grad is not None for p in trained]
    bits = [layout >> i & 1 for i in range(_BITS)]
    flags = torch.tensor([*there, *bits], dtype=torch.float32, device=trained[0].device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    average([*gradients, *others, flags])
    if not check and all(there):
        return
    shares = flags.tolist()
    # a rank sends 0 or 1 for each bit, so that the mean is neither only where ranks differ
    if any(min(share, 1 - share) > 0.5 / dist.get_world_size() for share in shares[-_BITS:]):
        raise AdapterError(
            f"other parameters train on rank {dist.get_rank()} than on another rank. Choose them from the step and a "
            "seed that all ranks share, not from a random number that each rank draws by itself."
        )
    for p, gradient, share in zip(trained, gradients, shares, strict=False):
        if p.grad is None and share > 0:
            p.grad = gradient


def average(tensors: Iterable[Tensor], cap_bytes: int = 25 * 2**20) -> None:
    """Replace each tensor by its mean over all ranks, in place; sent in buckets of one dtype and at most this size."""
    for bucket in _buckets(tensors, cap_bytes):
        flat = torch.cat([t.detach().flatten() for t in bucket]).div_(dist.get_world_size())
        dist.all_reduce(flat)
        for t, mean in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            t.detach().copy_(mean.view_as(t))


def gather(tensors: Iterable[Tensor], cap_bytes: int = 25 * 2**20) -> Iterator[tuple[Tensor, Tensor]]:
    """(the tensor, those of all ranks (ranks, ...)) for each; sent in buckets as above, and in their order."""
    for bucket in _buckets(tensors, cap_bytes):
        flat = torch.cat([t.detach().flatten() for t in bucket])
        there = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
        dist.all_gather(there, flat)
        for t, of_all in zip(bucket, torch.stack(there).split([t.numel() for t in bucket], dim=1), strict=True):
            yield t, of_all.reshape(len(there), *t.shape)


def _buckets(tensors: Iterable[Tensor], cap_bytes: int) -> Iterator[list[Tensor]]:
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for t in tensors:
        by_dtype.setdefault(t.dtype, []).append(t)
    for of_one in by_dtype.values():
        bucket: list[Tensor] = []
        for t in of_one:
            if bucket and sum(b.nbytes for b in bucket) + t.nbytes > cap_bytes:
                yield bucket
                bucket = []
            bucket.append(t)
        yield bucket
