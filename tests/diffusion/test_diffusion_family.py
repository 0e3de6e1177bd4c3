"""SD3 and Wan against diffusers' own pipelines."""

import diffusers
import pytest
import torch

from longrl.diffusion.diffusion_family import to_uint8
from longrl.diffusion.sampler import DiffusionSampling, sample_trajectories, seeded_noise
from longrl.models.lora import LoRASettings, adapters_off, to_checkpoint
from longrl.modules.initial_weights import plain_from
from longrl.strategies.fsdp import RootModule
from tests.diffusion.tiny import FAMILIES, sd3_family, wan_family

CPU = torch.device("cpu")
NAMES = list(FAMILIES)


def sampled(family, model, texts, guidance, num_steps=4, seeds=(5, 6), window=None):
    steps = DiffusionSampling(num_steps=num_steps, window=window).steps(*family.denoising_schedule(num_steps), 0, 0)

    with torch.no_grad():
        return sample_trajectories(
            RootModule(family, model), texts, seeds, steps, shape=family.latent_shape(), guidance_scale=guidance,
            device=CPU,
        )  # fmt: skip


def stock(family, folder=None):
    """The whole pipeline as diffusers loads it; without what it takes from earlier steps Wan's UniPC is Euler's."""
    pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(folder or family.model_path)
    pipeline.set_progress_bar_config(disable=True)
    if family.pipeline_class == "WanPipeline":
        first_order = {"solver_order": 1, "disable_corrector": list(range(100))}
        pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, **first_order)
    return pipeline


def stock_frames(pipeline, family, texts, guidance, num_steps, seeds):
    """[B, F, 3, H, W] between 0 and 1."""
    size = {"height": family.height, "width": family.width}
    if family.pipeline_class == "WanPipeline":
        size["num_frames"] = family.num_frames
    latents = torch.stack([seeded_noise(seed, 0, family.latent_shape()) for seed in seeds])
    found = pipeline(
        texts, **size, num_inference_steps=num_steps, guidance_scale=guidance, latents=latents, output_type="pt",
        max_sequence_length=family.max_text_tokens,
    )[0]  # fmt: skip
    return found if found.dim() == 5 else found[:, None]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_without_noise_samples_are_those_of_the_stock_pipeline(name, guidance):
    family, texts = FAMILIES[name](), ["a red picture", "a small cat"]
    samples = sampled(family, family.build().eval(), texts, guidance)
    frames = family.decode_latents(torch.stack([sample.final for sample in samples]))
    expected = stock_frames(stock(family), family, texts, guidance, 4, (5, 6))
    assert frames.dtype == torch.uint8
    assert frames.shape == expected.shape
    assert int((frames.float() - expected * 255).abs().max()) <= 1
    assert float(frames.float().std()) > 10


@pytest.mark.parametrize("name", NAMES)
def test_the_schedule_is_that_of_the_released_pipeline(name):
    family = FAMILIES[name]()
    sigmas, timesteps = family.denoising_schedule(10)
    theirs = stock(family).scheduler
    theirs.set_timesteps(10)
    assert sigmas == pytest.approx(theirs.sigmas.tolist(), abs=1.1e-6)  # UniPC begins at 1 - 1e-6
    assert timesteps == theirs.timesteps.tolist()
    assert (sigmas[0], sigmas[-1]) == (1.0, 0.0)


UNIPC_20 = [
    1.0, 0.9827765, 0.9643240, 0.9445062, 0.9231657, 0.9001200, 0.8751562, 0.8480245, 0.8184296, 0.7860203, 0.7503748,
    0.7109831, 0.6672218, 0.6183213, 0.5633196, 0.5009990, 0.4297945, 0.3476608, 0.2518722, 0.1387150, 0.0,
]  # fmt: skip


def test_wans_sigmas_are_unipcs_to_the_last_but_one():
    """Figures of `WanPipeline` with flow_shift 3 and 20 steps. Euler's scheduler would have 0.1498 and 0.0089 there."""
    sigmas, timesteps = wan_family().denoising_schedule(20)
    assert sigmas == pytest.approx(UNIPC_20, abs=1e-6)
    assert (timesteps[0], timesteps[1], timesteps[-1]) == (999, 982, 138)


