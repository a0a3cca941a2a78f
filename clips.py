"""
Clip files in and out: frames at one rate, cut into the windows that a video tokenizer takes.

    file or folder --frames_of--> (3, H, W) uint8 at 8 a second --windows_of--> (3, 17, H, W) in [-1, 1], in turn
    video (3, F, H, W) --write_clip--> animated WebP or GIF, or mp4

GIF, WebP, APNG and folders of frames go through Pillow. For mp4 and its like the package av has to be installed.
Frames are read one after the other and only those of one window are kept: a film of any length takes the memory of a
window (and of what Pillow or av hold to decode it).

    python clips.py a.gif           # how many frames there are, at which rate, and what is cut        Next: data.py
"""
import math
import os
import re
import sys
from fractions import Fraction

import numpy as np
import torch

from common import UserError, replacing, shown
from images import _to_rgb, draw_grid, fit, opened, read_image, seek, to_bytes, to_float, to_image

FPS = 8                        # frames a second, of everything that is learned and written
FILMS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".avif", ".jp2")
MAX_SECONDS = 1000.0           # that a single frame may last: a damaged file must not become a million copies of one


# ---------------------------------------------------------------------------------------------------------------
# Reading


def timed_frames(path):
    """A clip's frames as pairs (PIL RGB image, seconds that it is shown), one by one. Raises `UserError`.

    A folder's frames are its images, by name and with numbers in their order; each is shown for 1/8 s.
    """
    if os.path.isdir(path):
        return folder_frames(path)
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file or folder")
    return film_frames(path) if path.lower().endswith(FILMS) else animation_frames(path)


