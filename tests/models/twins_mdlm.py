"""Torch twin of MDLM, written from the formulas (Sahoo et al. 2024; adaLN: Peebles and Xie 2023) under the published names."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
import twins
from torch import nn
from transformers import PreTrainedConfig
from twins import LAYERS, VOCAB, WIDTH, Tape, Twin, layer_scale

HEADS, CONDITION, CONTEXT = 4, 12, 64


def wide(x: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Norm(nn.Module):
    """Layer norm in float32 with a weight and no bias, then ``y (1 + scale) + shift``."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x, shift, scale):
        x = wide(x)
        x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)
        return (x * self.weight * (1 + scale) + shift).to(self.weight.dtype)


class Block(nn.Module):
    """``x + g (W attention)``, then ``x + g' MLP``: shift, scale and gate of each come from the condition."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = Norm(), Norm()
        self.attn_qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.attn_out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(4 * WIDTH, WIDTH))
        self.adaLN_modulation = nn.Linear(CONDITION, 6 * WIDTH)

    def forward(self, x, condition, turn, hidden, note):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(6)
        note("resid_pre", x), note("attn_norm_scale", layer_scale(1e-5)(wide(x)))
        normed = self.norm1(x, shift_a, scale_a)
        q, k, v = self.attn_qkv(normed).unflatten(-1, (3, HEADS, WIDTH // HEADS)).unbind(2)  # [B, T, heads, H] each
        note("attn_in", normed), note("q", q), note("k", k), note("v", v)
        scores = wide(torch.einsum("bthd,bshd->bhts", turn(q), turn(k))) / math.sqrt(WIDTH // HEADS)
        pattern = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(x.dtype)
        z = torch.einsum("bhts,bshd->bthd", pattern, v)
        raw = self.attn_out(z.flatten(2))
        note("attn_pattern", pattern), note("z", z), note("attn_raw", raw), note("attn_out", gate_a * raw)
        x = x + gate_a * raw
        note("resid_mid", x), note("mlp_norm_scale", layer_scale(1e-5)(wide(x)))
        normed = self.norm2(x, shift_m, scale_m)
        act = self.mlp[1](self.mlp[0](normed))
        raw = self.mlp[2](act)
        note("mlp_in", normed), note("mlp_act", act), note("mlp_raw", raw), note("mlp_out", gate_m * raw)
        note("resid_post", x + gate_m * raw)
        return x + gate_m * raw


class Reference(nn.Module):
    """The network with the tensor names of the published file; the noise level it is told is always 0."""

    def __init__(self):
        super().__init__()
        self.backbone = backbone = nn.Module()
        backbone.vocab_embed, backbone.sigma_map, backbone.rotary_emb, backbone.output_layer = (nn.Module() for _ in range(4))
        backbone.vocab_embed.embedding = nn.Parameter(0.5 * torch.randn(VOCAB, WIDTH))
        backbone.sigma_map.mlp = nn.Sequential(nn.Linear(256, CONDITION), nn.SiLU(), nn.Linear(CONDITION, CONDITION))
        half = WIDTH // HEADS // 2
        backbone.rotary_emb.register_buffer("inv_freq", 10000.0 ** -(torch.arange(half) / half))
        backbone.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        backbone.output_layer.norm_final = Norm()
        backbone.output_layer.linear = nn.Linear(WIDTH, VOCAB)
        backbone.output_layer.adaLN_modulation = nn.Linear(CONDITION, 2 * WIDTH)

    def forward(self, tokens, keep=None, sigma=0.0, note: Callable[[str, int, torch.Tensor], None] = lambda name, layer, value: None):
        net, out = self.backbone, self.backbone.output_layer
        dtype = net.vocab_embed.embedding.dtype
        angle = sigma * torch.exp(-math.log(10000.0) * torch.arange(128) / 128)
        condition = F.silu(net.sigma_map.mlp(torch.cat([angle.cos(), angle.sin()]).to(dtype)))
        turns = torch.outer(torch.arange(tokens.shape[1]), wide(net.rotary_emb.inv_freq))[:, None]  # [T, 1, H / 2]

        def turn(x):
            first, second = x.chunk(2, -1)
            cos, sin = turns.cos().to(dtype), turns.sin().to(dtype)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

        hidden = torch.zeros(1, 1, 1, 1, dtype=bool) if keep is None else ~keep[:, None, None, :]
        x = net.vocab_embed.embedding[tokens]
        for i, block in enumerate(net.blocks):
            x = block(x, condition, turn, hidden, lambda name, value, i=i: note(name, i, value))
        note("final_norm_scale", LAYERS, layer_scale(1e-5)(wide(x)))
        x = out.norm_final(x, *out.adaLN_modulation(condition).chunk(2))
        note("final_norm", LAYERS, x)
        return out.linear(x)


def forward(module: nn.Module, tokens: np.ndarray, keep: np.ndarray | None = None, **more: Any) -> torch.Tensor:
    """Logits; positions that are not kept are hidden as keys."""
    return module(torch.tensor(tokens).long(), None if keep is None else torch.tensor(keep), **more)


def run(module: nn.Module, tokens: np.ndarray, keep: np.ndarray | None = None) -> tuple[np.ndarray, dict]:
    """Logits and every site."""
    tape = Tape()
    with torch.no_grad():
        logits = forward(module, tokens, keep, note=tape.put)
    return twins.numpy(logits), tape.stop()


def save(module: nn.Module, folder: Path, shard: str | None = None) -> None:
    """As published, rotary frequencies included; the mask token stands in no key, it is the last one."""
    folder.mkdir(parents=True, exist_ok=True)
    huggingface_hub.save_torch_state_dict(module.state_dict(), folder, **({} if shard is None else {"max_shard_size": shard}))
    keys = {
        "model_type": "mdlm", "architectures": ["MDLM"], "auto_map": {"AutoModelForMaskedLM": "modeling_mdlm.MDLM"}, "vocab_size": VOCAB,
        "model_length": CONTEXT, "hidden_dim": WIDTH, "cond_dim": CONDITION, "n_blocks": LAYERS, "n_heads": HEADS, "dropout": 0.1,
        "time_conditioning": False, "return_dict": False, "torch_dtype": "float32", "transformers_version": "4.38.2",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(keys))


def _respell(folder: Path) -> None:
    """What transformers 5 writes when it has read the file: the same keys among its defaults, and ``dtype``."""
    twins.edit_config(folder, lambda keys: PreTrainedConfig(**keys).to_dict() | {"model_type": "mdlm"})


def mdlm(folder: Path) -> Twin:
    """MDLM; the published initialisation has gates of 0, which would hide everything behind them."""
    torch.manual_seed(40)
    module = Reference().eval()
    twins.shaken(module.backbone.blocks), twins.shaken(module.backbone.output_layer)  # the rest is random as it is made
    save(module, folder)
    return Twin(module, run, forward, save, _respell)


FAMILIES = {"mdlm": mdlm}
