"""What a training run carries from step to step, and how it begins."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from dlmscope_jax import distributed
from dlmscope_jax.dictionaries import CrossLayer, Dictionary
from dlmscope_jax.errors import UserError

from .averaging import corrected
from .optimisers import Optimiser, make_optimiser
from .program import Numbers, Program, numbers_of, program_of
from .spec import TrainSpec


@struct.dataclass
class TrainState:
    """Everything that a resumed run needs; the batch of a step is a function of (seed, step), so no random state is here.

    Attributes:
      step: batches seen, skipped ones included.
      params: of the dictionary, float32, for rows divided by ``input_scale``.
      opt_state: the optimiser's, of the parameters that it learns.
      average: sums of the moving average of those; None: there is none.
      rows_since_fired: [N] rows since each latent was last active.
      input_scale, output_scale: what inputs and targets are divided by; one number in an autoencoder, [layers] in a cross-layer transcoder.
      skipped: batches that were left out because something in them was not finite.
      numbers: the hyper-parameters that are no part of the program.
    """

    step: Int[Array, ""]
    params: dict
    opt_state: Any
    average: dict | None
    rows_since_fired: Int[Array, " N"]
    input_scale: Float[Array, "*layers"]
    output_scale: Float[Array, "*layers"]
    skipped: Int[Array, ""]
    numbers: Numbers


def optimiser_of(program: Program) -> Optimiser:
    """The optimiser of a program."""
    return make_optimiser(program.optimizer, program.betas, program.eps, program.dictionary)


def learned(dictionary: Dictionary, params: dict) -> dict:
    """The parameters that gradient, norm, optimiser and average know: all but those that are measured."""
    return {name: value for name, value in params.items() if name not in dictionary.STATISTICS}


def final_params(spec: TrainSpec, state: TrainState) -> dict:
    """The weights that the training stands for, in training units: the average where one is kept, with decoder rows as they must be."""
    program = program_of(spec)
    weights = optimiser_of(program).weights(state.opt_state, learned(spec.dictionary, state.params))
    if state.average is not None and state.numbers.ema is not None:
        average = corrected(state.average, weights, state.numbers.ema, state.step - state.skipped)
        weights = spec.dictionary.constrain(average)
    return {**state.params, **weights}


def estimate_scale(sample: Float[np.ndarray, "S D"], name: str = "the sample") -> float:
    """sqrt(mean |x|^2) over the rows that are finite, in float64.

    Raises:
      UserError: no row is finite, or all are zero; says so of ``name``.
    """
    rows = np.asarray(sample, np.float64)
    square = np.square(rows).sum(axis=1)
    square = square[np.isfinite(square)]
    if not len(square):
        raise UserError(f"{name}: none of its first {len(rows)} rows is finite: look for NaN and infinity where the rows were made")
    if not square.any():
        raise UserError(f"{name}: its first {len(rows)} rows are all zero: nothing can be learned from them")
    return float(np.sqrt(square.mean()))


def _scale(rows: Float[np.ndarray, "S D"], sites: str | tuple[str, ...]) -> np.ndarray:
    """The scale of a site, or of each of several side by side."""
    if isinstance(sites, str):
        return np.asarray(estimate_scale(rows, sites), np.float32)
    parts = zip(np.split(rows, len(sites), axis=1), sites, strict=True)
    return np.array([estimate_scale(part, site) for part, site in parts], np.float32)


def divided(rows: Any, scale: Any) -> Any:
    """Rows [B, D] over a scale: one number, or [L] of them for L equal parts of each row."""
    return (rows.reshape(len(rows), *scale.shape, -1) / scale[..., None]).reshape(rows.shape)


def init_state(
    spec: TrainSpec,
    key: Array | None = None,
    sample: Float[np.ndarray, "S D"] | None = None,
    targets: Float[np.ndarray, "S D_out"] | None = None,
    mesh: Mesh | None = None,
) -> TrainState:
    """The state before the first step; on a mesh each device makes and holds its part of it, as ``state_shardings`` says.

    Args:
      spec: the training.
      key: for the first weights; None: of ``spec.init_seed``, or else ``spec.seed``.
      sample: raw rows of the input, from which the scale is estimated and on which biases are centred; None: 1 and 0.
      targets: for a transcoder, the raw rows of the output that belong to them.
      mesh: the devices; None: one device. The values are the same for all meshes, up to the last bits of biases that are centred.

    Raises:
      UserError: a sample of another width, or of which nothing can be learned; what ``state_shardings`` raises.
    """
    dictionary = spec.dictionary
    key = jax.random.key(spec.seed if spec.init_seed is None else spec.init_seed) if key is None else key
    input_scale = output_scale = np.ones((len(spec.site),) if isinstance(spec.site, tuple) else (), np.float32)
    inputs: Any = None
    outputs: Any = None
    if sample is not None:
        sample, targets = _checked(spec, sample, targets)
        if spec.normalize == "rms" and dictionary.row_norm == "none":
            input_scale = output_scale = _scale(sample, spec.site or "the sample")
            if dictionary.transcoder:
                output_scale = _scale(targets, spec.target or "the targets")
        finite = np.isfinite(sample).all(axis=1) & np.isfinite(targets).all(axis=1)
        inputs = divided(sample[finite], input_scale) if dictionary.transcoder else None
        outputs = divided(targets[finite], output_scale)
    if mesh is None:
        inputs, outputs = jax.tree.map(jnp.asarray, (inputs, outputs))
        return _fresh(spec, _initialiser(dictionary)(key, outputs, inputs), input_scale, output_scale)

    def begin(key_data: Array, outputs: Array | None, inputs: Array | None) -> TrainState:
        params = dictionary.init(jax.random.wrap_key_data(key_data, impl=jax.random.key_impl(key)), outputs, inputs)
        return _fresh(spec, params, input_scale, output_scale)

    # what goes in are arrays of the host, the same in every process
    return jax.jit(begin, out_shardings=state_shardings(spec, mesh))(np.asarray(jax.random.key_data(key)), outputs, inputs)


def _fresh(spec: TrainSpec, params: dict, input_scale: np.ndarray, output_scale: np.ndarray) -> TrainState:
    knows = learned(spec.dictionary, params)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimiser_of(program_of(spec)).init(knows),
        average=None if spec.ema is None else jax.tree.map(jnp.zeros_like, knows),
        rows_since_fired=jnp.zeros(spec.dictionary.width, jnp.int32),
        input_scale=jnp.array(input_scale, jnp.float32),
        output_scale=jnp.array(output_scale, jnp.float32),
        skipped=jnp.int32(0),
        numbers=numbers_of(spec),
    )


def state_shardings(spec: TrainSpec, mesh: Mesh) -> Any:
    """How the state of a training lies on a mesh: a tree like ``TrainState`` of ``NamedSharding``.

    Whatever has a row for each latent is divided over ``model``: weights, moments, averages, ``rows_since_fired``. The rest is whole on
    every device, and all of it is the same for all rows.

    Raises:
      UserError: a width that the mesh does not divide; with latents divided, a cross-layer transcoder, or an optimiser that needs whole
        matrices.
    """
    dictionary, state = spec.dictionary, jax.eval_shape(lambda: init_state(spec))
    if mesh.shape["model"] > 1 and isinstance(dictionary, CrossLayer):
        raise UserError(
            f"mesh: a CrossLayer numbers its latents layer by layer, and no mesh divides them: model = {mesh.shape['model']} must be 1"
        )
    if mesh.shape["model"] > 1 and spec.optimizer == "muon":
        raise UserError(f"mesh: optimizer 'muon' needs whole matrices on every device: model = {mesh.shape['model']} must be 1")
    of_params = distributed.partition_specs(dictionary.axes(), state.params, mesh)

    def like_its_parameter(path: tuple, leaf: Any) -> PartitionSpec:
        name = getattr(path[-1], "key", None) if path else None
        return of_params[name] if name in of_params and leaf.shape == state.params[name].shape else PartitionSpec()

    specs = jax.tree.map_with_path(like_its_parameter, state)
    specs = dataclasses.replace(specs, rows_since_fired=PartitionSpec(distributed.RULES["latent"]))
    return jax.tree.map(lambda placed: NamedSharding(mesh, placed), specs)


def _checked(spec: TrainSpec, sample: Any, targets: Any) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and outputs as float32; an autoencoder's are the same."""
    dictionary = spec.dictionary
    if dictionary.transcoder and targets is None:
        raise UserError("init_state: a transcoder needs rows of its output beside the sample: give targets")
    targets = targets if dictionary.transcoder else sample
    for name, rows, width in (("sample", sample, dictionary.d_in), ("targets", targets, dictionary.out)):
        if rows.ndim != 2 or rows.shape[1] != width:
            raise UserError(f"init_state: the {name} must be [rows, {width}], got {list(rows.shape)}")
    if len(sample) != len(targets):
        raise UserError(f"init_state: the sample has {len(sample)} rows, targets has {len(targets)}: they belong together")
    return np.asarray(sample, np.float32), np.asarray(targets, np.float32)


@functools.cache
def _initialiser(dictionary: Dictionary) -> Callable[..., dict]:
    """``dictionary.init``, compiled once for a shape: its geometric median is a loop."""
    return jax.jit(dictionary.init)
