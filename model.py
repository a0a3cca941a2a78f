"""
The tokenizer: an image becomes K ordered tokens, and any first k of them become a plausible image again.

    images (B,3,H,W) --VAE--> latents (B,C,h,w) --Encoder--> (B,K,L) --FSQ--> codes (B,K,L) in [-1,1] = tokens (B,K)
    images <--VAE-- latents <--flow sampler-- noise (B,C,h,w), where velocity = Decoder(x_t, t, first k codes)

Paper: FlexTok, arXiv 2502.13967. Numerically equal to the official code (test_all.py, section golden), with three
exact savings that it does not have; each is derived where it is made: search this file for SAVING.
Letters: B batch, C latent channels, h w latent grid, p patch size, N patches, K registers, k kept ones, L FSQ dimensions,
D width, nh hd heads and head size.

    python model.py         # prints who attends to whom, the shapes, and the sizes of d12-d12         Next: train_tokenizer.py
"""
import hashlib
import math
import os
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right

import flow
from common import UserError, load_tensors, load_weights, read_json, save_tensors, write_json
from fsq import FSQ
from vae import VAE, VAEConfig


@dataclass
class TokenizerConfig:
    """Sizes of encoder and decoder. The defaults are d12-d12 at 256 px, as released."""
    latent_channels: int = 16
    grid: tuple = (16, 16)            # patches (rows, columns) of a training image; other image sizes work too
    patch_size: int = 2               # latents per patch side
    enc_width: int = 768
    enc_depth: int = 12
    enc_head_dim: int = 64
    dec_width: int = 768
    dec_depth: int = 12
    dec_head_dim: int = 64
    registers: int = 256              # K, the most tokens an image can have
    levels: tuple = (8, 8, 8, 5, 5, 5)
    max_timestep: float = 1.0         # t is scaled so that this becomes 1000 in the time embedding
    drop_quant_p: float = 0.0         # see FSQ
    corrupt_tokens_p: float = 0.0     # see FSQ
    # Three standard deviations that matter at initialisation only. The values here are the official ones; small models
    # trained for minutes need larger ones to start using their tokens at all (README, FAQ).
    position_std: float = 0.02        # of the decoder's register positions
    code_std: float = 0.0             # of the decoder's first layer, the one that reads codes; 0: Xavier as all others
    head_std: float = 0.0             # of the encoder's last layer, the one that feeds FSQ
    repa_widths: tuple = ()           # official checkpoints may hold a REPA head; nothing here uses it, saving keeps it


# ---------------------------------------------------------------------------------------------------------------
# Parts of a transformer block


