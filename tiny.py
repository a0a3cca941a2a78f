"""
FlexTok in one file: a picture becomes 8 tokens in order, and any first k of them become a plausible picture again.

    picture (B,3,16,16) -> 16 patches + 8 registers --encoder--> 8 vectors --FSQ--> 8 codes (B,8,6) = 8 tokens
                                                                                    | keep the first k, k at random
    noise (B,3,16,16) --20 steps along velocity = decoder(noisy picture, t, k codes)--> picture (B,3,16,16)

Most tokenizers give each patch its token: every picture costs the same, and the first half of the tokens is the upper
half. Here the tokens are a list that may be cut anywhere. The first says what matters most, each further one what
matters most of the rest, and what no token said is invented: the decoder is a generative model, so that one token
gives one picture of the right kind, not the blurred mean of all of that kind.
Paper: FlexTok, arXiv 2502.13967, on a VAE's latents, not pixels. SHORT marks what only a run of minutes needs.
Letters: B batch, N patches, K registers and so tokens, k kept tokens, D width, L numbers in a code.

    python tiny.py          # 4 minutes on one CPU thread: 16 dB from 1 token, 21 dB from 8; draws out/tiny.png
Next: fsq.py, then flow.py and model.py: the same ideas at full size, with what makes them fast and exact.
"""
import math
import os
import sys
import time

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

SIDE, P, N, K, D, HEADS = 16, 4, 16, 8, 96, 4              # 16 x 16 pixels: 16 patches of 4 x 4; 8 registers, width 96
LEVELS = torch.tensor([8, 8, 8, 5, 5, 5])                  # a code is 6 numbers; the first takes one of 8 values, ...
KEPT = torch.tensor([1, 2, 4, 8, 8])                       # tokens a training sample may keep; all K twice as often
TRAIN_STEPS, SAMPLE_STEPS, GUIDANCE = 2800, 20, 2.0
GROUNDS = torch.tensor([[.05, .05, .30], [0, .45, .75], [.15, .55, .10], [.80, .55, .30], [.50, .10, .45]])
COLOURS = torch.tensor([[.95, .10, .10], [1, .95, .20], [1, 1, 1], [.30, .95, 1], [1, .60, .80]])


def draw_scenes(B):
    """A disc, a tall or a wide bar on one of five grounds, never twice the same -> (B, 3, SIDE, SIDE) in [-1, 1]."""
    ground, colour = GROUNDS[torch.randint(5, (B,))], COLOURS[torch.randint(5, (B,))]       # (B, 3), (B, 3)
    size, centre = 3 + 1.5 * torch.rand(B, 1, 1), 5 + 6 * torch.rand(2, B, 1, 1)            # (B, 1, 1), (2, B, 1, 1)
    y, x = (torch.arange(SIDE)[:, None] + 0.5 - centre[0]).abs(), (torch.arange(SIDE) + 0.5 - centre[1]).abs()
    outside = torch.stack([torch.sqrt(x**2 + y**2) - size,                                  # pixels from a disc,
                           torch.maximum(x - 0.5 * size, y - 1.4 * size),                   # a tall bar,
                           torch.maximum(x - 1.4 * size, y - 0.5 * size)])                  # a wide bar
    inside = (0.5 - outside[torch.randint(3, (B,)), torch.arange(B)]).clamp(0, 1)[:, None]  # (B, 1, SIDE, SIDE)
    return 2 * torch.lerp(ground[:, :, None, None], colour[:, :, None, None], inside) - 1   # (B, 3, SIDE, SIDE)


def norm(x):
    return F.layer_norm(x, x.shape[-1:])


