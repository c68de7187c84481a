"""Stage 2 of PPD: train the user adapter, and nothing else, on users' choices (Sec. 4.1, 5; Eq. 6).

    python train.py                                                  # laptop, tiny base, minutes
    torchrun --nproc-per-node 2 train.py --micro 16                  # two processes or GPUs
    python train.py --users users-onehot --out runs/onehot           # Sec. 5.1's synthetic users
    python train.py --resume                                         # go on where it was stopped

Writes to --out: adapter.safetensors (for sample.py), state.pt (for --resume), train.jsonl (a line a
logged step) and previews/. The baselines are the same loop: --objective dpo is Diffusion-DPO (Eq.
3: everybody is the zero user, who has tokens of its own), --objective sft is Eq. 1 on the preferred
images with the user as condition.
"""

import contextlib
import datetime
import json
import math
import signal
import time
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import utils
from bases import load_base
from bases.latents import open_images
from data import PreferencePairs, batch_indices, collate, load_training_data, loading
from ppd import UserAdapter, denoising_error, ppd_loss
from sample import preview, preview_inputs
from utils import InputError

# Defaults by base and kind of users; every one is a flag. batch: pairs a step, over all GPUs
# together; micro: pairs a GPU holds at once, the rest is accumulated; t_min: timesteps are from
# [t_min, 1]; max_steps: None is one epoch; warmup: steps; token_dim: None is the base's own
TINY = dict(batch=32, micro=32, lr=1e-3, beta=1.0, t_min=0.95, max_steps=300, decay="cosine")
TINY |= dict(warmup=20, tokens=4, token_dim=64, save_every=300)
FULL = dict(batch=768, micro=8, lr=1e-5, beta=1.0, t_min=0.001, max_steps=None, decay="constant")
FULL |= dict(warmup=20, tokens=4, token_dim=None, save_every=100)
ONE_HOT = TINY | dict(beta=10.0, max_steps=200)
DEFAULTS = {"tiny": TINY, "tiny, one-hot": ONE_HOT, "full": FULL}
VALIDATION_PAIRS = 1024  # at every save: the accuracy's standard error is 1.6%
# what the adapter's header tells of its training, and what a resumed run may change
HEADER_KEYS = tuple(key for key in DEFAULTS["full"] if key not in ("micro", "save_every"))
HEADER_KEYS += ("clip", "user_drop", "noise", "bias_free", "guard", "seed", "dtype", "only")
RESUME_MAY_CHANGE = ("resume", "out", "data", "latents", "device", "workers", "micro")
RESUME_MAY_CHANGE += ("checkpointing", "compile", "save_every", "log_every", "preview_every")


