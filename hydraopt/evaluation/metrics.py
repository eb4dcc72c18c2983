"""Scores in [0, 1], higher is better, each with a 95 % confidence interval.

Adding a metric for generated text is one function ``(answer, references) -> score`` in ``_ROW_SCORES``.
A prediction of ``None`` (the model gave no finite output) is always wrong.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sklearn.metrics import f1_score

Z_95 = 1.959963984540054  # the normal distribution's 97.5 % quantile
RESAMPLES = 1000
_SEED = 0
# Scripts written without spaces: a word boundary would need a dictionary, so every letter is a token.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "HENTAIGANA")


T = TypeVar("T")


class Score(NamedTuple):
    """A metric's value and the 95 % interval around it, all in [0, 1]."""

    value: float
    low: float
    high: float


def accuracy(predicted: Sequence[str | None], expected: Sequence[str]) -> float:
    """Share of rows whose label is right."""
    return _share([guess == truth for guess, truth in _pairs(predicted, expected)])


def macro_f1(predicted: Sequence[str | None], expected: Sequence[str]) -> float:
    """F1 of each label that occurs in ``expected``, averaged with equal weight.

    Labels that only a prediction uses are not averaged over: else two models would be measured on
    different sets of labels. Their wrong predictions still count against recall.
    """
    guesses, truths = zip(*_pairs(predicted, expected), strict=True)
    ids = {label: index for index, label in enumerate(sorted(set(truths)))}
    return float(
        f1_score(
            [ids[truth] for truth in truths],
            [ids.get(guess, len(ids)) for guess in guesses],
            labels=list(range(len(ids))),
            average="macro",
            zero_division=0.0,
        )
    )


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the answer is one of the references, Unicode forms and runs of white space apart, else 0.0.

    Case and punctuation count: for corrections and code they are the point.
    """
    return float(_plain(answer) in {_plain(reference) for reference in references})


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of words, for the best reference (Lin, 2004).

    A reference without words, such as ``:-)``, is met by itself alone.

    Words are split for any script (see :class:`UnicodeWords`); for English text the result is that of
    ``rouge_score``'s own splitting without stemming.
    """
    return max(_rouge_l(answer, reference) for reference in references)


def _rouge_l(answer: str, reference: str) -> float:
    if not UnicodeWords().tokenize(reference):
        return exact_match(answer, [reference])
    return float(_ROUGE.score(reference, answer)["rougeL"].fmeasure)


class UnicodeWords(Tokenizer):  # type: ignore[misc]  # untyped library
    """Lower-cased runs of letters, digits and their marks; single letters in scripts without spaces.

    The tokenizer of ``rouge_score`` keeps a-z and 0-9 only, so it scores every Hindi or Chinese text 0.
    """

    def tokenize(self, text: str) -> list[str]:
        """The words of ``text`` in order."""
        words: list[str] = []
        inside = False
        for character in unicodedata.normalize("NFKC", text).lower():
            category = unicodedata.category(character)
            if category[0] == "M" and words and inside:
                words[-1] += character  # a vowel sign or accent belongs to its letter
            elif category[0] not in "LN":
                inside = False
            elif unicodedata.name(character, "").startswith(_UNSPACED):
                words.append(character)
                inside = True
            elif inside and not unicodedata.name(words[-1][0], "").startswith(_UNSPACED):
                words[-1] += character
            else:
                words.append(character)
                inside = True
        return words


def score_labels(predicted: Sequence[str | None], expected: Sequence[str]) -> dict[str, Score]:
    """Accuracy with a Wilson interval and macro F1 with a bootstrap interval.

    Args:
        predicted: n >= 1 labels.
        expected: The n right ones.

    Raises:
        ValueError: If the lengths differ or are zero.
    """
    right = sum(guess == truth for guess, truth in _pairs(predicted, expected))
    share = accuracy(predicted, expected)
    f1 = macro_f1(predicted, expected)
    return {
        "accuracy": Score(share, *wilson_interval(right, len(expected))),
        "macro_f1": _around(f1, _macro_f1_resamples(predicted, expected)),
    }


def score_texts(predicted: Sequence[str | None], references: Sequence[Sequence[str]]) -> dict[str, Score]:
    """Mean over rows of every metric for generated text, with its interval.

    Args:
        predicted: n >= 1 answers.
        references: The right answers of each row, at least one.

    Raises:
        ValueError: If the lengths differ or are zero.
    """
    pairs = _pairs(predicted, references)
    scores = {}
    for name, score in _ROW_SCORES.items():
        rows = [0.0 if answer is None else score(answer, truths) for answer, truths in pairs]
        if name in _YES_OR_NO:
            scores[name] = Score(_share(rows), *wilson_interval(round(sum(rows)), len(rows)))
        else:
            scores[name] = _around(_share(rows), _mean_resamples(rows))
    return scores


def wilson_interval(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share: within [0, 1], and right near its ends too.

    Args:
        successes: In 0..trials.
        trials: At least 1.
        z: Quantile of the normal distribution.
    """
    share = successes / trials
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    # At the ends the exact bound is 0 or 1; rounding must not push it past the value itself.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == trials else centre + half)


def _around(value: float, resamples: NDArray[np.float64]) -> Score:
    low, high = np.quantile(resamples, [0.025, 0.975])
    return Score(value, min(float(low), value), max(float(high), value))


def _mean_resamples(rows: Sequence[float]) -> NDArray[np.float64]:
    """Means of RESAMPLES bootstrap samples, (RESAMPLES,). The seed is fixed: equal rows, equal intervals."""
    values = np.asarray(rows, dtype=np.float64)
    rng = np.random.default_rng(_SEED)
    return np.array([values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)])


def _macro_f1_resamples(predicted: Sequence[str | None], expected: Sequence[str]) -> NDArray[np.float64]:
    """Macro F1 of RESAMPLES bootstrap samples, (RESAMPLES,), from weighted counts instead of copied rows."""
    labels = sorted(set(expected))
    ids = {label: index for index, label in enumerate(labels)}
    truth = np.array([ids[label] for label in expected])
    guess = np.array(
        [ids.get(label, len(labels)) if label is not None else len(labels) for label in predicted]
    )
    rng = np.random.default_rng(_SEED)
    size, results = len(truth), np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        drawn = rng.integers(size, size=size)
        t, g = truth[drawn], guess[drawn]
        right = np.bincount(t[t == g], minlength=len(labels))
        actual = np.bincount(t, minlength=len(labels))
        claimed = np.bincount(g, minlength=len(labels) + 1)[: len(labels)]
        present = actual > 0  # a label the sample missed says nothing about the model
        results[index] = np.mean(2 * right[present] / (actual + claimed)[present])
    return results


def _pairs(predicted: Sequence[str | None], expected: Sequence[T]) -> list[tuple[str | None, T]]:
    if len(predicted) != len(expected) or not expected:
        raise ValueError(
            f"got {len(predicted)} predictions for {len(expected)} rows; expected equally many, at least 1"
        )
    return list(zip(predicted, expected, strict=True))


def _share(rows: Sequence[float]) -> float:
    return math.fsum(rows) / len(rows)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


_ROUGE = RougeScorer(["rougeL"], tokenizer=UnicodeWords())
_ROW_SCORES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "rouge_l": rouge_l,
}
_YES_OR_NO = frozenset({"exact_match"})
