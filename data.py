"""Preference data: rows and splits, images, four-shot groups, user files, the training dataset.

The way of a pair: read_rows -> split_rows (Sec. 5.2) -> embed.py or rewards.py (whose it is, which
groups may condition it) -> pairs.parquet (write_pairs, read_pairs) -> PreferencePairs (a training
example) -> collate (a micro-batch). Images come from the parquet files (ImagePairs), or their
latents from a cache (CachedLatents, `embed.py --cache-latents`).
"""

import contextlib
import hashlib
import io
import json
import re
import signal
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from utils import InputError, first_line, read_json, torch_load_safe, write_atomically

SPLITS = ("train", "validation", "test-seen", "test-unseen")
SALT = 33759  # of the split hashes; with it the 8 tiny test captions show all colors and shapes
INTEGER = pa.int64()
TEXT = pa.string()
# What is read of Pick-a-Pic v2's rows, and what pairs.parquet holds (scores: of synthetic users).
COLUMNS = dict(ranking_id=INTEGER, user_id=INTEGER, caption=TEXT, image_0_uid=TEXT)
COLUMNS |= dict(image_1_uid=TEXT, label_0=pa.float64())
IMAGE_COLUMNS = ("jpg_0", "jpg_1")
PAIR_COLUMNS = dict(ranking_id=INTEGER, user=TEXT, split=TEXT, caption=TEXT, file=TEXT, row=INTEGER)
PAIR_COLUMNS |= dict(preferred=INTEGER, groups=pa.list_(INTEGER))
OPTIONAL_COLUMNS = ("image_0_uid", "image_1_uid", "score_0", "score_1")
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # others may start programs
CACHE_AGAIN = "delete it and its .done.npy and run embed.py --cache-latents again"


def read_rows(data):
    """Every row's metadata: dicts with COLUMNS plus `file` (inside the folder) and `row` (inside
    the file); no image of Pick-a-Pic's 335 GB is read. Raises InputError naming file and column."""
    data = Path(data)
    files = sorted(data.rglob("*.parquet"))
    if not files:
        raise InputError(f"--data {data}: no .parquet file in that folder")
    rows = []
    for file in files:
        try:
            reader = pq.ParquetFile(file)
            schema = reader.schema_arrow
            table = reader.read(columns=[name for name in COLUMNS if name in schema.names])
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file}: not a readable parquet file ({first_line(error)})") from None
        for name in IMAGE_COLUMNS:
            if name not in schema.names or "binary" not in str(schema.field(name).type):
                raise InputError(f"{file}: column {name!r} is missing or unusable; expected bytes")
        found = cast_columns(table, COLUMNS, file).to_pylist()
        name = str(file.relative_to(data))
        rows += [row | dict(file=name, row=i) for i, row in enumerate(found)]
    return rows


def cast_columns(table, types, path):
    """These columns of a table, in these types; InputError names the first that cannot be had."""
    columns = {}
    for name, kind in types.items():
        try:
            columns[name] = table[name].cast(kind)
        except (KeyError, pa.ArrowException):
            problem = f"column {name!r} is missing or unusable; expected {kind}"
            raise InputError(f"{path}: {problem}") from None
    return pa.table(columns)


