"""The real scripts, run small: what they write, that they are exact, and how they end."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from functools import partialmethod
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from float64 import double_precision
from PIL import Image
from safetensors.torch import load_file

import data
import embed
import sample
import train
from bases import llava, load_base
from bases.cascade import PatchCodec, find_base
from bases.images import ImagePairs, open_image
from conftest import ROOT, TORCHRUN, call, run_train, script, train_flags, with_columns
from ppd import UserAdapter
from utils import TINY, append_line, read_jsonl

FOUR_STEPS = "--max-steps 4 --preview-every 4".split()
LIGHT = "assets/onehot/light.pt"
NAMES = ("light", "warm", "large")  # of the one-hot users


def lines(out):
    return read_jsonl(Path(out) / "train.jsonl")


def state_of(out):
    return torch.load(out / "state.pt", weights_only=True)


@pytest.fixture(scope="session")
def trained(world, tmp_path_factory):
    """Four steps of the real script, with a preview."""
    out = tmp_path_factory.mktemp("runs") / "four"
    script("train.py", *train_flags(world[1], out, *FOUR_STEPS))
    return out


def training_pairs(world, seed=0, separate=False, groups=None):
    """PreferencePairs of the world's one-hot users, and its rows and embeddings."""
    rows, embeddings, _, _ = data.load_training_data(world[1])
    rows = [row | dict(groups=groups or row["groups"]) for row in rows["train"]]
    images = ImagePairs(world[0], PatchCodec(), rows)
    pairs = data.PreferencePairs(rows, embeddings, images, (16, 8, 8), seed, separate, 0.75)
    return pairs, rows, embeddings


# -------------------------------------------------------------------------------------- train
def test_first_line_is_step_0_at_ln_2(trained):
    first = lines(trained)[0]
    assert first["step"] == 0 and abs(first["loss"] - 0.693147) < 1e-6
    assert first["implicit_accuracy"] == 0.5
    assert first["error_preferred"] == first["error_ref_preferred"]
    assert [line["step"] for line in lines(trained)] == [0, 1, 2, 3]
    validation = {"validation_implicit_accuracy", "validation_error_preferred"}
    assert {"lr", "grad_norm"} <= first.keys()
    validated = [line["step"] for line in lines(trained) if validation <= line.keys()]
    assert validated == [3]  # at saves only, over many pairs
    assert Image.open(trained / "previews" / "step-000004.png").size[0] > 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_policy_begins_as_the_reference_compiled_too(dtype, world, monkeypatch):
    """The first loss is ln 2 exactly, and the compiled blocks' gradient is the eager one's."""
    trace_only = partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", trace_only)
    torch._dynamo.reset()
    pairs, _, _ = training_pairs(world)
    gradients = []
    for compiled in (False, True):
        base = load_base("tiny", dtype=dtype)
        torch.manual_seed(0)
        adapter = UserAdapter(3, base.channels).install(base.attention_layers())
        adapter.compiled = compiled
        if compiled:
            base.compile_blocks()
        batch = data.collate([pairs[i] for i in range(4)], base.tokenize)
        losses, log = train.micro_step(base, adapter, batch, 1.0, 0.1, pairs_per_step=4)
        assert torch.equal(losses, torch.full((4,), math.log(2)))
        assert log["implicit_accuracy"].tolist() == [0.5] * 4
        assert torch.equal(log["error_dispreferred"], log["error_ref_dispreferred"])
        gradients.append(torch.cat([layer.weight.grad.flatten() for layer in adapter.to_v]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert gradients[0].norm() > 0
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-4 * gradients[0].abs().max().item())


def test_only_the_adapter_changes(world, tmp_path, monkeypatch):
    seen = []

    def load_and_keep(*settings):
        seen.append(load_base(*settings))
        return seen[0]

    monkeypatch.setattr(train, "load_base", load_and_keep)
    run_train(world[1], tmp_path / "run")
    base, shipped = seen[0], load_base("tiny")
    for part in ("prior", "text_encoder", "codec"):
        before, now = (getattr(one, part).state_dict() for one in (shipped, base))
        assert all(torch.equal(before[key], now[key]) for key in before), part
    for parameter in (*base.prior.parameters(), *base.text_encoder.parameters()):
        assert parameter.grad is None and not parameter.requires_grad
    torch.manual_seed(0)
    new = UserAdapter(3, base.channels).state_dict()
    now = load_file(tmp_path / "run" / "adapter.safetensors")
    assert now.keys() == new.keys()
    kept = {key for key in new if torch.equal(new[key], now[key])}
    assert kept == {"mean", "std"}  # identity for one-hot users; all else moved


@pytest.mark.parametrize("objective", ["dpo", "sft"])
def test_baselines_are_the_same_loop(objective, world, tmp_path):
    run_train(world[1], tmp_path, "--max-steps", 3, "--lr", "2e-3", "--objective", objective)
    adapter = UserAdapter.load(tmp_path)
    assert adapter.header["objective"] == objective
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path))
    torch.manual_seed(0)
    new = UserAdapter(3, adapter.channels)
    change = (adapter.project.weight - new.project.weight).abs().max().item()
    first = lines(tmp_path)[0]
    if objective == "dpo":
        # everybody is the zero user: the projector's weight sees zeros, only weight decay acts
        assert change < 1e-5 and first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    else:
        assert change > 1e-4 and first["loss"] == pytest.approx(first["error_preferred"])


