"""The rate that follows from a student's shape."""

from __future__ import annotations

from typing import Any

import pytest

from onstream.pipeline.models.learning_rate import automatic_rate, with_learning_rate
from onstream.settings.sections.trainer import TrainerSettings

WHOLE = TrainerSettings.model_validate({"loss": {"teacher_tau": 1.0}})
ADAPTER = TrainerSettings.model_validate({"loss": {"teacher_tau": 1.0}, "lora": {"rank": 4}})


def config(hidden: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 128,
    }


@pytest.mark.parametrize(
    ("hidden", "whole", "adapter"),
    [
        (32, 5e-4, 5e-3),  # never above what was measured
        (96, 5e-4, 5e-3),
        (480, 2e-5, 2e-4),
        (1024, 4.4e-6, 1e-4),  # Qwen3-0.6B
        (2560, 1e-6, 1e-4),  # Qwen3-4B
        (4096, 1e-6, 1e-4),
    ],
)
def test_the_rate_falls_with_the_square_of_the_width_and_an_adapters_is_ten_times_it(
    hidden: int, whole: float, adapter: float
) -> None:
    assert automatic_rate(config(hidden), WHOLE).value == whole
    assert automatic_rate(config(hidden), ADAPTER).value == adapter


def test_the_rate_says_why() -> None:
    assert automatic_rate(config(1024), WHOLE).reason == "hidden size 1,024"
    adapter = automatic_rate(config(1024), ADAPTER)
    assert adapter.reason == "hidden size 1,024, an adapter is trained"


def test_a_student_whose_sizes_are_not_known_has_a_rate_for_large_ones() -> None:
    assert automatic_rate({}, WHOLE).value == 1e-5
    assert automatic_rate({}, ADAPTER).value == 1e-4


def test_a_vision_language_models_width_is_its_language_models() -> None:
    assert automatic_rate({"text_config": config(480)}, WHOLE).value == 2e-5


def test_a_rate_that_is_given_stays() -> None:
    given = TrainerSettings.model_validate({"optim": {"lr": 0.5}})
    assert with_learning_rate(given, config(1024)) is given
    automatic = with_learning_rate(WHOLE, config(1024))
    assert automatic.optim.known_lr == 4.4e-6


@pytest.mark.parametrize(("hidden", "rate"), [(96, 1e-4), (1024, 1e-6)])
def test_where_rewards_alone_teach_the_rate_is_a_fifth_and_not_under_the_least(
    hidden: int, rate: float
) -> None:
    found = automatic_rate(config(hidden), TrainerSettings())
    assert (found.value, found.reason) == (rate, f"hidden size {hidden:,}, rewards alone teach")
    both = TrainerSettings.model_validate({"loss": {"teacher_tau": 0.5, "adv_tau": 1.0}})
    assert automatic_rate(config(96), both).value == 5e-4
    held = automatic_rate(config(96), both, from_own_start=True)
    assert (held.value, held.reason) == (1e-4, "hidden size 96, rewards alone teach")
