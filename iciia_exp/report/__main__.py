"""``python -m iciia_exp.report FOLDER``: tables and figures over finished runs, from their results alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from iciia_exp.errors import UserError

__all__ = ["main"]

_EPILOG = """examples:
  python -m iciia_exp.report outputs                          every finished run under outputs
  python -m iciia_exp.report outputs/rivals --history         and by images seen before, by client type
  python -m iciia_exp.report outputs --where method=iciia,iciia_stream --where partition.seed=0
  python -m iciia_exp.report outputs --html report.html       one page to sort, filter and look at
  python -m iciia_exp.report outputs/digits --out report      tables (CSV, Markdown, LaTeX) and figures (PDF, PNG)
"""


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m iciia_exp.report",
        description="Tables and figures over finished runs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="run directories, or folders of them")
    parser.add_argument("--where", action="append", default=[], metavar="KEY=VALUE[,VALUE]", help="only such runs")
    parser.add_argument("--history", action="store_true", help="also accuracy by images seen before")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page with all of it, to open in a browser")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write tables and figures into this folder")
    options = parser.parse_args(arguments)
    try:
        return _report(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `| head` has read enough
        sys.stderr.close()
        return 0


def _report(options: argparse.Namespace) -> int:
    from iciia_exp.artifacts import atomic_write
    from iciia_exp.report import text as text_tables
    from iciia_exp.report.heterogeneity import draw_heterogeneity, partition_sweeps, sweep_table
    from iciia_exp.results.columns import DRAWN_TYPES
    from iciia_exp.results.plots import save
    from iciia_exp.results.tables import comparisons, load_runs, select, settings

    rows = select(load_runs(options.folders), options.where)
    shown = []
    for number, (title, part) in enumerate(comparisons(rows)):
        table = settings(part)
        shown.append((title, table))
        first = part[0]
        print(f"\n## {title}\n")
        print(text_tables.markdown(text_tables.summary(table)))
        print(
            f"{first['test_clients']:,} test clients, {first['test_images']:,} test images; percent; ± standard error "
            f"over runs, [95 % interval over clients]; overhead: {first['cost_images']} images, each of them, one more "
            "where state is kept; * none of the same cost or less is better"
        )
        parts: dict[str, tuple[str, str | None]] = {"history": ("history.parquet", None)}
        parts |= {client_type: ("drawn_clients.parquet", client_type) for client_type in DRAWN_TYPES}
        found = {}
        if options.history or options.out:
            found = {
                k: t
                for k, (f, client_type) in parts.items()
                if (t := text_tables.by_history(table, f, client_type)) is not None
            }
        if options.history:
            for name, text in found.items():
                clients = "the partition's test clients" if name == "history" else f"drawn clients, {name}"
                print(f"\nAccuracy by images seen before, {clients}\n\n{text_tables.markdown(text)}")
        if options.out:
            _write(options.out, f"{number}-" if number else "", title, table, found)
    sweeps = partition_sweeps(rows)
    for number, sweep in enumerate(sweeps):
        swept = text_tables.markdown(sweep_table(sweep))
        print(f"\n## {sweep.title}\n\n{swept}")
        if options.out:
            with atomic_write(options.out / f"{number}-heterogeneity.md") as file:
                file.write(swept)
            for ending in ("pdf", "png"):
                save(draw_heterogeneity(sweep), options.out / f"{number}-heterogeneity.{ending}")
    if options.html:
        from iciia_exp.report.page import page

        with atomic_write(options.html) as file:
            file.write(page(shown, sweeps))
        print(f"\npage: {options.html}")
    if options.out:
        print(f"\ntables and figures in {options.out}")
    return 0


def _write(out: Path, prefix: str, title: str, table: object, found: dict) -> None:
    import pandas as pd

    from iciia_exp.artifacts import atomic_write
    from iciia_exp.report import figures
    from iciia_exp.report import text as text_tables

    assert isinstance(table, pd.DataFrame)
    text = text_tables.summary(table)
    files = {
        "table.csv": text_tables.csv(table),
        "table.md": text_tables.markdown(text),
        "table.tex": text_tables.latex(text, title),
    }
    files |= {f"{name}.md": text_tables.markdown(part) for name, part in found.items()}
    for name, content in files.items():
        with atomic_write(out / f"{prefix}{name}") as file:
            file.write(content)
    figures.write_all(table, title, out, prefix)


if __name__ == "__main__":
    sys.exit(main())
