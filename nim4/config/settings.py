"""The settings, one dataclass for each thing that is set. Defaults are the paper's where it gives a value; each says where it is from."""

from dataclasses import dataclass, field

# ---------------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class ConformerConfig:
    """Shape of the streaming Conformer. The paper gives 80 mel bins, 4x subsampling and about 600 M parameters only."""

    kind: str = "conformer"
    dim: int = 1280  # width D (FireRedASR-AED-L)
    num_blocks: int = 14  # ours: 14 blocks come to the paper's ~600 M
    num_heads: int = 20
    ffn_dim: int = 5440  # ours: 4.25 D; RoPE has no position weights, the feed-forward gets their share
    conv_expansion: int = 2  # width of the depthwise convolution in D: 2 in FireRedASR, 1 in the first Conformer
    conv_kernel: int = 33  # depthwise kernel K, odd; symmetric inside a chunk, causal across chunks
    subsampling_channels: int = 32
    subsampling_norm: bool = True  # ours, see Subsampling; false in FireRedASR
    positions: str = "rotary"  # rotary | relative: FireRedASR's, with weights of their own (nim4/model/relative.py)
    dropout: float = 0.1
    num_mel_bins: int = 80  # paper, section 3.1


@dataclass(frozen=True)
class ZipformerConfig:
    """Shape of the Zipformer (arXiv 2310.11230); the defaults are icefall's medium one. Lists have a number for each stack."""

    kind: str = "zipformer"
    dims: tuple[int, ...] = (192, 256, 384, 512, 384, 256)
    downsampling: tuple[int, ...] = (1, 2, 4, 8, 4, 2)  # of 50 Hz
    num_layers: tuple[int, ...] = (2, 2, 3, 4, 3, 2)
    num_heads: tuple[int, ...] = (4, 4, 4, 8, 4, 4)
    ffn_dims: tuple[int, ...] = (512, 768, 1024, 1536, 1024, 768)  # of the second feed-forward; the first has 3/4, the third 5/4 of it
    conv_kernels: tuple[int, ...] = (31, 31, 15, 15, 15, 31)
    unmasked_dims: tuple[int, ...] = (192, 192, 256, 256, 256, 192)  # channels that every utterance has in training
    query_head_dim: int = 32
    value_head_dim: int = 12
    pos_head_dim: int = 4
    pos_dim: int = 48
    causal: bool = True  # can stream; false for icefall's checkpoints that cannot
    subsampling_channels: tuple[int, int, int] = (8, 32, 128)
    dropout: float = 0.1  # at last; training begins with three times as much
    relax_steps: int = 20_000  # training steps in which schedules do what they do in 20,000 of icefall's batches (up to 600 s of audio a GPU)
    pad_value: float = 0.0  # features behind an utterance: their mean; icefall's checkpoints, whose features are not normalised, know log(1e-10)
    num_mel_bins: int = 80

    @property
    def dim(self) -> int:
        """Width D of what comes out."""
        return max(self.dims)


@dataclass(frozen=True)
class AdaptorConfig:
    """Encoder frames to embeddings of the language model."""

    stack: int = 4  # encoder frames per embedding: 25 Hz to 6.25 Hz (paper, section 3.1)
    hidden_dim: int = 2048  # ours: the paper says two layers, not how wide


