"""Losses that papers bring along, for a training step to use."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.engine import AdapterError


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


def contrastive_denoising_loss(
    errors: Tensor, *, scale: float = 4.0, temperature: float = 0.07, dweight: float = 0.0
) -> Tensor:
    """Each image is denoised best with its own text: cross-entropy over the texts, arXiv:2503.08250.

    Args:
        errors: (n, n), the mean squared error of image i (row) denoised with text j (column); all with the same noise
            at the same time step.
        scale: factor of the logits ``scale * exp(-errors / temperature)``.
        temperature: of the errors.
        dweight: weight of the errors with their own texts, which are added.

    Returns:
        A scalar; log n where no text makes a difference.

    Raises:
        AdapterError: ``errors`` is not square, or of one image, which has nothing to be told from.

    >>> import math
    >>> loss = contrastive_denoising_loss(torch.tensor([[0.0, 9.0], [9.0, 0.0]]))  # logits 4 and 0
    >>> round(loss.item(), 4) == round(math.log(1 + math.exp(-4)), 4)
    True
    """
    if errors.dim() != 2 or errors.shape[0] != errors.shape[1] or len(errors) < 2:
        raise AdapterError(
            f"contrastive_denoising_loss: errors is {tuple(errors.shape)}, expected (n, n) for n >= 2 images and "
            "their n texts. Denoise each image with each text, and take the mean over channels and pixels."
        )
    errors = errors.to(torch.promote_types(errors.dtype, torch.float32))
    logits = scale * torch.exp(-errors / temperature)
    own = torch.arange(len(errors), device=errors.device)
    return F.cross_entropy(logits, own) + dweight * errors.diagonal().mean()
