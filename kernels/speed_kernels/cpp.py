"""What the calls into csrc share: the numbers of element types, and addresses."""

from __future__ import annotations

import torch
from torch import Tensor

# The numbers of csrc/elements.h.
DTYPE_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def address(tensor: Tensor | None) -> int | None:
    """Where the tensor's elements lie, null for none."""
    return None if tensor is None else tensor.data_ptr()
