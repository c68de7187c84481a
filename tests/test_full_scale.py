"""The full-scale path without its checkpoints: small ones from scratch in the hub's own layout,
file names and key names, put where a download would put them, and read by the real loaders under
their real ids; full sizes on the meta device."""

import base64
import contextlib
import io
import json
import re
import threading
import time
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import diffusers
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import efficientnet_v2_s

import bench
import embed
import evaluate
import rewards
import sample
import tiny.train
import train
from bases import clip, llava, load_base
from bases.cascade import CascadeCodec, attention_layers
from bases.images import fit_pixels
from conftest import call, evaluation, moved, refusal, script
from data import image_ids, load_user, read_pairs
from ppd import UserAdapter
from tiny.world import ARROW_TYPES, CAPTIONS, draw_random
from utils import TINY, is_hub_id

PRIOR = "stabilityai/stable-cascade-prior"
STAGES = "stabilityai/stable-cascade"
VLM = "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"
DATA = "someone/pick-a-pic-v2"
REWARDS = ("clip", "aesthetic", "hps")
RED_STAR = "a red star"


# ------------------------------------------------------- small checkpoints, hub layout
def snapshot(cache, repository, kind="models"):
    return cache / f"{kind}--{repository.replace('/', '--')}" / "snapshots" / ("0" * 40)


def put(cache, repository, kind="models"):
    """The folder where huggingface_hub keeps a downloaded repository."""
    folder = snapshot(cache, repository, kind)
    folder.mkdir(parents=True)
    (folder.parent.parent / "refs").mkdir()
    (folder.parent.parent / "refs" / "main").write_text("0" * 40)
    return folder


def small_tokenizer():
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def small_stage_b():
    res_and_time = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
    kinds = (res_and_time, (*res_and_time, "SDCascadeAttnBlock"))
    sizes = dict(in_channels=4, out_channels=4, timestep_ratio_embedding_dim=16, patch_size=2)
    sizes |= dict(conditioning_dim=32, block_out_channels=(16, 32), num_attention_heads=(-1, 2))
    sizes |= dict(down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1))
    sizes |= dict(clip_text_pooled_in_channels=32, effnet_in_channels=16)
    how = dict(block_types_per_layer=kinds, timestep_conditioning_type=("sca",))
    return diffusers.StableCascadeUNet(**sizes, **how, pixel_mapper_in_channels=3)


def small_effnet():
    mapper = nn.Sequential(nn.Conv2d(1280, 16, 1, bias=False), nn.BatchNorm2d(16, affine=False))
    nn.init.normal_(mapper[0].weight, std=0.1)
    mapper[1].running_mean.normal_(std=0.01)
    mapper[1].running_var.uniform_(0.01, 1)
    features = efficientnet_v2_s(weights=None).features
    return nn.ModuleDict(dict(backbone=features, mapper=mapper)).state_dict()


CLIP_TEXT = dict(hidden_size=32, intermediate_size=128, num_attention_heads=4, num_hidden_layers=2)
CLIP_TEXT |= dict(vocab_size=514, max_position_embeddings=77, hidden_act="gelu", projection_dim=24)
CLIP_TEXT |= dict(bos_token_id=512, eos_token_id=513, pad_token_id=513)
CLIP_VISION = dict(hidden_size=40, intermediate_size=160, num_attention_heads=2, patch_size=14)
CLIP_VISION |= dict(num_hidden_layers=3, image_size=56, hidden_act="gelu", projection_dim=24)


def small_clip(seed):
    torch.manual_seed(seed)
    sizes = dict(text_config=CLIP_TEXT, vision_config=CLIP_VISION, projection_dim=24)
    return transformers.CLIPModel(transformers.CLIPConfig(**sizes)).eval()


def small_text_encoder(cls=transformers.CLIPTextModelWithProjection):
    return cls(transformers.CLIPTextConfig(**CLIP_TEXT | dict(projection_dim=32))).eval()


# transformers' names of a CLIP's tensors and open_clip's, written down independently of bases.clip
OPEN_CLIP = """text_model.encoder.layers transformer.resblocks, self_attn attn, layer_norm1 ln_1,
layer_norm2 ln_2, mlp.fc1 mlp.c_fc, mlp.fc2 mlp.c_proj, text_model.final_layer_norm ln_final,
text_model.embeddings.token_embedding token_embedding, text_projection.weight text_projection,
text_model.embeddings.position_embedding.weight positional_embedding, visual_projection.weight
visual.proj, vision_model.encoder.layers visual.transformer.resblocks, vision_model.pre_layrnorm
visual.ln_pre, vision_model.post_layernorm visual.ln_post, vision_model.embeddings.class_embedding
visual.class_embedding, vision_model.embeddings.patch_embedding visual.conv1,
vision_model.embeddings.position_embedding.weight visual.positional_embedding"""


