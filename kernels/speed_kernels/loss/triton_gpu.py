"""The loss op as one Triton kernel on CUDA GPUs (A100, H100, H200, B200).

A program takes a run of one sample's elements: it makes the noise again, writes the gradient and keeps two partial
sums. The program that finishes last (a ticket counter, the only atomic) adds all partial sums in a fixed order, so that
the result is the same in every run whichever program is last. Nothing is read on the host; the launch, and the
four-byte fill that resets the ticket before it, can be captured in a CUDA graph.

Shape legend: E elements of a tile, B samples of the finish, C chunks of the finish.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from speed_kernels import philox
from speed_kernels.noise import triton_gpu as noise_gpu
from speed_kernels.noise.triton_gpu import normals_tile

TILE = 1024
NUM_WARPS = 4
BITS_PER_NAT = tl.constexpr(1.4426950408889634)
BINS = tl.constexpr(255.0)


def unavailable() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    return noise_gpu.unavailable()


@triton.jit
def divergence(error, v, spread, gap_precision):
    """KL(true posterior || model) in nats and its slope by the model's log variance."""
    y = (v + 1.0) * (0.5 * spread)  # log variance above LOGVAR_MIN
    t = tl.exp(-y) * (1.0 + gap_precision * (error * error))
    return 0.5 * (y - 1.0 + t), 0.5 * (1.0 - t)


@triton.jit
def bounded(x, BOUND: tl.constexpr):
    """x within [-BOUND, BOUND]; not a number stays so."""
    y = tl.where(x < -BOUND, -BOUND, x)
    return tl.where(y > BOUND, BOUND, y)


@triton.jit
def likelihood(error, x0, v, spread, log_var_min, mean_gap):
    """-ln of the mass of x0's bin of width 2/255, and its slope by the log variance.

    The distribution function is the logistic function of 2 sqrt(2/pi) (z + 0.044715 z^3); the mass is written so that it
    keeps its relative accuracy in the tails.
    """
    inverse_std = tl.exp(-0.5 * (log_var_min + (v + 1.0) * (0.5 * spread)))
    centre = mean_gap * error
    p = bounded(inverse_std * (centre + 1.0 / BINS), 100.0)
    m = bounded(inverse_std * (centre - 1.0 / BINS), 100.0)
    upper = 1.5957691216057308 * p * (1.0 + 0.044715 * (p * p))
    lower = 1.5957691216057308 * m * (1.0 + 0.044715 * (m * m))
    width = 1.5957691216057308 * (2.0 / BINS) * inverse_std
    width = width * (1.0 + 0.044715 * (p * p + p * m + m * m))
    d_upper = -0.7978845608028654 * p * (1.0 + 0.134145 * (p * p))
    d_lower = -0.7978845608028654 * m * (1.0 + 0.134145 * (m * m))
    e_upper = tl.exp(-bounded(upper, 60.0))
    e_lower = tl.exp(-bounded(lower, 60.0))
    cdf_upper = 1.0 / (1.0 + e_upper)
    sf_lower = e_lower / (1.0 + e_lower)
    d_left = cdf_upper * cdf_upper * e_upper * d_upper
    d_right = -(sf_lower / (1.0 + e_lower)) * d_lower
    # The difference of the two distribution functions, from the side on which both are small.
    flip = upper + lower < 0.0
    e_near = tl.exp(-bounded(tl.where(flip, -upper, lower), 60.0))
    e_far = tl.exp(-bounded(tl.where(flip, -lower, upper), 60.0))
    series = 0.041667170822620392 - 0.008370300754904747 * width
    series = 0.1666649430990219 - width * (series - 0.0013888867106288671 * (-width * width * 0.0))
    one_minus = 1.0 - tl.exp(-width)
    inside = (e_near / (1.0 + e_near)) * one_minus / (1.0 + e_far)
    left = x0 < -0.999
    right = x0 > 0.999
    mass = tl.where(left, cdf_upper, tl.where(right, sf_lower, inside))
    d_mass = tl.where(left, d_left, tl.where(right, d_right, d_left + d_right))
    clamped = tl.where(mass < 1e-12, 1e-12, mass)
    return -tl.log(clamped), tl.where(mass < 1e-12, 0.0, -d_mass / clamped)
