"""Memory that a process keeps: asked of a process of its own, because it cannot be taken back."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys, threading
from dlmscope_jax.training import heap

def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])

sizes = []

def work():
    before = resident()
    block = bytearray(100_000_000)
    block[::4096] = b"\\1" * len(block[::4096])
    sizes.append(resident() - before)
    del block
    sizes.append(resident() - before)

if sys.argv[1] == "keep":
    assert heap.keep_freed_memory()
thread = threading.Thread(target=work)  # another thread than the first has a heap of its own, unless told otherwise
thread.start()
thread.join()
before = resident()
assert heap.release_freed_memory() or sys.argv[1] == "leave"
print(*sizes, before - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_is_freed_stays_with_the_process():
    def run(how: str) -> list[float]:
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        return [float(size) / 1e6 for size in done.stdout.split()]

    full, left, _ = run("leave")
    assert full > 90 and left < 10
    full, left, released = run("keep")
    assert full > 90 and left > 90 and released > 90


def test_a_c_library_that_does_not_know_how(monkeypatch):
    from dlmscope_jax.training import heap

    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    assert not heap.keep_freed_memory() and not heap.release_freed_memory()
    monkeypatch.setattr(heap.sys, "platform", "darwin")
    assert not heap.keep_freed_memory() and not heap.release_freed_memory()
