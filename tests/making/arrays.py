"""Methods that read stored arrays beside the features, and a small vision transformer that gives them."""

from typing import ClassVar

import torch
from torch import nn

from iciia_exp.ledger import payload_bytes, serve
from iciia_exp.methods.base import Method

#: A folder of images behind a transformer of two blocks, 17 tokens of 48 numbers.
VIT = (
    *("dataset=folder", "dataset.csv=images.csv", "partition=owner", "logger=csv", "trainer=cpu", "method=backbone"),
    *("backbone=timm", "backbone.model.model=vit_tiny_patch16_224", "backbone.model.image_size=32"),
    "backbone.model.options={patch_size: 8, depth: 2, embed_dim: 48, num_heads: 2}",
    *("backbone.pretrained=false", "training.recipe.epochs=2", "training.images=8", "features.batch_size=8"),
)
#: The transformer is trained for an epoch: its own classifier gives logits.
TRAINED = (
    "backbone.train=all",
    "backbone.recipe={_target_: iciia_exp.recipe.Recipe, epochs: 1, batch_size: 16}",
    "+backbone.recipe.optimizer={_target_: torch.optim.AdamW, _partial_: true, lr: 0.001}",
)


class TokenMean(Method):
    """A linear classifier of the normalised mean token."""

    name = "token_mean"
    reads: ClassVar[frozenset[str]] = frozenset({"tokens"})
    causal = True

    def __init__(self, facts):
        super().__init__(facts)
        self.tokens, width = facts.arrays["tokens"]
        self.norm, self.head = nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, self.num_classes)

    def logits(self, batch, causal=False):
        tokens_CSnd = batch.arrays["tokens"]
        assert tokens_CSnd.shape == (*batch.mask_CS.shape, self.tokens, self.head.in_features)
        return self.head(self.norm(tokens_CSnd.mean(2)))

    def training_loss(self, batch):
        return self.task.loss(self.logits(batch)[batch.mask_CS], batch.y_CS[batch.mask_CS])

    def budget(self, sizes):
        weights = payload_bytes(self.payload())
        return serve(sizes, self.num_classes, macs=sizes.requested * self.head.weight.numel(), weights=weights)


class StoredLogits(TokenMean):
    """The backbone's logits as they are stored."""

    name = "stored_logits"
    reads: ClassVar[frozenset[str]] = frozenset({"features", "logits", "tokens"})
    trainable = False

    def learn(self, cloud, fit):
        self.eval()
        return {}

    def logits(self, batch, causal=False):
        return batch.arrays["logits"]


def hooked_tokens(backbone, images):
    """Return the sum of the first block's input and the blocks' outputs, read by hooks in a pass, [B, n, d]."""
    seen = []
    hooks = [backbone.net.blocks[0].register_forward_pre_hook(lambda *call: seen.append(call[1][0]))]
    hooks += [block.register_forward_hook(lambda *call: seen.append(call[2])) for block in backbone.net.blocks]
    try:
        with torch.no_grad():
            backbone(images)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(seen) == len(backbone.net.blocks) + 1
    return torch.stack(seen).sum(0)
