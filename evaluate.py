"""The paper's numbers: Fig. 5, Table 1 and Fig. 3. experiments.py has Fig. 2, 4 and 6.

    python evaluate.py                            # Fig. 5: users read by the VLM, seen and unseen
    python evaluate.py choices                    # does the adapter predict users' real choices?
    python evaluate.py judge                      # Fig. 5: a VLM or an endpoint judges for them
    python evaluate.py rewards --baselines runs/onehot-baselines     # Table 1, Fig. 3

Results go to evaluation.json and .md, where each subcommand has its part, and to images, beside the
adapter or in --out; every rate and mean with its n and a 95% interval. Both arms of a comparison
get the same prompts and noise.
"""

import base64
import hashlib
import io
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import embed
import plots
import utils
from data import (
    ImagePairs,
    hash_fraction,
    held_out_rows,
    load_shots,
    load_user,
    read_images,
    read_pairs,
    read_rows,
)
from ppd import UserAdapter
from rewards import N_DRAWS, REWARDS, implicit_logits, score
from sample import generate, load_base_for, load_user_embedding, read_prompts
from tiny import world
from utils import InputError

MOVED = ("interpolate", "classify", "profiles")  # to experiments.py
JUDGE_RETRIES = 6  # of a busy or failing endpoint
UPPER_BOUND = "one Diffusion-DPO a reward"
KINDS = dict(seen="seen", new_user="new")
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
    add("--prompts", help="captions, as sample.py takes them (default: the held-out ones)")
    add("--steps", type=int, help="denoising steps (default: tiny 20, full scale 30)")
    add("--guidance", type=float, help="classifier-free guidance (default: tiny 2, full scale 4)")
    add("--batch", type=int, default=50, help="images at once (default: %(default)s)")
    add("--seed", type=int, default=10_000, help="of the first image (default: %(default)s)")
    add("--out", help="folder to write (default: the adapter's)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")


def parse_args(argv=None):
    parser = utils.make_parser("evaluate.py", __doc__)
    add = parser.add_argument
    add("command", nargs="?", choices=(*COMMANDS, *MOVED), default="people", metavar="COMMAND")
    add("--n", type=int, help="users of a kind (200; judge 277, 192), choices (500), images (200)")
    add("--judge", help="a VLM, or the endpoint's model (default: the VLM that read the users)")
    add("--judge-url", help="OpenAI-compatible, like https://host/v1; key from OPENAI_API_KEY")
    add("--judge-timeout", type=float, default=120, help="seconds an answer (default: %(default)s)")
    common_arguments(parser)
    args, unknown = parser.parse_known_args(argv)
    if args.command in MOVED:
        parser.error(f"{args.command} moved: python experiments.py {args.command}")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.adapter = args.adapter or ("runs/onehot" if args.command == "rewards" else "runs/ppd")
    finish_args(args, parser, argv)
    if args.judge_url and not args.judge:
        parser.error("--judge-url wants the endpoint's model too: --judge MODEL")
    return args


def finish_args(args, parser, argv):
    """Check the shared flags; add where to write, and the command and time to put with results."""
    for key, least in dict(n=2, steps=1, batch=1).items():
        value = getattr(args, key)
        if value is not None and value < least:
            parser.error(f"--{key} {value}: expected {least} or more")
    problem = "no such file or folder; train.py writes runs/<name>"
    if args.adapter and not Path(args.adapter).exists():
        parser.error(f"--adapter {args.adapter}: {problem}")
    if args.out is None:
        adapter = Path(args.adapter)
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


def bootstrap_ci(statistics, n):
    """95% intervals of statistics over n clusters that are resampled: statistics(indices) -> {name:
    number}; returns {name: [low, high]}."""
    rng = np.random.default_rng(0)
    draws = [statistics(rng.integers(n, size=n)) for _ in range(BOOTSTRAP)]
    intervals = {}
    for name in draws[0]:
        low, high = np.quantile([draw[name] for draw in draws], (0.025, 0.975))
        intervals[name] = [round(float(low), 4), round(float(high), 4)]
    return intervals


def ridge(x, y, strength=10.0):
    """Ridge regression of y (B, M) on x (B, N) with an intercept -> a function from x to y."""
    add_ones = torch.nn.ConstantPad1d((0, 1), 1.0)
    x = add_ones(x)
    solution = torch.linalg.solve(x.T @ x + strength * torch.eye(x.shape[1]), x.T @ y)
    return lambda new: add_ones(new) @ solution


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


