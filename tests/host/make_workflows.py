"""Builds workflows/*.json from a running ComfyUI, and their pictures from its page.

python tests/host/make_workflows.py             the JSON files
python tests/host/make_workflows.py --pictures  and a screenshot of each, after a run where that needs no download
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from graph import ROOT, Graph, Node, Out  # noqa: E402

WORKFLOWS = ROOT / "workflows"
HUB = "https://huggingface.co"
SD15 = {
    "name": "v1-5-pruned-emaonly-fp16.safetensors",
    "url": f"{HUB}/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/v1-5-pruned-emaonly-fp16.safetensors",
    "directory": "checkpoints",
}
SDXL = {
    "name": "sd_xl_base_1.0.safetensors",
    "url": f"{HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
    "directory": "checkpoints",
}
OPENPOSE_SD15 = {
    "name": "control_v11p_sd15_openpose_fp16.safetensors",
    "url": f"{HUB}/comfyanonymous/ControlNet-v1-1_fp16_safetensors/resolve/main/"
    "control_v11p_sd15_openpose_fp16.safetensors",
    "directory": "controlnet",
}
OPENPOSE_SDXL = {
    "name": "OpenPoseXL2.safetensors",
    "url": f"{HUB}/thibaud/controlnet-openpose-sdxl-1.0/resolve/main/OpenPoseXL2.safetensors",
    "directory": "controlnet",
}
LCM_LORA = {
    "name": "lcm-lora-sdv1-5.safetensors",
    "url": f"{HUB}/latent-consistency/lcm-lora-sdv1-5/resolve/main/pytorch_lora_weights.safetensors",
    "directory": "loras",
}
FILES = (SD15, SDXL, OPENPOSE_SD15, OPENPOSE_SDXL, LCM_LORA)
"""All that the workflows ask a user to download."""

PROMPT = "full body photo of a person, plain studio background, sharp focus"
NEGATIVE = "blurry, deformed, extra limbs, cropped, text, watermark"
PREVIEW = 230
"""Pixels for the picture that a node shows."""

OWN_PHOTO = """
## Your own person
Replace **Mannequin** by *Load Image*, and give SourceNet Encode a parsing of that image:
* *Parsing from Masks* with masks from any segmentation node or painted by hand, or
* *Parsing from Label Map* with the label map of a human parser.

