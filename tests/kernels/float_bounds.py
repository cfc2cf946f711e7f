"""What the float kernel tests share: unit errors and the comparison under a bound."""

import numpy as np

ROUNDING = 2.0**-24  # relative error of one f32 operation
EXP_ERROR = 1e-7  # relative error of the kernels' exp


def assert_within(got, want, bound):
    error = np.abs(got.astype(np.float64) - want)
    bound = np.broadcast_to(bound, error.shape)
    excess = np.where(error <= bound, -np.inf, np.where(np.isnan(error), np.inf, error - bound))
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert np.all(error <= bound), (
        f"at {worst}: got {got[worst]!r}, want {want[worst]!r}, bound {bound[worst]:.3g}"
    )
