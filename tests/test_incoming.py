"""Data, texts, images and numbers as they come from outside: the right value, or one line before
the costly part."""

import io
import json
import os
import re
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import bases.images
import data
import embed
import evaluate
import sample
import train
from bases import llava
from conftest import ROOT, call, evaluation, refusal, run_train, script, with_columns
from ppd import UserAdapter
from utils import InputError, run_script


def row(number, user="7", caption="a red star", label=1.0, **changes):
    fields = dict(ranking_id=number, user_id=user, caption=caption, file="f", row=0)
    fields |= {f"image_{k}_uid": f"{number}-{name}" for k, name in enumerate("ab")}
    return fields | dict(label_0=label, label_1=1 - label) | changes


def split(rows):
    return data.split_rows(rows, 0.1, 0.25, 0.25)


def problem(function, *args, **kwargs):
    """The message of the InputError that a call ends with."""
    with pytest.raises(InputError) as error:
        function(*args, **kwargs)
    return str(error.value)


# ------------------------------------------------------------------------------------- rows
def test_repeated_rows_are_dropped_and_counted():
    kept, dropped = split([row(1), row(2), row(1, row=9), row(2, label=0.5), row(1)])
    assert [r["ranking_id"] for r in kept] == [1, 2]
    assert dropped["repeated"] == 2 and dropped["tie or no choice"] == 1


@pytest.mark.parametrize("change", [dict(user="8"), dict(caption="a"), dict(image_1_uid="x")])
def test_an_id_of_two_choices_is_an_error(change):
    said = problem(split, [row(5), row(5, **change)])
    assert said.startswith("f row 0 and f row 0 are different choices of one rank")


@pytest.mark.parametrize("labels", [(0, 0), (1, 1), (0.5, 0.5), (None, None), (2, -1), (1, None)])
def test_rows_without_a_choice_are_dropped(labels):
    kept, dropped = split([row(1, label_0=labels[0], label_1=labels[1]), row(2)])
    assert [r["ranking_id"] for r in kept] == [2] and dropped["tie or no choice"] == 1


@pytest.mark.parametrize("key", ["ranking_id", "user_id", "caption"])
def test_rows_without_an_id_or_caption_are_dropped(key):
    kept, dropped = split([row(1, **{key: None}), row(2), row(3, user_id=""), row(4, caption="")])
    assert len(kept) == 1 and dropped["no id, caption or user"] == 3


def test_of_repeated_rows_the_one_that_is_split_is_found(tmp_path):
    write_rows(tmp_path / "a.parquet", [row(5, label=0.5), row(5), row(5, label=0.0), row(6)])
    kept, _ = split(data.read_rows(tmp_path))
    find = data.rows_by_id(tmp_path)
    assert [r["row"] for r in find([5, 6])] == [r["row"] for r in kept] == [1, 3]


def test_a_row_that_shares_an_image_with_train_is_dropped():
    seen = next(str(user) for user in range(100) if data.hash_fraction("user", user) >= 0.25)
    rows = [row(0, seen, "a red circle"), row(1, seen, image_0_uid="0-b"), row(2, seen)]
    kept, dropped = split(rows)
    assert [r["split"] for r in kept] == ["train", "test-seen"] and kept[1]["ranking_id"] == 2
    assert dropped["image also in train"] == 1


def test_images_without_ids_are_only_themselves():
    rows = [row(i, image_0_uid=None, image_1_uid=None, row=i) for i in range(3)]
    assert len({image for r in rows for image in data.image_ids(r)}) == 6
    assert len(split(rows)[0]) == 3


@pytest.mark.parametrize("same", ["caf\u00e9", "cafe\u0301", "CAF\u00c9", " caf\u00e9 "])
def test_captions_of_another_unicode_form_are_in_the_same_split(same):
    rows = [row(1, caption=same), row(2, caption="caf\u00e9")]
    (kept, plain), _ = data.split_rows(rows, 0.5, 0.0, 0.0)
    assert kept["split"] == plain["split"] and kept["caption"] == same


def write_rows(path, rows, **columns):
    """Rows as a parquet file with one small image a side."""
    table = {key: [r[key] for r in rows] for key in data.COLUMNS}
    table |= dict.fromkeys(("jpg_0", "jpg_1"), [png(0)] * len(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table | columns), path)