The pose comes from an OpenPose or DWPose node. It is optional: without it the regions cannot be carried to the
new pose.
"""
OWN_POSE = """
## Your own pose
Replace this **Mannequin** by *Load Pose* (OpenPose JSON), or by an OpenPose or DWPose node that reads a photo. Only
the keypoints are used.
"""


def checkpoint(graph: Graph, model: dict) -> Node:
    return graph.add("CheckpointLoaderSimple", models=(model,), ckpt_name=model["name"])


def sampled(graph: Graph, model: Out, positive: Out, negative: Out, latent: Out, **settings: object) -> Node:
    given = {"seed": 1, "steps": 25, "cfg": 6.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", **settings}
    return graph.add("KSampler", model=model, positive=positive, negative=negative, latent_image=latent, **given)


def saved(graph: Graph, samples: Out, vae: Out, prefix: str, room: int = PREVIEW) -> Node:
    decoded = graph.add("VAEDecode", samples=samples, vae=vae)
    return graph.add("SaveImage", images=decoded["image"], filename_prefix=f"truepose/{prefix}", room=room)


def training_free(graph: Graph, model: dict, openpose: dict, width: int, height: int, prefix: str, title: str) -> None:
    """Source person and target pose from mannequins, any checkpoint of the family."""
    with graph.group("Start here"):
        graph.note(
            f"""
            # {title}
            Shows the person of the source picture in another pose, without any training: the checkpoint reads
            the source once (**SourceNet Encode**), and **Apply HPFA** lets it look there while it makes the
            picture.

            You need a checkpoint and an OpenPose ControlNet of the same family; the links are in the two
            loaders. Any other {model["name"].split("-")[0].split("_")[0].upper().replace("V1", "SD1.5")}
            checkpoint will do.

            The source is a drawn mannequin so that this runs as it stands. Photos of people suit the checkpoint
            better.
            """,
            330,
        )
        loader = checkpoint(graph, model)
        control = graph.add("ControlNetLoader", models=(openpose,), control_net_name=openpose["name"])
    with graph.group("Source person"):
        person = graph.add(
            "TruePoseMannequin", title="Mannequin: source", seed=5, width=width, height=height, room=PREVIEW
        )
        source_prompt = graph.add(
            "CLIPTextEncode",
            title="What the source shows",
            clip=loader["CLIP"],
            text="a person, full body, plain background",
        )
        source = graph.add(
            "TruePoseSourceNetEncode",
            model=loader["MODEL"],
            vae=loader["VAE"],
            image=person["image"],
            parsing=person["parsing"],
            conditioning=source_prompt["CONDITIONING"],
            pose=person["pose"],
        )
        graph.note(OWN_PHOTO, 260)
    with graph.group("Target pose"):
        target = graph.add(
            "TruePoseMannequin", title="Mannequin: pose", pose="wave", width=width, height=height, room=PREVIEW
        )
        skeleton = graph.add("TruePoseDrawSkeleton", pose=target["pose"], width=width, height=height, room=PREVIEW)
        graph.note(OWN_POSE, 150)
    with graph.group("Prompt"):
        positive = graph.add("CLIPTextEncode", title="Prompt", clip=loader["CLIP"], text=PROMPT)
        negative = graph.add("CLIPTextEncode", title="Negative prompt", clip=loader["CLIP"], text=NEGATIVE)
        posed = graph.add(
            "ControlNetApplyAdvanced",
            positive=positive["CONDITIONING"],
            negative=negative["CONDITIONING"],
            control_net=control["CONTROL_NET"],
            image=skeleton["image"],
            vae=loader["VAE"],
            strength=0.9,
            end_percent=0.8,
        )
        latent = graph.add("EmptyLatentImage", width=width, height=height)
    with graph.group("Picture"):
        patched = graph.add(
            "TruePoseApplyHPFA", model=loader["MODEL"], source=source["source"], target_pose=target["pose"]
        )
        done = sampled(graph, patched["model"], posed["positive"], posed["negative"], latent["LATENT"])
        saved(graph, done["LATENT"], loader["VAE"], prefix)
    with graph.group("What to turn"):
        graph.note(
            """
            ## Apply HPFA
            * **strength**: how much the source counts.
            * **face ... accessory**: which parts of the source count. 0 leaves a part out. **background** 0
              keeps the source's surroundings out.
            * **region_match**: how strictly the new face looks at the old face, the new top at the old top.
            * **end_percent** below 1 gives the model the last steps for itself.
            * **unconditional**: *drop* makes the source stronger with cfg, *keep* leaves cfg to the prompt.

            Strength 0, or bypassing the node, is exactly the checkpoint.
            """,
            330,
        )


def sd15_training_free(graph: Graph) -> None:
    training_free(graph, SD15, OPENPOSE_SD15, 512, 768, "sd15", "Pose transfer with any SD1.5 checkpoint")


def sdxl_training_free(graph: Graph) -> None:
    training_free(graph, SDXL, OPENPOSE_SDXL, 832, 1216, "sdxl", "Pose transfer with any SDXL checkpoint")


MANY = (("wave", 3), ("walk", 3), ("akimbo", 3), ("arms up", 3))


def pasted_poses(width: int, height: int) -> str:
    """OpenPose JSON of a few ready poses, one frame for each, short enough to read in the node."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # at the end: the host has a package of one of our names
    from truepose_core.mannequin import ready_poses, render, sample_identities

    frames = []
    for name, person in MANY:
        points = render(sample_identities([person], 1), ready_poses()[name], height, width, supersample=1).keypoints[0]
        flat = [number for x, y, seen in points.tolist() for number in (round(x * width), round(y * height), int(seen))]
        people = [{"pose_keypoints_2d": flat}]
        frames.append({"canvas_width": width, "canvas_height": height, "people": people})
    return json.dumps(frames)


