"""Images for a user and a prompt.

    python sample.py --user assets/ppd/972.pt --prompt "a red star"  # right after the clone
    python sample.py --user base --user zero --user users/17.pt --prompt "a red star" "a blue cross"
    python sample.py --user me.pt:0.7 --user users/17.pt:0.3 --user-scale 1.5 --prompt "a red star"

--user without a weight: one image each, and a labeled grid. With weights, which are relative: all
of them blended into one user; the strength of a taste is --user-scale. `zero` is the population's
taste, `base` (or no --user) the untouched base. The settings of every image are in its PNG
metadata.
"""

import json
import math
import re
import sys
from functools import partial
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from tqdm import tqdm

import utils
from bases import load_base
from bases.ip_adapter import export, push
from data import embedding_source, load_user
from plots import image_grid
from ppd import UserAdapter
from utils import InputError, hub_file, is_hub_id

GUIDANCE = "a finite number, 1 or less for none"  # what --guidance takes


def parse_args(argv=None):
    parser = utils.make_parser("sample.py", __doc__)
    add = parser.add_argument
    add("--prompt", nargs="+", default=[], help="one or more captions")
    add("--prompts", help="text file, a caption a line; .tsv with a Prompt column; or a dataset id")
    add("--user", action="append", default=[], help="FILE.pt[:WEIGHT], zero or base; repeatable")
    add("--user-scale", type=float, default=1.0, help="of Eq. 7's user term; 0: base (%(default)s)")
    add("--group", type=int, default=0, help="which of a user's four-shot groups (%(default)s)")
    add("--adapter", help="default: beside the first user file, else runs/ppd, else assets/ppd")
    add("--base", help="default: the one the adapter was trained on; tiny without one")
    add("--decoder", help="with Stages A and B (default: stabilityai/stable-cascade)")
    add("--seed", type=int, default=0, help="of a prompt's first image (default: %(default)s)")
    add("--n", type=int, default=1, help="images a prompt and user, seeds count up (%(default)s)")
    add("--steps", type=int, help="denoising steps (default: the base's, e.g. 30)")
    add("--guidance", type=float, help="1 or less: off (default: the base's, e.g. 4)")
    add("--size", type=int, default=256, help="enlarge smaller images to, 0: not (%(default)s)")
    add("--out", default="samples", help="folder (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--export", metavar="FILE", help="write an SDXL adapter as an IP-Adapter, with these users")
    add("--push-to-hub", metavar="ID", help="upload what --export wrote to this hub repository")
    args = parser.parse_args(argv)
    if args.prompts and not Path(args.prompts).is_file() and args.prompts.count("/") != 1:
        parser.error(f"--prompts {args.prompts}: no such file")
    if args.push_to_hub and not args.export:
        parser.error("--push-to-hub: only with --export FILE")
    if args.export and not args.adapter and not args.user:
        parser.error("--export: which adapter? give --adapter")
    if not args.prompt and not args.prompts and not args.export:
        parser.error('no prompt: give --prompt "a red star" or --prompts FILE')
    check = partial(utils.check_flags, args, parser.error)
    check("n steps", lambda v: v >= 1, "1 or more")
    check("seed", lambda v: 0 <= v < 2**63 - args.n, "0 to 2^63")
    check("user_scale", math.isfinite, "a finite number")
    check("guidance", lambda v: 0 <= v < math.inf, GUIDANCE)
    args.user = [parse_user(spec, parser.error) for spec in args.user or ["base"]]
    if len({weight is None for _, weight in args.user}) > 1:
        parser.error("--user: give every user a weight (blended into one) or none (an image each)")
    if args.user[0][1] is not None:
        args.user = relative_weights(args.user, parser.error)
    if args.adapter is None and any(name != "base" for name, _ in args.user):
        args.adapter = find_adapter(args.user)
    return args


def parse_user(spec, error):
    """FILE.pt:WEIGHT -> (name, weight or None)."""
    name, weight = re.fullmatch(r"(.*?)(?::([^:/\\]*))?", spec, re.DOTALL).groups()
    if weight is not None:
        try:
            weight = float(weight)
        except ValueError:
            error(f"--user {spec}: {weight!r} is no weight; expected FILE.pt:0.7")
        if name == "base" or not math.isfinite(weight):
            advice = "the base cannot be blended, see --user-scale"
            error(f"--user {spec}: expected FILE.pt:WEIGHT with a finite weight; {advice}")
    if name not in ("zero", "base") and not Path(name).is_file():
        error(f"--user {spec}: no such file; expected one that embed.py wrote, 'zero' or 'base'")
    return name, weight


