"""Federated training: every rank is a client with data of its own, and they meet at the end of each round.

A round is ``local_steps`` optimizer steps. Then those clients that take part send what they have trained, and all
clients go on from what the server makes of it. There is no server process: every rank computes the same.
"""

import random
import zlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_peft.adapters.low_rank import LowRank, LowRankEmbedding
from lightning_peft.engine import AdapterError, Method, adapters_of, check_range
from lightning_peft.engine.limits import one_of
from lightning_peft.interop.files import adapted_root
from lightning_peft.strategies.aggregation import lora_fair, weighted_mean
from lightning_peft.strategies.averaging import running_statistics
from lightning_peft.strategies.ddp import PEFTDDPStrategy
from lightning_peft.strategies.ranks import gather

Aggregation = Literal["fedavg", "ffa-lora", "lora-fair"]


class PEFTFederatedStrategy(PEFTDDPStrategy):
    """Every rank trains on its own data, and every ``local_steps`` optimizer steps what they trained is aggregated.

    All clients start from the same model, which is checked. Between the ends of two rounds each has its own: what is
    validated, logged or saved then is the client's, on rank 0 that of client 0. At the end of a round, and of training,
    it is the server's. Running statistics of normalisation layers that train are averaged with the rest.

    The data that a rank loads is the client's: none of it is divided among the ranks, whatever
    ``use_distributed_sampler`` says.

    Args:
        method: what to inject, as `PEFT` takes it; None if a `PEFT` callback is in the Trainer's list.
        local_steps: optimizer steps in a round.
        aggregation: ``"fedavg"``, the weighted mean of each tensor; ``"ffa-lora"``, the same with the random factor of
            each low-rank product frozen, so that the mean of the products is exact; ``"lora-fair"``, the mean of A, and
            a B that is corrected for having been averaged apart. The last two are for low-rank adapters.
        sample_weights: one positive number for each client; the number of samples in its training data by default.
        participation: share of the clients whose training counts in a round; drawn anew for each. The others go on
            from the same result, and what they trained is lost.
        keep_optimizer_state: let each client keep its moments across rounds, instead of starting with none.
        seed: of the draw of the clients that take part.
        kwargs: of `PEFTDDPStrategy`.

    Raises:
        AdapterError: an argument is out of range; or, when a run starts, the adapters do not fit the aggregation, the
            clients differ in their models or in the number of batches of an epoch, or the size of their data is not
            known.
    """

    def __init__(
        self,
        method: Method | list[Method] | str | None = None,
        *,
        local_steps: int = 10,
        aggregation: Aggregation = "fedavg",
        sample_weights: tuple[float, ...] | None = None,
        participation: float = 1.0,
        keep_optimizer_state: bool = False,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        who, known = type(self).__name__, get_args(Aggregation)
        check_range(who, "local_steps", local_steps, local_steps >= 1, "an integer >= 1")
        check_range(who, "participation", participation, 0 < participation <= 1, "a number in (0, 1]")
        positive = sample_weights is None or all(weight > 0 for weight in sample_weights)
        check_range(who, "sample_weights", sample_weights, positive, "numbers > 0")
        check_range(who, "aggregation", aggregation, aggregation in known, one_of(known))
        super().__init__(method, **kwargs)
        self.local_steps, self.aggregation, self.sample_weights = local_steps, aggregation, sample_weights
        self.participation, self.keep_optimizer_state, self.seed = participation, keep_optimizer_state, seed
        self._last = _BeforeTrainEnd(self._end_round)
        self._step = 0
        self._weights = torch.ones(0)  # (clients,)
        self._sent: dict[str, Tensor] = {}  # what has trained in this round
        self._low_rank: list[Any] = []
        self._frozen: list[nn.Parameter] = []

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """To Lightning each client is alone with its data."""
        return {"num_replicas": 1, "rank": 0}

    def setup_environment(self) -> None:
        """Take care that the last round ends before any callback hears that training does."""
        super().setup_environment()
        callbacks: list[Any] = self.lightning_module.trainer.callbacks  # type: ignore[union-attr]
        callbacks[:] = [self._last, *(c for c in callbacks if c is not self._last)]

    def _setup_model(self, model: nn.Module) -> nn.Module:  # type: ignore[override]
        model = super()._setup_model(model)
        self._low_rank = [] if self.aggregation == "fedavg" else _low_rank(model, self.aggregation)
        if self.aggregation == "ffa-lora":
            # what starts at random, so that the other, which starts at zero, can train
            factors = [a.lora_B if isinstance(a, LowRankEmbedding) else a.lora_A for a in self._low_rank]
            self._frozen = [p for p in factors if p.requires_grad]
            for p in self._frozen:
                p.requires_grad_(False)
        return model

    def on_train_start(self) -> None:
        """Compare the clients, and weigh them."""
        trainer = self.lightning_module.trainer  # type: ignore[union-attr]
        here = (trainer.num_training_batches, _num_samples(trainer.train_dataloader))
        there: list[Any] = [None] * self.world_size
        dist.all_gather_object(there, here)
        batches, samples = zip(*there, strict=True)
        if len(set(batches)) > 1:
            raise AdapterError(
                f"{type(self).__name__}: the clients have {', '.join(map(str, batches))} batches in an epoch, so their "
                "rounds and epochs would not end together. Give each as many: "
                f"Trainer(limit_train_batches={min(batches)}), with loaders that shuffle, so that every sample has its "
                "turn."
            )
        weights = samples if self.sample_weights is None else self.sample_weights
        if None in weights or len(weights) != self.world_size:
            raise AdapterError(
                f"{type(self).__name__}: there are {self.world_size} clients, with training data of sizes {samples} "
                f"and sample_weights {self.sample_weights}. Give one number for each: "
                "PEFTFederatedStrategy(sample_weights=(...))."
            )
        self._weights = torch.tensor(weights, dtype=torch.float64)
        self._step, self._sent = trainer.global_step, {}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """One local step; the last of a round is followed by the aggregation."""
        output = super().optimizer_step(*args, **kwargs)
        module: Any = self.lightning_module
        self._sent |= {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._step += 1
        if self._step % self.local_steps == 0:
            self._end_round()
        return output

    def _average(self, module: nn.Module) -> None:
        """Gradients stay those of the client."""

    @torch.no_grad()
    def _end_round(self) -> None:
        if not self._sent:
            return
        module: Any = self.lightning_module
        ordered = [(name, p) for name, p in module.named_parameters() if name in self._sent]
        self._sent = {}
        layout: list[Any] = [None] * self.world_size
        dist.all_gather_object(layout, zlib.crc32("".join(name for name, _ in ordered).encode()))
        if len(set(layout)) > 1:
            raise AdapterError(
                f"{type(self).__name__}: the clients have trained different parameters in this round, so there is "
                "nothing to average. Choose them from the step and a seed that all ranks share."
            )
        tensors = [p for _, p in ordered] + running_statistics(module)
        clients = _participants(
            self.world_size, self.participation, f"{self.seed}-{(self._step - 1) // self.local_steps}"
        )
        weights = self._weights[clients] / self._weights[clients].sum()
        stacked = {id(t): of_all[clients] for t, of_all in gather(tensors)}
        result = {key: weighted_mean(of_clients, weights) for key, of_clients in stacked.items()}
        if self.aggregation == "lora-fair":
            for a, b in ((id(adapter.lora_A), id(adapter.lora_B)) for adapter in self._low_rank):
                if a in stacked and b in stacked:
                    result[a], result[b] = lora_fair(stacked[a], stacked[b], weights)
        for t in tensors:
            t.copy_(result[id(t)])
        if not self.keep_optimizer_state:
            for optimizer in self.optimizers:
                optimizer.state.clear()

    def teardown(self) -> None:
        """Let train again what only the aggregation had frozen."""
        while self._frozen:
            self._frozen.pop().requires_grad_(True)
        super().teardown()


class _BeforeTrainEnd(L.Callback):
    """Calls a function when training ends; in front of all callbacks, before any of them saves anything."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.function()


def _low_rank(model: nn.Module, aggregation: str) -> list[Any]:
    """All adapters, which have to be low-rank products."""
    adapters = adapters_of(adapted_root(model))
    others = [(path, adapter) for path, _, adapter in adapters if not _is_plain(adapter)]
    if others or not adapters:
        what = f"{type(others[0][1]).__name__} on {others[0][0]!r}" if others else "no adapter at all"
        raise AdapterError(
            f"PEFTFederatedStrategy: aggregation={aggregation!r} is for low-rank adapters, found {what}. Use "
            "aggregation='fedavg', or a method such as LoRA(r=8)."
        )
    return [adapter for _, _, adapter in adapters]


def _is_plain(adapter: Any) -> bool:
    """Whether the adapter's product is B A and nothing in between, which is what these aggregations average."""
    return isinstance(adapter, LowRank) and type(adapter).factors is LowRank.factors


def _participants(clients: int, share: float, key: str) -> list[int]:
    """The clients of a round, the same on all ranks; one at least."""
    return sorted(random.Random(key).sample(range(clients), max(1, round(share * clients))))


def _num_samples(loaders: Any) -> int | None:
    """Of all datasets below ``loaders``; None if one does not know."""
    try:
        return sum(len(loader.dataset) for loader in tree_leaves(loaders))
    except (TypeError, AttributeError):
        return None
