"""The section `optim`: AdamW with an EMA of the weights, by our one-pass kernel or by one of its peers.

Whatever is chosen is an ordinary torch optimizer whose state holds an `ema` beside `exp_avg`, so engines save, shard
and export all of them alike. The peers (torch's fused AdamW, NVIDIA apex, DeepSpeed) exist for comparison: their EMA is
a foreach lerp after the step, and they apply a gradient that is not finite, while ours leaves everything untouched.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from speed_kernels.adamw_ema.layout import Ema
from speed_kernels.adamw_ema.optimizer import EMA_KEYS, AdamWEMA
from torch import Tensor

from speed_engine.kinds import Section

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Width = Annotated[float, Field(ge=0.001, le=0.288)]
COUNT = "ema_step"  # applied updates of a peer's EMA, in its state


class Config(Section):
    """Settings of the optimizer and of the EMA."""

    name: Literal["adamw_ema", "torch_fused", "apex", "deepspeed_fused"] = Field(
        "adamw_ema", description="adamw_ema: our one-pass kernel; the others are for comparison"
    )
    lr: float = Field(1e-4, ge=0.0, description="learning rate after the warm-up")
    lr_shape: Literal["constant", "cosine", "linear", "inverse_sqrt"] = Field(
        "constant",
        description="after the warm-up: constant; cosine or linear down to lr_end over decay_steps; "
        "inverse_sqrt: lr sqrt(decay_start / step) from decay_start on",
    )
    lr_end: float = Field(
        0.0, ge=0.0, description="learning rate after a cosine or linear decay, at most lr"
    )
    decay_start: int | None = Field(
        None, ge=0, description="first update of the decay; default: the end of the warm-up"
    )
    decay_steps: int | None = Field(
        None, ge=1, description="length of a cosine or linear decay, in updates"
    )
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="decay of the two moments")
    eps: float = Field(1e-8, gt=0.0, description="added to the root of the second moment")
    weight_decay: float = Field(0.0, ge=0.0, description="decoupled weight decay")
    warmup_steps: int = Field(0, ge=0, description="updates of linear learning-rate warm-up")
    warmup_images: int | None = Field(
        None, ge=0, description="the warm-up in images instead: warmup_steps = this / global_batch"
    )
    clip: float = Field(0.0, ge=0.0, description="largest norm of the whole gradient; 0 = off")
    ema_kind: Literal["constant", "warmup", "power", "half_life"] = Field(
        "constant",
        description="constant: ema_decay; warmup: at most (1+n)/(10+n); power: EDM2's (1-1/t)^(g+1); "
        "half_life: EDM's, at most 5 % of the updates made so far",
    )
    ema_half_life: float = Field(1000.0, gt=0.0, description="of the kind half_life, in updates")
    ema_half_life_images: float | None = Field(
        None, gt=0.0, description="the same in images: ema_half_life = this / global_batch"
    )
    ema_decay: Share = Field(0.9999, description="decay of the kinds constant and warmup")
    ema_sigma_rel: tuple[Width, ...] = Field(
        (0.05,),
        min_length=1,
        max_length=2,
        description="relative widths of the kind power, one EMA each",
    )

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        """What contradicts itself is refused."""
        fields = type(self).model_fields  # settings that were written out hold the defaults, too
        for steps, images in (
            ("warmup_steps", "warmup_images"),
            ("ema_half_life", "ema_half_life_images"),
        ):
            if getattr(self, steps) != fields[steps].default and getattr(self, images) is not None:
                raise ValueError(f"optim.{steps} and optim.{images} say the same; give one of them")
        arrives = self.lr_shape in ("cosine", "linear")
        if arrives and self.decay_steps is None:
            raise ValueError(
                f"optim.lr_shape={self.lr_shape} needs optim.decay_steps, the updates it takes"
            )
        if self.decay_steps is not None and not arrives:
            raise ValueError(
                f"optim.decay_steps is for optim.lr_shape=cosine or linear, not {self.lr_shape}"
            )
        if self.lr_end > self.lr:
            raise ValueError(f"optim.lr_end={self.lr_end:g} is above optim.lr={self.lr:g}")
        if self.lr_shape == "inverse_sqrt" and not (self.decay_start or self.warmup_steps):
            raise ValueError(
                "optim.lr_shape=inverse_sqrt needs optim.decay_start, the update from which lr falls"
            )
        return self

    def in_updates(self, global_batch: int) -> Self:
        """The same with everything that was given in images counted in updates of `global_batch` samples."""
        changed: dict[str, Any] = {}
        if self.warmup_images is not None:
            steps = round(self.warmup_images / global_batch)
            changed |= {"warmup_steps": steps, "warmup_images": None}
        if self.ema_half_life_images is not None:
            updates = self.ema_half_life_images / global_batch
            changed |= {"ema_half_life": updates, "ema_half_life_images": None}
        return self.model_copy(update=changed) if changed else self

    def emas(self) -> list[Ema]:
        """The one or two EMAs that these settings describe."""
        if self.ema_kind == "power":
            return [Ema("power", sigma_rel=width) for width in self.ema_sigma_rel]
        return [Ema(self.ema_kind, decay=self.ema_decay, half_life=self.ema_half_life)]


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of the update after `step` earlier ones: linear up to `warmup_steps`, then as `lr_shape` says.

    With s = decay_start (default: warmup_steps) and p = (step - s) / decay_steps in [0, 1]: cosine is lr_end +
    (lr - lr_end) (1 + cos pi p) / 2, linear lr_end + (lr - lr_end) (1 - p), inverse_sqrt lr sqrt(s / step) from
    s on (Karras et al. 2024, section 2.3).
    """
    rate = config.lr
    start = config.warmup_steps if config.decay_start is None else config.decay_start
    if config.lr_shape == "inverse_sqrt":
        rate *= math.sqrt(start / max(start, step))
    elif config.decay_steps is not None:
        done = min(1.0, max(0.0, (step - start) / config.decay_steps))
        left = 1.0 - done if config.lr_shape == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)
        rate = config.lr_end + (rate - config.lr_end) * left
    return rate * min(1.0, (step + 1) / max(1, config.warmup_steps))