def many_poses_one_source(graph: Graph) -> None:
    width, height = 512, 768
    with graph.group("Start here"):
        graph.note(
            """
            # One source, many poses
            **SourceNet Encode** reads the person once. **Load Pose** gives four poses, and the batch shows the
              person in each of them. Change the poses, the seed or the prompt: the source is not read again.

            The poses are OpenPose JSON, pasted into the node; choose a file of the input folder instead if you
            like. **batch_size** of the latent is the number of poses.
            """,
            260,
        )
        loader = checkpoint(graph, SD15)
        control = graph.add("ControlNetLoader", models=(OPENPOSE_SD15,), control_net_name=OPENPOSE_SD15["name"])
    with graph.group("Source person"):
        person = graph.add("TruePoseMannequin", seed=11, width=width, height=height, room=PREVIEW)
        source = graph.add(
            "TruePoseSourceNetEncode",
            model=loader["MODEL"],
            vae=loader["VAE"],
            image=person["image"],
            parsing=person["parsing"],
            pose=person["pose"],
        )
        graph.note(OWN_PHOTO, 260)
    with graph.group("Poses"):
        poses = graph.add("TruePoseLoadPose", json=pasted_poses(width, height), room=PREVIEW)
        skeletons = graph.add("TruePoseDrawSkeleton", pose=poses["pose"], room=PREVIEW)
        latent = graph.add("EmptyLatentImage", width=width, height=height, batch_size=len(MANY))
    with graph.group("Prompt"):
        positive = graph.add("CLIPTextEncode", title="Prompt", clip=loader["CLIP"], text=PROMPT)
        negative = graph.add("CLIPTextEncode", title="Negative prompt", clip=loader["CLIP"], text=NEGATIVE)
        posed = graph.add(
            "ControlNetApplyAdvanced",
            positive=positive["CONDITIONING"],
            negative=negative["CONDITIONING"],
            control_net=control["CONTROL_NET"],
            image=skeletons["image"],
            vae=loader["VAE"],
            strength=0.9,
            end_percent=0.8,
        )
    with graph.group("Pictures"):
        patched = graph.add(
            "TruePoseApplyHPFA", model=loader["MODEL"], source=source["source"], target_pose=poses["pose"]
        )
        done = sampled(graph, patched["model"], posed["positive"], posed["negative"], latent["LATENT"])
        saved(graph, done["LATENT"], loader["VAE"], "many_poses")


