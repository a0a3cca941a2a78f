"""
Images to learn from: the embedded emoji, endless drawn shapes, or any folder. They all look the same from outside.
For video.py, clips: drawn ones, `MovingShapes`, or any folder of films, `Films`.

    emoji | shapes | path/to/folder --open_data--> dataset.get(i, rng)  (3, S, S) uint8   .label(i)  .caption(i)
    dataset --batches--> images (b, 3, S, S) uint8, labels (b,), indices (b,) --to_float, on the device--> [-1, 1]

Not in the paper, which trains on ImageNet-1k and DFN: those are the folder here; the other two need no download.
The training stream is a pure function of (seed, position): resuming and splitting over GPUs need no state at all.

    python data.py          # 5 s on a CPU: writes out/data.png and prints the captions
Next: vae.py or model.py, which learn from these.
"""
import atexit
import collections
import functools
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import zlib
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset

from clips import FILMS, FPS, frames_of
from common import Run, UserError, barrier, clock, locked, read_json, replacing, shown, sweep, write_json
from images import fit, opened, read_image, save_grid, to_bytes, to_float

ASSETS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets")
BICUBIC = Image.Resampling.BICUBIC


# FORK: data. Another data set is a class with the contract below and a line in this function.
def open_data(data, image_size, split="train", augment=True, seed=0):
    """"emoji", "shapes" or the path of a folder -> a data set. Raises `UserError` for anything else.

    split: "train" or "held_out", the same tenth whatever the seed; of emoji also "combinations". A data set has
        len(), the number of images;        classes, a list of names, the same for both splits;
        label(i) -> int, a place in `classes`;        caption(i) -> str, "" if there is none;
        get(i, rng) -> (3, S, S) uint8, a pure function: the numpy generator `rng` decides the augmentation (None will
        do with augment=False). For a file that cannot be read it raises `UserError`, and the next image is taken.
    """
    if split not in ("train", "held_out", *["combinations"] * (data == "emoji")):
        others = ", combinations" * (data == "emoji")
        raise UserError(f"--split {split}: expected train, held_out{others} of --data {data}")
    if data == "emoji":
        return Emoji(image_size, split, augment)
    if data == "shapes":
        return Shapes(image_size, split, seed)
    if os.path.isdir(data):
        return Folder(data, image_size, split, augment)
    raise UserError(f"--data {data}: expected emoji, shapes or an existing folder")


def open_clips(data, image_size, split="train", seed=0, frames=17):
    """"moving" or the path of a folder of films -> a data set as above, but for get(i, rng) -> (3, F, S, S).

    Raises `UserError` for anything else.
    """
    if data == "moving":
        return MovingShapes(image_size, split, seed, frames=frames)
    if os.path.isdir(data):
        return Films(data, image_size, split, frames)
    raise UserError(f"--data {data}: expected moving or an existing folder of films, as the tokenizer is one of clips")


# ---------------------------------------------------------------------------------------------------------------
# Emoji


TILE = 64     # pixels of one emoji in assets/emoji64.webp
MARGIN = 12   # white added around it, room for the augmentation: TILE / 2 · (1 / 0.85 - 1) + 4 < 10 pixels

# A mirrored letter, clock, map, moon phase, flag or pointing hand is wrong or means something else, and so is a
# mirrored "facing right". So mirroring is the exception: these (sub)categories, where left and right mean nothing.
MAY_MIRROR = {"animals-and-nature", "food-and-drink", "face-smiling", "face-affection", "face-tongue", "face-concerned",
              "face-costume", "face-glasses", "cat-face", "monkey-face", "person", "person-fantasy", "clothing", "tool",
              "science"}


@functools.cache
def emoji_tiles():
    """The embedded set, decoded once a process -> tiles (7231, 64, 64, 3) uint8, and what assets/emoji64.json says:
    "styles"; "concepts", a record of each of 1,911 things; "tiles", (thing, style) of each tile."""
    about = read_json(os.path.join(ASSETS, "emoji64.json"))
    sheet = np.asarray(read_image(os.path.join(ASSETS, "emoji64.webp")))
    rows, columns = sheet.shape[0] // TILE, sheet.shape[1] // TILE
    tiles = sheet.reshape(rows, TILE, columns, TILE, 3).swapaxes(1, 2)               # (rows, columns, 64, 64, 3)
    return tiles.reshape(-1, TILE, TILE, 3)[:len(about["tiles"])], about             # (7231, 64, 64, 3)


