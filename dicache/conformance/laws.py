"""The laws of the runtime, each a function that raises where a model breaks it."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dicache.anatomy.inputs import moved_inputs
from dicache.anatomy.macs import TOTAL, count_macs
from dicache.anatomy.nested import tensors_of
from dicache.anatomy.overrides import Overrides, forward_of
from dicache.anatomy.probing import same
from dicache.conformance.subject import Place, Subject, attributes, error, rounding
from dicache.runtime.errors import CacheWarning
from dicache.schedules import PlanError, Rule
from dicache.schedules.policies import FirstBlockPolicy, Policy, TeaCachePolicy

Law = Callable[[Subject], int]  # returns how many cases were tried


class LawError(AssertionError):
    """A model breaks a law of the runtime: what was found, and what had to be."""


class _BrokenError(Exception):
    pass


def computing(subject: Subject) -> int:
    """a plan that computes everything changes nothing, bit for bit, and runs nothing besides"""
    want = [subject.call(inputs) for inputs in subject.calls]
    rules = (Rule("reuse", "CCC"), Rule("skip", "CCC"))
    with subject.steps(subject.plan(*rules, steps=3)) as (cache, step):
        got = [step(inputs) for inputs in subject.calls[:2]]
        macs = count_macs(lambda: got.append(step(subject.calls[2])))[TOTAL]
        held = cache.stats.peak_bytes_held
    for place, (one, other) in enumerate(zip(got, want, strict=True)):
        if not same(one, other):
            raise LawError(f"with everything computed the output of step {place} differs by {error(one, other):.2g}")
    _same("with everything computed the model runs", macs, count_macs(lambda: subject.call(subject.calls[2]))[TOTAL])
    _same("bytes kept for nobody:", held, 0)
    return len(want)


def reusing_all(subject: Subject) -> int:
    """with every site reused none of their products runs, nor a norm that feeds only them; the output is the same"""
    anatomy = subject.anatomy
    with subject.counted_norms() as norms:
        want = subject.call(subject.inputs)
        if idle := [path for block in anatomy.blocks for path in block.norms if not norms[f"{block.module}.{path}"]]:
            raise LawError(f"the norm {idle[0]} does not run even when everything is computed")
        first, second, macs = subject.twice(Rule("reuse", "C."), between=norms.clear)
    sites = sum(site.macs for block in anatomy.blocks for site in block.sites)
    _same("with every site reused the model runs", macs, anatomy.macs - sites)
    if norms:
        raise LawError(f"with every site reused the norm {next(iter(norms))} still runs")
    if not (same(first, want) and same(second, want)):
        raise LawError(f"with every site reused and equal inputs the output differs by {error(second, want):.2g}")
    return len(anatomy.sites)


def reusing_one(subject: Subject) -> int:
    """reusing one site takes away exactly its work"""
    cases = [(block, site) for block in subject.representatives() for site in block.sites]
    want = subject.call(subject.inputs)
    for block, site in cases:
        rule = Rule("reuse", "C.", blocks=str(block.index), branch=site.branch)
        _, second, macs = subject.twice(rule)
        work = sum(other.macs for other in block.sites if rule.covers(other.branch))  # `mlp` is `mlp.context` as well
        if not site.macs:
            raise LawError(f"{block.key(site)} does no work")
        _same(f"with {block.key(site)} reused the model runs", macs, subject.anatomy.macs - work)
        if not same(second, want):
            raise LawError(f"with {block.key(site)} reused and equal inputs the output differs")
    return len(cases)


def stale(subject: Subject) -> int:
    """what is reused is the branches' output of the step before; the stream is that of this one"""
    now = moved_inputs(subject.model, subject.inputs, time=False)
    fresh = subject.call(now)
    for rule in (Rule("reuse", "C."), Rule("skip", "C.", blocks=_skippable(subject))):
        with _left(subject) as left:
            _, out = subject.replay(subject.plan(rule, steps=2), (subject.inputs, now))
        if same(out, fresh):
            raise LawError(f"a step that is to {rule.action} gives what a computed one does: nothing was reused")
        if len(left) == 2 and same(*left):
            raise LawError("with every branch reused the stream leaves the blocks as it did before, with other latents")
        if not all(bool(tensor.isfinite().all()) for tensor in out):
            raise LawError(f"a step that is to {rule.action} gives NaN or infinity")
    return 2


