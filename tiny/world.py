"""The drawn world: images, pixel rewards, and users whose choices are written as preference data.

It is no part of the method: it makes, in the real thing's own format, what a laptop cannot
download. From the repository's root:

    python -m tiny.world --out data/tiny     # drawn users' choices in Pick-a-Pic v2's columns, 20 s

An image is one colored shape on a plain ground, 32 x 32, e.g. "a red star". The caption names color
and shape. Five things are not in the caption and are left to taste: how light and how warm the
ground is, how large the subject is, and where it sits. All five are measured from the pixels of
*any* image, drawn or generated, so they serve as rewards and as the true taste of drawn users.

Most users have one of 38 known tastes. A tenth have new ones, which nobody else has: three pairs of
axes are theirs alone, in any proportion between 15 and 75 degrees. With embed.py's own shares no
split trains on these users.
"""

import io
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw
from tqdm import tqdm

from data import hash_fraction
from utils import InputError, check_flags, make_parser, read_json, run_script

SIDE = 32  # of an image, in pixels
SUPERSAMPLE = 8  # it is drawn this many times as large
# Daylight: every image is brighter at the top and warmer on the right. A network knows of sides
# only by how its convolutions end there, and this teaches it which side is which.
RAMP = np.linspace(-1, 1, SIDE)
DAYLIGHT = 0.045 * (RAMP[None, :, None] * np.array([1, 0, -1]) - RAMP[:, None, None])
COLORS = dict(red=(205, 25, 30), orange=(255, 125, 0), yellow=(245, 225, 20), green=(25, 150, 40))
COLORS |= dict(cyan=(20, 205, 220), blue=(25, 50, 215), purple=(120, 25, 180), pink=(250, 80, 175))
COLORS |= dict(lime=(150, 235, 30), magenta=(225, 0, 225))
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart", "ring")
CAPTIONS = [f"{'an' if c[0] in 'aeiou' else 'a'} {c} {s}" for c in COLORS for s in SHAPES]

# The five axes of taste: word for more, word for less, then mean and standard deviation over drawn
# images (checked by a test). Units: light is the ground's mean RGB in [0, 1]; warm is (R - B) / 2
# of the ground; large is the subject's share of the image; right and high are the subject's
# centroid, -1 to 1 across the image.
AXES = {
    "light": ("light", "dark", 0.500, 0.144),
    "warm": ("warm", "cool", 0.000, 0.069),
    "large": ("large", "small", 0.217, 0.106),
    "right": ("right", "left", 0.141, 0.210),
    "high": ("high", "low", -0.157, 0.228),
}
AXIS_WORDS = [[more, less] for more, less, _, _ in AXES.values()]
# taste word -> (index of its axis, 1 or -1)
WORDS = {words[k]: (axis, 1 - 2 * k) for axis, words in enumerate(AXIS_WORDS) for k in (0, 1)}
MEAN = np.array([mean for _, _, mean, _ in AXES.values()], np.float32)
STD = np.array([std for _, _, _, std in AXES.values()], np.float32)

SHARED_LIGHT_BIAS = 0.37  # everyone's liking for light; a taste has length 1. Lighter wins 60:40
NEW_TASTES = 0.1  # share of users with new tastes, by hash: those that embed.py tests first
AXIS_PAIRS = tuple(itertools.combinations(range(len(AXES)), 2))
NEW_PAIRS = ((0, 2), (1, 4), (2, 3))  # light and large, warm and high, large and right
KNOWN_PAIRS = tuple(pair for pair in AXIS_PAIRS if pair not in NEW_PAIRS)
ANGLES = (math.pi / 12, 5 * math.pi / 12)  # of a new taste between its axes: both matter
BRADLEY_TERRY_SCALE = 2.2  # labels agree with the true taste less than 90% of the time
TIE_MARGIN = 0.12  # closer than this in utility and the user calls it a tie

# Pick-a-Pic v2's own 19 columns in their order, and their types
COLUMNS = (
    "are_different best_image_uid caption created_at has_label image_0_uid image_0_url image_1_uid "
    "image_1_url jpg_0 jpg_1 label_0 label_1 model_0 model_1 ranking_id user_id "
    "num_example_per_prompt __index_level_0__"
).split()
ARROW_TYPES = dict.fromkeys(COLUMNS, pa.string()) | dict.fromkeys(COLUMNS[-4:], pa.int64())
ARROW_TYPES |= dict(are_different=pa.bool_(), has_label=pa.bool_(), created_at=pa.timestamp("ns"))
ARROW_TYPES |= dict.fromkeys(("jpg_0", "jpg_1"), pa.binary())
ARROW_TYPES |= dict.fromkeys(("label_0", "label_1"), pa.float64())


