"""The other bases: SDXL and Sana, small and random, in the hub's layout, against diffusers' own
pipelines; and the adapter as an IP-Adapter that any SDXL pipeline loads."""

import contextlib
import inspect
import json
import shutil
import subprocess
import sys

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from test_full_scale import RED_STAR, small_text_encoder, small_tokenizer

import bench
import embed
import sample
import train
from bases import load_base
from bases.ip_adapter import export, push
from bases.sdxl import StableDiffusionXL
from conftest import call, moved, refusal, run_train
from ppd import UserAdapter
from utils import InputError, read_jsonl

PROMPTS, SEEDS = [RED_STAR, "a fox in the snow"], [3, 8]


def save_sdxl(folder, **scheduler):
    """A random SDXL of two levels and four cross-attention layers, also in half precision."""
    torch.manual_seed(0)
    levels = dict(block_out_channels=(32, 64), norm_num_groups=8, layers_per_block=1)
    kinds = dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"))
    kinds |= dict(up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=64)
    sizes = dict(sample_size=16, transformer_layers_per_block=(1, 1), attention_head_dim=(2, 4))
    sizes |= dict(addition_time_embed_dim=8, projection_class_embeddings_input_dim=8 * 6 + 32)
    halves = dict(down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(16, 32))
    halves |= dict(up_block_types=("UpDecoderBlock2D",) * 2)
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    second = small_tokenizer()
    second.pad_token = "!"  # as in the release: the two pad otherwise
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=diffusers.AutoencoderKL(**levels | halves),
        text_encoder=small_text_encoder(transformers.CLIPTextModel),
        text_encoder_2=small_text_encoder(),
        unet=diffusers.UNet2DConditionModel(**bench.XL | levels | kinds | sizes),
        scheduler=diffusers.EulerDiscreteScheduler(**betas, **scheduler),
        tokenizer=small_tokenizer(),
        tokenizer_2=second,
    )
    pipeline.save_pretrained(folder)
    pipeline.to(torch.float16).save_pretrained(folder, variant="fp16")
    return folder


