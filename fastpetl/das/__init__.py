"""DAS (Dynamic Architecture Skipping, NeurIPS 2023): `fastpetl.das.search` finds the blocks that can be skipped."""

from __future__ import annotations

from fastpetl.das.callbacks import lightning_callback, trainer_callback
from fastpetl.das.plan import SearchedPlan
from fastpetl.das.scoring import Scorer
from fastpetl.das.searching import QUIRKS, Search, search

__all__ = ["QUIRKS", "Scorer", "Search", "SearchedPlan", "lightning_callback", "search", "trainer_callback"]
