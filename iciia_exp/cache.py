"""Cache: ``python -m iciia_exp.cache`` lists and cleans the datasets, backbones and features that runs share."""

import argparse
import os
import shutil
import sys
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from filelock import FileLock, Timeout

from iciia_exp.artifacts import finished_folder, resolve_cache_dir

__all__ = ["Entry", "entries", "main", "remove"]

KINDS = ("datasets", "backbones", "features")


@dataclass(frozen=True)
class Entry:
    """An artifact of the cache; ``state`` is ``whole`` or ``partial`` (left by a kill, or being made)."""

    kind: str
    path: Path
    state: str
    bytes: int
    changed: datetime


def entries(cache_dir: Path) -> list[Entry]:
    """Return the artifacts of the cache, oldest first."""
    found = []
    for kind in KINDS:
        for path in sorted((cache_dir / kind).glob("*/")):
            files = [f for f in path.rglob("*") if f.is_file()]
            size = sum(f.stat().st_size for f in files)
            changed = datetime.fromtimestamp(max([path.stat().st_mtime, *(f.stat().st_mtime for f in files)]))
            whole = finished_folder(path) and path.suffix != ".partial"
            found.append(Entry(kind, path, "whole" if whole else "partial", size, changed))
    return sorted(found, key=lambda e: e.changed)


def remove(entry: Entry) -> bool:
    """Delete an entry unless a process is making it now; return whether it was deleted."""
    path = entry.path
    try:
        with FileLock(path.with_name(f".{path.name.removesuffix('.partial')}.lock"), timeout=0):
            aside = path.rename(path.with_name(f".{path.name}.deleted"))  # at once: no reader sees half of it
            shutil.rmtree(aside)
            return True
    except Timeout:
        return False


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    about = "Prepared datasets, backbones and features that runs share."
    parser = argparse.ArgumentParser(prog="python -m iciia_exp.cache", description=about)
    parser.add_argument("command", choices=("list", "clean"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="only entries whose name contains one of these")
    default = os.environ.get("ICIIA_EXP_CACHE")
    parser.add_argument("--cache-dir", default=default, help="default: the user's cache directory")
    parser.add_argument("--partial", action="store_true", help="only entries that a killed run left unfinished")
    parser.add_argument("--older-than", type=float, metavar="DAYS", help="only entries unchanged for so many days")
    parser.add_argument("--yes", action="store_true", help="clean without asking")
    options = parser.parse_args(arguments)
    cache_dir = resolve_cache_dir(options.cache_dir)
    last_change = datetime.now() - timedelta(days=options.older_than or 0)
    chosen = [
        e
        for e in entries(cache_dir)
        if (not options.names or any(n in e.path.name for n in options.names))
        and (not options.partial or e.state == "partial")
        and (options.older_than is None or e.changed < last_change)
    ]
    print(f"{cache_dir}: {len(chosen)} entries, {sum(e.bytes for e in chosen) / 1e6:,.1f} MB")
    for e in chosen:
        unfinished = "" if e.state == "whole" else "  (unfinished)"
        print(f"  {e.bytes / 1e6:10,.1f} MB  {e.changed:%Y-%m-%d %H:%M}  {e.kind:<9}  {e.path.name}{unfinished}")
    if options.command == "list" or not chosen:
        return 0
    if not options.yes:
        if not sys.stdin.isatty():
            print("error: add --yes to clean without being asked", file=sys.stderr)
            return 2
        if input("delete these? [y/N] ").strip().lower() not in ("y", "yes"):
            return 1
    busy = [e for e in chosen if not remove(e)]
    for e in busy:
        print(f"kept {e.path.name}: a process is making it now", file=sys.stderr)
    return int(bool(busy))


if __name__ == "__main__":
    sys.exit(main())
