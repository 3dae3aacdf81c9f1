"""Killed without warning, anywhere and as often as the seed says, tars of pictures are those of a run never killed."""

from __future__ import annotations

import pytest

from tests.benchmarks.generate_kills import Unbroken, one_story, unbroken_run
from tests.kills import kill_in_all

pytestmark = pytest.mark.timeout(3000)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """Tars that were never killed, drawn by one actor, and how long that took."""
    return unbroken_run(tmp_path_factory.mktemp("whole"))


def test_pictures_killed_on_their_way_are_those_never_killed(whole: Unbroken) -> None:
    kill_in_all(1, lambda number: one_story(whole, number, 1))


@pytest.mark.slow
def test_pictures_killed_twenty_times_are_those_never_killed(whole: Unbroken) -> None:
    """By two actors, against one's; each story begins anew, so that no kill finds finished tars."""
    kill_in_all(20, lambda number: one_story(whole, 1000 + number, 3))
