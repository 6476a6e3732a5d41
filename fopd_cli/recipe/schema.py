"""Every key, its type, its default and its meaning."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_serializer,
    model_validator,
)

from fopd_cli.engines.registry import AUTO, SAMPLERS, TEACHERS, hands_over
from fopd_cli.freshness.policies import POLICIES, PolicyName
from fopd_cli.names import SET_NAME, SET_NAME_RULE, Advantage, DriftKind, LossKind, Support, TargetKind
from fopd_cli.recipe.contradictions import contradictions

# Bounds far beyond any run, so that nothing computed from a recipe overflows.
Positive = Annotated[int, Field(gt=0, le=10**9)]
NonNegative = Annotated[int, Field(ge=0, le=10**9)]
HowMany = Annotated[int, Field(gt=0, le=10**7)]  # prompts
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Processes = Annotated[int, Field(gt=0, le=1024)]  # or devices, or threads
Seconds = Annotated[float, Field(gt=0, le=1e8)]
Gigabytes = Annotated[float, Field(gt=0, le=1e6)]
Factor = Annotated[float, Field(ge=0, le=1e9)]
PositiveFactor = Annotated[float, Field(gt=0, le=1e9)]
Temperature = Annotated[float, Field(ge=0.01, le=100)]


def _greedy_or_warm(value: float) -> float:
    if 0 < value < 0.01:
        raise ValueError(f"{value} is neither 0 (greedy) nor at least 0.01")
    return value


EvalTemperature = Annotated[float, Field(ge=0, le=100), AfterValidator(_greedy_or_warm)]


def _named_sets(value: Any) -> Any:
    """A single source, or sources by name."""
    if isinstance(value, dict):
        if not value:
            raise ValueError("names no held-out set; give at least one, as in {gsm8k: gsm8k-test.jsonl}")
        for name in value:
            if not (isinstance(name, str) and SET_NAME.fullmatch(name)):
                raise ValueError(f"{name!r} cannot name a held-out set; {SET_NAME_RULE}")
    return value


HeldOut = Annotated[str | dict[str, str], BeforeValidator(_named_sets)]
ByName = str | dict[str, str] | None
Share = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["auto", "bf16", "fp32"]
Labels = Literal["cached", "current"]
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow", "swanlab"]
if TYPE_CHECKING:
    SamplerEngine: TypeAlias = str
    TeacherEngine: TypeAlias = str
else:  # those of the registry
    SamplerEngine, TeacherEngine = Literal[(AUTO, *SAMPLERS)], Literal[(AUTO, *TEACHERS)]

# With rho = pi_t/pi_r, a token with advantage A stops moving where lambda rho log rho = A (with quadratic
# drift: lambda log rho = A). Under A = -lambda/e, -7.4 nats at 20, it never does. Each is its estimator's
# best at lag 8 (docs/staleness-details.md): lower ones collapse, higher ones are slower.
ANCHORS = {"topk": 20.0, "exact": 20.0, "quadratic": 10.0, "sampled": 30.0}
PACE = 64.0  # optimizer steps: an anchor of 20 up to lag 3, of 8 at lag 8 (docs/staleness.md)


class Section(BaseModel):
    """Refuses unknown keys. The string under a field is its documentation."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        frozen=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


class Lora(Section):
    """Train low-rank adapters instead of all weights. Use about ten times the learning rate."""

    rank: Positive = 32
    """Rank of the adapters."""
    alpha: PositiveFactor = 64.0
    """Adapters are scaled by alpha / rank."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Which linear layers get an adapter: all except the output head (experts included), or those whose names
    end in one of these, for example [q_proj, v_proj].
    """
    router: bool = False
    """For mixtures of experts: whether the routers, which choose each token's experts, also get an
    adapter.
    """
    publish: Literal["merged", "adapter"] = "merged"
    """What samplers receive after each step: merged weights, or only the adapter (sampler.engine vllm; a
    hundredth of the bytes, but each token costs more).
    """


class Student(Section):
    model: str
    """Model directory or hub id of the student, which is trained; the run uses its tokenizer."""
    lora: Lora | None = None
    """Adapters (peft) over a frozen base; the trained student is exported merged. null: train all weights."""


GPU_MEMORY = 0.85  # the share that vLLM takes of a device of its own


