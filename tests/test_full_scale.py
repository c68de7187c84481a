"""The full-scale path without its checkpoints: small ones from scratch in the hub's own layout, file names and key names, put
where a download would put them, and read by the real loaders under their real ids; full sizes on the meta device."""

import base64
import csv
import io
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import script
from PIL import Image
from safetensors.torch import save_file

import embed
import evaluate
import ppd
import sample
import tiny

PRIOR, STAGES, VLM = (
    "stabilityai/stable-cascade-prior",
    "stabilityai/stable-cascade",
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
)
FULL = dict(
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
    "prior": dict(
        conditioning_dim=2048,
        block_out_channels=(2048, 2048),
        num_attention_heads=(32, 32),
        down_num_layers_per_block=(8, 24),
        up_num_layers_per_block=(24, 8),
    ),
    "prior_lite": dict(
        conditioning_dim=1536,
        block_out_channels=(1536, 1536),
        num_attention_heads=(24, 24),
        down_num_layers_per_block=(4, 12),
        up_num_layers_per_block=(12, 4),
    ),
}


# --------------------------------------------------------------------------------------- small checkpoints, hub layout
def put(cache, repository, kind="models"):
    """The folder where huggingface_hub keeps a downloaded repository."""
    folder = cache / f"{kind}--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return folder / "snapshots" / ("0" * 40)


def small_tokenizer():
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)


