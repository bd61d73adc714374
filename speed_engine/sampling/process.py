"""From a trained network to samples: DDPM, DDIM and DPM-Solver++ with classifier-free guidance.

The noise of sample i is addressed, not streamed: it depends on (seed, sample number i, sampler
step) alone, so a sample is the same in any batch, on any device and after any interruption.
Few-step sampling works on a *respaced* process (Nichol and Dhariwal, arXiv 2102.09672, section 4):
the S kept time steps of the T form a diffusion of their own, on which every step is "t -> t - 1".
Any schedule x_t = alpha x0 + sigma eps is sampled as a variance-preserving one, x_t / sqrt(alpha^2
+ sigma^2), and any objective through the x0 it predicts. DDIM and DPM-Solver++ are diffusers'
schedulers on that process. Pictures on disk are the business of sample_folder.py.

Shapes: N samples, B batch, C channels, H height, W width, T training steps, S sampler steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from speed_kernels import philox
from torch import Tensor

from speed_engine.objectives import Objective
from speed_engine.schedules import Schedule

# (x_BCHW, tau_B, labels_B or None) -> prediction [B, C or 2C, H, W]; an nn.Module in eval mode
Model = Callable[[Tensor, Tensor, Tensor | None], Tensor]
SamplerName = Literal["ddpm", "ddim", "dpm++"]
Spacing = Literal["auto", "linspace", "leading", "trailing"]

# Where alpha is nearly 0 an epsilon model's error is magnified by sigma / alpha in x0 (20,000 times
# at the end of the cosine schedule). An ODE solver must not start there; DPM-Solver's own cure is
# to start at ln(alpha / sigma) = -5.1, which is this magnification.
LARGEST_MAGNIFICATION = math.exp(5.1)


@dataclass(frozen=True, eq=False)
class Process:
    """What the network was trained on, and for.

    null_label: the label of "no class", None if the network has not learned one.
    """

    schedule: Schedule
    objective: Objective
    learned_variance: bool
    shape: tuple[int, int, int]  # C, H, W
    num_classes: int = 0
    null_label: int | None = None

    @property
    def norm(self) -> np.ndarray:
        """sqrt(alpha^2 + sigma^2), the scale of x_t against the variance-preserving one; [T]."""
        return np.hypot(self.schedule.alpha.numpy(), self.schedule.sigma.numpy())

    @property
    def alpha_bar(self) -> np.ndarray:
        """alpha_bar of the variance-preserving process that x_t / norm follows; float64 [T]."""
        return (self.schedule.alpha.numpy() / self.norm) ** 2


@dataclass(frozen=True)
class Recipe:
    """What the user chooses; together with the weights it decides every pixel.

    guidance: 1 = off; w > 1 gives null + w * (class - null). guidance_channels: "all", or the
    number of leading channels that are guided (3 reproduces the released DiT and GLIDE samplers,
    which leave the fourth latent channel unguided). spacing: which S of the T steps; auto =
    linspace for ddpm (as in ADM and DiT, holds the first and the last step) and trailing for ddim
    and dpm++ (starts at pure noise, arXiv 2305.08891, table 2); leading is the original DDIM's.
    clip_x0: clamp each prediction of x0 to [-1, 1]; for pixels, not for latents.
    """

    sampler: SamplerName = "ddpm"
    steps: int = 250
    spacing: Spacing = "auto"
    guidance: float = 1.0
    guidance_channels: int | Literal["all"] = "all"
    clip_x0: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sampler not in get_args(SamplerName):
            raise ValueError(
                f"there is no sampler {self.sampler!r}; choose one of {get_args(SamplerName)}"
            )
        if self.spacing not in get_args(Spacing):
            raise ValueError(
                f"there is no spacing {self.spacing!r}; choose one of {get_args(Spacing)}"
            )
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ValueError(f"guidance must be a number from 0 up, not {self.guidance}")
        if self.guidance_channels != "all" and self.guidance == 1:
            raise ValueError("guidance_channels has no effect at guidance 1; leave it at 'all'")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, not {self.seed}")


def check(process: Process, recipe: Recipe, labels_N: Tensor | None) -> None:
    """Raise ValueError, in one sentence, where the three contradict each other."""
    if recipe.guidance != 1 and process.num_classes == 0:
        raise ValueError("guidance needs a class-conditional model; for this one use guidance 1")
    if recipe.guidance != 1 and process.null_label is None:
        raise ValueError("guidance needs a null label; train with label dropping or use 1")
    if recipe.guidance != 1 and labels_N is None:
        raise ValueError("guidance needs labels to guide towards; give labels or use guidance 1")
    if labels_N is None and process.num_classes and process.null_label is None:
        raise ValueError("this model has no null label; give labels")
    if labels_N is not None and process.num_classes == 0:
        raise ValueError("this model is unconditional; leave the labels out")
    if labels_N is not None and len(labels_N):
        low, high = int(labels_N.min()), int(labels_N.max())
        if low < 0 or high >= process.num_classes:
            wrong, last = low if low < 0 else high, process.num_classes - 1
            raise ValueError(f"label {wrong} is not a class; give labels from 0 to {last}")
    channels = process.shape[0]
    if recipe.guidance_channels != "all" and not 1 <= recipe.guidance_channels <= channels:
        raise ValueError(
            f"guidance_channels={recipe.guidance_channels} must be 'all' or from 1 to {channels}"
        )
    kept_steps(process, recipe)


def kept_steps(process: Process, recipe: Recipe) -> np.ndarray:
    """The S training steps that the sampler visits, ascending, int64. Raises ValueError for S > T.

    Steps from which x0 cannot be told are left out: for ODE samplers where the network's error
    would be magnified more than LARGEST_MAGNIFICATION times (an epsilon model at the end of the
    cosine schedule; no step of the linear one), for ddpm only where it is infinite.
    """
    magnification = process.objective.x0_columns(process.schedule)[0].abs().numpy()
    limit = np.finfo(np.float64).max if recipe.sampler == "ddpm" else LARGEST_MAGNIFICATION
    num, steps = int(np.sum(magnification <= limit)), recipe.steps
    if steps > num:
        raise ValueError(f"steps={steps} is more than the {num} time steps there are; give fewer")
    spacing = recipe.spacing
    if spacing == "auto":
        spacing = "linspace" if recipe.sampler == "ddpm" else "trailing"
    if spacing == "leading":
        kept = np.arange(steps) * (num // steps)
    elif spacing == "linspace" and steps > 1:
        kept = np.linspace(0, num - 1, steps).round()
    else:
        kept = np.sort(np.round(num - np.arange(steps) * (num / steps)) - 1)
    return kept.astype(np.int64)


def ancestral_step(
    x: Tensor,
    x0: Tensor,
    fraction: Tensor | None,
    noise: Tensor | None,
    alpha_bar: float,
    alpha_bar_previous: float,
) -> Tensor:
    """One step x_t -> x_{t-1} of the learned-variance sampler.

    Mean: arXiv 2006.11239, eq. 7; log variance: arXiv 2102.09672, eq. 15.
    fraction: (v + 1) / 2, the network's place between the posterior variance (0) and beta (1), in
    log; None takes the posterior variance. noise: None on the last step (alpha_bar_previous = 1),
    which adds none.

    Why not DDPMScheduler.step: it draws its noise from a stream, which ties a sample to its batch;
    it keeps its table in float32, where 1 - alpha_bar_t / alpha_bar_{t-1} is off by up to 4e-4 at
    the small t; and it decides by "t > 0" whether to add noise, so a respaced chain that does not
    end at t = 0 ends with noise. Apart from that the two agree to 1e-12, which a test checks.
    """
    beta = 1 - alpha_bar / alpha_bar_previous
    to_x0 = math.sqrt(alpha_bar_previous) * beta / (1 - alpha_bar)
    to_x = math.sqrt(1 - beta) * (1 - alpha_bar_previous) / (1 - alpha_bar)
    mean = to_x0 * x0 + to_x * x
    if noise is None:
        return mean
    log_max = math.log(beta)
    log_min = math.log(beta * (1 - alpha_bar_previous) / (1 - alpha_bar))
    if fraction is None:
        return mean + math.exp(0.5 * log_min) * noise
    return mean + torch.exp(0.5 * (fraction * log_max + (1 - fraction) * log_min)) * noise


def guided(out_class: Tensor, out_null: Tensor, guidance: float, num_guided: int) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598) on the first `num_guided` channels.

    The other channels (the learned variance, and what `guidance_channels` leaves out) keep the
    class's output.
    """
    c, n = out_class[:, :num_guided], out_null[:, :num_guided]
    return torch.cat([n + guidance * (c - n), out_class[:, num_guided:]], dim=1)


