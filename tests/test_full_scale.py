"""The full-scale path without its checkpoints: small ones from scratch in the hub's own layout,
file names and key names, put where a download would put them, and read by the real loaders under
their real ids; full sizes on the meta device."""

import base64
import contextlib
import io
import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import bench
import evaluate
import rewards
import tiny.train
from bases import clip, llava, load_base
from bases.cascade import CascadeCodec, attention_layers
from bases.images import fit_pixels
from conftest import call, evaluation, script
from data import image_ids, load_user, read_pairs
from ppd import UserAdapter
from tiny.world import ARROW_TYPES, CAPTIONS, draw_random
from train import micro_step
from utils import TINY, is_hub_id

PRIOR = "stabilityai/stable-cascade-prior"
STAGES = "stabilityai/stable-cascade"
VLM = "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"
DATA = "someone/pick-a-pic-v2"
REWARDS = ("clip", "aesthetic", "hps")
RED_STAR = "a red star"
BLUE_CIRCLE = "a blue circle"
TEXT = dict(clip_text_in_channels=32, clip_text_pooled_in_channels=32, clip_image_in_channels=24)


# ------------------------------------------------------- small checkpoints, hub layout
def snapshot(cache, repository, kind="models"):
    return cache / f"{kind}--{repository.replace('/', '--')}" / "snapshots" / ("0" * 40)


def put(cache, repository, kind="models"):
    """The folder where huggingface_hub keeps a downloaded repository."""
    folder = snapshot(cache, repository, kind)
    folder.mkdir(parents=True)
    refs = folder.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    return folder


def small_tokenizer():
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)


def small_prior(width):
    from diffusers import StableCascadeUNet

    torch.manual_seed(0)
    return StableCascadeUNet(**bench.stage_c(width, (1, 1), **TEXT))


def small_stage_b():
    from diffusers import StableCascadeUNet

    res_and_time = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
    kinds = (res_and_time, (*res_and_time, "SDCascadeAttnBlock"))
    sizes = dict(in_channels=4, out_channels=4, timestep_ratio_embedding_dim=16, patch_size=2)
    sizes |= dict(conditioning_dim=32, block_out_channels=(16, 32), num_attention_heads=(-1, 2))
    sizes |= dict(down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1))
    sizes |= dict(down_blocks_repeat_mappers=(1, 1), up_blocks_repeat_mappers=(1, 1))
    sizes |= dict(clip_text_pooled_in_channels=32, clip_seq=4, effnet_in_channels=16)
    how = dict(dropout=(0.0, 0.0), self_attn=True, timestep_conditioning_type=("sca",))
    return StableCascadeUNet(
        **sizes, **how, block_types_per_layer=kinds, pixel_mapper_in_channels=3
    )


def small_effnet():
    from torchvision.models import efficientnet_v2_s

    features = efficientnet_v2_s(weights=None).features.state_dict()
    state = {f"backbone.{key}": value for key, value in features.items()}
    return state | {
        "mapper.0.weight": torch.randn(16, 1280, 1, 1) * 0.1,
        "mapper.1.running_mean": torch.randn(16) * 0.01,
        "mapper.1.running_var": torch.rand(16) + 0.01,
        "mapper.1.num_batches_tracked": torch.tensor(1),
    }


CLIP_TEXT = dict(hidden_size=32, intermediate_size=128, num_attention_heads=4, num_hidden_layers=2)
CLIP_TEXT |= dict(vocab_size=514, max_position_embeddings=77, hidden_act="gelu", projection_dim=24)
CLIP_TEXT |= dict(bos_token_id=512, eos_token_id=513, pad_token_id=513)
CLIP_VISION = dict(hidden_size=40, intermediate_size=160, num_attention_heads=2)
CLIP_VISION |= dict(num_hidden_layers=3, patch_size=14, image_size=56)
CLIP_VISION |= dict(hidden_act="gelu", projection_dim=24)


def small_clip(seed):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    config = CLIPConfig(text_config=CLIP_TEXT, vision_config=CLIP_VISION, projection_dim=24)
    return CLIPModel(config).eval()


