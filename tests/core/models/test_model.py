"""The model as a whole: what it is without a source, with plain concatenation, and in parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from small import people, small_model, source_of
from torch.nn.functional import softmax

from truepose_core.errors import TruePoseError
from truepose_core.models.codec import PixelCodec
from truepose_core.models.config import TruePoseConfig, mannequin_config
from truepose_core.models.model import TruePoseModel
from truepose_core.models.processors import attention_sites
from truepose_core.parsing import HumanParsing
from truepose_core.pose.skeleton import draw_skeleton

LATENT = (16, 12)


def inputs(count=2):
    """Noise, steps, pose map and keypoints for `count` targets."""
    body = people().target.keypoints[:count]
    noise = torch.randn(count, 48, *LATENT, generator=torch.Generator().manual_seed(1))
    return noise, torch.tensor([700, 300, 100][:count]), draw_skeleton(body, 64, 48), body


def predict(model, call, count=2):
    noise, steps, pose_map, _ = inputs(count)
    return model.denoise(noise, steps, call, model.encode_pose(pose_map))


@pytest.mark.parametrize("fusion", ["concat", "hpfa"])
@pytest.mark.parametrize("caa", [False, True])
def test_region_weights_of_zero_are_no_source_bit_for_bit(fusion, caa):
    model = small_model(fusion, caa)
    source = model.encode_source(*source_of(people(), slice(1)))
    body = inputs()[3]
    alone = predict(model, model.target_pass(LATENT, None))
    assert torch.equal(predict(model, model.target_pass(LATENT, source, body, omega=torch.zeros(7))), alone)
    assert torch.equal(predict(model, model.target_pass(LATENT, source, body, strength=0.0)), alone)
    assert not torch.allclose(predict(model, model.target_pass(LATENT, source, body)), alone, atol=1e-3)


@pytest.mark.parametrize("fusion", ["concat", "hpfa"])
@pytest.mark.parametrize("caa", [False, True])
def test_rows_that_drop_the_source_are_rows_without_one(fusion, caa):
    model = small_model(fusion, caa)
    source = model.encode_source(*source_of(people(), slice(1)))
    body = inputs()[3]
    mixed = predict(model, model.target_pass(LATENT, source, body, keep=torch.tensor([True, False])))
    full = predict(model, model.target_pass(LATENT, source, body))
    alone = predict(model, model.target_pass(LATENT, None))
    torch.testing.assert_close(mixed[0], full[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[1], alone[1], atol=1e-5, rtol=1e-4)


class Concatenated:
    """AnimateAnyone's spatial attention, written out: keys and values of target and source side by side."""

    def __init__(self, source):
        self.source = source

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        x = hidden_states
        both = torch.cat([x, self.source.expand(x.shape[0], -1, -1)], 1)
        q, k, v = attn.to_q(x), attn.to_k(both), attn.to_v(both)
        heads = []
        width = q.shape[-1] // attn.heads
        for h in range(attn.heads):
            part = slice(h * width, (h + 1) * width)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / width**0.5
            heads.append(softmax(scores, -1) @ v[..., part])
        return attn.to_out[0](torch.cat(heads, -1))


def plain_unet(config, net):
    """diffusers' own UNet with diffusers' own attention and these weights."""
    unet = UNet2DConditionModel(**config.unet).double().eval()
    unet.load_state_dict(net.state_dict())
    return unet


def test_concat_is_animate_anyone_written_out():
    model = small_model("concat", caa=False).double()
    noise, steps, pose_map, body = (x.double() if x.is_floating_point() else x for x in inputs())
    image, parsing, keypoints = source_of(people(), slice(1))
    source = model.encode_source(image.double(), parsing, keypoints)
    ours = model.denoise(noise, steps, model.target_pass(LATENT, source, body), model.encode_pose(pose_map))

    seen = {}
    reference, target = plain_unet(model.config, model.source_net), plain_unet(model.config, model.target_net)
    for name, block in attention_sites(reference).items():
        block.attn1.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    text = noise.new_zeros(1, 1, 64)
    reference(PixelCodec(4).encode(image.double()), torch.zeros(1, dtype=torch.long), text)
    for name, block in attention_sites(target).items():
        block.attn1.set_processor(Concatenated(seen[name]))
    target.conv_in.register_forward_hook(lambda _, args, out: out + model.pose_encoder(pose_map))
    theirs = target(noise, steps, text.expand(2, -1, -1)).sample
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_hpfa_that_has_learned_nothing_and_matches_nothing_is_concat():
    model = small_model("hpfa", caa=False)
    for site in model.hpfa.values():
        site.region_log_weight.zero_()
    plain = TruePoseModel(replace(model.config, fusion="concat")).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("hpfa.")})
    source = model.encode_source(*source_of(people(), slice(1)))
    body = inputs()[3]
    ours = predict(model, model.target_pass(LATENT, source, body, beta=0.0, gamma=0.0))
    theirs = predict(plain, plain.target_pass(LATENT, source, body))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_model_without_a_source_net_reads_no_source():
    model = small_model("none", caa=False)
    assert model.source_net is None
    source = model.encode_source(*source_of(people(), slice(1)))
    body = inputs()[3]
    assert torch.equal(
        predict(model, model.target_pass(LATENT, source, body)), predict(model, model.target_pass(LATENT, None))
    )


