from importlib.metadata import EntryPoint, EntryPoints

import pytest

from edgellm import registry
from edgellm.errors import UsageError

TABLE = {"ours": "edgellm.registry:attribute", "other": "edgellm.registry:load"}


@pytest.fixture(autouse=True)
def plug_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    points = EntryPoints(
        EntryPoint(name, value, "things")
        for name, value in {
            "theirs": "edgellm.registry:suggestion",
            "absent": "no_such_module:thing",
            "empty": "edgellm.registry:no_such_thing",
            "ours": "no_such_module:thing",
        }.items()
    )
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points)


def test_the_table_wins_over_plug_ins_and_both_are_known() -> None:
    assert registry.load(TABLE, "things", "ours", "thing") is registry.attribute
    assert registry.load(TABLE, "things", "theirs", "thing") is registry.suggestion
    assert registry.known_names(TABLE, "things") == ["ours", "other", "theirs", "absent", "empty"]


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_a_broken_plug_in_is_named(name: str) -> None:
    with pytest.raises(UsageError, match=f"the thing '{name}' of the package .* cannot be loaded"):
        registry.load(TABLE, "things", name, "thing")


def test_what_is_near_is_suggested_and_else_all() -> None:
    with pytest.raises(UsageError, match=r"no thing named 'our': did you mean ours or "):
        registry.load(TABLE, "things", "our", "thing")
    assert registry.suggestion("xyz", ["a", "b"]) == "choose a, b"
    assert registry.suggestion("q4_9", ["q4_1", "q4_0"]).startswith("did you mean q4_")
