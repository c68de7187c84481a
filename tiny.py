"""The laptop stand-ins: a small drawn world, its people, and the training of the small checkpoints.

Nothing here is part of the method. It only makes, in the same formats as the real thing, what a laptop cannot download:

    python tiny.py data --out data/tiny     # drawn people's choices, parquet in Pick-a-Pic v2's own columns (~20 s)
    python tiny.py base --out assets/tiny   # small Stage C prior + text encoder + image codec (see README for time)

The world. A picture is one coloured shape on a plain ground, 32 x 32, e.g. "a red star". The caption names colour and
shape. Five things are not in the caption and are left to taste: how light and how warm the ground is, how large the
subject is, and where it sits. All five are measured from the pixels of *any* picture, drawn or generated, so they
serve as reward functions and as the true taste of the drawn people.
"""
import argparse
import io
import itertools
import json
import math
import os
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE, SUPER = 32, 8  # picture side in pixels; supersampling of the drawing
COLOURS = {"red": (205, 25, 30), "orange": (255, 125, 0), "yellow": (245, 225, 20), "green": (25, 150, 40),
           "cyan": (20, 205, 220), "blue": (25, 50, 215), "purple": (120, 25, 180), "pink": (250, 80, 175)}
SHAPES = ("circle", "square", "triangle", "star", "cross")
CAPTIONS = [f"{'an' if c[0] in 'aeiou' else 'a'} {c} {s}" for c in COLOURS for s in SHAPES]

# The five axes of taste: word for more, word for less, then mean and standard deviation over drawn pictures (checked
# by a test). Units: light is the ground's mean RGB in [0, 1]; warm is (R - B) / 2 of the ground; large is the
# subject's share of the picture; right and high are the subject's centroid, -1 to 1 across the picture.
AXES = {"light": ("light", "dark", 0.500, 0.144), "warm": ("warm", "cool", 0.000, 0.069),
        "large": ("large", "small", 0.271, 0.146), "right": ("right", "left", 0.000, 0.232),
        "high": ("high", "low", -0.049, 0.247)}
WORDS = {word: (i, sign) for i, (more, less, _, _) in enumerate(AXES.values()) for word, sign in ((more, 1), (less, -1))}
WORD = [list(WORDS)[2 * i:2 * i + 2] for i in range(len(AXES))]  # of an axis: [more, less]
MEAN, STD = (np.array([a[k] for a in AXES.values()], np.float32) for k in (2, 3))

COMMON = 0.37  # everyone's mild liking for light, in units of a taste's length: the lighter picture wins about 60:40
CHOICE = 2.2   # Bradley-Terry sharpness: labels agree with the true taste less than 90% of the time
TIE = 0.12     # closer than this in utility and the person calls it a tie


# ---------------------------------------------------------------------------------------------------------- pictures
def outline(shape):
    """Corner points of a shape in the unit square, x right and y down, touching all four sides where it can."""
    if shape == "square":
        return [(0.05, 0.05), (0.95, 0.05), (0.95, 0.95), (0.05, 0.95)]
    if shape == "triangle":
        return [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)]
    if shape == "cross":
        a, b = 0.32, 0.68
        return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
    angles = [math.pi * k / 5 for k in range(10)]  # star, point up
    return [(0.5 + r * math.sin(a), 0.53 - r * math.cos(a))
            for k, a in enumerate(angles) for r in [0.54 if k % 2 == 0 else 0.24]]


def draw(colour, shape, light=0.5, warm=0.0, size=0.5, x=0.5, y=0.5):
    """A (SIDE, SIDE) RGB picture. light in [0, 1]; warm in about [-0.12, 0.12]; size is the subject's width as a share
    of the picture's; x and y place it between the edges (0 = left/top, 1 = right/bottom)."""
    ground = tuple(round(255 * min(max(light + w, 0), 1)) for w in (warm, 0, -warm))
    n, d = SIDE * SUPER, size * SIDE * SUPER
    left, top = x * (n - d), y * (n - d)
    image = Image.new("RGB", (n, n), ground)
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((left, top, left + d, top + d), fill=COLOURS[colour])
    else:
        pen.polygon([(left + d * px, top + d * py) for px, py in outline(shape)], fill=COLOURS[colour])
    return image.reduce(SUPER)


def draw_random(rng, caption):
    """A picture of a caption, everything that is left to taste drawn at random."""
    colour, shape = caption.split()[1:3]
    return draw(colour, shape, rng.uniform(0.25, 0.75), rng.uniform(-0.12, 0.12), rng.uniform(0.36, 0.9),
                rng.uniform(), rng.uniform())


