"""Dashboard: ``python -m iciia_exp.dashboard --entity ME`` makes a wandb workspace for a project's runs.

Sections: accuracy against overhead, group sweep, history, clients, attribution, training. Every run logs their keys
(`iciia_exp.engine.tracking`). Needs ``pip install 'iciia_exp[dashboard]'`` and a login; ``--dry-run`` prints the
workspace as wandb stores it and needs no network.
"""

import argparse
import sys
from typing import Any

from iciia_exp.errors import UserError, first_line
from iciia_exp.output import exit_status

__all__ = ["main", "workspace"]


def workspace(entity: str, project: str, name: str = "iciia_exp") -> Any:
    """Return the workspace, not yet saved. Raises a `UserError` if wandb-workspaces is not installed."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise UserError("wandb-workspaces is not installed; pip install 'iciia_exp[dashboard]'") from error
    accuracy, overhead = wr.SummaryMetric("test/accuracy"), wr.SummaryMetric("cost/overhead_percent")
    streaming, groups = wr.SummaryMetric("cost/streaming_overhead_percent"), wr.Config("groups")

    def size(width: int = 24, height: int = 8) -> Any:
        return wr.Layout(w=width, h=height)

    def scatter(title: str, x: Any, width: int) -> Any:
        return wr.ScatterPlot(title=title, x=x, y=accuracy, log_x=True, layout=size(width))

    def history(title: str, key: str) -> Any:
        lines: list[Any] = [f"history/{key}", f"history/backbone_{key}"]
        title = f"{title} by images of the client seen before"
        return wr.LinePlot(title=title, x="history/images", y=lines, layout=size(12))

    def rounds(title: str, *lines: Any, x: str = "rounds/round") -> Any:
        return wr.LinePlot(title=title, x=x, y=[f"rounds/{line}" for line in lines], layout=size(8))

    def axis(metric: Any, title: str) -> Any:
        return wr.ParallelCoordinatesPlotColumn(metric, display_name=title)

    swept = [axis(wr.Config("num_layers"), "layers"), axis(wr.Config("heads"), "heads"), axis(groups, "groups")]
    swept += [axis(overhead, "overhead, %"), axis(accuracy, "accuracy")]
    curves: tuple[Any, ...] = ("train/loss", "val/accuracy", "val/log_loss")
    bars = {"gain over the backbone": "gain", "clients that lose": "harmed_share", "worst decile": "worst_decile"}
    panels = {
        "Accuracy against overhead": [
            scatter("accuracy, overhead (published convention) in % of the backbone", overhead, 12),
            scatter("accuracy, cost of one more image in % of the backbone", streaming, 12),
        ],
        "Group sweep": [
            scatter("accuracy by groups", groups, 24),
            wr.ParallelCoordinatesPlot(title="layers, heads, groups, overhead, accuracy", columns=swept, layout=size()),
        ],
        "History": [
            history("accuracy", "client_accuracy"),
            history("worst decile of the clients", "worst_decile"),
        ],
        "Rounds": [
            rounds("accuracy by round", "accuracy", "backbone_accuracy"),
            rounds("of the classes that the backbone has and has not learned", "seen_accuracy", "unseen_accuracy"),
            rounds("accuracy by bytes that a device sent", "accuracy", "backbone_accuracy", x="rounds/up_bytes"),
        ],
        "Clients": [
            *(wr.BarPlot(title=title, metrics=[f"test/{key}"], layout=size(8)) for title, key in bars.items()),
            wr.MediaBrowser(media_keys=["plots/gain_per_client"], num_columns=2, layout=size(height=10)),
            wr.WeavePanelSummaryTable(table_name="clients", layout=size(height=10)),
        ],
        "Attribution": [
            wr.MediaBrowser(media_keys=["plots/attribution"], num_columns=1, layout=size(height=14)),
            wr.WeavePanelSummaryTable(table_name="attribution", layout=size(height=12)),
        ],
        "Training": [wr.LinePlot(title=key, x="epoch", y=[key], layout=size(8, 6)) for key in curves],
    }
    opened = ("Accuracy against overhead", "Group sweep", "History")
    sections = [ws.Section(name=title, is_open=title in opened, panels=found) for title, found in panels.items()]
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, auto_generate_panels=False)


def main(arguments: list[str] | None = None) -> int:
    """Build the workspace and save it; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m iciia_exp.dashboard", description="a wandb workspace for the runs")
    parser.add_argument("--entity", required=True, help="user or team")
    parser.add_argument("--project", default="iciia_exp")
    parser.add_argument("--name", default="iciia_exp", help="of the workspace")
    parser.add_argument("--dry-run", action="store_true", help="print it; needs no network")
    options = parser.parse_args(arguments)
    return exit_status(lambda: _save(options), failed=1)


def _save(options: argparse.Namespace) -> int:
    made = workspace(options.entity, options.project, options.name)
    if options.dry_run:
        print(made._to_model().spec.model_dump_json(by_alias=True, indent=2))
        return 0
    from iciia_exp.engine.tracking import wandb_logged_in

    if not wandb_logged_in():
        raise UserError("wandb: no API key on this machine; `wandb login` first, or --dry-run")
    try:
        made.save()
    except Exception as error:  # whatever the server or the network says
        raise UserError(f"wandb: {first_line(error)}") from error
    print(f"workspace: {made.url}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
