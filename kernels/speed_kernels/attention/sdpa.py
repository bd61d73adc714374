"""Attention by torch's scaled_dot_product_attention: its own pick of a kernel, or one kernel named.

The naming is `torch.nn.attention.sdpa_kernel`: torch.compile traces it into the one operator, so a compiled model and a
CUDA graph keep it, and a kernel that cannot run is an error instead of a silent change to a slow one.

The heads of DiT-XL have 72 elements, which all kernels here take as they are, strided, without a copy; inside,
  cuDNN       takes multiples of 8 up to 128; what it pads to is not documented;
  flash       is FlashAttention 2: its tiles are 96 wide (a third more arithmetic, no more memory traffic);
  efficient   is CUTLASS code for heads of at most 64 or 128: the second (up to three quarters more arithmetic).
The zeros that fill a tile are made in the chip. Padding q, k and v to 80, 96 or 128 here would be exact as well (zeros
add nothing to a score; the scale stays that of 72), but it would write and read a wider q, k and v and cut the
gradients, and no kernel would be fit by it that is not fit without: so there is none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from speed_kernels.attention.interface import HALF, Backend, Case, no_gpu, unfit
from speed_kernels.dispatch import direct

# Older versions read past the end where a tile of tokens is not full.
CUDNN_FOR_ANY_LENGTH = 91501


def attend(qkv_BT3NK: Tensor) -> Tensor:
    """[B, T, 3, N, K] -> [B, T, N, K] by the kernel that torch picks, plain attention if no other is fit.

    All axes move by views. The split along the axis of three is what lets the gradient come back as one contiguous
    tensor in the layout of its input: the backward pass of the product before it needs no copy.
    """
    q_BNTK, k_BNTK, v_BNTK = (x_BTNK.transpose(1, 2) for x_BTNK in qkv_BT3NK.unbind(2))
    return F.scaled_dot_product_attention(q_BNTK, k_BNTK, v_BNTK).transpose(1, 2)


def attend_cudnn(qkv_BT3NK: Tensor) -> Tensor:
    """`attend` by cuDNN only; float32 as in `attend`. Raises RuntimeError where it cannot run."""
    return _by(SDPBackend.CUDNN_ATTENTION, HALF, qkv_BT3NK)


def attend_flash(qkv_BT3NK: Tensor) -> Tensor:
    """`attend` by the flash kernel only, on the CPU too; on a GPU, float32 as in `attend`.

    Raises RuntimeError where it cannot run.
    """
    return _by(SDPBackend.FLASH_ATTENTION, HALF, qkv_BT3NK)


def attend_efficient(qkv_BT3NK: Tensor) -> Tensor:
    """`attend` by the memory-efficient kernel only. Raises RuntimeError where it cannot run."""
    return _by(SDPBackend.EFFICIENT_ATTENTION, (*HALF, torch.float32), qkv_BT3NK)


def _by(kernel: SDPBackend, dtypes: tuple[torch.dtype, ...], qkv_BT3NK: Tensor) -> Tensor:
    # A model that trains in bfloat16 and is sampled in float32 shall not die of the choice that was made for training.
    if qkv_BT3NK.is_cuda and qkv_BT3NK.dtype not in dtypes:
        return attend(qkv_BT3NK)
    with (_Only if direct(qkv_BT3NK) else sdpa_kernel)(kernel):
        return attend(qkv_BT3NK)


class _Only:
    """What `sdpa_kernel(kernel)` does, in a tenth of its time, for calls that nothing traces."""

    switches: tuple[tuple[Any, Any, Any], ...] = (
        (SDPBackend.CUDNN_ATTENTION, torch._C._get_cudnn_sdp_enabled, torch._C._set_sdp_use_cudnn),
        (SDPBackend.FLASH_ATTENTION, torch._C._get_flash_sdp_enabled, torch._C._set_sdp_use_flash),
        (
            SDPBackend.EFFICIENT_ATTENTION,
            torch._C._get_mem_efficient_sdp_enabled,
            torch._C._set_sdp_use_mem_efficient,
        ),
        (SDPBackend.MATH, torch._C._get_math_sdp_enabled, torch._C._set_sdp_use_math),
        (
            SDPBackend.OVERRIDEABLE,
            torch._C._get_overrideable_sdp_enabled,
            torch._C._set_sdp_use_overrideable,
        ),
    )

    def __init__(self, kernel: SDPBackend) -> None:
        self.kernel = kernel

    def __enter__(self) -> None:
        self.before = [enabled() for _, enabled, _ in self.switches]
        for kernel, _, use in self.switches:
            use(kernel == self.kernel)

    def __exit__(self, *_: object) -> None:
        for (_, _, use), before in zip(self.switches, self.before, strict=True):
            use(before)


def _unavailable_cudnn() -> str | None:
    if torch.version.cuda is None or not torch.backends.cudnn.is_available():
        return no_gpu("cuDNN's attention") or "this torch has no cuDNN"
    return no_gpu("cuDNN's attention")


def _unsupported_cudnn(case: Case) -> str | None:
    what = "cuDNN's attention"
    version = torch.backends.cudnn.version() or 0
    if why_not := unfit(case, what, largest=128):
        return why_not
    if case.tokens == 1:
        return f"{what} does not take a single token"
    if case.tokens % 128 != 0 and version < CUDNN_FOR_ANY_LENGTH:
        return f"{what} before 9.15.1 is not safe for {case.tokens} tokens, no multiple of 128; this is {version}"
    if torch.get_deterministic_debug_mode() == 2:  # an error, not a warning
        return f"{what} is not deterministic, and torch is told to be"
    return None


def _unsupported_flash(case: Case) -> str | None:
    return None if case.device.type == "cpu" else unfit(case, "flash attention", largest=256)


def _unsupported_efficient(case: Case) -> str | None:
    return unfit(
        case, "efficient attention", largest=65536, oldest=7, dtypes=(*HALF, torch.float32)
    )


def _no_gpu_efficient() -> str | None:
    return no_gpu("efficient attention")


ANY = Backend(attend, lambda: None, lambda case: None)
CUDNN = Backend(attend_cudnn, _unavailable_cudnn, _unsupported_cudnn)
FLASH = Backend(attend_flash, lambda: None, _unsupported_flash, flash="FA2")
EFFICIENT = Backend(attend_efficient, _no_gpu_efficient, _unsupported_efficient)
