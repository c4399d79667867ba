"""Hub: a trained run as a model repository, with huggingface_hub's conventions.

    run.save_pretrained("folder")                    # config.json, model.safetensors, README.md, results.json
    run.push_to_hub("user/name")
    run = Run.from_pretrained("user/name")           # or the folder

``python -m iciia_exp.serving.hub RUN --out DIR`` or ``--push user/name`` does the same. Nothing of a client is written:
no features, no names, and no states of methods whose devices learn. Loading runs no code of the repository.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from iciia_exp.artifacts import atomic_write, read_json, replacing_folder, save_tensors, write_json
from iciia_exp.errors import UserError, first_line
from iciia_exp.methods.adapt.base import Adaptive, PerImage
from iciia_exp.methods.cotrain.base import CoTrained
from iciia_exp.methods.tune.base import Personal
from iciia_exp.output import exit_status
from iciia_exp.serving.options import add_backbone, add_run, chosen_backbone, chosen_run
from iciia_exp.serving.run_info import checked_info
from iciia_exp.tasks import MULTI_LABEL, SINGLE_LABEL

if TYPE_CHECKING:
    from iciia_exp.models.backbones.base import Backbone
    from iciia_exp.serving.run import Run

__all__ = ["BACKBONE", "CONFIG", "WEIGHTS", "download", "main", "push_to_hub", "save_pretrained"]

#: Names of the files of a repository.
CONFIG, WEIGHTS, BACKBONE, CARD, RESULTS = (
    *("config.json", "model.safetensors", "backbone.safetensors", "README.md", "results.json"),
)
_FILES = [CONFIG, WEIGHTS, BACKBONE, RESULTS]

#: Keys of ``results.json`` that say how, and not where, it was made.
_NOT_SHOWN = ("git_revision", "finished", "config.data_dir", "config.output_dir", "config.cache_dir")


def save_pretrained(
    run: Run, folder: str | Path, backbone: Backbone | None = None, license: str | None = None, name: str | None = None
) -> Path:
    """Write a run as a repository into a folder, and return it.

    Args:
        run: the run.
        folder: new, empty, or of an earlier call.
        backbone: whose weights are written as well, for images.
        license: of the weights, by its identifier on the hub; None: the card names none.
        name: of the repository, for the card.
    """
    folder = Path(folder)
    if run.info["task"] not in (SINGLE_LABEL, MULTI_LABEL):
        raise UserError(f"{run.method.name}: is not published; methods that classify images are")
    if isinstance(run.method, Personal) and not run.method.learns_alone:
        problem = "is not published; its devices learn with samples of other clients, which no repository has"
        raise UserError(f"{run.method.name}: {problem}")
    if (folder / CONFIG).is_file():  # models of other libraries have such a file, too
        checked_info(read_json(folder / CONFIG), folder / CONFIG)
    with replacing_folder(folder, CONFIG, (*_FILES, CARD), "repository of a run") as made:
        write_json(made / CONFIG, run.info)
        save_tensors(made / WEIGHTS, run.tensors)
        if backbone is not None:
            save_tensors(made / BACKBONE, backbone.state_dict())
        row = _shown_results(run)
        if row:
            write_json(made / RESULTS, row)
        with atomic_write(made / CARD) as file:
            file.write(model_card(run, row, name or folder.name, license, backbone is not None))
    return folder


def _shown_results(run: Run) -> dict[str, Any]:
    """Return the run's results without paths and times of the machine; empty if it was not evaluated."""
    if run.evaluation is None:
        return {}
    return {key: value for key, value in run.results.items() if key not in _NOT_SHOWN}


