"""
How fast, and against what: every figure beside a plain computation of the same numbers, in one run.

    our code and the plain one, in turns, several times --> median of each, their ratio, and how far their results differ

    python -m extras.bench                              # tokenize, detokenize, train, vae: d12-d12 at 256 px, float32
    python -m extras.bench generate loss                # the prior: with its cache and without; its loss in chunks and at once
    python -m extras.bench memory                       # what training holds in memory, by preset; computed, not measured
    python -m extras.bench scaling                      # curves over batch, k, depth and image size, out/scaling.png

Plain means: all K registers kept, a dense mask, a modulation for every token, each pass of guidance for itself, no cache.
GFLOP are counted operation by operation (two for a multiplication with an addition), the share of the peak is against the
fastest matrix product measured here. Ratios are what to quote: both sides ran on the same machine in the same minutes.
Not part of the reading order.
"""
import dataclasses
import itertools
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.overrides import TorchFunctionMode

import flow
from ar import GPT, SIZES, GPTConfig, cross_entropy
from common import UserError, attention_kernel, autocast, command, from_cli, pick_device, replacing, write_json
from model import Decoder, Encoder, FlexTok, TokenizerConfig, norm, powers_of_two, unpatchify
from vae import VAE, ResnetBlock, VAEConfig


@dataclass
class BenchConfig:
    """Measure. Parts: tokenize, detokenize, train, vae, generate, loss, memory, scaling; without any, the first four."""
    part: tuple = ()                  # what to measure: tokenize, detokenize, train, vae, generate, loss, memory, scaling
    # tokenizer
    enc_depth: int = 12               # encoder blocks, 64 wide for each
    dec_depth: int = 12               # decoder blocks, 64 wide for each
    registers: int = 256              # K
    image_size: int = 256             # side in pixels; the VAE's factor is 8, the patch size 2
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
    json: str = ""                    # also write all figures here
    out: str = "out/scaling.png"      # picture of scaling
    side: str = ""                    # used by bench.py itself: only run this side, ours or plain, and print its memory,
    row: str = ""                     # of this row


PRESETS = {
    "tiny": dict(enc_depth=2, dec_depth=2, registers=32, image_size=64, vae_width=32, ks=(32, 16, 1), length=16, size="49M"),  # seconds
    "d12-d12": dict(enc_depth=12, dec_depth=12),
    "d18-d18": dict(enc_depth=18, dec_depth=18),
    "d18-d28": dict(enc_depth=18, dec_depth=28),
}


# ---------------------------------------------------------------------------------------------------------------
# The plain computations. They call `forward` themselves where our side may have compiled the block.


def dense_mask(n, device):
    """(n, n) bool, all True: what an implementation that packs any sequences hands to attention."""
    return torch.ones(n, n, dtype=torch.bool, device=device)


def attend_with(mask):
    """An `attend` for model.Attention with a mask (n, n), True where row sees column."""
    return lambda q, k, v, scale: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def plain_encoder(encoder, latents):
    """latents (B, C, h, w) -> (B, K, L): all K registers, one attention with a dense mask."""
    patches = encoder.patch_embed(latents)                                        # (B, N, D)
    B, N, _ = patches.shape
    x = torch.cat([patches, encoder.registers.expand(B, -1, -1)], 1)              # (B, N + K, D)
    mask = dense_mask(x.shape[1], x.device).tril()
    mask[:N, :N] = True  # patches see all patches, registers all patches and those before them
    for block in encoder.blocks:
        x = block.forward(x, attend_with(mask))
    return encoder.head(norm(x[:, N:]))                                           # (B, K, L)


def plain_vae(net, x):
    """vae.Encoder or vae.Decoder: the layers one after the other, nothing in place, channels in the usual order."""
    mid, levels = [net.mid_block], net.down_blocks if hasattr(net, "down_blocks") else net.up_blocks
    x = net.conv_in(x)
    for part in [*levels, *mid] if hasattr(net, "down_blocks") else [*mid, *levels]:
        if part is net.mid_block:
            layers = [part.resnets[0], *part.attentions, part.resnets[1]]
        else:
            layers = [*part.resnets, *part.downsamplers, *part.upsamplers]
        for layer in layers:
            if isinstance(layer, ResnetBlock):
                residual = layer.conv1(F.silu(layer.norm1(x)))
                residual = layer.conv2(F.silu(layer.norm2(residual)))
                x = layer.conv_shortcut(x) + residual
            else:
                x = layer(x)
    return net.conv_out(F.silu(net.conv_norm_out(x)))


