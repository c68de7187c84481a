"""The paper's experiments: each runs small, and the README's tables are those of assets/results.json, which a shipped adapter
still earns."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, script
from PIL import Image

import embed
import evaluate
import train
from ppd import UserAdapter
from sample import generate, load_base, standardised

RESULTS = ROOT / "assets" / "results.json"
METHODS = ("base", "Diffusion-DPO", "SFT", "PPD", "one Diffusion-DPO a reward")


@pytest.fixture
def here(monkeypatch):
    """Scripts that evaluate.py starts run in this process: a start takes seconds."""
    monkeypatch.setattr(
        evaluate,
        "script",
        lambda name, *flags: {"train.py": train, "embed.py": embed}[name].main(
            [str(f) for f in flags]
        ),
    )


def evaluated(command, *flags, out):
    """One subcommand, run small -> its part of evaluation.json, its table being in evaluation.md."""
    evaluate.main([command, *map(str, flags), "--steps", "2", "--out", str(out)])
    result = json.loads((out / "evaluation.json").read_text())
    key = "couples" if "couples" in result else command
    assert evaluate.TABLES[key](result[key]) in (out / "evaluation.md").read_text() and result[key][
        "made"
    ]["command"].startswith(f"python evaluate.py {command}")
    for picture in out.glob("*.png"):
        assert np.asarray(Image.open(picture)).std() > 10
    return result[key]


@pytest.fixture(scope="module")
def runs(world, people, tmp_path_factory):
    """An adapter for the three rewards and one for people, hardly trained: (folder, folder)."""
    out = tmp_path_factory.mktemp("runs")
    for name, users in (("onehot", world[1]), ("people", people[1])):
        train.main(
            [
                "--users",
                str(users),
                "--out",
                str(out / name),
                "--max-steps",
                "2",
                "--batch",
                "8",
                "--preview-every",
                "0",
                "--device",
                "cpu",
            ]
        )
    return out / "onehot", out / "people"


# ------------------------------------------------------------------------------------------------- the experiments, small
def test_table_1_and_figure_3(runs, world, tmp_path, here, capsys):
    flags = ["--adapter", runs[0], "--baselines", tmp_path / "baselines", "--n", 6]
    result = evaluated("rewards", *flags, out=tmp_path / "out")
    assert set(result["table_1"]) == set(METHODS) and all(
        result["table_1"][m][r]["n"] == 6 for m in METHODS for r in ("light", "warm", "large")
    )
    assert set(result["figure_3"]["warm"]) == set(METHODS) - {"PPD"}
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {"rewards.png", "figure_3.png"}
    headers = {p.name: UserAdapter.load(p).header for p in (tmp_path / "baselines").iterdir()}
    assert {n: h["objective"] for n, h in headers.items()} == {
        "dpo": "dpo",
        "sft": "sft",
        "dpo-light": "dpo",
        "dpo-warm": "dpo",
        "dpo-large": "dpo",
    }
    same = UserAdapter.load(runs[0]).header["recipe"]
    assert all(
        h["step"] == 2 and h["recipe"] | dict(only=None) == same for h in headers.values()
    ) and headers["dpo-warm"]["recipe"]["only"] == ["warm"]
    rows = [
        json.loads(line)
        for line in (tmp_path / "baselines" / "dpo" / "train.jsonl").read_text().splitlines()
    ]
    own, _ = embed.read_pairs(world[1].with_name("users-own"))
    original = {
        r["ranking_id"]: r["preferred"]
        for r in embed.split_rows(embed.read_rows(world[0]), 0.1, 0.2, 0.25)[0]
    }
    assert (
        rows
        and all(r["preferred"] == original[r["ranking_id"]] for r in own)
        and {r["user"] for r in own} == {"own"}
    )
    capsys.readouterr()
    assert evaluated("rewards", *flags, out=tmp_path / "out")["table_1"] == result["table_1"]
    assert "steps = " not in capsys.readouterr().out  # what is there is not trained again
    train.main(
        [
            "--users",
            str(world[1]),
            "--out",
            str(tmp_path / "other"),
            "--max-steps",
            "2",
            "--batch",
            "8",
            "--beta",
            "3",
            "--preview-every",
            "0",
        ]
    )
    with pytest.raises(
        SystemExit,
        match="dpo: trained with beta 6.0, but .* is to be compared with 3.0; choose another --baselines",
    ):
        evaluate.main(
            [
                "rewards",
                "--adapter",
                str(tmp_path / "other"),
                "--baselines",
                str(tmp_path / "baselines"),
            ]
        )


def test_one_reward_only(runs, world, tmp_path, capsys):
    train.main(
        [
            "--users",
            str(world[1]),
            "--only",
            "warm",
            "--out",
            str(tmp_path / "run"),
            "--max-steps",
            "1",
            "--batch",
            "4",
            "--preview-every",
            "0",
        ]
    )
    rows = [
        r for r in embed.read_pairs(world[1])[0] if r["user"] == "warm" and r["split"] == "train"
    ]
    assert f"{len(rows)} training pairs of 1 users" in capsys.readouterr().out


def test_figure_4(runs, tmp_path):
    result = evaluated("interpolate", "--adapter", runs[0], "--n", 3, out=tmp_path)
    assert (
        len(result["edges"]) == 6
        and all(len(e["means"]) == 11 and e["n"] == 3 for e in result["edges"])
        and len(result["map"]) == 36
    )
    assert all(sum(p["weights"].values()) == pytest.approx(1) for p in result["map"])
    at = {tuple(p["weights"].values()): p["means"] for p in result["map"]}
    along = next(
        e for e in result["edges"] if e["edge"] == ["light", "large"] and e["reward"] == "large"
    )
    assert along["means"] == [at[round(1 - w / 10, 10), 0, w / 10]["large"] for w in range(11)]


def test_couples(runs, tmp_path):
    result = evaluated("interpolate", "--adapter", runs[1], "--n", 4, out=tmp_path)
    assert all(
        len(result[who]["means"]) == 11 and result[who]["n"] == 4 for who in ("one", "other")
    )


def test_figure_2(tmp_path):
    script("tiny.py", "data", "--out", tmp_path / "data", "--users", 24, "--pairs", 90, "--seed", 3)
    for folder, *how in (("users", "--layer", "all"), ("after", "--profile")):
        script(
            "embed.py",
            "--data",
            tmp_path / "data",
            "--users",
            tmp_path / folder,
            "--groups",
            13,
            *how,
            *("--test-captions", 0, "--validation-captions", 0, "--unseen-users", 0),
        )
    result = evaluated(
        "classify",
        "--users",
        tmp_path / "users",
        "--profile-users",
        tmp_path / "after",
        out=tmp_path / "out",
    )
    assert (
        list(result["states"]) == [f"prompt, layer {k}" for k in range(5)] + ["profile, layer -1"]
        and 20 <= result["people"] <= 24
    )
    for row in (*result["states"].values(), *result["ceilings"].values()):
        assert [r["n"] for r in row.values()] == [result["people"]] * 5 and sorted(
            r["rate"] for r in row.values()
        ) == [r["rate"] for r in row.values()]
    at = lambda row, k: row[str(k)]["rate"]
    assert (
        at(result["ceilings"]["a perfect reader of the four choices"], 4)
        <= at(result["ceilings"]["the true taste"], 4) + 0.1
    )
    assert (
        at(result["states"]["prompt, layer 4"], 4)
        > result["chance"]["4"]
        == pytest.approx(at(result["states"]["prompt, layer 0"], 4), abs=1e-4)
    )
    with pytest.raises(
        SystemExit, match="expected a person read after the profile from the same choices"
    ):
        evaluate.main(
            [
                "classify",
                "--users",
                str(tmp_path / "users"),
                "--profile-users",
                str(tmp_path / "users"),
            ]
        )


def test_classifier_on_what_can_and_cannot_be_told():
    rng = np.random.default_rng(0)
    middle = torch.tensor(rng.normal(size=(30, 8)), dtype=torch.float32)
    drawn = lambda: middle + 0.05 * torch.tensor(rng.normal(size=(30, 8)), dtype=torch.float32)
    x, who = torch.cat([drawn() for _ in range(6)]), torch.arange(30).repeat(6)
    assert (evaluate.classifier(x, who, drawn(), drawn(), 0) == 0).float().mean() > 0.9
    noise = lambda n: torch.tensor(rng.normal(size=(n, 8)), dtype=torch.float32)
    assert (
        evaluate.classifier(noise(180), who, noise(30), noise(30), 0).float().mean() > 10
    )  # chance is 14.5


def test_figure_6(runs, tmp_path, here):
    result = evaluated(
        "profiles",
        "--adapter",
        runs[1],
        "--baselines",
        tmp_path / "baselines",
        "--n",
        6,
        out=tmp_path / "out",
    )
    assert len(result["arms"]) == 5 and all(
        r["n"] == 6 and r["fidelity"]["n"] == 6 for r in result["arms"].values()
    )
    assert all(
        word in evaluate.tiny.WORDS
        for text in result["profiles"].values()
        for word in text.split(", ")
    )


def test_ablations(people, tmp_path, here, monkeypatch, capsys):
    monkeypatch.setattr(
        evaluate,
        "ABLATIONS",
        {
            k: evaluate.ABLATIONS[k]
            for k in ("default", "1 shot", "10 training people", "projector without biases")
        },
    )
    monkeypatch.setattr(evaluate, "SEEDS", (0, 1))
    flags = ["--users", people[1], "--train-steps", 1, "--n", 4, "--dtype", "bfloat16"]
    result = evaluated("ablations", *flags, out=tmp_path)
    assert list(result["changes"]) == list(evaluate.ABLATIONS) and all(
        len(r["gain_by_seed"]) == 2 and r["fidelity"]["n"] == 4 for r in result["changes"].values()
    )
    assert result["changes"]["default"]["against_default"]["mean"] == 0
    assert (
        not UserAdapter.load(tmp_path / "projector-without-biases-0").bias
        and UserAdapter.load(tmp_path / "1-shot-1").header["seed"] == 1
    )
    one = [
        len(g)
        for f in people[1].with_name("users-1shot").glob("*.pt")
        for g in evaluate.load_user(f)["shots"]
    ]
    assert set(one) == {1}
    assert "of 10 users" in capsys.readouterr().out
    (
        tmp_path / "1-shot-0" / "scores.json"
    ).unlink()  # as if killed there: nothing else is done again
    assert evaluated("ablations", *flags, out=tmp_path)["changes"] == result["changes"]
    assert "steps = " not in capsys.readouterr().out  # its training had finished
    with pytest.raises(SystemExit, match="scores.json is of other seed: 10000, not 1"):
        evaluate.main(["ablations", *map(str, flags), "--seed", "1", "--out", str(tmp_path)])


def test_numbers():
    rising = np.array([[1.0, 2.0], [2.0, 3.0], [3.0, 1.0], [4.0, 9.0]])
    assert evaluate.spearman(np.arange(4), rising)["spearman"] == pytest.approx(
        0.8
    )  # means 1.5, 2.5, 2, 6: one neighbouring pair swapped
    assert (
        evaluate.spearman(np.arange(4), -np.arange(4)[:, None] * np.ones((4, 3)))["spearman"] == -1
    )
    assert evaluate.spearman(np.arange(11), np.zeros((11, 5))) == dict(
        spearman=0, n=5, ci95=[0, 0]
    )  # what does nothing earns nothing
    tied = evaluate.spearman(np.arange(4), np.array([0, 1, 1, 1])[:, None] * np.ones((4, 2)))[
        "spearman"
    ]
    assert tied == pytest.approx(0.7746, abs=1e-4)  # scipy.stats.spearmanr
    m = evaluate.mean([1, 2, 3, 4])
    assert m["mean"] == 2.5 and m["ci95"][1] - 2.5 == pytest.approx(
        1.96 * np.sqrt(5 / 3) / 2, abs=1e-3
    )
    assert evaluate.wins([1, 2, 3], [1, 3, 2]).tolist() == [0.5, 0, 1]


@pytest.mark.parametrize(
    "argv, line",
    [
        ("profiles --adapter assets/ppd", "profiles wants --baselines FOLDER"),
        ("classify --users nowhere", "--users nowhere: no pairs.parquet there; run embed.py first"),
        (
            "people --adapter assets/ppd --data data --users {people}",
            "true tastes are known of drawn people only",
        ),
        ("ablations --train-steps 0", "--train-steps 0: expected 1 or more"),
    ],
)
def test_one_clear_line(argv, line, people, capsys):
    argv = argv.format(people=people[1]).split()
    with pytest.raises(SystemExit) as stop:
        evaluate.main(argv)
    said = capsys.readouterr().err + str(stop.value.code)
    assert line in said and "Traceback" not in said


def test_bias_free_projector_makes_the_zero_user_the_base():
    torch.manual_seed(0)
    adapter = UserAdapter(8, [16, 16], bias=False)
    assert adapter.zero_user().abs().max() == 0 and not any(
        "bias" in k for k in adapter.state_dict()
    )
    assert UserAdapter(8, [16, 16]).zero_user().abs().max() > 0


# ------------------------------------------------------------------------------------------------------ what is shipped
def test_readme_shows_the_results():
    """Every table row of the README's results is one that the shipped numbers give, and the other way round."""
    results, readme = json.loads(RESULTS.read_text()), (ROOT / "README.md").read_text()
    assert set(evaluate.TABLES) <= set(results)
    for name, result in results.items():
        for line in evaluate.TABLES[name.split(":")[0]](result).splitlines():
            assert not line.startswith("|") or line in readme, f"{name}: README lacks {line}"
        assert result["made"]["command"].replace("--out runs/results", "").strip() in re.sub(
            r"\s+--out runs/results", "", readme
        ), name


