"""Programs: the parts of a run that are exported, written to files, opened, and compared with the run.

Legend: C clients, S images of a client, P images of its past, E numbers kept of one, D features, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iciia_exp.data.batches import ClientBatch
from iciia_exp.errors import UserError, check_choice, first_line
from iciia_exp.methods.adapt.base import Adaptive, PerImage
from iciia_exp.methods.tune.base import Personal
from iciia_exp.methods.tune.device_network import DeviceNetwork
from iciia_exp.models.backbones.base import Backbone
from iciia_exp.serving.run import Run

__all__ = ["LEAST", "Program", "check_program", "onnx_session", "open_program", "programs_of", "write_program"]

#: Largest difference of logits after export, as a share of the largest logit (or of 1).
LEAST = 1e-4

#: Numbers of clients and images with which programs are exported, and those with which they are checked.
_EXPORTED = (3, 5)
_CHECKED = ((1, 1), (2, 7), (7, 2), (1, 33))

#: Axes of inputs or outputs by name; texts are free sizes.
Axes = Mapping[str, tuple[str | int, ...]]

#: Runs a program on arrays, in the order of its inputs.
Call = Callable[..., list[np.ndarray]]


@dataclass(frozen=True)
class Program:
    """A part of a run that is exported.

    Args:
        name: of its file.
        module: what is exported.
        inputs, outputs: the axes of each, by name: texts are free sizes.
        types: of inputs that are not float32, by name.
    """

    name: str
    module: nn.Module
    inputs: Axes
    outputs: Axes
    types: Mapping[str, torch.dtype]

    def describe(self) -> dict[str, Any]:
        """Return names, types and axes as plain values."""

        def plain(sizes: Axes) -> dict[str, Any]:
            kinds = {name: str(self.types.get(name, torch.float32)).removeprefix("torch.") for name in sizes}
            return {name: {"shape": list(shape), "dtype": kinds[name]} for name, shape in sizes.items()}

        return {"inputs": plain(self.inputs), "outputs": plain(self.outputs)}

    def example(
        self, clients: int, images: int, known: Mapping[str, Tensor] | None = None, seed: int = 0
    ) -> list[Tensor]:
        """Return inputs of a size: rows of the ``known`` values [N, ...] of an input, others drawn."""
        rng, found = torch.Generator().manual_seed(seed), []
        free = {"clients": clients, "images": images, "past": images}
        for name, axes in self.inputs.items():
            shape = [free[axis] if isinstance(axis, str) else axis for axis in axes]
            kind = self.types.get(name, torch.float32)
            if known is not None and name in known:
                fixed = known[name].ndim - 1
                value = known[name][torch.randint(len(known[name]), shape[: len(shape) - fixed], generator=rng)]
            elif kind == torch.bool:
                value = torch.rand(shape, generator=rng) < 0.8
                value[..., -1] = True  # every client has an image
            elif kind == torch.uint8:
                value = torch.randint(256, shape, generator=rng, dtype=kind)
            elif name == "images":
                value = torch.rand(shape, generator=rng)
            else:
                value = torch.randn(shape, generator=rng)
            found.append(value)
        return found


class _Together(nn.Module):
    def __init__(self, method: Adaptive) -> None:
        super().__init__()
        self.method = method

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        return self.method(features, mask)


class _Step(nn.Module):
    def __init__(self, method: Adaptive) -> None:
        super().__init__()
        self.method = method

    def forward(self, features: Tensor, past: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.method.step(features, past, mask)


class _Alone(nn.Module):
    """A method that classifies every image by itself."""

    def __init__(self, method: Adaptive) -> None:
        super().__init__()
        self.method = method

    def forward(self, features: Tensor) -> Tensor:
        return self.method(features.unsqueeze(1)).squeeze(1)


class _Classify(nn.Module):
    def __init__(self, method: Personal, arrays: Sequence[str]) -> None:
        super().__init__()
        self.method, self.arrays, self.states = method, tuple(arrays), tuple(method.state_shapes)

    def forward(self, features: Tensor, *more: Tensor) -> Tensor:
        arrays, states = more[: len(self.arrays)], more[len(self.arrays) :]
        mask_CS = torch.ones_like(features[:, :1], dtype=torch.bool)
        number_C = torch.zeros_like(features[:, 0], dtype=torch.int64)
        given = {name: array.unsqueeze(1) for name, array in zip(self.arrays, arrays, strict=True)}
        batch = ClientBatch(features.unsqueeze(1), number_C.unsqueeze(1), mask_CS, number_C, arrays=given)
        return self.method.classify(batch, dict(zip(self.states, states, strict=True))).squeeze(1)


class _OnDevice(_Classify):
    """The network of one client, on its images."""

    method: DeviceNetwork

    def __init__(self, method: DeviceNetwork, arrays: Sequence[str]) -> None:
        super().__init__(method, arrays)
        self.net = [method.empty_network()]  # in a list: its parameters are inputs

    def forward(self, features: Tensor, *more: Tensor) -> Tensor:
        arrays, states = more[: len(self.arrays)], more[len(self.arrays) :]
        mask_1S, number_1 = torch.ones_like(features[None, :, 0], dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
        given = {name: array.unsqueeze(0) for name, array in zip(self.arrays, arrays, strict=True)}
        batch = ClientBatch(features.unsqueeze(0), mask_1S.long(), mask_1S, number_1, arrays=given)
        own = {name: state.unsqueeze(0) for name, state in zip(self.states, states, strict=True)}
        return self.method.classify_one(self.net[0], batch, own).squeeze(0)


class _Backbone(nn.Module):
    def __init__(self, backbone: Backbone, wanted: Sequence[str]) -> None:
        super().__init__()
        self.backbone, self.wanted = backbone, frozenset(wanted)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        pixels = images / 255 if images.dtype == torch.uint8 else images
        found = self.backbone.outputs(self.backbone.from_pixels(pixels), self.wanted | {"features"})
        logits = self.backbone.head(found["features"])
        return found["features"], logits, *(found[name] for name in sorted(self.wanted - {"features"}))


class _Images(nn.Module):
    """A program on features, behind the backbone."""

    def __init__(self, backbone: _Backbone, then: nn.Module) -> None:
        super().__init__()
        self.backbone, self.then = backbone, then

    def forward(self, images: Tensor, *more: Tensor) -> Any:
        features, _, *arrays = self.backbone(images)
        return self.then(features, *arrays, *more)


def programs_of(run: Run, backbone: Backbone | None = None, images: str = "uint8") -> list[Program]:
    """Return the programs of a run.

    Args:
        run: of an adaptive method, or of one whose devices learn.
        backbone: of the run, if images are to be inputs.
        images: type of images, ``uint8`` or ``float``.
    """
    method, dim, classes = run.method, run.head.in_features, run.head.out_features
    bools: dict[str, torch.dtype] = {"mask": torch.bool}
    one: tuple[str | int, ...] = ("clients", dim)
    logits: Axes = {"logits": ("clients", classes)}
    extra: list[str] = sorted(method.reads - {"features"})
    if isinstance(method, PerImage):
        found = [Program("classify", _Alone(method), {"features": one}, logits, {})]
    elif isinstance(method, Adaptive):
        width = method.state_width
        sequence: Axes = {"mask": ("clients", "images")}
        past: Axes = {"past": ("clients", "past", width), "mask": ("clients", "past")}
        found = [
            Program("step", _Step(method), {"features": one, **past}, {**logits, "keep": ("clients", width)}, bools),
            Program(
                "together",
                _Together(method),
                {"features": ("clients", "images", dim), **sequence},
                {"logits": ("clients", "images", classes)},
                bools,
            ),
        ]
    elif isinstance(method, Personal):
        states: Axes = dict(method.state_shapes)
        module = _Classify(method, extra)
        if isinstance(method, DeviceNetwork):  # of one client: each has a network of its own
            one, logits, module = ("images", dim), {"logits": ("images", classes)}, _OnDevice(method, extra)
        else:
            states = {name: ("clients", *shape) for name, shape in states.items()}
        arrays: Axes = {name: (one[0], *run.info["arrays"][name]) for name in extra}
        found = [Program("classify", module, {"features": one, **arrays, **states}, logits, {})]
    else:
        raise UserError(f"{method.name}: cannot be exported; methods that adapt or whose devices learn can")
    if backbone is None:
        return found
    pixels = {"uint8": torch.uint8, "float": torch.float32}[check_choice("images", images, ("uint8", "float"))]
    many = one[0]
    pictures: Axes = {"images": (many, *_picture_shape(backbone))}
    types = {"images": pixels} if pixels == torch.uint8 else {}
    network = _Backbone(backbone, extra)
    outputs = {"features": one, **logits, **{name: (many, *run.info["arrays"][name]) for name in extra}}
    first = found[0]
    others = {name: axes for name, axes in first.inputs.items() if name not in ("features", *extra)}
    behind = Program(
        f"image_{first.name}",
        _Images(network, first.module),
        {**pictures, **others},
        first.outputs,
        {**types, **first.types},
    )
    return [*found, Program("backbone", network, pictures, outputs, types), behind]


def _picture_shape(backbone: Backbone) -> tuple[int, ...]:
    """Return channels, height and width of the network's input."""
    for image in (np.zeros((64, 64, 3), np.uint8), np.zeros((1, 28, 28), np.float32)):
        try:
            shape = tuple(backbone.transform(image).shape)
            backbone.from_pixels(torch.zeros(1, *shape))
        except (UserError, ValueError, TypeError, AttributeError):
            continue
        return shape
    raise UserError(f"{type(backbone).__name__}: takes no pictures; export without the backbone")


