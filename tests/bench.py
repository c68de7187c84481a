"""Speed of a training step, random weights, no data and no users folder.

    python tests/bench.py --base tiny          # a laptop
    python tests/bench.py --base full          # the 3.6B prior, on a GPU
    python tests/bench.py --base full --count  # without one: a step's FLOPs and bytes, counted
    python tests/bench.py --base full --profile          # where the time goes

Three arms take turns, round by round: `ours` (train.py's own step with --compile), `eager` (the same, not compiled), and `recipe`, what one
gets from the field's training scripts: a second frozen copy of the prior as the reference, eager, full activation checkpointing, unfused AdamW,
and the loss fetched from the device at every micro-step. (Memory format makes no arm: Stage C permutes to channels-last before its first norm and
stays there, whatever its weights' format.) Batches are of cached latents; text is encoded in the step. A matmul in between measures the ceiling.
FLOPs are counted by PyTorch for the arithmetic that the loss needs (no recomputation), and ratios are of medians.
"""

import argparse
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

import torch
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

COMMON = dict(
    in_channels=16,
    out_channels=16,
    timestep_ratio_embedding_dim=64,
    patch_size=1,
    clip_text_in_channels=1280,
    clip_text_pooled_in_channels=1280,
    clip_image_in_channels=768,
    clip_seq=4,
    dropout=(0.1, 0.1),
    switch_level=(False,),
)
SIZES = {
    "full": dict(
        conditioning_dim=2048,
        block_out_channels=(2048, 2048),
        num_attention_heads=(32, 32),
        down_num_layers_per_block=(8, 24),
        up_num_layers_per_block=(24, 8),
    ),
    "lite": dict(
        conditioning_dim=1536,
        block_out_channels=(1536, 1536),
        num_attention_heads=(24, 24),
        down_num_layers_per_block=(4, 12),
        up_num_layers_per_block=(12, 4),
    ),
}
TEXT = dict(
    hidden_size=1280,
    intermediate_size=5120,
    projection_dim=1280,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
)


