"""What arithmetic says of a training step: FLOP, least bytes, peaks of known GPUs, and predicted images a second.

`python -m benchmarks.report.predictions --markdown` prints the table. Every rate that it prints is a PREDICTION; a
measurement on the device replaces it. The FLOP of a step are three times those of a forward pass, whatever is computed
again; the bytes are counted by hand, a row of `PROVIDERS` each; the rates of `GPUS` are assumptions with reasons.

    seconds = max(products + attention + glue + parameters, launches on the host) + waits
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from speed_engine.conditions.label import described
from speed_engine.data import Facts
from speed_engine.data.space import Space
from speed_engine.models import dit

LATENT = (4, 32)  # channels, height and width
NUM_CLASSES = 1000


# ------------------------------------------------------------------ counts


@dataclass(frozen=True)
class Work:
    """One training step of a DiT on a batch of latents."""

    size: str  # as S/2
    batch: int
    sample_size: int = LATENT[1]

    @property
    def _shape(self) -> dit.Size:
        return dit.SIZES[self.size]

    @property
    def tokens(self) -> int:
        """Tokens of the whole batch."""
        return self.batch * (self.sample_size // self._shape.patch_size) ** 2

    @property
    def elements(self) -> int:
        """Elements of the residual stream, times the blocks that read and write it."""
        return self.tokens * self._shape.hidden_size * self._shape.depth

    @property
    def numbers(self) -> int:
        """Elements of the batch's latents."""
        return self.batch * LATENT[0] * self.sample_size**2

    @property
    def flop(self) -> float:
        """All matrix products and attention, forward and backward: six a multiply-add of the forward pass."""
        channels, size = LATENT[0], self.sample_size
        space = Space("latents", (1.0,) * channels, (0.0,) * channels)
        facts = Facts((channels, size, size), space, {"label": described(NUM_CLASSES, null=True)})
        macs = dit.macs_per_sample(dit.Config(size=self.size), facts, 2 * channels)
        return 6.0 * macs * self.batch

    @property
    def attention_flop(self) -> float:
        """The part of `flop` that softmax(q k^T) v takes."""
        tokens = self.tokens // self.batch
        return 12.0 * self.tokens * tokens * self._shape.hidden_size * self._shape.depth

    @property
    def parameters(self) -> int:
        """Trained numbers, counted by hand: no network is built."""
        width, depth, _, patch = self._shape
        pixels = LATENT[0] * patch**2
        block = 18 * width**2 + 15 * width  # attention 4, MLP 8, adaLN 6 squares and their biases
        embedders = pixels * width + width + 256 * width + width + width**2 + width
        embedders += (NUM_CLASSES + 1) * width
        return embedders + depth * block + 2 * width**2 + 2 * width + 2 * pixels * (width + 1)

    @property
    def tensors(self) -> int:
        """Trained tensors."""
        return 10 * self._shape.depth + 11

    @property
    def least_bytes(self) -> int:
        """Least traffic beside the products: our fused kernels with a bfloat16 stream, one pass over the parameters."""
        return int(LEAST.glue * self.elements + LEAST.update * self.parameters)

    def products(self) -> list[tuple[int, int, int, int]]:
        """(rows, inputs, outputs, how often) of the blocks' matrix products in a forward pass."""
        width, depth = self._shape.hidden_size, self._shape.depth
        inside = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
        blocks = [(self.tokens, inputs, outputs, depth) for inputs, outputs in inside]
        return [*blocks, (self.batch, width, 6 * width, depth)]


