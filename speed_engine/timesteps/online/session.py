"""The running state of a method that changes: its observations, and the present density and weight
of each of its parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speed_engine.timesteps.online import Columns, Online
from speed_engine.timesteps.online.buffer import AllReduce, Buffer, nothing


class Session:
    """Lives on the device of the table. The density is the first part's, the weight the product of
    all parts'.
    """

    def __init__(
        self,
        kind: str,
        parts: list[Online | None],
        columns: list[Columns],
        num_slots: int,
        shape: tuple[int, ...],
    ) -> None:
        self.kind, self.parts = kind, parts
        self.online = [part for part in parts if part is not None]
        self.measure = columns[0].measure_T / columns[0].measure_T.sum()
        self.densities = [each.density_T.clone() for each in columns]
        self.weights = [each.weight_T.clone() for each in columns]
        self.every = min(part.every for part in self.online)
        learns = any(part.needs_losses for part in self.online)
        device = self.densities[0].device
        self.buffer = Buffer(self.every, num_slots, device) if learns else None
        for part, each in zip(parts, columns, strict=True):
            if part is not None:
                part.start(each, shape)

    def columns(self) -> tuple[Tensor, Tensor]:
        """The present density (sums to one) and own-target weight; float64 [T]."""
        weight = torch.stack(self.weights).prod(dim=0)
        if len(self.densities) == 1:
            return self.densities[0], weight
        relative = torch.stack(self.densities) / self.measure
        density = relative.prod(dim=0) * self.measure
        return density / density.sum(), weight

    def refresh(self, step: int, all_reduce: AllReduce | None) -> bool:
        """Let the parts look at the last interval, if one ended with `step` finished steps. Whether
        it did.

        Raises ValueError where losses were needed and none was observed.
        """
        if step == 0 or step % self.every:
            return False
        if self.buffer is not None and not self.buffer.filled:
            raise ValueError(
                f"timesteps.kind={self.kind} learns from the losses, but none was observed; call "
                "table.observe after every table.loss, or choose a method that is fixed"
            )
        if self.buffer is not None:
            seen = self.buffer.take(all_reduce)
        else:
            seen = nothing(self.every, self.measure.device)
        for index, part in enumerate(self.parts):
            if part is None:
                continue
            density, weight = part.refresh(step, seen)
            if density is not None:
                self.densities[index].copy_(density / density.sum())
            if weight is not None:
                self.weights[index].copy_(weight)
        return True

    def observe(self, address_2: Tensor, row_B: Tensor, losses_3B: Tensor) -> None:
        """Note a micro-batch; see `Buffer.write`."""
        if self.buffer is not None:
            self.buffer.write(address_2, row_B, losses_3B)

    def state_dict(self, all_reduce: AllReduce | None) -> dict[str, Tensor]:
        """Everything a resumed run needs, on the host, equal on every rank. One sum over the ranks."""
        state = self._live()
        if self.buffer is not None:
            state["observations"] = self.buffer.complete(all_reduce)
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state_dict` gave. Raises ValueError where it belongs to another
        method or batch.
        """
        live = self._live()
        if self.buffer is not None:
            live["observations"] = self.buffer.mine
        if {k: v.shape for k, v in live.items()} != {k: v.shape for k, v in state.items()}:
            raise ValueError(
                f"the saved state is not one of timesteps.kind={self.kind} with this global batch; keep "
                "timesteps and train.global_batch as they were"
            )
        for name, tensor in self._live().items():
            tensor.copy_(state[name])
        if self.buffer is not None:
            self.buffer.restore(state["observations"])

    def _live(self) -> dict[str, Tensor]:
        live = {f"density.{index}": tensor for index, tensor in enumerate(self.densities)}
        live |= {f"weight.{index}": tensor for index, tensor in enumerate(self.weights)}
        for index, part in enumerate(self.online):
            live |= {f"part.{index}.{name}": tensor for name, tensor in part.tensors().items()}
        return live
