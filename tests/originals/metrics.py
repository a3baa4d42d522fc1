"""The metrics of PIDM, CFLD and PCDMs beside `truepose eval --pairs-file`: see README.md.

Their own files are run, on the same pictures and the same random weights. What they need of older libraries is stood in
for: scikit-image's compare_ssim and compare_psnr (which calculated in float64), `.cuda()`, and the weights they would
download. FID is compared in two halves, the moments of both sets and the distance of given moments: with fewer pictures
than features their root of a singular matrix has no digits to compare. Both sets are equally large, so that no batch is
partial: which pictures those drop depends on the disk's order.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
from PIL import Image
from torch import nn

LIMIT = 1e-4
N = 5
PRESETS = ("pidm", "cfld", "pcdms")


def make(work: Path) -> None:
    """Pictures and weights."""
    from torchvision.models import alexnet, inception_v3

    rng = np.random.default_rng(0)

    def picture(size: tuple[int, int]) -> np.ndarray:
        coarse = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
        return np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC))

    for part in ("truth", "results", "train_highres"):
        (work / part).mkdir()
    for i in range(N):
        true = picture((256, 256))
        noisy = np.clip(true + rng.normal(0, 12, true.shape), 0, 255).astype(np.uint8)
        Image.fromarray(true).save(work / "truth" / f"t{i}.png")
        Image.fromarray(noisy).save(work / "results" / f"s{i}_to_t{i}.png")
    for i in range(N):
        Image.fromarray(picture((300, 230))).save(work / "train_highres" / f"r{i}.jpg", quality=95)
    (work / "pairs.csv").write_text("from,to\n" + "".join(f"s{i}.png,t{i}.png\n" for i in range(N)))
    torch.manual_seed(0)
    net = inception_v3(weights=None, init_weights=False, aux_logits=True)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(net.state_dict(), work / "inception.pth")
    torch.save(alexnet(weights=None).state_dict(), work / "alexnet.pth")
    two = [rng.standard_normal((400, 48)) @ rng.standard_normal((48, 48)), rng.standard_normal((300, 48)) + 0.5]
    np.savez(work / "features.npz", one=two[0], other=two[1])


def prepare_original(work: Path) -> None:
    """Stand in for what the codes want of older libraries, of a GPU and of the network."""
    import lpips
    import skimage.measure
    import skimage.metrics
    import torchvision.models as models

    def similarity(a: np.ndarray, b: np.ndarray, multichannel: bool = True, **more: object) -> float:
        more.setdefault("channel_axis", 2)
        return skimage.metrics.structural_similarity(a.astype(np.float64), b.astype(np.float64), **more)

    def noise(a: np.ndarray, b: np.ndarray, data_range: float = 1) -> float:
        return skimage.metrics.peak_signal_noise_ratio(a, b, data_range=data_range)

    skimage.measure.compare_ssim, skimage.measure.compare_psnr = similarity, noise
    modern = skimage.metrics.structural_similarity
    skimage.metrics.structural_similarity = lambda a, b, multichannel=True, **more: modern(a, b, **more)
    make_inception, make_lpips = models.inception_v3, lpips.LPIPS

    def inception(**_: object) -> nn.Module:
        net = make_inception(weights=None, init_weights=False, aux_logits=True)
        net.load_state_dict(torch.load(work / "inception.pth", weights_only=True))
        return net

    def distance(net: str, **_: object) -> nn.Module:
        made = make_lpips(net=net, pnet_rand=True, verbose=False)
        trunk = torch.load(work / "alexnet.pth", weights_only=True)
        state = made.net.state_dict()
        made.net.load_state_dict({name: trunk["features." + name.split(".", 1)[1]] for name in state})
        return made

    models.inception_v3, lpips.LPIPS = inception, distance
    nn.Module.cuda = torch.Tensor.cuda = lambda self, *_: self
    for name in ("matplotlib", "matplotlib.pyplot"):
        sys.modules[name] = MagicMock()


def from_disk(preset: str, clone: Path, work: Path) -> dict[str, object]:
    """PIDM's and PCDMs' metrics.py, by the calls of their scripts."""
    os.chdir(work)
    sys.path.insert(0, str(clone / "utils" if preset == "pidm" else clone))
    import metrics as theirs

    size = () if preset == "pidm" else ((176, 256),)
    made = [str(work / "results" / f"s{i}_to_t{i}.png") for i in range(N)]
    true = [str(work / "truth" / f"t{i}.png") for i in range(N)]
    fid = theirs.FID()
    real = fid.compute_statistics_of_path(str(work / "train_highres"), False, *size)
    results = fid.compute_statistics_of_path(str(work / "results"), False, *size)
    (work / "kept").mkdir(exist_ok=True)
    rec = theirs.Reconstruction_Metrics()
    options = {} if preset == "pidm" else {"img_size": (176, 256)}
    values = rec.calculate_from_disk(made, true, str(work / "kept"), sort=False, debug=0, **options)
    kept = np.load(next((work / "kept").glob("*metrics.npz")))
    return {
        "lpips": float(theirs.LPIPS().calculate_from_disk(made, true, *size, sort=False)),
        "psnr": float(values["psnr"][0]),
        "ssim": float(np.mean(kept["ssim"])),
        "ssim_256": float(np.mean(kept["ssim_256"])),
        "moments": [real, results],
        "distance": theirs.FID.calculate_frechet_distance(fid, *given_moments(work)),
    }


def in_memory(clone: Path, work: Path) -> dict[str, object]:
    """CFLD's models/metrics.py on what its data set and its test loop give it."""
    import torch.nn.functional as F

    sys.path.insert(0, str(clone))
    sys.modules["pose_utils"] = MagicMock()
    spec = importlib.util.spec_from_file_location("cfld_metrics", clone / "models" / "metrics.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    from datasets import FidRealDeepFashion

    metric = theirs.build_metric()
    real = FidRealDeepFashion(str(work), (256, 176))
    features = torch.cat([metric(real[i][None]) for i in range(len(real))]).numpy()
    columns: list[list[torch.Tensor]] = []
    for i in range(N):
        true = real.transform_test(Image.open(work / "truth" / f"t{i}.png").convert("RGB"))[None]
        made = np.asarray(Image.open(work / "results" / f"s{i}_to_t{i}.png").convert("RGB"))
        made = torch.from_numpy(made.copy()).permute(2, 0, 1)[None].float() / 255
        made = F.interpolate(made, tuple(true.shape[2:]), mode="bicubic", antialias=True) * 255.0
        made = made.clamp(0, 255).to(dtype=torch.uint8).to(torch.float32) / 255.0
        columns.append(list(metric(true, made)))
    out, *rest = (torch.cat(column).numpy() for column in zip(*columns, strict=True))
    moments = [(np.mean(x, axis=0), np.cov(x, rowvar=False)) for x in (features, out)]
    return {
        **dict(zip(("lpips", "psnr", "ssim", "ssim_256"), (float(x.mean()) for x in rest), strict=True)),
        "moments": moments,
    }


def given_moments(work: Path) -> list[np.ndarray]:
    features = np.load(work / "features.npz")
    return [x for name in ("one", "other") for x in (features[name].mean(0), np.cov(features[name], rowvar=False))]


def original(preset: str, clone: Path, work: Path) -> None:
    """In a process of its own: their numbers, to a file."""
    prepare_original(work)
    with torch.no_grad():
        found = in_memory(clone, work) if preset == "cfld" else from_disk(preset, clone, work)
    for i, (mean, covariance) in enumerate(found.pop("moments")):
        np.savez(work / f"{preset}-{i}.npz", mu=mean, sigma=covariance)
    (work / f"{preset}.json").write_text(json.dumps({k: float(v) for k, v in found.items()}))


def ours(preset: str, work: Path) -> dict[str, float]:
    """Column -> how far we are from them."""
    from truepose_core.datasets.pairs import read_pair_list
    from truepose_core.evaluation import published
    from truepose_core.evaluation.perception import Moments, frechet_distance, inception, moments, read_moments
    from truepose_core.evaluation.protocols import PRESETS as PROTOCOLS
    from truepose_core.evaluation.protocols import read_result, read_truth

    theirs = json.loads((work / f"{preset}.json").read_text())
    items = published.find_items(read_pair_list(work / "pairs.csv"), work / "truth", work / "results")
    report = published.evaluate_pairs(
        items, preset, metrics=("lpips", "ssim", "psnr"), alexnet_file=work / "alexnet.pth", quiet=True
    )
    apart = {figure.name: abs(figure.value - theirs[figure.name]) for figure in report.figures}
    network, protocol = inception("torchvision", work / "inception.pth"), PROTOCOLS[preset]
    real = [read_truth(protocol, path, (256, 176)) for path in sorted((work / "train_highres").glob("*.jpg"))]
    made = [read_result(protocol, item.samples[0], (256, 176)) for item in items]
    for i, pictures in enumerate((real, made)):
        batch = protocol.fid_batch and min(protocol.fid_batch, len(real))
        kept = published.counted(len(pictures), batch)
        values = moments(published.features_of(pictures[:kept], network), protocol)
        given, _ = read_moments(work / f"{preset}-{i}.npz")
        apart[f"moments, {('real', 'results')[i]}"] = max(
            float(np.abs(a - b).max() / np.abs(b).max())
            for a, b in ((values.mean, given.mean), (values.covariance, given.covariance))
        )
    if "distance" in theirs:
        a, b, c, d = given_moments(work)
        apart["distance, relative"] = abs(frechet_distance(Moments(a, b), Moments(c, d)) / theirs["distance"] - 1)
    return apart


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for preset in PRESETS:
        parser.add_argument(f"--{preset}", type=Path, metavar="CLONE", help="the clone of its code")
    parser.add_argument("--side", choices=PRESETS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        original(args.side, vars(args)[args.side], args.work)
        return 0
    worst = 0.0
    print("| preset | what | apart |\n| --- | --- | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        for preset in PRESETS:
            if vars(args)[preset] is None:
                continue
            command = [
                sys.executable,
                "-W",
                "ignore",
                __file__,
                "--side",
                preset,
                f"--{preset}",
                str(vars(args)[preset].absolute()),
            ]
            subprocess.run([*command, "--work", folder], check=True, stdout=subprocess.DEVNULL)
            for name, apart in ours(preset, Path(folder)).items():
                worst = max(worst, apart)
                print(f"| {preset} | {name} | {apart:.1e} |")
    print(f"largest: {worst:.1e}, limit {LIMIT:.0e}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
