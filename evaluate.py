"""The paper's numbers and figures, each by a subcommand. Results go to evaluation.json and .md beside the adapter (every
subcommand rewrites only its own keys) and to a picture.

    python evaluate.py                                   # Sec. 5.2: people read by the VLM, seen and unseen, with controls
    python evaluate.py rewards --adapter runs/onehot     # Sec. 5.1: win rate and mean reward over the base, per reward
    python evaluate.py judge                             # Sec. 5.2: a VLM or an endpoint judges for the person, seen and unseen

Both arms of a comparison get the same prompts and the same noise. Every rate comes with its n and a 95% interval.
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
import re
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def arguments(argv=None):
    p = argparse.ArgumentParser(prog="evaluate.py", usage=argparse.SUPPRESS, description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", nargs="?", choices=("people", "rewards", "judge"), default="people",
                   help="people: drawn ones, whose taste is known (Sec. 5.2); rewards: one-hot users (Sec. 5.1); judge: any people (Sec. 5.2) (default: %(default)s)")
    p.add_argument("--adapter", help="run folder or adapter file (default: runs/ppd, for rewards runs/onehot)")
    p.add_argument("--data", help="folder with people.json, if it moved since embed.py read it")
    p.add_argument("--users", help="folder that embed.py wrote (default: the one the adapter was trained on)")
    p.add_argument("--base", help="default: the one the adapter was trained on")
    p.add_argument("--decoder", default="stabilityai/stable-cascade", help="hub id or folder with Stages A and B (default: %(default)s)")
    p.add_argument("--prompts", help="rewards: captions, as sample.py takes them (default: the held-out ones)")
    p.add_argument("--judge", help="judge: a VLM as embed.py's --vlm, or the endpoint's model (default: the VLM that read the people)")
    p.add_argument("--judge-url", help="judge: an OpenAI-compatible endpoint like https://host/v1; its key is read from OPENAI_API_KEY")
    p.add_argument("--judge-timeout", type=float, default=120, help="seconds for an answer (default: %(default)s)")
    p.add_argument("--judge-wait", type=float, default=2, help="seconds before asking a failing endpoint again, doubled each time (default: %(default)s)")
    p.add_argument("--n", type=int, help="people of a kind, or pictures a reward and arm (default: 200; with --prompts all; judge 277 seen and 192 unseen)")
    p.add_argument("--steps", type=int, help="denoising steps (default: tiny 20, full scale 30)")
    p.add_argument("--guidance", type=float, help="classifier-free guidance (default: tiny 2, full scale 4)")
    p.add_argument("--batch", type=int, default=50, help="pictures at once (default: %(default)s)")
    p.add_argument("--seed", type=int, default=10_000, help="of the first picture (default: %(default)s)")
    p.add_argument("--out", help="folder to write (default: the adapter's)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    args = p.parse_args(argv)
    args.adapter = args.adapter or ("runs/onehot" if args.command == "rewards" else "runs/ppd")
    for key in ("n", "steps", "batch"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            p.error(f"--{key} {getattr(args, key)}: expected 1 or more")
    if args.judge_url and not args.judge:
        p.error("--judge-url wants the endpoint's model too: --judge MODEL")
    if not Path(args.adapter).exists():
        p.error(f"--adapter {args.adapter}: no such file or folder; train.py writes runs/<name>")
    args.out = args.out or str(Path(args.adapter) if Path(args.adapter).is_dir() else Path(args.adapter).parent)
    return args


if __name__ == "__main__":
    arguments()  # a wrong flag answers at once, not after the imports

import torch
from tqdm import tqdm

import tiny
from embed import ANSWER, REWARDS, SYSTEM, group_pictures, load_vlm, prompt, read_pairs, read_people, read_pictures, read_rows, score, share, write
from ppd import BadInput, UserAdapter, load_user, pick_device, run_script, write_atomically
from sample import generate, grid, load_base, read_prompts, standardised


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
    if sheet is not None:
        sheet.save(out / f"{name}.png")
    print(table)
    print(f"-> {path}, {out / 'evaluation.md'}, {out / f'{name}.png'}")


def rate(right):
    """A list of 0 and 1 -> its rate, n and interval; None where there is nothing to count."""
    return dict(rate=round(sum(right) / len(right), 4), n=len(right), ci95=wilson(sum(right) / len(right), len(right))) if right else None


def between(r):
    return f"{r['ci95'][0]:.3f} to {r['ci95'][1]:.3f}"


def said(f):
    return (f"Colour and shape as the caption says: base {f['base']['rate']:.3f} (n = {f['base']['n']}), "
            f"personalised {f['ppd']['rate']:.3f} (n = {f['ppd']['n']}).")


def rewards(args):
    """Sec. 5.1, Table 1: synthetic people, each a reward; mean reward and win rate over the base on --prompts or the held-out
    captions. On the drawn world also whether the caption's colour and shape are there."""
    adapter = UserAdapter.load(args.adapter)
    users = Path(args.users or adapter.header.get("users", "users"))
    pairs, _ = read_pairs(users)
    if (unknown := {r["user"] for r in pairs} - tiny.WORDS.keys() - REWARDS.keys()):
        raise BadInput(f"--users {users}: {sorted(unknown)[0]!r} is no reward; give a folder made by embed.py --one-hot")
    names = sorted({r["user"] for r in pairs}, key=lambda name: load_user(users / f"{name}.pt")["embedding"].flatten().argmax().item())
    captions = read_prompts(args.prompts) if args.prompts else sorted({r["caption"] for r in pairs if r["split"].startswith("test")})
    if not captions:
        raise BadInput(f"--users {users}: pairs.parquet has no held-out test caption; give --prompts")
    base, n = load_base(args, adapter), args.n or (len(captions) if args.prompts else 200)
    drawn = names[0] in tiny.WORDS
    prompts, seeds = [captions[i % len(captions)] for i in range(n)], [args.seed + i for i in range(n)]
    shown = min(n, len(captions), 12)  # rows of the sheet, the only place of the zero user
    arms = dict(base=None, zero=standardised(adapter, "zero")) | {name: standardised(adapter, users / f"{name}.pt") for name in names}
    scores, right, sheet = {}, {}, {}
    for arm, person in arms.items():
        scored, right[arm], sheet[arm] = {name: [] for name in names}, [], []
        for i in range(0, shown if arm == "zero" else n, 4 * args.batch):  # scored as they come: all of them would not fit in memory
            some = slice(i, min(i + 4 * args.batch, shown if arm == "zero" else n))
            made = generate(base, prompts[some], seeds[some], adapter, person, args.batch, arm, steps=args.steps, guidance=args.guidance)
            sheet[arm] += made[:max(0, shown - i)]
            for name in names:
                scored[name] += score(name, made, prompts[some], str(base.device)).tolist()
            right[arm] += tiny.fidelity(made, prompts[some]) if drawn else []
        scores[arm] = scored
    results = dict(one_hot={name: compare(scores[name][name], scores["base"][name]) for name in names})
    results |= {} if drawn else dict(reward_models={name: REWARDS[name][0] for name in names})
    lines = ["| reward | win rate over base | 95% | n | " + " | ".join(f"mean, {arm}" for arm in ("base", *names)) + " |", "|---" * (5 + len(names)) + "|"]
    for name, r in results["one_hot"].items():
        lines.append(f"| {name if drawn else REWARDS[name][0]} | {r['win_rate']:.3f} | {between(r)} | {r['n']} | "
                     + " | ".join(f"{sum(scores[arm][name]) / n:+.2f}" for arm in ("base", *names)) + " |")
    if drawn:
        results["fidelity"] = f = dict(base=rate(right["base"]), ppd=rate([r for name in names for r in right[name]]))
        lines += ["", "Rewards are in standard deviations of the drawn pictures. " + said(f)]
    report(args, results, "\n".join(lines), grid(list(zip(*sheet.values())), [c[:60] for c in prompts[:shown]], list(arms)), "rewards")


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


