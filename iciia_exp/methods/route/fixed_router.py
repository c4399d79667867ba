"""Fixed routers: all prompts to one side, at random, by their length, and by the true PRS.

Legend: C clients, S prompts of a client, B prompts.
"""

from typing import Any

import torch
from torch import Tensor

from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.prompts import as_text
from iciia_exp.errors import check_choice, check_int
from iciia_exp.methods.base import Ask, Facts, without_seed
from iciia_exp.methods.route.base import PromptRouter
from iciia_exp.seeding import generator

__all__ = ["FixedRouter", "OracleRouter"]


class FixedRouter(PromptRouter):
    """A rule without training.

    Args:
        facts: as of `PromptRouter`.
        rule: ``edge``: all prompts stay; ``cloud``: all go, whatever the share; ``random``; ``length``: those with most
            tokens go.
        seed: of the random rule; a prompt has the same number in every batch.
        routing: further arguments of `PromptRouter`.
    """

    name = "fixed_router"
    trainable = False
    even = None

    @classmethod
    def canonical(cls, config: dict[str, Any], dim: int) -> dict[str, Any]:
        """Leave out the seed unless the rule is random."""
        return config if config.get("rule", "random") == "random" else without_seed(config)

    def __init__(self, facts: Facts, rule: str = "random", seed: int = 0, **routing: Any) -> None:
        super().__init__(facts, **routing)
        self.rule = check_choice("rule", rule, ("edge", "cloud", "random", "length"))
        self.seed = check_int("seed", seed, 0)
        self.reads_text = False

    def score_prompts(self, prompts_BL: Tensor, tokens_Bnd: Tensor) -> Tensor:
        """Return the score of prompts, [B]."""
        prompts = as_text(prompts_BL)
        if self.rule == "length":
            return torch.tensor([1 / (1 + len(prompt.split())) for prompt in prompts])
        if self.rule == "random":  # from the text, so that a prompt has the same number everywhere
            return torch.tensor([generator("route", self.seed, prompt).random() for prompt in prompts])
        return torch.full((len(prompts),), 0.5)

    def threshold(self, share: float | None = None) -> float:
        """Return the threshold; infinite where all prompts go to one side."""
        return {"edge": -torch.inf, "cloud": torch.inf}.get(self.rule) or super().threshold(share)


class OracleRouter(PromptRouter):
    """Scores prompts by their true PRS: a bound."""

    name = "oracle_router"
    asks = frozenset({Ask.TEST_LABELS})
    trainable = False

    def score_prompts(self, prompts_BL: Tensor, tokens_Bnd: Tensor) -> Tensor:
        """Refuse: a prompt alone does not tell the quality of the answers."""
        raise LookupError("oracle_router needs the pictures of both models")

    def score(self, batch: ClientBatch) -> Tensor:
        """Return the true PRS, [C, S]."""
        quality = batch.arrays["quality"].flatten(0, 1)
        return self.true_superiority(quality).view(batch.mask_CS.shape)
