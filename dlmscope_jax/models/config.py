"""What a language model is, as data: the shape of its network and, apart from it, how it diffuses."""

import dataclasses


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
    """The shape of a Llama-like transformer (pre-norm, rotary positions, gated MLP).

    Attributes:
      family: the name of the file in ``models/families`` that reads and writes it.
      vocab_size: rows of the embedding, V.
      d_model: width of the residual stream, D.
      n_layers: number of blocks.
      n_heads: query heads.
      n_kv_heads: key and value heads; divides ``n_heads``.
      head_dim: width of one head.
      d_mlp: width of the MLP's hidden layer.
      norm_eps: epsilon of every RMS norm.
      rope_theta: base of the rotary frequencies.
      max_positions: longest context that the model was made for.
      attention: ``"causal"`` or ``"bidirectional"``.
      rope_scaling: Llama-3's stretching, or None.
      rope_float32: rotate in float32 and round once (LLaDA) instead of in the compute dtype (Llama, Qwen, Dream).
      qkv_bias: whether the query, key and value projections have biases.
      tied_head: whether the output head is the embedding.
      bos_id, eos_id, pad_id: special tokens, None where the family has none.
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
