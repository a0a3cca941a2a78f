"""
The tokenizer: an image becomes K ordered tokens, and any first k of them become a plausible image again.

    images (B,3,H,W) --VAE--> latents (B,C,h,w) --Encoder--> (B,K,L) --FSQ--> codes (B,K,L) in [-1,1] = tokens (B,K)
    images <--VAE-- latents <--flow sampler-- noise (B,C,h,w), where velocity = Decoder(x_t, t, first k codes)

A *register* is a learned vector that joins the patches of an image as one more token. It stands for no place in it:
what it holds after the encoder is what attention let it gather from the whole image, and that, quantised, is one token.

Paper: FlexTok, arXiv 2502.13967. Numerically equal to the official code (test_all.py, section golden), with three
exact savings that it does not have, each derived where it is made: search for SAVING. Where to change something for an
experiment of your own: search for FORK.
Letters: B batch, C latent channels, h w latent grid, p patch size, N patches, K registers, k kept ones, L numbers in a
code, D width, nh hd heads and head size.

    python model.py         # prints who attends to whom, shapes, and the size of d12-d12      Next: train_tokenizer.py
"""
import functools
import math
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, make_dataclass

import torch
import torch.nn.functional as F
from torch import nn

import flow
from common import (UserError, checked, compile_blocks, digest_of, load_tensors, load_weights, read_json, save_tensors,
                    shipped, shown, write_json)
from fsq import FSQ
from images import check_images
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
    # Three standard deviations that matter at initialisation only. The values here are the official ones; small models
    # trained for minutes need larger ones to start using their tokens at all (tiny.py says why).
    position_std: float = 0.02        # of the decoder's register positions
    code_std: float = 0.0             # of the decoder's first layer, the one that reads codes; 0: Xavier as all others
    head_std: float = 0.0             # of the encoder's last layer, the one that feeds the quantiser
    scale_codes: bool = False         # what feeds the quantiser has a mean square of 1; official: False

    def __post_init__(self):
        if len(self.grid) != 2:
            raise ValueError(f"grid {self.grid}: expected (rows, columns)")


# ---------------------------------------------------------------------------------------------------------------
# Parts of a transformer block