def swap_garment(graph: Graph) -> None:
    width, height = 512, 768
    with graph.group("Start here"):
        graph.note(
            """
            # Face of A, top of B
            Two sources, two **Apply HPFA**, one after the other. The first keeps everything of person A but the
            top, the second keeps the top of person B and nothing else. Tokens of weight 0 are not read at all,
            so nothing of A's top and nothing of B's face gets through.

            Turn the weights to swap something else: **lower** for trousers and skirts, **accessory** for shoes
            and bags, **hair** for hair.
            """,
            280,
        )
        loader = checkpoint(graph, SD15)
        control = graph.add("ControlNetLoader", models=(OPENPOSE_SD15,), control_net_name=OPENPOSE_SD15["name"])
    sources = []
    for name, seed in (("A", 5), ("B", 6)):
        with graph.group(f"Person {name}"):
            person = graph.add(
                "TruePoseMannequin", title=f"Mannequin: {name}", seed=seed, width=width, height=height, room=PREVIEW
            )
            sources.append(
                graph.add(
                    "TruePoseSourceNetEncode",
                    title=f"SourceNet Encode: {name}",
                    model=loader["MODEL"],
                    vae=loader["VAE"],
                    image=person["image"],
                    parsing=person["parsing"],
                    pose=person["pose"],
                )
            )
            if name == "A":
                graph.note(OWN_PHOTO, 260)
    with graph.group("Target pose and prompt"):
        target = graph.add(
            "TruePoseMannequin", title="Mannequin: pose", pose="akimbo", width=width, height=height, room=PREVIEW
        )
        skeleton = graph.add("TruePoseDrawSkeleton", pose=target["pose"], width=width, height=height, room=PREVIEW)
        graph.note(OWN_POSE, 150)
    with graph.group("Prompt"):
        positive = graph.add("CLIPTextEncode", title="Prompt", clip=loader["CLIP"], text=PROMPT)
        negative = graph.add("CLIPTextEncode", title="Negative prompt", clip=loader["CLIP"], text=NEGATIVE)
        posed = graph.add(
            "ControlNetApplyAdvanced",
            positive=positive["CONDITIONING"],
            negative=negative["CONDITIONING"],
            control_net=control["CONTROL_NET"],
            image=skeleton["image"],
            vae=loader["VAE"],
            strength=0.9,
            end_percent=0.8,
        )
        latent = graph.add("EmptyLatentImage", width=width, height=height)
    with graph.group("All but the top of A, the top of B"):
        first = graph.add(
            "TruePoseApplyHPFA",
            title="Apply HPFA: A without the top",
            model=loader["MODEL"],
            source=sources[0]["source"],
            target_pose=target["pose"],
            upper=0.0,
            region_match=3.0,
        )
        only_top = dict.fromkeys(("face", "hair", "lower", "skin", "accessory"), 0.0)
        second = graph.add(
            "TruePoseApplyHPFA",
            title="Apply HPFA: the top of B",
            model=first["model"],
            source=sources[1]["source"],
            target_pose=target["pose"],
            region_match=3.0,
            **only_top,
        )
    with graph.group("Picture"):
        done = sampled(graph, second["model"], posed["positive"], posed["negative"], latent["LATENT"])
        saved(graph, done["LATENT"], loader["VAE"], "swap_garment")