def pixels(images):
    """PIL images -> float32 (B, H, W, 3) in [0, 1]; arrays of that form pass through. One size for the whole list."""
    if isinstance(images, np.ndarray):
        return images
    return np.stack([np.asarray(im.convert("RGB"), np.float32) / 255 for im in images])


def subject(images):
    """Where the subject is: (B, H, W, 3) -> ground colour (B, 3) = the border's median, mask (B, H, W) = far from it."""
    ring = max(1, images.shape[1] // 16)
    inner = np.zeros(images.shape[1:3], bool)
    inner[ring:-ring, ring:-ring] = True
    ground = np.median(images[:, ~inner], axis=1)
    return ground, np.linalg.norm(images - ground[:, None, None], axis=-1) > 0.22


def measure(images):
    """The five axes read from pixels: list of PIL images or (B, H, W, 3) in [0, 1] -> (B, 5), in AXES' units."""
    images = pixels(images)
    ground, mask = subject(images)
    h, w = mask.shape[1:]
    area = mask.sum((1, 2))
    across, down = (np.arange(w) + 0.5) / w * 2 - 1, (np.arange(h) + 0.5) / h * 2 - 1
    right, low = ((mask * axis).sum((1, 2)) / np.maximum(area, 1) for axis in (across, down[:, None]))
    return np.stack([ground.mean(1), (ground[:, 0] - ground[:, 2]) / 2, area / (h * w), right, -low], 1).astype(np.float32)


def reward(name, images):
    """Pixel reward in standard deviations of the drawn pictures, (B,); name is a taste word: light, dark, warm ..."""
    axis, sign = WORDS[name]
    return sign * ((measure(images) - MEAN) / STD)[:, axis]


def recognise(images):
    """Colour and shape of the subject by closed form: [(colour, shape), ...], (None, None) where there is no subject.
    Colour is the nearest of COLOURS to the mask's median; shape the best overlap of the mask's box with a template."""
    images = pixels(images)
    _, masks = subject(images)
    templates = {s: fit(subject(pixels([draw("blue", s, 0.9, 0, 0.75)]))[1][0]) for s in SHAPES}
    names, palette, found = list(COLOURS), np.array(list(COLOURS.values())) / 255, []
    for image, mask in zip(images, masks):
        if mask.mean() < 0.01:
            found.append((None, None))
            continue
        colour = names[np.linalg.norm(palette - np.median(image[mask], axis=0), axis=1).argmin()]
        box = fit(mask)
        found.append((colour, min(SHAPES, key=lambda s: np.abs(box - templates[s]).mean())))
    return found


def fit(mask):
    """A mask's bounding box stretched to 16 x 16, float."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0]:rows[-1] + 1, cols[0]:cols[-1] + 1]
    return np.asarray(Image.fromarray(box.astype(np.uint8) * 255).resize((16, 16), Image.BOX), np.float32) / 255


def fidelity(images, captions):
    """1 where colour and shape are the caption's, else 0: list of 0/1, one a picture."""
    return [int(found == tuple(c.split(",")[0].split()[1:3])) for found, c in zip(recognise(images), captions)]


# ------------------------------------------------------------------------------------------------------------ people
def people(n, seed):
    """n sparse tastes: (n, 5) weights on the standardised axes, one or two of them signed and of total length 1, plus
    everyone's COMMON liking for light. Returns tastes and each person's words, e.g. ["dark", "large"]."""
    rng = np.random.default_rng(seed)
    words, tastes = [], np.zeros((n, len(AXES)), np.float32)
    for i in range(n):
        axes = rng.choice(len(AXES), size=rng.integers(1, 3), replace=False)
        signs = rng.choice((-1, 1), size=len(axes))
        tastes[i, axes] = signs / math.sqrt(len(axes))
        words.append([WORD[a][int(s < 0)] for a, s in zip(axes, signs)])
    tastes[:, 0] += COMMON
    return tastes, words


def utility(taste, images):
    """True liking of pictures: taste (5,) or (B, 5) -> (B,)."""
    return (((measure(images) - MEAN) / STD) * taste).sum(-1)


def all_tastes():
    """Every taste that people() draws: weights (50, 5), which of WORDS it is made of (50, 10), how likely it is (50,)."""
    weights, named, odds = [], [], []
    for axes in [c for k in (1, 2) for c in itertools.combinations(range(len(AXES)), k)]:
        for signs in itertools.product((1, -1), repeat=len(axes)):
            signed = np.zeros(len(AXES))
            signed[list(axes)] = signs
            weights.append(signed / math.sqrt(len(axes)))
            named.append([signed[axis] == sign for axis, sign in WORDS.values()])
            odds.append(0.5 / (10 if len(axes) == 1 else 40))
    weights = np.array(weights)
    weights[:, 0] += COMMON
    return weights, np.array(named), np.array(odds)


def believe(z):
    """What can be known of a person from their choices, by Bayes' rule: the axes of the pictures, preferred first,
    (n, pairs, 2, 5) -> probabilities of all_tastes() (n, 50)."""
    weights, _, odds = all_tastes()
    gap = CHOICE * (z[:, :, 0] - z[:, :, 1]) @ weights.T
    belief = odds * np.exp(-np.logaddexp(0, -gap).sum(1))
    return belief / belief.sum(1, keepdims=True)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_data(out, users=1000, pairs_per_user=20, seed=1):
    """Preference pairs as parquet in Pick-a-Pic v2's own 19 columns, plus people.json with the true tastes (which no
    training reads). As in the real data the winner often stays on screen for the next pair, and some pairs are ties."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tqdm import tqdm

    if Path(out).exists():
        raise SystemExit(f"tiny.py: error: --out {out} is there already; delete it or choose another folder")
    rng = np.random.default_rng([seed, 1])  # a stream of its own: the base's pictures come from default_rng(seed)
    tastes, words = people(users, seed)
    rows, agree, lighter = [], [], []
    for user in tqdm(range(users), desc="drawing people's choices", disable=None):
        pics, keep = [], None
        for k in range(pairs_per_user):  # draw first, measure all at once: measuring is the slow part
            if keep is None or rng.uniform() > 0.3:
                caption, keep = CAPTIONS[rng.integers(len(CAPTIONS))], None
            pics.append((caption, keep is not None, draw_random(rng, caption), draw_random(rng, caption)))
            keep = True
        liking = utility(tastes[user], [im for p in pics for im in p[2:]]).reshape(-1, 2)
        light = measure([im for p in pics for im in p[2:]])[:, 0].reshape(-1, 2)
        winner = None
        for k, (caption, stays, a, b) in enumerate(pics):
            uids = [f"u{user:05d}-{k:03d}-{side}" for side in "ab"]
            images, like, lights = [png(a), png(b)], liking[k].copy(), light[k].copy()
            if stays and winner is not None:
                uids[0], images[0], like[0], lights[0] = winner
            order = [0, 1] if rng.uniform() < 0.5 else [1, 0]
            uids, images, like, lights = ([v[i] for i in order] for v in (uids, images, like, lights))
            gap = like[0] - like[1]
            first = rng.uniform() < 1 / (1 + math.exp(-CHOICE * gap))
            label = 0.5 if abs(gap) < TIE else float(first)
            best = 0 if first else 1
            winner = (uids[best], images[best], like[best], lights[best])
            if label != 0.5:
                agree.append(first == (gap > 0))
                lighter.append(first == (lights[0] > lights[1]))
            rows.append(dict(are_different=True, best_image_uid=uids[best] if label != 0.5 else "", caption=caption,
                             created_at=1_700_000_000_000_000_000 + len(rows), has_label=True, image_0_uid=uids[0],
                             image_0_url="", image_1_uid=uids[1], image_1_url="", jpg_0=images[0], jpg_1=images[1],
                             label_0=label, label_1=1 - label, model_0="drawn", model_1="drawn", ranking_id=len(rows),
                             user_id=user, num_example_per_prompt=1, __index_level_0__=len(rows)))
    kinds = dict(are_different=pa.bool_(), has_label=pa.bool_(), created_at=pa.timestamp("ns"), jpg_0=pa.binary(),
                 jpg_1=pa.binary(), label_0=pa.float64(), label_1=pa.float64(), ranking_id=pa.int64(),
                 user_id=pa.int64(), num_example_per_prompt=pa.int64(), __index_level_0__=pa.int64())
    table = pa.table({k: pa.array([r[k] for r in rows], kinds.get(k, pa.string())) for k in rows[0]})
    out = Path(out)
    temporary = out.with_name(out.name + ".partial")
    temporary.mkdir(parents=True, exist_ok=True)
    half = len(rows) // 2  # two files, as any real data set has several
    for i, part in enumerate((table.slice(0, half), table.slice(half))):
        pq.write_table(part, temporary / f"train-{i:05d}-of-00002.parquet", row_group_size=2500)
    tied = 1 - len(agree) / len(rows)
    stats = dict(users=users, pairs=len(rows), seed=seed, ties=round(tied, 4), agreement=round(float(np.mean(agree)), 4),
                 lighter_wins=round(float(np.mean(lighter)), 4))
    (temporary / "people.json").write_text(json.dumps(dict(stats=stats, axes=list(AXES), tastes=tastes.tolist(), words=words)))
    os.rename(temporary, out)
    print(f"{out}: {len(rows)} pairs of {users} people; ties {tied:.1%}; labels agree with the true taste "
          f"{stats['agreement']:.1%}; the lighter picture wins {stats['lighter_wins']:.1%}")


# ------------------------------------------------------------------------------------------- the small base checkpoint
def tokenizer(max_length=16):
    """A real CLIPTokenizer with one token for each word of the world; any other text falls back to single bytes."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens, merges = alphabet + [a + "</w>" for a in alphabet], []
    for word in ["an", *COLOURS, *SHAPES, *WORDS]:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:  # byte-pair encoding: the earliest known merge first, else learn the leftmost pair
            pairs = list(zip(pieces, pieces[1:]))
            pair = min((p for p in pairs if p in merges), key=merges.index, default=pairs[0])
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
            i = pairs.index(pair)
            pieces[i:i + 2] = ["".join(pair)]
    vocab = {t: i for i, t in enumerate(dict.fromkeys(tokens + ["<|startoftext|>", "<|endoftext|>"]))}
    tok = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)
    for word in [*COLOURS, *SHAPES, *WORDS]:
        assert len(tok(word, add_special_tokens=False).input_ids) == 1, f"{word!r} is not one token"
    return tok


