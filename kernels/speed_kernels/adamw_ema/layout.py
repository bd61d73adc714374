"""The two small float32 tensors that steer an AdamW + EMA step, and the decays of the EMA.

`hyper` is written by the host (learning rate, betas, decays ...); `scalars` is computed from it on the device once a
step, together with the step counter, so that no Python number is baked into a graph and the host never waits.
Complements (1 - beta) are stored instead of the decays themselves: float32 keeps 1 - 0.9999 to 24 bits, but not
0.9999's distance from one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

# hyper, float32 [HYPER_SIZE]: input of `prepare`.
LR = 0
ONE_MINUS_BETA1 = 1
ONE_MINUS_BETA2 = 2
EPS = 3
WEIGHT_DECAY = 4
CLIP_NORM = 5  # largest norm of the whole gradient; 0 = no clipping
EMA_KIND = 6  # code of the first EMA's decay (KINDS)
EMA_VALUE = 7  # 1 - decay (constant, warmup), gamma (power), ln 2 over the half-life in updates
SECOND_EMA_KIND = 8
SECOND_EMA_VALUE = 9
HYPER_SIZE = 10

# scalars, float32 [SCALARS_SIZE]: output of `prepare`, input of `adamw_ema`.
APPLY = 0  # 1: update; 0: touch nothing
GRAD_SCALE = 1  # the caller's scale times the clipping factor
BETA2 = 2
GRAD_WEIGHT = 3  # 1 - beta1
SQUARE_WEIGHT = 4  # 1 - beta2
DECAY = 5  # 1 - lr * weight_decay
STEP_SIZE = 6  # lr / (1 - beta1^t)
DENOM_SCALE = 7  # 1 / sqrt(1 - beta2^t)
DENOM_EPS = 8
EMA_WEIGHT = 9  # 1 - decay of the first EMA at this step
SECOND_EMA_WEIGHT = 10
GRAD_NORM = 11  # norm of the scaled, unclipped gradient; 0 if no sum of squares was given
SCALARS_SIZE = 12

KINDS = {"constant": 0, "warmup": 1, "power": 2, "half_life": 3}
RAMP_UP = (
    0.05  # of the kind half_life: the half-life is at most this share of the updates made so far
)


@dataclass(frozen=True)
class Ema:
    """How one EMA of the weights decays; t = 1, 2, ... counts applied steps.

    constant: `decay`. warmup: min(decay, t / (9 + t)), that is (1 + n) / (10 + n) after n = t - 1 earlier updates.
    power: (1 - 1/t)^(gamma + 1), whose averaging profile has the relative width `sigma_rel`, a number in (0, 0.28)
    (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.1, appendix C).
    half_life: 0.5^(1 / min(half_life, 0.05 (t - 1))), in updates (Karras et al. 2022, appendix F.3: half a million
    images, with that ramp-up).
    """

    kind: Literal["constant", "warmup", "power", "half_life"] = "constant"
    decay: float = 0.9999
    sigma_rel: float = 0.05
    half_life: float = 1000.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"ema kind {self.kind!r} does not exist; choose {', '.join(KINDS)}")
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"ema decay {self.decay} is outside [0, 1); 0.9999 is usual")
        if not 0.0 < self.half_life < math.inf:
            raise ValueError(f"ema half_life {self.half_life} is no positive number of updates")
        if self.kind == "power":
            power_gamma(self.sigma_rel)

    def code(self) -> tuple[float, float]:
        """(EMA_KIND, EMA_VALUE) as they stand in `hyper`."""
        if self.kind == "power":
            value = power_gamma(self.sigma_rel)
        elif self.kind == "half_life":
            value = math.log(2.0) / self.half_life
        else:
            value = 1.0 - self.decay
        return float(KINDS[self.kind]), value

    def weight(self, t: int) -> float:
        """1 - decay at step t = 1, 2, ..., in double precision on the host."""
        _, value = self.code()
        if self.kind == "warmup":
            return max(value, 9.0 / (9.0 + t))
        if self.kind == "power":
            return 1.0 if t == 1 else -math.expm1((value + 1.0) * math.log1p(-1.0 / t))
        if self.kind == "half_life":
            ramp_up = math.inf if t == 1 else math.log(2.0) / RAMP_UP / (t - 1)
            return -math.expm1(-max(value, ramp_up))
        return value


def power_gamma(sigma_rel: float) -> float:
    """Exponent gamma >= 0 whose power-function EMA has relative width `sigma_rel`.

    Solves sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1 by bisection (the width falls with gamma); 0.05 gives
    16.97, 0.10 gives 6.94. Raises ValueError outside (0, 1/sqrt(12)).
    """
    if not 0.001 <= sigma_rel <= 1.0 / math.sqrt(12.0):
        raise ValueError(f"ema sigma_rel {sigma_rel} is outside [0.001, 0.288]; 0.05 is usual")
    low, high = 0.0, 1e4
    for _ in range(200):
        gamma = 0.5 * (low + high)
        if (gamma + 1.0) / ((gamma + 2.0) ** 2 * (gamma + 3.0)) > sigma_rel**2:
            low = gamma
        else:
            high = gamma
    return 0.5 * (low + high)
