"""Packs prompts and completions into rows whose shared prompts are computed once. Pure numpy.

A packed row holds T tokens: for each prompt its P tokens, then every completion of it without its
last token, which predicts nothing. Positions restart after the prompt in each completion. Tokens
that all prompts of a row begin with, those of a system prompt say, may stand once, before them all.
Linear layers run on the row as it is; attention runs as a few calls that gather their queries and
keys from it (`AttentionCall`), and each token is a query of exactly one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

DENSE_ROW_TOKENS = 256
"""Up to this length a prompt and its completions attend as one row under a mask.

The square of a short row costs less than further calls (measured).
"""
BRANCH_SHARE = 0.25
"""Completions that attend in one row are together at most this share of their prompt's length."""
START_SHARE = 1 / 16
"""A common start is computed once where that saves at least this share of all tokens."""
ROW_PADDING = 0.25
"""Rows that differ more than this share in length do not go into one call."""


@dataclass(frozen=True)
class PrefixGroup:
    """One prompt and the completions that share it.

    `sequences` says which of the caller's sequences each completion is. `images` names the images
    that the prompt shows, in order: prompts with equal ids may show different ones.
    """

    prompt_ids: Ids  # [P], P ≥ 1
    completions: tuple[Ids, ...]  # each [C], C ≥ 1
    sequences: tuple[int, ...]
    images: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that it takes in a packed row."""
        return len(self.prompt_ids) + sum(len(completion) - 1 for completion in self.completions)

    def part(self, first: int, end: int) -> PrefixGroup:
        """The same prompt with the completions from `first` up to `end`."""
        own = slice(first, end)
        return PrefixGroup(self.prompt_ids, self.completions[own], self.sequences[own], self.images)


@dataclass(frozen=True)
class AttentionCall:
    """One call of scaled dot product attention: b rows of queries and of keys.

    Both are places in the packed row. Padding repeats a place before: as a key it is masked, as a
    query nothing reads it. Without a `mask` the call is causal: query i sees the keys up to i.
    """

    queries: Ids  # [b, q]
    keys: Ids  # [b, s]
    mask: Bools | None  # [b or 1, q, s], True where a query sees a key


@dataclass(frozen=True)
class CumulativeLengths:
    """One call of attention over S sequences of queries and of keys, end to end.

    The queries are the packed row as it is: a prompt, then what each of its completions has there;
    the common start before the first prompt. The keys of a prompt are its own with the start's,
    those of a completion the prompt's and its own. Query i of a sequence sees its keys up to the
    one that is as far from their end as the query is from its.

    Example: the prompt [5, 6] with the completions [7, 8, 9] and [4], which has no place of its
    own::

        keys       0 1  0 1 2 3   (places in the row)
        query_ends 0 2 4
        key_ends   0 2 6
    """

    keys: Ids  # [K], K ≥ T
    query_ends: npt.NDArray[np.int32]  # [S + 1], from 0 to T
    key_ends: npt.NDArray[np.int32]  # [S + 1], from 0 to K
    longest_query: int
    longest_key: int


@dataclass(frozen=True)
class SharedPrefixRow:
    """One forward pass: T tokens that predict the N completion tokens of S sequences in turn.

    `start` is how many tokens stand once for all prompts, at the row's beginning.

    Example: the prompt [5, 6] with the completions [7, 8, 9] and [4] has T = 4 and N = 4::

        input_ids    5 6 7 8
        position_ids 0 1 2 3
        predicted_at 1 2 3 1      (place in the row whose hidden state predicts the target)
        targets      7 8 9 4
    """

    input_ids: Ids  # [T]
    position_ids: Ids  # [T]
    predicted_at: Ids  # [N]
    targets: Ids  # [N]
    sequences: tuple[int, ...]  # [S]
    lengths: tuple[int, ...]  # [S], completion tokens; they sum to N
    groups: tuple[PrefixGroup, ...] = field(repr=False)
    start: int = 0

    @cached_property
    def calls(self) -> tuple[AttentionCall, ...]:
        """How attention reads the row in calls with masks, which grow with the square of it."""
        return _plan_attention(_place(self.groups, self.start), self.start)

    @cached_property
    def output_index(self) -> Ids:
        """[T], each token's place in the outputs of `calls`, end to end."""
        return _output_index(self.calls, len(self.input_ids))

    @cached_property
    def cumulative(self) -> CumulativeLengths:
        """How attention reads the row in one call without masks."""
        return _cumulative_lengths(_place(self.groups, self.start), self.start)


