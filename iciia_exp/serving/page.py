"""Page: a run in the browser, as one static folder without a server.

    python -m iciia_exp.serving.page RUN --out demo

Backbone and step of the run are exported to ONNX and run by onnxruntime-web, whose files are taken from its npm package
(``npm pack``, or ``--runtime`` with the package's folder) into the folder. Open ``index.html`` and drop images or draw:
the answers of the backbone alone and of the method are shown as a client's past grows. Nothing is sent anywhere.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from iciia_exp.artifacts import replacing_folder
from iciia_exp.errors import UserError, first_line
from iciia_exp.methods.adapt.base import Adaptive
from iciia_exp.models.backbones.base import Backbone
from iciia_exp.output import exit_status
from iciia_exp.serving.export import export
from iciia_exp.serving.options import WEIGHTS_HELP, add_run, chosen_run
from iciia_exp.serving.run import Run

__all__ = ["main", "make_page"]

#: Version of onnxruntime-web that the page was tested with.
RUNTIME = "1.30.0"

_SCRIPT, _GLUE, _BINARY = "ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"
_OWN = ("index.html", "style.css", "page.js")
_MADE = (*_OWN, "ort.js", "runtime.js", "model.js")


def make_page(run: Run, out: str | Path, backbone: Backbone, runtime: str | Path | None = None) -> Path:
    """Write the page of a run into a folder, and return the folder.

    Args:
        run: of an adaptive method that keeps a state of past images.
        out: new, empty, or of an earlier page.
        backbone: of the run (`Run.load_backbone`).
        runtime: folder of the npm package onnxruntime-web; None: fetched by ``npm pack``.
    """
    out = Path(out)
    if not isinstance(run.method, Adaptive) or not run.method.state_width:
        raise UserError(f"{run.method.name}: keeps no past images; choose a method that adapts, such as iciia")
    with replacing_folder(out, "page.js", _MADE, "page of a run") as made, tempfile.TemporaryDirectory() as scratch:
        _write_runtime(Path(runtime) if runtime is not None else _packed(Path(scratch)), made)
        exported = Path(scratch) / "export"
        facts = export(run, exported, "onnx", backbone, "float", latency=False)
        shape = facts["programs"]["backbone"]["inputs"]["images"]["shape"]
        model = {
            "facts": {
                "method": run.method.name,
                "backbone": run.info["backbone"]["name"],
                "task": run.info["task"],
                "classes": run.class_names,
                "picture": shape[1:],
                "window": _window(backbone.describe_transform()),
                "features": run.method.dim,
                "state": run.method.state_width,
                "history": max(1, run.images - 1),
            },
            **{name: _base64(exported / f"{name}.onnx") for name in ("backbone", "step")},
        }
        (made / "model.js").write_text(f"const MODEL = {_as_script(model)};\n", encoding="utf-8")
        for name in _OWN:
            (made / name).write_bytes((files("iciia_exp.serving") / "demo" / name).read_bytes())
    return out


def _window(transform: Mapping[str, Any]) -> dict[str, Any]:
    """Return which part of an image the network takes.

    Args:
        transform: description by the backbone: timm's, torchvision's, or another one, which takes the whole image.

    Returns:
        ``share`` of the image's shorter side, or of both if ``squash`` is true, around its middle.
    """
    if "crop_pct" in transform:
        size = min(transform["input_size"][1:])
        share = min(1.0, size / math.floor(size / transform["crop_pct"]))
        return {"share": share, "squash": transform["crop_mode"] == "squash"}
    if "resize_size" in transform:
        return {"share": min(1.0, transform["crop_size"] / transform["resize_size"]), "squash": False}
    return {"share": 1.0, "squash": True}


def _as_script(value: object) -> str:
    """Return JSON that a script may contain, whatever the names of classes are."""
    return json.dumps(value).replace("<", "\\u003c")


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _write_runtime(package: Path, folder: Path) -> None:
    """Copy the runtime; what it would fetch is in a script, since a page without a server may fetch nothing."""
    dist = package / "dist" if (package / "dist").is_dir() else package
    if missing := [name for name in (_SCRIPT, _GLUE, _BINARY) if not (dist / name).is_file()]:
        raise UserError(f"{package}: is not the npm package onnxruntime-web ({missing[0]} is missing)")
    shutil.copyfile(dist / _SCRIPT, folder / "ort.js")
    runtime = {"mjs": _base64(dist / _GLUE), "wasm": _base64(dist / _BINARY)}
    (folder / "runtime.js").write_text(f"const RUNTIME = {_as_script(runtime)};\n", encoding="utf-8")


def _packed(scratch: Path) -> Path:
    """Return the folder of the npm package, which npm fetches."""
    hint = "give the folder of the npm package onnxruntime-web: --runtime DIR"
    if (npm := shutil.which("npm")) is None:
        raise UserError(f"npm is not installed; install it, or {hint}")
    command = [npm, "pack", f"onnxruntime-web@{RUNTIME}", "--silent", "--pack-destination", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = list(scratch.glob("onnxruntime-web-*.tgz"))
    if done.returncode or not found:
        raise UserError(f"npm cannot fetch onnxruntime-web ({first_line(done.stderr) or done.returncode}); {hint}")
    with tarfile.open(found[0]) as archive:
        archive.extractall(scratch / "npm", filter="data")
    return scratch / "npm" / "package"


def main(arguments: list[str] | None = None) -> int:
    """Write the page of a run; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m iciia_exp.serving.page", description="a run in the browser")
    add_run(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: the folder page of the run")
    parser.add_argument("--weights", type=Path, metavar="FILE", help=WEIGHTS_HELP)
    parser.add_argument("--runtime", type=Path, metavar="DIR", help="npm package onnxruntime-web; default: npm pack")
    return exit_status(lambda: _write(parser.parse_args(arguments)), failed=1)


def _write(options: argparse.Namespace) -> int:
    run = chosen_run(options)
    out = make_page(run, options.out or run.path / "page", run.load_backbone(options.weights), options.runtime)
    print(f"open {out.resolve() / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