@contextmanager
def _left(subject: Subject) -> Iterator[list[list[Tensor]]]:
    """Collect what leaves the last block, where it runs."""
    seen: list[list[Tensor]] = []
    last = subject.model.get_submodule(subject.anatomy.blocks[-1].module)
    forward = forward_of(last)

    def run(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        seen.append(list(tensors_of(out)))
        return out

    with Overrides() as overrides:
        overrides.set(last, run)
        yield seen


def skipping_one(subject: Subject) -> int:
    """the delta of each block by itself gives the output again, and the block runs no product"""
    blocks = [
        b.index for b in subject.representatives() if not subject.anatomy.obstacle(b.index, b.index + 1, delta=True)
    ]
    for index in blocks:
        _skips(subject, str(index), index, index + 1)
    return len(blocks)


def skipping_ranges(subject: Subject) -> int:
    """so does one delta of each range of blocks in a segment"""
    ranges = subject.ranges()
    for start, stop in ranges:
        _skips(subject, f"{start}-{stop - 1}", start, stop)
    return len(ranges)


def skipping_body(subject: Subject) -> int:
    """and one delta a segment of all blocks"""
    if subject.anatomy.links:
        return 0  # a U-Net has no delta of all its blocks
    _skips(subject, "*", 0, len(subject.anatomy.blocks))
    return 1


def deciding(subject: Subject) -> int:
    """a policy that never skips changes nothing; one that skips on equal inputs gives the output again"""
    if subject.anatomy.links:
        return 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheWarning)  # its thresholds are meant to skip nothing, and everything
        return _deciding(subject)


def _deciding(subject: Subject) -> int:
    never: list[Policy] = [TeaCachePolicy(0, coefficients=(1.0, 0.0), input_range=(0.0, 100.0)), FirstBlockPolicy(0)]
    always: list[Policy] = [TeaCachePolicy(9, coefficients=(1.0, 0.0), input_range=(0.0, 100.0)), FirstBlockPolicy(9)]
    want = [subject.call(inputs) for inputs in subject.calls]
    cases = 0
    for careful, bold in zip(never, always, strict=True):
        try:
            careful.skipped(subject.anatomy)
        except PlanError:  # the method does not fit the model, and says so
            continue
        cases += 1
        if not all(map(same, subject.replay(subject.policy(careful, steps=3), subject.calls), want)):
            raise LawError(f"{careful.name} with the threshold 0 changes the output")
        _, out, macs = subject.twice_by(subject.policy(bold, steps=3))
        _same(
            f"with a step skipped by {bold.name} the model runs",
            macs,
            subject.anatomy.macs - bold.macs_saved(subject.anatomy),
        )
        _close(f"with a step skipped by {bold.name}", out, want[0])
    return cases


