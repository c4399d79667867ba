"""Personal methods: what they learn from a client's labels serves that client alone.

Legend: C clients, S images of a client, K classes.
"""

from iciia_exp.methods.base import Method

__all__ = ["Personal"]


class Personal(Method):
    """A method with parameters of its own for every client of the partition, chosen by a batch's client numbers."""

    #: An image's logits depend on its client, not on other images.
    causal = True
