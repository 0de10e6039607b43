"""When a failure is followed by a restart, and when it is not."""

from __future__ import annotations

from rlsys.driver.restarts import FailureKind, Restarts, last_line


class LostError(Exception):
    """An error that a restart may repair."""


def kind_of(error: BaseException) -> FailureKind | None:
    return "lost process" if isinstance(error, LostError) else None


def at(restarts: Restarts, step: int, phase: str = "update") -> None:
    restarts.on_phase(step, phase)


def test_an_error_of_a_plug_in_is_not_followed_by_a_restart():
    restarts = Restarts(5, kind_of)
    at(restarts, 1)
    assert restarts.refusal(ZeroDivisionError()) is not None
    assert restarts.refusal(LostError()) is None


def test_without_restarts_the_first_failure_ends_the_run():
    assert Restarts(0, kind_of).refusal(LostError()) == "trainer.max_restarts is 0"


def test_the_third_failure_at_the_same_place_ends_the_run():
    restarts = Restarts(100, kind_of)
    for _ in range(2):
        at(restarts, 7)
        assert restarts.refusal(LostError()) is None
        restarts.begin(LostError())

    at(restarts, 7, "sync")
    assert restarts.refusal(LostError()) is None, "another phase is another place"
    at(restarts, 8)
    assert restarts.refusal(LostError()) is None, "another step is another place"
    at(restarts, 7)
    refusal = restarts.refusal(LostError())
    assert refusal is not None
    assert "3 failures of the same kind (lost process) in update of step 7" in refusal


def test_the_limit_counts_restarts_without_a_new_checkpoint_and_pauses_grow():
    restarts = Restarts(3, kind_of)
    pauses = []
    for step in (1, 2, 3):
        at(restarts, step)
        assert restarts.refusal(LostError()) is None
        pauses.append(restarts.begin(LostError()).pause_s)
    assert pauses == [1.0, 2.0, 4.0]
    at(restarts, 4)
    refusal = restarts.refusal(LostError())
    assert refusal is not None
    assert "trainer.max_restarts is 3" in refusal

    restarts.on_checkpoint(4, "")
    assert restarts.refusal(LostError()) is None
    assert restarts.begin(LostError()).pause_s == 1.0


def test_a_pause_is_a_minute_at_most():
    restarts, pause_s = Restarts(100, kind_of), 0.0
    for step in range(20):
        at(restarts, step)
        pause_s = restarts.begin(LostError()).pause_s
    assert pause_s == 60.0


def test_a_restart_counts_the_steps_after_the_checkpoint():
    """Four steps are complete when step 5 fails, and the checkpoint is that of step 2."""
    restarts = Restarts(5, kind_of)
    restarts.on_start(1, 10)
    for step in (1, 2, 3, 4):
        restarts.on_step(step, {})
        if step == 2:
            restarts.on_checkpoint(step, "")
    at(restarts, 5)
    restart = restarts.begin(LostError("first\nlast"))
    assert restart.lost_steps == 2
    assert (restart.failure.number, restart.failure.place) == (1, ("lost process", 5, "update"))
    assert restart.failure.message == "LostError: last"

    restarts.on_start(3, 10)
    at(restarts, 3)
    assert restarts.begin(LostError()).lost_steps == 0, "the resumed run has completed none yet"


def test_a_run_that_was_asked_to_stop_is_not_restarted():
    restarts = Restarts(5, kind_of)
    restarts.request_stop()
    assert restarts.refusal(LostError()) == "the run was asked to stop"


def test_the_last_line_of_an_error_without_a_message():
    assert last_line(LostError()) == "LostError"
