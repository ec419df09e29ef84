"""An lm-eval model that gives `HFLM`'s answers in a fraction of the time.

What `HFLM` scores, and how it cuts what does not fit the context, is inherited; how it is computed differs:

- Requests that begin with the same tokens (a document's choices; the examples in front of all documents of an MMLU
  subject) share them. The requests' tokens form a prefix tree, which runs as one sequence in which every token attends
  to its own ancestors only, at its own position. A prefix that serves many such sequences is computed once and kept
  as keys and values.
- The LM head runs only at positions whose next token is scored, not at every position of the context, and for
  several forward passes together.
- Generation ends as soon as every sequence has reached one of its stop strings.

Whether a model computes the same this way is tried on a few random tokens at the start. A model that does not (its
attention has a window, its state is no cache of keys and values, its positions cannot be given) is run without
sharing, and `ScorerLM.sharing` says why.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from lm_eval import utils
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from nanophi.eval.kernels import Kernels
from nanophi.progress import progress_bar

Past = list[tuple[Tensor, Tensor]]
"""Keys and values of a prefix, per layer, each [1, key-value heads, tokens, head size]."""

ROW_TOKENS = 1024
"""Tokens of a row, about, and of a forward pass on a CPU, which keep its cores busy."""

PACK_TOKENS = 512
"""Tokens of a row behind a kept prefix. More would be spent on attention that the mask then hides."""

MAX_LOSS = 0.125
"""Share of a row's tokens that may be computed twice for the sake of dividing it."""

MIN_GAIN = 256
"""Tokens that keeping a prefix must save before it is worth a forward pass of its own."""

MIN_STEM = 256
"""Unscored tokens at the beginning of a row that are worth a forward pass of their own on a CPU."""

FILL = 16
"""Rows are filled up to a multiple of so many tokens."""

HEAD_CHUNK = 128
"""Positions whose logits are computed and held at a time: enough for the LM head to be quick, and no more memory."""


Answers = list[tuple[int, tuple[float, bool]]]
"""Of some requests: the number, the log-likelihood in nats, and whether the continuation is the greedy one."""


class TooLong(ValueError):  # noqa: N818
    """A continuation is longer than what the model can read, and cannot be scored."""


class Request:
    """A scored continuation: `tokens` are predicted at the last positions of sequence number `sequence`."""

    __slots__ = ("number", "sequence", "tokens")

    def __init__(self, number: int, sequence: int, tokens: list[int]) -> None:
        self.number, self.sequence, self.tokens = number, sequence, tokens


Range = tuple[int, int]
"""Sequences [low, high) of a forest."""


Scored = tuple[list[tuple[Request, np.ndarray]], Tensor]
"""Requests with the rows that predict their tokens, and these rows: hidden states or logits, one per place."""


class Row(NamedTuple):
    """What runs as one sequence: ranges of a forest, and how many tokens they make."""

    tokens: int
    ranges: list[Range]


