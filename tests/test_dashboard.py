"""The wandb workspace, built without a server, and the sweeps that wandb's agents run."""

import json
import re
import sys

import pytest
import yaml

from iciia_exp.config.paths import CONF_DIR
from iciia_exp.dashboard import main, workspace
from iciia_exp.engine.tracking import METRICS
from iciia_exp.errors import UserError
from iciia_exp.results.columns import summary_keys

# wandb-workspaces itself uses what a later pydantic will not have
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic:DeprecationWarning")

SWEEPS = sorted((CONF_DIR / "wandb").glob("*.yaml"))


def test_its_panels_show_what_runs_log(capsys):
    assert main(["--entity", "me", "--dry-run"]) == 0
    text = capsys.readouterr().out
    spec = json.loads(text)
    names = [section["name"] for section in spec["section"]["panelBankConfig"]["sections"]]
    assert names[:4] == ["Accuracy against overhead", "Group sweep", "History", "Rounds"]
    shown = set(re.findall(r'"(?:summary:)?((?:test|cost|backbone|train|val|history|rounds)/[\w/]+)"', text))
    curves = {"train/loss", "val/accuracy", "val/log_loss", "history/images"}
    curves |= {
        f"history/{who}{k}" for who in ("", "backbone_") for k in ("client_accuracy", "worst_decile", "log_loss")
    }
    by_round = ("accuracy", "seen_accuracy", "unseen_accuracy", "backbone_accuracy", "up_bytes")
    curves |= {f"rounds/{key}" for key in by_round}
    assert {"test/accuracy", "cost/overhead_percent", "history/client_accuracy"} <= shown
    assert shown <= set(summary_keys()) | curves | set(METRICS)
    assert set(re.findall(r'"plots/(\w+)"', text)) == {"gain_per_client", "attribution"}


def test_without_a_login_it_says_so(capsys):
    assert main(["--entity", "me"]) == 1
    assert capsys.readouterr().err == "error: wandb: no API key on this machine; `wandb login` first, or --dry-run\n"


def test_a_failing_server_is_one_line(monkeypatch, capsys):
    import wandb_workspaces.workspaces as ws

    def fail(self):
        raise ValueError("permission denied\nfor me")

    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr(ws.Workspace, "save", fail)
    assert main(["--entity", "me"]) == 1
    assert capsys.readouterr().err == "error: wandb: permission denied\n"


def test_without_the_library_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(UserError, match=r"pip install 'iciia_exp\[dashboard\]'"):
        workspace("me", "p")


@pytest.mark.parametrize("path", SWEEPS, ids=[p.stem for p in SWEEPS])
def test_the_command_of_an_agent_works_with_hydra(path, compose):
    """As `wandb agent` builds it: macros filled in, a value of every parameter."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    from iciia_exp.config.experiment import Experiment
    from iciia_exp.engine.stages import Stages

    sweep = yaml.safe_load(path.read_text())
    assert sweep["metric"]["name"] in (*summary_keys(), *METRICS)
    values = {k: {"value": v["values"][-1] if "values" in v else v["min"]} for k, v in sweep["parameters"].items()}
    command = create_sweep_command(sweep["command"])
    arguments = create_sweep_command_args({"args": values})["args_no_hyphens"]
    filled = [b for a in command for b in (arguments if a == "${args_no_hyphens}" else [a])]
    assert filled[:4] == ["${env}", "python", "-m", "iciia_exp"]
    stages = Stages(Experiment.from_config(compose(*filled[4:], "backbone.model.dim=512")))
    for key, found in values.items():
        node = stages.experiment.config
        for part in key.split("."):
            node = node[part]
        assert node == found["value"]
