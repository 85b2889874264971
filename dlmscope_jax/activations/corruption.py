"""Which corruption rate each block of a harvest gets."""

from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import UserError

Policy = Literal["clean", "rate", "batch_rate"]


@dataclass(frozen=True)
class Corruption:
    """How the text is corrupted before the model reads it.

    ``clean``: not at all (the only choice for an autoregressive model). ``rate``: each block has its own rate, uniform in ``[low, high]``,
    stratified over every 16 consecutive blocks so that any part of a store covers the range. ``batch_rate``: one rate for every 8
    consecutive blocks, as the DLM-Scope paper does with its batches of 8 (there with ``high`` 0.5).
    """

    policy: Policy = "rate"
    low: float = 0.05
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.policy not in get_args(Policy):
            raise UserError(f"corruption policy {self.policy!r} is not known: use one of {', '.join(get_args(Policy))}")
        if not 0 <= self.low <= self.high <= 1:
            raise UserError(f"corruption rates [{self.low}, {self.high}]: they must satisfy 0 <= low <= high <= 1")

    def __str__(self) -> str:
        return self.policy if self.policy == "clean" else f"{self.policy} U[{self.low:g}, {self.high:g}]"
