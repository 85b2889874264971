# %% [markdown]
# # A released dictionary on LLaDA
# DLM-Scope published dictionaries for LLaDA and Dream. This opens one on its model, measures it on held-out text, and looks at one
# of its latents. The real files need about 16 GB for the model and 0.5 GB for a dictionary:
#
#     MODEL = "GSAI-ML/LLaDA-8B-Base"
#     DICTIONARY, SUBFOLDER = "AwesomeInterpretability/llada-mask-topk-sae", "resid_post_layer_16/trainer_1"
#
# So that the script runs anywhere, it first makes a stand-in in the same file layouts: a tiny LLaDA folder with random weights, and a
# dictionary as dictionary_learning writes it. Its numbers mean nothing; the way is the same.
# `dlmscope quickstart configs/open_dlm_scope_llada.yaml` does all of this for the real ones, with a report.

# %%
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np

import dlmscope_jax as ds
from dlmscope_jax.models import save_model

folder = Path(tempfile.mkdtemp())


def make_stand_in() -> tuple[Path, Path, str]:
    """A tiny LLaDA and a released-style dictionary for its block 1, as folders."""
    config = ds.ModelConfig(
        family="llada", vocab_size=2048, d_model=32, n_layers=3, n_heads=2, n_kv_heads=2, head_dim=16, d_mlp=64, norm_eps=1e-5,
        rope_theta=10000.0, max_positions=128, attention="bidirectional", rope_float32=True, bos_id=0, eos_id=1, pad_id=2,
    )  # fmt: skip
    model = ds.Transformer(config, ds.DiffusionSpec(mask_id=3, shift=False))
    save_model(folder / "llada", model, ds.init_params(model, jax.random.key(0)))
    pocket = Path(ds.__file__).parent / "pocket"
    tokenizer = pocket / "pocket-dlm" if (pocket / "pocket-dlm" / "tokenizer.json").exists() else pocket
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / "llada")
    subfolder = "resid_post_layer_1/trainer_1"
    spec = ds.TopK(d_in=32, width=128, k=8)
    meta = ds.DictionaryMeta(model="GSAI-ML/LLaDA-8B-Base", site="resid_post@1", layer=1, select="masked")
    ds.save_dictionary(folder / "sae" / subfolder, spec, spec.init(jax.random.key(1)), meta, format="dictionary_learning")
    return folder / "llada", folder / "sae", subfolder


MODEL, DICTIONARY, SUBFOLDER = make_stand_in()

# %% [markdown]
# ## Opening
# The `.pt` file is read without executing anything in it. What the card says is checked where the dictionary is used.

# %%
model, params = ds.load_model(MODEL)
tok = ds.load_tokenizer(MODEL)
dictionary = spec, weights, meta = ds.load_dictionary(DICTIONARY, SUBFOLDER)
print(spec)
print(meta.site, meta.select, meta.corruption)

# %% [markdown]
# ## Held-out rows
# Under the rates that it was trained on. Masked and visible rows are kept apart, because they are two clouds.

# %%
blocks = ds.builtin_blocks(tok, block_length=128, side="test").take(slice(24))
store = ds.harvest(model, params, blocks, folder / "rows", sites=[meta.site], corruption=ds.Corruption("rate", 0.05, 0.5))
fidelity = ds.evaluate(dictionary, store)
for name, found in fidelity["sets"].items():
    print(f"{name:<8} rows {found['rows']:>6}  EV {found['explained_variance']:.3f}  L0 {found['l0']:.1f}  dead {found['dead_share']:.3f}")

# %% [markdown]
# ## What inserting it costs
# Nats a masked token, beside noise of the same size and zeros; every condition sees the same masks.

# %%
cost = ds.delta_loss(model, params, dictionary, blocks.take(slice(8)), rates=(0.25, 0.45))
for row in cost["rows"]:
    if row["rate"] == 0.45:
        print(f"{row['condition']:<10} loss change {row['delta']['value']:+.4f}   KL {row['kl']['value']:.4f}")

# %% [markdown]
# ## One latent
# Where it fires in a sentence, and what its direction says to the output head.

# %%
tokens, mask = ds.encode(tok, ["def area(width, height):"])
out = model.apply(params, tokens, attention_mask=mask, logits=False, collect=(meta.site,))
codes = np.asarray(spec.dense(spec.encode(weights, out.taps["resid_post"][1][0])))
latent = int(codes.max(axis=0).argmax())
lens = np.asarray(ds.logit_lens(model, params, spec.direction(weights, latent), norm="frozen"))
print(f"latent {latent} fires at {int((codes[:, latent] > 0).sum())} positions; it raises {tok.pieces(lens.argsort()[::-1][:5].tolist())}")