def small_prior(width):
    from diffusers import StableCascadeUNet

    torch.manual_seed(0)
    return StableCascadeUNet(
        **FULL
        | dict(
            clip_text_in_channels=32, clip_text_pooled_in_channels=32, clip_image_in_channels=24
        ),
        conditioning_dim=width,
        block_out_channels=(width, width),
        num_attention_heads=(width // 64,) * 2,
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
    )


def clip_parts():
    text = dict(
        hidden_size=32,
        intermediate_size=128,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=514,
        max_position_embeddings=77,
        hidden_act="gelu",
        projection_dim=24,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    vision = dict(
        hidden_size=40,
        intermediate_size=160,
        num_attention_heads=2,
        num_hidden_layers=3,
        patch_size=14,
        image_size=56,
        hidden_act="gelu",
        projection_dim=24,
    )
    return text, vision


def small_clip(seed):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    text, vision = clip_parts()
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()


def to_open_clip(model):
    """CLIPModel's weights under open_clip's names, written down independently of embed.from_open_clip."""
    hf, out = model.state_dict(), {}
    for ours, theirs, layers in (
        ("text_model", "transformer", 2),
        ("vision_model", "visual.transformer", 3),
    ):
        for i in range(layers):
            a, b = f"{ours}.encoder.layers.{i}.", f"{theirs}.resblocks.{i}."
            for kind in ("weight", "bias"):
                out[f"{b}attn.in_proj_{kind}"] = torch.cat(
                    [hf[f"{a}self_attn.{n}_proj.{kind}"] for n in "qkv"]
                )
                for x, y in (
                    ("self_attn.out_proj", "attn.out_proj"),
                    ("layer_norm1", "ln_1"),
                    ("layer_norm2", "ln_2"),
                    ("mlp.fc1", "mlp.c_fc"),
                    ("mlp.fc2", "mlp.c_proj"),
                ):
                    out[f"{b}{y}.{kind}"] = hf[f"{a}{x}.{kind}"]
    for kind in ("weight", "bias"):
        out[f"ln_final.{kind}"] = hf[f"text_model.final_layer_norm.{kind}"]
        out[f"visual.ln_pre.{kind}"], out[f"visual.ln_post.{kind}"] = (
            hf[f"vision_model.pre_layrnorm.{kind}"],
            hf[f"vision_model.post_layernorm.{kind}"],
        )
    return out | {
        "token_embedding.weight": hf["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": hf["text_model.embeddings.position_embedding.weight"],
        "visual.class_embedding": hf["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": hf["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": hf["vision_model.embeddings.patch_embedding.weight"],
        "text_projection": hf["text_projection.weight"].T.contiguous(),
        "visual.proj": hf["visual_projection.weight"].T.contiguous(),
        "logit_scale": hf["logit_scale"],
    }


def write_pickapic(folder, users=24, pairs=14):
    """Pick-a-Pic v2's 19 columns with pictures of every kind, some of them broken."""
    rng, rows, broken = np.random.default_rng(3), [], set()
    kinds = [
        ("JPEG", "RGB"),
        ("PNG", "RGB"),
        ("PNG", "P"),
        ("PNG", "RGBA"),
        ("JPEG", "CMYK"),
        ("JPEG", "L"),
        ("WEBP", "RGB"),
    ]
    for user in range(users):
        for k in range(pairs if user else 3):  # the first person has too few
            i, data = len(rows), []
            caption = tiny.CAPTIONS[rng.integers(len(tiny.CAPTIONS))]
            for side in range(2):
                form, mode = kinds[(2 * i + side) % len(kinds)]
                picture, buffer = (
                    tiny.draw_random(rng, caption).resize((80, 64)).convert(mode),
                    io.BytesIO(),
                )
                exif = Image.Exif()
                exif[0x0112] = 6  # rotated by a quarter
                picture.save(
                    buffer, form, **(dict(exif=exif) if form == "JPEG" and i % 3 == 0 else {})
                )
                data.append(buffer.getvalue())
            if i % 17 == 5:
                data[1], _ = data[1][:40], broken.add(i)
            label = float(rng.choice([0, 1, 1, 0, 0.5]))
            rows.append(
                dict(
                    are_different=True,
                    best_image_uid=f"{i}-a",
                    caption=caption,
                    created_at=i,
                    has_label=True,
                    image_0_uid=f"{i}-a",
                    image_0_url="",
                    image_1_uid=f"{i}-b",
                    image_1_url="",
                    jpg_0=data[0],
                    jpg_1=data[1],
                    label_0=label,
                    label_1=1 - label,
                    model_0="m",
                    model_1="m",
                    ranking_id=i,
                    user_id=1000 + user,
                    num_example_per_prompt=1,
                    __index_level_0__=i,
                )
            )
    (folder / "data").mkdir()
    table = pa.Table.from_pylist(rows)
    table = table.set_column(
        table.schema.get_field_index("created_at"),
        "created_at",
        table["created_at"].cast(pa.timestamp("ns")),
    )
    pq.write_table(
        table.slice(0, 170), folder / "data" / "train-00000-of-00002.parquet", row_group_size=30
    )
    pq.write_table(
        table.slice(170), folder / "data" / "train-00001-of-00002.parquet", row_group_size=30
    )
    return broken


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A hub cache with everything the README's full-scale commands name; returns it, and the environment that points to it."""
    from diffusers import StableCascadeUNet
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
    from torchvision.models import efficientnet_v2_s
    from transformers import (
        CLIPImageProcessor,
        CLIPProcessor,
        CLIPTextConfig,
        CLIPTextModelWithProjection,
    )

    root = tmp_path_factory.mktemp("hub")
    cache, tok = root / "cache", small_tokenizer()
    torch.manual_seed(0)
    prior = put(cache, PRIOR)
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tok),
            hidden_size=32,
            projection_dim=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_act="gelu",
            bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
            pad_token_id=tok.pad_token_id,
        )
    )
    for name, width in (("prior", 128), ("prior_lite", 64)):
        small_prior(width).to(torch.bfloat16).save_pretrained(prior / name, variant="bf16")
    text.to(torch.bfloat16).save_pretrained(prior / "text_encoder", variant="bf16")
    tok.save_pretrained(prior / "tokenizer")

    stages = put(cache, STAGES)
    StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=16,
        patch_size=2,
        conditioning_dim=32,
        block_out_channels=(16, 32),
        num_attention_heads=(-1, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        clip_text_pooled_in_channels=32,
        clip_seq=4,
        effnet_in_channels=16,
        pixel_mapper_in_channels=3,
        dropout=(0.0, 0.0),
        self_attn=True,
        timestep_conditioning_type=("sca",),
    ).to(torch.bfloat16).save_pretrained(stages / "decoder", variant="bf16")
    PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2, levels=2, embed_dim=16).save_pretrained(
        stages / "vqgan"
    )
    effnet = {
        f"backbone.{k}": v for k, v in efficientnet_v2_s(weights=None).features.state_dict().items()
    }
    effnet |= {
        "mapper.0.weight": torch.randn(16, 1280, 1, 1) * 0.1,
        "mapper.1.running_mean": torch.randn(16) * 0.01,
        "mapper.1.running_var": torch.rand(16) + 0.01,
        "mapper.1.num_batches_tracked": torch.tensor(1),
    }
    save_file(effnet, stages / "effnet_encoder.safetensors")

    model, processor = tiny.small_vlm(width=48, layers=2)
    folder = put(cache, VLM)
    model.to(torch.bfloat16).save_pretrained(folder), processor.save_pretrained(folder)

    clip_processor = CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}), tok
    )
    for seed, name in enumerate(("clip", "aesthetic", "pickscore")):
        folder = put(cache, embed.REWARDS[name][1])
        small_clip(seed).save_pretrained(folder), clip_processor.save_pretrained(folder)
    folder = put(cache, "xswu/HPSv2")
    for seed, name in ((5, "hps"), (6, "hps2.0")):
        torch.save(
            dict(epoch=1, state_dict=to_open_clip(small_clip(seed))),
            folder / embed.REWARDS[name][2],
        )
    torch.manual_seed(4)
    (root / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    widths = dict(zip((0, 2, 4, 6, 7), ((24, 20), (20, 12), (12, 8), (8, 4), (4, 1))))
    torch.save(
        {
            f"layers.{i}.{kind}": torch.randn((b, a) if kind == "weight" else b)
            for i, (a, b) in widths.items()
            for kind in ("weight", "bias")
        },
        root / "torch" / "hub" / "checkpoints" / embed.AESTHETIC,
    )

    write_pickapic(put(cache, "someone/pick-a-pic-v2", "datasets"))
    parti = [
        ("Prompt", "Category", "Challenge", "Note"),
        ('"a red star" on a wall', "World", "Basic", ""),
        ("a blue circle", "Abstract", "Basic", '6" wide'),
    ]
    (put(cache, "nateraw/parti-prompts", "datasets") / "PartiPrompts.tsv").write_text(
        "\n".join("\t".join(row) for row in parti) + "\n"
    )
    return cache, dict(HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1", TORCH_HOME=str(root / "torch"))


def snapshot(hub, repository, kind="models"):
    return hub[0] / f"{kind}--{repository.replace('/', '--')}" / "snapshots" / ("0" * 40)


@pytest.fixture(scope="session")
def base(hub):
    return ppd.StableCascade(str(snapshot(hub, PRIOR)), decoder=str(snapshot(hub, STAGES)), grid=3)


# ------------------------------------------------------------------------------------------------- the whole way, offline
@pytest.fixture(scope="session")
def full_run(hub, tmp_path_factory):
    """The README's full-scale commands on those checkpoints: (folder, outputs by script)."""
    out, env = tmp_path_factory.mktemp("full"), hub[1]
    data, base = ["--data", "someone/pick-a-pic-v2"], ["--base", PRIOR, "--device", "cpu"]
    few = [
        "--max-steps",
        2,
        "--batch",
        4,
        "--micro",
        2,
        "--grid",
        3,
        "--preview-every",
        2,
        "--lr",
        "1e-3",
    ]
    said = dict(
        embed=script(
            "embed.py", *data, "--vlm", VLM, "--users", out / "users", "--batch", 3, **env
        ),
        rewards=script(
            "embed.py",
            *data,
            "--one-hot",
            "clip",
            "aesthetic",
            "hps",
            "--users",
            out / "onehot",
            **env,
        ),
        train=script(
            "train.py", *base, "--users", out / "users", "--out", out / "run", *few, **env
        ),
        train_onehot=script(
            "train.py", *base, "--users", out / "onehot", "--out", out / "run-onehot", *few, **env
        ),
    )
    user = sorted((out / "users").glob("*.pt"))[0]
    said["sample"] = script(
        "sample.py",
        "--user",
        user,
        "--user",
        "zero",
        "--adapter",
        out / "run",
        "--prompts",
        "nateraw/parti-prompts",
        "--steps",
        2,
        "--out",
        out / "pictures",
        **env,
    )
    said["evaluate"] = script(
        "evaluate.py",
        "rewards",
        "--adapter",
        out / "run-onehot",
        "--prompts",
        "nateraw/parti-prompts",
        "--steps",
        2,
        "--batch",
        4,
        **env,
    )
    said["judge"] = script(
        "evaluate.py",
        "judge",
        "--adapter",
        out / "run",
        "--steps",
        2,
        "--batch",
        4,
        "--n",
        3,
        **env,
    )
    return out, {k: v.stdout + v.stderr for k, v in said.items()}


def test_the_whole_way(full_run, hub):
    out, said = full_run
    users = [ppd.load_user(p) for p in sorted((out / "users").glob("*.pt"))]
    assert len(users) > 8 and all(
        u["embedding"].shape[1:] == (1, 48) and u["vlm"] == VLM for u in users
    )
    assert re.search(r"[1-9]\d* have fewer than 4 choices", said["embed"]) and re.search(
        r"a group of 4 is left out: data/train-\d+-of-00002.parquet row \d+ jpg_1", said["embed"]
    )
    assert re.search(r"^train +\d+ +\d+ +\d+$", said["embed"], re.M) and re.search(
        r"dropped: tie or no label +\d+", said["embed"]
    )
    assert (
        "HPS v2.1" in said["rewards"]
        and "skipped: " in said["rewards"]
        and re.search(r"[1-9]\d* with a broken picture", said["rewards"])
    )
    for run, width in (("run", 48), ("run-onehot", 3)):
        adapter = ppd.UserAdapter.load(out / run)
        first = json.loads((out / run / "train.jsonl").read_text().splitlines()[0])
        assert (
            adapter.header["base"] == PRIOR
            and adapter.user_dim == width
            and len(adapter.channels) == 4
            and first["loss"] == pytest.approx(np.log(2), abs=1e-6)
        )
        assert (out / run / "previews" / "step-000002.png").exists()
    pictures = [p for p in (out / "pictures").glob("*.png") if p.name != "grid.png"]
    assert (
        len(pictures) == 4
        and Image.open(pictures[0]).size == (256, 256)
        and '"prompt": "\\"a red star\\" on a wall"'
        in " ".join(Image.open(p).text["ppd"] for p in pictures)
    )
    result = json.loads((out / "run-onehot" / "evaluation.json").read_text())
    assert result["rewards"]["models"] == {
        k: embed.REWARDS[k][0] for k in ("clip", "aesthetic", "hps")
    }
    assert (
        all(v["base"]["n"] == 2 for v in result["rewards"]["figure_3"].values())
        and "fidelity" not in result["rewards"]["table_1"]["PPD"]
    )
    judged = json.loads((out / "run" / "evaluation.json").read_text())["judge"]
    assert judged["judge"] == VLM and all(
        judged["people"]["all"][k] + judged["people"]["all"]["n"] <= 6
        for k in ("inconsistent", "unparsable")
    )


def test_scores_are_kept_and_used(full_run, hub):
    files = sorted((full_run[0] / "onehot" / "scores").glob("*.npz"))
    pairs, _ = embed.read_pairs(full_run[0] / "onehot")
    kept = {}
    for file in map(np.load, files):
        for i, ranking in enumerate(file["ranking_ids"].tolist()):
            kept[ranking] = {name: file[name][i].tolist() for name in ("clip", "aesthetic", "hps")}
    assert pairs and all(
        kept[p["ranking_id"]][p["user"]] == [p["score_0"], p["score_1"]]
        and p["preferred"] == int(p["score_1"] > p["score_0"])
        for p in pairs
    )
    for file in files:  # a second run takes them as they are
        with np.load(file) as old:
            np.savez(file, **{k: old[k] + (old[k].dtype == np.float32) for k in old.files})
    (full_run[0] / "onehot" / "pairs.parquet").unlink()
    script(
        "embed.py",
        "--data",
        "someone/pick-a-pic-v2",
        "--one-hot",
        "clip",
        "aesthetic",
        "hps",
        "--users",
        full_run[0] / "onehot",
        **hub[1],
    )
    again, _ = embed.read_pairs(full_run[0] / "onehot")
    assert [p["score_0"] for p in again] == pytest.approx([p["score_0"] + 1 for p in pairs])


def test_lite_and_a_folder_load_too(hub):
    lite = ppd.StableCascade(
        f"{snapshot(hub, PRIOR)}:prior_lite", decoder=str(snapshot(hub, STAGES)), grid=3
    )
    assert lite.channels == [64] * 4 and (lite.steps, lite.guidance, lite.latent_shape) == (
        30,
        4.0,
        (16, 3, 3),
    )


@pytest.mark.parametrize(
    "argument, message",
    [
        (["--base", "stabilityai/not-there"], "--base stabilityai/not-there: cannot load"),
        (["--base", PRIOR + ":prior_tiny"], "cannot load stabilityai/stable-cascade-prior"),
        (
            ["--base", PRIOR, "--decoder", "someone/nothing"],
            "cannot get effnet_encoder.safetensors",
        ),
    ],
)
def test_missing_checkpoints_get_one_line(argument, message, hub, full_run, tmp_path):
    done = script(
        "train.py",
        "--users",
        full_run[0] / "users",
        "--out",
        tmp_path,
        *argument,
        "--device",
        "cpu",
        "--grid",
        3,
        "--max-steps",
        1,
        "--batch",
        1,
        check=False,
        **hub[1],
    )
    assert done.returncode and message in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------- against the library's own
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


def test_sampling_equals_the_stock_pipeline(base):
    pipeline, prompts, seeds = stock_pipeline(base), ["a red star", "a fox in the snow"], [3, 8]
    theirs = pipeline(
        prompts,
        height=128,
        width=128,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(s) for s in seeds],
    ).image_embeddings
    assert (base.sample(prompts, seeds, steps=3) - theirs).abs().max() == 0
    adapter = ppd.UserAdapter(5, base.channels).install(base.prior)  # V' = 0
    assert (
        base.sample(prompts, seeds, adapter, adapter(torch.randn(2, 5)), steps=3) - theirs
    ).abs().max() == 0


def test_noise_prediction_equals_the_stock_pipelines(base):
    seen, pipeline = [], stock_pipeline(base)
    handle = base.prior.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((kwargs, out)), with_kwargs=True
    )
    pipeline(
        ["a red star"],
        height=128,
        width=128,
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
    )
    handle.remove()
    kwargs, out = seen[1]
    text, pooled = (
        torch.cat(pair)
        for pair in zip(base.encode_prompts(["a red star"]), base.encode_prompts([""]))
    )
    with torch.no_grad():
        ours = base.predict_noise(kwargs["sample"], kwargs["timestep_ratio"], text, pooled)
    assert (ours - out[0]).abs().max() == 0


