"""One module per model family: its specs on top (`SPECS`), its loader below, torch imported inside it.

To add a family, add a file here; discovery finds it.
"""
