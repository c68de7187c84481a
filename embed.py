"""Stage 1 of PPD: people's choices in, one file a person out (paper Sec. 4.2, 5.1, 5.2).

Everything that looks at preference data is here: rows -> splits -> users. It writes `<users>/<id>.pt`, one a person,
and `<users>/pairs.parquet`, one row a kept pair, without image bytes: those train.py reads from the same --data.

    python embed.py --one-hot light warm large --users users-onehot    # Sec. 5.1: a reward is a person, a one-hot vector

The tiny world's data is drawn into data/tiny on first use.
"""
import argparse
import hashlib
import io
import json
import sys
import warnings
from collections import Counter
from functools import lru_cache
from pathlib import Path

SPLITS = ("train", "validation", "test-seen", "test-unseen")
SALT = 33759  # of the split hashes; chosen so that the tiny world's 8 test captions show all colours and all shapes


def arguments(argv=None):
    p = argparse.ArgumentParser(prog="embed.py", usage=argparse.SUPPRESS, description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="data/tiny", help="folder of parquet files in Pick-a-Pic v2's columns (default: %(default)s)")
    p.add_argument("--users", default=None, help="folder to write (default: users-onehot)")
    p.add_argument("--one-hot", nargs="+", metavar="REWARD", required=True,
                   help="synthetic users: relabel every pair by each reward; light dark warm cool large small right left high low")
    p.add_argument("--validation-captions", type=float, default=0.1, help="share of captions, by hash (default: %(default)s)")
    p.add_argument("--test-captions", type=float, default=0.2, help="share of captions, by hash (default: %(default)s)")
    p.add_argument("--unseen-users", type=float, default=0.25, help="share of users, by hash (default: %(default)s)")
    args = p.parse_args(argv)
    args.users = args.users or "users-onehot"
    if len(set(args.one_hot)) < len(args.one_hot):
        p.error("--one-hot: a reward is named twice")
    from tiny import WORDS
    for name in args.one_hot:
        if name not in WORDS:
            p.error(f"--one-hot {name}: no such reward; choose from {' '.join(WORDS)}")
    for name in ("validation_captions", "test_captions", "unseen_users"):
        if not 0 <= getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a share in [0, 1)")
    if args.validation_captions + args.test_captions >= 1:
        p.error("--validation-captions and --test-captions leave no caption to train on")
    return args


if __name__ == "__main__":
    arguments()  # a wrong flag answers at once, not after the imports

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import tiny
from ppd import BadInput, run_script, write_atomically

COLUMNS = dict(ranking_id="an integer", user_id="an integer", caption="a string", image_0_uid="a string",
               image_1_uid="a string", label_0="0, 0.5 or 1")


# -------------------------------------------------------------------------------------------------- rows and splits
def read_rows(data):
    """Every row's metadata: list of dicts with COLUMNS plus `file` (inside the folder) and `row` (inside the file). Of
    335 GB of Pick-a-Pic this reads the few columns named here, no image."""
    data = Path(data)
    files = sorted(data.rglob("*.parquet"))
    if not files:
        raise BadInput(f"--data {data}: no .parquet file in that folder; expected Pick-a-Pic v2's own layout")
    rows = []
    for file in files:
        try:
            reader = pq.ParquetFile(file)
            missing = [c for c in (*COLUMNS, "jpg_0", "jpg_1") if c not in reader.schema_arrow.names]
            if missing:
                raise BadInput(f"{file}: column {missing[0]!r} is missing; expected Pick-a-Pic v2's columns")
            table = reader.read(columns=list(COLUMNS)).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise BadInput(f"{file}: not a readable parquet file ({str(error).splitlines()[0]})") from None
        for i, row in enumerate(table):
            row.update(file=str(file.relative_to(data)), row=i)
        rows += table
    return rows


def share(kind, key):
    """A stable number in [0, 1) for a user or a caption: the splits depend on nothing else, so they never move."""
    return int.from_bytes(hashlib.sha256(f"ppd-{SALT}:{kind}:{key}".encode()).digest()[:8], "big") / 2**64


