"""DiffuGPT-s and -m: GPT-2 small and medium trained on as diffusion models; every key visible, position i predicts token i + 1.

Their ``config.json`` is GPT-2's, told from it by its architecture ``DiscreteDiffusionModel``. The mask token does not stand in
it: DiffuGPT-s took a word of GPT-2's vocabulary for it, DiffuGPT-m appended a token, and both are what the released code sets.
The embedding of DiffuGPT-m has that one row more than ``vocab_size`` may say.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from dlmscope_jax.errors import UserError

from ..config import DiffusionSpec, ModelConfig
from .gpt2 import IGNORED as IGNORED
from .gpt2 import gpt2_tensors, read_gpt2_like
from .gpt2 import write as write_gpt2
from .reading import Keys, Tensor, checked

ARCHITECTURE = "DiscreteDiffusionModel"
MASK_ID = {768: 10541, 1024: 50257}  # of the released models, by their width


def read(keys: Keys) -> tuple[ModelConfig, DiffusionSpec]:
    """Reads a ``config.json`` of model type ``gpt2`` with the architecture ``DiscreteDiffusionModel``.

    Raises:
      UserError: for a model of another width than the released ones that does not say its mask token.
    """
    config = read_gpt2_like(keys, "diffugpt", "bidirectional")
    mask_id = keys.take("mask_token_id", default=MASK_ID.get(config.d_model), kind=int)
    if mask_id is None:
        raise UserError(f"{keys.where}: key 'mask_token_id' is missing: n_embd {config.d_model} is not that of a released DiffuGPT")
    config = dataclasses.replace(config, vocab_size=max(config.vocab_size, mask_id + 1))
    return checked(keys, config, DiffusionSpec(mask_id=mask_id, shift=True))


def tensors(config: ModelConfig, names: Collection[str] = frozenset()) -> dict[tuple[str, ...], Tensor]:
    """Our paths -> tensor names: the embedding stands apart from the network."""
    return gpt2_tensors(config, "embed_tokens.weight", "denoise_model.")


def write(config: ModelConfig, diffusion: DiffusionSpec | None) -> dict[str, Any]:
    """The ``config.json`` of such a model; it also says the mask token."""
    return write_gpt2(config, None) | {"architectures": [ARCHITECTURE], "mask_token_id": diffusion.mask_id}
