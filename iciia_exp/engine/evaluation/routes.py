"""Evaluation of a prompt router: who answers every test prompt, how good the answers are, and the share in the cloud.

Legend: C clients, N prompts, P pictures, K metrics.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata, spearmanr

from iciia_exp.data.batches import ClientIndex, FeatureBatches, cut_chunks
from iciia_exp.data.clients import Clients
from iciia_exp.data.prompts import as_text
from iciia_exp.data.scenes import TRUTHS
from iciia_exp.engine.evaluation.history import Setup
from iciia_exp.methods.route.base import PromptRouter, Routed
from iciia_exp.results.routing import LEVELS, area, chosen, delta_p, route_curve, saved, to_cloud, win_rate, wins
from iciia_exp.results.summary import ClientCounts, summarise
from iciia_exp.seeding import generator

__all__ = ["rank_resamples", "route_counts", "route_measures", "routes_table"]

_CLIENTS = 16  # of a batch
_RESAMPLES = 1000

#: Figures with their errors and intervals over prompts.
_BY_PROMPT = {
    f"{key}{end}" for key in ("accuracy", "backbone_accuracy", "gain") for end in ("", "_se", "_low", "_high")
}


@torch.inference_mode()
def routes_table(
    method: PromptRouter, clients: Clients, batches: FeatureBatches, images: int, truth_M2PT: np.ndarray | None = None
) -> pd.DataFrame:
    """Return a row for each test prompt.

    Columns: ``image`` (its number), ``client``, ``prompt``, ``score``, ``cloud`` (whether it answers), ``superiority``
    (the true PRS), and, for each metric, ``device_<metric>``, ``cloud_<metric>``, ``label_<metric>`` (D) and
    ``predicted_<metric>``; with what is right in the pictures of all prompts, ``truth``, ``device_true_<what>`` and
    ``cloud_true_<what>``.
    """
    index_CS, client_C = cut_chunks(clients.test, images)
    threshold, parts = method.threshold(), []
    for at in range(0, len(client_C), _CLIENTS):
        batch = batches[ClientIndex(index_CS[at : at + _CLIENTS], client_C[at : at + _CLIENTS])]
        real_CS = batch.mask_CS
        quality = batch.arrays["quality"][real_CS]
        assert batch.image_CS is not None
        labels_NK, mean_N2K = method.true_labels(quality), quality.mean(2)
        predicted_NK, score_N = method.logits(batch)[real_CS].sigmoid(), method.score(batch)[real_CS].double()
        columns: dict[str, Any] = {
            "image": batch.image_CS[real_CS],
            "client": batch.client_C[:, None].expand_as(real_CS)[real_CS],
            "prompt": as_text(batch.arrays["images"][real_CS]),
            "score": score_N,
            "cloud": score_N < threshold,
            "superiority": method.true_superiority(quality).double(),
        }
        for number, name in enumerate(method.metric_names):
            columns[f"device_{name}"], columns[f"cloud_{name}"] = mean_N2K[:, :, number].unbind(1)
            columns[f"label_{name}"] = labels_NK[:, number]
            columns[f"predicted_{name}"] = predicted_NK[:, number]
        if truth_M2PT is not None:
            true_N2T = truth_M2PT[columns["image"].numpy()].mean(2)
            for number, name in enumerate(TRUTHS):
                columns[f"device_true_{name}"], columns[f"cloud_true_{name}"] = true_N2T[:, :, number].T
        parts.append(pd.DataFrame({name: np.asarray(values) for name, values in columns.items()}))
    return pd.concat(parts, ignore_index=True)


def route_counts(table: pd.DataFrame, by: str = "client") -> tuple[np.ndarray, ClientCounts]:
    """Return the numbers of the clients, and counts of prompts that the better model answers; ties count half.

    The backbone is the device's model alone. The loss is the cross-entropy of the mean label and the score. With
    ``by="image"``, every prompt is a client.
    """
    prs_N, cloud_N = table["superiority"].to_numpy(), table["cloud"].to_numpy()
    right, alone = wins(prs_N, cloud_N), wins(prs_N, np.zeros_like(cloud_N))
    score_N = table["score"].to_numpy().clip(1e-6, 1 - 1e-6)
    loss = -(prs_N * np.log(score_N) + (1 - prs_N) * np.log1p(-score_N))
    own = pd.DataFrame({by: table[by], "right": right, "alone": alone, "loss": loss})
    own["both"] = np.minimum(right, alone)
    own["alone_loss"] = np.log(2.0)
    sums = own.groupby(by, sort=True).agg("sum")
    images_C = own.groupby(by, sort=True).size().to_numpy()
    values = {name: sums[name].to_numpy() for name in sums}
    counts = ClientCounts(
        images_C, values["alone"], values["right"], values["both"], values["alone_loss"], values["loss"], ranked=True
    )
    return sums.index.to_numpy(), counts


def route_measures(method: PromptRouter, table: pd.DataFrame) -> tuple[dict[str, Any], pd.DataFrame]:
    """Return the figures of ``results.json``, and curves of quality by share of prompts in the cloud.

    The curves are those of the ``router`` and of the ``oracle``, which sorts by the true PRS. Where it is measured what
    is right in the pictures, ``agreement_<metric>`` is the rank correlation of a metric with it, over the prompts and
    both models, ``agreement_difference_<metric>`` that of the models' differences, and ``truth`` the mean of what is
    right in the pictures of the chosen models.
    """
    used = [name for name, weight in zip(method.metric_names, method.weight_K.tolist(), strict=True) if weight > 0]
    q_N2K = _of_both(table, used)
    score_N, prs_N, cloud_N = (table[name].to_numpy() for name in ("score", "superiority", "cloud"))
    curve = route_curve(score_N, q_N2K, prs_N, used)
    half = curve[curve["share"] == 0.5].iloc[0]
    figures = {
        **share_figures(method, int(cloud_N.sum()), len(table)),
        "delta_p": delta_p(q_N2K, cloud_N) / 100,
        "delta_p_at_half": float(half["delta_p"]) / 100,
        "win_rate_at_half": float(half["win_rate"]),
        "rank_correlation": _rank(score_N, prs_N),
        **_rank_interval(score_N, prs_N),
        "quality": float(chosen(q_N2K, cloud_N).mean()),
        "quality_area": area(curve, "quality"),
        "win_rate": win_rate(prs_N, cloud_N),
        **{f"saved_at_{level:.0f}": _known(saved(score_N, q_N2K, level)) for level in LEVELS},
        "metrics": ", ".join(used),
        # intervals are over prompts: most are of one owner
        **{key: value for key, value in summarise(route_counts(table, "image")[1]).items() if key in _BY_PROMPT},
    }
    for name in used:
        rank = _rank(table[f"predicted_{name}"].to_numpy(), table[f"label_{name}"].to_numpy())
        figures[f"rank_correlation_{name}"] = rank
    oracle = route_curve(prs_N, q_N2K, prs_N, used)
    if f"device_true_{TRUTHS[0]}" in table:
        right_N2T = _of_both(table, [f"true_{name}" for name in TRUTHS])
        for number, name in enumerate(TRUTHS):
            learned_N2, right_N2 = _of_both(table, [name])[:, :, 0], right_N2T[:, :, number]
            figures[f"agreement_{name}"] = _rank(learned_N2.ravel(), right_N2.ravel())
            figures[f"agreement_difference_{name}"] = _rank(np.diff(learned_N2)[:, 0], np.diff(right_N2)[:, 0])
        for drawn, by_N in ((curve, score_N), (oracle, prs_N)):
            drawn["truth"] = [float(chosen(right_N2T, to_cloud(by_N, share)).mean()) for share in drawn["share"]]
        figures["truth"] = float(chosen(right_N2T, cloud_N).mean())
        figures["truth_at_half"] = float(curve.loc[curve["share"] == 0.5, "truth"].iloc[0])
    return figures, pd.concat([curve.assign(router="router"), oracle.assign(router="oracle")], ignore_index=True)


def _of_both(table: pd.DataFrame, names: Sequence[str]) -> np.ndarray:
    """Return columns of the device's (0) and the cloud's (1) answers, [N, 2, K]."""
    return np.stack([table[[f"{side}_{name}" for name in names]].to_numpy() for side in ("device", "cloud")], 1)


@torch.inference_mode()
def routed_figures(setup: Setup, method: Routed, images: int) -> dict[str, Any]:
    """Return the share of test images in the cloud, what was asked and expected, for ``results.json``."""
    index_CS, client_C = cut_chunks(setup.clients.test, images)
    cloud, total = 0, 0
    for at in range(0, len(client_C), _CLIENTS):
        part = slice(at, at + _CLIENTS)
        batch = setup.batches[ClientIndex(index_CS[part], client_C[part])].moved(setup.device)
        cloud, total = cloud + int(method.to_cloud(batch).sum()), total + int(batch.mask_CS.sum())
    return share_figures(method, cloud, total)


def share_figures(method: Routed, cloud: int, total: int) -> dict[str, Any]:
    """Return the share of ``total`` requests in the cloud, the asked one, and the expected one with its interval."""
    interval = method.interval(requests=total)
    return {
        "cloud_share": cloud / total,
        "asked_share": method.share,
        "expected_share": interval.expected,
        "share_low": interval.low,
        "share_high": interval.high,
        "threshold": method.threshold(),
    }


def _rank(one_N: np.ndarray, other_N: np.ndarray) -> float | None:
    """Return Spearman's rank correlation; None where one of them is constant."""
    if np.ptp(one_N) == 0 or np.ptp(other_N) == 0:
        return None
    return float(spearmanr(one_N, other_N).statistic)


