"""`python -m omnirt_tasks.cli` is `omnirt`."""

from omnirt_tasks.cli import main

main()
