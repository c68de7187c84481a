"""Preference data: rows and splits, images, four-shot groups, user files, the training dataset.

The way of a pair: read_rows (metadata of the parquet files) -> split_rows (Sec. 5.2's splits) ->
pairs.parquet (write_pairs, read_pairs) -> PreferencePairs (one training example) -> collate (a
micro-batch). Images are read from the parquet files (ImagePairs), or their latents from a cache
that `embed.py --cache-latents` made (CachedLatents).
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
from functools import lru_cache
from pathlib import Path

import einops
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps

from utils import InputError, first_line, read_json, torch_load_safe, write_atomically

SPLITS = ("train", "validation", "test-seen", "test-unseen")
SALT = (
    33759  # of the split hashes; with it the tiny world's 8 test captions show all colors, shapes
)
COLUMNS = {  # what is read of Pick-a-Pic v2's rows
    "ranking_id": pa.int64(),
    "user_id": pa.int64(),
    "caption": pa.string(),
    "image_0_uid": pa.string(),
    "image_1_uid": pa.string(),
    "label_0": pa.float64(),
}
IMAGE_COLUMNS = ("jpg_0", "jpg_1")
PAIR_COLUMNS = {  # of pairs.parquet; the scores are there for synthetic users
    "ranking_id": pa.int64(),
    "user": pa.string(),
    "split": pa.string(),
    "caption": pa.string(),
    "file": pa.string(),
    "row": pa.int64(),
    "preferred": pa.int64(),
    "groups": pa.list_(pa.int64()),
}
OPTIONAL_COLUMNS = ("image_0_uid", "image_1_uid", "score_0", "score_1")
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # others may start programs


# ------------------------------------------------------------------------- rows and splits
def read_rows(data):
    """Every row's metadata: dicts with COLUMNS plus `file` (inside the folder) and `row` (inside
    the file). Of 335 GB of Pick-a-Pic this reads the few columns named here, no image."""
    data = Path(data)
    files = sorted(data.rglob("*.parquet"))
    if not files:
        raise InputError(
            f"--data {data}: no .parquet file in that folder; expected Pick-a-Pic v2's own layout"
        )
    rows = []
    for file in files:
        table = read_metadata(file)
        name = str(file.relative_to(data))
        rows += [row | dict(file=name, row=i) for i, row in enumerate(table.to_pylist())]
    return rows


def read_metadata(file):
    """One parquet file's COLUMNS as a table; InputError names the file and column."""
    try:
        reader = pq.ParquetFile(file)
        schema = reader.schema_arrow
        table = reader.read(columns=[name for name in COLUMNS if name in schema.names])
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a readable parquet file ({first_line(error)})") from None
    for name in IMAGE_COLUMNS:
        if name not in schema.names or "binary" not in str(schema.field(name).type):
            raise InputError(f"{file}: column {name!r} is missing or unusable; expected bytes")
    return cast_columns(table, COLUMNS, file)


def cast_columns(table, types, path):
    """These columns of a table, in these types; InputError names the first that cannot be had."""
    columns = {}
    for name, kind in types.items():
        try:
            columns[name] = table[name].cast(kind)
        except (KeyError, pa.ArrowException):
            raise InputError(
                f"{path}: column {name!r} is missing or unusable; expected {kind}"
            ) from None
    return pa.table(columns)


