"""
Use trained models from the command line: rebuild images from few tokens, generate new ones, tokens to a file and back.

    images --reconstruct--> a picture, a column per k      class or sentence --generate--> new images, or an animation
    images --encode--> tokens.json or .npy --decode--> images      pairs of images --mix--> whose tokens say what?

    python sample.py                                          # out/reconstruct.png and out/generate.png, of emoji
    python sample.py generate --text "red heart" --n 4        # a sentence; or --label food-and-drink, or --label 3
    python sample.py generate --label 5 --stream              # out/generate.webp: the image sharpens as tokens arrive
    python sample.py reconstruct a.jpg photos/ --n 4          # your images: any size, the centre is cut out
    python sample.py reconstruct --html out/page.html         # a page with a slider over k, any browser; half a minute
    python sample.py mix                                      # out/mix.png: first tokens of one, the rest of another
    python sample.py encode a.jpg b.png --k 16 --out tokens.json    # or tokens.npy
    python sample.py decode tokens.json --ks 1 4 16 --out out/decoded.png
    python sample.py reconstruct a.gif b.mp4 --tokenizer out/video-cpu     # clips; --html, encode, decode likewise
    python sample.py generate --text "a red bar moves left, slowly, on a white background" \\
        --tokenizer out/video-cpu --prior out/video-cpu-prior

With no --tokenizer the shipped weights are used: 64-pixel emoji, so that other images come out as what emoji can say
of them. Takes seconds on a CPU.                                           Next: train_tokenizer.py, to train your own
"""
import difflib
import itertools
import math
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from common import (HALF, UserError, autocast, check_output, check_range, command, from_cli, has_native_bf16, nearest,
                    pick_device, read_json, replacing, shipped, shown, write_json)
from clips import read_clip, save_clip_grid, save_pictures, windows_of, write_clip
from data import Emoji, MovingShapes, list_files, report_skipped, spread, spread_rows
from evaluate import conditions, draw, load
from images import draw_grid, fit, psnr, read_image, save_grid, save_page, to_float, to_image, to_tensor
from model import FlexTok, powers_of_two
from video import VideoFlexTok, is_video, rows_of, windows

SHIPPED = "assets/emoji64"
EVERY_K = 64  # up to this many tokens, the slider of a page stops at each


@dataclass
class Reconstruct:
    """Rebuild images from 1, 2, 4, ... tokens. Commands: reconstruct, generate, mix, encode, decode; --help of each."""
    paths: tuple = ()                 # images and folders; none: held-out emoji
    out: str = "out/reconstruct.png"  # the picture to write
    html: str = ""                    # a page to write as well, with a slider over the number of tokens
    n: int = 8                        # at most this many images
    ks: tuple = (0,)                  # numbers of tokens; 0: 1, 2, 4, ..., all
    timesteps: int = 4                # steps of the flow sampler; official checkpoints: 20 or so
    guidance_scale: float = 0.0       # 1.0: none; 0.0: what the tokenizer recommends
    seed: int = 0                     # of the sampler's noise
    tokenizer: str = SHIPPED          # directory of a tokenizer
    device: str = "auto"              # auto, cpu, cuda, mps
    precision: str = "auto"           # fp32, bf16, fp16: of the flow decoder; auto: bf16 if CUDA has it, else fp32


@dataclass
class Generate:
    """Write new images with the prior: from a class, from a sentence, or one of each class."""
    out: str = "out/generate.png"     # the picture to write; with --stream a .webp or .gif
    html: str = ""                    # a page to write as well, with a slider over the number of tokens
    label: str = ""                   # class to draw, its number or its name
    text: tuple = ("",)               # sentences to draw, in turn
    n: int = 10                       # how many images
    k: int = 0                        # tokens to write, of clips for every row; 0: all
    cfg_scale: float = 0.0            # guidance of the prior; 1.0: none; 0.0: what the prior recommends
    temperature: float = -1.0         # below 1: less varied; 0: the likeliest token; -1: what the prior recommends
    top_k: int = 0                    # choose among this many likeliest tokens; 0: all
    top_p: float = 0.0                # choose among the likeliest that together reach this probability; 0: all
    timesteps: int = 4                # steps of the flow sampler; official checkpoints: 20 or so
    guidance_scale: float = 0.0       # guidance of the decoder; 1.0: none; 0.0: what the tokenizer recommends
    seed: int = 0                     # of the tokens and of the sampler's noise
    stream: bool = False              # write an animation, one frame per token
    tokenizer: str = SHIPPED          # directory of a tokenizer
    prior: str = SHIPPED + "/prior"   # directory of a prior trained on its tokens
    device: str = "auto"              # auto, cpu, cuda, mps
    precision: str = "auto"           # fp32, bf16, fp16: of decoder and prior; auto: bf16 if CUDA has it, else fp32


