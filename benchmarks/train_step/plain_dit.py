"""A DiT (W. Peebles and S. Xie 2023) as public trainers write it: the rivals' model in the training-step benchmark.

Everything is plain: LayerNorm, then modulate; every block has an adaLN of its own with its own SiLU; q, k and v are
transposed to heads before torch's attention; the table of time frequencies is made on the host at every call. Names and
shapes of the parameters are those of the public checkpoints, and so of `speed_engine.models.dit`: one set of weights
fits both.
"""

# Shape suffixes: B samples, C channels (C' of the output), T tokens, D hidden size, N heads, K size of a head, P patch.

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speed_engine.models.dit import Size, position_embedding

NUM_FREQUENCIES = 128
MAX_PERIOD = 10_000.0


def modulate(x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """Scale and shift every token of a sample alike."""
    return x_BTD * (1 + scale_BD.unsqueeze(1)) + shift_BD.unsqueeze(1)


class TimeEmbedder(nn.Module):
    """Time [B] -> [B, D]: cosines and sines of it, then an MLP."""

    def __init__(self, hidden_size: int, upload: bool) -> None:
        super().__init__()
        self.upload = upload
        first = nn.Linear(2 * NUM_FREQUENCIES, hidden_size)
        self.mlp = nn.Sequential(first, nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t_B: Tensor) -> Tensor:
        place = torch.device("cpu") if self.upload else t_B.device
        index_F = torch.arange(NUM_FREQUENCIES, dtype=torch.float32, device=place)
        frequency_F = torch.exp(-math.log(MAX_PERIOD) * index_F / NUM_FREQUENCIES).to(t_B.device)
        angle_BF = t_B[:, None].float() * frequency_F[None]
        return self.mlp(torch.cat([torch.cos(angle_BF), torch.sin(angle_BF)], dim=-1))


class Attention(nn.Module):
    """Self-attention in the usual form, each of q, k, v [B, N, T, K]."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        batch, tokens, width = x_BTD.shape
        qkv = self.qkv(x_BTD).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q_BNTK, k_BNTK, v_BNTK = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out_BNTK = F.scaled_dot_product_attention(q_BNTK, k_BNTK, v_BNTK)
        return self.proj(out_BNTK.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x_BTD)))


def adaln(hidden_size: int, num_outputs: int) -> nn.Sequential:
    """Conditioning [B, D] -> shifts, scales and gates, with a SiLU of its own."""
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, num_outputs * hidden_size))


def plain_norm(hidden_size: int) -> nn.LayerNorm:
    return nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)


class Block(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = plain_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = plain_norm(hidden_size)
        self.mlp = Mlp(hidden_size)
        self.adaLN_modulation = adaln(hidden_size, 6)

    def forward(self, x_BTD: Tensor, c_BD: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c_BD).chunk(6, 1)
        attended = self.attn(modulate(self.norm1(x_BTD), shift_a, scale_a))
        x_BTD = x_BTD + gate_a.unsqueeze(1) * attended
        return x_BTD + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x_BTD), shift_m, scale_m))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, num_outputs: int) -> None:
        super().__init__()
        self.norm_final = plain_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, num_outputs)
        self.adaLN_modulation = adaln(hidden_size, 2)

    def forward(self, x_BTD: Tensor, c_BD: Tensor) -> Tensor:
        shift_BD, scale_BD = self.adaLN_modulation(c_BD).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x_BTD), shift_BD, scale_BD))


class PlainDiT(nn.Module):
    """Noisy latents [B, C, H, W], t_B and labels_B int64 -> [B, 2C, H, W].

    label_dropout: share of labels that the network itself drops, 0 while losses are compared. upload: make the time
    frequencies on the host at every call, as public code does.
    """

    def __init__(
        self, size: Size, channels: int, sample_size: int, num_classes: int, upload: bool
    ) -> None:
        super().__init__()
        width, depth, num_heads, patch = size
        self.patch, self.grid, self.num_outputs = patch, sample_size // patch, 2 * channels
        self.num_classes, self.label_dropout = num_classes, 0.0
        projection = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.x_embedder = nn.Sequential(OrderedDict(proj=projection))
        self.t_embedder = TimeEmbedder(width, upload)
        table = nn.Embedding(num_classes + 1, width)
        self.y_embedder = nn.Sequential(OrderedDict(embedding_table=table))
        self.pos_embed = nn.Buffer(torch.empty(1, self.grid**2, width))
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch**2 * self.num_outputs)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor) -> Tensor:
        if self.label_dropout > 0:
            drop_B = torch.rand(labels_B.shape[0], device=labels_B.device) < self.label_dropout
            labels_B = torch.where(drop_B, self.num_classes, labels_B)
        x_BTD = self.x_embedder(x_BCHW).flatten(2).transpose(1, 2) + self.pos_embed
        c_BD = self.t_embedder(t_B) + self.y_embedder(labels_B)
        for block in self.blocks:
            x_BTD = block(x_BTD, c_BD)
        return self.unpatchify(self.final_layer(x_BTD, c_BD))

    def unpatchify(self, x_BTX: Tensor) -> Tensor:
        """Tokens [B, T, P * P * C'] -> images [B, C', H, W]."""
        grid, patch = self.grid, self.patch
        x = x_BTX.reshape(-1, grid, grid, patch, patch, self.num_outputs)
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(-1, self.num_outputs, grid * patch, grid * patch)


def build(
    size: Size,
    weights: dict[str, Tensor],
    *,
    channels: int,
    sample_size: int,
    num_classes: int,
    upload: bool,
) -> PlainDiT:
    """A network whose parameters ARE `weights` (name -> tensor, by no copy): many networks may share one memory."""
    with torch.device("meta"):
        model = PlainDiT(size, channels, sample_size, num_classes, upload)
    device = next(iter(weights.values())).device
    places = position_embedding(size.hidden_size, model.grid).to(device)
    model.load_state_dict({**weights, "pos_embed": places}, assign=True)
    return model


def shapes(
    size: Size, *, channels: int, sample_size: int, num_classes: int
) -> dict[str, torch.Size]:
    """Name -> shape of all trained tensors, in the network's own order; nothing is allocated."""
    with torch.device("meta"):
        model = PlainDiT(size, channels, sample_size, num_classes, False)
    return {name: parameter.shape for name, parameter in model.named_parameters()}
