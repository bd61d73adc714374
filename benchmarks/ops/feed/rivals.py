"""Other loaders over the same samples, as their manuals show them: batches of float32 latents and int64 labels."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.refusals import Unavailable
from benchmarks.ops.feed.tars import SHAPE, bank, labels_of, latents_of

Batches = Iterator[tuple[Tensor, Tensor]]


def webdataset(folder: Path, batch: int) -> Batches:
    """The tars in order, members' bytes by `frombuffer`: the fastest way that webdataset itself has."""
    WebDataset = _module("webdataset").WebDataset
    samples = iter(WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False))
    while group := list(itertools.islice(samples, batch)):
        if len(group) < batch:
            return
        arrays = [np.frombuffer(each["npy"], np.float16, offset=128) for each in group]
        labels = torch.tensor([int(each["cls"]) for each in group])
        yield torch.from_numpy(np.stack(arrays)).view(-1, *SHAPE).float(), labels


def litdata(folder: Path, num: int, batch: int) -> Batches:
    """litdata's own format, shuffled, its own loader without worker processes."""
    module = _module("litdata")
    if not (folder / "index.json").exists():
        from litdata.streaming import Cache  # pyright: ignore[reportMissingImports]

        cache = Cache(str(folder), chunk_bytes="64MB")
        number = np.arange(num)
        latents, labels, stored = bank(), labels_of(number), {}
        for each in number.tolist():
            x = latents_of(number[each : each + 1], latents)[0]
            stored = {"x": torch.from_numpy(x), "label": int(labels[each])}
            cache[each] = stored
        cache.done()
        cache.merge()
    dataset = module.StreamingDataset(str(folder), shuffle=True)
    loader = module.StreamingDataLoader(dataset, batch_size=batch, num_workers=0, drop_last=True)
    for each in loader:
        yield each["x"].float(), each["label"]


def mosaicml(folder: Path, num: int, batch: int) -> Batches:
    """MosaicML's MDS, shuffled, torch's loader without worker processes."""
    module = _module("streaming")
    if not folder.exists():
        columns = {"x": "ndarray:float16:" + ",".join(map(str, SHAPE)), "label": "int"}
        number = np.arange(num)
        latents, labels = bank(), labels_of(number)
        with module.MDSWriter(out=str(folder), columns=columns) as writer:
            for each in number.tolist():
                x = latents_of(number[each : each + 1], latents)[0]
                writer.write({"x": x, "label": int(labels[each])})
    dataset = module.StreamingDataset(local=str(folder), shuffle=True, batch_size=batch)
    loader = torch.utils.data.DataLoader(dataset, batch_size=batch, drop_last=True)
    for each in loader:
        yield each["x"].float(), each["label"]


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # rivals' own imports fail in many ways
        raise Unavailable(f"{name} cannot be imported ({str(error).splitlines()[0]})") from None
