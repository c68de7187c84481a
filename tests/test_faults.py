"""What a long run meets: kills at any moment, torn files, a full disk, a dying rank, numbers that
are not finite. And what its speed rests on: no waiting for the device between micro-steps, latents
encoded once."""

import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partialmethod
from unittest import mock

import numpy as np
import pytest
import torch
from float64 import double_precision
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import bases
import bench
import data
import embed
import train
from bases.cascade import CascadeCodec, StableCascade, make_scheduler
from bases.images import ImagePairs, read_row_group
from bases.latents import CachedLatents
from conftest import ROOT, TORCHRUN, call, refusal, run_train, script, train_flags
from ppd import UserAdapter
from utils import InputError, read_jsonl

open_array = bases.latents.open_array.__wrapped__
A_RANK = "train.py --batch 8 --micro 4 --device cpu --preview-every 0".split()


@pytest.fixture
def start():
    """A script in the background, in its own session, all it says together; killed in the end."""
    started = []

    def begin(*command, **env):
        how = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        how |= dict(env=os.environ | env, start_new_session=True)
        started.append(subprocess.Popen([sys.executable, *map(str, command)], **how))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            process.terminate()  # torchrun ends its processes too
            process.wait(300)


def logged(out, key="step"):
    return [line[key] for line in read_jsonl(out / "train.jsonl") if key in line]


def saved(out, key="step"):
    return torch.load(out / "state.pt", weights_only=True)[key]


def adapter_bytes(out):
    return (out / "adapter.safetensors").read_bytes()


def wait_until(process, happened, every=0.001):
    """Until something happened, or the process ended."""
    while process.poll() is None and not happened():
        time.sleep(every)


def wait_for_write(process, path, every=0.001):
    def written():
        return path.stat().st_mtime_ns if path.exists() else 0

    before = written()
    wait_until(process, lambda: written() != before, every)


