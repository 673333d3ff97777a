"""Combinations of settings, and the seed page's snippets."""

from __future__ import annotations

from pathlib import Path

import pytest

from onstream.settings.load import load_settings, resolve
from onstream.settings.rules import warnings_of

SNIPPETS = sorted((Path(__file__).parent.parent / "seed_page").glob("*.toml"))
NAMED = ["deployment.num_teacher_gpus=1", "teacher_inference.model.name=big"]
TEACHER = [*NAMED, "trainer.loss.teacher_tau=1"]
ENDPOINT = [
    "orchestrator.teacher_model.client.base_url=http://a/v1",
    "orchestrator.teacher_model.model.name=big",
]
HARD = [
    "trainer.loss.type=sft",
    "orchestrator.use_token_client=false",
    "orchestrator.teacher_rollout_model.client.base_url=http://a/v1",
    "orchestrator.teacher_rollout_model.model.name=big",
]
JUDGE = [
    "task.scorer=judge",
    "orchestrator.judge_model.rubric=Is it right?",
    "orchestrator.judge_model.client.base_url=http://a/v1",
    "orchestrator.judge_model.model.name=wise",
]
UNVERIFIED = "orchestrator.verification.enabled=false"
NCCL = ["weights.transport=nccl", "deployment.device=cuda", "inference.engine=vllm"]
STAGES = "deployment.stages={}".format

EPISODES = ["task.environment=sort-turns"]

