"""Wrong and hostile input to the five scripts: one line that names what is wrong, no traceback, nothing left behind."""

import json
import shutil
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, script
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_method import Evil

import embed
import evaluate
import ppd
import sample
import tiny
import train

# script, arguments, and its whole line after "<script>.py: error: ", or, before "...", how it begins: what follows is a library's own words.
# {w}: the folder that `bad` makes, {u}: a good users folder
BAD = [
    (
        "embed",
        "--one-hot lihgt",
        "--one-hot lihgt: no such reward; choose from clip aesthetic hps hps2.0 pickscore light dark warm cool large small right left high low own",
    ),
    ("embed", "--one-hot light light", "--one-hot: a reward is named twice"),
    (
        "embed",
        "--one-hot light --data {w}/nowhere --users {w}/a",
        "--data {w}/nowhere: no such folder. Pick-a-Pic's original is gone from the hub: give your own copy's parquet folder",
    ),
    (
        "embed",
        "--one-hot light --data {w}/empty --users {w}/a",
        "--data {w}/empty: no .parquet file in that folder; expected Pick-a-Pic v2's own layout",
    ),
    (
        "embed",
        "--one-hot light --data {w}/torn --users {w}/a",
        "{w}/torn/d.parquet: not a readable parquet file (...",
    ),
    (
        "embed",
        "--one-hot light --data {w}/columns --users {w}/a",
        "{w}/columns/d.parquet: column 'user_id' is missing; expected Pick-a-Pic v2's columns",
    ),
    (
        "embed",
        "--one-hot light --data {w}/ids --users {w}/a",
        "{w}/ids/d.parquet: column 'user_id' is of type string; expected an integer",
    ),
    (
        "embed",
        "--one-hot light --data {w}/paths --users {w}/a",
        "{w}/paths/d.parquet: column 'jpg_0' is of type string; expected bytes",
    ),
    (
        "embed",
        "--one-hot light --data {w}/ties --users {w}/a",
        "--data {w}/ties: no pair is left to train on",
    ),
    (
        "embed",
        "--one-hot light --test-captions 2 --users {w}/a",
        "--test-captions 2.0: expected a share in [0, 1)",
    ),
    (
        "embed",
        "--one-hot light --users {u}",
        "--users {u} holds users made with another --data; choose another folder",
    ),
    (
        "embed",
        "--data no/such --users {w}/a",
        "--data no/such: no such folder here, and no such dataset on the hub (...",
    ),
    ("embed", "--layer last --users {w}/a", "--layer last: expected a number or all"),
    (
        "embed",
        "--vlm {w}/novlm --pairs {w}/four.jsonl --out {w}/a.pt",
        "--vlm {w}/novlm: no {w}/novlm/config.json; expected 'tiny', a hub id or a folder in its layout",
    ),
    ("embed", "--pairs {w}/me.jsonl", "--pairs JSONL and --out FILE.pt go together"),
    (
        "embed",
        "--pairs {w}/me.jsonl --out {w}/a.pt",
        "--pairs {w}/me.jsonl: not a readable text file",
    ),
    (
        "embed",
        "--pairs {w}/three.jsonl --out {w}/a.pt",
        "{w}/three.jsonl: 3 choices; expected at least 4",
    ),
    (
        "embed",
        "--pairs {w}/keys.jsonl --out {w}/a.pt",
        '{w}/keys.jsonl line 1: expected {{"caption": "...", "preferred": "image file", "dispreferred": "image file"}}',
    ),
    (
        "embed",
        "--pairs {w}/nested.jsonl --out {w}/a.pt",
        '{w}/nested.jsonl line 1: expected {{"caption": "...", "preferred": "image file", "dispreferred": "image file"}}',
    ),
    (
        "embed",
        "--pairs {w}/nopicture.jsonl --out {w}/a.pt",
        "{w}/nopicture.jsonl line 1: b.png: not a usable image (...",
    ),
    (
        "embed",
        "--pairs {w}/halfpicture.jsonl --out {w}/a.pt",
        "{w}/halfpicture.jsonl line 1: torn.png: not a usable image (...",
    ),
    (
        "embed",
        "--pairs {w}/bomb.jsonl --out {w}/a.pt",
        "{w}/bomb.jsonl line 4: bomb.png: not a usable image (DecompressionBomb...",
    ),
    (
        "embed",
        "--pairs {w}/program.jsonl --out {w}/a.pt",
        "{w}/program.jsonl line 1: program.eps: not a usable image (...",
    ),
    (
        "embed",
        "--cache-latents --users {w}/nowhere",
        "--users {w}/nowhere: no pairs.parquet there; run embed.py first",
    ),
    (
        "embed",
        "--cache-latents --users {w}/other --device cpu",
        "{w}/other/latents/00000.safetensors: latents of another encoder, another's and not ...",
    ),
    (
        "embed",
        "--cache-latents --users {w}/shard --device cpu",
        "{w}/shard/latents/00000.safetensors: not a shard of latents (...",
    ),
    (
        "embed",
        "--cache-latents --users {u} --base {w}/nowhere --device cpu",
        "--base {w}/nowhere: no folder {w}/nowhere/prior; expected 'tiny', a hub id or a folder with prior, text_encoder and tokenizer in it",
    ),
    ("embed", "--cache-latents --users {u} --workers -1", "--workers -1: expected 0 or more"),
    ("embed", "--cache-latents --users {u} --grid 0", "--grid 0: expected 1 or more"),
    (
        "embed",
        "--cache-latents --users {u} --base {w}/zerobase",
        "{w}/zerobase/codec/codec.safetensors: not a codec of tiny.py (...",
    ),
    (
        "embed",
        "--cache-latents --users {u} --data {w}/empty --device cpu",
        "--data {w}/empty: no file train-00000-of-00002.parquet there; give the folder that embed.py read",
    ),
    (
        "train",
        "--users {w}/nowhere",
        "--users {w}/nowhere: no pairs.parquet there; run embed.py first",
    ),
    (
        "train",
        "--users {w}/nopairs --out {w}/r",
        "{w}/nopairs/pairs.parquet: not a pairs file of embed.py (...",
    ),
    (
        "train",
        "--users {w}/tornpairs --out {w}/r",
        "{w}/tornpairs/pairs.parquet: not a pairs file of embed.py (...",
    ),
    (
        "train",
        "--users {w}/climb --out {w}/r",
        "{w}/climb/pairs.parquet: user '../light'; expected a name of letters, digits, '.', '_' and '-'",
    ),
    (
        "train",
        "--users {w}/outside --out {w}/r",
        "{w}/outside/pairs.parquet: file '../d.parquet'; expected one inside the data folder",
    ),
    (
        "train",
        "--users {w}/groups --out {w}/r",
        "--users {w}/groups: pairs.parquet wants groups [7] of light.pt, which has 1",
    ),
    (
        "train",
        "--users {w}/words --out {w}/r",
        "{w}/words/pairs.parquet: column 'groups' is missing, or not integers everywhere",
    ),
    (
        "train",
        "--users {w}/numbers --out {w}/r",
        "{w}/numbers/pairs.parquet: column 'caption' is missing, or not a string everywhere",
    ),
    (
        "train",
        "--users {w}/negative --out {w}/r",
        "{w}/negative/pairs.parquet: pair 4: expected preferred 0 or 1, and no negative row or group",
    ),
    (
        "train",
        "--users {w}/nothing --out {w}/r",
        "--users {w}/nothing: pairs.parquet has no pair to train on",
    ),
    (
        "train",
        "--users {w}/evil --out {w}/r",
        "{w}/evil/large.pt: refused, not a plain user file (...",
    ),
    (
        "train",
        "--users {w}/tornuser --out {w}/r",
        "{w}/tornuser/light.pt: refused, not a plain user file (...",
    ),
    (
        "train",
        "--users {w}/lost --out {w}/r",
        "{w}/lost/warm.pt: no such user file; embed.py writes them",
    ),
    (
        "train",
        "--users {w}/mixed --out {w}/r",
        "--users {w}/mixed: people of different widths or readers: (3, 'a', None, False) and (3, 'b', None, False); expected one",
    ),
    (
        "train",
        "--users {w}/nan --out {w}/r",
        "{w}/nan/large.pt: expected a dict whose 'embedding' is a finite float32 tensor (groups, states, dim)",
    ),
    (
        "train",
        "--users {w}/shard --out {w}/r",
        "{w}/shard/latents/00000.safetensors: not a shard of latents (...",
    ),
    (
        "train",
        "--users {w}/gap --out {w}/r",
        "{w}/gap/latents/00000.safetensors: this shard is missing; run embed.py --cache-latents again, it goes on where it stopped",
    ),
    (
        "train",
        "--users {w}/other --out {w}/r",
        "{w}/other/latents/00000.safetensors: latents of another encoder, another's and not ...",
    ),
    (
        "train",
        "--users {w}/bytes --out {w}/r",
        "{w}/bytes/latents/00000.safetensors: latents of another dtype, U8 and not F32; delete {w}/bytes/latents and cache them again, or train without",
    ),
    (
        "train",
        "--users {u} --only nobody --out {w}/r",
        "--only nobody: no such training user in {u}",
    ),
    (
        "train",
        "--users {u} --data {w}/empty --out {w}/r",
        "--data {w}/empty: no file train-00000-of-00002.parquet there; give the folder that embed.py read",
    ),
    (
        "train",
        "--users {u} --batch 10 --micro 4 --out {w}/r",
        "--batch 10: expected a multiple of --micro x processes = 4",
    ),
    ("train", "--users {u} --beta 0 --out {w}/r", "--beta 0.0: expected a number above 0"),
    ("train", "--users {u} --lr nan --out {w}/r", "--lr nan: expected a number above 0"),
    ("train", "--users {u} --seed -1 --out {w}/r", "--seed -1: expected 0 or more"),
    (
        "train",
        "--users {u} --user-drop 2 --out {w}/r",
        "--user-drop 2.0: expected a share in [0, 1]",
    ),
    (
        "train",
        "--users {u} --device cuda --out {w}/r",
        "--device cuda: PyTorch sees no such device here",
    ),
    (
        "train",
        "--users {u} --base {w}/nowhere --batch 8 --micro 8 --max-steps 1 --out {w}/r",
        "--base {w}/nowhere: no folder {w}/nowhere/prior; expected 'tiny', a hub id or a folder with prior, text_encoder and tokenizer in it",
    ),
    (
        "train",
        "--users {u} --base {w}/halfbase --out {w}/r",
        "--base {w}/halfbase: cannot load {w}/halfbase: ...",
    ),
    (
        "train",
        "--users {u} --base {w}/lostbase --out {w}/r",
        "--base {w}/lostbase: cannot load {w}/lostbase: prior lacks 2 tensors, clf.1.bias first",
    ),
    (
        "train",
        "--users {u} --base {w}/codecbase --out {w}/r",
        "--base {w}/codecbase: cannot load {w}/codecbase: {w}/codecbase/codec/codec.safetensors: not a codec of tiny.py (...",
    ),
    (
        "train",
        "--users {u} --base {w}/zerobase --out {w}/r",
        "--base {w}/zerobase: cannot load {w}/zerobase: {w}/zerobase/codec/codec.safetensors: not a codec of tiny.py (...",
    ),
    (
        "train",
        "--users {u} --out {w}/tornrun",
        "--out {w}/tornrun holds a run already: add --resume to continue it, or choose another folder",
    ),
    (
        "train",
        "--users {u} --out {w}/tornrun --resume",
        "cannot resume from {w}/tornrun/state.pt (...",
    ),
    (
        "train",
        "--users {u} --out {w}/foreign --resume",
        '--resume: the checkpoint is of another base: Error(s) in loading state_dict for UserAdapter: Missing key(s) in state_dict: "mean", "std", "project.weight", "project.bias", "norm.weight", "norm.bi',
    ),
    ("sample", "", 'no prompt: give --prompt "a red star" or --prompts FILE'),
    (
        "sample",
        "--prompt x --user {w}/no.pt",
        "--user {w}/no.pt: no such file; expected one that embed.py wrote, 'zero' or 'base'",
    ),
    (
        "sample",
        "--prompt x --user {u}/light.pt:much",
        "--user {u}/light.pt:much: 'much' is no weight; expected FILE.pt:0.7",
    ),
    (
        "sample",
        "--prompt x --user {u}/light.pt:0.5 --user zero",
        "--user: give every user a weight (blended into one person) or none (a picture each)",
    ),
    (
        "sample",
        "--prompt x --user {u}/light.pt --adapter {w}/nowhere",
        "{w}/nowhere: no such adapter file; train.py writes runs/<name>/adapter.safetensors",
    ),
    (
        "sample",
        "--prompt x --user {w}/text.pt --adapter assets/onehot",
        "{w}/text.pt: refused, not a plain user file (...",
    ),
    (
        "sample",
        "--prompt x --user {w}/evil/large.pt --adapter assets/onehot",
        "{w}/evil/large.pt: refused, not a plain user file (...",
    ),
    (
        "sample",
        "--prompt x --user {w}/endless.pt --adapter assets/onehot",
        "{w}/endless.pt: expected a dict whose 'embedding' is a finite float32 tensor (groups, states, dim)",
    ),
    (
        "sample",
        "--prompt x --user {w}/named.pt --adapter assets/onehot",
        "{w}/named.pt: 'vlm' is of type list; expected what embed.py writes",
    ),
    (
        "sample",
        "--prompt x --user {w}/layered.pt --adapter assets/onehot",
        "{w}/layered.pt: 'layer' is of type list; expected what embed.py writes",
    ),
    (
        "sample",
        "--prompt x --user {w}/squeezed.pt --adapter assets/onehot",
        "{w}/squeezed.pt: refused, not a plain user file (ValueError)",
    ),
    (
        "sample",
        "--prompt x --user {w}/wide.pt --adapter assets/onehot",
        "{w}/wide.pt: embedding of width 5, but assets/onehot/adapter.safetensors was trained on width 3",
    ),
    (
        "sample",
        "--prompt x --user {w}/other.pt --adapter assets/ppd",
        "{w}/other.pt: read by ['other', '-1', False], but assets/ppd/adapter.safetensors was trained on people read by ['tiny', '-1', False] (VLM, layer, after a profile)",
    ),
    (
        "sample",
        "--prompt x --user {u}/light.pt --group 3 --adapter assets/onehot",
        "--group 3: {u}/light.pt has groups 0 to 0",
    ),
    (
        "sample",
        "--prompt x --user {u}/light.pt --adapter {w}/half",
        "{w}/half/adapter.safetensors: not a readable safetensors file (...",
    ),
    (
        "sample",
        "--prompt x --user {u}/light.pt --adapter {w}/pickle",
        "{w}/pickle/adapter.safetensors: not a readable safetensors file (...",
    ),
    (
        "sample",
        "--prompt x --user {u}/light.pt --adapter {w}/plain",
        "{w}/plain/adapter.safetensors: no PPD adapter (its header says format None)",
    ),
    (
        "sample",
        "--prompt x --user {u}/light.pt --adapter {w}/missing",
        "{w}/missing/adapter.safetensors: header and tensors do not fit: ...",
    ),
    (
        "sample",
        "--prompt x --user {u}/light.pt --adapter {w}/huge",
        "{w}/huge/adapter.safetensors: header and tensors do not fit: ...",
    ),
    (
        "sample",
        "--prompt x --user {u}/light.pt --adapter {w}/narrow",
        "{w}/narrow/adapter.safetensors is for a base with 8 attention layers of width 64; this base has 8 attention layers of width 128",
    ),
    (
        "sample",
        "--prompt x --user {u}/light.pt --adapter {w}/notfinite",
        "{w}/notfinite/adapter.safetensors: header and tensors do not fit: to_k.3.weight is not finite, or of another precision than mean",
    ),
    (
        "sample",
        "--prompt x --user {u}/light.pt --adapter {w}/flat",
        "{w}/flat/adapter.safetensors: header and tensors do not fit: std is not above 0",
    ),
    (
        "sample",
        "--prompt x --user {u}/light.pt --adapter {w}/mixed16",
        "{w}/mixed16/adapter.safetensors: header and tensors do not fit: norm.bias is not finite, or of another precision than mean",
    ),
    (
        "sample",
        "--prompt x --user {u}/light.pt --adapter {w}/list",
        "{w}/list/adapter.safetensors: no PPD adapter (its header is no dict)",
    ),
    (
        "sample",
        "--prompt x --user {u}/light.pt --adapter {w}/deep",
        "{w}/deep/adapter.safetensors: not a readable safetensors file (...",
    ),
    ("sample", "--prompts {w}/latin.txt", "--prompts {w}/latin.txt: not a UTF-8 text file"),
    ("sample", "--prompts {w}/blank.txt", "--prompts {w}/blank.txt: no caption in it"),
    (
        "sample",
        "--prompts {w}/bad.tsv",
        "--prompts {w}/bad.tsv: expected a Prompt column and a row below it",
    ),
    (
        "evaluate",
        "rewards --adapter {w}/nowhere",
        "--adapter {w}/nowhere: no such file or folder; train.py writes runs/<name>",
    ),
    (
        "evaluate",
        "rewards --adapter assets/onehot --users {w}/empty",
        "--users {w}/empty: no pairs.parquet there; run embed.py first",
    ),
    ("evaluate", "rewards --adapter assets/onehot --n 0", "--n 0: expected 2 or more"),
    (
        "evaluate",
        "judge --adapter assets/ppd --judge-url http://localhost/v1",
        "--judge-url wants the endpoint's model too: --judge MODEL",
    ),
    (
        "evaluate",
        "people --adapter assets/ppd --users {u} --out {w}/e",
        "{u}/large.pt: embedding of width 3, but assets/ppd/adapter.safetensors was trained on width 192",
    ),
    (
        "evaluate",
        "people --adapter {w}/report",
        "{w}/report/evaluation.json: not a JSON object; move it away",
    ),
    (
        "evaluate",
        "profiles --adapter assets/ppd",
        "profiles wants --baselines FOLDER: its run dpo is the Diffusion-DPO to compare with, trained if it is not there",
    ),
    (
        "evaluate",
        "classify --users {w}/nowhere",
        "--users {w}/nowhere: no pairs.parquet there; run embed.py first",
    ),
    (
        "tiny",
        "data --out {w}/empty",
        "--out {w}/empty is there already; delete it or choose another folder",
    ),
    ("tiny", "data --out {w}/d --users 0", "--users 0: expected a number above 0"),
    (
        "tiny",
        "base --out {w}/finished",
        "--out {w}/finished holds a finished base; choose another folder",
    ),
    (
        "tiny",
        "base --out {w}/b --width 100",
        "--width 100: expected a multiple of 64, a head's width",
    ),
    (
        "tiny",
        "vlm --out {w}/finished",
        "--out {w}/finished holds a finished VLM; choose another folder",
    ),
    ("tiny", "vlm --out {w}/v --lr nan", "--lr nan: expected a number above 0"),
]


