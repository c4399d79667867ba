"""Recommenders: click models on user, target item and the user's histories of items.

Source: the models of MPDA (KDD 2022, 2180-2190), layer by layer as released: DIN (KDD 2018), Wide & Deep (DLRS 2016),
PNN (ICDM 2016), DeepFM (IJCAI 2017) and logistic regression. Batch norms and Dice use running statistics that never
move, neither in the cloud nor on a device: mean 0 and variance 1, unless weights bring others.

A model reads its tables first (`Recommender.lookup`) and computes on what it has read (`Recommender.compute`), so that
gradients can be taken for the rows that were read, and not for whole tables.

Legend: B interactions, H histories, L slots of a history, G categories, N rows or sums that are read, d width of item
and of category embeddings, u width of a user's, e = 2 d of an item with its categories.
"""

from abc import abstractmethod
from collections.abc import Mapping
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["DIN", "LR", "PNN", "RECOMMENDERS", "DeepFM", "Interactions", "Pool", "Recommender", "WideDeep"]

#: Histories of a user: disliked and liked items.
HISTORIES = 2
#: Tables of two numbers for every id: user, target, and each history.
_LINEAR = {"user_linear": 2} | {f"{ids}_linear_{at}": 2 for ids in ("item", "category") for at in range(1 + HISTORIES)}
#: Epsilon of the batch norms.
_EPS = 1e-3
#: Weight before the softmax of a slot that is empty.
_MASKED = -(2.0**32) + 1


class Interactions(NamedTuple):
    """Users and items that they may like."""

    user_B: Tensor  # int64
    item_B: Tensor
    categories_BG: Tensor  # how often the item has each category, 0 or 1 as a rule
    items_BHL: Tensor  # the histories, disliked items before liked ones; -1 where a slot is empty
    categories_BHLG: Tensor  # of empty slots 0
    tags_BT: Tensor  # further numbers of the item, for `LR`; [B, 0] otherwise


class Pool(NamedTuple):
    """Weighted sums of a table's rows."""

    weights_BNG: Tensor  # of every row of the table
    squares_BN: Tensor  # sum of the squares of the weights; a row that is looked up twice counts twice