def hash_fraction(kind, key):
    """A stable number in [0, 1) for a user or caption; splits depend on nothing else."""
    digest = hashlib.sha256(f"ppd-{SALT}:{kind}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_rows(rows, validation, test, unseen):
    """Sec. 5.2's four splits, by hash of user and caption.

    validation, test: shares of captions; unseen: share of users
    Returns the kept rows, each with `split` and `preferred` (0 or 1), and a Counter of what was
    dropped and why. An unseen user's other captions are split "shots": they condition, nothing
    trains or tests on them. The winner stays on screen in Pick-a-Pic's app, so an image recurs: a
    row outside train that shares one with train is dropped.
    """

    @lru_cache(None)
    def split_of(user, caption):
        fraction = hash_fraction("caption", caption)
        if fraction < validation:
            part = "validation"
        else:
            part = "test" if fraction < validation + test else "train"
        if hash_fraction("user", user) >= unseen:
            return "test-seen" if part == "test" else part
        return "test-unseen" if part == "test" else "shots"

    kept, dropped = [], Counter()
    for row in rows:
        if row["label_0"] not in (0, 1):
            dropped["tie or no label"] += 1
        elif row["caption"] is None or row["user_id"] is None:
            dropped["no caption or no user"] += 1
        else:
            row["split"] = split_of(row["user_id"], " ".join(row["caption"].lower().split()))
            row["preferred"] = 0 if row["label_0"] == 1 else 1
            kept.append(row)
    trained = set()
    for row in kept:
        if row["split"] == "train":
            trained |= image_ids(row)
    fresh = [row for row in kept if row["split"] == "train" or not trained & image_ids(row)]
    dropped["image also in train"] = len(kept) - len(fresh)
    return fresh, dropped


def image_ids(row):
    return {row["image_0_uid"], row["image_1_uid"]}


def print_splits(rows, dropped):
    print(f"{'split':<14}{'users':>8}{'captions':>10}{'pairs':>10}")
    for split in (*SPLITS, "shots"):
        part = [row for row in rows if row["split"] == split]
        users = len({row["user_id"] for row in part})
        captions = len({row["caption"] for row in part})
        print(f"{split:<14}{users:>8}{captions:>10}{len(part):>10}")
    for reason, count in dropped.items():
        print(f"dropped: {reason:<25}{count:>8}")


# ------------------------------------------------------------------------------- images
@lru_cache(None)
def row_group_starts(file):
    """First row of each of a parquet file's row groups, and the end."""
    meta = pq.read_metadata(file)
    sizes = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
    return np.cumsum([0] + sizes)


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
        inside = row["row"] - starts[group]
        content = {side: table[f"jpg_{side}"][inside].as_py() for side in sides}
    except (pa.ArrowException, OSError, LookupError) as error:
        raise InputError(
            f"{file} row {row['row']}: cannot be read ({type(error).__name__})"
        ) from None
    name = f"{row['file']} row {row['row']}"
    return [open_image(content[side] or b"", f"{name} jpg_{side}") for side in sides]


def open_image(source, name):
    """An image from a path or from bytes, any mode and orientation -> RGB PIL image, transparency
    over white. Raises InputError naming it if it is missing, broken, cut short or too large."""
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = ImageOps.exif_transpose(Image.open(source, formats=IMAGE_FORMATS))
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
    pixels = torch.from_numpy(np.stack(fitted))
    return einops.rearrange(pixels, "b h w c -> b c h w").contiguous()


# ------------------------------------------------------------------- four-shot groups
def few_shot_groups(rows, most, shots=4):
    """A user's conditioning rows -> up to `most` disjoint groups of `shots`, in an order that only
    hashes decide, at least one row left over where there are more; fewer rows than `shots`:
    none."""
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
        if row["label_0"] != 1:
            images.reverse()
        shots.append((row["caption"], *images))
    return shots


# ------------------------------------------------------------------------ files on disk
def write_user(folder, user, **fields):
    """<folder>/<user>.pt, atomically; plain values and tensors only. See load_user."""
    record = dict(user=user, shots=[], profile=None, split="train", vlm=None, layer=None, version=1)
    path = Path(folder) / f"{user}.pt"
    write_atomically(path, lambda temporary: torch.save(record | fields, temporary))


def load_user(path):
    """A user's file, written by embed.py: dict with `user` (id), `embedding` (G, S, D) float32 (G
    four-shot groups, S stored VLM states), `shots`, `profile`, `split`, `vlm`, `layer`, `version`.

    Only tensors and plain values are read: a pickle that would run code is refused unrun. Raises
    InputError naming the file.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such user file; embed.py writes them")
    try:
        user = torch_load_safe(path)
    except Exception as error:  # torch raises many kinds: unpickling, zip, end of file
        raise InputError(
            f"{path}: refused, not a plain user file ({type(error).__name__})"
        ) from None
    embedding = user.get("embedding") if isinstance(user, dict) else None
    usable = (
        torch.is_tensor(embedding)
        and embedding.ndim == 3
        and embedding.dtype == torch.float32
        and embedding.is_contiguous()  # an expanded one is larger than its file
        and embedding.numel() > 0
        and bool(embedding.isfinite().all())
    )
    if not usable:
        raise InputError(
            f"{path}: expected a dict whose 'embedding' is a finite float32 tensor "
            "(groups, states, dim)"
        )
    return user


def embedding_source(user):
    """Who read a user, and how: [VLM's folder name, layer, whether after a written profile]. An
    adapter understands no other source's embeddings, though they may be as wide."""
    vlm = Path(str(user.get("vlm") or "")).name
    layer = "-1" if user.get("layer") == "all" else user.get("layer")
    return [vlm, layer, bool(user.get("profile"))]


def write_pairs(folder, rows, settings):
    """<folder>/pairs.parquet, atomically; `settings` go into its metadata."""
    names = [name for name in (*PAIR_COLUMNS, *OPTIONAL_COLUMNS) if name in rows[0]]
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    table = table.replace_schema_metadata({"ppd": json.dumps(settings)})
    path = Path(folder) / "pairs.parquet"
    write_atomically(path, lambda temporary: pq.write_table(table, temporary))


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
    optional = {name: table[name] for name in OPTIONAL_COLUMNS if name in table.column_names}
    table = cast_columns(table, PAIR_COLUMNS, path)
    for name in PAIR_COLUMNS:
        if table[name].null_count:
            raise InputError(f"{path}: column {name!r} has an empty cell")
    for name, column in optional.items():
        table = table.append_column(name, column)
    for name in table["user"].unique().to_pylist():  # they become file names
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise InputError(
                f"{path}: user {name!r}; expected a name of letters, digits, '.', '_' and '-'"
            )
    for file in table["file"].unique().to_pylist():
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise InputError(f"{path}: file {file!r}; expected one inside the data folder")
    rows = table.to_pylist()
    for row in rows:
        if row["preferred"] not in (0, 1) or min(row["row"], *row["groups"], 0) < 0:
            raise InputError(
                f"{path}: pair {row['ranking_id']}: expected preferred 0 or 1, and no negative row "
                "or group"
            )
    return rows, settings


def load_training_data(folder, only=None):
    """What train.py takes of a users folder.

    only: names of users, or None for all
    Returns dict(train=rows, validation=rows), {user: embeddings (groups, D) float32, the last
    stored state}, their embedding_source, and embed.py's settings plus a digest of it all as
    `content`.
    """
    everything, settings = read_pairs(folder)
    known = {row["user"] for row in everything if row["split"] == "train"}
    unknown = sorted(set(only or ()) - known)
    if unknown:
        raise InputError(f"--only {unknown[0]}: no such training user in {folder}")
    wanted = [row for row in everything if not only or row["user"] in only]
    rows = {
        split: [row for row in wanted if row["split"] == split] for split in ("train", "validation")
    }
    if not rows["train"]:
        raise InputError(f"--users {folder}: pairs.parquet has no pair to train on")

    used = rows["train"] + rows["validation"]
    users = {
        name: load_user(Path(folder) / f"{name}.pt") for name in sorted({r["user"] for r in used})
    }
    sources = {(u["embedding"].shape[-1], *embedding_source(u)) for u in users.values()}
    if len(sources) > 1:
        first, second = sorted(sources, key=str)[:2]
        raise InputError(
            f"--users {folder}: users of different widths or readers: {first} and {second}; "
            "expected one"
        )
    for row in used:
        count = len(users[row["user"]]["embedding"])
        if not row["groups"] or max(row["groups"]) >= count:
            raise InputError(
                f"--users {folder}: pairs.parquet wants groups {row['groups']} of "
                f"{row['user']}.pt, which has {count}"
            )
    embeddings = {name: user["embedding"][:, -1] for name, user in users.items()}

    content = hashlib.sha256()
    for row in rows["train"]:
        identity = [row[key] for key in ("ranking_id", "user", "preferred", "groups")]
        content.update(repr(identity).encode())
    for embedding in embeddings.values():
        content.update(embedding.numpy().tobytes())
    settings = settings | dict(content=content.hexdigest()[:16])
    return rows, embeddings, list(sources.pop()[1:]), settings


# ----------------------------------------------------------------- images for training
class ImagePairs:
    """The two images of a pair, preferred first, from the parquet files: (2, 3, S, S) uint8."""

    kind = "images"

    def __init__(self, data, codec, rows=()):
        self.data = Path(data)
        self.codec_fit = (codec.image_size, codec.resample)
        for file in sorted({row["file"] for row in rows}):
            if not (self.data / file).is_file():
                raise InputError(
                    f"--data {data}: no file {file} there; give the folder that embed.py read"
                )

    def __call__(self, row):
        images = read_images(self.data, row, (row["preferred"], 1 - row["preferred"]))
        return fit_pixels(images, *self.codec_fit)


class SingleImages(torch.utils.data.Dataset):
    """Images to encode, fitted to the codec: (3, S, S) uint8, or None where one is broken, which is
    named. sources: [(row, side), ...]."""

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


def image_key(row, side):
    """An image recurs under one id; one without an id is only itself."""
    return str(row.get(f"image_{side}_uid") or f"{row['file']} {row['row']} {side}")


class CachedLatents:
    """Latents of a data set's images, encoded once: what ImagePairs gives as (2, C, h, w) latents.

    A folder beside the data (or --latents) holds index.json, the images' ids in the order of their
    rows in the data, and for every codec, latent size and dtype two memory-mapped arrays:
    <name>.npy, (images, C, h, w), and <name>.done.npy, 1 where an image is encoded. All users
    folders of the data share them. numpy has no bfloat16, which is kept as uint16.
    """

    kind = "cached latents"

    def __init__(self, folder, codec, dtype):
        self.folder = Path(folder)
        self.shape = tuple(codec.latent_shape)
        self.dtype = dtype
        size = "x".join(str(n) for n in self.shape)
        self.name = f"{codec.digest()}-{size}-{str(dtype).removeprefix('torch.')}"
        self.index = {}

    def create(self, rows):
        """Make the files for the images of these rows (all of the data's), unless they are there.
        Raises InputError if the folder belongs to other data."""
        ids = dict.fromkeys(image_key(row, side) for row in rows for side in (0, 1))
        index = self.folder / "index.json"
        if not index.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            content = json.dumps(dict(images=list(ids)))
            write_atomically(index, lambda path: path.write_text(content, encoding="utf-8"))
        elif read_json(index).get("images") != list(ids):
            raise InputError(
                f"{index}: latents of other data; move the folder away or give another --latents"
            )
        if not self.path("done").exists():
            kind = np.uint16 if self.dtype == torch.bfloat16 else np.float32
            for part, shape, dtype in (
                ("latents", (len(ids), *self.shape), kind),
                ("done", (len(ids),), np.uint8),
            ):
                np.lib.format.open_memmap(self.path(part), "w+", dtype, shape).flush()

    def path(self, part):
        return self.folder / f"{self.name}{'.done' if part == 'done' else ''}.npy"

    def open(self):
        """Read the index; returns self. Raises InputError if a file is missing or broken."""
        if not self.path("done").exists():
            raise InputError(
                f"{self.folder}: no latents {self.name} there; run embed.py --cache-latents with "
                "the same --base, --dtype and --grid, or move the folder away to train on images"
            )
        images = read_json(self.folder / "index.json").get("images", [])
        self.index = {image: i for i, image in enumerate(images)}
        for part, shape in (("latents", (len(images), *self.shape)), ("done", (len(images),))):
            if open_array(self.path(part)).shape != shape:
                raise InputError(
                    f"{self.path(part)}: not an array of {shape}; delete it and its .done.npy and "
                    "run embed.py --cache-latents again"
                )
        return self

    def require(self, rows):
        """InputError unless both images of every row are encoded."""
        missing = len(self.missing(rows))
        if missing:
            raise InputError(
                f"{self.path('latents')}: {missing} images are not encoded yet; run embed.py "
                "--cache-latents again, it goes on where it stopped"
            )

    def missing(self, rows):
        """{image: (row, side)} of the images of these rows that are not encoded yet."""
        done = open_array(self.path("done"))
        missing = {}
        for row in rows:
            for side in (0, 1):
                key = image_key(row, side)
                if key not in self.index:
                    raise InputError(f"{self.folder}: image {key} is not in its index: other data")
                if not done[self.index[key]]:
                    missing.setdefault(key, (row, side))
        return missing

    def write(self, keys, latents):
        """Latents (n, C, h, w) of these images; each is done only once it is on the disk."""
        positions = [self.index[key] for key in keys]
        array = open_array(self.path("latents"), "r+")
        latents = latents.cpu().contiguous()
        if self.dtype == torch.bfloat16:
            latents = latents.view(torch.uint16)
        array[positions] = latents.numpy()
        array.flush()
        done = open_array(self.path("done"), "r+")
        done[positions] = 1
        done.flush()

    def __call__(self, row):
        array = open_array(self.path("latents"))
        sides = (row["preferred"], 1 - row["preferred"])
        pair = torch.from_numpy(array[[self.index[image_key(row, side)] for side in sides]])
        pair = pair.view(self.dtype) if self.dtype == torch.bfloat16 else pair
        if not pair.isfinite().all():
            raise InputError(
                f"{row['file']} row {row['row']}: an image of it was broken when latents were "
                f"cached"
            )
        return pair


@lru_cache(None)  # opened once in each process, after a fork too
def open_array(path, mode="r"):
    try:
        return np.lib.format.open_memmap(path, mode)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(
            f"{path}: not an array of latents ({first_line(error, 60)}); delete it and its "
            ".done.npy and run embed.py --cache-latents again"
        ) from None


def open_images(data, latents, rows, codec, dtype):
    """CachedLatents if the data's latents folder (or --latents) is there, else its ImagePairs."""
    folder = Path(latents or Path(data) / "latents")
    if not latents and not folder.is_dir():
        return ImagePairs(data, codec, rows)
    cached = CachedLatents(folder, codec, dtype).open()
    cached.require(rows)
    return cached


# --------------------------------------------------------------------- training examples
@lru_cache(2)
def epoch_order(seed, epoch, n):
    return np.random.default_rng([seed, epoch]).permutation(n)


class PreferencePairs(torch.utils.data.Dataset):
    """The pair at an index of the endless training sequence, epoch after epoch, each in an order of
    its own. Everything random about it comes from (seed, index) alone: the same on 1 GPU or 64,
    however accumulated, and after a resume.

    rows: pairs to draw from; embeddings: {user: (groups, D)}
    load_images: ImagePairs or CachedLatents
    latent_shape: (C, h, w), of the noise; separate_noise: one noise an image, as Eq. 6 writes it,
        instead of one a pair; t_min: timesteps are uniform in [t_min, 1]
    """

    def __init__(
        self, rows, embeddings, load_images, latent_shape, seed, separate_noise=False, t_min=0.0
    ):
        self.rows = rows
        self.embeddings = embeddings
        self.load_images = load_images
        self.latent_shape = latent_shape
        self.seed = seed
        self.separate_noise = separate_noise
        self.t_min = t_min

    def __getitem__(self, index):
        """One training example, a dict:

        caption: str
        images: (2, 3, S, S) uint8 or latents (2, C, h, w), the preferred first
        noise: (2, C, h, w) float32, what will be added; both alike unless separate_noise
        t: float in [t_min, 1], one for the pair
        user: (D,) float32, the embedding of one of the groups that may condition this pair
        u_drop: float in [0, 1); the user is dropped where it is below --user-drop
        """
        key = np.random.SeedSequence([self.seed, index]).generate_state(1, np.uint64)[0]
        g = torch.Generator().manual_seed(int(key) >> 1)
        u_time, u_drop, u_group = torch.rand(3, generator=g, dtype=torch.float64).tolist()
        noise = torch.randn(2, *self.latent_shape, generator=g)
        if not self.separate_noise:
            noise = noise[:1].expand_as(noise)
        row, images = self.load(index)
        group = row["groups"][int(u_group * len(row["groups"]))]
        return dict(
            caption=row["caption"],
            images=images,
            noise=noise,
            t=self.t_min + (1 - self.t_min) * u_time,
            user=self.embeddings[row["user"]][group],
            u_drop=u_drop,
        )

    def load(self, index):
        """The pair at an index and its images; a broken one is named and the next takes its
        place."""
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
    t: (B,), user: (B, D) float32, u_drop: (B,), as in PreferencePairs
    """

    def column(key):
        return [pair[key] for pair in pairs]

    def preferred_first(key):  # B times (2, ...) -> (2B, ...)
        return torch.stack(column(key), dim=1).flatten(0, 1)

    return dict(
        tokens=tokenize(column("caption")),
        images=preferred_first("images"),
        noise=preferred_first("noise"),
        t=torch.tensor(column("t")),
        user=torch.stack(column("user")),
        u_drop=torch.tensor(column("u_drop")),
    )


def ignore_signals(worker):
    """Ctrl-C and a scheduler's SIGTERM reach the workers too, but are for the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def loading(dataset, **loader_settings):
    """An iterator over a DataLoader's batches; its workers end with the block, whatever happens in
    it. They ignore signals, so an interpreter that found them alive would wait for ever."""

    def batches():
        loader = torch.utils.data.DataLoader(
            dataset, worker_init_fn=ignore_signals, **loader_settings
        )
        yield from loader

    iterator = batches()
    try:
        yield iterator
    finally:
        iterator.close()  # drops the loader's own iterator, which then ends its workers
