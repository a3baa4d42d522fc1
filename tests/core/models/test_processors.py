"""Laws of HPFA and CAA inside a diffusers UNet, against independent implementations in plain torch."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

from truepose_core.errors import TruePoseError
from truepose_core.mannequin import sample_pairs
from truepose_core.models.config import mannequin_config
from truepose_core.models.model import TruePoseModel
from truepose_core.models.processors import SourcePass, TargetPass, attention_sites, key_of, token_counts
from truepose_core.parsing import HumanParsing
from truepose_core.parsing.carry import region_prior
from truepose_core.pose.limbs import body_coordinates

SIZE = (16, 12)
EXACT = 1e-10
OMEGA = torch.tensor([0.0, 1.0, 0.5, 1.0, 0.0, 0.25, 1.0], dtype=torch.float64)


def build(fusion="hpfa", caa=True, aligned=False, **parts):
    """A tiny model with every weight random, those that start at zero too, in float64."""
    torch.manual_seed(0)
    model = TruePoseModel(mannequin_config(fusion, caa, widths=(32, 32), aligned=aligned), **parts).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if (p == p.flatten()[0]).all():
                p.add_(torch.randn_like(p) * 0.2)
        # The first normalised features of a random net are faint: louder ones make the laws sharper.
        for name, p in model.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight")):
                p.mul_(3)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def people():
    """Two sources and two target poses of each."""
    pairs = sample_pairs(4, "test")
    image, parsing, body = (x.double() for x in (pairs.source.image, pairs.source.parsing, pairs.source.keypoints))
    target_body, target_parsing = pairs.target.keypoints.double(), pairs.target.parsing.double()
    return dict(
        image=image[:2],
        parsing=HumanParsing(parsing[:2] / parsing[:2].sum(1, keepdim=True)),
        body=body[:2],
        target_body=target_body,
        target_parsing=HumanParsing(target_parsing / target_parsing.sum(1, keepdim=True)),
    )


@pytest.fixture(scope="module")
def source(model, people):
    return model.encode_source(people["image"], people["parsing"], people["body"])


def noise(batch=4, seed=0):
    return torch.randn(batch, 48, *SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TIMES = torch.tensor([10, 400, 700, 999])


def seen_by(net, run):
    """Input and output of every attn1 and attn2 of the net during run(): {(site, name): (input, output)}."""
    found, hooks = {}, []
    for site, block in attention_sites(net).items():
        for name in ("attn1", "attn2"):

            def keep(_, args, kwargs, output, key=(site, name)):
                found[key] = (args[0] if args else kwargs["hidden_states"], output)

            hooks.append(getattr(block, name).register_forward_hook(keep, with_kwargs=True))
    run()
    for hook in hooks:
        hook.remove()
    return found


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def plain_attention(q, k, v, bias=0.0):
    return (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v


def project(attn, x):
    return tuple(heads(x @ f.weight.mT, attn.heads) for f in (attn.to_q, attn.to_k, attn.to_v))


def output(attn, out):
    return out.transpose(1, 2).flatten(2) @ attn.to_out[0].weight.mT + attn.to_out[0].bias


def hpfa_by_hand(block, site, x, source_x, rows, weight, places, target_rows, target_places):
    """The formula of HPFA with an explicit bias; everything [B, ...], the source repeated already."""
    attn = block.attn1
    q, k, v = project(attn, x)
    _, ks, vs = project(attn, source_x)
    bias = torch.where(weight > 0, weight.log(), -torch.inf)[:, None, None]
    beta, gamma = (p.clamp(min=0)[None, :, None, None] for p in (site.beta, site.gamma))
    bias = bias + beta * (target_rows @ rows.mT)[:, None]
    bias = bias + torch.einsum("hr,bmr->bhm", site.region_log_weight, rows)[:, :, None]
    distance = torch.cdist(target_places[..., :2], places[..., :2]).square()
    bias = bias - gamma * (target_places[..., None, 2] * places[:, None, :, 2] * distance)[:, None]
    bias = torch.cat([torch.zeros(*bias.shape[:3], x.shape[1]), bias], -1)
    return output(attn, plain_attention(q, torch.cat([k, ks], 2), torch.cat([v, vs], 2), bias))


def alignment_by_hand(block, site, x, tokens, prior):
    """CAA's P: the probability that a position's query puts on each region's tokens, mean over heads."""
    q = heads(x @ block.attn2.to_q.weight.mT, block.attn2.heads)
    k = heads(tokens.tokens @ site.to_k.weight.mT, block.attn2.heads)
    logits = q @ k.mT * q.shape[-1] ** -0.5
    logits = logits + site.kappa[None, :, None, None] * (prior @ tokens.regions.mT)[:, None]
    logits = logits.masked_fill(~tokens.shown[:, None, None], -torch.inf)
    return (logits.softmax(-1) @ tokens.regions).mean(1)


