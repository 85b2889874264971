"""Reading and writing models as ordinary Hugging Face folders (``config.json`` and safetensors), without torch."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dlmscope_jax.errors import UserError

from .families import Keys, family_of
from .sharding import partition_specs
from .transformer import Transformer, init_params

POCKET = ("pocket-dlm", "pocket-ar", "pocket-dream")
_PATTERNS = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab*", "merges*", "special_tokens*"]


def resolve_folder(name: str | os.PathLike) -> Path:
    """The folder of a model: a pocket model's, a given one, or a download of a hub id (the only case that needs a network).

    Raises:
      UserError: when there is no such folder, or the hub does not give it.
    """
    text = os.fspath(name)
    if text in POCKET:
        return Path(__file__).parent.parent / "pocket" / text
    if Path(text).is_dir():
        return Path(text)
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or Path(text.split("/")[0]).is_dir():
        raise UserError(f"model {text!r}: no such folder; give a folder, a hub id (OWNER/NAME) or one of {', '.join(POCKET)}")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(text, allow_patterns=_PATTERNS))
    except Exception as error:  # the hub client raises many kinds; all mean the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model {text!r}: neither a folder nor to be had from the hub ({reason})") from error


def load_model(name: str | os.PathLike, dtype: str = "float32", mesh: Mesh | None = None) -> tuple[Transformer, dict]:
    """Loads a language model of any supported family.

    Args:
      name: a pocket model, a folder or a hub id.
      dtype: ``"float32"`` or ``"bfloat16"``, of the parameters and of the computation.
      mesh: a ``("data", "model")`` mesh: each device reads its own part of each file and no array exists whole.

    Returns:
      The model and its parameters, ``model.apply(params, tokens)``.

    Raises:
      UserError: for a folder, key, tensor name or shape that does not fit; all wrong tensors are named at once.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype {dtype!r} is not supported: 'float32' or 'bfloat16'")
    folder = resolve_folder(name)
    model = read_model(folder, dtype)
    abstract = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))["params"]
    table = family_of(model.config.family, str(folder)).tensors(model.config)
    files = _Files(folder)
    leaves = {tuple(p.key for p in path): leaf for path, leaf in jax.tree.leaves_with_path(abstract)}
    _check(folder, files, table, leaves, model.config.n_layers)
    if mesh is None:
        shardings = dict.fromkeys(leaves, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    else:
        specs = partition_specs(abstract, mesh)
        shardings = {tuple(p.key for p in path): NamedSharding(mesh, spec) for path, spec in jax.tree.leaves_with_path(specs)}
    params: dict[str, Any] = {}
    for path, leaf in leaves.items():
        read = _reader(files, table[path], leaf.shape, path[0] == "blocks", jnp.dtype(dtype))
        place = params
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = jax.make_array_from_callback(leaf.shape, shardings[path], read)
    return model, {"params": params}


def read_model(folder: Path, dtype: str = "float32") -> Transformer:
    """The network that a folder's ``config.json`` describes, without its weights.

    Raises:
      UserError: for a missing or unreadable file, an unsupported family, or a key that is not understood.
    """
    where = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist")
    try:
        mapping = json.loads(where.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} holds no config.json: it is not a model folder") from None
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(mapping, dict):
        raise UserError(f"{where} holds a {type(mapping).__name__}, not the mapping of a model's configuration")
    keys = Keys(mapping, str(where))
    config, diffusion = family_of(mapping.get("model_type"), str(where)).read(keys)
    keys.finish()
    return Transformer(config, diffusion, jnp.dtype(dtype))


class _Files:
    """The safetensors of a folder, opened by memory map; one handle a file."""

    def __init__(self, folder: Path):
        index = folder / "model.safetensors.index.json"
        if index.exists():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{index} is damaged: it should map tensor names to files under weight_map") from None
        else:
            names = sorted(p.name for p in folder.glob("*.safetensors"))
        if not names:
            raise UserError(f"{folder} holds no .safetensors file")
        self.of: dict[str, Any] = {}
        for name in names:
            try:
                file = safe_open(folder / name, framework="numpy")
            except FileNotFoundError:
                raise UserError(f"{folder}: {name} is named by the index but is not there") from None
            except SafetensorError as error:
                raise UserError(f"{folder / name} is damaged or not a safetensors file ({error})") from None
            self.of.update(dict.fromkeys(file.keys(), file))

    def slice(self, name: str) -> Any:
        return self.of[name].get_slice(name)


def _check(folder: Path, files: _Files, table: dict, leaves: dict, n_layers: int) -> None:
    """Names every missing, unexpected and misshapen tensor in one error."""
    wanted: dict[str, tuple[int, ...]] = {}
    for path, leaf in leaves.items():
        tensor, stacked = table[path], path[0] == "blocks"
        shape = leaf.shape[1:] if stacked else leaf.shape
        shape = shape[::-1] if tensor.transposed else shape
        wanted |= {tensor.name.format(layer=i): shape for i in (range(n_layers) if stacked else [0])}
    ignored = ("rotary_emb.inv_freq",) if ("head",) in table else ("rotary_emb.inv_freq", "lm_head.weight", "transformer.ff_out.weight")
    problems = [f"missing {name}" for name in wanted if name not in files.of]
    problems += [f"unexpected {name}" for name in files.of if name not in wanted and not _ends(name, ignored)]
    for name, shape in wanted.items():
        if name in files.of and tuple(files.slice(name).get_shape()) != shape:
            problems.append(f"{name} has shape {tuple(files.slice(name).get_shape())}, wanted {shape}")
    if problems:
        raise UserError(f"{folder}: the weights do not fit config.json: {'; '.join(problems)}")


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return any(name == e or name.endswith("." + e) for e in endings)


def _reader(files: _Files, tensor: Any, shape: tuple[int, ...], stacked: bool, dtype: Any) -> Any:
    """A function that reads one device's part of one of our arrays; only those bytes are touched."""

    def one(name: str, index: tuple[slice, ...]) -> np.ndarray:
        index = index[::-1] if tensor.transposed else index
        part = np.asarray(files.slice(name)[index]).astype(dtype)
        return part.T if tensor.transposed else part

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not stacked:
            return one(tensor.name, index)
        return np.stack([one(tensor.name.format(layer=i), index[1:]) for i in range(*index[0].indices(shape[0]))])

    return read


def save_model(folder: str | os.PathLike, model: Transformer, params: dict, dtype: str = "bfloat16") -> None:
    """Writes ``config.json`` and ``model.safetensors`` in the family's own layout; the inverse of ``load_model``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    family = family_of(model.config.family, str(folder))
    flat = {tuple(p.key for p in path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(params["params"])}
    out: dict[str, np.ndarray] = {}
    for path, tensor in family.tensors(model.config).items():
        layers = enumerate(flat[path]) if path[0] == "blocks" else [(0, flat[path])]
        for i, value in layers:
            value = value.T if tensor.transposed else value
            out[tensor.name.format(layer=i)] = np.ascontiguousarray(value.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype))
    part = folder / "model.safetensors.part"
    save_file(out, part, metadata={"format": "pt"})
    part.chmod(0o644)  # the library makes files that only their owner can read
    part.rename(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(family.write(model.config, model.diffusion) | {"torch_dtype": dtype}, indent=2) + "\n")


def model_identity(model: Transformer, params: dict) -> str:
    """A short hash of what a model computes: its configuration and the sums of its weights, whatever their dtype or sharding.

    Activations and dictionaries carry it, so that they are not used on another model by mistake.
    """
    digest = hashlib.sha256(repr((model.config, model.diffusion)).encode())
    for path, leaf in jax.tree.leaves_with_path(_summary(params["params"])):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


@jax.jit
def _summary(tree: Any) -> Any:
    """A weighted sum of the bits of every row of every weight, rounded to bfloat16 first: either dtype gives the same."""
    bits = lambda leaf: jax.lax.bitcast_convert_type(leaf.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)  # noqa: E731
    ramp = lambda leaf: jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, leaf.ndim - 1) * jnp.uint32(2654435761) + jnp.uint32(1)  # noqa: E731
    return jax.tree.map(lambda leaf: (bits(leaf) * ramp(leaf)).sum(axis=tuple(range(1, leaf.ndim)), dtype=jnp.uint32), tree)
