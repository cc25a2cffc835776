"""Which executor replays a schedule."""

from torch import nn

from dicache.runtime.adaptive import Adaptive
from dicache.runtime.compiled import CompiledAdaptive, CompiledReplay, Compiling
from dicache.runtime.executor import Executor, Installer
from dicache.runtime.ranks import Ranks
from dicache.runtime.replay import Replay
from dicache.runtime.stats import Stats
from dicache.runtime.storing import Store
from dicache.schedules import Schedule


def executor_of(
    schedule: Schedule,
    model: nn.Module,
    installer: Installer,
    stats: Stats,
    ranks: Ranks,
    store: Store | None,
    compiling: Compiling | None,
) -> Executor:
    """Return what replays a schedule on a model: its plan or its policy, compiled or not."""
    if schedule.plan is not None:
        if compiling is not None:
            return CompiledReplay(model, schedule, installer, stats, store, compiling)
        return Replay(model, schedule, installer, stats, store)
    assert schedule.policy is not None
    anatomy, policy = schedule.anatomy, schedule.policy
    if compiling is not None:
        return CompiledAdaptive(model, anatomy, policy, installer, stats, ranks, store, compiling)
    return Adaptive(model, anatomy, policy, installer, stats, ranks, store)
