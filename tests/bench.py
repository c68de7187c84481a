"""Speed of a training step, random weights, no data and no users folder.

    python tests/bench.py --base tiny            # a laptop
    python tests/bench.py --base full            # the 3.6B prior, on a GPU
    python tests/bench.py --base full --count    # without one: a step's FLOPs and bytes, counted
    python tests/bench.py --base full --profile  # where the time goes

Three arms take turns, round by round: `ours` (train.py's own step with --compile), `eager` (the
same, not compiled), and `recipe`, what one gets from the field's training scripts: a second frozen
copy of the prior as the reference, eager, full activation checkpointing, unfused AdamW, and the
loss fetched from the device at every micro-step. (Memory format makes no arm: Stage C permutes to
channels-last before its first norm and stays there, whatever its weights' format.) Batches are of
cached latents; text is encoded in the step. A matmul in between measures the ceiling. FLOPs are
counted by PyTorch for the arithmetic that the loss needs (no recomputation), and ratios are of
medians.
"""

import contextlib
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import diffusers
import torch
import torch.nn.functional as F
import transformers
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bases.cascade import StableCascade, make_scheduler
from ppd import UserAdapter, ppd_loss
from train import micro_step
from utils import TINY, make_parser, pick_dtype

COMMON = dict(in_channels=16, out_channels=16, timestep_ratio_embedding_dim=64, patch_size=1)
COMMON |= dict(clip_text_in_channels=1280, clip_text_pooled_in_channels=1280)
COMMON |= dict(clip_image_in_channels=768, clip_seq=4, dropout=(0.1, 0.1), switch_level=(False,))
TEXT = dict(hidden_size=1280, intermediate_size=5120, projection_dim=1280, hidden_act="gelu")
TEXT |= dict(num_hidden_layers=32, num_attention_heads=20)
ARMS = ("ours", "eager", "recipe")


