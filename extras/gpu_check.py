"""
What only a GPU can show: does it compute what the CPU computes, and does it ever wait? `gpu_check.sh` runs all of this.

    python -m extras.gpu_check parity cuda                     # against the CPU: attention kernels, models, training
    python -m extras.gpu_check watch train_tokenizer.py FLAGS  # runs a trainer and looks at 15 of its steps

`parity` prints a line for each number: what it is, its value, the most it may be. `watch` prints the mean of a training
step: its time in ms, how long the GPU worked in it, kernels, memory, and each line of ours that waited for the GPU.
None should: while the host waits, it prepares no work, and then it is the GPU that waits.
"""
import json
import os
import runpy
import sys
import time
import traceback
import warnings
from collections import Counter
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import register_optimizer_step_post_hook

import flow
from ar import GPT
from common import autocast, pick_device
from data import Emoji, spread
from extras.bench import PRESETS, BenchConfig, build
from model import FlexTok, full_attention, prefix_causal_attention, room_for
from runs import Average, optimizer_for
from train_tokenizer import TrainConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHIPPED = os.path.join(ROOT, "assets", "emoji64")


# ---------------------------------------------------------------------------------------------------------------
# Parity. Each check yields (what, value, the most it may be); a check that raises has failed.


def relative(x, exact):
    """|x - exact| / |exact|, on the CPU in float64."""
    x, exact = x.detach().double().cpu(), exact.detach().double().cpu()
    return ((x - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def attention(device):
    """Every kernel that torch has, forwards and backwards, over the shapes of encoder and decoder, against float64."""
    kernels = {"torch's choice": None, "math": SDPBackend.MATH}
    if device.type == "cuda":
        kernels |= {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
                    "cudnn": SDPBackend.CUDNN_ATTENTION}
    cases = [(256 + k, lambda device, k=k: prefix_causal_attention(256, k)) for k in (1, 16, 37, 256)]
    cases += [(n, lambda device, n=n, copies=copies: full_attention(n, copies, device))
              for n, copies in ((273, 240), (257, 256), (77, 2), (512, 0))]

    def attend(make, device, inputs):  # the result, and the gradients of q, k and v
        q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
        result = make(device)(q, k, v, scale=0.125)
        return [result, *torch.autograd.grad(result, (q, k, v), inputs[3])]

    for name, kernel in kernels.items():
        for dtype in [torch.bfloat16] if name in ("flash", "cudnn") else [torch.bfloat16, torch.float32]:
            worst = 0.0
            for n, make in cases:
                inputs = [torch.randn(3, 2, n, 64).to(dtype) for _ in range(4)]   # q, k, v and the result's gradient
                exact = attend(make, torch.device("cpu"), [x.double() for x in inputs])
                try:
                    with nullcontext() if kernel is None else sdpa_kernel(kernel):
                        found = attend(make, device, [x.to(device) for x in inputs])
                except RuntimeError as error:
                    if "vailable kernel" not in str(error):
                        raise
                    worst = None  # this GPU, or this build of torch, does not have it
                    break
                worst = max(worst, *map(relative, found, exact))
            yield f"attention, {name}, {str(dtype)[6:]}", worst, 0.02 if dtype == torch.bfloat16 else 0.002


def tokenizer(device):
    """The shipped tokenizer: tokens, images, and waits a sampler step."""
    here, there = FlexTok.from_pretrained(SHIPPED), FlexTok.from_pretrained(SHIPPED, device=device)
    images, _ = spread(Emoji(64, "held_out", augment=False), 16)                  # (16, 3, 64, 64)
    tokens, found = torch.cat(here.tokenize(images)), torch.cat(there.tokenize(images)).cpu()  # (16, K)
    yield "share of other tokens, float32", (tokens != found).float().mean().item(), 0.03
    for k in (1, 32):
        def paint(model, steps=5):
            return model.detokenize(list(tokens[:4, :k]), steps, 2.0, generator=torch.Generator().manual_seed(0))
        exact = paint(here)
        yield f"images from {k} tokens, float32", relative(paint(there), exact), 0.02
        with autocast(device, "bf16"):
            yield f"images from {k} tokens, bf16", relative(paint(there), exact), 0.2
    few, many = (waits(lambda: paint(there, steps), device) for steps in (5, 15))
    yield "waits a sampler step", (many - few) / 10, 0


def prior(device):
    """The shipped prior: its loss, what it writes, compiled or not, and waits a token."""
    here, there = (GPT.from_pretrained(os.path.join(SHIPPED, "prior"), device=where) for where in ("cpu", device))
    K, labels = here.config.length, torch.arange(4)
    tokens = torch.randint(here.config.vocab_size, (4, K))
    def loss_and_gradients(model):
        loss = model.loss(tokens.to(model.device), labels.to(model.device))[0]
        leaves = [model.preprocessor.positional_embedding, *model.head.parameters()]
        return [loss, *torch.autograd.grad(loss, leaves)]
    yield "loss of the prior, its gradients", max(map(relative, *map(loss_and_gradients, (there, here)))), 2e-3
    def write(model, k=16, compile=False):
        return model.generate(labels, k=k, cfg_scale=1.5, temperature=0, compile=compile).cpu()
    yield "share of other tokens, the likeliest", (write(here) != write(there)).float().mean().item(), 0.1
    few, many = (waits(lambda: write(there, k), device) for k in (8, K))
    yield "waits a token", (many - few) / (K - 8), 0
    if device.type == "cuda":
        yield "share of other tokens, compiled", (write(there, compile=True) != write(there)).float().mean().item(), 0.1


def training(device):
    """Three steps of a small tokenizer: the first gradients, and at the end the averaged weights."""
    random = torch.Generator().manual_seed(0)
    batches = [[torch.randn(16, 16, 8, 8, generator=random), torch.randn(16, 16, 8, 8, generator=random),
                torch.rand(16, generator=random)] for _ in range(3)]              # latents, noise, t
    k_keep = torch.tensor([1, 2, 4, 0, 16, 32, 32, 32]).repeat(2)
    results = []
    for where in (torch.device("cpu"), device):
        model = build(BenchConfig(**PRESETS["tiny"]), torch.device("cpu"), vae_width=8)  # its gates are open
        model, gradients = model.to(where).train(), []
        ema, trained = Average(model, 0.9), [p for p in model.parameters() if p.requires_grad]
        optimizer = optimizer_for(model, TrainConfig(lr=1e-3, muon_lr=1e-3, precision="fp32"))
        for batch in batches:
            latents, noise, t = (x.to(where) for x in batch)
            v = model(latents, flow.interpolate(latents, noise, t), t, k_keep, room_for(k_keep, 32))  # (B, C, h, w)
            flow.loss_per_sample(v, noise - latents).mean().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in trained]))
            optimizer.step()
            optimizer.zero_grad()
            ema.update_parameters(model)
        results.append((gradients[0], torch.cat([p.flatten() for p in ema.module.parameters()])))
    for what, exact, found in zip(("gradients of training", "averaged weights after three steps"), *results):
        yield what, relative(found, exact), 2e-3


