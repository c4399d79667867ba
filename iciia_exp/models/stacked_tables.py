"""Click models of many clients, trained together by plain SGD: of their tables only the rows that are read are touched.

Gradients are taken for what a model has read of its tables, and added to those rows. The steps are those of dense
gradients, without passes over whole tables.

Legend: C clients, n train interactions of a client, m val interactions, b interactions of a batch, F numbers of an
interaction, V rows of a table, w their width, N rows or sums that an interaction reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from iciia_exp.errors import ConfigError
from iciia_exp.models.on_catalog import OnCatalog, is_table
from iciia_exp.models.recommenders import Interactions, Pool
from iciia_exp.models.stacked import Stacked, accuracy, squares

__all__ = ["StackedTables", "table_logits"]

#: Interactions that are computed together where nothing is trained.
_AT_ONCE = 4096


class StackedTables(Stacked):
    """A click model by plain SGD.

    Args:
        module: the model, before the further arguments of `Stacked`.
        clip_rows: count every row that is read by itself in the norm of the gradient, as TensorFlow does with sparse
            gradients, and not the rows of equal ids together.
    """

    def __init__(self, module: OnCatalog, *some: Any, clip_rows: bool = False, **more: Any) -> None:
        super().__init__(module, *some, **more)
        self.module: OnCatalog
        if self.rate is None:
            raise ConfigError(
                "optimizer", self.recipe.optimizer, "a click model on devices takes SGD at a constant rate"
            )
        self.clip_rows = clip_rows and module.net.rows_apart
        #: Where gradients of equal ids are added up; 0 in between.
        self._sums: dict[str, Tensor] = {}

    def _row_loss(
        self, dense: dict[str, Tensor], rows: dict[str, Tensor], x_b: Interactions, y_b: Tensor, real_b: Tensor
    ) -> Tensor:
        views = {name: part.view_as(part) for name, part in rows.items()}  # PyTorch's FLOP counter takes no leaves
        return self._mean_loss(functional_call(self.module.net, dense, (x_b, views)), y_b, real_b)

    def _step(self, x: Tensor, y: Tensor, real_Cb: Tensor, number_C: Tensor | None) -> None:
        """Train on a batch of every client, or of those with some numbers."""
        assert self.rate is not None
        tables, dense = _apart(self._stacked())
        own = dense if number_C is None else {name: p[number_C] for name, p in dense.items()}
        read = _Read(self.module, tables, x, torch.arange(len(x), device=x.device) if number_C is None else number_C)
        row_gradients = vmap(grad(self._row_loss, argnums=(0, 1)))
        gradients, of_rows = row_gradients(own, read.rows(), read.x, y, real_Cb)
        summed = {n: read.pooled_gradient(n, of_rows[n]) for n in read.pools}
        scale_C = real_Cb.new_ones(len(x))
        if self.recipe.clip_norm:
            parts = [squares(g) for g in gradients.values()]
            for name, g in of_rows.items():
                if self.clip_rows:
                    part = g.square().sum(-1)
                    parts.append((part * read.pools[name].squares_BN if name in read.pools else part).flatten(1).sum(1))
                else:
                    parts.append(squares(summed[name]) if name in read.pools else self._dense_squares(read, name, g))
            scale_C = self._scale(torch.stack(parts).sum(0))
        step_C = -self.rate * scale_C
        for name, g in (gradients | summed).items():
            p, change = tables[name] if name in summed else dense[name], g * step_C.view(-1, *(1,) * (g.ndim - 1))
            if number_C is None:
                p.add_(change)
            else:
                p.index_add_(0, number_C, change)
        for name, place in read.places.items():
            _flat(tables[name]).index_add_(0, place, (of_rows[name] * step_C.view(-1, 1, 1, 1)).flatten(0, 2))

    def _dense_squares(self, read: _Read, name: str, g_CbNw: Tensor) -> Tensor:
        """Return the squared norm of a table's gradient where rows of equal ids are added up, [C]."""
        if name not in self._sums:
            self._sums[name] = torch.zeros_like(_flat(read.tables[name]))
        sums, place, g = self._sums[name], read.places[name], g_CbNw.flatten(0, 2)
        sums.index_add_(0, place, g)
        square_C = (sums[place] * g).view(len(g_CbNw), -1).sum(1)  # a row counts as often as it is read
        sums[place] = 0
        return square_C

    @torch.no_grad()
    def val_accuracy(self) -> Tensor:
        """Return the accuracy on every client's val interactions, [C]; 0 without any."""
        if not self.val.y.shape[1]:
            return torch.zeros(len(self.val.y), device=self.val.y.device)
        return accuracy(self.task, table_logits(self.module, self._stacked(), self.val.x, self.val.mask), self.val)


