"""
The image VAE: pixels become a small latent grid, in which everything else of this repository works.

    images (B, 3, H, W) --Encoder--> mean | logvar (B, 2C, h, w) --sample--> · scaling_factor --> latents (B, C, h, w)
    in [-1, 1]                                                                                        |
    images (B, 3, H, W) <-------------------- Decoder <-------------------- / scaling_factor <--------+

H = f·h with f = 2^(levels - 1). Paper: FlexTok, arXiv 2502.13967, uses the SD/SDXL autoencoder (LDM, arXiv 2112.10752)
with f = 8 and C = 4, 8 or 16. Same modules, same key names as diffusers' AutoencoderKL: its directories load here, and
ours there. Difference: we leave out the perceptual (LPIPS) loss, which needs a downloaded network.

    python vae.py --preset shapes32 --out out/vae_shapes                         # a CPU thread, 3 minutes
    python vae.py --preset in1k --data /data/imagenet/train --out out/vae_in1k   # one GPU
    torchrun --nproc_per_node 8 vae.py --preset in1k --data ... --out ...        # eight

Letters: B batch, C latent channels, c feature channels, H W pixels, h w latent grid.             Next: model.py
"""
import math
import os
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import (Log, UserError, autocast, check_range, command, digest_of, from_cli, generator, init_distributed,
                    load_tensors, load_weights, read_json, save_tensors, shipped, shown, write_json)
from data import batches, open_data, spread
from images import draw_curves, psnr, save_grid, to_float
from runs import Average, Checkpoints, Means, Recorded, Scaler, check_run, fill_with_average, provenance, recorded

# ---------------------------------------------------------------------------------------------------------------
# The network


@dataclass
class VAEConfig:
    """Shape of the VAE. Defaults are the official FlexTok VAEs', field names those of diffusers' config.json."""
    latent_channels: int = 16
    block_out_channels: tuple = (128, 256, 512, 512)  # feature channels of each level, finest first
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 1.0  # latents = scaling_factor · posterior, chosen so that latents have a std of about 1
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True


def norm_silu(norm, x):
    """SiLU(norm(x)); without gradients in place, which saves one feature map of memory."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


class ResnetBlock(nn.Module):
    """(B, c_in, H, W) -> (B, c_out, H, W): twice GroupNorm, SiLU, 3x3 convolution, plus the input."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        residual = self.conv1(norm_silu(self.norm1, x))
        residual = norm_silu(self.norm2, residual)  # a line of its own: what conv1 returned is free before conv2 runs
        residual = self.conv2(residual)
        residual += self.conv_shortcut(x)
        return residual


class Attention(nn.Module):
    """Self-attention over all positions of (B, c, h, w), with ONE head of size c, plus the input."""

    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])  # a list because diffusers has a dropout behind it

    def forward(self, x):
        B, c, h, w = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)                        # (B, h·w, c)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)             # (B, h·w, c)
        # softmax(q·k / √c)·v; the added axis is the one head
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]  # (B, h·w, c)
        return x + self.to_out[0](out).transpose(1, 2).reshape(B, c, h, w)            # (B, c, h, w)


class Downsample(nn.Module):
    """(B, c, H, W) -> (B, c, H/2, W/2), a strided convolution."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        # Padding on the right and the bottom only, as in LDM: with padding=1 the grid would shift by a pixel per level
        return self.conv(F.pad(x, (0, 1, 0, 1)))                                      # (B, c, H/2, W/2)


class Upsample(nn.Module):
    """(B, c, h, w) -> (B, c, 2h, 2w): repeat pixels, then convolve; a transposed convolution leaves checkerboards."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))          # (B, c, 2h, 2w)


class Level(nn.Module):
    """Some residual blocks at one resolution, then the step to the next (none at the last level)."""

    def __init__(self, c_in, c_out, layers, groups, downsample=False, upsample=False):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers)])
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if downsample else [])
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if upsample else [])

    def forward(self, x):
        for layer in [*self.resnets, *self.downsamplers, *self.upsamplers]:
            x = layer(x)
        return x


