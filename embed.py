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
import json
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

import data
import utils
from bases import encode_pixels, load_codec
from rewards import REWARDS, make_synthetic_users
from tiny import world
from utils import InputError

NO_DATA = "Pick-a-Pic's original is gone from the hub: give your own copy's parquet folder"
CHOICE = '{"caption": "...", "preferred": "image file", "dispreferred": "image file"}'
SHARES = ("validation_captions", "test_captions", "unseen_users")
# what pairs.parquet remembers of the flags, for a second run to compare
SETTINGS = ("data", "vlm", "layer", "profile", "shots", "groups", "one_hot", *SHARES)
ONE_HOT = " ".join((*REWARDS, *world.WORDS, "own"))  # what --one-hot takes


def parse_args(argv=None):
    parser = utils.make_parser("embed.py", __doc__)
    add = parser.add_argument
    add("--data", help="parquet folder in Pick-a-Pic v2's columns, or a dataset id")
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
    add("--validation-captions", type=float, default=0.1, help="share, by hash (%(default)s)")
    add("--test-captions", type=float, default=0.2, help="share, by hash (%(default)s)")
    add("--unseen-users", type=float, default=0.25, help="share, by hash (%(default)s)")
    add("--cache-latents", action="store_true", help="encode the images of --users for train.py")
    add = parser.add_argument_group("with --cache-latents, as for train.py").add_argument
    add("--latents", help="folder of the latents (default: latents, beside the data)")
    add("--base", default="tiny", help="(default: %(default)s)")
    add("--decoder", help="(default: stabilityai/stable-cascade)")
    add("--grid", type=int, default=24, help="(default: %(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    add("--workers", type=int, default=0, help="processes that read images (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.users is None:
        args.users = "users-onehot" if args.one_hot else "users"
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
    for name, least in dict(shots=1, groups=1, batch=1, grid=1, workers=0).items():
        if getattr(args, name) < least:
            error(f"--{name} {getattr(args, name)}: expected {least} or more")
    if len(set(args.one_hot)) < len(args.one_hot):
        error("--one-hot: a reward is named twice")
    for name in args.one_hot:
        if name not in ONE_HOT.split():
            error(f"--one-hot {name}: no such reward; choose from {ONE_HOT}")
    for name in SHARES:
        if not 0 <= getattr(args, name) < 1:
            error(f"{utils.flag(name)} {getattr(args, name)}: expected a share in [0, 1)")
    if args.validation_captions + args.test_captions >= 1:
        error("--validation-captions and --test-captions leave no caption to train on")


# the chat format of https://huggingface.co/llava-hf/llava-onevision-qwen2-7b-ov-hf, Qwen2's
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
INTRO = "A person was shown pairs of pictures, each pair drawn for one caption, and chose from "
INTRO += "each the one they preferred."
PAIR = "\n\nPair {}. Caption: "
PREFERRED = "\nPreferred: "
DISPREFERRED = "\nDispreferred: "
QUESTIONS = {
    "taste": "\n\nIn a few words, what does this person like in a picture?",
    "profile": "\n\nFor every pair, describe both pictures and say how they differ in style, "
    "visual quality and aesthetics. Then write 'User profile:' and sum up what this person likes.",
    "judge": "\n\nWhich of two further pictures would this person choose? Answer 'CHOICE: 1' or "
    "'CHOICE: 2'. Caption: ",
}
IMAGE_1 = "\nPicture 1: "
IMAGE_2 = "\nPicture 2: "
ASSISTANT_TURN = "<|im_end|>\n<|im_start|>assistant\n"


def build_vlm_prompt(captions, question, caption=None):
    """Chat text with one <image> an image, each beside its own label; two images a caption,
    preferred first. question: a key of QUESTIONS; "judge": about two more images of `caption`."""
    text = SYSTEM + INTRO
    for i, shot_caption in enumerate(captions, 1):
        text += PAIR.format(i) + strip_markup(shot_caption)
        text += PREFERRED + "<image>" + DISPREFERRED + "<image>"
    text += QUESTIONS[question]
    if question == "judge":
        text += strip_markup(caption) + IMAGE_1 + "<image>" + IMAGE_2 + "<image>"
    return text + ASSISTANT_TURN


def strip_markup(caption):
    """A caption without anything that could forge the chat."""
    return " ".join(re.sub(r"<image>|<video>|<\|.*?\|>", " ", caption).split())


def load_vlm(name, device):
    """LLaVA-OneVision, frozen: (model, tokenizer, image processor). name: "tiny", a hub id or a
    folder in its layout. Raises InputError if it cannot be loaded."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = utils.TINY / "vlm" if name == "tiny" else Path(name)
    if utils.is_hub_id(name):
        folder = name
    elif not (folder / "config.json").is_file():
        expected = "expected 'tiny', a hub id or a folder in its layout"
        raise InputError(f"--vlm {name}: no {folder / 'config.json'}; {expected}")
    cls = transformers.LlavaOnevisionForConditionalGeneration
    try:
        model = utils.load_frozen(cls, folder, device, dtype=utils.pick_dtype("auto", device))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
        processor = transformers.LlavaOnevisionImageProcessorPil.from_pretrained(folder)
        return model, tokenizer, processor
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"--vlm {name}: cannot load {folder}: {utils.first_line(error)}") from None


def vlm_inputs(vlm, prompts, images):
    """Texts with one <image> an image, and a list of PIL images a text -> the model's inputs,
    left-padded. Each image is one tile, whose patches end in one line-break token."""
    model, tokenizer, processor = vlm
    vision = model.config.vision_config
    count = (vision.image_size // vision.patch_size) ** 2 + 1
    pixels = processor(images, return_tensors="pt")
    inputs = {key: torch.as_tensor(pixels[key]) for key in ("image_sizes", "batch_num_images")}
    inputs["pixel_values"] = pixels["pixel_values"].to(model.device, model.dtype)
    texts = [prompt.replace("<image>", "<image>" * count) for prompt in prompts]
    encoded = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    return inputs | {key: encoded[key].to(model.device) for key in ("input_ids", "attention_mask")}


@torch.no_grad()
def generate_text(vlm, prompts, images, max_new_tokens=512):
    """The VLM's greedy answers: texts, and the inputs (see vlm_inputs) with the answers appended,
    whose mask leaves out padding and end tokens."""
    model, tokenizer, _ = vlm
    inputs = vlm_inputs(vlm, prompts, images)
    eos_ids = sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")})
    stop = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=eos_ids)
    input_ids = model.generate(**inputs, **stop, do_sample=False, max_new_tokens=max_new_tokens)
    answers = input_ids[:, inputs["input_ids"].shape[1] :]
    is_end = torch.isin(answers, torch.tensor(eos_ids, device=input_ids.device))
    answer_mask = (~is_end).long().cumprod(1)  # 1 until the first end
    answers = [answer[mask > 0] for answer, mask in zip(answers, answer_mask, strict=True)]
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    attention_mask = torch.cat([inputs["attention_mask"], answer_mask], 1)
    return texts, inputs | dict(input_ids=input_ids, attention_mask=attention_mask)


@torch.no_grad()
def embed_users(vlm, groups, layer=-1, profile=False):
    """The user embeddings of four-shot groups, lists of (caption, preferred, dispreferred).

    Returns hidden states of the last position (B, S, D) float32 (S = 1, or every layer's with layer
    "all"), and each group's written profile, or None. The last position is the prompt's, or the
    profile's: there the state is the one that predicts the profile's end.
    """
    question = "profile" if profile else "taste"
    prompts = [build_vlm_prompt([caption for caption, _, _ in group], question) for group in groups]
    images = [[image for shot in group for image in shot[1:]] for group in groups]
    if profile:
        texts, inputs = generate_text(vlm, prompts, images)
    else:
        texts, inputs = [None] * len(groups), vlm_inputs(vlm, prompts, images)
    model = vlm[0].model
    if layer == -1:  # all layers' states of a 7B model's 6,500 positions would take 1.3 GB a group
        states = [model(**inputs, use_cache=False).last_hidden_state]
    else:
        states = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
        if layer != "all":
            n = len(states)
            if not -n <= layer < n:
                raise InputError(f"--layer {layer}: this VLM has states {-n} to {n - 1}, or all")
            states = [states[layer]]
    mask = inputs["attention_mask"]
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)  # (B,) position of the last token
    rows = torch.arange(len(groups))
    return torch.stack([state[rows, last] for state in states], 1).float().cpu(), texts


def embed_all_users(args, rows, settings):
    """Sec. 4.2: the VLM reads every user with four choices or more, one embedding a group; seen
    users from their train captions only, unseen ones from those that nobody is tested on. Under
    torchrun each process reads its share; what is written already is skipped."""
    rank, world_size = utils.rank_and_world()
    Path(args.users).mkdir(parents=True, exist_ok=True)
    user_rows = {}
    for row in rows:
        user_rows.setdefault(str(row["user_id"]), []).append(row)
    groups = {}
    for user, own_rows in user_rows.items():
        conditioning = [row for row in own_rows if row["split"] in ("train", "shots")]
        if len(conditioning) >= args.shots:
            groups[user] = data.few_shot_groups(conditioning, args.groups, args.shots)

    mine = sorted(groups)[rank::world_size]
    pending = [user for user in mine if not is_written(args, user, groups[user])]
    vlm = load_vlm(args.vlm, utils.pick_device(args.device)) if pending else None
    step = max(1, 4 * args.batch // args.groups)
    starts = range(0, len(pending), step)
    for i in tqdm(starts, desc=f"reading users ({rank + 1} of {world_size})", disable=None):
        embed_chunk(args, vlm, {user: groups[user] for user in pending[i : i + step]})
    if world_size > 1:
        dist.barrier()
    if rank == 0:
        pair_users_with_groups(args, user_rows, groups, settings)


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


def embed_chunk(args, vlm, groups):
    """{user: groups of rows} -> users' files. A group with a broken image is named and left out."""
    complete = []  # the other groups
    for user, user_groups in groups.items():
        for rows in user_groups:
            try:
                shots = data.load_shots(args.data, rows)
            except InputError as problem:
                message = f"user {user}: a group of {args.shots} is left out: {problem}"
                print(message, file=sys.stderr)
            else:
                complete.append(dict(user=user, rows=rows, shots=shots))
    by_length = sorted(complete, key=lambda group: sum(len(shot[0]) for shot in group["shots"]))
    for i in range(0, len(by_length), args.batch):
        batch = by_length[i : i + args.batch]  # similar lengths, little padding
        read = embed_users(vlm, [group["shots"] for group in batch], args.layer, args.profile)
        for group, state, text in zip(batch, *read, strict=True):
            group.update(state=state, text=text)
    for user in dict.fromkeys(group["user"] for group in complete):
        own = [group for group in complete if group["user"] == user]
        profile = [group["text"] for group in own] if args.profile else None
        fields = dict(vlm=args.vlm, layer=str(args.layer), profile=profile)
        fields["embedding"] = torch.stack([group["state"] for group in own])
        fields["shots"] = [[row["ranking_id"] for row in group["rows"]] for group in own]
        seen = own[0]["rows"][0]["split"] == "train"
        data.write_user(args.users, user, split="train" if seen else "unseen", **fields)


def pair_users_with_groups(args, user_rows, groups, settings):
    """Write pairs.parquet: each pair with those groups of its user that show none of its images."""
    pairs = []
    n_overlapping = n_groups_read = 0
    for user in sorted(groups):
        path = Path(args.users) / f"{user}.pt"
        if not path.exists():
            continue  # every group of theirs had a broken image
        read = data.load_user(path)["shots"]
        n_groups_read += len(read)
        complete = [g for g in groups[user] if [row["ranking_id"] for row in g] in read]
        shown = [set().union(*map(data.image_ids, group)) for group in complete]
        for row in user_rows[user]:
            allowed = [i for i, images in enumerate(shown) if not images & data.image_ids(row)]
            if row["split"] != "shots" and allowed:
                pairs.append(row | dict(user=user, groups=allowed))
            elif row["split"] != "shots":
                n_overlapping += 1
    data.write_pairs(args.users, pairs, settings)
    n_few = len(user_rows) - len(groups)
    why = "every group of their user contains them or one of their images"
    print(
        f"{len(groups)} users, {n_groups_read} groups; {n_few} have fewer than {args.shots} choices"
    )
    print(f"{len(pairs)} pairs, {n_overlapping} dropped because {why}")


def embed_custom_user(args):
    """Your own choices -> one user file. Every --shots lines, four, make a group."""
    shots = read_own_choices(Path(args.pairs))
    if len(shots) < args.shots:
        raise InputError(f"{args.pairs}: {len(shots)} choices; expected at least {args.shots}")
    rest = len(shots) % args.shots
    if rest:
        print(f"the last {rest} of {len(shots)} lines make no group of {args.shots}: not used")
    groups = [shots[i : i + args.shots] for i in range(0, len(shots) - rest, args.shots)]
    vlm = load_vlm(args.vlm, utils.pick_device(args.device))
    states, texts = embed_users(vlm, groups, args.layer, args.profile)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    reader = dict(vlm=args.vlm, layer=str(args.layer), profile=texts if args.profile else None)
    data.write_user(out.parent, out.stem, embedding=states, split="own", **reader)
    if args.profile:
        print("\n".join(texts))
    print(f"-> {out.parent / out.stem}.pt, {len(groups)} group{'s' if len(groups) > 1 else ''}")


def read_own_choices(source):
    """A .jsonl of one's own choices -> [(caption, preferred image, dispreferred image), ...]."""
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
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
        except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
            raise InputError(f"{source} line {number}: expected {CHOICE}") from None
        name = f"{source} line {number}"
        images = [data.open_image(source.parent / path, f"{name}: {path}") for path in paths]
        shots.append((caption, *images))
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
    data.ImagePairs(folder, codec, needed)  # InputError if a file is not there

    latents = data.CachedLatents(args.latents or folder / "latents", codec, dtype)
    if rank == 0:
        latents.create(data.read_rows(folder))
    if world_size > 1:
        dist.barrier()
    missing = latents.open().missing(needed)
    if world_size > 1:
        dist.barrier()  # all have looked before anybody writes, so that the shares are disjoint
    keys = list(missing)[rank::world_size]
    n_broken = 0
    images = data.SingleImages([missing[key] for key in keys], folder, codec)
    how = dict(batch_size=args.batch, num_workers=args.workers, collate_fn=list)
    progress = tqdm(total=len(keys), desc="encoding images", unit="image", disable=None)
    with data.loading(images, **how) as batches, progress:
        for i, batch in enumerate(batches):
            readable = [k for k, pixels in enumerate(batch) if pixels is not None]
            encoded = torch.full((len(batch), *codec.latent_shape), torch.nan, dtype=dtype)
            if readable:
                pixels = torch.stack([batch[k] for k in readable]).to(device)
                encoded[readable] = encode_pixels(codec, pixels, dtype).cpu()
            latents.write(keys[i * args.batch :][: len(batch)], encoded)
            n_broken += len(batch) - len(readable)
            progress.update(len(batch))
    name = str(dtype).removeprefix("torch.")
    broken = f", {n_broken} broken" if n_broken else ""
    print(f"-> {latents.folder}: {len(keys)} more images of {latents.shape} {name}{broken}")


def make_users(args):
    """Rows -> splits -> users; see the module's docstring."""
    args.data = find_data(args.data or "data/tiny")
    settings = {name: getattr(args, name) for name in SETTINGS}
    if (Path(args.users) / "pairs.parquet").exists():
        before = data.read_pairs(args.users)[1]
        changed = [key for key in settings if before.get(key) != settings[key]]
        if changed:
            made = f"holds users made with another {utils.flag(changed[0])}"
            raise InputError(f"--users {args.users} {made}; choose another folder")
        print(f"{args.users}: already done")
        return
    rank, _ = utils.rank_and_world()
    if args.data == "data/tiny" and not Path(args.data).exists() and rank == 0:
        world.write_data(args.data)
    if dist.is_initialized():
        dist.barrier()
    if not Path(args.data).is_dir():
        raise InputError(f"--data {args.data}: no such folder. {NO_DATA}")
    shares = (args.validation_captions, args.test_captions, args.unseen_users)
    rows, dropped = data.split_rows(data.read_rows(args.data), *shares)
    if rank == 0:
        data.print_splits(rows, dropped)
    if not any(row["split"] == "train" for row in rows):
        raise InputError(f"--data {args.data}: no pair is left to train on")
    if args.one_hot:
        make_synthetic_users(args, [row for row in rows if row["split"] != "shots"], settings)
    else:
        embed_all_users(args, rows, settings)
    if rank == 0:
        print(f"-> {args.users}/*.pt and {args.users}/pairs.parquet")


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
