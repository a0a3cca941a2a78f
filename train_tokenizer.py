"""
Train a FlexTok tokenizer: encoder, FSQ and flow decoder together, on the latents of a frozen VAE (stage 1).

    images --VAE (frozen)--> latents --Encoder, FSQ--> codes --keep the first k--> Decoder(x_t, t, codes[:k]) --> velocity
                             latents, noise, t ----------> x_t                                 loss = |velocity - (noise - latents)|²

Paper: FlexTok, arXiv 2502.13967. Differences: no REPA loss yet, plain AdamW instead of muP, and some
choices for runs of minutes (`SHORT` below), off in the paper's presets.

    python train_tokenizer.py --preset cpu                                       # two cores; trains its VAE first
    python train_tokenizer.py --preset emoji64                                   # one GPU
    torchrun --nproc_per_node 8 train_tokenizer.py --preset d18-d28 --data /data/imagenet/train --vae out/vae_in1k

Writes out/<run>/: config.json, model.safetensors (EMA weights: what sample.py reads), resume.pt, log.jsonl, and pictures.
Times and expected numbers: README.md.                                                                Next: ar.py
"""
import hashlib
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import flow
import vae as stage0
from common import (Background, Log, StopRequest, UserError, attention_kernel, autocast, check_range, claim_directory,
                    clock, command, fill_with_average, from_cli, init_distributed, learning_rate, load_resume, make_ema,
                    provenance, read_json, replacing, save_resume, seed_step, snapshot, split_like, write_json)
from images import psnr, save_grid, to_float
from data import batches, files_digest, get_readable, open_data, spread
from fsq import FSQ
from model import Attention, FlexTok, TokenizerConfig, powers_of_two, sample_k, unloaded
from vae import VAE


@dataclass
class TrainConfig:
    """Train a FlexTok tokenizer (stage 1)."""
    # data
    data: str = "emoji"              # emoji, shapes, or a folder of images
    image_size: int = 256            # side in pixels
    vae: str = ""                    # directory of a trained VAE; empty: train one first, by --vae_preset, into <out>/vae
    vae_preset: str = "shapes32"     # which preset of vae.py to train if --vae is empty
    out: str = "out/tokenizer"       # the run's directory
    workers: int = 0                 # processes that load images, per GPU
    cache_latents: int = 0           # run the VAE once on this many views of each image, all but the first augmented; 0: in every step
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
    drop_quant_p: float = 0.0        # chance per sample that FSQ does not round
    corrupt_tokens_p: float = 0.0    # chance per sample that a random share of its tokens is replaced
    position_std: float = 0.02       # initial size of the decoder's register positions; 0.02 official, 1.0 for short runs
    code_std: float = 0.0            # initial size of the layer after FSQ; 0: Xavier, official; 1.0 for short runs
    head_std: float = 0.0            # initial size of the layer before FSQ; 0 official, 0.1 for short runs
    init: str = ""                   # directory of a trained tokenizer of these sizes to go on from; empty: random weights
    freeze_encoder: bool = False     # train the decoder alone: tokens stay what they are, and a prior over them stays valid
    # method
    nested_dropout: str = "pow2"     # how k is drawn: uniform, pow2 or uniform_pow2
    few_power: float = 0.0           # of pow2: above 0, few tokens are drawn more often, the i-th power of two as 1/i^few_power
    plain_k: int = 0                 # at most so many tokens, of any view, are to paint the unaugmented image; needs --cache_latents 2 or more
    autoencoder_share: float = 0.0   # share of the run that begins it with t = 1 and all tokens; 0 official, 0.2-0.4 for short runs
    null_p: float = 0.1              # chance per sample to be trained without tokens, which guidance needs
    t_sampler: str = "logit_normal"  # logit_normal, stratified, uniform or mode
    t_mean: float = 0.0              # of logit_normal; above 0 moves t towards noise
    pure_noise_share: float = 0.0    # share of samples at exactly t = 1; 0 official, 0.3 for short runs
    # optimisation
    steps: int = 100_000             # optimizer steps
    batch_size: int = 256            # images per step over all processes and micro-batches
    micro_batch: int = 0             # images per forward pass and process; 0: all at once
    lr: float = 5e-4                 # peak learning rate
    warmup: int = 1000               # steps
    beta2: float = 0.99              # of AdamW; beta1 is 0.9
    weight_decay: float = 0.0        # of AdamW, on matrices only
    grad_clip: float = 1.0           # largest gradient norm
    ema_decay: float = 0.9999        # decay of the averaged weights
    # running
    seed: int = 0                    # of the weights, the data order and the noise
    device: str = "auto"             # auto, cpu, cuda, cuda:1, mps
    precision: str = "auto"          # auto, bf16 or fp32
    checkpoint_blocks: bool = False  # keep only what enters each block, and compute the rest again in the backward pass
    shard: bool = False              # split weights, gradients, AdamW's state and EMA over the processes (FSDP2, ZeRO stage 3)
    log_every: int = 100             # steps
    eval_every: int = 5000           # steps; also saves
    eval_images: int = 64            # held-out images that are reconstructed
    eval_timesteps: int = 25         # sampler steps
    eval_guidance: float = 1.0       # 1.0: none, which is best for PSNR
    resume: bool = False             # continue the run in --out
    stop_at: int = 0                 # save and end before this step, as if interrupted; 0: never