@pytest.mark.parametrize("region_rows", ["CAA", "given", "prior"])
def test_hpfa_inside_the_unet_is_the_formula(model, people, source, region_rows):
    """At every site; P is the user's parsing where given, else CAA's alignment, else the skeleton prior."""
    given = people["target_parsing"] if region_rows == "given" else None
    features = replace(source, caa=None) if region_rows == "prior" else source
    call = model.target_pass(
        SIZE, features, people["target_body"], given, omega=OMEGA, strength=0.5, kv=None, alignments={}
    )
    found = seen_by(model.target_net, lambda: model.denoise(noise(), TIMES, call, None))
    twice = [0, 0, 1, 1]
    for name, block in attention_sites(model.target_net).items():
        x, out = found[name, "attn1"]
        h, w = token_counts(model.target_net, SIZE)[x.shape[1]]
        masks, body = people["parsing"].masks[twice], people["body"][twice]
        rows, places = HumanParsing(masks).tokens(h, w), body_coordinates(body, h, w, 0.75)
        prior = region_prior(HumanParsing(masks), body, people["target_body"], *SIZE).tokens(h, w)
        if region_rows == "given":
            target_rows = given.tokens(h, w)
        elif region_rows == "prior":
            target_rows = prior
        else:
            tokens = source.caa.repeat(2)
            target_rows = alignment_by_hand(block, model.caa.target_sites[key_of(name)], x, tokens, prior)
            assert (call.alignments[name] - target_rows).abs().max() < EXACT
        expected = hpfa_by_hand(
            block,
            model.hpfa[key_of(name)],
            x,
            source.sites[name][twice],
            rows,
            0.5 * rows @ OMEGA,
            places,
            target_rows,
            body_coordinates(people["target_body"], h, w, 0.75),
        )
        assert (out - expected).abs().max() < EXACT, name
        assert (out - output(block.attn1, plain_attention(*project(block.attn1, x)))).abs().max() > 1e-3, name
    assert (len(call.alignments) > 0) == (region_rows == "CAA")


def test_concat_is_key_value_concatenation(people):
    model = build("concat", caa=False)
    source = model.encode_source(people["image"], people["parsing"], people["body"])
    call = model.target_pass(SIZE, source, people["target_body"])
    found = seen_by(model.target_net, lambda: model.denoise(noise(), TIMES, call, None))
    for name, block in attention_sites(model.target_net).items():
        x, out = found[name, "attn1"]
        q, k, v = project(block.attn1, x)
        _, ks, vs = project(block.attn1, source.sites[name].repeat_interleave(2, 0))
        expected = plain_attention(q, torch.cat([k, ks], 2), torch.cat([v, vs], 2))
        assert (out - output(block.attn1, expected)).abs().max() < EXACT, name


def test_one_value_for_every_head_replaces_what_was_learned(model, people, source):
    strong = build()
    with torch.no_grad():
        for site in strong.hpfa.values():
            site.beta.fill_(1.5), site.gamma.fill_(3.0)
    ours = model.target_pass(SIZE, source, people["target_body"], beta=1.5, gamma=3.0)
    learned = strong.target_pass(SIZE, source, people["target_body"])
    one, two = model.denoise(noise(), TIMES, ours, None), strong.denoise(noise(), TIMES, learned, None)
    assert (one - two).abs().max() < EXACT


def test_caa_is_a_decoupled_cross_attention(model, people, source):
    """attn2 gives CrossAttn(x, context) + lambda CrossAttn(x, E), before the output projection."""
    call = model.target_pass(SIZE, source, people["target_body"])
    found = seen_by(model.target_net, lambda: model.denoise(noise(), TIMES, call, None))
    for name, block in attention_sites(model.target_net).items():
        (x, out), attn, site = found[name, "attn2"], block.attn2, model.caa.target_sites[key_of(name)]
        tokens = source.caa.repeat(2)
        q = heads(x @ attn.to_q.weight.mT, attn.heads)
        k, v = (heads(tokens.tokens @ f.weight.mT, attn.heads) for f in (site.to_k, site.to_v))
        bias = site.kappa[None, :, None, None] * (call.prior[x.shape[1]] @ tokens.regions.mT)[:, None]
        bias = bias.masked_fill(~tokens.shown[:, None, None], -torch.inf)
        # The context is one zero token, which adds nothing.
        expected = output(attn, site.scale * plain_attention(q, k, v, bias))
        assert (out - expected).abs().max() < EXACT, name


