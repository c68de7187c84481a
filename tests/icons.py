"""Real images by several artists, as preference data: emoji of three openly licensed sets (Google's
Noto, Apache 2.0; Twitter's Twemoji and EmojiOne 2, CC BY 4.0), from npm, and users who prefer one
artist's. From the repository's root; it wants npm and takes 230 MB:

    python tests/icons.py --out data/icons --ids users-icons

--out: Pick-a-Pic v2's columns, for embed.py as any real data. --ids: the same choices with an id an
artist as the user, a one-hot vector, for train.py.
"""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import read_rows, split_rows, write_pairs, write_user
from tiny.world import ARROW_TYPES
from utils import InputError, make_parser, run_script

# artist: npm package, where its images are in it
ARTISTS = {
    "noto": ("emoji-datasource-google@16.0.0", "package/img/google/64/"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64/"),
    "emojione": ("emojione@2.2.7", "package/assets/png/"),
}
FIRM = 0.9  # how often a user takes their artist's image, where it is one of the two


def read_images(folder):
    """{artist: {code: PNG bytes}} and {code: name}; packages are downloaded once."""
    folder.mkdir(parents=True, exist_ok=True)
    images, names = {}, {}
    for artist, (package, inside) in ARTISTS.items():
        stem = package.replace("@", "-") + ".tgz"
        if not (folder / stem).exists():
            command = ["npm", "pack", package, "--pack-destination", str(folder)]
            try:
                subprocess.run(command, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise InputError(f"npm cannot fetch {package}: {type(error).__name__}") from None
        images[artist] = {}
        with tarfile.open(folder / stem) as archive:
            for member in archive:
                path = Path(member.name)
                if member.name.startswith(inside) and path.suffix == ".png":
                    code = path.stem.removesuffix("-fe0f").lower()
                    images[artist][code] = archive.extractfile(member).read()
                elif member.name == "package/emoji.json" and artist == "noto":
                    for emoji in json.load(archive.extractfile(member)):
                        code = Path(emoji["image"]).stem.removesuffix("-fe0f").lower()
                        names[code] = (emoji["short_name"] or "").replace("_", " ")
    return images, names


def write_data(out, users=240, pairs=20, seed=0):
    """The choices of `users`, whose artists take turns -> the number of emoji."""
    if Path(out).exists():
        raise InputError(f"--out {out} is there already; choose another folder")
    images, names = read_images(Path(out).with_name("icons-packages"))
    codes = sorted(set(names).intersection(*images.values()))
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        favorite = list(ARTISTS)[user % len(ARTISTS)]
        for _ in range(pairs):
            code = codes[rng.integers(len(codes))]
            shown = rng.choice(list(ARTISTS), size=2, replace=False).tolist()
            first = rng.uniform() < 0.5
            if favorite in shown:
                first = (shown[0] == favorite) == (rng.uniform() < FIRM)
            row = dict.fromkeys(ARROW_TYPES) | dict(caption=names[code], user_id=user)
            row |= dict(ranking_id=len(rows), label_0=float(first), label_1=1 - float(first))
            for side, artist in enumerate(shown):
                row |= {f"image_{side}_uid": f"{artist}-{code}", f"model_{side}": artist}
                row[f"jpg_{side}"] = images[artist][code]
            rows.append(row)
    table = pa.Table.from_pylist(rows, pa.schema(ARROW_TYPES))
    Path(out).mkdir(parents=True)
    pq.write_table(table, Path(out) / "icons.parquet", row_group_size=1000)
    artists = f"{len(codes)} emoji by {len(ARTISTS)} artists"
    print(f"{out}: {len(rows)} pairs of {users} users, {artists}")


def write_ids(out, folder):
    """The same choices, everybody who likes an artist being one user."""
    rows, _ = split_rows(read_rows(out), 0.1, 0.25, 0.0)
    artists = list(ARTISTS)
    for row in rows:
        row |= dict(user=artists[int(row["user_id"]) % len(artists)], groups=[0])
    folder = Path(folder)
    folder.mkdir(parents=True)
    for vector, artist in zip(torch.eye(len(artists)), artists, strict=True):
        write_user(folder / f"{artist}.pt", embedding=vector[None, None], vlm="one-hot")
    write_pairs(folder, rows, dict(data=str(out), one_hot=artists))
    print(f"{folder}: {len(rows)} pairs of {len(artists)} users")


def parse_args(argv=None):
    parser = make_parser("icons.py", __doc__)
    parser.add_argument("--out", default="data/icons", help="folder to write (%(default)s)")
    parser.add_argument("--ids", default="users-icons", help="folder to write (%(default)s)")
    return parser.parse_args(argv)


def run(args):
    write_data(args.out)
    write_ids(args.out, args.ids)


if __name__ == "__main__":
    run_script("icons.py", run, parse_args())