def to_open_clip(model):
    out = {}
    for key, value in model.state_dict().items():
        for ours, theirs in map(str.split, OPEN_CLIP.split(",")):
            key = key.replace(ours, theirs)
        out[key] = value.T.contiguous() if key in ("text_projection", "visual.proj") else value
    for key in [key for key in out if ".q_proj." in key]:
        qkv = [out.pop(key.replace(".q_", f".{name}_")) for name in "qkv"]
        out[key.replace(".q_proj.", ".in_proj_")] = torch.cat(qkv)
    return out


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
    columns = {name: columns.get(name, [""] * n) for name in ARROW_TYPES}
    return pa.table({name: pa.array(columns[name], kind) for name, kind in ARROW_TYPES.items()})


def write_pickapic(folder):
    """A small Pick-a-Pic v2 with images of every kind, some of them broken."""
    rng = np.random.default_rng(3)
    modes = "JPEG RGB, PNG RGB, PNG P, PNG RGBA, JPEG CMYK, JPEG L, WEBP RGB"
    kinds = [kind.split() for kind in modes.split(", ")]
    users = [*np.repeat(1000, 3), *np.repeat(range(1001, 1024), 14)]  # the first has too few
    captions = rng.choice(CAPTIONS, len(users)).tolist()
    labels = rng.choice([0, 1, 1, 0, 0.5], len(users))
    jpgs = []
    for k, caption in enumerate(np.repeat(captions, 2).tolist()):
        form, mode = kinds[k % len(kinds)]
        exif = Image.Exif()
        if form == "JPEG" and not k // 2 % 3:
            exif[0x0112] = 6  # rotated by a quarter
        buffer = io.BytesIO()
        draw_random(rng, caption).resize((80, 64)).convert(mode).save(buffer, form, exif=exif)
        jpgs.append(buffer.getvalue()[: 40 if k % 34 == 11 else None])
    table = pickapic_table(captions, users, jpgs[::2], jpgs[1::2], labels, 1 - labels)
    (folder / "data").mkdir()
    for i, rows in enumerate((slice(170), slice(170, None))):
        path = folder / "data" / f"train-{i:05d}-of-00002.parquet"
        pq.write_table(table[rows], path, row_group_size=30)


def put_bases(cache, tokenizer, width=128):
    """Stage C in two sizes, its text encoder, Stages A and B, and the image encoder."""
    assert len(tokenizer) == CLIP_TEXT["vocab_size"]
    prior, stages = put(cache, PRIOR), put(cache, STAGES)
    torch.manual_seed(0)
    models = {prior / "text_encoder": small_text_encoder(), stages / "decoder": small_stage_b()}
    text = dict(clip_text_in_channels=32, clip_text_pooled_in_channels=32)
    for name, w in (("prior", width), ("prior_lite", 64)):
        config = bench.stage_c(w, (1, 1), **text, clip_image_in_channels=24)
        models[prior / name] = diffusers.StableCascadeUNet(**config)
    for folder, model in models.items():
        model.to(torch.bfloat16).save_pretrained(folder, variant="bf16")
    tokenizer.save_pretrained(prior / "tokenizer")
    (prior / "model_index.json").write_text('{"_class_name": "StableCascadePriorPipeline"}')
    vqgan = PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2, levels=2, embed_dim=16)
    vqgan.save_pretrained(stages / "vqgan")
    save_file(small_effnet(), stages / "effnet_encoder.safetensors")


