"""PPD, Personalized Preference Fine-tuning of Diffusion Models: the method, in one file.

One frozen text-to-image model serves everybody. A person is a vector u (embed.py makes it from four of their choices).
UserAdapter turns u into a few tokens and, for every attention layer of Stable Cascade's Stage C, into keys K' and
values V'; UserAttnProcessor adds attention over them to the layer's own attention (Eq. 7). Only the adapter is trained,
with ppd_loss (Eq. 6): Diffusion-DPO, conditioned on the person. The reference model is the same network with the user
branch off, so there is never a second copy of it.

    base = StableCascade("tiny")                          # or "stabilityai/stable-cascade-prior", or a folder in its layout
    adapter = UserAdapter.load("assets/onehot").install(base.prior)
    user = load_user("assets/onehot/light.pt")["embedding"][:1, 0]                      # (1, D)
    with adapter.user(adapter(user)):                     # the person is set inside this block and nowhere else
        noise_pred = base.predict_noise(x_t, t, *base.encode_prompts(["a red star"]))
    latents = base.sample(["a red star"], seeds=[0], adapter=adapter, tokens=adapter(user))
    base.decode(latents, ["a red star"], seeds=[0])[0].save("star.png")

Read in this order: UserAdapter, UserAttnProcessor, ppd_loss, StableCascade. Equation and section numbers are the paper's.
"""
import contextlib
import hashlib
import json
import os
import re
import sys
import zipfile
from collections import OrderedDict
from functools import cached_property
from pathlib import Path

import einops
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

TINY = Path(__file__).resolve().parent / "assets" / "tiny"  # what "tiny" means as a base


class BadInput(ValueError):
    """Something from outside (a file, a flag, a row) is wrong. The scripts print it as one line, without traceback."""