def norm(x):
    """LayerNorm over the last axis without learned scale or shift; torch computes its statistics in float32 for any dtype."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-5)


class Attention(nn.Module):
    """Self-attention with normalised queries and keys (QK-norm, arXiv 2010.04245). Linear layers have no bias."""

    def __init__(self, width, head_dim):
        super().__init__()
        if width % head_dim:
            raise ValueError(f"width {width} is not a multiple of head_dim {head_dim}")
        self.head_dim = head_dim
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, width, bias=False)
        self.wv = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x, attend, read=slice(None)):
        """x (B, n, D) -> (B, m, D), the m tokens that the slice `read` selects; all n may be looked at.

        `attend(q, k, v, scale)`: q (B, nh, m, hd), k and v (B, nh, n, hd) -> like q; who sees whom is its choice.
        """
        heads = lambda y: y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)    # noqa: E731, (B, n, D) -> (B, nh, n, hd)
        q, k, v = heads(self.wq(x[:, read])), heads(self.wk(x)), heads(self.wv(x))  # (B, nh, m or n, hd)
        # 8/hd is muP's 1/hd rule, made to equal the usual 1/√hd at head size 64        (official: attention.py)
        x = attend(norm(q).to(v.dtype), norm(k).to(v.dtype), v, scale=8 / self.head_dim)  # (B, nh, m, hd)
        return self.proj(x.transpose(1, 2).flatten(2))                            # (B, m, D)


class SwiGLU(nn.Module):
    """fc2(SiLU(fc1 x) · fc3 x), (B, n, D) -> (B, n, D) (arXiv 2002.05202); hidden size 8/3·D, rounded down as official."""

    def __init__(self, width):
        super().__init__()
        hidden = int(2 * (4 * width) / 3)  # 768 -> 2048, 1792 -> 4778
        self.fc1 = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)
        self.fc3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x):
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class Block(nn.Module):
    """Pre-norm transformer block: x += Attention(norm x); x += SwiGLU(norm x)."""

    def __init__(self, width, head_dim):
        super().__init__()
        self.attn = Attention(width, head_dim)
        self.mlp = SwiGLU(width)

    def forward(self, x, attend, read=slice(None)):
        """x (B, n, D) -> (B, m, D), the tokens in `read`: of the last block only those that the head reads. The others have
        done their part once its attention has seen them, and need neither query nor MLP there."""
        x = x[:, read] + self.attn(norm(x), attend, read)                         # (B, m, D)
        return x + self.mlp(norm(x))


class AdaLNBlock(nn.Module):
    """A block whose norms are shifted and scaled, and whose branches are gated, by functions of t (adaLN-zero, arXiv 2212.09748).

    Patches and registers share the weights and attend jointly, but have modulations of their own.
    """

    def __init__(self, width, head_dim):
        super().__init__()
        self.attn = Attention(width, head_dim)
        self.mlp = SwiGLU(width)
        self.adaln = nn.Linear(width, 12 * width)

    def modulation(self, t_embedding):
        """t_embedding (B or 1, D) -> (B or 1, 2 streams, 6, D)."""
        return self.adaln(F.silu(t_embedding)).unflatten(-1, (2, 6, -1))

    def forward(self, x, modulation, N, attend, read=slice(None)):
        """x (B, N + registers, D), modulation (B or 1, 2, 6, D) -> (B, m, D), the tokens in `read`, as in `Block`."""
        # official order, not DiT's: both gates first
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = modulation.unbind(2)  # each (B or 1, 2, D)
        x = x[:, read] + per_stream(self.attn(modulate(norm(x), shift_attn, scale_attn, N), attend, read), gate_attn, N)  # (B, m, D)
        return x + per_stream(self.mlp(modulate(norm(x), shift_mlp, scale_mlp, N)), gate_mlp, N)


def per_stream(x, gate, N):
    """Multiply the first N tokens of x (B, n, D) by gate[:, 0] and the others by gate[:, 1]; gate (B or 1, 2, D)."""
    return torch.cat([x[:, :N] * gate[:, :1], x[:, N:] * gate[:, 1:]], 1)         # (B, n, D)


def modulate(x, shift, scale, N):
    """x·(1 + scale) + shift, patches (the first N tokens) and registers each with their own; shift, scale (B or 1, 2, D)."""
    return torch.cat([x[:, :N] * (1 + scale[:, :1]) + shift[:, :1],
                      x[:, N:] * (1 + scale[:, 1:]) + shift[:, 1:]], 1)           # (B, n, D)


def sincos_2d(D, rows, columns):
    """Fixed positional table (1, D, rows, columns): sin and cos of the row in the first half, of the column in the second."""
    if D % 4:
        raise ValueError(f"width {D} is not a multiple of 4, which 2-D sine-cosine positions need")
    omega = 10000.0 ** -(torch.arange(D // 4, dtype=torch.float64) / (D // 4))    # (D/4,)
    row = (torch.arange(rows)[:, None] * omega).T[:, :, None].expand(-1, -1, columns)   # (D/4, rows, columns)
    column = (torch.arange(columns)[:, None] * omega).T[:, None, :].expand(-1, rows, -1)  # (D/4, rows, columns)
    return torch.cat([row.sin(), row.cos(), column.sin(), column.cos()]).float().unsqueeze(0)  # (1, D, rows, columns)


class PatchEmbed(nn.Module):
    """latents (B, C, h, w) -> patches (B, N, D) in row-major order, with fixed 2-D positions; N = h/p · w/p."""

    def __init__(self, channels, patch_size, width, grid):
        super().__init__()
        self.p = patch_size
        self.proj = nn.Linear(patch_size**2 * channels, width)
        self.register_buffer("positions", sincos_2d(width, *grid))                # (1, D, rows, columns), saved, as official

    def forward(self, latents):
        rows, columns = latents.shape[2] // self.p, latents.shape[3] // self.p
        positions = self.positions[:, :, :rows, :columns]                         # (1, D, <= rows, <= columns)
        if positions.shape[2:] != (rows, columns):  # larger than in training: the same waves, further out
            positions = sincos_2d(self.proj.out_features, rows, columns).to(positions)
        return self.proj(patchify(latents, self.p)) + positions.flatten(2).transpose(1, 2)  # (B, N, D)


def patchify(latents, p):
    """(B, C, h, w) -> (B, N, p·p·C), the channel fastest. Raises ValueError if p does not divide h and w."""
    B, C, h, w = latents.shape
    if h % p or w % p:
        raise ValueError(f"latent grid {h} x {w} is not a multiple of the patch size {p}; resize or crop the image")
    x = latents.view(B, C, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)        # (B, h/p, w/p, p, p, C)
    return x.reshape(B, (h // p) * (w // p), p * p * C)                           # (B, N, p·p·C)


def unpatchify(patches, p, h, w):
    """Inverse of `patchify`: (B, N, p·p·C) -> (B, C, h, w)."""
    x = patches.view(len(patches), h // p, w // p, p, p, -1).permute(0, 5, 1, 3, 2, 4)  # (B, C, h/p, p, w/p, p)
    return x.reshape(len(patches), -1, h, w)                                      # (B, C, h, w)


def init_linear(module):
    """Xavier-uniform weights and zero biases for every linear layer below `module`, as official."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def token_parameter(*shape, std=0.02):
    """A learned vector (or several), drawn from a normal cut at ±2 (official: an absolute cut, not one in std)."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=std))


# ---------------------------------------------------------------------------------------------------------------
# Encoder


def prefix_causal_attention(N, k):
    """N patches see all patches; register j of k sees all patches and registers 0..j. Returns an `attend` for `Attention`.

    SAVING 2. Written as one attention with a mask, this is a dense (N+K)² mask, which leaves the fast kernels. But the
    mask has only two kinds of rows: patch rows see exactly the patches, so they are attention without any mask; register
    rows see everything but the registers to their right, which is causal attention aligned at the lower right corner.
    Two calls without a dense mask compute the same numbers. And because nothing ever looks at register j from before
    it, leaving out the registers from k on does not change the first k: k tokens cost N + k.
    """
    # FORK: another attention mask
    mask = causal_lower_right(k, N + k)
    def attend(q, keys, v, scale):
        registers = F.scaled_dot_product_attention(q[:, :, -k:], keys, v, attn_mask=mask, scale=scale)     # (B, nh, k, hd)
        if q.shape[2] == k:  # in the last block only registers ask
            return registers
        patches = F.scaled_dot_product_attention(q[:, :, :N], keys[:, :, :N], v[:, :, :N], scale=scale)    # (B, nh, N, hd)
        return torch.cat([patches, registers], 2)                                 # (B, nh, N + k, hd)
    return attend


class Encoder(nn.Module):
    """latents (B, C, h, w), scaled -> (B, k, L) unbounded numbers for FSQ: what register tokens read from the patches."""

    def __init__(self, config):
        super().__init__()
        self.patch_embed = PatchEmbed(config.latent_channels, config.patch_size, config.enc_width, config.grid)
        self.blocks = nn.ModuleList(Block(config.enc_width, config.enc_head_dim) for _ in range(config.enc_depth))
        self.head = nn.Linear(config.enc_width, len(config.levels))
        init_linear(self)
        nn.init.normal_(self.head.weight, std=config.head_std)
        self.registers = token_parameter(config.registers, config.enc_width)      # (K, D)

    def forward(self, latents, k=None):
        """k: how many registers, the first ones; None is all K. Raises ValueError if k is not in 1..K."""
        K = len(self.registers)
        k = K if k is None else k
        if not 1 <= k <= K:
            raise ValueError(f"k={k}: expected 1 to {K} tokens")
        patches = self.patch_embed(latents)                                       # (B, N, D)
        B, N, _ = patches.shape
        x = torch.cat([patches, self.registers[:k].expand(B, -1, -1)], 1)         # (B, N + k, D)
        attend = prefix_causal_attention(N, k)
        for block in self.blocks[:-1]:
            x = block(x, attend)                                                  # (B, N + k, D)
        x = self.blocks[-1](x, attend, slice(N, None))                            # (B, k, D)
        return self.head(norm(x))                                                 # (B, k, L)


# ---------------------------------------------------------------------------------------------------------------
# Nested dropout


def sample_k(B, K, mode, generator=None, few_power=0.0):
    """How many tokens each training sample keeps: (B,) int64 in 1..K, on the CPU so that grouping by k needs no GPU sync.

    This is what orders the tokens: early ones are kept more often, so what matters most moves to the front (nested
    dropout, arXiv 1402.0915). Modes: "uniform" over 1..K; "pow2" over 1, 2, 4, ..., K, with chances as 1/i^few_power of the
    i-th: at 0 as much training for 1 token as for 256, above it more for few, for a decoder that must learn to paint much
    from little; "uniform_pow2" uniform, then rounded up to a power of two (half of the samples keep all K). Raises
    ValueError for another mode, and for a few_power below 0 or with a mode that has none.
    """
    # FORK: another k schedule
    if few_power < 0 or few_power and mode != "pow2":
        raise ValueError(f"few_power={few_power} with nested dropout mode {mode!r}: expected 0, or above 0 with pow2")
    if mode == "uniform":
        return torch.randint(1, K + 1, (B,), generator=generator)
    if mode == "pow2":
        choices = torch.tensor(powers_of_two(K))
        chances = torch.arange(1.0, len(choices) + 1)**-few_power
        return choices[torch.multinomial(chances, B, replacement=True, generator=generator)]  # (B,)
    if mode == "uniform_pow2":
        return round_up_to_pow2(torch.randint(1, K + 1, (B,), generator=generator)).clamp(max=K)
    raise ValueError(f"nested dropout mode {mode!r}: expected uniform, pow2 or uniform_pow2")


def powers_of_two(K):
    """[1, 2, 4, ..., K]: the numbers of tokens at which reconstructions are shown and measured; K is always the last."""
    return [2**i for i in range(K.bit_length()) if 2**i < K] + [K]


def round_up_to_pow2(k):
    """k (B,) int64 >= 1 -> the next power of two at or above each."""
    return 2 ** (k - 1).double().add(0.5).log2().ceil().clamp(min=0).long()       # k-1+0.5 is never itself a power


# ---------------------------------------------------------------------------------------------------------------
# Decoder


class TimeEmbed(nn.Module):
    """t (B,) in [0, max_timestep] -> (B, D): 256 cosines and sines of t through a two-layer MLP."""

    def __init__(self, width, max_timestep):
        super().__init__()
        self.max_timestep = max_timestep
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        # max_period is 256, not the usual 10,000. Angles reach 1000 radians, so the rounding of the frequencies shows:
        # exp(...) in float32 and in this order is within 2e-6 of official, pow(256, -j/128) is 1e-5 off.
        j = torch.arange(128, dtype=torch.float32, device=t.device)               # (128,)
        frequencies = 1000 / self.max_timestep * torch.exp(-math.log(256) * j / 128)
        angles = t.float()[:, None] * frequencies                                 # (B, 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1))               # (B, 256) -> (B, D)


class Decoder(nn.Module):
    """A flow network: noisy latents x_t, time t and the first k codes -> velocity. No sample ever sees another."""

    def __init__(self, config):
        super().__init__()
        D, C, self.p, self.K = config.dec_width, config.latent_channels, config.patch_size, config.registers
        self.patch_embed = PatchEmbed(C, self.p, D, config.grid)
        self.from_codes = nn.Linear(len(config.levels), D)
        self.time_embed = TimeEmbed(D, config.max_timestep)
        self.blocks = nn.ModuleList(AdaLNBlock(D, config.dec_head_dim) for _ in range(config.dec_depth))
        self.head_adaln = nn.Linear(D, 2 * D)
        self.head = nn.Linear(D, self.p**2 * C)
        init_linear(self)
        if config.code_std > 0:
            nn.init.normal_(self.from_codes.weight, std=config.code_std)
        # adaLN-zero: at the start every block is the identity and the velocity is 0
        for layer in [block.adaln for block in self.blocks] + [self.head_adaln, self.head]:
            nn.init.zeros_(layer.weight)
        self.positions = token_parameter(self.K, D, std=config.position_std)      # (K, D), of the registers
        self.mask_token = token_parameter(D)                                      # stands for a dropped register
        self.null_token = token_parameter(D)                                      # stands for every register: "no condition"

    def forward(self, x_t, t, codes, k_keep=None, null=None):
        """x_t (B, C, h, w), t (B,) or (1,) in [0, 1], codes (B, k, L) with 0 <= k <= K -> velocity (B, C, h, w).

        The K - k registers after `codes` count as dropped. k_keep (B,), at most k: sample i keeps only its first
        k_keep[i]. null (B,) bool: sample i has no condition at all, its codes are ignored.
        """
        return self.velocity(x_t, self.modulations(t), codes, k_keep, null)

    def modulations(self, t):
        """All that t decides: t (B,) or (1,) -> for each block (B or 1, 2, 6, D), and last for the head (B or 1, 2, 1, D).

        SAVING 3. When all samples share t, there is one row: these layers, as large as all others of the blocks together,
        then run once per step, for all images and for both passes of guidance (and never once per token).
        """
        t_embedding = self.time_embed(t)                                          # (B or 1, D)
        head = self.head_adaln(F.silu(t_embedding)).unflatten(-1, (2, 1, -1))     # (B or 1, 2, 1, D)
        return [*(block.modulation(t_embedding) for block in self.blocks), head]

    def velocity(self, x_t, modulations, codes, k_keep=None, null=None):
        """`forward`, with what `modulations` returned in place of t."""
        B, C, h, w = x_t.shape
        patches = self.patch_embed(x_t)                                           # (B, N, D)
        registers, heavy = self.registers_of(codes, k_keep, null)                 # (B, k or k + 1, D)
        x = torch.cat([patches, registers], 1)                                    # (B, n, D)
        N = patches.shape[1]
        attend = full_attention(x.shape[1], heavy, x.device)
        *of_blocks, of_head = modulations
        for block, modulation in zip(self.blocks[:-1], of_blocks):
            x = block(x, modulation, N, attend)                                   # (B, n, D)
        x = self.blocks[-1](x, of_blocks[-1], N, attend, slice(0, N))             # (B, N, D)
        shift, scale = of_head.unbind(1)                                          # each (B or 1, 1, D)
        return unpatchify(self.head(norm(x) * (1 + scale) + shift), self.p, h, w)  # (B, C, h, w)

    def registers_of(self, codes, k_keep, null):
        """The registers' input, and for how many equal ones the last of them stands: (B, k or k + 1, D), int."""
        B, k, _ = codes.shape
        if k > self.K:
            raise ValueError(f"{k} tokens, but this model has {self.K} registers")
        registers = self.from_codes(codes) + self.positions[:k]                   # (B, k, D)
        if k_keep is not None:
            kept = torch.arange(k, device=codes.device) < k_keep.to(codes.device, non_blocking=True)[:, None]  # (B, k)
            # after the position was added: all dropped registers are one and the same vector
            registers = torch.where(kept[..., None], registers, self.mask_token)
        if k < self.K:
            registers = torch.cat([registers, self.mask_token.expand(B, 1, -1).to(registers.dtype)], 1)  # (B, k + 1, D)
        if null is not None:
            registers = torch.where(null.to(codes.device, non_blocking=True)[:, None, None], self.null_token, registers)
        return registers, self.K - k


