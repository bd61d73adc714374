"""DiT: the published network, its numbers, its precision and its refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from speed_engine.conditions import label
from speed_engine.data import ArrayFacts, ConditionFacts, Facts
from speed_engine.data.space import Space
from speed_engine.models import dit
from speed_engine.models.parts.glue import modulated_norm


def shape(channels=1, size=8, classes=10, null=True, learned_variance=False) -> dict[str, Any]:
    """The arguments of `build` that come from the data."""
    conditions = {"label": label.described(classes, null=null)} if classes else {}
    facts = Facts((channels, size, size), Space.pixels(channels), conditions)
    return {"facts": facts, "num_outputs": channels * (1 + learned_variance)}


IMAGENET = shape(4, 32, 1000, learned_variance=True)
DIGITS = shape()
# "Gflops" of Table 4 of the paper (they count multiply-adds), and parameters in millions.
PUBLISHED = {
    "S/2": (6.06, 33), "S/4": (1.41, 33), "S/8": (0.36, 33),
    "B/2": (23.01, 130), "B/4": (5.56, 130), "B/8": (1.42, 131),
    "L/2": (80.71, 458), "L/4": (19.70, 458), "L/8": (5.01, 459),
    "XL/2": (118.64, 675), "XL/4": (29.05, 675), "XL/8": (7.39, 676),
}  # fmt: skip


def small(**changes) -> dit.Config:
    sizes = {"hidden_size": 16, "depth": 2, "num_heads": 2, "patch_size": 2}
    return dit.Config(size="tiny/2", **{**sizes, **changes})


def trained(config: dit.Config, **changes) -> dit.DiT:
    """A model whose zeros are gone, as after some training."""
    model = dit.build(config, **shape(**changes))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def inputs(batch: int = 3, channels: int = 1, size: int = 8):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batch, channels, size, size, generator=generator)
    return x, torch.arange(batch) * 300, torch.arange(batch) % 10


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_have_the_published_costs(size):
    gmacs, millions = PUBLISHED[size]
    config = dit.Config(size=size)
    model = dit.build(config, **IMAGENET, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    # The table's last digit, or half a percent.
    found = dit.macs_per_sample(config, **IMAGENET) / 1e9
    assert found == pytest.approx(gmacs, rel=5e-3, abs=5e-3)


@pytest.mark.parametrize("learned_variance", [False, True])
def test_macs_are_those_that_torch_counts(learned_variance):
    told = shape(channels=3, learned_variance=learned_variance)
    config = small(mlp_ratio=3.0)
    model = dit.build(config, **told)
    x, time, labels = inputs(1, channels=3)
    # torch's counter knows the plain attention only.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x, time, label=labels)
    assert counter.get_total_flops() == 2 * dit.macs_per_sample(config, **told)


def test_xl2_has_the_names_and_shapes_of_the_public_checkpoint():
    wanted = {
        "pos_embed": (1, 256, 1152),
        "x_embedder.proj.weight": (1152, 4, 2, 2),
        "x_embedder.proj.bias": (1152,),
        "t_embedder.mlp.0.weight": (1152, 256),
        "t_embedder.mlp.0.bias": (1152,),
        "t_embedder.mlp.2.weight": (1152, 1152),
        "t_embedder.mlp.2.bias": (1152,),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "final_layer.linear.weight": (32, 1152),
        "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (2304, 1152),
        "final_layer.adaLN_modulation.1.bias": (2304,),
    }
    for i in range(28):
        for name, outputs, width in (
            ("attn.qkv", 3456, 1152),
            ("attn.proj", 1152, 1152),
            ("mlp.fc1", 4608, 1152),
            ("mlp.fc2", 1152, 4608),
            ("adaLN_modulation.1", 6912, 1152),
        ):
            wanted[f"blocks.{i}.{name}.weight"] = (outputs, width)
            wanted[f"blocks.{i}.{name}.bias"] = (outputs,)
    model = dit.build(dit.Config(), **IMAGENET, device="meta")
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == wanted
    assert sum(math.prod(shape) for shape in wanted.values()) == pytest.approx(675.1e6, rel=1e-4)


def test_untrained_output_is_exactly_zero_and_learns():
    model = dit.build(small(), **DIGITS)
    x, time, labels = inputs()
    out = model(x, time, label=labels)
    assert out.shape == (3, 1, 8, 8) and (out == 0).all()
    (out - 1).square().sum().backward()
    assert model.final_layer.linear.bias.grad.abs().sum() > 0


def test_initialisation_is_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again = dit.build(small(), **DIGITS, seed=3), dit.build(small(), **DIGITS, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    other = dit.build(small(), **DIGITS, seed=4)
    for (key, a), b, c in zip(
        first.state_dict().items(), again.state_dict().values(), other.state_dict().values(), strict=True
    ):  # fmt: skip
        assert torch.equal(a, b), key
        drawn = a.abs().sum() > 0 and key != "pos_embed"
        assert torch.equal(a, c) != drawn, key


def test_initialisation_recipe():
    model: Any = dit.build(small(hidden_size=128, num_heads=4), **DIGITS)
    qkv, patch = model.blocks[0].attn.qkv.weight, model.x_embedder.proj.weight
    assert qkv.abs().max().item() == pytest.approx(math.sqrt(6 / (128 + 384)), rel=1e-2)
    assert patch.abs().max().item() == pytest.approx(math.sqrt(6 / (128 + 4)), rel=1e-1)
    assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.t_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    zeros = [model.final_layer.linear.weight, *(b.adaLN_modulation[1].weight for b in model.blocks)]
    assert all((weight == 0).all() for weight in zeros)


def test_position_embedding_is_column_then_row():
    places = dit.position_embedding(16, grid=3)[0]
    for token, (row, column) in enumerate((r, c) for r in range(3) for c in range(3)):
        frequencies = [10000 ** (-k / 4) for k in range(4)]
        wanted = [
            wave(place * frequency)
            for place in (column, row)
            for wave in (math.sin, math.cos)
            for frequency in frequencies
        ]
        torch.testing.assert_close(places[token], torch.tensor(wanted), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift", [0, 1])
def test_time_embedding_frequencies(shift):
    embedder: Any = dit.TimeEmbedder(8, dit.NUM_FREQUENCIES, shift)
    embedder.mlp = torch.nn.Identity()
    for time in (torch.tensor([0, 1, 999]), torch.tensor([0.37, -1.25, 80.0])):
        waves = embedder(time, torch.float32)
        angle = time.double()[:, None] * 10000.0 ** (-torch.arange(128).double() / (128 - shift))
        wanted = torch.cat([angle.cos(), angle.sin()], 1)
        torch.testing.assert_close(waves.double(), wanted, atol=2e-4, rtol=0)


def test_null_label_is_a_row_of_its_own():
    def rows(**changes):
        embedder: Any = dit.build(small(), **shape(**changes)).y_embedder
        return None if embedder is None else len(embedder.embedding_table.weight)

    assert rows() == 11
    assert rows(null=False) == 10
    assert rows(classes=1) == 2
    assert rows(classes=0) is None


def test_a_vector_is_told_and_none_is_zero():
    vector = ConditionFacts("vector", {"vector": ArrayFacts((3,), "float32")})
    facts = Facts((1, 8, 8), Space.pixels(1), {"vector": vector})
    model = dit.build(small(), facts, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    x, time, _ = inputs()
    out = model(x, time, vector=torch.zeros(3, 3))
    assert not torch.allclose(out, model(x, time, vector=torch.ones(3, 3)))
    told = {**facts.conditions, "label": label.described(10)}
    config = small()
    both, one = (dit.macs_per_sample(config, facts.with_conditions(c), 1) for c in (told, {}))
    assert both - one == 3 * 16
    with pytest.raises(ValueError, match="needs the condition 'vector'"):
        model(x, time)


def test_labels_time_and_null_label_change_the_output():
    model = trained(small())
    x, time, labels = inputs()
    out = model(x, time, label=labels)
    assert not torch.allclose(out, model(x, time, label=labels + 1))
    assert not torch.allclose(out, model(x, time + 1, label=labels))
    assert not torch.allclose(out, model(x, time, label=torch.full_like(labels, 10)))
    torch.testing.assert_close(out, model(x, time.float(), label=labels))
    # Samples do not see each other.
    torch.testing.assert_close(out[1:2], model(x[1:2], time[1:2], label=labels[1:2]))


def test_unconditional_model():
    model = trained(small(), classes=0, learned_variance=True, channels=2)
    x, time, labels = inputs(channels=2)
    assert model(x, time).shape == (3, 4, 8, 8)
    assert not any(key.startswith("y_embedder") for key in model.state_dict())
    with pytest.raises(ValueError, match="does not take the condition 'label'"):
        model(x, time, label=labels)


def test_inputs_that_do_not_fit_are_refused():
    model = dit.build(small(), **DIGITS)
    x, time, labels = inputs()
    with pytest.raises(ValueError, match=r"samples of \(1, 8, 8\), not \(1, 8, 6\)"):
        model(x[..., :6], time, label=labels)
    with pytest.raises(ValueError, match="needs the condition 'label'"):
        model(x, time)
    with pytest.raises(ValueError, match="float32"):
        model(x, time.bfloat16(), label=labels)


@pytest.mark.parametrize("sample_size", [1, 7, 9])
def test_sample_that_is_no_whole_number_of_patches(sample_size):
    with pytest.raises(ValueError, match=f"model.patch_size 2 does not divide .* {sample_size}"):
        dit.build(small(), **shape(size=sample_size))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "XL/3"}, "XL/3' is not one of S/2, S/4"),
        (
            {"num_heads": 5},
            "model.hidden_size 128 must be a multiple of 4 and of model.num_heads 5",
        ),
        ({"hidden_size": 6, "num_heads": 2}, "model.hidden_size 6"),
        ({"heads": 2}, "heads"),
        ({"depth": 0}, "depth"),
    ],
)
def test_wrong_configuration(changes, message):
    with pytest.raises(ValidationError, match=message):
        dit.Config(**{"size": "tiny/2", **changes})


def test_overrides_replace_the_named_size():
    assert dit.Config(size="XL/2", patch_size=4).resolved() == dit.SIZES["XL/4"]
    assert dit.Config(size="tiny/1").resolved() == (128, 6, 4, 1)


def test_bf16_parameters_and_autocast_stay_near_fp32():
    model = trained(small(hidden_size=64, num_heads=4, depth=4))
    x, time, labels = inputs()
    wanted = model(x, time, label=labels)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(x.bfloat16(), time, label=labels)
    model.bfloat16()
    for found in (autocast, model(x.bfloat16(), time, label=labels), model(x, time, label=labels)):
        assert found.dtype == torch.bfloat16
        assert ((found - wanted).norm() / wanted.norm()).item() < 3e-2


def test_time_survives_bf16_parameters():
    """Frequencies cast to bf16 would be off by radians at t = 999."""
    embedder: Any = dit.TimeEmbedder(8, dit.NUM_FREQUENCIES, 0).bfloat16()
    embedder.mlp = torch.nn.Identity()
    time = torch.tensor([999.0])
    exact: Any = dit.TimeEmbedder(8, dit.NUM_FREQUENCIES, 0)
    exact.mlp = torch.nn.Identity()
    difference = embedder(time, torch.bfloat16).float() - exact(time, torch.float32)
    assert difference.abs().max() < 5e-3


def test_norm_statistics_are_fp32_under_bf16():
    """A mean of 64 beside a deviation of 1: bf16 sums would lose the deviation."""
    x = 64 + torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(2))
    x, zero = x.bfloat16(), torch.zeros(2, 256, dtype=torch.bfloat16)
    wanted = (x.double() - x.double().mean(-1, keepdim=True)) / x.double().std(
        -1, keepdim=True, correction=0
    )
    torch.testing.assert_close(modulated_norm(x, zero, zero).double(), wanted, atol=2e-2, rtol=1e-2)


def test_gradients_are_those_of_finite_differences():
    config = small(hidden_size=8, depth=1)
    model: Any = trained(config, size=4).double()
    x, time, labels = inputs(2, size=4)
    weight = model.blocks[0].adaLN_modulation[1].weight.detach().clone()

    def run(x, weight):
        return torch.func.functional_call(
            model,
            {"blocks.0.adaLN_modulation.1.weight": weight},
            (x, time[:2]),
            {"label": labels[:2]},
        )

    arguments = (x.double().requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(run, arguments)


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_attention_copies_nothing_and_tokens_are_contiguous():
    model: Any = trained(small())
    x, _, _ = inputs()
    tokens = model.x_embedder(x)
    assert tokens.is_contiguous()
    with torch.no_grad(), Operations() as operations:
        model.blocks[0].attn(model.blocks[0].attn.qkv(tokens))
    copies = {"clone", "copy_", "_to_copy", "contiguous", "_unsafe_view", "cat", "stack"}
    assert "addmm" in operations.names  # the mode does see the operations
    assert not copies & set(operations.names), operations.names


def test_patch_projection_is_the_convolution_it_replaces():
    projection = dit.PatchProjection(3, 8, 2, stride=2)
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(3))
    wanted = torch.nn.functional.conv2d(x, projection.weight, projection.bias, stride=2)
    torch.testing.assert_close(projection(x), wanted.flatten(2).transpose(1, 2))


def test_the_whole_model_is_one_graph():
    model = trained(small(depth=1))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x, time, labels = inputs()
    torch.testing.assert_close(compiled(x, time, label=labels), model(x, time, label=labels))


def test_fp8_is_refused_where_it_cannot_run(monkeypatch):
    config = dit.Config(size="tiny/2", products="fp8_row")
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match=r"fp8_row: torch .* has no"),
    ):
        patch.delattr(torch, "_scaled_mm")
        dit.build(config, **DIGITS)
    assert dit.build(config, **DIGITS, device="meta").state_dict().keys() == (
        dit.build(dit.Config(size="tiny/2"), **DIGITS, device="meta").state_dict().keys()
    )


def test_attention_choice_is_kept():
    choice = dit.build(small(), **DIGITS).attention_choice
    assert choice.backend == "sdpa" and "cpu" in choice.reason
