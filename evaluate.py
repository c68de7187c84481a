"""The paper's numbers: Fig. 5, Table 1 and Fig. 3. experiments.py has Fig. 2, 4 and 6.

    python evaluate.py                            # what is personal: each user by each embedding
    python evaluate.py choices                    # does the adapter predict users' real choices?
    python evaluate.py judge                      # Fig. 5: a VLM or an endpoint judges for them
    python evaluate.py rewards --baselines runs/onehot-baselines     # Table 1, Fig. 3

Results go to evaluation.json and .md, where each subcommand has its part, and to images, beside the
adapter or in --out; every rate and difference with its n and a 95% interval. Both arms of a
comparison get the same prompts and noise. Users come in kinds: `seen` (the adapter trained on their
choices among other captions), `new_user` and, in the drawn world, `new_taste`: nobody had theirs.
"""

import hashlib
import json
import math
import platform
import re
import shlex
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import embed
import plots
import utils
from bases import llava
from bases.images import load_shots, read_images, readable_pairs
from data import hash_fraction, held_out_rows, load_user, look_up, one_each, read_pairs, rows_by_id
from ppd import UserAdapter
from rewards import N_DRAWS, REWARDS, implicit_logits, score
from sample import GUIDANCE, generate, load_base_for, load_user_embedding, read_prompts
from tiny import world
from utils import InputError

UPPER_BOUND = "one Diffusion-DPO a reward"
KINDS = dict(seen="seen", new_user="new", new_taste="new, with new tastes")
DATA_FLAGS = ("data", "latents", "decoder")
N_CAPTIONS = 16  # of evaluate_users
BOOTSTRAP = 1000


def common_arguments(parser):
    """The flags that evaluate.py and experiments.py share."""
    add = parser.add_argument
    add("--adapter", help="run folder or adapter file (default: runs/ppd, for rewards runs/onehot)")
    add("--data", help="folder with people.json, if it moved since embed.py read it")
    add("--users", help="folder that embed.py wrote (default: the one the adapter was trained on)")
    add("--base", help="default: the one the adapter was trained on")
    add("--decoder", help="with Stages A and B (default: stabilityai/stable-cascade)")
    add("--baselines", help="folder of the baselines' runs; those not there are trained")
    add("--latents", help="folder of cached latents that they train on, if not beside the data")
    add("--prompts", help="captions, as sample.py takes them (default: the held-out ones)")
    add("--steps", type=int, help="denoising steps (default: the base's, e.g. 30)")
    add("--guidance", type=float, help="classifier-free guidance (default: the base's, e.g. 4)")
    add("--batch", type=int, default=16, help="images at once (default: %(default)s)")
    add("--seed", type=int, default=10_000, help="of the first image (default: %(default)s)")
    add("--out", help="folder to write (default: the adapter's)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")


def parse_args(argv=None):
    parser = utils.make_parser("evaluate.py", __doc__)
    add = parser.add_argument
    add("command", nargs="?", choices=COMMANDS, default="users", metavar="COMMAND")
    add("--n", type=int, help="users of a kind (40; judge 277, 192), choices (500), images (200)")
    add("--plan", action="store_true", help="rewards: print how to train --baselines, and end")
    add("--judge", help="a VLM, or the endpoint's model (default: the VLM that read the users)")
    add("--judge-url", help="OpenAI-compatible, like https://host/v1; key from OPENAI_API_KEY")
    add("--judge-timeout", type=float, default=120, help="seconds an answer (default: %(default)s)")
    common_arguments(parser)
    args = parser.parse_args(argv)
    args.adapter = args.adapter or ("runs/onehot" if args.command == "rewards" else "runs/ppd")
    finish_args(args, parser, argv)
    if args.plan and (args.command != "rewards" or not args.baselines):
        parser.error("--plan: for rewards, with --baselines DIR")
    if args.judge_url and not re.match("https?://", args.judge_url):
        parser.error(f"--judge-url {args.judge_url}: expected https://HOST/v1 or http://HOST/v1")
    if args.judge_url and not args.judge:
        parser.error("--judge-url wants the endpoint's model too: --judge MODEL")
    return args


def finish_args(args, parser, argv):
    """Check the shared flags; add where to write, and the command and time to put with results."""
    check = partial(utils.check_flags, args, parser.error)
    check("n", lambda v: v >= 2, "2 or more")
    check("steps batch", lambda v: v >= 1, "1 or more")
    check("seed", lambda v: 0 <= v < 2**62, "0 to 2^62")
    check("guidance", lambda v: 0 <= v < math.inf, GUIDANCE)
    adapter = Path(args.adapter or "")
    if not adapter.exists():
        parser.error(f"--adapter {adapter}: no such file or folder; train.py writes runs/<name>")
    if args.out is None:
        args.out = str(adapter if adapter.is_dir() else adapter.parent)
    args.made_by = shlex.join(["python", parser.prog, *(sys.argv[1:] if argv is None else argv)])
    args.sampling = dict(batch=args.batch, steps=args.steps, guidance=args.guidance)
    args.began = time.time()


def read_results(args):
    """--out's evaluation.json, or {}; InputError of a broken one, better before work than after."""
    path = Path(args.out) / "evaluation.json"
    return utils.read_json(path) if path.exists() else {}


