"""Nothing is lost to a kill: each job of the demo is hit once. tests/kill_every_rule.py does more."""

from pathlib import Path

from kill_every_rule import check


def test_killed_in_every_rule(finished_demo: Path, tmp_path: Path) -> None:
    assert check(finished_demo, tmp_path / "killed" / "checkout", rounds=1, seed=5) >= 15
