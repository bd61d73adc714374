"""What a configuration is meant for: data of another shape or space would train all the same, to something else."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from speed_engine.data import DataError, Facts
from speed_engine.kinds import Section


class Expected(Section):
    """The samples that a preset's numbers belong to; what is null may be anything."""

    shape: tuple[int, ...] | None = Field(None, description="[C, *space] of a sample")
    space: Literal["pixels", "latents"] | None = Field(None, description="what its numbers are")

    def check(self, facts: Facts, where: str) -> None:
        """Raise DataError, with the command that makes the right data, where `facts` are others."""
        shape_fits = self.shape is None or facts.shape == self.shape
        if shape_fits and self.space in (None, facts.space.kind):
            return
        found = f"{facts.space.kind} {_sides(facts.shape)}"
        wanted = f"{self.space or 'samples'} {_sides(self.shape or facts.shape)}"
        raise DataError(
            f"{where} holds {found}, but this configuration is made for {wanted} (data.expect); make those with "
            f"`{self._command(facts)}`, or set data.expect=null to train on what is there"
        )

    def _command(self, facts: Facts) -> str:
        shape = self.shape or facts.shape
        words = f"python -m speed_engine encode --images DIR --size {shape[-1]}"
        if (self.space or facts.space.kind) == "latents":
            # Eight pixels a side of a latent, as Stable Diffusion's autoencoder has it.
            words = words.replace(f"--size {shape[-1]}", f"--size {8 * shape[-1]}")
            words += " --mode latents --vae stabilityai/sd-vae-ft-ema"
        return f"{words} --out NEW"


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
