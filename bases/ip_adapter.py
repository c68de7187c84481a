"""A PPD adapter as an IP-Adapter: any SDXL pipeline of diffusers loads it, by load_ip_adapter."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from utils import InputError, first_line, write_atomically

CARD = """---
library_name: diffusers
base_model: {base}
tags: [ppd, ip-adapter, preference-alignment]
---

# A PPD adapter, as an IP-Adapter

Personalized preference fine-tuning (PPD) of `{base}`, step {step}: one model for many users.
`{name}` holds the adapter in IP-Adapter's layout, `{users}` the embeddings of
{names}, of width {width}, read by {reader}.

```python
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

folder = "."  # where these files are
pipeline = DiffusionPipeline.from_pretrained("{base}", torch_dtype=torch.float32)
pipeline.load_ip_adapter(folder, subfolder="", weight_name="{name}", image_encoder_folder=None)
pipeline.set_ip_adapter_scale(1.0)  # the strength of the taste; 0 is the base
user = load_file(folder + "/{users}")["{shown}"]  # (1, 1, {width})
both = torch.cat([user, user])  # both halves of guidance see the user
image = pipeline("a red star", ip_adapter_image_embeds=[both]).images[0]
```

Recipe: {recipe}. Trained on the choices of {trained_on}. Only embeddings of users who were read in
the same way mean anything to it, and only to this base, whose license holds for what it makes. It
moves images toward what users like, misreadings of them included.
"""


def export(path, adapter, base, users):
    """Write the adapter in IP-Adapter's layout, its standardization folded into the projector;
    beside it users {name: (1, D)} and the zero user, in raw units and clamped, as
    UserAdapter.forward clamps them, and a model card. Returns the three files; InputError of an
    adapter that has no such layout, or a file of another kind."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"--export {path}: expected a name that ends in .safetensors")
    width = getattr(base.prior.config, "cross_attention_dim", None)
    sizes = (adapter.n_tokens, adapter.sizes["token_dim"])
    if type(base.prior).__name__ != "UNet2DConditionModel" or sizes != (4, width):
        expected = f"4 of {width}" if width else "a UNet2DConditionModel's"
        problem = f"has {sizes[0]} user tokens of {sizes[1]}; IP-Adapter's layout takes {expected}"
        raise InputError(f"--export: {adapter.path} {problem}")
    path.parent.mkdir(parents=True, exist_ok=True)
    ours = {key: value.detach().cpu().double() for key, value in adapter.state_dict().items()}
    mean, std = ours["mean"], ours["std"]
    weight = ours["project.weight"] / std
    bias = ours.get("project.bias", 0) - weight @ mean  # none if --bias-free
    state = {"image_proj.proj.weight": weight, "image_proj.proj.bias": bias}
    state["image_proj.norm.weight"] = scale = ours["norm.weight"]
    state["image_proj.norm.bias"] = ours.get("norm.bias", torch.zeros_like(scale))
    for i, layers in enumerate(zip(adapter.to_k, adapter.to_v, strict=True)):
        for name, layer in zip("kv", layers, strict=True):
            state[f"ip_adapter.{2 * i + 1}.to_{name}_ip.weight"] = layer.weight
    users = users | {"zero": mean[None]}
    shown = [*users][0]
    for name, user in users.items():
        users[name] = (((user.cpu() - mean) / std).clamp(-5, 5) * std + mean)[None]
    files = [path, path.with_name(path.stem + "-users.safetensors"), path.with_suffix(".md")]
    for file, tensors in zip(files, (state, users), strict=False):
        tensors = {k: t.detach().float().cpu().contiguous() for k, t in tensors.items()}
        write_atomically(file, lambda to, tensors=tensors: save_file(tensors, to))
    header = adapter.header
    vlm, layer, profile = header.get("reader") or ["one-hot", -1, False]
    fields = dict(base=base.name, name=path.name, users=files[1].name, shown=shown)
    fields |= dict(step=header.get("step"), width=adapter.user_dim, names=", ".join(users))
    fields["reader"] = f"{vlm}, layer {layer}" + ", after a written profile" * profile
    fields["trained_on"] = f"the users in {Path(str(header.get('users'))).name}"
    card = CARD.format(recipe=json.dumps(header.get("recipe")), **fields)
    write_atomically(files[2], lambda to: to.write_text(card, encoding="utf-8"))
    return files


def push(files, repository):
    """Upload export()'s files to a model repository of the hub, made if it is not there."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        for file in files:
            name = "README.md" if file.suffix == ".md" else file.name
            api.upload_file(path_or_fileobj=file, path_in_repo=name, repo_id=repository)
    except Exception as error:  # of the hub's client, which raises many kinds
        raise InputError(f"--push-to-hub {repository}: {first_line(error)}") from None