def test_lambda_0_leaves_the_nets_as_they_were(people):
    """With fusion left out, a CAA that weighs nothing is no CAA, bit for bit."""
    model = build("concat")
    with torch.no_grad():
        for sites in (model.caa.source_sites, model.caa.target_sites):
            for site in sites.values():
                site.scale.zero_()
    source = model.encode_source(people["image"], people["parsing"], people["body"])
    call = model.target_pass(SIZE, source, people["target_body"])
    silent = replace(call, caa=None)
    for one, two in zip(
        (*source.sites.values(), model.denoise(noise(), TIMES, call, None)),
        (*source_sites_without_caa(model, people).values(), model.denoise(noise(), TIMES, silent, None)),
        strict=True,
    ):
        assert torch.equal(one, two)


def source_sites_without_caa(model, people):
    call = SourcePass(SIZE)
    latent = model.codec.encode(people["image"])
    context = latent.new_zeros(2, 1, model.context_width)
    model.source_net(latent, torch.zeros(2).long(), context, cross_attention_kwargs={"truepose": call})
    return call.sites


@pytest.mark.parametrize("nothing", [dict(omega=torch.zeros(7)), dict(strength=0.0), dict(omega=torch.zeros(7), kv={})])
def test_no_weight_is_no_source_bit_for_bit(model, people, source, nothing):
    pose = torch.randn(4, 32, *SIZE, dtype=torch.float64)
    plain = model.denoise(noise(), TIMES, model.target_pass(SIZE, None), pose)
    call = model.target_pass(SIZE, source, people["target_body"], **nothing)
    assert torch.equal(model.denoise(noise(), TIMES, call, pose), plain)
    # The attention itself, without the shortcut of `target_pass`.
    direct = replace(model.target_pass(SIZE, source, people["target_body"]), caa=None, **nothing)
    assert torch.equal(model.denoise(noise(), TIMES, direct, pose), plain)


def test_little_strength_is_nearly_no_source(model, people, source):
    source = replace(source, caa=None)
    plain = model.denoise(noise(), TIMES, model.target_pass(SIZE, None), None)
    full = model.denoise(noise(), TIMES, model.target_pass(SIZE, source, people["target_body"]), None)
    call = model.target_pass(SIZE, source, people["target_body"], strength=1e-9)
    assert (model.denoise(noise(), TIMES, call, None) - plain).abs().max() < 1e-5
    assert (full - plain).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dropped_rows_equal_the_plain_net_and_the_others_do_not_notice(people, dtype):
    model = build().to(dtype)
    people = {k: v.to(dtype=dtype) for k, v in people.items()}
    source = model.encode_source(people["image"], people["parsing"], people["body"])
    keep = torch.tensor([True, False, False, True])
    run = (noise().to(dtype), TIMES)
    mixed = model.denoise(*run, model.target_pass(SIZE, source, people["target_body"], keep=keep), None)
    plain = model.denoise(*run, model.target_pass(SIZE, None), None)
    full = model.denoise(*run, model.target_pass(SIZE, source, people["target_body"]), None)
    tolerance = 1e-5 if dtype == torch.float32 else EXACT
    assert (mixed - plain)[~keep].abs().max() < tolerance
    assert (mixed - full)[keep].abs().max() < tolerance


def test_training_drops_conditions_as_guidance_does(people):
    """Row by row, a training pass is the pass without conditions, with the pose, or with all, as the pipeline asks."""
    model = build(aligned=True)
    maps = torch.rand(4, 3, 64, 48, dtype=torch.float64)
    keep_source, keep_pose = torch.tensor([True, False, False, True]), torch.tensor([True, True, False, True])
    given = (people["image"], people["parsing"], people["body"])
    mixed, alignments, _ = model(*given, noise(), TIMES, maps, people["target_body"], keep_source, keep_pose)
    source, alone = model.encode_source(*given), model.target_pass(SIZE, None)
    full, pose = model.target_pass(SIZE, source, people["target_body"]), model.encode_pose(maps)
    aligned = model.encode_aligned(source, people["target_body"])
    nothing = model.denoise(noise(), TIMES, alone, None)
    posed = model.denoise(noise(), TIMES, alone, pose)
    everything = model.denoise(noise(), TIMES, full, pose, aligned=aligned)
    for row, expected in enumerate((everything, posed, nothing, everything)):
        assert (mixed[row] - expected[row]).abs().max() < EXACT
    assert min((a - b).abs().max() for a, b in ((nothing, posed), (posed, everything))) > 1e-2
    assert set(alignments) == set(attention_sites(model.target_net))


