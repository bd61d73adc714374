"""Adam (Kingma and Ba 2015) on one small device tensor, as tensors only: its state can be saved and
nothing waits.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Adam:
    """Minimises over `value` (float64 [P], written in place)."""

    def __init__(
        self, value: Tensor, lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8
    ) -> None:
        self.value, self.lr, self.beta1, self.beta2, self.eps = value, lr, beta1, beta2, eps
        self.mean = torch.zeros_like(value)
        self.square = torch.zeros_like(value)
        self.count = torch.zeros((), dtype=value.dtype, device=value.device)

    def step(self, grad: Tensor) -> None:
        """One step against `grad`, shaped like the value."""
        self.count += 1
        self.mean.lerp_(grad, 1 - self.beta1)
        self.square.lerp_(grad.square(), 1 - self.beta2)
        mean = self.mean / (1 - self.beta1**self.count)
        square = self.square / (1 - self.beta2**self.count)
        self.value -= self.lr * mean / (square.sqrt() + self.eps)

    def tensors(self) -> dict[str, Tensor]:
        """The state, the value included."""
        return {
            "value": self.value,
            "mean": self.mean,
            "square": self.square,
            "count": self.count,
        }
