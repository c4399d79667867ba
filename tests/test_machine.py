"""Freed memory stays with the process; threads share batches; both leave a user's settings as they are."""

import os
import platform
import subprocess
import sys
import threading
import time

import pytest
import torch

from iciia_exp.machine import process_count, side_by_side

# pages that a process gets for the same 40 MiB again and again, above what glibc keeps by itself
CODE = """
import resource
import numpy as np
from iciia_exp.machine import keep_freed_memory
keep_freed_memory()
def faults():
    np.ones(5 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
first = faults()
for _ in range(10):
    last = faults()
print(last - first)
"""


def pages(**environment):
    plain = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", CODE], env=plain | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's allocator")
def test_the_same_pages_are_used_again():
    got_again = pages(MALLOC_MMAP_THRESHOLD_="1000000")  # a user's setting stays: everything large goes back at once
    assert got_again > 100  # ten times 40 MiB, be it in pages of 2 MiB
    assert pages() < got_again / 4


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_what_is_made_comes_in_order(threads):
    seen, at_once, most = set(), [0], [0]
    lock = threading.Lock()
    own = torch.ones(3, requires_grad=True)

    def make(number):
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
            seen.add(threading.get_ident())
        time.sleep(0.002 * (number % 3))  # later ones are ready first
        with lock:
            at_once[0] -= 1
        return number, torch.get_num_threads(), (own * 2).requires_grad

    with torch.inference_mode():
        made = list(side_by_side(make, range(20)))
    workers = min(threads, 4)
    assert made == [(number, threads // workers, False) for number in range(20)]
    assert most[0] == len(seen) == workers
    assert torch.get_num_threads() == threads


def test_items_are_asked_for_as_they_are_needed(threads):
    asked = []
    made = side_by_side(lambda number: number, (asked.append(n) or n for n in range(1000)))
    assert [next(made) for _ in range(3)] == [0, 1, 2]
    assert len(asked) <= 3 + threads
    made.close()
    assert torch.get_num_threads() == threads


def test_an_error_comes_through(threads):
    def make(number):
        if number == 7:
            raise ValueError("the seventh")
        return number

    made = []
    with pytest.raises(ValueError, match="the seventh"):
        made.extend(side_by_side(make, range(1000)))
    assert torch.get_num_threads() == threads


def test_the_tasks_of_an_interactive_slurm_job_are_not_processes(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert process_count() == 4
    for name in ("bash", "interactive"):
        monkeypatch.setenv("SLURM_JOB_NAME", name)
        assert process_count() == 1


@pytest.mark.parametrize("ended", [True, False])
def test_a_worker_ends_with_the_command_even_if_that_has_ended_before(ended):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    code = "import time; from iciia_exp.machine import end_with_parent; end_with_parent(0.01); time.sleep(1)"
    environment = os.environ | {"ICIIA_EXP_MAIN": str(gone.pid if ended else os.getpid())}
    found = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60)
    assert found.returncode == (-9 if ended else 0)
