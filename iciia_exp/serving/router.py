"""Router: who answers a prompt, from a run's directory.

>>> router = Router.load("outputs/route_t2i/route_t2i-0123456789ab")  # doctest: +SKIP
>>> router.route("a red bus in front of a blue house").side           # doctest: +SKIP
'cloud'

``python -m iciia_exp.serving.router RUN PROMPTS`` routes the prompts of a file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from iciia_exp.artifacts import atomic_write
from iciia_exp.config.stored import Plugins
from iciia_exp.data.datasets.prompts import read_prompts
from iciia_exp.data.prompts import as_bytes
from iciia_exp.errors import UserError, check_float
from iciia_exp.methods.route.base import PromptRouter
from iciia_exp.methods.route.policy import Interval
from iciia_exp.methods.route.route_t2i import RouteT2I
from iciia_exp.models.backbones.text_to_image import TextToImage
from iciia_exp.output import exit_status
from iciia_exp.serving.options import add_run, chosen_run
from iciia_exp.serving.run import Run

__all__ = ["Route", "Router", "main"]

_AT_ONCE = 64  # prompts


class Route(NamedTuple):
    """Who answers a prompt."""

    prompt: str
    side: str  # device or cloud
    score: float  # predicted PRS: below 1/2, the cloud's answer is expected to be better
    threshold: float  # the cloud answers below it
    metrics: dict[str, float]  # predicted D by metric, where the router predicts them
    tokens: dict[str, list[str]]  # by metric the tokens that decided, the most important ones first


class Router:
    """A trained router with its text encoder.

    Args:
        method: the router.
        backbone: the pair that it was trained for; only its text encoder is used.
    """

    def __init__(self, method: PromptRouter, backbone: TextToImage) -> None:
        self.method, self.backbone = method, backbone.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: str | Path, plugins: Plugins = (), cache_dir: str | Path | None = None) -> Router:
        """Load a router from a run's directory; arguments and errors as of `Run.load`."""
        return cls.of(Run.load(path, plugins, cache_dir))

    @classmethod
    def of(cls, run: Run) -> Router:
        """Return the router of a run; raises a `UserError` if its method routes no prompts."""
        if not isinstance(run.method, PromptRouter):
            raise UserError(f"{run.path}: {run.method.name} routes no prompts; give a run of method=route_t2i, say")
        backbone = run.load_backbone()
        assert isinstance(backbone, TextToImage)
        return cls(run.method, backbone)

    def interval(self, share: float | None = None) -> Interval:
        """Return the expected share of new prompts in the cloud, with its 95 % interval."""
        return self.method.interval(share)

    def route(self, prompt: str, share: float | None = None) -> Route:
        """Return who answers a prompt.

        Args:
            prompt: not empty.
            share: largest share of prompts in the cloud; None: that of the run.
        """
        return self.route_all([prompt], share)[0]

    @torch.inference_mode()
    def route_all(self, prompts: Iterable[str], share: float | None = None) -> list[Route]:
        """Return who answers each of some prompts; arguments as of `route`."""
        prompts = list(prompts)
        if empty := [number for number, prompt in enumerate(prompts, 1) if not str(prompt).strip()]:
            raise UserError(f"prompt {empty[0]}: is empty")
        share = None if share is None else check_float("share", share, 0.0, 1.0)
        threshold = self.method.threshold(share)
        found: list[Route] = []
        for at in range(0, len(prompts), _AT_ONCE):
            found += self._some(prompts[at : at + _AT_ONCE], threshold)
        return found

    def _some(self, prompts: Sequence[str], threshold: float) -> list[Route]:
        tokens = self.backbone.encode(prompts)
        given = torch.stack([as_bytes(prompt) for prompt in prompts])
        scores = self.method.score_prompts(given.float(), tokens).double().tolist()
        metrics: list[dict[str, float]] = [{} for _ in prompts]
        decided: list[dict[str, list[str]]] = [{} for _ in prompts]
        if isinstance(self.method, RouteT2I):
            routing = self.method.explain(tokens)
            names = self.method.metric_names
            metrics = [dict(zip(names, row, strict=True)) for row in routing.logits_Bk.sigmoid().tolist()]
            weight_Bkn = (routing.affinity_Bnk.transpose(1, 2) * routing.selected_Bkn).cpu()
            for number, prompt in enumerate(prompts):
                words = self.backbone.words(prompt)
                for name, weight_n in zip(names, weight_Bkn[number], strict=True):
                    order = weight_n.argsort(descending=True, stable=True)[: int((weight_n > 0).sum())].tolist()
                    decided[number][name] = [words[place] for place in order if place < len(words)]
        return [
            Route(prompt, "cloud" if score < threshold else "device", score, threshold, metrics[i], decided[i])
            for i, (prompt, score) in enumerate(zip(prompts, scores, strict=True))
        ]


def main(arguments: list[str] | None = None) -> int:
    """Route the prompts of a file; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m iciia_exp.serving.router", description="who answers which prompt")
    add_run(parser)
    parser.add_argument("prompts", type=Path, metavar="PROMPTS", help="text file with a prompt a line, or a table")
    parser.add_argument("--share", type=float, help="largest share of prompts in the cloud; default: that of the run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a CSV file, and not to the terminal")
    options = parser.parse_args(arguments)
    return exit_status(lambda: _route_file(options), failed=1)


def _route_file(options: argparse.Namespace) -> int:
    router = Router.of(chosen_run(options))
    prompts = read_prompts(options.prompts)["prompt"].tolist()
    routes = router.route_all(prompts, options.share)
    rows: list[dict[str, Any]] = [{"prompt": r.prompt, "side": r.side, "score": r.score, **r.metrics} for r in routes]
    text = pd.DataFrame(rows).to_csv(index=False, float_format="%.4f")
    if options.out is None:
        print(text, end="")
    else:
        with atomic_write(options.out) as file:
            file.write(text)
    cloud, interval = sum(r.side == "cloud" for r in routes), router.interval(options.share)
    expected = f"{100 * interval.expected:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}] expected"
    print(f"{cloud:,} of {len(routes):,} prompts go to the cloud; {expected}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
