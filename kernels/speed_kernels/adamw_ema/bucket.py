"""Parameters that are stepped together, and all that their steps have in common: looked up once, not in every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from speed_kernels.adamw_ema import flat, op


class Bucket:
    """Parameters of one group with one step counter: one kernel call.

    states: a list of tensors for each of the moments and EMAs. copies: bf16 weights, or empty. positions: of the
    parameters in their group.
    """

    def __init__(
        self,
        group: dict[str, Any],
        positions: Sequence[int],
        step: Tensor,
        states: Sequence[Sequence[Tensor]],
        copies: Sequence[Tensor],
        backend: str,
    ) -> None:
        self.group, self.positions, self.step, self.backend = group, positions, step, backend
        self.params = [group["params"][position] for position in positions]
        lists = [self.params, *states, copies]
        self.written = [tensor for each in (self.params, copies) for tensor in each]
        self._lists = [[flat.storage_order(tensor) for tensor in each] for each in lists]
        joined = [flat.joined(each) if each else [] for each in lists]
        self._flat = joined if all(len(each) <= 1 for each in joined) else None
        self._updates: dict[bool, op.Update] = {}
        self._tensors = [tensor for each in lists for tensor in each]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self._plain = all(param.is_contiguous() for param in self.params)

    def moved(self) -> bool:
        """Whether someone has put a tensor's memory elsewhere."""
        return [tensor.data_ptr() for tensor in self._tensors] != self._addresses

    def grads(self, of_group: Sequence[Tensor | None]) -> list[Tensor]:
        """Of the gradients of the group, those of this bucket, laid out like the parameters: one flat tensor where all
        is flat."""
        grads = [grad for position in self.positions if (grad := of_group[position]) is not None]
        if not (self._plain and all(grad.is_contiguous() for grad in grads)):
            pairs = zip(grads, self.params, strict=True)
            grads = [flat.storage_order(flat.like_strides(grad, param)) for grad, param in pairs]
        return flat.joined(grads) if self._flat is not None else grads

    def update(self, grads: Sequence[Tensor], scalars: Tensor) -> None:
        """One step in place."""
        whole = self._flat is not None and len(grads) == 1
        if whole not in self._updates:
            lists = self._flat if whole and self._flat is not None else self._lists
            params, exp_avgs, exp_avg_sqs, emas, *second, copies = lists
            self._updates[whole] = op.Update(
                params,
                exp_avgs,
                exp_avg_sqs,
                emas,
                second[0] if second else [],
                copies,
                self.backend,
            )
        self._updates[whole](grads, scalars)

    def fill(self) -> list[Tensor]:
        """See `op.Update.fill`."""
        return [tensor for update in self._updates.values() for tensor in update.fill()]


@dataclass(frozen=True)
class Plan:
    """The buckets of a group, for as long as the same parameters get gradients and no state is replaced."""

    present: list[bool]  # which parameters of the group get gradients
    states: list[tuple[Tensor, dict[str, Any], list[Tensor]]]  # of those: its state, what is there
    buckets: list[Bucket]
