"""Metrics against values worked out by hand, and intervals against their definitions."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from hydraopt.evaluation.metrics import (
    Score,
    UnicodeWords,
    accuracy,
    exact_match,
    macro_f1,
    rouge_l,
    score_labels,
    score_texts,
    wilson_interval,
)


def test_accuracy_counts_a_missing_answer_as_wrong():
    assert accuracy(["a", None, "c", "a"], ["a", "b", "c", "c"]) == 0.5


def test_macro_f1_by_hand():
    """a: precision 2/3, recall 1, F1 4/5; b: precision 1, recall 1/2, F1 2/3."""
    assert macro_f1(["a", "a", "a", "b"], ["a", "a", "b", "b"]) == pytest.approx((4 / 5 + 2 / 3) / 2)


def test_macro_f1_weighs_rare_labels_as_much_as_frequent_ones():
    """Always answering the frequent label: F1 of it 2 * 9 / (10 + 9), of the rare one 0."""
    assert macro_f1(["a"] * 10, ["a"] * 9 + ["b"]) == pytest.approx((18 / 19) / 2)


def test_a_label_only_predicted_is_not_averaged_over():
    """a: recall 1/2, precision 1, F1 2/3; b: F1 1. "z" lowers the recall of a and nothing else."""
    assert macro_f1(["a", "z", "b"], ["a", "a", "b"]) == pytest.approx((2 / 3 + 1) / 2)
    assert macro_f1(["a", None, "b"], ["a", "a", "b"]) == pytest.approx((2 / 3 + 1) / 2)


def plain_macro_f1(predicted, expected):
    scores = []
    for label in set(expected):
        right = sum(p == e == label for p, e in zip(predicted, expected, strict=True))
        claimed, actual = predicted.count(label), expected.count(label)
        scores.append(2 * right / (claimed + actual))
    return sum(scores) / len(scores)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abc")), min_size=1, max_size=40))
def test_macro_f1_is_its_definition(pairs):
    predicted, expected = [p for p, _ in pairs], [e for _, e in pairs]
    assert macro_f1(predicted, expected) == pytest.approx(plain_macro_f1(predicted, expected), abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("yes", ["no", "yes"], 1.0),
        ("  new \n york ", ["new york"], 1.0),
        ("cafe\u0301", ["caf\u00e9"], 1.0),
        ("Yes", ["yes"], 0.0),
        ("yes.", ["yes"], 0.0),
        ("", ["yes"], 0.0),
    ],
)
def test_exact_match(answer, references, score):
    assert exact_match(answer, references) == score


def test_rouge_l_by_hand():
    """Longest common subsequence "the cat the mat": 4 of 6 and 4 of 5 words."""
    precision, recall = 4 / 5, 4 / 6
    expected = 2 * precision * recall / (precision + recall)
    assert rouge_l("the cat by the mat", ["the cat sat on the mat"]) == pytest.approx(expected)


def test_rouge_l_takes_the_best_reference():
    assert rouge_l("b c", ["x y", "b c", "b"]) == 1.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't x_y 3.5", ["don", "t", "x", "y", "3", "5"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("我爱ABC你", ["我", "爱", "abc", "你"]),
        ("ありがとう", ["あ", "り", "が", "と", "う"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("Привет, мир", ["привет", "мир"]),
        ("مرحبا بالعالم", ["مرحبا", "بالعالم"]),
        ("\uff21\uff22\uff23\uff11 \ufb01n", ["abc1", "fin"]),  # full width, and a ligature
        ("", []),
    ],
)
def test_words_of_any_script(text, words):
    assert UnicodeWords().tokenize(text) == words


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.sampled_from("ab cde,.-1'\n"), max_size=30),
    st.text(st.sampled_from("ab cde,.-1'\n"), max_size=30),
)
def test_english_is_scored_as_the_library_does_without_stemming(answer, reference):
    assume(UnicodeWords().tokenize(reference))
    standard = RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
    assert rouge_l(answer, [reference]) == pytest.approx(standard)


def test_a_reference_without_words_is_met_by_itself_alone():
    """The library finds no word in it and gives every answer 0."""
    assert rouge_l(" :-)\n", [":-)"]) == 1
    assert rouge_l(":-(", [":-)"]) == 0
    assert rouge_l("a face", [":-)"]) == 0
    assert rouge_l("a face", [":-)", "a face"]) == 1


def test_wilson_interval_solves_its_equation():
    """The ends are the shares p with |p - 7/10| = z sqrt(p (1 - p) / n)."""
    z = 1.959963984540054
    for end in wilson_interval(7, 10):
        assert abs(end - 0.7) == pytest.approx(z * math.sqrt(end * (1 - end) / 10))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.data())
def test_wilson_interval_holds_the_share_and_stays_a_share(trials, data):
    successes = data.draw(st.integers(0, trials))
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1
    assert low < high


def test_wilson_interval_covers_the_truth_as_often_as_it_says():
    rng = random.Random(0)
    truth, hits = 0.9, 0
    for _ in range(2000):
        low, high = wilson_interval(sum(rng.random() < truth for _ in range(60)), 60)
        hits += low <= truth <= high
    # 0.95 up to the coverage's known ripple and the noise of 2000 draws (0.005).
    assert 0.92 <= hits / 2000 <= 0.98


def test_scores_of_labels_hold_both_metrics_and_repeat_exactly():
    predicted = ["a", "b", "c", None] * 20
    expected = ["a", "b", "b", "c"] * 20
    scores = score_labels(predicted, expected)
    assert set(scores) == {"accuracy", "macro_f1"}
    assert scores["accuracy"].value == 0.5
    assert (scores["accuracy"].low, scores["accuracy"].high) == wilson_interval(40, 80)
    for score in scores.values():
        assert 0 <= score.low <= score.value <= score.high <= 1
        assert score.low < score.high
    assert scores == score_labels(predicted, expected)


@pytest.mark.parametrize("wrong", [None, "z"])
def test_an_answer_that_is_no_label_counts_for_none_in_the_interval_too(wrong):
    """In every resample F1 of "a" is 1 and of "b" 0, so there is nothing to vary."""
    scores = score_labels(["a"] * 20 + [wrong] * 20, ["a"] * 20 + ["b"] * 20)
    assert scores["macro_f1"] == Score(0.5, 0.5, 0.5)


def test_an_interval_holds_its_value_even_where_resamples_score_higher():
    """Of each pair of labels the first is always answered: F1 2/3 and 0. A resample often lacks one of a rare pair,
    and then scores 1 for the first without the second, or leaves the second out: resamples lie near 0.39, not 1/3."""
    expected = [f"{side}{pair}" for pair in range(100) for side in "ab"]
    score = score_labels([f"a{label[1:]}" for label in expected], expected)["macro_f1"]
    assert score.value == pytest.approx(1 / 3)
    assert score.low <= score.value < score.high


def test_scores_of_texts_are_means_over_rows():
    scores = score_texts(["a b", "c", None, "d e"], [["a b"], ["x"], ["y"], ["d"]])
    assert scores["exact_match"].value == 0.25
    assert scores["rouge_l"].value == pytest.approx((1 + 0 + 0 + 2 / 3) / 4)
    assert scores["rouge_l"].low < scores["rouge_l"].value < scores["rouge_l"].high


def test_scores_of_texts_repeat_exactly():
    texts = [" ".join(["w"] * (1 + row % 7)) for row in range(40)], [["w w w w"]] * 40
    first = score_texts(*texts)
    assert first["rouge_l"].low < first["rouge_l"].value < first["rouge_l"].high
    assert score_texts(*texts) == first


def test_the_bootstrap_interval_is_about_two_standard_errors_wide():
    """For a mean of 400 values with variance 1/12 a standard error is sqrt(1/12/400) = 0.0144."""
    rng = random.Random(1)
    # An answer of w words that shares all with a reference of 20 has F1 = 2 w / (w + 20).
    predicted, references = [], []
    for _ in range(400):
        predicted.append(" ".join(["w"] * rng.randint(1, 20)))
        references.append([" ".join(["w"] * 20)])
    score = score_texts(predicted, references)["rouge_l"]
    values = [2 * len(p.split()) / (len(p.split()) + 20) for p in predicted]
    mean = sum(values) / 400
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 400 / 400)
    assert score.value == pytest.approx(mean)
    # 1000 resamples give the quantiles to a few percent.
    assert (score.high - score.low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize(("predicted", "expected"), [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_unequal_or_no_rows_are_refused(predicted, expected):
    with pytest.raises(ValueError, match="predictions for"):
        score_labels(predicted, expected)
    with pytest.raises(ValueError, match="predictions for"):
        score_texts(predicted, [[e] for e in expected])
