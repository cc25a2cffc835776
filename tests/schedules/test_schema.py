import json
from typing import Any

import jsonschema
import pytest

from dicache.anatomy import Anatomy, Block, Site
from dicache.calibrate.fora import Fora
from dicache.calibrate.methods import planned_schedule
from dicache.schedules import FirstBlockPolicy, Plan, Rule, Schedule, ScheduleError, Target, TeaCachePolicy
from dicache.schedules.schema import schema_text
from tests.tiny import anatomy_of, dit, pixart

SCHEMA = json.loads(schema_text())
TARGET = Target("fa7a", "float32", (4, 8, 8), "DDIMScheduler", 4, (3.0, 2.0, 1.0, 0.0), (3.0, 2.0, 1.0, 0.0))
TEACACHE = TeaCachePolicy(0.1, (1.0, 0.0), (0.0, 0.3))
LINE = {2: ((1, 2.0), (0, -1.0)), 3: ((1, 3.0), (0, -2.0))}
SCHEDULES = [
    planned_schedule(Fora(2), anatomy_of(dit), TARGET, 4),
    planned_schedule(Fora(2, branches=("mlp",)), anatomy_of(pixart), Target(), 4),
    planned_schedule(Fora(2), anatomy_of(dit), TARGET, 4).resampled((3.0, 1.5, 0.0), 3),
    Schedule("x", {}, anatomy_of(dit), Target(), 4, Plan(4, (Rule("skip", "CC..", "1-2", context="cond"),))),
    Schedule("x", {}, anatomy_of(dit), Target(), 4, Plan(4, (Rule("reuse", "CC..", predictor="taylor", order=2),))),
    Schedule("x", {}, anatomy_of(dit), Target(), 4, Plan(4, (Rule("skip", "CC..", "0-1", predictor="feature"),))),
    Schedule(
        "x", {}, anatomy_of(dit), Target(), 4, Plan(4, (Rule("skip", "CC..", predictor="forecast", weights=LINE),))
    ),
    Schedule("teacache", {"threshold": 0.1}, anatomy_of(dit), TARGET, 4, policy=TEACACHE),
    Schedule("x", {}, anatomy_of(pixart), Target(), 4, Plan(4, (Rule("reuse", "CC..", branch="cross_attn"),), 2)),
    Schedule("first-block", {}, anatomy_of(dit), TARGET, 4, policy=FirstBlockPolicy(0.1, 2, 1, 3)),
    Schedule(
        "x",
        {},
        Anatomy("M", (Block(0, "b", 0, "B", (None, "x"), (Site("attn", "a"),)),), ((0, 1),)),
        Target(),
        1,
        Plan(1),
    ),
]


def written(schedule: Schedule) -> Any:
    return json.loads(json.dumps(schedule.to_json()))


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"].endswith("2020-12/schema")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_that_is_made_is_valid(schedule: Schedule) -> None:
    jsonschema.validate(written(schedule), SCHEMA, cls=jsonschema.Draft202012Validator)
    assert written(Schedule.from_json(written(schedule))) == written(schedule)


def broken() -> list[Any]:
    fora, forecast, teacache, first_block = (written(SCHEDULES[place]) for place in (0, 6, 7, 9))
    first = first_block["policy"]
    rule, weighed = fora["plan"]["rules"][0], forecast["plan"]["rules"][0]
    return [
        {**fora, "colour": "red"},
        {key: value for key, value in fora.items() if key != "anatomy"},
        {key: value for key, value in fora.items() if key != "plan"},
        {**fora, "policy": teacache["policy"]},
        {**fora, "format": "dicache.schedule/2"},
        {**fora, "steps": "4"},
        {**fora, "steps": True},
        {**fora, "plan": {**fora["plan"], "rules": [{**rule, "action": "guess"}]}},
        {**fora, "plan": {**fora["plan"], "rules": [{**rule, "steps": "CXC."}]}},
        {**fora, "plan": {**fora["plan"], "rules": [{**rule, "predictor": "feature"}]}},
        {**fora, "plan": {**fora["plan"], "rules": [{**rule, "order": 1}]}},
        {**fora, "plan": {**fora["plan"], "rules": [{**rule, "predictor": "taylor", "order": 5}]}},
        {**fora, "plan": {**fora["plan"], "rules": [{**rule, "weights": LINE}]}},
        {
            **fora,
            "plan": {**fora["plan"], "rules": [{key: value for key, value in weighed.items() if key != "weights"}]},
        },
        {**fora, "plan": {**fora["plan"], "rules": [{**weighed, "weights": {"2": {"x": 1.0}, "3": {"1": 1.0}}}]}},
        {**fora, "plan": {**fora["plan"], "rules": [{**weighed, "weights": {"2": {"1": "1"}, "3": {"1": 1.0}}}]}},
        {**fora, "plan": {**fora["plan"], "collapse_guidance_from": 0}},
        {**fora, "plan": {**fora["plan"], "collapse_guidance_from": True}},
        {**fora, "plan": {**fora["plan"], "collapse_guidance_from": None}},
        {**fora, "corrections": {"form": "multiply"}},
        {**fora, "plan": {**fora["plan"], "rules": [{**rule, "blocks": "a-b"}]}},
        {**fora, "made_for": {**fora["made_for"], "mood": 1}},
        {**fora, "made_for": {**fora["made_for"], "latents": "4x8x8"}},
        {**fora, "anatomy": {**fora["anatomy"], "extra": 1}},
        {**teacache, "policy": {**teacache["policy"], "threshold": -1}},
        {**teacache, "policy": {**teacache["policy"], "input_range": [1, 2, 3]}},
        {**first_block, "policy": {**first, "threshold": -0.1}},
        {**first_block, "policy": {**first, "threshold": None}},
        {**first_block, "policy": {**first, "first": 0}},
        {**first_block, "policy": {**first, "last": -1}},
        {**first_block, "policy": {**first, "last": True}},
        {**first_block, "policy": {**first, "max_continuous": 0}},
        {**first_block, "policy": {**first, "max_cached": -1}},
        {**first_block, "policy": {**first, "at_threshold": "maybe"}},
        {**first_block, "policy": {key: value for key, value in first.items() if key != "max_cached"}},
        {**first_block, "policy": {**first, "negative": "clamp"}},
    ]


@pytest.mark.parametrize("content", broken())
def test_schema_and_reader_refuse_the_same(content: Any) -> None:
    with pytest.raises(ScheduleError):
        Schedule.from_json(content)
    assert not jsonschema.Draft202012Validator(SCHEMA).is_valid(content)