class Emoji:
    """The emoji in assets/: 1,911 things, each drawn in up to four styles, 7,231 pictures. Class = category, of 10.

    The same thing in another hand is what ordered tokens should be shown: what it is comes first, how it is drawn
    later. So two sets are held out: "held_out", every tenth thing of the list sorted by category and subcategory, in
    none of its styles seen in training; and "combinations", of another tenth of the things one style each, seen in its
    others. (A hash would leave small kinds out by chance. A held-out orange heart has a red one in training.)
    """

    def __init__(self, image_size, split="train", augment=True, styles=()):
        """styles: names of those wanted; () is all."""
        self.tiles, about = emoji_tiles()
        self.image_size, self.augment = image_size, augment
        self.things, self.styles = about["concepts"], about["styles"]
        kinds = [(thing["category"], thing["subcategory"], i) for i, thing in enumerate(self.things)]
        rank = {i: place for place, (_, _, i) in enumerate(sorted(kinds))}
        drawn = {}  # the styles of each thing
        for thing, style in about["tiles"]:
            drawn.setdefault(thing, []).append(style)

        def split_of(thing, style):
            turn, tenth = divmod(rank[thing], 10)
            if tenth == 5:
                return "held_out"
            known = drawn[thing]
            return "combinations" if tenth == 0 and len(known) > 1 and style == known[turn % len(known)] else "train"
        wanted = [i for i, style in enumerate(self.styles) if style in styles or not styles]
        self.members = [(i, thing, style) for i, (thing, style) in enumerate(about["tiles"])
                        if style in wanted and split_of(thing, style) == split]
        self.classes = sorted({thing["category"] for thing in self.things})

    def __len__(self):
        return len(self.members)

    def thing(self, i):
        """What picture i shows: the record of assets/emoji64.json."""
        return self.things[self.members[i][1]]

    def style(self, i):
        """In which hand picture i is drawn: a place in `styles`."""
        return self.members[i][2]

    def label(self, i):
        return self.classes.index(self.thing(i)["category"])

    def caption(self, i):
        """For example "red heart, fluent 3d"."""
        return f"{self.thing(i)['caption']}, {self.styles[self.style(i)]}"

    def may_mirror(self, i):
        return bool(MAY_MIRROR & {self.thing(i)["category"], self.thing(i)["subcategory"]})

    def get(self, i, rng):
        """Item i -> (3, S, S) uint8. Augmented: moved by up to 4 pixels, scaled 0.85-1.1, often mirrored or tinted."""
        scale, dx, dy = (rng.uniform(0.85, 1.1), *rng.uniform(-4, 4, 2)) if self.augment else (1, 0, 0)
        x, y, half = TILE / 2 + MARGIN + dx, TILE / 2 + MARGIN + dy, TILE / 2 / scale
        room = (MARGIN, MARGIN)
        tile = np.pad(self.tiles[self.members[i][0]], (room, room, (0, 0)), constant_values=255)     # (88, 88, 3)
        # crop, shift, scale and the change to S pixels are one antialiased resampling
        image = Image.fromarray(tile).resize(
            (self.image_size, self.image_size), BICUBIC, box=(x - half, y - half, x + half, y + half))
        pixels = np.asarray(image)                                                   # (S, S, 3)
        if self.augment and rng.random() < 0.5 and self.may_mirror(i):
            pixels = pixels[:, ::-1]
        if self.augment and rng.random() < 0.3:
            # The emoji come without their alpha, so the white behind one cannot be replaced cleanly. A light colour
            # laid over everything tints the white most: the model does not learn that a background is always 255.
            pixels = pixels * rng.uniform(0.85, 1, 3)
        return to_bytes(pixels)


# ---------------------------------------------------------------------------------------------------------------
# Shapes


# Corners (n, 2) in units of the radius, y downwards; a circle is drawn as an ellipse. Kinds that differ in their whole
# form: a square, a heart or a star is a circle but for its corners, which minutes of training cannot teach at 32 px.
POLYGONS = {
    "triangle": np.array([(0, -1), (1, 0.8), (-1, 0.8)]),
    "bar": np.array([(-1, -0.45), (1, -0.45), (1, 0.45), (-1, 0.45)]),
    "pillar": np.array([(-0.45, -1), (0.45, -1), (0.45, 1), (-0.45, 1)]),
}
KINDS = ["circle", *POLYGONS]
COLOURS = {"red": (220, 40, 40), "orange": (245, 140, 30), "yellow": (245, 210, 40), "green": (50, 160, 70),
           "blue": (40, 90, 215), "purple": (135, 60, 175), "pink": (240, 120, 180), "brown": (130, 80, 45)}
BACKGROUNDS = {"white": (255, 255, 255), "light grey": (215, 215, 215), "light blue": (190, 220, 245),
               "light green": (200, 235, 200), "cream": (250, 240, 205), "light pink": (250, 215, 225),
               "black": (15, 15, 15), "dark grey": (65, 65, 70), "dark blue": (20, 30, 80), "dark green": (15, 65, 40)}
RADII = {"small": 0.22, "medium": 0.27, "large": 0.32}  # of the image's side
PLACES = ["in the top left", "at the top", "in the top right", "on the left", "in the centre", "on the right",
          "in the bottom left", "at the bottom", "in the bottom right"]


# One object: kind and colour are names; x, y (of its centre) and radius in units of the image's side, y downwards.
Shape = collections.namedtuple("Shape", "kind colour x y radius")

# Everything there is to know about one picture: shape, a Shape; size, a key of RADII; place, an entry of PLACES;
# background, a key of BACKGROUNDS.
Scene = collections.namedtuple("Scene", "shape size place background")


