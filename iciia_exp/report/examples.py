"""Stored attribution examples (`iciia_exp.engine.evaluation.attribution`) in the form that the page shows them."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pandas as pd

from iciia_exp.results.tables import read_table

__all__ = ["examples_of"]


def examples_of(folder: Path) -> list[dict[str, Any]] | None:
    """Return a run's examples, each with its target and the images that count most; None where it kept none."""
    if (table := read_table(folder / "attribution.parquet")) is None:
        return None
    examples = []
    for _, rows in table.groupby("example"):
        target, others = rows[rows["rank"] == 0].iloc[0], rows[rows["rank"] > 0].sort_values("rank")
        examples.append(
            {
                **{key: str(target[key]) for key in ("case", "client", "truth")},
                **{key: int(target[key]) for key in ("cases", "drawn")},
                "before": [str(target["backbone_prediction"]), _percent(target["backbone_confidence"])],
                "after": [str(target["method_prediction"]), _percent(target["method_confidence"])],
                "picture": _data_url(target["thumbnail"]),
                "others": [
                    {
                        "truth": str(other["truth"]),
                        "weight": None if pd.isna(other["weight"]) else _percent(other["weight"]),
                        "influence": round(float(other["influence"]), 4),
                        "picture": _data_url(other["thumbnail"]),
                    }
                    for _, other in others.iterrows()
                ],
            }
        )
    return examples


def _percent(share: float) -> float:
    return round(100 * float(share), 1)


def _data_url(picture: bytes | None) -> str | None:
    if not isinstance(picture, bytes):
        return None
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