def hash_fraction(kind, key):
    """A stable number in [0, 1) for a user or caption; splits depend on nothing else."""
    digest = hashlib.sha256(f"ppd-{SALT}:{kind}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_rows(rows, validation, test, unseen):
    """Sec. 5.2's four splits, by hash of user and caption.

    validation, test: shares of captions; unseen: share of users
    Returns the kept rows with their `split` and `preferred` (0 or 1), and a Counter of what was
    dropped and why. An unseen user's other captions are split "shots": they only condition. Images
    recur (Pick-a-Pic's winner stays): a row outside train that shares one with train is dropped.
    """

    @lru_cache(None)
    def split_of(user, caption):
        is_unseen = hash_fraction("user", user) < unseen
        fraction = hash_fraction("caption", caption)
        if validation <= fraction < validation + test:
            return "test-unseen" if is_unseen else "test-seen"
        if is_unseen:
            return "shots"
        return "validation" if fraction < validation else "train"

    kept = []
    dropped = Counter()
    for row in rows:
        if row["label_0"] not in (0, 1):
            dropped["tie or no label"] += 1
        elif row["caption"] is None or row["user_id"] is None:
            dropped["no caption or no user"] += 1
        else:
            row["split"] = split_of(row["user_id"], " ".join(row["caption"].lower().split()))
            row["preferred"] = 0 if row["label_0"] == 1 else 1
            kept.append(row)
    trained = {image for row in kept if row["split"] == "train" for image in image_ids(row)}
    fresh = [row for row in kept if row["split"] == "train" or not trained & image_ids(row)]
    dropped["image also in train"] = len(kept) - len(fresh)
    return fresh, dropped


def held_out_rows(users, pairs):
    """The tested rows of pairs.parquet by kind of user, in an order that only hashes decide:
    dict(seen=, new_user=), those that there are. InputError, naming the folder `users`, if there is
    nobody, or one user alone of a kind."""
    kinds = {"seen": "test-seen", "new_user": "test-unseen"}
    ordered = sorted(pairs, key=lambda row: hash_fraction("evaluation", row["ranking_id"]))
    rows = {kind: [r for r in ordered if r["split"] == split] for kind, split in kinds.items()}
    if not any(rows.values()):
        raise InputError(f"--users {users}: pairs.parquet has no pair to test on")
    for kind, found in rows.items():
        if len({row["user"] for row in found}) == 1:
            problem = f"one user to test of the kind {kind}; expected 2 or more, or none"
            raise InputError(f"--users {users}: {problem}")
    return {kind: found for kind, found in rows.items() if found}


def image_key(row, side):
    """An image recurs under one id; one without an id is only itself."""
    return str(row.get(f"image_{side}_uid") or f"{row['file']} {row['row']} {side}")


def image_ids(row):
    return {image_key(row, 0), image_key(row, 1)}


def print_splits(rows, dropped):
    print(f"{'split':<14}{'users':>8}{'captions':>10}{'pairs':>10}")
    for split in (*SPLITS, "shots"):
        part = [row for row in rows if row["split"] == split]
        users, captions = (len({row[key] for row in part}) for key in ("user_id", "caption"))
        print(f"{split:<14}{users:>8}{captions:>10}{len(part):>10}")
    for reason, count in dropped.items():
        print(f"dropped: {reason:<25}{count:>8}")


@lru_cache(None)
def row_group_starts(file):
    """First row of each of a parquet file's row groups, and the end."""
    meta = pq.read_metadata(file)
    return np.cumsum([0] + [meta.row_group(g).num_rows for g in range(meta.num_row_groups)])


@lru_cache(8)
def read_row_group(file, group):
    return pq.ParquetFile(file).read_row_group(group, columns=list(IMAGE_COLUMNS))


def read_images(data, row, sides=(0, 1)):
    """The two images of a row of read_rows or pairs.parquet, or those of `sides`, as PIL images.
    Raises InputError naming file, row and column."""
    file = Path(data) / row["file"]
    try:
        starts = row_group_starts(file)
        group = int(np.searchsorted(starts, row["row"], "right")) - 1
        table = read_row_group(file, group)
        content = {side: table[f"jpg_{side}"][row["row"] - starts[group]].as_py() for side in sides}
    except (pa.ArrowException, OSError, LookupError) as e:
        raise InputError(f"{file} row {row['row']}: cannot be read ({type(e).__name__})") from None
    name = f"{row['file']} row {row['row']}"
    return [open_image(content[side] or b"", f"{name} jpg_{side}") for side in sides]


def open_image(source, name):
    """An image from a path or from bytes, any mode and orientation -> RGB PIL image, transparency
    over white. Raises InputError naming it if it is missing, broken, cut short or too large."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            image = ImageOps.exif_transpose(Image.open(file, formats=IMAGE_FORMATS))
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


def few_shot_groups(rows, most, shots=4):
    """A user's conditioning rows -> up to `most` disjoint groups of `shots`, in an order that only
    hashes decide, one row or more left over where there are more than `shots`, none of fewer."""
    if len(rows) < shots:
        return []
    rows = sorted(rows, key=lambda row: hash_fraction("order", row["ranking_id"]))
    count = min(most, max(1, (len(rows) - 1) // shots))
    return [rows[shots * g : shots * (g + 1)] for g in range(count)]


def load_shots(data, rows):
    """Conditioning rows -> [(caption, preferred image, dispreferred image), ...]."""
    shots = []
    for row in rows:
        images = read_images(data, row)
        shots.append((row["caption"], *(images if row["label_0"] == 1 else images[::-1])))
    return shots


def write_user(folder, user, **fields):
    """<folder>/<user>.pt, atomically; plain values and tensors only. See load_user."""
    record = dict(user=user, shots=[], profile=None, split="train", vlm=None, layer=None, version=1)
    write_atomically(Path(folder) / f"{user}.pt", lambda path: torch.save(record | fields, path))


def load_user(path):
    """A user's file, written by embed.py: dict with `user` (id), `embedding` (G, S, D) float32 (G
    four-shot groups, S stored VLM states), `shots`, `profile`, `split`, `vlm`, `layer`, `version`.
    Only tensors and plain values are read: a pickle that would run code is refused unrun. Raises
    InputError naming the file."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such user file; embed.py writes them")
    try:
        user = torch_load_safe(path)
    except Exception as e:  # torch raises many kinds: unpickling, zip, end of file
        raise InputError(f"{path}: refused, not a plain user file ({type(e).__name__})") from None
    u = user.get("embedding") if isinstance(user, dict) else None
    usable = torch.is_tensor(u) and u.dtype == torch.float32 and u.ndim == 3 and u.numel() > 0
    if not usable or not u.is_contiguous() or not u.isfinite().all():  # expanded: beyond its file
        expected = "a dict whose 'embedding' is a finite float32 tensor (groups, states, dim)"
        raise InputError(f"{path}: expected {expected}")
    return user


