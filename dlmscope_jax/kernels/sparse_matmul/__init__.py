"""Products of sparse codes with a dictionary, with gradients that stay sparse. README.md: algorithms, traffic, and measurements."""

from .gradients import decode, decode_flat, decode_prefixes, with_encoder_gradient, with_flat_encoder_gradient
from .products import combine, combine_flat, dots, dots_flat, outer, outer_flat, sums

__all__ = [
    "combine",
    "combine_flat",
    "decode",
    "decode_flat",
    "decode_prefixes",
    "dots",
    "dots_flat",
    "outer",
    "outer_flat",
    "sums",
    "with_encoder_gradient",
    "with_flat_encoder_gradient",
]