def lookup(table, keys, missing):
    """The values of keys in a dict; of one that is not there InputError, "<missing> <key> ..."."""
    for key in keys:
        if key not in table:
            raise InputError(f"{missing} {key} there; expected the data the users were read from")
    return [table[key] for key in keys]


def load_true_tastes(data):
    """What drawn users truly like, from the data's people.json: a function from users' names to
    weights (B, 5), and one to words. InputError without that file, or of names not in it."""
    path = Path(data) / "people.json"
    if not path.is_file():
        raise InputError(f"--data: no {path}; of users who are not drawn ask evaluate.py judge")
    truth = utils.read_json(path)
    weights = {str(i): taste for i, taste in enumerate(truth["tastes"])}
    words = {str(i): ", ".join(taste) for i, taste in enumerate(truth["words"])}
    return (
        lambda names: torch.tensor(lookup(weights, names, f"{path}: no user")),
        lambda names: lookup(words, names, f"{path}: no user"),
    )


def rows_by_id(data):
    """A function from ranking ids to the rows of a data folder; InputError of an id not there."""
    rows = {row["ranking_id"]: row for row in read_rows(data)}
    return lambda ids: lookup(rows, ids, f"--data {data}: no pair of ranking id")


def select_test_pairs(users, pairs, **counts):
    """A held-out pair of each of so many users, by hash: seen=n, unseen=n -> {kind: rows}."""
    first = {(row["split"], row["user"]): row for row in reversed(pairs)}  # the first row wins
    selected = {}
    for kind, n in counts.items():
        rows = [row for (split, _), row in first.items() if split == f"test-{kind}"]
        if len(rows) < 2:
            found = f"{len(rows)} {kind} users to test"
            raise InputError(f"--users {users}: {found}; expected 2 or more")
        selected[kind] = sorted(rows, key=lambda row: hash_fraction("evaluation", row["user"]))[:n]
    return selected


def load_embeddings(adapter, folder, names, groups=None):
    """Standardized embeddings of users, (B, D): of their group 0, or one of `groups` each."""
    chosen = zip(names, groups or [0] * len(names), strict=True)
    return torch.cat([load_user_embedding(adapter, folder / f"{n}.pt", g) for n, g in chosen])


def load_profiles(args, users, names, data):
    """What the VLM wrote, or writes now, of each user's first group after "User profile:"."""
    files = [load_user(users / f"{name}.pt") for name in names]
    texts = [file["profile"][0] if file["profile"] else None for file in files]
    if None in texts:
        rows = rows_by_id(data)
        vlm = embed.load_vlm(files[0]["vlm"], utils.pick_device(args.device))
        step = 50 if files[0]["vlm"] == "tiny" else 1
        for i in tqdm(range(0, len(files), step), "writing profiles", leave=False, disable=None):
            groups = [load_shots(data, rows(file["shots"][0])) for file in files[i : i + step]]
            _, texts[i : i + step] = embed.embed_users(vlm, groups, profile=True)
        del vlm  # free its memory
        torch.cuda.empty_cache()
    profiles = [re.split(r"user profile\W*:\W*", t, flags=re.IGNORECASE)[-1] for t in texts]
    return [" ".join(profile.split()).rstrip(".") for profile in profiles]