class Forest:
    """Token sequences in lexicographic order, which is the order of a walk through their prefix tree.

    Args:
        sequences: each int [tokens], all different, in order.
        scored: for each sequence its first position (index of an input token) that is scored.
    """

    def __init__(self, sequences: Sequence[np.ndarray], scored: Sequence[int]) -> None:
        self.sequences, self.scored = sequences, scored
        self.shared = [0] * len(sequences)
        """How many tokens each sequence shares with the one before it."""
        for i in range(1, len(sequences)):
            common = min(len(sequences[i - 1]), len(sequences[i]))
            differs = np.flatnonzero(sequences[i - 1][:common] != sequences[i][:common])
            self.shared[i] = int(differs[0]) if len(differs) else common

    def prefix(self, low: int, high: int) -> int:
        """Tokens that sequences [low, high) share and of which none is scored."""
        tokens = min(self.shared[low + 1 : high], default=len(self.sequences[low]))
        return min(tokens, *self.scored[low:high])

    def new(self, i: int, low: int, base: int) -> int:
        """Tokens that sequence i adds to a row that begins with sequence `low`, after `base` tokens."""
        return len(self.sequences[i]) - (base if i == low else max(self.shared[i], base))

    def split(self, low: int, high: int, base: int) -> list[Range]:
        """Consecutive ranges of [low, high), each a row of about `ROW_TOKENS` tokens after the first `base`."""
        rows = []
        start = low
        total = 0
        for i in range(low, high):
            length, new = len(self.sequences[i]) - base, self.new(i, start, base)
            # A sequence that shares most of its tokens with the one before joins it even if the row gets long.
            if total and total + new > ROW_TOKENS and (2 * new > length or total + new > 2 * ROW_TOKENS):
                rows.append((start, i))
                start, total, new = i, 0, length
            total += new
        return [*rows, (start, high)]

    def children(self, low: int, high: int) -> list[Range]:
        """[low, high) divided where the least is shared."""
        least = min(self.shared[low + 1 : high])
        cuts = [i for i in range(low + 1, high) if self.shared[i] == least]
        return list(zip([low, *cuts], [*cuts, high], strict=True))

    def tokens(self, low: int, high: int, base: int) -> int:
        """Tokens of [low, high) as one row, after the first `base`."""
        return sum(self.new(i, low, base) for i in range(low, high))

    def rows(self, ranges: Sequence[Range], base: int) -> list[Row]:
        """Ranges as rows, longest first.

        Behind a kept prefix, which every row of a pass would copy, ranges are put together up to `PACK_TOKENS`.
        """
        rows = [Row(self.tokens(low, high, base), [(low, high)]) for low, high in ranges]
        if base:
            packed: list[Row] = []
            for row in rows:
                if packed and packed[-1].tokens + row.tokens <= PACK_TOKENS:
                    packed[-1] = Row(packed[-1].tokens + row.tokens, packed[-1].ranges + row.ranges)
                else:
                    packed.append(row)
            rows = packed
        return sorted(rows, key=lambda row: -row.tokens)


class Pack:
    """Sequences [low, high) of a forest as one packed sequence, without their first `base` tokens.

    Attributes:
        tokens, positions: int64 [packed tokens].
        chain: whether every token is the ancestor of the next, so that plain causal attention is right.
    """

    def __init__(self, forest: Forest, ranges: Sequence[Range], base: int) -> None:
        self.base = base
        self.paths: dict[int, np.ndarray] = {}
        tokens, positions = [], []
        self.blocks: list[tuple[int, np.ndarray]] = []
        length = 0
        for low, high in ranges:
            path = np.empty(0, dtype=np.int64)
            for i in range(low, high):
                sequence = forest.sequences[i]
                start = base if i == low else max(forest.shared[i], base)
                new = np.arange(length, length + len(sequence) - start)
                path = np.concatenate([path[: start - base], new])
                self.paths[i] = path
                self.blocks.append((len(new), path))
                tokens.append(sequence[start:])
                positions.append(np.arange(start, len(sequence)))
                length += len(new)
        self.tokens, self.positions = np.concatenate(tokens), np.concatenate(positions)
        self.chain = all(len(path) == path[-1] + 1 for _, path in self.blocks if len(path))

    def allow(self, mask: Tensor) -> None:
        """Zero the places of an additive mask [tokens, base + tokens] where a token may attend."""
        mask[: len(self.tokens), : self.base] = 0
        allowed = np.zeros((len(self.tokens), len(self.tokens)), dtype=bool)
        for count, path in self.blocks:
            if count:
                rows = path[-count:]
                allowed[rows[0] : rows[-1] + 1, path[:-count]] = True
                allowed[rows[0] : rows[-1] + 1, rows[0] : rows[-1] + 1] = np.tri(count, dtype=bool)
        where = torch.from_numpy(allowed).to(mask.device)
        mask[: len(self.tokens), self.base : self.base + len(self.tokens)].masked_fill_(where, 0)