def put_rewards(cache, torch_hub, tokenizer):
    """The rewards' CLIPs, HPS under open_clip's names, and LAION's head."""
    sizes = dict(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = transformers.CLIPProcessor(transformers.CLIPImageProcessor(**sizes), tokenizer)
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
    for i, a, b in ((0, 24, 20), (2, 20, 12), (4, 12, 8), (6, 8, 4), (7, 4, 1)):
        head |= {f"layers.{i}.weight": torch.randn(b, a), f"layers.{i}.bias": torch.randn(b)}
    torch.save(head, torch_hub / "checkpoints" / clip.AESTHETIC)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub cache of all that the README's full-scale commands name, in use here; its folder."""
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
    text = 'Prompt\tNote\n"a red star" on a wall\t\na blue circle\t6" wide\n'
    (put(cache, "nateraw/parti-prompts", "datasets") / "PartiPrompts.tsv").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(cache))
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))  # read at its import
        patch.setenv("TORCH_HOME", str(root / "torch"))
        yield cache
    clip.load_reward.cache_clear()
    clip.load_processor.cache_clear()


@pytest.fixture(scope="module")
def base(hub):
    base = load_base(PRIOR, grid=3)
    for module in base.prior.modules():
        vars(module).pop("forward", None)  # the norm that a CPU's base has its own of
    return base


# ------------------------------------------------------------ the whole way, offline
@pytest.fixture(scope="module")
def full_run(hub, tmp_path_factory):
    """The README's full-scale commands on those: folder, what reading users and scoring said."""
    out = tmp_path_factory.mktemp("full")

    def run(module, words):
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
            call(module, *words.split())
        return said.getvalue()

    few = "--max-steps 2 --batch 4 --micro 2 --grid 3 --preview-every 2 --lr 1e-3"
    training = f"--base {PRIOR} --device cpu {few}"
    parti = "--prompts nateraw/parti-prompts --steps 2"
    shares = "--unseen-users 0.25 --test-captions 0.25 --validation-captions 0.1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CascadeCodec, "default_steps", 2)  # of previews
        brief = partial(llava.generate_text, max_new_tokens=8)  # random weights find no end
        patch.setattr(llava, "generate_text", brief)
        read = run(embed, f"--data {DATA} --vlm {VLM} --batch 3 {shares} --users {out}/users")
        run(train, f"{training} --users {out}/users --out {out}/run")
        user = min((out / "users").glob("*.pt"))
        run(sample, f"--user zero {parti} --user {user} --adapter {out}/run --out {out}/images")
        run(evaluate, f"choices --n 6 --batch 16 --adapter {out}/run")
        run(evaluate, f"judge --steps 2 --batch 4 --n 2 --adapter {out}/run")
        scored = run(embed, f"--data {DATA} --one-hot {' '.join(REWARDS)} --users {out}/onehot")
        run(train, f"{training} --users {out}/onehot --out {out}/run_onehot")
        run(evaluate, f"rewards {parti} --batch 4 --adapter {out}/run_onehot")
    return out, read, scored


def test_the_whole_way(full_run):
    out, read, scored = full_run
    users = [load_user(path) for path in (out / "users").glob("*.pt")]
    assert len(users) > 8
    assert all(user["embedding"].shape[1:] == (1, 48) and user["vlm"] == VLM for user in users)
    for pattern in (
        r"[1-9]\d* have fewer than 4 choices",
        r"dropped: tie or no choice +\d+",
        r"(?m)^train +\d+ +\d+ +\d+$",
        r"a group of 4 is left out: data/train-\d+-of-00002.parquet row \d+ jpg_1",
    ):
        assert re.search(pattern, read), pattern
    assert "HPS v2.1" in scored and "left out: " in scored
    assert re.search(r"[1-9]\d* with a broken image", scored)
    for run, width in (("run", 48), ("run_onehot", 3)):
        adapter = UserAdapter.load(out / run)
        first = json.loads((out / run / "train.jsonl").read_text().splitlines()[0])
        assert adapter.header["base"] == PRIOR and adapter.user_dim == width
        assert len(adapter.channels) == 4 and first["loss"] == pytest.approx(np.log(2), abs=1e-6)
        assert (out / run / "previews" / "step-000002.png").exists()
    images = [Image.open(p) for p in (out / "images").glob("*.png") if p.name != "grid.png"]
    assert len(images) == 4 and images[0].size == (256, 256)
    assert any('"prompt": "\\"a red star\\" on a wall"' in image.text["ppd"] for image in images)
    result = evaluation(out / "run_onehot", "rewards")
    assert result["models"] == {name: clip.REWARDS[name][0] for name in REWARDS}
    assert all(v["base"]["n"] == 2 for v in result["figure_3"].values())
    assert "fidelity" not in result["table_1"]["PPD"]
    choices, judged = (evaluation(out / "run", command) for command in ("choices", "judge"))
    for r in [r for kind, r in choices.items() if kind in evaluate.KINDS]:
        assert 2 <= r["own"]["n"] <= 6 and not {"true_taste", "perfect_reader"} & r.keys()
        halves = [2 * rate * r["own"]["n"] for rate in r["by_t"]]
        assert len(halves) == 8 and np.allclose(halves, np.round(halves), atol=0.01)
    r = judged["people"]["all"]
    assert all(r[kind] + r["n"] <= 6 for kind in ("inconsistent", "unparsable"))
    # of real users no tastes are known
    assert judged["judge"] == VLM and judged["people"].keys() == {"seen", "new_user", "all"}


