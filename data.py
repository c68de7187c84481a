"""Preference data: rows and splits, images, four-shot groups, user files, the training dataset.

The way of a pair: read_rows -> split_rows (Sec. 5.2) -> embed.py or rewards.py (whose it is, which
groups may condition it) -> pairs.parquet (write_pairs, read_pairs) -> PreferencePairs (a training
example) -> collate (a micro-batch). Its images or their latents come from bases/latents.py.
"""

import contextlib
import hashlib
import json
import re
import signal
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from numbers import Number
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, Dataset

from utils import InputError, first_line, rank_and_world, write_atomically

SPLITS = ("train", "validation", "validation-unseen", "test-seen", "test-unseen")
SALT = 22350  # of the split hashes; with it the 20 tiny test captions show all colors and shapes
INTEGER = pa.int64()
TEXT = pa.string()
# What is read of Pick-a-Pic v2's rows, and what pairs.parquet holds (scores: of synthetic users).
COLUMNS = dict(ranking_id=INTEGER, user_id=TEXT, caption=TEXT, image_0_uid=TEXT)
COLUMNS |= dict(image_1_uid=TEXT, label_0=pa.float64(), label_1=pa.float64())
IMAGE_COLUMNS = ("jpg_0", "jpg_1")
ID_COLUMNS = ("ranking_id", "image_0_uid", "image_1_uid")  # by which a row is known again
PAIR_COLUMNS = dict(ranking_id=INTEGER, user=TEXT, split=TEXT, caption=TEXT, file=TEXT, row=INTEGER)
PAIR_COLUMNS |= dict(preferred=INTEGER, groups=pa.list_(INTEGER))
OPTIONAL_COLUMNS = ("image_0_uid", "image_1_uid", "score_0", "score_1")
# Other public sets, {their column: what it is to us}; see convert_data
COLUMN_MAPS = dict(
    hpdv2="user_id=user_id,prompt=caption,image_left_id=image_0,image_right_id=image_1,pref=choice",
    pamela="participant_id=user_id,prompt=caption,image=image,rating=rating",
)
COLUMN_MAPS["open-image-preferences"] = (
    "preference.responses.users=user_id,prompt=caption,images.image_1=image_0,"
    "images.image_2=image_1,preference.responses=choice"
)
CONVERTED = "train-00000-of-00001.parquet"  # what convert_data writes
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
CHOICES = {"1": 1.0, "-1": 0.0, "image_1": 1.0, "image_2": 0.0}  # of the first image; else a tie


def read_rows(data):
    """Every row's metadata: dicts with COLUMNS plus `file` (inside the folder) and `row` (inside
    the file); no image of Pick-a-Pic's 335 GB is read. Hidden files and folders and our own
    pairs.parquet are passed over. Raises InputError naming file and column."""
    data = Path(data)
    rows = []
    n_files = 0
    for file in sorted(data.rglob("*.parquet")):
        if any(part.startswith(".") for part in file.relative_to(data).parts):
            continue
        try:
            reader = pq.ParquetFile(file)
            schema = reader.schema_arrow
            if b"ppd" in (schema.metadata or ()):
                continue
            n_files += 1
            table = reader.read(columns=[name for name in COLUMNS if name in schema.names])
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file}: not a readable parquet file ({first_line(error)})") from None
        for name in IMAGE_COLUMNS:
            if name not in schema.names or "binary" not in str(schema.field(name).type):
                raise InputError(f"{file}: column {name!r} is missing or unusable; expected bytes")
        found = cast_columns(table, COLUMNS, file).to_pylist()
        name = str(file.relative_to(data))
        rows += [row | dict(file=name, row=i) for i, row in enumerate(found)]
    if not n_files:
        raise InputError(f"--data {data}: no .parquet file in that folder")
    return rows


