"""Freed memory stays with the process, unless the user has decided otherwise."""

import os
import platform
import subprocess
import sys

import pytest

# pages that a process gets for the same 40 MiB again and again, above what glibc keeps by itself
CODE = """
import resource
import numpy as np
from iciia_exp.memory import keep_freed_memory
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's allocator")
def test_the_same_pages_are_used_again():
    got_again = pages(MALLOC_MMAP_THRESHOLD_="1000000")  # a user's setting stays: everything large goes back at once
    assert got_again > 100  # ten times 40 MiB, be it in pages of 2 MiB
    assert pages() < got_again / 4