# --------------------------------------------------------------------------------------- the adapter (Sec. 4.3, Eq. 7)
class UserAdapter(nn.Module):
    """User embedding -> user tokens u_t -> K' = u_t W'_k and V' = u_t W'_v for every attention layer of the prior.

    channels: width of each attention layer, in the network's own order. V' starts at zero, so a new adapter changes
    nothing and the first loss is ln 2. One token would leave K' without a gradient (a softmax over one key is 1
    whatever the key), hence several. The projector has biases, so the zero user (the *mean* user, where embeddings are
    standardised; no reward at all, where they are one-hot) has tokens of its own and learns the population's taste; the
    reference is no tokens at all, not zero. bias=False takes the biases away, and with them the zero user: an ablation.
    """

    def __init__(self, user_dim, channels, tokens=4, token_dim=64, bias=True):
        super().__init__()
        self.user_dim, self.tokens, self.token_dim, self.channels, self.bias = user_dim, tokens, token_dim, list(channels), bias
        self.register_buffer("mean", torch.zeros(user_dim))  # of the training users' embeddings; identity for one-hot
        self.register_buffer("std", torch.ones(user_dim))
        self.project = nn.Linear(user_dim, tokens * token_dim, bias=bias)
        self.norm = nn.LayerNorm(token_dim, bias=bias)
        self.to_k = nn.ModuleList(nn.Linear(token_dim, c, bias=False) for c in channels)  # W'_k
        self.to_v = nn.ModuleList(nn.Linear(token_dim, c, bias=False) for c in channels)  # W'_v
        for layer in self.to_v:
            nn.init.zeros_(layer.weight)
        self.path, self.header = "this adapter", {}
        self.active = None  # (tokens, scale) inside `with adapter.user(...)`, else None: the reference model

    def standardise(self, embedding):
        """Raw embedding (B, D) -> (B, D) in the training users' standard deviations from their mean. Blend people here:
        VLM states of all people share one large common vector, which would drown the person."""
        return (embedding - self.mean) / self.std

    def forward(self, embedding, drop=None, standardised=False):
        """User tokens. embedding: (B, D), raw unless `standardised`; drop: (B,) bool, True = the zero user (Sec. 4.3's
        random drop) -> (B, tokens, token_dim)."""
        u = embedding if standardised else self.standardise(embedding)
        if drop is not None:
            u = u.masked_fill(drop[:, None], 0)
        return self.norm(einops.rearrange(self.project(u), "b (l d) -> b l d", l=self.tokens))

    def zero_user(self, batch=1):
        """Tokens of the zero user, (B, tokens, token_dim)."""
        return self(self.mean.expand(batch, -1))

    @contextlib.contextmanager
    def user(self, tokens, scale=1.0):
        """Set the user for everything inside the block; before and after it the network is the reference, also if the
        block raises. tokens: (B, L, d), or None for the reference; a batch of r x B rows repeats them r times. scale: a
        float, or (rows,) to weigh each row. Keep backward inside too: checkpointing reads the user again there."""
        before, self.active = self.active, None if tokens is None else (tokens, scale)
        try:
            yield
        finally:
            self.active = before

    def install(self, prior):
        """Hook every attention layer of a StableCascadeUNet (frozen and cast already); returns self."""
        layers = attention_layers(prior)
        if (widths := [layer.to_q.in_features for layer in layers]) != self.channels:
            raise BadInput(f"{self.path} is for a base with {shape_of(self.channels)}; this base has {shape_of(widths)}")
        for layer, to_k, to_v in zip(layers, self.to_k, self.to_v):
            layer.set_processor(UserAttnProcessor(self, to_k, to_v))
        return self.to(next(prior.parameters()).device)

    def save(self, path, **header):
        """Write adapter tensors alone as safetensors; dimensions and `header` (plain values) go into its metadata."""
        header = dict(format="ppd-adapter-1", user_dim=self.user_dim, tokens=self.tokens, token_dim=self.token_dim,
                      bias=self.bias, channels=self.channels, **header)
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        write_atomically(path, lambda temporary: save_file(state, temporary, {"ppd": json.dumps(header, sort_keys=True)}))

    @classmethod
    def load(cls, path):
        """Read what save() wrote; path is the file or its folder. `adapter.path` and `adapter.header` tell where from.
        Raises BadInput, naming file and key, unless every tensor is there in its right shape and no other is."""
        path = Path(path) / "adapter.safetensors" if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise BadInput(f"{path}: no such adapter file; train.py writes runs/<name>/adapter.safetensors")
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("ppd", "{}"))
                state = {k: file.get_tensor(k) for k in file.keys()}
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise BadInput(f"{path}: not a readable safetensors file ({str(error)[:150]})") from None
        if not isinstance(header, dict):
            raise BadInput(f"{path}: no PPD adapter (its header is no dict)")
        if header.get("format") != "ppd-adapter-1":
            raise BadInput(f"{path}: no PPD adapter (its header says format {header.get('format')!r})")
        try:
            with torch.device("meta"):  # no memory yet, whatever size the header says
                adapter = cls(header["user_dim"], header["channels"], header["tokens"], header["token_dim"], header.get("bias", True))
            adapter.load_state_dict(state, assign=True)  # strict: every key, every shape
            if broken := [name for name, tensor in state.items() if not tensor.isfinite().all() or tensor.dtype != state["mean"].dtype]:
                raise ValueError(f"{broken[0]} is not finite, or of another precision than mean")
            if not (adapter.std > 0).all():
                raise ValueError("std is not above 0")
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise BadInput(f"{path}: header and tensors do not fit: {' '.join(str(error).split())[:200]}") from None
        adapter.path, adapter.header = path, header
        return adapter


def attention_layers(prior):
    """Every attention layer of Stage C: there is no separate text cross-attention, one softmax covers both the picture's
    own positions and the condition tokens (85 at full scale), so these are the paper's "each cross-attention layer"."""
    return [block.attention for block in prior.modules() if type(block).__name__ == "SDCascadeAttnBlock"]


def shape_of(channels):
    return f"{len(channels)} attention layers of width {'/'.join(map(str, sorted(set(channels))))}"


