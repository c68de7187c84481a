"""The drawn world: images, pixel rewards, and users whose choices are written as preference data.

Nothing here is part of the method. It makes, in the real thing's own format, what a laptop cannot
download. From the repository's root:

    python -m tiny.world --out data/tiny     # drawn users' choices in Pick-a-Pic v2's columns, 20 s

An image is one colored shape on a plain ground, 32 x 32, e.g. "a red star". The caption names color
and shape. Five things are not in the caption and are left to taste: how light and how warm the
ground is, how large the subject is, and where it sits. All five are measured from the pixels of
*any* image, drawn or generated, so they serve as rewards and as the true taste of drawn users.
"""

import argparse
import io
import itertools
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw
from tqdm import tqdm

SIDE = 32  # of an image, in pixels
SUPERSAMPLE = 8  # it is drawn this many times as large
COLORS = {
    "red": (205, 25, 30),
    "orange": (255, 125, 0),
    "yellow": (245, 225, 20),
    "green": (25, 150, 40),
    "cyan": (20, 205, 220),
    "blue": (25, 50, 215),
    "purple": (120, 25, 180),
    "pink": (250, 80, 175),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
CAPTIONS = [f"{'an' if c[0] in 'aeiou' else 'a'} {c} {s}" for c in COLORS for s in SHAPES]

# The five axes of taste: word for more, word for less, then mean and standard deviation over drawn
# images (checked by a test). Units: light is the ground's mean RGB in [0, 1]; warm is (R - B) / 2
# of the ground; large is the subject's share of the image; right and high are the subject's
# centroid, -1 to 1 across the image.
AXES = {
    "light": ("light", "dark", 0.500, 0.144),
    "warm": ("warm", "cool", 0.000, 0.069),
    "large": ("large", "small", 0.271, 0.146),
    "right": ("right", "left", 0.000, 0.232),
    "high": ("high", "low", -0.049, 0.247),
}
AXIS_WORDS = [[more, less] for more, less, _, _ in AXES.values()]
WORDS = {}  # taste word -> (index of its axis, 1 or -1)
for _axis, (_more, _less) in enumerate(AXIS_WORDS):
    WORDS |= {_more: (_axis, 1), _less: (_axis, -1)}
MEAN = np.array([mean for _, _, mean, _ in AXES.values()], np.float32)
STD = np.array([std for _, _, _, std in AXES.values()], np.float32)

SHARED_LIGHT_BIAS = 0.37  # everyone's liking for light; a taste has length 1. Lighter wins 60:40
BRADLEY_TERRY_SCALE = 2.2  # labels agree with the true taste less than 90% of the time
TIE_MARGIN = 0.12  # closer than this in utility and the user calls it a tie

# Pick-a-Pic v2's own 19 columns; those not named here are strings
ARROW_TYPES = {
    "are_different": pa.bool_(),
    "created_at": pa.timestamp("ns"),
    "has_label": pa.bool_(),
    "jpg_0": pa.binary(),
    "jpg_1": pa.binary(),
    "label_0": pa.float64(),
    "label_1": pa.float64(),
    "ranking_id": pa.int64(),
    "user_id": pa.int64(),
    "num_example_per_prompt": pa.int64(),
    "__index_level_0__": pa.int64(),
}


# ------------------------------------------------------------------------------ images
def outline(shape):
    """Corners of a shape in the unit square, x right and y down, touching its sides where it
    can."""
    if shape == "square":
        return [(0.05, 0.05), (0.95, 0.05), (0.95, 0.95), (0.05, 0.95)]
    if shape == "triangle":
        return [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)]
    if shape == "cross":
        a, b = 0.32, 0.68
        upper = [(0, b), (0, a), (a, a), (a, 0), (b, 0), (b, a), (1, a)]
        return upper + [(1, b), (b, b), (b, 1), (a, 1), (a, b)]
    corners = []  # star, point up
    for k in range(10):
        angle = math.pi * k / 5
        radius = 0.54 if k % 2 == 0 else 0.24
        corners.append((0.5 + radius * math.sin(angle), 0.53 - radius * math.cos(angle)))
    return corners


