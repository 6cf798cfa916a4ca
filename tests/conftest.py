"""One thread per process: the suite shares its cores, and results do not depend on their number."""

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def denormal_numbers() -> Iterator[None]:
    """Undo what a run on a CPU sets for its whole process: other tests compute with numbers of 1e-40."""
    yield
    torch.set_flush_denormal(False)
