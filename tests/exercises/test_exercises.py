"""Check your answers: python -m pytest tests/exercises -k ex3"""

import checks
import exercises
import pytest


@pytest.mark.parametrize('name', checks.CHECKS)
def test(name):
    checks.CHECKS[name](exercises)
