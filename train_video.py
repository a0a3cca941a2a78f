"""
Train a VideoFlexTok tokenizer, in two stages of one run. What differs from train_tokenizer.py, and only that.

    clips --VAE (frozen)--> latents --Encoder, FSQ--> codes --the first k of every row--> Decoder --> velocity
    stage 1  encoder and decoder learn together, both time-causal: a row can rely on nothing that comes later
    stage 2  the encoder is frozen, so tokens stay what they are; the decoder may look at the whole clip, and gets the
             first latent frame clean in half of all cases: that is how a long clip goes on, and how a photo moves

Why two: what the encoder learns beside a decoder that sees everything is not causal in spirit, since it may leave to
later rows what an earlier one should say; but rebuilding a clip is easier for a decoder that sees all of it.
Paper: VideoFlexTok; its training code is not public. Differences: no REPA loss, AdamW instead of muP, one learning rate
schedule over both stages, `SHORT` of train_tokenizer.py.

    python train_video.py --preset video-cpu             # a CPU core: drawn clips of 9 frames at 32 px
    python train_video.py --preset video-cpu --steps 300 --out out/try
    python train_video.py --preset video-cpu --data films/ --vae out/vae --out out/mine      # a VAE of your own images

Writes out/<run>/ as train_tokenizer.py does, with animated pictures. Times and numbers: RESULTS.md.   Next: sample.py
"""
import math
import os
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

import flow
import vae as stage0
from common import (Log, UserError, attention_kernel, autocast, check_range, command, digest_of, from_cli, generator,
                    init_distributed)
from clips import save_clip_grid
from data import Cached, batches, open_clips, spread
from evaluate import reconstruction
from images import draw_curves, to_float
from model import sample_k
from runs import (Average, Checkpoints, Means, Recorded, Scaler, check_run, fill_with_average, optimizer_for,
                  provenance, recorded, seconds_of)
from train_tokenizer import SHORT, by_t, check_method, draw_noise, part_of, train_vae
from vae import VAE
from video import VideoConfig, VideoFlexTok, given_rows, is_video, rows_of, unloaded_video
from vidtok import FrameVAE, make_vae


@dataclass
class VideoTrainConfig:
    """Train a VideoFlexTok tokenizer."""
    # data
    data: str = "moving"             # moving, drawn clips; or a folder of films (mp4, animations, folders of frames)
    image_size: int = 32             # side of a frame in pixels
    frames: int = 17                 # of a window, 1 + 4n
    vae: str = ""                    # directory of an image VAE, or of a video tokenizer for its VAE; empty: train one
    vae_preset: str = "shapes32"     # which preset of vae.py to train, on its own data, if --vae is empty
    cache_latents: int = 0           # keep the latents of so many windows of each clip; 0: encode clips in every step
    out: str = "out/video"           # the run's directory
    workers: int = 0                 # processes that draw clips
    # model
    enc_depth: int = 18              # encoder blocks
    dec_depth: int = 28              # decoder blocks
    enc_width: int = 0               # 0: 64 times the depth
    dec_width: int = 0               # 0: 64 times the depth
    head_dim: int = 64               # size of an attention head
    patch_size: int = 2              # latents per patch side
    registers: int = 256             # K, the most tokens a row can have
    levels: tuple = (8, 8, 8, 5, 5, 5)  # of FSQ; their product is the vocabulary
    scale_codes: bool = False        # give what FSQ reads a mean square of 1; False official, True for short runs
    patch_position_std: float = 0.02  # initial size of positions of patches; 0.02 official, 0.5 for short runs
    position_std: float = 0.02       # initial size of those of registers; 0.02 official, 1.0 for short runs
    code_std: float = 0.0            # initial size of the layer after FSQ; 0: Xavier, official; 1.0 for short runs
    head_std: float = 0.0            # initial size of the layer before FSQ; 0 official, 0.1 for short runs
    # method
    stage_2: float = 0.25            # the share of the steps, at the end, that is stage 2
    first_frame_p: float = 0.5       # in stage 2: chance per clip that its first latent frame is given
    nested_dropout: str = "pow2"     # how k is drawn, one for all rows: uniform, pow2, uniform_pow2 or mixed
    autoencoder_share: float = 0.0   # the share that begins at t = 1, all tokens; 0 official, 0.4 if short
    null_p: float = 0.1              # chance per clip to be trained without tokens, which guidance needs
    t_sampler: str = "logit_normal"  # logit_normal or uniform
    t_mean: float = 0.0              # of logit_normal; above 0 moves t towards noise
    pure_noise_share: float = 0.0    # share of clips at exactly t = 1; 0 official, 0.3 for short runs
    # optimisation
    steps: int = 100_000             # optimizer steps
    batch_size: int = 64             # clips per step
    lr: float = 5e-4                 # peak learning rate
    muon_lr: float = 0.0             # peak for matrices of blocks, learned by Muon; 0: by AdamW, official
    warmup: int = 1000               # steps
    beta2: float = 0.99              # of AdamW; beta1 is 0.9
    weight_decay: float = 0.0        # on matrices only
    grad_clip: float = 1.0           # largest gradient norm
    ema_decay: float = 0.9999        # decay of the averaged weights
    # running
    seed: int = 0                    # of the weights, the data order and the noise
    device: str = "auto"             # auto, cpu, cuda, cuda:1, mps
    precision: str = "auto"          # auto, bf16, fp16 or fp32
    compile: bool = False            # on a GPU, record a step as a CUDA graph; torch cannot compile the blocks yet
    log_every: int = 100             # steps
    eval_every: int = 5000           # steps; also saves
    eval_clips: int = 32             # held-out clips that are reconstructed
    eval_timesteps: int = 25         # sampler steps
    eval_guidance: float = 1.0       # 1.0: none; also what sample.py then uses unless told otherwise
    resume: bool = False             # continue the run in --out
    stop_at: int = 0                 # save and end before this step, as if interrupted; 0: never