def relative_weights(users, error):
    """[(name, weight), ...] of a blend with weights that sum to 1."""
    total = sum(weight for _, weight in users)
    if len(users) == 1 and total != 1:
        name, weight = users[0]
        advice = f"a blend's weights are relative; for its strength give --user-scale {weight:g}"
        error(f"--user {name}:{weight:g}: one user alone has weight 1; {advice}")
    if total <= 0:
        error(f"--user: the weights sum to {total:g}; expected more than 0, as they are relative")
    return [(name, weight / total) for name, weight in users]


def find_adapter(users):
    """The adapter beside the first user file, else runs/ppd's, else the shipped one."""
    folders = [Path(name).parent for name, _ in users if name not in ("zero", "base")][:1]
    for folder in (*folders, Path("runs/ppd"), Path(__file__).resolve().parent / "assets/ppd"):
        if (folder / "adapter.safetensors").exists():
            return str(folder)


def read_prompts(source):
    """Captions of a text file, one a line; of a .tsv's Prompt column, quotation marks kept (some
    PartiPrompts begin with one); or of PartiPrompts.tsv on the hub. Only newlines end a line."""
    path = hub_file(source, "PartiPrompts.tsv", "dataset") if is_hub_id(source) else Path(source)
    if path.suffix not in (".txt", ".tsv", ""):
        raise InputError(f"--prompts {path}: expected .txt, a caption a line, or .tsv")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError):
        raise InputError(f"--prompts {path}: not a UTF-8 text file") from None
    if path.suffix == ".tsv":
        names, *rows = [line.rstrip("\r").split("\t") for line in lines if line.strip()] or [[]]
        if "Prompt" not in names or not rows:
            raise InputError(f"--prompts {path}: expected a Prompt column and a row below it")
        column = names.index("Prompt")
        lines = [row[column] for row in rows if len(row) > column]
    prompts = [line.strip() for line in lines if line and line.strip()]
    if not prompts:
        raise InputError(f"--prompts {path}: no caption in it")
    return prompts


def load_base_for(adapter, args):
    """The base that the adapter was trained on, unless --base says another, with it installed."""
    header = adapter.header if adapter else {}
    name = args.base or header.get("base", "tiny")
    device = utils.pick_device(args.device)
    base = load_base(name, device, decoder=args.decoder, grid=header.get("grid"))
    if adapter:
        adapter.install(base.attention_layers())
    return base


def load_user_embedding(adapter, name, group=0):
    """A user file's group as an embedding (1, D), or the zero user's: a Diffusion-DPO
    adapter has seen nobody else. Raises InputError if the adapter cannot understand the file."""
    if name == "zero" or adapter.header.get("objective") == "dpo":
        return adapter.mean[None]
    user = load_user(name)
    embedding = user["embedding"]
    if embedding.shape[2] != adapter.user_dim:
        trained = f"{adapter.path} was trained on width {adapter.user_dim}"
        raise InputError(f"{name}: embedding of width {embedding.shape[2]}, but {trained}")
    reader = adapter.header.get("reader")
    if reader and embedding_source(user) != reader:
        trained = f"{adapter.path} was trained on users read by {reader}"
        details = "(VLM, layer, after a profile)"
        raise InputError(f"{name}: read by {embedding_source(user)}, but {trained} {details}")
    if not 0 <= group < len(embedding):
        raise InputError(f"--group {group}: {name} has groups 0 to {len(embedding) - 1}")
    return embedding[group, -1:].to(adapter.mean)


@torch.no_grad()
def generate(base, prompts, seeds, adapter=None, user=None, batch=32, desc=None, **settings):
    """PIL images of prompts, one seed each; settings: of base.sample; desc: a progress bar's title.
    user: embedding, (1, D) for all, a row a prompt, or None: the base"""
    images = []
    tokens = None
    if user is not None:
        tokens = adapter(user.to(base.device)).expand(len(prompts), -1, -1)
    starts = range(0, len(prompts), batch)
    for i in tqdm(starts, desc=desc, disable=None if desc else True, leave=False):
        part = slice(i, i + batch)
        user_tokens = None if tokens is None else tokens[part]
        latents = base.sample(prompts[part], seeds[part], adapter, user_tokens, **settings)
        images += base.decode(latents, prompts[part], seeds[part])
    return images