def test_what_is_no_data_is_passed_over(tmp_path):
    write_rows(tmp_path / "a.parquet", [row(1)])
    write_rows(tmp_path / ".hidden" / "b.parquet", [row(2)])
    (tmp_path / "._a.parquet").write_bytes(b"macOS")
    data.write_pairs(tmp_path, [row(3, file="a", user="u", split="train", preferred=0)], {})
    assert [r["ranking_id"] for r in data.read_rows(tmp_path)] == [1]


def test_ids_and_texts_of_other_types(tmp_path):
    rows = [row(i) for i in range(3)]
    big = pa.array([2**63 + i for i in range(3)], pa.uint64())
    write_rows(tmp_path / "a.parquet", rows, user_id=big)
    assert [r["user_id"] for r in data.read_rows(tmp_path)] == [str(i) for i in big.to_pylist()]
    write_rows(tmp_path / "a.parquet", rows, ranking_id=big)
    said = "column 'ranking_id' is missing or unusable; expected in"
    assert said in problem(data.read_rows, tmp_path)
    texts = pa.array([b"a red star", b"caf\xe9", "caf\u00e9".encode()], pa.binary())
    for column in ("caption", "user_id"):
        for kind in (texts, texts.view(pa.string())):  # declared as bytes, or wrongly as text
            write_rows(tmp_path / "a.parquet", rows, **{column: kind})
            read = data.read_rows(tmp_path)
            assert [r[column] for r in read] == ["a red star", None, "caf\u00e9"]


