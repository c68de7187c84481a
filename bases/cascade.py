"""The frozen Stable Cascade: Stage C, its text encoder, and the codecs between images and latents.

Stage C (the "prior") denoises 16 x 24 x 24 latents; Stages B and A (the "decoder") make the 1024 px
image of them. What the scripts use of it is listed in bases/__init__.py.
"""

import contextlib
import hashlib
from collections import OrderedDict
from functools import cached_property, partial
from pathlib import Path
from types import MethodType

import einops
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import utils
from bases.images import encode_pixels, fit_pixels
from utils import InputError

BLOCKS = ("SDCascadeResBlock", "SDCascadeAttnBlock", "SDCascadeTimestepBlock")  # Stage C's parts


class StableCascade:
    """Stage C, its text encoder and an image codec, frozen and in eval mode (Stage C has dropout:
    in train mode the policy would not be the reference even at step 0).

    name: "tiny", a hub id or a folder; ":prior_lite" after it picks that subfolder for the prior
    dtype: by default float32 on a CPU, else bfloat16; float16 overflows in Stage C and is refused
    decoder, grid: see CascadeCodec, for a base without a codec of its own
    Raises InputError, naming --base and what is wrong with it.
    """

    token_dim = 1024

    def __init__(self, name="tiny", device="cpu", dtype=None, decoder=None, grid=None):
        import diffusers  # where needed: importing these two takes seconds
        import transformers

        for library in (diffusers, transformers):  # their bars and notices would hide our lines
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
        self.name = str(name)
        self.device = torch.device(device)
        self.dtype = dtype or utils.pick_dtype("auto", device)
        if self.dtype == torch.float16:
            raise InputError("float16 gives NaN in Stage C: use bfloat16 or float32")
        folder, prior = find_base(self.name)
        settings = dict(folder=folder, device=self.device, torch_dtype=self.dtype, variant="bf16")
        load = partial(utils.load_frozen, **settings)
        try:
            self.prior = load(diffusers.StableCascadeUNet, subfolder=prior)
            text_class = transformers.CLIPTextModelWithProjection
            self.text_encoder = load(text_class, subfolder="text_encoder")
            tokenizer_class = transformers.CLIPTokenizer
            self.tokenizer = tokenizer_class.from_pretrained(folder, subfolder="tokenizer")
            self.codec = self.load_codec(self.name, self.device, self.dtype, decoder, grid)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            problem = f"cannot load {folder}: {utils.first_line(error)}"
            raise InputError(f"--base {name}: {problem}") from None
        # Stage B uses Stage C's
        self.codec.text_model = dict(tokenizer=self.tokenizer, text_encoder=self.text_encoder)
        # the last norm and projection in float32: their bfloat16 rounding is as large as what the
        # loss compares, early in training
        self.prior.clf.to(torch.promote_types(self.dtype, torch.float32))
        self.prior.clf.register_forward_pre_hook(in_own_dtype)
        if self.device.type == "cpu":
            for module in self.prior.modules():
                if type(module).__name__ == "GlobalResponseNorm":
                    module.forward = MethodType(response_norm, module)
        self.scheduler = make_scheduler(self.device)
        self.latent_shape = self.codec.latent_shape
        self.image_size = self.codec.image_size
        self.steps = self.codec.default_steps
        self.guidance = self.codec.default_guidance

    @staticmethod
    def load_codec(name, device, dtype, decoder=None, grid=None):
        """The image codec of a base: its own if it has one, else Stable Cascade's."""
        folder, _ = find_base(name)
        if isinstance(folder, Path) and (folder / "codec").is_dir():
            return PatchCodec.load(folder / "codec" / "codec.safetensors").to(device, dtype)
        return CascadeCodec(decoder or "stabilityai/stable-cascade", device, dtype, grid or 24)

    def attention_layers(self):
        """Every attention layer of Stage C, 64 at full size. One softmax covers the image's own
        positions and the text, so these are the paper's "each cross-attention layer"."""
        return attention_layers(self.prior)

    @property
    def channels(self):
        return [layer.to_q.in_features for layer in self.attention_layers()]

    def tokenize(self, captions):
        """Captions -> token ids and attention mask, (2, B, L); L = 77 at full scale."""
        how = dict(padding="max_length", truncation=True, return_tensors="pt")
        encoded = self.tokenizer(list(captions), **how)
        return torch.stack([encoded.input_ids, encoded.attention_mask])

    @torch.no_grad()
    def encode_tokens(self, tokens):
        """tokenize()'s (2, B, L), on the device -> text states (B, L, d), before the encoder's last
        norm, and pooled (B, 1, d)."""
        input_ids, attention_mask = tokens
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        visible = causal & attention_mask.bool()[:, None, None, :]  # (B, 1, L, L)
        # the mask is made here because the library's own waits for the GPU
        mask = torch.zeros_like(visible, dtype=self.dtype)
        mask = mask.masked_fill(~visible, torch.finfo(self.dtype).min)
        out = self.text_encoder(input_ids, attention_mask=mask, output_hidden_states=True)
        return out.hidden_states[-1], out.text_embeds[:, None]

    def encode_prompts(self, captions):
        return self.encode_tokens(self.tokenize(captions).to(self.device))

    @torch.no_grad()
    def encode_pixels(self, pixels):
        """(B, 3, S, S) uint8 on the device -> latents (B, C, h, w) in the base's dtype."""
        return encode_pixels(self.codec, pixels, self.dtype)

    def encode_images(self, images):
        """PIL images -> latents (B, C, h, w); short side resized, centre cropped."""
        pixels = fit_pixels(images, self.codec.image_size, self.codec.resample)
        return self.encode_pixels(pixels.to(self.device))

    @torch.no_grad()
    def decode(self, latents, prompts, seeds):
        """Latents (B, C, h, w) -> B PIL images; captions and seeds (B each) are for Stage B."""
        pixels = self.codec.decode(latents.to(self.dtype), prompts, seeds)
        for prompt, seed, image in zip(prompts, seeds, pixels, strict=True):
            if not image.isfinite().all():
                advice = "a smaller --user-scale or --guidance, or another base"
                raise InputError(f"the image of {prompt!r}, seed {seed}, is not finite: {advice}")
        pixels = einops.rearrange(pixels.float().mul(255).round().byte(), "b c h w -> b h w c")
        return [Image.fromarray(image) for image in pixels.cpu().numpy()]

    def add_noise(self, latents, noise, t):
        """x_t = alpha_t x_0 + sigma_t eps (Sec. 3), all (B, C, h, w); t: (B,) float in (0, 1]."""
        # timesteps as the network will see them: rounded once to its dtype, then in float32
        t = t.to(self.dtype).to(torch.promote_types(self.dtype, torch.float32))
        return self.scheduler.add_noise(latents, noise, t)

    def target(self, latents, noise, t):
        """What predict() should give: Stage C predicts the noise."""
        return noise

    def predict(self, x_t, t, text, pooled):
        """eps_theta(x_t, c, u, t) -> (B, C, h, w); u by adapter.user(), c by encode_tokens."""
        # without clip_img the network silently drops the text tokens as well
        no_image = x_t.new_zeros(len(x_t), 1, self.prior.config.clip_image_in_channels)
        x_t, t = x_t.to(self.dtype), t.to(self.dtype)
        return self.prior(x_t, t, clip_text_pooled=pooled, clip_text=text, clip_img=no_image).sample

    @torch.no_grad()
    def sample(self, prompts, seeds, adapter=None, user_tokens=None, user_scale=1.0, **settings):
        """Ancestral DDPM with classifier-free guidance, whose two branches both see the user.

        prompts: B captions
        seeds: B ints, each the whole randomness of its image, whatever else is in the batch
        user_tokens: (B, L, d), or None for the base
        user_scale: multiplies the user term of Eq. 7; 0 is the base exactly
        settings: steps and guidance; the base's own where they are None or not given
        returns latents (B, C, h, w)
        """
        b = len(prompts)
        steps = settings.get("steps") or self.steps
        guidance = settings.get("guidance")
        guidance = self.guidance if guidance is None else guidance
        conditions = self.encode_prompts(prompts)
        if guidance > 1:  # one batch of 2B, the conditional half first
            unconditional = self.encode_prompts([""] * b)
            conditions = [torch.cat(c) for c in zip(conditions, unconditional, strict=True)]
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        noise = [torch.randn(self.latent_shape, generator=g, dtype=self.dtype) for g in generators]
        x = torch.stack(noise).to(self.device)

        user = contextlib.nullcontext()
        if user_tokens is not None and user_scale != 0:
            user = adapter.user(user_tokens, user_scale)  # B rows serve both halves
        self.scheduler.set_timesteps(timesteps=self.codec.timesteps(steps).to(self.device))
        with user:
            for t in self.scheduler.timesteps[:-1]:  # from 1 on; the last is 0: nothing to do
                t = t.expand(b).to(self.dtype)
                if guidance > 1:
                    both = self.predict(torch.cat([x, x]), torch.cat([t, t]), *conditions)
                    conditional, unconditional = both.chunk(2)
                    noise_pred = torch.lerp(unconditional, conditional, guidance)
                else:
                    noise_pred = self.predict(x, t, *conditions)
                x = self.scheduler.step(noise_pred, t, x, generator=generators).prev_sample
        return x

    def compile_blocks(self):
        """torch.compile every block of Stage C: one graph for each kind of block and use."""
        # with and without gradient, skip connection; shapes of training, validation and previews
        torch._dynamo.config.recompile_limit = 64
        for block in self.prior.modules():
            if type(block).__name__ in BLOCKS:
                block.compile(dynamic=False)


