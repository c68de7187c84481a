"""Sec. 5.1's rewards (CLIP, aesthetic, HPS, and PickScore), and its synthetic users: every pair
relabeled by a reward, whose user is a one-hot vector. On the drawn world a reward is a taste word,
measured from the pixels. And the reward that an adapter itself is."""

import hashlib
import io
from functools import partial
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import utils
from bases.clip import REWARDS, load_processor, load_reward, processor_of
from bases.images import ImageStream, chunk_images
from data import image_key, keyed_generator, loading, write_pairs, write_user
from ppd import ppd_loss
from tiny import world
from utils import InputError

N_DRAWS = 8  # of timestep and noise a pair, of implicit_logits


def preprocess(images, names):
    """PIL images -> what these rewards' models take, {(processor's repository, whether padded): (B,
    3, H, W)}, each made once; for taste words the pixels, "drawn": (B, H, W, 3)."""
    pixels = {}
    for key in dict.fromkeys(map(pixels_of, names)):
        if key == "drawn":
            pixels[key] = torch.from_numpy(world.to_array(images))
            continue
        repo, padded = key
        processor = load_processor(repo).image_processor
        side = processor.crop_size["height"]
        ready = [ImageOps.pad(i, (side, side), Image.BICUBIC) for i in images] if padded else images
        pixels[key] = processor(images=ready, return_tensors="pt").pixel_values
    return pixels


def pixels_of(name):
    """Which pixels of preprocess() a reward takes."""
    if name in world.WORDS:
        return "drawn"
    # HPS's own preprocessing pads where CLIP's crops
    return processor_of(name), name.startswith("hps")


