"""Files of safetensors: the bytes of the library, hashed on the way, past the page cache or through it."""

import errno
import fcntl
import hashlib
import os

import pytest
import torch
from safetensors.torch import save

from fxc.artifact import shard
from fxc.artifact.shard import digest_on_disk, write_shard
from fxc.errors import VerificationFailed
from fxc.ir.text import DTYPES


def of_dtype(dtype):
    numbers = torch.arange(15).reshape(3, 5)
    return numbers.to(dtype) if dtype.is_floating_point or dtype.is_complex else numbers.remainder(2).to(dtype)


UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
SETS = {
    "dtypes": {f"{name}.é": of_dtype(dtype) for name, dtype in DTYPES.items() if name != "c128"},
    "shapes": {"b": torch.zeros(()), "a.x": torch.zeros(0, 3), "a": torch.arange(8.0).view(2, 4).t()},
    "shared": {"b": (same := torch.arange(6)), "a": same, "c": same[2:]},
    "unsigned": {str(dtype): torch.arange(15).reshape(3, 5).to(dtype) for dtype in UNSIGNED},
    "float8": {str(dtype): torch.arange(15.0).to(dtype) for dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)},
    "conjugate": {"a": (number := torch.tensor([1 + 2j, 3 - 4j])).conj(), "b": number.conj().imag},
    "nothing": {},
    "pieces": {"b": torch.arange(5000).short(), "a": torch.arange(9000, dtype=torch.int32)},
    "whole pieces": {"a": torch.zeros(2 * 4096 - 64, dtype=torch.uint8)},
}


@pytest.mark.parametrize("least", [0, 1 << 40], ids=["past the cache", "through it"])
@pytest.mark.parametrize("name", SETS)
def test_it_writes_what_the_library_writes(name, least, tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "_PIECE", 4096)
    monkeypatch.setattr(shard, "_LEAST", least)
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"longer than what comes" * 9999)
    digest = write_shard(path, SETS[name])
    # The library asks for contiguous tensors that share nothing.
    plain = {name: tensor.resolve_conj().resolve_neg() for name, tensor in SETS[name].items()}
    expected = save({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in plain.items()})
    assert path.read_bytes() == expected
    assert digest == digest_on_disk(path) == hashlib.sha256(expected).hexdigest()


def test_a_dtype_that_the_format_has_not_is_named(tmp_path):
    with pytest.raises(VerificationFailed, match="b: safetensors has no complex128"):
        write_shard(tmp_path / "file", {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.complex128)})
    assert not (tmp_path / "file").exists()


def test_a_file_system_without_such_writes_is_written_through_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "_PIECE", 4096)
    monkeypatch.setattr(shard, "_LEAST", 0)
    refused, write = [], os.pwritev

    def pwritev(handle, data, at):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(at)
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(handle, data, at)

    monkeypatch.setattr(os, "pwritev", pwritev)
    write_shard(tmp_path / "file", SETS["pieces"])
    assert len(refused) <= 1 and (tmp_path / "file").read_bytes() == save(SETS["pieces"])


def test_a_disk_that_writes_a_little_at_a_time_gets_all(tmp_path, monkeypatch):
    write = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda handle, data, at: write(handle, [data[0][:100]], at))
    write_shard(tmp_path / "file", SETS["pieces"])
    assert (tmp_path / "file").read_bytes() == save(SETS["pieces"])


def test_a_disk_with_other_bytes_is_an_error(tmp_path, monkeypatch):
    write = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda handle, data, at: write(handle, [bytes(data[0])[:-1] + b"?"], at))
    with pytest.raises(OSError, match="does not read back"):
        write_shard(tmp_path / "file", SETS["pieces"])


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError, match="No space"):
        write_shard(tmp_path / "file", SETS["pieces"])
