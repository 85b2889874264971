"""What the torch twins share: the tuple that a family's file makes, and a tape of activations.

A twin is an independent torch implementation of a family with random weights, together with the folder in which its
weights lie as the family publishes them. ``twins_*.py`` offers ``FAMILIES``, name -> ``make(folder, **changes) -> Twin``,
and ``TINY``, name -> ``(ModelConfig, DiffusionSpec | None)``.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

VOCAB, WIDTH, LAYERS = 97, 32, 3
MASK = 3  # the mask token of the tiny diffusion models

Sites = dict[tuple[str, int], np.ndarray]


class Twin(NamedTuple):
    """A random torch model and how to run and write it.

    Attributes:
      module: the model, float32, in eval mode, with eager attention.
      run: ``run(module, tokens [B, T], keep [B, T] | None = None) -> (logits [B, T, V], {(site, layer): value})`` as NumPy.
      forward: ``forward(module, tokens, keep) -> logits`` as a torch tensor that carries gradients.
      save: ``save(module, folder, shard=None)`` writes configuration and weights as the family publishes them, in files of at
        most ``shard`` (``"20KB"``); gradients are compared by writing them as if they were weights.
      respell: ``respell(folder)`` rewrites a saved folder in the other spelling (the hub's and that of transformers 5), None
        where a family has only one.
    """

    module: nn.Module
    run: Callable[..., tuple[np.ndarray, Sites]]
    forward: Callable[..., torch.Tensor] | None = None
    save: Callable[..., None] | None = None
    respell: Callable[[Path], None] | None = None


class Tape:
    """Activations by forward hooks, under the names of our sites."""

    def __init__(self):
        self.sites: dict[tuple[str, int], torch.Tensor] = {}
        self.handles: list[Any] = []

    def put(self, name: str, layer: int, value: torch.Tensor) -> None:
        self.sites[name, layer] = value.detach().clone()

    def read(self, module: nn.Module, layer: int, **names: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        """Notes what goes into ``module`` under each name, after the function given for it."""
        self.handles.append(
            module.register_forward_pre_hook(lambda m, a, k: self._note(a[0] if a else k["hidden_states"], layer, names), with_kwargs=True)
        )

    def write(self, module: nn.Module, layer: int, **names: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        """Notes what comes out of ``module`` (the first of several outputs)."""
        self.handles.append(
            module.register_forward_hook(lambda m, a, out: self._note(out[0] if isinstance(out, tuple) else out, layer, names))
        )

    def pattern(self, module: nn.Module, layer: int) -> None:
        """Notes the weights that an eager attention returns as its second output."""
        self.handles.append(module.register_forward_hook(lambda m, a, out: self._note(out[1], layer, {"attn_pattern": None})))

    def _note(self, value: torch.Tensor, layer: int, names: dict[str, Callable | None]) -> None:
        for name, change in names.items():
            self.put(name, layer, value if change is None else change(value))

    def stop(self) -> Sites:
        for handle in self.handles:
            handle.remove()
        return {key: numpy(value) for key, value in self.sites.items()}


def numpy(value: torch.Tensor) -> np.ndarray:
    """As NumPy, bfloat16 widened to float32."""
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def recorded(forward: Callable[..., torch.Tensor], attach: Callable[[nn.Module, Tape], None]) -> Callable[..., tuple[np.ndarray, Sites]]:
    """A twin's ``run`` from its ``forward`` and a function that puts hooks on a module."""

    def run(module: nn.Module, tokens: np.ndarray, keep: np.ndarray | None = None) -> tuple[np.ndarray, Sites]:
        tape = Tape()
        attach(module, tape)
        try:
            with torch.no_grad():
                logits = forward(module, tokens, keep)
        finally:
            sites = tape.stop()
        return numpy(logits), sites

    return run


def rms_scale(eps: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """What an RMS norm divides by, [..., 1]."""
    return lambda x: (x.square().mean(-1, keepdim=True) + eps).sqrt()


def layer_scale(eps: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a layer norm divides by, [..., 1]."""
    return lambda x: ((x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + eps).sqrt()


def heads(count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """[B, T, count * H] -> [B, T, count, H]."""
    return lambda x: x.reshape(*x.shape[:-1], count, -1)


def additive_mask(module: nn.Module, tokens: np.ndarray, keep: np.ndarray | None, seen: np.ndarray | None = None) -> torch.Tensor:
    """[B, 1, T, T], 0 where a query sees a key and the lowest number elsewhere; ``seen`` [T, T], all keys where None."""
    batch, length = tokens.shape
    mask = np.broadcast_to(np.ones((length, length), bool) if seen is None else seen, (batch, 1, length, length))
    if keep is not None:
        mask = mask & keep[:, None, None, :]
    dtype = next(module.parameters()).dtype
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~torch.tensor(mask), torch.finfo(dtype).min)


def causal(module: nn.Module, tokens: np.ndarray, keep: np.ndarray | None = None) -> torch.Tensor:
    """A forward of transformers under the original's own causal mask."""
    keep = None if keep is None else torch.tensor(keep).long()
    return module(torch.tensor(tokens).long(), attention_mask=keep, use_cache=False).logits


def bidirectional(module: nn.Module, tokens: np.ndarray, keep: np.ndarray | None = None) -> torch.Tensor:
    """A forward of transformers with every key visible, by an explicit mask."""
    return module(torch.tensor(tokens).long(), attention_mask=additive_mask(module, tokens, keep), use_cache=False).logits


def shaken(module: nn.Module, size: float = 0.15) -> nn.Module:
    """Moves every parameter, so that no norm weight is one and no bias zero; eval mode."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return module.eval()


def rename_tensors(folder: Path, rename: Callable[[str], str], buffers: dict[str, torch.Tensor] | None = None) -> None:
    """Renames the tensors of a saved folder, of one file or many, and adds ``buffers`` to the first file."""
    buffers = dict(buffers or {})
    index = folder / "model.safetensors.index.json"
    where = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = {rename(name): value for name, value in load_file(file).items()} | buffers
        where |= dict.fromkeys(tensors, file.name)
        save_file(tensors, file, metadata={"format": "pt"})
        buffers = {}
    if index.exists():
        index.write_text(json.dumps(json.loads(index.read_text()) | {"weight_map": where}))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Rewrites a folder's ``config.json``."""
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def save(module: nn.Module, folder: Path, shard: str | None = None) -> None:
    """Writes a model of transformers as transformers 5 does."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    module.save_pretrained(folder, max_shard_size=shard or "1GB")


def flat_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The hub's spelling of what transformers 5 nests: ``rope_theta``, ``rope_scaling`` and ``torch_dtype``."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters"))
    config |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.pop("dtype")}
    return config | {"rope_scaling": None if rope["rope_type"] == "default" else rope}
