"""Stage 2 of PPD: train the user cross-attention, and nothing else, on people's choices (paper Sec. 4.1, 5; Eq. 6).

    python train.py --users users-onehot --out runs/onehot                                  # laptop, tiny base, minutes
    torchrun --nproc-per-node 2 train.py --users users-onehot --out runs/onehot --micro 16  # two processes or GPUs
    python train.py --users users-onehot --out runs/onehot --resume                         # go on where it was killed; with torchrun --max-restarts 3 by itself

Writes to --out: adapter.safetensors (for sample.py), state.pt and state.previous.pt (for --resume), train.jsonl (a line a logged
step), and previews/. The baselines are the same loop: --objective dpo is Diffusion-DPO (Eq. 3: everybody is the zero user,
who has tokens of their own), --objective sft is Eq. 1 on the preferred pictures with the user as condition.
"""
import argparse
import datetime
import json
import math
import os
import signal
import time
from pathlib import Path

# Defaults by base. batch: pairs a step, over all GPUs; micro: pairs a GPU holds at once; max_steps None: one epoch.
RECIPES = {
    "tiny": dict(batch=32, micro=32, lr=1e-3, beta=1.0, t_min=0.85, max_steps=400, warmup=20, decay="cosine", tokens=4, token_dim=64),
    "tiny, one-hot": dict(batch=32, micro=32, lr=5e-4, beta=6.0, t_min=0.85, max_steps=300, warmup=20, decay="cosine", tokens=4, token_dim=64),
    "full": dict(batch=768, micro=8, lr=1e-5, beta=1.0, t_min=0.001, max_steps=None, warmup=20, decay="constant", tokens=4, token_dim=1024),
}
RECIPE = (*(key for key in RECIPES["full"] if key != "micro"), "clip", "user_drop", "noise", "bias_free", "seed", "dtype", "only")  # what the adapter's header tells
FREE = ("resume", "out", "data", "device", "workers", "micro", "checkpointing", "compile", "save_every", "log_every", "preview_every")  # a resume may change them


