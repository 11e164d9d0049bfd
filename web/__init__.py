"""The gateway: HTTP and WebSockets in front of the job store.

    request ─► auth ─► a view of `resources` ─► services: submission, store, feed, artifacts ─► answer | errors

It checks, submits and tells; it never imports torch or the workers. One file in `resources` is one blueprint.
"""

from web.app import create_app

__all__ = ["create_app"]
