"""Policy: which requests go to the cloud, so that their share stays under a budget.

A request goes to the cloud if its score is below a threshold, strictly; ties stay on the device. The threshold comes
from the scores of reference requests, which a router was not trained on.

Legend: n reference requests, rho the largest share of requests in the cloud.
"""

from typing import NamedTuple

import numpy as np

from iciia_exp.errors import ConfigError, check_float

__all__ = ["CAP", "Interval", "calibrated_threshold", "published_threshold", "share_interval"]

#: A score from which on the device's model is expected to be better: the cloud is never paid for such a request.
CAP = 0.5


class Interval(NamedTuple):
    """The share of new requests that a threshold sends to the cloud, over draws of the reference requests."""

    expected: float
    low: float  # 95 % of the shares are between these
    high: float


def published_threshold(scores_n: np.ndarray, rho: float, cap: float | None = CAP) -> float:
    """Return the published threshold: the largest one with at most a share ``rho`` of the references below it.

    It is the (floor(rho n) + 1)-th smallest score, infinity if there are no more, and at most ``cap``. Of new requests,
    an expected share of (floor(rho n) + 1) / (n + 1) is below it, which is more than ``rho``.
    """
    _check(scores_n, rho)
    number = int(np.floor(rho * len(scores_n) + 1e-9))
    return _capped(np.sort(scores_n)[number] if number < len(scores_n) else np.inf, cap)


def calibrated_threshold(
    scores_n: np.ndarray, rho: float, cap: float | None = CAP, confidence: float | None = None
) -> float:
    """Return a threshold below which an expected share of at most ``rho`` of new requests is, and at most ``cap``.

    It is the J-th smallest score for J = floor(rho (n + 1)), minus infinity for J = 0, infinity for J > n: if reference
    and new requests are exchangeable, the share is distributed as Beta(J, n + 1 - J), with the mean J / (n + 1).

    Args:
        scores_n: of the reference requests.
        rho: the share.
        cap: largest threshold; None: any.
        confidence: J is lowered until the share is at most ``rho`` with this probability; None: on average only.
    """
    _check(scores_n, rho)
    number = calibrated_number(len(scores_n), rho, confidence)
    if number == 0:
        return -np.inf
    return _capped(np.sort(scores_n)[number - 1] if number <= len(scores_n) else np.inf, cap)


def calibrated_number(n: int, rho: float, confidence: float | None = None) -> int:
    """Return J of `calibrated_threshold`."""
    number = int(np.floor(rho * (n + 1) + 1e-9))
    if confidence is not None and rho < 1:
        from scipy.stats import beta  # late: a second, and every command imports this module

        while number and beta.ppf(confidence, number, n + 1 - number) > rho:
            number -= 1
    return number


def share_interval(
    scores_n: np.ndarray, threshold: float, requests: int | None = None, coverage: float = 0.95
) -> Interval:
    """Return the share of new requests below a threshold, which is one of the reference scores or infinite.

    With the J-th smallest of n different scores it is distributed as Beta(J, n + 1 - J), and that of a number of
    ``requests`` as the beta-binomial distribution. Any other threshold, as a cap, counts as one between two scores: its
    interval is that of Clopper and Pearson, whose ends are such distributions.
    """
    from scipy.stats import beta, betabinom

    n = len(scores_n)
    if not np.isfinite(threshold):
        share = float(threshold > 0)
        return Interval(share, share, share)
    tails = (1 - coverage) / 2, (1 + coverage) / 2
    below = int((scores_n < threshold).sum())

    def share_at(tail: float, a: int, b: int) -> float:
        return float(beta.ppf(tail, a, b) if requests is None else betabinom.ppf(tail, requests, a, b) / requests)

    if (scores_n == threshold).any():
        low, high = (share_at(tail, below + 1, n - below) for tail in tails)
        return Interval((below + 1) / (n + 1), low, high)
    low = share_at(tails[0], below, n + 1 - below) if below else 0.0
    high = share_at(tails[1], below + 1, n - below) if below < n else 1.0
    return Interval(below / n if n else 0.0, low, high)


def _check(scores_n: np.ndarray, rho: float) -> None:
    check_float("share", rho, 0.0, 1.0)
    if not len(scores_n):
        raise ConfigError("share", rho, "there are no reference requests, whose scores give the threshold")
    if not np.isfinite(scores_n).all():
        raise ConfigError("share", rho, "some reference requests have no finite score")


def _capped(threshold: float, cap: float | None) -> float:
    return float(threshold if cap is None else min(threshold, cap))
