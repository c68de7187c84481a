"""The paper's other experiments, each a subcommand; results go where evaluate.py's go.

python experiments.py interpolate --adapter runs/onehot          # Fig. 4: between three rewards
python experiments.py classify --users users-classify            # Fig. 2: whose embedding is it?
python experiments.py profiles --baselines runs/ppd-baselines    # Fig. 6: the profile in words
python experiments.py tune --out runs/tune                       # beta, t-min, guidance, steps
python experiments.py ablations --out runs/ablations             # one change at a time
python experiments.py words --adapter runs/words                 # the ten taste words
"""

import itertools
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import embed
import evaluate
import plots
import utils
from bases.images import load_shots
from data import hash_fraction, held_out_rows, load_user, look_up, one_each, read_pairs, rows_by_id
from ppd import UserAdapter
from rewards import REWARDS, score
from sample import load_base_for, load_user_embedding
from tiny import world
from utils import InputError, make_parser, run_script

TOP_K = (1, 2, 4, 8, 16)
# what tune tries, one setting after the other; the first of each is where it starts
TUNED = dict(beta=(1.0, 0.5, 2.0), t_min=(0.95, 0.85, 0.9))
TUNED |= dict(guidance=(3.0, 2.0, 1.5), steps=(8, 12, 20))
TRAINED = ("beta", "t_min")  # of these, what wants a new run
# what measure() gives, by its title in tables
MEASURED = {"personal gain": "gain", "own over another's": "own_over_other"}
MEASURED |= {"color and shape": "fidelity"}
# train.py's flags for one change from its defaults; see ablations
CHANGES = {"default": "", "default, seed 1": "--seed 1", "default, seed 2": "--seed 2"}
CHANGES |= {"1 user token": "--tokens 1", "projector without biases": "--bias-free"}
CHANGES |= {"no user drop": "--user-drop 0", "separate noise": "--noise separate"}
# what makes the loss explode, and its cures
COLLAPSE = {"no guard": "--lr 0.005 --beta 0.05", "guard": "--lr 0.005 --beta 0.05 --guard"}


def parse_args(argv=None):
    parser = make_parser("experiments.py", __doc__)
    add = parser.add_argument
    add("command", choices=list(EXPERIMENTS), metavar="COMMAND", help=", ".join(EXPERIMENTS))
    add("--n", type=int, help="captions (64), users (classify 300, profiles 200, tune etc. 40)")
    add("--train-steps", type=int, default=100, help="tune, ablations: of a run (%(default)s)")
    add("--shot-users", help="ablations: the same users, embedded with --shots 1")
    add("--profile-users", help="classify: the same users read by embed.py --profile")
    evaluate.common_arguments(parser)
    args = parser.parse_args(argv)
    if args.command == "classify":
        args.users = args.users or "users-classify"
        args.out = args.out or args.users
    elif args.command in ("tune", "ablations", "collapse"):
        args.users, args.out = args.users or "users", args.out or f"runs/{args.command}"
    else:
        args.adapter = args.adapter or "runs/ppd"
    if args.command == "profiles" and not args.baselines:
        parser.error("profiles wants --baselines FOLDER, for its Diffusion-DPO in the run dpo")
    evaluate.finish_args(args, parser, argv)
    return args


def interpolate(args):
    """Fig. 4: weights of three rewards, 11 along each edge and the corners of a grid of fifths
    inside; the mean score of --n images each, with the same captions and noise everywhere."""
    adapter, vectors, _, _, prompts = evaluate.load_reward_run(args, 64)
    names = list(vectors)
    if len(names) != 3:
        raise InputError(f"--adapter {args.adapter}: {len(names)} rewards; the simplex wants three")
    base = load_base_for(adapter, args)
    shown = min(2, len(prompts) - 1)  # the prompt of the figure
    scores, images = {}, {}
    for point in tqdm(simplex_points(), desc="weights", disable=None):
        blend = sum(w / 10 * vectors[name] for w, name in zip(point, names, strict=True))
        made = evaluate.generate_arm(args, base, prompts, adapter, blend)
        scores[point] = [score(name, made, prompts, str(base.device)) for name in names]
        images[point] = made[shown]
    result = dict(edges=[], map=[])
    for a, b in itertools.combinations(range(3), 2):
        points = sorted((p for p in scores if p[a] + p[b] == 10), key=lambda p: p[b])
        for k in (a, b):
            along = np.stack([scores[point][k] for point in points])
            means = [evaluate.mean_ci(row) for row in along]
            edge = dict(edge=[names[a], names[b]], reward=names[k], means=means)
            result["edges"].append(edge | spearman([point[k] for point in points], along))
    for point, values in scores.items():
        weights = {name: w / 10 for name, w in zip(names, point, strict=True)}
        means = {name: evaluate.mean_ci(v) for name, v in zip(names, values, strict=True)}
        result["map"].append(dict(weights=weights, means=means))
    figure = figure_4(result, f'"{prompts[shown]}", by weights', images)
    evaluate.report(args, result, interpolate_table(result), dict(figure_4=figure))