REFUSED = [
    # A judge.
    (
        ["task.scorer=judge"],
        'task.scorer = "judge"',
        "expected a judge: orchestrator.judge_model, with a rubric, a model.name and a client.",
    ),
    (
        JUDGE[1:],
        'orchestrator.judge_model.model.name = "wise"',
        'expected the scorer "judge", which alone asks a judge',
    ),
    (
        [*JUDGE, "orchestrator.judge_model.rubric="],
        'orchestrator.judge_model.rubric = ""',
        "expected what makes an answer good, in words",
    ),
    (
        [*JUDGE, "orchestrator.judge_model.model.name="],
        'orchestrator.judge_model.model.name = ""',
        "Set orchestrator.judge_model.model.name as its /models lists it",
    ),
    # Episodes.
    (
        [*EPISODES, "orchestrator.verification.enabled=true"],
        'task.environment = "sort-turns" with orchestrator.verification.enabled = true',
        "expected no verifier: an environment gives the reward itself",
    ),
    (
        [*EPISODES, *TEACHER, "task.teacher_prompt.system=You know."],
        'task.environment = "sort-turns" with task.teacher_prompt.system = "You know."',
        "it reads an episode as it was played",
    ),
    ([*EPISODES, "task.scorer=math"], 'with task.scorer = "math"', "expected no scorer"),
    (
        [*EPISODES, "eval.swap_images=true"],
        'task.environment = "sort-turns" with eval.swap_images = true',
        "expected no swapped images: episodes show none",
    ),
    (
        [*EPISODES, *HARD],
        'orchestrator.teacher_rollout_model.model.name = "big"',
        "expected a student that writes the turns of its episodes itself",
    ),
    # Sizes.
    (
        ["redis.max_memory=64", "orchestrator.batch_size=8192"],
        "redis.max_memory = 64",
        "expected room for 376.2 MB of records: 24,576 rollouts may be under way, each of up to "
        "11.8 kB. Set redis.max_memory = 1024, which it is where it is left out, or lower",
    ),
    (
        ["redis.max_memory=512", "orchestrator.batch_size=8192", "weights.transport=redis"],
        "redis.max_memory = 512 with weights.max_share = 0.5",
        "expected room for 376.2 MB of records",
    ),
    # The teacher.
    (
        ["trainer.loss.teacher_tau=0.5"],
        "deployment.num_teacher_gpus = unset",
        "expected a teacher. Set deployment.num_teacher_gpus = 1",
    ),
    (
        [*ENDPOINT, "trainer.loss.teacher_tau=1", "teacher_inference.model.name=other"],
        'orchestrator.teacher_model.model.name = "big" with teacher_inference.model.name = "other"',
        "expected one teacher",
    ),
    (
        [*ENDPOINT, "trainer.loss.teacher_tau=1", "deployment.num_teacher_gpus=1"],
        'orchestrator.teacher_model.model.name = "big" with model.name = "Qwen/Qwen3-0.6B" '
        "with deployment.num_teacher_gpus = 1",
        "expected one teacher",
    ),
    (
        [ENDPOINT[0], "trainer.loss.teacher_tau=1"],
        'orchestrator.teacher_model.model.name = ""',
        "the model's name at the endpoint",
    ),
    (
        [ENDPOINT[1], "trainer.loss.teacher_tau=1"],
        "orchestrator.teacher_model.client.base_url = []",
        "the address of an endpoint",
    ),
    (
        [
            "orchestrator.teacher_model.client.base_url=teacher:8000",
            ENDPOINT[1],
            "trainer.loss.teacher_tau=1",
        ],
        "orchestrator.teacher_model.client.base_url[0] = teacher:8000",
        "text to match pattern '^https?://",
    ),
    # A prompt for the teacher alone.
    (
        ["task.teacher_prompt.system=Think."],
        'task.teacher_prompt.system = "Think."',
        "a teacher that reads it",
    ),
    (
        [*TEACHER, "task.name=colour-words", "task.teacher_prompt.template={prompt} {answer}"],
        'task.name = "colour-words" with task.teacher_prompt.template = "{prompt} {answer}"',
        "a task without images",
    ),
    (
        [*TEACHER, "task.teacher_prompt.template={prompt} \\boxed{}"],
        "task.teacher_prompt.template = {prompt} \\boxed{}",
        "a name in braces, which {} is not; braces that are part of the text are written twice",
    ),
    (
        [*TEACHER, "task.teacher_prompt.template={prompt!r}"],
        "task.teacher_prompt.template = {prompt!r}",
        "a name in braces, which {prompt!r} is not",
    ),
    (
        [*TEACHER, "task.teacher_prompt.template={prompt"],
        "task.teacher_prompt.template = {prompt",
        "every brace closed",
    ),
    (
        [*TEACHER, 'task.teacher_prompt.examples=[{"prompt": "a"}]'],
        "task.teacher_prompt.examples[0] = ",
        "a table with `prompt` and `answer`",
    ),
    # Rewards.
    (
        [UNVERIFIED],
        "orchestrator.verification.enabled = false with trainer.loss.adv_tau = 1.0",
        "rewards for the advantage",
    ),
    (
        [*TEACHER, UNVERIFIED],
        "orchestrator.verification.enabled = false with trainer.loss.adv_tau = 1.0",
        "rewards for the advantage",
    ),
    (
        ["orchestrator.group_size=1"],
        "orchestrator.group_size = 1 with trainer.loss.adv_tau = 1.0",
        "at least 2 rollouts a group",
    ),
    (
        ["trainer.loss.adv_tau=0"],
        "trainer.loss.teacher_tau = 0.0 with trainer.loss.adv_tau = 0.0",
        "a teacher or rewards",
    ),
    ([STAGES('["generate", "train"]')], "deployment.stages = ", "a teacher or rewards"),
    # Hard distillation.
    (
        ["trainer.loss.type=sft"],
        "orchestrator.teacher_rollout_model.model.name = unset",
        "a teacher whose completions are trained on",
    ),
    (
        HARD[1:],
        'orchestrator.teacher_rollout_model.model.name = "big" with trainer.loss.type = "rl"',
        'the loss "sft"',
    ),
    (
        [*HARD, "trainer.loss.teacher_tau=0.5"],
        'trainer.loss.type = "sft" with trainer.loss.teacher_tau = 0.5',
        'expected trainer.loss.teacher_tau only where trainer.loss.type is "rl"',
    ),
    (
        [*HARD, "deployment.num_teacher_gpus=1"],
        "deployment.num_teacher_gpus = 1",
        "no teacher that scores tokens",
    ),
    (
        [*HARD, *ENDPOINT],
        'orchestrator.teacher_model.model.name = "big"',
        "no teacher that scores tokens",
    ),
    (
        [*HARD, "orchestrator.use_token_client=true"],
        "orchestrator.use_token_client = true",
        "chat messages with a teacher_rollout_model",
    ),
    (["orchestrator.use_token_client=false"], "orchestrator.use_token_client = false", "token ids"),
    (
        [*HARD[:3]],
        'orchestrator.teacher_rollout_model.model.name = ""',
        "the model's name at the endpoint",
    ),
    (
        [*HARD[:2], HARD[3]],
        "orchestrator.teacher_rollout_model.client.base_url = []",
        "the address of an endpoint for the generator",
    ),
    (
        [*HARD, "orchestrator.teacher_rollout_model.keep=verified", UNVERIFIED],
        'keep = "verified"',
        "verification, to know which",
    ),
    ([*TEACHER, "trainer.lora.dropout=0.1"], "trainer.lora.dropout = 0.1", "no dropout with rl"),
    *(
        (
            [*TEACHER, "trainer.optim.type=muon", f"trainer.optim.states={states}"],
            f'trainer.optim.type = "muon" with trainer.optim.states = "{states}"',
            'Leave trainer.optim.states out, or set trainer.optim.type = "adamw".',
        )
        for states in ("host", "8bit")
    ),
    # The teacher's server.
    (
        [
            *TEACHER,
            'teacher_inference.extra_args=["--max-num-seqs", "8", "--tensor_parallel_size=2"]',
        ],
        "teacher_inference.extra_args",
        "no --tensor-parallel-size, which follows from deployment.num_teacher_gpus",
    ),
    (
        [*TEACHER, 'teacher_inference.extra_args=["--port", "80"]'],
        '"--port"',
        "no --port, which onstream up chooses",
    ),
    (
        [ENDPOINT[1], *TEACHER, "teacher_inference.engine=vllm"],
        "orchestrator.teacher_model.client.base_url = []",
        "the address of an endpoint for the teacher-external worker",
    ),
    # The student's engine.
    (
        ["inference.engine=vllm", 'inference.extra_args={"seed": 1, "max_num_seqs": 8}'],
        "inference.extra_args = {seed = 1, max_num_seqs = 8}",
        "no max_num_seqs, which follows from inference.max_batch",
    ),
    (
        ["inference.engine=vllm", "inference.extra_args.logprobs_mode=raw_logprobs"],
        "raw_logprobs",
        "which the engine chooses",
    ),
    (
        ["inference.engine=vllm", "inference.max_model_len=512"],
        "inference.max_model_len = 512 with inference.sampling.max_completion = 512",
        "room for a prompt",
    ),
    (
        ["inference.engine=vllm", "inference.sampling.temperature=0.001"],
        "temperature = 0.001",
        "at least 0.01 with vLLM",
    ),
    (
        ["inference.engine=server", "deployment.workers.generator=2"],
        "deployment.workers.generator = 2 with inference.engine",
        "expected one generator",
    ),
    (
        [
            "inference.engine=server",
            "deployment.device=cuda",
            "deployment.num_infer_gpus=3",
            "inference.tensor_parallel_size=2",
        ],
        "deployment.num_infer_gpus = 3 with inference.tensor_parallel_size = 2",
        "a multiple of the 2 GPUs that one server takes",
    ),
    (
        ["inference.engine=server", "inference.extra_args.port=1"],
        "inference.extra_args = {port = 1}",
        "no port, which the engine chooses",
    ),
    # Weights from GPU to GPU.
    (
        [*NCCL, "deployment.device=cpu"],
        'weights.transport = "nccl" with deployment.device = "cpu"',
        "expected CUDA",
    ),
    (
        [*NCCL, "inference.engine=transformers"],
        'with inference.engine = "transformers"',
        "expected vLLM inside the generators",
    ),
    (
        [*NCCL, "inference.engine=server"],
        'with inference.engine = "server"',
        "expected vLLM inside the generators",
    ),
    (
        [*NCCL, "inference.on_new_weights=wait"],
        'with inference.on_new_weights = "wait"',
        "weights that are taken at once",
    ),
    (
        [*NCCL, "deployment.share_gpus=true"],
        "with deployment.share_gpus = true",
        "a GPU of its own for each process",
    ),
    ([*NCCL, "weights.delta=true"], "with weights.delta = true", "expected whole sets"),
    # Sampling.
    (
        [*TEACHER, "inference.sampling.temperature=0.7", "trainer.loss.teacher_top_k=0"],
        "trainer.loss.teacher_top_k = 0",
        "temperature 1 with the sampled",
    ),
    (
        [*TEACHER, "trainer.loss.teacher_divergence=jsd", "trainer.loss.teacher_top_k=0"],
        'trainer.loss.teacher_divergence = "jsd" with trainer.loss.teacher_top_k = 0',
        "Set trainer.loss.teacher_top_k = 4",
    ),
    # Weights, counts and names.
    (
        ["trainer.loss.teacher_tau=-0.5"],
        "trainer.loss.teacher_tau = -0.5",
        "greater than or equal to 0",
    ),
    (["trainer.loss.adv_tau=-1"], "trainer.loss.adv_tau = -1", "greater than or equal to 0"),
    (["trainer.loss.kl_tau=-1"], "trainer.loss.kl_tau = -1", "greater than or equal to 0"),
    (
        ["orchestrator.batch_size=101"],
        "orchestrator.batch_size = 101",
        "Set orchestrator.batch_size = 100",
    ),
    (
        ["orchestrator.batch_size=3"],
        "orchestrator.group_size = 4",
        "Set orchestrator.batch_size = 4",
    ),
    ([STAGES('["train", "train", "generate", "verify"]')], "deployment.stages", "each stage once"),
    (["task.name=jsonl"], "task.path = unset", "the file of the jsonl task"),
    (["task.path=a.jsonl"], 'task.path = "a.jsonl"', "only a jsonl task reads"),
    (
        ["orchestrator.teacher_modell.model.name=big"],
        "orchestrator.teacher_modell",
        "Did you mean orchestrator.teacher_model",
    ),
    (
        [*ENDPOINT, "trainer.loss.teacher_tau=1", "orchestrator.teacher_model.client.url=a"],
        "orchestrator.teacher_model.client.url",
        "expected the name of a setting",
    ),
]

