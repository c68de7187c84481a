"""Speed of a training step, random weights, no data and no users folder.

    python tests/bench.py --base tiny            # a laptop
    python tests/bench.py --base full            # the 3.6B prior, on a GPU
    python tests/bench.py --base full --count    # without one: a step's FLOPs and bytes, counted
    python tests/bench.py --base sdxl --count    # Stable Diffusion XL; sana too
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
from bases.sana import Sana
from bases.sdxl import StableDiffusionXL
from ppd import UserAdapter, ppd_loss
from train import micro_step
from utils import TINY, make_parser, pick_dtype, read_json

ARMS = ("ours", "eager", "recipe")
TEXT = dict(hidden_size=1280, intermediate_size=5120, projection_dim=1280, hidden_act="gelu")
TEXT |= dict(num_hidden_layers=32, num_attention_heads=20)


def stage_c(width, down, **changes):
    """A Stage C's configuration: two levels of one width, `down` blocks in each on the way down."""
    config = dict(in_channels=16, out_channels=16, timestep_ratio_embedding_dim=64, patch_size=1)
    config |= dict(clip_text_in_channels=1280, clip_text_pooled_in_channels=1280, clip_seq=4)
    config |= dict(clip_image_in_channels=768, dropout=(0.1, 0.1), switch_level=(False,))
    config |= dict(conditioning_dim=width, block_out_channels=(width, width))
    config |= dict(down_num_layers_per_block=down, up_num_layers_per_block=down[::-1])
    return config | dict(num_attention_heads=(width // 64, width // 64)) | changes


SIZES = {"full": stage_c(2048, (8, 24)), "lite": stage_c(1536, (4, 12))}
SIZES["tiny"] = read_json(TINY / "prior" / "config.json")
XL = dict(block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20))
XL |= dict(transformer_layers_per_block=(1, 2, 10), cross_attention_dim=2048)
XL |= dict(addition_embed_type="text_time", addition_time_embed_dim=256, sample_size=128)
XL |= dict(projection_class_embeddings_input_dim=2816, use_linear_projection=True)
XL |= dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"))
XL |= dict(up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
XL_TEXT = dict(hidden_size=768, intermediate_size=3072, projection_dim=768, hidden_act="quick_gelu")
XL_TEXT |= dict(num_hidden_layers=12, num_attention_heads=12)
# of latents, tokens of a caption, width of a user and of the user tokens
SHAPES = dict.fromkeys(SIZES, ((16, 24, 24), 77, 3584, 1024))
SHAPES |= {"tiny": ((16, 8, 8), 16, 192, 64), "sdxl": ((4, 128, 128), 77, 3584, 2048)}
SHAPES["sana"] = ((32, 32, 32), 300, 3584, 2240)


def parse_args(argv=None):
    parser = make_parser("bench.py", __doc__)
    add = parser.add_argument
    add("--base", choices=SHAPES, default="tiny")
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
    args.micro = args.micro or (32 if args.base == "tiny" else 8)
    return args


# ---------------------------------------------------------------- what a step works on
def make_base(size, device, dtype):
    """A base of that size on the device, frozen, of random weights: network and text encoders."""
    diffusers.utils.logging.set_verbosity_error()
    base = dict(sdxl=StableDiffusionXL, sana=Sana).get(size, StableCascade)
    base = base.__new__(base)  # no checkpoint to load
    base.device, base.dtype = torch.device(device), dtype
    base.latent_shape, base.caption_tokens, base.user_dim, base.token_dim = SHAPES[size]
    base.scheduler = make_scheduler(device)  # Stage C's
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with base.device:
        if size == "sdxl":
            base.prior = diffusers.UNet2DConditionModel.from_config(XL)
            base.text_encoders = [make_text_encoder(config) for config in (XL_TEXT, TEXT)]
            base.image_size, base.prediction_type = 1024, "epsilon"
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
            base.alphas_cumprod = (1 - betas).cumprod(0)
        elif size == "sana":
            base.prior = diffusers.SanaTransformer2DModel()
            base.text_encoder = transformers.Gemma2Model(transformers.Gemma2Config())  # 2B
            base.shift, base.max_length = 3.0, SHAPES[size][1]
        else:
            base.prior = diffusers.StableCascadeUNet.from_config(SIZES[size])
            text = read_json(TINY / "text_encoder" / "config.json") if size == "tiny" else TEXT
            base.text_encoder = make_text_encoder(text)
    torch.set_default_dtype(torch.float32)
    for model in models_of(base):
        model.to(dtype).eval().requires_grad_(False)
    return base


def make_text_encoder(config):
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config))


def models_of(base):
    return [base.prior, *(getattr(base, "text_encoders", None) or [base.text_encoder])]


