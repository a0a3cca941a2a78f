"""
Train a FlexTok tokenizer: encoder, quantiser and flow decoder together, on the latents of a frozen VAE.

    images --VAE (frozen)--> latents --Encoder, FSQ--> codes --the first k--> Decoder(x_t, t, codes[:k]) --> velocity
                             latents, noise, t -----> x_t                  loss = |velocity - (noise - latents)|²

Paper: FlexTok, arXiv 2502.13967. Differences: no REPA loss, plain AdamW instead of muP, and some
choices for runs of minutes (`SHORT` below; Muon is one of them), off in the paper's presets.

    python train_tokenizer.py --preset cpu                                       # a CPU core; trains its VAE first
    python train_tokenizer.py --preset emoji64 --compile                         # one GPU
    torchrun --nproc_per_node 8 train_tokenizer.py --preset d18-d28 --data /data/imagenet/train --vae out/vae_in1k

Writes out/<run>/: config.json, model.safetensors (averaged weights: what sample.py reads), resume.pt, log.jsonl,
curves.png and pictures. Times and expected numbers: RESULTS.md.                                       Next: ar.py
"""
import math
import os
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import flow
import vae as stage0
from common import (Log, Run, UserError, attention_kernel, autocast, barrier, check_range, command, from_cli,
                    generator, init_distributed)
from data import Cached, batches, open_data, spread
from evaluate import reconstruction
from images import draw_curves, save_grid, to_float
from model import FlexTok, TokenizerConfig, sample_k, unloaded
from runs import (Average, Checkpoints, Means, Recorded, Scaler, check_run, fill_with_average, optimizer_for,
                  provenance, read_saved, recorded, seconds_of, shard, snapshot)
from vae import VAE


@dataclass
class TrainConfig:
    """Train a FlexTok tokenizer."""
    # data
    data: str = "emoji"              # emoji, shapes, or a folder of images
    image_size: int = 256            # side in pixels
    vae: str = ""                    # directory of a trained VAE; empty: train one first, by --vae_preset
    vae_preset: str = "shapes32"     # which preset of vae.py to train if --vae is empty
    out: str = "out/tokenizer"       # the run's directory
    workers: int = 0                 # processes that load images, per GPU
    cache_latents: int = 0           # versions of each image to keep the latents of, the first as it is; 0: none
    sample_posterior: bool = False   # train on draws from the VAE's posterior instead of its mean
    # model
    enc_depth: int = 12              # encoder blocks
    dec_depth: int = 12              # decoder blocks
    enc_width: int = 0               # 0: 64 times the depth
    dec_width: int = 0               # 0: 64 times the depth
    head_dim: int = 64               # size of an attention head
    patch_size: int = 2              # latents per patch side
    registers: int = 256             # K, the most tokens an image can have
    levels: tuple = (8, 8, 8, 5, 5, 5)  # of FSQ; their product is the vocabulary
    position_std: float = 0.02       # initial size of register positions; 0.02 official, 1.0 for short runs
    code_std: float = 0.0            # initial size of the layer after FSQ; 0: Xavier, official; 1.0 for short runs
    head_std: float = 0.0            # initial size of the layer before FSQ; 0 official, 0.1 for short runs
    scale_codes: bool = False        # give what FSQ reads a mean square of 1; False official, True for short runs
    init: str = ""                   # a trained tokenizer of these sizes to go on from; empty: random weights
    freeze_encoder: bool = False     # train the decoder alone: tokens, and a prior over them, stay valid
    # method
    nested_dropout: str = "pow2"     # how k is drawn: uniform, pow2, uniform_pow2 or mixed
    autoencoder_share: float = 0.0   # the share that begins at t = 1, all tokens; 0 official, 0.1-0.15 if short
    null_p: float = 0.1              # chance per sample to be trained without tokens, which guidance needs
    t_sampler: str = "logit_normal"  # logit_normal or uniform
    t_mean: float = 0.0              # of logit_normal; above 0 moves t towards noise
    pure_noise_share: float = 0.0    # share of samples at exactly t = 1; 0 official, 0.3 for short runs
    # optimisation
    steps: int = 100_000             # optimizer steps
    batch_size: int = 256            # images per step over all processes and micro-batches
    micro_batch: int = 0             # images per forward pass and process; 0: all at once
    lr: float = 5e-4                 # peak learning rate
    muon_lr: float = 0.0             # peak for matrices of blocks, by Muon; 0: by AdamW, official; 0.01 if short
    warmup: int = 1000               # steps
    beta2: float = 0.99              # of AdamW; beta1 is 0.9
    weight_decay: float = 0.0        # on matrices only
    grad_clip: float = 1.0           # largest gradient norm
    ema_decay: float = 0.9999        # decay of the averaged weights
    # running
    seed: int = 0                    # of the weights, the data order and the noise
    device: str = "auto"             # auto, cpu, cuda, cuda:1, mps
    precision: str = "auto"          # auto, bf16, fp16 (GPUs without bf16) or fp32
    compile: bool = False            # torch.compile the blocks; on one GPU, record a step as a CUDA graph
    checkpoint_blocks: bool = False  # keep only what enters each block, and compute the rest again in the backward pass
    shard: bool = False              # split weights, gradients and optimizer over the processes (FSDP2)
    log_every: int = 100             # steps
    eval_every: int = 5000           # steps; also saves
    eval_images: int = 64            # held-out images that are reconstructed
    eval_timesteps: int = 25         # sampler steps
    eval_guidance: float = 1.0       # 1.0: none; also what sample.py then uses unless told otherwise
    resume: bool = False             # continue the run in --out
    stop_at: int = 0                 # save and end before this step, as if interrupted; 0: never


