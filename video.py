"""
VideoFlexTok: a clip becomes rows of ordered tokens, a row for its first frame and one for every four frames after it.

    clip (B,3,F,H,W) --VidTok--> latents (B,C,T,h,w) --Encoder--> (B,T,K,L) --FSQ--> codes = tokens (B,T,K)
    clip <--VidTok-- latents <--flow sampler-- noise, where velocity = Decoder(x_t, t, the first k codes of every row)

What video adds to model.py, and why. A clip of one frame is an image, and goes through the same numbers.
- Time is causal: a latent frame, and the row of tokens beside it, sees itself and what came before. So a clip can be
  tokenised while it is filmed, its beginning means the same however it goes on, and a prior can write it in order.
- The first frame has latents and tokens of its own, the others share them by four: nothing precedes it that it could
  be told from, and it is by far the most that one has to say about a clip. Later rows say what changed.
- One k per clip: its T rows are read together, so a row of 1 token between rows of 256 would never occur in use.
- Long clips are cut into windows, of 17 frames in the official models: what the networks learn on, and what bounds the
  memory. They overlap by a frame: the last one decoded is given to the next window as its first, clean. Without it
  every window would paint the details that its tokens leave open anew, and the film would jump every two seconds.

Paper: VideoFlexTok (Apple, EPFL), after its public inference code. The VAE is in vidtok.py.
Letters as in model.py, and: F frames, T latent frames = rows of tokens, P patches of one latent frame, M table length.

    python video.py         # prints who attends to whom, windows, shapes           Next: train_video.py
"""
import os
from contextlib import nullcontext
from dataclasses import asdict, dataclass, make_dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

import flow
from common import (UserError, checked, digest_of, load_tensors, load_weights, read_json, save_tensors, shipped, shown,
                    write_json)
from images import check_images
from model import (AdaLNBlock, Block, TimeEmbed, TokenizerConfig, counted_attention, in_groups, init_linear,
                   make_quantizer, norm, patchify, token_parameter, unpatchify)
from vae import VAEConfig
from vidtok import VidTok, VidTokConfig, check_clip, make_vae


@dataclass
class VideoConfig(TokenizerConfig):
    """Sizes of encoder and decoder: those of images, and what clips add. The defaults are d18-d28 at 256 px."""
    frames: int = 17                  # of a window, 1 + 4·(T - 1)
    stride: int = 16                  # frames from the start of a window to the next: frames less 0, 1, 5, ... shared
    enc_width: int = 1152
    enc_depth: int = 18
    dec_width: int = 1792
    dec_depth: int = 28
    dec_mask: str = "full"            # who sees whom in the decoder: full, or time_block_causal
    enc_positions: int = 32           # M of the tables of positions: at least T, and the patches of either side;
    dec_positions: int = 32           # of the decoder's patches,
    code_positions: int = 256         # and of its registers: at least T and K
    # At initialisation only. Small models trained for minutes need a larger one: patches, whose positions are learned
    # here, otherwise do not know for long where they are.
    patch_position_std: float = 0.02  # of the three tables of positions of patches, in encoder and decoder

    def __post_init__(self):
        super().__post_init__()
        if self.dec_mask not in ("full", "time_block_causal"):
            raise ValueError(f"dec_mask {self.dec_mask!r}: expected full or time_block_causal")
        if self.frames % 4 != 1:
            raise ValueError(f"frames {self.frames}: expected 1 + 4n in a window")
        if self.overlap and (self.overlap % 4 != 1 or not 0 < self.overlap < self.frames):
            raise ValueError(f"stride {self.stride}: expected windows of {self.frames} to share 0 or 1 + 4n frames")

    @property
    def overlap(self):
        """Frames that a window shares with the one before it."""
        return self.frames - self.stride


# ---------------------------------------------------------------------------------------------------------------
# Encoder


def sum_of_positions(tables, *sizes):
    """tables (a, M, D), one for each of a axes -> (n_1, ..., n_a, D): at every place the sum of its axes' vectors."""
    total = 0
    for axis, (table, n) in enumerate(zip(tables, sizes)):
        if n > len(table):
            raise ValueError(f"{n} positions along axis {axis}: the table has {len(table)}; give smaller frames or "
                             f"shorter windows")
        shape = [n if i == axis else 1 for i in range(len(sizes))]
        total = total + table[:n].view(*shape, table.shape[1])                   # (n_1 or 1, ..., n_a or 1, D)
    return total