def with_lora_and_ipadapter(graph: Graph) -> None:
    width, height = 512, 768
    with graph.group("Start here"):
        graph.note(
            """
            # With a LoRA and an IP-Adapter
            Apply HPFA takes and gives an ordinary MODEL, so everything else that patches a model may come
            before or after it.

            Here a LoRA (LCM, for 8 steps; choose any other) and the host's own *ModelSamplingDiscrete*.
            **SourceNet Encode gets the model with the LoRA**: the source is then read as the picture is made. A
            LoRA that is added later also acts on the source, at every step.
            """,
            290,
        )
        loader = checkpoint(graph, SD15)
        lora = graph.add(
            "LoraLoader",
            models=(LCM_LORA,),
            model=loader["MODEL"],
            clip=loader["CLIP"],
            lora_name=LCM_LORA["name"],
        )
        control = graph.add("ControlNetLoader", models=(OPENPOSE_SD15,), control_net_name=OPENPOSE_SD15["name"])
    with graph.group("Source person"):
        person = graph.add("TruePoseMannequin", seed=23, width=width, height=height, room=PREVIEW)
        source = graph.add(
            "TruePoseSourceNetEncode",
            model=lora["MODEL"],
            vae=loader["VAE"],
            image=person["image"],
            parsing=person["parsing"],
            pose=person["pose"],
        )
        graph.note(OWN_PHOTO, 260)
    with graph.group("Target pose"):
        target = graph.add(
            "TruePoseMannequin", title="Mannequin: pose", pose="walk", width=width, height=height, room=PREVIEW
        )
        skeleton = graph.add("TruePoseDrawSkeleton", pose=target["pose"], width=width, height=height, room=PREVIEW)
    with graph.group("Prompt"):
        positive = graph.add("CLIPTextEncode", title="Prompt", clip=lora["CLIP"], text=PROMPT)
        negative = graph.add("CLIPTextEncode", title="Negative prompt", clip=lora["CLIP"], text=NEGATIVE)
        posed = graph.add(
            "ControlNetApplyAdvanced",
            positive=positive["CONDITIONING"],
            negative=negative["CONDITIONING"],
            control_net=control["CONTROL_NET"],
            image=skeleton["image"],
            vae=loader["VAE"],
        )
        latent = graph.add("EmptyLatentImage", width=width, height=height)
    with graph.group("Model"):
        graph.note(
            """
            ## An IP-Adapter goes here
            Install an IP-Adapter pack, and put its *Apply* node between **LoraLoader** and **Apply HPFA**: its
            model input takes the LoRA's model, its output goes to Apply HPFA. Give it the source image (the
            mannequin's **image**) and a weight of 0.4 to 0.6.

            It tells the model what is in the source picture as a whole; HPFA keeps where it is and what it
            looks like. Leave the model of SourceNet Encode as it is.

            This graph loads and runs without that pack.
            """,
            300,
        )
        patched = graph.add(
            "TruePoseApplyHPFA", model=lora["MODEL"], source=source["source"], target_pose=target["pose"]
        )
        timed = graph.add("ModelSamplingDiscrete", model=patched["model"], sampling="lcm")
    with graph.group("Picture"):
        fast = {"steps": 8, "cfg": 1.6, "sampler_name": "lcm", "scheduler": "sgm_uniform"}
        done = sampled(graph, timed["MODEL"], posed["positive"], posed["negative"], latent["LATENT"], **fast)
        saved(graph, done["LATENT"], loader["VAE"], "with_lora")


def bundled(graph: Graph, seed: int, target_pose: str, **apply: object) -> dict[str, Node]:
    """The bundled demo model on two mannequins, up to the sampled latent; needs no file. apply: for Apply HPFA."""
    with graph.group("Model"):
        loader = graph.add("TruePoseLoadModel", file="bundled demo")
        latent = graph.add("TruePoseEmptyLatent", adapter=loader["adapter"])
    with graph.group("Source person"):
        person = graph.add("TruePoseMannequin", title="Mannequin: source", seed=seed, room=PREVIEW)
        source = graph.add(
            "TruePoseSourceNetEncode",
            model=loader["source_net"],
            vae=loader["vae"],
            image=person["image"],
            parsing=person["parsing"],
            pose=person["pose"],
        )
    with graph.group("Target pose"):
        target = graph.add("TruePoseMannequin", title="Mannequin: pose", seed=2, pose=target_pose, room=PREVIEW)
        posed = graph.add("TruePoseApplyPoseEncoder", model=loader["target_net"], pose=target["pose"])
    with graph.group("Picture"):
        patched = graph.add(
            "TruePoseApplyHPFA",
            model=posed["model"],
            source=source["source"],
            target_pose=target["pose"],
            **apply,
        )
        done = sampled(
            graph,
            patched["model"],
            loader["conditioning"],
            loader["conditioning"],
            latent["latent"],
            steps=12,
            cfg=1.0,
            sampler_name="ddim",
            scheduler="ddim_uniform",
        )
    return {"loader": loader, "person": person, "target": target, "patched": patched, "done": done}


def enlarged(graph: Graph, image: Out, room: int = 420) -> None:
    big = graph.add("ImageScale", image=image, upscale_method="nearest-exact", width=384, height=512, crop="disabled")
    graph.add("SaveImage", images=big["IMAGE"], filename_prefix="truepose/demo", room=room)


