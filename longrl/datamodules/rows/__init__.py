"""Records of any source as `Row`s; a config names the function of a schema as `longrl.datamodules.rows.image_row`."""

from longrl.datamodules.rows.published import (
    canonical_row,
    clevrer_rows,
    llava_video_rows,
    lmms_eval_row,
    next_qa_row,
    perception_test_rows,
    star_row,
    video_mme_row,
)
from longrl.datamodules.rows.question_rows import (
    audio_qa_row,
    clevr_row,
    geometry_row,
    image_row,
    longvideo_reason_row,
    text_math_row,
    video_r1_row,
)

__all__ = [
    "audio_qa_row",
    "canonical_row",
    "clevr_row",
    "clevrer_rows",
    "geometry_row",
    "image_row",
    "llava_video_rows",
    "lmms_eval_row",
    "longvideo_reason_row",
    "next_qa_row",
    "perception_test_rows",
    "star_row",
    "text_math_row",
    "video_mme_row",
    "video_r1_row",
]