def arguments(argv=None):
    p = argparse.ArgumentParser(
        prog="bench.py",
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--base", choices=("tiny", "lite", "full"), default="tiny")
    p.add_argument("--micro", type=int, help="pairs a micro-step (default: tiny 32, else 8)")
    p.add_argument(
        "--accumulate", type=int, default=2, help="micro-steps a step (default: %(default)s)"
    )
    p.add_argument("--rounds", type=int, default=7, help="steps of each arm (default: %(default)s)")
    p.add_argument(
        "--arms",
        nargs="+",
        choices=("ours", "eager", "recipe"),
        default=["ours", "eager", "recipe"],
    )
    p.add_argument(
        "--count",
        action="store_true",
        help="run nothing: count a micro-step's arithmetic and what it keeps for backward, on the meta device",
    )
    p.add_argument("--profile", action="store_true", help="the first arm's three largest costs too")
    p.add_argument("--checkpointing", action="store_true", help="in ours and eager too")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    args = p.parse_args(argv)
    args.micro = args.micro or (32 if args.base == "tiny" else 8)
    return args


def make_base(size, device, dtype):
    """A StableCascade of that size with random weights: Stage C and text encoder, frozen, made on the device."""
    import diffusers
    import transformers

    from ppd import StableCascade, make_scheduler

    diffusers.utils.logging.set_verbosity_error()
    base = StableCascade.__new__(StableCascade)  # no checkpoint to load
    base.device, base.dtype, base.scheduler = torch.device(device), dtype, make_scheduler(device)
    read = lambda part: json.loads((ROOT / "assets/tiny" / part / "config.json").read_text())
    prior, text = (
        (read("prior"), read("text_encoder")) if size == "tiny" else (COMMON | SIZES[size], TEXT)
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        base.prior = diffusers.StableCascadeUNet.from_config(prior)
        base.text_encoder = transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(**text)
        )
    torch.set_default_dtype(torch.float32)
    for model in (base.prior, base.text_encoder):
        model.to(dtype).eval().requires_grad_(False)
    return base


def make_batch(base, micro):
    """What Pairs and collate make of cached latents."""
    full, g = base.prior.config.block_out_channels[0] > 512, torch.Generator().manual_seed(0)
    (side, length), draw = (24, 77) if full else (8, 16), partial(torch.randn, generator=g)
    noise = draw(micro, 16, side, side)
    tokens = torch.stack(
        [
            torch.randint(2, base.text_encoder.config.vocab_size, (micro, length), generator=g),
            torch.ones(micro, length, dtype=torch.long),
        ]
    )
    batch = dict(
        pictures=draw(2 * micro, 16, side, side).to(base.dtype),
        noise=torch.cat([noise, noise]),
        user=draw(micro, 3584 if full else 192),
        t=torch.rand(micro, generator=g).mul(0.999).add(0.001),
        u_drop=torch.rand(micro, generator=g),
        tokens=tokens,
    )
    return {
        key: value.pin_memory() if base.device.type == "cuda" else value
        for key, value in batch.items()
    }


def make_adapter(base, batch):
    from ppd import UserAdapter

    full = base.prior.config.block_out_channels[0] > 512
    return UserAdapter(batch["user"].shape[1], base.channels, 4, 1024 if full else 64).install(
        base.prior
    )


def make_arms(args, device, dtype):
    """{arm: a function that takes one optimizer step}, and the bytes that each arm keeps between steps, as a function. The arms share one
    prior and one adapter, so that the largest fit on one GPU together."""
    from ppd import ppd_loss
    from train import forward

    base = make_base(args.base, device, dtype)
    batch = make_batch(base, args.micro)
    reference = (
        copy.deepcopy(base.prior) if "recipe" in args.arms else None
    )  # before the adapter is installed: it knows no user
    adapter = make_adapter(base, batch)
    parameters = list(adapter.parameters())
    optimizers = {
        arm: torch.optim.AdamW(parameters, lr=1e-5, fused=arm != "recipe" and device == "cuda")
        for arm in args.arms
    }
    base.compile_blocks()
    compiled = {
        block: block._compiled_call_impl
        for block in base.prior.modules()
        if block._compiled_call_impl
    }

    def ours():
        forward(
            base,
            adapter,
            batch,
            "ppd",
            1.0,
            0.1,
            backward=lambda losses: (losses.sum() / args.micro).backward(),
        )

    def recipe():
        there = {key: value.to(device) for key, value in batch.items()}
        t, policy = there["t"].repeat(2), base.prior
        x_t = base.add_noise(there["pictures"], there["noise"], t)
        text, pooled = (c.repeat(2, 1, 1) for c in base.encode_tokens(there["tokens"]))
        with adapter.user(adapter(there["user"], there["u_drop"] < 0.1)):
            noise_pred = base.predict_noise(x_t, t, text, pooled)
            base.prior = reference
            with torch.no_grad():
                noise_ref = base.predict_noise(x_t, t, text, pooled)
            base.prior = policy
            loss = ppd_loss(noise_pred, noise_ref, there["noise"], 1.0)[0].mean()
            loss.backward()
        loss.item()

    def step(arm):
        (
            base.prior.enable_gradient_checkpointing
            if arm == "recipe" or args.checkpointing
            else base.prior.disable_gradient_checkpointing
        )()
        for block, call in compiled.items():
            block._compiled_call_impl = call if arm == "ours" else None  # what block.compile() sets
        base.compiled = arm == "ours"
        for _ in range(args.accumulate):
            recipe() if arm == "recipe" else ours()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizers[arm].step()
        optimizers[arm].zero_grad(set_to_none=True)
        return norm.item()

    def keeps(arm):
        state = [value for values in optimizers[arm].state.values() for value in values.values()]
        mine = [
            *base.prior.parameters(),
            *base.text_encoder.parameters(),
            *parameters,
            *state,
            *(reference.parameters() if arm == "recipe" else ()),
        ]
        return sum(t.numel() * t.element_size() for t in mine)

    return {arm: partial(step, arm) for arm in args.arms}, keeps


def count(args, fused):
    """Nothing is run: FLOPs a pair of a step of ours, the bytes of its frozen weights, of adapter, gradient and AdamW, and of what is kept for
    backward, eager, in bfloat16. fused: attention as the fused kernels do it, which keep less and compute more, or by plain matrix products."""
    import torch.nn.functional as F

    from train import forward

    plain = F.scaled_dot_product_attention
    flash = lambda q, k, v, attn_mask=None, **how: (
        torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        if attn_mask is None and q.requires_grad
        else plain(q, k, v, attn_mask, **how)
    )
    base = make_base(args.base, "meta", torch.bfloat16)
    batch = make_batch(base, args.micro)
    adapter = make_adapter(base, batch)
    if args.checkpointing:
        base.prior.enable_gradient_checkpointing()
    frozen, trained = (
        [*base.prior.parameters(), *base.text_encoder.parameters()],
        list(adapter.parameters()),
    )
    known, kept = {p.untyped_storage()._cdata for p in frozen + trained}, {}

    def keep(tensor):
        if (storage := tensor.untyped_storage())._cdata not in known:
            kept[storage._cdata] = (
                storage.nbytes(),
                tensor,
            )  # the tensor too, or another would get its address
        return tensor

    F.scaled_dot_product_attention = flash if fused else plain
    try:
        with (
            FlopCounterMode(display=False) as counter,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            forward(
                base,
                adapter,
                batch,
                "ppd",
                1.0,
                0.1,
                backward=lambda losses: losses.sum().backward(),
            )
    finally:
        F.scaled_dot_product_attention = plain
    return (
        counter.get_total_flops() / args.micro,
        2 * sum(p.numel() for p in frozen),
        16 * sum(p.numel() for p in trained),
        sum(size for size, _ in kept.values()),
    )


def matmul_flops(device, dtype):
    """FLOP/s of a large matrix product, the best of a few: what the hardware gives at most."""
    n = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = 0
    for _ in range(5):
        began, repeat = clock(device == "cuda"), 10 if device == "cuda" else 2
        for _ in range(repeat):
            a @ b
        best = max(best, repeat * 2 * n**3 / (clock(device == "cuda") - began))
    return best


def clock(gpu):
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def main(argv=None):
    from ppd import pick_dtype

    args = arguments(argv)
    if args.count:
        flops, *sizes = count(args, fused=True)
        frozen, trained, kept, total = (size / 2**30 for size in (*sizes, sum(sizes)))
        print(
            f"{args.base}, {args.micro} pairs{', checkpointing' if args.checkpointing else ''}: {flops / 1e12:.4g} TFLOP a pair; GiB: {frozen:.1f} frozen weights + "
            f"{trained:.1f} adapter, gradient and AdamW + {kept:.1f} kept for backward = {total:.1f}"
        )
        return
    if "ours" in args.arms:
        cache = (
            tempfile.TemporaryDirectory()
        )  # the first step compiles, whatever was compiled before
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name
    device = (
        args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )
    dtype = pick_dtype(args.dtype, device)
    with (
        sdpa_kernel(SDPBackend.MATH) if device == "cpu" else contextlib.nullcontext()
    ):  # as train.py does
        measure(args, device, dtype)


def measure(args, device, dtype):
    """Let the arms take turns; print a table and the two ratios."""
    gpu = device == "cuda"
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{args.base}: {name}, {str(dtype)[6:]}, {args.micro} pairs a micro-step, {args.accumulate} a step, torch {torch.__version__}",
        flush=True,
    )
    flops, *_ = count(
        argparse.Namespace(**vars(args) | dict(checkpointing=False)), fused=False
    )  # what the loss needs, nothing computed twice
    arms, keeps = make_arms(args, device, dtype)
    first, peak, times, ceilings = {}, dict.fromkeys(arms, 0), {arm: [] for arm in arms}, []
    for arm, step in arms.items():
        began = clock(gpu)
        step()
        first[arm] = clock(gpu) - began
    for _ in range(args.rounds):
        ceilings.append(matmul_flops(device, dtype))
        for arm, step in arms.items():
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            before, began = torch.cuda.memory_allocated() if gpu else 0, clock(gpu)
            step()
            times[arm].append(clock(gpu) - began)
            if gpu:
                peak[arm] = max(peak[arm], torch.cuda.max_memory_allocated() - before + keeps(arm))
    ceiling, speed = (
        statistics.median(ceilings),
        {arm: args.micro * args.accumulate / statistics.median(t) for arm, t in times.items()},
    )
    print(
        f"{flops / 1e12:.4g} TFLOP a pair; matmul ceiling {ceiling / 1e12:.4g} TFLOP/s; medians of {args.rounds} steps, smallest to largest in brackets"
    )
    print(
        "| arm | pairs/s | TFLOP/s | of the ceiling | first step, s | peak memory, GiB |\n|---|---|---|---|---|---|"
    )
    for arm, t in times.items():
        span = f"{args.micro * args.accumulate / max(t):.3g} to {args.micro * args.accumulate / min(t):.3g}"
        print(
            f"| {arm} | {speed[arm]:.3g} ({span}) | {speed[arm] * flops / 1e12:.3g} | {speed[arm] * flops / ceiling:.2f} | {first[arm]:.1f} | {f'{peak[arm] / 2**30:.1f}' if gpu else '-'} |"
        )
    ours = args.arms[0]
    if args.profile:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU]
            + [torch.profiler.ProfilerActivity.CUDA] * gpu
        ) as profile:
            arms[ours]()
        events = [
            e
            for e in profile.key_averages()
            if not gpu or e.device_type == DeviceType.CUDA and not e.is_user_annotation
        ]  # kernels alone
        costs = {e.key: e.self_device_time_total if gpu else e.self_cpu_time_total for e in events}
        print(
            "largest costs: "
            + "; ".join(
                f"{key} {100 * costs[key] / sum(costs.values()):.0f}%"
                for key in sorted(costs, key=costs.get)[:-4:-1]
            )
        )
    if "recipe" in speed:
        print(f"{ours} / recipe: {speed[ours] / speed['recipe']:.2f}")
    print(f"{ours} / ceiling: {speed[ours] * flops / ceiling:.2f}")


if __name__ == "__main__":
    main()
