"""
Images to learn from: the embedded emoji, endless drawn shapes, or any folder. They all look the same from outside.

    emoji | shapes | path/to/folder --open_data--> dataset.get(i, rng)  (3, S, S) uint8   .label(i)  .caption(i)
    dataset --batches--> images (b, 3, S, S) uint8, labels (b,), indices (b,) --to_float, on the device--> [-1, 1]

Not in the paper, which trains on ImageNet-1k and DFN: those are the folder here; the other two need no download.
The training stream is a pure function of (seed, position): resuming and splitting over GPUs need no state at all.

    python data.py          # 5 s on a CPU: writes out/data.png and prints the captions
Next: vae.py or model.py, which learn from these.
"""
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import signal
import sys

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset

from common import Run, UserError, read_json
from images import fit, opened, read_image, save_grid, to_float

ASSETS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets")
BICUBIC = Image.Resampling.BICUBIC


def open_data(data, image_size, split="train", augment=True, seed=0):
    """"emoji", "shapes" or the path of a folder -> a dataset; `split` is "train" or "held_out".

    The held-out tenth is the same whatever the seed. Every dataset has len(), `classes` (a list of names),
    label(i) -> int, caption(i) -> str, and get(i, rng) -> (3, S, S) uint8, where the numpy generator `rng` decides the
    augmentation (None will do with augment=False).
    """
    if split not in ("train", "held_out"):
        raise UserError(f"split {split!r}: expected train or held_out")
    if data == "emoji":
        return Emoji(image_size, split, augment)
    if data == "shapes":
        return Shapes(image_size, split, seed)
    if os.path.isdir(data):
        return Folder(data, image_size, split, augment)
    raise UserError(f"--data {data}: expected emoji, shapes or an existing folder")


def to_bytes(pixels):
    """PIL image or (H, W, 3) array -> (3, H, W) uint8 tensor."""
    return torch.from_numpy(np.array(pixels, dtype=np.uint8).transpose(2, 0, 1).copy())  # (3, H, W)


# ---------------------------------------------------------------------------------------------------------------
# Emoji


TILE = 64     # pixels of one emoji in assets/emoji64.webp
MARGIN = 12   # white added around it, room for the augmentation: TILE / 2 · (1 / 0.85 - 1) + 4 < 10 pixels

# A mirrored letter, clock, map, moon phase, flag or pointing hand is wrong or means something else, and so is a mirrored
# "facing right". So mirroring is the exception: these, where left and right carry no meaning.
MIRROR_CATEGORIES = ("animals-and-nature", "food-and-drink")
MIRROR_SUBCATEGORIES = ("face-smiling", "face-affection", "face-tongue", "face-concerned", "face-costume", "face-glasses",
                        "cat-face", "monkey-face", "person", "person-fantasy", "clothing", "tool", "science")


@functools.cache
def emoji_tiles():
    """The whole embedded set, decoded once a process -> (tiles (1911, 88, 88, 3) uint8, list of 1911 records)."""
    records = read_json(os.path.join(ASSETS, "emoji64.json"))["items"]
    sheet = np.asarray(read_image(os.path.join(ASSETS, "emoji64.webp")))
    rows, columns = sheet.shape[0] // TILE, sheet.shape[1] // TILE
    tiles = sheet.reshape(rows, TILE, columns, TILE, 3).swapaxes(1, 2)               # (rows, columns, 64, 64, 3)
    tiles = tiles.reshape(-1, TILE, TILE, 3)[:len(records)]                          # (1911, 64, 64, 3)
    room = (MARGIN, MARGIN)
    return np.pad(tiles, ((0, 0), room, room, (0, 0)), constant_values=255), records  # (1911, 88, 88, 3)