def split_rows(rows, validation, test, unseen):
    """Sec. 5.2's four splits, by hash of user and caption; returns the kept rows, each with `split` and `preferred` (0
    or 1), and a Counter of what was dropped and why.

    An unseen user's other captions are split "shots": they condition, nothing trains or tests on them. The winner stays
    on screen in Pick-a-Pic's app, so a picture recurs: a row outside train that shares one with train is dropped.
    """
    kept, dropped, part = [], Counter(), {}
    for row in rows:
        if row["label_0"] not in (0, 1):
            dropped["tie or no label"] += 1
            continue
        if row["caption"] is None or row["user_id"] is None:
            dropped["no caption or no user"] += 1
            continue
        caption = " ".join(row["caption"].lower().split())
        for kind, key in (("user", row["user_id"]), ("caption", caption)):
            if (kind, key) not in part:
                part[kind, key] = share(kind, key)
        c = part["caption", caption]
        held = "validation" if c < validation else "test" if c < validation + test else "train"
        if part["user", row["user_id"]] >= unseen:
            row["split"] = "test-seen" if held == "test" else held
        else:
            row["split"] = "test-unseen" if held == "test" else "shots"
        row["preferred"] = 0 if row["label_0"] == 1 else 1
        kept.append(row)
    trained = {row[uid] for row in kept if row["split"] == "train" for uid in ("image_0_uid", "image_1_uid")}
    fresh = [row for row in kept if row["split"] == "train" or not trained & {row["image_0_uid"], row["image_1_uid"]}]
    dropped["image also in train"] = len(kept) - len(fresh)
    return fresh, dropped


def print_table(rows, dropped):
    print(f"{'split':<14}{'users':>8}{'captions':>10}{'pairs':>10}")
    for split in (*SPLITS, "shots"):
        of = [r for r in rows if r["split"] == split]
        print(f"{split:<14}{len({r['user_id'] for r in of}):>8}{len({r['caption'] for r in of}):>10}{len(of):>10}")
    for reason, count in dropped.items():
        print(f"dropped: {reason:<25}{count:>8}")


@lru_cache(None)
def group_starts(file):
    """First row of each of a parquet file's row groups, and the end."""
    meta = pq.read_metadata(file)
    return np.cumsum([0] + [meta.row_group(g).num_rows for g in range(meta.num_row_groups)])


@lru_cache(8)
def read_group(file, group):
    return pq.ParquetFile(file).read_row_group(group, columns=["jpg_0", "jpg_1"])


def read_pictures(data, row):
    """The two pictures of a row of read_rows or pairs.parquet. Raises BadInput naming file, row and column."""
    starts = group_starts(Path(data) / row["file"])
    group = int(np.searchsorted(starts, row["row"], "right")) - 1
    table, inside = read_group(Path(data) / row["file"], group), row["row"] - starts[group]
    return [open_image(table[c][inside].as_py(), f"{row['file']} row {row['row']} {c}") for c in ("jpg_0", "jpg_1")]


