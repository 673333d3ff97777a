"""What a scorer process does: it scores completions, whatever the scorer may raise."""

from __future__ import annotations

import msgspec

from onstream.pipeline.child_processes.child import ChildWork
from onstream.pipeline.child_processes.errors import reason_of
from onstream.pipeline.tasks import load_scorer
from onstream.pipeline.tasks.scorers import RolloutError, Scorer, read_score
from onstream.settings.root import Settings
from onstream.workers.verifier.scorer_messages import ScoringRequest, Verdict

_decode_requests = msgspec.msgpack.Decoder(list[ScoringRequest]).decode


def load(settings: bytes) -> ChildWork:
    """The work of scorer processes with `settings`, those of task and verification as JSON.

    Raises:
        UserError: the scorer cannot be loaded.
    """
    scorer = load_scorer(Settings.model_validate_json(settings))
    return ChildWork(_decode_requests, lambda request: score_completion(scorer, request))


def score_completion(scorer: Scorer, request: ScoringRequest) -> Verdict:
    """The verdict on one completion. Whatever the scorer raises becomes a verdict too."""
    try:
        reward, parts = read_score(scorer(request.completion, request.info))
        return Verdict(reward, parts)
    except RolloutError:
        return Verdict(0.0, {"rollout_error": 1.0})
    # sys.exit() and the like in a scorer are its failures too, and must not end the process
    except BaseException as error:
        return Verdict(unscored=reason_of(error, scorer))
