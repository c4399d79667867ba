"""Linear probe: scikit-learn's logistic regression with an L2 penalty, on frozen features.

Legend: M images, D features, K classes.
"""

import math
import warnings
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.utils.extmath import softmax

from iciia_exp.errors import UserError
from iciia_exp.seeding import generator
from iciia_exp.tasks import MULTI_LABEL

__all__ = ["FOLDS", "PENALTIES", "fit_linear_head", "out_of_fold_logits"]

#: Candidate L2 penalties per image: factors of half the squared norm of the weights on standardised features. They are
#: tried in this order until one is worse than the one before.
PENALTIES = (1e-2, 1e-3, 1e-4, 1e-5)

#: Folds of `out_of_fold_logits`.
FOLDS = 5

# images for the choice of the penalty, at most; the fit is on all images
_CHOOSE = 20_000


def _fit(x_MD: np.ndarray, y_M: np.ndarray, penalty: float, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return weight [K, D] and bias [K]; a class without images is never predicted."""
    if len(classes := np.unique(y_M)) == 1:  # of a fold, say
        bias = np.full(num_classes, -30.0, dtype=np.float32)
        bias[classes] = 0.0
        return np.zeros((num_classes, x_MD.shape[1]), dtype=np.float32), bias
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the penalty matters, the last digits do not
        warnings.filterwarnings("ignore", message="The number of unique classes is greater")  # few images of a class
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
    """Return weight [D] and bias of an attribute's logit; if all images agree, its smoothed log-odds."""
    if (ones := int(y_M.sum())) in (0, len(y_M)):
        return np.zeros(x_MD.shape[1], dtype=np.float32), math.log((ones + 1) / (len(y_M) - ones + 1))
    weight, bias = _fit(x_MD, y_M, penalty, 2)
    return weight[1] - weight[0], bias[1] - bias[0]


def _fit_task(
    x_MD: np.ndarray, labels: np.ndarray, penalty: float, task: str, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return weight [K, D] and bias [K]: one classifier, or one for every attribute of a multi-label task."""
    if task != MULTI_LABEL:
        return _fit(x_MD, labels, penalty, num_classes)
    weights, biases = zip(*(_fit_attribute(x_MD, column.astype(np.int64), penalty) for column in labels.T), strict=True)
    return np.stack(weights), np.array(biases, dtype=np.float32)


def _loss(x_MD: np.ndarray, y_M: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> float:
    probabilities_MK = softmax((x_MD @ weight.T + bias).astype(np.float64))
    return float(log_loss(y_M, probabilities_MK, labels=np.arange(len(bias))))


def fit_linear_head(
    x_MD: np.ndarray, labels: np.ndarray, task: str, num_classes: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Fit a linear classifier on all images, with the L2 penalty that is best on a held-out fifth of them.

    A multi-label task has a penalty of 1e-4. Raises a `UserError` for images of fewer than two classes.

    Args:
        x_MD: features, float32, of the images to learn from.
        labels: int64 [M], or 0/1 [M, K] of a multi-label task: one logistic regression for every attribute.
        task: one of `iciia_exp.tasks.TASKS`.
        num_classes: K.
        seed: of the draw of the fifth.

    Returns:
        weight [K, D], bias [K], and a record: the penalty, and the held-out log-loss of the candidates that were tried.
    """
    if len(x_MD) == 0 or (task != MULTI_LABEL and len(np.unique(labels)) < 2):
        raise UserError("backbone.train=head: needs images of at least two classes to fit a classifier on")
    mean, scale = x_MD.mean(axis=0), float(x_MD.std()) or 1.0
    x_MD = (x_MD - mean) / scale
    rng = generator("linear_head", seed)
    order = rng.permutation(len(x_MD))[:_CHOOSE]
    held, kept = np.split(order, [max(1, len(order) // 5)])
    losses, penalty = {}, 1e-4
    if task != MULTI_LABEL and len(np.unique(labels[kept])) > 1:
        for p in PENALTIES:
            losses[p] = _loss(x_MD[held], labels[held], *_fit(x_MD[kept], labels[kept], p, num_classes))
            if losses[p] > min(losses.values()):  # smaller penalties are worse still, and take many iterations
                break
        penalty = min(losses, key=lambda p: losses[p])
    weight, bias = _fit_task(x_MD, labels, penalty, task, num_classes)
    weight = weight / scale  # undo the standardisation
    record = {"penalty": penalty, "held_out_log_loss": {f"{p:g}": round(loss, 4) for p, loss in losses.items()}}
    return weight.astype(np.float32), (bias - weight @ mean).astype(np.float32), record


def out_of_fold_logits(
    x_MD: np.ndarray, labels: np.ndarray, task: str, num_classes: int, penalty: float, seed: int = 0
) -> np.ndarray:
    """Return the logits of every image from a classifier that was fitted on the other folds, float16 [M, K].

    Models that are trained on these logits then see logits like those of new images: a classifier is far surer of the
    images that it was fitted on (Wolpert 1992, stacked generalization).

    Args:
        x_MD, labels, task, num_classes: as for `fit_linear_head`.
        penalty: the one chosen by `fit_linear_head`.
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
        fitted, held = fold_M != fold, fold_M == fold
        weight, bias = _fit_task(x_MD[fitted], labels[fitted], penalty, task, num_classes)
        logits_MK[held] = x_MD[held] @ weight.T + bias
    return logits_MK
