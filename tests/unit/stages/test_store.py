from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from lowbit.stages.store import ActivationStore


def test_arrays_stay_in_memory_until_the_limit_and_go_to_files_after_it(tmp_path):
    with ActivationStore(4096, tmp_path) as store:
        small = store.allocate("small", (8, 16, 8), torch.float32)  # exactly 4096 bytes
        large = store.allocate("large", (2, 3, 4), torch.bfloat16)
        assert (store.on_disk("small"), store.on_disk("large")) == (False, True)
        assert (store.ram_bytes, store.disk_bytes) == (4096, 48)
        assert (small.shape, small.dtype) == ((8, 16, 8), torch.float32)
        assert (large.shape, large.dtype) == ((2, 3, 4), torch.bfloat16)


def test_freeing_memory_lets_the_next_array_use_it(tmp_path):
    with ActivationStore(4096, tmp_path) as store:
        store.allocate("a", (1024,), torch.float32)
        store.free("a")
        store.allocate("b", (1024,), torch.float32)
        assert not store.on_disk("b")


def test_a_mapped_array_computes_like_any_tensor_and_keeps_its_values_when_trimmed(tmp_path):
    values = torch.randn(4, 32, 16, generator=torch.Generator().manual_seed(0))
    with ActivationStore(0, tmp_path) as store:
        mapped = store.allocate("x", values.shape, values.dtype)
        mapped.copy_(values)
        mapped[2].mul_(2)
        store.trim()
        expected = values.clone()
        expected[2] *= 2
        assert torch.equal(mapped, expected)
        assert torch.equal(mapped @ mapped.mT, expected @ expected.mT)
        assert store["x"] is mapped


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux shows a process's mappings")
def test_a_mapped_array_takes_disk_space_and_no_name_in_the_directory(tmp_path):
    store = ActivationStore(0, tmp_path / "deep" / "er")
    array = store.allocate("x", (8 * 2**20,), torch.uint8)
    with open("/proc/self/maps") as maps:
        mapped = [line for line in maps if str(tmp_path) in line]
    assert any("(deleted)" in line for line in mapped)  # so that a killed process leaves nothing behind
    assert list((tmp_path / "deep" / "er").iterdir()) == []
    del array
    store.close()
    with open("/proc/self/maps") as maps:
        assert not any(str(tmp_path) in line for line in maps)


def test_an_array_outlives_its_name_while_someone_holds_it(tmp_path):
    with ActivationStore(0, tmp_path) as store:
        array = store.allocate("x", (1000,), torch.float32).fill_(3)
        store.free("x")
        assert store.disk_bytes == 0
    assert float(array.sum()) == 3000


def test_an_empty_array_needs_no_file(tmp_path):
    with ActivationStore(0, tmp_path) as store:
        assert store.allocate("x", (0, 5), torch.float32).shape == (0, 5)
        assert not store.on_disk("x")


def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    store = ActivationStore(10, tmp_path)
    with pytest.raises(ValueError, match=r"is full: activations 'x' need 400 bytes .* Free space, choose another") as e:
        store.allocate("x", (100,), torch.float32)
    assert str(tmp_path) in str(e.value)
    assert store.disk_bytes == 0
    assert list(tmp_path.iterdir()) == []


def test_a_size_no_disk_has_is_found_at_allocation_and_not_at_the_first_write(tmp_path):
    with pytest.raises(ValueError, match="activations 'x' need"):
        ActivationStore(0, tmp_path).allocate("x", (2**52,), torch.float32)


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be used"):
        ActivationStore(0, tmp_path / "file").allocate("x", (1,), torch.float32)


def test_a_name_is_allocated_once(tmp_path):
    with ActivationStore(100, tmp_path) as store:
        store.allocate("x", (1,), torch.float32)
        with pytest.raises(ValueError, match="'x' are already allocated"):
            store.allocate("x", (1,), torch.float32)


def test_a_negative_limit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="limit_bytes = -1"):
        ActivationStore(-1, tmp_path)
