"""Reading models from ordinary Hugging Face folders (``config.json`` and safetensors), here or in a bucket, without torch."""

import hashlib
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from dlmscope_jax.distributed import replicated
from dlmscope_jax.errors import UserError

from .families import Keys, family_of
from .folders import LocalFolder, RemoteFolder, open_folder
from .sharding import partition_specs
from .streaming import load_arrays
from .transformer import Transformer, init_params
from .weights import DTYPES, Weights

_HEADS = ("lm_head.weight", "embed_out.weight", "transformer.ff_out.weight")  # files may repeat a tied head


def load_model(name: str | os.PathLike, dtype: str = "float32", mesh: Mesh | None = None) -> tuple[Transformer, dict]:
    """Loads a language model of any supported family, a few megabytes at a time.

    Args:
      name: a pocket model, a folder, a URL (``gs://``, ``s3://``) or a hub id.
      dtype: ``"float32"`` or ``"bfloat16"``, of the parameters and of the computation.
      mesh: a ``("data", "model")`` mesh: each process reads the parts that its own devices hold, each part once.

    Returns:
      The model and its parameters, ``model.apply(params, tokens)``.

    Raises:
      UserError: for a folder, key, tensor name or shape that does not fit; all wrong tensors are named at once.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype {dtype!r} is not supported: 'float32' or 'bfloat16'")
    folder = open_folder(name)
    try:
        model = _read_model(folder, dtype)
        params = load_params(model, Weights(folder), mesh)
    finally:
        folder.close()
    return model.clone(mesh=mesh), {"params": params}


def load_params(model: Transformer, weights: Weights, mesh: Mesh | None = None) -> dict:
    """The parameters of a model from the files of its folder: what ``{"params": ...}`` holds; see ``load_model``.

    ``weights.folder.bytes_read`` counts what this process reads.
    """
    family, where = family_of(model.config.family, weights.folder.where), weights.folder.where
    table = family.tensors(model.config, frozenset(weights.tensors))
    abstract = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))["params"]
    leaves = {_path(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(abstract)}
    _check(where, weights, table, leaves, model.config.n_layers, getattr(family, "IGNORED", ()))
    if mesh is None:
        shardings = dict.fromkeys(leaves, SingleDeviceSharding(jax.local_devices()[0]))
    else:
        specs = partition_specs(abstract, mesh)
        shardings = {_path(path): NamedSharding(mesh, spec) for path, spec in jax.tree.leaves_with_path(specs)}
    together: dict[Any, list[tuple[str, ...]]] = {}  # arrays with rows of a file's tensor in common are read together
    for path in leaves:
        shared = table[path].fused is not None and not table[path].transposed
        together.setdefault(table[path].name if shared else path, []).append(path)
    params: dict[str, Any] = {}
    for paths in together.values():
        tensors, shapes, layouts = zip(*((table[path], leaves[path], shardings[path]) for path in paths), strict=True)
        arrays = load_arrays(weights, tensors, shapes, layouts, paths[0][0] == "blocks", model.dtype)
        for path, array in zip(paths, arrays, strict=True):
            place = params
            for key in path[:-1]:
                place = place.setdefault(key, {})
            place[path[-1]] = array
    return params


def read_model(name: str | os.PathLike, dtype: str = "float32") -> Transformer:
    """The network that a ``config.json`` describes, without its weights; ``name`` as in ``load_model``.

    Raises:
      UserError: for a missing or unreadable file, an unsupported family, or a key that is not understood.
    """
    return _read_model(open_folder(name), dtype)


def _read_model(folder: LocalFolder | RemoteFolder, dtype: str) -> Transformer:
    where = f"{folder.where}/config.json"
    raw = folder.read("config.json")
    if raw is None:
        raise UserError(f"{folder.where} holds no config.json: it is not a model folder")
    try:
        mapping = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(mapping, dict):
        raise UserError(f"{where} holds a {type(mapping).__name__}, not the mapping of a model's configuration")
    keys = Keys(mapping, where)
    architectures = mapping.get("architectures")
    family = family_of(mapping.get("model_type"), where, architectures if isinstance(architectures, list) else None)
    config, diffusion = family.read(keys)
    keys.finish()
    return Transformer(config, diffusion, jnp.dtype(dtype))


def _check(where: str, weights: Weights, table: dict, leaves: dict, n_layers: int, ignored: tuple[str, ...]) -> None:
    """Names every missing, unexpected and misshapen tensor in one error."""
    wanted: dict[str, tuple[int, ...]] = {}
    for path, shape in leaves.items():
        stacked = path[0] == "blocks"
        stored = table[path].stored_shape(shape[1:] if stacked else shape)
        wanted |= {table[path].name.format(layer=i): stored for i in (range(n_layers) if stacked else [0])}
    ignored = (*ignored, "rotary_emb.inv_freq") + (() if ("head",) in table else _HEADS)
    found = weights.tensors
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in wanted and not _ends(name, ignored)]
    for name, shape in wanted.items():
        if name in found and found[name].shape != shape:
            problems.append(f"{name} has shape {found[name].shape}, wanted {shape}")
        if name in found and found[name].dtype not in DTYPES:
            problems.append(f"{name} has dtype {found[name].dtype}, wanted one of {', '.join(DTYPES)}")
    if problems:
        raise UserError(f"{where}: the weights do not fit config.json: {'; '.join(problems)}")


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return any(name == e or name.endswith("." + e) for e in endings)


def _path(path: tuple) -> tuple[str, ...]:
    return tuple(key.key for key in path)


def model_identity(model: Transformer, params: dict) -> str:
    """A short hash of what a model computes: its configuration and the sums of its weights, whatever their dtype or sharding.

    Activations and dictionaries carry it, so that they are not used on another model by mistake.
    """
    digest = hashlib.sha256(repr((model.config.facts(), model.diffusion)).encode())
    summary = _summary(params["params"])
    if model.mesh is not None:  # small, and every process needs all of it
        summary = jax.device_put(summary, replicated(model.mesh))
    for path, leaf in jax.tree.leaves_with_path(summary):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


@jax.jit
def _summary(tree: Any) -> Any:
    """A weighted sum of the bits of every row of every weight, rounded to bfloat16 first: either dtype gives the same."""
    bits = lambda leaf: jax.lax.bitcast_convert_type(leaf.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)  # noqa: E731
    ramp = lambda leaf: jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, leaf.ndim - 1) * jnp.uint32(2654435761) + jnp.uint32(1)  # noqa: E731
    return jax.tree.map(lambda leaf: (bits(leaf) * ramp(leaf)).sum(axis=tuple(range(1, leaf.ndim)), dtype=jnp.uint32), tree)
