"""Nodes for ComfyUI. This is the only part of the package that imports ComfyUI, and needs neither diffusers nor a download."""

from comfy_api.latest import ComfyExtension, io

from .apply import ACTApplyMap, ACTBlendMaps
from .demo import ACTDemoModel
from .files import ACTLoadMap, ACTSaveMap, register_folder
from .fit import ACTFitMap, ACTPresetPrompts
from .inspection import ACTInspectMap

# Before the first schema is read, which lists the files.
register_folder()


class ACTExtension(ComfyExtension):
    """AcT Maps as an extension of ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes of this pack."""
        return [
            ACTFitMap,
            ACTApplyMap,
            ACTLoadMap,
            ACTSaveMap,
            ACTBlendMaps,
            ACTPresetPrompts,
            ACTInspectMap,
            ACTDemoModel,
        ]
