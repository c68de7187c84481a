import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHORT = "--max-steps 2 --batch 8 --micro 8 --log-every 1 --preview-every 0 --device cpu".split()
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)  # the scripts' default paths are relative to the checkout
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # this process and those it starts get their share
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // workers)))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow checks too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes on two cores; runs with --slow")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: add --slow to run it"))


@pytest.fixture(autouse=True)
def signals_as_before():
    """train.py takes over two signals while it runs; whatever a test ran, they are given back."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


def script(*command, check=True, **env):
    """Run one of the scripts as a user would; returns the finished process, output as text."""
    how = dict(cwd=ROOT, capture_output=True, text=True, env=os.environ | env)
    done = subprocess.run([sys.executable, *map(str, command)], **how)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def call(module, *words):
    """A script's main() in this process: a start takes seconds."""
    module.main([*map(str, words)])


def refusal(module, *words):
    """The line that a script, called in this process, stops with."""
    with pytest.raises(SystemExit) as stop:
        call(module, *words)
    assert "\n" not in stop.value.code
    return stop.value.code


def train_flags(users, out, *flags):
    return [*map(str, ("--users", users, "--out", out, *SHORT, *flags))]


def run_train(users, out, *flags):
    """train.py in this process, two small steps unless the flags say otherwise."""
    import train

    train.main(train_flags(users, out, *flags))


def moved(adapter, std=0.3):
    """An adapter whose V' has left zero."""
    import torch  # only now: it reads the environment above

    for layer in adapter.to_v:
        torch.nn.init.normal_(layer.weight, std=std)
    return adapter


def evaluation(out, command):
    """What a subcommand has put into evaluation.json."""
    return json.loads((Path(out) / "evaluation.json").read_text())[command]


def with_columns(table, **columns):
    """A table with other values in these columns."""
    for name, values in columns.items():
        position = table.column_names.index(name)
        table = table.set_column(position, name, pa.array(values))
    return table


@pytest.fixture(scope="session", autouse=True)
def few_validation_pairs():
    """Of trainings in this process: 1,024 would take most of a short run's time."""
    import train

    train.VALIDATION_PAIRS = 32


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small drawn data set and its one-hot users, by the real scripts: (data, users) folders."""
    import embed
    import tiny.world

    folder = tmp_path_factory.mktemp("world")
    data, users = folder / "data", folder / "users"
    call(tiny.world, "--out", data, "--users", 60, "--pairs", 12, "--seed", 7)
    call(embed, "--data", data, "--one-hot", "light", "warm", "large", "--users", users)
    return data, users


@pytest.fixture(scope="session")
def lean(world, tmp_path_factory):
    """The same with training pairs alone: nothing to validate on, so that short runs are quick."""
    users = shutil.copytree(world[1], tmp_path_factory.mktemp("lean") / "users")
    table = pq.read_table(users / "pairs.parquet")
    pq.write_table(table.filter(pc.equal(table["split"], "train")), users / "pairs.parquet")
    return world[0], users


@pytest.fixture(scope="session")
def people(world, tmp_path_factory):
    """The same small data, its users read by the VLM: (data folder, users folder)."""
    import embed

    users = tmp_path_factory.mktemp("people") / "users"
    call(embed, "--data", world[0], "--users", users)
    return world[0], users


@pytest.fixture(scope="session")
def people_run(people, tmp_path_factory):
    """An adapter for these users, hardly trained."""
    run = tmp_path_factory.mktemp("people") / "run"
    run_train(people[1], run)
    return run