@dataclass(frozen=True)
class Traffic:
    """How one provider moves memory and keeps the host busy. Bytes by hand, launches from a profile of the parts.

    sample: bytes an element of a latent, of noise and loss together (ours: x0 4 + x_t 2, and out 4 + x0 4 + gradient 4;
    with `train.latents=bf16` x0 is 2).
    glue: bytes an element of the stream and block between the products, forward and backward. update: bytes a
    parameter and step (optimizer, EMA, cast, clip). kept: bytes an element and block kept for the backward pass, None
    where nobody counted. block: launches of a block, forward and backward. fixed: further launches of a step.
    tensor: host microseconds a trained tensor and step. tf32: products in TF32. fp8: the blocks' in e4m3, taken
    to run at twice the rate.
    """

    glue: float
    update: float
    kept: float | None
    block: int
    fixed: int
    sample: float = 18.0
    tensor: float = 0.0
    waits: int = 0
    tf32: bool = False
    fp8: bool = False
    graph: bool = False  # the whole step is one CUDA graph


# Quantising by rows in plain torch (`speed_kernels.e4m3.quantise`), bytes a bf16 element: 2 for the maxima, 6 for the
# scaled float32, 5 for its rounding; by columns 2 more, for the transposed copy. In widths of the stream a block's four
# products have inputs of 1 + 1 + 1 + 4, twice, and gradients of outputs of 3 + 1 + 4 + 1, twice. The fused norm
# writes the rows of two inputs itself, a byte an element.
BY_ROWS, BY_COLUMNS = 13, 15
QUANTISED = 7 * (BY_ROWS + BY_COLUMNS) + 9 * (BY_ROWS + BY_COLUMNS) - 2 * (BY_ROWS - 1)
# One kernel each instead: rows read once and written; columns read for their maxima, then read and written.
QUANTISED_FUSED = 7 * (3 + 5) + 9 * (3 + 5) - 2 * (3 - 1)

PROVIDERS = {
    "reference": Traffic(360, 100, None, 71, 300, 1735, tensor=12.0, waits=20, tf32=True),
    "eager": Traffic(298, 46, 52, 71, 120, 1735),
    "compile": Traffic(150, 46, None, 33, 20, 48),
    "ours-torch": Traffic(106, 42, 40, 30, 20),
    "ours-torch, bf16 stream": Traffic(86, 42, 36, 30, 20),
    "ours-torch, bf16 stream and latents": Traffic(86, 42, 36, 30, 20, 14),
    "ours-torch, bf16 stream, graph": Traffic(86, 42, 36, 30, 20, graph=True),
    "ours-torch, bf16 stream, fp8 rows": Traffic(86 + QUANTISED, 42, 36, 196, 20, fp8=True),
    "the same, were quantising one kernel": Traffic(86 + QUANTISED_FUSED, 42, 36, 64, 20, fp8=True),
    "ours-deepspeed, bf16 stream": Traffic(86, 60, 36, 30, 40, tensor=25.0),
}
LEAST = PROVIDERS["ours-torch, bf16 stream"]


# ------------------------------------------------------------------ seconds


@dataclass(frozen=True)
class Gpu:
    """Anchors of the prediction. `matmul` is what products of these widths may reach, not the datasheet: on the A100
    250 of 312, on the H200 seven eighths of the 790 that large square products reach there.
    """

    name: str
    peak: float  # TFLOP/s of the datasheet, dense bfloat16
    matmul: float  # TFLOP/s
    copy: float  # TB/s, read and written
    memory: float  # GB
    wave: int  # rows of a product that are lost to the last wave of tiles
    fp8: bool  # has products in e4m3
    attention: float = (
        0.5  # share of `matmul` that attention reaches at 256 tokens and a head of 72
    )
    launch: float = 6.0  # microseconds of the host a launch
    wait: float = 30.0  # microseconds a wait of the host, until the queue is full again


GPUS = (
    Gpu("A100-80", 312.0, 250.0, 1.7, 80.0, wave=512, fp8=False),
    Gpu("H200", 989.4, 690.0, 4.3, 141.0, wave=768, fp8=True),
)
CASES = {
    f"{size.replace('/', '')}-b{batch}": Work(size, batch)
    for size in ("S/2", "B/2", "XL/2")
    for batch in (32, 256)
}