def in_own_dtype(head, inputs):
    """A forward pre-hook: what a network's head gets, in the head's dtype."""
    return (inputs[0].to(head[1].weight.dtype),)


def attention_layers(prior):
    """The attention layers of a StableCascadeUNet, in its own order; diffusers' pipelines too."""
    blocks = [m for m in prior.modules() if type(m).__name__ == "SDCascadeAttnBlock"]
    return [block.attention for block in blocks]


def response_norm(module, x):
    """What diffusers' GlobalResponseNorm makes of x (B, H, W, C), to rounding; theirs takes five
    times as long on a CPU, a fifth of a sampling step."""
    norm = x.square().sum((1, 2), keepdim=True).clamp(min=1e-30).sqrt()  # 0 has no gradient
    x_norm = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
    return torch.addcmul(module.beta, x, 1 + module.gamma * x_norm)


def make_scheduler(device):
    """The release's noise schedule; its constants on the device, or each use would wait for it."""
    from diffusers import DDPMWuerstchenScheduler

    scheduler = DDPMWuerstchenScheduler()
    scheduler.s = scheduler.s.to(device)
    scheduler._init_alpha_cumprod = scheduler._init_alpha_cumprod.to(device)
    return scheduler


def find_base(name):
    """--base -> its folder (a Path) or hub id (a string), and the subfolder of its prior."""
    repo, _, prior = str(name).partition(":")
    prior = prior or "prior"
    if repo == "tiny":  # before any path: a folder of that name stands beside the scripts
        return utils.TINY, prior
    if utils.is_hub_id(repo):
        return repo, prior
    if not (Path(repo) / prior).is_dir():
        expected = f"a folder with {prior}, text_encoder and tokenizer in it"
        missing = f"no folder {Path(repo) / prior}"
        raise InputError(f"--base {name}: {missing}; expected 'tiny', a hub id or {expected}")
    return Path(repo), prior


