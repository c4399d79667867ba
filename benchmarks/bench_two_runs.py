"""How two trainings on one machine slow each other down, by how OpenMP's threads wait for work.

``python -m iciia_exp`` sets GOMP_SPINCOUNT=1000 unless the user has chosen a policy. This measures what that costs a
run that is alone and what it saves two that are not: milliseconds per training step of ICIIA (D = 512, 8 clients of 16
images), median over repeats, for each policy.

    python benchmarks/bench_two_runs.py
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

STEPS = """
import time, torch
from torch.nn import functional as F
from iciia_exp.models.iciia import ICIIA
torch.manual_seed(0)
model = ICIIA(512, 10, 1)
optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=True)
x, y = torch.randn(8, 16, 512), torch.randint(0, 10, (128,))
def steps(n):
    start = time.perf_counter()
    for _ in range(n):
        loss = F.cross_entropy(model(x).flatten(0, 1), y)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    return (time.perf_counter() - start) / n * 1000
steps(10)
print(steps(100))
"""


POLICIES: dict[str, dict[str, str]] = {
    "libgomp's default": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
}


def measure(policy: dict[str, str], processes: int) -> float:
    """Return the mean milliseconds per step of so many processes at once."""
    plain = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command, environment = [sys.executable, "-c", STEPS], plain | policy
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(processes)]
    return statistics.mean(float(p.communicate()[0]) for p in running)


def main(repeats: int = 3) -> None:
    """Print one line per policy."""
    print(f"{os.cpu_count()} cores; ms per step, median of {repeats}")
    print(f"{'':<26}{'one run':>10}{'two at once':>14}")
    for name, policy in POLICIES.items():
        alone, together = (statistics.median(measure(policy, n) for _ in range(repeats)) for n in (1, 2))
        print(f"{name:<26}{alone:>10.1f}{together:>14.1f}", flush=True)


if __name__ == "__main__":
    main()
