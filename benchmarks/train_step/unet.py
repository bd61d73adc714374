"""A training step of the paper's U-Net (36.4 M parameters, 1,000 classes): ours, and diffusers' in good plain torch.

diffusers' UNet2DModel holds our network's weights, through the export that users have. The rivals' loop is `eager`'s of
the DiT: tables on the device, closed forms, fused AdamW, a foreach EMA; in float32, or under bf16
autocast, which is compiled, too.
"""

# torch's own optimizers use the foreach operation below; torch just does not list it.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import random_latents
from benchmarks.harness.measure import GateError, Provider, Unavailable
from benchmarks.ops.diffusion_step.formulas import packed_rows
from benchmarks.report.predictions import NUM_CLASSES
from benchmarks.train_step.losses import Draw, eager_loss, masked_loss
from benchmarks.train_step.ours import OurLoop, overrides
from benchmarks.train_step.problem import BETAS, DECAY, EPS, LR, SEED, WEIGHT_DECAY, Problem
from speed_engine import config as configuration
from speed_engine.distributed import Processes
from speed_engine.models.unet import UNet
from speed_engine.training import assembly
from speed_engine.weights.unet_diffusers import export_diffusers

PRESET = "imagenet256_unet"
PROVIDERS = ("eager", "eager-bf16", "compile", "ours")
STEPS = 3  # of the gate
TOLERANCE = 2e-2  # of a loss, relative: somebody computes in bf16


class House:
    """Our engine, in bf16 with float32 masters, and diffusers' networks, which all begin with the same weights."""

    def __init__(self, problem: Problem, processes: Processes) -> None:
        self.problem = problem
        config = configuration.load(PRESET, overrides("torch", problem.case, problem.device))
        choices = assembly.choose_kernels(config, processes.device)
        if fallbacks := [f"{each.op}: {each.reason}" for each in choices if each.fallback]:
            raise Unavailable("; ".join(fallbacks))
        size, batch = problem.case.sample_size, problem.case.batch
        latents = random_latents.Config(num_samples=batch, size=size, num_classes=NUM_CLASSES)
        source = random_latents.build(latents)
        told, _, facts = assembly.told(config, source.facts)
        backends = {choice.op: choice.backend for choice in choices}
        model: Any = assembly.build_model(told, facts, processes.device, backends)
        _disturb(model)
        self.stock = _as_diffusers(model)
        parts = assembly.build(config, processes, source, model)
        step = assembly.open_step(parts, assembly.open_engine(parts))
        self.loop = OurLoop(step, problem, processes)
        self.losses = [self.loop.gate_step(index) for index in range(STEPS)]

    def provider(self, name: str) -> Provider:
        """One of PROVIDERS. Raises Unavailable."""
        if name == "ours":
            facts = {"dtype": "bfloat16", **self.loop.do.engine.facts()}
            return Provider(self.loop.check, self.loop.step, facts=facts)
        low = name != "eager"
        rival = Rival(self.problem, self.stock(), low, compiled=name == "compile")
        facts = {"dtype": "bfloat16 autocast" if low else "float32"}
        return Provider(lambda: rival.gate(self.losses), rival.step, facts=facts)


@torch.no_grad()
def _disturb(model: UNet) -> None:
    """The last layers of branches begin at zero, where nothing could be compared."""
    generator = torch.Generator().manual_seed(SEED)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise.to(parameter.device), alpha=0.02)


def _as_diffusers(model: UNet) -> Callable[[], Any]:
    """Makes UNet2DModels with these weights, as they are now. Raises Unavailable."""
    try:
        from diffusers.models.unets.unet_2d import UNet2DModel
    except ImportError as error:
        raise Unavailable(f"diffusers is not installed: {error}") from error
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        export_diffusers(folder, model)
        first: Any = UNet2DModel.from_pretrained(folder, local_files_only=True)
    config, state, device = first.config, first.state_dict(), next(model.parameters()).device

    def make() -> Any:
        made: Any = UNet2DModel.from_config(config)
        made.load_state_dict(state)
        return made.to(device).train()

    return make


class Rival:
    """diffusers' network in the plain loop."""

    def __init__(self, problem: Problem, model: Any, low: bool, compiled: bool) -> None:
        self.problem, self.model, self.low = problem, model, low
        self.rows_T8 = packed_rows(problem.tables).to(problem.device)
        self.parameters = list(model.parameters())
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.loss: Callable[[Draw], Tensor] = self._eager
        if compiled:
            fast = torch.compile(self._masked, dynamic=False, fullgraph=True)
            self.loss = lambda draw: fast(draw.t_B, draw.eps)

    def _network(self, x_t: Tensor, t_B: Tensor, labels_B: Tensor) -> Tensor:
        with torch.autocast(self.problem.device.type, torch.bfloat16, enabled=self.low):
            return self.model(x_t, t_B, class_labels=labels_B, return_dict=False)[0]

    def _eager(self, draw: Draw) -> Tensor:
        x0, labels_B = self.problem.x0, self.problem.labels_B
        return eager_loss(self._network, x0, labels_B, draw, self.rows_T8)

    def _masked(self, t_B: Tensor, eps: Tensor) -> Tensor:
        x0, labels_B = self.problem.x0, self.problem.labels_B
        return masked_loss(self._network, x0, labels_B, t_B, eps, self.rows_T8)

    def step(self) -> Tensor:
        x0 = self.problem.x0
        t_B = torch.randint(0, self.problem.tables.num_rows, (len(x0),), device=x0.device)
        return self.update(Draw(t_B, torch.randn_like(x0), torch.zeros(0, dtype=torch.int64)))

    def update(self, draw: Draw) -> Tensor:
        """Forward, backward, optimizer, EMA -> the mean loss, detached."""
        loss = self.loss(draw)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 1.0 - DECAY)
        return loss.detach()

    def gate(self, expected: list[float]) -> None:
        """The losses of the first steps, at the draws of ours. Raises GateError."""
        for index, wanted in enumerate(expected):
            found = float(self.update(self.problem.gate_draw(index)))
            if not (math.isfinite(found) and abs(found - wanted) <= TOLERANCE * abs(wanted)):
                raise GateError(
                    f"the loss of step {index} is {found:.6g}, ours {wanted:.6g} within {TOLERANCE:g}"
                )
