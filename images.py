"""
Image files in and out, and what one looks at: tensors and PIL images, PSNR, grids, animations, pages, training curves.

    file --read_image--> PIL RGB --fit, to_tensor--> (3, H, W) in [-1, 1] --to_image--> PIL RGB --save_grid--> PNG
                                                                                                --save_page--> HTML
    log.jsonl --save_curves--> PNG: loss, loss by t, PSNR by k, learning rate

    python images.py        # 1 s: draws the training curves of a shipped run, out/curves.png            Next: data.py
"""
import base64
import html
import io
import itertools
import json
import math
import os
import re
import warnings
from contextlib import contextmanager, suppress

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError

from common import UserError, read_log, replacing

# Only formats whose decoders stay inside Pillow: its EPS reader, for one, starts another program on the file.
# Beside each the bytes that a pixel takes at most while it is read: some decoders hold several copies of the image.
IMAGE_FORMATS = {"PNG": 8, "JPEG": 12, "WEBP": 16, "GIF": 8, "BMP": 8, "TIFF": 16, "PPM": 8, "JPEG2000": 24, "AVIF": 12}
MAX_BYTES = 2**32 // 3  # for reading one image; so 178,956,970 pixels of a PNG, where Pillow itself refuses all formats
warnings.filterwarnings("ignore", module=r"PIL\.")  # of damage in what is noted beside the pixels
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**27  # bytes: image generators write long prompts


@contextmanager
def opened(source):
    """Yield the image in `source` (a path or a binary file object) with its header read and its pixels not yet decoded.

    The content decides the format, not the file's name. Whatever fails, also inside the block, raises `UserError`.
    """
    name = str(source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", "image in memory"))
    name = (name if len(name) <= 150 else "..." + name[-147:]).replace("\n", "\\n").replace("\r", "\\r")
    try:
        with Image.open(source, formats=list(IMAGE_FORMATS)) as image:
            width, height = image.size
            most = MAX_BYTES // IMAGE_FORMATS.get(image.format, 16)
            if not 0 < width * height <= most:
                raise UserError(f"{name}: {width} x {height} pixels; at least 1 and at most {most:,} are read")
            yield image
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{name}: not an image in a format that is read here ({', '.join(IMAGE_FORMATS)})") from None
    except Exception as error:  # a damaged file makes Pillow raise OSError, SyntaxError, ValueError, struct.error, ...
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:100]
        raise UserError(f"{name}: cannot be read as an image ({reason or type(error).__name__})") from None


def read_image(source):
    """Path or binary file object -> PIL image, RGB, upright; of an animation the first frame; what is clear is white.

    Raises `UserError` for a file that is not an image, or damaged, or too large. Takes at most about 1.5 GB of memory.
    """
    with opened(source) as image:
        image.load()
        with suppress(Exception):  # a damaged EXIF block: the pixels are fine
            ImageOps.exif_transpose(image, in_place=True)  # cameras store "turn me" there and leave the pixels lying
        return _to_rgb(image)


def seek(image, number):
    """Go to a frame of an animation, which in GIF and TIFF may be larger than the first; ValueError if too large."""
    image.seek(number)
    if math.prod(image.size) > MAX_BYTES // 24:
        raise ValueError(f"frame {number + 1} has {image.width} x {image.height} pixels")