def full_attention(n, heavy, device):
    """Everyone sees everyone; the last of the n tokens counts `heavy` times. Returns an `attend` for `Attention`.

    SAVING 1. The K - k dropped registers enter as the same vector, with no position, no mask and the same modulation: by
    symmetry they leave every block as the same vector again. So one of them is enough, if attention still counts them
    all. In softmax(q·key), m equal keys put m·exp(s) where one puts exp(s); and m·exp(s) = exp(s + log m): adding log m
    to that key's logit is exact. Its value is then weighted m times too, as m equal values would be. So N + k + 1 tokens
    compute what N + K did, gradients included (they are the same function), and the null condition costs N + 1.

    The logit is added inside the dot product: in a channel of its own, queries hold 1/scale, the last key log m, other keys
    0. (A bias would do, but CUDA's flash kernel takes none.) bfloat16 rounds log m by up to 0.4 %, which would count up to
    1.6 % too many or too few; so three channels share it, each with what those before it rounded away. Five more hold
    zeros, and v gets eight: that kernel wants q, k and v of one size, a multiple of 8.
    """
    extra = None
    if heavy > 1:  # heavy = 1: log 1 = 0; heavy = 0: no register was dropped
        extra, rest = torch.zeros(n, 8, device=device), math.log(heavy)           # (n, 8)
        for channel in range(3):
            extra[-1, channel] = part = torch.tensor(rest, device="cpu").bfloat16().item()
            rest -= part
    def attend(q, k, v, scale):
        if extra is None:
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        q = F.pad(q, (0, 8), value=1 / scale)                                     # (B, nh, m, hd + 8)
        k = torch.cat([k, extra.to(k.dtype).expand(*k.shape[:2], -1, -1)], -1)    # (B, nh, n, hd + 8)
        return F.scaled_dot_product_attention(q, k, F.pad(v, (0, 8)), scale=scale)[..., :-8]  # (B, nh, m, hd)
    return attend


