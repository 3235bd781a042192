"""The report of a probing run: where to probe, for someone who did not run it."""

from collections.abc import Mapping, Sequence

from pretrain.analysis import plots
from pretrain.analysis.page import Page, Table
from pretrain.probing.distances import IMAGES
from pretrain.probing.rows import Row, best
from pretrain.probing.summary import (
    answer,
    chosen_table,
    controls_table,
    grid,
    modules_table,
    plain,
    tasks,
)

QUESTION = (
    "A frozen vision transformer is usually probed at the output of its last block. Under distribution shift "
    "another layer, or another module inside a block, can be better (arXiv 2603.05280). Which one is it here?"
)
MODULES = (
    "Modules of a block, in the order of the computation: LN1 first norm, MHA attention, RC1 after the first "
    "residual, LN2 second norm, FC1 before the activation, Act after it, FC2 output of the feed-forward "
    "layer, RC2 output of the block; MHA_LS and FC2_LS are MHA and FC2 times LayerScale."
)
CAVEATS = (
    "The place, the module and the strength of the probe are chosen on validation images, never on test "
    "images. Figures called oracle choose on the test images, as the paper's table 1 does: nobody could have "
    "known them, and they are too high.",
    "Act and FC1 are wider than the other modules; their controls have the width of the model. A difference "
    "that a control has too is one of width.",
    "Intervals are 95 % bootstrap intervals over test images (over groups where there are any) of one fitted "
    "probe: they hold the chance of the test images, not that of the training images. With many probes, "
    "some differences of a point come by chance.",
    "`transfer`: fitted on clean images, tested on shifted ones. `pretrain`: fitted and tested on shifted "
    "images, which are far from what the model was pretrained on; this is the paper's protocol.",
)


def report_page(title: str, rows: Sequence[Row], shifts: Table | None, facts: Mapping[str, str]) -> Page:
    """Answer first, then maps, tables, controls, protocol and caveats."""
    page = Page(title, QUESTION)
    for fitted, protocol in tasks(rows):
        of_task = [row for row in rows if (row.fitted_on, row.protocol) == (fitted, protocol)]
        page.verdict(f"{fitted} ({protocol}): {answer(of_task)}")
    for fitted, protocol in tasks(rows):
        of_task = [row for row in rows if (row.fitted_on, row.protocol) == (fitted, protocol)]
        _task(page, of_task, f"Fitted on {fitted} ({protocol})")
    _modules(page, rows)
    if any(row.control != "none" for row in rows):
        _controls(page, rows)
    if shifts is not None:
        text = (
            "Of the output of the last block against the images that probes are fitted on: proxy A-distance "
            "(0: a linear map cannot tell the sets apart, 2: it always can), Frechet distance, squared "
            "distance of the means (linear MMD), and the points of k-NN accuracy that the shift costs. "
            f"Of each set {IMAGES:,} images are drawn where there are more."
        )
        page.section("How far the sets are shifted", text)
        page.table(*shifts)
    page.section("Protocol", MODULES)
    page.facts(facts)
    page.section("How to read this", *CAVEATS)
    return page


def _task(page: Page, rows: Sequence[Row], heading: str) -> None:
    page.section(heading)
    page.table(*chosen_table(rows))
    pool = best(plain(rows)).pool
    for name in (None, *rows[0].test):
        blocks, points, values = grid(rows, pool, name)
        what = f"{name or 'validation'} accuracy, %"
        picture = plots.labelled_heat_map(values, blocks, points, "block", what)
        page.figure((picture, f"{what} by block and module"), f"Pool: {pool}.")


def _modules(page: Page, rows: Sequence[Row]) -> None:
    page.section(
        "Modules",
        "The best test accuracy over the blocks, in percent, and the share of test sets on which a module is "
        "the best: the paper's table 1, an oracle's view.",
    )
    pool = best(plain(rows)).pool
    page.text(f"Pool: {pool}.")
    page.table(*modules_table(rows, pool))


def _controls(page: Page, rows: Sequence[Row]) -> None:
    page.section("Controls of width", "The best block of each module by validation, and its controls.")
    for fitted, protocol in tasks(rows):
        page.text(f"Fitted on {fitted} ({protocol}):")
        of_task = [row for row in rows if (row.fitted_on, row.protocol) == (fitted, protocol)]
        page.table(*controls_table(of_task))