@torch.no_grad()
def plain_latents(vae, images):
    """images (B, 3, H, W) -> the posterior's mean, scaled, (B, C, h, w)."""
    moments = vae.quant_conv(plain_vae(vae.encoder, images))                      # (B, 2C, h, w)
    return vae.config.scaling_factor * moments.float().chunk(2, 1)[0]


@torch.no_grad()
def plain_decode(vae, latents):
    """latents (B, C, h, w), scaled -> images (B, 3, H, W)."""
    return plain_vae(vae.decoder, vae.post_quant_conv(latents / vae.config.scaling_factor))


def plain_decoder(decoder, x_t, t, codes, k_keep, null):
    """x_t (B, C, h, w), t (B,), codes (B, K, L), k_keep (B,), null (B,) bool -> velocity (B, C, h, w): N + K tokens."""
    B, _, h, w = x_t.shape
    registers = decoder.from_codes(codes) + decoder.positions                     # (B, K, D)
    kept = torch.arange(decoder.K, device=x_t.device) < k_keep[:, None]           # (B, K)
    registers = torch.where(kept[..., None], registers, decoder.mask_token)
    registers = torch.where(null[:, None, None], decoder.null_token, registers)
    patches = decoder.patch_embed(x_t)                                            # (B, N, D)
    x, N = torch.cat([patches, registers], 1), patches.shape[1]                   # (B, N + K, D)
    stream = (torch.arange(x.shape[1], device=x.device) >= N).long()              # (N + K,), 0 a patch, 1 a register
    attend = attend_with(dense_mask(x.shape[1], x.device))
    t_embedding = decoder.time_embed(t)                                           # (B, D)
    for block in decoder.blocks:
        modulation = block.modulation(t_embedding)[:, stream]                     # (B, N + K, 6, D)
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = modulation.unbind(2)  # each (B, N + K, D)
        x = x + gate_attn * block.attn(norm(x) * (1 + scale_attn) + shift_attn, attend)
        x = x + gate_mlp * block.mlp(norm(x) * (1 + scale_mlp) + shift_mlp)
    shift, scale = decoder.head_adaln(F.silu(t_embedding)).unsqueeze(1).chunk(2, -1)  # each (B, 1, D)
    return unpatchify(decoder.head(norm(x[:, :N]) * (1 + scale) + shift), decoder.p, h, w)  # (B, C, h, w)


@torch.no_grad()
def plain_detokenize(tokenizer, tokens, steps, generator):
    """tokens (B, k) -> images (B, 3, H, W): two passes over N + K tokens in each step, Euler, APG with scale 7.5."""
    B, k = tokens.shape
    K, C = tokenizer.config.registers, tokenizer.config.latent_channels
    codes = tokenizer.fsq.tokens_to_codes(F.pad(tokens, (0, K - k)))              # (B, K, L)
    h, w = (side * tokenizer.config.patch_size for side in tokenizer.config.grid)
    x = torch.cat([torch.randn(1, C, h, w, generator=generator) for _ in range(B)]).to(tokens.device)  # (B, C, h, w)
    apg, k_keep = flow.APG(), torch.full((B,), k, device=tokens.device)
    for i in range(steps, 0, -1):
        t = torch.full((B,), i / steps, device=x.device)                          # (B,)
        v_cond, v_uncond = (plain_decoder(tokenizer.decoder, x, t, codes, k_keep, torch.full((B,), null, device=x.device)).float()
                            for null in (False, True))                            # (B, C, h, w) each
        x = x - apg(v_cond, v_uncond, 7.5) / steps
    return plain_decode(tokenizer.vae, x)                                         # (B, 3, H, W)