def simplex_points():
    """Weights in tenths, (i, j, k) of sum 10: all along the edges, fifths inside."""
    points = [(i, j, 10 - i - j) for i in range(11) for j in range(11 - i)]
    return [p for p in points if 0 in p or not (p[0] % 2 or p[1] % 2)]


def spearman(weights, scores):
    """Rank correlation of weights (W,) with the mean of scores (W, prompts) over prompts, 0 where
    those are constant, and its 95% bootstrap interval over prompts."""

    def ranks(x):  # ties share their average rank
        return [np.less(x, v).sum() + np.equal(x, v).sum() / 2 for v in x]

    def correlation(means):
        if np.ptp(means) == 0:
            return 0.0
        return float(np.corrcoef(ranks(weights), ranks(means))[0, 1])

    def statistics(prompts):
        return dict(spearman=correlation(scores[:, prompts].mean(1)))

    n = scores.shape[1]
    interval = evaluate.bootstrap_ci(statistics, n)["spearman"]
    return dict(spearman=round(correlation(scores.mean(1)), 4), n=n, ci95=interval)


def figure_4(result, title, images):
    """Images, {point: PIL image} as in result["map"], and mean scores over the simplex; edges."""
    names = list(result["map"][0]["weights"])
    means = dict(zip(images, (entry["means"] for entry in result["map"]), strict=True))
    fifths = [point for point in images if not (point[0] % 2 or point[1] % 2)]
    figure, axes = plots.new_figure(2, 4, size=(4.2, 4.2))
    plots.draw_simplex(axes[0], title, names, {point: images[point] for point in fifths})
    for axis, name in zip(axes[1:4], names, strict=True):
        values = {point: means[point][name]["mean"] for point in fifths}
        plots.draw_simplex(axis, f"mean {name}", names, values)
    ticks = [f"{w / 10:g}" for w in range(11)]
    pairs = zip(result["edges"][::2], result["edges"][1::2], strict=True)
    for axis, pair in zip(axes[4:7], pairs, strict=True):
        series = {}
        for edge in pair:
            line = [[m["mean"], *m["ci95"]] for m in edge["means"]]
            if edge["reward"] in REWARDS:  # in units of their own: here in deviations
                every = [by_name[edge["reward"]]["mean"] for by_name in means.values()]
                line = (np.array(line) - np.mean(every)) / np.std(every)
            series[edge["reward"]] = line
        a, b = pair[0]["edge"]
        plots.draw_lines(axis, f"from {a} to {b}", ticks, series, "mean score")
    axes[7].axis("off")
    return plots.to_image(figure)


def interpolate_table(result):
    header = ["edge", "score", "Spearman of its weight and its mean", "95%", "n"]
    rows = []
    for e in result["edges"]:
        row = [" to ".join(e["edge"]), e["reward"], f"{e['spearman']:.3f}", evaluate.format_ci(e)]
        ends = e["means"][::10] if e["reward"] == e["edge"][1] else e["means"][::-10]  # of the 11
        rows.append([*row, e["n"], *map(evaluate.format_mean, ends)])
    return evaluate.markdown_table([*header, "mean at weight 0", "at 1"], rows)


