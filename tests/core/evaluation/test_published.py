"""Each preset beside an independent computation of the protocol it follows, on small pictures and random networks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from truepose_core.cli import main
from truepose_core.datasets.pairs import Pair
from truepose_core.errors import TruePoseError
from truepose_core.evaluation import perception, protocols
from truepose_core.evaluation.perception import frechet_distance, inception, lpips_network, moments
from truepose_core.evaluation.protocols import PRESETS, best_sample, counted, read_pair
from truepose_core.evaluation.published import evaluate_pairs, find_items
from truepose_core.mannequin import render_people

N = 5
LIMIT = 1e-4


def picture(seed: int, size: tuple[int, int]) -> np.ndarray:
    """Soft blobs of colour: bytes [H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Results and true pictures of `N` pairs at 256x256 (as PIDM stores them), and a reference set."""
    folder = tmp_path_factory.mktemp("published")
    for part in ("truth", "results", "real"):
        (folder / part).mkdir()
    rng = np.random.default_rng(7)
    for i in range(N):
        true = picture(i, (256, 256))
        noisy = np.clip(true + rng.normal(0, 12, true.shape), 0, 255).astype(np.uint8)
        Image.fromarray(true).save(folder / "truth" / f"t{i}.png")
        Image.fromarray(noisy).save(folder / "results" / f"s{i}_to_t{i}.png")
    for i in range(4):
        Image.fromarray(picture(100 + i, (300, 230))).save(folder / "real" / f"r{i}.jpg", quality=95)
    (folder / "pairs.csv").write_text("from,to\n" + "".join(f"s{i}.jpg,t{i}.jpg\n" for i in range(N)))
    return folder


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """torchvision's Inception and AlexNet with random weights, as files."""
    from torchvision.models import alexnet, inception_v3

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    net = inception_v3(weights=None, init_weights=False, aux_logits=True)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    for module in net.Mixed_7c.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Distances of random features are small; 1e-4 shall be small beside them.
            nn.init.constant_(module.weight, 10.0)
    torch.save(net.state_dict(), folder / "inception.pth")
    torch.save(alexnet(weights=None).state_dict(), folder / "alexnet.pth")
    return folder, net.eval()


def items(files, count: int = N):
    return find_items([Pair(f"s{i}.jpg", f"t{i}.jpg") for i in range(count)], files / "truth", files / "results")


def pixels(path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1).double()


def reference_ssim(made: torch.Tensor, true: torch.Tensor, sigma: float | None, span: float) -> float:
    """SSIM written out with explicit windows (Wang et al. 2004), pictures [3, H, W] in float64."""
    if sigma is None:
        side, correction = 51, 51 * 51 / (51 * 51 - 1)
        window = torch.ones(side, dtype=torch.float64) / side
    else:
        radius, correction = int(3.5 * sigma + 0.5), 1.0
        at = torch.arange(-radius, radius + 1, dtype=torch.float64)
        window = (-(at**2) / (2 * sigma**2)).exp()
        window, side = window / window.sum(), 2 * radius + 1
    rows, columns = window[None, None, :, None], window[None, None, None, :]

    def mean(x):
        return F.conv2d(F.conv2d(x[:, None], rows), columns)[:, 0]

    a, b = mean(made), mean(true)
    va, vb, cov = (
        correction * (mean(x * y) - u * v)
        for x, y, u, v in ((made, made, a, a), (true, true, b, b), (made, true, a, b))
    )
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    value = (2 * a * b + c1) * (2 * cov + c2) / ((a * a + b * b + c1) * (va + vb + c2))
    return value.mean().item()


def interpolated(x: torch.Tensor, mode: str, size=(256, 176)) -> torch.Tensor:
    """OpenCV's filters on floats are torch's without antialiasing."""
    return F.interpolate(x[None], size, mode=mode, align_corners=False)[0]


def reference_pictures(preset: str, result, truth):
    """(made, true for SSIM and PSNR; made, true for the networks) of the protocol, float64 [3, H, W] in [0, 1]."""
    from torchvision import transforms

    made, true = pixels(result) / 255, pixels(truth) / 255
    if preset == "torchmetrics":
        return made, true, made, true
    if preset == "pidm":
        return made, true, interpolated(made, "bilinear"), interpolated(true, "bilinear")
    if preset == "pcdms":
        made, true = (interpolated(x, "bicubic") for x in (made, true))
        return made, true, made, true
    resize = transforms.Resize((256, 176), interpolation=transforms.InterpolationMode.BICUBIC, antialias=True)
    true = transforms.ToTensor()(resize(Image.open(truth).convert("RGB"))).double()
    small = F.interpolate(made[None].float(), (256, 176), mode="bicubic", antialias=True) * 255
    made = (small.clamp(0, 255).to(torch.uint8).to(torch.float32) / 255)[0].double()
    return made, true, made, true


SIGMAS = {"pidm": 1.2, "cfld": 1.5, "pcdms": 1.2}


@pytest.mark.parametrize("preset", PRESETS)
def test_ssim_and_psnr_equal_an_independent_computation(files, preset):
    report = evaluate_pairs(items(files), preset, metrics=["ssim", "psnr"], quiet=True)
    expected = {"psnr": [], "ssim": [], "ssim_256": []}
    for i in range(N):
        made, true, *_ = reference_pictures(preset, files / f"results/s{i}_to_t{i}.png", files / f"truth/t{i}.png")
        expected["psnr"].append(-10 * torch.log10((made - true).square().mean()).item())
        if preset == "torchmetrics":
            continue
        expected["ssim"].append(reference_ssim(made, true, None, 1.0))
        span = 255 * (made.max() - made.min()).item()
        expected["ssim_256"].append(reference_ssim(made * 255, true * 255, SIGMAS[preset], span))
    got = {figure.name: figure for figure in report.figures}
    assert set(got) == ({"psnr", "ssim"} if preset == "torchmetrics" else set(expected))
    for name, values in expected.items():
        if values:
            assert abs(got[name].value - np.mean(values)) < LIMIT, name
            assert (got[name].preset, got[name].pairs) == (preset, N)


def test_torchmetrics_defaults_are_torchmetrics_own_classes(files):
    from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

    similarity, noise = StructuralSimilarityIndexMeasure(data_range=1.0), []
    for i in range(N):
        made, true, *_ = reference_pictures(
            "torchmetrics", files / f"results/s{i}_to_t{i}.png", files / f"truth/t{i}.png"
        )
        similarity.update(made[None].float(), true[None].float())
        noise.append(PeakSignalNoiseRatio(data_range=1.0)(made, true).item())
    report = evaluate_pairs(items(files), "torchmetrics", metrics=["ssim", "psnr"], quiet=True)
    got = {figure.name: figure.value for figure in report.figures}
    assert abs(got["ssim"] - similarity.compute().item()) < LIMIT
    assert abs(got["psnr"] - np.mean(noise)) < LIMIT


@pytest.mark.parametrize("preset", PRESETS)
def test_lpips_equals_torchmetrics_network_on_the_same_weights(files, networks, preset):
    from torchmetrics.functional.image.lpips import _LPIPS

    folder, _ = networks
    report = evaluate_pairs(items(files), preset, metrics=["lpips"], alexnet_file=folder / "alexnet.pth", quiet=True)
    other = _LPIPS(net="alex", pnet_rand=True, eval_mode=True)
    trunk = torch.load(folder / "alexnet.pth", weights_only=True)
    state = other.net.state_dict()
    for name in state:
        state[name] = trunk[f"features.{name.split('.', 1)[1]}"]
    other.net.load_state_dict(state)
    expected = []
    for i in range(N):
        *_, made, true = reference_pictures(preset, files / f"results/s{i}_to_t{i}.png", files / f"truth/t{i}.png")
        fed = (made, true) if preset == "pcdms" else (made * 2 - 1, true * 2 - 1)
        expected.append(other(*(x[None].float() for x in fed)).item())
    assert abs(report.figures[0].value - np.mean(expected)) < LIMIT


def written_out_features(net: nn.Module, pictures: list[torch.Tensor]) -> torch.Tensor:
    """Inception's blocks one after the other, as the published codes chain them."""
    names = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "pool", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "pool")
    mixed = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
    x = F.interpolate(torch.stack(pictures).float(), (299, 299), mode="bilinear")
    for channel, (mean, deviation) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        x[:, channel] = x[:, channel] * (deviation / 0.5) + (mean - 0.5) / 0.5
    with torch.no_grad():
        for name in names:
            x = F.max_pool2d(x, 3, 2) if name == "pool" else getattr(net, name)(x)
        for name in mixed:
            x = getattr(net, f"Mixed_{name}")(x)
    return x.mean((2, 3))