def wilson(rate, n, z=1.96):
    """95% interval of a rate by Wilson's score: honest at 0 and 1 too, where a bootstrap's is 0."""
    center = rate + z * z / (2 * n)
    half = z * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5
    return [round((center + sign * half) / (1 + z * z / n), 4) for sign in (-1, 1)]


def rate_ci(values):
    """Numbers in [0, 1] -> their mean as a rate, n, and Wilson's interval; None of none."""
    if len(values) == 0:
        return None
    rate = float(np.mean(values))
    return dict(rate=round(rate, 4), n=len(values), ci95=wilson(rate, len(values)))


def mean_ci(values):
    """Numbers -> their mean, n, and its 95% interval by the normal approximation."""
    values = np.asarray(values, np.float64)
    mean, half = float(values.mean()), 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5
    interval = [round(mean - half, 4), round(mean + half, 4)]
    return dict(mean=round(mean, 4), n=len(values), ci95=interval)


def win_indicator(ours, theirs):
    """Scores of two arms on the same prompts and noise -> 1 where ours is higher, 0.5 for a tie."""
    return np.greater(ours, theirs) + 0.5 * np.equal(ours, theirs)


def compare(ours, theirs):
    """Scores of two arms on the same prompts and noise -> win rate, n, interval, and both means."""
    won = rate_ci(win_indicator(ours, theirs))
    mean, mean_other = (round(float(np.mean(scores)), 4) for scores in (ours, theirs))
    return dict(win_rate=won.pop("rate"), **won, mean=mean, mean_other=mean_other)


def bootstrap_ci(statistics, *sizes):
    """95% intervals of statistics over clusters, all resampled together: statistics(*indices) ->
    {name: number}; sizes: of each kind of cluster. Returns {name: [low, high]}."""
    rng = np.random.default_rng(0)
    draws = [statistics(*(rng.integers(n, size=n) for n in sizes)) for _ in range(BOOTSTRAP)]
    return {
        name: [round(float(q), 4) for q in np.nanquantile([d[name] for d in draws], (0.025, 0.975))]
        for name in draws[0]
    }


def ridge(x, y, strength=10.0):
    """Ridge regression of y (B, M) on x (B, N), standardized -> a function from x to y."""
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)

    def features(x):
        return torch.nn.functional.pad((x - mean) / std, (0, 1), value=1.0)

    x = features(x)
    solution = torch.linalg.solve(x.T @ x + strength * torch.eye(x.shape[1]), x.T @ y)
    return lambda new: features(new) @ solution


def format_ci(r, form=".3f"):
    return f"{r['ci95'][0]:{form}} to {r['ci95'][1]:{form}}"


def format_mean(r):
    return f"{r['mean']:+.2f} ({format_ci(r, '+.2f')})"


def rate_cells(r):
    """Two cells, rate and interval, of what rate_ci() or compare() returned."""
    rate = r.get("rate", r.get("win_rate"))
    return [f"{rate:.3f}", format_ci(r)] if r["n"] else ["-", "-"]


def format_rate(r, with_n=False):
    rate, interval = rate_cells(r)
    return f"{rate} ({interval}, n = {r['n']})" if with_n else f"{rate} ({interval})"


def format_value(r):
    return format_mean(r) if "mean" in r else format_rate(r)


