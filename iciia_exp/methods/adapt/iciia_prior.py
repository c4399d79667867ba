"""ICIIA with prior: `iciia_stream` with an inferred class prior, that of `client_prior` by default.

Ours; the equations are in `iciia_exp.methods.adapt.stream`. pi / s is the prior of the next image's class relative to
that of all images; the gates f and g read, beside the rest, how probable it is that the client is like a training
client. The prior takes from the past what posteriors can say of its classes; the encoder adds what features say.
"""

from typing import ClassVar

from iciia_exp.errors import ConfigError
from iciia_exp.methods.adapt.class_prior import ClassPrior
from iciia_exp.methods.adapt.client_prior import ClientPrior
from iciia_exp.methods.adapt.image_classifier import ImageClassifier
from iciia_exp.methods.adapt.stream import StreamMethod
from iciia_exp.methods.adapt.stream_encoder import StreamEncoder
from iciia_exp.methods.base import Facts, Part
from iciia_exp.tasks import SINGLE_LABEL

__all__ = ["IciiaPrior"]


class IciiaPrior(StreamMethod):
    """Encoder, per-image classifier, and an inferred class prior.

    Args:
        facts: task, sizes, and the backbone's classifier.
        encoder: encodes the past.
        prior: infers the class prior. It is fitted before the encoder is trained; its iid_bonus, 0 until then, is
            chosen afterwards.
        image: classifies each image by itself.
    """

    name = "iciia_prior"
    tasks = (SINGLE_LABEL,)
    parts: ClassVar[dict[str, type]] = {"encoder": StreamEncoder, "prior": ClassPrior, "image": ImageClassifier}

    def __init__(
        self,
        facts: Facts,
        encoder: Part[StreamEncoder] = StreamEncoder,
        prior: Part[ClassPrior] = ClientPrior,
        image: Part[ImageClassifier] = ImageClassifier,
    ) -> None:
        if prior is None:
            raise ConfigError("prior", None, "needs a class prior; without one it is method=iciia_stream")
        super().__init__(facts, encoder, image, prior)
