"""What makes an encoder another one for the cache on disk."""

import torch

from longrl.features.provenance import encoder_provenance
from tests.tiny import vl_family


def test_other_weights_of_tower_or_projector_another_dtype_or_class_are_another_provenance():
    class Other(type(vl_family())):
        pass

    family = vl_family(freeze_vision_encoder=True)
    seen = {encoder_provenance(family, family.build())}
    assert encoder_provenance(family, family.build()) in seen
    for name in ("patch_embed.proj.weight", "merger.mlp.2.bias"):  # the projector is the encoder's merger
        model = family.build()
        with torch.no_grad():
            dict(family.media_encoders(model)[0].named_parameters())[name].view(-1)[0] += 1e-3
        seen.add(encoder_provenance(family, model))
    seen.add(encoder_provenance(family, family.build().to(torch.bfloat16)))
    other = Other(family.model_path, random_init=True)
    seen.add(encoder_provenance(other, other.build()))
    darker = vl_family(freeze_vision_encoder=True)
    darker.processor.video_processor.image_mean = (0.1, 0.1, 0.1)
    seen.add(encoder_provenance(darker, darker.build()))
    assert len(seen) == 6


def test_text_weights_do_not_count():
    family = vl_family(freeze_vision_encoder=True)
    before, model = encoder_provenance(family, family.build()), family.build()
    with torch.no_grad():
        family.backbone(model).layers[0].mlp.up_proj.weight += 1
    assert encoder_provenance(family, model) == before
