"""train.py in float64, where sums of other orders agree to 1e-9. A driver: the script's own flags
are bfloat16 and float32."""

import contextlib
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from ppd import UserAdapter


@contextlib.contextmanager
def double_precision():
    """Inside the block train.main() loads the base, and makes the adapter, in float64."""
    load_base, install, collate = train.load_base, UserAdapter.install, train.collate

    def load_double(name, device, dtype, *settings):
        return load_base(name, device, torch.float64, *settings)

    def install_double(adapter, attention_layers):
        return install(adapter, attention_layers).double()

    def collate_double(pairs, tokenize):
        batch = collate(pairs, tokenize)
        return {k: v.double() if v.dtype == torch.float32 else v for k, v in batch.items()}

    with (
        mock.patch.object(train, "load_base", load_double),
        mock.patch.object(train, "collate", collate_double),
        mock.patch.object(UserAdapter, "install", install_double),
    ):
        yield


if __name__ == "__main__":
    with double_precision():
        train.main(sys.argv[1:])
