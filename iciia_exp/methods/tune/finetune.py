"""Fine-tuning: every client's own linear classifier, trained on its own labelled images.

Source: a baseline of ICIIA (ACML 2024, PMLR 260:223-238), section 4: from the backbone's classifier, SGD, batches of
16, rate 0.01, gradients clipped at 5, stopped when the accuracy on the client's own val images has not improved for 10
epochs. It needs labels, which clients are not asked for, and is refused where test clients have none.

All clients are trained at once. Gradient steps move a classifier from W within the span of its client's features,
W + A^T F. So A [images, K] is trained, by products of features alone: the same steps, without a classifier of D x K for
every client.

Legend: C clients, n images of a client, D features, K classes, T test images in all.
"""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudView
from iciia_exp.errors import UserError, check_float, check_int
from iciia_exp.methods.base import Ask, Facts, Fit, Record, copy_of, resize_on_load
from iciia_exp.methods.tune.base import Personal
from iciia_exp.tasks import SINGLE_LABEL

__all__ = ["FineTune"]

# Size of the Gram matrices of the clients that are trained at once, in numbers.
_NUMBERS = 1 << 24


class FineTune(Personal):
    """A classifier for every client of the partition.

    Args:
        facts: task, sizes, and the backbone's classifier, where every client starts.
        lr: rate of SGD.
        batch_size: images of a step, in the order of the client's images.
        clip_norm: largest norm of a gradient.
        epochs: at most.
        patience: epochs without a better accuracy on the client's val images before training stops.
    """

    name = "finetune"
    trainable = False
    tasks = (SINGLE_LABEL,)
    asks: ClassVar[frozenset[Ask]] = frozenset({Ask.CLIENT_LABELS})

    keys: Tensor
    kept_logits: Tensor

    def __init__(
        self,
        facts: Facts,
        lr: float = 0.01,
        batch_size: int = 16,
        clip_norm: float = 5.0,
        epochs: int = 100,
        patience: int = 10,
    ) -> None:
        super().__init__(facts)
        self.lr = check_float("lr", lr, 0.0, open_low=True)
        self.batch_size = check_int("batch_size", batch_size, 1)
        self.clip_norm = check_float("clip_norm", clip_norm, 0.0, open_low=True)
        self.epochs, self.patience = check_int("epochs", epochs, 1), check_int("patience", patience, 1)
        self.head = copy_of(facts.head, trained=False)
        # logits of the test images by (client, image), not a classifier of D x K for every client
        self.register_buffer("keys", torch.zeros(0, 2, dtype=torch.int64))
        self.register_buffer("kept_logits", torch.zeros(0, self.num_classes))
        resize_on_load(self, "keys", "kept_logits")

    @torch.no_grad()
    def learn(self, cloud: CloudView, fit: Fit) -> Record:
        """Train every client's classifier, and classify its test images, whose labels it does not see."""
        self.eval()
        devices = cloud.devices
        lengths = devices.lengths("train")
        numbers = np.flatnonzero(devices.lengths("test"))
        numbers = numbers[np.argsort(lengths[numbers], kind="stable")]
        keys, logits = [], []
        start = 0
        while start < len(numbers):  # clients of about the same number of images together
            longest = int(lengths[numbers[min(start + 63, len(numbers) - 1)]])
            rows = numbers[start : start + max(1, min(64, _NUMBERS // (longest * (longest + self.num_classes))))]
            train, val, test = (devices.images(role, rows) for role in ("train", "val", "test"))
            answers_CnK = self._train(train, val, test)
            where = test.mask_CS
            assert test.image_CS is not None
            keys.append(torch.stack([test.client_C[:, None].expand_as(where)[where], test.image_CS[where]], 1))
            logits.append(answers_CnK[where])
            start += len(rows)
        every = torch.cat(keys)
        order = torch.from_numpy(np.lexsort((every[:, 1].numpy(), every[:, 0].numpy())))
        self.keys, self.kept_logits = every[order], torch.cat(logits)[order]
        return {}

    def _train(self, train: ClientBatch, val: ClientBatch, test: ClientBatch) -> Tensor:
        """Return the logits of the test images, [C, n, K]."""
        x_CnD, y_Cn, real_Cn = train.x_CSD, train.y_CS, train.mask_CS.float()
        start_CnK = self.head(x_CnD)
        gram_Cnn = torch.bmm(x_CnD, x_CnD.transpose(1, 2))
        held_Cmn = torch.bmm(val.x_CSD, x_CnD.transpose(1, 2))
        held_CmK = self.head(val.x_CSD)
        change_CnK, bias_C1K = torch.zeros_like(start_CnK), start_CnK.new_zeros(len(x_CnD), 1, self.num_classes)
        best = [change_CnK.clone(), bias_C1K.clone()]
        best_C = self._accuracy(held_CmK, val)
        waited_C = torch.zeros(len(x_CnD), dtype=torch.int64)
        one_hot_CnK = F.one_hot(y_Cn, self.num_classes).float()
        for _ in range(self.epochs):
            active_C11 = (waited_C < self.patience).float()[:, None, None]
            if not active_C11.any():
                break
            for at in range(0, x_CnD.shape[1], self.batch_size):
                batch = slice(at, at + self.batch_size)
                logits_CbK = start_CnK[:, batch] + torch.bmm(gram_Cnn[:, batch], change_CnK) + bias_C1K
                real_Cb1 = real_Cn[:, batch, None]
                error_CbK = (logits_CbK.softmax(-1) - one_hot_CnK[:, batch]) * real_Cb1
                error_CbK = error_CbK / real_Cb1.sum(1, keepdim=True).clamp(min=1)
                own_C1K = error_CbK.sum(1, keepdim=True)
                square_C = (torch.bmm(error_CbK, error_CbK.transpose(1, 2)) * gram_Cnn[:, batch, batch]).sum((1, 2))
                norm_C = (square_C + own_C1K.square().sum((1, 2))).clamp(min=0).sqrt()
                step_C11 = (self.lr * (self.clip_norm / norm_C.clamp(min=1e-12)).clamp(max=1))[:, None, None]
                change_CnK[:, batch] -= active_C11 * step_C11 * error_CbK
                bias_C1K = bias_C1K - active_C11 * step_C11 * own_C1K
            now_C = self._accuracy(held_CmK + torch.bmm(held_Cmn, change_CnK) + bias_C1K, val)
            better_C = (now_C > best_C) & (active_C11[:, 0, 0] > 0)
            best_C = torch.where(better_C, now_C, best_C)
            waited_C = torch.where(better_C, 0, waited_C + 1)
            for kept, current in zip(best, (change_CnK, bias_C1K), strict=True):
                kept[better_C] = current[better_C]
        near_CmK = torch.bmm(torch.bmm(test.x_CSD, x_CnD.transpose(1, 2)), best[0])
        return self.head(test.x_CSD) + near_CmK + best[1]

    @staticmethod
    def _accuracy(logits_CmK: Tensor, batch: ClientBatch) -> Tensor:
        """Return every client's accuracy, [C]."""
        if not batch.y_CS.shape[1]:
            return torch.zeros(len(batch.y_CS))
        right_Cm = (logits_CmK.argmax(-1) == batch.y_CS) & batch.mask_CS
        return right_Cm.sum(1) / batch.mask_CS.sum(1).clamp(min=1)

    def logits(self, batch: ClientBatch, causal: bool = False) -> Tensor:
        """Return the logits of the clients' classifiers for their test images, [C, S, K].

        For images without such logits, those of val clients, they are the backbone's.
        """
        if batch.image_CS is None:
            raise UserError(f"{self.name}: classifies the test images of its partition alone")
        wide = int(max(self.keys[:, 1].max(), batch.image_CS.max())) + 1 if len(self.keys) else 1
        known_T = self.keys[:, 0] * wide + self.keys[:, 1]
        asked_CS = batch.client_C[:, None] * wide + batch.image_CS
        place_CS = torch.searchsorted(known_T, asked_CS).clamp(max=len(known_T) - 1)
        found_CS = (known_T[place_CS] == asked_CS) & batch.mask_CS
        return torch.where(found_CS.unsqueeze(2), self.kept_logits[place_CS], self.head(batch.x_CSD))

    def macs(self, images: int) -> int:
        """0: the client's classifier replaces the backbone's."""
        return 0

    def streaming_macs(self, images: int) -> int | None:
        """0, as `macs`."""
        return 0

    def state_bytes(self, images: int) -> int:
        """The client's classifier, in float32."""
        return 4 * self.num_classes * (self.dim + 1)

    def num_parameters(self) -> int:
        """Those of one client's classifier."""
        return self.num_classes * (self.dim + 1)