@pytest.mark.parametrize(
    "dtype, tolerance", [("float64", 1e-9), pytest.param("float32", 1e-5, marks=pytest.mark.slow)]
)
def test_accumulation_and_ranks_change_nothing(dtype, tolerance, lean, tmp_path):
    """1 process x 8 accumulated = 1 x 8 at once = 2 processes x 4."""
    doubled = dtype == "float64"
    common = "--max-steps 2 --beta 1 --lr 5e-4 --t-min 0.85 --dtype float32".split()
    whole, split, ranks = (tmp_path / name for name in ("whole", "split", "ranks"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in the same order everywhere
    with double_precision() if doubled else contextlib.nullcontext():
        run_train(lean[1], whole, *common, "--micro", 8)
        run_train(lean[1], split, *common, "--micro", 1, "--workers", 2)
    torch.set_num_threads(threads)
    driver = "tests/float64.py" if doubled else "train.py"
    flags = train_flags(lean[1], ranks, *common, "--micro", 4)
    script(*TORCHRUN, driver, *flags, OMP_NUM_THREADS="1")

    def gradient(out):  # AdamW's running mean
        moments = state_of(out)["optimizer"]["state"].values()
        return torch.cat([moment["exp_avg"].flatten() for moment in moments])

    adapter = state_of(whole)["adapter"]
    assert adapter["project.weight"].dtype == getattr(torch, dtype)
    for other in (split, ranks):
        for key in ("loss", "grad_norm", "error_preferred"):
            for a, b in zip(lines(whole), lines(other), strict=True):
                assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), (other, key)
        assert torch.allclose(gradient(whole), gradient(other), rtol=0, atol=tolerance / 10), other
        if doubled:
            for key, value in state_of(other)["adapter"].items():
                assert torch.allclose(adapter[key], value, rtol=0, atol=tolerance), (other, key)


def test_users_of_a_vlm_are_standardized_and_groups_drawn(world, tmp_path):
    """Embeddings with a large common part, two groups a user: the buffers are the training users'
    mean and std."""
    users = tmp_path / "users"
    users.mkdir()
    (users / "pairs.parquet").write_bytes((world[1] / "pairs.parquet").read_bytes())
    vectors = 100 + torch.randn(3, 2, 1, 6, generator=torch.Generator().manual_seed(0))
    for name, embedding in zip(NAMES, vectors, strict=True):
        data.write_user(users / f"{name}.pt", embedding=embedding, vlm="made up")
    run_train(users, tmp_path / "run", "--max-steps", 1, "--tokens", 2)
    adapter = UserAdapter.load(tmp_path / "run")
    assert torch.allclose(adapter.mean, vectors.flatten(0, 2).mean(0))
    assert torch.allclose(adapter.std, vectors.flatten(0, 2).std(0, correction=0))
    assert (adapter.n_tokens, adapter.user_dim) == (2, 6)
    pairs, *_ = training_pairs((world[0], users), groups=[0, 1])
    drawn = {tuple(pairs[i]["user"].flatten().tolist()) for i in range(40)}
    assert drawn == {tuple(vector.tolist()) for vector in vectors.view(6, 6)}


def test_pairs_are_keyed_by_seed_and_position(world):
    pairs, rows, embeddings = training_pairs(world)
    n = len(rows)
    noise = pairs[5]["noise"]
    again = training_pairs(world)[0][5]
    assert torch.equal(noise, again["noise"]) and torch.equal(pairs[5]["user"], again["user"])
    for key in ("t", "drop_draw", "caption"):
        assert pairs[5][key] == again[key], key
    assert torch.equal(noise[0], noise[1])
    two = training_pairs(world, separate=True)[0][5]["noise"]
    assert not torch.equal(two[0], two[1])  # Eq. 6 writes two noises
    for other in (pairs[6], training_pairs(world, seed=1)[0][5], pairs[5 + n]):
        assert not torch.equal(noise, other["noise"])
    first, second = (data.epoch_order(0, epoch, n).tolist() for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(n)) and first != second
    images = {}
    for file in sorted(world[0].glob("*.parquet")):
        for row in pq.read_table(file, columns=["ranking_id", "jpg_0", "jpg_1"]).to_pylist():
            images[row["ranking_id"]] = row
    for i in range(10):  # the right images, the preferred one first
        item, row = pairs[i], rows[first[i]]
        sides = (row["preferred"], 1 - row["preferred"])
        both = [open_image(images[row["ranking_id"]][f"jpg_{side}"], "") for side in sides]
        assert item["caption"] == row["caption"]
        assert torch.equal(item["user"], embeddings[row["user"]][0])
        pixels = item["images"].permute(0, 2, 3, 1)  # drawn at the codec's own size
        assert np.array_equal(pixels, np.stack(both))


def test_schema_of_a_micro_batch(world):
    """Shapes, dtypes and order of what collate() makes, of images and of cached latents."""
    base = load_base("tiny")
    pairs, _, _ = training_pairs(world, separate=True)
    examples = [pairs[i] for i in range(3)]
    batch = data.collate(examples, base.tokenize)
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == dict(
        tokens=((2, 3, 16), torch.int64),
        images=((6, 3, 32, 32), torch.uint8),
        noise=((6, 16, 8, 8), torch.float32),
        t=((3,), torch.float32),
        user=((3, 3), torch.float32),
        drop_draw=((3,), torch.float32),
    )
    assert torch.equal(batch["tokens"], base.tokenize([pair["caption"] for pair in examples]))
    for i, pair in enumerate(examples):
        for key in ("images", "noise"):
            assert torch.equal(batch[key][i], pair[key][0])  # the preferred first
            assert torch.equal(batch[key][3 + i], pair[key][1])
            assert not torch.equal(pair[key][0], pair[key][1])
        for key, low in dict(t=0.75, drop_draw=0).items():
            assert batch[key][i] == pytest.approx(pair[key]) and low <= pair[key] <= 1
        assert torch.equal(batch["user"][i], pair["user"])
    latents = [pair | dict(images=pair["noise"].bfloat16()) for pair in examples]
    cached = data.collate(latents, base.tokenize)["images"]
    assert cached.dtype == torch.bfloat16 and torch.equal(cached, batch["noise"].bfloat16())


def test_resume_is_exact(world, trained, tmp_path, monkeypatch):
    """Stopped after 2 of 4 steps by a signal and resumed: the same bytes as the undisturbed run."""
    out = tmp_path / "run"
    flags = [*FOUR_STEPS, "--resume"]
    real, calls = train.micro_step, []

    def interrupted(base, adapter, batch, beta, user_drop, pairs_per_step=None, guard=False):
        if pairs_per_step:  # not validation
            calls.append(1)
            if len(calls) == 2:  # in the middle of step 1
                os.kill(os.getpid(), signal.SIGTERM)
        return real(base, adapter, batch, beta, user_drop, pairs_per_step)

    with monkeypatch.context() as patched:
        patched.setattr(train, "micro_step", interrupted)
        run_train(world[1], out, *flags)
    assert state_of(out)["step"] == 2
    append_line(out / "train.jsonl", json.dumps(dict(step=2, loss=9)))  # a lost step's line
    run_train(world[1], out, *flags)
    adapters = [folder / "adapter.safetensors" for folder in (out, trained)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert [line["step"] for line in lines(out)] == [0, 1, 2, 3] and lines(out)[2]["loss"] != 9
    run_train(world[1], out, *flags)  # finished already: says so, exits 0


def test_resume_says_what_it_does(world, trained, tmp_path, capsys):
    run_train(world[1], tmp_path / "new", "--max-steps", 1, "--resume")
    assert "nothing to resume" in capsys.readouterr().out
    swapped = tmp_path / "swapped"  # as many pairs, other vectors
    one_hot = ("--one-hot", "warm", "light", "large")
    script("embed.py", "--data", world[0], *one_hot, "--users", swapped)
    was = train.DEFAULTS["tiny, one-hot"]
    all_three = f"--beta is 0.5, but was {was['beta']}; --lr is 0.1, but was {was['lr']}; "
    all_three += "--seed is 1, but was 0 when the run in"
    for users, change, message in (
        (world[1], ["--beta", 0.5, "--lr", 0.1, "--seed", 1], all_three),
        (swapped, [], "--users is .*; the content of --users, by digest, is "),
    ):
        with pytest.raises(SystemExit, match=message):
            run_train(users, trained, *FOUR_STEPS, "--resume", *change)


def test_a_base_with_a_small_codec_gets_the_small_recipe(world):
    recipes = {"tiny": "tiny", "tiny/checkpoints": "tiny", "stable-cascade": "full"}
    for base, recipe in recipes.items():
        args = train.parse_args(["--users", str(world[1]), "--out", "nowhere", "--base", base])
        assert args.batch == train.DEFAULTS[recipe]["batch"]


def test_a_folder_named_tiny_does_not_hide_the_tiny_base(tmp_path, monkeypatch):
    """The scripts' own folder `tiny` stands beside them; any other may stand where they run."""
    assert (ROOT / "tiny").is_dir()
    (tmp_path / "tiny" / "prior").mkdir(parents=True)
    (tmp_path / "tiny" / "config.json").write_text("{}")
    for folder in (ROOT, tmp_path):
        monkeypatch.chdir(folder)
        assert find_base("tiny") == (TINY, "prior")
        assert find_base("tiny:prior_lite") == (TINY, "prior_lite")
        model, _, _ = llava.load_vlm("tiny", "cpu")
        assert Path(model.name_or_path) == TINY / "vlm"
        assert load_base("tiny").channels == [128] * 8


# ------------------------------------------------------------------------------- how a run ends
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("fails", [False, True])
def test_signals_are_handled_as_before_a_run(number, fails, lean, tmp_path, monkeypatch):
    inside, real = [], train.micro_step

    def seen(*arguments):
        inside.append(signal.getsignal(number))
        if fails:
            raise RuntimeError("by hand")
        return real(*arguments)

    def mine(*_):
        """A caller's own handler."""

    monkeypatch.setattr(train, "micro_step", seen)
    before = signal.signal(number, mine)
    try:
        with pytest.raises(RuntimeError, match="by hand") if fails else contextlib.nullcontext():
            run_train(lean[1], tmp_path, "--max-steps", 1)
        assert signal.getsignal(number) is mine
    finally:
        signal.signal(number, before)
    assert inside and mine not in inside


# train.py whose last rank fails in its third micro-step, and says when, and which processes it has
BY_HAND = """
import multiprocessing, os, sys, time, train
real, calls = train.micro_step, []
def micro_step(*arguments):
    calls.append(1)
    if len(calls) == 3:
        workers = [child.pid for child in multiprocessing.active_children()]
        failing = int(os.environ.get("RANK", 0)) + 1 == int(os.environ.get("WORLD_SIZE", 1))
        pids = " ".join(map(str, ("pids", os.getpid(), *workers)))
        print(pids + chr(10), end="", flush=True)  # one write: two ranks share the file
        if failing:
            print("raised at", time.time(), flush=True)
            raise RuntimeError("by hand")
    return real(*arguments)
train.micro_step = micro_step
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_unforeseen_error_ends_the_run(ranks, lean, tmp_path):
    """With workers, whose processes would keep the interpreter waiting: with the error's
    traceback, within 20 seconds for each process that ends after another, and none is left."""
    torchrun = [*TORCHRUN, "--no-python", sys.executable] if ranks == 2 else []
    flags = train_flags(lean[1], tmp_path / "run", "--micro", 2, "--workers", 2)
    command = [sys.executable, *torchrun, "-c", BY_HAND, *flags]
    log = tmp_path / "log"
    with log.open("w") as file:
        run = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            run.wait(timeout=600)
        finally:
            ended = time.time()
            run.terminate()
    said = log.read_text()
    assert run.returncode != 0 and "RuntimeError: by hand" in said and "Traceback" in said
    (raised,) = re.findall(r"raised at ([\d.]+)", said)
    interpreters = 1 if ranks == 1 else 3  # a rank, then the other, then torchrun
    assert ended - float(raised) < 20 * interpreters
    started = [int(pid) for pids in re.findall(r"pids ([\d ]+)", said) for pid in pids.split()]
    assert len(started) == 3 * ranks
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


# ---------------------------------------------------------------------------- sample, evaluate
def test_sample_after_the_clone(tmp_path):
    one = ("--user", LIGHT, "--adapter", "assets/onehot", "--prompt", "a red star")
    script("sample.py", *one, "--out", tmp_path)
    (path,) = tmp_path.glob("*.png")
    settings = json.loads(Image.open(path).text["ppd"])
    assert settings["prompt"] == "a red star" and settings["seed"] == 0
    assert settings["user"] == [[LIGHT, None]]
    assert settings["guidance"] == PatchCodec.default_guidance
    assert settings["steps"] == PatchCodec.default_steps
    assert settings["adapter"] == "assets/onehot/adapter.safetensors"


def sample_here(out, *flags):
    """sample.py in this process, with the shipped one-hot adapter; the first image's pixels."""
    call(sample, "--adapter", "assets/onehot", "--out", out, *flags)
    return np.asarray(Image.open(min(out.glob("*a-red-star*.png"))))


def test_scale_0_is_the_base_bit_for_bit_and_the_user_is_not(tmp_path):
    how = ("--prompt", "a red star", "--steps", 4, "--size", 0)
    base = sample_here(tmp_path / "base", *how, "--user", "base")
    zeroed = sample_here(tmp_path / "zeroed", *how, "--user", LIGHT, "--user-scale", 0)
    light = sample_here(tmp_path / "light", *how, "--user", LIGHT)
    assert base.shape == (32, 32, 3)
    assert (base == zeroed).all() and (base != light).any()


def test_grid_blend_and_prompt_file(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red star\n\na blue circle\n")
    how = ("--prompts", tmp_path / "prompts.txt", "--steps", 2)
    warm = "assets/onehot/warm.pt"
    grid = tmp_path / "grid"
    sample_here(grid, *how, "--user", "base", "--user", "zero", "--user", warm)
    assert len(list(grid.glob("*.png"))) == 7 and (grid / "grid.png").exists()
    alone = np.asarray(Image.open(grid / "0000-a-red-star_warm_0.png"))
    pure = sample_here(tmp_path / "pure", *how, "--user", f"{warm}:1", "--user", f"{LIGHT}:0")
    half = ("--user", f"{warm}:0.5", "--user", f"{LIGHT}:0.5")
    mixed = sample_here(tmp_path / "mixed", *how, *half)
    assert np.abs(pure.astype(int) - alone).max() <= 1 and (mixed != pure).any()
    call(sample, "--prompt", "a red star " * 10, "--steps", 1, "--out", tmp_path / "long")
    assert "the text encoder reads 16" in capsys.readouterr().err


def test_broken_image_is_named_and_skipped(world, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    source = sorted(world[0].glob("*.parquet"))[0]
    table = pq.read_table(source).slice(0, 40)
    pairs = [pair for pair in data.read_pairs(world[1])[0] if pair["file"] == source.name]
    uids = table["image_0_uid"].to_pylist() + table["image_1_uid"].to_pylist()
    alone = {i for i, uid in enumerate(uids[:40]) if uids.count(uid) == 1}  # not seen elsewhere
    good, bad, worse = sorted(alone & {p["row"] for p in pairs if p["user"] == "light"})[:3]
    jpgs = table["jpg_0"].to_pylist()
    jpgs[bad], jpgs[worse] = b"no image", jpgs[worse][:100]
    pq.write_table(with_columns(table, jpg_0=jpgs), tmp_path / "data" / "d.parquet")
    users = tmp_path / "users"
    call(embed, "--data", tmp_path / "data", "--users", users, "--one-hot", "light")
    rows = {row["row"] for row in data.read_pairs(users)[0]}
    assert good in rows and not {bad, worse} & rows
    said = capsys.readouterr().err
    assert f"d.parquet row {bad} jpg_0: not a usable image" in said
    assert f"d.parquet row {worse} jpg_0" in said
