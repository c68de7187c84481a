"""Files, checkpoints, processes and devices: what every script needs, and no part of the method."""

import argparse
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

TINY = Path(__file__).resolve().parent / "tiny" / "checkpoints"  # what the name "tiny" stands for


class InputError(ValueError):
    """Something from outside (a file, a flag, a row) is wrong; scripts print it as one line."""


def first_line(error, limit=150):
    """An exception's message as the start of one line, for messages of ours."""
    return " ".join(str(error).split())[:limit]


def write_atomically(path, write):
    """Call write(temporary path), then put the file in place: readers see all of it or none.
    Raises InputError if that fails, as on a full disk; what was there before stays."""
    temporary = Path(f"{path}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # or a power cut could leave the new name on an empty file
        os.replace(temporary, path)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch wraps a failed write
        temporary.unlink(missing_ok=True)
        problem = f"cannot be written ({first_line(error, 120)})"
        raise InputError(f"{path}: {problem}; what was there before is kept") from None


def append_line(path, text):
    """One more line at the end of a file, on the disk when this returns."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def parse_object(text, problem):
    """JSON text, or its bytes, of one object as a dict; of anything else InputError(problem)."""
    try:
        return dict(**json.loads(text))
    except (ValueError, RecursionError, TypeError):
        raise InputError(problem) from None


def read_json(path):
    """A .json file that holds one object, as a dict."""
    return parse_object(Path(path).read_bytes(), f"{path}: not a JSON object; move it away")


def read_jsonl(path):
    """Lines of a .jsonl as a list of dicts; a last line that a kill cut short is dropped."""
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    lines = enumerate(text.split("\n")[:-1], 1)
    return [parse_object(line, f"{path} line {i}: not a JSON object") for i, line in lines]


def write_jsonl(path, records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_safetensors(path):
    """A .safetensors file: its metadata (dict of strings) and its tensors (dict), on the CPU."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({first_line(error)})") from None


def save_checkpoint(folder, **state):
    """<folder>/state.pt, what a run needs to go on, atomically."""
    write_atomically(Path(folder) / "state.pt", lambda path: torch.save(state, path))


def load_checkpoint(folder, config):
    """What save_checkpoint() wrote, on the CPU, or None if there is none. Raises InputError if it
    cannot be read, or if its `config` says otherwise than this one: every difference is named."""
    path = Path(folder) / "state.pt"
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        assert isinstance(state["step"], int) and isinstance(state.get("config", {}), dict)
    except (OSError, MemoryError):  # says nothing against the file
        raise
    except Exception as error:  # torch raises many kinds: unpickling, zip, end of file
        problem = f"cannot resume from {path} ({type(error).__name__})"
        raise InputError(f"{problem}; start again in another folder") from None
    before = state.get("config", {})
    different = [key for key in config if key in before and before[key] != config[key]]
    if different:
        changes = [f"{flag(key)} is {config[key]}, but was {before[key]}" for key in different]
        raise InputError(f"{'; '.join(changes)} when the run in {folder} began")
    return state


def flag(key):
    """A setting's name as its command-line flag; a phrase stays a phrase."""
    return key if " " in key else "--" + key.replace("_", "-")


def check_flags(args, error, keys, is_good, expected):
    """error() with a line that names it if one of these settings is given and not good."""
    for key in keys.split():
        value = getattr(args, key)
        if value is not None and not is_good(value):
            error(f"{flag(key)} {value}: expected {expected}")


def is_hub_id(name):
    """Whether a string that is no folder here reads like owner/name on the hub."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", str(name))) and not Path(name).exists()


def hub_file(repo, name, kind="model"):
    """Path of a file of a folder, or of a hub repository (its cache, or a download into it)."""
    if not is_hub_id(repo):
        if not (Path(repo) / name).is_file():
            raise InputError(f"{Path(repo) / name}: no such file")
        return Path(repo) / name
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, name, repo_type=kind))
    except (OSError, ValueError) as error:
        raise InputError(f"{repo}: cannot get {name} from the hub: {first_line(error)}") from None


def load_frozen(cls, folder, device, **load_kwargs):
    """cls.from_pretrained(folder), frozen; OSError if a tensor is missing: it would be random."""
    model, info = cls.from_pretrained(folder, output_loading_info=True, **load_kwargs)
    missing = sorted(info["missing_keys"])
    if missing:
        part = load_kwargs.get("subfolder", folder)
        raise OSError(f"{part} lacks {len(missing)} tensors, {missing[0]} first")
    return model.to(device).eval().requires_grad_(False)


def rank_and_world():
    """This process's number and how many there are, as torchrun says; 0 and 1 without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def all_gather_objects(value):
    """[rank 0's value, rank 1's, ...] under torchrun, else [value]; waits for all of them."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(tensors):
    """Each of these tensors of one dtype becomes its sum over ranks, in one exchange."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def pick_device(name="auto"):
    """A --device as PyTorch's device string; under torchrun on GPUs, this process's own GPU."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind, is_there in available.items() if is_there), "cpu")
    if not available.get(name, True):
        raise InputError(f"--device {name}: PyTorch sees no such device here")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        gpu, n_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if gpu >= n_gpus:
            raise InputError(f"--nproc-per-node: more processes than the {n_gpus} GPUs here")
        name = f"cuda:{gpu}"
        torch.cuda.set_device(name)
    return name


def pick_dtype(name, device):
    """A --dtype as a torch.dtype; auto is float32 on a CPU, else bfloat16."""
    if name != "auto":
        return getattr(torch, name)
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def make_parser(script, doc):
    """A parser whose errors are one line, and whose --help begins with the script's docstring."""
    look = dict(formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS)
    parser = argparse.ArgumentParser(prog=script, description=doc, **look)
    for stream in (sys.stdout, sys.stderr):  # a caption may have letters that a terminal lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for word in sys.argv[1:]:
        if re.search("[\ud800-\udfff]", word):
            parser.error(f"{ascii(word)}: not UTF-8")
    return parser


def run_script(name, run, args):
    """run(args); whatever is wrong with the input becomes one line and exit status 1."""
    for key in ("users", "data", "out", "latents", "adapter", "base", "baselines"):  # a/ is a
        if isinstance(getattr(args, key, None), str):
            setattr(args, key, os.path.normpath(getattr(args, key)))
    try:
        run(args)
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted")
    except (InputError, OSError) as error:
        # the last line: an error from a DataLoader worker carries its traceback before it
        sys.exit(f"{name}: error: {str(error).strip().splitlines()[-1]}")


def run_python(script, *flags):
    """Run another script of this folder; its output is shown."""
    words = [str(word) for word in flags]
    process = subprocess.Popen([sys.executable, str(Path(__file__).with_name(script)), *words])
    try:
        process.wait()
    finally:  # after a KeyboardInterrupt too: it was asked to stop as well, and saves first
        code = process.wait()
    if code != 0:
        raise InputError(f"{script} {' '.join(words)} ended with exit status {code}")
