"""`[trainer.loss]`: the losses by their `type`, and what each of them needs of a run.

Everything else asks a loss what it needs, and never which type it is. docs/objective.md has the
formulas.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from onstream.settings.base import RUN, Section, Unit

Need = Literal["generator_logprobs", "teacher_logprobs", "reward"]

AUTO_TOP_K = 8
"""How many of the teacher's likeliest tokens `"auto"` asks for. docs/objective.md has the table."""


class LossSettings(Section):
    """What a training step minimises; docs/objective.md has the formulas."""

    type: Annotated[Literal["rl", "sft", "custom"], RUN] = "rl"
    """`rl`: rewards and the teacher's judgement of the student's own tokens. `sft`: masked negative
    log-likelihood of what a teacher wrote. `custom`: a function of yours.
    """

    TEACHER_SETTING: ClassVar = "trainer.loss.type"
    """The setting by which the loss needs a teacher."""
    REWARD_SETTING: ClassVar = "trainer.loss.type"
    """The setting by which the loss needs rewards."""
    WITHOUT_TEACHER: ClassVar = 'Set trainer.loss.type = "sft"'
    """What to do so that it needs no teacher."""
    WITHOUT_REWARD: ClassVar = 'Set trainer.loss.type = "sft"'
    """What to do so that it needs no rewards."""

    LEARN_FROM: ClassVar = 'Set trainer.loss.type = "rl"'
    """What to do so that it has something to learn from."""

    @property
    @abstractmethod
    def reads_generator(self) -> bool:
        """Whether it reads the generator's logprobs, and works at the temperature of sampling."""

    @property
    @abstractmethod
    def reads_teacher(self) -> bool:
        """Whether it reads the teacher's logprobs where there are some, be it for metrics alone."""

    @property
    @abstractmethod
    def needs_teacher(self) -> bool:
        """Whether it cannot be computed without the teacher's logprobs."""

    @property
    @abstractmethod
    def needs_reward(self) -> bool:
        """Whether rewards enter it, as the advantage within a group."""

    @property
    @abstractmethod
    def teaches_own_rollouts(self) -> bool:
        """Whether a student can learn from its own completions by it."""

    @property
    def user_function(self) -> str | None:
        """The import path of the user's own function, where the loss is one."""
        return None

    @property
    def needs_temperature_1(self) -> bool:
        """Whether completions have to be sampled at temperature 1."""
        return False

    @property
    def needs_bins(self) -> bool:
        """Whether its teacher term is defined over the teacher's likeliest tokens alone."""
        return False

    @property
    def lowers_variance(self) -> bool:
        """Whether its sampled teacher term is taken less a baseline from the step's others."""
        return False

    @property
    def unit(self) -> Literal["group", "rollout"]:
        """What trains as one: a group, whose mean reward is the baseline, or a rollout alone."""
        return "group" if self.needs_reward else "rollout"

    @property
    def trains_unscored(self) -> bool:
        """Whether a rollout without a reward trains anything."""
        return self.needs_teacher or not self.needs_reward


class RolloutLoss(LossSettings):
    """What losses share that can read the teacher and rewards."""

    teacher_top_k: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=0, le=1024)], RUN, Unit("tokens")
    ] = "auto"
    """The teacher sends its k likeliest tokens of each position. With k > 0 the teacher term of
    `rl` is the `teacher_divergence` over them and one tail bin, differentiated; with 0 it is the
    sampled token's reverse KL. `auto`: 8 with `rl`, fewer where the teacher's endpoint gives fewer;
    where it gives none, the sampled term less a baseline, which lowers its variance. 0 with
    `custom`."""
    teacher_tail_floor: Annotated[float, RUN, Unit("probability"), Field(gt=0, lt=1)] = 1e-6
    """Least probability of the tail bin, where an endpoint gives only the top k and their sum comes
    to 1 or more.
    """
    normalize_advantage: Annotated[bool, RUN] = False
    """Divide a group's advantages by the standard deviation of its rewards."""

    @property
    def most_top_k(self) -> int:
        """The most of the teacher's likeliest tokens that are asked for; 0: none."""
        return 0 if self.teacher_top_k == "auto" else self.teacher_top_k

    @property
    def needs_top_k(self) -> bool:
        """Whether it reads the teacher's likeliest tokens, where there are some."""
        return self.needs_teacher and self.most_top_k > 0

    def least_top_k(self, *, scaled: bool) -> int:
        """How many of them it needs at least; `scaled`: at another temperature than 1."""
        return self.most_top_k if self.needs_top_k else 0


