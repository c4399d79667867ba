"""Ledger of a run: what its method's budget states, and what was measured, by phase and site."""

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from iciia_exp.artifacts import read_json
from iciia_exp.data.prompts import as_text
from iciia_exp.data.rounds import read_round
from iciia_exp.engine.inputs import Inputs
from iciia_exp.ledger import Budget, Link, Sizes, payload_bytes
from iciia_exp.methods.base import Method
from iciia_exp.methods.cotrain.base import CoTrained
from iciia_exp.methods.cotrain.sites import CLOUD
from iciia_exp.methods.route.base import PromptRouter

__all__ = ["cost_row", "ledger_table", "sizes_of"]

#: Counts of a device that a budget depends on.
_SIZES = frozenset(field.name for field in fields(Sizes))

#: Arrays of networks that devices have anyway; others are those with MACs of their own (`Backbone.further_costs`).
_OF_DEVICES = ("second", "stem")

#: Directions of payloads, and who sends them.
_DIRECTIONS = (("down", "cloud"), ("up", "device"))


def sizes_of(inputs: Inputs, **more: Any) -> Sizes:
    """Return the sizes of an experiment on which a budget depends; ``more`` are those of a client."""
    manifest, e = inputs.open_store().manifest, inputs.experiment
    names = ("second_macs", "encoder_macs", "cloud_macs", "picture_bytes")
    further: dict[str, Any] = {name: manifest.get(name) for name in names}  # `Backbone.further_costs`
    own = not e.dataset_class.vectors  # features made elsewhere have no images
    return Sizes(
        images=e.cost_images,
        site=e.evaluation.site,
        backbone_macs=manifest["macs"],
        backbone_bytes=manifest.get("weights_bytes") if own else None,
        image_bytes=manifest.get("image_bytes", int(np.prod(manifest["input_shape"]))) if own else None,
        sample_bytes=_sample_bytes(inputs),
        **_of_input(inputs, manifest),
        **further,
        **more,
    )


def _sample_bytes(inputs: Inputs) -> int | None:
    """Return the size of what a co-trained method reads of an image; None for other methods."""
    if inputs.rounds is None:
        return None
    array = inputs.open_store().array(str(inputs.method_config["array"]))
    size = 4 if array.dtype == np.float16 else array.dtype.itemsize
    return int(np.prod(array.shape[1:])) * size


