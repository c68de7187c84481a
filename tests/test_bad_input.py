"""Wrong and hostile input to the scripts: one line that names what is wrong, no traceback, nothing
left behind. The cases are in bad_input.txt, the files they need are made here."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import embed
import utils
from conftest import ROOT, script, with_columns
from data import write_user


def read_cases():
    """bad_input.txt -> [(script, arguments, line), ...]"""
    cases = []
    for line in Path(__file__).with_name("bad_input.txt").read_text().splitlines():
        if line.startswith(" "):  # the expected line, wrapped
            cases[-1][2] = f"{cases[-1][2]} {line.strip()}".strip()
        elif line and not line.startswith("#"):
            name, _, arguments = line.partition(" ")
            cases.append([name, arguments, ""])
    return cases


CASES = read_cases()
IDS = [f"{name} {arguments}"[:70] for name, arguments, _ in CASES]


# ------------------------------------------------------------------------------- the files
def new_folder(path):
    path.mkdir()
    return path


class Evil:
    def __reduce__(self):
        return (open, ("EVIL_WAS_HERE", "w"))


def make_data(w, good):
    """Preference data; good: a parquet file of the drawn world."""
    table = pq.read_table(good)
    n = len(table)
    new_folder(w / "empty")
    (new_folder(w / "torn") / "d.parquet").write_bytes(good.read_bytes()[:5000])
    for name, broken in dict(
        columns=table.drop_columns(["user_id"]),
        paths=with_columns(table, jpg_0=["/etc/passwd"] * n),
        ties=with_columns(table, label_0=[0.5] * n),
    ).items():
        pq.write_table(broken, new_folder(w / name) / "d.parquet")


def make_users(w, good, data_file):
    """Users folders; good: one of embed.py --one-hot."""
    pairs = pq.read_table(good / "pairs.parquet")
    n = len(pairs)

    def users(name, table=pairs, **fields):
        pq.write_table(table, new_folder(w / name) / "pairs.parquet")
        for i, user in enumerate(("light", "warm", "large")):
            record = dict(embedding=torch.eye(3)[i].view(1, 1, 3), vlm="one-hot")
            record |= {key: values[i] for key, values in fields.items()}
            write_user(w / name / f"{user}.pt", **record)
        return w / name

    torn = (good / "pairs.parquet").read_bytes()[:5000]
    (new_folder(w / "tornpairs") / "pairs.parquet").write_bytes(torn)
    (new_folder(w / "nopairs") / "pairs.parquet").write_bytes(data_file.read_bytes())
    torch.save(dict(embedding=Evil()), users("evil") / "large.pt")
    (users("tornuser") / "light.pt").write_bytes((good / "light.pt").read_bytes()[:300])
    (users("lost") / "warm.pt").unlink()
    users("mixed", vlm=["a", "b", "c"])
    users("layers", layer=[[1], [2], torch.ones(2)])
    users("nan", embedding=[torch.full((1, 1, 3), torch.nan)] * 3)
    users("climb", with_columns(pairs, user=["../light"] * n))
    users("outside", with_columns(pairs, file=["../d.parquet"] * n))
    users("words", with_columns(pairs, groups=[["first"]] * n))
    users("holes", with_columns(pairs, groups=[[None]] * n))
    users("numbers", with_columns(pairs, caption=[[1]] * n))
    users("silent", with_columns(pairs, caption=["a star"] * (n - 1) + [None]))
    users("negative", with_columns(pairs, groups=[[-1]] * n))
    users("groups", with_columns(pairs, groups=[[7]] * n))
    users("nothing", with_columns(pairs, split=["test-seen"] * n))

    write_user(w / "wide.pt", embedding=torch.ones(1, 1, 5), vlm="one-hot")
    write_user(w / "other.pt", embedding=torch.ones(1, 1, 192), vlm="other", layer="-1")
    write_user(w / "endless.pt", embedding=torch.ones(1).expand(1000, 1000, 1000, 1000)[0])
    write_user(w / "layered.pt", embedding=torch.ones(1, 1, 192), vlm="tiny", layer=[1])
    write_user(w / "named.pt", embedding=torch.ones(1, 1, 192), vlm=["no", "name"], layer="-1")
    (w / "text.pt").write_text("hello")
    for name, user in dict(list=[1], none={}, flat=dict(embedding=torch.zeros(3))).items():
        torch.save(user, w / f"{name}.pt")


def make_latents(w, users):
    """Folders of cached latents; returns the name of their files."""
    for dtype in ("float32", "bfloat16"):
        flags = f"--users {users} --latents {w}/latents-{dtype} --dtype {dtype} --device cpu"
        embed.main(["--cache-latents", *flags.split()])
    good = w / "latents-float32"
    (done_path,) = good.glob("*.done.npy")
    name = done_path.name.removesuffix(".done.npy")
    images = json.loads((good / "index.json").read_text())["images"]

    def copy(folder):
        return shutil.copytree(good, w / folder)

    rows = pq.read_table(users / "pairs.parquet").to_pylist()
    row = next(row for row in rows if row["split"] == "train")
    done = np.load(done_path)
    done[[images.index(row[key]) for key in ("image_0_uid", "image_1_uid")]] = 0
    np.save(copy("latents-unfinished") / done_path.name, done)
    (copy("latents-torn") / f"{name}.npy").write_bytes(b"\xff" * 1000)
    np.save(copy("latents-short") / f"{name}.npy", np.zeros((5, 16, 8, 8), np.float32))
    for folder, index in {
        "latents-other": dict(images=[f"other {image}" for image in images]),
        "latents-list": images,
        "latents-number": dict(images=len(images)),
    }.items():
        (copy(folder) / "index.json").write_text(json.dumps(index))
    return name


def make_choices(w):
    """Choices of one's own, and captions."""
    image = Image.new("RGB", (64, 64))
    image.save(w / "a.png")
    image.save(w / "program.eps")
    (w / "torn.png").write_bytes((w / "a.png").read_bytes()[:60])
    Image.new("1", (20_000, 20_000)).save(w / "bomb.png")
    line = json.dumps(dict(caption="a red star", preferred="a.png", dispreferred="a.png"))
    for name, lines in dict(
        four=[line] * 4,
        three=[line] * 3,
        bomb=[line] * 3 + [line.replace("a.png", "bomb.png", 1)],
        halfimage=[line.replace("a.png", "torn.png", 1)] * 4,
        program=[line.replace("a.png", "program.eps", 1)] * 4,
        noimage=[line.replace("a.png", "b.png", 1)] * 4,
        nested=["[" * 100_000] * 4,
        keys=[line.replace("caption", "prompt")] * 4,
        brace=[line] * 4 + ["", "{"],
        halfletter=[line.replace("a red star", "\\ud83d")] * 4,
        halfname=[line.replace("a.png", "\\ud83d", 1)] * 4,
    ).items():
        (w / f"{name}.jsonl").write_text("\n".join(lines))
    (w / "latin.txt").write_bytes(b"caf\xe9")
    (w / "blank.txt").write_text("\n \n")
    (w / "bad.tsv").write_text("Caption\nx\n")
    for ending in ("csv", "json", "parquet"):
        (w / f"captions.{ending}").write_text("caption,x\na red star,1\n")


