"""The paper's experiments: each runs small, and the tables in docs/ are those of
assets/results.json, which a shipped adapter still earns."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import embed
import evaluate
import experiments
import rewards
import sample
import train
import utils
from bases import load_base
from bases.images import ImagePairs
from conftest import ROOT, call, evaluation, moved, refusal, run_train, script
from data import hash_fraction, read_pairs, read_rows, split_rows
from ppd import UserAdapter, ppd_loss
from tiny import world as drawn_world

RESULTS = json.loads((ROOT / "assets" / "results.json").read_text())
UPPER_BOUND = "one Diffusion-DPO a reward"
METHODS = ("base", "Diffusion-DPO", "SFT", "PPD", UPPER_BOUND)
TABLES = {name: getattr(evaluate, f"{name}_table") for name in evaluate.COMMANDS}

TABLES |= {name: getattr(experiments, f"{name}_table") for name in experiments.EXPERIMENTS}


@pytest.fixture
def here(monkeypatch):
    """Scripts that evaluate.py starts run in this process: a start takes seconds."""

    def run_python(name, *flags):
        call(sys.modules[name.removesuffix(".py")], *flags)

    monkeypatch.setattr(utils, "run_python", run_python)


def module_of(command):
    return experiments if command in experiments.EXPERIMENTS else evaluate


def evaluated(command, *flags, out):
    """One subcommand, run small -> its part of evaluation.json; its table is in evaluation.md."""
    module = module_of(command)
    few = [] if command == "tune" else ["--steps", 2]
    call(module, command, *flags, *few, "--out", out)
    result = evaluation(out, command)
    assert TABLES[command](result) in (out / "evaluation.md").read_text()
    assert result["made"]["command"].startswith(f"python {module.__name__}.py {command}")
    assert all(np.asarray(Image.open(image)).std() > 10 for image in out.glob("*.png"))
    return result


@pytest.fixture(scope="module")
def onehot_run(world, tmp_path_factory):
    """An adapter for the three rewards, hardly trained."""
    run = tmp_path_factory.mktemp("runs") / "onehot"
    run_train(world[1], run)
    return run


# -------------------------------------------------------------- the experiments, small
def test_table_1_and_figure_3(onehot_run, world, tmp_path, here, capsys):
    baselines = tmp_path / "baselines"
    flags = ["--adapter", onehot_run, "--baselines", baselines, "--n", 6]
    result = evaluated("rewards", *flags, out=tmp_path / "out")
    said = capsys.readouterr().out
    assert set(result["table_1"]) == set(METHODS)
    for row in result["table_1"].values():
        assert all(row[column]["n"] == 6 for column in ("light", "warm", "large", "fidelity"))
    for r in (rates["base"] for rates in result["figure_3"].values()):
        assert r.keys() == {"win_rate", "n", "ci95", "mean", "mean_other"} and r["n"] == 6
        assert r["ci95"][0] <= r["win_rate"] <= r["ci95"][1]
    assert set(result["figure_3"]["warm"]) == set(METHODS) - {"PPD"}
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {"rewards.png", "figure_3.png"}
    headers = {path.name: UserAdapter.load(path).header for path in baselines.iterdir()}
    assert headers.keys() == {"sft", "dpo", "dpo-light", "dpo-warm", "dpo-large"}
    same = UserAdapter.load(onehot_run).header["recipe"]
    for name, header in headers.items():
        assert header["objective"] == name[:3]
        assert header["step"] == 2 and header["recipe"] | dict(only=None) == same
    assert headers["dpo-warm"]["recipe"]["only"] == ["warm"]
    assert (baselines / "dpo" / "train.jsonl").read_text().splitlines()
    own, _ = read_pairs(world[1].with_name("users-own"))
    rows, _ = split_rows(read_rows(world[0]), 0.1, 0.25, 0.0)
    original = {row["ranking_id"]: row["preferred"] for row in rows}
    assert all(row["preferred"] == original[row["ranking_id"]] for row in own)
    assert {row["user"] for row in own} == {"own"}
    pairs, _ = read_pairs(world[1])  # dpo-warm's training reads that reward's alone
    n = sum(row["user"] == "warm" and row["split"] == "train" for row in pairs)
    assert f"{n} training pairs of 1 users" in said
    again = evaluated("rewards", *flags, out=tmp_path / "out")
    for r in (result, again):
        del r["made"]["seconds"]
    assert again == result
    assert "steps = " not in capsys.readouterr().out  # what is there is not trained again
    run_train(world[1], tmp_path / "other", "--beta", 3)
    said = refusal(evaluate, "rewards", "--adapter", tmp_path / "other", "--baselines", baselines)
    problem = "dpo: trained with beta .*, but .* is compared with 3.0; choose another --base"
    assert re.search(problem, said), said


def test_figure_4(onehot_run, tmp_path):
    result = evaluated("interpolate", "--adapter", onehot_run, "--n", 3, out=tmp_path)
    assert len(result["edges"]) == 6 and len(result["map"]) == 36
    assert all(len(edge["means"]) == 11 and edge["n"] == 3 for edge in result["edges"])
    assert all(sum(point["weights"].values()) == pytest.approx(1) for point in result["map"])
    at = {tuple(point["weights"].values()): point["means"] for point in result["map"]}
    edges = {(*edge["edge"], edge["reward"]): edge for edge in result["edges"]}
    along = edges["light", "large", "large"]["means"]
    assert along == [at[round(1 - w / 10, 10), 0, w / 10]["large"] for w in range(11)]


@pytest.mark.parametrize("with_profile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_figure_2(with_profile, tmp_path):
    data, users, after = (tmp_path / name for name in ("data", "users", "after"))
    call(drawn_world, "--out", data, "--users", 24, "--pairs", 90, "--seed", 3)
    no_splits = "--test-captions 0 --validation-captions 0 --unseen-users 0 --validation-users 0"
    how = ["--data", data, *no_splits.split(), "--groups", 13]
    flags = ["--users", users]
    layers = [f"prompt, layer {k}" for k in range(5)]
    call(embed, "--users", users, "--layer", "all", *how)
    if with_profile:
        call(embed, "--users", after, "--profile", *how)
        flags += ["--profile-users", after]
        layers.append("profile, layer -1")
    result = evaluated("classify", *flags, out=tmp_path / "out")
    assert list(result["states"]) == layers and 20 <= result["people"] <= 24
    for row in (*result["states"].values(), *result["ceilings"].values()):
        rates = [r["rate"] for r in row.values()]
        assert [r["n"] for r in row.values()] == [result["people"]] * 5 and sorted(rates) == rates
    best = {name: row["4"]["rate"] for name, row in result["ceilings"].items()}
    assert best["a perfect reader of the four choices"] <= best["the true taste"] + 0.1
    first, last = (result["states"][layers[k]]["4"]["rate"] for k in (0, 4))
    assert first == pytest.approx(result["chance"]["4"], abs=1e-4) and last > result["chance"]["4"]
    said = refusal(experiments, "classify", "--users", users, "--profile-users", users)
    assert "expected a user read after the profile from the same choices" in said


def test_classifier_on_what_can_and_cannot_be_told():
    rng = np.random.default_rng(0)

    def noise(n):
        return torch.tensor(rng.normal(size=(n, 8)), dtype=torch.float32)

    middle = noise(30)

    def near(n):
        return middle.repeat(n, 1) + 0.05 * noise(30 * n)

    owners = torch.arange(30).repeat(6)
    told = experiments.classifier(near(6), owners, near(1), near(1), 0)
    assert (told == 0).float().mean() > 0.9
    not_told = experiments.classifier(noise(180), owners, noise(30), noise(30), 0)
    assert not_told.float().mean() > 10  # chance is 14.5


def test_figure_6(people_run, tmp_path, here):
    flags = ["--adapter", people_run, "--baselines", tmp_path / "baselines", "--n", 6]
    result = evaluated("profiles", *flags, out=tmp_path / "out")
    assert len(result["arms"]) == 5
    assert all(r["n"] == 6 and r["fidelity"]["n"] == 6 for r in result["arms"].values())
    words = {word for text in result["profiles"].values() for word in text.split(", ")}
    assert words <= drawn_world.WORDS.keys()


def test_choices_small(people_run, tmp_path):
    result = evaluated("choices", "--adapter", people_run, "--n", 4, out=tmp_path)
    for r in (result["seen"], result["new_user"], result["new_taste"]):
        for arm in ("own", "zero", "other", "perfect_reader", "true_taste"):
            assert r[arm].keys() == {"rate", "n", "users", "ci95"} and r[arm]["n"] <= 4
        assert {"mean", "p", "mcnemar_p", "own_only", "other_only"} < r["own_over_zero"].keys()
        assert r["logit"]["noise"] > 0


def cross(tastes, z, base, zero):
    return evaluate.summarize_cross(*evaluate.cross_utilities(tastes, z, base, zero))


def test_what_is_personal_in_a_cross():
    """Images that only please the population have no personal part; those that please only their
    user have nothing else; whoever they are."""
    rng = np.random.default_rng(0)
    tastes = np.repeat(np.eye(5), 8, 0) * rng.choice([-1, 1], size=(40, 1))
    tastes[20:] = -tastes[:20]
    noise = 0.1 * rng.normal(size=(40, 16, 5))
    base = np.zeros((16, 5))
    alike = cross(tastes + np.eye(5)[0], noise + 2 * np.eye(5)[0], base, base + 2 * np.eye(5)[0])
    assert alike["population_gain"]["mean"] > 1.5
    low, high = alike["personal_gain"]["ci95"]
    assert low < 0 < high or abs(alike["personal_gain"]["mean"]) < 0.05
    assert alike["own_over_other"]["rate"] == pytest.approx(0.5, abs=0.05)
    assert alike["own_over_zero"]["rate"] == pytest.approx(0.5, abs=0.1)
    own = cross(tastes, noise + tastes[:, None], base, base)
    assert own["gain"]["mean"] == pytest.approx(1, abs=0.05)
    assert own["personal_gain"]["share"] > 0.95 and own["right_assignment"]["rate"] == 1
    assert own["own_over_other"]["rate"] > 0.95 and own["gain"]["n"] == 40
    same = cross(tastes.astype(np.float32), np.repeat(noise[:1], 40, 0), noise[0], noise[0])
    assert same["gain"]["mean"] == same["personal_gain"]["share"] == 0  # equal images are ties
    assert same["win_rate"]["rate"] == same["own_over_zero"]["rate"] == 0.5
    for r in own.values():
        assert r["ci95"][0] <= r.get("mean", r.get("rate")) <= r["ci95"][1]


def test_tune_reads_no_test_user_or_caption(people, tmp_path, here, monkeypatch):
    """Only validation users and captions: their files, their captions, the training pairs."""
    pairs, _ = read_pairs(people[1])
    tested = {row["user"] for row in pairs if row["split"] == "test-unseen"}
    captions = {row["caption"] for row in pairs if row["split"].startswith("test")}
    real_load, real_images = sample.load_user, sample.generate

    def load_user(path):
        assert path.stem not in tested, path
        return real_load(path)

    def generate(base, prompts, *args, **kwargs):
        assert not captions & set(prompts)
        return real_images(base, prompts, *args, **kwargs)

    for module in (data, sample, evaluate):
        monkeypatch.setattr(module, "load_user", load_user)
    monkeypatch.setattr(evaluate, "generate", generate)
    small = dict(beta=(1.0, 2.0), t_min=(0.85,), guidance=(2.0,), steps=(2,))
    monkeypatch.setattr(experiments, "TUNED", small)
    monkeypatch.setattr("bases.cascade.PatchCodec.default_steps", 2)
    monkeypatch.setitem(train.DEFAULTS["tiny"], "batch", 8)
    flags = ["--users", people[1], "--train-steps", 1, "--n", 3]
    result = evaluated("tune", *flags, out=tmp_path)
    assert len(result["tried"]) == 2 and result["chosen"] in [t["setting"] for t in result["tried"]]
    validation = {row["user"] for row in pairs if row["split"] == "validation-unseen"}
    assert set(result["users"]) <= validation and not set(result["captions"]) & captions
    monkeypatch.setattr(experiments, "CHANGES", {"default": "", "one token": "--tokens 1"})
    changes = evaluated("ablations", *flags, out=tmp_path)["changes"]
    assert list(changes) == ["default", "one token", "10 training users"]
    assert UserAdapter.load(tmp_path / "one-token").n_tokens == 1
    assert len(UserAdapter.load(tmp_path / "10-training-users").header["recipe"]["only"]) == 10
    monkeypatch.setattr(experiments, "COLLAPSE", {"loose": "--lr 0.1", "held": "--lr 0.1 --guard"})
    runs = evaluated("collapse", *flags, "--train-steps", 2, out=tmp_path)["runs"]
    assert UserAdapter.load(tmp_path / "held").header["recipe"]["guard"]
    for run in runs.values():
        assert [point["step"] for point in run["curve"]] == [1, 2]
        assert run["curve"][1]["preferred"] > run["curve"][0]["preferred"] > 0


def test_implicit_logits_are_eq_6_by_hand(people_run, people):
    rows = [row for row in read_pairs(people[1])[0] if row["split"] == "test-unseen"][:3]
    base = load_base("tiny")
    adapter = moved(UserAdapter.load(people_run).install(base.attention_layers()), std=0.05)
    images = ImagePairs(people[0], base.codec, rows)
    users = dict(a=torch.randn(3, 192), b=torch.zeros(3, 192))
    settings = (base, adapter, rows, images, users, 0.8)
    logits = rewards.implicit_logits(*settings, batch=50)
    alone = rewards.implicit_logits(*settings, batch=1)
    for arm, values in logits.items():
        assert values.shape == (3, 8) and (values != 0).all()
        assert torch.allclose(values, alone[arm], rtol=1e-3, atol=1e-3)
    k, row = 5, rows[1]
    x_0 = base.encode_pixels(images(row))
    noise = rewards.fixed_noise(row["ranking_id"], base.latent_shape)[k].expand(2, -1, -1, -1)
    t = torch.full((2,), 0.8 + 0.2 * (k + 0.5) / 8)
    conditions = base.encode_prompts([row["caption"]] * 2)
    with torch.no_grad():
        reference = base.predict(base.add_noise(x_0, noise, t), t, *conditions)
        with adapter.user(adapter(users["a"][1:2])):
            policy = base.predict(base.add_noise(x_0, noise, t), t, *conditions)
    _, log = ppd_loss(policy, reference, noise, beta=1.0)
    assert logits["a"][1, k].item() == pytest.approx(log["logits"].item(), rel=1e-2, abs=1e-3)


@pytest.mark.slow
def test_choices_among_emoji(tmp_path):
    """Real images by several artists: choices are predicted under the right artist's id."""
    if not shutil.which("npm"):
        pytest.skip("no npm here")
    ids, run = tmp_path / "ids", tmp_path / "run"
    done = script("tests/icons.py", "--out", tmp_path / "icons", "--ids", ids, check=False)
    if "npm" in done.stderr:
        pytest.skip(f"no packages here: {done.stderr[-200:]}")
    how = "--max-steps 100 --beta 1 --lr 1e-3 --t-min 0.2 --preview-every 0".split()
    script("train.py", "--users", ids, "--out", run, *how)
    call(evaluate, "choices", "--adapter", run, "--n", 400)
    found = evaluation(run, "choices")["seen"]
    assert found["own"]["rate"] > found["zero"]["rate"] > found["other"]["rate"]
    assert found["own_over_zero"]["mcnemar_p"] < 0.01