def markdown_table(header, rows):
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def report(args, result, table, images):
    """Save a result and what made it under the subcommand's key of evaluation.json, its table
    (markdown) as a section of evaluation.md, and images {name: image}; print the table."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    made = dict(command=args.made_by, seconds=round(time.time() - args.began))
    made["machine"] = f"{platform.system()} {platform.machine()}, {device}"
    made["torch"] = torch.__version__
    files = [out / "evaluation.json", out / "evaluation.md"]
    results = read_results(args) | {args.command: dict(made=made) | result}
    content = json.dumps(results, indent=1) + "\n"
    utils.write_atomically(files[0], lambda temporary: temporary.write_text(content))
    page = files[1].read_text().rstrip("\n") if files[1].exists() else ""
    parts = re.split(r"\n*^## (.*)\n\n", page, flags=re.MULTILINE)[1:]  # kept word for word
    sections = dict(zip(parts[::2], parts[1::2], strict=True)) | {args.command: table}
    text = "\n".join(f"## {name}\n\n{section}\n" for name, section in sections.items())
    utils.write_atomically(files[1], lambda temporary: temporary.write_text(text))
    for name, image in images.items():
        files.append(out / f"{name}.png")
        image.save(files[-1])
    print(table)
    print("-> " + ", ".join(map(str, files)))


def load_run(args):
    """The adapter, its users' folder and pairs, and embed.py's settings; --data overrides them."""
    read_results(args)  # a broken file stops here, not after the work
    adapter = UserAdapter.load(args.adapter)
    users = Path(args.users or adapter.header.get("users", "users"))
    pairs, settings = read_pairs(users)
    settings["data"] = args.data or settings["data"]
    return adapter, users, pairs, settings


def load_embeddings(adapter, folder, names, groups=None):
    """Embeddings of users, (B, D): of their group 0, or one of `groups` each."""
    chosen = zip(names, groups or [0] * len(names), strict=True)
    return torch.cat([load_user_embedding(adapter, folder / f"{n}.pt", g) for n, g in chosen])


def evaluate_users(args):
    """Sec. 5.2: images of held-out captions for --n users of a kind by each one's embedding, judged
    by the true taste (people.json, which no training reads) of each: how much of the gain over the
    base is personal, and how often one's own image is preferred. And a fit from embeddings to true
    tastes, the mean taste taken off: how much of what is a user's own is in their embedding."""
    adapter, users, pairs, settings = load_run(args)
    tastes, words, new, _ = world.load_true_tastes(settings["data"])
    rows = held_out_rows(users, pairs, new)
    names = {kind: [row["user"] for row in one_each(r, args.n or 40)] for kind, r in rows.items()}
    captions = {row["caption"] for found in rows.values() for row in found}
    captions = sorted(captions, key=lambda text: hash_fraction("evaluation", text))[:N_CAPTIONS]
    train_users = sorted({row["user"] for row in pairs if row["split"] == "train"})
    read = load_embeddings(adapter, users, train_users).cpu()  # what is wrong with them shows now
    base = load_base_for(adapter, args)
    images, z = shared_images(args, base, captions, adapter)
    known = torch.tensor(look_up(tastes, train_users))
    readout = ridge(read, known - known.mean(0))
    result = dict(captions=captions, base=rate_ci(world.fidelity(images["base"][0], captions)))
    for kind, some in names.items():
        embeddings = load_embeddings(adapter, users, some)
        images[kind] = cross_images(args, base, captions, adapter, embeddings, kind)
        true = torch.tensor(look_up(tastes, some))
        liked = cross_utilities(true.numpy(), axes_of(images[kind]), **z)
        cosine = torch.cosine_similarity(readout(embeddings.cpu()), true - known.mean(0))
        result[kind] = summarize_cross(*liked)
        result[kind]["readout"] = mean_ci(cosine.tolist())
        result[kind]["fidelity"] = cross_fidelity(images[kind], captions)
    kinds = ("seen", "seen", "new_user", "new_user", "new_user", "new_taste", "new_taste")
    shown = [(kind, k) for k, kind in enumerate(kinds) if kind in names and k < len(names[kind])]
    some = [names[kind][k] for kind, k in shown]
    profiles = embed.load_profiles(users, some, settings["data"], args.device)
    labels, sheet = ["base"], [images["base"][0][:8]]
    for (kind, k), profile in zip(shown, profiles, strict=True):
        name = names[kind][k]
        labels.append(f"{name}, {KINDS[kind]}\nlikes {', '.join(words[name])}\nVLM: {profile[:40]}")
        sheet.append(images[kind][k][:8])
    grid = plots.image_grid(sheet, labels, captions[:8])
    report(args, result, users_table(result), dict(users=grid))


def cross_images(args, base, captions, adapter, embeddings, desc=None):
    """Rows of images of all captions, by each embedding (N, D) or the base (None), one noise."""
    n = 1 if embeddings is None else len(embeddings)
    seeds = [args.seed + i for i in range(len(captions))]
    each = None if embeddings is None else embeddings.repeat_interleave(len(captions), 0)
    made = generate(base, captions * n, seeds * n, adapter, each, desc=desc, **args.sampling)
    return [made[i : i + len(captions)] for i in range(0, len(made), len(captions))]


def shared_images(args, base, captions, adapter):
    """What all users are compared with: {base, zero: a row of images}, and their axes (C, 5)."""
    users = dict(base=None, zero=load_user_embedding(adapter, "zero"))
    images = {arm: cross_images(args, base, captions, adapter, u) for arm, u in users.items()}
    return images, {arm: axes_of(made)[0] for arm, made in images.items()}


def axes_of(images):
    """Rows of as many images each -> their standardized axes (rows, images, 5)."""
    return np.stack([world.standardized(row) for row in images])


def cross_fidelity(images, captions):
    """Rows of images of these captions -> how many have their color and shape; the interval by
    resampling rows and captions (Wilson's, of as many as the fewer, where that has no width)."""
    kept = np.array([world.fidelity(row, captions) for row in images], float)

    def statistics(rows, columns):
        return dict(kept=kept[np.ix_(rows, columns)].mean())

    rate, interval = kept.mean(), bootstrap_ci(statistics, *kept.shape)["kept"]
    if interval[0] == interval[1]:
        interval = wilson(rate, min(kept.shape))
    return dict(rate=round(float(rate), 4), n=kept.size, ci95=interval)


def mean_of(values):
    """Their mean, nan of none: a few users, resampled, may be one user only."""
    return values.mean() if values.size else np.nan


def cross_utilities(tastes, z, base, zero):
    """How much N users like each other's images: tastes (N, 5); axes of the images of C captions,
    made for each user z (N, C, 5), by base and for the zero user (C, 5) -> utilities (N who likes,
    N for whom, C), of base and zero (N, C), and which users differ in taste (N, N)."""
    # in one product, so that equal images are liked equally, to the last bit
    liked = np.einsum("ik,jck->ijc", tastes, np.concatenate([z, base[None], zero[None]]))
    differs = np.abs(tastes[:, None] - tastes).sum(-1) > 1e-4
    return liked[:, :-2], liked[:, -2], liked[:, -1], differs


