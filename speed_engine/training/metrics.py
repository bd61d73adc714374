"""What a run says of itself: sums kept on the device, one line of `metrics.jsonl` an interval, a progress bar.

Nothing here makes the device wait except `Meter.read`, once an interval.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import torch
from speed_kernels.contract import Choice

from speed_engine.config import RunConfig
from speed_engine.distributed import Processes
from speed_engine.progress import progress
from speed_engine.training.metrics_file import cut_off_after, finite, line_of

BUCKETS = 16  # equal parts of the table's rows for the loss against t

# Dense bfloat16 TFLOP/s of the datasheets, by the whole name that the driver gives. An unknown device has no peak:
# a guess from a part of the name would call a PCIe card by its faster sister's peak.
PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.0,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA B200": 2250.0,
    "NVIDIA L40S": 362.0,
}


def peak_tflops(name: str) -> float | None:
    """Dense bfloat16 TFLOP/s of the datasheet, None for a device that is not in the table."""
    return PEAK_TFLOPS.get(name)


class Meter:
    """Sums of losses since the last reading, on the device."""

    def __init__(self, device: torch.device, num_rows: int) -> None:
        self.num_rows = num_rows
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # total, mse, vb, samples
        self.bucket_sums = torch.zeros(2, BUCKETS, dtype=torch.float64, device=device)

    def add(self, losses_3B: torch.Tensor, row_B: torch.Tensor) -> None:
        """Add one micro-batch's per-sample losses [total, mse, vb] and table rows."""
        with torch.no_grad():
            self.sums[:3] += losses_3B.double().sum(1)
            self.sums[3] += row_B.numel()
            bucket_B = row_B * BUCKETS // self.num_rows
            self.bucket_sums[0].index_add_(0, bucket_B, losses_3B[1].double())
            self.bucket_sums[1].index_add_(0, bucket_B, torch.ones_like(losses_3B[1]).double())

    def read(self, processes: Processes) -> dict[str, Any]:
        """Means over all processes since the last reading; then start again. Waits for the device."""
        both = torch.cat([self.sums, self.bucket_sums.flatten()]).cpu()
        self.sums.zero_()
        self.bucket_sums.zero_()
        both = processes.sum(both)
        total, mse, vb, samples = both[:4].tolist()
        sums, counts = both[4:].view(2, BUCKETS).tolist()
        by_t = [s / c if c else None for s, c in zip(sums, counts, strict=True)]
        n = max(samples, 1.0)
        return {"loss": total / n, "mse": mse / n, "vb": vb / n, "loss_by_t": by_t}


class Rate:
    """Images a second, and what share of the device that is."""

    def __init__(self, macs_per_sample: int, processes: Processes, first_step: int) -> None:
        self.flop = 6.0 * macs_per_sample  # forward and backward: three times two a multiply-add
        self.processes = processes
        self.step, self.clock = first_step, time.monotonic()

    def read(self, step: int, global_batch: int) -> dict[str, float | None]:
        """The rate since the last reading; `mfu` is None for a device whose peak is not known."""
        seconds, images = time.monotonic() - self.clock, (step - self.step) * global_batch
        self.step, self.clock = step, time.monotonic()
        tflops = self.flop * images / seconds / self.processes.world * 1e-12
        peak = None
        if self.processes.device.type == "cuda":
            name = torch.cuda.get_device_name(self.processes.device)
            peak = peak_tflops(name)
        return {
            "images_per_s": images / seconds,
            "tflops_per_device": tflops,
            "mfu": tflops / peak if peak else None,
        }


class Journal:
    """Writes `metrics.jsonl`, the progress bar and, when asked, TensorBoard and W&B.

    A silent one (all processes but the first) does nothing.
    """

    def __init__(
        self, run: Path, first_step: int, config: RunConfig, choices: list[Choice], silent: bool
    ) -> None:
        self.silent = silent
        if silent:
            return
        from rich.console import Console

        self.console = Console(stderr=True)
        self.num_steps, self.first_step = config.train.steps, first_step
        self.boards = _boards(run, config.log.tensorboard, config.log.wandb)
        self.path = run / "metrics.jsonl"
        cut_off_after(self.path, first_step)
        self.file = self.path.open("a", encoding="utf-8")
        self.say(f"run folder {run}")
        for choice in choices:
            mark = "WARNING, slower than could be: " if choice.fallback else ""
            self.say(f"{mark}{choice.op} runs on {choice.backend} ({choice.reason})")
        if first_step:
            done = " nothing to do" if first_step >= self.num_steps else ""
            self.say(f"{run} is at step {first_step};{done or ' going on from there'}")
        self.started = time.monotonic()
        steps, watched = self.num_steps, self.console.is_terminal
        self.watched = watched
        self.open = contextlib.ExitStack()
        bar = progress("train", steps, first_step, self.console, show=watched)
        self.bar = self.open.enter_context(bar)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.silent:
            self.open.close()
            self.file.close()
            for _, close in self.boards:
                close()

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if not self.silent:
            with contextlib.suppress(OSError):  # the terminal may be gone; the run is not
                self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Move the progress bar: `step` steps are done."""
        if not self.silent:
            self.bar.at(step)

    def rewind(self, step: int) -> None:
        """Forget the lines after `step`, to which the run goes back."""
        if not self.silent:
            self.file.close()
            cut_off_after(self.path, step)
            self.file = self.path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """One line of metrics; `line` holds at least step, loss and images_per_s."""
        if self.silent:
            return
        line = finite(line)
        self.file.write(line_of(line))
        self.file.flush()
        scalars = {k: v for k, v in line.items() if isinstance(v, (int, float))}
        for show, _ in self.boards:
            show(scalars, line["step"])
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        text = f"loss {loss}  {line['images_per_s']:.0f} images/s"
        if line.get("mfu"):
            text += f"  MFU {100 * line['mfu']:.1f} %"
        if self.watched:
            self.bar.say(text)
            return
        per_step = (time.monotonic() - self.started) / max(1, line["step"] - self.first_step)
        minutes, seconds = divmod(int(per_step * (self.num_steps - line["step"])), 60)
        self.say(f"step {line['step']}/{self.num_steps}  {text}  {minutes}:{seconds:02d} left")


def _boards(run: Path, tensorboard: bool, wandb: bool) -> list[tuple[Any, Any]]:
    """(show(scalars, step), close()) of the services asked for. Raises ValueError if one is missing."""
    boards = []
    if tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("log.tensorboard=true needs: pip install tensorboard") from error
        writer = SummaryWriter(str(run / "tensorboard"))

        def to_tensorboard(scalars: dict[str, float], step: int) -> None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)

        boards.append((to_tensorboard, writer.close))
    if wandb:
        try:
            import wandb as service
        except ImportError as error:
            raise ValueError("log.wandb=true needs: pip install wandb") from error
        session = service.init(dir=str(run), name=run.name)
        boards.append((lambda scalars, step: session.log(scalars, step=step), session.finish))
    return boards