def push_to_hub(
    run: Run, repo_id: str, backbone: Backbone | None = None, license: str | None = None, **options: Any
) -> str:
    """Upload a run to a repository of the hub, which is made if need be; return its address.

    Args:
        run: the run.
        repo_id: ``user/name``.
        backbone, license: as of `save_pretrained`.
        options: of `huggingface_hub.HfApi`: ``token``, ``endpoint``; ``private``, ``revision``, ``commit_message``.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=options.pop("endpoint", None), token=options.pop("token", None))
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(run, Path(folder) / "repository", backbone, license, repo_id.rpartition("/")[2])
        try:
            repo = api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True)
            given = {"commit_message": f"{run.method.name} of {run.path.resolve().name}"} | options
            api.upload_folder(repo_id=repo.repo_id, folder_path=f"{folder}/repository", **given)
        except Exception as error:  # of the hub, and of the library that it sends with
            raise UserError(f"{repo_id}: cannot be pushed ({first_line(error)})") from error
    return str(repo)


def download(name: str, revision: str | None = None, **options: Any) -> Path:
    """Return the folder of a repository: a local one, or that of the hub's cache.

    Args:
        name: path of a folder, or ``user/name``.
        revision: branch, tag or commit.
        options: of `huggingface_hub.snapshot_download`: ``token``, ``cache_dir``, ``local_files_only``, ``endpoint``.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES, **options))
    except HFValidationError as error:
        raise UserError(f"{name}: no such folder, and not the name of a repository, user/name") from error
    except Exception as error:  # of the hub, and of the library that it reads with
        raise UserError(f"{name}: no such folder, and cannot be downloaded ({first_line(error)})") from error


def model_card(run: Run, row: dict[str, Any], name: str, license: str | None, backbone: bool) -> str:
    """Return the README of a repository: the hub's metadata, then what was trained, on what, and how good it is."""
    method = run.method.name
    header: dict[str, Any] = {
        "library_name": "iciia_exp",
        **({} if license is None else {"license": license}),
        "pipeline_tag": "image-classification",
        "tags": ["client-adaptation", "test-time-adaptation", method, run.info["task"]],
    }
    if row:
        header["metrics"] = ["accuracy"]
        task = {"type": "image-classification", "name": "client-adaptive image classification"}
        metrics = [
            {"type": "accuracy", "value": round(100 * row["accuracy"], 2), "name": "accuracy over test images"},
            {"type": "gain", "value": round(100 * row["gain"], 2), "name": "gain over the backbone alone"},
        ]
        of = {"type": "other", "name": row["dataset"], "split": "test"}  # the type would be a dataset of the hub
        header["model-index"] = [{"name": name, "results": [{"task": task, "dataset": of, "metrics": metrics}]}]
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n# {name}\n",
        _summary(run, method),
        *([_results(row), _cost(row)] if row else ["The run was not evaluated.\n"]),
        _usage(run, name, backbone),
    ]
    return "\n".join(parts)


def _summary(run: Run, method: str) -> str:
    stored = run.info["backbone"]
    on = "precomputed features" if stored is None else f"features of `{stored['name']}`"
    classes = ", ".join(run.class_names[:10]) + (", ..." if len(run.class_names) > 10 else "")
    text = f"`{method}` on {on} (D = {run.head.in_features}), {len(run.class_names)} classes: {classes}.\n"
    if isinstance(run.method, Personal):
        how = "A client's device learns a state from its own labelled images; none is in this repository."
    elif isinstance(run.method, CoTrained):
        how = "Cloud and devices trained it together, in rounds. Every image is classified by itself."
    elif isinstance(run.method, PerImage):
        how = "Every image is classified by itself. No client trains anything."
    else:
        how = "An image is classified together with other unlabelled images of its client. No client trains anything."
    return f"{text}\n{how}\n"


def _results(row: dict[str, Any]) -> str:
    def percent(key: str) -> str:
        value = row.get(key)
        return "" if value is None else f"{100 * value:.1f}"

    def interval(key: str) -> str:
        low, high = percent(f"{key}_low"), percent(f"{key}_high")
        return f" [{low}, {high}]" if low else ""

    lines = [
        "## Results\n",
        f"Dataset `{row['dataset']}`: {row['test_clients']:,} test clients with {row['test_images']:,} images, "
        f"{row['images']} images of a client together. Intervals are over clients, 95 %.\n",
        "| | backbone alone | with this model |",
        "|---|---|---|",
        f"| accuracy | {percent('backbone_accuracy')} | {percent('accuracy')}{interval('accuracy')} |",
        f"| mean over clients | {percent('backbone_client_accuracy')} | {percent('client_accuracy')} |",
        f"| worst tenth of the clients | {percent('backbone_worst_decile')} | {percent('worst_decile')} |",
        f"| log-loss | {row['backbone_log_loss']:.3f} | {row['log_loss']:.3f} |",
        f"\nGain {percent('gain')} points{interval('gain')}; "
        f"{percent('harmed_share')} % of the clients are worse off than with the backbone alone "
        f"({percent('harmed_share_by_chance')} % by chance).\n",
    ]
    if row.get("oracle"):
        lines.append("This is an oracle: it is told what no client knows.\n")
    return "\n".join(lines)


