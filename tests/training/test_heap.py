"""Memory that a process keeps: asked of a process of its own, because it cannot be taken back."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from dlmscope_jax.training import heap

def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])

if sys.argv[1] == "keep":
    assert heap.keep_freed_memory() and heap.keep_freed_memory()
before = resident()
block = bytearray(100_000_000)
block[::4096] = b"\\1" * len(block[::4096])
full = resident()
del block
print(full - before, resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_is_freed_stays_with_the_process():
    def run(how: str) -> list[float]:
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        return [float(size) / 1e6 for size in done.stdout.split()]

    full, left = run("leave")
    assert full > 90 and left < 10
    full, left = run("keep")
    assert full > 90 and left > 90


def test_a_c_library_that_does_not_know_how(monkeypatch):
    from dlmscope_jax.training import heap

    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    assert heap.keep_freed_memory.__wrapped__() is False
    monkeypatch.setattr(heap.sys, "platform", "darwin")
    assert heap.keep_freed_memory.__wrapped__() is False
