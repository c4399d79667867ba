"""Summary: averages over images and clients, their intervals, and the harm that chance alone does.

Everything is computed from integer counts per client, so clients, batches and processes add up.

Legend: C clients, U client types (with the same counts), R bootstrap resamples.
"""

from dataclasses import dataclass

import numpy as np

from iciia_exp.seeding import generator

__all__ = ["ALL", "COUNTS", "ClientCounts", "averages", "harmed_by_chance", "summarise", "worst_decile"]

RESAMPLES = 2000

#: In place of a history's length: all other images of the client (up to the longest history).
ALL = -1

#: Arrays of `ClientCounts`, without the ``_C``.
COUNTS = ("images", "backbone_correct", "method_correct", "both_correct", "backbone_loss", "method_loss")

# From this many clients on, the bootstrap draws client types instead of clients.
_MANY = 10_000


@dataclass(frozen=True)
class ClientCounts:
    """Sufficient statistics of one evaluation, one entry per client (arrays of length C)."""

    images_C: np.ndarray  # int64, images evaluated
    backbone_correct_C: np.ndarray  # int64, correct decisions of the plain backbone
    method_correct_C: np.ndarray  # int64
    both_correct_C: np.ndarray  # int64, decisions on which both are correct: pairs the two, image by image
    backbone_loss_C: np.ndarray  # float64, sum of -log p(label), nats
    method_loss_C: np.ndarray  # float64
    decisions: int = 1  # of one image: its class, or every attribute of a multi-label task
    ranked: bool = False  # of a click task: correct decisions, float64, are AUC times images; "both" is the lesser

    def __post_init__(self) -> None:
        sizes = {name: len(getattr(self, f"{name}_C")) for name in COUNTS}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"all arrays have one entry per client, got {sizes}")
        if (self.images_C <= 0).any():
            raise ValueError("every client in the counts needs at least one image")

    def __len__(self) -> int:
        return len(self.images_C)

    @property
    def decisions_C(self) -> np.ndarray:
        """Decisions evaluated: the denominator of accuracy."""
        return self.images_C * self.decisions

    @property
    def gained_C(self) -> np.ndarray:
        """Decisions that the method gets right and the backbone wrong."""
        return self.method_correct_C - self.both_correct_C

    @property
    def lost_C(self) -> np.ndarray:
        """Decisions that the backbone gets right and the method wrong."""
        return self.backbone_correct_C - self.both_correct_C


