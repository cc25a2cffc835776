"""The command line: one module a verb. Heavy imports stand inside the commands, so that help is instant."""

import click

from dicache import __version__
from dicache.cli.calibrate import calibrate
from dicache.cli.calibrate_adacache import adacache
from dicache.cli.calibrate_auto import auto
from dicache.cli.calibrate_dp import dp
from dicache.cli.calibrate_first_block import first_block
from dicache.cli.calibrate_l2c import l2c
from dicache.cli.calibrate_predicted import eoc, faster_diffusion, magcache, pab, smoothcache, taylorseer, tgate
from dicache.cli.calibrate_ranges import delta_cache, delta_dit, mask
from dicache.cli.calibrate_teacache import teacache
from dicache.cli.calibrate_unets import deepcache
from dicache.cli.command import Group
from dicache.cli.cost import cost
from dicache.cli.demo import demo
from dicache.cli.doctor import doctor
from dicache.cli.evaluate import evaluate
from dicache.cli.exchange import export_schedule, formats, import_schedule
from dicache.cli.exchange_profiles import export_profile, import_profile
from dicache.cli.generate import generate
from dicache.cli.models import models, zoo
from dicache.cli.plot import plot
from dicache.cli.profiles import profiles
from dicache.cli.profiling import profile
from dicache.cli.report import report
from dicache.cli.schedules import schedules

EPILOG = """\b
Completion of commands, options and model names, in ~/.bashrc:
  eval "$(_DICACHE_COMPLETE=bash_source dicache)"
Likewise zsh_source in ~/.zshrc, and fish_source.
"""


@click.group(cls=Group, epilog=EPILOG)
@click.version_option(__version__)
def main() -> None:
    """Measure a diffusion transformer once, decide which computations can be reused, and replay that at inference.

    \b
    dicache profile --model digits
    dicache calibrate teacache --target-speedup 1.8
    """


for command in (
    demo,
    models,
    zoo,
    doctor,
    profile,
    profiles,
    calibrate,
    schedules,
    generate,
    evaluate,
    cost,
    plot,
    report,
):
    main.add_command(command)
for method in (teacache, mask, delta_cache, delta_dit, deepcache):
    calibrate.add_command(method)
for method in (
    taylorseer,
    faster_diffusion,
    smoothcache,
    magcache,
    pab,
    adacache,
    first_block,
    tgate,
    l2c,
    eoc,
    dp,
    auto,
):
    calibrate.add_command(method)
for command in (export_schedule, import_schedule, formats):
    schedules.add_command(command)
for command in (export_profile, import_profile):
    profiles.add_command(command)