def table_logits(module: OnCatalog, states: Mapping[str, Tensor], x_CnF: Tensor, mask_Cn: Tensor) -> Tensor:
    """Return the logits of a click model for every client, [C, n, 2]; 0 where padded.

    Args:
        module: the model; its statistics are those of every client.
        states: its parameters, [C, ...].
        x_CnF: interactions.
        mask_Cn: False where padded.
    """
    logits_Cn2 = torch.zeros(*mask_Cn.shape, 2, device=x_CnF.device)
    tables, dense = _apart(states)
    call = vmap(lambda own, rows, x: functional_call(module.net, own, (x, rows)))
    lengths_C = mask_Cn.sum(1)
    order = lengths_C.argsort(stable=True)
    doublings = lengths_C[order].clamp(min=1).log2().ceil()
    for doubling in doublings.unique():  # of about the same length, so that little is computed for padding
        alike = order[doublings == doubling]
        longest = int(lengths_C[alike].max())
        for number_c in alike.split(max(1, _AT_ONCE // max(1, longest))):
            own = {name: p[number_c] for name, p in dense.items()}
            for at in range(0, longest, _AT_ONCE):
                part = slice(at, min(at + _AT_ONCE, longest))
                read = _Read(module, tables, x_CnF[number_c, part], number_c)
                logits_Cn2[number_c, part] = call(own, read.rows(), read.x)
    return logits_Cn2 * mask_Cn[..., None]


class _Read:
    """What some interactions of every client read of its tables.

    Args:
        module: the model.
        tables: of clients, [..., V, w] by name.
        x_CbF: interactions of C of these clients.
        number_C: numbers of these.
    """

    def __init__(self, module: OnCatalog, tables: dict[str, Tensor], x_CbF: Tensor, number_C: Tensor) -> None:
        self.tables, self.number_C = tables, number_C
        flat = module.read(x_CbF.flatten(0, 1))
        self.shape = x_CbF.shape[:2]
        self.x = Interactions(*(part.unflatten(0, self.shape) for part in flat))
        #: Rows in the clients' tables, one after the other, [C b N].
        self.places: dict[str, Tensor] = {}
        self._widths: dict[str, int] = {}
        for name, place in module.net.places(flat).items():
            self._widths[name] = place.shape[1]
            start_C = number_C * (0 if _is_shared(tables[name]) else tables[name].shape[1])
            self.places[name] = (place.view(len(number_C), -1) + start_C[:, None]).flatten()
        self.pools = {
            name: Pool(*(part.unflatten(0, self.shape) for part in pool))
            for name, pool in module.net.pools(flat).items()
        }

    def rows(self) -> dict[str, Tensor]:
        """Return the rows and sums, [C, b, N, w], by name of the table."""
        rows = {
            name: nn.functional.embedding(place, _flat(self.tables[name])).view(*self.shape, self._widths[name], -1)
            for name, place in self.places.items()
        }
        for name, pool in self.pools.items():
            sums = torch.bmm(pool.weights_BNG.flatten(1, 2), self.tables[name][self.number_C])
            rows[name] = sums.view(*self.shape, -1, sums.shape[-1])
        return rows

    def pooled_gradient(self, name: str, g_CbNw: Tensor) -> Tensor:
        """Return the gradient of a table that is read in sums, [C, V, w]."""
        return torch.bmm(self.pools[name].weights_BNG.flatten(1, 2).transpose(1, 2), g_CbNw.flatten(1, 2))


def _is_shared(table_CVw: Tensor) -> bool:
    """Return whether all clients have one table, not copied yet."""
    return table_CVw.stride(0) == 0


def _flat(table_CVw: Tensor) -> Tensor:
    """Return the rows of all clients, one after the other; a view, so that a table is trained in place."""
    return table_CVw[0] if _is_shared(table_CVw) else table_CVw.view(-1, table_CVw.shape[-1])


def _apart(stacked: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tables by their names, and the other parameters by their names in the `Recommender`."""
    tables = {n.split(".")[2]: t for n, t in stacked.items() if is_table(n)}
    return tables, {n.removeprefix("net."): t for n, t in stacked.items() if not is_table(n)}
