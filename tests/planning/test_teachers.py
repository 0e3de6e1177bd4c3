"""A teacher's weights, its pass over every group and what is kept of it, by hand."""

import dataclasses

from longrl.modules.distiller import Distiller
from longrl.modules.local_teacher import LocalTeacher
from longrl.planning import flops, formulas, memory, teachers
from longrl.planning.inputs import PlannedTeacher
from longrl.planning.micro_batches import micro_batch
from tests.planning.test_formulas import RUN, TINY, changed
from tests.teachers import DISTILLATIONS, wide_vl_family

TEACHER = PlannedTeacher(TINY, weight_bytes=4, gathered_bytes=4)
TAUGHT = changed(teachers=(TEACHER,))


def test_a_teacher_has_shards_a_tower_and_features_in_every_phase():
    features = formulas.feature_memory(RUN)
    assert teachers.teacher_memory(TAUGHT) == 4 * (250 / 2 + 30) + features
    phases = memory.estimate_memory(TAUGHT).phases
    assert set(phases) == {"encode", "rollout", "teacher", "update", "validate"}
    for phase in phases.keys() - {"validate"}:  # whose batches are of another size
        assert phases[phase]["teachers"] == teachers.teacher_memory(TAUGHT)
    assert "teachers" not in memory.estimate_memory(RUN).phases["update"]
    offloaded = changed(teachers=(dataclasses.replace(TEACHER, offload=True),))
    assert teachers.teacher_memory(offloaded) == 4 * 30 + features
    added = memory.host_memory(offloaded, 0)["offloaded"] - memory.host_memory(RUN, 0)["offloaded"]
    assert added == 2 * 4 * 250 / 2


def test_hidden_states_and_head_or_the_likeliest_tokens_stay_for_the_update():
    tokens = RUN.prompts_per_batch * RUN.num_generations * RUN.sampled_tokens
    assert teachers.kept_memory(TAUGHT) == 4 * TINY.hidden * (tokens + TINY.vocabulary)
    top = dataclasses.replace(TEACHER, keeps_hidden=False, top_k=8)
    assert teachers.kept_memory(changed(teachers=(top,))) == tokens * 8 * 12
    several = changed(teachers=(TEACHER, dataclasses.replace(TEACHER, offload=True)))
    assert teachers.kept_memory(several) == 4 * TINY.hidden * (tokens + 2 * TINY.vocabulary)
    assert teachers.kept_memory(dataclasses.replace(TAUGHT, devices=1)) == 4 * TINY.hidden * tokens
    phases = memory.estimate_memory(TAUGHT).phases
    assert phases["update"]["teachers' scores"] == phases["teacher"]["teachers' scores"]
    assert sum(phases["update"].values()) - sum(memory.estimate_memory(RUN).phases["update"].values()) == (
        teachers.teacher_memory(TAUGHT) + teachers.kept_memory(TAUGHT)
    )


def test_a_group_is_read_once_and_its_logits_are_computed_twice_more():
    plain, taught = flops.step_flops(RUN), flops.step_flops(TAUGHT)
    batch = micro_batch(RUN)
    count = batch.count * (RUN.sp_group // RUN.sequence_parallel_size)
    head = flops.head_flops(RUN, batch)
    once = count * (flops.forward_flops(RUN, batch) + head) + RUN.prompts_per_batch * flops.encode_flops(RUN)
    assert taught["teacher"] == once
    assert taught["update"] - plain["update"] == 2 * count * head * RUN.epochs
    assert "teacher" not in plain


def test_the_teachers_of_a_run_are_those_on_its_devices():
    distiller = Distiller([LocalTeacher(wide_vl_family(), offload=True)], DISTILLATIONS["top"])
    (planned,) = teachers.planned_teachers(distiller, "bfloat16")
    assert (planned.weight_bytes, planned.gathered_bytes, planned.offload) == (4, 2, True)
    assert (planned.keeps_hidden, planned.top_k) == (False, 5)
    assert planned.sizes.hidden == 72
    assert teachers.planned_teachers(None, None) == ()
