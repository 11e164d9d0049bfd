"""The routes, one resource a file; each has a `blueprint`, and the app factory finds it by itself."""