# The paper's recipe, as far as it is known (batch, lr, betas, clip, no weight decay). 100k steps of 2048 images are 160
# epochs of ImageNet. Time by arithmetic, not run: 0.58, 1.9 and 4.4 TFLOP per image, 40 % of an H100's peak.
PAPER = dict(data="data/imagenet/train", vae_preset="in1k", image_size=256, batch_size=2048, micro_batch=64,
             steps=100_000, lr=5.6e-4, warmup=8000, workers=12, sample_posterior=True)
# What makes a run of minutes use its tokens, and learn fast: tiny.py has the reasons, JOURNAL.md the trials
SHORT = dict(position_std=1.0, code_std=1.0, head_std=0.1, scale_codes=True, pure_noise_share=0.3, t_mean=0.5,
             muon_lr=0.01, levels=(4, 4, 4, 4, 4))  # 1,024 tokens: few enough for a small prior
PRESETS = {
    "cpu": dict(          # a CPU core, 11 minutes with its VAE: drawn scenes at 32 px, 16 tokens of 10 bits
        SHORT, data="shapes", image_size=32, vae_preset="shapes32", out="out/cpu", cache_latents=1,
        enc_depth=4, dec_depth=4, enc_width=128, dec_width=128, registers=16, autoencoder_share=0.1,
        steps=4500, batch_size=32, lr=2e-3, warmup=100, ema_decay=0.997, eval_every=2250, eval_guidance=2.5),
    "emoji64-cpu": dict(  # two CPU cores, 1½ hours with a VAE at hand: emoji at 64 px, 64 tokens of 10 bits
        SHORT, data="emoji", image_size=64, vae_preset="emoji64-cpu", out="out/emoji64-cpu", cache_latents=16,
        enc_depth=3, dec_depth=6, enc_width=192, dec_width=192, registers=64, nested_dropout="mixed",
        autoencoder_share=0.05, steps=10_000, batch_size=128, lr=1.5e-3, warmup=200, ema_decay=0.999, eval_every=2500,
        eval_guidance=3.0),
    "emoji64": dict(      # one H100, 11 minutes with --compile, the VAE included: 64 tokens of a byte, patches of 1
        SHORT, data="emoji", image_size=64, vae_preset="emoji64", out="out/emoji64", cache_latents=32, workers=8,
        patch_size=1, enc_depth=4, dec_depth=7, enc_width=192, dec_width=192, registers=64, levels=(4, 4, 4, 4),
        nested_dropout="mixed", autoencoder_share=0.05, steps=12_000, batch_size=512, lr=1.5e-3, warmup=500,
        ema_decay=0.999, eval_every=6000, eval_guidance=3.0),
    "d12-d12": dict(      # the paper's small one: 8 H100, 10 hours by arithmetic (not run), ImageNet in --data
        PAPER, enc_depth=12, dec_depth=12, out="out/d12-d12"),
    "d18-d18": dict(      # the paper's middle one: 8 H100, 1.4 days by arithmetic (not run)
        PAPER, enc_depth=18, dec_depth=18, out="out/d18-d18"),
    "d18-d28": dict(      # the paper's large one: 8 H100, 3.3 days by arithmetic (not run)
        PAPER, enc_depth=18, dec_depth=28, out="out/d18-d28"),
}
# may differ when a run is resumed
RUN_FIELDS = ("out", "workers", "device", "precision", "compile", "log_every", "eval_every", "eval_images",
              "eval_timesteps", "eval_guidance", "resume", "stop_at", "micro_batch", "checkpoint_blocks", "shard")


