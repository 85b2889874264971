"""Rows, random weights and comparisons for the tests of files in other libraries' formats."""

from collections import OrderedDict

import jax.numpy as jnp
import numpy as np

from dlmscope_jax.dictionaries import load_dictionary, save_dictionary
from dlmscope_jax.dictionaries.formats import torch_pickle

D, N = 6, 20
X = (np.random.default_rng(5).normal(size=(9, D)) * 2 + 0.5).astype(np.float32)


def random(seed=0, **shapes):
    """float32 arrays of the given shapes."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def float64(arrays):
    return {name: np.asarray(array, np.float64) for name, array in arrays.items()}


def pt(path, contents):
    """A ``.pt`` file as torch writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch_pickle.save(path, OrderedDict(contents))
    return path


def largest(pre, k):
    """The k largest of each row at their places, zero elsewhere; ties to the lowest index."""
    kept = np.zeros_like(pre)
    for row, out in zip(pre, kept, strict=True):
        chosen = np.argsort(-row, kind="stable")[:k]
        out[chosen] = row[chosen]
    return kept


def agree(loaded, activations, output, x=X):
    """Dense activations and reconstructions are those of a forward pass written by hand."""
    spec, params, _ = loaded
    assert set(params) == set(spec.shapes()) and all(value.dtype == jnp.float32 for value in params.values())
    codes = spec.encode(params, jnp.asarray(x))
    assert (np.asarray(activations) != 0).any() and (np.asarray(activations) == 0).any()
    np.testing.assert_allclose(spec.dense(codes), activations, atol=1e-5 * max(1.0, np.abs(activations).max()), rtol=1e-5)
    np.testing.assert_allclose(spec.reconstruct(params, jnp.asarray(x)), output, atol=1e-5 * max(1.0, np.abs(output).max()), rtol=1e-5)


def survives(loaded, folder, activations, output, format="dlmscope", subfolder=None):
    """What was loaded is the same function after it was saved and loaded again; returns the second."""
    save_dictionary(folder, *loaded, format=format)
    again = load_dictionary(folder, subfolder)
    agree(again, activations, output)
    if format == "dlmscope":
        assert again[0] == loaded[0] and again[2] == loaded[2]
    return again
