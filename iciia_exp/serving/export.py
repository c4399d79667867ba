"""Export: a trained run as programs for other runtimes.

    python -m iciia_exp.serving.export RUN --to onnx --with-backbone --out DIR

``--to onnx`` writes .onnx files, ``--to torch`` .pt2 files of `torch.export`. The numbers of clients and of images are
free. An adaptive method has two programs, a method whose devices learn one:

- ``together``: features [C, S, D], mask [C, S] -> logits [C, S, K]. All images of a client see each other.
- ``step``: features [C, D], past [C, P, E], mask [C, P] -> logits [C, K], keep [C, E]. One more image of each client;
  the caller appends ``keep`` to the past. A past has one place at least, whose mask is false if it holds no image.
- ``classify``: features [C, D] and the clients' states -> logits [C, K]; ``states.safetensors`` has the states.

With the backbone, ``backbone`` gives features and logits of images, and ``image_step`` (or ``image_classify``) takes
images in the place of features: uint8, or with ``--images float`` floats from 0 to 1, [C, channels, H, W].

Every program is run again from its file, at other sizes than it was exported with; if its logits differ by more than
1e-4 of the largest, or an answer differs, nothing is left. ``export.json`` describes the programs, ``latency.json`` has
the time of a request (`iciia_exp.serving.latency`).

Legend: C clients, S images of a client, P images of its past, E numbers kept of one, D features, K classes.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iciia_exp.artifacts import replacing_folder, save_tensors, write_json
from iciia_exp.errors import UserError, check_choice
from iciia_exp.methods.tune.base import Personal
from iciia_exp.models.backbones.base import Backbone
from iciia_exp.output import exit_status
from iciia_exp.serving.latency import measure
from iciia_exp.serving.options import add_backbone, add_run, chosen_backbone, chosen_run
from iciia_exp.serving.programs import check_program, open_program, programs_of, write_program
from iciia_exp.serving.quantize import quantize
from iciia_exp.serving.run import Run

__all__ = ["export", "main"]

_FORMAT = 1
_FILE = "export.json"
_ENDINGS = {"onnx": ".onnx", "torch": ".pt2"}
_MADE = (_FILE, "latency.json", "clients.json", "states.safetensors", *(f"*{ending}" for ending in _ENDINGS.values()))


def known_values(run: Run, most: int = 2048) -> dict[str, Tensor]:
    """Return features of test images and states of clients, [N, ...] by name, as far as they are there."""
    found = {}
    with contextlib.suppress(UserError):
        rows = np.sort(run.partition.test.values)[:most]
        found["features"] = torch.from_numpy(np.asarray(run.features.array()[rows], dtype=np.float32))
    if isinstance(run.method, Personal) and run.method.states is not None:
        found |= run.method.states.of(torch.from_numpy(run.method.states.clients[:8]))
    return found


def export(
    run: Run,
    out: str | Path,
    to: str = "onnx",
    backbone: Backbone | None = None,
    images: str = "uint8",
    int8: bool = False,
    latency: bool = True,
) -> dict[str, Any]:
    """Write the programs of a run into a folder, check them, and return the contents of ``export.json``.

    Args:
        run: of an adaptive method, or of one whose devices learn.
        out: the folder; an earlier export there is replaced when the new one is complete.
        to: ``onnx`` or ``torch``.
        backbone: of the run (`Run.load_backbone`); None: programs on features alone.
        images: type of images, ``uint8`` or ``float``.
        int8: whether programs with weights of 8 bits are written as well, with their accuracy (ONNX).
        latency: whether the time of a request is measured (ONNX).
    """
    out, ending = Path(out), _ENDINGS[check_choice("to", to, tuple(_ENDINGS))]
    if int8 and to != "onnx":
        raise UserError("int8: is of ONNX alone; export to onnx")
    if to == "onnx":
        _require_onnx()
    programs, known = programs_of(run, backbone, images), known_values(run)
    with replacing_folder(out, _FILE, _MADE, "export") as folder:
        facts: dict[str, Any] = {
            "format": _FORMAT,
            "run": run.path.resolve().name,
            "method": run.method.name,
            "task": run.info["task"],
            "class_names": run.class_names,
            "images": run.images,
            "programs": {},
            "versions": {name: version(name) for name in ("torch", *(("onnx", "onnxruntime") if to == "onnx" else ()))},
        }
        if backbone is not None:
            facts["backbone"] = {"name": run.info["backbone"]["name"], "transform": backbone.describe_transform()}
        for program in programs:
            path = folder / f"{program.name}{ending}"
            write_program(program, path, to)
            difference = check_program(program, open_program(path, program), known)
            entry = {"file": path.name, **program.describe(), "bytes": path.stat().st_size}
            facts["programs"][program.name] = {**entry, "difference": difference}
        if int8:
            facts["int8"] = quantize(run, folder, programs)
        if isinstance(run.method, Personal):
            _write_states(run, folder)
        if latency and to == "onnx":
            write_json(folder / "latency.json", measure(run, folder, programs))
        write_json(folder / _FILE, facts)
    return facts


def _write_states(run: Run, folder: Path) -> None:
    """Write the states of the partition's clients, and the clients' names."""
    assert isinstance(run.method, Personal)
    states = run.method.states
    if states is None:
        return
    save_tensors(folder / "states.safetensors", states.of(torch.from_numpy(states.clients)))
    write_json(folder / "clients.json", {"clients": run.partition.ids[states.clients].tolist()})


def _require_onnx() -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError("onnx and onnxruntime are not installed; pip install 'iciia_exp[export]'") from error


def main(arguments: list[str] | None = None) -> int:
    """Export a run; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m iciia_exp.serving.export", description="a run as programs")
    add_run(parser)
    parser.add_argument("--to", choices=tuple(_ENDINGS), default="onnx", help="default: onnx")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: the folder export of the run")
    add_backbone(parser, "programs on images as well")
    parser.add_argument("--images", choices=("uint8", "float"), help="type of images; default: uint8")
    parser.add_argument("--int8", action="store_true", help="with weights of 8 bits as well, and their accuracy")
    parser.add_argument("--no-latency", action="store_true", help="measure no times")
    options = parser.parse_args(arguments)
    return exit_status(lambda: _export(options), failed=1)


def _export(options: argparse.Namespace) -> int:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    run = chosen_run(options)
    backbone = chosen_backbone(run, options)
    if backbone is None and options.images is not None:
        raise UserError("--images: is of programs on images; add --with-backbone")
    out, images = options.out or run.path / "export", options.images or "uint8"
    facts = export(run, out, options.to, backbone, images, options.int8, not options.no_latency)
    for name, entry in facts["programs"].items():
        inputs = ", ".join(f"{key} {_shape(value['shape'])}" for key, value in entry["inputs"].items())
        outputs = ", ".join(f"{key} {_shape(value['shape'])}" for key, value in entry["outputs"].items())
        size = f"{entry['bytes'] / 1e6:.1f} MB, differs by {entry['difference']:.1g}"
        print(f"{name}: {inputs} -> {outputs}; {size}")
    if "int8" in facts:
        sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in facts["int8"]["bytes"].items())
        print(f"with weights of 8 bits: {sizes}")
        if facts["int8"]["accuracy"] is not None:
            before, after = (100 * facts["int8"][key] for key in ("accuracy", "accuracy_int8"))
            print(f"accuracy on the run's test clients: {before:.2f} %, with weights of 8 bits {after:.2f} %")
    print(f"written to {out}")
    return 0


def _shape(axes: Sequence[str | int]) -> str:
    return f"[{', '.join(map(str, axes))}]"


if __name__ == "__main__":
    sys.exit(main())
