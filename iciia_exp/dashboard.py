"""``python -m iciia_exp.dashboard --entity ME``: a wandb workspace for a project's runs, the same every time.

Sections: accuracy against overhead, group sweep, history, clients, attribution, training. The keys are those that every
run logs (`iciia_exp.engine.tracking`). Needs ``pip install 'iciia_exp[dashboard]'`` and a login; ``--dry-run`` prints
the workspace as wandb stores it and reaches no network.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from iciia_exp.errors import UserError, first_line

__all__ = ["main", "workspace"]


def workspace(entity: str, project: str, name: str = "iciia_exp") -> Any:
    """Return the workspace, not yet saved."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise UserError("wandb-workspaces is not installed; pip install 'iciia_exp[dashboard]'") from error
    accuracy, overhead = wr.SummaryMetric("test/accuracy"), wr.SummaryMetric("cost/overhead_percent")
    groups, layers = wr.Config("groups"), wr.Config("num_layers")

    def wide(height: int = 8) -> Any:
        return wr.Layout(w=24, h=height)

    def half() -> Any:
        return wr.Layout(w=12, h=8)

    def axis(metric: Any, title: str) -> Any:
        return wr.ParallelCoordinatesPlotColumn(metric, display_name=title)

    sections = [
        ws.Section(
            name="Accuracy against overhead",
            is_open=True,
            panels=[
                wr.ScatterPlot(
                    title=f"accuracy, {what} in % of the backbone", x=cost, y=accuracy, log_x=True, layout=half()
                )
                for what, cost in (
                    ("overhead (published convention)", overhead),
                    ("cost of one more image", wr.SummaryMetric("cost/streaming_overhead_percent")),
                )
            ],
        ),
        ws.Section(
            name="Group sweep",
            is_open=True,
            panels=[
                wr.ScatterPlot(title="accuracy by groups", x=groups, y=accuracy, log_x=True, layout=wide()),
                wr.ParallelCoordinatesPlot(
                    title="layers, heads, groups, overhead, accuracy",
                    columns=[
                        axis(layers, "layers"),
                        axis(wr.Config("heads"), "heads"),
                        axis(groups, "groups"),
                        axis(overhead, "overhead, %"),
                        axis(accuracy, "accuracy"),
                    ],
                    layout=wide(),
                ),
            ],
        ),
        ws.Section(
            name="History",
            is_open=True,
            panels=[
                wr.LinePlot(
                    title=f"{what} by images of the client seen before",
                    x="history/images",
                    y=[f"history/{key}", f"history/backbone_{key}"],
                    layout=half(),
                )
                for what, key in (("accuracy", "client_accuracy"), ("worst decile of the clients", "worst_decile"))
            ],
        ),
        ws.Section(
            name="Clients",
            panels=[
                wr.BarPlot(title="gain over the backbone", metrics=["test/gain"], layout=wr.Layout(w=8, h=8)),
                wr.BarPlot(title="clients that lose", metrics=["test/harmed_share"], layout=wr.Layout(w=8, h=8)),
                wr.BarPlot(title="worst decile", metrics=["test/worst_decile"], layout=wr.Layout(w=8, h=8)),
                wr.MediaBrowser(media_keys=["plots/gain_per_client"], num_columns=2, layout=wide(10)),
                wr.WeavePanelSummaryTable(table_name="clients", layout=wide(10)),
            ],
        ),
        ws.Section(
            name="Attribution",
            panels=[
                wr.MediaBrowser(media_keys=["plots/attribution"], num_columns=1, layout=wide(14)),
                wr.WeavePanelSummaryTable(table_name="attribution", layout=wide(12)),
            ],
        ),
        ws.Section(
            name="Training",
            panels=[
                wr.LinePlot(title=key, x="epoch", y=[key], layout=wr.Layout(w=8, h=6))
                for key in ("train/loss", "val/accuracy", "val/log_loss")
            ],
        ),
    ]
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, auto_generate_panels=False)


def main(arguments: list[str] | None = None) -> int:
    """Build the workspace and save it."""
    parser = argparse.ArgumentParser(prog="python -m iciia_exp.dashboard", description="a wandb workspace for the runs")
    parser.add_argument("--entity", required=True, help="user or team")
    parser.add_argument("--project", default="iciia_exp")
    parser.add_argument("--name", default="iciia_exp", help="of the workspace")
    parser.add_argument("--dry-run", action="store_true", help="print it, and reach no network")
    options = parser.parse_args(arguments)
    try:
        made = workspace(options.entity, options.project, options.name)
        if options.dry_run:
            print(made._to_model().spec.model_dump_json(by_alias=True, indent=2))
            return 0
        from iciia_exp.config.settings import wandb_logged_in

        if not wandb_logged_in():
            raise UserError("wandb: no API key on this machine; `wandb login` first, or --dry-run")
        try:
            made.save()
        except Exception as error:  # whatever the server or the network says
            raise UserError(f"wandb: {first_line(error)}") from error
        print(f"workspace: {made.url}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
