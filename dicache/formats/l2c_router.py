"""Learning-to-Cache's router, a torch checkpoint; nothing in it is executed.

References:
    horseee/learning-to-cache; the file is read by `dicache.calibrate.l2c.read_router`.
"""

from pathlib import Path

from dicache.calibrate.l2c import LearningToCache, read_router
from dicache.calibrate.methods import CalibrationError
from dicache.formats.format import Format, FormatError, Given, Read

THRESHOLD = 0.1  # of most of the published routers


def read(path: Path, given: Given) -> Read:
    threshold = given.settings.get("threshold")
    method = LearningToCache(THRESHOLD if threshold is None else threshold)
    try:
        made = method.schedule(read_router(path), given.anatomy, given.target, given.steps, given.model)
    except CalibrationError as error:
        raise FormatError(str(error)) from None
    return Read(made.method, made.settings, plan=made.plan)


FORMAT = Format(
    name="l2c-router",
    engine="learning-to-cache, the published routers",
    source="horseee/learning-to-cache: DiT/models/router_models.py",
    suffix=".pt",
    holds="a share of computing for each branch at every second step",
    loses="-",
    read=read,
)