# The paper's recipe, as far as it is known (batch, lr, betas, clip, no weight decay). 100k steps of 2048 images are 160
# epochs of ImageNet. Time by arithmetic, not run: 0.58, 1.9 and 4.4 TFLOP per image, 40 % of an H100's peak.
PAPER = dict(data="data/imagenet/train", vae_preset="in1k", image_size=256, batch_size=2048, micro_batch=64, steps=100_000, lr=5.6e-4, warmup=8000, workers=12,
             sample_posterior=True)
# What makes a run of minutes use its tokens at all: the README's FAQ has the reasons and what was measured
SHORT = dict(position_std=1.0, code_std=1.0, head_std=0.1, pure_noise_share=0.3, t_mean=0.5)
PRESETS = {
    # One thread of a cloud CPU with AVX512-BF16: 13 minutes of CPU time from nothing, stage 0 included; two idle ones: 9. Held-out
    # PSNR from 14.0 dB at k = 1 to 23.2 dB at k = 16 (two threads: 14.1 to 22.1). In the time of 500 steps, 250 of twice the batch got less far
    "cpu": dict(SHORT, data="shapes", image_size=32, vae_preset="shapes32", out="out/cpu", cache_latents=1,
                enc_depth=4, dec_depth=4, enc_width=128, dec_width=128, registers=16,
                autoencoder_share=0.4, nested_dropout="uniform_pow2",
                steps=4000, batch_size=32, lr=2e-3, warmup=100, ema_decay=0.997, eval_every=2000),
    # The shipped weights are 3,305 of these steps, which took 60 minutes on one busy thread of such a CPU, and ten more runs:
    # assets/emoji64/train.sh
    "emoji64-cpu": dict(SHORT, data="emoji", image_size=64, vae_preset="emoji64", out="out/emoji64-cpu", cache_latents=20,
                        enc_depth=3, dec_depth=6, enc_width=192, dec_width=192, registers=32,
                        autoencoder_share=0.2, nested_dropout="uniform_pow2",
                        steps=5000, batch_size=64, lr=1.5e-3, warmup=200, ema_decay=0.999, eval_every=1000),
    # One H100: about a quarter of an hour and stage 0 (by arithmetic, not run: 19 GFLOP an image, 10 % of its peak); PSNR not known
    "emoji64": dict(SHORT, data="emoji", image_size=64, vae_preset="emoji64", out="out/emoji64", cache_latents=64,
                    patch_size=1, enc_depth=6, dec_depth=8, enc_width=384, dec_width=384, registers=64,
                    autoencoder_share=0.1, nested_dropout="uniform_pow2",
                    steps=20_000, batch_size=256, lr=8e-4, warmup=500, ema_decay=0.999, eval_every=2000),
    # 8 H100: about 10 hours (from arithmetic, not run)
    "d12-d12": dict(PAPER, enc_depth=12, dec_depth=12, out="out/d12-d12"),
    # 8 H100: about 1.4 days (from arithmetic, not run)
    "d18-d18": dict(PAPER, enc_depth=18, dec_depth=18, out="out/d18-d18"),
    # 8 H100: about 3.3 days (from arithmetic, not run)
    "d18-d28": dict(PAPER, enc_depth=18, dec_depth=28, out="out/d18-d28"),
}
RUN_FIELDS = ("out", "workers", "device", "precision", "log_every", "eval_every", "eval_images", "eval_timesteps", "eval_guidance",
              "resume", "stop_at", "micro_batch", "checkpoint_blocks", "shard")  # may differ when a run is resumed