class Shapes:
    """Drawn scenes, a shape on a plain ground, whose true factors are known: `factors(i)` -> Scene. Class = the kind.

    Item i of (seed, split) is a pure function, for any i >= 0: `length` only says what len() answers, and with it how
    many different scenes training sees. Nothing to augment.
    """

    def __init__(self, image_size, split="train", seed=0, length=None):
        self.image_size = image_size
        self.key = (seed, 0) if split == "train" else (0, 1)  # held out: the same scenes whatever the seed
        self.length = length or (10_000 if split == "train" else 500)
        self.classes = KINDS

    def __len__(self):
        return self.length

    def label(self, i):
        return KINDS.index(self.factors(i).shape.kind)

    def caption(self, i):
        """For example "a large red pillar in the top left on a light blue background"."""
        scene = self.factors(i)
        what = f"{scene.size} {scene.shape.colour} {scene.shape.kind}"
        return f"a {what} {scene.place} on a {scene.background} background"

    def factors(self, i):
        """Item i -> Scene."""
        rng = np.random.default_rng((*self.key, i))
        def pick(names):
            return names[rng.integers(len(names))]
        kind, size, row, column = pick(KINDS), pick(list(RADII)), rng.integers(3), rng.integers(3)
        radius = RADII[size] * rng.uniform(0.92, 1.08)
        # The reach of the centre, cut in 3 x 3 places with a gap between them: a place is never a matter of opinion
        low, reach = 1.12 * radius, 1 - 2 * 1.12 * radius
        x, y = (low + reach * (cell + rng.uniform(0.1, 0.9)) / 3 for cell in (column, row))
        background = pick(list(BACKGROUNDS))
        colours = [name for name, rgb in COLOURS.items()  # that stand out, by their distance in RGB levels
                   if math.dist(rgb, BACKGROUNDS[background]) > 125]
        return Scene(Shape(kind, pick(colours), x, y, radius), size, PLACES[3 * row + column], background)

    def get(self, i, rng=None):
        """Item i -> (3, S, S) uint8. Drawn 4 times as large and averaged down, which smooths the edges."""
        scene, side = self.factors(i), 4 * self.image_size
        canvas = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
        draw_shape(ImageDraw.Draw(canvas), scene.shape, side)
        return to_bytes(canvas.reduce(4))


def draw_shape(draw, shape, side):
    """Draw a Shape with PIL's `draw` on a square canvas of `side` pixels."""
    centre, radius, rgb = np.array([shape.x, shape.y]) * side, shape.radius * side, COLOURS[shape.colour]
    box = (*(centre - radius), *(centre + radius))
    if shape.kind == "circle":
        draw.ellipse(box, fill=rgb)
    else:
        draw.polygon([tuple(corner) for corner in centre + radius * POLYGONS[shape.kind]], fill=rgb)


DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # y downwards
SPEEDS = {"slowly": 0.02, "quickly": 0.05}  # sides of the frame per frame; in 17 frames a third of it, or 4 fifths

# One moving shape: shape, a Shape where it is in the first frame; direction and speed, keys of the tables above, in
# that frame; bounces, how often it has come back from an edge by the last.
Mover = collections.namedtuple("Mover", "shape direction speed bounces")
# A clip: one or two Movers, the first in front and larger, and the name of a background.
Movie = collections.namedtuple("Movie", "movers background")


class MovingShapes:
    """Drawn clips whose true factors are known: `factors(i)` -> Movie. Class = how the first shape moves, of 8 ways.

    As `Shapes`: item i of (seed, split) is a pure function for any i >= 0, endless, the same at every size, and its
    beginning is the same whatever the number of frames. Nothing to augment.
    """

    def __init__(self, image_size, split="train", seed=0, length=None, frames=17):
        self.image_size, self.frames = image_size, frames
        self.key = (seed, 2) if split == "train" else (0, 3)  # held out: the same clips whatever the seed
        self.length = length or (10_000 if split == "train" else 500)
        self.classes = [f"{direction}, {speed}" for direction in DIRECTIONS for speed in SPEEDS]

    def __len__(self):
        return self.length

    def label(self, i):
        first = self.factors(i).movers[0]
        return self.classes.index(f"{first.direction}, {first.speed}")

    def caption(self, i):
        """For example "a red bar moves left, slowly", or "a red bar moves left, quickly, and bounces, a blue circle
        moves up, slowly, on a white background"."""
        movie = self.factors(i)
        parts = [f"a {m.shape.colour} {m.shape.kind} moves {m.direction}, {m.speed}" + ", and bounces" * (m.bounces > 0)
                 for m in movie.movers]
        return f"{', '.join(parts)}, on a {movie.background} background"

    def factors(self, i):
        """Item i -> Movie."""
        rng = np.random.default_rng((*self.key, i))
        def pick(names):
            return names[rng.integers(len(names))]
        background = pick(list(BACKGROUNDS))
        colours = [name for name, rgb in COLOURS.items() if math.dist(rgb, BACKGROUNDS[background]) > 125]
        movers = []
        for radius in (0.25, 0.14)[:1 + (rng.random() < 0.25)]:  # mostly one
            low, reach = 1.12 * radius, 1 - 2 * 1.12 * radius
            shape = Shape(pick(KINDS), pick(colours), *(low + reach * rng.random(2)), radius)
            colours = [name for name in colours if name != shape.colour]
            direction, speed = pick(list(DIRECTIONS)), pick(list(SPEEDS))
            mover = Mover(shape, direction, speed, 0)
            movers.append(mover._replace(bounces=self.place(mover, self.frames - 1)[1]))
        return Movie(tuple(movers), background)

    def place(self, mover, frame):
        """Where a Mover is in a frame: its Shape there, and how often it has bounced."""
        shape, step = mover.shape, SPEEDS[mover.speed] * frame
        low, reach = 1.12 * shape.radius, 1 - 2 * 1.12 * shape.radius
        straight = [shape.x + step * DIRECTIONS[mover.direction][0], shape.y + step * DIRECTIONS[mover.direction][1]]
        # as if the way went on behind the mirrors at both ends, and was then folded back
        folded = [low + reach - abs((way - low) % (2 * reach) - reach) for way in straight]
        bounces = sum(abs(math.floor((way - low) / reach)) for way in straight)
        return shape._replace(x=folded[0], y=folded[1]), bounces

    def get(self, i, rng=None):
        """Item i -> (3, F, S, S) uint8. Drawn 4 times as large and averaged down, which smooths the edges."""
        movie, side, frames = self.factors(i), 4 * self.image_size, []
        for frame in range(self.frames):
            canvas = Image.new("RGB", (side, side), BACKGROUNDS[movie.background])
            draw = ImageDraw.Draw(canvas)
            for mover in reversed(movie.movers):
                draw_shape(draw, self.place(mover, frame)[0], side)
            frames.append(to_bytes(canvas.reduce(4)))
        return torch.stack(frames, 1)                                             # (3, F, S, S)