def parity(device):
    """Run all checks and print a table. Returns the names of those that failed."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN "
          f"{torch.backends.cudnn.version()}, {gpu}\n{'':44}{'value':>10}{'at most':>10}")
    torch.manual_seed(0)
    failed = []
    for check in (attention, tokenizer, prior, training):
        try:
            for what, value, most in check(device):
                good = value is None or value <= most  # NaN is not
                failed += [] if good else [what]
                shown = "absent" if value is None else f"{value:.2g}"
                print(f"{what:44}{shown:>10}{most:10.2g}  {'ok' if good else 'FAILED'}", flush=True)
        except Exception as error:  # the others may still pass, and one wants to know all
            traceback.print_exc()
            failed.append(check.__name__)
            print(f"{check.__name__:64}  FAILED ({type(error).__name__})", flush=True)
    return failed


# ---------------------------------------------------------------------------------------------------------------
# Waiting


def count_waits(found):
    """From now on every wait for the GPU is counted in the Counter `found`, under the innermost line of ours."""
    def note(message, *_):
        if "called a synchronizing" in str(message):  # torch also says that the mode is new
            own = [f for f in traceback.extract_stack() if f.filename.startswith(ROOT) and f.filename != __file__]
            found[f"{os.path.basename(own[-1].filename)}:{own[-1].lineno}" if own else "elsewhere"] += 1
    warnings.simplefilter("always")
    warnings.showwarning = note  # for good: this program ends soon
    torch.cuda.set_sync_debug_mode("warn")


def waits(call, device):
    """Run `call`; how often it waited for the GPU."""
    found = Counter()
    if device.type == "cuda":
        count_waits(found)
        call()
        torch.cuda.set_sync_debug_mode("default")
    return found.total()


def watch(script, *flags):
    """Run a trainer and look at steps 5 to 20: five for waits, five for times, five for what runs on the GPU.

    Exits with 1 if anything waited.
    """
    cuda, found, steps, report = torch.cuda.is_available() and "cpu" not in flags, Counter(), [], {}
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) if cuda else None

    def after_step(optimizer, *_):
        if steps and optimizer is not steps[0][0]:  # the discriminator's
            return
        if cuda and len(steps) in (9, 14, 19):
            torch.cuda.synchronize()
        steps.append((optimizer, time.perf_counter()))
        if len(steps) == 15:
            report["ms"] = round(200 * (steps[14][1] - steps[9][1]), 1)
        if len(steps) == 5 and cuda:
            count_waits(found)
        elif len(steps) == 10 and cuda:
            torch.cuda.set_sync_debug_mode("default")
        elif len(steps) == 15 and cuda:
            report.update(waits=found.total() / 5, at=found, peak_GB=round(torch.cuda.max_memory_allocated() / 1e9, 2))
            profiler.start()
        elif len(steps) == 20 and cuda:
            profiler.stop()
            rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)
            ms = [row.self_device_time_total / 5000 for row in rows]
            report.update(busy_ms=round(sum(ms), 1), kernels=sum(row.count for row, x in zip(rows, ms) if x) / 5,
                          slowest={row.key[:40]: round(x, 2) for row, x in zip(rows[:6], ms)})

    register_optimizer_step_post_hook(after_step)
    sys.argv = [script, *flags]
    try:
        runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
    finally:
        print("a step:", json.dumps(report))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "watch":
        watch(*words)
    sys.exit(1 if parity(pick_device(*words)) else 0)
