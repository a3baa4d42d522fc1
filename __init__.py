"""ComfyUI-TruePose: a person shown again in another pose, as native ComfyUI nodes."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():  # noqa: ANN201 - the host's type is unknown outside the host
    """What ComfyUI calls to get the nodes. The import waits until then, so tests can collect this folder."""
    from .nodes import TruePoseExtension

    return TruePoseExtension()
