"""Which keys each query sees, as positions: no array of size [T, S] exists until it is asked for."""

from flax import struct
from jaxtyping import Array, Bool, Int


@struct.dataclass
class Visibility:
    """Which keys each query sees.

    Attributes:
      query: [B or 1, T] position of each query.
      key: [B or 1, S] position of each key; -1 hides it (padding, or a cache entry that is not written yet).
      window: None, or how many of the last keys a query sees, itself included; data, so that layers may differ.
      rule: ``"causal"``, ``"bidirectional"`` or ``"block_causal"`` (its own block and those before).
      block_length: tokens of a block, for ``"block_causal"``.
      padded: whether ``key`` may hold -1.
      indexed: whether queries and keys are the same tokens and their positions ``0..T-1`` (-1 where a key is hidden):
        what a kernel that knows no positions needs to be told. A bidirectional rule does not need it.
    """

    query: Int[Array, "#B T"]
    key: Int[Array, "#B S"]
    window: Int[Array, ""] | None = None
    rule: str = struct.field(pytree_node=False, default="bidirectional")
    block_length: int | None = struct.field(pytree_node=False, default=None)
    padded: bool = struct.field(pytree_node=False, default=False)
    indexed: bool = struct.field(pytree_node=False, default=False)

    def mask(self) -> Bool[Array, "#B 1 T S"] | None:
        """True where a query sees a key; None where every query sees every key."""
        query, key = self.query[:, None, :, None], self.key[:, None, None, :]
        seen = None
        if self.rule == "causal":
            seen = key <= query
        elif self.rule == "block_causal":
            seen = key // self.block_length <= query // self.block_length
        if self.window is not None:
            near = query - key < self.window
            seen = near if seen is None else seen & near
        if self.padded:
            seen = key >= 0 if seen is None else seen & (key >= 0)
        return seen
