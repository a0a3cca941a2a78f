"""
Every number about quality: how well tokens rebuild an image, how well a prior foresees them, what its images are worth.

    images --tokenize--> tokens --first k--> detokenize --> PSNR in dB, for k = 1, 2, 4, ..., K    (reconstruction)
    held-out tokens, conditions --prior--> -log p(token), by position                              (held_out_loss)
    class, caption --prior--> images --a classifier of real ones--> share of right answers         (judge)
                              images --nearest training image--> share of near copies              (copies)

The paper (FlexTok, arXiv 2502.13967, section 4) reports FID and CLIP scores of 50,000 images, which need networks that
are not here; these measures need none. The trainers call the first two at every evaluation.

    python evaluate.py reconstruction                # shipped weights, 45 s on a CPU thread: 12.7 dB at k=1, 19.0 at 32
    python evaluate.py judge out/cpu out/cpu-prior   # minutes, after train_tokenizer.py and train_ar.py --preset cpu
    python evaluate.py copies                        # minutes, shipped weights: 51 of 100 new emoji are near copies
Next: train_tokenizer.py
"""
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ar import GPT
from common import (Means, Run, UserError, autocast, check_output, check_range, command, from_cli, learning_rate,
                    nearest, pick_device)
from data import COLOURS, KINDS, Emoji, Shapes, open_data, spread
from images import psnr, save_grid, to_float
from model import FlexTok, powers_of_two

GROUPS = ((0, 1), (1, 8), (8, 64), (64, None))  # positions whose losses are reported apart: where are the bits?


@dataclass
class Reconstruction:
    """PSNR of held-out images rebuilt from 1, 2, 4, ... tokens."""
    tokenizer: str = "assets/emoji64"    # directory of a tokenizer
    data: str = "emoji"                  # emoji, shapes, or a folder of images, of which the held-out tenth is used
    n: int = 64                          # at most this many images
    timesteps: int = 25                  # steps of the flow sampler
    guidance_scale: float = 0.0          # 1.0: none; 0.0: what the checkpoint recommends
    out: str = "out/reconstruction.png"  # picture of the first eight
    device: str = "auto"                 # auto, cpu, cuda, mps


@dataclass
class Judge:
    """Does a prior of drawn shapes draw what it was asked for? A classifier that has only seen real shapes decides."""
    tokenizer: str = "out/cpu"           # directory of a tokenizer of shapes
    prior: str = "out/cpu-prior"         # directory of a prior trained on its tokens
    n: int = 256                         # scenes
    steps: int = 1200                    # to train the classifier
    device: str = "auto"                 # auto, cpu, cuda, mps


@dataclass
class Copies:
    """How many generated emoji are near copies of training ones, and how many show what their caption says?"""
    tokenizer: str = "assets/emoji64"    # directory of a tokenizer of emoji
    prior: str = "assets/emoji64/prior"  # directory of a prior trained on its tokens
    n: int = 100                         # images of each kind
    device: str = "auto"                 # auto, cpu, cuda, mps


# ---------------------------------------------------------------------------------------------------------------
# A tokenizer: how much of an image do k tokens hold?