def classify(args):
    """Fig. 2: a classifier from a frozen embedding of one four-shot group to its user, by the VLM's
    layer, read after the prompt (--users) and after a written profile (--profile-users).

    One group a user is for the test, one to choose the epoch; a group that shares an image with
    either trains nothing (winners stay on screen, so many would). On the drawn world also two
    ceilings, as few tastes exist. Captions may recur in a user's groups: on real data that tells
    users apart too."""
    evaluate.read_results(args)
    users = Path(args.users)
    pairs, settings = read_pairs(users)
    data = Path(args.data or settings["data"])
    rows = rows_by_id(data)
    train_groups = select_users(args, users, pairs, rows)
    names = list(train_groups)
    n_groups = sum(map(len, train_groups.values()))
    result = dict(people=len(names), groups=n_groups, states={})
    use = "to train on, one each to choose the epoch, to test"
    print(f"{len(names)} users; {n_groups} groups {use}")
    for kind, folder in (("prompt", users), ("profile", args.profile_users)):
        if folder:
            files = [load_user(Path(folder) / f"{name}.pt") for name in names]
            check_same_shots(kind, folder, users, names, files)
            for state, ranks in rank_by_layer(kind, files, train_groups, args.seed):
                hits = {str(k): evaluate.rate_ci((ranks < k).float().tolist()) for k in TOP_K}
                result["states"][state] = hits
    result["chance"] = {str(k): k / len(names) for k in TOP_K}
    if (data / "people.json").is_file():
        result["ceilings"] = ceilings(data, users, names, rows)
    evaluate.report(args, result, classify_table(result), dict(figure_2=figure_2(result)))


def select_users(args, users, pairs, rows):
    """{user: groups to train on} of --n users of ten groups or more; InputError of under 20."""
    train_groups = {}
    names = {row["user"] for row in pairs}
    for name in sorted(names, key=lambda name: hash_fraction("classify", name)):
        groups = load_user(users / f"{name}.pt")["shots"]
        if len(groups) < 10:
            continue
        test, validation, *others = embed.images_shown(map(rows, groups))
        clean = [g for g, shown in enumerate(others, 2) if not shown & (test | validation)]
        if clean and not test & validation:
            train_groups[name] = clean
        if len(train_groups) == (args.n or 300):
            break
    if len(train_groups) < 20:
        problem = f"{len(train_groups)} users with ten groups or more; expected at least 20"
        raise InputError(f"--users {users}: {problem}. Embed with --groups 20 --layer all")
    return train_groups


def check_same_shots(kind, folder, users, names, files):
    for name, file in zip(names, files, strict=True):
        same = file["shots"] == load_user(users / f"{name}.pt")["shots"]
        if not same or bool(file["profile"]) != (kind == "profile"):
            expected = f"expected a user read after the {kind} from the same choices as in {users}"
            raise InputError(f"{Path(folder) / name}.pt: {expected}")


def rank_by_layer(kind, files, train_groups, seed):
    """For each stored layer, its name and every test embedding's rank of its own user."""
    owners = [i for i, groups in enumerate(train_groups.values()) for _ in groups]
    for layer in tqdm(range(files[0]["embedding"].shape[1]), f"classifiers, {kind}", disable=None):
        states = [file["embedding"][:, layer] for file in files]
        groups = zip(states, train_groups.values(), strict=True)
        train = torch.cat([state[list(g)] for state, g in groups])
        validation = torch.stack([state[1] for state in states])
        test = torch.stack([state[0] for state in states])
        name = layer if files[0]["layer"] == "all" else files[0]["layer"]
        ranks = classifier(train, torch.tensor(owners), validation, test, seed)
        yield f"{kind}, layer {name}", ranks


def classifier(x, owners, validation, test, seed, epochs=60):
    """An MLP from embeddings x (N, D) to users, owners (N,), at its best epoch on `validation` ->
    rank (0 is first) of each user for their own embedding in `test`; both (users, D), in order."""
    torch.manual_seed(seed)
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x, validation, test = ((v - mean) / std for v in (x, validation, test))
    hidden = [nn.Linear(x.shape[1], 256), nn.GELU(), nn.LayerNorm(256), nn.Dropout(0.3)]
    mlp = nn.Sequential(*hidden, nn.Linear(256, len(test)))
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=1e-3, weight_decay=1e-2)
    own = torch.arange(len(test))
    best_loss = math.inf
    for _ in range(epochs):
        mlp.train()
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(mlp(x[batch]), owners[batch], label_smoothing=0.1)
            loss.backward()
            optimizer.step()
        mlp.eval()
        with torch.no_grad():
            loss = nn.functional.cross_entropy(mlp(validation), own).item()
            if loss < best_loss:
                best_loss = loss
                logits = mlp(test)
                best_ranks = (logits > logits[own, own][:, None]).sum(1)
    return best_ranks


