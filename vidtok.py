"""
VidTok, the VAE of clips: 1 + 4n frames become 1 + n latent frames, 8 times smaller per side, and never see the future.

    video (B, 3, F, H, W) --the first frame three times more, so that all come in fours--> Encoder --> mean | logvar
    in [-1, 1]                                                                              latents (B, C, T, h, w)
    video (B, 3, F, H, W) <--without the first three frames-- Decoder <---------------------------------+

Paper: VidTok, arXiv 2412.13061, of which released VideoFlexTok use vidtok_kl_causal_488_16chn, frozen. Module names are
those of its checkpoints. Differences: it is not trained here; for small clips there is `FrameVAE`.
Letters: B batch, C latent channels, c feature channels, F frames, H W pixels, T h w latents, f = H / h.

    python vidtok.py        # prints shapes and size                                                 Next: video.py
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vae import VAE, Posterior


@dataclass
class VidTokConfig:
    """Shape of the VAE. Defaults are vidtok_kl_causal_488_16chn's, the one released tokenizers work in."""
    channels: int = 128               # feature channels of the finest level
    channel_mult: tuple = (1, 2, 4, 4)  # and how many times as many the levels have; n levels downsample by 2^(n - 1)
    layers_per_block: int = 2         # pairs of residual blocks per level in the encoder; the decoder has one more
    latent_channels: int = 16

    def __post_init__(self):
        if not 3 <= len(self.channel_mult) <= 8:
            raise ValueError(f"channel_mult {self.channel_mult}: expected 3 to 8 levels, of which two halve time too")


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (B, c, T, H, W), at every place by itself: no statistics that later frames enter.

    That is why it is not GroupNorm, as in image VAEs: those take means over all places, hence over the future.
    """

    def __init__(self, c):
        super().__init__()
        self.norm = nn.LayerNorm(c, eps=1e-6)

    def forward(self, x):
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)                         # (B, c, T, H, W)


class FrameConv(nn.Conv2d):
    """A 2-D convolution of every frame: (B, c_in, T, H, W) -> (B, c_out, T, H', W')."""

    def __init__(self, c_in, c_out, size=3, **options):
        super().__init__(c_in, c_out, size, **{"padding": size // 2, **options})

    def forward(self, x):
        frames = super().forward(x.transpose(1, 2).flatten(0, 1))                 # (B·T, c_out, H', W')
        return frames.unflatten(0, (len(x), -1)).transpose(1, 2)                  # (B, c_out, T, H', W')


class TimeConv(nn.Module):
    """A 1-D convolution over time of every pixel, causal: two zero frames before the first, none after the last."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv = nn.Conv1d(c_in, c_out, 3)

    def forward(self, x):
        # as a 3-D convolution of size (3, 1, 1): no pixel has to be moved
        return F.conv3d(in_time(x, 2), self.conv.weight[..., None, None], self.conv.bias)  # (B, c_out, T, H, W)


class CausalConv(nn.Module):
    """A 3-D convolution that looks back in time only: (B, c_in, T, H, W) -> (B, c_out, T/stride, H, W)."""

    def __init__(self, c_in, c_out, size=3, stride=1):
        super().__init__()
        self.before = size - stride  # zero frames in front
        self.conv = nn.Conv3d(c_in, c_out, size, stride=(stride, 1, 1), padding=(0, size // 2, size // 2))

    def forward(self, x):
        return self.conv(in_time(x, self.before))                                 # (B, c_out, T/stride, H, W)


def in_time(x, before):
    """Put `before` zero frames in front of (B, c, T, H, W)."""
    return F.pad(x, (0, 0, 0, 0, before, 0))                                      # (B, c, before + T, H, W)


class ResBlock(nn.Module):
    """(B, c_in, T, H, W) -> (B, c_out, T, H, W): twice norm, SiLU, convolution of a kind, plus the input."""

    def __init__(self, conv, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(c_in), conv(c_in, c_out)
        self.norm2, self.conv2 = ChannelNorm(c_out), conv(c_out, c_out)
        self.nin_shortcut = FrameConv(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        if conv is TimeConv:  # a new VAE begins as one of single images
            nn.init.zeros_(self.conv2.conv.weight)
            nn.init.zeros_(self.conv2.conv.bias)

    def forward(self, x):
        residual = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(residual)))


class FrameAttention(nn.Module):
    """Self-attention among the positions of each frame of (B, c, T, h, w), with one head of size c, plus the input."""

    def __init__(self, c):
        super().__init__()
        self.norm = ChannelNorm(c)
        self.q, self.k, self.v, self.proj_out = (CausalConv(c, c, 1) for _ in range(4))

    def forward(self, x):
        def tokens(y):
            return y.permute(0, 2, 3, 4, 1).flatten(2, 3)                         # (B, c, T, h, w) -> (B, T, h·w, c)
        y = self.norm(x)
        y = F.scaled_dot_product_attention(*(tokens(of(y)) for of in (self.q, self.k, self.v)))  # (B, T, h·w, c)
        y = y.unflatten(2, x.shape[3:]).permute(0, 4, 1, 2, 3)                    # (B, c, T, h, w)
        return x + self.proj_out(y)


class SpaceDown(nn.Module):
    """(B, c, T, H, W) -> (B, c, T, H/2, W/2)."""

    def __init__(self, c):
        super().__init__()
        self.conv = FrameConv(c, c, stride=2, padding=0)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))                                  # (B, c, T, H/2, W/2)