def make_adapters(w):
    """Adapters, and folders of runs."""
    good = ROOT / "assets" / "onehot" / "adapter.safetensors"
    metadata, state = utils.read_safetensors(good)
    header = json.loads(metadata["ppd"])

    def adapter(name, tensors=None, header=header):
        metadata = None if header is None else dict(ppd=json.dumps(header))
        path = new_folder(w / name) / "adapter.safetensors"
        save_file(state | (tensors or {}), path, metadata)

    (new_folder(w / "half") / "adapter.safetensors").write_bytes(good.read_bytes()[:-1000])
    torch.save(state, new_folder(w / "pickle") / "adapter.safetensors")
    adapter("plain", header=None)
    adapter("list", header=[])
    save_file(state, new_folder(w / "deep") / "adapter.safetensors", dict(ppd="[" * 100_000))
    adapter("flat", dict(std=torch.zeros_like(state["std"])))
    adapter("mixed16", {"norm.bias": state["norm.bias"].half()})
    adapter("notfinite", {"to_k.3.weight": state["to_k.3.weight"] / 0})
    adapter("huge", header=header | dict(user_dim=10**12))
    adapter("extra", dict(extra=torch.zeros(1)))
    narrow = {name: value[:64] for name, value in state.items() if name.startswith("to_")}
    adapter("narrow", narrow, header | dict(channels=[64] * 8))
    del state["to_k.3.weight"]
    adapter("missing")

    shutil.copy(good, new_folder(w / "report"))
    (w / "report" / "evaluation.json").write_text("{")
    (new_folder(w / "tornrun") / "state.pt").write_bytes(b"x" * 100)
    state = dict(step=3, adapter={}, optimizer={})
    torch.save(state, new_folder(w / "foreign") / "state.pt")
    torch.save(state | dict(config="lr"), new_folder(w / "noconfig") / "state.pt")


