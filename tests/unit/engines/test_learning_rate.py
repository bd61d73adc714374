"""The learning rate over the updates, and lengths given in images."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from speed_engine.engines import optimizer


def rates(steps: list[int], **settings: object) -> list[float]:
    config = optimizer.Config.model_validate({"lr": 1.0, **settings})
    return [optimizer.learning_rate(config, step) for step in steps]


def test_learning_rate_shapes() -> None:
    """Every shape at its start, in the middle, at its end and beyond it; the warm-up multiplies."""
    steps = [0, 4, 10, 15, 20, 1000]
    linear = rates(steps, lr_shape="linear", decay_start=10, decay_steps=10, lr_end=0.2)
    assert linear == pytest.approx([1, 1, 1, 0.6, 0.2, 0.2])
    cosine = rates([10, 12, 15, 20, 30], lr_shape="cosine", decay_start=10, decay_steps=10)
    assert cosine == pytest.approx([1, 0.9045085, 0.5, 0, 0])
    root = rates([0, 4, 100, 400], lr_shape="inverse_sqrt", decay_start=100, warmup_steps=10)
    assert root == pytest.approx([0.1, 0.5, 1, 0.5])
    after_warmup = rates([1, 4, 9], lr_shape="linear", warmup_steps=4, decay_steps=10)
    assert after_warmup == pytest.approx([0.5, 1, 0.5])


def test_images_become_updates() -> None:
    """EDM's numbers for CIFAR-10: 10 million images of ramp-up, half a million of half-life, batches of 512."""
    given = {"warmup_images": 10_000_000, "ema_half_life_images": 5e5, "ema_kind": "half_life"}
    config = optimizer.Config.model_validate(given).in_updates(512)
    assert config.warmup_steps == 19531 and config.ema_half_life == pytest.approx(976.5625)
    assert config.warmup_images is None and config.ema_half_life_images is None
    assert config.in_updates(64) is config
    (ema,) = config.emas()
    assert ema.kind == "half_life" and ema.weight(1) == 1
    assert ema.weight(101) == pytest.approx(1 - 0.5 ** (1 / 5))
    assert ema.weight(10**6) == pytest.approx(1 - 0.5 ** (1 / 976.5625))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr_shape": "cosine"}, "needs optim.decay_steps"),
        ({"decay_steps": 5}, "lr_shape=cosine or linear"),
        ({"lr_shape": "inverse_sqrt"}, "needs optim.decay_start"),
        ({"lr": 1e-4, "lr_end": 1e-3}, "above optim.lr"),
        ({"warmup_steps": 5, "warmup_images": 5}, "give one of them"),
        ({"ema_half_life": 5, "ema_half_life_images": 5}, "give one of them"),
    ],
)
def test_contradictions_are_told(settings: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        optimizer.Config.model_validate(settings)
