"""The frozen text-to-image models that an adapter can be trained on, and what one has to offer.

A base is a class (no base class: these names are all that the scripts use) with

    name, device, dtype      as it was loaded
    prior, tokenizer, codec  the network itself (a diffusers model), and what serves it
    attention_layers()       diffusers' Attention modules that the adapter hooks, in order
    channels                 their widths, what UserAdapter takes
    latent_shape, image_size (C, h, w) of one image; side in pixels of the images it learns from
    steps, guidance          of sampling, by default; token_dim: width of the user tokens, likewise
    tokenize(captions)       -> (2, B, L) int64, on the CPU: token ids, and mask or a second text's
    encode_tokens(tokens)    -> conditions: tensors, batch first; encode_prompts(captions): at once
    encode_pixels(pixels)    (B, 3, S, S) uint8 on the device -> latents (B, C, h, w) in dtype; and
    encode_images(images)    of PIL images of any size
    add_noise(x_0, eps, t)   -> x_t. t: (B,) float in (0, 1], 1 being pure noise
    target(x_0, eps, t)      what the prediction should have been: eps for a noise-predicting model
    predict(x_t, t, *conditions)   -> (B, C, h, w); the user is whom `adapter.user(...)` has set
    sample(prompts, seeds, adapter, user_tokens, user_scale, guidance, steps) -> latents
    decode(latents, prompts, seeds)   -> PIL images
    compile_blocks()         torch.compile for training

A codec makes cached latents: image_size, resample, latent_shape, encode(pixels in [0, 1]), digest()
"""

from pathlib import Path

from bases.cascade import StableCascade
from bases.sana import Sana
from bases.sdxl import StableDiffusionXL
from utils import InputError, first_line, hub_file, is_hub_id, read_json

# a checkpoint's own class, in its model_index.json, less "Pipeline"; without that file a Cascade
BASES = dict(StableCascadePrior=StableCascade, StableDiffusionXL=StableDiffusionXL, Sana=Sana)


def find_class(name):
    """Our class for a checkpoint; InputError of one that is none of BASES, or not to be had."""
    repo = str(name).partition(":")[0]
    if not is_hub_id(repo) and not (Path(repo) / "model_index.json").is_file():
        return StableCascade
    kind = str(read_json(hub_file(repo, "model_index.json")).get("_class_name"))
    kind = kind.removesuffix("Pipeline")
    if kind not in BASES:
        raise InputError(f"--base {name}: a {kind}; expected one of {', '.join(BASES)}")
    return BASES[kind]


def load_base(name="tiny", device="cpu", dtype=None, decoder=None, grid=None, load=None):
    """A frozen base by its name: "tiny", a hub id or a folder. See StableCascade for the rest."""
    try:
        return (load or find_class(name))(name, device, dtype, decoder, grid)
    except InputError:
        raise
    except Exception as error:  # libraries raise many kinds of a broken checkpoint
        raise InputError(f"--base {name}: cannot load: {first_line(error)}") from None


def load_codec(name, *settings):
    """The codec of a base alone, which makes cached latents."""
    return load_base(name, *settings, load=find_class(name).load_codec)