def test_claims_of_the_results():
    """What the README says of the tables, checked against the numbers."""
    r = json.loads(RESULTS.read_text())
    assert all(e["spearman"] >= 0.95 and e["n"] >= 64 for e in r["interpolate"]["edges"])
    best = r["classify"]["states"]["prompt, layer 4"]["16"]
    assert best["ci95"][0] > 2 * r["classify"]["chance"]["16"]
    kept = [
        (r["people"]["fidelity"][arm], r["rewards"]["table_1"][method]["fidelity"])
        for arm, method in (("base", "base"), ("ppd", "PPD"))
    ]
    assert all(ours["rate"] >= base["rate"] - 0.05 for base, ours in zip(*kept))
    means = r["rewards"]["table_1"]
    assert all(
        means["base"]["light"]["mean"] < means[m]["light"]["mean"] < means["PPD"]["light"]["mean"]
        for m in ("Diffusion-DPO", "SFT")
    )
    assert (
        means["one Diffusion-DPO a reward"]["large"]["mean"] < means["SFT"]["large"]["mean"]
    )  # where the order does not hold, the README says so


def test_a_shipped_adapter_scores_as_it_did():
    first = json.loads(RESULTS.read_text())["rewards"]["first"]
    for method, folder, person in (
        ("PPD", "onehot", "assets/onehot/warm.pt"),
        ("one Diffusion-DPO a reward", "onehot/dpo-warm", "zero"),
    ):
        adapter = UserAdapter.load(ROOT / "assets" / folder)
        base = load_base(
            evaluate.arguments(["rewards", "--adapter", "assets/onehot", "--device", "cpu"]),
            adapter,
        )
        captions = sorted(
            {
                "a red star",
                "an orange circle",
                "a yellow square",
                "a green circle",
                "a cyan cross",
                "a blue cross",
                "a purple triangle",
                "a pink square",
            }
        )
        prompts = [captions[i % 8] for i in range(12)]
        made = generate(
            base, prompts, [10_000 + i for i in range(12)], adapter, standardised(adapter, person)
        )
        off = np.abs(embed.score("warm", made, prompts) - first[method]["warm"])
        assert np.median(off) < 0.02 and off.max() < 0.3, (
            off
        )  # another machine's arithmetic moves a pixel or two


