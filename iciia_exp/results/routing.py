"""Measures of routing: quality by share of requests in the cloud, and what a router saves at equal quality.

Legend: N requests, K metrics, quality q_N2K of the device's (0) and of the cloud's (1) answer.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from iciia_exp.seeding import generator

__all__ = [
    *("LEVELS", "SHARES", "area", "chosen", "delta_p", "random_delta_p", "route_curve", "saved", "to_cloud"),
    *("win_rate", "wins"),
]

#: Shares of requests in the cloud at which curves are drawn.
SHARES = tuple(round(0.1 * i, 1) for i in range(11))
#: delta P at which saved calls are reported.
LEVELS = (40.0, 50.0, 60.0)


def chosen(q_N2K: np.ndarray, cloud_N: np.ndarray) -> np.ndarray:
    """Return the quality of the answers that were chosen, [N, K]."""
    return np.where(cloud_N[:, None], q_N2K[:, 1], q_N2K[:, 0])


def delta_p(q_N2K: np.ndarray, cloud_N: np.ndarray) -> float:
    """Return delta P in %: the mean over metrics of the gain over the device, as a share of |cloud - device|.

    Where the cloud is worse in one metric of ten, all requests in the cloud get 80, and a random half 40.
    """
    edge_K, cloud_K = q_N2K.mean(0)
    gain_K = chosen(q_N2K, cloud_N).mean(0) - edge_K
    return float(100 * np.mean(gain_K / np.abs(cloud_K - edge_K)))


def random_delta_p(q_N2K: np.ndarray, share: float) -> float:
    """Return the expected delta P of requests that go to the cloud at random."""
    edge_K, cloud_K = q_N2K.mean(0)
    return float(100 * share * np.mean(np.sign(cloud_K - edge_K)))


def win_rate(prs_N: np.ndarray, cloud_N: np.ndarray) -> float:
    """Return the share of requests whose chosen answer has the better PRS; ties count half."""
    return float(wins(prs_N, cloud_N).mean())


def wins(prs_N: np.ndarray, cloud_N: np.ndarray) -> np.ndarray:
    """Return whether the chosen answer has the better PRS, float64 [N]: 1, 0, or 1/2 in a tie."""
    return np.where(prs_N == 0.5, 0.5, np.where(cloud_N, prs_N < 0.5, prs_N > 0.5))


def to_cloud(score_N: np.ndarray, share: float) -> np.ndarray:
    """Return which requests go to the cloud if a share of exactly these requests does: those of the lowest scores."""
    cloud_N = np.zeros(len(score_N), dtype=bool)
    cloud_N[_order(score_N)[: round(share * len(score_N))]] = True
    return cloud_N


def _order(score_N: np.ndarray) -> np.ndarray:
    """Return the requests by their scores, equal ones in a random order."""
    return np.lexsort((generator("routes").permutation(len(score_N)), score_N))


def route_curve(
    score_N: np.ndarray, q_N2K: np.ndarray, prs_N: np.ndarray, names: Sequence[str], shares: Sequence[float] = SHARES
) -> pd.DataFrame:
    """Return quality by share of requests in the cloud: share, each metric, quality (their mean), delta_p, win_rate."""
    rows = []
    for share in shares:
        cloud_N = to_cloud(score_N, share)
        q_K = chosen(q_N2K, cloud_N).mean(0)
        rows.append(
            {
                "share": share,
                **dict(zip(names, q_K.tolist(), strict=True)),
                "quality": float(q_K.mean()),
                "delta_p": delta_p(q_N2K, cloud_N),
                "win_rate": win_rate(prs_N, cloud_N),
            }
        )
    return pd.DataFrame(rows)


def area(curve: pd.DataFrame, key: str) -> float:
    """Return the area between a curve by share and the line between its ends, which random requests have."""
    share, value = curve["share"].to_numpy(), curve[key].to_numpy()
    line = value[0] + (value[-1] - value[0]) * (share - share[0]) / (share[-1] - share[0])
    return float(np.trapezoid(value - line, share))


def saved(score_N: np.ndarray, q_N2K: np.ndarray, level: float) -> float:
    """Return which part of the cloud's calls is saved at a delta P, compared with random requests; NaN if not reached.

    Requests go to the cloud one after the other, those of the lowest scores first.
    """
    edge_K, cloud_K = q_N2K.mean(0)
    scale_K = np.abs(cloud_K - edge_K)
    full = random_delta_p(q_N2K, 1.0)
    if full <= 0 or level > full:
        return float("nan")
    order_N = _order(score_N)
    gains_N = ((q_N2K[order_N, 1] - q_N2K[order_N, 0]) / scale_K).mean(1)
    reached = np.flatnonzero(100 * gains_N.cumsum() / len(gains_N) >= level)
    if not len(reached):
        return float("nan")
    return float(1 - (reached[0] + 1) / len(gains_N) / (level / full))
