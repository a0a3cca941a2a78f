"""
Use trained models from the command line: rebuild images from few tokens, generate new ones, write tokens to a file and back.

    python sample.py                                            # out/reconstruct.png: held-out emoji; out/generate.png: new ones
    python sample.py generate --text "red heart" --n 4          # a sentence; or --label food-and-drink, or --label 3
    python sample.py generate --label 5 --stream                # out/generate.webp: the image sharpens as tokens arrive
    python sample.py reconstruct a.jpg photos/ --n 4            # your images: any size, the centre is cut out
    python sample.py encode a.jpg b.png --k 16 --out tokens.json      # or tokens.npy
    python sample.py decode tokens.json --ks 1 4 16 --out out/decoded.png

With no --checkpoint the shipped weights are used: 64-pixel emoji, so that other images come out as what emoji can say of
them. Takes seconds on a CPU.                                                     Next: train_tokenizer.py, to train your own
"""
import difflib
import math
import os
import re
import sys
from dataclasses import dataclass

import numpy as np
import torch

from ar import GPT
from common import (UserError, autocast, check_range, command, from_cli, has_native_bf16, pick_device, read_json,
                    replacing, shown, write_json)
from images import draw_grid, fit, psnr, read_image, save_animation, save_grid, to_image, to_tensor
from data import Emoji, list_files, report_skipped, spread
from model import FlexTok, powers_of_two

SHIPPED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "emoji64")


@dataclass
class Reconstruct:
    """Rebuild images from 1, 2, 4, ... tokens. Commands: reconstruct (the default), generate, encode, decode; each has its --help."""
    paths: tuple = ()                # images and folders; none: held-out emoji
    out: str = "out/reconstruct.png"  # the picture to write
    n: int = 8                       # at most this many images
    ks: tuple = (0,)                 # numbers of tokens; 0: 1, 2, 4, ..., all
    timesteps: int = 25              # steps of the flow sampler
    guidance_scale: float = 0.0      # 1.0: none; 0.0: what the checkpoint recommends
    seed: int = 0                    # of the sampler's noise
    checkpoint: str = SHIPPED        # directory of a tokenizer
    device: str = "auto"             # auto, cpu, cuda, mps
    precision: str = "auto"          # of the flow decoder: fp32 or bf16; auto: bf16 on CUDA from Ampere on, else fp32


@dataclass
class Generate:
    """Write new images with the prior: from a class, from a sentence, or one of each class."""
    out: str = "out/generate.png"    # the picture to write; with --stream a .webp or .gif
    label: str = ""                  # class to draw, its number or its name
    text: tuple = ("",)              # sentences to draw, in turn
    n: int = 10                      # how many images
    k: int = 0                       # tokens to write; 0: all
    cfg_scale: float = 0.0           # guidance of the prior; 1.0: none; 0.0: what the prior recommends
    temperature: float = -1.0        # below 1.0: more typical, less varied; 0.0: the likeliest token; -1.0: what the prior recommends
    top_k: int = 0                   # choose among this many likeliest tokens; 0: all
    top_p: float = 0.0               # choose among the likeliest that together reach this probability; 0.0: all
    timesteps: int = 25              # steps of the flow sampler
    guidance_scale: float = 0.0      # guidance of the decoder; 1.0: none; 0.0: what the checkpoint recommends
    seed: int = 0                    # of the tokens and of the sampler's noise
    stream: bool = False             # write an animation, one frame per token
    checkpoint: str = SHIPPED        # directory of a tokenizer
    prior: str = os.path.join(SHIPPED, "prior")  # directory of a prior trained on its tokens
    device: str = "auto"             # auto, cpu, cuda, mps
    precision: str = "auto"          # of the flow decoder and the prior: fp32 or bf16; auto: bf16 on CUDA from Ampere on, else fp32