def test_kept_keys_and_values_change_nothing():
    model = small_model()
    source = model.encode_source(*source_of(people(), slice(1)))
    body, kv = inputs()[3], {}
    first = predict(model, model.target_pass(LATENT, source, body, kv=kv))
    assert set(kv) == set(attention_sites(model.target_net))
    assert torch.equal(predict(model, model.target_pass(LATENT, source, body, kv=kv)), first)
    assert torch.equal(predict(model, model.target_pass(LATENT, source, body)), first)


def test_alignment_rows_sum_to_one_at_every_site():
    model = small_model()
    source = model.encode_source(*source_of(people(), slice(1)))
    found = {}
    predict(model, model.target_pass(LATENT, source, inputs()[3], alignments=found))
    assert set(found) == set(attention_sites(model.target_net))
    for rows in found.values():
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:2]), atol=1e-5, rtol=0)


def test_training_pass_is_the_inference_pass():
    model = small_model()
    pairs = people()
    noise, steps, pose_map, body = inputs()
    image, parsing, keypoints = source_of(pairs, slice(2))
    keep = torch.tensor([True, True])
    ours, *_ = model(image, parsing, keypoints, noise, steps, pose_map, body, keep, keep)
    source = model.encode_source(image, parsing, keypoints)
    call = model.target_pass(LATENT, source, body)
    theirs = model.denoise(noise, steps, call, model.encode_pose(pose_map))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_features_of_another_family_are_refused():
    model = small_model("concat", caa=False)
    source = replace(model.encode_source(*source_of(people(), slice(1))), family="sdxl")
    with pytest.raises(TruePoseError, match="'sdxl' model; this one is 'mannequin'"):
        model.target_pass(LATENT, source, inputs()[3])


def test_pixel_codec_is_exact_both_ways():
    image = people().source.image
    codec = PixelCodec(4)
    latent = codec.encode(image)
    assert latent.shape == (3, 48, 16, 12)
    assert latent.abs().max() <= 1
    torch.testing.assert_close(codec.decode(latent), image, atol=1e-6, rtol=0)


def test_config_survives_json():
    for config in (mannequin_config(), mannequin_config("none", caa=False), mannequin_config("concat", aligned=True)):
        again = TruePoseConfig.from_json(config.to_json())
        assert again.to_json() == config.to_json()
        assert (again.size, again.pose_widths, again.caa) == (config.size, config.pose_widths, config.caa)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"family": "x", "unet": {}, "sparkle": 1, "pose_widths": [], "size": []}', "unknown settings: sparkle"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", r"is \[\]; expected an object"),
        ('{"family": "x"}', "lacks unet"),
        ('{"family": 3, "unet": {}}', "family of .* is 3; expected a text"),
        ('{"family": "x", "unet": []}', r"unet of .* is \[\]; expected an object"),
        ('{"family": "x", "unet": {"block_out_channels": [1000000]}}', "block_out_channels .* is 1000000; .*65536"),
        ('{"family": "x", "unet": {}, "patch": -1}', "patch of .* is -1; expected 0 or more"),
        ('{"family": "x", "unet": {}, "patch": 1000}', "patch is 1000 .*1 to 64"),
        ('{"family": "x", "unet": {}, "beta": 1e999}', "beta of .* is inf; expected a finite number"),
        ('{"family": "x", "unet": {}, "beta": "much"}', "beta of .* is 'much'; expected a number"),
        ('{"family": "x", "unet": {}, "aligned": 1}', "aligned of .* is 1; expected true or false"),
        ('{"family": "x", "unet": {}, "size": [64]}', r"size of .* is \[64\]; expected a list of 2"),
        ('{"family": "x", "unet": {}, "size": [64, 1]}', r"size \(64, 1\).*16 to"),
        ('{"family": "x", "unet": {}, "codec": "jpeg"}', "codec is 'jpeg'; expected one of pixels, vae"),
        ('{"family": "x", "unet": {}, "caa": 5}', "caa of .* is 5; expected an object"),
        ('{"family": "x", "unet": {}, "caa": {"width": null}}', "width of caa of .* is None; expected a whole number"),
        ('{"family": "x", "unet": {"a": {"a": {"a": {"a": {}}}}}}', "nested too deeply"),
    ],
)
def test_damaged_config_is_an_error(text, message):
    with pytest.raises(TruePoseError, match=message):
        TruePoseConfig.from_json(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"fusion": "magic"}, "'magic'; expected one of none, concat, hpfa"), ({"prediction_type": "y"}, "'y'; expected")],
)
def test_config_refuses_what_it_does_not_know(change, message):
    with pytest.raises(TruePoseError, match=message):
        replace(mannequin_config(), **change)


def test_model_with_a_vae_codec_needs_its_vae():
    with pytest.raises(TruePoseError, match="needs its VAE"):
        TruePoseModel(replace(mannequin_config("concat", caa=False, widths=(32,)), codec="vae"))


def test_hidden_regions_say_nothing_through_caa():
    model = small_model()
    image, parsing, _ = source_of(people(), slice(1))
    labels = parsing.labels()
    without_hair = HumanParsing.from_labels(labels.masked_fill(labels == 2, 0))
    tokens = model.caa(image, without_hair)
    hair = tokens.regions[:, 2] == 1
    assert not tokens.shown[:, hair].any()
    assert not tokens.tokens[:, hair].any()
