"""``dlmscope doctor``: what this machine has, and whether the built-in corpus is the one that the pocket models learned from."""

import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path

import dlmscope_jax

from .configs import Run

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "transformers", "tokenizers", "numpy", "torch")
_POCKET = Path(dlmscope_jax.__file__).parent / "pocket"


def doctor(run: Run) -> dict[str, str]:
    """Prints one line a finding and returns the findings.

    Args:
      run: only its root is looked at: the disk that runs are written to.
    """
    found = {"python": platform.python_version(), "dlmscope_jax": dlmscope_jax.__version__}
    found |= {package: _version(package) for package in _PACKAGES}
    found["cores"] = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    found["devices"] = _devices()
    found["disk"] = _disk(Path(run.root))
    found |= {name: _pocket_model(name) for name in ("pocket-dlm", "pocket-dream", "pocket-ar")}
    found["corpus"] = _corpus()
    for name, text in found.items():
        print(f"{name:<17} {text}")
    return found


def corpus_manifest() -> dict[str, str] | None:
    """Document name -> hash, of the corpus that the pocket models learned from; None where no card is shipped."""
    path = _POCKET / "corpus.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent" + (" (only the parity tests need it)" if package == "torch" else "")


def _devices() -> str:
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        return f"none: {error}"
    stats = devices[0].memory_stats() or {}
    memory = f", {stats['bytes_limit'] / 2**30:.0f} GiB each" if "bytes_limit" in stats else ""
    return f"{len(devices)} {devices[0].platform} ({devices[0].device_kind}){memory}"


def _disk(root: Path) -> str:
    at = root.absolute()
    while not at.exists():
        at = at.parent
    return f"{shutil.disk_usage(at).free / 2**30:.1f} GiB free at {at}"


def _pocket_model(name: str) -> str:
    weights = _POCKET / name / "model.safetensors"
    return f"{weights.stat().st_size / 1e6:.1f} MB" if weights.is_file() else f"absent: {weights.parent} holds no model.safetensors"


def _corpus() -> str:
    from dlmscope_jax.data import builtin_documents, count_matches
    from dlmscope_jax.errors import UserError

    try:
        documents = builtin_documents()
    except UserError as error:
        return str(error)
    wanted = corpus_manifest()
    if wanted is None:
        return f"{len(documents)} documents; no card to compare them with"
    same, total = count_matches(wanted, documents)
    return f"{same} of the card's {total} files match, of {len(documents)} documents here"
