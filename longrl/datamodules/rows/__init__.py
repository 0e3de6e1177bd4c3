"""Records of any source as `Row`s; a config names the function of a schema as `longrl.datamodules.rows.image_row`."""

from longrl.datamodules.rows.clue_sets import (
    cg_bench_clue_row as cg_bench_clue_row,
    cg_bench_grounding_row as cg_bench_grounding_row,
    cg_bench_long_row as cg_bench_long_row,
    cg_bench_rows as cg_bench_rows,
)
from longrl.datamodules.rows.grounding_sets import (
    charades_sta_row as charades_sta_row,
    timelens_rows as timelens_rows,
)
from longrl.datamodules.rows.judged_sets import activitynet_qa_row as activitynet_qa_row
from longrl.datamodules.rows.knowledge_sets import (
    mmvu_row as mmvu_row,
    video_mmmu_adaptation_row as video_mmmu_adaptation_row,
    video_mmmu_comprehension_row as video_mmmu_comprehension_row,
    video_mmmu_gain_rows as video_mmmu_gain_rows,
    video_mmmu_perception_row as video_mmmu_perception_row,
    video_mmmu_rows as video_mmmu_rows,
)
from longrl.datamodules.rows.lmms_eval import lmms_eval_row as lmms_eval_row
from longrl.datamodules.rows.long_video_sets import (
    longvideobench_hidden_row as longvideobench_hidden_row,
    longvideobench_row as longvideobench_row,
    lvbench_rows as lvbench_rows,
    mlvu_hidden_row as mlvu_hidden_row,
    mlvu_row as mlvu_row,
    video_mme_v2_row as video_mme_v2_row,
)
from longrl.datamodules.rows.published import (
    canonical_row as canonical_row,
    clevrer_rows as clevrer_rows,
    llava_video_rows as llava_video_rows,
    next_qa_row as next_qa_row,
    perception_test_rows as perception_test_rows,
    star_row as star_row,
    video_mme_row as video_mme_row,
    video_r1_row as video_r1_row,
)
from longrl.datamodules.rows.question_rows import (
    audio_qa_row as audio_qa_row,
    chat_row as chat_row,
    clevr_row as clevr_row,
    geometry_row as geometry_row,
    image_row as image_row,
    longvideo_reason_row as longvideo_reason_row,
    open_ended_row as open_ended_row,
    text_math_row as text_math_row,
)
from longrl.datamodules.rows.row_files import read_rows as read_rows
from longrl.datamodules.rows.spatial_sets import vsi_bench_row as vsi_bench_row
from longrl.datamodules.rows.temporal_sets import (
    ego_schema_hidden_row as ego_schema_hidden_row,
    ego_schema_row as ego_schema_row,
    mvbench_row as mvbench_row,
    temp_compass_rows as temp_compass_rows,
    video_holmes_row as video_holmes_row,
)
