"""Builds workflows/*.json from a running ComfyUI, and their pictures from its page.

python workflows/source/make_workflows.py             the JSON files
python workflows/source/make_workflows.py --pictures  and a screenshot of each, after a run of what needs no large model
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1]), str(HERE.parents[1] / "tests" / "host")]

from graph import EXAMPLES, ROOT, Block, Graph, Node, Out, blueprint  # noqa: E402
from photos import PEOPLE, person_photo  # noqa: E402
from small_files import save_networks  # noqa: E402

from truepose_core.networks.known import KNOWN  # noqa: E402
from truepose_core.parsing.spec import BUILT_IN  # noqa: E402

WORKFLOWS, SUBGRAPHS = ROOT / "workflows", ROOT / "subgraphs"
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
IP_ADAPTER = {
    "name": "ip-adapter-plus_sd15.safetensors",
    "url": f"{HUB}/h94/IP-Adapter/resolve/main/models/ip-adapter-plus_sd15.safetensors",
    "directory": "ipadapter",
}
CLIP_VISION = {
    "name": "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",
    "url": f"{HUB}/h94/IP-Adapter/resolve/main/models/image_encoder/model.safetensors",
    "directory": "clip_vision",
}
KONTEXT = {
    "name": "flux1-dev-kontext_fp8_scaled.safetensors",
    "url": f"{HUB}/Comfy-Org/flux1-kontext-dev_ComfyUI/resolve/main/split_files/diffusion_models/"
    "flux1-dev-kontext_fp8_scaled.safetensors",
    "directory": "diffusion_models",
}
CLIP_L = {
    "name": "clip_l.safetensors",
    "url": f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/clip_l.safetensors",
    "directory": "text_encoders",
}
T5 = {
    "name": "t5xxl_fp8_e4m3fn_scaled.safetensors",
    "url": f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp8_e4m3fn_scaled.safetensors",
    "directory": "text_encoders",
}
FLUX_VAE = {
    "name": "ae.safetensors",
    "url": f"{HUB}/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors",
    "directory": "vae",
}
QWEN_EDIT = {
    "name": "qwen_image_edit_2509_fp8_e4m3fn.safetensors",
    "url": f"{HUB}/Comfy-Org/Qwen-Image-Edit_ComfyUI/resolve/main/split_files/diffusion_models/"
    "qwen_image_edit_2509_fp8_e4m3fn.safetensors",
    "directory": "diffusion_models",
}
QWEN_TEXT = {
    "name": "qwen_2.5_vl_7b_fp8_scaled.safetensors",
    "url": f"{HUB}/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files/text_encoders/"
    "qwen_2.5_vl_7b_fp8_scaled.safetensors",
    "directory": "text_encoders",
}
QWEN_VAE = {
    "name": "qwen_image_vae.safetensors",
    "url": f"{HUB}/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files/vae/qwen_image_vae.safetensors",
    "directory": "vae",
}
EDITOR_FILES = (KONTEXT, CLIP_L, T5, FLUX_VAE, QWEN_EDIT, QWEN_TEXT, QWEN_VAE)
FILES = (SD15, SDXL, OPENPOSE_SD15, OPENPOSE_SDXL, LCM_LORA, IP_ADAPTER, CLIP_VISION, *EDITOR_FILES)
"""What the workflows ask a user to download and choose in a loader."""
POSE_FILES = tuple(
    {"name": KNOWN[name].file, "url": KNOWN[name].url, "directory": "truepose"} for name in ("dwpose", "yolox-l")
)
"""What Estimate Pose finds by itself."""
PHOTO, OTHER_PHOTO = EXAMPLES
"""Drawn people that keep the place of the user's photos."""

PROMPT = "full body photo of a person, plain studio background, sharp focus"
NEGATIVE = "blurry, deformed, extra limbs, cropped, text, watermark"
PREVIEW = 250
"""Pixels for the picture that a node shows."""

OWN_PHOTO = """
## Your own person
Replace **Mannequin** by *Load Image*, *Estimate Pose*, *Human Parsing* and *Frame Person*: the workflow
*photo_to_pose* shows how.
* The parsing may also come from *Parsing from Masks*, with masks from any segmentation node or painted by hand.
* The pose may come from any OpenPose or DWPose node. Without it the regions cannot be carried to the new pose.
"""
OWN_POSE = """
## Your own pose
Replace this **Mannequin** by *Pose Gallery*, *Load Pose* (OpenPose JSON), or *Estimate Pose* on a photo. Only the
keypoints are used.
"""


def linked(name: str) -> str:
    """A known model in Markdown: its file, with a link to the page that publishes it."""
    return f"[{KNOWN[name].file}]({KNOWN[name].page})"


WANTED = f"""
## Networks that read a photo
**Estimate Pose** wants two files in *models/truepose*: {linked("dwpose")} and {linked("yolox-l")}. Or switch
**download** on in that node: it then fetches them once. It needs *onnxruntime* (pip install onnxruntime), and the
parsing below OpenCV (pip install opencv-python-headless); most packs with detectors have brought both.
"""
PARSERS = "\n".join(f"* **{name}**: {linked(name)}, {KNOWN[name].purpose}" for name in BUILT_IN)
BETTER_PARSING = f"""
## Cleaner edges
**Human Parsing** is set to *from keypoints*: it needs no file and is rough. Choose a network there instead, and the
clothes get their true outline:
{PARSERS}

Put the file into *models/truepose*, or switch **download** on in that node. Mind the licences on those pages.
"""


def checkpoint(graph: Graph, model: dict) -> Node:
    return graph.add("CheckpointLoaderSimple", models=(model,), ckpt_name=model["name"])