@dataclass(frozen=True)
class LlmConfig:
    """The language model, as it is taken up by stage 4; later stages find it in their model folder."""

    name: str = "Qwen/Qwen3-1.7B"  # paper; a name on the hub, or a folder
    lora_rank: int = 0  # 0 = all weights are trained (the paper mentions no low-rank updates)
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to rebuild the network of a checkpoint folder."""

    encoder: ConformerConfig | ZipformerConfig = field(default_factory=ConformerConfig)  # by its `kind`
    vocab_size: int = 0  # number of lines in tokens.txt; 0 = taken from the units folder when training starts
    head_layers: int = 3  # linear layers of the phoneme head (paper, section 3.1); 1 = the CTC output of icefall's encoders
    adaptor: AdaptorConfig = field(default_factory=AdaptorConfig)  # used from stage 4 on
    llm: LlmConfig = field(default_factory=LlmConfig)  # used from stage 4 on


# ------------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class ChunkConfig:
    """Dynamic chunk training: one draw per batch (paper: sampled per batch; the values are ours)."""

    sizes: tuple[int, ...] = (4, 8, 16, 24, 32)  # encoder frames; multiples of 4, so a chunk is whole adaptor frames
    full_prob: float = 0.4  # chance of a full-context batch
    deployed_prob: float = 0.2  # chance of exactly (16 frames, 4 chunks), the pair that is deployed
    max_left_chunks: int = 8  # left context drawn from 1..this
    all_left_prob: float = 0.2  # chance of unlimited left context in a chunked batch


@dataclass(frozen=True)
class AugmentConfig:
    """Time warp and masks; the defaults are those of CR-CTC (arXiv 2410.05101, section 4)."""

    time_warp_frames: int = 80  # largest shift of the warp centre, in feature frames
    time_stretch: float = 0.0  # ours: largest change of speaking rate, as a logarithm: 0.25 = rates from 0.78 to 1.28
    freq_warp: float = 0.0  # ours: largest relative shift of the mel axis, a cheap change of speaker; for corpora with few speakers
    freq_response: float = 0.0  # ours: deviation of loudness, tilt and bends of the spectrum, a cheap change of microphone
    num_freq_masks: int = 2
    max_freq_mask_bins: int = 27
    num_time_masks: int = 10  # before time_mask_ratio
    max_time_mask_frames: int = 100
    max_time_mask_fraction: float = 0.15  # of the utterance, before time_mask_ratio
    time_mask_ratio: float = 2.5  # CR-CTC masks 2.5 times as much time as plain CTC


@dataclass(frozen=True)
class NoiseConfig:
    """Recorded noise and silence in the training audio; nothing of it happens without noise recordings (`--noise`)."""

    prob: float = 0.2  # paper, section 4: share of utterances that get silence at both ends, and then noise over all of it
    snr_db: tuple[float, float] = (10.0, 5.0)  # mean and deviation of the ratio of speech to noise (paper: N(10, 5) dB)
    silence_s: float = 1.0  # most silence at each end; the share of it is drawn
    beta: tuple[float, float] = (1.0, 3.0)  # from Beta(1, 3) (paper)
    empty_prob: float = 0.01  # ours: share of utterances replaced by noise or near silence with an empty transcript


@dataclass(frozen=True)
class OptimConfig:
    """The training loop: optimiser, schedule, batches, checkpoints. Shared by every training stage."""

    max_steps: int = 2_000_000  # paper, section 4: 2 M steps of pre-training
    learning_rate: float = 5e-4  # paper: peak rate of pre-training
    warmup_steps: int = 10_000  # paper
    schedule: str = "cosine"  # cosine | constant | eden: the rate after the warm-up
    eden_steps: int = 7500  # eden: about when the rate begins to fall with the steps (arXiv 2310.11230, for LibriSpeech and 50 epochs)
    eden_epochs: float = 3.5  # eden: and with the epochs (the same)
    min_lr_ratio: float = 0.01  # ours: the cosine ends at this fraction of the peak
    weight_decay: float = 0.01  # ours: not stated; none with scaled_adam
    optimizer: str = "adamw"  # adamw | muon: Muon on matrices between hidden layers (nim4/train/optim.py), AdamW on the rest | scaled_adam
    betas: tuple[float, float] = (0.9, 0.98)  # ours: usual for transformers in speech
    clip_norm: float = 5.0
    max_duration_s: float = 300.0  # padded audio per process and micro-batch
    accum: int = 1  # micro-batches per step
    num_buckets: int = 10  # of like length, from one of which each batch is drawn; 1 = batches of any lengths
    short_first_epochs: int = 1  # epochs from the shortest utterance to the longest, before shuffled ones (SortaGrad, arXiv 1512.02595)
    long_weight: float = 1.0  # times an epoch takes the longer half of each split; stage 7 takes it more than once
    precision: str = "fp32"  # fp32 | bf16
    compile: bool = False  # torch.compile of encoder blocks and LLM layers: a minute at the start, then faster steps on a GPU
    parallel: str = "ddp"  # ddp | fsdp2: several processes hold whole copies, or shards
    num_workers: int = 2
    seed: int = 0
    log_every: int = 50
    valid_every: int = 1000
    save_every: int = 1000
    keep_last: int = 5  # resumable checkpoints kept
    average_last: int = 5  # checkpoints averaged into the final model, if that is better on the validation set
    max_nonfinite_in_row: int = 5  # steps with a non-finite loss before training stops
    noise: NoiseConfig = field(default_factory=NoiseConfig)


@dataclass(frozen=True)
class CkaConfig:
    """When a snapshot of the encoder counts as moved (paper, section 3.3; method: linear CKA on pooled frames)."""

    threshold: float = 0.975  # paper; depends on data and size: choose it from the curve of your run
    start_fraction: float = 0.25  # of max_steps; the paper starts at 500 k of 2 M
    every_fraction: float = 0.005  # of max_steps; the paper checks every 10 k of 2 M
    max_frames: int = 50_000  # encoder frames of the fixed list, ours: many more than the width, see nim4/train/cka.py
    unbiased: bool = True  # ours: the paper's estimator is biased, which matters when frames are few


@dataclass(frozen=True)
class TrainConfig(OptimConfig):
    """Stage 3: CR-CTC pre-training on phonemes."""

    cr_weight: float = 0.2  # alpha of CR-CTC for pure CTC; 0 = plain CTC: one view, `augment.time_mask_ratio` 1
    full_view: bool = False  # ours: the first view sees the whole utterance, whatever `chunk` gives the second; in plain CTC one batch in two does
    view_delay: int = 0  # ours, with full_view: the second view may be so many encoder frames late, to hear more of what follows
    cr_warmup_steps: int = 2000  # alpha is ramped linearly over these steps
    chunk: ChunkConfig = field(default_factory=ChunkConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True)
class SftConfig(OptimConfig):
    """Stages 4 to 7: cross-entropy on the transcript. Step counts and rates are each stage's own: local/conf/train/*.yaml."""

    short_first_epochs: int = 0  # ours: the short ones first help CTC to start; here a short stage would see nothing else
    llm_lr_ratio: float = 1.0  # ours: rate of the language model relative to the adaptor's, where it trains
    encoder_lr_ratio: float = 1.0  # ours: rate of the encoder relative to the others, where it trains
    partial_prob: float = 0.0  # ours: share of utterances cut at a chunk boundary, so that unfinished speech is known when streaming
    partial_chunk_frames: int = 16  # encoder frames per chunk of those cuts: 640 ms, as deployed
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    chunk: ChunkConfig = field(default_factory=ChunkConfig)
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(time_mask_ratio=1.0))


