"""Which training documents the filter keeps: those above a threshold, or a share of the training bytes."""

import dataclasses

import numpy as np

from nanophi.core.errors import UserError
from nanophi.core.formatting import percent
from nanophi.core.recipe import Quality


@dataclasses.dataclass(frozen=True)
class Selection:
    """What is kept: `kept`, bool `[documents]`."""

    kept: np.ndarray
    cutoff: float | None = None
    """The score of the last document that a share took, by which held-out documents are divided the same way; None: the
    threshold divides them, or nothing does."""


def choose(scores: np.ndarray, sizes: np.ndarray, ids: np.ndarray, quality: Quality, seed: int) -> Selection:
    """Choose training documents, of which scores, sizes in bytes and distinct ids are given.

    A share is taken from the best, the worst or a random end of the documents until their bytes come nearest to it,
    those with equal scores in random order. What is chosen depends on the documents and the seed, not on their order.
    """
    if quality.share is None:
        kept = np.ones(len(scores), bool) if quality.threshold is None else scores > quality.threshold
        if not kept.any():
            highest = f"; the highest score is {scores.max():.4f}" if len(scores) else ""
            raise UserError(f"quality.threshold {quality.threshold} keeps no document{highest}")
        return Selection(kept)
    by_score = quality.select != "random"
    if by_score and quality.share < 1 and len(scores) and scores.min() == scores.max():
        raise UserError(f"quality.select '{quality.select}': every document has the score {scores[0]:.4f}")
    shuffled = np.argsort(ids, kind="stable")
    np.random.default_rng([seed, 1]).shuffle(shuffled)
    key = {"best": -scores, "worst": scores, "random": np.zeros(len(scores))}[quality.select]
    order = shuffled[np.argsort(key[shuffled], kind="stable")]
    reached = np.concatenate([[0], np.cumsum(sizes[order], dtype=np.int64)])
    count = int(np.argmin(np.abs(reached - quality.share * reached[-1])))
    if count == 0:
        raise UserError(f"quality.share {quality.share:g} of {reached[-1]:,} bytes keeps no document")
    kept = np.zeros(len(scores), bool)
    kept[order[:count]] = True
    return Selection(kept, float(scores[order[count - 1]]) if by_score else None)


def divide(scores: np.ndarray, quality: Quality, cutoff: float | None) -> np.ndarray | None:
    """Which documents the filter would keep of those that it did not choose from; None if it treats all alike."""
    if cutoff is not None:
        return scores >= cutoff if quality.select == "best" else scores <= cutoff
    return None if quality.threshold is None else scores > quality.threshold


def describe_rule(quality: Quality) -> str:
    """The filter in words: `score > 0.5`, `the best 42.0 % of the bytes`, `all`."""
    if quality.share is not None:
        article = "a random" if quality.select == "random" else f"the {quality.select}"
        return f"{article} {percent(quality.share)} of the bytes"
    if quality.threshold is None:
        return "all"
    scale = "" if quality.scale is None else f" on a scale from {quality.scale[0]:g} to {quality.scale[1]:g}"
    return f"score > {quality.threshold:g}{scale}"