class Recommender(nn.Module):
    """A click model: logits [B, 2] of no and yes.

    Args:
        users, items, categories: numbers of each.
        widths: of the rows of its tables; a table's name begins with what its rows are for: ``user``, ``item`` or
            ``category``.
    """

    #: Whether every row that is read has a gradient of its own, as of a table; False: as of a matrix on a multi-hot
    #: vector, where equal ids share a row.
    rows_apart: ClassVar[bool] = True

    def __init__(self, users: int, items: int, categories: int, widths: Mapping[str, int]) -> None:
        super().__init__()
        sizes = {"user": users, "item": items, "category": categories}
        tables = {name: nn.Embedding(sizes[name.split("_")[0]], width) for name, width in widths.items()}
        self.tables = nn.ModuleDict(tables)

    def start_afresh(self) -> None:
        """Draw tables and matrices as the released code does: Glorot's uniform, biases 0.

        PyTorch's normal numbers of deviation 1 in tables cost 8 points of GAUC on ml-latest-small.
        """
        for layer in self.modules():
            if isinstance(layer, nn.Embedding | nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    @abstractmethod
    def places(self, x: Interactions) -> dict[str, Tensor]:
        """Return the rows that are read of tables, int64 [B, N], by name of the table."""

    @abstractmethod
    def pools(self, x: Interactions) -> dict[str, Pool]:
        """Return the sums that are read of the other tables, those of categories, by name of the table."""

    def lookup(self, x: Interactions) -> dict[str, Tensor]:
        """Return the rows at `places` and the sums of `pools`, [B, N, width], by name of the table."""
        rows = {name: self.tables[name](place) for name, place in self.places(x).items()}
        for name, pool in self.pools(x).items():
            table = self.tables[name].weight
            assert isinstance(table, Tensor)
            rows[name] = pool.weights_BNG @ table
        return rows

    #: h, numbers of the last hidden layer.
    hidden: ClassVar[int] = 80

    @abstractmethod
    def compute(self, x: Interactions, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the last hidden layer [B, h] and the logits [B, 2], from what `lookup` returns."""

    def forward(self, x: Interactions, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the logits [B, 2], from ``rows`` if what `lookup` returns is there already."""
        return self.compute(x, self.lookup(x) if rows is None else rows)[1]


class _Embedded(Recommender):
    """A model on embeddings of user, target and slots.

    Args:
        users, items, categories: numbers of each.
        user_width: u.
        item_width: d, of an item's embedding and of a category's.
    """

    def __init__(self, users: int, items: int, categories: int, user_width: int, item_width: int) -> None:
        widths = {"user": user_width, "item": item_width, "category": item_width}
        super().__init__(users, items, categories, {**widths, **self.more_tables})

    #: Further tables.
    more_tables: ClassVar[Mapping[str, int]] = {}

    def places(self, x: Interactions) -> dict[str, Tensor]:
        """Return the rows that are read of users and items; an empty slot reads item 0, a row like others."""
        items = torch.cat([x.item_B[:, None], x.items_BHL.flatten(1)], 1)
        return {"user": x.user_B[:, None], "item": items.clamp(min=0)}

    def target(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Return the vector of the target, [B, e], the mean of its categories first."""
        return torch.cat([rows["category"][:, 0], rows["item"][:, 0]], -1)


def _mean(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of the mean of some categories, [..., G] (0 without any), and their squares [...]."""
    number = counts.sum(-1, keepdim=True)
    return counts / (number + 1e-7), (number / (number + 1e-7).square())[..., 0]


def _linear_items(x: Interactions) -> dict[str, Tensor]:
    """Return the users and items of the tables of two numbers, int64 [B, N], -1 where there is none."""
    items = [x.item_B[:, None], *x.items_BHL.unbind(1)]
    return {"user_linear": x.user_B[:, None]} | {f"item_linear_{at}": ids for at, ids in enumerate(items)}


def _linear_places(x: Interactions) -> dict[str, Tensor]:
    return {name: ids.clamp(min=0) for name, ids in _linear_items(x).items()}


def _linear_pools(x: Interactions) -> dict[str, Pool]:
    """Return the sums of the two numbers of all categories, those of a history together."""
    weights = [x.categories_BG, *x.categories_BHLG.sum(2).unbind(1)]
    return {f"category_linear_{at}": Pool(w[:, None], w.sum(-1, keepdim=True)) for at, w in enumerate(weights)}


def _linear(x: Interactions, rows: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of the two numbers of all ids, [B, 2]."""
    items = [(rows[name] * (ids >= 0).unsqueeze(-1)).sum(1) for name, ids in _linear_items(x).items()]
    return torch.stack([*items, *(rows[f"category_linear_{at}"][:, 0] for at in range(1 + HISTORIES))]).sum(0)


class _Norm(nn.Module):
    """A batch norm by fixed statistics, with the names of PyTorch's. Modes of training do not change it."""

    def __init__(self, width: int, eps: float = _EPS, affine: bool = True) -> None:
        super().__init__()
        self.eps, self.affine = eps, affine
        if affine:
            self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised input, with its shape."""
        normed = (x - self.running_mean) * (self.running_var + self.eps).rsqrt()
        return normed * self.weight + self.bias if self.affine else normed


class Dice(nn.Module):
    """An activation between x and alpha x, by the sigmoid of x normalised (DIN, section 5.3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(width))
        self.norm = _Norm(width, eps=1e-9, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation, with the shape of ``x``."""
        p = self.norm(x).sigmoid()
        return self.alpha * (1 - p) * x + p * x


def _perceptron(width: int, activation: type[nn.Module] | None = None) -> nn.Sequential:
    """Return 200, 80 and 2 outputs; by default with a PReLU for every number."""
    made = [nn.PReLU(n, init=0.0) if activation is None else activation() for n in (200, 80)]
    return nn.Sequential(nn.Linear(width, 200), made[0], nn.Linear(200, 80), made[1], nn.Linear(80, 2))


def _through(net: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input of the last layer, and its output."""
    hidden = net[:-1](x)
    return hidden, net[-1](hidden)


class _Attention(nn.Module):
    """Attention of a target to the slots of a history, by a perceptron of both (DIN, section 4.3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (2 * width, 80, 40)
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.Sigmoid())]
        self.score = nn.Sequential(*layers, nn.Linear(40, 1))

    def forward(self, target_Be: Tensor, slots_BLe: Tensor, there_BL: Tensor) -> Tensor:
        """Return the weighted sum of the slots, [B, e]; of a history without items all slots weigh the same."""
        pairs = torch.cat([target_Be.unsqueeze(1).expand_as(slots_BLe), slots_BLe], -1)
        score_BL = self.score(pairs)[..., 0]
        weight_BL = torch.where(there_BL, score_BL, _MASKED).softmax(-1)
        return (weight_BL.unsqueeze(-1) * slots_BLe).sum(1)


class DIN(_Embedded):
    """Deep interest network: each history by attention, and its plain sum."""

    def __init__(self, users: int, items: int, categories: int, user_width: int = 9, item_width: int = 9) -> None:
        super().__init__(users, items, categories, user_width, item_width)
        e = 2 * item_width
        self.attention = nn.ModuleList(_Attention(e) for _ in range(HISTORIES))
        width = user_width + (2 * HISTORIES + 1) * e
        self.norm = _Norm(width)
        self.net = nn.Sequential(nn.Linear(width, 200), Dice(200), nn.Linear(200, 80), Dice(80), nn.Linear(80, 2))

    def pools(self, x: Interactions) -> dict[str, Pool]:
        """Return the means of the categories of target and slots."""
        return {"category": Pool(*_mean(torch.cat([x.categories_BG[:, None], x.categories_BHLG.flatten(1, 2)], 1)))}

    def compute(self, x: Interactions, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the last hidden layer [B, h] and the logits [B, 2]."""
        slots_BNe = torch.cat([rows["category"][:, 1:], rows["item"][:, 1:]], -1)
        slots_BHLe, target_Be = slots_BNe.unflatten(1, x.items_BHL.shape[1:]), self.target(rows)
        parts = [rows["user"][:, 0]]
        for h, attend in enumerate(self.attention):
            slots_BLe = slots_BHLe[:, h]
            parts += [attend(target_Be, slots_BLe, x.items_BHL[:, h] >= 0), slots_BLe.sum(1)]
        return _through(self.net, self.norm(torch.cat([*parts, target_Be], -1)))


class _FieldModel(_Embedded):
    """A model of four fields of one width, each with a batch norm: user, the histories' sums, target.

    Args:
        users, items, categories: numbers of each.
        item_width: d, of an item's embedding and of a category's; a user's is twice as wide.
    """

    def __init__(self, users: int, items: int, categories: int, item_width: int = 9) -> None:
        super().__init__(users, items, categories, 2 * item_width, item_width)
        #: Number of fields, and their width.
        self.count, self.width = HISTORIES + 2, 2 * item_width
        self.norms = nn.ModuleList(_Norm(self.width) for _ in range(self.count))

    def pools(self, x: Interactions) -> dict[str, Pool]:
        """Return the mean of the target's categories, and for each history the sum of the means of its slots."""
        target, slots = _mean(x.categories_BG), _mean(x.categories_BHLG)
        both = (torch.cat([one[:, None], many.sum(2)], 1) for one, many in zip(target, slots, strict=True))
        return {"category": Pool(*both)}

    def normed(self, x: Interactions, rows: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the fields [B, e]."""
        items_BHd = rows["item"][:, 1:].unflatten(1, x.items_BHL.shape[1:]).sum(2)
        histories_BHe = torch.cat([rows["category"][:, 1:], items_BHd], -1)
        fields = [rows["user"][:, 0], *histories_BHe.unbind(1), self.target(rows)]
        return [norm(field) for norm, field in zip(self.norms, fields, strict=True)]


class WideDeep(_FieldModel):
    """Wide & Deep: a perceptron, and a linear layer on the fields and their products."""

    def __init__(self, users: int, items: int, categories: int, item_width: int = 9) -> None:
        super().__init__(users, items, categories, item_width)
        self.net = _perceptron(self.count * self.width)
        pairs = self.count * (self.count - 1) // 2
        self.wide = nn.Linear((self.count + pairs) * self.width, 2, bias=False)

    def compute(self, x: Interactions, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the last hidden layer [B, h] and the logits [B, 2]."""
        fields = self.normed(x, rows)
        products = [a * b for i, a in enumerate(fields) for b in fields[i + 1 :]]
        hidden_Bh, deep_B2 = _through(self.net, torch.cat(fields, -1))
        return hidden_Bh, deep_B2 + self.wide(torch.cat(fields + products, -1))


class PNN(_FieldModel):
    """Product network: a perceptron on the fields and on products of them.

    The released loop appends products to the list that it walks: 4 fields become 21 blocks, and not 10.
    """

    def __init__(self, users: int, items: int, categories: int, item_width: int = 9) -> None:
        super().__init__(users, items, categories, item_width)
        self.net = _perceptron(len(self._blocks([torch.zeros(1)] * self.count)) * self.width)

    def _blocks(self, fields: list[Tensor]) -> list[Tensor]:
        blocks = list(fields)
        for i in range(len(fields) - 1):
            blocks += [blocks[i] * other for other in blocks[i + 1 :]]
        return blocks

    def compute(self, x: Interactions, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the last hidden layer [B, h] and the logits [B, 2]."""
        return _through(self.net, torch.cat(self._blocks(self.normed(x, rows)), -1))


class DeepFM(_FieldModel):
    """DeepFM: a perceptron, the dot products of the fields, and two numbers for every id."""

    more_tables = _LINEAR

    def __init__(self, users: int, items: int, categories: int, item_width: int = 9) -> None:
        super().__init__(users, items, categories, item_width)
        self.net = _perceptron(self.count * self.width, nn.Sigmoid)
        self.cross = nn.Linear(self.count * (self.count - 1) // 2, 2, bias=False)
        self.linear_norm = _Norm(2)

    def places(self, x: Interactions) -> dict[str, Tensor]:
        """Return the rows that are read of every table."""
        return super().places(x) | _linear_places(x)

    def pools(self, x: Interactions) -> dict[str, Pool]:
        """Return the sums that are read of the tables of categories."""
        return super().pools(x) | _linear_pools(x)

    def compute(self, x: Interactions, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the last hidden layer [B, h] and the logits [B, 2]."""
        fields = self.normed(x, rows)
        dots = [(a * b).sum(-1) for i, a in enumerate(fields) for b in fields[i + 1 :]]
        linear_B2 = self.linear_norm(_linear(x, rows))
        hidden_Bh, deep_B2 = _through(self.net, torch.cat(fields, -1))
        return hidden_Bh, deep_B2 + self.cross(torch.stack(dots, -1)) + linear_B2


class LR(Recommender):
    """Logistic regression: two numbers for every id of every input, a linear layer on tags, and a batch norm.

    It has no hidden layer.

    Args:
        users, items, categories: numbers of each.
        tags: T, further numbers of an item.
    """

    rows_apart = False
    hidden = 0

    def __init__(self, users: int, items: int, categories: int, tags: int = 0) -> None:
        super().__init__(users, items, categories, _LINEAR)
        self.bias = nn.Parameter(torch.zeros(2))
        self.tags = nn.Linear(tags, 2, bias=False) if tags else None
        self.norm = _Norm(2)

    def start_afresh(self) -> None:
        """Draw the tables as the one matrix that they are in the released code."""
        rows = sum(table.num_embeddings for table in self.tables.values() if isinstance(table, nn.Embedding))
        bound = (6 / (rows + (0 if self.tags is None else self.tags.in_features) + 2)) ** 0.5
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.uniform_(parameter, -bound, bound)

    def places(self, x: Interactions) -> dict[str, Tensor]:
        """Return the rows that are read of every table."""
        return _linear_places(x)

    def pools(self, x: Interactions) -> dict[str, Pool]:
        """Return the sums that are read of the tables of categories."""
        return _linear_pools(x)

    def compute(self, x: Interactions, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the last hidden layer [B, h] and the logits [B, 2]."""
        logits_B2 = _linear(x, rows) + self.bias
        logits_B2 = self.norm(logits_B2 if self.tags is None else logits_B2 + self.tags(x.tags_BT))
        return logits_B2[:, :0], logits_B2


#: The models by name.
RECOMMENDERS: dict[str, type[Recommender]] = {
    "lr": LR,
    "wide_deep": WideDeep,
    "pnn": PNN,
    "deepfm": DeepFM,
    "din": DIN,
}
