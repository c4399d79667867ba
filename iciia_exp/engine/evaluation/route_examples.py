"""Examples of routed prompts: the pictures of both models, the answer, and the tokens that decided."""

import json
import logging
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from iciia_exp.engine.evaluation.attribution import thumbnail
from iciia_exp.errors import UserError
from iciia_exp.methods.route.base import PromptRouter
from iciia_exp.methods.route.route_t2i import RouteT2I
from iciia_exp.models.backbones.text_to_image import TextToImage
from iciia_exp.seeding import generator
from iciia_exp.serving.router import Router
from iciia_exp.serving.run import Run

__all__ = ["CASES", "route_examples"]

log = logging.getLogger(__name__)

#: Who answers, and whether that is right.
CASES = ("cloud, better there", "cloud, no better", "device, as good", "device, worse")


def route_examples(run: Run, routes: pd.DataFrame, pictures: Any, examples: int, pixels: int) -> pd.DataFrame:
    """Return some test prompts of each case, drawn at random.

    Args:
        run: of a router.
        routes: of `iciia_exp.engine.evaluation.routes.routes_table`.
        pictures: the stored pictures of all prompts, [M, 2, P, H, W, 3]; None where they were thrown away.
        examples: their number.
        pixels: longer side of a picture, at most.

    Returns:
        Columns ``example``, ``case`` (`CASES`), ``cases`` (how many of the ``drawn`` prompts are such), ``drawn``,
        ``image``, ``prompt``, ``side`` (who answers), ``score``, ``superiority``, ``device_picture`` and
        ``cloud_picture`` (PNG or JPEG), ``metrics``: JSON, by metric D as measured (``label``), and of `RouteT2I` as
        ``predicted``, with the ``tokens`` that its expert took, the most important ones first.
    """
    better_N = routes["superiority"].to_numpy() < 0.5  # in the cloud
    case_N = np.where(routes["cloud"], np.where(better_N, 0, 1), np.where(better_N, 3, 2))
    drawn_N = generator("routes").permutation(len(routes))
    most = -(-examples // len(CASES))
    chosen = [row for case in range(len(CASES)) for row in drawn_N[case_N[drawn_N] == case][:most]][:examples]
    tokens = _tokens(run, [str(routes["prompt"].iloc[row]) for row in chosen])
    method = run.method
    assert isinstance(method, PromptRouter)
    rows = []
    for example, number in enumerate(chosen):
        row = routes.iloc[number]
        metrics: dict[str, Any] = {
            name: {
                "label": float(row[f"label_{name}"]),
                "predicted": float(row[f"predicted_{name}"]) if isinstance(method, RouteT2I) else None,
                "tokens": tokens[example][name] if tokens else [],
            }
            for name, weight in zip(method.metric_names, method.weight_K.tolist(), strict=True)
            if weight > 0
        }
        found = {"example": example, "case": CASES[case_N[number]], "cases": int((case_N == case_N[number]).sum())}
        found |= {"drawn": len(routes), "image": int(row["image"]), "prompt": row["prompt"]}
        found |= {"side": "cloud" if row["cloud"] else "device", "score": row["score"]}
        found |= {"superiority": row["superiority"], "metrics": json.dumps(metrics)}
        for side, name in enumerate(("device", "cloud")):
            stored = None if pictures is None else Image.fromarray(pictures[int(row["image"]), side, 0])
            found[f"{name}_picture"] = None if stored is None else thumbnail(stored, pixels)
        rows.append(found)
    return pd.DataFrame(rows)


def _tokens(run: Run, prompts: list[str]) -> list[dict[str, list[str]]]:
    """Return the tokens that decided each prompt, by metric; nothing where the router has none."""
    if not isinstance(run.method, RouteT2I) or not prompts:
        return []
    try:
        backbone = run.load_backbone()
    except UserError as error:
        log.warning("examples without tokens: %s", error)
        return []
    assert isinstance(backbone, TextToImage)
    return [route.tokens for route in Router(run.method, backbone).route_all(prompts)]