def test_choices_of_new_users_alone_make_a_table():
    """A data set may have no seen user with a held-out caption."""
    names = [str(i) for i in range(20)]
    right = {arm: np.arange(20) % 2.0 for arm in ("own", "zero", "other")}
    found = evaluate.summarize_choices(right, names) | dict(logit=dict(sd=1.0, noise=0.5, n=20))
    table = evaluate.choices_table(dict(new_user=found))
    assert "new, 20 choices of 20" in table and "own minus zero user" in table
    assert "perfect reader" not in table


def test_choices_are_compared_in_pairs():
    names = [str(i % 10) for i in range(200)]
    rng = np.random.default_rng(0)
    own = (rng.uniform(size=200) < 0.7).astype(float)
    zero = np.where(rng.uniform(size=200) < 0.8, own, 1 - own)
    zero[:40] = 0
    result = evaluate.summarize_choices(dict(own=own, zero=zero, other=own), names)
    assert result["own"]["rate"] == pytest.approx(own.mean(), abs=1e-4)
    assert result["own"]["users"] == 10 and result["own"]["n"] == 200
    assert result["own_over_zero"]["mean"] == pytest.approx((own - zero).mean(), abs=1e-4)
    assert result["own_over_zero"]["own_only"] == ((own == 1) & (zero == 0)).sum()
    assert result["own_over_other"]["mean"] == 0 and result["own_over_other"]["mcnemar_p"] == 1
    assert evaluate.mcnemar(1, 9) == pytest.approx(22 / 1024)  # scipy.stats.binomtest(1, 10)
    others = evaluate.other_users(names)
    assert all(names[i] != names[j] for i, j in enumerate(others))
    with pytest.raises(evaluate.InputError, match="2 choices, of fewer than two users; .*--n"):
        evaluate.other_users(["a", "a"])