# --------------------------------------------------------------------------------- kills
@pytest.mark.parametrize(
    "kills, length, seed", [(3, 16, 1), pytest.param(20, 80, 2, marks=pytest.mark.slow)]
)
def test_killed_at_any_moment(kills, length, seed, lean, tmp_path, start):
    """Every third time in the middle of a write, else at a random moment of a random step, and
    resumed each time: the end is the undisturbed run's, to the byte."""
    out, calm = tmp_path / "run", tmp_path / "calm"
    flags = ["--max-steps", length, "--save-every", 1, "--log-every", 4, "--resume"]
    run_train(lean[1], calm, *flags)
    rng = random.Random(seed)
    met = []
    for k in range(kills):
        process = start("train.py", *train_flags(lean[1], out, *flags))
        wait_for_write(process, out / "train.jsonl", 0.05)  # imports are behind it
        for _ in range(rng.randrange(length // kills)):  # spread over the run, never past its end
            wait_for_write(process, out / "adapter.safetensors")
        if k % 3 == 2:
            wait_until(process, lambda: list(out.glob("*.tmp")))
        else:
            time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        said, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, said
        found = saved(out) if (out / "state.pt").exists() else 0
        met.append((found, [path.name for path in out.glob("*.tmp")]))  # half written
    run_train(lean[1], out, *flags)
    print(*met, sep="\n")
    assert adapter_bytes(out) == adapter_bytes(calm)
    assert logged(out) == logged(calm) == sorted({*range(0, length, 4), length - 1})
    if kills == 20:
        assert sum(bool(torn) for _, torn in met) >= 3 and len({found for found, _ in met}) >= 5


def test_a_torn_checkpoint_is_said_in_one_line(lean, tmp_path):
    """As if the disk had lied about what it wrote: nothing of ours leaves one."""
    out = tmp_path / "run"
    run_train(lean[1], out)
    whole, adapter = (out / "state.pt").read_bytes(), adapter_bytes(out)
    line = rf"train.py: error: cannot resume from {out}/state.pt \(\w+\); start again in another "
    for content in (whole[:-1000], b"x", b""):
        (out / "state.pt").write_bytes(content)
        said = refusal(train, *train_flags(lean[1], out, "--max-steps", 3, "--resume"))
        assert re.fullmatch(line + "folder", said)
        assert (out / "state.pt").read_bytes() == content and adapter_bytes(out) == adapter
        assert logged(out) == [0, 1]


def test_a_full_disk_loses_nothing(lean, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    calm, full = tmp_path / "calm", tmp_path / "full"
    flags = ["--max-steps", 4, "--save-every", 1]
    run_train(lean[1], calm, *flags)
    real, calls = torch.save, []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(*args):
        calls.append(1)
        if len(calls) == 3:  # from here on no file can grow beyond 100 kB
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        real(*args)

    monkeypatch.setattr(torch, "save", save)
    try:
        said = refusal(train, *train_flags(lean[1], full, *flags))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        monkeypatch.undo()
    assert re.search("state.pt: cannot be written .*; what was there before is kept", said)
    assert not list(full.glob("*.tmp")) and saved(full) == 2
    run_train(lean[1], full, *flags, "--resume")
    assert adapter_bytes(full) == adapter_bytes(calm) and logged(full) == [0, 1, 2, 3]


# --------------------------------------------------------------------------- several ranks
def test_a_dying_rank_ends_the_job_and_a_restart_resumes(lean, tmp_path, start):
    out = tmp_path / "run"
    flags = ["--users", lean[1], "--out", out, "--max-steps", 12, "--save-every", 1, "--resume"]

    def shoot(job):
        """SIGKILL for the second rank, two checkpoints from now."""
        for _ in range(2):
            wait_for_write(job, out / "state.pt", 0.01)
            assert job.poll() is None, job.communicate()[0][-2000:]
        listed = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True)
        os.kill(int(listed.stdout.split()[-1]), signal.SIGKILL)

    # torchrun itself starts both again; without the variable they would look for the dead ones
    how = dict(OMP_NUM_THREADS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    job = start(*TORCHRUN, "--max-restarts", 1, *A_RANK, *flags, **how)
    shoot(job)
    shot_at = saved(out)
    shoot(job)  # no restart is left: the job ends
    said, _ = job.communicate(timeout=600)
    assert job.returncode != 0 and "SIGKILL" in said and 0 < shot_at < saved(out) < 20
    run_train(lean[1], out, "--max-steps", 12, "--resume", "--log-every", 10)
    assert logged(out) == [0, 10, 11]


def test_a_signal_to_all_processes_saves(lean, tmp_path, start):
    """As schedulers and torchrun send it, to the workers that read images too."""
    out = tmp_path / "run"
    flags = ["--workers", 1, "--save-every", 1000, "--max-steps", 1000]
    process = start("train.py", *train_flags(lean[1], out, *flags))
    wait_until(process, lambda: (out / "train.jsonl").exists() and logged(out), 0.05)
    assert process.poll() is None, process.communicate()[0]
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "stopped by a signal after step" in said and "Traceback" not in said
    assert saved(out) == logged(out)[-1] + 1


# --------------------------------------------------------------------- numbers that explode
def test_not_finite_names_step_and_rank(lean, tmp_path, monkeypatch):
    real, calls = train.ppd_loss, []

    def broken(*args, **kwargs):
        losses, log = real(*args, **kwargs)
        calls.append(1)
        if len(calls) == 3:  # step 2's only micro-step
            losses = torch.where(torch.arange(len(losses)) == 5, math.nan, losses)
        return losses, log

    monkeypatch.setattr(train, "ppd_loss", broken)
    flags = train_flags(lean[1], tmp_path, "--max-steps", 4, "--save-every", 1)
    assert refusal(train, *flags) == (
        "train.py: error: step 2: not finite: the loss of rank 0. The step was not taken, the last "
        "checkpoint is kept; try a lower --lr or a larger --warmup"
    )
    assert saved(tmp_path) == 2


def test_both_ranks_stop_at_a_loss_that_overflows(world, tmp_path):
    out = tmp_path / "run"
    flags = ["--users", world[1], "--out", out, "--max-steps", 3, "--lr", 1e30, "--warmup", 0]
    done = script(*TORCHRUN, *A_RANK, *flags, check=False, OMP_NUM_THREADS="1")
    line = "train.py: error: step 1: not finite: the loss of rank 0, 1. The step was"
    assert done.returncode and done.stderr.count(line) == 2 and 'train.py", line' not in done.stderr
    assert not (out / "state.pt").exists()


def test_exploding_errors_are_told(lean, tmp_path, monkeypatch, capsys):
    real = train.ppd_loss

    def exploding(*args, **kwargs):
        losses, log = real(*args, **kwargs)
        return losses, log | dict(error_preferred=2 * log["error_ref_preferred"])

    monkeypatch.setattr(train, "ppd_loss", exploding)
    run_train(lean[1], tmp_path, "--max-steps", 1)
    said = capsys.readouterr().out
    assert "warning: step 0: the preferred images' error is 2.0 x the reference's" in said


def test_a_preview_that_cannot_be_painted_is_a_warning(world, tmp_path, monkeypatch, capsys):
    no_decoder = mock.Mock(side_effect=InputError("cannot load Stages A and B"))
    monkeypatch.setattr(StableCascade, "decode", no_decoder)
    run_train(world[1], tmp_path / "run", "--max-steps", 1, "--preview-every", 1)
    said = capsys.readouterr().err
    assert said.endswith("warning: no preview: cannot load Stages A and B\n")
    assert (tmp_path / "run/adapter.safetensors").exists()


# --------------------------------------------------------------------- what speed rests on
class Waits(TorchDispatchMode):
    """Finds where the host would wait for a GPU: values read, copies that are not non-blocking."""

    READING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique2")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if any(torch.is_tensor(arg) for arg in args) and self.waits(name, args, **kwargs):
            self.found.append(name)
        return func(*args, **kwargs)

    def waits(self, name, args, device=None, non_blocking=False, **_):
        if name in ("_to_copy", "copy_"):
            target = args[1].device if name == "copy_" else torch.device(device or args[0].device)
            return target != args[0].device and not non_blocking
        if name == "index":
            return any(torch.is_tensor(i) and i.dtype == torch.bool for i in args[1])
        return name in self.READING


@pytest.mark.parametrize("codec", ["tiny", "cascade"])
def test_no_micro_step_waits_for_its_device(codec, lean):
    """The meta device stands for a GPU: no value can be read there, every copy to it is seen."""
    base, meta = bases.load_base("tiny"), torch.device("meta")
    if codec == "cascade":
        base.codec = CascadeCodec("nowhere", meta, torch.float32, 3)
        vars(base.codec)["encoder"] = torch.nn.Conv2d(3, 16, 32, 32, device=meta)
        base.latent_shape = base.codec.latent_shape
    else:
        base.codec.to(meta)
    base.prior.to(meta)
    base.text_encoder.to(meta)
    base.device, base.scheduler = meta, make_scheduler(meta)
    adapter = UserAdapter(3, base.channels).install(base.attention_layers())
    rows, embeddings, *_ = data.load_training_data(lean[1])
    how = (ImagePairs(lean[0], base.codec), base.latent_shape, 0, False, 0.85)
    pairs = data.PreferencePairs(rows["train"], embeddings, *how)
    batch = data.collate([pairs[i] for i in range(4)], base.tokenize)
    with Waits() as waits:
        train.micro_step(base, adapter, batch, 1.0, 0.1, 4)
    assert waits.found == [] and all(p.grad is not None for p in adapter.parameters())
    with Waits() as waits:  # it does see them
        if codec == "tiny":
            base.codec.to(torch.float64)
        torch.zeros(1).to(meta)
        torch.zeros(1).item()
    assert waits.found == ["_to_copy", "_local_scalar_dense"]


def test_nothing_waits_between_micro_steps(lean, tmp_path, monkeypatch):
    """In the loop itself: from a step's first micro-step to its last, the loop reads no value."""
    real, counts = train.micro_step, []

    def counted(*args, **kwargs):
        before = len(waits.found)
        out = real(*args, **kwargs)
        counts.append((before, len(waits.found)))
        return out

    monkeypatch.setattr(train, "micro_step", counted)
    with Waits() as waits:
        run_train(lean[1], tmp_path, "--micro", 2, "--workers", 1)
    for step in (counts[:4], counts[4:]):
        assert step == [step[0]] * 4 and step[0][0] == step[0][1]
    assert len(counts) == 8 and waits.found  # the steps' own


def test_activations_are_channels_last_by_themselves():
    """Stage C permutes for its norms and stays so: converting weights or inputs changes nothing."""
    base, seen = bases.load_base("tiny"), []
    for module in base.prior.modules():
        if isinstance(module, torch.nn.Conv2d) and module.groups > 1:
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x_t = torch.randn(2, *base.latent_shape)
    base.predict(x_t, torch.rand(2), *base.encode_prompts(["a red star"] * 2))
    assert len(seen) == 8 and all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


# ------------------------------------------------------------------------- cached latents
@pytest.fixture(autouse=True)
def arrays_opened_anew(monkeypatch):
    """They are opened once a process; here files change under it."""
    monkeypatch.setattr(bases.latents, "open_array", open_array)


def cache(users, folder, *flags):
    """embed.py --cache-latents in this process; returns what it opened, read again."""
    call(embed, *f"--cache-latents --users {users} --latents {folder} --device cpu".split(), *flags)
    dtype = torch.bfloat16 if "bfloat16" in flags else torch.float32
    return CachedLatents(folder, bases.load_codec("tiny", "cpu", dtype), dtype).open()


def rows_of(users):
    rows, *_ = data.load_training_data(users)
    return rows["train"] + rows["validation"]


def test_cached_latents_train_the_same(world, tmp_path, capsys):
    data = ["--data", shutil.copytree(world[0], tmp_path / "data")]
    run_train(world[1], tmp_path / "images", *data)
    assert "users, images; 8 a step" in capsys.readouterr().out
    call(embed, "--cache-latents", "--users", world[1], "--device", "cpu", *data)  # beside them
    for file in data[1].glob("*.parquet"):
        file.unlink()
    read_row_group.cache_clear()  # no image can be read any more
    run_train(world[1], tmp_path / "cached", *data)
    assert "users, cached latents; 8 a step" in capsys.readouterr().out
    for key in ("loss", "validation_loss", "error_preferred"):
        # batches of another size round otherwise
        expected = pytest.approx(logged(tmp_path / "images", key), rel=1e-4)
        assert logged(tmp_path / "cached", key) == expected


def test_users_folders_share_the_latents_of_their_data(world, tmp_path, capsys):
    folder, more = shutil.copytree(world[0], tmp_path / "data"), tmp_path / "more"
    flags = ["--test-captions", "0.5", "--validation-captions", "0.05"]
    call(embed, "--data", folder, "--one-hot", "dark", "small", "--users", more, *flags)
    latents = cache(more, folder / "latents")
    done = open_array(latents.done_path) > 0
    array = open_array(latents.latents_path)[done]
    missing = latents.missing(rows_of(world[1]))
    assert 0 < len(missing) < len({k for r in rows_of(world[1]) for k in data.image_ids(r)})
    capsys.readouterr()
    cache(world[1], folder / "latents", "--data", folder)
    assert f"{len(missing)} more images of (16, 8, 8) float32\n" in capsys.readouterr().out
    assert (open_array(latents.done_path) > done).sum() == len(missing)
    assert np.array_equal(open_array(latents.latents_path)[done], array)
    run_train(more, tmp_path / "run", "--max-steps", 1)
    run_train(world[1], tmp_path / "other", "--max-steps", 1, "--data", folder)
    assert capsys.readouterr().out.count("users, cached latents;") == 2
    assert len(list((folder / "latents").iterdir())) == 3


def test_caching_goes_on_where_it_was_killed(lean, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "latents"
    latents = cache(lean[1], folder)
    done = open_array(latents.done_path, "r+")
    encoded = np.flatnonzero(done)
    whole = open_array(latents.latents_path)[encoded]
    lost = encoded[len(encoded) // 2 :]
    done[lost] = 0  # as if it had been killed before it came to these
    open_array(latents.latents_path, "r+")[lost] = np.nan
    training = train_flags(lean[1], tmp_path / "run", "--max-steps", 1, "--latents", folder)
    said = f"{latents.latents_path}: {len(lost)} images are not encoded yet; run embed.py --cache"
    assert said in refusal(train, *training)
    encode = mock.Mock(wraps=embed.images.encode_pixels)
    monkeypatch.setattr(embed.images, "encode_pixels", encode)
    latents = cache(lean[1], folder)
    assert sum(len(call.args[1]) for call in encode.call_args_list) == len(lost) < len(encoded)
    assert np.array_equal(np.flatnonzero(open_array(latents.done_path)), encoded)
    again = open_array(latents.latents_path)[encoded]
    assert np.allclose(again, whole, rtol=0, atol=1e-5)
    n_calls = encode.call_count
    cache(lean[1], folder)
    assert encode.call_count == n_calls  # nothing is left to do
    train.main(training)
    assert "0 more images of (16, 8, 8) float32\n" in capsys.readouterr().out


def test_two_processes_cache_the_same_as_one(lean, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    latents = cache(lean[1], alone, "--batch", 32)
    flags = ["--users", lean[1], "--latents", together, "--device", "cpu", "--batch", 32]
    done = script(*TORCHRUN, "embed.py", "--cache-latents", *flags, OMP_NUM_THREADS="1")
    one, two = map(int, re.findall(r"together: (\d+) more images", done.stdout))
    assert one + two == open_array(latents.done_path).sum(dtype=int)
    assert (together / "index.json").read_bytes() == (alone / "index.json").read_bytes()
    for path in (latents.done_path, latents.latents_path):
        assert np.allclose(np.load(path), np.load(together / path.name), rtol=0, atol=1e-5)


def test_bfloat16_latents_come_back_to_the_bit(lean, tmp_path):
    folder = tmp_path / "latents"
    latents = cache(lean[1], folder, "--dtype", "bfloat16")
    assert open_array(latents.latents_path).dtype == np.uint16
    assert latents.latents_path.name.endswith("-16x8x8-bfloat16.npy")
    rows = rows_of(lean[1])[:20]
    keys = list(dict.fromkeys(data.image_key(row, side) for row in rows for side in (0, 1)))
    values = torch.randn(len(keys), 16, 8, 8).bfloat16()
    latents.write(keys, values)
    for row in rows:
        first = row["preferred"]
        both = [keys.index(data.image_key(row, side)) for side in (first, 1 - first)]
        pair = latents(row)
        assert pair.dtype == torch.bfloat16 and torch.equal(pair, values[both])
    few = ["--max-steps", 1, "--batch", 2, "--micro", 2]
    run_train(lean[1], tmp_path / "run", "--latents", folder, "--dtype", "bfloat16", *few)


def test_broken_arrays_are_said_in_one_line_that_helps(lean, tmp_path):
    """Latents of other data, or not there at all: see bad_input.txt."""
    folder = tmp_path / "latents"
    latents = cache(lean[1], folder)
    paths = (latents.latents_path, latents.done_path)
    whole = [np.load(path) for path in paths]
    flags = ["--users", lean[1], "--latents", folder, "--device", "cpu"]
    training = (train, *flags, "--out", tmp_path / "run", "--max-steps", 1)
    for path in paths:
        content = path.read_bytes()
        for broken in (b"no array", content[:-100], content[:50]):
            path.write_bytes(broken)
            for said in (refusal(*training), refusal(embed, *flags, "--cache-latents")):
                assert f"error: {path}: no array of latents (" in said
                assert "delete it and its .done.npy and run embed.py --cache-latents again" in said
        np.save(path, np.zeros((3, 2), np.float32))
        assert f"error: {path}: not an array of (" in refusal(*training)
        for other in paths:
            other.unlink()
        cache(lean[1], folder)
        assert all(np.array_equal(np.load(paths[k]), whole[k]) for k in (0, 1))
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------- compiled
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_give_the_same(backend, lean, tmp_path, monkeypatch):
    compiled_so = partialmethod(torch.nn.Module.compile, backend=backend)
    monkeypatch.setattr(torch.nn.Module, "compile", compiled_so)
    torch._dynamo.reset()
    counters.clear()
    with double_precision():
        run_train(lean[1], tmp_path / "eager")
        run_train(lean[1], tmp_path / "compiled", "--compile", "--checkpointing")
    # for kinds of blocks and uses: the prior has 20 blocks
    assert 3 <= counters["stats"]["unique_graphs"] <= 16 and not counters["graph_break"]
    eager, compiled = (saved(tmp_path / name, "adapter") for name in ("eager", "compiled"))
    assert eager["mean"].dtype == torch.float64
    assert all(torch.allclose(eager[k], compiled[k], rtol=0, atol=1e-9) for k in eager)


@pytest.mark.slow
def test_compiled_policy_begins_as_the_reference(world, tmp_path):
    """In bfloat16 too, where two graphs, with and without a user, round differently."""
    for how in ([], ["--checkpointing"]):
        torch._dynamo.reset()
        out = tmp_path / f"run{len(how)}"
        run_train(world[1], out, "--max-steps", 1, "--dtype", "bfloat16", "--compile", *how)
        (first,) = read_jsonl(out / "train.jsonl")
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert first["implicit_accuracy"] == 0.5


def test_bench_counts_the_full_size(capsys):
    bench.main(["--base", "lite", "--count"])
    said = capsys.readouterr().out
    total = float(re.search(r"([\d.]+) TFLOP a pair", said)[1])
    held = float(re.search(r"= ([\d.]+)\n", said)[1])
    # 6 forwards of 1.174 TFLOP (the lite prior at 24 x 24), and the text encoder
    assert abs(total / (6 * 1.174) - 1) < 0.05 and held < 24


@pytest.mark.slow
def test_ours_is_faster(capsys):
    bench.main(["--base", "tiny", "--rounds", "5", "--device", "cpu", "--profile"])
    said = capsys.readouterr().out
    assert float(re.search(r"^ours / recipe: (\d+\.\d\d)$", said, re.M)[1]) >= 1.3


def test_bench_small(capsys):
    bench.main("--micro 2 --accumulate 1 --rounds 1 --device cpu --arms eager recipe".split())
    said = capsys.readouterr().out
    last = r"^eager / recipe: \d+\.\d\d\neager / ceiling: 0\.\d\d\n$"
    assert re.search(last, said, re.M) and "TFLOP a pair" in said