# ---------------------------------------------------------------------------------------------------------------
# Folder


MEMORY_BYTES = 2**30       # a set that takes less than this once made small,
MEMORY_PIXELS = 2 * 10**9  # and has fewer pixels to decode (well under a minute of it), is read once and kept


class Folder:
    """Every image under `root`, hidden files apart. Class = the first sub-folder ("." for images in the root itself).

    Captions: captions.json in the root, {"cats/1.png": "a cat"}, or a .txt beside the image, or else "". They are kept
    as they are: for a prior, "Cat" is another word than "cat". The content of a file decides whether it is an image.
    What cannot be read is named on stderr, left out and listed in `skipped`; of a large set only the headers are
    checked, so there a file broken further on makes get() raise `UserError` (and `Stream` take the next file).
    Augmented: a square of 80-100 % of the area of the largest one, anywhere; mirrored half of the time.
    """

    def __init__(self, root, image_size, split="train", augment=True):
        self.root, self.image_size, self.augment, self.skipped = root, image_size, augment, []
        self.stored_side = math.ceil(image_size / math.sqrt(0.8))  # the smallest crop then has image_size pixels
        paths = list_files(root)
        if len(paths) > 50_000:  # a few seconds of it, and minutes for a million
            say_once(f"{root}: reading the headers of {len(paths):,} files")
        headers = self._usable(paths, self._header)                # {path: ((width, height), mark)}
        self.captions = read_captions(root, headers)
        self.folders = sorted({first_folder(path) for path in headers})  # of both splits, so that labels agree
        self.classes = [clean(folder) for folder in self.folders]
        self.paths = split_paths(list(headers), split, self._copies(headers))
        pixels = {path: math.prod(headers[path][0]) for path in self.paths}
        stored = sum(3 * n * min(1, self.stored_side / min(headers[path][0])) ** 2 for path, n in pixels.items())
        self.memory = {}
        if stored < MEMORY_BYTES and sum(pixels.values()) < MEMORY_PIXELS:
            self.memory = self._usable(self.paths, self._read)
            self.paths = list(self.memory)
        report_skipped(root, self.skipped)
        if not self.paths:
            raise UserError(f"{root}: no readable image in this folder (split {split})")

    def __len__(self):
        return len(self.paths)

    def label(self, i):
        return self.folders.index(first_folder(self.paths[i]))

    def caption(self, i):
        path = self.paths[i]
        beside = os.path.join(self.root, os.path.splitext(path)[0] + ".txt")
        return clean(self.captions[path] if path in self.captions else read_text(beside))

    def get(self, i, rng=None):
        """Item i -> (3, S, S) uint8. Read from memory or from disk, the result is the same."""
        path = self.paths[i]
        pixels = self.memory[path] if path in self.memory else self._read(path)      # (H, W, 3)
        if not self.augment:
            return to_bytes(pixels)
        image = Image.fromarray(pixels)
        side = min(image.size) * math.sqrt(rng.uniform(0.8, 1))
        x, y = (rng.uniform(0, length - side) for length in image.size)
        image = image.resize((self.image_size, self.image_size), BICUBIC, box=(x, y, x + side, y + side))
        return to_bytes(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image)

    def _usable(self, paths, read):
        """{path: read(path)} for those that can be read; the messages of the others go to `skipped`."""
        results = {}
        for path in paths:
            try:
                results[path] = read(path)
            except UserError as error:
                self.skipped.append(str(error))
        return results

    def _header(self, path):
        """((width, height), a mark that equal files share)."""
        path = os.path.join(self.root, path)
        with opened(path) as image, open(path, "rb") as file:
            return image.size, (os.path.getsize(path), zlib.crc32(file.read(2**14)))

    def _copies(self, headers):
        """{path: hash of the content} for the files that share their mark with others, and so may be copies of them."""
        counts, contents = collections.Counter(mark for _, mark in headers.values()), {}
        for path, (_, mark) in headers.items():
            if counts[mark] > 1:
                with open(os.path.join(self.root, path), "rb") as file:
                    contents[path] = hashlib.sha256(file.read()).digest()
        extra = len(contents) - len(set(contents.values()))
        if extra:
            say_once(f"{self.root}: {extra} of {len(headers)} images are copies of others; they go to the same split")
        return contents

    def _read(self, path):
        """Decode one file -> (H, W, 3) uint8: final where nothing is augmented, else as small as the crops allow."""
        image = read_image(os.path.join(self.root, path))
        if not self.augment:
            return np.asarray(fit(image, self.image_size))                           # (S, S, 3)
        ratio = self.stored_side / min(image.size)
        if ratio < 1:
            image = image.resize([max(self.stored_side, round(length * ratio)) for length in image.size], BICUBIC)
        return np.asarray(image)                                                     # (H, W, 3)


