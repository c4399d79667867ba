"""Paired backbone: a large network that classifies, and a second one on the same images, whose features are stored too.

A device that has the second network (a public one, say) can train on its features, while the first stays in the cloud
(`iciia_exp.methods.cotrain`).

Legend: B images of a batch, D features.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from iciia_exp.cost import count_macs
from iciia_exp.errors import ConfigError, within
from iciia_exp.models.backbones.base import Backbone

__all__ = ["Paired"]

_SECOND = "second."


class Paired(Backbone):
    """Two networks with the same transform: ``features`` and the classifier are the first's, ``second`` [B, d] is the
    second's features.

    A file of weights has the names of the first network, and those of the second with ``second.`` in front; its
    classifier may be left out.

    Args:
        num_classes: K.
        first, second: build the networks from ``num_classes``: backbone classes with their settings.
    """

    parts: ClassVar[dict[str, type]] = {"first": Backbone, "second": Backbone}

    def __init__(self, num_classes: int, first: Callable[..., Backbone], second: Callable[..., Backbone]) -> None:
        super().__init__()
        for key, network in (("first", first), ("second", second)):
            if not callable(network):
                raise ConfigError(key, network, "must be a node with a _target_ and _partial_: true")
        self.first: Any = within("first", lambda: first(num_classes=num_classes))
        self.second: Any = within("second", lambda: second(num_classes=num_classes)).requires_grad_(False)
        settings = [network.describe_transform() for network in (self.first, self.second)]
        if differ := [key for key in settings[0] if settings[0][key] != settings[1].get(key)]:
            values = " and ".join(str(s.get(differ[0])) for s in settings)
            raise ConfigError("second", type(self.second).__name__, f"must have the first's {differ[0]}, not {values}")
        self.dim, self.head = int(self.first.dim), self.first.head
        nothing: Any = nn.Identity()
        self.first.head = self.second.head = nothing
        self.head_name, self.gives = self.first.head_name, self.gives | {"second"}
        self.trunk_prefix = f"first.{self.first.trunk_prefix}"  # type: ignore[misc]

    def features(self, images: Tensor) -> Tensor:
        """Return the first network's features, [B, D]."""
        return self.first.features(images)

    def trunk_outputs(self, images: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
        """Return ``features`` [B, D] and, if wanted, ``second`` [B, d]."""
        arrays = {"features": self.features(images)}
        return arrays | ({"second": self.second.features(images)} if "second" in wanted else {})

    def transform(self, image: Any) -> Tensor:
        """Turn one image into the input of both networks."""
        return self.first.transform(image)

    def describe_transform(self) -> dict[str, Any]:
        """Return the settings of the first network's."""
        return self.first.describe_transform()

    def further_costs(self, example: Tensor) -> dict[str, int]:
        """Return the MACs of the second network."""
        return {"second_macs": count_macs(self.second, example[None])}

    def faster(self, example: Tensor) -> list[str]:
        """Prepare the first network for inference; return the steps taken."""
        return self.first.faster(example)

    def pretrained_state(self) -> dict[str, Tensor]:
        """Return the library's weights of both networks."""
        second = {f"{_SECOND}{name}": t for name, t in self.second.pretrained_state().items()}
        return {**self.first.pretrained_state(), **second}

    def load_original(self, state: Mapping[str, Tensor]) -> None:
        """Load weights with the names of both networks; raises a `RuntimeError` if they do not fit."""
        own = {name.removeprefix(_SECOND): t for name, t in state.items() if name.startswith(_SECOND)}
        second: Any = self._modules.pop("second")
        try:
            super().load_original({name: t for name, t in state.items() if not name.startswith(_SECOND)})
            trunk = {k: t for k, t in own.items() if not k.startswith(f"{second.head_name}.")}
            try:
                second.load_original(trunk)
            except RuntimeError as error:
                raise RuntimeError(f"second: {error}") from error
        finally:
            self._modules["second"] = second
