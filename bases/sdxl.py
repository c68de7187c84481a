"""The frozen Stable Diffusion XL, and checkpoints fine-tuned from it in diffusers' layout.

What the scripts use of it is listed in bases/__init__.py. Its timesteps are whole numbers: our t in
(0, 1] is rounded up to one of them, so that every t in (k/1000, (k+1)/1000] is timestep k.
"""

import contextlib
import hashlib
import inspect

import einops
import torch
from PIL import Image

import utils
from bases.images import encode_pixels, fit_pixels
from utils import InputError


class StableDiffusionXL:
    """UNet, both text encoders and VAE, frozen and in eval mode.

    name: a hub id or a folder in its layout
    dtype: by default float32 on a CPU, else bfloat16; the VAE is always float32, as its activations
        overflow in float16
    grid: side of the latents, an eighth of the image's; by default the UNet's own, 128 for SDXL
    Raises InputError, naming --base and what is wrong with it.
    """

    steps, guidance = 30, 5.0

    def __init__(self, name, device="cpu", dtype=None, decoder=None, grid=None):
        import diffusers
        import transformers

        for library in (diffusers, transformers):
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
        self.name = str(name)
        self.device = torch.device(device)
        self.dtype = dtype or utils.pick_dtype("auto", device)

        def load(cls, part, dtype=self.dtype):
            return load_part(cls, name, part, self.device, dtype)

        self.prior = load(diffusers.UNet2DConditionModel, "unet")
        classes = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)
        parts = ("text_encoder", "text_encoder_2")
        self.text_encoders = [load(*pair) for pair in zip(classes, parts, strict=True)]
        parts = ("tokenizer", "tokenizer_2")
        self.tokenizers = [load_tokenizer(transformers.CLIPTokenizer, name, p) for p in parts]
        config = diffusers.DiffusionPipeline.load_config(name)
        sampler = getattr(diffusers, config["scheduler"][1])
        self.scheduler = sampler.from_pretrained(name, subfolder="scheduler")
        self.codec = self.load_codec(name, self.device, self.dtype, decoder, grid)
        self.tokenizer = self.tokenizers[0]
        self.zero_empty = config.get("force_zeros_for_empty_prompt", True)
        self.prediction_type = self.scheduler.config.get("prediction_type")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            problem = f"predicts {self.prediction_type}; expected epsilon or v_prediction"
            raise InputError(f"--base {name}: {problem}")
        if not hasattr(self.scheduler, "alphas_cumprod"):  # it would be trained on other noise
            problem = f"samples by {config['scheduler'][1]}; expected DDIM's or Euler's schedule"
            raise InputError(f"--base {name}: {problem}")
        self.alphas_cumprod = self.scheduler.alphas_cumprod.to(self.device)  # float32
        self.latent_shape, self.image_size = self.codec.latent_shape, self.codec.image_size
        self.token_dim = self.prior.config.cross_attention_dim  # what an IP-Adapter file wants

    @staticmethod
    def load_codec(name, device, dtype, decoder=None, grid=None):
        return VAECodec(name, device, grid or latent_side(name, "unet"))

    def attention_layers(self):
        """Every cross-attention layer, 70 of them, in the order of diffusers' attn_processors."""
        names = [name.removesuffix(".processor") for name in self.prior.attn_processors]
        return [self.prior.get_submodule(name) for name in names if name.endswith("attn2")]

    @property
    def channels(self):
        return [layer.to_q.in_features for layer in self.attention_layers()]

    def tokenize(self, captions):
        """Captions -> token ids of both tokenizers, (2, B, 77)."""
        settings = dict(padding="max_length", truncation=True, return_tensors="pt")
        return torch.stack([t(list(captions), **settings).input_ids for t in self.tokenizers])

    @torch.no_grad()
    def encode_tokens(self, tokens):
        """tokenize()'s (2, B, L), on the device -> text states (B, L, d), pooled (B, p) and sizes
        (B, 6): of the original, its crop and the target, all the whole image."""
        encoded = [
            encoder(ids, output_hidden_states=True)
            for encoder, ids in zip(self.text_encoders, tokens, strict=True)
        ]
        text = torch.cat([out.hidden_states[-2] for out in encoded], -1)
        side = self.image_size
        sizes = torch.tensor([side, side, 0, 0, side, side], dtype=text.dtype, device=text.device)
        return text, encoded[1].text_embeds, sizes.expand(len(text), -1)

    def encode_prompts(self, captions):
        return self.encode_tokens(self.tokenize(captions).to(self.device))

    @torch.no_grad()
    def encode_pixels(self, pixels):
        """(B, 3, S, S) uint8 on the device -> latents (B, C, h, w) in the base's dtype."""
        return encode_pixels(self.codec, pixels, self.dtype)

    def encode_images(self, images):
        """PIL images -> latents (B, C, h, w); short side resized, centre cropped."""
        pixels = fit_pixels(images, self.image_size, self.codec.resample)
        return self.encode_pixels(pixels.to(self.device))

    @torch.no_grad()
    def decode(self, latents, prompts, seeds=None):
        """Latents (B, C, h, w) -> B PIL images."""
        return [to_image(*pair) for pair in zip(self.codec.decode(latents), prompts, strict=True)]

    def timestep(self, t):
        """(B,) in (0, 1] -> the network's whole timesteps, 0 to 999."""
        last = len(self.alphas_cumprod)
        return ((t.float() * last).ceil().long() - 1).clamp(0, last - 1)

    def mix(self, a, b, t):  # alpha_t a + sigma_t b, all (B, C, h, w)
        alpha = self.alphas_cumprod[self.timestep(t)].view(-1, 1, 1, 1)
        return (alpha.sqrt() * a + (1 - alpha).sqrt() * b).to(a.dtype)

    def add_noise(self, latents, noise, t):
        """x_t = alpha_t x_0 + sigma_t eps (Sec. 3), all (B, C, h, w); t: (B,) float in (0, 1]."""
        return self.mix(latents, noise, t)

    def target(self, latents, noise, t):
        """What predict() should give: the noise, or the velocity alpha_t eps - sigma_t x_0."""
        return noise if self.prediction_type == "epsilon" else self.mix(noise, -latents, t)

    def predict(self, x_t, t, text, pooled, sizes):
        """The network's prediction (B, C, h, w); the user is whom adapter.user() has set."""
        return self.forward(x_t.to(self.dtype), self.timestep(t), text, pooled, sizes)

    def forward(self, x, timestep, text, pooled, sizes):
        added = dict(text_embeds=pooled, time_ids=sizes)
        return self.prior(x, timestep, encoder_hidden_states=text, added_cond_kwargs=added).sample

    @torch.no_grad()
    def sample(self, prompts, seeds, adapter=None, user_tokens=None, user_scale=1.0, **settings):
        """As StableCascade.sample; by the checkpoint's own scheduler, as its pipeline does it."""
        b = len(prompts)
        guidance = settings.get("guidance")
        guidance = self.guidance if guidance is None else guidance
        text, pooled, sizes = self.encode_prompts(prompts)
        if guidance > 1:  # the unconditional half first
            none = [torch.zeros_like(text), torch.zeros_like(pooled)]
            none = none if self.zero_empty else self.encode_prompts([""] * b)[:2]
            text, pooled = torch.cat([none[0], text]), torch.cat([none[1], pooled])
            sizes = torch.cat([sizes, sizes])
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        noise = [torch.randn(self.latent_shape, generator=g, dtype=self.dtype) for g in generators]
        self.scheduler.set_timesteps(settings.get("steps") or self.steps, device=self.device)
        x = torch.stack(noise).to(self.device) * self.scheduler.init_noise_sigma
        accepted = inspect.signature(self.scheduler.step).parameters
        extra = dict(generator=generators) if "generator" in accepted else {}
        user = contextlib.nullcontext()
        if user_tokens is not None and user_scale != 0:
            user = adapter.user(user_tokens, user_scale)  # B rows serve both halves
        with user:
            for t in self.scheduler.timesteps:
                both = torch.cat([x, x]) if guidance > 1 else x
                pred = self.forward(
                    self.scheduler.scale_model_input(both, t), t, text, pooled, sizes
                )
                if guidance > 1:
                    unconditional, conditional = pred.chunk(2)
                    pred = unconditional + guidance * (conditional - unconditional)
                x = self.scheduler.step(pred, t, x, **extra, return_dict=False)[0].to(self.dtype)
        return x

    def compile_blocks(self):
        """torch.compile the UNet's transformer blocks and residual blocks."""
        torch._dynamo.config.recompile_limit = 64
        for block in self.prior.modules():
            if type(block).__name__ in ("BasicTransformerBlock", "ResnetBlock2D"):
                block.compile(dynamic=False)


