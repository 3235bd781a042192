"""The report of an experiment: one HTML file for someone who did not run it, figures beside."""

from collections.abc import Mapping
from pathlib import Path

from pretrain.analysis import plots
from pretrain.analysis.page import Page, write_figures
from pretrain.registers.document import experiment_document
from pretrain.registers.experiment import Experiment
from pretrain.registers.findings import PLAUSIBLE, WITHIN, findings
from pretrain.registers.pictures import picture_table
from pretrain.registers.results import Effect, Result
from pretrain.registers.tables import block_table, effect_table, summary_table, task_table

TONES = {"needed": "bad", "not needed": "good", "undecided": "doubtful"}
QUESTION = (
    "Registers are tokens without an image of their own; attention passes through them. When zeros "
    "take their place, features of some models break. Is that because their content is needed, or "
    "because a zero is something that the model has never met? (Zero-ablation overstates register "
    "content dependence in DINO vision transformers, arXiv 2604.14433.)"
)
PROTOCOL = (
    "After each of the blocks the tokens of a set are replaced before the next block sees them, all "
    "at once; all else is computed as always. The model is frozen and in fp32.",
    "zero: zeros. mean: the mean token of calibration images at that block and place. noise: that "
    "mean plus normal noise of each channel's deviation. shuffle: the tokens of another image of the "
    "batch, another one at each block. bank: the tokens of a random calibration image, another one "
    "at each block. random: a random direction, as long as the token was. Every draw is a function "
    "of seed, image, block and place.",
    "A fixed probe was fitted on the full model's features (can what reads them go on); a refit one "
    "on those of the condition (is the information there). recall@1: the nearest other image has the "
    "same class. Correspondence: patches of an image matched with those of a random affine or "
    "projective warp of it, right within one patch of the true place; cycle consistency: there and "
    "back within one patch.",
    "Intervals are 95 % bootstrap intervals over images, of differences paired by image; p-values "
    "are of random sign flips of the paired differences, two-sided: all of them where they are no "
    "more than 10,000. Neither is corrected for the number of rows; `needed` in the answer is "
    "(Bonferroni).",
)
CAVEATS = (
    "A zero is far from every token that the model has met (distance: Mahalanobis's with a diagonal "
    "covariance over root D, about 1 for a token like those of the calibration images; ln norm "
    "ratio: 0 for a usual norm). What it costs overstates what the content is worth: judge content "
    "by " + ", ".join(PLAUSIBLE) + ".",
    "A small or young model may hardly use its registers at all; then zeros do nothing either, and nothing "
    "follows about other models. Look at the attention they get, and at the control on patches.",
    f"Within {WITHIN:g} point needs the interval, not the mean: of 10,000 images the standard error of an "
    "accuracy is about half a point, of 200 about 3 points.",
    "Patch cosines and correspondence leave out patches that were replaced themselves; probes, recall "
    "and segmentation do not.",
)


def write_report(path: Path, experiment: Experiment, title: str, facts: Mapping[str, str]) -> None:
    """Write the page, and the figures beside it.

    Raises:
        InputError: a file cannot be written.
    """
    report_page(experiment, title, facts).write(path)
    write_figures(path, experiment_document(experiment))


def report_page(experiment: Experiment, title: str, facts: Mapping[str, str]) -> Page:
    """Answer first, then evidence, pictures, protocol and caveats."""
    page, result = Page(title, QUESTION), experiment.result
    for found in findings(result):
        page.verdict(found.line, TONES[found.verdict])
    for condition in experiment.left_out:
        page.verdict(f"{condition}: left out, the model has no registers")
    page.section("Result", f"Of {result.images} images. A star: p below 5 %, each cell for itself.")
    page.table(*summary_table(result))
    page.section("Task by task", "Differences to the full model in points, paired by image.")
    for task in result.scores:
        page.table(*task_table(task, result))
    _inside(page, result)
    if experiment.pictured is not None:
        page.section("Pictures", "The three main components of the full model's output patches as colours.")
        page.pictures(*picture_table(experiment.pictured))
    page.section("Protocol", *PROTOCOL)
    page.facts(facts)
    page.section("How to read this", *CAVEATS)
    return page


def _inside(page: Page, result: Result) -> None:
    page.section(
        "What patches and attention show",
        "Cosines of patches with the full model's. Effective rank of its patches: "
        f"{result.effective_rank:.1f} (exp of the entropy of the eigenvalues of the Gram of unit "
        "patches, mean over images). JS: Jensen-Shannon divergence of attention rows in nats, at "
        "most 0.69, mean over heads and queries; at block 0 it is 0, as tokens are replaced after "
        "it. On it: percent of attention on the set at the last block, of the full model to that of "
        "the condition.",
    )
    page.table(*effect_table(result))
    effects = {name: effect for name, effect in result.effects.items() if effect.attention}
    if effects:
        _attention(page, effects)


def _attention(page: Page, effects: Mapping[str, Effect]) -> None:
    """How far it moves, a plot for each set of tokens; what it has on each set; the figures by block."""
    for tokens in dict.fromkeys(name.rpartition(":")[0] for name in effects):
        curves = {
            name: effect.attention["divergence"]
            for name, effect in effects.items()
            if name.rpartition(":")[0] == tokens
        }
        plot = plots.lines(curves, "block", "Jensen-Shannon divergence, nats")
        caption = f"Attention under conditions on {tokens}, from the full model's."
        page.figure((plot, f"divergence of attention by block, {tokens}"), caption)
    masses = {}
    for name, effect in effects.items():
        tokens = name.rpartition(":")[0]
        masses[f"class token on {tokens}"] = [100 * share for share in effect.attention["cls_full"]]
        masses[f"patches on {tokens}"] = [100 * share for share in effect.attention["patch_full"]]
    plot = plots.lines(masses, "block", "attention, %")
    page.figure((plot, "attention on each set by block"), "Attention of the full model on each set.")
    page.table(*block_table(effects, "divergence"))