def summarize_cross(liked, base, zero, differs):
    """See cross_utilities -> a dict of means and rates with intervals, users and captions
    resampled together. gain: of one's own image over the base's. population_gain: of the images
    made for others. personal_gain: the difference, and its share of the gain. own_over_other: of
    others of another taste. right_assignment: of two users' two images the better of both ways."""

    def statistics(users, captions):
        u = liked[np.ix_(users, users, captions)]
        b, z = (arm[np.ix_(users, captions)] for arm in (base, zero))
        own = np.einsum("iic->ic", u)
        others = users[:, None] != users  # resampled, a user may meet themselves
        different = differs[np.ix_(users, users)]
        gain = (own - b).mean()
        population = mean_of((u - b[:, None])[others])
        both = own[:, None] + own[None]
        crossed = u + u.transpose(1, 0, 2)
        return dict(
            gain=gain,
            population_gain=population,
            personal_gain=gain - population,
            share=(gain - population) / gain if gain else 0.0,
            own_over_other=mean_of(win_indicator(own[:, None], u)[different]),
            own_over_zero=win_indicator(own, z).mean(),
            right_assignment=mean_of(win_indicator(both, crossed)[different]),
            win_rate=win_indicator(own, b).mean(),
            zero_win_rate=win_indicator(z, b).mean(),
            other_win_rate=mean_of(win_indicator(u, b[:, None])[different]),
        )

    n, n_captions = base.shape
    values = statistics(np.arange(n), np.arange(n_captions))
    intervals = bootstrap_ci(statistics, n, n_captions)
    result = {}
    for name, value in values.items():
        kind = "mean" if name.endswith("gain") else "rate"
        result[name] = {kind: round(float(value), 4), "n": n, "ci95": intervals[name]}
    result["personal_gain"]["share"] = result["share"]["rate"]
    return result


def generate_arm(args, base, captions, adapter, embeddings, desc=None, first=0):
    """Images of captions, from number `first` on, by one arm of a comparison: embeddings (1, D) for
    all, (B, D), or None for the base. Every arm gets the same noise."""
    adapter.install(base.attention_layers())
    seeds = [args.seed + first + i for i in range(len(captions))]
    return generate(base, captions, seeds, adapter, embeddings, desc=desc, **args.sampling)


def users_table(result):
    titles = dict(gain="gain over the base", population_gain="of it the population's")
    titles |= dict(personal_gain="of it personal", share="personal share of the gain")
    titles |= dict(own_over_other="own image over one for another taste")
    titles |= dict(own_over_zero="own image over the zero user's")
    titles |= dict(right_assignment="two images to their two users")
    titles |= dict(win_rate="own image over the base's")
    titles |= dict(zero_win_rate="the zero user's image over the base's")
    titles |= dict(other_win_rate="another's image over the base's")
    titles |= dict(fidelity="color and shape kept")
    titles |= dict(readout="read-out of one's own in the taste, cosine")
    kinds = {kind: result[kind] for kind in KINDS if kind in result}
    header = [f"{KINDS[kind]}, n = {r['gain']['n']}" for kind, r in kinds.items()]
    rows = [[title, *(format_value(r[k]) for r in kinds.values())] for k, title in titles.items()]
    base = format_rate(result["base"], with_n=True)
    note = f"{len(result['captions'])} held-out captions each. Color and shape, base: {base}."
    return f"{markdown_table(['users', *header], rows)}\n\n{note}"


def choices(args):
    """How many of users' real held-out choices the adapter predicts, by the sign of Eq. 6's logit,
    under their own, the zero and another user's embedding. No images are made and nobody judges;
    on the drawn world beside who reads the four choices perfectly, and who knows the true taste."""
    adapter, users, pairs, settings = load_run(args)
    data = Path(settings["data"])
    is_drawn = (data / "people.json").is_file() and not settings.get("one_hot")
    tastes, _, new, stats = world.load_true_tastes(data) if is_drawn else ({}, {}, (), {})
    find = rows_by_id(data) if is_drawn else None
    rows = held_out_rows(users, pairs, new)
    base = load_base_for(adapter, args)
    t_min = adapter.header.get("recipe", {}).get("t_min", 0.001)
    result = dict(t_min=t_min, draws=N_DRAWS)
    gathered = tempfile.TemporaryDirectory(prefix="ppd-choices-")  # removed whatever happens
    for kind, found in rows.items():
        # latents are cached of others
        chosen, images = readable_pairs(found, data, base.codec, gathered.name, args.n or 500)
        names = [row["user"] for row in chosen]
        others = other_users(names)
        own = load_embeddings(adapter, users, names, [row["groups"][0] for row in chosen])
        arms = dict(own=own, zero=adapter.mean.expand_as(own), other=own[others])
        logits = implicit_logits(base, adapter, chosen, images, arms, t_min, args.batch)
        right = {arm: win_indicator(v.mean(1).numpy(), 0) for arm, v in logits.items()}
        if is_drawn:
            shots, pair = shown_axes(data, users, chosen, images.data, find)
            first = world.predict_choices(shots, pair, stats["common"], kind == "new_taste")
            right["perfect_reader"] = win_indicator(first, 0.5)
            gap = (pair[:, 0] - pair[:, 1]) * look_up(tastes, names)
            right["true_taste"] = win_indicator(gap.sum(1), 0)
        result[kind] = summarize_choices(right, names)
        by_pair = logits["own"].mean(1).std(), logits["own"].std(1).mean() / N_DRAWS**0.5
        sd, noise = (round(float(value), 4) for value in by_pair)
        result[kind]["logit"] = dict(sd=sd, noise=noise, n=len(chosen))
        by_t = win_indicator(logits["own"].numpy(), 0).mean(
            0
        )  # at each of implicit_logits' timesteps
        result[kind]["by_t"] = [round(float(rate), 4) for rate in by_t]
    rates = {arm.replace("_", " "): {k: result[k][arm] for k in rows} for arm in right}
    figure = plots.draw_bars("Held-out choices predicted, with 95% intervals", rates, "accuracy")
    report(args, result, choices_table(result), dict(choices=figure))


