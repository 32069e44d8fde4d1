"""Guides: densities that can be sampled and scored. `GUIDES` maps a name to a builder."""

from flowvi.guides.blocks import BlockGuide
from flowvi.guides.gaussian import FullRank, KroneckerNormal, LowRankNormal, MeanField
from flowvi.guides.guide import Draw, Guide, LogDensity, ScoredSample, StratifiedSample
from flowvi.guides.mixtures import MixtureGuide
from flowvi.guides.prefixes import PrefixGuide
from flowvi.guides.pushforward import FlowGuide, Pushforward
from flowvi.guides.recipes import Blocks, Multiplicative, Prefixes
from flowvi.guides.registry import GUIDES, JOINT_GUIDES, MANY_GUIDES, guide_names, make_guide
from flowvi.guides.skewed import SkewedNormal

__all__ = [
    "GUIDES",
    "JOINT_GUIDES",
    "MANY_GUIDES",
    "BlockGuide",
    "Blocks",
    "Draw",
    "FlowGuide",
    "FullRank",
    "Guide",
    "KroneckerNormal",
    "LogDensity",
    "LowRankNormal",
    "MeanField",
    "MixtureGuide",
    "Multiplicative",
    "PrefixGuide",
    "Prefixes",
    "Pushforward",
    "ScoredSample",
    "SkewedNormal",
    "StratifiedSample",
    "guide_names",
    "make_guide",
]
