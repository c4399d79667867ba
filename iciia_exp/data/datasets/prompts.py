"""Prompts for text-to-image models, of a text file or a table."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iciia_exp.data.content import Content
from iciia_exp.data.dataset import ImageDataset, MissingFiles, table_digest
from iciia_exp.data.readers.files import few, read_text
from iciia_exp.data.readers.metadata import check_columns, check_shares, read_metadata, split_names
from iciia_exp.errors import ConfigError, UserError, check_bool, check_int
from iciia_exp.seeding import generator
from iciia_exp.tasks import QUALITY

__all__ = ["ALIGNMENT", "PAIRS", "Prompts", "read_prompts"]

log = logging.getLogger(__name__)

#: The ten metrics of RouteT2I by a good and a bad text. Only the first pair is published; the others are ours.
PAIRS: Mapping[str, tuple[str, str]] = {
    "definition": ("High definition photo", "Low definition photo"),
    "detail": ("Photo rich in detail", "Photo without detail"),
    "clarity": ("Clear photo", "Hazy photo"),
    "sharpness": ("Sharp photo", "Blurry photo"),
    "harmony": ("Harmonious photo", "Discordant photo"),
    "realism": ("Realistic photo", "Unrealistic photo"),
    "color": ("Colorful photo", "Dull photo"),
    "consistency": ("Photo whose parts fit together", "Photo whose parts contradict each other"),
    "layout": ("Well composed photo", "Badly composed photo"),
    "integrity": ("Photo of complete objects", "Photo of broken objects"),
}
#: The metric that looks at the prompt.
ALIGNMENT = "alignment"


class Prompts(ImageDataset):
    """Prompts of a file, each once; empty lines are left out.

    A text file has one prompt a line. A table has the column ``prompt``, and may have ``owner`` (a client, a category),
    ``parent`` and ``split``; without the last, prompts are dealt to the splits at random.

    Args:
        root: the file.
        columns: names of the columns in the file, by ours: ``{prompt: Caption, owner: Category}``.
        shares: of the prompts for training a router, for its threshold (val), and for testing.
        metrics: good and bad text of every metric; None: `PAIRS`.
        alignment: whether the similarity of picture and prompt is a further metric.
        seed: of the splits.
    """

    name = "prompts"
    task = QUALITY
    cosmetic = frozenset({"root"})
    has_backbone_images = False

    def __init__(
        self,
        root: str | Path | None,
        columns: Mapping[str, str] | None = None,
        shares: Mapping[str, float] = {"train": 0.5, "val": 0.2, "test": 0.3},
        metrics: Mapping[str, tuple[str, str]] | None = None,
        alignment: bool = False,
        seed: int = 0,
    ) -> None:
        hint = "give a text file with a prompt a line, or a table (CSV, TSV) with a column prompt"
        if root is None:
            raise MissingFiles("root", "null", hint)
        self.file = Path(root).expanduser()
        if not self.file.is_file():
            raise MissingFiles(
                "root", root, f"{'is not a file' if self.file.exists() else 'there is no such file'}; {hint}"
            )
        self.columns = check_columns(columns, ("prompt", "owner", "parent", "split"))
        self.shares, self.seed = check_shares(shares), check_int("seed", seed, 0)
        if "backbone" in self.shares or "val" not in self.shares:
            raise ConfigError("shares", dict(shares), "must be of train, val (for the threshold) and test")
        self.pairs = {name: tuple(texts) for name, texts in (PAIRS if metrics is None else metrics).items()}
        for name, texts in self.pairs.items():
            if len(texts) != 2 or not all(isinstance(text, str) and text.strip() for text in texts):
                raise ConfigError(f"metrics.{name}", list(texts), "must be two texts: of a good and of a bad picture")
        self.alignment = check_bool("alignment", alignment)
        if not self.class_names:
            raise ConfigError("metrics", {}, "must have at least one; null is the ten of the paper")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return (*self.pairs, *((ALIGNMENT,) if self.alignment else ()))

    def backbone_arguments(self) -> dict[str, Any]:
        """Return the texts of the metrics, and whether alignment is one."""
        return {"pairs": {name: list(texts) for name, texts in self.pairs.items()}, "alignment": self.alignment}

    def load_table(self) -> pd.DataFrame:
        """Return the prompts (``path``, their name), splits, owners and parents."""
        found = read_prompts(self.file, self.columns)
        table = pd.DataFrame(
            {"label": 0, "owner": None, "parent": None, "path": found["prompt"].to_numpy(dtype=object)}
        )
        for name in ("owner", "parent"):
            if name in found:
                table[name] = found[name].to_numpy(dtype=object)
        table["owner"] = table["owner"].where(table["owner"].notna(), "all")
        table["split"] = split_names(found["split"], self.file) if "split" in found else self._dealt(len(found))
        if lacking := [split for split in ("train", "val", "test") if split not in set(table["split"])]:
            raise UserError(f"{self.file}: no prompts for {' and '.join(lacking)}, of {len(found):,} in all")
        return table

    def _dealt(self, prompts: int) -> np.ndarray:
        """Return a random split of every prompt, in the shares of the splits."""
        ends = np.round(np.cumsum(list(self.shares.values())) * prompts).astype(int)
        splits = np.repeat(np.array(list(self.shares), dtype=object), np.diff(ends, prepend=0))
        return generator("prompts", self.seed).permutation(splits)

    def __getitem__(self, index: int) -> str:
        """Return a prompt."""
        return self.path(index)

    def fingerprint(self) -> list[Any]:
        """Return a digest of the table, and the metrics."""
        return [table_digest(self.table), self.backbone_arguments()]

    def content(self, kept: Content) -> None:
        """Return nothing: the table has all that is read of the file."""


def read_prompts(file: Path, columns: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Return the prompts of a text file or a table, each once, and its other columns; raises a `UserError` without any.

    Args:
        file: with a prompt a line if it ends in ``.txt``, else with a column ``prompt``.
        columns: from `iciia_exp.data.readers.metadata.check_columns`.
    """
    if file.suffix.lower() in (".txt", ""):
        if columns:
            raise ConfigError("columns", dict(columns), f"{file} has no columns: it is read line by line")
        found = pd.DataFrame({"prompt": [line.strip() for line in read_text(file).splitlines()]}, dtype=object)
        found = found[found["prompt"] != ""]
    else:
        found = read_metadata(file, ("prompt",), columns or {})
    if (again := found["prompt"].duplicated()).any():
        log.warning(
            "%s: %s prompts are there twice and count once (%s)", file, f"{again.sum():,}", few(found["prompt"][again])
        )
    found = found[~again].reset_index(drop=True)
    if found.empty:
        raise UserError(f"{file}: has no prompts")
    return found