def build_tokenizer(config, vae):
    """A new FlexTok around `vae` with the sizes of `config`. Raises UserError if image size, VAE and patches do not fit."""
    side = config.patch_size * vae.downsampling
    if config.image_size % side:
        raise UserError(f"--image_size {config.image_size}: expected a multiple of {side} (VAE factor {vae.downsampling} times "
                        f"--patch_size {config.patch_size})")
    return FlexTok(TokenizerConfig(
        latent_channels=vae.config.latent_channels, grid=(config.image_size // side,) * 2, patch_size=config.patch_size,
        enc_width=config.enc_width or 64 * config.enc_depth, enc_depth=config.enc_depth, enc_head_dim=config.head_dim,
        dec_width=config.dec_width or 64 * config.dec_depth, dec_depth=config.dec_depth, dec_head_dim=config.head_dim,
        registers=config.registers, levels=tuple(config.levels), drop_quant_p=config.drop_quant_p,
        corrupt_tokens_p=config.corrupt_tokens_p, position_std=config.position_std, code_std=config.code_std,
        head_std=config.head_std), vae)


def go_on_from(directory, tokenizer):
    """Copy the weights of a trained tokenizer. Raises UserError if its sizes or its VAE are others."""
    trained = FlexTok.from_pretrained(directory)
    free = dict(position_std=0, code_std=0, head_std=0, drop_quant_p=0, corrupt_tokens_p=0)  # what another run may choose anew
    if replace(trained.config, **free) != replace(tokenizer.config, **free):
        raise UserError(f"--init {directory}: its tokenizer has other sizes than this run's")
    if trained.vae.config != tokenizer.vae.config or any((x.cpu() - y).abs().max() > 1e-6 for x, y in zip(tokenizer.vae.state_dict().values(), trained.vae.state_dict().values())):
        raise UserError(f"--init {directory}: was trained on another VAE; give its own to --vae")
    tokenizer.load_state_dict(trained.state_dict())


def shard(tokenizer, config, run):
    """Split encoder and decoder over the processes: of each tensor, of its gradient and of all that is made of it, one holds 1/world.

    A unit's weights are gathered when it computes, forwards and once more backwards, and then dropped. The VAE stays whole: it is
    small. Unlike DDP this sums gradients after every micro-batch: those that waited for the last one would have to be whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # late: not in every build of torch
    mesh = init_device_mesh(run.device.type, (run.world,))
    with autocast(run.device, config.precision):
        bf16 = torch.is_autocast_enabled(run.device.type)
    # Units hold only what autocast casts: gathered in bfloat16 they give the same numbers for half the traffic. And autocast's own
    # copies would stay, whole, until the backward pass. The rest of autocast is left to it: the residual stream is float32.
    policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False)
    modulations = [block.adaln for block in tokenizer.decoder.blocks]  # half of a block, and needed before it
    for unit in [*modulations, *tokenizer.encoder.blocks, *tokenizer.decoder.blocks]:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    for trunk in (tokenizer.encoder, tokenizer.decoder):
        # What is in no unit. Dropped after the forward pass too: of a frozen encoder there is no backward pass to do it
        fully_shard(trunk, mesh=mesh, reshard_after_forward=True)
    tokenizer.fsq.to(run.device)
    tokenizer.one_group = True


class CachedLatents:
    """Latents of `views` versions of every training image, computed once; otherwise a data set like data.py's.

    The first is the image as it is (cropped in the middle), the others are augmented. Lies in <out>/latents.npy as float16
    (n·views, C, h, w), memory-mapped: a set larger than RAM works.
    """

    def __init__(self, dataset, views, vae, config, run):
        self.dataset, self.views = dataset, views
        path = os.path.join(config.out, "latents.npy")
        key = hashlib.sha256(repr((config.data, config.image_size, views, config.seed, len(dataset), files_digest(dataset),
                                   config.sample_posterior, vae.config.scaling_factor)).encode())
        for tensor in vae.state_dict().values():
            key.update(tensor.cpu().numpy().tobytes())
        key = key.hexdigest()
        fresh = not os.path.exists(path + ".json") or read_json(path + ".json") != key
        if fresh and run.is_main:
            with replacing(path) as temporary:
                self._fill(temporary, vae, config, run)
            write_json(path + ".json", key)  # last: it says that the file is whole
        if run.world > 1:
            dist.barrier()
        self.latents = np.load(path, mmap_mode="r")                               # (n·views, C, h, w)

    @torch.no_grad()
    def _fill(self, path, vae, config, run):
        n, plain = len(self.dataset), open_data(config.data, config.image_size, "train", augment=False, seed=config.seed)
        C, side = vae.config.latent_channels, config.image_size // vae.downsampling
        store = np.lib.format.open_memmap(path, "w+", np.float16, (n * self.views, C, side, side))
        seconds = time.time()
        for start in range(0, len(store), 64):
            rows = range(start, min(start + 64, len(store)))
            views = [get_readable(plain if row < n else self.dataset, row % n, np.random.default_rng((config.seed, row)))[0] for row in rows]
            seed_step(config.seed, start, run)  # for draws from the posterior
            with autocast(run.device, config.precision):
                images = to_float(torch.stack(views).to(run.device))                  # (64, 3, H, W)
                latents = vae.latents(images, config.sample_posterior)                # (64, C, h, w)
            store[start:start + len(rows)] = latents.float().cpu().numpy()
        store.flush()
        print(f"cached the latents of {len(store):,} views in {clock(time.time() - seconds)}: {store.nbytes / 2**20:.0f} MiB")

    def __len__(self):
        return len(self.dataset)

    def label(self, i):
        return 0  # stage 1 needs no labels, and those of the drawn shapes cost time

    def plain(self, i):
        """The latents of the images i (b,) as they are, (b, C, h, w)."""
        return torch.from_numpy(self.latents[i.numpy()].astype(np.float32))       # (b, C, h, w)

    def get(self, i, rng):
        row = int(rng.integers(self.views)) * len(self.dataset) + i
        return torch.from_numpy(self.latents[row].astype(np.float32))             # (C, h, w)


def draw_noise(config, step, like, run):
    """The method's random numbers: noise (b, C, h, w), t (b,), k_keep (b,) and null (b,), the last two on the CPU.

    Drawn for the global batch from (seed, step) alone, of which each process takes its part: so a run on two processes
    is the run on one, and a resumed run needs no memory of what was drawn before.
    """
    B, b = config.batch_size, config.batch_size // run.world
    on_device = torch.Generator(run.device).manual_seed((config.seed << 32) + step)
    on_cpu = torch.Generator().manual_seed((config.seed << 32) + step)
    noise = torch.randn(B, *like.shape[1:], generator=on_device, device=run.device)  # (B, C, h, w)
    t = sample_t(config, B, on_device, run.device)                                # (B,)
    # At t = 1 the network sees nothing but noise and the tokens: the encoder gets a straight gradient.
    pure = torch.rand(B, generator=on_device, device=run.device) < config.pure_noise_share
    t = torch.where(pure, 1.0, t)
    k_keep = sample_k(B, config.registers, config.nested_dropout, on_cpu, config.few_power)  # (B,)
    if step < config.autoencoder_share * config.steps:  # with all tokens and t = 1 this is a plain autoencoder
        t, k_keep = torch.ones_like(t), torch.full((B,), config.registers)
    null = torch.rand(B, generator=on_cpu) < config.null_p                        # (B,)
    mine = slice(run.rank * b, (run.rank + 1) * b)
    return noise[mine], t[mine], k_keep[mine], null[mine]


def sample_t(config, B, generator, device):
    """t (B,) by the method that --t_sampler names."""
    if config.t_sampler == "logit_normal":
        return flow.t_logit_normal(B, config.t_mean, generator=generator, device=device)
    if config.t_sampler == "stratified":
        return flow.t_stratified_logit_normal(B, generator=generator, device=device)
    if config.t_sampler == "uniform":
        return flow.t_uniform(B, generator=generator, device=device)
    if config.t_sampler == "mode":
        return flow.t_mode(B, generator=generator, device=device)
    raise UserError(f"--t_sampler {config.t_sampler}: expected logit_normal, stratified, uniform or mode")


@torch.no_grad()
def evaluate(tokenizer, images, config, path):
    """Reconstruct held-out images (n, 3, H, W) from 1, 2, 4, ..., K tokens: PSNR in dB for each k, and a picture of it.

    Also counts the distinct tokens at each position: near 1 means a collapsed position, n that every image has its own.
    """
    tokens = tokenizer.tokenize(images)                                           # n x (1, K)
    ks = powers_of_two(config.registers)
    vae_images = tokenizer.vae.decode(tokenizer.vae.latents(images))              # (n, 3, H, W), the best one could get
    columns, decibels = [images, vae_images], []
    for k in ks:
        generator = torch.Generator().manual_seed(0)
        columns.append(tokenizer.detokenize([row[:, :k] for row in tokens], config.eval_timesteps, config.eval_guidance,
                                            generator=generator))
        decibels.append(psnr(columns[-1], images).mean().item())
    rows = [[column[i].clamp(-1, 1).cpu() for column in columns] for i in range(min(8, len(images)))]
    save_grid(path, rows, ["original", "VAE", *(f"k={k}" for k in ks)])
    distinct = [len(position.unique()) for position in torch.cat(tokens).T]       # K
    return {"ks": ks, "psnr": decibels, "psnr_vae": psnr(vae_images, images).mean().item(),
            "distinct_tokens": [min(distinct), sum(distinct) / len(distinct), max(distinct)]}


def main(config):
    """Train; returns the last evaluation's metrics. A stopped run (Ctrl-C, SIGTERM, --stop_at) returns {} after saving."""
    # ---- distributed ------------------------------------------------------------------------------------------
    run = init_distributed(config.device)
    check(config, run)
    resume_path, config_path = (os.path.join(config.out, name) for name in ("resume.pt", "config.json"))
    claim_directory(config, read_json(config_path).get("train") if os.path.exists(resume_path) else None, RUN_FIELDS, run)
    b = config.batch_size // run.world  # images of this process per step
    micro = config.micro_batch or b     # images of one forward pass

    # ---- data -------------------------------------------------------------------------------------------------
    vae_directory = config.vae or train_vae(config, run)
    if not vae_directory:
        return {}  # stopped within stage 0
    vae = VAE.from_pretrained(vae_directory).to(run.device).requires_grad_(False)
    dataset = open_data(config.data, config.image_size, "train", augment=True, seed=config.seed)
    held_out = open_data(config.data, config.image_size, "held_out", augment=False, seed=config.seed)
    eval_images = spread(held_out, config.eval_images).to(run.device)            # (n, 3, H, W)
    if config.cache_latents:
        dataset = CachedLatents(dataset, config.cache_latents, vae, config, run)

    # ---- model ------------------------------------------------------------------------------------------------
    torch.manual_seed(config.seed)
    raw = build_tokenizer(config, vae)
    if not config.shard:  # which moves it part by part: whole, it may not fit
        raw.to(run.device)
    if config.init:
        go_on_from(config.init, raw)
    raw.encoder.requires_grad_(not config.freeze_encoder)
    ema = make_ema(raw, config.ema_decay)
    model = raw
    if config.checkpoint_blocks:
        kernels = lambda: (attention_kernel(run.device), attention_kernel(run.device))  # noqa: E731, the same again backwards
        for block in [*raw.encoder.blocks, *raw.decoder.blocks]:  # there is no dropout: random states need not be kept
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, context_fn=kernels)
    if config.shard:
        shard(raw, config, run), shard(ema.module, config, run)
    elif run.world > 1:
        model = DistributedDataParallel(raw, gradient_as_bucket_view=True)  # no second copy of gradients
    count = sum(p.numel() for p in raw.parameters() if p.requires_grad)

    # ---- optimizer --------------------------------------------------------------------------------------------
    trainable = [p for p in raw.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trainable if p.dim() > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)

    # ---- resume -----------------------------------------------------------------------------------------------
    start = 0
    if config.resume:
        state = load_resume(resume_path)
        raw.load_state_dict(split_like(state["model"], raw.state_dict()))
        ema.load_state_dict(split_like(state["ema"], ema.state_dict()))
        in_order = dict(enumerate(p for group in groups for p in group["params"]))  # AdamW numbers them
        optimizer.load_state_dict(split_like(state["optimizer"], {"state": in_order}))
        start = state["step"]
        del state  # or a second copy of everything stays in memory
    stream = batches(dataset, config.batch_size, config.seed, run, start, config.workers)
    log = Log(config.out, run, start)
    if run.is_main:
        print(f"{count:,} parameters on {run.device}; batch {config.batch_size} = {run.world} processes x {b // micro} "
              f"micro-batches x {micro}; steps {start} to {config.steps}", flush=True)

    def save(state, metrics):
        # "sampling" is what sample.py uses unless told otherwise
        notes = dict(train=asdict(config), step=state["step"], metrics=metrics, sampling={"guidance_scale": config.eval_guidance}, **provenance(run))
        def write():
            fill_with_average(unloaded(raw.config, vae.config), state["ema"]).save_pretrained(config.out, **notes)
            save_resume(resume_path, **state)
        background(write)

    # ---- loop -------------------------------------------------------------------------------------------------
    stop, background = StopRequest(), Background()
    raw.train()
    vae.eval()
    metrics, seconds, logged = {}, time.time(), start
    sums, counts = torch.zeros(5, device=run.device), torch.zeros(5, device=run.device)
    for step in range(start, config.steps):
        lr = learning_rate(step, config.lr, config.warmup, config.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # For what is not drawn by draw_noise: the VAE's posterior, FSQ's training noise. Not from draw_noise's seed, which
        # would make the posterior's noise the very noise that the flow then adds
        seed_step(config.seed, 2**31 + step, run)
        batch, _, indices = next(stream)
        batch = batch.to(run.device, non_blocking=True)                           # (b, C, h, w), or uint8 (b, 3, H, W)
        latents = batch if config.cache_latents else encode(vae, batch, micro, config, run)  # (b, C, h, w)
        noise, t, k_keep, null = draw_noise(config, step, latents, run)           # (b, C, h, w), (b,), (b,), (b,)
        told = latents                                                            # (b, C, h, w), what the encoder sees
        if config.plain_k:
            # Few tokens have no room for how a view was shifted and tinted: all views of an image would be painted over each
            # other. So from any view's few tokens the decoder learns the one image: it meets many tokens near each other, as
            # those of new images are. Where there are many, views keep it from learning the images by heart.
            few = (k_keep <= config.plain_k)[:, None, None, None].to(run.device)   # (b, 1, 1, 1)
            latents = torch.where(few, dataset.plain(indices).to(run.device), latents)  # (b, C, h, w)
        if step == 0 and run.is_main:  # what the decoder is really to paint: looking at it finds most data bugs
            with torch.no_grad():
                save_grid(os.path.join(config.out, "inputs.png"), vae.decode(latents[:32]).clamp(-1, 1).split(8))

        for i in range(0, b, micro):
            part = slice(i, i + micro)
            model.require_backward_grad_sync = i + micro == b  # DDP: talk once per step, not once per micro-batch
            x_t = flow.interpolate(latents[part], noise[part], t[part])           # (micro, C, h, w)
            with autocast(run.device, config.precision), attention_kernel(run.device):
                v = model(told[part], x_t, t[part], k_keep[part], null[part])
            # FORK: another objective
            loss = flow.loss_per_sample(v, flow.velocity_target(latents[part], noise[part]))  # (micro,)
            (loss.mean() * micro / b).backward()
            pure = (t[part] == 1) & ~null[part].to(run.device, non_blocking=True)  # the tokens alone must carry these
            by_t = flow.loss_by_t(loss, t[part])
            sums += torch.cat([by_t[0], (loss.detach() * pure).sum()[None]])      # (5,)
            counts += torch.cat([by_t[1], pure.sum()[None]])                      # (5,)

        grad_norm = torch.nn.utils.clip_grad_norm_(trainable, config.grad_clip)
        if config.shard:
            grad_norm = grad_norm.full_tensor()  # the clipping was by this already, the norm over all processes
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(raw)

        done = step + 1
        stopping = done == config.stop_at or stop.agreed(run)
        evaluating = done % config.eval_every == 0 or done == config.steps
        if (evaluating or stopping) and not grad_norm.isfinite():  # the same on all processes, and of all micro-batches
            raise UserError(f"the loss is no longer finite at step {step}; the last checkpoint stands, try a lower --lr than {config.lr}")
        if done % config.log_every == 0 or done == config.steps:
            if run.world > 1:
                dist.all_reduce(sums), dist.all_reduce(counts)
            rate = (done - logged) / (time.time() - seconds)
            mean = [total / n if n else None for total, n in zip(sums.tolist(), counts.tolist())]
            log(step=step, loss=(sums[:4].sum() / counts[:4].sum()).item(), loss_by_t=mean[:4], loss_pure_noise=mean[4], lr=lr,
                grad_norm=grad_norm.item(), images_per_s=rate * config.batch_size, eta=clock((config.steps - done) / rate))
            seconds, logged = time.time(), done
            sums.zero_(), counts.zero_()
        if evaluating or stopping:
            background.wait()  # one copy of everything at a time
            # the main process evaluates and saves; the others send it what is split
            state = snapshot(dict(model=raw.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), step=done), run.is_main)
            if evaluating and run.is_main:
                averaged = fill_with_average(unloaded(raw.config, vae.config), state["ema"]).to(run.device)
                metrics = evaluate(averaged, eval_images, config, os.path.join(config.out, f"step{done:07d}.png"))
                del averaged
                log(step=step, **metrics)
            if run.is_main:
                save(state, metrics)
            del state  # the writer frees it
            seconds, logged = time.time(), done  # this does not count as training time
        if stopping:
            background.wait()
            if run.is_main:
                print(f"stopped after step {done}; go on with --resume")
            metrics = {}
            break
    background.wait()
    stop.release()
    return metrics


