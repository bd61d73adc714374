"""The text half of a frozen CLIP (Radford et al., arXiv 2103.00020): prompts to vectors. The only place that loads one.

transformers is an extra: data that are encoded already, training and guidance need none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from speed_engine.data import DataError

INSTALL = "pip install 'speed-engine[text]'"


class Encoded(NamedTuple):
    """Of N texts: pooled float16 [N, W], tokens float16 [N, L, W], and which of them were too long."""

    pooled: np.ndarray
    tokens: np.ndarray
    cut: list[str]


class TextEncoder:
    """A CLIP text model of transformers with its tokenizer, in fp32.

    place: a folder, that of a pipeline of diffusers, or a name on a hub. identity: what an index says of it (a
    folder's own name: an index travels). width: W. length: L, the tokens of a text, 77 in every published CLIP.
    Raises DataError where it cannot be loaded.
    """

    def __init__(self, place: str, device: torch.device | str = "cpu") -> None:
        try:
            from transformers import CLIPTextModel, CLIPTokenizer
        except ImportError as error:
            raise DataError(f"prompts need transformers ({error}); `{INSTALL}`") from None
        folder = Path(place).expanduser()
        where = str(folder) if folder.exists() else place
        loaded: list[Any] = []
        for kind, sub in ((CLIPTextModel, "text_encoder"), (CLIPTokenizer, "tokenizer")):
            inside: dict[str, Any] = {"subfolder": sub} if (folder / sub).is_dir() else {}
            if kind is CLIPTextModel:
                inside |= {"use_safetensors": True, "output_loading_info": True}
            try:
                loaded.append(kind.from_pretrained(where, **inside))
            except (
                Exception
            ) as error:  # a library of many libraries: it raises what each of them raises
                reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". :")
                raise DataError(
                    f"the text encoder {place!r} cannot be loaded ({reason}); give --text-encoder the folder of a "
                    "CLIP with its tokenizer"
                ) from None
        (model, info), self.tokenizer = loaded
        if self.tokenizer.pad_token_id is None:
            raise DataError(
                f"the tokenizer of {place!r} has no padding; give --text-encoder a CLIP's"
            )
        if missing := sorted(info["missing_keys"]):  # transformers goes on with random numbers
            raise DataError(
                f"the text encoder {place!r} lacks {len(missing)} weights ({missing[0]} ...); give --text-encoder the "
                "folder of a whole CLIP"
            )
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = device
        self.identity = folder.resolve().name if folder.exists() else place
        self.width = int(model.config.hidden_size)
        self.length = int(model.config.max_position_embeddings)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Encoded:
        """Texts, one and more, each cut to `length` tokens, its end mark included."""
        # Cut and filled up here: asked for that, a tokenizer changes itself, and several threads share it.
        whole = self.tokenizer(list(texts), verbose=False).input_ids
        cut = [text for text, its in zip(texts, whole, strict=True) if len(its) > self.length]
        rows = [
            [*its[: self.length - 1], its[-1]] if len(its) > self.length else its for its in whole
        ]
        fill = self.tokenizer.pad_token_id
        numbers = torch.tensor([[*its, *[fill] * (self.length - len(its))] for its in rows])
        found = self.model(input_ids=numbers.to(self.device))
        pooled, tokens = (
            each.to(torch.float16).cpu().numpy()
            for each in (found.pooler_output, found.last_hidden_state)
        )
        return Encoded(pooled, tokens, cut)
