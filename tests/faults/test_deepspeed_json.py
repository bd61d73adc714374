"""A DeepSpeed JSON of the user's: merged, refused where it contradicts, and part of what a run is."""

import json

import pytest

from speed_engine.config import load
from speed_engine.engines.deepspeed_json import merged_with, users_part
from speed_engine.training.manifest import run_folder

OURS = {
    "train_batch_size": 8,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 1},
    "bf16": {"enabled": False},
}


@pytest.fixture
def written(tmp_path):
    """written(settings) -> the path of a JSON that holds them."""

    def write(settings, name: str = "ds.json") -> str:
        (tmp_path / name).write_text(json.dumps(settings))
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gradient_clipping": 1.0}, ["gradient_clipping = 1.0", "optim.clip"]),
        ({"zero_optimisation": {}}, ["zero_optimisation", "did you mean 'zero_optimization'"]),
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage = 3", "engine.zero"]),
        ({"zero_optimization": 1}, ["zero_optimization", "object of settings"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer", "section optim"]),
        ({"train_batch_size": 64}, ["train_batch_size = 64", "train.global_batch"]),
        ({"fp16": {"enabled": True}}, ["fp16", "engine.precision=bf16"]),
        ({"fp16": {"loss_scale": 0}}, ["fp16", "engine.precision=bf16"]),
        ([], ["one JSON object"]),
        # What says in which type something is computed or kept.
        (
            {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
            ["torch_autocast", "autocast"],
        ),
        ({"torch_autocast": {"dtype": "bfloat16"}}, ["torch_autocast"]),
        ({"bfloat16": {"enabled": True}}, ["bfloat16", "engine.precision"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled", "engine.precision"]),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, ["bf16_master_weights_and_grads"]),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}},
            ["grad_accum_dtype", "engine.precision=fp32"],
        ),
        ({"data_types": {"param_dtype": "fp16"}}, ["data_types.param_dtype"]),
        ({"data_types": {"keep_in_fp32_modules": ["norm"]}}, ["keep_in_fp32_modules"]),
        ({"communication_data_type": "fp16"}, ["communication_data_type", "engine.precision"]),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            ["offloads the optimizer", '"zero_force_ds_cpu_optimizer": false'],
        ),
    ],
)
def test_it_may_not_contradict(written, settings, words):
    with pytest.raises(ValueError) as caught:
        merged_with(written(settings), OURS)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16}},
        {"fp16": {"enabled": "auto"}, "torch_autocast": {"enabled": False, "dtype": "bfloat16"}},
        {"amp": {}, "optimizer": None},
        {"data_types": {"grad_accum_dtype": None}, "communication_data_type": "fp32"},
    ],
)
def test_what_is_turned_off_contradicts_nothing(written, settings):
    merged = merged_with(written(settings), OURS)
    assert not {"fp16", "torch_autocast", "amp", "optimizer"} & merged.keys()
    assert {key: merged[key] for key in OURS} == OURS


def test_gradients_may_be_summed_in_bf16_where_it_is_the_precision(written):
    path = written({"communication_data_type": "bf16", "data_types": {"grad_accum_dtype": "fp32"}})
    merged = merged_with(path, {**OURS, "bf16": {"enabled": True}})
    assert merged["communication_data_type"] == "bf16"


def test_it_is_merged(written):
    theirs = {"zero_optimization": {"reduce_bucket_size": 1000}, "train_batch_size": "auto"}
    ours = {"train_batch_size": 8, "zero_optimization": {"stage": 1}}
    assert merged_with(written(theirs), ours) == {
        "train_batch_size": 8,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000},
    }
    with pytest.raises(ValueError, match=r"nowhere\.json"):
        merged_with("nowhere.json", ours)


def test_the_users_part_is_what_makes_another_run():
    settings = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000},
        "bf16": {"enabled": False},
        "wall_clock_breakdown": True,
        "steps_per_print": 5,
    }
    assert users_part(settings) == {"zero_optimization": {"reduce_bucket_size": 1000}}
    assert users_part({}) == {}


def test_by_default_other_words_are_another_folder(written):
    bucket = {"zero_optimization": {"reduce_bucket_size": 1000}}
    same = [written(bucket, "first.json"), written({**bucket, "dump_state": True}, "second.json")]
    other = written({"zero_optimization": {"reduce_bucket_size": 2000}}, "third.json")

    def folder(*overrides: str) -> str:
        return str(run_folder(load("digits_dit_tiny", overrides), "data"))

    first, second = (folder(f"engine.json_file={path}") for path in same)
    assert first == second
    assert len({first, folder(f"engine.json_file={other}"), folder()}) == 3
