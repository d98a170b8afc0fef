"""How much memory is left: of the machine, of control groups of both versions, of the process."""

import os
import resource

import pytest

from fxc.memory import available

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path):
    """A file system that says 8 GiB, to which tests add control groups."""

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    write("proc/meminfo", f"MemTotal: 99 kB\nMemAvailable:   {8 * GIB // 1024} kB\n")
    return tmp_path, write


def test_without_limits_it_is_what_the_machine_has(machine):
    root, write = machine
    assert available(root) == 8 * GIB
    write("proc/self/cgroup", "0::/\n")
    write("sys/fs/cgroup/memory.max", "max\n")
    write("sys/fs/cgroup/memory.current", "5\n")
    assert available(root) == 8 * GIB


def test_a_group_around_ours_limits_it_too(machine):
    root, write = machine
    write("proc/self/cgroup", "0::/slice/job\n")
    write("sys/fs/cgroup/slice/memory.max", f"{3 * GIB}\n")
    write("sys/fs/cgroup/slice/memory.current", f"{2 * GIB}\n")
    write("sys/fs/cgroup/slice/memory.stat", f"anon 7\ninactive_file {GIB // 2}\nactive_file 9\n")
    assert available(root) == 3 * GIB // 2
    write("sys/fs/cgroup/slice/job/memory.max", f"{GIB}\n")
    write("sys/fs/cgroup/slice/job/memory.current", f"{2 * GIB}\n")
    assert available(root) == 0


def test_groups_of_version_one(machine):
    root, write = machine
    write("proc/self/cgroup", "5:devices:/x\n4:memory:/job\n0::/\n")
    write("sys/fs/cgroup/memory/job/memory.limit_in_bytes", f"{4 * GIB}\n")
    write("sys/fs/cgroup/memory/job/memory.usage_in_bytes", f"{GIB}\n")
    write("sys/fs/cgroup/memory/job/memory.stat", f"inactive_file 1\ntotal_inactive_file {GIB}\n")
    assert available(root) == 4 * GIB


def test_a_limit_of_the_process_counts(machine, monkeypatch):
    root, write = machine
    write("proc/self/statm", "262144 1 1 1 0 1 0\n")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4 * GIB, 4 * GIB))
    assert available(root) == 4 * GIB - 262144 * resource.getpagesize()


def test_where_nothing_is_said_nothing_is_known(tmp_path):
    assert available(tmp_path) is None


def test_this_machine_says_something_plausible():
    found = available()
    assert found is None or 0 < found <= resource.getpagesize() * os.sysconf("SC_PHYS_PAGES")
