"""Rounds of the fault drill: each breaks a real run from outside, and says whether it ends as promised."""