def to_open_clip(model):
    """CLIPModel's weights under open_clip's names, written down independently of
    clip.from_open_clip."""
    state = model.state_dict()
    names = {
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    towers = (("text_model", "transformer", 2), ("vision_model", "visual.transformer", 3))
    norms = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
    }
    out = {}
    for kind in ("weight", "bias"):
        for ours, theirs, layers in towers:
            for i in range(layers):
                a = f"{ours}.encoder.layers.{i}"
                b = f"{theirs}.resblocks.{i}"
                qkv = [state[f"{a}.self_attn.{n}_proj.{kind}"] for n in "qkv"]
                out[f"{b}.attn.in_proj_{kind}"] = torch.cat(qkv)
                out |= {f"{b}.{y}.{kind}": state[f"{a}.{x}.{kind}"] for x, y in names.items()}
        out |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for theirs, ours in norms.items()}
    embeddings = {name: f"{name}_model.embeddings" for name in ("text", "vision")}
    return out | {
        "token_embedding.weight": state[f"{embeddings['text']}.token_embedding.weight"],
        "positional_embedding": state[f"{embeddings['text']}.position_embedding.weight"],
        "visual.class_embedding": state[f"{embeddings['vision']}.class_embedding"],
        "visual.positional_embedding": state[f"{embeddings['vision']}.position_embedding.weight"],
        "visual.conv1.weight": state[f"{embeddings['vision']}.patch_embedding.weight"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "visual.proj": state["visual_projection.weight"].T.contiguous(),
        "logit_scale": state["logit_scale"],
    }


def pickapic_table(captions, users, jpg_0, jpg_1, label_0, label_1):
    """Pick-a-Pic v2's 19 columns."""
    n = len(captions)
    columns = dict(caption=captions, user_id=users, jpg_0=jpg_0, jpg_1=jpg_1)
    columns |= dict(label_0=label_0, label_1=label_1)
    columns |= dict.fromkeys(("are_different", "has_label"), [True] * n)
    columns |= dict.fromkeys(("created_at", "ranking_id", "__index_level_0__"), range(n))
    columns["num_example_per_prompt"] = [1] * n
    for key, end in dict(image_0_uid="a", image_1_uid="b", best_image_uid="a").items():
        columns[key] = [f"{i}-{end}" for i in range(n)]
    empty = [""] * n
    kinds = ARROW_TYPES.items()
    return pa.table({name: pa.array(columns.get(name, empty), kind) for name, kind in kinds})


def write_pickapic(folder, users=24, pairs=14):
    """A small Pick-a-Pic v2 with images of every kind, some of them broken."""
    rng = np.random.default_rng(3)
    modes = "JPEG RGB, PNG RGB, PNG P, PNG RGBA, JPEG CMYK, JPEG L, WEBP RGB"
    kinds = [kind.split() for kind in modes.split(", ")]
    captions, user_ids, jpgs, labels = [], [], ([], []), []
    for user in range(users):
        for _ in range(pairs if user else 3):  # the first user has too few
            i = len(captions)
            caption = CAPTIONS[rng.integers(len(CAPTIONS))]
            for side in range(2):
                form, mode = kinds[(2 * i + side) % len(kinds)]
                image = draw_random(rng, caption).resize((80, 64)).convert(mode)
                exif = Image.Exif()
                exif[0x0112] = 6  # rotated by a quarter
                turned = dict(exif=exif) if form == "JPEG" and not i % 3 else {}
                buffer = io.BytesIO()
                image.save(buffer, form, **turned)
                jpgs[side].append(buffer.getvalue())
            if i % 17 == 5:
                jpgs[1][-1] = jpgs[1][-1][:40]
            captions.append(caption)
            user_ids.append(1000 + user)
            labels.append(float(rng.choice([0, 1, 1, 0, 0.5])))
    table = pickapic_table(captions, user_ids, *jpgs, labels, [1 - label for label in labels])
    (folder / "data").mkdir()
    for i, part in enumerate((table.slice(0, 170), table.slice(170))):
        path = folder / "data" / f"train-{i:05d}-of-00002.parquet"
        pq.write_table(part, path, row_group_size=30)


def put_bases(cache, tokenizer, width=128):
    """Stage C in two sizes, its text encoder, Stages A and B, and the image encoder."""
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    assert len(tokenizer) == CLIP_TEXT["vocab_size"]
    prior = put(cache, PRIOR)
    stages = put(cache, STAGES)
    torch.manual_seed(0)
    text = CLIPTextConfig(**CLIP_TEXT | dict(projection_dim=32, intermediate_size=64))
    text = CLIPTextModelWithProjection(text)
    models = {prior / "prior": small_prior(width), prior / "prior_lite": small_prior(64)}
    models |= {prior / "text_encoder": text, stages / "decoder": small_stage_b()}
    for folder, model in models.items():
        model.to(torch.bfloat16).save_pretrained(folder, variant="bf16")
    tokenizer.save_pretrained(prior / "tokenizer")
    vqgan = PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2, levels=2, embed_dim=16)
    vqgan.save_pretrained(stages / "vqgan")
    save_file(small_effnet(), stages / "effnet_encoder.safetensors")


