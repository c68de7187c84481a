"""Stage 1 of PPD: users' choices in, one file a user out (paper Sec. 4.2, 5.1, 5.2).

    python embed.py                                                  # a VLM reads four choices
    python embed.py --one-hot light warm large --users users-onehot  # Sec. 5.1: a reward is a user
    python embed.py --pairs me.jsonl --out me.pt                     # your own choices
    python embed.py --cache-latents --users users                    # encode the images once

It writes <users>/<id>.pt, one a user, and <users>/pairs.parquet, one row a kept pair, without image
bytes: those train.py reads from the same --data. me.jsonl has at least four lines like
{"caption": "a red star", "preferred": "1.png", "dispreferred": "2.png"}. The drawn world's data is
drawn into data/tiny on first use.
"""

import datetime
import hashlib
import json
import re
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import utils
from bases import images, load_codec
from bases.latents import CachedLatents
from bases.llava import PROFILE_TOKENS, embed_users, load_vlm, prepare_group
from rewards import REWARDS, make_synthetic_users
from tiny import world
from utils import InputError

NO_DATA = "Pick-a-Pic's original is gone from the hub: give your own copy's parquet folder"
CHOICE = '{"caption": "...", "preferred": "image file", "dispreferred": "image file"}'
SHARES = ("validation_captions", "test_captions", "unseen_users", "validation_users")
# of the drawn world, and of other data; synthetic users are no users to test
DRAWN_SHARES = dict(zip(SHARES, (0.1, 0.25, 0.25, 0.1), strict=True))
OTHER_SHARES = dict(zip(SHARES, (0.02, 0.05, 0.05, 0.02), strict=True))
# what pairs.parquet remembers of the flags, for a second run to compare
SETTINGS = ("data", "columns", "vlm", "layer", "profile", "shots", "groups", "one_hot", *SHARES)
ONE_HOT = " ".join((*REWARDS, *world.WORDS, "own"))  # what --one-hot takes


