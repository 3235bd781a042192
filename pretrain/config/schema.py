"""Every setting of a run: frozen dataclasses, no torch, one comment with unit and origin per field.

Defaults are DINOv2's short recipe (ViT-L/16, ImageNet-1k, batch 2048, 125,000 steps) unless a comment says
otherwise. Time is counted in optimizer steps only. Sections by intent: science (model, method, heads, rmlp,
loss, teacher, data, mask, optim), efficiency (engine), orchestration (run, checkpoint, log, cluster).
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Architecture = Literal["vit_small", "vit_base", "vit_large", "vit_giant2", "custom"]
HeadKind = Literal["mlp", "rmlp", "mix"]
RmlpInit = Literal["gaussian", "orthogonal", "rademacher", "sparse"]
Recomputed = Literal["none", "selective", "full"]
Attention = Literal["auto", "sdpa", "math", "varlen", "xformers"]


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how long it lasts."""

    dir: str = "runs/default"  # folder of config, metrics, checkpoints and exports; continued when it exists
    steps: int = 125_000  # optimizer steps (DINOv2 short: 100 "epochs" of 1,250)
    seed: int = 0  # every random draw is a function of (seed, purpose, position or step)
    preemption_check_every: int = 1  # steps between the ranks' agreements on whether a signal ends the run


@dataclass(frozen=True)
class ModelConfig:
    """The ViT backbone. `arch` gives width, depth and heads; `custom` reads the three fields below it."""

    arch: Architecture = "vit_large"  # width x blocks: 384 x 12, 768 x 12, 1024 x 24, 1536 x 40
    embed_dim: int | None = None  # D; only with arch=custom
    depth: int | None = None  # blocks; only with arch=custom
    num_heads: int | None = None  # only with arch=custom
    patch_size: int = 16  # pixels
    img_size: int = 224  # pixels; sets the learned position grid (img_size / patch_size squared)
    img_width: int | None = None  # pixels; columns of a position grid that is not square; null = img_size
    in_channels: int = 3  # of the images, as data.channels
    num_register_tokens: int = 0  # 4 in the released "reg" models
    register_neurons: list[list[int]] = field(default_factory=list)  # [block, hidden unit] pairs whose
    # activations move to one more token at inference (arXiv 2506.08010); tools/sinder.py finds them
    ffn_layer: Literal["mlp", "swiglu"] = "mlp"  # swiglu = DINOv2's swiglufused
    ffn_ratio: float = 4.0  # hidden width / D, before SwiGLU's 2/3
    layer_scale: float | None = 1e-5  # initial LayerScale; null = no LayerScale
    drop_path_rate: float = 0.3  # share of images whose residual branch is skipped (DINOv2 long: 0.4)
    drop_path_uniform: bool = True  # the same rate in every block; false = linear from 0 to the rate
    pos_embed_antialias: bool = False  # true in the released register models
    pos_embed_offset: float = 0.1  # grid-size offset of interpolation; 0.0 in the released register models
    attention: Attention = "auto"  # auto: math on CPU in bf16, sdpa elsewhere; varlen (PyTorch) and xformers
    # (that package) take all crops in one call, on GPUs in bf16 only; not measured
    init_from: str = ""  # backbone to start from: any file or folder that tools/surgery.py reads, such as a
    # released .pth, a folder of Hugging Face or timm, an export; empty = random weights; docs/surgery.md


@dataclass(frozen=True)
class MethodConfig:
    """The self-supervised method."""

    kind: Literal["dinov2", "swav"] = "dinov2"  # DINO + iBOT + KoLeo; swav: codes of the other crop
    queue: int = 0  # with swav: images of earlier steps that take part in the codes; 0 = none
    queue_start_step: int = 0  # from this step on (SwAV: 15 epochs)