def draw(color, shape, light=0.5, warm=0.0, size=0.5, x=0.5, y=0.5):
    """A (SIDE, SIDE) RGB image. light in [0, 1]; warm in about [-0.12, 0.12]; size is the subject's
    width as a share of the image's; x and y place it between the edges (0 = left or top)."""
    ground = tuple(round(255 * min(max(light + w, 0), 1)) for w in (warm, 0, -warm))
    canvas = SIDE * SUPERSAMPLE
    width = size * SIDE * SUPERSAMPLE
    left, top = x * (canvas - width), y * (canvas - width)
    image = Image.new("RGB", (canvas, canvas), ground)
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((left, top, left + width, top + width), fill=COLORS[color])
    else:
        corners = [(left + width * px, top + width * py) for px, py in outline(shape)]
        pen.polygon(corners, fill=COLORS[color])
    return image.reduce(SUPERSAMPLE)


def draw_random(rng, caption):
    """An image of a caption, everything that is left to taste drawn at random."""
    color, shape = caption.split()[1:3]
    light = rng.uniform(0.25, 0.75)
    warm = rng.uniform(-0.12, 0.12)
    size = rng.uniform(0.36, 0.9)
    return draw(color, shape, light, warm, size, rng.uniform(), rng.uniform())


def to_array(images):
    """PIL images of one size -> float32 (B, H, W, 3) in [0, 1]; such an array passes through."""
    if isinstance(images, np.ndarray):
        return images
    return np.stack([np.asarray(image.convert("RGB"), np.float32) / 255 for image in images])