def convert_data(source, columns, out):
    """Another data set's parquet or jsonl files -> one in `out`, in Pick-a-Pic's columns.

    columns: a key of COLUMN_MAPS, or "theirs=ours,...", where ours are caption, user_id and either
        preferred and dispreferred (images), or image_0, image_1 and choice (one of CHOICES; lists
        of users and choices where several chose), or image and rating, of which pairs are made
    An image is bytes, {"bytes"} or {"path"} as in the hub's sets, or the name of a file in source.
    """
    words = COLUMN_MAPS.get(columns, columns).split(",")
    names = dict(word.split("=", 1) for word in words if "=" in word)
    kinds = ({"preferred", "dispreferred"}, {"image_0", "image_1", "choice"}, {"image", "rating"})
    if set(names.values()) not in [kind | {"caption", "user_id"} for kind in kinds]:
        expected = f"one of {', '.join(COLUMN_MAPS)}, or theirs=ours,... as data.convert_data says"
        raise InputError(f"--columns {columns}: expected {expected}")
    choices = read_choices(Path(source), names)
    choices = iter(pair_ratings(choices) if "rating" in names.values() else choices)
    schema = pa.schema(COLUMNS | dict.fromkeys(IMAGE_COLUMNS, pa.binary()))
    users = []

    def write(to):
        with pq.ParquetWriter(to, schema) as writer:
            for part in iter(lambda: list(islice(choices, 100)), []):
                rows = []
                for choice in part:
                    images = [choice["image_0"], choice["image_1"]]
                    uids = [hashlib.sha1(image).hexdigest()[:20] for image in images]
                    row = [len(users), choice["user_id"], choice["caption"], *uids]
                    rows.append([*row, choice["label"], 1 - choice["label"], *images])
                    users.append(choice["user_id"])
                writer.write_table(pa.table(list(zip(*rows, strict=True)), schema), 100)

    Path(out).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(out) / CONVERTED, write)
    print(f"--columns {columns}: {len(users)} choices of {len(set(users))} users -> {out}")


def read_choices(source, names):
    """Records of a set's files by our names, images as bytes: dicts of user_id, caption, image_0,
    image_1, label (the first's), or image and rating. One without its images is named, left out."""
    load = image_loader(source.parent if source.is_file() else source)
    shown = (path for path in sorted(source.rglob("*")) if not path.name.startswith("."))
    for path, number, record in read_records([source] if source.is_file() else shown):
        where = f"{path} row {number}"
        try:
            row = {ours: cell(record, theirs) for theirs, ours in names.items()}
        except (KeyError, TypeError):
            raise InputError(f"{where}: not the columns {', '.join(names)}") from None
        try:
            row |= {key: load(row[key]) for key in row if "image" in key or "preferred" in key}
        except (KeyError, ValueError, OSError) as error:
            print(f"left out: {where}: no image {error}", file=sys.stderr)
            continue
        users, answers = row["user_id"], row.get("choice")
        if not isinstance(users, list) and not isinstance(answers, list):
            users, answers = [users], [answers]
        texts = isinstance(row["caption"], str | None) and isinstance(row.get("rating", 0), Number)
        lists = isinstance(users, list) and isinstance(answers, list)
        if not texts or not lists or len(users) != len(answers):
            raise InputError(f"{where}: expected a caption, a number to rate it, a choice a user")
        if "preferred" in row:
            row |= dict(image_0=row["preferred"], image_1=row["dispreferred"])
        for user, answer in zip(users, answers, strict=True):
            label = 1.0 if "preferred" in row else label_of(answer, where)
            yield row | dict(user_id=None if user is None else str(user), label=label)


def image_loader(root):
    """A function from an image in a record, see convert_data, to its bytes."""

    @lru_cache(None)
    def index():  # of images that are named, but not where they are
        found = {}
        for path in root.rglob("*"):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                for name in {path.name, path.stem}:
                    found.setdefault(name, []).append(path)
        return found

    def load(value):
        value = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
        if isinstance(value, bytes):
            return value
        file = root / str(value)
        if not file.is_file():
            (file,) = index()[file.name]  # of several none is known to be it
        return file.read_bytes()

    return load


def label_of(choice, where):
    """The first image's label by a set's own word for a choice: what is no number may be a tie."""
    if isinstance(choice, float) and choice.is_integer():
        choice = int(choice)
    if isinstance(choice, Number) and str(choice) not in CHOICES:
        expected = "expected 1 for the first image, -1 for the other"
        raise InputError(f"{where}: choice {choice}; {expected}")
    return CHOICES.get(str(choice), 0.5)


