"""What every family's reader shares: strict reading of ``config.json`` and the tensor names of the Llama layout."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from dlmscope_jax.errors import UserError

from ..config import DiffusionSpec, ModelConfig, RopeScaling

REQUIRED = object()
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping", None: ""}

# keys of config.json that say nothing about what the network computes
INERT = frozenset(
    """architectures auto_map model_type transformers_version torch_dtype dtype use_cache _name_or_path name_or_path initializer_range
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id decoder_start_token_id mask_token_id tokenizer_class
    attention_dropout pretraining_tp max_window_layers sliding_window output_attentions output_hidden_states return_dict
    chunk_size_feed_forward is_encoder_decoder id2label label2id problem_type task_specific_params _commit_hash
    max_position_embeddings use_mrope init_device init_fn init_std init_cutoff_factor precision flash_attention attention_mask_cache
    embedding_dropout residual_dropout max_sequence_length mlp_ratio embedding_size add_cross_attention tie_encoder_decoder is_decoder
    cross_attention_hidden_size torchscript use_bfloat16 finetuning_task prefix""".split()
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

    def size(self, *names: str, default: Any = REQUIRED, kind: type = int) -> Any:
        """A positive number, a whole one where ``kind`` does not say ``float``."""
        value = self.take(*names, default=default, kind=kind)
        if value is not None and not value > 0:
            raise UserError(f"{self.where}: {names[0]} is {value}, which is not positive")
        return value

    def head_dim(self, widths: Sequence[str], counts: Sequence[str]) -> int:
        """Width of a head where the heads share the network's width; both are given by the spellings of their keys."""
        width, count = self.size(*widths), self.size(*counts)
        if width % count:
            raise UserError(f"{self.where}: {widths[0]} {width} is not divisible by {counts[0]} {count}")
        return width // count

    def agreed(self, names: Sequence[str], nested: "Keys", name: str, default: float) -> float:
        """A positive number of which older files speak here and newer ones inside ``nested``; a file with both must not differ."""
        here, there = self.size(*names, default=None, kind=float), nested.size(name, default=None, kind=float)
        if here is not None and there is not None and here != there:
            raise UserError(f"{self.where}: {names[0]} is {here}, but {name} is {there}: one of them is wrong")
        return float(next(value for value in (here, there, default) if value is not None))

    def expect(self, name: str, *allowed: Any) -> None:
        """Refuses a switch that is set to something this network does not do; a missing key counts as the first value."""
        value = self.take(name, default=allowed[0])
        if value not in allowed:
            raise UserError(f"{self.where}: {name} is {value!r}; supported: {', '.join(map(repr, allowed))}")

    def finish(self, inert: frozenset[str] = INERT) -> None:
        """Raises ``UserError`` for keys that no reader asked for, but for the ``inert`` ones."""
        unknown = sorted(set(self.mapping) - self.seen - inert)
        if unknown:
            near = difflib.get_close_matches(unknown[0], self.seen, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise UserError(f"{self.where}: unknown keys {', '.join(unknown)}{hint}: they might change what the model computes")

    def token(self, name: str) -> int | None:
        """A special token id; the first one where the file lists several."""
        value = self.take(name, default=None)
        value = next(iter(value), None) if isinstance(value, list) else value
        if value is not None and type(value) is not int:
            raise UserError(f"{self.where}: {name} is {value!r}, which is not {_KINDS[int]}")
        return value

    def ids(self) -> dict[str, Any]:
        """The special tokens, as fields of ``ModelConfig``."""
        return {f"{name}_id": self.token(f"{name}_token_id") for name in ("bos", "eos", "pad")}

    def nested_rope(self) -> "Keys":
        """What stands in ``rope_parameters`` (transformers 5) or ``rope_scaling`` (the hub)."""
        new, old = (self.take(name, default={}, kind=dict) for name in ("rope_parameters", "rope_scaling"))
        if new and old and new != old:
            raise UserError(f"{self.where}: rope_parameters is {new}, but rope_scaling is {old}: one of them is wrong")
        return Keys(new or old, f"{self.where}: {'rope_parameters' if new else 'rope_scaling'}")

    def rope(self, default_theta: float, partial: bool = False) -> tuple[float, RopeScaling | None]:
        """Rotary base and scaling, in the hub's flat spelling or transformers 5's nested one.

        Args:
          default_theta: the base where the file says none.
          partial: True where the family reads ``partial_rotary_factor`` itself; the others rotate whole heads.

        Raises:
          UserError: for another kind of scaling, or a nested key that this kind does not have.
        """
        nested = self.nested_rope()
        theta = self.agreed(["rope_theta"], nested, "rope_theta", default_theta)
        nested.take("partial_rotary_factor", default=None) if partial else nested.expect("partial_rotary_factor", 1.0)
        kind, scaling = nested.take("rope_type", "type", default="default"), None
        if kind == "llama3":
            scaling = RopeScaling(
                factor=float(nested.size("factor", kind=float)),
                low_freq_factor=float(nested.size("low_freq_factor", kind=float)),
                high_freq_factor=float(nested.size("high_freq_factor", kind=float)),
                original_max_positions=nested.size("original_max_position_embeddings"),
            )
        elif kind != "default":
            raise UserError(f"{self.where}: rope type {kind!r} is not supported; supported: 'default', 'llama3'")
        nested.finish(inert=frozenset())
        return theta, scaling


Spec = TypeVar("Spec", DiffusionSpec, None)


def checked(keys: Keys, config: ModelConfig, diffusion: Spec) -> tuple[ModelConfig, Spec]:
    """What every family's ``read`` gives back.

    Raises:
      UserError: for numbers with which no network of any family can run, or heads that were cut out of it.
    """
    keys.expect("pruned_heads", {})
    if config.n_heads % config.n_kv_heads:
        raise UserError(f"{keys.where}: {config.n_heads} query heads cannot share {config.n_kv_heads} key and value heads evenly")
    rotated = config.head_dim if config.rotary_dim is None else config.rotary_dim
    if config.positions == "rotary" and (rotated % 2 or not 0 < rotated <= config.head_dim):
        raise UserError(f"{keys.where}: {rotated} of the {config.head_dim} dims of a head would be rotated: they are rotated in pairs")
    if diffusion is not None and not 0 <= diffusion.mask_id < config.vocab_size:
        raise UserError(f"{keys.where}: mask_token_id {diffusion.mask_id} is not one of the tokens 0 to {config.vocab_size - 1}")
    return config, diffusion


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


def shape_keys(config: ModelConfig) -> dict[str, Any]:
    """The keys of ``config.json`` that Llama's and NeoX's layouts share: sizes and special tokens."""
    return {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "max_position_embeddings": config.max_positions,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_head,
        **id_keys(config),
    }


def id_keys(config: ModelConfig) -> dict[str, int | None]:
    """The special tokens, as keys of ``config.json``."""
    return {"bos_token_id": config.bos_id, "eos_token_id": config.eos_id, "pad_token_id": config.pad_id}
