"""diffusers folders: the same function there and here, the same bits after a round trip."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from speed_engine.data import ArrayFacts, ConditionFacts
from speed_engine.models import dit
from speed_engine.weights.diffusers_folder import WEIGHTS
from speed_engine.weights.dit_diffusers import export_diffusers, import_diffusers

SMALL = dit.Config(size="tiny/2", hidden_size=24, depth=3, num_heads=3, frequency_shift=1)


@pytest.fixture
def randomised(network) -> Callable[..., dit.DiT]:
    """A DiT as ImageNet's, but small."""

    def build(config: dit.Config = SMALL, **changes) -> dit.DiT:
        return network(config, **{"channels": 4, "num_classes": 1000, **changes})

    return build


def stock(folder: Path):
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    loaded: Any = DiTTransformer2DModel.from_pretrained(
        folder, output_loading_info=True, local_files_only=True
    )
    model, report = loaded
    assert not any(report.values()), report
    return model.eval()


def outputs(ours: dit.DiT, theirs, labels: torch.Tensor | None = None):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, *ours.facts.shape, generator=generator)
    tau = torch.tensor([0, 1, 437, 999])
    given = torch.tensor([0, 5, 999, 1000]) if labels is None else labels
    with torch.no_grad():
        found = ours(x, tau, **({"label": given} if ours.facts.conditions else {}))
        return found, theirs(x, timestep=tau, class_labels=given).sample


def export_quietly(folder: Path, model: dit.DiT, **arguments) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return export_diffusers(folder, model, **arguments)


@pytest.mark.parametrize("learned_variance", [True, False])
def test_export_is_the_same_function_and_comes_back_bit_equal(
    randomised, equal, tmp_path, learned_variance
):
    model = randomised(learned_variance=learned_variance)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # ImageNet's classes, diffusers' frequencies: no caution
        assert export_diffusers(tmp_path, model) == []
    found, wanted = outputs(model, stock(tmp_path))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    again = import_diffusers(tmp_path)
    assert equal(model, again) and again.config == model.config and again.facts == model.facts


def test_public_frequencies_differ_and_the_caution_tells_the_cure(randomised, equal, tmp_path):
    model = randomised(SMALL.model_copy(update={"frequency_shift": 0}))
    with pytest.warns(UserWarning, match="downscale_freq_shift = 0"):
        export_diffusers(tmp_path, model)
    theirs = stock(tmp_path)
    found, wanted = outputs(model, theirs)
    assert not torch.allclose(found, wanted, atol=1e-3)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    torch.testing.assert_close(*outputs(model, theirs), rtol=1e-4, atol=1e-5)
    assert equal(model, import_diffusers(tmp_path))
    assert import_diffusers(tmp_path).config.frequency_shift == 0


def test_a_folder_that_diffusers_wrote(equal, facts, tmp_path):
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    theirs: Any = DiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, num_layers=2, in_channels=4, out_channels=8,
        sample_size=8, norm_eps=1e-6,
    )  # fmt: skip
    emb = theirs.transformer_blocks[0].norm1.emb.state_dict()
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(emb)
    theirs.eval().save_pretrained(tmp_path)
    ours = import_diffusers(tmp_path)
    torch.testing.assert_close(*outputs(ours, theirs), rtol=1e-4, atol=1e-5)
    assert (ours.num_outputs, ours.config.frequency_shift) == (8, 1)
    assert ours.facts.conditions == facts(num_classes=1000).conditions
    assert import_diffusers(tmp_path, frequency_shift=0).config.frequency_shift == 0
    # The names that folders had before 2024, with the default norm_eps of those days.
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"_class_name": "Transformer2DModel", "norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "diffusion_pytorch_model.bin")
    os.remove(tmp_path / WEIGHTS)
    with pytest.warns(UserWarning, match="norm_eps 1e-05; the model here uses 1e-6"):
        assert equal(ours, import_diffusers(tmp_path))


