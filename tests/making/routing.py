"""A small cloud of prompts, and routers on it."""

import numpy as np
import torch
import yaml
from hydra.utils import instantiate
from torch import nn

from iciia_exp.config.paths import CONF_DIR
from iciia_exp.data.batches import ClientIndex, FeatureBatches
from iciia_exp.data.clients import Clients, Ragged
from iciia_exp.data.prompts import as_bytes
from iciia_exp.data.views import CloudView
from iciia_exp.methods.base import Facts

N, TOKENS, WIDTH, PICTURES = 240, 6, 8, 3
NAMES = ("clarity", "color", "same")
WORDS = ("cat", "dog", "red", "blue", "house", "tree")
COSTS = (100, 2000, 9000, 50)
PROMPT = 20  # bytes


def cloud_of(gap=0.3):
    """Return clients and features of prompts; those with a word are answered well by the device, too."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((len(WORDS), WIDTH)).astype(np.float32)
    chosen = [rng.choice(len(WORDS), rng.integers(2, TOKENS + 1)) for _ in range(N)]
    tokens = np.zeros((N, TOKENS, WIDTH), np.float32)
    for row, words in enumerate(chosen):
        tokens[row, : len(words)] = vectors[words]
    easy = np.array([(words == 0).any() for words in chosen])
    quality = rng.normal(0.5, 0.05, (N, 2, PICTURES, len(NAMES))).astype(np.float32)
    quality[:, 1, :, :2] += gap
    quality[easy, 0, :, :2] += gap + 0.1 * (gap > 0)
    prompts = [" ".join(WORDS[word] for word in words) for words in chosen]
    arrays = {"images": np.stack([as_bytes(p).numpy() for p in prompts]), "tokens": tokens, "quality": quality}
    arrays["flaws"] = np.zeros((N, 2, PICTURES), np.uint8)
    batches = FeatureBatches(tokens.mean(1), np.zeros(N, np.int64), arrays=arrays)
    rows, ids = np.arange(N), np.array(["all"], dtype=object)
    roles = [Ragged.from_rows([part]) for part in np.split(rows, [140, 190])]
    return Clients(ids, ids, *roles), batches


def view_of(clients, batches):
    """Return what the cloud may read of them."""
    return CloudView(clients, batches, len(NAMES), 16)


def fit_of(cloud, epochs=30):
    """Return a plain training, in place of Lightning's."""

    def fit(module, rows=None, recipe=None):
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        batch = cloud[ClientIndex(rows[None], np.zeros(1, int))]
        for _ in range(epochs):
            loss = module.loss(batch.x_CSD[0], batch.y_CS[0], batch.arrays["tokens"][0], batch.arrays["quality"][0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        module.eval().requires_grad_(False)
        return {"epochs": epochs, "seconds": 0.0}

    return fit


def make(name, learn=True, gap=0.3, **options):
    """Return a router of the configuration, which has learned, and the test prompts."""
    torch.manual_seed(0)
    node = yaml.safe_load((CONF_DIR / "method" / f"{name}.yaml").read_text().replace("${seed}", "0")) | options
    arrays = {"images": (512,), "tokens": (TOKENS, WIDTH), "quality": (2, PICTURES, len(NAMES))}
    facts = Facts.of(nn.Linear(WIDTH, len(NAMES)), "quality", arrays)
    facts.class_names = NAMES
    method = instantiate(node, facts=facts, _convert_="all")
    clients, batches = cloud_of(gap)
    if learn:
        cloud = view_of(clients, batches)
        method.record = method.learn(cloud, fit_of(cloud))
    test = batches[ClientIndex(clients.test.values[None], np.zeros(1, int))]
    return method.eval(), test
