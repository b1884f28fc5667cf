"""What the platform tells about free memory."""

import pytest
import torch

from actmaps.maps import memory


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine of 8 GiB, 6 of them free, with no limit; further limits are set by writing its files."""
    (tmp_path / "meminfo").write_text("MemTotal: 8388608 kB\nMemFree: 1024 kB\nMemAvailable: 6291456 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    group = tuple(tmp_path / name for name in ("limit", "usage", "stat"))
    monkeypatch.setattr(memory, "_CONTROL_GROUPS", (group,))
    return tmp_path


def limit(system, size, usage, cache):
    (system / "limit").write_text(f"{size}\n")
    (system / "usage").write_text(f"{usage}\n")
    (system / "stat").write_text(f"anon 17\ninactive_file {cache}\n")


GIB = 2**30


def test_free_and_total_memory_of_this_machine():
    free, total = memory.available_memory(torch.device("cpu"))
    assert 0 < free < total or total == 0  # (0, 0) where there is no /proc


def test_without_a_container_the_machine_counts(system):
    assert memory.available_memory(torch.device("cpu")) == (6 * GIB, 8 * GIB)


def test_a_container_has_its_limit_less_its_usage_plus_what_can_be_dropped(system):
    limit(system, 4 * GIB, 3 * GIB, GIB // 2)
    assert memory.available_memory(torch.device("cpu")) == (GIB + GIB // 2, 4 * GIB)


def test_a_container_cannot_have_more_than_the_machine(system):
    limit(system, 7 * GIB, 0, 0)
    assert memory.available_memory(torch.device("cpu")) == (6 * GIB, 7 * GIB)


@pytest.mark.parametrize("size", ["max", 2**63 - 4096])
def test_a_container_without_limit_is_the_machine(system, size):
    limit(system, size, GIB, 0)
    assert memory.available_memory(torch.device("cpu")) == (6 * GIB, 8 * GIB)


def test_unknown_platforms_and_devices_tell_nothing(system):
    assert memory.available_memory(torch.device("meta")) == (0, 0)
    (system / "meminfo").unlink()
    assert memory.available_memory(torch.device("cpu")) == (0, 0)


def test_on_a_gpu_memory_that_torch_holds_in_reserve_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (2 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 5 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 4 * GIB)
    assert memory.available_memory(torch.device("cuda")) == (3 * GIB, 16 * GIB)