def people(args):
    """Sec. 5.2: people whom the VLM read from four choices, seen and unseen, one held-out caption each; win rate and mean
    true reward (from people.json, which nothing else reads) over the base. Controls, for the unseen: another person's
    embedding, the zero user, and the true taste: what a linear fit over the training people expects a person of that taste
    to look like to the VLM, which is the ceiling for reading four choices. And the reverse fit, from embedding to taste:
    how much of a taste an unseen person's embedding tells, as a mean cosine."""
    adapter = UserAdapter.load(args.adapter)
    users = Path(args.users or adapter.header.get("users", "users"))
    pairs, settings = read_pairs(users)
    data = Path(args.data or settings["data"])
    if not (data / "people.json").is_file():
        raise BadInput(f"--data: no {data / 'people.json'}; true tastes are known of drawn people only. Of others ask evaluate.py judge")
    truth = json.loads((data / "people.json").read_text())
    taste = lambda names: torch.tensor([truth["tastes"][int(name)] for name in names])
    embedding = lambda names: torch.cat([standardised(adapter, users / f"{name}.pt") for name in names]).cpu()
    chosen = held_out(users, pairs, args.n or 200, args.n or 200)
    names = {kind: [r["user"] for r in rows] for kind, rows in chosen.items()}
    captions = {kind: [r["caption"] for r in rows] for kind, rows in chosen.items()}
    base = load_base(args, adapter)

    known = sorted({r["user"] for r in pairs if r["split"] == "train"})
    told, meant, own = embedding(known), taste(known), embedding(names["unseen"])
    likeness = ridge(meant, told)(taste(names["unseen"]))
    cosine = torch.cosine_similarity(ridge(told, meant)(own), taste(names["unseen"]))
    half = 1.96 * cosine.std() / len(cosine)**0.5
    readout = dict(cosine=round(cosine.mean().item(), 4), n=len(cosine), ci95=[round((cosine.mean() + d).item(), 4) for d in (-half, half)])
    arms = {"seen base": ("seen", None), "seen": ("seen", embedding(names["seen"])), "unseen base": ("unseen", None), "unseen": ("unseen", own),
            "other_user": ("unseen", own.roll(1, 0)), "zero": ("unseen", torch.zeros_like(own)),
            "true_taste": ("unseen", likeness * own.norm() / likeness.norm())}
    made = {arm: generate(base, captions[kind], [args.seed + i for i in range(len(captions[kind]))], adapter, person, args.batch, arm,
                          steps=args.steps, guidance=args.guidance) for arm, (kind, person) in arms.items()}
    scores = {arm: tiny.utility(taste(names[kind]).numpy(), made[arm]) for arm, (kind, _) in arms.items()}
    result = {arm: compare(scores[arm], scores[f"{kind} base"]) for arm, (kind, person) in arms.items() if person is not None}
    own_over_other = compare(scores["unseen"], scores["other_user"])
    everyone = captions["seen"] + captions["unseen"]
    f = {arm: rate(tiny.fidelity(made[a] + made[b], everyone)) for arm, a, b in (("base", "seen base", "unseen base"), ("ppd", "seen", "unseen"))}
    few_shot = dict(seen=result.pop("seen"), unseen=result.pop("unseen"), controls=result, own_over_other=own_over_other, readout=readout)
    lines = ["| people | win rate over base | 95% | n | mean, base | mean, theirs |", "|---|---|---|---|---|---|"]
    for name, r in dict(seen=few_shot["seen"], unseen=few_shot["unseen"], **result).items():
        lines.append(f"| {name} | {r['win_rate']:.3f} | {between(r)} | {r['n']} | {r['mean_base']:+.2f} | {r['mean_user']:+.2f} |")
    lines += ["", f"An unseen person's own embedding wins over another's in {own_over_other['win_rate']:.3f} ({between(own_over_other)}). "
              f"Read-out of the true taste from it: cosine {readout['cosine']:.3f} ({between(readout)}).", said(f)]

    shown = sorted(set(captions["unseen"]))[:8]  # the sheet: four people of each kind, what they like, what the VLM says of them
    some = names["seen"][:4] + names["unseen"][:4]
    files = [load_user(users / f"{name}.pt") for name in some]
    rows = {r["ranking_id"]: r for r in read_rows(data)}
    shots = [group_pictures(data, [rows[i] for i in file["shots"][0]]) for file in files]
    _, profiles = read_people(load_vlm(files[0]["vlm"], pick_device(args.device)), shots, profile=True)
    sheet = [generate(base, shown, [args.seed + i for i in range(len(shown))], adapter, person, steps=args.steps, guidance=args.guidance)
             for person in (None, *(embedding([name]) for name in some))]
    labels = ["base"]
    for i, (name, profile) in enumerate(zip(some, profiles)):
        labels.append(f"{name}, {'seen' if i < len(names['seen'][:4]) else 'unseen'}\nlikes {', '.join(truth['words'][int(name)])}\n"
                      f"VLM: {profile.split('User profile:')[-1].strip()[:40]}")
    report(args, dict(few_shot=few_shot, fidelity=f), "\n".join(lines), grid(sheet, labels, shown), "people")


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
    adapter = UserAdapter.load(args.adapter)
    users = Path(args.users or adapter.header.get("users", "users"))
    pairs, settings = read_pairs(users)
    chosen, data = held_out(users, pairs, args.n or 277, args.n or 192), Path(args.data or settings["data"])
    todo = [(kind, row) for kind, rows in chosen.items() for row in rows]
    wanted = {shot for _, row in todo for shot in load_user(users / f"{row['user']}.pt")["shots"][0]}
    shots_of = {r["ranking_id"]: r for r in read_rows(data) if r["ranking_id"] in wanted}
    args.judge = args.judge or load_user(users / f"{todo[0][1]['user']}.pt")["vlm"]
    base, out = load_base(args, adapter), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    how = dict(judge=args.judge, url=args.judge_url, adapter=hashlib.sha256(adapter.path.read_bytes()).hexdigest()[:16],
               seed=args.seed, steps=args.steps, guidance=args.guidance)
    journal, done = out / "judge.jsonl", {}
    if journal.exists():
        lines = [json.loads(line) for line in journal.read_text().splitlines(True) if line.endswith("}\n")]  # a torn last line is dropped
        if lines and lines[0] != how:
            key = next(k for k in how if lines[0].get(k) != how[k])
            raise BadInput(f"{journal} was begun with {key} {lines[0].get(key)}, not {how[key]}; move it away or choose another --out")
        done = {(line["kind"], line["user"]): line for line in lines[1:]}
    write_atomically(journal, lambda path: path.write_text("".join(json.dumps(line) + "\n" for line in (how, *done.values()))))
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
                shots = group_pictures(data, [shots_of[k] for k in load_user(users / f"{row['user']}.pt")["shots"][0]])
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
            done[kind, row["user"]] = line
            sheet += [(f"{row['user']}, {kind}: {line['pictures']}", row["caption"], theirs, ours)] if len(sheet) < 8 else []
            with open(journal, "a") as file:
                file.write(json.dumps(line) + "\n")
    results = dict(judge=args.judge)
    for name in ("seen", "unseen", "all"):
        results[name] = counted([line["pictures"] for line in done.values() if name in (line["kind"], "all")])
    results["accuracy"] = counted([line["real"] for line in done.values()])
    table = ["| people | win rate over base | 95% | judged | inconsistent | unparsable |", "|---|---|---|---|---|---|"]
    for name, r in results.items():
        if name != "judge":
            rated = f"{r['rate']:.3f} | {between(r)} | {r['n']}" if r["n"] else "- | - | 0"
            table.append(f"| {'the judge on real choices' if name == 'accuracy' else name} | {rated} | {r['inconsistent']} | {r['unparsable']} |")
    picture = None  # if nothing was left to judge it is there already
    if sheet:
        names, _, theirs, ours = zip(*sheet)
        picture = grid([theirs, ours], ["base", "theirs"], [name.replace(", ", "\n") for name in names])
    report(args, dict(judge=results), "\n".join(table), picture, "judge")


def counted(verdicts):
    """Win rate among consistent verdicts, and what was dropped."""
    right = [int(v == "ours") for v in verdicts if v in ("ours", "other")]
    return (rate(right) or dict(rate=None, n=0, ci95=None)) | {kind: verdicts.count(kind) for kind in ("inconsistent", "unparsable")}


def ridge(x, y, strength=10.0):
    """Ridge regression of y on x with an intercept -> a function from x to y."""
    fill = lambda x: torch.cat([x, torch.ones(len(x), 1)], 1)
    solution = torch.linalg.solve(fill(x).T @ fill(x) + strength * torch.eye(x.shape[1] + 1), fill(x).T @ y)
    return lambda x: fill(x) @ solution


def main(argv=None):
    args = arguments(argv)
    run_script("evaluate.py", dict(people=people, rewards=rewards, judge=judge)[args.command], args)


if __name__ == "__main__":
    main()
