"""The report over a thousand runs: seconds of the table, of the figures, and of the page with everything.

    python benchmarks/bench_report.py RUN [--runs 1000]

RUN is a finished run; it is copied, as so many settings with three seeds each. Medians of three.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--runs", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        row = json.loads((options.run / "results.json").read_text())
        for i in range(options.runs):
            run = folder / "runs" / str(i)
            run.mkdir(parents=True)
            for file in ("clients.parquet", "history.parquet", "attribution.parquet"):
                if (options.run / file).is_file():
                    shutil.copy(options.run / file, run)
            setting = i // 3
            new = {
                "digest": str(i),
                "evaluation_digest": str(i),
                "setting_digest": f"s{setting}",
                "seed": i % 3,
                "config.method.dropout": setting,
            }
            (run / "results.json").write_text(json.dumps(row | new))
        command = [sys.executable, "-m", "iciia_exp.report", str(folder / "runs")]
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import pandas, iciia_exp.results.tables"], check=True)
        print(f"imports: {time.perf_counter() - start:.1f} s")
        ways = {"table": [], "page": ["--html", str(folder / "page.html")], "tables and figures": ["--out", name]}
        for what, more in ways.items():
            times = []
            for _ in range(3):
                start = time.perf_counter()
                subprocess.run([*command, *more], check=True, stdout=subprocess.DEVNULL)
                times.append(time.perf_counter() - start)
            size = f", {(folder / 'page.html').stat().st_size / 2**20:.1f} MiB" if what == "page" else ""
            print(f"{what}: {statistics.median(times):.1f} s{size}", flush=True)


if __name__ == "__main__":
    main()