def test_scores_are_kept_and_used(full_run):
    folder = full_run[0] / "onehot"
    files = sorted((folder / "scores").glob("*.npz"))
    pairs, _ = read_pairs(folder)
    kept = {name: np.concatenate([np.load(file)[name] for file in files]) for name in REWARDS}
    for pair in pairs:
        scores = [pair["score_0"], pair["score_1"]]
        assert np.isin(scores, kept[pair["user"]]).all()
        assert pair["preferred"] == int(scores[1] > scores[0])
    shown = {(image, pair["caption"]) for pair in pairs for image in image_ids(pair)}
    assert len(kept["clip"]) >= len(shown) > 0  # each once; of some all pairs were dropped
    for file in files:  # a second run takes them as they are
        with np.load(file) as old:
            np.savez(file, **{name: old[name] + 1 for name in old.files})
    (folder / "pairs.parquet").unlink()
    # in a process of its own, as a user would: the hub's cache by its environment
    script("embed.py", "--data", DATA, "--one-hot", *REWARDS, "--users", folder)
    again, _ = read_pairs(folder)
    assert [p["score_0"] for p in again] == pytest.approx([p["score_0"] + 1 for p in pairs])


def test_lite_and_a_folder_load_too(hub):
    name = f"{snapshot(hub, PRIOR)}:prior_lite"
    lite = load_base(name, decoder=str(snapshot(hub, STAGES)), grid=3)
    assert lite.channels == [64] * 4
    assert (lite.steps, lite.guidance, lite.latent_shape) == (30, 4.0, (16, 3, 3))


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--base stabilityai/not-there", "stabilityai/not-there: cannot get model_index.json"),
        (f"--base {PRIOR}:prior_tiny", "cannot load stabilityai/stable-cascade-prior"),
        (f"--base {PRIOR} --decoder someone/nothing", "cannot get effnet_encoder.safetensors"),
    ],
)
def test_missing_checkpoints_get_one_line(argument, message, full_run, tmp_path):
    flags = f"{argument} --users {full_run[0]}/users --out {tmp_path} --device cpu --grid 3"
    assert message in refusal(train, *flags.split(), "--max-steps", 1, "--batch", 1)


# ------------------------------------------------------------ against the library's own
def stock_pipeline(base):
    parts = (base.tokenizer, base.text_encoder, base.prior, diffusers.DDPMWuerstchenScheduler())
    pipeline = diffusers.StableCascadePriorPipeline(*parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_sample(pipeline, prompts, seeds, steps):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sizes = dict(height=128, width=128, num_inference_steps=steps, guidance_scale=4.0)
    return pipeline(prompts, generator=generators, **sizes).image_embeddings


def test_sampling_and_noise_predictions_equal_the_stock_pipelines(base):
    prompts, seeds, seen = [RED_STAR, "a fox in the snow"], [3, 8], []
    handle = base.prior.register_forward_hook(lambda *call: seen.append(call[2:]), with_kwargs=True)
    theirs = stock_sample(stock_pipeline(base), prompts, seeds, 3)
    handle.remove()
    kwargs, out = seen[1]
    both = zip(base.encode_prompts(prompts), base.encode_prompts(["", ""]), strict=True)
    conditions = [torch.cat(pair) for pair in both]
    with torch.no_grad():
        ours = base.predict(kwargs["sample"], kwargs["timestep_ratio"], *conditions)
    assert (ours - out[0]).abs().max() == 0
    assert (base.sample(prompts, seeds, steps=3) - theirs).abs().max() == 0
    adapter = UserAdapter(5, base.channels).install(base.attention_layers())  # V' = 0
    ours = base.sample(prompts, seeds, adapter, adapter(torch.randn(2, 5)), steps=3)
    assert (ours - theirs).abs().max() == 0


def test_adapter_in_a_stock_pipeline(base):
    """The README's snippet: both halves of guidance see the user, as in base.sample."""
    torch.manual_seed(0)
    adapter = moved(UserAdapter(5, base.channels))
    pipeline, user = stock_pipeline(base), torch.randn(1, 5)
    adapter.install(attention_layers(pipeline.prior))
    with torch.no_grad(), adapter.user(adapter(user)):
        theirs = stock_sample(pipeline, RED_STAR, [1], 2)
    ours = base.sample([RED_STAR], [1], adapter, adapter(user).detach(), steps=2)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, base.sample([RED_STAR], [1], steps=2), atol=1e-2)


