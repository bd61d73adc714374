"""The small network that tells glyphs apart, and whose features they are compared in.

Its weights lie beside this file, so that everybody judges by the same one.

`python -m speed_engine.reports.scores.glyph_network FILE` trains it again, on draws that no set holds: other weights,
and scores that are not to be compared with those of these.
"""

# B pictures, F features, L classes.

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from speed_engine.data import glyph_pictures
from speed_engine.weights.file import read_safetensors, write_safetensors

WEIGHTS = Path(__file__).with_name("glyph_network.safetensors")
WIDTHS = (16, 32, 64, 64)
FEATURES = 96
SEED = 1  # of the draws that it is trained on
STEPS, BATCH, RATE = 2000, 128, 2e-3


class GlyphNetwork(nn.Module):
    """Four convolutions and two linear layers; 91,000 weights."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(zip((3, *WIDTHS), WIDTHS, strict=False)):
            layers += [
                nn.Conv2d(before, after, 3, 1 if i == 0 else 2, 1),
                nn.GroupNorm(8, after),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten())
        self.hidden = nn.Linear(4 * WIDTHS[-1], FEATURES)
        self.head = nn.Linear(FEATURES, len(glyph_pictures.CHARACTERS))

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 [B, 3, 32, 32] -> float32 [B, 96], not below 0."""
        return functional.relu(self.hidden(self.body(pixels_BCHW.float() / 127.5 - 1)))

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 [B, 3, 32, 32] -> scores of the classes, float32 [B, L]."""
        return self.head(self.features(pixels_BCHW))


def load_network() -> tuple[GlyphNetwork, str]:
    """The network with the weights that are shipped, and their SHA-256."""
    network = GlyphNetwork()
    tensors, _ = read_safetensors(WEIGHTS)
    network.load_state_dict({name: each.float() for name, each in tensors.items()})
    return network.eval(), hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()


def train(steps: int = STEPS) -> GlyphNetwork:
    """A new network: AdamW, cosine decay, cross entropy; every picture is new."""
    torch.manual_seed(0)
    network = GlyphNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        pixels, labels = glyph_pictures.draw(SEED, step * BATCH, BATCH)
        # Labels come in turn, and 128 is no multiple of 62: each batch has all of them.
        loss = functional.cross_entropy(network(torch.from_numpy(pixels)), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}/{steps}: loss {float(loss):.4f}", flush=True)
    return network.eval()


if __name__ == "__main__":
    (file,) = sys.argv[1:]
    trained = train()
    halves = {name: each.half().contiguous() for name, each in trained.state_dict().items()}
    write_safetensors(Path(file), halves, {"about": "tells glyphs apart; made by glyph_network.py"})