# ---------------------------------------------------------------------------------------------------------------
# The algorithm


def training_loss(model, latents, noise, t, k_keep, room):
    """How wrong the velocity is, for each sample (b,): the whole method in five lines.                (paper Sec. 3.1)

    latents: images as the VAE sees them, and noise: both (b, C, h, w). t (b,) in [0, 1]: how much noise is mixed in.
    k_keep (b,) int64: how many tokens each sample keeps; with 0 it has no condition. room, b numbers: the most
    that each can keep; samples of equal room go through together, as one group (`sample_k`).
    """
    x_t = flow.interpolate(latents, noise, t)                                     # (b, C, h, w)
    # Encoder, quantiser, the first k_keep tokens, decoder. Each sample has a k of its own: then every step teaches what
    # the first token alone can say, and what the last one adds, and the gradient is a mean over all k.
    v = model(latents, x_t, t, k_keep, room)                                      # (b, C, h, w)
    # The decoder is never asked for the image, but for the direction in which x_t gets less noisy. Where tokens leave
    # several images possible, it points at their mean; and following it leads, step by step, to one of them.
    # FORK: another objective. Return one number for each sample; what sampling does with v must fit it (flow.euler).
    return flow.loss_per_sample(v, flow.velocity_target(latents, noise))          # (b,)


def draw_noise(config, step, like, run):
    """The method's random numbers: noise (b, C, h, w), t (b,), k_keep (b,), and room, b numbers.

    Drawn for the global batch from (seed, step) alone, of which each process takes its part: so a run on two processes
    is the run on one, and a resumed run needs no memory of what was drawn before.
    """
    B, mine = config.batch_size, run.part(config.batch_size)
    on_device, on_cpu = generator(run.device, config.seed, step, "noise"), generator("cpu", config.seed, step, "k")
    noise = torch.randn(B, *like.shape[1:], generator=on_device, device=run.device)  # (B, C, h, w)
    t = sample_t(config, B, on_device, run.device)                                # (B,)
    # At t = 1 the network sees nothing but noise and the tokens: the encoder gets a straight gradient.
    pure = torch.rand(B, generator=on_device, device=run.device) < config.pure_noise_share
    t = torch.where(pure, 1.0, t)
    K = config.registers
    k_keep, room = sample_k(B, K, config.nested_dropout, config.null_p, on_cpu)   # (B,), B numbers
    if step < config.autoencoder_share * config.steps:  # with all tokens and t = 1 this is a plain autoencoder
        t, k_keep, room = torch.ones_like(t), k_keep.sign() * K, (K,) * B
    return noise[mine], t[mine], k_keep[mine].to(run.device, non_blocking=True), room[mine]


def by_t(loss, t, null):
    """Losses (b,) -> sums and counts (6,): in each quarter of t, at exactly t = 1, and in all.

    At t = 1 there is nothing to see but noise: the tokens alone must carry these samples, if they have any (`null`).
    """
    pure = (t == 1) & ~null                                                       # (b,)
    sums, counts = flow.loss_by_t(loss, t)                                        # (4,) each
    return (torch.cat([sums, (loss * pure).sum()[None], loss.sum()[None]]),
            torch.cat([counts, pure.sum()[None], counts.sum()[None]]))