class Emoji:
    """The 1,911 Noto emoji in assets/. Class = category (10 of them); also `subcategories` and subcategory(i).

    Held out: every tenth of the list sorted by category and subcategory, so both splits have the same mix (a hash would
    leave small kinds out by chance). A held-out orange heart has a red one in training: it asks for recombination.
    """

    def __init__(self, image_size, split="train", augment=True):
        self.tiles, records = emoji_tiles()
        self.image_size, self.augment = image_size, augment
        ranked = sorted(range(len(records)), key=lambda i: (records[i]["category"], records[i]["subcategory"], i))
        self.members = sorted(i for rank, i in enumerate(ranked) if (rank % 10 == 5) == (split == "held_out"))
        self.records = [records[i] for i in self.members]
        self.classes = sorted({record["category"] for record in records})
        self.subcategories = sorted({record["subcategory"] for record in records})

    def __len__(self):
        return len(self.members)

    def label(self, i):
        return self.classes.index(self.records[i]["category"])

    def subcategory(self, i):
        return self.subcategories.index(self.records[i]["subcategory"])

    def caption(self, i):
        return self.records[i]["caption"]

    def may_mirror(self, i):
        record = self.records[i]
        return record["category"] in MIRROR_CATEGORIES or record["subcategory"] in MIRROR_SUBCATEGORIES

    def get(self, i, rng):
        """Item i -> (3, S, S) uint8. Augmented: moved up to 4 pixels, scaled 0.85-1.1, perhaps mirrored, perhaps tinted."""
        scale, dx, dy = (rng.uniform(0.85, 1.1), *rng.uniform(-4, 4, 2)) if self.augment else (1, 0, 0)
        x, y, half = TILE / 2 + MARGIN + dx, TILE / 2 + MARGIN + dy, TILE / 2 / scale
        # crop, shift, scale and the change to S pixels are one antialiased resampling
        image = Image.fromarray(self.tiles[self.members[i]]).resize(
            (self.image_size, self.image_size), BICUBIC, box=(x - half, y - half, x + half, y + half))
        pixels = np.asarray(image)                                                   # (S, S, 3)
        if self.augment and rng.random() < 0.5 and self.may_mirror(i):
            pixels = pixels[:, ::-1]
        if self.augment and rng.random() < 0.3:
            # The emoji come without their alpha, so the white behind one cannot be replaced cleanly. A light colour laid
            # over everything tints the white most, and the model does not learn that a background is always 255.
            pixels = pixels * rng.uniform(0.85, 1, 3)
        return to_bytes(pixels)


# ---------------------------------------------------------------------------------------------------------------
# Shapes


def _star():
    turns = np.arange(10) * math.pi / 5
    radius = np.where(np.arange(10) % 2, 0.45, 1.08)
    return np.stack([radius * np.sin(turns), -radius * np.cos(turns)], 1)            # (10, 2)


def _heart():
    t = np.linspace(0, 2 * math.pi, 120)
    return np.stack([16 * np.sin(t) ** 3, -13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t)], 1) / 16


# Corners in units of the radius, y downwards; circle and ring are drawn as ellipses.
POLYGONS = {
    "square": np.array([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]),
    "triangle": np.array([(0, -1), (1, 0.8), (-1, 0.8)]),
    "star": _star(),
    "heart": _heart(),
    "cross": np.array([(-.35, -1), (.35, -1), (.35, -.35), (1, -.35), (1, .35), (.35, .35),
                       (.35, 1), (-.35, 1), (-.35, .35), (-1, .35), (-1, -.35), (-.35, -.35)]),
    "diamond": np.array([(0, -1.1), (0.7, 0), (0, 1.1), (-0.7, 0)]),
}
KINDS = ["circle", "ring", *POLYGONS]
COLOURS = {"red": (220, 40, 40), "orange": (245, 140, 30), "yellow": (245, 210, 40), "green": (50, 160, 70),
           "blue": (40, 90, 215), "purple": (135, 60, 175), "pink": (240, 120, 180), "brown": (130, 80, 45)}
LIGHT = {"white": (255, 255, 255), "light grey": (215, 215, 215), "light blue": (190, 220, 245),
         "light green": (200, 235, 200), "cream": (250, 240, 205), "light pink": (250, 215, 225)}