def build(
    config: Config,
    params: Iterable[Any],
    backend: str,
    *,
    clip_norm: float = 0.0,
    guard: bool = True,
    deepspeed_adam: Callable[..., torch.optim.Optimizer] | None = None,
    copies: Mapping[Tensor, Tensor] | None = None,
    reduce_square_sum: Callable[[Tensor], object] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over `params` (fp32 tensors or torch's parameter groups).

    `backend` of our kernel: auto, cpp, triton, reference. `clip_norm` is given by an engine that does not clip by
    itself; it must see the whole gradient. `guard=False` saves our kernel one read of the gradient where the engine
    refuses non-finite ones itself. `deepspeed_adam` is DeepSpeed's FusedAdam. Of our kernel alone (see AdamWEMA):
    `copies`, parameter -> its bf16 weights; `reduce_square_sum`, which makes the whole gradient of its shards.
    Raises ValueError where the chosen peer is missing or cannot run.
    """
    params = list(params)
    numbers: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw_ema":
        return AdamWEMA(
            params,
            **numbers,
            ema=config.emas(),
            clip_norm=clip_norm,
            guard=guard,
            backend=backend,
            copies=copies,
            reduce_square_sum=reduce_square_sum,
        )
    if config.name == "torch_fused":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(params, **numbers, fused=True)
    else:
        factory = _apex_adam() if config.name == "apex" else deepspeed_adam
        if factory is None:
            raise ValueError(
                "optim.name=deepspeed_fused needs the DeepSpeed engine; set engine.kind=deepspeed, "
                "or optim.name=adamw_ema"
            )
        if any(not param.is_cuda for param in _tensors(params)):
            raise ValueError(
                f"optim.name={config.name} runs on CUDA devices only; set optim.name=adamw_ema or torch_fused"
            )
        optimizer = factory(params, **numbers, adam_w_mode=True)
    ForeachEma(config.emas(), clip_norm).attach(optimizer)
    return optimizer


def _tensors(params: list[Any]) -> list[Tensor]:
    return [p for each in params for p in (each["params"] if isinstance(each, dict) else [each])]


def _apex_adam() -> Callable[..., torch.optim.Optimizer]:
    """NVIDIA apex's FusedAdam. Raises ValueError where apex is missing, or is PyPI's unrelated project."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        raise ValueError(
            "optim.name=apex needs NVIDIA apex; build it from https://github.com/NVIDIA/apex with "
            "APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or set optim.name=adamw_ema"
        )
    if not any(
        (Path(place) / "optimizers").is_dir() for place in spec.submodule_search_locations or []
    ):
        raise ValueError(
            "the installed package apex is PyPI's web toolkit, not NVIDIA's apex; pip uninstall apex and build "
            "https://github.com/NVIDIA/apex, or set optim.name=adamw_ema"
        )
    from apex.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]

    return FusedAdam