def sample_t(config, B, generator, device):
    """t (B,) by the method that --t_sampler names; raises `UserError` for one that is not known, or has no --t_mean."""
    if config.t_sampler == "logit_normal":
        return flow.t_logit_normal(B, config.t_mean, generator=generator, device=device)
    if config.t_sampler != "uniform":
        raise UserError(f"--t_sampler {config.t_sampler}: expected logit_normal or uniform")
    if config.t_mean:
        raise UserError(f"--t_mean {config.t_mean}: --t_sampler uniform has none")
    return flow.t_uniform(B, generator=generator, device=device)


# ---------------------------------------------------------------------------------------------------------------
# The pieces of a run


def build_tokenizer(config, vae):
    """A new FlexTok around `vae` with the sizes of `config`. Raises UserError if they do not fit together."""
    side = config.patch_size * vae.downsampling
    if config.image_size % side:
        raise UserError(f"--image_size {config.image_size}: expected a multiple of {side} (VAE factor "
                        f"{vae.downsampling} times --patch_size {config.patch_size})")
    return FlexTok(TokenizerConfig(
        latent_channels=vae.config.latent_channels, grid=(config.image_size // side,) * 2, patch_size=config.patch_size,
        enc_width=config.enc_width or 64 * config.enc_depth, enc_depth=config.enc_depth, enc_head_dim=config.head_dim,
        dec_width=config.dec_width or 64 * config.dec_depth, dec_depth=config.dec_depth, dec_head_dim=config.head_dim,
        registers=config.registers, levels=tuple(config.levels), position_std=config.position_std,
        code_std=config.code_std, head_std=config.head_std, scale_codes=config.scale_codes), vae)


def go_on_from(directory, tokenizer):
    """Copy the weights of a trained tokenizer (--init). Raises UserError if its sizes or its VAE are others."""
    trained = FlexTok.from_pretrained(directory)
    free = dict(position_std=0, code_std=0, head_std=0)  # what another run may choose anew
    if replace(trained.config, **free) != replace(tokenizer.config, **free):
        raise UserError(f"--init {directory}: its tokenizer has other sizes than this run's")
    pairs = zip(tokenizer.vae.state_dict().values(), trained.vae.state_dict().values())
    if trained.vae.config != tokenizer.vae.config or any((x.cpu() - y).abs().max() > 1e-6 for x, y in pairs):
        raise UserError(f"--init {directory}: was trained on another VAE; give its own to --vae")
    tokenizer.load_state_dict(trained.state_dict())


def train_vae(config, run, part, later=lambda vae: 0.0, **settings):
    """Train the VAE of --vae_preset, but for `settings`, into <out>/vae, or what is left of it.

    Returns the directory, or "" if it was stopped. part: what the log calls it. later(vae): the seconds that the
    parts after it will take.
    """
    out = os.path.join(config.out, "vae")
    settings = stage0.VAETrainConfig(**{
        **stage0.PRESETS[config.vae_preset], "image_size": config.image_size, "out": out, "seed": config.seed,
        "resume": os.path.exists(os.path.join(out, "lock")), "device": config.device, "precision": config.precision,
        "compile": config.compile, "workers": config.workers, **settings})
    saved = read_saved(out)
    if saved.get("step") == settings.steps and "held_out_psnr" in saved["metrics"]:
        return out
    done = stage0.main(settings, part, later(VAE(stage0.vae_config_of(settings))))
    barrier(run)  # the main process writes, all read
    if not done and run.is_main:
        print("stopped within part 1, the VAE; the same command, with or without --resume, goes on", flush=True)
    return out if done else ""


def seconds_after_vae(config, run, vae, n):
    """About how long n images will take through `vae`, and then the tokenizer."""
    an_image, the_training = seconds_to_come(config, run, vae)
    encoded = config.cache_latents * n or config.steps * config.batch_size // run.world  # images for the VAE
    return an_image * encoded + the_training


def seconds_to_come(config, run, vae):
    """About how long `vae` takes for an image, and the tokenizer for all its steps: timed with random weights.

    Nothing is known with --shard: whole, the model may not fit.
    """
    if config.shard:
        return 0.0, 0.0
    tokenizer, b = build_tokenizer(config, vae).to(run.device), config.batch_size // run.world
    side, micro = config.image_size, config.micro_batch or b
    images = torch.zeros(micro, 3, side, side, dtype=torch.uint8, device=run.device)
    alone = replace(config, batch_size=micro)
    latents = encode(vae, images, config, Run(run.device), 0)                     # (micro, C, h, w)
    muon = optimizer_for(tokenizer, config) if config.muon_lr else None  # AdamW's time is nothing, its memory is not

    def step():
        with autocast(run.device, config.precision), attention_kernel(run.device):
            loss = training_loss(tokenizer, latents, *draw_noise(alone, config.steps, latents, Run(run.device))).mean()
        loss.backward()
        if muon:
            muon.step()
        return loss.detach()
    an_image = seconds_of(lambda: encode(vae, images, config, Run(run.device), 0).sum()) / micro
    return an_image, config.steps * seconds_of(step) * b / micro


def cache_latents(dataset, vae, config, run):
    """The latents of --cache_latents versions of each image, the first as it is, made once: a `Cached` of (C, h, w)."""
    plain = open_data(config.data, config.image_size, "train", augment=False, seed=config.seed)
    side = config.image_size // vae.downsampling
    made_by = {"VAE": vae.fingerprint(), "data": config.data, "image_size": config.image_size,
               "sample_posterior": config.sample_posterior}
    shape, path = (vae.config.latent_channels, side, side), os.path.join(config.out, "latents.npy")
    cached = Cached(path, dataset, config.cache_latents, shape, np.float16, made_by, run, config.seed, first=plain)

    def make(images, row):
        return encode(vae, images.to(run.device), config, Run(run.device), -1 - row).cpu().numpy()
    cached.fill(make, part_of(config, 1 + (not config.vae), "latents"), lambda: seconds_to_come(config, run, vae)[1])
    return cached


def encode(vae, images, config, run, step):
    """uint8 images (b, 3, H, W) -> scaled latents (b, C, h, w): the posterior's mean, or a draw (--sample_posterior).

    Their noise is drawn from (seed, step) for all processes together, of which this one takes its part.
    """
    B, micro = len(images) * run.world, config.micro_batch or len(images)
    with torch.no_grad(), autocast(run.device, config.precision):
        moments = [vae.encode(to_float(part)) for part in images.split(micro)]
    latents = torch.cat([posterior.mean for posterior in moments])                # (b, C, h, w)
    if config.sample_posterior:
        source = generator(run.device, config.seed, step, "posterior")
        noise = torch.randn(B, *latents.shape[1:], generator=source, device=run.device)[run.part(B)]  # (b, C, h, w)
        latents = latents + torch.cat([posterior.std for posterior in moments]) * noise
    return vae.config.scaling_factor * latents


def wrapped(raw, ema, config, run):
    """The model that is trained: `raw` itself, or over several processes; its blocks compiled, recomputed backwards."""
    if config.compile:
        raw.compile_blocks()
    if config.checkpoint_blocks:
        kernels = lambda: (attention_kernel(run.device), attention_kernel(run.device))  # noqa: E731, again backwards
        for block in [*raw.encoder.blocks, *raw.decoder.blocks]:  # without dropout: random states need not be kept
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False,
                                    context_fn=kernels)
    if config.shard:
        for tokenizer in (raw, ema.module):
            # a block's modulations are half of it, and needed before it
            encoder, decoder = tokenizer.encoder, tokenizer.decoder
            units = [*(block.adaln for block in decoder.blocks), *encoder.blocks, *decoder.blocks]
            trunks = [part for part in (encoder, decoder, tokenizer.quantizer) if list(part.parameters())]
            shard(trunks, units, run, config.precision)
            tokenizer.quantizer.to(run.device)
    elif run.world > 1:  # no second copy of gradients
        return DistributedDataParallel(raw, gradient_as_bucket_view=True)
    return raw