def check(config, run):
    """Raise UserError for settings that cannot work, before anything is trained or written."""
    check_range(config, 1, math.inf, "steps", "batch_size", "log_every", "eval_every", "eval_images", "eval_timesteps", "warmup", "registers",
                "image_size", "patch_size", "enc_depth", "dec_depth", "head_dim")
    check_range(config, 0, math.inf, "plain_k", "cache_latents", "workers", "micro_batch", "stop_at", "enc_width", "dec_width", "few_power",
                "position_std", "code_std", "head_std", "weight_decay", "eval_guidance")
    check_range(config, 0, 1, "drop_quant_p", "corrupt_tokens_p", "null_p", "pure_noise_share", "autoencoder_share", "beta2", "ema_decay", "lr")
    check_range(config, 1e-9, math.inf, "grad_clip")
    check_range(config, -20, 20, "t_mean")
    check_range(config, 0, 2**31 - 1, "seed")
    if config.t_mean and config.t_sampler != "logit_normal":
        raise UserError(f"--t_mean {config.t_mean}: only --t_sampler logit_normal has one; give --t_mean 0 with {config.t_sampler}")
    if config.batch_size % (run.world * max(1, config.micro_batch)):
        raise UserError(f"--batch_size {config.batch_size}: expected a multiple of processes x micro_batch = {run.world} x "
                        f"{max(1, config.micro_batch)}")
    if config.shard:
        if run.world == 1:
            raise UserError("--shard: splits the model over several processes, and this is the only one; start with torchrun, or without it")
        from torch.distributed import fsdp  # late: not in every build of torch
        if not hasattr(fsdp, "fully_shard"):
            raise UserError(f"--shard: torch {torch.__version__} has no torch.distributed.fsdp.fully_shard; 2.6 has")
    if config.plain_k and config.cache_latents < 2:
        raise UserError(f"--plain_k {config.plain_k}: needs --cache_latents 2 or more, the image as it is and other views of it")
    if config.freeze_encoder and not config.init:
        raise UserError("--freeze_encoder: needs --init DIR, the trained tokenizer whose encoder is to stay")
    if not config.vae and config.vae_preset not in stage0.PRESETS:
        raise UserError(f"--vae_preset {config.vae_preset}: expected one of {', '.join(stage0.PRESETS)}")
    sample_t(config, 1, None, None)
    autocast(run.device, config.precision)
    try:
        sample_k(1, config.registers, config.nested_dropout, few_power=config.few_power)
        with torch.device("meta"):
            Attention(config.enc_width or 64 * config.enc_depth, config.head_dim)
            Attention(config.dec_width or 64 * config.dec_depth, config.head_dim)
            FSQ(config.levels)
    except ValueError as error:
        raise UserError(f"these settings do not make a model: {error}") from None


