"""
Every number about quality: how well tokens rebuild an image, how well a prior foresees them, what its images are worth.

    images --tokenize--> tokens --first k--> detokenize --> images: PSNR, SSIM, and what a judge sees  (reconstruction)
    held-out tokens, conditions --prior--> -log p(token), by position                                  (held_out_loss)
    caption, class --prior--> images: what a judge sees; is it a copy of a training picture?    (generation, copies)

The judge is a small network that is trained here, in minutes, on training pictures: which two emoji show one thing in
two styles, and which style is it? Of a drawn scene: kind, colour, background and place. Its features are the space in
which pictures are compared. The paper (FlexTok, arXiv 2502.13967, section 4) reports FID and CLIP scores of 50,000
images, which need networks that are not here. The trainers call the first two at every evaluation.

    python evaluate.py reconstruction                     # shipped weights, held-out emoji; ten minutes of a core
    python evaluate.py generation out/cpu out/cpu-prior --data shapes   # after both trainers' --preset cpu
    python evaluate.py copies                             # shipped weights: how many new emoji are near copies?
    python evaluate.py clips                              # the shipped video tokenizer: kind, colour, direction, speed
Next: train_tokenizer.py
"""
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ar import GPT
from common import (Run, UserError, autocast, check_output, check_range, command, from_cli, learning_rate, nearest,
                    pick_device)
from data import (BACKGROUNDS, COLOURS, DIRECTIONS, KINDS, PLACES, SPEEDS, Emoji, Shapes, get_readable, open_clips,
                  open_data, spread)
from images import psnr, save_grid, ssim, to_float
from model import FlexTok, powers_of_two
from runs import Means
from video import ClipSequences, VideoFlexTok, is_video

GROUPS = ((0, 1), (1, 8), (8, 64), (64, None))  # positions whose losses are reported apart: where are the bits?


@dataclass
class Reconstruction:
    """Held-out images rebuilt from 1, 2, 4, ... tokens, in numbers, with intervals that 95 % of samples fall into."""
    tokenizer: str = "assets/emoji64"    # directory of a tokenizer
    data: str = "emoji"                  # emoji, shapes, or a folder of images
    split: str = "held_out"              # held_out, or of emoji: combinations
    n: int = 64                          # at most this many images
    judge_steps: int = 1500              # to train the judge; 0: no judge, PSNR and SSIM only
    timesteps: int = 25                  # steps of the flow sampler
    guidance_scale: float = 0.0          # 1.0: none; 0.0: what the checkpoint recommends
    out: str = "out/reconstruction.png"  # picture of the first eight
    device: str = "auto"                 # auto, cpu, cuda, mps


@dataclass
class Clips:
    """Held-out drawn clips of one shape, rebuilt from 1, 2, 4, ... tokens a row: what is it, where does it go?"""
    tokenizer: str = "assets/video"      # directory of a video tokenizer
    n: int = 128                         # at most this many clips
    judge_steps: int = 1500              # to train the judge, on drawn scenes
    timesteps: int = 25                  # steps of the flow sampler
    guidance_scale: float = 0.0          # 1.0: none; 0.0: what the tokenizer recommends
    device: str = "auto"                 # auto, cpu, cuda, mps


@dataclass
class Generation:
    """Images that a prior writes for held-out captions: do they show what was asked for?"""
    tokenizer: str = "assets/emoji64"    # directory of a tokenizer
    prior: str = "assets/emoji64/prior"  # directory of a prior trained on its tokens
    data: str = "emoji"                  # emoji, shapes, or a folder of images
    split: str = "held_out"              # held_out, or of emoji: combinations
    n: int = 100                         # at most this many captions
    judge_steps: int = 1500              # to train the judge
    timesteps: int = 4                   # steps of the flow sampler, as sample.py takes
    out: str = "out/generation.png"      # picture of the first eight
    device: str = "auto"                 # auto, cpu, cuda, mps


@dataclass
class Copies:
    """How many generated emoji are near copies of training ones, and how many show what their caption says?"""
    tokenizer: str = "assets/emoji64"    # directory of a tokenizer of emoji
    prior: str = "assets/emoji64/prior"  # directory of a prior trained on its tokens
    n: int = 100                         # images of each kind
    timesteps: int = 4                   # steps of the flow sampler, as sample.py takes
    device: str = "auto"                 # auto, cpu, cuda, mps


