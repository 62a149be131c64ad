"""Losses that papers bring along, for a training step to use."""

from torch import Tensor, nn


class InvertedHingeLoss(nn.Module):
    """Makes another answer than the target the likeliest; in [0, 2], and 0 where the model is sure of another.

    Args:
        ignore_index: targets that do not count.

    >>> import torch
    >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 50.0]])
    >>> loss = InvertedHingeLoss()(logits, torch.tensor([0, 0]))  # the second target is forgotten
    >>> round(loss.item(), 2)
    0.84
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over all ``targets`` (...) that count, for ``logits`` (..., classes); 0 if none does.

        A language model predicts the next token, so shift first: ``loss(logits[:, :-1], tokens[:, 1:])``.
        """
        counts = targets != self.ignore_index
        p, chosen = logits[counts].softmax(-1), targets[counts][:, None]
        of_target, of_others = p.gather(-1, chosen)[:, 0], p.scatter(-1, chosen, 0.0).amax(-1)
        return (1 + of_target - of_others).clamp_min(0).sum() / counts.sum().clamp_min(1)