@dataclass(frozen=True)
class HeadConfig:
    """A projection head: `mlp` is DINOv2's trainable one, `rmlp` the parameter-free one of section `rmlp`."""

    kind: HeadKind = "mlp"  # rmlp: see section rmlp; mix: logits of both, (1 - rmlp.mix) mlp + rmlp.mix rmlp
    prototypes: int = 65_536  # K (DINOv2 long: 131,072)
    hidden_dim: int = 2_048  # width of the hidden layers
    bottleneck_dim: int = 256  # DINOv2 long: 384 for DINO, 256 for iBOT
    num_layers: int = 3  # linear layers before the prototypes
    norm_last_layer: bool = False  # prototypes of length 1 (SwAV, DINO); false = lengths are trained as well


@dataclass(frozen=True)
class IbotHeadConfig(HeadConfig):
    """The head of the masked-patch loss."""

    shared: bool = True  # use dino_head for patches too, and none of the keys here (DINOv2 long: false)


@dataclass(frozen=True)
class RmlpConfig:
    """Randomized-MLP heads (arXiv 2511.05509): one section for both heads, because a draw can be shared."""

    outputs: int = 4_096  # K; the paper's (2D//3)^2 is 65,536 for ViT-S; the first 2D//3 carry the mass
    init: RmlpInit = "gaussian"  # distribution of G, of variance 1 (paper: gaussian); sparse: a third not 0
    amplitude: float = 5.0  # a in W = I + (a / fan_out) G; the paper's R_5-MLP
    amplitude_end: float | None = None  # a where schedule ends; null = amplitude
    mix: float = 0.5  # with kind=mix: share s of the randomized logits, (1 - s) mlp + s rmlp
    mix_end: float | None = None  # s where schedule ends; null = mix
    schedule: Literal["const", "linear", "cosine"] = "const"  # of amplitude and mix, from start_step on
    schedule_steps: int = 0  # from start to end of schedule; 0 = to the last step of the run
    identity: bool = True  # the rectangular identity; without it student and teacher must share a draw
    resample_every: int = 1  # steps between draws; 0 = one draw for the whole run
    share_student_teacher: bool = False  # one draw for both branches (paper: no)
    share_dino_ibot: bool = False  # one draw for both losses (paper: no)
    start_step: int = 0  # trainable MLP heads before this step, RMLP or the mixture from it on


@dataclass(frozen=True)
class LossConfig:
    """Loss weights, temperature of the student, and how teacher outputs become targets."""

    dino_weight: float = 1.0  # class-token loss
    ibot_weight: float = 1.0  # optimised weight; DINOv2 logs half of this term
    koleo_weight: float = 0.1  # times the sum over the two global crops
    student_temp: float = 0.1  # constant
    centering: Literal["softmax", "sinkhorn"] = "softmax"  # DINOv2 long: sinkhorn
    center_momentum: float = 0.9  # of the softmax centre
    sinkhorn_iterations: int = 3  # with centering=sinkhorn


@dataclass(frozen=True)
class TeacherConfig:
    """The EMA teacher."""

    momentum: float = 0.992  # cosine from here (DINOv2 long: 0.994)
    final_momentum: float = 1.0  # to here
    warmup_temp: float = 0.04  # linear from here
    temp: float = 0.07  # to here
    temp_warmup_steps: int = 37_500  # 30 "epochs" of 1,250


@dataclass(frozen=True)
class CropConfig:
    """One kind of random resized crop."""

    size: int = 224  # pixels, square
    scale: list[float] = field(default_factory=lambda: [0.32, 1.0])  # share of the image: smallest, largest


@dataclass(frozen=True)
class LocalCropConfig(CropConfig):
    """The local crops: only the student sees them."""

    size: int = 96  # pixels; 98 for patch size 14
    scale: list[float] = field(default_factory=lambda: [0.05, 0.32])  # likewise
    number: int = 8  # per image


@dataclass(frozen=True)
class AugmentConfig:
    """Flip and colour augmentation of each crop (DINOv2's values)."""

    flip_probability: float = 0.5  # horizontal
    jitter_probability: float = 0.8  # of the four colour changes below, together, in random order
    brightness: float = 0.4  # factor drawn from 1 - this to 1 + this
    contrast: float = 0.4  # factor, likewise
    saturation: float = 0.2  # factor, likewise
    hue: float = 0.1  # shift drawn from -this to this, in turns of the colour circle
    grayscale_probability: float = 0.2  # of each crop
    blur: Literal["released", "paper", "none"] = "released"  # probability for global crop 1 / 2 / local:
    # released 0.0 / 0.9 / 0.5, as the published models were trained; paper 1.0 / 0.1 / 0.5, as the papers say
    solarize_probability: float = 0.2  # of the second global crop


