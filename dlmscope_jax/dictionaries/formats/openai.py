"""OpenAI's sparse autoencoders (Gao et al. 2024): one ``.pt`` file with a state dict.

    latents = act(W_enc (norm(x) - pre_bias) + latent_bias),   y = unnorm(W_dec latents + pre_bias)

``norm`` is a layer norm (unbiased deviation + 1e-5, undone without the 1e-5) where the activation is TopK, and nothing where it is
ReLU. A file without ``decoder.weight`` has tied weights. Buffers of training, and keys that a TopK leaves behind
(``activation.k``), are no parameters (reference/sae_libraries.md 2.4, 8).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from reprlib import repr as short  # a pickle's lists may hold each other many times
from typing import Any

from dlmscope_jax.errors import UserError

from ..meta import DictionaryMeta
from ..relu import ReLU
from ..topk import TopK
from .state_files import keys, only_file
from .tensors import state_dict, to_jax
from .torch_pickle import LazyTensor, TorchFile

FILES = ()  # the user names the file
_NAMES = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "latent_bias", "b_dec": "pre_bias"}
_STRAY = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square", "activation.k", "decoder.linear.weight")
# .../gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt
_PLACE = re.compile(r"(resid_delta_attn|resid_delta_mlp|resid_post_attn|resid_post_mlp|mlp_post_act)[^/]*/autoencoders/(\d+)\.pt$")
_SITES = {
    "resid_delta_attn": "attn_out",
    "resid_delta_mlp": "mlp_out",
    "resid_post_attn": "resid_mid",
    "resid_post_mlp": "resid_post",
    "mlp_post_act": "mlp_act",
}


def recognises(folder: Path, files: frozenset[str], config: Any) -> bool:
    """Whether the only ``.pt`` file holds ``pre_bias``, ``latent_bias`` and ``encoder.weight``."""
    return config is None and {"pre_bias", "latent_bias", "encoder.weight"} <= keys(folder, files)


def load(folder: Path, files: frozenset[str], config: Any) -> tuple[TopK | ReLU, dict, DictionaryMeta]:
    """Reads the file. Layer and site are known only where its path still has the released form, ``.../autoencoders/8.pt``.

    Raises:
      UserError: another activation than ReLU or TopK, no k, tensors missing, unexpected or misshapen.
    """
    path = folder / str(only_file(files))
    with TorchFile(path) as file:
        given = {name.removeprefix("_orig_mod."): value for name, value in file.contents.items()}
        held = {name: value for name, value in given.items() if isinstance(value, LazyTensor)}
        width, d = state_dict(file, held).matrix("encoder.weight")
        spec = _spec(path, given, d, width)
        tied = "decoder.weight" not in held
        if tied:
            encoder = held["encoder.weight"]
            held["decoder.weight"] = replace(encoder, shape=tuple(encoder.shape)[::-1], stride=tuple(encoder.stride)[::-1])
        params = state_dict(file, held).params(spec, _NAMES, transposed=("W_dec",), ignored=_STRAY)
    where = path.absolute().as_posix()
    place = _PLACE.search(where)
    layer = int(place[2]) if place else -1
    return (
        spec,
        to_jax(params),
        DictionaryMeta(
            model="gpt2" if "gpt2-small" in where else "unknown",
            site=f"{_SITES[place[1]]}@{layer}" if place else "unknown",
            layer=layer,
            extra={"format": "openai", "tied": tied},
        ),
    )


def _spec(path: Path, given: Mapping[str, Any], d: int, width: int) -> TopK | ReLU:
    activation, settings = given.get("activation"), given.get("activation_state_dict")
    if activation == "ReLU":
        return ReLU(d_in=d, width=width)
    settings = settings if isinstance(settings, Mapping) else {}
    k, after = settings.get("k"), settings.get("postact_fn", "ReLU")
    if activation != "TopK" or type(k) is not int or after not in ("ReLU", "Identity"):
        raise UserError(
            f"{path}: activation {short(activation):.60} (k {short(k):.60}, then {short(after):.60}) is not read: ReLU and TopK with k are"
        )
    return TopK(d_in=d, width=width, k=k, rule="positive" if after == "ReLU" else "raw", row_norm="layer_norm")
