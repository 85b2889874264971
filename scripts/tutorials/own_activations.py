# %% [markdown]
# # Your own activations
# Rows from any framework go into a store, a dictionary is trained on them, and its fidelity is measured on rows that it has not seen.
# Here the rows are made up, from known directions, so that we can ask at the end whether the dictionary found them.

# %%
import tempfile
from pathlib import Path

import numpy as np

import dlmscope_jax as ds

folder = Path(tempfile.mkdtemp())
rng = np.random.default_rng(0)
WIDTH, TRUE, ACTIVE = 48, 96, 4
directions = rng.standard_normal((TRUE, WIDTH))
directions /= np.linalg.norm(directions, axis=1, keepdims=True)


def rows(n: int) -> np.ndarray:
    """Rows that are sums of a few directions, as your hook would give them: [n, WIDTH] float32."""
    found = np.zeros((n, WIDTH))
    for _ in range(ACTIVE):
        found += rng.uniform(1, 2, (n, 1)) * directions[rng.integers(TRUE, size=n)]
    return found.astype(np.float32)


# %% [markdown]
# ## A store
# `append` takes any number of rows at a time; what is larger than memory is written as it comes. Site names and columns are yours. A
# row here belongs to a document, because intervals are drawn over documents.

# %%
for side, n_documents in (("train", 120), ("test", 40)):
    store = ds.ActivationStore.create(folder / side, sites={"my_layer": WIDTH}, meta={"model": "mine"})
    for document in range(n_documents):
        store.append({"my_layer": rows(500)}, {"document": np.full(500, document, np.int32)})
    store.finish()

store = ds.ActivationStore.open(folder / "train")
print(store)
batch = next(iter(store.batches(batch_size=8, seed=0)))
print({name: values.shape for name, values in batch.items()})

# %% [markdown]
# ## Training
# The same call again would load what is finished, and a killed one goes on where it was.

# %%
spec = ds.TrainSpec(ds.TopK(d_in=WIDTH, width=192, k=ACTIVE), steps=600, batch_size=512, lr=3e-3, site="my_layer")
(trained,) = ds.train(spec, store, folder / "run")
print(trained.path, trained.meta.input_scale)

# %% [markdown]
# ## What it found
# Each true direction against the decoder row that is nearest to it.

# %%
decoder = np.asarray(trained.params["W_dec"])
decoder = decoder / np.linalg.norm(decoder, axis=1, keepdims=True)
similarity = (directions @ decoder.T).max(axis=1)
print(f"directions with a decoder row at cosine above .9: {(similarity > 0.9).sum()} of {TRUE}")

test = ds.ActivationStore.open(folder / "test").read("my_layer", 0, 4096).astype(np.float32)
found = ds.StreamingFidelity.init(192, WIDTH).update(trained.spec, trained.params, test).finish()
print(f"held out: explained variance {found['explained_variance']:.3f}, L0 {found['l0']:.2f}, dead {found['dead_share']:.3f}")
assert found["explained_variance"] > 0.8 and (similarity > 0.9).mean() > 0.5
