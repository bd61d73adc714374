"""`encode --captions`: what is said of each picture, encoded by a frozen CLIP, beside it; see `conditions.text`.
With `--texts-only` the captions alone lie there, and training encodes those that it reads.

Captions are COCO's JSON (`captions_*.json`: `images` with `id` and `file_name`, `annotations` with `image_id` and
`caption`), or the .txt beside the images of WebDataset tars. All captions of a picture are kept; pictures without one
are left out, and said.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speed_engine.conditions import text
from speed_engine.conditions.clip import TextEncoder
from speed_engine.data import DataError
from speed_engine.data.encode_set import Fault, Sample, Source
from speed_engine.data.storage.folders import shown
from speed_engine.data.storage.index import StoredCondition
from speed_engine.data.storage.pictures import Listing
from speed_engine.data.storage.shard_writer import sample_bytes

NAME = "text"
AT_A_TIME = 64  # pictures whose captions are encoded together
KNOWN = 10_000  # captions whose vectors are remembered: many sets say the same of many pictures


def read_coco(file: Path) -> tuple[dict[str, list[str]], int]:
    """(captions by file name, annotations that say nothing or belong to no picture of the file). Raises DataError."""
    try:
        found = json.loads(file.read_bytes())
        names = {each["id"]: str(each["file_name"]) for each in found["images"]}
        said = [(each["image_id"], str(each["caption"])) for each in found["annotations"]]
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); check --captions") from None
    except (ValueError, RecursionError):
        raise DataError(f"{file} is no JSON; give --captions COCO's captions_*.json") from None
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{file} is not COCO's captions: `images` of id and file_name and `annotations` of image_id and caption "
            f"are expected ({type(error).__name__}: {error}); give captions_*.json, not instances_*.json"
        ) from None
    captions: dict[str, list[str]] = {}
    lost = 0
    for number, caption in said:
        words = " ".join(caption.split())
        if not words or number not in names:
            lost += 1
        else:
            captions.setdefault(names[number], []).append(words)
    return captions, lost


def with_captions(listing: Listing, place: Path, file: Path | None) -> Listing:
    """The pictures that have a caption, with all of theirs; the others are told. Raises DataError where none has one.

    file: COCO's JSON, whose file names are paths below `place` or the last part of them; None: those of the tars.
    """
    captions, remarks = dict(listing.captions), list(listing.remarks)
    if file is not None:
        named, lost = read_coco(file.expanduser())
        if lost:
            remarks.append(f"{file.name}: {lost} captions are empty or of no picture in it")
        by_path = {
            picture.path: next((each for each in _names(picture.path) if each in named), None)
            for picture in listing.pictures
        }
        captions = {path: named[name] for path, name in by_path.items() if name is not None}
        if missing := sorted(named.keys() - set(by_path.values())):
            remarks.append(
                f"{file.name}: {len(missing)} pictures that it has captions of are not in {place} (the first: "
                f"{missing[0]})"
            )
    pictures = [each for each in listing.pictures if each.path in captions]
    without = [each.path for each in listing.pictures if each.path not in captions]
    if not pictures:
        cure = (
            f"{file} names other pictures (the first here: {shown(without[0])})"
            if file
            else "give --captions FILE, or tars with a .txt beside each image"
        )
        raise DataError(f"no picture in {place} has a caption; {cure}")
    if without:
        remarks.append(
            f"{len(without)} pictures have no caption, and are left out (the first: {shown(without[0])})"
        )
    others = [*listing.others, *((shown(path), "it has no caption") for path in without)]
    return replace(listing, pictures=pictures, others=others, remarks=remarks, captions=captions)


def _names(path: str) -> Iterator[str]:
    """What a caption's file may call the picture, the whole path first."""
    parts = path.split("/")
    return ("/".join(parts[first:]) for first in range(len(parts)))