class Block(nn.Module):
    """A transformer block, (B, n, D) -> (B, n, D). In the decoder, t shifts, scales and gates both halves (adaLN)."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, x, mask=None, modulation=(0, 0, 1, 0, 0, 1)):
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation                  # numbers, or (B, 1, D) each
        q, k, v = self.qkv(norm(x) * (1 + scale1) + shift1).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(norm(q), norm(k), v, attn_mask=mask)  # (B, HEADS, n, D/HEADS)
        x = x + gate1 * self.proj(seen.transpose(1, 2).flatten(2))                 # (B, n, D)
        return x + gate2 * self.mlp(norm(x) * (1 + scale2) + shift2)


def fsq(latents):
    """Finite scalar quantisation: numbers (B, K, L) -> codes (B, K, L) in [-1, 1]; the i-th takes LEVELS[i] values."""
    # A code is a token: digits with 8, 8, 8, 5, 5 and 5 values make one of 64,000 words, and a picture is a sentence
    # that a language model (the prior, ar.py) can learn to write. The usual way, VQ, takes the nearest vector of a
    # learned table, which needs a loss of its own to follow the encoder, and whose entries die if they are never the
    # nearest. This grid is fixed: nothing in it can lag behind or die, and so there is no codebook loss.
    # SHORT: tanh is flat at both ends. The first steps can push all numbers there; then all pictures get one code, and
    # no gradient leads back. Scaled to a mean square of 1, they keep to the slope; only corners of the grid go unused.
    latents = latents * torch.rsqrt(latents.square().mean(-1, keepdim=True) + 1e-4)
    bounded = torch.tanh(latents) * (LEVELS - 1) / 2 - (1 - LEVELS % 2) / 2        # in (-4, 3) for 8, (-2, 2) for 5
    # Rounding has derivative 0. Straight through: forward the rounded number, backward as if nothing had been rounded.
    return (bounded + (bounded.round() - bounded).detach()) / (LEVELS // 2)


class Encoder(nn.Module):
    """pictures (B, 3, SIDE, SIDE) -> codes (B, K, L)"""

    def __init__(self):
        super().__init__()
        self.patch_embed, self.head = nn.Linear(3 * P * P, D), nn.Linear(D, len(LEVELS))
        # A register is a learned vector that sits beside the patches and belongs to no place. By attention it collects
        # from all of them what it has learned to ask for; what it holds in the end becomes a token. So we choose how
        # many tokens there are, and a token can speak of the whole picture ("dusk, something red"), not of one patch.
        self.registers = nn.Parameter(torch.randn(K, D))
        # SHORT: as large as the embedded pixels. Positions of the usual size, 0.02, vanish beside them in the first
        # LayerNorm. The registers then learn which colours there are, but not where, and all of them learn the same.
        self.positions = nn.Parameter(torch.randn(N, D))
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, pictures):
        patches = self.patch_embed(F.unfold(pictures, P, stride=P).transpose(1, 2)) + self.positions   # (B, N, D)
        x = torch.cat([patches, self.registers.expand(len(patches), -1, -1)], 1)   # (B, N + K, D)
        # Who (row) sees whom (column): patches see patches; register j sees patches and registers up to j, none after.
        # Causal, because then no token depends on what comes after it: a prefix means the same whatever follows. And
        # because a prior writes from left to right: each token must follow from those that are already written.
        mask = torch.ones(N + K, N + K).tril().bool() | (torch.arange(N + K) < N)  # (N + K, N + K)
        for block in self.blocks:
            x = block(x, mask)
        return fsq(self.head(norm(x[:, N:])))                                      # (B, K, L)


class Decoder(nn.Module):
    """x_t (B, 3, SIDE, SIDE), t (B,), codes (B, K, L), of which the first k (B,) count -> velocity, shaped like x_t"""

    def __init__(self):
        super().__init__()
        self.patch_embed, self.head = nn.Linear(3 * P * P, D), nn.Linear(D, 3 * P * P)
        self.code_embed, self.mask_token = nn.Linear(len(LEVELS), D), nn.Parameter(torch.randn(D))
        self.positions, self.register_positions = nn.Parameter(torch.randn(N, D)), nn.Parameter(torch.randn(K, D))
        self.t_embed = nn.Sequential(nn.Linear(64, D), nn.SiLU(), nn.Linear(D, D), nn.SiLU())
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.modulations = nn.ModuleList(nn.Linear(D, 6 * D) for _ in self.blocks)
        nn.init.normal_(self.code_embed.weight)                                    # SHORT: as large as the positions
        for layer in [*self.modulations, self.head]:                               # every block begins as the identity
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)

    def forward(self, x_t, t, codes, k):
        kept = (torch.arange(K) < k[:, None])[:, :, None]                          # (B, K, 1)
        registers = torch.where(kept, self.code_embed(codes) + self.register_positions, self.mask_token)  # (B, K, D)
        patches = self.patch_embed(F.unfold(x_t, P, stride=P).transpose(1, 2)) + self.positions   # (B, N, D)
        x = torch.cat([patches, registers], 1)                                     # (B, N + K, D)
        angles = t[:, None] * torch.logspace(0, 3, 32)                             # (B, 32)
        t = self.t_embed(torch.cat([angles.cos(), angles.sin()], 1))[:, None]      # (B, 1, D)
        for block, modulation in zip(self.blocks, self.modulations):
            x = block(x, modulation=modulation(t).chunk(6, -1))                    # no mask: everyone sees everyone
        return F.fold(self.head(norm(x[:, :N])).transpose(1, 2), SIDE, P, stride=P)  # (B, 3, SIDE, SIDE)


def training_loss(encoder, decoder, pictures, only_noise):
    """pictures (B, 3, SIDE, SIDE) -> squared error of each velocity (B,); which had t = 1 and all tokens (B,)"""
    B, noise = len(pictures), torch.randn_like(pictures)
    # Nested dropout. Token 1 must serve alone in some samples, so what matters most moves into it; token 8 is only read
    # after seven others, so it can only add. Nothing else puts the tokens in order. Every sample has its own k, so that
    # each step weighs all lengths against each other; with one k for a whole batch, each step would pull another way.
    k = KEPT[torch.arange(B) % len(KEPT)]      # (B,), dealt to random pictures, so that no batch lacks a length
    # The null condition: one sample in ten keeps no token, and so the decoder learns what any picture looks like.
    # Sampling compares with that, to see what the tokens say. (In model.py it has a learned vector of its own.)
    k = torch.where(torch.rand(B) < 0.1, 0, k)                                     # (B,)
    # t = 0 is the picture, t = 1 is noise. At small t the picture shows through and the decoder needs no token; at
    # t = 1 nothing but the tokens knows the picture. A decoder can lower its loss for a long time by denoising alone.
    # SHORT: so we lean towards noise (+ 0.5), send three samples in ten to t = 1 itself, and print the loss there.
    t = torch.sigmoid(torch.randn(B) + 0.5)
    t = torch.where(torch.rand(B) < 0.3, 1.0, t)                                   # (B,)
    if only_noise:  # SHORT: the first steps show no picture at all, so that the tokens soon come to mean something
        t = torch.ones_like(t)
    # Rectified flow: x_t lies on the straight line from picture to noise, and the velocity along it is constant.
    x_t = torch.lerp(pictures, noise, t[:, None, None, None])                      # (B, 3, SIDE, SIDE)
    return (decoder(x_t, t, encoder(pictures), k) - (noise - pictures)).square().mean((1, 2, 3)), (t == 1) & (k == K)


@torch.no_grad()
def sample(decoder, codes, k):
    """codes (B, K, L), of which the first k (B,) count -> pictures (B, 3, SIDE, SIDE): from noise, t = 1, to t = 0."""
    x = torch.randn(len(codes), 3, SIDE, SIDE)
    for i in range(SAMPLE_STEPS, 0, -1):
        t = torch.full((len(codes),), i / SAMPLE_STEPS)
        with_tokens, without = decoder(x, t, codes, k), decoder(x, t, codes, torch.zeros_like(k))
        # Guidance: their difference is what the tokens say. Twice the difference makes the picture obey them more.
        x = x - (without + GUIDANCE * (with_tokens - without)) / SAMPLE_STEPS
    return x.clamp(-1, 1)


def main():
    torch.manual_seed(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    start, encoder, decoder, history = time.time(), Encoder(), Decoder(), []
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=2e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(                                  # warm up, then half a cosine to 0
        optimizer, lambda i: min((i + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * i / TRAIN_STEPS)))
    for step in range(1, TRAIN_STEPS + 1):
        loss, only_tokens = training_loss(encoder, decoder, draw_scenes(32), only_noise=step <= 0.3 * TRAIN_STEPS)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        schedule.step()
        history.append([loss.mean().item(), loss[only_tokens].mean().item()])
        if step % 100 == 0:
            mean, at_1 = torch.tensor(history[-100:]).nanmean(0)
            print(f"step {step}, {(time.time() - start) / 60:.1f} min: loss {mean:.3f}, at t=1 {at_1:.3f}", flush=True)
    pictures = draw_scenes(256)                                                    # new ones
    columns, codes = [pictures], encoder(pictures)                                 # (256, K, L)
    for k in (1, 2, 4, 8):
        columns.append(sample(decoder, codes, torch.full((256,), k)))
        print(f"{k} tokens: {-10 * (columns[-1] / 2 - pictures / 2).square().mean((1, 2, 3)).log10().mean():.2f} dB")
    grid = F.pad(torch.stack(columns, 1)[:8], (1, 1, 1, 1), value=1)               # (8, 5, 3, 18, 18)
    grid = grid.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)                 # (8·18, 5·18, 3)
    grid = ((grid + 1) * 127.5).byte().repeat_interleave(6, 0).repeat_interleave(6, 1)
    os.makedirs("out", exist_ok=True)
    Image.fromarray(grid.numpy()).save("out/tiny.png")
    print(f"out/tiny.png: original, 1, 2, 4, 8 tokens; {(time.time() - start) / 60:.1f} min")


if __name__ == "__main__":
    main()