def evaluate_users(args):
    """Sec. 5.2: users whom the VLM read from four choices, seen and unseen, one held-out caption
    each: win rate over the base, and mean true reward (by people.json, which nothing else reads).
    Controls, for the unseen: another user's embedding, the zero user, and the true taste, as it
    looks to the VLM by a linear fit over the training users. The reverse fit, from embedding to
    taste, tells how much of an unseen user's taste is in their embedding."""
    adapter, users, pairs, settings = load_run(args)
    tastes, words = load_true_tastes(settings["data"])
    test_pairs = select_test_pairs(users, pairs, seen=args.n or 200, unseen=args.n or 200)
    names = {kind: [row["user"] for row in rows] for kind, rows in test_pairs.items()}
    captions = {kind: [row["caption"] for row in rows] for kind, rows in test_pairs.items()}
    base = load_base_for(adapter, args)
    train_users = sorted({row["user"] for row in pairs if row["split"] == "train"})
    train_embeddings = load_embeddings(adapter, users, train_users).cpu()
    train_tastes = tastes(train_users)
    own = load_embeddings(adapter, users, names["unseen"]).cpu()
    predicted = ridge(train_tastes, train_embeddings)(tastes(names["unseen"]))
    arms = {  # whose captions and tastes, and with which embeddings
        "seen base": ("seen", None),
        "seen": ("seen", load_embeddings(adapter, users, names["seen"])),
        "unseen base": ("unseen", None),
        "unseen": ("unseen", own),
        "other_user": ("unseen", own.roll(1, 0)),
        "zero": ("unseen", torch.zeros_like(own)),
        "true_taste": ("unseen", predicted * own.norm() / predicted.norm()),
    }
    images, scores, result = {}, {}, dict(people={})
    for arm, (kind, embeddings) in arms.items():
        images[arm] = generate_arm(args, base, captions[kind], adapter, embeddings, arm)
        scores[arm] = world.utility(tastes(names[kind]).numpy(), images[arm])
        if embeddings is not None:
            result["people"][arm] = compare(scores[arm], scores[f"{kind} base"])
    fidelity = {}
    for arm, suffix in (("base", " base"), ("ppd", "")):
        scores[arm] = np.concatenate([scores[f"seen{suffix}"], scores[f"unseen{suffix}"]])
        both = images[f"seen{suffix}"] + images[f"unseen{suffix}"]
        fidelity[arm] = rate_ci(world.fidelity(both, captions["seen"] + captions["unseen"]))
    result["people"]["all"] = compare(scores["ppd"], scores["base"])
    result["own_over_other"] = compare(scores["unseen"], scores["other_user"])
    readout = ridge(train_embeddings, train_tastes)(own)
    cosine = torch.cosine_similarity(readout, tastes(names["unseen"]))
    result |= dict(readout=mean_ci(cosine.tolist()), fidelity=fidelity)
    shown = sorted(set(captions["unseen"]))[:8]  # on the sheet, by four users of each kind
    sheet_users = names["seen"][:4] + names["unseen"][:4]
    embeddings = [None, *load_embeddings(adapter, users, sheet_users).split(1)]
    sheet = [generate_arm(args, base, shown, adapter, embedding) for embedding in embeddings]
    profiles = load_profiles(args, users, sheet_users, settings["data"])
    labels = ["base"]
    for name, likes, profile in zip(sheet_users, words(sheet_users), profiles, strict=True):
        kind = "seen" if name in names["seen"] else "unseen"
        labels.append(f"{name}, {kind}\nlikes {likes}\nVLM: {profile[:40]}")
    report(args, result, people_table(result), dict(people=plots.image_grid(sheet, labels, shown)))


def generate_arm(args, base, captions, adapter, embeddings, desc=None, first=0):
    """Images of captions, from number `first` on, by one arm of a comparison: embeddings (1, D) for
    all, (B, D), or None for the base. Every arm gets the same noise."""
    adapter.install(base.attention_layers())
    seeds = [args.seed + first + i for i in range(len(captions))]
    return generate(base, captions, seeds, adapter, embeddings, desc=desc, **args.sampling)


def people_table(result):
    controls = dict(other_user="another's embedding", zero="the zero user")
    controls["true_taste"] = "their true taste"
    header = ["users", "win rate over base", "95%", "n", "true reward, base", "true reward, theirs"]
    rows = []
    for name in ("seen", "unseen", "all", *controls):
        r = result["people"][name]
        title = f"unseen, by {controls[name]}" if name in controls else name
        means = [f"{r['mean_other']:+.2f}", f"{r['mean']:+.2f}"]
        rows.append([title, *rate_cells(r), r["n"], *means])
    readout = result["readout"]
    own = format_rate(result["own_over_other"], with_n=True)
    base, ours = (format_rate(result["fidelity"][arm], with_n=True) for arm in ("base", "ppd"))
    return (
        f"{markdown_table(header, rows)}\n\nAn unseen user's own embedding wins over another's in "
        f"{own}. Read-out of the true taste from it: cosine {readout['mean']:.3f} "
        f"({format_ci(readout)}). Color and shape as the caption says: base {base}, personalized "
        f"{ours}."
    )


