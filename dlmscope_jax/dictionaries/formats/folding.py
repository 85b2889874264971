"""Exact rewritings of parameters that other formats need: the function stays the same, up to rounding.

NumPy in and out, so that a writer needs no device for them. All are done in float64 and rounded once.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from dlmscope_jax.errors import UserError

from ..meta import DictionaryMeta

Params = dict[str, np.ndarray]


def subtracting(spec: Any, params: Params, subtract: bool) -> tuple[Any, Params]:
    """An autoencoder that subtracts ``b_dec`` before encoding, or one that does not; the difference goes into the encoder's biases.

    ``W (x - b_dec) + b = W x + (b - W b_dec)``.
    """
    if spec.subtract == subtract:
        return spec, params
    return replace(spec, subtract=subtract), _shifted(params, params["b_dec"], 1.0 if subtract else -1.0)


def without_input_bias(spec: Any, params: Params) -> tuple[Any, Params]:
    """A transcoder whose ``b_in`` has gone into the encoder's biases."""
    if not spec.input_bias:
        return spec, params
    rest = {name: array for name, array in params.items() if name != "b_in"}
    return replace(spec, input_bias=False), _shifted(rest, params["b_in"], -1.0)


def unit_decoder(params: Params) -> Params:
    """Decoder rows of norm 1; the encoder and its biases, and so the activations, take the norms. A zero row stays zero.

    Thresholds stay as they are: they must already be meant for activations times norms.

    The function stays the same where each latent's activation commutes with a positive factor of its own: everywhere but in a
    choice that compares latents (TopK, BatchTopK), which changes unless it already compared activations times norms.
    """
    norm = np.linalg.norm(params["W_dec"].astype(np.float64), axis=1)
    divisor = np.where(norm > 0, norm, 1.0)
    out = params | {"W_dec": _single(params["W_dec"] / divisor[:, None]), "W_enc": _single(params["W_enc"] * norm[:, None])}
    return out | {name: _single(params[name] * norm) for name in ("b_enc", "b_gate", "b_mag") if name in params}


def checked(spec: Any, params: dict, meta: DictionaryMeta, format: str) -> Params:
    """Parameters as NumPy arrays float32, once they may be written in ``format``.

    Raises:
      UserError: they act on rows divided by a scale that is not folded; a dictionary that the format cannot say.
    """
    if not meta.scale_folded:
        raise UserError(f"the {format} format holds no input scale: fold it first, spec.fold(params, meta.input_scale)")
    return {name: np.asarray(value, np.float32, order="C") for name, value in params.items()}


def _shifted(params: Params, by: np.ndarray, sign: float) -> Params:
    product = sign * (params["W_enc"].astype(np.float64) @ by.astype(np.float64))
    out = dict(params)
    for name in ("b_enc", "b_gate"):
        if name in params:
            out[name] = _single(params[name] + product)
    if "b_mag" in params:
        out["b_mag"] = _single(params["b_mag"] + np.exp(params["r_mag"].astype(np.float64)) * product)
    return out


def _single(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float32, order="C")
