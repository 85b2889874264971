# %% [markdown]
# # Steering a diffusion language model while it denoises
# A latent's direction is added to the residual stream at every forward pass of a generation: at all positions or only where tokens
# are still masked, during all steps or only the first ones. What it does to the text is counted beside a control, a random direction
# of the same length. The model is the small one that ships with the package, the dictionary is trained in half a minute, so expect
# effects rather than prose.

# %%
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import dlmscope_jax as ds

folder = Path(tempfile.mkdtemp())
SITE = "resid_post@3"
model, params = ds.load_model("pocket-dlm")
tok = ds.load_tokenizer("pocket-dlm")

# %% [markdown]
# ## A dictionary on what the model sees while it writes

# %%
blocks = ds.builtin_blocks(tok, block_length=256, side="train").take(slice(64))
store = ds.harvest(model, params, blocks, folder / "rows", sites=[SITE], corruption=ds.Corruption("rate", 0.05, 1.0))
spec = ds.TrainSpec(ds.TopK(d_in=model.config.d_model, width=384, k=16), steps=80, batch_size=1024, lr=2e-3, site=SITE)
(trained,) = ds.train(spec, store, folder / "run")
dictionary, weights = trained[:2]

# %% [markdown]
# ## A latent that speaks
# The output head reads each decoder row. Among the tokens that the text uses often, every latent has ten favourites; the latent that
# raises its own most, above the mean of the others, is the one whose effect is easiest to count.

# %%
counts = np.bincount(blocks.tokens.ravel(), minlength=model.config.vocab_size)
counts[[model.config.bos_id, model.config.pad_id]] = 0
common = np.flatnonzero(counts >= 40)
rows = jnp.stack([dictionary.direction(weights, i) for i in range(dictionary.width)])
scores = ds.logit_lens(model, params, rows, norm="frozen")[:, common]
raised, favourites = jax.lax.top_k(scores, 10)
latent = int(jnp.argmax(raised.mean(axis=1) - scores.mean(axis=1)))
words = common[np.asarray(favourites[latent])]
print(f"latent {latent} raises", tok.pieces(words.tolist()))

# %% [markdown]
# ## Plain, steered, and the control
# Sixteen texts each, with the same random numbers. Strength is in units of the residual stream's own length at each position, so
# that two directions are compared at the same size of change. New strengths and directions run the program that is compiled once.

# %%
prompt, _ = ds.encode(tok, ["def "] * 16)
sampler = ds.LLaDASampler(steps=16, gen_length=16, block_length=16, temperature=0.7)
direction = dictionary.direction(weights, latent)
noise = jax.random.normal(jax.random.key(1), direction.shape)
noise = noise / jnp.linalg.norm(noise) * jnp.linalg.norm(direction)


def toward(value, strength, **where):
    """Adds a direction with a length of ``strength`` times a typical residual vector."""
    return ds.Edit("add", SITE, value / jnp.linalg.norm(value) * typical, strength=strength, **where)


def favourites_written(edits, sampler=sampler):
    """Share of the new tokens that are among the latent's ten favourites, and the trace."""
    trace = ds.generate(model, params, prompt, sampler, key=jax.random.key(0), edits=edits)
    return np.isin(np.asarray(trace.tokens)[:, prompt.shape[1] :], words).mean(), trace


watched = ds.Collect(sites=(SITE,), steps=(0, 8, 15))
plain = ds.generate(model, params, prompt, sampler, key=jax.random.key(0), collect=watched)
typical = float(jnp.linalg.norm(plain.taps["resid_post"][3].astype(jnp.float32), axis=-1).mean())
print(f"a residual vector here is {typical:.1f} long; kept activations: {plain.taps['resid_post'][3].shape}")
for strength in (0.0, 0.5, 1.0):
    steered, control = (favourites_written((toward(value, strength),))[0] for value in (direction, noise))
    print(f"strength {strength}: favourites are {100 * steered:4.1f} % of the new tokens, with the random direction {100 * control:4.1f} %")

# %% [markdown]
# ## When, and where
# A schedule has one factor a denoising step; a rule for positions is applied anew at every step. Early steps decide most: what is
# committed is not taken back.

# %%
early = np.where(np.arange(16) < 8, 1.0, 0.0)
for name, where in (
    ("all steps, all positions", {}),
    ("the first eight steps", {"schedule": early}),
    ("the last eight steps", {"schedule": 1.0 - early}),
    ("masked positions only", {"positions": "masked"}),
    ("the prompt only", {"positions": "prompt"}),
):
    share, _ = favourites_written((toward(direction, 1.0, **where),))
    print(f"{name:<26} {100 * share:4.1f} %")

# %% [markdown]
# ## The order of writing
# Steering changes not only what is written but when. Mean step at which each position was committed, plain and steered:

# %%
_, steered = favourites_written((toward(direction, 1.0),))
for name, trace in (("plain", plain), ("steered", steered)):
    order = np.asarray(trace.commit_step)[:, prompt.shape[1] :].mean(axis=0)
    print(f"{name:<8}", " ".join(f"{step:4.1f}" for step in order))

# %% [markdown]
# ## Fewer passes
# Confidence-aware parallel decoding commits every token that is sure enough, so that a row needs fewer passes than it has tokens.
# Each row goes at its own pace: its passes are the distinct steps at which its tokens were committed. The edit is the same value;
# only the sampler changes.

# %%
fast = ds.ParallelSampler(gen_length=16, block_length=8, threshold=0.1, temperature=0.7)
for name, edits in (("plain", ()), ("steered", (toward(direction, 1.0),))):
    share, trace = favourites_written(edits, fast)
    passes = np.mean([len(set(row)) for row in np.asarray(trace.commit_step)[:, prompt.shape[1] :].tolist()])
    print(f"{name:<8} 16 tokens in {passes:.1f} forward passes a row on average, favourites {100 * share:4.1f} %")
print(repr(tok.decode(np.asarray(trace.tokens)[0].tolist())))