def stage_c(width, down, **changes):
    """The configuration of a Stage C with two levels of one width, and `down` blocks in each on the
    way down."""
    sizes = dict(conditioning_dim=width, block_out_channels=(width, width))
    sizes |= dict(down_num_layers_per_block=down, up_num_layers_per_block=down[::-1])
    return COMMON | changes | sizes | dict(num_attention_heads=(width // 64, width // 64))


SIZES = {"full": stage_c(2048, (8, 24)), "lite": stage_c(1536, (4, 12))}


def parse_args(argv=None):
    parser = make_parser("bench.py", __doc__)
    add = parser.add_argument
    add("--base", choices=("tiny", "lite", "full"), default="tiny")
    add("--micro", type=int, help="pairs a micro-step (default: tiny 32, else 8)")
    add("--accumulate", type=int, default=2, help="micro-steps a step (default: %(default)s)")
    add("--rounds", type=int, default=7, help="steps of each arm (default: %(default)s)")
    add("--arms", nargs="+", choices=ARMS, default=ARMS)
    add("--count", action="store_true", help="run nothing: count a micro-step's FLOPs and bytes")
    add("--profile", action="store_true", help="the first arm's three largest costs too")
    add("--checkpointing", action="store_true", help="in ours and eager too")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="(default: %(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    args = parser.parse_args(argv)
    if args.micro is None:
        args.micro = 32 if args.base == "tiny" else 8
    return args


# ---------------------------------------------------------------- what a step works on
def make_base(size, device, dtype):
    """A StableCascade of that size with random weights: Stage C and text encoder, frozen, made on
    the device."""
    if size == "tiny":
        paths = [TINY / part / "config.json" for part in ("prior", "text_encoder")]
        prior_config, text_config = (json.loads(path.read_text()) for path in paths)
    else:
        prior_config, text_config = SIZES[size], TEXT
    diffusers.utils.logging.set_verbosity_error()
    base = StableCascade.__new__(StableCascade)  # no checkpoint to load
    base.device = torch.device(device)
    base.dtype = dtype
    base.scheduler = make_scheduler(device)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with base.device:
        base.prior = diffusers.StableCascadeUNet.from_config(prior_config)
        base.text_encoder = transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(**text_config)
        )
    torch.set_default_dtype(torch.float32)
    for model in (base.prior, base.text_encoder):
        model.to(dtype).eval().requires_grad_(False)
    return base


def is_full_scale(base):
    return base.prior.config.block_out_channels[0] > 512


def make_batch(base, micro):
    """What PreferencePairs and collate make of cached latents."""
    g = torch.Generator().manual_seed(0)
    side, length, user_dim = (24, 77, 3584) if is_full_scale(base) else (8, 16, 192)
    noise = torch.randn(micro, 16, side, side, generator=g)
    token_ids = torch.randint(2, base.text_encoder.config.vocab_size, (micro, length), generator=g)
    batch = dict(
        images=torch.randn(2 * micro, 16, side, side, generator=g).to(base.dtype),
        noise=torch.cat([noise, noise]),
        user=torch.randn(micro, user_dim, generator=g),
        t=torch.rand(micro, generator=g).mul(0.999).add(0.001),
        drop_draw=torch.rand(micro, generator=g),
        tokens=torch.stack([token_ids, torch.ones_like(token_ids)]),
    )
    if base.device.type == "cuda":
        batch = {key: value.pin_memory() for key, value in batch.items()}
    return batch


def make_adapter(base, batch):
    token_dim = 1024 if is_full_scale(base) else 64
    adapter = UserAdapter(batch["user"].shape[1], base.channels, 4, token_dim)
    return adapter.install(base.attention_layers())


# --------------------------------------------------------------------------- the arms
def recipe_micro_step(base, reference, adapter, batch):
    """The usual micro-step: a second prior as the reference, everything waited for."""
    batch = {key: value.to(base.device) for key, value in batch.items()}
    t = batch["t"].repeat(2)
    x_t = base.add_noise(batch["images"], batch["noise"], t)
    conditions = [c.repeat(2, 1, 1) for c in base.encode_tokens(batch["tokens"])]
    policy = base.prior
    with adapter.user(adapter(batch["user"], batch["drop_draw"] <= 0.1)):
        pred = base.predict(x_t, t, *conditions)
        base.prior = reference
        with torch.no_grad():
            pred_ref = base.predict(x_t, t, *conditions)
        base.prior = policy
        losses, _ = ppd_loss(pred, pred_ref, batch["noise"], 1.0)
        loss = losses.mean()
        loss.backward()
    loss.item()


def make_arms(args, device, dtype):
    """{arm: a function that takes one optimizer step}, and the bytes that each arm keeps between
    steps, as a function. The arms share one prior and one adapter, so that the largest fit on one
    GPU together."""
    base = make_base(args.base, device, dtype)
    batch = make_batch(base, args.micro)
    reference = None
    if "recipe" in args.arms:
        reference = copy.deepcopy(base.prior)  # before the adapter is installed: it knows no user
    adapter = make_adapter(base, batch)
    parameters = list(adapter.parameters())
    optimizers = {
        arm: torch.optim.AdamW(parameters, lr=1e-5, fused=arm != "recipe" and device == "cuda")
        for arm in args.arms
    }
    base.compile_blocks()
    blocks = [block for block in base.prior.modules() if block._compiled_call_impl]
    compiled_calls = [block._compiled_call_impl for block in blocks]

    def switch(arm):
        if arm == "recipe" or args.checkpointing:
            base.prior.enable_gradient_checkpointing()
        else:
            base.prior.disable_gradient_checkpointing()
        for block, call in zip(blocks, compiled_calls, strict=True):
            block._compiled_call_impl = call if arm == "ours" else None  # what compile() sets
        adapter.compiled = arm == "ours"

    def step(arm):
        switch(arm)
        for _ in range(args.accumulate):
            if arm == "recipe":
                recipe_micro_step(base, reference, adapter, batch)
            else:
                micro_step(base, adapter, batch, 1.0, 0.1, args.micro)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizers[arm].step()
        optimizers[arm].zero_grad(set_to_none=True)
        return norm.item()

    def kept_bytes(arm):
        tensors = [*base.prior.parameters(), *base.text_encoder.parameters(), *parameters]
        for values in optimizers[arm].state.values():
            tensors += values.values()
        if arm == "recipe":
            tensors += reference.parameters()
        return sum(t.numel() * t.element_size() for t in tensors)

    return {arm: partial(step, arm) for arm in args.arms}, kept_bytes


# --------------------------------------------------------------------------- counting
def count(args, fused, checkpointing=False):
    """Nothing is run: FLOPs a pair of a step of ours, the bytes of its frozen weights, of adapter,
    gradient and AdamW, and of what is kept for backward, eager, in bfloat16.

    fused: attention as the fused kernels do it, which keep less and compute more, or by plain
    matrix products
    """
    base = make_base(args.base, "meta", torch.bfloat16)
    batch = make_batch(base, args.micro)
    adapter = make_adapter(base, batch)
    if checkpointing:
        base.prior.enable_gradient_checkpointing()
    frozen = [*base.prior.parameters(), *base.text_encoder.parameters()]
    trained = list(adapter.parameters())
    known = {p.untyped_storage()._cdata for p in frozen + trained}
    kept = {}
    plain = F.scaled_dot_product_attention

    def flash(q, k, v, attn_mask=None, **settings):
        if attn_mask is None and q.requires_grad:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        return plain(q, k, v, attn_mask, **settings)

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:  # the tensor too, or another would get its address
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    attention = flash if fused else plain
    with (
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        micro_step(base, adapter, batch, 1.0, 0.1, args.micro)
    return (
        counter.get_total_flops() / args.micro,
        2 * sum(p.numel() for p in frozen),
        16 * sum(p.numel() for p in trained),
        sum(size for size, _ in kept.values()),
    )


def print_count(args):
    flops, *sizes = count(args, fused=True, checkpointing=args.checkpointing)
    frozen, trained, kept, total = (size / 2**30 for size in (*sizes, sum(sizes)))
    how = ", checkpointing" if args.checkpointing else ""
    print(
        f"{args.base}, {args.micro} pairs{how}: {flops / 1e12:.4g} TFLOP a pair; "
        f"GiB: {frozen:.1f} frozen weights + {trained:.1f} adapter, gradient and AdamW + "
        f"{kept:.1f} kept for backward = {total:.1f}"
    )


# -------------------------------------------------------------------------- measuring
def seconds(work, gpu):
    """How long a function takes; a GPU is waited for."""
    if gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def matmul_flops(device, dtype):
    """FLOP/s of a large matrix product, the best of a few: what the hardware gives at most."""
    gpu = device == "cuda"
    n, repeat = (8192, 10) if gpu else (1536, 2)
    a = torch.randn(n, n, device=device, dtype=dtype)

    def multiply():
        for _ in range(repeat):
            a @ a

    return repeat * 2 * n**3 / min(seconds(multiply, gpu) for _ in range(5))


def take_turns(args, arms, kept_bytes, device, dtype):
    """{arm: seconds of its first step}, {arm: seconds of the others}, {arm: peak bytes}, and the
    median ceiling."""
    gpu = device == "cuda"
    first = {arm: seconds(step, gpu) for arm, step in arms.items()}
    times, peak = {arm: [] for arm in arms}, dict.fromkeys(arms, 0)
    ceilings = []
    for _ in range(args.rounds):
        ceilings.append(matmul_flops(device, dtype))
        for arm, step in arms.items():
            if gpu:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            times[arm].append(seconds(step, gpu))
            if gpu:
                used = torch.cuda.max_memory_allocated() - before + kept_bytes(arm)
                peak[arm] = max(peak[arm], used)
    return first, times, peak, statistics.median(ceilings)


def largest_costs(step, gpu):
    """The three operations, or kernels, that take most of a step."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with torch.profiler.profile(activities=activities) as profile:
        step()
    costs = {}
    for event in profile.key_averages():
        if not gpu:
            costs[event.key] = event.self_cpu_time_total
        elif event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            costs[event.key] = event.self_device_time_total  # kernels alone
    total = sum(costs.values())
    largest = sorted(costs, key=costs.get)[:-4:-1]
    return "; ".join(f"{key} {100 * costs[key] / total:.0f}%" for key in largest)


def measure(args, device, dtype):
    """Let the arms take turns; print a table and the two ratios."""
    gpu = device == "cuda"
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{args.base}: {name}, {str(dtype).removeprefix('torch.')}, {args.micro} pairs a "
        f"micro-step, {args.accumulate} a step, torch {torch.__version__}",
        flush=True,
    )
    flops, *_ = count(args, fused=False)  # what the loss needs, nothing computed twice
    arms, kept_bytes = make_arms(args, device, dtype)
    first, times, peak, ceiling = take_turns(args, arms, kept_bytes, device, dtype)
    pairs = args.micro * args.accumulate
    speed = {arm: pairs / statistics.median(taken) for arm, taken in times.items()}
    print(
        f"{flops / 1e12:.4g} TFLOP a pair; matmul ceiling {ceiling / 1e12:.4g} TFLOP/s; medians of "
        f"{args.rounds} steps, smallest to largest in brackets"
    )
    print("| arm | pairs/s | TFLOP/s | of the ceiling | first step, s | peak memory, GiB |")
    print("|---|---|---|---|---|---|")
    for arm, taken in times.items():
        span = f"{pairs / max(taken):.3g} to {pairs / min(taken):.3g}"
        memory = f"{peak[arm] / 2**30:.1f}" if gpu else "-"
        print(
            f"| {arm} | {speed[arm]:.3g} ({span}) | {speed[arm] * flops / 1e12:.3g} | "
            f"{speed[arm] * flops / ceiling:.2f} | {first[arm]:.1f} | {memory} |"
        )
    ours = args.arms[0]
    if args.profile:
        print(f"largest costs: {largest_costs(arms[ours], gpu)}")
    if "recipe" in speed:
        print(f"{ours} / recipe: {speed[ours] / speed['recipe']:.2f}")
    print(f"{ours} / ceiling: {speed[ours] * flops / ceiling:.2f}")


def main(argv=None):
    args = parse_args(argv)
    if args.count:
        print_count(args)
        return
    # on a CPU attention as train.py does it; the first step compiles, whatever was compiled before
    attention = sdpa_kernel(SDPBackend.MATH) if args.device == "cpu" else contextlib.nullcontext()
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache),
        attention,
    ):
        measure(args, args.device, pick_dtype(args.dtype, args.device))


if __name__ == "__main__":
    main()