def plan(
    listing: Listing, text_encoder: str | None, pooled_only: bool, texts_only: bool
) -> dict[str, Any]:
    """What decides the captions of a set, for `Job.plan`."""
    if text_encoder is None:
        return {}
    each = [listing.captions[picture.path] for picture in listing.pictures]
    digest = hashlib.sha256(json.dumps([list(its) for its in each]).encode()).hexdigest()
    found = {"captions": digest, "text_encoder": text_encoder, "pooled_only": pooled_only}
    return found | ({"texts_only": True} if texts_only else {})


def told(
    source: Source, listing: Listing, encoder: TextEncoder, tokens: bool, vectors: bool, cores: int
) -> Source:
    """The source with its pictures' captions. tokens: one vector a token, too. vectors: store them, not the captions
    alone. cores: of this process."""
    said = [list(listing.captions[picture.path]) for picture in listing.pictures]
    texts = ["\n".join(each).encode() for each in said]
    most, width = max(map(len, said)), max(map(len, texts))
    keys = [NAME, f"{NAME}_tokens"] if tokens else [NAME]
    one = encoder.encode([""])
    empty = dict(zip(keys, (one.pooled[0], one.tokens[0]), strict=False))
    facts = text.described(encoder.identity, most, empty, width, stored=vectors)
    keys = keys if vectors else []

    def arrays(sample: Sample, encoded: Callable[[str], Sequence[np.ndarray]]) -> Sample:
        captions = said[sample.item]
        made = {key: np.zeros(facts.arrays[key].shape, "f2") for key in keys}
        for row, caption in enumerate(captions):
            for key, vector in zip(keys, encoded(caption) if keys else (), strict=False):
                made[key][row] = vector
        written = np.zeros(width, np.uint8)
        written[: len(texts[sample.item])] = np.frombuffer(texts[sample.item], np.uint8)
        made[f"{NAME}_count"] = np.array(len(captions), np.int32)
        made[f"{NAME}_utf8"] = written
        return sample._replace(arrays={**sample.arrays, **made})

    def items(numbers: range) -> Iterator[Sample | Fault]:
        known: dict[str, Sequence[np.ndarray]] = {}

        def finished(some: Sequence[Sample | Fault]) -> Iterator[Sample | Fault]:
            samples = [each for each in some if isinstance(each, Sample)]
            wanted = dict.fromkeys(
                caption for each in samples if keys for caption in said[each.item]
            )
            if len(known) > KNOWN:
                known.clear()
            new = [caption for caption in wanted if caption not in known]
            known.update(zip(new, _encoded(encoder, new, cores), strict=True))
            for each in some:
                yield arrays(each, known.__getitem__) if isinstance(each, Sample) else each

        some: list[Sample | Fault] = []
        for each in source.items(numbers):
            some.append(each)
            if len(some) == AT_A_TIME:
                yield from finished(some)
                some = []
        yield from finished(some)

    sizes = [
        int(np.prod(each.shape)) * np.dtype(each.dtype).itemsize for each in facts.arrays.values()
    ]
    also = f"; {sum(map(len, said))} captions, up to {most} a picture, by {encoder.identity}"
    stored = StoredCondition(kind="text", arrays=list(facts.arrays), details=dict(facts.details))
    return replace(
        source,
        items=items,
        said=f"{source.said}{also}",
        sample_bytes=source.sample_bytes + sample_bytes(*sizes, label=False),
        conditions={**source.conditions, NAME: stored},
    )


def _encoded(
    encoder: TextEncoder, texts: Sequence[str], cores: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(pooled, tokens) of each text, with the same bits whatever the number of processes.

    On a CPU the number of threads inside an operation decides the order of sums, so there it is one thread a text.
    """
    if not texts:
        return []
    if torch.device(encoder.device).type != "cpu":
        found = encoder.encode(texts)
        return list(zip(found.pooled, found.tokens, strict=True))

    def alone(caption: str) -> tuple[np.ndarray, np.ndarray]:
        one = encoder.encode([caption])
        return one.pooled[0], one.tokens[0]

    before = torch.get_num_threads()
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            return list(pool.map(alone, texts))
        finally:
            torch.set_num_threads(before)
