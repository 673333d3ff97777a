from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.records import Rollout
from onstream.pipeline.stage import Outcome
from onstream.workers.tiny_models.character_tokenizer import character_tokenizer
from tests.base_student import make_base
from tests.faulty_server import drip, status
from tests.table_teacher import ALL_ROUTES, TableTeacher
from tests.workers.teacher.external.conftest import (
    Configure,
    Servers,
    Stages,
    delivered,
    rollout,
    work,
)


def other_tokenizer(
    *, extra: str | None = None, swap: bool = False, template: str | None = None
) -> Any:
    """The student's tokenizer with a difference. `swap` gives two letters each other's ids."""
    tokenizer = character_tokenizer()
    if extra is not None:
        tokenizer.add_tokens([AddedToken(extra)])
    if template is not None:
        tokenizer.chat_template = template
    if swap:
        encode = tokenizer.encode
        decode = tokenizer.decode
        a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
        other = {a: b, b: a}
        tokenizer.encode = lambda text, **how: [
            other.get(token, token) for token in encode(text, **how)
        ]
        tokenizer.decode = lambda ids, **how: decode(
            [other.get(token, token) for token in ids], **how
        )
    return tokenizer


@pytest.mark.parametrize(
    ("routes", "chosen"),
    [
        (ALL_ROUTES, "vllm-generate"),
        (ALL_ROUTES - {"vllm-generate"}, "vllm-completions"),
        (ALL_ROUTES - {"vllm-generate", "vllm-completions"}, "echo"),
        (frozenset({"sglang", "models"}), "sglang"),
    ],
)
def test_the_first_protocol_that_works_is_used(
    servers: Servers, configure: Configure, stages: Stages, routes: frozenset[str], chosen: str
) -> None:
    stage = stages(configure(servers(routes=routes), top_k=4))
    (endpoint,) = stage._client.pool.endpoints
    assert endpoint.protocol is not None and endpoint.protocol.name == chosen