def put_rewards(cache, torch_hub, tokenizer):
    """The rewards' CLIPs, HPS under open_clip's names, and LAION's head."""
    from transformers import CLIPImageProcessor, CLIPProcessor

    crop = {"height": 56, "width": 56}
    image_processor = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=crop)
    processor = CLIPProcessor(image_processor, tokenizer)
    for seed, name in enumerate(("clip", "aesthetic", "pickscore")):
        folder = put(cache, clip.REWARDS[name][1])
        small_clip(seed).save_pretrained(folder)
        processor.save_pretrained(folder)
    folder = put(cache, "xswu/HPSv2")
    for seed, name in ((5, "hps"), (6, "hps2.0")):
        content = dict(epoch=1, state_dict=to_open_clip(small_clip(seed)))
        torch.save(content, folder / clip.REWARDS[name][2])
    torch.manual_seed(4)
    (torch_hub / "checkpoints").mkdir(parents=True)
    head = {}
    widths = ((24, 20), (20, 12), (12, 8), (8, 4), (4, 1))
    for i, (a, b) in zip((0, 2, 4, 6, 7), widths, strict=True):
        head |= {f"layers.{i}.weight": torch.randn(b, a), f"layers.{i}.bias": torch.randn(b)}
    torch.save(head, torch_hub / "checkpoints" / clip.AESTHETIC)


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A hub cache with everything the README's full-scale commands name; returns it, and the
    environment that points to it."""
    root = tmp_path_factory.mktemp("hub")
    cache = root / "cache"
    tokenizer = small_tokenizer()
    put_bases(cache, tokenizer)
    model, processor = tiny.train.make_vlm(width=48, layers=2)
    folder = put(cache, VLM)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    put_rewards(cache, root / "torch" / "hub", tokenizer)
    write_pickapic(put(cache, DATA, "datasets"))
    parti = [
        ("Prompt", "Category", "Challenge", "Note"),
        ('"a red star" on a wall', "World", "Basic", ""),
        (BLUE_CIRCLE, "Abstract", "Basic", '6" wide'),
    ]
    text = "".join("\t".join(row) + "\n" for row in parti)
    (put(cache, "nateraw/parti-prompts", "datasets") / "PartiPrompts.tsv").write_text(text)
    return cache, dict(HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1", TORCH_HOME=str(root / "torch"))


@pytest.fixture(scope="session")
def base(hub):
    prior, stages = (str(snapshot(hub[0], name)) for name in (PRIOR, STAGES))
    base = load_base(prior, decoder=stages, grid=3)
    for module in base.prior.modules():
        vars(module).pop("forward", None)  # the norm that a CPU's base has its own of
    return base


# ------------------------------------------------------------ the whole way, offline
@pytest.fixture(scope="session")
def full_run(hub, tmp_path_factory):
    """The README's full-scale commands on those checkpoints: (folder, outputs by script)."""
    out = tmp_path_factory.mktemp("full")
    said = {}

    def run(name, command, *flags):
        done = script(*command.split(), *flags, **hub[1], OMP_NUM_THREADS="1")
        said[name] = done.stdout + done.stderr

    few = "--max-steps 2 --batch 4 --micro 2 --grid 3 --preview-every 2 --lr 1e-3"
    training = f"train.py --base {PRIOR} --device cpu {few}"
    parti = "--prompts nateraw/parti-prompts --steps 2"
    reading = f"embed.py --data {DATA}"
    shares = "--unseen-users 0.25 --test-captions 0.25 --validation-captions 0.1"

    def read_users():
        run("embed", f"{reading} --vlm {VLM} --batch 3 {shares} --users", out / "users")
        run("train run", training, "--users", out / "users", "--out", out / "run")
        user = sorted((out / "users").glob("*.pt"))[0]
        flags = ["--user", user, "--adapter", out / "run", "--out", out / "images"]
        run("sample", f"sample.py --user zero {parti}", *flags)
        run("choices", "evaluate.py choices --n 6 --batch 16 --adapter", out / "run")
        run("judge", "evaluate.py judge --steps 2 --batch 4 --n 2 --adapter", out / "run")

    def synthetic_users():
        run("rewards", f"{reading} --one-hot {' '.join(REWARDS)} --users", out / "onehot")
        run("train one-hot", training, "--users", out / "onehot", "--out", out / "run_onehot")
        run("evaluate", f"evaluate.py rewards {parti} --batch 4 --adapter", out / "run_onehot")

    with ThreadPoolExecutor(2) as pool:  # a core each
        for chain in [pool.submit(read_users), pool.submit(synthetic_users)]:
            chain.result()
    return out, said