@pytest.fixture(scope="module")
def bad(world, tmp_path_factory):
    """A folder of wrong and hostile files."""
    w, (data, users) = tmp_path_factory.mktemp("bad"), world
    good = sorted(data.glob("*.parquet"))[0]
    table, pairs = pq.read_table(good), pq.read_table(users / "pairs.parquet")
    change = lambda table, **columns: pa.table(
        {name: columns.get(name, table[name]) for name in table.column_names},
        metadata=table.schema.metadata,
    )

    def folder(name):
        (w / name).mkdir()
        return w / name

    # preference data
    folder("empty")
    (folder("torn") / "d.parquet").write_bytes(good.read_bytes()[:5000])
    pq.write_table(table.drop_columns(["user_id"]), folder("columns") / "d.parquet")
    pq.write_table(
        change(table, user_id=[f"../../{i}" for i in range(len(table))]),
        folder("ids") / "d.parquet",
    )
    pq.write_table(change(table, jpg_0=["/etc/passwd"] * len(table)), folder("paths") / "d.parquet")
    pq.write_table(change(table, label_0=[0.5] * len(table)), folder("ties") / "d.parquet")

    # people
    def people(name, table=pairs, **fields):
        pq.write_table(table, folder(name) / "pairs.parquet")
        for i, user in enumerate(("light", "warm", "large")):
            embed.write_user(
                w / name,
                user,
                **dict(embedding=torch.eye(3)[i].view(1, 1, 3), vlm="one-hot")
                | {k: v[i] for k, v in fields.items()},
            )
        return w / name

    (folder("nopairs") / "pairs.parquet").write_bytes(good.read_bytes())
    (folder("tornpairs") / "pairs.parquet").write_bytes(
        (users / "pairs.parquet").read_bytes()[:5000]
    )
    torch.save(dict(embedding=Evil()), people("evil") / "large.pt")
    (people("tornuser") / "light.pt").write_bytes((users / "light.pt").read_bytes()[:300])
    (people("lost") / "warm.pt").unlink()
    people("mixed", vlm=["a", "b", "c"])
    people("nan", embedding=[torch.full((1, 1, 3), torch.nan)] * 3)
    people("climb", change(pairs, user=["../light"] * len(pairs)))
    people("outside", change(pairs, file=["../d.parquet"] * len(pairs)))
    people("words", change(pairs, groups=[["0"]] * len(pairs)))
    people("numbers", change(pairs, caption=list(range(len(pairs)))))
    people("negative", change(pairs, groups=[[-1]] * len(pairs)))
    people("groups", change(pairs, groups=[[7]] * len(pairs)))
    people("nothing", change(pairs, split=["test-seen"] * len(pairs)))
    people("shard"), people("gap"), people("other"), people("bytes")
    for name in ("shard", "other", "bytes"):
        embed.main(["--cache-latents", "--users", str(w / name), "--device", "cpu"])
    (w / "shard" / "latents" / "00000.safetensors").write_bytes(b"\xff" * 1000)
    (w / "gap" / "latents").mkdir()
    shard = w / "other" / "latents" / "00000.safetensors"
    with safe_open(shard, "pt") as file:
        header = json.loads(file.metadata()["ppd"])
    save_file(load_file(shard), shard, dict(ppd=json.dumps(header | dict(encoder="another's"))))
    save_file(
        dict(latents=load_file(shard)["latents"].byte()),
        w / "bytes" / "latents" / "00000.safetensors",
        dict(ppd=json.dumps(header)),
    )
    embed.write_user(w, "wide", embedding=torch.ones(1, 1, 5), vlm="one-hot")
    embed.write_user(w, "other", embedding=torch.ones(1, 1, 192), vlm="other", layer="-1")
    embed.write_user(w, "endless", embedding=torch.ones(1).expand(1000, 1000, 1000, 1000)[0])
    torch.save(dict(embedding=torch.zeros(1, 1, 10**6)), w / "whole.pt")
    with (
        zipfile.ZipFile(w / "whole.pt") as whole,
        zipfile.ZipFile(w / "squeezed.pt", "w", zipfile.ZIP_DEFLATED) as squeezed,
    ):  # a bomb
        for part in whole.namelist():
            squeezed.writestr(part, whole.read(part))
    embed.write_user(w, "layered", embedding=torch.ones(1, 1, 3), layer=[1])
    embed.write_user(w, "named", embedding=torch.ones(1, 1, 3), vlm=["no", "name"])
    (w / "text.pt").write_text("hello")

    # choices, captions, judgements
    picture = Image.new("RGB", (64, 64))
    picture.save(w / "a.png")
    (w / "torn.png").write_bytes((w / "a.png").read_bytes()[:60])
    picture.save(w / "program.eps")
    Image.new("1", (20_000, 20_000)).save(w / "bomb.png")
    line = json.dumps(dict(caption="a red star", preferred="a.png", dispreferred="a.png"))
    for name, lines in dict(
        four=[line] * 4,
        three=[line] * 3,
        bomb=[line] * 3 + [line.replace("a.png", "bomb.png", 1)],
        halfpicture=[line.replace("a.png", "torn.png", 1)] * 4,
        program=[line.replace("a.png", "program.eps", 1)] * 4,
        nopicture=[line.replace("a.png", "b.png", 1)] * 4,
        nested=["[" * 100_000] * 4,
        keys=[line.replace("caption", "prompt")] * 4,
    ).items():
        (w / f"{name}.jsonl").write_text("\n".join(lines))
    (w / "latin.txt").write_bytes(b"caf\xe9")
    (w / "blank.txt").write_text("\n \n")
    (w / "bad.tsv").write_text("Caption\nx\n")

    # adapters and runs
    onehot = ROOT / "assets" / "onehot" / "adapter.safetensors"
    header, state = ppd.UserAdapter.load(onehot).header, load_file(onehot)
    adapter = lambda name, state, **change: save_file(
        state, folder(name) / "adapter.safetensors", dict(ppd=json.dumps(header | change))
    )
    (folder("half") / "adapter.safetensors").write_bytes(onehot.read_bytes()[:-1000])
    torch.save(state, folder("pickle") / "adapter.safetensors")
    save_file(state, folder("plain") / "adapter.safetensors")
    adapter("flat", {k: torch.zeros_like(v) if k == "std" else v for k, v in state.items()})
    adapter("mixed16", {k: v.half() if k == "norm.bias" else v for k, v in state.items()})
    save_file(state, folder("list") / "adapter.safetensors", dict(ppd="[]"))
    save_file(state, folder("deep") / "adapter.safetensors", dict(ppd="[" * 100_000))
    adapter("missing", {k: v for k, v in state.items() if k != "to_k.3.weight"})
    adapter("notfinite", state | {"to_k.3.weight": state["to_k.3.weight"] / 0})
    adapter("huge", state, user_dim=10**12)
    adapter(
        "narrow",
        {k: v[:64] if k.startswith("to_") else v for k, v in state.items()},
        channels=[64] * 8,
    )
    shutil.copy(onehot, folder("report"))
    (w / "report" / "evaluation.json").write_text("{")
    for name, content in (("tornrun", b"x" * 100), ("foreign", None)):
        folder(name)
        (w / name / "state.pt").write_bytes(content) if content else torch.save(
            dict(step=3, adapter={}, optimizer={}), w / name / "state.pt"
        )

    # bases
    for name in ("halfbase", "lostbase", "codecbase", "zerobase"):
        shutil.copytree(ROOT / "assets" / "tiny", w / name, ignore=shutil.ignore_patterns("vlm"))
    path = next((w / "halfbase" / "prior").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1000])
    path = next((w / "lostbase" / "prior").glob("*.safetensors"))
    save_file(
        {k: v for k, v in load_file(path).items() if not k.startswith("clf.1")},
        path,
        dict(format="pt"),
    )
    path = w / "codecbase" / "codec" / "codec.safetensors"
    save_file(load_file(path), path, dict(patch="1000000000", side="32"))
    save_file(
        load_file(path), w / "zerobase" / "codec" / "codec.safetensors", dict(patch="0", side="32")
    )
    folder("finished")
    (w / "finished" / "prior").mkdir(), (w / "finished" / "config.json").write_text("{}")
    return w


