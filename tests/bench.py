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
import copy
import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

COMMON = dict(in_channels=16, out_channels=16, timestep_ratio_embedding_dim=64, patch_size=1, clip_text_in_channels=1280, clip_text_pooled_in_channels=1280,
              clip_image_in_channels=768, clip_seq=4, dropout=(0.1, 0.1), switch_level=(False,))
SIZES = {"full": dict(conditioning_dim=2048, block_out_channels=(2048, 2048), num_attention_heads=(32, 32), down_num_layers_per_block=(8, 24), up_num_layers_per_block=(24, 8)),
         "lite": dict(conditioning_dim=1536, block_out_channels=(1536, 1536), num_attention_heads=(24, 24), down_num_layers_per_block=(4, 12), up_num_layers_per_block=(12, 4))}
TEXT = dict(hidden_size=1280, intermediate_size=5120, projection_dim=1280, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu")


def arguments(argv=None):
    p = argparse.ArgumentParser(prog="bench.py", usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", choices=("tiny", "lite", "full"), default="tiny")
    p.add_argument("--micro", type=int, help="pairs a micro-step (default: tiny 32, else 8)")
    p.add_argument("--accumulate", type=int, default=2, help="micro-steps a step (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=7, help="steps of each arm (default: %(default)s)")
    p.add_argument("--arms", nargs="+", choices=("ours", "eager", "recipe"), default=["ours", "eager", "recipe"])
    p.add_argument("--count", action="store_true", help="run nothing: count a micro-step's arithmetic and what it keeps for backward, on the meta device")
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

    from ppd import StableCascade
    diffusers.utils.logging.set_verbosity_error()
    base = StableCascade.__new__(StableCascade)  # no checkpoint to load
    base.device, base.dtype, base.scheduler = torch.device(device), dtype, diffusers.DDPMWuerstchenScheduler()
    read = lambda part: json.loads((ROOT / "assets/tiny" / part / "config.json").read_text())
    prior, text = (read("prior"), read("text_encoder")) if size == "tiny" else (COMMON | SIZES[size], TEXT)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        base.prior = diffusers.StableCascadeUNet.from_config(prior)
        base.text_encoder = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**text))
    torch.set_default_dtype(torch.float32)
    for model in (base.prior, base.text_encoder):
        model.to(dtype).eval().requires_grad_(False)
    return base


def make_batch(base, micro):
    """What Pairs and collate make of cached latents."""
    full, g = base.prior.config.block_out_channels[0] > 512, torch.Generator().manual_seed(0)
    side, length, draw = (24, 77, partial(torch.randn, generator=g)) if full else (8, 16, partial(torch.randn, generator=g))
    noise = draw(micro, 16, side, side)
    tokens = torch.stack([torch.randint(2, base.text_encoder.config.vocab_size, (micro, length), generator=g), torch.ones(micro, length, dtype=torch.long)])
    batch = dict(pictures=draw(2 * micro, 16, side, side).to(base.dtype), noise=torch.cat([noise, noise]), user=draw(micro, 3584 if full else 192),
                 t=torch.rand(micro, generator=g).mul(0.999).add(0.001), u_drop=torch.rand(micro, generator=g), tokens=tokens)
    return {key: value.pin_memory() if base.device.type == "cuda" else value for key, value in batch.items()}


def make_arm(name, args, device, dtype):
    """A function that takes one optimizer step."""
    from ppd import UserAdapter, compile_blocks, ppd_loss
    from train import forward
    base = make_base(args.base, device, dtype)
    batch = make_batch(base, args.micro)
    adapter = UserAdapter(batch["user"].shape[1], base.channels, 4, 64 if args.base == "tiny" else 1024)
    reference = copy.deepcopy(base.prior) if name == "recipe" else None
    parameters = list(adapter.install(base.prior).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=name != "recipe" and device == "cuda")
    if name == "recipe" or args.checkpointing:
        base.prior.enable_gradient_checkpointing()
    if name == "ours":
        compile_blocks(base.prior)

    def ours():
        forward(base, adapter, batch, "ppd", 1.0, 0.1, backward=lambda losses: (losses.sum() / args.micro).backward())

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

    def step():
        for _ in range(args.accumulate):
            recipe() if name == "recipe" else ours()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm.item()
    return step


def count(args):
    """FLOPs a pair and GiB that a micro-step of ours holds at least, eager, in bfloat16, attention as the fused kernels do it."""
    import torch.nn.functional as F

    from ppd import UserAdapter
    from train import forward
    plain = F.scaled_dot_product_attention
    fused = lambda q, k, v, attn_mask=None, **how: (torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0] if attn_mask is None and q.requires_grad
                                                    else plain(q, k, v, attn_mask, **how))
    base = make_base(args.base, "meta", torch.bfloat16)
    batch = make_batch(base, args.micro)
    adapter = UserAdapter(batch["user"].shape[1], base.channels, 4, 64 if args.base == "tiny" else 1024).install(base.prior)
    if args.checkpointing:
        base.prior.enable_gradient_checkpointing()
    weights = [*base.prior.parameters(), *base.text_encoder.parameters(), *adapter.parameters()]
    known, kept = {p.untyped_storage()._cdata for p in weights}, {}

    def keep(tensor):
        if (storage := tensor.untyped_storage())._cdata not in known:
            kept[storage._cdata] = storage.nbytes(), tensor  # the tensor too, or another would get its address
        return tensor
    F.scaled_dot_product_attention = fused
    try:
        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward(base, adapter, batch, "ppd", 1.0, 0.1, backward=lambda losses: losses.sum().backward())
    finally:
        F.scaled_dot_product_attention = plain
    gib, trained = (lambda bytes: bytes / 2**30), sum(p.numel() for p in adapter.parameters())
    frozen, activations = 2 * sum(p.numel() for p in weights) - 2 * trained, sum(size for size, _ in kept.values())
    print(f"{args.base}, {args.micro} pairs{', checkpointing' if args.checkpointing else ''}: {counter.get_total_flops() / args.micro / 1e12:.4g} TFLOP a pair; GiB: "
          f"{gib(frozen):.1f} frozen weights + {gib(16 * trained):.1f} adapter, gradient and AdamW + {gib(activations):.1f} kept for backward = {gib(frozen + 16 * trained + activations):.1f}")


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
    args = arguments(argv)
    if args.count:
        return count(args)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = (torch.float32 if device == "cpu" else torch.bfloat16) if args.dtype == "auto" else getattr(torch, args.dtype)
    with sdpa_kernel(SDPBackend.MATH) if device == "cpu" else sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]):
        return measure(args, device, dtype)