def other_users(names):
    """For each row the index of another user's, half the list away; InputError of one user."""
    n = len(names)
    if len(set(names)) < 2:
        raise InputError(f"{n} choices, of fewer than two users; expected more: give a larger --n")
    return [
        next(j % n for j in range(i + n // 2, i + n // 2 + n) if names[j % n] != name)
        for i, name in enumerate(names)
    ]


def shown_axes(data, users, rows, folder, find):
    """Standardized axes, preferred first, of what conditions each row, (B, 4, 2, 5), and of its own
    two images in `folder`, (B, 2, 5). find: see rows_by_id."""
    shots, pairs = [], []
    for row in rows:
        group = load_user(users / f"{row['user']}.pt")["shots"][row["groups"][0]]
        shots += [image for _, *images in load_shots(data, find(group)) for image in images]
        pairs += read_images(folder, row, (row["preferred"], 1 - row["preferred"]))
    shots, pairs = (world.standardized(z).reshape(len(rows), -1, 2, 5) for z in (shots, pairs))
    return shots, pairs[:, 0]


def summarize_choices(right, names):
    """{arm: 1 where a choice is predicted, 0.5 for a tie (B,)} of the users `names` -> accuracies,
    and own minus zero and minus other, paired; intervals by resampling users (pairs, if users are
    fewer than ten), p of no difference by their spread, and McNemar's, of independent pairs."""
    size = dict(n=len(names), users=len(set(names)))
    clusters = names if size["users"] >= 10 else range(len(names))
    owner = np.unique(clusters, return_inverse=True)[1]
    counts = np.bincount(owner)
    per_user = {arm: np.bincount(owner, v) for arm, v in right.items()}

    def statistics(chosen):
        n = counts[chosen].sum()
        rates = {arm: total[chosen].sum() / n for arm, total in per_user.items()}
        rates |= {f"own_over_{arm}": rates["own"] - rates[arm] for arm in ("zero", "other")}
        return rates

    values = statistics(np.arange(len(counts)))
    intervals = bootstrap_ci(statistics, len(counts))
    result = {}
    for name, value in values.items():
        kind = "mean" if name.startswith("own_over") else "rate"
        result[name] = {kind: round(float(value), 4)} | size | dict(ci95=intervals[name])
    for arm in ("zero", "other"):
        low, high = intervals[f"own_over_{arm}"]
        only = [int((right[a] > right[b]).sum()) for a, b in (("own", arm), (arm, "own"))]
        p = mcnemar(*only)
        test = dict(own_only=only[0], other_only=only[1], mcnemar_p=p)
        if low < high:
            z_score = abs(values[f"own_over_{arm}"]) / ((high - low) / (2 * 1.96))
            p = math.erfc(z_score / 2**0.5)
        result[f"own_over_{arm}"] |= test | dict(p=p)
    return result


def mcnemar(a, b):
    """Two-sided exact p of discordant counts a and b: a fair coin, thrown a + b times."""
    n, least = a + b, min(a, b)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)


def choices_table(result):
    titles = dict(own="own embedding", zero="zero user", other="another's embedding")
    titles |= dict(perfect_reader="a perfect reader of the four choices")
    titles |= dict(true_taste="the true taste")
    kinds = {kind: result[kind] for kind in KINDS if kind in result}
    rows = []
    for arm, title in titles.items():
        if all(arm in r for r in kinds.values()):
            rows.append([title, *(format_rate(r[arm]) for r in kinds.values())])
    for arm in ("zero", "other"):
        cells = []
        for r in kinds.values():
            d = r[f"own_over_{arm}"]
            p = f"p = {d['p']:.1g}, McNemar {d['mcnemar_p']:.1g}"
            cells.append(f"{d['mean']:+.3f} ({format_ci(d, '+.3f')}; {p})")
        rows.append([f"own minus {titles[arm]}", *cells])
    noise = [f"{r['logit']['sd']:.3g}, {r['logit']['noise']:.3g}" for r in kinds.values()]
    rows.append(["logit at beta 1: s.d. over pairs, of one pair's mean", *noise])
    if all("by_t" in r for r in kinds.values()):
        by_t = [" ".join(f"{rate:.2f}" for rate in r["by_t"]) for r in kinds.values()]
        rows.append(["own embedding, by one timestep, low to high", *by_t])
    own = {KINDS[kind]: r["own"] for kind, r in kinds.items()}
    header = [f"{title}, {r['n']} choices of {r['users']}" for title, r in own.items()]
    return markdown_table(["choices predicted", *header], rows)


def to_flags(settings, keys):
    """Settings as command-line flags; what is unset or off is left out."""
    flags = []
    for key in keys:
        value = settings.get(key)
        if value is not None and value is not False:  # 0 is a value
            values = value if isinstance(value, list) else [value]
            flags += [utils.flag(key), *(v for v in values if v is not True)]
    return flags


def expected_recipe(adapter, changes):
    """A baseline's settings: the adapter's but for the changes."""
    if "recipe" not in adapter.header:
        problem = "its header has no recipe, train.py's settings, to train baselines alike"
        raise InputError(f"{adapter.path}: {problem}")
    return adapter.header["recipe"] | changes


def baseline_flags(args, adapter, name, users, changes):
    """train.py's flags for a baseline of --baselines."""
    expected = expected_recipe(adapter, changes)
    flags = to_flags(adapter.header | expected, ("base", "grid", *expected))
    flags += to_flags(vars(args), (*DATA_FLAGS, "device"))
    flags += ["--users", users, "--out", Path(args.baselines) / name, "--preview-every", 0]
    return [*flags, "--resume"]


def train_baseline(args, adapter, name, users, changes):
    """The adapter --baselines/<name>: trained by train.py unless it is there, as long as `adapter`
    and with its settings but for the changes; InputError if it was trained with others."""
    folder = Path(args.baselines) / name
    expected = expected_recipe(adapter, changes)
    is_there = (folder / "adapter.safetensors").exists()
    if is_there and (folder / "state.pt").exists():  # perhaps stopped on the way
        is_there = UserAdapter.load(folder).header["step"] >= expected["max_steps"]
    if not is_there:  # at full scale train it beforehand, see --plan
        utils.run_python("train.py", *baseline_flags(args, adapter, name, users, changes))
    baseline = UserAdapter.load(folder)
    header = baseline.header
    actual = header.get("recipe", {}) | dict(objective=header.get("objective"))
    actual["max_steps"] = header.get("step")
    for key, value in expected.items():
        if actual.get(key) != value:
            problem = f"trained with {key} {actual.get(key)}, but {adapter.path} is compared with"
            raise InputError(f"{folder}: {problem} {value}; choose another --baselines")
    return baseline


def load_reward_run(args, default_n):
    """An adapter for synthetic users -> it, their embeddings {name: (1, D)} in the order of the
    one-hot vector, their folder and settings, and --n prompts; InputError of what is no reward."""
    adapter, users, pairs, settings = load_run(args)
    names = {row["user"] for row in pairs}
    unknown = sorted(names - world.WORDS.keys() - REWARDS.keys())
    if unknown:
        raise InputError(f"--users {users}: {unknown[0]!r} is no reward; see embed.py --one-hot")
    names = sorted(names, key=lambda name: load_user(users / f"{name}.pt")["embedding"].argmax())
    held_out = sorted({row["caption"] for row in pairs if row["split"].startswith("test")})
    captions = read_prompts(args.prompts) if args.prompts else held_out
    if not captions:
        raise InputError(f"--users {users}: pairs.parquet has no test caption; give --prompts")
    n = args.n or (len(captions) if args.prompts else default_n)
    prompts = [captions[i % len(captions)] for i in range(n)]
    vectors = {name: load_user_embedding(adapter, users / f"{name}.pt") for name in names}
    return adapter, vectors, users, settings, prompts


def reward_arms(args, adapter, vectors, users, settings):
    """Table 1's methods and, for the sheet, the zero user: {(method, the reward its images are for,
    or "" for all): (adapter, embedding)}."""
    arms = {("base", ""): (adapter, None)}
    arms["zero user", ""] = (adapter, load_user_embedding(adapter, "zero"))
    ppd = {("PPD", name): (adapter, vector) for name, vector in vectors.items()}
    if not args.baselines:
        return arms | ppd
    own_labels = users.with_name(users.name + "-own")
    # {name: (users folder, what differs from the adapter's settings)}
    baselines = dict(dpo=(own_labels, dict(objective="dpo")), sft=(users, dict(objective="sft")))
    baselines |= {f"dpo-{n}": (users, dict(objective="dpo", only=[n])) for n in vectors}
    flags = to_flags(settings, ("data", *embed.SHARES))
    own = ["--users", own_labels, "--device", args.device]
    commands = [[*flags, *own, "--one-hot", "own"]]
    if args.latents or (Path(settings["data"]) / "latents").is_dir():
        cache = to_flags(adapter.header, ("base", "grid")) + to_flags(vars(args), DATA_FLAGS)
        commands.append(["--cache-latents", *own, *cache])
    if args.plan:
        for flags in commands:
            print(shlex.join(["python", "embed.py", *map(str, flags)]))
        for name, (folder, changes) in baselines.items():
            words = map(str, baseline_flags(args, adapter, name, folder, changes))
            print(shlex.join(["torchrun", "--nproc-per-node", "8", "train.py", *words]))
        return {}
    for flags in commands:
        utils.run_python("embed.py", *flags)
    trained = {name: train_baseline(args, adapter, name, *b) for name, b in baselines.items()}
    zero = {name: load_user_embedding(a, "zero") for name, a in trained.items()}
    arms["Diffusion-DPO", ""] = (trained["dpo"], zero["dpo"])
    arms |= {("SFT", name): (trained["sft"], vector) for name, vector in vectors.items()} | ppd
    for name in vectors:
        arms[UPPER_BOUND, name] = (trained[f"dpo-{name}"], zero[f"dpo-{name}"])
    return arms


def rewards(args):
    """Sec. 5.1, Table 1, Fig. 3: synthetic users, each a reward: mean rewards and win rates, on the
    drawn world also whether the caption's color and shape are there. With --baselines Diffusion-DPO
    on users' own labels, SFT that sees the user, and a Diffusion-DPO for each reward alone too."""
    adapter, vectors, users, settings, prompts = load_reward_run(args, 200)
    names = list(vectors)
    is_drawn = names[0] in world.WORDS
    arms = reward_arms(args, adapter, vectors, users, settings)
    if args.plan:
        return
    base = load_base_for(adapter, args)
    n_shown = min(len(prompts), len(set(prompts)), 12)
    scores, kept, sheet = defaultdict(list), defaultdict(list), defaultdict(list)
    for (method, arm), (arm_adapter, user) in arms.items():
        title = method.replace(UPPER_BOUND, "own DPO").replace("Diffusion-DPO", "DPO")
        wanted = prompts[:n_shown] if method == "zero user" else prompts
        for i in range(0, len(wanted), 4 * args.batch):  # scored as they come, to bound the memory
            part = wanted[i : i + 4 * args.batch]
            images = generate_arm(args, base, part, arm_adapter, user, f"{method} {arm}", first=i)
            sheet[f"{title}\n{arm}"] += images[: max(0, n_shown - i)]
            for name in names:
                scores[method, arm, name] += score(name, images, part, str(base.device)).tolist()
            kept[method, arm] += world.fidelity(images, part) if is_drawn else []
    own = defaultdict(dict)  # scores of the images that a method makes for this very reward
    for (method, arm, name), values in scores.items():
        if arm in ("", name) and method != "zero user":
            own[method][name] = values
    result = dict(table_1={}, figure_3={}, crossed={}, first={})  # first: for a test to do again
    for method, by_name in own.items():
        means = {name: mean_ci(values) for name, values in by_name.items()}
        if is_drawn:  # a prompt counts once
            per_prompt = np.mean([kept[key] for key in arms if key[0] == method], axis=0)
            means["fidelity"] = rate_ci(per_prompt)
        result["table_1"][method] = means
        result["first"][method] = {k: np.round(v[:12], 3).tolist() for k, v in by_name.items()}
    others = [method for method in own if method != "PPD"]
    for name, ours in own["PPD"].items():
        result["figure_3"][name] = {m: compare(ours, own[m][name]) for m in others}
        result["crossed"][name] = {arm: mean_ci(scores["PPD", arm, name]) for arm in names}
    if not is_drawn:
        result["models"] = {name: REWARDS[name][0] for name in names}
    labels = [prompt[:60] for prompt in prompts[:n_shown]]
    grid = plots.image_grid(list(zip(*sheet.values(), strict=True)), labels, list(sheet), 72)
    wins = result["figure_3"]
    series = {f"over {method}": {name: wins[name][method] for name in names} for method in others}
    bars = plots.draw_bars("PPD's win rate, with 95% intervals", series)
    report(args, result, rewards_table(result), dict(figure_3=bars, rewards=grid))


def rewards_table(result):
    names = list(result["figure_3"])
    titles = [result.get("models", {}).get(name, name) for name in names]
    n = result["table_1"]["PPD"][names[0]]["n"]
    means = [["mean reward", *titles, *([] if "models" in result else ["color and shape"])]]
    wins = [[f"PPD's win rate, n = {n}", *titles]]
    crossed = [["mean reward of PPD's images", *(f"for {title}" for title in titles)]]
    for method, r in result["table_1"].items():
        means.append([method, *map(format_value, r.values())])
    for method in result["figure_3"][names[0]]:
        rates = [result["figure_3"][name][method] for name in names]
        wins.append([f"over {method}", *map(format_rate, rates)])
    for title, r in zip(titles, result["crossed"].values(), strict=True):
        crossed.append([title, *map(format_mean, r.values())])
    return "\n\n".join(markdown_table(table[0], table[1:]) for table in (means, wins, crossed))


def load_judge(args):
    """A function from a prompt and four lists of images to the judge's four answers."""
    if not args.judge_url:
        vlm = llava.load_vlm(args.judge, utils.pick_device(args.device))
        return lambda text, asked: llava.generate_text(vlm, [text] * 4, asked)[0]
    endpoint = llava.Endpoint(args.judge_url, args.judge, args.judge_timeout)

    def ask(text, asked):
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(partial(endpoint.answer, text), asked))

    return ask


