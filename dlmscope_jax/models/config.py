"""What a language model is, as data: the shape of its network and, apart from it, how it diffuses."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class DiffusionSpec:
    """What makes a network a masked diffusion model; none of it is in the weights.

    Attributes:
      mask_id: the token that stands for "not known yet".
      shift: True where position ``i`` predicts token ``i + 1`` (Dream, adapted from an autoregressive model);
        False where it predicts token ``i`` (LLaDA).
      schedule: how the corruption rate follows time; ``"linear"``: the rate is the time.
      eps: the smallest rate drawn in training, ``p = (1 - eps) t + eps``.
    """

    mask_id: int
    shift: bool
    schedule: str = "linear"
    eps: float = 1e-3


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3's frequency-dependent stretching of rotary wavelengths (reference formula: llama3 rope type)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a transformer, as switches over one network; the defaults are Llama's.

    Attributes:
      family: the name of the file in ``models/families`` that reads and writes it.
      vocab_size: rows of the embedding, V.
      d_model: width of the residual stream, D.
      n_layers: number of blocks.
      n_heads: query heads, N.
      n_kv_heads: key and value heads, K; divides ``n_heads``.
      head_dim: width of one head, H.
      d_mlp: width of the MLP's hidden layer, F.
      norm_eps: epsilon of every norm.
      rope_theta: base of the rotary frequencies; unused with learned positions.
      max_positions: longest context that the model was made for.
      attention: ``"causal"``, ``"bidirectional"``, or ``"block_causal"`` (a query sees its own block and those before).
      rope_scaling: Llama-3's stretching, or None.
      rope_float32: rotate in float32 and round once (LLaDA) instead of in the compute dtype (Llama, Qwen, Dream).
      qkv_bias: whether the query, key and value projections have biases.
      tied_head: whether the output head is the embedding.
      bos_id, eos_id, pad_id: special tokens, None where the family has none.
      norm: ``"rms"``, or ``"layer"``, which removes the mean too.
      norm_bias: whether layer norms have biases.
      norm_offset: Gemma's norm: multiplies by ``1 + weight``, all in float32 and rounded last.
      post_norms: Gemma-2's norms on the outputs of attention and MLP, before these are added.
      qk_norm: Qwen3's RMS norm of each query and key head, before the rotation.
      positions: ``"rotary"``, or ``"learned"`` vectors added to the embedding.
      rotary_dim: leading dims of each head that are rotated (GPT-NeoX), None for all.
      parallel: attention and MLP read the same residual stream and are added together (GPT-NeoX).
      gated: ``down(act(gate(x)) * up(x))``; False: ``down(act(up(x)))``.
      activation: ``"silu"``, ``"gelu"`` (exact) or ``"gelu_tanh"``.
      out_bias: whether the attention's output projection has a bias.
      mlp_bias: whether the MLP's projections have biases.
      head_bias: whether the output head has a bias.
      scaled_embedding: Gemma's embedding times ``sqrt(D)``, the factor rounded to the compute dtype.
      attention_scale: multiplies the attention scores, None for ``H ** -0.5``.
      attention_softcap, logit_softcap: c of ``c tanh(x / c)`` on attention scores and logits, None for none.
      window: how many of the last keys a query sees in the layers that ``windowed`` marks.
      windowed: one entry a layer; empty where no layer has a window.
      block_length: tokens of a block where attention is block-causal; block b holds positions ``b * block_length`` and up.
      cond_dim: width of MDLM's condition vector (adaLN), None for a network without.
      weight_processing: ``"raw"``, or ``"folded"`` after ``models.process_weights``; a fact about captured activations.
    """

    family: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_mlp: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    attention: str
    rope_scaling: RopeScaling | None = None
    rope_float32: bool = False
    qkv_bias: bool = False
    tied_head: bool = False
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    norm: str = "rms"
    norm_bias: bool = False
    norm_offset: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    positions: str = "rotary"
    rotary_dim: int | None = None
    parallel: bool = False
    gated: bool = True
    activation: str = "silu"
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    scaled_embedding: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    window: int | None = None
    windowed: tuple[bool, ...] = ()
    block_length: int | None = None
    cond_dim: int | None = None
    weight_processing: str = "raw"

    @property
    def added_apart(self) -> bool:
        """Whether what attention and MLP compute is changed (normed, gated) before it is added to the residual stream."""
        return self.post_norms or self.cond_dim is not None

    def facts(self) -> dict[str, Any]:
        """The fields that differ from the defaults: a description that new fields leave as it is."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {f.name: fields[f.name] for f in dataclasses.fields(self) if fields[f.name] != f.default}
