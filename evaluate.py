"""The paper's numbers and figures, each by a subcommand. Results go to evaluation.json and .md beside the adapter or in --out
(every subcommand rewrites only its own key and section) and to pictures. Both arms of a comparison get the same prompts and the
same noise. Every rate and mean comes with its n and a 95% interval.

    python evaluate.py                                                          # Fig. 5: people read by the VLM, seen and unseen
    python evaluate.py judge                                                    # Fig. 5: a VLM or an endpoint judges for the person
    python evaluate.py rewards --adapter runs/onehot --baselines runs/onehot    # Table 1, Fig. 3: the baselines trained and compared
    python evaluate.py interpolate --adapter runs/onehot                        # Fig. 4; of an adapter for people: two of them blended
    python evaluate.py classify --users users-classify                          # Fig. 2: which person is this embedding?
    python evaluate.py profiles --baselines runs/baselines                      # Fig. 6: against the profile in the caption
    python evaluate.py ablations                                                # what the paper leaves open, three seeds each
"""
import argparse
import base64
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

COMMANDS = ("people", "judge", "rewards", "interpolate", "classify", "profiles", "ablations")


def arguments(argv=None):
    p = argparse.ArgumentParser(prog="evaluate.py", usage=argparse.SUPPRESS, description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", nargs="?", choices=COMMANDS, default="people", help=", ".join(COMMANDS) + " (default: %(default)s)")
    p.add_argument("--adapter", help="run folder or adapter file (default: runs/ppd, for rewards runs/onehot)")
    p.add_argument("--data", help="folder with people.json, if it moved since embed.py read it")
    p.add_argument("--users", help="folder that embed.py wrote (default: the one the adapter was trained on; classify users-classify; ablations users)")
    p.add_argument("--profile-users", help="classify: the same people read after a written profile, by embed.py --profile")
    p.add_argument("--base", help="default: the one the adapter was trained on")
    p.add_argument("--decoder", default="stabilityai/stable-cascade", help="hub id or folder with Stages A and B (default: %(default)s)")
    p.add_argument("--baselines", help="rewards, profiles: folder of the baselines' runs, dpo, sft, dpo-<reward>; those not there are trained like the adapter")
    p.add_argument("--prompts", help="rewards, interpolate: captions, as sample.py takes them (default: the held-out ones)")
    p.add_argument("--judge", help="judge: a VLM as embed.py's --vlm, or the endpoint's model (default: the VLM that read the people)")
    p.add_argument("--judge-url", help="judge: an OpenAI-compatible endpoint like https://host/v1; its key is read from OPENAI_API_KEY")
    p.add_argument("--judge-timeout", type=float, default=120, help="seconds for an answer (default: %(default)s)")
    p.add_argument("--judge-wait", type=float, default=2, help="seconds before asking a failing endpoint again, doubled each time (default: %(default)s)")
    p.add_argument("--train-steps", type=int, default=300, help="ablations: steps a run (default: %(default)s)")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the frozen base in what is trained here (default: %(default)s)")
    p.add_argument("--n", type=int, help="people of a kind, or pictures a reward and arm (default: 200; with --prompts all; judge 277 seen and 192 "
                                         "unseen; interpolate 64 captions or couples; classify 300 people; ablations 100)")
    p.add_argument("--steps", type=int, help="denoising steps (default: tiny 20, full scale 30)")
    p.add_argument("--guidance", type=float, help="classifier-free guidance (default: tiny 2, full scale 4)")
    p.add_argument("--batch", type=int, default=50, help="pictures at once (default: %(default)s)")
    p.add_argument("--seed", type=int, default=10_000, help="of the first picture (default: %(default)s)")
    p.add_argument("--out", help="folder to write (default: the adapter's; classify the users'; ablations runs/ablations)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    args = p.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)  # goes with the results
    args.adapter = args.adapter or ("runs/onehot" if args.command == "rewards" else "runs/ppd")
    for key in ("n", "steps", "batch", "train_steps"):
        if getattr(args, key) is not None and getattr(args, key) < (least := 2 if key == "n" else 1):
            p.error(f"--{key.replace('_', '-')} {getattr(args, key)}: expected {least} or more")
    if args.judge_url and not args.judge:
        p.error("--judge-url wants the endpoint's model too: --judge MODEL")
    if args.command == "profiles" and not args.baselines:
        p.error("profiles wants --baselines FOLDER: its run dpo is the Diffusion-DPO to compare with, trained if it is not there")
    if args.command in ("classify", "ablations"):
        args.users = args.users or dict(classify="users-classify", ablations="users")[args.command]
        args.out = args.out or dict(classify=args.users, ablations="runs/ablations")[args.command]
    elif not Path(args.adapter).exists():
        p.error(f"--adapter {args.adapter}: no such file or folder; train.py writes runs/<name>")
    args.out = args.out or str(Path(args.adapter) if Path(args.adapter).is_dir() else Path(args.adapter).parent)
    return args


if __name__ == "__main__":
    arguments()  # a wrong flag answers at once, not after the imports

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

import tiny
from embed import ANSWER, REWARDS, SYSTEM, group_pictures, load_vlm, prompt, read_pairs, read_people, read_pictures, read_rows, score, share, write
from ppd import BadInput, UserAdapter, append_line, load_user, pick_device, read_jsonl, run_script, write_atomically, write_jsonl
from sample import generate, grid, load_base, read_prompts, standardised


# ------------------------------------------------------------------------------------------------------------- numbers
def wilson(rate, n, z=1.96):
    """95% interval of a rate by Wilson's score: honest at 0 and 1 too, where the bootstrap has width 0."""
    middle, half = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return [round((middle - half) / (1 + z * z / n), 4), round((middle + half) / (1 + z * z / n), 4)]


def rate(right):
    """Numbers in [0, 1] -> their mean as a rate, n, and Wilson's interval; None where there is nothing to count."""
    return dict(rate=round(float(np.mean(right)), 4), n=len(right), ci95=wilson(float(np.mean(right)), len(right))) if len(right) else None


def mean(values):
    """Numbers -> their mean, n, and its 95% interval by the normal approximation."""
    values = np.asarray(values, np.float64)
    middle, half = float(values.mean()), 1.96 * float(values.std(ddof=1)) / len(values)**0.5
    return dict(mean=round(middle, 4), n=len(values), ci95=[round(middle - half, 4), round(middle + half, 4)])


def wins(ours, theirs):
    """Scores of two arms on the same prompts and noise -> 1 where ours is higher, 0.5 for a tie, 0."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return (ours > theirs) + 0.5 * (ours == theirs)


def compare(ours, theirs):
    """Scores of two arms on the same prompts and noise -> win rate, n, interval, and both means."""
    won = rate(wins(ours, theirs))
    return dict(win_rate=won["rate"], n=won["n"], ci95=won["ci95"], mean=round(float(np.mean(ours)), 4), mean_other=round(float(np.mean(theirs)), 4))


def spearman(weights, scores):
    """Rank correlation of weights (W,) with the mean of scores (W, prompts) over prompts, 0 where those are constant, and its 95%
    bootstrap interval over prompts."""
    ranks = lambda x: np.array([(x < v).sum() + (x == v).sum() / 2 for v in x])  # ties share their average rank
    of = lambda means: float(np.corrcoef(ranks(weights), ranks(means))[0, 1]) if np.ptp(means) > 0 else 0.0
    rng = np.random.default_rng(0)
    drawn = [of(scores[:, rng.integers(scores.shape[1], size=scores.shape[1])].mean(1)) for _ in range(1000)]
    return dict(spearman=round(of(scores.mean(1)), 4), n=scores.shape[1], ci95=[round(float(q), 4) for q in np.quantile(drawn, (0.025, 0.975))])


def between(r, form=".3f"):
    return f"{r['ci95'][0]:{form}} to {r['ci95'][1]:{form}}"


def give(r):
    """A mean with its interval, as tables show it."""
    return f"{r['mean']:+.2f} ({between(r, '+.2f')})"


def rated(r):
    """A rate with its interval, as tables show it."""
    return f"{r['rate']:.3f} ({between(r)})"


def said(f):
    return (f"Colour and shape as the caption says: base {f['base']['rate']:.3f} ({between(f['base'])}, n = {f['base']['n']}), "
            f"personalised {f['ppd']['rate']:.3f} ({between(f['ppd'])}, n = {f['ppd']['n']}).")


def read_json(path):
    """A .json file that holds a dict. BadInput if it does not."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        assert isinstance(found, dict)
    except (ValueError, RecursionError, AssertionError):
        raise BadInput(f"{path}: not a JSON object; move it away") from None
    return found


def report(args, result, pictures, key=None):
    """Put the result under the subcommand's key of evaluation.json, with the command, seconds and machine that made it, and
    its table into evaluation.md; save pictures {name: image}; print the table."""
    out, key = Path(args.out), key or args.command
    out.mkdir(parents=True, exist_ok=True)
    path = out / "evaluation.json"
    before = read_json(path) if path.exists() else {}
    device = torch.cuda.get_device_name() if args.device != "cpu" and torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    made = dict(command=shlex.join(["python", "evaluate.py", *args.argv]), seconds=round(time.time() - args.began),
                machine=f"{platform.system()} {platform.machine()}, {device}", torch=torch.__version__)
    result = json.loads(json.dumps(dict(made=made) | result))
    write_atomically(path, lambda p: p.write_text(json.dumps(before | {key: result}, indent=1) + "\n"))
    text = "\n".join(f"## {name}\n\n{TABLES[name](r)}\n" for name, r in (before | {key: result}).items() if name in TABLES and "made" in r)
    write_atomically(out / "evaluation.md", lambda p: p.write_text(text))
    for name, picture in pictures.items():
        picture.save(out / f"{name}.png")
    print(TABLES[key](result))
    print("-> " + ", ".join(map(str, (path, out / "evaluation.md", *(out / f"{name}.png" for name in pictures)))))


# ------------------------------------------------------------------------------------------------ Fig. 5: drawn people
def true_tastes(data):
    """What drawn people truly like, from the data folder's people.json: functions from names to (B, 5) weights and to words."""
    path = Path(data) / "people.json"
    if not path.is_file():
        raise BadInput(f"--data: no {path}; true tastes are known of drawn people only. Of others ask evaluate.py judge")
    told = read_json(path)

    def look(kind, names):
        for name in names:
            if not name.isdigit() or int(name) >= len(told["tastes"]):
                raise BadInput(f"{path}: person {name} is not in it; expected the data that the people were read from")
        return [told[kind][int(name)] for name in names]
    return lambda names: torch.tensor(look("tastes", names)), lambda names: [", ".join(words) for words in look("words", names)]


def rows_by_id(data):
    """A function from ranking ids to the rows of a data folder."""
    rows = {row["ranking_id"]: row for row in read_rows(data)}

    def look(ids):
        if missing := [i for i in ids if i not in rows]:
            raise BadInput(f"--data {data}: no pair of ranking id {missing[0]} there; expected the data that the people were read from")
        return [rows[i] for i in ids]
    return look


def read_run(args):
    """The adapter, the folder and pairs of its people, and the settings these were made with, --data taking precedence."""
    adapter = UserAdapter.load(args.adapter)
    users = Path(args.users or adapter.header.get("users", "users"))
    pairs, settings = read_pairs(users)
    return adapter, users, pairs, settings | dict(data=args.data or settings["data"])


def with_people(args):
    """An adapter for people -> it, their folder, the pairs and the data folder they are of."""
    adapter, users, pairs, settings = read_run(args)
    return adapter, users, pairs, Path(settings["data"])


def held_out(users, pairs, seen, unseen):
    """{"seen": rows, "unseen": rows}: a held-out pair of each of so many people, by hash."""
    one = {}
    for row in pairs:
        one.setdefault((row["split"], row["user"]), row)
    chosen = {kind: sorted((r for (split, _), r in one.items() if split == f"test-{kind}"), key=lambda r: share("evaluation", r["user"]))[:n]
              for kind, n in (("seen", seen), ("unseen", unseen))}
    for kind, rows in chosen.items():
        if len(rows) < 2:
            raise BadInput(f"--users {users}: {len(rows)} {kind} people have a held-out pair; expected two or more")
    return chosen


def profiles_of(args, users, names, data):
    """What the VLM writes of people's first group, or wrote when embed.py --profile read them: what follows "User profile:"."""
    files = [load_user(users / f"{name}.pt") for name in names]
    texts = [file["profile"][0] if file["profile"] else None for file in files]
    if None in texts:
        rows, vlm, step = rows_by_id(data), load_vlm(files[0]["vlm"], pick_device(args.device)), 50 if files[0]["vlm"] == "tiny" else 1
        for i in tqdm(range(0, len(files), step), desc="writing profiles", leave=False, disable=None):
            texts[i:i + step] = read_people(vlm, [group_pictures(data, rows(file["shots"][0])) for file in files[i:i + step]], profile=True)[1]
        del vlm  # a GPU has better use for its memory
        torch.cuda.empty_cache()
    return [" ".join(re.split(r"user profile\W*:\W*", text, flags=re.IGNORECASE)[-1].split()).rstrip(".") for text in texts]


def people(args):
    """Sec. 5.2: people whom the VLM read from four choices, seen and unseen, one held-out caption each; win rate and mean
    true reward (from people.json, which nothing else reads) over the base. Controls, for the unseen: another person's
    embedding, the zero user, and the true taste: what a linear fit over the training people expects a person of that taste
    to look like to the VLM, which is the ceiling for reading four choices. And the reverse fit, from embedding to taste:
    how much of a taste an unseen person's embedding tells, as a mean cosine."""
    adapter, users, pairs, data = with_people(args)
    taste, words = true_tastes(data)
    embedding = lambda names: torch.cat([standardised(adapter, users / f"{name}.pt") for name in names]).cpu()
    chosen = held_out(users, pairs, args.n or 200, args.n or 200)
    names = {kind: [r["user"] for r in rows] for kind, rows in chosen.items()}
    captions = {kind: [r["caption"] for r in rows] for kind, rows in chosen.items()}
    base = load_base(args, adapter)

    known = sorted({r["user"] for r in pairs if r["split"] == "train"})
    told, meant, own = embedding(known), taste(known), embedding(names["unseen"])
    likeness = ridge(meant, told)(taste(names["unseen"]))
    arms = {"seen base": ("seen", None), "seen": ("seen", embedding(names["seen"])), "unseen base": ("unseen", None), "unseen": ("unseen", own),
            "other_user": ("unseen", own.roll(1, 0)), "zero": ("unseen", torch.zeros_like(own)),
            "true_taste": ("unseen", likeness * own.norm() / likeness.norm())}
    made = {arm: generate(base, captions[kind], [args.seed + i for i in range(len(captions[kind]))], adapter, person, args.batch, arm,
                          steps=args.steps, guidance=args.guidance) for arm, (kind, person) in arms.items()}
    scores = {arm: tiny.utility(taste(names[kind]).numpy(), made[arm]) for arm, (kind, _) in arms.items()}
    result = dict(people={arm: compare(scores[arm], scores[f"{kind} base"]) for arm, (kind, person) in arms.items() if person is not None})
    result["people"]["all"] = compare([*scores["seen"], *scores["unseen"]], [*scores["seen base"], *scores["unseen base"]])
    result["own_over_other"] = compare(scores["unseen"], scores["other_user"])
    result["readout"] = mean(torch.cosine_similarity(ridge(told, meant)(own), taste(names["unseen"])).tolist())
    everyone = captions["seen"] + captions["unseen"]
    result["fidelity"] = {arm: rate(tiny.fidelity(made[a] + made[b], everyone)) for arm, a, b in (("base", "seen base", "unseen base"), ("ppd", "seen", "unseen"))}

    shown = sorted(set(captions["unseen"]))[:8]  # the sheet: four people of each kind, what they like, what the VLM says of them
    some = names["seen"][:4] + names["unseen"][:4]
    sheet = [generate(base, shown, [args.seed + i for i in range(len(shown))], adapter, person, steps=args.steps, guidance=args.guidance)
             for person in (None, *(embedding([name]) for name in some))]
    labels = ["base"] + [f"{name}, {'seen' if name in names['seen'] else 'unseen'}\nlikes {likes}\nVLM: {profile[:40]}"
                         for name, likes, profile in zip(some, words(some), profiles_of(args, users, some, data))]
    report(args, result, dict(people=grid(sheet, labels, shown)))


def people_table(result):
    titles = dict(seen="seen", unseen="unseen", all="all", other_user="unseen, by another's embedding", zero="unseen, by the zero user",
                  true_taste="unseen, by their true taste")
    table = ["| people | win rate over base | 95% | n | true reward, base | true reward, theirs |", "|---|---|---|---|---|---|"]
    for name, title in titles.items():
        r = result["people"][name]
        table.append(f"| {title} | {r['win_rate']:.3f} | {between(r)} | {r['n']} | {r['mean_other']:+.2f} | {r['mean']:+.2f} |")
    other, readout = result["own_over_other"], result["readout"]
    return "\n".join(table + ["", f"An unseen person's own embedding wins over another's in {other['win_rate']:.3f} ({between(other)}, n = {other['n']}). "
                                  f"Read-out of the true taste from it: cosine {readout['mean']:.3f} ({between(readout)}). " + said(result["fidelity"])])


def ridge(x, y, strength=10.0):
    """Ridge regression of y on x with an intercept -> a function from x to y."""
    fill = lambda x: torch.cat([x, torch.ones(len(x), 1)], 1)
    solution = torch.linalg.solve(fill(x).T @ fill(x) + strength * torch.eye(x.shape[1] + 1), fill(x).T @ y)
    return lambda x: fill(x) @ solution


# ------------------------------------------------------------------------- Table 1, Fig. 3 and 4: synthetic people
def script(name, *flags):
    """Run another script of this folder; its output is shown."""
    process = subprocess.Popen([sys.executable, str(Path(__file__).resolve().with_name(name)), *map(str, flags)])
    try:
        code = process.wait()
    except KeyboardInterrupt:  # it was asked to stop too, and saves first
        process.wait()
        raise
    if code != 0:
        raise BadInput(f"{name} {' '.join(map(str, flags))} ended with exit status {code}")


def flags_of(settings, *keys):
    """Settings as command-line flags; what is unset or off is left out."""
    flags = []
    for key in keys:
        value = settings.get(key)
        if value not in (None, False):
            flags += [f"--{key.replace('_', '-')}", *(value if isinstance(value, list) else [] if value is True else [value])]
    return flags


def embed_again(args, users, settings, *flags):
    """embed.py on the data and splits of another folder."""
    script("embed.py", "--users", users, "--data", args.data or settings["data"], "--device", args.device, *flags,
           *flags_of(settings, "validation_captions", "test_captions", "unseen_users"))


def baseline(args, adapter, name, users, **change):
    """The adapter --baselines/<name>: trained by train.py unless it is there, for as long as `adapter` and with its settings,
    --objective and --only apart. At full scale train them beforehand, with torchrun."""
    folder, wanted = Path(args.baselines) / name, adapter.header["recipe"] | change
    ours = UserAdapter.load(folder) if (folder / "adapter.safetensors").exists() else None
    if ours is None or (ours.header["step"] < wanted["max_steps"] and list(folder.glob("state*.pt"))):
        script("train.py", "--users", users, "--out", folder, "--base", adapter.header["base"], "--grid", adapter.header["grid"], "--decoder", args.decoder,
               "--device", args.device, "--preview-every", 0, "--resume", *flags_of(wanted, *wanted), *(["--data", args.data] if args.data else []))
        ours = UserAdapter.load(folder)
    there = ours.header["recipe"] | dict(objective=ours.header["objective"], max_steps=ours.header["step"])
    for key, value in wanted.items():
        if there[key] != value:
            raise BadInput(f"{folder}: trained with {key} {there[key]}, but {adapter.path} is to be compared with {value}; choose another --baselines")
    return ours


def synthetic(args):
    """An adapter for synthetic people -> it, their folder and settings, their names in the order of the one-hot vector, --n
    prompts and seeds."""
    adapter, users, pairs, settings = read_run(args)
    if (unknown := {r["user"] for r in pairs} - tiny.WORDS.keys() - REWARDS.keys()):
        raise BadInput(f"--users {users}: {sorted(unknown)[0]!r} is no reward; give a folder made by embed.py --one-hot")
    names = sorted({r["user"] for r in pairs}, key=lambda name: load_user(users / f"{name}.pt")["embedding"].flatten().argmax().item())
    captions = read_prompts(args.prompts) if args.prompts else sorted({r["caption"] for r in pairs if r["split"].startswith("test")})
    if not captions:
        raise BadInput(f"--users {users}: pairs.parquet has no held-out test caption; give --prompts")
    n = args.n or (64 if args.command == "interpolate" else len(captions) if args.prompts else 200)
    return adapter, users, settings, names, [captions[i % len(captions)] for i in range(n)], [args.seed + i for i in range(n)]


def rewards(args):
    """Sec. 5.1, Table 1, Fig. 3: synthetic people, each a reward; mean rewards and win rates on --prompts or the held-out
    captions. With --baselines also Diffusion-DPO on people's own labels, SFT that sees the user, and a Diffusion-DPO of its
    own for each reward, the upper bound. On the drawn world also whether the caption's colour and shape are there."""
    adapter, users, settings, names, prompts, seeds = synthetic(args)
    drawn, n, person = names[0] in tiny.WORDS, len(prompts), {name: standardised(adapter, users / f"{name}.pt") for name in names}
    methods = {"base": {"": (adapter, None)}, "PPD": {name: (adapter, person[name]) for name in names}}
    if args.baselines:  # {method: {whose pictures, "" for everybody's: (adapter, embedding)}}
        own = users.with_name(users.name + "-own")
        embed_again(args, own, settings, "--one-hot", "own")
        dpo, sft = baseline(args, adapter, "dpo", own, objective="dpo"), baseline(args, adapter, "sft", users, objective="sft")
        upper = {name: baseline(args, adapter, f"dpo-{name}", users, objective="dpo", only=[name]) for name in names}
        methods = {"base": methods["base"], "Diffusion-DPO": {"": (dpo, standardised(dpo, "zero"))},
                   "SFT": {name: (sft, person[name]) for name in names}, "PPD": methods["PPD"],
                   "one Diffusion-DPO a reward": {name: (upper[name], standardised(upper[name], "zero")) for name in names}}
    base, shown = load_base(args, adapter), min(n, len(set(prompts)), 12)  # rows of the sheet, where the zero user is too
    compared, methods = list(methods), methods | {"zero user": {"": (adapter, standardised(adapter, "zero"))}}
    scores, right, sheet = {}, {}, {}
    for method, arm, (own, someone) in [(method, arm, how) for method, arms in methods.items() for arm, how in arms.items()]:
        own.install(base.prior)
        count, key = shown if method == "zero user" else n, (method, arm)
        scores[key], right[key], sheet[key] = {name: [] for name in names}, [], []
        for i in range(0, count, 4 * args.batch):  # scored as they come: all of them would not fit in memory
            some = slice(i, min(i + 4 * args.batch, count))
            made = generate(base, prompts[some], seeds[some], own, someone, args.batch, f"{method} {arm}", steps=args.steps, guidance=args.guidance)
            sheet[key] += made[:max(0, shown - i)]
            for name in names:
                scores[key][name] += score(name, made, prompts[some], str(base.device)).tolist()
            right[key] += tiny.fidelity(made, prompts[some]) if drawn else []
    of = lambda method, name: scores.get((method, name), scores.get((method, "")))[name]
    kept = lambda method: rate(np.mean([r for (m, _), r in right.items() if m == method], axis=0)) if drawn else None  # a prompt counts once
    result = dict(table_1={method: {name: mean(of(method, name)) for name in names} | ({"fidelity": kept(method)} if drawn else {}) for method in compared},
                  figure_3={name: {method: compare(of("PPD", name), of(method, name)) for method in compared if method != "PPD"} for name in names},
                  crossed={name: {other: mean(scores["PPD", other][name]) for other in names} for name in names},
                  first={method: {name: np.round(of(method, name)[:12], 3).tolist() for name in names} for method in compared})  # for a test to score again
    result |= {} if drawn else dict(models={name: REWARDS[name][0] for name in names})
    label = lambda method, arm: f"{method.replace('one Diffusion-DPO a reward', 'own DPO').replace('Diffusion-DPO', 'DPO')}\n{arm}"
    columns = {label(method, arm): sheet[method, arm] for method, arm in (("base", ""), ("zero user", ""), *(key for key in sheet if key[0] not in ("base", "zero user")))}
    series = {f"over {method}": [(r["win_rate"], r["ci95"]) for r in (result["figure_3"][name][method] for name in names)] for method in compared if method != "PPD"}
    report(args, result, dict(figure_3=bars("PPD's win rate, with 95% intervals", names, series, "win rate"),
                              rewards=grid(list(zip(*columns.values())), [c[:60] for c in prompts[:shown]], list(columns), 72)))


def rewards_table(result):
    names, faithful = list(result["figure_3"]), "models" not in result
    title = lambda name: name if faithful else result["models"][name]
    table = ["| mean reward | " + " | ".join(map(title, names)) + (" | colour and shape" if faithful else "") + " |", "|---" * (1 + len(names) + faithful) + "|"]
    for method, r in result["table_1"].items():
        kept = f" | {rated(r['fidelity'])}" if faithful else ""
        table.append(f"| {method} | " + " | ".join(give(r[name]) for name in names) + kept + " |")
    n = result["table_1"]["PPD"][names[0]]["n"]
    table += ["", f"| PPD's win rate, n = {n} | " + " | ".join(map(title, names)) + " |", "|---" * (1 + len(names)) + "|"]
    for method in result["figure_3"][names[0]]:
        cells = (result["figure_3"][name][method] for name in names)
        table.append(f"| over {method} | " + " | ".join(f"{r['win_rate']:.3f} ({between(r)})" for r in cells) + " |")
    table += ["", "| mean reward of PPD's pictures | " + " | ".join(f"for {title(name)}" for name in names) + " |", "|---" * (1 + len(names)) + "|"]
    table += [f"| {title(name)} | " + " | ".join(give(r[other]) for other in names) + " |" for name, r in result["crossed"].items()]
    return "\n".join(table)


def interpolate(args):
    """Fig. 4, and the claim that ends Sec. 5.1: of an adapter for three rewards the simplex of their weights, of one for
    people couples of unseen people."""
    *_, settings = read_run(args)
    (simplex if settings.get("one_hot") else couples)(args)


def simplex(args):
    """Fig. 4: weights of three rewards, 11 along each edge and the corners of a grid of fifths inside; the mean score of --n
    pictures each, with the same captions and noise everywhere."""
    adapter, users, _, names, prompts, seeds = synthetic(args)
    if len(names) != 3:
        raise BadInput(f"--adapter {args.adapter}: {len(names)} rewards; the triangle wants three")
    base, person = load_base(args, adapter), {name: standardised(adapter, users / f"{name}.pt") for name in names}
    points = [(i, j, 10 - i - j) for i in range(11) for j in range(11 - i) if 0 in (i, j, 10 - i - j) or not (i % 2 or j % 2)]
    scores, first, shown = {}, {}, min(2, len(prompts) - 1)
    for point in tqdm(points, desc="weights", unit="point", disable=None):
        someone = sum(w / 10 * person[name] for w, name in zip(point, names))
        made = generate(base, prompts, seeds, adapter, someone, args.batch, steps=args.steps, guidance=args.guidance)
        scores[point], first[point] = np.stack([score(name, made, prompts, str(base.device)) for name in names]), made[shown]
    edges = []
    for a, b in itertools.combinations(range(3), 2):
        along = [tuple({a: 10 - w, b: w}.get(k, 0) for k in range(3)) for w in range(11)]
        for k, weights in ((a, range(10, -1, -1)), (b, range(11))):
            of = np.stack([scores[point][k] for point in along])
            edges.append(dict(edge=[names[a], names[b]], reward=names[k], means=[mean(row) for row in of], **spearman(np.array(weights), of)))
    result = dict(edges=edges, map=[dict(weights=dict(zip(names, (np.array(p) / 10).tolist())), means={name: mean(scores[p][k]) for k, name in enumerate(names)}) for p in points])
    fifths = [p for p in points if not (p[0] % 2 or p[1] % 2)]
    pictures = [triangle(f"\"{prompts[shown]}\", by weights", names, {p: first[p] for p in fifths})]
    pictures += [triangle(f"mean {name}", names, {p: float(scores[p][k].mean()) for p in fifths}) for k, name in enumerate(names)]
    charts = []
    for pair in zip(edges[::2], edges[1::2]):  # real rewards have units of their own: in deviations there, as the drawn ones are
        series = {e["reward"]: [(m["mean"], m["ci95"]) for m in e["means"]] for e in pair}
        for name, line in series.items() if names[0] in REWARDS else ():
            every = np.stack([scores[p][names.index(name)] for p in points])
            series[name] = [tuple((np.array(v) - every.mean()) / every.std()) for v in line]
        charts.append(lines(f"from {pair[0]['edge'][0]} to {pair[0]['edge'][1]}", [f"{w / 10:g}" for w in range(11)], series, "mean score"))
    report(args, result, dict(figure_4=beside([beside([beside(pictures[:2]), beside(pictures[2:])], down=True), beside(charts, down=True)])))


def interpolate_table(result):
    table = ["| edge | score | Spearman of its weight and its mean | 95% | n | mean at weight 0 | at 1 |", "|---|---|---|---|---|---|---|"]
    for e in result["edges"]:
        ends = e["means"] if e["reward"] == e["edge"][1] else e["means"][::-1]
        table.append(f"| {e['edge'][0]} to {e['edge'][1]} | {e['reward']} | {e['spearman']:.3f} | {between(e)} | {e['n']} | {give(ends[0])} | {give(ends[-1])} |")
    return "\n".join(table)


def triangle(title, names, of, side=380, cell=58):
    """The simplex of three weights, (i, j, k) of sum 10 -> a picture, or a number shown by a colour and in digits."""
    sheet = Image.new("RGB", (side + 140, side + 80), "white")
    pen, font = ImageDraw.Draw(sheet), lambda size: ImageFont.load_default(size=size)
    pen.text((sheet.width / 2, 14), title, "black", font(15), anchor="mm")
    corner = [(70, side + 28), (side + 70, side + 28), (side / 2 + 70, side + 28 - side * 0.75**0.5)]
    numbers = [v for v in of.values() if isinstance(v, float)]
    shades = np.array([(0, 34, 78), (87, 93, 109), (165, 156, 116), (254, 232, 56)])  # dark blue to yellow, light rising: cividis
    for point, value in of.items():
        x, y = (sum(w / 10 * c[axis] for w, c in zip(point, corner)) for axis in (0, 1))
        if isinstance(value, float):
            t = 3 * (value - min(numbers)) / max(max(numbers) - min(numbers), 1e-9)
            shade = [float(np.interp(t, range(4), shades[:, c])) for c in range(3)]
            pen.ellipse((x - cell / 2, y - cell / 2, x + cell / 2, y + cell / 2), tuple(map(round, shade)))
            pen.text((x, y), f"{value:+.2f}", "white" if sum(shade) < 380 else "black", font(14), anchor="mm")
        else:
            sheet.paste(value.resize((cell, cell), Image.BICUBIC), (round(x - cell / 2), round(y - cell / 2)))
    for (x, y), name, down in zip(corner, names, (1, 1, -1)):
        pen.text((x, y + down * (cell / 2 + 10)), name, "black", font(14), anchor="mm")
    return sheet


def couples(args):
    """Sec. 5.1's claim for people: --n couples of unseen people, one blended into the other in ten steps, and both true
    rewards of the pictures, with the same captions and noise throughout."""
    adapter, users, pairs, data = with_people(args)
    (taste, words), n = true_tastes(data), args.n or 64
    rows = held_out(users, pairs, 2, 2 * n)["unseen"]
    n = len(rows) // 2
    a, b, captions = [r["user"] for r in rows[:n]], [r["user"] for r in rows[n:2 * n]], [r["caption"] for r in rows[:n]]
    base, weights, seeds = load_base(args, adapter), np.arange(11) / 10, [args.seed + i for i in range(n)]
    one, other = (torch.cat([standardised(adapter, users / f"{name}.pt") for name in names]) for names in (a, b))
    scores, made = dict(one=[], other=[]), []
    for w in tqdm(weights, desc="weights", disable=None):
        made.append(generate(base, captions, seeds, adapter, (1 - w) * one + w * other, args.batch, steps=args.steps, guidance=args.guidance))
        for who, names in (("one", a), ("other", b)):
            scores[who].append(tiny.utility(taste(names).numpy(), made[-1]))
    result = {who: dict(means=[mean(s) for s in scores[who]], gained=mean(sign * (scores[who][-1] - scores[who][0])),
                        **spearman(sign * weights, np.stack(scores[who]))) for who, sign in (("one", -1), ("other", 1))}
    series = {f"true reward of the {who}": [(m["mean"], m["ci95"]) for m in result[who]["means"]] for who in ("one", "other")}
    chart = lines(f"{n} couples of unseen people, one blended into the other", [f"{w:g}" for w in weights], series, "mean true reward")
    far = sorted(range(n), key=lambda i: float(taste([a[i]])[0] @ taste([b[i]])[0]))[:6]  # the couples least alike
    labels = [f"{captions[i]}\n{words([a[i]])[0]} -> {words([b[i]])[0]}" for i in far]
    report(args, result, dict(couples=beside([chart, grid([[p[i] for p in made] for i in far], labels, [f"{w:g}" for w in weights], 56)], down=True)), "couples")


def couples_table(result):
    table = ["| couples of unseen people | Spearman of weight and mean true reward | 95% | n | true reward gained from one end to the other |", "|---|---|---|---|---|"]
    return "\n".join(table + [f"| the {who} | {result[who]['spearman']:.3f} | {between(result[who])} | {result[who]['n']} | {give(result[who]['gained'])} |" for who in ("one", "other")])


# --------------------------------------------------------------------------------- Fig. 2: who is this embedding?
TOP = (1, 2, 4, 8, 16)


def classify(args):
    """Fig. 2: a classifier from a frozen embedding of one four-shot group to the person, by the VLM's layer, read after the
    prompt (--users) and after a written profile (--profile-users). One group a person is for the test, one to choose the
    epoch; a group that shares a picture with either trains nothing (the winner of a pair stays on screen, so many would).
    On the drawn world also two ceilings, as few distinct tastes exist: who knows the true taste, and who reads the four
    choices perfectly, can do no better than guess among people of the same taste. Captions may recur among a person's groups:
    on real data that tells people apart too."""
    users = Path(args.users)
    pairs, settings = read_pairs(users)
    data = Path(args.data or settings["data"])
    rows, kept, shots = rows_by_id(data), {}, {}
    for name in sorted({r["user"] for r in pairs}, key=lambda name: share("classify", name)):
        groups = load_user(users / f"{name}.pt")["shots"]
        shown = [{row[uid] for row in rows(group) for uid in ("image_0_uid", "image_1_uid")} for group in groups]
        clean = [g for g in range(2, len(shown)) if not shown[g] & (shown[0] | shown[1])] if len(shown) >= 10 and not shown[0] & shown[1] else []
        if clean:
            kept[name], shots[name] = clean, groups
        if len(kept) == (args.n or 300):
            break
    if len(kept) < 20:
        raise BadInput(f"--users {users}: {len(kept)} people with ten groups or more; expected at least 20. Embed with --groups 20 --layer all")
    names, result = list(kept), dict(people=len(kept), groups=sum(map(len, kept.values())), states={})
    print(f"{len(names)} people; {result['groups']} groups to train on, one a person to choose the epoch, one to test")
    for kind, folder in (("prompt", users), ("profile", args.profile_users)):
        if folder:
            every = [load_user(Path(folder) / f"{name}.pt") for name in names]
            for name, file in zip(names, every):
                if file["shots"] != shots[name] or bool(file["profile"]) != (kind == "profile"):
                    raise BadInput(f"{Path(folder) / name}.pt: expected a person read after the {kind} from the same choices as in {users}")
            for layer in tqdm(range(every[0]["embedding"].shape[1]), desc=f"classifiers, {kind}", disable=None):
                x = [file["embedding"][:, layer] for file in every]
                layer = layer if every[0]["layer"] == "all" else every[0]["layer"]
                ranks = classifier(torch.cat([e[kept[name]] for e, name in zip(x, names)]), torch.tensor([i for i, name in enumerate(names) for _ in kept[name]]),
                                   torch.stack([e[1] for e in x]), torch.stack([e[0] for e in x]), args.seed)
                result["states"][f"{kind}, layer {layer}"] = {str(k): rate((ranks < k).float().tolist()) for k in TOP}
    result["chance"] = {str(k): k / len(names) for k in TOP}
    if (data / "people.json").is_file():
        weights, _, odds = tiny.all_tastes()
        kind = torch.cdist(true_tastes(data)[0](names), torch.tensor(weights, dtype=torch.float32)).argmin(1).numpy()
        tested = [picture for name in names for _, *both in group_pictures(data, rows(shots[name][0])) for picture in both]
        z = (tiny.measure(tested) - tiny.MEAN) / tiny.STD
        likely = (tiny.believe(z.reshape(len(names), -1, 2, len(tiny.AXES))) / odds)[:, kind]  # of everybody, given these four choices
        mine = likely.diagonal()[:, None]
        above, same = (likely > mine * (1 + 1e-9)).sum(1), (np.abs(likely / mine - 1) <= 1e-9).sum(1)
        crowd = (kind[:, None] == kind).sum(1)
        result["ceilings"] = {"a perfect reader of the four choices": {str(k): rate(np.clip((k - above) / same, 0, 1).tolist()) for k in TOP},
                              "the true taste": {str(k): rate(np.minimum(1, k / crowd).tolist()) for k in TOP}}
    with_ci = lambda row: [(row[str(k)]["rate"], row[str(k)]["ci95"]) for k in TOP]
    states = result["states"]
    last = {kind: [key for key in states if key.startswith(kind)] for kind in ("prompt", "profile")}
    series = {f"{kind}, last layer": with_ci(states[keys[-1]]) for kind, keys in last.items() if keys}
    series |= {title: [row[str(k)]["rate"] for k in TOP] for title, row in result.get("ceilings", {}).items()} | {"chance": list(result["chance"].values())}
    by_layer = {f"after the {kind}": [(states[key]["16"]["rate"], states[key]["16"]["ci95"]) for key in keys] for kind, keys in last.items() if keys}
    layers = range(len(last["prompt"]))
    by_layer["chance"] = [result["chance"]["16"]] * len(layers)
    report(args, result, dict(figure_2=beside([lines(f"Which of {len(names)} people? Top k of the classifier", [f"k = {k}" for k in TOP], series, "accuracy"),
                                               lines("Top 16 by layer (0: the embedded last token)", layers, by_layer, "accuracy")])))


def classifier(x, who, check, test, seed, epochs=60):
    """An MLP from embeddings (N, D) to people (N,), at its best epoch on `check` -> rank (0 is first) of everybody's own
    name for their embedding in `test`; check and test: (people, D) in the people's order."""
    torch.manual_seed(seed)
    average, spread = x.mean(0), x.std(0).clamp(min=1e-6)
    x, check, test = ((v - average) / spread for v in (x, check, test))
    mlp = nn.Sequential(nn.Linear(x.shape[1], 256), nn.GELU(), nn.LayerNorm(256), nn.Dropout(0.3), nn.Linear(256, len(test)))
    optimizer, best, own = torch.optim.AdamW(mlp.parameters(), lr=1e-3, weight_decay=1e-2), (math.inf, None), torch.arange(len(test))
    for _ in range(epochs):
        mlp.train()
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(mlp(x[batch]), who[batch], label_smoothing=0.1).backward()
            optimizer.step()
        mlp.eval()
        with torch.no_grad():
            loss = nn.functional.cross_entropy(mlp(check), own).item()
            if loss < best[0]:
                logits = mlp(test)
                best = loss, (logits > logits[own, own][:, None]).sum(1)
    return best[1]


def classify_table(result):
    table = [f"| embedding, {result['people']} people | " + " | ".join(f"top {k}" for k in TOP) + " |", "|---" * (1 + len(TOP)) + "|",
             "| chance | " + " | ".join(f"{v:.3f}" for v in result["chance"].values()) + " |"]
    for name, row in (result["states"] | result.get("ceilings", {})).items():
        table.append(f"| {name} | " + " | ".join(map(rated, row.values())) + " |")
    return "\n".join(table)


# ---------------------------------------------------------------------------- Fig. 6: the profile in words instead
def profiles(args):
    """Fig. 6: the profile that the VLM writes of unseen people, appended to the caption, against PPD: base, Diffusion-DPO (in
    --baselines), both again with the profile, PPD; one held-out caption a person. Win rate and true reward where the truth is
    known, and how much of the caption is kept: its colour and shape on the drawn world, else the CLIP score."""
    adapter, users, pairs, data = with_people(args)
    rows = held_out(users, pairs, 2, args.n or 200)["unseen"]
    names, captions, drawn = [r["user"] for r in rows], [r["caption"] for r in rows], (data / "people.json").is_file()
    written = profiles_of(args, users, names, data)
    worded, seeds = [f"{caption}, {text}" for caption, text in zip(captions, written)], [args.seed + i for i in range(len(rows))]
    dpo, own = baseline(args, adapter, "dpo", users, objective="dpo"), torch.cat([standardised(adapter, users / f"{name}.pt") for name in names])
    base, everybody = load_base(args, adapter), standardised(dpo, "zero")
    if cut := sum(len(base.tokenizer(text).input_ids) > base.tokenizer.model_max_length for text in worded):
        print(f"{cut} of {len(worded)} captions with a profile are longer than the text encoder reads, and are cut")
    arms = {"base": (captions, adapter, None), "base, profile in the caption": (worded, adapter, None), "Diffusion-DPO": (captions, dpo, everybody),
            "Diffusion-DPO, profile in the caption": (worded, dpo, everybody), "PPD": (captions, adapter, own)}
    made = {}
    for arm, (prompts, which, person) in arms.items():
        which.install(base.prior)
        made[arm] = generate(base, prompts, seeds, which, person, args.batch, arm, steps=args.steps, guidance=args.guidance)
    if drawn:
        taste, words = true_tastes(data)
        taste, likes = taste(names).numpy(), [f"likes {text}\n" for text in words(names)]
        scores = {arm: tiny.utility(taste, pictures) for arm, pictures in made.items()}
        kept = {arm: dict(fidelity=rate(tiny.fidelity(pictures, captions))) for arm, pictures in made.items()}
        result = dict(arms={arm: compare(scores[arm], scores["base"]) | kept[arm] for arm in arms}, over={
            arm: compare(scores["PPD"], scores[arm]) for arm in arms if arm != "PPD"})
    else:
        result = dict(arms={arm: dict(clip=mean(score("clip", pictures, captions, str(base.device)))) for arm, pictures in made.items()})
        likes = [""] * len(names)
    result["profiles"] = dict(zip(names[:8], written))
    labels = [f"{captions[i][:60]}\n{likes[i]}VLM: {written[i][:60]}" for i in range(min(8, len(rows)))]
    sheet = grid([[made[arm][i] for arm in arms] for i in range(len(labels))], labels, [arm.replace(", profile in the caption", "\n+ profile") for arm in arms])
    report(args, result, dict(figure_6=sheet))


def profiles_table(result):
    if "over" not in result:
        return "\n".join(["| method | CLIP score with the caption |", "|---|---|"] + [f"| {arm} | {give(r['clip'])} |" for arm, r in result["arms"].items()])
    table = ["| method | win rate over base | 95% | true reward | colour and shape | 95% | PPD's win rate over it | 95% | n |", "|---|---|---|---|---|---|---|---|---|"]
    for arm, r in result["arms"].items():
        won = f"{r['win_rate']:.3f} | {between(r)}" if arm != "base" else "- | -"
        lost = f"{result['over'][arm]['win_rate']:.3f} | {between(result['over'][arm])}" if arm != "PPD" else "- | -"
        table.append(f"| {arm} | {won} | {r['mean']:+.2f} | {r['fidelity']['rate']:.3f} | {between(r['fidelity'])} | {lost} | {r['n']} |")
    return "\n".join(table)


# ------------------------------------------------------------------------------------------------------- ablations
ABLATIONS = {  # one change at a time from the default: what it is called, and the flags that make it
    "default": [],
    "1 user token": ["--tokens", "1"],
    "projector without biases": ["--bias-free"],
    "no user drop": ["--user-drop", "0"],
    "separate noise": ["--noise", "separate"],
    "1 shot": [],
    "10 training people": [],
    "100 training people": [],
    "beta 0.1": ["--beta", "0.1"],
    "beta 2": ["--beta", "2"],
}
SEEDS = (0, 1, 2)


def ablations(args):
    """What the paper leaves open: every change of ABLATIONS trained for --train-steps with three seeds, and scored on unseen
    people against the default with the same people, captions and noise. Finished runs in --out are not repeated and a killed
    one goes on. An interval is over people, a person's value being their mean over the seeds; seeds are listed beside it."""
    users, out = Path(args.users), Path(args.out)
    pairs, settings = read_pairs(users)
    truth, _ = true_tastes(args.data or settings["data"])
    one_shot = users.with_name(users.name + "-1shot")
    if not (one_shot / "pairs.parquet").exists():
        embed_again(args, one_shot, settings, "--shots", 1, *flags_of(settings, "vlm", "layer", "profile", "groups"))
    rows = held_out(users, pairs, 2, args.n or 100)["unseen"]
    names, captions = [r["user"] for r in rows], [r["caption"] for r in rows]
    taste, noise = truth(names).numpy(), [args.seed + i for i in range(len(names))]
    known = sorted({r["user"] for r in pairs if r["split"] == "train"}, key=lambda name: share("ablation", name))
    base, values, seconds = None, {}, 0
    for (change, flags), seed in itertools.product(ABLATIONS.items(), SEEDS):
        folder, people = out / f"{change.replace(' ', '-')}-{seed}", one_shot if change == "1 shot" else users
        if "training people" in change:
            flags = ["--only", *known[:int(change.split()[0])]]
        flags = [*flags, "--users", str(people), "--base", args.base or "tiny", "--seed", seed, "--max-steps", args.train_steps, "--dtype", args.dtype]
        how = dict(train=flags, people=names, seed=args.seed, steps=args.steps, guidance=args.guidance)
        if not (folder / "scores.json").exists():
            began = time.time()
            script("train.py", *flags, "--out", folder, "--decoder", args.decoder, "--device", args.device, "--log-every", 50, "--preview-every", 0, "--resume",
                   *(["--data", args.data] if args.data else []))
            adapter = UserAdapter.load(folder)
            if adapter.header["step"] < args.train_steps:
                raise BadInput(f"{folder}: training was stopped after {adapter.header['step']} steps; the same command goes on")
            base = base or load_base(args, adapter)
            adapter.install(base.prior)
            draw = lambda person, desc: generate(base, captions, noise, adapter, person, args.batch, desc, steps=args.steps, guidance=args.guidance)
            own = torch.cat([standardised(adapter, people / f"{name}.pt") for name in names])
            made = {kind: draw(person, f"{kind}, {folder.name}") for kind, person in (("base", None), ("own", own), ("other", own.roll(1, 0)))}
            scores = {kind: tiny.utility(taste, pictures).tolist() for kind, pictures in made.items()}
            scores |= dict(how=how, fidelity=tiny.fidelity(made["own"], captions), seconds=time.time() - began)
            write_atomically(folder / "scores.json", lambda path: path.write_text(json.dumps(scores)))
        scores = read_json(folder / "scores.json")
        if different := [key for key in how if scores.get("how", {}).get(key) != how[key]]:
            raise BadInput(f"{folder}/scores.json is of other {different[0]}: {scores.get('how', {}).get(different[0])}, not {how[different[0]]}; move it away or choose another --out")
        seconds += scores["seconds"]
        values[change, seed] = {kind: np.array(scores[kind]) for kind in ("base", "own", "other", "fidelity")}
    args.began = time.time() - seconds  # all runs count, whenever they were made
    result = {}
    for change in ABLATIONS:
        of = {kind: np.stack([values[change, seed][kind] for seed in SEEDS]) for kind in ("base", "own", "other", "fidelity")}
        gains, default = of["own"] - of["base"], np.stack([values["default", seed]["own"] - values["default", seed]["base"] for seed in SEEDS])
        result[change] = dict(win_rate=rate(wins(of["own"], of["base"]).mean(0)), own_over_other=rate(wins(of["own"], of["other"]).mean(0)), gain=mean(gains.mean(0)),
                              against_default=mean((gains - default).mean(0)), gain_by_seed=gains.mean(1).round(3).tolist(), fidelity=rate(of["fidelity"].mean(0)))
    series = {"true reward gained over the base": [(r["gain"]["mean"], r["gain"]["ci95"]) for r in result.values()]}
    chart = bars("One change at a time from the default", [change.replace(" ", "\n") for change in result], series, "true reward gained", low=min(
        0.0, *(r["gain"]["ci95"][0] for r in result.values())), high=max(r["gain"]["ci95"][1] for r in result.values()), line=result["default"]["gain"]["mean"], wide=860)
    report(args, dict(changes=result), dict(ablations=chart))


def ablations_table(result):
    n = result["changes"]["default"]["gain"]["n"]
    table = [f"| change, n = {n} people | win rate over base | own over another's | reward gained | by seed | against the default | colour and shape |", "|---|---|---|---|---|---|---|"]
    for change, r in result["changes"].items():
        table.append(f"| {change} | {rated(r['win_rate'])} | {rated(r['own_over_other'])} | {give(r['gain'])} | {', '.join(f'{g:+.2f}' for g in r['gain_by_seed'])} | "
                     f"{'' if change == 'default' else give(r['against_default'])} | {rated(r['fidelity'])} |")
    return "\n".join(table)


# ------------------------------------------------------------------------------------------------------------ charts
INK = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe and Ito's, told apart by everybody


def axes(title, across, low, high, label, names, wide=520, tall=350):
    """An empty chart: names of its x positions, the range and label of y, its series -> picture, pen, and a function from
    (x position, y) to pixels. Series are told apart by colour and by mark."""
    chart = Image.new("RGB", (wide, tall), "white")
    pen, font = ImageDraw.Draw(chart), lambda size: ImageFont.load_default(size=size)
    pen.text((wide / 2, 14), title, "black", font(15), anchor="mm")
    x, y = 60, 34  # the legend, row by row
    for i, name in enumerate(names):
        if (width := font(13).getlength(name) + 26) + x > wide - 5:
            x, y = 60, y + 17
        mark(pen, i, x + 6, y)
        pen.text((x + 15, y), name, "black", font(13), anchor="lm")
        x += width
    high = high if high > low else low + 1
    left, right, top, bottom = 60, wide - 12, y + 18, tall - 16 - 15 * max(str(name).count("\n") + 1 for name in across)
    place = lambda x, y: (left + (right - left) * (x + 0.5) / len(across), bottom - (bottom - top) * (y - low) / (high - low))
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= 6)
    for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        height = place(0, k * step)[1]
        pen.line((left, height, right, height), "#888888" if k == 0 else "#dddddd")
        pen.text((left - 5, height), f"{k * step:g}", "black", font(12), anchor="rm")
    for i, name in enumerate(across):
        pen.multiline_text((place(i, low)[0], bottom + 5), str(name), "black", font(12), anchor="ma", align="center")
    side = Image.new("L", (bottom - top, 18), 255)
    ImageDraw.Draw(side).text(((bottom - top) / 2, 9), label, 0, font(13), anchor="mm")
    chart.paste(side.rotate(90, expand=True), (2, top))
    return chart, pen, place


def mark(pen, i, x, y, r=4):
    """The i-th series' mark: a circle, a square, a triangle, a diamond, in turn."""
    shapes = ([(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)], [(x, y - r - 1), (x + r + 1, y + r), (x - r - 1, y + r)],
              [(x, y - r - 2), (x + r + 2, y), (x, y + r + 2), (x - r - 2, y)])
    if i % 4 == 0:
        pen.ellipse((x - r, y - r, x + r, y + r), INK[i % len(INK)])
    else:
        pen.polygon(shapes[i % 4 - 1], INK[i % len(INK)])


def bars(title, across, series, label, low=0.0, high=1.0, line=0.5, wide=520):
    """A bar chart. series: {name: [(value, (from, to)), ...]}, one a position of `across`; a line for comparison."""
    chart, pen, place = axes(title, across, low, high, label, series, wide)
    pen.line((*place(-0.5, line), *place(len(across) - 0.5, line)), "black", 2)
    for i, values in enumerate(series.values()):
        for x, (value, (down, up)) in enumerate(values):
            middle, half = x + 0.8 * ((i + 0.5) / len(series) - 0.5), 0.36 / len(series)
            (x0, y0), (x1, y1) = place(middle - half, value), place(middle + half, max(low, 0))
            pen.rectangle((x0, min(y0, y1), x1, max(y0, y1)), INK[i % len(INK)])
            (centre, y0), (_, y1) = place(middle, up), place(middle, down)
            pen.line((centre, y0, centre, y1), "black", 2)
    return chart


def lines(title, across, series, label):
    """A line chart. series: {name: [value, ...]} or {name: [(value, (from, to)), ...]}, one a position of `across`."""
    reach = [x for values in series.values() for v in values for x in (v[1] if isinstance(v, tuple) else [v])]
    chart, pen, place = axes(title, across, min(0, *reach), max(reach), label, series)
    for i, values in enumerate(series.values()):
        for x, v in enumerate(values):
            if isinstance(v, tuple):
                pen.line((*place(x, v[1][0]), *place(x, v[1][1])), INK[i % len(INK)], 1)
        points = [place(x, v[0] if isinstance(v, tuple) else v) for x, v in enumerate(values)]
        pen.line(points, INK[i % len(INK)], 2)
        for point in points:
            mark(pen, i, *point)
    return chart


def beside(pictures, down=False):
    """Pictures in a row, or one below the other, on white."""
    wide, tall = [p.width for p in pictures], [p.height for p in pictures]
    sheet = Image.new("RGB", (max(wide), sum(tall)) if down else (sum(wide), max(tall)), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (0, sum(tall[:i])) if down else (sum(wide[:i]), 0))
    return sheet


# ------------------------------------------------------------------------------------- a judge in place of the person
def endpoint_vote(args, text, images, tries=6):
    """An OpenAI-compatible endpoint's answer to a prompt with one <image> a picture. Busy, failing and silent servers are
    asked again, later and later; anything else that is wrong is said at once."""
    content = []
    for words, image in itertools.zip_longest(text.split("<image>"), images):
        content.append(dict(type="text", text=words))
        if image is not None:
            small, buffer = image.copy(), io.BytesIO()
            small.thumbnail((512, 512))
            small.convert("RGB").save(buffer, "JPEG", quality=90)
            content.append(dict(type="image_url", image_url=dict(url="data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), detail="low")))
    body = json.dumps(dict(model=args.judge, temperature=0, max_tokens=500, messages=[dict(role="user", content=content)])).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"}
    for attempt in range(tries):
        try:
            request = urllib.request.Request(args.judge_url.rstrip("/") + "/chat/completions", body, headers)
            with urllib.request.urlopen(request, timeout=args.judge_timeout) as reply:
                return json.load(reply)["choices"][0]["message"]["content"] or ""
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
            if error.code not in (408, 409, 429) and error.code < 500:
                break
        except (OSError, http.client.HTTPException) as error:
            problem = f"{type(error).__name__}: {error}"
        except (ValueError, KeyError, IndexError, TypeError) as error:
            return f"no chat completion ({type(error).__name__})"  # counts as unparsable
        if attempt + 1 < tries:
            time.sleep(min(60, args.judge_wait * 2**attempt))
    raise BadInput(f"--judge-url {args.judge_url}: {' '.join(problem.split())}. What is judged is kept: the same command goes on")


def verdict(first, second):
    """Two answers about a pair, ours shown first and then second -> "ours", "other", "inconsistent" or "unparsable"."""
    votes = [re.findall(r"CHOICE:\s*\**([12])", answer, re.IGNORECASE)[-1:] for answer in (first, second)]
    return {("1", "2"): "ours", ("2", "1"): "other"}.get(tuple(v[0] for v in votes), "inconsistent") if all(votes) else "unparsable"


def judge(args):
    """Sec. 5.2, Fig. 5: who knows only a person's four choices judges which of two pictures of a held-out caption that person
    would choose, ours or the base's; a VLM here, or an OpenAI-compatible endpoint. Each pair is shown in both orders, and
    answers that follow the order are dropped and counted. Its accuracy is measured on the people's own held-out choices."""
    adapter, users, pairs, data = with_people(args)
    chosen = held_out(users, pairs, args.n or 277, args.n or 192)
    todo, rows = [(kind, row) for kind, rows in chosen.items() for row in rows], rows_by_id(data)
    taste = true_tastes(data)[0] if (data / "people.json").is_file() else None  # of drawn people the truth is shown beside the judge
    args.judge = args.judge or load_user(users / f"{todo[0][1]['user']}.pt")["vlm"]
    base, out = load_base(args, adapter), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    how = dict(judge=args.judge, url=args.judge_url, adapter=hashlib.sha256(adapter.path.read_bytes()).hexdigest()[:16],
               seed=args.seed, steps=args.steps, guidance=args.guidance)
    journal, done = out / "judge.jsonl", {}
    if journal.exists():
        kept = read_jsonl(journal)
        if kept and kept[0] != how:
            key = next(k for k in how if kept[0].get(k) != how[k])
            raise BadInput(f"{journal} was begun with {key} {kept[0].get(key)}, not {how[key]}; move it away or choose another --out")
        if broken := [n for n, line in enumerate(kept[1:], 2) if not {"kind", "user"} <= line.keys()]:
            raise BadInput(f"{journal} line {broken[0]}: no judgement; move the file away or choose another --out")
        done = {(line["kind"], line["user"]): line for line in kept[1:]}
    write_jsonl(journal, (how, *done.values()))
    left = [(kind, row) for kind, row in todo if (kind, row["user"]) not in done]
    vlm = load_vlm(args.judge, pick_device(args.device)) if left and not args.judge_url else None
    sheet, position = [], {(kind, row["user"]): i for i, (kind, row) in enumerate(todo)}
    for i in range(0, len(left), args.batch):
        some = left[i:i + args.batch]
        captions, seeds = [row["caption"] for _, row in some], [args.seed + position[kind, row["user"]] for kind, row in some]
        person = torch.cat([standardised(adapter, users / f"{row['user']}.pt") for _, row in some])
        how_to = dict(batch=args.batch, steps=args.steps, guidance=args.guidance)
        made = zip(generate(base, captions, seeds, **how_to), generate(base, captions, seeds, adapter, person, **how_to))
        for (kind, row), (theirs, ours) in tqdm(list(zip(some, made)), desc=f"judging, {i} of {len(left)} done", disable=None):
            try:
                shots = group_pictures(data, rows(load_user(users / f"{row['user']}.pt")["shots"][0]))
                real = read_pictures(data, row)[::1 if row["preferred"] == 0 else -1]
            except BadInput as problem:
                print(f"person {row['user']} is left out: {problem}", file=sys.stderr)
                continue
            text = prompt([c for c, _, _ in shots], "judge", row["caption"])
            shown = [picture for shot in shots for picture in shot[1:]]
            asked = [shown + [a, b] for a, b in ((ours, theirs), (theirs, ours), real, real[::-1])]
            if args.judge_url:
                with ThreadPoolExecutor(4) as pool:
                    answers = list(pool.map(lambda images: endpoint_vote(args, text[len(SYSTEM):-len(ANSWER)], images), asked))
            else:
                answers, _ = write(vlm, [text] * 4, asked)
            line = dict(kind=kind, user=row["user"], pictures=verdict(*answers[:2]), real=verdict(*answers[2:]))
            if taste:
                line["truth"] = float(wins(*tiny.utility(taste([row["user"]]).numpy(), [ours, theirs])))
            done[kind, row["user"]] = line
            sheet += [(f"{row['user']}, {kind}: {line['pictures']}", row["caption"], theirs, ours)] if len(sheet) < 8 else []
            append_line(journal, json.dumps(line))
    result = dict(judge=args.judge, people={})
    for name in ("seen", "unseen", "all"):
        result["people"][name] = counted([line["pictures"] for line in done.values() if name in (line["kind"], "all")])
    result["accuracy"] = counted([line["real"] for line in done.values()])
    if taste:
        result["truth"] = {name: rate([line["truth"] for line in done.values() if name in (line["kind"], "all")]) for name in result["people"]}
    pictures = {}  # if nothing was left to judge they are there already
    if sheet:
        names, _, theirs, ours = zip(*sheet)
        pictures["judge"] = grid([theirs, ours], ["base", "theirs"], [name.replace(", ", "\n") for name in names])
    if all(r["n"] for r in result["people"].values()):
        series = {"by the true taste": [(r["rate"], r["ci95"]) for r in result["truth"].values()]} if taste else {}
        series |= {f"by the judge, {Path(args.judge).name}": [(r["rate"], r["ci95"]) for r in result["people"].values()]}
        pictures["figure_5"] = bars("Win rate over the base, with 95% intervals", list(result["people"]), series, "win rate")
    report(args, result, pictures)


def judge_table(result):
    table = ["| people | win rate over base, judged | 95% | judged | inconsistent | unparsable | by the true taste | n |", "|---|---|---|---|---|---|---|---|"]
    for name, r in dict(result["people"], accuracy=result["accuracy"]).items():
        votes, truth = f"{r['rate']:.3f} | {between(r)} | {r['n']}" if r["n"] else "- | - | 0", result.get("truth", {}).get(name)
        table.append(f"| {'the judge on real choices' if name == 'accuracy' else name} | {votes} | {r['inconsistent']} | {r['unparsable']} | "
                     + (f"{rated(truth)} | {truth['n']} |" if truth else "- | - |"))
    return "\n".join(table)


def counted(verdicts):
    """Win rate among consistent verdicts, and what was dropped."""
    right = [int(v == "ours") for v in verdicts if v in ("ours", "other")]
    return (rate(right) or dict(rate=None, n=0, ci95=None)) | {kind: verdicts.count(kind) for kind in ("inconsistent", "unparsable")}


TABLES = dict(people=people_table, judge=judge_table, rewards=rewards_table, interpolate=interpolate_table, couples=couples_table,
              classify=classify_table, profiles=profiles_table, ablations=ablations_table)


def run(args):
    args.began, path = time.time(), Path(args.out) / "evaluation.json"
    if path.exists():
        read_json(path)  # a broken one is better known now than after the work
    globals()[args.command](args)  # one of COMMANDS


def main(argv=None):
    run_script("evaluate.py", run, arguments(argv))


if __name__ == "__main__":
    main()
