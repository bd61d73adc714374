"""AdamWEMA: a torch optimizer that keeps one or two EMAs of the weights beside the moments of AdamW.

State per parameter: `exp_avg`, `exp_avg_sq`, `ema` (and `ema2`) like the parameter, `step` float32 [] on its device.
The EMA is elementwise state like any other, so it is sharded, saved and restored wherever optimizer state is: under
ZeRO it costs no communication. A gradient with a NaN or an infinity anywhere changes nothing (see op.py). No call waits
for the host, but the properties that return Python numbers do. Parameters are fp32 (masters).

A network that computes in bf16 trains from its masters in one pass:

    masters = [param.detach().float() for param in network.parameters()]     # network.bfloat16() afterwards
    optimizer = AdamWEMA(masters, copies=dict(zip(masters, network.parameters())))
    loss.backward(); optimizer.step(); optimizer.zero_grad()

torch keeps a gradient in its weight's dtype, so a master has none: its gradient is the bf16 `.grad` of its copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speed_kernels import contract
from speed_kernels.adamw_ema import flat, layout, op
from speed_kernels.adamw_ema.layout import Ema

EMA_KEYS = ("ema", "ema2")


@dataclass
class _Bucket:
    """Parameters that were always stepped together: one step counter, one kernel call."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    step: Tensor


