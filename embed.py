"""Stage 1 of PPD: users' choices in, one file a user out (paper Sec. 4.2, 5.1, 5.2).

    python embed.py                                                    # a VLM reads four choices
    python embed.py --one-hot light warm large --users users-onehot    # Sec. 5.1: a reward is a
    user python embed.py --pairs me.jsonl --out me.pt                       # your own choices
    python embed.py --cache-latents --users users                      # encode the images once

It writes <users>/<id>.pt, one a user, and <users>/pairs.parquet, one row a kept pair, without image
bytes: those train.py reads from the same --data. me.jsonl has at least four lines like
{"caption": "a red star", "preferred": "1.png", "dispreferred": "2.png"}. The drawn world's data is
drawn into data/tiny on first use.
"""

import argparse
import datetime
import json
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

from bases import encode_pixels, load_codec
from data import (
    CachedLatents,
    ImagePairs,
    SingleImages,
    few_shot_groups,
    image_ids,
    load_shots,
    load_user,
    loading,
    open_image,
    print_splits,
    read_pairs,
    read_rows,
    split_rows,
    write_pairs,
    write_user,
)
from rewards import REWARDS, make_synthetic_users
from tiny import world
from utils import (
    TINY,
    InputError,
    flag,
    headline,
    is_hub_id,
    load_frozen,
    pick_device,
    pick_dtype,
    rank_and_world,
    run_script,
)

NO_DATA = "Pick-a-Pic's original is gone from the hub: give your own copy's parquet folder"
# what pairs.parquet remembers of the flags, for a second run to compare
SETTINGS = ("data", "vlm", "layer", "profile", "shots", "groups", "one_hot")
SETTINGS += ("validation_captions", "test_captions", "unseen_users")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="embed.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", help="parquet folder in Pick-a-Pic v2's columns, or a dataset id")
    add("--users", help="folder to write (default: users; with --one-hot users-onehot)")
    add("--pairs", metavar="JSONL", help="your own choices; image paths relative to the file")
    add("--out", help="with --pairs: the user file to write, e.g. me.pt")
    add("--vlm", default="tiny", help="'tiny', a LLaVA-OneVision id, or a folder in its layout")
    add(
        "--layer", default="-1", help="whose last state to take: 0 the input's, -1 the last, or all"
    )
    add("--profile", action="store_true", help="the VLM writes the user's profile first")
    add("--shots", type=int, default=4, help="choices in a group (default: %(default)s)")
    add("--groups", type=int, default=4, help="most groups a user (default: %(default)s)")
    add("--batch", type=int, help="groups the VLM reads, or images to encode, at once")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    rewards = " ".join((*REWARDS, *world.WORDS, "own"))
    add("--one-hot", nargs="+", metavar="REWARD", default=[], help=f"synthetic users; {rewards}")
    add("--validation-captions", type=float, default=0.1, help="share, by hash (%(default)s)")
    add("--test-captions", type=float, default=0.2, help="share, by hash (%(default)s)")
    add("--unseen-users", type=float, default=0.25, help="share, by hash (%(default)s)")
    add("--cache-latents", action="store_true", help="encode the images of --users for train.py")
    latents = parser.add_argument_group("with --cache-latents, as for train.py")
    add = latents.add_argument
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
    known = (*REWARDS, *world.WORDS, "own")
    for name in args.one_hot:
        if name not in known:
            error(f"--one-hot {name}: no such reward; choose from {' '.join(known)}")
    for name in ("validation_captions", "test_captions", "unseen_users"):
        if not 0 <= getattr(args, name) < 1:
            error(f"{flag(name)} {getattr(args, name)}: expected a share in [0, 1)")
    if args.validation_captions + args.test_captions >= 1:
        error("--validation-captions and --test-captions leave no caption to train on")


# ------------------------------------------------------- what the VLM is asked (Sec. 4.2)
# LLaVA-OneVision's chat format (Qwen2's),
# https://huggingface.co/llava-hf/llava-onevision-qwen2-7b-ov-hf
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
INTRO = (
    "A person was shown pairs of pictures, each pair drawn for one caption, and chose from each "
    "the one they preferred."
)
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
    """Chat text with one <image> an image, each beside its own label and caption; two images a
    caption, preferred first. question: a key of QUESTIONS; "judge" asks about two more images of
    `caption`."""
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


