"""Small rows with known structure, and a way to look at the state that a training ends with."""

import jax
import numpy as np
import pytest

from dlmscope_jax.dictionaries import TopK
from dlmscope_jax.training import TrainSpec, run


def sparse_rows(n: int, d: int = 16, features: int = 32, active: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows [n, d] that are sums of ``active`` of the unit ``features`` [features, d], off centre and far from unit norm."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(features, d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    chosen = np.argsort(rng.random((n, features)), axis=1)[:, :active]
    codes = np.zeros((n, features))
    np.put_along_axis(codes, chosen, rng.uniform(0.5, 1.5, (n, active)), axis=1)
    centre = rng.normal(size=d)
    return (5.0 * (codes @ directions) + centre).astype(np.float32), directions


def small_spec(**changes) -> TrainSpec:
    """A training that compiles once for this whole folder, where a test does not need another."""
    return TrainSpec(
        **{"dictionary": TopK(16, 64, 4), "steps": 24, "batch_size": 64, "lr": 3e-3, "sample_rows": 256, "dead_rows": 320} | changes
    )


@pytest.fixture
def final_states(monkeypatch):
    """Folder name -> the whole state with which a training ended; filled by ``train``."""
    found = {}
    finish = run.Run.finish

    def keep(self):
        found[self.folder.name] = jax.device_get(self.state)
        finish(self)

    monkeypatch.setattr(run.Run, "finish", keep)
    return found


def assert_same_bits(one, other) -> None:
    """Every leaf equal in structure, dtype and bits."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape, jax.tree_util.keystr(path)
        assert a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)