PRESETS = {
    "video-cpu": dict(    # a CPU core, 13 minutes with its VAE: drawn clips of 9 frames at 32 px, 3 rows of 8 tokens
        SHORT, out="out/video-cpu", frames=9, enc_depth=3, dec_depth=3, enc_width=104, dec_width=104, head_dim=52,
        registers=8, patch_position_std=0.5, nested_dropout="uniform_pow2", autoencoder_share=0.4, cache_latents=1,
        muon_lr=0.0,  # the shipped weights are of AdamW; Muon was not tried on clips
        steps=5000, batch_size=16, lr=2e-3, warmup=100, ema_decay=0.997, eval_every=2500, eval_guidance=2.0),
}
# may differ when a run is resumed
RUN_FIELDS = ("out", "workers", "device", "precision", "compile", "log_every", "eval_every", "eval_clips",
              "eval_timesteps", "eval_guidance", "resume", "stop_at")


# ---------------------------------------------------------------------------------------------------------------
# The algorithm


def training_loss(model, latents, noise, t, k_keep, room, prefix):
    """How wrong the velocity is, for each clip (b,).

    latents and noise (b, C, T, h, w), t (b,), one for all frames of a clip; k_keep (b,) and room, b numbers, as in
    train_tokenizer.py, one for all rows of a clip. prefix (b,): so many latent frames are given clean. They are not
    part of the loss: there is nothing to foresee.
    """
    given = given_rows(prefix, latents.shape[2], latents.device)                  # (b, T)
    x_t = flow.interpolate(latents, noise, t)                                     # (b, C, T, h, w)
    x_t = torch.where(given[:, None, :, None, None], latents, x_t)
    v = model(latents, x_t, t, k_keep, room, prefix)                              # (b, C, T, h, w)
    error = (v.float() - flow.velocity_target(latents, noise)).square().mean((1, 3, 4))  # (b, T)
    return (error * ~given).sum(1) / (~given).sum(1)                              # (b,)


def draw_prefix(config, step, run):
    """How many latent frames each clip is given: (b,) int64, 0 or in stage 2 perhaps 1, on the CPU; by (seed, step)."""
    u = torch.rand(config.batch_size, generator=generator("cpu", config.seed, step, "prefix"))  # (B,)
    return (u < config.first_frame_p * in_stage_2(config, step)).long()[run.part(config.batch_size)]


def in_stage_2(config, step):
    """Whether step 0, 1, 2, ... is one of stage 2."""
    return config.stage_2 > 0 and step >= round((1 - config.stage_2) * config.steps)


def enter_stage(tokenizer, second):
    """Set what a stage decides: who sees whom in the decoder, and whether the encoder learns."""
    tokenizer.decoder.mask = "full" if second else "time_block_causal"
    tokenizer.config = replace(tokenizer.config, dec_mask=tokenizer.decoder.mask)
    for part in (tokenizer.encoder, tokenizer.quantizer):
        part.requires_grad_(not second)
        if second:
            part.zero_grad(set_to_none=True)  # with gradients of zero, the optimizer would still follow its momentum


# ---------------------------------------------------------------------------------------------------------------
# The pieces of a run


def open_vae(directory):
    """The frozen VAE of clips in a directory: a video tokenizer's, or an image VAE for every frame."""
    if is_video(directory):
        return VideoFlexTok.from_pretrained(directory).vae
    return FrameVAE(VAE.from_pretrained(directory))