def make_bases(w):
    ignore = shutil.ignore_patterns("vlm")
    for name in ("halfbase", "lostbase", "codecbase", "zerobase"):
        shutil.copytree(utils.TINY, w / name, ignore=ignore)
    (path,) = (w / "halfbase" / "prior").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    (path,) = (w / "lostbase" / "prior").glob("*.safetensors")
    kept = {name: value for name, value in load_file(path).items() if not name.startswith("clf.1")}
    save_file(kept, path, dict(format="pt"))
    for name, patch in dict(codecbase="1000000000", zerobase="0").items():
        path = w / name / "codec" / "codec.safetensors"
        save_file(load_file(path), path, dict(patch=patch, side="32"))
    new_folder(new_folder(w / "finished") / "prior")
    (w / "finished" / "config.json").write_text("{}")


@pytest.fixture(scope="module")
def places(world, tmp_path_factory):
    """What stands for {w}, {u} and {l} in bad_input.txt: a folder of wrong and hostile files, a
    good users folder, and the name of the latents."""
    w = tmp_path_factory.mktemp("bad")
    data, users = world
    first = min(data.glob("*.parquet"))
    make_data(w, first)
    make_users(w, users, first)
    make_choices(w)
    make_adapters(w)
    make_bases(w)
    return {"{w}": str(w), "{u}": str(users), "{l}": make_latents(w, users)}


# -------------------------------------------------------------------------------- the checks
def fill(text, places):
    for name, value in places.items():
        text = text.replace(name, value)
    return text


def assert_is(found, name, line, places):
    """Whether a script's line is the expected one; what follows its "..." is a library's own."""
    prefix = name if name.startswith("tiny.") else f"{name}.py"
    wanted = f"{prefix}: error: {fill(line, places)}"
    if wanted.endswith("..."):
        assert found.startswith(wanted[:-3]) and "\n" not in found, found
    else:
        assert found == wanted


def files(*folders):
    return {path: path.stat().st_mtime_ns for folder in folders for path in Path(folder).rglob("*")}


def skip_on_a_gpu(arguments):
    if "--device cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")


@pytest.mark.parametrize("name, arguments, line", CASES, ids=IDS)
def test_one_line_and_nothing_left_behind(name, arguments, line, places, world, capsys):
    skip_on_a_gpu(arguments)
    defaults = ("samples", "runs", "users", "users-onehot", "users-classify")
    watched = (places["{w}"], *world, *defaults)
    before = files(*watched)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main(fill(arguments, places).split())
    found = stop.value.code
    if not isinstance(found, str):  # argparse has printed it
        assert found == 2
        found = capsys.readouterr().err.removesuffix("\n")
    assert_is(found, name, line, places)
    assert files(*watched) == before and not Path("EVIL_WAS_HERE").exists()


# one of each script runs as a process always, the others with --slow
FIRST = {name: i for i, (name, *_) in reversed([*enumerate(CASES)])}.values()
PROCESSES = [
    pytest.param(*case, marks=[] if i in FIRST else pytest.mark.slow)
    for i, case in enumerate(CASES)
]


@pytest.mark.parametrize("name, arguments, line", PROCESSES, ids=IDS)
def test_as_a_process(name, arguments, line, places):
    skip_on_a_gpu(arguments)
    command = ["-m", name] if name.startswith("tiny.") else [f"{name}.py"]
    done = script(*command, *fill(arguments, places).split(), check=False)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert_is(done.stderr.strip().splitlines()[-1], name, line, places)


def test_journals(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"ste')
    assert utils.read_jsonl(path) == [dict(step=0), dict(step=1)]  # a kill tore the last line
    for broken in ("[]", "{", "[" * 100_000, "\x00"):
        path.write_text(f'{{"step": 0}}\n{broken}\n{{"step": 2}}\n')
        with pytest.raises(utils.InputError, match="train.jsonl line 2: not a JSON object"):
            utils.read_jsonl(path)
        path.write_text(broken)
        with pytest.raises(utils.InputError, match="train.jsonl: not a JSON object"):
            utils.read_json(path)