class MidBlock(nn.Module):
    """At the coarsest resolution, (B, c, h, w) -> the same: the only place where distant positions meet."""

    def __init__(self, c, groups, attention):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c, c, groups), ResnetBlock(c, c, groups)])
        self.attentions = nn.ModuleList([Attention(c, groups)] if attention else [])

    def forward(self, x):
        for layer in [self.resnets[0], *self.attentions, self.resnets[1]]:
            x = layer(x)
        return x


class Encoder(nn.Module):
    """images (B, 3, H, W) -> (B, 2C, h, w)."""

    def __init__(self, config):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [Level(widths[max(i - 1, 0)], widths[i], config.layers_per_block, groups, downsample=i < len(widths) - 1)
             for i in range(len(widths))])
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, images):
        x = self.conv_in(images)                                                      # (B, c_0, H, W)
        for level in self.down_blocks:
            x = level(x)                                                              # (B, c_i, H/2^i, W/2^i)
        x = self.mid_block(x)                                                         # (B, c_last, h, w)
        return self.conv_out(norm_silu(self.conv_norm_out, x))                        # (B, 2C, h, w)


class Decoder(nn.Module):
    """latents (B, C, h, w), unscaled -> images (B, 3, H, W): the encoder's mirror, with one more block per level."""

    def __init__(self, config):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            [Level(widths[max(i - 1, 0)], widths[i], config.layers_per_block + 1, groups, upsample=i < len(widths) - 1)
             for i in range(len(widths))])
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def features(self, latents):
        """All but the last layer: (B, C, h, w) -> (B, c_0, H, W)."""
        x = self.mid_block(self.conv_in(latents))                                     # (B, c_last, h, w)
        for level in self.up_blocks:
            x = level(x)                                                              # (B, c_i, 2^i·h, 2^i·w)
        return norm_silu(self.conv_norm_out, x)                                       # (B, c_0, H, W)

    def forward(self, latents):
        return self.conv_out(self.features(latents))                                  # (B, 3, H, W)