def share_prompts(
    prompts: Sequence[npt.ArrayLike],
    completions: Sequence[npt.ArrayLike],
    images: Sequence[tuple[str, ...]] | None = None,
) -> list[PrefixGroup]:
    """Groups of the sequences that have equal prompts, in the order of their first members.

    `images` names the images that each prompt shows; None: no prompt shows any.

    Raises:
        ValueError: a prompt or a completion is empty.
    """
    shown = images if images is not None else [()] * len(prompts)
    prompt_ids = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
    completion_ids = [np.asarray(completion, dtype=np.int64) for completion in completions]
    members: dict[tuple[bytes, tuple[str, ...]], list[int]] = {}
    for sequence, (prompt, completion, own) in enumerate(
        zip(prompt_ids, completion_ids, shown, strict=True)
    ):
        if not len(prompt) or not len(completion):
            raise ValueError(
                f"sequence {sequence} has {len(prompt)} prompt and {len(completion)} completion "
                "tokens; expected ≥ 1 of each"
            )
        members.setdefault((prompt.tobytes(), own), []).append(sequence)
    groups = []
    for (_, own), sequences in members.items():
        grouped = tuple(completion_ids[sequence] for sequence in sequences)
        groups.append(PrefixGroup(prompt_ids[sequences[0]], grouped, tuple(sequences), own))
    return groups


def pack(
    groups: Sequence[PrefixGroup], max_tokens: int, *, share_start: bool = False
) -> list[SharedPrefixRow]:
    """Rows of at most `max_tokens` tokens, filled with `groups` in order.

    A group that is longer is split, and its prompt repeated. A single sequence that is longer has a
    row of its own. With `share_start` the tokens that all prompts begin with stand once in a row,
    where that is worth it.
    """
    start = _worthwhile_start(groups) if share_start else 0
    rows: list[list[PrefixGroup]] = []
    room = 0
    for group in (part for whole in groups for part in _split(whole, max_tokens)):
        if not rows or group.tokens - start > room:
            rows.append([])
            room = max_tokens - start
        rows[-1].append(group)
        room -= group.tokens - start
    return [_lay_out(row, start if len(row) > 1 else 0) for row in rows]


def _worthwhile_start(groups: Sequence[PrefixGroup]) -> int:
    """How many tokens of all prompts stand once; 0 where that saves little."""
    start = _common_start(groups)
    saved = start * (len(groups) - 1)
    return start if saved >= START_SHARE * sum(group.tokens for group in groups) else 0


def _common_start(groups: Sequence[PrefixGroup]) -> int:
    """How many tokens all prompts begin with. Each keeps one of its own, its last one.

    None where one shows images: their positions and tensors belong to whole prompts.
    """
    if not groups or any(group.images for group in groups):
        return 0
    first = groups[0].prompt_ids
    start = min(len(group.prompt_ids) for group in groups) - 1
    for group in groups[1:]:
        other = np.flatnonzero(group.prompt_ids[:start] != first[:start])
        if len(other):
            start = int(other[0])
    return start


def _split(group: PrefixGroup, max_tokens: int) -> Iterator[PrefixGroup]:
    """Parts of `group` of at most `max_tokens`, as far as whole completions allow."""
    start = 0
    used = len(group.prompt_ids)
    for index, completion in enumerate(group.completions):
        if index > start and used + len(completion) - 1 > max_tokens:
            yield group.part(start, index)
            start = index
            used = len(group.prompt_ids)
        used += len(completion) - 1
    yield group.part(start, len(group.completions))


@dataclass(frozen=True)
class _GroupPlaces:
    """Places in the packed row: of a prompt, and of each completion without its last token.

    A prompt's first places are those of the common start.
    """

    prompt: Ids
    completions: tuple[Ids, ...]

    @property
    def row(self) -> Ids:
        return np.concatenate((self.prompt, *self.completions))

    @property
    def branches(self) -> Ids:
        """0 for the prompt's tokens, i for those of completion i."""
        lengths = [len(self.prompt), *map(len, self.completions)]
        return np.repeat(np.arange(len(lengths)), lengths)


def _place(groups: Sequence[PrefixGroup], start: int) -> list[_GroupPlaces]:
    placed = []
    at = start
    for group in groups:
        lengths = [
            len(group.prompt_ids) - start,
            *(len(completion) - 1 for completion in group.completions),
        ]
        ends = at + np.cumsum(lengths)
        pieces = [np.arange(first, end) for first, end in zip([at, *ends[:-1]], ends, strict=True)]
        prompt = np.concatenate((np.arange(start), pieces[0]))
        placed.append(_GroupPlaces(prompt, tuple(pieces[1:])))
        at = int(ends[-1])
    return placed


def _lay_out(groups: Sequence[PrefixGroup], start: int) -> SharedPrefixRow:
    placed = _place(groups, start)
    inputs = [groups[0].prompt_ids[:start]]
    positions = [np.arange(start)]
    predicted_at = []
    for group, places in zip(groups, placed, strict=True):
        prompt_tokens = len(group.prompt_ids)
        inputs.append(group.prompt_ids[start:])
        positions.append(np.arange(start, prompt_tokens))
        for completion, own in zip(group.completions, places.completions, strict=True):
            inputs.append(completion[:-1])
            positions.append(prompt_tokens + np.arange(len(own)))
            # The prompt's last token predicts the completion's first.
            predicted_at.append(np.concatenate((places.prompt[-1:], own)))
    completions = [completion for group in groups for completion in group.completions]
    return SharedPrefixRow(
        input_ids=np.concatenate(inputs),
        position_ids=np.concatenate(positions),
        predicted_at=np.concatenate(predicted_at),
        targets=np.concatenate(completions),
        sequences=tuple(sequence for group in groups for sequence in group.sequences),
        lengths=tuple(map(len, completions)),
        groups=tuple(groups),
        start=start,
    )