def make_batch(base, micro):
    """What PreferencePairs and collate make of cached latents."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(micro, *base.latent_shape, generator=g)
    words = models_of(base)[1].config.vocab_size
    token_ids = torch.randint(2, words, (micro, base.caption_tokens), generator=g)
    is_xl = len(models_of(base)) == 3  # the second row: another tokenizer's, or a mask
    batch = dict(
        images=torch.randn(2 * micro, *base.latent_shape, generator=g).to(base.dtype),
        noise=torch.cat([noise, noise]),
        user=torch.randn(micro, base.user_dim, generator=g),
        t=torch.rand(micro, generator=g).mul(0.999).add(0.001),
        drop_draw=torch.rand(micro, generator=g),
        tokens=torch.stack([token_ids, token_ids if is_xl else torch.ones_like(token_ids)]),
    )
    if base.device.type == "cuda":
        batch = {key: value.pin_memory() for key, value in batch.items()}
    return batch


def make_adapter(base):
    adapter = UserAdapter(base.user_dim, base.channels, 4, base.token_dim)
    return adapter.install(base.attention_layers())


# --------------------------------------------------------------------------- the arms
def recipe_micro_step(base, reference, adapter, batch):
    """The usual micro-step: a second prior as the reference, everything waited for."""
    batch = {key: value.to(base.device) for key, value in batch.items()}
    t = batch["t"].repeat(2)
    x_t = base.add_noise(batch["images"], batch["noise"], t)
    conditions = [torch.cat([c, c]) for c in base.encode_tokens(batch["tokens"])]
    with adapter.user(adapter(batch["user"], batch["drop_draw"] <= 0.1)):
        pred = base.predict(x_t, t, *conditions)
        with torch.no_grad(), mock.patch.object(base, "prior", reference):
            pred_ref = base.predict(x_t, t, *conditions)
        loss = ppd_loss(pred, pred_ref, batch["noise"], 1.0)[0].mean()
        loss.backward()
    loss.item()


def make_arms(args, device, dtype):
    """{arm: a function that takes one optimizer step}, and the bytes that each arm keeps between
    steps, as a function. The arms share one prior and one adapter, so that the largest fit on one
    GPU together."""
    base = make_base(args.base, device, dtype)
    batch = make_batch(base, args.micro)
    # before the adapter is installed: it knows no user
    reference = copy.deepcopy(base.prior) if "recipe" in args.arms else None
    adapter = make_adapter(base)
    parameters = list(adapter.parameters())
    fused = {arm: arm != "recipe" and device == "cuda" for arm in args.arms}
    optimizers = {a: torch.optim.AdamW(parameters, lr=1e-5, fused=f) for a, f in fused.items()}
    base.compile_blocks()

    def step(arm):
        adapter.compiled = arm == "ours"
        switch = "enable" if arm == "recipe" or args.checkpointing else "disable"
        getattr(base.prior, f"{switch}_gradient_checkpointing")()
        with torch.compiler.set_stance("default" if arm == "ours" else "force_eager"):
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
        tensors = [p for model in models_of(base) for p in model.parameters()] + parameters
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
    adapter = make_adapter(base)
    if checkpointing:
        base.prior.enable_gradient_checkpointing()
    frozen = [p for model in models_of(base) for p in model.parameters()]
    trained = list(adapter.parameters())
    known = {p.untyped_storage()._cdata for p in frozen + trained}
    kept = {}
    plain = F.scaled_dot_product_attention

    def flash(q, k, v, attn_mask=None, **settings):
        if attn_mask is None and q.requires_grad:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        if q.requires_grad:
            mask = attn_mask.expand(*q.shape[:3], k.shape[2])
            return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True)[0]
        return plain(q, k, v, attn_mask, **settings)

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:  # the tensor too, or another would get its address
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    with (
        mock.patch.object(F, "scaled_dot_product_attention", flash if fused else plain),
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
    frozen, trained, kept = (size / 2**30 for size in sizes)
    how = ", checkpointing" if args.checkpointing else ""
    print(
        f"{args.base}, {args.micro} pairs{how}: {flops / 1e12:.4g} TFLOP a pair; "
        f"GiB: {frozen:.1f} frozen weights + {trained:.1f} adapter, gradient and AdamW + "
        f"{kept:.1f} kept for backward = {frozen + trained + kept:.1f}"
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
    n = 16384 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(seconds(partial(torch.mm, a, a), device == "cuda") for _ in range(5))


def take_turns(args, arms, kept_bytes, device, dtype):
    """{arm: seconds of its first step}, of the others, {arm: peak bytes}, the median ceiling."""
    gpu = device == "cuda"
    first = {arm: seconds(step, gpu) for arm, step in arms.items()}
    times, peak = {arm: [] for arm in arms}, dict.fromkeys(arms, 0)
    ceilings = []
    for _ in range(args.rounds):
        ceilings.append(matmul_flops(device, dtype))
        for arm, step in arms.items():
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()  # 0 on a CPU
            times[arm].append(seconds(step, gpu))
            used = torch.cuda.max_memory_allocated() - before + kept_bytes(arm)
            peak[arm] = max(peak[arm], used)
    return first, times, peak, statistics.median(ceilings)


def largest_costs(step, gpu):
    """The three operations, or kernels, that take most of a step."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with torch.profiler.profile(activities=activities) as profile:
        step()
    events = profile.key_averages()
    if gpu:  # kernels alone
        kernels = [e for e in events if e.device_type == DeviceType.CUDA]
        costs = {e.key: e.self_device_time_total for e in kernels if not e.is_user_annotation}
    else:
        costs = {e.key: e.self_cpu_time_total for e in events}
    largest = sorted(costs, key=costs.get, reverse=True)[:3]
    return "; ".join(f"{key} {100 * costs[key] / sum(costs.values()):.0f}%" for key in largest)


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