def build_tokenizer(config, vae):
    """A new VideoFlexTok around `vae` with the sizes of `config`. Raises UserError if they do not fit together."""
    side = config.patch_size * vae.downsampling
    if config.image_size % side:
        raise UserError(f"--image_size {config.image_size}: expected a multiple of {side} (VAE factor "
                        f"{vae.downsampling} times --patch_size {config.patch_size})")
    T, patches = rows_of(config.frames), config.image_size // side
    return VideoFlexTok(VideoConfig(
        latent_channels=vae.latent_channels, frames=config.frames, stride=config.frames - 1, grid=(patches, patches),
        patch_size=config.patch_size, enc_width=config.enc_width or 64 * config.enc_depth, enc_depth=config.enc_depth,
        enc_head_dim=config.head_dim, dec_width=config.dec_width or 64 * config.dec_depth, dec_depth=config.dec_depth,
        dec_head_dim=config.head_dim, registers=config.registers, enc_positions=max(T, patches),
        dec_positions=max(T, patches), code_positions=max(T, config.registers), levels=tuple(config.levels),
        scale_codes=config.scale_codes, patch_position_std=config.patch_position_std,
        position_std=config.position_std, code_std=config.code_std, head_std=config.head_std), vae)


def evaluate(tokenizer, clips, config, step):
    """Rebuild held-out clips (n, 3, F, H, W): returns the metrics, writes an animated picture."""
    metrics, columns, header = reconstruction(tokenizer, clips, config.eval_timesteps, config.eval_guidance)
    rows = list(zip(*(column[:6].cpu() for column in columns)))
    save_clip_grid(os.path.join(config.out, f"step{step:07d}.webp"), rows, header)
    draw_curves(config, step, metrics)
    return metrics


