"""Writes docs/models.md: what each family comes to in the sweep of tests/models.

`python -m tests.models.table`, or `make models-table`. What needs vLLM or torchvision is read from
`measured.json`, which tests write.
"""

from __future__ import annotations

import datetime
import re
import sys
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from onstream.pipeline.models.prompt_sharing import prepare
from onstream.workers.generator.engines.transformers.engine import TransformersEngine
from tests.models.exactness import Refused, generator_gap, scoring_gap
from tests.models.families import tiny_model
from tests.models.measured import Part, measured, versions
from tests.models.test_families import FAMILIES

TARGET = Path("docs/models.md")
WITH_IMAGES = """
## With images

Tiny models of these families read prompts with no image, one and two, of one size and of another,
each against the model's own forward with its processor's tensors.

| family | trainer and teacher | built-in generator |
|---|---|---|
"""
HEAD = """# Which models

Which families of causal language models train, score and generate here, found by a sweep over
tiny models with random weights (`make test-models`): prompts of 2 to 230 tokens, completions of 1
to 50, groups of four, each against the model's own forward over one sequence alone. A cell is the
largest difference in nats, in float32, or the reason of the refusal. **A family that is not exact
is refused before a run starts; it is never accepted and wrong.**

- *trainer and teacher*: `packed` computes a group's prompt once; `padded` takes a row for each
  sequence, as right and slower.
- *vLLM*: the CPU build, by the guard: its greedy choice and logprob behind prompts longer than the
  windows, with the weights that it starts with and after an update. An empty cell was not
  measured: there the guard compares as everywhere. `make models-measured` measures this column and
  the table of images.
- *built-in generator*, and every evaluation: `inference.engine = "transformers"`. `slots` decodes
  many completions in one forward pass; `own cache` takes one more for each length of new prompts,
  as right and slower ([engines.md](engines.md#slots-or-the-models-own-cache)). Where it refuses,
  `inference.engine = "vllm"` or `"server"` writes the rollouts, if vLLM has the family; the guard
  compares what it writes with the trainer
  ([engines.md](engines.md#the-guard-is-it-the-trainers-policy)).

The same checks run on your own model at every start, with its windows made short, so that a
prompt of the check is longer than them.

- Rotary positions of the type `longrope` depend on the longest row of a batch: each sequence is
  computed alone. Beyond `original_max_position_embeddings` every position of a sequence changes,
  so the built-in generator writes up to there: that is its context.
- With `dynamic`, sequences beyond `max_position_embeddings` are refused.
- Where the tokens of an image see one another (Gemma), rows are padded.
- Attention that sdpa cannot compute (gpt-oss's sinks, Gemma 2's caps) is the model's own code.

"""


def main() -> int:
    """Write the table; families are measured one after the other."""
    parts = measured()
    vllm = parts["vLLM"]
    rows = ["| family | trainer and teacher | built-in generator | vLLM |", "|---|---|---|---|"]
    for at, family in enumerate(FAMILIES, 1):
        rows.append(f"{row_of(family)} {vllm['cells'].get(family, '')} |")
        print(f"{at}/{len(FAMILIES)} {rows[-1]}", flush=True)
    when = datetime.date.today().isoformat()
    made = f"\n\nMade on {when} with {versions()}; the column *vLLM* {vllm['made']}.\n"
    TARGET.write_text(HEAD + "\n".join(rows) + made + with_images(parts))
    return 0


def with_images(parts: dict[str, Part]) -> str:
    """The second table, of the families whose prompts have images."""
    scoring = parts["images: trainer and teacher"]
    generator = parts["images: built-in generator"]["cells"]
    rows = [f"| {one} | {cell} | {generator[one]} |" for one, cell in scoring["cells"].items()]
    return WITH_IMAGES + "\n".join(rows) + f"\n\nMade {scoring['made']}.\n"


def row_of(family: str) -> str:
    """A line of the table, but for what needs vLLM."""
    generator = cell(generator_gap, tiny_model(family))
    if not generator.startswith("refused"):
        reason = TransformersEngine(tiny_model(family), (), slots=4).own_cache_because
        how = f"own cache: {short(reason)}" if reason else "slots"
        generator = f"{generator}, {how}"
    model = tiny_model(family)
    scoring = cell(scoring_gap, model)
    if not scoring.startswith("refused"):
        reason = prepare(tiny_model(family))
        how = f"padded: {short(reason)}" if reason else "packed"
        scoring = f"{scoring}, {how}"
    return f"| {family} | {scoring} | {generator} |"


def cell(measure: Callable[[PreTrainedModel], float], model: PreTrainedModel) -> str:
    """The largest difference, rounded up to one digit, or why it is refused."""
    try:
        return f"{measure(model):.0e} nats"
    except Refused as refusal:
        return f"refused: {short(str(refusal))}"


def short(reason: str) -> str:
    """The reason without the model's name and what to do."""
    reason = re.sub(r"^.*; and (?=through the model's own cache: )", "", reason)
    reason = reason.partition(";")[0]
    reason = re.sub(r"^the generator cannot serve \w+: ", "", reason)
    reason = re.sub(r"by up to [\d.e+-]+|by [\d.e+-]+ nats", "by too much", reason)
    reason = re.sub(r"^the logits of +\(\S+\) ", "its logits ", reason)
    reason = re.sub(r"^ *\(\S+\) ", "it ", reason)
    return reason.replace("|", "\\|")[:100]


if __name__ == "__main__":
    sys.exit(main())
