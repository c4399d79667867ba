"""Click models as backbones: rows of ids in, the last hidden layer and the logits as features.

Legend: B rows of a batch, H L slots of the histories, h numbers of the last hidden layer.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iciia_exp.data.clients import Ragged
from iciia_exp.errors import ConfigError, check_choice, check_int
from iciia_exp.models.backbones.base import Backbone, other_form
from iciia_exp.models.on_catalog import OnCatalog, multi_hot
from iciia_exp.models.recommenders import HISTORIES, RECOMMENDERS

__all__ = ["ClickModel"]


class ClickModel(Backbone):
    """A recommender on rows of user, item and histories (`iciia_exp.models.recommenders`).

    Its features are the last hidden layer and the two logits, [B, h + 2]; the classifier takes the logits from them and
    is not trained.

    Args:
        num_classes: 2, no and yes.
        model: one of ``lr``, ``wide_deep``, ``pnn``, ``deepfm`` and ``din``.
        item_width: of the embeddings of items and categories; null: those of the model. ``lr`` has none.
        users: number of users; the dataset tells it, as the others.
        items: number of items.
        item_categories: numbers of the categories of every item.
    """

    transform_settings = ()
    trunk_prefix = "net."

    def __init__(
        self,
        num_classes: int,
        model: str = "wide_deep",
        item_width: int | None = None,
        users: int | None = None,
        items: int | None = None,
        item_categories: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        check_choice("model", model, tuple(RECOMMENDERS))
        if users is None or items is None or item_categories is None or num_classes != 2:
            problem = "takes users and items, as of dataset=movielens; choose another backbone for images"
            raise ConfigError("", "recommender", problem)
        widths: dict[str, Any] = {}
        if item_width is not None:
            if model == "lr":
                raise ConfigError("item_width", item_width, "lr has no embeddings; use null")
            widths["item_width"] = check_int("item_width", item_width, 1, 4096)
        rows = Ragged.from_rows([np.array(numbers, dtype=np.int64) for numbers in item_categories])
        ids = torch.from_numpy(rows.padded(np.arange(items), max(1, int(rows.lengths.max(initial=0)))))
        categories = 1 + max(0, int(ids.max()))
        made = RECOMMENDERS[model](users, items, categories, **widths)
        made.start_afresh()
        self.net = OnCatalog(made, multi_hot(ids, categories))
        self.dim = made.hidden + 2
        self.head = nn.Linear(self.dim, 2).requires_grad_(False)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(self.dim)[made.hidden :])
            self.head.bias.zero_()

    def features(self, images: Tensor) -> Tensor:
        """Return the last hidden layer and the logits, [B, h + 2]."""
        return torch.cat(self.net.states(images), -1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, 2]."""
        return self.net(images)

    def fresh_head(self, num_classes: int) -> None:
        """Refuse other classes than no and yes."""
        raise ConfigError("weights", num_classes, "the classifier of a click model has two outputs")

    def transform(self, image: Any) -> Tensor:
        """Turn a row of ids, int32 [2 + H L], into the input."""
        if np.ndim(image) != 1 or len(image) % HISTORIES or np.asarray(image).dtype != np.int32:
            raise other_form("recommender", "rows of ids", image)
        return torch.from_numpy(np.asarray(image))