@torch.no_grad()
def plain_generate(gpt, B, k):
    """`gpt.generate` without a cache, (B, k): every token by a whole pass over all before it, the head for the last one only."""
    tokens = torch.empty(B, 0, dtype=torch.long, device=gpt.head.linear.weight.device)
    while tokens.shape[1] < k:
        x = gpt.preprocessor(tokens)                                              # (B, i + 1, D)
        for block in gpt.trunk.blocks:
            x = block(x)
        logits = gpt.head(gpt.trunk.post_trunk_norm(x[:, -1]))                    # (B, V)
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)          # (B, i + 1)
    return tokens


# ---------------------------------------------------------------------------------------------------------------
# What is measured: each part yields its rows


@dataclass
class Row:
    """One line of the table: two functions that return the same tensor, or the same list of tensors."""
    name: str
    ours: object
    plain: object
    count: int = 1          # how many of `unit` one call makes
    unit: str = "image"
    passes: tuple = (1, 1)  # FLOP in units of what the forward pass has: 3 with the backward one, which costs two
    compile: object = None  # compiles our side, if asked for
    read_bytes: int = 0     # what our side has to read from memory at least, in one call: bounds the prior's speed


def build(config, device, vae_width):
    """A tokenizer of these sizes with random weights, none of them zero. A narrow VAE costs next to nothing."""
    torch.manual_seed(0)
    groups, side = min(32, vae_width), config.image_size // 16
    if config.image_size % 16:
        raise UserError(f"--image_size {config.image_size}: expected a multiple of 16")
    with device:
        vae = VAE(VAEConfig(block_out_channels=(vae_width, 2 * vae_width, 4 * vae_width, 4 * vae_width), norm_num_groups=groups))
        tokenizer = FlexTok(TokenizerConfig(
            grid=(side, side), registers=config.registers, enc_width=64 * config.enc_depth, enc_depth=config.enc_depth,
            dec_width=64 * config.dec_depth, dec_depth=config.dec_depth, head_std=0.5), vae)
        for name, p in tokenizer.decoder.named_parameters():
            if "adaln" in name or name.startswith("head"):  # these start at zero
                torch.nn.init.normal_(p, std=0.02)
    return tokenizer.eval()


def some_tokens(tokenizer, B, k, device):
    return torch.randint(tokenizer.fsq.vocab_size, (B, k), device=device)         # (B, k)


