"""From a run's folder to a RunRecord: load its newest checkpoint and watch it read and write validation text."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from remoe.analysis.collect import TextCounts, collect
from remoe.analysis.metrics import Metrics, thinned
from remoe.analysis.record import Generation, Passage, RunRecord
from remoe.config import to_dict, to_yaml
from remoe.data import Corpus, Tokenizer, load_saved_tokenizer, open_corpus, validation_batches
from remoe.data.dataset import AnyDataset
from remoe.errors import CheckpointError, DataError
from remoe.eval.density import DensityCurve, load_curve
from remoe.model import ReMoEForCausalLM
from remoe.model.size import parameter_count
from remoe.moe import stats
from remoe.training import Run, checkpoint, load
from remoe.training.run import DENSITY, TOKENIZER

COUNTED_TOKENS = 200_000
PASSAGE_TOKENS = 240
PROMPT_TOKENS = 48
NEW_TOKENS = 160
LEAST_TOKENS = 16
LONGEST_CHARACTER = 4  # bytes of UTF-8, so tokens at most
SHOWN_DOMAINS = 6


def examine_all(paths: Sequence[Path]) -> list[RunRecord]:
    """Everything a report needs of some runs; text that several of them read is opened once."""
    corpora: dict[str, Corpus] = {}
    return [examine(path, corpora) for path in paths]


def examine(path: Path, corpora: dict[str, Corpus]) -> RunRecord:
    """Everything a report needs of one run; `corpora` keeps opened text by its settings.

    A folder without checkpoints, such as one kept for its figures, is known by its log alone. Raises CheckpointError
    for a folder that is not a run or has no step logged, DataError if its text has gone or was tokenised differently.
    """
    run = Run.open(path)
    rows = run.metrics()
    if not rows:
        raise CheckpointError(f"{path} has logged no step yet; train it first: remoe train {path}/config.yaml --resume")
    if not checkpoint.paths(run.checkpoints):
        return _logged(run, thinned(rows))
    corpus, tokenizer = _corpus(run, corpora)
    model = load(path).to(_device(run.config.train.device))
    size = parameter_count(model.config)
    counts = _counts(model, run, corpus.validation)
    starts = list(document_starts(corpus.validation, max(PASSAGE_TOKENS, PROMPT_TOKENS)))
    return RunRecord(
        name=run.config.name,
        router="dense" if counts is None else model.config.moe.router_name,
        config=to_dict(run.config),
        corpus=corpus.manifest,
        total_parameters=size.total,
        active_parameters=size.active,
        metrics=thinned(rows),
        counts=counts,
        token_texts=() if counts is None else tuple(tokenizer.token_text(int(i)) for i in counts.token_ids_U),
        passages=() if counts is None else tuple(passage(model, tokenizer, *start) for start in starts),
        generations=tuple(generate(model, tokenizer, starts)),
        density=_density(run),
    )


def _density(run: Run) -> DensityCurve | None:
    """What `remoe density` measured of the run, if it did."""
    path = run.path / DENSITY
    return load_curve(path) if path.is_file() else None


def _logged(run: Run, metrics: Metrics) -> RunRecord:
    """What the log says of a run whose model is not there."""
    model = run.config.model
    size = parameter_count(model)
    return RunRecord(
        name=run.config.name,
        router=model.moe.router_name if model.num_moe_layers else "dense",
        config=to_dict(run.config),
        corpus={},
        total_parameters=size.total,
        active_parameters=size.active,
        metrics=metrics,
        counts=None,
        token_texts=(),
        passages=(),
        generations=(),
        density=_density(run),
    )


def document_starts(dataset: AnyDataset, num_tokens: int) -> Iterator[tuple[str, np.ndarray]]:
    """For each domain its name and the start of its first document that is long enough, or of its longest.

    A domain without a document worth showing is left out.
    """
    lengths_D, domain_D = np.asarray(dataset.lengths), np.asarray(dataset.domain_of_document)
    for index, name in enumerate(dataset.domains[:SHOWN_DOMAINS]):
        members = np.flatnonzero(domain_D == index)
        if not len(members) or lengths_D[members].max() < LEAST_TOKENS:
            continue
        long_enough = members[lengths_D[members] >= num_tokens]
        chosen = long_enough[0] if len(long_enough) else members[np.argmax(lengths_D[members])]
        yield name, dataset.document(int(chosen))[:num_tokens]


@torch.inference_mode()
def passage(model: ReMoEForCausalLM, tokenizer: Tokenizer, domain: str, ids_T: np.ndarray) -> Passage:
    """How many experts each token of a text uses in each MoE layer."""
    device = next(model.parameters()).device
    routings = model(torch.as_tensor(ids_T, dtype=torch.int64, device=device)[None]).routings
    active_LT = torch.stack([stats.active_per_token(routing) for routing in routings if routing is not None])
    texts = tuple(pieces(tokenizer, ids_T.tolist()))
    return Passage(domain=domain, tokens=texts, active_TL=active_LT.T.cpu().numpy())


def generate(
    model: ReMoEForCausalLM, tokenizer: Tokenizer, starts: Sequence[tuple[str, np.ndarray]]
) -> Iterator[Generation]:
    """A continuation of the first tokens of each text, as many from each, sampled with a fixed seed."""
    device = next(model.parameters()).device
    if not starts:
        return
    length = min([PROMPT_TOKENS, *(len(ids_T) for _, ids_T in starts)])
    prompt_BS = torch.as_tensor(np.stack([ids_T[:length] for _, ids_T in starts]), dtype=torch.int64, device=device)
    out_BS = model.generate(prompt_BS, NEW_TOKENS, temperature=0.8, top_k=50, stop_tokens=(tokenizer.eod,), seed=0)
    for (domain, _), ids_S in zip(starts, out_BS.tolist(), strict=True):
        prompt, continuation = tokenizer.decode(ids_S[:length]), tokenizer.decode(ids_S[length:])
        yield Generation(domain=domain, prompt=prompt, continuation=continuation)


def pieces(tokenizer: Tokenizer, ids_T: Sequence[int]) -> list[str]:
    """The text that each token adds; a character of several tokens stands at its last one, the others are empty."""
    texts, unfinished = [], []
    for token_id in ids_T:
        unfinished.append(token_id)
        text = tokenizer.decode(unfinished)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(unfinished) < LONGEST_CHARACTER:
            texts.append("")
            continue
        texts.append(text or tokenizer.token_text(token_id))
        unfinished = []
    return texts


def _corpus(run: Run, corpora: dict[str, Corpus]) -> tuple[Corpus, Tokenizer]:
    tokenizer = load_saved_tokenizer(run.path / TOKENIZER)
    settings = to_yaml(run.config.data)
    if settings not in corpora:
        corpora[settings] = open_corpus(run.config.data)
    corpus = corpora[settings]
    if corpus.tokenizer.fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{run.path} was trained with tokenizer {tokenizer.name!r}, but its data now opens with another one, "
            f"{corpus.tokenizer.name!r}; restore the text and tokenizer files named in its config.yaml"
        )
    return corpus, tokenizer


def _device(setting: str) -> str:
    if torch.cuda.is_available():
        return "cuda" if setting == "auto" else setting
    return "cpu"


def _counts(model: ReMoEForCausalLM, run: Run, dataset: AnyDataset) -> TextCounts | None:
    if model.config.moe_layers == "none" or model.config.moe_layers == []:
        return None
    data, batch_size = run.config.data, run.config.train.micro_batch
    num_batches = max(1, COUNTED_TOKENS // (batch_size * data.sequence_length))
    batches = validation_batches(dataset, data.sequence_length, batch_size, num_batches)
    return collect(model, batches, dataset.domains, document_mask=data.document_mask)