def choices(args):
    """How many of users' real held-out choices the adapter predicts, by the sign of Eq. 6's logit,
    under their own, the zero and another user's embedding. No images are made and nobody judges;
    on the drawn world beside who reads the four choices perfectly, and who knows the true taste."""
    adapter, users, pairs, settings = load_run(args)
    data = Path(settings["data"])
    is_drawn = (data / "people.json").is_file() and not settings.get("one_hot")
    tastes = load_true_tastes(data)[0] if is_drawn else None
    find = rows_by_id(data) if is_drawn else None
    rows = held_out_rows(users, pairs)
    base = load_base_for(adapter, args)
    t_min = adapter.header.get("recipe", {}).get("t_min", 0.001)
    result = dict(choices={}, t_min=t_min, draws=N_DRAWS)
    for kind, found in rows.items():
        images = ImagePairs(data, base.codec, found)  # latents are cached of others
        chosen = readable_rows(found, images, args.n or 500)
        names = [row["user"] for row in chosen]
        others = other_users(names)
        own = load_embeddings(adapter, users, names, [row["groups"][0] for row in chosen])
        arms = dict(own=own, zero=torch.zeros_like(own), other=own[others])
        logits = implicit_logits(base, adapter, chosen, images, arms, t_min, args.batch)
        right = {arm: win_indicator(v.mean(1).numpy(), 0) for arm, v in logits.items()}
        if is_drawn:
            shots, pair = shown_axes(data, users, chosen, find)
            right["perfect_reader"] = win_indicator(world.predict_choices(shots, pair), 0.5)
            gap = (pair[:, 0] - pair[:, 1]) * tastes(names).numpy()
            right["true_taste"] = win_indicator(gap.sum(1), 0)
        result["choices"][kind] = summarize_choices(right, names)
        by_pair = logits["own"].mean(1).std(), logits["own"].std(1).mean() / N_DRAWS**0.5
        sd, noise = (round(float(value), 4) for value in by_pair)
        result["choices"][kind]["logit"] = dict(sd=sd, noise=noise, n=len(chosen))
    kinds = result["choices"]
    figure = {arm.replace("_", " "): {k: kinds[k][arm] for k in kinds} for arm in right}
    title = "Held-out choices predicted, with 95% intervals"
    report(args, result, choices_table(result), dict(choices=plots.draw_bars(title, figure)))


def readable_rows(rows, images, n):
    """The first n rows whose images can be read; others are named."""
    readable = []
    for row in rows:
        if len(readable) == n:
            break
        try:
            images(row)
        except InputError as problem:
            print(f"left out: {problem}", file=sys.stderr)
        else:
            readable.append(row)
    return readable


