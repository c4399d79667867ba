"""Labels of a router: by how much the device's answer is better than the cloud's, in each metric and in all.

Source: arXiv 2411.13787 (see `iciia_exp.methods.route.route_t2i`). What mu is, and Gamma, are not published.

Legend: N requests, P pictures of each, K metrics.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from torch import Tensor

__all__ = ["CLEAR", "LEAST", "compare_pair", "pareto_superiority", "relative_superiority"]

#: Least difference of the models' means that D is divided by: two equal models.
LEAST = 1e-3
#: Standard errors by which the models' means differ in a metric that is used.
CLEAR = 2.0


def relative_superiority(
    q_edge: Tensor, q_cloud: Tensor, mu_edge_K: Tensor, mu_cloud_K: Tensor, gamma: float = 1.0
) -> Tensor:
    """Return D of every metric, from 0 to 1, [..., K]: sigmoid((q_edge - q_cloud) / (gamma |mu_edge - mu_cloud|)).

    Above 1/2 the device's answer is better. ``mu`` are the means over the train requests.
    """
    return ((q_edge - q_cloud) / (gamma * (mu_edge_K - mu_cloud_K).abs().clamp(min=LEAST))).sigmoid()


def pareto_superiority(d: Tensor, weight_K: Tensor) -> Tensor:
    """Return PRS, [...]: the mean of D with weights that sum to 1."""
    return (d * weight_K).sum(-1)


def compare_pair(q_N2PK: np.ndarray, names: Sequence[str]) -> pd.DataFrame:
    """Return a row for each metric: the means of both models, their difference, its standard error, and ``used``.

    A metric is used if the means differ by more than two standard errors over the requests. Requests are paired.
    """
    q_N2K = q_N2PK.astype(np.float64).mean(2)
    difference_NK = q_N2K[:, 1] - q_N2K[:, 0]
    count = len(q_N2K)
    error_K = difference_NK.std(0, ddof=1) / count**0.5 if count > 1 else np.full(len(names), np.inf)
    mean_K = difference_NK.mean(0)
    return pd.DataFrame(
        {
            "metric": list(names),
            "device": q_N2K[:, 0].mean(0),
            "cloud": q_N2K[:, 1].mean(0),
            "difference": mean_K,
            "standard_error": error_K,
            "used": np.abs(mean_K) > CLEAR * error_K,
        }
    )


def labels_of(q_B2PK: Tensor, mu_2K: Tensor, gamma: float, average: str) -> Tensor:
    """Return D, [B, K], of requests with several pictures.

    ``average`` is ``quality``: of the mean quality of the pictures, or ``label``: the mean of D over pictures.
    """
    if average == "quality":
        q_B2PK = q_B2PK.mean(2, keepdim=True)
    edge, cloud = q_B2PK.unbind(1)
    return relative_superiority(edge, cloud, mu_2K[0], mu_2K[1], gamma).mean(1)
