"""Session: serves a client's images one after the other, with a bounded memory of its past.

    session = ClientSession(Run.load("outputs/digits/iciia-0123456789ab"), client="kitchen", history=15)
    session.predict(features)   # [D] of one image -> probabilities [K]; the image joins the client's past

Of every past image the method's state is kept (`Adaptive.state_width` numbers: keys and values of every layer, or the
features where those do not stay valid), so that ICIIA with causal attention or one layer serves one more image at the
cost of one step. `iciia_exp.serving.together` serves many sessions in one call.

A method whose devices learn (`iciia_exp.methods.tune.base.Personal`) keeps the state that its client's device has
learned: that of a client of the partition is read by its name, a new client's is learned from labelled images.

    session = ClientSession(Run.load("outputs/digits/finetune-0123456789ab"), client="new")
    session.learn(features, labels)   # [n, D], [n]

Legend: P kept images, E numbers kept of each, D features, K classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iciia_exp.artifacts import atomic_write
from iciia_exp.errors import UserError, check_choice, check_int, first_line
from iciia_exp.methods.adapt.base import Adaptive
from iciia_exp.methods.tune.base import Personal
from iciia_exp.models.backbones.base import Backbone
from iciia_exp.serving import personal
from iciia_exp.serving.compiled import compiled_step
from iciia_exp.serving.features import as_features, check_answers, check_features, numeric
from iciia_exp.serving.run import Run

__all__ = ["KEEP", "ClientSession"]

_LEARNED = "learned."  # in the file of a session

KEEP = ("recent", "reservoir", "diverse")

_FORMAT = 3

_LARGEST = 4 << 30  # bytes of the kept states


class ClientSession:
    """A client that is served image by image.

    Args:
        run: the trained run.
        client: name of the client, for errors; of a method whose devices learn, the name in the partition
            (``run.partition.ids``), or a new one.
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
        if not isinstance(run, Run):
            raise UserError(f"ClientSession: expected a run, Run.load(path), got {type(run).__name__}")
        self.run, self.client, self.backbone, self.method = run, client, backbone, run.method
        #: What the client's device has learned; None if nothing.
        self.learned: personal.State | None = None
        if isinstance(run.method, Personal):
            if history or compile is not None:
                raise UserError(f"{run.method.name}: history and compile do not apply; each image is classified alone")
            self.learned, history = personal.stored(run, client), 0
        elif not isinstance(run.method, Adaptive):
            raise UserError(f"{run.method.name}: cannot be served image by image; use run.predict")
        self.history = max(1, run.images - 1) if history is None else check_int("history", history, 0)
        self.keep = check_choice("keep", keep, KEEP)
        #: places of kept images that have changed; who stores them clears it
        self.changed: set[int] = set()
        #: number of images seen so far, and of those kept
        self.seen, self.kept = 0, 0
        self._rng = np.random.default_rng(seed)
        dim = self.method.dim if keep == "diverse" else 0
        width = self.method.state_width if isinstance(self.method, Adaptive) else 0
        if (need := 4 * self.history * (width + dim)) > _LARGEST:
            limit = _LARGEST // (4 * (width + dim))
            problem = f"needs {need / 2**30:,.0f} GiB for the states of so many images; at most {limit:,}"
            raise UserError(f"history={self.history}: {problem}")
        self._state = torch.zeros(self.history, width)
        self._features = torch.zeros(self.history, dim)
        self._age = np.zeros(self.history, dtype=np.int64)  # position of an image in the stream
        self._compiled = None
        if compile is not None and self.history and isinstance(run.method, Adaptive):
            self._compiled = compiled_step(run.method, run.programs, self.history, compile)
        self._real = torch.zeros(1, self.history, dtype=torch.bool)  # whether a place holds an image

    def __repr__(self) -> str:
        return f"ClientSession({self.client!r}, {self.seen} images seen, {self.kept} kept, {self.state_bytes:,} bytes)"

    @property
    def state_bytes(self) -> int:
        """Size of the kept state, in bytes."""
        own = sum(tensor.nbytes for tensor in (self.learned or {}).values())
        return own + self.kept * 4 * (self._state.shape[1] + self._features.shape[1])

    def learn(
        self,
        features: Any,
        labels: Any,
        val: Sequence[Any] | None = None,
        arrays: Mapping[str, Any] | None = None,
    ) -> None:
        """Learn the client's state from labelled images, for a method whose devices learn.

        Args:
            features: numbers [n, D], as a tensor, array or list.
            labels: numbers of ``run.class_names`` [n]; of a multi-label task 0/1 [n, K].
            val: further features and labels (and arrays), which choose the epoch; None: the last quarter of the images.
            arrays: what the method reads beside the features, by name: ``{"tokens": [n, tokens, d]}``.
        """
        if not isinstance(self.method, Personal):
            raise UserError(f"{self.method.name}: learns nothing on the client; it needs no labels")
        self.learned = personal.learn(self.run, features, labels, val, arrays)

    @torch.inference_mode()
    def predict(self, image: Any, arrays: Mapping[str, Any] | None = None) -> Tensor:
        """Return probabilities over ``run.class_names``, float32 [K], and remember the image.

        Args:
            image: features, numbers [D] or [1, D] as a tensor, array or list. With a backbone also an image: a PIL
                image, a path, uint8 [H, W], [H, W, 3] or [3, H, W], floats from 0 to 1 of these shapes, or what the
                dataset gives.
            arrays: what the method reads beside the features, of one image: ``{"tokens": [n, d]}``. With an image, the
                backbone gives them.
        """
        x_1D, more = self._as_features(image)
        if isinstance(self.method, Personal):
            from iciia_exp.serving.together import predict_together  # which imports this module

            given = {name: np.asarray(array)[None] for name, array in (arrays or {}).items()}
            return predict_together([self], x_1D, given | more)[0]
        assert isinstance(self.method, Adaptive)
        if self._compiled is None:
            check_features(x_1D, [self.client], self.method.dim)
            logits_1K, own_1E = self.method.step(x_1D, self.past(self.kept)[None])
            p_1K = self.method.task.probabilities(logits_1K)
        else:  # of one shape, so that there is one program
            check_features(x_1D, [self.client], self.method.dim, finite=False)
            try:
                p_1K, own_1E, finite = self._compiled(x_1D, self.past(self.history)[None], self._real)
            except Exception as error:
                raise UserError(f"torch.compile failed ({first_line(error)}); leave compile out") from error
            if not finite:
                check_features(x_1D, [self.client], self.method.dim)
        check_answers(self.client, p_1K, own_1E)  # before the past changes
        self._remember(own_1E[0], x_1D)
        return p_1K[0]

    def past(self, places: int) -> Tensor:
        """Return what is kept of the past images, the oldest first, [places, E]; ``places`` beyond them hold zeros."""
        rows_PE = self._state
        if self.seen > self.history > 0:  # places were taken again
            if self.keep == "recent":  # in turn: a third of the time of any order
                rows_PE = rows_PE.roll(-int(self._age.argmin()), 0)
            else:
                rows_PE = rows_PE[torch.from_numpy(self._age.argsort())]
        if places > len(rows_PE):
            return torch.nn.functional.pad(rows_PE, (0, 0, 0, places - len(rows_PE)))
        return rows_PE[:places]

    def _as_features(self, image: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return an image's features, [1, D], and of an image the arrays that the method reads, [1, ...]."""
        dim = self.method.dim
        rows = numeric(image) and image.ndim == 2 and image.shape[1] == dim and "float" in str(image.dtype)
        one = isinstance(image, list | tuple) or (numeric(image) and image.ndim == 1) or (rows and len(image) == 1)
        if one or self.backbone is None:
            x = as_features(image, self.client, f"[{dim}]")
            return x if x.shape == (1, dim) else x[None], {}
        if rows and len(image) != dim:
            found = f"floats {list(image.shape)} may be features of {len(image)} images or a grey picture"
            raise UserError(f"{self.client}: {found}; give features one by one, [{dim}], a picture as uint8")
        try:
            x = self.backbone.transform(image)
        except (ValueError, TypeError, OSError, AttributeError, RuntimeError) as error:
            kind = f"{type(image).__name__} {list(image.shape)}" if numeric(image) else type(image).__name__
            raise UserError(f"{self.client}: cannot read the image, {kind} ({first_line(error)})") from error
        wanted = self.method.reads | {"features"}
        if len(wanted) == 1:
            return self.backbone.features(x[None])[0].float()[None], {}
        given = {name: values.float() for name, values in self.backbone.outputs(x[None], wanted).items()}
        return given.pop("features"), given

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
        self.changed.add(place)
        self._state[place], self._age[place] = own_E, self.seen
        if self.keep == "diverse":
            self._features[place] = x_D

    def _remember_all(self, own_nE: Tensor) -> None:
        """Keep some more images, of which the last ones count."""
        number_n = np.arange(self.seen, self.seen + len(own_nE))[-self.history :] if self.history else np.arange(0)
        self.seen += len(own_nE)
        self.kept = min(self.history, self.seen)
        place_n = number_n % max(1, self.history)
        self._state[place_n] = own_nE[len(own_nE) - len(number_n) :]
        self._age[place_n] = number_n + 1
        self._real[0, : self.kept] = True
        self.changed.update(place_n.tolist())

    def _most_similar(self, x_1D: Tensor) -> int:
        """Return the place of the older one of the two most similar images."""
        f_PD = torch.nn.functional.normalize(torch.cat([self._features, x_1D]), dim=-1)
        similar_PP = (f_PD @ f_PD.T).fill_diagonal_(-2.0)
        pair = divmod(int(similar_PP.argmax()), len(f_PD))
        age = [*self._age.tolist(), self.seen]
        return min(reversed(pair), key=age.__getitem__)

    def row(self, place: int) -> bytes:
        """Return what is kept of an image: its position in the stream, int64, its state and features, float32."""
        age = int(self._age[place]).to_bytes(8, "little")
        return age + self._state[place].numpy().tobytes() + self._features[place].numpy().tobytes()

    @property
    def random(self) -> str:
        """State of the random numbers, as JSON; empty where none are drawn."""
        return json.dumps(self._rng.bit_generator.state) if self.keep == "reservoir" else ""

    def restore(self, seen: int, random: str, rows: Mapping[int, bytes]) -> None:
        """Take over what was kept: the number of images, `random`, and the `row` of every place.

        Raises a `UserError` if that cannot be of such a session.
        """
        width, dim = self._state.shape[1], self._features.shape[1]
        try:
            whole = b"".join(rows.get(place, b"") for place in range(len(rows)))
            if len(whole) != len(rows) * (size := 8 + 4 * (width + dim)):
                raise ValueError("or of another session")
            table = np.frombuffer(whole, dtype=np.uint8).reshape(len(rows), size)
            numbers = torch.from_numpy(table[:, 8:].copy().view(np.float32))
            age = torch.from_numpy(table[:, :8].copy().view(np.int64).reshape(-1))
            state: Any = json.loads(random) if random else self._rng.bit_generator.state
            self._restore({"state": numbers[:, :width], "features": numbers[:, width:], "age": age}, seen, state)
        except (UserError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
            raise UserError(f"{self.client}: what is kept of it is damaged ({first_line(error)})") from error

    def save(self, path: str | Path) -> None:
        """Write the client's memory to one file (safetensors)."""
        from safetensors.torch import save

        tensors = {"state": self._state[: self.kept], "features": self._features[: self.kept]}
        tensors["age"] = torch.from_numpy(self._age[: self.kept])
        tensors |= {f"{_LEARNED}{name}": tensor for name, tensor in (self.learned or {}).items()}
        facts = {
            "format": _FORMAT,
            "run": self.run.identity,
            "name": self.run.path.resolve().name,  # for the error
            "client": self.client,
            "history": self.history,
            "keep": self.keep,
            "seen": self.seen,
            "random": self._rng.bit_generator.state,
        }
        facts["checksum"] = _checksum(facts, tensors)
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
                learned = {
                    name.removeprefix(_LEARNED): file.get_tensor(name)
                    for name in file.keys()  # noqa: SIM118  # not a mapping
                    if name.startswith(_LEARNED)
                }
        except Exception as error:  # safetensors raises several kinds
            raise UserError(f"{path}: is not a saved session ({first_line(error)})") from error
        if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
            found = facts.get("format") if isinstance(facts, dict) else facts
            raise UserError(f"{path}: format {found}, this version reads {_FORMAT}")
        if facts.get("run") != run.identity:
            name = run.path.resolve().name
            raise UserError(
                f"{path}: belongs to the run {facts.get('name')} ({facts.get('run')}), not to {name} ({run.identity})"
            )
        stored = tensors | {f"{_LEARNED}{name}": tensor for name, tensor in learned.items()}
        if facts.pop("checksum", None) != _checksum(facts, stored):
            raise UserError(f"{path}: is damaged; its content is not what was written")
        try:
            session = cls(run, str(facts["client"]), facts["history"], facts["keep"], backbone, compile=compile)
            session._restore(tensors, check_int("seen", facts["seen"], 0), facts["random"])
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise UserError(f"{path}: is not a saved session ({first_line(error)})") from error
        if isinstance(session.method, Personal) and learned:
            shapes = {name: tuple(tensor.shape) for name, tensor in learned.items()}
            if shapes != session.method.state_shapes:
                raise UserError(f"{path}: its state is {shapes}, the run's is {session.method.state_shapes}")
            session.learned = learned
        return session

    def _restore(self, tensors: dict[str, Tensor], seen: int, random: dict[str, Any]) -> None:
        """Take over what `save` wrote."""
        kept = len(tensors["age"])
        if kept > min(self.history, seen) or (kept < self.history and kept != seen):
            raise UserError(f"keeps {kept} images of {seen}, with a history of {self.history}")
        own = {"state": self._state, "features": self._features}
        for name, memory in own.items():
            if tensors[name].shape != (kept, memory.shape[1]):
                raise UserError(f"{name} is {list(tensors[name].shape)}, not [{kept}, {memory.shape[1]}]")
            if not tensors[name].isfinite().all():
                raise UserError(f"{name} has numbers that are not finite")
        age = tensors["age"].numpy().astype(np.int64)
        if age.ndim != 1 or len(set(age.tolist())) < kept or not ((age > 0) & (age <= seen)).all():
            raise UserError("age does not number the images that it has seen")
        self.seen, self.kept = seen, kept
        self._rng.bit_generator.state = random
        for name, memory in own.items():
            memory[:kept] = tensors[name]
        self._age[:kept] = age
        self._real[0, :kept] = True


def _checksum(facts: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of what is saved."""
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()
