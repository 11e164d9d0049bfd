"""The one way in which a value of the contract is frozen and parsed."""

from pydantic import BaseModel, ConfigDict, JsonValue

JsonObject = dict[str, JsonValue]


class Value(BaseModel):
    """A frozen value; unknown fields are refused by name, numbers are never made from text."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Answer(BaseModel):
    """A frozen value read back from a store or a newer server: unknown fields are additions, and ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")
