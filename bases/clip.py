"""The frozen CLIPs that Sec. 5.1's rewards are: CLIP itself, HPS, PickScore, and the one under
LAION's aesthetic predictor. rewards.py has them score images."""

import pickle
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

import utils
from utils import InputError, hub_file

REWARDS = {  # name: title, hub repository, file in it if it is no transformers model
    "clip": ("CLIP ViT-H/14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", None),
    "aesthetic": ("LAION aesthetic predictor, ViT-L/14", "openai/clip-vit-large-patch14", None),
    "hps": ("HPS v2.1", "xswu/HPSv2", "HPS_v2.1_compressed.pt"),
    "hps2.0": ("HPS v2.0", "xswu/HPSv2", "HPS_v2_compressed.pt"),
    "pickscore": ("PickScore v1", "yuvalkirstain/PickScore_v1", None),
}
AESTHETIC = "sac+logos+ava1-l14-linearMSE.pth"
AESTHETIC_URL = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
AESTHETIC_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"

# parts of open_clip's names of a CLIP's tensors, and transformers'; to be replaced in this order
OPEN_CLIP_NAMES = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
    ".attn.": ".self_attn.",
    ".ln_": ".layer_norm",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def from_open_clip(state):
    """State dict of an open_clip CLIP, as HPS is published -> of transformers' CLIPModel."""
    converted = {}
    for key, value in state.items():
        for theirs, ours in OPEN_CLIP_NAMES.items():
            key = key.replace(theirs, ours)
        if key in ("text_projection.weight", "visual_projection.weight"):
            value = value.T.contiguous()
        if ".in_proj_" in key:  # one matrix for queries, keys and values
            for name, part in zip("qkv", value.chunk(3), strict=True):
                converted[key.replace(".in_proj_", f".{name}_proj.")] = part.contiguous()
        else:
            converted[key] = value
    return converted


@lru_cache(None)
def load_reward(name, device):
    """A reward of REWARDS: CLIPModel, processor, and the aesthetic predictor's head or None."""
    from transformers import CLIPConfig, CLIPModel

    title, repo, file = REWARDS[name]
    processor_repo = processor_of(name)
    try:
        processor = load_processor(processor_repo)
        if file:
            model = CLIPModel(CLIPConfig.from_pretrained(processor_repo))
            content = torch.load(hub_file(repo, file), map_location="cpu", weights_only=True)
            model.load_state_dict(from_open_clip(content["state_dict"]))
        else:
            model = CLIPModel.from_pretrained(repo)
        head = load_aesthetic_head(device) if name == "aesthetic" else None
    except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        problem = f"cannot load {repo}: {utils.first_line(error)}"
        raise InputError(f"reward {name} ({title}): {problem}") from None
    # float32: where images are nearly alike rounding would choose
    return model.to(device).float().eval().requires_grad_(False), processor, head


def processor_of(name):
    """The repository of a reward's CLIPProcessor: HPS and PickScore are fine-tuned from the ViT-H
    CLIP and share its."""
    return REWARDS[name if name == "aesthetic" else "clip"][1]


@lru_cache(None)
def load_processor(repo):
    from transformers import CLIPProcessor

    return CLIPProcessor.from_pretrained(repo)


def load_aesthetic_head(device):
    """LAION's predictor on CLIP's image embedding (B, 768) -> (B,): five linear layers without
    activations between them; fetched from its repository, as it is not on the hub."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / AESTHETIC
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        url = AESTHETIC_URL + AESTHETIC.replace("+", "%2B")
        torch.hub.download_url_to_file(url, path, hash_prefix=AESTHETIC_SHA256)
    state = torch.load(path, map_location=device, weights_only=True)

    def head(x):
        x = x.float()
        for i in (0, 2, 4, 6, 7):
            x = F.linear(x, state[f"layers.{i}.weight"], state[f"layers.{i}.bias"])
        return x[:, 0]

    return head