def test_the_whole_way(full_run):
    out, said = full_run
    users = [load_user(path) for path in sorted((out / "users").glob("*.pt"))]
    assert len(users) > 8
    assert all(user["embedding"].shape[1:] == (1, 48) and user["vlm"] == VLM for user in users)
    patterns = [r"[1-9]\d* have fewer than 4 choices", r"dropped: tie or no choice +\d+"]
    patterns += [r"(?m)^train +\d+ +\d+ +\d+$"]
    patterns += [r"a group of 4 is left out: data/train-\d+-of-00002.parquet row \d+ jpg_1"]
    for pattern in patterns:
        assert re.search(pattern, said["embed"]), pattern
    assert "HPS v2.1" in said["rewards"] and "left out: " in said["rewards"]
    assert re.search(r"[1-9]\d* with a broken image", said["rewards"])
    for run, width in (("run", 48), ("run_onehot", 3)):
        adapter = UserAdapter.load(out / run)
        first = json.loads((out / run / "train.jsonl").read_text().splitlines()[0])
        assert adapter.header["base"] == PRIOR and adapter.user_dim == width
        assert len(adapter.channels) == 4
        assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
        assert (out / run / "previews" / "step-000002.png").exists()
    images = [p for p in (out / "images").glob("*.png") if p.name != "grid.png"]
    assert len(images) == 4 and Image.open(images[0]).size == (256, 256)
    texts = " ".join(Image.open(path).text["ppd"] for path in images)
    assert '"prompt": "\\"a red star\\" on a wall"' in texts
    result = evaluation(out / "run_onehot", "rewards")
    assert result["models"] == {name: clip.REWARDS[name][0] for name in REWARDS}
    assert all(v["base"]["n"] == 2 for v in result["figure_3"].values())
    assert "fidelity" not in result["table_1"]["PPD"]
    choices, judged = (evaluation(out / "run", command) for command in ("choices", "judge"))
    for r in [r for kind, r in choices.items() if kind in evaluate.KINDS]:
        assert 2 <= r["own"]["n"] <= 6 and not {"true_taste", "perfect_reader"} & r.keys()
    assert judged["judge"] == VLM
    r = judged["people"]["all"]
    assert all(r[kind] + r["n"] <= 6 for kind in ("inconsistent", "unparsable"))
    # of real users no tastes are known
    assert judged["people"].keys() == {"seen", "new_user", "all"}


def test_scores_are_kept_and_used(full_run, hub):
    folder = full_run[0] / "onehot"
    files = sorted((folder / "scores").glob("*.npz"))
    pairs, _ = read_pairs(folder)
    kept = {name: np.concatenate([np.load(file)[name] for file in files]) for name in REWARDS}
    assert pairs
    for pair in pairs:
        scores = [pair["score_0"], pair["score_1"]]
        assert np.isin(scores, kept[pair["user"]]).all()
        assert pair["preferred"] == int(scores[1] > scores[0])
    shown = {(image, pair["caption"]) for pair in pairs for image in image_ids(pair)}
    assert len(kept["clip"]) >= len(shown)  # each once; of some all pairs were dropped
    for file in files:  # a second run takes them as they are
        with np.load(file) as old:
            np.savez(file, **{name: old[name] + 1 for name in old.files})
    (folder / "pairs.parquet").unlink()
    script("embed.py", "--data", DATA, "--one-hot", *REWARDS, "--users", folder, **hub[1])
    again, _ = read_pairs(folder)
    assert [p["score_0"] for p in again] == pytest.approx([p["score_0"] + 1 for p in pairs])


def test_lite_and_a_folder_load_too(hub):
    name = f"{snapshot(hub[0], PRIOR)}:prior_lite"
    lite = load_base(name, decoder=str(snapshot(hub[0], STAGES)), grid=3)
    assert lite.channels == [64] * 4
    assert (lite.steps, lite.guidance, lite.latent_shape) == (30, 4.0, (16, 3, 3))


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--base stabilityai/not-there", "--base stabilityai/not-there: cannot load"),
        (f"--base {PRIOR}:prior_tiny", "cannot load stabilityai/stable-cascade-prior"),
        (f"--base {PRIOR} --decoder someone/nothing", "cannot get effnet_encoder.safetensors"),
    ],
)
def test_missing_checkpoints_get_one_line(argument, message, hub, full_run, tmp_path):
    command = f"train.py {argument} --device cpu --grid 3 --max-steps 1 --batch 1".split()
    folders = ["--users", full_run[0] / "users", "--out", tmp_path]
    done = script(*command, *folders, check=False, **hub[1])
    assert done.returncode and message in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------------------ against the library's own
