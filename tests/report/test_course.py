"""When what was made: with arithmetic written out."""

from aliprod.build.events import Standing, Task
from aliprod.report.figures import course, end, rank_hours

TRAINING = Task("net/full", "training", "net/full", ("a", "a"), 100.0, 160.0)


def test_time_in_which_nothing_was_made_is_left_out_and_what_runs_lasts_until_now() -> None:
    beside = Task("net/accuracy", "training", "net/accuracy", ("a",), 130.0, 170.0)
    week_later = Task("ensemble", "ensemble", None, ("a",), 600_000.0)
    found = course(Standing(tasks=(week_later,), past=(beside, TRAINING)), {}, 600_010.0)
    assert found.fact == {"net/full": [(0, 60, 2)], "net/accuracy": [(30, 70, 1)], "ensemble": [(70, 80, 1)]}
    assert (end(found.fact), end(found.forecast), found.now) == (80, 0, 80)


def test_hours_count_each_rank_and_attempt_and_gpus_alone_where_there_are_any() -> None:
    again = Task("net/full", "training", "net/full", ("a",), 200.0)
    assert rank_hours([TRAINING, again], 260.0) == {"net/full": (2 * 60 + 60) / 3600}
    on_gpus = Task("net/dcl", "training", "net/dcl", ("a",) * 4, 0.0, 900.0, gpus=1)
    assert rank_hours([on_gpus, TRAINING], 0.0) == {"net/dcl": 1.0, "net/full": 0.0}