class Vllm(Section):
    """Settings of engine vllm; other engines ignore them."""

    tensor_parallel: Processes = 1
    """Devices (on a CPU: processes) per replica; must divide the number of attention heads."""
    gpu_memory: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of a device's memory for weights and KV cache, unless kv_cache_gb is set (CUDA). Default: 0.85;
    under placement colocate, as much as all running requests can need, but at most what other roles leave.
    """
    kv_cache_gb: Gigabytes | None = None
    """KV cache per replica. Default: on CUDA, what gpu_memory leaves; on a CPU, as much as all running
    requests can need, but at most an eighth of the RAM.
    """
    eager: bool = False
    """No CUDA graphs and no compilation: starts faster, generates slower. Always the case on a CPU."""
    max_batched_tokens: Positive | None = None
    """Tokens per forward pass. Default: vLLM's own for a sampler; 2048 for a teacher, whose prompt log-probs
    take 8 bytes x vocabulary per token.
    """


class SamplerVllm(Vllm):
    prefix_caching: bool = True
    """Share the KV cache of prompts with a common prefix; it is dropped at every weight update."""


class Http(Section):
    """Settings of engine http; other engines ignore them."""

    url: str | None = None
    """Base URL of an OpenAI-compatible server that returns prompt log-probs for token ids (vLLM does), for
    example http://localhost:8000/v1.
    """
    api_key_env: str | None = None
    """Environment variable that holds the API key; null: the server needs none."""
    concurrency: Annotated[int, Field(gt=0, le=4096)] = 16
    """Requests in flight at once."""
    timeout_s: Seconds = 120.0
    """Timeout of one request."""
    retries: Annotated[int, Field(ge=0, le=20)] = 5
    """Retries after a refused connection, a timeout, or status 408, 429 or 5xx, with doubling pauses."""


class Teacher(Section):
    name: str = "teacher"
    """The name by which prompts choose this teacher, if there are several: teacher may be a list of these
    sections.
    """
    model: str
    """Model directory or hub id of the frozen teacher (engine http: the model's name on the server); its
    tokenizer must give the same ids.
    """
    engine: TeacherEngine = AUTO
    """What runs the teacher. transformers: hidden states, hence exact losses; vllm: the same if targets asks
    for them, else top-k or sampled log-probs; http: log-probs. auto: transformers for hidden states; for
    log-probs, vllm on CUDA if it is installed, else transformers.
    """
    vllm: Vllm = Vllm()
    http: Http = Http()
    targets: Literal["auto", TargetKind] = "auto"
    """What the teacher hands over: hidden states (exact losses), top-k log-probs, or one log-prob per token.
    auto: what loss.support needs.
    """
    k: Positive = 64
    """Tokens per position for topk targets."""
    dtype: Dtype = "auto"
    """Dtype of weights and hidden states; auto: bf16 on CUDA, fp32 on a CPU."""
    batch_samples: Positive = 16
    """Maximum samples per scoring call; the teacher never waits for a call to fill up."""
    micro_tokens: Positive = 16384
    """Tokens per forward pass."""
    packing: bool = True
    """Like learner.packing, for engine transformers."""
    buffer_gb: Gigabytes | None = None
    """Shared memory for the targets of all teachers; with several teachers the largest value counts. If it is
    full, the teacher waits. Default: the worst case of all samples in flight, but at most that of 4 batches
    and a quarter of the RAM, and at least that of 2 batches.
    """
    context: str | None = None
    """What the teacher reads instead of the question, and the student does not see: a template with
    {question} and any of the prompt's own columns, such as {answer} or {solution}. null: the question.
    """
    template: Literal["student", "teacher"] = "student"
    """Whose chat template and tokenizer frame the prompt when the teacher judges the response. teacher: its
    own, and plain text becomes a user message; only for single-turn tasks.
    """
    delay_ms: Annotated[float, Field(ge=0, le=1e7)] = 0.0
    """Sleep this long per scored sample, to simulate a slow teacher."""


class ArithmeticTask(Section):
    name: Literal["arithmetic"]
    """Generated arithmetic modulo 10, with the steps written out."""
    horizon: Annotated[int, Field(ge=1, le=64)] = 4
    """Dependent steps per question."""
    difficulty: Literal[1, 2, 3] = 2
    """1: sums; 2: also differences; 3: also products."""
    train_prompts: HowMany | None = None
    """Distinct training questions. Default: 20,000, or half of all possible questions if that is fewer."""
    eval_prompts: HowMany = 256
    """Distinct held-out questions, never trained on."""
    seed: Seed = 0
    """Seed of the questions, separate from the run's seed."""


class Prompts(Section):
    """Keys of all tasks whose prompts come from the user."""

    chat_template_kwargs: dict[str, Any] = {}
    """Variables for the chat template, wherever it is rendered, for example {enable_thinking: false}."""
    overlong: Literal["drop", "refuse"] = "drop"
    """Prompts that, with max_new_tokens, do not fit into a model's context: drop them (and say how many), or
    refuse to start.
    """


class Questions(Prompts):
    """How rows of a file become prompts."""

    question: str = "question"
    """Column of the question, a string or a list of chat messages; a.b for a nested column. A final assistant
    message is left out.
    """
    solution: str | None = None
    """Column of a reference solution, for teacher.context. Default: the final assistant message, if any."""
    eval_question: ByName = None
    """Column of the question in the held-out source, if its name differs; with several sources, optionally a
    mapping by source name.
    """
    teacher: str | None = None
    """Column that names each row's teacher, if there are several; null: the first teacher judges all rows."""
    template: str = "{question}"
    """Text sent to the student, with {question} replaced."""
    system: str | None = None
    """System message."""
    chat: bool = True
    """Whether to apply the tokenizer's chat template."""


class Graded(Questions):
    """Questions with an answer."""

    answer: str | None = "answer"
    """Column of the reference answer. null: there is none; nothing is graded, and evaluations report the KL
    to the teacher.
    """
    eval_answer: ByName = None
    """Column of the answer in the held-out source, if its name differs; with several sources, optionally a
    mapping by source name.
    """


class ChatTask(Questions):
    name: Literal["chat"]
    """Questions without answers to grade, for distillation only. Evaluations report the KL to the teacher."""
    train: str
    """File (jsonl, json, csv, parquet), a directory of such files, or hf:owner/name[@config][:split]."""
    eval: HeldOut | None = None
    """The same, for held-out questions, or several by name ({gsm8k: a.jsonl, own: b.jsonl}), each with its
    own metrics (see eval.follow). May be the training file, whose held-out questions are then not trained
    on. null: some of task.train, drawn by their text.
    """
    question: str = "messages"
    """Column of the question, a list of chat messages or a string; a.b for a nested column. A final assistant
    message is left out.
    """
    eval_prompts: HowMany | None = None
    """Number of held-out questions, of each set. Default: 256, but at most a tenth of the training file."""


class MathTask(Graded):
    name: Literal["math"]
    """Math questions graded by math-verify."""
    train: str
    """File (jsonl, json, csv, parquet), a directory of such files, or hf:owner/name[@config][:split]."""
    eval: HeldOut | None = None
    """The same, for held-out questions, or several by name ({gsm8k: a.jsonl, own: b.jsonl}), each with its
    own metrics (see eval.follow). May be the training file, whose held-out questions are then not trained
    on. null: some of task.train, drawn by their text.
    """
    eval_prompts: HowMany | None = None
    """Number of held-out questions, of each set. Default: 256, but at most a tenth of the training file."""


class ToolTask(Graded):
    name: Literal["tool"]
    """Questions answered over several turns with a sandboxed Python interpreter."""
    train: str | None = None
    """As in the math task; null for both train and eval: generated calculations."""
    eval: HeldOut | None = None
    """The same, for held-out questions, or several by name. null, with a training file: some of its
    questions, drawn by their text.
    """
    notation: Literal["code", "native"] = "code"
    """How the student writes calls: code blocks fenced as ```python, or the chat template's own tool
    calls.
    """
    max_calls: NonNegative = 6
    """Maximum calls per episode."""
    max_turns: Positive = 10
    """Maximum turns of the student per episode. All turns and observations together also stay within
    sampler.max_new_tokens.
    """
    observation_chars: Positive = 2000
    """Maximum characters of a call's output; longer output loses its middle."""
    wall_s: Seconds = 10.0
    """A call is stopped after this time."""
    memory_mb: Positive = 512
    """Memory limit of an episode's interpreter and everything that it starts."""
    sandbox: Literal["bubblewrap", "none"] = "bubblewrap"
    """none runs the model's code with your rights, on your files and network."""
    digits: Annotated[int, Field(ge=1, le=9)] = 2
    """Digits of the numbers in generated questions."""
    terms: Annotated[int, Field(ge=2, le=9)] = 3
    """Numbers per generated question."""
    train_prompts: HowMany = 20_000
    """Distinct generated training questions."""
    eval_prompts: HowMany | None = None
    """Number of held-out questions, of each set. Default: 256, but at most a tenth of the training file."""
    seed: Seed = 0
    """Seed of generated questions, separate from the run's seed."""
    drift: Share = 0.0
    """Probability, per version of the student, that the tool's answers to a training question change: a
    changing world, for studies of supervision drift.
    """


class SweTask(Prompts):
    name: Literal["swe"]
    """A coding agent that fixes repositories with bash, on mini-SWE-agent's scaffold."""
    train: str | None = None
    """Instances with SWE-bench's columns; sources as in the math task. null for both train and eval:
    generated repositories.
    """
    eval: HeldOut | None = None
    """The same, held out, or several by name; may be the training file, whose held-out instances are then
    not trained on. null, with a training file: some of its instances, drawn by their ids.
    """
    scaffold: str = "swebench_backticks"
    """Prompts and formats: a configuration that ships with mini-swe-agent, or a YAML file like it."""
    notation: Literal["code", "native"] = "code"
    """How the student writes calls: a fenced block (scaffold swebench_backticks), or the chat template's own
    tool calls (scaffold swebench).
    """
    max_turns: Positive = 50
    """Maximum turns of the student per episode. All turns and observations together also stay within
    sampler.max_new_tokens.
    """
    chat: bool = True
    """Whether to apply the tokenizer's chat template."""
    sandbox: Literal["bubblewrap", "docker", "podman", "none"] = "bubblewrap"
    """Where commands and tests run: in bubblewrap on this machine, or in the instance's container (not yet
    run by us). none runs the model's code with your rights, on your files and network.
    """
    wall_s: Seconds = 60.0
    """A command is stopped after this time."""
    test_wall_s: Seconds = 1800.0
    """An instance's tests are stopped after this time."""
    memory_mb: Positive = 2048
    """Memory limit of a command and everything that it starts."""
    grader: Literal["tests", "swebench"] = "tests"
    """What decides whether a patch resolves the instance: its tests in the same sandbox, or the official
    harness (package swebench and Docker; not yet run by us).
    """
    train_prompts: HowMany = 20_000
    """Generated training instances."""
    eval_prompts: HowMany | None = None
    """Number of held-out instances, of each set. Default: 256, but at most a tenth of the training file."""
    seed: Seed = 0
    """Seed of generated instances, separate from the run's seed."""


class PluginTask(Prompts):
    name: str
    """Import path of your own task, package.module:Class (see fopd_cli/tasks/base.py)."""
    options: dict[str, Any] = {}
    """Keyword arguments of the class. Values that name files, and those of keys that end in path, file,
    folder or dir, are looked up next to the recipe first.
    """
    path: str | None = None
    """Folder in which its module is looked up first. Default: the recipe's folder, or else the current one,
    if the module is there.
    """
    chat: bool | None = None
    """false: plain-text prompts are used unchanged, without the chat template. null: the same, but doctor
    asks whether you meant that.
    """

    @model_validator(mode="before")
    @classmethod
    def _looks_like_an_import_path(cls, values: Any) -> Any:
        name = values.get("name") if isinstance(values, dict) else None
        # only the name is reported: the keys cannot be checked without it
        if isinstance(name, str) and ":" not in name:
            near = difflib.get_close_matches(name, BUILT_IN_TASKS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(BUILT_IN_TASKS)}"
            raise ValueError(
                f"task.name: there is no task {name!r}; {hint} (a task of your own: package.module:Class)"
            )
        return values


BUILT_IN_TASKS: dict[str, type[Section]] = {
    "arithmetic": ArithmeticTask,
    "chat": ChatTask,
    "math": MathTask,
    "swe": SweTask,
    "tool": ToolTask,
}


def _task_tag(value: Any) -> str:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return name if isinstance(name, str) and name in BUILT_IN_TASKS else "plugin"


Task = Annotated[
    Annotated[ArithmeticTask, Tag("arithmetic")]
    | Annotated[ChatTask, Tag("chat")]
    | Annotated[MathTask, Tag("math")]
    | Annotated[SweTask, Tag("swe")]
    | Annotated[ToolTask, Tag("tool")]
    | Annotated[PluginTask, Tag("plugin")],
    Discriminator(_task_tag),
]


class Sampler(Section):
    engine: SamplerEngine = AUTO
    """Engine that generates. auto: vllm on CUDA if it is installed and supports the student, else
    transformers; the choice is printed at the start and recorded in the run's recipe.yaml.
    """
    vllm: SamplerVllm = SamplerVllm()
    temperature: Temperature = 1.0
    """T of the behavior policy pi_T; behavior log-probs and drift are at this temperature. The loss may
    compare others: full and topk support compare pi_1 with p_1; sampled and mc support compare pi_T with the
    teacher at loss.teacher_temperature.
    """
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling; below 1, drift is off by about (1 - kept mass)^2 / 2, which the noise floor
    subtracts.
    """
    max_new_tokens: Positive = 512
    """Responses are cut off at this length (and recorded as truncated)."""
    samples_per_prompt: Positive = 1
    """Responses to each prompt."""
    concurrency: Positive = 64
    """Running requests per replica."""
    prefill_tokens: Positive = 16384
    """Engine transformers: maximum tokens per forward pass (though one per running request are always
    computed together). Prompts, and all running requests after an update, are computed in chunks of this
    size.
    """
    dtype: Dtype = "auto"
    """Dtype of the weights; auto: bf16 on CUDA, fp32 on a CPU."""


class Learner(Section):
    steps: Positive = 400
    """Optimizer steps."""
    batch_samples: Positive = 64
    """Samples per optimizer step, the batch size."""
    micro_tokens: Positive = 16384
    """Tokens per forward-backward pass on each rank; changes memory and speed, not the loss."""
    packing: bool = True
    """Put samples end to end in one row, each with its own attention; false pads them to a rectangle.
    Architectures that cannot be packed are refused.
    """
    lr: PositiveFactor = 1e-6
    """Peak learning rate."""
    warmup_steps: NonNegative = 10
    """Linear warm-up."""
    decay: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up, down to min_lr_ratio in the very last step. Resuming with more steps
    stretches the rest of the decay, so the rate goes up again.
    """
    min_lr_ratio: Share = 0.1
    """Where the decay ends, relative to lr."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: Factor = 0.0
    """AdamW's weight decay."""
    clip: Factor = 1.0
    """Maximum gradient norm; 0: no clipping."""
    dtype: Dtype = "auto"
    """Dtype of the computation; master weights are always fp32. auto: bf16 on CUDA, fp32 on a CPU."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, but about a third more time."""
    compile: bool = False
    """Use torch.compile for each block, and for the loss on full support: a minute longer to start, then
    faster. Not yet run on a GPU.
    """
    offload: bool = False
    """Keep master weights, gradients and optimizer states in pinned host memory, and run the optimizer there
    (FSDP2's CPU offload): 16 bytes per parameter less on the devices, but slower. Not yet run on a GPU.
    """
    optimizer_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of AdamW's two states between steps; bf16 saves 4 bytes per parameter, but rounds them."""


class Loss(Section):
    kind: LossKind = "reverse_kl"
    """forward_kl: KL(teacher||student); reverse_kl: KL(student||teacher); jsd: between them, see beta."""
    support: Literal["auto", Support] = "auto"
    """full: the whole vocabulary (exact). topk: the teacher's top-k and a tail class. sampled: only the
    sampled token (policy gradient). mc: several draws per position. auto: full if all teachers provide hidden
    states, else topk. If sampler.temperature T is not 1, full and topk converge to the teacher, pi_1 = p_1;
    sampled and mc converge to pi_T = p_1, a student that at temperature 1 is p_1 to the power of T (see
    teacher_temperature).
    """
    beta: Share = 0.5
    """For jsd, in TRL's convention: 0 is forward_kl, 1 is reverse_kl."""
    temperature: Temperature = 1.0
    """Temperature of both distributions in the divergence of full support. It changes how the gradient weighs
    the vocabulary, not where training converges. Other supports have none: leave it at 1.
    """
    teacher_temperature: Literal["one", "sampler"] = "one"
    """Temperature of the teacher in sampled and mc support. one: the student, sampled at sampler.temperature,
    becomes the teacher's own distribution. sampler: the student becomes the teacher at every temperature;
    needs hidden states (teacher.targets hidden).
    """
    tail: bool = True
    """The tail class of topk support. Without it the student can hide mass, so false is refused."""
    advantage: Advantage = "recomputed"
    """For sampled support: log p - log pi, with pi at sampling time (cached) or now (recomputed)."""
    importance: bool | Literal["auto"] = "auto"
    """For sampled support: multiply by pi_now/pi_sampled. mc support always does so. auto: where
    freshness.pace weakens the anchor, which needs it.
    """
    student_k: NonNegative = 0
    """For topk support: how many of the k classes are the student's own likeliest tokens; the others are the
    teacher's. Needs teacher.engine transformers.
    """
    max_ratio: PositiveFactor | None = None
    """For sampled (with importance) and mc support: cap on pi_now/pi_sampled. Less variance, some bias. null:
    no cap.
    """
    draws: Annotated[int, Field(gt=0, le=1024)] = 8
    """For mc support: tokens drawn from the behavior policy at every position, with replacement; the first is
    the response's own.
    """
    average: Literal["sample", "token"] = "sample"
    """Whether every sample counts the same (the paper's mean over i), or every token."""
    chunk_mb: Positive | None = None
    """Size of the largest [positions, vocab] float32 tensor, of which there are three; changes memory and
    speed, not the loss. Default: 64 on a CPU, 512 on CUDA, more for a wide student (a quarter of its head).
    """


class Schedule(Section):
    max_lag: NonNegative = 4
    """Maximum lag in optimizer steps, enforced by admission; 0 is synchronous."""
    lag: NonNegative | None = None
    """A fixed lag instead, for studies; max_lag is then ignored."""
    inflight: Literal["keep", "wait", "keep_stale_kv"] = "keep"
    """When samplers load new weights: in the middle of rollouts, which continue with the new version and
    recompute all keys and values (keep), or between rollouts (wait). keep_stale_kv: like keep, but without
    recomputing; after an update, tokens come from a policy that is neither version, and its log-probs are
    recorded.
    """


class Refresh(Section):
    mean: Share = 0.1
    """kappa_f: refresh when the batch's mean freshness is at or below this. In our sweep, refreshing never,
    once, or every 25 of 200 steps gave about the same result; refreshing often costs throughput.
    """
    coverage_roll: Share = 0.5
    """kappa_roll: also refresh when the batch's mean rollout coverage is below this."""
    coverage_sup: Share = 0.5
    """kappa_sup: also refresh when the batch's mean supervision coverage is below this. Samples that were not
    reexecuted count as covered, so it acts only above 1 - reexecute.share. In our sweep, 0, 0.9 once and 0.9
    often gave about the same result.
    """
    every_at_least: Positive = 200
    """Minimum number of optimizer steps between two adaptive refreshes."""
    every: Positive = 10
    """Optimizer steps between two refreshes of policy fixed_refresh."""


class Reexecute(Section):
    """Run the calls of lagging samples again, to see what they would read today. Only for multi-turn tasks;
    the contexts of other tasks cannot change."""

    share: Share = 0.125
    """At most this share of a batch has its calls run again before an optimizer step, oldest context first,
    and the teacher judges what changed. With cached labels this happens during the previous step, and costs
    almost nothing. 0: D_sup is assumed to be 0. Policies without freshness weights reexecute only for labels:
    current.
    """
    min_lag: Positive = 1
    """Reexecute only contexts that are at least this many optimizer steps old."""
    labels: Labels = "cached"
    """What a reexecuted sample teaches. cached: what the teacher said when both had read the same context,
    weighted by freshness. current, as published: what the teacher says in the current context, which the
    student has not read; the step waits for it.
    """


class Freshness(Section):
    policy: PolicyName = "fopd"
    """Which row of the paper's tables to run. trust is ours: it leaves out tokens that the student has
    already moved far enough (docs/staleness.md).
    """
    alpha: Factor = 1.0
    """Weight of sqrt(D_roll) in the score. 0 to 3 made no difference in our sweep; 10 slowed learning."""
    beta: Factor = 1.0
    """Weight of sqrt(D_sup) in the score. 10 instead of 1 made no difference in our sweep."""
    xi: Factor = 0.05
    """Gate: w = relu(f - xi). Must be less than 1/(max_lag + 1). In our sweep, a tenth to four fifths of that
    made no difference; 0 was worse.
    """
    anchor: Factor | Literal["auto"] = "auto"
    """lambda: weight of the rollout anchor, relative to the loss. auto: for losses from sampled tokens
    (sampled, mc), 20 with drift topk or exact, 10 with quadratic, 30 with sampled; 0 for exact losses, which
    an anchor only slows down (docs/staleness.md).
    """
    pace: PositiveFactor | Literal["auto"] | None = "auto"
    """In optimizer steps: a sample that lags by tau is anchored by pace/tau (at most anchor, at least 1), so
    that the student may move as fast at a long lag as at a short one. auto: 64, hence anchor as it is (20)
    up to lag 3, for policy gradients (sampled, mc) with drift topk or exact; else null. null: by anchor at
    every lag. It takes about so many steps to reach the teacher, so a run of under a hundred may need a lower
    one (docs/staleness.md).
    """
    drift: Literal["auto", DriftKind] = "auto"
    """Estimator of D_roll: from the sampled token (sampled is unbiased; quadratic pulls harder as an anchor),
    from the sampler's top-k and a tail (topk), or from the whole vocabulary (exact). auto: topk if there is
    an anchor (quadratic with sampler.top_p), else sampled, which is free.
    """
    drift_k: Positive = 32
    """k of drift topk. As an anchor, 1 collapsed in our sweep, 2 fell behind, 8 and more held."""
    max_drift: Annotated[float, Field(gt=0)] | None = 0.01
    """For policy fopd: sampling runs as many steps ahead as keep the drift of lagging samples under this
    (D_roll, nats per token), from none to schedule.max_lag. Ours, not the paper's. null: always up to
    schedule.max_lag. Ignored with a fixed schedule.lag.
    """
    weights: Literal["raw", "normalized"] = "normalized"
    """normalized: divide by the batch's mean weight, so that lag does not shrink the step and only
    differences between samples count. raw is the paper's: in our benchmark it cost exact losses 2% of the
    score, because AdamW remembers the larger gradients of the first, fresh batches.
    """
    step_scale: Literal["none", "freshness"] = "none"
    """freshness: multiply the learning rate by the batch's mean weight (AdamW cancels a common factor in the
    loss). Saves runs without an anchor; slows down runs with one.
    """
    trust: PositiveFactor = 0.2
    """For policy trust: a token stops teaching once its log-prob has moved this many nats in the direction of
    its advantage since it was sampled. 0.1 and 0.2 held at lag 8, 0.3 fell behind, 1 collapsed.
    """
    refresh: Refresh = Refresh()
    reexecute: Reexecute = Reexecute()


class Eval(Section):
    every: NonNegative = 0
    """Optimizer steps between evaluations; 0: only before the first step and after the last."""
    samples: Positive = 1
    """Responses to each held-out prompt (mean@k)."""
    training: bool = True
    """Whether training samples are graded, too. The grades do not affect training, and the swe task runs an
    instance's tests for each sample.
    """
    temperature: EvalTemperature | None = None
    """Temperature of evaluations; 0 is greedy. Default: the sampler's."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """top-p of evaluations. Default: the sampler's."""
    max_new_tokens: Positive | None = None
    """Maximum response length in evaluations. Default: the sampler's."""

    follow: str | None = None
    """Which of several held-out sets (task.eval) is the run's main one: keep_best, patience and every summary
    use its score and KL. null: the first.
    """
    keep_best: Literal["score", "kl"] | None = None
    """Keep the student of the best evaluation, by its score or by its KL to the teacher. At the end, student/
    holds it, and summary.json names its step. null: keep the last one.
    """
    patience: NonNegative = 0
    """With keep_best: end the run after this many evaluations in a row without a new best; 0: never."""


class Checkpoint(Section):
    every: NonNegative = 100
    """Optimizer steps between checkpoints; 0: do not count steps."""
    minutes: Factor = 15.0
    """Also after this many minutes since the last one, checked after each step; 0: do not count time. There
    is always one at the end, and at Ctrl-C or SIGTERM.
    """
    keep: Positive = 2
    """How many of the newest checkpoints are kept."""
    asynchronous: bool = True
    """The learner copies its state to main memory and trains on while the copy is written. false: it waits
    for the disk, and needs no memory for a copy (up to 12 bytes per trained parameter, over all ranks).
    """

    @property
    def staged(self) -> bool:
        """Whether the learner ever keeps such a copy; the last save of a run needs none."""
        return self.asynchronous and (self.every > 0 or self.minutes > 0)


class Threads(Section):
    """Default: all cores for the role whose turn it is (max_lag 0, time-slicing). Where roles run side by
    side on a CPU, cores are divided among those that are computing; with a fixed lag, or with CUDA, equally.
    """

    sampler: Processes | None = None
    """CPU threads of each sampler."""
    teacher: Processes | None = None
    """CPU threads of each teacher rank."""
    learner: Processes | None = None
    """CPU threads of each learner rank."""


class Placement(Section):
    mode: Literal["auto", "cpu", "timeslice", "partition", "colocate"] = "auto"
    """partition: each role has its own devices. colocate: all roles stay on all devices at once; vLLM gets
    the rest of the memory. timeslice: all roles take turns on all devices. cpu: no CUDA. auto: by the number
    of CUDA devices (0: cpu; 1 or 2: colocate if, by arithmetic, a device holds all roles, else timeslice;
    more: partition, or timeslice if no split fits).
    """
    sampler: Processes | None = None
    """Devices (on a CPU: processes) for samplers. Default: half the devices, or fewer where by arithmetic the
    other roles do not fit on the rest; on a CPU 1.
    """
    teacher: Processes | None = None
    """Devices (on a CPU: ranks) for the teacher. Default: a quarter, or what fits; on a CPU 1."""
    learner: Processes | None = None
    """Devices (on a CPU: ranks) for the learner. Default: the rest; on a CPU 1."""
    transport: Literal["auto", "shared", "broadcast", "ipc"] = "auto"
    """How new weights get from the learner to the samplers. shared: through shared memory of the host; works
    everywhere. broadcast: packed, from the learner's device to the samplers' over NCCL (on a CPU gloo), where
    these are different devices. ipc: the sampler copies from the learner's memory on the same device
    (colocate). Both save the way through the host, and keep two copies of the weights in the samplers' dtype
    on the learner's device. auto: shared; broadcast has not met a GPU yet, and ipc has not been timed on one.
    """
    overlap_turns: bool = True
    """timeslice: where by arithmetic a device holds both, the next role wakes while the last one falls
    asleep. false: it always waits until the last one sleeps, should a role run out of memory as it wakes.
    """
    threads: Threads = Threads()


class Runtime(Section):
    timeout_s: Seconds = 900.0
    """A worker that has work but makes no progress for this long is stopped and named."""
    start_timeout_s: Seconds = 1800.0
    """The same while a worker loads its model, counted from its first sign of life; downloads come before."""
    restarts: NonNegative = 2
    """How often each sampler, teacher, grader or environment is restarted after it dies or hangs. A learner
    is not restarted: resume the run.
    """


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, dict | Teacher) else value