def ceilings(data, users, names, rows):
    """Top-k accuracy of who reads the four choices perfectly, and of who knows the true taste:
    neither can do better than guess among users of the same taste."""
    tastes = np.array(look_up(world.load_true_tastes(data)[0], names))
    tested = []
    for name in names:
        shots = load_shots(data, rows(load_user(users / f"{name}.pt")["shots"][0]))
        tested += [image for _, *images in shots for image in images]
    z = world.standardized(tested).reshape(len(names), -1, 2, len(world.AXES))
    gap = world.BRADLEY_TERRY_SCALE * (z[:, :, 0] - z[:, :, 1]) @ tastes.T
    likelihood = -np.logaddexp(0, -gap).sum(1)  # log, of these choices (row) by every user
    own = likelihood.diagonal()[:, None]
    n_better = (likelihood > own + 1e-6).sum(1)
    n_tied = (np.abs(likelihood - own) <= 1e-6).sum(1)
    n_same_taste = (np.abs(tastes[:, None] - tastes).sum(-1) < 1e-4).sum(1)
    reader, taste = {}, {}
    for k in TOP_K:
        reader[str(k)] = evaluate.rate_ci(np.clip((k - n_better) / n_tied, 0, 1).tolist())
        taste[str(k)] = evaluate.rate_ci(np.minimum(1, k / n_same_taste).tolist())
    return {"a perfect reader of the four choices": reader, "the true taste": taste}


def figure_2(result):
    """Top-k accuracy of the last layer, and top-16 accuracy by layer."""
    by_k, by_layer = {}, {}
    for kind in ("prompt", "profile"):
        rows = [row for name, row in result["states"].items() if name.startswith(kind)]
        if rows:
            by_k[f"{kind}, last layer"] = [(r["rate"], *r["ci95"]) for r in rows[-1].values()]
            by_layer[f"after the {kind}"] = [(r["16"]["rate"], *r["16"]["ci95"]) for r in rows]
    for name, row in result.get("ceilings", {}).items():
        by_k[name] = [r["rate"] for r in row.values()]
    by_k["chance"] = list(result["chance"].values())
    n_layers = len(by_layer["after the prompt"])
    by_layer["chance"] = [result["chance"]["16"]] * n_layers
    figure, (left, right) = plots.new_figure(1, 2)
    title = f"Which of {result['people']} users? Top k of the classifier"
    plots.draw_lines(left, title, [f"k = {k}" for k in TOP_K], by_k, "accuracy")
    title = "Top 16 by layer (0: the embedded last token)"
    plots.draw_lines(right, title, range(n_layers), by_layer, "accuracy")
    return plots.to_image(figure)


def classify_table(result):
    header = [f"embedding, {result['people']} users", *(f"top {k}" for k in TOP_K)]
    rows = [["chance", *(f"{value:.3f}" for value in result["chance"].values())]]
    for name, row in (result["states"] | result.get("ceilings", {})).items():
        rows.append([name, *map(evaluate.format_rate, row.values())])
    return evaluate.markdown_table(header, rows)


