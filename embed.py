"""Stage 1 of PPD: people's choices in, one file a person out (paper Sec. 4.2, 5.1, 5.2).

Everything that looks at preference data is here: rows -> splits -> users. It writes `<users>/<id>.pt`, one a person,
and `<users>/pairs.parquet`, one row a kept pair, without image bytes: those train.py reads from the same --data.

    python embed.py                                                    # Sec. 4.2: a VLM reads four choices; its state is the person
    python embed.py --one-hot light warm large --users users-onehot    # Sec. 5.1: a reward is a person, a one-hot vector
    python embed.py --pairs me.jsonl --out me.pt                       # you: {"caption", "preferred", "dispreferred"} a line
    python embed.py --cache-latents --users users                      # encode the pictures once, for train.py to read instead

The tiny world's data is drawn into data/tiny on first use.
"""
import argparse
import datetime
import hashlib
import io
import json
import pickle
import re
import signal
import sys
import warnings
from collections import Counter
from functools import lru_cache, reduce
from pathlib import Path

SPLITS = ("train", "validation", "test-seen", "test-unseen")
SALT = 33759  # of the split hashes; chosen so that the tiny world's 8 test captions show all colours and all shapes

# Sec. 5.1's rewards, and PickScore: name, hub repository, file in it if it is no transformers model
REWARDS = {
    "clip": ("CLIP ViT-H/14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", None),
    "aesthetic": ("LAION aesthetic predictor, ViT-L/14", "openai/clip-vit-large-patch14", None),
    "hps": ("HPS v2.1", "xswu/HPSv2", "HPS_v2.1_compressed.pt"),
    "hps2.0": ("HPS v2.0", "xswu/HPSv2", "HPS_v2_compressed.pt"),
    "pickscore": ("PickScore v1", "yuvalkirstain/PickScore_v1", None),
}


