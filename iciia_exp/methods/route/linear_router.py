"""Linear router: ridge regression of the true PRS on a prompt's words, or on the mean of its tokens.

Legend: B prompts, n tokens, d width of a token, W words.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iciia_exp.data.prompts import as_text
from iciia_exp.data.views import CloudView
from iciia_exp.errors import check_choice
from iciia_exp.methods.base import Facts, Fit, Record
from iciia_exp.methods.route.base import PromptRouter
from iciia_exp.models.token_router import real_tokens

__all__ = ["LinearRouter"]

#: Columns of the word counts: words are hashed.
_WORDS = 4096


class LinearRouter(PromptRouter):
    """A linear probe, whose penalty is chosen by leave-one-out errors.

    Args:
        facts: as of `PromptRouter`.
        inputs: ``words``: how often a prompt has each word; ``tokens``: the mean of its tokens.
        routing: further arguments of `PromptRouter`.
    """

    name = "linear_router"
    trainable = False

    def __init__(self, facts: Facts, inputs: str = "words", **routing: Any) -> None:
        super().__init__(facts, **routing)
        self.reads_text = check_choice("inputs", inputs, ("words", "tokens")) == "tokens"
        self.probe = nn.Linear(self.width if self.reads_text else _WORDS, 1)

    def _inputs(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        """Return the probe's inputs, [B, d] or [B, W], from the bytes of prompts and their tokens."""
        if self.reads_text:
            return tokens.sum(1) / real_tokens(tokens).sum(1, keepdim=True)
        return _counts(as_text(prompts)).to(tokens.device)

    def train_router(self, cloud: CloudView, fit: Fit) -> Record:
        """Fit the probe on the train prompts."""
        from sklearn.linear_model import RidgeCV  # late: it takes half a second

        prompts, tokens, quality = self.read_train(cloud, "images", "tokens", "quality")
        x, y = self._inputs(prompts, tokens).double().numpy(), self.true_superiority(quality).double().numpy()
        ridge = RidgeCV(np.logspace(-2, 4, 13)).fit(x, y)
        with torch.no_grad():
            self.probe.weight.copy_(torch.from_numpy(ridge.coef_)[None])
            self.probe.bias.fill_(float(ridge.intercept_))
        return {"penalty": float(ridge.alpha_)}

    def score_prompts(self, prompts_BL: Tensor, tokens_Bnd: Tensor) -> Tensor:
        """Return the predicted PRS, [B]."""
        return self.probe(self._inputs(prompts_BL, tokens_Bnd))[:, 0]

    def router_macs(self) -> int:
        """Return d of tokens; of words the most that a prompt has of them, n."""
        return self.width if self.reads_text else self.tokens


def _counts(prompts: Sequence[str]) -> Tensor:
    from sklearn.feature_extraction.text import HashingVectorizer  # late: it takes half a second

    hashed = HashingVectorizer(n_features=_WORDS, alternate_sign=False, norm=None)
    return torch.from_numpy(hashed.transform(prompts).toarray().astype(np.float32))
