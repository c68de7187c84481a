"""The drawn world: its checker, its rewards, its users, its data's schema, and the splits made of
it; and how its small checkpoints were trained."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import tiny.train
import tiny.world
from bases import llava, load_base
from bases.images import open_image
from conftest import call, script
from data import SPLITS, hash_fraction
from utils import TINY, InputError

VALIDATION = {"a red square", "an orange circle", "an orange heart", "a green diamond"}
VALIDATION |= {"a cyan triangle", "a blue cross", "a blue diamond", "a lime triangle"}
TEST = {"a red star", "a red ring", "an orange cross", "a yellow triangle", "a yellow cross"}
TEST |= {"a green triangle", "a green heart", "a cyan circle", "a cyan square", "a cyan heart"}
TEST |= {"a blue circle", "a blue heart", "a purple triangle", "a purple diamond"}
TEST |= {"a pink circle", "a lime square", "a lime star", "a lime cross"}
TEST |= {"a magenta diamond", "a magenta ring"}
PICK_A_PIC_COLUMNS = """are_different best_image_uid caption created_at has_label image_0_uid
image_0_url image_1_uid image_1_url jpg_0 jpg_1 label_0 label_1 model_0 model_1 ranking_id user_id
num_example_per_prompt __index_level_0__"""


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(123)
    captions = tiny.world.CAPTIONS * 13
    return [tiny.world.draw_random(rng, caption) for caption in captions], captions


# -------------------------------------------------------------------------- images and rewards
def test_checker_reads_drawn_images(drawn):
    images, captions = drawn
    assert np.mean(tiny.world.fidelity(images, captions)) >= 0.98
    wrong = captions[1:] + captions[:1]  # another shape, and now and then another color
    assert np.mean(tiny.world.fidelity(images, wrong)) <= 0.02
    assert tiny.world.recognize([Image.new("RGB", (32, 32), "gray")]) == [(None, None)]


def test_axes_are_what_the_table_says(drawn):
    z = (tiny.world.measure(drawn[0]) - tiny.world.MEAN) / tiny.world.STD
    assert np.abs(z.mean(0)).max() < 0.12 and np.abs(z.std(0) - 1).max() < 0.08
    assert np.array_equal(tiny.world.standardized(drawn[0]), z)


def test_rewards_move_with_what_they_name():
    still = dict(color="red", shape="circle")
    for name, less, more in (
        ("light", dict(light=0.3), dict(light=0.7)),
        ("warm", dict(warm=-0.1), dict(warm=0.1)),
        ("large", dict(size=0.4), dict(size=0.7)),
        ("right", dict(x=0.2), dict(x=0.8)),
        ("high", dict(y=0.8), dict(y=0.2)),
    ):
        images = [tiny.world.draw(**still, **setting) for setting in (less, more)]
        low, high = tiny.world.reward(name, images)
        assert high > low + 0.5, name
        opposite = tiny.world.AXES[name][1]
        assert np.allclose(tiny.world.reward(opposite, images[:1]), -low)


def test_smallest_subject_is_a_third_of_the_width(drawn):
    _, masks = tiny.world.segment(tiny.world.to_array(drawn[0]))
    sides = [max(np.flatnonzero(mask.any(axis)).size for axis in (0, 1)) for mask in masks]
    assert min(sides) >= 32 / 3 - 1  # the outermost column may be only faintly covered


# -------------------------------------------------------------------------------------- users
def test_users_are_sparse_and_like_light_mildly():
    tastes, words = tiny.world.draw_users(500, 3)
    own = tastes.copy()
    own[:, 0] -= tiny.world.SHARED_LIGHT_BIAS
    assert {len(w) for w in words} == {1, 2}
    assert np.allclose(np.linalg.norm(own, axis=1), 1, atol=1e-5)
    for taste, names in zip(own[:20], words[:20], strict=True):
        for axis, sign in (tiny.world.WORDS[name] for name in names):
            assert np.sign(taste[axis]) == sign


def axes_of(words):
    return tuple(sorted(tiny.world.WORDS[word][0] for word in words))


def test_new_tastes_are_new():
    """Of axes together that no known taste has, in continuous proportions."""
    known_tastes, known_words = tiny.world.draw_users(2000, 1)
    new_tastes, new_words = tiny.world.draw_users(2000, 2, is_new=lambda user: True)
    known, new = ({axes_of(words) for words in some} for some in (known_words, new_words))
    assert len(known) == 12 and new == set(tiny.world.NEW_PAIRS) and not known & new
    new_tastes[:, 0] -= tiny.world.SHARED_LIGHT_BIAS
    assert np.allclose(np.linalg.norm(new_tastes, axis=1), 1, atol=1e-5)
    assert len(np.unique(np.abs(new_tastes).round(4), axis=0)) > 1900
    known_tastes[:, 0] -= tiny.world.SHARED_LIGHT_BIAS
    nearest = np.abs(new_tastes[:200, None] - known_tastes[:500]).max(-1).min(1)
    assert nearest.min() > 0.2  # the smaller weight is at least sin 15 degrees
    assert {tiny.world.has_new_taste(user) for user in range(50)} == {True, False}


def test_without_a_common_taste(tmp_path):
    call(tiny.world, "--out", tmp_path / "d", "--users", 150, "--pairs", 8, "--common", 0)
    truth = json.loads((tmp_path / "d" / "people.json").read_text())
    assert truth["stats"]["common"] == 0
    assert 0.46 < truth["stats"]["lighter_wins"] < 0.54
    assert truth["new_taste"] == [tiny.world.has_new_taste(user) for user in range(150)]


def test_tastes_and_what_choices_tell():
    weights, named, odds = tiny.world.all_tastes()
    assert weights.shape == (38, 5) and named.shape == (38, 10) and odds.sum() == pytest.approx(1)
    tastes, words = tiny.world.draw_users(4000, 0)
    for some, taste in zip(words[:200], tastes[:200], strict=True):  # draw_users draws nothing else
        mentioned = [word in some for word in tiny.world.WORDS]
        assert np.allclose(weights[(named == mentioned).all(1)], taste, atol=1e-6)
    assert np.mean([len(some) == 1 for some in words]) == pytest.approx(0.5, abs=0.03)
    z = np.random.default_rng(0).normal(size=(3, 4, 2, 5))
    scale = tiny.world.BRADLEY_TERRY_SCALE
    for choices, posterior in zip(z, tiny.world.taste_posterior(z), strict=True):
        likely = []  # Bayes' rule, written out
        for taste, prior in zip(weights, odds, strict=True):
            chosen = [1 / (1 + np.exp(-scale * (taste @ (a - b)))) for a, b in choices]
            likely.append(prior * np.prod(chosen))
        assert np.allclose(posterior, np.array(likely) / sum(likely))


def test_what_choices_tell_of_new_tastes():
    """Their continuous posterior, against brute force: many users drawn, each weighed by how likely
    they would have chosen so."""
    z = np.random.default_rng(1).normal(size=(3, 4, 2, 5))
    drawn, _ = tiny.world.draw_users(40_000, 5, is_new=lambda user: True)
    gap = tiny.world.BRADLEY_TERRY_SCALE * (z[:, :, 0] - z[:, :, 1]) @ drawn.T
    likely = np.exp(-np.logaddexp(0, -gap).sum(1))
    brute = likely @ drawn / likely.sum(1, keepdims=True)
    weights, named, odds = tiny.world.all_tastes(new=True)
    assert named.sum(1).tolist() == [2] * len(weights) and odds.sum() == pytest.approx(1)
    posterior = tiny.world.taste_posterior(z, new=True)
    assert np.allclose(posterior.sum(1), 1)
    assert np.allclose(posterior @ weights, brute, atol=0.02)


# --------------------------------------------------------------------------- data and splits
def read_table(data):
    """Every row of a data folder, as dicts; created_at is no datetime that Python knows."""
    table = pq.read_table(sorted(data.glob("*.parquet")))
    assert table.column_names == PICK_A_PIC_COLUMNS.split()
    return table.drop_columns(["created_at"]).to_pylist()


def test_data_is_pick_a_pic_v2(world):
    data, _ = world
    rows = read_table(data)
    assert {row["label_0"] for row in rows} == {0, 0.5, 1}
    assert all(row["label_0"] + row["label_1"] == 1 for row in rows)
    images = {}
    for row in rows:
        for side in "01":
            content = row[f"jpg_{side}"]
            assert images.setdefault(row[f"image_{side}_uid"], content) == content  # one uid, one
    assert len(images) < 2 * len(rows)  # some winners stay on screen
    stats = json.loads((data / "people.json").read_text())["stats"]
    assert stats["agreement"] <= 0.90 and 0.55 <= stats["lighter_wins"] <= 0.65


def test_held_out_captions_are_fixed():
    splits = {caption: hash_fraction("caption", caption) for caption in tiny.world.CAPTIONS}
    assert {caption for caption, s in splits.items() if s < 0.1} == VALIDATION
    assert {caption for caption, s in splits.items() if 0.1 <= s < 0.35} == TEST
    assert len(splits) == 80 and len(TEST) == 20
    for words in (tiny.world.COLORS, tiny.world.SHAPES):
        assert all(any(word in caption for caption in TEST) for word in words)


def test_splits(world, people):
    data, users = people
    pairs = pq.read_table(users / "pairs.parquet").to_pylist()
    by_split = {split: [p for p in pairs if p["split"] == split] for split in SPLITS}
    assert all(by_split.values())
    rows = {row["ranking_id"]: row for row in read_table(data)}

    def shown(key, *splits):
        return {pair[key] for split in splits for pair in by_split[split]}

    def authors(*splits):
        return {rows[i]["user_id"] for i in shown("ranking_id", *splits)}

    def images(*splits):
        return shown("image_0_uid", *splits) | shown("image_1_uid", *splits)

    held_out = ("validation", "validation-unseen", "test-seen", "test-unseen")
    assert not shown("caption", "train") & (VALIDATION | TEST)
    assert shown("caption", "validation", "validation-unseen") <= VALIDATION
    assert shown("caption", "test-seen", "test-unseen") <= TEST
    trained = authors("train", "validation", "test-seen")
    tested, tuned = authors("test-unseen"), authors("validation-unseen")
    assert not tested & trained and not tuned & trained and not tested & tuned
    truth = json.loads((data / "people.json").read_text())
    new = {user for user, is_new in enumerate(truth["new_taste"]) if is_new}
    assert new & tested and not new & (trained | tuned)
    assert not images("train") & images(*held_out)
    relabeled = pq.read_table(world[1] / "pairs.parquet").to_pylist()
    assert {pair["split"] for pair in relabeled} == {"train", "validation", "test-seen"}
    for pair in relabeled[::37]:  # by the reward, from the images themselves
        row = rows[pair["ranking_id"]]
        both = [open_image(row[key], key) for key in ("jpg_0", "jpg_1")]
        first, second = tiny.world.reward(pair["user"], both)
        assert pair["preferred"] == int(second > first)
        assert pair["score_0"] == pytest.approx(float(first), abs=1e-6)


# --------------------------------------------------------------------------- the small base
def test_codec_is_nearly_lossless(drawn):
    base = load_base("tiny")
    images = drawn[0][:100]
    latents = base.encode_images(images)
    assert latents.shape == (100, 16, 8, 8) and 0.7 < latents.var() < 1.3
    decoded = base.decode(latents, [""] * 100, range(100))
    error = np.abs(tiny.world.to_array(decoded) - tiny.world.to_array(images))
    assert error.mean() < 0.015


def test_taste_words_steer_the_base():
    """Half of its captions carried them; experiments compare PPD with simply writing the taste into
    the prompt."""
    base = load_base("tiny")
    plain = sorted(TEST)
    seeds = range(len(plain))

    def generate(prompts):
        return base.decode(base.sample(prompts, seeds), prompts, seeds)

    before = generate(plain)
    for word in tiny.world.WORDS:
        worded = generate([f"{caption}, {word}" for caption in plain])
        moved = tiny.world.reward(word, worded) > tiny.world.reward(word, before)
        assert moved.mean() >= 0.9, word


def test_base_training(tmp_path):
    """The command that made tiny/checkpoints, for two steps; TORCHDYNAMO_DISABLE spares the
    compilation."""
    few = "--steps 2 --batch 4 --pictures 80 --width 64 --layers 1 1".split()
    script("-m", "tiny.train", "base", "--out", tmp_path, *few, TORCHDYNAMO_DISABLE="1")
    made, shipped = (
        {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path, TINY)
    )
    assert made == {name for name in shipped if not name.startswith("vlm")}
    base = load_base(tmp_path)
    config = base.prior.config
    assert base.latent_shape == (16, 8, 8)
    assert config.dropout == [0.1, 0.1] and config.switch_level == [False]
    assert torch.isfinite(base.sample(["a red star"], [0], steps=2)).all()


def assert_same_weights(folder, other):
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    for file in files:
        a, b = load_file(file), load_file(other / file.relative_to(folder))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), file


def test_base_training_resumes_exactly(tmp_path, monkeypatch):
    few = "base --steps 4 --batch 4 --pictures 80 --width 64 --layers 1 1 --save-every 1".split()
    whole, parts, more = (tmp_path / name for name in ("whole", "parts", "more"))

    def train(out, **settings):
        args = tiny.train.parse_args([*few, "--out", str(out)])
        tiny.train.run(SimpleNamespace(**vars(args) | settings))

    clip = torch.nn.utils.clip_grad_norm_
    calls = []

    def killed_in_the_third_step(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return clip(*args)

    with torch.compiler.set_stance("force_eager"):
        train(whole)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(torch.nn.utils, "clip_grad_norm_", killed_in_the_third_step)
            train(parts)
        assert torch.load(parts / "state.pt", weights_only=True)["step"] == 2
        train(parts)
        assert_same_weights(whole, parts)
        # --init goes on from a finished base: no step at rate 0 changes it
        train(more, steps=1, lr=0.0, seed=1, init=whole, lean=1.3)
        assert_same_weights(whole, more)
    with pytest.raises(InputError, match="finished base"):
        train(parts)


# ---------------------------------------------------------------------------- the small VLM
def test_what_the_small_vlm_learns_to_say_of_an_image():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(len(tiny.world.CAPTIONS), 30, 5))
    _, answers, shown, _ = tiny.train.make_examples(rng, z, 3, 4, "look")
    for answer, i in zip(answers, shown[:, 0], strict=True):
        axes = zip(tiny.world.AXIS_WORDS, z.reshape(-1, 5)[i], strict=True)
        assert answer == ", ".join(words[int(v < 0)] for words, v in axes) + "<|im_end|>"


@pytest.mark.parametrize("task", ["taste", "profile", "judge"])
def test_what_the_small_vlm_learns_to_say_of_a_user(task):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(len(tiny.world.CAPTIONS), 30, 5))
    weights, named, _ = tiny.world.all_tastes()
    examples = tiny.train.make_examples(rng, z, 20, 3, task)
    for text, answer, images, known in zip(*examples, strict=True):
        axes = z.reshape(-1, 5)[images].reshape(-1, 2, 5)
        posterior = tiny.world.taste_posterior(axes[None, :3])[0]
        assert text.count("<image>") == len(images)
        assert all(sum(some.values()) == pytest.approx(1) for some in known.values())
        if task == "judge":
            gap = tiny.world.BRADLEY_TERRY_SCALE * (axes[3, 0] - axes[3, 1]) @ weights.T
            first = posterior @ (1 / (1 + np.exp(-gap)))
            assert known[-2]["CHOICE: 1"] == pytest.approx(first)
            assert answer == f"CHOICE: {1 if first > 0.5 else 2}<|im_end|>"
        else:
            likeliest = np.argsort(-(posterior @ named))[:3]
            best = [list(tiny.world.WORDS)[i] for i in likeliest]
            assert answer.endswith(", ".join(best) + "<|im_end|>")
            assert [max(known[k], key=known[k].get) for k in (-6, -4, -2)] == best
            assert answer.count("Pair ") == (3 if task == "profile" else 0)


def test_vlm_training(tmp_path):
    """The command that made tiny/checkpoints/vlm, for two steps; then it reads a user."""
    few = "--steps 2 --batch 2 --pictures 80".split()
    script("-m", "tiny.train", "vlm", "--out", tmp_path, *few)
    made, shipped = ({p.name for p in f.iterdir()} for f in (tmp_path, TINY / "vlm"))
    assert made == shipped
    image = tiny.world.draw("red", "star")
    vlm = llava.load_vlm(str(tmp_path), "cpu")
    states, _ = llava.embed_users(vlm, [[("a red star", image, image)] * 4])
    assert states.shape == (1, 1, 192) and states.isfinite().all()