class SpaceUp(nn.Module):
    """(B, c, T, h, w) -> (B, c, T, 2h, 2w)."""

    def __init__(self, c):
        super().__init__()
        self.conv = FrameConv(c, c)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest"))  # (B, c, T, 2h, 2w)


class TimeDown(nn.Module):
    """(B, c, T, H, W) -> (B, c, T/2, H, W): a learned mixture of the mean of frames and a strided convolution."""

    def __init__(self, c):
        super().__init__()
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))
        self.conv = CausalConv(c, c, stride=2)

    def forward(self, x):
        share = torch.sigmoid(self.mix_factor)
        # the zero frame in front counts in the mean
        mean = F.avg_pool3d(in_time(x, 1), (3, 1, 1), (2, 1, 1))                  # (B, c, T/2, H, W)
        return share * mean + (1 - share) * self.conv(x)


class TimeUp(nn.Module):
    """(B, c, T, H, W) -> (B, c, 2T, H, W): a learned mixture of every frame twice and a convolution of that."""

    def __init__(self, c):
        super().__init__()
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))
        self.conv = CausalConv(c, c)

    def forward(self, x):
        share = torch.sigmoid(self.mix_factor)
        twice = x.repeat_interleave(2, 2)                                         # (B, c, 2T, H, W)
        return share * twice + (1 - share) * self.conv(twice)


class Level(nn.Module):
    """Residual blocks of one kind at one resolution, and a change of it in space or time."""

    def __init__(self, conv, c_in, c_out, layers, down=None, up=None):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(conv, c_in if j == 0 else c_out, c_out) for j in range(layers))
        if down:
            self.downsample = down(c_out)
        if up:
            self.upsample = up(c_out)


class MidBlock(nn.Module):
    """At the coarsest resolution, (B, c, T, h, w) -> the same: the only place where distant positions meet."""

    def __init__(self, c):
        super().__init__()
        self.block_1, self.block_2 = (ResBlock(CausalConv, c, c) for _ in range(2))
        self.attn_1 = FrameAttention(c)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


def blocks_of(space, time):
    """The two kinds of blocks of a level, in turn: what is beside each other, then what follows each other."""
    for in_space, over_time in zip(space.block, time.block):
        yield from (in_space, over_time)


class VAEEncoder(nn.Module):
    """video (B, 3, F, H, W), F a multiple of 4 -> moments (B, 2C, F/4, H/f, W/f)."""

    def __init__(self, config):
        super().__init__()
        c, n = [config.channels * factor for factor in config.channel_mult], len(config.channel_mult)
        self.conv_in = CausalConv(3, c[0])
        # level by level; space is halved after all but the last, time after the last two of these
        self.down = nn.ModuleList(Level(FrameConv, c[max(i - 1, 0)], c[i], config.layers_per_block,
                                        down=SpaceDown if i < n - 1 else None) for i in range(n))
        self.down_temporal = nn.ModuleList(Level(TimeConv, c[i], c[i], config.layers_per_block,
                                                 down=TimeDown if n - 3 <= i < n - 1 else None) for i in range(n))
        self.mid = MidBlock(c[-1])
        self.norm_out = ChannelNorm(c[-1])
        self.conv_out = CausalConv(c[-1], 2 * config.latent_channels)

    def forward(self, video):
        x = self.conv_in(video)                                                   # (B, c_0, F, H, W)
        for space, time in zip(self.down, self.down_temporal):
            for block in blocks_of(space, time):
                x = block(x)                                                      # (B, c_i, F', H/2^i, W/2^i)
            for level in (space, time):
                x = level.downsample(x) if hasattr(level, "downsample") else x
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))                  # (B, 2C, F/4, H/f, W/f)


class VAEDecoder(nn.Module):
    """latents (B, C, T, h, w) -> video (B, 3, 4T, f·h, f·w)."""

    def __init__(self, config):
        super().__init__()
        c, n = [config.channels * factor for factor in config.channel_mult], len(config.channel_mult)
        layers = config.layers_per_block + 1
        self.conv_in = CausalConv(config.latent_channels, c[-1])
        self.mid = MidBlock(c[-1])
        # numbered as in the encoder, finest first, and run from last to first
        self.up = nn.ModuleList(Level(FrameConv, c[min(i + 1, n - 1)], c[i], layers,
                                      up=SpaceUp if i > 0 else None) for i in range(n))
        self.up_temporal = nn.ModuleList(Level(TimeConv, c[i], c[i], layers,
                                               up=TimeUp if n - 3 <= i < n - 1 else None) for i in range(n))
        self.norm_out = ChannelNorm(c[0])
        self.conv_out = CausalConv(c[0], 3)

    def forward(self, latents):
        x = self.mid(self.conv_in(latents))                                       # (B, c_n, T, h, w)
        for space, time in zip(reversed(self.up), reversed(self.up_temporal)):
            for block in blocks_of(space, time):
                x = block(x)                                                      # (B, c_i, T', ..., ...)
            for level in (space, time):
                x = level.upsample(x) if hasattr(level, "upsample") else x
        return self.conv_out(F.silu(self.norm_out(x)))                            # (B, 3, 4T, f·h, f·w)


