"""Schedules for tests: the numbers by which a fit decides, changed for all fits of a test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flowvi.training import schedule


def quick(patch: pytest.MonkeyPatch, **numbers: Any) -> None:
    """Have fits that are given no schedule go by the default one with other numbers."""
    patch.setattr(schedule, "DEFAULT", replace(schedule.DEFAULT, **numbers))