def other_users(names):
    """For each row the index of a row of another user, half the list away where it can be.
    InputError if there is one user only."""
    n = len(names)
    if len(set(names)) < 2:
        raise InputError(f"{n} choices, of fewer than two users; expected more: give a larger --n")
    return [
        next(j % n for j in range(i + n // 2, i + n // 2 + n) if names[j % n] != name)
        for i, name in enumerate(names)
    ]


def shown_axes(data, users, rows, find):
    """Standardized axes, preferred first, of what conditions each row, (B, 4, 2, 5), and of its own
    two images, (B, 2, 5). find: see rows_by_id."""
    shots, pairs = [], []
    for row in rows:
        group = load_user(users / f"{row['user']}.pt")["shots"][row["groups"][0]]
        shots += [image for _, *images in load_shots(data, find(group)) for image in images]
        pairs += read_images(data, row, (row["preferred"], 1 - row["preferred"]))
    shots, pairs = (world.standardized(z).reshape(len(rows), -1, 2, 5) for z in (shots, pairs))
    return shots, pairs[:, 0]


def summarize_choices(right, names):
    """{arm: 1 where a choice is predicted, 0.5 for a tie (B,)} of the users `names` -> accuracies,
    and own minus zero and minus other, paired; intervals by resampling users, with p of no
    difference: from their spread, and McNemar's exact one, for which pairs are independent. With
    fewer than ten users pairs are resampled."""
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
        z_score = abs(values[f"own_over_{arm}"]) / max((high - low) / (2 * 1.96), 1e-9)
        only = [int((right[a] > right[b]).sum()) for a, b in (("own", arm), (arm, "own"))]
        test = dict(p=math.erfc(z_score / 2**0.5), own_only=only[0], other_only=only[1])
        result[f"own_over_{arm}"] |= test | dict(mcnemar_p=mcnemar(*only))
    return result


def mcnemar(a, b):
    """Two-sided exact p of discordant counts a and b: a fair coin, thrown a + b times."""
    n, least = a + b, min(a, b)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)


def choices_table(result):
    titles = dict(own="own embedding", zero="zero user", other="another's embedding")
    titles |= dict(perfect_reader="a perfect reader of the four choices")
    titles |= dict(true_taste="the true taste")
    kinds = result["choices"]
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
    header = [
        f"{KINDS[k]}, {r['own']['n']} choices of {r['own']['users']}" for k, r in kinds.items()
    ]
    return markdown_table(["choices predicted", *header], rows)


def run_python(script, *flags):
    """Run another script of this folder; its output is shown."""
    words = [str(word) for word in flags]
    process = subprocess.Popen([sys.executable, str(Path(__file__).with_name(script)), *words])
    try:
        process.wait()
    finally:  # after a KeyboardInterrupt too: it was asked to stop as well, and saves first
        code = process.wait()
    if code != 0:
        raise InputError(f"{script} {' '.join(words)} ended with exit status {code}")


def to_flags(settings, keys):
    """Settings as command-line flags; what is unset or off is left out."""
    flags = []
    for key in keys:
        value = settings.get(key)
        if value is not None and value is not False:  # 0 is a value
            values = value if isinstance(value, list) else [value]
            flags += [utils.flag(key), *(v for v in values if v is not True)]
    return flags


def train_baseline(args, adapter, name, users, **changes):
    """The adapter --baselines/<name>: trained by train.py unless it is there, as long as `adapter`
    and with its settings but for the changes; InputError if it was trained with others."""
    folder = Path(args.baselines) / name
    expected = adapter.header["recipe"] | changes
    is_there = (folder / "adapter.safetensors").exists()
    if is_there and (folder / "state.pt").exists():  # perhaps stopped on the way
        is_there = UserAdapter.load(folder).header["step"] >= expected["max_steps"]
    if not is_there:  # at full scale train it beforehand, with torchrun
        flags = to_flags(adapter.header | expected, ("base", "grid", *expected))
        flags += to_flags(vars(args), ("data", "decoder", "device"))
        flags += ["--users", users, "--out", folder, "--preview-every", 0, "--resume"]
        run_python("train.py", *flags)
    baseline = UserAdapter.load(folder)
    header = baseline.header
    actual = header["recipe"] | dict(objective=header["objective"], max_steps=header["step"])
    for key, value in expected.items():
        if actual[key] != value:
            problem = f"trained with {key} {actual[key]}, but {adapter.path} is to be compared with"
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
    flags = to_flags(settings, ("data", "validation_captions", "test_captions", "unseen_users"))
    flags += ["--users", own_labels, "--device", args.device, "--one-hot", "own"]
    run_python("embed.py", *flags)
    dpo = train_baseline(args, adapter, "dpo", own_labels, objective="dpo")
    arms["Diffusion-DPO", ""] = (dpo, load_user_embedding(dpo, "zero"))
    sft = train_baseline(args, adapter, "sft", users, objective="sft")
    arms |= {("SFT", name): (sft, vector) for name, vector in vectors.items()} | ppd
    for name in vectors:
        upper = train_baseline(args, adapter, f"dpo-{name}", users, objective="dpo", only=[name])
        arms[UPPER_BOUND, name] = (upper, load_user_embedding(upper, "zero"))
    return arms


def rewards(args):
    """Sec. 5.1, Table 1, Fig. 3: synthetic users, each a reward: mean rewards and win rates, on the
    drawn world also whether the caption's color and shape are there. With --baselines Diffusion-DPO
    on users' own labels, SFT that sees the user, and a Diffusion-DPO for each reward alone too."""
    adapter, vectors, users, settings, prompts = load_reward_run(args, 200)
    names = list(vectors)
    is_drawn = names[0] in world.WORDS
    arms = reward_arms(args, adapter, vectors, users, settings)
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
    images = dict(figure_3=figure_3(result["figure_3"]), rewards=grid)
    report(args, result, rewards_table(result), images)


def figure_3(wins):
    """PPD's win rates, {reward: {method: compare()}}, as bars."""
    methods = next(iter(wins.values()))
    series = {f"over {method}": {name: wins[name][method] for name in wins} for method in methods}
    return plots.draw_bars("PPD's win rate, with 95% intervals", series)


def rewards_table(result):
    names = list(result["figure_3"])
    titles = [result.get("models", {}).get(name, name) for name in names]
    n = result["table_1"]["PPD"][names[0]]["n"]
    means = [["mean reward", *titles, *([] if "models" in result else ["color and shape"])]]
    wins = [[f"PPD's win rate, n = {n}", *titles]]
    crossed = [["mean reward of PPD's images", *(f"for {title}" for title in titles)]]
    for method, r in result["table_1"].items():
        cells = [format_rate(v) if "rate" in v else format_mean(v) for v in r.values()]
        means.append([method, *cells])
    for method in result["figure_3"][names[0]]:
        rates = [result["figure_3"][name][method] for name in names]
        wins.append([f"over {method}", *map(format_rate, rates)])
    for title, r in zip(titles, result["crossed"].values(), strict=True):
        crossed.append([title, *map(format_mean, r.values())])
    return "\n\n".join(markdown_table(table[0], table[1:]) for table in (means, wins, crossed))


def query_judge(client, args, text, images):
    """An OpenAI-compatible endpoint's answer to a prompt with one <image> an image; InputError."""
    words, *others = text.split("<image>")
    content = [dict(type="text", text=words)]
    for image, words in zip(images, others, strict=True):
        small = image.convert("RGB")
        small.thumbnail((512, 512))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=90)
        url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        content.append(dict(type="image_url", image_url=dict(url=url, detail="low")))
        content.append(dict(type="text", text=words))
    asked = dict(messages=[dict(role="user", content=content)], temperature=0, max_tokens=500)
    try:
        reply = client.chat.completions.create(model=args.judge, **asked)
        return (reply.choices[0].message.content or "").strip()
    except Exception as error:  # openai's, or of a reply that is no chat completion
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
        kept = "What is judged is kept: the same command goes on"
        raise InputError(f"--judge-url {args.judge_url}: {reason}. {kept}") from None


