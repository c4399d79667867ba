"""Command line: ``python -m iciia_exp`` composes a configuration with Hydra and runs it."""

import os
import sys
from pathlib import Path

# Threads that wait for work may spin only briefly: a training step of 11 ms then takes 12 ms, and 24 ms when two runs
# share two cores, not 50 to 350 ms (benchmarks/bench_two_runs.py). libgomp reads this when torch is first imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from iciia_exp import __version__
from iciia_exp.config.paths import CONF_DIR
from iciia_exp.errors import UserError
from iciia_exp.output import discard_output, os_error, print_error, robust_streams


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
def job(config: DictConfig) -> float | None:
    """Run one composed configuration."""
    from iciia_exp.engine.jobs import run_job
    from iciia_exp.machine import keep_freed_memory

    keep_freed_memory()
    return run_job(config)


def main() -> None:
    """Run the command line. An error that a user can correct is printed as one line, with exit status 2."""
    asked = os.environ.get("HYDRA_FULL_ERROR")
    tracebacks = asked == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them
    os.environ.setdefault("ICIIA_EXP_PID", str(os.getpid()))  # for the folders of sweeps that start in the same second
    os.environ["ICIIA_EXP_MAIN"] = str(os.getpid())  # for the workers of a sweep, which end with it
    for flag in {"-m", "--multirun"} & set(sys.argv[1:]):  # Hydra accepts it first or last, not between overrides
        sys.argv.remove(flag)
        sys.argv.insert(1, flag)
    robust_streams()
    try:
        Path.cwd()
    except FileNotFoundError:
        print_error("the working folder has been deleted; change to one that exists")
        sys.exit(2)
    try:
        if "--version" in sys.argv[1:]:
            print(f"iciia_exp {__version__}")
            sys.stdout.flush()
            return
        from iciia_exp.config.hydra_errors import check_choices, check_hidden, own_folder

        check_choices(sys.argv[1:])
        if (own := own_folder(sys.argv[1:])) is not None:
            check_hidden(own)
        job()
        if "iciia_exp.engine.jobs" in sys.modules:  # --help and the like import no engine
            from iciia_exp.engine.jobs import take_failure

            if (failure := take_failure()) is not None:
                raise failure
        sys.stdout.flush()
    except (UserError, HydraException, OmegaConfBaseException, ValueError) as error:
        known = ("No trials are completed", "The --resolve flag")
        ours = any(text in str(error) for text in known)
        if tracebacks or (isinstance(error, ValueError) and not ours):
            raise
        from iciia_exp.config.hydra_errors import explain

        print_error(explain(error, sys.argv[1:]))
        sys.exit(2)
    except yaml.YAMLError as error:
        if tracebacks:
            raise
        from iciia_exp.config.hydra_errors import of_yaml

        print_error(of_yaml(error))
        sys.exit(2)
    except BrokenPipeError:  # `| head` has read enough
        discard_output()
    except OSError as error:
        if tracebacks:
            raise
        print_error(os_error(error))
        sys.exit(2)
    except KeyboardInterrupt:
        if tracebacks:
            raise
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except SystemExit as ended:
        if ended.code == 143:  # SIGTERM
            print("terminated; the same command goes on from here", file=sys.stderr)
        raise
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if asked is not None:
            os.environ["HYDRA_FULL_ERROR"] = asked
    if "iciia_exp.engine.sweeps" in sys.modules:
        from iciia_exp.engine.sweeps import take_exit_status

        sys.exit(take_exit_status())


if __name__ == "__main__":
    main()