class AdamWEMA(torch.optim.Optimizer):
    """AdamW (torch.optim.AdamW's mathematics) and EMAs of the weights in one pass.

    params: fp32 tensors or torch's parameter groups. ema: one or two decays. clip_norm: largest norm of the gradient
    over all groups, 0 = off. guard: leave everything untouched when the gradient is not finite. backend: auto, cpp,
    triton or reference. copies: parameter -> bf16 tensor of its shape and strides that receives the rounded new
    weights; give one for every parameter, or none. A parameter without a `.grad` takes that of its copy.
    reduce_square_sum: called with the float32 [] sum of squares of the local gradient, to sum it over ranks in place
    when the parameters are shards, so that all ranks skip, and clip, together.

    Counters: all parameters of a group that got gradients together share one `step` tensor; one that misses a
    gradient keeps its own count from then on, as in torch. For a CUDA graph run a step eagerly first, then capture
    `step`, and call `refresh()` before a replay whenever a group's lr (or another number) changed.
    Raises ValueError for parameters that are not fp32, not dense or not on one device.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        ema: Ema | Sequence[Ema] = Ema(),  # noqa: B008  (frozen)
        clip_norm: float = 0.0,
        guard: bool = True,
        backend: str = "auto",
        copies: Mapping[Tensor, Tensor] | None = None,
        reduce_square_sum: Callable[[Tensor], object] | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"{name} is {value}, but must be >= 0")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas are {betas}, but both must be in [0, 1)")
        if not clip_norm >= 0.0:
            raise ValueError(
                f"clip_norm is {clip_norm}, but must be >= 0 (0 switches clipping off)"
            )
        emas = (ema,) if isinstance(ema, Ema) else tuple(ema)
        if not 1 <= len(emas) <= 2:
            raise ValueError(f"{len(emas)} EMAs were asked for; one or two are possible")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "clip_norm": clip_norm,
            "emas": [list(each.code()) for each in emas],
        }
        self._hypers: dict[int, tuple[dict[str, Any], list[float], Tensor]] = {}
        super().__init__(params, defaults)
        tensors = [param for group in self.param_groups for param in group["params"]]
        devices = {param.device for param in tensors}
        if len(devices) != 1:
            raise ValueError(
                f"the parameters are on {sorted(map(str, devices))}; one device is needed"
            )
        self.num_emas = len(emas)
        self.guard = guard
        self.reduce_square_sum = reduce_square_sum
        self.choice = contract.choose(op.NAME, next(iter(devices)), backend)
        self._copies = dict(copies or {})
        self._steps: dict[Tensor, Tensor] = {}  # the counter that this object made for a parameter
        self._skipped: Tensor | None = None
        self._scalars: Tensor | None = None

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, grad_scale: Tensor | None = None
    ) -> Any:
        """Update every parameter that has a gradient. `grad_scale` float32 [] multiplies the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        buckets = [bucket for group in self.param_groups for bucket in self._buckets(group)]
        if not buckets:
            return loss
        device, backend = buckets[0].step.device, self.choice.backend
        square_sum = None
        if self.guard or any(bucket.group["clip_norm"] > 0.0 for bucket in buckets):
            grads = [grad for bucket in buckets for grad in flat.joined(bucket.grads)]
            square_sum = op.grad_square_sum(grads, backend)
            if self.reduce_square_sum is not None:
                self.reduce_square_sum(square_sum)
        skipped = self._skipped = (
            torch.zeros((), device=device) if self._skipped is None else self._skipped
        )
        for bucket in buckets:
            hyper = self._hyper(bucket.group, device)
            scalars = op.prepare(bucket.step, skipped, hyper, square_sum, grad_scale, backend)
            skipped = None  # counted once a step
            self._update(bucket, scalars)
            self._scalars = scalars
        return loss

    def _update(self, bucket: _Bucket, scalars: Tensor) -> None:
        keys = ("exp_avg", "exp_avg_sq", *EMA_KEYS[: self.num_emas])
        tensors = [bucket.params, bucket.grads]
        tensors += [[self.state[param][key] for param in bucket.params] for key in keys]
        if self._copies:
            tensors.append([self._copy(param) for param in bucket.params])
        lists = [flat.joined(each) for each in tensors]
        if len({len(each) for each in lists}) > 1:  # not all of them are flat: address each tensor
            lists = [[flat.storage_order(tensor) for tensor in each] for each in tensors]
        copies = lists.pop() if self._copies else []
        second = lists.pop() if self.num_emas == 2 else []
        op.adamw_ema(*lists, second, copies, scalars, self.choice.backend)

    def _copy(self, param: Tensor) -> Tensor:
        copy = self._copies.get(param)
        if copy is None or copy.stride() != param.stride():
            raise ValueError(
                f"copies has no bfloat16 tensor laid out like the parameter {list(param.shape)}; "
                "give one for every parameter, or none"
            )
        return copy

    def _grad(self, param: Tensor) -> Tensor | None:
        """The parameter's gradient, else its copy's; None where there is neither."""
        grad = param.grad
        if grad is None and param in self._copies:
            grad = self._copies[param].grad
        if grad is not None and grad.is_sparse:
            raise ValueError(
                "AdamWEMA takes no sparse gradients; build the embedding with sparse=False"
            )
        return grad

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop (or zero) the gradients of the parameters and of their copies."""
        super().zero_grad(set_to_none)
        for copy in self._copies.values():
            if copy.grad is not None and set_to_none:
                copy.grad = None
            elif copy.grad is not None:
                copy.grad.detach_().zero_()

    def _buckets(self, group: dict[str, Any]) -> list[_Bucket]:
        """The group's parameters with gradients, by their step counter; state is made where it is missing."""
        grads = {
            param: grad for param in group["params"] if (grad := self._grad(param)) is not None
        }
        present = list(grads)
        new = [param for param in present if not self.state.get(param)]
        if new:
            self._initialize(new)
        foreign = [
            param for param in present if self.state[param]["step"] is not self._steps.get(param)
        ]
        if foreign:
            self._adopt(foreign)
        by_step: dict[int, list[Tensor]] = {}
        for param in present:
            by_step.setdefault(id(self._steps[param]), []).append(param)
        absent = {
            id(self._steps[param])
            for param in group["params"]
            if param not in grads and param in self._steps
        }
        buckets = []
        for key, params in by_step.items():
            step = self._steps[params[0]]
            if key in absent:  # some that share this counter miss this step: part company
                step = step.clone()
                self._share(params, step)
            like = [flat.like_strides(grads[param], param) for param in params]
            buckets.append(_Bucket(group, params, like, step))
        return buckets

    def _share(self, params: Sequence[Tensor], step: Tensor) -> None:
        for param in params:
            self.state[param]["step"] = self._steps[param] = step

    def _initialize(self, params: list[Tensor]) -> None:
        """State for parameters that have none: zero moments, EMAs equal to the weights, one buffer per kind."""
        for param in params:
            if param.dtype != torch.float32 and self.choice.backend != "reference":
                raise ValueError(
                    f"a parameter of shape {list(param.shape)} is {param.dtype}; AdamWEMA updates float32 "
                    "masters (use `copies` for bfloat16 weights)"
                )
            if not flat.is_dense(param):
                raise ValueError(
                    f"a parameter of shape {list(param.shape)} has gaps or overlaps in memory (strides "
                    f"{param.stride()}); make it contiguous before building the optimizer"
                )
        self._share(params, torch.zeros((), device=params[0].device))
        for key in ("exp_avg", "exp_avg_sq", *EMA_KEYS[: self.num_emas]):
            for param, part in zip(params, flat.parts_like(params), strict=True):
                self.state[param][key] = part.copy_(param) if key in EMA_KEYS else part

    def _adopt(self, params: list[Tensor]) -> None:
        """Take over state that someone else put there (a checkpoint). Reads the counters once, on the host.

        The tensors of a single parameter are kept as they are, since DeepSpeed holds views of them; those of many
        parameters are moved into one buffer.
        """
        by_value: dict[float, list[Tensor]] = {}
        for param in params:
            state = self.state[param]
            missing = [key for key in EMA_KEYS[: self.num_emas] if key not in state]
            if missing:
                raise RuntimeError(
                    f"the restored optimizer state has no {' and no '.join(missing)} (DeepSpeed's universal "
                    "checkpoints drop it); restore the EMA, or call restart_ema() to begin it at the weights"
                )
            by_value.setdefault(float(state.get("step", 0)), []).append(param)
        for value, sharing in by_value.items():
            self._share(sharing, torch.full((), value, device=sharing[0].device))
            for key in ("exp_avg", "exp_avg_sq", *EMA_KEYS[: self.num_emas]):
                first = sharing[0]
                if len(sharing) == 1 and _lies_like(self.state[first][key], first):
                    continue
                for param, part in zip(sharing, flat.parts_like(sharing), strict=True):
                    self.state[param][key] = part.copy_(self.state[param][key])

    def _hyper(self, group: dict[str, Any], device: torch.device) -> Tensor:
        """The group's numbers on the device; uploaded when one has changed, without waiting."""
        codes = [number for code in group["emas"] for number in code] + [0.0, 0.0]
        beta1, beta2 = group["betas"]
        values = [
            float(group["lr"]),
            1.0 - beta1,
            1.0 - beta2,
            group["eps"],
            group["weight_decay"],
            group["clip_norm"],
            *codes[:4],
        ]
        known = self._hypers.get(id(group))
        if known is not None and known[1] == values:
            return known[2]
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a learning rate changed; call refresh() before capturing the step")
        hyper = torch.empty(layout.HYPER_SIZE, device=device) if known is None else known[2]
        hyper.copy_(torch.tensor(values, dtype=torch.float32), non_blocking=True)
        self._hypers[id(group)] = (group, values, hyper)
        return hyper

    @torch.no_grad()
    def refresh(self) -> None:
        """Upload changed learning rates (and betas ...) now; needed only between replays of a captured step."""
        for group, _, hyper in list(self._hypers.values()):
            self._hyper(group, hyper.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._hypers = {}  # keyed by group objects that load_state_dict has just replaced

    def reset(self) -> None:
        """Forget all state, as if no step had been made.

        For DeepSpeed's ZeRO-0 bf16 wrapper, which makes a step with zero gradients while it is built.
        """
        self.state.clear()
        self._steps.clear()
        self._skipped = self._scalars = None

    @torch.no_grad()
    def restart_ema(self) -> None:
        """Begin EMAs at the present weights wherever a restored state has none."""
        for param, state in self.state.items():
            for key in EMA_KEYS[: self.num_emas]:
                if state and key not in state:
                    state[key] = param.detach().clone()

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of the last step's scaled, unclipped gradient, float32 []; 0 without guard and clip_norm."""
        return None if self._scalars is None else self._scalars[layout.GRAD_NORM]

    @property
    def skipped(self) -> int:
        """Steps refused since construction because of a non-finite gradient. Waits for the device."""
        return 0 if self._skipped is None else int(self._skipped.item())

    @property
    def skip_count(self) -> Tensor | None:
        """`skipped` as float32 [] on the device, where it goes on counting; None before any step."""
        return self._skipped

    @property
    def applied(self) -> Tensor | None:
        """1 if the last step was applied, 0 if it was refused, float32 [] on the device; None before any step."""
        return None if self._scalars is None else self._scalars[layout.APPLY]

    def ema_parameters(self, which: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, its EMA) in the order of the groups; a parameter never stepped is its own EMA."""
        key = EMA_KEYS[which]
        if which >= self.num_emas:
            raise ValueError(
                f"there is no EMA number {which}; this optimizer keeps {self.num_emas}"
            )
        for group in self.param_groups:
            for param in group["params"]:
                yield param, self.state[param][key] if self.state.get(param) else param.detach()

    @torch.no_grad()
    def copy_ema_to(self, targets: Iterable[Tensor], which: int = 0) -> None:
        """Write the EMA into `targets` (a model's parameters, any dtype), in the order of the groups."""
        for target, (_, ema) in zip(targets, self.ema_parameters(which), strict=True):
            target.copy_(ema)

    @contextlib.contextmanager
    def swapped_ema(self, which: int = 0) -> Iterator[None]:
        """Inside this context the parameters, and their copies, hold the EMA; afterwards their own values again."""
        pairs = [(param, ema) for param, ema in self.ema_parameters(which) if ema is not param]
        with torch.no_grad():
            kept = [param.detach().clone() for param, _ in pairs]
            for param, ema in pairs:
                self._overwrite(param, ema)
        try:
            yield
        finally:
            with torch.no_grad():
                for (param, _), old in zip(pairs, kept, strict=True):
                    self._overwrite(param, old)

    def _overwrite(self, param: Tensor, values: Tensor) -> None:
        param.copy_(values)
        if param in self._copies:
            self._copies[param].copy_(values)


def _lies_like(tensor: Tensor, param: Tensor) -> bool:
    return (
        tensor.dtype == param.dtype
        and tensor.device == param.device
        and tensor.shape == param.shape
        and tensor.stride() == param.stride()
    )
