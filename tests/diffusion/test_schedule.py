"""Schedules against the vectors that the original implementations give (reference/backbones.md 3.1, 3.2)."""

import numpy as np
import pytest

from dlmscope_jax.diffusion import dream_counts, dream_fractions, dream_timesteps, transfer_counts
from dlmscope_jax.errors import UserError


def test_llada_counts():
    assert transfer_counts(10, 4).tolist() == [3, 3, 2, 2]
    assert transfer_counts(3, 5).tolist() == [1, 1, 1, 0, 0]
    for masks, steps in [(64, 8), (63, 8), (1, 1), (0, 3)]:
        counts = transfer_counts(masks, steps)
        assert counts.sum() == masks and counts.max() - counts.min() <= 1 and (np.diff(counts) <= 0).all()


@pytest.mark.parametrize("n", [16, 30, 64, 256, 512])
def test_dream_one_token_a_step(n):
    assert dream_counts(n, n).tolist() == [0] + [1] * (n - 2) + [2]


@pytest.mark.parametrize("masks, steps", [(64, 16), (256, 64)])
def test_dream_four_tokens_a_step(masks, steps):
    assert dream_counts(masks, steps).tolist() == [3] + [4] * (steps - 2) + [5]


def test_dream_uneven():
    counts = dream_counts(128, 50)
    assert counts[:2].tolist() == [2, 2] and counts[-2:].tolist() == [3, 4] and counts.sum() == 128
    counts = dream_counts(768, 512)
    assert counts[0] == 1 and counts[-3:].tolist() == [2, 2, 4] and counts.sum() == 768


def test_dream_fractions_end_with_everything():
    fractions = dream_fractions(7, 1e-3)
    times = dream_timesteps(7, 1e-3)
    assert fractions.dtype == times.dtype == np.float32
    assert fractions[-1] == 1.0 and times[0] == 1.0 and times[-1] == np.float32(1e-3)
    np.testing.assert_allclose(np.prod(1 - fractions[:-1]), times[-2], rtol=1e-6)


def test_mistakes():
    with pytest.raises(UserError, match="steps"):
        transfer_counts(4, 0)
    with pytest.raises(UserError, match="steps"):
        dream_timesteps(0)
