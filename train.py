"""Stage 2 of PPD: train the user cross-attention, and nothing else, on people's choices (paper Sec. 4.1, 5; Eq. 6).

    python train.py --users users-onehot --out runs/onehot                      # laptop, tiny base, minutes
    torchrun --nproc-per-node 2 train.py --users users-onehot --out runs/onehot --micro 16     # two processes or GPUs
    python train.py --users users-onehot --out runs/onehot --resume             # go on where it was killed

Writes to --out: adapter.safetensors (for sample.py), state.pt (for --resume), train.jsonl (a line a logged step), and
previews/. The baselines are the same loop: --objective dpo is Diffusion-DPO (Eq. 3: everybody is the zero user, who has
tokens of their own), --objective sft is Eq. 1 on the preferred pictures with the user as condition.
"""
import argparse
import hashlib
import json
import math
import os
import signal
import sys
import time
from functools import lru_cache
from pathlib import Path

# Defaults by base. batch: pairs a step, over all GPUs; micro: pairs a GPU holds at once; steps None: one epoch.
RECIPES = {
    "tiny": dict(batch=32, micro=32, lr=1e-3, beta=1.0, t_min=0.85, max_steps=400, warmup=20, decay="cosine", tokens=4, token_dim=64),
    "tiny, one-hot": dict(batch=32, micro=32, lr=5e-4, beta=6.0, t_min=0.85, max_steps=300, warmup=20, decay="cosine", tokens=4, token_dim=64),
    "full": dict(batch=768, micro=8, lr=1e-5, beta=1.0, t_min=0.001, max_steps=None, warmup=20, decay="constant", tokens=4, token_dim=1024),
}

RECIPE = ("batch", "lr", "beta", "t_min", "max_steps", "warmup", "decay", "clip", "user_drop", "noise", "tokens", "token_dim", "bias_free", "seed", "dtype", "only")  # goes into the header