class ScorerLM(HFLM):
    """`HFLM` for a causal language model, sooner.

    Args:
        network: any causal language model of transformers, in evaluation mode, on its device.
        tokenizer: its tokenizer.
        batch_size: rows per forward pass on a GPU. On a CPU one row of `ROW_TOKENS` keeps all cores busy, and
            more of them only cost memory.
        share: whether to share prefixes; False: every request is a row of its own.
        progress: whether to show a bar while scoring.

    Attributes:
        sharing: empty if prefixes are shared, else the reason why not.
        overflowing: requests so far that were cut from the left to fit the context.
    """

    def __init__(
        self,
        network: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        batch_size: int = 16,
        *,
        share: bool = True,
        progress: bool = True,
    ) -> None:
        super().__init__(pretrained=network, tokenizer=tokenizer, batch_size=batch_size)
        self.overflowing = 0
        self.progress = progress
        self._encoded: dict[str, list[int]] = {}
        self._kernels = Kernels(network)
        self._slim = network.get_output_embeddings() is not None
        self._plain_head = self._slim and self._logits_are_the_heads()
        self.sharing = "" if share else "switched off"
        self.sharing = self.sharing or self._why_not_shared()
        if self.sharing and self._slim:
            self._slim = self._same(self._probe(shared=False), self._probe_plain())

    # Tokens

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        if add_special_tokens is None and left_truncate_len is None and string in self._encoded:
            return self._encoded[string]
        return super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As `HFLM.loglikelihood`; the texts are encoded together, each distinct one once."""
        texts: dict[str, None] = {}
        for context, continuation in (request.args for request in requests):
            if context:
                texts[context.rstrip()] = texts[context + continuation] = None
        if self.tokenizer.is_fast and self.add_bos_token is None:
            prefix = self.tokenizer.decode(self.prefix_token_id)
            plain = [text for text in texts if text and not has_bos_prefix(text, prefix)]
            if plain:
                self._encoded = dict(zip(plain, self.tokenizer(plain)["input_ids"], strict=True))
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._encoded = {}

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As `HFLM.loglikelihood_rolling`, all windows in one go."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners = []
        for number, (text,) in enumerate(request.args for request in requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # Scores

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        for _, context, continuation in requests:
            if not context or not 0 < len(continuation) <= self.max_length:
                raise TooLong(
                    f"a continuation of {len(continuation)} tokens does not fit the model's {self.max_length}"
                )
        if not self._slim:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        # Big-endian bytes sort like the tokens, and take a ninth of a list's memory.
        windows: dict[bytes, list[tuple[int, list[int]]]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            whole = context + continuation
            self.overflowing += len(whole) > self.max_length + 1
            # From the left, as HFLM does; the last token is predicted, not read.
            window = np.array(whole[-(self.max_length + 1) :][:-1], dtype=">i4").tobytes()
            windows.setdefault(window, []).append((number, continuation))
        keys = sorted(windows)
        asked = [[Request(number, i, tokens) for number, tokens in windows[key]] for i, key in enumerate(keys)]
        sequences = [np.frombuffer(key, dtype=">i4") for key in keys]
        scored = [
            len(sequence) - max(len(request.tokens) for request in group)
            for sequence, group in zip(sequences, asked, strict=True)
        ]
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = progress_bar(len(requests), "scoring", unit=" requests", disable=not self.progress)
        for answers in self._score(Forest(sequences, scored), asked):
            for number, answer in answers:
                results[number] = answer
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
            bar.update(len(answers))
        bar.close()
        return results

    def _score(self, forest: Forest, asked: Sequence[Sequence[Request]]) -> Iterator[Answers]:
        everything = (0, len(forest.sequences))
        if self.sharing:
            scored = self._run(forest, forest.rows([(i, i + 1) for i in range(everything[1])], 0), 0, None, asked)
        else:
            scored = self._descend(forest, [everything] if everything[1] else [], 0, None, asked)
        waiting: list[Scored] = []
        for one in scored:
            waiting.append(one)
            if sum(len(states) for _, states in waiting) >= HEAD_CHUNK:
                yield self._answers(waiting)
                waiting = []
                if self.device.type == "cpu":
                    _trim()
        if waiting:
            yield self._answers(waiting)

    @torch.inference_mode()
    def _answers(self, scored: Sequence[Scored]) -> Answers:
        """The answers to requests whose last hidden states are known."""
        offsets = np.cumsum([0, *(len(states) for _, states in scored)])
        requests = [
            (request, places + offset)
            for (found, _), offset in zip(scored, offsets, strict=False)
            for request, places in found
        ]
        rows = np.concatenate([places for _, places in requests])
        tokens = np.concatenate([request.tokens for request, _ in requests])
        order = np.argsort(rows, kind="stable")
        scores, hits = np.zeros(len(rows)), np.zeros(len(rows), dtype=bool)
        states = torch.cat([states for _, states in scored])
        for start in range(0, len(states), HEAD_CHUNK):
            logits = self._logits(states[start : start + HEAD_CHUNK])
            low, high = np.searchsorted(rows[order], [start, start + len(logits)])
            chosen = order[low:high]
            index = torch.from_numpy(np.stack([rows[chosen] - start, tokens[chosen]])).to(logits.device)
            values = logits[index[0], index[1]]
            hits[chosen] = (logits.argmax(dim=-1)[index[0]] == index[1]).cpu().numpy()
            # logits.logsumexp(dim=-1) without a second matrix of that size
            largest = logits.amax(dim=-1)
            totals = logits.sub_(largest[:, None]).exp_().sum(dim=-1).log_().add_(largest)
            scores[chosen] = (values - totals[index[0]]).double().cpu().numpy()
        answers = []
        start = 0
        for request, places in requests:
            end = start + len(places)
            answers.append((request.number, (float(scores[start:end].sum()), bool(hits[start:end].all()))))
            start = end
        return answers

    @torch.inference_mode()
    def _logits(self, states: Tensor) -> Tensor:
        """What `_forward` returned, [places, hidden or vocabulary], as logits [places, vocabulary] in float32."""
        if not self._plain_head:
            return states.float()
        with self._kernels():
            return self.model.get_output_embeddings()(states[None])[0].float()

    def _descend(
        self, forest: Forest, ranges: list[Range], base: int, past: Past | None, asked: Sequence[Sequence[Request]]
    ) -> Iterator[Scored]:
        """Score sequences that share their first `base` tokens, whose keys and values are `past`.

        A range that takes several rows and shares more tokens has those computed first, and goes on from there. One
        that shares little is divided: in rows of their own, sequences do not waste attention on each other.
        """
        small: list[Range] = []
        while ranges:
            low, high = ranges.pop()
            prefix, rows = forest.prefix(low, high), len(forest.split(low, high, base))
            # A long unscored beginning by itself needs no mask and no more of the last layer than keys and values.
            stem = rows == 1 and self.device.type == "cpu" and prefix - base >= MIN_STEM
            if stem or (rows - 1) * (prefix - base) >= MIN_GAIN:
                longer = self._extend(forest.sequences[low][base:prefix], base, past)
                yield from self._descend(forest, [(low, high)], prefix, longer, asked)
                continue
            if high - low == 1:
                small.append((low, high))
                continue
            children = forest.children(low, high)
            lost = (len(children) - 1) * (forest.shared[children[1][0]] - base)
            if rows > 1 or lost < MAX_LOSS * forest.tokens(low, high, base):
                ranges += children
            else:
                small.append((low, high))
        yield from self._run(forest, forest.rows(small, base), base, past, asked)

    def _run(
        self,
        forest: Forest,
        rows: list[Row],
        base: int,
        past: Past | None,
        asked: Sequence[Sequence[Request]],
    ) -> Iterator[Scored]:
        """Forward passes over rows, which stand longest first."""
        tokens = ROW_TOKENS * (1 if self.device.type == "cpu" else self.batch_size)
        while rows:
            count = max(1, tokens // rows[0].tokens)
            packs = [Pack(forest, row.ranges, base) for row in rows[:count]]
            rows = rows[count:]
            places = []
            for pack in packs:
                longest = {i: max(len(request.tokens) for request in asked[i]) for i in pack.paths}
                places.append(sorted({p for i, path in pack.paths.items() for p in path[-longest[i] :].tolist()}))
            states = self._forward(packs, past, places)
            for pack, chosen, part in zip(packs, places, states.split([len(c) for c in places]), strict=True):
                yield (
                    [
                        (request, np.searchsorted(chosen, path[-len(request.tokens) :]))
                        for i, path in pack.paths.items()
                        for request in asked[i]
                    ],
                    part,
                )

    @torch.inference_mode()
    def _forward(self, packs: Sequence[Pack], past: Past | None, places: Sequence[Sequence[int]]) -> Tensor:
        """Last hidden states [places of all packs, hidden] of the packed sequences; or their logits, if the model
        does more than apply its LM head to them.
        """
        base = packs[0].base
        length = self._filled(max(len(pack.tokens) for pack in packs), base)
        ids = np.zeros((len(packs), length), dtype=np.int64)
        for row, pack in enumerate(packs):
            ids[row, : len(pack.tokens)] = pack.tokens
        arguments: dict[str, Any] = {"input_ids": torch.from_numpy(ids).to(self.device), "use_cache": past is not None}
        if past is not None:
            # A cache of its own, which begins with the prefix in every row and leaves `past` as it is.
            rows_of = [
                (keys.expand(len(packs), -1, -1, -1), values.expand(len(packs), -1, -1, -1)) for keys, values in past
            ]
            arguments["past_key_values"] = DynamicCache(rows_of)
        if not all(pack.chain for pack in packs):
            # Rows are filled up on the right, where causal attention does not look; only a tree needs a mask.
            dtype = self.model.dtype
            mask = torch.full((len(packs), 1, length, base + length), torch.finfo(dtype).min, dtype=dtype)
            positions = np.zeros_like(ids)
            for row, pack in enumerate(packs):
                pack.allow(mask[row, 0])
                positions[row, : len(pack.tokens)] = pack.positions
            arguments["attention_mask"] = mask.to(self.device)
            arguments["position_ids"] = torch.from_numpy(positions).to(self.device)
        rows = [row for row, chosen in enumerate(places) for _ in chosen]
        columns = [column for chosen in places for column in chosen]
        places_of = torch.tensor([rows, columns], device=self.device)
        states: list[Tensor] = []

        def select(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            states.append(inputs[0][places_of[0], places_of[1]])
            if self._plain_head:
                raise _Complete
            return (states[0][None], *inputs[1:])

        handle = self.model.get_output_embeddings().register_forward_pre_hook(select)
        try:
            with self._kernels():
                return self.model(**arguments).logits[0]
        except _Complete:
            return states[0]
        finally:
            handle.remove()

    @torch.inference_mode()
    def _extend(self, tokens: np.ndarray, base: int, past: Past | None) -> Past:
        """Keys and values of a prefix of `base` tokens (`past`) and `tokens` after it."""
        cache = _PrefixCache(past, last_layer=self.model.config.num_hidden_layers - 1)
        ids = np.zeros((1, self._filled(len(tokens), base)), dtype=np.int64)
        ids[0, : len(tokens)] = tokens
        with contextlib.suppress(_Complete), self._kernels():
            self.model(input_ids=torch.from_numpy(ids).to(self.device), past_key_values=cache, use_cache=True)
        end = base + len(tokens)
        return [(keys[:, :, :end], values[:, :, :end]) for keys, values, _ in cache]

    def _filled(self, tokens: int, base: int) -> int:
        """The length that a row of `tokens` after `base` others is filled up to.

        oneDNN keeps compiled code for every number of rows that it has seen, and memory is reused best in few sizes.
        """
        return max(tokens, min(-(-tokens // FILL) * FILL, self.max_length - base))

    # Whether prefixes can be shared

    @torch.inference_mode()
    def _logits_are_the_heads(self) -> bool:
        """Whether the model gives out what its LM head computes, with nothing done to it (a soft cap, say)."""
        made: list[Tensor] = []
        handle = self.model.get_output_embeddings().register_forward_hook(
            lambda _, __, output: made.append(output.float().clone())
        )
        try:
            logits = self.model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.device)).logits
        finally:
            handle.remove()
        return len(made) == 1 and made[0].shape == logits.shape and torch.equal(made[0], logits.float())

    def _why_not_shared(self) -> str:
        """Empty if the model computes the same with shared prefixes; else the reason, for a person."""
        if not self._slim:
            return "the model has no separate output layer"
        if window := _attention_window(self.model.config, self.max_length):
            return f"its attention sees only {window} tokens back"
        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            return "its positions cannot be given"
        try:
            cache = self.model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.device)).past_key_values
            if not isinstance(cache, DynamicCache) or {type(layer) for layer in cache.layers} != {DynamicLayer}:
                return "its state is no plain cache of keys and values"
            if not self._same(self._probe(shared=True), self._probe_plain()):
                return "with a shared prefix it computes something else"
        except Exception as error:  # whatever a model of any kind does with masks that it does not expect
            return f"with a shared prefix it fails ({type(error).__name__})"
        return ""

    def _probe_sequences(self) -> list[tuple[int, ...]]:
        generator = np.random.default_rng(0)
        tokens = generator.integers(0, self.model.get_input_embeddings().num_embeddings, 24).tolist()
        prefix, middle = tuple(tokens[:8]), tuple(tokens[8:12])
        return sorted([(*prefix, *middle, *tokens[12:16]), (*prefix, *middle, *tokens[16:19]), (*prefix, *tokens[19:])])

    def _probe(self, *, shared: bool) -> Tensor:
        """Logits of the last two positions of some sequences [6, vocabulary], the way they would be scored."""
        sequences = self._probe_sequences()
        forest = Forest([np.array(s) for s in sequences], [len(sequence) - 2 for sequence in sequences])
        if not shared:
            packs = [Pack(forest, [(i, i + 1)], 0) for i in range(3)]
            ends = [self._forward([pack], None, [list(pack.paths[i][-2:])]) for i, pack in enumerate(packs)]
            return self._logits(torch.cat(ends))
        prefix = forest.prefix(0, 3)
        past = self._extend(forest.sequences[0][: prefix - 3], 0, None)
        past = self._extend(forest.sequences[0][prefix - 3 : prefix], prefix - 3, past)
        pack = Pack(forest, [(0, 3)], prefix)
        return self._logits(
            self._forward([pack], past, [[place for i in range(3) for place in pack.paths[i][-2:].tolist()]])
        )

    @torch.inference_mode()
    def _probe_plain(self) -> Tensor:
        rows = (torch.tensor([sequence], device=self.device) for sequence in self._probe_sequences())
        return torch.cat([self.model(input_ids=row).logits[0, -2:] for row in rows])

    def _same(self, ours: Tensor, theirs: Tensor) -> bool:
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 0.25
        return ours.shape == theirs.shape and bool((ours.float() - theirs.float()).abs().max() <= tolerance)

    # Generation

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """As in `HFLM`, except that a row is done at the first of its stop strings, whatever the other rows do.

        All of a prompt but its last token is computed row by row, into a cache of the full length: a batch of prompts
        at once takes more memory and no less time on a CPU, and a cache that grows is copied for every token.
        """
        temperature = generation_kwargs.setdefault("temperature", 0.0)
        if temperature == 0.0 and not generation_kwargs.get("do_sample"):
            generation_kwargs["do_sample"] = False
            del generation_kwargs["temperature"]
        if not self.sharing and self.device.type == "cpu":
            generation_kwargs["past_key_values"] = self._prompts(
                context, generation_kwargs["attention_mask"], max_length
            )
        with self._kernels():
            return self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=transformers.StoppingCriteriaList(
                    [_StopStrings(self.tokenizer, stop, context.shape[1])]
                ),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                **generation_kwargs,
            )

    def _prompts(self, context: Tensor, attention_mask: Tensor, max_length: int) -> DynamicCache:
        """Keys and values of left-padded prompts [rows, tokens] but for the last token of each."""
        cache = DynamicCache()
        layers = [_Room() for _ in range(self.model.config.num_hidden_layers)]
        cache.layers = list(layers)
        for row, (tokens, mask) in enumerate(zip(context.numpy(), attention_mask.numpy(), strict=True)):
            prompt = tokens[mask.argmax() : -1]
            if not len(prompt):
                continue
            for layer, (keys, values) in zip(layers, self._extend(prompt, 0, None), strict=True):
                layer.put(keys, values, row, len(context), len(tokens) - 1, max_length)
        return cache


class _Room(DynamicLayer):
    """A layer's keys and values in memory for all tokens that will come."""

    def put(self, keys: Tensor, values: Tensor, row: int, rows: int, tokens: int, max_length: int) -> None:
        """Fill a row's last of the first `tokens` places with keys and values [1, heads, prompt, head size]."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.room = [x.new_zeros(rows, x.shape[1], max_length, x.shape[3]) for x in (keys, values)]
            self.keys, self.values = (x[:, :, :tokens] for x in self.room)
        for whole, new in zip(self.room, (keys, values), strict=True):
            whole[row, :, tokens - new.shape[2] : tokens] = new[0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for whole, new in zip(self.room, (key_states, value_states), strict=True):
            whole[:, :, start:end] = new
        self.keys, self.values = (whole[:, :, :end] for whole in self.room)
        return self.keys, self.values


def _trim() -> None:
    """Give freed memory back to the system: passes of ever other lengths leave holes that nothing fits into."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)


