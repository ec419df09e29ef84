"""An lm-eval model that gives `HFLM`'s answers, with its way of cutting prompts, in a fraction of the time.

Requests that begin with the same tokens share them: their prefix tree runs as one sequence, long ones are cached. The
LM head runs only where the next token is scored. Generation ends once every sequence has reached a stop string. A model
that does not compute the same this way (probing.py tries it at the start) is run without sharing.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from lm_eval import utils
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix
from torch import Tensor
from transformers.cache_utils import DynamicCache

from nanophi.core.progress import progress_bar
from nanophi.eval.catalogue import TASKS, too_long
from nanophi.eval.generation import PreallocatedLayer, StopStrings, mark_not_ended
from nanophi.eval.kernels import Kernels, trim
from nanophi.eval.prefix_tree import ROW_TOKENS, PackedRow, Past, PrefixCache, PrefixTree, Range, RowPlan, StopForward
from nanophi.eval.probing import logits_are_the_heads, same_logits, why_not_shared

MAX_LOSS = 0.125  # share of a row's tokens that may be computed twice in order to divide it
MIN_GAIN = 256  # tokens that caching a prefix must save to be worth a forward pass of its own
MIN_STEM = 256  # unscored tokens at the start of a row that are worth a forward pass of their own on a CPU
PAD_TO = 16  # rows are padded to a multiple of this many tokens
HEAD_CHUNK = 128  # positions whose logits are computed at a time: more take memory, fewer make the LM head slow

Answers = list[tuple[int, tuple[float, bool]]]
"""Request number, its log-likelihood in nats, and whether the continuation is the greedy one."""


class NotScorable(ValueError):  # noqa: N818
    """An item's prompt or answer is empty, or its answer longer than the model's context."""


class Request(NamedTuple):
    """A continuation to be scored: its request's number, and the tokens predicted at a sequence's last positions."""

    number: int
    tokens: list[int]


Scored = tuple[list[tuple[Request, np.ndarray]], Tensor]
"""Requests with the indices of what predicts their tokens, in hidden states or logits [positions, ...]."""


class ScorerLM(HFLM):
    """`HFLM` for a causal language model, faster.

    `batch_size` is rows per forward pass on a GPU; on a CPU one row of `ROW_TOKENS` keeps all cores busy.

    Attributes:
        unshared_because: why prefixes are not shared; empty if they are.
        sparse_head: whether the LM head runs only where a token is scored; otherwise everything is left to `HFLM`.
        plain_head: whether the model's logits are what its LM head computes, with nothing done to them.
        overflowing: number of requests so far that were cut from the left to fit the context.
    """

    def __init__(self, network: Any, tokenizer: Any, batch_size: int = 16) -> None:
        super().__init__(pretrained=network, tokenizer=tokenizer, batch_size=batch_size)
        self.overflowing = 0
        self._encoded: dict[str, list[int]] = {}
        self._kernels = Kernels(network)
        self.sparse_head = network.get_output_embeddings() is not None
        self.plain_head = self.sparse_head and logits_are_the_heads(network)
        self.unshared_because = why_not_shared(self)
        if self.unshared_because and self.sparse_head:
            self.sparse_head = same_logits(self, shared=False)

    # Tokens

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, *args: Any, **kwargs: Any) -> list[int]:
        if add_special_tokens is None and not args and not kwargs and string in self._encoded:
            return self._encoded[string]
        return super().tok_encode(string, add_special_tokens, *args, **kwargs)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Like `HFLM.loglikelihood`, but the texts are encoded together, each distinct one once."""
        tasks = {getattr(request, "task_name", None) for request in requests}
        if all(task in TASKS and TASKS[task].cut_apart for task in tasks):
            encoded = [(r.args, *(self.tok_encode(text, False) for text in r.args)) for r in requests]
            return self._loglikelihood_tokens(encoded, disable_tqdm)
        if self.tokenizer.is_fast and self.add_bos_token is None:
            prefix = self.tokenizer.decode(self.prefix_token_id)
            pairs = [request.args for request in requests if request.args[0]]
            texts = dict.fromkeys(text for a, b in pairs for text in (a.rstrip(), a + b))
            if plain := [text for text in texts if text and not has_bos_prefix(text, prefix)]:
                self._encoded = dict(zip(plain, self.tokenizer(plain)["input_ids"], strict=True))
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._encoded = {}

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Like `HFLM.loglikelihood_rolling`, but all windows are scored together."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += value
        return totals

    # Scores

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        for _, context, continuation in requests:
            if not context or not continuation:
                raise NotScorable(f"the {'answer' if context else 'prompt'} of an item is empty")
            if problem := too_long(f"an answer has {len(continuation)} tokens", len(continuation), self.max_length):
                raise NotScorable(problem)
        if not self.sparse_head:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        # Big-endian bytes sort like the tokens, and take a ninth of a list's memory.
        windows: dict[bytes, list[Request]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            whole = context + continuation
            self.overflowing += len(whole) > self.max_length + 1
            # From the left, as HFLM does; the last token is predicted, not read.
            window = np.array(whole[-(self.max_length + 1) :][:-1], dtype=">i4").tobytes()
            windows.setdefault(window, []).append(Request(number, continuation))
        sequences = [np.frombuffer(key, dtype=">i4") for key in sorted(windows)]
        asked = [windows[key] for key in sorted(windows)]
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = progress_bar(len(requests), "scoring", unit=" requests")
        scored = [max(len(request.tokens) for request in group) for group in asked]
        for answers in self._score(PrefixTree(sequences, scored, asked)):
            for number, answer in answers:
                results[number] = answer
            bar.update(len(answers))
        bar.close()
        return results

    def _score(self, tree: PrefixTree) -> Iterator[Answers]:
        count = len(tree.sequences)
        if self.unshared_because:
            scored = self._run(tree, tree.rows([(i, i + 1) for i in range(count)], 0), 0, None)
        else:
            scored = self._descend(tree, [(0, count)] if count else [], 0, None)
        waiting: list[Scored] = []
        for one in scored:
            waiting.append(one)
            if sum(len(states) for _, states in waiting) >= HEAD_CHUNK:
                yield self._answers(waiting)
                waiting = []
                if self.device.type == "cpu":
                    trim()
        if waiting:
            yield self._answers(waiting)

    @torch.inference_mode()
    def _answers(self, scored: Sequence[Scored]) -> Answers:
        """Answers to the requests whose last hidden states have been computed."""
        offsets = np.cumsum([0, *(len(states) for _, states in scored)])
        found = [(*pair, offset) for (pairs, _), offset in zip(scored, offsets, strict=False) for pair in pairs]
        requests = [(request, positions + offset) for request, positions, offset in found]
        rows = np.concatenate([positions for _, positions in requests])
        tokens = np.concatenate([request.tokens for request, _ in requests])
        order = np.argsort(rows, kind="stable")
        scores, hits = np.zeros(len(rows)), np.zeros(len(rows), dtype=bool)
        states = torch.cat([states for _, states in scored])
        for start in range(0, len(states), HEAD_CHUNK):
            logits = self.logits(states[start : start + HEAD_CHUNK])
            low, high = np.searchsorted(rows[order], [start, start + len(logits)])
            chosen = order[low:high]
            index = torch.from_numpy(np.stack([rows[chosen] - start, tokens[chosen]])).to(logits.device)
            values = logits[index[0], index[1]]
            hits[chosen] = (logits.argmax(dim=-1)[index[0]] == index[1]).cpu().numpy()
            # logits.logsumexp(dim=-1) without a second matrix of that size
            largest = logits.amax(dim=-1)
            totals = logits.sub_(largest[:, None]).exp_().sum(dim=-1).log_().add_(largest)
            scores[chosen] = (values - totals[index[0]]).double().cpu().numpy()
        ends = np.cumsum([len(positions) for _, positions in requests])[:-1]
        return [
            (request.number, (float(score.sum()), bool(hit.all())))
            for (request, _), score, hit in zip(requests, np.split(scores, ends), np.split(hits, ends), strict=True)
        ]

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """What `forward` returned, [positions, hidden or vocabulary], as logits [positions, vocabulary] in float32."""
        if not self.plain_head:
            return states.float()
        with self._kernels():
            return self.model.get_output_embeddings()(states[None])[0].float()

    def _descend(self, tree: PrefixTree, ranges: list[Range], base: int, past: Past | None) -> Iterator[Scored]:
        """Score sequences that share their first `base` tokens, whose keys and values are `past`.

        If a range takes several rows and shares more tokens, those are computed and cached first. A range that shares
        little is divided, so that sequences do not waste attention on each other.
        """
        small: list[Range] = []
        while ranges:
            low, high = ranges.pop()
            prefix, rows = tree.prefix(low, high), len(tree.split(low, high, base))
            # A long unscored start needs no mask, and only keys and values of the last layer.
            stem = rows == 1 and self.device.type == "cpu" and prefix - base >= MIN_STEM
            if stem or (rows - 1) * (prefix - base) >= MIN_GAIN:
                longer = self.extend(tree.sequences[low][base:prefix], base, past)
                yield from self._descend(tree, [(low, high)], prefix, longer)
                continue
            if high - low == 1:
                small.append((low, high))
                continue
            children = tree.children(low, high)
            lost = (len(children) - 1) * (tree.shared[children[1][0]] - base)
            if rows > 1 or lost < MAX_LOSS * tree.tokens(low, high, base):
                ranges += children
            else:
                small.append((low, high))
        yield from self._run(tree, tree.rows(small, base), base, past)

    def _run(self, tree: PrefixTree, rows: list[RowPlan], base: int, past: Past | None) -> Iterator[Scored]:
        """Forward passes over rows, which come longest first."""
        tokens = ROW_TOKENS * (1 if self.device.type == "cpu" else self.batch_size)
        while rows:
            count = max(1, tokens // rows[0].tokens)
            batch = [PackedRow(tree, row.ranges, base) for row in rows[:count]]
            rows = rows[count:]
            of = [{j for i, path in row.paths.items() for j in path[-tree.scored[i] :].tolist()} for row in batch]
            scored = [sorted(positions) for positions in of]
            states = self.forward(batch, past, scored)
            for row, chosen, part in zip(batch, scored, states.split([len(c) for c in scored]), strict=True):
                asked = [(request, path) for i, path in row.paths.items() for request in tree.requests[i]]
                yield [(x, np.searchsorted(chosen, path[-len(x.tokens) :])) for x, path in asked], part

    @torch.inference_mode()
    def forward(self, batch: Sequence[PackedRow], past: Past | None, scored: Sequence[Sequence[int]]) -> Tensor:
        """A forward pass over packed rows of one tree, which share their first `base` tokens (`past`).

        `scored` has for each row the indices of its tokens whose next token is scored. Returns their last hidden states
        [scored tokens of all rows, hidden]; or their logits, if the model does more than apply its LM head to them.
        """
        base = batch[0].base
        length = self._padded(max(len(row.tokens) for row in batch), base)
        ids = np.zeros((len(batch), length), dtype=np.int64)
        for number, row in enumerate(batch):
            ids[number, : len(row.tokens)] = row.tokens
        arguments: dict[str, Any] = {"input_ids": torch.from_numpy(ids).to(self.device), "use_cache": past is not None}
        if past is not None:
            # A cache of its own, which starts with the prefix in every row and leaves `past` unchanged.
            layers = [tuple(x.expand(len(batch), -1, -1, -1) for x in layer) for layer in past]
            arguments["past_key_values"] = DynamicCache(layers)
        if not all(row.chain for row in batch):
            # Rows are padded on the right, where causal attention does not look; only a tree needs a mask.
            dtype = self.model.dtype
            mask = torch.full((len(batch), 1, length, base + length), torch.finfo(dtype).min, dtype=dtype)
            positions = np.zeros_like(ids)
            for number, row in enumerate(batch):
                row.allow(mask[number, 0])
                positions[number, : len(row.tokens)] = row.positions
            arguments["attention_mask"] = mask.to(self.device)
            arguments["position_ids"] = torch.from_numpy(positions).to(self.device)
        pairs = [(number, column) for number, chosen in enumerate(scored) for column in chosen]
        indices = torch.tensor(pairs, device=self.device).T
        states: list[Tensor] = []

        def select(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            states.append(inputs[0][indices[0], indices[1]])
            if self.plain_head:
                raise StopForward
            return (states[0][None], *inputs[1:])

        handle = self.model.get_output_embeddings().register_forward_pre_hook(select)
        try:
            with self._kernels():
                return self.model(**arguments).logits[0]
        except StopForward:
            return states[0]
        finally:
            handle.remove()

    @torch.inference_mode()
    def extend(self, tokens: np.ndarray, base: int, past: Past | None) -> Past:
        """Keys and values of a prefix: of its first `base` tokens (`past`), and of `tokens` after them."""
        cache = PrefixCache(past, last_layer=self.model.config.num_hidden_layers - 1)
        ids = np.zeros((1, self._padded(len(tokens), base)), dtype=np.int64)
        ids[0, : len(tokens)] = tokens
        with contextlib.suppress(StopForward), self._kernels():
            self.model(input_ids=torch.from_numpy(ids).to(self.device), past_key_values=cache, use_cache=True)
        end = base + len(tokens)
        return [(keys[:, :, :end], values[:, :, :end]) for keys, values, _ in cache]

    def _padded(self, tokens: int, base: int) -> int:
        """What a row of `tokens` after `base` others is padded to: oneDNN keeps compiled code for every length."""
        return max(tokens, min(-(-tokens // PAD_TO) * PAD_TO, self.max_length - base))

    # Generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Like `HFLM.generate_until`."""
        self._generated = progress_bar(len(requests), "generating", unit=" answers", disable=disable_tqdm)
        try:
            return super().generate_until(requests, disable_tqdm=True)
        finally:
            self._generated.close()

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """Like in `HFLM`, except that a row ends at the first of its stop strings, whatever the other rows do.

        Prompts without their last token are computed row by row, into a cache of the final length: on a CPU a batch of
        prompts takes more memory and as much time, and a growing cache is copied for every token.
        """
        mark, start = generation_kwargs.pop("mark_not_ended", False), context.shape[1]
        beams = generation_kwargs.get("num_beams", self.model.generation_config.num_beams)
        # Beams change places, which neither our cache nor our stop strings follow.
        generate = super()._model_generate if (beams or 1) > 1 else self._generate
        tokens = generate(context, max_length, stop, **generation_kwargs)
        self._generated.update(len(context))
        return mark_not_ended(tokens, start, self.tokenizer) if mark else tokens

    def _generate(self, context: Tensor, max_length: int, stop: list[str], **arguments: Any) -> Tensor:
        if arguments.setdefault("temperature", 0.0) == 0.0 and not arguments.get("do_sample"):
            arguments["do_sample"] = False
            del arguments["temperature"]
        if not self.unshared_because and self.device.type == "cpu" and context.shape[1] > 1:
            arguments["past_key_values"] = self._prompts(context, arguments["attention_mask"], max_length)
        criterion = StopStrings(self.tokenizer, stop, context.shape[1])
        with self._kernels():
            return self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=transformers.StoppingCriteriaList([criterion]),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                **arguments,
            )

    def _prompts(self, context: Tensor, attention_mask: Tensor, max_length: int) -> DynamicCache:
        """Keys and values of left-padded prompts [rows, tokens], without the last token of each."""
        cache = DynamicCache()
        layers = [PreallocatedLayer() for _ in range(self.model.config.num_hidden_layers)]
        cache.layers = list(layers)
        for row, (tokens, mask) in enumerate(zip(context.numpy(), attention_mask.numpy(), strict=True)):
            prompt = tokens[mask.argmax() : -1]
            if not len(prompt):
                continue
            for layer, (keys, values) in zip(layers, self.extend(prompt, 0, None), strict=True):
                layer.put(keys, values, row, len(context), len(tokens) - 1, max_length)
        return cache
