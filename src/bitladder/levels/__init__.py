"""Levels: what one model can be stored as, whatever the format."""

from bitladder.levels.kinds import (
    CHECKPOINT_ENGINES,
    FILE_ENGINES,
    MLX_ENGINES,
    WHOLE_ROW,
    CheckpointLevel,
    FeedbackLevel,
    FileLevel,
    FoldedLevel,
    Level,
    Needs,
    RecipeLevel,
    of_kinds,
)
from bitladder.levels.names import LADDER, parse_level, parse_levels
from bitladder.records.plan import Container

__all__ = [
    "CHECKPOINT_ENGINES", "FILE_ENGINES", "LADDER", "MLX_ENGINES", "WHOLE_ROW", "CheckpointLevel", "Container",
    "FeedbackLevel", "FileLevel", "FoldedLevel", "Level", "Needs", "RecipeLevel", "of_kinds", "parse_level",
    "parse_levels",
]  # fmt: skip