def profiles(args):
    """Fig. 6: the profile that the VLM writes of unseen users, appended to the caption, against
    PPD: base, Diffusion-DPO (in --baselines), both again with the profile, PPD; one held-out
    caption a user. Win rate and true reward where the truth is known, and how much of the caption
    is kept: its color and shape on the drawn world, else the CLIP score."""
    adapter, users, pairs, settings = evaluate.load_run(args)
    data = Path(settings["data"])
    is_drawn = (data / "people.json").is_file()
    tastes, words, new, _ = world.load_true_tastes(data) if is_drawn else ({}, {}, (), {})
    found = held_out_rows(users, pairs, new)
    unseen = found.get("new_user", []) + found.get("new_taste", [])
    if not unseen:
        raise InputError(f"--users {users}: nobody unseen to test; embed with --unseen-users")
    rows = one_each(unseen, args.n or 200)
    names = [row["user"] for row in rows]
    captions = [row["caption"] for row in rows]
    written = embed.load_profiles(users, names, data, args.device)
    with_profile = [f"{c}, {text}" for c, text in zip(captions, written, strict=True)]
    dpo = evaluate.train_baseline(args, adapter, "dpo", users, dict(objective="dpo"))
    base = load_base_for(adapter, args)
    most = base.tokenizer.model_max_length
    n_truncated = sum(len(base.tokenizer(text).input_ids) > most for text in with_profile)
    if n_truncated:
        print(f"{n_truncated} of {len(rows)} captions with a profile are too long, and are cut")
    zero_user = load_user_embedding(dpo, "zero")
    arms = {
        "base": (captions, adapter, None),
        "base, profile in the caption": (with_profile, adapter, None),
        "Diffusion-DPO": (captions, dpo, zero_user),
        "Diffusion-DPO, profile in the caption": (with_profile, dpo, zero_user),
        "PPD": (captions, adapter, evaluate.load_embeddings(adapter, users, names)),
    }
    images = {}
    for arm, (prompts, arm_adapter, user) in arms.items():
        images[arm] = evaluate.generate_arm(args, base, prompts, arm_adapter, user, arm)
    likes = [""] * len(names)
    result = dict(arms={})
    if is_drawn:
        likes = [f"likes {', '.join(words[name])}\n" for name in names]
        true = np.array(look_up(tastes, names))
        scores = {arm: world.utility(true, images[arm]) for arm in arms}
        for arm in arms:
            kept = evaluate.rate_ci(world.fidelity(images[arm], captions))
            won = evaluate.compare(scores[arm], scores["base"])
            result["arms"][arm] = won | dict(fidelity=kept)
        others = [arm for arm in arms if arm != "PPD"]
        result["over"] = {arm: evaluate.compare(scores["PPD"], scores[arm]) for arm in others}
    else:
        for arm in arms:
            clip = score("clip", images[arm], captions, str(base.device))
            result["arms"][arm] = dict(clip=evaluate.mean_ci(clip))
    result["profiles"] = dict(zip(names[:8], written, strict=False))
    cells = zip(captions[:8], likes, written, strict=False)
    labels = [f"{caption[:60]}\n{like}VLM: {text[:60]}" for caption, like, text in cells]
    sheet = list(zip(*(images[arm][:8] for arm in arms), strict=True))
    titles = [arm.replace(", profile in the caption", "\n+ profile") for arm in arms]
    figure = plots.image_grid(sheet, labels, titles)
    evaluate.report(args, result, profiles_table(result), dict(figure_6=figure))


def profiles_table(result):
    if "over" not in result:
        rows = [[arm, evaluate.format_mean(r["clip"])] for arm, r in result["arms"].items()]
        return evaluate.markdown_table(["method", "CLIP score with the caption"], rows)
    header = ["method", "win rate over base", "95%", "true reward", "color and shape", "95%"]
    header += ["PPD's win rate over it", "95%", "n"]
    rows = []
    for arm, r in result["arms"].items():
        won = evaluate.rate_cells(r if arm != "base" else dict(n=0))
        kept = evaluate.rate_cells(r["fidelity"])
        lost = evaluate.rate_cells(result["over"].get(arm, dict(n=0)))
        rows.append([arm, *won, f"{r['mean']:+.2f}", *kept, *lost, r["n"]])
    return evaluate.markdown_table(header, rows)


def tune(args):
    """Chooses settings on validation users and captions, which no test shows: short runs of one
    seed, one setting after the other, the largest personal gain among those that lose at most 0.05
    of the color and shape that the base keeps by its own settings; if none, what keeps most."""
    if args.steps or args.guidance is not None:
        raise InputError("tune: --steps and --guidance are what it chooses")
    validation = validation_users(args)
    floor = None
    chosen = {key: values[0] for key, values in TUNED.items()}
    tried = {}
    for key, values in TUNED.items():
        for value in values:
            setting = chosen | {key: value}
            if str(setting) not in tried:
                flags = [str(flag) for flag in evaluate.to_flags(setting, TRAINED)]
                adapter = short_run(args, "".join(flags).strip("-"), args.users, flags)
                floor = floor or base_fidelity(args, adapter, validation[1])
                args.sampling |= {key: setting[key] for key in ("guidance", "steps")}
                measured = measure(args, adapter, args.users, *validation)
                tried[str(setting)] = dict(setting=setting) | measured
        candidates = [tried[str(chosen | {key: value})] for value in values]
        kept = [t for t in candidates if t["fidelity"]["rate"] >= floor["rate"] - 0.05]
        if kept:
            chosen = max(kept, key=lambda t: t["gain"]["mean"])["setting"]
        else:
            chosen = max(candidates, key=lambda t: t["fidelity"]["rate"])["setting"]
    result = dict(chosen=chosen, base=floor, users=validation[0], captions=validation[1])
    result["tried"] = list(tried.values())
    evaluate.report(args, result, tune_table(result), {})


