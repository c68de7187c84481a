"""The frozen LLaVA-OneVision: what it is asked, how it is loaded and read (Sec. 4.2).

Nobody trains it. embed.py has it read users; evaluate.py may have it judge, or ask another model
behind an endpoint the same.
"""

import base64
import io
import os
import re
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

import utils
from utils import InputError

PROFILE_TOKENS = 1536  # for four described pairs and a profile
RETRIES = 6  # of a busy or failing endpoint

# the chat format of https://huggingface.co/llava-hf/llava-onevision-qwen2-7b-ov-hf, Qwen2's
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
INTRO = "A person was shown pairs of pictures, each pair drawn for one caption, and chose from "
INTRO += "each the one they preferred."
PAIR = "\n\nPair {}. Caption: "
PREFERRED = "\nPreferred: "
DISPREFERRED = "\nDispreferred: "
QUESTIONS = {
    "taste": "\n\nIn a few words, what does this person like in a picture?",
    "profile": "\n\nFor every pair, describe both pictures and say how they differ in style, "
    "visual quality and aesthetics. Then write 'User profile:' and sum up what this person likes.",
    "judge": "\n\nWhich of two further pictures would this person choose? Answer 'CHOICE: 1' or "
    "'CHOICE: 2'. Caption: ",
}
IMAGE_1 = "\nPicture 1: "
IMAGE_2 = "\nPicture 2: "
ASSISTANT_TURN = "<|im_end|>\n<|im_start|>assistant\n"


def build_vlm_prompt(captions, question, caption=None):
    """Chat text with one <image> an image, each beside its own label; two images a caption,
    preferred first. question: a key of QUESTIONS; "judge": about two more images of `caption`."""
    text = SYSTEM + INTRO
    for i, shot_caption in enumerate(captions, 1):
        text += PAIR.format(i) + strip_markup(shot_caption)
        text += PREFERRED + "<image>" + DISPREFERRED + "<image>"
    text += QUESTIONS[question]
    if question == "judge":
        text += strip_markup(caption) + IMAGE_1 + "<image>" + IMAGE_2 + "<image>"
    return text + ASSISTANT_TURN


def strip_markup(caption):
    """A caption without anything that could forge the chat."""
    return " ".join(re.sub(r"<image>|<video>|<\|.*?\|>", " ", caption).split())


