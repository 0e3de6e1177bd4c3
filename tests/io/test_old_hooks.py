"""Classes written for an earlier release: an old hook is refused, not ignored."""

import pytest

from longrl.diffusion.diffusion_family import DiffusionFamily
from longrl.engines.rollout_engine import RolloutEngine
from longrl.io.old_hooks import OLD_HOOKS
from longrl.models.text import TextFamily

BASES = {"family": TextFamily, "diffusion family": DiffusionFamily, "engine": RolloutEngine}
OLD = [(kind, name) for kind, names in OLD_HOOKS.items() for name in names]


@pytest.mark.parametrize(("kind", "name"), OLD)
def test_an_old_hook_is_refused_with_the_new_name(kind, name):
    new = OLD_HOOKS[kind][name]
    with pytest.raises(ValueError, match=rf"^Old defines {name}, a hook of longrl 0.1.0 .*; write {new} instead"):
        type("Old", (BASES[kind],), {name: None})


@pytest.mark.parametrize(("kind", "name"), OLD)
def test_the_new_name_is_a_hook_and_the_old_one_is_none(kind, name):
    base = BASES[kind]
    new = OLD_HOOKS[kind][name]
    assert hasattr(base, new) or new.startswith("get_output_embeddings")
    assert not hasattr(base, name)


def test_a_class_with_todays_hooks_is_made():
    class Mine(TextFamily):
        def position_ids(self, input_ids, media):
            return super().position_ids(input_ids, media)

    assert Mine.position_ids is not TextFamily.position_ids