class RlLoss(RolloutLoss):
    """Rewards and the teacher's judgement of the student's own tokens, as a policy gradient."""

    type: Annotated[Literal["rl"], RUN] = "rl"
    teacher_tau: Annotated[float, RUN, Unit("weight"), Field(ge=0, le=1000)] = 0.0
    """Distillation strength. Set > 0 to enable."""
    teacher_divergence: Annotated[Literal["reverse", "forward", "jsd"], RUN] = "reverse"
    """What the teacher term measures over the k likeliest tokens and the tail: the reverse KL, the
    forward KL, or the Jensen–Shannon divergence. Others than `reverse` need `teacher_top_k` > 0."""
    teacher_jsd_beta: Annotated[float, RUN, Unit("weight"), Field(gt=0, lt=1)] = 0.5
    """The teacher's share of the mixture in `jsd`: near 0 it acts as the forward KL, near 1 as the
    reverse."""
    adv_tau: Annotated[float, RUN, Unit("weight"), Field(ge=0, le=1000)] = 1.0
    """Weight of the reward's advantage. Set 0 for pure distillation."""
    kl_tau: Annotated[float, RUN, Unit("weight"), Field(ge=0, le=1000)] = 1e-3
    """Weight of the squared log importance ratio, which keeps the trainer near the policy that
    sampled.
    """
    reverse_kl_clip: Annotated[float | None, RUN, Unit("nats"), Field(gt=0, le=1000)] = None
    """Bounds the sampled reverse KL of a token to ± this; unset, it is not bounded."""
    trust_region: Annotated[Literal["signed", "symmetric", "none"], RUN] = "signed"
    """Which tokens are dropped when the trainer's probability has moved from the generator's:
    `signed` those moving on in the direction of their advantage, `symmetric` on either side."""
    trust_low: Annotated[float, RUN, Unit("probability"), Field(ge=0, le=1)] = 0.2
    """How far a token's probability may have fallen."""
    trust_high: Annotated[float, RUN, Unit("probability"), Field(ge=0, le=1)] = 0.2
    """How far a token's probability may have risen."""
    max_log_ratio: Annotated[float, RUN, Unit("nats"), Field(gt=0, le=80)] = 20.0
    """Bound of the log importance ratio before it is exponentiated."""

    TEACHER_SETTING = "trainer.loss.teacher_tau"
    REWARD_SETTING = "trainer.loss.adv_tau"
    WITHOUT_TEACHER = "Set trainer.loss.teacher_tau = 0.0"
    WITHOUT_REWARD = "Set trainer.loss.adv_tau = 0.0 for pure distillation"
    LEARN_FROM = "Set trainer.loss.teacher_tau > 0, or adv_tau > 0 with verification"

    @property
    def reads_generator(self) -> bool:
        return True

    @property
    def reads_teacher(self) -> bool:
        return True

    @property
    def needs_teacher(self) -> bool:
        return self.teacher_tau > 0

    @property
    def needs_reward(self) -> bool:
        return self.adv_tau > 0

    @property
    def teaches_own_rollouts(self) -> bool:
        return True

    @property
    def needs_temperature_1(self) -> bool:
        # The teacher judges at temperature 1, and the sampled term estimates nothing at another.
        return self.needs_teacher and self.most_top_k == 0

    @property
    def needs_bins(self) -> bool:
        return self.needs_teacher and self.teacher_divergence != "reverse"

    @property
    def most_top_k(self) -> int:
        if self.teacher_top_k == "auto":
            return AUTO_TOP_K if self.needs_teacher else 0
        return self.teacher_top_k

    def least_top_k(self, *, scaled: bool) -> int:
        if self.teacher_top_k != "auto":
            return super().least_top_k(scaled=scaled)
        # The sampled term takes the place of the likeliest tokens where it can.
        return int(self.needs_bins or (self.needs_teacher and scaled))

    @property
    def lowers_variance(self) -> bool:
        return self.needs_teacher and self.teacher_top_k == "auto"


class SftLoss(LossSettings):
    """Masked negative log-likelihood: hard distillation on what a teacher wrote."""

    type: Annotated[Literal["sft"], RUN] = "sft"

    # Settings of the other losses, at what stands for nothing.
    teacher_top_k: ClassVar[int] = 0
    teacher_tail_floor: ClassVar[float] = 1.0
    normalize_advantage: ClassVar[bool] = False
    reverse_kl_clip: ClassVar[None] = None
    most_top_k: ClassVar[int] = 0
    needs_top_k: ClassVar[bool] = False

    def least_top_k(self, *, scaled: bool) -> int:
        """None: it reads no teacher."""
        return 0

    @property
    def reads_generator(self) -> bool:
        return False

    @property
    def reads_teacher(self) -> bool:
        return False

    @property
    def needs_teacher(self) -> bool:
        return False

    @property
    def needs_reward(self) -> bool:
        return False

    @property
    def teaches_own_rollouts(self) -> bool:
        return False


class CustomLoss(RolloutLoss):
    """A function of yours, found in the directory that the run is started in."""

    type: Annotated[Literal["custom"], RUN] = "custom"
    function: Annotated[str, RUN, Field(pattern=r"^[\w.]+:[\w.]+$")]
    """The loss, as `module:function`: a function of `LossInputs` that returns one loss a token.
    Required with `custom`; docs/objective.md says what it is given."""
    args: Annotated[dict[str, Any], RUN] = Field(default_factory=dict)
    """Keyword arguments of the function."""
    needs: Annotated[tuple[Need, ...], RUN] = ()
    """What the function reads: `generator_logprobs`, `teacher_logprobs` or `reward`, in a list. A
    teacher and verifiers run only where they are needed."""

    reverse_kl_clip: ClassVar[None] = None  # a setting of `rl`

    TEACHER_SETTING = "trainer.loss.needs"
    REWARD_SETTING = "trainer.loss.needs"
    WITHOUT_TEACHER = 'Take "teacher_logprobs" out of trainer.loss.needs'
    WITHOUT_REWARD = 'Take "reward" out of trainer.loss.needs'
    LEARN_FROM = 'Put "teacher_logprobs" into trainer.loss.needs, or "reward" with verification'

    @property
    def user_function(self) -> str:
        return self.function

    @property
    def reads_generator(self) -> bool:
        return "generator_logprobs" in self.needs

    @property
    def reads_teacher(self) -> bool:
        return self.needs_teacher

    @property
    def needs_teacher(self) -> bool:
        return "teacher_logprobs" in self.needs

    @property
    def needs_reward(self) -> bool:
        return "reward" in self.needs

    @property
    def teaches_own_rollouts(self) -> bool:
        return self.needs_teacher or self.needs_reward


Loss = RlLoss | SftLoss | CustomLoss