def load_judge(args):
    """A function from a prompt and four lists of images to the judge's four answers."""
    if not args.judge_url:
        vlm = embed.load_vlm(args.judge, utils.pick_device(args.device))
        return lambda text, asked: embed.generate_text(vlm, [text] * 4, asked)[0]
    import openai

    key = os.environ.get("OPENAI_API_KEY") or "none"
    settings = dict(max_retries=JUDGE_RETRIES, timeout=args.judge_timeout)
    client = openai.OpenAI(base_url=args.judge_url, api_key=key, **settings)

    def ask(text, asked):  # without the VLM's own chat markup
        text = text[len(embed.SYSTEM) : -len(embed.ASSISTANT_TURN)]
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda images: query_judge(client, args, text, images), asked))

    return ask


def parse_verdict(first, second):
    """Two answers about a pair, ours shown first and then second -> what they say together: "ours",
    "other", "inconsistent" (the answer follows the order) or "unparsable"."""
    found = [re.findall(r"CHOICE:\s*\**([12])", a, re.IGNORECASE) for a in (first, second)]
    if not all(found):
        return "unparsable"
    return {"12": "ours", "21": "other"}.get(found[0][-1] + found[1][-1], "inconsistent")


def summarize_verdicts(verdicts):
    """Win rate among consistent verdicts, and how many were dropped."""
    won = [int(verdict == "ours") for verdict in verdicts if verdict in ("ours", "other")]
    dropped = {kind: verdicts.count(kind) for kind in ("inconsistent", "unparsable")}
    return (rate_ci(won) or dict(rate=None, n=0, ci95=None)) | dropped


