"""The one way in which a value of the contract is frozen and parsed."""

from pydantic import BaseModel, ConfigDict, JsonValue

JsonObject = dict[str, JsonValue]

# On `cache_strings`: a parsed text is an id, an address or a prompt, new with every job. Pydantic would hold on to some
# sixteen thousand of them, and a process would grow with its jobs until then. Names of fields do repeat, and are kept.


class Value(BaseModel):
    """A frozen value; unknown fields are refused by name, numbers are never made from text."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, cache_strings="keys")


class Answer(BaseModel):
    """A frozen value read back from a store or a newer server: unknown fields are additions, and ignored."""

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        cache_strings="keys",
        json_schema_serialization_defaults_required=True,  # every key of an answer is always there
    )
