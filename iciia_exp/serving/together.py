"""Many sessions at once: one image of each, or the next images of each.

Legend: C clients, n new images, P kept images, E numbers kept of each, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iciia_exp.errors import UserError
from iciia_exp.methods.adapt.base import Adaptive
from iciia_exp.methods.tune.base import Personal
from iciia_exp.serving import personal
from iciia_exp.serving.features import all_finite, as_arrays, as_features, check_answers, check_features
from iciia_exp.serving.session import ClientSession

__all__ = ["predict_next", "predict_together", "takes_many"]

# Sessions of a batch; their states are copied into one tensor, 30 KiB an image for N = 3 and D = 1280.
_TOGETHER = 64

# Pasts up to this length are padded to the longest of them, longer ones to at most twice their length.
_PADDED = 16


@torch.inference_mode()
def predict_together(
    sessions: Iterable[ClientSession], features: Any, arrays: Mapping[str, Any] | None = None
) -> Tensor:
    """Serve one image of each of many clients, with histories of any lengths.

    Args:
        sessions: different sessions of one run.
        features: numbers [C, D], one image for each session, as a tensor, array or list.
        arrays: what the method reads beside the features, by name, [C, ...].

    Returns:
        Probabilities [C, K], equal to `ClientSession.predict` of each alone.
    """
    sessions = list(sessions)
    if not sessions:
        raise UserError("predict_together: no sessions")
    if len({id(s) for s in sessions}) < len(sessions):
        raise UserError("predict_together: a session is given twice; its images come one after the other")
    if any(s.run is not sessions[0].run for s in sessions):
        raise UserError("predict_together: all sessions must be of the same Run object")
    x_CD = as_features(features, "predict_together", f"[{len(sessions)}, {sessions[0].method.dim}]")
    if x_CD.ndim == 0 or len(x_CD) != len(sessions):
        number = len(x_CD) if x_CD.ndim else 1
        raise UserError(f"predict_together: {len(sessions)} sessions and {number} images")
    method, shapes = sessions[0].method, sessions[0].run.info.get("arrays", {})
    more = as_arrays(
        arrays or {}, method, shapes, check_features(x_CD, [s.client for s in sessions], method.dim)[:, None]
    )
    return _predict(sessions, x_CD, {name: array[:, 0] for name, array in more.items()})


def _predict(sessions: Sequence[ClientSession], x_CD: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
    method = sessions[0].method
    if isinstance(method, Personal):
        if nothing := [s.client for s in sessions if s.learned is None]:
            problem = f"{method.name} has no state of this client: it is not a test client of the run's partition"
            hint = "; give its session labelled images (session.learn)" if method.learns_alone else ""
            raise UserError(f"{nothing[0]}: {problem}{hint}")
        states = [s.learned or {} for s in sessions]
        p_CK = method.task.probabilities(personal.classify(method, x_CD, arrays, states))
        _check_each(sessions, p_CK)
        for session in sessions:
            session.seen += 1
        return p_CK
    assert isinstance(method, Adaptive)
    logits_CK = x_CD.new_empty(len(sessions), method.num_classes)
    states_CE = x_CD.new_empty(len(sessions), method.state_width)
    for batch, longest, same in _batches(sessions):
        past_CPE = torch.stack([sessions[i].past(longest) for i in batch])
        real_CP = None if same else torch.tensor([sessions[i].kept for i in batch])[:, None] > torch.arange(longest)
        logits_CK[batch], states_CE[batch] = method.step(x_CD[batch], past_CPE, real_CP)
    p_CK = method.task.probabilities(logits_CK)
    _check_each(sessions, p_CK, states_CE)
    for session, own_E, x_D in zip(sessions, states_CE, x_CD, strict=True):
        session._remember(own_E, x_D)
    return p_CK


def _batches(sessions: Sequence[ClientSession]) -> Iterator[tuple[np.ndarray, int, bool]]:
    """Yield sessions of similar length, the longest length, and whether all have it.

    Short pasts are padded, since a call costs more than some places.
    """
    lengths = np.array([s.kept for s in sessions])
    sizes = np.maximum(_PADDED, 2 ** np.ceil(np.log2(np.maximum(lengths, 1))))
    for size in np.unique(sizes):
        rows = np.flatnonzero(sizes == size)
        for batch in np.array_split(rows, -(-len(rows) // _TOGETHER)):
            longest = int(lengths[batch].max())
            yield batch, longest, bool((lengths[batch] == longest).all())


def takes_many(session: ClientSession) -> bool:
    """Return whether `predict_next` serves several images of the session in one pass."""
    return isinstance(session.method, Adaptive) and session.method.takes_steps and session.keep == "recent"


@torch.inference_mode()
def predict_next(sessions: Sequence[ClientSession], images: Sequence[Tensor]) -> list[Tensor]:
    """Serve the next images of many clients: probabilities [n, K] of each, as `ClientSession.predict` one by one.

    Args:
        sessions: different sessions of one run and one history.
        images: features [n, D] for each session, n >= 1.
    """
    if all(map(takes_many, sessions)):
        return _predict_steps(sessions, images)
    answers: list[list[Tensor]] = [[] for _ in sessions]
    for number in range(max(map(len, images))):
        rows = [row for row, x_nD in enumerate(images) if len(x_nD) > number]
        p_CK = predict_together([sessions[row] for row in rows], torch.stack([images[row][number] for row in rows]))
        for row, p_K in zip(rows, p_CK, strict=True):
            answers[row].append(p_K)
    return [torch.stack(answer) for answer in answers]


def _predict_steps(sessions: Sequence[ClientSession], images: Sequence[Tensor]) -> list[Tensor]:
    method, most = sessions[0].method, max(map(len, images))
    assert isinstance(method, Adaptive)
    who = [s.client for s, x_nD in zip(sessions, images, strict=True) for _ in x_nD]
    check_features(torch.cat(list(images)), who, method.dim)
    answers: list[Tensor] = [torch.empty(0)] * len(sessions)
    keep: list[Tensor] = [torch.empty(0)] * len(sessions)
    finite = True
    for batch, longest, same in _batches(sessions):
        x_CnD = torch.zeros(len(batch), most, method.dim)
        # what a session does not use is zero, and what is written of padded images is finite
        memory_CSE = torch.empty(len(batch), longest + most, method.state_width)
        for row, i in enumerate(batch):
            x_CnD[row, : len(images[i])] = images[i]
            memory_CSE[row, :longest] = sessions[i]._state[:longest]
        visible = None if same and most == 1 else _visible([sessions[i] for i in batch], longest, most)
        p_CnK = method.task.probabilities(method.step_all(x_CnD, memory_CSE, visible))
        finite = finite and all_finite(p_CnK) and all_finite(memory_CSE[:, longest:])
        for row, i in enumerate(batch):
            answers[i], keep[i] = p_CnK[row, : len(images[i])], memory_CSE[row, longest : longest + len(images[i])]
    if not finite:
        for session, p_nK, own_nE in zip(sessions, answers, keep, strict=True):
            check_answers(session.client, p_nK, own_nE)  # before a past changes
    for session, own_nE in zip(sessions, keep, strict=True):
        session._remember_all(own_nE)
    return answers


def _visible(sessions: Sequence[ClientSession], longest: int, most: int) -> Tensor:
    """Return which places each of the next images sees, bool [C, n, P + n]: the last ones, as many as are kept."""
    new_n, history = np.arange(most), sessions[0].history
    real_CP = np.concatenate([s._real[:, :longest].numpy() for s in sessions])
    age_CP = np.stack([s._age[:longest] - s.seen for s in sessions])  # the next image has 1
    past_CnP = real_CP[:, None] & (age_CP[:, None] > new_n[:, None] - history)
    own_nn = (new_n <= new_n[:, None]) & (new_n >= new_n[:, None] - history)
    own_Cnn = np.broadcast_to(own_nn, (len(sessions), most, most))
    return torch.from_numpy(np.concatenate([past_CnP, own_Cnn], axis=2))


def _check_each(sessions: Sequence[ClientSession], *tensors: Tensor) -> None:
    """Raise a `UserError` that names the first client whose answer or state is not finite, before a past changes."""
    for tensor in tensors:
        if not all_finite(tensor):
            first = int(tensor.isfinite().flatten(1).all(1).int().argmin())
            check_answers(sessions[first].client, tensor[first])