def parse_args(argv=None):
    parser = utils.make_parser("embed.py", __doc__)
    add = parser.add_argument
    add("--data", help="parquet folder in Pick-a-Pic v2's columns, or a dataset id")
    known = ", ".join(data.COLUMN_MAPS)
    add("--columns", help=f"another set's columns: theirs=ours,... or {known}")
    add("--users", help="folder to write (default: users; with --one-hot users-onehot)")
    add("--pairs", metavar="JSONL", help="your own choices; image paths relative to the file")
    add("--out", help="with --pairs: the user file to write, e.g. me.pt")
    add("--vlm", default="tiny", help="'tiny', a LLaVA-OneVision id, or a folder in its layout")
    add("--layer", default="-1", help="whose last state: 0 the input's, -1 the last's; or all")
    add("--profile", action="store_true", help="the VLM writes the user's profile first")
    add("--shots", type=int, default=4, help="choices in a group (default: %(default)s)")
    add("--groups", type=int, default=4, help="most groups a user (default: %(default)s)")
    add("--batch", type=int, help="groups the VLM reads, or images to encode, at once")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--one-hot", nargs="+", metavar="REWARD", default=[], help=f"synthetic users; {ONE_HOT}")
    for name in SHARES:
        default = f"(drawn world {DRAWN_SHARES[name]}, else {OTHER_SHARES[name]})"
        what = "0 with --one-hot " if name.endswith("users") else ""
        add(utils.flag(name), type=float, help=f"share, by hash; {what}{default}")
    add("--cache-latents", action="store_true", help="encode the images of --users for train.py")
    add = parser.add_argument_group("with --cache-latents, as for train.py").add_argument
    add("--latents", help="folder of the latents (default: latents, beside the data)")
    add("--base", default="tiny", help="(default: %(default)s)")
    add("--decoder", help="(default: stabilityai/stable-cascade)")
    add("--grid", type=int, help="(default: the base's own, Stable Cascade 24)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    add("--workers", type=int, default=0, help="processes that read images (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.users is None:
        args.users = "users-onehot" if args.one_hot else "users"
    is_drawn = (Path(args.data or "data/tiny") / "people.json").is_file()
    defaults = DRAWN_SHARES if is_drawn or args.data in (None, "data/tiny") else OTHER_SHARES
    for name, share in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, 0.0 if args.one_hot and name.endswith("users") else share)
    if args.batch is None:
        args.batch = 64 if args.vlm == "tiny" or args.cache_latents else 1
    check_args(args, parser.error)
    return args


def check_args(args, error):
    if (args.pairs is None) != (args.out is None):
        error("--pairs JSONL and --out FILE.pt go together")
    if args.layer != "all":
        try:
            args.layer = int(args.layer)
        except ValueError:
            error(f"--layer {args.layer}: expected a number or all")
    check = partial(utils.check_flags, args, error)
    check("shots groups batch grid", lambda v: v >= 1, "1 or more")
    check("workers", lambda v: v >= 0, "0 or more")
    check(" ".join(SHARES), lambda v: 0 <= v < 1, "a share in [0, 1)")
    if len(set(args.one_hot)) < len(args.one_hot):
        error("--one-hot: a reward is named twice")
    for name in args.one_hot:
        if name not in ONE_HOT.split():
            error(f"--one-hot {name}: no such reward; choose from {ONE_HOT}")
    for some, others, what in ((*SHARES[:2], "caption"), (*SHARES[2:], "user")):
        if getattr(args, some) + getattr(args, others) >= 1:
            error(f"{utils.flag(some)} and {utils.flag(others)} leave no {what} to train on")


def read_groups(args, vlm, groups):
    """Add `state` and `text` to prepare_group()'s groups; returns those that could be read, names
    the others. Longer ones are in smaller batches: attention's memory grows with the square."""

    def length(group):
        return max(1000, sum(map(len, group["captions"])))

    ordered = sorted(groups, key=length, reverse=True)
    while ordered:
        n = max(1, int(args.batch * (1000 / length(ordered[0])) ** 2))
        batch = ordered[:n]
        del ordered[:n]
        states, texts = embed_users(vlm, batch, args.layer, args.profile)
        for group, state, text in zip(batch, states, texts, strict=True):
            group.update(state=state if state.isfinite().all() else None, text=text)
    for group in groups:
        if group["state"] is None:
            print(f"{group['name']} is left out: its state is not finite", file=sys.stderr)
        elif args.profile and not group["text"]:
            problem = f"its profile is empty or has no end within {PROFILE_TOKENS} tokens"
            print(f"{group['name']} is left out: {problem}", file=sys.stderr)
    return [g for g in groups if g["state"] is not None and (g["text"] or not args.profile)]


def load_profiles(users, names, folder, device):
    """What the VLM wrote, or writes now, of each user's first group after "User profile:"; nothing,
    which is counted, where that is missing or has no end."""
    files = [data.load_user(users / f"{name}.pt") for name in names]
    texts = [file["profile"][0] if file["profile"] else None for file in files]
    if None in texts:
        rows = data.rows_by_id(folder)
        vlm = load_vlm(files[0]["vlm"], utils.pick_device(device))
        step = 50 if files[0]["vlm"] == "tiny" else 1
        for i in tqdm(range(0, len(files), step), "writing profiles", leave=False, disable=None):
            ids = [file["shots"][0] for file in files[i : i + step]]
            groups = [images.load_shots(folder, rows(group)) for group in ids]
            _, texts[i : i + step] = embed_users(vlm, groups, profile=True)
        del vlm  # free its memory
        torch.cuda.empty_cache()
    found = [re.split(r"user profile\W*:\W*", t or "", flags=re.IGNORECASE)[1:] for t in texts]
    profiles = [" ".join(parts[-1].split()).rstrip(".") if parts else "" for parts in found]
    if not all(profiles):
        print(f"{profiles.count('')} of {len(names)} profiles are missing", file=sys.stderr)
    return profiles


def embed_all_users(args, rows, settings):
    """Sec. 4.2: the VLM reads every user with four choices or more, one embedding a group; seen
    users from their train captions only, unseen ones from those that nobody is tested on. Under
    torchrun each process reads its share; what is written already is skipped."""
    rank, world_size = utils.rank_and_world()
    Path(args.users).mkdir(parents=True, exist_ok=True)
    user_rows = {}
    for row in rows:
        user_rows.setdefault(file_stem(row["user_id"]), []).append(row)
    groups = {}
    for user, own_rows in user_rows.items():
        conditioning = [row for row in own_rows if row["split"] in ("train", "shots")]
        if len(conditioning) >= args.shots:
            groups[user] = data.few_shot_groups(conditioning, args.groups, args.shots)
    if not any(row["split"] == "train" for row in pairs_with_groups(user_rows, groups)[0]):
        few = f"nobody has more than {args.shots} choices to train on"
        raise InputError(f"--data {args.data}: {few}; expected {args.shots} to read and one more")

    needed = [row for user_groups in groups.values() for group in user_groups for row in group]
    folder, located = images.gather_rows(needed, args.data, Path(args.users) / "shots")
    utils.all_gather_objects(None)  # wait for the others' shares
    mine = sorted(groups)[rank::world_size]
    pending = [user for user in mine if not is_written(args, user, groups[user])]
    if pending:
        vlm = load_vlm(args.vlm, utils.pick_device(args.device))
        reader = GroupReader({user: groups[user] for user in pending}, folder, located, vlm[2])
        how = dict(batch_size=max(1, 4 * args.batch // args.groups), num_workers=args.workers)
        progress = tqdm(total=len(pending), desc=f"reading users, rank {rank}", disable=None)
        with data.loading(reader, **how, collate_fn=list) as batches, progress:
            for prepared in batches:
                write_users(args, read_groups(args, vlm, sum(prepared, [])))
                progress.update(len(prepared))
    utils.all_gather_objects(None)  # wait for the others' users
    if rank == 0:
        pair_users_with_groups(args, user_rows, groups, settings)
        shutil.rmtree(Path(args.users) / "shots", ignore_errors=True)


def file_stem(user):
    """A user's id as a file's name, the same for no two."""
    name = quote(user, safe="")
    if len(name) > 200:
        raise InputError(f"user_id {user[:60]!r}...: {len(name)} letters; expected 200 at most")
    name = name.replace("~", "%7E")
    return name.replace(".", "%2E") if name.startswith(".") else name


@dataclass
class GroupReader(torch.utils.data.Dataset):
    """A user's prepare_group()s, by a worker. A group with a broken image is named, left out."""

    groups: dict  # {user: groups of rows}
    folder: Path
    located: dict  # {ranking_id: the row in that folder}
    processor: object

    def __len__(self):
        return len(self.groups)

    def __getitem__(self, i):
        user = list(self.groups)[i]
        prepared = []
        for rows in self.groups[user]:
            name = f"user {user}: a group of {len(rows)}"
            try:
                there = [self.located[row["ranking_id"]] for row in rows]
                group = prepare_group(self.processor, images.load_shots(self.folder, there))
            except InputError as problem:
                print(f"{name} is left out: {problem}", file=sys.stderr)
            else:
                prepared.append(group | dict(user=user, rows=rows, name=name))
        return prepared


def is_written(args, user, groups):
    """Whether a user's file is there. InputError if it was made from other choices or flags."""
    path = Path(args.users) / f"{user}.pt"
    if not path.exists():
        return False
    before = data.load_user(path)
    known = [[row["ranking_id"] for row in group] for group in groups]
    reader = (before["vlm"], before["layer"], before["profile"] is not None)
    same = reader == (args.vlm, str(args.layer), args.profile)
    if not same or not all(group in known for group in before["shots"]):
        problem = "was made from other choices or by other flags"
        raise InputError(f"{path} {problem}; choose another --users folder")
    return True


def write_users(args, groups):
    """Groups that are read, all of the users who have any -> users' files."""
    for user in dict.fromkeys(group["user"] for group in groups):
        own = [group for group in groups if group["user"] == user]
        shots = [[row["ranking_id"] for row in group["rows"]] for group in own]
        split = "train" if own[0]["rows"][0]["split"] == "train" else "unseen"
        write_user(args, Path(args.users) / f"{user}.pt", own, shots=shots, split=split)


def write_user(args, path, groups, **fields):
    """One user's groups that are read -> their file; returns their profiles, or None."""
    profile = [group["text"] for group in groups] if args.profile else None
    reader = dict(vlm=args.vlm, layer=str(args.layer), profile=profile)
    embedding = torch.stack([group["state"] for group in groups])
    data.write_user(path, embedding=embedding, **reader, **fields)
    return profile


def pairs_with_groups(user_rows, groups):
    """Each pair with its user's groups that show none of its images; how many have none."""
    pairs = []
    n_overlapping = 0
    for user in sorted(groups):
        shown = images_shown(groups[user])
        for row in user_rows[user]:
            allowed = [i for i, ids in enumerate(shown) if not ids & data.image_ids(row)]
            if row["split"] != "shots" and allowed:
                pairs.append(row | dict(user=user, groups=allowed))
            elif row["split"] != "shots":
                n_overlapping += 1
    return pairs, n_overlapping


def images_shown(groups):
    """The ids of the images in each of these groups of rows, a list of sets."""
    return [set().union(*map(data.image_ids, group)) for group in groups]


def pair_users_with_groups(args, user_rows, groups, settings):
    """Write pairs.parquet: the pairs of the groups that could be read."""
    read = {}
    for user in groups:
        path = Path(args.users) / f"{user}.pt"
        if path.exists():  # else every group of theirs had a broken image
            ids = data.load_user(path)["shots"]
            read[user] = [g for g in groups[user] if [row["ranking_id"] for row in g] in ids]
    pairs, n_overlapping = pairs_with_groups(user_rows, read)
    if not pairs:
        raise InputError(f"--data {args.data}: no pair is left; no group could be read")
    data.write_pairs(args.users, pairs, settings)
    n_few = len(user_rows) - len(groups)
    n_groups = sum(map(len, read.values()))
    why = "every group of their user contains them or one of their images"
    print(f"{len(groups)} users, {n_groups} groups; {n_few} have fewer than {args.shots} choices")
    print(f"{len(pairs)} pairs, {n_overlapping} dropped because {why}")


def embed_custom_user(args):
    """Your own choices -> one user file. Every --shots lines, four, make a group."""
    out = Path(args.out)
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; expected a file to write, e.g. me.pt")
    shots = read_own_choices(Path(args.pairs))
    if len(shots) < args.shots:
        raise InputError(f"{args.pairs}: {len(shots)} choices; expected at least {args.shots}")
    n_groups = min(args.groups, len(shots) // args.shots)
    n_used = n_groups * args.shots
    if n_used < len(shots):
        why = f"{n_groups} groups of {args.shots}"
        print(f"the last {len(shots) - n_used} of {len(shots)} lines are not used: {why}")
    vlm = load_vlm(args.vlm, utils.pick_device(args.device))
    groups = [shots[i : i + args.shots] for i in range(0, n_used, args.shots)]
    name = dict(name=f"{args.pairs}: a group")
    read = read_groups(args, vlm, [prepare_group(vlm[2], group) | name for group in groups])
    if not read:
        raise InputError(f"{args.pairs}: no group could be read")
    out.parent.mkdir(parents=True, exist_ok=True)
    profile = write_user(args, out, read, split="own")
    if profile:
        print("\n".join(profile))
    print(f"-> {out}, {len(read)} group{'s' if len(read) > 1 else ''}")


def read_own_choices(source):
    """A .jsonl of one's own choices -> [(caption, preferred image, dispreferred image), ...]."""
    try:
        lines = source.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError):
        raise InputError(f"--pairs {source}: not a readable text file") from None
    shots = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            caption, *paths = (row[key] for key in ("caption", "preferred", "dispreferred"))
            assert all(isinstance(value, str) for value in (caption, *paths))
            "".join((caption, *paths)).encode()  # half a surrogate pair is no letter
        except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
            raise InputError(f"{source} line {number}: expected {CHOICE}") from None
        name = f"{source} line {number}"
        pair = [images.open_image(source.parent / path, f"{name}: {path}") for path in paths]
        shots.append((caption, *pair))
    return shots


@torch.no_grad()
def cache_latents(args):
    """Encode a users folder's training and validation images once: training then reads 18 KB an
    image and no JPEG. What is there is skipped; under torchrun every process writes its share."""
    rank, world_size = utils.rank_and_world()
    pairs, settings = data.read_pairs(args.users)
    folder = Path(args.data or settings["data"])
    device = utils.pick_device(args.device)
    dtype = utils.pick_dtype(args.dtype, device)  # the base's
    codec = load_codec(args.base, device, dtype, args.decoder, args.grid)
    needed = [row for row in pairs if row["split"] in ("train", "validation")]
    images.ImagePairs(folder, codec, needed)  # InputError if a file is not there

    latents = CachedLatents(args.latents or folder / "latents", codec, dtype)
    if rank == 0:
        latents.create(data.read_rows(folder))
    utils.all_gather_objects(None)  # wait for rank 0
    missing = latents.open().missing(needed)
    utils.all_gather_objects(None)  # all have looked before anybody writes: the shares are disjoint
    groups = images.chunk_images(folder, missing.values(), args.batch)[rank::world_size]
    fit = partial(images.fit_pixels, side=codec.image_size, resample=codec.resample)
    total = sum(len(chunk) for chunks in groups for chunk in chunks)
    n_broken = 0
    how = dict(batch_size=None, num_workers=args.workers, collate_fn=tuple)
    progress = tqdm(total=total, desc="encoding images", unit="image", disable=None)
    with data.loading(images.ImageStream(groups, folder, fit), **how) as chunks, progress:
        for chunk, fitted in chunks:
            readable = [k for k, pixels in enumerate(fitted) if pixels is not None]
            encoded = torch.full((len(chunk), *codec.latent_shape), torch.nan, dtype=dtype)
            if readable:
                pixels = torch.cat([fitted[k] for k in readable]).to(device)
                encoded[readable] = images.encode_pixels(codec, pixels, dtype).cpu()
            latents.write([data.image_key(*source) for source in chunk], encoded)
            n_broken += len(chunk) - len(readable)
            progress.update(len(chunk))
    name = str(dtype).removeprefix("torch.")
    broken = f", {n_broken} broken" if n_broken else ""
    print(f"-> {latents.folder}: {total} more images of {latents.shape} {name}{broken}")


def make_users(args):
    """Rows -> splits -> users; see the module's docstring."""
    source = args.data = find_data(args.data or "data/tiny")
    if args.columns:  # converted once
        digest = hashlib.sha256(f"{Path(source).absolute()} {args.columns}".encode()).hexdigest()
        args.data = str(Path(args.users) / f"data-{digest[:8]}")
    settings = {name: getattr(args, name) for name in SETTINGS}
    if (Path(args.users) / "pairs.parquet").exists():
        before = data.read_pairs(args.users)[1]
        changed = [key for key in settings if before.get(key) != settings[key]]
        if changed:
            made = f"holds users made with another {utils.flag(changed[0])}"
            raise InputError(f"--users {args.users} {made}; choose another folder")
        shutil.rmtree(Path(args.users) / "shots", ignore_errors=True)  # of one killed at its end
        print(f"{args.users}: already done")
        return
    rank, _ = utils.rank_and_world()
    if source != "data/tiny" and not Path(source).exists():
        raise InputError(f"--data {source}: no such folder. {NO_DATA}")
    if rank == 0 and args.columns and not (Path(args.data) / data.CONVERTED).exists():
        data.convert_data(source, args.columns, args.data)
    elif rank == 0 and not Path(args.data).exists():
        world.write_data(args.data)
    utils.all_gather_objects(None)  # wait for rank 0
    shares = [getattr(args, name) for name in SHARES]
    rows, dropped = data.split_rows(data.read_rows(args.data), *shares)
    if rank == 0:
        print_splits(rows, dropped)
    if not any(row["split"] == "train" for row in rows):
        raise InputError(f"--data {args.data}: no pair is left to train on")
    if args.one_hot:
        make_synthetic_users(args, [row for row in rows if row["split"] != "shots"], settings)
    else:
        embed_all_users(args, rows, settings)
    if rank == 0:
        print(f"-> {args.users}/*.pt and {args.users}/pairs.parquet")


def print_splits(rows, dropped):
    print(f"{'split':<14}{'users':>8}{'captions':>10}{'pairs':>10}")
    for split in (*data.SPLITS, "shots"):
        part = [row for row in rows if row["split"] == split]
        users, captions = (len({row[key] for row in part}) for key in ("user_id", "caption"))
        print(f"{split:<14}{users:>8}{captions:>10}{len(part):>10}")
    for reason, count in dropped.items():
        print(f"dropped: {reason:<25}{count:>8}")


def find_data(name):
    """--data as a folder's name; a dataset id is taken from the hub's cache or downloaded."""
    if not utils.is_hub_id(name) or name == "data/tiny":
        return name
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, repo_type="dataset", allow_patterns=["*.parquet"])
    except (OSError, ValueError) as error:
        problem = f"no such folder here, and no such dataset on the hub ({utils.first_line(error)})"
        raise InputError(f"--data {name}: {problem}. {NO_DATA}") from None


def run(args):
    if args.pairs:
        embed_custom_user(args)
        return
    if utils.rank_and_world()[1] > 1:  # the slowest process may need days more
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    work = cache_latents if args.cache_latents else make_users
    work(args)
    if dist.is_initialized():
        dist.destroy_process_group()


def main(argv=None):
    utils.run_script("embed.py", run, parse_args(argv))


if __name__ == "__main__":
    main()
