"""What a recipe may say: one YAML file that takes a model from float to a verified few-bit file.

The descriptions below are the reference: ``docs/recipes.md`` is written from them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fewbits.plan import LayerPlan, layer_plan

Count = Annotated[int, Field(ge=1)]
Some = Annotated[int, Field(ge=8)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Percent = Annotated[float, Field(ge=0, le=100)]
Positive = Annotated[float, Field(gt=0)]
NotNegativeFloat = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """One mapping of the file. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Data(Section):
    """The examples, images or windows of a text, and which of them are used."""

    source: str
    """Name of the data source. Classification: digits, cifar10, cifar10_lossless, fashion_mnist, imagefolder.
    Language: python_topics (a text that comes with Python), tiny_shakespeare, wikitext2, text.
    Segmentation: scenes (made of handwritten digits), masks (folders of your own), camvid, nuclei.
    Detection: scenes, voc, coco (folders of your own), bccd. Open vocabulary: composed (scenes, made), coco, lvis,
    objects365 (folders of your own)."""
    path: str = "auto"
    """Folder (or text file) of the data; auto: embedded in a package, or in `../shared/data` beside the checkout."""
    options: dict[str, Any] = {}
    """Fields of the data set, e.g. `crop_padding`, `flip`, or `size` of an image folder. Language: `tokens` (byte, char
    or the path of a tokenizer), `context` (tokens of a window) and `test` (the last share of the text). Segmentation:
    segmentation.md. Detection: detection.md. Open vocabulary: open_vocabulary.md."""
    validation: Fraction = 0.1
    """Fraction of the training examples (of a text, the last part) that is held out and watched during training; test
    examples are for the end."""
    train_examples: Some | None = None
    """Use only so many training examples, class by class, or the first of a text."""
    test_examples: Some | None = None
    """Use only so many test examples, class by class, or the first of a text."""
    stand_in: bool = False
    """Make random images of the same shape where the data is not there, or take the text that comes with Python."""


class Model(Section):
    """The float model."""

    name: str
    """reference_cnn, resnet20 .. resnet110 (CIFAR), torchvision:NAME or timm:NAME. Language: gpt_nano, gpt_micro,
    gpt_char, gpt2 (all with random weights), or transformers:NAME (a folder, a model type, or a cached name).
    Segmentation: unet_nano .. unet_base, or torchvision:NAME. Detection: detector_nano, detector_small,
    detector_medium, or torchvision:NAME. Open vocabulary: yolo-world:SIZE (nano, s, m, l, x)."""
    options: dict[str, Any] = {}
    """Further keyword arguments of the model."""
    weights: str | None = None
    """File with float weights, also looked for in `../shared/data`; null: random initial weights."""
    skip: list[str] = []
    """Patterns of tensors in that file to leave out, e.g. a head."""


class Updates(Section):
    """How weights are updated."""

    batch_size: Count = 64
    """Examples a batch."""
    lr: float = 0.01
    """Learning rate at its highest."""
    weight_decay: float = 1e-4
    """Weight decay; quantizer parameters have none."""
    quantizer_lr: Positive = 1.0
    """Learning rate of quantizer parameters (steps, zero points), as a share of `lr`."""
    decay_all: bool = True
    """Whether weight decay is for biases and norms, too."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd (momentum 0.9) or adamw."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """cosine (to 0) or constant."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    accumulate: int = 1
    """Batches an update."""
    clip: float | None = None
    """Largest L2 norm of the gradient."""
    label_smoothing: Fraction = 0.0
    """Share of the label that is spread over all classes."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """32-true or bf16-mixed."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto, cpu, cuda or mps."""

    def config(self, seed: int, **more: Any) -> Any:
        """Return the ``fewbits.FitConfig`` of these fields and ``more``. Raises TrainingError for a bad value."""
        from fewbits.train import FitConfig

        return FitConfig(**self.model_dump(include=set(Updates.model_fields) - {"batch_size", "label_smoothing"}),
                         seed=seed, **more)  # fmt: skip