def test_adapter_in_a_stock_pipeline(base):
    """The README's snippet: both halves of guidance see the person, as `same` does here."""
    adapter = ppd.UserAdapter(5, base.channels)
    torch.manual_seed(0)
    for layer in adapter.to_v:
        torch.nn.init.normal_(layer.weight, std=0.3)
    pipeline, person = stock_pipeline(base), torch.randn(1, 5)
    adapter.install(pipeline.prior)
    with torch.no_grad(), adapter.user(adapter(person)):
        theirs = pipeline(
            "a red star",
            height=128,
            width=128,
            num_inference_steps=2,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(1),
        ).image_embeddings
    ours = base.sample(["a red star"], [1], adapter, adapter(person).detach(), steps=2)
    assert torch.allclose(ours, theirs, atol=1e-5) and not torch.allclose(
        ours, base.sample(["a red star"], [1], steps=2), atol=1e-2
    )


def test_encoder_equals_torchvisions(base, hub):
    from safetensors.torch import load_file
    from torchvision.models import efficientnet_v2_s
    from torchvision.transforms.functional import normalize, to_tensor

    state = load_file(snapshot(hub, STAGES) / "effnet_encoder.safetensors")
    assert len(state) == 784
    net = efficientnet_v2_s(weights=None).eval()
    net.features.load_state_dict(
        {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    )
    image = tiny.draw_random(np.random.default_rng(0), "a red star").resize((96, 96))
    with torch.no_grad():
        x = net.features(
            normalize(to_tensor(image)[None], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        x = torch.nn.functional.conv2d(x, state["mapper.0.weight"])
        want = (x - state["mapper.1.running_mean"].view(-1, 1, 1)) / (
            state["mapper.1.running_var"].view(-1, 1, 1) + 1e-5
        ).sqrt()
    got = base.encode_images([image])
    assert got.shape == (1, 16, 3, 3) and torch.allclose(got, want, atol=1e-4, rtol=1e-4)
    assert base.encode_images([image.resize((200, 120))]).shape == got.shape
    big = ppd.CascadeCodec(
        snapshot(hub, STAGES), torch.device("cpu"), torch.float32, None, None, 24
    )
    pixels = ppd.fit_pixels([image], *big.fit)
    assert pixels.shape == (1, 3, 768, 768) and big.encode(pixels / 255).shape == (
        1,
        *big.latent_shape,
    ) == (1, 16, 24, 24)


def test_decoding_needs_caption_and_seed_only(base):
    latents = base.sample(["a red star", "a blue circle"], [0, 1], steps=2)
    both, alone = (
        base.decode(latents, ["a red star", "a blue circle"], [0, 1]),
        base.decode(latents[1:], ["a blue circle"], [1]),
    )
    assert (
        both[1].size == (128, 128)
        and np.abs(np.asarray(both[1], int) - np.asarray(alone[0], int)).max() <= 1
    )


# -------------------------------------------------------------------------------------------------------- the rewards
@pytest.fixture
def pictures():
    rng = np.random.default_rng(5)
    return [tiny.draw_random(rng, c).resize((70, 64)) for c in tiny.CAPTIONS[:5]], tiny.CAPTIONS[:5]


@pytest.fixture
def cached(hub, monkeypatch):
    """The same hub cache for this process, whose huggingface_hub has read its environment already."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: hub[1]["TORCH_HOME"] + "/hub")
    local = lambda where, name, kind="model": snapshot(hub, where) / name
    monkeypatch.setattr(embed, "hub_file", local)
    monkeypatch.setattr(
        embed,
        "REWARDS",
        {
            k: (title, str(snapshot(hub, repository)) if not file else repository, file)
            for k, (title, repository, file) in embed.REWARDS.items()
        },
    )
    embed.load_reward.cache_clear()
    yield
    embed.load_reward.cache_clear()


def test_clip_scores_are_logits_over_the_scale(cached, pictures):
    from transformers import CLIPProcessor

    for name, seed in (("clip", 0), ("pickscore", 2)):
        model = small_clip(seed)
        processor = CLIPProcessor.from_pretrained(embed.REWARDS["clip"][1])
        with torch.no_grad():
            logits = model(
                **processor(text=pictures[1], images=pictures[0], padding=True, return_tensors="pt")
            ).logits_per_image
        want = 100 * logits.diagonal() / model.logit_scale.detach().exp()
        assert np.allclose(embed.score(name, *pictures), want, atol=1e-4) and np.allclose(
            embed.score(name, *pictures, batch=2), want, atol=1e-4
        )


def test_aesthetic_is_the_head_on_the_normalised_image(cached, pictures, hub):
    from transformers import CLIPProcessor

    inputs = CLIPProcessor.from_pretrained(embed.REWARDS["clip"][1]).image_processor(
        pictures[0], return_tensors="pt"
    )
    with torch.no_grad():
        x = small_clip(1).get_image_features(**inputs).pooler_output
        x = x / x.norm(dim=-1, keepdim=True)
        state = torch.load(
            hub[1]["TORCH_HOME"] + "/hub/checkpoints/" + embed.AESTHETIC, weights_only=True
        )
        for i in (0, 2, 4, 6, 7):
            x = x @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    assert np.allclose(embed.score("aesthetic", *pictures), x[:, 0], atol=1e-3)


def test_hps_round_trip(cached):
    model = small_clip(5)
    state = embed.from_open_clip(to_open_clip(model))
    assert state.keys() == {k for k in model.state_dict() if "position_ids" not in k} and all(
        torch.equal(v, model.state_dict()[k]) for k, v in state.items()
    )
    assert embed.load_reward("hps", "cpu")[0].state_dict()[
        "logit_scale"
    ] == model.logit_scale and embed.load_reward("hps2.0", "cpu") is not embed.load_reward(
        "hps", "cpu"
    )


def test_hps_conversion_equals_open_clips_own_forward():
    pytest.importorskip(
        "open_clip", reason="pip install open_clip_torch to compare with open_clip itself"
    )
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    theirs = CLIP(
        embed_dim=24,
        vision_cfg=CLIPVisionCfg(layers=3, width=40, head_width=20, patch_size=14, image_size=56),
        text_cfg=CLIPTextCfg(context_length=77, vocab_size=514, width=32, heads=4, layers=2),
    ).eval()
    ours = small_clip(0)
    ours.load_state_dict(
        embed.from_open_clip({k: v for k, v in theirs.state_dict().items() if k != "attn_mask"})
    )
    ids = torch.randint(1, 512, (3, 77))
    ids[:, 0], ids[:, 9], ids[:, 10:] = 512, 513, 0
    pixels = torch.randn(3, 3, 56, 56)
    with torch.no_grad():
        image, text = (
            theirs.encode_image(pixels, normalize=True),
            theirs.encode_text(ids, normalize=True),
        )
        out = ours(input_ids=torch.where(ids == 0, 513, ids), pixel_values=pixels)
    assert torch.allclose(image, out.image_embeds, atol=1e-5) and torch.allclose(
        text, out.text_embeds, atol=1e-5
    )


# --------------------------------------------------------------------------------------------------------- full sizes
def test_full_sizes_on_the_meta_device():
    from diffusers import StableCascadeUNet

    counts = {}
    for name, count, layers in (("prior", 3_589_103_632, 64), ("prior_lite", 1_030_785_040, 32)):
        with torch.device("meta"):
            prior = StableCascadeUNet(**FULL, **SIZES[name])
            widths = [layer.to_q.in_features for layer in ppd.attention_layers(prior)]
            adapter = ppd.UserAdapter(3584, widths, tokens=4, token_dim=1024).install(prior)
        assert sum(p.numel() for p in prior.parameters()) == count and len(widths) == layers
        counts[name] = sum(p.numel() for p in adapter.parameters())
        project = 3584 * 4096 + 4096 + 2 * 1024
        assert counts[name] == project + layers * 2 * 1024 * widths[0]
    print("adapter parameters", counts)
    with torch.device("meta"):
        from torchvision.models import efficientnet_v2_s

        assert len(efficientnet_v2_s(weights=None).features.state_dict()) + 4 == 784


def test_llava_prompt_at_its_real_sizes():
    """384 px tiles of 14 px patches: 730 tokens a picture, eight of them, each beside its own caption and label."""
    from transformers import (
        AutoTokenizer,
        LlavaOnevisionConfig,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        SiglipVisionConfig,
    )
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    tok = AutoTokenizer.from_pretrained(ppd.TINY / "vlm")
    how = dict(size={"height": 384, "width": 384}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(**how),
        tokenizer=tok,
        video_processor=LlavaOnevisionVideoProcessor(),
        num_image_tokens=729,
        vision_feature_select_strategy="full",
    )

    class Model:
        config = LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(image_size=384, patch_size=14)
        )
        device, dtype = torch.device("cpu"), torch.float32

    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 255, (512, 512 + 64 * i, 3), dtype=np.uint8))
        for i in range(8)
    ]
    captions = ["a red star", "a blue cross", "a pink circle", "an orange square"]
    text = embed.prompt(captions, "profile")
    ours, theirs = (
        embed.vlm_inputs((Model, tok, LlavaOnevisionImageProcessorPil(**how)), [text], [images]),
        processor(images=[images], text=[text], return_tensors="pt"),
    )
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist() and ours[
        "batch_num_images"
    ].tolist() == [8]
    assert (ours["input_ids"] == tok.convert_tokens_to_ids("<image>")).sum() == 8 * 730 and ours[
        "pixel_values"
    ].shape == theirs["pixel_values"].shape
    for i, caption in enumerate(captions, 1):
        assert f"Pair {i}. Caption: {caption}\nPreferred: <image>\nDispreferred: <image>" in text


# ----------------------------------------------------------------------------------------------------- a big data set
def test_splits_read_no_pictures(tmp_path):
    """20,000 rows with pictures: memory stays, and of 330 MB of files only the metadata is read."""
    rng, rows = np.random.default_rng(0), 20_000
    noise = rng.integers(0, 256, 1 << 20, dtype=np.uint8).tobytes()
    text = lambda form: [form.format(i) for i in range(rows)]
    bits = lambda: [noise[k : k + 8000] for k in rng.integers(0, 1 << 19, rows)]
    table = pa.table(
        dict(
            are_different=[True] * rows,
            best_image_uid=text("{}a"),
            caption=[f"caption {i % 2000}" for i in range(rows)],
            created_at=pa.array(range(rows), pa.timestamp("ns")),
            has_label=[True] * rows,
            image_0_uid=text("{}a"),
            image_0_url=[""] * rows,
            image_1_uid=text("{}b"),
            image_1_url=[""] * rows,
            jpg_0=bits(),
            jpg_1=bits(),
            label_0=rng.choice([0.0, 0.5, 1.0], rows),
            label_1=[0.0] * rows,
            model_0=["m"] * rows,
            model_1=["m"] * rows,
            ranking_id=range(rows),
            user_id=rng.integers(0, 300, rows),
            num_example_per_prompt=[1] * rows,
            __index_level_0__=range(rows),
        )
    )
    for name, parts in (("one", 1), ("four", 4)):
        (tmp_path / name).mkdir()
        for i in range(parts):
            pq.write_table(
                table.slice(i * rows // parts, rows // parts),
                tmp_path / name / f"train-{i:05d}.parquet",
                row_group_size=1000,
            )
    code = """
import resource, sys, embed
read = lambda: int(next(l for l in open('/proc/self/io') if l.startswith('rchar')).split()[1])
memory, before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, read()
rows, dropped = embed.split_rows(embed.read_rows(sys.argv[1]), 0.1, 0.2, 0.25)
sys.stderr.write(f"{(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024:.0f} {(read() - before) / 2**20:.1f}")
embed.print_table(rows, dropped)
"""
    tables = []
    for name in ("one", "four", "one"):
        done = script("-c", code, tmp_path / name)
        memory, megabytes = map(float, done.stderr.split())
        assert memory < 512 and megabytes < 20, (memory, megabytes)
        tables.append(done.stdout)
    assert (
        len(set(tables)) == 1 and (tmp_path / "one" / "train-00000.parquet").stat().st_size > 300e6
    )


# -------------------------------------------------------------------------------------------------------------- judge
class Judge(BaseHTTPRequestHandler):
    mode, asked, seen = "light", 0, {}

    def do_POST(self):
        type(self).asked += 1
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen[body] = self.seen.get(body, 0) + 1
        question = json.loads(body)
        parts = question["messages"][0]["content"]
        assert (
            self.headers["Authorization"] == "Bearer secret"
            and question["model"] == "some-judge"
            and sum(p["type"] == "image_url" for p in parts) == 10
        )
        assert parts[0]["text"].startswith(embed.INTRO) and not any(
            "<image>" in p.get("text", "") or "<|im" in p.get("text", "") for p in parts
        )
        last = [
            Image.open(io.BytesIO(base64.b64decode(p["image_url"]["url"].split(",")[1])))
            for p in parts
            if p["type"] == "image_url"
        ][-2:]
        light = [np.asarray(image.convert("L")).mean() for image in last]
        status, text = 200, f"They like light pictures. CHOICE: {1 if light[0] > light[1] else 2}"
        if self.mode == "first":
            text = "CHOICE: 1"
        elif self.mode == "garbage":
            text = "I would rather not say."
        elif (
            self.mode == "failing" or self.mode == "busy" and self.seen[body] < 3
        ):  # every question is turned away twice
            status = 503 if self.mode == "failing" else 429
        elif self.mode == "forbidden":
            status, text = 401, "wrong key"
        body = json.dumps(
            dict(choices=[dict(message=dict(content=text))]) if status == 200 else dict(error=text)
        ).encode()
        if self.mode == "torn":
            body = b"{not json"
        if self.mode == "slow":
            threading.Event().wait(0.7)
        try:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)
        except BrokenPipeError:
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def judge(people, tmp_path, monkeypatch):
    """evaluate.py judge on the small world against a local server: judge(mode, *flags) -> results."""
    import train

    run = tmp_path / "run"
    train.main(
        [
            "--users",
            str(people[1]),
            "--out",
            str(run),
            "--max-steps",
            "2",
            "--batch",
            "8",
            "--micro",
            "8",
            "--preview-every",
            "0",
            "--device",
            "cpu",
        ]
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "secret")

    def ask(mode, *flags, out=None):
        Judge.mode, Judge.asked = mode, 0
        Judge.seen.clear()
        evaluate.main(
            [
                "judge",
                "--adapter",
                str(run),
                "--judge",
                "some-judge",
                "--judge-url",
                f"http://127.0.0.1:{server.server_port}/v1",
                "--judge-wait",
                "0.01",
                "--n",
                "3",
                "--steps",
                "2",
                "--out",
                str(tmp_path / (out or mode)),
                *flags,
            ]
        )
        result = json.loads((tmp_path / (out or mode) / "evaluation.json").read_text())["judge"]
        return dict(result["people"], accuracy=result["accuracy"])

    yield ask
    server.shutdown()


def test_judges_good_and_bad(judge):
    good = judge("light")
    assert (
        good["all"]["n"] == 6
        and good["seen"]["n"] == good["unseen"]["n"] == 3
        and good["all"]["inconsistent"] == good["all"]["unparsable"] == 0
    )
    assert good["accuracy"]["n"] == 6 and Judge.asked == 24
    biased = judge("first")
    assert biased["all"] == dict(rate=None, n=0, ci95=None, inconsistent=6, unparsable=0)
    for mode in ("garbage", "torn"):
        assert judge(mode)["all"] == dict(rate=None, n=0, ci95=None, inconsistent=0, unparsable=6)
    busy = judge("busy")
    assert busy == good and Judge.asked == 3 * 24


def test_a_judge_that_fails_keeps_what_is_done(judge, tmp_path):
    for mode, message in (("failing", "HTTP 503"), ("slow", "imed"), ("forbidden", "HTTP 401")):
        with pytest.raises(SystemExit) as stop:
            judge(mode, "--judge-timeout", "0.2", out="kept")
        assert (
            stop.value.code.startswith("evaluate.py: error: --judge-url")
            and message in stop.value.code
            and "\n" not in stop.value.code
            and "secret" not in stop.value.code
        )
        assert (Judge.asked <= 4) == (mode == "forbidden")
    done = judge("light", out="kept")
    assert (
        judge("failing", out="kept") == done and Judge.asked == 0
    )  # all judged already: nothing is asked
    with pytest.raises(SystemExit, match="was begun with seed"):
        judge("light", "--seed", "1", out="kept")


# ------------------------------------------------------------------------------------------------------------ captions
def test_prompts_from_files(tmp_path):
    (tmp_path / "p.tsv").write_text('Prompt\tCategory\n"quoted" one\tx\ntwo\t"y\n')
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    assert sample.read_prompts(tmp_path / "p.tsv") == [
        '"quoted" one',
        "two",
    ] and sample.read_prompts(tmp_path / "p.txt") == ["one", "two"]
    assert (
        next(csv.reader(['"quoted" one\tx'], delimiter="\t"))[0] != '"quoted" one'
    )  # what default quoting would make of it
    (tmp_path / "bad.tsv").write_text("Caption\nx\n")
    with pytest.raises(ppd.BadInput, match="Prompt column"):
        sample.read_prompts(tmp_path / "bad.tsv")


# ------------------------------------------------------------------------------------------------------------------ GPU
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_full_size_prior_on_a_gpu():
    from diffusers import StableCascadeUNet

    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        prior = StableCascadeUNet(**FULL, **SIZES["prior_lite"]).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
    adapter = ppd.UserAdapter(3584, [1536] * 32, 4, 1024).install(prior)
    with adapter.user(adapter(torch.randn(1, 3584, device="cuda"))):
        out = prior(
            torch.randn(2, 16, 24, 24, device="cuda", dtype=torch.bfloat16),
            torch.rand(2, device="cuda", dtype=torch.bfloat16),
            clip_text_pooled=torch.randn(2, 1, 1280, device="cuda", dtype=torch.bfloat16),
            clip_text=torch.randn(2, 77, 1280, device="cuda", dtype=torch.bfloat16),
            clip_img=torch.zeros(2, 1, 768, device="cuda", dtype=torch.bfloat16),
        ).sample
        out.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in adapter.to_v.parameters())


def test_hub_ids():
    assert (
        ppd.is_hub_id("stabilityai/stable-cascade")
        and not ppd.is_hub_id("tests")
        and not ppd.is_hub_id("tests/conftest.py")
        and not ppd.is_hub_id("/a/b")
    )
    assert os.path.isdir("assets/tiny") and not ppd.is_hub_id("assets/tiny")
