"""How much memory may still be taken."""

from pathlib import Path


def host_memory() -> int:
    """Return how many bytes this process may still take of the host's memory, a container's limit included."""
    import psutil  # type: ignore[import-untyped]  # accelerate brings it

    free = int(psutil.virtual_memory().available)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        held = Path("/sys/fs/cgroup/memory.stat").read_text().split()
        cached = int(held[held.index("inactive_file") + 1])  # given back when it is needed
    except (OSError, ValueError):  # no such container, or no limit
        return free
    return min(free, limit - used + cached)
