"""The tree of sums: its order, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from speed_engine import config as configuration
from speed_engine.distributed import Processes
from speed_engine.engines.exact_sums import TreeSums, in_tree_order, refuse_what_has_no_tree
from speed_engine.engines.master_weights import Masters
from speed_engine.training import assembly

LEAVES = 16


def tree(values: list[Tensor]) -> Tensor:
    """The definition: leaves whose numbers differ in the highest bit first."""
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return tree([values[n] + values[n + half] for n in range(half)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [1, 2, 4, 16])
def test_every_split_adds_in_the_same_order(world: int, dtype: torch.dtype) -> None:
    """What the processes of a world sum by themselves, summed as they sum it with each other."""
    torch.manual_seed(0)
    leaves = [(torch.randn(7) * torch.randn(7).mul(5).exp()).to(dtype) for _ in range(LEAVES)]
    subtrees = []
    for rank in range(world):
        model = nn.Linear(7, 1, bias=False)
        sums = TreeSums(Masters(model, dtype), Processes(rank, world, rank, torch.device("cpu")))
        found: list[Tensor] = []
        for twice in range(2):  # a second step uses the buffers of the first
            for leaf in in_tree_order(leaves[rank::world]):
                model.weight.grad = (leaf * (2 - twice)).view(1, 7).clone()
                sums.add()
            found.append(sums.local().clone())
            sums.forget()
        subtrees.append(found[-1])
    expected = tree([leaf.float() for leaf in leaves])
    assert torch.equal(tree(subtrees), expected)
    in_a_row = sum((leaf.float() for leaf in leaves), torch.zeros(7))
    assert not torch.equal(in_a_row, expected), "this test could not fail"


def test_alone_the_sum_is_the_gradient() -> None:
    model = nn.Linear(3, 1)
    sums = TreeSums(Masters(model, torch.float32), Processes(0, 1, 0, torch.device("cpu")))
    for _ in range(2):
        model.weight.grad = torch.ones_like(model.weight)
        sums.add()
    sums.finish()
    assert model.weight.grad is not None and model.bias.grad is not None
    assert model.weight.grad.tolist() == [[2.0] * 3] and model.bias.grad.tolist() == [0.0]


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((16, None, 1), "set train.micro_batch"),
        ((24, 2, 1), "not 1 and 12"),
        ((18, 3, 3), "not 3 and 6"),
    ],
)
def test_no_tree(numbers: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        refuse_what_has_no_tree(*numbers)
    refuse_what_has_no_tree(32, 4, 8)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("engine.kind=deepspeed", "set engine.kind=torch"),
        ("timesteps.kind=infonoise", "choose a kind that does not learn"),
        ("engine.cuda_graph=true", "set engine.cuda_graph=false"),
    ],
)
def test_where_the_word_could_not_be_kept(tmp_path, override: str, words: str) -> None:
    base = {
        "engine.kind": "torch",
        "data.path": tmp_path,
        "model.depth": 1,
        "train.micro_batch": 64,
    }
    base |= dict([override.split("=")])
    settings = [f"{key}={value}" for key, value in base.items()]
    config = configuration.load("digits_dit_tiny", [*settings, "train.exact_sums=true"])
    with pytest.raises(ValueError, match=words):
        assembly.build(config, Processes(0, 1, 0, torch.device("cpu")))