def test_nobody_with_five_pairs_is_said_before_the_vlm(tmp_path):
    write_rows(tmp_path / "data" / "a.parquet", [row(i, user=str(i // 4)) for i in range(40)])
    flags = ["--data", tmp_path / "data", "--users", tmp_path / "u", "--vlm", "nowhere"]
    said = "nobody has more than 4 choices to train on; expected 4 to read and one more"
    found = refusal(embed, *flags, "--test-captions", 0, "--unseen-users", 0)
    assert found == f"embed.py: error: --data {tmp_path / 'data'}: {said}"


@pytest.mark.parametrize("user", ["a b", "x@y.org", "../up", ".dot", "\u00fc/%", "a~b"])
def test_users_ids_become_file_names(user, tmp_path):
    name = embed.file_stem(user)
    assert "/" not in name and not name.startswith(".") and embed.file_stem(name) != "x"
    pair = row(1, split="train", preferred=0, groups=[0]) | dict(user=name)
    data.write_pairs(tmp_path, [pair], dict(data="d"))
    assert data.read_pairs(tmp_path)[0][0]["user"] == name
    assert "expected 200 at most" in problem(embed.file_stem, "u" * 201)


# --------------------------------------------------------------------------------- identity
@pytest.mark.parametrize("change", ["order", "uids"])
def test_data_rewritten_under_their_users_are_refused(change, world, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for file in world[0].glob("*.parquet"):
        table = pq.read_table(file)
        uids = [f"new-{uid}" for uid in table["image_0_uid"]]
        changed = dict(order=table[::-1], uids=with_columns(table, image_0_uid=uids))
        pq.write_table(changed[change], folder / file.name)
    flags = ["--users", world[1], "--data", folder, "--device", "cpu"]
    training = ["--out", tmp_path / "r", "--max-steps", 1, "--batch", 2]
    caching = ["--cache-latents", "--latents", tmp_path / "l"]
    said = "; embed the users of today's data|: latents of other data, without image"
    for module, more in ((train, training), (embed, caching)):
        assert re.search(said, refusal(module, *flags, *more))


def test_ids_of_another_type_are_the_same_ids(tmp_path):
    ids = dict(ranking_id=pa.array([1.0, 2.0]), image_0_uid=pa.array([b"x", b"y"]))
    write_rows(tmp_path / "a.parquet", [row(1), row(2)], **ids)
    for r in data.read_rows(tmp_path):
        assert len(bases.images.read_images(tmp_path, r)) == 2


def test_a_disk_that_is_gone_is_no_broken_image(tmp_path):
    write_rows(tmp_path / "a.parquet", [row(1), row(2)])
    first, second = data.read_rows(tmp_path)
    bases.images.read_images(tmp_path, first)
    bases.images.read_row_group.cache_clear()
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(bases.images.DataChanged, match="a.parquet row 1: cannot be read .FileNot"):
        bases.images.read_images(tmp_path, second)


class Broken(list):
    """Rows that cannot be read."""

    def __getitem__(self, i):
        raise bases.images.DataChanged(f"row {i} is another")


def test_an_error_in_a_worker_ends_the_run():
    def run(args):
        with data.loading(Broken(range(9)), batch_size=1, num_workers=2) as batches:
            list(batches)

    with pytest.raises(SystemExit) as stop:
        run_script("x.py", run, None)
    assert stop.value.code.endswith("DataChanged: row 0 is another")


def test_gathered_rows_are_the_same_rows(world, tmp_path, monkeypatch):
    wanted = data.read_rows(world[0])[5:700:7]
    monkeypatch.setattr(bases.images, "KEPT_ROW_GROUPS", 0)
    folder, found = bases.images.gather_rows(wanted, world[0], tmp_path)
    assert folder.parent == tmp_path and len(found) == len(wanted)
    read = bases.images.read_images
    assert all(read(folder, found[r["ranking_id"]]) == read(world[0], r) for r in wanted[::9])


def test_every_worker_reads_its_own_row_groups(world):
    sources = [(r, side) for r in data.read_rows(world[0])[:200] for side in (0, 1)]
    chunks = bases.images.chunk_images(world[0], sources, 16)
    stream = bases.images.ImageStream(chunks, world[0], len)
    for workers in (0, 2):
        with data.loading(stream, batch_size=None, num_workers=workers, collate_fn=tuple) as done:
            seen = Counter((s[0]["ranking_id"], s[1]) for chunk, _ in done for s in chunk)
        assert len(seen) == 400 and set(seen.values()) == {1}


# ---------------------------------------------------------------------------- other sets
def png(number):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (number * 37 % 256, number // 256, 80)).save(buffer, "PNG")
    return buffer.getvalue()


def write_pngs(folder, *names):
    """png(0), png(1) ... under these names."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))


def other_set(kind, root):
    """A replica of a public set's schema; how many choices and ties to expect."""
    rows = []
    if kind == "hpdv2":
        names = [f"{i:04d}.png" for i in range(48)]
        write_pngs(root / "test", *names)
        for i in range(96):
            left, right = (names[i // 8 * 4 + (i + k) % 4] for k in (0, 1))
            row = dict(prompt=f"caption {i // 8}", user_id=i % 4, pref=1 if i % 2 else -1)
            rows.append(row | dict(image_left_id=left, image_right_id=right))
        expected = 96, 0
    elif kind == "pamela":  # five ratings a caption: two pairs, one of them equal for even users
        for user in range(4):
            for i in range(60):
                row = dict(participant_id=f"P{user}", prompt=f"caption {i // 5}")
                row |= dict(rating=(5, 4, 4 - user % 2, 4 - user % 2, 1)[i % 5])
                rows.append(row | dict(image=dict(bytes=png(i), path=None)))
        expected = 12 * (2 * 1 + 2 * 2), 0
    else:
        for i in range(36):
            row = {f"images.image_{k}": dict(bytes=png(9 * i + k), path=None) for k in (1, 2)}
            answers = ["image_1", "image_2", "both_bad" if i % 6 == 0 else "image_1"]
            row |= {"preference.responses": answers, "prompt": f"caption {i % 12}"}
            rows.append(row | {"preference.responses.users": ["a", "b", "c d"]})
        expected = 108, 6
    pq.write_table(pa.Table.from_pylist(rows), root / "x.parquet")
    return expected


@pytest.mark.parametrize("kind", data.COLUMN_MAPS)
def test_other_sets_become_ours(kind, tmp_path, capsys):
    n_choices, n_ties = other_set(kind, tmp_path)
    data.convert_data(tmp_path, kind, tmp_path / "out")
    assert f"--columns {kind}: {n_choices} choices of " in capsys.readouterr().out
    rows = data.read_rows(tmp_path / "out")
    assert len(rows) == n_choices == len({r["ranking_id"] for r in rows})
    assert sum(r["label_0"] == 0.5 for r in rows) == n_ties
    if kind == "hpdv2":  # pref 1 is the left image
        first = bases.images.read_images(tmp_path / "out", rows[1])[0]
        assert rows[1]["label_0"] == 1 and first.getpixel((0, 0))[0] == 37


@pytest.mark.slow
@pytest.mark.parametrize("kind", data.COLUMN_MAPS)
def test_other_sets_train_and_predict(kind, tmp_path):
    source, users, run = (tmp_path / name for name in ("set", "users", "run"))
    source.mkdir()
    other_set(kind, source)
    shares = "--test-captions 0.3 --unseen-users 0 --validation-users 0 --batch 8".split()
    call(embed, "--data", source, "--columns", kind, "--users", users, *shares)
    run_train(users, run, "--max-steps", 20)
    call(evaluate, "choices", "--adapter", run, "--n", 12)
    assert evaluation(run, "choices")["seen"]["own"]["n"] == 12


def test_your_own_jsonl_and_wrong_maps(tmp_path):
    write_pngs(tmp_path, "0.png", "1.png", "2.png")
    lines = [dict(prompt="a", chosen="0.png", rejected=f"{i}.png", user_id="u") for i in (1, 2, 9)]
    text = "\ufeff" + "\n".join(map(json.dumps, lines))  # no newline at the end
    (tmp_path / "c.jsonl").write_text(text, encoding="utf-8")
    columns = "prompt=caption,chosen=preferred,rejected=dispreferred,user_id=user_id"
    data.convert_data(tmp_path, columns, tmp_path / "out")
    rows = data.read_rows(tmp_path / "out")
    assert len(rows) == 2 and {r["label_0"] for r in rows} == {1.0}  # of the third: no 9.png
    assert rows[0]["image_0_uid"] == rows[1]["image_0_uid"] != rows[0]["image_1_uid"]
    for wrong in ("pamella", "prompt=caption", columns + ",x=rating"):
        said = problem(data.convert_data, tmp_path, wrong, tmp_path / "out")
        assert re.match("--columns .*expected one of hpdv2, pamela, open", said)
    wrong = columns.replace("prompt", "text")
    said = "c.jsonl row 0: not the columns text, chosen, rejected"
    assert said in problem(data.convert_data, tmp_path, wrong, tmp_path / "out")
    data.convert_data(tmp_path / "c.jsonl", columns, tmp_path / "one")  # the file alone
    assert len(data.read_rows(tmp_path / "one")) == 2
    (tmp_path / "c.jsonl").write_bytes(b"\xff{")
    said = problem(data.convert_data, tmp_path, columns, tmp_path / "out")
    assert "c.jsonl: cannot be read" in said


def test_odd_records_of_other_sets(tmp_path, capsys):
    source, out = tmp_path / "set", tmp_path / "out"
    write_pngs(source, "a/0.png", "b/0.png")
    columns = "p=caption,u=user_id,l=image_0,r=image_1,pref=choice"

    def convert(**changes):
        record = dict(p="x", u=None, l="a/0.png", r="b/0.png", pref=1.0) | changes
        pq.write_table(pa.Table.from_pylist([record] * 150), source / "x.parquet")
        data.convert_data(source, columns, out)
        made = pq.ParquetFile(out / data.CONVERTED)
        return made.num_row_groups, made.read().to_pylist()

    n_groups, rows = convert()
    assert n_groups == 2 and len(rows) == 150 and rows[0]["label_0"] == 1
    assert rows[0]["user_id"] is None and rows[0]["jpg_0"] != rows[0]["jpg_1"]
    assert convert(pref="neither", u=7)[1][0]["label_0"] == 0.5
    assert convert(l="0.png")[1] == [] and "left out: " in capsys.readouterr().err  # which one?
    for wrong in (dict(pref=0), dict(p=5), dict(pref=[1, 0]), dict(u=["a", "b"])):
        assert "x.parquet row 0: " in problem(convert, **wrong)


# -------------------------------------------------------------------------- texts and images
def write_choices(folder, caption="a", times=1):
    """The same choice of one's own, several times -> me.jsonl."""
    write_pngs(folder, "0.png", "1.png")
    choice = dict(caption=caption, preferred="0.png", dispreferred="1.png")
    line = json.dumps(choice, ensure_ascii=False)
    (folder / "me.jsonl").write_bytes(("\ufeff" + "\r\n".join([line] * times)).encode())
    return folder / "me.jsonl"


def test_only_a_newline_ends_a_caption(tmp_path):
    odd = ["one\u2028two", "a\u0085b\x1cc", "\x0bd\x0ce"]
    text = "\ufeff" + "\r\n\n".join(odd) + "\n"
    (tmp_path / "p.txt").write_bytes(text.encode())
    assert sample.read_prompts(tmp_path / "p.txt") == [line.strip() for line in odd]
    quoted = '"quoted" one'  # quotation marks are letters like others
    table = f'\ufeffPrompt\tX\r\n{odd[0]}\ty\r\n{quoted}\t"z\r\ntwo\tx'
    (tmp_path / "p.tsv").write_bytes(table.encode())
    assert sample.read_prompts(tmp_path / "p.tsv") == [odd[0], quoted, "two"]
    choices = embed.read_own_choices(write_choices(tmp_path, odd[0], times=2))
    assert [shot[0] for shot in choices] == [odd[0]] * 2


def test_arguments_and_terminals_of_other_encodings(tmp_path):
    command = ["sample.py", "--steps", 1, "--out", tmp_path, "--prompt"]
    done = script(*command, os.fsdecode(b"caf\xe9"), check=False, PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and "error: 'caf\\udce9': not UTF-8" in done.stderr
    script(*command, "a caf\u00e9 \u661f", PYTHONIOENCODING="ascii")
    assert len(list(tmp_path.glob("*.png"))) == 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_deep_greys_keep_their_tones(kind, tmp_path):
    tones = np.linspace(0, 65535, 256).astype(np.uint16)
    grey = np.repeat(tones[None], 8, 0)
    path = tmp_path / "grey"
    Image.fromarray(grey).save(path, kind)
    shown = np.asarray(bases.images.open_image(path, "grey"))
    assert np.abs(shown[0, :, 0].astype(int) - np.arange(256)).max() <= 1
    assert (shown[..., 0] == shown[..., 2]).all()
    Image.fromarray(grey.astype(np.float32) / 65535).save(path, "TIFF")
    said = problem(bases.images.open_image, path, "grey")
    assert re.search("grey: not a usable image .*mode F", said)


def test_images_have_names_of_their_own(tmp_path):
    file = min((ROOT / "assets").glob("*/*.pt"))
    users = []
    for k in range(2):
        user = tmp_path / f"{'x' * 90}{k}" / ("y" * 90) / "u.pt"
        user.parent.mkdir(parents=True)
        user.write_bytes(file.read_bytes())
        users += ["--user", user]
    flags = ["--adapter", file.parent, "--steps", 1, "--out", tmp_path / "o"]
    call(sample, *users, *flags, "--prompt", "\u661f" * 300, "a" * 300)
    made = [p for p in (tmp_path / "o").glob("*.png") if p.name != "grid.png"]
    assert len(made) == 4 and all(len(os.fsencode(p.name)) < 255 for p in made)


def test_out_is_written_as_it_is_said(tmp_path):
    flags = ["--pairs", write_choices(tmp_path, times=13), "--out"]
    call(embed, *flags, tmp_path / "v1.5", "--groups", 2, "--batch", 1)
    assert data.load_user(tmp_path / "v1.5")["embedding"].shape == (2, 1, 192)
    assert not (tmp_path / "v1.pt").exists()


# ------------------------------------------------------------------------------------ judge
@pytest.mark.parametrize(
    "answer",
    ["CHOICE: 2", "**CHOICE:** 2", "choice - Picture 2.", "<b>CHOICE</b>: 2", "__CHOICE__ = **2**"]
    + ["\\boxed{CHOICE: 2}", "Not CHOICE: 1 but\nCHOICE:\n2", "CHOICE\uff1a2"],
)
def test_answers_in_any_markup(answer):
    assert evaluate.parse_verdict("CHOICE: 1", answer) == "ours"
    assert evaluate.parse_verdict("CHOICE: 12", answer) == "unparsable"


@pytest.mark.parametrize("key", ["secret\n", "two words", "caf\u00e9"])
def test_a_key_that_no_header_can_hold_stops_the_run(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    said = problem(llava.Endpoint, "https://host/v1", "m", 1)
    assert said.startswith("OPENAI_API_KEY: there is ") and "secret" not in said


class Refused(ValueError):
    status_code = 400


def test_a_model_of_one_temperature_and_content_in_parts(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    parts = [dict(type="reasoning", text="1?"), dict(type="text", text=" CHOICE: 2 ")]
    reply = SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=parts))])
    refused = [Refused("Unsupported value: 'temperature'"), Refused("rejected by content_policy")]
    create = mock.Mock(side_effect=[refused[0], reply, reply, refused[1]])
    endpoint = llava.Endpoint("https://host/v1", "m", 1)
    endpoint.client = mock.Mock(**{"chat.completions.create": create})
    question = (llava.build_vlm_prompt([], "judge", "a"), [Image.new("RGB", (9, 9))] * 2)
    answers = [endpoint.answer(*question) for _ in range(3)]
    assert answers == ["CHOICE: 2", "CHOICE: 2", ""]  # the policy's refusal: of these images alone
    asked = [call.kwargs for call in create.call_args_list]
    assert ["temperature" in settings for settings in asked] == [True, False, False, False]
    assert not any("max_tokens" in settings for settings in asked)


# ---------------------------------------------------------------------------------- numbers
def read_groups(captions, profile=False):
    """embed.read_groups() of users with a caption each."""
    groups = [dict(name=f"user {k}", captions=[c], pixels=None) for k, c in enumerate(captions)]
    return embed.read_groups(SimpleNamespace(batch=8, layer=-1, profile=profile), None, groups)


def test_what_is_not_finite_is_named(monkeypatch, capsys):
    base = sample.load_base("tiny")
    bad = torch.zeros(2, *base.latent_shape)
    bad[1, 0, 0, 0] = torch.nan
    said = problem(base.decode, bad, ["a", "b"], [3, 4])
    assert "the image of 'b', seed 4, is not finite" in said
    states = torch.zeros(2, 1, 8)
    states[1, 0, 3] = torch.inf
    monkeypatch.setattr(embed, "embed_users", lambda *a: (states, [None, None]))
    assert [g["name"] for g in read_groups(["a", "a"])] == ["user 0"]
    assert "user 1 is left out: its state is not finite" in capsys.readouterr().err


def test_long_captions_are_read_in_small_batches(monkeypatch):
    sizes = []

    def embed_users(vlm, groups, *a):
        sizes.append(len(groups))
        return torch.zeros(len(groups), 1, 8), [None] * len(groups)

    monkeypatch.setattr(embed, "embed_users", embed_users)
    assert len(read_groups(["x" * 100] * 3 + ["x" * 16000] + ["x" * 100] * 16)) == 20
    assert sizes == [1, 8, 8, 3]


def test_profiles_without_an_end_are_no_profiles(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embed, "embed_users", lambda *a: (torch.zeros(2, 1, 8), ["whole", None]))
    assert [g["text"] for g in read_groups(["a", "a"], profile=True)] == ["whole"]
    assert "user 1 is left out: its profile is empty or has no end" in capsys.readouterr().err
    texts = ["Pair 1: dark.\nUser profile: warm, large.", "Pair 1: dark and then"]
    for name, text in zip("ab", texts, strict=True):
        data.write_user(tmp_path / f"{name}.pt", embedding=torch.zeros(1, 1, 8), profile=[text])
    assert embed.load_profiles(tmp_path, ["a", "b"], None, "cpu") == ["warm, large", ""]
    assert "1 of 2 profiles are missing" in capsys.readouterr().err


def test_an_adapter_of_the_api_says_what_it_lacks(tmp_path):
    UserAdapter(3, [128] * 8).save(tmp_path / "adapter.safetensors")
    said = problem(evaluate.expected_recipe, UserAdapter.load(tmp_path), {})
    assert "its header has no recipe, train.py's settings" in said


def test_broken_scores_are_named(world, tmp_path):
    flags = ["--data", world[0], "--one-hot", "light", "--users", tmp_path / "u"]
    call(embed, *flags)
    (tmp_path / "u" / "pairs.parquet").unlink()
    file = sorted((tmp_path / "u" / "scores").glob("*.npz"))[0]
    file.write_bytes(file.read_bytes()[:50])
    assert f"{file}: not a file of scores; delete it" in refusal(embed, *flags)


def test_the_plan_is_what_rewards_accepts(world, tmp_path, capsys):
    flags = ["--adapter", "assets/onehot", "--users", world[1], "--baselines", tmp_path / "b"]
    call(evaluate, "rewards", *flags, "--plan", "--device", "cpu")
    plan = capsys.readouterr().out.splitlines()
    assert len(plan) == 6 and plan[0].startswith("python embed.py --data ")
    assert all(line.startswith("torchrun --nproc-per-node 8 train.py ") for line in plan[1:])
    assert all("--max-steps 200 " in line for line in plan[1:])
    for name, words in (("dpo", "--objective dpo"), ("dpo-warm", "--only warm")):
        assert [words in line for line in plan if f"/b/{name} " in line] == [True]