@dataclass
class Encode:
    """Write the tokens of images to a .json or .npy file."""
    paths: tuple = ()                # images and folders
    out: str = "out/tokens.json"     # .json (with the names), or .npy (int64, one row an image)
    k: int = 0                       # tokens per image; 0: all
    checkpoint: str = SHIPPED        # directory of a tokenizer
    device: str = "auto"             # auto, cpu, cuda, mps


@dataclass
class Decode:
    """Turn a file of tokens back into images."""
    paths: tuple = ()                # one .json or .npy file, as written by encode
    out: str = "out/decoded.png"     # a picture with a row per image and a column per k; or a folder/, for single images
    ks: tuple = (0,)                 # keep only this many tokens; 0: all there are
    timesteps: int = 25              # steps of the flow sampler
    guidance_scale: float = 0.0      # 1.0: none; 0.0: what the checkpoint recommends
    seed: int = 0                    # of the sampler's noise
    checkpoint: str = SHIPPED        # directory of a tokenizer
    device: str = "auto"             # auto, cpu, cuda, mps
    precision: str = "auto"          # of the flow decoder: fp32 or bf16; auto: bf16 on CUDA from Ampere on, else fp32


def reconstruct(config):
    """Write the grid: original, then the image rebuilt from each number of tokens; print the mean PSNR of each column."""
    check_sampling(config)
    if not config.out.endswith(".png"):
        raise UserError(f"--out {config.out}: expected a name that ends in .png")
    check_range(config, 1, math.inf, "n")
    tokenizer = load(config)
    ks = [tokenizer.config.registers if k == 0 else k for k in config.ks]
    if config.ks == (0,):
        ks = powers_of_two(tokenizer.config.registers)
    check_ks(ks, tokenizer)
    images = load_images(config.paths, tokenizer, config.n)[1] if config.paths else held_out_emoji(tokenizer, config.n)
    images = images.to(pick_device(config.device))                                # (B, 3, H, W)
    tokens = tokenizer.tokenize(images, k=max(ks))                                # B x (1, k)
    columns = [images]
    for k in ks:
        columns.append(sample(tokenizer, [row[:, :k] for row in tokens], config))
        print(f"k = {k:3d}: {psnr(columns[-1], images).mean():.2f} dB")
    write_rows(config.out, columns, ["original", *(f"k={k}" for k in ks)])