def arguments(argv=None):
    p = argparse.ArgumentParser(prog="embed.py", usage=argparse.SUPPRESS, description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", help="folder of parquet files in Pick-a-Pic v2's columns, or a dataset id (default: data/tiny)")
    p.add_argument("--users", help="folder to write (default: users, with --one-hot users-onehot)")
    p.add_argument("--pairs", metavar="JSONL", help="your own choices, at least four lines; image paths are relative to the file")
    p.add_argument("--out", help="with --pairs: the person's file to write, e.g. me.pt")
    p.add_argument("--vlm", default="tiny", help="'tiny', a LLaVA-OneVision id like llava-hf/llava-onevision-qwen2-7b-ov-hf or a folder in its layout (default: %(default)s)")
    p.add_argument("--layer", default="-1", help="whose last state is the embedding: a number, 0 is the input's, -1 the last layer's; or all (default: %(default)s)")
    p.add_argument("--profile", action="store_true", help="let the VLM write the person's profile first, then take its state")
    p.add_argument("--shots", type=int, default=4, help="choices in a group (default: %(default)s)")
    p.add_argument("--groups", type=int, default=4, help="most groups a person (default: %(default)s)")
    p.add_argument("--batch", type=int, help="groups the VLM reads at once (default: tiny 64, else 1)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    p.add_argument("--one-hot", nargs="+", metavar="REWARD", default=[],
                   help="synthetic users: relabel every pair by each reward; " + " ".join(REWARDS) + ", on the tiny world light dark warm cool large small right left "
                   "high low; own: people's own labels, for train.py --objective dpo")
    p.add_argument("--cache-latents", action="store_true", help="encode the pictures of --users, written before, into <users>/latents for train.py")
    p.add_argument("--base", default="tiny", help="with --cache-latents: whose latents, as for train.py (default: %(default)s)")
    p.add_argument("--decoder", default="stabilityai/stable-cascade", help="with --cache-latents, as for train.py (default: %(default)s)")
    p.add_argument("--grid", type=int, default=24, help="with --cache-latents, as for train.py (default: %(default)s)")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float64"), default="auto", help="with --cache-latents, as for train.py")
    p.add_argument("--workers", type=int, default=0, help="with --cache-latents: processes that read pictures (default: %(default)s)")
    p.add_argument("--validation-captions", type=float, default=0.1, help="share of captions, by hash (default: %(default)s)")
    p.add_argument("--test-captions", type=float, default=0.2, help="share of captions, by hash (default: %(default)s)")
    p.add_argument("--unseen-users", type=float, default=0.25, help="share of users, by hash (default: %(default)s)")
    args = p.parse_args(argv)
    args.users = args.users or ("users-onehot" if args.one_hot else "users")
    args.batch = args.batch or (64 if args.vlm == "tiny" or args.cache_latents else 1)
    if (args.pairs is None) != (args.out is None):
        p.error("--pairs JSONL and --out FILE.pt go together")
    if args.layer != "all":
        try:
            args.layer = int(args.layer)
        except ValueError:
            p.error(f"--layer {args.layer}: expected a number or all")
    for name, least in dict(shots=1, groups=1, batch=1, grid=1, workers=0).items():
        if getattr(args, name) < least:
            p.error(f"--{name} {getattr(args, name)}: expected {least} or more")
    if len(set(args.one_hot)) < len(args.one_hot):
        p.error("--one-hot: a reward is named twice")
    from tiny import WORDS
    for name in args.one_hot:
        if name not in (*REWARDS, *WORDS, "own"):
            p.error(f"--one-hot {name}: no such reward; choose from {' '.join((*REWARDS, *WORDS, 'own'))}")
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
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import tiny
from ppd import (TINY, BadInput, encode_pixels, fit_pixels, hub_file, is_hub_id, load_codec, load_frozen, load_user, pick_device, pick_dtype, rank_and_world,
                 reader_of, run_script, tokenise, write_atomically)

COLUMNS = dict(ranking_id="an integer", user_id="an integer", caption="a string", image_0_uid="a string",
               image_1_uid="a string", label_0="a number", jpg_0="bytes", jpg_1="bytes")  # of Pick-a-Pic v2
KINDS = {"an integer": pa.types.is_integer, "integers": lambda t: pa.types.is_list(t) and pa.types.is_integer(t.value_type),
         "a number": lambda t: pa.types.is_floating(t) or pa.types.is_integer(t),
         "a string": lambda t: pa.types.is_string(t) or pa.types.is_large_string(t) or pa.types.is_string_view(t),
         "bytes": lambda t: pa.types.is_binary(t) or pa.types.is_large_binary(t) or pa.types.is_binary_view(t)}


# --------------------------------------------------------------------------------- what the VLM is asked (Sec. 4.2)
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
INTRO = "A person was shown pairs of pictures, each pair drawn for one caption, and chose from each the one they preferred."
PAIR, PREFERRED, DISPREFERRED = "\n\nPair {}. Caption: ", "\nPreferred: ", "\nDispreferred: "
ASK = {
    "taste": "\n\nIn a few words, what does this person like in a picture?",
    "profile": "\n\nFor every pair, describe both pictures and say how they differ in style, visual quality and aesthetics. "
               "Then write 'User profile:' and sum up what this person likes.",
    "judge": "\n\nWhich of two further pictures would this person choose? Answer 'CHOICE: 1' or 'CHOICE: 2'. Caption: ",
}
FIRST, SECOND = "\nPicture 1: ", "\nPicture 2: "
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"


def prompt(captions, ask, caption=None):
    """Chat text with one <image> a picture, each beside its own label and caption; two pictures a caption, preferred
    first. ask: a key of ASK; "judge" asks about two more pictures of `caption`."""
    clean = lambda c: " ".join(re.sub(r"<image>|<video>|<\|.*?\|>", " ", c).split())  # a caption cannot forge the chat
    text = SYSTEM + INTRO
    for i, shown in enumerate(captions, 1):
        text += PAIR.format(i) + clean(shown) + PREFERRED + "<image>" + DISPREFERRED + "<image>"
    text += ASK[ask] + (clean(caption) + FIRST + "<image>" + SECOND + "<image>" if ask == "judge" else "")
    return text + ANSWER


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
            for column, kind in COLUMNS.items():
                if column not in reader.schema_arrow.names:
                    raise BadInput(f"{file}: column {column!r} is missing; expected Pick-a-Pic v2's columns")
                if not KINDS[kind](found := reader.schema_arrow.field(column).type):
                    raise BadInput(f"{file}: column {column!r} is of type {found}; expected {kind}")
            table = reader.read(columns=[column for column, kind in COLUMNS.items() if kind != "bytes"]).to_pylist()
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


def read_pictures(data, row, sides=(0, 1)):
    """The two pictures of a row of read_rows or pairs.parquet. Raises BadInput naming file, row and column."""
    try:
        starts = group_starts(Path(data) / row["file"])
        group = int(np.searchsorted(starts, row["row"], "right")) - 1
        table, inside = read_group(Path(data) / row["file"], group), row["row"] - starts[group]
        jpgs = {f"jpg_{side}": table[f"jpg_{side}"][inside].as_py() for side in sides}
    except (pa.ArrowException, OSError, LookupError) as error:
        raise BadInput(f"{Path(data) / row['file']} row {row['row']}: cannot be read ({type(error).__name__})") from None
    return [open_image(jpg if isinstance(jpg, bytes) else b"", f"{row['file']} row {row['row']} {c}") for c, jpg in jpgs.items()]  # a string would be a path


FORMATS = "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"  # of Pillow's others some start programs


def open_image(source, name):
    """A picture from a path or from bytes, any mode and orientation -> RGB PIL image; transparency over white. Raises
    BadInput naming it if it is missing, broken, truncated or too large to be a picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # Pillow raises a dozen kinds
        raise BadInput(f"{name}: not a usable image ({type(error).__name__}: {re.sub(r' <_io.*?>', '', str(error))})") from None


# ------------------------------------------------------------------------------------------------- the VLM (Sec. 4.2)
def load_vlm(name, device):
    """LLaVA-OneVision, frozen: model, tokenizer, image processor. name: "tiny", a hub id or a folder in its layout."""
    import transformers
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
    transformers.utils.logging.set_verbosity_error(), transformers.utils.logging.disable_progress_bar()
    folder = TINY / "vlm" if name == "tiny" else name if is_hub_id(name) else Path(name)
    if isinstance(folder, Path) and not (folder / "config.json").is_file():
        raise BadInput(f"--vlm {name}: no {folder / 'config.json'}; expected 'tiny', a hub id or a folder in its layout")
    try:
        model = load_frozen(transformers.LlavaOnevisionForConditionalGeneration, folder, device, dtype=pick_dtype("auto", device))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
        return model, tokenizer, LlavaOnevisionImageProcessorPil.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BadInput(f"--vlm {name}: cannot load {folder}: {str(error).strip().splitlines()[0]}") from None


def vlm_inputs(vlm, prompts, images):
    """Texts with one <image> a picture, and lists of PIL pictures, one list a text -> the model's inputs, left-padded.
    Nested lists are the multi-image path: each picture one tile, whose patches end in one line-break token."""
    model, tokenizer, processor = vlm
    vision = model.config.vision_config
    count = (vision.image_size // vision.patch_size) ** 2 + 1
    pixels = processor(images, return_tensors="pt")
    ids = tokenizer([p.replace("<image>", "<image>" * count) for p in prompts], padding=True, add_special_tokens=False, return_tensors="pt")
    return dict(input_ids=ids.input_ids.to(model.device), attention_mask=ids.attention_mask.to(model.device),
                pixel_values=pixels["pixel_values"].to(model.device, model.dtype), image_sizes=torch.as_tensor(pixels["image_sizes"]),
                batch_num_images=torch.as_tensor(pixels["batch_num_images"]))


@torch.no_grad()
def write(vlm, prompts, images, most=512):
    """The VLM's greedy answers -> texts, and the token ids (B, prompt + answer) with their mask, ends and padding off."""
    model, tokenizer, _ = vlm
    inputs = vlm_inputs(vlm, prompts, images)
    ends = sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")})
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=most, pad_token_id=tokenizer.pad_token_id, eos_token_id=ends)
    answer = ids[:, inputs["input_ids"].shape[1]:]
    going = (~torch.isin(answer, torch.tensor(ends, device=ids.device))).long().cumprod(1)
    texts = [tokenizer.decode(row[:n], skip_special_tokens=True) for row, n in zip(answer, going.sum(1).tolist())]
    return texts, inputs | dict(input_ids=ids, attention_mask=torch.cat([inputs["attention_mask"], going], 1))


