"""Sec. 5.1's rewards (CLIP, aesthetic, HPS, and PickScore), and its synthetic users: every pair
relabeled by a reward, whose user is a one-hot vector. On the drawn world a reward is a taste word,
measured from the pixels. And the reward that an adapter itself is."""

import io
import pickle
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

import utils
from data import keyed_generator, read_images, write_pairs, write_user
from ppd import ppd_loss
from tiny import world
from utils import InputError, hub_file

REWARDS = {  # name: title, hub repository, file in it if it is no transformers model
    "clip": ("CLIP ViT-H/14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", None),
    "aesthetic": ("LAION aesthetic predictor, ViT-L/14", "openai/clip-vit-large-patch14", None),
    "hps": ("HPS v2.1", "xswu/HPSv2", "HPS_v2.1_compressed.pt"),
    "hps2.0": ("HPS v2.0", "xswu/HPSv2", "HPS_v2_compressed.pt"),
    "pickscore": ("PickScore v1", "yuvalkirstain/PickScore_v1", None),
}
N_DRAWS = 8  # of timestep and noise a pair, of implicit_logits
AESTHETIC = "sac+logos+ava1-l14-linearMSE.pth"
AESTHETIC_URL = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
AESTHETIC_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"

# parts of open_clip's names of a CLIP's tensors, and transformers'; to be replaced in this order
OPEN_CLIP_NAMES = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
    ".attn.": ".self_attn.",
    ".ln_": ".layer_norm",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def from_open_clip(state):
    """State dict of an open_clip CLIP, as HPS is published -> of transformers' CLIPModel."""
    converted = {}
    for key, value in state.items():
        for theirs, ours in OPEN_CLIP_NAMES.items():
            key = key.replace(theirs, ours)
        if key in ("text_projection.weight", "visual_projection.weight"):
            value = value.T.contiguous()
        if ".in_proj_" in key:  # one matrix for queries, keys and values
            for name, part in zip("qkv", value.chunk(3), strict=True):
                converted[key.replace(".in_proj_", f".{name}_proj.")] = part.contiguous()
        else:
            converted[key] = value
    return converted


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
            state = utils.torch_load_safe(hub_file(repo, file))["state_dict"]
            model.load_state_dict(from_open_clip(state))
        else:
            model = CLIPModel.from_pretrained(repo)
        head = load_aesthetic_head(device) if name == "aesthetic" else None
    except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        problem = f"cannot load {repo}: {utils.first_line(error)}"
        raise InputError(f"reward {name} ({title}): {problem}") from None
    model = model.to(device, utils.pick_dtype("auto", device)).eval().requires_grad_(False)
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
        texts = list(captions[i : i + batch])
        how = dict(padding=True, truncation=True, return_tensors="pt")
        inputs = processor(text=texts, images=image_batch, **how).to(device)
        tokens = dict(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
        out = model(**tokens, pixel_values=inputs.pixel_values.to(model.dtype))
        if head:
            scores.append(head(out.image_embeds))
        else:
            cosine = (out.image_embeds.float() * out.text_embeds.float()).sum(-1)
            scores.append(100 * cosine)
    return torch.cat(scores).cpu().numpy()


@torch.no_grad()
def implicit_logits(base, adapter, rows, load_images, users, t_min, batch):
    """Eq. 6's logits of real choices, for several users each: the adapter as a reward model.

    rows: B pairs; load_images: a data.ImagePairs
    users: {arm: standardized embeddings (B, D)}
    Returns {arm: (B, N_DRAWS)}; every arm has the same timesteps, the middles of N_DRAWS equal
    parts of [t_min, 1], and the same noise, which is keyed by the pair's id.
    """
    grid = t_min + (1 - t_min) * (torch.arange(N_DRAWS) + 0.5) / N_DRAWS
    logits = {arm: [] for arm in users}
    per_batch = max(1, batch // N_DRAWS)  # pairs at once, each with all its draws
    for i in tqdm(range(0, len(rows), per_batch), "implicit rewards", disable=None, leave=False):
        part = rows[i : i + per_batch]
        pairs = torch.stack([load_images(row) for row in part]).to(base.device)  # (b, 2, ...)
        x_0 = base.encode_pixels(pairs.transpose(0, 1).flatten(0, 1))  # the preferred first
        x_0 = x_0.repeat_interleave(N_DRAWS, 0)
        noise = [fixed_noise(row["ranking_id"], base.latent_shape) for row in part]
        noise = torch.cat(noise).to(base.device).repeat(2, 1, 1, 1)
        t = grid.to(base.device).repeat(2 * len(part))
        conditions = base.encode_prompts([row["caption"] for row in part])
        conditions = [c.repeat_interleave(N_DRAWS, 0) for c in conditions]
        conditions = [c.repeat(2, *[1] * (c.ndim - 1)) for c in conditions]
        x_t, target = base.add_noise(x_0, noise, t), base.target(x_0, noise, t)
        pred_ref = base.predict(x_t, t, *conditions)
        for arm, embeddings in users.items():
            u = embeddings[i : i + per_batch].to(base.device).repeat_interleave(N_DRAWS, 0)
            with adapter.user(adapter(u, standardized=True)):
                pred = base.predict(x_t, t, *conditions)
            _, log = ppd_loss(pred, pred_ref, target, beta=1.0)
            logits[arm].append(log["logits"].view(-1, N_DRAWS).cpu())
    return {arm: torch.cat(parts) for arm, parts in logits.items()}


def fixed_noise(ranking_id, shape):
    """The noise of a pair's N_DRAWS draws, (N_DRAWS, C, h, w)."""
    return torch.randn(N_DRAWS, *shape, generator=keyed_generator(0, ranking_id % 2**63))


def score_pairs(folder, data, names, rows, device, chunk_size=256):
    """Both images' scores by the named rewards, {name: (n, 2)} on rank 0, nan where an image is
    broken, which is named. Kept in <folder>/scores, a file a chunk: nothing is computed twice, and
    under torchrun every process scores its share."""
    rank, world_size = utils.rank_and_world()
    folder = Path(folder) / "scores"
    folder.mkdir(parents=True, exist_ok=True)
    chunks = [rows[i : i + chunk_size] for i in range(0, len(rows), chunk_size)]
    files = [(folder / f"{number:06d}.npz", chunk) for number, chunk in enumerate(chunks)]
    mine = files[rank::world_size]
    for path, chunk in tqdm(mine, desc="scoring pairs", unit="chunk", disable=None):
        if load_cached_scores(path, names, chunk) is None:
            buffer = io.BytesIO()
            np.savez(buffer, **score_chunk(data, names, chunk, device))
            content = buffer.getvalue()
            utils.write_atomically(path, lambda to, content=content: to.write_bytes(content))
    if world_size > 1:
        dist.barrier()
    if rank != 0:
        return {}
    parts = [load_cached_scores(path, names, chunk) for path, chunk in files]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def load_cached_scores(path, names, rows):
    """{name: (n, 2)} if these rows' scores by all these rewards are in the file, else None."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        current = np.array_equal(file["ranking_ids"], [row["ranking_id"] for row in rows])
        return {name: file[name] for name in names} if current and set(names) <= set(file) else None


def score_chunk(data, names, rows, device):
    """{name: (n, 2)} of rows, nan where an image is broken; and their ranking_ids, (n,)."""
    readable, images = [], []
    for i, row in enumerate(rows):
        try:
            images += read_images(data, row)
            readable.append(i)
        except InputError as problem:
            print(f"skipped: {problem}", file=sys.stderr)
    captions = [rows[i]["caption"] for i in readable for _ in range(2)]
    scores = dict(ranking_ids=np.array([row["ranking_id"] for row in rows]))
    scores |= {name: np.full((len(rows), 2), np.nan, np.float32) for name in names}
    for name in names if readable else ():
        scores[name][readable] = score(name, images, captions, device).reshape(-1, 2)
    return scores


def make_synthetic_users(args, rows, settings):
    """Every kept pair once per reward, relabeled by it (by "own": not at all); u is the reward's
    one-hot vector. A pair with a broken image is named and skipped, one of equal scores is counted
    and dropped."""
    names = [name for name in args.one_hot if name != "own"]
    scores = {}
    if names:
        scores = score_pairs(args.users, args.data, names, rows, utils.pick_device(args.device))
    if utils.rank_and_world()[0] != 0:
        return
    scores["own"] = np.array([[1 - row["preferred"], row["preferred"]] for row in rows], np.float32)

    pairs = []
    for i, row in enumerate(rows):
        for name in args.one_hot:
            first, second = scores[name][i].tolist()
            if first > second or second > first:  # not equal, no nan
                pair = dict(user=name, preferred=int(second > first), groups=[0])
                pairs.append(row | pair | dict(score_0=first, score_1=second))
    if not pairs:
        raise InputError(f"--data {args.data}: no pair is left; all are broken or of equal scores")
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
        lost = f"{n_equal} dropped as equal, {n_broken} with a broken image"
        print(f"{name} ({title}): {len(made)} pairs, {n_train} to train on, {lost}")
