"""What a request may ask for in ``sampling_params.custom_params``, and what it gets."""

from __future__ import annotations

import hashlib
import sys
from array import array
from dataclasses import dataclass

from sglang_margingate.config import DEFAULT_THRESHOLD, ConfigError, MarginGateConfig, Policy, check_threshold
from sglang_margingate.gate.profile import Profile, parse_profile

PREFIX = "margingate_"
KEYS = (
    "margingate_policy", "margingate_threshold", "margingate_dataset", "margingate_return_steps", "margingate_repeat",
)  # fmt: skip

MAX_DATASET_LENGTH = 64


@dataclass(frozen=True)
class RequestParams:
    """The checked wishes of one request, resolved against the server's configuration."""

    policy: Policy
    threshold: float
    dataset: str
    return_steps: bool
    repeat: int | None = None
    """Which pass over the same prompts it belongs to; for the trace alone."""


class RequestRules:
    """Checks requests' parameters and resolves thresholds for one server.

    Parameters
    ----------
    config
        The server's configuration.
    """

    def __init__(self, config: MarginGateConfig) -> None:
        self.config = config
        self.profile: Profile | None = None if config.profile is None else parse_profile(config.profile)

    def threshold_for(self, dataset: str) -> float:
        """Return the threshold in logits of a dataset's requests.

        The profile's where its sample is large enough, else the flag's, else :data:`DEFAULT_THRESHOLD`, or the profile's
        default where that is larger, a sample stands behind it and the profile does not know the dataset. Traffic that
        nobody calibrated is never gated below the conservative default unless the flag says so.
        """
        profile = self.profile
        known = None if profile is None else profile.threshold_for(dataset)
        if known is not None:
            return known
        if self.config.threshold is not None:
            return self.config.threshold
        if profile is None or profile.backed_default is None or (dataset and dataset in profile.datasets):
            return DEFAULT_THRESHOLD
        return profile.backed_default

    def thresholds(self) -> dict[str, float]:
        """Return the thresholds in force for the datasets that the profile names."""
        return {name: self.threshold_for(name) for name in (self.profile.datasets if self.profile else ()) if name}

    def parse(self, custom_params: object) -> RequestParams:
        """Resolve ``custom_params``; keys that do not start with ``margingate_`` belong to others and are ignored.

        Raises
        ------
        ConfigError
            One line that names the field, the value and the fix; the server answers it as HTTP 400.
        """
        given = custom_params if isinstance(custom_params, dict) else {}
        unknown = sorted(k for k in given if isinstance(k, str) and k.startswith(PREFIX) and k not in KEYS)
        if unknown:
            raise ConfigError(f"custom_params.{unknown[0]}: unknown; known are {', '.join(KEYS)}")
        dataset = given.get("margingate_dataset", "")
        if not isinstance(dataset, str) or len(dataset) > MAX_DATASET_LENGTH:
            raise ConfigError(
                f"custom_params.margingate_dataset: {dataset!r:.80} is not a text of at most {MAX_DATASET_LENGTH} characters"
            )
        return_steps = given.get("margingate_return_steps", False)
        if not isinstance(return_steps, bool):
            raise ConfigError(f"custom_params.margingate_return_steps: {return_steps!r} is not true or false")
        repeat = given.get("margingate_repeat")
        if repeat is not None and (type(repeat) is not int or not 0 <= repeat < 2**31):
            raise ConfigError(
                f"custom_params.margingate_repeat: {repeat!r:.80} is not a whole number from 0 to 2**31 - 1"
            )
        threshold = given.get("margingate_threshold")
        tau = (
            self.threshold_for(dataset)
            if threshold is None
            else check_threshold(threshold, "custom_params.margingate_threshold")
        )
        return RequestParams(self._policy(given.get("margingate_policy")), tau, dataset, return_steps, repeat)

    def _policy(self, wish: object) -> Policy:
        if wish is None:
            return self.config.policy
        try:
            policy = Policy(wish)
        except ValueError:
            choices = ", ".join(p.value for p in Policy)
            raise ConfigError(f"custom_params.margingate_policy: {wish!r} is unknown; use one of {choices}") from None
        if policy.verifies and not self.config.policy.verifies:
            raise ConfigError(
                f"custom_params.margingate_policy: {policy.value} needs a server started with --margingate-policy gate "
                f"or always; this one runs {self.config.policy.value}"
            )
        return policy


def digest(tokens: list[int]) -> str:
    """Return a digest of a token sequence: the first 16 hexadecimal digits of SHA-256 of its int32, little-endian."""
    packed = array("i", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return hashlib.sha256(packed.tobytes()).hexdigest()[:16]
