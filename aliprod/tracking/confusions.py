"""What an ensemble takes for what, as a picture."""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aliprod.catalogue.catalogue import Catalogue
from aliprod.ensemble.guesses import guesses, read_predictions

_CLASSES = 24  # that a picture has room for


def picture(folder: Path, catalogue: Catalogue, split: str) -> Image.Image | None:
    """The confusion matrix of what a committed ensemble predicts for a split, of the classes with the most errors; None
    where no predicted image has a label."""
    known, _, truth, guess = guesses(*read_predictions(folder), catalogue, split)
    if not len(known):
        return None
    wrong = truth != guess
    errors = np.bincount(np.concatenate([truth[wrong], guess[wrong]]), minlength=catalogue.num_classes)
    shown = np.sort(np.argsort(-errors, kind="stable")[:_CLASSES])
    inside = np.isin(truth, shown) & np.isin(guess, shown)
    counts = np.zeros((len(shown), len(shown)), np.int64)
    np.add.at(counts, (np.searchsorted(shown, truth[inside]), np.searchsorted(shown, guess[inside])), 1)
    names = [catalogue.name(row) for row in shown]
    return _drawn(counts, names, f"{len(known):,} images of {split}; {len(shown)} of {catalogue.num_classes:,} classes")


def _drawn(counts: NDArray[np.int64], names: list[str], title: str) -> Image.Image:
    from matplotlib.figure import Figure  # most runs draw none until their end

    figure = Figure(figsize=(7, 6.5), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(counts / counts.sum(axis=1, keepdims=True).clip(1), cmap="Blues", vmin=0, vmax=1)
    for truth, guess in np.argwhere(counts):
        share = counts[truth, guess] / counts[truth].sum()
        colour = "white" if share > 0.5 else "black"
        axes.text(guess, truth, counts[truth, guess], ha="center", va="center", color=colour, fontsize=8)
    short = [name if len(name) <= 20 else f"{name[:19]}\N{HORIZONTAL ELLIPSIS}" for name in names]
    axes.set_xticks(range(len(short)), short, rotation=90, fontsize=8)
    axes.set_yticks(range(len(short)), short, fontsize=8)
    axes.set(xlabel="predicted", ylabel="label", title=title)
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png")
    return Image.open(pixels)
