"""Linear probe: a regularised linear classifier on frozen features, by scikit-learn's logistic regression.

Legend: M images, D features, K classes.
"""

from __future__ import annotations

import logging
import math
import warnings
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from iciia_exp.errors import UserError
from iciia_exp.seeding import generator
from iciia_exp.tasks import MULTI_LABEL

__all__ = ["FOLDS", "PENALTIES", "fit_linear_head", "out_of_fold_logits"]

log = logging.getLogger(__name__)

#: L2 penalties to choose from, per image: half the squared norm of the weights on standardised features.
PENALTIES = (1e-2, 1e-3, 1e-4, 1e-5)

#: Parts of the images, of which each gets its logits from a classifier fitted on the others.
FOLDS = 5

#: Images that choose the penalty; the fit itself is on all.
_CHOOSE = 20_000


def _fit(x_MD: np.ndarray, y_M: np.ndarray, penalty: float, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return weight [K, D] and bias [K]; a class without images can never be the answer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the penalty matters, the last digits do not
        model = LogisticRegression(C=1.0 / (penalty * len(x_MD)), max_iter=300, tol=1e-4).fit(x_MD, y_M)
    coefficients, intercepts = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # scikit-learn keeps one row for two classes
        coefficients = np.concatenate([-coefficients / 2, coefficients / 2])
        intercepts = np.concatenate([-intercepts / 2, intercepts / 2])
    weight = np.zeros((num_classes, x_MD.shape[1]), dtype=np.float32)
    bias = np.full(num_classes, intercepts.min() - 30.0, dtype=np.float32)
    weight[model.classes_], bias[model.classes_] = coefficients, intercepts
    return weight, bias


def _fit_attribute(x_MD: np.ndarray, y_M: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """Return weight [D] and bias of an attribute's logit; where all images agree its odds, of one more on each side."""
    if (ones := int(y_M.sum())) in (0, len(y_M)):
        return np.zeros(x_MD.shape[1], dtype=np.float32), math.log((ones + 1) / (len(y_M) - ones + 1))
    weight, bias = _fit(x_MD, y_M, penalty, 2)
    return weight[1] - weight[0], bias[1] - bias[0]


def _fit_task(
    x_MD: np.ndarray, labels: np.ndarray, penalty: float, task: str, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return weight [K, D] and bias [K] of one classifier, or of one for every attribute of a multi-label task."""
    if task != MULTI_LABEL:
        return _fit(x_MD, labels, penalty, num_classes)
    rows = [_fit_attribute(x_MD, column.astype(np.int64), penalty) for column in labels.T]
    return np.stack([w for w, _ in rows]), np.array([b for _, b in rows], dtype=np.float32)


def _loss(x_MD: np.ndarray, y_M: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> float:
    logits = (x_MD @ weight.T + bias).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    probabilities = np.exp(logits)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return float(log_loss(y_M, probabilities, labels=np.arange(len(bias))))


def fit_linear_head(
    x_MD: np.ndarray, labels: np.ndarray, task: str, num_classes: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Fit a classifier with an L2 penalty that is chosen on a fifth of the images, then used on all.

    A multi-label task has a penalty of 1e-4.

    Args:
        x_MD: features, float32, of the images it may learn from.
        labels: int64 [M], or 0/1 [M, K] of a multi-label task: one logistic regression for every attribute.
        task: one of `iciia_exp.tasks.TASKS`.
        num_classes: K.
        seed: of the fifth.

    Returns:
        weight [K, D], bias [K], and a record: the penalty and the held-out log-loss under each.
    """
    if len(x_MD) == 0 or (task != MULTI_LABEL and len(np.unique(labels)) < 2):
        raise UserError("backbone.train=head: needs images of at least two classes to fit a classifier on")
    mean, scale = x_MD.mean(axis=0), float(x_MD.std()) or 1.0
    x_MD = (x_MD - mean) / scale
    rng = generator("linear_head", seed)
    order = rng.permutation(len(x_MD))[:_CHOOSE]
    held, kept = np.split(order, [max(1, len(order) // 5)])
    if task == MULTI_LABEL or len(np.unique(labels[kept])) < 2:
        losses = {}
        penalty = 1e-4
    else:
        losses = {
            p: _loss(x_MD[held], labels[held], *_fit(x_MD[kept], labels[kept], p, num_classes)) for p in PENALTIES
        }
        penalty = min(losses, key=lambda p: losses[p])
    weight, bias = _fit_task(x_MD, labels, penalty, task, num_classes)
    weight = weight / scale  # undo the standardisation
    record = {"penalty": penalty, "held_out_log_loss": {f"{p:g}": round(loss, 4) for p, loss in losses.items()}}
    return weight.astype(np.float32), (bias - weight @ mean).astype(np.float32), record


def out_of_fold_logits(
    x_MD: np.ndarray, labels: np.ndarray, task: str, num_classes: int, penalty: float, seed: int = 0
) -> np.ndarray:
    """Return the logits of every image by a classifier that was not fitted on it, float16 [M, K].

    What is trained behind the classifier on the same images should see logits like those of new images: a classifier is
    far surer of its own (Wolpert 1992, stacked generalization).

    Args:
        x_MD, labels, task, num_classes: as for `fit_linear_head`.
        penalty: the one that it chose.
        seed: of the folds, which have equal shares of every class.
    """
    mean, scale = x_MD.mean(axis=0), float(x_MD.std()) or 1.0
    x_MD = (x_MD - mean) / scale
    draws_M = generator("folds", seed).random(len(x_MD))
    order_M = np.argsort(draws_M) if task == MULTI_LABEL else np.lexsort((draws_M, labels))
    fold_M = np.empty(len(x_MD), dtype=np.int64)
    fold_M[order_M] = np.arange(len(x_MD)) % FOLDS
    logits_MK = np.empty((len(x_MD), num_classes), dtype=np.float16)
    for fold in range(FOLDS):
        others, own = fold_M != fold, fold_M == fold
        weight, bias = _fit_task(x_MD[others], labels[others], penalty, task, num_classes)
        logits_MK[own] = x_MD[own] @ weight.T + bias
    return logits_MK
