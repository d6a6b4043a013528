"""docs/models.md: what it promises of other people's models runs."""

import pytest

from documents import run_snippets


# Of slices of one projection; and Keras's own, of NumPy 2.
@pytest.mark.filterwarnings("ignore::heedful_torch.CopyWarning", "ignore::DeprecationWarning")
def test_snippets_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    assert run_snippets("docs/models.md") == 8