def parse_args(argv=None):
    parser = utils.make_parser("train.py", __doc__)

    def by_base(key):
        values = [f"{name} {defaults[key] or 'one epoch'}" for name, defaults in DEFAULTS.items()]
        return f"(default: {', '.join(values)})"

    add = parser.add_argument
    add("--base", default="tiny", help="'tiny', a hub id or a folder in its layout (%(default)s)")
    add("--decoder", help="with the image encoder (default: stabilityai/stable-cascade)")
    add("--grid", type=int, help="side of the latents (default: the base's, Stable Cascade 24)")
    add("--users", default="users", help="folder that embed.py wrote (default: %(default)s)")
    add("--only", nargs="+", metavar="USER", help="train on these users' pairs alone")
    add("--data", help="folder of the parquet files, if it moved since embed.py read it")
    add("--latents", help="folder of cached latents (default: latents, beside the data, if there)")
    add("--out", default="runs/ppd", help="folder to write (default: %(default)s)")
    add("--resume", action="store_true", help="continue the run in --out, or start it")
    add("--objective", choices=("ppd", "dpo", "sft"), default="ppd")
    add("--beta", type=float, help="KL strength of Eq. 6 " + by_base("beta"))
    add("--t-min", type=float, help="timesteps are from [t-min, 1] " + by_base("t_min"))
    add("--max-steps", type=int, help="optimizer steps " + by_base("max_steps"))
    add("--batch", type=int, help="pairs a step, over all GPUs together " + by_base("batch"))
    add("--micro", type=int, help="pairs a GPU holds at once " + by_base("micro"))
    add("--lr", type=float, help="of AdamW " + by_base("lr"))
    add("--warmup", type=int, help="steps of linear warm-up " + by_base("warmup"))
    add("--decay", choices=("constant", "cosine"), help="of the rate " + by_base("decay"))
    add("--clip", type=float, default=1.0, help="largest gradient norm (default: %(default)s)")
    add("--guard", action="store_true", help="damp the growth of preferred errors: guard_scale")
    add("--user-drop", type=float, default=0.1, help="zero user's share of pairs (%(default)s)")
    add("--noise", choices=("shared", "separate"), default="shared", help="of a pair's images")
    add("--tokens", type=int, help="user tokens " + by_base("tokens"))
    add("--token-dim", type=int, help="their width " + by_base("token_dim"))
    add("--bias-free", action="store_true", help="no bias in the projector: zero user = base")
    add("--compile", action="store_true", help="compile the prior's blocks: a minute, then faster")
    add("--checkpointing", action="store_true", help="recompute activations: less memory, slower")
    add("--save-every", type=int, help="steps; validates too " + by_base("save_every"))
    add("--log-every", type=int, default=10, help="steps (default: %(default)s)")
    add("--preview-every", type=int, default=100, help="steps, 0 for none (default: %(default)s)")
    add("--workers", type=int, default=0, help="processes that read images (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and pairs (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the base")
    args = parser.parse_args(argv)
    fill_defaults(args, parser.error)
    check_args(args, parser.error)
    return args