def test_a_pinned_protocol_is_the_only_one_asked_for(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    (endpoint,) = stages(configure(servers(), protocol="echo"))._client.pool.endpoints
    assert endpoint.protocol is not None and endpoint.protocol.name == "echo"
    with pytest.raises(
        UserError, match=r"returns no logprobs of a prompt \(vllm-generate: 404 Not Found\)"
    ):
        stages(configure(servers(routes=ALL_ROUTES - {"vllm-generate"}), protocol="vllm-generate"))


def refusal(server: TableTeacher, configure: Configure, stages: Stages, **how: Any) -> UserError:
    """Why the stage is refused with this server."""
    with pytest.raises(UserError) as refused:
        stages(configure(server, **how))
    return refused.value


def test_a_model_that_is_not_listed_is_refused_naming_those_that_are(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    server = servers(models=("large", "small"))
    found = refusal(server, configure, stages)
    setting = "orchestrator.teacher_model.model.name"
    assert found.got == f"{setting} = 'teacher', which {server.base_url} does not serve"
    assert found.expected == "one of the models it lists: 'large', 'small'"
    assert "skip_model_check" in found.next_step
    stages(configure(server, skip_model_check=True))


def test_an_address_without_a_list_of_models_is_refused_naming_the_setting(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    server = servers(routes=ALL_ROUTES - {"models"})
    found = refusal(server, configure, stages)
    assert "has no list of models (404 Not Found)" in found.got
    assert "base_url" in found.next_step and "skip_model_check" in found.next_step
    stages(configure(server, skip_model_check=True))


def test_a_server_without_logprobs_of_a_prompt_is_refused_with_what_it_said(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    found = refusal(servers(routes=frozenset({"models", "tokenize"})), configure, stages)
    assert (
        "returns no logprobs of a prompt (vllm-generate: 404 Not Found; vllm-completions: 404"
        in found.got
    )
    assert "Chat endpoints" in found.next_step


def test_a_teacher_whose_logprobs_are_above_0_is_refused_with_the_value(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    """Those of a server that gives probabilities, say, or logits."""
    server = servers()
    server.logprobs[:] = 0.75
    found = refusal(server, configure, stages)
    assert "returns no logprobs of a prompt (vllm-generate: logprob 0.75 for token" in found.got
    assert "expected -32768 to 0, in nats" in found.got


@pytest.mark.parametrize(("limit", "given"), [(20, 8), (5, 5), (0, 0)])
def test_a_teacher_is_asked_for_as_many_likeliest_tokens_as_it_gives(
    servers: Servers, configure: Configure, stages: Stages, limit: int, given: int
) -> None:
    stage = stages(configure(servers(max_top_k=limit), top_k="auto"))
    [outcome] = work(stage, delivered(rollout(1)))
    assert top_k_of(outcome) == given


def top_k_of(outcome: Outcome) -> int:
    """How many of the likeliest tokens a scored rollout of 4 tokens has at each."""
    assert isinstance(outcome.record, Rollout), outcome.dead
    [sample] = outcome.record.samples
    assert len(sample.teacher_logprobs or b"") == 4 * 4
    assert sample.teacher_tail_logprobs is None
    return len(sample.teacher_top_ids or b"") // (4 * 4)


def test_of_two_endpoints_each_gives_what_it_can(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    most = servers()
    fewer = servers(max_top_k=3)
    stage = stages(configure(most, fewer, top_k="auto", max_in_flight=4))
    outcomes = work(stage, delivered(*(rollout(number) for number in range(1, 21))))
    by = {outcome.record.scored_by: top_k_of(outcome) for outcome in outcomes}
    assert by == {most.base_url: 8, fewer.base_url: 3}


def test_a_teacher_without_likeliest_tokens_is_refused_where_the_sampled_one_does_not_do(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    silent = servers(max_top_k=0)
    found = refusal(silent, configure, stages, top_k="auto", temperature=0.7)
    assert "gives no likeliest tokens beside the one asked for" in found.got
    assert found.expected.startswith("at least 1: at another temperature than 1")
    assert "set inference.sampling.temperature = 1.0" in found.next_step
    stages(configure(servers(max_top_k=1), top_k="auto", temperature=0.7))


@pytest.mark.parametrize(("limit", "wanted"), [(5, 8), (20, 64), (0, 1)])
def test_a_teacher_that_gives_fewer_likeliest_tokens_is_refused_with_the_k_it_can(
    servers: Servers, configure: Configure, stages: Stages, limit: int, wanted: int
) -> None:
    found = refusal(servers(max_top_k=limit), configure, stages, top_k=wanted)
    assert f"trainer.loss.teacher_top_k = {wanted}" in found.got
    assert found.next_step.startswith(f"Set trainer.loss.teacher_top_k = {limit}")
    stages(configure(servers(max_top_k=limit), top_k=limit))


@pytest.mark.parametrize(
    "routes",
    [ALL_ROUTES, ALL_ROUTES - {"tokenize"} - {"vllm-generate"}, frozenset({"echo", "models"})],
    ids=len,
)
def test_another_vocabulary_is_refused_naming_the_token(
    servers: Servers, configure: Configure, stages: Stages, routes: frozenset[str]
) -> None:
    found = refusal(servers(tokenizer=other_tokenizer(swap=True), routes=routes), configure, stages)
    assert "the vocabulary of the teacher at http://127.0.0.1" in found.got
    assert "'a'" in found.got and "'b'" in found.got


def test_a_vocabulary_that_differs_in_few_ids_is_found_by_decoding_them_all(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    tokenizer = other_tokenizer()
    decode = tokenizer.decode
    tokenizer.decode = lambda ids, **how: decode([token for token in ids if token != 20], **how)
    found = refusal(servers(tokenizer=tokenizer), configure, stages)
    assert (
        "128 ids from 0 to 127 read …'served_12|><|reserved_13" in found.got
        and "to the student and …'served_13" in found.got
    )


def test_entries_that_only_the_teacher_has_do_no_harm(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    stages(configure(servers(tokenizer=other_tokenizer(extra="☃"))))


def test_another_chat_template_is_refused_showing_both(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    template = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    found = refusal(servers(tokenizer=other_tokenizer(template=template)), configure, stages)
    assert (
        "writes a conversation as '[1 + 1]" in found.got
        and "'<|im_start|><|user|>1 + 1" in found.got
    )


def test_a_base_student_under_the_teacher_of_a_server_is_told_the_setting_that_mends_it(
    servers: Servers, configure: Configure, stages: Stages, model_dir: Path, tmp_path: Path
) -> None:
    server = servers()
    base = make_base(model_dir, tmp_path / "base")
    recipe = {"name": str(base), "chat_template": str(model_dir)}
    settings = configure(server)
    model = settings.model.model_copy(update=recipe)
    with pytest.raises(UserError, match=r"ends an answer with '<\|im_end\|>'") as refusal:
        stages(settings.model_copy(update={"model": model}))
    assert 'Set model.end_tokens = ["<|im_end|>"]' in refusal.value.next_step
    model = model.model_copy(update={"end_tokens": ("<|im_end|>",)})
    stages(settings.model_copy(update={"model": model}))


@pytest.mark.parametrize("where", ["student's", "teacher's"])
def test_the_server_renders_with_the_variables_that_the_settings_give(
    servers: Servers, configure: Configure, stages: Stages, where: str
) -> None:
    template = character_tokenizer().chat_template + "{{ 'x' if thinking else '' }}"
    server = servers(tokenizer=other_tokenizer(template=template))
    settings = configure(server)
    on = {"thinking": True}
    model = settings.model.model_copy(update={"chat_template_kwargs": on})
    settings = settings.model_copy(update={"model": model})
    teacher = settings.orchestrator.teacher_model
    assert teacher is not None
    if where == "teacher's":
        own = teacher.model.model_copy(update={"chat_template_kwargs": {}})
        update = {"teacher_model": teacher.model_copy(update={"model": own})}
        orchestrator = settings.orchestrator.model_copy(update=update)
        stages(settings.model_copy(update={"orchestrator": orchestrator}))
        return
    with pytest.raises(UserError, match=r"writes a conversation as .*x'"):
        stages(settings)


@pytest.mark.parametrize("routes", [ALL_ROUTES, frozenset({"vllm-completions", "models"})], ids=len)
def test_a_context_without_room_for_a_whole_sample_and_one_token_more_is_refused(
    servers: Servers, configure: Configure, stages: Stages, routes: frozenset[str]
) -> None:
    stage = stages(configure(servers(routes=routes), max_completion=100))
    longest = stage._client.student.longest_sample
    assert longest > 100
    found = refusal(
        servers(max_model_len=longest, routes=routes), configure, stages, max_completion=100
    )
    assert f"at least {longest + 1}: a sample of up to {longest} tokens" in found.expected
    port = found.got.split(":")[2].split("/")[0]
    assert f"the context of the teacher at http://127.0.0.1:{port}/v1 is" in found.got
    assert "inference.sampling.max_completion" in found.next_step
    stages(configure(servers(max_model_len=longest + 1, routes=routes), max_completion=100))


def test_a_teacher_that_judges_by_chance_is_refused(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    found = refusal(servers(noise=1.0), configure, stages)
    assert "scored one text twice" in found.got


def test_two_endpoints_with_other_weights_under_one_name_are_refused(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    with pytest.raises(UserError, match="nats a token away from what this teacher scored it first"):
        stages(configure(servers(), servers(seed=1)))


def test_a_wrong_key_is_refused_naming_the_setting(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    found = refusal(servers(key="right"), configure, stages, api_key="wrong")
    assert "refuses this worker (401 Unauthorized)" in found.got and "API_KEY" in found.next_step
    found = refusal(servers(key="right"), configure, stages, api_key="wrong", skip_model_check=True)
    assert "refuses this worker (401 Unauthorized)" in found.got


def test_nothing_at_the_address_is_refused_as_unreachable(
    configure: Configure, stages: Stages
) -> None:
    found = refusal(TableTeacher(port=1), configure, stages)
    assert found.exit is Exit.UNREACHABLE
    assert (
        "no endpoint of the teacher 'teacher' answers (http://127.0.0.1:1/v1: ConnectError"
        in found.got
    )


@pytest.mark.parametrize("fault", [status(500), drip], ids=["500", "drip"])
def test_a_server_that_does_not_work_yet_is_refused_as_unreachable(
    servers: Servers, configure: Configure, stages: Stages, fault: Any
) -> None:
    server = servers()
    server.forever = fault
    assert refusal(server, configure, stages, timeout=0.3).exit is Exit.UNREACHABLE


def test_one_endpoint_that_answers_is_enough_to_begin(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    stage = stages(configure(servers(), TableTeacher(port=1)))
    assert stage.stats.detail.startswith(
        "1 of 2 endpoints are down: http://127.0.0.1:1/v1: ConnectError"
    )
    assert stage.room == 16


def test_a_worker_of_a_run_that_was_scored_before_waits_for_its_teacher(
    bus: Any, configure: Configure, stages: Stages
) -> None:
    bus.state.mark_ready("score")
    stage = stages(configure(TableTeacher(port=1)))
    assert stage.stats.detail.startswith(
        "waiting for the teacher: http://127.0.0.1:1/v1: ConnectError"
    )
    assert (stage.room, stage.busy) == (0, False)