def taste_words(z, rng, most=2):
    """Up to two words for what stands out in a picture: z (5,) standardised axes -> "dark, large" or ""."""
    axes = [a for a in rng.permutation(len(AXES)) if abs(z[a]) > 0.6][:rng.integers(1, most + 1)]
    return ", ".join(WORD[a][int(z[a] < 0)] for a in axes)


def fit_codec(images, patch=4, channels=16):
    """PCA of 4 x 4 patches (99% of the variance in 16 channels), partly whitened: fully whitened, the faint
    directions get heavy tails; not at all, the flat ground outweighs everything else. images: (B, 3, H, W)."""
    import einops
    import torch
    from ppd import PatchCodec

    codec = PatchCodec(patch, channels)
    patches = einops.rearrange(images, "b c (h p) (w q) -> (b h w) (c p q)", p=patch, q=patch)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T.double()))
    values, vectors = values.flip(0)[:channels], vectors.flip(1)[:, :channels]
    scale = values ** 0.35  # std ** 0.7
    scale *= (values / scale**2).mean().sqrt()  # mean latent variance 1
    codec.mean.copy_(patches.mean(0))
    codec.encode_matrix.copy_(vectors / scale)
    codec.decode_matrix.copy_((vectors * scale).T)
    return codec


def train_loop(out, steps, lr, models, optimizer, lesson, save_every, after=lambda step: None, carry={}):
    """The loop of both small models. lesson(step) -> loss, {name: number to log}; after(step) follows the optimizer's step;
    carry: tensors that a resume needs besides weights and optimizer, by name. Resumable: run the same command again."""
    import torch
    from tqdm import tqdm
    from ppd import BadInput, load_state, save_state

    start, began, log = 0, time.time(), {}
    Path(out).mkdir(parents=True, exist_ok=True)
    config = dict(steps=steps, lr=lr)
    if saved := load_state(out, config):
        try:
            models.load_state_dict(saved["models"]), optimizer.load_state_dict(saved["optimizer"])
            for name, tensor in carry.items():
                tensor.copy_(saved["carry"][name])
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise BadInput(f"--out {out} holds a run of other sizes: {' '.join(str(error).split())[:150]}") from None
        start = saved["step"]
    print(f"{sum(p.numel() for p in models.parameters()) / 1e6:.2f}M parameters, from step {start}")
    for step in tqdm(range(start, steps), initial=start, total=steps, desc=Path(out).name, disable=None):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        loss, numbers = lesson(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after(step)
        for name, number in numbers.items():
            log.setdefault(name, []).append(number.detach())
        if (step + 1) % 250 == 0:
            print(f"step {step + 1} " + ", ".join(f"{k} {torch.stack(v[-50:]).mean():.4f}" for k, v in log.items()) + f" {time.time() - began:.0f} s", flush=True)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save_state(out, config=config, models=models.state_dict(), optimizer=optimizer.state_dict(), carry=carry, step=step + 1)


def train_base(out, steps, batch, lr, seed, pictures, width=128, layers=(2, 2), init=None, lean=2.0, save_every=1000):
    """Train the small Stage C, its text encoder and the codec; write them in the hub's folder layout. Noise
    prediction on the release's schedule (Eq. 1), exponential weight average."""
    import torch
    from diffusers import DDPMWuerstchenScheduler, StableCascadeUNet
    from safetensors.torch import save_file
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from tqdm import tqdm
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection
    from ppd import PatchCodec

    if (Path(out) / "prior").exists() and not list(Path(out).glob("state*.pt")):
        raise SystemExit(f"tiny.py: error: --out {out} holds a finished base; choose another folder")
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rng = np.random.default_rng(seed)
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(pictures)]
    images = pixels([draw_random(rng, c) for c in tqdm(captions, desc="drawing", disable=None)])
    z = (measure(images) - MEAN) / STD
    worded = [", ".join(filter(None, (c, taste_words(z[i], rng)))) for i, c in enumerate(captions)]
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    codec = PatchCodec.load(Path(init) / "codec" / "codec.safetensors") if init else fit_codec(images[:5000])
    latents = codec.encode(images)
    print(f"{pictures} pictures, latents {tuple(latents.shape[1:])}, variance {latents.var():.3f}, "
          f"codec error {(codec.decode(latents[:2000]) - images[:2000]).abs().mean():.4f}")

    tok = tokenizer()
    text = CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(tok), hidden_size=64, projection_dim=64, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=tok.model_max_length, hidden_act="gelu",
        bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)).to(device)
    prior = StableCascadeUNet(
        in_channels=16, out_channels=16, timestep_ratio_embedding_dim=64, patch_size=1, conditioning_dim=width,
        block_out_channels=(width, width), num_attention_heads=(width // 64, width // 64),
        down_num_layers_per_block=tuple(layers), up_num_layers_per_block=tuple(layers)[::-1], clip_text_in_channels=64,
        clip_text_pooled_in_channels=64, clip_image_in_channels=64, clip_seq=4, dropout=(0.1, 0.1),
        switch_level=(False,)).to(device)
    torch.nn.init.zeros_(prior.clf[1].weight)  # the class never calls its own initialisation; start at "no noise"
    prior.eval(), text.eval()  # dropout stays in the config, as in the release, but a model this small only loses by it
    scheduler = DDPMWuerstchenScheduler()
    ids = {kind: tok(texts, padding="max_length", max_length=tok.model_max_length, truncation=True, return_tensors="pt")
           for kind, texts in (("plain", captions), ("worded", worded), ("empty", [""]))}
    ids = {k: torch.stack([v.input_ids, v.attention_mask]) for k, v in ids.items()}
    if init:  # go on from a finished base: its codec too, the latents are its own
        for model, name in ((prior, "prior"), (text, "text_encoder")):
            model.load_state_dict(type(model).from_pretrained(init, subfolder=name, variant="bf16", torch_dtype=torch.float32).state_dict())

    models = torch.nn.ModuleDict(dict(prior=prior, text=text))
    ema = {k: v.detach().clone() for k, v in models.state_dict().items()}
    optimizer = torch.optim.AdamW(models.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    fast = torch.compile(prior)
    # Taste words act at the very first, noisiest steps, whose errors are a thousandth of the last ones': with t uniform
    # and errors unweighted the words are never learned. So t leans to 1 (with 2, half are above 0.75), and every
    # timestep's error counts relative to what is usual there (Stage C's own "adaptive" weight).
    typical = torch.ones(50, device=device)

    def lesson(step):
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        index = torch.randint(pictures, (batch,), generator=g)
        which = torch.rand(batch, generator=g)
        tokens = torch.where((which < 1 / 3)[:, None], ids["worded"][:, index], ids["plain"][:, index])
        tokens = torch.where((which > 0.9)[:, None], ids["empty"], tokens).to(device)
        x0, noise = latents[index].to(device), torch.randn(latents[index].shape, generator=g).to(device)
        t = (1 - torch.rand(batch, generator=g) ** lean).clamp(0.001, 1).to(device)
        # sdpa's fused backward is the slowest part of a step on a CPU: plain matrix products take half the time
        with torch.autocast(device, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            encoded = text(tokens[0], attention_mask=tokens[1], output_hidden_states=True)
            noise_pred = fast(scheduler.add_noise(x0, noise, t), t, clip_text_pooled=encoded.text_embeds[:, None],
                              clip_text=encoded.hidden_states[-1],
                              clip_img=torch.zeros(batch, 1, 64, device=device)).sample
        error, bucket = (noise_pred.float() - noise).square().mean((1, 2, 3)), (t * 49.999).long()
        typical.index_copy_(0, bucket, torch.lerp(typical[bucket], error.detach(), 0.05))
        return (error / typical[bucket]).mean(), dict(loss=error.mean())

    def after(step):
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_([ema[k] for k, _ in models.named_parameters()], list(models.parameters()), 1 - decay)

    train_loop(out, steps, lr, models, optimizer, lesson, save_every, after, dict(typical=typical, **ema))
    models.load_state_dict(ema)
    for model, name in ((prior, "prior"), (text, "text_encoder")):  # bf16 on disk, as the release's variant
        model.to(torch.bfloat16).save_pretrained(Path(out) / name, variant="bf16")
    tok.save_pretrained(Path(out) / "tokenizer")
    scheduler.save_pretrained(Path(out) / "scheduler")
    (Path(out) / "codec").mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in codec.state_dict().items()}, Path(out) / "codec" / "codec.safetensors",
              {"patch": str(codec.patch), "side": str(codec.side)})
    for state in Path(out).glob("state*.pt"):
        state.unlink()


# -------------------------------------------------------------------------------------------------------- the small VLM
def small_vlm(side=SIDE, patch=16, width=192, layers=4):
    """A LlavaOnevisionForConditionalGeneration with random weights and its processor. The tokenizer has one token for
    every word of the world and for every fixed piece of embed.py's prompts; any other text falls back to bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, LlavaOnevisionImageProcessor, LlavaOnevisionProcessor,
                              LlavaOnevisionVideoProcessor, PreTrainedTokenizerFast, Qwen2Config, SiglipVisionConfig)
    import embed

    tok = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"])
    pieces = [embed.INTRO, *embed.ASK.values(), embed.PREFERRED, embed.DISPREFERRED, embed.FIRST, embed.SECOND, "CHOICE: 1", "CHOICE: 2",
              *(embed.PAIR.format(i) for i in range(1, 9)), *(f"Pair {i}: " for i in range(1, 9)), "User profile: ", ", ", ".\n", "a ", "an ", " ",
              "system\nYou are a helpful assistant.", "user\n", "assistant\n", *COLOURS, *SHAPES, *WORDS]
    tok.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left",
                                  additional_special_tokens=["<|im_start|>", "<image>", "<video>"])
    points = [[side, side], [side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    images = LlavaOnevisionImageProcessor(size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3, image_grid_pinpoints=points)
    processor = LlavaOnevisionProcessor(image_processor=images, tokenizer=tok, video_processor=LlavaOnevisionVideoProcessor(),
                                        num_image_tokens=(side // patch) ** 2, vision_feature_select_strategy="full")
    vision = SiglipVisionConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, image_size=side,
                                patch_size=patch, vision_use_head=False)
    text = Qwen2Config(vocab_size=len(tok), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=6,
                       num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=None, eos_token_id=tok.eos_token_id,
                       pad_token_id=tok.pad_token_id, tie_word_embeddings=True)
    config = LlavaOnevisionConfig(vision_config=vision, text_config=text, tie_word_embeddings=True, image_token_index=tok.convert_tokens_to_ids("<image>"),
                                  video_token_index=tok.convert_tokens_to_ids("<video>"), image_grid_pinpoints=points,
                                  vision_feature_layer=-1, vision_feature_select_strategy="full")
    return LlavaOnevisionForConditionalGeneration(config), processor


def choices(rng, z, n, pairs):
    """n new people, each with `pairs` choices among pictures of axes z (captions, pictures, 5) -> their words, captions
    (n, pairs) and pictures (n, pairs, 2) as indices, preferred first."""
    tastes, words = people(n, int(rng.integers(2**31)))
    caption, picture = rng.integers(z.shape[0], size=(n, pairs)), rng.integers(z.shape[1], size=(n, pairs, 2))
    liking = (z[caption[..., None], picture] * tastes[:, None, None]).sum(-1)
    other = rng.uniform(size=(n, pairs, 1)) > 1 / (1 + np.exp(-CHOICE * (liking[..., :1] - liking[..., 1:])))
    return words, caption, np.where(other, picture[..., ::-1], picture)


def lesson(rng, z, n, pairs, ask):
    """n prompts with answers, the pictures (n, pictures) in the order of the prompts, and for tokens that nobody can know
    the odds of a perfect reader, {offset from the answer's end: {token: probability}} for each answer.

    "look" names all five axes of one picture. The others are embed.py's prompts: "taste" names the three likeliest words,
    "profile" does so after the two axes on which each pair differs most, "judge" picks one of two further pictures.
    """
    import embed
    if ask == "look":
        shown = rng.integers(z.shape[0] * z.shape[1], size=(n, 1))
        answers = [", ".join(WORD[axis][int(v < 0)] for axis, v in enumerate(row)) + "<|im_end|>" for row in z.reshape(-1, len(AXES))[shown[:, 0]]]
        return [embed.SYSTEM + "<image>" + embed.ANSWER] * n, answers, shown, [{}] * n
    judge = ask == "judge"
    _, caption, picture = choices(rng, z, n, pairs + judge)
    if judge:  # either order
        picture[:, -1] = rng.permuted(picture[:, -1], axis=1)
    axes, (weights, named, _) = z[caption[..., None], picture], all_tastes()
    gap, belief = axes[:, :, 0] - axes[:, :, 1], believe(axes[:, :pairs])
    pick = (belief / (1 + np.exp(-CHOICE * gap[:, -1] @ weights.T))).sum(1)
    texts, answers, odds = [], [], []
    for i in range(n):
        names = [CAPTIONS[c] for c in caption[i]]
        texts.append(embed.prompt(names[:pairs], ask, names[-1] if judge else None))
        if judge:
            answer = f"CHOICE: {1 if pick[i] > 0.5 else 2}"
            odds.append({-2: {"CHOICE: 1": pick[i], "CHOICE: 2": 1 - pick[i]}})
        else:
            answer, likely, words = "", belief[i] @ named, list(WORDS)
            best = np.argsort(-likely)[:3]
            if ask == "profile":
                for k in range(pairs):
                    widest = np.argsort(-np.abs(gap[i, k]))[:2]
                    answer += f"Pair {k + 1}: " + ", ".join(WORD[a][int(gap[i, k, a] < 0)] for a in widest) + ".\n"
                answer += "User profile: "
            answer += ", ".join(words[w] for w in best)
            odds.append({})
            for k, offset in enumerate((-6, -4, -2)):  # each word given those before it
                odds[-1][offset] = dict(zip(words, likely / likely.sum()))
                likely = np.where(np.arange(len(words)) == best[k], 0, likely)
        answers.append(answer + "<|im_end|>")
    return texts, answers, (caption[..., None] * z.shape[1] + picture).reshape(n, -1), odds


def train_vlm(out, steps, batch, lr, seed, pictures, save_every=500):
    """Teach the small VLM to read people. 500 steps it only looks at single pictures, and 1,000 it reads the taste from
    four pairs: without these it learns nothing in hours. Then everything: taste in words, with and without describing every
    pair first, from 1 to 8 pairs, and which of two further pictures the person would choose. Answers are a perfect
    reader's, with its odds."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from tqdm import tqdm

    if (Path(out) / "config.json").exists() and not list(Path(out).glob("state*.pt")):
        raise SystemExit(f"tiny.py: error: --out {out} holds a finished VLM; choose another folder")
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, processor = small_vlm()
    model.to(device)
    tok, image_id = processor.tokenizer, model.config.image_token_id
    rng, each = np.random.default_rng([seed, 3]), pictures // len(CAPTIONS)
    drawn = pixels([draw_random(rng, c) for c in tqdm([c for c in CAPTIONS for _ in range(each)], desc="drawing", disable=None)])
    z = ((measure(drawn) - MEAN) / STD).reshape(len(CAPTIONS), each, -1)
    drawn = torch.from_numpy(drawn).permute(0, 3, 1, 2).mul(2).sub(1).to(torch.bfloat16).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)

    def teach(step):
        rng = np.random.default_rng([seed, 4, step])
        ask = "look" if step < 500 else "taste" if step < 1500 else str(rng.choice(["taste", "profile", "judge"], p=[0.4, 0.4, 0.2]))
        pairs = 4 if step < 1500 or rng.uniform() < 0.6 else int(rng.integers(1, 9))
        texts, answers, shown, odds = lesson(rng, z, batch * 4 // (1 if ask == "look" else max(pairs, 2)), pairs, ask)
        # 4 patches and a line break a picture: what the processor and the model make of many images, without their loops
        asked, answered = tok([t.replace("<image>", "<image>" * 5) for t in texts]).input_ids, tok(answers).input_ids
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(a + b) for a, b in zip(asked, answered)], batch_first=True).to(device)
        target = torch.zeros(ids.shape, dtype=torch.bool, device=device)
        for i, (a, b) in enumerate(zip(asked, answered)):
            target[i, len(a):len(a) + len(b)] = True
        goal = F.one_hot(ids[target], len(tok)).float()
        for end, known in zip(np.cumsum([len(b) for b in answered]), odds):
            for offset, some in known.items():
                goal[end + offset] = 0
                goal[end + offset, tok.convert_tokens_to_ids(list(some))] = torch.tensor(list(some.values()), dtype=torch.float32, device=device)
        with torch.autocast(device, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            seen = model.model.vision_tower(drawn[torch.from_numpy(shown.flatten())], output_hidden_states=True)
            seen = model.model.multi_modal_projector(seen.hidden_states[-1])  # what the model takes: before the tower's last norm
            seen = torch.cat([seen, model.model.image_newline.to(seen.dtype).expand(len(seen), 1, -1)], 1)
            words = model.model.language_model.embed_tokens(ids)
            words = words.masked_scatter((ids == image_id)[..., None], seen.to(words.dtype))
            hidden = model.model.language_model(inputs_embeds=words).last_hidden_state
            logits = model.lm_head(hidden[:, :-1][target[:, 1:]])
        loss = F.kl_div(logits.float().log_softmax(-1), goal, reduction="sum") / len(goal)  # 0 is a perfect reader
        return loss, {ask: loss}

    train_loop(out, steps, lr, model, optimizer, teach, save_every)
    model.to(torch.bfloat16).save_pretrained(out)
    processor.save_pretrained(out)
    for state in Path(out).glob("state*.pt"):
        state.unlink()


def main(argv=None):
    parser = argparse.ArgumentParser(prog="tiny.py", usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="draw people's choices")
    data.add_argument("--out", default="data/tiny", help="folder to write (default: %(default)s)")
    data.add_argument("--users", type=int, default=1000)
    data.add_argument("--pairs", type=int, default=20, dest="pairs_per_user", metavar="PAIRS", help="pairs a person (default: %(default)s)")
    data.add_argument("--seed", type=int, default=1)
    base, vlm = commands.add_parser("base", help="train the small base"), commands.add_parser("vlm", help="train the small VLM")
    for p, out, steps, pictures in ((base, "assets/tiny", 12000, 40000), (vlm, "assets/tiny/vlm", 4000, 20000)):
        p.add_argument("--out", default=out)
        p.add_argument("--steps", type=int, default=steps)
        p.add_argument("--batch", type=int, default=64, help="pictures or people a step (default: %(default)s)")
        p.add_argument("--lr", type=float, default=1e-3)
        p.add_argument("--seed", type=int, default=0)
        p.add_argument("--pictures", type=int, default=pictures, help="drawn to learn from (default: %(default)s)")
    base.add_argument("--width", type=int, default=128)
    base.add_argument("--init", help="folder of a base to start from (default: random weights)")
    base.add_argument("--lean", type=float, default=2.0, help="timesteps are 1 - u^lean, u uniform (default: %(default)s)")
    base.add_argument("--layers", type=int, nargs=2, default=[2, 2], help="blocks a level, twice: down and up")
    for p in (data, base, vlm):
        p.usage, p.prog = argparse.SUPPRESS, "tiny.py"
    how = vars(parser.parse_args(argv))
    for key, value in how.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and not (0 < number < math.inf or key == "seed" and number == 0):
                parser.error(f"--{key.removesuffix('_per_user')} {number}: expected " + ("0 or more" if key == "seed" else "a number above 0"))
    if how["command"] == "base" and how["width"] % 64:
        parser.error(f"--width {how['width']}: expected a multiple of 64, a head's width")
    from ppd import run_script
    command = dict(data=write_data, base=train_base, vlm=train_vlm)[how.pop("command")]
    run_script("tiny.py", lambda how: command(**how), how)


if __name__ == "__main__":
    main()