def rank_resamples(score_N: np.ndarray, prs_N: np.ndarray) -> np.ndarray:
    """Return Spearman's rank correlation in each of 1,000 bootstrap resamples of the prompts, float64 [R].

    They are the same resamples for every score of the same prompts, so that differences are paired. NaN where one of
    them is constant in a resample.
    """
    rng, found, left = generator("bootstrap", 0), [], _RESAMPLES
    while left > 0:
        some = min(left, max(1, (1 << 21) // len(score_N)))  # resamples at a time: some 100 MiB
        drawn_RN = rng.integers(len(score_N), size=(some, len(score_N)))
        # their ranks, equal ones averaged, then Pearson's correlation
        ranks = [rankdata(values[drawn_RN], axis=1) for values in (score_N, prs_N)]
        one_RN, other_RN = (rank - rank.mean(1, keepdims=True) for rank in ranks)
        size_R = np.sqrt((one_RN**2).sum(1) * (other_RN**2).sum(1))
        found.append(np.divide((one_RN * other_RN).sum(1), size_R, out=np.full(some, np.nan), where=size_R > 0))
        left -= some
    return np.concatenate(found)


def _rank_interval(score_N: np.ndarray, prs_N: np.ndarray) -> dict[str, float | None]:
    """Return the 95 % interval of the rank correlation over prompts, by the percentiles of a bootstrap."""
    low, high = np.percentile(rank_resamples(score_N, prs_N), [2.5, 97.5])
    return {"rank_correlation_low": _known(float(low)), "rank_correlation_high": _known(float(high))}


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value