class Training(Updates):
    """One training, of the float model or of the quantized one. Give `epochs` or `max_steps`."""

    epochs: int | None = None
    """Passes over the training examples."""
    max_steps: int | None = None
    """Updates of the weights, in place of `epochs`."""
    ema: float | None = None
    """Decay of a moving average of the weights, which is then the result."""
    log_every: int = 10
    """Steps from one line of metrics.jsonl to the next."""
    checkpoint_every: int = 200
    """Steps from one checkpoint to the next."""

    @model_validator(mode="after")
    def _trainable(self) -> Training:
        from fewbits.errors import FewbitsError

        try:
            self.fit_config(seed=0)
        except FewbitsError as error:  # pydantic then tells where in the file
            raise ValueError(str(error)) from error
        return self

    def fit_config(self, seed: int, progress: bool = True) -> Any:
        """Return the ``fewbits.FitConfig`` of this section."""
        own = self.model_dump(include=set(Training.model_fields) - set(Updates.model_fields))
        return self.config(seed, progress=progress, **own)


class SearchRules(Updates):
    """A search that trains and measures the bits it tries, with plan.method sigma: what it may spend, and how it
    trains. It measures on the validation examples."""

    rounds: Count = 2
    """Rounds of clustering at most."""
    steps: NotNegative = 40
    """Moves at most."""
    move: Count = 2
    """Layers a move."""
    patience: Count = 3
    """Moves in a row that come no nearer to the targets, after which it gives up."""
    epochs_reference: NotNegative = 4
    """Epochs of the INT8 model that it starts from."""
    epochs_cluster: NotNegative = 4
    """Epochs a round."""
    epochs_refine: NotNegative = 40
    """Epochs a move at most; it ends where the accuracy is reached."""
    evaluate_every: Count = 1
    """Epochs from one measurement to the next. Each such part is a training with a schedule of its own."""
    idle: Count = 3
    """Measurements in a row without a gain that end the training of a move."""
    accuracy_buffer: Positive = 2.0
    """Points of accuracy that count as near."""
    cost_buffer: Positive = 0.05
    """Share of the INT8 model's cost that counts as near."""
    steps_per_epoch: Count | None = None
    """Updates that count as an epoch; null: a pass over the training examples."""

    @model_validator(mode="after")
    def _searchable(self) -> SearchRules:
        from fewbits.errors import FewbitsError

        try:
            self.config(seed=0, epochs=1)
        except FewbitsError as error:
            raise ValueError(str(error)) from error
        return self

    def settings(self) -> dict[str, Any]:
        """Return what the search itself is told."""
        return self.model_dump(exclude={*Updates.model_fields, "steps_per_epoch"})


class Segmentation(Section):
    """What a segmentation is trained on, the sum of two losses, and measured by."""

    cross_entropy: NotNegativeFloat = 1.0
    """Weight of the mean cross entropy of the pixels."""
    dice: NotNegativeFloat = 0.0
    """Weight of the soft Dice loss."""
    class_weights: list[float] | Literal["balanced"] | None = None
    """Weights of the classes in the cross entropy; balanced: median frequency over that of the class."""
    tolerance: NotNegative = 2
    """Pixels that an outline may be off, in the boundary F1."""

    @model_validator(mode="after")
    def _some_loss(self) -> Segmentation:
        if self.cross_entropy + self.dice == 0:
            raise ValueError("cross_entropy and dice are both 0: nothing would be trained")
        return self


class OpenVocabulary(Section):
    """Texts of an open-vocabulary detector, and what its curriculum distills (open_vocabulary.md)."""

    text: str = "composed"
    """Encoder of texts: composed (no weights), or the folder of a CLIP of transformers."""
    width: Count | None = None
    """Width of composed texts; null: 512. A CLIP has its own."""
    cache: str | None = None
    """Folder that keeps embeddings from run to run."""
    features: Positive = 6.0
    """Weight of the term `feat`, the backbone's features."""
    relations: Positive = 6.0
    """Weight of the terms `tpsd`, `region-text` and `region-region`."""
    beta: Positive = 1.0
    """Difference of similarities at which their smooth L1 turns linear."""


