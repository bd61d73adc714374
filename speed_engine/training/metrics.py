"""What a run says of itself: sums kept on the device, one line of `metrics.jsonl` an interval, a progress bar.

Nothing here makes the device wait except `Meter.read`, once an interval.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from speed_kernels.contract import Choice

from speed_engine.config import RunConfig
from speed_engine.data import Facts
from speed_engine.distributed import Processes
from speed_engine.progress import progress, wrapped
from speed_engine.training.boards import open_boards
from speed_engine.training.metrics_file import cut_off_after, finite, line_of
from speed_engine.training.spikes import BINS, Bins

Each = TypeVar("Each")

BUCKETS = 16  # equal parts of the table's rows for the loss against t
SLOW_DATA = 0.1  # share of the time that is worth a word to the person who watches

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
    """Sums of losses since the last reading, on the device.

    lanes: 1, or the number of micro-batches of a process in a step. With a lane each, and of any number of processes,
    the same numbers are added in the same order (`train.exact_sums`). bins: for `spikes`; what they held at the last
    reading, over all processes, is `last_bins`, float64 [3, BINS].
    """

    def __init__(
        self, device: torch.device, num_rows: int, lanes: int = 1, bins: Bins | None = None
    ) -> None:
        self.num_rows = num_rows
        self.bins, self.last_bins = bins, torch.zeros(3, BINS, dtype=torch.float64)
        # Of each lane: total, mse, vb, samples.
        self.sums = torch.zeros(lanes, 4, dtype=torch.float64, device=device)
        self.bucket_sums = torch.zeros(lanes, 2, BUCKETS, dtype=torch.float64, device=device)

    def add(self, losses_3B: torch.Tensor, row_B: torch.Tensor, lane: int = 0) -> None:
        """Add one micro-batch's per-sample losses [total, mse, vb] and table rows."""
        with torch.no_grad():
            self.sums[lane, :3] += losses_3B.double().sum(1)
            self.sums[lane, 3] += row_B.numel()
            bucket_B = row_B * BUCKETS // self.num_rows
            sums, ones = self.bucket_sums[lane], torch.ones_like(losses_3B[1]).double()
            sums[0].index_add_(0, bucket_B, losses_3B[1].double())
            sums[1].index_add_(0, bucket_B, ones)
            if self.bins is not None:
                self.bins.add(losses_3B[1], row_B, lane)

    def state(self, processes: Processes) -> torch.Tensor:
        """The open interval: the sums since the last reading, float64 [lanes x world, .], host. Collective.

        Row a x world + r is lane a of process r: with a lane for each, the step's micro-batches in order.
        """
        further = [] if self.bins is None else [self.bins.sums.flatten(1)]
        own = torch.cat([self.sums, self.bucket_sums.flatten(1), *further], 1).cpu()
        every = torch.zeros(len(own), processes.world, own.shape[1], dtype=torch.float64)
        every[:, processes.rank] = own
        return processes.sum(every).flatten(0, 1)

    def load_state(self, every: torch.Tensor, processes: Processes) -> None:
        """Go on with what `state` gave. Where the rows are others, the first process's first lane takes it all."""
        lanes, world = len(self.sums), processes.world
        own = torch.zeros(lanes, every.shape[1], dtype=torch.float64)
        if len(every) == lanes * world:
            own = every.view(lanes, world, -1)[:, processes.rank]
        elif processes.first:
            own[0] = every.sum(0)
        self.sums.copy_(own[:, :4])
        end = 4 + 2 * BUCKETS
        self.bucket_sums.copy_(own[:, 4:end].view(lanes, 2, BUCKETS))
        if self.bins is not None and own.shape[1] > end:  # else they were not asked for then
            self.bins.sums.copy_(own[:, end:].view(lanes, 3, BINS))

    def read(self, processes: Processes) -> dict[str, Any]:
        """Means over all processes since the last reading; then start again. Waits for the device."""
        both = self.state(processes).sum(0)
        self.sums.zero_()
        self.bucket_sums.zero_()
        if self.bins is not None:
            self.bins.sums.zero_()
            self.last_bins = both[4 + 2 * BUCKETS :].view(3, BINS)
        total, mse, vb, samples = both[:4].tolist()
        sums, counts = both[4 : 4 + 2 * BUCKETS].view(2, BUCKETS).tolist()
        by_t = [s / c if c else None for s, c in zip(sums, counts, strict=True)]
        n = max(samples, 1.0)
        return {"loss": total / n, "mse": mse / n, "vb": vb / n, "loss_by_t": by_t}