def _of_input(inputs: Inputs, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what of `Sizes` is about what a co-trained method reads of an image: its MACs, and who makes it."""
    if inputs.rounds is None or (array := str(inputs.method_config["array"])) == "images":
        return {}
    of_devices = array in _OF_DEVICES or f"{array}_macs" in manifest
    trunk = None if manifest["macs"] is None else manifest["macs"] - manifest["dim"] * manifest["num_classes"]
    return {"input_macs": manifest.get(f"{array}_macs") if of_devices else trunk, "input_on_backbone": not of_devices}


def ledger_table(
    inputs: Inputs, method: Method, routes: pd.DataFrame | None = None, cloud_share: float | None = None
) -> pd.DataFrame:
    """Return one row per line of the budget: phase, site, what, kind, MACs, bytes, and the bytes that a link counted.

    Numbers of ``client_once`` are means over the test clients; MACs and bytes are NaN where they are unknown.
    ``measured_bytes`` is NaN where no payload was sent: those of requests, and the backbone's weights. Those of a round
    are means over the devices that were drawn (down), and over those that answered (up). ``routes`` are the test
    requests of a prompt router (`iciia_exp.engine.evaluation.routes.routes_table`), which are sent; ``cloud_share`` is
    the share of the test images that another routed method sends.
    """
    measured: dict[tuple[Any, ...], float] = {}
    if inputs.rounds is not None:
        assert isinstance(method, CoTrained)
        manifest = read_json(inputs.rounds.folder / "manifest.json")
        sizes = {name: np.array(manifest[name], dtype=np.int64) for name in ("train", "received")}
        budgets = list(_of_kinds(inputs, method, sizes, cloud=manifest["cloud"]))
        answers = _answers(method, inputs.rounds.folder, manifest["rounds"])
        times = {("round", "cloud"): manifest["taking_part"], ("round", "device"): answers}
        measured = {tuple(k): size / times.get((k[0], k[1]), manifest["devices"]) for *k, size in manifest["payloads"]}
    elif routes is not None and isinstance(method, PromptRouter):
        prompts = as_text(torch.from_numpy(inputs.open_store().array("images")[routes.loc[routes["cloud"], "image"]]))
        budget, measured = _requests(inputs, method, prompts, len(routes))
        budgets = [(1.0, budget)]
    elif inputs.states is None:
        budgets = [(1.0, method.budget(sizes_of(inputs, cloud_share=cloud_share)))]
    else:
        manifest = read_json(inputs.states.folder / "manifest.json")
        counts = {name: values for name, values in manifest.get("counts", {}).items() if name in _SIZES}
        budgets = list(_of_devices(inputs, method, {"epochs": manifest["epochs"], **counts}))
        measured = {tuple(key): size / manifest["devices"] for *key, size in manifest["payloads"]}
    link = Link(method.name, budgets[0][1])
    if ("client_once", "cloud", "method", "weights") in budgets[0][1].keys:
        link.down("weights", method.payload())
    # what was sent to the devices is known, and counts
    measured = {key: float(size) for key, size in link.counted.items()} | measured
    rows: dict[tuple[Any, ...], dict[str, float]] = {}
    for share, budget in budgets:
        for line in budget.lines:
            row = rows.setdefault(line.key, {"macs": 0.0, "bytes": 0.0})
            for name in row:
                value = getattr(line, name)
                row[name] += np.nan if value is None else share * value
    keys = pd.DataFrame(list(rows), columns=pd.Index(["phase", "site", "what", "kind"]))
    table = keys.join(pd.DataFrame(list(rows.values())))
    table["measured_bytes"] = [measured.get(key, np.nan) for key in rows]
    return table


def _requests(
    inputs: Inputs, method: PromptRouter, prompts: Sequence[str], requests: int
) -> tuple[Budget, dict[tuple[Any, ...], float]]:
    """Send the prompts of the cloud, and a picture of each back; return the budget, and the mean bytes of a request."""
    size = round(float(np.mean([payload_bytes(prompt) for prompt in prompts]))) if prompts else 0
    budget = method.budget(replace(sizes_of(inputs, cloud_share=len(prompts) / requests), image_bytes=size))
    link, picture = Link(method.name, budget), inputs.open_store().manifest["picture_bytes"]
    for prompt in prompts:
        link.up("prompt", prompt, "request")
        link.down("picture", bytes(picture), "request")
    return budget, {key: size / requests for key, size in link.counted.items()}


def _of_devices(inputs: Inputs, method: Method, counts: dict[str, list[int]]) -> Iterable[tuple[float, Budget]]:
    """Yield the budget of every kind of test client, and its share of them: equal sizes are one kind.

    ``counts`` are further sizes of every test client.
    """
    clients = inputs.known_clients
    tested = np.flatnonzero(clients.test.lengths)
    sizes = {role: clients[role].lengths[tested] for role in ("train", "val")}
    sizes |= {name: np.array(values, dtype=np.int64) for name, values in counts.items()}
    yield from _of_kinds(inputs, method, sizes)


def _of_kinds(
    inputs: Inputs, method: Method, sizes: dict[str, np.ndarray], **common: int
) -> Iterable[tuple[float, Budget]]:
    """Yield the budget of every kind of device, and its share of them; ``sizes`` [C] and ``common`` ones tell kinds."""
    kinds, numbers = np.unique(np.stack([*sizes.values()], 1), axis=0, return_counts=True)
    for kind, number in zip(kinds.tolist(), numbers.tolist(), strict=True):
        own = sizes_of(inputs, **dict(zip(sizes, kind, strict=True)), **common)
        yield number / numbers.sum(), method.budget(own)


def _answers(method: CoTrained, folder: Path, rounds: int) -> float:
    """Return how often a device answered: in all rounds together, those of a round a mean over its jobs."""
    total = 0.0
    for number in range(rounds):
        done = zip(method.jobs(number), read_round(folder, number + 1)[1]["jobs"], strict=True)
        counts = [len({*facts["losses"]} - {str(CLOUD)}) + len(facts["excluded"]) for job, facts in done if job.devices]
        total += float(np.mean(counts)) if counts else 0.0
    return total


def _of_rounds(inputs: Inputs, method: Method, ledger: pd.DataFrame) -> dict[str, int | None]:
    """Return bytes as they were sent and MACs of a device in all rounds, means over the devices."""
    if inputs.rounds is None:
        return {}
    assert isinstance(method, CoTrained)
    manifest = read_json(inputs.rounds.folder / "manifest.json")
    sent = [(sender, size) for phase, sender, _, _, size in manifest["payloads"] if phase == "round"]
    sums = {name: sum(size for sender, size in sent if sender == site) for name, site in _DIRECTIONS}
    share = _answers(method, inputs.rounds.folder, manifest["rounds"]) / manifest["devices"]
    macs = _sum(share * ledger.loc[(ledger["phase"] == "round") & (ledger["site"] == "device"), "macs"])
    bytes_ = {f"rounds_{name}_bytes": round(size / manifest["devices"]) for name, size in sums.items()}
    return {**bytes_, "rounds_device_macs": macs}


def cost_row(inputs: Inputs, method: Method, ledger: pd.DataFrame) -> dict[str, Any]:
    """Return the columns of ``results.json`` that are sums of a ledger; None where a part is unknown."""
    payloads = ledger[ledger["kind"].notna()]
    row: dict[str, Any] = {}
    for phase, name in (("client_once", "client"), ("request", "request")):
        own = ledger[ledger["phase"] == phase]
        for site in ("device", "cloud"):
            row[f"{name}_{site}_macs"] = _sum(own.loc[own["site"] == site, "macs"])
        for direction, site in _DIRECTIONS:
            row[f"{name}_{direction}_bytes"] = _sum(own.loc[own["site"] == site, "bytes"])
    row |= _of_rounds(inputs, method, ledger)
    leaves = payloads.loc[payloads["site"] == "device", "kind"]
    return row | {"leaves_device": ", ".join(dict.fromkeys(leaves)) or "nothing"}


def _sum(values: pd.Series) -> int | None:
    total = values.sum(skipna=False)
    return None if pd.isna(total) else round(float(total))
