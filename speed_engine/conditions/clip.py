"""A frozen CLIP (Radford et al., arXiv 2103.00020): its text half makes vectors of prompts, the whole one says how well
a picture fits one. The only place that loads either.

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


def _identity(place: str) -> str:
    folder = Path(place).expanduser()
    return folder.resolve().name if folder.exists() else place


def _loaded(place: str, model_kind: Any, tokenizer_kind: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder, of a pipeline's folder, or of a hub. Raises DataError."""
    folder = Path(place).expanduser()
    where = str(folder) if folder.exists() else place
    loaded: list[Any] = []
    for kind, sub in ((model_kind, "text_encoder"), (tokenizer_kind, "tokenizer")):
        inside: dict[str, Any] = {"subfolder": sub} if (folder / sub).is_dir() else {}
        if kind is model_kind:
            inside |= {"use_safetensors": True, "output_loading_info": True}
        try:
            loaded.append(kind.from_pretrained(where, **inside))
        except (
            Exception
        ) as error:  # a library of many libraries: it raises what each of them raises
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". :")
            raise DataError(
                f"the CLIP {place!r} cannot be loaded ({reason}); give the folder of one with its tokenizer"
            ) from None
    (model, info), tokenizer = loaded
    if missing := sorted(info["missing_keys"]):  # transformers goes on with random numbers
        raise DataError(
            f"the CLIP {place!r} lacks {len(missing)} weights ({missing[0]} ...); give the folder of a whole one"
        )
    if tokenizer.pad_token_id is None:
        raise DataError(f"the tokenizer of {place!r} has no padding; give a CLIP's")
    return model, tokenizer


def _numbers(tokenizer: Any, texts: Sequence[str], length: int) -> tuple[torch.Tensor, list[str]]:
    """(int64 [N, length], the texts that were cut)."""
    # Cut and filled up here: asked for that, a tokenizer changes itself, and several threads share it.
    whole = tokenizer(list(texts), verbose=False).input_ids
    cut = [text for text, its in zip(texts, whole, strict=True) if len(its) > length]
    rows = [[*its[: length - 1], its[-1]] if len(its) > length else its for its in whole]
    fill = tokenizer.pad_token_id
    return torch.tensor([[*its, *[fill] * (length - len(its))] for its in rows]), cut


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
        model, self.tokenizer = _loaded(place, CLIPTextModel, CLIPTokenizer)
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = device
        self.identity = _identity(place)
        self.width = int(model.config.hidden_size)
        self.length = int(model.config.max_position_embeddings)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Encoded:
        """Texts, one and more, each cut to `length` tokens, its end mark included."""
        numbers, cut = _numbers(self.tokenizer, texts, self.length)
        found = self.model(input_ids=numbers.to(self.device))
        pooled, tokens = (
            each.to(torch.float16).cpu().numpy()
            for each in (found.pooler_output, found.last_hidden_state)
        )
        return Encoded(pooled, tokens, cut)


# What every published CLIP was trained on: mean and deviation of its pictures' channels.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Likeness:
    """A whole CLIP of transformers, in fp32; place and identity as of `TextEncoder`."""

    def __init__(self, place: str, device: torch.device | str = "cpu") -> None:
        try:
            from transformers import CLIPModel, CLIPTokenizer
        except ImportError as error:
            raise DataError(f"the CLIP score needs transformers ({error}); `{INSTALL}`") from None
        model, self.tokenizer = _loaded(place, CLIPModel, CLIPTokenizer)
        self.model = model.to(device).eval().requires_grad_(False)
        self.device, self.identity = device, _identity(place)
        self.size = int(model.config.vision_config.image_size)
        self.length = int(model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def cosines(self, pixels_BHWC: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """uint8 [B, H, W, 1 or 3] squares and a text each -> the cosine of their vectors, float32 [B]."""
        from PIL import Image

        size = (self.size, self.size)
        pictures = [
            Image.fromarray(each.squeeze(2) if each.shape[2] == 1 else each).convert("RGB")
            for each in pixels_BHWC
        ]
        resized = [np.asarray(each.resize(size, Image.Resampling.BICUBIC)) for each in pictures]
        x = torch.from_numpy(np.stack(resized)).float() / 255
        x = ((x - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
        numbers, _ = _numbers(self.tokenizer, texts, self.length)
        found = self.model(
            input_ids=numbers.to(self.device), pixel_values=x.contiguous().to(self.device)
        )
        cosine_B = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
        return cosine_B.cpu().numpy()
