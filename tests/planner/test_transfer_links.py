"""Pure: moving KV costs the link's time for whole blocks, and the hand-over."""

import pytest

from planner.step_times.transfer_links import LinkTable, LinkTransfer, link_of_rate
from tandem.errors import ConfigError


def test_a_table_is_linear_between_points_and_keeps_its_rate_beyond() -> None:
    table = LinkTable([(1000, 1.0), (3000, 2.0), (3000, 4.0)])
    assert table.seconds(10) == 1.0
    assert table.seconds(2000) == 2.0
    assert table.seconds(6000) == 6.0
    assert table.seconds(0) == 0.0


def test_a_transfer_moves_whole_blocks_over_the_link_of_the_place() -> None:
    fast, slow = link_of_rate(1e9, 0.0), link_of_rate(1e8, 0.0)
    moves = LinkTransfer(1e6, 16, inside=fast, between=slow, hand_over_s=0.5)
    assert moves.transfer_s(17, same_node=True) == pytest.approx(0.5 + 32e6 / 1e9)
    assert moves.transfer_s(17, same_node=False) == pytest.approx(0.5 + 32e6 / 1e8)


@pytest.mark.parametrize("points", [[], [(0, 1.0)], [(10, 0.0)]])
def test_a_link_without_sense_is_refused(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ConfigError):
        LinkTable(points)
    with pytest.raises(ConfigError):
        link_of_rate(0.0, 1.0)