@dataclass
class Mix:
    """Give image A the first 1, 2, 4, ... tokens of image B: what do the first ones hold?"""
    paths: tuple = ()                 # images A B A B ...; none: held-out emoji, the same thing in two styles
    out: str = "out/mix.png"          # the picture to write
    n: int = 8                        # at most this many pairs
    timesteps: int = 4                # steps of the flow sampler; official checkpoints: 20 or so
    guidance_scale: float = 0.0       # 1.0: none; 0.0: what the tokenizer recommends
    seed: int = 0                     # of the sampler's noise
    tokenizer: str = SHIPPED          # directory of a tokenizer
    device: str = "auto"              # auto, cpu, cuda, mps
    precision: str = "auto"           # fp32, bf16, fp16: of the flow decoder; auto: bf16 if CUDA has it, else fp32


@dataclass
class Encode:
    """Write the tokens of images to a .json or .npy file."""
    paths: tuple = ()                 # images and folders
    out: str = "out/tokens.json"      # .json (with the names), or .npy (int64, one row an image)
    k: int = 0                        # tokens per image; 0: all
    tokenizer: str = SHIPPED          # directory of a tokenizer
    device: str = "auto"              # auto, cpu, cuda, mps


@dataclass
class Decode:
    """Turn a file of tokens back into images."""
    paths: tuple = ()                 # one .json or .npy file (of clips .json), as written by encode
    out: str = "out/decoded.png"      # a picture, a row per image and a column per k; or a folder, for single images
    ks: tuple = (0,)                  # keep only this many tokens; 0: all there are
    timesteps: int = 4                # steps of the flow sampler; official checkpoints: 20 or so
    guidance_scale: float = 0.0       # 1.0: none; 0.0: what the tokenizer recommends
    seed: int = 0                     # of the sampler's noise
    tokenizer: str = SHIPPED          # directory of a tokenizer
    device: str = "auto"              # auto, cpu, cuda, mps
    precision: str = "auto"           # fp32, bf16, fp16: of the flow decoder; auto: bf16 if CUDA has it, else fp32


# ---------------------------------------------------------------------------------------------------------------
# The five commands


def reconstruct(config):
    """Write the grid: original, then the image rebuilt from each number of tokens; print the mean PSNR of each."""
    check_sampling(config)
    if is_video(config.tokenizer):
        return reconstruct_clips(config)
    check_range(config, 1, math.inf, "n")
    check_output(config.out, ".png")
    check_page(config)
    tokenizer = FlexTok.from_pretrained(config.tokenizer, device=pick_device(config.device))
    K = tokenizer.config.registers
    ks = powers_of_two(K) if config.ks == (0,) else token_counts("ks", config.ks, K)
    names, images = chosen(config, tokenizer)
    tokens = tokenizer.tokenize(images, k=max(ks))                                # B x (1, k)
    rebuilt = {}
    for k in stops(config, ks) if config.ks == (0,) else ks:
        rebuilt[k] = sample(tokenizer, [row[:, :k] for row in tokens], config)    # (B, 3, H, W)
        print(f"k = {k:3d}: {psnr(rebuilt[k], images).mean():.2f} dB")
    write_rows(config.out, [images, *(rebuilt[k] for k in ks)], ["original", *(f"k={k}" for k in ks)])
    write_page(config, "Images from their first tokens", names, images, rebuilt, torch.cat(tokens), tokenizer)