def outline(shape):
    """Corners of a shape in the unit square, x right, y down, touching its sides where it can."""
    if shape == "square":
        return [(0.05, 0.05), (0.95, 0.05), (0.95, 0.95), (0.05, 0.95)]
    if shape == "triangle":
        return [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)]
    if shape == "diamond":
        return [(0.5, 0.0), (0.9, 0.5), (0.5, 1.0), (0.1, 0.5)]
    if shape == "heart":
        turns = np.linspace(0, 2 * math.pi, 60)
        up = sum(c * np.cos(k * turns) for k, c in enumerate((13, -5, -2, -1), 1))
        return list(zip(0.5 + np.sin(turns) ** 3 / 2, 0.42 - up / 29, strict=True))
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
    width = size * canvas
    left, top = x * (canvas - width), y * (canvas - width)
    image = Image.new("RGB", (canvas, canvas), ground)
    pen = ImageDraw.Draw(image)
    if shape in ("circle", "ring"):
        pen.ellipse((left, top, left + width, top + width), fill=COLORS[color])
        if shape == "ring":
            inner = 0.27 * width
            right, bottom = left + width - inner, top + width - inner
            pen.ellipse((left + inner, top + inner, right, bottom), fill=ground)
    else:
        corners = [(left + width * px, top + width * py) for px, py in outline(shape)]
        pen.polygon(corners, fill=COLORS[color])
    pixels = np.asarray(image.reduce(SUPERSAMPLE)) + 255 * DAYLIGHT
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def draw_random(rng, caption):
    """An image of a caption, what is left to taste drawn at random. Subjects are more often right
    and low: in a world alike from all sides a network never learns which side is which."""
    light, warm, size, x, y = rng.uniform((0.25, -0.12, 0.36, 0, 0), (0.75, 0.12, 0.8, 1, 1))
    return draw(*caption.split()[1:3], light, warm, size, math.sqrt(x), math.sqrt(y))


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
    """The axes read from PIL images or pixels (B, H, W, 3) in [0, 1] -> (B, 5), in AXES' units."""
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
    """The subjects' [(color, shape), ...], (None, None) where there is none. Color is the nearest
    of COLORS to the mask's median; shape the template that fits its box best."""
    images = to_array(images)
    _, masks = segment(images)
    _, drawn = segment(to_array([draw("blue", shape, 0.9, 0, 0.75) for shape in SHAPES]))
    templates = [crop_to_box(mask) for mask in drawn]
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
        misfit = [np.abs(box - template).mean() for template in templates]
        found.append((color, SHAPES[np.argmin(misfit)]))
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


def has_new_taste(user):
    """Whether this user's taste is a new one, by their number."""
    return hash_fraction("user", user) < NEW_TASTES


def draw_users(n, seed, common=SHARED_LIGHT_BIAS, is_new=lambda user: False):
    """n tastes, (n, 5), of length 1 on the standardized axes, plus `common` on light; and each
    user's words, e.g. ["dark", "large"]. A known taste is one axis, or two of KNOWN_PAIRS alike; a
    new one is two of NEW_PAIRS, in proportions of ANGLES."""
    rng = np.random.default_rng(seed)
    words = []
    tastes = np.zeros((n, len(AXES)), np.float32)
    for i in range(n):
        if is_new(i):
            axes = NEW_PAIRS[rng.integers(len(NEW_PAIRS))]
            angle = rng.uniform(*ANGLES)
        else:
            axes, angle = (rng.integers(len(AXES)),), 0
            if rng.uniform() < 0.5:
                axes, angle = KNOWN_PAIRS[rng.integers(len(KNOWN_PAIRS))], math.pi / 4
        signs = rng.choice((-1, 1), size=len(axes))
        tastes[i, list(axes)] = signs * proportions(angle)[: len(axes)]
        words.append([AXIS_WORDS[a][int(s < 0)] for a, s in zip(axes, signs, strict=True)])
    tastes[:, 0] += common
    return tastes, words


def proportions(angle):
    """Weights of length 1 of a taste's two axes."""
    return np.array([math.cos(angle), math.sin(angle)])


def utility(taste, images):
    """True liking of images: taste (5,) or (B, 5) -> (B,)."""
    return (standardized(images) * taste).sum(-1)


