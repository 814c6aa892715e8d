"""What of the machine this process may use: cores, memory, file systems.

A container or a SLURM job sees all cores of its host in os.cpu_count(); its control group (Linux,
versions 1 and 2) says how many it gets.
"""

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NETWORKS = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "afs",
    "fuse.sshfs",
    "9p",
    "panfs",
}
UNLIMITED = 2**60  # bytes; version 1 writes a number near 2**63 for no limit


@dataclass(frozen=True)
class Cores:
    """Cores of the machine, those that this process may run on, and the time that it is given."""

    machine: int
    affinity: int
    quota: float | None

    @property
    def usable(self) -> int:
        given = math.floor(self.quota) if self.quota else self.affinity
        return max(min(self.affinity, given), 1)


class ControlGroup:
    """This process's limits in its own control group and in those above it."""

    def __init__(
        self, mount: Path = Path("/sys/fs/cgroup"), table: Path = Path("/proc/self/cgroup")
    ) -> None:
        self.mount, self.table = mount, table

    def cpu_quota(self) -> float | None:
        """Return the cores' worth of time that is given; None without a limit."""
        quotas = []
        for folder in self._folders(""):
            quota, _, period = _read(folder / "cpu.max").partition(" ")
            if quota.isdigit():
                quotas.append(int(quota) / int(period or 100_000))
        for folder in self._folders("cpu"):
            quota, period = (_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            if quota.isdigit() and period.isdigit():  # "-1" is no limit
                quotas.append(int(quota) / int(period))
        return min(quotas, default=None)

    def free_memory(self) -> int | None:
        """Return the bytes left below the lowest limit, files held in memory counted as free."""
        known = [
            ("", "memory.max", "memory.current", "inactive_file"),
            ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ]
        left = []
        for controller, limit_file, used_file, cached_key in known:
            for folder in self._folders(controller):
                limit, used = _read(folder / limit_file), _read(folder / used_file)
                if limit.isdigit() and used.isdigit() and int(limit) < UNLIMITED:
                    pairs = [line.split() for line in _read(folder / "memory.stat").splitlines()]
                    cached = next((int(v) for k, v in pairs if k == cached_key), 0)
                    left.append(int(limit) - int(used) + cached)
        return min(left, default=None)

    def _folders(self, controller: str) -> Iterator[Path]:
        """Yield the folders of the group and of those above it; "" is version 2's one hierarchy."""
        for line in _read(self.table).splitlines():
            _, names, place = line.split(":", 2)
            if controller in names.split(","):
                base = self.mount / controller
                # Seen from inside a container its own group may lie at the mount itself.
                folder = base / place.lstrip("/")
                yield from (f for f in (folder, *folder.parents) if f.is_relative_to(base))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def count_cores(group: ControlGroup | None = None) -> Cores:
    """Return how many cores there are and how many are really usable."""
    machine = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    return Cores(machine, affinity, (group or ControlGroup()).cpu_quota())


def free_memory(group: ControlGroup | None = None) -> int:
    """Return the bytes of memory that a new process can have without swapping."""
    import psutil  # third-party: imported by those checks alone that need it

    available = int(psutil.virtual_memory().available)
    return min(available, (group or ControlGroup()).free_memory() or available)


def existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def free_disk(path: Path) -> int:
    """Return the bytes free for a file or folder that need not be there yet."""
    return shutil.disk_usage(existing(path)).free


def file_system(path: Path, table: Path = Path("/proc/self/mounts")) -> str | None:
    """Return the type of the file system that holds a path; None where the system does not tell."""
    place, longest, found = existing(path).resolve(), "", None
    for line in _read(table).splitlines():
        _, mount, kind, *_ = line.split(" ")
        mount = mount.replace("\\040", " ")
        if place.is_relative_to(mount) and len(mount) >= len(longest):
            longest, found = mount, kind
    return found