def exported(program: Program) -> torch.export.ExportedProgram:
    """Return a program as `torch.export` records it, with free numbers of clients and images."""
    free = {name: torch.export.Dim(name, min=1, max=1 << 20) for name in ("clients", "images", "past")}
    sizes = [{i: free[a] for i, a in enumerate(axes) if isinstance(a, str)} for axes in program.inputs.values()]
    variadic = isinstance(program.module, _Classify | _Images)
    dynamic = (sizes[0], tuple(sizes[1:])) if variadic else tuple(sizes)
    example = tuple(t.clone() for t in program.example(*_EXPORTED))
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(program.module.eval(), example, dynamic_shapes=dynamic)


def write_program(program: Program, path: Path, to: str) -> None:
    """Write a program to a file; raises a `UserError` if it cannot be exported."""
    try:
        recorded = exported(program)
        if to == "torch":
            torch.export.save(recorded, path)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = torch.onnx.export(
                recorded,
                input_names=list(program.inputs),
                output_names=list(program.outputs),
                dynamo=True,
                verbose=False,
            )
            assert made is not None
            import onnx_ir

            graph = made.model.graph
            for values, named in ((graph.inputs, program.inputs), (graph.outputs, program.outputs)):
                for value, axes in zip(values, named.values(), strict=True):
                    value.shape = onnx_ir.Shape(axes)  # the exporter's names are s0, s1
            made.save(path)
    except Exception as error:  # exporters raise many kinds
        raise UserError(f"{program.name}: cannot be exported to {to} ({first_line(error)})") from error


