"""Read the attributes of a clip back from its pixels: a small classifier, trained on the clips that we draw.

`network` says how it looks at a clip, `training` makes it, `scoring` counts what clips get right, `files` keeps it.
"""

from vidsparse_pipelines.clips.checker.files import DEFAULT_PATH, load_checker, save_checker
from vidsparse_pipelines.clips.checker.network import (
    FRAME_STRIDE,
    IGNORED,
    OBJECT_ATTRIBUTES,
    OBJECT_HEADS,
    ORDERS,
    SCENE_HEADS,
    Checker,
    CheckerConfig,
    ObjectNet,
    SceneNet,
    color_likeness,
)
from vidsparse_pipelines.clips.checker.scoring import Scores, Share, read_attributes, score, validate_checker
from vidsparse_pipelines.clips.checker.training import (
    TrainingSizes,
    augment,
    checker_loss,
    queries_from_specs,
    targets_from_specs,
    train_checker,
)
from vidsparse_pipelines.clips.renderer import every_nth_frame

__all__ = [
    "DEFAULT_PATH",
    "FRAME_STRIDE",
    "IGNORED",
    "OBJECT_ATTRIBUTES",
    "OBJECT_HEADS",
    "ORDERS",
    "SCENE_HEADS",
    "Checker",
    "CheckerConfig",
    "ObjectNet",
    "SceneNet",
    "Scores",
    "Share",
    "TrainingSizes",
    "augment",
    "checker_loss",
    "color_likeness",
    "every_nth_frame",
    "load_checker",
    "queries_from_specs",
    "read_attributes",
    "save_checker",
    "score",
    "targets_from_specs",
    "train_checker",
    "validate_checker",
]
