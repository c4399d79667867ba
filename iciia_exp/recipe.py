"""Recipe: optimiser, scheduler and length of training, with the same keys for backbones and methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from iciia_exp.errors import ConfigError, check_float, check_int, first_line

if TYPE_CHECKING:
    import torch

__all__ = ["Recipe"]

#: Names of a scheduler's length, in steps.
_LENGTHS = ("T_max", "total_steps", "total_iters", "t_initial")

#: A constructor from parameter groups, or from an optimiser; in a configuration, a ``_partial_`` target.
Constructor = Callable[..., Any]


class Recipe:
    """Optimiser, scheduler and length of training.

    Args:
        optimizer: constructor from parameter groups, such as ``functools.partial(torch.optim.SGD, lr=0.1)``; any of
            torch.optim or timm. Null: AdamW with its defaults.
        scheduler: constructor from an optimiser, any of torch.optim.lr_scheduler or timm.scheduler. If its length
            (``T_max``, ``total_steps``, ``total_iters``) is left out, it is that of the training, and the scheduler is
            stepped after every batch. Any other is stepped after every epoch, Lightning's default; so are timm's
            schedulers, unless ``t_in_epochs`` is false, and ``t_initial`` is by default the length of the training.
            Null: a constant learning rate.
        epochs: passes over the data, at most.
        batch_size: items per step, over all devices: images for a backbone, clients for a method.
        clip_norm: largest norm of the gradient; 0 turns clipping off.
        trunk_lr: learning rate of a backbone's trunk; null is that of the optimiser.
    """

    def __init__(
        self,
        optimizer: Constructor | None = None,
        scheduler: Constructor | None = None,
        epochs: int = 10,
        batch_size: int = 32,
        clip_norm: float = 0.0,
        trunk_lr: float | None = None,
    ) -> None:
        import torch

        self.optimizer = torch.optim.AdamW if optimizer is None else optimizer
        self.scheduler = scheduler
        self.epochs = check_int("epochs", epochs, 1)
        self.batch_size = check_int("batch_size", batch_size, 1)
        self.clip_norm = check_float("clip_norm", clip_norm, 0.0)
        self.trunk_lr = None if trunk_lr is None else check_float("trunk_lr", trunk_lr, 0.0)
        for key, value in (("optimizer", self.optimizer), ("scheduler", scheduler)):
            if value is not None and not callable(value):
                raise ConfigError(
                    key, value, f"must be a node with a _target_ and _partial_: true; {key}=NAME chooses one"
                )
        parameters = [{"params": [torch.nn.Parameter(torch.zeros(1))]}]
        self.make_scheduler(_checked("optimizer", _light(self.optimizer), parameters, {}), 100, 10)  # for their errors

    @property
    def lr(self) -> float | None:
        """Learning rate of the optimiser, if it is given."""
        return _given(self.optimizer).get("lr")

    def make_optimizer(
        self, parameters: Iterable[torch.nn.Parameter], trunk: Iterable[torch.nn.Parameter] = (), fused: bool = True
    ) -> torch.optim.Optimizer:
        """Return the optimiser over ``parameters`` and, at ``trunk_lr``, a backbone's ``trunk``.

        ``fused=False`` overrides an optimiser's own ``fused=True``.
        """
        groups: list[dict[str, Any]] = [{"params": list(parameters)}]
        if trunk_parameters := list(trunk):
            groups.append({"params": trunk_parameters, "lr": self.trunk_lr})
        more = {} if fused or not _given(self.optimizer).get("fused") else {"fused": False}
        return _checked("optimizer", self.optimizer, groups, more)

    def make_scheduler(self, optimizer: torch.optim.Optimizer, steps: int, epochs: int) -> dict[str, Any] | None:
        """Return Lightning's configuration of the scheduler, for ``steps`` batches in ``epochs`` epochs."""
        if self.scheduler is None:
            return None
        given, known = _given(self.scheduler), inspect.signature(_target(self.scheduler)).parameters
        left_out = [name for name in _LENGTHS if name in known and name not in given]
        by_step = bool(left_out)
        if "t_in_epochs" in known:  # of timm, which counts epochs unless told otherwise
            by_step = not given.get("t_in_epochs", True)
        more: dict[str, Any] = dict.fromkeys(left_out, steps if by_step else epochs)
        if "total_steps" in known:  # OneCycleLR: the step after the last batch is one more than it allows
            more |= {"total_steps": steps + 1} if by_step else {}
            if "max_lr" not in given:
                more["max_lr"] = [group["lr"] for group in optimizer.param_groups]
        scheduler = _checked("scheduler", self.scheduler, optimizer, more)
        return {"scheduler": scheduler, "interval": "step" if by_step else "epoch"}


def _light(constructor: Constructor) -> Constructor:
    """Return an optimiser's constructor without PyTorch's compiler, which it imports to decorate a method: a second."""
    from torch.optim import Optimizer

    target, own = _target(constructor), Optimizer.add_param_group
    if not isinstance(target, type) or getattr(target, "add_param_group", None) is not own:  # a function, or its own
        return constructor
    light = type(target.__name__, (target,), {"add_param_group": getattr(own, "__wrapped__", own)})
    return partial(light, **_given(constructor))


def _given(constructor: Constructor) -> dict[str, Any]:
    return constructor.keywords if isinstance(constructor, partial) else {}


def _checked(key: str, constructor: Constructor, first: Any, arguments: dict[str, Any]) -> Any:
    """Call a constructor; errors of any kind become a `ConfigError`."""
    try:
        return constructor(first, **arguments)
    except Exception as error:
        texts = {k: v for k, v in _given(constructor).items() if isinstance(v, str)}
        if isinstance(error, TypeError) and texts:
            name, text = next(iter(texts.items()))
            raise ConfigError(f"{key}.{name}", text, f"is a text, not a number ({first_line(error)})") from error
        target = _target(constructor)
        given = ", ".join(f"{k}={v}" for k, v in _given(constructor).items())
        raise ConfigError(
            key, f"{getattr(target, '__name__', target)}({given})", f"cannot be built ({first_line(error)})"
        ) from error


def _target(constructor: Constructor) -> Constructor:
    return constructor.func if isinstance(constructor, partial) else constructor