def restoring(subject: Subject) -> int:
    """detaching restores every attribute of every module, also after a failure, and the next run is a fresh one's"""
    at_first = attributes(subject.model)
    want = [subject.call(inputs) for inputs in subject.calls[:2]]
    before = attributes(subject.model)
    # What the model itself sets anew in a call is not there to be restored.
    before = {place: value for place, value in before.items() if at_first.get(place, value) is value}
    known = at_first.keys() | before.keys()
    schedule = subject.plan(Rule("reuse", "C."), steps=2)
    clean = subject.replay(schedule, subject.calls[:2])
    _restored(subject, before, known, "after a generation")
    blocks = subject.anatomy.blocks
    for index in (0, len(blocks) // 2, len(blocks) - 1):
        module = subject.model.get_submodule(blocks[index].module)
        with Overrides() as overrides:
            fails = _failing(forward_of(module))
            overrides.set(module, fails)
            try:
                subject.replay(schedule, subject.calls[:2])
            except _BrokenError:
                pass
            else:
                raise LawError(f"block {index} was not called")
        _restored(subject, before, known, f"after a failure in block {index}")
        if not all(map(same, subject.replay(schedule, subject.calls[:2]), clean)):
            raise LawError(f"after a failure in block {index} the next generation is another")
    if not all(map(same, [subject.call(inputs) for inputs in subject.calls[:2]], want)):
        raise LawError("after detaching the model gives another output")
    return 4


def keeping(subject: Subject) -> int:
    """what is kept is the tensor that the branch gave, not a copy, and nobody writes into it"""
    made: dict[str, list[Tensor]] = {}
    content: dict[str, list[Tensor]] = {}

    def watched(key: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            made[key] = list(tensors_of(out))
            content[key] = [tensor.clone() for tensor in made[key]]
            return out

        return run

    given = [value.clone() for value in _tensors(subject.inputs)]
    with Overrides() as overrides:
        for block in subject.anatomy.blocks:
            for site in block.sites:
                module = overrides.part(subject.model, f"{block.module}.{site.module}")
                overrides.set(module, watched(block.key(site), forward_of(module)))
        with subject.steps(subject.plan(Rule("reuse", "C.."), steps=3)) as (cache, step):
            step(subject.inputs)
            step(subject.calls[1])
            kept = cache.kept()
    for key in subject.anatomy.sites:
        if [id(tensor) for tensor in tensors_of(kept[key])] != [id(tensor) for tensor in made[key]]:
            raise LawError(f"what is kept of {key} is not the tensor that it gave")
        if not same(made[key], content[key]):
            raise LawError(f"what is kept of {key} was written into by the model; its blocks cannot be reused")
    if not same(_tensors(subject.inputs), given):
        raise LawError("the model's arguments were written into")
    return len(kept)


LAWS: dict[str, Law] = {
    "compute": computing,
    "reuse all": reusing_all,
    "reuse one": reusing_one,
    "stale": stale,
    "skip block": skipping_one,
    "skip range": skipping_ranges,
    "skip body": skipping_body,
    "decide": deciding,
    "restore": restoring,
    "keep": keeping,
}


def _skippable(subject: Subject) -> str:
    """Return a range of blocks that one delta, or one a segment, can stand for."""
    if not subject.anatomy.links:
        return "*"
    start, stop = max(subject.ranges(), key=lambda part: part[1] - part[0])
    return f"{start}-{stop - 1}"


def _skips(subject: Subject, blocks: str, start: int, stop: int) -> None:
    first, second, macs = subject.twice(Rule("skip", "C.", blocks=blocks))
    work = sum(block.macs for block in subject.anatomy.blocks[start:stop])
    _same(f"with blocks {blocks} skipped the model runs", macs, subject.anatomy.macs - work)
    _close(f"with blocks {blocks} skipped", second, first)


def _same(said: str, found: int, needed: int) -> None:
    if found != needed:
        raise LawError(f"{said} {found}, needed {needed}")


def _close(said: str, got: list[Tensor], want: list[Tensor]) -> None:
    found, allowed = error(got, want), rounding(want)
    if not found <= allowed:
        raise LawError(f"{said} and equal inputs the output differs by {found:.2g}, more than rounding ({allowed:.2g})")


def _restored(subject: Subject, before: Mapping[Place, Any], known: Set[Place], when: str) -> None:
    after = attributes(subject.model)
    changed = [place for place, value in before.items() if after.get(place, before) is not value]
    if left := [*changed, *(after.keys() - known)]:
        path, name = left[0]
        raise LawError(f"{when} {name} of {path or 'the model'} is not as it was")


def _failing(forward: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise _BrokenError
        return forward(*args, **kwargs)

    return fail


def _tensors(inputs: Any) -> list[Tensor]:
    return list(tensors_of((inputs.args, dict(inputs.kwargs))))