def whole_average(ema, config, run):
    """The averaged tokenizer; None but on the main process. Where its tensors are split all have to call this."""
    if not config.shard:
        return ema.module if run.is_main else None
    state = snapshot(ema.state_dict(), run.is_main)
    if run.is_main:
        return fill_with_average(unloaded(ema.module.config, ema.module.vae.config), state).to(run.device)


def evaluate(tokenizer, images, config, step):
    """Rebuild held-out images (n, 3, H, W) from 1, 2, 4, ..., K tokens: returns the metrics, writes a picture."""
    metrics, columns, header = reconstruction(tokenizer, images, config.eval_timesteps, config.eval_guidance)
    rows = [[column[i] for column in columns] for i in range(min(8, len(images)))]
    save_grid(os.path.join(config.out, f"step{step:07d}.png"), rows, header)
    draw_curves(config, step, metrics)
    return metrics


def draw_inputs(vae, latents, config):
    """A picture of what the decoder is really to paint, latents (b, C, h, w): looking at it finds most data bugs."""
    with torch.no_grad():
        save_grid(os.path.join(config.out, "inputs.png"), vae.decode(latents[:32]).clamp(-1, 1).split(8))


def part_of(config, part, what):
    """What the log calls a part of the command: --vae leaves out the VAE's training, --cache_latents 0 its latents."""
    parts = 1 + (not config.vae) + (config.cache_latents > 0)
    return f"part {part or parts} of {parts}, {what}:" if parts > 1 else ""


