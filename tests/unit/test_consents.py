"""What a server's owner permits, and which rows of the table of version pairs matter here."""

import pytest

from nahtlos.model.errors import Refused
from nahtlos.model.ids import ReleaseId
from nahtlos.model.nouns import Component, Release
from nahtlos.ops.version_rows import rows_that_matter
from nahtlos.runtime.controllers.consents import LONGEST_BUDGET_MS, checked_budget


@pytest.mark.parametrize("milliseconds", [0, -1, LONGEST_BUDGET_MS + 1])
def test_what_is_no_budget_is_refused_with_a_remedy(milliseconds: int) -> None:
    with pytest.raises(Refused) as refused:
        checked_budget(milliseconds)
    assert refused.value.field == "blackout_budget_ms"
    assert refused.value.remedy


def test_a_budget_is_kept_and_none_is_none() -> None:
    assert checked_budget(80) == 80
    assert checked_budget(None) == 0


def release(version: str, component: Component = Component.HYPERVISOR) -> Release:
    return Release(
        id=ReleaseId(f"{component}-{version}"),
        component=component,
        version=version,
        suite="here",
        digest="0" * 64,
        machine_types=(),
    )


def test_every_two_releases_have_their_rows_in_both_directions() -> None:
    built = [release("11.1.3"), release("7.2.22"), release("2.0", Component.NETWORK)]
    there, back = rows_that_matter(built, "tcg")
    assert (there.title, back.title) == ("7.2.22 to 11.1.3", "11.1.3 to 7.2.22")
    assert there.ok and "misses pages" in there.detail and "in-place: proven" in there.detail


def test_releases_nobody_has_tried_are_not_in_order() -> None:
    rows = rows_that_matter([release("9.2.0"), release("10.0.2")], "tcg")
    assert not any(row.ok for row in rows)