def test_embedders_that_differ_between_blocks_are_refused(randomised, tmp_path):
    export_quietly(tmp_path, randomised())
    os.remove(tmp_path / "speed_engine.json")
    good = load_file(tmp_path / WEIGHTS)
    for name in ("timestep_embedder.linear_2.bias", "class_embedder.embedding_table.weight"):
        key = f"transformer_blocks.2.norm1.emb.{name}"
        save_file({**good, key: good[key] + 1e-7}, tmp_path / WEIGHTS)
        with pytest.raises(ValueError, match=rf"{name} of block 2 differs"):
            import_diffusers(tmp_path)


@pytest.mark.parametrize("num_classes", [0, 1, 10])
def test_other_class_counts_are_warned_of_and_load(randomised, equal, tmp_path, num_classes):
    model = randomised(num_classes=num_classes)
    message = "no unconditional form" if num_classes == 0 else f"null label {num_classes}"
    with pytest.warns(UserWarning, match=message):
        cautions = export_diffusers(tmp_path, model)
    assert len(cautions) == 1
    labels = torch.tensor([0, 0, 0, num_classes if num_classes else 0])
    torch.testing.assert_close(*outputs(model, stock(tmp_path), labels), rtol=1e-4, atol=1e-5)
    again = import_diffusers(tmp_path)
    assert equal(model, again) and again.facts == model.facts


def test_a_model_without_null_label_gets_a_row_and_loses_it_again(randomised, equal, tmp_path):
    model = randomised(null=False)
    with pytest.warns(UserWarning, match="no null label"):
        export_diffusers(tmp_path, model)
    theirs = stock(tmp_path)
    labels = torch.tensor([0, 5, 999, 3])
    torch.testing.assert_close(*outputs(model, theirs, labels), rtol=1e-4, atol=1e-5)
    assert equal(model, import_diffusers(tmp_path))


def test_weights_replace_the_models_own(randomised, equal, tmp_path):
    model, other = randomised(), randomised(seed=5)
    export_quietly(tmp_path, other, weights=dict(model.named_parameters()))
    assert equal(import_diffusers(tmp_path), model)


def test_models_that_diffusers_cannot_hold_are_refused(randomised, tmp_path):
    with pytest.raises(ValueError, match="mlp_ratio 4, not 2"):
        export_diffusers(tmp_path / "a", randomised(SMALL.model_copy(update={"mlp_ratio": 2.0})))
    model = randomised()
    model.pos_embed.add_(0.1)
    with pytest.raises(ValueError, match="position embedding is not sin-cos"):
        export_diffusers(tmp_path / "b", model)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def change_config(**changes):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_weights(change_tensors):
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change_tensors(tensors)
        save_file(tensors, folder / WEIGHTS)

    return change


KEY = "transformer_blocks.1.attn1.to_k.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_config(_class_name="UNet2DModel"), "holds UNet2DModel; only"),
        (change_config(norm_type="ada_norm"), "norm_type ada_norm"),
        (change_config(activation_fn="geglu"), "activation_fn geglu"),
        (change_config(out_channels=5), "5 output channels for 4"),
        (change_config(num_layers=None), "config.json"),
        (change_config(num_layers=2), "DiT of 2 blocks: unknown transformer_blocks.2"),
        (change_config(num_layers=4), "DiT of 4 blocks: transformer_blocks.3.* is missing"),
        (change_config(num_attention_heads=6), "hidden size 24.* but the model is .*48"),
        (change_config(sample_size=10**8), "far larger than the network"),
        (change_config(num_layers=10**12), "of far more parts"),
        (change_config(in_channels=10**12), "output channels for"),
        (change_config(in_channels=10**12, out_channels=None), "in_channels"),
        (change_config(attention_head_dim=10**5), "but the model is"),
        (change_config(patch_size=0), "patch_size"),
        (change_config(num_embeds_ada_norm=999), "table of 1001 rows, .* num_embeds_ada_norm 999"),
        (change_weights(lambda t: t.pop(KEY)), f"{KEY} is missing"),
        (change_weights(lambda t: t.update({KEY: torch.zeros(3)})), "qkv.bias is .51. instead"),
        (change_weights(lambda t: t.update({KEY: t[KEY] / 0})), "NaN or infinite in blocks.1.attn"),
        (lambda folder: os.remove(folder / WEIGHTS), f"{WEIGHTS} is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "JSON file that says nothing"),
        (lambda folder: (folder / "config.json").write_text("[]"), "JSON file that says nothing"),
    ],
)
def test_folders_that_do_not_fit_are_refused(randomised, tmp_path, change, message):
    export_quietly(tmp_path, randomised())
    os.remove(tmp_path / "speed_engine.json")
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        import_diffusers(tmp_path)


