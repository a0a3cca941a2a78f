# ---------------------------------------------------------------------------------------------------------------
# data.py and the images of common.py
#
# Mistakes this section exists to catch: the wrong decoding of an image (16 bits clipped, transparency turned black, a
# photo lying on its side, grey or palette images with the wrong channels); a bad file that ends a run with a traceback
# or that is let in half decoded; tensors off by one level; training data that differ after a resume or between one
# process and two; held-out images in training; a mirrored letter or flag; captions and labels that belong to another image.
import io
import json
import os
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from common import Run, UserError, fit, read_image, save_grid, to_image, to_tensor
from data import (COLOURS, KINDS, PLACES, Emoji, Folder, Shapes, Stream, batches, contrast, list_files, open_data, split_paths,
                  to_float)


def noise_image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def in_file(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


def a_run(rank=0, world=1):
    return Run(torch.device("cpu"), rank, world)


def test_read_image_composites_every_kind_of_transparency_over_white():
    clear_red, white = Image.new("RGBA", (4, 4), (255, 0, 0, 0)), (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    files = {"RGBA": in_file(clear_red), "LA": in_file(Image.new("LA", (4, 4), (0, 0))),
             "P, one entry": in_file(palette, transparency=1), "P, a table": in_file(palette, transparency=b"\xff\x00"),
             "RGB, tRNS": in_file(Image.new("RGB", (4, 4), (9, 8, 7)), transparency=(9, 8, 7)),
             "L, tRNS": in_file(Image.new("L", (4, 4), 9), transparency=9),
             "1, tRNS": in_file(Image.new("1", (4, 4), 0), transparency=0),
             "WebP": in_file(clear_red, "WEBP", lossless=True), "GIF": in_file(palette, "GIF", transparency=1)}
    for name, file in files.items():
        image = read_image(file)
        assert (image.mode, image.getpixel((1, 1))) == ("RGB", white), name
    half = read_image(in_file(Image.new("RGBA", (4, 4), (0, 0, 0, 51))))
    assert half.getpixel((0, 0)) == (204, 204, 204)  # 255 · (1 - 51/255)


def test_read_image_scales_16_bit_and_float_images_by_their_range():
    ramp = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for file in (in_file(Image.fromarray(ramp)), in_file(Image.fromarray(ramp), "TIFF"),
                 in_file(Image.fromarray(ramp.astype(np.int32)), "TIFF"),
                 io.BytesIO(b"P5 4 1 65535\n" + ramp.astype(">u2").tobytes())):
        image = read_image(file)
        assert [image.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 1, 128, 255)]
    for values, expected in (([0, 0.5, 1, np.nan], [0, 128, 255, 0]), ([-1, 0, 255, 100], [0, 0, 255, 100]),
                             ([0, 500, 1000, np.inf], [0, 128, 255, 0])):
        image = read_image(in_file(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF"))
        assert [image.getpixel((x, 0))[0] for x in range(4)] == expected


def test_read_image_turns_photos_upright_and_takes_the_first_frame():
    marked = Image.new("RGB", (32, 16), "black")
    marked.paste("white", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    image = read_image(in_file(marked, "JPEG", exif=exif, quality=95))
    assert image.size == (16, 32) and image.getpixel((8, 4))[0] > 240 > 15 > image.getpixel((8, 28))[0]
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        image = read_image(in_file(frames[0], format, save_all=True, append_images=frames[1:], lossless=True))
        assert image.getpixel((4, 4))[0] > 250 and image.getpixel((4, 4))[2] < 5, format


def test_read_image_converts_grey_palette_black_and_white_and_cmyk(tmp_path):
    for mode in ("L", "P", "1", "CMYK", "YCbCr"):
        format = "TIFF" if mode == "YCbCr" else "JPEG" if mode == "CMYK" else "PNG"
        image = read_image(in_file(Image.new("RGB", (8, 8), "white").convert(mode), format))
        assert (image.mode, image.getpixel((3, 3))) == ("RGB", (255, 255, 255)), mode
    path = tmp_path / "a jpeg.png"  # the content decides, not the name
    path.write_bytes(in_file(noise_image(8, 8), "JPEG").getvalue())
    assert read_image(path).size == (8, 8)


def png_header(width, height):
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def test_every_unreadable_image_raises_one_sentence_that_names_it(tmp_path):
    formats = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
    whole = {format: in_file(noise_image(64, 64), format).getvalue() for format in formats}
    broken = {f"half.{format}": data[:len(data) // 2] for format, data in whole.items()}
    broken |= {"empty.png": b"", "text.png": b"hello", "bomb.png": png_header(50_000, 40_000) + whole["PNG"][33:],
               "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
    for name in [*broken, "missing.png", "."]:
        with pytest.raises(UserError) as caught:
            read_image(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="not an image in a format"):  # Pillow would start Ghostscript on it
        read_image(tmp_path / "script.eps")
    with pytest.raises(UserError, match="50000 x 40000 pixels.*178,956,970"):
        read_image(tmp_path / "bomb.png")


def test_an_image_becomes_a_tensor_in_minus_one_to_one_and_back_exactly():
    levels = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    tensor = to_tensor(levels)
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32
    assert (tensor.min(), tensor.max()) == (-1, 1) and tensor[1, 0, 1] == (1 / 255 - 0.5) / 0.5
    assert np.array_equal(to_image(tensor), levels)
    assert to_image(tensor * 3).getextrema()[0] == (0, 255)  # clamped, not wrapped round
    assert torch.equal(to_float(torch.from_numpy(np.array(levels)).permute(2, 0, 1)), tensor)


def test_fit_takes_the_middle_of_the_longer_side_and_antialiases():
    wide = Image.new("RGB", (300, 100), "black")
    wide.paste("white", (100, 0, 200, 100))
    assert fit(wide, 50).size == (50, 50) and fit(wide, (20, 60)).size == (60, 20)
    assert fit(wide, 50).crop((2, 0, 48, 50)).getextrema()[0][0] > 250  # the border may mix with what lies beside it
    board = Image.fromarray((np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    assert all(100 < low and high < 155 for low, high in fit(board, 16).getextrema())
    assert np.array_equal(fit(noise_image(16, 16), 16), noise_image(16, 16))


def test_save_grid_enlarges_small_images_and_leaves_no_temporary_file(tmp_path):
    path = str(tmp_path / "new" / "grid.png")
    save_grid(path, [torch.ones(3, 3, 32, 32), [-torch.ones(3, 32, 32)]], header=["original", "k=1", "a long long long header"])
    image = Image.open(path)
    assert image.size == (3 * 134 + 6, 2 * 134 + 6 + 24) and os.listdir(tmp_path / "new") == ["grid.png"]
    assert image.getpixel((70, 24 + 134 + 70)) == (0, 0, 0) and image.getpixel((300, 24 + 134 + 70)) == (255, 255, 255)


def test_the_emoji_splits_are_a_fixed_nine_to_one_and_share_nothing():
    train, held_out = Emoji(64), Emoji(64, "held_out", augment=False)
    assert len(train) + len(held_out) == 1911 and len(held_out) == 191
    assert not {r["codepoints"] for r in train.records} & {r["codepoints"] for r in held_out.records}
    assert train.classes == held_out.classes and len(train.classes) == 10
    share = np.bincount([held_out.label(i) for i in range(191)], minlength=10) / np.bincount(
        [train.label(i) for i in range(len(train))] + [held_out.label(i) for i in range(191)])
    assert (abs(share - 0.1) < 0.11).all()  # the smallest category has five


def test_an_emoji_is_its_tile_and_the_augmentation_depends_on_the_generator_alone():
    plain, augmented = Emoji(64, augment=False), Emoji(64)
    sheet = read_image(os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "emoji64.webp"))
    for i in (0, 777, 1719):
        row, column = divmod(plain.members[i], 64)
        tile = sheet.crop((64 * column, 64 * row, 64 * column + 64, 64 * row + 64))
        assert np.array_equal(plain.get(i, None).permute(1, 2, 0), tile)
        a, b, other = (augmented.get(i, np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert a.dtype == torch.uint8 and torch.equal(a, b) and not torch.equal(a, other)
    captions = {plain.caption(i): i for i in range(len(plain))}
    apple = plain.get(captions["red apple"], None).float()
    assert apple[0, 20:50, 20:50].mean() > 2 * apple[2, 20:50, 20:50].mean()
    for size in (16, 32, 100):
        assert Emoji(size).get(3, np.random.default_rng(0)).shape == (3, size, size)


def test_no_flag_letter_clock_hand_or_direction_is_mirrored():
    for emoji in (Emoji(64), Emoji(64, "held_out")):
        for i, record in enumerate(emoji.records):
            means = record["category"] in ("flags", "symbols") or record["subcategory"] == "time" or \
                record["subcategory"].startswith("hand") or re.search(r"\b(left|right|facing right)\b", record["caption"])
            assert not (means and emoji.may_mirror(i)), record["caption"]
    train = Emoji(64)
    assert sum(train.may_mirror(i) for i in range(len(train))) > 300
    tiger = next(i for i in range(len(train)) if train.caption(i) == "tiger")  # its head is to the left
    looks = [train.get(tiger, np.random.default_rng(seed)).float() for seed in range(40)]
    red_left = [(255 - look[2, :, :32]).mean() > (255 - look[2, :, 32:]).mean() for look in looks]
    assert 8 < sum(red_left) < 32  # about half of them are turned round


def test_a_shape_is_drawn_as_its_factors_and_caption_say():
    shapes = Shapes(64, seed=1)
    for i in range(150):
        scene, pixels = shapes.factors(i), shapes.get(i).float()
        main = scene.main
        assert shapes.label(i) == KINDS.index(main.kind)
        assert f"a {scene.size} {main.colour} {main.kind} {scene.place} on a " in shapes.caption(i)
        column, row = (int(3 * (at - 1.12 * main.radius) / (1 - 2.24 * main.radius)) for at in (main.x, main.y))
        assert scene.place == PLACES[3 * row + column]  # so it is also wholly in the picture
        assert all(contrast(main.colour, name) > 125 for name in scene.background)
        assert all(np.hypot(e.x - main.x, e.y - main.y) > 1.25 * (e.radius + main.radius) for e in scene.extras)
        across = main.x + (0.8 * main.radius if main.kind == "ring" else 0)  # a ring has no colour in its middle
        drawn = pixels[:, int(main.y * 64), int(across * 64)]
        assert (drawn - torch.tensor(COLOURS[main.colour])).abs().max() < 3, shapes.caption(i)


def test_shapes_are_a_pure_function_of_seed_split_and_index_and_have_no_end():
    assert torch.equal(Shapes(32).get(5), Shapes(32, length=7).get(5))
    assert Shapes(32).factors(5) == Shapes(256).factors(5)
    train, held_out = ({Shapes(32, split).factors(i) for i in range(300)} for split in ("train", "held_out"))
    assert len(train) == len(held_out) == 300 and not train & held_out
    assert Shapes(32, seed=1).factors(5) != Shapes(32).factors(5)
    assert Shapes(32, "held_out", seed=1).factors(5) == Shapes(32, "held_out").factors(5)
    assert Shapes(32).get(10**9).shape == (3, 32, 32)
    assert len({Shapes(32).label(i) for i in range(200)}) == len(Shapes(32).classes) == 8


def make_folder(root, count=40):
    for i in range(count):
        path = root / ("cats", "dogs/big", ".")[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(40 + i, 50, seed=i).save(path)


def test_a_folder_has_classes_captions_and_two_disjoint_splits(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "captions.json").write_text(json.dumps({f"cats/{i}.png": f"cat {i}" for i in range(0, 40, 3)}))
    (tmp_path / "dogs/big/1.txt").write_text("a dog\n")
    noise_image(9, 9).save(tmp_path / ".hidden.png")
    train, held_out = Folder(tmp_path, 32), Folder(str(tmp_path), 32, "held_out", augment=False)
    assert sorted(train.paths + held_out.paths) == [p for p in list_files(tmp_path)] and len(train) + len(held_out) == 40
    assert 0 < len(held_out) < 12 and train.classes == held_out.classes == [".", "cats", "dogs"]
    for folder in (train, held_out):
        for i, path in enumerate(folder.paths):
            number = int(re.search(r"(\d+)\.png", path)[1])
            assert folder.classes[folder.label(i)] == (path.split("/")[0] if "/" in path else ".")
            assert folder.caption(i) == (f"cat {number}" if number % 3 == 0 else "a dog" if number == 1 else "")
            assert folder.get(i, np.random.default_rng(0)).shape == (3, 32, 32)
    original = fit(read_image(tmp_path / held_out.paths[0]), 32)
    assert np.array_equal(held_out.get(0).permute(1, 2, 0), original)


def test_a_file_added_to_a_folder_moves_no_other_one_and_no_side_is_empty():
    paths = [f"{i}.png" for i in range(1000)]
    held_out = split_paths(paths, "held_out")
    assert 70 < len(held_out) < 130 and set(held_out) < set(split_paths(paths + ["more.png"], "held_out")) | {"more.png"}
    for start in range(0, 1000, 20):
        few = paths[start:start + 2 + start % 9]
        sides = split_paths(few, "train"), split_paths(few, "held_out")
        assert all(sides) and sorted(sides[0] + sides[1]) == sorted(few)
    assert split_paths(["1.png"], "train") == split_paths(["1.png"], "held_out") == ["1.png"]


def test_unreadable_files_of_a_folder_are_named_once_and_skipped(tmp_path, capsys, monkeypatch):
    make_folder(tmp_path, 12)
    for i in range(13):
        (tmp_path / f"bad{i:02}.jpg").write_bytes(b"not an image")
    broken = tmp_path / max(path for path in Folder(tmp_path, 32).paths if path.startswith("cats"))  # a dog follows
    broken.write_bytes(broken.read_bytes()[:-2000])  # a good header; the pixels break off
    capsys.readouterr()
    folder = Folder(tmp_path, 32)
    lines = capsys.readouterr().err.splitlines()
    assert len(folder.skipped) == 14 and len(lines) == 11 and "bad00.jpg" in lines[0] and lines[-1] == "skipped 4 more"
    monkeypatch.setattr("data.MEMORY_BYTES", 0)  # as for a folder too large to keep
    large = Folder(tmp_path, 32)
    assert not large.memory and len(large) == len(folder) + 1
    rng = np.random.default_rng
    for i, path in enumerate(folder.paths):
        assert torch.equal(folder.get(i, rng(7)), large.get(large.paths.index(path), rng(7)))
    index = large.paths.index(os.path.relpath(broken, tmp_path))
    with pytest.raises(UserError, match=re.escape(str(broken))):
        large.get(index, rng(0))
    capsys.readouterr()
    seen = [Stream(large, 0)[p] for p in range(len(large))]
    assert index + 1 in [i for _, _, i in seen] and index not in [i for _, _, i in seen]
    assert all(label == large.label(i) for _, label, i in seen)
    assert capsys.readouterr().err.count(str(broken)) == 1


def test_open_data_refuses_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="emoji, shapes or an existing folder"):
        open_data("emojis", 64)
    with pytest.raises(UserError, match="train or held_out"):
        open_data("emoji", 64, "test")
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        open_data(str(tmp_path), 64)
    assert [type(open_data(name, 32)).__name__ for name in ("emoji", "shapes")] == ["Emoji", "Shapes"]


def test_the_stream_shows_every_item_once_an_epoch_in_a_new_order():
    stream = Stream(Shapes(16, length=50), seed=3)
    first, second = ([stream[50 * epoch + p][2] for p in range(50)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
    assert first == [Stream(Shapes(16, length=50), seed=3)[p][2] for p in range(50)]
    assert first != [Stream(Shapes(16, length=50), seed=4)[p][2] for p in range(50)]
    emoji = Stream(Emoji(32), seed=3)
    image, _, index = emoji[0]
    again = 1720 + int(np.flatnonzero(np.random.default_rng((3, 0, 1)).permutation(1720) == index)[0])
    assert emoji[again][2] == index and not torch.equal(emoji[again][0], image)  # augmented anew each time


def take(count, *args, **options):
    iterator = batches(*args, **options)
    return [next(iterator) for _ in range(count)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_resumed_stream_and_worker_processes_give_the_same_batches():
    emoji, state = Emoji(32), torch.get_rng_state()
    whole = take(4, emoji, 200, 0, a_run(), start_step=6)  # position 1720, in the third of these, begins an epoch
    resumed = take(2, emoji, 200, 0, a_run(), start_step=8)
    workers = take(4, emoji, 200, 0, a_run(), start_step=6, workers=2)
    assert all(same(a, b) for a, b in zip(whole, workers, strict=True))
    assert all(same(a, b) for a, b in zip(whole[2:], resumed, strict=True))
    assert torch.equal(torch.get_rng_state(), state)  # loading data must not change the training noise
    images, labels, indices = whole[0]
    assert images.shape == (200, 3, 32, 32) and images.dtype == torch.uint8 and labels.dtype == indices.dtype == torch.int64
    assert labels.tolist() == [emoji.label(i) for i in indices.tolist()]


def test_two_ranks_together_see_what_one_process_sees():
    emoji = Emoji(32)
    alone = take(3, emoji, 32, 5, a_run())
    ranks = [take(3, emoji, 32, 5, a_run(rank, 2)) for rank in (0, 1)]
    for one, left, right in zip(alone, *ranks):
        assert same(one, [torch.cat(parts) for parts in zip(left, right)])
    with pytest.raises(UserError, match="30 .* 4"):
        batches(emoji, 30, 0, a_run(0, 4))