@dataclass(frozen=True)
class SourceConfig:
    """One of several data sets that are mixed."""

    shards: list[str] = field(default_factory=list)  # paths, globs or brace patterns
    weight: float = 1.0  # share of the images that come from here, relative to the other weights


@dataclass(frozen=True)
class DecodeConfig:
    """How an image file becomes pixels."""

    exif_rotation: bool = True  # turn and mirror as a viewer does; false = as stored (DINOv2)
    window: list[float] | None = None  # [low, high]: levels of more than 8 bits that become 0 and 255;
    # null = the full range of 16 bits, and 32 bits are refused
    max_pixels: int = 200_000_000  # width x height; larger images are refused before memory is taken
    scale: Literal["exact", "fast"] = "exact"  # fast: a JPEG is decoded at 1/2, 1/4 or 1/8 where that is
    # still as large as every crop; the same boxes, pixels about two grey levels apart


@dataclass(frozen=True)
class CacheConfig:
    """Copies of remote shards on this machine; not used while `data.shards` names local files only."""

    dir: str = "~/.cache/pretrain/shards"  # best on a local disk; shared by the processes that name it
    max_gb: float = 200.0  # 10^9 bytes of shards; those not used for longest are removed


@dataclass(frozen=True)
class DataConfig:
    """What is read, in which order, and what is cut from each image."""

    shards: list[str] = field(default_factory=lambda: ["data/train-*.tar"])  # paths, globs, braces, addresses
    sources: list[SourceConfig] = field(default_factory=list)  # several data sets, in place of shards
    cache: CacheConfig = field(default_factory=CacheConfig)
    io_attempts: int = 6  # at reading and downloading, before the run ends; 31 s of waiting in all
    io_timeout: float = 60.0  # seconds without a byte, after which a download has failed
    shuffle: Literal["block", "full", "none"] = "block"  # block: shards permuted, open_shards mixed
    open_shards: int = 16  # shards whose samples are mixed by shuffle=block
    group_size: int = 64  # images sharing mask budget, KoLeo neighbours, drop-path subset (DINOv2: a GPU's)
    workers: int = 8  # processes that decode and augment; 0 = in the training process
    prefetch: int = 2  # groups in flight per worker
    worker_timeout: float = 900.0  # seconds without a group before a worker counts as stuck and is restarted
    max_corrupt: float = 0.01  # share of samples that may be corrupt, and are replaced; more end the run
    channels: int = 3  # 1: grey, 3: RGB, others: exactly as many as the images have
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    augment_on: Literal["cpu", "device"] = "cpu"  # device: workers decode, cut and resize; flip, colours and
    # blur run on the training device, with pixels a fraction of a grey level apart
    global_crops: CropConfig = field(default_factory=CropConfig)  # two per image; the teacher sees these
    local_crops: LocalCropConfig = field(default_factory=LocalCropConfig)  # only the student sees these
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])  # per channel, of pixel / 255
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])  # likewise (both ImageNet's)