@torch.no_grad()
def read_people(vlm, groups, layer=-1, profile=False):
    """Four-shot groups, lists of (caption, preferred, dispreferred) with PIL pictures -> hidden states of the last
    position (B, S, D) float32, S = 1 or with layer "all" every layer's, and for each the profile written before it or None.
    The last state after the prompt alone, or after the profile: then it is the one that predicts the profile's end."""
    prompts = [prompt([caption for caption, _, _ in group], "profile" if profile else "taste") for group in groups]
    images = [[picture for shot in group for picture in shot[1:]] for group in groups]
    texts, inputs = write(vlm, prompts, images) if profile else ([None] * len(groups), vlm_inputs(vlm, prompts, images))
    if layer == -1:  # all layers' states of a 7B model's 6,500 positions would take 1.3 GB a group
        states = [vlm[0].model(**inputs, use_cache=False).last_hidden_state]
    else:
        states = vlm[0].model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    if layer not in ("all", -1):
        if not -len(states) <= layer < len(states):
            raise BadInput(f"--layer {layer}: this VLM has states {-len(states)} to {len(states) - 1}, or all")
        states = states[layer:][:1]
    mask = inputs["attention_mask"]
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return torch.stack([s[torch.arange(len(s)), last] for s in states], 1).float().cpu(), texts