def _lowest_tenth(accuracy_C: np.ndarray) -> np.ndarray:
    """Return the indices of the tenth (rounded up) of the clients with the lowest accuracy; ties by position."""
    return np.argsort(accuracy_C, kind="stable")[: -(-len(accuracy_C) // 10)]


def worst_decile(correct_C: np.ndarray, decisions_C: np.ndarray) -> float:
    """Return the mean accuracy over the tenth of the clients (rounded up) with the lowest accuracy.

    >>> worst_decile(np.array([1, 2, 4, 4, 4, 4, 4, 4, 4, 4]), np.full(10, 4))
    0.25
    """
    accuracy_C = correct_C / decisions_C
    return float(accuracy_C[_lowest_tenth(accuracy_C)].mean())


def averages(correct_C: np.ndarray, loss_C: np.ndarray, decisions_C: np.ndarray) -> dict[str, float]:
    """Return ``accuracy``, ``client_accuracy`` (weighs clients), ``worst_decile`` and ``log_loss``.

    ``accuracy`` and ``log_loss`` weigh decisions: images, times attributes of a multi-label task.

    >>> averages(np.array([1, 0]), np.array([0.3, 0.9]), np.array([1, 3]))
    {'accuracy': 0.25, 'client_accuracy': 0.5, 'worst_decile': 0.0, 'log_loss': 0.3}
    """
    return {
        "accuracy": float(correct_C.sum() / decisions_C.sum()),
        "client_accuracy": float((correct_C / decisions_C).mean()),
        "worst_decile": worst_decile(correct_C, decisions_C),
        "log_loss": float(loss_C.sum() / decisions_C.sum()),
    }


def _bootstrap(counts: ClientCounts, resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Return [R] resampled values of the accuracies and paired gains, clients drawn with replacement.

    Clients with the same counts are interchangeable, so a draw of C clients is a multinomial draw of the number of
    clients of each type: exactly the same distribution, with fewer numbers to draw (U = 289 at most for clients of 16
    images).
    """
    sums_U3 = np.stack([counts.decisions_C, counts.backbone_correct_C, counts.method_correct_C], axis=1)
    shares_U = np.full(len(counts), 1.0 / len(counts))  # every client is a type of its own
    if len(counts) >= _MANY:
        sums_U3, clients_U = np.unique(sums_U3, axis=0, return_counts=True)
        shares_U = clients_U / len(counts)
    per_client_U2 = sums_U3[:, 1:] / sums_U3[:, :1]
    sums_U3 = sums_U3.astype(np.float64)
    rng = generator("bootstrap", seed)
    step = max(1, (1 << 24) // len(shares_U))  # resamples at a time: about 128 MiB of weights
    by_client, by_image = [], []
    for start in range(0, resamples, step):
        weights_rU = rng.multinomial(len(counts), shares_U, size=min(step, resamples - start)).astype(np.float64)
        by_client.append(weights_rU @ per_client_U2 / len(counts))
        totals_r3 = weights_rU @ sums_U3
        by_image.append(totals_r3[:, 1:] / totals_r3[:, :1])
    draws: dict[str, np.ndarray] = {}
    for prefix, parts in (("", by_image), ("client_", by_client)):
        backbone_R, method_R = np.concatenate(parts).T
        draws |= {f"backbone_{prefix}accuracy": backbone_R, f"{prefix}accuracy": method_R}
        draws[f"{prefix}gain"] = method_R - backbone_R
    return draws


def _student(clients: int) -> float:
    """Return the half width of a 95 % interval over clients, in standard errors; NaN for fewer than three.

    Two clients that happen to be equal would have an interval of no width.
    """
    from scipy.special import stdtrit  # late: a tenth of a second

    return float(stdtrit(clients - 1, 0.975)) if clients > 2 else float("nan")


def harmed_by_chance(counts: ClientCounts) -> float:
    """Return the expected share of clients that would lose accuracy if all clients had the same true gain.

    A decision is gained (only the method is right), lost (only the backbone is right) or neither. Each client keeps its
    number of decisions and draws them from the pool of all clients. The share that is left is the harm that small test
    sets produce by themselves.

    In a click task, where the pairs of a client share items: half of the clients whose AUC differs, as if a coin had
    decided which of the two is better.
    """
    if counts.ranked:
        return float((counts.gained_C != counts.lost_C).mean()) / 2
    from scipy.stats import binom  # late: half a second

    lost, gained, total = counts.lost_C.sum(), counts.gained_C.sum(), counts.decisions_C.sum()
    if not lost:
        return 0.0
    harmed = 0.0
    for decisions, clients in zip(*np.unique(counts.decisions_C, return_counts=True), strict=True):
        # of n decisions m change the answer, binomial; of these more than half are lost, binomial too
        changed = binom(decisions, (lost + gained) / total)
        m = np.arange(changed.ppf(1e-12), changed.isf(1e-12) + 1)
        harmed += clients * float(changed.pmf(m) @ binom.sf(m // 2, m, lost / (lost + gained)))
    return harmed / len(counts)


def summarise(counts: ClientCounts, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, float | int]:
    """Return the flat row of averages: method, backbone, paired gains with 95 % intervals over clients, and harm.

    Accuracies and gains are fractions (0 to 1). Intervals end in ``_low`` and ``_high``: Student's with the bootstrap
    standard error, within what is possible. Percentiles of the bootstrap are too narrow for few clients. ``se_clients``
    is the standard error of ``client_accuracy`` over clients (not over seeds). ``gain_where_backbone_is_worst`` is of
    the tenth of the clients with the lowest accuracy of the backbone on the same images, so a part of it is regression
    to the mean: with few images it is large for any method whose errors are others. ``log_loss_gain`` is the backbone's
    log-loss less the method's, in nats, mean over clients. Of fewer than three clients intervals are NaN, of one the
    standard error, too.
    """
    n_C = counts.decisions_C
    method = averages(counts.method_correct_C, counts.method_loss_C, n_C)
    backbone = averages(counts.backbone_correct_C, counts.backbone_loss_C, n_C)
    backbone_C, method_C = counts.backbone_correct_C / n_C, counts.method_correct_C / n_C
    worst_C = _lowest_tenth(backbone_C)
    row: dict[str, float | int] = method | {f"backbone_{name}": value for name, value in backbone.items()}
    row |= {
        "gain": method["accuracy"] - backbone["accuracy"],
        "client_gain": method["client_accuracy"] - backbone["client_accuracy"],
        "gain_where_backbone_is_worst": float((method_C - backbone_C)[worst_C].mean()),
        "improved_share": float((counts.gained_C > counts.lost_C).mean()),
        "harmed_share": float((counts.lost_C > counts.gained_C).mean()),
        "harmed_share_by_chance": harmed_by_chance(counts),
    }
    clients, student = len(counts), _student(len(counts))
    correction = (clients / max(clients - 1, 1)) ** 0.5  # a resample of C clients varies with C - 1 degrees of freedom
    for name, values_R in _bootstrap(counts, resamples, seed).items():
        error, lowest = correction * float(values_R.std(ddof=1)), -1.0 if name.endswith("gain") else 0.0
        ends = np.clip(row[name] + student * error * np.array([-1, 1]), lowest, 1.0)
        row[f"{name}_low"], row[f"{name}_high"] = ends.tolist()
        if name == "client_accuracy":
            row["se_clients"] = error if clients > 1 else float("nan")
    saved_C = (counts.backbone_loss_C - counts.method_loss_C) / n_C
    half = student * correction * float(saved_C.std()) / clients**0.5
    row["log_loss_gain"] = float(saved_C.mean())
    row["log_loss_gain_low"], row["log_loss_gain_high"] = row["log_loss_gain"] - half, row["log_loss_gain"] + half
    row["test_clients"], row["test_images"] = clients, int(counts.images_C.sum())
    return row
