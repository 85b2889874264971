"""How a language model diffuses: corruption, objectives, samplers."""

from .corruption import corrupt, stratified_times, training_rates
from .objectives import align_logits, diffusion_loss, elbo, head_loss, next_token_loss, predicts_next, token_loss

__all__ = [
    "align_logits", "corrupt", "diffusion_loss", "elbo", "head_loss", "next_token_loss", "predicts_next", "stratified_times",
    "token_loss", "training_rates",
]  # fmt: skip