def test_encoder_equals_torchvisions(base, hub):
    from torchvision.transforms.functional import normalize, to_tensor

    state = load_file(snapshot(hub, STAGES) / "effnet_encoder.safetensors")
    assert len(state) == 784
    net = efficientnet_v2_s(weights=None).eval()
    net.features.load_state_dict({k[9:]: v for k, v in state.items() if k.startswith("backbone.")})
    image = draw_random(np.random.default_rng(0), RED_STAR).resize((96, 96))
    pixels = normalize(to_tensor(image)[None], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        x = torch.nn.functional.conv2d(net.features(pixels), state["mapper.0.weight"])
        mean, var = (state[f"mapper.1.running_{kind}"].view(-1, 1, 1) for kind in ("mean", "var"))
        want = (x - mean) / (var + 1e-5).sqrt()
    got = base.encode_images([image])
    assert got.shape == (1, 16, 3, 3) and torch.allclose(got, want, atol=1e-4, rtol=1e-4)
    assert base.encode_images([image.resize((200, 120))]).shape == got.shape
    big = CascadeCodec(STAGES, "cpu", torch.float32, 24)
    pixels = fit_pixels([image], big.image_size, big.resample)
    assert pixels.shape == (1, 3, 768, 768) and big.latent_shape == (16, 24, 24)
    assert big.encode(pixels / 255).shape == (1, 16, 24, 24)


def test_decoding_needs_caption_and_seed_only(base):
    captions = [RED_STAR, "a blue circle"]
    latents = base.sample(captions, [0, 1], steps=2)
    both = base.decode(latents, captions, [0, 1])
    alone = base.decode(latents[1:], captions[1:], [1])
    assert both[1].size == (128, 128)
    assert np.abs(np.asarray(both[1], int) - np.asarray(alone[0], int)).max() <= 1


# ------------------------------------------------------------------------- the rewards
@pytest.fixture
def drawn(hub):
    """Images and captions, and CLIP's processor."""
    rng = np.random.default_rng(5)
    images = [draw_random(rng, caption).resize((70, 64)) for caption in CAPTIONS[:5]]
    processor = transformers.CLIPProcessor.from_pretrained(clip.REWARDS["clip"][1])
    return (images, CAPTIONS[:5]), processor


@pytest.mark.parametrize("name, seed", [("clip", 0), ("pickscore", 2)])
def test_clip_scores_are_logits_over_the_scale(name, seed, drawn):
    (images, captions), processor = drawn
    model = small_clip(seed)
    inputs = processor(text=captions, images=images, padding=True, return_tensors="pt")
    with torch.no_grad():
        want = 100 * model(**inputs).logits_per_image.diagonal() / model.logit_scale.exp()
    assert np.allclose(rewards.score(name, images, captions), want, atol=1e-4)
    assert np.allclose(rewards.score(name, images, captions, batch=2), want, atol=1e-4)


def test_aesthetic_is_the_head_on_the_normalized_image(drawn):
    (images, captions), processor = drawn
    inputs = processor.image_processor(images, return_tensors="pt")
    head = f"{torch.hub.get_dir()}/checkpoints/{clip.AESTHETIC}"
    state = torch.load(head, weights_only=True)
    with torch.no_grad():
        x = small_clip(1).get_image_features(**inputs).pooler_output
        x = x / x.norm(dim=-1, keepdim=True)
        for i in (0, 2, 4, 6, 7):
            x = x @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    assert np.allclose(rewards.score("aesthetic", images, captions), x[:, 0], atol=1e-3)


def test_hps_round_trip(hub):
    model = small_clip(5)
    want = model.state_dict()
    state = clip.from_open_clip(to_open_clip(model))
    assert state.keys() == {key for key in want if "position_ids" not in key}
    assert all(torch.equal(value, want[key]) for key, value in state.items())
    hps, older = (clip.load_reward(name, "cpu") for name in ("hps", "hps2.0"))
    assert hps[0].state_dict()["logit_scale"] == model.logit_scale and older is not hps


def test_hps_conversion_equals_open_clips_own_forward():
    open_clip = pytest.importorskip("open_clip.model", reason="pip install open_clip_torch for it")
    torch.manual_seed(0)
    vision = dict(layers=3, width=40, head_width=20, patch_size=14, image_size=56)
    text = dict(context_length=77, vocab_size=514, width=32, heads=4, layers=2)
    towers = open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text)
    theirs = open_clip.CLIP(24, *towers).eval()
    state = {k: v for k, v in theirs.state_dict().items() if k != "attn_mask"}
    ours = small_clip(0)
    ours.load_state_dict(clip.from_open_clip(state))
    ids = torch.randint(1, 512, (3, 77))
    ids[:, 0], ids[:, 9], ids[:, 10:] = 512, 513, 0
    pixels = torch.randn(3, 3, 56, 56)
    with torch.no_grad():
        image = theirs.encode_image(pixels, normalize=True)
        text = theirs.encode_text(ids, normalize=True)
        out = ours(input_ids=torch.where(ids == 0, 513, ids), pixel_values=pixels)
    assert torch.allclose(image, out.image_embeds, atol=1e-5)
    assert torch.allclose(text, out.text_embeds, atol=1e-5)