def _cost(row: dict[str, Any]) -> str:
    backbone, one_more = row.get("backbone_macs"), row.get("streaming_macs")
    lines = ["## Cost\n", "| | |", "|---|---|"]
    if backbone:
        lines.append(f"| backbone | {backbone:,} multiply-accumulates an image |")
    if one_more is not None:
        share = f" ({100 * one_more / backbone:.2f} % of the backbone)" if backbone else ""
        lines.append(f"| one more image, with the state of the others kept | {one_more:,}{share} |")
    if (together := row["sequence_macs"]) is not None:
        share = f" ({row['per_image_overhead_percent']:.2f} % of the backbone's for them)" if backbone else ""
        lines.append(f"| {row['cost_images']} images together | {together:,}{share} |")
    lines.append(f"| parameters beside the backbone | {row['parameters']:,} |")
    lines.append(f"| state of a client | {row['state_bytes']:,} bytes |")
    for key, what in (("client_down_bytes", "down to a client, once"), ("request_up_bytes", "up, with every request")):
        if row.get(key) is not None:
            lines.append(f"| {what} | {row[key]:,} bytes |")
    lines.append(f"| leaves the device | {row['leaves_device']} |")
    return "\n".join(lines) + "\n"


def _usage(run: Run, name: str, backbone: bool) -> str:
    dim, session = run.head.in_features, isinstance(run.method, Personal | Adaptive)
    arrays = {key: sizes for key, sizes in run.info.get("arrays", {}).items() if key in run.method.reads}
    of_one = [f"features [{dim}]", *(f"{key} {list(sizes)}" for key, sizes in arrays.items())]
    of_n = ", ".join(text.replace("[", "[n, ") for text in of_one)
    given = ", backbone=run.load_backbone()" if backbone else ""

    def call(first: str, values: bool = True) -> str:
        entries = ", ".join(f'"{key}": {key if values else "..."}' for key in arrays)
        return f"({first}, arrays={{{entries}}})" if entries else f"({first})"

    lines = ["## Use\n", "```python", f"from iciia_exp import {'ClientSession, ' if session else ''}Run\n"]
    lines.append(f'run = Run.from_pretrained("{name}")  # user/{name}, or a folder')
    answer = "probabilities over run.class_names"
    if session:
        client = "new" if isinstance(run.method, Personal) else "kitchen"
        lines.append(f'session = ClientSession(run, client="{client}"{given})')
    if isinstance(run.method, Personal):
        lines.append(f"session.learn{call('features, labels')}  # {of_n}, labels [n]")
    if not session:
        lines.append(f"run.predict{call('...', False)}  # {of_n}; {answer}")
    elif backbone:
        lines.append(f"session.predict(...)  # a PIL image; {answer}")
    else:
        lines.append(f"session.predict{call('...', False)}  # {', '.join(of_one)}; {answer}")
    return "\n".join([*lines, "```", ""])


def main(arguments: list[str] | None = None) -> int:
    """Write or push a repository; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m iciia_exp.serving.hub", description="a run as a repository")
    add_run(parser)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="DIR", help="write it into a folder")
    where.add_argument("--push", metavar="USER/NAME", help="upload it to the hub")
    add_backbone(parser, "with the backbone's weights, for images")
    parser.add_argument("--license", help="of the weights, by its identifier on the hub (apache-2.0); default: none")
    parser.add_argument("--private", action="store_true", help="the new repository is private")
    return exit_status(lambda: _publish(parser.parse_args(arguments)), failed=1)


def _publish(options: argparse.Namespace) -> int:
    run = chosen_run(options)
    backbone = chosen_backbone(run, options)
    if options.out is not None:
        print(f"written to {save_pretrained(run, options.out, backbone, options.license)}")
    else:
        token = os.environ.get("HF_TOKEN")
        print(push_to_hub(run, options.push, backbone, options.license, token=token, private=options.private))
    return 0


if __name__ == "__main__":
    sys.exit(main())
