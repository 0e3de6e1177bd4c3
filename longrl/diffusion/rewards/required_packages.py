"""Packages that a reward needs and longrl does not bring along."""

from __future__ import annotations

from importlib.util import find_spec


def require_packages(*packages: str, reward: str, extra: str) -> None:
    """Raises ValueError, naming the extra of longrl that brings them, if one of the packages is not installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ValueError(
            f"the reward {reward} needs {' and '.join(missing)}, which is not installed; "
            f"run `pip install longrl[{extra}]`, or `pip install -e .[{extra}]` in the project's folder"
        )
