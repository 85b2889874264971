"""What every test runs under: no slow or torch tests unless wanted, strict dtypes where the mathematics is, one compile cache."""

import gc
import inspect
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")

# Compiling is most of what the tests do, and the same programs come back in every run. Subprocesses inherit it.
# One folder a worker: two processes that write one entry at the same moment would tear it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax" / WORKER))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# A test never reaches for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# In these folders an implicit promotion (bf16 + f32, int + float) is an error. Not everywhere: optax relies on promotion.
STRICT_ROOMS = ("kernels", "dictionaries", "models")
_IMPORTS_TORCH = re.compile(r"^(import torch|from torch)\b", re.MULTILINE)
_left_out = {"torch": 0, "slow": 0}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-torch", action="store_true", help="leave out the tests that compare with torch")
    parser.addoption("--full", action="store_true", help="run the slow tests too")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--no-torch"):
        sys.modules["torch"] = None  # type: ignore[assignment]  # an import fails as it does where torch is not installed


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without torch, a file that imports it cannot even be read."""
    if config.getoption("--no-torch") and collection_path.suffix == ".py" and _IMPORTS_TORCH.search(collection_path.read_text()):
        _left_out["torch"] += 1
        return True
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted, unwanted = [], []
    spared = set() if config.getoption("--full") else _spared(items)
    for item in items:
        if _compares_with_torch(item) and config.getoption("--no-torch"):
            _left_out["torch"] += 1
            unwanted.append(item)
        elif item in spared or (item.get_closest_marker("slow") and not config.getoption("--full")):
            _left_out["slow"] += 1
            unwanted.append(item)
        else:
            wanted.append(item)
    if unwanted:
        config.hook.pytest_deselected(items=unwanted)
        items[:] = wanted


def _spared(items: list[pytest.Item]) -> set[pytest.Item]:
    """The cases of tests marked ``some(n)`` beside the n that stand evenly among all of them."""
    cases: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("some"):
            cases.setdefault((item.path, item.nodeid.partition("[")[0]), []).append(item)
    spared: set[pytest.Item] = set()
    for those in cases.values():
        n = those[0].get_closest_marker("some").args[0]
        spared |= set(those) - {those[i * len(those) // n] for i in range(min(n, len(those)))}
    return spared


def _compares_with_torch(item: pytest.Item) -> bool:
    function = getattr(item, "function", None)
    return bool(item.get_closest_marker("torch")) or (function is not None and 'importorskip("torch")' in inspect.getsource(function))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker of xdist: only the controller speaks to the terminal
        session.config.workeroutput["left_out"] = _left_out


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    _left_out.update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--no-torch"):
        terminalreporter.write_line(f"--no-torch: left out what compares with torch ({_left_out['torch']} tests or files)")
    if _left_out["slow"]:
        terminalreporter.write_line(f"left out {_left_out['slow']} slow tests; --full runs them")


@pytest.fixture(autouse=True)
def strict_dtypes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Strict dtype promotion around the tests of kernels, dictionaries and model forwards."""
    rooms = Path(request.node.path).relative_to(ROOT / "tests").parts
    if rooms[0] not in STRICT_ROOMS or request.node.get_closest_marker("standard_promotion"):
        yield
        return
    import jax

    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Drops a file's compiled programs behind it: each holds memory maps, of which a process may have 65,530."""
    yield
    if "jax" in sys.modules:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def run_with_devices() -> Callable[..., str]:
    """Runs a script in a process of its own with so many virtual CPU devices, and returns what it printed.

    Virtual devices are fixed when jax starts, so they are given to the tests that need them and to no other.
    """

    def run(script: str, n_devices: int = 8, timeout: float = 300) -> str:
        flags = f"--xla_force_host_platform_device_count={n_devices} --xla_cpu_collective_call_terminate_timeout_seconds=300"
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
