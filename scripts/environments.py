"""Environments: one small experiment in hostile surroundings, each of which must end in the same numbers or one line.

    python scripts/environments.py [NAME ...]

Prints a table: the environment, what was seen, and whether that is right. Cases with file systems of their own (full,
read-only) need root on Linux and are skipped elsewhere. Exit status 1 if a case is wrong. It takes minutes.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

COMMAND = (
    *("-m", "iciia_exp", "logger=csv", "trainer=cpu", "method=prior_map", "backbone.recipe.epochs=1"),
    *("partition.deals=1", "evaluation.history_orders=1", "evaluation.examples=2"),
)


@dataclass
class Case:
    """Surroundings of the command."""

    #: Variables to set; None unsets one. ``{folder}`` is the case's own folder, ``{disk}`` its file system.
    env: dict[str, str | None] = field(default_factory=dict)
    #: Shell text around the command, ``{command}``.
    shell: str = "{command}"
    #: Options of a tmpfs that is mounted at ``{disk}``.
    mount: str | None = None
    #: Pattern of the one error line; None: the command runs, with the same numbers.
    error: str | None = None
    #: Further overrides.
    more: tuple[str, ...] = ()


OUT = {"ICIIA_EXP_OUTPUT": "{disk}/out"}
CACHE = {"ICIIA_EXP_CACHE": "{disk}/cache"}
CASES = {
    "plain": Case(),
    "no HOME": Case({"HOME": None, "XDG_CACHE_HOME": None}),
    "HOME is no folder": Case({"HOME": "/dev/null", "XDG_CACHE_HOME": None}),
    "no HOME, cache of the user": Case(
        {"HOME": "/dev/null", "ICIIA_EXP_CACHE": None, "XDG_CACHE_HOME": None}, error="/dev/null"
    ),
    "read-only output": Case(OUT, mount="ro", error="Read-only"),
    "read-only cache": Case(CACHE, mount="ro", error="Read-only"),
    "full disk for the cache": Case(CACHE, mount="size=1m", error="No space left|full"),
    "full disk for the outputs": Case(OUT, mount="size=48k", error="No space left|full"),
    "full TMPDIR": Case({"TMPDIR": "{disk}"}, mount="size=4k"),
    "TMPDIR that does not exist": Case({"TMPDIR": "/nowhere"}),
    "ASCII terminal": Case({"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}),
    "Latin-1 terminal": Case({"PYTHONIOENCODING": "latin-1"}),
    "C locale": Case({"LC_ALL": "C", "LANG": None, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "dumb, narrow terminal": Case({"TERM": "dumb", "COLUMNS": "20"}),
    "output that nobody reads": Case(shell="{command} | head -1"),
    "output closed": Case(shell="{command} >&-"),
    "input closed": Case(shell="{command} <&-"),
    "errors closed": Case(shell="{command} 2>&-"),
    "one task of a SLURM job": Case(
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    ),
    "second task of a SLURM job": Case(
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"},
        shell="timeout 20 {command}",
        error="waits for the first",
    ),
    "an interactive SLURM shell": Case({"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "bash", "SLURM_NTASKS": "4"}),
    "WORLD_SIZE is no number": Case({"WORLD_SIZE": "abc"}, error="WORLD_SIZE"),
    "OMP_NUM_THREADS is no number": Case({"OMP_NUM_THREADS": "abc"}),
    "few open files": Case(shell="ulimit -n 64; {command}"),
    "no GPU to see": Case({"CUDA_VISIBLE_DEVICES": "-1"}),
    "python -O": Case({"PYTHONOPTIMIZE": "1"}),
    "python -OO": Case({"PYTHONOPTIMIZE": "2"}),
    "a proxy that is none": Case({"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}),
    "a wandb key that is none": Case({"WANDB_API_KEY": "x", "WANDB_MODE": None}),
    "no folder for Matplotlib": Case({"MPLCONFIGDIR": "/dev/null/x"}),
    "a working folder with brackets, spaces and umlauts": Case(
        shell="mkdir -p './[a] b ü' && cd './[a] b ü' && {command}"
    ),
    "a working folder that was deleted": Case(
        shell="mkdir gone && cd gone && rmdir ../gone && {command}", error="working folder"
    ),
}


def seen(name: str, case: Case, root: Path) -> tuple[str, bool]:
    """Run a case; return what was seen, and whether it is right."""
    folder = root / re.sub(r"\W+", "-", name)
    disk = folder / "disk"
    disk.mkdir(parents=True)
    if case.mount is not None:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", case.mount, "tmpfs", str(disk)], capture_output=True)
        if mounted.returncode:
            return "skipped: file systems cannot be mounted here", True
    try:
        env = os.environ | {"ICIIA_EXP_CACHE": f"{folder}/cache", "ICIIA_EXP_OUTPUT": f"{folder}/out"}
        for key, value in case.env.items():
            if value is None:
                env.pop(key, None)
            else:
                env[key] = value.format(folder=folder, disk=disk)
        command = case.shell.format(command=" ".join([sys.executable, *COMMAND, *case.more]))
        done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, timeout=300)
        out, err = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
        said = [line for line in err.splitlines() if line.strip()]
        found = [json.loads(path.read_text()) for path in Path(env["ICIIA_EXP_OUTPUT"]).rglob("results.json")]
        if "Traceback" in out + err:
            return f"TRACEBACK: {said[-1] if said else ''}", False
        if case.error is None:
            text = (
                f"{100 * found[0]['accuracy']:.4f} %" if found else f"exit {done.returncode}: {' '.join(said)[-200:]}"
            )
            return text, bool(found)
        last = (said or out.splitlines() or [""])[-1]
        return f"exit {done.returncode}: {last[-160:]}", bool(re.search(case.error, last))
    finally:
        if case.mount is not None:
            subprocess.run(["umount", "-l", str(disk)], capture_output=True)


def main() -> int:
    """Run the cases; return the exit status."""
    root = Path(tempfile.mkdtemp(prefix="environments-"))
    wrong, numbers = [], set()
    try:
        for name in sys.argv[1:] or CASES:
            text, right = seen(name, CASES[name], root)
            numbers |= {text} if text.endswith(" %") else set()
            wrong += [] if right else [name]
            print(f"{'ok   ' if right else 'WRONG'} {name}: {text}", flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    if len(numbers) > 1:
        print(f"WRONG the numbers differ: {', '.join(sorted(numbers))}")
    print(f"{len(wrong)} wrong")
    return int(bool(wrong) or len(numbers) > 1)


if __name__ == "__main__":
    sys.exit(main())