class Posterior:
    """The encoder's answer q(latents | image): a Gaussian with mean and logvar (B, C, h, w), float32, UNSCALED."""

    def __init__(self, moments):
        """moments (B, 2C, h, w): the first half of the channels is the mean, the second the log of the variance."""
        mean, logvar = moments.float().chunk(2, dim=1)                                # (B, C, h, w) each
        self.mean, self.logvar = mean, logvar.clamp(-30.0, 20.0)  # exp() of it stays finite in float32

    @property
    def std(self):
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator=None, noise=None):
        """mean + std · noise, (B, C, h, w); the gradient reaches both through this sum (reparametrisation)."""
        if noise is None:
            noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device)    # (B, C, h, w)
        return self.mean + self.std * noise

    def kl(self):
        """KL(q || N(0, 1)) of each image in nats, (B,): 0.5 · Σ over C, h, w of (mean² + var - 1 - logvar)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))  # (B,)


class VAE(nn.Module):
    """The autoencoder. `latents` and `decode` speak scaled latents; the scaling factor is applied nowhere else."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(C, C, 1) if config.use_post_quant_conv else nn.Identity()

    @torch.no_grad()
    def init_weights(self):
        """For training from scratch, where PyTorch's own initial weights learn slowly: 5 dB less after 160 steps."""
        # Residual branches start at zero: at first the network is the linear path through all other convolutions,
        # and finds something like the principal components of patches before anything deeper. Each of those starts near
        # an orthogonal matrix of the channels, pixel by pixel: nothing is blurred or lost, in either direction.
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
                c_out, c_in, size, _ = module.weight.shape
                if name.endswith(".conv2"):
                    nn.init.zeros_(module.weight)
                elif not name.endswith(".conv1"):
                    turn = nn.init.orthogonal_(torch.empty(c_out, c_in)) * max(1, c_out / c_in) ** 0.5
                    module.weight.mul_(0.3)[:, :, size // 2, size // 2] += turn
        # Posteriors start narrow, std = exp(-6/2): else the decoder sees mostly noise and learns to ignore the latents
        last = self.quant_conv if self.config.use_quant_conv else self.encoder.conv_out
        last.bias[self.config.latent_channels:] = -6.0

    @property
    def downsampling(self):
        """f, image side / latent side."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> `Posterior`, unscaled. Raises ValueError for shapes that do not fit."""
        f = self.downsampling
        if images.dim() != 4:
            raise ValueError(f"images of shape {list(images.shape)}: expected (B, 3, H, W)")
        for side in images.shape[2:]:
            if side % f:
                raise ValueError(f"image side {side} is not a multiple of the VAE's factor {f}; resize or crop to "
                                 f"{max(side // f, 1) * f}")
        # Channels of a pixel side by side in memory: on a CPU 1.1 to 1.4 times as fast at 16 to 96 channels; at 128 to
        # 512, 0.9 here and 1.15 in `decode`. CUDA: untested.
        images = images.contiguous(memory_format=torch.channels_last)
        return Posterior(self.quant_conv(self.encoder(images)).contiguous())

    def latents(self, images, sample_posterior=False, generator=None):
        """images (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w), scaled: the posterior's mean, or a sample of it."""
        posterior = self.encode(images)
        return self.config.scaling_factor * (posterior.sample(generator) if sample_posterior else posterior.mean)

    def decode(self, latents):
        """latents (B, C, h, w), scaled -> images (B, 3, H, W), in [-1, 1] but for a little overshoot (not clamped)."""
        latents = (latents / self.config.scaling_factor).contiguous(memory_format=torch.channels_last)
        return self.decoder(self.post_quant_conv(latents)).contiguous()

    def forward(self, images, noise):
        """images (B, 3, H, W), noise (B, C, h, w) -> reconstructions (B, 3, H, W) of a sample, and the `Posterior`."""
        posterior = self.encode(images)
        latents = self.config.scaling_factor * posterior.sample(noise=noise)          # (B, C, h, w)
        return self.decode(latents).float(), posterior

    def fingerprint(self):
        """A hash of all that decides an image's latents: the weights and the scale."""
        return digest_of(self.config.scaling_factor, self)

    def save_pretrained(self, directory, dtype=torch.float32, **notes):
        """Write diffusion_pytorch_model.safetensors and config.json (with `notes`): what diffusers and we read."""
        levels = len(self.config.block_out_channels)
        save_tensors(os.path.join(directory, "diffusion_pytorch_model.safetensors"), self.state_dict(), dtype)
        write_json(os.path.join(directory, "config.json"), {  # last: it says that the model is whole
            "_class_name": "AutoencoderKL", "act_fn": "silu", "in_channels": 3, "out_channels": 3,
            "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
            **asdict(self.config), **notes})

    @classmethod
    def from_pretrained(cls, name, device="cpu", dtype=torch.float32):
        """Read such a directory, ours or diffusers', its weights file, or a name on the Hugging Face hub; in eval mode.

        dtype: of the weights; None is as stored. Raises `UserError` if unfit.
        """
        name = shipped(name)
        from extras.hub import find  # late: only who asks for a name of the hub needs it
        config_path, weights_path = find(name, "config.json", "diffusion_pytorch_model.safetensors")
        raw = read_json(config_path)
        if isinstance(raw, dict) and str(raw.get("format")).startswith("minFlexTok"):
            raise UserError(f"{config_path}: of format {shown(raw['format'])}, expected a VAE's; for a tokenizer's own "
                            f"call FlexTok.from_pretrained(...).vae.save_pretrained(DIR)")
        config = config_from_diffusers(raw, config_path)
        with torch.device("meta"):  # shapes without memory, until the weights come
            vae = cls(config)
        load_weights(vae, modern_names(load_tensors(weights_path)), weights_path, device, dtype)
        return vae.eval()


# ---------------------------------------------------------------------------------------------------------------
# diffusers' files


def config_from_diffusers(raw, where):
    """diffusers' config.json as a dict -> `VAEConfig`. What we do not implement raises `UserError` naming `where`.

    A key that is absent means diffusers' default, which is not ours.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected a JSON object")
    values = {"latent_channels": 4, "block_out_channels": (64,), "layers_per_block": 1, "norm_num_groups": 32,
              "scaling_factor": 0.18215, "mid_block_add_attention": True, "use_quant_conv": True,
              "use_post_quant_conv": True}
    values |= {name: raw[name] for name in values if name in raw}
    widths = values["block_out_channels"]
    counts = [values[name] for name in ("latent_channels", "layers_per_block", "norm_num_groups")]
    if not (isinstance(widths, (list, tuple)) and 0 < len(widths) <= 16
            and all(type(n) is int and 0 < n < 2**16 for n in [*widths, *counts]) and values["layers_per_block"] <= 64):
        raise UserError(f"{where}: block_out_channels {shown(widths)} and latent_channels, layers_per_block, "
                        f"norm_num_groups {shown(counts)}: expected whole numbers above 0, the first a list")
    fixed = {"_class_name": ("AutoencoderKL",), "act_fn": ("silu", "swish"), "in_channels": (3,), "out_channels": (3,),
             "shift_factor": (None, 0.0), "latents_mean": (None,), "latents_std": (None,),
             "down_block_types": (["DownEncoderBlock2D"] * len(widths),),
             "up_block_types": (["UpDecoderBlock2D"] * len(widths),)}
    for name, allowed in fixed.items():
        if name in raw and raw[name] not in allowed:
            raise UserError(f"{where}: {name} {shown(raw[name])} is not supported, expected {shown(allowed[0])}")
    if any(c % values["norm_num_groups"] for c in widths):
        raise UserError(f"{where}: norm_num_groups {values['norm_num_groups']} does not divide block_out_channels "
                        f"{list(widths)}")
    if not isinstance(values["scaling_factor"], (int, float)) or not 0 < values["scaling_factor"] < math.inf:
        raise UserError(f"{where}: scaling_factor {shown(values['scaling_factor'])}, expected a positive number")
    return VAEConfig(**values | {"block_out_channels": tuple(widths)})


# Attention layers of files from before 2023, which diffusers renames as well
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def modern_names(tensors):
    """{diffusers key: tensor} of any age -> the same under today's names, with today's shapes."""
    modern = {}
    for name, tensor in tensors.items():
        if ".attentions.0." in name:
            for old, new in OLD_NAMES.items():
                name = name.replace(old, new)
            if name.endswith(".weight") and tensor.dim() == 4:  # once these were 1x1 convolutions
                tensor = tensor.flatten(1)                                            # (c, c, 1, 1) -> (c, c)
        modern[name] = tensor
    return modern


# ---------------------------------------------------------------------------------------------------------------
# Training


@dataclass
class VAETrainConfig:
    """Train the image VAE."""
    data: str = "shapes"         # shapes, emoji, or a folder of images
    out: str = "out/vae"         # directory of this run; VAE.from_pretrained opens it
    init: str = ""               # a trained VAE of these sizes to go on from; empty: random weights
    image_size: int = 32         # side in pixels, a multiple of 2^(n - 1) at n levels
    augment: bool = True         # random flips and crops, as the data set allows
    latent_channels: int = 8     # C; more: better images, and a harder task for the flow model behind
    block_out_channels: tuple = (16, 32, 64)  # feature channels per level; n levels downsample by 2^(n - 1)
    layers_per_block: int = 1    # residual blocks per level in the encoder; the decoder has one more
    norm_num_groups: int = 8     # groups of GroupNorm, a divisor of all feature channels
    batch_size: int = 8          # images per step, over all processes together
    steps: int = 2000            # optimizer steps
    lr: float = 1e-3             # peak learning rate
    warmup: int = 50             # steps of linear warm-up, then cosine
    kl_weight: float = 1e-4      # times the KL in nats per latent element (L1 is per pixel and colour)
    gan_weight: float = 0.0      # strength of the patch discriminator; 0 turns it off
    gan_start: int = 0           # step at which the discriminator enters
    ema_decay: float = 0.998     # the average of the weights over about 1/(1 - decay) steps is what gets saved
    grad_clip: float = 1.0       # largest gradient norm
    seed: int = 0                # of the weights, the data order and the posterior noise
    device: str = "auto"         # auto, cpu, cuda, cuda:1, mps
    precision: str = "auto"      # auto, bf16, fp16 (GPUs without bf16), fp32
    compile: bool = False        # torch.compile the networks; on one GPU, record a step as a CUDA graph
    workers: int = 0             # processes that read images
    log_every: int = 50          # steps between log lines
    eval_every: int = 1000       # steps between evaluations, each of which writes a checkpoint
    resume: bool = False         # go on with the run in --out
    stop_at: int = 0             # save and end before this step, as if interrupted; 0: never


EMOJI = dict(data="emoji", image_size=64, latent_channels=8, block_out_channels=(16, 32, 64, 96), kl_weight=1e-3,
             ema_decay=0.999)
PRESETS = {
    "shapes32": dict(  # one core of a small cloud machine, 3 minutes: drawn scenes at 32 px
        data="shapes", out="out/vae_shapes32", image_size=32, latent_channels=4, block_out_channels=(16, 32, 64),
        batch_size=8, steps=2500, lr=1e-3, warmup=50, kl_weight=1e-3, ema_decay=0.998),
    "emoji64-cpu": dict(  # 22 minutes of CPU time: emoji at 64 px, 24 numbers become 1, 27.2 dB held out
        EMOJI, out="out/vae_emoji64-cpu", batch_size=16, steps=3000, lr=1.5e-3, warmup=50, eval_every=1000),
    "emoji64": dict(      # 2½ minutes of an H100 with --compile: the same, longer
        EMOJI, out="out/vae_emoji64", batch_size=64, steps=12_000, lr=2e-3, warmup=200, eval_every=4000, workers=6),
    # 2.7 TFLOP an image and step, forwards and back, at 30 % of the peak. The paper's settings are not public;
    # kl_weight is LDM's 1e-6 (arXiv 2112.10752) in our normalisation, times 16/64/3.
    "in1k": dict(      # ImageNet at 256 px, the official sizes: 8 H100, half a day by arithmetic (not run)
        data="data/imagenet/train", out="out/vae_in1k", image_size=256, latent_channels=16,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32, batch_size=64,
        steps=500_000, lr=1e-4, warmup=5000, kl_weight=1e-7, gan_weight=0.5, gan_start=50_000,
        ema_decay=0.9999, workers=12, log_every=100, eval_every=5000),
}
# may differ when a run is resumed
RUN_FIELDS = ("resume", "stop_at", "out", "device", "precision", "compile", "workers", "log_every", "eval_every")


def training_loss(model, images, noise, kl_weight):
    """The VAE's loss, without the discriminator: images (b, 3, H, W), noise (b, C, h, w) -> loss, its parts.

    Parts: reconstructions (b, 3, H, W), their mean L1 distance from the images, and the KL divergence in nats per
    latent element, which keeps the latents near N(0, 1), where the noise of the flow model is.
    """
    # FORK: another objective, LPIPS say
    reconstructions, posterior = model(images, noise)                             # (b, 3, H, W)
    l1 = (reconstructions - images).abs().mean()
    kl = posterior.kl().mean() / noise[0].numel()
    return l1 + kl_weight * kl, reconstructions, l1, kl


class PatchDiscriminator(nn.Module):
    """images (B, 3, H, W) -> logits (B, 1, H/8 - 2, W/8 - 2), above 0 where a 70-pixel patch looks real.

    PatchGAN with 3 strided layers (pix2pix, arXiv 1611.07004), GroupNorm for BatchNorm: no statistics across the batch,
    so that real and reconstructed images can go through together and several GPUs need not talk.
    """

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 64, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for c_in, c_out, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
            layers += [nn.Conv2d(c_in, c_out, 4, stride, padding=1), nn.GroupNorm(8, c_out), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(512, 1, 4, padding=1))

    def forward(self, images):
        return self.layers(images).float()                                        # (B, 1, H/8 - 2, W/8 - 2)


def adaptive_weight(l1, gan, last_layer):
    """|grad l1| / |grad gan| at the decoder's last weights, clamped to [0, 1e4].      (VQGAN, arXiv 2012.09841, Eq. 7)

    The two losses then pull equally hard on the image, whatever the discriminator's scale; `gan_weight` tilts that.
    """
    l1_grad, = torch.autograd.grad(l1, last_layer, retain_graph=True)
    gan_grad, = torch.autograd.grad(gan, last_layer, retain_graph=True)
    return (l1_grad.norm() / (gan_grad.norm() + 1e-4)).clamp(0, 1e4).detach()


def hinge_loss(logits):
    """Discriminator's logits (2B, 1, ...), real images first -> mean of max(0, 1 - real) and of max(0, 1 + fake)."""
    real, fake = logits.chunk(2)                                                  # (B, 1, ...) each
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


@torch.no_grad()
def calibrate(vae, images):
    """Set the scaling factor so that the latents of `images` (n, 3, S, S) have a std of 1, like the noise of the flow.

    It is the std of the posterior MEAN, over all images, channels and positions: the mean is what `latents` gives.
    """
    means = torch.cat([vae.encode(part).mean for part in images.split(32)])       # (n, C, h, w)
    vae.config.scaling_factor = 1 / means.std().item()


@torch.no_grad()
def evaluate(vae, held_out, config, step):
    """Mean PSNR of held-out images (n, 3, S, S), and a picture of 8 of them."""
    device = vae.encoder.conv_in.weight.device
    reconstructions = torch.cat([vae.decode(vae.latents(part.to(device))).cpu() for part in held_out.split(32)])
    decibels = psnr(reconstructions, held_out)                                    # (n,)
    save_grid(os.path.join(config.out, "reconstructions.png"), [held_out[:8], reconstructions[:8]],
              [f"{value:.1f} dB" for value in decibels[:8].tolist()])
    metrics = {"held_out_psnr": decibels.mean().item()}
    draw_curves(config, step, metrics)
    return metrics


def check(config, run):
    """Raise `UserError` for settings that cannot work, before anything is trained or written."""
    check_run(config, run)
    check_range(config, 1, math.inf, "image_size")
    check_range(config, 0, math.inf, "kl_weight", "gan_weight", "gan_start")
    vae_config_of(config)
    factor = 2 ** (len(config.block_out_channels) - 1)
    if config.image_size % factor:
        raise UserError(f"--image_size {config.image_size} is not a multiple of 2^(levels - 1) = {factor}")
    if config.gan_weight > 0 and config.image_size < 24:
        raise UserError(f"--image_size {config.image_size}: the discriminator needs 24 pixels; use --gan_weight 0")


def vae_config_of(config):
    """The `VAEConfig` that a `VAETrainConfig` asks for, not calibrated yet. Raises `UserError` if it makes no VAE."""
    sizes = {f.name: getattr(config, f.name) for f in fields(VAEConfig) if hasattr(config, f.name)}
    return config_from_diffusers(sizes | {"scaling_factor": 1.0}, "these settings")


def main(config, part="", later=0.0):
    """Train a VAE; returns the last evaluation's metrics, or {} if it was stopped (Ctrl-C, SIGTERM), after saving.

    part, later: see `Log`, if this is part of train_tokenizer.py. Raises `UserError` for settings that cannot work.
    """
    run = init_distributed(config.device)
    check(config, run)
    # before anything is written: it may not be there
    dataset = open_data(config.data, config.image_size, "train", augment=config.augment, seed=config.seed)
    with Checkpoints(config, RUN_FIELDS, run) as checkpoints:
        return train(config, run, checkpoints, dataset, part, later)


def train(config, run, checkpoints, dataset, part, later):
    """The run itself; see `main`."""
    # ---- data -------------------------------------------------------------------------------------------------
    held_out, _ = spread(open_data(config.data, config.image_size, "held_out", augment=False, seed=config.seed), 256)
    calibration, _ = spread(dataset, 256)  # for the scaling factor

    # ---- model ------------------------------------------------------------------------------------------------
    torch.manual_seed(config.seed)  # the same weights on every process
    vae = VAE(vae_config_of(config))
    vae.init_weights()
    if config.init:
        trained = VAE.from_pretrained(config.init)
        if replace(trained.config, scaling_factor=1.0) != vae.config:
            raise UserError(f"--init {config.init}: its VAE has other sizes than this run's")
        vae.load_state_dict(trained.state_dict())
    vae.to(run.device).train()
    critic = PatchDiscriminator().to(run.device)
    ema = Average(vae, config.ema_decay)
    if config.compile:  # two graphs; the last layer is left out, as `adaptive_weight` goes backwards through it alone
        vae.encoder.compile(dynamic=False)
        vae.decoder.features = torch.compile(vae.decoder.features, dynamic=False)
    model, wrapped_critic = (DistributedDataParallel(m) if run.world > 1 else m for m in (vae, critic))

    # ---- optimizer --------------------------------------------------------------------------------------------
    optimizer, critic_optimizer = (
        torch.optim.AdamW(m.parameters(), lr=config.lr, betas=betas, weight_decay=1e-4, fused=True)
        for m, betas in ((vae, (0.9, 0.99)), (critic, (0.5, 0.9))))
    scaler = Scaler(config, run)

    # ---- resume -----------------------------------------------------------------------------------------------
    def export(state):
        with torch.device("meta"):  # shapes without memory
            averaged = VAE(replace(vae.config))
        fill_with_average(averaged, state["ema"])
        calibrate(averaged, calibration)  # on the CPU; without its scale it would be another VAE
        averaged.save_pretrained(
            config.out, train=asdict(config), step=state["step"], metrics=state["metrics"], **provenance(run))

    start = checkpoints.restore({"model": vae, "critic": critic, "ema": ema, "optimizer": optimizer,
                                 "critic_optimizer": critic_optimizer, "scaler": scaler}, export)
    log, means = Log(config.out, run, start, part, config.steps, later), Means(5, run)
    stream = batches(dataset, config.batch_size, config.seed, run, start, config.workers)
    side, C = config.image_size // vae.downsampling, config.latent_channels
    log.say(f"{sum(p.numel() for p in vae.parameters()):,} parameters on {run.device}; {len(dataset):,} images of "
            f"{config.image_size}² pixels become {C} x {side}²; {run.world} processes; steps {start} to {config.steps}")

    def learn(adversarial, images, noise):
        """Forwards and backwards with a batch: adds to the gradients, returns (5,): what the log says of its losses."""
        with autocast(run.device, config.precision):
            loss, reconstructions, l1, kl = training_loss(model, images, noise, config.kl_weight)
            gan = critic_loss = torch.zeros_like(l1)
            if adversarial:
                critic.requires_grad_(False)  # this pass teaches the VAE only
                gan = -critic(reconstructions).mean()
                weight = adaptive_weight(scaler.scale(l1), scaler.scale(gan), vae.decoder.conv_out.weight)
                loss = loss + config.gan_weight * weight * gan
        scaler.scale(loss).backward()
        if adversarial:
            critic.requires_grad_(True)
            with autocast(run.device, config.precision):
                critic_loss = hinge_loss(wrapped_critic(torch.cat([images, reconstructions.detach()])))
            scaler.scale(critic_loss).backward()
        return torch.stack([l1, kl, psnr(reconstructions.detach(), images).mean(), critic_loss, -gan]).detach()
    learn, ones = recorded(learn, config, run), torch.ones(5, device=run.device)

    def report():
        l1, kl, decibels, critic_loss, fooled = means.take()
        critics = {"critic": critic_loss, "critic_of_fakes": fooled} if config.gan_weight > 0 else {}
        return dict(loss=l1 + config.kl_weight * kl, l1=l1, kl=kl, psnr=decibels, **critics, grad_norm=norm)
    steps = checkpoints.steps(log, report, lambda: ema.module if run.is_main else None,
                              lambda averaged, step: evaluate(averaged, held_out, config, step))

    # ---- loop -------------------------------------------------------------------------------------------------
    for step, lr in steps:
        for group in optimizer.param_groups + critic_optimizer.param_groups:
            group["lr"] = lr
        images = to_float(next(stream)[0].to(run.device, non_blocking=True))      # (b, 3, S, S), b = batch_size / world
        source = generator(run.device, config.seed, step, "posterior")
        noise = torch.randn(config.batch_size, C, side, side, generator=source, device=run.device)  # (B, C, h, w)

        adversarial = config.gan_weight > 0 and step >= config.gan_start
        means.add(learn(adversarial, images, noise[run.part(config.batch_size)]), ones)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(vae.parameters(), config.grad_clip)
        for each in (optimizer, critic_optimizer) if adversarial else (optimizer,):
            scaler.step(each)
            each.zero_grad(set_to_none=not isinstance(learn, Recorded))
        scaler.update()
        ema.update_parameters(vae)
    return checkpoints.metrics


if __name__ == "__main__":
    command(main, from_cli(VAETrainConfig, PRESETS, needs_preset=True))