class CascadeCodec:
    """Stage C's image encoder, and Stages B and A, of a hub id or a folder `repo`; each is loaded
    when first needed. grid: side of the latents; images are 32 times as large."""

    default_steps, default_guidance = 30, 4.0  # of Stage C: Sec. 5.1's, and the release's
    resample = Image.BILINEAR

    def __init__(self, repo, device, dtype, grid):
        self.repo = repo
        self.device = torch.device(device)
        self.dtype = dtype
        self.image_size = 32 * grid
        self.latent_shape = (16, grid, grid)
        imagenet = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=device)
        self.mean, self.std = imagenet.view(2, 3, 1, 1)

    def timesteps(self, steps):
        """Of sampling, from pure noise to none: as the release."""
        return torch.linspace(1.0, 0.0, steps + 1)

    @cached_property
    def encoder(self):
        """EfficientNetV2-S, a 1 x 1 convolution to 16 channels and a BatchNorm, after
        https://github.com/Stability-AI/StableCascade/blob/master/modules/effnet.py."""
        from torchvision.models import efficientnet_v2_s

        mapper = nn.Sequential(nn.Conv2d(1280, 16, 1, bias=False), nn.BatchNorm2d(16, affine=False))
        backbone = efficientnet_v2_s(weights=None).features
        encoder = nn.Sequential(OrderedDict(backbone=backbone, mapper=mapper))
        path = utils.hub_file(self.repo, "effnet_encoder.safetensors")
        try:
            encoder.load_state_dict(load_file(path))
        except (SafetensorError, OSError, RuntimeError) as error:
            what = "Stable Cascade's image encoder"
            raise InputError(f"{path}: not {what} ({utils.first_line(error)})") from None
        return encoder.to(self.device).eval().requires_grad_(False)  # float32: 0.3% of a step

    @cached_property
    def decoder_pipeline(self):
        """Stages B and A as diffusers' own pipeline, from its parts: the pipeline's from_pretrained
        looks for Stage A's class where diffusers no longer has it."""
        import diffusers
        from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

        settings = dict(folder=self.repo, device=self.device, torch_dtype=self.dtype)
        load = partial(utils.load_frozen, **settings)
        try:
            stage_b = load(diffusers.StableCascadeUNet, subfolder="decoder", variant="bf16")
            stage_a = load(PaellaVQModel, subfolder="vqgan")
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"--decoder {self.repo}: {utils.first_line(error)}") from None
        stages = dict(decoder=stage_b, vqgan=stage_a, latent_dim_scale=10.67) | self.text_model
        scheduler = diffusers.DDPMWuerstchenScheduler()
        pipeline = diffusers.StableCascadeDecoderPipeline(**stages, scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.device)

    def free_decoder(self):
        """Give back the memory of Stages B and A."""
        vars(self).pop("decoder_pipeline", None)

    def digest(self):
        """A fingerprint of the encoder, for cached latents."""
        encoder = utils.hub_file(self.repo, "effnet_encoder.safetensors")
        return hashlib.sha256(encoder.read_bytes()).hexdigest()[:16]

    def encode(self, pixels):
        """(B, 3, 32 h, 32 w) in [0, 1] -> latents (B, 16, h, w) float32."""
        return self.encoder((pixels - self.mean) / self.std)

    def decode(self, latents, prompts, seeds):
        """Latents -> pixels (B, 3, H, W) in [0, 1]; 10 steps of Stage B, without guidance."""
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        settings = dict(num_inference_steps=10, guidance_scale=0.0, output_type="pt")
        out = self.decoder_pipeline(latents, list(prompts), generator=generators, **settings)
        return out.images


