# SPDX-License-Identifier: Apache-2.0
"""Loader nodes of the host."""

import comfy.sd


class UNETLoader:
    RETURN_TYPES, FUNCTION = ("MODEL",), "load_unet"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"unet_name": (["a"],), "weight_dtype": (["default"],)}}

    def load_unet(self, unet_name, weight_dtype):
        return (comfy.sd.patcher(),)


class CheckpointLoaderSimple:
    RETURN_TYPES, FUNCTION = ("MODEL", "CLIP", "VAE"), "load_checkpoint"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"ckpt_name": (["a"],)}}

    def load_checkpoint(self, ckpt_name):
        return comfy.sd.patcher(), comfy.sd.CLIP(), comfy.sd.VAE()


class CLIPLoader:
    RETURN_TYPES, FUNCTION = ("CLIP",), "load_clip"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"clip_name": (["a"],), "type": (["sd"],)},
            "optional": {"device": (["default", "cpu"],)},
        }

    def load_clip(self, clip_name, type, device):
        clip = comfy.sd.CLIP()
        clip.asked_for = device
        return (clip,)


class ControlNetLoader:
    RETURN_TYPES, FUNCTION = ("CONTROL_NET",), "load_controlnet"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"control_net_name": (["a"],)}}

    def load_controlnet(self, control_net_name):
        class ControlNet:
            pass

        net = ControlNet()
        net.control_model_wrapped = comfy.sd.patcher(3)
        net.control_model, net.load_device = net.control_model_wrapped.model, None
        return (net,)


class V3Loader:
    """As nodes of the new interface are: a class method, and an object around the outputs."""

    RETURN_TYPES = ("CLIP",)
    define_schema = FUNCTION = "EXECUTE_NORMALIZED"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"clip_name1": (["a"],)}}

    @classmethod
    def execute(cls, clip_name1):
        class NodeOutput:
            result = (comfy.sd.CLIP(),)

        return NodeOutput()


NODE_CLASS_MAPPINGS = {
    node.__name__: node
    for node in (UNETLoader, CheckpointLoaderSimple, CLIPLoader, ControlNetLoader)
}
NODE_CLASS_MAPPINGS["TripleCLIPLoader"] = V3Loader
