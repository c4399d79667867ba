"""Prior MAP: EM with a Dirichlet prior, drawn towards the prior of all clients together.

Source: Saerens, Latinne and Decaestecker 2002 (see `prior_em`), with a smoothed M-step. Maximum likelihood excludes
every class that the few images of a client do not show; the Dirichlet prior prevents that. Its strength is chosen on
val clients.
"""

from __future__ import annotations

from iciia_exp.errors import check_float
from iciia_exp.methods.adapt.prior_em import EMMethod
from iciia_exp.methods.base import Facts

__all__ = ["PriorMAP"]


class PriorMAP(EMMethod):
    """Posteriors under the most probable prior of each client.

    Args:
        facts: task, sizes, and the backbone's classifier.
        calibrator: ``none``, ``temperature`` or ``bcts``.
        iterations: steps of EM.
        strength: of the Dirichlet prior, in images; null is chosen on val clients.
    """

    name = "prior_map"

    def __init__(
        self, facts: Facts, calibrator: str = "bcts", iterations: int = 50, strength: float | None = None
    ) -> None:
        super().__init__(facts, calibrator, iterations)
        self.strength.fill_(1.0 if strength is None else check_float("strength", strength, 0.0))
        if strength is None:
            self.grids = {"strength": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)}
