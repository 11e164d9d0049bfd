"""docs/models.md is what the registry says, and nothing else."""

from omnirt_tasks.registry import Verification, discover
from omnirt_tasks.registry.table import LEVEL_WORDS, markdown
from tests.support.processes import PROJECT


def test_the_page_of_models_is_what_the_registry_says() -> None:
    page = (PROJECT / "docs" / "models.md").read_text(encoding="utf-8")
    assert page == markdown(discover()) + "\n", "run `make docs`"


def test_every_model_has_its_line_and_every_level_its_words() -> None:
    page = markdown(discover())
    assert all(f"| `{spec.id}`" in page for spec in discover())
    assert set(LEVEL_WORDS) == set(Verification)
