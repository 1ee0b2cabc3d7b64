"""Settings, and the one error a user's mistake raises.

A setting has one home: a dataclass field here, whose default is the paper's value where the paper gives one. A YAML file
under local/conf/ overrides it, and `--set key=value` overrides the file. An unknown key is an error that names the nearest one.

Letters used for tensor shapes in the whole repository:
B batch, T 10-ms feature frames, S encoder frames (40 ms), A adaptor frames (160 ms), L text tokens, P phoneme symbols,
D width, V vocabulary, H attention heads, K convolution kernel, G samples per group (reinforcement learning).
`x_lens` holds the valid lengths of a padded `x`; in a mask, True means what the mask's name says.
"""

from nim4.config.reading import Config, RecipeError, apply_overrides, as_dict, build, load, nearest, read_yaml
from nim4.config.settings import (
    AdaptorConfig,
    AlignConfig,
    AugmentConfig,
    ChunkConfig,
    CkaConfig,
    ConformerConfig,
    ContextSftConfig,
    DecodeConfig,
    EntityConfig,
    EntropyConfig,
    GrpoConfig,
    GrpoTrainConfig,
    HintConfig,
    IaSftConfig,
    JointSftConfig,
    KeywordConfig,
    LlmConfig,
    ModelConfig,
    NoiseConfig,
    OptimConfig,
    PhonemeHeadConfig,
    PretrainConfig,
    RewardConfig,
    SftConfig,
    SwapConfig,
    TrainConfig,
    VadConfig,
    ZipformerConfig,
)

__all__ = [
    "AdaptorConfig",
    "AlignConfig",
    "AugmentConfig",
    "ChunkConfig",
    "CkaConfig",
    "Config",
    "ConformerConfig",
    "ContextSftConfig",
    "DecodeConfig",
    "EntityConfig",
    "EntropyConfig",
    "GrpoConfig",
    "GrpoTrainConfig",
    "HintConfig",
    "IaSftConfig",
    "JointSftConfig",
    "KeywordConfig",
    "LlmConfig",
    "ModelConfig",
    "NoiseConfig",
    "OptimConfig",
    "PhonemeHeadConfig",
    "PretrainConfig",
    "RecipeError",
    "RewardConfig",
    "SftConfig",
    "SwapConfig",
    "TrainConfig",
    "VadConfig",
    "ZipformerConfig",
    "apply_overrides",
    "as_dict",
    "build",
    "load",
    "nearest",
    "read_yaml",
]
