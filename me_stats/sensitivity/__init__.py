"""How results move with the mixing weights λ: exact derivatives on toys, estimates from traces, re-weighting."""

from me_stats.sensitivity.estimate import Estimate, mean_estimate
from me_stats.sensitivity.exact import ExpectationPolynomial, exact_curvature, exact_expectation, exact_gradient
from me_stats.sensitivity.gradient import common_random_number_difference, score_function_gradient
from me_stats.sensitivity.reweight import Reweighted, Statistic, reweight

__all__ = [
    "Estimate",
    "ExpectationPolynomial",
    "Reweighted",
    "Statistic",
    "common_random_number_difference",
    "exact_curvature",
    "exact_expectation",
    "exact_gradient",
    "mean_estimate",
    "reweight",
    "score_function_gradient",
]