class VidTok(nn.Module):
    """The VAE: 1 + 4j frames become 1 + j latent frames, the first of which knows the first frame only."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = VAEEncoder(config), VAEDecoder(config)

    @property
    def latent_channels(self):
        return self.config.latent_channels

    @property
    def downsampling(self):
        """f, side of a frame / side of its latents."""
        return 2 ** (len(self.config.channel_mult) - 1)

    def encode(self, video):
        """video (B, 3, F, H, W) in [-1, 1] -> `Posterior` of (B, C, T, h, w). ValueError for shapes that do not fit."""
        check_clip(video, self.downsampling)
        # the first frame four times: with it alone in its group of four, every latent frame is made of four
        return Posterior(self.encoder(torch.cat([video[:, :, :1].expand(-1, -1, 3, -1, -1), video], 2)))

    def latents(self, video, sample_posterior=False):
        """video (B, 3, F, H, W) -> latents (B, C, T, h, w): the posterior's mean, or a sample of it. Not scaled."""
        posterior = self.encode(video)
        return posterior.sample() if sample_posterior else posterior.mean

    def decode(self, latents):
        """latents (B, C, T, h, w) -> video (B, 3, 1 + 4·(T - 1), H, W), about [-1, 1], not clamped."""
        return self.decoder(latents)[:, :, 3:]                                    # (B, 3, F, H, W)


class FrameVAE(nn.Module):
    """In place of VidTok, for small clips: an image VAE for every frame, and the latents of four frames side by side.

    The same shapes and the same causality, the first frame repeated too, but nothing is saved for what does not move:
    C is four times that of the images. Its VAE is trained in minutes (vae.py).
    """

    def __init__(self, vae):
        super().__init__()
        self.frame_vae = vae
        self.config, self.latent_channels = vae.config, 4 * vae.config.latent_channels
        self.downsampling = vae.downsampling

    def latents(self, video, sample_posterior=False):
        """video (B, 3, F, H, W) -> latents (B, C, T, h, w), scaled as those of images."""
        check_clip(video, self.downsampling)
        frames = video.transpose(1, 2).flatten(0, 1)                              # (B·F, 3, H, W)
        x = self.frame_vae.latents(frames, sample_posterior).unflatten(0, (len(video), -1))  # (B, F, C/4, h, w)
        x = torch.cat([x[:, :1].expand(-1, 3, -1, -1, -1), x], 1)                 # (B, 4·T, C/4, h, w)
        return x.unflatten(1, (-1, 4)).flatten(2, 3).transpose(1, 2)              # (B, C, T, h, w)

    def decode(self, latents):
        """latents (B, C, T, h, w) -> video (B, 3, 1 + 4·(T - 1), H, W)."""
        x = latents.transpose(1, 2).unflatten(2, (4, -1)).flatten(1, 2)[:, 3:]    # (B, F, C/4, h, w)
        return self.frame_vae.decode(x.flatten(0, 1)).unflatten(0, x.shape[:2]).transpose(1, 2)  # (B, 3, F, H, W)


def make_vae(config):
    """The VAE of a `VidTokConfig`, or of an image VAE's `VAEConfig`."""
    return VidTok(config) if isinstance(config, VidTokConfig) else FrameVAE(VAE(config))


def check_clip(video, f):
    """Raise ValueError unless `video` is (B, 3, 1 + 4j, H, W) with sides that are multiples of f."""
    if video.dim() != 5 or video.shape[1] != 3:
        raise ValueError(f"a video of shape {list(video.shape)}: expected (B, 3, F, H, W)")
    if video.shape[2] % 4 != 1:
        raise ValueError(f"{video.shape[2]} frames: expected 1 + 4n, as the VAE takes the first alone, the others by 4")
    for side in video.shape[3:]:
        if side % f or not side:
            raise ValueError(f"frame side {side} is not a multiple of the VAE's factor {f}; resize or crop to "
                             f"{max(side // f, 1) * f}")


if __name__ == "__main__":
    with torch.device("meta"):  # shapes without memory
        vae, video = VidTok(VidTokConfig()), torch.empty(1, 3, 17, 256, 256)
        latents = vae.latents(video)
        print(f"video {tuple(video.shape)} -> latents {tuple(latents.shape)} -> {tuple(vae.decode(latents).shape)}")
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters")