def tokenize_rows(config, device):
    """Encoder and FSQ from latents, and the whole way from images, for all K tokens and for 16."""
    tokenizer, B, side = build(config, device, config.vae_width), config.batch_size, config.image_size
    images = torch.rand(B, 3, side, side, device=device) * 2 - 1                  # (B, 3, H, W)
    latents = torch.randn(B, 16, side // 8, side // 8, device=device)             # (B, C, h, w)

    @torch.no_grad()
    def ours(latents, k):
        return tokenizer.fsq(tokenizer.encoder(latents, k))[1]                    # (B, k)

    @torch.no_grad()
    def plain(latents, k):
        return tokenizer.fsq(plain_encoder(tokenizer.encoder, latents))[1][:, :k]  # (B, k)

    for k in (config.registers, min(16, config.registers)):
        yield Row(f"tokenize k={k}, from latents", lambda: ours(latents, k), lambda: plain(latents, k), B,
                  compile=tokenizer.compile_blocks)
        yield Row(f"tokenize k={k}, with the VAE", lambda: torch.cat(tokenizer.tokenize(images, k)),
                  lambda: plain(plain_latents(tokenizer.vae, images), k), B, compile=tokenizer.compile_blocks)


def detokenize_rows(config, device):
    """Sampling with APG, without the VAE: one that is 8 channels wide stands in for it, under 1 % of the time."""
    tokenizer, B = build(config, device, 8), config.batch_size
    for k in config.ks:
        tokens = some_tokens(tokenizer, B, k, device)
        seeded = lambda: torch.Generator().manual_seed(0)  # noqa: E731
        yield Row(f"detokenize k={k}, APG, a step", lambda: tokenizer.detokenize(list(tokens), config.steps, 7.5, generator=seeded()),
                  lambda: plain_detokenize(tokenizer, tokens, config.steps, seeded()), config.steps, "step",
                  compile=tokenizer.compile_blocks)


def train_rows(config, device):
    """Forward and backward of encoder and decoder from latents. Returns the loss and the gradients of both first blocks' queries.

    pow2 draws each power of two equally often. A batch here goes through all of them in a fixed order, K/2 and 1 first: so
    the default batch of two has (128, 1), a little more than two draws have on average (2·57).
    """
    tokenizer, B, side = build(config, device, 8).train(), config.train_batch, config.image_size // 8
    powers = powers_of_two(config.registers)
    k_keep = torch.tensor(list(itertools.islice(itertools.cycle([*powers[-2:-1], *powers[:-2], powers[-1]]), B)))  # (B,)
    null = torch.zeros(B, dtype=torch.bool)
    latents, noise = (torch.randn(B, 16, side, side, device=device) for _ in range(2))  # (B, C, h, w)
    t = torch.rand(B, device=device)
    x_t = flow.interpolate(latents, noise, t)

    def plain():
        codes, _ = tokenizer.fsq(plain_encoder(tokenizer.encoder, latents))       # (B, K, L)
        return plain_decoder(tokenizer.decoder, x_t, t, codes, k_keep.to(device), null.to(device))

    def step(forward):
        tokenizer.zero_grad()
        with attention_kernel(device):
            loss = flow.loss_per_sample(forward(), noise - latents).mean()
        loss.backward()
        return [loss.detach(), *(part.blocks[0].attn.wq.weight.grad.clone() for part in (tokenizer.encoder, tokenizer.decoder))]

    yield Row("train, forward and backward", lambda: step(lambda: tokenizer(latents, x_t, t, k_keep, null)),
              lambda: step(plain), B, passes=(3, 3), compile=tokenizer.compile_blocks)


def vae_rows(config, device):
    """The autoencoder alone."""
    vae, B, side = build(dataclasses.replace(config, enc_depth=1, dec_depth=1), device, config.vae_width).vae, config.batch_size, config.image_size
    images = torch.rand(B, 3, side, side, device=device) * 2 - 1                  # (B, 3, H, W)
    latents = torch.randn(B, 16, side // 8, side // 8, device=device)             # (B, C, h, w)
    yield Row("vae encode", torch.no_grad()(lambda: vae.latents(images)), torch.no_grad()(lambda: plain_latents(vae, images)), B)
    yield Row("vae decode", torch.no_grad()(lambda: vae.decode(latents)), torch.no_grad()(lambda: plain_decode(vae, latents)), B)


def generate_rows(config, device):
    """The prior writes tokens, with its cache and without; both write the same. Every token needs all weights once."""
    if config.size not in SIZES:
        raise UserError(f"--size {config.size}: expected one of {', '.join(SIZES)}")
    torch.manual_seed(0)
    width, depth = SIZES[config.size]
    gpt = GPT(GPTConfig(width=width, depth=depth, length=config.length)).to(device).eval()
    torch.nn.init.normal_(gpt.head.linear.weight, std=0.02)
    with autocast(device, config.precision):
        if torch.is_autocast_enabled(device.type):  # its cache has the type of its weights, so these must be what autocast makes
            gpt = gpt.to(torch.get_autocast_dtype(device.type))
    weights = sum(p.numel() * p.element_size() for module in (gpt.trunk, gpt.head) for p in module.parameters())
    cache = 2 * depth * width * config.length * gpt.head.linear.weight.element_size()  # read whole, for every sequence and token
    for B in config.generate_batches:
        compiled = []  # not empty: compile
        yield Row(f"generate, {config.size} prior, batch {B}", lambda: gpt.generate(n=B, temperature=0, compile=bool(compiled)),
                  lambda: plain_generate(gpt, B, config.length), B * config.length, "token", compile=lambda: compiled.append(True),
                  read_bytes=config.length * (weights + B * cache))


def loss_rows(config, device):
    """Forward and backward of the prior's loss at V = 64,000, 8 images of T = 256 tokens, width 640: in chunks, and at once."""
    torch.manual_seed(0)
    hidden = torch.randn(2048, 640, device=device, requires_grad=True)
    weight = (torch.randn(64_000, 640, device=device) * 0.02).requires_grad_()
    targets = torch.randint(64_000, (2048,), device=device)

    def step(loss_of):
        hidden.grad, weight.grad = None, None
        loss = loss_of()
        loss.backward()
        return [loss.detach(), hidden.grad, weight.grad]

    yield Row("loss of the prior", lambda: step(lambda: cross_entropy(hidden, weight, None, targets)[0]),
              lambda: step(lambda: F.cross_entropy(F.linear(hidden, weight), targets)), 2048, "token", passes=(1, 3))


ROWS = {"tokenize": tokenize_rows, "detokenize": detokenize_rows, "train": train_rows, "vae": vae_rows, "generate": generate_rows,
        "loss": loss_rows}


# ---------------------------------------------------------------------------------------------------------------
# Measuring


def in_turns(sides, repeats, device):
    """Run the functions `sides` in turns and return the median seconds of each. They must have run before, to be warm."""
    seconds = [[] for _ in sides]
    for _ in range(repeats):
        for spent, side in zip(seconds, sides):
            wait(device)
            start = time.perf_counter()
            side()
            wait(device)
            spent.append(time.perf_counter() - start)
    return [sorted(spent)[len(spent) // 2] for spent in seconds]


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def matmul_peak(device, precision):
    """FLOP/s of the fastest of some large matrix products: what the share of the peak is a share of."""
    best = 0.0
    for n in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
        with autocast(device, precision):
            if torch.is_autocast_enabled(device.type):
                a, b = (x.to(torch.get_autocast_dtype(device.type)) for x in (a, b))
            times = [in_turns([lambda: a @ b], 1, device)[0] for _ in range(5)]
        best = max(best, 2 * n**3 / min(times))
    return best


def bandwidth(device):
    """Bytes per second that this device reads: the sum of 512 MiB."""
    x = torch.zeros(2**27, device=device)
    return x.numel() * 4 / min(in_turns([lambda: x.sum()], 1, device)[0] for _ in range(5))


class CountFlops(TorchFunctionMode):
    """Context that counts the floating-point operations of matrix products, convolutions and attentions, forward passes only."""

    total = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result, shapes = function(*args, **kwargs or {}), [x.shape for x in args[:2] if isinstance(x, torch.Tensor)]
        if function in (F.linear, torch.conv2d):  # a result is a sum over all but one axis of the weight
            self.total += 2 * result.numel() * shapes[1][1:].numel()
        elif function in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            self.total += 2 * result.numel() * shapes[0][-1]
        elif function is F.scaled_dot_product_attention:  # q·k and weights·v, (..., n, hd) and (..., m, hd)
            self.total += 4 * shapes[0].numel() * shapes[1][-2]
        return result


def measure(row, config, device, part, peak):
    """Both sides of a row: seconds in turns, FLOP, results compared, memory. Returns a dict and prints it as a line."""
    with autocast(device, config.precision):
        with CountFlops() as counter:
            ours = row.ours()
        with CountFlops() as plain_counter:
            plain = row.plain()
        flops, plain_flops = (passes * count.total for passes, count in zip(row.passes, (counter, plain_counter)))
        if config.compile and row.compile:
            row.compile()
            row.ours()
        seconds, plain_seconds = in_turns([row.ours, row.plain], config.repeats, device)
    difference = max(difference_of(a, b) for a, b in (zip(ours, plain) if isinstance(ours, list) else [(ours, plain)]))
    memory = [peak_bytes(side, row, config, device, part) if config.peak_memory else None for side in ("ours", "plain")]
    figures = dict(row=row.name, unit=row.unit, seconds=seconds / row.count, plain_seconds=plain_seconds / row.count,
                   ratio=plain_seconds / seconds, gflop=flops / row.count / 1e9, plain_gflop=plain_flops / row.count / 1e9,
                   flop_per_second=flops / seconds, share_of_peak=flops / seconds / peak, peak_bytes=memory[0], plain_peak_bytes=memory[1],
                   difference=difference, bytes_per_second=row.read_bytes / seconds)
    mib = ["     -" if m is None else f"{m / 2**20:6,.0f}" for m in memory]
    print(f"{row.name:34} {ms(figures['seconds'])} {ms(figures['plain_seconds'])} {figures['ratio']:6.2f}  {figures['gflop']:8.1f} "
          f"{figures['plain_gflop']:8.1f} {flops / seconds / 1e9:9,.0f} {figures['share_of_peak']:5.0%}  {mib[0]} {mib[1]}  {difference:.0e}", flush=True)
    return figures


HEADER = (f"{'':34} {'ms, ours':>9} {'plain':>9} {'ratio':>6}  {'GFLOP':>8} {'plain':>8} {'GFLOP/s':>9} {'peak':>5}  {'MiB':>6} {'plain':>6}  "
          f"differ")


def difference_of(ours, plain):
    """The largest difference, relative to the largest value; of tokens the share that are others."""
    if plain.is_floating_point():
        return ((ours - plain).abs().max() / plain.abs().max()).item()
    return (ours != plain).float().mean().item()


def ms(seconds):
    return f"{1000 * seconds:9,.3g}" if seconds < 1 else f"{1000 * seconds:9,.0f}"


def peak_bytes(side, row, config, device, part):
    """Most memory in use while one side runs: of the GPU, or on a CPU of a process that runs nothing else."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        with autocast(device, config.precision):
            getattr(row, side)()
        return torch.cuda.max_memory_allocated(device)
    flags = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in ("part", "json", "side", "row") and not isinstance(value, bool):
            flags += [f"--{field.name}", *map(str, value if isinstance(value, tuple) else (value,))]
    done = subprocess.run([sys.executable, "-m", "extras.bench", part, *flags, "--side", side, "--row", row.name], stdout=subprocess.PIPE, check=True,
                          cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return int(done.stdout)


def run_side(config, device):
    """What the process started by `peak_bytes` does."""
    for row in ROWS[config.part[0]](config, device):
        if row.name == config.row:
            with autocast(device, config.precision):
                getattr(row, config.side)()
            return print(own_peak())


def own_peak():
    """Most bytes this process has held. Not getrusage: on Linux a child inherits there what its parent had reached."""
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def bench(parts, config, device):
    """The table; returns its figures."""
    peak, read = matmul_peak(device, config.precision), bandwidth(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"d{config.enc_depth}-d{config.dec_depth}, K = {config.registers}, {config.image_size} px, {config.precision}"
          f"{', compiled' if config.compile else ''}; {device}, {name}, torch {torch.__version__}; median of {config.repeats}\n"
          f"measured peak: {peak / 1e9:,.0f} GFLOP/s in a matrix product, {read / 1e9:.1f} GB/s read\n{HEADER}")
    table = []
    for part in parts:
        for row in ROWS[part](config, device):
            figures = measure(row, config, device, part, peak)
            table.append(figures)
            if row.read_bytes:
                print(f"{'':10} {1 / figures['seconds']:,.0f} tokens/s; reads at least {figures['bytes_per_second'] / 1e9:.1f} GB/s, "
                      f"{figures['bytes_per_second'] / read:.0%} of the measured bandwidth")
    return dict(config=dataclasses.asdict(config), device=str(device), device_name=name, torch=torch.__version__,
                matmul_peak=peak, bandwidth=read, rows=table)


# ---------------------------------------------------------------------------------------------------------------
# What training holds in memory: computed, not measured


def image_bytes(trunk, width, depth, k):
    """Bytes that autograd keeps of one more image of 256 px with k tokens, under bf16: of a whole trunk, model.Encoder or Decoder,
    and of one of its blocks. Counted on trunks of one block and of two: all blocks but the last keep the same."""
    def kept(blocks, B):
        config = TokenizerConfig(enc_width=width, dec_width=width, enc_depth=blocks, dec_depth=blocks)
        part, latents, storages = trunk(config), torch.randn(B, 16, 32, 32), {}
        def pack(x):
            storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()  # several views of one storage count once
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast(torch.device("cpu"), "bf16"):
            result = part(latents, k) if trunk is Encoder else part(latents, torch.rand(B), torch.rand(B, k, 6))
        assert result.grad_fn is not None  # alive until here, so that no two storages had one address
        return sum(storages.values())
    one, two = (kept(blocks, 2) - kept(blocks, 1) for blocks in (1, 2))  # the weights are in both
    return one + (depth - 1) * (two - one), two - one


def batch_bytes(config, k):
    """Bytes for each image of 256 px with k tokens: as autograd keeps them, and with checkpointed blocks."""
    trunks = ((Encoder, config.enc_depth, 256 + k), (Decoder, config.dec_depth, 256 + min(k + 1, 256)))
    of_trunks, of_blocks = zip(*(image_bytes(trunk, 64 * depth, depth, k) for trunk, depth, _ in trunks))
    # what checkpointing keeps: what enters every block, in float32, and of one block at a time all
    return sum(of_trunks), sum(depth * 64 * depth * n * 4 for _, depth, n in trunks) + max(of_blocks)


def split_bytes(tokenizer, parameters, world):
    """Bytes of `train_tokenizer.shard` on one of `world` processes, beside the VAE: its part of float32 weights, gradients, EMA and
    AdamW's two moments, and what is gathered while one unit after the other computes."""
    count = lambda module: sum(p.numel() for p in module.parameters())            # noqa: E731
    modulations = [count(block.adaln) for block in tokenizer.decoder.blocks]
    blocks = [count(block) for block in tokenizer.encoder.blocks] + [count(b) - m for b, m in zip(tokenizer.decoder.blocks, modulations)]
    # backwards, of the largest unit: it and the next one in bfloat16, the buffer that one arrives in, gradients in bfloat16, and
    # in float32 these and those of the unit before, on their way to the sum
    gathered = (2 + 2 + 2 + 2 + 4 + 4) * max(blocks + modulations)
    rest = parameters - sum(blocks + modulations)  # in no unit: float32 weights and gradients, autocast's copies
    return parameters * (4 + 4 + 4 + 8) // world + gathered + rest * (4 + 4 + 2)


def memory_rows(world=8):
    """For each of the paper's presets what training holds in bytes: a dict."""
    for name in ("d12-d12", "d18-d18", "d18-d28"):
        config = BenchConfig(**PRESETS[name])
        powers = powers_of_two(config.registers)
        tokenizer = build(config, torch.device("meta"), config.vae_width)  # sizes without memory
        parameters, vae = (sum(p.numel() for p in tokenizer.parameters() if p.requires_grad == trained) for trained in (True, False))
        vaes = 2 * 4 * vae  # the EMA holds one too
        image, checkpointed = batch_bytes(config, round(sum(powers) / len(powers)))  # 57, what pow2 keeps on average
        yield dict(preset=name, parameters=parameters, image_bytes=image, checkpointed_bytes=checkpointed,
                   # float32 weights, gradients and EMA; bfloat16 copies under autocast; AdamW's two moments
                   whole_bytes=parameters * (4 + 4 + 4 + 2 + 8) + vaes, split_bytes=split_bytes(tokenizer, parameters, world) + vaes,
                   split_image_bytes=batch_bytes(config, config.registers)[1])  # split, all samples pass with all K tokens


def bench_memory():
    """The table of `memory_rows`, in GB, and how many images fit."""
    print("Computed, not measured: bf16 autocast, float32 weights, gradients, AdamW and EMA, 256 px, K = 256, 57 tokens kept (the mean of\n"
          "pow2), all 256 with --shard, here on 8 GPUs. An image is what autograd keeps of it, in all blocks; with --checkpoint_blocks, the\n"
          "input of each block and all of one. The workspace of the libraries and the VAE's own pass are not in it. To evaluate, the main\n"
          "process of a split run holds the averaged weights whole, 4 bytes each, in the place of images.\n")
    print(f"{'':8} {'parameters':>14} {'whole':>7} {'image':>7} {'checkpointed':>12}   {'--shard':>7} {'image, checkpointed':>19}   "
          f"images in 24 GB: as is, checkpointed, split and checkpointed;  in 80 GB")
    table = list(memory_rows())
    for row in table:
        whole, image, checkpointed, split, split_image = (row[f"{part}_bytes"] / 1e9 for part in ("whole", "image", "checkpointed", "split", "split_image"))
        fits = [f"{max(0, int((card - held) / each)):,}" for card in (24, 80)
                for held, each in ((whole, image), (whole, checkpointed), (split, split_image))]
        print(f"{row['preset']:8} {row['parameters']:14,} {whole:7.1f} {image:7.3f} {checkpointed:12.3f}   {split:7.1f} {split_image:19.3f}   "
              f"{' / '.join(fits[:3])};  {' / '.join(fits[3:])}")
    return dict(memory=table)


# ---------------------------------------------------------------------------------------------------------------
# Scaling


def bench_scaling(config, device):
    """A sampling step with APG, ours and plain, along four axes; the picture goes to --out. Returns the figures."""
    base = dataclasses.replace(config, enc_depth=1, steps=1, ks=(min(16, config.registers),))
    depth, side, K = config.dec_depth, config.image_size, config.registers
    axes = {"batch_size": (1, 2, 4), "ks": (1, K // 4, K // 2, K), "dec_depth": sorted({max(1, depth // 3), max(1, 2 * depth // 3), depth}),
            "image_size": (side // 2, side, side * 3 // 2)}
    peak, curves = matmul_peak(device, config.precision), {}
    print(HEADER)
    for axis, values in axes.items():
        curves[axis] = []
        for value in values:
            print(f"{axis} {value}")
            point = dataclasses.replace(base, **{axis: (value,) if axis == "ks" else value})
            row = next(detokenize_rows(point, device))
            curves[axis].append((value, measure(row, point, device, "detokenize", peak)))
    draw_curves(config.out, curves)
    print(f"wrote {config.out}")
    return dict(scaling=curves)


def draw_curves(path, curves):
    """{axis: [(value, figures), ...]} -> a PNG: a column for each axis, time above and memory below; ours blue, plain grey."""
    width, height, edge = 300, 240, 44
    picture = Image.new("RGB", (width * len(curves), 2 * height), "white")
    draw = ImageDraw.Draw(picture)
    for column, (axis, points) in enumerate(curves.items()):
        for line, (what, unit, scale) in enumerate((("seconds", "ms a step", 1e3), ("peak_bytes", "MiB", 2**-20))):
            left, top = column * width + edge, line * height + edge // 2
            right, bottom = (column + 1) * width - edge // 2, (line + 1) * height - edge
            draw.rectangle((left, top, right, bottom), outline="lightgrey")
            sides = {side: [figures[name] for _, figures in points] for side, name in (("plain", f"plain_{what}"), ("ours", what))}
            if None in sides["ours"]:
                continue  # --no-peak_memory
            most, last = max(max(values) for values in sides.values()) or 1, points[-1][0]
            for (side, values), colour in zip(sides.items(), ("grey", "blue")):
                at = [(left + (right - left) * x / last, bottom - (bottom - top) * 0.9 * y / most) for (x, _), y in zip(points, values)]
                draw.line(at, fill=colour, width=2)
                for x, y in at:
                    draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
            for x, _ in points:
                draw.text((left + (right - left) * x / last, bottom + 4), str(x), fill="black", anchor="mt")
            draw.text((left, top - 3), f"{unit}, at most {most * scale:,.0f}", fill="black", anchor="lb")
            draw.text(((left + right) / 2, bottom + 18), axis.replace("ks", "k").replace("_", " "), fill="black", anchor="mt")
    draw.text((edge, 2 * height - 14), "blue: ours", fill="blue")
    draw.text((edge + 80, 2 * height - 14), "grey: plain", fill="grey")
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def main(config):
    device = pick_device(config.device)
    parts = config.part or ("tokenize", "detokenize", "train", "vae")
    for part in parts:
        if part not in (*ROWS, "memory", "scaling"):
            raise UserError(f"{part}: expected {', '.join(ROWS)}, memory or scaling")
    if config.side:
        return run_side(config, device)
    results = {}
    if measured := [part for part in parts if part in ROWS]:
        results |= bench(measured, config, device)
    if "memory" in parts:
        results |= bench_memory()
    if "scaling" in parts:
        results |= bench_scaling(config, device)
    if config.json:
        write_json(config.json, results)
    return results


if __name__ == "__main__":
    command(main, from_cli(BenchConfig, PRESETS, positional="part"))