# ---------------------------------------------------------------------------------------------------------------
# FlexTok


VAE_PIXELS = 8 * 256 * 256  # that the VAE is given at once, but at least one whole image


def vae_slices(x, pixels):
    """x (B, ...), images or their latents of so many pixels each -> parts of the batch, so that the VAE's feature maps fit.

    An image is not cut into tiles: GroupNorm and the VAE's attention look at all of it, so that tiles would change the result.
    """
    return x.split(max(1, VAE_PIXELS // pixels))


class FlexTok(nn.Module):
    """The whole tokenizer: VAE (frozen), encoder, FSQ, decoder.

    >>> tokenizer = FlexTok.from_pretrained("assets/emoji64")
    >>> tokens = tokenizer.tokenize(images)                        # list of B tensors (1, K)
    >>> images = tokenizer.detokenize([t[:, :16] for t in tokens])
    """

    def __init__(self, config, vae):
        super().__init__()
        if config.latent_channels != vae.config.latent_channels:
            raise ValueError(f"the tokenizer takes {config.latent_channels} latent channels, the VAE has "
                             f"{vae.config.latent_channels}")
        self.config = config
        self.vae = vae.requires_grad_(False)
        self.encoder = Encoder(config)
        self.fsq = FSQ(config.levels, config.drop_quant_p, config.corrupt_tokens_p)     # FORK: another quantizer
        self.decoder = Decoder(config)
        widths = list(zip(config.repa_widths, config.repa_widths[1:]))
        self.repa_head = nn.ModuleList(nn.Linear(a, b) for a, b in widths).requires_grad_(False)
        self.one_group = False  # training: whether all samples go through together, see `forward`
        self.official = {}  # the config of the official checkpoint that this came from, for `export_official`
        self.notes = {}     # what else its config.json said, if it was read from one of ours: how it was trained, and more

    @property
    def image_size(self):
        """(H, W) of the training images, in pixels."""
        return tuple(side * self.config.patch_size * self.vae.downsampling for side in self.config.grid)

    def forward(self, latents, x_t, t, k_keep, null):
        """One training pass: latents, x_t (B, C, h, w), t (B,) -> velocity (B, C, h, w).

        k_keep (B,) int64 and null (B,) bool live on the CPU (grouping must not wait for the GPU). Samples that keep about
        as many tokens go through encoder and decoder together, so that one with few tokens costs little more than 2·N, not
        2·(N + K): neither the first k registers nor the decoder look at those from k on, so these have no gradient either.
        """
        # Each k goes into the group of the next power of two. Those up to 16 share one: a small group costs more in calls
        # than its few tokens save. The null condition is group 0, which needs no encoder. With k = 1 it is a group large
        # enough to pay if the two are a quarter of the batch. (So the encoder always runs, if only for codes that are
        # ignored, and every parameter has a gradient, if only zero: processes that share gradients rely on it.)
        K = self.config.registers
        group = torch.where(null, 0, round_up_to_pow2(k_keep).clamp(min(16, K), K))  # (B,)
        few = null | (k_keep == 1)                                                # (B,)
        if 4 * few.sum() >= len(few):
            group[few] = 1
        if self.one_group:  # as many calls on every process, whatever its k are: split weights are gathered in each
            group = torch.full_like(group, K)
        order, velocities = [], []
        for k in group.unique().tolist():
            members = (group == k).nonzero().squeeze(1)                           # (b,)
            order.append(members)
            i = members.to(latents.device, non_blocking=True)
            codes = self.fsq(self.encoder(latents[i], k))[0] if k else latents.new_zeros(len(i), 0, len(self.config.levels))  # (b, k, L)
            velocities.append(self.decoder(x_t[i], t[i], codes, k_keep[members], null[members]))
        back = torch.cat(order).argsort().to(latents.device, non_blocking=True)   # (B,)
        return torch.cat(velocities)[back]                                        # (B, C, h, w)

    def compile_blocks(self, **options):
        """torch.compile the blocks of encoder and decoder; options go to torch.compile. Changes no name in the state dict.

        The blocks of each share their graphs, and the number of tokens is dynamic in them. Tokenising makes four graphs and
        detokenising four, whatever the k are: middle and last block, in the encoder each for one register and for several,
        in the decoder each with dropped registers and without. Batches of one make their own.
        """
        for block in [*self.encoder.blocks, *self.decoder.blocks]:
            block.compile(dynamic=True, **options)

    @torch.no_grad()
    def tokenize(self, images, k=None, sample_posterior=False):
        """images (B, 3, H, W) in [-1, 1] -> list of B int64 tensors (1, k); k=None gives all K.

        Uses the mean of the VAE's posterior, so that it is repeatable; `sample_posterior=True` draws from it, as the
        official code does. Asking for k tokens costs less and gives the first k of all of them.
        """
        images = images.to(self.decoder.mask_token.device)
        latents = torch.cat([self.vae.latents(part, sample_posterior) for part in vae_slices(images, images.shape[-2] * images.shape[-1])])  # (B, C, h, w)
        _, tokens = self.fsq(self.encoder(latents, k))
        return list(tokens.split(1))                                              # B x (1, k)

    @torch.no_grad()
    def detokenize(self, tokens, timesteps=25, guidance_scale=7.5, perform_norm_guidance=True, generator=None,
                   vae_image_sizes=None):
        """List of B integer tensors (1, k_i) or (k_i,), 1 <= k_i <= K -> images (B, 3, H, W), about [-1, 1], unclamped.

        timesteps: Euler steps. guidance_scale: 1.0 is no guidance; a number or a function of t. perform_norm_guidance:
        APG instead of CFG. generator: makes it repeatable; noise is drawn image by image, so one seed gives what the
        official code gives. vae_image_sizes: size of the latent grid (not of the image), an int or a list of B equal
        (h, w); None is the size of training. Raises ValueError for tokens that are no such list.
        """
        if timesteps < 1:
            raise ValueError(f"timesteps={timesteps}: expected at least 1")
        device = self.decoder.mask_token.device
        codes, k_keep = self.codes_of(tokens)                                     # (B, k, L), (B,)
        B, (h, w) = len(codes), self._latent_size(vae_image_sizes, len(codes))
        draw_on = generator.device if generator is not None else device
        noise = torch.cat([torch.randn(1, self.config.latent_channels, h, w, generator=generator, device=draw_on)
                           for _ in range(B)]).to(device)                         # (B, C, h, w)
        # the null condition needs no token, but with one, which it ignores, it shares its graphs with small k when compiled
        nothing, everyone = codes[:, :1], torch.ones(B, dtype=torch.bool, device=device)
        modulations = lru_cache(1)(self.decoder.modulations)  # both passes of a step get the very same t
        latents = flow.euler(flow.guided(
            v_cond=lambda x, t: self.decoder.velocity(x, modulations(t), codes, k_keep).float(),
            v_uncond=lambda x, t: self.decoder.velocity(x, modulations(t), nothing, null=everyone).float(),
            cfg_scale=guidance_scale,
            combine=flow.APG() if perform_norm_guidance else flow.cfg), noise, timesteps)
        # a few at a time: the VAE's finest level holds 512 times what its latents do
        return torch.cat([self.vae.decode(part) for part in vae_slices(latents, h * w * self.vae.downsampling**2)])  # (B, 3, H, W)

    def codes_of(self, tokens):
        """List of B integer tensors (1, k_i) or (k_i,) -> codes (B, k, L), padded; k_keep (B,), or None if equal."""
        if not len(tokens):
            raise ValueError("no tokens to decode: the list is empty")
        device = self.decoder.mask_token.device
        rows = [torch.as_tensor(row, device=device) for row in tokens]
        for i, row in enumerate(rows):
            if row.is_floating_point() or row.dtype == torch.bool or row.dim() not in (1, 2) or row.dim() == 2 and len(row) != 1:
                raise ValueError(f"image {i}: tokens are {row.dtype} of shape {list(row.shape)}, expected integers (1, k) or (k,)")
            rows[i] = row = row.reshape(-1).long()                                # (k_i,)
            if not 1 <= len(row) <= self.config.registers:
                raise ValueError(f"image {i} has {len(row)} tokens, expected 1 to {self.config.registers}")
        lengths = torch.tensor([len(row) for row in rows], device=device)         # (B,)
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)                # (B, k)
        same = all(len(row) == len(rows[0]) for row in rows)
        return self.fsq.tokens_to_codes(padded), None if same else lengths

    def _latent_size(self, sizes, B):
        """The (h, w) that `detokenize`'s vae_image_sizes asks for."""
        if sizes is None:
            return tuple(side * self.config.patch_size for side in self.config.grid)
        if isinstance(sizes, int):
            return sizes, sizes
        if len(sizes) != B or any(isinstance(size, int) or tuple(size) != tuple(sizes[0]) for size in sizes):
            raise ValueError(f"vae_image_sizes {sizes}: expected one (h, w) for each of {B} images, all equal")
        return tuple(sizes[0])

    def fingerprint(self):
        """A hash of all that decides an image's tokens, so that a prior is never used with another tokenizer's."""
        # the weights, and the three settings that leave no trace in their shapes
        digest = hashlib.sha256(repr((self.fsq.levels, self.config.enc_head_dim, self.vae.config.scaling_factor)).encode())
        for module in (self.vae, self.encoder):
            for tensor in module.state_dict().values():
                digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())  # (bytes,): numpy has no bfloat16
        return digest.hexdigest()

    @property
    def recommended_guidance(self):
        """The guidance scale that its config.json names under "sampling"; 7.5, the official default, if nothing does."""
        return self.notes.get("sampling", {}).get("guidance_scale", 7.5)

    def save_pretrained(self, directory, dtype=torch.float32, **notes):
        """Write `directory`/config.json (sizes, and `notes`: anything JSON holds) and model.safetensors in `dtype`."""
        origin = {"official": self.official} if self.official else {}
        write_json(os.path.join(directory, "config.json"),
                   {"format": "minFlexTok", "tokenizer": asdict(self.config), "vae": asdict(self.vae.config), **origin, **notes})
        tensors = self.state_dict()
        save_tensors(os.path.join(directory, "model.safetensors"), tensors, dtype, keep=fixed_tables(tensors))

    @classmethod
    def from_pretrained(cls, name, device="cpu", dtype=torch.float32):
        """Read a tokenizer, ours or an official one: a directory, a safetensors file, or a name on the Hugging Face hub.

        In eval mode. dtype: of the weights; None is as stored; models in 16 bits run under torch.autocast. Raises UserError
        naming the file and the reason.
        """
        path = os.path.join(name, "config.json")
        saved = read_json(path) if os.path.isfile(path) else None
        if not isinstance(saved, dict) or saved.get("format") != "minFlexTok":
            from extras.pretrained import read_flextok
            return read_flextok(name, device, dtype)
        try:
            model = unloaded(TokenizerConfig(**_tuples(saved["tokenizer"])), VAEConfig(**_tuples(saved["vae"])))
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise UserError(f"{path}: does not describe a tokenizer ({str(error).splitlines()[0]})") from None
        model.official = saved.get("official", {})
        model.notes = {name: value for name, value in saved.items() if name not in ("format", "tokenizer", "vae", "official")}
        weights = os.path.join(name, "model.safetensors")
        tensors = load_tensors(weights)
        load_weights(model, tensors, weights, device, dtype, keep=fixed_tables(tensors))
        return model.to(device).eval()