def fill_defaults(args, error):
    """Settings that were not given, by base and by the kind of users."""
    pairs = Path(args.users) / "pairs.parquet"
    if not pairs.is_file():
        error(f"--users {args.users}: no pairs.parquet there; run embed.py first")
    try:
        one_hot = json.loads(pq.read_metadata(pairs).metadata[b"ppd"]).get("one_hot")
    except Exception as problem:  # pyarrow raises several kinds
        error(f"{pairs}: not a pairs file of embed.py ({type(problem).__name__})")
    has_codec = (Path(args.base.partition(":")[0]) / "codec").is_dir()  # a retrained tiny base
    kind = "tiny" if args.base == "tiny" or has_codec else "full"
    kind = "tiny, one-hot" if kind == "tiny" and one_hot else kind
    for key, value in DEFAULTS[kind].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
            if key == "micro":
                args.micro = max(1, min(value, args.batch // utils.rank_and_world()[1]))


def check_args(args, error):
    check = partial(utils.check_flags, args, error)
    check("batch micro max_steps save_every log_every", lambda v: v >= 1, "1 or more")
    check("tokens token_dim grid", lambda v: v >= 1, "1 or more")
    check("seed workers warmup preview_every", lambda v: 0 <= v < 2**63, "0 or more")
    check("beta lr clip", lambda v: 0 < v < math.inf, "a number above 0")
    check("t_min", lambda v: 0 < v < 1, "a timestep in (0, 1)")
    check("user_drop", lambda v: 0 <= v <= 1, "a share in [0, 1]")
    together = args.micro * utils.rank_and_world()[1]
    if args.batch % together:
        error(f"--batch {args.batch}: expected a multiple of --micro x processes = {together}")
    if args.bias_free and args.objective == "dpo":
        error("--objective dpo --bias-free: its zero user is the base, there is nothing to train")
    if args.guard and args.objective == "sft":
        error("--objective sft --guard: it has no dispreferred images")
    if not args.resume and (Path(args.out) / "state.pt").exists():
        error(f"--out {args.out} holds a run already: add --resume, or choose another folder")


def to_device(batch, device):
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


# ----------------------------------------------------------------------- one micro-step
def micro_step(base, adapter, batch, beta, user_drop=0.0, pairs_per_step=None, guard=False):
    """Eq. 6 on a micro-batch of B pairs, and its gradient.

    batch: see data.collate
    user_drop: share of pairs whose user is zeroed; 1 makes it Diffusion-DPO (Eq. 3)
    pairs_per_step: what the sum of the losses is divided by for backward; None: no backward
    Returns the losses (B,) and (B,) tensors to log. Nothing here waits for the GPU.
    """
    batch = to_device(batch, base.device)
    x_t, t, target, conditions = noised_inputs(base, batch)
    user_tokens = adapter(batch["user"], drop=batch["drop_draw"] <= user_drop)  # (B, L, d)
    # the reference model: the same network, which is not shown the user; detached
    with adapter.reference(user_tokens):
        pred_ref = base.predict(x_t, t, *conditions).detach()
    # the policy: the same network; every attention layer reads the user's tokens
    with adapter.user(user_tokens):
        pred = base.predict(x_t, t, *conditions)
        losses, log = ppd_loss(pred, pred_ref, target, beta, guard=guard)
        if pairs_per_step:
            (losses.sum() / pairs_per_step).backward()
    return losses.detach(), log


def sft_micro_step(base, adapter, batch, user_drop=0.0, pairs_per_step=None):
    """The SFT baseline: Eq. 1 on the preferred images, given the user. As micro_step otherwise."""
    batch = to_device(batch, base.device)
    x_t, t, target, conditions = noised_inputs(base, batch, images_per_pair=1)
    with adapter.user(adapter(batch["user"], drop=batch["drop_draw"] <= user_drop)):
        losses = denoising_error(base.predict(x_t, t, *conditions), target)
        if pairs_per_step:
            (losses.sum() / pairs_per_step).backward()
    return losses.detach(), dict(error_preferred=losses.detach())


def noised_inputs(base, batch, images_per_pair=2):
    """A micro-batch's x_t and target (2B, C, h, w), t (2B,) and conditions, the preferred first;
    with images_per_pair=1 of the preferred images alone, (B, ...)."""
    n = images_per_pair * len(batch["t"])
    images = batch["images"][:n]
    latents = base.encode_pixels(images) if images.dtype == torch.uint8 else images  # cached ones
    noise = batch["noise"][:n]
    t = batch["t"].repeat(images_per_pair)
    conditions = base.encode_tokens(batch["tokens"])
    conditions = [c.repeat(images_per_pair, *[1] * (c.ndim - 1)) for c in conditions]
    return base.add_noise(latents, noise, t), t, base.target(latents, noise, t), conditions


def learning_rate(step, args):
    """Linear warm-up, times a cosine over the whole run if --decay cosine."""
    lr = args.lr * min(1.0, (step + 1) / max(1, args.warmup))
    if args.decay == "cosine":
        lr *= 0.5 + 0.5 * math.cos(math.pi * step / args.max_steps)
    return lr


@torch.no_grad()
def validate(base, adapter, batches, args, parts=4):
    """Means over the fixed validation pairs of all ranks, as validation_*; {} without any. The
    errors also by timestep, in equal parts from t_min to 1, as a list of dicts."""
    values = {}
    user_drop = 1.0 if args.objective == "dpo" else 0.0
    for batch in batches:
        losses, log = micro_step(base, adapter, batch, args.beta, user_drop)
        if args.objective != "sft":  # it trains another loss
            log = dict(loss=losses, **log)
        for key, value in dict(log, t=batch["t"]).items():
            values.setdefault(key, []).extend(value.tolist())
    every = utils.all_gather_objects(values)
    merged = {k: torch.tensor([n for v in every for n in v.get(k, [])]) for k in every[0]}
    if not merged:
        return {}
    t = merged.pop("t")
    line = {f"validation_{key}": numbers.double().mean().item() for key, numbers in merged.items()}
    part = ((t - args.t_min) / (1 - args.t_min) * parts).long().clamp(max=parts - 1)
    errors = {key: numbers for key, numbers in merged.items() if key.startswith("error")}
    line["validation_errors_by_t"] = [
        {"t": [args.t_min + (1 - args.t_min) * end / parts for end in (k, k + 1)]}
        | {key: numbers[part == k].mean().item() for key, numbers in errors.items()}
        for k in part.unique().tolist()
    ]
    return line


def accumulate_gradient(step, args, base, adapter, batches, stop, save):
    """The gradient of one optimizer step: accumulated, summed over ranks and clipped.

    batches: iterator of this rank's micro-batches; stop: see stop_requests
    save: called with the steps done so far as soon as this process is asked to stop: torchrun kills
        half a minute after its signal, and a step may take longer
    Returns a line for train.jsonl, and whether any process was asked to stop. Raises InputError, on
    all ranks, if a number is not finite.
    """
    began = time.time()
    _, world_size = utils.rank_and_world()
    user_drop = 1.0 if args.objective == "dpo" else args.user_drop  # Eq. 3: always zero
    total = 0
    saved = False
    for batch in islice(batches, args.batch // (args.micro * world_size)):
        if args.objective == "sft":
            losses, log = sft_micro_step(base, adapter, batch, user_drop, pairs_per_step=args.batch)
        else:
            settings = (args.beta, user_drop, args.batch, args.guard)
            losses, log = micro_step(base, adapter, batch, *settings)
        total = total + torch.stack([losses.sum(), *(value.sum() for value in log.values())])
        if stop and not saved:
            save(step)
            saved = True
    local_loss = total[0]  # of this rank
    parameters = list(adapter.parameters())
    total = torch.cat([total / args.batch, total.new_full((1,), len(stop))])
    if world_size > 1:  # the only exchange of training
        utils.all_reduce_sum([total, *(p.grad for p in parameters)])
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
    # the step's only wait for the GPU
    *means, n_stop, grad_norm = torch.cat([total, grad_norm[None].to(total.dtype)]).tolist()

    line = dict(zip(("step", "loss", *log), (step, *means), strict=True), grad_norm=grad_norm)
    line |= dict(lr=learning_rate(step, args), clipped=int(grad_norm > args.clip))
    line["pairs_per_second"] = round(args.batch / (time.time() - began), 2)
    if base.device.type == "cuda":
        line["peak_gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    wrong = [key for key, value in line.items() if not math.isfinite(value)]
    if wrong:
        finite = utils.all_gather_objects(math.isfinite(local_loss.item()))
        ranks = [str(rank) for rank, is_finite in enumerate(finite) if not is_finite]
        where = f"the loss of rank {', '.join(ranks)}" if ranks else ", ".join(wrong[:3])
        advice = "the last checkpoint is kept; try a lower --lr or a larger --warmup"
        raise InputError(f"step {step}: not finite: {where}. The step was not taken, {advice}")
    return line, n_stop > 0


@contextlib.contextmanager
def stop_requests():
    """A list that SIGINT and SIGTERM append to inside the block: the step in hand is finished,
    saved, and the run ends. Afterwards signals are handled as before."""
    requests = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: requests.append(1)) for number in numbers}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_base(args, device):
    dtype = utils.pick_dtype(args.dtype, device)
    base = load_base(args.base, device, dtype, args.decoder, args.grid)
    if args.checkpointing:
        base.prior.enable_gradient_checkpointing()
    if args.compile:
        base.compile_blocks()
    return base


def make_adapter(args, base, rows, embeddings, reader):
    """A new adapter for these users, hooked into the base; float32, whatever the base is."""
    torch.manual_seed(args.seed)
    width = next(iter(embeddings.values())).shape[1]
    adapter = UserAdapter(width, base.channels, args.tokens, args.token_dim, not args.bias_free)
    adapter.compiled = args.compile
    if reader[0] != "one-hot":
        train_users = sorted({row["user"] for row in rows["train"]})
        adapter.set_statistics(torch.cat([embeddings[user] for user in train_users]))
    return adapter.install(base.attention_layers())


def resume(args, config, adapter, optimizer):
    """Put the checkpoint in --out back, if --resume and there is one -> the steps done."""
    start = 0
    state = utils.load_checkpoint(args.out, config) if args.resume else None
    if state is not None:
        fused = optimizer.param_groups[0]["fused"]  # this device's way, not the checkpoint's
        try:
            adapter.load_state_dict(state["adapter"])
            optimizer.load_state_dict(state["optimizer"])
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            problem = f"the checkpoint is of another base: {utils.first_line(error)}"
            raise InputError(f"--resume: {problem}") from None
        optimizer.param_groups[0]["fused"] = fused
        start = state["step"]
    elif args.resume:
        print0(f"--resume: nothing to resume in {args.out}, starting at 0")
    steps = sorted(set(utils.all_gather_objects(start)))
    if len(steps) > 1:
        problem = f"the processes find checkpoints of steps {steps}; all must see one folder"
        raise InputError(f"--out {args.out}: {problem}")
    log = Path(args.out) / "train.jsonl"
    if utils.rank_and_world()[0] == 0:  # what lost steps had logged after the checkpoint goes
        log.parent.mkdir(parents=True, exist_ok=True)
        lines = utils.read_jsonl(log) if log.exists() else []
        utils.write_jsonl(log, [line for line in lines if line.get("step", start) < start])
    return start


def print_plan(args, base, adapter, rows, images):
    """The derived numbers of a run, before it starts."""
    world_size = utils.rank_and_world()[1]
    frozen, trained = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (base.prior, adapter))
    n_pairs, n_users = len(rows["train"]), len({row["user"] for row in rows["train"]})
    epochs = args.max_steps * args.batch / n_pairs
    print0(
        f"base {args.base} on {base.device}, {base.dtype}: {frozen:.1f}M frozen parameters, "
        f"{len(base.channels)} attention layers; adapter {trained:.2f}M, {args.tokens} tokens of "
        f"{args.token_dim}\n{n_pairs} training pairs of {n_users} users, {images.kind}; "
        f"{args.batch} a step = {args.micro} x {world_size} processes x "
        f"{args.batch // (args.micro * world_size)} accumulated; {args.max_steps} steps = "
        f"{epochs:.2f} epochs\nobjective {args.objective}, beta {args.beta:g}, t from "
        f"{args.t_min:g} to 1, lr {args.lr:g}, user drop {args.user_drop:g}, seed {args.seed}"
    )


def validation_batches(dataset, args, to_batch):
    """This rank's part of the validation pairs, as micro-batches, read anew."""
    rank, world_size = utils.rank_and_world()
    n = min(VALIDATION_PAIRS, len(dataset.rows))
    for start in range(rank * args.micro, n, world_size * args.micro):
        yield to_batch([dataset[i] for i in range(start, min(start + args.micro, n))])


def print0(*text):
    if utils.rank_and_world()[0] == 0:
        print(*text)


def save_run(args, config, header, adapter, optimizer, step):
    """The adapter for sample.py and the state for --resume, by rank 0."""
    if utils.rank_and_world()[0] == 0:
        adapter.save(Path(args.out) / "adapter.safetensors", step=step, **header)
        state = dict(adapter=adapter.state_dict(), optimizer=optimizer.state_dict())
        utils.save_checkpoint(args.out, step=step, config=config, **state)


def log_line(args, line):
    """A line for train.jsonl, and a warning if both errors explode, as Diffusion-DPO's can."""
    if utils.rank_and_world()[0] == 0:
        utils.append_line(Path(args.out) / "train.jsonl", json.dumps(line))
    error, reference = line.get("error_preferred", 0), line.get("error_ref_preferred", math.inf)
    if error > 1.5 * reference:
        print0(
            f"warning: step {line['step']}: the preferred images' error is {error / reference:.1f} "
            "x the reference's; Diffusion-DPO fails so: try a larger --beta or a lower --lr"
        )


def run(args):
    rank, world_size = utils.rank_and_world()
    device = utils.pick_device(args.device)
    if world_size > 1:  # rank 0 may paint previews meanwhile
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))

    # data, the frozen base, the adapter, the optimizer
    rows, embeddings, reader, settings = load_training_data(args.users, args.only)
    args.max_steps = args.max_steps or math.ceil(len(rows["train"]) / args.batch)  # one epoch
    base = make_base(args, device)
    args.token_dim = args.token_dim or base.token_dim
    used = rows["train"] + rows["validation"]
    images = open_images(args.data or settings["data"], args.latents, used, base.codec, base.dtype)
    adapter = make_adapter(args, base, rows, embeddings, reader)
    on_gpu = device.startswith("cuda")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=args.lr, fused=on_gpu)

    # where to begin, and how to save
    config = {key: value for key, value in vars(args).items() if key not in RESUME_MAY_CHANGE}
    config["the content of --users, by digest,"] = settings["content"]
    header = {key: config[key] for key in ("base", "grid", "objective", "beta", "seed", "users")}
    header |= dict(reader=reader, recipe={key: config[key] for key in HEADER_KEYS})
    start = resume(args, config, adapter, optimizer)
    if start >= args.max_steps:
        print0(f"{args.out}: finished already, {start} steps")
        return
    save = partial(save_run, args, config, header, adapter, optimizer)
    print_plan(args, base, adapter, rows, images)
    if images.kind == "images" and args.base != "tiny" and rank == 0:
        images.warn(rows["train"][0], (args.max_steps - start) * args.batch)

    # micro-batches: this rank's of the endless training sequence, and the same validation pairs,
    # noise and timesteps every time, whatever --seed
    common = dict(embeddings=embeddings, load_images=images, latent_shape=base.latent_shape)
    common |= dict(separate_noise=args.noise == "separate", t_min=args.t_min)
    train_pairs = PreferencePairs(rows["train"], seed=args.seed, strata=args.batch, **common)
    val_pairs = PreferencePairs(rows["validation"], seed=0, **common)
    to_batch = partial(collate, tokenize=base.tokenize)
    steps = range(start, args.max_steps)
    n_micro = args.batch // (args.micro * world_size)
    batch_sampler = [batch_indices(args, step, m) for step in steps for m in range(n_micro)]
    batching = dict(batch_sampler=batch_sampler, collate_fn=to_batch, pin_memory=on_gpu)
    loader = loading(train_pairs, **batching, num_workers=args.workers)
    preview_captions, preview_users = preview_inputs(adapter, rows, embeddings, args.objective)
    # on a CPU the fused backward of attention is slow: plain matrix products are quicker
    plain_attention = sdpa_kernel(SDPBackend.MATH) if device == "cpu" else contextlib.nullcontext()

    with stop_requests() as stop, loader as batches, plain_attention:
        progress = tqdm(total=args.max_steps, initial=start, disable=None if rank == 0 else True)
        for step in steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            line, stopping = accumulate_gradient(step, args, base, adapter, batches, stop, save)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            last = step + 1 == args.max_steps
            due = not stopping and ((step + 1) % args.save_every == 0 or last)
            if due:
                line |= validate(base, adapter, validation_batches(val_pairs, args, to_batch), args)
            if step % args.log_every == 0 or last or "validation_logits" in line:
                log_line(args, line)
            accuracy = line.get("implicit_accuracy", math.nan)
            progress.set_postfix_str(f"loss {line['loss']:.3f}, implicit accuracy {accuracy:.2f}")
            progress.update()
            if due or stopping:
                save(step + 1)
            painting = args.preview_every and ((step + 1) % args.preview_every == 0 or last)
            if rank == 0 and painting and preview_captions:
                path = Path(args.out) / "previews" / f"step-{step + 1:06d}.png"
                preview(base, adapter, preview_captions, preview_users, path)
            if stopping:
                print0(f"stopped by a signal after step {step}, saved; --resume goes on")
                break
        progress.close()
    if world_size > 1:
        dist.destroy_process_group()
    numbers = ", ".join(f"{k} {v:.4g}" for k, v in line.items() if isinstance(v, float))
    print0(f"last step {step}: {numbers}\n-> {args.out}/adapter.safetensors")


def main(argv=None):
    utils.run_script("train.py", run, parse_args(argv))


if __name__ == "__main__":
    main()
