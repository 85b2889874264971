"""Names of sites in other libraries' configurations: TransformerLens hooks and module paths."""

import re

_HOOKS = [
    (re.compile(r"blocks\.(\d+)\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)"), None),
    (re.compile(r"blocks\.(\d+)\.hook_mlp_in"), "resid_mid"),  # a copy of the residual stream, before the norm
    (re.compile(r"blocks\.(\d+)\.attn\.hook_(q|k|v|z)"), None),
    (re.compile(r"blocks\.(\d+)\.ln1\.hook_normalized"), "attn_in"),
    (re.compile(r"blocks\.(\d+)\.ln2\.hook_normalized"), "mlp_in"),
    (re.compile(r"blocks\.(\d+)\.mlp\.hook_in"), "mlp_in"),
    (re.compile(r"blocks\.(\d+)\.mlp\.hook_out"), "mlp_out"),
    (re.compile(r"blocks\.(\d+)\.mlp\.hook_post"), "mlp_act"),
]
# a block, its attention, its MLP, as GPT-2, NeoX, Llama and LLaDA call them; the word before the number may stand behind others
_BLOCK = r"(?:[a-z_]+\.)*(?:layers|h|blocks)\.(\d+)"
_MODULES = [
    (re.compile(_BLOCK), "resid_pre", "resid_post"),
    (re.compile(_BLOCK + r"\.(?:self_attn|attention|attn)"), "attn_in", "attn_out"),
    (re.compile(_BLOCK + r"\.mlp"), "mlp_in", "mlp_out"),
]


def from_hook(name: str) -> tuple[str, int]:
    """``("resid_post@5", 5)`` for ``"blocks.5.hook_resid_post"``; a name that is not known stays as it is, with the first number in it.

    The layer of a name without a number is -1.
    """
    for pattern, fixed in _HOOKS:
        if match := pattern.fullmatch(name):
            return f"{fixed or match[2]}@{match[1]}", int(match[1])
    at = re.fullmatch(r"\w+@(\d+)", name)  # ours, where a file was written here
    number = re.search(r"\d+", name)
    return name, int(at[1]) if at else int(number[0]) if number else -1


def to_hook(site: str) -> str:
    """``"blocks.5.hook_resid_post"`` for ``"resid_post@5"``; a site that TransformerLens has no hook for stays as it is."""
    name, at, layer = site.partition("@")
    if not at:
        return site
    if name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"):
        return f"blocks.{layer}.hook_{name}"
    if name in ("q", "k", "v", "z"):
        return f"blocks.{layer}.attn.hook_{name}"
    fixed = {"attn_in": "ln1.hook_normalized", "mlp_in": "ln2.hook_normalized", "mlp_act": "mlp.hook_post"}
    return f"blocks.{layer}.{fixed[name]}" if name in fixed else site


def from_module(name: str) -> tuple[str, str, int]:
    """The sites that a module reads and writes, and its layer: ``("mlp_in@5", "mlp_out@5", 5)`` for ``"layers.5.mlp"``.

    A name that is not known is returned for both, with the first number in it as its layer (-1 without one).
    """
    for pattern, read, write in _MODULES:
        if match := pattern.fullmatch(name):
            return f"{read}@{match[1]}", f"{write}@{match[1]}", int(match[1])
    site, layer = from_hook(name)
    return site, site, layer
