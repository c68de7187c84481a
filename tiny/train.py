"""Trains the small checkpoints of tiny/checkpoints; nobody needs to read it to learn the method.

From the repository's root; a killed run goes on when its command is given again:

    python -m tiny.train base --out first     # small Stage C, 40 minutes
    python -m tiny.train base --init first --out base --seed 1 --lr 5e-4 --lean 1.3
    python -m tiny.train flow --out flow      # small Sana, by flow matching
    python -m tiny.train vlm --out vlm        # small LLaVA-OneVision, 17 minutes
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import diffusers
import einops
import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import utils
from bases import llava
from bases.cascade import PatchCodec
from tiny import world
from tiny.world import AXES, AXIS_WORDS, BRADLEY_TERRY_SCALE, CAPTIONS, COLORS, SHAPES, WORDS
from utils import InputError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# emulated, on a CPU without it, bfloat16 takes thirty times as long as float32
AUTOCAST = dict(device_type=DEVICE, dtype=torch.bfloat16)
AUTOCAST["enabled"] = DEVICE == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def training_loop(args, models, loss_of, carry, after=None, beta_2=0.99, weight_decay=0.01):
    """The small models' resumable loop. loss_of(step) -> loss, {name: number to log}; carry: other
    tensors that a resume needs, by name; after(step) follows the optimizer's step."""
    trained = [p for p in models.parameters() if p.requires_grad]
    adam = dict(lr=args.lr, betas=(0.9, beta_2), weight_decay=weight_decay)
    optimizer = torch.optim.AdamW(trained, **adam)
    log = {}
    began = time.time()
    out, steps = Path(args.out), args.steps
    out.mkdir(parents=True, exist_ok=True)
    config = dict(steps=steps, lr=args.lr)
    saved = utils.load_checkpoint(out, config)
    if saved:
        try:
            models.load_state_dict(saved["models"])
            optimizer.load_state_dict(saved["optimizer"])
            for name, tensor in carry.items():
                tensor.copy_(saved["carry"][name])
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            problem = f"holds a run of other sizes: {utils.first_line(error)}"
            raise InputError(f"--out {out} {problem}") from None
    start = saved["step"] if saved else 0
    print(f"{sum(p.numel() for p in models.parameters()) / 1e6:.2f}M parameters, from step {start}")
    for step in tqdm(range(start, steps), initial=start, total=steps, desc=out.name, disable=None):
        factor = min((step + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * factor
        loss, numbers = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if after:
            after(step)
        for name, number in numbers.items():
            log.setdefault(name, []).append(number.detach())
        if (step + 1) % 250 == 0:
            means = [f"{name} {torch.stack(v[-50:]).mean():.4f}" for name, v in log.items()]
            print(f"step {step + 1} {', '.join(means)} {time.time() - began:.0f} s", flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            state = dict(models=models.state_dict(), optimizer=optimizer.state_dict())
            utils.save_checkpoint(out, config=config, carry=carry, step=step + 1, **state)


def make_tokenizer():
    """A CLIPTokenizer with a token for each word of the world; other text falls back to bytes."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = []
    for word in ["an", *COLORS, *SHAPES, *WORDS]:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:  # byte-pair encoding: the earliest known merge, else the leftmost
            pairs = list(zip(pieces, pieces[1:], strict=False))
            known = [pair for pair in pairs if pair in merges]
            pair = min(known, key=merges.index, default=pairs[0])
            if not known:
                merges.append(pair)
            i = pairs.index(pair)
            pieces[i : i + 2] = ["".join(pair)]
    names = [*alphabet, *(letter + "</w>" for letter in alphabet), *map("".join, merges)]
    names = dict.fromkeys([*names, "<|startoftext|>", "<|endoftext|>"])
    vocab = {token: i for i, token in enumerate(names)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)
    for word in [*COLORS, *SHAPES, *WORDS]:
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word
    return tokenizer


def axis_words(z, axes):
    """What these axes of an image, z (5,) standardized, are called, e.g. ["dark", "large"]."""
    return [AXIS_WORDS[a][int(z[a] < 0)] for a in axes]


def fit_codec(images, patch=4, channels=16):
    """PCA of the patches of images (B, 3, H, W); 16 channels hold 99% of the variance. Whitened in
    part: wholly, faint directions get heavy tails; not at all, the flat ground outweighs all."""
    codec = PatchCodec(patch, channels)
    patches = einops.rearrange(images, "b c (h p) (w q) -> (b h w) (c p q)", p=patch, q=patch)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T.double()))
    values, vectors = values.flip(0)[:channels], vectors.flip(1)[:, :channels]
    scale = values**0.35  # std ** 0.7
    scale *= (values / scale**2).mean().sqrt()  # mean latent variance 1
    codec.mean.copy_(patches.mean(0))
    codec.encode_matrix.copy_(vectors / scale)
    codec.decode_matrix.copy_((vectors * scale).T)
    return codec


def make_base(tokenizer, width, layers):
    """The small prior and text encoder, with random weights; flat like Stage C."""
    sizes = dict(hidden_size=64, projection_dim=64, intermediate_size=256, hidden_act="gelu")
    sizes |= dict(num_hidden_layers=2, num_attention_heads=2, vocab_size=len(tokenizer))
    sizes |= {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    sizes |= dict(max_position_embeddings=tokenizer.model_max_length)
    text = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**sizes)).to(DEVICE)
    sizes = dict(in_channels=16, out_channels=16, patch_size=1, timestep_ratio_embedding_dim=64)
    sizes |= dict(conditioning_dim=width, block_out_channels=(width, width), dropout=(0.1, 0.1))
    sizes |= dict(num_attention_heads=(width // 64, width // 64), switch_level=(False,))
    sizes |= dict(down_num_layers_per_block=layers, up_num_layers_per_block=layers[::-1])
    sizes |= dict(clip_text_in_channels=64, clip_text_pooled_in_channels=64, clip_seq=4)
    prior = diffusers.StableCascadeUNet(**sizes, clip_image_in_channels=64).to(DEVICE)
    # the class never calls its own initialization; start at "no noise"
    torch.nn.init.zeros_(prior.clf[1].weight)
    # dropout stays in the config, as in the release, but a model this small only loses by it
    return prior.eval(), text.eval()


def draw_captioned(args):
    """Images (pictures, 3, H, W), their captions, and four more of each with one to three words for
    what stands out in it; --axes: how often each is named."""
    rng = np.random.default_rng(args.seed)
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(args.pictures)]
    drawn = [world.draw_random(rng, c) for c in tqdm(captions, desc="drawing", disable=None)]
    images = world.to_array(drawn)
    wordings = []
    odds = np.array(args.axes) / sum(args.axes)
    for caption, z in zip(captions, world.standardized(images), strict=True):
        for _ in range(4):
            order = rng.choice(len(AXES), size=len(AXES), replace=False, p=odds)
            named = [a for a in order if abs(z[a]) > 0.5][: rng.integers(1, 4)]
            wordings.append(", ".join([caption, *axis_words(z, named)]))
    return captions, wordings, torch.from_numpy(images).permute(0, 3, 1, 2)


def weight_average(models):
    """Running averages of the weights, {name: tensor}, and what updates them after a step."""
    ema = {name: value.detach().clone() for name, value in models.state_dict().items()}

    @torch.no_grad()
    def average(step):
        decay = min(0.999, (step + 1) / (step + 10))
        for name, parameter in models.named_parameters():
            ema[name].lerp_(parameter, 1 - decay)

    return ema, average


def match_words(state, folder, model, tokenizer, anew):
    """A text encoder's state dict for another vocabulary: the rows of the words that both have. A
    word of `anew` gets the mirror image of its opposite's, in the middle of all taste words."""
    vocab = transformers.CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer").get_vocab()
    (key,) = (key for key in state if "token_embedding" in key)
    rows = model.state_dict()[key].clone()
    for word, i in tokenizer.get_vocab().items():
        if word in vocab:
            rows[i] = state[key][vocab[word]]
    middle = rows[tokenizer.convert_tokens_to_ids([f"{word}</w>" for word in WORDS])].mean(0)
    for word in anew:
        axis, sign = WORDS[word]
        opposite = tokenizer.convert_tokens_to_ids(AXIS_WORDS[axis][int(sign > 0)] + "</w>")
        rows[tokenizer.convert_tokens_to_ids(word + "</w>")] = 2 * middle - rows[opposite]
    return state | {key: rows}


def noisy_batches(args, latents, tokenizer, captions, wordings):
    """A function from a step to its batch: latents and noise (B, C, h, w), t (B,), which leans to 1
    (with --lean 2 half are above 0.75), and token ids and masks of the captions (2, B, L), a share
    --worded with taste words, a tenth empty."""

    def tokenize(texts):
        encoded = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return torch.stack([encoded.input_ids, encoded.attention_mask])

    plain, worded, empty = map(tokenize, (captions, wordings, [""]))

    def batch_of(step):
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        index = torch.randint(len(latents), (args.batch,), generator=g)
        wording = 4 * index + torch.randint(4, (args.batch,), generator=g)
        kind = torch.rand(args.batch, generator=g)[:, None]
        ids = torch.where(kind < args.worded, worded[:, wording], plain[:, index])
        ids = torch.where(kind > 0.9, empty, ids).to(DEVICE)
        noise = torch.randn(latents[index].shape, generator=g).to(DEVICE)
        t = (1 - torch.rand(args.batch, generator=g) ** args.lean).clamp(0.001, 1).to(DEVICE)
        return latents[index].to(DEVICE), noise, t, ids

    return batch_of


def train_base(args):
    """Train the small Stage C, its text encoder and the codec; write them in the hub's folder
    layout. Noise prediction on the release's schedule (Eq. 1), exponential weight average."""
    out, init = Path(args.out), args.init
    captions, wordings, images = draw_captioned(args)
    codec_file = "codec/codec.safetensors"
    codec = PatchCodec.load(Path(init) / codec_file) if init else fit_codec(images[:5000])
    latents = codec.encode(images)
    error = (codec.decode(latents[:2000]) - images[:2000]).abs().mean()
    print(f"{args.pictures} images, latent variance {latents.var():.3f}, codec error {error:.4f}")

    tokenizer = make_tokenizer()
    prior, text = make_base(tokenizer, args.width, args.layers)
    if init:  # go on from a finished base: its codec too, the latents are its own
        settings = dict(variant="bf16", torch_dtype=torch.float32)
        for model, name in ((prior, "prior"), (text, "text_encoder")):
            before = type(model).from_pretrained(init, subfolder=name, **settings).state_dict()
            if name == "text_encoder":
                before = match_words(before, init, model, tokenizer, args.anew)
            model.load_state_dict(before)
    batch_of = noisy_batches(args, latents, tokenizer, captions, wordings)

    scheduler = diffusers.DDPMWuerstchenScheduler()
    text.requires_grad_(not args.frozen_text)
    models = torch.nn.ModuleDict(dict(prior=prior, text=text))
    ema, average = weight_average(models)
    fast_prior = torch.compile(prior)
    # Taste words act at the very first, noisiest steps, whose errors are a thousandth of the last
    # ones': with t uniform and errors unweighted they are never learned. So t leans to 1, and every
    # timestep's error counts relative to what is usual there (Stage C's own "adaptive" weight).
    usual_error = torch.ones(50, device=DEVICE)

    def loss_of(step):
        x0, noise, t, ids = batch_of(step)
        # sdpa's fused backward is slow on a CPU: plain matrix products take half the time
        with torch.autocast(**AUTOCAST), sdpa_kernel(SDPBackend.MATH):
            encoded = text(ids[0], attention_mask=ids[1], output_hidden_states=True)
            noisy = scheduler.add_noise(x0, noise, t)
            clip = dict(clip_text=encoded.hidden_states[-1], clip_img=x0.new_zeros(len(x0), 1, 64))
            noise_pred = fast_prior(noisy, t, encoded.text_embeds[:, None], **clip).sample
        error = (noise_pred.float() - noise).square().mean((1, 2, 3))
        bucket = (t * 49.999).long()
        usual_error.index_copy_(0, bucket, torch.lerp(usual_error[bucket], error.detach(), 0.05))
        return (error / usual_error[bucket]).mean(), dict(loss=error.mean())

    training_loop(args, models, loss_of, dict(typical=usual_error, **ema), average)
    models.load_state_dict(ema)
    for model, name in ((prior, "prior"), (text, "text_encoder")):  # bf16, as the release's variant
        model.to(torch.bfloat16).save_pretrained(out / name, variant="bf16")
    tokenizer.save_pretrained(out / "tokenizer")
    scheduler.save_pretrained(out / "scheduler")
    (out / "codec").mkdir(exist_ok=True)
    metadata = dict(patch=str(codec.patch), side=str(codec.image_size))
    save_file(codec.state_dict(), out / codec_file, metadata)


def train_flow(args):
    """Train a small Sana, which predicts the velocity eps - x_0 of x_t = (1 - t) x_0 + t eps, with
    the text encoder and codec of the base --init as they are."""
    out, init = Path(args.out), args.init
    captions, wordings, images = draw_captioned(args)
    latents = PatchCodec.load(Path(init) / "codec/codec.safetensors").encode(images)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(init, subfolder="tokenizer")
    settings = dict(subfolder="text_encoder", variant="bf16", torch_dtype=torch.float32)
    text = transformers.CLIPTextModelWithProjection.from_pretrained(init, **settings).to(DEVICE)
    batch_of = noisy_batches(args, latents, tokenizer, captions, wordings)
    sizes = dict(in_channels=16, out_channels=16, patch_size=1, sample_size=8, num_layers=6)
    sizes |= dict(num_attention_heads=2, attention_head_dim=64, cross_attention_dim=128)
    sizes |= dict(num_cross_attention_heads=2, cross_attention_head_dim=64, caption_channels=64)
    model = diffusers.SanaTransformer2DModel(**sizes).to(DEVICE)
    ema, average = weight_average(model)
    fast_model = torch.compile(model)

    def loss_of(step):
        x0, noise, t, (ids, mask) = batch_of(step)
        s = t.view(-1, 1, 1, 1)
        with torch.autocast(**AUTOCAST), sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad():
                states = text(ids, attention_mask=mask).last_hidden_state
            conditions = dict(encoder_hidden_states=states, encoder_attention_mask=mask)
            x_t = (1 - s) * x0 + s * noise
            velocity = fast_model(x_t, timestep=1000 * t, **conditions).sample
        loss = (velocity.float() - (noise - x0)).square().mean()
        return loss, dict(loss=loss)

    training_loop(args, model, loss_of, ema, average)
    model.load_state_dict(ema)
    model.to(torch.bfloat16).save_pretrained(out / "transformer")
    text.to(torch.bfloat16).save_pretrained(out / "text_encoder")
    tokenizer.save_pretrained(out / "tokenizer")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_pretrained(out / "scheduler")
    shutil.copytree(Path(init) / "codec", out / "codec", dirs_exist_ok=True)
    parts = dict(_class_name="SanaPipeline", transformer=["diffusers", type(model).__name__])
    parts |= dict(text_encoder=["transformers", type(text).__name__])
    parts |= dict(tokenizer=["transformers", "CLIPTokenizer"])
    parts |= dict(scheduler=["diffusers", type(scheduler).__name__])
    (out / "model_index.json").write_text(json.dumps(parts, indent=1) + "\n")


def make_vlm_tokenizer():
    """A token for each word of the world and fixed piece of embed.py's prompts; else bytes."""
    alphabet = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens("<|endoftext|> <|im_start|> <|im_end|> <image> <video>".split())
    pieces = [llava.INTRO, *llava.QUESTIONS.values(), llava.PREFERRED, llava.DISPREFERRED]
    pieces += [llava.IMAGE_1, llava.IMAGE_2, "CHOICE: 1", "CHOICE: 2"]
    pieces += [llava.PAIR.format(i) for i in range(1, 9)] + [f"Pair {i}: " for i in range(1, 9)]
    pieces += ["User profile: ", ", ", ".\n", "a ", "an ", " "]
    pieces += ["system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    pieces += [*COLORS, *SHAPES, *WORDS]
    tokenizer.add_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in pieces])
    special = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left")
    special |= dict(additional_special_tokens=["<|im_start|>", "<image>", "<video>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_vlm(side=world.SIDE, patch=16, width=192, layers=4):
    """A LlavaOnevisionForConditionalGeneration with random weights, and its processor."""
    tokenizer = make_vlm_tokenizer()
    points = [[side, side], [side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    scale = dict(size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    images = transformers.LlavaOnevisionImageProcessor(**scale, image_grid_pinpoints=points)
    parts = (images, tokenizer, transformers.LlavaOnevisionVideoProcessor())
    features = dict(vision_feature_select_strategy="full")
    n_tokens = (side // patch) ** 2
    processor = transformers.LlavaOnevisionProcessor(*parts, num_image_tokens=n_tokens, **features)
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, image_size=side, patch_size=patch)
    vision = transformers.SiglipVisionConfig(**sizes, vision_use_head=False)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width)
    sizes |= dict(num_hidden_layers=layers, num_attention_heads=6, num_key_value_heads=2)
    special = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    special |= dict(bos_token_id=None, tie_word_embeddings=True)
    text = transformers.Qwen2Config(**sizes, **special, max_position_embeddings=1024)
    image_id, video_id = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    features |= dict(image_token_index=image_id, video_token_index=video_id)
    features |= dict(vision_feature_layer=-1, image_grid_pinpoints=points, tie_word_embeddings=True)
    config = transformers.LlavaOnevisionConfig(vision_config=vision, text_config=text, **features)
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


def sample_choices(rng, z, n, pairs):
    """n new users, each with `pairs` choices among images of axes z (captions, images, 5) -> their
    words, captions (n, pairs) and images (n, pairs, 2) as indices, preferred first."""
    tastes, words = world.draw_users(n, int(rng.integers(2**31)))
    captions = rng.integers(z.shape[0], size=(n, pairs))
    images = rng.integers(z.shape[1], size=(n, pairs, 2))
    liking = (z[captions[..., None], images] * tastes[:, None, None]).sum(-1)
    gap = liking[..., :1] - liking[..., 1:]
    swap = rng.uniform(size=(n, pairs, 1)) > 1 / (1 + np.exp(-BRADLEY_TERRY_SCALE * gap))
    return words, captions, np.where(swap, images[..., ::-1], images)


def make_examples(rng, z, n, pairs, task):
    """n prompts, their answers, the images (n, images) in the prompts' order, and for each answer
    the odds by a perfect reader of tokens nobody can know, {offset from its end: {token: odds}}.
    task "look" names all five axes of one image. The others are embed.py's prompts: "taste" names
    the three likeliest words, "profile" does so after the two axes on which each pair differs most,
    "judge" picks one of two further images."""
    if task == "look":
        images = rng.integers(z.shape[0] * z.shape[1], size=(n, 1))
        shown = z.reshape(-1, len(AXES))[images[:, 0]]
        answers = [", ".join(axis_words(row, range(len(AXES)))) + "<|im_end|>" for row in shown]
        prompt = llava.SYSTEM + "<image>" + llava.ASSISTANT_TURN
        return [prompt] * n, answers, images, [{}] * n
    is_judge = task == "judge"
    _, captions, images = sample_choices(rng, z, n, pairs + is_judge)
    if is_judge:  # either order
        images[:, -1] = rng.permuted(images[:, -1], axis=1)
    axes = z[captions[..., None], images]
    weights, named, _ = world.all_tastes()
    gap = axes[:, :, 0] - axes[:, :, 1]
    posterior = world.taste_posterior(axes[:, :pairs])
    picks_first = 1 / (1 + np.exp(-BRADLEY_TERRY_SCALE * gap[:, -1] @ weights.T))
    first = (posterior * picks_first).sum(1)
    prompts, answers, odds = [], [], []
    for i in range(n):
        names = [CAPTIONS[c] for c in captions[i]]
        prompts.append(llava.build_vlm_prompt(names[:pairs], task, names[-1] if is_judge else None))
        if is_judge:
            answer = f"CHOICE: {1 if first[i] > 0.5 else 2}"
            known = {-2: {"CHOICE: 1": first[i], "CHOICE: 2": 1 - first[i]}}
        else:
            answer, known = describe_taste(posterior[i] @ named)
            if task == "profile":
                widest = [axis_words(row, np.argsort(-np.abs(row))[:2]) for row in gap[i]]
                lines = [f"Pair {k}: {', '.join(words)}.\n" for k, words in enumerate(widest, 1)]
                answer = "".join(lines) + "User profile: " + answer
        answers.append(answer + "<|im_end|>")
        odds.append(known)
    image_indices = (captions[..., None] * z.shape[1] + images).reshape(n, -1)
    return prompts, answers, image_indices, odds


def describe_taste(likely):
    """How likely each of WORDS is (10,) -> the three likeliest, and, by offset from the answer's
    end, the odds of each given those before it."""
    best = np.argsort(-likely)[:3]
    words = list(WORDS)
    odds = {}
    for k, offset in enumerate((-6, -4, -2)):
        odds[offset] = dict(zip(words, likely / likely.sum(), strict=True))
        likely = np.where(np.arange(len(words)) == best[k], 0, likely)
    return ", ".join(words[w] for w in best), odds


def soft_targets(answers, odds, tokenizer):
    """Token ids of the answers as probabilities (tokens, vocabulary): 1, or the known odds."""
    ids = torch.tensor([i for answer in answers for i in answer], device=DEVICE)
    targets = F.one_hot(ids, len(tokenizer)).float()
    ends = np.cumsum([len(answer) for answer in answers])
    for end, known in zip(ends, odds, strict=True):
        for offset, words in known.items():
            columns = tokenizer.convert_tokens_to_ids(list(words))
            targets[end + offset] = 0
            targets[end + offset, columns] = targets.new_tensor(list(words.values()))
    return targets


def train_vlm(args):
    """Teach the small VLM to read users. 500 steps it only looks at single images, and 1,000 it
    reads the taste from four pairs: without these it learns nothing in hours. Then everything:
    taste in words, with and without describing every pair first, from 1 to 8 pairs, and which of
    two further images the user would choose. Answers are a perfect reader's, with its odds."""
    vlm, processor = make_vlm()
    vlm.to(DEVICE)
    model, tokenizer = vlm.model, processor.tokenizer
    rng = np.random.default_rng([args.seed, 3])
    each = args.pictures // len(CAPTIONS)
    captions = [caption for caption in CAPTIONS for _ in range(each)]
    drawn = [world.draw_random(rng, c) for c in tqdm(captions, desc="drawing", disable=None)]
    drawn = world.to_array(drawn)
    z = world.standardized(drawn).reshape(len(CAPTIONS), each, -1)
    drawn = torch.from_numpy(drawn).permute(0, 3, 1, 2).mul(2).sub(1).to(torch.bfloat16).to(DEVICE)

    def loss_of(step):
        rng = np.random.default_rng([args.seed, 4, step])
        task = "look" if step < 500 else "taste"
        if step >= 1500:
            task = str(rng.choice(["taste", "profile", "judge"], p=[0.4, 0.4, 0.2]))
        pairs = 4 if step < 1500 or rng.uniform() < 0.6 else int(rng.integers(1, 9))
        n = args.batch * 4 // (1 if task == "look" else max(pairs, 2))
        prompts, answers, images, odds = make_examples(rng, z, n, pairs, task)
        # 4 patches and a line break an image: what processor and model make of many images
        prompts = tokenizer([text.replace("<image>", "<image>" * 5) for text in prompts]).input_ids
        answers = tokenizer(answers).input_ids
        texts = [torch.tensor(a + b) for a, b in zip(prompts, answers, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(DEVICE)
        masks = [torch.arange(len(b)) >= len(a) for a, b in zip(prompts, texts, strict=True)]
        is_answer = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True).to(DEVICE)
        targets = soft_targets(answers, odds, tokenizer)
        with torch.autocast(**AUTOCAST), sdpa_kernel(SDPBackend.MATH):
            shown = drawn[torch.from_numpy(images.flatten())]
            vision = model.vision_tower(shown, output_hidden_states=True)
            # what the model takes: the state before the tower's last norm
            patches = model.multi_modal_projector(vision.hidden_states[-1])
            newline = model.image_newline.to(patches.dtype).expand(len(patches), 1, -1)
            patches = torch.cat([patches, newline], 1)
            words = model.language_model.embed_tokens(ids)
            is_image = (ids == vlm.config.image_token_id)[..., None]
            words = words.masked_scatter(is_image, patches.to(words.dtype))
            hidden = model.language_model(inputs_embeds=words).last_hidden_state
            logits = vlm.lm_head(hidden[:, :-1][is_answer[:, 1:]])
        log_probs = logits.float().log_softmax(-1)
        loss = F.kl_div(log_probs, targets, reduction="sum") / len(targets)  # 0: a perfect reader
        return loss, {task: loss}

    training_loop(args, vlm, loss_of, carry={}, beta_2=0.98, weight_decay=0.05)
    vlm.to(torch.bfloat16).save_pretrained(args.out)
    processor.save_pretrained(args.out)


def parse_args(argv=None):
    parser = utils.make_parser("tiny.train", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    sizes = (("base", 12000, 40000), ("flow", 6000, 40000), ("vlm", 4000, 20000))
    for name, steps, images in sizes:
        add = commands.add_parser(name, prog="tiny.train", usage=argparse.SUPPRESS).add_argument
        add("--out", required=True, help="folder to write")
        add("--steps", type=int, default=steps, help="(default: %(default)s)")
        add("--batch", type=int, default=64, help="images or users a step (default: %(default)s)")
        add("--lr", type=float, default=1e-3, help="(default: %(default)s)")
        add("--seed", type=int, default=0, help="(default: %(default)s)")
        add("--pictures", type=int, default=images, help="images drawn to learn from (%(default)s)")
        if name != "vlm":
            init = str(utils.TINY) if name == "flow" else None
            add("--init", default=init, help="folder of a base to start from, or to take parts of")
            add("--worded", type=float, default=0.5, help="share with taste words (%(default)s)")
            add("--axes", type=float, nargs=5, default=[1, 1, 1.5, 3, 3], help="named how often")
            add("--lean", type=float, default=2.0, help="timesteps are 1 - u^lean (%(default)s)")
        if name == "base":
            add("--width", type=int, default=128, help="(default: %(default)s)")
            add("--anew", nargs="+", default=[], choices=WORDS, help="with --init: see match_words")
            add("--frozen-text", action="store_true", help="train Stage C alone")
            add("--layers", type=int, nargs=2, default=[2, 2], help="blocks a level, down and up")
        add("--save-every", type=int, default=250, help="steps (default: %(default)s)")
    args = parser.parse_args(argv)
    for key, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            least = -1 if key == "seed" else 0
            if type(number) in (int, float) and not least < number < math.inf:
                expected = "0 or more" if key == "seed" else "a number above 0"
                parser.error(f"{utils.flag(key)} {number}: expected {expected}")
    if args.command == "base" and args.width % 64:
        parser.error(f"--width {args.width}: expected a multiple of 64, a head's width")
    return args


def run(args):
    train = dict(base=train_base, flow=train_flow, vlm=train_vlm)[args.command]
    part = dict(base="prior", flow="transformer", vlm="config.json")[args.command]
    state = Path(args.out) / "state.pt"
    if state.with_name(part).exists() and not state.exists():
        raise InputError(f"--out {args.out} holds a finished {args.command}; choose another folder")
    torch.manual_seed(args.seed)
    train(args)
    state.unlink()


def main(argv=None):
    utils.run_script("tiny.train", run, parse_args(argv))


if __name__ == "__main__":
    main()