def embedding_source(user):
    """Who read a user, and how: [VLM's folder name, layer, whether after a written profile]. An
    adapter understands no other source's embeddings, though they may be as wide."""
    vlm, layer = (None if user.get(k) is None else str(user[k]) for k in ("vlm", "layer"))
    layer = "-1" if layer == "all" else layer
    return [Path(vlm or "").name, layer, user.get("profile") is not None]


def write_pairs(folder, rows, settings):
    """<folder>/pairs.parquet, atomically; `settings` go into its metadata."""
    names = [name for name in (*PAIR_COLUMNS, *OPTIONAL_COLUMNS) if name in rows[0]]
    columns = {name: [row.get(name) for row in rows] for name in names}
    table = pa.table(columns, metadata={"ppd": json.dumps(settings)})
    write_atomically(Path(folder) / "pairs.parquet", lambda path: pq.write_table(table, path))


def read_pairs(folder):
    """<folder>/pairs.parquet -> its rows as dicts (PAIR_COLUMNS and those of OPTIONAL_COLUMNS that
    are there), and the settings that embed.py made it with."""
    path = Path(folder) / "pairs.parquet"
    if not path.is_file():
        raise InputError(f"--users {folder}: no pairs.parquet there; run embed.py first")
    try:
        table = pq.read_table(path)
        settings = json.loads(table.schema.metadata[b"ppd"])
        assert isinstance(settings["data"], str)
    except (pa.ArrowException, OSError, TypeError, LookupError, ValueError, AssertionError) as e:
        raise InputError(f"{path}: not a pairs file of embed.py ({type(e).__name__})") from None
    optional = {name: table[name].type for name in OPTIONAL_COLUMNS if name in table.column_names}
    table = cast_columns(table, PAIR_COLUMNS | optional, path)
    for name in PAIR_COLUMNS:
        if table[name].null_count:
            raise InputError(f"{path}: column {name!r} has an empty cell")
    for name in table["user"].unique().to_pylist():  # they become file names
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise InputError(f"{path}: user {name!r}; expected letters, digits, '.', '_' and '-'")
    for file in table["file"].unique().to_pylist():
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise InputError(f"{path}: file {file!r}; expected one inside the data folder")
    rows = table.to_pylist()
    for row in rows:
        numbers = (row["row"], *row["groups"])
        if row["preferred"] not in (0, 1) or None in numbers or min(numbers) < 0:
            expected = "expected preferred 0 or 1, and no negative row or group"
            raise InputError(f"{path}: pair {row['ranking_id']}: {expected}")
    return rows, settings


def load_training_data(folder, only=None):
    """What train.py takes of a users folder.

    only: names of users, or None for all
    Returns dict(train=rows, validation=rows), {user: the last stored state (groups, D) float32},
    their embedding_source, and embed.py's settings plus a digest of it all as `content`.
    """
    everything, settings = read_pairs(folder)
    wanted = [row for row in everything if not only or row["user"] in only]
    rows = {split: [row for row in wanted if row["split"] == split] for split in SPLITS[:2]}
    unknown = set(only or ()) - {row["user"] for row in rows["train"]}
    if unknown:
        raise InputError(f"--only {min(unknown)}: no such training user in {folder}")
    if not rows["train"]:
        raise InputError(f"--users {folder}: pairs.parquet has no pair to train on")
    used = rows["train"] + rows["validation"]
    names = sorted({row["user"] for row in used})
    users = {name: load_user(Path(folder) / f"{name}.pt") for name in names}
    sources = {(u["embedding"].shape[-1], *embedding_source(u)) for u in users.values()}
    if len(sources) > 1:
        first, second = sorted(sources, key=str)[:2]
        raise InputError(f"--users {folder}: users of different readers: {first} and {second}")
    embeddings = {name: user["embedding"][:, -1] for name, user in users.items()}
    for row in used:
        count = len(embeddings[row["user"]])
        if not row["groups"] or max(row["groups"]) >= count:
            wanted = f"groups {row['groups']} of {row['user']}.pt, which has {count}"
            raise InputError(f"--users {folder}: pairs.parquet wants {wanted}")

    keys = ("ranking_id", "user", "preferred", "groups")
    identities = [repr([row[key] for key in keys]) for row in rows["train"]]
    content = hashlib.sha256("".join(identities).encode())
    for embedding in embeddings.values():
        content.update(embedding.numpy().tobytes())
    settings |= dict(content=content.hexdigest()[:16])
    return rows, embeddings, list(sources.pop()[1:]), settings


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


