"""How a method is trained and evaluated on clients."""

from __future__ import annotations

from iciia_exp.errors import check_bool, check_int
from iciia_exp.recipe import Recipe

__all__ = ["Protocol"]


class Protocol:
    """Batch protocol: a client's images in chunks; the images of a chunk see each other.

    Args:
        recipe: optimisation; ``batch_size`` counts clients.
        images: S, images of a chunk, in training and in evaluation.
        cost_images: length of the sequence whose cost is reported; null is ``images``.
        shuffle_images: cut every client's training images in a new order each epoch (published: false).
    """

    def __init__(
        self, recipe: Recipe, images: int = 16, shuffle_images: bool = True, cost_images: int | None = None
    ) -> None:
        self.recipe = recipe
        self.images = check_int("images", images, 1)
        self.cost_images = self.images if cost_images is None else check_int("cost_images", cost_images, 1)
        self.shuffle_images = check_bool("shuffle_images", shuffle_images)
