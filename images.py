"""
Image files in and out, and what one looks at: tensors and PIL images, PSNR, grids, animations.

    file --read_image--> PIL RGB --fit, to_tensor--> (3, H, W) in [-1, 1] --to_image--> PIL RGB --save_grid--> PNG

Nothing to run here. Next: data.py, which learns from these.
"""
import os
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from common import UserError, replacing

# Only formats whose decoders stay inside Pillow: its EPS reader, for one, starts another program on the file.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 178_956_970       # where Pillow itself refuses: 0.5 GiB of RGB
Image.MAX_IMAGE_PIXELS = None  # `opened` checks instead, because Pillow's message does not say width and height


@contextmanager
def opened(source):
    """Yield the image in `source` (a path or a binary file object) with its header read and its pixels not yet decoded.

    The content decides the format, not the file's name. Whatever fails, also inside the block, raises `UserError`.
    """
    name = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", "image in memory")
    try:
        with Image.open(source, formats=IMAGE_FORMATS) as image:
            width, height = image.size
            if not 0 < width * height <= MAX_PIXELS:
                raise UserError(f"{name}: {width} x {height} pixels; at least 1 and at most {MAX_PIXELS:,} are read")
            yield image
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{name}: not an image in a format that is read here ({', '.join(IMAGE_FORMATS)})") from None
    except Exception as error:  # a damaged file makes Pillow raise OSError, SyntaxError, ValueError, struct.error, ...
        raise UserError(f"{name}: cannot be read as an image ({getattr(error, 'strerror', None) or error})") from None


def read_image(source):
    """Path or binary file object -> PIL image, RGB, upright. The first frame of an animation; transparency becomes white."""
    with opened(source) as image:
        return _to_rgb(ImageOps.exif_transpose(image))  # cameras store "turn me" in EXIF and leave the pixels lying


def _to_rgb(image):
    """A PIL image of any mode -> RGB; where Pillow's convert would clip (16 bits, floats) or drop alpha, do it by hand."""
    see_through = image.info.get("transparency")  # of a PNG without alpha: the one colour that stands for "nothing here"
    if image.mode == "RGB" and isinstance(see_through, tuple) and max(see_through) > 255:  # of 16 bits, of which Pillow keeps the upper 8
        image.info["transparency"] = tuple(value >> 8 for value in see_through)
    if image.mode == "F" or image.mode.startswith("I"):  # float, or integers wider than 8 bits
        raw = np.asarray(image, dtype=np.float64)
        values = np.where(np.isfinite(raw), raw, 0)
        top = values.max()
        if image.mode != "F":
            full = max(65535, top)  # 65535 / 255 = 257; 32-bit files may hold more
        else:
            full = 1 if top <= 1 else max(255, top)  # floats come as 0..1, as 0..255, or in a unit of their own
        image = Image.fromarray((values * (255 / full)).round().clip(0, 255).astype(np.uint8))
        if isinstance(see_through, int):
            image.putalpha(Image.fromarray(np.where(raw == see_through, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:  # an alpha channel, or one colour or palette entry declared transparent
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(image, size):
    """Scale the shorter side to `size` (an int, or (height, width)) and cut the centre out: one antialiased resampling."""
    height, width = (size, size) if isinstance(size, int) else size
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def to_tensor(image):
    """PIL RGB image -> (3, H, W) float32 in [-1, 1]."""
    return to_float(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous())  # (3, H, W)


def to_float(images):
    """uint8 -> float32 in [-1, 1], any shape."""
    return (images.float() / 255 - 0.5) / 0.5


def to_image(tensor):
    """(3, H, W) in [-1, 1] -> PIL RGB image; values outside are clamped.

    Rounds, so that to_image(to_tensor(image)) is the image again. The official helper truncates: up to one level darker.
    """
    pixels = (tensor.detach().float().cpu() * 0.5 + 0.5).clamp(0, 1) * 255
    return Image.fromarray(pixels.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())  # (H, W, 3)


def psnr(images, reference):
    """Peak signal-to-noise ratio in dB per image (B,): images, reference (B, 3, H, W) in [-1, 1], images clamped to it.

    10·log10(peak² / mean squared error), with peak = 2, the width of the range.
    """
    error = (images.float().clamp(-1, 1) - reference.float()).square().flatten(1).mean(1)  # (B,)
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


def draw_grid(rows, header=(), scale=1):
    """One PIL image, a row for each entry of `rows`: a list of (3, H, W) tensors, or (B, 3, H, W), all in [-1, 1].

    `header` puts a text over each column. Images under 128 pixels are enlarged by the next whole factor, each pixel a
    square, so that nothing is smoothed that the model left rough; `scale` enlarges everything further.
    """
    rows = [[to_image(tensor) for tensor in row] for row in rows]
    width, height = (max(image.size[axis] for row in rows for image in row) for axis in (0, 1))
    factor = scale * max(1, -(-128 // min(width, height)))
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


def save_grid(path, rows, header=(), scale=1):
    """Write the picture that `draw_grid` draws as a PNG."""
    with replacing(path) as temporary:
        draw_grid(rows, header, scale).save(temporary, format="PNG")  # the temporary name's ending says nothing


def save_animation(path, frames, milliseconds):
    """Write PIL images of one size as an animated WebP or GIF, by the ending of `path`; the last one stays for two seconds."""
    with replacing(path) as temporary:
        frames[0].save(temporary, format="WEBP" if path.endswith(".webp") else "GIF", save_all=True, append_images=frames[1:],
                       duration=[milliseconds] * (len(frames) - 1) + [2000], loop=0)