class Films(Folder):
    """Every film under `root`: mp4 and the like (they need the package av), animations, and sub-folders of frames.

    An item is a film, cut to its centre at 8 frames a second: of training `frames` of it in a row, which `rng` picks,
    held out or without `rng` the first ones. Classes, captions and the held-out tenth are those of `Folder`; nothing is
    mirrored, for "left" would become "right". What cannot be read, or is too short, is named on stderr and left out.

    Opening decodes every film once: an hour of it in about 3 minutes at 320 x 240 pixels, 12 at 1280 x 720. Frames are
    kept, made small, until they fill MEMORY_BYTES: 12 hours at 32 x 32, 11 minutes at 256 x 256. Of the other films
    get() decodes all up to the end of the window each time: cut long ones into pieces.
    """

    def __init__(self, root, image_size, split="train", frames=17):
        self.root, self.image_size, self.split, self.frames = root, image_size, split, frames
        self.films, self.skipped = read_films(root, image_size, frames)
        self.captions = read_captions(root, self.films)
        self.folders = sorted({first_folder(path) for path in self.films})
        self.classes = [clean(folder) for folder in self.folders]
        self.paths = split_paths(list(self.films), split)
        report_skipped(root, self.skipped)
        if not self.paths:
            raise UserError(f"{root}: holds no film of {frames} frames at {FPS} a second that can be read; expected "
                            f"mp4 or the like, animated GIF, WebP or PNG, or sub-folders of frames")

    def get(self, i, rng=None):
        """Item i -> (3, F, S, S) uint8."""
        count, frames = self.films[self.paths[i]]
        first = 0 if rng is None or self.split == "held_out" else int(rng.integers(count - self.frames + 1))
        frames = frames or frames_of(os.path.join(self.root, self.paths[i]), self.image_size)
        return torch.stack(list(itertools.islice(frames, first, first + self.frames)), 1)  # (3, F, S, S)


@functools.lru_cache(maxsize=1)  # both splits, and every part of a command, open the same folder
def read_films(root, image_size, least):
    """Decode the films under `root` -> {path: (n, frames)}, messages: one for each file that is left out.

    n, at least `least`: how many frames a film has; frames: all of them, (3, S, S) uint8, or [] where memory was full.
    """
    films, (paths, skipped) = {}, list_films(root)
    room = MEMORY_BYTES // (3 * image_size**2)  # so many frames may still be kept
    if len(paths) > 100:
        say_once(f"{root}: reading {len(paths):,} films")
    for path in paths:
        try:
            reader = frames_of(os.path.join(root, path), image_size)
            kept = list(itertools.islice(reader, room))
            n = len(kept) + sum(1 for _ in reader)
            if n < least:
                raise UserError(f"{os.path.join(root, path)}: holds {n} frame{'s' * (n > 1)} at {FPS} a second, "
                                f"expected at least {least}")
        except UserError as error:
            skipped.append(str(error))
        else:
            films[path] = n, kept if len(kept) == n else []
            room -= len(films[path][1])
    return films, skipped


def list_films(root):
    """Relative paths of films under `root`, sorted, and a message for each file that is none.

    A film is a file that ends in .mp4 or the like, an animation, or a folder below the root that holds images and none
    of these. What a file holds decides whether it is an animation, so the headers of all images are read.
    """
    films, skipped, folders = [], [], {}
    for path in list_files(root):
        folders.setdefault(os.path.dirname(path), []).append(path)
    for folder, paths in folders.items():
        moving, still = [], []
        for path in paths:
            if path.lower().endswith(FILMS):
                moving.append(path)
                continue
            try:
                with opened(os.path.join(root, path)) as image:
                    (moving if getattr(image, "is_animated", False) else still).append(path)
            except UserError as error:
                skipped.append(str(error))
        if folder and still and not moving:
            moving = [folder]
        else:
            skipped += [f"{os.path.join(root, path)}: a single image, expected a film" for path in still]
        films += moving
    return sorted(films), skipped


def list_files(root):
    """Relative paths ("/" between folders), sorted: all but hidden files, .txt and .json.

    Links are followed, but each folder is read once, however many lead to it: a circle of links ends.
    """
    found, seen, folders = [], set(), collections.deque([""])
    while folders:
        folder = folders.popleft()  # "", "cats/", "dogs/big/"; links to folders come last
        here = os.path.realpath(os.path.join(root, folder))
        try:
            names = [] if here in seen else sorted(os.listdir(here))
        except OSError as error:
            report_skipped(root, [f"{here}: {error.strerror}"])
            continue
        seen.add(here)
        for name in (name for name in names if not name.startswith(".")):
            path = os.path.join(here, name)
            if os.path.isdir(path):
                (folders.append if os.path.islink(path) else folders.appendleft)(f"{folder}{name}/")
            elif not name.lower().endswith((".txt", ".json")) and (os.path.isfile(path) or not os.path.exists(path)):
                found.append(folder + name)  # also a link that leads nowhere, so that it is named; no pipe or device
    return sorted(found)


