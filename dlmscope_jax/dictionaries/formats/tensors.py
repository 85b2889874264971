"""Tensors of other libraries' files as float32 parameters: shapes and types first, values after they fit."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes  # noqa: F401  # teaches NumPy the name bfloat16, which safetensors asks for
import numpy as np

from dlmscope_jax.errors import UserError

from .native import check_shapes
from .torch_pickle import LazyTensor, TorchFile


@dataclass(frozen=True)
class Tensors:
    """Named tensors of an open file, none of them read yet.

    Attributes:
      where: the file, for messages.
      shapes: name and shape of each.
    """

    where: Path
    shapes: dict[str, tuple[int, ...]]
    _get: Callable[[str], np.ndarray]

    def read(self, name: str) -> np.ndarray:
        """The values of one tensor, float32.

        Raises:
          UserError: no such tensor, another dtype than a floating-point one, NaN. A number that float32 cannot hold becomes infinite,
            which ``load_dictionary`` refuses.
        """
        if name not in self.shapes:
            raise UserError(f"{self.where}: {name} is missing")
        given = self._get(name)
        if not np.issubdtype(given.dtype, np.floating) and given.dtype.name != "bfloat16":
            raise UserError(f"{self.where}: {name} holds {given.dtype}, should hold floating-point numbers")
        with np.errstate(over="ignore"):
            array = np.asarray(given, np.float32, order="C")
        if np.isnan(array).any():
            raise UserError(f"{self.where}: {name} holds NaN: the dictionary is damaged, or its training diverged")
        return array

    def number(self, name: str) -> float:
        """One number, saved as a tensor with one entry of any dtype.

        Raises:
          UserError: no such tensor, one with several entries, NaN.
        """
        shape = self.shapes.get(name)
        if shape is None or any(n != 1 for n in shape):
            raise UserError(f"{self.where}: {name} should be one number, is {'missing' if shape is None else list(shape)}")
        value = float(self._get(name).reshape(()))
        if math.isnan(value):
            raise UserError(f"{self.where}: {name} holds NaN: the dictionary is damaged, or its training diverged")
        return value

    def integers(self, name: str) -> list[int]:
        """The entries of a short list of whole numbers.

        Raises:
          UserError: no such list, other numbers.
        """
        shape = self.shapes.get(name, ())
        if len(shape) != 1 or shape[0] > 4096:
            raise UserError(f"{self.where}: {name} should be a short list of whole numbers, is {list(shape)}")
        array = self._get(name)
        if not np.issubdtype(array.dtype, np.integer):
            raise UserError(f"{self.where}: {name} holds {array.dtype}, should hold whole numbers")
        return [int(n) for n in array]

    def matrix(self, name: str) -> tuple[int, int]:
        """The two sizes of a tensor that must be a matrix, from which a spec takes its own.

        Raises:
          UserError: it is missing or is none.
        """
        shape = self.shapes.get(name, ())
        if len(shape) != 2 or 0 in shape:
            raise UserError(f"{self.where}: {name} is missing or is not a matrix")
        return shape[0], shape[1]

    def params(
        self,
        spec: Any,
        names: Mapping[str, str] | None = None,
        transposed: Iterable[str] = (),
        ignored: Iterable[str] = (),
        given: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """The parameters of ``spec``, NumPy arrays float32; nothing is read before all shapes fit.

        Args:
          names: our name -> the file's, where they differ.
          transposed: our names of matrices that the file holds the other way round.
          ignored: names of the file that are no parameters.
          given: our name -> its values, for what the file may leave out.

        Raises:
          UserError: tensors missing, unexpected or of another shape; what ``read`` raises.
        """
        names, transposed = names or {}, frozenset(transposed)
        ours = {theirs: mine for mine, theirs in names.items()}
        found = {ours.get(name, name): name for name in self.shapes if name not in ignored}
        turned = {mine: self.shapes[name][::-1] if mine in transposed else self.shapes[name] for mine, name in found.items()}
        given = {mine: array for mine, array in (given or {}).items() if mine not in found}
        check_shapes(str(self.where), spec, turned | {mine: array.shape for mine, array in given.items()})
        arrays = {mine: given[mine] if mine in given else self.read(found[mine]) for mine in spec.shapes()}
        return {mine: array.T if mine in transposed else array for mine, array in arrays.items()}


def to_jax(params: Mapping[str, np.ndarray]) -> dict[str, jnp.ndarray]:
    """Finished parameters as JAX arrays."""
    return {name: jnp.asarray(np.asarray(array, np.float32, order="C")) for name, array in params.items()}


@contextmanager
def open_safetensors(path: Path) -> Iterator[Tensors]:
    """The tensors of a safetensors file.

    Raises:
      UserError: no such file, damaged or cut short.
    """
    import safetensors

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}

            def get(name: str) -> np.ndarray:
                try:
                    return file.get_tensor(name)
                except (TypeError, AttributeError):
                    raise UserError(f"{path}: {name} holds {file.get_slice(name).get_dtype()}, which is not read") from None

            yield Tensors(path, shapes, get)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file: {error}") from None


def state_dict(file: TorchFile, state: Any) -> Tensors:
    """The tensors of a state dict in an open ``.pt`` file; plain numbers count as tensors with one entry.

    Raises:
      UserError: it is no state dict, or holds an impossible tensor.
    """
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{file.path}: holds no state dict")
    # compiled modules prefix every name
    found = {name.removeprefix("_orig_mod."): value for name, value in state.items()}
    plain = {name: np.asarray(value) for name, value in found.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    shapes = {name: () if name in plain else file.shape(value, name) for name, value in found.items()}
    return Tensors(file.path, shapes, lambda name: plain[name] if name in plain else file.read(found[name], name))


def is_number(value: Any) -> bool:
    """Whether an entry of a ``.pt`` file is one number, plain or a tensor."""
    if isinstance(value, LazyTensor):
        return isinstance(value.shape, tuple | list) and all(n == 1 for n in value.shape)
    return isinstance(value, int | float) and not isinstance(value, bool)
