"""Many modules at once against a plain training of each."""

import copy
from functools import partial

import numpy as np
import pytest
import timm.optim
import torch
from torch import nn

from iciia_exp.errors import ConfigError, UserError
from iciia_exp.models import fit_many as module
from iciia_exp.models.fit_many import fit_many
from iciia_exp.models.stacked import Examples
from iciia_exp.recipe import Recipe
from iciia_exp.seeding import generator
from iciia_exp.tasks import MULTI_LABEL, SINGLE_LABEL

C, N, M, D, K = 9, 12, 6, 7, 4
LENGTHS = torch.tensor([12, 1, 5, 0, 8, 3, 12, 7, 4])


def images(number, lengths, task=SINGLE_LABEL, seed=0):
    """Return labelled images around the centre of their class."""
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(K, D, generator=torch.Generator().manual_seed(7))
    y = torch.randint(0, K, (C, number), generator=rng)
    x = centres[y] + torch.randn(C, number, D, generator=rng)
    mask = torch.arange(number) < lengths[:, None]
    if task == MULTI_LABEL:
        y = nn.functional.one_hot(y, K)
        y = y * mask[..., None]
    return Examples(torch.where(mask[..., None], x, 0.0), y * mask if y.ndim == 2 else y, mask)


def alone(start, train, val, task, recipe, patience, client):
    """Train one client's module with PyTorch's own parts."""
    net = copy.deepcopy(start).train()
    lengths = [int(part.mask[client].sum()) for part in (train, val)]
    (x, y), (held, held_y) = ((p.x[client, :n], p.y[client, :n]) for p, n in zip((train, val), lengths, strict=True))
    if not len(x):
        return net.eval(), 0
    optimizer = recipe.make_optimizer(net.parameters())
    steps = -(-len(x) // recipe.batch_size)
    schedule = recipe.make_scheduler(optimizer, steps * recipe.epochs, recipe.epochs)

    def accuracy():
        with torch.no_grad():
            return task.correct(net.eval()(held), held_y).float().mean() if len(held) else torch.tensor(0.0)

    best, waited, kept, epochs = accuracy(), 0, copy.deepcopy(net), 0
    for _ in range(recipe.epochs):
        net.train()
        for at in range(0, len(x), recipe.batch_size):
            optimizer.zero_grad()
            task.loss(net(x[at : at + recipe.batch_size]), y[at : at + recipe.batch_size]).backward()
            if recipe.clip_norm:
                nn.utils.clip_grad_norm_(net.parameters(), recipe.clip_norm)
            optimizer.step()
            if schedule is not None and schedule["interval"] == "step":
                schedule["scheduler"].step()
        if schedule is not None and schedule["interval"] == "epoch":
            schedule["scheduler"].step()
        epochs += 1
        if patience is not None:
            now, waited = accuracy(), waited + 1
            if now > best or not len(held):
                best, waited, kept = now, 0, copy.deepcopy(net)
            if waited >= patience:
                break
    return (net if patience is None else kept).eval(), epochs


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 5), nn.ReLU(), nn.Linear(5, K))


def linear():
    torch.manual_seed(0)
    return nn.Linear(D, K)


