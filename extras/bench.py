"""
How fast, and in how much memory: our code beside a plain computation of the same numbers, in one run.

    ours and plain, in turns, some times --> median time of each, their ratio, peak memory, how far their results differ

    python -m extras.bench                     # tokenize, detokenize, train, vae: d12-d12 at 256 px, float32
    python -m extras.bench generate loss       # the prior: with its cache and without; its loss in chunks and at once
    python -m extras.bench detokenize train --preset tiny                         # seconds, to try it
    python -m extras.bench tokenize_video detokenize_video --preset video         # a clip of 17 frames; 1 minute
    python -m extras.bench detokenize train --device cuda --precision bf16 --compile --train_batch 32

Plain means: all K registers kept, a dense mask, a modulation for every token, each pass of guidance by itself, no
cache, all logits at once, channels in their usual order. Quote the ratios: both sides ran in the same minutes.
"""
import itertools
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import flow
from ar import GPT, SIZES, GPTConfig, cross_entropy
from common import UserError, attention_kernel, autocast, command, from_cli, pick_device
from model import Block, FlexTok, TokenizerConfig, norm, powers_of_two, room_for, unpatchify
from vae import VAE, VAEConfig
from video import VideoConfig, VideoFlexTok, sum_of_positions
from vidtok import VidTokConfig, make_vae


@dataclass
class BenchConfig:
    """Measure. Parts: tokenize, detokenize, train, vae, generate, loss, tokenize_video, detokenize_video;
    without any, the first four."""
    part: tuple = ()                  # what to measure, of the parts above
    # tokenizer
    enc_depth: int = 12               # encoder blocks, 64 wide for each
    dec_depth: int = 12               # decoder blocks, 64 wide for each
    registers: int = 256              # K
    image_size: int = 256             # side in pixels, a multiple of 16: the VAE's factor is 8, the patch size 2
    vae_width: int = 128              # feature channels of the VAE's finest level
    ks: tuple = (256, 16, 1)          # tokens that detokenize is given; tokenize is asked for all K and for 16
    batch_size: int = 1               # images, of tokenize, detokenize and vae
    train_batch: int = 2              # images of a training step
    steps: int = 4                    # sampler steps; the time is given for one
    # prior
    size: str = "49M"                 # 49M, 85M, 201M, 393M, 679M or 1.33B
    generate_batches: tuple = (1, 8)  # images written at once
    length: int = 256                 # tokens written
    # running
    repeats: int = 3                  # of each side, in turns
    device: str = "auto"              # auto, cpu, cuda, cuda:1, mps
    precision: str = "fp32"           # fp32, bf16 or auto
    compile: bool = False             # torch.compile our side's blocks
    peak_memory: bool = True          # measure it too; on a CPU each side needs a process of its own for that


PRESETS = {
    "tiny": dict(enc_depth=2, dec_depth=2, registers=32, image_size=64, vae_width=32, ks=(32, 16, 1), length=16),
    "video": dict(enc_depth=4, dec_depth=4, registers=128, image_size=192),
    "d12-d12": dict(enc_depth=12, dec_depth=12),
    "d18-d18": dict(enc_depth=18, dec_depth=18),
    "d18-d28": dict(enc_depth=18, dec_depth=28),
}


# ---------------------------------------------------------------------------------------------------------------
# The plain computations


def dense(mask):
    """An `attend` for model.Attention with a mask (n, n), True where row sees column; fast kernels take none."""
    return lambda q, k, v, scale: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def plain_encoder(encoder, latents):
    """latents (B, C, h, w) -> (B, K, L): all K registers, one attention with a dense mask."""
    patches = encoder.patch_embed(latents)                                        # (B, N, D)
    B, N, _ = patches.shape
    x = torch.cat([patches, encoder.registers.expand(B, -1, -1)], 1)              # (B, N + K, D)
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    mask[:N, :N] = True  # patches see all patches, registers all patches and the registers before them
    for block in encoder.blocks:
        x = Block.forward(block, x, dense(mask))
    return encoder.head(norm(x[:, N:]))                                           # (B, K, L)


