"""Dataset facts: class names, fingerprint and the like, cached so that later stages run without the dataset's files."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from iciia_exp.artifacts import read_json, write_json
from iciia_exp.config.experiment import Experiment
from iciia_exp.data.content import Content
from iciia_exp.data.dataset import ImageDataset, MissingFiles
from iciia_exp.digest import digest
from iciia_exp.engine.terminal import progress_bar
from iciia_exp.errors import ConfigError, UserError

__all__ = ["DatasetFacts"]

log = logging.getLogger(__name__)


class DatasetFacts:
    """Facts that are read from a dataset's files or, where these are missing, from the cache.

    Args:
        experiment: its dataset and cache. The key of the cache is the dataset's settings and its absolute folder.
    """

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        folder = experiment.config["data_dir"]
        place = None if folder is None else str(Path(folder).expanduser().absolute())
        name = f"{experiment.dataset_class.name}-{digest([experiment.config['dataset'], place])}.json"
        self._file = experiment.cache_dir / "datasets" / name

    @cached_property
    def _kept(self) -> dict[str, Any]:
        try:
            kept = read_json(self._file) if self._file.is_file() else {}
        except UserError:
            return {}
        facts = kept.get("facts")
        # damaged: read the dataset again
        return facts if isinstance(facts, dict) and digest(facts) == kept.get("digest") else {}

    @cached_property
    def _missing(self) -> MissingFiles | None:
        missing = self._experiment.dataset_or_missing
        if not isinstance(missing, MissingFiles):
            return None
        if not self._kept:
            raise missing
        log.warning("%s=%s: not there; going on with stored features, without its images", missing.key, missing.value)
        return missing

    def _fact(self, name: str, read: Callable[[ImageDataset], Any]) -> Any:
        if self._missing is not None:
            if name not in self._kept:
                raise self._missing
            return self._kept[name]
        dataset = self._experiment.dataset
        return json.loads(json.dumps(self._experiment.named(lambda: read(dataset), "dataset")))  # as from the cache

    def remember(self) -> None:
        """Write the facts to the cache, if it can be written to."""
        if self._missing is None and self._kept.get("fingerprint", ...) != self.fingerprint:
            names = ("fingerprint", "class_names", "shown_names", "backbone_arguments", "has_backbone_images")
            facts = {name: getattr(self, name) for name in names}
            with contextlib.suppress(OSError):
                write_json(self._file, {"facts": facts, "digest": digest(facts)})

    @cached_property
    def fingerprint(self) -> Any:
        """Plain values that change with the files."""

        def read(dataset: ImageDataset) -> Any:
            with progress_bar() as bar:

                def progress(items: Iterable[Any], count: int) -> Iterator[Any]:
                    task = bar.add_task("content of the files", total=count, note="")
                    for item in items:
                        yield item
                        bar.advance(task)

                content = dataset.content(Content(self._file.parent, progress))
            return dataset.fingerprint() if content is None else [dataset.fingerprint(), content]

        return self._fact("fingerprint", read)

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the K classes."""

        def read(dataset: ImageDataset) -> list[str]:
            names = list(dataset.class_names)
            if wrong := [name for name in names if not isinstance(name, str)]:
                problem = f"class_names must be texts, got {type(wrong[0]).__name__} {wrong[0]!r}"
                raise ConfigError("_target_", type(dataset).__name__, problem)
            return names

        return self._fact("class_names", read)

    @cached_property
    def shown_names(self) -> list[str]:
        """Readable names of the K classes."""
        return self._fact("shown_names", lambda dataset: list(dataset.shown_names()))

    @cached_property
    def backbone_arguments(self) -> dict[str, Any]:
        """Arguments that the dataset gives to a backbone (input channels, say)."""
        return self._fact("backbone_arguments", lambda dataset: dataset.backbone_arguments())

    @cached_property
    def has_backbone_images(self) -> bool:
        """Whether the dataset has a split of its own for the backbone's training."""
        return self._fact("has_backbone_images", lambda dataset: dataset.has_backbone_images)
