"""Qwen-Scope's TopK autoencoders: ``layer{N}.sae.pt`` in a folder named after model, width and k.

    f = the k largest of W_enc x + b_enc, negative ones kept,   y = W_dec f + b_dec

The file has neither k nor a name: both come from the folder, ``SAE-Res-Qwen3-8B-Base-W64K-L0_50``.
"""

import re
from pathlib import Path
from typing import Any

from dlmscope_jax.errors import UserError

from ..meta import DictionaryMeta
from ..topk import TopK
from .state_files import choose
from .tensors import state_dict, to_jax
from .torch_pickle import TorchFile

FILES = ()  # the user names the file
_FILE = re.compile(r"layer(\d+)\.sae\.pt")
_FOLDER = re.compile(r"SAE-Res-([\w.-]+?)-W(\d+)K-L0_(\d+)(?=/|$)")


def recognises(folder: Path, files: frozenset[str], config: Any) -> bool:
    """Whether a file is called ``layer{N}.sae.pt``."""
    return any(_FILE.fullmatch(name) for name in files)


def load(folder: Path, files: frozenset[str], config: Any) -> tuple[TopK, dict, DictionaryMeta]:
    """Reads the one file that is offered.

    Raises:
      UserError: several files, a path without the folder's name, a width that is not the name's, tensors missing or misshapen.
    """
    path = choose(folder, files, _FILE)
    name = _FOLDER.search(folder.absolute().as_posix())
    if not name:
        raise UserError(f"{path}: does not say what k is; keep it in its folder, which does: SAE-Res-Qwen3-8B-Base-W64K-L0_50")
    layer = int(re.findall(r"\d+", path.name)[0])
    with TorchFile(path) as file:
        tensors = state_dict(file, file.contents)
        width, d = tensors.matrix("W_enc")
        if width != int(name[2]) * 1024:
            raise UserError(f"{path}: has {width} latents, but its folder {name[0]} names {int(name[2]) * 1024}")
        spec = TopK(d_in=d, width=width, k=int(name[3]), rule="raw", subtract=False)
        params = tensors.params(spec, transposed=("W_dec",))
    meta = DictionaryMeta(model=f"Qwen/{name[1]}", site=f"resid_post@{layer}", layer=layer, extra={"format": "qwen_scope"})
    return spec, to_jax(params), meta