class UserAttnProcessor:
    """Decoupled cross-attention, Eq. 7: Z' = Attention(Q, K, V) + scale * Attention(Q, K', V').

    Called from `SDCascadeAttnBlock.forward` -> `Attention.forward` -> here, once per attention layer and forward. Both
    terms share the query and the layer's own output projection. Deliberately no nn.Module: as one it would move into
    the UNet's state dict, and freezing or casting the UNet would freeze or cast the adapter.
    """

    def __init__(self, adapter, to_k, to_v):
        self.adapter, self.to_k, self.to_v = adapter, to_k, to_v  # W'_k and W'_v of this layer

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        b, c, h, w = hidden_states.shape
        x = hidden_states.view(b, c, h * w).transpose(1, 2)  # (B, HW, C)
        heads = lambda m: m.view(m.shape[0], -1, attn.heads, c // attn.heads).transpose(1, 2)  # (B, heads, N, C / heads)
        q = heads(attn.to_q(x))
        k, v = heads(attn.to_k(encoder_hidden_states)), heads(attn.to_v(encoder_hidden_states))  # N = HW + conditions
        out = F.scaled_dot_product_attention(q, k, v)
        if self.adapter.active is not None:
            tokens, scale = self.adapter.active  # (B', L, d), B' divides B
            user_k = heads(self.to_k(tokens)).to(q.dtype)  # the adapter is float32, the base may not be
            user_v = heads(self.to_v(tokens)).to(q.dtype)
            user_k, user_v = (einops.repeat(m, "b ... -> (r b) ...", r=b // len(m)) for m in (user_k, user_v))
            user_out = F.scaled_dot_product_attention(q, user_k, user_v)
            out = out + (scale.to(q.dtype).view(-1, 1, 1, 1) if torch.is_tensor(scale) else scale) * user_out
        out = attn.to_out[0](out.transpose(1, 2).reshape(b, h * w, c))
        return attn.to_out[1](out).transpose(1, 2).reshape(b, c, h, w)  # to_out[1] is dropout: off, the base stays in eval


# ------------------------------------------------------------------------------------------------- the loss (Eq. 3, 6)
def denoising_error(noise_pred, noise):
    """||eps - eps_theta||^2 of Eq. 1, as the mean over latent elements in at least float32: (N, C, H, W) x 2 -> (N,)."""
    exact = torch.promote_types(noise_pred.dtype, torch.float32)
    return (noise.to(exact) - noise_pred.to(exact)).square().mean(dim=(1, 2, 3))


def ppd_loss(noise_pred, noise_pred_ref, noise, beta, T=1000):
    """Eq. 6, for B pairs: -log sigmoid(-beta T Delta), omega being 1. With a policy that sees no user it is Eq. 3, Diffusion-DPO.

    noise_pred: (2B, C, H, W), eps_theta(x_t, c, u, t), preferred pictures first, then the dispreferred in the same order
    noise_pred_ref: the same of the reference, eps_ref(x_t, c, t), without gradient
    noise: (2B, C, H, W), what was added; both halves alike when a pair shares its noise
    beta: KL strength. The norm is a mean and T = 1000, so beta = 1 is beta_dpo = 2000 of Diffusion-DPO's code.

    Returns the losses (B,), not yet averaged, and a dict of (B,) tensors without gradient worth logging:
    implicit_accuracy counts a tie as half (at step 0 every pair is one); the errors are those of Eq. 1.
    """
    error, error_ref = denoising_error(noise_pred, noise), denoising_error(noise_pred_ref, noise)
    preferred, dispreferred = (error - error_ref).chunk(2)
    logits = -beta * T * (preferred - dispreferred)  # -beta T Delta
    log = dict(implicit_accuracy=(logits > 0).to(error.dtype) + 0.5 * (logits == 0).to(error.dtype), logits=logits.detach())
    for name, value in (("error", error), ("error_ref", error_ref)):
        log[f"{name}_preferred"], log[f"{name}_dispreferred"] = value.detach().chunk(2)
    return -F.logsigmoid(logits), log


# --------------------------------------------------------------------------------------- the frozen base (Sec. 3, 4.3)
class StableCascade:
    """Stage C, its text encoder and an image codec, frozen and in eval mode (Stage C has dropout: in train mode the
    policy would not be the reference even at step 0).

    base: "tiny", a hub id like stabilityai/stable-cascade-prior or a folder in its layout; ":prior_lite" after it picks
    that subfolder for the prior.
    dtype: float32 on CPU, else bfloat16; float64 for tests. float16 overflows in Stage C and is refused.
    decoder: hub id or folder with Stages A and B and the image encoder, for a base without a codec of its own.
    grid: side of the latents there. 24 is Stage C's own: 768 px pictures go in, 1024 px pictures come out.
    """
    compiled = False

    def __init__(self, base="tiny", device="cpu", dtype=None, decoder="stabilityai/stable-cascade", grid=24):
        import diffusers
        import transformers
        for library in (diffusers, transformers):  # their bars and notices would hide our own lines
            library.utils.logging.set_verbosity_error(), library.utils.logging.disable_progress_bar()

        self.name = str(base)
        folder, sub = find_base(self.name)
        self.device = torch.device(device)
        self.dtype = dtype or pick_dtype("auto", device)
        if self.dtype == torch.float16:
            raise BadInput("float16 gives NaN in Stage C: use bfloat16 or float32")

        try:
            how = dict(torch_dtype=self.dtype, variant="bf16")
            self.prior = load_frozen(diffusers.StableCascadeUNet, folder, self.device, subfolder=sub, **how)
            self.text_encoder = load_frozen(transformers.CLIPTextModelWithProjection, folder, self.device, subfolder="text_encoder", **how)
            self.tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
            self.codec = load_codec(base, self.device, self.dtype, decoder, grid, self.tokenizer, self.text_encoder)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise BadInput(f"--base {base}: cannot load {folder}: {str(error).strip().splitlines()[0]}") from None
        self.scheduler = make_scheduler(self.device)
        self.latent_shape = self.codec.latent_shape
        self.steps, self.guidance = self.codec.recipe  # of sampling by default

    @property
    def channels(self):
        """Width of each attention layer, what UserAdapter wants."""
        return [layer.to_q.in_features for layer in attention_layers(self.prior)]

    @torch.no_grad()
    def encode_tokens(self, tokens):
        """Of tokenise() -> text states (B, L, d), before the encoder's last norm, and pooled (B, 1, d)."""
        ids, there = tokens
        seen = there.bool()[:, None, None] & torch.ones_like(there[:1]).expand(there.shape[1], -1).tril().bool()  # to itself and back, no padding
        mask = torch.zeros_like(seen, dtype=self.dtype).masked_fill(~seen, torch.finfo(self.dtype).min)  # made here: the library's own waits for the GPU
        out = self.text_encoder(ids, attention_mask=mask, output_hidden_states=True)
        return out.hidden_states[-1], out.text_embeds[:, None]

    def encode_prompts(self, prompts):
        """Captions -> what encode_tokens gives."""
        return self.encode_tokens(tokenise(self.tokenizer, prompts).to(self.device))

    @torch.no_grad()
    def encode_pixels(self, pixels):
        """Of fit_pixels(images, *codec.fit), on the base's device -> latents (B, C, h, w) in the base's dtype."""
        return encode_pixels(self.codec, pixels, self.dtype)

    def encode_images(self, images):
        """PIL images of any size -> latents (B, C, h, w) in the base's dtype. Short side resized, centre cropped."""
        return self.encode_pixels(fit_pixels(images, *self.codec.fit).to(self.device))

    @torch.no_grad()
    def decode(self, latents, prompts, seeds):
        """Latents (B, C, h, w) -> list of PIL images. Stage B, a diffusion model too, wants captions and seeds (B each)."""
        pixels = self.codec.decode(latents.to(self.dtype), prompts, seeds).float().mul(255).round().byte()
        return [Image.fromarray(p) for p in einops.rearrange(pixels, "b c h w -> b h w c").cpu().numpy()]

    def compile_blocks(self):
        """torch.compile every block of Stage C: one graph for each kind of block and use, not one for each block."""
        torch._dynamo.config.recompile_limit = 64  # with and without a user, gradient, skip connection; training's and preview's shapes
        for block in self.prior.modules():
            if type(block).__name__ in ("SDCascadeResBlock", "SDCascadeAttnBlock", "SDCascadeTimestepBlock"):
                block.compile(dynamic=False)
        self.compiled = True

    def round_time(self, t):
        """Timesteps as the base sees them, in float32: rounded once to its dtype, then the same value for the noise and
        for the network."""
        return t.to(self.dtype).to(torch.promote_types(self.dtype, torch.float32))

    def add_noise(self, latents, noise, t):
        """x_t = alpha_t x_0 + sigma_t eps. latents, noise: (B, C, h, w); t: (B,) float in (0, 1], never integers."""
        return self.scheduler.add_noise(latents, noise, self.round_time(t))

    def predict_noise(self, x_t, t, text, pooled):
        """eps_theta(x_t, c, [u,] t), the user being whom `adapter.user` has set. Shapes as above -> (B, C, h, w)."""
        # without clip_img the network drops the text tokens as well, silently
        no_image = x_t.new_zeros(len(x_t), 1, self.prior.config.clip_image_in_channels)
        return self.prior(x_t, self.round_time(t).to(self.dtype), clip_text_pooled=pooled, clip_text=text, clip_img=no_image).sample

    @torch.no_grad()
    def sample(self, prompts, seeds, adapter=None, tokens=None, user_scale=1.0, uncond_user="same", guidance=None, steps=None):
        """Ancestral DDPM with classifier-free guidance. prompts: B captions; seeds: B ints, each the whole randomness of
        its picture, whatever else is in the batch; tokens: (B, L, d) or None for the base; user_scale multiplies the
        user's term of Eq. 7, 0 is the base exactly; uncond_user: whom the unconditional branch sees, "off" (nobody, so
        that taste is guided along with the text), "zero" or "same". Returns latents (B, C, h, w)."""
        b, active = len(prompts), None
        guidance = self.guidance if guidance is None else guidance
        steps = steps or self.steps
        if tokens is not None and user_scale != 0:
            active = (tokens, user_scale)
            if guidance > 1:  # one weight a row: 0 switches a row's user off
                other = adapter.zero_user(b) if uncond_user == "zero" else tokens
                weight = user_scale * torch.tensor([1.0, uncond_user != "off"], dtype=self.dtype, device=self.device)
                active = (torch.cat([tokens, other]), weight.repeat_interleave(b))
        conditions = self.encode_prompts(prompts)
        if guidance > 1:  # one batch of 2B, conditional half first
            conditions = [torch.cat(pair) for pair in zip(conditions, self.encode_prompts([""] * b))]
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        x = torch.stack([torch.randn(self.latent_shape, generator=g, dtype=self.dtype) for g in generators]).to(self.device)
        self.scheduler.set_timesteps(steps, device=self.device)
        with adapter.user(*active) if active else contextlib.nullcontext():
            for t in self.scheduler.timesteps[:-1]:  # 1 ... 1 / steps; the last entry is 0, where nothing is left to do
                t = t.expand(b).to(self.dtype)
                if guidance > 1:
                    pred, uncond = self.predict_noise(torch.cat([x, x]), torch.cat([t, t]), *conditions).chunk(2)
                    pred = torch.lerp(uncond, pred, guidance)
                else:
                    pred = self.predict_noise(x, t, *conditions)
                x = self.scheduler.step(pred, t, x, generator=generators).prev_sample
        return x


def make_scheduler(device):
    """The release's noise schedule, its constants on the device: left on the host, each use would wait for the GPU."""
    from diffusers import DDPMWuerstchenScheduler
    scheduler = DDPMWuerstchenScheduler()
    scheduler.s, scheduler._init_alpha_cumprod = scheduler.s.to(device), scheduler._init_alpha_cumprod.to(device)
    return scheduler


def tokenise(tokenizer, prompts):
    """Captions -> token ids and attention mask, (2, B, L); L = 77 at full scale."""
    ids = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
    return torch.stack([ids.input_ids, ids.attention_mask])


def fit_pixels(images, side, resample):
    """PIL images, short side resized and centre cropped -> (B, 3, side, side) uint8."""
    fitted = np.stack([ImageOps.fit(image.convert("RGB"), (side, side), resample) for image in images])
    return einops.rearrange(torch.from_numpy(fitted), "b h w c -> b c h w").contiguous()


def encode_pixels(codec, pixels, dtype):
    """(B, 3, side, side) uint8 -> latents (B, C, h, w): training and embed.py's cached latents alike."""
    return codec.encode(pixels.float() / 255).to(dtype)


def load_codec(base, device, dtype, decoder, grid, tokenizer=None, text_encoder=None):
    """A base's image codec: its own, or Stable Cascade's (which paints pictures only with tokenizer and text encoder)."""
    folder, _ = find_base(base)
    if isinstance(folder, Path) and (folder / "codec").is_dir():
        return PatchCodec.load(folder / "codec" / "codec.safetensors").to(device, dtype)
    return CascadeCodec(decoder, device, dtype, tokenizer, text_encoder, grid)


class CascadeCodec:
    """Stage C's own image encoder, and Stages B and A to paint its latents; each is loaded when first needed. where: a hub
    id or a folder like stabilityai/stable-cascade's."""
    recipe = 30, 4.0  # steps (Sec. 5.1) and guidance (the release's) of Stage C

    def __init__(self, where, device, dtype, tokenizer, text_encoder, grid):
        self.where, self.device, self.dtype, self.grid = where, device, dtype, grid
        self.fit, self.latent_shape = (32 * grid, Image.BILINEAR), (16, grid, grid)  # 32 pixels a latent
        self.mean, self.std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=device).view(2, 3, 1, 1)  # ImageNet's
        self.tokenizer, self.text_encoder = tokenizer, text_encoder  # Stage B uses the same ones

    @cached_property
    def encoder(self):
        """EfficientNetV2-S, a 1 x 1 convolution to 16 channels and a BatchNorm that makes latents of about unit variance."""
        from torchvision.models import efficientnet_v2_s
        mapper = nn.Sequential(nn.Conv2d(1280, 16, 1, bias=False), nn.BatchNorm2d(16, affine=False))
        encoder = nn.Sequential(OrderedDict(backbone=efficientnet_v2_s(weights=None).features, mapper=mapper))
        path = hub_file(self.where, "effnet_encoder.safetensors")
        try:
            encoder.load_state_dict(load_file(path))
        except (SafetensorError, OSError, RuntimeError) as error:
            raise BadInput(f"{path}: not Stable Cascade's image encoder ({' '.join(str(error).split())[:150]})") from None
        return encoder.to(self.device).eval().requires_grad_(False)  # float32: it is 0.3% of a step

    def digest(self):
        """A fingerprint of the encoder, for cached latents."""
        return hashlib.sha256(hub_file(self.where, "effnet_encoder.safetensors").read_bytes()).hexdigest()[:16]

    @cached_property
    def painter(self):
        """Stages B and A as diffusers' own pipeline, from its parts: the pipeline's from_pretrained looks for Stage A's class
        where diffusers no longer has it."""
        from diffusers import DDPMWuerstchenScheduler, StableCascadeDecoderPipeline, StableCascadeUNet
        from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
        try:
            stage_b = load_frozen(StableCascadeUNet, self.where, self.device, subfolder="decoder", variant="bf16", torch_dtype=self.dtype)
            stage_a = load_frozen(PaellaVQModel, self.where, self.device, subfolder="vqgan", torch_dtype=self.dtype)
        except (OSError, ValueError, RuntimeError) as error:
            raise BadInput(f"--decoder {self.where}: {str(error).strip().splitlines()[0]}") from None
        pipeline = StableCascadeDecoderPipeline(decoder=stage_b, tokenizer=self.tokenizer, text_encoder=self.text_encoder,
                                                scheduler=DDPMWuerstchenScheduler(), vqgan=stage_a, latent_dim_scale=10.67)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.device)

    def encode(self, pixels):
        """(B, 3, 32 h, 32 w) in [0, 1] -> latents (B, 16, h, w) float32."""
        return self.encoder((pixels - self.mean) / self.std)

    def decode(self, latents, prompts, seeds):
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        return self.painter(latents, list(prompts), num_inference_steps=10, guidance_scale=0.0, generator=generators, output_type="pt").images


class PatchCodec(nn.Module):
    """The tiny world's stand-in for Stages A and B: every patch of pixels, projected on its leading principal
    directions. Linear both ways: (B, 3, P h, P w) in [0, 1] <-> (B, C, h, w) latents of about unit variance."""
    recipe = 20, 2.0  # steps and guidance; more guidance bleaches the small base's grounds

    def __init__(self, patch=4, channels=16, side=32):
        super().__init__()
        self.patch, self.side, self.grid, self.fit = patch, side, side // patch, (side, Image.BICUBIC)
        self.latent_shape = channels, self.grid, self.grid
        self.register_buffer("mean", torch.zeros(3 * patch * patch))
        self.register_buffer("encode_matrix", torch.zeros(3 * patch * patch, channels))
        self.register_buffer("decode_matrix", torch.zeros(channels, 3 * patch * patch))

    @classmethod
    def load(cls, path):
        try:
            with safe_open(path, "pt") as file:
                meta, state = file.metadata() or {}, {k: file.get_tensor(k) for k in file.keys()}
            with torch.device("meta"):  # no memory yet, whatever size the header says
                codec = cls(int(meta["patch"]), len(state["decode_matrix"]), int(meta["side"]))
            codec.load_state_dict(state, assign=True)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
            raise BadInput(f"{path}: not a codec of tiny.py ({' '.join(str(error).split())[:150]})") from None
        return codec

    def digest(self):
        """A fingerprint of the encoder, for cached latents."""
        return hashlib.sha256(b"".join(m.double().cpu().numpy().tobytes() for m in (self.mean, self.encode_matrix))).hexdigest()[:16]

    def encode(self, pixels):
        patches = einops.rearrange(pixels.to(self.mean.dtype), "b c (h p) (w q) -> b h w (c p q)", p=self.patch, q=self.patch)
        return einops.rearrange((patches - self.mean) @ self.encode_matrix, "b h w c -> b c h w")

    def decode(self, latents, prompts=None, seeds=None):
        patches = einops.rearrange(latents, "b c h w -> b h w c") @ self.decode_matrix + self.mean
        return einops.rearrange(patches, "b h w (c p q) -> b c (h p) (w q)", p=self.patch, q=self.patch).clamp(0, 1)


# ----------------------------------------------------------------------------------------- files and scripts
def find_base(name):
    """--base -> its folder (a Path) or hub id (a string), and the subfolder of its prior."""
    where, _, sub = str(name).partition(":")
    folder, sub = TINY if where == "tiny" else where if is_hub_id(where) else Path(where), sub or "prior"
    if isinstance(folder, Path) and not (folder / sub).is_dir():
        raise BadInput(f"--base {name}: no folder {folder / sub}; expected 'tiny', a hub id or a folder with {sub}, text_encoder and tokenizer in it")
    return folder, sub


def is_hub_id(name):
    """Whether a string that is no folder here reads like owner/name on the hub."""
    return not Path(name).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) is not None