# ---------------------------------------------------------------------------------------------------------------
# The run


def main(config):
    """Train; returns the last evaluation's metrics, or {} if it was stopped (Ctrl-C, SIGTERM, --stop_at), after saving.

    Raises UserError for settings that cannot work, before anything is written.
    """
    run = init_distributed(config.device)
    check(config, run)
    # before anything is written: it may not be there
    dataset = open_data(config.data, config.image_size, "train", augment=True, seed=config.seed)
    with Checkpoints(config, RUN_FIELDS, run) as checkpoints:
        return train(config, run, checkpoints, dataset)


def train(config, run, checkpoints, dataset):
    """The run itself; see `main`."""
    # ---- data -------------------------------------------------------------------------------------------------
    b = config.batch_size // run.world  # images of this process per step
    micro = config.micro_batch or b     # images of one forward pass
    vae_directory = config.vae or train_vae(config, run, part_of(config, 1, "VAE"), data=config.data,
                                            later=lambda vae: seconds_after_vae(config, run, vae, len(dataset)))
    if not vae_directory:
        return {}
    vae = VAE.from_pretrained(vae_directory).to(run.device).requires_grad_(False)
    held_out = open_data(config.data, config.image_size, "held_out", augment=False, seed=config.seed)
    eval_images = spread(held_out, config.eval_images)[0].to(run.device)          # (n, 3, H, W)
    if config.cache_latents:
        dataset = cache_latents(dataset, vae, config, run)

    # ---- model ------------------------------------------------------------------------------------------------
    torch.manual_seed(config.seed)
    raw = build_tokenizer(config, vae)
    if not config.shard:  # which moves it part by part: whole, it may not fit
        raw.to(run.device)
    if config.init:
        go_on_from(config.init, raw)
    raw.train()
    for part in (raw.encoder, raw.quantizer):
        part.requires_grad_(not config.freeze_encoder)
    ema = Average(raw, config.ema_decay)
    model = wrapped(raw, ema, config, run)
    vae.eval()

    # ---- optimizer --------------------------------------------------------------------------------------------
    trainable = [p for p in raw.parameters() if p.requires_grad]
    optimizer = optimizer_for(raw, config)
    scaler = Scaler(config, run)

    # ---- resume -----------------------------------------------------------------------------------------------
    def export(state):  # "sampling" is what sample.py uses unless a flag says otherwise
        fill_with_average(unloaded(raw.config, vae.config), state["ema"]).save_pretrained(
            config.out, train=asdict(config), step=state["step"], metrics=state["metrics"],
            sampling={"guidance_scale": config.eval_guidance}, **provenance(run))

    start = checkpoints.restore({"model": raw, "ema": ema, "optimizer": optimizer, "scaler": scaler}, export)
    log = Log(config.out, run, start, part_of(config, 0, "tokenizer"), config.steps)
    means = Means(6, run)

    def learn(room, latents, noise, t, k_keep):
        """Forwards and backwards with a micro-batch: adds to the gradients, returns its losses (micro,)."""
        with autocast(run.device, config.precision), attention_kernel(run.device):
            loss = training_loss(model, latents, noise, t, k_keep, room)          # (micro,)
        scaler.scale(loss.mean() * micro / b).backward()
        return loss.detach()
    learn = recorded(learn, config, run)
    stream = batches(dataset, config.batch_size, config.seed, run, start, config.workers)
    log.say(f"{sum(p.numel() for p in trainable):,} parameters on {run.device}; batch {config.batch_size} = "
            f"{run.world} processes x {b // micro} micro-batches x {micro}; steps {start} to {config.steps}")

    def report():
        *by_quarter, pure, loss = means.take()
        return dict(loss=loss, loss_by_t=by_quarter, loss_pure_noise=pure, grad_norm=norm)
    steps = checkpoints.steps(log, report, lambda: whole_average(ema, config, run),
                              lambda averaged, step: evaluate(averaged, eval_images, config, step))

    # ---- loop -------------------------------------------------------------------------------------------------
    for step, lr in steps:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        batch = next(stream)[0].to(run.device, non_blocking=True)                 # (b, C, h, w), or uint8 (b, 3, H, W)
        latents = batch if config.cache_latents else encode(vae, batch, config, run, step)  # (b, C, h, w)
        noise, t, k_keep, room = draw_noise(config, step, latents, run)           # (b, C, h, w), (b,), (b,), b numbers
        if config.shard:
            room = (config.registers,) * b  # all processes must gather the same weights equally often
        if step == 0 and run.is_main:
            draw_inputs(vae, latents, config)
        for part in (slice(i, i + micro) for i in range(0, b, micro)):
            model.require_backward_grad_sync = part.stop == b  # DDP: talk once per step, not once per micro-batch
            loss = learn(room[part], latents[part], noise[part], t[part], k_keep[part])  # (micro,)
            means.add(*by_t(loss, t[part], k_keep[part] == 0))
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trainable, config.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=not isinstance(learn, Recorded))
        ema.update_parameters(raw)
    return checkpoints.metrics