class Fusion(Section):
    """Gains and norms where branches of different depth meet, in qat; folded away after it (fusion.md)."""

    nodes: list[str] | Literal["auto"] = "auto"
    """Names of cats and adds, such as `neck.up.cat0`; auto: those that fuse different scales."""
    mode: Literal["controller", "fixed", "learned", "off"] = "controller"
    """Who moves the gains: controller, nobody (fixed), or the loss (learned); off: no gains."""
    options: dict[str, Any] = {}
    """Further fields of `FusionSettings`, e.g. `gains`, `norm` or `eta`."""
    freeze_at: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of the steps of qat after which the gains stay."""
    fix_at: Annotated[float, Field(ge=0, le=1)] | None = 0.5
    """Share of the steps of qat after which constants stand for the norms, so that folding costs nothing more (gains
    stay from then on, too); null: when it is folded."""
    fold: Literal["requant", "weight"] = "requant"
    """What takes the constants in: the next input quantizer (requant) or the next weight."""
    finetune_steps: NotNegative = 0
    """Steps after folding, as in qat but with the optimizer and the rate of the next lines, of the task loss alone."""
    finetune_lr: Positive = 2e-5
    """Their learning rate, with adamw and without weight decay."""

    @model_validator(mode="after")
    def _balanceable(self) -> Fusion:
        from fewbits.errors import PlanError

        try:
            self.settings()
        except (PlanError, TypeError) as error:
            raise ValueError(str(error)) from error
        return self

    def settings(self) -> Any:
        """Return the ``FusionSettings``. Raises PlanError for a value out of range, TypeError for an unknown one."""
        from fewbits.layers import FusionSettings

        return FusionSettings(mode=self.mode, **self.options)


class Alignment(Section):
    """Attention maps of the model aligned with those of its float form, in qat (fusion.md)."""

    taps: Annotated[list[str], Field(min_length=1)]
    """Modules whose features are compared, by name: blocks that feed the head."""
    options: dict[str, Any] = {}
    """Fields of `AttentionAlignment`, e.g. `divergence: kl` or `weight`."""
    ratio: Positive | None = None
    """In place of `weight`: its gradient's size against the task's, at the tapped features of a batch before qat."""

    @model_validator(mode="after")
    def _alignable(self) -> Alignment:
        from fewbits.errors import TrainingError

        if self.ratio is not None and "weight" in self.options:
            raise ValueError("alignment.ratio takes the place of alignment.options.weight: give one of them")
        try:
            self.settings()
        except (TrainingError, TypeError) as error:
            raise ValueError(str(error)) from error
        return self

    def settings(self) -> Any:
        """Return the ``AttentionAlignment``. Raises TrainingError for a bad value, TypeError for an unknown one."""
        from fewbits.losses import AttentionAlignment

        return AttentionAlignment(**self.options)


class StageRules(Section):
    """One stage of a curriculum."""

    quantize: Annotated[list[str], Field(min_length=1)]
    """Submodules that are quantized and trained from this stage on, by name, such as `backbone`; all below them, too,
    but for what another stage names."""
    share: Positive
    """Share of the steps of qat; shares add up to 1."""
    distill: list[str] = []
    """Terms of distillation from the float model that are added to the loss. Open vocabulary: feat, tpsd, region-text,
    region-region."""


class CurriculumRules(Section):
    """What is quantized and trained when, in qat: each stage adds modules, and has an optimizer and a schedule of its
    own; what is not reached yet stays in float and frozen (curriculum.md)."""

    stages: list[StageRules]
    """The stages, in their order."""
    norms: Literal["train", "frozen"] = "train"
    """Batch norms of modules that are reached train as usual, or all keep their statistics (frozen)."""
    frozen: list[str] = []
    """Submodules that stay in float and frozen to the end."""

    @model_validator(mode="after")
    def _in_order(self) -> CurriculumRules:
        from fewbits.errors import TrainingError

        try:
            self.settings()
        except TrainingError as error:
            raise ValueError(str(error)) from error
        return self

    def settings(self) -> Any:
        """Return the ``Curriculum``. Raises TrainingError for one that cannot be."""
        from fewbits.train import Curriculum, Stage

        stages = [Stage(**stage.model_dump()) for stage in self.stages]
        return Curriculum(stages, norms=self.norms, frozen=self.frozen)


class Fairness(Section):
    """A term of the loss for the group that is served worst, in qat (fairness.md)."""

    mode: Literal["gap", "gap_sg", "worst", "dro"] = "gap_sg"
    """gap (worst less best group), gap_sg (the same, with no gradient through the best), worst, or dro (group DRO)."""
    weight: Positive = 0.5
    """Weight of the term."""
    least: Count = 4
    """Examples of a group in a batch, below which it is left out."""
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the steps over which the weight rises from 0."""


