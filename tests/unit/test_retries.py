"""Which failures are tried again, how and when."""

import pytest

from omnirt_tasks.contract import ErrorInfo
from omnirt_tasks.jobs.values import Requeue
from workers.attempts.retries import LEFT_TO_OTHERS_S, Failure, RetryPolicy, requeue_after

POLICY = RetryPolicy(retries_max=2, backoff_s=1.0)
AVOID_MS = round(LEFT_TO_OTHERS_S * 1000)


def failure(
    code: str, *, retries: int = 0, accompanied: bool = False, elsewhere: bool = False, part_unproven: bool = False
) -> Failure:
    return Failure(ErrorInfo(code=code, message="told"), retries, accompanied, elsewhere, part_unproven)


@pytest.mark.parametrize(
    ("failed", "expected"),
    [
        (failure("storage_error"), Requeue("storage_error", retry=True, delay_ms=1_000)),
        (failure("storage_error", retries=1), Requeue("storage_error", retry=True, delay_ms=4_000)),
        (failure("storage_error", retries=2), None),
        (failure("internal"), Requeue("internal", retry=True, delay_ms=1_000)),
        (
            failure("internal", elsewhere=True),
            Requeue("internal", retry=True, delay_ms=1_000, avoid_ms=AVOID_MS),
        ),
        (failure("internal", accompanied=True), Requeue("internal", retry=True, delay_ms=1_000)),
        # A device that others shared may have had too little memory for them all: alone, but without a wait.
        (failure("out_of_memory", accompanied=True, elsewhere=True), Requeue("out_of_memory", alone=True)),
        (failure("out_of_memory", accompanied=True, retries=2), Requeue("out_of_memory", alone=True)),
        (failure("out_of_memory", elsewhere=True), None),
        # What lies with the request or the model fails alike everywhere.
        (failure("model_failed", accompanied=True, elsewhere=True), None),
        (failure("validation_failed"), None),
        (failure("upload_not_found"), None),
        (failure("insufficient_memory", accompanied=True), None),
        (failure("non_finite_output"), None),
        (failure("timeout", elsewhere=True), None),
        # A part of a job is tried once with a device to itself before the whole job fails with it.
        (failure("model_failed", part_unproven=True, elsewhere=True), Requeue("model_failed", alone=True)),
        (failure("non_finite_output", part_unproven=True), Requeue("non_finite_output", alone=True)),
        (failure("out_of_memory", part_unproven=True), Requeue("out_of_memory", alone=True)),
        (failure("timeout", part_unproven=True), None),
        # What may pass by itself is waited for first, as for any job.
        (failure("storage_error", part_unproven=True), Requeue("storage_error", retry=True, delay_ms=1_000)),
        (failure("storage_error", part_unproven=True, retries=2), Requeue("storage_error", alone=True)),
    ],
)
def test_a_failure_is_tried_again_only_where_that_may_help(failed: Failure, expected: Requeue | None) -> None:
    assert requeue_after(failed, POLICY) == expected


def test_without_retries_the_first_failure_is_the_last() -> None:
    assert requeue_after(failure("internal"), RetryPolicy(retries_max=0)) is None