class ClipEmbed(nn.Module):
    """latents (B, C, T, h, w) -> patches (B, T, P, D), row-major, with learned positions of time, row and column."""

    def __init__(self, channels, patch_size, width, length, std):
        super().__init__()
        self.p = patch_size
        self.proj = nn.Linear(patch_size**2 * channels, width)
        self.positions = token_parameter(3, length, width, std=std)               # (3, M, D)

    def forward(self, latents):
        T, h, w = latents.shape[2:]
        frames = patchify(latents.transpose(1, 2).flatten(0, 1), self.p)          # (B·T, P, p·p·C)
        positions = sum_of_positions(self.positions, T, h // self.p, w // self.p)  # (T, h/p, w/p, D)
        return self.proj(frames).unflatten(0, (-1, T)) + positions.flatten(1, 2)  # (B, T, P, D)


def time_causal_attention(T, P, K):
    """The encoder's rule, for T rows of P patches and then K registers. Returns an `attend` for `Attention`.

    All of a row see all earlier rows. Within the row it is as in an image (model.py): patches see the patches, register
    j sees them and registers 0..j. As one attention this would need a dense (T·(P + K))² mask; but what a row may see
    is the beginning of the sequence up to a place in the row. So each row is two calls that need none, like SAVING 1.

    The other half of SAVING 1 is lost: here later rows do look at all registers of earlier ones, so the first k tokens
    need all K registers. Only in the last row, or if there is only one, could those from k on be left out.
    """
    from torch.nn.attention.bias import causal_lower_right  # late: it loads torch's compiler, which takes a second
    row, attention = P + K, F.scaled_dot_product_attention
    masks = [causal_lower_right(K, (t + 1) * row) for t in range(T)]

    def attend(q, keys, v, scale):
        m, results = q.shape[2] // T, []  # queries of a row: all of it, or in the last block its registers
        for t in range(T):
            asking, end = q[:, :, t * m:(t + 1) * m], t * row + P
            if m > K:
                results.append(attention(asking[:, :, :P], keys[:, :, :end], v[:, :, :end], scale=scale))
            results.append(attention(asking[:, :, -K:], keys[:, :, :end + K], v[:, :, :end + K], attn_mask=masks[t],
                                     scale=scale))
        return torch.cat(results, 2)                                              # (B, nh, T·m, hd)
    return attend


class VideoEncoder(nn.Module):
    """latents (B, C, T, h, w) -> (B, T, K, L) unbounded, for the quantiser: what each row's registers read."""

    def __init__(self, config, code_width):
        super().__init__()
        D = config.enc_width
        C, p = config.latent_channels, config.patch_size
        self.patch_embed = ClipEmbed(C, p, D, config.enc_positions, config.patch_position_std)
        self.blocks = nn.ModuleList(Block(D, config.enc_head_dim) for _ in range(config.enc_depth))
        self.head = nn.Linear(D, code_width)
        init_linear(self)
        nn.init.normal_(self.head.weight, std=config.head_std)
        self.registers = token_parameter(rows_of(config.frames), config.registers, D)  # (T, K, D), a table for each row
        self.scale_codes = config.scale_codes

    def forward(self, latents):
        """Raises ValueError for more latent frames than a window has."""
        most, K, _ = self.registers.shape
        B, _, T, _, _ = latents.shape
        if T > most:
            raise ValueError(f"{T} latent frames: a window has at most {most}")
        patches = self.patch_embed(latents)                                       # (B, T, P, D)
        P = patches.shape[2]
        x = torch.cat([patches, self.registers[:T].expand(B, -1, -1, -1)], 2)     # (B, T, P + K, D)
        x, attend = x.flatten(1, 2), time_causal_attention(T, P, K)               # (B, T·(P + K), D)
        for block in self.blocks[:-1]:
            x = block(x, attend)                                                  # (B, T·(P + K), D)
        registers = x.unflatten(1, (T, -1))[:, :, P:].flatten(1, 2)               # (B, T·K, D)
        registers = self.blocks[-1](registers, attend, seen=x)                    # (B, T·K, D)
        x = self.head(norm(registers)).unflatten(1, (T, K))                       # (B, T, K, L)
        return F.rms_norm(x.float(), x.shape[-1:]) if self.scale_codes else x     # (B, T, K, L), as in model.Encoder


def rows_of(frames):
    """How many latent frames, and rows of tokens, so many frames have: 0 -> 0, 1 -> 1, 17 -> 5."""
    return (frames + 3) // 4


# ---------------------------------------------------------------------------------------------------------------
# Decoder


def clip_attention(T, P, m, copies, mask, device):
    """The decoder's rule, for T·P patches and then T·m registers. Returns an `attend` for `Attention`.

    mask "full": everyone sees everyone. "time_block_causal": a row sees itself and earlier rows, by a call for each.
    copies > 1: the last register of each row stands for so many.

    SAVING 3 for clips. All dropped registers of a row enter as the same vector. Under both masks they also see the
    same: everyone, or the same rows. So they stay equal through all blocks, one of them is enough where attention
    counts it K - k times, and the same holds for a row that is given clean, and for the null condition. It would not
    be exact under a mask that tells registers of a row apart, as the encoder's does (register j sees those up to j):
    there each dropped register would see another number of its kind.
    """
    attention = F.scaled_dot_product_attention if mask == "full" else row_by_row(T, P)
    if copies > 1:
        return counted_attention(T * (P + m), copies, device, slice(T * P + m - 1, None, m), attention)
    return attention


def row_by_row(T, P):
    """Attention in which a row, P patches and its registers, sees itself and earlier rows; the order as above."""
    def rows(x):                                                                  # (B, nh, T·P + T·m, hd)
        parts = [part.unflatten(2, (T, -1)) for part in x.split([T * P, x.shape[2] - T * P], 2) if part.shape[2]]
        return torch.cat(parts, 3)                                                # (B, nh, T, P + m, hd)

    def attention(q, k, v, scale):
        q, k, v = rows(q), rows(k), rows(v)                                       # (B, nh, T, P or P + m, hd)
        seen = [(k[:, :, :t + 1].flatten(2, 3), v[:, :, :t + 1].flatten(2, 3)) for t in range(T)]
        x = [F.scaled_dot_product_attention(q[:, :, t], *seen[t], scale=scale) for t in range(T)]
        x = torch.stack(x, 2)                                                     # (B, nh, T, P or P + m, hd)
        return torch.cat([x[:, :, :, :P].flatten(2, 3), x[:, :, :, P:].flatten(2, 3)], 2)  # like q
    return attention


class VideoDecoder(nn.Module):
    """A flow network: noisy latents x_t, time t and the first k codes of each row -> velocity."""

    def __init__(self, config, code_width):
        super().__init__()
        D, C, self.p, self.K = config.dec_width, config.latent_channels, config.patch_size, config.registers
        self.mask = config.dec_mask
        self.patch_embed = ClipEmbed(C, self.p, D, config.dec_positions, config.patch_position_std)
        self.from_codes = nn.Linear(code_width, D)
        self.time_embed = TimeEmbed(D, config.max_timestep)
        self.blocks = nn.ModuleList(AdaLNBlock(D, config.dec_head_dim) for _ in range(config.dec_depth))
        self.head_adaln = nn.Linear(D, 2 * D)
        self.head = nn.Linear(D, self.p**2 * C)
        init_linear(self)
        if config.code_std > 0:
            nn.init.normal_(self.from_codes.weight, std=config.code_std)
        for layer in [block.adaln for block in self.blocks] + [self.head_adaln, self.head]:  # adaLN-zero
            nn.init.zeros_(layer.weight)
        self.positions = token_parameter(2, config.code_positions, D, std=config.position_std)  # (2, M, D)
        self.mask_token = token_parameter(D)                                      # stands for a dropped register
        self.prefix_token = token_parameter(D)                                    # for all of a row that is given clean
        self.null_token = token_parameter(D)                                      # for every register: no condition

    def modulations(self, t):
        """All that t decides, as in model.Decoder: t (B,) or (1,) -> a list, (B or 1, 2, 6, D) for each block."""
        t_embedding = self.time_embed(t)                                          # (B or 1, D)
        head = self.head_adaln(F.silu(t_embedding)).unflatten(-1, (2, 1, 1, -1))  # (B or 1, 2, 1, 1, D)
        return [*(block.modulation(t_embedding) for block in self.blocks), head]

    def forward(self, x_t, t, codes, k_keep=None, null=None, prefix=None, modulations=None):
        """x_t (B, C, T, h, w), t (B,) or (1,), codes (B, T, k, L) with 0 <= k <= K -> velocity (B, C, T, h, w).

        k_keep (B,), at most k: clip i keeps the first k_keep[i] of every row. null (B,) bool: clip i has no condition.
        prefix (B,): the first prefix[i] latent frames of clip i are given clean, in x_t; their tokens are ignored, and
        so is the velocity there. modulations: those of t, if the caller has them already.
        """
        B, _, T, h, w = x_t.shape
        patches = self.patch_embed(x_t)                                           # (B, T, P, D)
        registers = self.registers_of(codes, k_keep, null, prefix)                # (B, T, m, D)
        P, m, copies = patches.shape[2], registers.shape[2], self.K - codes.shape[2]
        x = torch.cat([patches.flatten(1, 2), registers.flatten(1, 2)], 1)        # (B, T·(P + m), D)
        attend = clip_attention(T, P, m, copies, self.mask, x.device)
        *of_blocks, of_head = self.modulations(t) if modulations is None else modulations
        for block, modulation in zip(self.blocks[:-1], of_blocks):
            x = block(x, modulation, T * P, attend)                               # (B, T·(P + m), D)
        x = self.blocks[-1](x[:, :T * P], of_blocks[-1], T * P, attend, seen=x)   # (B, T·P, D)
        shift, scale = of_head.unbind(1)                                          # each (B or 1, 1, 1, D)
        x = self.head(norm(x).unflatten(1, (T, P)) * (1 + scale) + shift)         # (B, T, P, p·p·C)
        return unpatchify(x.flatten(0, 1), self.p, h, w).unflatten(0, (B, T)).transpose(1, 2)  # (B, C, T, h, w)

    def registers_of(self, codes, k_keep, null, prefix):
        """What the decoder sees of the tokens: (B, T, k, D), or (B, T, k + 1, D) with one for all dropped of a row."""
        B, T, k, _ = codes.shape
        registers = self.from_codes(codes) + sum_of_positions(self.positions, T, k)  # (B, T, k, D)
        if k_keep is not None:
            kept = torch.arange(k, device=codes.device) < k_keep.to(codes.device, non_blocking=True)[:, None]  # (B, k)
            registers = torch.where(kept[:, None, :, None], registers, self.mask_token)
        if k < self.K:
            dropped = self.mask_token.expand(B, T, 1, -1).to(registers.dtype)     # (B, T, 1, D)
            registers = torch.cat([registers, dropped], 2)                        # (B, T, k + 1, D)
        if prefix is not None:
            given = given_rows(prefix, T, codes.device)                           # (B, T)
            registers = torch.where(given[..., None, None], self.prefix_token, registers)
        if null is not None:
            everywhere = null.to(codes.device, non_blocking=True)[:, None, None, None]
            registers = torch.where(everywhere, self.null_token, registers)
        return registers


def given_rows(prefix, T, device):
    """prefix (B,) -> (B, T) bool, True for the first prefix[i] rows of clip i."""
    return torch.arange(T, device=device) < prefix.to(device, non_blocking=True)[:, None]


# ---------------------------------------------------------------------------------------------------------------
# VideoFlexTok


def windows(n, size=17, overlap=1, what="frames"):
    """Places (first, end) of the windows that n frames, or n rows of tokens, are cut into.

    No more than `size` are one window, perhaps a short one. More must fill whole windows, which share `overlap` of
    them: 17, 33, 49, ... frames. Raises ValueError for others, rather than dropping the end of a clip.
    """
    stride = size - overlap
    if 0 < n <= size:
        return [(0, n)]
    if n < 1 or (n - size) % stride:
        fits = size + max(n - size, 0) // stride * stride
        more = fits + stride if n > size else size
        raise ValueError(f"{n} {what}: expected at most {size}, or {size} + {stride}n; cut them to {fits}, or repeat "
                         f"the last up to {more}")
    return [(start, start + size) for start in range(0, n - overlap, stride)]


class VideoFlexTok(nn.Module):
    """The whole tokenizer: VAE (frozen), encoder, quantiser, decoder.

    >>> tokenizer = VideoFlexTok.from_pretrained("assets/video")
    >>> tokens = tokenizer.tokenize(video)                         # list of B tensors (1, t, K)
    >>> video = tokenizer.detokenize([x[..., :16] for x in tokens])
    """

    def __init__(self, config, vae):
        super().__init__()
        if config.latent_channels != vae.latent_channels:
            raise ValueError(f"the tokenizer takes {config.latent_channels} latent channels, the VAE has "
                             f"{vae.latent_channels}")
        self.config = config
        self.vae = vae.requires_grad_(False)
        self.quantizer = make_quantizer(config)
        self.encoder = VideoEncoder(config, self.quantizer.code_width)
        self.decoder = VideoDecoder(config, self.quantizer.code_width)
        self.official = {}  # the config of the official checkpoint that this came from, for `export_official_video`
        self.notes = {}     # what else its config.json said, if it was one of ours

    @property
    def recommended_guidance(self):
        """The guidance scale that its config.json names under "sampling"; 20, as in the model card, if none."""
        return self.notes.get("sampling", {}).get("guidance_scale", 20.0)

    @property
    def frame_size(self):
        """(H, W) of the training frames, in pixels."""
        return tuple(side * self.config.patch_size * self.vae.downsampling for side in self.config.grid)

    def forward(self, latents, x_t, t, k_keep, room, prefix):
        """One training pass: latents, x_t (B, C, T, h, w), t (B,) -> velocity (B, C, T, h, w).

        All rows of clip i keep their first k_keep[i] tokens, k_keep (B,) int64; with 0 it has no condition. room, a
        tuple: so many registers are enough for each clip in the decoder (`sample_k`); the encoder needs all. prefix
        (B,): so many latent frames are clean in x_t.
        """
        codes, _ = self.quantizer(self.encoder(latents))                          # (B, T, K, L)

        def velocity(k, x_t, t, codes, k_keep, prefix):  # of clips that need no more than k registers a row
            return self.decoder(x_t, t, codes[:, :, :k], k_keep, k_keep == 0, prefix)
        k_keep, prefix = (x.to(x_t.device, non_blocking=True) for x in (k_keep, prefix))  # (B,) each
        return in_groups(velocity, room, x_t, t, codes, k_keep, prefix)           # (B, C, T, h, w)

    @torch.no_grad()
    def tokenize(self, video, k=None, sample_posterior=False):
        """video (B, 3, F, H, W) in [-1, 1] -> list of B int64 tensors (1, t, k), t = 1 + (F - 1)/4; k=None gives all K.

        F is 1 + 4n up to 17, or 1 + 16n. Uses the mean of the VAE's posterior, so that it is repeatable;
        `sample_posterior=True` draws from it, as the official code does. Raises ValueError for another shape, range, k.
        Only one window at a time is on the device and in the networks: a clip may be as long as memory has its pixels.
        """
        K = self.config.registers
        k = K if k is None else k
        if not 1 <= k <= K:
            raise ValueError(f"k={k}: expected 1 to {K} tokens a row")
        check_clip(video[..., :1, :, :], self.vae.downsampling * self.config.patch_size)
        rows, overlap = [], self.config.overlap
        for start, end in windows(video.shape[2], self.config.frames, overlap):
            window = check_images(video[:, :, start:end]).to(self.decoder.mask_token.device, torch.float32)
            codes = self.encoder(self.through_vae(self.vae.latents, window, sample_posterior))  # (B, T, K, L)
            _, tokens = self.quantizer(codes)                                     # (B, T, K)
            rows.append(tokens[:, rows_of(overlap) if start else 0:, :k])         # those that are new, (B, 4 or T, k)
        return list(torch.cat(rows, 1).split(1))                                  # B x (1, t, k)

    def detokenize(self, tokens, *options, **named):
        """List of B integer tensors (1, t, k_i) or (t, k_i) -> video (B, 3, 1 + 4·(t - 1), H, W), about [-1, 1].

        `detokenize_windows`, which has the options, with all windows in one tensor.
        """
        return torch.cat(list(self.detokenize_windows(tokens, *options, **named)), 2)  # (B, 3, F, H, W)

    @torch.no_grad()
    def detokenize_windows(self, tokens, timesteps=30, guidance_scale=20.0, perform_norm_guidance=True, generator=None,
                           first_frames=None, noise=None):
        """The frames of `detokenize`, window by window: (B, 3, 17, H, W), then (B, 3, 16, H, W) each.

        All clips have the same number t of rows. Rows of less than K tokens are filled with the mask token.
        timesteps, guidance_scale, perform_norm_guidance and generator are those of `FlexTok.detokenize`. first_frames
        (B, 3, 1 + 4j, H, W): how the clip begins; the tokens of those rows are then ignored. noise: a tensor
        (B, C, T, h, w) for each window instead of drawn ones. Raises ValueError for tokens that are no such list.
        """
        if timesteps < 1:
            raise ValueError(f"timesteps={timesteps}: expected at least 1")
        codes, k_keep = self.codes_of(tokens)                                     # (B, t, k, L), (B,) or None
        most = min(self.config.frames, 4 * codes.shape[1] - 3)  # those of the first window, or of a shorter clip
        if first_frames is not None and first_frames.shape[2] > most:
            raise ValueError(f"{first_frames.shape[2]} first frames: expected 1 + 4n, at most {most}")
        h, w = (side * self.config.patch_size for side in self.config.grid)
        T, overlap, given = rows_of(self.config.frames), self.config.overlap, first_frames
        for i, (first, end) in enumerate(windows(codes.shape[1], T, rows_of(overlap), "rows of tokens")):
            window = codes[:, first:end]                                          # (B, T, k, L)
            if noise is None:
                shape = (1, self.config.latent_channels, window.shape[1], h, w)
                draw = {"generator": generator, "device": codes.device if generator is None else generator.device}
                x = torch.cat([torch.randn(shape, **draw) for _ in codes])        # (B, C, T, h, w)
            else:
                x = noise[i]
            latents = None if given is None else self.through_vae(self.vae.latents, given.to(codes.device))
            guide = flow.APG(0.0, 0.6, axes=(2, 3, 4)) if perform_norm_guidance else flow.cfg
            x = self.sample(x.to(codes.device), window, timesteps, guidance_scale, guide, k_keep, latents)
            video = self.through_vae(self.vae.decode, x).float()                  # (B, 3, F, H, W)
            yield video[:, :, overlap if i else 0:]
            given = video[:, :, video.shape[2] - overlap:] if overlap else None

    @torch.no_grad()
    def sample(self, noise, codes, timesteps, guidance_scale, guide, k_keep=None, given=None):
        """One window: noise (B, C, T, h, w), codes (B, T, k, L) -> latents (B, C, T, h, w).

        given (B, C, j, h, w): its first latent frames, clean, which come back as they are. guide: a rule of guidance,
        (v_cond, v_null, scale) -> v. Official APG for clips takes norms over (T, h, w), that is, for each channel.
        """
        B = len(codes)
        everyone = torch.ones(B, dtype=torch.bool, device=codes.device)
        prefix = None if given is None else torch.full((B,), given.shape[2], device=codes.device)

        def begun(x):  # the given frames in their places
            return x if given is None else torch.cat([given, x[:, :, given.shape[2]:]], 2)

        def velocity(x, t):
            x, modulations = begun(x), self.decoder.modulations(t)
            v_cond = self.decoder(x, t, codes, k_keep, prefix=prefix, modulations=modulations).float()
            if guidance_scale == 1.0:
                return v_cond
            # without a condition all registers are equal: none kept, one stands for all K of a row
            v_null = self.decoder(x, t, codes[:, :, :0], null=everyone, modulations=modulations).float()
            return guide(v_cond, v_null, guidance_scale(t.item()) if callable(guidance_scale) else guidance_scale)

        return begun(flow.euler(velocity, noise, timesteps))                      # (B, C, T, h, w)

    def through_vae(self, function, x, *options):
        """function(x, *options) clip by clip, in float32 also under autocast, for latents decide tokens."""
        exact = all(x.dtype == torch.float32 for x in self.vae.state_dict().values())
        with torch.autocast(x.device.type, enabled=False) if exact else nullcontext():
            return torch.cat([function(clip, *options) for clip in x.split(1)])

    def codes_of(self, tokens):
        """List of B integer tensors (1, t, k_i) or (t, k_i) -> codes (B, t, k, L), padded; k_keep (B,) or None."""
        if not len(tokens):
            raise ValueError("no tokens to decode: the list is empty")
        clips, K = [torch.as_tensor(clip) for clip in tokens], self.config.registers
        clips = [clip[0] if clip.dim() == 3 and len(clip) == 1 else clip for clip in clips]  # B x (t, k_i)
        for i, clip in enumerate(clips):
            if clip.dim() != 2 or not len(clip) or not 1 <= clip.shape[1] <= K:
                raise ValueError(f"clip {i}: tokens of shape {list(clip.shape)}, expected (t, k) with k from 1 to {K}")
            if len(clip) != len(clips[0]):
                raise ValueError(f"clip {i} has {len(clip)} rows of tokens, clip 0 has {len(clips[0])}: decode clips "
                                 f"of different lengths one by one")
        lengths = torch.tensor([clip.shape[1] for clip in clips])                 # (B,)
        padded = torch.stack([F.pad(clip, (0, int(lengths.max()) - clip.shape[1])) for clip in clips])  # (B, t, k)
        codes = self.quantizer.tokens_to_codes(padded.to(self.decoder.mask_token.device))  # (B, t, k, L)
        return codes, None if (lengths == lengths[0]).all() else lengths.to(codes.device)

    def fingerprint(self):
        """A hash of all that decides a clip's tokens, so that a prior is never used with another tokenizer's."""
        settings = (repr(self.quantizer), self.config.enc_head_dim, self.config.scale_codes, self.config.frames,
                    self.config.stride)
        return digest_of(settings, self.vae, self.encoder, self.quantizer)

    def save_pretrained(self, directory, dtype=torch.float32, **notes):
        """Write `directory`/config.json (sizes, and `notes`: anything JSON holds) and model.safetensors in `dtype`."""
        tensors, origin = self.state_dict(), {"official": self.official} if self.official else {}
        save_tensors(os.path.join(directory, "model.safetensors"), tensors, dtype)
        vae = "vidtok" if isinstance(self.vae, VidTok) else "frame_vae"
        write_json(os.path.join(directory, "config.json"), {  # last: it says that the model is whole
            "format": "minFlexTok video", "tokenizer": asdict(self.config), vae: asdict(self.vae.config), **origin,
            **notes})

    @classmethod
    def from_pretrained(cls, name, device="cpu", dtype=torch.float32):
        """Read a tokenizer, ours or official: a directory, a safetensors file, or a name on the Hugging Face hub.

        In eval mode. dtype: of the weights; None is as stored. Raises UserError naming the file and the reason.
        """
        name = shipped(name)
        path = os.path.join(name, "config.json")
        saved = read_json(path) if os.path.isfile(path) else None
        if not isinstance(saved, dict) or saved.get("format") != "minFlexTok video":
            from extras.pretrained import read_videoflextok
            return read_videoflextok(name, device, dtype)
        kind, Sizes = ("frame_vae", VAEConfig) if "frame_vae" in saved else ("vidtok", VidTokConfig)
        vae_config = checked(Sizes, saved.get(kind), f"{path}: {kind}")
        config = checked(VideoConfig, saved.get("tokenizer"), f"{path}: tokenizer")
        model = unloaded_video(config, vae_config, path)
        Sampling = make_dataclass("Sampling", [("guidance_scale", float, 0.0)])
        checked(Sampling, saved.get("sampling", {}), f"{path}: sampling")
        model.official = saved.get("official", {})
        model.notes = {x: y for x, y in saved.items() if x not in ("format", "tokenizer", kind, "official")}
        weights = os.path.join(name, "model.safetensors")
        load_weights(model, load_tensors(weights), weights, device, dtype)
        return model.to(device).eval()


def is_video(name):
    """Whether a checkpoint, ours or official, is a tokenizer of clips: what `VideoFlexTok.from_pretrained` reads."""
    path = os.path.join(shipped(name), "config.json")
    saved = read_json(path) if os.path.isfile(path) else {}
    if isinstance(saved, dict) and "format" in saved:
        return saved["format"] == "minFlexTok video"
    from extras.pretrained import is_official_video
    return is_official_video(name)


class ClipSequences:
    """For a prior: the clips of one window as sequences of tokens, time first, with the methods of a `FlexTok`.

    Register 0 of every row, then register 1 of every row, and so on: so the first T·k tokens are the whole clip in k
    tokens a row, and a prior that writes a sequence may stop after any k. Row by row it would have to finish the first
    frame in all K tokens before it began the second.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.decoder, self.rows = tokenizer, tokenizer.decoder, rows_of(tokenizer.config.frames)
        self.quantizer, self.recommended_guidance = tokenizer.quantizer, tokenizer.recommended_guidance
        self.fingerprint, self.image_size = tokenizer.fingerprint, tokenizer.frame_size
        self.config = SimpleNamespace(registers=self.rows * tokenizer.config.registers, frames=tokenizer.config.frames)

    def tokenize(self, clips, k=None):
        """clips (B, 3, F, H, W) of one window -> list of B int64 tensors (1, k), k=None: (1, T·K)."""
        rows = torch.cat(self.tokenizer.tokenize(clips))                          # (B, T, K)
        return list(rows.transpose(1, 2).flatten(1)[:, :k].split(1))              # B x (1, k)

    def detokenize(self, tokens, *options, **named):
        """List of B tensors (1, n_i) or (n_i,) -> clips (B, 3, F, H, W), of as many whole registers as there are.

        Options as in `VideoFlexTok.detokenize`. Raises ValueError for less than one register, T tokens.
        """
        flat = [torch.as_tensor(clip).flatten() for clip in tokens]
        for i, clip in enumerate(flat):
            if len(clip) < self.rows:
                raise ValueError(f"clip {i}: {len(clip)} tokens, expected at least {self.rows}, one for each row")
        rows = [clip[:len(clip) // self.rows * self.rows].view(-1, self.rows).T for clip in flat]  # B x (T, k_i)
        return self.tokenizer.detokenize(rows, *options, **named)


def unloaded_video(config, vae_config, where):
    """A VideoFlexTok whose tensors have shapes but no memory, for `load_weights` to fill. UserError for silly sizes."""
    if max(config.enc_depth, config.dec_depth, vae_config.layers_per_block) > 1000:
        raise UserError(f"{where}: more than 1000 layers are not read")
    T = rows_of(config.frames)
    if max(T, *config.grid) > min(config.enc_positions, config.dec_positions) \
            or max(T, config.registers) > config.code_positions:
        raise UserError(f"{where}: windows of {config.frames} frames of {shown(config.grid)} patches, with "
                        f"{config.registers} registers a row, are larger than the tables of positions")
    try:
        with torch.device("meta"):
            model = VideoFlexTok(config, make_vae(vae_config))
        model.quantizer = make_quantizer(config)  # with memory: its constants are in no file
    except (ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"{where}: does not describe a tokenizer ({shown(str(error))})") from None
    return model


if __name__ == "__main__":
    T, P, K = 2, 3, 2
    print("Encoder: who (row) sees whom (column); p0 patches of the first latent frame, r0 its registers, and so on.")
    one_hot = torch.eye(T * (P + K))[None, None]                                  # values that tell whom they come from
    zeros = torch.zeros_like(one_hot)
    seen = time_causal_attention(T, P, K)(zeros, zeros, one_hot, scale=1.0)[0, 0]  # (T·(P + K), T·(P + K))
    names = [name for t in range(T) for name in [f"p{t}"] * P + [f"r{t}"] * K]
    print("    ", *names)
    for name, row in zip(names, seen):
        print("  ", name, *(" x" if weight > 0 else " ." for weight in row))
    print("Decoder: everyone sees everyone, or with time_block_causal their own and earlier frames.")
    print("A clip of 49 frames is cut into the windows", ", ".join(f"{a} to {b - 1}" for a, b in windows(49)))
    with torch.device("meta"):  # shapes without memory
        config = VideoConfig()
        vae, encoder, decoder = VidTok(VidTokConfig()), VideoEncoder(config, 6), VideoDecoder(config, 6)
        latents = vae.latents(torch.empty(1, 3, 17, 256, 256))
        codes = encoder(latents)
        velocity = decoder(latents, torch.empty(1), codes[:, :, :16])
    for name, x in (("latents", latents), ("codes", codes), ("velocity", velocity)):
        print(f"d18-d28, {name}: {tuple(x.shape)}")
    print("parameters:", *(f"{sum(p.numel() for p in part.parameters()):,}" for part in (vae, encoder, decoder)))