class _StopStrings(transformers.StoppingCriteria):
    """Which rows hold one of some strings in what was generated."""

    def __init__(self, tokenizer: Any, strings: list[str], start: int) -> None:
        self.tokenizer, self.strings, self.start = tokenizer, strings, start
        # Two more tokens than the longest needs: the same text may be generated in other tokens (as HFLM does).
        self.tail = 2 + max((len(tokenizer.encode(s, add_special_tokens=False)) for s in strings), default=0)
        self.done: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if self.done is None:
            self.done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        tails = self.tokenizer.batch_decode(input_ids[:, self.start :][:, -self.tail :])
        found = [any(string in tail for string in self.strings) for tail in tails]
        self.done = self.done | torch.tensor(found, device=input_ids.device)
        return self.done


def _attention_window(config: Any, max_length: int) -> int | None:
    """Tokens that some layer can look back, if those are fewer than the context."""
    config = config.get_text_config(decoder=True)
    if getattr(config, "use_sliding_window", True) is False:
        return None
    windows = (getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_window"))
    return min((window for window in windows if isinstance(window, int) and window < max_length), default=None)


class _Complete(Exception):  # noqa: N818  # it is none
    """Ends a forward pass when all that is wanted of it is known."""


class _PrefixCache(DynamicCache):
    """Takes in a prefix's keys and values. What the last layer would do with them, a prefix does not need."""

    def __init__(self, past: Past | None, last_layer: int) -> None:
        super().__init__(past)
        self.last_layer = last_layer

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        result = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self.last_layer:
            raise _Complete
        return result