def parse_verdict(first, second):
    """Two answers about a pair, ours shown first and then second -> what they say together: "ours",
    "other", "inconsistent" (the answer follows the order) or "unparsable"."""
    pattern = r"CHOICE[\W_]*(?:PICTURE|IMAGE|OPTION)?[\W_]*([12])(?!\d)"
    answers = [re.sub(r"<[^>]*>", "", answer) for answer in (first, second)]  # without markup
    found = [re.findall(pattern, answer, re.IGNORECASE) for answer in answers]
    if not all(found):
        return "unparsable"
    return {"12": "ours", "21": "other"}.get(found[0][-1] + found[1][-1], "inconsistent")


def summarize_verdicts(verdicts):
    """Win rate among consistent verdicts, and how many were dropped."""
    won = [int(verdict == "ours") for verdict in verdicts if verdict in ("ours", "other")]
    dropped = {kind: verdicts.count(kind) for kind in ("inconsistent", "unparsable")}
    return (rate_ci(won) or dict(rate=None, n=0, ci95=None)) | dropped


def open_journal(args, adapter):
    """judge.jsonl and what is judged in it, {(kind, user): line}; InputError of other settings."""
    digest = hashlib.sha256(adapter.path.read_bytes()).hexdigest()[:16]
    settings = dict(judge=args.judge, url=args.judge_url, adapter=digest, seed=args.seed)
    settings |= dict(steps=args.steps, guidance=args.guidance)
    path = Path(args.out) / "judge.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = utils.read_jsonl(path) if path.exists() else []
    begun = lines[0] if lines else settings
    for key, value in settings.items():
        if begun.get(key) != value:
            problem = f"was begun with {key} {begun.get(key)}, not {value}"
            raise InputError(f"{path} {problem}; move it away or choose another --out")
    for number, line in enumerate(lines[1:], 2):
        if not {"kind", "user"} <= line.keys():
            raise InputError(f"{path} line {number}: no judgment; move the file away")
    utils.write_jsonl(path, [settings, *lines[1:]])
    return path, {(line["kind"], line["user"]): line for line in lines[1:]}


