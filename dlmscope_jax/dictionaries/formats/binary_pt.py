"""Binary autoencoders of Cho et al.'s code: ``model_<time>.pt``, a state dict and nothing else.

    bits = 1[W_in x + b_in > 0],   y = W_out bits [+ b]

The file says neither which model it belongs to nor which function follows the decoder; every documented run uses none
(reference/binary_autoencoder.md 1.1, 5), and that is what is read.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from dlmscope_jax.errors import UserError

from ..binary import Binary
from ..meta import DictionaryMeta
from .state_files import keys, only_file
from .tensors import state_dict, to_jax
from .torch_pickle import TorchFile

FILES = ()  # the user names the file
_NAME = re.compile(r"model_.*\.pt")
_NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "decoder.bias"}
_LAYERS = frozenset(_NAMES.values())


def recognises(folder: Path, files: frozenset[str], config: Any) -> bool:
    """Whether the only ``.pt`` file holds two linear layers, ``encoder`` and ``decoder``, and nothing beside them."""
    return config is None and keys(folder, files) in (_LAYERS, _LAYERS - {"decoder.bias"})


def load(folder: Path, files: frozenset[str], config: Any) -> tuple[Binary, dict, DictionaryMeta]:
    """Reads the file; a decoder without bias gets one of zeros. Model, layer and site are not in it.

    Raises:
      UserError: a name that is not the released code's, because other dictionaries hold the same layers; misshapen tensors.
    """
    path = folder / str(only_file(files))
    if not _NAME.fullmatch(path.name):
        raise UserError(
            f"{path}: two linear layers can be many kinds of dictionary; a binary autoencoder's file is called model_<time>.pt, Goodfire's"
            " <model>-SAE-l<layer>.pt, and dictionary_learning's has a config.json beside it"
        )
    with TorchFile(path) as file:
        tensors = state_dict(file, file.contents)
        width, d = tensors.matrix("encoder.weight")
        spec = Binary(d_in=d, width=width)
        params = tensors.params(spec, _NAMES, transposed=("W_dec",), given={"b_dec": np.zeros(d, np.float32)})
    return spec, to_jax(params), DictionaryMeta(model="unknown", site="unknown", layer=-1, extra={"format": "binary"})
