"""Train implicit models: solvers for z = f(z), and estimators of the gradient through the equilibrium.

solution = phantom.fixed_point(f, z0, solver=Broyden(max_steps=20, tol=1e-4), grad=UPG(k=5, lam=0.5))
loss(solution.value).backward()
"""

from phantom import diagnostics
from phantom.check import check
from phantom.deq import DEQ, fixed_point
from phantom.gradient.adjoint import NPG, AdjointEstimator, Implicit
from phantom.gradient.base import GradientEstimator
from phantom.gradient.one_step import OneStep
from phantom.gradient.shine import SHINE
from phantom.gradient.unroll import BPTT, UPG
from phantom.layers import SpectralNorm, WeightNorm, variational_mask
from phantom.regularization import JacobianRegularizer
from phantom.report import SolveError, SolveWarning, describe
from phantom.solution import Solution, Stats
from phantom.solver.anderson import Anderson
from phantom.solver.base import Solver
from phantom.solver.broyden import Broyden
from phantom.solver.fixed_point import FixedPoint
from phantom.solver.rollout import Rollout
from phantom.state import State

__version__ = "0.1.0"

__all__ = [
    "BPTT",
    "DEQ",
    "NPG",
    "SHINE",
    "UPG",
    "AdjointEstimator",
    "Anderson",
    "Broyden",
    "FixedPoint",
    "GradientEstimator",
    "Implicit",
    "JacobianRegularizer",
    "OneStep",
    "Rollout",
    "Solution",
    "SolveError",
    "SolveWarning",
    "Solver",
    "SpectralNorm",
    "State",
    "Stats",
    "WeightNorm",
    "check",
    "describe",
    "diagnostics",
    "fixed_point",
    "variational_mask",
]