def first_folder(path):
    return path.split("/")[0] if "/" in path else "."


def split_paths(paths, split, contents={}):
    """The paths of one split. Held out are hashes in the lowest tenth: adding a file to the folder moves no other one.

    `contents` {path: content} says which are copies of one image: they go where the first one goes. In a small folder a
    side could be empty, and then gets one image; a single image is in both splits.
    """
    first = {}  # of each content
    leader = {path: first.setdefault(contents.get(path, path), path) for path in paths}
    if len(first) < 2:
        return paths
    score = {path: int(hashlib.sha256(os.fsencode(path)).hexdigest()[:8], 16) / 2**32 for path in first.values()}
    count = sum(value < 0.1 for value in score.values())  # scores are in [0, 1)
    held_out = set(sorted(score, key=score.get)[:min(max(count, 1), len(score) - 1)])
    return [path for path in paths if (leader[path] in held_out) == (split == "held_out")]


def read_captions(root, paths):
    """The captions.json of a folder, {path: caption}, or {}. Says on stderr which names are not in `paths`."""
    name = os.path.join(root, "captions.json")
    captions = read_json(name) if os.path.exists(name) else {}
    if not isinstance(captions, dict):
        raise UserError(f"{name}: expected one object, {{relative path: caption}}")
    for path, caption in captions.items():
        if not isinstance(caption, str):
            raise UserError(f"{name}: the caption of {shown(path)} is {shown(caption)}, expected a text")
    strange = [path for path in captions if path not in paths]
    if strange and paths:
        say_once(f"{name}: {len(strange)} of {len(captions)} names are of no image in this folder, such as "
                 f"{shown(strange[0])}; expected names such as {shown(min(paths))}")
    return captions


def read_text(path):
    """The words of a text file, at most 64 KiB of them, in UTF-8 or what Windows calls Unicode; "" if there is none."""
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        data = file.read(2**16)
    return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", "replace").strip()


def clean(text):
    """A text without lone surrogates, Python's stand-ins for bytes that are not UTF-8: no file could hold them."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


@functools.cache  # both splits, and every part of a command, open the same folder
def say_once(message):
    """Print a line on stderr, once a process."""
    print(message, file=sys.stderr)


NAMED = set()  # unreadable files already named


def report_skipped(root, messages):
    """Name each unreadable file once a process, at most 10 of them, and say how many there are."""
    fresh = [message for message in messages if message not in NAMED]
    NAMED.update(fresh)
    for message in fresh[:10]:
        print("skipped", message, file=sys.stderr)
    if fresh:
        print(f"{root}: {len(fresh)} unreadable in all, skipped", file=sys.stderr)


def files_digest(dataset):
    """A hash of the files a data set reads, their paths and sizes: what was made of others is not taken for it."""
    paths = dataset.paths if isinstance(dataset, Folder) else []
    def size(path):  # of a film that is a folder: that of its frames
        return sum(map(size, os.scandir(path))) if os.path.isdir(path) else os.path.getsize(path)
    files = [(path, size(os.path.join(dataset.root, path))) for path in paths]
    return hashlib.sha256(repr(files).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# The training stream


class Stream(Dataset):
    """Position p = 0, 1, 2, ... in endless training -> (image (3, S, S) uint8, label, index), by (seed, p) alone.

    With a `Cached` in place of a data set, the "image" is what was made of it: latents (C, h, w) or tokens (K,).
    """

    def __init__(self, dataset, seed):
        self.dataset, self.seed, self.epoch = dataset, seed, -1

    def __getitem__(self, position):
        epoch, place = divmod(position, len(self.dataset))
        if epoch != self.epoch:  # shuffled anew each time round
            self.order, self.epoch = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.dataset)), epoch
        rng = np.random.default_rng((self.seed, 1, position))
        image, index = get_readable(self.dataset, int(self.order[place]), rng)
        return image, self.dataset.label(index), index


def get_readable(dataset, i, rng):
    """Item i -> (image, i); a file that turns out broken is named, and the next one takes its place."""
    n = len(dataset)
    for index in itertools.chain(range(i, n), range(i)):
        try:
            return dataset.get(index, rng), index
        except UserError as error:
            print("skipped", error, file=sys.stderr)
    raise UserError("no image of the data set can be read any more")


def spread_rows(dataset, count):
    """`count` places evenly spread over a data set (which may be sorted by class), or all: a list of n."""
    n = min(count, len(dataset))
    return [i * len(dataset) // n for i in range(n)]


def spread(dataset, count):
    """The images at `spread_rows`, (n, 3, S, S) in [-1, 1], and their places: of one that cannot be read, the next."""
    rng = np.random.default_rng(0)
    images, rows = zip(*(get_readable(dataset, i, rng) for i in spread_rows(dataset, count)))
    return to_float(torch.stack(images)), rows                                    # (n, 3, S, S)


def ignore_signals(worker):
    """Ctrl-C and a batch system's SIGTERM reach every process: workers go on, so that the main one can save."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def batches(dataset, batch_size, seed, run, start_step=0, workers=0):
    """Endless iterator of (images (b, 3, S, S) uint8, labels (b,), indices (b,)) for this rank, from `start_step` on.

    `batch_size` is that of all ranks together; rank r takes the r-th part of each batch, b = batch_size // world.
    Whatever fails in a worker process raises `UserError` here.
    """
    b = batch_size // run.world
    starts = (step * batch_size + run.rank * b for step in itertools.count(start_step))
    loader = DataLoader(
        Stream(dataset, seed), batch_sampler=(range(start, start + b) for start in starts), num_workers=workers,
        pin_memory=run.device.type == "cuda", worker_init_fn=ignore_signals,
        generator=torch.Generator())  # else it draws from torch's global state, and a resumed run would see other noise
    return one_sentence(iter(loader), workers)  # one endless epoch: worker processes start once


