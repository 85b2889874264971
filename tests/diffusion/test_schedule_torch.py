"""Dream's counts exactly as its own torch code computes them, its times to the last bit or so."""

import numpy as np
import torch

from dlmscope_jax.diffusion import dream_counts, dream_timesteps, mdlm_stays


def test_times_and_counts_are_torchs():
    for steps in (1, 2, 3, 7, 16, 30, 50, 64, 100, 255, 512):
        for eps in (1e-3, 1e-2, 1e-5):
            times = torch.linspace(1, eps, steps + 1)
            np.testing.assert_allclose(dream_timesteps(steps, eps), times.numpy(), rtol=0, atol=1.2e-7)
            for masks in (1, 5, 30, 64, 128, 768):
                left, counts = masks, []
                for i in range(steps):
                    mean = torch.tensor(left) / torch.tensor(1)
                    counts.append(int(mean * (1 - times[i + 1] / times[i])) if i < steps - 1 else int(mean))
                    left -= counts[-1]
                assert dream_counts(masks, steps, eps).tolist() == counts, (steps, eps, masks)


def test_mdlm_stays_as_in_its_own_code():
    """``t - dt`` over t, with the times and the step as MDLM's ``_sample`` computes them."""
    for steps in (1, 2, 7, 64, 128, 1000):
        for eps in (1e-5, 1e-3, 0.2):
            times = torch.linspace(1, eps, steps + 1)[:-1]
            stays = (times - (1 - eps) / steps) / times
            np.testing.assert_allclose(mdlm_stays(steps, eps), stays.clamp(min=0).numpy(), rtol=0, atol=2e-7)
            np.testing.assert_allclose(np.prod(mdlm_stays(steps, eps).astype(np.float64)), eps, rtol=2e-3)
