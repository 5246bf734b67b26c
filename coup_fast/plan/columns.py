"""The columns of the rows that the operators read; csrc/params has the same ones."""

from __future__ import annotations

import numpy as np

from ..schedules import Array

# Columns of a reverse_step row:
#   x̂0 = clamp(p x + q m, lo, hi)
#   x' = out_scale * clamp(u x̂0 + v x + w m + c_i G + e r + d z, out_lo, out_hi) + out_bias
P, Q, X0_LO, X0_HI, U, V, W, C, E, D = range(10)
OUT_LO, OUT_HI, OUT_SCALE, OUT_BIAS, G_MAX, LOG_VAR_LO, LOG_VAR_HI, X_VAR, Z_VAR = range(10, 19)
ROW_COLUMNS = (
    *("p", "q", "x0_lo", "x0_hi", "u", "v", "w", "c", "e", "d"),
    *("out_lo", "out_hi", "out_scale", "out_bias", "g_max"),
    *("log_var_lo", "log_var_hi", "x_var", "z_var"),
)
NUM_COLUMNS = len(ROW_COLUMNS)

# Columns of a perturb row and of an adaptive_step row.
START_COLUMNS = ("scale", "bias", "std", "sign_std", "lo", "hi", "out_scale", "out_bias")
ADAPTIVE_COLUMNS = ("numerator", "alpha_min", "alpha_max", "tau", "scale", "bias", "lo", "hi")


def blank_row() -> Array:
    """A row that returns 0: no terms, no clamps, no output map."""
    row = np.zeros(NUM_COLUMNS)
    row[[X0_LO, OUT_LO]] = -np.inf
    row[[X0_HI, OUT_HI, G_MAX]] = np.inf
    row[OUT_SCALE] = 1.0
    return row