def validation_users(args):
    """What settings are chosen on: --n names, two or more, all captions, true tastes (n, 5)."""
    pairs, settings = read_pairs(args.users)
    rows = [row for row in pairs if row["split"] == "validation-unseen"]
    names = [row["user"] for row in one_each(rows, args.n or 40)]
    if len(names) < 2:
        problem = f"{len(names)} validation users; expected 2 or more"
        raise InputError(f"--users {args.users}: {problem}: embed with --validation-users")
    tastes = world.load_true_tastes(args.data or settings["data"])[0]
    return names, sorted({row["caption"] for row in rows}), np.array(look_up(tastes, names))


def short_run(args, name, users, flags):
    """The adapter of --out/<name>, of --train-steps with these flags; trained unless there."""
    folder = Path(args.out) / name
    if not (folder / "adapter.safetensors").exists() or (folder / "state.pt").exists():
        how = ["--max-steps", args.train_steps, "--preview-every", 0, "--resume"]
        how += evaluate.to_flags(vars(args), ("base", "decoder", "data", "latents", "device"))
        utils.run_python("train.py", "--users", users, "--out", folder, *flags, *how)
    return UserAdapter.load(folder)


def measure(args, adapter, users, names, captions, tastes):
    """Validation users' personal gain, P(own > other) and fidelity."""
    base = load_base_for(adapter, args)
    _, z = evaluate.shared_images(args, base, captions, adapter)
    embeddings = evaluate.load_embeddings(adapter, Path(users), names)
    images = evaluate.cross_images(args, base, captions, adapter, embeddings)
    liked = evaluate.cross_utilities(tastes, evaluate.axes_of(images), **z)
    found = evaluate.summarize_cross(*liked)
    gains = dict(gain=found["personal_gain"], own_over_other=found["own_over_other"])
    return gains | dict(fidelity=evaluate.cross_fidelity(images, captions))


def measured_cells(r):
    return [evaluate.format_value(r[key]) for key in MEASURED.values()]


def base_fidelity(args, adapter, captions):
    """What the base keeps of these captions, eight images each, by its own settings."""
    made = evaluate.generate_arm(args, load_base_for(adapter, args), captions * 8, adapter, None)
    rows = [made[i : i + len(captions)] for i in range(0, len(made), len(captions))]
    return evaluate.cross_fidelity(rows, captions)


def tune_table(result):
    rows = []
    for t in result["tried"]:
        mark = "yes" if t["setting"] == result["chosen"] else ""
        rows.append([*(f"{value:g}" for value in t["setting"].values()), *measured_cells(t), mark])
    table = evaluate.markdown_table([*TUNED, *MEASURED, "chosen"], rows)
    return f"{table}\n\nColor and shape, base: {evaluate.format_rate(result['base'], with_n=True)}."


def ablations(args):
    """One change at a time from train.py's defaults, at --train-steps, measured as tune does."""
    validation = validation_users(args)
    trained = {row["user"] for row in read_pairs(args.users)[0] if row["split"] == "train"}
    trained = sorted(trained, key=lambda name: hash_fraction("ablations", name))
    runs = {name: (args.users, flags.split()) for name, flags in CHANGES.items()}
    for n in (10, 100):
        if n < len(trained):
            runs[f"{n} training users"] = (args.users, ["--only", *trained[:n]])
    if args.shot_users:
        runs["1 shot"] = (args.shot_users, [])
    result = dict(changes={})
    for name, (users, flags) in runs.items():
        adapter = short_run(args, name.replace(" ", "-"), users, flags)
        result["changes"][name] = measure(args, adapter, users, *validation)
    evaluate.report(args, result, ablations_table(result), {})


def ablations_table(result):
    rows = [[name, *measured_cells(r)] for name, r in result["changes"].items()]
    return evaluate.markdown_table(["change", *MEASURED], rows)


