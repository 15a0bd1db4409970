"""Calibration by hand: bins, expected error, curve and thresholds."""

import math

import pytest

from fc_lightning.calibration import Coverage, calibrate, calibration_figure


def test_expected_error_is_the_weighted_gap_of_the_bins():
    # Bin (0.9, 1]: confidence 0.95, accuracy 0.5. Bin (0.5, 0.6]: confidence 0.6, accuracy 1.
    calibration = calibrate([0.92, 0.98, 0.6], [True, False, True], num_bins=10)
    assert calibration.expected_error == pytest.approx((2 * 0.45 + 1 * 0.4) / 3)
    filled = [b for b in calibration.bins if b.num_examples]
    assert [(b.low, b.num_examples, b.accuracy) for b in filled] == [(0.5, 1, 1.0), (0.9, 2, 0.5)]


def test_edges_belong_to_the_bin_below_and_zero_to_the_first():
    counts = [b.num_examples for b in calibrate([0.0, 0.5, 1.0], [True] * 3, num_bins=2).bins]
    assert counts == [2, 1]


def test_a_confidence_a_rounding_error_above_one_is_in_the_last_bin():
    assert calibrate([1 + 1e-9], [True], num_bins=2).bins[1].num_examples == 1


def test_fifteen_bins_are_the_default():
    assert len(calibrate([0.5], [True]).bins) == 15


def test_equal_confidences_are_accepted_together():
    curve = calibrate([0.9, 0.9, 0.8, 0.7], [True, False, True, True]).curve
    assert curve == (
        Coverage(0.9, 0.5, 0.5),
        Coverage(0.8, 0.75, pytest.approx(2 / 3)),
        Coverage(0.7, 1.0, 0.75),
    )


def test_the_threshold_is_the_lowest_that_reaches_the_accuracy():
    calibration = calibrate([0.9, 0.8, 0.7, 0.6, 0.5], [True, True, False, True, False])
    assert calibration.threshold_for(1.0) == Coverage(0.8, 0.4, 1.0)
    assert calibration.threshold_for(0.75) == Coverage(0.6, 0.8, 0.75)
    assert calibration.threshold_for(0.5).coverage == 1
    assert calibrate([0.9], [False]).threshold_for(0.5) is None


def test_no_examples_give_nan_and_an_empty_curve():
    calibration = calibrate([], [])
    assert math.isnan(calibration.expected_error)
    assert calibration.curve == () and calibration.threshold_for(0.9) is None
    calibration_figure(calibration)


def test_the_figure_draws_a_bar_for_each_filled_bin_and_the_curve():
    figure = calibration_figure(calibrate([0.9, 0.8, 0.1], [True, False, False]))
    reliability, coverage = figure.axes
    assert len(reliability.patches) == 3
    assert len(coverage.lines[0].get_xdata()) == 3
