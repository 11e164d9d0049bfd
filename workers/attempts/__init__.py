"""One attempt of a job, from claim to commit: used by the Celery task and, on a store in memory, by OmniEngine.

It has not heard of Celery. `runner` runs attempts; the other modules are its parts.
"""

from workers.attempts.endings import AttemptEnd
from workers.attempts.runner import AttemptRunner, gateway_address

__all__ = ["AttemptEnd", "AttemptRunner", "gateway_address"]
