"""What a comparison says in words; its numbers are in `test_ablations`."""
import pytest

from ptmrec.significance import in_words

ROW = {"before": 0.2, "after": 0.21, "difference": 0.01, "p_holm": 0.03, "users": 80, "smallest": 0.02}


@pytest.mark.parametrize("seeds, low, words", [
    (1, 0.001, ": better in one run of each."),
    (1, -0.001, ": better in one run of each, though the interval over users includes 0."),
    (2, 0.001, ": better."), (2, -0.001, ": better on these seeds; with other seeds the difference may vanish.")])
def test_of_other_seeds_nothing_is_said_where_there_is_one(seeds, low, words):
    row = ROW | {"seeds": seeds, "low": low, "high": 0.02}
    assert in_words("a", row, "R", "b").endswith(f"after Holm{words}")
    row |= {"after": 0.19, "difference": -0.01, "low": -0.02, "high": -low}
    assert in_words("a", row, "R", "b").endswith(f"after Holm{words.replace('better', 'worse')}")
    assert ": cannot tell with 80 users;" in in_words("a", row | {"p_holm": 0.05}, "R", "b")