def preview(base, adapter, captions, users, path):
    """A sheet of captions for several users, the base beside them. users: {name: (1, D)}."""
    columns = {"base": None} | users
    try:
        seeds = range(len(captions))
        images = [generate(base, captions, seeds, adapter, user) for user in columns.values()]
    except InputError as problem:  # Stages A and B may not be there; training needs neither
        print(f"warning: no preview: {problem}", file=sys.stderr)
        return
    base.codec.free_decoder()
    path.parent.mkdir(exist_ok=True)
    sheet = image_grid(list(zip(*images, strict=True)), captions, list(columns))
    utils.write_atomically(path, lambda file: sheet.save(file, "PNG"))


def preview_inputs(adapter, rows, embeddings, objective):
    """Three captions and three users {name: (1, D)} that previews show."""
    captions, names = (sorted({r[k] for r in rows["validation"]})[:3] for k in ("caption", "user"))
    zero = adapter.mean[None] if objective == "dpo" else None  # everybody is the zero user
    return captions, {name: embeddings[name][:1] if zero is None else zero for name in names}


def blend_or_list(args, adapter):
    """--user as columns: {label: (embedding or None, its [(name, weight), ...])}."""
    stems = [Path(name).stem for name, _ in args.user]
    columns = {}
    terms = []
    blend = 0
    for stem, (name, weight) in zip(stems, args.user, strict=True):
        user = None if name == "base" else load_user_embedding(adapter, name, args.group)
        if weight is None:
            label = name if stems.count(stem) > 1 else stem  # one name: told apart by the folders
            columns[label] = (user, [(name, weight)])
        else:
            blend = blend + weight * user
            terms.append(f"{weight:g} {stem}")
    return columns or {" + ".join(terms): (blend, args.user)}


def file_name(prompt, label, seed):
    """A prompt's beginning, a label's end and a seed, in what every file system takes."""
    parts = (re.sub(r"[^\w.-]+", "-", text) for text in (prompt, label))
    prompt, label = (part.encode() for part in parts)
    return f"{prompt[:80].decode(errors='ignore')}_{label[-80:].decode(errors='ignore')}_{seed}"


def run(args):
    adapter = UserAdapter.load(args.adapter) if args.adapter else None
    base = load_base_for(adapter, args)
    captions = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    if adapter:
        print(f"adapter {adapter.path}, step {adapter.header.get('step')}, base {base.name}")
    columns = blend_or_list(args, adapter)
    if args.export:
        users = {name: user for name, (user, _) in columns.items() if user is not None}
        files = export(args.export, adapter, base, users)
        print("-> " + ", ".join(map(str, files)))
        if args.push_to_hub:
            push(files, args.push_to_hub)
        return
    most = base.tokenizer.model_max_length
    for caption in captions:
        length = len(base.tokenizer(caption).input_ids)
        if length > most:
            message = f"{caption!r} has {length} tokens, the text encoder reads {most}"
            print(f"warning: {message}", file=sys.stderr)
    prompts = [caption for caption in captions for _ in range(args.n)]
    seeds = [args.seed + i for i in range(args.n)] * len(captions)
    sampling = dict(user_scale=args.user_scale, steps=args.steps or base.steps)
    sampling["guidance"] = base.guidance if args.guidance is None else args.guidance
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    made = {}
    written = set()
    for label, (user, users) in columns.items():
        made[label] = generate(base, prompts, seeds, adapter, user, desc=label, **sampling)
        used = str(adapter.path) if user is not None else None
        for i, image in enumerate(made[label]):
            settings = dict(prompt=prompts[i], seed=seeds[i], user=users, group=args.group)
            settings |= dict(base=base.name, adapter=used) | sampling
            number = f"{i // args.n:04d}-" if len(captions) > 1 else ""  # prompts may begin alike
            path = out / f"{number}{file_name(prompts[i], label, seeds[i])}.png"
            while path in written:  # two users of one name in long folders
                path = path.with_stem(path.stem + "-")
            written.add(path)
            info = PngImagePlugin.PngInfo()
            info.add_text("ppd", json.dumps(settings))
            if 0 < image.width < args.size:
                image = image.resize((args.size, args.size), Image.BICUBIC)
            image.save(path, pnginfo=info)
            print(path)
    if len(prompts) * len(columns) > 1:
        labels = prompts
        if args.n > 1:
            labels = [f"{prompt}, {seed}" for prompt, seed in zip(prompts, seeds, strict=True)]
        sheet = image_grid(list(zip(*made.values(), strict=True)), labels, list(columns), 128)
        sheet.save(out / "grid.png")
        print(out / "grid.png")


def main(argv=None):
    utils.run_script("sample.py", run, parse_args(argv))


if __name__ == "__main__":
    main()
