"""For tests of longrl and of what is built on it: tiny models, synthetic videos, and the check of a model family."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longrl.testing.family_check import FamilyReport, check_family

__all__ = ["FamilyReport", "check_family"]


def __getattr__(name: str) -> Any:
    """Imports torch only for whoever checks a family: the generator of synthetic videos does without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import longrl.testing.family_check

    return getattr(longrl.testing.family_check, name)
