"""Click models on rows of numbers: user, item, and the items of the user's histories.

Legend: B rows, F = 2 + H L numbers of a row, H histories, L slots of a history, I items, G categories.
"""

import torch
from torch import Tensor, nn

from iciia_exp.models.recommenders import HISTORIES, Interactions, Recommender

__all__ = ["OnCatalog", "is_table", "multi_hot"]


def multi_hot(ids: Tensor, categories: int) -> Tensor:
    """Return how often every number is there, [..., N] to [..., categories]; -1 is none."""
    found = torch.zeros(*ids.shape[:-1], categories + 1)
    return found.scatter_add_(-1, torch.where(ids < 0, categories, ids), torch.ones(ids.shape))[..., :-1]


def is_table(name: str) -> bool:
    """Return whether a parameter of `OnCatalog` is a table."""
    return name.startswith("net.tables.")


class OnCatalog(nn.Module):
    """A click model on rows of numbers: user, item, and the items of each history, -1 where a slot is empty.

    Args:
        net: the model.
        categories_IG: how often an item has each category, 0 or 1 as a rule (`multi_hot`).
        tags_IT: further numbers of every item, for `LR`.
    """

    def __init__(self, net: Recommender, categories_IG: Tensor, tags_IT: Tensor | None = None) -> None:
        super().__init__()
        self.net = net
        self.categories_IG: Tensor
        self.tags_IT: Tensor
        self.register_buffer("categories_IG", categories_IG)
        self.register_buffer("tags_IT", categories_IG[:, :0] if tags_IT is None else tags_IT)

    def read(self, x_BF: Tensor) -> Interactions:
        """Return users, items and histories of rows [B, 2 + H L]."""
        user_B, item_B, histories_BN = x_BF[:, 0].long(), x_BF[:, 1].long(), x_BF[:, 2:].long()
        items_BHL = histories_BN.unflatten(1, (HISTORIES, -1))
        of_items = self.categories_IG[items_BHL.clamp(min=0)]
        categories_BHLG = of_items * (items_BHL >= 0).unsqueeze(-1)
        of_target, tags_BT = self.categories_IG[item_B], self.tags_IT[item_B]
        return Interactions(user_B, item_B, of_target, items_BHL, categories_BHLG, tags_BT)

    def states(self, x_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last hidden layer [B, h] and the logits [B, 2]."""
        x = self.read(x_BF)
        return self.net.compute(x, self.net.lookup(x))

    def forward(self, x_BF: Tensor) -> Tensor:
        """Return the logits [B, 2]."""
        return self.states(x_BF)[1]