# -------------------------------------------------------------------- the VLM (Sec. 4.2)
def load_vlm(name, device):
    """LLaVA-OneVision, frozen: (model, tokenizer, image processor). name: "tiny", a hub id or a
    folder in its layout."""
    import transformers
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if name == "tiny":
        folder = TINY / "vlm"
    else:
        folder = name if is_hub_id(name) else Path(name)
    if isinstance(folder, Path) and not (folder / "config.json").is_file():
        raise InputError(
            f"--vlm {name}: no {folder / 'config.json'}; expected 'tiny', a hub id or a folder in "
            "its layout"
        )
    dtype = pick_dtype("auto", device)
    try:
        model = load_frozen(
            transformers.LlavaOnevisionForConditionalGeneration, folder, device, dtype=dtype
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
        return model, tokenizer, LlavaOnevisionImageProcessorPil.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"--vlm {name}: cannot load {folder}: {headline(error)}") from None


def vlm_inputs(vlm, prompts, images):
    """Texts with one <image> an image, and lists of PIL images, one list a text -> the model's
    inputs, left-padded. Nested lists are the multi-image path: each image is one tile, whose
    patches end in one line-break token."""
    model, tokenizer, processor = vlm
    vision = model.config.vision_config
    count = (vision.image_size // vision.patch_size) ** 2 + 1
    pixels = processor(images, return_tensors="pt")
    texts = [prompt.replace("<image>", "<image>" * count) for prompt in prompts]
    encoded = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    return dict(
        input_ids=encoded.input_ids.to(model.device),
        attention_mask=encoded.attention_mask.to(model.device),
        pixel_values=pixels["pixel_values"].to(model.device, model.dtype),
        image_sizes=torch.as_tensor(pixels["image_sizes"]),
        batch_num_images=torch.as_tensor(pixels["batch_num_images"]),
    )


@torch.no_grad()
def generate_text(vlm, prompts, images, max_new_tokens=512):
    """The VLM's greedy answers: texts, and the inputs (see vlm_inputs) with the answers appended,
    whose mask leaves out padding and end tokens."""
    model, tokenizer, _ = vlm
    inputs = vlm_inputs(vlm, prompts, images)
    eos_ids = sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")})
    input_ids = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=eos_ids,
    )
    answers = input_ids[:, inputs["input_ids"].shape[1] :]
    is_end = torch.isin(answers, torch.tensor(eos_ids, device=input_ids.device))
    answer_mask = (~is_end).long().cumprod(1)  # 1 until the first end
    texts = [
        tokenizer.decode(answer[:length], skip_special_tokens=True)
        for answer, length in zip(answers, answer_mask.sum(1).tolist(), strict=True)
    ]
    attention_mask = torch.cat([inputs["attention_mask"], answer_mask], 1)
    return texts, inputs | dict(input_ids=input_ids, attention_mask=attention_mask)


@torch.no_grad()
def embed_users(vlm, groups, layer=-1, profile=False):
    """The user embeddings of four-shot groups, lists of (caption, preferred, dispreferred).

    Returns hidden states of the last position (B, S, D) float32, S = 1, or every layer's with layer
    "all"; and for each group the profile written before it, or None. The last state after the
    prompt
    alone, or after the profile: then it is the one that predicts the profile's end.
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
            if not -len(states) <= layer < len(states):
                raise InputError(
                    f"--layer {layer}: this VLM has states {-len(states)} to {len(states) - 1}, "
                    "or all"
                )
            states = [states[layer]]
    mask = inputs["attention_mask"]
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)  # (B,) position of the last token
    rows = torch.arange(len(groups))
    return torch.stack([state[rows, last] for state in states], 1).float().cpu(), texts


# ------------------------------------------------------------------------- users to files
def embed_all_users(args, rows, settings):
    """Sec. 4.2: every user with enough choices, four, is read by the VLM, one embedding a group.
    Seen users are read from their train captions only, unseen ones from those that nobody is tested
    on. Under torchrun each process reads its share; what is written already is skipped."""
    rank, world_size = rank_and_world()
    folder = Path(args.users)
    folder.mkdir(parents=True, exist_ok=True)
    user_rows = {}
    for row in rows:
        user_rows.setdefault(str(row["user_id"]), []).append(row)
    groups = {}
    for user, own_rows in user_rows.items():
        conditioning = [row for row in own_rows if row["split"] in ("train", "shots")]
        found = few_shot_groups(conditioning, args.groups, args.shots)
        if found:
            groups[user] = found

    mine = sorted(groups)[rank::world_size]
    pending = [user for user in mine if not is_written(args, user, groups[user])]
    vlm = load_vlm(args.vlm, pick_device(args.device)) if pending else None
    step = max(1, 4 * args.batch // args.groups)
    starts = range(0, len(pending), step)
    for i in tqdm(starts, desc=f"reading users ({rank + 1} of {world_size})", disable=None):
        chunk = {user: groups[user] for user in pending[i : i + step]}
        for user, fields in embed_chunk(args, vlm, chunk).items():
            split = user_rows[user][0]["split"]
            seen = split in ("train", "validation", "test-seen")
            write_user(folder, user, split="train" if seen else "unseen", **fields)
    if world_size > 1:
        dist.barrier()
    if rank == 0:
        pair_users_with_groups(args, user_rows, groups, settings)


def is_written(args, user, groups):
    """Whether a user's file is there. InputError if it was made from other choices or flags."""
    path = Path(args.users) / f"{user}.pt"
    if not path.exists():
        return False
    before = load_user(path)
    known = [[row["ranking_id"] for row in group] for group in groups]
    same = (
        (before["profile"] is not None) == args.profile
        and (before["vlm"], before["layer"]) == (args.vlm, str(args.layer))
        and all(group in known for group in before["shots"])
    )
    if not same:
        raise InputError(
            f"{path} was made from other choices or by other flags; choose another --users folder"
        )
    return True


