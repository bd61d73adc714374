"""The trained weights of a network in one flat buffer, and for bf16 training their float32 masters in another.

The optimizer keeps its moments and EMAs beside each other where the weights are (speed_kernels.adamw_ema.flat), so
that each kind of tensor is one range of memory. Gradients stay where autograd puts them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from speed_kernels.adamw_ema import flat
from torch import Tensor, nn

from speed_engine.engines.shards import Part

ALIGNED = 16  # elements: 32 bytes in bf16, what wide accesses and matrix products like


class Masters:
    """What the optimizer updates in place of a module's trained parameters.

    `tensors` are the masters. In float32 they are the parameters themselves, moved into one flat buffer. In bfloat16
    the parameters become bf16, in a flat buffer of their own, and the masters are their float32 twins; `copies` then
    maps each master to its parameter, for AdamWEMA. Parameters without gradient become bf16 as well; buffers stay as
    they are, since a network's tables may need float32.

    The order of `trained` is that of the memory: the module's `memory_order()` if it has one, else its own, with sizes
    that are not multiples of 16 elements at the end, so that every other tensor is aligned.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"masters are for weights in float32 or bfloat16, not {dtype}")
        self.module = module
        order: Iterable[nn.Parameter] = getattr(module, "memory_order", module.parameters)()
        parameters = [p for p in order if p.requires_grad]
        if sorted(map(id, parameters)) != sorted(
            id(p) for p in module.parameters() if p.requires_grad
        ):
            raise ValueError(
                f"{type(module).__name__}.memory_order() must give every parameter once"
            )
        self.trained = sorted(parameters, key=lambda p: p.numel() % ALIGNED != 0)
        # Parameters that are not trained, unrounded, to be saved and exported.
        self.frozen = {
            name: p.detach().float().cpu().clone()
            for name, p in module.named_parameters(remove_duplicate=False)
            if not p.requires_grad
        }
        flat_parts = flat.side_by_side(self.trained, torch.float32)
        self.tensors: list[Tensor] = list(self.trained)
        self.copies: dict[Tensor, Tensor] = {}
        if dtype == torch.bfloat16:
            self.tensors = flat_parts
            flat_parts = flat.side_by_side(self.tensors, dtype)
            self.copies = dict(zip(self.tensors, self.trained, strict=True))
            for parameter in module.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
        for parameter, part in zip(self.trained, flat_parts, strict=True):
            parameter.data = part

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """(name of a trained parameter, its master) for every name, also those of tied parameters."""
        of = {id(p): master for p, master in zip(self.trained, self.tensors, strict=True)}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                yield name, of[id(parameter)]

    def state_dict(self) -> dict[str, Tensor]:
        """The module's state dict, its names unchanged, with every parameter as it was before rounding."""
        masters = {name: master.detach() for name, master in self.named()}
        return {**self.module.state_dict(), **self.frozen, **masters}

    def parts(self) -> list[Part]:
        """Every trained parameter, whole."""
        masters = {
            id(p): master for p, master in zip(self.trained, self.tensors, strict=True) if p.numel()
        }
        return [
            Part(name, tuple(p.shape), 0, p.numel(), masters[id(p)], 0)
            for name, p in self.module.named_parameters()
            if id(p) in masters
        ]

    @torch.no_grad()
    def restored(self, frozen: Mapping[str, Tensor]) -> None:
        """The masters, and the module's frozen parameters, hold other numbers: the bf16 weights become their rounding.

        frozen: the parameters that are not trained, unrounded."""
        self.frozen = {name: frozen.get(name, value) for name, value in self.frozen.items()}
        for master, parameter in self.copies.items():
            parameter.copy_(master)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the masters bit for bit and the bf16 weights as their rounding, in place: memory stays flat."""
        self.module.load_state_dict(state)
        self.frozen = {name: state[name].float().cpu() for name in self.frozen}
        if self.copies:
            for name, master in self.named():
                master.copy_(state[name])


class GradientSums:
    """The gradients of many micro-batches, added in float32 in one flat buffer.

    bf16 keeps 8 bits: a sum of n micro-batches in it would lose what is below 1/256 of the sum. The buffer costs 4
    bytes a parameter, so it is only made where an update has more than one micro-batch. The sums are the masters'
    `.grad`, which AdamWEMA prefers to that of their copies.
    """

    def __init__(self, masters: Masters) -> None:
        self.pairs = list(zip(masters.tensors, masters.trained, strict=True))
        self.parts = flat.side_by_side(masters.tensors)
        (self.buffer,) = flat.joined(self.parts)
        self.buffer.zero_()

    @torch.no_grad()
    def add(self) -> None:
        """Take the gradients of one micro-batch from the parameters. The first after an update starts afresh."""
        fresh: tuple[list[Tensor], list[Tensor]] = [], []
        more: tuple[list[Tensor], list[Tensor]] = [], []
        for (master, parameter), part in zip(self.pairs, self.parts, strict=True):
            if parameter.grad is None:
                continue
            sums, gradients = fresh if master.grad is None else more
            sums.append(part)
            gradients.append(parameter.grad)
            master.grad, parameter.grad = part, None
        # torch's own optimizers use these; torch just does not list them.
        if fresh[0]:
            torch._foreach_copy_(*fresh)  # pyright: ignore[reportPrivateImportUsage]
        if more[0]:
            torch._foreach_add_(*more)  # pyright: ignore[reportPrivateImportUsage]

    def average(self, world: int) -> None:
        """The mean over `world` processes, in one message. Collective."""
        if world > 1:
            dist.all_reduce(self.buffer)
            self.buffer.mul_(1.0 / world)
