"""Rotary positions, and the scalings with which a model reads sequences longer than it learned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from layerzoo.ops import accumulator_dtype
from layerzoo.spec import Config, SpecError, error_at, suggest


def rotary(x: Tensor, start: int, base: float, scaling: Any = None) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves rotated.

    Args:
        x: `[B, T, H, K]`, K even.
        start: position of the first token.
        base: wavelengths run from 2 pi to 2 pi base.
        scaling: `scaling(frequencies, base)` changes them, and `scaling.magnitude()` multiplies
            the result; see `SCALINGS`.
    """
    T, half = x.shape[1], x.shape[-1] // 2
    dtype = accumulator_dtype(x)
    positions = torch.arange(start, start + T, device=x.device, dtype=dtype)
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    if scaling is not None:
        frequencies = scaling(frequencies, base)
    angles = (positions[:, None] * frequencies)[:, None, :]
    cos, sin = angles.cos(), angles.sin()
    if scaling is not None:
        cos, sin = (t * scaling.magnitude() for t in (cos, sin))
    a, b = x.to(dtype).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class RotaryScaling(Config):
    """A map of the frequencies theta_n = base^(-2n / K), n < K / 2."""

    factor: float
    """Sequences may be this many times longer. It is at least 1."""

    def check(self) -> None:
        for field in self.fields():
            value = getattr(self, field.name)
            if value is not None and value <= 0:
                raise SpecError(f"{field.name}: must be positive, got {value}")
        if self.factor < 1:
            raise SpecError(f"factor: must be at least 1, got {self.factor}")

    def __call__(self, theta: Tensor, base: float) -> Tensor:
        raise NotImplementedError

    def magnitude(self) -> float:
        """The number that rotated queries and keys are multiplied by."""
        return 1.0


class LinearScaling(RotaryScaling):
    """theta / factor: positions interpolated (Chen et al. 2023, arXiv 2306.15595)."""

    def __call__(self, theta: Tensor, base: float) -> Tensor:
        return theta / self.factor


class NtkScaling(RotaryScaling):
    """base factor^(K / (K - 2)) in place of base: the highest frequency stays, the lowest is
    divided by factor (bloc97 2023, in Peng et al. 2023, arXiv 2309.00071, def. 1)."""

    def __call__(self, theta: Tensor, base: float) -> Tensor:
        if len(theta) == 1:
            raise SpecError("ntk needs at least 4 rotated channels, got 2; take linear")
        n = torch.arange(len(theta), device=theta.device, dtype=theta.dtype)
        return theta * self.factor ** (-n / (len(theta) - 1))


class YarnScaling(RotaryScaling):
    """theta as it is where it turns more than `fast` times in `original_length` tokens, theta /
    factor where less than `slow` times, linear in n between. Queries and keys are multiplied by
    `attention`, by default 0.1 ln factor + 1 (Peng et al. 2023, arXiv 2309.00071, sec. 3).

    The two limits are rounded outwards to whole n, as in the published code.
    """

    original_length: int
    """The model was trained on sequences of this length."""
    fast: float = 32.0
    """A frequency that turns more often than this in original_length tokens stays as it is."""
    slow: float = 1.0
    """A frequency that turns less often than this in original_length tokens is divided by
    factor."""
    attention: float | None = None
    """Queries and keys are multiplied by this number; null is 0.1 ln factor + 1."""

    def check(self) -> None:
        RotaryScaling.check(self)
        if self.fast <= self.slow:
            raise SpecError(f"fast: must be more than slow, {self.slow}, got {self.fast}")

    def __call__(self, theta: Tensor, base: float) -> Tensor:
        half = len(theta)

        def turning(times: float) -> float:
            """The n whose theta turns as many times in the original length."""
            return half * math.log(self.original_length / (times * 2 * math.pi)) / math.log(base)

        low = max(math.floor(turning(self.fast)), 0)
        high = min(math.ceil(turning(self.slow)), 2 * half - 1)
        n = torch.arange(half, device=theta.device, dtype=theta.dtype)
        scaled = ((n - low) / max(high - low, 1e-3)).clamp(0, 1)
        return theta * (1 - scaled + scaled / self.factor)

    def magnitude(self) -> float:
        return 0.1 * math.log(self.factor) + 1 if self.attention is None else self.attention


class Llama3Scaling(RotaryScaling):
    """theta as it is where it turns more than `high` times in `original_length` tokens, theta /
    factor where less than `low` times, linear in the turns between (Llama 3.1 2024)."""

    original_length: int
    """The model was trained on sequences of this length."""
    low: float = 1.0
    """A frequency that turns less often than this in original_length tokens is divided by
    factor."""
    high: float = 4.0
    """A frequency that turns more often than this in original_length tokens stays as it is."""

    def check(self) -> None:
        RotaryScaling.check(self)
        if self.high <= self.low:
            raise SpecError(f"high: must be more than low, {self.low}, got {self.high}")

    def __call__(self, theta: Tensor, base: float) -> Tensor:
        turns = self.original_length * theta / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return theta * (kept + (1 - kept) / self.factor)


SCALINGS: dict[str, type[RotaryScaling]] = {
    "linear": LinearScaling,
    "ntk": NtkScaling,
    "yarn": YarnScaling,
    "llama3": Llama3Scaling,
}


class RotaryConfig(Config):
    """Rotary positions of q and k."""

    rotary: float | None = None
    """The wavelengths of the rotary positions have this base. Keys then have an even number of
    channels. null means no rotary positions."""
    rotary_scaling: Mapping[str, Any] | None = None
    """null, or a mapping that has name (linear, ntk, yarn or llama3) and factor. yarn also takes
    original_length, fast, slow and attention; llama3 takes original_length, low and high. No
    scaling depends on the length of the sequence that is read."""

    def check(self) -> None:
        if self.rotary is not None and self.rotary <= 0:
            raise SpecError(f"rotary: must be positive or null, got {self.rotary}")
        self.scaling()

    def scaling(self) -> RotaryScaling | None:
        """The scaling that the fields name.

        Raises:
            SpecError: an unknown name or field, an impossible value, or no positions to scale.
        """
        if self.rotary_scaling is None:
            return None
        with error_at("rotary_scaling"):
            fields = dict(self.rotary_scaling)
            name = fields.pop("name", None)
            if name not in SCALINGS:
                raise SpecError(f"unknown name '{name}'; {suggest(name, SCALINGS)}")
            if self.rotary is None or self.rotary <= 1:
                raise SpecError(f"needs a rotary base above 1 to scale, got {self.rotary}")
            return SCALINGS[name].from_fields(fields)

    def check_channels(self, channels: int, what: str) -> None:
        if self.rotary and channels % 2:
            raise SpecError(f"rotary: needs an even {what}, got {channels}; or rotary: null")
        if (scaling := self.scaling()) and self.rotary:
            with error_at("rotary_scaling"):
                scaling(torch.ones(channels // 2), self.rotary)

    def rotate(self, x: Tensor, start: int) -> Tensor:
        """Rotate x `[B, T, H, K]`, whose first token is at position `start`."""
        return rotary(x, start, self.rotary, self.scaling()) if self.rotary else x