def gaussian_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frechet distance from the features themselves: the trace of the root of C1 C2 is the nuclear norm of the centred
    features' product."""
    a, b = a.double(), b.double()
    x, y = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (a, b))
    traces = x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + traces).item()


@pytest.mark.parametrize("preset", ["pidm", "cfld", "pcdms"])
def test_fid_equals_the_blocks_written_out(files, networks, preset, monkeypatch):
    folder, net = networks
    # Batches of the codes' kind, small enough that their last one is partial.
    if preset == "pidm":
        from dataclasses import replace

        monkeypatch.setitem(protocols.PRESETS, preset, replace(PRESETS[preset], fid_batch=3))
    report = evaluate_pairs(
        items(files), preset, metrics=["fid"], real=files / "real", inception_file=folder / "inception.pth", quiet=True
    )
    real = [reference_pictures(preset, path, path)[3] for path in sorted((files / "real").iterdir())]
    made = [
        reference_pictures(preset, files / f"results/s{i}_to_t{i}.png", files / f"truth/t{i}.png")[2] for i in range(N)
    ]
    # PIDM drops partial batches of 3; PCDMs' batch of 128 shrinks to the reference set's 4 and drops the fifth result.
    real, made = {"pidm": (real[:3], made[:3]), "pcdms": (real, made[:4])}.get(preset, (real, made))
    expected = gaussian_distance(written_out_features(net, made), written_out_features(net, real))
    assert expected > 1
    assert abs(report.figures[0].value - expected) < LIMIT * expected
    assert (report.figures[0].pairs, report.real["counted"]) == (len(made), len(real))
    assert report.weights["inception"]["published"] is False