# ------------------------------------------------------- full sizes, and a big data set
@pytest.mark.parametrize(
    "size, count, n_layers, widths, trained",
    [
        ("full", 3_589_103_632, 64, {2048}, 268_435_456),
        ("lite", 1_030_785_040, 32, {1536}, 100_663_296),
        ("sdxl", 2_567_463_684, 70, {640, 1280}, 340_787_200),
        ("sana", 1_604_462_752, 20, {2240}, 200_704_000),
    ],
)
def test_full_sizes_on_the_meta_device(size, count, n_layers, widths, trained):
    base = bench.make_base(size, "meta", torch.bfloat16)
    adapter = bench.make_adapter(base)
    assert sum(p.numel() for p in base.prior.parameters()) == count
    assert len(base.channels) == n_layers and set(base.channels) == widths
    projector = (3584 + 1) * 4 * base.token_dim + 2 * base.token_dim
    assert sum(p.numel() for p in adapter.parameters()) == projector + trained


def test_llava_prompt_at_its_real_sizes():
    """384 px tiles of 14 px patches: 730 tokens an image, eight of them, each by its caption."""
    from transformers import LlavaOnevisionImageProcessorPil  # needs no torchvision

    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY / "vlm")
    sizes = dict(size={"height": 384, "width": 384}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    parts = (transformers.LlavaOnevisionImageProcessor(**sizes), tokenizer)
    how = dict(num_image_tokens=729, vision_feature_select_strategy="full")
    video = transformers.LlavaOnevisionVideoProcessor()
    processor = transformers.LlavaOnevisionProcessor(*parts, video, **how)
    config = transformers.LlavaOnevisionConfig(vision_config=dict(image_size=384, patch_size=14))
    model = SimpleNamespace(config=config, device=torch.device("cpu"), dtype=torch.float32)
    images = [Image.new("RGB", (512 + 64 * i, 512), "red") for i in range(8)]
    captions = [RED_STAR, "a blue cross", "a pink circle", "an orange square"]
    text = llava.build_vlm_prompt(captions, "profile")
    vlm = (model, tokenizer, LlavaOnevisionImageProcessorPil(**sizes))
    ours = llava.vlm_inputs(vlm, [text], [images])
    theirs = processor(images=[images], text=[text], return_tensors="pt")
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert ours["pixel_values"].shape == theirs["pixel_values"].shape
    assert ours["batch_num_images"].tolist() == [8]
    assert (ours["input_ids"] == tokenizer.convert_tokens_to_ids("<image>")).sum() == 8 * 730
    for i, caption in enumerate(captions, 1):
        assert f"Pair {i}. Caption: {caption}\nPreferred: <image>\nDispreferred: <image>" in text


MEASURE = """
import resource, sys, time
from data import few_shot_groups, read_rows, split_rows
from embed import print_splits

def used():
    read = next(line for line in open("/proc/self/io") if line.startswith("rchar")).split()[1]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, int(read) / 2**20, time.time()

before = used()
rows, dropped = split_rows(read_rows(sys.argv[1]), *map(float, sys.argv[2:]))
users = {}
for row in rows:
    users.setdefault(row["user_id"], []).append(row)
groups = [few_shot_groups(own, 4) for own in users.values()]
after = used()
print_splits(rows, dropped)
numbers = [now - then for now, then in zip(after, before)]
print(*numbers, after[0], len(rows), sum(map(len, groups)), dropped["repeated"], file=sys.stderr)
"""


def write_parts(table, folder, n):
    folder.mkdir()
    size = len(table) // n
    for i in range(n):
        path = folder / f"train-{i:05d}.parquet"
        pq.write_table(table.slice(i * size, size), path, row_group_size=1000)


def test_splits_read_no_images(tmp_path):
    """20,000 rows with images: memory stays, and of 330 MB of files only the metadata is read."""
    rng = np.random.default_rng(0)
    n = 20_000
    noise = rng.integers(0, 256, 1 << 20, dtype=np.uint8).tobytes()
    jpgs = [[noise[k : k + 8000] for k in rng.integers(0, 1 << 19, n)] for _ in range(2)]
    captions = [f"caption {i % 2000}" for i in range(n)]
    labels = rng.choice([0.0, 0.5, 1.0], n)
    table = pickapic_table(captions, rng.integers(0, 300, n), *jpgs, labels, [0.0] * n)
    write_parts(table, tmp_path / "one", 1)
    write_parts(table, tmp_path / "four", 4)
    tables = set()
    for name in ("one", "four", "one"):
        done = script("-c", MEASURE, tmp_path / name, 0.1, 0.25, 0.25, 0.1)
        memory, megabytes, *_ = map(float, done.stderr.split())
        assert memory < 512 and megabytes < 20, (memory, megabytes)
        tables.add(done.stdout)
    assert len(tables) == 1 and (tmp_path / "one" / "train-00000.parquet").stat().st_size > 300e6


@pytest.mark.slow
def test_a_million_rows(tmp_path):
    """Split and grouped within 2 GiB and two minutes; repeated ones counted."""
    rng = np.random.default_rng(0)
    n = 1_000_000
    captions = [f"a caption of some usual length, number {i}" for i in range(60_000)]
    captions = [captions[i] for i in rng.integers(len(captions), size=n)]
    labels = rng.choice([0.0, 0.5, 1.0], n)
    jpgs = [[b""] * n] * 2
    table = pickapic_table(captions, rng.integers(0, 5000, n), *jpgs, labels, 1 - labels)
    write_parts(table, tmp_path / "ten", 10)
    pq.write_table(table.slice(0, 500), tmp_path / "ten" / "validation_unique-00000.parquet")
    said = script("-c", MEASURE, tmp_path / "ten", 0.02, 0.05, 0.05, 0.02).stderr
    _, _, seconds, mib, n_kept, n_groups, n_repeated = map(float, said.split())
    assert n_kept > 0.6 * n and n_groups == 4 * 5000 and 300 < n_repeated < 400
    assert mib < 2048 and seconds < 120, (mib, seconds)


# ------------------------------------------------------------------------------- judge
TORN = {"torn": b"{not json", "list": b"[]", "no choice": b'{"choices": []}'}
TORN |= {"error": b'{"error": "no"}', "deep": b"[" * 100_000}
TORN["no text"] = b'{"choices": [{"message": {"content": 5}}]}'


class Judge(BaseHTTPRequestHandler):
    """A local OpenAI-compatible endpoint that likes light images, or what `mode` says."""

    mode = "light"
    seen = Counter()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen[body] += 1
        text = f"They like light images. CHOICE: {self.lighter(json.loads(body))}"
        text = dict(first="CHOICE: 1", garbage="I would rather not say.").get(self.mode, text)
        busy = 429 if self.seen[body] < 3 else 200  # every question is turned away twice
        status = dict(failing=503, forbidden=401, busy=busy).get(self.mode, 200)
        reply = dict(choices=[dict(message=dict(content=text))] if status == 200 else [])
        content = TORN.get(self.mode, json.dumps(reply).encode())
        if self.mode == "slow":
            time.sleep(0.7)
        with contextlib.suppress(BrokenPipeError):
            self.send_response(status)
            self.send_header("retry-after-ms", "10")  # openai's client waits so long
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def lighter(self, question):
        """1 or 2: which of the last two images is lighter, once the question is as it should be."""
        parts = question["messages"][0]["content"]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        assert self.path == "/v1/chat/completions" and question["model"] == "some-judge"
        assert self.headers["Authorization"] == "Bearer secret" and len(urls) == 10
        assert texts[0].startswith(llava.INTRO)
        assert not any("<image>" in text or "<|im" in text for text in texts)
        last = [io.BytesIO(base64.b64decode(url.split(",")[1])) for url in urls[-2:]]
        first, second = (np.asarray(Image.open(content).convert("L")).mean() for content in last)
        return 1 if first > second else 2

    def log_message(self, *_):
        pass


@pytest.fixture
def judge(people_run, tmp_path, monkeypatch):
    """evaluate.py judge against a local server: judge(mode, *flags) -> results, or its line."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    url = f"http://127.0.0.1:{server.server_port}/v1"
    asking = f"judge --judge some-judge --judge-url {url} --n 2 --steps 2 --device cpu".split()

    def ask(mode, *flags, out="out", run=call):
        Judge.mode = mode
        Judge.seen.clear()
        out = tmp_path / out
        line = run(evaluate, *asking, "--adapter", people_run, "--out", out, *flags)
        if line:
            return line
        result = evaluation(out, "judge")
        return dict(result["people"], accuracy=result["accuracy"])

    yield ask
    server.shutdown()


def stopping_line(judge, mode, *flags):
    line = judge(mode, *flags, run=refusal)
    assert line.startswith("evaluate.py: error: --judge-url http")
    assert "secret" not in line and "What is judged is kept" in line
    return line


def test_judges_good_and_bad(judge):
    good = judge("light")
    assert [good[kind]["n"] for kind in evaluate.KINDS] == [2, 2, 2]
    assert good["all"]["n"] == good["accuracy"]["n"] == 6 and Judge.seen.total() == 4 * 6
    assert good["all"]["inconsistent"] == good["all"]["unparsable"] == 0
    none = dict(rate=None, n=0, ci95=None, inconsistent=0, unparsable=0)
    assert judge("first", out="first")["all"] == none | dict(inconsistent=6)
    assert judge("garbage", out="garbage")["all"] == none | dict(unparsable=6)
    assert judge("busy", out="busy") == good and Judge.seen.total() == 3 * 4 * 6


def test_a_judge_that_fails_or_is_killed_keeps_what_is_done(judge, monkeypatch, tmp_path):
    assert "503" in stopping_line(judge, "failing") and Judge.seen.total() > 4
    assert "401" in stopping_line(judge, "forbidden")
    assert Judge.seen.total() <= 4  # four questions at once, none of them again
    monkeypatch.setattr(llava, "RETRIES", 1)
    assert "imed out" in stopping_line(judge, "slow", "--judge-timeout", "0.2")
    assert Judge.seen.total() > 4
    done = judge("light")
    assert judge("failing") == done and Judge.seen.total() == 0  # all judged already
    assert "was begun with seed" in judge("light", "--seed", "1", run=refusal)
    journal = tmp_path / "out" / "judge.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:3]) + lines[3][:10])  # two judged, and a line cut short
    stopping_line(judge, "failing")
    assert journal.read_text() == "".join(lines[:3])
    assert judge("light") == done and Judge.seen.total() == 4 * (6 - 2)


@pytest.mark.parametrize("mode", TORN)
def test_a_reply_that_is_no_chat_completion_stops_the_run(mode, judge, tmp_path):
    line = stopping_line(judge, mode)
    assert re.search(r"/v1: \w+Error: \S", line)  # says what was wrong
    assert Judge.seen.total() <= 4
    assert len((tmp_path / "out" / "judge.jsonl").read_text().splitlines()) == 1  # the settings


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_full_size_prior_on_a_gpu():
    base = bench.make_base("lite", "cuda", torch.bfloat16)
    batch, adapter = bench.make_batch(base, 2), bench.make_adapter(base)
    train.micro_step(base, adapter, batch, 1.0, 0.1, 2)
    assert all(torch.isfinite(p.grad).all() for p in adapter.to_v.parameters())


def test_hub_ids():
    assert is_hub_id("stabilityai/stable-cascade") and TINY.is_dir()
    for name in ("tests", "tests/conftest.py", "/a/b", "tiny/checkpoints"):
        assert not is_hub_id(name)
