"""A claim holds where its number stands in the relation to the bound."""

import math

import pytest

from scripts.running.measures.claims import claim, significant


@pytest.mark.parametrize(
    ("measured", "relation", "holds"),
    [(0.5, "<", True), (1.0, "<", False), (1.0, "<=", True), (1.0, ">", False), (1.0, ">=", True), (2.0, ">", True)],
)
def test_a_claim_holds(measured, relation, holds):
    assert claim("text", measured, relation, 1) == {
        "claim": "text",
        "measured": measured,
        "needed": f"{relation} 1",
        "holds": holds,
    }


@pytest.mark.parametrize("relation", ["<", "<=", ">", ">="])
def test_nothing_measured_proves_nothing(relation):
    assert not claim("text", math.nan, relation, 0)["holds"]


def test_the_verdict_is_that_of_the_number_before_it_is_rounded():
    assert not claim("text", 1 - 1e-12, ">=", 1)["holds"]
    assert significant(0.123456789) == 0.123457 and significant(123456789.0, 3) == 1.23e8