def generate(config):
    """Write the grid: a row per new image, a column for its first 1, 2, 4, ... tokens; with --stream, the animation."""
    check_sampling(config)
    check_range(config, 1, math.inf, "n")
    check_range(config, 0, math.inf, "k", "top_k")
    check_range(config, 0, 1, "top_p")
    check_range(config, -1000, 1000, "cfg_scale")
    if config.temperature != -1:
        check_range(config, 0, math.inf, "temperature")
    of_clips = is_video(config.tokenizer)
    moving = config.stream or of_clips
    out = "out/generate.webp" if moving and config.out == Generate.out else config.out
    check_output(out, *((".webp", ".gif") if moving else (".png",)))
    if of_clips and config.stream:
        raise UserError("--stream is for images: what is generated of clips is an animation anyway")
    check_page(config)
    if config.html and config.stream:
        raise UserError("--html and --stream: choose one; the page shows every step as well")
    tokenizer, gpt = load(config.tokenizer, config.prior, pick_device(config.device), weights_type(config))
    rows = tokenizer.rows  # of tokens, 1 but for clips; each has k
    k = rows * token_counts("k", [config.k], gpt.config.length // rows)[0]
    recommended = gpt.notes.get("sampling", {}).get("temperature", 1.0)
    labels, captions = asked_for(config, gpt)
    writing = gpt.generate(*conditions(gpt, labels, captions), k=k,
                           cfg_scale=config.cfg_scale or gpt.config.cfg_scale,
                           temperature=recommended if config.temperature == -1 else config.temperature,
                           top_k=config.top_k, top_p=config.top_p, n=config.n, stream=True,
                           generator=torch.Generator().manual_seed(config.seed))
    if config.stream:
        frames = []
        for tokens in writing:                                                    # (n, 1), (n, 2), ..., (n, k)
            frames.append(draw_grid(sample(tokenizer, list(tokens), config).split(4)))
            if sys.stderr.isatty():
                print(f"\rframe {len(frames)} of {k} ", end="\n" * (len(frames) == k), file=sys.stderr, flush=True)
        fps = min(16, k / 6)
        save_pictures(out, frames + frames[-1:] * round(2 * fps), fps)  # the last one stays for 2 s
        return print(f"wrote {out}")
    ks = powers_of_two(k // rows)
    tokens = list(writing)[-1]                                                    # (n, k), of whole registers
    drawn = {k: sample(tokenizer, list(tokens[:, :rows * k]), config) for k in stops(config, ks)}  # (n, 3, [F,] H, W)
    columns, header = [drawn[k] for k in ks], [f"k={k}" for k in ks]
    write_rows(out, columns, header)
    if of_clips:
        tokens = tokens.unflatten(1, (-1, rows)).transpose(1, 2)                  # (n, T, k)
    write_page(config, f"New {'clips' if of_clips else 'images'}, token by token",
               titles(labels, captions, gpt, config.n), None, drawn, tokens, tokenizer)


def mix(config):
    """Write the grid: A; A with its first 0, 1, 2, 4, ..., K tokens taken from B; B. A row per pair of images."""
    check_sampling(config)
    check_range(config, 1, math.inf, "n")
    check_output(config.out, ".png")
    tokenizer = FlexTok.from_pretrained(config.tokenizer, device=pick_device(config.device))
    A, B = pairs(config, tokenizer)                                               # (n, 3, H, W) each
    rest, first = (torch.cat(tokenizer.tokenize(images)) for images in (A, B))    # (n, K) each
    js, columns = [0, *powers_of_two(first.shape[1])], []
    for j in js:
        columns.append(sample(tokenizer, list(torch.cat([first[:, :j], rest[:, j:]], 1)), config))  # (n, 3, H, W)
        to_a, to_b = (psnr(columns[-1], images).mean() for images in (A, B))
        print(f"first {j:3d} tokens of B, the rest of A: {to_a:.2f} dB to A, {to_b:.2f} dB to B")
    write_rows(config.out, [A, *columns, B], ["A", *(f"{j} of B" for j in js), "B"])


def encode(config):
    """Images -> a file of tokens. Only 32 images are in memory at a time, so that a folder may hold any number."""
    if not config.paths:
        raise UserError("encode: name at least one image or folder")
    if is_video(config.tokenizer):
        return encode_clips(config)
    check_output(config.out, ".json", ".npy")
    tokenizer = FlexTok.from_pretrained(config.tokenizer, device=pick_device(config.device))
    k, = token_counts("k", [config.k], tokenizer.config.registers)
    names, rows, images = [], [], read_images(config.paths, tokenizer.image_size)
    while part := list(itertools.islice(images, 32)):
        names += [name for name, _ in part]
        part = torch.stack([image for _, image in part]).to(pick_device(config.device))  # (32, 3, H, W)
        rows += tokenizer.tokenize(part, k=k)                                     # 32 x (1, k)
    tokens = torch.cat(rows).cpu()                                                # (B, k)
    if config.out.endswith(".npy"):
        with replacing(config.out) as temporary, open(temporary, "wb") as file:
            np.save(file, tokens.numpy())
    else:
        names = [os.fsencode(name).decode("utf-8", "replace") for name in names]  # a file's name may be any bytes
        write_json(config.out, {"vocab_size": tokenizer.quantizer.vocab_size, "registers": tokenizer.config.registers,
                                "images": [{"name": name, "tokens": row} for name, row in zip(names, tokens.tolist())]})
    print(f"wrote {len(tokens)} x {k} tokens to {config.out}")


def decode(config):
    """A file of tokens -> one picture of all images, or a folder of single ones."""
    if len(config.paths) != 1:
        raise UserError(f"decode: name one .json or .npy file of tokens, not {len(config.paths)}")
    check_sampling(config)
    if is_video(config.tokenizer):
        return decode_clips(config)
    check_output(config.out, ".png", "")
    tokenizer = FlexTok.from_pretrained(config.tokenizer, device=pick_device(config.device))
    names, tokens = read_tokens(config.paths[0], tokenizer)                       # B names, B x (k_i,)
    token_counts("ks", config.ks, min(map(len, tokens)))
    columns = [[row[:k] if k else row for row in tokens] for k in config.ks]      # B x (k,) each
    if config.out.endswith(".png"):
        header = [f"k={k}" if k else "all tokens" for k in config.ks]
        return write_rows(config.out, [sample(tokenizer, column, config) for column in columns], header)
    for k, column in zip(config.ks, columns):
        for i, image in enumerate(sample(tokenizer, column, config)):             # (3, H, W) each
            with replacing(os.path.join(config.out, file_name(i, names[i], k, ".png"))) as temporary:
                to_image(image).save(temporary, format="PNG")
    print(f"wrote {len(names) * len(columns)} images to {config.out}")


def file_name(i, name, k, ending):
    """Of image or clip i, called `name`, from k tokens (0: all). The number keeps cats/1.png and dogs/1.png apart."""
    stem = re.sub(r"[^\w.-]", "_", os.path.splitext(os.path.basename(name))[0])[:100]  # a name may hold anything
    return f"{i:03d}_{stem}" + (f"_k{k:03d}" if k else "") + ending


# ---------------------------------------------------------------------------------------------------------------
# The same for clips, if --tokenizer is a VideoFlexTok


SECONDS = 10.0  # of each clip that `reconstruct` shows


def reconstruct_clips(config):
    """Write an animation: a row per clip, original and what is rebuilt from each number of tokens a row; print PSNRs.

    Of a clip its first ten seconds are shown. Those that are shorter than others wait at their last frame.
    """
    check_range(config, 1, math.inf, "n")
    out = "out/reconstruct.webp" if config.out == Reconstruct.out else config.out
    check_output(out, ".webp", ".gif")
    check_page(config)
    tokenizer = VideoFlexTok.from_pretrained(config.tokenizer, device=pick_device(config.device))
    K, sizes = tokenizer.config.registers, tokenizer.config
    ks = powers_of_two(K) if config.ks == (0,) else token_counts("ks", config.ks, K)
    if config.paths:
        paths = [shipped(path) for path in config.paths[:config.n]]
        videos = [read_clip(path, tokenizer.frame_size, sizes.frames, sizes.stride, SECONDS) for path in paths]
        names = [os.path.basename(os.path.normpath(path)) for path in paths]
    else:  # of the same law as the preset's, but not seen in training
        held_out = MovingShapes(max(tokenizer.frame_size), "held_out", frames=sizes.frames)
        videos, places = spread(held_out, config.n)                               # (n, 3, F, H, W)
        names = [held_out.caption(i) for i in places]
    tokens = [tokenizer.tokenize(video[None], k=max(ks))[0][0] for video in videos]  # n x (t, k)
    rebuilt = {}
    for k in stops(config, ks) if config.ks == (0,) else ks:
        rebuilt[k] = [sample_clips(tokenizer, [rows[:, :k]], config)[0].cpu() for rows in tokens]  # n x (3, F, H, W)
        decibels = [psnr(clip[None], video[None]).item() for clip, video in zip(rebuilt[k], videos)]
        print(f"k = {k:3d}: {sum(decibels) / len(decibels):.2f} dB")
    write_rows(out, [videos, *(rebuilt[k] for k in ks)], ["original", *(f"k={k}" for k in ks)])
    write_page(config, "Clips from their first tokens", names, videos, rebuilt, tokens, tokenizer)


def encode_clips(config):
    """Clips -> a .json file of tokens. One window is in memory at a time, so that clips may be of any length."""
    check_output(config.out, ".json")
    tokenizer = VideoFlexTok.from_pretrained(config.tokenizer, device=pick_device(config.device))
    k, = token_counts("k", [config.k], tokenizer.config.registers)
    sizes, clips = tokenizer.config, []
    for name in map(shipped, config.paths):
        rows = []
        for i, window in enumerate(windows_of(name, tokenizer.frame_size, sizes.frames, sizes.stride)):
            tokens, = tokenizer.tokenize(window[None], k)                         # (1, T, k)
            rows += tokens[0, rows_of(sizes.overlap) if i else 0:].tolist()
        clips.append({"name": os.fsencode(name).decode("utf-8", "replace"), "tokens": rows})
    write_json(config.out, {"vocab_size": tokenizer.quantizer.vocab_size, "registers": sizes.registers, "clips": clips})
    print(f"wrote {', '.join(str(len(clip['tokens'])) for clip in clips)} rows x {k} tokens to {config.out}")


def decode_clips(config):
    """A file of tokens -> one animation of all clips, a column per k; or a folder of single ones, as .webp."""
    out = "out/decoded.webp" if config.out == Decode.out else config.out
    check_output(out, ".webp", ".gif", ".mp4", "")
    tokenizer = VideoFlexTok.from_pretrained(config.tokenizer, device=pick_device(config.device))
    names, tokens = read_clip_tokens(config.paths[0], tokenizer)                  # B names, B x (t_i, k_i)
    token_counts("ks", config.ks, min(x.shape[1] for x in tokens))
    if out.endswith((".webp", ".gif")):
        columns = [[sample_clips(tokenizer, [x[:, :k or None]], config)[0].cpu() for x in tokens] for k in config.ks]
        return write_rows(out, columns, [f"k={k}" if k else "all tokens" for k in config.ks])
    if out.endswith(".mp4") and len(tokens) * len(config.ks) > 1:
        raise UserError(f"--out {out}: expected one clip and one k; give a folder for more")
    for (i, name), k in itertools.product(enumerate(names), config.ks):
        path = out if out.endswith(".mp4") else os.path.join(out, file_name(i, name, k, ".webp"))
        parts = clip_windows(tokenizer, [tokens[i][:, :k or None]], config)
        write_clip(path, (frame for part in parts for frame in part[0].unbind(1)))
    print(f"wrote {len(tokens) * len(config.ks)} clips to {out}")


def clip_windows(tokenizer, tokens, config):
    """List of tokens (t, k) -> windows of the clips (B, 3, ., H, W) in turn, by the command line's settings."""
    with sampling(tokenizer, config) as (scale, generator):
        for window in tokenizer.detokenize_windows(tokens, config.timesteps, scale, generator=generator):
            yield window.float()


def sample_clips(tokenizer, tokens, config):
    """List of tokens (t, k) -> clips (B, 3, F, H, W)."""
    return torch.cat(list(clip_windows(tokenizer, tokens, config)), 2)            # (B, 3, F, H, W)


def read_clip_tokens(path, tokenizer):
    """A .json file -> names, list of int64 tensors (t_i, k_i). Raises UserError naming the file and the fault."""
    K, V, content = tokenizer.config.registers, tokenizer.quantizer.vocab_size, read_json(path)
    try:
        clips = [(str(clip["name"]), [list(row) for row in clip["tokens"]]) for clip in content["clips"]]
    except (KeyError, TypeError):
        raise wrong_file("clips", "images", "[[...], ...]", path, content) from None
    check_origin(path, content, V, K)
    if not clips:
        raise UserError(f"{path}: expected at least one clip")
    for name, rows in clips:
        if not rows or not 1 <= len(rows[0]) <= K or any(len(row) != len(rows[0]) for row in rows):
            raise UserError(f"{path}: clip {shown(name)}: expected rows of equally many tokens, 1 to {K}")
        check_tokens(f"{path}: clip {shown(name)}", itertools.chain(*rows), V)
        try:
            windows(len(rows), rows_of(tokenizer.config.frames), rows_of(tokenizer.config.overlap), "rows of tokens")
        except ValueError as error:
            raise UserError(f"{path}: clip {shown(name)}: {error}") from None
    return [name for name, _ in clips], [torch.tensor(rows) for _, rows in clips]


# ---------------------------------------------------------------------------------------------------------------
# Models and what they are asked for


def chosen(config, tokenizer):
    """The images asked for, at most --n: those of `paths`, or else held-out emoji -> names, images (B, 3, H, W)."""
    if config.paths:
        read = list(itertools.islice(read_images(config.paths, tokenizer.image_size), config.n))
        names, images = [os.path.basename(name) for name, _ in read], torch.stack([image for _, image in read])
    else:  # what the shipped weights were not trained on
        emoji = Emoji(max(tokenizer.image_size), "held_out", augment=False)
        images, rows = spread(emoji, config.n)                                    # (n, 3, H, W)
        names = [emoji.caption(i) for i in rows]
    return names, images.to(pick_device(config.device))


def pairs(config, tokenizer):
    """A and B of `mix`, (n, 3, H, W) each: neighbours among `paths`, or else held-out emoji, a thing in two styles."""
    if config.paths:
        images = [image for _, image in itertools.islice(read_images(config.paths, tokenizer.image_size), 2 * config.n)]
        if len(images) % 2:
            raise UserError(f"mix: {len(images)} images, expected an even number")
    else:
        emoji, places = Emoji(max(tokenizer.image_size), "held_out", augment=False), {}
        for i in range(len(emoji)):
            places.setdefault(emoji.thing(i)["codepoints"], []).append(i)  # the styles of one thing
        things = [(styles[0], styles[-1]) for styles in places.values() if len(styles) > 1]
        images = [to_float(emoji.get(i, None)) for row in spread_rows(things, config.n) for i in things[row]]
    images = torch.stack(images).to(pick_device(config.device))                   # (2 n, 3, H, W)
    return images[0::2], images[1::2]                                             # (n, 3, H, W) each


def titles(labels, captions, gpt, n):
    """What each of n new images was asked for by, in words: its caption, its class or both."""
    names = dict(enumerate(gpt.notes.get("classes", [])))
    labels = [""] * n if labels is None else [names.get(i, f"class {i}") for i in labels.tolist()]
    return [", ".join(filter(None, words)) or "new image" for words in zip(captions or [""] * n, labels)]


def asked_for(config, gpt):
    """--label and --text -> labels (n,) or None, n captions or None. With neither, the classes take turns, if any."""
    known, names, n = gpt.config.classes, gpt.notes.get("classes", []), config.n
    if any(config.text) and not gpt.config.text_width:
        raise UserError(f"--text: {config.prior} was not trained on captions")
    if gpt.config.text_width and gpt.text_encoder is None:
        raise UserError(f"{config.prior}: needs the states of a text encoder that it does not hold; use GPT.generate")
    if config.label and not known:
        raise UserError(f"--label {config.label}: {config.prior} was not trained on classes")
    captions = [config.text[i % len(config.text)] for i in range(n)] if any(config.text) else None
    if not config.label:
        return (torch.arange(n) % known if known and not captions else None), captions  # (n,)
    numbers = {str(i): i for i in range(known)} | {name: i for i, name in enumerate(names)}
    if config.label not in numbers:
        near = ", ".join(difflib.get_close_matches(config.label, names, 5, 0)) or "0"
        raise UserError(f"--label {config.label}: expected 0 to {known - 1}, or a name such as {near}")
    return torch.full((n,), numbers[config.label]), captions                      # (n,)


def weights_type(config):
    """The type to sample in. On a CPU float32 unless asked: the README's pictures and numbers are of that."""
    device = pick_device(config.device)
    autocast(device, config.precision)  # refuses other words
    automatic = config.precision == "auto" and device.type == "cuda" and has_native_bf16(device)
    return torch.bfloat16 if automatic else HALF.get(config.precision, torch.float32)


@contextmanager
def sampling(tokenizer, config):
    """Decode in here, by the command line's settings: yields the guidance scale and the generator of the noise."""
    dtype = weights_type(config)
    # The decoder runs twice a step: with its weights in 16 bits, none of them is cast there again. Encoder and VAE run
    # once and stay float32, so that tokens are those of `encode`. So does an image's table of positions, a buffer.
    for p in tokenizer.decoder.parameters():
        p.data = p.data.to(dtype)
    with torch.autocast(pick_device(config.device).type, dtype, enabled=dtype != torch.float32):
        yield config.guidance_scale or tokenizer.recommended_guidance, torch.Generator().manual_seed(config.seed)


def sample(tokenizer, tokens, config):
    """List of tokens -> images (B, 3, H, W), of clips' `ClipSequences` (B, 3, F, H, W)."""
    with sampling(tokenizer, config) as (scale, generator):
        return draw(tokenizer, tokens, config.timesteps, scale, generator).float()  # (B, 3, H, W)


# ---------------------------------------------------------------------------------------------------------------
# Flags, images and files


def check_sampling(config):
    """Raise `UserError` for sampler settings that cannot be."""
    check_range(config, 1, math.inf, "timesteps")
    check_range(config, 0, 1000, "guidance_scale")
    check_range(config, 0, 2**63 - 1, "seed")
    weights_type(config)


def check_page(config):
    """Raise `UserError` if --html is asked for and cannot be written."""
    if config.html:
        check_output(config.html, ".html", flag="--html")


def token_counts(flag, ks, most):
    """Numbers of tokens, 0 standing for all `most`, written out. Raises `UserError` if there are not as many."""
    for k in ks:
        if not 0 <= k <= most:
            raise UserError(f"--{flag} {k}: expected 1 to {most} tokens")
    return [k or most for k in ks]


def read_images(paths, size):
    """Images and folders -> pairs (name, (3, H, W) in [-1, 1]), read one by one.

    A file named directly that cannot be read raises `UserError`; one inside a folder is reported and skipped.
    """
    paths = [shipped(path) for path in paths]
    for path in paths:
        os.stat(path)  # a typo in the last name shows before the first image is computed
    for path in paths:
        names, skipped = [path], []
        if os.path.isdir(path):
            names = [os.path.join(path, name) for name in list_files(path)]
        try:
            for name in names:
                try:
                    image = to_tensor(fit(read_image(name), size))                # (3, H, W)
                except UserError as error:
                    if name == path:
                        raise
                    skipped.append(str(error))
                else:
                    yield name, image
        finally:  # also if no more are wanted
            report_skipped(path, skipped)
        if len(skipped) == len(names):
            raise UserError(f"{path}: no readable image in this folder")


def read_tokens(path, tokenizer):
    """A .json or .npy file -> names, list of int64 tensors (k_i,). Raises UserError naming the file and the fault."""
    K, V = tokenizer.config.registers, tokenizer.quantizer.vocab_size
    if path.endswith(".npy"):
        rows = read_array(path)
        names = [str(i) for i in range(len(rows))]
    else:
        content = read_json(path)
        try:
            names = [str(image["name"]) for image in content["images"]]
            rows = [list(image["tokens"]) for image in content["images"]]
        except (KeyError, TypeError):
            raise wrong_file("images", "clips", "[...]", path, content) from None
        check_origin(path, content, V, K)
    if not rows:
        raise UserError(f"{path}: expected at least one image")
    for name, row in zip(names, rows):
        if not 1 <= len(row) <= K:
            raise UserError(f"{path}: image {shown(name)} has {len(row)} tokens, expected 1 to {K}")
        check_tokens(f"{path}: image {shown(name)}", row, V)
    return names, [torch.tensor(row) for row in rows]


def wrong_file(wanted, other, tokens, path, content):
    """The `UserError` for a .json file without tokens of `wanted` (images, say), which may hold those of `other`."""
    hint = f"; of {other}: give their --tokenizer" if isinstance(content, dict) and other in content else ""
    return UserError(f'{path}: expected {{"{wanted}": [{{"name": ..., "tokens": {tokens}}}, ...]}}{hint}')


def check_origin(path, content, V, K):
    """Raise `UserError` if a .json file of tokens says that they are of a tokenizer of other sizes than V and K."""
    for name, mine in (("vocab_size", V), ("registers", K)):
        if content.get(name, mine) != mine:
            raise UserError(f"{path}: its tokens are of another tokenizer, whose {name} is {shown(content[name])}, not "
                            f"{mine}")


def check_tokens(where, tokens, V):
    """Raise `UserError` if one of `tokens` is no integer from 0 to V - 1."""
    for token in tokens:
        if type(token) is not int or not 0 <= token < V:
            raise UserError(f"{where} has the token {shown(token)}, expected 0 to {V - 1}")


def read_array(path):
    """A .npy file of integers, (images, tokens) -> a list of lists."""
    try:
        # No pickle: it would execute what it holds. Mapped: a header may promise more than there is
        rows = np.load(path, allow_pickle=False, mmap_mode="r")
    except Exception as error:  # NumPy parses the header as Python, and a damaged one raises a dozen types
        raise UserError(f"{path}: cannot be read as a .npy file ({shown(str(error))})") from None
    if not isinstance(rows, np.ndarray):
        raise UserError(f"{path}: an archive of several arrays, expected a .npy file of one")
    if rows.dtype.kind not in "iu" or rows.ndim != 2 or not rows.size:
        raise UserError(f"{path}: {shown(rows.dtype)} of shape {shown(rows.shape)}, expected integers (images, tokens)")
    return rows.tolist()


def write_rows(path, columns, header):
    """Columns of B images (3, H, W) -> a PNG with a row per image; of clips (3, F_i, H, W) -> one animation."""
    (save_clip_grid if columns[0][0].dim() == 4 else save_grid)(path, list(zip(*columns)), header)
    print(f"wrote {path}")


def stops(config, ks):
    """The numbers of tokens to decode: those of the picture, `ks` = 1, 2, 4, ..., k; for a page all, if few enough."""
    return range(1, ks[-1] + 1) if config.html and ks[-1] <= EVERY_K else ks


def write_page(config, title, names, images, drawn, tokens, tokenizer):
    """With --html, write the page: images (B, 3, H, W) or None, drawn {k: (B, 3, H, W)} of tokens (B, K).

    Of clips, B x (3, F_i, H, W) instead, and B x (t_i, K).
    """
    if config.html:
        it, them = "image", f"{tokens[0].shape[-1]} numbers, its tokens"
        if tokens[0].dim() == 2:
            it, them = "clip", f"rows of {them}: one for its first frame, then one for every four frames"
        did = f"A GPT wrote each {it} as" if images is None else f"FlexTok turned each {it} into"
        intro = (f"{did} {them}. The first say what matters most, each further one adds detail; what they leave open "
                 f"is invented, so any number of them makes a whole {it}. Drag the slider, or select it and press the "
                 "arrow keys.")
        save_page(config.html, title, intro, names, images, drawn, tokens, tokenizer.quantizer.vocab_size)
        print(f"wrote {config.html}")


COMMANDS = {"reconstruct": (reconstruct, Reconstruct), "generate": (generate, Generate), "mix": (mix, Mix),
            "encode": (encode, Encode), "decode": (decode, Decode)}


def main(argv):
    """Run one command; without a word, reconstruct and generate; with only paths and flags, reconstruct."""
    if not argv:
        reconstruct(Reconstruct())
        return generate(Generate())
    name = argv[0] if argv[0] in COMMANDS else "reconstruct"
    if name != argv[0] and not argv[0].startswith("-") and not os.path.exists(shipped(argv[0])):
        raise UserError(f"{argv[0]}: neither a file nor a command{nearest(argv[0], COMMANDS) or ' (see --help)'}")
    run, Config = COMMANDS[name]
    run(from_cli(Config, argv=argv[1:] if argv[0] in COMMANDS else argv, positional="paths"))


if __name__ == "__main__":
    command(main, sys.argv[1:])