def folder_frames(path):
    """The images of a folder in natural order, so that 2.png stands before 10.png."""
    names = [name for name in os.listdir(path) if name.lower().endswith(PICTURES) and not name.startswith(".")]
    if not names:
        raise UserError(f"{path}: no images in this folder; expected the frames of a clip, such as 0001.png")
    for name in sorted(names, key=lambda name: [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", name)]):
        yield read_image(os.path.join(path, name)), 1 / FPS


def animation_frames(path):
    """The frames of a GIF, WebP or APNG; of another image file, the image. No duration means 0.1 s, as in browsers."""
    with opened(path) as image:
        for number in range(getattr(image, "n_frames", 1)):
            try:
                if number:
                    seek(image, number)
                image.load()
            except EOFError:
                raise UserError(f"{path}: damaged, frame {number + 1} of {image.n_frames} cannot be read") from None
            yield _to_rgb(image).copy(), (image.info.get("duration") or 100) / 1000


def film_frames(path):
    """The frames of an mp4 or the like, decoded by the package av."""
    try:
        import av  # late: the one package that only films need
    except ImportError:
        raise UserError(f"{path}: reading films needs the package av (pip install av); without it, give an animated "
                        f"GIF, WebP or PNG, or a folder of frames") from None
    try:
        with av.open(path) as film:
            if not film.streams.video:
                raise UserError(f"{path}: holds no pictures, only {len(film.streams)} other streams")
            stream, last = film.streams.video[0], None
            for frame in film.decode(stream):
                turned = frame.to_image()
                if getattr(frame, "rotation", 0):  # phones store "turn me" beside the frames and leave them lying
                    turned = turned.rotate(frame.rotation, expand=True)
                if last:  # a frame is shown until the next one comes
                    yield last[0], max(0.0, (frame.time or 0.0) - last[1])
                last = turned, frame.time or 0.0
            if last:
                yield last[0], float(1 / (stream.average_rate or FPS))
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a film ({shown(str(error))})") from None


def frames_of(path, size, fps=FPS):
    """A clip's frames at `fps`, fitted to `size` (an int, or (height, width)) and centred: (3, H, W) uint8, one by one.

    Frame i is what is shown at (i + 1/2)/fps seconds, whatever the rate of the file, constant or not: faster files lose
    frames, slower ones have some twice. There is at least one. Raises `UserError` naming the file.
    """
    time, count, frame = 0.0, 0, None
    for image, seconds in timed_frames(path):
        if not seconds <= MAX_SECONDS:
            raise UserError(f"{path}: a frame is shown for {seconds:g} s, at most {MAX_SECONDS:g} s are read")
        time, frame = time + seconds, None
        while (count + 0.5) / fps < time - 1e-6:
            if frame is None:
                frame = to_bytes(fit(image, size))                                # (3, H, W)
            count += 1
            yield frame
    if not count:
        if time == 0:
            raise UserError(f"{path}: holds no frames")
        yield to_bytes(fit(image, size))  # shorter than 1/fps


def windows_of(path, size, frames=17, stride=16):
    """The windows of a clip file, in turn: (3, 17, H, W) float32 in [-1, 1], each `stride` frames after the last.

    A clip too short for one gives a window of 1 + 4n frames. What is left behind the last is cut, which is
    said on stderr. Raises `UserError` naming the file.
    """
    window, count, fresh = [], 0, 0
    for frame in frames_of(path, size):
        window, count, fresh = [*window, frame], count + 1, fresh + 1
        if len(window) == frames:
            yield to_float(torch.stack(window, 1))                                # (3, 17, H, W)
            window, fresh = window[stride:], 0
    used = count - fresh
    if not used:  # no whole window
        used = 1 + (count - 1) // 4 * 4
        yield to_float(torch.stack(window[:used], 1))                             # (3, 1 + 4n, H, W)
    if used < count:
        expected = f"{frames} + {stride}n" if count > frames else "1 + 4n"
        print(f"{path}: the last {count - used} of {count} frames at {FPS} a second are cut, a clip has {expected}",
              file=sys.stderr)


def read_clip(path, size, frames=17, stride=16, seconds=math.inf):
    """A clip file -> (3, F, H, W) in [-1, 1], of `windows_of`; no more windows than begin in its first `seconds`.

    What is left behind is said on stderr.
    """
    parts = []
    for i, window in enumerate(windows_of(path, size, frames, stride)):
        if i * stride >= seconds * FPS:
            print(f"{path}: only its first {1 + i * stride} frames at {FPS} a second are taken", file=sys.stderr)
            break
        parts.append(window[:, frames - stride if i else 0:])
    return torch.cat(parts, 1)                                                    # (3, F, H, W)


# ---------------------------------------------------------------------------------------------------------------
# Writing


def write_clip(path, video, fps=FPS):
    """Write (3, F, H, W) in [-1, 1], or F frames (3, H, W) in turn, as .webp, .gif or (with av) .mp4; it repeats."""
    pictures = (to_image(frame) for frame in (video.unbind(1) if torch.is_tensor(video) else video))
    if path.endswith(".mp4"):
        return write_film(path, pictures, fps)
    save_pictures(path, list(pictures), fps)


def save_pictures(path, pictures, fps=FPS):
    """Write PIL images as an animated .webp or .gif. Raises `UserError` for another ending."""
    forms = {".webp": ("WEBP", 1000), ".gif": ("GIF", 100)}  # and how many of its units of time make a second
    if os.path.splitext(path)[1] not in forms:
        raise UserError(f"{path}: expected the ending .webp, .gif or .mp4")
    form, units = forms[os.path.splitext(path)[1]]
    # each frame ends at the unit next to its time, so that roundings do not add up: a GIF's 1/8 s are 12, 13, 12, 13
    ends = [round(units * i / fps) * 1000 // units for i in range(len(pictures) + 1)]
    durations = [after - before for before, after in zip(ends, ends[1:])]
    # equal frames in a row may be merged, and their durations added: the frames come back when the file is read
    with replacing(path) as temporary:
        pictures[0].save(temporary, format=form, save_all=True, append_images=pictures[1:], duration=durations, loop=0,
                         **({"quality": 90, "method": 4} if form == "WEBP" else {}))


def save_clip_grid(path, rows, header=()):
    """Write rows of clips, (3, F_i, H, W) each, as one animated .webp or .gif; the shorter wait at their last frame."""
    longest = max(clip.shape[1] for row in rows for clip in row)
    save_pictures(path, [draw_grid([[clip[:, min(i, clip.shape[1] - 1)] for clip in row] for row in rows], header)
                         for i in range(longest)])


def write_film(path, pictures, fps):
    """Write PIL images as H.264. Its sides are even: an odd one gets its last line once more."""
    try:
        import av
    except ImportError:
        raise UserError(f"{path}: writing mp4 needs the package av (pip install av); without it, write .webp or .gif"
                        ) from None
    with replacing(path) as temporary, av.open(temporary, "w", format="mp4") as film:
        stream = film.add_stream("h264", rate=Fraction(fps), options={"crf": "16"})
        stream.pix_fmt = "yuv420p"
        for number, picture in enumerate(pictures):
            pixels = np.array(picture)                                            # (H, W, 3)
            pixels = np.pad(pixels, ((0, len(pixels) % 2), (0, pixels.shape[1] % 2), (0, 0)), "edge")
            if number == 0:
                stream.height, stream.width = pixels.shape[:2]
            film.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        film.mux(stream.encode())


if __name__ == "__main__":
    for name in sys.argv[1:]:
        try:
            times = [seconds for _, seconds in timed_frames(name)]
            used = read_clip(name, 64).shape[1]
            print(f"{name}: {len(times)} frames in {sum(times):.2f} s; {used} frames at {FPS} a second are used")
        except UserError as error:
            print(f"error: {error}")
    if not sys.argv[1:]:
        print(__doc__)
