"""Solvers: each file is one update rule, the loop around them is `phantom.solve.solve`."""