DARK = {"black": (15, 15, 15), "dark grey": (65, 65, 70), "dark blue": (20, 30, 80), "dark green": (15, 65, 40)}
BACKGROUNDS = LIGHT | DARK
RADII = {"small": 0.17, "medium": 0.23, "large": 0.29}  # of the image's side; at 32 px a smaller star would be a blot
EXTRA_KINDS = ["circle", "square", "triangle"]          # what a few pixels can still show
PLACES = ["in the top left", "at the top", "in the top right", "on the left", "in the centre", "on the right",
          "in the bottom left", "at the bottom", "in the bottom right"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """One object: x, y (of its centre) and radius in units of the image's side, y downwards."""
    kind: str
    colour: str
    x: float
    y: float
    radius: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """Everything there is to know about one picture of `Shapes`."""
    main: Shape
    size: str            # a key of RADII
    place: str           # an entry of PLACES
    background: tuple    # one name, or two for a gradient from top to bottom
    extras: tuple        # 0 to 3 small `Shape`s, never touching the main one or each other


class Shapes:
    """Drawn scenes whose true factors are known: `factors(i)` -> Scene. Class = the kind of the main shape.

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
        return KINDS.index(self.factors(i).main.kind)

    def caption(self, i):
        """For example "a large red star in the top left on a light blue background with two small objects"."""
        scene = self.factors(i)
        where = " to ".join(scene.background) + (" gradient" if len(scene.background) == 2 else " background")
        count = ["", " with one small object", " with two small objects", " with three small objects"][len(scene.extras)]
        return f"a {scene.size} {scene.main.colour} {scene.main.kind} {scene.place} on a {where}{count}"

    def factors(self, i):
        """Item i -> Scene."""
        rng = np.random.default_rng((*self.key, i))
        def pick(names):
            return names[rng.integers(len(names))]
        kind, size, row, column = pick(KINDS), pick(list(RADII)), rng.integers(3), rng.integers(3)
        radius = RADII[size] * rng.uniform(0.92, 1.08)
        # The reach of the centre, cut in 3 x 3 places with a gap between them, so that a place is never a matter of opinion
        low, reach = 1.12 * radius, 1 - 2 * 1.12 * radius
        x, y = (low + reach * (cell + rng.uniform(0.1, 0.9)) / 3 for cell in (column, row))
        side = pick([list(LIGHT), list(DARK)])
        background = tuple(dict.fromkeys([pick(side), pick(side)]) if rng.random() < 0.4 else [pick(side)])
        colours = [name for name in COLOURS if all(contrast(name, b) > 125 for b in background)]
        main = Shape(kind, pick(colours), x, y, radius)
        extras, wanted = [], rng.integers(4)
        while len(extras) < wanted:  # even beside the largest shape a corner is free, and three fit
            extra = Shape(pick(EXTRA_KINDS), pick(colours), *rng.uniform(0.09, 0.91, 2), 0.07)
            if all(math.hypot(extra.x - s.x, extra.y - s.y) > 1.25 * (extra.radius + s.radius) for s in [main, *extras]):
                extras.append(extra)
        return Scene(main, size, PLACES[3 * row + column], background, tuple(extras))

    def get(self, i, rng=None):
        """Item i -> (3, S, S) uint8. Drawn 4 times as large and averaged down, which smooths the edges."""
        scene, side = self.factors(i), 4 * self.image_size
        canvas = Image.new("RGB", (1, len(scene.background)))
        for y, name in enumerate(scene.background):
            canvas.putpixel((0, y), BACKGROUNDS[name])
        canvas = canvas.resize((side, side), Image.Resampling.BILINEAR)  # one pixel: plain; two: a gradient downwards
        draw = ImageDraw.Draw(canvas)
        for shape in (*scene.extras, scene.main):
            draw_shape(draw, shape, side)
        return to_bytes(canvas.reduce(4))


def contrast(colour, background):
    """Distance of a named colour from a named background, in RGB levels."""
    return math.dist(COLOURS[colour], BACKGROUNDS[background])


def draw_shape(draw, shape, side):
    """Paint one `Shape` on a canvas of `side` pixels."""
    centre, radius = np.array([shape.x, shape.y]) * side, shape.radius * side
    if shape.kind in POLYGONS:
        draw.polygon([tuple(corner) for corner in centre + radius * POLYGONS[shape.kind]], fill=COLOURS[shape.colour])
    else:
        box = [*(centre - radius), *(centre + radius)]
        ring = shape.kind == "ring"
        draw.ellipse(box, fill=None if ring else COLOURS[shape.colour], outline=COLOURS[shape.colour],
                     width=round(0.4 * radius) if ring else 1)


# ---------------------------------------------------------------------------------------------------------------
# Folder


MEMORY_BYTES = 2**30       # a set that takes less than this once made small,
MEMORY_PIXELS = 2 * 10**9  # and has fewer pixels to decode (well under a minute of it), is read once and kept


class Folder:
    """Every image under `root`, hidden files apart. Class = the first sub-folder ("." for images lying in the root itself).

    Captions: captions.json in the root, {"cats/1.png": "a cat"}, or a .txt beside the image, or else "". The content of
    a file decides whether it is an image. What cannot be read is named on stderr, left out and listed in `skipped`; of a
    large set only the headers are checked, so there a file broken further on makes get() raise `UserError`
    (and `Stream` take the next file).
    Augmented: a square of 80-100 % of the area of the largest one, anywhere; mirrored half of the time unless flip=False.
    """

    def __init__(self, root, image_size, split="train", augment=True, flip=True):
        self.root, self.image_size, self.augment, self.flip, self.skipped = root, image_size, augment, flip, []
        captions = os.path.join(root, "captions.json")
        self.captions = read_json(captions) if os.path.exists(captions) else {}
        if not isinstance(self.captions, dict):
            raise UserError(f"{captions}: expected one object, {{relative path: caption}}")
        self.stored_side = math.ceil(image_size / math.sqrt(0.8))  # the smallest crop then has image_size pixels
        sizes = self._usable(list_files(root), self._header)       # {path: (width, height)}
        self.classes = sorted({first_folder(path) for path in sizes})  # of both splits, so that labels agree
        self.paths = split_paths(list(sizes), split)
        pixels = {path: sizes[path][0] * sizes[path][1] for path in self.paths}
        stored = sum(3 * n * min(1, self.stored_side / min(sizes[path])) ** 2 for path, n in pixels.items())
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
        return self.classes.index(first_folder(self.paths[i]))

    def caption(self, i):
        beside = os.path.join(self.root, os.path.splitext(self.paths[i])[0] + ".txt")
        if self.paths[i] in self.captions:
            return str(self.captions[self.paths[i]])
        if not os.path.isfile(beside):
            return ""
        with open(beside, encoding="utf-8", errors="replace") as file:
            return file.read().strip()

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
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_bytes(image)

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
        with opened(os.path.join(self.root, path)) as image:
            return image.size

    def _read(self, path):
        """Decode one file -> (H, W, 3) uint8: final where nothing is augmented, else as small as the crops allow."""
        image = read_image(os.path.join(self.root, path))
        if not self.augment:
            return np.asarray(fit(image, self.image_size))                           # (S, S, 3)
        ratio = self.stored_side / min(image.size)
        if ratio < 1:
            image = image.resize([max(self.stored_side, round(length * ratio)) for length in image.size], BICUBIC)
        return np.asarray(image)                                                     # (H, W, 3)


NAMED = set()  # messages already printed: both splits, and every stage, open the same folder


def report_skipped(root, messages):
    """Name each unreadable file once a process, at most 10 of them, and say how many there are."""
    fresh = [message for message in messages if message not in NAMED]
    NAMED.update(fresh)
    for message in fresh[:10]:
        print("skipped", message, file=sys.stderr)
    if fresh:
        print(f"{root}: {len(fresh)} unreadable in all, skipped", file=sys.stderr)


def files_digest(dataset):
    """A hash of which files a data set reads, their paths and sizes in bytes, so that what was made of others is not taken for it."""
    files = [(path, os.path.getsize(os.path.join(dataset.root, path))) for path in dataset.paths] if isinstance(dataset, Folder) else []
    return hashlib.sha256(repr(files).encode()).hexdigest()


def list_files(root):
    """Relative paths ("/" between folders), sorted: what is not hidden and not text. Links to folders are not followed."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]  # os.walk goes into what is left here
        found += [os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/") for name in names
                  if not name.startswith(".") and not name.lower().endswith((".txt", ".json"))]
    return sorted(path for path in found if os.path.isfile(os.path.join(root, path)))


def first_folder(path):
    return path.split("/")[0] if "/" in path else "."


def split_paths(paths, split):
    """The paths of one split. Held out are hashes in the lowest tenth: adding a file to the folder moves no other one.

    In a small folder that could leave a side empty, which then gets one file; a single file is in both splits.
    """
    if len(paths) < 2:
        return paths
    score = {path: int(hashlib.sha256(os.fsencode(path)).hexdigest()[:8], 16) / 2**32 for path in paths}  # in [0, 1)
    by_score = sorted(paths, key=score.get)
    count = sum(score[path] < 0.1 for path in paths)
    held_out = set(by_score[:min(max(count, 1), len(paths) - 1)])
    return [path for path in paths if (path in held_out) == (split == "held_out")]


# ---------------------------------------------------------------------------------------------------------------
# The training stream


class Stream(Dataset):
    """Position p = 0, 1, 2, ... in endless training -> (image (3, S, S) uint8, label, index): a pure function of (seed, p).

    With the cached latents of train_tokenizer.py in place of a data set, the "images" are latents (C, h, w) float32.
    """

    def __init__(self, dataset, seed):
        self.dataset, self.seed, self.epoch = dataset, seed, -1

    def __getitem__(self, position):
        epoch, place = divmod(position, len(self.dataset))
        if epoch != self.epoch:  # shuffled anew each time round
            self.order, self.epoch = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.dataset)), epoch
        image, index = get_readable(self.dataset, int(self.order[place]), np.random.default_rng((self.seed, 1, position)))
        return image, self.dataset.label(index), index


