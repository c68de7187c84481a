"""The drawn world: its checker, its rewards, its people, its data's schema, and the splits made of it."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import script
from PIL import Image
from safetensors.torch import load_file

import embed
import tiny
from ppd import StableCascade

VALIDATION = {"a red cross", "a blue star", "a pink circle", "a pink star"}
TEST = {
    "a red star",
    "an orange circle",
    "a yellow square",
    "a green circle",
    "a cyan cross",
    "a blue cross",
    "a purple triangle",
    "a pink square",
}


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(123)
    captions = tiny.CAPTIONS * 25
    return [tiny.draw_random(rng, c) for c in captions], captions


def test_checker_reads_drawn_pictures(drawn):
    images, captions = drawn
    assert np.mean(tiny.fidelity(images, captions)) >= 0.98
    wrong = captions[1:] + captions[:1]  # another shape, and now and then another colour
    assert np.mean(tiny.fidelity(images, wrong)) <= 0.02
    assert tiny.recognise([Image.new("RGB", (32, 32), "gray")]) == [(None, None)]


def test_axes_are_what_the_table_says(drawn):
    z = (tiny.measure(drawn[0]) - tiny.MEAN) / tiny.STD
    assert np.abs(z.mean(0)).max() < 0.12 and np.abs(z.std(0) - 1).max() < 0.08


def test_rewards_move_with_what_they_name():
    still = dict(colour="red", shape="circle")
    for name, less, more in (
        ("light", dict(light=0.3), dict(light=0.7)),
        ("warm", dict(warm=-0.1), dict(warm=0.1)),
        ("large", dict(size=0.4), dict(size=0.7)),
        ("right", dict(x=0.2), dict(x=0.8)),
        ("high", dict(y=0.8), dict(y=0.2)),
    ):
        low, high = tiny.reward(name, [tiny.draw(**still, **less), tiny.draw(**still, **more)])
        assert high > low + 0.5, name
        opposite = tiny.AXES[name][1]
        assert np.allclose(tiny.reward(opposite, [tiny.draw(**still, **less)]), -low)


def test_smallest_subject_is_a_third_of_the_width(drawn):
    _, masks = tiny.subject(tiny.pixels(drawn[0]))
    widths = [np.flatnonzero(m.any(0)).size for m in masks]
    assert min(widths) >= 32 / 3 - 1  # the outermost column may be only faintly covered


def test_people_are_sparse_and_like_light_mildly():
    tastes, words = tiny.people(500, 3)
    own = tastes.copy()
    own[:, 0] -= tiny.COMMON
    assert {len(w) for w in words} == {1, 2} and np.allclose(
        np.linalg.norm(own, axis=1), 1, atol=1e-5
    )
    for taste, names in zip(own[:20], words):
        assert all(np.sign(taste[tiny.WORDS[n][0]]) == tiny.WORDS[n][1] for n in names)


def test_data_is_pick_a_pic_v2(world):
    data, _ = world
    table = pq.read_table(sorted(data.glob("*.parquet")))
    assert table.column_names == [
        "are_different",
        "best_image_uid",
        "caption",
        "created_at",
        "has_label",
        "image_0_uid",
        "image_0_url",
        "image_1_uid",
        "image_1_url",
        "jpg_0",
        "jpg_1",
        "label_0",
        "label_1",
        "model_0",
        "model_1",
        "ranking_id",
        "user_id",
        "num_example_per_prompt",
        "__index_level_0__",
    ]
    rows = table.drop_columns(["created_at"]).to_pylist()
    assert {r["label_0"] for r in rows} == {0, 0.5, 1} and all(
        r["label_0"] + r["label_1"] == 1 for r in rows
    )
    assert len({u for r in rows for u in (r["image_0_uid"], r["image_1_uid"])}) < 2 * len(
        rows
    )  # some winners stay on screen
    images = {}
    for r in rows:
        for k in "01":
            assert (
                images.setdefault(r[f"image_{k}_uid"], r[f"jpg_{k}"]) == r[f"jpg_{k}"]
            )  # one uid, one picture
    stats = json.loads((data / "people.json").read_text())["stats"]
    assert stats["agreement"] <= 0.90 and 0.55 <= stats["lighter_wins"] <= 0.65


def test_held_out_captions_are_fixed():
    splits = {c: embed.share("caption", c) for c in tiny.CAPTIONS}
    assert {c for c, s in splits.items() if s < 0.1} == VALIDATION
    assert {c for c, s in splits.items() if 0.1 <= s < 0.3} == TEST


def test_splits(world):
    data, users = world
    pairs = pq.read_table(users / "pairs.parquet").to_pylist()
    by = {s: [p for p in pairs if p["split"] == s] for s in embed.SPLITS}
    assert all(by.values())
    assert not {p["caption"] for p in by["train"]} & (VALIDATION | TEST)
    assert {p["caption"] for p in by["validation"]} <= VALIDATION
    assert {p["caption"] for p in by["test-seen"] + by["test-unseen"]} <= TEST
    rows = {
        r["ranking_id"]: r
        for r in pq.read_table(sorted(data.glob("*.parquet")))
        .drop_columns(["created_at"])
        .to_pylist()
    }
    people = lambda split: {rows[p["ranking_id"]]["user_id"] for p in by[split]}
    assert not people("test-unseen") & (
        people("train") | people("validation") | people("test-seen")
    )
    images = lambda split: {p[k] for p in by[split] for k in ("image_0_uid", "image_1_uid")}
    assert not images("train") & (
        images("validation") | images("test-seen") | images("test-unseen")
    )
    for p in pairs[::37]:  # relabelled by the reward, from the pictures themselves
        r = rows[p["ranking_id"]]
        first, second = tiny.reward(
            p["user"], [embed.open_image(r[k], k) for k in ("jpg_0", "jpg_1")]
        )
        assert p["preferred"] == int(second > first) and p["score_0"] == pytest.approx(
            float(first), abs=1e-6
        )


def test_a_row_that_shares_a_picture_with_train_is_dropped():
    seen = next(u for u in range(100) if embed.share("user", u) >= 0.25)
    row = lambda i, caption, a, b: dict(
        ranking_id=i,
        user_id=seen,
        caption=caption,
        image_0_uid=a,
        image_1_uid=b,
        label_0=1.0,
        file="f",
        row=i,
    )
    rows = [
        row(0, "a red circle", "a", "b"),
        row(1, "a red star", "b", "c"),
        row(2, "a red star", "d", "e"),
        row(3, "a red circle", "f", "g") | dict(label_0=0.5),
    ]
    kept, dropped = embed.split_rows(rows, 0.1, 0.2, 0.25)
    assert (
        [r["ranking_id"] for r in kept] == [0, 2]
        and dropped["image also in train"] == 1
        and dropped["tie or no label"] == 1
    )


def test_codec_is_nearly_lossless(drawn):
    base = StableCascade("tiny")
    latents = base.encode_images(drawn[0][:100])
    assert latents.shape == (100, 16, 8, 8) and 0.7 < latents.var() < 1.3
    error = np.abs(
        tiny.pixels(base.decode(latents, [""] * 100, range(100))) - tiny.pixels(drawn[0][:100])
    )
    assert error.mean() < 0.015


def test_base_training(tmp_path):
    """The command that made assets/tiny, for two steps; TORCHDYNAMO_DISABLE spares the compilation."""
    few = [
        "tiny.py",
        "base",
        "--out",
        tmp_path,
        "--steps",
        2,
        "--batch",
        4,
        "--pictures",
        80,
        "--width",
        64,
        "--layers",
        1,
        1,
    ]
    script(*few, TORCHDYNAMO_DISABLE="1")
    made, shipped = (
        {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        for folder in (tmp_path, tiny.Path("assets/tiny"))
    )
    assert made == {name for name in shipped if not name.startswith("vlm")}
    base = StableCascade(tmp_path)
    assert (
        base.latent_shape == (16, 8, 8)
        and base.prior.config.dropout == [0.1, 0.1]
        and base.prior.config.switch_level == [False]
    )
    assert torch.isfinite(base.sample(["a red star"], [0], steps=2)).all()


def test_base_training_resumes_exactly(tmp_path, monkeypatch):
    few = dict(
        steps=4, batch=4, lr=1e-3, seed=0, pictures=80, width=64, layers=(1, 1), save_every=1
    )
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def killed_in_the_third_step(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return clip(*args)

    with torch.compiler.set_stance("force_eager"):
        tiny.train_base(tmp_path / "whole", **few)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(torch.nn.utils, "clip_grad_norm_", killed_in_the_third_step)
            tiny.train_base(tmp_path / "parts", **few)
        assert torch.load(tmp_path / "parts" / "state.pt", weights_only=True)["step"] == 2
        tiny.train_base(tmp_path / "parts", **few)
    for file in sorted((tmp_path / "whole").rglob("*.safetensors")):
        a, b = load_file(file), load_file(tmp_path / "parts" / file.relative_to(tmp_path / "whole"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), file
    with torch.compiler.set_stance(
        "force_eager"
    ):  # --init goes on from a finished base: no step at rate 0 changes it
        tiny.train_base(
            tmp_path / "more",
            **few | dict(steps=1, lr=0.0, seed=1),
            init=tmp_path / "whole",
            lean=1.3,
        )
    for file in sorted((tmp_path / "whole").rglob("*.safetensors")):
        a, b = load_file(file), load_file(tmp_path / "more" / file.relative_to(tmp_path / "whole"))
        assert all(torch.equal(a[k], b[k]) for k in a), file
    with pytest.raises(SystemExit, match="finished base"):
        tiny.train_base(tmp_path / "parts", **few)


def test_taste_words_steer_the_base():
    """A third of its captions carried them; experiments compare PPD with simply writing the taste into the prompt."""
    base, plain = StableCascade("tiny"), sorted(TEST) * 2
    before = base.decode(base.sample(plain, range(16)), plain, range(16))
    for word in (
        "light",
        "dark",
        "warm",
        "cool",
        "large",
        "small",
    ):  # those of place are followed weakly
        asked = [f"{caption}, {word}" for caption in plain]
        worded = base.decode(base.sample(asked, range(16)), asked, range(16))
        assert (tiny.reward(word, worded) - tiny.reward(word, before)).mean() > 0.5, word


def test_tastes_and_what_choices_tell():
    weights, named, odds = tiny.all_tastes()
    assert weights.shape == (50, 5) and named.shape == (50, 10) and odds.sum() == pytest.approx(1)
    tastes, words = tiny.people(4000, 0)
    for some, taste in zip(words[:200], tastes):  # people() draws nothing else
        assert np.allclose(
            weights[(named == [w in some for w in tiny.WORDS]).all(1)], taste, atol=1e-6
        )
    assert np.mean([len(some) == 1 for some in words]) == pytest.approx(0.5, abs=0.03)
    z = np.random.default_rng(0).normal(size=(3, 4, 2, 5))
    for person, belief in zip(z, tiny.believe(z)):  # Bayes' rule, written out
        likely = [
            odds[h]
            * np.prod([1 / (1 + np.exp(-tiny.CHOICE * (weights[h] @ (a - b)))) for a, b in person])
            for h in range(50)
        ]
        assert np.allclose(belief, np.array(likely) / sum(likely))


def test_lessons_of_the_small_vlm():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(len(tiny.CAPTIONS), 30, 5))
    _, answers, shown, _ = tiny.lesson(rng, z, 3, 4, "look")
    for answer, i in zip(answers, shown[:, 0]):
        assert (
            answer
            == ", ".join(a[int(v < 0)] for a, v in zip(tiny.WORD, z.reshape(-1, 5)[i]))
            + "<|im_end|>"
        )
    for ask in ("taste", "profile", "judge"):
        texts, answers, shown, odds = tiny.lesson(rng, z, 20, 3, ask)
        for text, answer, pictures, known in zip(texts, answers, shown, odds):
            axes = z.reshape(-1, 5)[pictures].reshape(-1, 2, 5)
            belief, (weights, named, _) = tiny.believe(axes[None, :3])[0], tiny.all_tastes()
            assert text.count("<image>") == len(pictures) and all(
                sum(some.values()) == pytest.approx(1) for some in known.values()
            )
            if ask == "judge":
                first = belief @ (
                    1 / (1 + np.exp(-tiny.CHOICE * (axes[3, 0] - axes[3, 1]) @ weights.T))
                )
                assert (
                    known[-2]["CHOICE: 1"] == pytest.approx(first)
                    and answer == f"CHOICE: {1 if first > 0.5 else 2}<|im_end|>"
                )
            else:
                best = [list(tiny.WORDS)[i] for i in np.argsort(-(belief @ named))[:3]]
                assert (
                    answer.endswith(", ".join(best) + "<|im_end|>")
                    and [max(known[k], key=known[k].get) for k in (-6, -4, -2)] == best
                )
                assert answer.count("Pair ") == (3 if ask == "profile" else 0)


def test_vlm_training(tmp_path):
    """The command that made assets/tiny/vlm, for two steps; then it reads a person."""
    script("tiny.py", "vlm", "--out", tmp_path, "--steps", 2, "--batch", 2, "--pictures", 80)
    assert {p.name for p in tmp_path.iterdir()} == {
        p.name for p in tiny.Path("assets/tiny/vlm").iterdir()
    }
    picture = tiny.draw("red", "star")
    states, _ = embed.read_people(
        embed.load_vlm(str(tmp_path), "cpu"), [[("a red star", picture, picture)] * 4]
    )
    assert states.shape == (1, 1, 192) and states.isfinite().all()