def test_pixels_become_numbers_as_in_diffusers():
    from diffusers.image_processor import VaeImageProcessor

    pixels = torch.rand(1, 3, 8, 8) * 2.4 - 1.2
    (image,) = VaeImageProcessor().postprocess(pixels, output_type="pil")
    assert torch.equal(
        to_uint8(pixels)[0], torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(8, 8, 3).permute(2, 0, 1)
    )


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_encoded_once_and_the_oldest_is_given_up(name):
    family = FAMILIES[name](cached_prompts=2)
    one = family.conditions.get(["a cat", "a cat", "a dog"], CPU)
    assert family.conditions.num_encoded == 2
    assert all(torch.equal(value[0], value[1]) for value in one.values())
    assert not torch.equal(one["encoder_hidden_states"][0], one["encoder_hidden_states"][2])
    family.conditions.get(["a dog", "a cup"], CPU)
    assert family.conditions.num_encoded == 3
    family.conditions.get(["a cat"], CPU)
    assert family.conditions.num_encoded == 4


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_is_encoded_to_the_same_bits_alone_and_beside_others(name):
    texts = ["a cat", "two photos of a small cat left of the yellow cup", "a red picture"]
    together = FAMILIES[name]().conditions.get(texts, CPU)
    for row, text in enumerate(texts):
        alone = FAMILIES[name]().conditions.get([text], CPU)
        assert all(torch.equal(together[key][row], value[0]) for key, value in alone.items())


@pytest.mark.parametrize("name", NAMES)
def test_adapters_change_nothing_at_first_and_switched_off_they_are_the_reference(name):
    family = FAMILIES[name](lora=LoRASettings(rank=2, alpha=4))
    plain, model = family.build().eval(), family.add_adapters(family.build()).eval()
    before = sampled(family, plain, ["a cat"], 2.0, seeds=(1,))[0].final
    assert torch.equal(sampled(family, model, ["a cat"], 2.0, seeds=(1,))[0].final, before)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert 0 < sum(p.numel() for p in trained) < sum(p.numel() for p in plain.parameters()) / 2
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.1
    assert not torch.allclose(sampled(family, model, ["a cat"], 2.0, seeds=(1,))[0].final, before)
    with adapters_off(family, model):
        assert torch.equal(sampled(family, model, ["a cat"], 2.0, seeds=(1,))[0].final, before)


def test_a_layer_that_is_not_there_is_refused_with_those_that_are():
    family = sd3_family(lora=LoRASettings(target_modules=("q_proj",)))
    with pytest.raises(ValueError, match=r"got 'q_proj'; there are .*attn.to_q"):
        family.add_adapters(family.build())


@pytest.mark.parametrize(
    ("family", "words"),
    [
        (sd3_family(height=15), "height must be a multiple of 4, got 15; 12 is near"),
        (wan_family(width=40), "width must be a multiple of 16, got 40; 32 is near"),
        (wan_family(num_frames=6), "num_frames must be one above a multiple of 4, got 6; 5 is near"),
    ],
)
def test_a_size_that_the_model_lacks_is_refused(family, words):
    with pytest.raises(ValueError, match=words):
        family.latent_shape()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        ({}, "has no model_index.json"),
        ({"model_index.json": '{"_class_name": "WanPipeline"}'}, "holds a WanPipeline"),
    ],
)
def test_a_folder_without_the_pipeline_is_refused(content, words, tmp_path):
    folder = tmp_path / "pipeline"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    for use in (lambda family: family.build(), lambda family: family.latent_shape()):
        with pytest.raises(ValueError, match=f"a StableDiffusion3Pipeline of .* {words}; .*tiny_diffusion sd3"):
            use(sd3_family(str(folder)))


@pytest.mark.parametrize("lora", [None, LoRASettings(rank=2, alpha=4)])
@pytest.mark.parametrize("name", NAMES)
def test_in_bfloat16_a_checkpoint_holds_the_weights_to_the_last_bit(name, lora, tmp_path):
    """Also those that diffusers keeps in float32; new adapters add nothing."""
    family = FAMILIES[name](dtype="bfloat16", lora=lora)
    model = family.build()
    wanted = {key: value.clone() for key, value in model.state_dict().items()}
    saved = (family.add_adapters(model) if lora else model).state_dict()
    state = {f"model.{key}": value for key, value in saved.items()}
    torch.save({"state_dict": state, "lora": to_checkpoint(lora)}, tmp_path / "last.ckpt")
    again = plain_from(family, str(tmp_path / "last.ckpt"))
    assert {value.dtype for value in wanted.values()} >= {torch.bfloat16}
    assert any(value.dtype == torch.float32 for value in wanted.values()) == (name == "wan")
    assert {key: value.dtype for key, value in again.state_dict().items()} == {k: v.dtype for k, v in wanted.items()}
    assert all(torch.equal(value, wanted[key]) for key, value in again.state_dict().items())
    others = {key: value.dtype for key, value in again.named_buffers()}  # rotary frequencies stay precise
    assert others == {key: value.dtype for key, value in model.named_buffers()}


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_no_gradient(name):
    found = []
    for on in (False, True):
        family = FAMILIES[name](gradient_checkpointing=on)
        model = family.build().train()
        latents = seeded_noise(0, 0, family.latent_shape())[None]
        family.forward(model, latents, torch.tensor([500.0]), ["a cat"], 2.0).square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
