"""Pictures for a person and a prompt.

    python sample.py --user assets/onehot/warm.pt --prompt "a red star"               # right after the clone
    python sample.py --user base --user zero --user assets/onehot/light.pt --prompt "a red star" "a blue circle"    # a labelled grid
    python sample.py --user assets/onehot/warm.pt:0.7 --user assets/onehot/large.pt:0.3 --user-scale 1.5 --prompt "a red star"    # blend people

--user without a weight: one picture each. With weights: all of them blended into one person. `zero` is the population's
taste, `base` (or no --user) the untouched base. The settings of every picture are in its PNG metadata.
"""
import argparse
import json
import math
import re
import sys
from pathlib import Path


def arguments(argv=None):
    p = argparse.ArgumentParser(prog="sample.py", usage=argparse.SUPPRESS, description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompt", nargs="+", default=[], help="one or more captions")
    p.add_argument("--prompts", help="text file with a caption a line")
    p.add_argument("--user", action="append", default=[], help="FILE.pt, FILE.pt:WEIGHT, zero or base; repeat for several")
    p.add_argument("--user-scale", type=float, default=1.0, help="multiplies the user's term of Eq. 7; 0 is the base (default: %(default)s)")
    p.add_argument("--group", type=int, default=0, help="which of a person's four-shot groups (default: %(default)s)")
    p.add_argument("--uncond-user", choices=("off", "zero", "same"), default="same", help="whom guidance's unconditional branch sees (default: %(default)s)")
    p.add_argument("--adapter", help="file or run folder (default: runs/ppd if it is there, else the shipped assets/onehot)")
    p.add_argument("--base", help="default: the one the adapter was trained on; tiny without one")
    p.add_argument("--seed", type=int, default=0, help="of the first picture of a prompt (default: %(default)s)")
    p.add_argument("--n", type=int, default=1, help="pictures a prompt and person, seeds counting up (default: %(default)s)")
    p.add_argument("--steps", type=int, default=20, help="denoising steps (default: %(default)s)")
    p.add_argument("--guidance", type=float, help="classifier-free guidance; 1 or less: off (default: tiny 2)")
    p.add_argument("--size", type=int, default=256, help="enlarge smaller pictures to this side, 0: leave them (default: %(default)s)")
    p.add_argument("--out", default="samples", help="folder (default: %(default)s)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    args = p.parse_args(argv)
    if args.prompts:
        if not Path(args.prompts).is_file():
            p.error(f"--prompts {args.prompts}: no such file")
        try:
            args.prompt += [line.strip() for line in Path(args.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError):
            p.error(f"--prompts {args.prompts}: not a UTF-8 text file")
    if not args.prompt:
        p.error("no prompt: give --prompt \"a red star\" or --prompts FILE")
    for key in ("n", "steps"):
        if getattr(args, key) < 1:
            p.error(f"--{key} {getattr(args, key)}: expected 1 or more")
    if not 0 <= args.seed < 2**63 - args.n:
        p.error(f"--seed {args.seed}: expected 0 to 2^63")
    args.user = [parse_user(p, spec) for spec in args.user or ["base"]]
    weighted = [w is not None for _, w in args.user]
    if any(weighted) and not all(weighted):
        p.error("--user: give every user a weight (blended into one person) or none (a picture each)")
    if args.adapter is None and any(name != "base" for name, _ in args.user):
        shipped = str(Path(__file__).resolve().parent / "assets" / "onehot")
        args.adapter = "runs/ppd" if Path("runs/ppd/adapter.safetensors").exists() else shipped
    return args


def parse_user(p, spec):
    name, weight = re.fullmatch(r"(.*?)(?::([^:/\\]*))?", spec, re.DOTALL).groups()
    try:
        weight = None if weight is None else float(weight)
    except ValueError:
        p.error(f"--user {spec}: {weight!r} is no weight; expected FILE.pt:0.7")
    if weight is not None and (name == "base" or not math.isfinite(weight)):
        p.error(f"--user {spec}: expected FILE.pt:WEIGHT with a finite weight; the base cannot be blended, see --user-scale")
    if name not in ("zero", "base") and not Path(name).is_file():
        p.error(f"--user {spec}: no such file; expected one that embed.py wrote, 'zero' or 'base'")
    return name, weight


if __name__ == "__main__":
    arguments()  # a wrong flag answers at once, not after the imports

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from ppd import BadInput, StableCascade, UserAdapter, load_user, pick_device, run_script


def standardised(adapter, name, group=0):
    """(1, D) standardised embedding of a user file's group, or of the zero user. To a Diffusion-DPO adapter everybody is
    the zero user: it has seen nobody else."""
    if name == "zero" or adapter.header.get("objective") == "dpo":
        return torch.zeros_like(adapter.mean)[None]
    embedding = load_user(name)["embedding"]
    if embedding.shape[2] != adapter.user_dim:
        raise BadInput(f"{name}: embedding of width {embedding.shape[2]}, but {adapter.path} was trained on width {adapter.user_dim}")
    if not 0 <= group < len(embedding):
        raise BadInput(f"--group {group}: {name} has groups 0 to {len(embedding) - 1}")
    with torch.no_grad():
        return adapter.standardise(embedding[group, -1:].to(adapter.mean))


def generate(base, prompts, seeds, adapter=None, person=None, batch=32, desc=None, **how):
    """PIL pictures of prompts, one seed each, for one person: standardised embedding (1, D), or None for the base."""
    pictures = []
    with torch.no_grad():
        tokens = None if person is None else adapter(person.to(base.device), standardised=True)
        for i in tqdm(range(0, len(prompts), batch), desc=desc, unit="batch", disable=None if desc else True, leave=False):
            some = prompts[i:i + batch]
            mine = None if tokens is None else tokens.expand(len(some), -1, -1)
            pictures += base.decode(base.sample(some, seeds[i:i + batch], adapter, mine, **how))
    return pictures


def grid(rows, row_labels, column_labels, size=96):
    """Labelled contact sheet. rows: list of lists of PIL images; returns one PIL image."""
    font, pad = ImageFont.load_default(size=13), 4
    left = int(max(font.getlength(label) for label in row_labels)) + 2 * pad
    top = 20 * max(label.count("\n") + 1 for label in column_labels)
    sheet = Image.new("RGB", (left + len(column_labels) * (size + pad), top + len(rows) * (size + pad)), "white")
    pen = ImageDraw.Draw(sheet)
    for x, label in enumerate(column_labels):
        pen.multiline_text((left + x * (size + pad) + size // 2, top // 2), label, "black", font, anchor="mm", align="center")
    for y, (label, images) in enumerate(zip(row_labels, rows)):
        pen.text((left - pad, top + y * (size + pad) + size // 2), label, "black", font, anchor="rm")
        for x, image in enumerate(images):
            sheet.paste(image.resize((size, size), Image.BICUBIC), (left + x * (size + pad), top + y * (size + pad)))
    return sheet


def run(args):
    adapter = UserAdapter.load(args.adapter) if args.adapter else None
    base = StableCascade(args.base or (adapter.header.get("base", "tiny") if adapter else "tiny"), pick_device(args.device))
    if adapter:
        adapter.install(base.prior)
        print(f"adapter {adapter.path}, step {adapter.header.get('step')}, base {base.name}")
    people = [None if name == "base" else standardised(adapter, name, args.group) for name, _ in args.user]
    stems = [Path(name).stem for name, _ in args.user]
    if args.user[0][1] is not None:  # weights: blend, standardised, so that weights that sum to 0 give the zero user
        label = " + ".join(f"{w:g} {stem}" for stem, (_, w) in zip(stems, args.user))
        columns = {label: (sum(w * person for person, (_, w) in zip(people, args.user)), args.user)}
    else:  # a column each; files of one name are told apart by their folders
        labels = [name if stems.count(stem) > 1 else stem for stem, (name, _) in zip(stems, args.user)]
        columns = {label: (person, [user]) for label, person, user in zip(labels, people, args.user)}
    for prompt in args.prompt:
        if (length := len(base.tokenizer(prompt).input_ids)) > base.tokenizer.model_max_length:
            print(f"warning: {prompt!r} has {length} tokens, the text encoder reads {base.tokenizer.model_max_length}", file=sys.stderr)
    prompts, seeds = [c for c in args.prompt for _ in range(args.n)], [args.seed + i for _ in args.prompt for i in range(args.n)]
    Path(args.out).mkdir(parents=True, exist_ok=True)
    how = dict(user_scale=args.user_scale, uncond_user=args.uncond_user, steps=args.steps,
               guidance=base.guidance if args.guidance is None else args.guidance)
    made = {}
    for label, (person, users) in columns.items():
        made[label] = generate(base, prompts, seeds, adapter, person, desc=label, **how)
        for i, (prompt, seed, picture) in enumerate(zip(prompts, seeds, made[label])):
            info = PngInfo()
            info.add_text("ppd", json.dumps(dict(prompt=prompt, seed=seed, user=users, group=args.group, base=base.name, **how,
                                                 adapter=str(adapter.path) if person is not None else None)))
            if 0 < picture.width < args.size:
                picture = picture.resize((args.size, args.size), Image.BICUBIC)
            number = f"{i // args.n:04d}-" if len(args.prompt) > 1 else ""  # long prompts may begin alike
            path = Path(args.out) / (number + re.sub(r"[^\w.-]+", "-", f"{prompt[:60]}_{label[-60:]}_{seed}") + ".png")
            picture.save(path, pnginfo=info)
            print(path)
    if len(prompts) * len(columns) > 1:
        labels = [c if args.n == 1 else f"{c}, {s}" for c, s in zip(prompts, seeds)]
        grid(list(zip(*made.values())), labels, list(columns), 128).save(Path(args.out) / "grid.png")
        print(Path(args.out) / "grid.png")


def main(argv=None):
    run_script("sample.py", run, arguments(argv))


if __name__ == "__main__":
    main()