@dataclass(frozen=True)
class MaskConfig:
    """DINOv2's block masking of the student's global crops."""

    probability: float = 0.5  # share of global crops that get a mask
    ratio: list[float] = field(default_factory=lambda: [0.1, 0.5])  # smallest, largest masked share
    min_patches: int = 4  # smallest block
    min_aspect: float = 0.3  # blocks are between this and its inverse, height / width
    bucket: int = 1  # masked patches of a micro-batch are padded to a multiple of this, so that shapes repeat


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedules and its parameter groups."""

    global_batch_size: int = 2_048  # images per optimizer step, over all devices (DINOv2 long: 3,072)
    lr: float = 0.004  # before scaling; peak_lr(optim) is what is used (DINOv2 long: 2e-4)
    lr_scaling: Literal["sqrt_1024", "none"] = "sqrt_1024"  # lr * sqrt(global_batch_size / 1024)
    min_lr: float = 1e-6  # end of the cosine; not scaled with the batch
    warmup_steps: int = 12_500  # linear from 0 (DINOv2 long: 100,000)
    weight_decay: float = 0.04  # cosine from here
    weight_decay_end: float = 0.4  # to here (DINOv2 long: 0.2)
    beta1: float = 0.9  # AdamW's decay of the first moment
    beta2: float = 0.999  # of the second moment; maintainers' hint for small models: 0.99
    layerwise_decay: float = 0.9  # lr factor per block from the top down (DINOv2 long: 1.0)
    patch_embed_lr_mult: float = 0.2  # lr factor of the patch embedding, on top of the layerwise one
    clip_grad_norm: float = 3.0  # per sub-module (backbone, each head); 0 = off
    spike_factor: float = 0.0  # skip a step whose loss exceeds this many times its running mean; 0 = never
    max_bad_steps: int = 10  # skipped steps in a row (not finite, or a spike) that end the run
    freeze_last_layer_steps: int = 1_250  # the prototypes' lr is 0 before this step
    freeze_backbone_steps: int = 0  # likewise the backbone's, so that fresh heads do not spoil a trained one


@dataclass(frozen=True)
class Fsdp2Config:
    """How engine.kind=fsdp2 spreads the weights."""

    replicate: int = 1  # copies of the shards (hybrid sharding), often the number of nodes


@dataclass(frozen=True)
class DeepspeedConfig:
    """DeepSpeed's ZeRO, with engine.kind=deepspeed: what is split over the devices, and where it lies."""

    stage: Literal[1, 2, 3] = 2  # split are 1: optimizer state; 2: and gradients; 3: and all weights
    offload_optimizer: Literal["none", "cpu"] = "none"  # cpu: optimizer state and its step on the host
    extra: dict[str, Any] = field(default_factory=dict)  # DeepSpeed's own settings, merged last


@dataclass(frozen=True)
class EngineConfig:
    """How the step is executed; nothing here changes results beyond rounding."""

    kind: Literal["single", "ddp", "fsdp2", "deepspeed"] = "single"  # one device; copies; shards; ZeRO
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU when there is one
    precision: Literal["fp32", "bf16"] = "bf16"  # bf16: autocast; parameters, optimizer and losses stay fp32
    accumulation_steps: int = 1  # micro-batches per optimizer step
    activation_checkpointing: Recomputed = "none"  # of the student's blocks; selective keeps matrix products
    compile: bool = False  # torch.compile of each block; the first steps take minutes
    timeout: float = 1800.0  # seconds that a rank waits for the others in a collective before the run ends
    hang_timeout: float = 900.0  # seconds without a finished step, then each rank writes its stacks; 0 = off
    fsdp2: Fsdp2Config = field(default_factory=Fsdp2Config)
    deepspeed: DeepspeedConfig = field(default_factory=DeepspeedConfig)


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run, to resume and to use."""

    every: int = 3_750  # steps between checkpoints; the last step is always saved
    keep: int = 3  # newest checkpoints kept
    keep_every: int = 0  # checkpoints at multiples of this many steps are never removed; 0 = none
    asynchronous: bool = False  # write a copy behind training: standstill for memory, see docs/checkpoints.md
    export_every: int = 12_500  # steps between exports of the teacher's backbone; also at the last step
    resume_from: str = ""  # step_* folder of another run to start from, while this run has no checkpoint


@dataclass(frozen=True)
class KnnConfig:
    """Weighted k-NN accuracy of the teacher's frozen features on labelled shards."""

    train: list[str] = field(default_factory=list)  # shards with a .cls per sample; empty = no k-NN
    test: list[str] = field(default_factory=list)  # given together with train
    every: int = 0  # steps; 0 = only at the end
    k: int = 20  # neighbours that vote
    temperature: float = 0.07  # of the votes: exp(similarity / temperature)
    resize: int = 256  # pixels, shorter side
    crop: int = 224  # pixels, centre crop
    batch_size: int = 64  # images per forward


