"""Nodes that give tests a model without a file. Installed into the test server only."""

if __package__:
    from .tiny import (
        FrameVAE,
        make_clip_vision,
        make_conditioning,
        make_control_net,
        make_editor,
        make_model,
        make_vae,
    )

    class TestModel:
        CATEGORY, FUNCTION = "test", "make"
        RETURN_TYPES = ("MODEL", "VAE")

        @classmethod
        def INPUT_TYPES(cls) -> dict:
            families = ["SD15", "SD20", "SDXL"]
            return {"required": {"seed": ("INT", {"default": 0}), "family": (families, {})}}

        def make(self, seed: int, family: str) -> tuple:
            return make_model(seed, family), make_vae(seed)

    class TestEditor:
        CATEGORY, FUNCTION = "test", "make"
        RETURN_TYPES = ("MODEL",)

        @classmethod
        def INPUT_TYPES(cls) -> dict:
            return {"required": {"seed": ("INT", {"default": 0}), "family": (["kontext", "qwen"], {})}}

        def make(self, seed: int, family: str) -> tuple:
            return (make_editor(family, seed),)

    class TestEditorVAE:
        CATEGORY, FUNCTION = "test", "make"
        RETURN_TYPES = ("VAE",)

        @classmethod
        def INPUT_TYPES(cls) -> dict:
            return {"required": {"seed": ("INT", {"default": 0}), "family": (["kontext", "qwen"], {})}}

        def make(self, seed: int, family: str) -> tuple:
            vae = make_vae(seed, 16)
            return (FrameVAE(vae) if family == "qwen" else vae,)

    class TestControlNet:
        CATEGORY, FUNCTION = "test", "make"
        RETURN_TYPES = ("CONTROL_NET",)

        @classmethod
        def INPUT_TYPES(cls) -> dict:
            return {"required": {"seed": ("INT", {"default": 0}), "family": (["SD15", "SDXL"], {})}}

        def make(self, seed: int, family: str) -> tuple:
            return (make_control_net(seed, family),)

    class TestCLIPVision:
        CATEGORY, FUNCTION = "test", "make"
        RETURN_TYPES = ("CLIP_VISION",)

        @classmethod
        def INPUT_TYPES(cls) -> dict:
            return {"required": {"seed": ("INT", {"default": 0})}}

        def make(self, seed: int) -> tuple:
            return (make_clip_vision(seed),)

    class TestConditioning:
        CATEGORY, FUNCTION = "test", "make"
        RETURN_TYPES = ("CONDITIONING",)

        @classmethod
        def INPUT_TYPES(cls) -> dict:
            return {"required": {"seed": ("INT", {"default": 0})}}

        def make(self, seed: int) -> tuple:
            return (make_conditioning(seed),)

    class TestImage:
        """A plain picture with a figure: three bands of colour on grey."""

        CATEGORY, FUNCTION = "test", "make"
        RETURN_TYPES = ("IMAGE", "MASK", "MASK")
        RETURN_NAMES = ("image", "upper", "lower")

        @classmethod
        def INPUT_TYPES(cls) -> dict:
            size = ("INT", {"default": 64})
            return {"required": {"width": size, "height": size, "seed": ("INT", {"default": 0})}}

        def make(self, width: int, height: int, seed: int) -> tuple:
            import torch

            image = torch.full((1, height, width, 3), 0.5)
            upper = torch.zeros((1, height, width))
            lower = torch.zeros((1, height, width))
            across = slice(width // 4, width - width // 4)
            upper[:, height // 4 : height // 2, across] = 1
            lower[:, height // 2 : height - height // 8, across] = 1
            colours = torch.rand((2, 3), generator=torch.Generator().manual_seed(seed))
            for mask, colour in zip((upper, lower), colours, strict=True):
                image = image * (1 - mask[..., None]) + mask[..., None] * colour
            return image, upper, lower

    NODE_CLASS_MAPPINGS = {
        "TestModel": TestModel,
        "TestEditor": TestEditor,
        "TestEditorVAE": TestEditorVAE,
        "TestControlNet": TestControlNet,
        "TestCLIPVision": TestCLIPVision,
        "TestConditioning": TestConditioning,
        "TestImage": TestImage,
    }
