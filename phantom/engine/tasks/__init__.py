"""Tasks: how a batch is scored. Each names its own kind, unit and metric."""

from phantom.engine.tasks.base import Task
from phantom.engine.tasks.graphs import GraphClassification, NodeClassification, NodeLabelling
from phantom.engine.tasks.images import ImageClassification
from phantom.engine.tasks.language import LanguageModelling
from phantom.engine.tasks.puzzles import PuzzleSolving

BUILT_IN: tuple[type[Task], ...] = (
    *(ImageClassification, LanguageModelling, PuzzleSolving),
    *(GraphClassification, NodeClassification, NodeLabelling),
)