def few_shot_groups(rows, most, shots=4):
    """A person's conditioning rows -> up to `most` disjoint groups of `shots`, in an order that only hashes decide, at
    least one row left over where there are more; fewer than `shots` rows give none."""
    rows = sorted(rows, key=lambda row: share("order", row["ranking_id"]))
    count = min(most, max(1, (len(rows) - 1) // shots)) if len(rows) >= shots else 0
    return [rows[shots * g:shots * (g + 1)] for g in range(count)]


def group_pictures(data, rows):
    """Conditioning rows -> [(caption, preferred picture, dispreferred picture), ...]."""
    return [(row["caption"], *read_pictures(data, row)[::1 if row["label_0"] == 1 else -1]) for row in rows]


def vlm_users(args, rows, settings):
    """Sec. 4.2: every person with enough choices, four, is read by the VLM, one embedding a group. Seen people are read from
    their train captions only, unseen ones from those that nobody is tested on. Under torchrun each process reads its
    share; what is written already is skipped."""
    rank, world = rank_and_world()
    people = {}
    for row in rows:
        people.setdefault(str(row["user_id"]), []).append(row)
    groups = {user: few_shot_groups([r for r in its if r["split"] in ("train", "shots")], args.groups, args.shots) for user, its in people.items()}
    few = [user for user, its in groups.items() if not its]
    todo, folder = sorted(groups.keys() - few)[rank::world], Path(args.users)
    folder.mkdir(parents=True, exist_ok=True)
    left, how = [], dict(vlm=args.vlm, layer=str(args.layer))
    for user in todo:
        if (folder / f"{user}.pt").exists():
            before, now = load_user(folder / f"{user}.pt"), [[r["ranking_id"] for r in group] for group in groups[user]]
            same = (before["profile"] is not None) == args.profile and all(before[k] == v for k, v in how.items())
            if not same or not all(group in now for group in before["shots"]):
                raise BadInput(f"{folder / user}.pt was made from other choices or by other flags; choose another --users folder")
        else:
            left.append(user)
    vlm = load_vlm(args.vlm, pick_device(args.device)) if left else None
    step = max(1, 4 * args.batch // args.groups)
    for i in tqdm(range(0, len(left), step), desc=f"reading people ({rank + 1} of {world})", unit="batch", disable=None):
        whole, shots = [], []  # (user, ranking ids) of the groups whose pictures are all there
        for user, group in ((user, group) for user in left[i:i + step] for group in groups[user]):
            try:
                shots.append(group_pictures(args.data, group))
                whole.append((user, [r["ranking_id"] for r in group]))
            except BadInput as problem:
                print(f"person {user}: a group of {args.shots} is left out: {problem}", file=sys.stderr)
        states, texts = [None] * len(shots), [None] * len(shots)
        order = sorted(range(len(shots)), key=lambda k: sum(len(caption) for caption, _, _ in shots[k]))  # alike lengths, little padding
        for batch in (order[j:j + args.batch] for j in range(0, len(order), args.batch)):
            for k, state, text in zip(batch, *read_people(vlm, [shots[k] for k in batch], args.layer, args.profile)):
                states[k], texts[k] = state, text
        for user in dict.fromkeys(user for user, _ in whole):
            mine = [k for k, (of, _) in enumerate(whole) if of == user]
            write_user(folder, user, embedding=torch.stack([states[k] for k in mine]), shots=[whole[k][1] for k in mine],
                       profile=[texts[k] for k in mine] if args.profile else None,
                       split="train" if people[user][0]["split"] in ("train", "validation", "test-seen") else "unseen", **how)
    if world > 1:
        dist.barrier()
    if rank == 0:
        pairs, alone, read = [], 0, 0
        for user in sorted(user for user in groups.keys() - few if (folder / f"{user}.pt").exists()):
            shots = load_user(folder / f"{user}.pt")["shots"]
            read += len(shots)
            shown = [{r[k] for r in group for k in ("image_0_uid", "image_1_uid")} for group in groups[user] if [r["ranking_id"] for r in group] in shots]
            for row in people[user]:  # no group conditions a pair with which it shares a picture
                free = [g for g, pictures in enumerate(shown) if not {row["image_0_uid"], row["image_1_uid"]} & pictures]
                if free and row["split"] != "shots":
                    pairs.append(row | dict(user=user, groups=free))
                alone += not free and row["split"] != "shots"
        write_pairs(folder, pairs, settings)
        print(f"{len(groups) - len(few)} people, {read} groups read; {len(few)} have fewer than {args.shots} choices; "
              f"{len(pairs)} pairs, {alone} dropped because every group of their person contains them or one of their pictures")


def own_person(args):
    """Your own choices -> one person's file. Every --shots lines, four, make a group; a rest is named and left out."""
    source, shots = Path(args.pairs), []
    try:
        lines = [(n, line) for n, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1) if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise BadInput(f"--pairs {source}: not a readable text file") from None
    for n, line in lines:
        try:
            row = json.loads(line)
            caption, *paths = (row[key] for key in ("caption", "preferred", "dispreferred"))
            assert all(isinstance(value, str) for value in (caption, *paths))
        except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
            raise BadInput(f'{source} line {n}: expected {{"caption": "...", "preferred": "image file", "dispreferred": "image file"}}') from None
        shots.append((caption, *(open_image(source.parent / path, f"{source} line {n}: {path}") for path in paths)))
    if len(shots) < args.shots:
        raise BadInput(f"{source}: {len(shots)} choices; expected at least {args.shots}")
    if rest := len(shots) % args.shots:
        print(f"the last {rest} of {len(shots)} lines make no group of {args.shots} and are not used")
    groups = [shots[i:i + args.shots] for i in range(0, len(shots) - args.shots + 1, args.shots)]
    states, texts = read_people(load_vlm(args.vlm, pick_device(args.device)), groups, args.layer, args.profile)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_user(out.parent, out.stem, embedding=states, profile=texts if args.profile else None, split="own", vlm=args.vlm, layer=str(args.layer))
    for text in filter(None, texts):
        print(text)
    print(f"-> {out.parent / out.stem}.pt, {len(groups)} group{'s' * (len(groups) > 1)}")


# ------------------------------------------------------------------------------------------- rewards (Sec. 5.1)
def from_open_clip(state):
    """State dict of an open_clip CLIP, as HPS is published -> of transformers' CLIPModel."""
    once = {"token_embedding": "text_model.embeddings.token_embedding", "positional_embedding": "text_model.embeddings.position_embedding.weight",
            "ln_final": "text_model.final_layer_norm", "visual.class_embedding": "vision_model.embeddings.class_embedding",
            "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight", "visual.conv1": "vision_model.embeddings.patch_embedding",
            "visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm"}
    inside = {"attn.": "self_attn.", "ln_": "layer_norm", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    out = {}
    for key, value in state.items():
        if block := re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", key):
            name = block[3]
            for theirs, ours in inside.items():
                name = re.sub("^" + re.escape(theirs), ours, name)
            prefix = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}."
            if "in_proj_" in name:  # one matrix for queries, keys and values
                for letter, part in zip("qkv", value.chunk(3)):
                    out[f"{prefix}self_attn.{letter}_proj.{name.rsplit('_', 1)[1]}"] = part.contiguous()
            else:
                out[prefix + name] = value
        elif key in ("text_projection", "visual.proj"):
            out["text_projection.weight" if key == "text_projection" else "visual_projection.weight"] = value.T.contiguous()
        else:
            stem = next((s for s in once if key == s or key.startswith(s + ".")), key)
            out[once.get(stem, stem) + key[len(stem):]] = value
    return out


AESTHETIC = "sac+logos+ava1-l14-linearMSE.pth"  # its five linear layers have no activations between them


@lru_cache(None)
def load_reward(name, device):
    """A reward of REWARDS: CLIPModel, processor, and the aesthetic predictor's head or None."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor
    title, repository, file = REWARDS[name]
    kin = REWARDS["clip"][1] if name != "aesthetic" else repository  # HPS and PickScore are fine-tuned from it and share its processor
    try:
        processor = CLIPProcessor.from_pretrained(kin)
        if file:
            model = CLIPModel(CLIPConfig.from_pretrained(kin))
            state = torch.load(hub_file(repository, file), map_location="cpu", weights_only=True)["state_dict"]
            model.load_state_dict(from_open_clip(state))
        else:
            model = CLIPModel.from_pretrained(repository)
        head = None
        if name == "aesthetic":
            path = Path(torch.hub.get_dir()) / "checkpoints" / AESTHETIC
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                url = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/" + AESTHETIC.replace("+", "%2B")
                torch.hub.download_url_to_file(url, path, hash_prefix="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0")
            state = torch.load(path, map_location=device, weights_only=True)
            layers = [(state[f"layers.{i}.weight"], state[f"layers.{i}.bias"]) for i in (0, 2, 4, 6, 7)]
            head = lambda x: reduce(lambda x, layer: F.linear(x, *layer), layers, x.float())[:, 0]
    except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise BadInput(f"reward {name} ({title}): cannot load {repository}: {str(error).strip().splitlines()[0]}") from None
    return model.to(device, pick_dtype("auto", device)).eval().requires_grad_(False), processor, head


@torch.no_grad()
def score(name, images, captions, device="cpu", batch=64):
    """Reward of PIL pictures for their captions, (B,) floats, as in Table 1: 100 x cosine for CLIP, HPS and PickScore, the
    predictor's output for aesthetic. The pixel rewards of the tiny world work on any picture and need no caption."""
    if name in tiny.WORDS:
        together = len({image.size for image in images}) == 1
        return tiny.reward(name, images) if together else np.concatenate([tiny.reward(name, [image]) for image in images])
    (model, processor, head), scores = load_reward(name, device), []
    for i in range(0, len(images), batch):
        some = images[i:i + batch]
        if name.startswith("hps"):  # its own preprocessing pads where CLIP's crops
            side = processor.image_processor.crop_size["height"]
            some = [ImageOps.pad(image, (side, side), Image.BICUBIC) for image in some]
        inputs = processor(text=list(captions[i:i + batch]), images=some, padding=True, truncation=True, return_tensors="pt").to(device)
        out = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, pixel_values=inputs.pixel_values.to(model.dtype))
        scores.append(head(out.image_embeds) if head else 100 * (out.image_embeds.float() * out.text_embeds.float()).sum(-1))
    return torch.cat(scores).cpu().numpy()


def score_pairs(args, names, rows, device, chunk=256):
    """Both pictures' scores by the named rewards: {name: (n, 2)}, nan where a picture is broken, which is named. Kept in
    <users>/scores, a file a chunk: nothing is computed twice, and under torchrun every process scores its share."""
    rank, world = rank_and_world()
    folder, chunks = Path(args.users) / "scores", [rows[i:i + chunk] for i in range(0, len(rows), chunk)]
    folder.mkdir(parents=True, exist_ok=True)
    ids = lambda rows: np.array([row["ranking_id"] for row in rows])

    def kept(number):
        path = folder / f"{number:06d}.npz"
        if path.exists():
            with np.load(path, allow_pickle=False) as file:
                if np.array_equal(file["ranking_ids"], ids(chunks[number])) and set(names) <= set(file.files):
                    return {name: file[name] for name in names}

    for number in tqdm(range(rank, len(chunks), world), desc="scoring pairs", unit="chunk", disable=None):
        if kept(number) is None:
            good, images = [], []
            for i, row in enumerate(chunks[number]):
                try:
                    images += read_pictures(args.data, row)
                    good.append(i)
                except BadInput as problem:
                    print(f"skipped: {problem}", file=sys.stderr)
            scores = {name: np.full((len(chunks[number]), 2), np.nan, np.float32) for name in names}
            for name in names if good else ():
                captions = [chunks[number][i]["caption"] for i in good for _ in range(2)]
                scores[name][good] = score(name, images, captions, device).reshape(-1, 2)
            buffer = io.BytesIO()
            np.savez(buffer, ranking_ids=ids(chunks[number]), **scores)
            write_atomically(folder / f"{number:06d}.npz", lambda path: path.write_bytes(buffer.getvalue()))
    if world > 1:
        dist.barrier()
    parts = [kept(number) for number in range(len(chunks))] if rank == 0 else []
    return {name: np.concatenate([part[name] for part in parts]) for name in names} if parts else {}


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
        settings = json.loads(table.schema.metadata[b"ppd"])
        assert isinstance(settings, dict) and isinstance(settings["data"], str)
    except (pa.ArrowException, OSError, TypeError, KeyError, ValueError, AssertionError, RecursionError) as error:
        raise BadInput(f"{path}: not a pairs file of embed.py ({type(error).__name__})") from None
    kinds = dict(ranking_id="an integer", user="a string", split="a string", caption="a string", file="a string", row="an integer", preferred="an integer", groups="integers")
    for column, kind in kinds.items():
        if column not in table.column_names or table[column].null_count or not KINDS[kind](table[column].type):
            raise BadInput(f"{path}: column {column!r} is missing, or not {kind} everywhere")
    for name in table["user"].unique().to_pylist():  # they become file names
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise BadInput(f"{path}: user {name!r}; expected a name of letters, digits, '.', '_' and '-'")
    for file in table["file"].unique().to_pylist():
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise BadInput(f"{path}: file {file!r}; expected one inside the data folder")
    rows = table.to_pylist()
    for row in rows:
        if row["preferred"] not in (0, 1) or row["row"] < 0 or min(row["groups"], default=0) < 0:
            raise BadInput(f"{path}: pair {row['ranking_id']}: expected preferred 0 or 1, and no negative row or group")
    return rows, settings


def one_hot_users(args, rows, settings):
    """Sec. 5.1: every kept pair once per reward, relabelled by it (by "own": not at all); u is the reward's one-hot vector. A pair with a broken
    picture is named and skipped, one of equal scores is counted and dropped."""
    rewards = [name for name in args.one_hot if name != "own"]
    scores = score_pairs(args, rewards, rows, pick_device(args.device)) if rewards else {}
    scores["own"] = np.array([[1 - row["preferred"], row["preferred"]] for row in rows], np.float32)
    if rank_and_world()[0]:
        return
    pairs = [row | dict(user=name, preferred=int(second > first), groups=[0], score_0=first, score_1=second)
             for i, row in enumerate(rows) for name in args.one_hot for first, second in [scores[name][i].tolist()]
             if first != second and first == first]
    if not pairs:
        raise BadInput(f"--data {args.data}: no pair is left, every one is broken or of equal scores")
    Path(args.users).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(args.one_hot):
        write_user(args.users, name, embedding=torch.eye(len(args.one_hot))[i].view(1, 1, -1), vlm="one-hot")
    write_pairs(args.users, pairs, settings)
    for name in args.one_hot:
        of, equal, broken = [p for p in pairs if p["user"] == name], scores[name][:, 0] == scores[name][:, 1], np.isnan(scores[name][:, 0])
        print(f"{name} ({'the people' if name == 'own' else REWARDS.get(name, ('drawn world',))[0]}): {len(of)} pairs, {sum(p['split'] == 'train' for p in of)} to train on, "
              f"{equal.sum()} dropped as equal, {broken.sum()} with a broken picture")


# ------------------------------------------------------------------------------------- what train.py reads of all this
def load_training(folder, only=None):
    """<folder> -> its pairs, dict(train=rows, validation=rows, all=rows); {user: (groups, D) float32}, the last stored state
    of the people in the first two; who read them (ppd.reader_of); embed.py's settings, and a digest of it all as `content`.
    only: no other users' pairs."""
    everything, settings = read_pairs(folder)
    if only and (unknown := set(only) - {r["user"] for r in everything if r["split"] == "train"}):
        raise BadInput(f"--only {sorted(unknown)[0]}: no such training user in {folder}")
    rows = {split: [r for r in everything if r["split"] == split and (not only or r["user"] in only)] for split in ("train", "validation")}
    if not rows["train"]:
        raise BadInput(f"--users {folder}: pairs.parquet has no pair to train on")
    people = {name: load_user(Path(folder) / f"{name}.pt") for name in sorted({r["user"] for split in rows.values() for r in split})}
    kinds = {(user["embedding"].shape[-1], *reader_of(user)) for user in people.values()}
    if len(kinds) > 1:
        raise BadInput(f"--users {folder}: people of different widths or readers: {' and '.join(map(str, sorted(kinds, key=str)[:2]))}; expected one")
    for row in (r for split in rows.values() for r in split):
        if max(row["groups"], default=0) >= len(people[row["user"]]["embedding"]) or not row["groups"]:
            raise BadInput(f"--users {folder}: pairs.parquet wants groups {row['groups']} of {row['user']}.pt, which has {len(people[row['user']]['embedding'])}")
    users, content = {name: user["embedding"][:, -1] for name, user in people.items()}, hashlib.sha256()
    for row in rows["train"]:
        content.update(repr([row[key] for key in ("ranking_id", "user", "preferred", "groups")]).encode())
    for name in users:
        content.update(users[name].numpy().tobytes())
    return rows | dict(all=everything), users, list(kinds.pop()[1:]), settings | dict(content=content.hexdigest()[:16])


class Pictures:
    """The two pictures of a pair, preferred first, from the parquet files, fitted to the codec: (2, 3, side, side) uint8."""
    kind = "pictures"

    def __init__(self, data, fit, rows=()):
        self.data, self.fit = Path(data), fit
        for file in sorted({row["file"] for row in rows}):
            if not (self.data / file).is_file():
                raise BadInput(f"--data {data}: no file {file} there; give the folder that embed.py read")

    def __call__(self, row):
        pictures = read_pictures(self.data, row)
        return fit_pixels([pictures[row["preferred"]], pictures[1 - row["preferred"]]], *self.fit)


class Latents:
    """The same as latents, (2, C, h, w), from <users>/latents: those of every picture that trains or validates, written by
    embed.py --cache-latents as safetensors shards of SHARD pictures each, in the order of `of`."""
    SHARD, kind = 4096, "cached latents"

    def __init__(self, folder, rows):
        self.folder, self.of = Path(folder) / "latents", {}  # picture -> a row and side that show it
        for row in sorted((r for r in rows if r["split"] in ("train", "validation")), key=lambda r: (r["file"], r["row"])):
            for side in (0, 1):
                self.of.setdefault(self.key(row, side), (row, side))
        self.place = {key: divmod(i, self.SHARD) for i, key in enumerate(self.of)}

    @staticmethod
    def key(row, side):
        """A picture recurs under one uid; one without is only itself."""
        return str(row.get(f"image_{side}_uid") or f"{row['file']} {row['row']} {side}")

    def shards(self, codec, dtype):
        """[(file, the keys of its pictures, what must be true of it)]"""
        order, precision, encoder = list(self.of), {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64"}[dtype], codec.digest()
        parts = [order[k:k + self.SHARD] for k in range(0, len(order), self.SHARD)]
        return [(self.path(k), keys, dict(encoder=encoder, shape=[len(keys), *codec.latent_shape], dtype=precision,
                                          pictures=hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16])) for k, keys in enumerate(parts)]

    def path(self, shard):
        return self.folder / f"{shard:05d}.safetensors"

    def __call__(self, row):
        both = []
        for side in (row["preferred"], 1 - row["preferred"]):
            shard, i = self.place[self.key(row, side)]
            both.append(open_shard(self.path(shard))[i:i + 1])  # reads no more than this picture's
        if not (both := torch.cat(both)).isfinite().all():
            raise BadInput(f"{row['file']} row {row['row']}: a picture of it was broken when latents were cached")
        return both


@lru_cache(None)
def open_shard(path):
    return safe_open(path, "pt").get_slice("latents")


def is_shard(path, wanted):
    """Whether a shard of latents is there. BadInput if it is another encoder's or of other pictures."""
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as file:
            found, latents = json.loads((file.metadata() or {})["ppd"]), file.get_slice("latents")
            found |= dict(shape=latents.get_shape(), dtype=latents.get_dtype())
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"{path}: not a shard of latents ({type(error).__name__}); delete it and run embed.py --cache-latents again") from None
    for key in wanted:
        if found.get(key) != wanted[key]:
            raise BadInput(f"{path}: latents of another {key}, {found.get(key)} and not {wanted[key]}; delete {path.parent} and cache them again, or train without")
    return True


def open_pictures(folder, data, rows, codec, dtype):
    """Latents of a users folder, every shard checked, or its Pictures if none were cached. rows: all of pairs.parquet."""
    if not (Path(folder) / "latents").is_dir():
        return Pictures(data, codec.fit, rows)
    latents = Latents(folder, rows)
    for path, _, header in latents.shards(codec, dtype):
        if not is_shard(path, header):
            raise BadInput(f"{path}: this shard is missing; run embed.py --cache-latents again, it goes on where it stopped")
    return latents


@lru_cache(2)
def epoch_order(seed, epoch, n):
    return np.random.default_rng([seed, epoch]).permutation(n)


class Pairs(torch.utils.data.Dataset):
    """The pair at a position of the endless training sequence, epoch after epoch, each epoch in its own random order.

    Everything random about it comes from (seed, position) alone: the same on 1 GPU or 64, however accumulated, and after
    a resume. look: Pictures or Latents."""

    def __init__(self, rows, users, look, latent_shape, seed, separate_noise, t_min):
        self.rows, self.users, self.look = rows, users, look
        self.latent_shape, self.seed, self.separate_noise, self.t_min = latent_shape, seed, separate_noise, t_min

    def __getitem__(self, position):
        epoch, i = divmod(position, len(self.rows))
        order = epoch_order(self.seed, epoch, len(self.rows))
        key = np.random.SeedSequence([self.seed, position]).generate_state(1, np.uint64)[0]
        g = torch.Generator().manual_seed(int(key) >> 1)
        u_time, u_drop, u_group = torch.rand(3, generator=g, dtype=torch.float64).tolist()
        noise = torch.randn(2, *self.latent_shape, generator=g)
        for skipped in range(100):  # a broken pair is named, and the next one of the order takes its place
            row = self.rows[order[(i + skipped) % len(order)]]
            try:
                pictures = self.look(row)
                break
            except BadInput as problem:
                print(f"skipped: {problem}", file=sys.stderr)
        else:
            raise BadInput(f"{row['file']}: 100 broken pairs one after the other")
        return dict(caption=row["caption"], ranking_id=row["ranking_id"], pictures=pictures, t=self.t_min + (1 - self.t_min) * u_time, u_drop=u_drop,
                    noise=noise if self.separate_noise else noise[:1].expand_as(noise),
                    user=self.users[row["user"]][row["groups"][int(u_group * len(row["groups"]))]])  # one of the groups it may have


def collate(pairs, tokenizer):
    """List of B pairs -> one micro-batch of tensors; of two of a kind, (2B, ...), the preferred come first."""
    together = lambda key: [p[key] for p in pairs]
    halves = lambda key: torch.stack(together(key), 1).flatten(0, 1)
    return dict(tokens=tokenise(tokenizer, together("caption")), pictures=halves("pictures"), noise=halves("noise"), user=torch.stack(together("user")),
                t=torch.tensor(together("t")), u_drop=torch.tensor(together("u_drop")), ranking_ids=together("ranking_id"))


def ignore_signals(worker):
    """Ctrl-C and torchrun's SIGTERM reach the workers too, but are for the main process, which saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Shown(torch.utils.data.Dataset):
    """Single pictures, fitted to the codec: (3, side, side) uint8, or None where one is broken, which is named."""

    def __init__(self, shown, data, fit):
        self.shown, self.data, self.fit = shown, data, fit

    def __len__(self):
        return len(self.shown)

    def __getitem__(self, i):
        row, side = self.shown[i]
        try:
            return fit_pixels([read_pictures(self.data, row, (side,))[0]], *self.fit)[0]
        except BadInput as problem:
            print(f"left out: {problem}", file=sys.stderr)


@torch.no_grad()
def cache_latents(args):
    """Encode every picture that training needs, once: training then reads 18 KB a picture and touches no JPEG. Shards that
    are there are skipped; under torchrun every process writes its share."""
    rows, settings = read_pairs(args.users)
    device, data = pick_device(args.device), Path(args.data or settings["data"])
    dtype = pick_dtype(args.dtype, device)  # the base's
    codec, latents = load_codec(args.base, device, dtype, args.decoder, args.grid), Latents(args.users, rows)
    Pictures(data, codec.fit, rows)  # looks whether all files are there
    (rank, world), broken = rank_and_world(), 0
    for path, keys, header in tqdm(latents.shards(codec, dtype)[rank::world], desc="encoding pictures", unit="shard", disable=None):
        if is_shard(path, header):
            continue
        parts = []
        shown = Shown([latents.of[key] for key in keys], data, codec.fit)
        for some in torch.utils.data.DataLoader(shown, args.batch, num_workers=args.workers, collate_fn=list):
            good = [i for i, pixels in enumerate(some) if pixels is not None]
            part = torch.full((len(some), *codec.latent_shape), torch.nan, dtype=dtype)
            if good:
                part[good] = encode_pixels(codec, torch.stack([some[i] for i in good]).to(device), dtype).cpu()
            parts.append(part)
            broken += len(some) - len(good)
        latents.folder.mkdir(exist_ok=True)
        write_atomically(path, lambda temporary: save_file(dict(latents=torch.cat(parts)), temporary, {"ppd": json.dumps(header)}))
    print(f"-> {latents.folder}: {len(latents.of)} pictures of {codec.latent_shape} {str(dtype)[6:]}" + f", {broken} broken" * bool(broken))


def run(args):
    if args.pairs:
        return own_person(args)
    if args.cache_latents:
        return cache_latents(args)
    args.data = args.data or "data/tiny"
    if is_hub_id(args.data) and args.data != "data/tiny":
        from huggingface_hub import snapshot_download
        try:
            args.data = snapshot_download(args.data, repo_type="dataset", allow_patterns=["*.parquet"])
        except (OSError, ValueError) as error:
            raise BadInput(f"--data {args.data}: no such folder here, and no such dataset on the hub ({str(error).strip().splitlines()[0]}). "
                           "Pick-a-Pic's original is gone from there: give your own copy's parquet folder") from None
    settings = {k: v for k, v in vars(args).items() if k not in ("users", "pairs", "out", "batch", "device", "cache_latents", "base", "decoder", "grid", "dtype", "workers")}
    if (Path(args.users) / "pairs.parquet").exists():
        before = read_pairs(args.users)[1]
        if before != settings:
            changed = [k for k in settings | before if settings.get(k) != before.get(k)]
            raise BadInput(f"--users {args.users} holds users made with another --{changed[0].replace('_', '-')}; choose another folder")
        print(f"{args.users}: already done")
        return
    rank, world = rank_and_world()
    if world > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))  # the slowest process may need days more
    if args.data == "data/tiny" and not Path(args.data).exists() and rank == 0:
        tiny.write_data(args.data)
    if dist.is_initialized():
        dist.barrier()
    if not Path(args.data).is_dir():
        raise BadInput(f"--data {args.data}: no such folder. Pick-a-Pic's original is gone from the hub: give your own copy's parquet folder")
    rows, dropped = split_rows(read_rows(args.data), args.validation_captions, args.test_captions, args.unseen_users)
    if rank == 0:
        print_table(rows, dropped)
    if not any(r["split"] == "train" for r in rows):
        raise BadInput(f"--data {args.data}: no pair is left to train on")
    if args.one_hot:
        one_hot_users(args, [r for r in rows if r["split"] != "shots"], settings)
    else:
        vlm_users(args, rows, settings)
    if rank == 0:
        print(f"-> {args.users}/*.pt and {args.users}/pairs.parquet")
    if dist.is_initialized():
        dist.destroy_process_group()


def main(argv=None):
    run_script("embed.py", run, arguments(argv))


if __name__ == "__main__":
    main()
