"""Noise and loss of latents in bf16: what they give of the same numbers in float32, bit for bit, forward and backward.

All is computed in float32, so that the only error is the latents' own rounding, at most 2^-9 of each number.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from speed_kernels.loss.op import diffusion_loss
from speed_kernels.noise.op import noise
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") == "1":
    BACKENDS = [("triton", "cpu")]
else:
    BACKENDS = [("reference", "cpu"), ("cpp", "cpu")]
    if torch.cuda.is_available():
        BACKENDS += [("triton", "cuda")]
SEED = 19


def step(x0: Tensor, backend: str, learned: bool) -> tuple[Tensor, ...]:
    """x_t, rows, times, total, losses and the gradient by what a network said, all on the CPU."""
    generator = torch.Generator().manual_seed(1)
    rows_T8 = torch.rand(9, 8, generator=generator).to(x0.device)
    cdf_T = (torch.arange(1, 10, dtype=torch.float64) / 9 * 2**32).long().to(x0.device)
    cdf_T[-1] = 2**32
    address_2, time_T = torch.tensor([4, 12], device=x0.device), torch.arange(9.0, device=x0.device)
    shared: dict[str, Any] = {"seed": SEED, "backend": backend}
    x_t, row_B, time_B = noise(
        x0, cdf_T, rows_T8, time_T, address_2, num_slots=32, dtype=torch.bfloat16, **shared
    )
    out = torch.cat([x_t, 0.1 * x_t], 1) if learned else x_t.clone()
    out.requires_grad_()
    total, losses_3B = diffusion_loss(
        out, x0, row_B, rows_T8, address_2, learned_variance=learned, **shared
    )
    total.backward()
    assert out.grad is not None and out.grad.dtype == torch.bfloat16
    return tuple(each.detach().cpu() for each in (x_t, row_B, time_B, total, losses_3B, out.grad))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (2, 3, 7, 5)])
def test_the_steps_bits_are_those_of_float32(backend, device, learned, shape):
    x0 = torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(device)
    found, wanted = step(x0, backend, learned), step(x0.float(), backend, learned)
    assert found[0].dtype == torch.bfloat16 and found[4].isfinite().all()
    assert all(map(torch.equal, found, wanted))
    if backend != "reference":  # and both are the reference's
        truth = step(x0.cpu().float(), "reference", learned)
        for name, mine, theirs in zip(("x_t", "row", "time"), found, truth, strict=False):
            torch.testing.assert_close(mine, theirs, rtol=2.0**-7, atol=1e-5, msg=name)
        torch.testing.assert_close(
            found[4], truth[4], rtol=2e-2, atol=1e-4
        )  # of another x_t's bits
