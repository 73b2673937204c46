"""Fixtures that several test files share. A file asks for one with `pytestmark = pytest.mark.usefixtures(...)`."""

import pytest
import torch


def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


one_thread = pytest.fixture(scope="module", name="one_thread")(_one_thread)
one_thread_each = pytest.fixture(name="one_thread_each")(_one_thread)  # where a test may change the number itself
