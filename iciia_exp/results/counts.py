"""Client counts as a torchmetrics metric, over batches, devices and processes.

Legend: C clients of a batch, S images of each, M images, K classes, A decisions of an image.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from iciia_exp.errors import UserError
from iciia_exp.results.summary import COUNTS, ClientCounts
from iciia_exp.tasks import CLICK, Click, Task

__all__ = ["ClientCountsMetric", "Outcomes", "batch_outcomes", "outcomes"]


class Outcomes(NamedTuple):
    """Correct decisions and log-loss of M images, with A decisions each."""

    correct_MA: Tensor  # bool
    loss_M: Tensor  # float64, log-loss in nats
    ranked_MR: Tensor  # of a click task the score that items are ranked by and the label, R = 2; of others R = 0

    def at(self, rows: Tensor) -> Outcomes:
        """Return the outcomes of the images ``rows``."""
        return Outcomes(self.correct_MA[rows], self.loss_M[rows], self.ranked_MR[rows])


def outcomes(task: Task, logits_MK: Tensor, y: Tensor) -> Outcomes:
    """Return the outcomes of logits [M, K] under a task; labels ``y`` as `iciia_exp.tasks` has them."""
    ranked_MR = (
        torch.stack([task.score(logits_MK), y], 1)
        if isinstance(task, Click)
        else logits_MK.new_empty(len(logits_MK), 0)
    )
    return Outcomes(task.correct(logits_MK, y), task.log_loss(logits_MK, y), ranked_MR)


def batch_outcomes(
    task: Task, backbone_CSK: Tensor, method_CSK: Tensor, y_CS: Tensor, mask_CS: Tensor, client_C: Tensor
) -> tuple[Tensor, Outcomes, Outcomes]:
    """Return the arguments of `ClientCountsMetric.update` for a padded batch (`ClientBatch`), without masked images."""
    if method_CSK.shape != backbone_CSK.shape:
        got, wanted = list(method_CSK.shape), list(backbone_CSK.shape)
        raise UserError(
            f"the method gives logits {got} for features of {wanted[0]} clients; expected [C, S, K] {wanted}"
        )
    client_M = client_C[:, None].expand_as(mask_CS)[mask_CS]
    y_M = y_CS[mask_CS]
    return client_M, outcomes(task, backbone_CSK[mask_CS], y_M), outcomes(task, method_CSK[mask_CS], y_M)


#: States of a click task, one entry per item.
_RANKED = ("client", "label", "backbone_score", "method_score")


class ClientCountsMetric(Metric):
    """Accumulates `ClientCounts` for clients by their number.

    In a click task a client's accuracy is its AUC, which takes all scores of the client together: the correct decisions
    are AUC times images. Clients with items of one label only are left out.

    Args:
        clients: number of clients.
        decisions: of one image: 1, or the attributes of a multi-label task (`iciia_exp.tasks.MultiLabel.decisions`).
        ranked: whether it is a click task.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, clients: int, decisions: int = 1, ranked: bool = False) -> None:
        super().__init__()
        self.clients, self.decisions, self.ranked = clients, decisions, ranked
        for name in COUNTS:
            dtype = torch.float64 if name.endswith("loss") else torch.int64
            self.add_state(name, torch.zeros(clients, dtype=dtype), dist_reduce_fx="sum")
        for name in _RANKED if ranked else ():
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, client_M: Tensor, backbone: Outcomes, method: Outcomes) -> None:
        """Add the outcomes of M images; ``client_M``, int64, is the number of the client of each."""
        added = (
            torch.ones_like(client_M),
            backbone.correct_MA.sum(-1),
            method.correct_MA.sum(-1),
            (backbone.correct_MA & method.correct_MA).sum(-1),
            backbone.loss_M,
            method.loss_M,
        )
        for name, value_M in zip(COUNTS, added, strict=True):
            state = getattr(self, name)
            if (
                state.is_inference() and not torch.is_inference_mode_enabled()
            ):  # reset in inference mode: read-only here
                state = state.clone()
            # index_add_ touches the batch's clients alone: adding arrays of 100,000 clients is most of an evaluation
            setattr(self, name, state.index_add_(0, client_M, value_M))

        if self.ranked:
            parts = (client_M, backbone.ranked_MR[:, 1], backbone.ranked_MR[:, 0], method.ranked_MR[:, 0])
            for name, values in zip(_RANKED, parts, strict=True):
                getattr(self, name).append(values)

    def compute(self) -> dict[str, Tensor]:
        """Return the counts, each of shape [clients], summed over processes."""
        found = {name: getattr(self, name) for name in COUNTS}
        if self.ranked:
            client_M, y_M = (dim_zero_cat(getattr(self, name)) for name in ("client", "label"))
            images = found["images"].double()
            for who in ("backbone", "method"):
                score_M = dim_zero_cat(getattr(self, f"{who}_score"))
                twice_C, pairs_C = CLICK.pairs(score_M, y_M, client_M, self.clients)
                found[f"{who}_correct"] = images * twice_C / (2 * pairs_C).clamp(min=1)
            found["both_correct"] = torch.minimum(found["backbone_correct"], found["method_correct"])
            found = {name: torch.where(pairs_C > 0, values, 0) for name, values in found.items()}
        return found

    def counts(self) -> tuple[np.ndarray, ClientCounts]:
        """Return the numbers of the clients with images, and their counts.

        Raises:
            UserError: in a click task without a client that has items of both labels.
        """
        values = {name: value.reshape(-1).cpu().numpy() for name, value in self.compute().items()}
        numbers = np.flatnonzero(values["images"])
        if self.ranked and not len(numbers):
            raise UserError("no client has items of both labels, so that none has an AUC; use more items of a client")
        arrays: dict[str, Any] = {f"{name}_C": values[name][numbers] for name in COUNTS}
        return numbers, ClientCounts(**arrays, decisions=self.decisions, ranked=self.ranked)