class PatchCodec(nn.Module):
    """The tiny world's stand-in for Stages A and B: every patch of pixels, projected on its leading
    principal directions; linear both ways, latents of about unit variance."""

    default_steps, default_guidance = 8, 3.0
    resample = Image.BICUBIC

    def __init__(self, patch=4, channels=16, side=32):
        super().__init__()
        self.patch = patch
        self.image_size = side
        self.latent_shape = (channels, side // patch, side // patch)
        self.register_buffer("mean", torch.zeros(3 * patch * patch))
        self.register_buffer("encode_matrix", torch.zeros(3 * patch * patch, channels))
        self.register_buffer("decode_matrix", torch.zeros(channels, 3 * patch * patch))

    @classmethod
    def load(cls, path):
        """Read what `python -m tiny.train base` wrote; InputError names the file."""
        try:
            metadata, state = utils.read_safetensors(path)
            with torch.device("meta"):  # no memory yet, whatever size the header says
                channels = len(state["decode_matrix"])
                codec = cls(int(metadata["patch"]), channels, int(metadata["side"]))
            codec.load_state_dict(state, assign=True)
        except (KeyError, ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
            reason = utils.first_line(error)
            raise InputError(f"{path}: not a codec of tiny.train ({reason})") from None
        return codec

    def timesteps(self, steps):
        """Close together at the noisiest, where place and size are decided: the release's would
        step over it."""
        return 1 - torch.linspace(0.0, 1.0, steps + 1) ** 2

    def free_decoder(self):
        """Nothing to give back."""

    def digest(self):
        """A fingerprint of the encoder, for cached latents."""
        matrices = (self.mean, self.encode_matrix)
        content = b"".join(matrix.double().cpu().numpy().tobytes() for matrix in matrices)
        return hashlib.sha256(content).hexdigest()[:16]

    def encode(self, pixels):
        """(B, 3, P h, P w) in [0, 1] -> latents (B, C, h, w)."""
        pixels = pixels.to(self.mean.dtype)
        p = self.patch
        patches = einops.rearrange(pixels, "b c (h p) (w q) -> b h w (c p q)", p=p, q=p)
        latents = (patches - self.mean) @ self.encode_matrix
        return einops.rearrange(latents, "b h w c -> b c h w")

    def decode(self, latents, prompts=None, seeds=None):
        """Latents (B, C, h, w) -> pixels (B, 3, P h, P w) in [0, 1]."""
        p = self.patch
        patches = einops.rearrange(latents, "b c h w -> b h w c") @ self.decode_matrix + self.mean
        return einops.rearrange(patches, "b h w (c p q) -> b c (h p) (w q)", p=p, q=p).clamp(0, 1)