def cache_latents(dataset, tokenizer, config, run):
    """The latents of --cache_latents windows of each clip, made once: a `Cached` of (C, T, h, w).

    The VAE is frozen, and to encode each clip anew in every epoch took half of a step.
    """
    T, (h, w) = rows_of(config.frames), (config.image_size // tokenizer.vae.downsampling,) * 2
    made_by = {"VAE": digest_of(asdict(tokenizer.vae.config), tokenizer.vae), "data": config.data,
               "image_size": config.image_size, "frames": config.frames}
    cached = Cached(os.path.join(config.out, "latents.npy"), dataset, config.cache_latents,
                    (tokenizer.vae.latent_channels, T, h, w), np.float16, made_by, run, config.seed)
    cached.fill(lambda clips, row: encode(tokenizer, clips, run).cpu().numpy(),
                part_of(config, 1 + (not config.vae), "latents"),
                lambda: seconds_to_come(config, run, tokenizer.vae)[1])
    return cached


def seconds_to_come(config, run, vae):
    """About how long `vae` takes for a clip, and the tokenizer for all its steps: timed with random weights."""
    tokenizer, B, side = build_tokenizer(config, vae).to(run.device), config.batch_size, config.image_size
    clips = torch.zeros(B, 3, config.frames, side, side, dtype=torch.uint8)       # (B, 3, F, S, S)
    latents = encode(tokenizer, clips, run)                                       # (B, C, T, h, w)

    def step():
        noise, t, k_keep, room = draw_noise(config, config.steps, latents, run)
        with autocast(run.device, config.precision), attention_kernel(run.device):
            loss = training_loss(tokenizer, latents, noise, t, k_keep, room, torch.zeros_like(k_keep)).mean()
        loss.backward()
        return loss.detach()
    return seconds_of(lambda: encode(tokenizer, clips, run).sum()) / B, config.steps * seconds_of(step)


def encode(tokenizer, clips, run):
    """uint8 clips (b, 3, F, H, W) -> scaled latents (b, C, T, h, w), the posterior's mean."""
    with torch.no_grad():
        return tokenizer.through_vae(tokenizer.vae.latents, to_float(clips.to(run.device, non_blocking=True)))


# ---------------------------------------------------------------------------------------------------------------
# The run


def main(config):
    """Train; returns the last evaluation's metrics, or {} if it was stopped (Ctrl-C, SIGTERM, --stop_at), after saving.

    Raises UserError for settings that cannot work, before anything is written.
    """
    run = init_distributed(config.device)
    check(config, run)
    with Checkpoints(config, RUN_FIELDS, run) as checkpoints:
        return train(config, run, checkpoints)


def train(config, run, checkpoints):
    """The run itself; see `main`."""
    # ---- data -------------------------------------------------------------------------------------------------
    dataset, held_out = (open_clips(config.data, config.image_size, split, config.seed, config.frames)
                         for split in ("train", "held_out"))
    eval_clips = spread(held_out, config.eval_clips)[0].to(run.device)            # (n, 3, F, H, W)

    def seconds_after_vae(vae):
        a_clip, the_training = seconds_to_come(config, run, FrameVAE(vae))
        encoded = config.cache_latents * len(dataset) or config.steps * config.batch_size
        return a_clip * encoded + the_training
    vae_directory = config.vae or train_vae(config, run, part_of(config, 1, "VAE"), seconds_after_vae)
    if not vae_directory:
        return {}
    vae = open_vae(vae_directory)

    # ---- model ------------------------------------------------------------------------------------------------
    torch.manual_seed(config.seed)
    raw = build_tokenizer(config, vae).to(run.device).train()
    vae.eval()
    if config.cache_latents:
        dataset = cache_latents(dataset, raw, config, run)
    ema = Average(raw, config.ema_decay)

    # ---- optimizer --------------------------------------------------------------------------------------------
    trainable = [p for part in (raw.encoder, raw.quantizer, raw.decoder) for p in part.parameters()]
    optimizer = optimizer_for(raw, config)
    scaler = Scaler(config, run)

    # ---- resume -----------------------------------------------------------------------------------------------
    def export(state):  # "sampling" is what sample.py uses unless a flag says otherwise
        last = in_stage_2(config, state["step"] - 1)  # as it was trained
        sizes = replace(raw.config, dec_mask="full" if last else "time_block_causal")
        fill_with_average(unloaded_video(sizes, vae.config, config.out), state["ema"]).save_pretrained(
            config.out, train=asdict(config), step=state["step"], metrics=state["metrics"],
            sampling={"guidance_scale": config.eval_guidance}, **provenance(run))

    start = checkpoints.restore({"model": raw, "ema": ema, "optimizer": optimizer, "scaler": scaler}, export)
    log, means = Log(config.out, run, start, part_of(config, 0, "tokenizer"), config.steps), Means(6, run)
    stream = batches(dataset, config.batch_size, config.seed, run, start, config.workers)
    log.say(f"{sum(p.numel() for p in trainable):,} parameters on {run.device}; batch {config.batch_size}; steps "
            f"{start} to {config.steps}, stage 2 from {round((1 - config.stage_2) * config.steps)} on")

    def learn(stage_and_room, latents, noise, t, k_keep, prefix):
        """Forwards and backwards with a batch: adds to the gradients, returns its losses (b,)."""
        with autocast(run.device, config.precision), attention_kernel(run.device):
            loss = training_loss(raw, latents, noise, t, k_keep, stage_and_room[1], prefix)  # (b,)
        scaler.scale(loss.mean()).backward()
        return loss.detach()
    learn = recorded(learn, config, run)

    def report():
        *by_quarter, pure, loss = means.take()
        return dict(loss=loss, loss_by_t=by_quarter, loss_pure_noise=pure, grad_norm=norm)

    def measure(averaged, step):
        enter_stage(averaged, in_stage_2(config, step - 1))
        return evaluate(averaged, eval_clips, config, step)
    steps = checkpoints.steps(log, report, lambda: ema.module, measure)

    # ---- loop -------------------------------------------------------------------------------------------------
    for step, lr in steps:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        enter_stage(raw, in_stage_2(config, step))
        batch = next(stream)[0].to(run.device, non_blocking=True)                 # (b, C, T, h, w), or (b, 3, F, H, W)
        latents = batch if config.cache_latents else encode(raw, batch, run)      # (b, C, T, h, w)
        noise, t, k_keep, room = draw_noise(config, step, latents, run)
        prefix = draw_prefix(config, step, run).to(run.device, non_blocking=True)  # (b,)
        loss = learn((in_stage_2(config, step), room), latents, noise, t, k_keep, prefix)  # (b,)
        means.add(*by_t(loss, t, k_keep == 0))
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
    if run.world > 1:
        raise UserError(f"{run.world} processes: train_video.py runs in one")
    check_range(config, 5, math.inf, "frames")
    check_range(config, 1, math.inf, "eval_clips")
    check_range(config, 0, math.inf, "patch_position_std")
    check_range(config, 0, 1, "stage_2", "first_frame_p")
    check_method(config)
    open_clips(config.data, config.image_size, frames=config.frames)
    try:
        sample_k(1, config.registers, config.nested_dropout)
        vae = open_vae(config.vae) if config.vae else None
        with torch.device("meta"):
            build_tokenizer(config, vae or make_vae(stage0.vae_config_of(
                stage0.VAETrainConfig(**stage0.PRESETS[config.vae_preset]))))
    except ValueError as error:
        raise UserError(f"these settings do not make a model: {error}") from None


if __name__ == "__main__":
    command(main, from_cli(VideoTrainConfig, PRESETS, needs_preset=True))
