"""
How fast, and against what: every figure beside a plain computation of the same numbers, in one run.

    our code and the plain one, in turns, several times --> median of each, and their ratio

    python bench.py generate             # the prior with its cache, and without
    python bench.py loss                 # the loss in chunks, and with all logits at once: time and peak memory

Ratios are what to quote: both sides ran on the same machine in the same minutes. Not part of the reading order.
"""
import resource
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ar import GPT, SIZES, GPTConfig, cross_entropy
from common import UserError, command, from_cli, pick_device


@dataclass
class BenchConfig:
    """Measure. Parts: generate, loss."""
    part: tuple = ()                  # what to measure: generate, loss
    size: str = "49M"                 # of the prior: 49M, 85M, 201M, 393M, 679M or 1.33B
    batch_sizes: tuple = (1, 8)       # images written at once
    length: int = 256                 # tokens written
    repeats: int = 3                  # of each side, in turns
    device: str = "auto"              # auto, cpu, cuda, mps
    side: str = "both"                # of loss: both, ours or plain, each in a process of its own


def in_turns(sides, repeats, device):
    """Run the functions `sides` in turns and return the median seconds of each; the first round warms up and does not count."""
    seconds = [[] for _ in sides]
    for turn in range(repeats + 1):
        for spent, side in zip(seconds, sides):
            start = time.perf_counter()
            side()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                spent.append(time.perf_counter() - start)
    return [sorted(spent)[len(spent) // 2] for spent in seconds]


@torch.no_grad()
def generate_plain(gpt, B, k):
    """`gpt.generate` without a cache: every token by a whole pass over all before it, the head for the last one only."""
    tokens = torch.empty(B, 0, dtype=torch.long, device=gpt.head.linear.weight.device)
    while tokens.shape[1] < k:
        x = gpt.preprocessor(tokens)                                              # (B, i + 1, D)
        for block in gpt.trunk.blocks:
            x = block(x)
        logits = gpt.head(gpt.trunk.post_trunk_norm(x[:, -1]))                    # (B, V)
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)          # (B, i + 1)
    return tokens


def bench_generate(config):
    """Tokens per second of `GPT.generate`, with the cache and without; both must write the same tokens."""
    device, (width, depth) = pick_device(config.device), SIZES[config.size]
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(width=width, depth=depth, length=config.length)).to(device).eval()
    torch.nn.init.normal_(gpt.head.linear.weight, std=0.02)
    print(f"{config.size} prior, {config.length} tokens, {device}, {torch.get_num_threads()} threads, float32, median of {config.repeats}")
    for B in config.batch_sizes:
        ours, plain = (lambda: gpt.generate(n=B, temperature=0)), (lambda: generate_plain(gpt, B, config.length))
        same = (ours() == plain()).float().mean().item()
        with_cache, without = in_turns([ours, plain], config.repeats, device)
        print(f"batch {B:3d}: {B * config.length / with_cache:8.1f} tokens/s with cache, {B * config.length / without:8.1f} without: "
              f"{without / with_cache:.1f} times as fast; {same:.1%} of the tokens equal", flush=True)


def bench_loss(config):
    """Time of forward and backward, and the process's peak memory, at V = 64,000, 8 images of T = 256 tokens, width 640."""
    if config.side == "both":
        for side in ("plain", "ours"):  # a process's peak never falls again, so each side gets its own
            subprocess.run([sys.executable, __file__, "loss", "--side", side, "--device", config.device], check=True)
        return
    device = pick_device(config.device)
    torch.manual_seed(0)
    hidden = torch.randn(2048, 640, device=device, requires_grad=True)
    weight = (torch.randn(64_000, 640, device=device) * 0.02).requires_grad_()
    targets = torch.randint(64_000, (2048,), device=device)
    before = peak_memory(device)
    start = time.perf_counter()
    loss = cross_entropy(hidden, weight, None, targets)[0] if config.side == "ours" else F.cross_entropy(F.linear(hidden, weight), targets)
    loss.backward()
    grad = weight.grad.norm().item()  # waits for the device
    print(f"{config.side:>5}: {time.perf_counter() - start:.2f} s, peak memory {peak_memory(device) / 2**20:,.0f} MiB "
          f"({before / 2**20:,.0f} before); loss {loss.item():.6f}, gradient norm {grad:.6f}")


def peak_memory(device):
    """Most bytes in use so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(config):
    parts = {"generate": bench_generate, "loss": bench_loss}
    if config.size not in SIZES:
        raise UserError(f"--size {config.size}: expected one of {', '.join(SIZES)}")
    for part in config.part or parts:
        if part not in parts:
            raise UserError(f"{part}: expected {' or '.join(parts)}")
        parts[part](config)


if __name__ == "__main__":
    command(main, from_cli(BenchConfig, positional="part"))