# ---------------------------------------------------------------------------------------------------------------
# A tokenizer: how much of an image do k tokens hold?


def draw(tokenizer, tokens, timesteps=25, guidance_scale=1.0, generator=None):
    """B tensors (1, k_i) -> images (B, 3, H, W), in parts of 64; each draws its noise from `generator`, in turn.

    Of clips B tensors (1, t, k) -> (B, 3, F, H, W).
    """
    generator = generator or torch.Generator().manual_seed(0)
    parts = [tokenizer.detokenize(tokens[i:i + 64], timesteps, guidance_scale, generator=generator)
             for i in range(0, len(tokens), 64)]
    return torch.cat(parts)                                                       # (B, 3, H, W)


@torch.no_grad()
def reconstruction(tokenizer, images, timesteps=25, guidance_scale=1.0):
    """Rebuild images (n, 3, H, W) from their first 1, 2, 4, ..., K tokens -> metrics, columns of a picture, its header.

    metrics: "ks"; "psnr", the mean in dB for each k; "psnr_vae", the best one could get; "distinct_tokens", the least,
    mean and largest number of distinct tokens at a position: near 1 is a collapsed position, n means that every image
    has its own.
    columns: (n, 3, H, W) each: the images, what the VAE alone makes of them, then each k.
    Of clips (n, 3, F, H, W) likewise, with k tokens a row.
    """
    tokens = tokenizer.tokenize(images)                                           # n x (1, K); of clips (1, t, K)
    ks = powers_of_two(tokenizer.config.registers)
    columns = [images, tokenizer.vae.decode(tokenizer.vae.latents(images))]       # (n, 3, H, W) each
    columns += [draw(tokenizer, [rows[..., :k] for rows in tokens], timesteps, guidance_scale) for k in ks]
    decibels = [psnr(column, images).mean().item() for column in columns[1:]]
    distinct = [len(position.unique()) for position in torch.cat(tokens).flatten(1).T]  # K; of clips t·K
    metrics = {"ks": ks, "psnr": decibels[1:], "psnr_vae": decibels[0],
               "distinct_tokens": [min(distinct), sum(distinct) / len(distinct), max(distinct)]}
    return metrics, columns, ["original", "VAE", *(f"k={k}" for k in ks)]


# ---------------------------------------------------------------------------------------------------------------
# A prior: how well does it foresee tokens, and what does it draw?


def by_position(losses):
    """Losses (b, T) -> sums and counts for `Means`, (5,) each on the device: of all positions, then of each group."""
    parts = [losses[:, start:end] for start, end in ((0, None), *GROUPS)]
    return torch.stack([part.sum() for part in parts]), torch.stack([torch.ones_like(part).sum() for part in parts])


def conditions(gpt, labels=None, captions=None):
    """Labels (b,) and b captions -> the arguments (labels, text, mask) of GPT's methods; None: `gpt` knows no such."""
    heard = captions is not None and gpt.text_encoder is not None
    text, mask = gpt.encode_text(captions) if heard else (None, None)             # (b, M, E), (b, M)
    return (labels.to(gpt.device) if labels is not None and gpt.config.classes else None), text, mask


@torch.no_grad()
def held_out_loss(gpt, tokens, labels, captions, precision="fp32"):
    """-log p in nats of tokens (n, T), given labels (n,) and n captions: the mean, and the mean in each of `GROUPS`."""
    means = Means(1 + len(GROUPS), Run(gpt.device))
    for start in range(0, len(tokens), 64):
        part = slice(start, start + 64)
        with autocast(gpt.device, precision):
            _, losses = gpt.loss(tokens[part].to(gpt.device), *conditions(gpt, labels[part], captions[part]))  # (b, T)
        means.add(*by_position(losses))
    loss, *groups = means.take()
    return {"held_out": loss, "held_out_by_position": groups}


