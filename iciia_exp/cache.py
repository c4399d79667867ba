"""Cache: ``python -m iciia_exp.cache`` lists and cleans the datasets, backbones and features that runs share."""

import argparse
import os
import re
import shutil
import stat
import sys
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from filelock import Timeout

from iciia_exp.artifacts import is_temporary, read_json, resolve_cache_dir, unused
from iciia_exp.checksums import CHECKSUMS
from iciia_exp.errors import UserError, printable
from iciia_exp.output import exit_status, print_error

__all__ = ["Entry", "entries", "main", "remove"]

KINDS = ("datasets", "backbones", "features")

# names of artifacts, unfinished ones, and those whose removal was killed
_NAME = r"[^.].*-[0-9a-f]{12}(?:\.partial)?"
_OURS = re.compile(rf"{_NAME}|\.{_NAME}\.deleted")
# files that a kill left while they were written
_TEMPORARY = re.compile(r"\.[^.].*-[0-9a-f]{12}(\.\w+)?\.[a-z0-9_]{8}")


@dataclass(frozen=True)
class Entry:
    """An artifact of the cache; ``state`` is ``whole`` or ``partial`` (left by a kill, or being made)."""

    kind: str
    path: Path
    state: str
    bytes: int
    changed: datetime


def entries(cache_dir: Path) -> list[Entry]:
    """Return the artifacts of the cache, oldest first.

    A folder is an artifact if its name ends in a digest and it has our manifest, or is unfinished (``.partial``). Other
    folders, and links, are somebody else's.
    """
    found = []
    for kind in KINDS:
        for path in sorted((cache_dir / kind).glob("*")):
            if path.is_symlink() or not path.is_dir() or _OURS.fullmatch(path.name) is None:
                continue
            unfinished = path.suffix in (".partial", ".deleted")
            if not unfinished and not _has_manifest(path):
                continue
            inside = [os.path.join(at, file) for at, _, files in os.walk(path) for file in files]
            status = [there for file in (str(path), *inside) if (there := _status(file)) is not None]
            if not status:  # it has been finished, or deleted, this moment
                continue
            changed = datetime.fromtimestamp(max(s.st_mtime for s in status))
            size = sum(s.st_size for s in status if stat.S_ISREG(s.st_mode))
            found.append(Entry(kind, path, "partial" if unfinished else "whole", size, changed))
    return sorted(found, key=lambda e: e.changed)


def _status(file: str) -> os.stat_result | None:
    """Return the status of a file or folder; None if another process has just renamed or deleted it."""
    try:
        return os.lstat(file)
    except FileNotFoundError:
        return None


def _has_manifest(path: Path) -> bool:
    try:
        return isinstance(read_json(path / "manifest.json").get("format"), int)
    except UserError:  # damaged: ours, if it has checksums
        return (path / CHECKSUMS).is_file()


def remove_temporary(cache_dir: Path) -> None:
    """Delete the files that a kill left while they were written."""
    for kind in KINDS:
        for path in (cache_dir / kind).glob(".*"):
            ours = path.is_file() and not path.is_symlink() and _TEMPORARY.fullmatch(path.name)
            if ours and is_temporary(path.name, cache_dir / kind):
                path.unlink(missing_ok=True)


def remove(entry: Entry) -> str | None:
    """Delete an entry; return why it was kept, or None."""
    path = entry.path
    try:
        with unused(path.with_name(_artifact(path.name))):
            aside = path
            if not path.name.startswith("."):  # else left by a removal that was killed
                aside = path.with_name(f".{path.name}.deleted")
                if aside.is_dir():  # of an earlier removal that was killed
                    shutil.rmtree(aside)
                path.rename(aside)  # at once: no reader sees half of it
            if aside.is_dir():
                shutil.rmtree(aside)
            return None
    except Timeout:
        return "a process is making or reading it now"
    except OSError as error:  # a folder in it is mounted or protected
        return f"{error.filename}: {error.strerror}"


def _artifact(name: str) -> str:
    return name.removeprefix(".").removesuffix(".deleted").removesuffix(".partial")


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
    options = parser.parse_intermixed_args(arguments)
    return exit_status(lambda: _list_or_clean(options), failed=2)


def _list_or_clean(options: argparse.Namespace) -> int:
    if options.cache_dir == "":
        raise UserError("ICIIA_EXP_CACHE or --cache-dir is empty; name a folder, or unset it")
    if "" in options.names:
        raise UserError("NAME is empty, and every name contains it; leave it out to choose all")
    if options.older_than is not None and not 0 <= options.older_than < 1e6:
        raise UserError(f"--older-than {options.older_than:g}: must be a number of days, 0 to 1,000,000")
    cache_dir = resolve_cache_dir(options.cache_dir)
    now = datetime.now()
    chosen = [
        e
        for e in entries(cache_dir)
        if (not options.names or any(n in e.path.name for n in options.names))
        and (not options.partial or e.state == "partial")
        and (options.older_than is None or now - e.changed > timedelta(days=options.older_than))
    ]
    there = "" if cache_dir.is_dir() else "no such folder, "
    print(f"{cache_dir}: {there}{len(chosen)} entries, {sum(e.bytes for e in chosen) / 1e6:,.1f} MB")
    for e in chosen:
        name = printable(e.path.name) + ("" if e.state == "whole" else "  (unfinished)")
        print(f"  {e.bytes / 1e6:10,.1f} MB  {e.changed:%Y-%m-%d %H:%M}  {e.kind:<9}  {name}")
    if options.command == "list":
        return 0
    if chosen and not options.yes:
        if not sys.stdin.isatty():
            print_error("add --yes to clean without being asked")
            return 2
        if input("delete these? [y/N] ").strip().lower() not in ("y", "yes"):
            return 1
    remove_temporary(cache_dir)
    kept = [(entry, why) for entry in chosen if (why := remove(entry)) is not None]
    for entry, why in kept:
        print(printable(f"kept {entry.path.name}: {why}", lines=False), file=sys.stderr)
    return int(bool(kept))


if __name__ == "__main__":
    sys.exit(main())