class LearnedBits(Section):
    """Widths of channels that are trained, with plan.quantizer learnable_bits (fairness.md)."""

    average_bits: Positive | None = None
    """Mean bits of a weight that they come to."""
    energy_uj: Positive | None = None
    """In place of average_bits: microjoules of one image on `hardware` that they come to."""
    hardware: str | None = None
    """Name or file of a hardware description, for energy_uj."""
    lr: Positive = 0.02
    """Bits that a width moves a step, about."""
    freeze_at: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of the steps of qat after which they are whole numbers, and stay."""

    @model_validator(mode="after")
    def _one_budget(self) -> LearnedBits:
        if (self.average_bits is None) == (self.energy_uj is None):
            raise ValueError("learned_bits need average_bits or energy_uj: give one of them")
        if (self.energy_uj is None) != (self.hardware is None):
            raise ValueError("learned_bits.energy_uj and learned_bits.hardware need each other: give both or neither")
        return self


class PlanRules(Section):
    """Which layer is quantized how."""

    method: str = "uniform"
    """uniform (`weight_bits` everywhere, or with a budget the most that fit it), solver (best bits a layer within the
    budget), sigma or another allocation method (allocation.md), file (a plan.json), blocks (`layer` for the linear
    layers of a transformer's blocks; embeddings, LM head, norms and products between activations in float), policy
    (`policy`, of an open-vocabulary detector), or explicit (only `rules`)."""
    layer: dict[str, Any] | None = None
    """The layer plan of every layer, for method blocks, e.g. `{weight: {bits: 1}, input: {bits: 4}}`."""
    file: str | None = None
    """The plan, for method file, as 'fewbits allocate' writes it."""
    policy: str | None = None
    """Bits W-A-Att of weights, activations and attention, for method policy, e.g. 4-4-8; its option is
    `act_granularity` (tensor or channel)."""
    weight_bits: int | None = None
    """Bits of a weight; for uniform without a budget."""
    menu: list[int] = [2, 3, 4, 6, 8]
    """Weight bits that a method with a budget chooses from."""
    act_bits: int | None = None
    """Bits of what feeds a layer; null: activations stay in float."""
    first_last: int | None = 8
    """Least bits of the first and the last layer; null: as the rest."""
    quantizer: str = "lsq"
    """Registered quantizer of weights, e.g. lsq, ste."""
    act_quantizer: str | None = None
    """Quantizer of activations; null: as of weights."""
    granularity: Literal["tensor", "channel", "block"] = "channel"
    """What shares a weight scale: tensor, channel or block."""
    block: int | None = None
    """Elements of a block, for granularity block."""
    range: Literal["minmax", "percentile", "mse"] = "mse"
    """How the first range is found: minmax, percentile or mse."""
    options: dict[str, Any] = {}
    """The method's own options, e.g. `sensitivity: fisher`."""
    output_bits: int = 8
    """Bits of the results named in `outputs`."""
    outputs: list[str] | Literal["auto"] = []
    """Patterns of layers and norms whose result is quantized too; auto: where integer convolutions need it."""
    rules: list[tuple[str, dict[str, Any] | None]] = []
    """Pairs [pattern, layer plan or null for float], which win over the method's choice."""

    @model_validator(mode="after")
    def _readable(self) -> PlanRules:
        from fewbits.errors import PlanError
        from fewbits.tasks.open_vocabulary.policy import parse_policy

        try:
            self.explicit_rules()
            if self.layer is not None:
                layer_plan(self.layer)
            if self.policy is not None:
                parse_policy(self.policy)
        except (PlanError, TypeError) as error:
            raise ValueError(str(error)) from error
        return self

    def explicit_rules(self) -> list[tuple[str, LayerPlan | None]]:
        """Return ``rules`` as a plan holds them. Raises PlanError for one that is no layer plan."""
        return [(pattern, None if layer is None else layer_plan(layer)) for pattern, layer in self.rules]


class Limits(Section):
    """What the packed model may cost, and what accuracy it must keep. Give one; uniform, sigma and some others take
    several."""

    size_mb: Positive | None = None
    """Millions of bytes of the packed tensors."""
    size_bytes: Count | None = None
    """The same limit in bytes."""
    average_bits: Positive | None = None
    """Mean bits of a weight."""
    bops: Positive | None = None
    """Bit operations of one image, or of one window of a text."""
    energy_uj: Positive | None = None
    """Microjoules of one image or window on `hardware`."""
    latency_ms: Positive | None = None
    """Milliseconds of one image or window on `hardware`."""
    hardware: str | None = None
    """Name or file of a hardware description."""
    accuracy: Percent | None = None
    """Least accuracy in percent (of tokens, for language), on the validation examples; needs `search`."""
    accuracy_drop: Percent | None = None
    """Points of accuracy that may be lost against `reference`; needs `search`."""
    reference: Literal["int8", "fp32"] | None = None
    """What accuracy_drop counts from: int8 (the trained model with 8 bits everywhere, also where null) or fp32."""


class Export(Section):
    """The ONNX file."""

    mode: Literal["fastest", "smallest"] = "fastest"
    """fastest (what integer engines run quickly) or smallest (narrowest weight types)."""
    time_float: bool = True
    """Export the float model too, and time it beside the quantized one."""
    threads: Count = 1
    """Threads of ONNX Runtime when it is timed."""
    align_biases: bool = True
    """Move the trained biases of convolutions to whole units of integer engines (mode `fastest`)."""
    min_agreement: Percent = 99.0
    """Percent of test images, or tokens, on which ONNX Runtime must give the packed answer."""


class Evaluate(Section):
    """Measuring and calibrating."""

    batch_size: Count = 256
    """Examples a batch."""
    calibration_examples: Count = 256
    """Training examples that set the ranges of activations."""
    group_examples: Count = 256
    """Training examples of each group that its importance is measured on, for plan.method fair."""
    groups: str | None = None
    """CSV file with the columns `image` (name of a file) and `group`: detection and segmentation then tell of each
    group of test images. Classification has its groups from its data."""
    guard_worst_group: NotNegativeFloat | None = None
    """Points of accuracy that any group may lose against float; where one loses more, the run fails at its end."""


class Smoke(Section):
    """What `--smoke` cuts the run down to, so that it ends in seconds anywhere. Its accuracy means nothing."""

    train_examples: Some = 160
    """Training examples."""
    test_examples: Some = 80
    """Test examples."""
    data: dict[str, Any] = {}
    """Options of the data that take the place of its own, e.g. a small `context`."""
    model: dict[str, Any] = {}
    """Options of the model that take the place of its own, e.g. few `layers`."""
    steps: Count = 4
    """Steps of each training."""
    time_float: bool = False
    """As of `export`; exporting takes most of a smoke run."""


class Recipe(Section):
    """A whole recipe."""

    name: str = ""
    """What the report calls the run; empty: the name of the file."""
    task: Literal["classification", "language", "segmentation", "detection", "open_vocabulary"] = "classification"
    """What the model does: classification, language (the next token of a text), segmentation (a class for each
    pixel), detection (boxes with classes), or open_vocabulary (boxes of what texts name)."""
    seed: NotNegative = 0
    """Seed of everything random."""
    data: Data
    """The examples."""
    model: Model
    """The float model."""
    segmentation: Segmentation | None = None
    """What a segmentation is trained on and measured by; null: its defaults."""
    open_vocabulary: OpenVocabulary | None = None
    """Texts and distillation of an open-vocabulary detector; null: its defaults."""
    float_training: Training | None = None
    """Training before quantization; null: none."""
    plan: PlanRules
    """Which layer is quantized how."""
    budget: Limits | None = None
    """What the packed model may cost; null: no limit."""
    search: SearchRules | None = None
    """Search the plan by training and measuring; null: decide it without."""
    qat: Training | None = None
    """Quantization-aware training; null: calibration only."""
    fusion: Fusion | None = None
    """Balance the branches of fusion nodes in qat; null: leave them plain."""
    curriculum: CurriculumRules | None = None
    """Quantize and train the parts of the model one after the other in qat; null: all at once."""
    fairness: Fairness | None = None
    """Train for the group that is served worst, too; null: for the mean alone."""
    learned_bits: LearnedBits | None = None
    """Train the widths of channels; null: they stay as planned."""
    alignment: Alignment | None = None
    """Align attention maps with the float model's in qat; null: train on the task alone."""
    from_scratch: bool = False
    """Begin quantization-aware training at the initial weights, not at those that `float_training` ended with."""
    export: Export | None = Export()
    """The ONNX file; null: none, for what has no ONNX form."""
    evaluate: Evaluate = Evaluate()
    """Measuring and calibrating."""
    smoke: Smoke = Smoke()
    """What `--smoke` cuts the run down to."""

    @model_validator(mode="after")
    def _plannable(self) -> Recipe:
        plan, limits = self.plan, self.budget is not None and self.budget.model_dump(exclude_none=True)
        if self.budget is not None and not limits:
            raise ValueError(f"a budget needs one of {sorted(Limits.model_fields)}, or leave it out")
        if plan.method == "uniform" and (plan.weight_bits is None) == (not limits):
            raise ValueError("plan.method uniform needs either plan.weight_bits or a budget, not both")
        given = plan.method in ("explicit", "file", "blocks", "policy")
        if given and limits:
            raise ValueError(f"plan.method {plan.method} takes no budget")
        if plan.method != "uniform" and not given and not limits:
            raise ValueError(f"plan.method {plan.method} needs a budget")
        if plan.method != "uniform" and plan.weight_bits is not None:
            raise ValueError(f"plan.weight_bits is for method uniform; {plan.method} chooses from plan.menu")
        if plan.method == "explicit" and not plan.rules:
            raise ValueError("plan.method explicit needs plan.rules")
        for method, key in (("file", "file"), ("blocks", "layer"), ("policy", "policy")):
            if (plan.method == method) == (getattr(plan, key) is None):
                raise ValueError(f"plan.{key} is for plan.method {method}: give both or neither")
        self._check_search()
        for section in ("segmentation", "open_vocabulary"):
            if getattr(self, section) is not None and self.task != section:
                raise ValueError(f"the section {section} is for that task, this is {self.task}")
        if self.from_scratch and self.qat is None:
            raise ValueError("from_scratch needs qat: without it nothing would be trained")
        for name in ("fairness", "learned_bits"):
            if getattr(self, name) is not None and (self.qat is None or self.search is not None):
                raise ValueError(f"{name} is for qat, without a search: add that section, or leave {name} out")
        if self.fairness is not None and (self.task != "classification" or self.alignment is not None):
            raise ValueError("fairness is for classification, and not together with alignment")
        if (self.learned_bits is not None) != (self.plan.quantizer == "learnable_bits"):
            raise ValueError("learned_bits and plan.quantizer learnable_bits need each other: give both or neither")
        if self.float_training is not None and self.float_training.quantizer_lr != 1:
            raise ValueError("float_training.quantizer_lr: a float model has no quantizers, leave it out")
        for other in ("fusion", "alignment", "learned_bits"):
            if self.curriculum is not None and getattr(self, other) is not None:
                raise ValueError(f"curriculum and {other} do not go together: drop one of them")
        for name in ("fusion", "alignment", "curriculum"):
            if getattr(self, name) is None:
                continue
            if self.qat is None:
                raise ValueError(f"{name} is for qat: add that section, or leave {name} out")
            if self.search is not None or self.from_scratch:
                other = "search" if self.search is not None else "from_scratch"
                raise ValueError(f"{name} and {other} do not go together: drop one of them")
        return self

    def _check_search(self) -> None:
        from fewbits.allocate import Budget
        from fewbits.allocate.problem import HOLD_ACCURACY
        from fewbits.errors import FewbitsError

        try:
            budget = None if self.budget is None else Budget(**self.budget.model_dump())
        except FewbitsError as error:
            raise ValueError(f"budget: {error}") from error
        if self.search is None:
            if budget is not None and budget.floors:
                raise ValueError(f"budget: {budget.floors} can only be held by a search: add a section 'search'")
            return
        if self.plan.method not in HOLD_ACCURACY:
            raise ValueError(f"search is for plan.method {' or '.join(sorted(HOLD_ACCURACY))}, got {self.plan.method}")
        if self.from_scratch:
            raise ValueError("from_scratch would throw away the weights that search trains: drop one of them")
        twice = sorted({*self.search.settings(), "seed"} & set(self.plan.options))
        if twice:
            raise ValueError(f"plan.options: {twice} belong into the section 'search', and seed beside it")

    def smoked(self) -> Recipe:
        """Return the recipe cut down to seconds; it may then use images that are not real."""
        smoke = self.smoke
        options = {**self.data.options, **smoke.data}
        few = {"train_examples": smoke.train_examples, "test_examples": smoke.test_examples, "stand_in": True}
        # an untrained model is full of near ties, which a runtime may break the other way
        quick = {"min_agreement": 0.0, "time_float": smoke.time_float}
        changes: dict[str, Any] = {
            "data": self.data.model_copy(update={**few, "options": options}),
            "model": self.model.model_copy(update={"options": {**self.model.options, **smoke.model}}),
            "evaluate": self.evaluate.model_copy(update={"calibration_examples": 32}),
            "export": None if self.export is None else self.export.model_copy(update=quick),
        }
        for name in ("float_training", "qat"):
            training = getattr(self, name)
            if training is not None:
                short = {"epochs": None, "max_steps": smoke.steps, "batch_size": min(16, training.batch_size)}
                often = {"log_every": 1, "checkpoint_every": 2, "warmup_steps": 0}
                changes[name] = training.model_copy(update=short | often)
        if self.fusion is not None:
            steps = min(self.fusion.finetune_steps, smoke.steps)
            changes["fusion"] = self.fusion.model_copy(update={"finetune_steps": steps})
        if self.search is not None:
            few_epochs = {"epochs_reference": 1, "epochs_cluster": 1, "epochs_refine": 1, "steps": 2, "rounds": 1}
            small = {"steps_per_epoch": smoke.steps, "batch_size": min(16, self.search.batch_size), "warmup_steps": 0}
            changes["search"] = self.search.model_copy(update=few_epochs | small)
        return self.model_copy(update=changes)