def train_vae(config, run):
    """Stage 0 into <out>/vae, or the rest of it; returns the directory, or "" if it was stopped before its end."""
    out = os.path.join(config.out, "vae")
    started = os.path.exists(os.path.join(out, "resume.pt"))
    settings = stage0.VAETrainConfig(**{
        **stage0.PRESETS[config.vae_preset], "data": config.data, "image_size": config.image_size, "out": out, "resume": started,
        "device": config.device, "precision": config.precision, "workers": config.workers, "seed": config.seed})
    def done():
        path = os.path.join(out, "train.json")
        return os.path.exists(path) and read_json(path).get("metrics", {}).get("steps_done") == settings.steps
    if started or not done():  # one that is finished sees that its steps are done; without its resume.pt it is good enough too
        stage0.main(settings)
    if run.world > 1:
        dist.barrier()  # the main process writes, all read
    if not done() and run.is_main:
        print("stopped within stage 0, the VAE; give the same command again to go on")
    return out if done() else ""


def encode(vae, images, micro, config, run):
    """uint8 images (b, 3, H, W) -> scaled latents (b, C, h, w) float32, `micro` images at a time."""
    with torch.no_grad(), autocast(run.device, config.precision):
        return torch.cat([vae.latents(to_float(part), config.sample_posterior).float() for part in images.split(micro)])


if __name__ == "__main__":
    command(main, from_cli(TrainConfig, PRESETS))
