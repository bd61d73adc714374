"""`make test-wheel`: a training from the installed wheel, its C++ kernels compiled anew."""

import pytest

from tests.commands.test_wheel import from_the_wheel, site  # noqa: F401  a fixture


@pytest.mark.timeout(900)
def test_a_training_from_the_wheel(site):  # noqa: F811
    shown = from_the_wheel(site, "plan", "--config", "digits_dit_tiny")
    assert "1x8x8" in shown
    small = ["model.depth=1", "train.global_batch=8", "train.steps=2", "log.every=1"]
    words = ["--config", "digits_dit_tiny", "engine=torch", "run_dir=run", *small]
    cache = site.parent / "cache"
    said = from_the_wheel(site, "train", *words, XDG_CACHE_HOME=str(cache))
    assert "compiling noise.cpp" in said and "step 2 is saved in run" in said
    assert {"noise", "loss", "adamw_ema"} <= {
        path.name.split("-")[0] for path in cache.rglob("*.so")
    }
    assert (site.parent / "run" / "checkpoints" / "step-00000002" / "ema.safetensors").exists()
