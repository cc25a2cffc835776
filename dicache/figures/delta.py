"""Delta-DiT's map: how much each block's delta is like that of the step before."""

from matplotlib.figure import Figure

from dicache.figures.heatmap import colour_bar, colour_scale, describe, draw, mean_over_runs
from dicache.figures.page import new_page, whole_numbers
from dicache.profiler import Profile


def delta_map(profile: Profile) -> Figure:
    """Draw the cosine of each block's delta with the same block's delta at the step before.

    A delta is what a block adds to its input. The mean over runs and guidance passes is drawn, step 0 at the left and
    block 0 at the top.

    Raises:
        ProfileError: If there is no finished run, or only one step.

    References:
        Delta-DiT, arXiv 2406.01125, figure 4c.
    """
    measured = describe(profile, of="mean of ")
    table = mean_over_runs(profile.delta_cosine)  # (b, s)
    scale = colour_scale([table])
    height = min(max(1.1 + 0.2 * len(table), 2.6), 5.6)
    figure = new_page(
        7.2, height, "How much each block's delta is like that of the step before", f"{measured}. {scale}"
    )
    axes = figure.add_subplot()
    image = draw(axes, table, scale)
    whole_numbers(axes, x=11, y=min(len(table), 10))
    colour_bar(figure, image, [axes], scale, "cosine with the step before")
    return figure
