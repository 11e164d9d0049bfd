"""What became of a run, held to what a test expects of it."""

from PIL import Image

from workers.host import RunFailed, RunOrder, RunOutcome, RunSucceeded


def succeeded(outcome: RunOutcome) -> RunSucceeded:
    assert isinstance(outcome, RunSucceeded), outcome
    return outcome


def failed(outcome: RunOutcome) -> RunFailed:
    assert isinstance(outcome, RunFailed), outcome
    return outcome


def picture(order: RunOrder, name: str = "0.png") -> Image.Image:
    """A picture that the run left in its order's folder."""
    with Image.open(order.output_dir / name) as stored:
        return stored.convert("RGB")