def test_the_frechet_distance_is_that_of_the_root_of_the_product():
    from scipy.linalg import sqrtm

    torch.manual_seed(1)
    a, b = torch.randn(90, 12) @ torch.randn(12, 12), torch.randn(70, 12) + 0.3
    one, other = (moments(x, PRESETS["pidm"]) for x in (a, b))
    root = sqrtm(one.covariance @ other.covariance).real
    gap = one.mean - other.mean
    expected = gap @ gap + np.trace(one.covariance + other.covariance - 2 * root)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    few = moments(a[:5], PRESETS["pidm"])
    assert frechet_distance(few, other) == pytest.approx(gaussian_distance(a[:5], b), rel=1e-5)


def test_fid_of_torchmetrics_is_its_own_class(files, tmp_path, monkeypatch):
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

    kind = fidelity.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:
        # A network without weights, to make random ones from.
        patch.setattr(kind, "load_state_dict", lambda self, state: None)
        torch.save({"none": torch.zeros(1)}, tmp_path / "none.pth")
        torch.manual_seed(2)
        empty = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(tmp_path / "none.pth"))
    state = empty.state_dict()
    for value in state.values():
        if value.dim() == 4:
            nn.init.kaiming_normal_(value, nonlinearity="relu")
    torch.save(state, tmp_path / "fidelity.pth")
    report = evaluate_pairs(
        items(files),
        "torchmetrics",
        metrics=["fid"],
        real=files / "real",
        inception_file=tmp_path / "fidelity.pth",
        quiet=True,
    )
    theirs = FrechetInceptionDistance(
        2048, normalize=True, feature_extractor_weights_path=str(tmp_path / "fidelity.pth")
    )
    for path in sorted((files / "real").iterdir()):
        theirs.update((pixels(path) / 255)[None].float(), real=True)
    for i in range(N):
        theirs.update((pixels(files / f"results/s{i}_to_t{i}.png") / 255)[None].float(), real=False)
    expected = theirs.compute().item()
    assert report.figures[0].value == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_partial_batches_count_as_in_the_codes():
    assert [counted(n, 64) for n in (1, 63, 64, 100, 128, 200)] == [1, 63, 64, 64, 128, 192]
    assert counted(100, None) == 100


