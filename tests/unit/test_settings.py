"""A wrong setting is refused when a process starts, by its name and with what it may be."""

import pytest

from omnirt_tasks.contract import Tier
from omnirt_tasks.errors import ConfigurationError
from omnirt_tasks.settings import load_settings


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("OMNIRT_DISABLED_TIERS", '["experimantal"]', "'core', 'adjacent' or 'experimental'"),
        ("OMNIRT_TAGS", '["EU"]', "OMNIRT_TAGS.0"),
        ("OMNIRT_TAGS", '["a+b"]', "OMNIRT_TAGS.0"),
        ("OMNIRT_TAGS", '["a", "b", "c", "d", "e"]', "at most 4"),
        ("OMNIRT_QUEUE_LIMIT", "0", "OMNIRT_QUEUE_LIMIT"),
        ("OMNIRT_MAX_BATCH_SIZE", "0", "greater than or equal to 1"),
        ("OMNIRT_BATCH_WINDOW_MS", "-1", "greater than or equal to 0"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(ConfigurationError, match=name) as caught:
        load_settings()
    assert told in str(caught.value)


def test_tags_and_tiers_are_read_from_json_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNIRT_TAGS", '["gold", "eu", "gold"]')
    monkeypatch.setenv("OMNIRT_DISABLED_TIERS", '["experimental"]')

    settings = load_settings()

    assert settings.tags == ("eu", "gold")
    assert settings.disabled_tiers == (Tier.EXPERIMENTAL,)
