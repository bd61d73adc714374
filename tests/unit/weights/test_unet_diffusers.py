"""diffusers' U-Net: the same function and gradients there and here, the same bits after a round trip, or a refusal."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from speed_engine.conditions import label
from speed_engine.data import ArrayFacts, ConditionFacts, Facts
from speed_engine.data.space import Space
from speed_engine.models import unet
from speed_engine.weights.diffusers_folder import SIDECAR, WEIGHTS, adapter_of_folder
from speed_engine.weights.unet_diffusers import export_diffusers, import_diffusers, names

# The paper's form, with less in it; ADM's and EDM's settings, as far as diffusers has them.
PAPER = {"multipliers": (1, 2, 1), "num_blocks": 1, "attention_at": (4,)}
ADM = {
    **PAPER,
    "modulation": "scale_shift",
    "resample": "block",
    "attention_at": (16, 4),
    "head_width": 64,
    "norm_eps": 1e-6,
    "frequency_shift": 1,
    "dropout": 0.1,
}


def network(num_classes: int = 0, shape: tuple[int, ...] = (4, 8, 8), **changes: Any) -> unet.UNet:
    told = {"label": label.described(num_classes, null=True)} if num_classes else {}
    facts = Facts(shape, Space.pixels(shape[0]), told)
    config = unet.Config.model_validate({**PAPER, **changes})
    model = unet.build(config, facts, 2 * shape[0], dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # the last layers of branches begin at zero
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.02)
    return model


def stock(folder: Path) -> Any:
    from diffusers.models.unets.unet_2d import UNet2DModel

    loaded: Any = UNet2DModel.from_pretrained(
        folder, output_loading_info=True, local_files_only=True
    )
    model, report = loaded
    assert not any(report.values()), report
    return model.eval()


def export_quietly(folder: Path, model: unet.UNet) -> list[str]:
    with warnings.catch_warnings(action="ignore"):
        return export_diffusers(folder, model)


def compare(ours: unet.UNet, theirs: Any) -> None:
    """Outputs, and gradients of all weights by name."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, *ours.facts.shape, generator=generator)
    time = torch.tensor([0, 1, 437, 999])
    told = ours.facts.conditions.get("label")
    numbers = None if told is None else torch.tensor([0, 1, 3, told.num_values])
    found = ours(x, time, **({} if numbers is None else {"label": numbers}))
    wanted = theirs(x, time, class_labels=numbers).sample
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    weight = torch.randn(found.shape, generator=generator)
    for model, out in ((ours, found), (theirs, wanted)):
        model.zero_grad()
        (out * weight).mean().backward()
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for our, their in names(ours.config.resolved(), ours.facts):
        for ending in ("weight", "bias"):
            got = ours.get_parameter(f"{our}.{ending}").grad
            expected = grads.get(f"{their}.{ending}")
            if our.endswith("attn.qkv"):
                expected = torch.cat([grads[f"{their}.to_{letter}.{ending}"] for letter in "qkv"])
            assert got is not None and expected is not None
            if f"{our}.{ending}" == "t_embedder.mlp.0.weight" and not theirs.config.flip_sin_to_cos:
                expected = torch.cat(expected.chunk(2, dim=1)[::-1], dim=1)
            scale = expected.abs().max().item()
            # A key's bias moves all scores of a query alike: its gradient is nothing but rounding.
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * scale + 1e-8)
    if told is not None:
        table: Any = ours.y_embedder
        torch.testing.assert_close(table.weight.grad, grads["class_embedding.weight"])


@pytest.mark.parametrize(
    "arguments",
    [{}, {**ADM, "num_classes": 5, "shape": (3, 8, 16)}],
    ids=["paper", "adm"],
)
def test_export_is_the_same_function_and_comes_back_bit_equal(
    arguments: dict[str, Any], tmp_path: Path, equal: Callable[..., bool]
) -> None:
    model = network(**arguments)
    cautions = export_quietly(tmp_path, model)
    assert len(cautions) == (2 if arguments else 0)
    compare(model, stock(tmp_path))
    again = import_diffusers(tmp_path)
    assert equal(model, again) and again.config == model.config and again.facts == model.facts
    with pytest.raises(ValueError, match="leave out --frequency-shift"):
        import_diffusers(tmp_path, frequency_shift=0)
    with pytest.raises(ValueError, match="classes, not 7"):
        import_diffusers(tmp_path, num_classes=7)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A network that diffusers made, sines first, and its folder."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    torch.manual_seed(0)
    model: Any = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, freq_shift=1,
        flip_sin_to_cos=False, block_out_channels=(128, 128), attention_head_dim=64,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), num_class_embeds=6,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("theirs")
    model.eval().save_pretrained(folder)
    return model, folder


def test_a_folder_that_diffusers_wrote(theirs: tuple[Any, Path]) -> None:
    model, folder = theirs
    assert adapter_of_folder(folder).__name__.endswith("unet_diffusers")
    ours = import_diffusers(folder)
    compare(ours, model)
    told = ours.facts.conditions["label"]
    assert (told.num_values, told.null) == (5, True)
    assert import_diffusers(folder, num_classes=6).facts.conditions["label"].num_values == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"downsample_padding": 0}, "downsample_padding 0, which the U-Net here cannot have"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type fourier"),
        ({"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]}, "SkipDownBlock2D"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "UpBlock2D"),
        ({"downsample_type": "resnet"}, "resampled by resnet"),
        ({"block_out_channels": [128, 200]}, "no multiples of the first"),
        ({"norm_num_groups": 16}, "norm_num_groups 16, where the norms here have 32"),
        ({"resnet_time_scale_shift": "scale_shift"}, "no norm before the middle's attention"),
        ({"layers_per_block": 2}, "does not fit its own config.json: .* is missing"),
        ({"sample_size": None}, "config.json without a usable"),
    ],
)
def test_other_networks_are_refused(
    theirs: tuple[Any, Path], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _, folder = theirs
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    save_file(load_file(folder / WEIGHTS), tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=message) as refusal:
        import_diffusers(tmp_path)
    assert str(tmp_path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": "ddpmpp"}, "no place for model.resample=block_conv; export it with"),
        ({"residual_scale": 0.5**0.5}, "model.residual_scale=0.707"),
        ({"multipliers": (2, 2)}, "model.multipliers that begin with 2"),
        ({"up_attention": "last"}, "model.up_attention=last"),
        ({"width": 64}, "norms of several numbers of groups, as model.width 64"),
        ({"num_heads": 4}, "heads of one size, and model.num_heads gives several"),
    ],
)
def test_networks_that_diffusers_cannot_be_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    facts = Facts((4, 8, 8), Space.pixels(4))
    settings = {} if "size" in change else PAPER
    model = unet.build(unet.Config.model_validate({**settings, **change}), facts, 4)
    with pytest.raises(ValueError, match=message):
        export_diffusers(tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


def test_other_conditions_are_refused_and_our_own_folder_must_be_whole(tmp_path: Path) -> None:
    vector = {"vector": ConditionFacts("vector", {"vector": ArrayFacts((3,), "float32")})}
    facts = Facts((4, 8, 8), Space.pixels(4), vector)
    model = unet.build(unet.Config.model_validate(PAPER), facts, 4)
    with pytest.raises(ValueError, match="no place for the condition 'vector'"):
        export_diffusers(tmp_path, model)
    export_diffusers(tmp_path, network())
    good = load_file(tmp_path / WEIGHTS)
    save_file({**good, "conv_in.bias": good["conv_in.bias"] + 1}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"remove {SIDECAR}"):
        import_diffusers(tmp_path)