@pytest.mark.slow
def test_a_cell_trained_again(tmp_path):
    """Diffusion-DPO for `warm`, from Table 1, trained again by the README's recipe: the mean reward is within its interval."""
    script("embed.py", "--one-hot", "light", "warm", "large", "--users", tmp_path / "users")
    script(
        "train.py",
        "--users",
        tmp_path / "users",
        "--objective",
        "dpo",
        "--only",
        "warm",
        "--out",
        tmp_path / "run",
        "--preview-every",
        0,
    )
    adapter = UserAdapter.load(tmp_path / "run")
    base = load_base(evaluate.arguments(["rewards", "--adapter", str(tmp_path / "run")]), adapter)
    captions = sorted(
        {
            r["caption"]
            for r in embed.read_pairs(tmp_path / "users")[0]
            if r["split"].startswith("test")
        }
    )
    prompts = [captions[i % len(captions)] for i in range(200)]
    again = embed.score(
        "warm",
        generate(
            base,
            prompts,
            [10_000 + i for i in range(200)],
            adapter,
            torch.zeros_like(adapter.mean)[None],
        ),
        prompts,
    )
    there = json.loads(RESULTS.read_text())["rewards"]["table_1"]["one Diffusion-DPO a reward"][
        "warm"
    ]
    assert there["ci95"][0] < again.mean() < there["ci95"][1]
