"""One browser for all tests of the page."""

import pytest

from support.browser import launched


@pytest.fixture(scope="session")
def browser():
    with launched() as browser:
        yield browser