def _predict(
    model: Model,
    process: Process,
    recipe: Recipe,
    inputs: Tensor,
    tau: float,
    labels_B: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The network's (guided) prediction, and its variance fraction in float32 or float64."""
    batch, channels, device = len(inputs), process.shape[0], inputs.device
    if labels_B is None and process.num_classes:
        assert process.null_label is not None
        labels_B = torch.full((batch,), process.null_label, dtype=torch.int64, device=device)
    doubled = recipe.guidance != 1
    if doubled:  # one call on [x, x] is faster than two calls
        assert labels_B is not None and process.null_label is not None
        inputs = torch.cat([inputs, inputs])
        labels_B = torch.cat([labels_B, torch.full_like(labels_B, process.null_label)])
    tau_B = torch.full((len(inputs),), tau, dtype=torch.float32, device=device)
    out = model(inputs, tau_B, labels_B)
    out = out.to(torch.promote_types(out.dtype, torch.float32))
    if out.shape[1] != channels * (2 if process.learned_variance else 1):
        raise ValueError(
            f"the model returns {out.shape[1]} channels for {channels} with learned_variance="
            f"{process.learned_variance}; sample with the settings it was trained with"
        )
    if doubled:
        num_guided = channels if recipe.guidance_channels == "all" else recipe.guidance_channels
        out = guided(out[:batch], out[batch:], recipe.guidance, num_guided)
    fraction = (out[:, channels:] + 1) / 2 if process.learned_variance else None
    return out[:, :channels], fraction


def _scheduler(recipe: Recipe, bar_S: np.ndarray) -> Any:
    """diffusers' DDIM or DPM-Solver++ on the respaced process, its time steps being S-1 ... 0."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    betas = 1 - bar_S / np.concatenate([[1.0], bar_S[:-1]])
    settings: dict[str, Any] = {
        "num_train_timesteps": len(bar_S),
        "trained_betas": betas.tolist(),
        "prediction_type": "sample",
    }
    if recipe.sampler == "ddim":
        scheduler = DDIMScheduler(
            **settings, clip_sample=recipe.clip_x0, timestep_spacing="leading"
        )
    else:
        bar_S = bar_S.clip(2.0**-24)  # sigma / alpha must be finite, as in diffusers itself
        scheduler = DPMSolverMultistepScheduler(
            **settings,
            solver_order=2,
            thresholding=recipe.clip_x0,  # with an upper end of 1 it is plain clipping to [-1, 1]
            sample_max_value=1.0,
            timestep_spacing="trailing",
        )
    # The schedulers' own is in float32, from the betas; ours is exact (see ancestral_step).
    scheduler.alphas_cumprod = torch.from_numpy(bar_S)
    scheduler.set_timesteps(len(bar_S))
    return scheduler


def _sample_batch(
    model: Model,
    process: Process,
    recipe: Recipe,
    numbers: Sequence[int],
    labels_B: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int], None],
) -> Tensor:
    """One batch through the whole chain; the state is kept in float32 (float64 if `dtype` is)."""
    kept = kept_steps(process, recipe)
    bar_S, norm_S = process.alpha_bar[kept], process.norm[kept]
    scale_S = norm_S * process.objective.input_scale.numpy()[kept]
    of_out_S, of_x_S = (c.numpy()[kept] for c in process.objective.x0_columns(process.schedule))
    tau_S = process.schedule.tau.numpy()[kept]
    state = torch.promote_types(dtype, torch.float32)
    slots_B = torch.tensor(list(numbers), dtype=torch.int64, device=device)

    def noise(step: int) -> Tensor:
        num = math.prod(process.shape)
        flat = philox.normals(recipe.seed, step, slots_B, philox.STREAM_SAMPLE, num, torch.float32)
        return flat.reshape(-1, *process.shape).to(state)

    scheduler = None if recipe.sampler == "ddpm" else _scheduler(recipe, bar_S)
    x = noise(0)
    for step, t in enumerate(reversed(range(len(kept))), start=1):
        inputs = (x * float(scale_S[t])).to(dtype)
        prediction, fraction = _predict(model, process, recipe, inputs, float(tau_S[t]), labels_B)
        x0 = float(of_out_S[t]) * prediction.to(state) + float(of_x_S[t] * norm_S[t]) * x
        if scheduler is None:
            x0 = x0.clamp(-1, 1) if recipe.clip_x0 else x0
            previous = float(bar_S[t - 1]) if t else 1.0
            fresh = noise(step) if t else None
            x = ancestral_step(x, x0, fraction, fresh, float(bar_S[t]), previous)
        else:
            # As in ADM, epsilon is derived again from a clipped x0.
            extra = {"use_clipped_model_output": recipe.clip_x0} if recipe.sampler == "ddim" else {}
            x = scheduler.step(x0, t, x, **extra).prev_sample
        progress(len(x))
    return x


@torch.no_grad()
def sample(
    model: Model,
    process: Process,
    recipe: Recipe,
    *,
    labels_N: Tensor | None = None,
    numbers: Sequence[int] | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw samples: x [N, C, H, W] in model space, float32 (float64 if `dtype` is), on `device`.

    labels_N: int64 classes, or None for an unconditional model or the null label. numbers: the
    global number of each sample, which addresses its noise; default 0 .. N-1; needed if labels_N
    is None. dtype: what `x` is cast to for the network, i.e. the dtype of its weights. progress:
    called with the batch's size after each sampler step. The samples do not depend on batch_size,
    beyond the rounding of the network's own matrix products. Raises ValueError where model, recipe
    and labels contradict each other.
    """
    if getattr(model, "training", False):
        raise ValueError("the model is in training mode; call model.eval() before sampling")
    if numbers is None:
        if labels_N is None:
            raise ValueError("give labels_N or numbers, to say how many samples to draw")
        numbers = range(len(labels_N))
    if labels_N is not None and len(labels_N) != len(numbers):
        raise ValueError(f"{len(labels_N)} labels for {len(numbers)} samples; give one for each")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    check(process, recipe, labels_N)
    device = torch.device(device)
    parts = []
    for start in range(0, len(numbers), batch_size):
        batch = slice(start, start + batch_size)
        labels_B = None if labels_N is None else labels_N[batch].to(device)
        part = numbers[batch]
        tell = progress or (lambda _: None)
        parts.append(_sample_batch(model, process, recipe, part, labels_B, device, dtype, tell))
    return torch.cat(parts) if parts else torch.empty(0, *process.shape, device=device)


def round_robin_labels(num: int, num_classes: int) -> Tensor | None:
    """Labels 0, 1, ..., num_classes - 1, 0, ...: every class equally often; None without any."""
    return torch.arange(num) % num_classes if num_classes else None


def latent_decoder(
    vae_folder: Path, scale: float = 0.18215, device: torch.device | str = "cpu"
) -> Callable[[Tensor], Tensor]:
    """A function from latents [N, c, h, w] to pictures [N, 3, H, W] in [-1, 1], float32.

    vae_folder: a diffusers AutoencoderKL folder with safetensors; nothing is downloaded and no
    pickle is read. scale: what the latents were multiplied by when they were encoded. Raises
    ValueError if it is not such a folder.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    if not (Path(vae_folder) / "config.json").exists():
        raise ValueError(
            f"{vae_folder} holds no config.json; give the folder of a diffusers AutoencoderKL"
        )
    try:
        vae: Any = AutoencoderKL.from_pretrained(
            str(vae_folder), local_files_only=True, use_safetensors=True
        )
    except OSError as error:
        raise ValueError(
            f"the VAE in {vae_folder} cannot be read: {' '.join(str(error).split())}"
        ) from error
    vae = vae.to(device).eval()

    @torch.no_grad()
    def decode(x_NCHW: Tensor) -> Tensor:
        return vae.decode(x_NCHW.to(device=device, dtype=vae.dtype) / scale).sample.float()

    return decode