def test_the_scripts_share_a_page(tmp_path, capsys):
    """evaluation.json and .md keep, word for word, what another script or hand has put there."""

    def report(command, value, table, **images):
        args = SimpleNamespace(out=str(tmp_path), device="cpu", command=command)
        args.made_by = f"python {module_of(command).__name__}.py {command}"
        args.began = 0
        evaluate.report(args, dict(value=value), table, images)

    page = tmp_path / "evaluation.md"
    by_hand = "Two  spaces, a | bar |.\n\n\n### deeper\n\n## no heading:\nno line between\n\t- end"
    page.write_text(f"## by hand\n\n{by_hand}\n")
    table = evaluate.markdown_table(["a", "b"], [[1, 2]])
    assert table == "| a | b |\n|---|---|\n| 1 | 2 |"
    report("people", 1, f"{table}\n\nA sentence.", image=Image.new("RGB", (9, 9), "red"))
    report("interpolate", 2, table)
    want = f"## by hand\n\n{by_hand}\n\n## people\n\n{table}\n\nA sentence.\n"
    assert page.read_text() == f"{want}\n## interpolate\n\n{table}\n"
    report("interpolate", 3, "other\n\ntext")
    assert page.read_text() == f"{want}\n## interpolate\n\nother\n\ntext\n"
    report("people", 4, f"{table}\n\nA sentence.")
    assert page.read_text() == f"{want}\n## interpolate\n\nother\n\ntext\n"  # in its place
    assert evaluation(tmp_path, "people")["value"] == 4
    last = evaluation(tmp_path, "interpolate")
    assert last["value"] == 3 and last["made"]["command"] == "python experiments.py interpolate"
    assert Image.open(tmp_path / "image.png").size == (9, 9)
    assert f"{tmp_path}/evaluation.md, {tmp_path}/image.png" in capsys.readouterr().out


