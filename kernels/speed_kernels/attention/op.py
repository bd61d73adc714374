"""Attention over all tokens, without a mask: softmax(q k^T / sqrt(K)) v for every head.

There is no kernel of ours behind it: this file chooses between the implementations of torch, xformers and
FlashAttention, once, when a model is built, and says why. On a GPU the choice is a measurement: which one is fastest
differs between architectures, versions of cuDNN and sizes, and no table of it stays true. All take q, k and v as they
lie in the output of one matrix product, without a copy: one tensor [B, T, 3, N, K] -> [B, T, N, K].
"""

# Shape suffixes: B samples, T tokens, 3 = (q, k, v), N heads, K size of a head.

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from speed_kernels.attention import flash_gpu, measure, sdpa, xformers_gpu
from speed_kernels.attention.interface import Backend, Case, dtype_name, reference
from speed_kernels.contract import BackendError, Choice

__all__ = ["BACKENDS", "choose_attention", "decide", "implementation", "reference"]

# In the order in which they are measured, and preferred where they are equally fast: torch's own pick first, as it
# cannot fail; then what is part of torch; then what has to be installed.
BACKENDS = {
    "sdpa": sdpa.ANY,
    "sdpa_cudnn": sdpa.CUDNN,
    "sdpa_flash": sdpa.FLASH,
    "sdpa_efficient": sdpa.EFFICIENT,
    "flash3": flash_gpu.FLASH_3,
    "flash4": flash_gpu.FLASH_4,
    "xformers": xformers_gpu.XFORMERS,
}
MEASURED_BATCH = 32
EQUALLY_FAST = 1.03  # the next run of the same measurement may differ by that much


def implementation(backend: str) -> Callable[[Tensor], Tensor]:
    """The function [B, T, 3, N, K] -> [B, T, N, K] of a backend. Raises BackendError for a name that is none.

    `flash3` and `flash4` are what they say after `choose_attention`, which puts them behind torch's operator.
    """
    return _backend(backend).attend


def choose_attention(
    device: torch.device | str,
    requested: str = "auto",
    *,
    head_dim: int,
    num_tokens: int = 256,
    num_heads: int = 16,
    dtype: torch.dtype = torch.bfloat16,
) -> Choice:
    """Decide which implementation runs on `device` for `num_heads` heads of `head_dim` elements in `dtype`.

    `auto` on a CUDA device: the one that is fastest there, forward and backward, for 32 samples of `num_tokens` tokens;
    measured once per process for each device, shape and dtype. Elsewhere: torch's own pick. A chosen `flash3` or
    `flash4` serves the whole process from then on, a chosen `sdpa_flash` ends that. On `meta` nothing runs, so
    everything that has a name is granted. Raises BackendError where the implementation asked for cannot run.
    """
    device = torch.device(device)
    if requested == "auto":
        if device.type != "cuda":
            return Choice("attention", "sdpa", f"torch's fused attention on {device.type}", False)
        if not torch.cuda.is_available():
            reason = "torch's own pick: there is no cuda device here to measure the others on"
            return Choice("attention", "sdpa", reason, False)
    elif device.type == "meta":
        _backend(requested)
        return Choice("attention", requested, "asked for; nothing runs on meta", False)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    case = Case(device, dtype, MEASURED_BATCH, num_tokens, num_heads, head_dim)
    if requested == "auto":
        choice = _measured(case, torch.get_deterministic_debug_mode())
    else:
        backend = _backend(requested)
        if why_not := backend.unavailable() or backend.unsupported(case):
            raise BackendError(f"model.attention={requested} cannot run: {why_not}")
        choice = Choice("attention", requested, "asked for", False)
    _serve(choice.backend)
    return choice


@functools.cache
def _measured(case: Case, deterministic: int) -> Choice:
    del deterministic  # part of the key: the kernels that are deterministic are other ones
    # Models are built inside `with torch.device("meta")`; here everything is real.
    with torch.device(case.device):
        gpu = torch.cuda.get_device_name(case.device)
        choice = decide(case, gpu, BACKENDS, measure.milliseconds)
        torch.cuda.empty_cache()  # what CUDA graphs could not use
        return choice


def decide(
    case: Case,
    gpu: str,
    backends: Mapping[str, Backend],
    timing: Callable[[Callable[[Tensor], Tensor], Case], float],
) -> Choice:
    """The fastest of `backends` by `timing` (milliseconds of an `attend` in a case; may raise), as a Choice.

    Within 3 % of the fastest, the first in the order of `backends`. What cannot run or fails is left out, with its
    reason in the text; if that is all of them, `sdpa` is taken unmeasured, as a fallback.
    """
    found: dict[str, float] = {}
    refused: dict[str, str] = {}
    for word, backend in backends.items():
        try:
            why_not = backend.unavailable() or backend.unsupported(case)
            if why_not is None:
                with flash_gpu.serving(backend.flash):
                    found[word] = timing(backend.attend, case)
        except Exception as error:  # out of memory, no kernel, another version: no candidate
            why_not = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if why_not is not None:
            refused[word] = why_not
    what = f"forward + backward of {list(case.shape)} {dtype_name(case.dtype)} on {gpu}"
    without = "".join(f"; without {word}: {why_not}" for word, why_not in refused.items())
    if not found:
        return Choice("attention", "sdpa", f"nothing could be measured, {what}{without}", True)
    limit = min(found.values()) * EQUALLY_FAST
    winner = next(word for word in backends if found.get(word, float("inf")) <= limit)
    tie = "" if found[winner] == min(found.values()) else ", equal to the fastest within 3 %"
    others = "".join(f", {word} {ms:.3g} ms" for word, ms in found.items() if word != winner)
    return Choice(
        "attention", winner, f"{winner} {found[winner]:.3g} ms{tie}{others}: {what}{without}", False
    )


def _backend(word: str) -> Backend:
    if word not in BACKENDS:
        raise BackendError(f"attention has no backend {word!r}; it has: {', '.join(BACKENDS)}")
    return BACKENDS[word]


def _serve(word: str) -> None:
    try:
        flash_gpu.activate(BACKENDS[word].flash)
    except Exception as error:  # the package's, or torch's with this version of the package
        raise BackendError(f"model.attention={word} cannot run: {error}") from error