def stock_pipeline(base):
    from diffusers import DDPMWuerstchenScheduler, StableCascadePriorPipeline

    pipeline = StableCascadePriorPipeline(
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        prior=base.prior,
        scheduler=DDPMWuerstchenScheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_sample(pipeline, prompts, seeds, steps):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sizes = dict(height=128, width=128, num_inference_steps=steps, guidance_scale=4.0)
    return pipeline(prompts, generator=generators, **sizes).image_embeddings


def test_sampling_equals_the_stock_pipeline(base):
    prompts = [RED_STAR, "a fox in the snow"]
    seeds = [3, 8]
    theirs = stock_sample(stock_pipeline(base), prompts, seeds, 3)
    assert (base.sample(prompts, seeds, steps=3) - theirs).abs().max() == 0
    adapter = UserAdapter(5, base.channels).install(base.attention_layers())  # V' = 0
    ours = base.sample(prompts, seeds, adapter, adapter(torch.randn(2, 5)), steps=3)
    assert (ours - theirs).abs().max() == 0


def test_noise_prediction_equals_the_stock_pipelines(base):
    seen = []

    def remember(module, args, kwargs, out):
        seen.append((kwargs, out))

    handle = base.prior.register_forward_hook(remember, with_kwargs=True)
    stock_sample(stock_pipeline(base), [RED_STAR], [0], 2)
    handle.remove()
    kwargs, out = seen[1]
    both = zip(base.encode_prompts([RED_STAR]), base.encode_prompts([""]), strict=True)
    conditions = [torch.cat(pair) for pair in both]
    with torch.no_grad():
        ours = base.predict(kwargs["sample"], kwargs["timestep_ratio"], *conditions)
    assert (ours - out[0]).abs().max() == 0


def test_adapter_in_a_stock_pipeline(base):
    """The README's snippet: both halves of guidance see the user, as in base.sample."""
    adapter = UserAdapter(5, base.channels)
    torch.manual_seed(0)
    for layer in adapter.to_v:
        torch.nn.init.normal_(layer.weight, std=0.3)
    pipeline = stock_pipeline(base)
    user = torch.randn(1, 5)
    adapter.install(attention_layers(pipeline.prior))
    with torch.no_grad(), adapter.user(adapter(user)):
        theirs = stock_sample(pipeline, RED_STAR, [1], 2)
    ours = base.sample([RED_STAR], [1], adapter, adapter(user).detach(), steps=2)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, base.sample([RED_STAR], [1], steps=2), atol=1e-2)


def test_encoder_equals_torchvisions(base, hub):
    from torchvision.models import efficientnet_v2_s
    from torchvision.transforms.functional import normalize, to_tensor

    state = load_file(snapshot(hub[0], STAGES) / "effnet_encoder.safetensors")
    assert len(state) == 784
    net = efficientnet_v2_s(weights=None).eval()
    prefix = "backbone."
    features = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    net.features.load_state_dict(features)
    image = draw_random(np.random.default_rng(0), RED_STAR).resize((96, 96))
    pixels = normalize(to_tensor(image)[None], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        x = torch.nn.functional.conv2d(net.features(pixels), state["mapper.0.weight"])
        mean, var = (state[f"mapper.1.running_{kind}"].view(-1, 1, 1) for kind in ("mean", "var"))
        want = (x - mean) / (var + 1e-5).sqrt()
    got = base.encode_images([image])
    assert got.shape == (1, 16, 3, 3) and torch.allclose(got, want, atol=1e-4, rtol=1e-4)
    assert base.encode_images([image.resize((200, 120))]).shape == got.shape
    big = CascadeCodec(snapshot(hub[0], STAGES), "cpu", torch.float32, 24)
    pixels = fit_pixels([image], big.image_size, big.resample)
    assert pixels.shape == (1, 3, 768, 768) and big.latent_shape == (16, 24, 24)
    assert big.encode(pixels / 255).shape == (1, 16, 24, 24)


def test_decoding_needs_caption_and_seed_only(base):
    captions = [RED_STAR, BLUE_CIRCLE]
    latents = base.sample(captions, [0, 1], steps=2)
    both = base.decode(latents, captions, [0, 1])
    alone = base.decode(latents[1:], captions[1:], [1])
    assert both[1].size == (128, 128)
    assert np.abs(np.asarray(both[1], int) - np.asarray(alone[0], int)).max() <= 1


# ------------------------------------------------------------------------- the rewards
@pytest.fixture
def images():
    rng = np.random.default_rng(5)
    return [draw_random(rng, c).resize((70, 64)) for c in CAPTIONS[:5]], CAPTIONS[:5]


@pytest.fixture
def cached(hub, monkeypatch):
    """The same hub cache for this process, whose huggingface_hub has read its environment
    already; returns CLIP's processor."""
    from transformers import CLIPProcessor

    here = {}
    for name, (title, repository, file) in clip.REWARDS.items():
        here[name] = (title, repository if file else str(snapshot(hub[0], repository)), file)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: hub[1]["TORCH_HOME"] + "/hub")
    monkeypatch.setattr(clip, "hub_file", lambda repo, name: snapshot(hub[0], repo) / name)
    monkeypatch.setattr(clip, "REWARDS", here)
    clip.load_reward.cache_clear()
    yield CLIPProcessor.from_pretrained(here["clip"][1])
    clip.load_reward.cache_clear()


