"""Cases of the vectors of MPDA's released models."""

import json

import torch

from iciia_exp.models.on_catalog import OnCatalog, multi_hot
from iciia_exp.models.recommenders import RECOMMENDERS, Interactions

#: Released order of the inputs in the one matrix of logistic regression.
LR_ROWS = ("user_linear", "item_linear_0", "category_linear_0", "item_linear_2", "category_linear_2", "item_linear_1")
LR_ROWS = (*LR_ROWS, "category_linear_1", "tags")


class Case:
    """A case of the vectors: sizes, model, states and interactions."""

    def __init__(self, file, name):
        self.file, self.name = file, name
        self.sizes = json.loads(file.metadata()[name])
        self.model = self.sizes.get("model", "din")
        self.keys = set(file.keys())
        numbers = (self.sizes["users_in_table"], self.sizes["items"], self.sizes["categories"] + 1)
        dim = self.sizes["dim"]
        widths = {"lr": (self.sizes.get("genome"),), "din": (dim, dim)}.get(self.model, (dim // 2,))
        self.net = RECOMMENDERS[self.model](*numbers, *widths).eval()
        left = self.net.load_state_dict(self.state("state"), strict=False)
        assert not left.unexpected_keys
        assert all(key.endswith("num_batches_tracked") for key in left.missing_keys)

    def get(self, name):
        return self.file.get_tensor(f"{self.name}/{name}")

    def state(self, part):
        """Return the parameters (and, of the start, the statistics) under their names here."""
        found = {}
        for own, theirs, transposed in self._names():
            if f"{self.name}/{part}/{theirs}" in self.keys:
                value = self.get(f"{part}/{theirs}")
                found[own] = value.T if transposed else value
        if self.model == "lr":
            sizes = [self.net.tags.in_features if n == "tags" else len(self.net.tables[n].weight) for n in LR_ROWS]
            for name, rows in zip(LR_ROWS, self.get(f"{part}/dense/kernel").split(sizes), strict=True):
                found["tags.weight" if name == "tags" else f"tables.{name}.weight"] = rows.T if name == "tags" else rows
        return found

    def _names(self):
        """Yield our name, the released name, and whether the matrix is transposed."""

        def linear(own, theirs):
            yield f"{own}.weight", f"{theirs}/kernel", True
            yield f"{own}.bias", f"{theirs}/bias", False

        def norm(own, theirs):
            pairs = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
            for mine, other in pairs.items():
                yield f"{own}.{mine}", f"{theirs}/{other}", False

        if self.model == "lr":
            yield from norm("norm", "lr_bn")
            yield "bias", "dense/bias", False
            return
        for own, theirs in {"user": "user_id", "item": "movie_emb", "category": "category_emb"}.items():
            yield f"tables.{own}.weight", f"embedding/{theirs}", False
        for i in range(3):
            yield from linear(f"net.{2 * i}", f"forward_net/dense{i}")
            activation = f"forward_net/activation{i}"
            yield f"net.{2 * i + 1}.{'alpha' if self.model == 'din' else 'weight'}", f"{activation}/alpha", False
            yield from norm(f"net.{2 * i + 1}.norm", f"{activation}/norm_inputs")
        for h, history in enumerate(("neg", "pos")):
            for i in range(3):
                theirs = f"attention_{history}_rating/compute_weight_logits/dense{i}"
                yield from linear(f"attention.{h}.score.{2 * i}", theirs)
        yield from norm("norm", "forward_net_bn")
        for i in range(4):
            yield from norm(f"norms.{i}", f"forward_net_bn_{i}")
        yield ("wide.weight" if self.model == "wide_deep" else "cross.weight"), "dense/kernel", True
        yield from norm("linear_norm", "linear/lr_bn")
        yield "tables.user_linear.weight", "linear/embedding/feat/user_id", False
        for kind, theirs in {"item": "movie_id", "category": "category_ids"}.items():
            for at, suffix in enumerate(("", "_seq_neg", "_seq_pos")):
                yield f"tables.{kind}_linear_{at}.weight", f"linear/embedding/feat/{theirs}{suffix}", False

    def interactions(self, user):
        """Return the samples of a user, and their labels."""

        def categories(name):
            ids = self.get(f"{user}/feat/{name}").long()
            return multi_hot(torch.where(ids == self.sizes["categories"], -1, ids), self.sizes["categories"] + 1)

        histories = ("neg", "pos")
        there = [self.get(f"{user}/mask/{h}_rating") > 0 for h in histories]
        ids = [self.get(f"{user}/feat/movie_id_seq_{h}")[..., 0].long() for h in histories]
        items = torch.stack([torch.where(t, i, -1) for t, i in zip(there, ids, strict=True)], 1)
        own = 1 if user == "test" else int(user.removeprefix("user")) + 1
        known = f"{self.name}/{user}/feat/movie_genome" in self.keys
        tags = self.get(f"{user}/feat/movie_genome") if known else torch.empty(len(items), 0)
        x = Interactions(
            torch.full((len(items),), own),
            self.get(f"{user}/feat/movie_id")[:, 0].long(),
            categories("category_ids"),
            items,
            torch.stack([categories(f"category_ids_seq_{h}") for h in histories], 1),
            tags,
        )
        if user != "test":
            assert (self.get(f"{user}/feat/user_id") == own).all()
        return x, self.get(f"{user}/label").long()


class Rows(OnCatalog):
    """A model on numbers of interactions: in the vectors an item has other categories from one slot to another."""

    def __init__(self, net, every):
        super().__init__(net, torch.zeros(1, 1))
        self.every = every

    def read(self, x_BF):
        return Interactions(*(part[x_BF[:, 0].long()] for part in self.every))


def users_of(case):
    """Return the interactions of all users one after the other, and the numbers and labels of each one's."""
    names = [f"user{i}" for i in range(case.sizes["candidates"] + 1)]
    parts = [case.interactions(name) for name in [*names, "test"]]
    every = Interactions(*(torch.cat(part) for part in zip(*(x for x, _ in parts), strict=True)))
    sets, at = [], 0
    for _, y in parts:
        sets.append((torch.arange(at, at + len(y)), y))
        at += len(y)
    return every, sets