def arguments(argv=None):
    p = argparse.ArgumentParser(prog="train.py", usage=argparse.SUPPRESS, description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    by_base = lambda key: "(default: " + ", ".join(f"{name} {recipe[key] or 'one epoch'}" for name, recipe in RECIPES.items()) + ")"
    p.add_argument("--base", default="tiny", help="'tiny', a hub id or a folder in its layout (default: %(default)s)")
    p.add_argument("--decoder", default="stabilityai/stable-cascade", help="hub id or folder with the image encoder and Stages A and B (default: %(default)s)")
    p.add_argument("--grid", type=int, default=24, help="side of the latents at full scale, a 32nd of the pictures' (default: %(default)s)")
    p.add_argument("--users", default="users", help="folder that embed.py wrote (default: %(default)s)")
    p.add_argument("--only", nargs="+", metavar="USER", help="train on these users' pairs alone (default: everybody's)")
    p.add_argument("--data", help="folder of the parquet files, if it moved since embed.py read it")
    p.add_argument("--out", default="runs/ppd", help="folder to write (default: %(default)s)")
    p.add_argument("--resume", action="store_true", help="continue the run in --out; starts at 0 if there is none")
    p.add_argument("--objective", choices=("ppd", "dpo", "sft"), default="ppd")
    p.add_argument("--beta", type=float, help="KL strength of Eq. 6; the paper tries 0.1 to 2 " + by_base("beta"))
    p.add_argument("--t-min", type=float, help="timesteps are drawn from [t-min, 1], 1 being pure noise " + by_base("t_min"))
    p.add_argument("--max-steps", type=int, help="optimizer steps " + by_base("max_steps"))
    p.add_argument("--batch", type=int, help="pairs a step, over all GPUs together " + by_base("batch"))
    p.add_argument("--micro", type=int, help="pairs a GPU holds at once; the rest is accumulated " + by_base("micro"))
    p.add_argument("--lr", type=float, help="of AdamW " + by_base("lr"))
    p.add_argument("--warmup", type=int, help="steps of linear warm-up " + by_base("warmup"))
    p.add_argument("--decay", choices=("constant", "cosine"), help="after warm-up " + by_base("decay"))
    p.add_argument("--clip", type=float, default=1.0, help="largest gradient norm (default: %(default)s)")
    p.add_argument("--user-drop", type=float, default=0.1, help="share of pairs whose user is zeroed (default: %(default)s)")
    p.add_argument("--noise", choices=("shared", "separate"), default="shared", help="one noise a pair, or one a picture as Eq. 6 writes it")
    p.add_argument("--tokens", type=int, help="user tokens " + by_base("tokens"))
    p.add_argument("--token-dim", type=int, help="their width " + by_base("token_dim"))
    p.add_argument("--bias-free", action="store_true", help="no bias in the projector: then the zero user is the base")
    p.add_argument("--checkpointing", action="store_true", help="recompute activations in backward: less memory, a third slower")
    p.add_argument("--save-every", type=int, default=100, help="steps (default: %(default)s)")
    p.add_argument("--log-every", type=int, default=10, help="steps (default: %(default)s)")
    p.add_argument("--preview-every", type=int, default=100, help="steps between previews, 0 for none (default: %(default)s)")
    p.add_argument("--workers", type=int, default=0, help="processes that read pictures (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of weights, order, noise, timesteps, drops (default: %(default)s)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float64"), default="auto", help="of the frozen base; auto: float32 on CPU, else bfloat16")
    args = p.parse_args(argv)
    pairs = Path(args.users) / "pairs.parquet"
    if not pairs.is_file():
        p.error(f"--users {args.users}: no pairs.parquet there; run embed.py first")
    world = int(os.environ.get("WORLD_SIZE", 1))
    small = args.base == "tiny" or (Path(args.base.partition(":")[0]) / "codec").is_dir()  # a retrained tiny base is one too
    try:
        from pyarrow.parquet import read_metadata
        one_hot = json.loads(read_metadata(pairs).metadata[b"ppd"]).get("one_hot")
    except Exception as error:
        p.error(f"{pairs}: not a pairs file of embed.py ({type(error).__name__})")
    recipe = "full" if not small else "tiny, one-hot" if one_hot else "tiny"
    for key, value in RECIPES[recipe].items():
        if getattr(args, key) is None:
            setattr(args, key, max(1, min(value, args.batch // world)) if key == "micro" else value)
    least = dict(batch=1, micro=1, max_steps=1, save_every=1, log_every=1, tokens=1, token_dim=1, grid=1, seed=0, workers=0, warmup=0, preview_every=0)
    for key, low in least.items():
        if (value := getattr(args, key)) is not None and value < low:
            p.error(f"--{key.replace('_', '-')} {value}: expected {low} or more")
    for key in ("beta", "lr", "clip"):
        if not (math.isfinite(getattr(args, key)) and getattr(args, key) > 0):
            p.error(f"--{key} {getattr(args, key)}: expected a number above 0")
    if not 0 < args.t_min < 1:
        p.error(f"--t-min {args.t_min}: expected a timestep in (0, 1)")
    if not 0 <= args.user_drop <= 1:
        p.error(f"--user-drop {args.user_drop}: expected a share in [0, 1]")
    if args.batch % (args.micro * world):
        p.error(f"--batch {args.batch}: expected a multiple of --micro x processes = {args.micro * world}")
    if (Path(args.out) / "state.pt").exists() and not args.resume:
        p.error(f"--out {args.out} holds a run already: add --resume to continue it, or choose another folder")
    return args


if __name__ == "__main__":
    arguments()  # a wrong flag answers at once, not after the imports

import contextlib

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from embed import read_pairs, read_pictures
from ppd import BadInput, StableCascade, UserAdapter, denoising_error, load_user, pick_device, ppd_loss, reader_of, run_script, write_atomically
from sample import generate, grid


# ---------------------------------------------------------------------------------------------------- people and pairs
def load_users(folder, names):
    """{name: (groups, D) float32}, the last stored state of each person's file; and who read them (ppd.reader_of)."""
    users = {name: load_user(Path(folder) / f"{name}.pt") for name in names}
    kinds = {(user["embedding"].shape[-1], *reader_of(user)) for user in users.values()}
    if len(kinds) > 1:
        raise BadInput(f"--users {folder}: people of different widths or readers: {' and '.join(map(str, sorted(kinds, key=str)[:2]))}; expected one")
    return {name: user["embedding"][:, -1] for name, user in users.items()}, list(kinds.pop()[1:])


@lru_cache(2)
def epoch_order(seed, epoch, n):
    return np.random.default_rng([seed, epoch]).permutation(n)


class Pairs(torch.utils.data.Dataset):
    """The pair at a position of the endless training sequence, epoch after epoch, each epoch in its own random order.

    Everything random about it comes from (seed, position) alone: the same on 1 GPU or 64, however accumulated, and after
    a resume. Its pictures are read from the parquet files as they are needed."""

    def __init__(self, rows, data, users, latent_shape, seed, separate_noise, t_min):
        self.rows, self.data, self.users = rows, Path(data), users
        self.latent_shape, self.seed, self.separate_noise, self.t_min = latent_shape, seed, separate_noise, t_min

    def __getitem__(self, position):
        epoch, i = divmod(position, len(self.rows))
        order = epoch_order(self.seed, epoch, len(self.rows))
        key = np.random.SeedSequence([self.seed, position]).generate_state(1, np.uint64)[0]
        g = torch.Generator().manual_seed(int(key) >> 1)
        u_time, u_drop, u_group = torch.rand(3, generator=g, dtype=torch.float64).tolist()
        noise = torch.randn(2, *self.latent_shape, generator=g)
        for skipped in range(100):  # a broken pair is named, and the next one of the order takes its place
            row = self.rows[order[(i + skipped) % len(order)]]
            try:
                pictures = read_pictures(self.data, row)
                break
            except BadInput as problem:
                print(f"skipped: {problem}", file=sys.stderr)
        else:
            raise BadInput(f"{self.data}: 100 broken pairs one after the other")
        return dict(caption=row["caption"], ranking_id=row["ranking_id"], preferred=pictures[row["preferred"]],
                    dispreferred=pictures[1 - row["preferred"]], t=self.t_min + (1 - self.t_min) * u_time, u_drop=u_drop,
                    noise=noise if self.separate_noise else noise[:1].expand_as(noise),
                    user=self.users[row["user"]][row["groups"][int(u_group * len(row["groups"]))]])  # one of the groups it may have


def collate(pairs):
    """List of pairs -> one micro-batch, preferred pictures first where there are two of a kind."""
    together = lambda key: [p[key] for p in pairs]
    return dict(captions=together("caption"), images=together("preferred") + together("dispreferred"), user=torch.stack(together("user")),
                noise=torch.cat([torch.stack([p["noise"][k] for p in pairs]) for k in (0, 1)]), t=torch.tensor(together("t")),
                u_drop=torch.tensor(together("u_drop")), ranking_ids=together("ranking_id"))


# ------------------------------------------------------------------------------------------------------- one micro-step
def forward(base, adapter, batch, objective, beta, user_drop, backward=None):
    """Losses of a micro-batch of B pairs, (B,), and what to log of each; calls backward(losses) while the user is set."""
    dtype, b = adapter.mean.dtype, len(batch["captions"])
    halves = 1 if objective == "sft" else 2  # SFT sees the preferred picture only
    noise, t = batch["noise"][:halves * b].to(base.device, dtype), batch["t"].to(base.device).repeat(halves)
    x_t = base.add_noise(base.encode_images(batch["images"][:halves * b]), noise, t)
    text, pooled = (c.repeat(halves, 1, 1) for c in base.encode_prompts(batch["captions"]))
    with torch.no_grad():
        reference = base.predict_noise(x_t, t, text, pooled) if objective != "sft" else None  # eps_ref: no user is set here
    drop = batch["u_drop"].to(base.device) < (1.0 if objective == "dpo" else user_drop)
    with adapter.user(adapter(batch["user"].to(base.device, dtype), drop)):  # B rows serve both halves
        noise_pred = base.predict_noise(x_t, t, text, pooled)
        if objective == "sft":
            losses = denoising_error(noise_pred, noise)  # Eq. 1
            log = dict(error_preferred=losses.detach())
        else:
            losses, log = ppd_loss(noise_pred, reference, noise, beta)  # Eq. 6; Eq. 3 for dpo
        if backward is not None:
            backward(losses)
    return losses.detach(), log


def learning_rate(step, args):
    warm = min(1.0, (step + 1) / max(1, args.warmup))
    return args.lr * warm * (0.5 + 0.5 * math.cos(math.pi * step / args.max_steps) if args.decay == "cosine" else 1.0)


@torch.no_grad()
def validate(base, adapter, batches, args):
    """Means over the fixed validation batch, as validation_*; nothing where there is none."""
    parts = []
    for batch in batches:
        losses, log = forward(base, adapter, batch, "dpo" if args.objective == "dpo" else "ppd", args.beta, user_drop=0)
        parts.append(log if args.objective == "sft" else dict(loss=losses, **log))  # sft's own loss is another quantity
    return {f"validation_{k}": torch.cat([p[k] for p in parts]).mean().item() for k in parts[0]} if parts else {}


@torch.no_grad()
def preview(base, adapter, rows, users, objective, path):
    """A sheet for three captions and three people of `rows`, the base beside them."""
    captions, names = sorted({r["caption"] for r in rows})[:3], sorted({r["user"] for r in rows})[:3]
    seeds = range(len(captions))
    columns = {"base": generate(base, captions, seeds)}
    for name in names:
        person = torch.zeros_like(adapter.mean)[None] if objective == "dpo" else adapter.standardise(users[name][:1].to(adapter.mean))
        columns[name] = generate(base, captions, seeds, adapter, person)
    path.parent.mkdir(exist_ok=True)
    grid(list(zip(*columns.values())), captions, list(columns)).save(path)


# ------------------------------------------------------------------------------------------------------------ the loop
def run(args):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device)
    if device.startswith("cuda"):
        torch.cuda.set_device(device if ":" in device else 0)
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    say = print if rank == 0 else lambda *a, **k: None

    # data: pairs, and everybody's embedding
    everything, settings = read_pairs(args.users)
    if args.only and (unknown := set(args.only) - {r["user"] for r in everything if r["split"] == "train"}):
        raise BadInput(f"--only {sorted(unknown)[0]}: no such training user in {args.users}")
    rows = {split: [r for r in everything if r["split"] == split and (not args.only or r["user"] in args.only)] for split in ("train", "validation")}
    if not rows["train"]:
        raise BadInput(f"--users {args.users}: pairs.parquet has no pair to train on")
    users, reader = load_users(args.users, sorted({r["user"] for split in rows.values() for r in split}))
    data, first = Path(args.data or settings["data"]), rows["train"][0]["file"]
    if not (data / first).is_file():
        raise BadInput(f"--data {data}: no file {first} there; give the folder that embed.py read")
    args.max_steps = args.max_steps or math.ceil(len(rows["train"]) / args.batch)  # one epoch

    # the frozen base, the adapter, the optimizer
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    base = StableCascade(args.base, device, dtype, args.decoder, args.grid)
    if args.checkpointing:
        base.prior.enable_gradient_checkpointing()
    torch.manual_seed(args.seed)
    dim = next(iter(users.values())).shape[1]
    adapter = UserAdapter(dim, base.channels, args.tokens, args.token_dim, bias=not args.bias_free)
    if reader[0] != "one-hot":
        known = torch.cat([users[name] for name in sorted({r["user"] for r in rows["train"]})])
        adapter.mean.copy_(known.mean(0)), adapter.std.copy_(known.std(0, correction=0).clamp(min=1e-6))
    adapter.install(base.prior).to(torch.float64 if dtype == torch.float64 else torch.float32)
    parameters = list(adapter.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr)  # betas 0.9, 0.999; weight decay 0.01: torch's own defaults

    out, start = Path(args.out), 0
    free = ("resume", "out", "data", "device", "workers", "micro", "checkpointing", "save_every", "log_every", "preview_every")
    config = {k: v for k, v in vars(args).items() if k not in free}  # what a resume must share
    config |= dict(pairs=len(rows["train"]), users=hashlib.sha256(b"".join(users[name].numpy().tobytes() for name in sorted(users))).hexdigest()[:16])
    if args.resume and (out / "state.pt").exists():
        state = load_state(out / "state.pt", config)
        adapter.load_state_dict(state["adapter"]), optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    elif args.resume:
        say(f"--resume: nothing to resume in {out}, starting at 0")
    if start >= args.max_steps:
        say(f"{out}: finished already, {start} steps")
        return
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        log_file = out / "train.jsonl"  # on a resume: cut back to the checkpoint, and a line torn by a kill dropped
        lines = [l for l in log_file.read_text().splitlines(True) if l.endswith("}\n")] if start and log_file.exists() else []
        write_atomically(log_file, lambda path: path.write_text("".join(l for l in lines if json.loads(l)["step"] < start)))

    accumulate = args.batch // (args.micro * world)
    say(f"base {args.base} on {device}, {base.dtype}: {sum(p.numel() for p in base.prior.parameters()) / 1e6:.1f}M frozen parameters, "
        f"{len(base.channels)} attention layers; adapter {sum(p.numel() for p in parameters) / 1e6:.2f}M, {args.tokens} tokens of {args.token_dim}")
    say(f"{len(rows['train'])} training pairs of {len({r['user'] for r in rows['train']})} users; "
        f"{args.batch} a step = {args.micro} x {world} processes x {accumulate} accumulated; "
        f"{args.max_steps} steps = {args.max_steps * args.batch / len(rows['train']):.2f} epochs")
    say(f"objective {args.objective}, beta {args.beta:g}, t from {args.t_min:g} to 1, lr {args.lr:g} ({args.decay}, {args.warmup} warm-up), "
        f"user drop {args.user_drop:g}, seed {args.seed}")

    pairs = Pairs(rows["train"], data, users, base.latent_shape, args.seed, args.noise == "separate", args.t_min)
    positions = [[step * args.batch + (m * world + rank) * args.micro + i for i in range(args.micro)]
                 for step in range(start, args.max_steps) for m in range(accumulate)]
    ignore = lambda _: signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which saves
    batches = iter(torch.utils.data.DataLoader(pairs, batch_sampler=positions, num_workers=args.workers, collate_fn=collate, worker_init_fn=ignore))
    fixed = []  # a fixed validation batch: the same pairs, noise and timesteps every time, whatever --seed
    if rows["validation"] and rank == 0:
        held = Pairs(rows["validation"], data, users, base.latent_shape, 0, args.noise == "separate", args.t_min)
        count = min(64, len(held.rows))
        fixed = [collate([held[i] for i in range(k, min(k + args.micro, count))]) for k in range(0, count, args.micro)]

    def save(step):
        if rank == 0:
            header = dict(base=args.base, grid=args.grid, reader=reader, objective=args.objective, beta=args.beta, step=step, seed=args.seed, users=args.users,
                          recipe={key: config[key] for key in RECIPE})
            adapter.save(out / "adapter.safetensors", **header)
            state = dict(step=step, config=config, adapter=adapter.state_dict(), optimizer=optimizer.state_dict())
            write_atomically(out / "state.pt", lambda path: torch.save(state, path))

    stop = []  # filled by a signal; the step is finished, saved, and the run ends
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(1))
    bar = tqdm(total=args.max_steps, initial=start, desc=args.objective, unit="step", disable=None if rank == 0 else True)
    began = time.time()
    # on a CPU the fused backward of attention is the slowest part of a step: plain matrix products are quicker
    with sdpa_kernel(SDPBackend.MATH) if device == "cpu" else contextlib.nullcontext():
        for step in range(start, args.max_steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            total = None
            for _ in range(accumulate):
                losses, log = forward(base, adapter, next(batches), args.objective, args.beta, args.user_drop,
                                      backward=lambda losses: (losses.sum() / args.batch).backward())
                sums = torch.stack([losses.sum(), *(v.sum() for v in log.values())])
                total = sums if total is None else total + sums
            total = torch.cat([total / args.batch, total.new_tensor([float(bool(stop))])])
            if world > 1:  # the only exchange between ranks: every gradient once a step, and the logged sums
                flat = torch.cat([p.grad.flatten() for p in parameters])
                dist.all_reduce(flat), dist.all_reduce(total)
                for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
                    p.grad.copy_(g.view_as(p))
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
            *logged, stopping, grad_norm = torch.cat([total, norm[None].to(total.dtype)]).tolist()  # the step's only host sync
            if not all(map(math.isfinite, (*logged, grad_norm))):
                raise BadInput(f"step {step}: loss {logged[0]} or gradient norm {grad_norm} is not finite; the weights of the "
                               f"last checkpoint are kept. Try a lower --lr or a larger --warmup")
            line = dict(step=step, loss=logged[0], **dict(zip(log, logged[1:])), grad_norm=grad_norm, lr=learning_rate(step, args),
                        pairs_per_second=round((step - start + 1) * args.batch / (time.time() - began), 2))
            if rank == 0 and (step % args.log_every == 0 or step + 1 == args.max_steps):
                line |= validate(base, adapter, fixed, args)
                with open(log_file, "a") as file:
                    file.write(json.dumps(line) + "\n")
                if line.get("error_preferred", 0) > 1.5 * line.get("error_ref_preferred", math.inf):
                    say(f"warning: step {step}: the preferred pictures' error is {line['error_preferred'] / line['error_ref_preferred']:.1f} x the reference's; "
                        "both errors exploding is how Diffusion-DPO fails: try a larger --beta or a lower --lr")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.update()
            bar.set_postfix_str(f"loss {line['loss']:.3f}, implicit accuracy {line.get('implicit_accuracy', float('nan')):.2f}, "
                                f"{line['pairs_per_second']:.1f} pairs/s", refresh=False)
            if (step + 1) % args.save_every == 0 or step + 1 == args.max_steps or stopping:
                save(step + 1)
            if fixed and args.preview_every and ((step + 1) % args.preview_every == 0 or step + 1 == args.max_steps):
                preview(base, adapter, rows["validation"], users, args.objective, out / "previews" / f"step-{step + 1:06d}.png")
            if stopping:
                say(f"stopped by a signal after step {step}, saved; --resume goes on")
                break
    bar.close()
    if world > 1:
        dist.destroy_process_group()
    say(f"last step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in line.items() if k not in ("step",)))
    if device.startswith("cuda"):
        say(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    say(f"-> {out}/adapter.safetensors")


def load_state(path, config):
    """state.pt of the same configuration, or BadInput that names the first difference."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["config"]
    except Exception as error:
        raise BadInput(f"{path}: cannot resume from it ({type(error).__name__})") from None
    for key in config:
        if before.get(key, config[key]) != config[key]:  # a run of an earlier version has fewer
            raise BadInput(f"--resume: --{key.replace('_', '-')} is {config[key]}, but the run in {path.parent} was started with {before.get(key)}")
    return state


def main(argv=None):
    run_script("train.py", run, arguments(argv))


if __name__ == "__main__":
    main()
