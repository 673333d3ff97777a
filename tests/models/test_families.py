"""Every family of causal language models: right to 1e-4 nats, or refused before it starts.

Tiny models with wide random weights; prompts of 2 to 230 tokens, completions of 1 to 50, each group
of four sharing its prompt; against the model's own forward over one sequence alone.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from tests.models.exactness import Refused, generator_gap, scoring_gap
from tests.models.families import tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # gpt_bigcode
]

FAMILIES = [
    "afmoe",
    "apertus",
    "arcee",
    "aria_text",
    "bamba",
    "bart",
    "bert",
    "bert-generation",
    "big_bird",
    "bigbird_pegasus",
    "biogpt",
    "bitnet",
    "blenderbot",
    "blenderbot-small",
    "bloom",
    "camembert",
    "codegen",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "cpmant",
    "ctrl",
    "cwm",
    "data2vec-text",
    "deepseek_v2",
    "deepseek_v3",
    "diffllama",
    "doge",
    "dots1",
    "electra",
    "ernie",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "exaone_moe",
    "falcon_h1",
    "flex_olmo",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "git",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt-sw3",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_neox_japanese",
    "gpt_oss",
    "gptj",
    "granite",
    "granite_swa",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "helium",
    "hrm_text",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "hy_v3",
    "hyperclovax",
    "inkling_text",
    "jais2",
    "jetmoe",
    "laguna",
    "lfm2",
    "lfm2_moe",
    "llama",
    "llama4_text",
    "longcat_flash",
    "marian",
    "mbart",
    "megatron-bert",
    "mellum",
    "mimo_v2_flash",
    "minicpm3",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl_text",
    "ministral",
    "ministral3",
    "mistral",
    "mixtral",
    "modernbert-decoder",
    "moshi",
    "mpt",
    "mvp",
    "nanochat",
    "nemotron",
    "nemotron_h",
    "olmo",
    "olmo2",
    "olmo3",
    "olmo_hybrid",
    "olmoe",
    "openai-gpt",
    "opt",
    "pegasus",
    "persimmon",
    "phi",
    "phi3",
    "phimoe",
    "plbart",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "recurrent_gemma",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "rwkv",
    "seed_oss",
    "smollm3",
    "solar_open",
    "stablelm",
    "starcoder2",
    "trocr",
    "vaultgemma",
    "whisper",
    "xglm",
    "xlm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xlstm",
    "zamba",
    "zamba2",
]
PEOPLE_DISTIL = [
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "llama",
    "gemma3_text",
    "gemma4_text",
    "gpt_oss",
    "olmo3",
    "nemotron_h",
    "lfm2",
    "lfm2_moe",
    "phi3",
    "mistral",
    "smollm3",
    "qwen3_next",
    "olmo_hybrid",
]
EXACT_NATS = 1e-4


@pytest.mark.parametrize("family", [one for one in FAMILIES if one not in PEOPLE_DISTIL])
def test_a_family_is_exact_or_refused(family: str) -> None:
    assert_none_wrong(family)


@pytest.mark.parametrize("family", PEOPLE_DISTIL)
def test_a_family_that_people_distil_is_exact_in_every_part(family: str) -> None:
    found = assert_none_wrong(family)
    assert all(isinstance(gap, float) for gap in found.values()), found


def assert_none_wrong(family: str) -> dict[str, float | str]:
    """What each part comes to: at most `EXACT_NATS`, or a refusal."""
    model = tiny_model(family)
    found = {"generator": outcome(generator_gap, model), "scoring": outcome(scoring_gap, model)}
    print(f"{family}: {found}")
    wrong = {
        part: gap for part, gap in found.items() if isinstance(gap, float) and gap > EXACT_NATS
    }
    assert not wrong
    return found


def outcome(measure: Callable[[PreTrainedModel], float], model: PreTrainedModel) -> float | str:
    """The largest difference in nats, or the words of the refusal."""
    try:
        return measure(model)
    except Refused as refusal:
        return str(refusal)