@dataclass(frozen=True)
class PretrainConfig:
    """All settings of stage 3; saved beside the weights."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    cka: CkaConfig = field(default_factory=CkaConfig)


@dataclass(frozen=True)
class AlignConfig:
    """All settings of stage 4: the adaptor learns to speak to the language model."""

    adaptor: AdaptorConfig = field(default_factory=AdaptorConfig)
    llm: LlmConfig = field(default_factory=LlmConfig)
    train: SftConfig = field(default_factory=SftConfig)


@dataclass(frozen=True)
class SwapConfig:
    """When stage 5 takes up the next encoder (paper, section 3.3: 1 M, 1 M and 2 M steps on three snapshots)."""

    min_dwell: float = 0.25  # paper, 1 M of 4 M: share of max_steps that an encoder stays at least; snapshots that come sooner wait in line
    final: float = 0.5  # paper, 2 M of 4 M: share of max_steps on the last snapshot
    rewarm: float = 0.01  # share of max_steps over which the rate is warmed up after a swap (ours)


@dataclass(frozen=True)
class IaSftConfig:
    """All settings of stage 5: iterative asynchronous fine-tuning, with encoders swapped in while it runs."""

    swaps: SwapConfig = field(default_factory=SwapConfig)
    train: SftConfig = field(default_factory=SftConfig)


@dataclass(frozen=True)
class JointSftConfig:
    """All settings of stage 6: encoder, adaptor and language model train together."""

    drift_alarm: float = 0.9  # ours: a warning is logged when the CKA of the encoder with that of stage 5 falls below this
    drift_frames: int = 20_000  # encoder frames of the validation set that it is measured on
    train: SftConfig = field(default_factory=SftConfig)


@dataclass(frozen=True)
class EntityConfig:
    """Which phrases of the training transcripts are taken for entities; the rules are ours, see nim4/corpus/entities.py."""

    min_count: int = 2  # times that a phrase must occur; entries of a word list always count
    everyday_share: float = 0.1  # share of the phrases, the most frequent ones, that are everyday ones; where no language model decides


@dataclass(frozen=True)
class HintConfig:
    """Hints of a training utterance (paper, context SFT). An utterance is of one kind, or has no hints; all values are ours: none is stated."""

    keywords_prob: float = 0.5  # kind: the entities of the transcript, and distractors among them
    distractor_prob: float = 0.5  # there: chance of one sound-alike for each entity
    only_distractors_prob: float = 0.1  # kind: sound-alikes alone, one for each entity of the transcript
    unrelated_prob: float = 0.1  # kind: entities that have nothing to do with the utterance
    max_unrelated: int = 3  # there: 1 to this many
    max_hints: int = 10  # all kinds
    max_phone_changes: int = 2  # a sound-alike has at most so many other phones, and never more than half: one Mandarin syllable


@dataclass(frozen=True)
class ContextSftConfig:
    """All settings of stage 7: hints in the prompt, right ones and wrong ones."""

    entities: EntityConfig = field(default_factory=EntityConfig)
    hints: HintConfig = field(default_factory=HintConfig)
    train: SftConfig = field(default_factory=lambda: SftConfig(learning_rate=1e-6, long_weight=2.0))  # rate: paper; weight: ours


@dataclass(frozen=True)
class PhonemeHeadConfig:
    """All settings of stage 9: the phoneme head on the frozen encoder. One view is enough: there is no encoder to regularise."""

    train: TrainConfig = field(default_factory=lambda: TrainConfig(cr_weight=0.0))


@dataclass(frozen=True)
class RewardConfig:
    """The reward of stage 8 (paper, section 3.5): accuracy + 0.5 hallucination + 0.5 context; nim4/train/rewards.py."""

    accuracy_slope: float = 2.0  # the accuracy is exp(-slope * error rate)
    hallucination_weight: float = 0.5
    context_weight: float = 0.5
    context: str = "recall"  # recall | agreement: +-0.5 per keyword that was said (paper), or hypothesis and reference agree (arXiv 2512.21828)


@dataclass(frozen=True)
class KeywordConfig:
    """Hints in the prompts of stage 8."""

    max_keywords: int = 2  # of an utterance (paper: 0 to 2)
    hint_prob: float = 0.5  # ours: each of them is put into the prompt with this chance (paper: a random subset)
    distractor_prob: float = 0.1  # ours: chance of one hint that was not said, without which copying hints could not be seen


@dataclass(frozen=True)
class GrpoTrainConfig(OptimConfig):
    """Stage 8: group-relative policy optimisation. The paper gives the rate and the temperatures; what else is not stated is said."""

    max_steps: int = 1000  # ours: not stated; about three passes over the paper's 20 k samples at 64 a step
    learning_rate: float = 2e-6  # paper
    warmup_steps: int = 0  # paper: no warm-up for reinforcement learning
    schedule: str = "constant"
    group_size: int = 8  # G; ours: not stated. arXiv 2509.01939 finds no difference between 6 and 10
    clip: float = 0.2  # ours: not stated; the usual bound of the ratio. For `gspo` its authors use about 4e-4
    kl_weight: float = 0.04  # beta; ours: not stated, as in arXiv 2509.01939. 0 = no reference model is held
    temperature_start: float = 1.0  # paper: cosine from 1.0 to 0.7
    temperature_end: float = 0.7
    min_group_std: float = 1e-4  # ours: a group whose rewards differ by less says nothing, and gives no policy gradient
    dr_grpo: bool = False  # no division by the deviation of rewards and by the length of an answer (arXiv 2503.20783)
    dr_grpo_tokens: float = 32.0  # ours: what it divides by instead, the same for all answers
    gspo: bool = False  # one ratio per answer instead of one per token (arXiv 2507.18071)
    train_encoder: bool = True  # paper: later stages are end-to-end; whether that holds here is not stated
    train_adaptor: bool = True
    chunk: ChunkConfig = field(default_factory=ChunkConfig)  # ours: as in the other stages; there is no other augmentation (paper)


@dataclass(frozen=True)
class GrpoConfig:
    """All settings of stage 8."""

    rewards: RewardConfig = field(default_factory=RewardConfig)
    keywords: KeywordConfig = field(default_factory=KeywordConfig)
    train: GrpoTrainConfig = field(default_factory=GrpoTrainConfig)


# ---------------------------------------------------------------------------------------------------------- entropy report


@dataclass(frozen=True)
class EntropyConfig:
    """`python -m nim4 entropy`: the budget of its linear probes. All values are ours; numbers made with different ones do not compare."""

    steps: int = 5000  # of Adam, at most; the step that does best on held-out utterances is used
    batch_rows: int = 512  # frames or text units per step
    learning_rate: float = 3e-3  # at the first step; falls to 0 in a straight line
    num_seeds: int = 3  # each draws the halves of the utterances anew
    max_utterances: int = 2000  # of the split, spread evenly


# ------------------------------------------------------------------------------------------------------------- decoding


@dataclass(frozen=True)
class DecodeConfig:
    """One decode configuration: a file under local/conf/decode/. Never an architecture setting: those are in the model folder."""

    method: str = "ctc_greedy"  # ctc_greedy | ctc_beam | ctc_graph | llm
    num_beams: int = 1  # llm: 1 = greedy; in streams more are of the second pass, with final_context whole; ctc_beam: prefixes that are kept
    ctc_weight: float = 0.0  # llm, more than one beam: of the phoneme head's say in which of them is the result
    ngram: str = "none"  # ctc_beam, ctc_graph: words | phones; ctc_graph: none = all phonemes alike
    lm_weight: float = 1.0  # ctc_beam, ctc_graph: of the n-gram's log probability
    word_bonus: float = 0.0  # ctc_beam, ctc_graph: nats for each word, against the leaning of n-grams to short texts
    hotwords: str = "none"  # llm: exact | lattice: hints are looked up in the index of stage 10 by the phoneme head's output (paper: exact)
    max_hints: int = 10  # ours, see nim4/decode/hotword_hints.py
    streaming: bool = False
    chunk_ms: int = 640  # paper, section 3.6
    left_context_chunks: int = 4  # paper, section 3.6
    final_context: str = "chunks"  # llm, streaming: the second pass reads the stream's chunks (paper) | whole: it hears all anew (ours)
    speakers: int = 1  # streaming: who speak at once, to each process; their chunks are decoded together, and they wait for each other's work
    batch_s: float = 60.0  # offline: padded audio decoded at once; the result does not depend on it


@dataclass(frozen=True)
class VadConfig:
    """Where speech starts and stops in long recordings and endless streams, see nim4/decode/vad.py."""

    threshold: float = 0.5  # silero's default: probability from which a window is speech; 0 = all is, and only length cuts
    hysteresis: float = 0.15  # silero's default: it is over only below threshold less this, or below 0.01
    min_speech_s: float = 0.1  # ours: silero's 0.25 s would lose a short "no", and without any limit a click starts a segment
    min_silence_s: float = 0.8  # ours: silero's 0.1 s cuts inside of sentences, which the language model should read whole
    padding_s: float = 0.3  # ours: of silence kept at both ends, behind it at most min_silence_s; silero's 0.03 s loses soft beginnings
    max_segment_s: float = 20.0  # ours: training utterances are mostly shorter, and memory of a stream is bounded by it; padding included
    cut_search_s: float = 4.0  # ours: a segment that would be longer is cut at the quietest point of so much of its end
