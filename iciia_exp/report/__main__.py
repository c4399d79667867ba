"""``python -m iciia_exp.report FOLDER``: tables and figures over finished runs, from their results alone."""

import argparse
import sys
from pathlib import Path
from typing import Any

from iciia_exp.errors import UserError, printable
from iciia_exp.output import exit_status

__all__ = ["main"]

_EPILOG = """examples:
  python -m iciia_exp.report outputs                          every finished run under outputs
  python -m iciia_exp.report outputs/rivals --history         and by images seen before, by client type
  python -m iciia_exp.report outputs --where method=iciia,iciia_stream --where partition.seed=0
  python -m iciia_exp.report outputs --html report.html       one page to sort, filter and look at
  python -m iciia_exp.report outputs/digits --out report      tables (CSV, Markdown, LaTeX) and figures (PDF, PNG)
"""


# names of the files of a report, in its folder
_LIST = ".report"


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
    options = parser.parse_intermixed_args(arguments)
    return exit_status(lambda: _report(options), failed=1)


def _report(options: argparse.Namespace) -> int:
    from iciia_exp.report.figures import all_figures
    from iciia_exp.report.heterogeneity import draw_heterogeneity, partition_sweeps, sweep_table
    from iciia_exp.report.page import page
    from iciia_exp.report.text import by_history, csv, latex, markdown, note, summary
    from iciia_exp.results.columns import DRAWN_TYPES
    from iciia_exp.results.tables import comparisons, load_runs, select, settings

    for flag, path in (("--html", options.html), ("--out", options.out)):
        if path is not None and path.exists() and path.is_dir() != (flag == "--out"):
            raise UserError(f"{flag} {path}: is a {'file' if path.is_file() else 'folder'}; choose another name")
    rows = select(load_runs(options.folders), options.where)
    made: dict[Path, Any] = {}  # written together at the end: a damaged table leaves an earlier report as it is
    shown = [(title, settings(part)) for title, part in comparisons(rows)]
    for number, (title, table) in enumerate(shown):
        text = summary(table)
        print(f"\n## {printable(title, lines=False)}\n\n{markdown(text)}\n{note(table)}")
        histories = {}
        if options.history or options.out:
            tables = {name or "history": by_history(table, name) for name in (None, *DRAWN_TYPES)}
            histories = {name: markdown(found) for name, found in tables.items() if found is not None}
        if options.history:
            for name, history in histories.items():
                clients = "the partition's test clients" if name == "history" else f"drawn clients, {name}"
                print(f"\nAccuracy by images seen before, {clients}\n\n{history}")
        if options.out:
            lines = f"{markdown(text)}\n{note(table)}\n"
            files = {"table.csv": csv(table), "table.md": lines, "table.tex": latex(text, title)}
            files |= {f"{name}.md": history for name, history in histories.items()}
            for name, content in (files | dict(all_figures(table, title))).items():
                made[options.out / (f"{number}-{name}" if number else name)] = content
    sweeps = partition_sweeps(rows)
    for number, sweep in enumerate(sweeps):
        swept = markdown(sweep_table(sweep))
        print(f"\n## {printable(sweep.title, lines=False)}\n\n{swept}")
        if options.out:
            made[options.out / f"{number}-heterogeneity.md"] = swept
            made[options.out / f"{number}-heterogeneity"] = draw_heterogeneity(sweep)
    whole = page(shown, sweeps) if options.html else None
    written = [path for name, content in made.items() for path in _write(name, content)]
    if options.html:
        _write(options.html, whole)
        print(f"\npage: {printable(options.html)}")
    if options.out:
        _only(options.out, {path.name for path in written})
        print(f"\ntables and figures in {printable(options.out)}")
    return 0


def _write(path: Path, content: Any) -> list[Path]:
    """Write a text, or a figure as PDF and PNG; return the files."""
    from iciia_exp.artifacts import atomic_write
    from iciia_exp.results.drawing import save

    if isinstance(content, str):
        with atomic_write(path) as file:
            file.write(content)
        return [path]
    return [save(content, Path(f"{path}.{ending}")) for ending in ("pdf", "png")]


def _only(folder: Path, names: set[str]) -> None:
    """Delete what an earlier report has written into a folder and this one has not; keep the list of what is there."""
    from iciia_exp.artifacts import atomic_write

    kept = folder / _LIST
    earlier = kept.read_text(encoding="utf-8").splitlines() if kept.is_file() else []
    for name in set(earlier) - names:
        if Path(name).name == name and (folder / name).is_file():
            (folder / name).unlink()
    with atomic_write(kept) as file:
        file.write("\n".join(sorted(names)) + "\n")


if __name__ == "__main__":
    sys.exit(main())
