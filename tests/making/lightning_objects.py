"""A callback, a Trainer, a logger and a scheduler such as users bring."""

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger

#: What they were told, in order.
TOLD = []


class Mine(pl.Callback):
    """Tells of every epoch and of the test."""

    def on_train_epoch_end(self, trainer, pl_module):
        TOLD.append(("epoch", trainer.current_epoch))

    def on_test_end(self, trainer, pl_module):
        TOLD.append(("test", type(trainer).__name__))


class MyTrainer(pl.Trainer):
    """A subclass, whose own arguments go to Lightning's."""

    def __init__(self, **arguments):
        TOLD.append(("trainer", arguments.get("accumulate_grad_batches")))
        super().__init__(**arguments)


class MyLogger(Logger):
    """Keeps what it is told in a list; fails on demand."""

    def __init__(self, fails=False):
        super().__init__()
        self.fails = fails

    @property
    def name(self):
        return "mine"

    @property
    def version(self):
        return 0

    def log_metrics(self, metrics, step=None):
        if self.fails:
            raise OSError("no space\nleft")
        TOLD.append(("metrics", metrics))

    def log_hyperparams(self, params, *args, **kwargs):
        TOLD.append(("settings", params))