class SingleImages(Dataset):
    """The images of [(row, side), ...], to encode: (3, S, S) uint8, or None for a broken one, which
    is named."""

    def __init__(self, sources, data, codec):
        self.sources = sources
        self.data = data
        self.codec_fit = (codec.image_size, codec.resample)

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, i):
        row, side = self.sources[i]
        try:
            return fit_pixels(read_images(self.data, row, (side,)), *self.codec_fit)[0]
        except InputError as problem:
            print(f"left out: {problem}", file=sys.stderr)


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


@lru_cache(2)
def epoch_order(seed, epoch, n):
    return np.random.default_rng([seed, epoch]).permutation(n)


def keyed_generator(*numbers):
    """A random stream that these integers, 0 or more, decide."""
    key = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(key) >> 1)  # torch takes 63 bits


@dataclass(eq=False)
class PreferencePairs(Dataset):
    """The pair at an index of the endless training sequence, epoch after epoch, each in an order of
    its own. Everything random about it comes from (seed, index) alone: the same on 1 GPU or 64,
    however accumulated, and after a resume."""

    rows: list  # pairs to draw from
    embeddings: dict  # {user: (groups, D)}
    load_images: ImagePairs | CachedLatents
    latent_shape: tuple  # (C, h, w), of the noise
    seed: int
    separate_noise: bool = False  # one noise an image, as Eq. 6 writes it, instead of one a pair
    t_min: float = 0.0  # timesteps are uniform in [t_min, 1]

    def __getitem__(self, index):
        """One training example, a dict:

        caption: str
        images: (2, 3, S, S) uint8 or latents (2, C, h, w), the preferred first
        noise: (2, C, h, w) float32, what will be added; both alike unless separate_noise
        t: float in [t_min, 1], one for the pair
        user: (D,) float32, the embedding of one of the groups that may condition this pair
        drop_draw: float in [0, 1], 1 by rounding; up to --user-drop the user is zeroed
        """
        g = keyed_generator(self.seed, index)
        time_draw, drop_draw, group_draw = torch.rand(3, generator=g, dtype=torch.float64).tolist()
        noise = torch.randn(2, *self.latent_shape, generator=g)
        noise = noise if self.separate_noise else noise[:1].expand_as(noise)
        row, images = self.load(index)
        group = row["groups"][int(group_draw * len(row["groups"]))]
        user = self.embeddings[row["user"]][group]
        t = self.t_min + (1 - self.t_min) * time_draw
        example = dict(caption=row["caption"], images=images, noise=noise)
        return example | dict(t=t, user=user, drop_draw=drop_draw)

    def load(self, index):
        """The pair at an index, and its images; for a broken one, which is named, the next one."""
        epoch, position = divmod(index, len(self.rows))
        order = epoch_order(self.seed, epoch, len(self.rows))
        for skipped in range(100):
            row = self.rows[order[(position + skipped) % len(order)]]
            try:
                return row, self.load_images(row)
            except InputError as problem:
                print(f"skipped: {problem}", file=sys.stderr)
        raise InputError(f"{row['file']}: 100 broken pairs one after the other")


def collate(pairs, tokenize):
    """B examples of PreferencePairs -> one micro-batch, a dict of tensors:

    tokens: (2, B, L) int64, the base's token ids and mask of the captions
    images: (2B, 3, S, S) uint8 or latents (2B, C, h, w): the B preferred first, then the B
        dispreferred in the same order
    noise: (2B, C, h, w) float32, in that order
    t: (B,), user: (B, D) float32, drop_draw: (B,), as in PreferencePairs
    """
    columns = {key: [pair[key] for pair in pairs] for key in pairs[0]}
    batch = dict(tokens=tokenize(columns["caption"]), user=torch.stack(columns["user"]))
    for key in ("images", "noise"):  # B times (2, ...) -> (2B, ...)
        batch[key] = torch.stack(columns[key], dim=1).flatten(0, 1)
    for key in ("t", "drop_draw"):
        batch[key] = torch.tensor(columns[key])
    return batch


def ignore_signals(worker):
    """Ctrl-C and a scheduler's SIGTERM reach the workers too, but are for the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def loading(dataset, **loader_settings):
    """An iterator over a DataLoader's batches; its workers end with the block, whatever happens in
    it. They ignore signals, so an interpreter that found them alive would wait for ever."""

    def batches():  # closed, it drops the loader's own iterator, which then ends its workers
        yield from DataLoader(dataset, worker_init_fn=ignore_signals, **loader_settings)

    with contextlib.closing(batches()) as iterator:
        yield iterator
