"""Steps of a site's training: batches, SGD beside fixed logits, and passes without gradients.

Legend: n images of a site, B images of a batch, K classes.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iciia_exp.methods.cotrain.sites import Samples

__all__ = ["batches_of", "freeze_all_but", "logits_of", "set_mode", "train_steps"]

_AT_ONCE = 512  # images of a pass without gradients


def train_steps(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: Samples,
    partner: Tensor | None,
    batches: Sequence[np.ndarray],
    proximal: float = 0.0,
) -> float:
    """Train a network by the cross-entropy of its logits plus those of its partner; return the mean loss.

    Args:
        network: images [B, ...] to logits [B, K], in the mode that it is to have.
        optimizer: of its trained parameters.
        samples: images and labels.
        partner: logits [n, K] that are added; None: nothing.
        batches: rows of every step.
        proximal: half of it times the squared distance to the first weights is added to the loss (FedProx).
    """
    start = [p.detach().clone() for p in network.parameters()] if proximal else []
    training, losses = network.training, []
    with torch.enable_grad():
        for rows in batches:
            at = torch.from_numpy(rows).to(samples.y.device)
            set_mode(network, training, len(rows))
            logits_BK = network(samples.x[at])
            if partner is not None:
                logits_BK = logits_BK + partner[at]
            loss = F.cross_entropy(logits_BK, samples.y[at])
            for p, first in zip(network.parameters(), start, strict=False):
                loss = loss + proximal / 2 * (p - first).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return float(torch.stack(losses).mean()) if losses else 0.0


def set_mode(network: nn.Module, training: bool, images: int) -> None:
    """Put a network in the mode for a batch: `BatchNorm1d`, in training, has no variance of one image."""
    if training and images == 1:
        training = not any(isinstance(module, nn.BatchNorm1d) for module in network.modules())
    if network.training != training:
        network.train(training)


@torch.no_grad()
def logits_of(network: nn.Module, x: Tensor) -> Tensor:
    """Return the logits of some images in evaluation mode, [n, K], a part of them at a time."""
    network.eval()
    return torch.cat([network(part) for part in x.split(_AT_ONCE)])


def batches_of(images: int, size: int, epochs: int, seed: int, steps: int | None) -> Iterator[np.ndarray]:
    """Yield the rows of every step: new orders of all images, cut to parts of about ``size``.

    With ``steps``, that many parts of exactly ``size`` images, or of all if there are fewer.
    """
    rng = np.random.default_rng(seed)
    if steps is None:
        for _ in range(epochs):
            yield from np.array_split(rng.permutation(images), -(-images // size))
        return
    size, left = min(size, images), np.empty(0, dtype=np.int64)
    for _ in range(steps):
        if len(left) < size:
            left = np.concatenate([left, rng.permutation(images)])
        yield left[:size]
        left = left[size:]


def freeze_all_but(network: nn.Module, part: str) -> list[nn.Parameter]:
    """Let the parameters whose names start with ``part`` be trained, and return them."""
    for name, p in network.named_parameters():
        p.requires_grad_(name.startswith(part))
    return [p for p in network.parameters() if p.requires_grad]