def test_pcdms_keeps_the_sample_nearest_to_the_truth(tmp_path):
    true = picture(3, (128, 96))
    Image.fromarray(true).save(tmp_path / "t.png")
    rng = np.random.default_rng(0)
    for k, strength in enumerate((40, 5, 20)):
        noisy = np.clip(true + rng.normal(0, strength, true.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(tmp_path / f"sample{k}.png")
    samples = [tmp_path / f"sample{k}.png" for k in range(3)]
    assert best_sample(samples, tmp_path / "t.png") == samples[1]
    pairs = [Pair("s.png", "t.png", f"sample{k}.png") for k in range(3)]
    found = find_items(pairs, tmp_path, tmp_path)
    report = evaluate_pairs(found, "pcdms", metrics=["psnr"], quiet=True)
    assert report.per_pair[0]["result"].endswith("sample1.png")
    with pytest.raises(TruePoseError, match="s_to_t has 3 results; the preset cfld takes one"):
        evaluate_pairs(found, "cfld", metrics=["psnr"], quiet=True)


def test_a_result_of_the_measured_size_is_read_as_it_is(tmp_path):
    for name in ("a", "b"):
        Image.fromarray(picture(ord(name), (256, 176))).save(tmp_path / f"{name}.png")
    for preset in PRESETS.values():
        seen = read_pair(preset, tmp_path / "a.png", tmp_path / "b.png", preset.sizes[0] if preset.sizes else None)
        assert torch.allclose(seen.network_result, pixels(tmp_path / "a.png").float() / 255, atol=1e-6)
        assert torch.allclose(seen.network_truth, pixels(tmp_path / "b.png").float() / 255, atol=1e-6)


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Two mannequins with label maps and keypoints, and blurred results."""
    folder = tmp_path_factory.mktemp("people")
    made = render_people([1, 2], 1, "train", height=128, width=96)
    for part in ("truth", "results", "maps"):
        (folder / part).mkdir()
    rows = ["name:keypoints_y:keypoints_x"]
    for i in range(2):
        image = (made.image[i].permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(image).save(folder / "truth" / f"p{i}.png")
        Image.fromarray(image).resize((48, 64)).save(folder / "results" / f"p{i}_to_p{i}.png")
        Image.fromarray(made.parsing[i].argmax(0).byte().numpy()).save(folder / "maps" / f"p{i}.png")
        body = made.keypoints[i]
        there = body[:, 2] > 0
        y, x = (
            [round(float(v)) if t else -1 for v, t in zip(body[:, axis] * side, there, strict=True)]
            for axis, side in ((1, 256), (0, 176))
        )
        rows.append(f"p{i}.png: {y}: {x}")
    (folder / "annotation.csv").write_text("\n".join(rows) + "\n")
    (folder / "pairs.json").write_text(
        json.dumps([{"source_image": f"p{i}.png", "target_image": f"p{i}.png"} for i in range(2)])
    )
    return folder


def face_network(path):
    """A random linear map of the face, as an ONNX file."""
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).standard_normal((3 * 112 * 112, 8)).astype(np.float32)
    nodes = [helper.make_node("Flatten", ["face"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["embedding"])]
    graph = helper.make_graph(
        nodes,
        "face",
        [helper.make_tensor_value_info("face", TensorProto.FLOAT, [1, 3, 112, 112])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, 8])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def test_the_command_measures_regions_and_faces(people, tmp_path, capsys):
    argv = ["eval", "--pairs-file", str(people / "pairs.json"), "--preset", "cfld", "--truth", str(people / "truth")]
    argv += ["--results", str(people / "results"), "--metrics", "ssim", "psnr", "--parsing", str(people / "maps")]
    argv += ["--face-network", str(face_network(tmp_path / "face.onnx")), "--poses", str(people / "annotation.csv")]
    code = main([*argv, "--report", str(tmp_path / "report.json"), "--quiet"])
    out = capsys.readouterr()
    assert code == 0, out.err
    report = json.loads((tmp_path / "report.json").read_text())
    by_name = {figure["name"]: figure for figure in report["figures"]}
    assert {"psnr", "ssim", "ssim_256", "foreground_psnr", "clothes_ssim", "face_similarity"} <= set(by_name)
    assert {by_name[n]["preset"] for n in ("psnr", "ssim", "ssim_256")} == {"cfld"}
    assert by_name["foreground_psnr"]["preset"] == by_name["face_similarity"]["preset"] == "truepose"
    assert "| ssim_256 | cfld |" in out.out
    assert by_name["face_similarity"]["n"] >= 1
    assert by_name["face_similarity"]["value"] < 1


def test_a_face_is_laid_where_the_network_expects_it():
    from truepose_core.evaluation.faces import _JOINTS, PLACES, aligned_face
    from truepose_core.pose import Person

    # A picture whose red and green are its own coordinates, and a face turned by 30 degrees at twice the size.
    height, width = 400, 360
    v, u = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    picture = torch.stack([u, v, torch.zeros_like(u)])
    places = torch.tensor(list(PLACES.values()))
    turn = torch.tensor([[0.866025, -0.5], [0.5, 0.866025]])
    at = 2 * (places - 56) @ turn.T + torch.tensor([170.0, 190.0])
    body = np.zeros((18, 3), dtype=np.float32)
    body[_JOINTS, 0], body[_JOINTS, 1], body[_JOINTS, 2] = at[:, 0] / width, at[:, 1] / height, 1
    face = aligned_face(picture, Person(body))
    for (x, y), (px, py) in zip(places.tolist(), at.tolist(), strict=True):
        seen = F.grid_sample(face[None], torch.tensor([[[[x / 56 - 1, y / 56 - 1]]]]), align_corners=False)[0, :2, 0, 0]
        assert seen.tolist() == pytest.approx([px / width, py / height], abs=1e-3)


def test_statistics_of_the_reference_are_kept_and_checked(files, networks, tmp_path, capsys):
    folder, _ = networks
    base = ["eval", "--pairs-file", str(files / "pairs.csv"), "--truth", str(files / "truth"), "--quiet", "--json"]
    base += ["--results", str(files / "results"), "--metrics", "fid", "--inception", str(folder / "inception.pth")]
    values = []
    for extra in (
        ["--real", str(files / "real"), "--save-real", str(tmp_path / "r.npz")],
        ["--real", str(tmp_path / "r.npz")],
    ):
        assert main([*base, "--preset", "cfld", *extra]) == 0
        values.append(json.loads(capsys.readouterr().out)["figures"][0]["value"])
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    assert main([*base, "--preset", "pidm", "--real", str(tmp_path / "r.npz")]) == 2
    assert "were made with preset cfld, and now it is pidm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "--pairs-file needs --preset"),
        (["--preset", "gan"], "unknown preset 'gan'; the presets are pidm, cfld, pcdms, torchmetrics"),
        (["--preset", "cfld", "--metrics", "fid"], "FID needs --real"),
        (["--preset", "cfld", "--metrics", "mse"], "metrics are ['mse']; expected some of fid, lpips, ssim, psnr"),
        (["--preset", "cfld", "--size", "64x48"], "measures 256x176 and 512x352 (height x width)"),
        (["--preset", "cfld", "--rows", "copy"], "--rows measures models on the mannequin world"),
        (["--preset", "cfld", "--metrics", "lpips"], "needs alexnet-owt-7be5be79.pth, which is in neither"),
        (["--preset", "cfld", "--metrics", "psnr", "--save-real", "r.npz"], "add fid to --metrics"),
        (["--preset", "cfld", "--metrics", "psnr", "--parsing", "nowhere"], "label maps nowhere does not exist"),
    ],
)
def test_wrong_options_are_one_line(files, tmp_path, monkeypatch, capsys, extra, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("TRUEPOSE_MODELS", str(tmp_path))
    argv = ["eval", "--pairs-file", str(files / "pairs.csv"), "--quiet"]
    argv += ["--truth", str(files / "truth"), "--results", str(files / "results")]
    assert main([*argv, *extra]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_options_of_listed_pairs_need_the_list(capsys):
    assert main(["eval", "--preset", "pidm"]) == 2
    assert "--preset goes with --pairs-file" in capsys.readouterr().err


def test_missing_files_are_counted(files, tmp_path):
    pairs = [Pair(f"s{i}.jpg", f"t{i}.jpg") for i in range(N + 3)]
    with pytest.raises(TruePoseError, match=f"3 files of {N + 3} pairs do not exist: .*t5.jpg"):
        find_items(pairs, files / "truth", files / "results")
    with pytest.raises(TruePoseError, match="stands twice"):
        find_items([pairs[0], pairs[0]], files / "truth", files / "results")


def test_other_weights_are_refused(networks, tmp_path):
    folder, _ = networks
    with pytest.raises(TruePoseError, match="is not torchvision's AlexNet: it does not hold"):
        lpips_network(folder / "inception.pth")
    with pytest.raises(TruePoseError, match="is not torchvision's Inception v3"):
        inception("torchvision", folder / "alexnet.pth")
    with pytest.raises(TruePoseError, match="holds \\['a'\\]; expected mu"):
        np.savez(tmp_path / "x.npz", a=np.zeros(3))
        perception.read_moments(tmp_path / "x.npz")


def test_the_truth_is_found_under_its_flat_name(tmp_path):
    listed = "img/WOMEN/Dresses/id_00000002/02_1_front.jpg"
    flat = "fashionWOMENDressesid0000000202_1front"
    Image.fromarray(picture(0, (64, 64))).save(tmp_path / f"{flat}.png")
    Image.fromarray(picture(0, (64, 64))).save(tmp_path / f"{flat}_to_{flat}.jpg")
    (item,) = find_items([Pair(listed, listed)], tmp_path, tmp_path)
    assert (item.truth.name, item.samples[0].name) == (f"{flat}.png", f"{flat}_to_{flat}.jpg")
