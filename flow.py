"""
Rectified flow: the path from data to noise, the training target, the samplers, guidance. No networks in here.

    data (t=0) ------- x_t = (1-t)·data + t·noise -------> noise (t=1)          v = dx_t/dt = noise - data
    image      <------ x <- x - v(x, t)/S, t from 1 to 1/S ------- fresh noise

Papers: rectified flow, arXiv 2209.03003; FlexTok, arXiv 2502.13967 (the same path and sign, after minRF); guidance:
CFG, arXiv 2207.12598; APG, arXiv 2410.02416. Not in the official code: the loss.
A *velocity* below is a function (x (B, ...), t (1,)) -> v (B, ...): all images of a sampling batch share t.

    python flow.py          # 15 s on a CPU: learns a 2-D spiral, writes out/flow.png                    Next: model.py
"""
import math

import torch
import torch.nn.functional as F


# ---------------------------------------------------------------------------------------------------------------
# The path and the loss


def interpolate(data, noise, t):
    """x_t = (1-t)·data + t·noise: data, noise (B, ...), t (B,) in [0, 1] -> (B, ...).    (arXiv 2209.03003, Eq. 1)"""
    t = t.view(-1, *[1] * (data.dim() - 1))                                       # (B, 1, ..., 1)
    return (1 - t) * data + t * noise


def velocity_target(data, noise):
    """v = dx_t/dt = noise - data, the same for every t on the straight path."""
    return noise - data


def loss_per_sample(v_pred, v_target):
    """Mean squared error over everything but the batch, in float32: (B, ...), (B, ...) -> (B,)."""
    return (v_pred.float() - v_target.float()).square().flatten(1).mean(1)        # (B,)


def loss_by_t(loss, t):
    """Sum and number of the losses in each quarter of [0, 1]: loss (B,), t (B,) -> (4,), (4,).

    The most useful diagnostic of a flow: the loss near t=0 is nearly irreducible (guessing the noise from a clean
    image), the one near t=1 says whether the decoder listens to its tokens, for at t=1 there is nothing else.
    """
    bin_of = (t * 4).long().clamp(max=3)                                          # (B,), t=1 belongs to the last
    in_bin = F.one_hot(bin_of, 4).to(loss.dtype)                                  # (B, 4)
    return loss.detach() @ in_bin, in_bin.sum(0)


# ---------------------------------------------------------------------------------------------------------------
# Which t to train on: one function per method, each returns (B,) in [0, 1]
#
# FORK: another law of t. Change one of these, or add one that `sample_t` in train_tokenizer.py names; draw from
# `generator` alone, so that a run can be resumed.


def t_uniform(B, generator=None, device=None):
    """t ~ U[0, 1)."""
    return torch.rand(B, generator=generator, device=device)


def t_logit_normal(B, mean=0.0, std=1.0, generator=None, device=None):
    """t = sigmoid(mean + std·n), n ~ N(0, 1): most samples where the task is hardest. (SD3, arXiv 2403.03206, Eq. 19)

    mean 0, std 1 is the official default; a mean > 0 moves the samples towards noise.
    """
    return torch.sigmoid(mean + std * torch.randn(B, generator=generator, device=device))


# ---------------------------------------------------------------------------------------------------------------
# The sampler: walk from noise (t=1) to data (t=0)


@torch.no_grad()
def euler(velocity, noise, steps):
    """Euler's method, `steps` = S calls, t = 1, 1-1/S, ..., 1/S.  noise (B, ...) -> (B, ...)    (official pipeline)"""
    x = noise
    times = torch.arange(steps, 0, -1, device=x.device) / steps  # (steps,) float32, made at once: no step waits for it
    for t in times.split(1):                                                      # (1,)
        x = x - velocity(x, t) / steps
    return x


# ---------------------------------------------------------------------------------------------------------------
# Guidance: push away from what the network would do without tokens


