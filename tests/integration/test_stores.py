"""Gateway and worker open the same stores from the same settings."""

from contextlib import closing

from pydantic import SecretStr

from omnirt_tasks.celery_app import make_app
from omnirt_tasks.jobs.values import WakeUp
from omnirt_tasks.settings import Settings
from omnirt_tasks.stores import open_stores
from omnirt_tasks.tasks import send_job
from tests.support.jobs import new_job
from tests.support.waiting import eventually


def test_a_job_without_a_message_is_sent_again_and_one_whose_message_waits_is_not(settings: Settings) -> None:
    broker_url = SecretStr(settings.redis_url.get_secret_value().rpartition("/")[0] + "/1")
    own = settings.model_copy(update={"broker_url": broker_url, "unclaimed_after_s": 0.01, "reconcile_every_s": 0.02})
    sent: list[str] = []
    with closing(open_stores(own)) as stores, make_app(own) as app:
        waits, lost = (stores.jobs.create(new_job()).record.id for _ in range(2))
        send_job(app, WakeUp(waits, "cpu-shapes"))
        with closing(stores.reconciler(lambda wake_up: sent.append(wake_up.job_id))) as reconciler:
            reconciler.start()
            eventually(lambda: len(sent) > 1)
        assert set(sent) == {lost}
        assert stores.fleet.live() == ()
        stores.close()  # twice is no harm


def test_opening_stores_connects_to_nothing(settings: Settings) -> None:
    nowhere = settings.model_copy(update={"redis_url": SecretStr("redis://127.0.0.1:1/0")})

    open_stores(nowhere).close()