def save_sana(folder):
    """A random Sana of two blocks."""
    torch.manual_seed(0)
    letters = [chr(i) for i in range(32, 127)] + ["\u2581", "\n"]
    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *letters])}
    sizes = dict(hidden_size=8, head_dim=4, intermediate_size=16, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, vocab_size=len(vocab))
    text = transformers.Gemma2Model(transformers.Gemma2Config(**sizes, **heads)).eval()
    blocks = dict(block_types=("ResBlock", "EfficientViTBlock"), block_out_channels=(8, 8))
    blocks |= dict(qkv_multiscales=((), (5,)), layers_per_block=(1, 1))
    blocks = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in blocks.items()}
    vae = dict(latent_channels=4, attention_head_dim=2, downsample_block_type="conv")
    vae |= dict(upsample_block_type="interpolate", scaling_factor=0.4)
    vae |= dict(decoder_act_fns="silu", decoder_norm_types="rms_norm")
    sizes = dict(in_channels=4, out_channels=4, sample_size=16, num_layers=2, caption_channels=8)
    sizes |= dict(num_attention_heads=2, attention_head_dim=4, num_cross_attention_heads=2)
    sizes |= dict(cross_attention_head_dim=4, cross_attention_dim=8)
    sizes["qk_norm"] = "rms_norm_across_heads"  # of queries and keys: some have it
    flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    diffusers.SanaPipeline(
        tokenizer=transformers.GemmaTokenizer(vocab=vocab, merges=[]),
        text_encoder=text,
        vae=diffusers.AutoencoderDC(**blocks, **vae),
        transformer=diffusers.SanaTransformer2DModel(**sizes).eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler(**flow),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return save_sdxl(tmp_path_factory.mktemp("sdxl") / "small")


@pytest.fixture(scope="module")
def sana(tmp_path_factory):
    return save_sana(tmp_path_factory.mktemp("sana") / "small")


def stock_pipeline(folder):
    # as the release's, the text encoders' configs say float16
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if hasattr(pipeline, "transformer"):  # PyTorch takes another attention for weights that train
        pipeline.transformer.requires_grad_(False)
    return pipeline


def stock(folder, **settings):
    pipeline = stock_pipeline(folder)
    generator = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    how = dict(num_inference_steps=3, generator=generator, output_type="latent")
    with torch.no_grad():
        return pipeline(PROMPTS, **how, **settings).images


def moving_adapter(base, width=5):
    torch.manual_seed(1)
    sizes = dict(tokens=4, token_dim=base.token_dim)
    return moved(UserAdapter(width, base.channels, **sizes).install(base.attention_layers()))


@pytest.mark.parametrize("kind", ["sdxl", "sana"])
def test_sampling_equals_the_stock_pipelines(kind, sdxl, sana):
    folder = sdxl if kind == "sdxl" else sana
    base = load_base(str(folder))
    size = dict(height=base.image_size, width=base.image_size)
    size |= dict(use_resolution_binning=False) if kind == "sana" else {}
    theirs = stock(folder, guidance_scale=base.guidance, **size)
    assert (base.sample(PROMPTS, SEEDS, steps=3) - theirs).abs().max() == 0
    adapter = UserAdapter(5, base.channels, 4, base.token_dim).install(base.attention_layers())
    tokens = adapter(torch.randn(2, 5)).detach()
    still = base.sample(PROMPTS, SEEDS, adapter, tokens, steps=3)  # V' at zero
    assert (still - theirs).abs().max() == 0
    moved(adapter)
    off = base.sample(PROMPTS, SEEDS, adapter, tokens, user_scale=0.0, steps=3)
    assert (off - theirs).abs().max() == 0
    on = base.sample(PROMPTS, SEEDS, adapter, tokens, steps=3)
    assert (on - theirs).abs().max() > 0.05
    alone = base.sample(PROMPTS[1:], SEEDS[1:], adapter, tokens[1:], steps=3)
    assert torch.allclose(on[1:], alone, atol=1e-4)  # each their own user
    assert base.decode(on, PROMPTS, SEEDS)[0].size == (base.image_size,) * 2


def test_predictions_equal_the_stock_networks(sdxl, sana):
    """At one noise and timestep, of what the pipelines make of a caption; and Sana's noise."""
    noise, t = torch.randn(2, 4, 16, 16), torch.tensor([0.4, 0.4])
    base, pipeline = load_base(str(sdxl)), stock_pipeline(sdxl)
    text, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    side = base.image_size
    sizes = torch.tensor([[side, side, 0, 0, side, side]] * 2, dtype=torch.float32)
    known = dict(added_cond_kwargs=dict(text_embeds=pooled, time_ids=sizes), return_dict=False)
    with torch.no_grad():
        theirs = pipeline.unet(noise, torch.tensor(399), text, **known)[0]
        ours = base.predict(noise, t, *base.encode_prompts(PROMPTS))
    assert (ours - theirs).abs().max() == 0
    base, pipeline = load_base(str(sana)), stock_pipeline(sana)
    call_defaults = inspect.signature(pipeline.__call__).parameters
    instruction = call_defaults["complex_human_instruction"].default
    how = dict(do_classifier_free_guidance=False, complex_human_instruction=instruction)
    text, mask, _, _ = pipeline.encode_prompt(PROMPTS, **how)
    sigma = 3 * 0.4 / (1 + 2 * 0.4)  # after the shift
    with torch.no_grad():
        at = torch.full((2,), 1000 * sigma)
        theirs = pipeline.transformer(noise, text, at, encoder_attention_mask=mask)[0]
        ours = base.predict(noise, t, *base.encode_prompts(PROMPTS))
    assert torch.allclose(ours, theirs, atol=1e-6)
    latents = torch.randn_like(noise)
    x_t = base.add_noise(latents, noise, t)
    assert torch.allclose(x_t, (1 - sigma) * latents + sigma * noise, atol=1e-6)
    assert torch.equal(base.target(latents, noise, t), noise - latents)


@pytest.mark.parametrize("kind", ["sdxl", "sana"])
def test_training_on_cached_latents_starts_at_ln_2(kind, sdxl, sana, world, tmp_path):
    base = sdxl if kind == "sdxl" else sana
    flags = ["--base", base, "--latents", tmp_path / "latents"]
    call(embed, "--cache-latents", "--users", world[1], *flags)
    run_train(world[1], tmp_path / "run", *flags, "--max-steps", 1, "--preview-every", 0)
    (line,) = read_jsonl(tmp_path / "run" / "train.jsonl")
    assert line["loss"] == pytest.approx(np.log(2), abs=1e-6)
    parts = line["validation_errors_by_t"]
    assert [part["t"][0] for part in parts] == pytest.approx([0.001, 0.25075, 0.5005, 0.75025])
    mean = np.mean([part["error_preferred"] for part in parts])
    assert mean == pytest.approx(line["validation_error_preferred"], rel=0.5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_sdxls_noise_and_target_are_ddpms(prediction_type, tmp_path):
    base = load_base(str(save_sdxl(tmp_path / "s", prediction_type=prediction_type)))
    ddpm = diffusers.DDPMScheduler.from_pretrained(tmp_path / "s", subfolder="scheduler")
    latents, noise = torch.randn(2, 4, *base.latent_shape)
    t = torch.tensor([0.001, 0.5, 0.9995, 1.0])
    steps = torch.tensor([0, 499, 999, 999])
    want = ddpm.add_noise(latents, noise, steps)
    assert torch.allclose(base.add_noise(latents, noise, t), want, atol=1e-6)
    velocity = ddpm.get_velocity(latents, noise, steps)
    target = velocity if prediction_type == "v_prediction" else noise
    assert torch.allclose(base.target(latents, noise, t), target, atol=1e-6)


def test_an_adapter_trains_on_sdxl_and_stock_diffusers_loads_it(
    sdxl, world, tmp_path, monkeypatch, capsys
):
    run, file, user = tmp_path / "run", tmp_path / "x" / "taste.safetensors", world[1] / "warm.pt"
    monkeypatch.setattr(StableDiffusionXL, "steps", 4)  # of the preview
    few = "--max-steps 8 --batch 4 --micro 4 --lr 2e-2 --warmup 0 --preview-every 8".split()
    run_train(world[1], run, "--base", sdxl, *few)
    first = read_jsonl(run / "train.jsonl")[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert Image.open(run / "previews" / "step-000008.png").size[0] > 100
    call(sample, "--adapter", run, "--user", user, "--export", file)
    assert "-> " in capsys.readouterr().out
    state = load_file(file)
    assert state["image_proj.proj.weight"].shape == (4 * 64, 3)
    assert state["ip_adapter.1.to_k_ip.weight"].shape[1] == 64
    base = load_base(str(sdxl))
    adapter = UserAdapter.load(run).install(base.attention_layers())
    assert json.dumps(adapter.header["recipe"]) in file.with_suffix(".md").read_text()
    with torch.no_grad():
        tokens = adapter(sample.load_user_embedding(adapter, user))
    # a process that cannot import this project
    lines = "import sys\n" + card_lines(file.parent)
    lines += 'assert not {"ppd", "bases", "sample"} & set(sys.modules)'
    command = [sys.executable, "-I", "-c", lines]
    done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_stock_equals(base, adapter, tokens, file.parent)


# after a model card's own lines: the latents at three strengths
AT_THREE = """
how = dict(num_inference_steps=3, guidance_scale=5.0, output_type="latent")
for scale in (1.0, 0.5, 0.0):
    pipeline.set_ip_adapter_scale(scale)
    how["generator"] = torch.Generator().manual_seed(3)
    latents = pipeline("a red star", ip_adapter_image_embeds=[both], **how).images
    torch.save(latents, f"{scale}.pt")
"""


def card_lines(folder):
    return next(folder.glob("*.md")).read_text().split("```python\n")[1].split("```")[0] + AT_THREE


def assert_stock_equals(base, adapter, tokens, folder):
    """What stock diffusers made by a model card's lines are the images of sample(), and the base's
    at strength 0."""
    plain = base.sample([RED_STAR], [3], steps=3)  # the stock pipeline's, see above
    for scale in (1.0, 0.5):
        theirs = torch.load(folder / f"{scale}.pt")
        ours = base.sample([RED_STAR], [3], adapter, tokens, user_scale=scale, steps=3)
        assert torch.allclose(ours, theirs, atol=2e-4) and (theirs - plain).abs().max() > 1e-2
    assert (torch.load(folder / "0.0.pt") - plain).abs().max() == 0


def test_an_exported_user_of_a_vlms_width(sdxl, tmp_path):
    """3,584 wide, and one dimension so far out that it is clamped."""
    base = load_base(str(sdxl))
    adapter = moving_adapter(base, width=3584)
    states = 30 * torch.randn(8, 3584) + 5
    adapter.set_statistics(states)
    user = states[:1].clone()
    user[0, 7] = 1e4
    export(tmp_path / "x.safetensors", adapter, base, dict(them=user))
    with torch.no_grad(), contextlib.chdir(tmp_path):
        exec(card_lines(tmp_path), {})
        assert_stock_equals(base, adapter, adapter(user), tmp_path)


def test_what_is_no_checkpoint_gets_one_line(sdxl, sana, world, tmp_path):
    def refused(name, source, change):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        change(folder)
        said = refusal(train, "--base", folder, "--users", world[1], "--out", tmp_path / "run")
        return said.partition(f"--base {folder}: ")[2]

    def rename(folder, kind):
        text = (folder / "model_index.json").read_text()
        (folder / "model_index.json").write_text(text.replace("StableDiffusionXLPipeline", kind))

    def resample(folder):
        name = "EDMDPMSolverMultistepScheduler"
        index = folder / "model_index.json"
        index.write_text(index.read_text().replace("EulerDiscreteScheduler", name))
        diffusers.EDMDPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")

    def lose(part):
        return lambda folder: shutil.rmtree(folder / part)

    said = refused("img2img", sdxl, lambda folder: rename(folder, "LattePipeline"))
    assert said == "a Latte; expected one of StableCascadePrior, StableDiffusionXL, Sana"
    for name, source in (("tokenizer_2", sdxl), ("tokenizer", sana), ("unet", sdxl)):
        assert refused(name, source, lose(name)).startswith(f"cannot load: {name}: ")
    assert "expected DDIM's or Euler's schedule" in refused("edm", sdxl, resample)
    flags = ["--adapter", "assets/onehot", "--user", "assets/onehot/light.pt", "--export"]
    assert "takes a UNet2DConditionModel's" in refusal(sample, *flags, tmp_path / "x.safetensors")
    assert "ends in .safetensors" in refusal(sample, *flags, tmp_path / "x.bin")


def test_push_to_hub(tmp_path, monkeypatch):
    """What is uploaded, and one line if it cannot be."""
    uploaded, files = [], [tmp_path / "a.safetensors", tmp_path / "a.md"]
    api = huggingface_hub.HfApi
    monkeypatch.setattr(api, "create_repo", lambda self, repository, exist_ok: None)
    monkeypatch.setattr(api, "upload_file", lambda self, **what: uploaded.append(what))
    push(files, "me/taste")
    assert [what["path_in_repo"] for what in uploaded] == ["a.safetensors", "README.md"]

    def fail(self, **what):
        raise RuntimeError("no network\nat all")

    monkeypatch.setattr(api, "upload_file", fail)
    with pytest.raises(InputError, match="^--push-to-hub me/taste: no network at all$"):
        push(files, "me/taste")