class ForeachEma:
    """EMA of the weights beside any optimizer: hooks around its step, one foreach lerp per group and EMA.

    The averages live in the optimizer's own state, so they are sharded, saved and restored with it.
    """

    def __init__(self, emas: list[Ema], clip_norm: float = 0.0) -> None:
        self.emas = emas
        self.clip_norm = clip_norm
        self._first: dict[Tensor, Tensor] = {}  # weights before a parameter's first step

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Follow every step of `optimizer` from now on."""
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        present = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        # Not into the state yet: optimizers make their own state where there is none at all.
        self._first = {
            p: p.detach().clone() for p in present if EMA_KEYS[0] not in optimizer.state[p]
        }
        if self.clip_norm > 0.0:
            torch.nn.utils.clip_grad_norm_(present, self.clip_norm)

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        by_count: dict[int, list[Tensor]] = {}
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = optimizer.state[param]
                    state[COUNT] = state.get(COUNT, 0) + 1
                    by_count.setdefault(state[COUNT], []).append(param)
        for count, params in by_count.items():
            for key, ema in zip(EMA_KEYS, self.emas, strict=False):
                for param in params:
                    if key not in optimizer.state[param]:
                        optimizer.state[param][key] = self._first[param].clone()
                averages = [optimizer.state[param][key] for param in params]
                torch._foreach_lerp_(averages, params, ema.weight(count))  # pyright: ignore[reportPrivateImportUsage]
        self._first = {}


def ema_of(optimizer: torch.optim.Optimizer, parameter: Tensor, which: int = 0) -> Tensor:
    """The EMA that `optimizer` keeps of a tensor it updates; the tensor itself before its first step."""
    state = optimizer.state.get(parameter) or {}
    return state.get(EMA_KEYS[which], parameter.detach())


def num_skipped(optimizer: torch.optim.Optimizer) -> int:
    """Updates that the optimizer itself refused because the gradient was not finite. Waits for the device."""
    return optimizer.skipped if isinstance(optimizer, AdamWEMA) else 0


def skip_count(optimizer: torch.optim.Optimizer) -> Tensor | int:
    """As `num_skipped`, but on the device: nothing waits."""
    count = optimizer.skip_count if isinstance(optimizer, AdamWEMA) else None
    return 0 if count is None else count


def grad_norm(optimizer: torch.optim.Optimizer) -> float | None:
    """Norm of the last update's whole gradient before clipping, where AdamWEMA took it. Waits for the device."""
    if not isinstance(optimizer, AdamWEMA) or optimizer.grad_norm is None:
        return None
    taken = optimizer.guard or any(group["clip_norm"] > 0 for group in optimizer.param_groups)
    return float(optimizer.grad_norm) if taken else None


def reset(optimizer: torch.optim.Optimizer) -> None:
    """Forget all state, as if no step had been made (see AdamWEMA.reset)."""
    if isinstance(optimizer, AdamWEMA):
        optimizer.reset()
        return
    optimizer.state.clear()
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = 0