@dataclass(frozen=True)
class Prediction:
    """What the model says of one case; `label` is always `prediction`."""

    gpu: str
    case: str
    provider: str
    milliseconds: float
    images_per_s: float
    tflops: float
    mfu_datasheet: float
    memory_gb: float | None
    fits: bool | None
    bound: str  # what the time goes to: gpu or host
    label: str = "prediction"


def predict(gpu: Gpu, case: str, work: Work, provider: str) -> Prediction:
    """One number from the byte and FLOP model."""
    traffic = PROVIDERS[provider]
    bandwidth, rate = gpu.copy * 1e12, gpu.matmul * 1e12 * (0.5 if traffic.tf32 else 1.0)
    operand = 4 if traffic.tf32 else 2
    products = done = 0.0
    for rows, inputs, outputs, count in work.products():
        flop = 2.0 * rows * inputs * outputs
        moved = operand * (rows * inputs + rows * outputs + inputs * outputs)
        faster = 2.0 if traffic.fp8 and rows == work.tokens else 1.0  # not the modulation's
        reached = faster * rate * rows / (rows + gpu.wave)
        products += 3 * count * max(flop / reached, moved / bandwidth)
        done += 3 * count * flop
    products += max(0.0, work.flop - work.attention_flop - done) / rate  # embedders, last layer
    attention = work.attention_flop / (rate * gpu.attention)
    moved = traffic.glue * work.elements + traffic.update * work.parameters
    other = (moved + traffic.sample * work.numbers) / bandwidth
    device = products + attention + other
    launches = traffic.block * dit.SIZES[work.size].depth + traffic.fixed
    host = (gpu.launch * launches + traffic.tensor * work.tensors) * 1e-6
    host = 1e-4 if traffic.graph else host
    seconds = max(device, host) + traffic.waits * gpu.wait * 1e-6
    tflops = work.flop / seconds * 1e-12
    memory = None
    if traffic.kept is not None:
        memory = (traffic.kept * work.elements + 20 * work.parameters) * 1e-9
    return Prediction(
        gpu=gpu.name,
        case=case,
        provider=provider,
        milliseconds=seconds * 1e3,
        images_per_s=work.batch / seconds,
        tflops=tflops,
        mfu_datasheet=tflops / gpu.peak,
        memory_gb=memory,
        fits=None if memory is None else memory < 0.95 * gpu.memory,
        bound="host" if host > device else "gpu",
    )


def predictions() -> list[Prediction]:
    """All cases on all GPUs that have the products."""
    return [
        predict(gpu, case, work, provider)
        for gpu in GPUS
        for case, work in CASES.items()
        for provider, traffic in PROVIDERS.items()
        if gpu.fp8 or not traffic.fp8
    ]


def markdown(rows: Sequence[Prediction]) -> str:
    """A table whose every rate says that it is a prediction."""
    names = (
        "GPU",
        "case",
        "provider",
        "images/s",
        "step",
        "MFU of the datasheet",
        "memory",
        "bound",
    )
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    for row in rows:
        memory = "-" if row.memory_gb is None else f"{row.memory_gb:.0f} GB (prediction)"
        memory += "" if row.fits is not False else ", does not fit"
        digits = max(0, 3 - math.ceil(math.log10(row.milliseconds)))
        cells = (
            row.gpu,
            row.case,
            row.provider,
            f"{row.images_per_s:.0f} (prediction)",
            f"{row.milliseconds:.{digits}f} ms (prediction)",
            f"{100 * row.mfu_datasheet:.0f} % (prediction)",
            memory,
            row.bound,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="predicted images a second; nothing is measured")
    parser.add_argument("--markdown", action="store_true", help="a table instead of JSON")
    options = parser.parse_args(arguments)
    rows = predictions()
    text = (
        markdown(rows) if options.markdown else json.dumps([asdict(row) for row in rows], indent=1)
    )
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
