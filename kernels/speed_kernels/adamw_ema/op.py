"""AdamW with decoupled weight decay and EMAs of the new weights, in one pass over flat fp32 buffers.

    square_sum = grad_square_sum(grads, backend)                       one read of the gradient
    scalars    = prepare(step, skipped, hyper, square_sum, ...)        a few numbers, on the device
    adamw_ema(params, grads, exp_avgs, exp_avg_sqs, emas, ...)         one pass over everything

    g = scale * grad;  m += (1 - beta1)(g - m);  v = beta2 v + (1 - beta2) g^2
    p = (1 - lr wd) p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps);  e_k += (1 - decay_k)(p - e_k)

This is torch.optim.AdamW followed by a lerp. A gradient whose sum of squares is not finite (in float32: a norm above
1.8e19 counts) changes nothing at all: no weight, no state, no step counter. Nothing waits for the host, and every
number that varies from step to step is read from device memory (`layout.py`), so the three calls can be captured in a
CUDA graph. The ops write into their arguments, as an optimizer must. A list of tensors costs one launch as well, but
more host work than one flat buffer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from speed_kernels import contract
from speed_kernels.adamw_ema import layout

NAME = "adamw_ema"


@torch.library.custom_op("speed_kernels::grad_square_sum", mutates_args=())
def grad_square_sum(grads: Sequence[Tensor], backend: str) -> Tensor:
    """Sum of squares over all tensors, as float32 [] (float64 for float64 gradients on the reference).

    Deterministic: two stages in a fixed order. Its square root is the gradient's norm, and it is finite exactly when
    the gradient can be used; summed over ranks it says both about a sharded gradient.
    """
    _check("gradient", grads, grads, None)
    if not grads:
        raise ValueError("grad_square_sum got no tensor; give at least one gradient")
    return contract.implementation(NAME, backend).grad_square_sum(grads)


@grad_square_sum.register_fake
def _(grads: Sequence[Tensor], backend: str) -> Tensor:
    dtype = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    return grads[0].new_empty((), dtype=dtype)


@torch.library.custom_op("speed_kernels::adamw_ema_prepare", mutates_args=("step", "skipped"))
def prepare(
    step: Tensor,
    skipped: Tensor | None,
    hyper: Tensor,
    square_sum: Tensor | None,
    grad_scale: Tensor | None,
    backend: str,
) -> Tensor:
    """Decide whether this step is applied, count it, and compute its scalars (float32 [SCALARS_SIZE]).

    `step` float32 []: applied steps so far, advanced here if this one is applied; exact up to 2^24. `skipped` float32
    [] counts the others. `hyper` float32 [HYPER_SIZE]. `square_sum` [] of the unscaled gradient (None: always apply,
    no clipping). `grad_scale` float32 [] multiplies the gradient. The bias corrections and decays are computed in
    double precision.
    """
    for name, tensor in (("step", step), ("skipped", skipped), ("grad_scale", grad_scale)):
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.numel() != 1):
            raise ValueError(
                f"{name} must be one float32 number, not {tensor.dtype} {tensor.shape}"
            )
    if hyper.dtype != torch.float32 or hyper.shape != (layout.HYPER_SIZE,):
        raise ValueError(f"hyper must be float32 [{layout.HYPER_SIZE}], not {hyper.shape}")
    square_sum = None if square_sum is None else square_sum.to(torch.float32)
    module = contract.implementation(NAME, backend)
    return module.prepare(step, skipped, hyper, square_sum, grad_scale)


@prepare.register_fake
def _(
    step: Tensor,
    skipped: Tensor | None,
    hyper: Tensor,
    square_sum: Tensor | None,
    grad_scale: Tensor | None,
    backend: str,
) -> Tensor:
    return hyper.new_empty(layout.SCALARS_SIZE)


@torch.library.custom_op(
    "speed_kernels::adamw_ema",
    mutates_args=("params", "exp_avgs", "exp_avg_sqs", "emas", "second_emas", "copies"),
)
def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    second_emas: Sequence[Tensor],
    copies: Sequence[Tensor],
    scalars: Tensor,
    backend: str,
) -> None:
    """One optimizer step in place. All lists hold contiguous tensors of the same sizes.

    params, exp_avgs, exp_avg_sqs, emas, second_emas: float32 (float64 on the reference); grads: float32, bfloat16 or
    float16, one dtype; copies: bfloat16, receives the rounded new weights. second_emas and copies may be empty.
    `scalars` comes from `prepare`. Raises ValueError for other shapes, dtypes or strides.
    """
    _check_lists(params, exp_avgs, exp_avg_sqs, emas, second_emas, copies, backend)
    _check("grads", grads, params, None)
    if scalars.dtype != torch.float32 or scalars.shape != (layout.SCALARS_SIZE,):
        raise ValueError(f"scalars must be float32 [{layout.SCALARS_SIZE}], made by prepare")
    if not params:
        return
    module = contract.implementation(NAME, backend)
    module.adamw_ema(params, grads, exp_avgs, exp_avg_sqs, emas, second_emas, copies, scalars)


@adamw_ema.register_fake
def _(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    second_emas: Sequence[Tensor],
    copies: Sequence[Tensor],
    scalars: Tensor,
    backend: str,
) -> None:
    return None


class Update:
    """`adamw_ema` over tensors that stay the same from step to step: checked once, and without torch's dispatch.

    The lists are those of `adamw_ema`. A captured call is complete only after `fill`. Raises ValueError.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        emas: Sequence[Tensor],
        second_emas: Sequence[Tensor],
        copies: Sequence[Tensor],
        backend: str,
    ) -> None:
        self.lists = (params, exp_avgs, exp_avg_sqs, emas, second_emas, copies)
        _check_lists(*self.lists, backend)
        self.module = contract.implementation(NAME, backend)
        in_one = getattr(self.module, "ListUpdate", None) if len(params) > 1 else None
        self.in_one = None if in_one is None else in_one(*self.lists)

    def __call__(self, grads: Sequence[Tensor], scalars: Tensor) -> None:
        """One step. `grads`: contiguous, of the parameters' sizes and of one dtype, wherever they lie."""
        if len({grad.dtype for grad in grads}) > 1:
            _check("grads", grads, self.lists[0], None)
        if self.in_one is not None:
            self.in_one(grads, scalars)
            return
        params, *others = self.lists
        self.module.adamw_ema(params, grads, *others, scalars)

    def fill(self) -> list[Tensor]:
        """Between a capture and its first replay: writes what the graph reads; returns what must live as long as it."""
        return [] if self.in_one is None else self.in_one.fill()