def generate(config):
    """Write the grid: a row per new image, a column for its first 1, 2, 4, ... tokens; or, with --stream, the animation."""
    check_sampling(config)
    out = os.path.splitext(config.out)[0] + ".webp" if config.stream and config.out == Generate.out else config.out
    endings = (".webp", ".gif") if config.stream else (".png",)
    if not out.endswith(endings):
        raise UserError(f"--out {out}: expected a name that ends in {' or '.join(endings)}")
    for name, value, least in (("n", config.n, 1), ("temperature", config.temperature, -1), ("top_k", config.top_k, 0)):
        if not least <= value < math.inf or -1 < value < 0:
            raise UserError(f"--{name} {value}: expected at least {least}")
    if not math.isfinite(config.cfg_scale):
        raise UserError(f"--cfg_scale {config.cfg_scale}: expected a number")
    if not 0 <= config.top_p <= 1:
        raise UserError(f"--top_p {config.top_p}: expected 0 to 1")
    tokenizer = load(config)
    gpt = GPT.from_pretrained(config.prior, device=pick_device(config.device), dtype=torch.bfloat16 if in_bf16(config) else torch.float32)
    made_by = gpt.notes  # empty for released priors, which do not say by whose tokens
    if gpt.config.vocab_size != tokenizer.fsq.vocab_size or gpt.config.length > tokenizer.config.registers:
        raise UserError(f"{config.prior}: writes {gpt.config.length} tokens out of {gpt.config.vocab_size}, but {config.checkpoint} has "
                        f"{tokenizer.config.registers} out of {tokenizer.fsq.vocab_size}")
    if made_by.get("tokenizer", tokenizer.fingerprint()) != tokenizer.fingerprint():
        raise UserError(f"{config.prior}: was trained on the tokens of another tokenizer than {config.checkpoint}")
    k = config.k or gpt.config.length
    if not 1 <= k <= gpt.config.length:
        raise UserError(f"--k {k}: this prior writes 1 to {gpt.config.length} tokens")
    temperature = made_by.get("sampling", {}).get("temperature", 1.0) if config.temperature == -1 else config.temperature
    labels, captions = conditions(config, gpt, made_by.get("classes", []))
    text, mask = gpt.encode_text(captions) if captions else (None, None)
    writing = gpt.generate(labels, text, mask, k=k, cfg_scale=config.cfg_scale or gpt.config.cfg_scale, temperature=temperature,
                           top_k=config.top_k, top_p=config.top_p, generator=torch.Generator().manual_seed(config.seed), n=config.n,
                           stream=True)
    if config.stream:
        frames = [draw_grid(sample(tokenizer, list(tokens), config).split(4)) for tokens in writing]
        save_animation(out, frames, milliseconds=max(60, 6000 // k))
        return print(f"wrote {out}")
    tokens = list(writing)[-1]                                                    # (n, k)
    ks = powers_of_two(k)
    write_rows(out, [sample(tokenizer, list(tokens[:, :k]), config) for k in ks], [f"k={k}" for k in ks])


def conditions(config, gpt, classes):
    """--label and --text -> labels (n,) or None, n captions or None. With neither, the classes take turns, if there are any."""
    with_text = any(config.text)
    if with_text and not gpt.config.text_width:
        raise UserError(f"--text: {config.prior} was not trained on captions")
    if gpt.config.text_width and gpt.text_encoder is None:
        raise UserError(f"{config.prior}: needs the states of a text encoder that it does not hold; use GPT.generate")
    if config.label and not gpt.config.classes:
        raise UserError(f"--label {config.label}: {config.prior} was not trained on classes")
    captions = [config.text[i % len(config.text)] for i in range(config.n)] if with_text else None
    device, classes_known = pick_device(config.device), gpt.config.classes
    if not config.label:
        return None if captions or not classes_known else torch.arange(config.n, device=device) % classes_known, captions  # (n,)
    number = classes.index(config.label) if config.label in classes else int(config.label) if config.label.isdecimal() else -1
    if not 0 <= number < classes_known:
        near = difflib.get_close_matches(config.label, classes, 5, 0) if classes else []
        raise UserError(f"--label {config.label}: expected 0 to {classes_known - 1}" + (f", or a name such as {', '.join(near)}" if near else ""))
    return torch.full((config.n,), number, device=device), captions               # (n,)


def encode(config):
    """Images -> a file of tokens."""
    if not config.paths:
        raise UserError("encode: name at least one image or folder")
    if not config.out.endswith((".json", ".npy")):
        raise UserError(f"--out {config.out}: expected a name that ends in .json or .npy")
    tokenizer = load(config)
    k = config.k or tokenizer.config.registers
    check_ks([k], tokenizer)
    names, images = load_images(config.paths, tokenizer)
    device = pick_device(config.device)
    tokens = torch.cat([row for part in images.split(32) for row in tokenizer.tokenize(part.to(device), k=k)]).cpu()  # (B, k)
    if config.out.endswith(".npy"):
        with replacing(config.out) as temporary, open(temporary, "wb") as file:
            np.save(file, tokens.numpy())
    else:
        names = [os.fsencode(name).decode("utf-8", "replace") for name in names]  # a file's name may be any bytes
        write_json(config.out, {"vocab_size": tokenizer.fsq.vocab_size, "registers": tokenizer.config.registers,
                                "images": [{"name": name, "tokens": row} for name, row in zip(names, tokens.tolist())]})
    print(f"wrote {len(tokens)} x {k} tokens to {config.out}")


def decode(config):
    """A file of tokens -> images."""
    if len(config.paths) != 1:
        raise UserError(f"decode: name one .json or .npy file of tokens, not {len(config.paths)}")
    check_sampling(config)
    if os.path.splitext(config.out)[1] not in ("", ".png"):
        raise UserError(f"--out {config.out}: expected a name that ends in .png, or a folder")
    tokenizer = load(config)
    names, tokens = read_tokens(config.paths[0], tokenizer)                       # B names, B x (k_i,)
    shortest = min(len(row) for row in tokens)
    for k in config.ks:
        if k and not 1 <= k <= shortest:
            raise UserError(f"--ks {k}: {config.paths[0]} has {shortest} tokens per image, so expected 1 to {shortest}")
    columns = [sample(tokenizer, [row[:k] if k else row for row in tokens], config) for k in config.ks]
    if config.out.endswith(".png"):
        return write_rows(config.out, columns, [f"k={k}" if k else "all tokens" for k in config.ks])
    for k, column in zip(config.ks, columns):
        for i, (name, image) in enumerate(zip(names, column)):  # the number keeps cats/1.png and dogs/1.png apart
            stem = re.sub(r"[^\w.-]", "_", os.path.splitext(os.path.basename(name))[0])[:100]  # a name in a file may be anything
            save_image(os.path.join(config.out, f"{i:03d}_{stem}" + (f"_k{k:03d}.png" if k else ".png")), image)
    print(f"wrote {len(names) * len(columns)} images to {config.out}")


def load(config):
    """The checkpoint's tokenizer, on the device asked for, in float32."""
    return FlexTok.from_pretrained(config.checkpoint, device=pick_device(config.device))


def in_bf16(config):
    """Whether to sample in bfloat16. On a CPU only if asked: the README's pictures and numbers are of float32."""
    device = pick_device(config.device)
    autocast(device, config.precision)  # refuses other words
    return config.precision == "bf16" or config.precision == "auto" and device.type == "cuda" and has_native_bf16(device)


def sample(tokenizer, tokens, config):
    """List of tokens -> images (B, 3, H, W) by the sampler settings of the command line."""
    scale, half = config.guidance_scale or tokenizer.recommended_guidance, in_bf16(config)
    if half:
        # The decoder runs twice a step: with its weights in bfloat16, none of them is cast there again. Encoder and VAE run once
        # and stay float32, so that tokens are those of `encode`; so does the table of positions, which is no parameter.
        for p in tokenizer.decoder.parameters():
            p.data = p.data.bfloat16()
    generator, images = torch.Generator().manual_seed(config.seed), []  # each image draws its own noise from it, in turn
    with autocast(pick_device(config.device), "bf16" if half else "fp32"):
        for i in range(0, len(tokens), 64):  # a file may hold any number
            images.append(tokenizer.detokenize(tokens[i:i + 64], config.timesteps, scale, generator=generator).float())
    return torch.cat(images)                                                      # (B, 3, H, W)


def check_sampling(config):
    check_range(config, 1, math.inf, "timesteps")
    check_range(config, 0, 1000, "guidance_scale")
    check_range(config, 0, 2**63 - 1, "seed")
    in_bf16(config)


def check_ks(ks, tokenizer):
    K = tokenizer.config.registers
    for k in ks:
        if not 1 <= k <= K:
            raise UserError(f"k = {k}: this tokenizer has 1 to {K} tokens per image")


def load_images(paths, tokenizer, n=None):
    """Images and folders -> names, images (B, 3, H, W). A bad file named directly is an error; inside a folder it is skipped."""
    names, images = [], []
    for path in paths:
        inside = [os.path.join(path, name) for name in list_files(path)] if os.path.isdir(path) else [path]
        found, skipped = len(images), []
        for name in inside:
            if n is not None and len(images) == n:
                break
            try:
                images.append(to_tensor(fit(read_image(name), tokenizer.image_size)))
                names.append(name)
            except UserError as error:
                if inside == [path]:
                    raise
                skipped.append(str(error))
        report_skipped(path, skipped)
        if len(images) == found and len(images) != n:
            raise UserError(f"{path}: no readable image in this folder")
    return names, torch.stack(images)                                             # (B, 3, H, W)


def held_out_emoji(tokenizer, n):
    """n embedded emoji that the shipped weights were not trained on, spread over the categories: (n, 3, H, W)."""
    height, width = tokenizer.image_size
    if height != width:
        raise UserError(f"reconstruct: the built-in emoji are square, this tokenizer was trained on {height} x {width} pixels; name some images")
    return spread(Emoji(max(tokenizer.image_size), "held_out", augment=False), n)


def read_tokens(path, tokenizer):
    """A .json or .npy file -> names, list of int64 tensors (k_i,). Raises UserError naming the file and what is wrong in it."""
    if path.endswith(".npy"):
        try:
            # No pickle: it would execute what it holds. Mapped: a header may promise more than there is
            rows = np.load(path, allow_pickle=False, mmap_mode="r")
        except (OSError, ValueError, EOFError, OverflowError) as error:
            raise UserError(f"{path}: cannot be read as a .npy file ({error})") from None
        if not isinstance(rows, np.ndarray):
            raise UserError(f"{path}: an archive of several arrays, expected a .npy file of one")
        if rows.dtype.kind not in "iu" or rows.ndim != 2:
            raise UserError(f"{path}: {rows.dtype} of shape {list(rows.shape)}, expected whole numbers (images, tokens)")
        names, rows = [f"{i}" for i in range(len(rows))], rows.tolist()
    else:
        content = read_json(path)
        try:
            names, rows = zip(*((str(image["name"]), list(image["tokens"])) for image in content["images"]))
        except (KeyError, TypeError, ValueError):
            raise UserError(f'{path}: expected {{"images": [{{"name": ..., "tokens": [...]}}, ...]}}, at least one image') from None
        V = content.get("vocab_size", tokenizer.fsq.vocab_size)
        if V != tokenizer.fsq.vocab_size:
            raise UserError(f"{path}: tokens out of {shown(V)}, but this tokenizer has {tokenizer.fsq.vocab_size}")
    if not rows:
        raise UserError(f"{path}: holds no images")
    K, V = tokenizer.config.registers, tokenizer.fsq.vocab_size
    for name, row in zip(names, rows):
        if not 1 <= len(row) <= K:
            raise UserError(f"{path}: image {name} has {len(row)} tokens, expected 1 to {K}")
        bad = next((token for token in row if type(token) is not int or not 0 <= token < V), None)
        if bad is not None:
            raise UserError(f"{path}: image {name} has the token {bad!r}, expected whole numbers from 0 to {V - 1}")
    return names, [torch.tensor(row) for row in rows]


def write_rows(path, columns, header):
    """Columns (B, 3, H, W) each -> a PNG with one row per image."""
    save_grid(path, [[column[i] for column in columns] for i in range(len(columns[0]))], header)
    print(f"wrote {path}")


def save_image(path, image):
    """(3, H, W) in [-1, 1] -> a PNG of its own size."""
    with replacing(path) as temporary:
        to_image(image).save(temporary, format="PNG")


COMMANDS = {"reconstruct": (reconstruct, Reconstruct), "generate": (generate, Generate), "encode": (encode, Encode), "decode": (decode, Decode)}


def main(argv):
    if not argv:
        reconstruct(Reconstruct())
        return generate(Generate())
    name = argv[0] if argv[0] in COMMANDS else "reconstruct"
    run, Config = COMMANDS[name]
    run(from_cli(Config, argv=argv[1:] if argv[0] in COMMANDS else argv, positional="paths"))


if __name__ == "__main__":
    command(main, sys.argv[1:])
