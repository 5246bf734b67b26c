"""A self-test of gradients on the user's own models, and the adjoint that it compares with."""

from coup_fast.gradient_check.check import GradientCheck, GradientRow, check_gradient

__all__ = ["GradientCheck", "GradientRow", "check_gradient"]