@pytest.mark.parametrize(("asked", "wanted"), [(None, (1000, True)), (1001, (1001, False))])
def test_a_table_may_have_no_null_row(randomised, tmp_path, asked, wanted):
    export_quietly(tmp_path, randomised())
    os.remove(tmp_path / "speed_engine.json")
    again = import_diffusers(tmp_path, num_classes=asked)
    told = again.facts.conditions["label"]
    assert (told.num_values, told.null) == wanted
    with pytest.raises(ValueError, match=r"1000 .and a null label. or 1001 classes and not 999"):
        import_diffusers(tmp_path, num_classes=999)


def test_our_own_folder_says_its_classes_and_is_read_as_it_was_written(randomised, equal, tmp_path):
    model = randomised(num_classes=10)
    export_quietly(tmp_path, model)
    assert equal(import_diffusers(tmp_path, num_classes=10), model)
    with pytest.raises(ValueError, match="exported with 10 classes, not 11"):
        import_diffusers(tmp_path, num_classes=11)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[KEY] += 1
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"is damaged: its checksum.*or remove speed_engine\.json"):
        import_diffusers(tmp_path)


def test_a_folder_of_ours_of_the_first_format(randomised, equal, tmp_path):
    model = randomised(num_classes=10, null=False)
    export_quietly(tmp_path, model)
    config = model.config.model_dump(exclude={"attention", "residual", "recompute", "products"})
    first = {
        "config": config | {"label_dropout": 0.0},
        "channels": 4,
        "sample_size": 8,
        "num_classes": 10,
        "learned_variance": True,
    }
    (tmp_path / "speed_engine.json").write_text(json.dumps({"model": first, "cautions": []}))
    again = import_diffusers(tmp_path)
    assert equal(model, again) and again.facts.conditions == model.facts.conditions
    for content in ("3", "[]", "{}", '{"model": 3}', "[" * 100_000, '{"format": 9}'):
        (tmp_path / "speed_engine.json").write_text(content)
        with pytest.raises(ValueError, match=rf"^{tmp_path} "):
            import_diffusers(tmp_path)


def test_networks_that_diffusers_has_no_place_for_are_refused(network, facts, tmp_path):
    vector = ConditionFacts("vector", {"vector": ArrayFacts((3,), "float32")})
    data = facts(channels=4)
    data = data.with_conditions({**data.conditions, "vector": vector})
    told = dit.build(SMALL, data, 8)
    with pytest.raises(ValueError, match=r"no place for the condition 'vector'; .*safetensors"):
        export_diffusers(tmp_path / "a", told)
    with pytest.raises(ValueError, match=r"cannot hold a network of model.kind=Linear; .*safeten"):
        export_diffusers(tmp_path / "a", torch.nn.Linear(2, 2))
    model = network(channels=4)
    model.facts = replace(model.facts, shape=(4, 8, 16))
    with pytest.raises(ValueError, match=r"square images, not samples of 8x16; .*safetensors"):
        export_diffusers(tmp_path / "a", model)
    assert not (tmp_path / "a").exists()


def test_the_pickle_of_an_attacker_is_never_executed(randomised, bomb, tmp_path):
    export_quietly(tmp_path, randomised())
    os.remove(tmp_path / WEIGHTS)
    torch.save({"x": bomb(tmp_path / "executed")}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="more than tensors"):
        import_diffusers(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_position_embedding_is_diffusers(equal):
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    wanted = get_2d_sincos_pos_embed(1152, 16, base_size=16, output_type="pt").float()
    assert torch.equal(dit.position_embedding(1152, 16)[0], wanted)
