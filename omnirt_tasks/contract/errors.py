"""An error as data: what a client or a record is told."""

from pydantic import field_validator

from omnirt_tasks.contract.base import Answer


class Problem(Answer):
    """One thing wrong with a request.

    `loc` is the dotted place (`config.width`), `rule` a short stable name (`multiple_of`), and `message` names
    the value, the rule and the remedy.
    """

    loc: str
    rule: str
    message: str


class ErrorInfo(Answer):
    """Why a job ended without a result; `hint` says what to do about it, `retryable` whether trying again can help."""

    code: str
    message: str
    retryable: bool = False
    hint: str | None = None

    @field_validator("message", "hint")
    @classmethod
    def _in_utf8(cls, text: str | None) -> str | None:
        """What a system's own message may hold of undecodable names, no JSON does."""
        return None if text is None else text.encode("utf-8", "replace").decode("utf-8")