@torch.no_grad()
def score_pixels(name, pixels, captions, device):
    """A reward of images that preprocess() has prepared, one a caption, (B,) floats, as in Table 1:
    100 x cosine for CLIP, HPS and PickScore, the predictor's output for aesthetic."""
    pixels = [image[pixels_of(name)] for image in pixels]
    if name in world.WORDS:
        sizes = {image.shape for image in pixels}
        batches = [torch.cat(pixels)] if len(sizes) == 1 else pixels
        return np.concatenate([world.reward(name, batch.numpy()) for batch in batches])
    model, processor, head = load_reward(name, device)
    how = dict(padding=True, truncation=True, return_tensors="pt")
    tokens = processor.tokenizer(list(captions), **how).to(device)
    tokens = dict(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    out = model(**tokens, pixel_values=torch.cat(pixels).to(device))
    if head:
        return head(out.image_embeds).cpu().numpy()
    cosine = (out.image_embeds.float() * out.text_embeds.float()).sum(-1)
    return 100 * cosine.cpu().numpy()


def score(name, images, captions, device="cpu", batch=64):
    """A reward of PIL images for their captions, (B,) floats."""
    scores = []
    for i in range(0, len(images), batch):
        part = slice(i, i + batch)
        pixels = [preprocess([image], [name]) for image in images[part]]
        scores.append(score_pixels(name, pixels, captions[part], device))
    return np.concatenate(scores)


@torch.no_grad()
def implicit_logits(base, adapter, rows, load_images, users, t_min, batch):
    """Eq. 6's logits of B real choices, for several users each: the adapter as a reward model.
    users: {arm: embeddings (B, D)} -> {arm: (B, N_DRAWS)}; load_images: a bases.images.ImagePairs.
    Every arm has the same timesteps, the middles of N_DRAWS equal parts of [t_min, 1], and the same
    noise, which is keyed by the pair's id."""
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
        conditions = [torch.cat([c, c]).repeat_interleave(N_DRAWS, 0) for c in conditions]
        x_t, target = base.add_noise(x_0, noise, t), base.target(x_0, noise, t)
        pred_ref = base.predict(x_t, t, *conditions)
        for arm, embeddings in users.items():
            u = embeddings[i : i + per_batch].to(base.device).repeat_interleave(N_DRAWS, 0)
            with adapter.user(adapter(u)):
                pred = base.predict(x_t, t, *conditions)
            _, log = ppd_loss(pred, pred_ref, target, beta=1.0)
            logits[arm].append(log["logits"].view(-1, N_DRAWS).cpu())
    return {arm: torch.cat(parts) for arm, parts in logits.items()}


def fixed_noise(ranking_id, shape):
    """The noise of a pair's N_DRAWS draws, (N_DRAWS, C, h, w)."""
    return torch.randn(N_DRAWS, *shape, generator=keyed_generator(0, ranking_id % 2**63))


def score_pairs(args, names, rows):
    """Both images' scores by the named rewards, {name: (n, 2)} on rank 0, nan where an image is
    broken, which is named. Kept in <users>/scores, a file a chunk, named after what is in it:
    nothing is computed twice, and under torchrun every process scores its share."""
    rank, world_size = utils.rank_and_world()
    folder = Path(args.users) / "scores"
    folder.mkdir(parents=True, exist_ok=True)
    numbers, sources = {}, []  # of an image with a caption: each is scored once
    for row in rows:
        for side in (0, 1):
            if numbers.setdefault(score_key(row, side), len(sources)) == len(sources):
                sources.append((row, side))
    groups = chunk_images(args.data, sources, 128)
    mine = [
        [chunk for chunk in chunks if cached_scores(folder, names, chunk) is None]
        for chunks in groups[rank::world_size]
    ]
    device = utils.pick_device(args.device)
    for name in names:  # before any work, and before workers start
        if name in REWARDS and any(mine):
            load_reward(name, device)
    how = dict(batch_size=None, num_workers=args.workers, collate_fn=tuple)
    progress = tqdm(total=sum(map(len, sum(mine, []))), desc="scoring images", disable=None)
    stream = ImageStream(mine, args.data, partial(preprocess, names=names))
    with loading(stream, **how) as chunks, progress:
        for chunk, pixels in chunks:
            buffer = io.BytesIO()
            np.savez(buffer, **score_chunk(names, chunk, pixels, device))
            path, content = chunk_file(folder, chunk), buffer.getvalue()
            utils.write_atomically(path, lambda to, content=content: to.write_bytes(content))
            progress.update(len(chunk))
    utils.all_gather_objects(None)  # wait for the others' shares
    if rank != 0:
        return {}
    scores = {name: np.empty(len(sources), np.float32) for name in names}
    for chunk in sum(groups, []):
        places = [numbers[score_key(*source)] for source in chunk]
        for name, values in cached_scores(folder, names, chunk).items():
            scores[name][places] = values
    index = [[numbers[score_key(row, side)] for side in (0, 1)] for row in rows]
    return {name: values[index] for name, values in scores.items()}


def score_key(row, side):
    return image_key(row, side), row["caption"]


def chunk_file(folder, chunk):
    keys = repr([score_key(*source) for source in chunk])
    return folder / f"{hashlib.sha256(keys.encode()).hexdigest()[:20]}.npz"


def cached_scores(folder, names, chunk):
    """{name: (n,)} if a chunk's scores by all these rewards are there, else None."""
    path = chunk_file(folder, chunk)
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names} if set(names) <= set(file) else None
    except (ValueError, OSError, EOFError, BadZipFile):
        raise InputError(f"{path}: not a file of scores; delete it") from None


def score_chunk(names, chunk, pixels, device):
    """{name: (n,)} of a chunk's images as preprocess() has them, nan where one is broken (None)."""
    readable = [i for i, image in enumerate(pixels) if image is not None]
    captions = [chunk[i][0]["caption"] for i in readable]
    scores = {name: np.full(len(chunk), np.nan, np.float32) for name in names}
    for name in names if readable else ():
        scores[name][readable] = score_pixels(name, [pixels[i] for i in readable], captions, device)
    return scores


def make_synthetic_users(args, rows, settings):
    """Every kept pair once per reward, relabeled by it (by "own": not at all); u is the reward's
    one-hot vector. Pairs with a broken image, which is named, or of equal scores are dropped."""
    names = [name for name in args.one_hot if name != "own"]
    scores = score_pairs(args, names, rows) if names else {}
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
        path = Path(args.users) / f"{name}.pt"
        write_user(path, embedding=vector.view(1, 1, -1).clone(), vlm="one-hot")
    write_pairs(args.users, pairs, settings)

    for name in args.one_hot:
        made = [pair for pair in pairs if pair["user"] == name]
        n_train = sum(pair["split"] == "train" for pair in made)
        n_equal = (scores[name][:, 0] == scores[name][:, 1]).sum()
        n_broken = np.isnan(scores[name]).any(1).sum()
        title = "the users" if name == "own" else REWARDS.get(name, ("drawn world",))[0]
        lost = f"{n_equal} dropped as equal, {n_broken} with a broken image"
        print(f"{name} ({title}): {len(made)} pairs, {n_train} to train on, {lost}")
