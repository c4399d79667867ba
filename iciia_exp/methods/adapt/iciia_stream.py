"""ICIIA for streams: a bias on the backbone's logits, from the encoded past and the mean of its posteriors.

Ours, on the published encoder (ACML 2024, PMLR 260:223-238) with causal attention; the equations are in
`iciia_exp.methods.adapt.stream`. The prior pi is the mean over the past of the backbone's probabilities, and of some
images of even classes (one step of Saerens, Latinne and Decaestecker 2002).
"""

from typing import ClassVar

from iciia_exp.methods.adapt.image_classifier import ImageClassifier
from iciia_exp.methods.adapt.stream import StreamMethod
from iciia_exp.methods.adapt.stream_encoder import StreamEncoder
from iciia_exp.methods.base import Facts, Part

__all__ = ["IciiaStream"]


class IciiaStream(StreamMethod):
    """Encoder, per-image classifier, and the mean posterior as the prior.

    Args:
        facts: task, sizes, and the backbone's classifier.
        encoder: encodes the past.
        image: classifies each image by itself.
    """

    name = "iciia_stream"
    parts: ClassVar[dict[str, type]] = {"encoder": StreamEncoder, "image": ImageClassifier}

    def __init__(
        self, facts: Facts, encoder: Part[StreamEncoder] = StreamEncoder, image: Part[ImageClassifier] = ImageClassifier
    ) -> None:
        super().__init__(facts, encoder, image, None)
