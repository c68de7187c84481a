"""The frozen Sana, a flow-matching base: a transformer with true cross-attention.

Its x_t is (1 - s) x_0 + s eps and it predicts the velocity eps - x_0. s is our t after the
checkpoint's own shift, so that t is uniform where its sampler's steps are. What the scripts use of
it is listed in bases/__init__.py.
"""

import contextlib
import hashlib
import inspect
from pathlib import Path

import torch
from PIL import Image

import utils
from bases.cascade import PatchCodec
from bases.images import encode_pixels, fit_pixels
from bases.sdxl import latent_side, load_part, load_tokenizer, to_image


class Sana:
    """Transformer, text encoder and autoencoder, frozen and in eval mode. A small checkpoint may
    have another text encoder, which its model_index.json names, and a PatchCodec.

    name: a hub id or a folder with transformer, text_encoder, tokenizer, scheduler and vae in it
    grid: side of the latents; by default the transformer's own, 32 for 1024 px
    Raises InputError, naming --base and what is wrong with it.
    """

    def __init__(self, name, device="cpu", dtype=None, decoder=None, grid=None):
        import diffusers
        import transformers

        for library in (diffusers, transformers):
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
        self.name = str(name)
        self.device = torch.device(device)
        self.dtype = dtype or utils.pick_dtype("auto", device)

        def load(cls, part):
            return load_part(cls, name, part, self.device, self.dtype)

        config = diffusers.DiffusionPipeline.load_config(name)
        self.prior = load(diffusers.SanaTransformer2DModel, "transformer")
        text_class, tokenizer_class, sampler = (
            getattr(library, config[part][1])
            for library, part in (
                (transformers, "text_encoder"),
                (transformers, "tokenizer"),
                (diffusers, "scheduler"),
            )
        )
        self.text_encoder = load(text_class, "text_encoder")
        self.tokenizer = load_tokenizer(tokenizer_class, name, "tokenizer")
        self.scheduler = sampler.from_pretrained(name, subfolder="scheduler")
        self.codec = self.load_codec(name, self.device, self.dtype, decoder, grid)
        self.tokenizer.padding_side = "right"
        settings = self.scheduler.config
        self.shift = settings.get("flow_shift", settings.get("shift", 1.0))
        is_gemma = "Gemma" in text_class.__name__
        call = inspect.signature(diffusers.SanaPipeline.__call__).parameters
        self.instruction = "\n".join(call["complex_human_instruction"].default) if is_gemma else ""
        self.max_length = min(300, self.tokenizer.model_max_length)  # tokens of a caption
        self.latent_shape, self.image_size = self.codec.latent_shape, self.codec.image_size
        self.steps, self.guidance = self.codec.default_steps, self.codec.default_guidance
        self.token_dim = self.prior.config.cross_attention_dim

    @staticmethod
    def load_codec(name, device, dtype, decoder=None, grid=None):
        """A checkpoint's own autoencoder, or its PatchCodec."""
        codec = Path(str(name)) / "codec" / "codec.safetensors"
        if codec.is_file():
            return PatchCodec.load(codec).to(device, dtype)
        grid = grid or latent_side(name, "transformer")
        return AutoencoderCodec(name, device, dtype, grid)

    def attention_layers(self):
        """Every cross-attention layer, 20 of them."""
        return [block.attn2 for block in self.prior.transformer_blocks]

    @property
    def channels(self):
        return [layer.to_q.in_features for layer in self.attention_layers()]

    def tokenize(self, captions, instruct=True):
        """Captions -> token ids and mask, (2, B, L), after the instruction that Sana was trained
        with; without it for the empty caption of guidance, as its pipeline does."""
        instruction = self.instruction if instruct else ""
        length = self.max_length
        if instruction:
            length += len(self.tokenizer.encode(instruction)) - 2
        texts = [instruction + caption.lower().strip() for caption in captions]
        how = dict(padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        encoded = self.tokenizer(texts, **how)
        return torch.stack([encoded.input_ids, encoded.attention_mask])

    @torch.no_grad()
    def encode_tokens(self, tokens):
        """tokenize()'s (2, B, L), on the device -> text states (B, M, d) and mask (B, M): the first
        position and the caption's, without the instruction's."""
        ids, mask = tokens
        states = self.text_encoder(ids, attention_mask=mask).last_hidden_state.to(self.dtype)
        kept = [0, *range(-self.max_length + 1, 0)]
        return states[:, kept], mask[:, kept]

    def encode_prompts(self, captions, instruct=True):
        return self.encode_tokens(self.tokenize(captions, instruct).to(self.device))

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
        pixels = self.codec.decode(latents.to(self.dtype)).float()
        return [to_image(*pair) for pair in zip(pixels, prompts, strict=True)]

    def sigma(self, t):
        """How much of x_t is noise, (B, 1, 1, 1) in (0, 1]."""
        s = t.float().view(-1, 1, 1, 1)
        return self.shift * s / (1 + (self.shift - 1) * s)

    def add_noise(self, latents, noise, t):
        """x_t = (1 - s) x_0 + s eps, all (B, C, h, w); t: (B,) float in (0, 1]."""
        s = self.sigma(t)
        return ((1 - s) * latents + s * noise).to(latents.dtype)

    def target(self, latents, noise, t):
        """What predict() should give: the velocity."""
        return noise - latents

    def predict(self, x_t, t, text, mask):
        """The velocity (B, C, h, w); the user is whom adapter.user() has set."""
        return self.forward(x_t, 1000 * self.sigma(t).flatten(), text, mask)

    def forward(self, x, timestep, text, mask):
        timestep = timestep * self.prior.config.timestep_scale
        conditions = dict(encoder_hidden_states=text, encoder_attention_mask=mask)
        return self.prior(x.to(self.dtype), timestep=timestep, **conditions).sample

    @torch.no_grad()
    def sample(self, prompts, seeds, adapter=None, user_tokens=None, user_scale=1.0, **settings):
        """As StableCascade.sample; by the checkpoint's own scheduler, as its pipeline does it."""
        guidance = settings.get("guidance")
        guidance = self.guidance if guidance is None else guidance
        conditions = self.encode_prompts(prompts)
        if guidance > 1:  # the unconditional half first
            none = self.encode_prompts([""] * len(prompts), instruct=False)
            conditions = [torch.cat(pair) for pair in zip(none, conditions, strict=True)]
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        x = torch.stack([torch.randn(self.latent_shape, generator=g) for g in generators])
        x = x.to(self.device)  # float32, as the pipeline's
        self.scheduler.set_timesteps(settings.get("steps") or self.steps, device=self.device)
        takes_generators = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = dict(generator=generators) if takes_generators else {}
        user = contextlib.nullcontext()
        if user_tokens is not None and user_scale != 0:
            user = adapter.user(user_tokens, user_scale)  # B rows serve both halves
        with user:
            for t in self.scheduler.timesteps:
                both = torch.cat([x, x]) if guidance > 1 else x
                pred = self.forward(both, t.expand(len(both)), *conditions).float()
                if guidance > 1:
                    unconditional, conditional = pred.chunk(2)
                    pred = unconditional + guidance * (conditional - unconditional)
                x = self.scheduler.step(pred, t, x, **extra, return_dict=False)[0]
        return x

    def compile_blocks(self):
        """torch.compile the transformer's blocks."""
        torch._dynamo.config.recompile_limit = 64
        for block in self.prior.transformer_blocks:
            block.compile(dynamic=False)


class AutoencoderCodec:
    """Sana's autoencoder: images in [0, 1] <-> latents, 32 times smaller."""

    default_steps, default_guidance = 20, 4.5
    resample = Image.LANCZOS

    def __init__(self, name, device, dtype, grid):
        import diffusers

        self.vae = load_part(diffusers.AutoencoderDC, name, "vae", device, dtype)
        self.vae.enable_slicing()  # one image at a time
        self.image_size = grid * 2 ** (len(self.vae.config.encoder_block_out_channels) - 1)
        self.latent_shape = (self.vae.config.latent_channels, grid, grid)

    @torch.no_grad()
    def encode(self, pixels):
        latents = self.vae.encode((2 * pixels - 1).to(self.vae.dtype)).latent
        return latents * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents):
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample / 2 + 0.5

    def free_decoder(self):
        """Nothing to give back."""

    def digest(self):
        """A fingerprint of the encoder, for cached latents."""
        content = hashlib.sha256()
        for tensor in self.vae.encoder.state_dict().values():
            content.update(tensor.float().cpu().numpy().tobytes())
        return content.hexdigest()[:16]