def test_numbers():
    def spearman(scores):
        return experiments.spearman(np.arange(len(scores)), scores)

    rising = np.array([[1.0, 2.0], [2.0, 3.0], [3.0, 1.0], [4.0, 9.0]])
    # means 1.5, 2.5, 2, 6: one neighboring pair swapped
    assert spearman(rising)["spearman"] == pytest.approx(0.8)
    assert spearman(-np.arange(4)[:, None] * np.ones((4, 3)))["spearman"] == -1
    # what does nothing earns nothing
    assert spearman(np.zeros((11, 5))) == dict(spearman=0, n=5, ci95=[0, 0])
    tied = spearman(np.array([0, 1, 1, 1])[:, None] * np.ones((4, 2)))
    assert tied["spearman"] == pytest.approx(0.7746, abs=1e-4)  # scipy.stats.spearmanr
    m = evaluate.mean_ci([1, 2, 3, 4])
    half = 1.96 * np.sqrt(5 / 3) / 2
    assert m["mean"] == 2.5 and m["ci95"][1] - 2.5 == pytest.approx(half, abs=1e-3)
    assert evaluate.win_indicator([1, 2, 3], [1, 3, 2]).tolist() == [0.5, 0, 1]
    r = evaluate.compare([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 5.0, 1.0])
    assert r["win_rate"] == 0.625 and r["n"] == 4
    textbook = [pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4)]
    assert evaluate.wilson(0.5, 100) == textbook
    assert evaluate.wilson(1.0, 10) == [pytest.approx(0.7225, abs=1e-3), 1]


