"""From what a caller wrote to what will run, or every problem at once.

    bytes ─parse_json─► object ─parse_request─► GenerateRequest ─resolve─► Resolution(request | findings)

Bounds come from the model's spec alone. Nothing here reads a file, a store or a clock; references to uploads and
artifacts are checked for their form, and looked up by `submission`.
"""

from omnirt_tasks.validation.findings import Finding, failure, shown
from omnirt_tasks.validation.parsing import parse_json, parse_request
from omnirt_tasks.validation.resolving import DATA_URL, Door, Resolution, resolve

__all__ = ["DATA_URL", "Door", "Finding", "Resolution", "failure", "parse_json", "parse_request", "resolve", "shown"]