SGD = partial(torch.optim.SGD, lr=0.3)
ADAMW = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)
COSINE = torch.optim.lr_scheduler.CosineAnnealingLR
STEP = partial(torch.optim.lr_scheduler.StepLR, step_size=3)
CASES = {
    "a linear classifier, Gram form": (linear, SGD, None, SINGLE_LABEL, 0.8, 3),
    "without clipping": (linear, SGD, None, SINGLE_LABEL, 0.0, 3),
    "momentum": (linear, partial(SGD, momentum=0.9), None, SINGLE_LABEL, 0.8, 3),
    "all epochs": (linear, SGD, None, SINGLE_LABEL, 0.8, None),
    "a perceptron, AdamW, cosine": (perceptron, ADAMW, COSINE, SINGLE_LABEL, 1.0, 3),
    "a rate by epoch, all epochs": (perceptron, ADAMW, STEP, SINGLE_LABEL, 0.0, None),
    "attributes": (perceptron, ADAMW, None, MULTI_LABEL, 1.0, 4),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dual", [True, False])
def test_each_module_is_trained_as_if_alone(case, dual, monkeypatch):
    make, optimizer, scheduler, task, clip, patience = CASES[case]
    if not dual:
        monkeypatch.setattr(module, "is_plain_linear", lambda *_: False)
    start, recipe = make(), Recipe(optimizer, scheduler, epochs=9, batch_size=5, clip_norm=clip)
    assert not dual or module.is_plain_linear(start, task, recipe) == (optimizer is SGD)
    train, val = images(N, LENGTHS, task), images(M, LENGTHS.flip(0).clamp(max=M), task, seed=1)
    fitted = fit_many(start, train, val, task, recipe, patience)
    for client in range(C):
        want, epochs = alone(start, train, val, task, recipe, patience, client)
        assert fitted.epochs_C[client] == epochs
        for name, value in want.named_parameters():
            torch.testing.assert_close(fitted.states[name][client], value.detach(), atol=1e-5, rtol=1e-4)
    assert len(set(fitted.epochs_C.tolist())) > 1  # some stop early, one has no images


@pytest.mark.parametrize("dual", [True, False])
@pytest.mark.parametrize("names", [["weight", "bias"], ["bias"]])
def test_clients_start_where_they_are_told(dual, names, monkeypatch):
    if not dual:
        monkeypatch.setattr(module, "is_plain_linear", lambda *_: False)
    recipe, train, val = Recipe(SGD, None, 4, 5, 0.8), images(N, LENGTHS), images(M, LENGTHS.clamp(max=M), seed=1)
    shapes, rng = {"weight": (K, D), "bias": (K,)}, torch.Generator().manual_seed(3)
    starts = {name: torch.randn(C, *shapes[name], generator=rng) for name in names}
    fitted = fit_many(linear(), train, val, SINGLE_LABEL, recipe, 2, starts)
    for client in range(C):
        own = linear()
        own.load_state_dict({name: value[client] for name, value in starts.items()}, strict=False)
        want, epochs = alone(own, train, val, SINGLE_LABEL, recipe, 2, client)
        assert fitted.epochs_C[client] == epochs
        for name, value in want.named_parameters():
            torch.testing.assert_close(fitted.states[name][client], value.detach(), atol=1e-5, rtol=1e-4)


def test_clients_in_parts_are_those_of_all_together(monkeypatch):
    recipe, train, val = Recipe(SGD, None, 5, 5, 1.0), images(N, LENGTHS), images(M, LENGTHS.clamp(max=M), seed=1)
    whole = fit_many(linear(), train, val, SINGLE_LABEL, recipe, 2)
    monkeypatch.setattr(module, "_NUMBERS", 1)  # one at a time
    for name, state in fit_many(linear(), train, val, SINGLE_LABEL, recipe, 2).states.items():
        torch.testing.assert_close(state, whole.states[name])


def test_frozen_parameters_stay_and_are_no_state():
    net = perceptron()
    net[1].requires_grad_(False)
    train = images(N, LENGTHS)
    fitted = fit_many(net, train, train, SINGLE_LABEL, Recipe(ADAMW, None, 2, 5), 2)
    assert set(fitted.states) == {"0.weight", "0.bias", "3.weight", "3.bias"}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [SGD, partial(torch.optim.AdamW, lr=0.1)], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("schedule", [None, torch.optim.lr_scheduler.OneCycleLR], ids=["constant", "one cycle"])
def test_what_training_holds_is_freed_at_its_end(optimizer, schedule, freed):
    """Python frees cycles of references late, and a shard's parameters take hundreds of megabytes."""
    train = images(N, LENGTHS)
    with freed(module.Stacked, module.StackedLinear, torch.optim.SGD, torch.optim.AdamW):
        fit_many(perceptron(), train, train, SINGLE_LABEL, Recipe(optimizer, schedule, 2, 4), 2)
        fit_many(linear(), train, train, SINGLE_LABEL, Recipe(optimizer, None, 2, 4))


def test_an_optimiser_that_mixes_clients_is_refused():
    train = images(N, LENGTHS)
    with pytest.raises(ConfigError, match="Lamb.*would mix clients; use SGD, Adam or AdamW"):
        fit_many(linear(), train, train, SINGLE_LABEL, Recipe(partial(timm.optim.Lamb, lr=0.1)))


def test_batch_norm_is_refused():
    train = images(N, LENGTHS)
    with pytest.raises(UserError, match="batch norm"):
        fit_many(nn.Sequential(nn.BatchNorm1d(D), nn.Linear(D, K)), train, train, SINGLE_LABEL, Recipe(SGD))


@pytest.mark.parametrize("net", [linear, perceptron])
def test_a_client_without_val_images_is_trained_to_the_end(net):
    """There is nothing to choose an epoch by; clients with val images are not affected."""
    train, held = images(N, LENGTHS), images(M, (torch.arange(C) % 2) * M)
    recipe = Recipe(SGD, None, 9, 5)
    fitted = fit_many(net(), train, held, SINGLE_LABEL, recipe, 2)
    chosen = fit_many(net(), train, images(M, torch.full((C,), M)), SINGLE_LABEL, recipe, 2)
    last = fit_many(net(), train, held, SINGLE_LABEL, recipe)
    for name, values in fitted.states.items():
        torch.testing.assert_close(values[::2], last.states[name][::2])
        torch.testing.assert_close(values[1::2], chosen.states[name][1::2])
    assert set(fitted.epochs_C[::2].tolist()) <= {0, 9}
    none = Examples(*(tensor[:, :0] for tensor in held))
    fitted = fit_many(net(), train, none, SINGLE_LABEL, recipe, 2)
    for name, values in fitted.states.items():
        torch.testing.assert_close(values, last.states[name])


def test_shuffled_batches_and_starts_of_ones_own():
    """As a plain training of each client, from its own start, with the orders of `generator`."""
    recipe, seed = Recipe(ADAMW, COSINE, 4, 5, 1.0), 3
    train, val = images(N, LENGTHS), images(M, LENGTHS.clamp(max=M), seed=1)
    starts = {"1.bias": torch.randn(C, 5, generator=torch.Generator().manual_seed(5))}
    together = fit_many(perceptron(), train, val, SINGLE_LABEL, recipe, None, starts, seed)
    unshuffled = fit_many(perceptron(), train, val, SINGLE_LABEL, recipe, None, starts)
    assert not torch.allclose(together.states["1.bias"], unshuffled.states["1.bias"])
    for client in range(C):
        net, length = perceptron(), int(LENGTHS[client])
        net[1].bias.data = starts["1.bias"][client].clone()
        if length:
            optimizer, steps = recipe.make_optimizer(net.parameters()), -(-length // recipe.batch_size)
            scheduler = recipe.make_scheduler(optimizer, steps * recipe.epochs, recipe.epochs)["scheduler"]
            for epoch in range(recipe.epochs):
                order = generator("fit_many", seed, epoch).random(length, dtype=np.float32).argsort()
                for at in range(0, length, recipe.batch_size):
                    rows = order[at : at + recipe.batch_size]
                    optimizer.zero_grad()
                    SINGLE_LABEL.loss(net(train.x[client, rows]), train.y[client, rows]).backward()
                    nn.utils.clip_grad_norm_(net.parameters(), recipe.clip_norm)
                    optimizer.step()
                    scheduler.step()
        for name, p in net.named_parameters():
            torch.testing.assert_close(together.states[name][client], p.detach(), atol=1e-5, rtol=1e-4)
