"""Rules that hold between settings: what cannot work together, and what may not be meant.

Each rule is a function of all settings that yields its problems, so none depends on an order.
"""

from __future__ import annotations

from onstream.settings.problems import SettingsProblem
from onstream.settings.root import Settings
from onstream.settings.rules.deployment import DEPLOYMENT_RULES, deployment_warnings
from onstream.settings.rules.engines import ENGINE_RULES, engine_warnings
from onstream.settings.rules.episodes import EPISODE_RULES
from onstream.settings.rules.named_teachers import NAMED_TEACHER_RULES
from onstream.settings.rules.sizes import SIZE_RULES, size_warnings
from onstream.settings.rules.teacher import TEACHER_RULES, teacher_warnings
from onstream.settings.rules.training import TRAINING_RULES, hard_distillation_warnings

RULES = (
    *ENGINE_RULES,
    *TRAINING_RULES,
    *TEACHER_RULES,
    *NAMED_TEACHER_RULES,
    *DEPLOYMENT_RULES,
    *SIZE_RULES,
    *EPISODE_RULES,
)


def problems_of(settings: Settings) -> list[SettingsProblem]:
    """Every combination of `settings` that cannot work."""
    return [problem for rule in RULES for problem in rule(settings)]


def warnings_of(settings: Settings) -> list[str]:
    """What works, but may not be what was meant."""
    return [
        *teacher_warnings(settings),
        *engine_warnings(settings),
        *hard_distillation_warnings(settings),
        *deployment_warnings(settings),
        *size_warnings(settings),
    ]
