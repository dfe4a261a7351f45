"""One token a row after another: as ordinary calls of the model, or as a step of fixed shape in CUDA graphs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from remoe.model.cache import CacheWindow, KVCache
from remoe.model.config import ReMoEConfig
from remoe.model.decoder import Decoder
from remoe.model.loss import Head
from remoe.model.placement import place_step
from remoe.moe import moe_layers

logger = logging.getLogger(__name__)
SHORTEST_WINDOW = 256
_WORTH_CAPTURING = 16  # tokens: a capture costs about as much as five of them


class DecodingModel(nn.Module):
    """A language model as decoding sees it: called with a cache, it keeps the graphs of one text for the next."""

    config: ReMoEConfig
    model: Decoder

    def __init__(self) -> None:
        super().__init__()
        self.kept_decoding: FixedDecoding | None = None
        """CUDA graphs of the last text, for the next one like it; gone once the model trains."""

    def head(self) -> Head:
        """What makes logits of the last hidden states."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """As torch's; a model that trains gives back the memory of its graphs."""
        if mode:
            self.kept_decoding = None
        return super().train(mode)


class Decoding(Protocol):
    """Reads prompts, then one token a row a step. Logits are those of the next token, [B, V]."""

    def begin(self, model: DecodingModel, tokens_BS: Tensor, token_mask_BS: Tensor | None) -> Tensor: ...

    def step(self, model: DecodingModel, tokens_B: Tensor, token_mask_B: Tensor | None) -> Tensor:
        """The logits may lie in memory that the next step overwrites."""
        ...


class PlainDecoding:
    """Calls of the model with a cache that grows: each reads as many keys as there are."""

    def __init__(self, max_length: int) -> None:
        self.cache = KVCache(max_length)

    def begin(self, model: DecodingModel, tokens_BS: Tensor, token_mask_BS: Tensor | None) -> Tensor:
        """Read the prompts."""
        return read(model, tokens_BS, token_mask_BS, self.cache)

    def step(self, model: DecodingModel, tokens_B: Tensor, token_mask_B: Tensor | None) -> Tensor:
        """Read one more token of each row."""
        return read(model, tokens_B[:, None], None if token_mask_B is None else token_mask_B[:, None], self.cache)


def read(model: DecodingModel, tokens_BS: Tensor, token_mask_BS: Tensor | None, cache: KVCache) -> Tensor:
    """Call the model; the logits after each row's last token [B, V]."""
    return model(tokens_BS, token_mask_BS, cache=cache, logits_to_keep=1).logits[:, -1]


