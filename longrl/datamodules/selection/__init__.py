"""What chooses the frames that a question is shown; a config names one as `longrl.datamodules.selection.Similarity`."""

from longrl.datamodules.selection.frame_selection import FrameSelection as FrameSelection
from longrl.datamodules.selection.frame_similarity import Coverage as Coverage, Similarity as Similarity
from longrl.datamodules.selection.pixel_changes import KeyFrames as KeyFrames, Motion as Motion, Scenes as Scenes
from longrl.datamodules.selection.user_function import UserFunction as UserFunction