class Squares:
    """`grad_square_sum` of gradients of the same sizes from step to step; see `Update`."""

    def __init__(self, grads: Sequence[Tensor], backend: str) -> None:
        _check("gradient", grads, grads, None)
        self.module = contract.implementation(NAME, backend)
        in_one = getattr(self.module, "ListSquares", None) if len(grads) > 1 else None
        self.in_one = None if in_one is None else in_one(grads)

    def __call__(self, grads: Sequence[Tensor]) -> Tensor:
        return (self.in_one or self.module.grad_square_sum)(grads)

    def fill(self) -> list[Tensor]:
        """See `Update.fill`."""
        return [] if self.in_one is None else self.in_one.fill()


def _check_lists(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    second_emas: Sequence[Tensor],
    copies: Sequence[Tensor],
    backend: str,
) -> None:
    """Refuse all but gradients."""
    state_dtype = torch.float64 if backend == "reference" else torch.float32
    for name, tensors in (
        ("params", params),
        ("exp_avgs", exp_avgs),
        ("exp_avg_sqs", exp_avg_sqs),
        ("emas", emas),
        *((("second_emas", second_emas),) if second_emas else ()),
    ):
        _check(name, tensors, params, {torch.float32, state_dtype})
    if copies:
        _check("copies", copies, params, {torch.bfloat16})


def _check(
    name: str, tensors: Sequence[Tensor], like: Sequence[Tensor], dtypes: set[torch.dtype] | None
) -> None:
    """Refuse what the kernels cannot address. dtypes None: a gradient's."""
    if len(tensors) != len(like):
        raise ValueError(f"{name} has {len(tensors)} tensors for {len(like)} parameters")
    allowed = {*contract.DTYPES, torch.float64} if dtypes is None else dtypes
    for index, (tensor, model) in enumerate(zip(tensors, like, strict=True)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}[{index}] is not contiguous; call .contiguous() on it first")
        if tensor.numel() != model.numel() or tensor.device != like[0].device:
            raise ValueError(
                f"{name}[{index}] is {list(tensor.shape)} on {tensor.device}, but its parameter is "
                f"{list(model.shape)} on {like[0].device}"
            )
        if tensor.dtype not in allowed or tensor.dtype != tensors[0].dtype:
            raise ValueError(
                f"{name}[{index}] is {tensor.dtype}; all of {name} must have one dtype of "
                f"{', '.join(sorted(map(str, allowed)))}"
            )


def sample_inputs(device: torch.device | str = "cpu", sizes: Sequence[int] = (1, 63, 257)) -> dict:
    """Arguments of `adamw_ema` (without `backend`) with two EMAs and a copy, for tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float) -> list[Tensor]:
        return [(torch.randn(n, generator=generator) * scale).to(device) for n in sizes]

    step = torch.zeros((), device=device)
    hyper = torch.tensor([1e-3, 0.1, 1e-3, 1e-8, 0.1, 0.0, 0.0, 1e-4, 2.0, 6.94], device=device)
    params = draw(1.0)
    return {
        "params": params,
        "grads": draw(0.1),
        "exp_avgs": draw(0.1),
        "exp_avg_sqs": [v.square() for v in draw(0.1)],
        "emas": [p.clone() for p in params],
        "second_emas": [p.clone() for p in params],
        "copies": [p.bfloat16() for p in params],
        "scalars": prepare(step, None, hyper, None, None, "reference"),
    }