def load_part(cls, name, part, device, dtype):
    """A part of a pipeline's folder, frozen; OSError, naming the part, of one that is not there. In
    float32 of the full weights, else of the fp16 variant, if there are both."""
    from diffusers.utils import logging

    how = dict(subfolder=part, torch_dtype=dtype, use_safetensors=True)
    logging.set_verbosity(logging.CRITICAL)  # it would report a variant that is not there
    try:
        for variant in (None, "fp16") if dtype == torch.float32 else ("fp16", None):
            try:
                return utils.load_frozen(cls, name, device, variant=variant, **how)
            except OSError as error:
                if "file named" not in str(error):  # there, but broken
                    raise
                missing = error
        raise OSError(f"{part}: {utils.first_line(missing)}")
    finally:
        logging.set_verbosity_error()


def load_tokenizer(cls, name, part):
    """A part's tokenizer; OSError if its words are missing: without, every caption is alike."""
    tokenizer = cls.from_pretrained(name, subfolder=part)
    if len(tokenizer) < 10:
        raise OSError(f"{part}: no tokenizer there")
    return tokenizer


def latent_side(name, part):
    """Side of a checkpoint's latents, as its network's config says it."""
    return utils.read_json(utils.hub_file(name, f"{part}/config.json"))["sample_size"]


