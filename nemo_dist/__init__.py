"""Distributed training of Hugging Face models as a composition of plugins.

Names are imported on first use (PEP 562), so that planning needs neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_dist.checkpoint.offline_export import export_checkpoint
    from nemo_dist.checkpoint.run_folder import RunFolder
    from nemo_dist.errors import (
        CheckpointError,
        NemoDistError,
        PluginError,
        RankError,
        TopologyError,
        UnknownNameError,
    )
    from nemo_dist.mesh.mesh_context import MeshContext
    from nemo_dist.mesh.process_group import DistEnv, initialize_distributed
    from nemo_dist.models.auto_model import (
        NeMoAutoModel,
        NeMoAutoModelBiEncoder,
        NeMoAutoModelCrossEncoder,
        NeMoAutoModelForAudioClassification,
        NeMoAutoModelForAudioFrameClassification,
        NeMoAutoModelForAudioTokenization,
        NeMoAutoModelForAudioXVector,
        NeMoAutoModelForCausalLM,
        NeMoAutoModelForCTC,
        NeMoAutoModelForDecision,
        NeMoAutoModelForDepthEstimation,
        NeMoAutoModelForDocumentQuestionAnswering,
        NeMoAutoModelForImageClassification,
        NeMoAutoModelForImageMatting,
        NeMoAutoModelForImageSegmentation,
        NeMoAutoModelForImageTextToText,
        NeMoAutoModelForImageToImage,
        NeMoAutoModelForInstanceSegmentation,
        NeMoAutoModelForKeypointDetection,
        NeMoAutoModelForKeypointMatching,
        NeMoAutoModelForMaskedImageModeling,
        NeMoAutoModelForMaskedLM,
        NeMoAutoModelForMaskGeneration,
        NeMoAutoModelForMultimodalLM,
        NeMoAutoModelForMultipleChoice,
        NeMoAutoModelForNextSentencePrediction,
        NeMoAutoModelForNormalEstimation,
        NeMoAutoModelForObjectDetection,
        NeMoAutoModelForPointmapEstimation,
        NeMoAutoModelForPoseEstimation,
        NeMoAutoModelForPreTraining,
        NeMoAutoModelForQuestionAnswering,
        NeMoAutoModelForRNNT,
        NeMoAutoModelForSemanticSegmentation,
        NeMoAutoModelForSeq2SeqLM,
        NeMoAutoModelForSequenceClassification,
        NeMoAutoModelForSpeechSeq2Seq,
        NeMoAutoModelForTableQuestionAnswering,
        NeMoAutoModelForTableRecognition,
        NeMoAutoModelForTDT,
        NeMoAutoModelForTextEncoding,
        NeMoAutoModelForTextRecognition,
        NeMoAutoModelForTextToSpectrogram,
        NeMoAutoModelForTextToWaveform,
        NeMoAutoModelForTimeSeriesPrediction,
        NeMoAutoModelForTokenClassification,
        NeMoAutoModelForUniversalSegmentation,
        NeMoAutoModelForVideoClassification,
        NeMoAutoModelForVisualQuestionAnswering,
        NeMoAutoModelForZeroShotImageClassification,
        NeMoAutoModelForZeroShotObjectDetection,
    )
    from nemo_dist.planning.mesh_plan import Axis, MeshPlan, Role, View
    from nemo_dist.planning.sizes import ParallelismSizes
    from nemo_dist.plugin.hookspecs import PluginState, RuntimePart, SavedState, hookimpl
    from nemo_dist.plugin.protocol import Plugin, Stage
    from nemo_dist.plugin.registry import Registry
    from nemo_dist.setup.setup import DistributedSetup
    from nemo_dist.training.runtime import Runtime
    from nemo_dist_context import ContextConfig
    from nemo_dist_ddp import DDPConfig
    from nemo_dist_fsdp2 import FSDP2Config
    from nemo_dist_megatron_fsdp import MegatronFSDPConfig
    from nemo_dist_moe import MoEParallelizerConfig
    from nemo_dist_pipeline import AutoPipeline, PipelineConfig

# The only place in the core that names plugins: their config classes are public names, and live with the plugin.
_HOMES = {
    "nemo_dist.checkpoint.offline_export": ("export_checkpoint",),
    "nemo_dist.setup.setup": ("DistributedSetup",),
    "nemo_dist.mesh.mesh_context": ("MeshContext",),
    "nemo_dist.mesh.process_group": ("DistEnv", "initialize_distributed"),
    "nemo_dist.errors": (
        "CheckpointError",
        "NemoDistError",
        "PluginError",
        "RankError",
        "TopologyError",
        "UnknownNameError",
    ),
    "nemo_dist.plugin.hookspecs": ("PluginState", "RuntimePart", "SavedState", "hookimpl"),
    "nemo_dist.plugin.protocol": ("Plugin", "Stage"),
    "nemo_dist.models.auto_model": (
        "NeMoAutoModel",
        "NeMoAutoModelBiEncoder",
        "NeMoAutoModelCrossEncoder",
        "NeMoAutoModelForAudioClassification",
        "NeMoAutoModelForAudioFrameClassification",
        "NeMoAutoModelForAudioTokenization",
        "NeMoAutoModelForAudioXVector",
        "NeMoAutoModelForCTC",
        "NeMoAutoModelForCausalLM",
        "NeMoAutoModelForDecision",
        "NeMoAutoModelForDepthEstimation",
        "NeMoAutoModelForDocumentQuestionAnswering",
        "NeMoAutoModelForImageClassification",
        "NeMoAutoModelForImageMatting",
        "NeMoAutoModelForImageSegmentation",
        "NeMoAutoModelForImageTextToText",
        "NeMoAutoModelForImageToImage",
        "NeMoAutoModelForInstanceSegmentation",
        "NeMoAutoModelForKeypointDetection",
        "NeMoAutoModelForKeypointMatching",
        "NeMoAutoModelForMaskGeneration",
        "NeMoAutoModelForMaskedImageModeling",
        "NeMoAutoModelForMaskedLM",
        "NeMoAutoModelForMultimodalLM",
        "NeMoAutoModelForMultipleChoice",
        "NeMoAutoModelForNextSentencePrediction",
        "NeMoAutoModelForNormalEstimation",
        "NeMoAutoModelForObjectDetection",
        "NeMoAutoModelForPointmapEstimation",
        "NeMoAutoModelForPoseEstimation",
        "NeMoAutoModelForPreTraining",
        "NeMoAutoModelForQuestionAnswering",
        "NeMoAutoModelForRNNT",
        "NeMoAutoModelForSemanticSegmentation",
        "NeMoAutoModelForSeq2SeqLM",
        "NeMoAutoModelForSequenceClassification",
        "NeMoAutoModelForSpeechSeq2Seq",
        "NeMoAutoModelForTDT",
        "NeMoAutoModelForTableQuestionAnswering",
        "NeMoAutoModelForTableRecognition",
        "NeMoAutoModelForTextEncoding",
        "NeMoAutoModelForTextRecognition",
        "NeMoAutoModelForTextToSpectrogram",
        "NeMoAutoModelForTextToWaveform",
        "NeMoAutoModelForTimeSeriesPrediction",
        "NeMoAutoModelForTokenClassification",
        "NeMoAutoModelForUniversalSegmentation",
        "NeMoAutoModelForVideoClassification",
        "NeMoAutoModelForVisualQuestionAnswering",
        "NeMoAutoModelForZeroShotImageClassification",
        "NeMoAutoModelForZeroShotObjectDetection",
    ),
    "nemo_dist.planning.mesh_plan": ("Axis", "MeshPlan", "Role", "View"),
    "nemo_dist.plugin.registry": ("Registry",),
    "nemo_dist.checkpoint.run_folder": ("RunFolder",),
    "nemo_dist.training.runtime": ("Runtime",),
    "nemo_dist.planning.sizes": ("ParallelismSizes",),
    "nemo_dist_context": ("ContextConfig",),
    "nemo_dist_ddp": ("DDPConfig",),
    "nemo_dist_fsdp2": ("FSDP2Config",),
    "nemo_dist_megatron_fsdp": ("MegatronFSDPConfig",),
    "nemo_dist_moe": ("MoEParallelizerConfig",),
    "nemo_dist_pipeline": ("AutoPipeline", "PipelineConfig"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AutoPipeline",
    "Axis",
    "CheckpointError",
    "ContextConfig",
    "DDPConfig",
    "DistEnv",
    "DistributedSetup",
    "FSDP2Config",
    "MegatronFSDPConfig",
    "MeshContext",
    "MeshPlan",
    "MoEParallelizerConfig",
    "NeMoAutoModel",
    "NeMoAutoModelBiEncoder",
    "NeMoAutoModelCrossEncoder",
    "NeMoAutoModelForAudioClassification",
    "NeMoAutoModelForAudioFrameClassification",
    "NeMoAutoModelForAudioTokenization",
    "NeMoAutoModelForAudioXVector",
    "NeMoAutoModelForCTC",
    "NeMoAutoModelForCausalLM",
    "NeMoAutoModelForDecision",
    "NeMoAutoModelForDepthEstimation",
    "NeMoAutoModelForDocumentQuestionAnswering",
    "NeMoAutoModelForImageClassification",
    "NeMoAutoModelForImageMatting",
    "NeMoAutoModelForImageSegmentation",
    "NeMoAutoModelForImageTextToText",
    "NeMoAutoModelForImageToImage",
    "NeMoAutoModelForInstanceSegmentation",
    "NeMoAutoModelForKeypointDetection",
    "NeMoAutoModelForKeypointMatching",
    "NeMoAutoModelForMaskGeneration",
    "NeMoAutoModelForMaskedImageModeling",
    "NeMoAutoModelForMaskedLM",
    "NeMoAutoModelForMultimodalLM",
    "NeMoAutoModelForMultipleChoice",
    "NeMoAutoModelForNextSentencePrediction",
    "NeMoAutoModelForNormalEstimation",
    "NeMoAutoModelForObjectDetection",
    "NeMoAutoModelForPointmapEstimation",
    "NeMoAutoModelForPoseEstimation",
    "NeMoAutoModelForPreTraining",
    "NeMoAutoModelForQuestionAnswering",
    "NeMoAutoModelForRNNT",
    "NeMoAutoModelForSemanticSegmentation",
    "NeMoAutoModelForSeq2SeqLM",
    "NeMoAutoModelForSequenceClassification",
    "NeMoAutoModelForSpeechSeq2Seq",
    "NeMoAutoModelForTDT",
    "NeMoAutoModelForTableQuestionAnswering",
    "NeMoAutoModelForTableRecognition",
    "NeMoAutoModelForTextEncoding",
    "NeMoAutoModelForTextRecognition",
    "NeMoAutoModelForTextToSpectrogram",
    "NeMoAutoModelForTextToWaveform",
    "NeMoAutoModelForTimeSeriesPrediction",
    "NeMoAutoModelForTokenClassification",
    "NeMoAutoModelForUniversalSegmentation",
    "NeMoAutoModelForVideoClassification",
    "NeMoAutoModelForVisualQuestionAnswering",
    "NeMoAutoModelForZeroShotImageClassification",
    "NeMoAutoModelForZeroShotObjectDetection",
    "NemoDistError",
    "ParallelismSizes",
    "PipelineConfig",
    "Plugin",
    "PluginError",
    "PluginState",
    "RankError",
    "Registry",
    "Role",
    "RunFolder",
    "Runtime",
    "RuntimePart",
    "SavedState",
    "Stage",
    "TopologyError",
    "UnknownNameError",
    "View",
    "export_checkpoint",
    "hookimpl",
    "initialize_distributed",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'nemo_dist' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