def sampled(graph: Graph, model: Out, positive: Out, negative: Out, latent: Out, **settings: object) -> Node:
    given = {"seed": 1, "steps": 25, "cfg": 6.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", **settings}
    return graph.add("KSampler", model=model, positive=positive, negative=negative, latent_image=latent, **given)


def saved(graph: Graph, samples: Out, vae: Out, prefix: str, room: int = PREVIEW) -> Node:
    decoded = graph.add("VAEDecode", samples=samples, vae=vae)
    return graph.add("SaveImage", images=decoded["image"], filename_prefix=f"truepose/{prefix}", room=room)


def prompted(graph: Graph, clip: Out, positive: str = PROMPT) -> tuple[Out, Out]:
    """The two prompts."""
    yes = graph.add("CLIPTextEncode", title="Prompt", clip=clip, text=positive)
    no = graph.add("CLIPTextEncode", title="Negative prompt", clip=clip, text=NEGATIVE)
    return yes["CONDITIONING"], no["CONDITIONING"]


def controlled(graph: Graph, prompts: tuple[Out, Out], control: Node, image: Out, vae: Out, **settings: object) -> Node:
    """The prompts with an OpenPose ControlNet that sees a skeleton."""
    positive, negative = prompts
    given = {"strength": 0.9, "end_percent": 0.8, **settings}
    net = control["CONTROL_NET"]
    return graph.add(
        "ControlNetApplyAdvanced", positive=positive, negative=negative, control_net=net, image=image, vae=vae, **given
    )


def training_free(graph: Graph, model: dict, openpose: dict, width: int, height: int, prefix: str, title: str) -> None:
    """Source person and target pose from mannequins, any checkpoint of the family."""
    with graph.group("Start here"):
        graph.note(
            f"""
            # {title}
            Shows the person of the source picture in another pose, without any training: the checkpoint reads
            the source at four noise levels (**SourceNet Encode**), and **Apply HPFA** lets it look there while it
            makes the picture.

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
        prompts = prompted(graph, loader["CLIP"])
        posed = controlled(graph, prompts, control, skeleton["image"], loader["VAE"])
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
            **SourceNet Encode** reads the person, once for all. **Load Pose** gives four poses, and the batch shows the
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
        prompts = prompted(graph, loader["CLIP"])
        posed = controlled(graph, prompts, control, skeletons["image"], loader["VAE"])
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
            **Combine Sources** takes person A and puts the top of person B in place of A's own. Nothing else of B
            and nothing of A's top is read, so neither gets through.

            Set **upper** to 0 and another region to 1 to swap something else: **lower** for trousers and skirts,
            **accessory** for shoes and bags, **hair** for hair. A share between 0 and 1 blends the two. For
            photos see *swap_garment_photo*.
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
        prompts = prompted(graph, loader["CLIP"])
        posed = controlled(graph, prompts, control, skeleton["image"], loader["VAE"])
        latent = graph.add("EmptyLatentImage", width=width, height=height)
    with graph.group("A with the top of B"):
        both = graph.add("TruePoseCombineSources", source=sources[0]["source"], donor=sources[1]["source"], upper=1.0)
        patched = graph.add(
            "TruePoseApplyHPFA",
            model=loader["MODEL"],
            source=both["source"],
            target_pose=target["pose"],
        )
    with graph.group("Picture"):
        done = sampled(graph, patched["model"], posed["positive"], posed["negative"], latent["LATENT"])
        saved(graph, done["LATENT"], loader["VAE"], "swap_garment")


def with_lora_and_ipadapter(graph: Graph) -> None:
    width, height = 512, 768
    with graph.group("Start here"):
        graph.note(
            """
            # With a LoRA and an IP-Adapter
            Apply HPFA takes and gives an ordinary MODEL, so everything else that patches a model may come
            before or after it.

            Here a LoRA (LCM, for 8 steps; choose any other), an IP-Adapter and the host's own
            *ModelSamplingDiscrete*. **SourceNet Encode gets the model with the LoRA**: the source is then read as
            the picture is made. A LoRA that is added later also acts on the source, at every step.

            No IP-Adapter at hand? Select the four nodes of the group *IP-Adapter* and press Ctrl+B: the rest runs
            without them.
            """,
            340,
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
        graph.note(OWN_PHOTO, 260)
    with graph.group("Target pose"):
        target = graph.add(
            "TruePoseMannequin", title="Mannequin: pose", pose="walk", width=width, height=height, room=PREVIEW
        )
        skeleton = graph.add("TruePoseDrawSkeleton", pose=target["pose"], width=width, height=height, room=PREVIEW)
    with graph.group("Prompt"):
        prompts = prompted(graph, lora["CLIP"])
        posed = controlled(graph, prompts, control, skeleton["image"], loader["VAE"], strength=1.0, end_percent=1.0)
        latent = graph.add("EmptyLatentImage", width=width, height=height)
    with graph.group("IP-Adapter"):
        vision = graph.add("CLIPVisionLoader", models=(CLIP_VISION,), clip_name=CLIP_VISION["name"])
        adapter = graph.add("TruePoseLoadCAAAdapter", models=(IP_ADAPTER,), file=IP_ADAPTER["name"])
        seen = graph.add(
            "TruePoseCAAEncode",
            adapter=adapter["adapter"],
            image=person["image"],
            parsing=person["parsing"],
            clip_vision=vision["CLIP_VISION"],
            pose=person["pose"],
        )
        aligned = graph.add(
            "TruePoseApplyCAA", model=lora["MODEL"], caa=seen["caa"], strength=0.6, target_pose=target["pose"]
        )
        graph.note(
            """
            ## Region by region
            An IP-Adapter tells the model what is in the source picture. **CAA Encode** reads the face, the hair, the
            top ... one by one, and **Apply CAA** gives each to the place where it belongs: the colour of the
            trousers does not get into the top.

            It knows what a thing is; HPFA knows its pattern and where it is. **strength** 0.4 to 0.8 goes well with
            HPFA. Plain IP-Adapter files do as well as Plus.

            An Apply node of an IP-Adapter pack fits in the same place.
            """,
            330,
        )
    with graph.group("Source and model"):
        source = graph.add(
            "TruePoseSourceNetEncode",
            model=lora["MODEL"],
            vae=loader["VAE"],
            image=person["image"],
            parsing=person["parsing"],
            pose=person["pose"],
            caa=seen["caa"],
        )
        patched = graph.add(
            "TruePoseApplyHPFA", model=aligned["model"], source=source["source"], target_pose=target["pose"]
        )
        timed = graph.add("ModelSamplingDiscrete", model=patched["model"], sampling="lcm")
    with graph.group("Picture"):
        fast = {"steps": 8, "cfg": 1.6, "sampler_name": "lcm", "scheduler": "sgm_uniform"}
        done = sampled(graph, timed["MODEL"], posed["positive"], posed["negative"], latent["LATENT"], **fast)
        saved(graph, done["LATENT"], loader["VAE"], "with_lora")


def framed_person(graph: Graph, name: str, margin: float) -> tuple[Node, Node, Node]:
    """A photo as far as the crop around its person, in one group: (the photo, its parsing, the crop)."""
    of = f": {name}" if name else ""
    with graph.group(f"Photo{of.replace(':', ' of')}"):
        shown = OTHER_PHOTO if name == "B" else PHOTO
        photo = graph.add("LoadImage", title=f"Your photo{of}", image=shown, room=PREVIEW)
        pose = graph.add(
            "TruePoseEstimatePose",
            title=f"Estimate Pose{of}",
            models=POSE_FILES,
            image=photo["IMAGE"],
            room=PREVIEW,
        )
        parsing = graph.add(
            "TruePoseHumanParsing",
            title=f"Human Parsing{of}",
            image=photo["IMAGE"],
            pose=pose["pose"],
            room=PREVIEW,
        )
        frame = graph.add(
            "TruePoseFramePerson",
            title=f"Frame Person{of}",
            image=photo["IMAGE"],
            parsing=parsing["parsing"],
            pose=pose["pose"],
            margin=margin,
        )
    return photo, parsing, frame


def read_frame(graph: Graph, loader: Node, frame: Node, name: str = "") -> Node:
    """SourceNet Encode on the crop of a photo."""
    return graph.add(
        "TruePoseSourceNetEncode",
        title=f"SourceNet Encode: {name}" if name else None,
        model=loader["MODEL"],
        vae=loader["VAE"],
        image=frame["image"],
        parsing=frame["parsing"],
        pose=frame["pose"],
    )


def pasted(graph: Graph, photo: Node, picture: Node, frame: Node, prefix: str, **settings: object) -> None:
    """The picture back in the photo, saved."""
    back = graph.add("TruePosePasteBack", photo=photo["IMAGE"], image=picture["IMAGE"], crop=frame["crop"], **settings)
    graph.add("SaveImage", images=back["image"], filename_prefix=f"truepose/{prefix}", room=PREVIEW)


PHOTO_PROMPT = "photo of a person, natural light, sharp focus"


def photo_to_source(info: dict) -> Block:
    """From a photo to the source that Apply HPFA takes, as one node."""
    text = "Finds the person of a photo, crops to the model's size, and reads them for Apply HPFA."
    block = Block(info, "Photo to Source", text, before=100)
    graph = block.graph
    photo = block.takes("photo", "IMAGE")
    model, vae = block.takes("model", "MODEL"), block.takes("vae", "VAE")
    download = block.widget("TruePoseEstimatePose", "download", False)
    with graph.group("Where the person is"):
        pose = graph.add("TruePoseEstimatePose", models=POSE_FILES, image=photo, download=download, room=PREVIEW)
        parsing = graph.add(
            "TruePoseHumanParsing",
            image=photo,
            pose=pose["pose"],
            parser=block.widget("TruePoseHumanParsing", "parser", "from keypoints (no model)"),
            download=download,
            room=PREVIEW,
        )
    with graph.group("Cut out and read"):
        frame = graph.add(
            "TruePoseFramePerson",
            image=photo,
            parsing=parsing["parsing"],
            pose=pose["pose"],
            sizes=block.widget("TruePoseFramePerson", "sizes", "SD1.5"),
            margin=block.widget("TruePoseFramePerson", "margin", 0.2),
            person=block.widget("TruePoseFramePerson", "person", -1),
        )
        source = graph.add(
            "TruePoseSourceNetEncode",
            model=model,
            vae=vae,
            image=frame["image"],
            parsing=frame["parsing"],
            pose=frame["pose"],
        )
    block.gives("source", source["source"])
    for name in ("image", "parsing", "pose", "crop"):
        block.gives(name, frame[name])
    return block


def pose_transfer(info: dict) -> Block:
    """From a source to its person in another pose, as one node."""
    text = "Shows the person of a source in a pose of the gallery, and puts the picture back into their photo."
    block = Block(info, "Pose Transfer", text, before=200)
    graph = block.graph
    kinds = {"model": "MODEL", "clip": "CLIP", "vae": "VAE", "source": "TRUEPOSE_SOURCE"}
    kinds |= {"source_image": "IMAGE", "source_pose": "POSE_KEYPOINT", "photo": "IMAGE", "crop": "TRUEPOSE_CROP"}
    given = {name: block.takes(name, kind) for name, kind in kinds.items()}
    with graph.group("Target pose"):
        # A block's number that goes into a widget becomes the block's own widget: the size is read off the picture.
        size = graph.add("GetImageSize", image=given["source_image"])
        gallery = graph.add(
            "TruePosePoseGallery",
            name=block.widget("TruePosePoseGallery", "name", "hand on hip", "pose"),
            mirror=block.widget("TruePosePoseGallery", "mirror", False),
            width=size["width"],
            height=size["height"],
            room=PREVIEW,
        )
        target = graph.add("TruePoseRetargetPose", target=gallery["pose"], source=given["source_pose"], room=PREVIEW)
        graph.note(
            """
            ## Another pose
            *Load Pose* (OpenPose JSON) or *Estimate Pose* on a second photo give poses too. **Retarget Pose** puts
            them on the proportions of your person; *Transform Pose* and *Edit Pose* change them.
            """,
            150,
        )
    with graph.group("Prompt"):
        texts = {"prompt": PHOTO_PROMPT, "negative prompt": NEGATIVE}
        prompts = tuple(
            graph.add(
                "CLIPTextEncode",
                title=name.capitalize(),
                clip=given["clip"],
                text=block.widget("CLIPTextEncode", "text", words, name),
            )["CONDITIONING"]
            for name, words in texts.items()
        )
        control = graph.add(
            "ControlNetLoader",
            models=(OPENPOSE_SD15,),
            control_net_name=block.widget("ControlNetLoader", "control_net_name", OPENPOSE_SD15["name"]),
        )
        posed = controlled(graph, prompts, control, target["image"], given["vae"])
        latent = graph.add("EmptyLatentImage", width=size["width"], height=size["height"])
    with graph.group("Picture"):
        patched = graph.add(
            "TruePoseApplyHPFA",
            model=given["model"],
            source=given["source"],
            target_pose=target["pose"],
            background=block.widget("TruePoseApplyHPFA", "background", 1.0),
        )
        done = sampled(
            graph,
            patched["model"],
            posed["positive"],
            posed["negative"],
            latent["LATENT"],
            seed=block.widget("KSampler", "seed", 1),
            steps=block.widget("KSampler", "steps", 25),
            cfg=block.widget("KSampler", "cfg", 6.0),
        )
        picture = graph.add("VAEDecode", samples=done["LATENT"], vae=given["vae"])
        back = graph.add(
            "TruePosePasteBack", photo=given["photo"], image=picture["IMAGE"], crop=given["crop"], feather=32
        )
    block.gives("image", back["image"])
    block.gives("crop image", picture["IMAGE"])
    block.gives("pose", target["pose"])
    return block


BLOCKS: tuple[Callable[[dict], Block], ...] = (photo_to_source, pose_transfer)
"""What the page's node library offers as subgraphs, from subgraphs/*.json."""


def photo_to_pose(graph: Graph) -> None:
    with graph.group("Start here"):
        graph.note(
            """
            # The person of a photo in another pose
            1. **Choose a photo** in *Your photo*: one person, large and whole.
            2. **Choose a pose** in *Pose Transfer*.
            3. Write in its *prompt* what the photo shows, and press **Run**.

            The person is found, cut out to the model's size, read once (**Photo to Source**), posed in their own
            proportions, and the picture goes back into the photo (**Pose Transfer**). Both are subgraphs: the icon
            at their corner opens them, and the node library has them for graphs of your own.

            You need a checkpoint and an OpenPose ControlNet (linked in the page's list of missing models), and two
            small networks that read the pose. Any other SD1.5 checkpoint will do; one for photos does better.
            """,
            420,
        )
        graph.note(WANTED, 210)
        loader = checkpoint(graph, SD15)
    with graph.group("Photo"):
        photo = graph.add("LoadImage", title="Your photo", image=PHOTO, room=PREVIEW)
        source = graph.add_block(
            photo_to_source(graph.info), photo=photo["IMAGE"], model=loader["MODEL"], vae=loader["VAE"]
        )
        graph.note(BETTER_PARSING.replace("Human Parsing", "Photo to Source"), 330)
    with graph.group("Another pose"):
        transfer = graph.add_block(
            pose_transfer(graph.info),
            model=loader["MODEL"],
            clip=loader["CLIP"],
            vae=loader["VAE"],
            source=source["source"],
            source_image=source["image"],
            source_pose=source["pose"],
            photo=photo["IMAGE"],
            crop=source["crop"],
        )
        transfer.width = 400
    with graph.group("Result"):
        graph.add("SaveImage", images=transfer["image"], filename_prefix="truepose/photo_to_pose", room=400)
        graph.note(
            """
            ## What to turn
            * **margin** (*Photo to Source*): room around the person; more for poses that reach further. In a group,
              **person** says who is meant. For SDXL choose its **sizes**, its checkpoint and its ControlNet.
            * **background** (*Pose Transfer*) 1 carries the photo's surroundings on, so that the crop fits into the
              photo. With 0 the prompt makes a new one; save *crop image* then.
            * Small hands and faces: *swap_garment_photo* shows **Hands and Face**.
            """,
            270,
        )


def swap_garment_photo(graph: Graph) -> None:
    with graph.group("Start here"):
        graph.note(
            """
            # Face and body of A, top of B
            1. **Choose two photos**: person A, and person B with the top you want.
            2. Write in *Prompt* what the result shows, the new top too, and press **Run**.

            **Combine Sources** takes person A and puts B's top in place of A's own. The picture is made in A's
            pose and goes back into A's photo.

            Set **upper** to 0 and another region to 1 to take something else from B: **lower**, **accessory**,
            **hair**. A share between 0 and 1 blends. Chain the node for a third person.

            To change the top and keep every other pixel, see *restyle_region*.
            """,
            400,
        )
        loader = checkpoint(graph, SD15)
        control = graph.add("ControlNetLoader", models=(OPENPOSE_SD15,), control_net_name=OPENPOSE_SD15["name"])
        graph.note(WANTED, 210)
    photo, _, frame = framed_person(graph, "A", 0.1)
    _, _, donor = framed_person(graph, "B", 0.1)
    with graph.group("A with the top of B"):
        sources = [read_frame(graph, loader, one, name) for one, name in ((frame, "A"), (donor, "B"))]
        both = graph.add("TruePoseCombineSources", source=sources[0]["source"], donor=sources[1]["source"], upper=1.0)
        graph.note(BETTER_PARSING, 330)
    with graph.group("Pose and prompt"):
        skeleton = graph.add("TruePoseDrawSkeleton", title="A's own pose", pose=frame["pose"], room=PREVIEW)
        prompts = prompted(graph, loader["CLIP"], PHOTO_PROMPT)
        posed = controlled(graph, prompts, control, skeleton["image"], loader["VAE"])
        latent = graph.add("EmptyLatentImage", width=frame["width"], height=frame["height"])
        graph.note(
            """
            ## Another pose
            Give Draw Skeleton and the **target_pose** of Apply HPFA another pose, as in *photo_to_pose*.
            """,
            90,
        )
    with graph.group("Picture"):
        patched = graph.add(
            "TruePoseApplyHPFA",
            model=loader["MODEL"],
            source=both["source"],
            target_pose=frame["pose"],
        )
        done = sampled(graph, patched["model"], posed["positive"], posed["negative"], latent["LATENT"])
        picture = graph.add("VAEDecode", samples=done["LATENT"], vae=loader["VAE"])
    with graph.group("Back into the photo"):
        pasted(graph, photo, picture, frame, "swap_garment_photo", feather=32)
    with graph.group("Hands and face"):
        parts = graph.add("TruePoseHandsAndFace", image=picture["IMAGE"], pose=frame["pose"])
        graph.add("MaskPreview", title="Hands", mask=parts["hands"], room=PREVIEW)
        graph.add("MaskPreview", title="Face", mask=parts["face"], room=PREVIEW)
        graph.note(
            """
            ## Finer hands and face
            Small hands and faces are where these models are weakest. Give **segs** and the picture of VAE Decode to
            a detailer (*Detailer (SEGS)* of the Impact Pack, with the patched model and the prompts), and its
            picture to **Paste Back**. Or set a mask on the latent (*Set Latent Noise Mask*) and sample once more
            with denoise 0.4.
            """,
            190,
        )


def restyle_region(graph: Graph) -> None:
    with graph.group("Start here"):
        graph.note(
            """
            # Another top, and nothing else
            1. **Choose a photo** in *Your photo*.
            2. Write in *Prompt* what the top shall be, and press **Run**.

            **Freeze Regions** lets only the chosen regions change; the face cannot drift, because it is not
            sampled. **Paste Back** brings every other pixel of the photo back as it was.

            The garment comes from the prompt and from a second picture, here a mannequin's. Bypass **Apply HPFA**
            (Ctrl+B) to leave it to the prompt alone.
            """,
            340,
        )
        loader = checkpoint(graph, SD15)
        graph.note(WANTED, 210)
    photo, _, frame = framed_person(graph, "", 0.1)
    with graph.group("What may change"):
        encoded = graph.add("VAEEncode", pixels=frame["image"], vae=loader["VAE"])
        frozen = graph.add("TruePoseFreezeRegions", samples=encoded["LATENT"], parsing=frame["parsing"])
        graph.add("MaskPreview", title="What may change", mask=frozen["mask"], room=PREVIEW)
        graph.note(
            """
            ## Regions
            Switch **lower**, **hair**, **background** ... on at Freeze Regions to change them too; **skin** when
            the sleeves become shorter. **grow** is how far the new thing may reach over the old one's border.
            """,
            130,
        )
        graph.note(BETTER_PARSING, 330)
    with graph.group("The garment"):
        garment = graph.add(
            "TruePoseMannequin", title="Garment", seed=6, pose="akimbo", width=512, height=768, room=PREVIEW
        )
        donor = graph.add(
            "TruePoseSourceNetEncode",
            model=loader["MODEL"],
            vae=loader["VAE"],
            image=garment["image"],
            parsing=garment["parsing"],
            pose=garment["pose"],
        )
        graph.note(
            """
            ## Your own garment
            Replace this **Mannequin** by a photo of somebody who wears it: *Load Image*, *Estimate Pose*, *Human
            Parsing* and *Frame Person*, as in the group *Photo*.
            """,
            110,
        )
    with graph.group("Picture"):
        only_top = dict.fromkeys(("face", "hair", "lower", "skin", "accessory"), 0.0)
        patched = graph.add(
            "TruePoseApplyHPFA",
            title="Apply HPFA: the top alone",
            model=loader["MODEL"],
            source=donor["source"],
            target_pose=frame["pose"],
            target_parsing=frame["parsing"],
            **only_top,
        )
        positive, negative = prompted(graph, loader["CLIP"], "photo of a person in a patterned top, natural light")
        done = sampled(graph, patched["model"], positive, negative, frozen["samples"], denoise=0.85)
        picture = graph.add("VAEDecode", samples=done["LATENT"], vae=loader["VAE"])
        graph.note(
            """
            ## How much changes
            **denoise** 0.6 at KSampler keeps folds and light of the old garment, 1 makes all of it anew.
            """,
            90,
        )
    with graph.group("Back into the photo"):
        pasted(graph, photo, picture, frame, "restyle_region", mask=frozen["mask"], feather=0)


def carry_and_inpaint(graph: Graph) -> None:
    with graph.group("Start here"):
        graph.note(
            """
            # The photo's own pixels in another pose
            1. **Choose a photo** in *Your photo*: one person, large and whole.
            2. **Choose a pose** in *Pose Gallery*.
            3. Write in *Prompt* what the picture shows, the background too, and press **Run**.

            **Carry Along Body** lifts both poses to 3D bodies and brings every pixel that the photo shows of the
            person to its place in the new pose. These pixels are kept. The rest, and the background, is made by the
            checkpoint, which looks at the photo while it does (**Apply HPFA**) and follows the skeleton (ControlNet).

            You need a checkpoint and an OpenPose ControlNet (links in the two loaders), and two small networks that
            read the pose. No training, and no 3D files.
            """,
            400,
        )
        loader = checkpoint(graph, SD15)
        control = graph.add("ControlNetLoader", models=(OPENPOSE_SD15,), control_net_name=OPENPOSE_SD15["name"])
        graph.note(WANTED, 210)
    _, _, frame = framed_person(graph, "", 0.2)
    with graph.group("Target pose"):
        gallery = graph.add(
            "TruePosePoseGallery",
            name="hand on hip",
            width=frame["width"],
            height=frame["height"],
            room=PREVIEW,
        )
        target = graph.add("TruePoseRetargetPose", target=gallery["pose"], source=frame["pose"], room=PREVIEW)
        graph.note(BETTER_PARSING, 330)
    with graph.group("What the photo knows"):
        carried = graph.add(
            "TruePoseCarryAlongBody",
            image=frame["image"],
            parsing=frame["parsing"],
            pose=frame["pose"],
            target_pose=target["pose"],
            room=PREVIEW,
        )
        graph.note(
            """
            ## Carry Along Body
            Black is what the photo does not show. **mirror** *front-back* shows a hidden back as the front,
            *left-right* a hidden arm as the other one: run it as a second node and lay its picture under this one.

            Where an arm lies on the wrong side of the body, lift the pose with *Body Pose from Keypoints*, try another
            **hypothesis** there, and connect **target_body** in place of **target_pose**.

            **depth** and **normal** fit depth and normal ControlNets, beside the skeleton or instead of it.
            """,
            260,
        )
    with graph.group("What is made anew"):
        hidden = graph.add("InvertMask", mask=carried["seen"])
        grown = graph.add("GrowMask", mask=hidden["MASK"], expand=6, tapered_corners=True)
        hard = graph.add("MaskToImage", mask=grown["MASK"])
        soft = graph.add("ImageBlur", image=hard["IMAGE"], blur_radius=6, sigma=3.0)
        mask = graph.add("ImageToMask", image=soft["IMAGE"], channel="red")
        graph.add("MaskPreview", title="What is made anew", mask=mask["MASK"], room=PREVIEW)
        graph.note(
            """
            ## The seam
            **expand** makes more anew around what was carried, and **blur_radius** softens the way from one to the
            other. Grey instead of black under the carried pixels keeps their edges clean in the latent.
            """,
            110,
        )
    with graph.group("Where the sampler starts"):
        grey = graph.add("EmptyImage", width=frame["width"], height=frame["height"], color=0x808080)
        laid = graph.add(
            "ImageCompositeMasked", destination=grey["IMAGE"], source=carried["image"], mask=carried["seen"]
        )
        encoded = graph.add("VAEEncode", pixels=laid["IMAGE"], vae=loader["VAE"])
        latent = graph.add("SetLatentNoiseMask", samples=encoded["LATENT"], mask=mask["MASK"])
    with graph.group("Source and prompt"):
        source = read_frame(graph, loader, frame)
        prompts = prompted(graph, loader["CLIP"], "photo of a person, plain studio background, sharp focus")
        posed = controlled(graph, prompts, control, target["image"], loader["VAE"])
    with graph.group("Picture"):
        patched = graph.add(
            "TruePoseApplyHPFA",
            model=loader["MODEL"],
            source=source["source"],
            target_pose=target["pose"],
            target_parsing=carried["parsing"],
        )
        done = sampled(graph, patched["model"], posed["positive"], posed["negative"], latent["LATENT"])
        saved(graph, done["LATENT"], loader["VAE"], "carry_and_inpaint")
        graph.note(
            """
            ## How much is kept
            **denoise** 1 makes hidden places wholly anew. For light that fits better, sample the result once more
            without the mask and with denoise 0.3: the carried pixels are then lightly made over too.

            An inpainting checkpoint fits as well: *InpaintModelConditioning* takes the same picture and mask.
            """,
            150,
        )


OF_BUNDLED = {"steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
"""How the bundled model is sampled: it predicts the clean picture, and one step measures best."""


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
            **OF_BUNDLED,
        )
    return {"loader": loader, "person": person, "target": target, "patched": patched, "latent": latent, "done": done}


def enlarged(graph: Graph, image: Out, prefix: str, room: int = 420) -> Node:
    """Pictures of the bundled model, saved large enough to see."""
    big = graph.add("ImageScale", image=image, upscale_method="nearest-exact", width=384, height=512, crop="disabled")
    graph.add("SaveImage", images=big["IMAGE"], filename_prefix=f"truepose/{prefix}", room=room)
    return big


def demo(graph: Graph) -> None:
    with graph.group("Start here"):
        graph.note(
            """
            # TruePose demo
            Press **Run**. The person on the left is shown in the pose of the other mannequin: the same face,
            hair and clothes, in a pose that the model has not seen of them. It takes a few seconds on a CPU and
            needs no download.

            The bundled model is small (96 x 128 pixels) and knows only this world of mannequins. It shows how
            the nodes go together; for photos see *photo_to_pose*.
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
    made = bundled(graph, 5, "wave")
    with graph.group("Result"):
        decoded = graph.add("VAEDecode", samples=made["done"]["LATENT"], vae=made["loader"]["vae"])
        enlarged(graph, decoded["image"], "demo")


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
        enlarged(graph, decoded["image"], "attention_view", 300)
    with graph.group("Where it looked"):
        view = graph.add(
            "TruePoseAttentionView",
            model=made["patched"]["model"],
            positive=made["loader"]["conditioning"],
            latent=made["done"]["LATENT"],
            image=made["person"]["image"],
            room=480,
        )
        view.width = 720


FRAMES = 8


def pose_sequence(graph: Graph) -> None:
    with graph.group("Start here"):
        graph.note(
            f"""
            # From one pose to another
            Press **Run**; it needs no download. One person is shown in {FRAMES} poses, on the way from one pose of
            the gallery to another, as single pictures and as an animation.

            The person is read once. All frames start from the same noise (**LatentBatchSeedBehavior**), so that
            what the model makes up stays the same from frame to frame.

            The bundled model is small (96 x 128 pixels). With a checkpoint of your own, make the frames as in
            *photo_to_pose*: the skeletons come out of Retarget Pose as a batch.
            """,
            330,
        )
        graph.note(
            """
            ## Try
            * other poses, a **mirror**, and more **steps**: set **batch_size** of the latent alike
            * another **seed** at *Mannequin*: another person
            * *Load Pose* with a file of many frames, in place of the two poses
            """,
            150,
        )
    with graph.group("Model"):
        loader = graph.add("TruePoseLoadModel", file="bundled demo")
        empty = graph.add("TruePoseEmptyLatent", adapter=loader["adapter"], batch_size=FRAMES)
        latent = graph.add("LatentBatchSeedBehavior", samples=empty["latent"], seed_behavior="fixed")
    with graph.group("Source person"):
        person = graph.add("TruePoseMannequin", seed=5, room=PREVIEW)
        source = graph.add(
            "TruePoseSourceNetEncode",
            model=loader["source_net"],
            vae=loader["vae"],
            image=person["image"],
            parsing=person["parsing"],
            pose=person["pose"],
        )
    with graph.group("Two poses"):
        ends = [
            graph.add(
                "TruePosePoseGallery", title=f"Pose Gallery: {when}", name=name, width=384, height=512, room=PREVIEW
            )
            for when, name in (("first", "standing"), ("last", "waving"))
        ]
    with graph.group("The way between them"):
        way = graph.add(
            "TruePoseInterpolatePoses", first=ends[0]["pose"], second=ends[1]["pose"], steps=FRAMES, room=PREVIEW
        )
        target = graph.add(
            "TruePoseRetargetPose",
            target=way["pose"],
            source=person["pose"],
            size="source",
            people="one person in a video",
            room=PREVIEW,
        )
        posed = graph.add("TruePoseApplyPoseEncoder", model=loader["target_net"], pose=target["pose"])
    with graph.group("Pictures"):
        patched = graph.add(
            "TruePoseApplyHPFA",
            model=posed["model"],
            source=source["source"],
            target_pose=target["pose"],
        )
        done = sampled(
            graph,
            patched["model"],
            loader["conditioning"],
            loader["conditioning"],
            latent["LATENT"],
            **OF_BUNDLED,
        )
        decoded = graph.add("VAEDecode", samples=done["LATENT"], vae=loader["vae"])
    with graph.group("Frames and animation"):
        big = enlarged(graph, decoded["image"], "pose_sequence", 300)
        graph.add("SaveAnimatedWEBP", images=big["IMAGE"], filename_prefix="truepose/pose_sequence", fps=6.0, room=300)


def extreme_pose(graph: Graph) -> None:
    with graph.group("Start here"):
        graph.note(
            """
            # A pose far from the photo's
            Press **Run**; it needs no download. A kick shows much of a person that the source does not. The same
            noise becomes a picture twice: as the model makes it, and with **Pose Field Guidance**, which moves every
            step towards a pose that a body can take, and the one asked for.

            **Align Source** shows what both start from: the source carried along the body's surface, at the
            photo's own size.
            """,
            300,
        )
        graph.note(
            """
            ## Try
            * another **pose** at *Mannequin: pose*, or `random` with a **pose_seed**
            * **scale** 0 (the same picture twice) and 50 at Pose Field Guidance
            * **start_percent** 0.5: only the later steps are guided
            """,
            150,
        )
    made = bundled(graph, 5, "kick")
    loader, person, target = made["loader"], made["person"], made["target"]
    with graph.group("As the model makes it"):
        decoded = graph.add("VAEDecode", samples=made["done"]["LATENT"], vae=loader["vae"])
        enlarged(graph, decoded["image"], "extreme_pose", 300)
    with graph.group("With the pose field"):
        guided = graph.add(
            "TruePosePoseFieldGuidance", model=made["patched"]["model"], target_pose=target["pose"], scale=10.0
        )
        again = sampled(
            graph,
            guided["model"],
            loader["conditioning"],
            loader["conditioning"],
            made["latent"]["latent"],
            **OF_BUNDLED,
        )
        decoded = graph.add("VAEDecode", samples=again["LATENT"], vae=loader["vae"])
        enlarged(graph, decoded["image"], "extreme_pose_guided", 300)
    with graph.group("What both start from"):
        aligned = graph.add(
            "TruePoseAlignSource",
            image=person["image"],
            parsing=person["parsing"],
            pose=person["pose"],
            target_pose=target["pose"],
            room=PREVIEW,
        )
        graph.add("PreviewImage", images=aligned["image"], room=PREVIEW)


def referenced(graph: Graph, conditioning: Out, latents: list[Out]) -> Out:
    """A conditioning with reference latents, in this order."""
    for latent in latents:
        conditioning = graph.add("ReferenceLatent", conditioning=conditioning, latent=latent)["CONDITIONING"]
    return conditioning


REFERENCE_PHOTO = """
## Your own photo
Replace **Mannequin** by *Load Image*, *Estimate Pose*, *Human Parsing* and *Frame Person* with its SDXL sizes, as in
*photo_to_pose*; VAE Encode gets the crop. The parsing must be of the picture that is encoded, so do not crop again
after it. Masks of any segmentation node will do too: *Parsing from Masks*.
"""


def flux_kontext_regions(graph: Graph) -> None:
    width, height = 832, 1216
    with graph.group("Start here"):
        graph.note(
            """
            # An editor that forgets what it should not keep
            FLUX.1 Kontext reads the reference picture while it makes the new one. **Guide References** says which
            parts of the person it may read: here all but the **top** and the **background**, which the prompt
            makes new. What is left out cannot come back, and takes no time.

            The model, its two text encoders and its VAE are linked in the loaders. The same node works with
            FLUX.2 dev and klein, LongCat-Image-Edit and Qwen-Image-Edit.
            """,
            300,
        )
        model = graph.add("UNETLoader", models=(KONTEXT,), unet_name=KONTEXT["name"])
        clip = graph.add(
            "DualCLIPLoader", models=(CLIP_L, T5), clip_name1=CLIP_L["name"], clip_name2=T5["name"], type="flux"
        )
        vae = graph.add("VAELoader", models=(FLUX_VAE,), vae_name=FLUX_VAE["name"])
    with graph.group("Reference"):
        person = graph.add("TruePoseMannequin", seed=5, width=width, height=height, room=PREVIEW)
        latent = graph.add("VAEEncode", pixels=person["image"], vae=vae["VAE"])
        graph.note(REFERENCE_PHOTO, 210)
    with graph.group("Prompt"):
        prompt = graph.add(
            "CLIPTextEncode",
            title="Prompt",
            clip=clip["CLIP"],
            text="the same person in a red raincoat on a beach, the same face and hair",
        )
        guided = graph.add(
            "FluxGuidance",
            conditioning=referenced(graph, prompt["CONDITIONING"], [latent["LATENT"]]),
            guidance=2.5,
        )
        nothing = graph.add("ConditioningZeroOut", conditioning=prompt["CONDITIONING"])
        empty = graph.add("EmptySD3LatentImage", width=width, height=height)
    with graph.group("Picture"):
        patched = graph.add(
            "TruePoseGuideReferences", model=model["MODEL"], parsing=person["parsing"], upper=0.0, background=0.0
        )
        done = sampled(
            graph,
            patched["model"],
            guided["CONDITIONING"],
            nothing["CONDITIONING"],
            empty["LATENT"],
            steps=20,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
        )
        saved(graph, done["LATENT"], vae["VAE"], "flux_kontext")
    with graph.group("What to turn"):
        graph.note(
            """
            ## Guide References
            * **face ... accessory**: how much of the region is read. 0 leaves it out, 0.5 weakens it.
            * **start_percent**, **end_percent**: the part of the sampling in which that holds. Until then, and from
              then on, all of the reference is read.
            * **region_match** with a **target_parsing**: the new face looks at the old face, the new trousers at the
              old ones.
            * A second reference gets a second *Reference Latent* and a second Guide References, **reference** 2.

            Weights of 0 and 1 make each step cheaper. Weights between, and matches, leave the fastest kernels.
            All weights 1, or bypassing the node, is exactly the model.
            """,
            330,
        )


def qwen_edit_two_people(graph: Graph) -> None:
    width, height = 832, 1216
    with graph.group("Start here"):
        graph.note(
            """
            # The first person in the top of the second
            Qwen-Image-Edit reads two pictures. **Guide References** says what of each: of the first everything but
            the top, of the second the top and nothing else. So the second's face does not mix with the first's, and
            the second's background cannot bleed in.

            The model, its text encoder and its VAE are linked in the loaders. *2511* works in the same way, and so do
            FLUX.2 dev and klein with their own nodes.
            """,
            300,
        )
        model = graph.add("UNETLoader", models=(QWEN_EDIT,), unet_name=QWEN_EDIT["name"])
        clip = graph.add("CLIPLoader", models=(QWEN_TEXT,), clip_name=QWEN_TEXT["name"], type="qwen_image")
        vae = graph.add("VAELoader", models=(QWEN_VAE,), vae_name=QWEN_VAE["name"])
    nobody = dict.fromkeys(("face", "hair", "lower", "skin", "accessory"), 0.0)
    kept = {"first": {"background": 1.0, "upper": 0.0}, "second": {"background": 0.0, **nobody}}
    people, patched = [], model["MODEL"]
    for number, (which, seed) in enumerate((("first", 5), ("second", 6)), 1):
        with graph.group(f"The {which} person"):
            person = graph.add(
                "TruePoseMannequin", title=f"Mannequin: {which}", seed=seed, width=width, height=height, room=PREVIEW
            )
            latent = graph.add("VAEEncode", pixels=person["image"], vae=vae["VAE"])
            guide = graph.add(
                "TruePoseGuideReferences",
                title=f"Guide References: {which}",
                model=patched,
                parsing=person["parsing"],
                reference=number,
                image=person["image"],
                **kept[which],
            )
            patched = guide["model"]
            people.append((latent["LATENT"], guide["image"]))
            if which == "first":
                graph.note(REFERENCE_PHOTO, 210)
    with graph.group("Prompt"):
        pictures = {f"image{number}": image for number, (_, image) in enumerate(people, 1)}
        conditionings = []
        for title, words in (("Prompt", "the person of Picture 1 wears the top of Picture 2"), ("Negative prompt", "")):
            encoded = graph.add("TextEncodeQwenImageEditPlus", title=title, clip=clip["CLIP"], prompt=words, **pictures)
            conditionings.append(referenced(graph, encoded["CONDITIONING"], [latent for latent, _ in people]))
        graph.note(
            """
            ## What the text encoder sees
            Qwen's text encoder looks at the pictures too, and leaving tokens out does not hide them there. So it gets
            the **image** of Guide References, with the regions of weight 0 painted grey, and the true pictures go
            through *Reference Latent*.
            """,
            150,
        )
    with graph.group("Picture"):
        empty = graph.add("EmptySD3LatentImage", width=width, height=height)
        shifted = graph.add("ModelSamplingAuraFlow", model=patched, shift=3.0)
        done = sampled(
            graph,
            shifted["MODEL"],
            *conditionings,
            empty["LATENT"],
            steps=20,
            cfg=2.5,
            sampler_name="euler",
            scheduler="simple",
        )
        saved(graph, done["LATENT"], vae["VAE"], "qwen_edit")


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
        photo_to_pose,
        swap_garment_photo,
        restyle_region,
        carry_and_inpaint,
        pose_sequence,
        extreme_pose,
        flux_kontext_regions,
        qwen_edit_two_people,
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


def known_photo() -> tuple[tuple[int, int], np.ndarray]:
    """(height, width) of the photos and the keypoints of who is in them."""
    picture, body = person_photo(PEOPLE["person.jpg"])
    return picture.shape[:2], body


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
        save_networks(Path(folder) / "models" / "truepose", *known_photo())
        info = server.object_info()
        WORKFLOWS.mkdir(exist_ok=True)
        SUBGRAPHS.mkdir(exist_ok=True)
        for make in BLOCKS:
            block = make(info)
            (SUBGRAPHS / f"{block.name}.json").write_text(text(blueprint(block)), encoding="utf-8")
        for name in names:
            (WORKFLOWS / f"{name}.json").write_text(text(build(name, info)), encoding="utf-8")
            print(WORKFLOWS / f"{name}.json")
        if arguments.pictures:
            from pictures import take

            for name in names:
                print(take(server, WORKFLOWS / f"{name}.json"))


if __name__ == "__main__":
    main()
