"""What pictures are drawn from."""

import numpy as np

from flaxres.cli import plots


def test_running_mean_passes_over_what_is_not_finite():
    values = np.array([1.0, np.nan, 3.0, np.inf, np.nan, np.nan])
    np.testing.assert_array_equal(plots.smooth(values, 2), [1, 1, 3, 3, np.nan, np.nan])
    np.testing.assert_allclose(plots.smooth(np.arange(5.0), 3), [0, 0.5, 1, 2, 3])