def test_clip_scores_are_logits_over_the_scale(cached, images):
    for name, seed in (("clip", 0), ("pickscore", 2)):
        model = small_clip(seed)
        inputs = cached(text=images[1], images=images[0], padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits_per_image
        want = 100 * logits.diagonal() / model.logit_scale.detach().exp()
        assert np.allclose(rewards.score(name, *images), want, atol=1e-4)
        assert np.allclose(rewards.score(name, *images, batch=2), want, atol=1e-4)


def test_aesthetic_is_the_head_on_the_normalized_image(cached, images, hub):
    inputs = cached.image_processor(images[0], return_tensors="pt")
    head = hub[1]["TORCH_HOME"] + "/hub/checkpoints/" + clip.AESTHETIC
    state = torch.load(head, weights_only=True)
    with torch.no_grad():
        x = small_clip(1).get_image_features(**inputs).pooler_output
        x = x / x.norm(dim=-1, keepdim=True)
        for i in (0, 2, 4, 6, 7):
            x = x @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    assert np.allclose(rewards.score("aesthetic", *images), x[:, 0], atol=1e-3)


def test_hps_round_trip(cached):
    model = small_clip(5)
    want = model.state_dict()
    state = clip.from_open_clip(to_open_clip(model))
    assert state.keys() == {key for key in want if "position_ids" not in key}
    assert all(torch.equal(value, want[key]) for key, value in state.items())
    hps = clip.load_reward("hps", "cpu")
    assert hps[0].state_dict()["logit_scale"] == model.logit_scale
    assert clip.load_reward("hps2.0", "cpu") is not clip.load_reward("hps", "cpu")


def test_hps_conversion_equals_open_clips_own_forward():
    reason = "pip install open_clip_torch to compare with open_clip itself"
    pytest.importorskip("open_clip", reason=reason)
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    theirs = CLIP(
        embed_dim=24,
        vision_cfg=CLIPVisionCfg(layers=3, width=40, head_width=20, patch_size=14, image_size=56),
        text_cfg=CLIPTextCfg(context_length=77, vocab_size=514, width=32, heads=4, layers=2),
    ).eval()
    state = {k: v for k, v in theirs.state_dict().items() if k != "attn_mask"}
    ours = small_clip(0)
    ours.load_state_dict(clip.from_open_clip(state))
    ids = torch.randint(1, 512, (3, 77))
    ids[:, 0] = 512
    ids[:, 9] = 513
    ids[:, 10:] = 0
    pixels = torch.randn(3, 3, 56, 56)
    with torch.no_grad():
        image = theirs.encode_image(pixels, normalize=True)
        text = theirs.encode_text(ids, normalize=True)
        out = ours(input_ids=torch.where(ids == 0, 513, ids), pixel_values=pixels)
    assert torch.allclose(image, out.image_embeds, atol=1e-5)
    assert torch.allclose(text, out.text_embeds, atol=1e-5)


# -------------------------------------------------------------------------- full sizes
def test_full_sizes_on_the_meta_device():
    from diffusers import StableCascadeUNet
    from torchvision.models import efficientnet_v2_s

    for name, count, n_layers in (("full", 3_589_103_632, 64), ("lite", 1_030_785_040, 32)):
        with torch.device("meta"):
            prior = StableCascadeUNet(**bench.SIZES[name])
            layers = attention_layers(prior)
            widths = [layer.to_q.in_features for layer in layers]
            adapter = UserAdapter(3584, widths, tokens=4, token_dim=1024).install(layers)
        assert sum(p.numel() for p in prior.parameters()) == count and len(widths) == n_layers
        project = 3584 * 4096 + 4096 + 2 * 1024
        trained = sum(p.numel() for p in adapter.parameters())
        assert trained == project + n_layers * 2 * 1024 * widths[0]
    with torch.device("meta"):
        assert len(efficientnet_v2_s(weights=None).features.state_dict()) + 4 == 784


def test_llava_prompt_at_its_real_sizes():
    """384 px tiles of 14 px patches: 730 tokens an image, eight of them, each beside its own
    caption and label."""
    import transformers
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY / "vlm")
    sizes = dict(size={"height": 384, "width": 384}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=transformers.LlavaOnevisionVideoProcessor(),
        num_image_tokens=729,
        vision_feature_select_strategy="full",
    )

    class Model:
        config = transformers.LlavaOnevisionConfig(
            vision_config=transformers.SiglipVisionConfig(image_size=384, patch_size=14)
        )
        device = torch.device("cpu")
        dtype = torch.float32

    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 255, (512, 512 + 64 * i, 3), dtype=np.uint8) for i in range(8)]
    images = [Image.fromarray(array) for array in pixels]
    captions = [RED_STAR, "a blue cross", "a pink circle", "an orange square"]
    text = llava.build_vlm_prompt(captions, "profile")
    vlm = (Model, tokenizer, LlavaOnevisionImageProcessorPil(**sizes))
    ours = llava.vlm_inputs(vlm, [text], [images])
    theirs = processor(images=[images], text=[text], return_tensors="pt")
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    assert ours["batch_num_images"].tolist() == [8]
    assert ours["pixel_values"].shape == theirs["pixel_values"].shape
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    assert (ours["input_ids"] == image_token).sum() == 8 * 730
    for i, caption in enumerate(captions, 1):
        assert f"Pair {i}. Caption: {caption}\nPreferred: <image>\nDispreferred: <image>" in text