def open_image(source, name):
    """A picture from a path or from bytes, any mode and orientation -> RGB PIL image; transparency over white. Raises
    BadInput naming it if it is missing, broken, truncated or too large to be a picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(source) if isinstance(source, bytes) else source))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # Pillow raises a dozen kinds
        raise BadInput(f"{name}: not a usable image ({type(error).__name__}: {error})") from None


# ------------------------------------------------------------------------------------------- rewards (Sec. 5.1)
def score(name, images):
    """Reward of PIL pictures of any sizes, (B,) floats. name: a pixel reward of the tiny world (it works on any picture)."""
    if len({image.size for image in images}) > 1:
        return np.concatenate([tiny.reward(name, [image]) for image in images])
    return tiny.reward(name, images)


# ------------------------------------------------------------------------------------------------------ files on disk
def write_user(folder, user, **fields):
    """<folder>/<user>.pt, atomically; plain values and tensors only, so that it loads with weights_only=True."""
    record = dict(user=user, shots=[], profile=None, split="train", vlm=None, layer=None, version=1) | fields
    write_atomically(Path(folder) / f"{user}.pt", lambda path: torch.save(record, path))


def write_pairs(folder, rows, settings):
    """<folder>/pairs.parquet, atomically; `settings` go into its metadata, for a second run to compare."""
    keep = ("ranking_id", "user", "split", "caption", "file", "row", "preferred", "groups", "image_0_uid", "image_1_uid", "score_0", "score_1")
    table = pa.table({k: [r.get(k) for r in rows] for k in keep if k in rows[0]})
    table = table.replace_schema_metadata({"ppd": json.dumps(settings)})
    write_atomically(Path(folder) / "pairs.parquet", lambda path: pq.write_table(table, path))


def read_pairs(folder):
    """<folder>/pairs.parquet, written by embed.py -> its rows as dicts, and the settings it was made with."""
    path = Path(folder) / "pairs.parquet"
    if not path.is_file():
        raise BadInput(f"--users {folder}: no pairs.parquet there; run embed.py first")
    try:
        table = pq.read_table(path)
        return table.to_pylist(), json.loads(table.schema.metadata[b"ppd"])
    except (pa.ArrowException, TypeError, KeyError, ValueError) as error:
        raise BadInput(f"{path}: not a pairs file of embed.py ({type(error).__name__})") from None


def one_hot_users(args, rows, settings):
    """Sec. 5.1: every kept pair once per reward, relabelled by it; u is the reward's one-hot vector. A pair with a broken
    picture is named and skipped, one of equal scores is counted and dropped."""
    pairs, equal = [], Counter()
    for start in tqdm(range(0, len(rows), 256), desc="scoring pairs", unit="batch", disable=None):
        batch, images = [], []
        for row in rows[start:start + 256]:
            try:
                images += read_pictures(args.data, row)
                batch.append(row)
            except BadInput as problem:
                print(f"skipped: {problem}", file=sys.stderr)
        for name in args.one_hot if batch else ():
            for row, (first, second) in zip(batch, score(name, images).reshape(-1, 2).tolist()):
                if first == second:
                    equal[name] += 1
                else:
                    pairs.append(row | dict(user=name, preferred=int(second > first), groups=[0], score_0=first, score_1=second))
    if not pairs:
        raise BadInput(f"--data {args.data}: no pair is left, every one is broken or of equal scores")
    Path(args.users).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(args.one_hot):
        write_user(args.users, name, embedding=torch.eye(len(args.one_hot))[i].view(1, 1, -1), vlm="one-hot")
    write_pairs(args.users, pairs, settings)
    for name in args.one_hot:
        of = [p for p in pairs if p["user"] == name]
        kept = [p for p in of if p["split"] == "train"]
        print(f"{name}: {len(of)} pairs, {len(kept)} to train on, {equal[name]} dropped as equal")


def run(args):
    settings = {k: v for k, v in vars(args).items() if k != "users"}
    if (Path(args.users) / "pairs.parquet").exists():
        before = read_pairs(args.users)[1]
        if before != settings:
            changed = [k for k in settings | before if settings.get(k) != before.get(k)]
            raise BadInput(f"--users {args.users} holds users made with another --{changed[0].replace('_', '-')}; choose another folder")
        print(f"{args.users}: already done")
        return
    if args.data == "data/tiny" and not Path(args.data).exists():
        tiny.write_data(args.data)
    if not Path(args.data).is_dir():
        raise BadInput(f"--data {args.data}: no such folder. Pick-a-Pic's original is gone from the hub: give your own copy's parquet folder")
    rows, dropped = split_rows(read_rows(args.data), args.validation_captions, args.test_captions, args.unseen_users)
    print_table(rows, dropped)
    if not any(r["split"] == "train" for r in rows):
        raise BadInput(f"--data {args.data}: no pair is left to train on")
    one_hot_users(args, [r for r in rows if r["split"] != "shots"], settings)
    print(f"-> {args.users}/*.pt and {args.users}/pairs.parquet")


def main(argv=None):
    run_script("embed.py", run, arguments(argv))


if __name__ == "__main__":
    main()
