"""How long a gateway takes to leave at most, and how much longer whoever stops it waits before it is killed."""

GATEWAY_GRACE_S = 10
GATEWAY_MARGIN_S = 5