def load_vlm(name, device):
    """LLaVA-OneVision, frozen: (model, tokenizer, image processor). name: "tiny", a hub id or a
    folder in its layout. Raises InputError if it cannot be loaded."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = utils.TINY / "vlm" if name == "tiny" else Path(name)
    if utils.is_hub_id(name):
        folder = name
    elif not (folder / "config.json").is_file():
        expected = "expected 'tiny', a hub id or a folder in its layout"
        raise InputError(f"--vlm {name}: no {folder / 'config.json'}; {expected}")
    cls = transformers.LlavaOnevisionForConditionalGeneration
    try:
        model = utils.load_frozen(cls, folder, device, dtype=utils.pick_dtype("auto", device))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
        processor = transformers.LlavaOnevisionImageProcessorPil.from_pretrained(folder)
        return model, tokenizer, processor
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"--vlm {name}: cannot load {folder}: {utils.first_line(error)}") from None


def vlm_inputs(vlm, prompts, images):
    """Texts with one <image> an image, and a list of PIL images a text, or the pixels that
    prepare_group() makes of it -> the model's inputs, left-padded. Each image is one tile, whose
    patches end in one line-break token."""
    model, tokenizer, processor = vlm
    vision = model.config.vision_config
    count = (vision.image_size // vision.patch_size) ** 2 + 1
    pixels = [processor([some]) if isinstance(some, list) else some for some in images]
    keys = ("image_sizes", "batch_num_images", "pixel_values")
    inputs = {key: torch.cat([torch.as_tensor(np.asarray(p[key])) for p in pixels]) for key in keys}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.device, model.dtype)
    texts = [prompt.replace("<image>", "<image>" * count) for prompt in prompts]
    encoded = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    return inputs | {key: encoded[key].to(model.device) for key in ("input_ids", "attention_mask")}


@torch.no_grad()
def generate_text(vlm, prompts, images, max_new_tokens=512):
    """The VLM's greedy answers: texts, whether each came to its end, and the inputs of vlm_inputs()
    with the answers appended, whose mask leaves out padding and end tokens."""
    model, tokenizer, _ = vlm
    inputs = vlm_inputs(vlm, prompts, images)
    eos_ids = sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")})
    stop = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=eos_ids)
    input_ids = model.generate(**inputs, **stop, do_sample=False, max_new_tokens=max_new_tokens)
    answers = input_ids[:, inputs["input_ids"].shape[1] :]
    is_end = torch.isin(answers, torch.tensor(eos_ids, device=input_ids.device))
    answer_mask = (~is_end).long().cumprod(1)  # 1 until the first end
    answers = [answer[mask > 0] for answer, mask in zip(answers, answer_mask, strict=True)]
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    attention_mask = torch.cat([inputs["attention_mask"], answer_mask], 1)
    ended = (answer_mask == 0).any(1).tolist()
    return texts, ended, inputs | dict(input_ids=input_ids, attention_mask=attention_mask)


def prepare_group(processor, shots):
    """A group's (caption, preferred, dispreferred) as the VLM takes them; a worker's part."""
    images = [image for shot in shots for image in shot[1:]]
    return dict(captions=[shot[0] for shot in shots], pixels=processor([images]))


@torch.no_grad()
def embed_users(vlm, groups, layer=-1, profile=False):
    """The user embeddings of four-shot groups, lists of (caption, preferred, dispreferred), or what
    prepare_group() makes of them.

    Returns hidden states of the last position (B, S, D) float32 (S = 1, or every layer's with layer
    "all"), and each group's written profile, or None: also of one that does not end within
    PROFILE_TOKENS. The last position is the prompt's, or the profile's: there the state is the one
    that predicts the profile's end.
    """
    question = "profile" if profile else "taste"
    groups = [g if isinstance(g, dict) else prepare_group(vlm[2], g) for g in groups]
    prompts = [build_vlm_prompt(group["captions"], question) for group in groups]
    images = [group["pixels"] for group in groups]
    if profile:
        texts, ended, inputs = generate_text(vlm, prompts, images, PROFILE_TOKENS)
        texts = [text if whole else None for text, whole in zip(texts, ended, strict=True)]
    else:
        texts, inputs = [None] * len(groups), vlm_inputs(vlm, prompts, images)
    model = vlm[0].model
    if layer == -1:  # all layers' states of a 7B model's 6,500 positions would take 1.3 GB a group
        states = [model(**inputs, use_cache=False).last_hidden_state]
    else:
        states = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
        if layer != "all":
            n = len(states)
            if not -n <= layer < n:
                raise InputError(f"--layer {layer}: this VLM has states {-n} to {n - 1}, or all")
            states = [states[layer]]
    mask = inputs["attention_mask"]
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)  # (B,) position of the last token
    rows = torch.arange(len(groups))
    return torch.stack([state[rows, last] for state in states], 1).float().cpu(), texts


class Endpoint:
    """A model behind an OpenAI-compatible URL, asked as generate_text() asks the VLM; its key is
    OPENAI_API_KEY. Raises InputError for whatever is no answer."""

    def __init__(self, url, model, timeout):
        import openai

        key = os.environ.get("OPENAI_API_KEY") or "none"
        if not re.fullmatch("[!-~]+", key):
            problem = "a line's end, a space or another letter that no HTTP header can hold"
            raise InputError(f"OPENAI_API_KEY: there is {problem} in it")
        self.client = openai.OpenAI(base_url=url, api_key=key, max_retries=RETRIES, timeout=timeout)
        self.url = url
        self.settings = dict(model=model, temperature=0)

    def answer(self, prompt, images):
        """The answer to a prompt with one <image> an image, without the VLM's own chat markup."""
        words, *others = prompt[len(SYSTEM) : -len(ASSISTANT_TURN)].split("<image>")
        content = [dict(type="text", text=words)]
        for image, words in zip(images, others, strict=True):
            small = image.convert("RGB")
            small.thumbnail((512, 512))
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=90)
            url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
            content.append(dict(type="image_url", image_url=dict(url=url, detail="low")))
            content.append(dict(type="text", text=words))
        try:
            message = self.complete([dict(role="user", content=content)]).choices[0].message
            text = message.content or ""
            if isinstance(text, list):  # in parts
                text = "".join(part["text"] for part in text if part["type"] == "text")
            return text.strip()
        except Exception as error:  # openai's, or of a reply that is no chat completion
            refused = r"moderation|safety|content.filter|content.policy"
            if getattr(error, "status_code", None) == 400 and re.search(refused, str(error)):
                return ""  # of these images alone: unparsable, and counted
            reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
            kept = "What is judged is kept: the same command goes on"
            raise InputError(f"--judge-url {self.url}: {reason}. {kept}") from None

    def complete(self, messages):
        settings = dict(self.settings)
        try:
            return self.client.chat.completions.create(messages=messages, **settings)
        except Exception as error:
            if getattr(error, "status_code", None) != 400 or "temperature" not in str(error):
                raise
        del settings["temperature"]  # newer models have one only
        self.settings = settings
        return self.client.chat.completions.create(messages=messages, **settings)
