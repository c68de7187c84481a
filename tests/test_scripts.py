"""The real scripts, run small: what they write, that they are exact, and what they say to bad input."""

import hashlib
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import script
from PIL import Image
from safetensors.torch import load_file

import embed
import evaluate
import ppd
import sample
import train

TRAIN = [
    "--max-steps",
    "3",
    "--batch",
    "8",
    "--micro",
    "8",
    "--preview-every",
    "0",
    "--log-every",
    "1",
    "--device",
    "cpu",
]


def lines(out):
    return [json.loads(line) for line in (Path(out) / "train.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def trained(world, tmp_path_factory):
    """Four steps of the real script, with a preview."""
    out = tmp_path_factory.mktemp("runs") / "four"
    script(
        "train.py",
        "--users",
        world[1],
        "--out",
        out,
        *TRAIN,
        "--max-steps",
        4,
        "--preview-every",
        4,
    )
    return out


# --------------------------------------------------------------------------------------------------------------- train
def test_first_line_is_step_0_at_ln_2(trained):
    first = lines(trained)[0]
    assert first["step"] == 0 and abs(first["loss"] - 0.693147) < 1e-6
    assert (
        first["implicit_accuracy"] == 0.5
        and first["error_preferred"] == first["error_ref_preferred"]
    )
    assert [line["step"] for line in lines(trained)] == [0, 1, 2, 3]
    assert {
        "validation_implicit_accuracy",
        "validation_error_preferred",
        "lr",
        "grad_norm",
    } <= first.keys()
    assert Image.open(trained / "previews" / "step-000004.png").size[0] > 300


def test_only_the_adapter_changes(world, tmp_path, monkeypatch):
    seen = []
    real = ppd.StableCascade
    monkeypatch.setattr(
        train, "StableCascade", lambda *a, **k: seen.append(real(*a, **k)) or seen[0]
    )
    train.main(["--users", str(world[1]), "--out", str(tmp_path / "run"), *TRAIN])
    digest = lambda base: hashlib.sha256(
        b"".join(
            v.numpy().tobytes()
            for m in (base.prior, base.text_encoder, base.codec)
            for v in m.state_dict().values()
        )
    ).hexdigest()
    assert digest(seen[0]) == digest(real("tiny"))
    assert all(p.grad is None and not p.requires_grad for p in seen[0].prior.parameters())
    torch.manual_seed(0)
    new = ppd.UserAdapter(3, seen[0].channels).state_dict()
    now = load_file(tmp_path / "run" / "adapter.safetensors")
    assert now.keys() == new.keys()
    assert {k for k in new if torch.equal(new[k], now[k])} == {
        "mean",
        "std",
    }  # identity for one-hot users; all else moved


@pytest.mark.parametrize("objective", ["dpo", "sft"])
def test_baselines_are_the_same_loop(objective, world, tmp_path):
    train.main(
        [
            "--users",
            str(world[1]),
            "--out",
            str(tmp_path),
            *TRAIN,
            "--lr",
            "2e-3",
            "--objective",
            objective,
        ]
    )
    adapter = ppd.UserAdapter.load(tmp_path)
    assert adapter.header["objective"] == objective and all(
        math.isfinite(l["loss"]) for l in lines(tmp_path)
    )
    torch.manual_seed(0)
    change = (
        (adapter.project.weight - ppd.UserAdapter(3, adapter.channels).project.weight)
        .abs()
        .max()
        .item()
    )
    if (
        objective == "dpo"
    ):  # everybody is the zero user: the projector's weight sees zeros, only weight decay touches it
        assert change < 1e-5 and lines(tmp_path)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    else:
        assert change > 1e-4 and lines(tmp_path)[0]["loss"] == pytest.approx(
            lines(tmp_path)[0]["error_preferred"]
        )


def test_accumulation_and_ranks_change_nothing(lean, tmp_path):
    """1 process x 8 accumulated = 1 x 8 at once = 2 processes x 4, in float64 to 1e-9, in float32 to 1e-5."""
    for dtype, tolerance in (("float64", 1e-9), ("float32", 1e-5)):
        common = [
            "--users",
            lean[1],
            *TRAIN,
            "--max-steps",
            2,
            "--beta",
            1,
            "--lr",
            5e-4,
            "--t-min",
            0.85,
            "--dtype",
            dtype,
        ]
        state, log, threads = {}, {}, torch.get_num_threads()
        for name, *how in (
            ("whole", "--micro", 8),
            ("split", "--micro", 1, "--workers", 2),
            ("ranks", "--micro", 4),
        ):
            out = tmp_path / f"{dtype}-{name}"
            if name == "ranks":
                script(
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    "--nproc-per-node",
                    2,
                    "train.py",
                    *common,
                    "--out",
                    out,
                    *how,
                    OMP_NUM_THREADS="1",
                )
            else:
                torch.set_num_threads(1)  # sums in the same order everywhere
                train.main([*map(str, common), "--out", str(out), *map(str, how)])
                torch.set_num_threads(threads)
            state[name], log[name] = torch.load(out / "state.pt", weights_only=True), lines(out)
        for other in ("split", "ranks"):
            for key in ("loss", "grad_norm", "error_preferred"):
                for a, b in zip(log["whole"], log[other]):
                    assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), (
                        dtype,
                        other,
                        key,
                    )
            gradient = lambda name: torch.cat(
                [s["exp_avg"].flatten() for s in state[name]["optimizer"]["state"].values()]
            )  # AdamW's running mean
            assert torch.allclose(
                gradient("whole"), gradient(other), rtol=0, atol=tolerance / 10
            ), (dtype, other)
            if dtype == "float64":
                for key, value in state["whole"]["adapter"].items():
                    assert torch.allclose(
                        value, state[other]["adapter"][key], rtol=0, atol=tolerance
                    ), (other, key)


def test_users_of_a_vlm_are_standardised_and_groups_drawn(world, tmp_path):
    """Embeddings with a large common part, two groups a person: the buffers are the training users' mean and std."""
    (tmp_path / "users").mkdir()
    (tmp_path / "users" / "pairs.parquet").write_bytes((world[1] / "pairs.parquet").read_bytes())
    vectors = 100 + torch.randn(3, 2, 1, 6, generator=torch.Generator().manual_seed(0))
    for name, embedding in zip(("light", "warm", "large"), vectors):
        embed.write_user(tmp_path / "users", name, embedding=embedding, vlm="made up")
    train.main(
        [
            "--users",
            str(tmp_path / "users"),
            "--out",
            str(tmp_path / "run"),
            *TRAIN,
            "--max-steps",
            "1",
            "--tokens",
            "2",
        ]
    )
    adapter = ppd.UserAdapter.load(tmp_path / "run")
    assert torch.allclose(adapter.mean, vectors.flatten(0, 2).mean(0)) and torch.allclose(
        adapter.std, vectors.flatten(0, 2).std(0, correction=0)
    )
    assert (adapter.tokens, adapter.user_dim) == (2, 6)
    rows = [dict(r, groups=[0, 1]) for r in embed.read_pairs(world[1])[0] if r["split"] == "train"]
    people = embed.load_training(tmp_path / "users")[1]
    items = [
        embed.Pairs(
            rows, people, embed.Pictures(world[0], (32, Image.BICUBIC)), (16, 8, 8), 0, False, 0.75
        )[i]
        for i in range(40)
    ]
    drawn = [
        next((n, g) for n, v in people.items() for g in (0, 1) if torch.equal(item["user"], v[g]))
        for item in items
    ]
    assert {g for _, g in drawn} == {0, 1} and {n for n, _ in drawn} == {"light", "warm", "large"}


def test_pairs_are_keyed_by_seed_and_position(world):
    rows = [r for r in embed.read_pairs(world[1])[0] if r["split"] == "train"]
    people = embed.load_training(world[1])[1]
    make = lambda seed=0, separate=False: embed.Pairs(
        rows,
        people,
        embed.Pictures(world[0], (32, Image.BICUBIC)),
        (16, 8, 8),
        seed,
        separate,
        0.75,
    )
    a, b, n = make()[5], make()[5], len(rows)
    assert torch.equal(a["noise"], b["noise"]) and (a["t"], a["u_drop"], a["ranking_id"]) == (
        b["t"],
        b["u_drop"],
        b["ranking_id"],
    )
    assert torch.equal(a["noise"][0], a["noise"][1]) and not torch.equal(
        *make(separate=True)[5]["noise"]
    )  # Eq. 6 writes two noises
    assert not torch.equal(a["noise"], make()[6]["noise"]) and not torch.equal(
        a["noise"], make(seed=1)[5]["noise"]
    )
    first, second = (embed.epoch_order(0, epoch, n).tolist() for epoch in (0, 1))
    assert (
        sorted(first) == sorted(second) == list(range(n))
        and first != second
        and not torch.equal(a["noise"], make()[5 + n]["noise"])
    )
    images = {
        r["ranking_id"]: r
        for f in sorted(world[0].glob("*.parquet"))
        for r in pq.read_table(f, columns=["ranking_id", "jpg_0", "jpg_1"]).to_pylist()
    }
    for i in range(10):  # the right pictures, the preferred one first
        item, row = make()[i], rows[embed.epoch_order(0, 0, n)[i]]
        both = [
            embed.open_image(images[item["ranking_id"]][f"jpg_{k}"], "")
            for k in (row["preferred"], 1 - row["preferred"])
        ]
        assert np.array_equal(
            item["pictures"].permute(0, 2, 3, 1), np.stack(both)
        )  # drawn at the codec's own size


def test_resume_is_exact(world, trained, tmp_path):
    """Stopped after 2 of 4 steps by a signal and resumed: the same bytes as the undisturbed run."""
    out = tmp_path / "run"
    common = [
        "--users",
        str(world[1]),
        "--out",
        str(out),
        *TRAIN,
        "--max-steps",
        "4",
        "--preview-every",
        "4",
        "--resume",
    ]
    real, calls = train.forward, []

    def interrupted(*args, **kwargs):
        calls.append(kwargs.get("backward"))
        if len([c for c in calls if c]) == 2 and calls[-1]:  # in the middle of step 1
            os.kill(os.getpid(), 15)
        return real(*args, **kwargs)

    train.forward = interrupted
    try:
        train.main(common)
    finally:
        train.forward = real
    assert torch.load(out / "state.pt", weights_only=True)["step"] == 2
    (out / "train.jsonl").open("a").write(
        json.dumps(dict(step=2, loss=9)) + "\n"
    )  # a line the lost step had written
    train.main(common)
    assert (out / "adapter.safetensors").read_bytes() == (
        trained / "adapter.safetensors"
    ).read_bytes()
    assert [line["step"] for line in lines(out)] == [0, 1, 2, 3] and lines(out)[2]["loss"] != 9
    assert train.main(common) is None  # finished already: says so, exits 0


def test_resume_says_what_it_does(world, trained, tmp_path, capsys):
    train.main(
        [
            "--users",
            str(world[1]),
            "--out",
            str(tmp_path / "new"),
            *TRAIN,
            "--max-steps",
            "1",
            "--resume",
        ]
    )
    assert "nothing to resume" in capsys.readouterr().out
    for change, message in (
        (["--beta", "0.5"], "--beta is 0.5, but was 6.0 when the run in"),
        (["--seed", "1"], "--seed is 1, but was 0 when the run in"),
    ):
        with pytest.raises(SystemExit, match=message):
            train.main(
                [
                    "--users",
                    str(world[1]),
                    "--out",
                    str(trained),
                    *TRAIN,
                    "--max-steps",
                    "4",
                    "--preview-every",
                    "4",
                    "--resume",
                    *change,
                ]
            )
    script(
        "embed.py",
        "--data",
        world[0],
        "--one-hot",
        "warm",
        "light",
        "large",
        "--users",
        tmp_path / "swapped",
    )  # as many pairs, other vectors
    with pytest.raises(SystemExit, match="--users is"):
        train.main(
            [
                "--users",
                str(tmp_path / "swapped"),
                "--out",
                str(trained),
                *TRAIN,
                "--max-steps",
                "4",
                "--preview-every",
                "4",
                "--resume",
            ]
        )


def test_a_base_with_a_small_codec_gets_the_small_recipe(world):
    recipe = lambda base: (
        train.arguments(["--users", str(world[1]), "--out", "nowhere", "--base", base]).batch
    )
    assert (
        recipe("tiny") == recipe("assets/tiny") == train.RECIPES["tiny"]["batch"]
        and recipe("stable-cascade") == train.RECIPES["full"]["batch"]
    )


def test_a_non_finite_loss_stops_before_the_step(world, tmp_path, monkeypatch):
    real = train.ppd_loss
    monkeypatch.setattr(
        train,
        "ppd_loss",
        lambda *a, **k: (lambda losses, log: (losses * math.nan, log))(*real(*a, **k)),
    )
    with pytest.raises(SystemExit, match="step 0: not finite on rank 0: the loss of pairs "):
        train.main(["--users", str(world[1]), "--out", str(tmp_path), *TRAIN])
    assert not (tmp_path / "adapter.safetensors").exists()


# ----------------------------------------------------------------------------------------------------- sample, evaluate
def test_sample_cold_within_20_seconds(tmp_path):
    began = time.time()
    script(
        "sample.py",
        "--user",
        "assets/onehot/light.pt",
        "--adapter",
        "assets/onehot",
        "--prompt",
        "a red star",
        "--out",
        tmp_path,
    )
    assert time.time() - began <= 20
    (path,) = tmp_path.glob("*.png")
    settings = json.loads(Image.open(path).text["ppd"])
    assert (
        settings["prompt"] == "a red star"
        and settings["seed"] == 0
        and settings["user"] == [["assets/onehot/light.pt", None]]
    )
    assert (
        settings["guidance"] == 2
        and settings["steps"] == 20
        and settings["adapter"] == "assets/onehot/adapter.safetensors"
    )


def test_scale_0_is_the_base_bit_for_bit_and_the_person_is_not(tmp_path):
    common = ["--prompt", "a red star", "--steps", "4", "--adapter", "assets/onehot", "--size", "0"]
    pixels = {}
    for name, how in dict(
        base=["--user", "base"],
        zeroed=["--user", "assets/onehot/light.pt", "--user-scale", "0"],
        light=["--user", "assets/onehot/light.pt"],
    ).items():
        sample.main([*common, *how, "--out", str(tmp_path / name)])
        pixels[name] = np.asarray(Image.open(next((tmp_path / name).glob("*.png"))))
    assert pixels["base"].shape == (32, 32, 3)
    assert (pixels["base"] == pixels["zeroed"]).all() and (pixels["base"] != pixels["light"]).any()


def test_grid_blend_and_prompt_file(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red star\n\na blue circle\n")
    sample.main(
        [
            "--prompts",
            str(tmp_path / "prompts.txt"),
            "--user",
            "base",
            "--user",
            "zero",
            "--user",
            "assets/onehot/warm.pt",
            "--adapter",
            "assets/onehot",
            "--steps",
            "2",
            "--out",
            str(tmp_path / "grid"),
        ]
    )
    assert (
        len(list((tmp_path / "grid").glob("*.png"))) == 7
        and (tmp_path / "grid" / "grid.png").exists()
    )
    blend = lambda a, b, out: sample.main(
        [
            "--prompt",
            "a red star",
            "--user",
            f"assets/onehot/warm.pt:{a}",
            "--user",
            f"assets/onehot/light.pt:{b}",
            "--adapter",
            "assets/onehot",
            "--steps",
            "2",
            "--out",
            str(tmp_path / out),
        ]
    )
    blend(1, 0, "pure"), blend(0.5, 0.5, "mixed")
    pure, mixed = (
        np.asarray(Image.open(next((tmp_path / k).glob("*.png")))) for k in ("pure", "mixed")
    )
    warm = np.asarray(Image.open(tmp_path / "grid" / "0000-a-red-star_warm_0.png"))
    assert np.abs(pure.astype(int) - warm).max() <= 1 and (mixed != pure).any()
    sample.main(["--prompt", "a red star " * 10, "--steps", "1", "--out", str(tmp_path / "long")])
    assert "the text encoder reads 16" in capsys.readouterr().err


def test_evaluate_rewards_small(world, trained, tmp_path):
    evaluate.main(
        ["rewards", "--adapter", str(trained), "--n", "8", "--steps", "2", "--out", str(tmp_path)]
    )
    first = json.loads((tmp_path / "evaluation.json").read_text())
    for name in ("light", "warm", "large"):
        r = first["rewards"]["figure_3"][name]["base"]
        assert (
            r.keys() == {"win_rate", "n", "ci95", "mean", "mean_other"}
            and r["n"] == 8
            and r["ci95"][0] <= r["win_rate"] <= r["ci95"][1]
        )
    assert all(
        first["rewards"]["table_1"][method]["fidelity"]["n"] == 8 for method in ("base", "PPD")
    )
    assert first["rewards"]["made"]["command"].startswith("python evaluate.py rewards --adapter")
    (tmp_path / "evaluation.json").write_text(json.dumps(first | dict(other=1)))
    evaluate.main(
        ["rewards", "--adapter", str(trained), "--n", "8", "--steps", "2", "--out", str(tmp_path)]
    )
    second = json.loads((tmp_path / "evaluation.json").read_text())
    assert first["rewards"].pop("made") | dict(seconds=0) == second["rewards"].pop("made") | dict(
        seconds=0
    )
    assert second == first | dict(other=1)  # reproducible; only its own key
    assert (tmp_path / "rewards.png").exists() and "| light |" in (
        tmp_path / "evaluation.md"
    ).read_text()


def test_rates_and_intervals():
    r = evaluate.compare([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 5.0, 1.0])
    assert r["win_rate"] == 0.625 and r["n"] == 4
    low, high = evaluate.wilson(0.5, 100)
    assert (low, high) == (
        pytest.approx(0.4038, abs=1e-4),
        pytest.approx(0.5962, abs=1e-4),
    )  # textbook values
    assert evaluate.wilson(1.0, 10)[1] == 1 and evaluate.wilson(1.0, 10)[0] == pytest.approx(
        0.7225, abs=1e-3
    )


def test_broken_picture_is_named_and_skipped(world, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    table = pq.read_table(sorted(world[0].glob("*.parquet"))).slice(0, 40)
    jpgs = table["jpg_0"].to_pylist()
    file = sorted(world[0].glob("*.parquet"))[0].name
    good, bad, worse = sorted(
        {
            p["row"]
            for p in embed.read_pairs(world[1])[0]
            if p["file"] == file and p["user"] == "light"
        }
    )[:3]
    jpgs[bad], jpgs[worse] = b"no picture", jpgs[worse][:100]
    pq.write_table(
        table.set_column(table.column_names.index("jpg_0"), "jpg_0", [jpgs]),
        tmp_path / "data" / "d.parquet",
    )
    embed.main(
        ["--data", str(tmp_path / "data"), "--users", str(tmp_path / "u"), "--one-hot", "light"]
    )
    rows = {row["row"] for row in embed.read_pairs(tmp_path / "u")[0]}
    assert good in rows and not {bad, worse} & rows
    said = capsys.readouterr().err
    assert (
        f"d.parquet row {bad} jpg_0: not a usable image" in said
        and f"d.parquet row {worse} jpg_0" in said
    )