def cfg(v_cond, v_uncond, cfg_scale):
    """v = v_uncond + s·(v_cond - v_uncond), on all channels; s = 1: v_cond.          (CFG, arXiv 2207.12598, Eq. 6)"""
    return v_uncond + cfg_scale * (v_cond - v_uncond)


class APG:
    """Adaptive projected guidance (arXiv 2410.02416): CFG without over-saturation at large scales.

    Call it once per step, in order, with v_cond, v_uncond (B, ...) -> v (B, ...). One object serves one sampling run:
    it keeps a running difference for each sample (the momentum, negative: it pushes back repeated directions).
    Defaults are the official ones. `threshold` caps the norm of the difference (0: no cap), `eta` is the weight of the
    part parallel to v_cond, `axes` are those over which norms and projections run (default: all but the batch).
    """

    def __init__(self, momentum=-0.5, threshold=2.5, eta=0.0, axes=None):
        self.momentum, self.threshold, self.eta, self.axes = momentum, threshold, eta, axes
        self.running = 0.0

    def __call__(self, v_cond, v_uncond, cfg_scale):
        axes = self.axes or tuple(range(1, v_cond.dim()))
        self.running = v_cond - v_uncond + self.momentum * self.running
        diff = self.running  # the cap below does not feed back into the running value
        if self.threshold > 0:
            # norm 0 -> factor min(1, inf) = 1
            diff = diff * (self.threshold / torch.linalg.vector_norm(diff, dim=axes, keepdim=True)).clamp(max=1)
        # float64 as official: the parallel part is a small difference of large sums (mps has no float64)
        wide = torch.float32 if diff.device.type == "mps" else torch.float64
        unit = v_cond.to(wide)
        unit = unit / unit.square().sum(axes, keepdim=True).sqrt().clamp(min=1e-12)
        parallel = (diff.to(wide) * unit).sum(axes, keepdim=True) * unit
        orthogonal = diff.to(wide) - parallel
        # v = v_cond + (s-1)·(orthogonal + η·parallel)                                   (s = cfg_scale)
        return v_cond + (cfg_scale - 1) * (orthogonal.to(diff.dtype) + self.eta * parallel.to(diff.dtype))


# ---------------------------------------------------------------------------------------------------------------
# Demo: a 2-D spiral


def _demo(steps=2000):
    import os

    from PIL import Image, ImageDraw
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 128), torch.nn.SiLU(), torch.nn.Linear(128, 128), torch.nn.SiLU(),
                              torch.nn.Linear(128, 128), torch.nn.SiLU(), torch.nn.Linear(128, 2))
    velocity = lambda x, t: net(torch.cat([x, t.expand(len(x)).unsqueeze(1)], 1))  # noqa: E731, (B, 3) -> (B, 2)

    def spiral(B):
        angle = 3 * math.pi * torch.rand(B).sqrt()
        return torch.stack([angle.cos(), angle.sin()], 1) * angle.unsqueeze(1) / 5 + 0.03 * torch.randn(B, 2)  # (B, 2)

    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        data, noise, t = spiral(512), torch.randn(512, 2), t_uniform(512)
        loss = loss_per_sample(velocity(interpolate(data, noise, t), t), velocity_target(data, noise))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 499:
            sums, counts = loss_by_t(loss, t)
            print(f"step {step + 1}: loss {loss.mean():.3f}, in the quarters of t", [f"{x:.2f}" for x in sums / counts])
    noise = torch.randn(2000, 2)
    panels = {"data": spiral(2000), **{f"{steps} steps": euler(velocity, noise, steps) for steps in (1, 4, 50)}}
    picture = Image.new("RGB", (300 * len(panels), 320), "white")
    draw = ImageDraw.Draw(picture)
    for i, (name, points) in enumerate(panels.items()):
        draw.text((300 * i + 10, 5), name, fill="black")
        for x, y in (points * 60 + torch.tensor([300 * i + 150, 170])).tolist():
            draw.point((x, y), fill="navy")
    os.makedirs("out", exist_ok=True)
    picture.save("out/flow.png")
    print("wrote out/flow.png")


if __name__ == "__main__":
    _demo()