def load_frozen(cls, where, device, **how):
    """A pretrained model, in eval mode and without gradients. OSError if a tensor is missing: it would be random."""
    model, info = cls.from_pretrained(where, output_loading_info=True, **how)
    if info["missing_keys"]:
        raise OSError(f"{how.get('subfolder', where)} lacks {len(info['missing_keys'])} tensors, {sorted(info['missing_keys'])[0]} first")
    return model.to(device).eval().requires_grad_(False)


def hub_file(where, name, kind="model"):
    """A file of a folder, or of a hub repository (from the hub's cache, or downloaded into it)."""
    if not is_hub_id(where):
        path = Path(where) / name
        if not path.is_file():
            raise BadInput(f"{path}: no such file")
        return path
    from huggingface_hub import hf_hub_download
    try:
        return Path(hf_hub_download(where, name, repo_type=kind))
    except (OSError, ValueError) as error:
        raise BadInput(f"{where}: cannot get {name} from the hub: {str(error).strip().splitlines()[0]}") from None


def load_user(path):
    """A person's file, written by embed.py: dict with `user` (id), `embedding` (G, S, D) float32 (G four-shot groups, S
    stored VLM states), `shots`, `profile`, `split`, `vlm`, `layer`, `version`. Only tensors and plain values are read:
    a pickle that would run code is refused unrun."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such user file; embed.py writes them")
    try:
        user = load_plain(path)
    except Exception as error:  # torch raises many kinds here: unpickling, zip, end of file
        raise BadInput(f"{path}: refused, not a plain user file ({type(error).__name__})") from None
    e = user.get("embedding") if isinstance(user, dict) else None
    if not (torch.is_tensor(e) and e.ndim == 3 and e.dtype == torch.float32 and e.device.type == "cpu" and e.is_contiguous() and e.numel() and e.isfinite().all()):
        raise BadInput(f"{path}: expected a dict whose 'embedding' is a finite float32 tensor (groups, states, dim)")
    for key, kind in dict(vlm=str | None, layer=str | int | None, profile=list | None, shots=list | None).items():
        if not isinstance(user.get(key), kind):
            raise BadInput(f"{path}: {key!r} is of type {type(user[key]).__name__}; expected what embed.py writes")
    return user


def load_plain(path):
    """torch.load of tensors and plain values alone: a pickle that would run code is refused unrun, and a zip that would
    grow in memory (torch compresses nothing)."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if sum(part.file_size for part in file.infolist()) > os.path.getsize(path):
                raise ValueError("compressed")
    return torch.load(path, map_location="cpu", weights_only=True)