def test_sources_times_targets_equal_one_by_one(model, people, source):
    call = model.target_pass(SIZE, source, people["target_body"], omega=OMEGA)
    together = model.denoise(noise(), TIMES, call, None)
    for i in range(4):
        one, s = slice(i, i + 1), slice(i // 2, i // 2 + 1)
        alone = model.encode_source(people["image"][s], people["parsing"][i // 2], people["body"][s])
        call = model.target_pass(SIZE, alone, people["target_body"][one], omega=OMEGA)
        assert (model.denoise(noise()[one], TIMES[one], call, None) - together[one]).abs().max() < EXACT


def test_one_source_serves_many_targets(model, people):
    alone = model.encode_source(people["image"][:1], people["parsing"][0], people["body"][:1])
    twice = model.encode_source(
        *(people[k][[0, 0]] if k != "parsing" else two(people) for k in ("image", "parsing", "body"))
    )
    one, two_ = (
        model.denoise(noise(), TIMES, model.target_pass(SIZE, f, people["target_body"]), None) for f in (alone, twice)
    )
    assert (one - two_).abs().max() < EXACT


def two(people):
    return HumanParsing(people["parsing"].masks[[0, 0]])


def test_the_source_does_not_depend_on_the_targets(model, people, source):
    before = {name: x.clone() for name, x in source.sites.items()}
    pose = torch.randn(4, 32, *SIZE, dtype=torch.float64)
    model.denoise(noise(), TIMES, model.target_pass(SIZE, source, people["target_body"]), pose)
    again = model.encode_source(people["image"], people["parsing"], people["body"])
    for name, x in before.items():
        assert torch.equal(source.sites[name], x) and torch.equal(again.sites[name], x)


def test_sites_come_in_the_order_of_the_forward_pass(model, source):
    assert list(source.sites) == list(attention_sites(model.source_net)) == list(attention_sites(model.target_net))
    for name, x in source.sites.items():
        assert x.shape[1] in token_counts(model.target_net, SIZE), name


def test_a_source_of_another_family_is_refused(model, people, source):
    with pytest.raises(TruePoseError, match=r"'sd15'.*'mannequin'"):
        model.target_pass(SIZE, replace(source, family="sd15"), people["target_body"])


@pytest.mark.parametrize("omega", [None, OMEGA])
def test_kept_keys_and_values_change_nothing_and_are_made_once(model, people, source, omega):
    fresh = model.target_pass(SIZE, source, people["target_body"], omega=omega)
    kv = {}
    kept = model.target_pass(SIZE, source, people["target_body"], omega=omega, kv=kv)
    calls = []
    hooks = [
        block.attn1.to_k.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, block in attention_sites(model.target_net).items()
    ]
    first = model.denoise(noise(), TIMES, kept, None)
    assert set(kv) == set(attention_sites(model.target_net))
    assert len(calls) == 2 * len(kv), "a target's and a source's projection per site"
    held, calls[:] = dict(kv), []
    second = model.denoise(noise(seed=1), TIMES, kept, None)
    assert len(calls) == len(kv), "the target's alone"
    assert all(kv[name] is held[name] for name in kv)
    for hook in hooks:
        hook.remove()
    assert torch.equal(first, model.denoise(noise(), TIMES, fresh, None))
    assert torch.equal(second, model.denoise(noise(seed=1), TIMES, fresh, None))


def test_tokens_of_weight_0_are_not_projected(model, people, source):
    """Dropped before attention, not masked: only rows with some weight reach the key projection."""
    kv = {}
    call = model.target_pass(SIZE, source, people["target_body"], omega=OMEGA, kv=kv)
    model.denoise(noise(), TIMES, call, None)
    for name, tokens in kv.items():
        h, w = source.grid(name)
        kept = (people["parsing"].tokens(h, w) @ OMEGA > 1e-6).sum(-1).max()
        assert tokens.k.shape[2] == kept < h * w


def test_the_pose_is_added_after_conv_in_and_only_inside_denoise(model):
    outputs = []
    hook = model.target_net.conv_in.register_forward_hook(lambda _, args, out: outputs.append((args[0], out)))
    pose = torch.randn(4, 32, *SIZE, dtype=torch.float64)
    call = model.target_pass(SIZE, None)
    context = noise().new_zeros(4, 1, model.context_width)
    with_pose = model.denoise(noise(), TIMES, call, pose)
    without = model.denoise(noise(), TIMES, call, None)
    direct = model.target_net(noise(), TIMES, context).sample
    hook.remove()
    conv = nn.functional.conv2d(noise(), model.target_net.conv_in.weight, model.target_net.conv_in.bias, padding=1)
    assert torch.equal(outputs[0][1], conv + pose)
    assert torch.equal(outputs[1][1], conv) and torch.equal(outputs[2][1], conv)
    assert torch.equal(without, direct)
    assert not torch.allclose(with_pose, without)


def test_the_pose_is_forgotten_when_a_pass_fails(model):
    pose = torch.randn(4, 32, *SIZE, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        model.denoise(noise()[:, :3], TIMES, model.target_pass(SIZE, None), pose)
    context = noise().new_zeros(4, 1, model.context_width)
    plain = model.denoise(noise(), TIMES, model.target_pass(SIZE, None), None)
    assert torch.equal(model.target_net(noise(), TIMES, context).sample, plain)


def test_threads_with_different_poses_do_not_meet(model, people, source):
    poses = [torch.randn(4, 32, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    calls = [model.target_pass(SIZE, source, people["target_body"], strength=s) for s in (1.0, 0.3)]
    alone = [model.denoise(noise(), TIMES, *x) for x in zip(calls, poses, strict=True)]
    together, barrier = {}, threading.Barrier(2)

    def work(i):
        with torch.no_grad():
            barrier.wait()
            together[i] = [model.denoise(noise(), TIMES, calls[i], poses[i]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    [t.start() for t in threads], [t.join() for t in threads]
    for i in (0, 1):
        assert all(torch.equal(x, alone[i]) for x in together[i])


@pytest.mark.parametrize("at_once", [1, 3])
def test_some_heads_at_a_time_give_the_same(model, people, source, at_once):
    call = model.target_pass(SIZE, source, people["target_body"], omega=OMEGA)
    whole = model.denoise(noise(), TIMES, call, None)
    attentions = [a for b in attention_sites(model.target_net).values() for a in (b.attn1, b.attn2)]
    for attention in attentions:
        attention.processor.heads_at_once = at_once
    sliced = model.denoise(noise(), TIMES, call, None)
    for attention in attentions:
        attention.processor.heads_at_once = None
    assert (whole - sliced).abs().max() < EXACT


def test_one_net_may_play_both_parts(people):
    """Training-free use holds one UNet: it is the same as two with equal weights."""
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel(**mannequin_config(widths=(32, 32)).unet)
    one, both = build(caa=False, source_net=net, target_net=net), build(caa=False)
    both.source_net.load_state_dict(net.state_dict())
    both.target_net.load_state_dict(net.state_dict())
    both.hpfa.load_state_dict(one.hpfa.state_dict())
    for model in (both, one):
        for site in attention_sites(model.target_net).values():
            assert site.attn1.processor.hpfa is not None
    results = []
    for model in (both, one):
        source = model.encode_source(people["image"], people["parsing"], people["body"])
        results.append(model.denoise(noise(), TIMES, model.target_pass(SIZE, source, people["target_body"]), None))
    assert (results[0] - results[1]).abs().max() < EXACT


@pytest.mark.parametrize("size", [(16, 12), (15, 11), (9, 14)])
def test_token_counts_are_those_of_the_forward_pass(model, size):
    call = SourcePass(size)
    latent = torch.randn(1, 48, *size, dtype=torch.float64)
    context = latent.new_zeros(1, 1, model.context_width)
    model.source_net(latent, torch.zeros(1).long(), context, cross_attention_kwargs={"truepose": call})
    counts = token_counts(model.source_net, size)
    assert {x.shape[1] for x in call.sites.values()} == set(counts)
    assert all(h * w == n for n, (h, w) in counts.items())


def test_a_pass_without_anything_is_the_unet_of_diffusers(model):
    """Our processors without a source compute what diffusers' own do."""
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel(**model.config.unet).double().eval()
    net.load_state_dict(model.target_net.state_dict())
    context = torch.randn(4, 3, model.context_width, dtype=torch.float64)
    ours = model.target_net(noise(), TIMES, context, cross_attention_kwargs={"truepose": TargetPass(SIZE)}).sample
    assert (ours - net(noise(), TIMES, context).sample).abs().max() < EXACT