def _to_rgb(image):
    """A PIL image of any mode -> RGB, in tiles: of a whole large image the steps between would take gigabytes."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    see_through = image.info.get("transparency")  # of a PNG without alpha: the one colour that means "nothing here"
    if image.mode == "RGB" and isinstance(see_through, tuple) and max(see_through) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in see_through)  # 16 bits; Pillow keeps the upper 8
    full = None
    if image.mode == "F" or image.mode.startswith("I"):  # float, or integers wider than 8 bits: which value is white?
        top = max(float(np.nan_to_num(tile, posinf=0, neginf=0).max()) for _, tile in _tiles(image))
        # integers of 16 bits (65535 / 255 = 257), floats from 0 to 1 or to 255; or a unit of their own, if any is more
        full = max(top, 65535 if image.mode != "F" else 255 if top > 1 else 1)
    rgb = Image.new("RGB", image.size)
    for corner, tile in _tiles(image):
        rgb.paste(_tile_to_rgb(tile, full, see_through), corner)
    return rgb


def _tiles(image):
    """Yield ((left, top), PIL image) for the squares of 1,024 pixels that an image falls into."""
    side = 1024
    for left, top in itertools.product(range(0, image.width, side), range(0, image.height, side)):
        yield (left, top), image.crop((left, top, min(left + side, image.width), min(top + side, image.height)))


def _tile_to_rgb(image, full, see_through):
    """By hand what Pillow's convert would clip (16 bits and floats, of which `full` is white) or drop (alpha)."""
    if full is not None:
        values = np.nan_to_num(image, posinf=0, neginf=0)                         # (H, W), of their own type
        image = Image.fromarray((values.clip(0, full) * (255 / full)).round().astype(np.uint8))
        if isinstance(see_through, int):
            image.putalpha(Image.fromarray(np.where(values == see_through, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:  # an alpha channel, or one colour or palette entry declared transparent
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(image, size):
    """Scale the shorter side to `size` (an int, or (height, width)), cut the centre out: one antialiased resampling."""
    height, width = (size, size) if isinstance(size, int) else size
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def to_bytes(pixels):
    """PIL image or (H, W, 3) array -> (3, H, W) uint8 tensor."""
    return torch.from_numpy(np.array(pixels, dtype=np.uint8).transpose(2, 0, 1).copy())  # (3, H, W)


def to_tensor(image):
    """PIL RGB image -> (3, H, W) float32 in [-1, 1]."""
    return to_float(to_bytes(image))                                              # (3, H, W)


def to_float(images):
    """uint8 -> float32 in [-1, 1], any shape."""
    return (images.float() / 255 - 0.5) / 0.5


def check_images(images):
    """Return `images`. Raises ValueError for bytes, and for numbers far outside of [-1, 1], such as 0..255."""
    if not images.is_floating_point() or images.numel() and not images.abs().max() < 16:  # a model's may overshoot to 2
        low, high = (f"{bound.item():g}" for bound in images.aminmax())
        raise ValueError(f"images are {images.dtype} from {low} to {high}, expected floats in [-1, 1]; "
                         f"images.to_float makes them of bytes")
    return images


def to_image(tensor):
    """(3, H, W) in [-1, 1] -> PIL RGB image; values outside are clamped.

    Rounds, so that to_image(to_tensor(image)) is the image again. The official helper truncates: up to a level darker.
    """
    pixels = (tensor.detach().float().cpu() * 0.5 + 0.5).clamp(0, 1) * 255
    return Image.fromarray(pixels.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())  # (H, W, 3)


def psnr(images, reference):
    """Peak signal-to-noise ratio in dB per image (B,): images, reference (B, 3, H, W) in [-1, 1], images clamped to it.

    10·log10(peak² / mean squared error), with peak = 2, the width of the range.
    """
    error = (images.float().clamp(-1, 1) - reference.float()).square().flatten(1).mean(1)  # (B,)
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


def ssim(images, reference):
    """Structural similarity per image (B,), at most 1: images, reference (B, 3, H, W) in [-1, 1], H and W at least 11.

    Wang et al. 2004 (doi 10.1109/TIP.2003.819861): means, variances and covariance under a Gaussian of std 1.5 in
    windows of 11 pixels, K1 = 0.01, K2 = 0.03; per colour channel, then the mean.
    """
    x, y = images.float().clamp(-1, 1), reference.float()                         # (B, 3, H, W)
    line = torch.exp(-(torch.arange(11, device=x.device) - 5.0) ** 2 / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 11, 11)
    def blur(z):
        return torch.nn.functional.conv2d(z, window, groups=3)                    # (B, 3, H - 10, W - 10)
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    a, b = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # 2 is the width of the range
    each = (2 * mean_x * mean_y + a) * (2 * cov + b) / ((mean_x**2 + mean_y**2 + a) * (var_x + var_y + b))
    return each.flatten(1).mean(1)                                                # (B,)


def draw_grid(rows, header=()):
    """One PIL image, a row for each entry of `rows`: a list of (3, H, W) tensors, or (B, 3, H, W), all in [-1, 1].

    `header` puts a text over each column. Images under 128 pixels are enlarged by the next whole factor, each pixel a
    square, so that nothing is smoothed that the model left rough.
    """
    rows = [[to_image(tensor) for tensor in row] for row in rows]
    width, height = (max(image.size[axis] for row in rows for image in row) for axis in (0, 1))
    factor = max(1, -(-128 // min(width, height)))
    width, height, gap = width * factor, height * factor, 6
    columns, top = max(len(row) for row in rows), 24 if header else 0
    sheet = Image.new("RGB", (columns * (width + gap) + gap, len(rows) * (height + gap) + gap + top), "white")
    draw = ImageDraw.Draw(sheet)
    sizes = range(15, 8, -1)  # the largest of these at which every text fits its column, or else the smallest
    font = next((f for f in map(ImageFont.load_default, sizes) if all(f.getlength(t) <= width for t in header)),
                ImageFont.load_default(sizes[-1]))
    for column, text in enumerate(header):
        draw.text((gap + column * (width + gap) + width / 2, gap + top / 2), text, fill="black", font=font, anchor="mm")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
            sheet.paste(image, (gap + x * (width + gap), gap + top + y * (height + gap)))
    return sheet


def save_grid(path, rows, header=()):
    """Write the picture that `draw_grid` draws as a PNG."""
    with replacing(path) as temporary:
        draw_grid(rows, header).save(temporary, format="PNG")  # the temporary name's ending says nothing


# ---------------------------------------------------------------------------------------------------------------
# A page with a slider over k


TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "extras", "page.html")  # its looks and its script


def save_page(path, title, intro, names, originals, rebuilt, tokens, vocab_size):
    """Write one HTML file that needs no other and no network: images, their first k tokens, and a slider over k.

    names: B texts, which may hold anything. originals: (B, 3, H, W) in [-1, 1], or None. rebuilt: {k: (B, 3, H, W)}.
    tokens: (B, K) integers below vocab_size. Of clips, B x (3, F_i, H, W) instead, and B x (t_i, K), of which k counts
    those of a row. Raises `UserError` if the system refuses to write the file.
    """
    ks, first = sorted(rebuilt), next(iter(rebuilt.values()))[0]
    K, (height, width), moving = tokens[0].shape[-1], first.shape[-2:], first.dim() == 4
    columns, least = (1, 192) if originals is None else (2, 128)
    enlarged = width * max(1, -(-least // min(width, height)))  # by a whole factor, as in `draw_grid`
    values = {"title": title, "intro": intro, "ks": " ".join(map(str, ks)), "last": len(ks) - 1, "start": len(ks) // 4,
              "columns": columns, "width": enlarged, "digits": len(str(vocab_size - 1)), "registers": K,
              "vocab_size": vocab_size, "a_row": " a row" * moving, "of_frames": " of 4 frames" * moving,
              "pixel_bytes": 3 * height * width * (4 if moving else 1)}
    values = {name: html.escape(str(value)) for name, value in values.items()}
    values["cards"] = "\n".join(
        _card(name, None if originals is None else originals[i], {k: rebuilt[k][i] for k in ks},
              tokens[i].view(-1, K).tolist(), enlarged, values["a_row"]) for i, name in enumerate(names))
    with open(TEMPLATE, encoding="utf-8") as file:  # all at once: a name may hold double braces as well
        page = re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], file.read())
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", errors="replace") as file:
        file.write(page)  # errors: a file's name may be any bytes


def _card(name, original, rebuilt, tokens, width, a_row):
    """The HTML of one image: name, original (3, H, W) or None, {k: (3, H, W)} of which one is shown, rows of tokens.

    Of a clip (3, F, H, W) instead: its frames become an animation, 8 a second.
    """
    name = html.escape(name)
    def img(image, alt, attributes=""):
        stream, (H, W) = io.BytesIO(), image.shape[-2:]
        first, *more = [to_image(frame) for frame in image.view(3, -1, H, W).unbind(1)]
        first.save(stream, format="WEBP", quality=90, save_all=True, append_images=more, duration=125, loop=0)
        data = base64.b64encode(stream.getvalue()).decode()
        height = round(width * H / W)
        return (f'<img alt="{name}, {alt}" width="{width}" height="{height}" {attributes}decoding="sync" '
                f'src="data:image/webp;base64,{data}">')
    frames = [img(image, f"from {k} token{'s' * (k > 1)}{a_row}", f'data-k="{k}" ') for k, image in rebuilt.items()]
    first = [] if original is None else [
        "<figure>", img(original, "original"), "<figcaption>original</figcaption></figure>"]
    ids = "".join(f'<ol aria-label="tokens of {name}' + f", row {number}" * bool(a_row) + '">' +
                  "".join(f"<li><span>{token}</span></li>" for token in row) + "</ol>"
                  for number, row in enumerate(tokens, 1))
    return "\n".join([f'<article><h2 dir="auto">{name}</h2><div class="images">', *first, "<figure>", *frames,
                      '<figcaption class="count"></figcaption></figure></div>',
                      f'<div class="tokens">{ids}</div></article>'])


# ---------------------------------------------------------------------------------------------------------------
# Training curves


PANEL = (1200, 680)  # width and height of one diagram, drawn twice as large and averaged down: that smooths the lines
# Dark blue to orange, growing brighter: everybody can tell them apart, and their order is that of k or t.
COLOURS = ((13, 8, 135), (126, 3, 168), (204, 71, 120), (246, 150, 60))


def draw_curves(config, step, metrics):
    """Redraw curves.png of a run: its log so far, and what is known after `step` steps."""
    save_curves(os.path.join(config.out, "curves.png"), [*read_log(config.out), {"step": step, **metrics}])


def save_curves(path, records):
    """Draw the `records` of a log.jsonl, a list of dicts, into a PNG. Writes nothing if they hold no number to draw.

    A loss that falls to less than a third has a logarithmic axis. Of a curve of over 300 points the means of 300 parts
    are drawn.
    """
    panels, (width, height) = curves_of_log(records), PANEL
    if not panels:
        return
    columns = min(2, len(panels))
    sheet = Image.new("RGB", (columns * width, -(-len(panels) // columns) * height), "white")
    for i, (title, curves) in enumerate(panels):
        curves = {name: [np.mean(part, 0) for part in np.array_split(np.array(points, float), min(len(points), 300))]
                  for name, points in curves.items()}
        ys = [y for points in curves.values() for _, y in points]
        log = title.startswith("loss") and min(ys) > 1e-30 and max(ys) > 3 * min(ys)
        sheet.paste(_draw_panel(title, curves, log), (i % columns * width, i // columns * height))
    with replacing(path) as temporary:
        sheet.reduce(2).save(temporary, format="PNG")


def curves_of_log(records):
    """Records of any trainer -> list of (title, {legend: [(steps done, y), ...]}); what is not there is left out."""
    def curve(name, place=None):
        pairs = [(record.get("step"), record.get(name)) for record in records]
        if place is not None:
            pairs = [(x, y[place]) for x, y in pairs if isinstance(y, list) and len(y) > place]
        return [(x, y) for x, y in pairs if all(type(v) in (int, float) and abs(v) < 1e30 for v in (x, y))]
    ks = next((record["ks"] for record in reversed(records) if isinstance(record.get("ks"), list)), [])
    quarters, tokens = ("0 to 0.25", "0.25 to 0.5", "0.5 to 0.75", "0.75 to 1"), ("first", "2 to 8", "9 to 64", "65 on")
    panels = {
        "loss": {"training": curve("loss"), "L1": curve("l1"), "at pure noise": curve("loss_pure_noise"),
                 "held out": curve("held_out")},
        "loss by t, from data (0) to noise (1)": {name: curve("loss_by_t", i) for i, name in enumerate(quarters)},
        "loss by token": {name: curve("loss_by_position", i) for i, name in enumerate(tokens)},
        "PSNR in dB": {f"k = {k}": curve("psnr", i) for i, k in enumerate(ks) if type(k) is int} | {
            "VAE": curve("psnr_vae"), "training": curve("psnr"), "held out": curve("held_out_psnr")},
        "KL": {"": curve("kl")}, "learning rate": {"": curve("lr")}}
    return [(title, {name: points for name, points in curves.items() if points})
            for title, curves in panels.items() if any(curves.values())]


def _draw_panel(title, curves, log):
    """One diagram as a PIL image."""
    scale = math.log10 if log else float
    xs, ys = ([point[axis] for points in curves.values() for point in points] for axis in (0, 1))
    x0, x1, y0, y1 = min(0, *xs), max(1, *xs), scale(min(ys)), scale(max(ys))
    room = 0.04 * (y1 - y0) or 0.1 * abs(y0) or 1  # if all values are equal their line lies in the middle
    y0, y1 = y0 - room, y1 + room
    left, right, top, bottom = 130, PANEL[0] - (250 if any(curves) else 40), 70, PANEL[1] - 80
    image = Image.new("RGB", PANEL, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(26)
    across = lambda x: left + (x - x0) / (x1 - x0) * (right - left)  # noqa: E731
    down = lambda y: bottom - (scale(y) - y0) / (y1 - y0) * (bottom - top)  # noqa: E731
    for x in _ticks(x0, x1):
        draw.line([across(x), top, across(x), bottom], "#e4e4e4", 2)
        draw.text((across(x), bottom + 12), f"{x:g}", "black", font, anchor="ma")
    for y in _ticks(y0, y1, log):
        draw.line([left, down(y), right, down(y)], "#e4e4e4", 2)
        draw.text((left - 12, down(y)), f"{y:g}", "black", font, anchor="rm")
    draw.line([left, top, left, bottom, right, bottom], "black", 2)
    draw.text((left, top - 16), title, "black", ImageFont.load_default(32), anchor="ls")
    draw.text((right, PANEL[1] - 6), "step", "black", font, anchor="rs")
    for i, (name, points) in enumerate(curves.items()):
        place = i / max(1, len(curves) - 1) * (len(COLOURS) - 1)
        colour = tuple(round(np.interp(place, range(len(COLOURS)), channel)) for channel in zip(*COLOURS))
        draw.line([(across(x), down(y)) for x, y in points], colour, 5, joint="curve")
        for x, y in points if len(points) < 13 else ():  # of a few measurements, perhaps only one, each has a dot
            draw.ellipse([across(x) - 7, down(y) - 7, across(x) + 7, down(y) + 7], colour)
        if name:
            draw.line([right + 24, top + 20 + 44 * i, right + 64, top + 20 + 44 * i], colour, 6)
            draw.text((right + 76, top + 20 + 44 * i), name, "black", font, anchor="lm")
    return image


def _ticks(low, high, log=False):
    """Round numbers from `low` to `high`, or from 10^low to 10^high: even steps within a decade, else 1, 2, 5, 10."""
    if log and high - low >= 1:
        powers = range(math.floor(low), math.ceil(high) + 1, math.ceil((high - low) / 8))
        values = [factor * 10.0**power for power in powers for factor in ((1, 2, 5) if high - low < 3 else (1,))]
        return [value for value in values if low <= math.log10(value) <= high]
    low, high = (10**low, 10**high) if log else (low, high)
    step = 10 ** math.floor(math.log10((high - low) / 5))
    step *= max((factor for factor in (2, 5) if factor * step <= (high - low) / 5), default=1)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(here, "assets", "cpu_log.jsonl"), encoding="utf-8") as log:
        save_curves("out/curves.png", [json.loads(line) for line in log])
    print("out/curves.png: the log of the shipped run of train_tokenizer.py --preset cpu")
