"""Session: serves a client's images one after the other, with a bounded memory of its past.

    session = ClientSession(Run.load("outputs/digits/iciia-0123456789ab"), client="kitchen", history=15)
    session.predict(features)   # [D] of one image -> probabilities [K]; the image joins the client's past

Of every past image the method's state is kept (`Adaptive.state_width` numbers: keys and values of every layer, or the
features where those do not stay valid), so that ICIIA with causal attention or one layer serves one more image at the
cost of one step. `predict_together` serves many sessions in one call.

Legend: C clients, P kept images, E numbers kept of each, D features, K classes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iciia_exp.artifacts import atomic_write
from iciia_exp.errors import UserError, check_choice, check_int, first_line
from iciia_exp.methods.adapt.base import Adaptive
from iciia_exp.models.backbones.base import Backbone
from iciia_exp.serving.run import Run

__all__ = ["KEEP", "ClientSession", "predict_together"]

KEEP = ("recent", "reservoir", "diverse")

_FORMAT = 1

# Sessions of a batch; their states are copied into one tensor, 30 KiB an image for N = 3 and D = 1280.
_TOGETHER = 64


class ClientSession:
    """A client that is served image by image.

    Args:
        run: the trained run.
        client: name of the client, for errors.
        history: number of images whose state is kept; by default a chunk of training without its target.
        keep: ``recent`` keeps the last images, ``reservoir`` a uniform sample of all so far (Vitter 1985, algorithm R).
            ``diverse`` drops the older of the two most similar images (cosine of the features, which are kept as well).
        backbone: computes features, for `predict` on images (`Run.load_backbone`).
        seed: seed of the reservoir.
        compile: ``inductor`` compiles `predict` ahead of time (AOTInductor): a quarter of an image's time, after some
            seconds for the first session of a run and history. It needs a C++ compiler. Or another backend of
            `torch.compile`.
    """

    def __init__(
        self,
        run: Run,
        client: str = "client",
        history: int | None = None,
        keep: str = "recent",
        backbone: Backbone | None = None,
        seed: int = 0,
        compile: str | None = None,
    ) -> None:
        if not isinstance(run.method, Adaptive):
            raise UserError(f"{run.method.name}: serves the clients of its partition alone, not new ones")
        self.run, self.client, self.backbone, self.method = run, client, backbone, run.method
        self.history = max(1, run.images - 1) if history is None else check_int("history", history, 0)
        self.keep = check_choice("keep", keep, KEEP)
        #: number of images seen so far, and of those kept
        self.seen, self.kept = 0, 0
        self._rng = np.random.default_rng(seed)
        dim = self.method.dim if keep == "diverse" else 0
        self._state = torch.zeros(self.history, self.method.state_width)
        self._past_1PE = self._state[None]  # the same memory
        self._features = torch.zeros(self.history, dim)
        self._age = np.zeros(self.history, dtype=np.int64)  # position of an image in the stream
        self._compiled = None if compile is None or self.history == 0 else _compiled_step(self, compile)
        self._real = torch.zeros(1, self.history, dtype=torch.bool)  # whether a place holds an image

    def __repr__(self) -> str:
        return f"ClientSession({self.client!r}, {self.seen} images seen, {self.kept} kept, {self.state_bytes:,} bytes)"

    @property
    def state_bytes(self) -> int:
        """Size of the kept state, in bytes."""
        return self.kept * 4 * (self._state.shape[1] + self._features.shape[1])

    @torch.inference_mode()
    def predict(self, image: Any) -> Tensor:
        """Return probabilities over ``run.class_names``, float32 [K], and remember the image.

        Args:
            image: features, float [D]; or, with a backbone, an image of the dataset's form.
        """
        x_1D = self._as_features(image)
        if self._compiled is None:
            logits_1K, own_1E = self.method.step(_checked(x_1D, [self]), self._state[None, : self.kept])
            p_1K = self.method.task.probabilities(logits_1K)
        else:  # of one shape, so that there is one program
            _checked(x_1D, [self], finite=False)
            try:
                p_1K, own_1E, finite = self._compiled(x_1D, self._past_1PE, self._real)
            except Exception as error:
                raise UserError(f"torch.compile failed ({first_line(error)}); leave compile out") from error
            if not finite:
                _checked(x_1D, [self])
        self._remember(own_1E[0], x_1D)
        return p_1K[0]

    def _as_features(self, image: Any) -> Tensor:
        """Return an image's features, [1, D]."""
        dim = self.method.dim
        if isinstance(image, np.ndarray) and image.dtype.kind == "f" and image.ndim == 1:
            image = torch.from_numpy(image)
        if not (isinstance(image, Tensor) and image.is_floating_point() and image.ndim == 1):
            if self.backbone is None:
                shape = list(image.shape) if hasattr(image, "shape") else type(image).__name__
                problem = f"expected features, float [{dim}], got {shape}"
                raise UserError(f"{self.client}: {problem}; for images give the session backbone=run.load_backbone()")
            image = self.backbone.features(self.backbone.transform(image)[None])[0]
        return image.float()[None]

    def _remember(self, own_E: Tensor, x_D: Tensor) -> None:
        """Keep one more image, in place of another if the memory is full; ``x_D`` may be [1, D]."""
        self.seen += 1
        if self.history == 0:
            return
        place: int | None = self.kept
        if self.kept < self.history:
            self._real[0, self.kept] = True
            self.kept += 1
        elif self.keep == "recent":
            place = (self.seen - 1) % self.history  # the oldest
        elif self.keep == "reservoir":
            drawn = int(self._rng.integers(self.seen))
            place = drawn if drawn < self.history else None
        else:
            place = self._most_similar(x_D.reshape(1, -1))
        if place is None:
            return
        self._state[place], self._age[place] = own_E, self.seen
        if self.keep == "diverse":
            self._features[place] = x_D

    def _most_similar(self, x_1D: Tensor) -> int:
        """Return the place of the older one of the two most similar images."""
        f_PD = torch.nn.functional.normalize(torch.cat([self._features, x_1D]), dim=-1)
        similar_PP = (f_PD @ f_PD.T).fill_diagonal_(-2.0)
        pair = divmod(int(similar_PP.argmax()), len(f_PD))
        age = [*self._age.tolist(), self.seen]
        return min(reversed(pair), key=age.__getitem__)

    def save(self, path: str | Path) -> None:
        """Write the client's memory to one file (safetensors)."""
        from safetensors.torch import save

        tensors = {"state": self._state[: self.kept], "features": self._features[: self.kept]}
        tensors["age"] = torch.from_numpy(self._age[: self.kept])
        facts = {
            "format": _FORMAT,
            "run": self.run.path.resolve().name,
            "client": self.client,
            "history": self.history,
            "keep": self.keep,
            "seen": self.seen,
            "random": self._rng.bit_generator.state,
        }
        with atomic_write(Path(path), "wb") as file:
            file.write(save({k: v.contiguous() for k, v in tensors.items()}, {"session": json.dumps(facts)}))

    @classmethod
    def load(
        cls, path: str | Path, run: Run, backbone: Backbone | None = None, compile: str | None = None
    ) -> ClientSession:
        """Load a saved session of the same ``run``."""
        from safetensors import safe_open

        if not Path(path).is_file():
            raise UserError(f"{path}: no such session")
        try:
            with safe_open(str(path), "pt") as file:
                facts = json.loads((file.metadata() or {})["session"])
                tensors = {name: file.get_tensor(name) for name in ("state", "features", "age")}
        except Exception as error:
            raise UserError(f"{path}: is not a saved session ({error})") from error
        if facts["format"] != _FORMAT:
            raise UserError(f"{path}: format {facts['format']}, this version reads {_FORMAT}")
        if facts["run"] != run.path.resolve().name:
            raise UserError(f"{path}: belongs to the run {facts['run']}, not to {run.path.resolve().name}")
        session = cls(run, facts["client"], facts["history"], facts["keep"], backbone, compile=compile)
        session.seen, session.kept = facts["seen"], len(tensors["age"])
        session._rng.bit_generator.state = facts["random"]
        for name, tensor in tensors.items():
            getattr(session, f"_{name}")[: session.kept] = tensor.numpy() if name == "age" else tensor
        session._real[0, : session.kept] = True
        return session


