"""How a language model diffuses: corruption, objectives, samplers, generation."""

from .corruption import corrupt, stratified_times, training_rates
from .generate import Collect, Trace, generate
from .objectives import align_logits, diffusion_loss, elbo, head_loss, next_token_loss, predicts_next, token_loss
from .samplers import ARSampler, DreamSampler, LLaDASampler, Sampler
from .schedule import dream_counts, dream_fractions, dream_timesteps, transfer_counts

__all__ = [
    "ARSampler", "Collect", "DreamSampler", "LLaDASampler", "Sampler", "Trace", "align_logits", "corrupt", "diffusion_loss",
    "dream_counts", "dream_fractions", "dream_timesteps", "elbo", "generate", "head_loss", "next_token_loss", "predicts_next",
    "stratified_times", "token_loss", "training_rates", "transfer_counts",
]  # fmt: skip
