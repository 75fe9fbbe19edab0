"""Check your answers: python -m pytest tests/exercises -k ex3_"""

import checks
import exercises
import pytest


@pytest.mark.parametrize('name', checks.CHECKS, ids='{}_'.format)
def test(name, capsys):
    found = checks.CHECKS[name](exercises)
    with capsys.disabled():
        print(f'\n{name}: {found}')