def all_tastes(common=SHARED_LIGHT_BIAS, new=False, angles=16):
    """Every taste that draw_users() draws: weights (N, 5), which of WORDS it is made of (N, 10),
    and how likely it is (N,). 38 known ones; or the new ones, on a grid of angles."""
    low, high = ANGLES
    if new:
        grid = low + (high - low) * (np.arange(angles) + 0.5) / angles
        kinds = [(pair, angle, 1 / len(NEW_PAIRS) / angles) for pair in NEW_PAIRS for angle in grid]
    else:
        kinds = [((axis,), 0, 0.5 / len(AXES)) for axis in range(len(AXES))]
        kinds += [(pair, math.pi / 4, 0.5 / len(KNOWN_PAIRS)) for pair in KNOWN_PAIRS]
    weights, named, odds = [], [], []
    for axes, angle, likely in kinds:
        for signs in itertools.product((1, -1), repeat=len(axes)):
            signed = np.zeros(len(AXES))
            signed[list(axes)] = signs * proportions(angle)[: len(axes)]
            weights.append(signed)
            named.append([signed[axis] * sign > 0 for axis, sign in WORDS.values()])
            odds.append(likely / 2 ** len(axes))
    weights = np.array(weights)
    weights[:, 0] += common
    return weights, np.array(named), np.array(odds)


def taste_posterior(z, common=SHARED_LIGHT_BIAS, new=False):
    """What can be known of a user from their choices, by Bayes' rule: the images' standardized
    axes, preferred first, (n, pairs, 2, 5) -> probabilities of all_tastes(), (n, N)."""
    weights, _, odds = all_tastes(common, new)
    gap = BRADLEY_TERRY_SCALE * (z[:, :, 0] - z[:, :, 1]) @ weights.T
    posterior = odds * np.exp(-np.logaddexp(0, -gap).sum(1))
    return posterior / posterior.sum(1, keepdims=True)


def predict_choices(shots, pairs, common=SHARED_LIGHT_BIAS, new=False):
    """How likely the first of two images is chosen, to who knows four choices and the kind of taste
    and reads them perfectly: standardized axes, preferred first, of the choices (n, 4, 2, 5) and of
    the images (n, 2, 5) -> (n,). None of the five is a tie, which rules out tastes too."""
    weights, _, _ = all_tastes(common, new)
    gap = (pairs[:, 0] - pairs[:, 1]) @ weights.T
    known = (shots[:, :, 0] - shots[:, :, 1]) @ weights.T
    no_tie = (np.abs(gap) >= TIE_MARGIN) & (np.abs(known) >= TIE_MARGIN).all(1)
    likely = taste_posterior(shots, common, new) * np.where(no_tie, 1, 1e-6)
    first = 1 / (1 + np.exp(-BRADLEY_TERRY_SCALE * gap))
    return (likely * first).sum(1) / likely.sum(1)


def load_true_tastes(data):
    """The people.json beside drawn data: {user: weights (5,)}, {user: words}, the users with new
    tastes, and its stats. InputError without that file."""
    path = Path(data) / "people.json"
    if not path.is_file():
        raise InputError(f"--data: no {path}; of users who are not drawn ask evaluate.py judge")
    truth = read_json(path)
    missing = {"tastes", "words", "new_taste", "stats"} - truth.keys()
    if missing:
        raise InputError(f"{path}: no {min(missing)} in it; draw the data again")
    tastes, words = ({str(i): v for i, v in enumerate(truth[key])} for key in ("tastes", "words"))
    new = {str(user) for user, is_new in enumerate(truth["new_taste"]) if is_new}
    return tastes, words, new, truth["stats"]


def draw_pairs(rng, n):
    """n pairs that one user is shown: (caption, whether the last winner stays, image, image)."""
    pairs = []
    for k in range(n):
        stays = k > 0 and rng.uniform() <= 0.3
        if not stays:
            caption = CAPTIONS[rng.integers(len(CAPTIONS))]
        pairs.append((caption, stays, draw_random(rng, caption), draw_random(rng, caption)))
    return pairs