def arguments(argv=None):
    p = argparse.ArgumentParser(prog="train.py", usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, by_base = p.add_argument, lambda key: "(default: " + ", ".join(f"{name} {recipe[key] or 'one epoch'}" for name, recipe in RECIPES.items()) + ")"
    add("--base", default="tiny", help="'tiny', a hub id or a folder in its layout (default: %(default)s)")
    add("--decoder", default="stabilityai/stable-cascade", help="hub id or folder with the image encoder and Stages A and B (default: %(default)s)")
    add("--grid", type=int, default=24, help="side of the latents at full scale, a 32nd of the pictures' (default: %(default)s)")
    add("--users", default="users", help="folder that embed.py wrote (default: %(default)s)")
    add("--only", nargs="+", metavar="USER", help="train on these users' pairs alone (default: everybody's)")
    add("--data", help="folder of the parquet files, if it moved since embed.py read it")
    add("--out", default="runs/ppd", help="folder to write (default: %(default)s)")
    add("--resume", action="store_true", help="continue the run in --out; starts at 0 if there is none")
    add("--objective", choices=("ppd", "dpo", "sft"), default="ppd")
    add("--beta", type=float, help="KL strength of Eq. 6; the paper tries 0.1 to 2 " + by_base("beta"))
    add("--t-min", type=float, help="timesteps are drawn from [t-min, 1], 1 being pure noise " + by_base("t_min"))
    add("--max-steps", type=int, help="optimizer steps " + by_base("max_steps"))
    add("--batch", type=int, help="pairs a step, over all GPUs together " + by_base("batch"))
    add("--micro", type=int, help="pairs a GPU holds at once; the rest is accumulated " + by_base("micro"))
    add("--lr", type=float, help="of AdamW " + by_base("lr"))
    add("--warmup", type=int, help="steps of linear warm-up " + by_base("warmup"))
    add("--decay", choices=("constant", "cosine"), help="after warm-up " + by_base("decay"))
    add("--clip", type=float, default=1.0, help="largest gradient norm (default: %(default)s)")
    add("--user-drop", type=float, default=0.1, help="share of pairs whose user is zeroed (default: %(default)s)")
    add("--noise", choices=("shared", "separate"), default="shared", help="one noise a pair, or one a picture as Eq. 6 writes it")
    add("--tokens", type=int, help="user tokens " + by_base("tokens"))
    add("--token-dim", type=int, help="their width " + by_base("token_dim"))
    add("--bias-free", action="store_true", help="no bias in the projector: then the zero user is the base")
    add("--compile", action="store_true", help="compile the prior's blocks: a minute at the start, faster steps")
    add("--checkpointing", action="store_true", help="recompute activations in backward: less memory, a fifth slower")
    add("--save-every", type=int, default=100, help="steps (default: %(default)s)")
    add("--log-every", type=int, default=10, help="steps (default: %(default)s)")
    add("--preview-every", type=int, default=100, help="steps between previews, 0 for none (default: %(default)s)")
    add("--workers", type=int, default=0, help="processes that read pictures (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, order, noise, timesteps, drops (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float64"), default="auto", help="of the frozen base; auto: float32 on CPU, else bfloat16")
    args = p.parse_args(argv)
    pairs, world = Path(args.users) / "pairs.parquet", int(os.environ.get("WORLD_SIZE", 1))
    if not pairs.is_file():
        p.error(f"--users {args.users}: no pairs.parquet there; run embed.py first")
    try:
        from pyarrow.parquet import read_metadata
        one_hot = json.loads(read_metadata(pairs).metadata[b"ppd"]).get("one_hot")
    except Exception as error:
        p.error(f"{pairs}: not a pairs file of embed.py ({type(error).__name__})")
    small = args.base == "tiny" or (Path(args.base.partition(":")[0]) / "codec").is_dir()  # a retrained tiny base is one too
    for key, value in RECIPES["full" if not small else "tiny, one-hot" if one_hot else "tiny"].items():
        if getattr(args, key) is None:
            setattr(args, key, max(1, min(value, args.batch // world)) if key == "micro" else value)
    checks = (("batch micro max_steps save_every log_every tokens token_dim grid", lambda v: v >= 1, "1 or more"),
              ("seed workers warmup preview_every", lambda v: v >= 0, "0 or more"),
              ("beta lr clip", lambda v: 0 < v < math.inf, "a number above 0"),
              ("t_min", lambda v: 0 < v < 1, "a timestep in (0, 1)"), ("user_drop", lambda v: 0 <= v <= 1, "a share in [0, 1]"))
    for keys, good, what in checks:
        for key in keys.split():
            if (value := getattr(args, key)) is not None and not good(value):
                p.error(f"--{key.replace('_', '-')} {value}: expected {what}")
    if args.batch % (args.micro * world):
        p.error(f"--batch {args.batch}: expected a multiple of --micro x processes = {args.micro * world}")
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        p.error("torchrun --max-restarts: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it, or restarted processes look for the dead ones' addresses")
    if not args.resume and any(Path(args.out).glob("state*.pt")):
        p.error(f"--out {args.out} holds a run already: add --resume to continue it, or choose another folder")
    return args


if __name__ == "__main__":
    arguments()  # a wrong flag answers at once, not after the imports

import contextlib
from functools import partial
from itertools import islice

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from embed import Pairs, collate, ignore_signals, load_training, open_pictures
from ppd import (BadInput, StableCascade, UserAdapter, append_line, denoising_error, from_all_ranks, load_state, pick_device, pick_dtype, ppd_loss,
                 rank_and_world, read_jsonl, run_script, save_state, sum_over_ranks, write_jsonl)
from sample import preview


# ------------------------------------------------------------------------------------------------------- one micro-step
def forward(base, adapter, batch, objective, beta, user_drop, backward=None):
    """Losses of a micro-batch of B pairs, (B,), and what to log of each; calls backward(losses) while the user is set.
    Nothing here waits for the GPU."""
    batch = {k: v.to(base.device, non_blocking=True) for k, v in batch.items() if torch.is_tensor(v)}
    dtype, b = adapter.mean.dtype, len(batch["t"])
    halves = 1 if objective == "sft" else 2  # SFT sees the preferred picture only
    pictures, noise, t = batch["pictures"][:halves * b], batch["noise"][:halves * b].to(dtype), batch["t"].repeat(halves)
    latents = base.encode_pixels(pictures) if pictures.dtype == torch.uint8 else pictures  # or cached by embed.py
    x_t = base.add_noise(latents, noise, t)
    text, pooled = (c.repeat(halves, 1, 1) for c in base.encode_tokens(batch["tokens"]))
    tokens = adapter(batch["user"].to(dtype), batch["u_drop"] < (1.0 if objective == "dpo" else user_drop))  # B rows serve both halves
    # eps_ref: no user is set. But two compiled graphs would round differently, so there it is the policy's own, the user weighed 0
    off, on = [tokens.new_full((len(t),), w) for w in (0.0, 1.0)] if base.compiled else (0.0, 1.0)
    with torch.set_grad_enabled(base.compiled and torch.is_grad_enabled()), adapter.user(tokens if base.compiled else None, off):
        reference = base.predict_noise(x_t, t, text, pooled).detach() if objective != "sft" else None
    with adapter.user(tokens, on):
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
    """Means over all ranks' parts of the fixed validation batch, as validation_*; nothing where there is none."""
    values = {}
    for batch in batches:
        losses, log = forward(base, adapter, batch, "dpo" if args.objective == "dpo" else "ppd", args.beta, user_drop=0)
        for key, value in (log if args.objective == "sft" else dict(loss=losses, **log)).items():  # sft's own loss is another quantity
            values.setdefault(f"validation_{key}", []).extend(value.tolist())
    parts = from_all_ranks(values)
    return {key: math.fsum(all_of) / len(all_of) for key in parts[0] if (all_of := [v for part in parts for v in part.get(key, ())])}


def restore(state, adapter, optimizer):
    """Put a checkpoint of load_state() back -> its step, or 0 if it is None."""
    if state is None:
        return 0
    try:
        fused = optimizer.param_groups[0]["fused"]  # this device's way, not the checkpoint's
        adapter.load_state_dict(state["adapter"]), optimizer.load_state_dict(state["optimizer"])
        optimizer.param_groups[0]["fused"] = fused
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise BadInput(f"--resume: the checkpoint is of another base: {' '.join(str(error).split())[:150]}") from None
    return state["step"]


def not_finite(step, quantities, seen, gradient):
    """Stop before the step: BadInput names the ranks and pairs. seen: [(ranking ids, losses)] of this rank's micro-batches;
    gradient: its norm before the exchange."""
    bad = [i for ids, losses in seen for i, loss in zip(ids, losses.tolist()) if not math.isfinite(loss)]
    found = from_all_ranks((bad, bad or not math.isfinite(gradient)))
    ranks, pairs = [rank for rank, (_, broken) in enumerate(found) if broken], [i for bad, _ in found for i in bad]
    where = f"rank {', '.join(map(str, ranks))}" if ranks else "no rank alone, but in the sum"
    what = f"the loss of pairs {', '.join(map(str, pairs[:8]))}" if pairs else ", ".join(quantities[:3])
    raise BadInput(f"step {step}: not finite on {where}: {what}. The step was not taken, the last checkpoint is kept; try a lower --lr or a larger --warmup")


# ------------------------------------------------------------------------------------------------------------ the loop
def run(args):
    rank, world = rank_and_world()
    device = pick_device(args.device)
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=datetime.timedelta(hours=1))  # rank 0 may paint previews meanwhile
    say = print if rank == 0 else lambda *a, **k: None

    rows, users, reader, settings = load_training(args.users, args.only)
    args.max_steps = args.max_steps or math.ceil(len(rows["train"]) / args.batch)  # one epoch

    # the frozen base, the adapter, the optimizer
    dtype = pick_dtype(args.dtype, device)
    base = StableCascade(args.base, device, dtype, args.decoder, args.grid)
    look = open_pictures(args.users, args.data or settings["data"], rows["all"], base.codec, base.dtype)
    if args.checkpointing:
        base.prior.enable_gradient_checkpointing()
    if args.compile:
        base.compile_blocks()
    torch.manual_seed(args.seed)
    adapter = UserAdapter(next(iter(users.values())).shape[1], base.channels, args.tokens, args.token_dim, bias=not args.bias_free)
    if reader[0] != "one-hot":
        known = torch.cat([users[name] for name in sorted({r["user"] for r in rows["train"]})])
        adapter.mean.copy_(known.mean(0)), adapter.std.copy_(known.std(0, correction=0).clamp(min=1e-6))
    adapter.install(base.prior).to(torch.float64 if dtype == torch.float64 else torch.float32)
    parameters = list(adapter.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, fused=device.startswith("cuda"))  # betas 0.9, 0.999; weight decay 0.01: torch's own defaults

    # where to begin
    out = Path(args.out)
    config = {key: value for key, value in vars(args).items() if key not in FREE}
    config["the content of --users, by digest,"] = settings["content"]
    header = dict(reader=reader, recipe={key: config[key] for key in RECIPE}, **{key: config[key] for key in ("base", "grid", "objective", "beta", "seed", "users")})
    start = saved = restore(load_state(out, config) if args.resume else None, adapter, optimizer)
    if args.resume and not start:
        say(f"--resume: nothing to resume in {out}, starting at 0")
    if len(steps := set(from_all_ranks(start))) > 1:
        raise BadInput(f"--out {out}: the processes find checkpoints of steps {sorted(steps)}; all must see one folder")
    if start >= args.max_steps:
        return say(f"{out}: finished already, {start} steps")
    log_file = out / "train.jsonl"
    if rank == 0:  # cut the log back to the checkpoint
        out.mkdir(parents=True, exist_ok=True)
        lines = [line for line in (read_jsonl(log_file) if log_file.exists() else []) if isinstance(line.get("step"), int) and line["step"] < start]
        write_jsonl(log_file, lines)

    pairs = lambda split, seed: Pairs(rows[split], users, look, base.latent_shape, seed, args.noise == "separate", args.t_min)
    accumulate = args.batch // (args.micro * world)
    say(f"base {args.base} on {device}, {base.dtype}: {sum(p.numel() for p in base.prior.parameters()) / 1e6:.1f}M frozen parameters, "
        f"{len(base.channels)} attention layers; adapter {sum(p.numel() for p in parameters) / 1e6:.2f}M, {args.tokens} tokens of {args.token_dim}")
    say(f"{len(rows['train'])} training pairs of {len({r['user'] for r in rows['train']})} users, {look.kind}; "
        f"{args.batch} a step = {args.micro} x {world} processes x {accumulate} accumulated; "
        f"{args.max_steps} steps = {args.max_steps * args.batch / len(rows['train']):.2f} epochs")
    say(f"objective {args.objective}, beta {args.beta:g}, t from {args.t_min:g} to 1, lr {args.lr:g} ({args.decay}, {args.warmup} warm-up), "
        f"user drop {args.user_drop:g}, seed {args.seed}")

    together = partial(collate, tokenizer=base.tokenizer)
    positions = [range(at := step * args.batch + (m * world + rank) * args.micro, at + args.micro) for step in range(start, args.max_steps) for m in range(accumulate)]
    batches = iter(torch.utils.data.DataLoader(pairs("train", args.seed), batch_sampler=positions, num_workers=args.workers, collate_fn=together,
                                               worker_init_fn=ignore_signals, pin_memory=device.startswith("cuda")))
    # three captions and people for previews, and a validation batch of the same pairs, noise and timesteps every time, whatever --seed
    captions, names = (sorted({r[key] for r in rows["validation"]})[:3] for key in ("caption", "user"))
    people = {name: torch.zeros_like(adapter.mean)[None] if args.objective == "dpo" else adapter.standardise(users[name][:1].to(adapter.mean)) for name in names}
    held, count = pairs("validation", 0), min(64, len(rows["validation"]))
    parts = [range(k, min(k + args.micro, count)) for k in range(rank * args.micro, count, world * args.micro)]
    fixed = [together([held[i] for i in part]) for part in parts]

    def save(step):
        adapter.save(out / "adapter.safetensors", step=step, **header)
        save_state(out, step=step, config=config, adapter=adapter.state_dict(), optimizer=optimizer.state_dict())

    stop = []  # filled by a signal; the step is finished, saved, and the run ends
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(1))
    bar = tqdm(total=args.max_steps, initial=start, desc=args.objective, unit="step", disable=None if rank == 0 else True)
    # on a CPU the fused backward of attention is the slowest part of a step: plain matrix products are quicker
    with sdpa_kernel(SDPBackend.MATH) if device == "cpu" else contextlib.nullcontext():
        for step in range(start, args.max_steps):
            began, total, seen, lr = time.time(), 0, [], learning_rate(step, args)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for batch in islice(batches, accumulate):
                losses, log = forward(base, adapter, batch, args.objective, args.beta, args.user_drop, backward=lambda losses: (losses.sum() / args.batch).backward())
                total = total + torch.stack([losses.sum(), *(v.sum() for v in log.values())])
                seen.append((batch["ranking_ids"], losses))
                if stop and rank == 0 and saved < step:  # first of all: torchrun kills half a minute after its signal, a step may take longer
                    save(saved := step)
            mine = torch.nn.utils.get_total_norm([p.grad for p in parameters])
            total = torch.cat([total / args.batch, total.new_full((1,), len(stop))])
            if world > 1:
                sum_over_ranks([total, *(p.grad for p in parameters)])  # the only exchange of training, once a step
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
            *logged, stopping, grad_norm = torch.cat([total, norm[None].to(total.dtype)]).tolist()  # the step's only wait for the GPU
            line = dict(step=step, loss=logged[0], **dict(zip(log, logged[1:])), grad_norm=grad_norm, lr=lr,
                        pairs_per_second=round(args.batch / (time.time() - began), 2))
            line |= dict(peak_gpu_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2)) if device.startswith("cuda") else {}
            if wrong := [key for key, value in line.items() if not math.isfinite(value)]:
                not_finite(step, wrong, seen, mine.item())
            last = step + 1 == args.max_steps
            if step % args.log_every == 0 or last:
                line |= validate(base, adapter, fixed, args)
                if rank == 0:
                    append_line(log_file, json.dumps(line))
                if line.get("error_preferred", 0) > 1.5 * line.get("error_ref_preferred", math.inf):
                    say(f"warning: step {step}: the preferred pictures' error is {line['error_preferred'] / line['error_ref_preferred']:.1f} x the reference's; "
                        "both errors exploding is how Diffusion-DPO fails: try a larger --beta or a lower --lr")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.update()
            bar.set_postfix_str(f"loss {line['loss']:.3f}, implicit accuracy {line.get('implicit_accuracy', math.nan):.2f}, "
                                f"{line['pairs_per_second']:.1f} pairs/s", refresh=False)
            if rank == 0 and ((step + 1) % args.save_every == 0 or last or stopping):
                save(saved := step + 1)
            if rank == 0 and captions and args.preview_every and ((step + 1) % args.preview_every == 0 or last):
                preview(base, adapter, captions, people, out / "previews" / f"step-{step + 1:06d}.png")
            if stopping:
                say(f"stopped by a signal after step {step}, saved; --resume goes on")
                break
    bar.close()
    if world > 1:
        dist.destroy_process_group()
    say(f"last step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in line.items() if k != "step"))
    say(f"-> {out}/adapter.safetensors")


def main(argv=None):
    run_script("train.py", run, arguments(argv))


if __name__ == "__main__":
    main()