def demo(graph: Graph) -> None:
    with graph.group("Start here"):
        graph.note(
            """
            # TruePose demo
            Press **Run**. The person on the left is shown in the pose of the other mannequin: the same face,
            hair and clothes, in a pose that the model has not seen of them. It takes a few seconds on a CPU and
            needs no download.

            The bundled model is tiny (48 x 64 pixels) and knows only this world of mannequins. It shows how the
            nodes go together; for photos see *sd15_training_free* and *sdxl_training_free*.
            """,
            280,
        )
        graph.note(
            """
            ## Try
            * another **seed** at *Mannequin: source*: another person
            * another **pose** at *Mannequin: pose*, or `random` with a **pose_seed**
            * **upper** 0 at Apply HPFA: the top is made up
            * **strength** 0: the person is made up
            """,
            190,
        )
    made = bundled(graph, 5, "wave", background=1.0)
    with graph.group("Result"):
        decoded = graph.add("VAEDecode", samples=made["done"]["LATENT"], vae=made["loader"]["vae"])
        enlarged(graph, decoded["image"])


def attention_view(graph: Graph) -> None:
    with graph.group("Start here"):
        graph.note(
            """
            # Where does the picture look?
            Press **Run**; it needs no download. **Attention View** shows where in the source the new picture
            looks while it is made, with HPFA and without.

            * *everywhere*: from all places of the picture. *from face*, *from upper* ...: from the places where
              those regions are going to be.
            * The bars say how much attention the average token of each region gets; 1 is an even look.

            It works in the same way with any checkpoint: connect the model of Apply HPFA, the prompt and the
            sampler's latent.
            """,
            330,
        )
        graph.note(
            """
            ## Try
            * **percent** 0.1 and 0.9: early and late in the sampling
            * **upper** 0 at Apply HPFA
            * **match** *learned* at Apply HPFA: as the bundled model was trained
            * **region_match** 0 and 8
            """,
            150,
        )
    made = bundled(graph, 6, "kick", match="as set", region_match=4.0)
    with graph.group("Picture as made"):
        decoded = graph.add("VAEDecode", samples=made["done"]["LATENT"], vae=made["loader"]["vae"])
        enlarged(graph, decoded["image"], 300)
    with graph.group("Where it looked"):
        view = graph.add(
            "TruePoseAttentionView",
            model=made["patched"]["model"],
            positive=made["loader"]["conditioning"],
            latent=made["done"]["LATENT"],
            image=made["person"]["image"],
        )
        shown = graph.add("PreviewImage", images=view["image"], room=480)
        shown.width = 720


BUILDERS: dict[str, Callable[[Graph], None]] = {
    build.__name__: build
    for build in (
        demo,
        sd15_training_free,
        sdxl_training_free,
        many_poses_one_source,
        swap_garment,
        with_lora_and_ipadapter,
        attention_view,
    )
}


def build(name: str, info: dict) -> dict:
    """A workflow by name, for a host that answers `info` to /object_info."""
    graph = Graph(info, name)
    BUILDERS[name](graph)
    return graph.workflow()


def text(workflow: dict) -> str:
    """The workflow as it is written to its file."""
    return json.dumps(workflow, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", action="store_true")
    parser.add_argument("--only", action="append", choices=list(BUILDERS), help="may be given several times")
    arguments = parser.parse_args()
    from server import PACK, Server

    from truepose_core.benchmark.host import find_host

    host = find_host(PACK)
    if host is None:
        raise SystemExit("no ComfyUI found: set COMFYUI_DIR")
    names = arguments.only or list(BUILDERS)
    with tempfile.TemporaryDirectory() as folder, Server(host, Path(folder)) as server:
        info = server.object_info()
        WORKFLOWS.mkdir(exist_ok=True)
        for name in names:
            (WORKFLOWS / f"{name}.json").write_text(text(build(name, info)), encoding="utf-8")
            print(WORKFLOWS / f"{name}.json")
        if arguments.pictures:
            from pictures import take

            for name in names:
                print(take(server, WORKFLOWS / f"{name}.json"))


if __name__ == "__main__":
    main()
