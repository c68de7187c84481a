"""Pictures for a person and a prompt.

    python sample.py --user assets/ppd/61.pt --prompt "a red star"                                         # right after the clone
    python sample.py --user base --user zero --user users/17.pt --prompt "a red star" "a blue circle"      # a labelled grid
    python sample.py --user me.pt:0.7 --user users/17.pt:0.3 --user-scale 1.5 --prompt "a red star"        # blend people

--user without a weight: one picture each. With weights: all of them blended into one person. `zero` is the population's
taste, `base` (or no --user) the untouched base. The settings of every picture are in its PNG metadata.
"""
import argparse
import csv
import json
import math
import re
import sys
from pathlib import Path


def arguments(argv=None):
    p = argparse.ArgumentParser(prog="sample.py", usage=argparse.SUPPRESS, description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompt", nargs="+", default=[], help="one or more captions")
    p.add_argument("--prompts", help="more captions: a text file with one a line, a .tsv with a Prompt column, or a dataset id like nateraw/parti-prompts")
    p.add_argument("--user", action="append", default=[], help="FILE.pt, FILE.pt:WEIGHT, zero or base; repeat for several")
    p.add_argument("--user-scale", type=float, default=1.0, help="multiplies the user's term of Eq. 7; 0 is the base (default: %(default)s)")
    p.add_argument("--group", type=int, default=0, help="which of a person's four-shot groups (default: %(default)s)")
    p.add_argument("--uncond-user", choices=("off", "zero", "same"), default="same", help="whom guidance's unconditional branch sees (default: %(default)s)")
    p.add_argument("--adapter", help="file or run folder (default: the one beside the first user file, else runs/ppd, else the shipped assets/ppd)")
    p.add_argument("--base", help="default: the one the adapter was trained on; tiny without one")
    p.add_argument("--decoder", default="stabilityai/stable-cascade", help="hub id or folder with Stages A and B (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the first picture of a prompt (default: %(default)s)")
    p.add_argument("--n", type=int, default=1, help="pictures a prompt and person, seeds counting up (default: %(default)s)")
    p.add_argument("--steps", type=int, help="denoising steps (default: tiny 20, full scale 30)")
    p.add_argument("--guidance", type=float, help="classifier-free guidance; 1 or less: off (default: tiny 2, full scale 4)")
    p.add_argument("--size", type=int, default=256, help="enlarge smaller pictures to this side, 0: leave them (default: %(default)s)")
    p.add_argument("--out", default="samples", help="folder (default: %(default)s)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    args = p.parse_args(argv)
    if args.prompts and not Path(args.prompts).is_file() and args.prompts.count("/") != 1:
        p.error(f"--prompts {args.prompts}: no such file")
    if not args.prompt and not args.prompts:
        p.error("no prompt: give --prompt \"a red star\" or --prompts FILE")
    for key in ("n", "steps"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            p.error(f"--{key} {getattr(args, key)}: expected 1 or more")
    if not 0 <= args.seed < 2**63 - args.n:
        p.error(f"--seed {args.seed}: expected 0 to 2^63")
    args.user = [parse_user(p, spec) for spec in args.user or ["base"]]
    weighted = [w is not None for _, w in args.user]
    if any(weighted) and not all(weighted):
        p.error("--user: give every user a weight (blended into one person) or none (a picture each)")
    if args.adapter is None and any(name != "base" for name, _ in args.user):
        places = [Path(name).parent for name, _ in args.user if name not in ("zero", "base")][:1]
        places += [Path("runs/ppd"), Path(__file__).resolve().parent / "assets" / "ppd"]
        args.adapter = next(str(place) for place in places if (place / "adapter.safetensors").exists())
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

from ppd import BadInput, StableCascade, UserAdapter, hub_file, is_hub_id, load_user, pick_device, reader_of, run_script, write_atomically


def read_prompts(source):
    """Captions of a text file, one a line; of a .tsv's Prompt column, quotation marks kept (PartiPrompts has captions that
    begin with one); or of PartiPrompts.tsv in a dataset repository."""
    path = hub_file(source, "PartiPrompts.tsv", "dataset") if is_hub_id(source) else Path(source)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise BadInput(f"--prompts {path}: not a UTF-8 text file") from None
    if path.suffix == ".tsv":
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
        if not rows or "Prompt" not in rows[0]:
            raise BadInput(f"--prompts {path}: expected a Prompt column and a row below it")
        lines = [row["Prompt"] for row in rows]
    if not (prompts := [line.strip() for line in lines if line and line.strip()]):
        raise BadInput(f"--prompts {path}: no caption in it")
    return prompts


def load_base(args, adapter=None):
    """The base that the adapter was trained on, unless --base says another, with the adapter installed."""
    header = adapter.header if adapter else {}
    base = StableCascade(args.base or header.get("base", "tiny"), pick_device(args.device), decoder=args.decoder, grid=header.get("grid", 24))
    if adapter:
        adapter.install(base.prior)
    return base


def standardised(adapter, name, group=0):
    """(1, D) standardised embedding of a user file's group, or of the zero user. To a Diffusion-DPO adapter everybody is
    the zero user: it has seen nobody else."""
    if name == "zero" or adapter.header.get("objective") == "dpo":
        return torch.zeros_like(adapter.mean)[None]
    user = load_user(name)
    embedding, reader = user["embedding"], adapter.header.get("reader")
    if embedding.shape[2] != adapter.user_dim:
        raise BadInput(f"{name}: embedding of width {embedding.shape[2]}, but {adapter.path} was trained on width {adapter.user_dim}")
    if reader and reader_of(user) != reader:
        raise BadInput(f"{name}: read by {reader_of(user)}, but {adapter.path} was trained on people read by {reader} (VLM, layer, after a profile)")
    if not 0 <= group < len(embedding):
        raise BadInput(f"--group {group}: {name} has groups 0 to {len(embedding) - 1}")
    with torch.no_grad():
        return adapter.standardise(embedding[group, -1:].to(adapter.mean))


def generate(base, prompts, seeds, adapter=None, person=None, batch=32, desc=None, **how):
    """PIL pictures of prompts, one seed each. person: standardised embedding (1, D), a row a prompt, or None: the base."""
    pictures = []
    with torch.no_grad():
        tokens = None if person is None else adapter(person.to(base.device), standardised=True)
        for i in tqdm(range(0, len(prompts), batch), desc=desc, unit="batch", disable=None if desc else True, leave=False):
            some = prompts[i:i + batch]
            mine = None if tokens is None else tokens.expand(len(prompts), -1, -1)[i:i + batch]
            pictures += base.decode(base.sample(some, seeds[i:i + batch], adapter, mine, **how), some, seeds[i:i + batch])
    return pictures


def grid(rows, row_labels, column_labels, size=96):
    """Labelled contact sheet. rows: list of lists of PIL images; returns one PIL image."""
    font, pad = ImageFont.load_default(size=13), 4
    left = int(max(font.getlength(line) for label in row_labels for line in label.split("\n"))) + 2 * pad
    top = 20 * max(label.count("\n") + 1 for label in column_labels)
    sheet = Image.new("RGB", (left + len(column_labels) * (size + pad), top + len(rows) * (size + pad)), "white")
    pen = ImageDraw.Draw(sheet)
    for x, label in enumerate(column_labels):
        pen.multiline_text((left + x * (size + pad) + size // 2, top // 2), label, "black", font, anchor="mm", align="center")
    for y, (label, images) in enumerate(zip(row_labels, rows)):
        pen.multiline_text((left - pad, top + y * (size + pad) + size // 2), label, "black", font, anchor="rm", align="right")
        for x, image in enumerate(images):
            sheet.paste(image.resize((size, size), Image.BICUBIC), (left + x * (size + pad), top + y * (size + pad)))
    return sheet


def preview(base, adapter, captions, people, path):
    """A sheet of captions for several people, the base beside them. people: {name: standardised embedding (1, D)}."""
    columns = {"base": None} | people
    try:
        pictures = [generate(base, captions, range(len(captions)), adapter, person) for person in columns.values()]
    except BadInput as problem:  # Stages A and B may not be there; training needs neither
        return print(f"warning: no preview: {problem}", file=sys.stderr)
    vars(base.codec).pop("painter", None)  # nor their memory
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, lambda file: grid(list(zip(*pictures)), captions, list(columns)).save(file, "PNG"))


def run(args):
    adapter = UserAdapter.load(args.adapter) if args.adapter else None
    base = load_base(args, adapter)
    args.prompt += read_prompts(args.prompts) if args.prompts else []
    if adapter:
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
    how = dict(user_scale=args.user_scale, uncond_user=args.uncond_user, steps=args.steps or base.steps,
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
