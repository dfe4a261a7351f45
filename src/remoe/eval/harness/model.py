"""Our model as one of the harness's: `remoe` in its registry, from a run, a checkpoint or an export."""

# pyright: reportMissingImports=false

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from remoe.config import check_choice
from remoe.data.chat import encode
from remoe.data.tokenizer import check_vocabulary
from remoe.errors import ConfigError
from remoe.eval.loglikelihood import Request, ScoringConfig, loglikelihoods
from remoe.model.generate import Prompt, Sampling, stream_tokens
from remoe.model.thresholds import set_thresholds
from remoe.training.loading import load
from remoe.training.saved import chat_template_of, run_of, tokenizer_of
from remoe.training.setup import pick_device

DEFAULT_LENGTH = 2048
"""The harness's own default, for exports that do not say how long their sequences were in training."""
DEFAULT_BATCH_SIZE = 16
_MAX_NEW_TOKENS = 256
_STEPS_BETWEEN_LOOKS = 8

TokenRequest = tuple[tuple[str, str] | None, Sequence[int], Sequence[int]]


@register_model("remoe")
class RemoeLM(TemplateLM):
    """The harness's view of a model: log-likelihoods of continuations, and generated text.

    `pretrained`: a run, a checkpoint or an export. `max_length`: tokens that the model reads of one request, by default
    the length it was trained with. `precision`: fp32 or bf16, by default what the run was trained in on a GPU.
    `batch_size`: requests of that length at once, shorter ones are more; auto: 16. `threshold`: the density dial.
    """

    def __init__(
        self,
        pretrained: str | Path,
        *,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | str | None = None,
        max_length: int | None = None,
        precision: str | None = None,
        threshold: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.path = path = Path(pretrained)
        run = run_of(path)
        self._device = pick_device(device or "auto")
        self.model = load(path).to(self._device)
        if threshold is not None:
            set_thresholds(self.model, float(threshold))
        self.text = tokenizer_of(path)
        check_vocabulary(self.text, self.model.config.vocab_size, fix=f"put the model's own into {path}")
        trained_in = run.config.train.precision if run and self._device.type == "cuda" else "fp32"
        self.precision = precision or trained_in
        check_choice("precision", self.precision, ("fp32", "bf16"))
        self.max_length = max_length or (run.config.data.sequence_length if run else _trained_length(path))
        self.batch_size = _batch_size(batch_size)

    @property
    def eot_token_id(self) -> int:
        """The end-of-document id, which is also the context of what has none."""
        return self.text.eod

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task does not say how many."""
        return _MAX_NEW_TOKENS

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text, or of rendered conversations; our tokenizers add none of their own."""
        return encode(self.text, string).tolist()

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps tokenised prompts by."""
        return f"{self.text.name}-{self.text.fingerprint[:12]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that the model was fine-tuned with; its name is not asked for, there is one."""
        return chat_template_of(self.path).source if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation in that template."""
        return chat_template_of(self.path).render(chat_history, add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scoring = ScoringConfig(max_length=self.max_length, batch_size=self.batch_size, precision=self.precision)
        with _bar("Scoring continuations", len(requests), disable_tqdm) as bar:
            tokens = [Request(context, continuation) for _, context, continuation in requests]
            answers: list[tuple[float, bool]] = [*loglikelihoods(self.model, tokens, scoring, bar.update)]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:  # a window of a longer text is no request of the harness
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows of `max_length` that share one token."""
        texts = [request.args[0] for request in requests]
        windows = [self._windows(text) for text in texts]
        answers = iter(self._loglikelihood_tokens([(None, *pair) for pairs in windows for pair in pairs], disable_tqdm))
        totals = [sum(total for total, _ in itertools.islice(answers, len(pairs))) for pairs in windows]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
            context_len=1,
        )  # fmt: skip
        return [make_disjoint_window(window) for window in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each prompt, up to a stop sequence; greedy unless the task samples."""
        pairs = [request.args for request in requests]
        by_length = sorted(range(len(pairs)), key=lambda place: (repr(pairs[place][1]), -len(pairs[place][0])))
        texts: dict[int, str] = {}
        with _bar("Generating", len(pairs), disable_tqdm) as bar:
            for _, alike in itertools.groupby(by_length, key=lambda place: repr(pairs[place][1])):
                for places in _batched(list(alike), self.batch_size):
                    prompts = [pairs[place][0] for place in places]
                    texts |= zip(places, self._continue(prompts, pairs[places[0]][1]), strict=True)
                    bar.update(len(places))
        for place, pair in enumerate(pairs):
            self.cache_hook.add_partial("generate_until", pair, texts[place])
        return [texts[place] for place in range(len(pairs))]

    def _continue(self, prompts: Sequence[str], options: dict[str, Any]) -> list[str]:
        known: dict[str, Any] = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        count = min(known["max_gen_toks"], self.max_length - 1)
        stops = [stop for stop in handle_stop_sequences(known["until"], eos=None) if stop]
        sampling = Sampling(
            temperature=known.get("temperature") or 0.0 if known["do_sample"] else 0.0,
            top_k=known.get("top_k"),
            top_p=known.get("top_p"),
            stop_tokens=frozenset((self.eot_token_id,)),
        )
        prompt = self._left_padded([self.tok_encode(text)[-(self.max_length - count) :] for text in prompts])
        new: list[Tensor] = []
        for token_B in stream_tokens(self.model, prompt, count, sampling):
            new.append(token_B)
            if len(new) % _STEPS_BETWEEN_LOOKS == 0 and all(_stopped(text, stops) for text in self._texts(new)):
                break
        return [postprocess_generated_text(text, stops, None) for text in self._texts(new)]

    def _left_padded(self, prompts: Sequence[list[int]]) -> Prompt:
        prompts = [ids or [self.prefix_token_id] for ids in prompts]
        width = max(map(len, prompts))
        tokens_BS = torch.tensor([[self.eot_token_id] * (width - len(ids)) + ids for ids in prompts])
        mask_BS = torch.tensor([[False] * (width - len(ids)) + [True] * len(ids) for ids in prompts])
        return Prompt(tokens_BS.to(self._device), None if mask_BS.all() else mask_BS.to(self._device))

    def _texts(self, new: Sequence[Tensor]) -> list[str]:
        rows = torch.stack(list(new), dim=1).tolist() if new else []
        return [self.text.decode(itertools.takewhile(lambda token: token != self.eot_token_id, row)) for row in rows]

    def get_model_info(self) -> dict[str, Any]:
        """What the harness keeps with its results."""
        weight = next(self.model.parameters())
        return {
            "model_num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "model_dtype": str(weight.dtype),
            "precision": self.precision,
            "max_length": self.max_length,
        }


def _bar(title: str, total: int, is_off: bool) -> Any:
    return tqdm(total=total, desc=title, disable=is_off or None)  # None: off where there is no terminal


def _trained_length(export: Path) -> int:
    """What transformers takes an export's longest sequence to be."""
    values = json.loads((export / "config.json").read_text(encoding="utf-8"))
    return values.get("max_position_embeddings", DEFAULT_LENGTH)


def _batch_size(given: int | str | None) -> int:
    if given is None or str(given).startswith("auto"):
        return DEFAULT_BATCH_SIZE
    if not str(given).isdigit() or int(given) < 1:
        raise ConfigError(f"batch_size is {given!r}, must be auto or a number from 1 on")
    return int(given)


def _batched(places: Sequence[int], size: int) -> list[Sequence[int]]:
    return [places[start : start + size] for start in range(0, len(places), size)]


def _stopped(text: str, stops: Sequence[str]) -> bool:
    return any(stop in text for stop in stops)
