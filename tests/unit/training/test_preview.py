"""What cannot be drawn while training runs is refused at the start, with the key and the cure."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from speed_engine.config import build
from speed_engine.data import Facts
from speed_engine.data.space import Space
from speed_engine.distributed import Processes
from speed_engine.training import assembly, preview

PIXELS, LATENTS = Space.pixels(1), Space("latents", (0.18,) * 4, (0.0,) * 4)


def parts_of(shape, space, **sample):
    """As much of a run's parts as is looked at."""
    settings = {"every": 10, "num": 2, "steps": 2, **sample}
    model = {"kind": "dit", "size": "tiny/2", "depth": 1}
    config = build(
        {"model": model, "data": {"kind": "digits"}, "sample": settings, "log": {"every": 10}}
    )
    here = Processes(0, 1, 0, torch.device("cpu"))
    facts = Facts(shape, space, {})
    return SimpleNamespace(
        config=config,
        facts=facts,
        conditions={},
        processes=here,
        table=assembly.build_table(config),
    )


@pytest.mark.parametrize(
    ("shape", "space", "sample", "words"),
    [
        ((1, 8, 8), PIXELS, {"every": 7}, ["sample.every=7", "log.every=10", "choose 10"]),
        ((1, 8, 8), PIXELS, {"guidance": 2}, ["conditional model", "guidance 1"]),
        ((1, 8, 8), PIXELS, {"sampler": "ddin"}, ["ddin", "ddim"]),
        ((1, 8, 8), PIXELS, {"vae": "some"}, ["sample.vae", "leave it"]),
        ((4, 4, 4), LATENTS, {}, ["sample.vae", "AutoencoderKL", "sample.every=0"]),
        ((4, 4, 4), LATENTS, {"vae": "no/such/folder"}, ["no/such/folder"]),
        ((1, 8), PIXELS, {}, ["[1, 8]", "sample.every=0"]),
    ],
)  # fmt: skip
def test_refused(shape, space, sample, words):
    with pytest.raises(ValueError) as refused:
        preview.of(parts_of(shape, space, **sample), Path("run"), torch.nn.Identity(), None)
    assert all(word in str(refused.value) for word in words), refused.value


def test_none_where_none_is_asked_for():
    parts = parts_of((1, 8), PIXELS, every=0)
    assert preview.of(parts, Path("run"), torch.nn.Identity(), None) is None
    assert preview.share_of_training(parts.config) == 0
