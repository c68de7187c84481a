"""Sec. 5.1's rewards (CLIP, aesthetic, HPS, and PickScore), and its synthetic users: every pair
relabeled by a reward, whose user is a one-hot vector. On the drawn world a reward is a taste word,
measured from the pixels."""

import io
import pickle
import re
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from data import read_images, write_pairs, write_user
from tiny import world
from utils import (
    InputError,
    headline,
    hub_file,
    pick_device,
    pick_dtype,
    rank_and_world,
    torch_load_safe,
    write_atomically,
)

REWARDS = {  # name: title, hub repository, file in it if it is no transformers model
    "clip": ("CLIP ViT-H/14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", None),
    "aesthetic": ("LAION aesthetic predictor, ViT-L/14", "openai/clip-vit-large-patch14", None),
    "hps": ("HPS v2.1", "xswu/HPSv2", "HPS_v2.1_compressed.pt"),
    "hps2.0": ("HPS v2.0", "xswu/HPSv2", "HPS_v2_compressed.pt"),
    "pickscore": ("PickScore v1", "yuvalkirstain/PickScore_v1", None),
}
AESTHETIC = "sac+logos+ava1-l14-linearMSE.pth"
AESTHETIC_URL = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
AESTHETIC_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"

# open_clip's names of a CLIP's tensors, and transformers': first those there is one of, then those
# of a block
TOP_LEVEL_NAMES = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
BLOCK_NAMES = {
    "attn.": "self_attn.",
    "ln_": "layer_norm",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


# ------------------------------------------------------------------------------ models
def from_open_clip(state):
    """State dict of an open_clip CLIP, as HPS is published -> of transformers' CLIPModel."""
    converted = {}
    for key, value in state.items():
        block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", key)
        if block:
            tower = "vision" if block[1] else "text"
            prefix = f"{tower}_model.encoder.layers.{block[2]}."
            converted |= convert_block_tensor(prefix, block[3], value)
        elif key == "text_projection":
            converted["text_projection.weight"] = value.T.contiguous()
        elif key == "visual.proj":
            converted["visual_projection.weight"] = value.T.contiguous()
        else:
            for theirs, ours in TOP_LEVEL_NAMES.items():
                if key == theirs or key.startswith(theirs + "."):
                    key = ours + key[len(theirs) :]
                    break
            converted[key] = value
    return converted


def convert_block_tensor(prefix, name, value):
    for theirs, ours in BLOCK_NAMES.items():
        if name.startswith(theirs):
            name = ours + name[len(theirs) :]
            break
    if "in_proj_" not in name:
        return {prefix + name: value}
    kind = name.rsplit("_", 1)[1]  # weight or bias of one matrix for queries, keys and values
    parts = zip("qkv", value.chunk(3), strict=True)
    return {f"{prefix}self_attn.{p}_proj.{kind}": part.contiguous() for p, part in parts}


@lru_cache(None)
def load_reward(name, device):
    """A reward of REWARDS: CLIPModel, processor, and the aesthetic predictor's head or None."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    title, repo, file = REWARDS[name]
    # HPS and PickScore are fine-tuned from the ViT-H CLIP and share its processor
    processor_repo = repo if name == "aesthetic" else REWARDS["clip"][1]
    try:
        processor = CLIPProcessor.from_pretrained(processor_repo)
        if file:
            model = CLIPModel(CLIPConfig.from_pretrained(processor_repo))
            state = torch_load_safe(hub_file(repo, file))["state_dict"]
            model.load_state_dict(from_open_clip(state))
        else:
            model = CLIPModel.from_pretrained(repo)
        head = load_aesthetic_head(device) if name == "aesthetic" else None
    except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise InputError(
            f"reward {name} ({title}): cannot load {repo}: {headline(error)}"
        ) from None
    model = model.to(device, pick_dtype("auto", device)).eval().requires_grad_(False)
    return model, processor, head


def load_aesthetic_head(device):
    """LAION's predictor on CLIP's image embedding (B, 768) -> (B,): five linear layers without
    activations between them; fetched from its repository, as it is not on the hub."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / AESTHETIC
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        url = AESTHETIC_URL + AESTHETIC.replace("+", "%2B")
        torch.hub.download_url_to_file(url, path, hash_prefix=AESTHETIC_SHA256)
    state = torch.load(path, map_location=device, weights_only=True)

    def head(x):
        x = x.float()
        for i in (0, 2, 4, 6, 7):
            x = F.linear(x, state[f"layers.{i}.weight"], state[f"layers.{i}.bias"])
        return x[:, 0]

    return head


# ------------------------------------------------------------------------------ scores
@torch.no_grad()
def score(name, images, captions, device="cpu", batch=64):
    """Reward of PIL images for their captions, (B,) floats, as in Table 1: 100 x cosine for CLIP,
    HPS and PickScore, the predictor's output for aesthetic. A taste word needs no caption."""
    if name in world.WORDS:
        if len({image.size for image in images}) == 1:
            return world.reward(name, images)
        return np.concatenate([world.reward(name, [image]) for image in images])
    model, processor, head = load_reward(name, device)
    scores = []
    for i in range(0, len(images), batch):
        image_batch = images[i : i + batch]
        if name.startswith("hps"):  # its own preprocessing pads where CLIP's crops
            side = processor.image_processor.crop_size["height"]
            image_batch = [ImageOps.pad(im, (side, side), Image.BICUBIC) for im in image_batch]
        inputs = processor(
            text=list(captions[i : i + batch]),
            images=image_batch,
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(device)
        out = model(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            pixel_values=inputs.pixel_values.to(model.dtype),
        )
        if head:
            scores.append(head(out.image_embeds))
        else:
            cosine = (out.image_embeds.float() * out.text_embeds.float()).sum(-1)
            scores.append(100 * cosine)
    return torch.cat(scores).cpu().numpy()


def score_pairs(folder, data, names, rows, device, chunk_size=256):
    """Both images' scores by the named rewards, {name: (n, 2)} on rank 0, nan where an image is
    broken, which is named. Kept in <folder>/scores, a file a chunk: nothing is computed twice, and
    under torchrun every process scores its share."""
    rank, world_size = rank_and_world()
    folder = Path(folder) / "scores"
    folder.mkdir(parents=True, exist_ok=True)
    chunks = [rows[i : i + chunk_size] for i in range(0, len(rows), chunk_size)]
    paths = [folder / f"{number:06d}.npz" for number in range(len(chunks))]
    mine = range(rank, len(chunks), world_size)
    for i in tqdm(mine, desc="scoring pairs", unit="chunk", disable=None):
        if load_cached_scores(paths[i], names, chunks[i]) is None:
            scores = score_chunk(data, names, chunks[i], device)
            buffer = io.BytesIO()
            np.savez(buffer, ranking_ids=ranking_ids(chunks[i]), **scores)
            content = buffer.getvalue()
            write_atomically(paths[i], lambda path, content=content: path.write_bytes(content))
    if world_size > 1:
        dist.barrier()
    if rank != 0:
        return {}
    parts = [load_cached_scores(paths[i], names, chunk) for i, chunk in enumerate(chunks)]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def ranking_ids(rows):
    return np.array([row["ranking_id"] for row in rows])


def load_cached_scores(path, names, rows):
    """{name: (n, 2)} if these rows' scores by all these rewards are in the file, else None."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        if not np.array_equal(file["ranking_ids"], ranking_ids(rows)):
            return None
        return {name: file[name] for name in names} if set(names) <= set(file.files) else None


def score_chunk(data, names, rows, device):
    """{name: (n, 2)} of rows, nan where an image is broken."""
    readable, images = [], []
    for i, row in enumerate(rows):
        try:
            images += read_images(data, row)
            readable.append(i)
        except InputError as problem:
            print(f"skipped: {problem}", file=sys.stderr)
    captions = [rows[i]["caption"] for i in readable for _ in range(2)]
    scores = {name: np.full((len(rows), 2), np.nan, np.float32) for name in names}
    for name in names if readable else ():
        scores[name][readable] = score(name, images, captions, device).reshape(-1, 2)
    return scores


# --------------------------------------------------------------- synthetic users (Sec. 5.1)
def make_synthetic_users(args, rows, settings):
    """Every kept pair once per reward, relabeled by it (by "own": not at all); u is the reward's
    one-hot vector. A pair with a broken image is named and skipped, one of equal scores is counted
    and dropped."""
    names = [name for name in args.one_hot if name != "own"]
    scores = {}
    if names:
        scores = score_pairs(args.users, args.data, names, rows, pick_device(args.device))
    if rank_and_world()[0] != 0:
        return
    own = [[1 - row["preferred"], row["preferred"]] for row in rows]
    scores["own"] = np.array(own, np.float32)

    pairs = []
    for i, row in enumerate(rows):
        for name in args.one_hot:
            first, second = scores[name][i].tolist()
            if first > second or second > first:  # not equal, no nan
                pair = dict(user=name, preferred=int(second > first), groups=[0])
                pairs.append(row | pair | dict(score_0=first, score_1=second))
    if not pairs:
        raise InputError(
            f"--data {args.data}: no pair is left, every one is broken or of equal scores"
        )
    Path(args.users).mkdir(parents=True, exist_ok=True)
    for name, vector in zip(args.one_hot, torch.eye(len(args.one_hot)), strict=True):
        write_user(args.users, name, embedding=vector.view(1, 1, -1).clone(), vlm="one-hot")
    write_pairs(args.users, pairs, settings)

    for name in args.one_hot:
        made = [pair for pair in pairs if pair["user"] == name]
        n_train = sum(pair["split"] == "train" for pair in made)
        n_equal = (scores[name][:, 0] == scores[name][:, 1]).sum()
        n_broken = np.isnan(scores[name][:, 0]).sum()
        title = "the users" if name == "own" else REWARDS.get(name, ("drawn world",))[0]
        print(
            f"{name} ({title}): {len(made)} pairs, {n_train} to train on, {n_equal} dropped as "
            f"equal, {n_broken} with a broken image"
        )
