"""The paper's numbers and figures, each by a subcommand. Results go to evaluation.json and .md beside the adapter (every
subcommand rewrites only its own keys) and to a picture.

    python evaluate.py rewards --adapter runs/onehot     # Sec. 5.1: win rate and mean reward over the base, per reward

Both arms of a comparison get the same prompts and the same noise. Every rate comes with its n and a 95% interval.
"""
import argparse
import json
import math
from pathlib import Path


def arguments(argv=None):
    p = argparse.ArgumentParser(prog="evaluate.py", usage=argparse.SUPPRESS, description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", choices=("rewards",), help="rewards: one-hot users (Sec. 5.1)")
    p.add_argument("--adapter", default="runs/onehot", help="run folder or adapter file (default: %(default)s)")
    p.add_argument("--users", help="folder that embed.py wrote (default: the one the adapter was trained on)")
    p.add_argument("--base", help="default: the one the adapter was trained on")
    p.add_argument("--n", type=int, default=200, help="pictures a person and arm (default: %(default)s)")
    p.add_argument("--steps", type=int, default=20, help="denoising steps (default: %(default)s)")
    p.add_argument("--guidance", type=float, help="classifier-free guidance (default: tiny 2)")
    p.add_argument("--batch", type=int, default=50, help="pictures at once (default: %(default)s)")
    p.add_argument("--seed", type=int, default=10_000, help="of the first picture (default: %(default)s)")
    p.add_argument("--out", help="folder to write (default: the adapter's)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    args = p.parse_args(argv)
    for key in ("n", "steps", "batch"):
        if getattr(args, key) < 1:
            p.error(f"--{key} {getattr(args, key)}: expected 1 or more")
    if not Path(args.adapter).exists():
        p.error(f"--adapter {args.adapter}: no such file or folder; train.py writes runs/<name>")
    args.out = args.out or str(Path(args.adapter) if Path(args.adapter).is_dir() else Path(args.adapter).parent)
    return args


if __name__ == "__main__":
    arguments()  # a wrong flag answers at once, not after the imports

import tiny
from embed import read_pairs, score
from ppd import BadInput, StableCascade, UserAdapter, load_user, pick_device, run_script, write_atomically
from sample import generate, grid, standardised


def wilson(rate, n, z=1.96):
    """95% interval of a rate by Wilson's score: honest at 0 and 1 too, where the bootstrap has width 0."""
    middle, half = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return [round((middle - half) / (1 + z * z / n), 4), round((middle + half) / (1 + z * z / n), 4)]


def compare(ours, theirs):
    """Scores of two arms on the same prompts and noise -> win rate (a tie is half), n, interval, and both means."""
    rate = sum((a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs)) / len(ours)
    return dict(win_rate=round(float(rate), 4), n=len(ours), ci95=wilson(float(rate), len(ours)),
                mean_user=round(float(sum(ours)) / len(ours), 4), mean_base=round(float(sum(theirs)) / len(theirs), 4))


def report(args, results, table, sheet, name):
    """Merge results into evaluation.json, the Markdown table into evaluation.md, save the picture, print the table."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "evaluation.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    write_atomically(path, lambda p: p.write_text(json.dumps(before | results, indent=1) + "\n"))
    sections = {}
    if (out / "evaluation.md").exists():
        for part in (out / "evaluation.md").read_text().split("## ")[1:]:
            sections[part.split("\n", 1)[0]] = part.split("\n", 1)[1].strip()
    sections[name] = table
    (out / "evaluation.md").write_text("\n".join(f"## {k}\n\n{v}\n" for k, v in sections.items()))
    sheet.save(out / f"{name}.png")
    print(table)
    print(f"-> {path}, {out / 'evaluation.md'}, {out / f'{name}.png'}")


def fidelity(pictures, prompts):
    """Share of pictures that show the caption's colour and shape."""
    right = tiny.fidelity(pictures, prompts)
    return dict(rate=round(sum(right) / len(right), 4), n=len(right), ci95=wilson(sum(right) / len(right), len(right)))


def rewards(args):
    """Sec. 5.1: three synthetic people, each a reward; mean reward and win rate over the base, prompt fidelity."""
    adapter = UserAdapter.load(args.adapter)
    users = Path(args.users or adapter.header.get("users", "users"))
    pairs, _ = read_pairs(users)
    if (unknown := {r["user"] for r in pairs} - tiny.WORDS.keys()):
        raise BadInput(f"--users {users}: {sorted(unknown)[0]!r} is no reward; give a folder made by embed.py --one-hot")
    names = sorted({r["user"] for r in pairs}, key=lambda name: load_user(users / f"{name}.pt")["embedding"].flatten().argmax().item())
    captions = sorted({r["caption"] for r in pairs if r["split"].startswith("test")})
    if not captions:
        raise BadInput(f"--users {users}: pairs.parquet has no held-out test caption")
    base = StableCascade(args.base or adapter.header.get("base", "tiny"), pick_device(args.device))
    adapter.install(base.prior)
    prompts, seeds = [captions[i % len(captions)] for i in range(args.n)], [args.seed + i for i in range(args.n)]
    shown = min(args.n, len(captions), 12)  # rows of the sheet, the only place of the zero user
    people = dict(base=(None, args.n), zero=(standardised(adapter, "zero"), shown))
    people |= {name: (standardised(adapter, users / f"{name}.pt"), args.n) for name in names}
    made = {name: generate(base, prompts[:n], seeds[:n], adapter, person, args.batch, name, steps=args.steps, guidance=args.guidance)
            for name, (person, n) in people.items()}
    scores = {reward: {arm: score(reward, made[arm]) for arm in ("base", *names)} for reward in names}
    results = dict(one_hot={name: compare(scores[name][name], scores[name]["base"]) for name in names},
                   fidelity=dict(base=fidelity(made["base"], prompts), ppd=fidelity([p for n in names for p in made[n]], prompts * len(names))))
    lines = ["| reward | win rate over base | 95% | n | " + " | ".join(f"mean, {arm}" for arm in ("base", *names)) + " |", "|---" * (5 + len(names)) + "|"]
    for name, r in results["one_hot"].items():
        lines.append(f"| {name} | {r['win_rate']:.3f} | {r['ci95'][0]:.3f} to {r['ci95'][1]:.3f} | {r['n']} | "
                     + " | ".join(f"{float(scores[name][arm].mean()):+.2f}" for arm in ("base", *names)) + " |")
    f = results["fidelity"]
    lines += ["", f"Rewards are in standard deviations of the drawn pictures. Colour and shape as the caption says: base {f['base']['rate']:.3f} "
              f"(n = {f['base']['n']}), personalised {f['ppd']['rate']:.3f} (n = {f['ppd']['n']})."]
    sheet = grid([[made[arm][i] for arm in made] for i in range(shown)], captions, list(made))
    report(args, results, "\n".join(lines), sheet, "rewards")


def main(argv=None):
    args = arguments(argv)
    run_script("evaluate.py", dict(rewards=rewards)[args.command], args)


if __name__ == "__main__":
    main()
