"""How `pytest -n 2 --dist loadgroup` shares out the tests; without -n the marks do nothing."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests stay on one worker, so that its fixtures are made once; one Ray cluster at a time."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if item.get_closest_marker("ray") else item.path.name))