class Rate:
    """Images a second, and what share of the device that is."""

    def __init__(self, macs_per_sample: int, processes: Processes, first_step: int) -> None:
        self.flop = 6.0 * macs_per_sample  # forward and backward: three times two a multiply-add
        self.processes = processes
        self.step, self.clock = first_step, time.monotonic()
        self.waited = 0.0  # seconds for data since the last reading

    def read(self, step: int, global_batch: int) -> dict[str, float | str | None]:
        """The rate since the last reading; `mfu` is None for a device whose peak is not known.

        time: now, UTC. data_wait: share of the time in which this process had no batch to go on with; a GPU may have
        been busy meanwhile.
        """
        seconds, images = time.monotonic() - self.clock, (step - self.step) * global_batch
        data_wait = self.waited / seconds
        self.step, self.clock, self.waited = step, time.monotonic(), 0.0
        tflops = self.flop * images / seconds / self.processes.world * 1e-12
        peak = None
        if self.processes.device.type == "cuda":
            name = torch.cuda.get_device_name(self.processes.device)
            peak = peak_tflops(name)
        return {
            "images_per_s": images / seconds,
            "tflops_per_device": tflops,
            "mfu": tflops / peak if peak else None,
            "data_wait": data_wait,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }

    def without(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `work` returns; its time belongs to no interval."""
        started = time.monotonic()
        result = work()
        self.clock += time.monotonic() - started
        return result

    def waiting(self, batches: Iterator[Each]) -> Iterator[Each]:
        """The same; the time until each is there is counted."""
        while True:
            started = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.monotonic() - started
            yield batch


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
        self.refused: set[str] = set()
        self.num_steps, self.first_step = config.train.steps, first_step
        self.run, self.path = run, run / "metrics.jsonl"
        self.boards = open_boards(run, first_step, config, self.say)
        cut_off_after(self.path, first_step)
        self.file = self.path.open("a", encoding="utf-8")
        self.say(f"run folder {run}")
        for choice in choices:
            mark = "WARNING, slower than could be: " if choice.fallback else ""
            self.say(f"{mark}{choice.op} runs on {choice.backend} ({choice.reason})")
        if first_step:
            done = " nothing to do" if first_step >= self.num_steps else ""
            self.say(f"{run} is at step {first_step};{done or ' going on from there'}")
        else:
            self.say(f"{run} holds no checkpoint; training starts at step 0")
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
            self.told_or_not("metrics.jsonl", self.file.close)
            self.boards.each(lambda board: board.close())

    def say(self, text: str) -> None:
        """A line for the person who watches; lost where the output cannot take it."""
        if not self.silent:
            with contextlib.suppress(OSError):
                text = wrapped(text) if self.console.is_terminal else text
                self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def told_or_not(self, what: str, action: Callable[[], object]) -> None:
        """Do what only tells of the run; where it fails, training is worth more, and that is said once."""
        try:
            action()
        except Exception as error:
            if what not in self.refused:
                self.refused.add(what)
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                self.say(f"WARNING: {what} cannot be written ({reason}); training goes on")

    def advance(self, step: int) -> None:
        """Move the progress bar: `step` steps are done."""
        if not self.silent:
            self.bar.at(step)

    def finished(self, step: int, facts: Facts) -> None:
        """The last words of a run that has made all its steps: where it is, and what comes next."""
        if self.silent:
            return
        run, command = shlex.quote(str(self.run)), "python -m speed_engine"
        decoded = ""  # latents of pictures are drawn through their autoencoder
        if facts.space.kind == "latents" and len(facts.shape) == 3:
            decoded = f" --vae {shlex.quote(facts.space.vae or 'VAE')}"
        self.say(
            f"finished: step {step} is saved in {self.run}; next:\n"
            f"  {command} sample --run {run}{decoded} --out {shlex.quote(str(self.run / 'samples'))}\n"
            f"  {command} plot --run {run}"
        )

    def picture(self, name: str, pixels_HWC: np.ndarray, step: int) -> None:
        """A picture for the boards."""
        if not self.silent:
            self.boards.each(lambda board: board.picture(name, pixels_HWC, step))

    def _write(self, text: str) -> None:
        """What does not fit on the disk now stays in the buffer, and is written once there is room."""
        self.file.write(text)
        self.file.flush()

    def rewind(self, step: int) -> None:
        """Forget the lines after `step`, to which the run goes back."""
        if not self.silent:
            self.told_or_not("metrics.jsonl", lambda: self._cut_off_after(step))
            self.boards.rewind(step)

    def _cut_off_after(self, step: int) -> None:
        self.file.close()
        cut_off_after(self.path, step)
        self.file = self.path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """One line of metrics; `line` holds at least step, loss and images_per_s."""
        if self.silent:
            return
        line = finite(line)
        self.told_or_not("metrics.jsonl", lambda: self._write(line_of(line)))
        scalars = {k: v for k, v in line.items() if isinstance(v, (int, float))}
        self.boards.each(lambda board: board.numbers(scalars, line["step"]))
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        text = f"loss {loss}  {line['images_per_s']:.0f} images/s"
        if (judged := line.get("validation_loss")) is not None:
            text += f"  validation {judged:.4f}"
        if line.get("data_wait", 0) >= SLOW_DATA:
            text += f"  waiting for data {100 * line['data_wait']:.0f} %"
        if line.get("mfu"):
            text += f"  MFU {100 * line['mfu']:.1f} %"
        if self.watched:
            self.bar.say(text)
            return
        per_step = (time.monotonic() - self.started) / max(1, line["step"] - self.first_step)
        minutes, seconds = divmod(int(per_step * (self.num_steps - line["step"])), 60)
        self.say(f"step {line['step']}/{self.num_steps}  {text}  {minutes}:{seconds:02d} left")