def one_sentence(iterator, workers):
    """A loader's iterator, where an error in one of its worker processes becomes a `UserError`, and none outlives us.

    Python waits for its child processes when it ends, and these ignore SIGTERM: they have to be killed first.
    """
    processes = getattr(iterator, "_workers", [])
    if hasattr(signal, "SIGCHLD"):  # torch would raise wherever we are, even at exit; the next batch tells as well
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def end():
        for process in processes:
            process.kill()
    atexit.register(end)

    def items():
        try:
            yield from iterator
        except Exception as error:
            if not workers:
                raise
            end()  # the loader, when it goes, would wait ten seconds for each
            last = str(error).strip().splitlines()[-1]  # of a traceback
            raise UserError(last.split("UserError: ")[-1] if "UserError: " in last else
                            f"--workers {workers}: a process that loads images failed ({shown(last)}); "
                            f"with --workers 0 there is more to see") from None
    return items()


# ---------------------------------------------------------------------------------------------------------------
# What a frozen model made of each image, computed once


class Cached:
    """What a frozen model makes of `views` versions of every image, computed once: a data set whose "images" are that.

    Lies in `path`, a .npy file (views·n, ...) that is memory-mapped: a set larger than RAM works. Row v·n + i is
    version v of image i. Beside it <path>.json says who made it, and how many rows are done: if stopped, it goes on.

    shape, dtype: of what is made of one image. made_by: all that decides the values, {name: plain value}. first: a data
    set of the images as they are, for version 0, which then is half of all that `get` gives (all, if views is 1): what
    a model is asked for later is not moved or tinted. labels, captions: of the images, where they are needed.
    Raises `UserError` if the file was made by something else or is damaged, if another process is writing it, or if the
    disk has no room for it.
    """

    def __init__(self, path, dataset, views, shape, dtype, made_by, run, seed, first=None, labels=None, captions=None):
        self.path, self.n, self.views, self.seed, self.run = path, len(dataset), views, seed, run
        self.dataset, self.first, self.classes = dataset, first or dataset, dataset.classes
        self.labels, self.captions = labels, captions
        self.shape, self.dtype, self.rows = (self.n * views, *shape), np.dtype(dtype), None
        self.made_by = {**made_by, "images": self.n, "views": views, "seed": seed, "files": files_digest(dataset),
                        **({"plain": True} if first is not None else {})}
        self.state = {"made_by": self.made_by, "done": 0, "replaced": []}
        self.state_path = path + ".json"

    def fill(self, make, what, later=lambda: 0.0):
        """Make what is missing: make(images uint8 (b, 3, S, S), first row) -> array (b, ...), in parts of 64 rows.

        what: its name, shown. later(): seconds that the parts after this one take, for the ETA of all.
        """
        busy = f"{self.path}: another process is writing it; wait for it"
        with locked(self.path + ".lock", busy) if self.run.is_main else nullcontext():
            self._begin()
            done, total, slab = self.state["done"], self.shape[0], 64 * self.run.world
            replaced = dict(self.state["replaced"])
            store, later = (self._open("r+"), later()) if done < total else (None, 0.0)
            seconds = said = time.time()
            if done < total and self.run.is_main:
                size = f"{store.nbytes / 2**20:,.0f} MiB"
                print(f"{what} {total - done:,} views, kept in {self.path} ({size})", flush=True)
            try:
                for start in range(done, total, slab):
                    self._make_part(store, start + 64 * self.run.rank, make, replaced)
                    end = min(start + slab, total)
                    if end == total or (end // slab) % 4 == 0:
                        replaced = self._save_progress(store, end, replaced)
                    if self.run.is_main and (time.time() - said > 20 or end == total):
                        said, rate = time.time(), (end - done) / (time.time() - seconds)
                        print(f"{what} {end:,} of {total:,}  eta {clock((total - end) / rate + later)}", flush=True)
            except KeyboardInterrupt:
                if self.run.world == 1:
                    self._save_progress(store, start, replaced)
                print(f"{what} stopped at {self.state['done']:,} of {total:,}; the same command goes on", flush=True)
                raise
        self.rows = None
        self.replaced = dict(self.state["replaced"])  # {image that could not be read: the one in its place}

    def _begin(self):
        """Check the files, or make new ones."""
        if os.path.exists(self.state_path):
            state = read_json(self.state_path)
            made_by = state.get("made_by") if isinstance(state, dict) else None
            for name, value in self.made_by.items():
                old = made_by.get(name) if isinstance(made_by, dict) else None
                if old != json.loads(json.dumps(value)):
                    both = "" if len(str(value)) > 40 else f" ({shown(old)}, not {value})"  # a digest tells nobody much
                    raise UserError(f"{self.path}: was made with another {name}{both}; delete it and "
                                    f"{self.state_path}, or have this one written elsewhere")
            done, replaced = state.get("done"), state.get("replaced")
            pairs = isinstance(replaced, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in replaced)
            if not pairs or type(done) is not int or not 0 <= done <= self.shape[0] \
                    or any(type(i) is not int or not 0 <= i < self.n for pair in replaced for i in pair):
                raise UserError(f"{self.state_path}: damaged; delete it and {self.path}")
            self.state = state
        barrier(self.run)  # all have looked
        if self.run.is_main and not os.path.exists(self.state_path):
            sweep(*os.path.split(self.path))
            with replacing(self.path) as temporary:
                store = np.lib.format.open_memmap(temporary, "w+", self.dtype, self.shape)
                if hasattr(os, "posix_fallocate"):  # a memory map of a file with holes would kill us on a full disk
                    with open(temporary, "r+b") as file:
                        os.posix_fallocate(file.fileno(), 0, os.path.getsize(temporary))
                store.flush()
            write_json(self.state_path, self.state)
        barrier(self.run)  # the files are there
        self._open("r")

    def _open(self, mode):
        """The memory map; raises `UserError` for a file that is not what `shape` and `dtype` say."""
        try:
            rows = np.load(self.path, mmap_mode=mode)
        except Exception as error:  # NumPy's parser raises half a dozen types
            raise UserError(f"{self.path}: cannot be read ({shown(str(error))}); delete it and "
                            f"{self.state_path}") from None
        if not isinstance(rows, np.ndarray) or rows.shape != self.shape or rows.dtype != self.dtype:
            raise UserError(f"{self.path}: is no array of {self.dtype} {self.shape}; delete it and {self.state_path}")
        return rows

    def _make_part(self, store, start, make, replaced):
        """Fill at most 64 rows from `start` on; what could not be read and was replaced goes to `replaced`."""
        rows = range(start, min(start + 64, len(store)))
        if not rows:
            return
        read = [get_readable(self.first if row < self.n else self.dataset, row % self.n,
                             np.random.default_rng((self.seed, row))) for row in rows]
        replaced.update({row % self.n: source for row, (_, source) in zip(rows, read) if source != row % self.n})
        store[rows.start:rows.stop] = make(torch.stack([image for image, _ in read]), start)  # of (64, 3, S, S) uint8

    def _save_progress(self, store, end, replaced):
        """Say on the disk that rows up to `end` are whole; returns what all processes have replaced."""
        store.flush()
        if self.run.world > 1:
            everyones = [None] * self.run.world
            dist.all_gather_object(everyones, replaced)  # waits, too: all have written up to here
            replaced = {i: source for one in everyones for i, source in one.items()}
        self.state = {**self.state, "done": end, "replaced": sorted(map(list, replaced.items()))}
        if self.run.is_main:
            write_json(self.state_path, self.state)
        barrier(self.run)
        return replaced

    def __getstate__(self):  # a worker process opens the file itself; pickling the map would copy all of it
        return {**self.__dict__, "rows": None}

    def __len__(self):
        return self.n

    def label(self, i):
        return self.labels[self.replaced.get(i, i)] if self.labels else 0

    def caption(self, i):
        return self.captions[self.replaced.get(i, i)] if self.captions else ""

    def get(self, i, rng):
        """What was made of a version of image i that `rng` picks, (...): float32, or int64."""
        if self.rows is None:
            self.rows = self._open("r")
        more = max(0, self.views - 2) if self.first is not self.dataset else 0  # version 0 as often as all others
        version = max(0, int(rng.integers(self.views + more)) - more)
        row = self.rows[version * self.n + i]                                     # (...)
        return torch.from_numpy(row.astype(np.float32 if self.dtype.kind == "f" else np.int64))


if __name__ == "__main__":
    emoji, shapes, rng = Emoji(64), Shapes(64), np.random.default_rng(0)
    picked = [int(i) for i in rng.permutation(len(emoji))[:8]]
    rows = [[emoji.get(i, rng) for i in picked] for _ in range(3)]
    rows += [[shapes.get(8 * row + i) for i in range(8)] for row in range(3)]
    save_grid("out/data.png", [[to_float(image) for image in row] for row in rows])
    print("emoji:", *(f"{emoji.caption(i)} ({emoji.classes[emoji.label(i)]})" for i in picked), sep="\n  ")
    print("shapes:", *(shapes.caption(i) for i in range(8)), sep="\n  ")
    loader = batches(emoji, 16, seed=0, run=Run(torch.device("cpu")))
    images, labels, indices = next(loader)
    print("a batch:", tuple(images.shape), images.dtype, labels.tolist())
    print("out/data.png: three rows of emoji, each augmented three times, and three rows of shapes")
