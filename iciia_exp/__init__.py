"""Client-adaptive image recognition: ICIIA and its rivals, trained once and evaluated on every client.

``python -m iciia_exp --help`` shows the commands; ``run_experiment(*overrides)`` is the same from Python;
``client_data(*overrides)`` returns its client batches as a Lightning data module;
``Run.load(path)`` rebuilds a trained method from its run directory;
``ClientSession(run)`` serves a client's images one after the other.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["ClientSession", "Run", "__version__", "client_data", "predict_together", "run_experiment"]

if TYPE_CHECKING:
    from iciia_exp.engine.jobs import client_data, run_experiment
    from iciia_exp.serving.run import Run
    from iciia_exp.serving.session import ClientSession
    from iciia_exp.serving.together import predict_together


def __getattr__(name: str) -> Any:
    # Late, because it imports torch: `--help` and the cache command stay quick.
    if name == "Run":
        from iciia_exp.serving.run import Run

        return Run
    if name in ("client_data", "run_experiment"):
        from iciia_exp.engine import jobs

        return getattr(jobs, name)
    if name == "ClientSession":
        from iciia_exp.serving.session import ClientSession

        return ClientSession
    if name == "predict_together":
        from iciia_exp.serving.together import predict_together

        return predict_together
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