def plain_decoder(decoder, x_t, t, codes, k_keep, null):
    """x_t (B, C, h, w), t (B,), codes (B, K, L), k_keep (B,), null (B,) bool -> velocity (B, C, h, w): N + K tokens."""
    B, _, h, w = x_t.shape
    registers = decoder.from_codes(codes) + decoder.positions                     # (B, K, D)
    kept = torch.arange(decoder.K, device=x_t.device) < k_keep[:, None]           # (B, K)
    registers = torch.where(kept[..., None], registers, decoder.mask_token)
    registers = torch.where(null[:, None, None], decoder.null_token, registers)
    return unpatchify(plain_blocks(decoder, decoder.patch_embed(x_t), registers, t), decoder.p, h, w)  # (B, C, h, w)


def plain_blocks(decoder, patches, registers, t):
    """patches (B, N, D), registers (B, K, D), t (B,) -> (B, N, p·p·C): a modulation for every token, all see all."""
    x, N = torch.cat([patches, registers], 1), patches.shape[1]                   # (B, N + K, D)
    stream = (torch.arange(x.shape[1], device=x.device) >= N).long()              # (N + K,), 0 a patch, 1 a register
    attend = dense(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device))
    t_embedding = F.silu(decoder.time_embed(t))                                   # (B, D)
    for block in decoder.blocks:
        modulation = block.adaln(t_embedding).unflatten(-1, (2, 6, -1))[:, stream]  # (B, N + K, 6, D)
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = modulation.unbind(2)  # each (B, N + K, D)
        x = x + gate_attn * block.attn(norm(x) * (1 + scale_attn) + shift_attn, attend)
        x = x + gate_mlp * block.mlp(norm(x) * (1 + scale_mlp) + shift_mlp)
    shift, scale = decoder.head_adaln(t_embedding).unsqueeze(1).chunk(2, -1)      # each (B, 1, D)
    return decoder.head(norm(x[:, :N]) * (1 + scale) + shift)


def plain_euler(velocity, x, apg, steps):
    """Noise x (B, ...) -> latents like it: two passes a step, velocity(x, t (B,), null, a bool), APG with scale 7.5."""
    for i in range(steps, 0, -1):
        t = torch.full((len(x),), i / steps, device=x.device)                     # (B,)
        v_cond, v_uncond = (velocity(x, t, null).float() for null in (False, True))  # each like x
        x = x - apg(v_cond, v_uncond, 7.5) / steps
    return x


@torch.no_grad()
def plain_detokenize(tokenizer, tokens, steps, generator):
    """tokens (B, k) -> images (B, 3, H, W): two passes over N + K tokens in each step, Euler, APG with scale 7.5."""
    B, k = tokens.shape
    K, C = tokenizer.config.registers, tokenizer.config.latent_channels
    codes = tokenizer.quantizer.tokens_to_codes(F.pad(tokens, (0, K - k)))        # (B, K, L)
    h, w = (side * tokenizer.config.patch_size for side in tokenizer.config.grid)
    x = torch.cat([torch.randn(1, C, h, w, generator=generator) for _ in range(B)]).to(tokens.device)  # (B, C, h, w)
    k_keep = torch.full((B,), k, device=tokens.device)                            # (B,)
    velocity = lambda x, t, null: plain_decoder(  # noqa: E731
        tokenizer.decoder, x, t, codes, k_keep, torch.full((B,), null, device=x.device))
    return tokenizer.vae.decode(plain_euler(velocity, x, flow.APG(), steps))      # (B, 3, H, W)