@torch.no_grad()
def sample_grid(gpt, tokenizer, labels, captions, cfg_scale=1.0):
    """8 new images under 8 of n labels (n,) and captions -> columns of a picture, its header.

    A column, (8, 3, H, W), holds the images as drawn from their first 1, 2, 4, ... tokens; of clips (8, 3, F, H, W).
    """
    picked = [i * len(labels) // 8 for i in range(8)]
    asked = conditions(gpt, labels[picked], [captions[i] for i in picked])
    tokens = gpt.generate(*asked, cfg_scale=cfg_scale, n=8, generator=torch.Generator().manual_seed(0))  # (8, T)
    ks = [tokenizer.rows * k for k in powers_of_two(max(1, tokens.shape[1] // tokenizer.rows))]
    scale = tokenizer.recommended_guidance
    columns = [draw(tokenizer, list(tokens[:, :k].split(1)), guidance_scale=scale) for k in ks]  # (8, 3, H, W) each
    return columns, [f"k={k}" for k in ks]


def written(gpt, labels=None, captions=None):
    """n labels or captions -> the tokens that `gpt` writes, drawn as it recommends, with seed 0: n x (1, T)."""
    temperature = gpt.notes.get("sampling", {}).get("temperature", 1.0)
    tokens = gpt.generate(*conditions(gpt, labels, captions), cfg_scale=gpt.config.cfg_scale, temperature=temperature,
                          generator=torch.Generator().manual_seed(0))             # (n, T)
    return list(tokens.split(1))


# ---------------------------------------------------------------------------------------------------------------
# The judge


def factors(dataset, rows):
    """What is true of pictures `rows` of a data set: {name: (n,) int64}; the names are the questions of a judge."""
    if isinstance(dataset, Shapes):
        scenes = [dataset.factors(i) for i in rows]
        found = {"kind": [KINDS.index(x.shape.kind) for x in scenes],
                 "colour": [list(COLOURS).index(x.shape.colour) for x in scenes],
                 "background": [list(BACKGROUNDS).index(x.background) for x in scenes],
                 "place": [PLACES.index(x.place) for x in scenes]}
    else:
        found = {"class": [dataset.label(i) for i in rows]}
    if isinstance(dataset, Emoji):
        found |= {"thing": [dataset.members[i][1] for i in rows], "style": [dataset.style(i) for i in rows]}
    return {name: torch.tensor(x) for name, x in found.items()}


def small_network(*widths):
    """A convolutional network of these widths: images (B, 3, S, S) -> (B, 128)."""
    layers = []
    for i, (c_in, c_out) in enumerate(zip((3, *widths), widths)):
        layers += [nn.Conv2d(c_in, c_out, 3, 2 if i < 3 else 1, padding=1), nn.GroupNorm(8, c_out), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * widths[-1], 128))


def recoloured(images):
    """Images (B, 3, H, W) in other colours, drawn for each; white stays about white."""
    mix = torch.eye(3) + 0.15 * torch.randn(len(images), 3, 3)                    # (B, 3, 3)
    return torch.einsum("bij,bjhw->bihw", mix, images - 1) + 1 + 0.1 * torch.randn(len(images), 3, 1, 1)


class Judge:
    """Says what is in a picture by the training picture most like it, in the features of a network trained for that.

    `net`: images (B, 3, S, S) -> features (B, 128), of length 1. Of emoji it learns which two pictures of a batch show
    one thing in two styles (a contrastive loss, arXiv 2002.05709), and the category; of others, to name all that is
    known of them. It only sees training pictures, augmented. The style of an emoji is named by a network of its own:
    where a thing's style was held out, its nearest picture has another, and where styles do not matter, `net` forgets
    them. On the CPU, whatever the device.
    """

    def __init__(self, data, image_size, steps):
        """data: as for `open_data`. steps: of 128 pictures; 1,500 of emoji take 4 min 34 s of a core."""
        torch.manual_seed(0)
        self.net = small_network(32, 64, 128, 128)
        # used for emoji alone, which have 4 styles
        self.style_net = nn.Sequential(small_network(32, 64, 64), nn.SiLU(), nn.Linear(128, 4))
        plain = open_data(data, image_size, "train", augment=False)
        rows = range(min(len(plain), 10_000))
        self.answers = factors(plain, rows)
        self._learn(open_data(data, image_size, "train", augment=True), steps, np.random.default_rng(0))
        self.pictures = torch.stack([get_readable(plain, i, None)[0] for i in rows])  # (N, 3, S, S) uint8
        self.features = torch.cat([self.look(to_float(part)) for part in self.pictures.split(256)])  # (N, 128)

    def _learn(self, dataset, steps, rng):
        """Train on batches of 128 pictures of `dataset`, augmented ones; of emoji 64 pairs of one thing each."""
        drawn, known = {}, len(next(iter(self.answers.values())))  # drawn: of each thing its pictures
        for row, thing in enumerate(self.answers["thing"].tolist() if "thing" in self.answers else ()):
            drawn.setdefault(thing, []).append(row)
        several = [pictures for pictures in drawn.values() if len(pictures) > 1]
        heads = nn.ModuleDict({name: nn.Linear(128, 1 + int(x.max())) for name, x in self.answers.items()
                               if name not in ("thing", "style")})
        networks = nn.ModuleList([self.net, self.style_net, heads])
        optimizer = torch.optim.AdamW(networks.parameters(), weight_decay=0.05)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, 2e-3, 20, steps)
            if several:  # i and 64 + i are a pair
                pairs = [rng.choice(several[i], 2, replace=False) for i in rng.choice(len(several), 64, replace=False)]
                rows = np.array(pairs).T.flatten()                                # (64, 2) -> (128,)
            else:
                rows = rng.integers(known, size=128)                              # (128,)
            images = to_float(torch.stack([get_readable(dataset, int(i), rng)[0] for i in rows]))  # (128, 3, S, S)
            images = images + 0.05 * torch.randn_like(images)  # (128, 3, S, S): the last bits of a colour tell nothing
            with autocast(torch.device("cpu"), "auto"):
                features = F.normalize(self.net(recoloured(images) if several else images))  # (128, 128)
                # of features of length 1 alone, without the 8, all answers would stay about equally likely
                logits = {name: head(8 * features) for name, head in heads.items()}  # (128, answers) each
                if several:
                    logits["style"] = self.style_net(images)
                loss = sum(F.cross_entropy(x.float(), self.answers[name][rows]) for name, x in logits.items())
                if several:
                    likeness = (features @ features.T).float() / 0.07             # (128, 128): who is my pair, of all?
                    loss = loss + F.cross_entropy(likeness - 1e9 * torch.eye(128), torch.arange(128).roll(64))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def look(self, images):
        """images (B, 3, S, S) -> features (B, 128), of length 1, on the CPU."""
        return torch.cat([F.normalize(self.net(part.clamp(-1, 1).cpu())) for part in images.split(256)])

    def verdict(self, images, wanted):
        """images (n, 3, S, S), wanted as `factors` gives it -> {name: (n,) float}, 1 where right; features (n, 128).

        "nearest" is PSNR in dB between each image and the training picture most like it.
        """
        features = self.look(images)                                              # (n, 128)
        most_like = (features @ self.features.T).argmax(1)                        # (n,)
        said = {name: self.answers[name][most_like] for name in wanted}           # (n,) each
        if "style" in wanted:
            with torch.no_grad():
                said["style"] = self.style_net(images.clamp(-1, 1).cpu()).argmax(1)  # (n, 4) -> (n,)
        right = {name: (said[name] == x).float() for name, x in wanted.items()}
        return {**right, "nearest": psnr(images.cpu(), to_float(self.pictures[most_like]))}, features

    def fair(self, wanted):
        """Those of `wanted` that a training picture can answer (a held-out thing is in none).

        Prints how often one drawn at random would be right.
        """
        chance = {name: (self.answers[name] == x[:, None]).float().mean().item() for name, x in wanted.items()}
        print("chance of being right:", "  ".join(f"{name} {x:.2f}" for name, x in chance.items() if x))
        return {name: x for name, x in wanted.items() if chance[name]}


def frechet(features, others):
    """Fréchet distance between two sets of features (n, d) and (m, d), taken as Gaussians: 0 if they are alike.

    |mean - mean'|² + tr(S + S' - 2·(S·S')^½), as FID (arXiv 1706.08500), but in the judge's features: times 100 here.
    """
    (mean, S), (mean_2, S_2) = ((x.mean(0), x.T.cov()) for x in (features.double(), others.double()))
    values, vectors = torch.linalg.eigh(S)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                       # (d, d), S^½
    cross = torch.linalg.eigvalsh(root @ S_2 @ root).clamp(min=0).sqrt().sum()
    return 100 * max(0.0, ((mean - mean_2).square().sum() + S.trace() + S_2.trace() - 2 * cross).item())


def interval(values):
    """values (n,) -> their mean, and half the width of what 95 % of bootstrap samples (drawn again, n of n) have."""
    n, seeded = len(values), torch.Generator().manual_seed(0)
    means = values[torch.randint(n, (1000, n), generator=seeded)].mean(1)         # (1000,)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return values.mean().item(), (high - low) / 2


def report(name, images, originals, judge, wanted, real):
    """Print one line about images (n, 3, S, S): beside `originals`, unless None; and by the judge, unless None.

    wanted: what they should show, see `factors`. real: features of real images, (n, 128).
    """
    found = {} if originals is None else {"PSNR": psnr(images, originals).cpu(), "SSIM": ssim(images, originals).cpu()}
    if judge:
        verdict, features = judge.verdict(images, wanted)
        found |= verdict
    words = [f"{what} {'%.2f ±%.2f' % interval(values)}" for what, values in found.items()]
    if judge and len(images) > 1:  # one image has no covariance
        words.append(f"Fréchet {frechet(features, real):.1f}")
    print(f"{name:>14}:", "  ".join(words), flush=True)


# ---------------------------------------------------------------------------------------------------------------
# Copies, for priors of emoji


@torch.no_grad()
def copies(config):
    """Print how many generated emoji are near copies of training ones, and how many show what their caption says.

    Near: no further from a training emoji, in the VAE's latents, than the tokenizer's rebuilding (all tokens) of a
    training emoji typically is from its original. For comparison, the same for held-out emoji rebuilt from all their
    tokens and from one.
    """
    check_range(config, 1, 721, "n")  # there are 721 held-out emoji
    check_range(config, 1, 100_000, "timesteps")
    tokenizer, gpt = load(config.tokenizer, config.prior, pick_device(config.device))
    if gpt.text_encoder is None or not gpt.config.classes:
        raise UserError(f"{config.prior}: was not trained on both classes and captions, which it is asked for here")
    n, size = config.n, max(tokenizer.image_size)
    train, held_out = (Emoji(size, split, augment=False) for split in ("train", "held_out"))
    (images, _), (unseen, unseen_rows) = spread(train, len(train)), spread(held_out, n)  # (N, 3, S, S), (n, 3, S, S)
    images, unseen = images.to(gpt.device), unseen.to(gpt.device)

    def latents_of(images):
        parts = [tokenizer.vae.latents(part.clamp(-1, 1)) for part in images.split(64)]
        return torch.cat(parts).flatten(1)                                        # (n, C·h·w)

    def drawn(tokens):
        return latents_of(draw(tokenizer, tokens, config.timesteps, tokenizer.recommended_guidance))  # (n, C·h·w)

    known, some = latents_of(images), torch.arange(n) * len(images) // n          # (N, C·h·w), (n,)
    near = (drawn(tokenizer.tokenize(images[some])) - known[some]).norm(dim=1).median()
    rebuilt = tokenizer.tokenize(unseen)                                          # n x (1, K)
    for name, tokens in (("generated", written(gpt, labels=torch.arange(n) % gpt.config.classes)),
                         ("rebuilt held-out", rebuilt), ("the same from one token", [row[:, :1] for row in rebuilt])):
        distance = torch.cdist(drawn(tokens), known).min(1).values                # (n,), to the nearest training emoji
        least, middle, most = (x / near for x in (distance.min(), distance.median(), distance.max()))
        print(f"{name}: {(distance <= near).sum()} of {n} are near copies; nearest {least:.2f} to {most:.2f}, median "
              f"{middle:.2f} times the distance of a rebuilt training emoji", flush=True)
    for name, emoji, rows in (("training", train, some.tolist()), ("held-out", held_out, unseen_rows)):
        tokens = written(gpt, captions=[emoji.caption(i) for i in rows])
        nearest_one = torch.cdist(drawn(tokens), known).argmin(1).tolist()        # n: which emoji it looks like
        right = sum(train.label(j) == emoji.label(i) for i, j in zip(rows, nearest_one))
        same = sum(i == j for i, j in zip(rows, nearest_one)) if emoji is train else 0
        print(f"by {name} captions: nearest to the emoji asked for {same}, to one of its category {right} of {n}",
              flush=True)


# ---------------------------------------------------------------------------------------------------------------
# Command line


def open_tokenizer(path, device="cpu"):
    """A tokenizer for a prior: a `FlexTok`, or of clips the `ClipSequences` of a `VideoFlexTok`."""
    if is_video(path):
        return ClipSequences(VideoFlexTok.from_pretrained(path, device=device))
    return FlexTok.from_pretrained(path, device=device)


def load(tokenizer_path, prior_path, device, dtype=torch.float32):
    """Two directories -> tokenizer, its prior (this one in `dtype`). Raises `UserError` if they do not fit together."""
    tokenizer = open_tokenizer(tokenizer_path, device)
    gpt = GPT.from_pretrained(prior_path, device=device, dtype=dtype)
    K, V = tokenizer.config.registers, tokenizer.quantizer.vocab_size
    rows = tokenizer.rows  # of clips: with less than a token a row, none can be shown
    if gpt.config.vocab_size != V or not rows <= gpt.config.length <= K:
        raise UserError(f"{prior_path}: writes {gpt.config.length} tokens out of {gpt.config.vocab_size}, but "
                        f"{tokenizer_path} has {rows} to {K} out of {V}")
    if gpt.notes.get("tokenizer", tokenizer.fingerprint()) != tokenizer.fingerprint():  # released priors do not say
        raise UserError(f"{prior_path}: was trained on the tokens of another tokenizer than {tokenizer_path}")
    return tokenizer, gpt


def rebuild(config):
    """Print what images rebuilt from each number of tokens are worth, and write the picture of it."""
    check_range(config, 1, 100_000, "n", "timesteps")
    check_range(config, 0, 100_000, "judge_steps")
    check_range(config, 0, 1000, "guidance_scale")
    check_output(config.out, ".png")
    tokenizer = FlexTok.from_pretrained(config.tokenizer, device=pick_device(config.device))
    size = max(tokenizer.image_size)
    held_out = open_data(config.data, size, config.split, augment=False)
    images, rows = spread(held_out, config.n)                                     # (n, 3, S, S)
    images = images.to(pick_device(config.device))
    scale = config.guidance_scale or tokenizer.recommended_guidance
    metrics, columns, header = reconstruction(tokenizer, images, config.timesteps, scale)
    save_grid(config.out, list(zip(*columns))[:8], header)  # a row per image
    print(f"{len(images)} images, {config.split} of {config.data}; guidance {scale:g}; wrote {config.out}", flush=True)
    judge = Judge(config.data, size, config.judge_steps) if config.judge_steps else None
    wanted = real = None
    if judge:
        wanted, real = judge.fair(factors(held_out, rows)), judge.look(images)
        report("original", images, None, judge, wanted, real)
    for name, column in zip(header[1:], columns[1:]):
        report(name, column, images, judge, wanted, real)
    least, mean, most = metrics["distinct_tokens"]
    print(f"distinct tokens at a position: {least} to {most}, mean {mean:.1f}")


def centres(clips):
    """Clips (n, 3, F, S, S) of one shape on a plain ground -> where it is, x and y in sides of the frame: (n, F, 2)."""
    S, edges = clips.shape[-1], torch.cat([clips[..., 0, :], clips[..., -1, :]], -1)  # (n, 3, F, 2·S)
    ground = edges.median(-1).values[..., None, None]                             # (n, 3, F, 1, 1)
    weight = ((clips - ground).abs().sum(1) - 0.3).clamp(min=0)                   # (n, F, S, S), 0 on the ground
    at = (torch.arange(S, device=clips.device) + 0.5) / S                         # (S,)
    total = weight.sum((2, 3)).clamp(min=1e-6)                                    # (n, F)
    return torch.stack([(weight.sum(2) * at).sum(2) / total, (weight.sum(3) * at).sum(2) / total], -1)  # (n, F, 2)


def rebuild_clips(config):
    """Print what clips rebuilt from each number of tokens are worth."""
    check_range(config, 1, 500, "n", "timesteps")
    check_range(config, 1, 100_000, "judge_steps")
    tokenizer = VideoFlexTok.from_pretrained(config.tokenizer, device=pick_device(config.device))
    size, frames, later = tokenizer.frame_size[0], tokenizer.config.frames, 4
    held_out = open_clips("moving", size, "held_out", frames=frames)
    movies = {i: held_out.factors(i) for i in range(len(held_out))}
    rows = [i for i, movie in movies.items() if len(movie.movers) == 1  # and on its way straight on in the first frames
            and not held_out.place(movie.movers[0], later)[1]][:config.n]
    shapes, movers = [movies[i].movers[0].shape for i in rows], [movies[i].movers[0] for i in rows]
    clips = to_float(torch.stack([held_out.get(i) for i in rows])).to(pick_device(config.device))  # (n, 3, F, S, S)
    wanted = {"kind": torch.tensor([KINDS.index(x.kind) for x in shapes]),
              "colour": torch.tensor([list(COLOURS).index(x.colour) for x in shapes]),
              "background": torch.tensor([list(BACKGROUNDS).index(movies[i].background) for i in rows])}
    ways = torch.tensor([DIRECTIONS[x.direction] for x in movers])                # (n, 2)
    quick = torch.tensor([x.speed == "quickly" for x in movers])                  # (n,)
    between = later * sum(SPEEDS.values()) / 2  # slowly is less, quickly more
    scale = config.guidance_scale or tokenizer.recommended_guidance
    _, columns, names = reconstruction(tokenizer, clips, config.timesteps, scale)  # (n, 3, F, S, S) each
    judge = Judge("shapes", size, config.judge_steps)
    print(f"{len(rows)} clips of one shape; what it is in the first frame, how it moves in the first {later + 1}; "
          f"guidance {scale:g}")
    for name, column in zip(names, columns):
        verdict, _ = judge.verdict(column[:, :, 0], wanted)
        at = centres(column.clamp(-1, 1).cpu())                                   # (n, F, 2)
        moved = at[:, later] - at[:, 0]                                           # (n, 2)
        straight = moved * (moved.abs() == moved.abs().amax(1, keepdim=True))     # (n, 2), along the longer axis
        found = {} if name == "original" else {"PSNR": psnr(column, clips).cpu()}
        found |= {what: verdict[what] for what in wanted}
        found |= {"direction": (straight.sign() == ways).all(1).float(),
                  "speed": ((straight.abs().sum(1) > between) == quick).float()}
        words = [f"{what} {'%.2f ±%.2f' % interval(values)}" for what, values in found.items()]
        print(f"{name:>14}:", "  ".join(words), flush=True)


def generate(config):
    """Print what images written for held-out captions are worth, beside real ones and rebuilt ones."""
    check_range(config, 1, 100_000, "n", "judge_steps", "timesteps")
    check_output(config.out, ".png")
    tokenizer, gpt = load(config.tokenizer, config.prior, pick_device(config.device))
    if gpt.text_encoder is None:
        raise UserError(f"{config.prior}: was not trained on captions")
    size = max(tokenizer.image_size)
    held_out = open_data(config.data, size, config.split, augment=False)
    images, rows = spread(held_out, config.n)                                     # (n, 3, S, S)
    images = images.to(gpt.device)
    print(f"{len(images)} captions, {config.split} of {config.data}; first a judge is trained", flush=True)
    judge = Judge(config.data, size, config.judge_steps)
    wanted, real = judge.fair(factors(held_out, rows)), judge.look(images)
    report("real", images, None, judge, wanted, real)
    rebuilt, new = tokenizer.tokenize(images), written(gpt, captions=[held_out.caption(i) for i in rows])
    columns, ks, scale = [images], powers_of_two(gpt.config.length), tokenizer.recommended_guidance
    for name, tokens in (("rebuilt", rebuilt), ("new", new)):
        for k in ks:
            columns.append(draw(tokenizer, [row[:, :k] for row in tokens], config.timesteps, scale))  # (n, 3, S, S)
            report(f"{name} k={k}", columns[-1], None, judge, wanted, real)
    save_grid(config.out, list(zip(images, *columns[-len(ks):]))[:8], ["real", *(f"k={k}" for k in ks)])
    print(f"wrote {config.out}")


COMMANDS = {"reconstruction": (rebuild, Reconstruction), "generation": (generate, Generation),
            "copies": (copies, Copies), "clips": (rebuild_clips, Clips)}


def main(argv):
    if argv[:1] in ([], ["-h"], ["--help"]):
        return print(__doc__.strip())
    if argv[0] not in COMMANDS:
        raise UserError(f"{argv[0][:80]}: expected {', '.join(COMMANDS)}{nearest(argv[0], COMMANDS)}")
    run, Config = COMMANDS[argv[0]]
    run(from_cli(Config, argv=argv[1:], positional="tokenizer prior"))


if __name__ == "__main__":
    command(main, sys.argv[1:])
