"""Goodfire's ReLU autoencoders: one ``.pt`` file, ``Llama-3.1-8B-Instruct-SAE-l19.pth`` or ``DeepSeek-R1-SAE-l37.pt``.

    f = ReLU(W_enc x + b_enc),   y = W_dec f + b_dec

Two linear layers, ``encoder_linear`` and ``decoder_linear``; those for DeepSeek R1 are called ``encoder`` and ``decoder``, as in many
other files, and are known by the file's name.
"""

import re
from pathlib import Path
from typing import Any

from ..meta import DictionaryMeta
from ..relu import ReLU
from .state_files import keys, only_file
from .tensors import state_dict, to_jax
from .torch_pickle import TorchFile

FILES = ()  # the user names the file
_NAME = re.compile(r"(.+)-SAE-l(\d+)\.pth?")
_MODELS = {"Llama": "meta-llama/", "DeepSeek": "deepseek-ai/"}


def recognises(folder: Path, files: frozenset[str], config: Any) -> bool:
    """Whether the only ``.pt`` file holds ``encoder_linear``, or plain layers under a name of Goodfire's."""
    held = keys(folder, files)
    plain = _NAME.fullmatch(only_file(files) or "") and {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"} == held
    return "encoder_linear.weight" in held or bool(plain)


def load(folder: Path, files: frozenset[str], config: Any) -> tuple[ReLU, dict, DictionaryMeta]:
    """Reads the file; layer and model come from its name, where it still has the released one.

    Raises:
      UserError: tensors missing, unexpected or misshapen.
    """
    path = folder / str(only_file(files))
    with TorchFile(path) as file:
        tensors = state_dict(file, file.contents)
        encoder, decoder = ("encoder_linear", "decoder_linear") if "encoder_linear.weight" in tensors.shapes else ("encoder", "decoder")
        width, d = tensors.matrix(f"{encoder}.weight")
        spec = ReLU(d_in=d, width=width, subtract=False)
        names = {"W_enc": f"{encoder}.weight", "b_enc": f"{encoder}.bias", "W_dec": f"{decoder}.weight", "b_dec": f"{decoder}.bias"}
        params = tensors.params(spec, names, transposed=("W_dec",))
    name = _NAME.fullmatch(path.name)
    owner = _MODELS.get(name[1].partition("-")[0], "") if name else ""
    layer = int(name[2]) if name else -1
    meta = DictionaryMeta(
        model=f"{owner}{name[1]}" if name else "unknown",
        site=f"resid_post@{layer}" if name else "unknown",
        layer=layer,
        extra={"format": "goodfire"},
    )
    return spec, to_jax(params), meta
