"""Environments: what answers the turns of a completion, and the way from its answers to tokens."""

from longrl.environments.environment import (
    Environment as Environment,
    Observation as Observation,
    ToolResponse as ToolResponse,
)