def to_image(pixels, prompt):
    """(3, H, W) in [0, 1] -> a PIL image; InputError if it is not finite."""
    if not pixels.isfinite().all():
        raise InputError(f"the image of {prompt!r} is not finite: try a smaller --guidance")
    array = einops.rearrange(pixels.clamp(0, 1).mul(255).round().byte(), "c h w -> h w c")
    return Image.fromarray(array.cpu().numpy())


class VAECodec:
    """The VAE, in float32: images in [0, 1] <-> latents of about unit variance."""

    resample = Image.LANCZOS  # as the trainers of the field prepare images

    def __init__(self, name, device, grid):
        import diffusers

        self.vae = load_part(diffusers.AutoencoderKL, name, "vae", device, torch.float32)
        self.vae.enable_slicing()  # one image at a time: 3 GiB each at 1024 px
        config = self.vae.config
        self.image_size = grid * 2 ** (len(config.block_out_channels) - 1)
        self.latent_shape = (config.latent_channels, grid, grid)
        shift, scale = config.get("latents_mean"), config.get("latents_std")
        ones = torch.ones(1, config.latent_channels, 1, 1, device=device)
        self.mean = ones * 0 if shift is None else torch.tensor(shift, device=device).view_as(ones)
        self.std = ones if scale is None else torch.tensor(scale, device=device).view_as(ones)
        self.std = self.std / config.scaling_factor

    @torch.no_grad()
    def encode(self, pixels):
        return (self.vae.encode(2 * pixels - 1).latent_dist.mode() - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents):
        return self.vae.decode(latents.float() * self.std + self.mean).sample / 2 + 0.5

    def free_decoder(self):
        """Nothing to give back."""

    def digest(self):
        """A fingerprint of the encoder, for cached latents."""
        content = hashlib.sha256()
        for tensor in (*self.vae.encoder.state_dict().values(), self.mean, self.std):
            content.update(tensor.cpu().numpy().tobytes())
        return content.hexdigest()[:16]