class Recipe(Section):
    model_config = ConfigDict(serialize_by_alias=True)

    student: Student
    teachers: Annotated[
        tuple[Teacher, ...], BeforeValidator(_as_list), Field(alias="teacher", min_length=1, max_length=64)
    ]
    task: Task
    sampler: Sampler = Sampler()
    learner: Learner = Learner()
    loss: Loss = Loss()
    schedule: Schedule = Schedule()
    freshness: Freshness = Freshness()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    placement: Placement = Placement()
    runtime: Runtime = Runtime()
    track: tuple[Tracker, ...] = ("tensorboard",)
    """Where curves go, besides metrics.jsonl. All but tensorboard are services with their own package and
    their own variables (WANDB_PROJECT, MLFLOW_TRACKING_URI, ...). A service that is down never stops a run.
    """
    seed: Seed = 0
    """Seed of everything random: the order of prompts, and every sampled token."""

    @property
    def max_lag(self) -> int:
        return self.schedule.max_lag if self.schedule.lag is None else self.schedule.lag

    @property
    def max_drift(self) -> float | None:
        """freshness.max_drift if the policy and the schedule use it, else None."""
        follows = POLICIES[self.freshness.policy].ahead and self.schedule.lag is None
        return self.freshness.max_drift if follows else None

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Variables of the chat template."""
        return dict(getattr(self.task, "chat_template_kwargs", {}))

    @property
    def anchor(self) -> float:
        """lambda: 0 where the policy does not anchor, else freshness.anchor, resolved."""
        if not POLICIES[self.freshness.policy].anchor:
            return 0.0
        if self.freshness.anchor != "auto":
            return self.freshness.anchor
        return ANCHORS[self._anchors_drift] if self.support in ("sampled", "mc") else 0.0

    @property
    def pace(self) -> float | None:
        """freshness.pace, resolved: null, too, where no lag is long enough for it to weaken the anchor."""
        pace = self.freshness.pace
        if pace == "auto":
            # At a low lambda, a policy gradient without the ratio has no optimum.
            rests = self.support == "mc" or (self.support == "sampled" and self.loss.importance is not False)
            pace = PACE if rests and self.drift in ("topk", "exact") else None
        return pace if pace is not None and pace < self.anchor * self.max_lag else None

    @property
    def importance(self) -> bool:
        """loss.importance, resolved."""
        if self.loss.importance != "auto":
            return self.loss.importance
        return self.support == "sampled" and self.pace is not None

    @property
    def drift(self) -> DriftKind:
        """freshness.drift, resolved."""
        return "sampled" if self.freshness.drift == "auto" and self.anchor == 0 else self._anchors_drift

    @property
    def _anchors_drift(self) -> DriftKind:
        if self.freshness.drift != "auto":
            return self.freshness.drift
        return "topk" if self.sampler.top_p == 1 else "quadratic"

    @property
    def support(self) -> Support:
        """loss.support, resolved: exact if all teachers provide hidden states."""
        if self.loss.support != "auto":
            return self.loss.support
        exact = all(hands_over("hidden", t) and t.targets in ("auto", "hidden") for t in self.teachers)
        return "full" if exact else "topk"

    @property
    def targets(self) -> TargetKind:
        """What the teachers hand over, resolved; all hand over the same."""
        chosen = self.teachers[0].targets
        if chosen != "auto":
            return chosen
        support = self.support
        if support == "full" or support == "mc" or self.loss.teacher_temperature == "sampler":
            return "hidden"
        return support

    @field_serializer("teachers", mode="wrap")
    def _one_teacher_is_no_list(self, value: Any, handler: Any) -> Any:
        dumped = handler(value)
        return dumped[0] if len(dumped) == 1 else dumped

    @model_validator(mode="after")
    def _contradictions(self) -> Recipe:
        for problem in contradictions(self):
            raise ValueError(problem)
        return self