def unloaded(config, vae_config):
    """A FlexTok whose tensors have shapes but no memory yet, for `load_weights` to fill. Raises ValueError for silly sizes."""
    layers = (config.enc_depth + config.dec_depth + len(config.repa_widths)
              + vae_config.layers_per_block * len(vae_config.block_out_channels))
    if layers > 1000:  # even without memory, a billion layers would never end
        raise ValueError(f"{layers} layers, at most 1000 are read")
    with torch.device("meta"):
        model = FlexTok(config, VAE(vae_config))
    model.fsq = FSQ(config.levels, config.drop_quant_p, config.corrupt_tokens_p)  # its constants are in no file
    return model


def fixed_tables(names):
    """Those of the tensor names that are sine-cosine tables: they stay float32, so that larger grids continue them exactly."""
    return [name for name in names if name.endswith("patch_embed.positions")]


def _tuples(fields):
    """JSON has lists where our dataclasses have tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in dict(fields).items()}


if __name__ == "__main__":
    N, K = 4, 4
    print("Encoder: who (row) sees whom (column); p patch, r register. In the decoder everyone sees everyone.")
    names = ["p"] * N + [f"r{j}" for j in range(K)]
    print("     " + " ".join(f"{name:>2}" for name in names))
    one_hot = torch.eye(N + K).view(1, 1, N + K, N + K)                           # values that tell whom they come from
    seen = prefix_causal_attention(N, K)(torch.zeros_like(one_hot), torch.zeros_like(one_hot), one_hot, scale=1.0)[0, 0]
    for name, row in zip(names, seen):
        print(f"  {name:>2} " + " ".join(" x" if weight > 0 else " ." for weight in row))
    with torch.device("meta"):  # shapes without memory
        encoder, decoder = Encoder(TokenizerConfig()), Decoder(TokenizerConfig())
        latents = torch.empty(2, 16, 32, 32)
        codes = encoder(latents)
        velocity = decoder(latents, torch.empty(2), codes[:, :16])
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    print(f"d12-d12: latents {tuple(latents.shape)} -> codes {tuple(codes.shape)} -> velocity {tuple(velocity.shape)}; "
          f"{count(encoder):,} + {count(decoder):,} trainable parameters")
