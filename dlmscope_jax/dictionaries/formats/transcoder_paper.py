"""Files of the transcoder paper's code (Dunefsky, Chlenski & Nanda 2024): ``.pt``, ``.pkl`` or ``.pkl.gz`` with configuration and weights.

    z = ReLU(W_enc (x - b_dec) + b_enc),   y = W_dec z + b_dec_out        transcoder; our b_in is b_dec, our b_dec is b_dec_out
                                           y = W_dec z + b_dec            autoencoder, which has one decoder bias

Matrices are ``(d_in, n)`` and ``(n, d_out)``. The configuration is a pickled object of the code's own class, which is read as plain
data. Activations are those of a TransformerLens model with folded and centred weights (``models.process_weights``): the hook
``blocks.8.ln2.hook_normalized`` is its ``mlp_in@8``. A file of log frequencies beside the weights is read too.
"""

import re
from pathlib import Path
from reprlib import repr as short  # a pickle's lists may hold each other many times
from typing import Any

import numpy as np

from dlmscope_jax.errors import UserError

from ..meta import DictionaryMeta
from ..relu import ReLU
from .bare_pickle import PickleFile
from .hooks import from_hook
from .state_files import choose
from .tensors import state_dict, to_jax
from .torch_pickle import Inert, TorchFile

FILES = ()  # the user names the file
_NAME = re.compile(r"(?!.*_log_feature_sparsity\.).*\.(?:pt|pkl|pkl\.gz)")
_RELEASED = "final_sparse_autoencoder_"
# what the configuration says of the training, kept for the card
_KEPT = ("l1_coefficient", "lr", "use_ghost_grads", "dead_feature_window", "total_training_tokens", "dataset_path", "context_size")


def recognises(folder: Path, files: frozenset[str], config: Any) -> bool:
    """Whether a file has the released name, or the only pickle is a bare one or holds ``cfg`` and ``state_dict``."""
    found = [name for name in files if _NAME.fullmatch(name)]
    if any(name.startswith(_RELEASED) for name in found):
        return True
    if len(found) != 1 or config is not None:
        return False
    if not found[0].endswith(".pt"):
        return True
    with TorchFile(folder / found[0]) as file:
        return isinstance(file.contents, dict) and {"cfg", "state_dict"} <= file.contents.keys()


def load(folder: Path, files: frozenset[str], config: Any) -> tuple[ReLU, dict, DictionaryMeta]:
    """Reads the one file that is offered.

    Raises:
      UserError: several files, no configuration, sizes that contradict it, tensors missing, unexpected or misshapen, a pickle that asks for
        code.
    """
    path = choose(folder, files, _NAME)
    with _open(path) as file:
        if not isinstance(file.contents, dict) or not isinstance(file.contents.get("cfg"), Inert):
            raise UserError(f"{path}: holds no configuration beside the weights (cfg and state_dict)")
        cfg = vars(file.contents["cfg"])
        tensors = state_dict(file, file.contents.get("state_dict"))
        d, width = tensors.matrix("W_enc")
        transcoder = cfg.get("is_transcoder", False) is True
        if transcoder != ("b_dec_out" in tensors.shapes):
            raise UserError(f"{path}: is_transcoder is {transcoder}, but b_dec_out is {'missing' if transcoder else 'there'}")
        d_out = tensors.matrix("W_dec")[1] if transcoder else None
        for key, size in (("d_in", d), ("d_sae", width), ("d_out", d_out)):
            if size is not None and cfg.get(key) not in (None, size):
                raise UserError(f"{path}: {key} is {short(cfg[key]):.60} in its configuration, the weights have {size}")
        spec = ReLU(d_in=d, width=width, d_out=d_out, input_bias=transcoder, error="over_norm")
        names = {"b_in": "b_dec", "b_dec": "b_dec_out"} if transcoder else {}
        params = tensors.params(spec, names, transposed=("W_enc",))
    hooks = [cfg.get(key) if isinstance(cfg.get(key), str) else "unknown" for key in ("hook_point", "out_hook_point")]
    (site, layer), (target, _) = (from_hook(hook) for hook in hooks)
    extra = {"format": "transcoder_paper"} | {key: cfg[key] for key in _KEPT if isinstance(cfg.get(key), str | int | float)}
    extra |= {"target": target} if transcoder else {}
    meta = DictionaryMeta(
        model=cfg["model_name"] if isinstance(cfg.get("model_name"), str) else "unknown",
        site=site,
        layer=layer,
        weight_processing="folded",
        seed=cfg["seed"] if type(cfg.get("seed")) is int else None,
        extra=extra | _frequencies(path, width),
    )
    return spec, to_jax(params), meta


def _open(path: Path) -> TorchFile:
    return TorchFile(path) if path.suffix == ".pt" else PickleFile(path)


def _frequencies(path: Path, width: int) -> dict[str, Any]:
    """log10 of how often each latent was active, where that file is there."""
    stem, ending = re.fullmatch(r"(.*?)(\.pt|\.pkl|\.pkl\.gz)", path.name).groups()
    beside = path.with_name(f"{stem}_log_feature_sparsity{ending}")
    if not beside.is_file():
        return {}
    with _open(beside) as file:
        if file.shape(file.contents) != (width,):
            raise UserError(f"{beside}: should hold {width} frequencies, has the shape {list(file.shape(file.contents))}")
        values = np.asarray(file.read(file.contents), np.float64)
    if not np.isfinite(values).all():
        raise UserError(f"{beside}: holds frequencies that are not finite")
    return {"log_feature_sparsity": [round(float(value), 4) for value in values]}
