"""The settings as data, and the page made of them."""

from __future__ import annotations

from onstream.settings.docs import PAGE, text
from onstream.settings.fields import known, sections


def test_every_setting_has_a_scope_and_a_docstring_and_numbers_have_bounds_and_a_unit() -> None:
    unitless = {"run.seed"}  # a name more than a number
    for setting in known().values():
        assert setting.scope.kind in ("run", "worker"), setting.name
        assert setting.doc.endswith("."), setting.name
        if setting.type in ("integer", "number"):
            assert any(sign in setting.bound for sign in ("≥", ">")) and any(
                sign in setting.bound for sign in ("≤", "<")
            ), setting.name
            assert setting.unit or setting.name in unitless, setting.name


def test_every_section_has_a_docstring() -> None:
    assert all(section.__doc__ for section in sections().values())


def test_the_page_of_settings_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == text(), "run: python -m onstream.settings.docs"


def test_the_seed_pages_parameters_are_settings() -> None:
    names = (
        "deployment.num_teacher_gpus",
        "trainer.loss.teacher_tau",
        "trainer.loss.adv_tau",
        "orchestrator.verification.enabled",
    )
    assert [known()[name].type for name in names] == [
        "integer",
        "number",
        "number",
        "true or false",
    ]