def reader_of(user):
    """Who read a person, and how: [VLM's folder name, layer, whether after a written profile]. An adapter understands no
    other reader's embeddings, though they may be as wide."""
    return [Path(user.get("vlm") or "").name, "-1" if user.get("layer") == "all" else user.get("layer"), bool(user.get("profile"))]


def write_atomically(path, write):
    """Call write(temporary path), then put the file in place in one step: readers see all of it or none, also after a
    power cut. BadInput if the disk is full: what was there before stays."""
    temporary = Path(f"{path}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors wrap a failed write in errors of their own
        temporary.unlink(missing_ok=True)
        raise BadInput(f"{path}: cannot be written ({' '.join(str(error).split())[:120]}); what was there before is kept") from None
    if os.name == "posix":  # the new name is safe only when its folder is
        folder = os.open(Path(path).parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def append_line(path, text):
    """One more line at the end of a file, on the disk when this returns. BadInput if the disk is full."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror})") from None


def read_jsonl(path):
    """Lines of a .jsonl -> list of dicts. A last line torn by a kill is dropped; BadInput names any other that is broken."""
    lines, *torn = Path(path).read_text(encoding="utf-8", errors="replace").rsplit("\n", 1)
    out = []
    for n, line in enumerate(lines.split("\n") if torn else [], 1):
        try:
            out.append(json.loads(line))
            assert isinstance(out[-1], dict)
        except (ValueError, RecursionError, AssertionError):
            raise BadInput(f"{path} line {n}: not a JSON object") from None
    return out


def write_jsonl(path, lines):
    """Dicts -> a .jsonl, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"))


def save_state(folder, **state):
    """<folder>/state.pt, what a run needs to go on; the one before it becomes state.previous.pt, so that at every instant
    a whole one is on the disk."""
    newest = Path(folder) / "state.pt"
    if newest.exists() and zipfile.is_zipfile(newest):  # a torn one shall not take the good one's place
        os.replace(newest, Path(folder) / "state.previous.pt")
    write_atomically(newest, lambda path: torch.save(state, path))


def load_state(folder, config):
    """The newest readable state of save_state(), on the CPU, or None if there is none. BadInput if none can be read, or if
    its `config` says otherwise than this one: every difference is named."""
    torn = []
    for path in (Path(folder) / name for name in ("state.pt", "state.previous.pt")):
        if path.exists():
            try:
                state = load_plain(path)
                assert isinstance(state, dict) and isinstance(state["step"], int)
            except (OSError, MemoryError):  # says nothing against the file
                raise
            except Exception as error:  # torch raises many kinds here: unpickling, zip, end of file
                torn.append(f"{path} ({type(error).__name__})")
                continue
            if torn:
                print(f"cannot resume from {torn[0]}: going on from {path.name}, step {state['step']}", file=sys.stderr)
            before = state.get("config")
            before = before if isinstance(before, dict) else {}
            if different := [key for key in config if before.get(key, config[key]) != config[key]]:  # an earlier version's run has fewer
                flag = lambda key: key if " " in key else "--" + key.replace("_", "-")
                raise BadInput("; ".join(f"{flag(key)} is {config[key]}, but was {before[key]}" for key in different) + f" when the run in {folder} began")
            return state
    if torn:
        raise BadInput(f"cannot resume from {' or '.join(torn)}; start again in another folder")


def rank_and_world():
    """This process's number, and how many there are, as torchrun tells; 0 and 1 without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def exchange():
    """BadInput if another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise BadInput(f"another process is gone, see its own last line ({str(error).splitlines()[0][:100]})") from None


def from_all_ranks(value):
    """[rank 0's, rank 1's, ...] under torchrun, else [value]; waits for all of them."""
    if not torch.distributed.is_initialized():
        return [value]
    values = [None] * torch.distributed.get_world_size()
    with exchange():
        torch.distributed.all_gather_object(values, value)
    return values


def sum_over_ranks(tensors):
    """Each of these tensors of one dtype becomes its sum over ranks, in one exchange."""
    flat = torch.cat([t.flatten() for t in tensors])
    with exchange():
        torch.distributed.all_reduce(flat)
    torch._foreach_copy_(tensors, [part.view_as(t) for t, part in zip(tensors, flat.split([t.numel() for t in tensors]))])


def pick_device(name="auto"):
    there = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    if not there[name]:
        raise BadInput(f"--device {name}: PyTorch sees no such device here")
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU each
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise BadInput(f"--nproc-per-node: more processes than the {torch.cuda.device_count()} GPUs here")
        torch.cuda.set_device(name := f"cuda:{os.environ['LOCAL_RANK']}")
    return name


def pick_dtype(name, device):
    """The dtype of a --dtype; auto is float32 on a CPU, else bfloat16."""
    return getattr(torch, name) if name != "auto" else torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def run_script(name, run, args):
    """run(args); whatever is wrong with the input becomes one line and exit status 1."""
    try:
        run(args)
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted")
    except (BadInput, OSError) as problem:
        sys.exit(f"{name}: error: {str(problem).strip().splitlines()[-1]}")  # a reader process puts a traceback before it
