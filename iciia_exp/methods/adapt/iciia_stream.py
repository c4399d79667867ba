"""ICIIA for streams: what a client's past says about its classes is added to the backbone's own logits.

Ours, on the published encoder (ACML 2024, PMLR 260:223-238) with causal attention. With n images in a client's past and
b the backbone's logits of the newest image alone,

    logits = A(n) b + H(n) (f (W m + c) + g a(n) log pi)

With ``perceptron`` b is the sum of the backbone's logits and a per-image classifier of the image by itself, weighted on
val clients: a perceptron fitted on the clients' train images (`iciia_exp.models.perceptron`). The module is
trained behind the backbone's logits alone, as the perceptron is far surer of the images that it was fitted on.

- m: mean over the past of the encoder's outputs; W m + c is what the module has learned about the classes of clients
  with such a past. W starts at zero.
- pi: mean over the past of the backbone's probabilities, drawn towards even classes as by a few images more; the
  prior of classes that anybody would estimate (one step of Saerens, Latinne and Decaestecker 2002).
- f, g: how much to trust either, read from m and from how alike the images of the past are: the chance that two of
  them have the same class, as the backbone sees it, how sure it is of each, and n. So that the correction can be turned
  down for a client with all classes.
- A(n), H(n): how much the backbone and the correction count after n images; chosen on val clients in the end.

The newest image enters through b alone, the past through a bias of the logits alone. So without a past the answer is
that of b; a module of the published form, whose classifier sees image and past together, learns the training images by
heart instead (docs/streams.md). It also means that an answer waits for none of the module's layers: they read the image
afterwards.

Legend: C clients, S images of a client, P images of its past, E numbers kept of one, D features, K classes, N layers,
G groups, J knots, T images in all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from iciia_exp.methods.adapt.stream_base import KNOTS, StreamMethod
from iciia_exp.tasks import MULTI_LABEL

__all__ = ["KNOTS", "IciiaStream"]


class IciiaStream(StreamMethod):
    """The encoder behind the backbone, with the plain prior that anybody would estimate.

    Args:
        facts, num_layers, heads, groups, dropout, feature_dropout, shuffle, perceptron: as of `StreamMethod`.
    """

    name = "iciia_stream"

    def _correction(self, encoded: Tensor, classes: Tensor, squares: Tensor, n: Tensor) -> Tensor:
        """Return the bias [..., K] from sums over the past, and its length.

        Args:
            encoded: sum of the encoder's outputs, [..., D].
            classes: sum of the backbone's probabilities, [..., K].
            squares: sum of each image's squared probabilities, over images and classes, [...].
            n: length of the past, [...].
        """
        mean, (trust, weight, more) = self._gates(encoded, classes, squares, n)
        even = F.softplus(self.even_images + more).unsqueeze(-1) + 1e-3
        if self.task == MULTI_LABEL:
            prior = ((classes + 0.5 * even) / (n.unsqueeze(-1) + even)).logit(1e-6)
        else:
            prior = ((classes + even / self.num_classes) / (n.unsqueeze(-1) + even)).log()
        return self._bias(mean, trust, weight, prior, n)

    def _corrected(self, b_CSK: Tensor, real_CS: Tensor, past: list[Tensor], causal: bool) -> Tensor:
        return self._correction(*past)

    def step(self, x_CD: Tensor, past_CPE: Tensor, mask_CP: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits of one more image of each client, [C, K], and what to keep of it, [C, E]."""
        keys_CPe, encoded_CPD, classes_CPK = self._kept(past_CPE)
        if mask_CP is None:
            n_C = x_CD.new_full((len(x_CD),), past_CPE.shape[1])
        else:
            n_C = mask_CP.sum(1).to(x_CD.dtype)
            encoded_CPD, classes_CPK = (part * mask_CP.unsqueeze(-1) for part in (encoded_CPD, classes_CPK))
        b_CK = self.classify(x_CD)
        summed = encoded_CPD.sum(1), classes_CPK.sum(1), classes_CPK.square().sum((1, 2)), n_C
        logits_CK = self._combine(b_CK, self._correction(*summed), n_C)
        encoded_CD, own_Ce = self.model.encode_step(x_CD, keys_CPe, mask_CP)
        return logits_CK, torch.cat([own_Ce, encoded_CD, self._classes(b_CK)], 1)