def check(config, run):
    """Raise UserError for settings that cannot work, before anything is trained or written."""
    check_run(config, run)
    check_range(config, 1, math.inf, "eval_images")
    check_range(config, 0, math.inf, "micro_batch")
    check_method(config)
    if config.shard:
        if run.world == 1:
            raise UserError("--shard: splits the model over several processes, and this is the only one; use torchrun")
        if run.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
            raise UserError(f"--shard: torch {torch.__version__} splits models over GPUs only; on CPUs it needs 2.7")
        if config.compile or config.precision == "fp16" or config.muon_lr:
            raise UserError("--shard: goes neither with --compile nor with --precision fp16, nor with Muon (presets of "
                            "minutes have it): give --muon_lr 0")
    if config.freeze_encoder and not config.init:
        raise UserError("--freeze_encoder: needs --init DIR, the trained tokenizer whose encoder is to stay")
    vae = VAE.from_pretrained(config.vae) if config.vae else None
    try:
        sample_k(1, config.registers, config.nested_dropout)
        with torch.device("meta"):
            build_tokenizer(config, vae or VAE(stage0.vae_config_of(
                stage0.VAETrainConfig(**stage0.PRESETS[config.vae_preset]))))
    except ValueError as error:
        raise UserError(f"these settings do not make a model: {error}") from None


def check_method(config):
    """Raise UserError for settings that tokenizers of images and of clips share, and that cannot work."""
    check_range(config, 1, math.inf, "image_size", "patch_size", "enc_depth", "dec_depth", "head_dim", "registers",
                "eval_timesteps")
    check_range(config, 0, math.inf, "cache_latents", "enc_width", "dec_width", "position_std", "code_std", "head_std",
                "weight_decay", "eval_guidance")
    check_range(config, 0, 1, "null_p", "pure_noise_share", "autoencoder_share", "beta2", "muon_lr")
    check_range(config, -20, 20, "t_mean")
    if config.vae_preset not in stage0.PRESETS:
        raise UserError(f"--vae_preset {config.vae_preset}: expected one of {', '.join(stage0.PRESETS)}")
    sample_t(config, 1, None, None)


if __name__ == "__main__":
    command(main, from_cli(TrainConfig, PRESETS, needs_preset=True))
