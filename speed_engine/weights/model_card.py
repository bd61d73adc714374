"""The README.md of an exported folder: the network, its recipe, its scores, and lines of code that draw from it.

The lines are complete: run in the folder they make `pictures`, and with the same noise these are `sample`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from speed_engine.weights.diffusers_scheduler import Scheduler

CLASSES = {"transformer": "DiTTransformer2DModel", "unet": "UNet2DModel"}
HEAD = """---
license: # fill in before you publish: it is yours to choose
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [diffusion, speed-engine]
---
"""


@dataclass(frozen=True)
class Card:
    """network: the folder that holds it. has_vae: whether the VAE's copy is there. pipeline: the stock one's name, and
    `wrong` why it is not right, in clauses; empty where it is.
    """

    model: Any
    network: str
    scheduler: Scheduler | str
    has_vae: bool
    pipeline: str
    wrong: Sequence[str]

    def text(
        self,
        sections: Mapping[str, Mapping[str, Any]],
        scores: Sequence[str],
        checksums: Mapping[str, str],
    ) -> str:
        """sections: heading -> key -> value. checksums: file -> SHA-256."""
        shape = "x".join(map(str, self.model.facts.shape))
        kind = self.model.facts.space.kind
        lines = [HEAD, f"# A {self.model.config.kind} for {kind} of {shape}", ""]
        lines += self._how_to_draw()
        for heading, told in sections.items():
            lines += [f"## {heading}", "", "| what | value |", "| --- | --- |"]
            lines += [f"| {key} | {_cell(value)} |" for key, value in told.items()]
            lines += [""]
        lines += ["## Scores", ""]
        lines += [f"- {each}" for each in scores] or ["None were given."]
        lines += ["", "## Checksums (SHA-256)", "", "```"]
        lines += [f"{digest}  {name}" for name, digest in checksums.items()]
        lines += ["```", "", "## Licence", ""]
        lines += ["Not chosen yet: fill in `license` at the top, and say here what the data allow."]
        return "\n".join(lines) + "\n"

    def _how_to_draw(self) -> list[str]:
        """The section with code."""
        lines = ["## Use", ""]
        if isinstance(self.scheduler, str):
            return [
                *lines,
                f"diffusers loads the network, and cannot draw from it: {self.scheduler}. speed-engine can:",
                "",
                "```",
                "python -m speed_engine sample --weights . --out samples",
                "```",
                "",
            ]
        if not self.wrong:
            lines += ["```python", *self._by_pipeline(), "```", ""]
            if self.network == "unet":
                lines += [
                    "Without `use_clipped_model_output=True` stock `DDIMPipeline` keeps the noise that belonged to the "
                    "picture before it was clipped, and draws something else.",
                    "",
                ]
        else:
            lines += [
                f"Stock `{self.pipeline}` would not draw what this network was trained for: {'; '.join(self.wrong)}. "
                "These lines do:",
                "",
                "```python",
                *self._by_hand(self.scheduler),
                "```",
                "",
            ]
        if not self.scheduler.flow:
            num = self.scheduler.config["num_train_timesteps"]
            lines += [
                f"Take a number of steps that divides {num}: of others DDIMScheduler steps to the wrong noise levels.",
                "",
            ]
        return lines

    def _by_pipeline(self) -> list[str]:
        label = self.model.facts.conditions.get("label")
        lines = ["import torch", f"from diffusers import {self.pipeline}", ""]
        lines += [
            f'pipeline = {self.pipeline}.from_pretrained(".")  # this folder, or its hub name'
        ]
        lines += ["noise = torch.Generator().manual_seed(0)"]
        if self.network == "unet":
            # Without it, epsilon is not derived again from the clipped picture.
            call = "pipeline(4, noise, num_inference_steps=50, use_clipped_model_output=True)"
        else:
            asked = [0] * 4 if label is None else [each % label.num_values for each in range(4)]
            guidance = 1.0 if label is None else 1.5
            call = (
                f"pipeline({asked}, {guidance}, noise, num_inference_steps=50)  # classes, guidance"
            )
        return [
            *lines,
            call.replace("pipeline(", "answer = pipeline(", 1),
            "pictures = answer.images",
        ]

    def _by_hand(self, scheduler: Scheduler) -> list[str]:
        return list(self._lines(scheduler))

    def _lines(self, scheduler: Scheduler) -> Iterator[str]:
        facts, name = self.model.facts, CLASSES[self.network]
        label, space = facts.conditions.get("label"), facts.space
        latents, channels = space.kind == "latents", facts.shape[0]
        vae = ["AutoencoderKL"] if latents else []
        yield "import torch"
        yield f"from diffusers import {', '.join(sorted([*vae, name, scheduler.kind]))}"
        yield ""
        yield 'folder = "."  # this folder, or its name on a hub'
        yield f'network = {name}.from_pretrained(folder, subfolder="{self.network}").eval()'
        if self.network == "transformer" and self.model.config.frequency_shift == 0:
            yield "for block in network.transformer_blocks:  # 128 frequencies as this network was trained with"
            yield "    block.norm1.emb.time_proj.downscale_freq_shift = 0"
        yield f'scheduler = {scheduler.kind}.from_pretrained(folder, subfolder="scheduler")'
        if latents:
            place = 'folder, subfolder="vae"' if self.has_vae else repr(space.vae or "THE VAE")
            yield f"vae = AutoencoderKL.from_pretrained({place}).eval()"
        guided = label is not None and label.null
        yield "steps, num = 50, 4"
        if label is not None:
            yield f"labels = torch.arange(num) % {label.num_values}"
        elif self.network == "transformer":
            yield "labels = torch.zeros(num, dtype=torch.int64)  # there are no classes"
        if guided:
            assert label is not None
            yield f"guidance, null = 1.5, torch.full((num,), {label.num_values})"
        shape = ", ".join(map(str, facts.shape))
        yield f"x = torch.randn(num, {shape}, generator=torch.Generator().manual_seed(0))"
        if scheduler.flow:
            yield "scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])"
        else:
            yield "scheduler.set_timesteps(steps)"
        yield "with torch.no_grad():"
        yield "    for t in scheduler.timesteps:"
        told = "" if label is None and self.network == "unet" else ", class_labels=labels"
        cut = "" if self.model.num_outputs == channels else f"[:, :{channels}]"
        if guided:
            both = "torch.cat([x, x]), t.expand(2 * num), class_labels=torch.cat([labels, null])"
            yield f"        out = network({both}).sample{cut}"
            yield "        told, untold = out.chunk(2)"
            yield "        out = untold + guidance * (told - untold)"
        else:
            yield f"        out = network(x, t.expand(num){told}).sample{cut}"
        clipped = ", use_clipped_model_output=True" if scheduler.config.get("clip_sample") else ""
        yield f"        x = scheduler.step(out, t, x{clipped}).prev_sample"
        if latents:
            yield f"    scale = torch.tensor({list(space.scale)}).view(1, -1, 1, 1)"
            yield f"    shift = torch.tensor({list(space.shift)}).view(1, -1, 1, 1)"
            yield "    x = vae.decode(x / scale + shift).sample"
        yield "pictures = (x / 2 + 0.5).clamp(0, 1)"


def _cell(value: Any) -> str:
    """A value in a Markdown table's cell."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(each)}" for key, each in value.items() if each is not None)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_cell, value))}]"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