WARNED = [
    (["teacher_inference.model.name=big"], "metric-only"),
    (ENDPOINT, "metric-only"),
    (
        ["deployment.num_teacher_gpus=1", "trainer.loss.teacher_tau=1", "trainer.loss.adv_tau=0"],
        "nothing to learn",
    ),
    ([*TEACHER, "task.teacher_prompt.template=It is {answer}."], "template has no {prompt}"),
    (["trainer.loss.teacher_top_k=4"], "teacher_top_k = 4 has no effect"),
    (
        [
            *TEACHER,
            UNVERIFIED,
            "trainer.loss.adv_tau=0",
            "deployment.balance=auto",
            "deployment.device=cuda",
        ],
        'deployment.balance = "auto" has no effect',
    ),
    (
        [*TEACHER, 'teacher_inference.extra_args=["--seed", "1"]'],
        "extra_args has no effect: the teacher's engine is transformers",
    ),
    (
        ["deployment.num_infer_gpus=2"],
        "deployment.num_infer_gpus has no effect: the student's engine is transformers",
    ),
    (
        ["inference.client.base_url=http://a"],
        "inference.client.base_url has no effect: the student's engine is transformers",
    ),
    (
        [
            "inference.engine=server",
            "inference.client.base_url=http://127.0.0.1:8000",
            "deployment.num_infer_gpus=2",
        ],
        "deployment.num_infer_gpus has no effect: the student's servers are those of "
        "inference.client.base_url",
    ),
    (
        ["inference.engine=server", "inference.client.base_url=http://a:8000"],
        "set inference.client.weights_dir to a directory that both share",
    ),
    (
        ["inference.tensor_parallel_size=2"],
        "inference.tensor_parallel_size has no effect: the student's engine is transformers",
    ),
    ([*TEACHER, STAGES('["generate", "score", "train"]')], "adv_tau has no effect"),
    (
        [*TEACHER, STAGES('["generate", "verify", "train"]')],
        "onstream worker teacher runs/onstream)",
    ),
    (
        [*ENDPOINT, "trainer.loss.teacher_tau=1", "deployment.workers.teacher_external=0"],
        "onstream worker teacher-external runs/onstream)",
    ),
    (["deployment.workers.generator=0"], "onstream worker generator runs/onstream)"),
    (
        [*HARD, "inference.sampling.temperature=0.9"],
        "inference.sampling.temperature has no effect",
    ),
    (
        [STAGES('["generate", "act", "verify", "train"]')],
        "deployment.stages names act, but task.environment is unset: no act worker runs.",
    ),
    (
        [*EPISODES, STAGES('["generate", "act", "verify", "train"]')],
        "deployment.stages names verify, but the environment gives the rewards",
    ),
    (
        [*HARD, STAGES('["generate", "verify", "score", "train"]')],
        'names score, but trainer.loss.type = "sft"',
    ),
    (
        [
            *TEACHER,
            "trainer.loss.adv_tau=0",
            UNVERIFIED,
            STAGES('["generate", "verify", "score", "train"]'),
        ],
        "deployment.stages names verify",
    ),
]


