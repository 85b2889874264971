"""What every family's reader shares: strict reading of ``config.json`` and the tensor names of the Llama layout."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from dlmscope_jax.errors import UserError

from ..config import RopeScaling

REQUIRED = object()
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping", None: ""}

# keys of config.json that say nothing about what the network computes
INERT = frozenset(
    """architectures auto_map model_type transformers_version torch_dtype dtype use_cache _name_or_path name_or_path initializer_range
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id decoder_start_token_id mask_token_id tokenizer_class
    attention_dropout pretraining_tp max_window_layers sliding_window output_attentions output_hidden_states return_dict
    chunk_size_feed_forward is_encoder_decoder id2label label2id problem_type task_specific_params _commit_hash layer_types
    max_position_embeddings use_mrope init_device init_fn init_std init_cutoff_factor precision flash_attention attention_mask_cache
    embedding_dropout residual_dropout max_sequence_length mlp_ratio embedding_size add_cross_attention tie_encoder_decoder is_decoder
    cross_attention_hidden_size torchscript use_bfloat16 pruned_heads finetuning_task prefix""".split()
)


class Keys:
    """A ``config.json`` that notices what nobody read: a key that might change the computation is never passed over."""

    def __init__(self, mapping: Mapping[str, Any], where: str):
        self.mapping, self.where, self.seen = dict(mapping), where, set()

    def take(self, *names: str, default: Any = REQUIRED, kind: type | None = None) -> Any:
        """The value of the first of these keys that is there (one key may have had several spellings), of this kind."""
        self.seen.update(names)
        for name in names:
            if (value := self.mapping.get(name)) is not None:
                fits = kind is None or isinstance(value, (int, float) if kind is float else kind)
                if not fits or (isinstance(value, bool) and kind in (int, float)):
                    raise UserError(f"{self.where}: {name} is {value!r}, which is not {_KINDS[kind]}")
                return value
        if default is REQUIRED:
            raise UserError(f"{self.where}: key {names[0]!r} is missing")
        return default

    def size(self, *names: str, default: Any = REQUIRED) -> int:
        """A positive whole number."""
        value = self.take(*names, default=default, kind=int)
        if value is not None and value < 1:
            raise UserError(f"{self.where}: {names[0]} is {value}, which is not positive")
        return value

    def expect(self, name: str, *allowed: Any) -> None:
        """Refuses a switch that is set to something this network does not do; a missing key counts as the first value."""
        value = self.take(name, default=allowed[0])
        if value not in allowed:
            raise UserError(f"{self.where}: {name} is {value!r}; supported: {', '.join(map(repr, allowed))}")

    def finish(self) -> None:
        """Raises ``UserError`` for keys that no reader asked for."""
        unknown = sorted(set(self.mapping) - self.seen - INERT)
        if unknown:
            near = difflib.get_close_matches(unknown[0], self.seen, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise UserError(f"{self.where}: unknown keys {', '.join(unknown)}{hint}: they might change what the model computes")

    def token(self, name: str) -> int | None:
        """A special token id; the first one where the file lists several."""
        value = self.take(name, default=None)
        return value[0] if isinstance(value, list) else value

    def rope(self, default_theta: float) -> tuple[float, RopeScaling | None]:
        """Rotary base and scaling, in the hub's flat spelling or transformers 5's nested one."""
        nested = dict(self.take("rope_parameters", default={}, kind=dict))
        flat = dict(self.take("rope_scaling", default={}, kind=dict))
        theta = float(self.take("rope_theta", default=nested.pop("rope_theta", default_theta), kind=float))
        values = nested | flat
        kind = values.pop("rope_type", values.pop("type", "default"))
        values.pop("type", None)
        if kind == "default":
            return theta, None
        if kind != "llama3":
            raise UserError(f"{self.where}: rope type {kind!r} is not supported; supported: 'default', 'llama3'")
        scaling = Keys(values, f"{self.where}: rope_scaling")
        return theta, RopeScaling(
            factor=float(scaling.take("factor", kind=float)),
            low_freq_factor=float(scaling.take("low_freq_factor", kind=float)),
            high_freq_factor=float(scaling.take("high_freq_factor", kind=float)),
            original_max_positions=scaling.size("original_max_position_embeddings"),
        )


@dataclasses.dataclass(frozen=True)
class Fused:
    """One of several arrays of ours that share a tensor of a file along its output axis.

    Our output index ``o`` lies at the file's index ``(o // group) * of * group + part * group + o % group``.

    Attributes:
      part: which of the arrays this one is.
      of: how many share the tensor.
      group: how many outputs of one array lie together: all of them, or those of one head.
    """

    part: int
    of: int
    group: int

    def runs(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Where the outputs ``start .. stop`` lie in the file, as ranges in their order."""
        found, at = [], start
        while at < stop:
            after = min(stop, (at // self.group + 1) * self.group)
            first = at // self.group * self.of * self.group + self.part * self.group + at % self.group
            found.append((first, first + after - at))
            at = after
        return found


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one of our arrays lies in a file.

    Attributes:
      name: the tensor's name, ``{layer}`` standing for the layer's number.
      transposed: True where the file holds ``[out, in]`` and we hold ``[in, out]``.
      fused: set where the file's tensor holds other arrays of ours too. The output axis of a matrix is the file's rows where it
        is transposed and the columns where it is not; of a bias it is the only axis.
    """

    name: str
    transposed: bool = False
    fused: Fused | None = None

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the file's tensor, for an array of ours of this shape (without the layer axis)."""
        outputs = shape[-1] * (self.fused.of if self.fused else 1)
        return (outputs, *shape[:-1]) if self.transposed else (*shape[:-1], outputs)


def block_tensors(prefix: str, names: Mapping[str, str]) -> dict[tuple[str, ...], Tensor]:
    """The tensors of the blocks: our name -> the name behind ``prefix``; matrices are stored transposed."""
    return {
        ("blocks", ours): Tensor(f"{prefix}.{theirs}", transposed=not ours.endswith(("_norm", "_bias")))
        for ours, theirs in names.items()
    }  # fmt: skip


def llama_tensors(qkv_bias: bool, tied_head: bool) -> dict[tuple[str, ...], Tensor]:
    """Llama's, Qwen2's and Dream's names."""
    names = {
        "attn_norm": "input_layernorm.weight",
        "q": "self_attn.q_proj.weight",
        "k": "self_attn.k_proj.weight",
        "v": "self_attn.v_proj.weight",
        "o": "self_attn.o_proj.weight",
        "mlp_norm": "post_attention_layernorm.weight",
        "gate": "mlp.gate_proj.weight",
        "up": "mlp.up_proj.weight",
        "down": "mlp.down_proj.weight",
    }
    if qkv_bias:
        names |= {f"{p}_bias": f"self_attn.{p}_proj.bias" for p in "qkv"}
    table = block_tensors("model.layers.{layer}", names)
    table |= {("embed",): Tensor("model.embed_tokens.weight"), ("final_norm",): Tensor("model.norm.weight")}
    return table if tied_head else table | {("head",): Tensor("lm_head.weight")}