@dataclass(frozen=True)
class ImagesConfig:
    """Pictures for TensorBoard: patch tokens as colours, in one basis through the run, and attention."""

    shards: list[str] = field(
        default_factory=list
    )  # the first images of these, labelled or not; empty = none
    number: int = 8  # images
    every: int = 1_000  # steps; 0 = only at the end


@dataclass(frozen=True)
class ArtifactsConfig:
    """Singular defects of the teacher: which patch tokens stand out after each block; see docs/sinder.md."""

    shards: list[str] = field(
        default_factory=list
    )  # the first images of these, labelled or not; empty = none
    number: int = 16  # images
    every: int = 1_000  # steps; 0 = only at the end


@dataclass(frozen=True)
class LogConfig:
    """What is written while the run trains."""

    every: int = 10  # steps between metric lines; the only host synchronisation of the loop
    tensorboard: bool = True  # also to run.dir/tensorboard; metrics.jsonl is always written
    norms_every: int = 0  # steps between norms of weights and gradients per layer; 0 = never
    profile_steps: list[int] = field(default_factory=list)  # [first, last]: trace steps first to last - 1
    knn: KnnConfig = field(default_factory=KnnConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    artifacts: ArtifactsConfig = field(default_factory=ArtifactsConfig)


@dataclass(frozen=True)
class ClusterConfig:
    """How launchers/slurm.py asks Slurm for machines; training itself reads none of it.

    `~/.config/pretrain/cluster.yaml` holds defaults for all runs: keys of this section, without its name.
    """

    nodes: int = 1  # machines
    gpus_per_node: int = 8  # 0 = CPU machines
    tasks_per_node: int | None = None  # processes on a machine; null = one per GPU, or 1 without GPUs
    cpus_per_task: int | None = None  # cores of a process; null = data.workers + 2
    mem_gb: int | None = None  # memory of a machine, GiB; null = the cluster's default, 0 = all of it
    partition: str = ""  # empty = the cluster's default, here and below
    account: str = ""  # that pays
    qos: str = ""  # quality of service
    time: str = ""  # limit of one attempt, as 2-00:00:00 (days) or 90 (minutes); the run goes on after it
    constraint: str = ""  # features of the machines, such as h100
    exclude: str = ""  # machines not to use, such as gpu[03-05],gpu17
    dependency: str = ""  # of other jobs, such as afterok:1234
    mail: str = ""  # address that hears of begin, end, failure and requeue
    name: str = ""  # of the job; empty = the name of run.dir
    setup: list[str] = field(default_factory=list)  # shell lines before the start, such as module load cuda
    container_image: str = ""  # image that the processes run in (needs Slurm's pyxis)
    container_mounts: list[str] = field(default_factory=list)  # SOURCE:TARGET, beside the run's own folders
    python: str = ""  # interpreter of the processes; empty = the one that submits
    sbatch_args: list[str] = field(default_factory=list)  # further options, such as --reservation=vision
    srun_args: list[str] = field(default_factory=list)  # likewise, of srun
    signal_seconds: int = 120  # before the time limit at which the ranks save; longer than a save takes
    max_restarts: int = 100  # of one job, for whatever reason, before it stops
    max_crashes: int = 3  # in a row without a new checkpoint, before it stops; the same error twice does too
    max_bad_nodes: int = 2  # machines that may be excluded, because they failed the check at the start
    preflight_timeout: float = 300.0  # seconds for all ranks to be there and to talk; 0 = no check
    min_free_gb: float = 1.0  # 10^9 bytes that must be free where a machine writes
    images_per_s: float | None = None  # measured, of one GPU; for the estimate of GPU-hours


@dataclass(frozen=True)
class Config:
    """A whole run. `pretrain.config.checks.check` holds the rules between its fields."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    dino_head: HeadConfig = field(default_factory=HeadConfig)
    ibot_head: IbotHeadConfig = field(default_factory=IbotHeadConfig)
    rmlp: RmlpConfig = field(default_factory=RmlpConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
