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
from typing import Any

import torch
from torch import Tensor

from speed_kernels import contract, launch
from speed_kernels.adamw_ema import flat, layout, op
from speed_kernels.adamw_ema.bucket import Bucket, Plan
from speed_kernels.adamw_ema.layout import Ema

EMA_KEYS = ("ema", "ema2")


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
    `step`, and call `refresh()` before the first replay, and before another whenever a group's lr (or another number)
    changed.
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
        self._module = contract.implementation(op.NAME, self.choice.backend)
        self._keys = ("step", "exp_avg", "exp_avg_sq", *EMA_KEYS[: self.num_emas])
        self._copies = dict(copies or {})
        self._steps: dict[Tensor, Tensor] = {}  # the counter that this object made for a parameter
        self._plans: dict[int, Plan] = {}
        self._squares: tuple[list[int], op.Squares] | None = None
        self._of_graphs: list[Tensor] = []  # what captured steps read
        self._skipped: Tensor | None = None
        self._scalars: Tensor | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's own, without what keeps torch.compile out of it, which would import the compiler: two seconds."""
        guarded: Any = torch.optim.Optimizer.add_param_group
        getattr(guarded, "__wrapped__", guarded)(self, param_group)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, grad_scale: Tensor | None = None
    ) -> Any:
        """Update every parameter that has a gradient. `grad_scale` float32 [] multiplies the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [
            (bucket, bucket.grads(grads))
            for group in self.param_groups
            for grads in ([self._grad(param) for param in group["params"]],)
            for bucket in self._buckets(group, grads)
        ]
        if not found:
            return loss
        device, module = found[0][0].step.device, self._module
        square_sum = None
        if self.guard or any(bucket.group["clip_norm"] > 0.0 for bucket, _ in found):
            square_sum = self._square_sum([grad for _, grads in found for grad in grads])
            if self.reduce_square_sum is not None:
                self.reduce_square_sum(square_sum)
            square_sum = square_sum.to(torch.float32)
        skipped = self._skipped = (
            torch.zeros((), device=device) if self._skipped is None else self._skipped
        )
        for bucket, grads in found:
            hyper = self._hyper(bucket.group, device)
            scalars = module.prepare(bucket.step, skipped, hyper, square_sum, grad_scale)
            skipped = None  # counted once a step
            bucket.update(grads, scalars)
            torch.autograd.graph.increment_version(bucket.written)
            self._scalars = scalars
        return loss

    def _square_sum(self, grads: list[Tensor]) -> Tensor:
        sizes = [grad.numel() for grad in grads]
        if self._squares is None or self._squares[0] != sizes:
            self._squares = sizes, op.Squares(grads, self.choice.backend)
        return self._squares[1](grads)

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
        params = [param for group in self.param_groups for param in group["params"]]
        for held in (*params, *self._copies.values()):
            if held.grad is not None and set_to_none:
                held.grad = None
            elif held.grad is not None:
                held.grad.detach_().zero_()

    def _buckets(self, group: dict[str, Any], grads: list[Tensor | None]) -> list[Bucket]:
        """The group's parameters with gradients, by their step counter; state is made where it is missing."""
        present = [grad is not None for grad in grads]
        plan = self._plans.get(id(group))
        if plan is None or plan.present != present or self._changed(plan):
            plan = self._plans[id(group)] = self._plan(group, present)
        return plan.buckets

    def _changed(self, plan: Plan) -> bool:
        """Whether someone else has replaced a state, or moved a tensor, since the plan was made."""
        for param, state, tensors in plan.states:
            if self.state.get(param) is not state:
                return True
            for key, tensor in zip(self._keys, tensors, strict=True):
                if state.get(key) is not tensor:
                    return True
        return any(bucket.moved() for bucket in plan.buckets)

    def _plan(self, group: dict[str, Any], present: list[bool]) -> Plan:
        params = [p for p, there in zip(group["params"], present, strict=True) if there]
        new = [param for param in params if not self.state.get(param)]
        if new:
            self._initialize(new)
        foreign = [
            param for param in params if self.state[param]["step"] is not self._steps.get(param)
        ]
        if foreign:
            self._adopt(foreign)
        by_step: dict[int, list[int]] = {}
        absent: set[int] = set()
        for position, (param, there) in enumerate(zip(group["params"], present, strict=True)):
            if there:
                by_step.setdefault(id(self._steps[param]), []).append(position)
            elif param in self._steps:
                absent.add(id(self._steps[param]))
        buckets = []
        for key, positions in by_step.items():
            members = [group["params"][position] for position in positions]
            step = self._steps[members[0]]
            if key in absent:  # some that share this counter miss this step: part company
                step = step.clone()
                self._share(members, step)
            states = [[self.state[param][name] for param in members] for name in self._keys[1:]]
            copies = [self._copy(param) for param in members] if self._copies else []
            backend = self.choice.backend
            buckets.append(Bucket(group, positions, step, states, copies, backend))
        states = [
            (param, self.state[param], [self.state[param][name] for name in self._keys])
            for param in params
        ]
        return Plan(present, states, buckets)

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
        for key in self._keys[1:]:
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
            for key in self._keys[1:]:
                first = sharing[0]
                if len(sharing) == 1 and flat.lies_like(self.state[first][key], first):
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
        if launch.capturing(device):
            raise RuntimeError("a learning rate changed; call refresh() before capturing the step")
        hyper = torch.empty(layout.HYPER_SIZE, device=device) if known is None else known[2]
        hyper.copy_(torch.tensor(values, dtype=torch.float32), non_blocking=True)
        self._hypers[id(group)] = (group, values, hyper)
        return hyper

    @torch.no_grad()
    def refresh(self) -> None:
        """Upload changed learning rates (and betas ...) now, and to a step just captured where its tensors are; needed
        only around a captured step: before the first replay, and between replays."""
        for group, _, hyper in list(self._hypers.values()):
            self._hyper(group, hyper.device)
        for plan in self._plans.values():
            for bucket in plan.buckets:
                self._of_graphs += bucket.fill()
        if self._squares is not None:
            self._of_graphs += self._squares[1].fill()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._hypers, self._plans = {}, {}  # of groups that load_state_dict has just replaced

    def reset(self) -> None:
        """Forget all state, as if no step had been made.

        For DeepSpeed's ZeRO-0 bf16 wrapper, which makes a step with zero gradients while it is built.
        """
        self.state.clear()
        self._steps.clear()
        self._plans.clear()
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