def _output_index(calls: Sequence[AttentionCall], tokens: int) -> Ids:
    flat = np.concatenate([call.queries.ravel() for call in calls])
    index = np.zeros(tokens, dtype=np.int64)
    # Reversed, so that a token's own place wins over the padding, further on, that repeats it.
    index[flat[::-1]] = np.arange(len(flat))[::-1]
    return index


def _cumulative_lengths(placed: Sequence[_GroupPlaces], start: int) -> CumulativeLengths:
    queries = [np.arange(start)] if start else []
    keys = [*queries]
    for one in placed:
        own = [completion for completion in one.completions if len(completion)]
        queries += [one.prompt[start:], *own]
        keys += [one.prompt, *(np.concatenate((one.prompt, completion)) for completion in own)]
    query_lengths = [len(places) for places in queries]
    key_lengths = [len(places) for places in keys]
    return CumulativeLengths(
        keys=np.concatenate(keys),
        query_ends=np.cumsum([0, *query_lengths], dtype=np.int32),
        key_ends=np.cumsum([0, *key_lengths], dtype=np.int32),
        longest_query=max(query_lengths),
        longest_key=max(key_lengths),
    )


def _plan_attention(placed: Sequence[_GroupPlaces], start: int) -> tuple[AttentionCall, ...]:
    """The cheapest calls for the common start, and for each group.

    Groups of one are causal rows, short groups are masked rows, and a long group is its prompt in
    one call and its completions in another.
    """
    plain = [one for one in placed if len(one.completions) == 1]
    shared = [one for one in placed if len(one.completions) > 1]
    short = [one for one in shared if len(one.row) <= DENSE_ROW_TOKENS]
    calls = [_causal_rows([np.arange(start)], 0)] if start else []
    calls += [_causal_rows([one.row for one in rows], start) for rows in _alike(plain)]
    calls += [_masked_rows(rows, start) for rows in _alike(short)]
    for one in shared:
        if len(one.row) > DENSE_ROW_TOKENS:
            calls += _prompt_and_branches(one, start)
    return tuple(calls)


def _alike(placed: Sequence[_GroupPlaces]) -> Iterator[list[_GroupPlaces]]:
    """Groups of similar length together, longest first."""
    batch: list[_GroupPlaces] = []
    for one in sorted(placed, key=lambda one: -len(one.row)):
        if batch and len(one.row) < (1 - ROW_PADDING) * len(batch[0].row):
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def _pad(rows: Sequence[Ids]) -> Ids:
    """[b, longest], each row filled up on the right with its first entry."""
    width = max(map(len, rows))
    return np.stack([np.concatenate((row, np.full(width - len(row), row[0]))) for row in rows])


def _causal_rows(rows: Sequence[Ids], start: int) -> AttentionCall:
    """The tokens of each row from `start` on, which see the past."""
    index = _pad(rows)  # pads on the right lie in every true token's future
    if not start:
        return AttentionCall(index, index, None)
    width = index.shape[1]
    mask = np.tri(width - start, width, start, dtype=np.bool_)
    return AttentionCall(index[:, start:], index, mask[None])


def _masked_rows(batch: Sequence[_GroupPlaces], start: int) -> AttentionCall:
    index = _pad([one.row for one in batch])
    mask = _visible(batch, width=index.shape[1], first=start)
    return AttentionCall(index[:, start:], index, mask)


def _visible(batch: Sequence[_GroupPlaces], *, width: int, first: int) -> Bools:
    """[b, width − first, width]: what each row's tokens from `first` on see.

    A token sees the prompt, and the past of its own completion.
    """
    branch = np.full((len(batch), width), -1)
    for row, one in enumerate(batch):
        branch[row, : len(one.row)] = one.branches
    causal = np.tri(width - first, width, first, dtype=np.bool_)
    seen: Bools = causal & (
        (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, first:, None])
    )
    return seen


def _prompt_and_branches(one: _GroupPlaces, start: int) -> list[AttentionCall]:
    """The prompt from `start` on, then rows of completions that have all of it before them as keys.

    Several completions in one row need fewer copies of the prompt's keys. They cost a few scores
    between completions, which the mask discards: little, where the prompt is long.
    """
    prompt_call = _causal_rows([one.prompt], start)
    own = [completion for completion in one.completions if len(completion)]
    if not own:
        return [prompt_call]
    at_once = max(1, int(BRANCH_SHARE * len(one.prompt) / max(map(len, own))))
    rows = [
        _GroupPlaces(one.prompt, tuple(own[start : start + at_once]))
        for start in range(0, len(own), at_once)
    ]
    index = _pad([row.row for row in rows])
    first = len(one.prompt)
    mask = _visible(rows, width=index.shape[1], first=first)
    return [prompt_call, AttentionCall(index[:, first:], index, mask)]