class FixedDecoding:
    """A step whose shapes and addresses are the same at every place, so that it can be captured as a CUDA graph.

    The place of the new token, the tokens that count and what routers remember are tensors, written between steps.
    Attention reads a window: 256 places, or 512, or 1024, ..., the least that holds all tokens so far; each window has
    its own graph. With `captures` off the same step runs as it is, on any device.
    """

    def __init__(self, model: DecodingModel, batch_size: int, max_length: int, captures: bool) -> None:
        device = model.model.embed_tokens.weight.device
        self.cache = KVCache(-(-max_length // SHORTEST_WINDOW) * SHORTEST_WINDOW)
        self.tokens_B1 = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.key_mask_BK = torch.zeros(batch_size, self.cache.max_length, dtype=torch.bool, device=device)
        self.memory: dict[int, Any] = {}
        """What routers keep of earlier tokens, by layer, at fixed addresses."""
        self.logits_BV: Tensor | None = None
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._capture = GraphCapture(device) if captures else None
        self._built_for = held_by_graphs(model)

    def __reduce__(self) -> Any:
        return type(None), ()  # a copied or pickled model starts without graphs

    def serves(self, model: DecodingModel, batch_size: int, max_length: int) -> bool:
        """Whether this can be used again: for so many rows and tokens, and a model that is as it was but for values."""
        has_room = max_length <= self.cache.max_length
        return has_room and batch_size == len(self.tokens_B1) and self._built_for == held_by_graphs(model)

    def begin(self, model: DecodingModel, tokens_BS: Tensor, token_mask_BS: Tensor | None) -> Tensor:
        """Read the prompts as one ordinary call."""
        self.cache.clear()
        logits_BV = read(model, tokens_BS, token_mask_BS, self.cache)
        self.key_mask_BK.zero_()
        self.key_mask_BK[:, : tokens_BS.shape[1]] = True if token_mask_BS is None else token_mask_BS
        if self.logits_BV is None:
            self.logits_BV = logits_BV.clone()
            self.memory = copied(self.cache.router_memory)
        copy_memory(self.memory, self.cache.router_memory)
        return logits_BV

    def step(self, model: DecodingModel, tokens_B: Tensor, token_mask_B: Tensor | None) -> Tensor:
        """Read one more token of each row; nothing waits once the window's graph is there."""
        place = self.cache.length
        self.tokens_B1.copy_(tokens_B[:, None])
        self.slot.fill_(place)
        self.key_mask_BK[:, place] = True if token_mask_B is None else token_mask_B
        self._run(model, min(window_for(place + 1), self.cache.max_length))
        self.cache.length += 1
        assert self.logits_BV is not None, "begin comes first"
        return self.logits_BV

    def _run(self, model: DecodingModel, window: int) -> None:
        if window not in self.graphs and self._capture is not None:
            graph = self._capture(lambda: self._next(model, window), lambda: self._keep(*self._next(model, window)))
            if graph is None:
                self._capture = None
            else:
                self.graphs[window] = graph
        if window in self.graphs:
            self.graphs[window].replay()
        else:
            self._keep(*self._next(model, window))

    def _next(self, model: DecodingModel, window: int) -> tuple[Tensor, dict[int, Any]]:
        """The next token's logits and what routers remember after this one; only keys and values are written."""
        placement = place_step(self.slot, self.key_mask_BK[:, :window])
        seen = CacheWindow(self.cache, self.slot, window, dict(self.memory))
        hidden_B1H, _ = model.model(self.tokens_B1, placement, seen)
        return model.head().logits(hidden_B1H)[:, -1], seen.router_memory

    def _keep(self, logits_BV: Tensor, memory: dict[int, Any]) -> None:
        assert self.logits_BV is not None, "begin comes first"
        self.logits_BV.copy_(logits_BV)
        copy_memory(self.memory, memory)


class GraphCapture:
    """Captures steps as CUDA graphs that share their memory: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, probe: Callable[[], Any], step: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """The captured step; None where the step waits for the GPU. `probe` is the step but for what it leaves."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                probe()  # compiles and chooses kernels
                obstacle = what_waits(probe)
            current.wait_stream(self._stream)
            if obstacle is not None:
                logger.warning("generation runs without CUDA graphs: %s", obstacle)
                return None
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads, such as one that pins batches, may use the GPU meanwhile
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                step()
            return graph


def what_waits(run: Callable[[], Any]) -> str | None:
    """Run something; what torch says of the first operation in it that waits for the GPU, None if none does."""
    before = torch.cuda.get_sync_debug_mode()
    # for good: the list of filters is the process's, and there may be other threads
    warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return None


def decoding_for(model: DecodingModel, tokens_BS: Tensor, max_new_tokens: int, cuda_graphs: bool) -> Decoding:
    """What continues these prompts: a step in CUDA graphs where the model can be captured and it pays.

    Graphs from an earlier text are taken from the model until `give_back`: two texts at a time need two.
    """
    batch_size, max_length = tokens_BS.shape[0], tokens_BS.shape[1] + max_new_tokens
    if not cuda_graphs or obstacle_to_graphs(model, tokens_BS.device) is not None:
        return PlainDecoding(max_length)
    kept = model.kept_decoding
    if kept is not None and kept.serves(model, batch_size, max_length):
        model.kept_decoding = None
        return kept
    if max_new_tokens < _WORTH_CAPTURING:
        return PlainDecoding(max_length)
    kept = model.kept_decoding = None  # its memory is free before the next one takes some
    return FixedDecoding(model, batch_size, max_length, captures=True)


def give_back(model: DecodingModel, decoding: Decoding | None) -> None:
    """Let the model keep its graphs for the next text."""
    if isinstance(decoding, FixedDecoding):
        model.kept_decoding = decoding


def obstacle_to_graphs(model: DecodingModel, device: torch.device) -> str | None:
    """Why the step cannot be a graph although nothing in it waits; None where it can."""
    if device.type != "cuda":
        return f"device {device} has none"
    if torch.is_autocast_enabled("cuda"):
        return "autocast keeps its copies of weights outside of a graph; cast the model instead"
    if model.config.is_post_norm:
        return "post_norm experts wait for their numbers of rows"
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        return "ranks share the weights"
    if any(layer.exchange is not None for layer in moe_layers(model)):
        return "ranks share the experts"
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "a hook would see no step"
    return None


def window_for(length: int) -> int:
    """The least window that holds so many tokens."""
    return max(SHORTEST_WINDOW, 1 << (length - 1).bit_length())


def held_by_graphs(model: DecodingModel) -> tuple[Any, ...]:
    """What a graph takes for good: where the weights lie, whatever they become, and the numbers in routers."""
    places = ((tensor.data_ptr(), tensor.dtype) for tensor in chain(model.parameters(), model.buffers()))
    routers = (layer.router for layer in moe_layers(model))
    numbers = (value for router in routers for value in vars(router).values() if isinstance(value, (int, float, str)))
    return (*places, *numbers)


def copied(memory: dict[int, Any]) -> dict[int, Any]:
    """The same with copies of its tensors."""
    return {layer: type(kept)(*(tensor.clone() for tensor in kept)) for layer, kept in memory.items()}


def copy_memory(target: dict[int, Any], source: dict[int, Any]) -> None:
    """Copy what routers keep, tensor by tensor, to where it lies in `target`."""
    for layer, kept in target.items():
        for to, tensor in zip(kept, source[layer], strict=True):
            to.copy_(tensor)
