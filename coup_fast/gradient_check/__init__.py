"""A self-test of gradients on the user's own models, and the adjoint that it compares with."""

from coup_fast.gradient_check.check import GradientCheck, check_gradient
from coup_fast.gradient_check.foreign import ForeignGradientCheck
from coup_fast.gradient_check.row import GradientRow

__all__ = ["ForeignGradientCheck", "GradientCheck", "GradientRow", "check_gradient"]
