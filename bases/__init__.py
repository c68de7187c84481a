"""The frozen text-to-image models that an adapter can be trained on, and what one has to offer.

A base is a class (no base class: these names are all that the scripts use) with

    name, device, dtype      as it was loaded
    prior, tokenizer, codec  the network itself (a diffusers model), and what serves it
    attention_layers()       diffusers' Attention modules that the adapter hooks, in order
    channels                 their widths, what UserAdapter takes
    latent_shape             (C, h, w) of one image
    image_size               side in pixels of the images it learns from
    steps, guidance          of sampling, by default
    tokenize(captions)       -> token ids and mask, (2, B, L) int64, on the CPU
    encode_tokens(tokens)    -> conditions: a tuple of tensors, batch first; no gradient
    encode_prompts(captions) -> the two together
    encode_pixels(pixels)    (B, 3, S, S) uint8 on the device -> latents (B, C, h, w) in dtype
    encode_images(images)    PIL images of any size -> the same
    add_noise(x_0, eps, t)   -> x_t. t: (B,) float in (0, 1], 1 being pure noise
    target(x_0, eps, t)      what the prediction should have been: eps for a noise-predicting model
    predict(x_t, t, *conditions)   -> (B, C, h, w); the user is whom `adapter.user(...)` has set
    sample(prompts, seeds, adapter, user_tokens, user_scale, guidance, steps) -> latents
    decode(latents, prompts, seeds)   -> PIL images
    compile_blocks()         torch.compile for training

A codec alone makes cached latents: image_size, resample, latent_shape, encode(pixels in [0, 1]) and
digest(), a fingerprint of its encoder.
"""

from bases.cascade import StableCascade, encode_pixels, load_codec

__all__ = ["encode_pixels", "load_base", "load_codec"]


def load_base(name="tiny", device="cpu", dtype=None, decoder=None, grid=24):
    """A frozen base by its name: "tiny", a hub id or a folder. See StableCascade for the rest."""
    return StableCascade(name, device, dtype, decoder, grid)
