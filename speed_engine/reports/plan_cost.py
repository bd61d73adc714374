"""What a plan predicts of memory, wires and time, from counts and from stated rates; nothing here is measured.

    time of the products    t = 3 x 2 MAC x samples a process / (FLOP a second)
    bytes on the wire       c = k P b (N - 1) / N       k = 2, with ZeRO 3 3; P parameters of b bytes, N processes
    time of the wire        w = c / (bytes a second)    inside a node, or of a node's network where there are several
    weak scaling            t / (t + w) where nothing overlaps, up to t / max(t, t / 3 + w) where the gradients' sum
                            hides behind the backward pass, which is two thirds of t

A ring's sum of P values sends each process's P (N - 1) / N twice (once to add, once to share); ZeRO 3 gathers the
weights for both passes and scatters the gradients (Rajbhandari et al., arXiv 1910.02054, section 7).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from speed_engine import kinds
from speed_engine.data import Facts
from speed_engine.training.metrics import peak_tflops

GIB = 2**30
CARDS = (16, 24, 40, 80, 141, 192)  # GB of memory that GPUs come with
SHARE_OF_PEAK = 0.4  # of the datasheet, what a training step is taken to reach
H100 = "NVIDIA H100 80GB HBM3"
FP32_ON_GPU = (
    "fp32 on a GPU, without TF32: by NVIDIA's sheet an H100 makes 67 TFLOP/s of products in float32, 989 in bf16; "
    "engine.precision=auto takes bf16"
)
FORMULA = """\
formula         products t = 6 MAC x samples a process / FLOP/s
                wire     w = k P b (N-1)/N / bytes/s; k = 2, ZeRO 3: 3; P parameters of b bytes
                weak scaling t/(t+w), nothing overlapped, to t/max(t, t/3+w), gradients overlapped"""


@dataclass(frozen=True)
class Cluster:
    """nodes x gpus processes. tflops: sustained by one, 10^12 a second. inside, network: 10^9 bytes a second, that a
    process reaches inside its node, and a node's network, which its processes share as one ring."""

    nodes: int
    gpus: int
    tflops: float
    told: str  # where tflops is from
    inside: float
    network: float

    @property
    def processes(self) -> int:
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Cost:
    """Of a step on a cluster: bytes that one process sends, seconds, and bounds of the weak-scaling efficiency."""

    wire_bytes: float
    products_s: float
    wire_s: float
    worst: float
    best: float

    @property
    def step_s(self) -> float:
        """Seconds of a step where the gradients' sum overlaps."""
        return self.products_s / self.best


def cluster(
    nodes: int, gpus: int | None, tflops: float | None, inside: float, network: float
) -> Cluster | None:
    """With the sustained rate stated, or else taken from the datasheet of this machine's GPU, or of an H100.

    None where there is neither a GPU here nor one asked for: no time can be predicted.
    """
    if nodes == 1 and gpus is None and tflops is None and not torch.cuda.is_available():
        return None
    gpus = gpus or 1
    if tflops is not None:
        return Cluster(nodes, gpus, tflops, "as stated", inside, network)
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    name = here if peak_tflops(here) else H100
    peak = peak_tflops(name)
    assert peak is not None
    told = f"{SHARE_OF_PEAK:.0%} of the datasheet of {name}"
    return Cluster(nodes, gpus, SHARE_OF_PEAK * peak, told, inside, network)


def step_cost(
    where: Cluster, macs: float, parameters: int, gradient_bytes: int, zero: int, batch: float
) -> Cost:
    """macs: of a forward pass of a sample. gradient_bytes: of one parameter. batch: samples a process."""
    many = where.processes
    wire = (3 if zero == 3 else 2) * parameters * gradient_bytes * (many - 1) / many
    rate = where.inside if where.nodes == 1 else min(where.inside, where.network)
    products, seconds = 6 * macs * batch / (where.tflops * 1e12), wire / (rate * 1e9)
    worst = products / (products + seconds)
    return Cost(wire, products, seconds, worst, products / max(products, products / 3 + seconds))


def smallest_card(need: float) -> str:
    """Which GPUs hold `need` bytes, leaving a tenth for CUDA and the allocator."""
    fits = [size for size in CARDS if need <= 0.9 * size * 1e9]
    return (
        f"a GPU of {fits[0]} GB or more"
        if fits
        else "no GPU there is; raise ZeRO or lower train.micro_batch"
    )


def kept_for_backward(model: nn.Module, facts: Facts, dtype: torch.dtype) -> int:
    """Bytes that one sample keeps for the backward pass, counted on tensors without memory, with plain torch's
    operations; the fused ones keep less. A tensor that several operations keep counts once. model: on any device."""
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*FakeTensor"
        )  # a network may look where its weights lie
        weights = {
            name: torch.empty(
                each.shape, dtype=dtype if each.is_floating_point() else each.dtype
            ).requires_grad_(each.requires_grad)
            for name, each in [*model.named_parameters(), *model.named_buffers()]
        }
        told: dict[str, torch.Tensor] = {}
        for name, each in facts.conditions.items():
            module = kinds.find("conditions", each.kind)
            dropout = {"dropout": 0.5} if "dropout" in module.Config.model_fields else {}
            told |= module.build(module.Config(**dropout), name, each).null(1, "cpu")
        found: dict[int, torch.Tensor] = {}
        own = {id(each) for each in weights.values()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            whole = tensor if tensor._base is None else tensor._base
            if id(whole) not in own:
                found[id(whole)] = whole
            return tensor

        inputs = (torch.zeros(1, *facts.shape), torch.zeros(1))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = functional_call(model, weights, inputs, told)
        assert out.requires_grad
        return sum(each.numel() * each.element_size() for each in found.values())