@pytest.mark.parametrize(
    ("overrides", "got", "words"),
    [*REFUSED, *((overrides, "", words) for overrides, words in WARNED)],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_each_rule_tells_one_thing_and_nothing_else_is_told(
    overrides: list[str], got: str, words: str
) -> None:
    resolved = resolve(overrides=overrides, environ={})
    assert resolved.settings is not None
    if got:
        [told] = map(str, resolved.problems)
        assert got in told.partition("; expected")[0]
    else:
        assert resolved.problems == []
        [told] = warnings_of(resolved.settings)
    assert words in told


@pytest.mark.parametrize(
    "overrides",
    [
        [*TEACHER, "inference.sampling.temperature=0.7", "trainer.loss.teacher_top_k=4"],
        [*TEACHER, "inference.sampling.temperature=0.7"],
        [*TEACHER, "trainer.loss.teacher_divergence=jsd"],
        ["inference.sampling.temperature=0.7"],
        [*TEACHER, "trainer.loss.teacher_divergence=jsd", "trainer.loss.teacher_top_k=4"],
        ["trainer.loss.teacher_divergence=forward"],
        [*TEACHER, "trainer.loss.adv_tau=0", "orchestrator.group_size=1"],
        [*TEACHER, STAGES('["generate", "score", "train"]')],
        [*TEACHER, *ENDPOINT],
        [ENDPOINT[1], "trainer.loss.teacher_tau=1", STAGES('["generate", "verify", "train"]')],
        [*HARD, UNVERIFIED],
        [*HARD, "trainer.lora.dropout=0.1"],
        [*TEACHER, "trainer.lora.rank=8"],
        [*HARD, "orchestrator.group_size=1"],
        [*HARD, "orchestrator.teacher_rollout_model.keep=verified"],
        [*HARD, "task.teacher_prompt.template={prompt} {answer}"],
        ["task.name=jsonl", "task.path=a.jsonl", "task.eval_path=b.jsonl"],
        ["task.name=hf:a.csv", "task.eval_path=b.csv"],
        NCCL,
        EPISODES,
        [*EPISODES, UNVERIFIED],
        JUDGE,
    ],
)
def test_what_can_work_is_not_refused(overrides: list[str]) -> None:
    assert resolve(overrides=overrides, environ={}).problems == []


def test_a_student_learns_from_its_own_start_where_that_reads_more() -> None:
    own = ["deployment.num_teacher_gpus=1", "trainer.loss.teacher_tau=1", "trainer.loss.adv_tau=0"]
    told = [
        warnings_of(load_settings(overrides=[*own, *more], environ={}))
        for more in ([], ["task.teacher_prompt.system=Think."])
    ]
    assert ["nothing to learn" in line for lines in told for line in lines] == [True]


def test_the_problems_of_all_rules_are_told_at_once() -> None:
    overrides = [
        *(
            "trainer.loss.type=sft",
            "trainer.loss.teacher_tau=0.5",
            "orchestrator.use_token_client=false",
        ),
        *(
            *ENDPOINT,
            "teacher_inference.model.name=other",
            "orchestrator.batch_size=101",
            "task.name=jsonl",
            "eval.samples=-1",
        ),
    ]
    told = [str(problem) for problem in resolve(overrides=overrides, environ={}).problems]
    assert len(told) == 8
    for words in (
        *(
            "greater than or equal to 0",
            "batch of whole groups",
            "one teacher",
            "a teacher whose completions",
            "token ids",
        ),
        *(
            "trainer.loss.teacher_tau only where",
            "no teacher that scores",
            "the file of the jsonl task",
        ),
    ):
        assert sum(words in line for line in told) == 1, words


def test_the_seed_page_has_its_snippets_here() -> None:
    assert len(SNIPPETS) == 6


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda path: path.stem)
def test_a_snippet_of_the_seed_page_checks_clean_as_printed(snippet: Path) -> None:
    assert resolve([snippet], environ={}).problems == []


def test_the_environment_goes_on_top_of_an_untouched_snippet() -> None:
    snippet = next(path for path in SNIPPETS if path.stem == "hard_distillation")
    environ = {
        "ONSTREAM_ORCHESTRATOR__TEACHER_ROLLOUT_MODEL__CLIENT__BASE_URL": "http://localhost:8000/v1/",
        "ONSTREAM_ORCHESTRATOR__TEACHER_ROLLOUT_MODEL__CLIENT__API_KEY": "hunter2",
        "ONSTREAM_ORCHESTRATOR__TEACHER_ROLLOUT_MODEL__MODEL__NAME": "mine",
    }
    source = load_settings([snippet], environ=environ).orchestrator.teacher_rollout_model
    assert source is not None and source.client.api_key is not None
    assert (source.client.base_url, source.model.name, source.client.skip_model_check) == (
        ("http://localhost:8000/v1",),
        "mine",
        True,
    )
    assert source.client.api_key.get_secret_value() == "hunter2"