class _Step(torch.nn.Module):
    """A method's step for compilation: probabilities, state, and whether x is finite."""

    def __init__(self, method: Adaptive) -> None:
        super().__init__()
        self.method = method

    def forward(self, x_1D: Tensor, past_1PE: Tensor, mask_1P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_1K, own_1E = self.method.step(x_1D, past_1PE, mask_1P)
        return self.method.task.probabilities(logits_1K), own_1E, x_1D.isfinite().all()


def _compiled_step(session: ClientSession, backend: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return the compiled step, one for all sessions of a run with the same history."""
    run, history = session.run, session.history
    programs = run.programs
    if (backend, history) not in programs:
        try:
            step = _Step(session.method).eval()
            if backend == "inductor":
                made = _ahead_of_time(step, torch.zeros(1, history, session.method.state_width))
            else:
                made = torch.compile(step, dynamic=False, fullgraph=True, backend=backend)
        except Exception as error:
            raise UserError(f"compile={backend}: {first_line(error)}") from error
        programs[backend, history] = made
    return programs[backend, history]


def _ahead_of_time(step: _Step, past_1PE: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return a library without Python calls: a third of the time of `torch.compile` behind a network."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    mask_1P = torch.ones(past_1PE.shape[:2], dtype=torch.bool)
    with torch.inference_mode(False), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(step, (torch.zeros(1, step.method.dim), past_1PE.clone(), mask_1P.clone()))
        # tuned kernels for products of one row take a third of the classifier's time
        options: dict[str, Any] = {"package_path": f"{folder}/step.pt2", "inductor_configs": {"max_autotune": True}}
        return aoti_load_package(aoti_compile_and_package(program, **options))


def _checked(x_CD: Tensor, sessions: Sequence[ClientSession], finite: bool = True) -> Tensor:
    """Return the features; the error names the first client with features of a wrong shape or not finite."""
    dim = sessions[0].method.dim
    if x_CD.ndim != 2 or x_CD.shape[1] != dim:
        raise UserError(f"{sessions[0].client}: features have shape {list(x_CD.shape[1:])}, the run wants [{dim}]")
    if finite and not x_CD.isfinite().all():
        finite_C = x_CD.isfinite().all(1)
        raise UserError(f"{sessions[int(finite_C.int().argmin())].client}: features are not finite numbers")
    return x_CD


@torch.inference_mode()
def predict_together(sessions: Sequence[ClientSession], features: Tensor) -> Tensor:
    """Serve one image of each of many clients, with histories of any lengths.

    Args:
        sessions: different sessions of one run.
        features: float [C, D], one image for each session.

    Returns:
        Probabilities [C, K], equal to `ClientSession.predict` of each alone.
    """
    if not sessions:
        raise UserError("predict_together: no sessions")
    if len({id(s) for s in sessions}) < len(sessions):
        raise UserError("predict_together: a session is given twice; its images come one after the other")
    if any(s.run is not sessions[0].run for s in sessions):
        raise UserError("predict_together: all sessions must be of the same Run object")
    if len(features) != len(sessions):
        raise UserError(f"predict_together: {len(sessions)} sessions and {len(features)} images")
    return _predict(sessions, _checked(features.float(), sessions))


def _predict(sessions: Sequence[ClientSession], x_CD: Tensor) -> Tensor:
    method = sessions[0].method
    logits_CK = x_CD.new_empty(len(sessions), method.num_classes)
    lengths = np.array([s.kept for s in sessions])
    # sessions of one length at a time: nothing is padded
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        for batch in np.array_split(rows, -(-len(rows) // _TOGETHER)):
            past_CPE = torch.stack([sessions[i]._state[:length] for i in batch])
            logits_CK[batch], own_CE = method.step(x_CD[batch], past_CPE)
            for i, own_E in zip(batch, own_CE, strict=True):
                sessions[i]._remember(own_E, x_CD[i])
    return method.task.probabilities(logits_CK)
