"""Images of the data's rows: one pair at a time (ImagePairs), every image once in the files' order
(ImageStream), or some rows strewn over all files (gather_rows). Pick-a-Pic's 335 GB are never read
for a few."""

import hashlib
import io
import re
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps
from torch.utils.data import IterableDataset, get_worker_info

from data import COLUMNS, ID_COLUMNS, IMAGE_COLUMNS, cast_columns
from utils import InputError, first_line, rank_and_world, write_atomically

KEPT_ROW_GROUPS = 8  # in memory, by each process
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # others may start programs


class DataChanged(OSError):
    """The data are not those that the users were read from: not to be passed over like one broken
    image."""


@lru_cache(1000)
def parquet_metadata(file):
    """A parquet file's metadata, and the first row of each of its row groups."""
    try:
        meta = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: cannot be read ({first_line(error)})") from None
    sizes = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
    return meta, np.cumsum([0, *sizes[:-1]])


def row_group(data, row):
    """Which row group of its file a row is in."""
    starts = parquet_metadata(Path(data) / row["file"])[1]
    return int(np.searchsorted(starts, row["row"], "right")) - 1


@lru_cache(KEPT_ROW_GROUPS)
def read_row_group(file, group):
    reader = pq.ParquetFile(file, metadata=parquet_metadata(file)[0])
    table = reader.read_row_group(group, columns=[*IMAGE_COLUMNS, *ID_COLUMNS])
    ids = cast_columns(table, {key: COLUMNS[key] for key in ID_COLUMNS}, file)
    return pa.table(
        {**{key: table[key] for key in IMAGE_COLUMNS}, **{k: ids[k] for k in ID_COLUMNS}}
    )


def read_images(data, row, sides=(0, 1)):
    """The two images of a row of read_rows or pairs.parquet, or those of `sides`, as PIL images.
    Raises InputError naming file, row and column; DataChanged if another choice is there now."""
    file = Path(data) / row["file"]
    try:
        group = row_group(data, row)
        table = read_row_group(file, group)
        position = row["row"] - parquet_metadata(file)[1][group]
        found = {key: table[key][position].as_py() for key in table.column_names}
    except (pa.ArrowException, OSError, LookupError, MemoryError) as error:
        # a disk that is gone or a file that is shorter is no broken image
        passing = getattr(error, "errno", None) or isinstance(error, MemoryError | IndexError)
        problem = f"{file} row {row['row']}: cannot be read ({type(error).__name__})"
        raise (DataChanged if passing else InputError)(problem) from None
    for key in ID_COLUMNS:
        if str(found[key]) != str(row.get(key, found[key])):
            problem = f"{key} is {found[key]}, but was {row[key]}"
            raise DataChanged(
                f"{file} row {row['row']}: {problem}; embed the users of today's data"
            )
    name = f"{row['file']} row {row['row']}"
    return [open_image(found[f"jpg_{side}"] or b"", f"{name} jpg_{side}") for side in sides]