def read_records(paths):
    """(path, number, dict) of the rows of those of the files that are parquet or jsonl."""
    for path in paths:
        try:
            records = ()
            if path.suffix == ".parquet":
                batches = pq.ParquetFile(path).iter_batches(100)
                records = (record for batch in batches for record in batch.to_pylist())
            elif path.suffix == ".jsonl":
                lines = path.read_bytes().decode("utf-8-sig").split("\n")
                records = (json.loads(line) for line in lines if line.strip())
            for number, record in enumerate(records):
                yield path, number, record
        except (ValueError, pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: cannot be read ({first_line(error)})") from None


def cell(record, name):
    """A record's value; "a.b" is a column of that name, or b inside a."""
    if name in record:
        return record[name]
    for part in name.split("."):
        record = record[part]
    return record


def pair_ratings(rated):
    """Choices of who rated images of one caption: the best over the worst, the second best over the
    second worst and so on, each image once, where they differ."""
    groups, seen = {}, {}
    for row in rated:
        row["image"] = seen.setdefault(hashlib.sha1(row["image"]).digest(), row["image"])
        groups.setdefault((row["user_id"], row["caption"]), []).append(row)
    for rows in groups.values():
        rows.sort(key=lambda row: row["rating"], reverse=True)
        for best, worst in zip(rows[: len(rows) // 2], rows[::-1], strict=False):
            if best["rating"] > worst["rating"]:
                yield best | dict(image_0=best["image"], image_1=worst["image"], label=1.0)


def look_up(table, keys, missing="people.json: no user"):
    """The values of keys in a dict; of one that is not there InputError, "<missing> <key> ..."."""
    for key in keys:
        if key not in table:
            raise InputError(f"{missing} {key} there; expected the data the users were read from")
    return [table[key] for key in keys]


def rows_by_id(data):
    """A function from ranking ids to a data folder's rows (the first of an id: what split_rows
    keeps); InputError of an id not there."""
    rows = {}
    for row in filter(is_choice, read_rows(data)):
        rows.setdefault(row["ranking_id"], row)
    return lambda ids: look_up(rows, ids, f"--data {data}: no pair of ranking id")


def cast_columns(table, types, path):
    """These columns of a table, in these types; InputError names the first that cannot be had."""
    columns = {}
    for name, kind in types.items():
        try:
            columns[name] = as_text(table[name]) if kind == TEXT else table[name].cast(kind)
        except (KeyError, pa.ArrowException):
            problem = f"column {name!r} is missing or unusable; expected {kind}"
            raise InputError(f"{path}: {problem}") from None
    return pa.table(columns)


def as_text(column):
    """A column as text, empty where that is not UTF-8."""
    try:
        column = column.cast(TEXT)
        column.validate(full=True)
        return column
    except pa.ArrowInvalid:
        texts = [v and v.decode(errors="replace") for v in column.cast(pa.binary()).to_pylist()]
        return pa.array([None if v and "\ufffd" in v else v for v in texts], TEXT)


def hash_fraction(kind, key):
    """A stable number in [0, 1) for a user or caption; splits depend on nothing else."""
    digest = hashlib.sha256(f"ppd-{SALT}:{kind}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_rows(rows, validation, test, unseen, validation_users=0.0):
    """Sec. 5.2's splits, by hash of user and caption: three sets of captions by three of users.

    validation, test: shares of captions; unseen, validation_users: shares of users to test and to
        tune on
    Returns the kept rows with their `split` and `preferred` (0 or 1), and a Counter of what was
    dropped and why. Training users' rows are split "train", "validation" and "test-seen" by their
    caption. Of the other users' rows "test-unseen" and "validation-unseen" are tested, those of
    split "shots" only condition, and validation users' rows of test captions are dropped. Images
    recur (Pick-a-Pic's winner stays): a row outside train that shares one with train is dropped.
    """

    @lru_cache(None)
    def split_of(user, caption):
        fraction = hash_fraction("caption", caption)
        kind = "test" if fraction < validation + test else "train"
        kind = "validation" if fraction < validation else kind
        fraction = hash_fraction("user", user)
        if fraction < unseen:
            return "test-unseen" if kind == "test" else "shots"
        if fraction < unseen + validation_users:
            return dict(train="shots", validation="validation-unseen", test=None)[kind]
        return "test-seen" if kind == "test" else kind

    kept = []
    dropped = Counter()
    first = {}
    for row in rows:
        row["split"] = None
        if row["ranking_id"] is None or not row["caption"] or not row["user_id"]:
            dropped["no id, caption or user"] += 1
        elif not is_choice(row):
            dropped["tie or no choice"] += 1
        elif is_repeated(row, first.setdefault(row["ranking_id"], row)):
            dropped["repeated"] += 1
        else:
            caption = unicodedata.normalize("NFC", row["caption"])
            row["split"] = split_of(row["user_id"], " ".join(caption.lower().split()))
            row["preferred"] = int(row["label_1"])
            dropped["validation user, test caption"] += row["split"] is None
        if row["split"]:
            kept.append(row)
    trained = {image for row in kept if row["split"] == "train" for image in image_ids(row)}
    fresh = [row for row in kept if row["split"] == "train" or not trained & image_ids(row)]
    dropped["image also in train"] = len(kept) - len(fresh)
    return fresh, dropped


def is_choice(row):
    return (row["label_0"], row["label_1"]) in ((0, 1), (1, 0))


def is_repeated(row, first):
    """Whether a row is a copy of the first one of its ranking id; InputError if only the id is."""
    keys = ("user_id", "caption", "image_0_uid", "image_1_uid")
    if any(row[key] != first[key] for key in keys):
        places = " and ".join(f"{r['file']} row {r['row']}" for r in (first, row))
        raise InputError(f"{places} are different choices of one ranking_id, {row['ranking_id']}")
    return row is not first


def held_out_rows(users, pairs, new_tastes=()):
    """The tested rows of pairs.parquet by kind of user, in an order that only hashes decide:
    dict(seen=, new_user=, new_taste=) without empty ones, the last of users among `new_tastes`.
    InputError, naming `users`, of nobody, of one alone of a kind, of a new taste trained on."""
    used = {row["user"] for row in pairs if row["split"] in ("train", "validation-unseen")}
    used = used.intersection(new_tastes)
    if used:
        problem = f"user {min(used)} has a new taste but trains; embed with more --unseen-users"
        raise InputError(f"--users {users}: {problem}")
    rows = dict(seen=[], new_user=[], new_taste=[])
    for row in sorted(pairs, key=lambda row: hash_fraction("evaluation", row["ranking_id"])):
        if row["split"] == "test-seen":
            rows["seen"].append(row)
        elif row["split"] == "test-unseen":
            rows["new_taste" if row["user"] in new_tastes else "new_user"].append(row)
    rows = {kind: found for kind, found in rows.items() if found}
    if not rows:
        raise InputError(f"--users {users}: pairs.parquet has no pair to test on")
    for kind, found in rows.items():
        if len({row["user"] for row in found}) == 1:
            problem = f"one user to test of the kind {kind}; expected 2 or more, or none"
            raise InputError(f"--users {users}: {problem}")
    return rows


def one_each(rows, n):
    """The first row of each of n users, whom only their own hashes choose: in the rows' order those
    who have many would come first."""
    first = {}
    for row in rows:
        first.setdefault(row["user"], row)
    return sorted(first.values(), key=lambda row: hash_fraction("evaluation", row["user"]))[:n]


def image_key(row, side):
    """An image recurs under one id; one without an id is only itself."""
    return str(row.get(f"image_{side}_uid") or f"{row['file']} {row['row']} {side}")


def image_ids(row):
    return {image_key(row, 0), image_key(row, 1)}


def few_shot_groups(rows, most, shots=4):
    """A user's conditioning rows -> up to `most` disjoint groups of `shots`, in an order that only
    hashes decide, one row or more left over where there are more than `shots`, none of fewer."""
    if len(rows) < shots:
        return []
    rows = sorted(rows, key=lambda row: hash_fraction("order", row["ranking_id"]))
    count = min(most, max(1, (len(rows) - 1) // shots))
    return [rows[shots * g : shots * (g + 1)] for g in range(count)]


def write_user(path, **fields):
    """A user's file, atomically; plain values and tensors only. See load_user."""
    record = dict(user=Path(path).name.removesuffix(".pt"), shots=[], profile=None, split="train")
    record |= dict(vlm=None, layer=None, version=1)
    write_atomically(path, lambda to: torch.save(record | fields, to))


def load_user(path):
    """A user's file, written by embed.py: dict with `user` (id), `embedding` (G, S, D) float32 (G
    four-shot groups, S stored VLM states), `shots`, `profile`, `split`, `vlm`, `layer`, `version`.
    Only tensors and plain values: a pickle that would run code is refused. Raises InputError."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such user file; embed.py writes them")
    try:
        user = torch.load(path, map_location="cpu", weights_only=True)
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
    """<folder>/pairs.parquet -> its rows, dicts of PAIR_COLUMNS, and embed.py's settings."""
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
        if not re.fullmatch(r"[\w%-][\w.%-]*", name):
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
    """What train.py takes of a users folder, of all users or those named in `only`:
    dict(train=rows, validation=rows), {user: the last stored state (groups, D) float32}, their
    embedding_source, and embed.py's settings plus a digest of it all as `content`."""
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
    settings["content"] = content.hexdigest()[:16]
    return rows, embeddings, list(sources.pop()[1:]), settings


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
    load_images: object  # of bases.latents: a row -> its two images or latents
    latent_shape: tuple  # (C, h, w), of the noise
    seed: int
    separate_noise: bool = False  # one noise an image, as Eq. 6 writes it, instead of one a pair
    t_min: float = 0.0  # timesteps are uniform in [t_min, 1]
    strata: int = 1  # of so many pairs after each other, each has one of as many equal parts of it

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
        t = self.t_min + (1 - self.t_min) * (index % self.strata + time_draw) / self.strata
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


def batch_indices(args, step, m):
    """Which of the training sequence's pairs this rank holds in a step's m-th micro-step."""
    rank, world_size = rank_and_world()
    first = step * args.batch + (m * world_size + rank) * args.micro
    return range(first, first + args.micro)


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
        try:
            yield from DataLoader(dataset, worker_init_fn=ignore_signals, **loader_settings)
        except Exception as error:  # its traceback would keep the iterator
            raise error.with_traceback(None) from None

    with contextlib.suppress(ImportError, ValueError):  # every tensor of a worker's is a file
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.closing(batches()) as iterator:
        yield iterator
