"""The app factory: composes the gateway from its settings, and connects to nothing."""

import importlib
import pkgutil

from flask import Flask

from omnirt_tasks.settings import Settings
from web import auth, errors, measuring, resources
from web.services import EXTENSION, Services, build
from web.websocket import SOCKET_OPTIONS

FORM_MEMORY_BYTES = 64 * 1024
FORM_PARTS_MAX = 8


def create_app(settings: Settings, services: Services | None = None) -> Flask:
    """A gateway for these settings; `services` are built from them unless they are given.

    Nothing runs beside requests until `services.start()` is called in the process that serves. Raises
    ConfigurationError for settings that cannot be used.
    """
    app = Flask("web", static_folder=None)
    parts = services or build(settings)
    app.extensions[EXTENSION] = parts
    app.config.update(
        MAX_CONTENT_LENGTH=settings.max_body_bytes,
        MAX_FORM_MEMORY_SIZE=FORM_MEMORY_BYTES,
        MAX_FORM_PARTS=FORM_PARTS_MAX,
        SOCK_SERVER_OPTIONS=SOCKET_OPTIONS,
    )
    errors.register(app)
    measuring.register(app)
    auth.guard(app, parts.gate)
    for module in pkgutil.iter_modules(resources.__path__):
        app.register_blueprint(importlib.import_module(f"{resources.__name__}.{module.name}").blueprint)
    return app
