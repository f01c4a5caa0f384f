from __future__ import annotations

import platform
import subprocess
import sys

import pytest

ROUNDS = """
import resource, sys, threading
import numpy as np
from raydistill.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def work():
    for _ in range(20):
        layers = [np.ones(2**20) for _ in range(4)]
        del layers

def measured():
    work()
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    work()
    print(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

thread = threading.Thread(target=measured)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_thread_that_frees_its_tensors_gets_the_same_pages_again() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", ROUNDS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("default", "keep")
    }
    assert faults["default"] > 20 * faults["keep"]
