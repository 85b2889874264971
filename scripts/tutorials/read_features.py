# %% [markdown]
# # Reading the features of a diffusion language model
# A small masked diffusion model that ships with the package, a dictionary trained on its activations in the same minute, and what
# single latents respond to. With so few rows the dictionary is a poor one; `scripts/quickstart` trains a better one.

# %%
import tempfile
from pathlib import Path

import jax
import numpy as np

import dlmscope_jax as ds

folder = Path(tempfile.mkdtemp())
SITE = "resid_post@3"

# %% [markdown]
# ## Activations under the model's own corruption
# A diffusion model never sees clean text while it writes. Each block is masked at a rate of its own, from 5 % to all of it, and both
# masked and visible positions are kept.

# %%
model, params = ds.load_model("pocket-dlm")
tok = ds.load_tokenizer("pocket-dlm")
card = {"model": "pocket-dlm", "tokenizer": tok.digest}  # travels with the rows into the dictionary
stores = {}
for side, n_blocks in (("train", 96), ("test", 48)):
    blocks = ds.builtin_blocks(tok, block_length=256, side=side).take(slice(n_blocks))
    rates = ds.Corruption("rate", 0.05, 1.0)
    stores[side] = ds.harvest(model, params, blocks, folder / side, sites=[SITE], corruption=rates, meta=card)
print(stores["train"])
print("masked rows:", int(stores["train"].column("is_masked").sum()))

# %% [markdown]
# ## A dictionary

# %%
spec = ds.TrainSpec(ds.TopK(d_in=model.config.d_model, width=512, k=16), steps=120, batch_size=1024, lr=2e-3, site=SITE)
(trained,) = ds.train(spec, stores["train"], folder / "run")
dictionary = trained[:3]
for name, found in ds.evaluate(dictionary, stores["test"])["sets"].items():
    print(f"{name:<8} EV {found['explained_variance']:.3f}  L0 {found['l0']:.1f}  dead {found['dead_share']:.3f}  rows {found['rows']}")

# %% [markdown]
# ## Records of latents
# Fifty of them, equally many from each tenth by density: a fair sample, not the best ones. Each record holds windows of text, what the
# latent's direction says to the output head, and how often it fires at each corruption rate.

# %%
records = ds.collect_records(model, params, dictionary, stores["test"], tok)
record = max(records, key=lambda r: r.max_activation * (0.001 < r.density < 0.05))
print(f"latent {record.latent}: fires on {100 * record.density:.2f} % of rows, at most {record.max_activation:.2f}")
for window in record.windows[:4]:
    words = [f"[{p}]" if i == window.peak else p for i, p in enumerate(tok.pieces(list(window.original)))]
    print(f"  rate {window.rate:.2f}  " + "".join(words).replace("\n", "\\n"))
print("raises:", [record.pieces[int(token)] for token, _ in record.logit_lens["top"]])

# %% [markdown]
# ## From a text to latents, and from a word to latents

# %%
found = ds.latents_for(model, params, dictionary, "for name in names:\n    print(name)", rate=0.3, seed=1, top=3)
for piece, masked, active in zip(found["original_pieces"], found["is_masked"], found["active"], strict=True):
    print(f"{piece!r:<12} {'masked' if masked else '':<7} {active}")
for hit in ds.find_latents(records, "self")[:5]:
    print(f"latent {hit['latent']:>4}  {hit['score']:.2f}  {'; '.join(hit['why'])}")

# %% [markdown]
# ## Steering while the model denoises
# The same prompt and the same random numbers, with and without the latent's direction added at every step.

# %%
prompt, _ = ds.encode(tok, ["def area(self, "])
sampler = ds.LLaDASampler(steps=12, gen_length=12, block_length=12)
edit = ds.steer(*dictionary[:2], record.latent, SITE, 3.0, scale="corpus_max", maximum=record.max_activation)
for name, edits in (("plain", ()), ("steered", (edit,))):
    trace = ds.generate(model, params, np.asarray(prompt), sampler, key=jax.random.key(0), edits=edits)
    print(f"{name:<8}", repr(tok.decode(np.asarray(trace.tokens)[0].tolist())))
    print("  order ", np.asarray(trace.commit_step)[0, prompt.shape[1] :].tolist())