def embed_chunk(args, vlm, groups):
    """{user: groups of rows} -> {user: fields of their file}; a group with a broken image is named
    and left out."""
    owners, ids, shots = [], [], []  # of the groups whose images are all there
    for user, user_groups in groups.items():
        for group in user_groups:
            try:
                shots.append(load_shots(args.data, group))
            except InputError as problem:
                message = f"user {user}: a group of {args.shots} is left out: {problem}"
                print(message, file=sys.stderr)
                continue
            owners.append(user)
            ids.append([row["ranking_id"] for row in group])

    def prompt_length(k):
        return sum(len(caption) for caption, _, _ in shots[k])

    states, texts = [None] * len(shots), [None] * len(shots)
    order = sorted(range(len(shots)), key=prompt_length)  # similar lengths, little padding
    for j in range(0, len(order), args.batch):
        batch = order[j : j + args.batch]
        read = embed_users(vlm, [shots[k] for k in batch], args.layer, args.profile)
        for k, state, text in zip(batch, *read, strict=True):
            states[k], texts[k] = state, text
    fields = {}
    for user in dict.fromkeys(owners):
        own = [k for k, owner in enumerate(owners) if owner == user]
        fields[user] = dict(
            embedding=torch.stack([states[k] for k in own]),
            shots=[ids[k] for k in own],
            profile=[texts[k] for k in own] if args.profile else None,
            vlm=args.vlm,
            layer=str(args.layer),
        )
    return fields


def pair_users_with_groups(args, user_rows, groups, settings):
    """Write pairs.parquet: every pair with the groups of its user that may condition it."""
    pairs, n_overlapping, n_groups_read = [], 0, 0
    for user in sorted(groups):
        path = Path(args.users) / f"{user}.pt"
        if not path.exists():
            continue  # every group of theirs had a broken image
        read = load_user(path)["shots"]
        n_groups_read += len(read)
        complete = [g for g in groups[user] if [row["ranking_id"] for row in g] in read]
        for row in user_rows[user]:
            if row["split"] != "shots":
                allowed = allowed_groups(row, complete)
                if allowed:
                    pairs.append(row | dict(user=user, groups=allowed))
                else:
                    n_overlapping += 1
    write_pairs(args.users, pairs, settings)
    print(
        f"{len(groups)} users, {n_groups_read} groups read; {len(user_rows) - len(groups)} have "
        f"fewer than {args.shots} choices; {len(pairs)} pairs, {n_overlapping} dropped because "
        f"every group of their user contains them or one of their images"
    )


def allowed_groups(row, groups):
    """Which groups may condition a pair: those that share no image with it, so do not contain
    it."""
    allowed = []
    for g, group in enumerate(groups):
        shown = set().union(*(image_ids(shot) for shot in group))
        if not image_ids(row) & shown:
            allowed.append(g)
    return allowed


def embed_custom_user(args):
    """Your own choices -> one user file. Every --shots lines, four, make a group; a rest is named
    and left out."""
    shots = read_own_choices(Path(args.pairs))
    if len(shots) < args.shots:
        raise InputError(f"{args.pairs}: {len(shots)} choices; expected at least {args.shots}")
    rest = len(shots) % args.shots
    if rest:
        print(f"the last {rest} of {len(shots)} lines make no group of {args.shots}: not used")
    starts = range(0, len(shots) - rest, args.shots)
    groups = [shots[i : i + args.shots] for i in starts]
    vlm = load_vlm(args.vlm, pick_device(args.device))
    states, texts = embed_users(vlm, groups, args.layer, args.profile)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_user(
        out.parent,
        out.stem,
        embedding=states,
        profile=texts if args.profile else None,
        split="own",
        vlm=args.vlm,
        layer=str(args.layer),
    )
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
            raise InputError(
                f'{source} line {number}: expected {{"caption": "...", "preferred": "image file", '
                '"dispreferred": "image file"}'
            ) from None
        name = f"{source} line {number}"
        images = [open_image(source.parent / path, f"{name}: {path}") for path in paths]
        shots.append((caption, *images))
    return shots