def choose(rng, user, taste, pairs, first_id):
    """One user's choices among draw_pairs()': rows of COLUMNS, and for each label (no tie) whether
    it agrees with the taste and whether the lighter image won."""
    axes = measure([image for pair in pairs for image in pair[2:]])  # all at once: this is slow
    liking = (((axes - MEAN) / STD) * taste).sum(-1)
    rows, verdicts = [], []
    winner = None
    for k, (caption, stays, *images) in enumerate(pairs):
        shown = []  # id, bytes, liking, light
        for i, image in enumerate(images):
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            name = f"u{user:05d}-{k:03d}-{'ab'[i]}"
            shown.append((name, buffer.getvalue(), liking[2 * k + i], axes[2 * k + i, 0]))
        if stays:
            shown[0] = winner
        if rng.uniform() >= 0.5:
            shown.reverse()
        gap = shown[0][2] - shown[1][2]
        first_wins = rng.uniform() < 1 / (1 + math.exp(-BRADLEY_TERRY_SCALE * gap))
        tie = abs(gap) < TIE_MARGIN
        winner = shown[0 if first_wins else 1]
        if not tie:
            verdicts.append((first_wins == (gap > 0), first_wins == (shown[0][3] > shown[1][3])))
        label = 0.5 if tie else float(first_wins)
        number = first_id + k
        row = dict(caption=caption, user_id=user, ranking_id=number, __index_level_0__=number)
        row |= dict(created_at=1_700_000_000_000_000_000 + number, label_0=label, label_1=1 - label)
        row |= dict(best_image_uid="" if tie else winner[0], model_0="drawn", model_1="drawn")
        row |= dict(are_different=True, has_label=True, num_example_per_prompt=1)
        for side, image in enumerate(shown):
            row |= {f"image_{side}_uid": image[0], f"image_{side}_url": "", f"jpg_{side}": image[1]}
        rows.append(row)
    return rows, verdicts


def write_data(out, users=1000, pairs=20, seed=1, common=SHARED_LIGHT_BIAS):
    """Preference pairs as parquet in Pick-a-Pic v2's own columns, plus people.json with the true
    tastes (which no training reads). As in the real data winners often stay and ties occur."""
    out = Path(out)
    if out.exists():
        raise InputError(f"--out {out} is there already; choose another folder")
    rng = np.random.default_rng([seed, 1])  # the base's images come from default_rng(seed)
    tastes, words = draw_users(users, seed, common, has_new_taste)
    rows, verdicts = [], []
    for user in tqdm(range(users), desc="drawing users' choices", disable=None):
        made = choose(rng, user, tastes[user], draw_pairs(rng, pairs), len(rows))
        rows += made[0]
        verdicts += made[1]
    table = pa.Table.from_pylist(rows, pa.schema(ARROW_TYPES))
    temporary = out.with_name(out.name + ".partial")
    temporary.mkdir(parents=True, exist_ok=True)
    half = len(rows) // 2  # two files, as any real data set has several
    for i, part in enumerate((table.slice(0, half), table.slice(half))):
        pq.write_table(part, temporary / f"train-{i:05d}-of-00002.parquet", row_group_size=2500)
    ties = round(1 - len(verdicts) / len(rows), 4)
    agreement, lighter = [round(mean, 4) for mean in np.reshape(verdicts, (-1, 2)).mean(0).tolist()]
    stats = dict(users=users, pairs=len(rows), seed=seed, common=common, ties=ties)
    stats |= dict(agreement=agreement, lighter_wins=lighter)
    truth = dict(stats=stats, axes=list(AXES), tastes=tastes.tolist(), words=words)
    truth["new_taste"] = [has_new_taste(user) for user in range(users)]
    (temporary / "people.json").write_text(json.dumps(truth))
    os.rename(temporary, out)
    numbers = f"ties {ties:.1%}; labels agree with the true taste {agreement:.1%}"
    print(f"{out}: {len(rows)} pairs of {users} users; {numbers}; lighter wins {lighter:.1%}")


def parse_args(argv=None):
    parser = make_parser("tiny.world", __doc__)
    add = parser.add_argument
    add("--out", default="data/tiny", help="folder to write (default: %(default)s)")
    add("--users", type=int, default=1000, help="(default: %(default)s)")
    add("--pairs", type=int, default=20, help="pairs a user (default: %(default)s)")
    add("--seed", type=int, default=1, help="(default: %(default)s)")
    add("--common", type=float, default=SHARED_LIGHT_BIAS, help="everybody's liking for light")
    args = parser.parse_args(argv)
    check_flags(args, parser.error, "users pairs", lambda v: v >= 1, "1 or more")
    check_flags(args, parser.error, "seed", lambda v: v >= 0, "0 or more")
    common = "a number, 0 for no common taste"
    check_flags(args, parser.error, "common", math.isfinite, common)
    return args


def main(argv=None):
    run_script("tiny.world", lambda args: write_data(**vars(args)), parse_args(argv))


if __name__ == "__main__":
    main()
