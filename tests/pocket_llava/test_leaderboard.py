"""The leaderboard, with few questions and few methods."""

import json
import sys

from vtp_kernels.pocket_llava import leaderboard


def test_has_a_line_a_method_and_goes_on_where_it_was_cut_off(tmp_path, monkeypatch, capsys):
    file = tmp_path / "board.json"
    arguments = ["--questions", "10", "--calibration", "5", "--batch", "10", "--turns", "1"]
    arguments += ["--only", "DivPrune", "VisiPruner", "--json", str(file)]
    monkeypatch.setattr(leaderboard, "SEEDS", range(2))
    monkeypatch.setattr(sys, "argv", ["it", *arguments, "--plot", str(tmp_path / "it.png")])
    leaderboard.main()
    board = json.loads(file.read_text())["board"]
    assert [row["name"] for row in board] == ["no pruning", *["chance"] * 3, *["DivPrune"] * 3] + [
        "VisiPruner"
    ] * 3
    for row in board[1:]:
        if not row.get("cannot"):
            assert abs(row["visual_tokens_share"] - row["share"]) <= leaderboard.NEAR
            assert row["choosing_ms"] > 0 and row["time_to_first_token"] > 0
    assert [bool(row.get("cannot")) for row in board[-3:]] == [False, True, True]
    printed = capsys.readouterr().out
    assert "| VisiPruner |" in printed and "cannot" in printed
    assert (tmp_path / "it.png").stat().st_size

    monkeypatch.setattr(leaderboard, "evaluate", None)  # every row is in the file
    leaderboard.main()