def test_journals(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"ste')
    assert ppd.read_jsonl(path) == [dict(step=0), dict(step=1)]  # a kill tore the last line
    for broken in ("[]", "{", "[" * 100_000, "\x00"):
        path.write_text(f'{{"step": 0}}\n{broken}\n{{"step": 2}}\n')
        with pytest.raises(ppd.BadInput, match="train.jsonl line 2: not a JSON object"):
            ppd.read_jsonl(path)
        path.write_text(broken)
        with pytest.raises(ppd.BadInput, match="train.jsonl: not a JSON object"):
            evaluate.read_json(path)


def said(script_name, arguments, capsys):
    """The line that the script, run in this process, ends with."""
    module = dict(embed=embed, train=train, sample=sample, evaluate=evaluate, tiny=tiny)[
        script_name
    ]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        module.main(arguments)
    if isinstance(stop.value.code, str):
        return stop.value.code
    assert stop.value.code == 2
    return capsys.readouterr().err.removesuffix("\n")


def fits(line, wanted):
    return (
        line.startswith(wanted[:-3]) and "\n" not in line
        if wanted.endswith("...")
        else line == wanted
    )


def files(*folders):
    return {path: path.stat().st_mtime_ns for folder in folders for path in Path(folder).rglob("*")}


@pytest.mark.parametrize("name, arguments, line", BAD, ids=[f"{n} {a}"[:70] for n, a, _ in BAD])
def test_one_line_and_nothing_left_behind(name, arguments, line, bad, world, capsys):
    if "--device cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    place = dict(w=bad, u=world[1])
    watched = bad, *world, "samples", "runs", "users", "users-onehot"  # the last are defaults
    before = files(*watched)
    found = said(name, arguments.format(**place).split(), capsys)
    assert fits(found, f"{name}.py: error: {line.format(**place)}"), found
    assert files(*watched) == before and not Path("EVIL_WAS_HERE").exists()


FIRST = {
    name: i for i, (name, *_) in reversed([*enumerate(BAD)])
}.values()  # one of each script runs as a process always, the others with --slow


@pytest.mark.parametrize(
    "name, arguments, line",
    [
        pytest.param(*case, marks=[] if i in FIRST else pytest.mark.slow)
        for i, case in enumerate(BAD)
    ],
    ids=[f"{n} {a}"[:70] for n, a, _ in BAD],
)
def test_as_a_process(name, arguments, line, bad, world):
    if "--device cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    place = dict(w=bad, u=world[1])
    done = script(f"{name}.py", *arguments.format(**place).split(), check=False)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert fits(
        done.stderr.strip().splitlines()[-1], f"{name}.py: error: {line.format(**place)}"
    ), done.stderr