def open_image(source, name):
    """An image from a path or from bytes, any mode and orientation -> RGB PIL image, transparency
    over white. Raises InputError naming it if it is missing, broken, cut short or too large."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            image = ImageOps.exif_transpose(Image.open(file, formats=IMAGE_FORMATS))
            if image.mode[0] in "IF":  # one channel of more than 8 bits: convert() would clip it
                assert image.mode != "F" and not image.mode.endswith("N"), f"mode {image.mode}"
                image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # Pillow raises a dozen kinds
        reason = re.sub(r" <_io.*?>", "", str(error))
        raise InputError(f"{name}: not a usable image ({type(error).__name__}: {reason})") from None


def fit_pixels(images, side, resample):
    """PIL images, short side resized and centre cropped -> (B, 3, side, side) uint8."""
    fitted = [ImageOps.fit(image.convert("RGB"), (side, side), resample) for image in images]
    return torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2).contiguous()


def encode_pixels(codec, pixels, dtype):
    """(B, 3, S, S) uint8 -> latents (B, C, h, w): for training and for cached latents alike."""
    return codec.encode(pixels.float() / 255).to(dtype)


def load_shots(data, rows):
    """Conditioning rows -> [(caption, preferred image, dispreferred image), ...]."""
    shots = []
    for row in rows:
        images = read_images(data, row)
        shots.append((row["caption"], *(images if row["label_0"] == 1 else images[::-1])))
    return shots


class ImagePairs:
    """The two images of a pair, preferred first, from the parquet files: (2, 3, S, S) uint8."""

    kind = "images"

    def __init__(self, data, codec, rows=()):
        self.data = Path(data)
        self.codec_fit = (codec.image_size, codec.resample)
        for file in sorted({row["file"] for row in rows}):
            if not (self.data / file).is_file():
                raise InputError(f"--data {data}: no {file} there; give the folder embed.py read")

    def __call__(self, row):
        images = read_images(self.data, row, (row["preferred"], 1 - row["preferred"]))
        return fit_pixels(images, *self.codec_fit)

    def warn(self, row, n):
        """Tell what it costs to read n pairs so, by the time that one takes."""
        began = time.time()
        try:
            self(row)
        except InputError:
            return  # a broken image, which training passes over
        hours = (time.time() - began) * n / 3600
        print(
            f"WARNING: no cached latents: every pair reads a row group of its file, about "
            f"{hours:.1f} hours of one process; run embed.py --cache-latents first",
            file=sys.stderr,
        )


def chunk_images(data, sources, size):
    """[(row, side), ...] -> in the files' order, for each row group lists of at most `size`."""
    ordered = sorted(sources, key=lambda source: (source[0]["file"], source[0]["row"], source[1]))
    groups = []
    for _, group in groupby(ordered, lambda s: (s[0]["file"], row_group(data, s[0]))):
        group = list(group)
        groups.append([group[i : i + size] for i in range(0, len(group), size)])
    return groups


@dataclass
class ImageStream(IterableDataset):
    """(chunk, what transform() makes of each of its images, in a list) of chunk_images()' chunks;
    None for a broken one, which is named. Every worker reads row groups of its own, once."""

    groups: list
    data: str
    transform: Callable

    def __iter__(self):
        worker = get_worker_info()
        for chunks in self.groups[worker.id :: worker.num_workers] if worker else self.groups:
            for chunk in chunks:
                yield chunk, [self.read(*source) for source in chunk]
            read_row_group.cache_clear()

    def read(self, row, side):
        try:
            return self.transform(read_images(self.data, row, (side,)))
        except InputError as problem:
            print(f"left out: {problem}", file=sys.stderr)


def gather_rows(rows, data, folder):
    """Copies of these rows, strewn over the data, in small files of a row a row group; of data of
    few row groups the data themselves. Under torchrun every process copies its share of the files.
    Returns the folder to read from, and {ranking_id: the row there}."""
    rows = sorted(rows, key=lambda row: (row["file"], row["row"]))
    if len({(row["file"], row_group(data, row)) for row in rows}) <= KEPT_ROW_GROUPS:
        return Path(data), {row["ranking_id"]: row for row in rows}
    rank, world_size = rank_and_world()
    digest = hashlib.sha256(repr([row["ranking_id"] for row in rows]).encode()).hexdigest()[:16]
    folder = Path(folder) / digest
    found = {}
    for number, (name, own) in enumerate(groupby(rows, lambda row: row["file"])):
        own = list(own)
        found |= {row["ranking_id"]: row | dict(row=i) for i, row in enumerate(own)}
        if number % world_size == rank and not (folder / name).exists():
            file = Path(data) / name
            starts = parquet_metadata(file)[1]
            places = [(row["row"], row_group(data, row)) for row in own]
            # taken, as a slice would keep its whole row group in memory
            copies = [read_row_group(file, g).take([row - starts[g]]) for row, g in places]
            table = pa.concat_tables(copies)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / name, partial(pq.write_table, table, row_group_size=1))
    read_row_group.cache_clear()
    return folder, found


def readable_pairs(rows, data, codec, folder, n):
    """The first n of these rows whose images can be read, and an ImagePairs of them; `folder` is
    for gather_rows. Others are named; where many are broken fewer than n are found."""
    some = rows[: n + n // 4 + 8]
    ImagePairs(data, codec, some)  # InputError if a file is not there
    folder, found = gather_rows(some, data, folder)
    images = ImagePairs(folder, codec)
    readable = []
    for row in some:
        if len(readable) == n:
            break
        row = row | {key: found[row["ranking_id"]][key] for key in ("file", "row")}
        try:
            images(row)
        except InputError as problem:
            print(f"left out: {problem}", file=sys.stderr)
        else:
            readable.append(row)
    return readable, images