def draw(tokenizer, tokens, timesteps=25, guidance_scale=1.0, generator=None):
    """B tensors (1, k_i) -> images (B, 3, H, W), in parts of 64; each draws its noise from `generator`, in turn."""
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
    """
    tokens = tokenizer.tokenize(images)                                           # n x (1, K)
    ks = powers_of_two(tokenizer.config.registers)
    columns = [images, tokenizer.vae.decode(tokenizer.vae.latents(images))]       # (n, 3, H, W) each
    columns += [draw(tokenizer, [row[:, :k] for row in tokens], timesteps, guidance_scale) for k in ks]
    decibels = [psnr(column, images).mean().item() for column in columns[1:]]
    distinct = [len(position.unique()) for position in torch.cat(tokens).T]       # K
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

    A column, (8, 3, H, W), holds the images as drawn from their first 1, 2, 4, ... tokens.
    """
    picked = [i * len(labels) // 8 for i in range(8)]
    asked = conditions(gpt, labels[picked], [captions[i] for i in picked])
    tokens = gpt.generate(*asked, cfg_scale=cfg_scale, n=8, generator=torch.Generator().manual_seed(0))  # (8, T)
    ks, scale = powers_of_two(tokens.shape[1]), tokenizer.recommended_guidance
    columns = [draw(tokenizer, list(tokens[:, :k].split(1)), guidance_scale=scale) for k in ks]  # (8, 3, H, W) each
    return columns, [f"k={k}" for k in ks]


def written(gpt, labels=None, captions=None):
    """n labels or captions -> the tokens that `gpt` writes, drawn as it recommends, with seed 0: n x (1, T)."""
    temperature = gpt.notes.get("sampling", {}).get("temperature", 1.0)
    tokens = gpt.generate(*conditions(gpt, labels, captions), cfg_scale=gpt.config.cfg_scale, temperature=temperature,
                          generator=torch.Generator().manual_seed(0))             # (n, T)
    return list(tokens.split(1))


# ---------------------------------------------------------------------------------------------------------------
# The judge, for priors of drawn shapes


def train_classifier(steps, image_size=32, seed=0):
    """A small convolutional network: images (B, 3, S, S) -> logits (B, 16), 8 for the kind, 8 for the colour.

    It learns from endless drawn scenes, so that it cannot learn any by heart.
    """
    torch.manual_seed(seed)
    layers = []
    for c_in, c_out, stride in ((3, 32, 1), (32, 64, 2), (64, 128, 2), (128, 128, 2)):
        layers += [nn.Conv2d(c_in, c_out, 3, stride, padding=1), nn.GroupNorm(8, c_out), nn.SiLU()]
    # the largest response anywhere: a star is a star wherever it is
    net = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(128, 16))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    scenes = Shapes(image_size, seed=seed + 1)  # other scenes than the tokenizer's and the prior's
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 2e-3, 20, steps)
        rows = range(64 * step, 64 * step + 64)
        images = to_float(torch.stack([scenes.get(i) for i in rows]))             # (64, 3, S, S)
        images = images + 0.05 * torch.randn_like(images)  # so that it does not hang on single levels
        pairs = zip(net(images).split(8, 1), answers(scenes, rows))               # (64, 8) and (64,), twice
        loss = sum(F.cross_entropy(logits, wanted) for logits, wanted in pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def answers(scenes, rows):
    """The true kinds and colours of scenes: two int64 tensors (n,)."""
    shapes = [scenes.factors(i).shape for i in rows]
    kinds, colours = [KINDS.index(s.kind) for s in shapes], [list(COLOURS).index(s.colour) for s in shapes]
    return torch.tensor(kinds), torch.tensor(colours)


@torch.no_grad()
def accuracy(net, images, kinds, colours):
    """Shares of images (n, 3, S, S) whose kind, colour, and both are as wanted."""
    logits = net(images.clamp(-1, 1).cpu()).split(8, 1)                           # (n, 8), (n, 8)
    kind, colour = ((x.argmax(1) == wanted).float() for x, wanted in zip(logits, (kinds, colours)))
    return kind.mean().item(), colour.mean().item(), (kind * colour).mean().item()


def judge(config):
    """Print accuracies on real, rebuilt and generated images, for each number of tokens; chance is 1/8."""
    check_range(config, 1, 100_000, "n", "steps")
    tokenizer, gpt = load(config.tokenizer, config.prior, pick_device(config.device))
    size = max(tokenizer.image_size)
    scenes, rows = Shapes(size, "held_out"), range(config.n)
    kinds, colours = answers(scenes, rows)
    images = to_float(torch.stack([scenes.get(i) for i in rows])).to(gpt.device)  # (n, 3, S, S)
    net = train_classifier(config.steps, size)
    def score(name, images):
        return f"{name}: kind %.3f colour %.3f both %.3f" % accuracy(net, images, kinds, colours)

    print(score("real images", images), f" (n = {config.n})")
    print(score("rebuilt by the VAE", tokenizer.vae.decode(tokenizer.vae.latents(images))))
    sources = {"rebuilt": tokenizer.tokenize(images)}                             # n x (1, K)
    if gpt.config.classes:  # the class is the kind: no colour was asked for
        sources["by class"] = written(gpt, labels=kinds)
    if gpt.text_encoder is not None:
        sources["by caption"] = written(gpt, captions=[scenes.caption(i) for i in rows])
    for k in powers_of_two(tokenizer.config.registers):
        drawn = [(name, draw(tokenizer, [row[:, :k] for row in tokens], 25, tokenizer.recommended_guidance))
                 for name, tokens in sources.items()]                             # (n, 3, S, S) each
        print(f"k = {k:3d}:", "; ".join(score(name, images) for name, images in drawn), flush=True)


# ---------------------------------------------------------------------------------------------------------------
# Copies, for priors of emoji


@torch.no_grad()
def copies(config):
    """Print how many generated emoji are near copies of training ones, and how many show what their caption says.

    Near: no further from a training emoji, in the VAE's latents, than the tokenizer's rebuilding (all tokens) of a
    training emoji typically is from its original. For comparison, the same for held-out emoji rebuilt from all their
    tokens and from one; and how many of these have a first token that a training emoji has too, or a view of one.
    """
    check_range(config, 1, 191, "n")  # there are 191 held-out emoji
    tokenizer, gpt = load(config.tokenizer, config.prior, pick_device(config.device))
    n, size = config.n, max(tokenizer.image_size)
    # the shipped prior knows Noto's emoji and no names of styles
    train, held_out = (Emoji(size, split, augment=False, styles=("noto",)) for split in ("train", "held_out"))
    images, unseen = (spread(emoji, len(emoji)).to(gpt.device) for emoji in (train, held_out))  # (n, 3, S, S)

    def latents_of(images):
        parts = [tokenizer.vae.latents(part.clamp(-1, 1)) for part in images.split(64)]
        return torch.cat(parts).flatten(1)                                        # (n, C·h·w)

    def drawn(tokens):
        return latents_of(draw(tokenizer, tokens, 25, tokenizer.recommended_guidance))  # (n, C·h·w)

    known, some = latents_of(images), torch.arange(n) * len(images) // n          # (N, C·h·w), (n,)
    near = (drawn(tokenizer.tokenize(images[some])) - known[some]).norm(dim=1).median()
    rebuilt = tokenizer.tokenize(unseen[:n])                                      # n x (1, K)
    for name, tokens in (("generated", written(gpt, labels=torch.arange(n) % gpt.config.classes)),
                         ("rebuilt held-out", rebuilt), ("the same from one token", [row[:, :1] for row in rebuilt])):
        distance = torch.cdist(drawn(tokens), known).min(1).values                # (n,), to the nearest training emoji
        least, middle, most = (x / near for x in (distance.min(), distance.median(), distance.max()))
        print(f"{name}: {(distance <= near).sum()} of {n} are near copies; nearest {least:.2f} to {most:.2f}, median "
              f"{middle:.2f} times the distance of a rebuilt training emoji", flush=True)
    first_tokens(tokenizer, images, unseen)
    for name, emoji, rows in (("training", train, some.tolist()), ("held-out", held_out, range(n))):
        tokens = written(gpt, captions=[emoji.thing(i)["caption"] for i in rows])
        nearest_one = torch.cdist(drawn(tokens), known).argmin(1).tolist()        # n: which emoji it looks like
        right = sum(train.label(j) == emoji.label(i) for i, j in zip(rows, nearest_one))
        same = sum(i == j for i, j in zip(rows, nearest_one)) if emoji is train else 0
        print(f"by {name} captions: nearest to the emoji asked for {same}, to one of its category {right} of {n}",
              flush=True)


def first_tokens(tokenizer, images, unseen):
    """Print how many of the images `unseen` have a first token of a training image, or of one of 20 views of one."""
    views, rng = Emoji(max(tokenizer.image_size), "train", styles=("noto",)), np.random.default_rng(0)
    wanted, used = torch.cat(tokenizer.tokenize(unseen, k=1)), []                 # (191, 1)
    for count in range(1, 21):
        if count > 1:  # the first view is the image as it is
            images = to_float(torch.stack([views.get(i, rng) for i in range(len(views))])).to(wanted.device)
        used += tokenizer.tokenize(images, k=1)                                   # count·n x (1, 1)
        if count in (1, 20):
            seen = torch.cat(used).unique()
            print(f"first tokens of {count} views of each training emoji: {len(seen)}; "
                  f"{torch.isin(wanted, seen).sum()} of {len(unseen)} held-out emoji have one of them", flush=True)


# ---------------------------------------------------------------------------------------------------------------
# Command line


def load(tokenizer_path, prior_path, device, dtype=torch.float32):
    """Two directories -> tokenizer, its prior (this one in `dtype`). Raises `UserError` if they do not fit together."""
    tokenizer = FlexTok.from_pretrained(tokenizer_path, device=device)
    gpt = GPT.from_pretrained(prior_path, device=device, dtype=dtype)
    K, V = tokenizer.config.registers, tokenizer.quantizer.vocab_size
    if gpt.config.vocab_size != V or gpt.config.length > K:
        raise UserError(f"{prior_path}: writes {gpt.config.length} tokens out of {gpt.config.vocab_size}, but "
                        f"{tokenizer_path} has {K} out of {V}")
    if gpt.notes.get("tokenizer", tokenizer.fingerprint()) != tokenizer.fingerprint():  # released priors do not say
        raise UserError(f"{prior_path}: was trained on the tokens of another tokenizer than {tokenizer_path}")
    return tokenizer, gpt


def rebuild(config):
    """Print PSNR for each number of tokens, and write the picture of it."""
    check_range(config, 1, 100_000, "n", "timesteps")
    check_range(config, 0, 1000, "guidance_scale")
    check_output(config.out)
    tokenizer = FlexTok.from_pretrained(config.tokenizer, device=pick_device(config.device))
    held_out = open_data(config.data, max(tokenizer.image_size), "held_out", augment=False)
    images = spread(held_out, config.n).to(pick_device(config.device))            # (n, 3, S, S)
    scale = config.guidance_scale or tokenizer.recommended_guidance
    metrics, columns, header = reconstruction(tokenizer, images, config.timesteps, scale)
    print(f"{len(images)} held-out images, guidance {scale:g}; VAE alone: {metrics['psnr_vae']:.2f} dB")
    for k, decibels in zip(metrics["ks"], metrics["psnr"]):
        print(f"k = {k:3d}: {decibels:.2f} dB")
    least, mean, most = metrics["distinct_tokens"]
    print(f"distinct tokens at a position: {least} to {most}, mean {mean:.1f}")
    save_grid(config.out, list(zip(*columns))[:8], header)  # a row per image
    print(f"wrote {config.out}")


COMMANDS = {"reconstruction": (rebuild, Reconstruction), "judge": (judge, Judge), "copies": (copies, Copies)}


def main(argv):
    if argv[:1] in ([], ["-h"], ["--help"]):
        return print(__doc__.strip())
    if argv[0] not in COMMANDS:
        raise UserError(f"{argv[0][:80]}: expected {', '.join(COMMANDS)}{nearest(argv[0], COMMANDS)}")
    run, Config = COMMANDS[argv[0]]
    run(from_cli(Config, argv=argv[1:], positional="tokenizer prior"))


if __name__ == "__main__":
    command(main, sys.argv[1:])