# ---------------------------------------------------------------------- a big data set
COUNT_READS = """
import resource, sys
from data import read_rows, split_rows
from embed import print_splits

def read():
    return int(next(line for line in open("/proc/self/io") if line.startswith("rchar")).split()[1])

def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

memory_before, read_before = memory(), read()
rows, dropped = split_rows(read_rows(sys.argv[1]), 0.1, 0.25, 0.25, 0.1)
used = (memory() - memory_before) / 1024, (read() - read_before) / 2**20
sys.stderr.write(f"{used[0]:.0f} {used[1]:.1f}")
print_splits(rows, dropped)
"""


def test_splits_read_no_images(tmp_path):
    """20,000 rows with images: memory stays, and of 330 MB of files only the metadata is read."""
    rng = np.random.default_rng(0)
    n = 20_000
    noise = rng.integers(0, 256, 1 << 20, dtype=np.uint8).tobytes()
    jpgs = [[noise[k : k + 8000] for k in rng.integers(0, 1 << 19, n)] for _ in range(2)]
    captions = [f"caption {i % 2000}" for i in range(n)]
    labels = rng.choice([0.0, 0.5, 1.0], n)
    table = pickapic_table(captions, rng.integers(0, 300, n), *jpgs, labels, [0.0] * n)
    for name, parts in (("one", 1), ("four", 4)):
        (tmp_path / name).mkdir()
        for i in range(parts):
            part = table.slice(i * n // parts, n // parts)
            path = tmp_path / name / f"train-{i:05d}.parquet"
            pq.write_table(part, path, row_group_size=1000)
    tables = set()
    for name in ("one", "four", "one"):
        done = script("-c", COUNT_READS, tmp_path / name)
        memory, megabytes = map(float, done.stderr.split())
        assert memory < 512 and megabytes < 20, (memory, megabytes)
        tables.add(done.stdout)
    assert len(tables) == 1
    assert (tmp_path / "one" / "train-00000.parquet").stat().st_size > 300e6


MILLION = """
import resource, sys, time
from data import few_shot_groups, read_rows, split_rows

began = time.time()
rows, dropped = split_rows(read_rows(sys.argv[1]), 0.02, 0.05, 0.05, 0.02)
users = {}
for row in rows:
    users.setdefault(row["user_id"], []).append(row)
groups = [few_shot_groups(own, 4) for own in users.values()]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(len(rows), sum(map(len, groups)), dropped["repeated"], peak, time.time() - began)
"""


@pytest.mark.slow
def test_a_million_rows(tmp_path):
    """Split and grouped within 2 GiB and two minutes; repeated ones counted."""
    rng = np.random.default_rng(0)
    n = 1_000_000
    captions = [f"a caption of some usual length, number {i}" for i in range(60_000)]
    captions = [captions[i] for i in rng.integers(len(captions), size=n)]
    labels = rng.choice([0.0, 0.5, 1.0], n)
    empty = [b""] * n
    users = rng.integers(0, 5000, n)
    table = pickapic_table(captions, users, empty, empty, labels, 1 - labels)
    for i in range(10):
        pq.write_table(table.slice(i * n // 10, n // 10), tmp_path / f"train-{i:05d}.parquet")
    pq.write_table(table.slice(0, 500), tmp_path / "validation_unique-00000.parquet")
    found = script("-c", MILLION, tmp_path).stdout.split()
    n_kept, n_groups, n_repeated, gib, seconds = map(float, found)
    assert n_kept > 0.6 * n and n_groups == 4 * 5000 and 300 < n_repeated < 400
    assert gib < 2 and seconds < 120, (gib, seconds)


# ------------------------------------------------------------------------------- judge
TORN = {"torn": b"{not json", "list": b"[]", "no choice": b'{"choices": []}'}
TORN |= {"error": b'{"error": "no"}', "deep": b"[" * 100_000}
TORN["no text"] = b'{"choices": [{"message": {"content": 5}}]}'


class Judge(BaseHTTPRequestHandler):
    """A local OpenAI-compatible endpoint that likes light images, or what `mode` says."""

    mode = "light"
    asked = 0
    seen = {}

    def do_POST(self):
        type(self).asked += 1
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen[body] = self.seen.get(body, 0) + 1
        lighter = self.lighter(json.loads(body))
        text = f"They like light images. CHOICE: {lighter}"
        text = dict(first="CHOICE: 1", garbage="I would rather not say.").get(self.mode, text)
        status = dict(failing=503, forbidden=401).get(self.mode, 200)
        if self.mode == "busy" and self.seen[body] < 3:  # every question is turned away twice
            status = 429
        reply = dict(choices=[dict(message=dict(content=text))])
        if status != 200:
            reply = dict(error="wrong key" if status == 401 else "later")
        if self.mode == "slow":
            threading.Event().wait(0.7)
        with contextlib.suppress(BrokenPipeError):
            self.answer(status, TORN.get(self.mode, json.dumps(reply).encode()))

    def lighter(self, question):
        """1 or 2: which of the last two images is lighter, once the question is as it should be."""
        parts = question["messages"][0]["content"]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        assert self.path == "/v1/chat/completions" and question["model"] == "some-judge"
        assert self.headers["Authorization"] == "Bearer secret" and len(urls) == 10
        assert texts[0].startswith(llava.INTRO)
        assert not any("<image>" in text or "<|im" in text for text in texts)
        light = []
        for url in urls[-2:]:
            content = base64.b64decode(url.split(",")[1])
            light.append(np.asarray(Image.open(io.BytesIO(content)).convert("L")).mean())
        return 1 if light[0] > light[1] else 2

    def answer(self, status, body):
        self.send_response(status)
        if status != 200:
            self.send_header("retry-after-ms", "10")  # openai's client waits so long
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def judge(people_run, tmp_path, monkeypatch):
    """evaluate.py judge on the small world against a local server: judge(mode, *flags) ->
    results."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    url = f"http://127.0.0.1:{server.server_port}/v1"
    asking = f"judge --judge some-judge --judge-url {url} --n 3 --steps 2 --device cpu".split()

    def ask(mode, *flags, out=None):
        Judge.mode = mode
        Judge.asked = 0
        Judge.seen.clear()
        out = tmp_path / (out or mode)
        call(evaluate, *asking, "--adapter", people_run, "--out", out, *flags)
        result = evaluation(out, "judge")
        return dict(result["people"], accuracy=result["accuracy"])

    yield ask
    server.shutdown()


def stopping_line(judge, mode, *flags, out=None):
    """The one line that a judge stops with."""
    with pytest.raises(SystemExit) as stop:
        judge(mode, *flags, out=out)
    line = stop.value.code
    assert line.startswith("evaluate.py: error: --judge-url http") and "\n" not in line
    assert "secret" not in line and "What is judged is kept" in line
    return line


def test_judges_good_and_bad(judge):
    good = judge("light")
    kinds = [good[kind]["n"] for kind in evaluate.KINDS]
    n = sum(kinds)
    assert kinds[:2] == [3, 3] and 2 <= kinds[2] <= 3 and good["all"]["n"] == n
    assert good["all"]["inconsistent"] == good["all"]["unparsable"] == 0
    assert good["accuracy"]["n"] == n and Judge.asked == 4 * n
    none = dict(rate=None, n=0, ci95=None, inconsistent=0, unparsable=0)
    assert judge("first")["all"] == none | dict(inconsistent=n)
    assert judge("garbage")["all"] == none | dict(unparsable=n)
    busy = judge("busy")
    assert busy == good and Judge.asked == 3 * 4 * n


def test_a_judge_that_fails_keeps_what_is_done(judge, tmp_path, monkeypatch):
    monkeypatch.setattr(llava, "RETRIES", 6)
    assert "503" in stopping_line(judge, "failing", out="kept")
    assert Judge.asked > 4
    assert "401" in stopping_line(judge, "forbidden", out="kept")
    assert Judge.asked <= 4  # four questions at once, none of them again
    with monkeypatch.context() as patch:
        patch.setattr(llava, "RETRIES", 1)
        assert "imed out" in stopping_line(judge, "slow", "--judge-timeout", "0.2", out="kept")
    assert Judge.asked > 4
    done = judge("light", out="kept")
    assert judge("failing", out="kept") == done
    assert Judge.asked == 0  # all judged already
    with pytest.raises(SystemExit, match="was begun with seed"):
        judge("light", "--seed", "1", out="kept")


def test_a_judge_killed_half_way_goes_on(judge, tmp_path):
    done = judge("light", out="kept")
    journal = tmp_path / "kept" / "judge.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:3]) + lines[3][:10])  # two judged, and a line cut short
    stopping_line(judge, "failing", out="kept")
    assert journal.read_text() == "".join(lines[:3])
    assert judge("light", out="kept") == done and Judge.asked == 4 * (done["all"]["n"] - 2)


@pytest.mark.parametrize("mode", TORN)
def test_a_reply_that_is_no_chat_completion_stops_the_run(mode, judge, tmp_path):
    line = stopping_line(judge, mode, out="torn")
    assert re.search(r"/v1: \w+Error: \S", line)  # says what was wrong
    assert Judge.asked <= 4
    assert len((tmp_path / "torn" / "judge.jsonl").read_text().splitlines()) == 1  # the settings


# --------------------------------------------------------------------------------- GPU
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_full_size_prior_on_a_gpu():
    base = bench.make_base("lite", "cuda", torch.bfloat16)
    batch = bench.make_batch(base, 2)
    adapter = bench.make_adapter(base, batch)
    micro_step(base, adapter, batch, 1.0, 0.1, 2)
    assert all(torch.isfinite(p.grad).all() for p in adapter.to_v.parameters())


def test_hub_ids():
    assert is_hub_id("stabilityai/stable-cascade")
    assert os.path.isdir("tiny/checkpoints")
    for name in ("tests", "tests/conftest.py", "/a/b", "tiny/checkpoints"):
        assert not is_hub_id(name)