def onnx_session(path: Path, threads: int = 0) -> Any:
    """Return onnxruntime's session of a file on the CPU; ``threads=0`` is one a core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def open_program(path: Path, program: Program) -> Call:
    """Return the program of a file."""
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()

        def call(*arrays: np.ndarray) -> list[np.ndarray]:
            with torch.no_grad():
                found = module(*(torch.from_numpy(array) for array in arrays))
            return [t.numpy() for t in (found if isinstance(found, tuple | list) else [found])]

        return call
    session = onnx_session(path)
    return lambda *arrays: session.run(None, dict(zip(program.inputs, arrays, strict=True)))


def check_program(program: Program, call: Call, known: Mapping[str, Tensor]) -> float:
    """Return the largest difference from the run's own numbers, as a share; a `UserError` if it is too large.

    ``known`` are values of inputs, [N, ...] by name: what looks like features and states. Others are drawn.
    """
    largest = 0.0
    for clients, images in _CHECKED:
        given = program.example(clients, images, known, seed=images)
        with torch.no_grad():
            wanted = program.module(*(t.clone() for t in given))
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        size = f"{clients} clients, {images} images"
        try:
            found = call(*(t.numpy() for t in given))
        except Exception as error:
            raise UserError(f"{program.name}: does not run with {size} ({first_line(error)})") from error
        for name, one, other in zip(program.outputs, wanted, found, strict=True):
            if "mask" in program.inputs and other.ndim == 3:  # padding has no answer
                real = given[list(program.inputs).index("mask")].numpy()
                one, other = one[torch.from_numpy(real)], other[real]
            one = one.numpy()
            difference = float(np.abs(one - other).max() / max(1.0, np.abs(one).max()))
            if not difference <= LEAST:
                raise UserError(f"{program.name}: {name} differ by {difference:.2g} of the largest with {size}")
            if name == "logits" and (one.argmax(-1) != other.argmax(-1)).any():
                raise UserError(f"{program.name}: an answer differs with {size}")
            largest = max(largest, difference)
    return largest
