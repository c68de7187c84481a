"""What a long run meets: kills at any moment, torn files, a full disk, a dying rank, numbers that are not finite. And what its speed rests on:
no waiting for the device between micro-steps, no gradient where nothing is trained, latents encoded once."""

import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import bench
import pytest
import torch
from conftest import ROOT, script
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import embed
import ppd
import train

STATES = "state.pt", "state.previous.pt"
SHORT = [
    "--batch",
    "8",
    "--micro",
    "8",
    "--device",
    "cpu",
    "--preview-every",
    "0",
    "--log-every",
    "1",
]


def steps(out):
    return [line["step"] for line in ppd.read_jsonl(out / "train.jsonl")]


STARTED = []


def start(*command, **env):
    """A script in the background, in a session of its own, output and errors together; whatever is left of it is killed after the test."""
    STARTED.append(
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | env,
            start_new_session=True,
        )
    )
    return STARTED[-1]


@pytest.fixture(autouse=True)
def nothing_left_running():
    yield
    while STARTED:
        if (process := STARTED.pop()).poll() is None:
            process.terminate()  # torchrun ends its processes too
            process.wait(60)


# ------------------------------------------------------------------------------------------------------------- kills
def drill(lean, tmp_path, kills, length, seed):
    """Kill a run `kills` times, every third time in the middle of a write and else at a random moment of a random step; resume each time ->
    what each kill met, and whether the end is the undisturbed run's, to the byte."""
    common, out = (
        [
            "train.py",
            "--users",
            lean[1],
            *SHORT,
            "--max-steps",
            length,
            "--save-every",
            1,
            "--log-every",
            4,
        ],
        tmp_path / "run",
    )
    here = lambda out: train.main([*map(str, common[1:]), "--out", str(out), "--resume"])
    here(tmp_path / "calm")
    rng, met = random.Random(seed), []
    for k in range(kills):
        process = start(*common, "--out", out, "--resume")
        until = lambda happened: [
            time.sleep(0.001)
            for _ in iter(lambda: process.poll() is None and not happened(), False)
        ]
        written = lambda path: path.stat().st_mtime_ns if path.exists() else 0
        before = written(out / "train.jsonl")
        until(lambda: written(out / "train.jsonl") != before)  # imports are behind it
        for _ in range(
            rng.randrange(length // kills)
        ):  # spread over the run, and never past its end
            before = written(out / "adapter.safetensors")
            until(lambda: written(out / "adapter.safetensors") != before)
        if k % 3 == 2:
            until(lambda: list(out.glob("*.tmp")))
        else:
            time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        said, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, said
        found = [
            torch.load(path, weights_only=True)["step"]
            for path in (out / name for name in STATES)
            if path.exists()
        ]
        met.append(
            f"step {max(found, default=0)}"
            + "".join(f", {path.name} half written" for path in out.glob("*.tmp"))
        )
    here(out)
    same = (out / "adapter.safetensors").read_bytes() == (
        tmp_path / "calm" / "adapter.safetensors"
    ).read_bytes()
    return met, same and steps(out) == steps(tmp_path / "calm") == sorted(
        {*range(0, length, 4), length - 1}
    )


def test_killed_three_times(lean, tmp_path):
    met, same = drill(lean, tmp_path, kills=3, length=16, seed=1)
    assert same, met


@pytest.mark.slow
def test_killed_twenty_times(lean, tmp_path):
    met, same = drill(lean, tmp_path, kills=20, length=80, seed=2)
    print(*met, f"{len(met)} kills, the same bytes in the end: {same}", sep="\n")
    assert (
        same
        and sum("half written" in m for m in met) >= 3
        and len({m.split(",")[0] for m in met}) >= 5
    )


def test_a_torn_checkpoint_falls_back_to_the_one_before(lean, tmp_path, capsys):
    common = ["--users", str(lean[1]), *SHORT, "--save-every", "1", "--resume"]
    for out in ("calm", "torn"):
        train.main([*common, "--max-steps", "3", "--out", str(tmp_path / out)])
    newest, previous = (tmp_path / "torn" / name for name in STATES)
    assert [torch.load(p, weights_only=True)["step"] for p in (newest, previous)] == [3, 2]
    newest.write_bytes(newest.read_bytes()[:-1000])  # as if the power had failed
    (tmp_path / "torn" / "adapter.safetensors").unlink()
    capsys.readouterr()
    train.main([*common, "--max-steps", "3", "--out", str(tmp_path / "torn")])
    assert (
        "state.pt (RuntimeError): going on from state.previous.pt, step 2"
        in capsys.readouterr().err
    )
    assert (tmp_path / "torn" / "adapter.safetensors").read_bytes() == (
        tmp_path / "calm" / "adapter.safetensors"
    ).read_bytes()
    newest.unlink()  # killed between two renames
    train.main([*common, "--max-steps", "3", "--out", str(tmp_path / "torn")])
    assert steps(tmp_path / "torn") == [0, 1, 2]
    newest.write_bytes(b"x"), previous.write_bytes(b"x")
    with pytest.raises(SystemExit, match="cannot resume from .*state.pt .* or .*state.previous.pt"):
        train.main([*common, "--max-steps", "3", "--out", str(tmp_path / "torn")])


def test_resume_names_everything_that_differs(lean, tmp_path):
    common = ["--users", str(lean[1]), *SHORT, "--max-steps", "1", "--out", str(tmp_path)]
    train.main(common)
    with pytest.raises(SystemExit) as stop:
        train.main([*common, "--resume", "--beta", "0.5", "--lr", "0.1"])
    assert (
        "--beta is 0.5, but was 6.0; --lr is 0.1, but was 0.0005" in stop.value.code
        or "--lr is 0.1, but was 0.0005; --beta is 0.5, but was 6.0" in stop.value.code
    )


def test_a_full_disk_loses_nothing(lean, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    common = ["--users", str(lean[1]), *SHORT, "--max-steps", "4", "--save-every", "1"]
    train.main([*common, "--out", str(tmp_path / "calm")])
    real, calls, (soft, hard) = torch.save, [], resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*args):
        calls.append(1)
        if len(calls) == 3:  # from here on no file can grow beyond 100 kB
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        real(*args)

    monkeypatch.setattr(torch, "save", full)
    try:
        with pytest.raises(
            SystemExit, match="state.pt: cannot be written .*; what was there before is kept"
        ):
            train.main([*common, "--out", str(tmp_path / "full")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        monkeypatch.undo()
    assert not list((tmp_path / "full").glob("*.tmp"))
    assert torch.load(tmp_path / "full" / "state.previous.pt", weights_only=True)["step"] == 2
    train.main([*common, "--out", str(tmp_path / "full"), "--resume"])
    assert (tmp_path / "full" / "adapter.safetensors").read_bytes() == (
        tmp_path / "calm" / "adapter.safetensors"
    ).read_bytes()
    assert steps(tmp_path / "full") == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------- several ranks
def torchrun(*command):
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]


def test_a_dying_rank_ends_the_job_and_a_restart_resumes(lean, tmp_path):
    out = tmp_path / "run"
    common = [
        "train.py",
        "--users",
        lean[1],
        "--batch",
        8,
        "--micro",
        4,
        "--device",
        "cpu",
        "--preview-every",
        0,
        "--max-steps",
        40,
        "--save-every",
        1,
        "--out",
        out,
        "--resume",
    ]

    def shoot(job):
        """SIGKILL for the second rank, two checkpoints from now."""
        for _ in range(2):
            before = (out / "state.pt").stat().st_mtime_ns if (out / "state.pt").exists() else 0
            while (
                not (out / "state.pt").exists() or (out / "state.pt").stat().st_mtime_ns == before
            ):
                time.sleep(0.01)
                assert job.poll() is None, job.communicate()[0][-2000:]
        children = subprocess.run(
            ["pgrep", "-P", str(job.pid)], capture_output=True, text=True
        ).stdout.split()
        os.kill(int(children[-1]), signal.SIGKILL)
        return time.time()

    job = start(*torchrun(*common), OMP_NUM_THREADS="1")
    shot = shoot(job)
    said, _ = job.communicate(timeout=60)
    assert time.time() - shot < 60 and job.returncode != 0 and "SIGKILL" in said
    done = torch.load(out / "state.pt", weights_only=True)["step"]
    assert 0 < done < 40
    job = start(
        *torchrun("--max-restarts", 1, *common),
        OMP_NUM_THREADS="1",
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )  # torchrun itself starts both again
    shoot(job)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0 and steps(out) == [0, 10, 20, 30, 39], said


def test_restarts_that_would_hang_are_refused(lean, monkeypatch, capsys):
    (
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1"),
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True"),
    )  # as torchrun sets them
    with pytest.raises(SystemExit):
        train.arguments(["--users", str(lean[1]), "--out", "nowhere"])
    assert (
        "train.py: error: torchrun --max-restarts: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        in capsys.readouterr().err
    )


def test_a_lost_process_is_said_in_one_line(monkeypatch):
    def lost(*_):
        raise RuntimeError("Connection closed by peer\nframe #0")

    for name, fake in dict(
        is_initialized=lambda: True,
        get_world_size=lambda: 2,
        all_gather_object=lost,
        all_reduce=lost,
    ).items():
        monkeypatch.setattr(torch.distributed, name, fake)
    for call in (lambda: ppd.from_all_ranks(0), lambda: ppd.sum_over_ranks([torch.ones(1)])):
        with pytest.raises(
            ppd.BadInput,
            match="^another process is gone, see its own last line .Connection closed by peer.$",
        ):
            call()


def test_a_signal_to_all_processes_saves(lean, tmp_path):
    """As schedulers and torchrun send it, to the workers that read pictures too."""
    process = start(
        "train.py",
        "--users",
        lean[1],
        *SHORT,
        "--workers",
        1,
        "--save-every",
        1000,
        "--max-steps",
        1000,
        "--out",
        tmp_path / "run",
    )
    while not (tmp_path / "run" / "train.jsonl").exists() or not steps(tmp_path / "run"):
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()[0]
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert (
        process.returncode == 0
        and "stopped by a signal after step" in said
        and "Traceback" not in said
    )
    assert (
        torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"]
        == steps(tmp_path / "run")[-1] + 1
    )


def test_not_finite_names_step_ranks_and_pairs(world, tmp_path, monkeypatch, capsys):
    real, calls = train.ppd_loss, []

    def broken(*args, **kwargs):
        losses, log = real(*args, **kwargs)
        calls.append(1)
        if len(calls) == 3:  # step 2's only micro-step; validation is off
            losses = torch.where(torch.arange(len(losses)) == 5, math.nan, losses)
        return losses, log

    monkeypatch.setattr(train, "ppd_loss", broken)
    monkeypatch.setattr(train, "validate", lambda *a: {})
    rows = [r for r in embed.read_pairs(world[1])[0] if r["split"] == "train"]
    wanted = rows[embed.epoch_order(0, 0, len(rows))[2 * 8 + 5]]["ranking_id"]
    with pytest.raises(SystemExit) as stop:
        train.main(
            [
                "--users",
                str(world[1]),
                *SHORT,
                "--max-steps",
                "4",
                "--save-every",
                "1",
                "--out",
                str(tmp_path),
            ]
        )
    assert stop.value.code.startswith(
        f"train.py: error: step 2: not finite on rank 0: the loss of pairs {wanted}."
    )
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 2


def test_both_ranks_stop_at_a_person_who_overflows(world, tmp_path):
    users = tmp_path / "users"
    shutil.copytree(world[1], users)
    embed.write_user(
        users, "large", embedding=torch.tensor([[[0, 0, 1e38]]]), vlm="one-hot"
    )  # finite, its layer norm is not
    done = script(
        *torchrun(
            "train.py",
            "--users",
            users,
            "--batch",
            8,
            "--micro",
            4,
            "--device",
            "cpu",
            "--preview-every",
            0,
            "--max-steps",
            3,
            "--out",
            tmp_path / "run",
        ),
        check=False,
        OMP_NUM_THREADS="1",
    )
    rows = embed.load_training(users)[0]["train"]
    first = [rows[i] for i in embed.epoch_order(0, 0, len(rows))[:8]]
    ranks = [r for r in (0, 1) if any(row["user"] == "large" for row in first[4 * r : 4 * r + 4])]
    line = f"train.py: error: step 0: not finite on rank {', '.join(map(str, ranks))}: the loss of pairs {', '.join(str(row['ranking_id']) for row in first if row['user'] == 'large')}. "
    assert (
        ranks
        and done.returncode
        and done.stderr.count(line) == 2
        and 'train.py", line' not in done.stderr
    )
    assert not (tmp_path / "run" / "state.pt").exists()


# ----------------------------------------------------------------------------------------------------- what speed rests on
class Waits(TorchDispatchMode):
    """Finds the operations at which the host would wait for a GPU: reading a value, and copies that are not non-blocking."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        tensors = [a for a in args if torch.is_tensor(a)]
        copied = (
            name == "_to_copy"
            and torch.device(kwargs.get("device") or args[0].device) != args[0].device
            or name == "copy_"
            and args[0].device != args[1].device
        )
        if (
            name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique2")
            or copied
            and not kwargs.get("non_blocking", False)
            or name == "index"
            and any(torch.is_tensor(i) and i.dtype == torch.bool for i in args[1])
        ) and tensors:
            self.found.append(name)
        return func(*args, **kwargs)


@pytest.mark.parametrize("codec", ["tiny", "cascade"])
def test_no_micro_step_waits_for_its_device(codec, lean):
    """The base on the meta device stands for one on a GPU: values cannot be read there, and every copy to it is seen."""
    base, meta = ppd.StableCascade("tiny"), torch.device("meta")
    if codec == "cascade":
        base.codec = ppd.CascadeCodec("nowhere", meta, torch.float32, None, None, 3)
        vars(base.codec)["encoder"] = torch.nn.Conv2d(3, 16, 32, 32, device=meta)
        base.latent_shape = base.codec.latent_shape
    else:
        base.codec.to(meta)
    for model in (base.prior, base.text_encoder):
        model.to(meta)
    base.device, base.scheduler = meta, ppd.make_scheduler(meta)
    adapter = ppd.UserAdapter(3, base.channels).install(base.prior)
    rows, users, *_ = embed.load_training(lean[1])
    pairs = embed.Pairs(
        rows["train"],
        users,
        embed.Pictures(lean[0], base.codec.fit),
        base.latent_shape,
        0,
        False,
        0.85,
    )
    batch = embed.collate([pairs[i] for i in range(4)], base.tokenizer)
    with Waits() as waits:
        train.forward(
            base, adapter, batch, "ppd", 1.0, 0.1, backward=lambda losses: losses.mean().backward()
        )
    assert waits.found == []
    with Waits() as waits:
        base.codec.to(torch.float64) if codec == "tiny" else None
        torch.zeros(1).to(meta), torch.zeros(1).item()
    assert waits.found == ["_to_copy", "_local_scalar_dense"]  # it does see them


def test_nothing_waits_between_micro_steps_and_frozen_weights_get_no_gradient(
    lean, tmp_path, monkeypatch
):
    """In the loop itself: from a step's first micro-step to its last, the loop reads no value."""
    real, load, counts, bases = train.forward, train.StableCascade, [], []

    def counted(*args, **kwargs):
        counts.append(len(waits.found))
        out = real(*args, **kwargs)
        counts.append(len(waits.found))
        return out

    monkeypatch.setattr(train, "forward", counted)
    monkeypatch.setattr(train, "StableCascade", lambda *a: bases.append(load(*a)) or bases[0])
    with Waits() as waits:
        train.main(
            [
                "--users",
                str(lean[1]),
                *SHORT,
                "--micro",
                "2",
                "--workers",
                "1",
                "--max-steps",
                "2",
                "--out",
                str(tmp_path),
            ]
        )
    micro = len(counts) // 2
    assert micro == 8 and all(len(set(counts[i : i + 8])) == 1 for i in (0, 8))  # two steps of four
    frozen = [*bases[0].prior.parameters(), *bases[0].text_encoder.parameters()]
    assert all(not p.requires_grad and p.grad is None for p in frozen)


def test_exploding_errors_are_told(lean, tmp_path, monkeypatch, capsys):
    real = train.ppd_loss
    monkeypatch.setattr(
        train,
        "ppd_loss",
        lambda *a: (
            lambda losses, log: (losses, log | dict(error_preferred=2 * log["error_ref_preferred"]))
        )(*real(*a)),
    )
    train.main(["--users", str(lean[1]), *SHORT, "--max-steps", "1", "--out", str(tmp_path)])
    assert (
        "warning: step 0: the preferred pictures' error is 2.0 x the reference's"
        in capsys.readouterr().out
    )


def test_cached_latents_train_the_same(world, tmp_path, monkeypatch, capsys):
    users = tmp_path / "users"
    script("embed.py", "--data", world[0], "--one-hot", "light", "warm", "large", "--users", users)
    common = ["--users", str(users), *SHORT, "--max-steps", "2"]
    train.main([*common, "--out", str(tmp_path / "pictures")])
    monkeypatch.setattr(embed.Latents, "SHARD", 300)
    embed.main(["--cache-latents", "--users", str(users), "--device", "cpu"])
    train.main(
        [*common, "--out", str(tmp_path / "cached"), "--data", str(tmp_path)]
    )  # touches no picture: there is none
    said = capsys.readouterr().out
    losses = lambda name: [line["loss"] for line in ppd.read_jsonl(tmp_path / name / "train.jsonl")]
    assert "cached latents" in said and losses("cached") == pytest.approx(
        losses("pictures"), rel=1e-4
    )  # batches of another size round otherwise
    shards = sorted((users / "latents").glob("*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    with pytest.raises(SystemExit, match=f"{shards[-1].name}: this shard is missing"):
        train.main([*common, "--out", str(tmp_path / "third")])
    embed.main(["--cache-latents", "--users", str(users), "--device", "cpu"])
    assert shards[-1].exists()
    shards[0].write_bytes(b"not a shard")
    with pytest.raises(SystemExit, match=f"{shards[0].name}: not a shard of latents"):
        train.main([*common, "--out", str(tmp_path / "third")])


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_give_the_same(backend, world, tmp_path, monkeypatch):
    real = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: real(self, backend=backend, **how)
    )
    torch._dynamo.reset(), counters.clear()
    common = ["--users", str(world[1]), *SHORT, "--max-steps", "2", "--dtype", "float64"]
    for out, *how in (("eager",), ("compiled", "--compile", "--checkpointing")):
        train.main([*common, "--out", str(tmp_path / out), *how])
    assert (
        3 <= counters["stats"]["unique_graphs"] <= 16
    )  # for kinds of blocks and uses: the prior has 20 blocks, the run 30 forwards
    assert not counters["graph_break"]
    eager, compiled = (
        torch.load(tmp_path / out / "state.pt", weights_only=True)["adapter"]
        for out in ("eager", "compiled")
    )
    assert all(torch.allclose(eager[k], compiled[k], rtol=0, atol=1e-9) for k in eager)


@pytest.mark.slow
def test_compiled_policy_begins_as_the_reference(world, tmp_path):
    """In bfloat16 too, where two graphs, with and without a user, round differently."""
    for how in ([], ["--checkpointing"]):
        torch._dynamo.reset()
        out = tmp_path / f"run{len(how)}"
        train.main(
            [
                "--users",
                str(world[1]),
                *SHORT,
                "--max-steps",
                "1",
                "--dtype",
                "bfloat16",
                "--compile",
                *how,
                "--out",
                str(out),
            ]
        )
        (first,) = ppd.read_jsonl(out / "train.jsonl")
        assert (
            first["loss"] == first["validation_loss"] == pytest.approx(math.log(2), abs=1e-7)
            and first["implicit_accuracy"] == 0.5
        )


def test_a_preview_that_cannot_be_painted_is_a_warning(world, tmp_path, monkeypatch, capsys):
    def decode(*_):
        raise ppd.BadInput("cannot load Stages A and B")

    monkeypatch.setattr(ppd.StableCascade, "decode", decode)
    train.main(
        [
            "--users",
            str(world[1]),
            *SHORT,
            "--max-steps",
            "1",
            "--preview-every",
            "1",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    assert (
        capsys.readouterr().err.endswith("warning: no preview: cannot load Stages A and B\n")
        and (tmp_path / "run/adapter.safetensors").exists()
    )


def test_activations_are_channels_last_by_themselves():
    """Stage C permutes for its norms and stays so: no conversion of weights or inputs would change what its convolutions see."""
    base, seen = ppd.StableCascade("tiny"), []
    for module in base.prior.modules():
        if isinstance(module, torch.nn.Conv2d) and module.groups > 1:
            module.register_forward_hook(
                lambda module, inputs, out: seen.append(
                    inputs[0].is_contiguous(memory_format=torch.channels_last)
                )
            )
    base.predict_noise(
        torch.randn(2, *base.latent_shape), torch.rand(2), *base.encode_prompts(["a red star"] * 2)
    )
    assert len(seen) == 8 and all(seen)


def test_bench_counts_the_full_size(capsys):
    bench.main(["--base", "lite", "--count"])
    said = capsys.readouterr().out
    total, held = (
        float(re.search(r"([\d.]+) TFLOP a pair", said)[1]),
        float(re.search(r"= ([\d.]+)\n", said)[1]),
    )
    assert (
        abs(total / (6 * 1.174) - 1) < 0.05 and held < 24
    )  # 6 forwards of 1.174 TFLOP (the lite prior at 24 x 24), and the text encoder


@pytest.mark.slow
def test_ours_is_faster(capsys):
    bench.main(["--base", "tiny", "--rounds", "5", "--device", "cpu", "--profile"])
    assert (
        float(re.search(r"^ours / recipe: (\d+\.\d\d)$", capsys.readouterr().out, re.M)[1]) >= 1.3
    )


def test_bench_small(capsys):
    bench.main(
        [
            "--base",
            "tiny",
            "--micro",
            "2",
            "--accumulate",
            "1",
            "--rounds",
            "1",
            "--arms",
            "eager",
            "recipe",
            "--device",
            "cpu",
        ]
    )
    said = capsys.readouterr().out
    assert (
        re.search(r"^eager / recipe: \d+\.\d\d\neager / ceiling: 0\.\d\d\n$", said, re.M)
        and "TFLOP a pair" in said
    )