def segment(images):
    """Where the subject is: (B, H, W, 3) -> the ground's color (B, 3), the border's median, and a
    mask (B, H, W) of what is far from it."""
    ring = max(1, images.shape[1] // 16)
    inner = np.zeros(images.shape[1:3], bool)
    inner[ring:-ring, ring:-ring] = True
    ground = np.median(images[:, ~inner], axis=1)
    return ground, np.linalg.norm(images - ground[:, None, None], axis=-1) > 0.22


def measure(images):
    """The five axes read from pixels: PIL images or (B, H, W, 3) in [0, 1] -> (B, 5), AXES'
    units."""
    images = to_array(images)
    ground, mask = segment(images)
    height, width = mask.shape[1:]
    area = mask.sum((1, 2))
    across = (np.arange(width) + 0.5) / width * 2 - 1
    down = (np.arange(height) + 0.5) / height * 2 - 1
    right = (mask * across).sum((1, 2)) / np.maximum(area, 1)
    low = (mask * down[:, None]).sum((1, 2)) / np.maximum(area, 1)
    light = ground.mean(1)
    warm = (ground[:, 0] - ground[:, 2]) / 2
    return np.stack([light, warm, area / (height * width), right, -low], 1).astype(np.float32)


def standardized(images):
    """The five axes in standard deviations of the drawn images, (B, 5)."""
    return (measure(images) - MEAN) / STD


def reward(word, images):
    """A taste word's reward, in standard deviations of the drawn images, (B,)."""
    axis, sign = WORDS[word]
    return sign * standardized(images)[:, axis]


def recognize(images):
    """Color and shape of the subject: [(color, shape), ...], (None, None) where there is none.
    Color is the nearest of COLORS to the mask's median; shape the template that fits its box
    best."""
    images = to_array(images)
    _, masks = segment(images)
    templates = {}
    for shape in SHAPES:
        _, mask = segment(to_array([draw("blue", shape, 0.9, 0, 0.75)]))
        templates[shape] = crop_to_box(mask[0])
    names = list(COLORS)
    palette = np.array(list(COLORS.values())) / 255
    found = []
    for image, mask in zip(images, masks, strict=True):
        if mask.mean() < 0.01:
            found.append((None, None))
            continue
        median = np.median(image[mask], axis=0)
        color = names[np.linalg.norm(palette - median, axis=1).argmin()]
        box = crop_to_box(mask)
        misfit = {shape: np.abs(box - templates[shape]).mean() for shape in SHAPES}
        found.append((color, min(misfit, key=misfit.get)))
    return found


def crop_to_box(mask):
    """A mask's bounding box stretched to 16 x 16, float."""
    rows = np.flatnonzero(mask.any(1))
    columns = np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    box = Image.fromarray(box.astype(np.uint8) * 255).resize((16, 16), Image.BOX)
    return np.asarray(box, np.float32) / 255


def fidelity(images, captions):
    """1 where color and shape are the caption's, else 0: one number an image."""
    wanted = [tuple(caption.split(",")[0].split()[1:3]) for caption in captions]
    return [int(a == b) for a, b in zip(recognize(images), wanted, strict=True)]


# ------------------------------------------------------------------------------- users
def draw_users(n, seed):
    """n sparse tastes: (n, 5) weights on the standardized axes, one or two of them signed and of
    total length 1, plus everyone's SHARED_LIGHT_BIAS; and each user's words, e.g. ["dark",
    "large"]."""
    rng = np.random.default_rng(seed)
    words = []
    tastes = np.zeros((n, len(AXES)), np.float32)
    for i in range(n):
        axes = rng.choice(len(AXES), size=rng.integers(1, 3), replace=False)
        signs = rng.choice((-1, 1), size=len(axes))
        tastes[i, axes] = signs / math.sqrt(len(axes))
        words.append([AXIS_WORDS[a][int(s < 0)] for a, s in zip(axes, signs, strict=True)])
    tastes[:, 0] += SHARED_LIGHT_BIAS
    return tastes, words


def utility(taste, images):
    """True liking of images: taste (5,) or (B, 5) -> (B,)."""
    return (standardized(images) * taste).sum(-1)


def all_tastes():
    """Every taste that draw_users() draws: weights (50, 5), which of WORDS it is made of (50, 10),
    and how likely it is (50,)."""
    weights, named, odds = [], [], []
    subsets = [c for k in (1, 2) for c in itertools.combinations(range(len(AXES)), k)]
    for axes in subsets:
        for signs in itertools.product((1, -1), repeat=len(axes)):
            signed = np.zeros(len(AXES))
            signed[list(axes)] = signs
            weights.append(signed / math.sqrt(len(axes)))
            named.append([signed[axis] == sign for axis, sign in WORDS.values()])
            odds.append(0.5 / (10 if len(axes) == 1 else 40))
    weights = np.array(weights)
    weights[:, 0] += SHARED_LIGHT_BIAS
    return weights, np.array(named), np.array(odds)


def taste_posterior(z):
    """What can be known of a user from their choices, by Bayes' rule: the images' standardized
    axes, preferred first, (n, pairs, 2, 5) -> probabilities of all_tastes(), (n, 50)."""
    weights, _, odds = all_tastes()
    gap = BRADLEY_TERRY_SCALE * (z[:, :, 0] - z[:, :, 1]) @ weights.T
    posterior = odds * np.exp(-np.logaddexp(0, -gap).sum(1))
    return posterior / posterior.sum(1, keepdims=True)


# -------------------------------------------------------------------- preference data
def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def draw_pairs(rng, n):
    """n pairs that one user is shown: (caption, whether the last winner stays, image, image)."""
    pairs = []
    caption = None
    for _ in range(n):
        stays = caption is not None and rng.uniform() <= 0.3
        if not stays:
            caption = CAPTIONS[rng.integers(len(CAPTIONS))]
        pairs.append((caption, stays, draw_random(rng, caption), draw_random(rng, caption)))
    return pairs


def choose(rng, user, taste, pairs, first_id):
    """One user's choices: rows in Pick-a-Pic v2's columns, and for each label (no tie) whether it
    agrees with the taste and whether the lighter image won."""
    images = [image for pair in pairs for image in pair[2:]]
    axes = measure(images)  # all at once: measuring is the slow part
    liking = (((axes - MEAN) / STD) * taste).sum(-1).reshape(-1, 2)
    light = axes[:, 0].reshape(-1, 2)
    rows, agrees, lighter = [], [], []
    winner = None
    for k, (caption, stays, a, b) in enumerate(pairs):
        shown = [  # id, bytes, liking, light
            (f"u{user:05d}-{k:03d}-{side}", png(image), liking[k, i], light[k, i])
            for i, (side, image) in enumerate((("a", a), ("b", b)))
        ]
        if stays and winner is not None:
            shown[0] = winner
        if rng.uniform() >= 0.5:
            shown.reverse()
        gap = shown[0][2] - shown[1][2]
        first_wins = rng.uniform() < 1 / (1 + math.exp(-BRADLEY_TERRY_SCALE * gap))
        tie = abs(gap) < TIE_MARGIN
        label = 0.5 if tie else float(first_wins)
        winner = shown[0 if first_wins else 1]
        if not tie:
            agrees.append(first_wins == (gap > 0))
            lighter.append(first_wins == (shown[0][3] > shown[1][3]))
        number = first_id + k
        rows.append(
            dict(
                are_different=True,
                best_image_uid="" if tie else winner[0],
                caption=caption,
                created_at=1_700_000_000_000_000_000 + number,
                has_label=True,
                image_0_uid=shown[0][0],
                image_0_url="",
                image_1_uid=shown[1][0],
                image_1_url="",
                jpg_0=shown[0][1],
                jpg_1=shown[1][1],
                label_0=label,
                label_1=1 - label,
                model_0="drawn",
                model_1="drawn",
                ranking_id=number,
                user_id=user,
                num_example_per_prompt=1,
                __index_level_0__=number,
            )
        )
    return rows, agrees, lighter


def write_data(out, users=1000, pairs=20, seed=1):
    """Preference pairs as parquet in Pick-a-Pic v2's own columns, plus people.json with the true
    tastes (which no training reads). As in the real data the winner often stays on screen for the
    next pair, and some pairs are ties."""
    out = Path(out)
    if out.exists():
        sys.exit(f"tiny.world: error: --out {out} is there already; choose another folder")
    rng = np.random.default_rng([seed, 1])  # the base's images come from default_rng(seed)
    tastes, words = draw_users(users, seed)
    rows, agrees, lighter = [], [], []
    for user in tqdm(range(users), desc="drawing users' choices", disable=None):
        shown = draw_pairs(rng, pairs)
        made = choose(rng, user, tastes[user], shown, len(rows))
        for total, part in zip((rows, agrees, lighter), made, strict=True):
            total += part
    columns = {
        name: pa.array([row[name] for row in rows], ARROW_TYPES.get(name, pa.string()))
        for name in rows[0]
    }
    table = pa.table(columns)
    temporary = out.with_name(out.name + ".partial")
    temporary.mkdir(parents=True, exist_ok=True)
    half = len(rows) // 2  # two files, as any real data set has several
    for i, part in enumerate((table.slice(0, half), table.slice(half))):
        pq.write_table(part, temporary / f"train-{i:05d}-of-00002.parquet", row_group_size=2500)
    stats = dict(
        users=users,
        pairs=len(rows),
        seed=seed,
        ties=round(1 - len(agrees) / len(rows), 4),
        agreement=round(float(np.mean(agrees)), 4),
        lighter_wins=round(float(np.mean(lighter)), 4),
    )
    truth = dict(stats=stats, axes=list(AXES), tastes=tastes.tolist(), words=words)
    (temporary / "people.json").write_text(json.dumps(truth))
    os.rename(temporary, out)
    print(
        f"{out}: {len(rows)} pairs of {users} users; ties {stats['ties']:.1%}; labels agree with "
        f"the true taste {stats['agreement']:.1%}; the lighter image wins "
        f"{stats['lighter_wins']:.1%}"
    )


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="tiny.world", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", default="data/tiny", help="folder to write (default: %(default)s)")
    add("--users", type=int, default=1000, help="(default: %(default)s)")
    add("--pairs", type=int, default=20, help="pairs a user (default: %(default)s)")
    add("--seed", type=int, default=1, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    for name, least in dict(users=1, pairs=1, seed=0).items():
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: expected {least} or more")
    return args


def main(argv=None):
    args = parse_args(argv)
    write_data(args.out, args.users, args.pairs, args.seed)


if __name__ == "__main__":
    main()