# ---------------------------------------------------------------------- cached latents
@torch.no_grad()
def cache_latents(args):
    """Encode every image that a users folder trains and validates on, once: training then reads
    18 KB an image and no JPEG. What is there is skipped; under torchrun every process writes its
    share."""
    rank, world_size = rank_and_world()
    pairs, settings = read_pairs(args.users)
    data = Path(args.data or settings["data"])
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)  # the base's
    codec = load_codec(args.base, device, dtype, args.decoder, args.grid)
    needed = [row for row in pairs if row["split"] in ("train", "validation")]
    ImagePairs(data, codec, needed)  # InputError if a file is not there

    latents = CachedLatents(args.latents or data / "latents", codec, dtype)
    if rank == 0:
        latents.create(read_rows(data))
    if world_size > 1:
        dist.barrier()
    missing = latents.open().missing(needed)
    if world_size > 1:
        dist.barrier()  # all have looked before anybody writes, so that the shares are disjoint
    keys = list(missing)[rank::world_size]
    n_broken = 0
    images = SingleImages([missing[key] for key in keys], data, codec)
    settings = dict(batch_size=args.batch, num_workers=args.workers, collate_fn=list)
    progress = tqdm(total=len(keys), desc="encoding images", unit="image", disable=None)
    with loading(images, **settings) as batches:
        for i, batch in enumerate(batches):
            readable = [k for k, pixels in enumerate(batch) if pixels is not None]
            encoded = torch.full((len(batch), *codec.latent_shape), torch.nan, dtype=dtype)
            if readable:
                pixels = torch.stack([batch[k] for k in readable]).to(device)
                encoded[readable] = encode_pixels(codec, pixels, dtype).cpu()
            latents.write(keys[i * args.batch :][: len(batch)], encoded)
            n_broken += len(batch) - len(readable)
            progress.update(len(batch))
    progress.close()
    shape, name = codec.latent_shape, str(dtype).removeprefix("torch.")
    broken = f", {n_broken} broken" if n_broken else ""
    print(f"-> {latents.folder}: {len(keys)} more images of {shape} {name}{broken}")


# --------------------------------------------------------------------------------- main
def make_users(args):
    """Rows -> splits -> users; see the module's docstring."""
    args.data = find_data(args.data or "data/tiny")
    settings = {name: getattr(args, name) for name in SETTINGS}
    if already_made(args.users, settings):
        return
    rank, _ = rank_and_world()
    if args.data == "data/tiny" and not Path(args.data).exists() and rank == 0:
        world.write_data(args.data)
    if dist.is_initialized():
        dist.barrier()
    if not Path(args.data).is_dir():
        raise InputError(f"--data {args.data}: no such folder. {NO_DATA}")
    shares = (args.validation_captions, args.test_captions, args.unseen_users)
    rows, dropped = split_rows(read_rows(args.data), *shares)
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


def find_data(data):
    """--data as a folder's name; a dataset id is taken from the hub's cache or downloaded."""
    if not is_hub_id(data) or data == "data/tiny":
        return data
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(data, repo_type="dataset", allow_patterns=["*.parquet"])
    except (OSError, ValueError) as error:
        raise InputError(
            f"--data {data}: no such folder here, and no such dataset on the hub "
            f"({headline(error)}). {NO_DATA}"
        ) from None


def already_made(users, settings):
    """Whether the users folder is finished. InputError if it was made with other flags."""
    if not (Path(users) / "pairs.parquet").exists():
        return False
    before = read_pairs(users)[1]
    changed = [key for key in settings if before.get(key) != settings[key]]
    if changed:
        raise InputError(
            f"--users {users} holds users made with another {flag(changed[0])}; choose another "
            f"folder"
        )
    print(f"{users}: already done")
    return True


def run(args):
    if args.pairs:
        embed_custom_user(args)
        return
    if rank_and_world()[1] > 1:  # the slowest process may need days more
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    if args.cache_latents:
        cache_latents(args)
    else:
        make_users(args)
    if dist.is_initialized():
        dist.destroy_process_group()


def main(argv=None):
    run_script("embed.py", run, parse_args(argv))


if __name__ == "__main__":
    main()