def norm(x):
    """LayerNorm over the last axis, no learned scale or shift; torch takes its statistics in float32 for any dtype."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-5)


class Attention(nn.Module):
    """Self-attention with normalised queries and keys (QK-norm, arXiv 2010.04245). Linear layers have no bias."""

    def __init__(self, width, head_dim):
        super().__init__()
        if width % head_dim:
            raise ValueError(f"width {width} is not a multiple of head_dim {head_dim}")
        self.head_dim = head_dim
        self.wq, self.wk, self.wv, self.proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x, attend, seen=None):
        """x (B, m, D) -> like x: what these tokens read from those in `seen` (B, n, D); None: from each other.

        `attend(q, k, v, scale)`: q (B, nh, m, hd), k and v (B, nh, n, hd) -> like q; who sees whom is its choice.
        """
        def heads(y):
            return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)           # (B, n, D) -> (B, nh, n, hd)
        seen = x if seen is None else seen
        q, k, v = heads(self.wq(x)), heads(self.wk(seen)), heads(self.wv(seen))   # (B, nh, m or n, hd)
        # 8/hd is muP's 1/hd rule, made to equal the usual 1/√hd at head size 64        (official: attention.py)
        x = attend(norm(q).to(v.dtype), norm(k).to(v.dtype), v, scale=8 / self.head_dim)  # (B, nh, m, hd)
        return self.proj(x.transpose(1, 2).flatten(2))                            # (B, m, D)


class SwiGLU(nn.Module):
    """fc2(SiLU(fc1 x) · fc3 x), (B, n, D) -> (B, n, D) (arXiv 2002.05202); hidden size 8/3·D, rounded down."""

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

    def forward(self, x, attend, seen=None):
        """x (B, n, D) -> like x. Its tokens look at each other, or at all those in `seen` if that is given.

        In the last block it is: only x is read after it, so the other tokens are looked at, and need no query, no MLP.
        """
        x = x + self.attn(norm(x), attend, None if seen is None else norm(seen))  # (B, n, D)
        return x + self.mlp(norm(x))


class AdaLNBlock(nn.Module):
    """A block whose norms are shifted and scaled, and whose branches are gated, by functions of t.

    Patches and registers share the weights and attend jointly, but have modulations of their own, for t says
    different things of them: of a patch, how much of it is noise; a register is clean at every t, and t says only how
    much it is needed. adaLN-zero (arXiv 2212.09748): the functions of t start at zero, gates included, so that a new
    network is the identity.
    """

    def __init__(self, width, head_dim):
        super().__init__()
        self.attn = Attention(width, head_dim)
        self.mlp = SwiGLU(width)
        self.adaln = nn.Linear(width, 12 * width)

    def modulation(self, t_embedding):
        """t_embedding (B or 1, D) -> (B or 1, 2 streams, 6, D)."""
        return self.adaln(F.silu(t_embedding)).unflatten(-1, (2, 6, -1))

    def forward(self, x, modulation, N, attend, seen=None):
        """x (B, n, D), N patches and then registers; modulation (B or 1, 2, 6, D) -> like x. `seen` as in `Block`."""
        # official order, not DiT's: both gates first
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = modulation.unbind(2)  # each (B or 1, 2, D)
        seen = None if seen is None else modulate(norm(seen), shift_attn, scale_attn, N)  # all tokens
        x = x + per_stream(self.attn(modulate(norm(x), shift_attn, scale_attn, N), attend, seen), gate_attn, N)
        return x + per_stream(self.mlp(modulate(norm(x), shift_mlp, scale_mlp, N)), gate_mlp, N)


def per_stream(x, gate, N):
    """Multiply the first N tokens of x (B, n, D) by gate[:, 0] and the others by gate[:, 1]; gate (B or 1, 2, D)."""
    return torch.cat([x[:, :N] * gate[:, :1], x[:, N:] * gate[:, 1:]], 1)         # (B, n, D)


def modulate(x, shift, scale, N):
    """x·(1 + scale) + shift, each with its own for the first N tokens and the others; shift, scale (B or 1, 2, D)."""
    scale = 1 + scale
    return torch.cat([x[:, :N] * scale[:, :1] + shift[:, :1], x[:, N:] * scale[:, 1:] + shift[:, 1:]], 1)  # (B, n, D)


def sincos_2d(D, rows, columns):
    """Fixed positions (1, D, rows, columns): sin and cos of the row in the first half of D, then of the column."""
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
        self.register_buffer("positions", sincos_2d(width, *grid))                # (1, D, rows, columns), saved

    def forward(self, latents):
        rows, columns = latents.shape[2] // self.p, latents.shape[3] // self.p
        positions = self.positions[:, :, :rows, :columns]                         # (1, D, <= rows, <= columns)
        if positions.shape[2:] != (rows, columns):  # larger than in training: the same waves, further out
            positions = sincos_2d(self.proj.out_features, rows, columns).to(positions, non_blocking=True)
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
    """Patches see patches; register j of k sees all patches and registers 0..j. Returns an `attend` for `Attention`.

    Registers are causal because a prefix must mean the same whatever follows: the first k then are the image's
    description in k tokens, however many are asked for. And a prior that writes tokens from left to right can only take
    into account what stands before. Patches see no register, or an early one would see a later one through them.

    SAVING 1. As one attention this needs a dense (N+K)² mask, which the fast kernels do not take. But it has only two
    kinds of rows: patches see exactly the patches, which is attention without a mask; registers see all but those to
    their right, which is causal attention aligned at the lower right corner. Two calls compute the same numbers. And as
    nothing before register j looks at it, leaving out the registers from k on changes no other: k tokens cost N + k.
    """
    # FORK: another attention mask. `attend` must answer queries of all N + k tokens, and of the k registers alone.
    from torch.nn.attention.bias import causal_lower_right  # late: it loads torch's compiler, which takes a second
    mask = causal_lower_right(k, N + k)
    attention = F.scaled_dot_product_attention
    def attend(q, keys, v, scale):
        registers = attention(q[:, :, -k:], keys, v, attn_mask=mask, scale=scale)  # (B, nh, k, hd)
        if q.shape[2] == k:  # in the last block only registers ask
            return registers
        patches = attention(q[:, :, :N], keys[:, :, :N], v[:, :, :N], scale=scale)  # (B, nh, N, hd)
        return torch.cat([patches, registers], 2)                                 # (B, nh, N + k, hd)
    return attend


class Encoder(nn.Module):
    """latents (B, C, h, w), scaled -> (B, k, L) unbounded, for the quantiser: what registers read from the patches."""

    def __init__(self, config, code_width):
        super().__init__()
        self.patch_embed = PatchEmbed(config.latent_channels, config.patch_size, config.enc_width, config.grid)
        self.blocks = nn.ModuleList(Block(config.enc_width, config.enc_head_dim) for _ in range(config.enc_depth))
        self.head = nn.Linear(config.enc_width, code_width)
        init_linear(self)
        nn.init.normal_(self.head.weight, std=config.head_std)
        self.scale_codes = config.scale_codes
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
        x = self.blocks[-1](x[:, N:], attend, seen=x)                             # (B, k, D)
        x = self.head(norm(x))                                                    # (B, k, L)
        # FSQ's tanh is flat at both ends. The first steps of a short run can push all numbers there; then all images
        # get one code, and no gradient leads back. Scaled, they keep to its slope: only corners of the grid go unused.
        return F.rms_norm(x.float(), x.shape[-1:]) if self.scale_codes else x     # (B, k, L)


def make_quantizer(config):
    """The quantiser, built here and nowhere else: an nn.Module that makes codes and tokens of the encoder's numbers.

        forward(latents (B, k, code_width)) -> codes (B, k, code_width) float32, tokens (B, k) int64 in [0, vocab_size)
        codes_to_tokens(codes) -> tokens        tokens_to_codes(tokens) -> codes, ValueError for no tokens
        vocab_size, code_width: whole numbers, from which encoder, decoder, priors and token files take their sizes

    Codes hand the decoder's gradient on to `latents`, usually straight through the rounding, and are computed in
    float32 also under autocast. Parameters and persistent buffers are trained, averaged, saved and loaded with all
    others; several processes rely on each parameter having a gradient after every backward pass, if only zero. Settings
    that decide tokens and are no tensors stand in its `extra_repr`, which `FlexTok.fingerprint` reads. `forward` draws
    no random numbers, or a resumed run is another.
    """
    # FORK: another quantiser. Return any module that keeps this contract.
    return FSQ(config.levels)


# ---------------------------------------------------------------------------------------------------------------
# Nested dropout


def law_of_k(u, K, mode):
    """The law of k, upside down: a number u (B,) float64 in [0, 1) -> k (B,) int64 in 1..K, which grows with u.

    Modes: "uniform" over 1..K; "pow2" over 1, 2, 4, ..., K, as much training for 1 token as for 256; "uniform_pow2"
    uniform, then rounded up to a power of two (half keep all K); "mixed" half of both; else ValueError.
    """
    # FORK: another law of k. Return what a share u of all samples may have at most: whole numbers that grow with u.
    if mode == "uniform":
        return (u * K).long() + 1                                                 # (B,)
    choices = torch.tensor(powers_of_two(K))                                      # (n,)
    even = torch.full(choices.shape, 1 / len(choices), dtype=torch.float64)       # (n,), each one's share
    rounded_up = choices.diff(prepend=torch.tensor([0])).double() / K             # (n,)
    shares = {"pow2": even, "uniform_pow2": rounded_up, "mixed": (even + rounded_up) / 2}
    if mode not in shares:
        raise ValueError(f"nested dropout mode {mode!r}: expected uniform, pow2, uniform_pow2 or mixed")
    return choices[torch.searchsorted(shares[mode].cumsum(0)[:-1], u, right=True)]  # (B,)


def sample_k(B, K, mode, null_p=0.0, generator=None):
    """How many tokens each training sample keeps: k (B,) int64 in 0..K on the CPU, 0 for no condition; room, B numbers.

    This is what orders the tokens: early ones are kept more often, so what matters most moves to the front (nested
    dropout, arXiv 1402.0915). Each sample draws its own k: with one for all, a batch would pull towards few tokens in
    one step and towards many in the next. A share `null_p` gets no token at all, which guidance needs.

    The draws are stratified: of 16 places in the batch each draws from its own 16th of the law (of 8, 4, 2 or 1 if B is
    no multiple of 16), so that a step sees short and long ones alike. Images are shuffled: none keeps its place.

    room: the most that each place can draw, rounded up by `room_for`. It is the same in every step, so samples of equal
    room go through together (`in_groups`): short ones cost less, and no group ever changes its shape, which compilers
    want. With `pow2`, B = 4 and K = 64, k is 2, 16, 4, 64, say, and room always 16, 64, 16, 64: two groups.
    """
    strata = min(16, B & -B)  # the largest power of two that divides B
    place = [int(f"{i % strata:04b}"[::-1], 2) * strata // 16 for i in range(B)]  # bits reversed: spread evenly
    place = torch.tensor(place, dtype=torch.float64)                              # (B,), 0 to strata - 1
    def draw(u):
        k = law_of_k(((u - null_p) / max(1 - null_p, 1e-9)).clamp(0, 1 - 1e-9), K, mode)
        return torch.where(u < null_p, 0, k)                                      # (B,)
    u = torch.rand(B, generator=generator, dtype=torch.float64)                   # (B,)
    return draw((place + u) / strata), room_for(draw((place + 1 - 1e-9) / strata), K)


def room_for(k, K):
    """k (B,) int64, at most K -> for each the first of 16, 64, 256, ... that is not below, and at most K: a tuple."""
    sizes = [min(4**i, K) for i in range(2, 16)]
    return tuple(next(size for size in sizes if size >= number) for number in k.tolist())


def powers_of_two(K):
    """[1, 2, 4, ..., K]: the numbers of tokens at which reconstructions are shown and measured; K always the last."""
    return [2**i for i in range(K.bit_length()) if 2**i < K] + [K]


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

    def __init__(self, config, code_width):
        super().__init__()
        D, C, self.p, self.K = config.dec_width, config.latent_channels, config.patch_size, config.registers
        self.patch_embed = PatchEmbed(C, self.p, D, config.grid)
        self.from_codes = nn.Linear(code_width, D)
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
        self.null_token = token_parameter(D)                                      # for every register: no condition

    def modulations(self, t):
        """All that t decides: t (B,) or (1,) -> (B or 1, 2, 6, D) for each block, last (B or 1, 2, 1, D) for the head.

        SAVING 2. When all samples share t, there is one row: these layers, as large as all others of the blocks
        together, then run once per step, for all images and for both passes of guidance (and never once per token).
        """
        t_embedding = self.time_embed(t)                                          # (B or 1, D)
        head = self.head_adaln(F.silu(t_embedding)).unflatten(-1, (2, 1, -1))     # (B or 1, 2, 1, D)
        return [*(block.modulation(t_embedding) for block in self.blocks), head]

    def forward(self, x_t, t, codes, k_keep=None, null=None, modulations=None):
        """x_t (B, C, h, w), t (B,) or (1,) in [0, 1], codes (B, k, L) with 0 <= k <= K -> velocity (B, C, h, w).

        The K - k registers after `codes` count as dropped. k_keep (B,), at most k: sample i keeps only its first
        k_keep[i]. null (B,) bool: sample i has no condition at all, its codes are ignored. modulations: those of t, if
        the caller has them already.
        """
        B, C, h, w = x_t.shape
        patches = self.patch_embed(x_t)                                           # (B, N, D)
        registers, copies = self.registers_of(codes, k_keep, null)                # (B, k or k + 1, D)
        x = torch.cat([patches, registers], 1)                                    # (B, n, D)
        N = patches.shape[1]
        attend = full_attention(x.shape[1], copies, x.device)
        *of_blocks, of_head = self.modulations(t) if modulations is None else modulations
        for block, modulation in zip(self.blocks[:-1], of_blocks):
            x = block(x, modulation, N, attend)                                   # (B, n, D)
        x = self.blocks[-1](x[:, :N], of_blocks[-1], N, attend, seen=x)           # (B, N, D)
        shift, scale = of_head.unbind(1)                                          # each (B or 1, 1, D)
        return unpatchify(self.head(norm(x) * (1 + scale) + shift), self.p, h, w)  # (B, C, h, w)

    def registers_of(self, codes, k_keep, null):
        """What the decoder sees of the tokens: (B, k or k + 1, D), and for how many equal registers the last stands.

        A register that is kept holds its code and its position; one that is dropped holds the mask token, a learned
        vector that says "not known", the same in every place. Without a condition all hold another one, the null token:
        for it the decoder learns to paint any image, which guidance pushes away from.
        """
        # FORK: another condition. Return any (B, n, D) and 1; codes beyond k_keep or of null samples must not matter.
        B, k, _ = codes.shape
        registers = self.from_codes(codes) + self.positions[:k]                   # (B, k, D)
        if k_keep is not None:
            kept = torch.arange(k, device=codes.device) < k_keep.to(codes.device, non_blocking=True)[:, None]  # (B, k)
            # after the position was added: all dropped registers are one and the same vector
            registers = torch.where(kept[..., None], registers, self.mask_token)
        if k < self.K:
            registers = torch.cat([registers, self.mask_token.expand(B, 1, -1).to(registers.dtype)], 1)  # (B, k + 1, D)
        if null is not None:
            registers = torch.where(null.to(codes.device, non_blocking=True)[:, None, None], self.null_token, registers)
        # and what the last vector counts for: in training (k_keep given) at least once, for where k is K no mask token
        # was added, and the last is a register like the others; one graph serves both
        return registers, max(self.K - k, 0 if k_keep is None else 1)


def full_attention(n, copies, device):
    """Everyone sees everyone; the last of n tokens stands for `copies` equal ones. Returns an `attend` for `Attention`.

    SAVING 3. The K - k dropped registers enter as the same vector, with no position, no mask and the same modulation:
    by symmetry they leave every block as the same vector again. So one of them is enough, if attention still counts
    all m. In softmax(q·key), m equal keys put m·exp(s) where one puts exp(s); and m·exp(s) = exp(s + log m): adding
    log m to that key's logit is exact, for its value is then weighted m times too. It is the same function, gradients
    included: k tokens cost N + k + 1, the null condition N + 1. Plainly:

        bias = torch.zeros(n)
        bias[-1] = math.log(copies)
        F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(q.shape[2], n), scale=scale)
    """
    return counted_attention(n, copies, device) if copies else F.scaled_dot_product_attention


def counted_attention(n, copies, device, counted=slice(-1, None), attention=F.scaled_dot_product_attention):
    """`full_attention` with the bias inside q·k, because CUDA's flash kernel takes none.

    In clips `counted` are the places of several such tokens, and `attention` may be masked (video.py).

    In a channel of its own, queries hold 1/scale, the last key log m, other keys 0. bfloat16 rounds log m by up to
    0.4 %, which would count up to 1.6 % too many or too few; so three channels share it, each with what those before it
    rounded away. Five more hold zeros, and v gets eight: that kernel wants q, k, v of one size, a multiple of 8.
    """
    extra, rest = torch.zeros(n, 8, device=device, dtype=torch.bfloat16), math.log(copies)  # (n, 8), exact in all types
    for channel in range(3):
        part = torch.tensor(rest, device="cpu").bfloat16().item()
        extra[counted, channel].fill_(part)  # `= part` would copy it from the CPU, which waits for the GPU
        rest -= part
    def attend(q, k, v, scale):
        q = F.pad(q, (0, 8), value=1 / scale)                                     # (B, nh, m, hd + 8)
        k = torch.cat([k, extra.to(k.dtype).expand(*k.shape[:2], -1, -1)], -1)    # (B, nh, n, hd + 8)
        return attention(q, k, F.pad(v, (0, 8)), scale=scale)[..., :-8]           # (B, nh, m, hd)
    return attend


# ---------------------------------------------------------------------------------------------------------------
# FlexTok


VAE_PIXELS = 8 * 256 * 256  # that the VAE is given at once, but at least one whole image


def in_groups(velocity, room, *tensors):
    """velocity(k, *tensors) of the samples of equal room k together; tensors (B, ...), room a tuple of B numbers.

    Neither the first k registers nor the decoder look at those from k on: a sample that keeps few costs little more
    than N tokens in encoder and decoder each, not N + K.
    """
    groups, order = groups_of(room, tensors[0].device)
    results = [velocity(k, *(x[members] for x in tensors)) for k, members in groups]  # (b, C, h, w) each
    return torch.cat(results)[order]                                              # (B, C, h, w)


@functools.lru_cache(maxsize=None)
def groups_of(room, device):
    """room, B numbers -> [(k, who has it: (b,) int64), ...], and the order (B,) that puts them back as they were.

    Kept on `device`, as training asks for the same in every step, and a recorded step reads them there.
    """
    places = torch.tensor(room)                                                   # (B,)
    groups = [(k, (places == k).nonzero().squeeze(1)) for k in sorted(set(room))]  # (b,) each
    order = torch.cat([members for _, members in groups]).argsort()               # (B,)
    return [(k, members.to(device)) for k, members in groups], order.to(device)


class FlexTok(nn.Module):
    """The whole tokenizer: VAE (frozen), encoder, quantiser, decoder.

    >>> tokenizer = FlexTok.from_pretrained("assets/emoji64")
    >>> tokens = tokenizer.tokenize(images)                        # list of B tensors (1, K)
    >>> images = tokenizer.detokenize([t[:, :16] for t in tokens])
    """
    rows = 1  # of tokens, for a prior; `video.ClipSequences` has several

    def __init__(self, config, vae):
        super().__init__()
        C = config.latent_channels
        if C != vae.config.latent_channels:
            raise ValueError(f"the tokenizer takes {C} latent channels, the VAE has {vae.config.latent_channels}")
        self.config = config
        self.vae = vae.requires_grad_(False)
        self.quantizer = make_quantizer(config)
        self.encoder = Encoder(config, self.quantizer.code_width)
        self.decoder = Decoder(config, self.quantizer.code_width)
        self.official = {}  # the config of the official checkpoint that this came from, for `export_official`
        self.notes = {}     # what else its config.json said, if it was one of ours: how it was trained, and more

    @property
    def image_size(self):
        """(H, W) of the training images, in pixels."""
        return tuple(side * self.config.patch_size * self.vae.downsampling for side in self.config.grid)

    def forward(self, latents, x_t, t, k_keep, room=None):
        """One training pass: latents, x_t (B, C, h, w), t (B,) -> velocity (B, C, h, w).

        Sample i keeps its first k_keep[i] tokens, k_keep (B,) int64; with 0 it has no condition at all. room, a tuple:
        so many registers are enough for each sample (`sample_k`); None: all go through with all K.
        """
        def velocity(k, x_t, latents, t, k_keep):  # of samples that need no more than k registers
            codes, _ = self.quantizer(self.encoder(latents, k))                   # (b, k, L)
            return self.decoder(x_t, t, codes, k_keep, null=k_keep == 0)          # (b, C, h, w)
        if room is None:
            return velocity(self.config.registers, x_t, latents, t, k_keep)  # the plain form
        return in_groups(velocity, room, x_t, latents, t, k_keep.to(x_t.device, non_blocking=True))

    def compile_blocks(self, **options):
        """torch.compile the blocks of encoder and decoder, with these options. Changes no name in the state dict.

        Training makes four graphs, whatever the k are: middle and last block, in encoder and decoder. Tokenising makes
        two more for one register, detokenising two more without dropped registers. Batches of one make others.
        """
        compile_blocks([*self.encoder.blocks, *self.decoder.blocks], **options)

    @torch.no_grad()
    def tokenize(self, images, k=None, sample_posterior=False):
        """images (B, 3, H, W) in [-1, 1] -> list of B int64 tensors (1, k); k=None gives all K.

        Uses the mean of the VAE's posterior, so that it is repeatable; `sample_posterior=True` draws from it, as the
        official code does. Asking for k tokens costs less and gives the first k of all of them. Raises ValueError for
        another shape or range, or k.
        """
        images = check_images(images).to(self.decoder.mask_token.device, torch.float32)
        pixels = images.shape[-2] * images.shape[-1]
        latents = self.through_vae(self.vae.latents, images, pixels, sample_posterior)  # (B, C, h, w)
        _, tokens = self.quantizer(self.encoder(latents, k))                      # (B, k)
        return list(tokens.split(1))                                              # B x (1, k)

    @torch.no_grad()
    def detokenize(self, tokens, timesteps=25, guidance_scale=7.5, perform_norm_guidance=True, generator=None,
                   vae_image_sizes=None, verbose=False):
        """List of B integer tensors (1, k_i) or (k_i,), 1 <= k_i <= K -> images (B, 3, H, W), about [-1, 1], unclamped.

        timesteps: Euler steps. guidance_scale: 1.0 is no guidance; a number or a function of t. perform_norm_guidance:
        APG instead of CFG. generator: makes it repeatable; noise is drawn image by image, so one seed gives what the
        official code gives. vae_image_sizes: size of the latent grid (not of the image), an int or a list of B equal
        (h, w); None is the size of training. verbose: print t of each step on stderr. The sampler computes in float32
        also under autocast. Raises ValueError for tokens that are no such list.

        The official function's own defaults are guidance 1.0, no APG, and sizes that must be given; 7.5 with APG is how
        its README calls it.
        """
        if timesteps < 1:
            raise ValueError(f"timesteps={timesteps}: expected at least 1")
        codes, k_keep = self.codes_of(tokens)                                     # (B, k, L), (B,)
        B, device = len(codes), codes.device
        h, w = self._latent_size(vae_image_sizes, B)
        draw = {"generator": generator, "device": device if generator is None else generator.device}
        noise = [torch.randn(1, self.config.latent_channels, h, w, **draw) for _ in range(B)]  # B x (1, C, h, w)
        # the null condition needs no token, but with one, which it ignores, it shares graphs with small k when compiled
        nothing, everyone = codes[:, :1], torch.ones(B, dtype=torch.bool, device=device)
        # FORK: another rule of guidance, (v_cond, v_null, scale) -> v, each (B, C, h, w); called once a step, in order.
        guide = flow.APG() if perform_norm_guidance else flow.cfg

        def velocity(x, t):
            if verbose:
                print(f"t = {t.item():.3f}", file=sys.stderr, flush=True)
            modulations = self.decoder.modulations(t)  # the same for both passes
            v_cond = self.decoder(x, t, codes, k_keep, modulations=modulations).float()
            if guidance_scale == 1.0:
                return v_cond
            v_null = self.decoder(x, t, nothing, null=everyone, modulations=modulations).float()
            return guide(v_cond, v_null, guidance_scale(t.item()) if callable(guidance_scale) else guidance_scale)

        latents = flow.euler(velocity, torch.cat(noise).to(device), timesteps)    # (B, C, h, w)
        return self.through_vae(self.vae.decode, latents, h * w * self.vae.downsampling**2).float()  # (B, 3, H, W)

    def through_vae(self, function, x, pixels, *options):
        """function(x, *options), x (B, ...) images or latents of so many pixels each, a few at a time -> (B, ...).

        Its finest level holds 512 times what its latents do. No image is cut into tiles: GroupNorm and the VAE's
        attention look at all of it. Weights of float32 compute in float32 also under autocast, for they decide tokens.
        """
        exact = next(self.vae.parameters()).dtype == torch.float32
        with torch.autocast(x.device.type, enabled=False) if exact else nullcontext():
            return torch.cat([function(part, *options) for part in x.split(max(1, VAE_PIXELS // pixels))])

    def codes_of(self, tokens):
        """List of B integer tensors (1, k_i) or (k_i,) -> codes (B, k, L), padded; k_keep (B,), or None if equal."""
        if not len(tokens):
            raise ValueError("no tokens to decode: the list is empty")
        rows, K = [torch.as_tensor(row) for row in tokens], self.config.registers
        for i, row in enumerate(rows):
            is_row = row.dim() == 1 or row.shape[:-1] == (1,)
            if row.is_floating_point() or row.dtype == torch.bool or not is_row or not 1 <= row.numel() <= K:
                raise ValueError(f"image {i}: {row.dtype} of shape {[*row.shape]}, expected 1 to {K} integers (1, k)")
        padded = nn.utils.rnn.pad_sequence([row.flatten().long() for row in rows], batch_first=True)  # (B, k)
        lengths = torch.tensor([row.numel() for row in rows])                     # (B,)
        codes = self.quantizer.tokens_to_codes(padded.to(self.decoder.mask_token.device))  # (B, k, L)
        return codes, None if (lengths == lengths[0]).all() else lengths.to(codes.device)

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
        # The weights, and the settings that leave no trace in them. scale_codes is there only where it is on, so that
        # what was made before there was such a setting keeps its hash.
        settings = (repr(self.quantizer), self.config.enc_head_dim, self.vae.config.scaling_factor,
                    *["scale_codes"] * self.config.scale_codes)
        return digest_of(settings, self.vae, self.encoder, self.quantizer)

    @property
    def recommended_guidance(self):
        """The guidance scale that its config.json names under "sampling"; 7.5, as in the official README, if none."""
        return self.notes.get("sampling", {}).get("guidance_scale", 7.5)

    def save_pretrained(self, directory, dtype=torch.float32, **notes):
        """Write `directory`/config.json (sizes, and `notes`: anything JSON holds) and model.safetensors in `dtype`."""
        tensors, origin = self.state_dict(), {"official": self.official} if self.official else {}
        save_tensors(os.path.join(directory, "model.safetensors"), tensors, dtype, keep=fixed_tables(tensors))
        sizes = {"tokenizer": asdict(self.config), "vae": asdict(self.vae.config)}
        # last: it says that the model is whole
        write_json(os.path.join(directory, "config.json"), {"format": "minFlexTok", **sizes, **origin, **notes})

    @classmethod
    def from_pretrained(cls, name, device="cpu", dtype=torch.float32):
        """Read a tokenizer, ours or official: a directory, a safetensors file, or a name on the Hugging Face hub.

        In eval mode. dtype: of the weights; None is as stored; models in 16 bits run under torch.autocast. Raises
        UserError naming the file and the reason.
        """
        name = shipped(name)
        path = os.path.join(name, "config.json")
        saved = read_json(path) if os.path.isfile(path) else None
        if not isinstance(saved, dict) or saved.get("format") != "minFlexTok":
            from extras.pretrained import read_flextok
            return read_flextok(name, device, dtype)
        try:
            model = unloaded(checked(TokenizerConfig, saved.get("tokenizer"), f"{path}: tokenizer"),
                             checked(VAEConfig, saved.get("vae"), f"{path}: vae"))
        except (ValueError, RuntimeError, OverflowError) as error:
            raise UserError(f"{path}: does not describe a tokenizer ({shown(str(error))})") from None
        Sampling = make_dataclass("Sampling", [("guidance_scale", float, 0.0)])
        checked(Sampling, saved.get("sampling", {}), f"{path}: sampling")
        model.official = saved.get("official", {})
        model.notes = {x: y for x, y in saved.items() if x not in ("format", "tokenizer", "vae", "official")}
        if model.official:
            from extras.pretrained import add_repa_head
            add_repa_head(model, path)  # which some official checkpoints have: kept, and used by nothing here
        weights = os.path.join(name, "model.safetensors")
        tensors = load_tensors(weights)
        load_weights(model, tensors, weights, device, dtype, keep=fixed_tables(tensors))
        return model.to(device).eval()


def unloaded(config, vae_config):
    """A FlexTok whose tensors have shapes but no memory, for `load_weights` to fill. ValueError for silly sizes."""
    layers = config.enc_depth + config.dec_depth + vae_config.layers_per_block * len(vae_config.block_out_channels)
    if layers > 1000:  # even without memory, a billion layers would never end
        raise ValueError(f"{layers} layers, at most 1000 are read")
    with torch.device("meta"):
        model = FlexTok(config, VAE(vae_config))
    model.quantizer = make_quantizer(config)  # with memory: it may have constants that are in no file, as FSQ's are
    return model


def fixed_tables(names):
    """Those of the names whose tensors stay float32: sine-cosine tables, so that larger grids continue them exactly,
    and what the quantiser holds, which decides tokens."""
    return [name for name in names if name.endswith("patch_embed.positions") or name.startswith("quantizer.")]


if __name__ == "__main__":
    N, K = 4, 4
    print("Encoder: who (row) sees whom (column); p patch, r register. In the decoder everyone sees everyone.")
    one_hot = torch.eye(N + K)[None, None]                                        # values that tell whom they come from
    zeros = torch.zeros_like(one_hot)                                             # (1, 1, N + K, N + K)
    seen = prefix_causal_attention(N, K)(zeros, zeros, one_hot, scale=1.0)[0, 0]  # (N + K, N + K)
    names = [" p"] * N + [f"r{j}" for j in range(K)]
    print("    ", *names)
    for name, row in zip(names, seen):
        print("  ", name, *(" x" if weight > 0 else " ." for weight in row))
    with torch.device("meta"):  # shapes without memory
        encoder, decoder = (part(TokenizerConfig(), code_width=6) for part in (Encoder, Decoder))
        latents = torch.empty(2, 16, 32, 32)
        codes = encoder(latents)
        velocity = decoder(latents, torch.empty(2), codes[:, :16])
    for name, x in (("latents", latents), ("codes", codes), ("velocity", velocity)):
        print(f"d12-d12, {name}: {tuple(x.shape)}")
    print("trainable parameters:", *(f"{sum(p.numel() for p in part.parameters()):,}" for part in (encoder, decoder)))
