"""Personal methods: what they have learned belongs to one client, and serves no other.

Legend: C clients, S images of a client, K classes.
"""

from __future__ import annotations

from iciia_exp.methods.base import Method

__all__ = ["Personal"]


class Personal(Method):
    """A method with something of its own for every client of the partition; a batch says whose images they are."""

    #: An image's logits depend on its client, not on other images.
    causal = True