def judge(args):
    """Sec. 5.2, Fig. 5: who knows only a user's four choices judges which of two images of a
    held-out caption that user would choose, ours or the base's; a VLM here, or an OpenAI-compatible
    endpoint. Each pair is shown in both orders, and answers that follow the order are dropped and
    counted. Its accuracy is measured on the users' own held-out choices."""
    adapter, users, pairs, settings = load_run(args)
    data = Path(settings["data"])
    is_drawn = (data / "people.json").is_file()
    tastes, _, new, _ = world.load_true_tastes(data) if is_drawn else ({}, {}, (), {})
    selected = {
        kind: one_each(found, args.n or (277 if kind == "seen" else 192))
        for kind, found in held_out_rows(users, pairs, new).items()
    }
    cases = [(kind, row) for kind, found in selected.items() for row in found]
    rows = rows_by_id(data)
    args.judge = args.judge or load_user(users / f"{cases[0][1]['user']}.pt")["vlm"]
    base = load_base_for(adapter, args)
    journal, done = open_journal(args, adapter)
    numbered = [(*case, args.seed + i) for i, case in enumerate(cases)]
    pending = [case for case in numbered if (case[0], case[1]["user"]) not in done]
    ask = load_judge(args) if pending else None
    sheet = []
    for i in tqdm(range(0, len(pending), args.batch), desc="judging", disable=None):
        kinds, chunk, seeds = zip(*pending[i : i + args.batch], strict=True)
        captions = [row["caption"] for row in chunk]
        names = [row["user"] for row in chunk]
        embeddings = load_embeddings(adapter, users, names, [row["groups"][0] for row in chunk])
        theirs = generate(base, captions, seeds, **args.sampling)
        ours = generate(base, captions, seeds, adapter, embeddings, **args.sampling)
        for kind, row, *pair in zip(kinds, chunk, ours, theirs, strict=True):
            user = row["user"]
            try:
                group = load_user(users / f"{user}.pt")["shots"][row["groups"][0]]
                shots = load_shots(data, rows(group))
                real = read_images(data, row, (row["preferred"], 1 - row["preferred"]))
            except InputError as problem:
                print(f"user {user} is left out: {problem}", file=sys.stderr)
                continue
            text = llava.build_vlm_prompt([shot[0] for shot in shots], "judge", row["caption"])
            images = [image for shot in shots for image in shot[1:]]
            answers = ask(text, [images + p for p in (pair, pair[::-1], real, real[::-1])])
            line = dict(kind=kind, user=user, pictures=parse_verdict(*answers[:2]))
            line["real"] = parse_verdict(*answers[2:])
            if tastes:
                utilities = world.utility(look_up(tastes, [user])[0], pair)
                line["truth"] = float(win_indicator(*utilities))
            done[kind, user] = line
            utils.append_line(journal, json.dumps(line))
            if len(sheet) < 8:
                sheet.append((f"{user}\n{kind}: {line['pictures']}", *pair[::-1]))
    accuracy = summarize_verdicts([line["real"] for line in done.values()])
    result = dict(judge=args.judge, people={}, accuracy=accuracy)
    truth = {}
    for kind in (*selected, "all"):
        lines = [line for line in done.values() if kind in (line["kind"], "all")]
        result["people"][kind] = summarize_verdicts([line["pictures"] for line in lines])
        if is_drawn:
            truth[kind] = rate_ci([line["truth"] for line in lines])
    result |= dict(truth=truth) if is_drawn else {}
    images = {}  # if nothing was left to judge the sheet is there already
    if sheet:
        labels, *arms = zip(*sheet, strict=True)
        images["judge"] = plots.image_grid(arms, ["base", "theirs"], labels)
    if all(r["n"] for r in result["people"].values()):
        series = {"by the true taste": truth} if is_drawn else {}
        series[f"by the judge, {Path(args.judge).name}"] = result["people"]
        images["figure_5"] = plots.draw_bars("Win rate over the base, with 95% intervals", series)
    report(args, result, judge_table(result), images)


def judge_table(result):
    header = ["users", "win rate over base, judged", "95%", "judged", "inconsistent", "unparsable"]
    rows = []
    for name, r in (result["people"] | {"the judge on real choices": result["accuracy"]}).items():
        truth = result.get("truth", {}).get(name)
        true = [format_rate(truth), truth["n"]] if truth else ["-", "-"]
        rows.append([name, *rate_cells(r), r["n"], r["inconsistent"], r["unparsable"], *true])
    return markdown_table([*header, "by the true taste", "n"], rows)


COMMANDS = dict(users=evaluate_users, choices=choices, judge=judge, rewards=rewards)


def main(argv=None):
    args = parse_args(argv)
    utils.run_script("evaluate.py", COMMANDS[args.command], args)


if __name__ == "__main__":
    main()