@pytest.mark.parametrize("bias", [False, True])
def test_bias_free_projector_makes_the_zero_user_the_base(bias):
    torch.manual_seed(0)
    adapter = UserAdapter(8, [16, 16], bias=bias)
    assert (adapter(adapter.mean[None]).abs().max() > 0) == bias
    assert any("bias" in key for key in adapter.state_dict()) == bias


# -------------------------------------------------------------------- what is shipped
def test_the_pages_show_the_results():
    """Every table row of the results' pages is one that the shipped numbers give, every shipped
    number is there, and README.md has none but those."""
    pages = {page.stem: page.read_text() for page in ROOT.glob("docs/*.md")}
    tables = TABLES | dict(common_0=evaluate.users_table)
    tables |= dict.fromkeys(("icons", "icons_vlm", "recipe"), evaluate.choices_table)
    assert set(RESULTS) == set(tables)
    rows = set()
    for name, table in tables.items():
        page = dict.fromkeys(("ablations", "recipe"), "choices") | dict(words="drawn-world")
        page = page.get(name, "results")
        text = pages[page]
        for line in table(RESULTS[name]).splitlines():
            if line.startswith("|"):
                assert line in text.splitlines(), f"{name}: docs/{page}.md lacks {line}"
                rows |= {line} if page == "results" else set()
            for number in re.findall(r"\d\.\d+ \(.*?\)", line):
                assert number in " ".join(text.split()), f"{name}: docs/{page}.md lacks {number}"
        command = RESULTS[name]["made"]["command"]
        assert re.search(re.escape(command) + r"(?= *$| +#| +&&)", text, re.MULTILINE), command
    shown = {line for line in pages["results"].splitlines() if line.startswith("|")}
    assert shown == rows
    readme = re.sub(r"^```.*?^```", "", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    for number in re.findall(r"[+-]?\b\d\.\d{2,3}\b", readme):
        assert any(number in text for text in pages.values()), f"README.md: {number}"


def test_claims_of_the_results():
    """What docs/results.md says of the tables, checked against the numbers."""
    r, means = RESULTS, RESULTS["rewards"]["table_1"]
    assert all(edge["spearman"] >= 0.95 and edge["n"] >= 64 for edge in r["interpolate"]["edges"])
    best = r["classify"]["states"]["prompt, layer 4"]["16"]
    assert best["ci95"][0] > 2 * r["classify"]["chance"]["16"]
    kept = [[r["users"]["base"], r["users"][kind]["fidelity"]] for kind in evaluate.KINDS]
    kept += [[means[method]["fidelity"] for method in ("base", "PPD")]]
    assert all(ours["rate"] >= base["rate"] - 0.05 for base, ours in kept)
    for reward in ("light", "warm", "large"):
        mean = {method: means[method][reward]["mean"] for method in METHODS}
        assert mean["base"] < mean["SFT"] < mean["PPD"] < mean[UPPER_BOUND]
        # Diffusion-DPO learns what the users share; elsewhere it is the base, as the page says
        low, high = means["Diffusion-DPO"][reward]["ci95"]
        assert (low <= mean["base"] <= high) == (reward != "light")


def test_a_shipped_adapter_scores_as_it_did():
    first = RESULTS["rewards"]["first"]
    held_out = [c for c in drawn_world.CAPTIONS if 0.1 <= hash_fraction("caption", c) < 0.35]
    prompts = sorted(held_out)[:12]
    seeds, base = range(10_000, 10_012), load_base("tiny")
    for method, folder, user in (
        ("PPD", "onehot", "assets/onehot/warm.pt"),
        (UPPER_BOUND, "onehot/dpo-warm", "zero"),
    ):
        adapter = UserAdapter.load(ROOT / "assets" / folder).install(base.attention_layers())
        vector = sample.load_user_embedding(adapter, user)
        images = sample.generate(base, prompts, seeds, adapter, vector)
        off = np.abs(rewards.score("warm", images, prompts) - first[method]["warm"])
        # another machine's arithmetic moves a pixel or two
        assert np.median(off) < 0.02 and off.max() < 0.3, off


@pytest.mark.slow
def test_a_cell_trained_again(tmp_path):
    """Table 1's Diffusion-DPO for `warm`, by the README's recipe: its mean is in the interval."""
    users, run = tmp_path / "users", tmp_path / "run"
    script("embed.py", "--one-hot", "light", "warm", "large", "--users", users)
    how = "--objective dpo --only warm --preview-every 0".split()
    script("train.py", "--users", users, "--out", run, *how)
    base = load_base("tiny")
    adapter = UserAdapter.load(run).install(base.attention_layers())
    pairs, _ = read_pairs(users)
    captions = sorted({row["caption"] for row in pairs if row["split"].startswith("test")})
    prompts = [captions[i % len(captions)] for i in range(200)]
    images = sample.generate(base, prompts, range(10_000, 10_200), adapter, adapter.mean[None])
    again = rewards.score("warm", images, prompts).mean()
    low, high = RESULTS["rewards"]["table_1"][UPPER_BOUND]["warm"]["ci95"]
    assert low < again < high
