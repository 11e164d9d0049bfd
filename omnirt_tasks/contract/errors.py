"""An error as data: what a client or a record is told."""

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