def plain_video_encoder(encoder, latents):
    """latents (B, C, T, h, w) -> (B, T, K, L): one attention over all rows with a dense mask."""
    patches = encoder.patch_embed(latents)                                        # (B, T, P, D)
    B, T, P, _ = patches.shape
    x = torch.cat([patches, encoder.registers[:T].expand(B, -1, -1, -1)], 2).flatten(1, 2)  # (B, T·(P + K), D)
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    for first in range(0, x.shape[1], x.shape[1] // T):
        mask[first:first + P, first:first + P] = True  # patches also see the later patches of their row
    for block in encoder.blocks:
        x = Block.forward(block, x, dense(mask))
    return encoder.head(norm(x.unflatten(1, (T, -1))[:, :, P:]))                  # (B, T, K, L)


def plain_video_decoder(decoder, x_t, t, codes, k, null):
    """x_t (B, C, T, h, w), t (B,), codes (B, T, K, L) -> velocity (B, C, T, h, w): T·(P + K) tokens.

    The first k codes of each row are kept, with null none of them.
    """
    B, _, T, h, w = x_t.shape
    registers = decoder.from_codes(codes) + sum_of_positions(decoder.positions, T, decoder.K)  # (B, T, K, D)
    registers = torch.where((torch.arange(decoder.K, device=x_t.device) < k)[:, None], registers, decoder.mask_token)
    registers = decoder.null_token.expand_as(registers) if null else registers    # (B, T, K, D)
    patches = decoder.patch_embed(x_t).flatten(1, 2)                              # (B, T·P, D)
    x = plain_blocks(decoder, patches, registers.flatten(1, 2), t).view(B * T, patches.shape[1] // T, -1)
    return unpatchify(x, decoder.p, h, w).unflatten(0, (B, T)).transpose(1, 2)    # (B·T, C, h, w) -> (B, C, T, h, w)


@torch.no_grad()
def plain_video_sample(tokenizer, x, codes, k, steps):
    """Noise x (B, C, T, h, w), codes (B, T, K, L) -> latents like x: two passes a step, Euler, APG with scale 7.5."""
    return plain_euler(lambda x, t, null: plain_video_decoder(tokenizer.decoder, x, t, codes, k, null), x,
                       flow.APG(0.0, 0.6, axes=(2, 3, 4)), steps)


@torch.no_grad()
def plain_generate(gpt, B, k):
    """Greedy `gpt.generate` without a cache, (B, k): every token by a whole pass over all before it."""
    tokens = torch.empty(B, 0, dtype=torch.long, device=gpt.device)
    while tokens.shape[1] < k:
        last = gpt.hidden(F.pad(tokens, (0, 1)))[:, -1]                           # (B, D); nothing looks at the padding
        tokens = torch.cat([tokens, gpt.head(last).argmax(-1, keepdim=True)], 1)  # (B, i + 1)
    return tokens


# ---------------------------------------------------------------------------------------------------------------
# What is measured: each part yields its rows


@dataclass
class Row:
    """One line of the table: two functions that return the same tensor, or the same list of tensors."""
    name: str
    ours: object
    plain: object
    count: int = 1       # how many of `unit` one call makes
    unit: str = "image"


def build(config, device, vae_width):
    """A tokenizer of these sizes with random weights, none of them zero. A narrow VAE costs next to nothing."""
    if config.image_size % 16:
        raise UserError(f"--image_size {config.image_size}: expected a multiple of 16")
    torch.manual_seed(0)
    channels, side = (vae_width, 2 * vae_width, 4 * vae_width, 4 * vae_width), config.image_size // 16
    with device:
        tokenizer = FlexTok(
            TokenizerConfig(grid=(side, side), registers=config.registers, head_std=0.5,
                            enc_width=64 * config.enc_depth, enc_depth=config.enc_depth,
                            dec_width=64 * config.dec_depth, dec_depth=config.dec_depth),
            VAE(VAEConfig(block_out_channels=channels, norm_num_groups=min(32, vae_width))))
        open_gates(tokenizer.decoder)
    if config.compile:
        tokenizer.compile_blocks()  # the plain computations call the class's `forward`
    return tokenizer.eval()


def open_gates(decoder):
    """Random weights for the layers that start at zero."""
    for name, p in decoder.named_parameters():
        if "adaln" in name or name.startswith("head"):
            torch.nn.init.normal_(p, std=0.02)


def tokenize_rows(config, device):
    """Encoder and quantizer, from latents, for all K tokens and for 16."""
    tokenizer, B, side = build(config, device, 8), config.batch_size, config.image_size // 8
    latents = torch.randn(B, 16, side, side, device=device)                       # (B, C, h, w)
    for k in (config.registers, min(16, config.registers)):
        yield Row(f"tokenize k={k}, from latents",
                  torch.no_grad()(lambda: tokenizer.quantizer(tokenizer.encoder(latents, k))[1]),
                  torch.no_grad()(lambda: tokenizer.quantizer(plain_encoder(tokenizer.encoder, latents))[1][:, :k]), B)


def detokenize_rows(config, device):
    """Sampling with APG, without the VAE: one that is 8 channels wide stands in for it, under 1 % of the time."""
    tokenizer = build(config, device, 8)
    for k in config.ks:
        tokens = torch.randint(tokenizer.quantizer.vocab_size, (config.batch_size, k), device=device)  # (B, k)
        seeded = lambda: torch.Generator().manual_seed(0)  # noqa: E731
        yield Row(f"detokenize k={k}, APG, a step",
                  lambda: tokenizer.detokenize(list(tokens), config.steps, 7.5, generator=seeded()),
                  lambda: plain_detokenize(tokenizer, tokens, config.steps, seeded()), config.steps, "step")


def train_rows(config, device):
    """Forward and backward from latents: the loss, and the gradients of the queries in both first blocks.

    k is each power of two in turn, K/2 and 1 first: the default batch of two then has (128, 1), about pow2's mean.
    """
    tokenizer, B, side = build(config, device, 8).train(), config.train_batch, config.image_size // 8
    *powers, half, K = powers_of_two(config.registers)
    k_keep = torch.tensor(list(itertools.islice(itertools.cycle([half, *powers, K]), B)))  # (B,)
    room, null = room_for(k_keep, config.registers), torch.zeros(B, dtype=torch.bool)
    latents, noise = (torch.randn(B, 16, side, side, device=device) for _ in range(2))  # (B, C, h, w)
    t = torch.rand(B, device=device)
    x_t = flow.interpolate(latents, noise, t)

    def plain():
        codes, _ = tokenizer.quantizer(plain_encoder(tokenizer.encoder, latents))  # (B, K, L)
        return plain_decoder(tokenizer.decoder, x_t, t, codes, k_keep.to(device), null.to(device))

    def step(forward):
        tokenizer.zero_grad()
        with attention_kernel(device):
            loss = flow.loss_per_sample(forward(), noise - latents).mean()
        loss.backward()
        trunks = tokenizer.encoder, tokenizer.decoder
        return [loss.detach(), *(trunk.blocks[0].attn.wq.weight.grad.clone() for trunk in trunks)]

    yield Row("train, forward and backward", lambda: step(lambda: tokenizer(latents, x_t, t, k_keep, room)),
              lambda: step(plain), B)


def vae_rows(config, device):
    """The autoencoder alone. Plain is the same with channels in their usual order, one plane after the other."""
    vae, B, side = build(config, device, config.vae_width).vae, config.batch_size, config.image_size
    images = torch.rand(B, 3, side, side, device=device) * 2 - 1                  # (B, 3, H, W)
    latents = torch.randn(B, 16, side // 8, side // 8, device=device)             # (B, C, h, w)
    yield Row("vae encode", torch.no_grad()(lambda: vae.latents(images)),
              torch.no_grad()(lambda: vae.quant_conv(vae.encoder(images)).chunk(2, 1)[0]), B)
    yield Row("vae decode", torch.no_grad()(lambda: vae.decode(latents)),
              torch.no_grad()(lambda: vae.decoder(vae.post_quant_conv(latents))), B)


def generate_rows(config, device):
    """The prior writes tokens, with its cache and without; both write the same."""
    if config.size not in SIZES:
        raise UserError(f"--size {config.size}: expected one of {', '.join(SIZES)}")
    torch.manual_seed(0)
    width, depth = SIZES[config.size]
    gpt = GPT(GPTConfig(width=width, depth=depth, length=config.length)).to(device).eval()
    torch.nn.init.normal_(gpt.head.linear.weight, std=0.02)
    with autocast(device, config.precision):
        if torch.is_autocast_enabled(device.type):  # the cache has the weights' type, so these get what autocast makes
            gpt = gpt.to(torch.get_autocast_dtype(device.type))
    for B in config.generate_batches:
        yield Row(f"generate, {config.size} prior, batch {B}",
                  lambda: gpt.generate(n=B, temperature=0, compile=config.compile),
                  lambda: plain_generate(gpt, B, config.length), B * config.length, "token")


def loss_rows(config, device):
    """Forward and backward of the prior's loss for 8 images, V = 64,000, T = 256, width 640: in chunks and at once."""
    torch.manual_seed(0)
    hidden = torch.randn(2048, 640, device=device, requires_grad=True)
    weight = (torch.randn(64_000, 640, device=device) * 0.02).requires_grad_()
    targets = torch.randint(64_000, (2048,), device=device)

    def step(loss):
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]

    yield Row("loss of the prior", lambda: step(cross_entropy(hidden, weight, targets)[0]),
              lambda: step(F.cross_entropy(F.linear(hidden, weight), targets)), 2048, "token")


def build_video(config, device):
    """As `build`, but a tokenizer of clips, and random latents (B, C, T, h, w) of 17 frames. Its VAE is not used."""
    if config.image_size % 16:
        raise UserError(f"--image_size {config.image_size}: expected a multiple of 16")
    if config.compile:
        raise UserError("--compile: torch cannot compile the blocks of a tokenizer of clips yet")
    torch.manual_seed(0)
    side, K = config.image_size // 16, config.registers
    with device:
        tokenizer = VideoFlexTok(
            VideoConfig(grid=(side, side), registers=K, head_std=0.5, code_positions=max(5, K),
                        enc_positions=max(5, side), enc_width=64 * config.enc_depth, enc_depth=config.enc_depth,
                        dec_positions=max(5, side), dec_width=64 * config.dec_depth, dec_depth=config.dec_depth),
            make_vae(VidTokConfig(channels=4, channel_mult=(1, 1, 1, 1), layers_per_block=1)))
        open_gates(tokenizer.decoder)
    return tokenizer.eval(), torch.randn(config.batch_size, 16, 5, 2 * side, 2 * side, device=device)


def tokenize_video_rows(config, device):
    """Encoder and quantizer of a clip, from latents. All K registers are needed for any k: see video.py."""
    tokenizer, latents = build_video(config, device)
    yield Row("tokenize_video, from latents",
              torch.no_grad()(lambda: tokenizer.quantizer(tokenizer.encoder(latents))[1]),
              torch.no_grad()(lambda: tokenizer.quantizer(plain_video_encoder(tokenizer.encoder, latents))[1]),
              config.batch_size, "clip")


def detokenize_video_rows(config, device):
    """Sampling a clip's latents with APG, from all K tokens a row and from 16."""
    tokenizer, noise = build_video(config, device)
    K, B = config.registers, config.batch_size
    codes = tokenizer.quantizer.tokens_to_codes(
        torch.randint(tokenizer.quantizer.vocab_size, (B, 5, K), device=device))  # (B, T, K, L)
    for k in (K, min(16, K)):
        yield Row(f"detokenize_video k={k}, a step",
                  lambda: tokenizer.sample(noise, codes[:, :, :k], config.steps, 7.5,
                                           flow.APG(0.0, 0.6, axes=(2, 3, 4))),
                  lambda: plain_video_sample(tokenizer, noise, codes, k, config.steps), config.steps, "step")


ROWS = {"tokenize": tokenize_rows, "detokenize": detokenize_rows, "train": train_rows, "vae": vae_rows,
        "generate": generate_rows, "loss": loss_rows,
        "tokenize_video": tokenize_video_rows, "detokenize_video": detokenize_video_rows}


# ---------------------------------------------------------------------------------------------------------------
# Measuring


def measure(row, config, device, part):
    """Both sides of a row: seconds in turns, results compared, memory. Prints a line of the table; returns a dict."""
    with autocast(device, config.precision):
        results = row.ours(), row.plain()
        seconds, plain_seconds = in_turns([row.ours, row.plain], config.repeats, device)
    pairs = zip(*results) if isinstance(results[0], list) else [results]
    difference = max(difference_of(*pair) for pair in pairs)
    peaks = [peak_bytes(side, row, config, device, part) if config.peak_memory else None for side in ("ours", "plain")]
    times = "".join(f"{1000 * t / row.count:10,.{0 if t / row.count >= 1 else 2}f}" for t in (seconds, plain_seconds))
    memory = "".join("        -" if peak is None else f"{peak / 2**20:9,.0f}" for peak in peaks)
    print(f"{row.name:34}{times} {row.unit:6}{plain_seconds / seconds:7.2f} {memory}   {difference:.0e}", flush=True)
    return dict(row=row.name, ratio=plain_seconds / seconds, difference=difference)


def difference_of(ours, plain):
    """The largest difference, relative to the largest value; of tokens the share that are others."""
    if plain.is_floating_point():
        return ((ours - plain).abs().max() / plain.abs().max()).item()
    return (ours != plain).float().mean().item()


def in_turns(sides, repeats, device):
    """Run the functions `sides` in turns; the median seconds of each. They must have run before, to be warm."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    seconds = [[] for _ in sides]
    for _ in range(repeats):
        for spent, side in zip(seconds, sides):
            wait()
            start = time.perf_counter()
            side()
            wait()
            spent.append(time.perf_counter() - start)
    return [sorted(spent)[len(spent) // 2] for spent in seconds]


def peak_bytes(side, row, config, device, part):
    """Most memory in use while one side runs: of the GPU, or on a CPU of a process that runs nothing else."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        with autocast(device, config.precision):
            getattr(row, side)()
        return torch.cuda.max_memory_allocated(device)
    if not os.path.exists("/proc/self/status"):  # only Linux says what we ask for
        return None
    program = f"from extras.bench import *; run_side({side!r}, {row.name!r}, {config!r}, {part!r})"
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return int(subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, cwd=root).stdout)


def run_side(side, name, config, part):
    """What the process started by `peak_bytes` does: run one side of one row, and print the most bytes it ever held."""
    device = pick_device(config.device)
    row = next(row for row in ROWS[part](config, device) if row.name == name)
    with autocast(device, config.precision):
        getattr(row, side)()
    with open("/proc/self/status", encoding="ascii") as file:  # getrusage starts from what the parent process reached
        print(next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")))


def main(config):
    """Measure the parts named in `config.part`. Returns the rows. Raises UserError."""
    parts, device = config.part or ("tokenize", "detokenize", "train", "vae"), pick_device(config.device)
    if unknown := set(parts) - {*ROWS}:
        raise UserError(f"{min(unknown)}: expected {', '.join(ROWS)}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"d{config.enc_depth}-d{config.dec_depth}, K = {config.registers}, {config.image_size} px, "
          f"{config.precision}{', compiled' if config.compile else ''}; {device}, {name}, "
          f"torch {torch.__version__}; median of {config.repeats}\n"
          f"{'':34}{'ms, ours':>10}{'plain':>10} {'per':6}{'ratio':>7} {'MiB, ours':>9}{'plain':>9}   differ")
    return [measure(row, config, device, part) for part in parts for row in ROWS[part](config, device)]


if __name__ == "__main__":
    command(main, from_cli(BenchConfig, PRESETS, positional="part"))
