"""The section `train`: length and batch of a run, and when it is looked after, goes back or ends."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from speed_engine.kinds import Section

# Checkpoints are named by eight digits of their step.
MOST_STEPS, LARGEST_BATCH = 10**8 - 1, 2**24


class Train(Section):
    """Length and batch of the run. global_batch = micro_batch x accumulation x processes."""

    steps: int = Field(
        default=1000, ge=0, le=MOST_STEPS, description="optimizer steps of the whole run"
    )
    global_batch: int = Field(
        default=256,
        ge=1,
        le=LARGEST_BATCH,
        description="samples per optimizer step, over all processes",
    )
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="samples per forward pass and process; default: no accumulation",
    )
    stratified: bool = Field(
        default=True,
        description="draw time steps stratified over the global batch; false: independently",
    )
    flip: bool = Field(default=False, description="mirror half of the samples left to right")
    exact_sums: bool = Field(
        default=False,
        description="engine torch: add up the micro-batches' gradients, and the losses told, in a fixed binary tree, "
        "so that 1, 2, 4 ... processes train the same bits; micro_batch is the leaf. Its costs: engines/exact_sums.py",
    )
    resident: Literal["auto"] | bool = Field(
        default=False,
        description="hold all samples in the memory of the training device; auto: where they take a sixth of it "
        "at most",
    )
    latents: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="dtype of a batch of latents on the device; bf16 rounds each number to 8 bits, and noise "
        "and loss read 2 bytes less each",
    )
    vb_scale: float = Field(
        default=1.0, ge=0, description="factor of the variational term (learned variance only)"
    )
    init_from: str | None = Field(
        default=None,
        description="start from these weights: a run folder, our safetensors, a public .pt, a diffusers folder",
    )
    init_weights: Literal["ema", "model"] = Field(
        default="ema", description="of a run folder in init_from: its averages or its last weights"
    )
    max_bad_steps: int = Field(
        default=20,
        ge=1,
        description="consecutive non-finite (skipped) steps after which the run goes back to a checkpoint, or stops, "
        "at the next line of the log",
    )
    bad_window: int = Field(
        default=1000, ge=1, description="steps in which max_bad_in_window are counted"
    )
    max_bad_in_window: int = Field(
        default=100, ge=1, description="the same for skipped steps that do not follow one another"
    )
    max_rollbacks: int = Field(
        default=2,
        ge=0,
        description="times that a run goes back to its last good checkpoint and leaves the bad steps' data out; "
        "then it ends with code 3",
    )
    spike_sigmas: float = Field(
        default=0.0,
        ge=0.0,
        description="standard deviations by which the loss in a bin of log SNR must exceed that of the lines before it "
        "for the run to go back to a checkpoint, as for max_bad_steps, and leave that line's data out; 6 is "
        "cautious; 0 = off",
    )
    spike_history: int = Field(
        default=32, ge=8, le=10_000, description="lines of the log that a spike is judged against"
    )
    replay_every: int = Field(
        default=0,
        ge=0,
        description="steps between two whose gradient is computed twice and compared bit for bit; where it differs the "
        "machine is named, nothing is applied and the run ends with code 5; 0 = off",
    )
    stall_seconds: float = Field(
        default=300.0,
        ge=0,
        description="without a step for so long the run names the process it waits for and ends with code 4; 0 = off",
    )
    meeting_seconds: float = Field(
        default=300.0,
        gt=0,
        description="how long processes wait at the start for all others to come; then the run names those that have "
        "not and ends with code 4",
    )
    first_step_seconds: float = Field(
        default=1800.0,
        ge=0,
        description="as stall_seconds, until the first step is done, which compiles, and while any process writes a "
        "checkpoint, validates or draws",
    )