def collapse(args):
    """How Diffusion-DPO explodes, provoked by COLLAPSE's settings, and what --guard makes of it:
    both images' errors over the reference's on the validation pairs, and what tune measures."""
    validation = validation_users(args)
    result = dict(runs={})
    for name, flags in COLLAPSE.items():
        each = ["--save-every", max(1, args.train_steps // 12)]
        adapter = short_run(args, name.replace(" ", "-"), args.users, [*flags.split(), *each])
        log = utils.read_jsonl(adapter.path.parent / "train.jsonl")
        curve = [error_ratios(line) for line in log if "validation_logits" in line]
        result["runs"][name] = dict(curve=curve, **measure(args, adapter, args.users, *validation))
    result["base"] = base_fidelity(args, adapter, validation[1])
    figure, axes = plots.new_figure(1, 2)
    for axis, side in zip(axes, ("preferred", "dispreferred"), strict=True):
        lines = {name: [c[side] for c in r["curve"]] for name, r in result["runs"].items()}
        steps = [c["step"] for c in curve]
        plots.draw_lines(axis, f"{side} images", steps, lines, "error / the reference's")
        axis.set_yscale("log")
    evaluate.report(args, result, collapse_table(result), dict(collapse=plots.to_image(figure)))


def error_ratios(line):
    """Of a line of train.jsonl that has a validation."""
    value = {key.removeprefix("validation_"): v for key, v in line.items()}
    sides = ("preferred", "dispreferred")
    ratios = {s: round(value[f"error_{s}"] / value[f"error_ref_{s}"], 4) for s in sides}
    return dict(step=line["step"] + 1, accuracy=value["implicit_accuracy"], **ratios)


def collapse_table(result):
    header = ["run", "preferred images' error, of the reference's", "dispreferred images'"]
    rows = []
    for name, r in result["runs"].items():
        last = r["curve"][-1]
        ratios = [f"{last[side]:.2f}" for side in ("preferred", "dispreferred")]
        rows.append([name, *ratios, f"{last['accuracy']:.3f}", *measured_cells(r)])
    table = evaluate.markdown_table([*header, "implicit accuracy", *MEASURED], rows)
    return f"{table}\n\nColor and shape, base: {evaluate.format_rate(result['base'], with_n=True)}."


def words(args):
    """Each taste word in the captions of the base, and as a one-hot user: how often an image moves
    to the word's side of where it is without, by the same caption and noise, and how far."""
    adapter, vectors, _, _, prompts = evaluate.load_reward_run(args, 100)
    if not set(vectors) <= world.WORDS.keys():
        raise InputError(f"--adapter {args.adapter}: words are for an adapter of taste words")
    base = load_base_for(adapter, args)

    def paint(prompts, user, desc):
        return evaluate.generate_arm(args, base, prompts, adapter, user, desc)

    plain = paint(prompts, None, "base")
    result = dict(base=evaluate.rate_ci(world.fidelity(plain, prompts)), words={})
    sheet = {"base": plain[:8]}
    for word, vector in vectors.items():
        worded = paint([f"{prompt}, {word}" for prompt in prompts], None, f"{word} in captions")
        images = dict(caption=worded, user=paint(prompts, vector, f"{word} as a user"))
        before = world.reward(word, plain)
        result["words"][word] = {
            how: evaluate.compare(world.reward(word, made), before)
            | dict(fidelity=evaluate.rate_ci(world.fidelity(made, prompts)))
            for how, made in images.items()
        }
        sheet |= {f"{word},\n{how}": made[:8] for how, made in images.items()}
    grid = plots.image_grid(list(zip(*sheet.values(), strict=True)), prompts[:8], list(sheet), 64)
    evaluate.report(args, result, words_table(result), dict(words=grid))


def words_table(result):
    header = ["taste word"]
    for how in ("in the caption", "as a user"):
        header += [f"{how}: moved", "mean before, after", "color and shape"]
    rows = []
    for word, r in result["words"].items():
        cells = [word]
        for how in ("caption", "user"):
            means = f"{r[how]['mean_other']:+.2f}, {r[how]['mean']:+.2f}"
            cells += [evaluate.format_rate(r[how]), means, evaluate.format_rate(r[how]["fidelity"])]
        rows.append(cells)
    n = result["base"]["n"]
    base = f"n = {n}; color and shape, base: {evaluate.format_rate(result['base'])}."
    return f"{evaluate.markdown_table(header, rows)}\n\n{base}"


EXPERIMENTS = dict(interpolate=interpolate, classify=classify, profiles=profiles, tune=tune)
EXPERIMENTS |= dict(ablations=ablations, collapse=collapse, words=words)


def main(argv=None):
    args = parse_args(argv)
    run_script("experiments.py", EXPERIMENTS[args.command], args)


if __name__ == "__main__":
    main()
