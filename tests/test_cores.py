"""How many cores a container, a batch system or the user grants, and what the log says of it."""

import os

import pytest

import mnist_resnet9 as m
from support import cores


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that makes a machine of 64 cores with these files; their paths are absolute."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)

    def make(files):
        for path, text in files.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return make


V1 = "12:pids:/a\n4:cpu,cpuacct:/docker/7f\n1:name=systemd:/x\n0::/\n"
HYBRID = "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": ""}, 64),
        # at the process's own group, and above it: the least
        ({"proc/self/cgroup": "0::/a/b/c\n", "sys/fs/cgroup/a/b/c/cpu.max": "300000 100000"}, 3),
        (
            {
                "proc/self/cgroup": "0::/a/b/c\n",
                "sys/fs/cgroup/a/cpu.max": "500000 100000",
                "sys/fs/cgroup/a/b/c/cpu.max": "max 100000",
            },
            5,
        ),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "500000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "50000 10000",
                "sys/fs/cgroup/z/cpu.max": "10 10",
            },
            5,
        ),
        # the host's path, where the container sees its own group as the top
        ({"proc/self/cgroup": "0::/docker/7f\n", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        ({"proc/self/cgroup": "0::/../../x\n", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        ({"proc/self/cgroup": "0::/a:b\n", "sys/fs/cgroup/a:b/cpu.max": "400000 100000"}, 4),
        # version 1, and both
        (
            {
                "proc/self/cgroup": V1,
                f"{HYBRID}/docker/7f/cpu.cfs_quota_us": "250000",
                f"{HYBRID}/docker/7f/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": V1,
                f"{HYBRID}/cpu.cfs_quota_us": "100000",
                f"{HYBRID}/cpu.cfs_period_us": "100000",
            },
            1,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": V1,
                f"{HYBRID}/cpu.cfs_quota_us": "-1",
                f"{HYBRID}/cpu.cfs_period_us": "100000",
            },
            64,
        ),
        ({"proc/self/cgroup": V1, f"{HYBRID}/cpu.cfs_quota_us": "100000"}, 64),
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/unified/cpu.max": "200000 100000"}, 2),
        ({"proc/self/cgroup": "no colons\n\n"}, 64),
    ],
)
def test_quotas(files, expected, machine):
    assert cores.available_cores(machine(files)) == expected


def test_the_least_of_all_grants_counts_and_is_named(machine, monkeypatch):
    root = machine({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1600000 100000\n"})
    said = []
    for change in (
        lambda: None,
        lambda: monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12))),
        lambda: monkeypatch.setattr(os, "process_cpu_count", lambda: 9, raising=False),
        lambda: monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6"),
        lambda: monkeypatch.setattr(os, "cpu_count", lambda: 1),
    ):
        change()
        said.append(cores.cores_to_use(root=root))
    assert said == [
        (16, "16 cores (of 64: the quota of its control group)"),
        (12, "12 cores (of 64: the affinity of this process)"),
        (9, "9 cores (of 64: Python's cpu_count)"),
        (6, "6 cores (of 64: SLURM_CPUS_PER_TASK)"),
        (1, "1 core"),
    ]


@pytest.mark.parametrize("value", ["", "0", "-3", "two", "2(x3)", "4.0"])
def test_what_slurm_does_not_say_is_not_counted(value, machine, monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", value)
    assert cores.available_cores(machine({})) == 64


def test_a_machine_that_does_not_know_its_cores(machine, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores.cores_to_use(root=machine({})) == (1, "1 core")


def test_no_more_processes_than_there_is_work(machine):
    root = machine({})
    assert cores.cores_to_use(0, 32, root) == (32, "32 cores (of 64: there is work for no more)")
    assert cores.cores_to_use(256, 32, root) == (32, "32 cores (of 256: there is work for no more)")
    assert cores.cores_to_use(3, 32, root) == (3, "3 cores")
    # the user's word goes above what is granted
    assert cores.cores_to_use(200, None, root) == (200, "200 cores")


def test_the_work_of_a_step_and_of_an_evaluation():
    assert m.most_cores(m.Settings()) == 32  # 1,024 images of an evaluation in shards of 32
    assert m.most_cores(m.Settings(batch_size=1)) == 32
    assert m.most_cores(m.Settings(batch_size=1001)) == 126


def test_a_run_starts_no_more_processes_and_says_so(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(m.workers, "use", lambda count, functions: asked.append(count))
    flags = "--data-dir data/sample --device cpu --train-images 16 --epochs-max 1 --threads 200"
    assert m.main([*flags.split(), "--channels", "2,4,4,4", "--save-dir", str(tmp_path)]) == 0
    assert asked == [31]
    said = "CPU, 32 cores (of 200: there is work for no more); files in"
    assert said in capsys.readouterr().out and said in (tmp_path / "resnet9/log.txt").read_text()


@pytest.mark.parametrize("count", [0, -1, 2.0, "2", None])
def test_a_number_of_cores_that_is_none_gets_one_line(count):
    with pytest.raises(m.UserError, match="^use_cores: .* should be a whole number of at least 1$"):
        m.use_cores(count)
    assert m.workers.count == 0
