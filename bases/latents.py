"""Latents of a data set's images, encoded once by `embed.py --cache-latents`: training then opens
no parquet file. open_images decides which it reads."""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from bases.images import ImagePairs
from data import image_key
from utils import InputError, first_line, read_json, write_atomically

CACHE_AGAIN = "delete it and its .done.npy and run embed.py --cache-latents again"


class CachedLatents:
    """Latents of a data set's images, encoded once: what ImagePairs gives as (2, C, h, w) latents.

    A folder beside the data (or --latents) that all users folders share: index.json, the images'
    ids in the order of the data's rows, and for every codec, size and dtype two memory-mapped
    arrays, <name>.npy, (images, C, h, w), nan where an image is broken, bfloat16 as uint16, and
    <name>.done.npy, 1 where one is encoded.
    """

    kind = "cached latents"

    def __init__(self, folder, codec, dtype):
        self.folder = Path(folder)
        self.shape = tuple(codec.latent_shape)
        self.dtype = dtype
        size = "x".join(str(n) for n in self.shape)
        name = f"{codec.digest()}-{size}-{str(dtype).removeprefix('torch.')}"
        self.latents_path = self.folder / f"{name}.npy"
        self.done_path = self.folder / f"{name}.done.npy"

    def create(self, rows):
        """Make the files for the images of these rows (all of the data's), unless they are there.
        Raises InputError if the folder belongs to other data."""
        ids = list(dict.fromkeys(image_key(row, side) for row in rows for side in (0, 1)))
        index = self.folder / "index.json"
        if not index.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(index, lambda path: path.write_text(json.dumps(dict(images=ids))))
        elif read_json(index).get("images") != ids:
            raise InputError(f"{index}: latents of other data; give another --latents")
        if not self.done_path.exists():
            kind = np.uint16 if self.dtype == torch.bfloat16 else np.float32
            shape = (len(ids), *self.shape)
            np.lib.format.open_memmap(self.latents_path, "w+", kind, shape).flush()
            np.lib.format.open_memmap(self.done_path, "w+", np.uint8, shape[:1]).flush()

    def open(self):
        """Read the index; returns self. Raises InputError if a file is missing or broken."""
        if not self.done_path.exists():
            advice = "run embed.py --cache-latents with the same flags, or move the folder away"
            raise InputError(f"{self.latents_path} is not there; {advice}")
        index = self.folder / "index.json"
        images = read_json(index).get("images")
        if not isinstance(images, list):
            raise InputError(f"{index}: no list of images; move the folder away")
        self.index = {str(image): i for i, image in enumerate(images)}
        shape = (len(images), *self.shape)
        for path, expected in ((self.latents_path, shape), (self.done_path, shape[:1])):
            if open_array(path).shape != expected:
                raise InputError(f"{path}: not an array of {expected}; {CACHE_AGAIN}")
        return self

    def missing(self, rows):
        """{image: (row, side)} of the images of these rows that are not encoded yet."""
        done = open_array(self.done_path)
        missing = {}
        for row in rows:
            for side in (0, 1):
                key = image_key(row, side)
                if key not in self.index:
                    raise InputError(f"{self.folder}: latents of other data, without image {key}")
                if not done[self.index[key]]:
                    missing.setdefault(key, (row, side))
        return missing

    def write(self, keys, latents):
        """Latents (n, C, h, w) of these images; each is done only once it is on the disk."""
        positions = [self.index[key] for key in keys]
        kind = torch.uint16 if self.dtype == torch.bfloat16 else torch.float32
        latents = latents.cpu().contiguous().view(kind)
        for path, values in ((self.latents_path, latents.numpy()), (self.done_path, 1)):
            array = open_array(path, "r+")
            array[positions] = values
            array.flush()

    def __call__(self, row):
        sides = (row["preferred"], 1 - row["preferred"])
        positions = [self.index[image_key(row, side)] for side in sides]
        latents = torch.from_numpy(open_array(self.latents_path)[positions]).view(self.dtype)
        if not latents.isfinite().all():
            problem = "an image of it was broken when latents were cached"
            raise InputError(f"{row['file']} row {row['row']}: {problem}")
        return latents


@lru_cache(None)  # opened once in each process
def open_array(path, mode="r"):
    try:
        return np.lib.format.open_memmap(path, mode)
    except (ValueError, OSError, EOFError) as error:
        problem = f"no array of latents ({first_line(error, 60)}); {CACHE_AGAIN}"
        raise InputError(f"{path}: {problem}") from None


def open_images(data, latents, rows, codec, dtype):
    """CachedLatents if the data's latents folder (or --latents) is there, else its ImagePairs."""
    folder = Path(latents or Path(data) / "latents")
    if not latents and not folder.is_dir():
        return ImagePairs(data, codec, rows)
    cached = CachedLatents(folder, codec, dtype).open()
    n_missing = len(cached.missing(rows))
    if n_missing:
        problem = f"{n_missing} images are not encoded yet; run embed.py --cache-latents again"
        raise InputError(f"{cached.latents_path}: {problem}")
    return cached
