"""The gateway for a WSGI server of the operator's own: `gunicorn --worker-class gthread 'web.wsgi:app()'`.

Do not preload it: threads and connections begin in the process that serves.
"""

from flask import Flask

from omnirt_tasks.observability import logs
from omnirt_tasks.settings import load_settings
from web.server import make_app


def app() -> Flask:
    """The app of the environment's settings, with its threads running. Raises ConfigurationError."""
    settings = load_settings()
    logs.configure(settings)
    return make_app(settings)