def open_journal(args, adapter):
    """judge.jsonl: what is judged already, {(kind, user): line}. InputError if it was begun with
    other settings."""
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
    selected = select_test_pairs(users, pairs, seen=args.n or 277, unseen=args.n or 192)
    cases = [(kind, row) for kind, rows in selected.items() for row in rows]
    seeds = {(kind, row["user"]): args.seed + i for i, (kind, row) in enumerate(cases)}
    rows = rows_by_id(data)
    is_drawn = (data / "people.json").is_file()
    tastes = load_true_tastes(data)[0] if is_drawn else None  # shown beside the judge
    args.judge = args.judge or load_user(users / f"{cases[0][1]['user']}.pt")["vlm"]
    base = load_base_for(adapter, args)
    journal, done = open_journal(args, adapter)
    pending = [(kind, row) for kind, row in cases if (kind, row["user"]) not in done]
    ask = load_judge(args) if pending else None
    sheet = []
    for i in tqdm(range(0, len(pending), args.batch), desc="judging", disable=None):
        chunk = pending[i : i + args.batch]
        captions = [row["caption"] for _, row in chunk]
        noise = [seeds[kind, row["user"]] for kind, row in chunk]
        embeddings = load_embeddings(adapter, users, [row["user"] for _, row in chunk])
        theirs = generate(base, captions, noise, **args.sampling)
        ours = generate(base, captions, noise, adapter, embeddings, **args.sampling)
        for k, (kind, row) in enumerate(chunk):
            try:
                shots = load_shots(data, rows(load_user(users / f"{row['user']}.pt")["shots"][0]))
                real = read_images(data, row, (row["preferred"], 1 - row["preferred"]))
            except InputError as problem:
                print(f"user {row['user']} is left out: {problem}", file=sys.stderr)
                continue
            text = embed.build_vlm_prompt([shot[0] for shot in shots], "judge", row["caption"])
            images = [image for shot in shots for image in shot[1:]]
            pair = [ours[k], theirs[k]]
            answers = ask(text, [images + p for p in (pair, pair[::-1], real, real[::-1])])
            line = dict(kind=kind, user=row["user"], pictures=parse_verdict(*answers[:2]))
            line["real"] = parse_verdict(*answers[2:])
            if tastes:
                utilities = world.utility(tastes([row["user"]]).numpy(), pair)
                line["truth"] = float(win_indicator(*utilities))
            done[kind, row["user"]] = line
            utils.append_line(journal, json.dumps(line))
            if len(sheet) < 8:
                sheet.append((f"{row['user']}\n{kind}: {line['pictures']}", theirs[k], ours[k]))
    result = dict(judge=args.judge, people={}, accuracy=None)
    truth = {}
    for kind in ("seen", "unseen", "all"):
        lines = [line for line in done.values() if kind in (line["kind"], "all")]
        result["people"][kind] = summarize_verdicts([line["pictures"] for line in lines])
        if is_drawn:
            truth[kind] = rate_ci([line["truth"] for line in lines])
    result["accuracy"] = summarize_verdicts([line["real"] for line in done.values()])
    result |= dict(truth=truth) if is_drawn else {}
    images = {}  # if nothing was left to judge the sheet is there already
    if sheet:
        labels, *arms = zip(*sheet, strict=True)
        images["judge"] = plots.image_grid(arms, ["base", "theirs"], labels)
    if all(r["n"] for r in result["people"].values()):
        images["figure_5"] = figure_5(result)
    report(args, result, judge_table(result), images)


def figure_5(result):
    """Win rates over the base by the judge, and by the true taste where it is known, as bars."""
    series = {"by the true taste": result["truth"]} if "truth" in result else {}
    series[f"by the judge, {Path(result['judge']).name}"] = result["people"]
    return plots.draw_bars("Win rate over the base, with 95% intervals", series)


def judge_table(result):
    header = ["users", "win rate over base, judged", "95%", "judged", "inconsistent", "unparsable"]
    rows = []
    for name, r in (result["people"] | {"the judge on real choices": result["accuracy"]}).items():
        truth = result.get("truth", {}).get(name)
        true = [format_rate(truth), truth["n"]] if truth else ["-", "-"]
        rows.append([name, *rate_cells(r), r["n"], r["inconsistent"], r["unparsable"], *true])
    return markdown_table([*header, "by the true taste", "n"], rows)


COMMANDS = dict(people=evaluate_users, choices=choices, judge=judge, rewards=rewards)


def main(argv=None):
    args = parse_args(argv)
    utils.run_script("evaluate.py", COMMANDS[args.command], args)


if __name__ == "__main__":
    main()