def measure(args, device, dtype):
    """Let the arms take turns; print a table and the two ratios; return {arm: pairs/s}, the share of the ceiling."""
    gpu = device == "cuda"
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.base}: {name}, {str(dtype)[6:]}, {args.micro} pairs a micro-step, {args.accumulate} a step, torch {torch.__version__}", flush=True)
    held = lambda: torch.cuda.memory_allocated() if gpu else 0
    arms, weights, first, peak, times, ceilings = {}, {}, {}, {}, {arm: [] for arm in args.arms}, []
    for arm in args.arms:
        before = held()
        arms[arm] = make_arm(arm, args, device, dtype)
        weights[arm], began = held() - before, clock(gpu)
        arms[arm]()
        first[arm] = clock(gpu) - began
    with FlopCounterMode(display=False) as counter:
        make_arm("eager", argparse.Namespace(**vars(args) | dict(checkpointing=False, accumulate=1)), device, dtype)()
    flops = counter.get_total_flops() / args.micro  # a pair's
    for _ in range(args.rounds):
        ceilings.append(matmul_flops(device, dtype))
        for arm, step in arms.items():
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            before, began = held(), clock(gpu)
            step()
            times[arm].append(clock(gpu) - began)
            peak[arm] = max(peak.get(arm, 0), torch.cuda.max_memory_allocated() - before + weights[arm]) if gpu else 0
    ceiling, speed = statistics.median(ceilings), {arm: args.micro * args.accumulate / statistics.median(t) for arm, t in times.items()}
    print(f"{flops / 1e12:.4g} TFLOP a pair; matmul ceiling {ceiling / 1e12:.4g} TFLOP/s; medians of {args.rounds} steps, smallest to largest in brackets")
    print("| arm | pairs/s | TFLOP/s | of the ceiling | first step, s | peak memory, GiB |\n|---|---|---|---|---|---|")
    for arm, t in times.items():
        span = f"{args.micro * args.accumulate / max(t):.3g} to {args.micro * args.accumulate / min(t):.3g}"
        print(f"| {arm} | {speed[arm]:.3g} ({span}) | {speed[arm] * flops / 1e12:.3g} | {speed[arm] * flops / ceiling:.2f} | {first[arm]:.1f} | {f'{peak[arm] / 2**30:.1f}' if gpu else '-'} |")
    ours = args.arms[0]
    if args.profile:
        activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * gpu
        with torch.profiler.profile(activities=activities) as profile:
            arms[ours]()
        key = "self_device_time_total" if gpu else "self_cpu_time_total"
        costs = sorted(profile.key_averages(), key=lambda e: -getattr(e, key))
        print("largest costs: " + "; ".join(f"{e.key} {100 * getattr(e, key) / sum(getattr(e, key) for e in costs):.0f}%" for e in costs[:3]))
    if "recipe" in speed:
        print(f"{ours} / recipe: {speed[ours] / speed['recipe']:.2f}")
    print(f"{ours} / ceiling: {speed[ours] * flops / ceiling:.2f}")
    return speed, speed[ours] * flops / ceiling


if __name__ == "__main__":
    main()