def get_readable(dataset, i, rng):
    """Item i -> (image, i); a file of a large folder that turns out broken is named, and the next one takes its place."""
    n = len(dataset)
    for index in itertools.chain(range(i, n), range(i)):
        try:
            return dataset.get(index, rng), index
        except UserError as error:
            print("skipped", error, file=sys.stderr)
    raise UserError("no image of the data set can be read any more")


def spread(dataset, count):
    """`count` images evenly spread over a data set (which may be sorted by class), or all: (n, 3, S, S) in [-1, 1]."""
    n, rng = min(count, len(dataset)), np.random.default_rng(0)
    return to_float(torch.stack([get_readable(dataset, i * len(dataset) // n, rng)[0] for i in range(n)]))  # (n, 3, S, S)


def ignore_signals(worker):
    """Ctrl-C and a batch system's SIGTERM reach every process: the workers go on, so that the main one can save and end them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def batches(dataset, batch_size, seed, run, start_step=0, workers=0):
    """Endless iterator of (images (b, 3, S, S) uint8, labels (b,), indices (b,)) for this rank, from `start_step` on.

    `batch_size` is that of all ranks together; rank r takes the r-th part of each batch, b = batch_size // world.
    """
    if batch_size % run.world:
        raise UserError(f"--batch_size {batch_size} cannot be shared evenly by {run.world} processes")
    b = batch_size // run.world
    starts = (step * batch_size + run.rank * b for step in itertools.count(start_step))
    loader = DataLoader(
        Stream(dataset, seed), batch_sampler=(range(start, start + b) for start in starts), num_workers=workers,
        pin_memory=run.device.type == "cuda", worker_init_fn=ignore_signals,
        generator=torch.Generator())  # else it draws from torch's global state, and a resumed run would see other noise
    return iter(loader)  # one endless epoch: worker processes start once


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
