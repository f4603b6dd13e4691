"""How many cores this program may compute on: what the machine has, less what others keep from it.

A container or a batch system often shows every core of the machine and grants the time of a few. A
process for each core that can be seen would then take memory and wait for the others.
"""

import math
import os
from pathlib import Path


def quotas(root="/"):
    """The cores that control groups grant, one number for each limit found. Linux has them.

    A group is a folder, and lies within others; each may have a limit, in microseconds of computing
    in a period. /proc/self/cgroup has a line for each tree of groups: number:controllers:path. In
    version 2 of this interface there is one tree, and its controllers are not named. A container
    often sees its own group as the top of the tree, and the path as the host's: so whatever is
    there on the way up counts."""
    try:
        lines = Path(root, "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return []
    top = Path(root, "sys/fs/cgroup")
    found = []
    for line in lines:
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers == "":
            trees, read = [top, top / "unified"], version2
        elif "cpu" in controllers.split(","):
            trees, read = [top / controllers, top / "cpu"], version1
        else:
            continue
        names = [name for name in path.split("/") if name not in ("", ".", "..")]
        for tree in trees:
            for depth in range(len(names) + 1):
                try:
                    quota, period = read(tree.joinpath(*names[:depth]))
                    if quota > 0 and period > 0:
                        found.append(max(1, math.ceil(quota / period)))
                except (OSError, ValueError):  # no such file, or "max", which is no number
                    pass
    return found


def version2(folder):
    quota, period = (folder / "cpu.max").read_text().split()
    return int(quota), int(period)


def version1(folder):
    quota = (folder / "cpu.cfs_quota_us").read_text()
    return int(quota), int((folder / "cpu.cfs_period_us").read_text())


def grants(root="/"):
    """[(cores, who grants no more)], what the machine has first."""
    found = [(os.cpu_count() or 1, "the machine")]
    if hasattr(os, "sched_getaffinity"):
        found.append((len(os.sched_getaffinity(0)), "the affinity of this process"))
    found += [(cores, "the quota of its control group") for cores in quotas(root)]
    if hasattr(os, "process_cpu_count"):  # from Python 3.13 on; -X cpu_count sets it
        found.append((os.process_cpu_count() or 1, "Python's cpu_count"))
    slurm = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if slurm.isdecimal() and int(slurm):
        found.append((int(slurm), "SLURM_CPUS_PER_TASK"))
    return found


def available_cores(root="/"):
    return min(cores for cores, _ in grants(root))


def cores_to_use(asked=0, most=None, root="/"):
    """(number, words): the cores to compute on, and what the log says of them.

    asked: how many the user wants; 0 = all that are granted. most: how many have work."""
    found = [(asked, "")] if asked else grants(root)
    there = found[0][0]
    if most is not None:
        found.append((most, "there is work for no more"))
    cores, why = min(found, key=lambda grant: grant[0])
    words = "1 core" if cores == 1 else f"{cores} cores"
    if cores < there:
        words += f" (of {there}: {why})"
    return cores, words
