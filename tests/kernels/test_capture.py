"""A step captured in a CUDA graph loads no kernel there, and reads the addresses that the capture gave.

The driver refuses to load a module while a stream captures; so whatever a capture launches must have been launched
before. A stand-in for the driver tells, and the interpreter computes what a graph would replay.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from speed_kernels import ahead_of_time

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ahead_of_time.unavailable() is not None, reason="no triton"),
]


def printed(program: str, **environment: str) -> str:
    """What `program` prints in a process of its own."""
    places = [str(Path(__file__).parent), *sys.path]
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places), **environment},
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


STEPS = """
import stand_in, torch
stand_in.install()
from speed_kernels.adamw_ema.layout import Ema
from speed_kernels.adamw_ema.optimizer import AdamWEMA

def captured(bf16):
    masters = [torch.zeros(size) for size in (3, 2048, 4100)]
    copies = [m.bfloat16().requires_grad_() for m in masters] if bf16 else []
    optimizer = AdamWEMA(
        masters, copies=dict(zip(masters, copies)), clip_norm=1.0, ema=(Ema("warmup"), Ema("power"))
    )
    assert optimizer.choice.backend == "triton"
    def step():
        for tensor in copies or masters:
            tensor.grad = torch.zeros_like(tensor)
        optimizer.step()
    for _ in range(3):
        step()
    stand_in.RECORD.launched.clear()
    stand_in.RECORD.capturing = True
    step()
    stand_in.RECORD.capturing = False
    optimizer.refresh()
    print(*[name for name, _, capturing in stand_in.RECORD.launched if capturing])

captured(bf16=True)
captured(bf16=False)
print("loaded in a capture:", [name for name, capturing in stand_in.RECORD.loaded if capturing])
"""


def test_nothing_is_loaded_inside_a_capture() -> None:
    """Norm and update of a list are one launch each, and those of the steps before."""
    step = "square_list_kernel square_total_kernel prepare_kernel update_list_kernel"
    assert printed(STEPS).splitlines() == [step, step, "loaded in a capture: []"]


REPLAYS = """
import torch
from speed_kernels import contract, launch
from speed_kernels.adamw_ema import triton_list
from speed_kernels.adamw_ema.optimizer import AdamWEMA
contract.unavailable = lambda op, backend, device: None

class Graph:
    # Launches of the two kernels over lists, which must not run while they are captured.
    def __init__(self):
        self.capturing, self.launches = False, []
        launch.capturing = lambda device: self.capturing
    def record(self, name):
        kernel = getattr(triton_list, name)
        class Recorded:
            def __getitem__(_, grid):
                def start(*args, **kwargs):
                    if not self.capturing:
                        return kernel[grid](*args, **kwargs)
                    self.launches.append(lambda: kernel[grid](*args, **kwargs))
                return start
        setattr(triton_list, name, Recorded())

graph = Graph()
graph.record("square_list_kernel")
graph.record("update_list_kernel")
sizes = (1, 1057, 64, 2048)

def make():
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(size, generator=generator) for size in sizes]
    return params, AdamWEMA(params, 1e-2, clip_norm=0.0, guard=False, backend="triton")

def give(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)

(params, optimizer), (others, twin) = make(), make()
for step in range(2):
    for each in (params, others):
        give(each, step)
    optimizer.step(), twin.step()
give(params, 2)
graph.capturing = True
optimizer.step()  # prepares the scalars of the third step, and only notes the update
graph.capturing = False
assert len(graph.launches) == 1
give(others, 2)
kept = [param.grad for param in params]
for param in params:  # an eager step with gradients elsewhere leaves the graph's table alone
    param.grad = torch.zeros_like(param)
optimizer._plans[id(optimizer.param_groups[0])].buckets[0].update([p.grad for p in params], torch.zeros(12))
optimizer.refresh()
graph.launches[0]()
twin.step()
for ours, theirs in zip(params, others):
    assert torch.equal(ours, theirs)
print("equal")
"""


def test_a_replay_reads_what_the_capture_saw() -> None:
    assert printed(REPLAYS, TRITON_INTERPRET="1") == "equal"


SETTLED = """
import stand_in, torch
stand_in.install()
from speed_kernels.bias_gelu import triton_gpu as gelu
x, bias = torch.zeros(4, 32), torch.zeros(32)
for dtype in (torch.float32, torch.bfloat16):  # the second is compiled when nothing is compared any more
    gelu.bias_gelu(x.to(dtype), bias.to(dtype))
kernel = gelu.forward_kernel
print(kernel.used_global_vals)
print(len(stand_in.RECORD.loaded), len(stand_in.RECORD.launched))
fresh = type(kernel)(kernel.fn)  # the same kernel with its constants still to be read
assert fresh.cache_key == kernel.cache_key and fresh.used_global_vals
"""


def test_constants_are_compared_once_and_stay_in_the_name():
    """Launches behind the first compare nothing; what is compiled later is cached under the same constants."""
    assert printed(SETTLED).splitlines() == ["{}", "2 2"]
